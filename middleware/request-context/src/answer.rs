use std::{
    fmt::Write,
    mem,
    panic::{AssertUnwindSafe, catch_unwind},
};

use bytes::Bytes;
use http::{
    HeaderMap, HeaderName, HeaderValue, Method, Request, Response, StatusCode, Version, header,
};

use crate::{RequestContext, RequestId, TraceId};

const GRPC_STATUS: HeaderName = HeaderName::from_static("grpc-status");
const GRPC_MESSAGE: HeaderName = HeaderName::from_static("grpc-message");

/// What a layer answers with when it answers by itself, in whatever [`Dialect`] the client speaks.
///
/// For those who write a layer. Before the head it is a [`response`](Self::response); after it, a
/// gRPC client is told in [`trailers`](Self::trailers), and any other by an error of the body.
///
/// ```
/// use http::{Request, StatusCode};
/// use tower_request_context::{Answer, Dialect};
///
/// const FULL: Answer = Answer::new(StatusCode::SERVICE_UNAVAILABLE, 8, "full").retry_after(1);
///
/// let response = FULL.response(Dialect::of(&Request::new(())));
/// assert_eq!(response.status(), 503);
/// assert_eq!(response.headers()["retry-after"], "1");
///
/// let grpc = Request::post("/").header("content-type", "application/grpc").body(()).unwrap();
/// assert_eq!(FULL.response(Dialect::of(&grpc)).headers()["grpc-status"], "8");
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Answer {
    status: StatusCode,
    grpc_status: u8,
    detail: &'static str,
    retry_after: Option<u32>,
}

impl Answer {
    /// An answer with this HTTP status, this [gRPC status code], and this explanation, which the
    /// client sees; empty for none.
    ///
    /// [gRPC status code]: https://grpc.github.io/grpc/core/md_doc_statuscodes.html
    pub const fn new(status: StatusCode, grpc_status: u8, detail: &'static str) -> Self {
        Self { status, grpc_status, detail, retry_after: None }
    }

    /// Tells the client to come back in so many seconds (RFC 9110, section 10.2.3).
    pub const fn retry_after(mut self, seconds: u32) -> Self {
        self.retry_after = Some(seconds);
        self
    }

    /// The whole response: a problem document (RFC 9457), with the ids of the current request if
    /// it has any; for gRPC, status 200 and the gRPC status in the headers ("Trailers-Only").
    pub fn response(&self, dialect: Dialect) -> Response<Bytes> {
        let (trace_id, request_id) = current_ids();
        self.response_with_ids(dialect, trace_id, request_id.as_ref())
    }

    /// As [`response`](Self::response), for when the ids are known or the request's context is
    /// not the current one.
    pub fn response_with_ids(
        &self,
        dialect: Dialect,
        trace_id: Option<TraceId>,
        request_id: Option<&RequestId>,
    ) -> Response<Bytes> {
        let mut response;
        if dialect.is_grpc() {
            response = Response::new(Bytes::new());
            *response.headers_mut() = self.trailers();
        } else {
            response = Response::new(self.problem(trace_id, request_id).into());
            *response.status_mut() = self.status;
        }
        let headers = response.headers_mut();
        let content_type = HeaderValue::from_static(dialect.content_type());
        headers.insert(header::CONTENT_TYPE, content_type);
        if let Some(seconds) = self.retry_after {
            headers.insert(header::RETRY_AFTER, seconds.into());
        }
        dialect.fit(response)
    }

    /// The trailers that end a gRPC response after its head.
    pub fn trailers(&self) -> HeaderMap {
        let mut trailers = HeaderMap::with_capacity(4);
        trailers.insert(GRPC_STATUS, u16::from(self.grpc_status).into());
        if let Ok(message) = HeaderValue::try_from(percent_encode(self.detail)) {
            if !message.is_empty() {
                trailers.insert(GRPC_MESSAGE, message);
            }
        }
        trailers
    }

    fn problem(&self, trace_id: Option<TraceId>, request_id: Option<&RequestId>) -> String {
        let mut problem = String::from(r#"{"type":"about:blank""#);
        if let Some(title) = self.status.canonical_reason() {
            let _ = write!(problem, r#","title":"{title}""#);
        }
        let _ = write!(problem, r#","status":{}"#, self.status.as_u16());
        if !self.detail.is_empty() {
            problem.push_str(r#","detail":""#);
            push_json(&mut problem, self.detail);
            problem.push('"');
        }
        // The ids are of characters that JSON needs not escape.
        if let Some(id) = trace_id {
            let _ = write!(problem, r#","trace_id":"{id}""#);
        }
        if let Some(id) = request_id {
            let _ = write!(problem, r#","request_id":"{id}""#);
        }
        problem.push('}');
        problem
    }
}

/// How the client of a request speaks: HTTP, or a form of gRPC, by the request's content type; and
/// whether it wants no more than the head of the answer.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Dialect {
    form: Form,
    codec: Codec,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Form {
    /// HTTP without gRPC.
    #[default]
    Http,
    /// The same, to HEAD.
    Head,
    /// gRPC over HTTP/2.
    Grpc,
    /// gRPC over HTTP/1, where hyper leaves out trailers that the head did not announce.
    GrpcWithoutTrailers,
    /// grpc-web, whose trailers are a part of the body.
    Web,
    /// The same, in base64.
    WebText,
}

/// Of gRPC, that which the client names: some take nothing else for an answer. One that is not
/// known here is left out, which most take.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Codec {
    #[default]
    Unnamed,
    Proto,
    Json,
}

impl Dialect {
    /// That of this request's client. A request that is no POST is not gRPC, whatever it says
    /// (gRPC over HTTP/2, "Requests").
    pub fn of<B>(request: &Request<B>) -> Self {
        if request.method() != Method::POST {
            let form = if request.method() == Method::HEAD { Form::Head } else { Form::Http };
            return Self { form, codec: Codec::Unnamed };
        }
        let content_type = request.headers().get(header::CONTENT_TYPE);
        let mut dialect = content_type.and_then(Self::of_content_type).unwrap_or_default();
        if dialect.form == Form::Grpc && request.version() < Version::HTTP_2 {
            dialect.form = Form::GrpcWithoutTrailers;
        }
        dialect
    }

    /// A layer's own response as the client takes it: to HEAD it has no content, and its
    /// `content-length` is that of the answer to GET (RFC 9110, section 9.3.2). Servers leave the
    /// content out over HTTP/1 alone, and clients take it for an error over HTTP/2. An [`Answer`] is
    /// like this already.
    pub fn fit(self, mut response: Response<Bytes>) -> Response<Bytes> {
        if self.form == Form::Head {
            let content = mem::take(response.body_mut());
            let headers = response.headers_mut();
            if !content.is_empty() && !headers.contains_key(header::CONTENT_LENGTH) {
                // A full map takes no more.
                drop(headers.try_insert(header::CONTENT_LENGTH, content.len().into()));
            }
        }
        response
    }

    /// Whether it is gRPC in any form, grpc-web too.
    pub const fn is_grpc(self) -> bool {
        !matches!(self.form, Form::Http | Form::Head)
    }

    /// Whether the client of this response sees [trailers](Answer::trailers) after its head.
    pub fn ends_in_trailers<B>(self, response: &Response<B>) -> bool {
        self.form == Form::Grpc
            && response
                .headers()
                .get(header::CONTENT_TYPE)
                .and_then(Self::of_content_type)
                .is_some_and(|dialect| dialect.form == Form::Grpc)
    }

    /// `None`: not gRPC.
    fn of_content_type(content_type: &HeaderValue) -> Option<Self> {
        let rest = strip_prefix(content_type.as_bytes(), b"application/grpc")?;
        let (form, rest) = match strip_prefix(rest, b"-web") {
            None => (Form::Grpc, rest),
            Some(rest) => match strip_prefix(rest, b"-text") {
                None => (Form::Web, rest),
                Some(rest) => (Form::WebText, rest),
            },
        };
        let codec = match rest {
            [b'+', codec @ ..] if is_name(codec, b"proto") => Codec::Proto,
            [b'+', codec @ ..] if is_name(codec, b"json") => Codec::Json,
            [] | [b';' | b' ' | b'\t' | b'+', ..] => Codec::Unnamed,
            _ => return None,
        };
        Some(Self { form, codec })
    }

    const fn content_type(self) -> &'static str {
        match (self.form, self.codec) {
            (Form::Http | Form::Head, _) => "application/problem+json",
            (Form::Grpc | Form::GrpcWithoutTrailers, Codec::Unnamed) => "application/grpc",
            (Form::Grpc | Form::GrpcWithoutTrailers, Codec::Proto) => "application/grpc+proto",
            (Form::Grpc | Form::GrpcWithoutTrailers, Codec::Json) => "application/grpc+json",
            (Form::Web, Codec::Unnamed) => "application/grpc-web",
            (Form::Web, Codec::Proto) => "application/grpc-web+proto",
            (Form::Web, Codec::Json) => "application/grpc-web+json",
            (Form::WebText, Codec::Unnamed) => "application/grpc-web-text",
            (Form::WebText, Codec::Proto) => "application/grpc-web-text+proto",
            (Form::WebText, Codec::Json) => "application/grpc-web-text+json",
        }
    }
}

fn strip_prefix<'a>(text: &'a [u8], prefix: &[u8]) -> Option<&'a [u8]> {
    let (head, rest) = text.split_at_checked(prefix.len())?;
    head.eq_ignore_ascii_case(prefix).then_some(rest)
}

fn is_name(text: &[u8], name: &[u8]) -> bool {
    strip_prefix(text, name).is_some_and(|rest| matches!(rest, [] | [b';' | b' ' | b'\t', ..]))
}

fn current_ids() -> (Option<TraceId>, Option<RequestId>) {
    // A part of a value: the code of others.
    let ids = catch_unwind(AssertUnwindSafe(|| {
        let context = RequestContext::current();
        (context.get().copied(), context.get().cloned())
    }));
    // The drop of a payload may panic as well, and so on for ever: the second one is leaked.
    let discard = |payload| catch_unwind(AssertUnwindSafe(|| drop(payload))).map_err(mem::forget);
    ids.map_err(discard).unwrap_or_default()
}

/// RFC 8259, section 7.
fn push_json(json: &mut String, text: &str) {
    for char in text.chars() {
        match char {
            '"' | '\\' => json.extend(['\\', char]),
            ..' ' => {
                let _ = write!(json, "\\u{:04x}", u32::from(char));
            }
            _ => json.push(char),
        }
    }
}

/// gRPC over HTTP/2, "Responses": `Percent-Encoded`.
fn percent_encode(text: &str) -> String {
    let mut encoded = String::with_capacity(text.len());
    for byte in text.bytes() {
        match byte {
            b'%' | ..b' ' | 0x7f.. => {
                let _ = write!(encoded, "%{byte:02X}");
            }
            _ => encoded.push(char::from(byte)),
        }
    }
    encoded
}

#[cfg(test)]
mod tests {
    use std::{
        any::{Any, TypeId},
        panic::resume_unwind,
        sync::Arc,
    };

    use super::*;
    use crate::{Inherit, Task};

    const ODD: Answer = Answer::new(StatusCode::IM_A_TEAPOT, 2, "50 % \"tea\"\n\\ é");

    fn dialect(content_type: &str, version: Version) -> Dialect {
        let request = Request::post("/").version(version).header("content-type", content_type);
        Dialect::of(&request.body(()).expect("it is well-formed"))
    }

    fn http2(content_type: &str) -> Dialect {
        dialect(content_type, Version::HTTP_2)
    }

    #[test]
    fn an_explanation_is_escaped_for_whoever_reads_it() {
        let problem = ODD.response(Dialect::default()).into_body();
        let expected = "{\"type\":\"about:blank\",\"title\":\"I'm a teapot\",\"status\":418,\
            \"detail\":\"50 % \\\"tea\\\"\\u000a\\\\ é\"}";
        assert_eq!(problem, expected);
        assert_eq!(ODD.trailers()["grpc-message"], "50 %25 \"tea\"%0A\\ %C3%A9");
    }

    #[test]
    fn without_an_explanation_there_is_none() {
        let bare = Answer::new(StatusCode::GATEWAY_TIMEOUT, 4, "");
        assert_eq!(
            bare.response(Dialect::default()).into_body(),
            r#"{"type":"about:blank","title":"Gateway Timeout","status":504}"#
        );
        assert_eq!(bare.trailers().len(), 1);
    }

    #[test]
    fn the_ids_of_the_current_request_are_in_a_problem() {
        let trace_id = TraceId::from_bytes([0xab; 16]).expect("it is not zero");
        let context = RequestContext::new().with(trace_id);
        let response = context.sync_scope(|| ODD.response(Dialect::default()));
        let body = String::from_utf8(response.into_body().to_vec()).expect("it is UTF-8");
        assert!(body.ends_with(&format!(r#","trace_id":"{trace_id}"}}"#)), "{body}");
    }

    #[test]
    fn an_answer_without_ids_leaks_nothing_of_the_panic_that_has_cost_them() {
        struct Throws(Arc<()>);
        impl Inherit for Throws {
            fn inherit(&self, _: &Task) -> Self {
                Self(self.0.clone())
            }
            fn part(&self, _: TypeId) -> Option<&dyn Any> {
                resume_unwind(Box::new(self.0.clone()))
            }
        }
        let count = Arc::new(());
        let context = RequestContext::new().with_inherited(Throws(count.clone()));
        let response = context.sync_scope(|| ODD.response(Dialect::default()));
        assert!(!String::from_utf8_lossy(response.body()).contains("trace_id"));
        assert_eq!(Arc::strong_count(&count), 1);
    }

    #[test]
    fn grpc_is_told_by_its_content_type_and_answered_in_it() {
        for (content_type, answered) in [
            ("application/grpc", "application/grpc"),
            ("Application/gRPC+Proto", "application/grpc+proto"),
            ("application/grpc+json; x", "application/grpc+json"),
            ("application/grpc+thrift", "application/grpc"),
            ("application/grpc;charset=x", "application/grpc"),
            ("application/grpc-web", "application/grpc-web"),
            ("application/grpc-web+proto", "application/grpc-web+proto"),
            ("application/grpc-web-text", "application/grpc-web-text"),
            ("application/grpc-web-text+proto", "application/grpc-web-text+proto"),
            ("application/grpcx", "application/problem+json"),
            ("application/grpc-", "application/problem+json"),
            ("application/grpc-webx", "application/problem+json"),
            ("application/grpc-web-texts", "application/problem+json"),
            ("application/json", "application/problem+json"),
            ("", "application/problem+json"),
        ] {
            for version in [Version::HTTP_11, Version::HTTP_2] {
                let dialect = dialect(content_type, version);
                let response = ODD.response(dialect);
                assert_eq!(response.headers()["content-type"], answered, "{content_type}");
                assert_eq!(dialect.is_grpc(), answered != "application/problem+json");
                assert_eq!(dialect.is_grpc(), response.headers().contains_key("grpc-status"));
            }
        }
        assert!(!Dialect::of(&Request::new(())).is_grpc());
    }

    #[test]
    fn an_answer_to_head_is_that_to_get_without_its_content() {
        let get = ODD.response(Dialect::of(&Request::new(())));
        let head = Request::head("/").body(()).expect("it is well-formed");
        let head = Dialect::of(&head);
        let answer = ODD.response(head);
        assert_eq!((answer.status(), answer.body().len()), (get.status(), 0));
        assert_eq!(answer.headers()["content-type"], get.headers()["content-type"]);
        assert_eq!(answer.headers()["content-length"], get.body().len().to_string());

        let mut known = Response::new(Bytes::from_static(b"of another"));
        known.headers_mut().insert("content-length", 7.into());
        let fit = head.fit(known.clone());
        assert_eq!((&fit.headers()["content-length"], fit.body().len()), (&7.into(), 0));
        assert!(head.fit(Response::new(Bytes::new())).headers().is_empty());
        assert_eq!(Dialect::default().fit(known).body(), "of another");
    }

    #[test]
    fn only_a_grpc_response_over_http_2_ends_in_trailers() {
        let grpc = ODD.response(http2("application/grpc"));
        let problem = ODD.response(http2("text/plain"));
        assert!(http2("application/grpc+proto").ends_in_trailers(&grpc));
        assert!(!http2("application/grpc").ends_in_trailers(&problem));
        assert!(!dialect("application/grpc", Version::HTTP_11).ends_in_trailers(&grpc));
        assert!(!http2("application/grpc-web").ends_in_trailers(&grpc));
        assert!(!http2("text/plain").ends_in_trailers(&grpc));
    }
}
