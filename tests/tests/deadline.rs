//! The request deadline where hyper does not see that a client has left, or where nobody has left
//! and the response goes on for ever: over real sockets.

#![allow(clippy::unwrap_used)]

use std::{
    convert::Infallible,
    future::pending,
    pin::Pin,
    task::{Context, Poll},
    time::Duration,
};

use axum::{
    Router,
    extract::ws::{WebSocket, WebSocketUpgrade},
    response::sse::{Event, Sse},
    routing,
};
use bytes::Bytes;
use http::{Request, Response};
use http_body::{Body, Frame};
use hyper::{body::Incoming, server::conn::http1::Builder};
use tokio::sync::mpsc::UnboundedSender;
use tokio_stream::StreamExt;
use tower::{Layer, service_fn};
use tower_tasks::{
    AtEnd, TaskError, TaskHandle, TaskRegistry, TaskSet, TaskSetLayer,
    task_set::{Cause, assert_drained},
};
use tower_tasks_tests::{Events, Protocol, Raw, Server, events, http1, http2, read_all, soon};

const DEADLINE: Duration = Duration::from_millis(200);

/// What a handler does after it has spawned a task that ends with its set.
#[derive(Clone, Copy)]
enum Then {
    Waits,
    /// Answers with a body that comes to nothing more after the first frame.
    Stalls,
    /// Answers with a body that never ends.
    Floods,
}

struct Site {
    server: Server,
    tasks: TaskRegistry,
    spawned: Events<TaskHandle<()>>,
}

impl Site {
    async fn new(protocol: Protocol, then: Then) -> Self {
        let tasks = TaskRegistry::new().at_end(AtEnd::Cancel);
        let (tell, spawned) = events();
        let service = TaskSetLayer::new(&tasks).deadline(DEADLINE).layer(service_fn(
            move |_: Request<Incoming>| {
                spawn(&tell);
                async move {
                    match then {
                        Then::Waits => pending().await,
                        Then::Stalls => Ok::<_, Infallible>(Response::new(Frames(Some(1)))),
                        Then::Floods => Ok(Response::new(Frames(None))),
                    }
                }
            },
        ));
        Self { server: Server::hyper(protocol, service).await, tasks, spawned }
    }

    /// The client has left, which the server does not see: the deadline ends the set.
    async fn ends_by_its_deadline(mut self) {
        let task = self.spawned.wait().await;
        self.server.has_caught_up().await;
        // Or else it would be `Disconnected`.
        assert_eq!(cause(task).await, Cause::TimedOut);
        self.tasks.cancel_all();
        drop(self.server);
        self.tasks.close();
        soon(self.tasks.wait()).await;
        assert_drained(&self.tasks);
    }
}

fn spawn(tell: &UnboundedSender<TaskHandle<()>>) {
    tell.send(TaskSet::current().unwrap().spawn("task", pending()).unwrap()).unwrap();
}

async fn cause(task: TaskHandle<()>) -> Cause {
    match soon(task).await {
        Err(TaskError::Cancelled(cause)) => cause,
        other => panic!("{other:?}"),
    }
}

/// So many frames and then nothing; `None`: for ever.
struct Frames(Option<u32>);

impl Body for Frames {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        _: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        match &mut self.0 {
            Some(0) => return Poll::Pending,
            Some(left) => *left -= 1,
            None => {}
        }
        Poll::Ready(Some(Ok(Frame::data(Bytes::from_static(&[b'x'; 16_384])))))
    }
}

async fn ask(server: &Server, request: &str) -> Raw {
    let mut client = server.raw().await;
    client.write(request).await;
    client
}

fn half_closed() -> Protocol {
    let mut builder = Builder::new();
    builder.half_close(true);
    Protocol::Http1(builder)
}

const GET: &str = "GET / HTTP/1.1\r\nhost: x\r\n\r\n";

// C16: the blind spots

#[tokio::test]
async fn behind_a_pipelined_request() {
    let site = Site::new(http1(), Then::Waits).await;
    let mut site_client = site.server.raw().await;
    site_client.write([GET, GET].concat()).await;
    site_client.close();
    site.ends_by_its_deadline().await;
}

#[tokio::test]
async fn behind_an_upload_that_was_not_finished() {
    let site = Site::new(http1(), Then::Waits).await;
    let head = "POST / HTTP/1.1\r\nhost: x\r\ncontent-length: 1000000\r\n\r\nsome of it";
    ask(&site.server, head).await.close();
    site.ends_by_its_deadline().await;
}

#[tokio::test]
async fn with_half_close_and_a_handler_that_waits() {
    let site = Site::new(half_closed(), Then::Waits).await;
    ask(&site.server, GET).await.close();
    site.ends_by_its_deadline().await;
}

#[tokio::test]
async fn with_half_close_and_a_body_that_waits() {
    let site = Site::new(half_closed(), Then::Stalls).await;
    let mut client = ask(&site.server, GET).await;
    client.read_head().await;
    client.close_write().await;
    site.ends_by_its_deadline().await;
}

// C30: nobody has left

#[tokio::test]
async fn a_client_that_does_not_read_does_not_keep_the_set_open() {
    for protocol in [http1(), http2()] {
        let is_http1 = matches!(protocol, Protocol::Http1(_));
        let mut site = Site::new(protocol, Then::Floods).await;
        // Kept, and not read.
        let (mut raw, mut h2) = (None, None);
        if is_http1 {
            raw = Some(ask(&site.server, GET).await);
        } else {
            let mut client = site.server.h2().await;
            let response = client.send(Request::get("http://x/").body(()).unwrap()).await;
            h2 = Some((soon(response).await.unwrap(), client));
        }
        let task = site.spawned.wait().await;
        assert_eq!(cause(task).await, Cause::TimedOut);
        assert_drained(&site.tasks);
        // hyper polls the body again when the client reads, and then it ends in an error.
        if let Some(raw) = raw.take() {
            assert!(!raw.rest().await.ends_with("\r\n0\r\n\r\n"), "a cut body looks whole");
        }
        if let Some((response, _client)) = h2.take() {
            let error = read_all(&mut response.into_body()).await.unwrap_err();
            assert_eq!(error.reason(), Some(h2::Reason::INTERNAL_ERROR));
        }
    }
}

#[tokio::test]
async fn an_event_stream_ends_by_the_deadline() {
    let tasks = TaskRegistry::new().at_end(AtEnd::Cancel);
    let (tell, mut spawned) = events();
    let router = Router::new()
        .route(
            "/",
            routing::get(async move || {
                spawn(&tell);
                let every = tokio::time::interval(Duration::from_millis(5));
                let events = tokio_stream::wrappers::IntervalStream::new(every);
                Sse::new(events.map(|_| Ok::<_, Infallible>(Event::default().data("tick"))))
            }),
        )
        .layer(TaskSetLayer::new(&tasks).deadline(DEADLINE));
    let server = Server::host(async |listener| axum::serve(listener, router).await.unwrap()).await;
    let client = ask(&server, GET).await;
    let task = spawned.wait().await;
    let received = client.rest().await;
    assert!(received.contains("data: tick") && !received.ends_with("\r\n0\r\n\r\n"));
    assert_eq!(cause(task).await, Cause::TimedOut);
}

// C18: an upgrade that is held

#[tokio::test]
async fn an_upgraded_socket_does_not_hold_the_set_past_the_deadline() {
    let tasks = TaskRegistry::new().at_end(AtEnd::Cancel);
    let (tell, mut spawned) = events();
    let router = Router::new()
        .route(
            "/",
            routing::get(async move |tasks: TaskSet, upgrade: WebSocketUpgrade| {
                spawn(&tell);
                let hold = tasks.hold();
                upgrade.on_upgrade(async |mut socket: WebSocket| {
                    let _hold = hold;
                    while socket.recv().await.is_some() {}
                })
            }),
        )
        .layer(TaskSetLayer::new(&tasks).deadline(DEADLINE));
    let server = Server::host(async |listener| axum::serve(listener, router).await.unwrap()).await;
    let upgrade = "GET / HTTP/1.1\r\nhost: x\r\nconnection: upgrade\r\nupgrade: websocket\r\n\
        sec-websocket-version: 13\r\nsec-websocket-key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n";
    let mut client = ask(&server, upgrade).await;
    assert!(client.read_head().await.starts_with("HTTP/1.1 101 "));
    let task = spawned.wait().await;
    server.has_caught_up().await;
    // Not held it would be `Completed`, and held without a deadline, nothing.
    assert_eq!(cause(task).await, Cause::TimedOut);
    assert_drained(&tasks);
}
