use axum_core::response::{IntoResponse, Response};
use http::{HeaderValue, StatusCode, header};

use crate::{Refused, SpawnError};

impl IntoResponse for SpawnError {
    fn into_response(self) -> Response {
        let (status, title) = match self {
            Self::Full | Self::Closed => (StatusCode::SERVICE_UNAVAILABLE, "Service Unavailable"),
            Self::NoRuntime => (StatusCode::INTERNAL_SERVER_ERROR, "Internal Server Error"),
        };
        // `detail` is one of our own texts, which need no escaping.
        let problem = format!(
            r#"{{"type":"about:blank","title":"{title}","status":{},"detail":"{self}"}}"#,
            status.as_u16(),
        );
        let mut response = (status, problem).into_response();
        let headers = response.headers_mut();
        headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/problem+json"));
        if status == StatusCode::SERVICE_UNAVAILABLE {
            headers.insert(header::RETRY_AFTER, HeaderValue::from_static("1"));
        }
        response
    }
}

impl<F> IntoResponse for Refused<F> {
    fn into_response(self) -> Response {
        self.reason.into_response()
    }
}
