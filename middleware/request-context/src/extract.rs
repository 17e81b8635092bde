use std::{convert::Infallible, fmt};

use axum_core::{
    extract::{FromRequestParts, OptionalFromRequestParts},
    response::{IntoResponse, Response},
};
use http::{StatusCode, request::Parts};

use crate::RequestContext;

/// The context in the request's type map, if one is there, or else the current one.
impl<S: Sync> FromRequestParts<S> for RequestContext {
    type Rejection = NoRequestContext;

    async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Self, NoRequestContext> {
        match parts.extensions.get::<Self>() {
            Some(context) => Ok(context.clone()),
            None => Some(Self::current())
                .filter(|context| !context.is_empty())
                .ok_or(NoRequestContext(())),
        }
    }
}

impl<S: Sync> OptionalFromRequestParts<S> for RequestContext {
    type Rejection = Infallible;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Option<Self>, Infallible> {
        Ok(<Self as FromRequestParts<S>>::from_request_parts(parts, state).await.ok())
    }
}

/// The handler asked for a [`RequestContext`] where there is none.
#[derive(Clone, Copy, Debug)]
pub struct NoRequestContext(());

impl fmt::Display for NoRequestContext {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(
            "no request context here: add `RequestContextLayer` outside of this handler; if it is \
             there, something in between runs the handler on another task, so add \
             `.in_extensions()` to the layer",
        )
    }
}

impl std::error::Error for NoRequestContext {}

impl IntoResponse for NoRequestContext {
    fn into_response(self) -> Response {
        (StatusCode::INTERNAL_SERVER_ERROR, self.to_string()).into_response()
    }
}
