//! Streams of many frames, and many streams, over real connections: what their tasks become.

#![allow(clippy::unwrap_used)]

use std::{convert::Infallible, future::pending, io, iter};

use bytes::Bytes;
use futures_util::{StreamExt, stream};
use http::{HeaderMap, Request, Response, Version, header};
use http_body::{Body, Frame};
use http_body_util::{BodyExt, Full, StreamBody};
use hyper::body::Incoming;
use tower::{Service, ServiceBuilder, service_fn};
use tower_tasks::{
    AtEnd, End, ResponseEndLayer, TaskError, TaskHandle, TaskRegistry, TaskSet, TaskSetLayer,
    assert_drained, task_set::Cause,
};
use tower_tasks_tests::{Events, Protocol, Server, events, http1, http2, soon};

/// A server whose handlers spawn a task that dies with its response.
struct Site {
    server: Server,
    tasks: TaskRegistry,
    spawned: Events<TaskHandle<()>>,
    ended: Events<End>,
}

impl Site {
    async fn new<S, B>(protocol: Protocol, handler: S) -> Self
    where
        S: Service<Request<Incoming>, Response = Response<B>, Error = Infallible>,
        S: Clone + Send + 'static,
        S::Future: Send,
        B: Body<Data = Bytes, Error = io::Error> + Send + 'static,
    {
        let tasks = TaskRegistry::new().at_end(AtEnd::Cancel);
        let ((tell_spawned, spawned), (tell_ended, ended)) = (events(), events());
        let service = ServiceBuilder::new()
            .layer(ResponseEndLayer::new(move |_: &Request<Incoming>| {
                let tell = tell_ended.clone();
                move |end| tell.send(end).unwrap()
            }))
            .layer(TaskSetLayer::new(&tasks))
            .map_request(move |request: Request<Incoming>| {
                let task = TaskSet::current().unwrap().spawn("task", pending());
                tell_spawned.send(task.unwrap()).unwrap();
                request
            })
            .service(handler);
        Self { server: Server::hyper(protocol, service).await, tasks, spawned, ended }
    }

    /// The next response has this end, and its task.
    async fn has_ended(&mut self, end: End) {
        assert_eq!(self.ended.wait().await, end);
        let error = soon(self.spawned.wait().await).await.unwrap_err();
        assert!(matches!(error, TaskError::Cancelled(cause) if cause == Cause::from(end)));
    }

    fn nothing_has_ended(&mut self) {
        assert_eq!(self.ended.so_far(), []);
        let live = self.tasks.snapshot().totals.live;
        assert_eq!(usize::try_from(live), Ok(self.tasks.len()));
        assert_ne!(live, 0);
    }
}

/// A debug build takes its time for each frame.
const FRAMES: usize = if cfg!(debug_assertions) { 100_000 } else { 1_000_000 };

/// Frames of one byte, the first after three that are empty, each other after so many.
fn drizzle(empty: usize, trailers: bool) -> impl Body<Data = Bytes, Error = io::Error> {
    let drops = (0..FRAMES).flat_map(move |n| {
        let empty = if n == 0 { 3 } else { empty };
        iter::repeat_n("", empty).chain(["d"])
    });
    let frames = drops.map(|drop| Frame::data(Bytes::from_static(drop.as_bytes())));
    let trailers = trailers.then(|| Frame::trailers(HeaderMap::new()));
    StreamBody::new(stream::iter(frames.chain(trailers).map(Ok)))
}

#[tokio::test]
async fn a_million_frames_of_a_byte_or_none_complete_by_their_end_their_trailers_or_their_length() {
    for (trailers, announced) in [(false, false), (true, false), (false, true)] {
        let handler = service_fn(move |request: Request<Incoming>| async move {
            // A client of HTTP/2 takes no more than a few that are empty.
            let empty = usize::from(request.version() < Version::HTTP_2);
            let mut response = Response::new(drizzle(empty, trailers));
            if announced {
                response.headers_mut().insert(header::CONTENT_LENGTH, FRAMES.into());
            }
            Ok(response)
        });
        let mut site = Site::new(http1(), handler).await;
        let mut client = site.server.raw().await;
        client.write("GET / HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n").await;
        let response = client.rest().await;
        let (head, body) = response.split_once("\r\n\r\n").unwrap();
        assert_eq!(head.contains(&format!("content-length: {FRAMES}")), announced, "{head}");
        if announced {
            assert!(body.len() == FRAMES && body.bytes().all(|byte| byte == b'd'));
        } else {
            assert!(body.ends_with("\r\n1\r\nd\r\n0\r\n\r\n"));
            assert_eq!(body.len(), FRAMES * "1\r\nd\r\n".len() + "0\r\n\r\n".len());
        }
        site.has_ended(End::Completed).await;

        let mut site = Site::new(http2(), handler).await;
        // It would take so many small ones for an attack.
        let patient = h2::client::Builder::new().data_frame_budget(usize::MAX).clone();
        let mut client = site.server.h2_with(&patient).await;
        let request = Request::get("http://x/").body(()).unwrap();
        let mut body = soon(client.send(request).await).await.unwrap().into_body();
        let mut read = 0;
        while let Some(data) = soon(body.data()).await {
            let data = data.unwrap();
            body.flow_control().release_capacity(data.len()).unwrap();
            read += data.len();
        }
        assert_eq!(read, FRAMES);
        assert_eq!(soon(body.trailers()).await.unwrap().is_some(), trailers);
        site.has_ended(End::Completed).await;
        assert_drained(&site.tasks);
    }
}

#[tokio::test]
async fn when_a_connection_is_lost_the_tasks_of_all_its_streams_end() {
    const STREAMS: usize = 50;
    let handler = service_fn(async |request: Request<Incoming>| {
        // Half of them before the head.
        if request.uri().path() == "/waits" {
            pending::<()>().await;
        }
        let first = Ok(Frame::data(Bytes::from_static(b"foo")));
        Ok(Response::new(StreamBody::new(stream::iter([first]).chain(stream::pending()))))
    });
    let mut site = Site::new(http2(), handler).await;
    let mut client = site.server.h2().await;
    let (mut waiting, mut open) = (Vec::new(), Vec::new());
    for _ in 0..STREAMS / 2 {
        let [waits, opens] = ["/waits", "/opens"]
            .map(|path| Request::get(format!("http://x{path}")).body(()).unwrap());
        waiting.push(client.send(waits).await);
        let mut body = soon(client.send(opens).await).await.unwrap().into_body();
        assert_eq!(soon(body.data()).await.unwrap().unwrap(), "foo");
        open.push(body);
    }
    assert_eq!(site.tasks.len(), STREAMS);
    site.nothing_has_ended();
    client.close().await;
    for _ in 0..STREAMS {
        site.has_ended(End::Disconnected).await;
    }
    assert_drained(&site.tasks);
    let totals = site.tasks.snapshot().totals;
    assert_eq!((totals.is_exact(), totals.cancelled), (true, STREAMS as u64));
}

#[tokio::test]
async fn a_hundred_continue_before_the_head_is_no_end() {
    let handler = service_fn(async |request: Request<Incoming>| {
        let body = request.into_body().collect().await.unwrap().to_bytes();
        Ok(Response::new(Full::new(body).map_err(|never| match never {})))
    });
    let mut site = Site::new(http1(), handler).await;
    let mut client = site.server.raw().await;
    for _ in 0..3 {
        client
            .write(
                "POST / HTTP/1.1\r\nhost: x\r\ncontent-length: 3\r\nexpect: 100-continue\r\n\r\n",
            )
            .await;
        assert_eq!(client.read_head().await, "HTTP/1.1 100 Continue\r\n\r\n");
        site.server.has_caught_up().await;
        site.nothing_has_ended();
        client.write("foo").await;
        assert!(client.read_head().await.starts_with("HTTP/1.1 200 "));
        assert_eq!(client.read_exactly(3).await, "foo");
        site.has_ended(End::Completed).await;
    }
    assert_drained(&site.tasks);
}
