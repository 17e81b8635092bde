//! When × what, over real connections: what becomes of a task of each lifetime, whatever ends its
//! response, and that a task which goes on holds back neither the response nor the connection.

#![allow(clippy::unwrap_used)]

use std::{
    convert::Infallible,
    fmt,
    future::pending,
    io,
    pin::Pin,
    task::{Context, Poll},
    time::Duration,
};

use axum::{Router, extract::Path, routing};
use bytes::Bytes;
use http::{Method, Request, Response};
use http_body::{Body, Frame};
use http_body_util::Full;
use hyper::body::Incoming;
use tokio::sync::{
    mpsc::{UnboundedReceiver, unbounded_channel},
    oneshot,
};
use tower::{ServiceBuilder, service_fn};
use tower_tasks::{
    AtEnd, End, ResponseEndLayer, TaskError, TaskHandle, TaskRegistry, TaskSet, TaskSetLayer,
    task_set::{Cause, TaskState, assert_drained},
};
use tower_tasks_tests::{Events, H2, Protocol, Raw, Server, auto, events, http1, http2, read_all, soon};

// The table

/// What ends the response.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum When {
    Completed,
    ClientGoneBeforeTheHead,
    ClientGoneInTheBody,
    ServiceFailed,
    BodyFailed,
    HandlerPanicked,
    BodyPanicked,
}

impl When {
    const ALL: [Self; 7] = [
        Self::Completed,
        Self::ClientGoneBeforeTheHead,
        Self::ClientGoneInTheBody,
        Self::ServiceFailed,
        Self::BodyFailed,
        Self::HandlerPanicked,
        Self::BodyPanicked,
    ];

    const fn end(self) -> End {
        match self {
            Self::Completed => End::Completed,
            Self::ClientGoneBeforeTheHead | Self::ClientGoneInTheBody => End::Disconnected,
            Self::ServiceFailed | Self::BodyFailed => End::Failed,
            Self::HandlerPanicked | Self::BodyPanicked => End::Panicked,
        }
    }
}

/// What becomes of the task.
const WHAT: [AtEnd; 3] = [AtEnd::Cancel, AtEnd::Drain(Duration::from_secs(3_600)), AtEnd::Keep];

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Version {
    Http1,
    Http2,
}

#[derive(Clone, Copy)]
struct Cell {
    version: Version,
    when: When,
    what: AtEnd,
}

impl fmt::Display for Cell {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}: {:?} × {}", self.version, self.when, self.what)
    }
}

#[tokio::test]
async fn a_task_ends_as_its_lifetime_says_whatever_ends_the_response() {
    let mut failed = Vec::new();
    for version in [Version::Http1, Version::Http2] {
        for when in When::ALL {
            for what in WHAT {
                let cell = Cell { version, when, what };
                // Its panic is told by the panic hook; here, which cells are wrong.
                if tokio::spawn(check(cell)).await.is_err() {
                    failed.push(cell.to_string());
                }
            }
        }
    }
    assert!(failed.is_empty(), "{failed:#?}");
}

async fn check(Cell { version, when, what }: Cell) {
    let mut site = Site::new(version, when, what).await;
    let mut client = Client::new(&site.server, version).await;
    client.send().await;
    let Spawned { task, open } = site.spawned.wait().await;
    match when {
        When::Completed => assert_eq!(client.response().await.unwrap(), "hello, world"),
        When::ClientGoneBeforeTheHead => client.leave().await,
        When::ClientGoneInTheBody => {
            client.read("hello").await;
            client.leave().await;
        }
        _ => drop(client.response().await.unwrap_err()),
    }
    assert_eq!(site.ended.wait().await, when.end());
    match what {
        AtEnd::Cancel => {
            let error = soon(task).await.unwrap_err();
            assert!(matches!(error, TaskError::Cancelled(cause) if cause == when.end().into()));
        }
        AtEnd::Drain(_) | AtEnd::Keep => {
            let state =
                if what == AtEnd::Keep { TaskState::Kept } else { TaskState::Draining };
            let live = site.tasks.snapshot().live_tasks;
            assert_eq!((live.len(), live[0].state, live[0].at_end), (1, state, what));
            assert!(!task.is_finished());
            open.send(()).unwrap();
            assert_eq!(soon(task).await.unwrap(), "done");
        }
    }
    assert!(site.is_dropped.wait().await);
    assert_drained(&site.tasks);
    let totals = site.tasks.snapshot().totals;
    let cancelled = u64::from(what == AtEnd::Cancel);
    assert!(totals.is_exact());
    assert_eq!((totals.cancelled, totals.completed), (cancelled, 1 - cancelled));
}

/// A task that was spawned, and waits at a gate.
struct Spawned {
    task: TaskHandle<&'static str>,
    open: oneshot::Sender<()>,
}

/// A server whose handler spawns one task, and answers as `When` says.
struct Site {
    server: Server,
    tasks: TaskRegistry,
    spawned: Events<Spawned>,
    ended: Events<End>,
    is_dropped: Events<bool>,
}

impl Site {
    async fn new(version: Version, when: When, what: AtEnd) -> Self {
        let tasks = TaskRegistry::new();
        let (tell_spawned, spawned) = events();
        let (tell_ended, ended) = events();
        let (tell_dropped, is_dropped) = events();
        let service = ServiceBuilder::new()
            // Outside, so that the set has had its end when this one tells.
            .layer(ResponseEndLayer::new(move |_: &Request<Incoming>| {
                let tell = tell_ended.clone();
                move |end| drop(tell.send(end))
            }))
            .layer(TaskSetLayer::new(&tasks).at_end(what))
            .service(service_fn(move |_: Request<Incoming>| {
                let (open, gate) = oneshot::channel();
                let on_drop = TellDrop(tell_dropped.clone());
                let task = TaskSet::current().unwrap().spawn("task", async {
                    let _on_drop = on_drop;
                    gate.await.unwrap();
                    "done"
                });
                tell_spawned.send(Spawned { task: task.unwrap(), open }).unwrap();
                answer(when)
            }));
        let server = Server::hyper(version.protocol(), service).await;
        Self { server, tasks, spawned, ended, is_dropped }
    }
}

struct TellDrop(tokio::sync::mpsc::UnboundedSender<bool>);

impl Drop for TellDrop {
    fn drop(&mut self) {
        let _ = self.0.send(true);
    }
}

async fn answer(when: When) -> Result<Response<Frames>, io::Error> {
    let frames = match when {
        When::Completed => vec![Ok("hello, "), Ok("world")],
        When::BodyFailed => vec![Ok("hello, "), Err("fail")],
        When::BodyPanicked => vec![Ok("hello, "), Err("panic")],
        When::ClientGoneInTheBody => vec![Ok("hello"), Err("wait")],
        When::ClientGoneBeforeTheHead => pending().await,
        When::ServiceFailed => return Err(io::Error::other("the service fails")),
        When::HandlerPanicked => panic!("the handler panics"),
    };
    Ok(Response::new(Frames(frames)))
}

/// A body of these frames, or of what else happens.
struct Frames(Vec<Result<&'static str, &'static str>>);

impl Body for Frames {
    type Data = Bytes;
    type Error = io::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        _: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, io::Error>>> {
        match self.0.first() {
            None => Poll::Ready(None),
            Some(Err("wait")) => Poll::Pending,
            Some(Err("fail")) => Poll::Ready(Some(Err(io::Error::other("the body fails")))),
            Some(Err(_)) => panic!("the body panics"),
            Some(Ok(data)) => {
                let frame = Frame::data(Bytes::from_static(data.as_bytes()));
                self.0.remove(0);
                Poll::Ready(Some(Ok(frame)))
            }
        }
    }
}

impl Version {
    fn protocol(self) -> Protocol {
        match self {
            Self::Http1 => http1(),
            Self::Http2 => http2(),
        }
    }
}

/// A client of one request.
enum Client {
    Http1(Raw),
    Http2(H2, Option<h2::client::ResponseFuture>, Option<h2::RecvStream>),
}

impl Client {
    async fn new(server: &Server, version: Version) -> Self {
        match version {
            Version::Http1 => Self::Http1(server.raw().await),
            Version::Http2 => Self::Http2(server.h2().await, None, None),
        }
    }

    async fn send(&mut self) {
        match self {
            Self::Http1(client) => client.write("GET / HTTP/1.1\r\nhost: a\r\n\r\n").await,
            Self::Http2(client, response, _) => *response = Some(client.send(get("/")).await),
        }
    }

    /// Reads the head, and this much of the body.
    async fn read(&mut self, data: &str) {
        match self {
            Self::Http1(client) => {
                client.read_head().await;
                client.read_until(data).await;
            }
            Self::Http2(_, response, rest) => {
                let mut body = soon(response.take().unwrap()).await.unwrap().into_body();
                assert_eq!(soon(body.data()).await.unwrap().unwrap(), data);
                *rest = Some(body);
            }
        }
    }

    /// The whole body; or an error, if the response is cut or never comes.
    async fn response(self) -> Result<String, String> {
        match self {
            Self::Http1(mut client) => {
                // Without a head, the connection was closed.
                let (_, body) = client.until_closed_or("\r\n0\r\n\r\n").await?;
                Ok(unchunked(&body))
            }
            Self::Http2(_client, response, _) => {
                let response = soon(response.unwrap()).await.map_err(|error| error.to_string())?;
                let read = read_all(&mut response.into_body()).await;
                let (data, _) = read.map_err(|error| error.to_string())?;
                Ok(String::from_utf8(data.into()).unwrap())
            }
        }
    }

    /// Closes the connection; over HTTP/2, resets the stream alone.
    async fn leave(self) {
        match self {
            Self::Http1(client) => client.close(),
            Self::Http2(client, response, body) => {
                drop((response, body));
                // The frame is sent before the connection is closed.
                soon(async {
                    let mut client = client;
                    drop(client.send(get("/stays")).await);
                    client.close().await;
                })
                .await;
            }
        }
    }
}
