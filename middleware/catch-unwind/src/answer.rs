use bytes::Bytes;
use http::{Method, Request, Response, StatusCode, uri::PathAndQuery};
use tower_request_context::{Answer, Dialect};

use crate::{Panic, catch::escape};

/// Of the panic itself the client sees nothing.
pub(crate) const INTERNAL: Answer =
    Answer::new(StatusCode::INTERNAL_SERVER_ERROR, 13, "internal error");

/// What must be known of a request to answer a panic and to tell of it. Nothing of it is copied:
/// the path is a reference into what the server has read.
#[derive(Debug, Default)]
pub(crate) struct Seen {
    method: Option<Method>,
    path: Option<PathAndQuery>,
    pub(crate) dialect: Dialect,
}

impl Seen {
    pub(crate) fn of<B>(request: &Request<B>) -> Self {
        Self {
            method: Some(request.method().clone()),
            path: request.uri().path_and_query().cloned(),
            dialect: Dialect::of(request),
        }
    }

    pub(crate) fn method(&self) -> Option<&str> {
        self.method.as_ref().map(Method::as_str)
    }

    /// The path as it can go into any log, without the query, which may hold secrets.
    pub(crate) fn path(&self) -> Option<Box<str>> {
        const MAX: usize = 256;
        self.path.as_ref().map(|path| escape(path.path(), MAX))
    }

    /// Whether the client understands this answer to a panic.
    pub(crate) fn understands<B>(&self, answer: &Response<B>) -> bool {
        !self.dialect.is_grpc() || answer.headers().contains_key("grpc-status")
    }

    /// The answer to a panic, unless the user has a better one.
    pub(crate) fn default_answer(&self, panic: &Panic) -> Response<Bytes> {
        INTERNAL.response_with_ids(self.dialect, panic.trace_id(), panic.request_id())
    }
}
