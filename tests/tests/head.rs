//! Every answer that a layer gives by itself, to HEAD, from bare hyper: the head of the answer to
//! GET, and no content, which is an error of the protocol over HTTP/2.

#![allow(clippy::unwrap_used)]

use std::{convert::Infallible, future::pending, time::Duration};

use bytes::Bytes;
use http::{Request, Response, request};
use http_body::Body;
use http_body_util::Full;
use hyper::body::Incoming;
use tower::{Layer, Service, service_fn};
use tower_tasks::{
    CatchUnwindLayer, RequestLimitLayer, Shutdown, TaskRegistry, TaskSetLayer,
    task_set::ShieldLayer,
};
use tower_tasks_tests::{BoxError, Protocol, Server, http1, http2, read_all, soon};

type Reply = Result<Response<Full<Bytes>>, Infallible>;

fn never() -> impl Service<
    Request<Incoming>,
    Response = Response<Full<Bytes>>,
    Error = Infallible,
    Future: Send + 'static,
> + Clone
+ Send
+ 'static {
    service_fn(|_: Request<Incoming>| pending::<Reply>())
}

#[derive(Debug, PartialEq)]
struct Answer {
    status: String,
    content_type: Option<String>,
    content_length: Option<String>,
    content: Bytes,
}

/// What the same request is answered with, as a client of this protocol sees it.
async fn answer(protocol: &Protocol, server: &Server, method: &str) -> Answer {
    if let Protocol::Http1(_) = protocol {
        let mut client = server.raw().await;
        let head = format!("{method} / HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n");
        client.write(head).await;
        let all = client.rest().await;
        let (head, content) = all.split_once("\r\n\r\n").unwrap();
        let field = |name: &str| {
            let value = head.lines().find_map(|line| line.strip_prefix(name));
            value.map(|value| value.trim_start_matches(": ").to_owned())
        };
        return Answer {
            status: head.split(' ').nth(1).unwrap().to_owned(),
            content_type: field("content-type"),
            content_length: field("content-length"),
            content: content.to_owned().into(),
        };
    }
    let mut client = server.h2().await;
    let request = request::Builder::new().method(method).uri("http://x/").body(()).unwrap();
    let response = soon(client.send(request).await).await.unwrap();
    let field = |name| Some(response.headers().get(name)?.to_str().unwrap().to_owned());
    let (content_type, content_length) = (field("content-type"), field("content-length"));
    let status = response.status().as_str().to_owned();
    let (content, trailers) = read_all(&mut response.into_body()).await.unwrap();
    assert_eq!(trailers, None);
    Answer { status, content_type, content_length, content }
}

async fn assert_answers<S, B>(what: &str, status: u16, service: S)
where
    S: Service<Request<Incoming>, Response = Response<B>> + Clone + Send + 'static,
    S::Future: Send,
    S::Error: Into<BoxError>,
    B: Body<Data: Send, Error: Into<BoxError>> + Send + 'static,
{
    for protocol in [http1(), http2()] {
        let server = Server::hyper(protocol.clone(), service.clone()).await;
        let get = answer(&protocol, &server, "GET").await;
        let head = answer(&protocol, &server, "HEAD").await;
        assert_eq!(get.status, status.to_string(), "{what}");
        assert!(!get.content.is_empty(), "{what}");
        assert_eq!(get.content_length, Some(get.content.len().to_string()), "{what}");
        assert_eq!(head, Answer { content: Bytes::new(), ..get }, "{what}");
    }
}

#[tokio::test]
async fn an_answer_of_ours_to_head_is_that_to_get_without_its_content() {
    let panics = service_fn(async |_: Request<Incoming>| -> Reply { panic!("as it should") });
    assert_answers("a panic", 500, CatchUnwindLayer::new().layer(panics)).await;

    let on_panic = |_: &Request<Incoming>| |_: &_| Some(Response::new(Bytes::from("sorry")));
    let layer = CatchUnwindLayer::new().on_panic(on_panic);
    assert_answers("a panic, by the user", 200, layer.layer(panics)).await;

    let shutdown = Shutdown::new(Duration::ZERO).without_signals();
    drop(shutdown.finish().await);
    assert_answers("too late", 503, shutdown.layer().layer(never())).await;

    assert_answers("a limit", 503, RequestLimitLayer::new(0).layer(never())).await;

    let tasks = TaskRegistry::new();
    let layer = TaskSetLayer::new(&tasks).deadline(Duration::from_millis(1));
    assert_answers("a deadline", 504, layer.layer(never())).await;

    assert_answers("no task set", 500, ShieldLayer::new("handler").layer(never())).await;
}

/// Not a refusal, but ended while it is in flight.
#[tokio::test]
async fn a_request_of_head_that_the_shutdown_ends_is_answered() {
    let shutdown = Shutdown::new(Duration::ZERO).without_signals();
    let entered = std::sync::Arc::new(tokio::sync::Notify::new());
    let enters = entered.clone();
    let service = shutdown.layer().layer(service_fn(move |_: Request<Incoming>| {
        enters.notify_one();
        pending::<Reply>()
    }));
    let server = Server::hyper(http2(), service).await;
    let mut client = server.h2().await;
    let request = Request::head("http://x/").body(()).unwrap();
    let response = client.send(request).await;
    soon(entered.notified()).await;
    let report = shutdown.finish().await;
    assert_eq!(report.requests.ended, 1, "{report}");
    let response = soon(response).await.unwrap();
    assert_eq!(response.status(), 503);
    assert_eq!(read_all(&mut response.into_body()).await.unwrap().0, "");
}
