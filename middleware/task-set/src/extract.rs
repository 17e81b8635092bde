use std::convert::Infallible;

use axum_core::{
    extract::{FromRequestParts, OptionalFromRequestParts},
    response::{IntoResponse, Response},
};
use http::{StatusCode, request::Parts};

use crate::{NoTaskSet, TaskSet};

/// The set in the request's type map, if one is there, or else the current one.
impl<S: Sync> FromRequestParts<S> for TaskSet {
    type Rejection = NoTaskSet;

    async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Self, NoTaskSet> {
        match parts.extensions.get::<Self>() {
            Some(set) => Ok(set.clone()),
            None => Self::current(),
        }
    }
}

impl<S: Sync> OptionalFromRequestParts<S> for TaskSet {
    type Rejection = Infallible;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Option<Self>, Infallible> {
        Ok(<Self as FromRequestParts<S>>::from_request_parts(parts, state).await.ok())
    }
}

impl IntoResponse for NoTaskSet {
    fn into_response(self) -> Response {
        (StatusCode::INTERNAL_SERVER_ERROR, self.to_string()).into_response()
    }
}
