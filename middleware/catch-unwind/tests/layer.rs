//! The layer in process: every origin of a panic with every kind of payload.

#![allow(missing_docs, clippy::unwrap_used)] // Tests.

use std::{
    any::Any,
    cell::Cell,
    collections::BTreeMap,
    convert::Infallible,
    env,
    error::Error,
    fmt, mem,
    panic::{self, AssertUnwindSafe, catch_unwind, panic_any},
    pin::Pin,
    process::Command,
    rc::Rc,
    sync::{Arc, Mutex, Once},
    task::{Context, Poll, Waker},
};

use bytes::Bytes;
use http::{HeaderMap, Request, Response, StatusCode, Version, header};
use http_body::{Body, Frame, SizeHint};
use http_body_util::{BodyExt, Empty, Full};
use tokio_test::{assert_pending, assert_ready, assert_ready_err, assert_ready_ok, task};
use tower::{Layer, Service, ServiceExt, service_fn};
use tower_catch_unwind::{BodyError, CallError, CatchUnwindLayer, Panic, ResponseBody, record};
use tower_request_context::{RequestContext, RequestContextLayer, RequestId, TraceId};
use tower_test::mock;
use tracing::field::{Field, Visit};
use tracing_subscriber::layer::SubscriberExt;

const NOT_A_STRING: &str = "(the payload is not a string)";

// The table.

#[derive(Clone, Copy, Debug, PartialEq)]
enum Origin {
    Call,
    Poll,
    LaterPoll,
    DropWhenReady,
    DropHalfWay,
    MakeOnPanic,
    BodyFirst,
    BodyLater,
    BodyDrop,
    SizeHint,
    IsEndStream,
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Kind {
    Http,
    Grpc,
    GrpcWeb,
}

/// Panics when it is dropped, with a payload that panics when it is dropped, and so on.
struct Bomb(u32);

impl Drop for Bomb {
    fn drop(&mut self) {
        if let Some(left) = self.0.checked_sub(1) {
            panic_any(Self(left));
        }
    }
}

const PAYLOADS: [(&str, Payload, &str); 5] = [
    ("&str", || Box::new("a literal"), "a literal"),
    ("String", || Box::new(String::from("two\nlines")), r"two\nlines"),
    ("not a string", || Box::new(7_u32), NOT_A_STRING),
    ("whose drop panics", || Box::new(Bomb(4)), NOT_A_STRING),
    ("64 MiB", || Box::new("x".repeat(64 << 20)), "x"),
];

#[test]
fn every_origin_with_every_payload_has_one_outcome_and_one_event() {
    for origin in [
        Origin::Call,
        Origin::Poll,
        Origin::LaterPoll,
        Origin::DropWhenReady,
        Origin::DropHalfWay,
        Origin::MakeOnPanic,
        Origin::BodyFirst,
        Origin::BodyLater,
        Origin::BodyDrop,
        Origin::SizeHint,
        Origin::IsEndStream,
    ] {
        for (name, payload, message) in PAYLOADS {
            for kind in [Kind::Http, Kind::Grpc, Kind::GrpcWeb] {
                let case = format!("{origin:?}, payload {name}, {kind:?}");
                let served = serve(origin, kind, payload);
                // What escapes must not reach the test harness, which would drop it.
                let (answer, mut events) = served.map_err(mem::forget).expect(&case);
                assert_eq!(answer, expected(origin, kind), "{case}");
                assert_eq!(events.len(), 1, "{case}: {events:?}");
                let event = events.remove(0);
                if name == "64 MiB" {
                    assert_eq!(event["panic"], message.repeat(Panic::MESSAGE_MAX), "{case}");
                } else {
                    assert_eq!(event["panic"], message, "{case}");
                }
                assert!(event["location"].contains("tests/layer.rs:"), "{case}: {event:?}");
                assert_eq!(event["during"], during(origin), "{case}");
                assert_eq!(event["trace_id"], trace_id().to_string(), "{case}");
                assert_eq!(event["request_id"], "order-7", "{case}");
            }
        }
    }
}

/// What the client sees.
#[derive(Debug, Default, PartialEq)]
struct Answer {
    status: u16,
    content_type: String,
    data: String,
    /// `grpc-status`, in the head or in trailers.
    grpc_status: Option<String>,
    cut: bool,
    marked: bool,
}

fn expected(origin: Origin, kind: Kind) -> Answer {
    let content_type = String::from(match kind {
        Kind::Http => "text/plain",
        Kind::Grpc => "application/grpc+proto",
        Kind::GrpcWeb => "application/grpc-web-text",
    });
    let whole = Answer { status: 200, content_type, data: "onetwo".into(), ..Answer::default() };
    let internal = || Some("13".to_owned());
    match (origin, kind) {
        (Origin::DropHalfWay, _) => Answer::default(),
        (
            Origin::Call
            | Origin::Poll
            | Origin::LaterPoll
            | Origin::DropWhenReady
            | Origin::MakeOnPanic,
            Kind::Http,
        ) => Answer {
            status: 500,
            content_type: "application/problem+json".into(),
            data: r#"{"type":"about:blank","title":"Internal Server Error","status":500,"detail":"internal error","trace_id":"0af7651916cd43dd8448eb211c80319c","request_id":"order-7"}"#.into(),
            marked: true,
            ..whole
        },
        (
            Origin::Call
            | Origin::Poll
            | Origin::LaterPoll
            | Origin::DropWhenReady
            | Origin::MakeOnPanic,
            Kind::Grpc | Kind::GrpcWeb,
        ) => Answer { data: String::new(), grpc_status: internal(), marked: true, ..whole },
        (Origin::BodyFirst, Kind::Grpc) => {
            Answer { data: String::new(), grpc_status: internal(), ..whole }
        }
        (Origin::BodyLater, Kind::Grpc) => {
            Answer { data: "one".into(), grpc_status: internal(), ..whole }
        }
        (Origin::BodyFirst, _) => Answer { data: String::new(), cut: true, ..whole },
        (Origin::BodyLater, _) => Answer { data: "one".into(), cut: true, ..whole },
        (Origin::BodyDrop | Origin::SizeHint | Origin::IsEndStream, _) => whole,
    }
}

fn during(origin: Origin) -> &'static str {
    match origin {
        Origin::Call | Origin::MakeOnPanic => "call",
        Origin::Poll | Origin::LaterPoll => "future",
        Origin::DropWhenReady | Origin::DropHalfWay => "drop of the future",
        Origin::BodyFirst | Origin::BodyLater => "body",
        Origin::BodyDrop => "drop of the body",
        Origin::SizeHint => "size_hint",
        Origin::IsEndStream => "is_end_stream",
    }
}

type Payload = fn() -> Box<dyn Any + Send>;
type Caught<R> = Result<R, Box<dyn Any + Send>>;

/// Serves one request, as a server does that asks for the hints before each frame.
fn serve(origin: Origin, kind: Kind, payload: Payload) -> Caught<(Answer, Vec<Event>)> {
    quiet();
    let trouble = Trouble { origin, payload, armed: Rc::new(Cell::new(true)) };
    let armed = trouble.armed.clone();
    let layer =
        CatchUnwindLayer::new().max_events_per_second(u32::MAX).on_panic(move |_: &Request<()>| {
            trouble.at(Origin::MakeOnPanic);
            |_: &Panic| None
        });
    let trouble = Trouble { origin, payload, armed };
    let service = layer.layer(service_fn(move |request: Request<()>| {
        trouble.at(Origin::Call);
        let content_type = request.headers()[header::CONTENT_TYPE].clone();
        Script { trouble: trouble.clone(), content_type: Some(content_type), polls: 0 }
    }));
    // Each of them as often as it takes, and none may escape.
    catch_unwind(AssertUnwindSafe(|| logged(|| in_context(|| drive(service, kind, origin)))))
}

fn drive<S, B>(mut service: S, kind: Kind, origin: Origin) -> Answer
where
    S: Service<Request<()>, Response = Response<B>, Error: fmt::Debug>,
    B: Body<Data = Bytes>,
{
    let mut cx = Context::from_waker(Waker::noop());
    let mut answer = Answer::default();
    let mut response = Box::pin(service.call(request(kind)));
    let mut polls = 0;
    let response = loop {
        match response.as_mut().poll(&mut cx) {
            Poll::Ready(done) => break done.unwrap(),
            Poll::Pending if origin == Origin::DropHalfWay => return answer,
            Poll::Pending => polls += 1,
        }
        assert!(polls < 10);
    };
    answer.status = response.status().as_u16();
    response.headers()[header::CONTENT_TYPE].to_str().unwrap().clone_into(&mut answer.content_type);
    answer.grpc_status = grpc_status(response.headers());
    answer.marked = response.extensions().get::<Panic>().is_some();
    let mut body = Box::pin(response.into_body());
    loop {
        let _ = (body.size_hint(), body.is_end_stream());
        let Poll::Ready(frame) = body.as_mut().poll_frame(&mut cx) else {
            continue;
        };
        match frame {
            None => break,
            Some(Err(_)) => answer.cut = true,
            Some(Ok(frame)) => match frame.into_data() {
                Ok(data) => answer.data.push_str(std::str::from_utf8(&data).unwrap()),
                Err(frame) => answer.grpc_status = grpc_status(frame.trailers_ref().unwrap()),
            },
        }
    }
    assert!(matches!(body.as_mut().poll_frame(&mut cx), Poll::Ready(None)), "the end stays");
    answer
}

fn grpc_status(headers: &HeaderMap) -> Option<String> {
    let status = headers.get("grpc-status")?.to_str().unwrap().to_owned();
    assert_eq!(headers["grpc-message"], "internal error");
    Some(status)
}

fn request(kind: Kind) -> Request<()> {
    let (version, content_type) = match kind {
        Kind::Http => (Version::HTTP_11, "text/plain"),
        Kind::Grpc => (Version::HTTP_2, "application/grpc+proto"),
        Kind::GrpcWeb => (Version::HTTP_2, "application/grpc-web-text"),
    };
    Request::post("/orders?secret=1")
        .version(version)
        .header(header::CONTENT_TYPE, content_type)
        .body(())
        .unwrap()
}

/// Panics once, at its origin.
#[derive(Clone)]
struct Trouble {
    origin: Origin,
    payload: Payload,
    armed: Rc<Cell<bool>>,
}

impl Trouble {
    fn at(&self, origin: Origin) {
        if self.origin == origin && self.armed.replace(false) {
            // Not `panic_any`, which would box the box: that is another type of payload.
            match (self.payload)().downcast::<String>() {
                Ok(message) => panic_any(*message),
                Err(payload) => match payload.downcast::<&str>() {
                    Ok(message) => panic_any(*message),
                    Err(payload) => match payload.downcast::<Bomb>() {
                        Ok(bomb) => panic_any(*bomb),
                        Err(_) => panic_any(7_u32),
                    },
                },
            }
        }
    }
}

/// The future, and then the body.
struct Script {
    trouble: Trouble,
    content_type: Option<http::HeaderValue>,
    polls: u32,
}

impl Future for Script {
    type Output = Result<Response<ScriptBody>, Infallible>;

    fn poll(mut self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<Self::Output> {
        self.trouble.at(Origin::Poll);
        self.polls += 1;
        if self.polls == 1 {
            return Poll::Pending;
        }
        self.trouble.at(Origin::LaterPoll);
        let body = ScriptBody { trouble: self.trouble.clone(), frames: 0 };
        let mut response = Response::new(body);
        let content_type = self.content_type.take().unwrap();
        response.headers_mut().insert(header::CONTENT_TYPE, content_type);
        Poll::Ready(Ok(response))
    }
}

impl Drop for Script {
    fn drop(&mut self) {
        self.trouble.at(Origin::DropWhenReady);
        self.trouble.at(Origin::DropHalfWay);
    }
}

struct ScriptBody {
    trouble: Trouble,
    frames: u32,
}

impl Body for ScriptBody {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        _: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        self.trouble.at(Origin::BodyFirst);
        self.frames += 1;
        if self.frames == 2 {
            self.trouble.at(Origin::BodyLater);
        }
        Poll::Ready(match self.frames {
            1 => Some(Ok(Frame::data("one".into()))),
            2 => Some(Ok(Frame::data("two".into()))),
            _ => None,
        })
    }

    fn size_hint(&self) -> SizeHint {
        self.trouble.at(Origin::SizeHint);
        SizeHint::new()
    }

    fn is_end_stream(&self) -> bool {
        self.trouble.at(Origin::IsEndStream);
        false
    }
}

impl Drop for ScriptBody {
    fn drop(&mut self) {
        self.trouble.at(Origin::BodyDrop);
    }
}

// Nothing panics.

#[tokio::test]
async fn a_service_that_does_not_panic_is_left_alone() {
    let mut service = CatchUnwindLayer::new().layer(service_fn(async |request: Request<u32>| {
        let mut response = Response::new(Full::<Bytes>::from("hello"));
        response.extensions_mut().insert(request.into_body());
        Ok::<_, Infallible>(response)
    }));
    let response = service.ready().await.unwrap().call(Request::new(7)).await.unwrap();
    assert_eq!(response.extensions().get::<u32>(), Some(&7));
    assert!(response.extensions().get::<Panic>().is_none());
    assert_eq!(response.body().size_hint().exact(), Some(5));
    assert!(!response.body().is_end_stream());
    let mut body = response.into_body();
    assert_eq!(body.frame().await.unwrap().unwrap().into_data().unwrap(), "hello");
    assert!(body.is_end_stream());
    assert_eq!(body.size_hint().exact(), Some(0));
    assert!(body.frame().await.is_none());
}

#[tokio::test]
async fn readiness_and_errors_are_those_of_the_inner_service() {
    let (mock, mut handle) = mock::pair::<Request<()>, Response<Empty<Bytes>>>();
    let mut service = task::spawn(CatchUnwindLayer::new().layer(mock));
    handle.allow(0);
    assert_pending!(service.enter(|cx, mut service| service.poll_ready(cx)));
    handle.allow(1);
    assert!(service.is_woken());
    assert_ready_ok!(service.enter(|cx, mut service| service.poll_ready(cx)));
    let mut response = task::spawn(service.call(Request::new(())));
    assert_pending!(response.poll());
    handle.next_request().await.unwrap().1.send_error("out of order");
    assert_eq!(assert_ready_err!(response.poll()).to_string(), "out of order");

    handle.send_error("closed");
    let error = assert_ready_err!(service.enter(|cx, mut service| service.poll_ready(cx)));
    assert_eq!(error.to_string(), "closed");
}

#[test]
fn errors_and_trailers_of_the_body_are_its_own() {
    let trailers = HeaderMap::from_iter([(header::ETAG, "x".parse().unwrap())]);
    let next = |frame| {
        let mut frame = Some(frame);
        let frame = Mutex::new(move || frame.take());
        let body = PollFn(move || frame.lock().unwrap()());
        let mut body = task::spawn(respond_with(body).into_body());
        assert_ready!(body.enter(|cx, body| body.poll_frame(cx))).unwrap()
    };
    let frame = next(Ok(Frame::trailers(trailers.clone())));
    assert_eq!(frame.unwrap().into_trailers().unwrap(), trailers);
    let error = next(Err("out of ink")).unwrap_err();
    assert!(matches!(error, BodyError::Inner("out of ink")));
    assert_eq!(error.to_string(), "out of ink");
    let error: Box<dyn Error + Send + Sync> = error.into();
    assert_eq!(error.to_string(), "out of ink");
}

#[test]
fn a_body_that_is_over_is_not_polled_again() {
    quiet();
    for end in 0..3 {
        let end = move || match end {
            0 => None,
            1 => Some(Err("out of ink")),
            _ => Some(Ok(Frame::<Bytes>::trailers(HeaderMap::new()))),
        };
        let mut polls = 0;
        let body = PollFn(move || {
            polls += 1;
            assert_eq!(polls, 1, "it is over");
            end()
        });
        let mut body = task::spawn(respond_with(body).into_body());
        let mut next = || assert_ready!(body.enter(|cx, body| body.poll_frame(cx)));
        assert_eq!(next().is_some(), end().is_some());
        assert!(next().is_none());
        assert!(body.is_end_stream() && body.size_hint().exact() == Some(0));
    }
}

#[test]
fn a_body_is_sync_if_the_inner_one_is_and_boxed_errors_go_through() {
    fn is_server_body<B: Body<Error: Into<BoxError>> + Send + Sync>() {}
    is_server_body::<ResponseBody<Full<Bytes>>>();
    is_server_body::<ResponseBody<Boxed>>();
    is_server_body::<ResponseBody<ResponseBody<Boxed>>>();
    // Neither boxed nor large.
    assert!(size_of::<ResponseBody<[u64; 8]>>() <= 64 + 40);
}

type BoxError = Box<dyn Error + Send + Sync>;
type Boxed = http_body_util::combinators::BoxBody<Bytes, BoxError>;

#[test]
fn an_inner_error_is_itself_when_it_is_boxed() {
    let error: BoxError = "out of ink".parse::<u32>().unwrap_err().into();
    let error: BoxError = BodyError::Inner(CallError::Inner(error)).into();
    assert!(error.is::<std::num::ParseIntError>());
    let error: BoxError = BodyError::<BoxError>::Panicked(Panic::new(Box::new("x"))).into();
    assert!(error.is::<Panic>());
}

#[test]
fn nothing_is_allocated_unless_there_is_a_panic() {
    let mut service = CatchUnwindLayer::new().layer(Ready);
    // As a server makes it: the parts refer to what was read.
    let read = Bytes::from_owner("/orders/7?all=1");
    let request = |content_type: Option<&'static str>| {
        let mut request = Request::new(());
        *request.uri_mut() = http::Uri::from_maybe_shared(read.clone()).unwrap();
        let content_type = content_type.map(http::HeaderValue::from_static);
        content_type.map(|value| request.headers_mut().insert(header::CONTENT_TYPE, value));
        request
    };
    for content_type in [None, Some("application/grpc")] {
        let request = request(content_type);
        let allocated = allocation_counter::measure(|| {
            let mut cx = Context::from_waker(Waker::noop());
            let mut response = std::pin::pin!(service.call(request));
            let response = assert_ready_ok!(response.as_mut().poll(&mut cx));
            let mut body = std::pin::pin!(response.into_body());
            let _ = (body.size_hint(), body.is_end_stream());
            while let Poll::Ready(Some(_)) = body.as_mut().poll_frame(&mut cx) {}
        });
        assert_eq!(allocated.count_total, 0);
    }
}

/// Answers at once with a body that is not boxed.
struct Ready;

impl Service<Request<()>> for Ready {
    type Response = Response<Full<Bytes>>;
    type Error = Infallible;
    type Future = std::future::Ready<Result<Self::Response, Infallible>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, _: Request<()>) -> Self::Future {
        std::future::ready(Ok(Response::new(Full::new(Bytes::from_static(b"hello")))))
    }
}

// What the table has no place for.

#[test]
fn a_panic_of_poll_ready_is_told_and_goes_on() {
    struct Unready;
    impl Service<Request<()>> for Unready {
        type Response = Response<Empty<Bytes>>;
        type Error = Infallible;
        type Future = std::future::Pending<Result<Self::Response, Infallible>>;
        fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
            panic!("not ready")
        }
        fn call(&mut self, _: Request<()>) -> Self::Future {
            std::future::pending()
        }
    }
    quiet();
    let mut http = task::spawn(CatchUnwindLayer::new().layer(Unready));
    let mut plain = task::spawn(CatchUnwindLayer::new().plain().layer(Unready));
    let ((), events) = logged(|| {
        for panics in [
            catch_unwind(AssertUnwindSafe(|| {
                let _ = http.enter(|cx, mut service| Service::poll_ready(&mut *service, cx));
            })),
            catch_unwind(AssertUnwindSafe(|| {
                let _ = plain.enter(|cx, mut service| Service::poll_ready(&mut *service, cx));
            })),
        ] {
            assert_eq!(panics.unwrap_err().downcast_ref(), Some(&"not ready"));
        }
    });
    assert_eq!(events.len(), 2);
    assert_eq!(events[0]["during"], "poll_ready");
    assert!(events[0]["location"].contains("tests/layer.rs:"));

    // Each panic is one event, of the outermost who catches it.
    let layer = CatchUnwindLayer::new();
    let mut nested = task::spawn(layer.layer(layer.layer(Unready)));
    let ((), events) = logged(|| {
        let panics = catch_unwind(AssertUnwindSafe(|| {
            let _ = nested.enter(|cx, mut service| Service::poll_ready(&mut *service, cx));
        }));
        assert_eq!(panics.unwrap_err().downcast_ref(), Some(&"not ready"));
    });
    assert_eq!(events.len(), 1);
    assert!(events[0]["location"].contains("tests/layer.rs:"));
    let asked_late = layer.layer(service_fn(|request| layer.layer(Unready).oneshot(request)));
    let (response, events) =
        logged(|| assert_ready_ok!(task::spawn(asked_late.oneshot(Request::new(()))).poll()));
    assert_eq!(response.status(), 500);
    assert_eq!(events.len(), 1);
    assert_eq!(events[0]["during"], "future");
    assert!(events[0]["location"].contains("tests/layer.rs:"));
}

#[tokio::test]
async fn a_service_serves_on_after_a_panic() {
    quiet();
    let mut calls = 0;
    let mut service = CatchUnwindLayer::new().layer(service_fn(move |_: Request<()>| {
        calls += 1;
        assert_ne!(calls, 1, "the first call");
        std::future::ready(Ok::<_, Infallible>(Response::new(Full::<Bytes>::from("hello"))))
    }));
    for status in [500, 200] {
        let response = service.ready().await.unwrap().call(Request::new(())).await.unwrap();
        assert_eq!(response.status(), status);
    }
}

#[test]
fn the_handler_sees_the_panic_and_what_it_took_from_the_request() {
    quiet();
    let layer = CatchUnwindLayer::new().on_panic(|request: &Request<()>| {
        let agent = request.headers().get(header::USER_AGENT).cloned();
        move |panic: &Panic| {
            let said = format!("{agent:?} saw {}", panic.message());
            let mut response = Response::new(said.into());
            *response.status_mut() = StatusCode::IM_A_TEAPOT;
            Some(response)
        }
    });
    let mut request = Request::new(());
    request.headers_mut().insert(header::USER_AGENT, "curl".parse().unwrap());
    let response = answer_of(&layer, request);
    assert_eq!(response.status(), StatusCode::IM_A_TEAPOT);
    assert_eq!(response.extensions().get::<Panic>().unwrap().message(), "in the handler");
    assert_eq!(text(response), r#"Some("curl") saw in the handler"#);
}

#[test]
fn a_handler_that_declines_or_panics_leaves_it_to_the_default() {
    quiet();
    for panics in [false, true] {
        let layer = CatchUnwindLayer::new().on_panic(move |_: &Request<()>| {
            move |_: &Panic| {
                assert!(!panics, "on panic");
                None
            }
        });
        let (response, events) = logged(|| answer_of(&layer, Request::new(())));
        assert_eq!(response.status(), 500);
        assert_eq!(response.headers()[header::CONTENT_TYPE], "application/problem+json");
        assert_eq!(response.extensions().get::<Panic>().unwrap().message(), "in the handler");
        let told: Vec<_> = events.iter().map(|event| &*event["during"]).collect();
        assert_eq!(told, ["call", "on_panic"][..=usize::from(panics)]);
        let problem: serde_json::Value = serde_json::from_str(&text(response)).unwrap();
        assert_eq!(problem["status"], 500);
    }
}

#[test]
fn a_grpc_client_gets_only_answers_that_it_understands() {
    quiet();
    for understood in [false, true] {
        let layer = CatchUnwindLayer::new().on_panic(move |_: &Request<()>| {
            move |_: &Panic| {
                let mut response = Response::new("sorry".into());
                response.headers_mut().insert("x-mine", "1".parse().unwrap());
                if understood {
                    response.headers_mut().insert("grpc-status", "14".parse().unwrap());
                }
                Some(response)
            }
        });
        let response = answer_of(&layer, request(Kind::Grpc));
        assert_eq!(response.status(), 200);
        assert_eq!(response.headers().contains_key("x-mine"), understood);
        assert_eq!(response.headers()["grpc-status"], if understood { "14" } else { "13" });
    }
}

#[test]
fn an_answer_that_panics_when_it_is_dropped_is_not_the_clients_trouble() {
    #[derive(Clone)]
    struct Panics;
    impl AsRef<[u8]> for Panics {
        fn as_ref(&self) -> &[u8] {
            b"content"
        }
    }
    impl Drop for Panics {
        fn drop(&mut self) {
            panic!("in a drop");
        }
    }
    quiet();
    let layer = CatchUnwindLayer::new()
        .on_panic(|_: &Request<()>| |_: &Panic| Some(Response::new(Bytes::from_owner(Panics))));
    // An answer to HEAD has no content, and a gRPC client does not understand it.
    for is_grpc in [false, true] {
        let mut request = request(if is_grpc { Kind::Grpc } else { Kind::Http });
        if !is_grpc {
            *request.method_mut() = http::Method::HEAD;
        }
        let (response, events) = logged(|| answer_of(&layer, request));
        assert_eq!(response.status(), if is_grpc { 200 } else { 500 });
        assert_eq!(response.headers().get("grpc-status").is_some_and(|it| it == "13"), is_grpc);
        assert_eq!(events.len(), 2);
        assert_eq!(events[1]["during"], "on_panic");
    }
    // A client that leaves before it has come.
    let response = answer_of(&layer, request(Kind::Http));
    let ((), events) = logged(|| drop(response));
    assert_eq!(events.len(), 1);
    assert_eq!(events[0]["during"], "drop of the body");
}

#[test]
fn what_the_handler_holds_is_dropped_where_its_panic_is_contained() {
    struct Panics;
    impl Drop for Panics {
        fn drop(&mut self) {
            panic!("in a drop");
        }
    }
    quiet();
    let layer = CatchUnwindLayer::new().on_panic(|_: &Request<()>| {
        let held = Panics;
        move |_: &Panic| {
            let _held = &held;
            None
        }
    });
    let (response, events) = logged(|| {
        let mut service = layer.layer(Ready);
        drop(service.call(Request::new(())));
        assert_ready_ok!(task::spawn(service.call(Request::new(()))).poll())
    });
    assert_eq!(response.status(), 200);
    assert_eq!(events.len(), 2);
    assert!(events.iter().all(|event| event["during"] == "drop of on_panic"));
}

#[test]
fn grpc_is_told_by_its_content_type() {
    quiet();
    for (content_type, is_grpc) in [
        ("application/grpc", true),
        ("Application/GRPC", true),
        ("application/grpc+proto", true),
        ("application/grpc+json", true),
        ("application/grpc;charset=utf-8", true),
        ("application/grpc-web", true),
        ("application/grpc-web+proto", true),
        ("application/grpc-web-text", true),
        ("application/grpcish", false),
        ("application/grpc-", false),
        ("application/grpc-we", false),
        ("application/grpc-other", false),
        ("application/json", false),
        ("", false),
    ] {
        let request = Request::post("/").header(header::CONTENT_TYPE, content_type);
        let request = request.body(()).unwrap();
        let response = answer_of(&CatchUnwindLayer::new(), request);
        assert_eq!(response.status(), if is_grpc { 200 } else { 500 }, "{content_type}");
        assert_eq!(response.headers().contains_key("grpc-status"), is_grpc, "{content_type}");
        let answered = response.headers()[header::CONTENT_TYPE].to_str().unwrap();
        let expected = if is_grpc { content_type } else { "application/problem+json" };
        assert!(expected.to_lowercase().starts_with(answered), "{content_type}: {answered}");
        assert_eq!(response.body().is_end_stream(), is_grpc);
    }
    let request = Request::get("/").header(header::CONTENT_TYPE, "application/grpc");
    let response = answer_of(&CatchUnwindLayer::new(), request.body(()).unwrap());
    assert_eq!(response.status(), 500, "gRPC is POST");
}

#[test]
fn a_body_is_cut_where_the_client_would_not_see_trailers() {
    quiet();
    let panics = || -> Option<Result<Frame<Bytes>, Infallible>> { panic!("in the body") };
    for (version, answered_with, in_trailers) in [
        (Version::HTTP_2, "application/grpc", true),
        (Version::HTTP_2, "application/grpc+proto", true),
        (Version::HTTP_3, "application/grpc", true),
        // hyper would leave them out.
        (Version::HTTP_11, "application/grpc", false),
        // A fallback that knows nothing of gRPC.
        (Version::HTTP_2, "text/html", false),
    ] {
        let mut service = CatchUnwindLayer::new().layer(service_fn(move |_: Request<()>| {
            let mut response = Response::new(PollFn(panics));
            response.headers_mut().insert(header::CONTENT_TYPE, answered_with.parse().unwrap());
            std::future::ready(Ok::<_, Infallible>(response))
        }));
        let mut request = request(Kind::Grpc);
        *request.version_mut() = version;
        let response = assert_ready_ok!(task::spawn(service.call(request)).poll());
        let mut body = task::spawn(response.into_body());
        let frame = assert_ready!(body.enter(|cx, body| body.poll_frame(cx))).unwrap();
        assert_eq!(frame.is_ok(), in_trailers, "{version:?} {answered_with}");
        if let Err(error) = frame {
            assert!(
                matches!(&error, BodyError::Panicked(panic) if panic.message() == "in the body")
            );
            assert!(error.to_string().starts_with("the response body panicked at "));
        }
        assert!(assert_ready!(body.enter(|cx, body| body.poll_frame(cx))).is_none());
        assert!(body.is_end_stream());
        assert_eq!(body.size_hint().exact(), Some(0));
    }
}

#[test]
fn of_two_panics_the_first_is_told_to_the_client_and_both_to_the_log() {
    struct Both;
    impl Future for Both {
        type Output = Result<Response<Empty<Bytes>>, Infallible>;
        fn poll(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<Self::Output> {
            panic!("first")
        }
    }
    impl Drop for Both {
        fn drop(&mut self) {
            panic!("second");
        }
    }
    quiet();
    let mut service = CatchUnwindLayer::new().layer(service_fn(|_: Request<()>| Both));
    let (response, events) =
        logged(|| assert_ready_ok!(task::spawn(service.call(Request::new(()))).poll()));
    assert_eq!(response.extensions().get::<Panic>().unwrap().message(), "first");
    let told: Vec<_> = events.iter().map(|event| &*event["panic"]).collect();
    assert_eq!(told, ["first", "second"]);
}

#[test]
fn the_event_says_which_request_without_its_query_and_escaped() {
    quiet();
    let mut request = Request::new(());
    *request.method_mut() = "PURGE".parse().unwrap();
    *request.uri_mut() = "/caf\u{e9}\u{202e}?token=secret".parse().unwrap();
    let ((), events) = logged(|| drop(answer_of(&CatchUnwindLayer::new(), request)));
    assert_eq!(events[0]["message"], "request panicked");
    assert_eq!(events[0]["method"], "PURGE");
    assert_eq!(events[0]["path"], "/caf\u{e9}\\u{202e}");
    assert!(events[0].contains_key("thread"));
    assert!(!events[0].contains_key("trace_id"));
    assert!(!format!("{events:?}").contains("secret"));

    let long = format!("/{}", "x".repeat(60_000)).parse().unwrap();
    let mut request = Request::new(());
    *request.uri_mut() = long;
    let ((), events) = logged(|| drop(answer_of(&CatchUnwindLayer::new(), request)));
    assert_eq!(events[0]["path"].len(), 256);

    let mut request = Request::new(());
    *request.method_mut() = "M".repeat(300_000).parse().unwrap();
    let ((), events) = logged(|| drop(answer_of(&CatchUnwindLayer::new(), request)));
    assert_eq!(events[0]["method"], "OTHER");
}

#[test]
fn a_flood_of_panics_floods_no_log() {
    quiet();
    let layer = CatchUnwindLayer::new();
    let (elapsed, events) = logged(|| {
        let start = std::time::Instant::now();
        for _ in 0..2_000 {
            assert_eq!(answer_of(&layer, Request::new(())).status(), 500);
        }
        start.elapsed()
    });
    let seconds = usize::try_from(elapsed.as_secs()).unwrap() + 1;
    assert!((20..=20 * (seconds + 1)).contains(&events.len()), "{} in {elapsed:?}", events.len());

    let silent = CatchUnwindLayer::new().max_events_per_second(0);
    assert!(logged(|| answer_of(&silent, Request::new(()))).1.is_empty());
    let all = CatchUnwindLayer::new().max_events_per_second(u32::MAX);
    let ((), events) = logged(|| (0..200).for_each(|_| drop(answer_of(&all, Request::new(())))));
    assert_eq!(events.len(), 200);
}

#[test]
fn a_subscriber_that_panics_changes_nothing() {
    struct Panics;
    impl<S: tracing::Subscriber> tracing_subscriber::Layer<S> for Panics {
        fn on_event(&self, _: &tracing::Event<'_>, _: tracing_subscriber::layer::Context<'_, S>) {
            panic!("in the subscriber");
        }
    }
    quiet();
    let subscriber = tracing_subscriber::registry().with(Panics);
    tracing::subscriber::with_default(subscriber, || {
        let response = answer_of(&CatchUnwindLayer::new(), Request::new(()));
        assert_eq!(response.status(), 500);
    });
}

#[test]
fn a_drop_that_panics_while_another_panic_unwinds_is_contained_and_told() {
    // In a process of its own, since it dies if the panic is not contained.
    const INSIDE: &str = "TOWER_CATCH_UNWIND_TEST";
    let name = "a_drop_that_panics_while_another_panic_unwinds_is_contained_and_told";
    if env::var_os(INSIDE).is_none() {
        let output = Command::new(env::current_exe().unwrap())
            .args(["--exact", name])
            .env(INSIDE, "1")
            .output()
            .unwrap();
        assert!(String::from_utf8_lossy(&output.stdout).contains("running 1 test"));
        assert!(output.status.success(), "{output:?}");
        return;
    }
    quiet();
    for origin in [Origin::DropHalfWay, Origin::BodyDrop] {
        let armed = Rc::new(Cell::new(true));
        let trouble = Trouble { origin, payload: || Box::new("second"), armed };
        let mut service = CatchUnwindLayer::new().layer(service_fn(move |_: Request<()>| Script {
            trouble: trouble.clone(),
            content_type: Some("x".parse().unwrap()),
            polls: 0,
        }));
        let (outer, events) = logged(|| {
            catch_unwind(AssertUnwindSafe(|| {
                let mut response = task::spawn(service.call(Request::new(())));
                assert!(response.poll().is_pending());
                if origin == Origin::BodyDrop {
                    let _response = assert_ready_ok!(response.poll());
                    panic!("first");
                }
                panic!("first");
            }))
        });
        assert_eq!(outer.unwrap_err().downcast_ref(), Some(&"first"));
        assert_eq!(events.len(), 1);
        assert_eq!(events[0]["panic"], "second");
        assert_eq!(events[0]["during"], during(origin));
    }
}

#[tokio::test]
async fn a_plain_service_yields_an_error() {
    quiet();
    let mut service =
        CatchUnwindLayer::new().plain().layer(service_fn(async |job: u32| match job {
            0 => panic!("in the job"),
            1 => Err("out of order"),
            _ => Ok(job),
        }));
    let error = service.ready().await.unwrap().call(0).await.unwrap_err();
    assert!(error.to_string().starts_with("the service panicked at "), "{error}");
    assert!(matches!(error, CallError::Panicked(panic) if panic.message() == "in the job"));
    let error = service.ready().await.unwrap().call(1).await.unwrap_err();
    assert!(matches!(error, CallError::Inner("out of order")));
    assert_eq!(service.ready().await.unwrap().call(7).await.unwrap(), 7);

    let mut calls = CatchUnwindLayer::new().plain().layer(service_fn(
        |()| -> std::future::Ready<Result<(), Infallible>> { panic!("in the call") },
    ));
    let (error, events) = logged(|| assert_ready_err!(task::spawn(calls.call(())).poll()));
    assert!(matches!(error, CallError::Panicked(panic) if panic.message() == "in the call"));
    assert_eq!(events.len(), 1);
    assert!(!events[0].contains_key("path"));
}

#[test]
fn ids_are_known_inside_of_the_layer_that_sets_them() {
    quiet();
    let layer = RequestContextLayer::new(|_: &Request<()>| trace_id());
    let mut service = layer.layer(CatchUnwindLayer::new().layer(service_fn(
        async |_: Request<()>| -> Result<Response<Empty<Bytes>>, Infallible> { panic!("x") },
    )));
    let (response, events) =
        logged(|| assert_ready_ok!(task::spawn(service.call(Request::new(()))).poll()));
    assert_eq!(events[0]["trace_id"], trace_id().to_string());
    let body = text(response.map(http_body_util::combinators::UnsyncBoxBody::new));
    let problem: serde_json::Value = serde_json::from_str(&body).unwrap();
    assert_eq!(problem["trace_id"], trace_id().to_string());
    assert_eq!(problem.get("request_id"), None);
}

// What the tests share.

fn trace_id() -> TraceId {
    "0af7651916cd43dd8448eb211c80319c".parse().unwrap()
}

fn in_context<R>(f: impl FnOnce() -> R) -> R {
    let request_id: RequestId = "order-7".parse().unwrap();
    RequestContext::new().with(trace_id()).with(request_id).sync_scope(f)
}

/// What comes of a handler that panics.
fn answer_of<M>(
    layer: &CatchUnwindLayer<M>,
    request: Request<()>,
) -> Response<ResponseBody<Empty<Bytes>>>
where
    M: tower_catch_unwind::MakeOnPanic<Request<()>> + Clone,
{
    let mut service = layer.layer(service_fn(
        |_: Request<()>| -> std::future::Ready<Result<Response<Empty<Bytes>>, Infallible>> {
            panic!("in the handler")
        },
    ));
    assert_ready_ok!(task::spawn(service.call(request)).poll())
}

fn respond_with<B>(body: B) -> Response<ResponseBody<B>>
where
    B: Body<Data = Bytes>,
{
    let mut body = Some(body);
    let mut service = CatchUnwindLayer::new().layer(service_fn(move |_: Request<()>| {
        std::future::ready(Ok::<_, Infallible>(Response::new(body.take().unwrap())))
    }));
    assert_ready_ok!(task::spawn(service.call(Request::new(()))).poll())
}

fn text<B>(response: Response<B>) -> String
where
    B: Body<Data = Bytes, Error: fmt::Debug>,
{
    let mut collected = task::spawn(response.into_body().collect());
    let bytes = assert_ready_ok!(collected.poll()).to_bytes();
    String::from_utf8(bytes.into()).unwrap()
}

/// A body of what the closure yields.
struct PollFn<F>(F);

impl<F> Unpin for PollFn<F> {}

impl<E, F> Body for PollFn<F>
where
    F: FnMut() -> Option<Result<Frame<Bytes>, E>>,
{
    type Data = Bytes;
    type Error = E;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        _: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, E>>> {
        Poll::Ready((self.0)())
    }
}

/// Locations are recorded, and only what nobody catches is printed.
fn quiet() {
    static QUIET: Once = Once::new();
    QUIET.call_once(|| {
        // With one subscriber alone, tracing asks only that of the thread which comes to an event
        // first, and for all threads: one that has none would silence the others.
        for _ in 0..2 {
            mem::forget(tracing::Dispatch::new(tracing_subscriber::registry()));
        }
        let print = panic::take_hook();
        panic::set_hook(Box::new(move |info| {
            if !record(info) {
                print(info);
            }
        }));
    });
}

type Event = BTreeMap<&'static str, String>;

/// What `f` yields, and the errors that were logged meanwhile.
fn logged<R>(f: impl FnOnce() -> R) -> (R, Vec<Event>) {
    #[derive(Clone, Default)]
    struct Collect(Arc<Mutex<Vec<Event>>>);
    struct Fields<'a>(&'a mut Event);

    impl Visit for Fields<'_> {
        fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
            self.0.insert(field.name(), format!("{value:?}"));
        }
        fn record_str(&mut self, field: &Field, value: &str) {
            self.0.insert(field.name(), value.to_owned());
        }
    }
    impl<S: tracing::Subscriber> tracing_subscriber::Layer<S> for Collect {
        fn on_event(
            &self,
            event: &tracing::Event<'_>,
            _: tracing_subscriber::layer::Context<'_, S>,
        ) {
            assert_eq!(*event.metadata().level(), tracing::Level::ERROR);
            let mut fields = Event::new();
            event.record(&mut Fields(&mut fields));
            self.0.lock().unwrap().push(fields);
        }
    }

    let collect = Collect::default();
    let subscriber = tracing_subscriber::registry().with(collect.clone());
    let result = tracing::subscriber::with_default(subscriber, f);
    let events = mem::take(&mut *collect.0.lock().unwrap());
    (result, events)
}
