use bytes::Bytes;
use http::{Method, Request, Response, StatusCode, uri::PathAndQuery};
use tower_request_context::{Answer, Dialect};

use crate::{Panic, catch::escape};

/// Of the panic itself the client sees nothing.
pub(crate) const INTERNAL: Answer =
    Answer::new(StatusCode::INTERNAL_SERVER_ERROR, 13, "internal error");

/// The method, for reports and logs. It may be any token (RFC 9110, section 9.1), and a server reads
/// one of hundreds of kilobytes: longer than 32 bytes, which none is that was registered, it is
/// `OTHER`.
#[doc(hidden)]
pub fn short_method(method: &Method) -> Method {
    const MAX: usize = 32;
    if method.as_str().len() <= MAX {
        method.clone()
    } else {
        Method::from_bytes(b"OTHER").unwrap_or_default()
    }
}

/// What must be known of a request to answer a panic and to tell of it. The path is a reference into
/// what the server has read; the method is [short](short_method).
#[derive(Debug, Default)]
pub(crate) struct Seen {
    method: Option<Method>,
    path: Option<PathAndQuery>,
    pub(crate) dialect: Dialect,
}

impl Seen {
    pub(crate) fn of<B>(request: &Request<B>) -> Self {
        Self {
            method: Some(short_method(request.method())),
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
