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
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use tokio::sync::{mpsc::UnboundedSender, oneshot};
use tower::{ServiceBuilder, service_fn};
use tower_tasks::{
    AtEnd, End, ResponseEndLayer, TaskError, TaskHandle, TaskRegistry, TaskSet, TaskSetLayer,
    task_set::{Cause, TaskState, assert_drained},
};
use tower_tasks_tests::{
    Events, H2, Protocol, Raw, Server, auto, events, http1, http2, read_all, soon,
};

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
        When::ClientGoneBeforeTheHead => client.leave(),
        When::ClientGoneInTheBody => {
            client.read("hello").await;
            client.leave();
        }
        _ => assert_eq!(client.is_answered().await, when == When::Completed),
    }
    assert_eq!(site.ended.wait().await, when.end());
    match what {
        AtEnd::Cancel => {
            let error = soon(task).await.unwrap_err();
            assert!(matches!(error, TaskError::Cancelled(cause) if cause == when.end().into()));
        }
        _ => {
            let state = if what == AtEnd::Keep { TaskState::Kept } else { TaskState::Draining };
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
                move |end| tell.send(end).unwrap()
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

struct TellDrop(UnboundedSender<bool>);

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
                self.0.drain(..1);
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
struct Client {
    raw: Option<Raw>,
    h2: Option<H2>,
    response: Option<h2::client::ResponseFuture>,
    body: Option<h2::RecvStream>,
}

impl Client {
    async fn new(server: &Server, version: Version) -> Self {
        let (raw, h2) = match version {
            Version::Http1 => (Some(server.raw().await), None),
            Version::Http2 => (None, Some(server.h2().await)),
        };
        Self { raw, h2, response: None, body: None }
    }

    async fn send(&mut self) {
        if let Some(raw) = &mut self.raw {
            raw.write("GET / HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n").await;
        }
        if let Some(h2) = &mut self.h2 {
            self.response = Some(h2.send(get("/")).await);
        }
    }

    /// Reads the head and the first frame.
    async fn read(&mut self, data: &str) {
        if let Some(raw) = &mut self.raw {
            raw.read_head().await;
            raw.read_until(data).await;
        }
        if let Some(response) = self.response.take() {
            let mut body = soon(response).await.unwrap().into_body();
            assert_eq!(soon(body.data()).await.unwrap().unwrap(), data);
            self.body = Some(body);
        }
    }

    /// Reads all there is: whether it is complete.
    async fn is_answered(&mut self) -> bool {
        if let Some(raw) = self.raw.take() {
            return raw.rest().await.ends_with("\r\n7\r\nhello, \r\n5\r\nworld\r\n0\r\n\r\n");
        }
        match soon(self.response.take().unwrap()).await {
            Ok(response) => match read_all(&mut response.into_body()).await {
                Ok((data, _)) => data == "hello, world",
                Err(_) => false,
            },
            Err(_) => false,
        }
    }

    /// Closes the connection; over HTTP/2, resets the stream alone.
    fn leave(&mut self) {
        self.raw = None;
        self.response = None;
        self.body = None;
    }
}

fn get(path: &str) -> Request<()> {
    Request::builder().method(Method::GET).uri(format!("http://a{path}")).body(()).unwrap()
}

// What a task that goes on does not hold back

/// An axum application: `/spawn` spawns a task that waits at a gate, `/state` tells of all tasks.
fn app(tasks: &TaskRegistry) -> (Router, Events<Spawned>) {
    let (tell, spawned) = events();
    let state = tasks.clone();
    let app = Router::new()
        .route(
            "/spawn/{n}",
            routing::get(async move |tasks: TaskSet, Path(n): Path<u32>| {
                let (open, gate) = oneshot::channel();
                let task = tasks.spawn("task", async {
                    gate.await.unwrap();
                    "done"
                });
                tell.send(Spawned { task: task.unwrap(), open }).unwrap();
                format!("spawned {n}")
            }),
        )
        .route(
            "/state",
            routing::get(async move || {
                let live = state.snapshot().live_tasks;
                live.iter().map(|task| task.state.to_string()).collect::<Vec<_>>().join(" ")
            }),
        )
        .layer(TaskSetLayer::new(tasks));
    (app, spawned)
}

/// The same application under hyper and under `axum::serve`.
async fn hosts(tasks: &TaskRegistry) -> [(Server, Events<Spawned>); 2] {
    let (app_of_hyper, spawned_by_hyper) = app(tasks);
    let (app_of_axum, spawned_by_axum) = app(tasks);
    let axum = Server::host(async move |listener| {
        axum::serve(listener, app_of_axum).await.unwrap();
    });
    let hyper = Server::hyper(auto(), app_of_hyper);
    [(hyper.await, spawned_by_hyper), (axum.await, spawned_by_axum)]
}

#[tokio::test]
async fn on_a_kept_alive_connection_the_next_request_is_answered_while_tasks_drain() {
    let tasks = TaskRegistry::new();
    for (server, mut spawned) in hosts(&tasks).await {
        let mut client = server.raw().await;
        let mut held = Vec::new();
        for n in 0..3 {
            client.write(format!("GET /spawn/{n} HTTP/1.1\r\nhost: a\r\n\r\n")).await;
            let head = client.read_head().await;
            assert!(head.starts_with("HTTP/1.1 200 ") && head.contains("content-length: 9"));
            assert_eq!(client.read_exactly(9).await, format!("spawned {n}"));
            held.push(spawned.wait().await);
        }
        client.write("GET /state HTTP/1.1\r\nhost: a\r\n\r\n").await;
        client.read_head().await;
        assert_eq!(client.read_exactly(26).await, "draining draining draining");
        finish(held, &tasks).await;
    }
}

#[tokio::test]
async fn over_http2_the_next_request_is_answered_while_tasks_drain() {
    let tasks = TaskRegistry::new();
    for (server, mut spawned) in hosts(&tasks).await {
        let mut client = server.h2().await;
        let mut held = Vec::new();
        for n in 0..3 {
            let response = soon(client.send(get(&format!("/spawn/{n}"))).await).await.unwrap();
            let (data, trailers) = read_all(&mut response.into_body()).await.unwrap();
            assert_eq!((data, trailers), (format!("spawned {n}").into(), None));
            held.push(spawned.wait().await);
        }
        let response = soon(client.send(get("/state")).await).await.unwrap();
        let (data, _) = read_all(&mut response.into_body()).await.unwrap();
        assert_eq!(data, "draining draining draining");
        finish(held, &tasks).await;
    }
}

/// The tasks have waited all the time, and now they are completed.
async fn finish(held: Vec<Spawned>, tasks: &TaskRegistry) {
    for Spawned { task, open } in held {
        assert!(!task.is_finished());
        open.send(()).unwrap();
        assert_eq!(soon(task).await.unwrap(), "done");
    }
    assert_drained(tasks);
}

#[tokio::test]
async fn the_last_frame_reaches_the_client_while_a_task_still_runs() {
    // The body is whole before the gate is opened, whichever sign tells the end of it.
    let tasks = TaskRegistry::new();
    let (tell, mut spawned) = events();
    let service = ServiceBuilder::new().layer(TaskSetLayer::new(&tasks)).service(service_fn(
        move |request: Request<Incoming>| {
            let (open, gate) = oneshot::channel();
            let task = TaskSet::current().unwrap().spawn("task", async {
                gate.await.unwrap();
                "done"
            });
            tell.send(Spawned { task: task.unwrap(), open }).unwrap();
            let frames = vec![Ok("hello, "), Ok("world")];
            let body = match request.uri().path() {
                // Told by `is_end_stream`, after the frame.
                "/known" => Full::new(Bytes::from_static(b"hello, world"))
                    .map_err(|never| match never {})
                    .boxed_unsync(),
                // Told by `None`.
                _ => Frames(frames).boxed_unsync(),
            };
            async { Ok::<_, Infallible>(Response::new(body)) }
        },
    ));
    let server = Server::hyper(auto(), service).await;
    for path in ["/known", "/stream"] {
        let mut raw = server.raw().await;
        raw.write(format!("GET {path} HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n")).await;
        let response = raw.rest().await;
        assert!(response.ends_with("hello, world") || response.ends_with("0\r\n\r\n"));
        finish(vec![spawned.wait().await], &tasks).await;

        let mut client = server.h2().await;
        let response = soon(client.send(get(path)).await).await.unwrap();
        let (data, _) = read_all(&mut response.into_body()).await.unwrap();
        assert_eq!(data, "hello, world");
        finish(vec![spawned.wait().await], &tasks).await;
    }
}

#[tokio::test]
async fn a_frame_passes_in_the_poll_in_which_the_inner_body_gave_it() {
    /// Tells of each poll whether it gave something, and hyper's side and the handler's of it.
    struct Tells<B>(&'static str, Pin<Box<B>>, UnboundedSender<String>);

    impl<B: Body> Body for Tells<B> {
        type Data = B::Data;
        type Error = B::Error;

        fn poll_frame(
            mut self: Pin<&mut Self>,
            cx: &mut Context<'_>,
        ) -> Poll<Option<Result<Frame<B::Data>, B::Error>>> {
            let frame = self.1.as_mut().poll_frame(cx);
            let gave = match &frame {
                Poll::Pending => "pending",
                Poll::Ready(None) => "none",
                Poll::Ready(Some(_)) => "frame",
            };
            self.2.send(format!("{} {gave}", self.0)).unwrap();
            frame
        }

        fn is_end_stream(&self) -> bool {
            self.1.is_end_stream()
        }

        fn size_hint(&self) -> http_body::SizeHint {
            self.1.size_hint()
        }
    }

    for version in [Version::Http1, Version::Http2] {
        let tasks = TaskRegistry::new();
        let (tell, mut polls) = events();
        let (outside, inside) = (tell.clone(), tell);
        let service = ServiceBuilder::new()
            .map_response(move |response: Response<_>| {
                response.map(|body| Tells("outside", Box::pin(body), outside.clone()))
            })
            .layer(TaskSetLayer::new(&tasks))
            .service(service_fn(move |_: Request<Incoming>| {
                TaskSet::current().unwrap().spawn("task", pending::<()>()).unwrap();
                let frames = Frames(vec![Ok("hello, "), Ok("world")]);
                let body = Tells("inside", Box::pin(frames), inside.clone());
                async { Ok::<_, Infallible>(Response::new(body)) }
            }));
        let server = Server::hyper(version.protocol(), service).await;
        let mut client = Client::new(&server, version).await;
        client.send().await;
        assert!(client.is_answered().await);
        let seen = polls.so_far();
        assert_eq!(
            seen,
            [
                "inside frame",
                "outside frame",
                "inside frame",
                "outside frame",
                "inside none",
                "outside none"
            ],
        );
        assert_eq!(tasks.snapshot().live_tasks[0].state, TaskState::Draining);
    }
}

// What an application sees of a task that ended with its request

#[tokio::test]
async fn under_axum_a_client_that_leaves_cancels_what_was_to_be_cancelled() {
    let tasks = TaskRegistry::new();
    let (tell, mut spawned) = events();
    let app = Router::new()
        .route(
            "/",
            routing::get(async move |tasks: TaskSet| {
                let cancelled = tasks.task("cancelled").on(End::Disconnected, AtEnd::Cancel);
                tell.send(cancelled.spawn(pending::<()>()).unwrap()).unwrap();
                tell.send(tasks.spawn("drains", pending()).unwrap()).unwrap();
                pending::<()>().await;
            }),
        )
        .layer(TaskSetLayer::new(&tasks));
    let server =
        Server::host(async move |listener| axum::serve(listener, app).await.unwrap()).await;
    for leave in [Raw::close, Raw::reset] {
        let mut client = server.raw().await;
        client.write("GET / HTTP/1.1\r\nhost: a\r\n\r\n").await;
        let cancelled: TaskHandle<()> = spawned.wait().await;
        let drains = spawned.wait().await;
        leave(client);
        let error = soon(cancelled).await.unwrap_err();
        assert!(matches!(error, TaskError::Cancelled(Cause::Disconnected)), "{error}");
        assert_eq!(tasks.snapshot().live_tasks[0].state, TaskState::Draining);
        drains.cancel();
        soon(drains).await.unwrap_err();
    }
}
