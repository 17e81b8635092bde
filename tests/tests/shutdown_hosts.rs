//! The shutdown under each host, as its docs say: axum, tonic, hyper-util's `GracefulShutdown`, and
//! by hand. Over real HTTP/1.1 and HTTP/2 connections.

#![allow(clippy::unwrap_used)]

use std::{convert::Infallible, future::pending, io, pin::pin, sync::Arc, time::Duration};

use axum::{
    Router,
    body::Body,
    extract::{Extension, State, ws::WebSocketUpgrade},
    response::{Response, Sse, sse::Event},
    routing::get,
};
use futures_util::{StreamExt, stream};
use http::Request;
use hyper_util::{
    rt::{TokioExecutor, TokioIo, TokioTimer},
    server::{conn::auto, graceful::GracefulShutdown},
    service::TowerToHyperService,
};
use tokio::{
    net::TcpListener,
    sync::{Semaphore, mpsc::UnboundedSender, oneshot},
    task::JoinSet,
};
use tokio_stream::wrappers::TcpListenerStream;
use tower::ServiceExt;
use tower_tasks::{
    Report, Shutdown, ShutdownWatch, TaskRegistry, TaskSet, TaskSetLayer, response_end::hold,
};
use tower_tasks_tests::{Events, Server, events, read_all, soon};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Host {
    Axum,
    Tonic,
    HyperUtil,
    ByHand,
}

const HOSTS: [Host; 4] = [Host::Axum, Host::Tonic, Host::HyperUtil, Host::ByHand];

/// Long enough for whatever comes to its end by itself.
const LONG: Duration = Duration::from_secs(25);
const SHORT: Duration = Duration::from_millis(300);

/// What is served, and what is seen of it.
struct Site {
    server: Server,
    shutdown: Shutdown,
    tasks: TaskRegistry,
    gate: Arc<Semaphore>,
    entered: Events<()>,
    report: oneshot::Receiver<Report>,
}

#[derive(Clone)]
struct App {
    gate: Arc<Semaphore>,
    enters: UnboundedSender<()>,
}

impl Site {
    async fn new(host: Host, shutdown: Shutdown) -> Self {
        let tasks = TaskRegistry::new();
        let shutdown = shutdown.without_signals().tasks(&tasks);
        let (gate, (enters, entered)) = (Arc::new(Semaphore::new(0)), events());
        let layers = (shutdown.layer().in_extensions(), TaskSetLayer::new(&tasks));
        let app = Router::new()
            .route("/wait", get(wait))
            .route("/quick", get(|| async { "quick" }))
            .route("/stuck", get(stuck))
            .route("/endless", get(endless))
            .route("/events", get(send_events))
            .route("/socket", get(socket))
            .with_state(App { gate: gate.clone(), enters })
            .layer(layers);
        let (tell, report) = oneshot::channel();
        let run = shutdown.clone();
        let server = Server::host(async move |listener| {
            let report = match host {
                Host::Axum => axum(listener, app, run).await,
                Host::Tonic => tonic(listener, app, run).await,
                Host::HyperUtil => hyper_util(listener, app, run).await,
                Host::ByHand => by_hand(listener, app, run).await,
            };
            tell.send(report).unwrap();
        })
        .await;
        Self { server, shutdown, tasks, gate, entered, report }
    }
}

// The four recipes

async fn axum(listener: TcpListener, app: Router, shutdown: Shutdown) -> Report {
    let server = axum::serve(listener, app).with_graceful_shutdown(shutdown.signalled());
    shutdown.run(server).await.unwrap()
}

async fn tonic(listener: TcpListener, app: Router, shutdown: Shutdown) -> Report {
    let server = tonic::transport::Server::builder()
        .accept_http1(true)
        .add_routes(app.into())
        .serve_with_incoming_shutdown(TcpListenerStream::new(listener), shutdown.signalled());
    shutdown.run(server).await.unwrap()
}

async fn hyper_util(listener: TcpListener, app: Router, shutdown: Shutdown) -> Report {
    let signalled = shutdown.signalled();
    let server = async {
        let mut signalled = pin!(signalled);
        let mut builder = auto::Builder::new(TokioExecutor::new());
        // Else it waits for half a head for ever.
        builder.http1().timer(TokioTimer::new());
        let connections = GracefulShutdown::new();
        loop {
            let (stream, _) = tokio::select! {
                accepted = listener.accept() => accepted?,
                () = &mut signalled => break,
            };
            let service = TowerToHyperService::new(app.clone());
            let connection = builder.serve_connection_with_upgrades(TokioIo::new(stream), service);
            tokio::spawn(connections.watch(connection.into_owned()));
        }
        drop(listener);
        connections.shutdown().await;
        Ok::<_, io::Error>(())
    };
    shutdown.run(server).await.unwrap()
}

/// Connections are told to end by the layer alone: by `Connection: close`. Those of HTTP/2 are
/// dropped when all is done.
async fn by_hand(listener: TcpListener, app: Router, shutdown: Shutdown) -> Report {
    let mut signalled = pin!(shutdown.signalled());
    let mut builder = auto::Builder::new(TokioExecutor::new());
    builder.http1().timer(TokioTimer::new());
    let mut connections = JoinSet::new();
    loop {
        let (stream, _) = tokio::select! {
            accepted = listener.accept() => accepted.unwrap(),
            () = &mut signalled => break,
        };
        let service = TowerToHyperService::new(app.clone());
        let connection = builder.serve_connection_with_upgrades(TokioIo::new(stream), service);
        connections.spawn(connection.into_owned());
    }
    drop(listener);
    let report = shutdown.finish().await;
    // What was handed to a connection is still to be written; one that is idle does not end.
    let written = async { while connections.join_next().await.is_some() {} };
    let _ = tokio::time::timeout(Duration::from_millis(100), written).await;
    report
}

// The handlers

/// Answers when the gate is opened once, and leaves a task that waits for it once more.
async fn wait(tasks: TaskSet, State(app): State<App>) -> &'static str {
    let gate = app.gate.clone();
    tasks.spawn("left_behind", async move { gate.acquire().await.unwrap().forget() }).unwrap();
    app.enters.send(()).unwrap();
    app.gate.acquire().await.unwrap().forget();
    "waited"
}

async fn stuck(State(app): State<App>) {
    app.enters.send(()).unwrap();
    pending::<()>().await;
}

async fn endless() -> Body {
    let first = stream::iter([Ok::<_, Infallible>("first")]);
    Body::from_stream(first.chain(stream::pending()))
}

async fn send_events(
    Extension(shutdown): Extension<ShutdownWatch>,
) -> Sse<impl futures_util::Stream<Item = Result<Event, Infallible>>> {
    let first = stream::iter([Ok(Event::default().data("first"))]);
    Sse::new(first.chain(stream::pending()).take_until(shutdown.draining()))
}

async fn socket(
    upgrade: WebSocketUpgrade,
    Extension(shutdown): Extension<ShutdownWatch>,
) -> Response {
    let held = hold();
    upgrade.on_upgrade(async move |mut socket| {
        let _held = held;
        tokio::select! {
            _ = socket.recv() => {}
            () = shutdown.draining() => drop(socket.send("bye".into()).await),
        }
    })
}

fn http1(path: &str) -> String {
    format!("GET {path} HTTP/1.1\r\nhost: localhost\r\n\r\n")
}

fn http2(path: &str) -> Request<()> {
    Request::get(format!("http://localhost{path}")).body(()).unwrap()
}

const UPGRADE: &str = "GET /socket HTTP/1.1\r\nhost: localhost\r\nconnection: upgrade\r\n\
    upgrade: websocket\r\nsec-websocket-version: 13\r\n\
    sec-websocket-key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n";

#[tokio::test]
async fn what_is_in_flight_is_answered_and_its_tasks_are_done() {
    for host in HOSTS {
        let mut site = Site::new(host, Shutdown::new(LONG)).await;
        let (mut one, mut two) = (site.server.raw().await, site.server.h2().await);
        one.write(http1("/wait")).await;
        let answer = two.send(http2("/wait")).await;
        site.entered.wait().await;
        site.entered.wait().await;
        site.shutdown.begin();
        site.shutdown.watch().draining().await;
        site.gate.add_permits(4);

        let head = one.read_head().await;
        assert!(head.starts_with("HTTP/1.1 200"), "{host:?}: {head}");
        assert!(head.contains("connection: close"), "{host:?}: {head}");
        assert_eq!(one.rest().await, "waited");
        let mut answer = soon(answer).await.unwrap();
        assert_eq!(answer.status(), 200);
        assert_eq!(read_all(answer.body_mut()).await.unwrap().0, "waited");

        let report = soon(site.report).await.unwrap();
        assert_eq!((report.exit_code(), report.server_ended), (0, true), "{host:?}: {report}");
        assert_eq!((report.requests.at_begin, report.requests.completed), (2, 2), "{host:?}");
        assert_eq!((report.drained.at_begin, report.drained.completed), (2, 2), "{host:?}");
        assert!(report.took < LONG, "{host:?}: {report}");
        tower_tasks::assert_drained(&site.tasks);
    }
}

#[tokio::test]
async fn an_idle_connection_holds_nothing_up() {
    for host in HOSTS {
        let site = Site::new(host, Shutdown::new(LONG)).await;
        let (mut one, mut two) = (site.server.raw().await, site.server.h2().await);
        one.write(http1("/quick")).await;
        one.read_until("quick").await;
        let mut answer = soon(two.send(http2("/quick")).await).await.unwrap();
        read_all(answer.body_mut()).await.unwrap();
        site.shutdown.begin();
        let report = soon(site.report).await.unwrap();
        assert!(report.took < LONG && report.exit_code() == 0, "{host:?}: {report}");
        assert_eq!(one.rest().await, "", "{host:?}: it is closed");
    }
}

#[tokio::test]
async fn what_watches_the_shutdown_ends_itself() {
    for host in HOSTS {
        let site = Site::new(host, Shutdown::new(LONG)).await;
        let mut feed = site.server.raw().await;
        feed.write(http1("/events")).await;
        feed.read_until("first").await;
        // tonic serves no upgraded connection.
        let mut sockets = Vec::new();
        if host != Host::Tonic {
            let mut socket = site.server.raw().await;
            socket.write(UPGRADE).await;
            assert!(socket.read_head().await.starts_with("HTTP/1.1 101"), "{host:?}");
            sockets.push(socket);
        }
        site.shutdown.begin();
        // The last chunk: nothing is cut off.
        assert!(feed.rest().await.ends_with("\r\n0\r\n\r\n"), "{host:?}");
        let ended = 1 + u64::try_from(sockets.len()).unwrap();
        for mut socket in sockets {
            socket.read_until("bye").await;
        }
        let report = soon(site.report).await.unwrap();
        let found = (report.exit_code(), report.requests.completed);
        assert_eq!(found, (0, ended), "{host:?}: {report}");
        assert!(report.took < LONG, "{host:?}: {report}");
    }
}

#[tokio::test]
async fn what_does_not_end_is_ended_at_the_deadline_whatever_its_connection_does() {
    for host in HOSTS {
        let mut site = Site::new(host, Shutdown::new(SHORT)).await;
        let mut handshake = site.server.raw().await;
        handshake.write("PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n").await;
        let _silent = site.server.raw().await;
        let mut half = site.server.raw().await;
        half.write("GET /quick HTTP/1.1\r\nho").await;
        let (mut one, mut two) = (site.server.raw().await, site.server.h2().await);
        one.write(http1("/stuck")).await;
        let answer = two.send(http2("/stuck")).await;
        site.entered.wait().await;
        site.entered.wait().await;
        let mut feed = site.server.raw().await;
        feed.write(http1("/endless")).await;
        feed.read_until("first\r\n").await;
        let mut stream = soon(two.send(http2("/endless")).await).await.unwrap();
        assert_eq!(soon(stream.body_mut().data()).await.unwrap().unwrap(), "first");

        site.shutdown.begin();
        assert!(one.read_head().await.starts_with("HTTP/1.1 503"), "{host:?}");
        assert_eq!(soon(answer).await.unwrap().status(), 503, "{host:?}");
        assert_eq!(feed.rest().await, "", "{host:?}: without a last chunk");
        assert!(read_all(stream.body_mut()).await.is_err(), "{host:?}: it is reset");
        let report = soon(site.report).await.unwrap();
        let over = report.took.saturating_sub(SHORT);
        // A machine that runs all tests at once is slow; release builds are for one that has time.
        let slack = if cfg!(debug_assertions) { 5 } else { 1 };
        assert!(over < Duration::from_millis(250) * slack, "{host:?}: {report}");
        assert_eq!(report.requests.ended, 4, "{host:?}: {report}");
        assert_eq!((report.forced().len(), report.exit_code()), (4, 1), "{host:?}: {report}");
    }
}

#[tokio::test]
async fn a_new_stream_after_the_goaway_is_refused_and_the_old_one_comes_to_its_end() {
    for host in [Host::Axum, Host::Tonic, Host::HyperUtil] {
        let mut site = Site::new(host, Shutdown::new(LONG)).await;
        let mut two = site.server.h2().await;
        let answer = two.send(http2("/wait")).await;
        site.entered.wait().await;
        site.shutdown.begin();
        // Served until the GOAWAY is here, and then refused by the client's own half.
        let mut served = 0;
        loop {
            let Ok(answer) = two.try_send(http2("/quick")).await else { break };
            let Ok(answer) = soon(answer).await else { break };
            assert_eq!(answer.status(), 200, "{host:?}");
            served += 1;
        }
        site.gate.add_permits(2);
        assert_eq!(soon(answer).await.unwrap().status(), 200, "{host:?}");
        let report = soon(site.report).await.unwrap();
        assert_eq!((report.requests.later, report.exit_code()), (served, 0), "{host:?}: {report}");
        assert!(report.took < LONG, "{host:?}: {report}");
    }
}

#[tokio::test]
async fn on_connections_that_are_open_late_requests_are_served_or_refused_as_chosen() {
    for refuse in [false, true] {
        let mut shutdown = Shutdown::new(LONG);
        if refuse {
            shutdown = shutdown.refuse_late();
        }
        // Its connections are told nothing, so what comes later than the signal gets here.
        let mut site = Site::new(Host::HyperUtil, shutdown).await;
        let (mut one, mut two) = (site.server.raw().await, site.server.h2().await);
        let answer = two.send(http2("/wait")).await;
        site.entered.wait().await;
        // Its head has begun when the signal comes.
        one.write("GET /quick HTTP/1.1\r\n").await;
        site.server.has_caught_up().await;
        site.shutdown.begin();
        site.shutdown.watch().draining().await;
        one.write("host: localhost\r\n\r\n").await;
        let all = one.rest().await;
        let expected = if refuse { "HTTP/1.1 503" } else { "HTTP/1.1 200" };
        assert!(all.starts_with(expected), "{all}");
        assert!(all.contains("connection: close"), "{all}");
        site.gate.add_permits(2);
        assert_eq!(soon(answer).await.unwrap().status(), 200);
        let report = soon(site.report).await.unwrap();
        let found = (report.requests.later, report.requests.refused);
        assert_eq!(found, if refuse { (0, 1) } else { (1, 0) }, "{report}");
    }
}

/// Without a host: what the type map holds is a clone that sees the same.
#[tokio::test]
async fn a_ready_route_is_503_from_the_first_signal_on() {
    let shutdown = Shutdown::new(LONG).settle(LONG / 2).without_signals();
    let ready = |Extension(shutdown): Extension<ShutdownWatch>| async move {
        if shutdown.is_ready() {
            http::StatusCode::OK
        } else {
            http::StatusCode::SERVICE_UNAVAILABLE
        }
    };
    let app = Router::new().route("/ready", get(ready)).layer(shutdown.layer().in_extensions());
    let status = async |app: Router| {
        app.oneshot(Request::get("/ready").body(Body::empty()).unwrap()).await.unwrap().status()
    };
    assert_eq!(status(app.clone()).await, 200);
    shutdown.begin();
    assert_eq!(status(app).await, 503);
}
