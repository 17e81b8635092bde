use axum_core::{
    body::Body,
    response::{IntoResponse, Response},
};
use tower_request_context::Dialect;

use crate::{Refused, SpawnError};

impl IntoResponse for SpawnError {
    fn into_response(self) -> Response {
        self.answer().response(Dialect::default()).map(Body::from)
    }
}

impl<F> IntoResponse for Refused<F> {
    fn into_response(self) -> Response {
        self.reason.into_response()
    }
}
