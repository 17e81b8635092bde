use std::fmt::Write;

use bytes::Bytes;
use http::{
    HeaderMap, HeaderName, HeaderValue, Method, Request, Response, StatusCode, Version, header,
    uri::PathAndQuery,
};

use crate::{Panic, catch::escape};

const GRPC_STATUS: HeaderName = HeaderName::from_static("grpc-status");
const GRPC_MESSAGE: HeaderName = HeaderName::from_static("grpc-message");

/// What must be known of a request to answer a panic and to tell of it. Nothing of it is copied:
/// the path is a reference into what the server has read.
#[derive(Debug, Default)]
pub(crate) struct Seen {
    method: Option<Method>,
    path: Option<PathAndQuery>,
    grpc: Option<Grpc>,
}

#[derive(Debug)]
struct Grpc {
    content_type: HeaderValue,
    /// Whether the client sees trailers.
    trailers: bool,
}

impl Seen {
    pub(crate) fn of<B>(request: &Request<B>) -> Self {
        let grpc = request.headers().get(header::CONTENT_TYPE).and_then(|content_type| {
            let dialect = Dialect::of(content_type)?;
            // Over HTTP/1 hyper leaves out trailers that the response's head did not announce.
            let trailers = dialect == Dialect::Grpc && request.version() >= Version::HTTP_2;
            Some(Grpc { content_type: content_type.clone(), trailers })
        });
        Self {
            method: Some(request.method().clone()),
            path: request.uri().path_and_query().cloned(),
            grpc,
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

    /// Whether a panic of this response's body can be told in trailers.
    pub(crate) fn ends_in_trailers<B>(&self, response: &Response<B>) -> bool {
        let is_grpc = |content_type| Dialect::of(content_type) == Some(Dialect::Grpc);
        self.grpc.as_ref().is_some_and(|grpc| grpc.trailers)
            && response.headers().get(header::CONTENT_TYPE).is_some_and(is_grpc)
    }

    /// Whether the client understands this answer to a panic.
    pub(crate) fn understands<B>(&self, answer: &Response<B>) -> bool {
        self.grpc.is_none() || answer.headers().contains_key(GRPC_STATUS)
    }

    /// The answer to a panic, unless the user has a better one.
    pub(crate) fn default_answer(&self, panic: &Panic) -> Response<Bytes> {
        let mut response;
        let content_type = if let Some(grpc) = &self.grpc {
            response = Response::new(Bytes::new());
            response.headers_mut().extend(internal());
            grpc.content_type.clone()
        } else {
            response = Response::new(problem(panic));
            *response.status_mut() = StatusCode::INTERNAL_SERVER_ERROR;
            HeaderValue::from_static("application/problem+json")
        };
        response.headers_mut().insert(header::CONTENT_TYPE, content_type);
        response
    }
}

/// How a gRPC client speaks, by its content type.
#[derive(Debug, PartialEq)]
enum Dialect {
    /// gRPC over HTTP/2, with or without the name of a codec (`+proto`).
    Grpc,
    /// grpc-web, whose trailers are a part of the body.
    Web,
}

impl Dialect {
    fn of(content_type: &HeaderValue) -> Option<Self> {
        const GRPC: &[u8] = b"application/grpc";
        let (head, rest) = content_type.as_bytes().split_at_checked(GRPC.len())?;
        if !head.eq_ignore_ascii_case(GRPC) {
            return None;
        }
        match rest {
            [] | [b'+' | b';' | b' ' | b'\t', ..] => Some(Self::Grpc),
            [b'-', web @ ..] => {
                let web = web.get(..3)?;
                web.eq_ignore_ascii_case(b"web").then_some(Self::Web)
            }
            _ => None,
        }
    }
}

/// The trailers of a gRPC response that failed with `INTERNAL`.
pub(crate) fn internal() -> HeaderMap {
    let mut trailers = HeaderMap::with_capacity(2);
    trailers.insert(GRPC_STATUS, HeaderValue::from_static("13"));
    trailers.insert(GRPC_MESSAGE, HeaderValue::from_static("internal error"));
    trailers
}

/// A problem document (RFC 9457). The ids are of characters that JSON needs not escape.
fn problem(panic: &Panic) -> Bytes {
    let mut problem =
        String::from(r#"{"type":"about:blank","title":"Internal Server Error","status":500"#);
    if let Some(id) = panic.trace_id() {
        let _ = write!(problem, r#","trace_id":"{id}""#);
    }
    if let Some(id) = panic.request_id() {
        let _ = write!(problem, r#","request_id":"{id}""#);
    }
    problem.push('}');
    problem.into()
}
