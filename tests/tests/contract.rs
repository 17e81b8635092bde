//! The duties that every layer owes its inner service, each written once; one row per layer.
//!
//! The inner service is a mock that panics if an instance is called that was not polled ready,
//! behind a limit of one call. Its requests and bodies can do as little as the protocol allows: the
//! error is no `Error` and not `Send`, the body is not `Unpin`.

#![allow(clippy::unwrap_used)]

use std::{
    collections::VecDeque,
    fmt,
    marker::{PhantomData, PhantomPinned},
    pin::Pin,
    rc::Rc,
    sync::{Arc, Mutex},
    task::{Context, Poll},
    time::Duration,
};

use bytes::Bytes;
use http::{HeaderMap, Request, Response, StatusCode, Uri, Version};
use http_body::{Body, Frame, SizeHint};
use http_body_util::{BodyExt, combinators::UnsyncBoxBody};
use proptest::{collection::vec, option, prelude::*};
use tokio::runtime::{Builder, Runtime};
use tokio_test::{assert_pending, assert_ready, assert_ready_err, assert_ready_ok, task};
use tower::{
    BoxError, Layer, Service, ServiceExt,
    limit::ConcurrencyLimit,
    util::{BoxCloneService, MapErr, MapRequestLayer},
};
use tower_tasks::{
    AtEnd, CatchUnwindLayer, End, PropagateLayer, RequestContextLayer, RequestLimitLayer,
    ResponseEndLayer, Shutdown, SpawnLimit, SpawnLimitLayer, TaskRegistry, TaskSetLayer,
    TraceIdLayer, response_end::RequestBody, task_set::ShieldLayer, trace_id::Trust,
};
use tower_test::mock::{self, Mock};

/// Every HTTP layer: as it comes, and with its tightest settings.
fn rows() -> Vec<Row> {
    let tasks = TaskRegistry::new();
    let none = TaskRegistry::new().limit(SpawnLimit::new(0).per_request(0));
    let on_end = |_: &Sent| |_: End| ();
    let whole = MapRequestLayer::new(whole as fn(Request<RequestBody<Upload>>) -> Sent);
    vec![
        row("request-context", RequestContextLayer::new(|_: &Sent| "value")),
        row(
            "request-context in extensions",
            RequestContextLayer::new(|_: &Sent| "value").in_extensions(),
        ),
        row("catch-unwind", CatchUnwindLayer::new()),
        row(
            "catch-unwind without a log",
            CatchUnwindLayer::new()
                .max_events_per_second(0)
                .on_panic(|_: &Sent| |_: &_| Some(Response::new(Bytes::new()))),
        ),
        row("response-end", ResponseEndLayer::new(on_end)),
        row(
            "response-end with the request's body",
            (ResponseEndLayer::new(on_end).watch_request_body(), whole.clone()),
        ),
        row("trace-id", TraceIdLayer::new()),
        row(
            "trace-id with all there is",
            TraceIdLayer::new()
                .trust(|_: &Sent| Trust::Continue)
                .trace_id_header(http::HeaderName::from_static("x-trace-id"))
                .on_span(|_: &_, _: &_| None)
                .in_extensions(),
        ),
        row("propagate", PropagateLayer::new()),
        row("propagate to nobody", PropagateLayer::new().only(|_: &Uri| false).b3()),
        row("spawn-limit", SpawnLimitLayer::new(SpawnLimit::new(1).per_request(1))),
        row("spawn-limit of nothing", SpawnLimitLayer::new(SpawnLimit::new(0).per_request(0))),
        row("request-limit", RequestLimitLayer::new(1)),
        row(
            "request-limit with a wait",
            RequestLimitLayer::new(1).wait(Duration::from_secs(1)).queue(1),
        ),
        row("shutdown", Shutdown::new(Duration::ZERO).without_signals().layer()),
        row("task-set", TaskSetLayer::new(&tasks)),
        row(
            "task-set with a deadline",
            TaskSetLayer::new(&tasks).deadline(Duration::from_secs(3600)),
        ),
        row(
            "task-set without tasks",
            TaskSetLayer::new(&none).at_end(AtEnd::Cancel).in_extensions(),
        ),
        row(
            "task-set with the request's body",
            (TaskSetLayer::new(&tasks).watch_request_body(), whole),
        ),
        row("shield", (TaskSetLayer::new(&one()), ShieldLayer::new("call").at_end(AtEnd::Cancel))),
        row(
            "shield of the set in the type map",
            (
                TaskSetLayer::new(&one()).in_extensions(),
                ShieldLayer::new("call").at_end(AtEnd::Drain(Duration::ZERO)),
            ),
        ),
        row(
            "all of them",
            (
                TraceIdLayer::new(),
                CatchUnwindLayer::new(),
                Shutdown::new(Duration::ZERO).without_signals().layer(),
                RequestContextLayer::new(|_: &Sent| "value"),
                RequestLimitLayer::new(1),
                ResponseEndLayer::new(on_end),
                SpawnLimitLayer::new(SpawnLimit::new(0)),
                TaskSetLayer::new(&tasks),
            ),
        ),
        row(
            "all of them with a shield",
            (
                TraceIdLayer::new(),
                CatchUnwindLayer::new(),
                Shutdown::new(Duration::ZERO).without_signals().layer(),
                RequestContextLayer::new(|_: &Sent| "value"),
                RequestLimitLayer::new(1),
                ResponseEndLayer::new(on_end),
                SpawnLimitLayer::new(SpawnLimit::new(1)),
                TaskSetLayer::new(&one()),
                ShieldLayer::new("call").at_end(AtEnd::Cancel),
            ),
        ),
    ]
}

/// Every layer that is there for any other `Service`.
fn plain_rows() -> Vec<PlainRow> {
    let tasks = TaskRegistry::new();
    vec![
        plain_row("request-context", RequestContextLayer::new(|_: &u32| "value").plain()),
        plain_row("catch-unwind", CatchUnwindLayer::new().plain()),
        plain_row("response-end", ResponseEndLayer::new(|_: &u32| |_: End| ()).plain()),
        plain_row("trace-id", TraceIdLayer::new().plain()),
        plain_row("spawn-limit", SpawnLimitLayer::new(SpawnLimit::new(0)).plain()),
        plain_row("request-limit", RequestLimitLayer::new(1).plain()),
        plain_row("shutdown", Shutdown::new(Duration::ZERO).without_signals().layer().plain()),
        plain_row("task-set", TaskSetLayer::new(&tasks).plain()),
        plain_row(
            "shield",
            (
                TaskSetLayer::new(&one()).plain(),
                ShieldLayer::new("call").at_end(AtEnd::Cancel).plain(),
            ),
        ),
    ]
}

/// What a shield spawns runs on [`RUNTIME`], one call at a time.
fn one() -> TaskRegistry {
    let runtime = RUNTIME.with(|runtime| runtime.handle().clone());
    TaskRegistry::new().runtime(runtime).limit(SpawnLimit::new(1).per_request(1))
}

thread_local! {
    /// Of each test, since a test has a thread. It is leaked: the end of a thread is no place to
    /// drop a runtime.
    static RUNTIME: &'static Runtime =
        Box::leak(Box::new(Builder::new_current_thread().build().unwrap()));
}

/// Lets what was spawned run, until it waits.
fn turn() {
    RUNTIME.with(|runtime| {
        runtime.block_on(async {
            for _ in 0..4 {
                tokio::task::yield_now().await;
            }
        });
    });
}

type Sent = Request<Upload>;
type Inner<Req, Res> = ConcurrencyLimit<MapErr<Mock<Req, Res>, fn(BoxError) -> Gone>>;
type Outer = BoxCloneService<Sent, Response<UnsyncBoxBody<Bytes, String>>, Gone>;
type PlainOuter = BoxCloneService<u32, u32, String>;

struct Row {
    name: &'static str,
    wrap: Box<dyn Fn(Inner<Sent, Response<Script>>) -> Outer>,
}

struct PlainRow {
    name: &'static str,
    wrap: Box<dyn Fn(Inner<u32, u32>) -> PlainOuter>,
}

/// The bounds are duties too: the request's type and the error stay, everything is `Debug`, and
/// the body is `Sync` because the inner one is.
fn row<L, B>(name: &'static str, layer: L) -> Row
where
    L: Layer<Inner<Sent, Response<Script>>> + fmt::Debug + 'static,
    L::Service: Service<Sent, Response = Response<B>, Error = Gone, Future: fmt::Debug + Send>
        + Clone
        + fmt::Debug
        + Send
        + Sync
        + 'static,
    B: Body<Data = Bytes, Error: fmt::Display> + fmt::Debug + Send + Sync + 'static,
{
    let erase =
        |response: Response<B>| response.map(|body| body.map_err(|e| e.to_string()).boxed_unsync());
    let wrap = move |inner| BoxCloneService::new(layer.layer(inner).map_response(erase));
    Row { name, wrap: Box::new(wrap) }
}

fn plain_row<L>(name: &'static str, layer: L) -> PlainRow
where
    L: Layer<Inner<u32, u32>> + fmt::Debug + 'static,
    L::Service: Service<u32, Response = u32, Error: fmt::Display, Future: fmt::Debug + Send>
        + Clone
        + fmt::Debug
        + Send
        + Sync
        + 'static,
{
    let wrap = move |inner| {
        BoxCloneService::new(ServiceExt::<u32>::map_err(layer.layer(inner), |e| e.to_string()))
    };
    PlainRow { name, wrap: Box::new(wrap) }
}

impl Row {
    fn service(&self) -> (mock::Spawn<Outer>, mock::Handle<Sent, Response<Script>>) {
        let (inner, handle) = inner();
        (mock::Spawn::new((self.wrap)(inner)), handle)
    }

    /// What the layer makes of this body.
    fn body(&self, script: Script) -> Pin<Box<UnsyncBoxBody<Bytes, String>>> {
        let (mut service, mut handle) = self.service();
        assert_ready_ok!(service.poll_ready());
        let mut future = task::spawn(service.call(request(Held::new().0)));
        let (_, send) = assert_ready!(handle.poll_request()).unwrap();
        send.send_response(Response::new(script));
        turn();
        Box::pin(assert_ready_ok!(future.poll()).into_body())
    }
}

impl PlainRow {
    fn service(&self) -> (mock::Spawn<PlainOuter>, mock::Handle<u32, u32>) {
        let (inner, handle) = inner();
        (mock::Spawn::new((self.wrap)(inner)), handle)
    }
}

fn inner<Req, Res>() -> (Inner<Req, Res>, mock::Handle<Req, Res>) {
    let (mock, handle) = mock::pair();
    let gone: fn(BoxError) -> Gone = Gone;
    (ConcurrencyLimit::new(ServiceExt::<Req>::map_err(mock, gone), 1), handle)
}

// Readiness

#[test]
fn a_service_is_ready_when_the_inner_one_is() {
    for row in rows() {
        let (mut service, mut handle) = row.service();
        handle.allow(0);
        assert_pending!(service.poll_ready(), "{}", row.name);
        assert!(!service.is_woken(), "{}", row.name);
        handle.allow(1);
        assert!(service.is_woken(), "{}", row.name);
        assert_ready_ok!(service.poll_ready(), "{}", row.name);
    }
    for row in plain_rows() {
        let (mut service, mut handle) = row.service();
        handle.allow(0);
        assert_pending!(service.poll_ready(), "{}", row.name);
        handle.allow(1);
        assert!(service.is_woken(), "{}", row.name);
        assert_ready_ok!(service.poll_ready(), "{}", row.name);
    }
}

#[test]
fn an_inner_service_that_cannot_be_ready_says_so_itself() {
    for row in rows() {
        let (mut service, mut handle) = row.service();
        handle.send_error("no more");
        let error = assert_ready_err!(service.poll_ready(), "{}", row.name);
        assert_eq!(error.0.to_string(), "no more", "{}", row.name);
    }
    for row in plain_rows() {
        let (mut service, mut handle) = row.service();
        handle.send_error("no more");
        assert_eq!(assert_ready_err!(service.poll_ready()), "no more", "{}", row.name);
    }
}

#[test]
fn the_instance_that_was_polled_ready_is_the_one_that_is_called() {
    for row in rows() {
        let (mut service, mut handle) = row.service();
        assert_ready_ok!(service.poll_ready());
        // Never polled: the mock would panic, which a layer could hide.
        let clone = service.clone();
        let future = service.call(request(Held::new().0));
        let (_, send) = assert_ready!(handle.poll_request(), "{}", row.name).unwrap();
        send.send_response(Response::new(Script::new([])));
        turn();
        let response = assert_ready_ok!(task::spawn(future).poll());
        assert_eq!(response.status(), StatusCode::OK, "{}", row.name);
        drop(clone);
    }
    for row in plain_rows() {
        let (mut service, mut handle) = row.service();
        assert_ready_ok!(service.poll_ready());
        let clone = service.clone();
        let future = service.call(1);
        let (_, send) = assert_ready!(handle.poll_request(), "{}", row.name).unwrap();
        send.send_response(2);
        turn();
        assert_eq!(assert_ready_ok!(task::spawn(future).poll()), 2, "{}", row.name);
        drop(clone);
    }
}

#[test]
fn a_clone_becomes_ready_by_itself() {
    for row in rows() {
        let (mut service, mut handle) = row.service();
        assert_ready_ok!(service.poll_ready());
        let mut clone = service.clone();
        // The one permit is the other's.
        assert_pending!(clone.poll_ready(), "{}", row.name);
        let mut future = task::spawn(service.call(request(Held::new().0)));
        let (_, send) = assert_ready!(handle.poll_request()).unwrap();
        send.send_response(Response::new(Script::new([])));
        turn();
        let response = assert_ready_ok!(future.poll(), "{}", row.name);
        assert!(clone.is_woken(), "{}: held after the head", row.name);
        assert_ready_ok!(clone.poll_ready(), "{}", row.name);
        drop(response);
    }
}

#[test]
fn a_ready_service_that_is_dropped_holds_nothing() {
    for row in rows() {
        let (mut service, _handle) = row.service();
        let mut clone = service.clone();
        assert_ready_ok!(service.poll_ready());
        assert_pending!(clone.poll_ready(), "{}", row.name);
        drop(service);
        assert!(clone.is_woken(), "{}", row.name);
        assert_ready_ok!(clone.poll_ready(), "{}", row.name);
    }
    for row in plain_rows() {
        let (mut service, _handle) = row.service();
        let mut clone = service.clone();
        assert_ready_ok!(service.poll_ready());
        assert_pending!(clone.poll_ready(), "{}", row.name);
        drop(service);
        assert_ready_ok!(clone.poll_ready(), "{}", row.name);
    }
}

// Request, response and error

#[test]
fn a_request_arrives_as_it_was_sent() {
    for row in rows() {
        let (mut service, mut handle) = row.service();
        assert_ready_ok!(service.poll_ready());
        let (held, _) = Held::new();
        let sent = request(held);
        let (method, uri, version) = (sent.method().clone(), sent.uri().clone(), sent.version());
        let headers = sent.headers().clone();
        let _future = service.call(sent);
        let (arrived, _send) = assert_ready!(handle.poll_request(), "{}", row.name).unwrap();
        assert_eq!(arrived.method(), method, "{}", row.name);
        assert_eq!(*arrived.uri(), uri, "{}", row.name);
        assert_eq!(arrived.version(), version, "{}", row.name);
        // That row is about removing some.
        if row.name != "propagate to nobody" {
            assert_eq!(*arrived.headers(), headers, "{}", row.name);
        }
        assert!(arrived.extensions().get::<Held>().is_some(), "{}", row.name);
    }
}

#[test]
fn a_response_goes_out_as_it_came() {
    for row in rows() {
        let (mut service, mut handle) = row.service();
        assert_ready_ok!(service.poll_ready());
        let mut future = task::spawn(service.call(request(Held::new().0)));
        assert_pending!(future.poll(), "{}", row.name);
        let (_, send) = assert_ready!(handle.poll_request()).unwrap();
        // A shield's task waits by now, as the others do.
        turn();
        let response = Response::builder()
            .status(StatusCode::IM_A_TEAPOT)
            .version(Version::HTTP_10)
            .header("x-of-the-handler", "1")
            .header("x-of-the-handler", "2")
            .extension("extension");
        send.send_response(response.body(Script::new([])).unwrap());
        turn();
        assert!(future.is_woken(), "{}", row.name);
        let response = assert_ready_ok!(future.poll(), "{}", row.name);
        assert_eq!(response.status(), StatusCode::IM_A_TEAPOT, "{}", row.name);
        assert_eq!(response.version(), Version::HTTP_10, "{}", row.name);
        let values: Vec<_> = response.headers().get_all("x-of-the-handler").iter().collect();
        assert_eq!(values, ["1", "2"], "{}", row.name);
        assert_eq!(response.extensions().get(), Some(&"extension"), "{}", row.name);
    }
}

#[test]
fn an_error_passes_through() {
    for row in rows() {
        let (mut service, mut handle) = row.service();
        assert_ready_ok!(service.poll_ready());
        let mut future = task::spawn(service.call(request(Held::new().0)));
        let (_, send) = assert_ready!(handle.poll_request()).unwrap();
        send.send_error("went wrong");
        turn();
        let error = assert_ready_err!(future.poll(), "{}", row.name);
        assert_eq!(error.0.to_string(), "went wrong", "{}", row.name);
    }
    for row in plain_rows() {
        let (mut service, mut handle) = row.service();
        assert_ready_ok!(service.poll_ready());
        let mut future = task::spawn(service.call(1));
        let (_, send) = assert_ready!(handle.poll_request()).unwrap();
        send.send_error("went wrong");
        turn();
        assert_eq!(assert_ready_err!(future.poll()), "went wrong", "{}", row.name);
    }
}

// Drop

#[derive(Clone, Copy, Debug, PartialEq, PartialOrd)]
enum Point {
    Unpolled,
    BetweenPolls,
    Answered,
    Head,
    FirstFrame,
    MidBody,
    Trailers,
    End,
}

#[test]
fn a_response_that_is_dropped_at_any_point_gives_back_what_it_took() {
    use Point::*;
    for row in rows() {
        let (mut service, mut handle) = row.service();
        let (held, count) = Held::new();
        for point in [Unpolled, BetweenPolls, Answered, Head, FirstFrame, MidBody, Trailers, End] {
            let at = format!("{} {point:?}", row.name);
            // With a limit of one this alone shows that the one before has given back its permit.
            assert_ready_ok!(service.poll_ready(), "{at}");
            {
                let mut future = task::spawn(service.call(request(held.clone())));
                if point >= BetweenPolls {
                    assert_pending!(future.poll(), "{at}");
                    turn();
                }
                let (arrived, send) = assert_ready!(handle.poll_request(), "{at}").unwrap();
                if point >= Answered {
                    let mut script =
                        Script::new([Step::Data(3), Step::Pending, Step::Data(4), Step::Trailers]);
                    script.held = arrived.extensions().get().cloned();
                    send.send_response(Response::new(script));
                    turn();
                }
                drop(arrived);
                if point >= Head {
                    let mut body = Box::pin(assert_ready_ok!(future.poll(), "{at}").into_body());
                    assert!(count.strong_count() > 1, "{at}: the body is gone already");
                    for _ in 0..match point {
                        Head => 0,
                        FirstFrame => 1,
                        MidBody => 2,
                        Trailers => 4,
                        _ => 5,
                    } {
                        let _ = poll(body.as_mut());
                    }
                    if point == Head {
                        // The future is kept longer than the body.
                        drop(body);
                    } else {
                        drop(future);
                    }
                }
            }
            // A shield's task is told to end, and does when it next runs.
            turn();
            assert_eq!(count.strong_count(), 1, "{at}");
        }
    }
}

#[test]
fn a_plain_call_that_is_dropped_at_any_point_gives_back_what_it_took() {
    for row in plain_rows() {
        let (mut service, mut handle) = row.service();
        for polls in [0, 1, 2] {
            turn();
            assert_ready_ok!(service.poll_ready(), "{} {polls}", row.name);
            let mut future = task::spawn(service.call(1));
            let (_, send) = assert_ready!(handle.poll_request(), "{}", row.name).unwrap();
            if polls > 0 {
                assert_pending!(future.poll(), "{}", row.name);
            }
            if polls > 1 {
                send.send_response(2);
                turn();
                assert_ready_ok!(future.poll(), "{}", row.name);
                // Ready, it holds nothing even while it is kept.
                assert_ready_ok!(service.poll_ready(), "{}", row.name);
            }
        }
    }
}

#[test]
fn a_future_that_is_ready_holds_nothing_while_it_is_kept() {
    for row in rows() {
        let (mut service, mut handle) = row.service();
        let (held, count) = Held::new();
        assert_ready_ok!(service.poll_ready());
        let mut future = task::spawn(service.call(request(held)));
        let (arrived, send) = assert_ready!(handle.poll_request()).unwrap();
        drop(arrived);
        send.send_response(Response::new(Script::new([Step::Data(1)])));
        turn();
        drop(assert_ready_ok!(future.poll(), "{}", row.name));
        assert_eq!(count.strong_count(), 0, "{}", row.name);
        assert_ready_ok!(service.poll_ready(), "{}", row.name);
        drop(future);
    }
}

// The body

proptest! {
    #[test]
    fn a_body_says_and_yields_what_the_inner_one_does(
        steps in vec(prop_oneof![
            3 => (0..5usize).prop_map(Step::Data),
            1 => Just(Step::Pending),
        ], 0..8),
        last in option::of(prop_oneof![Just(Step::Trailers), Just(Step::Fail)]),
        hint in prop_oneof![Just(Hint::Nothing), Just(Hint::Exact), Just(Hint::Bounds)],
        tells_its_end in any::<bool>(),
    ) {
        let script = || {
            let mut script = Script::new(steps.iter().cloned().chain(last.clone()));
            script.hint = hint;
            script.tells_its_end = tells_its_end;
            script
        };
        for row in rows() {
            let mut body = row.body(script());
            let mut inner = Box::pin(script());
            loop {
                // Asked for twice, for it may change nothing.
                for _ in 0..2 {
                    prop_assert_eq!(body.is_end_stream(), inner.is_end_stream(), "{}", row.name);
                    let (said, says) = (body.size_hint(), inner.size_hint());
                    prop_assert_eq!(said.lower(), says.lower(), "{}", row.name);
                    prop_assert_eq!(said.upper(), says.upper(), "{}", row.name);
                }
                let (yielded, yields) = (poll(body.as_mut()), poll(inner.as_mut()));
                prop_assert_eq!(&yielded, &yields, "{}", row.name);
                if yields == "none" || yields == "error: broken" || yields.starts_with("trailers") {
                    break;
                }
            }
            // It is over, and stays so.
            for _ in 0..3 {
                prop_assert_eq!(poll(body.as_mut()), "none", "{}", row.name);
            }
        }
    }
}

#[test]
fn a_body_wakes_whoever_polled_it_when_the_inner_one_does() {
    for row in rows() {
        let mut body = row.body(Script::new([Step::Pending, Step::Data(1)]));
        let mut polled = task::spawn(());
        polled.enter(|cx, _| assert_pending!(body.as_mut().poll_frame(cx), "{}", row.name));
        assert!(polled.is_woken(), "{}", row.name);
        polled.enter(|cx, _| assert!(body.as_mut().poll_frame(cx).is_ready(), "{}", row.name));
    }
}

/// What is sent: not a body, nor anything else.
#[derive(Debug)]
struct Upload;

/// What tells whether a request's and a response's things are gone.
#[derive(Clone, Debug)]
struct Held(#[expect(dead_code)] Arc<()>);

impl Held {
    fn new() -> (Self, std::sync::Weak<()>) {
        let held = Arc::new(());
        let count = Arc::downgrade(&held);
        (Self(held), count)
    }
}

fn request(held: Held) -> Sent {
    Request::post("https://example.com/path?query")
        .version(Version::HTTP_2)
        .header("traceparent", "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01")
        .header("x-request-id", "sent")
        .header("content-type", "application/grpc")
        .extension(held)
        .body(Upload)
        .unwrap()
}

fn whole(request: Request<RequestBody<Upload>>) -> Sent {
    request.map(|_| Upload)
}

/// An error that is not an `Error`.
#[derive(Debug)]
struct Gone(BoxError);

impl fmt::Display for Gone {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(&self.0, f)
    }
}

/// Nor this, which is not even `Send`.
#[derive(Debug)]
struct Broken(PhantomData<Rc<()>>);

impl fmt::Display for Broken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("broken")
    }
}

#[derive(Clone, Debug)]
enum Step {
    Pending,
    Data(usize),
    Trailers,
    Fail,
}

#[derive(Clone, Copy, Debug)]
enum Hint {
    Nothing,
    Exact,
    Bounds,
}

/// A body that does one step in each poll, and then is over.
#[derive(Debug)]
struct Script {
    steps: Mutex<VecDeque<Step>>,
    hint: Hint,
    tells_its_end: bool,
    held: Option<Held>,
    _not_unpin: PhantomPinned,
}

impl Script {
    fn new(steps: impl IntoIterator<Item = Step>) -> Self {
        Self {
            steps: Mutex::new(steps.into_iter().collect()),
            hint: Hint::Nothing,
            tells_its_end: false,
            held: None,
            _not_unpin: PhantomPinned,
        }
    }
}

impl Body for Script {
    type Data = Bytes;
    type Error = Broken;

    fn poll_frame(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Broken>>> {
        let mut steps = self.steps.lock().unwrap();
        let left = u8::try_from(steps.len()).unwrap();
        Poll::Ready(match steps.pop_front() {
            None => None,
            Some(Step::Pending) => {
                cx.waker().wake_by_ref();
                return Poll::Pending;
            }
            Some(Step::Data(len)) => Some(Ok(Frame::data(vec![left; len].into()))),
            Some(Step::Trailers) => {
                let mut trailers = HeaderMap::new();
                trailers.insert("grpc-status", 0.into());
                Some(Ok(Frame::trailers(trailers)))
            }
            Some(Step::Fail) => Some(Err(Broken(PhantomData))),
        })
    }

    fn is_end_stream(&self) -> bool {
        self.tells_its_end && self.steps.lock().unwrap().is_empty()
    }

    fn size_hint(&self) -> SizeHint {
        let steps = self.steps.lock().unwrap();
        let data = |step: &Step| if let Step::Data(len) = step { *len as u64 } else { 0 };
        let left = steps.iter().map(data).sum();
        let mut hint = SizeHint::new();
        match self.hint {
            Hint::Nothing => {}
            Hint::Exact => hint.set_exact(left),
            Hint::Bounds => {
                hint.set_lower(left / 2);
                hint.set_upper(left + 7);
            }
        }
        hint
    }
}

fn poll<B>(body: Pin<&mut B>) -> String
where
    B: Body<Data = Bytes, Error: fmt::Display>,
{
    match body.poll_frame(&mut Context::from_waker(std::task::Waker::noop())) {
        Poll::Pending => "pending".to_owned(),
        Poll::Ready(None) => "none".to_owned(),
        Poll::Ready(Some(Err(error))) => format!("error: {error}"),
        Poll::Ready(Some(Ok(frame))) => match frame.into_data() {
            Ok(data) => format!("{data:?}"),
            Err(frame) => format!("trailers: {:?}", frame.into_trailers()),
        },
    }
}
