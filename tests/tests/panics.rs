//! The table of panics: each origin with each kind of payload under hyper and tonic, over real
//! connections, through the whole stack; and tower-http's `CatchPanic` beside it.
//!
//! What must hold for each: what the client sees, the end that the response has, one event with the
//! trace id and the place, a ledger that is closed, permits that are whole, and a next request that
//! is served on the same connection if there still is one.

#![allow(clippy::unwrap_used)]

mod grpc;

use std::{
    any::Any,
    collections::BTreeMap,
    convert::Infallible,
    fmt::{self, Write},
    panic::{self, Location, panic_any},
    pin::Pin,
    sync::{
        Arc, Mutex, Once,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    task::{Context, Poll},
};

use bytes::Bytes;
use futures_util::stream;
use http::{Request, Response, header};
use http_body::{Body, Frame, SizeHint};
use http_body_util::StreamBody;
use tokio::sync::Notify;
use tokio_stream::{Stream, StreamExt, wrappers::TcpListenerStream};
use tonic::{Status, server::NamedService, transport::Channel};
use tower::{Service, ServiceBuilder, layer::layer_fn, service_fn};
use tower_http::{catch_panic::CatchPanicLayer, compression::CompressionLayer};
use tower_tasks::{
    AtEnd, CatchUnwindLayer, End, Panic, RequestContext, RequestContextLayer, RequestLimitLayer,
    ResponseEndLayer, SpawnLimit, TaskEvent, TaskRegistry, TaskSet, TaskSetLayer, TraceIdLayer,
    assert_drained,
    catch_unwind::record,
    request_context::{Inherit, Task},
    task_set::OnPanic,
    trace_id::Trust,
};
use tower_tasks_tests::{H2, Server, http1, http2, read_all, soon};
use tracing::field::{Field, Visit};
use tracing_subscriber::layer::SubscriberExt;

use grpc::Plain;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Origin {
    Nowhere,
    Call,
    FirstPoll,
    LaterPoll,
    /// Of a future that is ready.
    FutureDrop,
    /// Of one whose client has left.
    HalfWay,
    BodyFirst,
    BodyLater,
    BodyDrop,
    SizeHint,
    IsEndStream,
    Task,
    /// When the response is over.
    TaskLate,
    NestedTask,
    /// Of one that is cancelled.
    TaskDrop,
    Blocking,
    /// Of a task that fails the response, before the head and after some of the body.
    TaskFailsHead,
    TaskFailsBody,
    MakeOnPanic,
    /// The second panic of a request.
    OnPanic,
    MakeValue,
    Inherit,
    Observer,
    OnEnd,
}

const ORIGINS: [Origin; 24] = [
    Origin::Nowhere,
    Origin::Call,
    Origin::FirstPoll,
    Origin::LaterPoll,
    Origin::FutureDrop,
    Origin::HalfWay,
    Origin::BodyFirst,
    Origin::BodyLater,
    Origin::BodyDrop,
    Origin::SizeHint,
    Origin::IsEndStream,
    Origin::Task,
    Origin::TaskLate,
    Origin::NestedTask,
    Origin::TaskDrop,
    Origin::Blocking,
    Origin::TaskFailsHead,
    Origin::TaskFailsBody,
    Origin::MakeOnPanic,
    Origin::OnPanic,
    Origin::MakeValue,
    Origin::Inherit,
    Origin::Observer,
    Origin::OnEnd,
];

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Payload {
    Str,
    String,
    NotAString,
    /// Panics when it is dropped, with another like it.
    Bomb,
    Huge,
}

const PAYLOADS: [Payload; 5] =
    [Payload::Str, Payload::String, Payload::NotAString, Payload::Bomb, Payload::Huge];

impl Payload {
    #[track_caller]
    fn throw(self, origin: Origin) -> ! {
        match self {
            Self::Str => panic_any("with a secret"),
            Self::String => panic_any("with\na secret".to_owned()),
            Self::NotAString => panic_any(7_u32),
            // tokio catches what a destructor throws, and has one net for what that is dropped with.
            Self::Bomb if origin == Origin::TaskDrop => panic_any(Bomb(1)),
            Self::Bomb => panic_any(Bomb(4)),
            Self::Huge => panic_any("secret".repeat((64 << 20) / 6)),
        }
    }

    fn message(self) -> String {
        match self {
            Self::Str => "with a secret".to_owned(),
            Self::String => r"with\na secret".to_owned(),
            Self::NotAString | Self::Bomb => "(the payload is not a string)".to_owned(),
            Self::Huge => "secret".repeat(171)[..Panic::MESSAGE_MAX].to_owned(),
        }
    }
}

struct Bomb(u32);

impl Drop for Bomb {
    fn drop(&mut self) {
        if let Some(left) = self.0.checked_sub(1) {
            panic_any(Self(left));
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Protocol {
    Http1,
    Http2,
    Unary,
    Streaming,
}

const PROTOCOLS: [Protocol; 4] =
    [Protocol::Http1, Protocol::Http2, Protocol::Unary, Protocol::Streaming];

impl Protocol {
    /// How many frames have been sent when a body panics later: all but the last.
    const fn frames(self) -> u32 {
        match self {
            Self::Streaming => 2,
            _ => 1,
        }
    }

    /// What a client sees of a response without a panic.
    const fn whole(self) -> &'static str {
        match self {
            Self::Http1 | Self::Http2 => "200 onetwo",
            Self::Unary => "1 message, Ok",
            Self::Streaming => "3 messages, Ok",
        }
    }

    /// What a client sees of a panic before the head.
    const fn failed(self) -> &'static str {
        match self {
            Self::Http1 | Self::Http2 => "500 problem",
            Self::Unary | Self::Streaming => "0 messages, Internal",
        }
    }
}

/// What the client sees, and how the response ends, where that is not as if there were no panic.
fn expected(origin: Origin, protocol: Protocol) -> (&'static str, End) {
    match origin {
        Origin::Call
        | Origin::FirstPoll
        | Origin::LaterPoll
        | Origin::FutureDrop
        | Origin::MakeOnPanic
        | Origin::OnPanic
        | Origin::MakeValue
        // A layer inside asks for these before it hands the response over.
        | Origin::SizeHint
        | Origin::IsEndStream
        | Origin::TaskFailsHead => (protocol.failed(), End::Panicked),
        Origin::HalfWay => ("left", End::Panicked),
        Origin::BodyFirst => match protocol {
            // hyper has flushed nothing yet.
            Protocol::Http1 => ("closed", End::Panicked),
            Protocol::Http2 => ("reset", End::Panicked),
            Protocol::Unary | Protocol::Streaming => (protocol.failed(), End::Panicked),
        },
        Origin::BodyLater => (cut(protocol), End::Panicked),
        // The set ends the body; a layer outside of it sees an error, or trailers.
        Origin::TaskFailsBody => match protocol {
            Protocol::Http1 | Protocol::Http2 => (cut(protocol), End::Failed),
            Protocol::Unary | Protocol::Streaming => (cut(protocol), End::Completed),
        },
        _ => (protocol.whole(), End::Completed),
    }
}

/// What a client sees of a panic after some of the body.
const fn cut(protocol: Protocol) -> &'static str {
    match protocol {
        Protocol::Http1 => "200 one, cut",
        Protocol::Http2 => "200 one, reset",
        Protocol::Unary => protocol.failed(),
        Protocol::Streaming => "2 messages, Internal",
    }
}

/// One line of the table: made by its client, found by its server.
struct Case {
    origin: Origin,
    payload: Payload,
    protocol: Protocol,
    id: String,
    /// Where it has panicked.
    thrown: Mutex<Vec<u32>>,
    ends: Mutex<Vec<End>>,
    started: Notify,
    /// The body has come to where it may panic.
    reached: Notify,
    over: Notify,
}

static CASES: Mutex<BTreeMap<String, Arc<Case>>> = Mutex::new(BTreeMap::new());

impl Case {
    fn new(origin: Origin, payload: Payload, protocol: Protocol) -> Arc<Self> {
        static NEXT: AtomicU64 = AtomicU64::new(1);
        let case = Arc::new(Self {
            origin,
            payload,
            protocol,
            id: format!("{:032x}", NEXT.fetch_add(1, Relaxed)),
            thrown: Mutex::default(),
            ends: Mutex::default(),
            started: Notify::new(),
            reached: Notify::new(),
            over: Notify::new(),
        });
        CASES.lock().unwrap().insert(case.id.clone(), case.clone());
        case
    }

    fn traceparent(&self) -> String {
        format!("00-{}-00f067aa0ba902b7-01", self.id)
    }

    fn of<B>(request: &Request<B>) -> Arc<Self> {
        let id = &request.headers()["traceparent"].to_str().unwrap()[3..35];
        CASES.lock().unwrap()[id].clone()
    }

    /// Panics if it is to panic here.
    #[track_caller]
    fn at(&self, origin: Origin) {
        if self.origin == origin {
            self.throw();
        }
    }

    #[track_caller]
    fn throw(&self) -> ! {
        self.thrown.lock().unwrap().push(Location::caller().line());
        self.payload.throw(self.origin);
    }

    /// In the handler: the tasks of it.
    fn spawn(self: &Arc<Self>) {
        let case = self.clone();
        let Ok(tasks) = TaskSet::current() else {
            return self.spawn_bare();
        };
        match self.origin {
            Origin::Task => drop(tasks.spawn("task", async move {
                tokio::task::yield_now().await;
                case.at(Origin::Task);
            })),
            Origin::TaskLate => drop(tasks.spawn("task", async move {
                case.over.notified().await;
                case.at(Origin::TaskLate);
            })),
            Origin::NestedTask => drop(tasks.spawn("parent", async move {
                let tasks = TaskSet::current().unwrap();
                let nested = async move { case.at(Origin::NestedTask) };
                tasks.spawn("task", nested).unwrap().await.unwrap_err();
            })),
            Origin::TaskDrop => {
                let forever = async move {
                    let _on_drop = OnDrop(case);
                    std::future::pending::<()>().await;
                };
                tasks.task("task").at_end(AtEnd::Cancel).spawn(forever).unwrap();
            }
            Origin::Blocking => {
                tasks.spawn_blocking("task", move |_| case.at(Origin::Blocking)).unwrap();
            }
            Origin::TaskFailsHead => {
                let fails = async move { case.at(Origin::TaskFailsHead) };
                tasks.task("task").on_panic(OnPanic::FailResponse).spawn(fails).unwrap();
            }
            Origin::TaskFailsBody => {
                let fails = async move {
                    case.reached.notified().await;
                    case.at(Origin::TaskFailsBody);
                };
                tasks.task("task").on_panic(OnPanic::FailResponse).spawn(fails).unwrap();
            }
            Origin::Inherit => {
                let context = RequestContext::current().with_inherited(Heir(case));
                context.sync_scope(|| tasks.spawn("task", async {}).unwrap());
            }
            _ => drop(tasks.spawn("task", async {})),
        }
    }

    /// The same without our layers, as far as it goes.
    fn spawn_bare(self: &Arc<Self>) {
        let case = self.clone();
        match self.origin {
            Origin::Task | Origin::TaskLate | Origin::NestedTask => {
                tokio::spawn(async move { case.throw() });
            }
            Origin::TaskDrop => {
                let on_drop = OnDrop(case);
                let forever = async move {
                    let _on_drop = on_drop;
                    std::future::pending::<()>().await;
                };
                tokio::spawn(forever).abort();
            }
            Origin::Blocking => drop(tokio::task::spawn_blocking(move || case.throw())),
            _ => {}
        }
    }
}

struct OnDrop(Arc<Case>);

impl Drop for OnDrop {
    fn drop(&mut self) {
        self.0.at(Origin::TaskDrop);
    }
}

struct Heir(Arc<Case>);

impl Inherit for Heir {
    fn inherit(&self, _: &Task) -> Self {
        self.0.at(Origin::Inherit);
        Self(self.0.clone())
    }

    fn wants_span(&self) -> bool {
        true
    }
}

/// The handler: what it wraps, with a panic where one is to be.
#[derive(Clone)]
struct Scripted<S>(S);

impl<S, B, R> Service<Request<B>> for Scripted<S>
where
    S: Service<Request<B>, Response = Response<R>>,
    S::Future: Send + 'static,
    R: Body,
{
    type Response = Response<ScriptedBody<R>>;
    type Error = S::Error;
    type Future = ScriptedFuture<S::Future>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.0.poll_ready(cx)
    }

    fn call(&mut self, request: Request<B>) -> Self::Future {
        let case = Case::of(&request);
        case.started.notify_one();
        case.at(Origin::Call);
        if case.origin == Origin::OnPanic {
            case.throw();
        }
        ScriptedFuture { inner: Box::pin(self.0.call(request)), case, polls: 0, is_ready: false }
    }
}

struct ScriptedFuture<F> {
    inner: Pin<Box<F>>,
    case: Arc<Case>,
    polls: u32,
    is_ready: bool,
}

impl<F, R, E> Future for ScriptedFuture<F>
where
    F: Future<Output = Result<Response<R>, E>>,
    R: Body,
{
    type Output = Result<Response<ScriptedBody<R>>, E>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        self.polls += 1;
        if self.polls == 1 {
            self.case.at(Origin::FirstPoll);
            self.case.spawn();
            cx.waker().wake_by_ref();
            return Poll::Pending;
        }
        self.case.at(Origin::LaterPoll);
        if matches!(self.case.origin, Origin::HalfWay | Origin::TaskFailsHead) {
            return Poll::Pending;
        }
        self.inner.as_mut().poll(cx).map_ok(|response| {
            self.is_ready = true;
            response.map(|body| ScriptedBody {
                inner: Box::pin(body),
                case: self.case.clone(),
                frames: 0,
                pauses: 0,
            })
        })
    }
}

impl<F> Drop for ScriptedFuture<F> {
    fn drop(&mut self) {
        if self.is_ready {
            self.case.at(Origin::FutureDrop);
        }
        self.case.at(Origin::HalfWay);
    }
}

struct ScriptedBody<B> {
    inner: Pin<Box<B>>,
    case: Arc<Case>,
    frames: u32,
    pauses: u32,
}

impl<B: Body> Body for ScriptedBody<B> {
    type Data = B::Data;
    type Error = B::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<B::Data>, B::Error>>> {
        if self.frames == 0 {
            self.case.at(Origin::BodyFirst);
        }
        if self.frames == self.case.protocol.frames() {
            // So that what has come before is sent.
            if self.pauses < 20 {
                self.pauses += 1;
                cx.waker().wake_by_ref();
                return Poll::Pending;
            }
            self.case.at(Origin::BodyLater);
            if self.case.origin == Origin::TaskFailsBody {
                self.case.reached.notify_one();
                return Poll::Pending;
            }
        }
        let frame = std::task::ready!(self.inner.as_mut().poll_frame(cx));
        self.frames += 1;
        Poll::Ready(frame)
    }

    fn size_hint(&self) -> SizeHint {
        self.case.at(Origin::SizeHint);
        self.inner.size_hint()
    }

    fn is_end_stream(&self) -> bool {
        self.case.at(Origin::IsEndStream);
        self.inner.is_end_stream()
    }
}

impl<B> Drop for ScriptedBody<B> {
    fn drop(&mut self) {
        self.case.at(Origin::BodyDrop);
    }
}

/// A server with the whole stack.
struct Site {
    server: Server,
    tasks: TaskRegistry,
    task_limit: SpawnLimit,
    request_limit: RequestLimitLayer,
}

/// The stack, outermost first.
macro_rules! ours {
    ($body:ty, $tasks:expr, $request_limit:expr) => {
        ServiceBuilder::new()
            .layer(TraceIdLayer::new().trust(Trust::Continue))
            .layer(CatchUnwindLayer::new().max_events_per_second(u32::MAX).on_panic(
                |request: &Request<$body>| {
                    let case = Case::of(request);
                    case.at(Origin::MakeOnPanic);
                    move |_: &Panic| {
                        case.at(Origin::OnPanic);
                        None
                    }
                },
            ))
            .layer($request_limit)
            .layer(RequestContextLayer::new(|request: &Request<$body>| {
                let case = Case::of(request);
                case.at(Origin::MakeValue);
                case
            }))
            .layer(ResponseEndLayer::new(|request: &Request<$body>| {
                let case = Case::of(request);
                move |end: End| {
                    case.ends.lock().unwrap().push(end);
                    case.over.notify_one();
                    case.at(Origin::OnEnd);
                }
            }))
            .layer(TaskSetLayer::new($tasks))
            .layer(layer_fn(Scripted))
    };
}

impl Site {
    async fn new(protocol: Protocol) -> Self {
        observed();
        let task_limit = SpawnLimit::new(3);
        let observer = |event: &TaskEvent| {
            if matches!(event, TaskEvent::Started { .. }) {
                let context = RequestContext::current();
                context.get::<Arc<Case>>().unwrap().at(Origin::Observer);
            }
        };
        let tasks = TaskRegistry::new()
            .limit(task_limit.clone())
            .observer(observer)
            .max_events_per_second(u32::MAX);
        let request_limit = RequestLimitLayer::new(1);
        let server = match protocol {
            Protocol::Http1 | Protocol::Http2 => {
                let stack = ours!(hyper::body::Incoming, &tasks, request_limit.clone());
                let http = if protocol == Protocol::Http1 { http1() } else { http2() };
                Server::hyper(http, stack.service(service_fn(answer))).await
            }
            Protocol::Unary | Protocol::Streaming => {
                let stack = ours!(tonic::body::Body, &tasks, request_limit.clone());
                let mut builder = tonic::transport::Server::builder().layer(stack.into_inner());
                let router = builder.add_service(Echo);
                Server::host(async |listener| {
                    router.serve_with_incoming(TcpListenerStream::new(listener)).await.unwrap();
                })
                .await
            }
        };
        Self { server, tasks, task_limit, request_limit }
    }

    /// Waits until all is over.
    async fn is_at_rest(&self) {
        soon(async {
            while !self.tasks.is_empty()
                || self.task_limit.in_use() != 0
                || self.request_limit.in_use() != 0
            {
                tokio::task::yield_now().await;
            }
        })
        .await;
    }
}

async fn with_catch_panic(protocol: Protocol) -> Server {
    observed();
    match protocol {
        Protocol::Http1 | Protocol::Http2 => {
            let stack =
                ServiceBuilder::new().layer(CatchPanicLayer::new()).layer(layer_fn(Scripted));
            let http = if protocol == Protocol::Http1 { http1() } else { http2() };
            Server::hyper(http, stack.service(service_fn(answer))).await
        }
        Protocol::Unary | Protocol::Streaming => {
            let stack =
                ServiceBuilder::new().layer(CatchPanicLayer::new()).layer(layer_fn(Scripted));
            let mut builder = tonic::transport::Server::builder().layer(stack.into_inner());
            let router = builder.add_service(Echo);
            Server::host(async |listener| {
                router.serve_with_incoming(TcpListenerStream::new(listener)).await.unwrap();
            })
            .await
        }
    }
}

type Chunk = Result<Frame<Bytes>, Infallible>;

/// Two chunks, of which nothing says how many there will be.
async fn answer<B>(
    _: Request<B>,
) -> Result<Response<StreamBody<stream::Iter<std::array::IntoIter<Chunk, 2>>>>, Infallible> {
    let chunks = ["one", "two"].map(|chunk| Ok(Frame::data(Bytes::from(chunk))));
    Ok(Response::new(StreamBody::new(stream::iter(chunks))))
}

/// A gRPC service as tonic's generated code is, with messages of plain bytes.
#[derive(Clone)]
struct Echo;

impl NamedService for Echo {
    const NAME: &'static str = "test.Echo";
}

type Messages = Pin<Box<dyn Stream<Item = Result<Bytes, Status>> + Send>>;

impl Service<Request<tonic::body::Body>> for Echo {
    type Response = Response<tonic::body::Body>;
    type Error = Infallible;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response, Infallible>> + Send>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: Request<tonic::body::Body>) -> Self::Future {
        let is_unary = request.uri().path().ends_with("/Unary");
        Box::pin(async move {
            let mut grpc = tonic::server::Grpc::new(Plain);
            if is_unary {
                let unary = service_fn(async |request: tonic::Request<Bytes>| {
                    Ok(tonic::Response::new(request.into_inner()))
                });
                return Ok(grpc.unary(unary, request).await);
            }
            let streaming = service_fn(async |request: tonic::Request<Bytes>| {
                let message = request.into_inner();
                let messages = tokio_stream::iter(0..3).then(move |_| {
                    let message = message.clone();
                    async move {
                        // So that each is a frame: tonic collects what is ready.
                        tokio::task::yield_now().await;
                        Ok(message)
                    }
                });
                let messages: Messages = Box::pin(messages);
                Ok(tonic::Response::new(messages))
            });
            Ok(grpc.server_streaming(streaming, request).await)
        })
    }
}

enum Client<'a> {
    Http1(&'a Server),
    Http2(H2),
    Grpc(tonic::client::Grpc<Channel>),
}

impl<'a> Client<'a> {
    async fn new(server: &'a Server, protocol: Protocol) -> Self {
        match protocol {
            Protocol::Http1 => Self::Http1(server),
            Protocol::Http2 => Self::Http2(server.h2().await),
            Protocol::Unary | Protocol::Streaming => {
                let channel = Channel::from_shared(format!("http://{}", server.addr())).unwrap();
                Self::Grpc(tonic::client::Grpc::new(channel.connect_lazy()))
            }
        }
    }

    /// What the client sees.
    async fn see(&mut self, case: &Case) -> String {
        let leaves = case.origin == Origin::HalfWay;
        match self {
            Self::Http1(server) => see_http1(server, case, leaves).await,
            Self::Http2(client) => {
                let request = Request::get("http://x/").header("traceparent", case.traceparent());
                let response = client.send(request.body(()).unwrap()).await;
                if leaves {
                    soon(case.started.notified()).await;
                    drop(response);
                    return "left".to_owned();
                }
                see_http2(soon(response).await).await
            }
            Self::Grpc(client) => {
                if leaves {
                    tokio::select! {
                        () = soon(case.started.notified()) => return "left".to_owned(),
                        seen = see_grpc(client, case) => return seen,
                    }
                }
                see_grpc(client, case).await
            }
        }
    }
}

async fn see_http1(server: &Server, case: &Case, leaves: bool) -> String {
    let traceparent = case.traceparent();
    let mut client = server.raw().await;
    let head = "GET / HTTP/1.1\r\nhost: x\r\nconnection: close\r\n";
    client.write(format!("{head}traceparent: {traceparent}\r\n\r\n")).await;
    if leaves {
        soon(case.started.notified()).await;
        client.close();
        return "left".to_owned();
    }
    let response = client.rest().await;
    let Some((head, body)) = response.split_once("\r\n\r\n") else {
        return "closed".to_owned();
    };
    let status = &head["HTTP/1.1 ".len()..][..3];
    assert!(!response.contains("secret"), "{response}");
    if head.contains("application/problem+json") {
        assert!(body.contains(&case.id), "{body}");
        return format!("{status} problem");
    }
    // Chunks, and their sizes.
    let is_whole = body.ends_with("\r\n0\r\n\r\n") || head.contains("content-length");
    let text: String = body.split("\r\n").filter(|line| line.parse::<u32>().is_err()).collect();
    format!("{status} {text}{}", if is_whole { "" } else { ", cut" })
}

async fn see_http2(response: Result<Response<h2::RecvStream>, h2::Error>) -> String {
    let response = match response {
        Ok(response) => response,
        Err(error) => return reset(&error),
    };
    let (head, mut body) = response.into_parts();
    let status = head.status.as_u16();
    if head.headers.get(header::CONTENT_TYPE).is_some_and(|it| it == "application/problem+json") {
        let (problem, _) = read_all(&mut body).await.unwrap();
        assert!(!std::str::from_utf8(&problem).unwrap().contains("secret"), "{problem:?}");
        return format!("{status} problem");
    }
    let mut text = String::new();
    loop {
        match soon(body.data()).await {
            None => return format!("{status} {text}"),
            Some(Ok(data)) => text.push_str(std::str::from_utf8(&data).unwrap()),
            Some(Err(error)) => {
                let reset = reset(&error);
                return if text.is_empty() { reset } else { format!("{status} {text}, {reset}") };
            }
        }
    }
}

fn reset(error: &h2::Error) -> String {
    match error.reason() {
        Some(h2::Reason::INTERNAL_ERROR) => "reset".to_owned(),
        Some(reason) => format!("reset: {reason:?}"),
        None => "closed".to_owned(),
    }
}

async fn see_grpc(client: &mut tonic::client::Grpc<Channel>, case: &Case) -> String {
    let mut request = tonic::Request::new(Bytes::from("foo"));
    request.metadata_mut().insert("traceparent", case.traceparent().parse().unwrap());
    soon(client.ready()).await.unwrap();
    let (mut count, mut status) = (0, Ok(()));
    if case.protocol == Protocol::Unary {
        let path = "/test.Echo/Unary".parse().unwrap();
        match soon(client.unary(request, path, Plain)).await {
            Ok(response) => {
                assert_eq!(response.into_inner(), "foo");
                count = 1;
            }
            Err(error) => status = Err(error),
        }
    } else {
        let path = "/test.Echo/Streaming".parse().unwrap();
        match soon(client.server_streaming(request, path, Plain)).await {
            Ok(response) => {
                let mut messages = response.into_inner();
                while let Some(message) = soon(messages.next()).await {
                    match message {
                        Ok(_) => count += 1,
                        Err(error) => {
                            status = Err(error);
                            break;
                        }
                    }
                }
            }
            Err(error) => status = Err(error),
        }
    }
    let messages = if count == 1 { "message" } else { "messages" };
    match status {
        Ok(()) => format!("{count} {messages}, Ok"),
        Err(error) => {
            let (code, message) = (error.code(), error.message());
            if code == tonic::Code::Internal && message == "internal error" {
                return format!("{count} {messages}, Internal");
            }
            let message: String = message.chars().take(36).collect();
            format!("{count} {messages}, {code:?}: {message}")
        }
    }
}

/// All origins with all payloads, but the largest with every fourth, each time another.
async fn holds(protocol: Protocol) {
    let site = Site::new(protocol).await;
    let mut client = Client::new(&site.server, protocol).await;
    let mut panicked = 0;
    for (n, origin) in ORIGINS.into_iter().enumerate() {
        for payload in PAYLOADS {
            if payload == Payload::Huge && PROTOCOLS[n % 4] != protocol {
                continue;
            }
            let case = Case::new(origin, payload, protocol);
            let what = format!("{origin:?}, {payload:?}, {protocol:?}");
            let (seen, end) = expected(origin, protocol);
            assert_eq!(client.see(&case).await, seen, "{what}");
            site.is_at_rest().await;
            assert_told(&case, &what).await;

            let makes_no_scope = matches!(origin, Origin::MakeOnPanic | Origin::MakeValue);
            let ends = if makes_no_scope { vec![] } else { vec![end] };
            assert_eq!(*case.ends.lock().unwrap(), ends, "{what}");
            assert_drained(&site.tasks);
            let totals = site.tasks.snapshot().totals;
            assert!(totals.is_exact(), "{what}: {totals:?}");
            let in_task = [
                Origin::Task,
                Origin::TaskLate,
                Origin::NestedTask,
                Origin::TaskDrop,
                Origin::Blocking,
                Origin::TaskFailsHead,
                Origin::TaskFailsBody,
            ];
            panicked += u64::from(in_task.contains(&origin));
            assert_eq!(totals.panicked, panicked, "{what}");
            assert_eq!((totals.refused, totals.aborted), (0, 0), "{what}");

            let next = Case::new(Origin::Nowhere, Payload::Str, protocol);
            assert_eq!(client.see(&next).await, protocol.whole(), "after {what}");
            site.is_at_rest().await;
        }
    }
    assert_eq!(site.request_limit.refused(), 0);
}

#[tokio::test]
async fn each_panic_over_http1_has_one_outcome_one_event_and_no_other_victim() {
    holds(Protocol::Http1).await;
}

#[tokio::test]
async fn each_panic_over_http2_has_one_outcome_one_event_and_no_other_victim() {
    holds(Protocol::Http2).await;
}

#[tokio::test]
async fn each_panic_of_a_unary_call_has_one_outcome_one_event_and_no_other_victim() {
    holds(Protocol::Unary).await;
}

#[tokio::test]
async fn each_panic_of_a_streaming_call_has_one_outcome_one_event_and_no_other_victim() {
    holds(Protocol::Streaming).await;
}

#[tokio::test]
async fn an_http1_connection_stays_after_a_panic_before_the_head() {
    let site = Site::new(Protocol::Http1).await;
    let mut client = site.server.raw().await;
    for (origin, status) in
        [(Origin::LaterPoll, 500), (Origin::BodyDrop, 200), (Origin::Nowhere, 200)]
    {
        let case = Case::new(origin, Payload::Str, Protocol::Http1);
        let traceparent = case.traceparent();
        client
            .write(format!("GET / HTTP/1.1\r\nhost: x\r\ntraceparent: {traceparent}\r\n\r\n"))
            .await;
        let head = client.read_head().await;
        assert!(head.starts_with(&format!("HTTP/1.1 {status}")), "{head}");
        if status == 500 {
            assert!(head.contains("content-type: application/problem+json\r\n"), "{head}");
            let problem = client.read_until("}").await;
            assert!(problem.contains(&format!(r#""trace_id":"{}""#, case.id)), "{problem}");
        } else {
            client.read_until("\r\n0\r\n\r\n").await;
        }
        site.is_at_rest().await;
    }
}

#[tokio::test]
async fn axum_and_layers_with_boxed_errors_take_its_body() {
    observed();
    let case = Case::new(Origin::Call, Payload::String, Protocol::Http1);
    let thrower = case.clone();
    let handler = async move || {
        thrower.at(Origin::Call);
        "unreachable"
    };
    let tasks = TaskRegistry::new();
    let router = axum::Router::new()
        .route("/", axum::routing::get(handler))
        .layer((
            TraceIdLayer::new().trust(Trust::Continue),
            CatchUnwindLayer::new(),
            TaskSetLayer::new(&tasks),
            CompressionLayer::new(),
        ))
        .layer(CompressionLayer::new());
    let server = Server::host(async |listener| axum::serve(listener, router).await.unwrap()).await;
    assert_eq!(see_http1(&server, &case, false).await, "500 problem");
    assert_told(&case, "axum").await;
}

#[tokio::test]
#[allow(clippy::print_stdout)]
async fn beside_catch_panic_of_tower_http() {
    println!("{:12} {:10} {:42} ours", "", "", "CatchPanic");
    let mut lost = Vec::new();
    for origin in ORIGINS {
        // They have no such callback, or no tasks.
        if matches!(
            origin,
            Origin::TaskFailsHead
                | Origin::TaskFailsBody
                | Origin::MakeOnPanic
                | Origin::OnPanic
                | Origin::MakeValue
                | Origin::Inherit
                | Origin::Observer
                | Origin::OnEnd
        ) {
            continue;
        }
        for protocol in PROTOCOLS {
            // A connection that dies takes its server's other streams along: one for each.
            let server = with_catch_panic(protocol).await;
            let mut client = Client::new(&server, protocol).await;
            let case = Case::new(origin, Payload::Str, protocol);
            let theirs = client.see(&case).await;
            let (ours, _) = expected(origin, protocol);
            println!(
                "{:12} {:10} {theirs:42} {ours}",
                format!("{origin:?}"),
                format!("{protocol:?}")
            );
            assert!(told(&case).is_empty(), "it logs nothing of it");
            // The client is told nothing, but that the connection or the stream is gone.
            let is_lost = |seen: &str| seen == "closed" || seen.contains("CANCEL");
            if protocol == Protocol::Http1 && is_lost(&theirs) && !is_lost(ours) {
                lost.push(origin);
            }
            let is_grpc = matches!(protocol, Protocol::Unary | Protocol::Streaming);
            assert!(!is_grpc || !theirs.ends_with("Internal"), "{theirs}");
        }
    }
    assert_eq!(lost, [Origin::FutureDrop, Origin::SizeHint, Origin::IsEndStream]);
}

type Event = BTreeMap<&'static str, String>;

static EVENTS: Mutex<Vec<Event>> = Mutex::new(Vec::new());

/// Lets the whole process log into [`EVENTS`], and say where its panics come from. What nobody
/// would tell is printed.
fn observed() {
    struct Collect;
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
            if *event.metadata().level() == tracing::Level::ERROR {
                let mut fields = Event::new();
                event.record(&mut Fields(&mut fields));
                EVENTS.lock().unwrap().push(fields);
            }
        }
    }

    static OBSERVED: Once = Once::new();
    OBSERVED.call_once(|| {
        let subscriber = tracing_subscriber::registry().with(Collect);
        tracing::subscriber::set_global_default(subscriber).unwrap();
        let previous = panic::take_hook();
        panic::set_hook(Box::new(move |info| {
            let is_ours = is_of_a_case(info.payload());
            if !record(info) && !is_ours {
                previous(info);
            }
        }));
    });
}

/// A panic of the table: some are caught by the runtime or the server.
fn is_of_a_case(payload: &dyn Any) -> bool {
    payload.is::<u32>()
        || payload.is::<Bomb>()
        || payload.downcast_ref::<&str>().is_some_and(|it| it.contains("secret"))
        || payload
            .downcast_ref::<String>()
            .is_some_and(|it| it[..it.len().min(20)].contains("secret"))
}

fn told(case: &Case) -> Vec<Event> {
    let events = EVENTS.lock().unwrap();
    let of_this = |event: &&Event| event.get("trace_id").is_some_and(|it| *it == case.id);
    events.iter().filter(of_this).cloned().collect()
}

/// There is one event for each panic of it, with its place.
async fn assert_told(case: &Case, what: &str) {
    let panics = match case.origin {
        Origin::Nowhere => 0,
        Origin::OnPanic => 2,
        _ => 1,
    };
    // What comes after the last byte has its time.
    soon(async {
        while case.thrown.lock().unwrap().len() < panics || told(case).len() < panics {
            tokio::task::yield_now().await;
        }
    })
    .await;
    let thrown = case.thrown.lock().unwrap().clone();
    let events = told(case);
    assert_eq!((thrown.len(), events.len()), (panics, panics), "{what}: {events:?}");
    for (line, event) in thrown.iter().zip(&events) {
        let mut place = String::new();
        write!(place, "tests/panics.rs:{line}:").unwrap();
        assert!(event["location"].contains(&place), "{what}: {line}, {event:?}");
        assert_eq!(event["panic"], case.payload.message(), "{what}");
    }
}
