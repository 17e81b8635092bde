//! What a client sees of a panic, over real connections: `catch-unwind` under hyper and tonic, and
//! tower-http's `CatchPanic` beside it.
//!
//! The path says where the panic is to be.

#![allow(clippy::unwrap_used)]

mod grpc;

use std::{
    collections::BTreeMap,
    convert::Infallible,
    fmt,
    pin::Pin,
    sync::{Mutex, Once},
    task::{Context, Poll},
};

use bytes::Bytes;
use http::{Request, Response, header};
use http_body::{Body, Frame, SizeHint};
use tokio_stream::{Stream, StreamExt, wrappers::TcpListenerStream};
use tonic::{Status, server::NamedService, transport::Channel};
use tower::{Service, ServiceBuilder, service_fn};
use tower_http::catch_panic::CatchPanicLayer;
use tower_tasks::{
    RequestContextLayer,
    catch_unwind::{CatchUnwindLayer, install_hook},
    request_context::RequestId,
};
use tower_tasks_tests::{Protocol, Server, http1, http2, read_all, soon};

use grpc::Plain;
use tracing::field::{Field, Visit};
use tracing_subscriber::layer::SubscriberExt;

const HTTP: [(&str, &str, &str); 10] = [
    // Where, and what a client sees over HTTP/1 and over HTTP/2.
    ("nowhere", "200 onetwo", "200 onetwo"),
    ("call", "500 problem", "500 problem"),
    ("first poll", "500 problem", "500 problem"),
    ("later poll", "500 problem", "500 problem"),
    ("drop of the future", "500 problem", "500 problem"),
    // hyper has flushed nothing yet.
    ("body, first poll", "closed", "reset"),
    ("body, later poll", "200 one, cut", "200 one, reset"),
    ("drop of the body", "200 onetwo", "200 onetwo"),
    ("size_hint", "200 onetwo", "200 onetwo"),
    ("is_end_stream", "200 onetwo", "200 onetwo"),
];

const GRPC: [(&str, &str); 7] = [
    ("unary/nowhere", "1 message, Ok"),
    ("unary/call", "0 messages, Internal"),
    ("unary/first poll", "0 messages, Internal"),
    ("stream/nowhere", "3 messages, Ok"),
    ("stream/first poll", "0 messages, Internal"),
    ("stream/first message", "0 messages, Internal"),
    ("stream/after two messages", "2 messages, Internal"),
];

#[tokio::test]
async fn each_panic_over_http1_has_one_outcome_and_one_event() {
    let server = Site::Ours.http(http1()).await;
    for (origin, expected, _) in HTTP {
        let id = format!("h1-{}", slug(origin));
        assert_eq!(get(&server, origin, &id).await, expected, "{origin}");
        told_once(&id, origin != "nowhere").await;
        assert_eq!(get(&server, "nowhere", &format!("{id}-next")).await, "200 onetwo", "{origin}");
    }
}

#[tokio::test]
async fn each_panic_over_http2_has_one_outcome_and_one_event() {
    let server = Site::Ours.http(http2()).await;
    let mut client = server.h2().await;
    for (origin, _, expected) in HTTP {
        let id = format!("h2-{}", slug(origin));
        assert_eq!(get_h2(&mut client, origin, &id).await, expected, "{origin}");
        told_once(&id, origin != "nowhere").await;
        // On the same connection.
        let next = get_h2(&mut client, "nowhere", &format!("{id}-next")).await;
        assert_eq!(next, "200 onetwo", "{origin}");
    }
}

#[tokio::test]
async fn each_panic_under_tonic_has_one_outcome_and_one_event() {
    let (_server, mut client) = Site::Ours.grpc().await;
    for (method, expected) in GRPC {
        let id = format!("grpc-{}", slug(method));
        assert_eq!(client.call(method, &id).await, expected, "{method}");
        told_once(&id, !method.ends_with("nowhere")).await;
        let next = client.call("unary/nowhere", &format!("{id}-next")).await;
        assert_eq!(next, "1 message, Ok", "{method}");
    }
}

#[tokio::test]
async fn an_http1_connection_stays_after_a_panic_before_the_head() {
    let server = Site::Ours.http(http1()).await;
    let mut client = server.raw().await;
    for (origin, status) in [("later poll", 500), ("drop of the body", 200), ("nowhere", 200)] {
        let id = format!("stays-{}", slug(origin));
        client.write(head(origin, &id)).await;
        let head = client.read_head().await;
        assert!(head.starts_with(&format!("HTTP/1.1 {status}")), "{head}");
        if status == 500 {
            assert!(head.contains("content-type: application/problem+json\r\n"), "{head}");
            let expected = format!(
                r#"{{"type":"about:blank","title":"Internal Server Error","status":500,"detail":"internal error","request_id":"{id}"}}"#
            );
            assert_eq!(client.read_exactly(expected.len()).await, expected);
        } else {
            client.read_until("\r\n0\r\n\r\n").await;
        }
    }
}

#[tokio::test]
async fn a_future_that_panics_when_its_client_leaves_hurts_nobody() {
    let server = Site::Ours.http(http2()).await;
    let mut client = server.h2().await;
    let (response, mut stream) = client.open(request("drop half-way", "half-way"), false).await;
    // Its answer comes after the other one has begun.
    assert_eq!(get_h2(&mut client, "nowhere", "half-way-other").await, "200 onetwo");
    stream.send_reset(h2::Reason::CANCEL);
    assert!(response.await.is_err());
    told_once("half-way", true).await;
    assert_eq!(get_h2(&mut client, "nowhere", "half-way-next").await, "200 onetwo");
}

#[tokio::test]
async fn axum_and_layers_with_boxed_errors_take_its_body() {
    let router = axum::Router::new()
        .route("/", axum::routing::get(async || -> &'static str { boom() }))
        .layer((
            RequestContextLayer::new(id_of::<axum::body::Body>),
            CatchUnwindLayer::new(),
            tower_http::compression::CompressionLayer::new(),
        ))
        .layer(tower_http::compression::CompressionLayer::new());
    observed();
    let server = Server::host(async |listener| axum::serve(listener, router).await.unwrap()).await;
    let mut client = server.raw().await;
    client.write("GET / HTTP/1.1\r\nhost: x\r\nx-request-id: axum\r\n\r\n").await;
    let head = client.read_head().await;
    assert!(head.starts_with("HTTP/1.1 500 "), "{head}");
    told_once("axum", true).await;
}

// Beside tower-http.

#[tokio::test]
#[allow(clippy::print_stdout, clippy::print_literal)]
async fn ours_beside_tower_http() {
    println!(
        "{:34}{:24}{:30}{:30}{}",
        "", "HTTP/1: CatchPanic", "ours", "HTTP/2: CatchPanic", "ours"
    );
    let mut worse = 0;
    for (origin, ours_h1, ours_h2) in HTTP {
        // A connection that dies takes its server's other streams along: one for each.
        let server = Site::TowerHttp.http(http1()).await;
        let h1 = get(&server, origin, &format!("theirs-h1-{}", slug(origin))).await;
        let server = Site::TowerHttp.http(http2()).await;
        let mut client = server.h2().await;
        let h2 = get_h2(&mut client, origin, &format!("theirs-h2-{}", slug(origin))).await;
        println!("{origin:34}{h1:24}{ours_h1:30}{h2:30}{ours_h2}");
        let whole = |seen: &str| !seen.contains("cut") && seen != "closed";
        worse += usize::from(whole(ours_h1) && !whole(&h1));
    }
    println!("\n{:34}{:60}{}", "", "gRPC: CatchPanic", "ours");
    let (_server, mut client) = Site::TowerHttp.grpc().await;
    for (method, ours) in GRPC {
        let theirs = client.call(method, &format!("theirs-grpc-{}", slug(method))).await;
        println!("{method:34}{theirs:60}{ours}");
        if !method.ends_with("nowhere") {
            assert!(!theirs.ends_with("Internal"), "{method}: {theirs}");
        }
    }
    assert_eq!(worse, 4);
}

// What the tests share.

/// Where every panic is.
fn boom() -> ! {
    panic!("boom, with a secret")
}
const BOOM: u32 = line!() - 2;

fn slug(origin: &str) -> String {
    origin.replace(|char: char| !char.is_ascii_alphanumeric(), "-")
}

#[derive(Clone, Copy)]
enum Site {
    Ours,
    TowerHttp,
}

impl Site {
    async fn http(self, protocol: Protocol) -> Server {
        observed();
        let service = service_fn(|request: Request<hyper::body::Incoming>| {
            let origin = request.uri().path().trim_start_matches('/').to_owned();
            if origin == "call" {
                boom();
            }
            Script { origin, polls: 0, ready: false }
        });
        let context = RequestContextLayer::new(id_of::<hyper::body::Incoming>);
        let layers = ServiceBuilder::new().layer(context);
        match self {
            Self::Ours => {
                let layers = layers.layer(CatchUnwindLayer::new().max_events_per_second(1_000));
                Server::hyper(protocol, layers.service(service)).await
            }
            Self::TowerHttp => {
                let layers = layers.layer(CatchPanicLayer::new());
                Server::hyper(protocol, layers.service(service)).await
            }
        }
    }

    async fn grpc(self) -> (Server, Client) {
        observed();
        let builder = tonic::transport::Server::builder()
            .layer(RequestContextLayer::new(id_of::<tonic::body::Body>));
        let server = match self {
            Self::Ours => {
                let router = builder.layer(CatchUnwindLayer::new()).add_service(Panics);
                Server::host(async |listener| {
                    router.serve_with_incoming(TcpListenerStream::new(listener)).await.unwrap();
                })
                .await
            }
            Self::TowerHttp => {
                let router = builder.layer(CatchPanicLayer::new()).add_service(Panics);
                Server::host(async |listener| {
                    router.serve_with_incoming(TcpListenerStream::new(listener)).await.unwrap();
                })
                .await
            }
        };
        let channel = Channel::from_shared(format!("http://{}", server.addr())).unwrap();
        (server, Client(tonic::client::Grpc::new(channel.connect_lazy())))
    }
}

fn id_of<B>(request: &Request<B>) -> RequestId {
    RequestId::from_bytes(request.headers()["x-request-id"].as_bytes()).unwrap()
}

fn path(origin: &str) -> String {
    origin.replace(' ', "%20")
}

fn head(origin: &str, id: &str) -> String {
    format!("GET /{} HTTP/1.1\r\nhost: x\r\nx-request-id: {id}\r\n\r\n", path(origin))
}

fn request(origin: &str, id: &str) -> Request<()> {
    let uri = format!("http://x/{}", path(origin));
    Request::get(uri).header("x-request-id", id).body(()).unwrap()
}

/// What an HTTP/1 client sees.
async fn get(server: &Server, origin: &str, id: &str) -> String {
    let mut client = server.raw().await;
    client.write(head(origin, id).replace("\r\nhost", "\r\nconnection: close\r\nhost")).await;
    let response = client.rest().await;
    let Some((head, body)) = response.split_once("\r\n\r\n") else {
        return "closed".to_owned();
    };
    let status = &head["HTTP/1.1 ".len()..][..3];
    assert!(!response.contains("secret"), "{response}");
    if head.contains("application/problem+json") {
        assert!(body.contains(id), "{body}");
        return format!("{status} problem");
    }
    // Chunks, and their sizes.
    let whole = body.ends_with("\r\n0\r\n\r\n") || head.contains("content-length");
    let text: String = body.split("\r\n").filter(|line| line.parse::<u32>().is_err()).collect();
    format!("{status} {text}{}", if whole { "" } else { ", cut" })
}

/// What an HTTP/2 client sees.
async fn get_h2(client: &mut tower_tasks_tests::H2, origin: &str, id: &str) -> String {
    let response = match soon(client.send(request(origin, id)).await).await {
        Ok(response) => response,
        Err(error) if error.is_reset() => return reset(&error),
        Err(error) => return error.to_string(),
    };
    let (head, mut body) = response.into_parts();
    let status = head.status.as_u16();
    if head.headers.get(header::CONTENT_TYPE).is_some_and(|it| it == "application/problem+json") {
        let (problem, _) = read_all(&mut body).await.unwrap();
        assert!(std::str::from_utf8(&problem).unwrap().contains(id), "{problem:?}");
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
        reason => format!("reset: {reason:?}"),
    }
}

/// The future, and then the body, which panic where they are told to.
struct Script {
    origin: String,
    polls: u32,
    ready: bool,
}

impl Future for Script {
    type Output = Result<Response<ScriptBody>, Infallible>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        self.polls += 1;
        match (&*decoded(&self.origin), self.polls) {
            ("drop half-way", _) => return Poll::Pending,
            ("first poll", 1) | ("later poll", 2) => boom(),
            (_, 1) => {
                cx.waker().wake_by_ref();
                return Poll::Pending;
            }
            _ => {}
        }
        self.ready = true;
        Poll::Ready(Ok(Response::new(ScriptBody { origin: decoded(&self.origin), polls: 0 })))
    }
}

impl Drop for Script {
    fn drop(&mut self) {
        match &*decoded(&self.origin) {
            "drop of the future" if self.ready => boom(),
            "drop half-way" => boom(),
            _ => {}
        }
    }
}

fn decoded(origin: &str) -> String {
    origin.replace("%20", " ")
}

struct ScriptBody {
    origin: String,
    polls: u32,
}

impl Body for ScriptBody {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        self.polls += 1;
        Poll::Ready(match (&*self.origin, self.polls) {
            ("body, first poll", 1) | ("body, later poll", 20) => boom(),
            (_, 1) => Some(Ok(Frame::data("one".into()))),
            // So that what has come before is sent.
            (_, 2..20) => {
                cx.waker().wake_by_ref();
                return Poll::Pending;
            }
            (_, 20) => Some(Ok(Frame::data("two".into()))),
            _ => None,
        })
    }

    fn size_hint(&self) -> SizeHint {
        if self.origin == "size_hint" {
            boom();
        }
        SizeHint::new()
    }

    fn is_end_stream(&self) -> bool {
        if self.origin == "is_end_stream" {
            boom();
        }
        false
    }
}

impl Drop for ScriptBody {
    fn drop(&mut self) {
        if self.origin == "drop of the body" {
            boom();
        }
    }
}

/// A gRPC service as tonic's generated code is, with messages of plain bytes.
#[derive(Clone)]
struct Panics;

impl NamedService for Panics {
    const NAME: &'static str = "test.Panics";
}

type Messages = Pin<Box<dyn Stream<Item = Result<Bytes, Status>> + Send>>;

impl Service<Request<tonic::body::Body>> for Panics {
    type Response = Response<tonic::body::Body>;
    type Error = Infallible;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response, Infallible>> + Send>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: Request<tonic::body::Body>) -> Self::Future {
        let method = request.uri().path().trim_start_matches("/test.Panics/").replace('_', " ");
        let (kind, origin) = method.split_once(':').unwrap();
        let (unary, origin) = (kind == "unary", origin.to_owned());
        if origin == "call" {
            boom();
        }
        Box::pin(async move {
            let mut grpc = tonic::server::Grpc::new(Plain);
            let first_poll = origin == "first poll";
            if unary {
                let unary = service_fn(async |request: tonic::Request<Bytes>| {
                    if first_poll {
                        boom();
                    }
                    Ok(tonic::Response::new(request.into_inner()))
                });
                return Ok(grpc.unary(unary, request).await);
            }
            let streaming = service_fn(async |request: tonic::Request<Bytes>| {
                if first_poll {
                    boom();
                }
                let panics_at = match &*origin {
                    "first message" => 0,
                    "after two messages" => 2,
                    _ => u32::MAX,
                };
                let message = request.into_inner();
                let messages = tokio_stream::iter(0..3).then(move |n| {
                    let message = message.clone();
                    async move {
                        // So that what has come before is sent: tonic collects what is ready.
                        tokio::task::yield_now().await;
                        if n == panics_at {
                            boom();
                        }
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

struct Client(tonic::client::Grpc<Channel>);

impl Client {
    /// What a gRPC client sees.
    async fn call(&mut self, method: &str, id: &str) -> String {
        let path = format!("/test.Panics/{}", method.replace('/', ":").replace(' ', "_"));
        let mut request = tonic::Request::new(Bytes::from("foo"));
        request.metadata_mut().insert("x-request-id", id.parse().unwrap());
        soon(self.0.ready()).await.unwrap();
        let path = path.parse().unwrap();
        let (mut count, mut status) = (0, Ok(()));
        if method.starts_with("unary") {
            match soon(self.0.unary(request, path, Plain)).await {
                Ok(response) => {
                    assert_eq!(response.into_inner(), "foo");
                    count = 1;
                }
                Err(error) => status = Err(error),
            }
        } else {
            match soon(self.0.server_streaming(request, path, Plain)).await {
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
            Err(error)
                if error.code() == tonic::Code::Internal && error.message() == "internal error" =>
            {
                format!("{count} {messages}, Internal")
            }
            Err(error) => {
                let message: String = error.message().chars().take(36).collect();
                format!("{count} {messages}, {:?}: {message}", error.code())
            }
        }
    }
}

type Event = BTreeMap<&'static str, String>;

static EVENTS: Mutex<Vec<Event>> = Mutex::new(Vec::new());

/// Lets the whole process log into [`EVENTS`], and say where its panics come from.
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
        install_hook();
    });
}

/// The events of the request with this id.
fn told(id: &str) -> Vec<Event> {
    let events = EVENTS.lock().unwrap();
    let of_this = |event: &&Event| event.get("request_id").is_some_and(|it| it == id);
    events.iter().filter(of_this).cloned().collect()
}

/// There is exactly one event for this request, if it panics, and else none.
async fn told_once(id: &str, panics: bool) {
    // What comes after the last byte has its time.
    soon(async {
        while panics && told(id).is_empty() {
            tokio::task::yield_now().await;
        }
    })
    .await;
    let events = told(id);
    assert_eq!(events.len(), usize::from(panics), "{id}: {events:?}");
    for event in events {
        assert_eq!(event["panic"], "boom, with a secret");
        let at = format!("catch_unwind_hosts.rs:{BOOM}:5");
        assert!(event["location"].ends_with(&at), "{id}: {event:?}");
    }
}
