//! When a response is over, over real connections: `response-end` under hyper, axum and tonic.
//!
//! Every site tells what happens to each path, in order: that it was called, that its body was
//! polled or dropped, and how its response ended.

#![allow(clippy::unwrap_used)]

mod grpc;

use std::{
    collections::VecDeque,
    convert::Infallible,
    fmt,
    future::{pending, ready},
    pin::Pin,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering::SeqCst},
    },
    task::{Context, Poll},
    time::Duration,
};

use axum::{
    Router,
    extract::{WebSocketUpgrade, ws},
    response::{Sse, sse},
    routing,
};
use bytes::Bytes;
use http::{HeaderMap, Request, Response, StatusCode, header};
use http_body::{Body, Frame, SizeHint};
use http_body_util::{BodyExt, Empty, Full, StreamBody, combinators::UnsyncBoxBody};
use hyper::{body::Incoming, server::conn};
use hyper_util::rt::{TokioExecutor, TokioIo};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    sync::{
        Notify,
        mpsc::{UnboundedSender, unbounded_channel},
    },
};
use tokio_stream::{
    Stream, StreamExt,
    wrappers::{TcpListenerStream, UnboundedReceiverStream},
};
use tonic::{Status, server::NamedService};
use tower::{Layer, Service, ServiceBuilder, service_fn};
use tower_http::{
    compression::CompressionLayer,
    on_early_drop::{OnBodyDropFn, OnEarlyDropLayer},
    timeout::TimeoutLayer,
};
use tower_response_end::{End, MakeOnEnd, RequestBody, ResponseEndLayer, hold};
use tower_tasks_tests::{
    BoxError, Events, Protocol, Raw, Server, auto, events, http1, http2, read_all, soon,
};

use grpc::Plain;

// How hyper uses a body.

#[tokio::test]
async fn a_body_that_tells_its_end_completes_with_its_last_frame() {
    let script = || Script::new([Step::Data("foo"), Step::Data("bar")]).tells_its_end();
    let expected = ["called", "polled", "polled", "Completed", "dropped"];
    let mut site = Site::scripted(http1(), 200, script).await;
    let response = fetch(&site, "GET / HTTP/1.1").await;
    assert!(response.ends_with("\r\n\r\n3\r\nfoo\r\n3\r\nbar\r\n0\r\n\r\n"), "{response}");
    site.saw("/", expected).await;

    let mut site = Site::scripted(http2(), 200, script).await;
    let answer = fetch_h2(&site, "GET", "/").await;
    assert_eq!((answer.status, &*answer.data), (200, &b"foobar"[..]));
    site.saw("/", expected).await;

    let mut site = Site::scripted(auto(), 200, script).await;
    fetch(&site, "GET /1 HTTP/1.1").await;
    site.saw("/1", expected).await;
    fetch_h2(&site, "GET", "/2").await;
    site.saw("/2", expected).await;
}

#[tokio::test]
async fn a_body_of_known_length_completes_after_its_last_byte() {
    let script = || Script::new([Step::Data("foo"), Step::Data("bar")]).exact(6);
    let mut site = Site::scripted(http1(), 200, script).await;
    let response = fetch(&site, "GET / HTTP/1.1").await;
    assert!(response.contains("content-length: 6\r\n"), "{response}");
    assert!(response.ends_with("\r\n\r\nfoobar"), "{response}");
    // hyper does not ask for `None`: R6.
    site.saw("/", ["called", "polled", "polled", "dropped", "Completed"]).await;

    let mut site = Site::scripted(http2(), 200, script).await;
    assert_eq!(fetch_h2(&site, "GET", "/").await.data, "foobar");
    site.saw("/", ["called", "polled", "polled", "polled", "Completed", "dropped"]).await;
}

#[tokio::test]
async fn a_body_of_announced_length_completes_after_its_last_byte() {
    for (steps, expected) in [
        (vec![Step::Data("foo"), Step::Data("bar")], vec!["polled", "polled"]),
        // What is too much is not sent.
        (vec![Step::Data("foobar and more")], vec!["polled"]),
        (vec![Step::Data("foo"), Step::Data("bar and more")], vec!["polled", "polled"]),
    ] {
        let mut site = Site::new(http1(), move |_, teller| {
            let mut response = reply(200, Script::new(steps.clone()).told_by(teller));
            response.headers_mut().insert(header::CONTENT_LENGTH, 6.into());
            ready(response)
        })
        .await;
        let response = fetch(&site, "GET / HTTP/1.1").await;
        assert!(response.contains("content-length: 6\r\n"), "{response}");
        assert!(response.ends_with("\r\n\r\nfoobar"), "{response}");
        site.saw("/", ["called"]).await;
        site.saw("/", expected).await;
        site.saw("/", ["dropped", "Completed"]).await;
    }
}

#[tokio::test]
async fn an_empty_body_completes_however_it_says_so() {
    let mut site = Site::scripted(http1(), 200, || Script::new([]).tells_its_end()).await;
    let response = fetch(&site, "GET / HTTP/1.1").await;
    assert!(response.contains("content-length: 0\r\n"), "{response}");
    site.saw("/", ["called", "Completed", "dropped"]).await;

    let mut site = Site::scripted(http1(), 200, || Script::new([]).exact(0)).await;
    let response = fetch(&site, "GET / HTTP/1.1").await;
    assert!(response.contains("content-length: 0\r\n"), "{response}");
    // It is not polled, and only R6 tells.
    site.saw("/", ["called", "dropped", "Completed"]).await;

    let mut site = Site::scripted(http1(), 200, || Script::new([])).await;
    let response = fetch(&site, "GET / HTTP/1.1").await;
    assert!(response.contains("transfer-encoding: chunked\r\n"), "{response}");
    site.saw("/", ["called", "polled", "Completed", "dropped"]).await;
}

#[tokio::test]
async fn a_body_that_is_at_its_end_only_when_the_server_asks_completes() {
    struct Late(Arc<AtomicBool>);

    impl Body for Late {
        type Data = Bytes;
        type Error = Infallible;

        fn poll_frame(
            self: Pin<&mut Self>,
            _: &mut Context<'_>,
        ) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
            panic!("it is not polled")
        }

        fn is_end_stream(&self) -> bool {
            self.0.load(SeqCst)
        }
    }

    for protocol in [http1(), http2()] {
        let is_http1 = matches!(protocol, Protocol::Http1(_));
        let (tell, seen) = events();
        let service = ServiceBuilder::new()
            // Handed over by the layer, and not yet by this.
            .map_response(|response: Response<_>| {
                response.extensions().get::<Arc<AtomicBool>>().unwrap().store(true, SeqCst);
                response
            })
            .layer(ResponseEndLayer::new(TellEnd(tell)))
            .service(service_fn(|_: Request<Incoming>| {
                let is_at_end = Arc::new(AtomicBool::new(false));
                let mut response = Response::new(Late(is_at_end.clone()));
                response.extensions_mut().insert(is_at_end);
                ready(Ok::<_, Infallible>(response))
            }));
        let mut site = Site { server: Server::hyper(protocol, service).await, seen, bodies: None };
        if is_http1 {
            let response = fetch(&site, "GET / HTTP/1.1").await;
            assert!(response.contains("content-length: 0\r\n"), "{response}");
        } else {
            assert_eq!(fetch_h2(&site, "GET", "/").await.status, 200);
        }
        site.saw("/", ["Completed"]).await;
    }
}

#[tokio::test]
async fn a_stream_completes_at_its_end_and_not_at_its_drop() {
    let script = || Script::new([Step::Data("foo"), Step::Data("")]);
    let expected = ["called", "polled", "polled", "polled", "Completed", "dropped"];
    let mut site = Site::scripted(http1(), 200, script).await;
    let response = fetch(&site, "GET / HTTP/1.1").await;
    assert!(response.ends_with("\r\n\r\n3\r\nfoo\r\n0\r\n\r\n"), "{response}");
    site.saw("/", expected).await;

    let mut site = Site::scripted(http2(), 200, script).await;
    assert_eq!(fetch_h2(&site, "GET", "/").await.data, "foo");
    site.saw("/", expected).await;
}

#[tokio::test]
async fn trailers_complete() {
    let script = || Script::new([Step::Data("foo"), Step::Trailers, Step::Data("not polled")]);
    let expected = ["called", "polled", "polled", "Completed", "dropped"];
    let mut site = Site::new(http1(), move |_, teller| {
        let mut response = reply(200, script().told_by(teller));
        response.headers_mut().insert(header::TRAILER, "x-checksum".parse().unwrap());
        ready(response)
    })
    .await;
    let response = fetch(&site, "GET / HTTP/1.1\r\nTE: trailers").await;
    assert!(response.ends_with("\r\n3\r\nfoo\r\n0\r\nx-checksum: 7\r\n\r\n"), "{response}");
    site.saw("/", expected).await;

    let mut site = Site::scripted(http2(), 200, script).await;
    let answer = fetch_h2(&site, "GET", "/").await;
    assert_eq!(answer.data, "foo");
    assert_eq!(answer.trailers, Some(checksum()));
    site.saw("/", expected).await;
}

#[tokio::test]
async fn http1_never_polls_a_body_that_is_not_to_be_written() {
    for (request, status) in [
        ("HEAD / HTTP/1.1", 200),
        ("HEAD / HTTP/1.1", 404),
        ("GET / HTTP/1.1", 204),
        ("GET / HTTP/1.1", 304),
    ] {
        let script = || Script::new([Step::Data("foo")]);
        let mut site = Site::scripted(http1(), status, script).await;
        let response = fetch(&site, request).await;
        assert!(response.starts_with(&format!("HTTP/1.1 {status}")), "{response}");
        assert!(response.ends_with("\r\n\r\n"), "{response}");
        site.saw("/", ["called", "Completed", "dropped"]).await;
    }
}

#[tokio::test]
async fn http2_polls_a_body_that_is_not_to_be_written_and_the_end_stays() {
    for (method, status) in [("HEAD", 200), ("GET", 204), ("GET", 304)] {
        let script = || Script::new([Step::Data("foo")]);
        let mut site = Site::scripted(http2(), status, script).await;
        let mut client = site.server.h2().await;
        let answer = client.send(request_h2(method, "/")).await.await;
        site.saw("/", ["called", "Completed", "polled", "polled", "dropped"]).await;
        assert_eq!(answer.unwrap().status(), status);
    }
}

#[tokio::test]
async fn over_http2_a_body_of_an_announced_length_completes_and_too_much_is_an_error() {
    for (frames, whole) in [(["foo", "bar"], true), (["foo", "barbar"], false)] {
        let mut site = Site::new(http2(), move |_, teller| {
            let script = Script::new(frames.map(Step::Data)).told_by(teller);
            let mut response = reply(200, script);
            response.headers_mut().insert(header::CONTENT_LENGTH, 6.into());
            ready(response)
        })
        .await;
        let mut client = site.server.h2().await;
        let response = soon(client.send(request_h2("GET", "/")).await).await.unwrap();
        assert_eq!(response.headers()[header::CONTENT_LENGTH], "6");
        let read = read_all(&mut response.into_body()).await;
        assert_eq!(read.is_ok_and(|(data, _)| data == "foobar"), whole);
        // Polled to its end, which the handler has reached: hyper counts nothing here.
        while site.seen.wait().await != "/ Completed" {}
    }
}

/// Hedges every request, at once.
#[derive(Clone)]
struct AtOnce;

impl tower::hedge::Policy<Request<()>> for AtOnce {
    fn clone_request(&self, request: &Request<()>) -> Option<Request<()>> {
        Some(request.clone())
    }

    fn can_retry(&self, _: &Request<()>) -> bool {
        true
    }
}

#[tokio::test]
async fn of_a_hedged_request_each_attempt_has_its_end_and_the_request_has_one() {
    let (tell, mut seen) = events();
    let calls = Arc::new(Mutex::new(0));
    let attempt =
        ResponseEndLayer::new(TellEnd(tell.clone())).layer(service_fn(move |_: Request<()>| {
            let mut calls = calls.lock().unwrap();
            *calls += 1;
            let is_first = *calls == 1;
            async move {
                if is_first {
                    pending::<()>().await;
                }
                Ok::<_, BoxError>(Response::new(Full::new(Bytes::from("foo"))))
            }
        }));
    let hedged = tower::hedge::Hedge::new(attempt, AtOnce, 0, 0.9, Duration::from_secs(10));
    // Renamed on the way in, to tell the attempts from the request.
    let hedged = tower::util::MapRequest::new(hedged, |mut request: Request<()>| {
        *request.uri_mut() = "/attempt".parse().unwrap();
        request
    });
    let service = ResponseEndLayer::new(TellEnd(tell)).layer(hedged);
    let request = Request::get("/request").body(()).unwrap();
    let response = soon(tower::ServiceExt::oneshot(service, request)).await.unwrap();
    assert_eq!(seen.so_far(), ["/attempt Disconnected"], "the one that lost");
    assert_eq!(response.into_body().collect().await.unwrap().to_bytes(), "foo");
    assert_eq!(seen.so_far(), ["/attempt Completed", "/request Completed"]);
}

#[tokio::test]
async fn an_informational_response_is_over_although_hyper_refuses_it() {
    let mut site = Site::scripted(http1(), 103, || Script::new([Step::Data("foo")])).await;
    let response = fetch(&site, "GET / HTTP/1.1").await;
    assert!(response.starts_with("HTTP/1.1 500 "), "{response}");
    site.saw("/", ["called", "Completed", "dropped"]).await;
}

#[tokio::test]
async fn what_is_refused_before_it_is_read_ends_like_any_other() {
    let mut site = Site::scripted(http1(), 413, || Script::new([]).tells_its_end()).await;
    let mut client = site.server.raw().await;
    client
        .write("POST / HTTP/1.1\r\nhost: x\r\ncontent-length: 9\r\nexpect: 100-continue\r\n\r\n")
        .await;
    // No `100 Continue`, since nobody reads; and no second request on this connection.
    let response = client.rest().await;
    assert!(response.starts_with("HTTP/1.1 413 "), "{response}");
    site.saw("/", ["called", "Completed", "dropped"]).await;
}

#[tokio::test]
async fn a_connection_that_does_not_stay_changes_nothing() {
    for (request, version) in [("GET / HTTP/1.0", "HTTP/1.0"), ("GET / HTTP/1.1", "HTTP/1.1")] {
        let known = || Script::new([Step::Data("foo")]).exact(3);
        let mut site = Site::scripted(http1(), 200, known).await;
        let response = fetch(&site, request).await;
        assert!(response.starts_with(version), "{response}");
        assert!(response.ends_with("\r\n\r\nfoo"), "{response}");
        site.saw("/", ["called", "polled", "dropped", "Completed"]).await;

        // To HTTP/1.0 its end is that of the connection.
        let unknown = || Script::new([Step::Data("foo")]);
        let mut site = Site::scripted(http1(), 200, unknown).await;
        let response = fetch(&site, request).await;
        assert!(response.contains("foo"), "{response}");
        site.saw("/", ["called", "polled", "polled", "Completed", "dropped"]).await;
    }
}

// Errors.

#[tokio::test]
async fn a_body_that_fails_cuts_the_response() {
    let mut site = Site::fed(http1()).await;
    let (client, body) = site.opened("/").await;
    body.send(Err("out of ink".into())).unwrap();
    site.saw("/", ["Failed"]).await;
    // No final chunk.
    assert_eq!(client.rest().await, "");

    // If nothing has been flushed yet the client sees no response at all.
    let script = || Script::new([Step::Data("foo"), Step::Fail]);
    let mut site = Site::scripted(http1(), 200, script).await;
    assert_eq!(fetch(&site, "GET / HTTP/1.1").await, "");
    site.saw("/", ["called", "polled", "polled", "Failed", "dropped"]).await;
    let error = site.server.connection_ended().await.unwrap_err();
    assert!(error.downcast::<hyper::Error>().unwrap().is_user());

    let mut site = Site::fed(http2()).await;
    let mut client = site.server.h2().await;
    let mut response = client.send(request_h2("GET", "/")).await.await.unwrap();
    let body = site.body().await;
    body.send(Err("out of ink".into())).unwrap();
    site.saw("/", ["called", "Failed"]).await;
    let error = read_all(response.body_mut()).await.err().unwrap();
    assert_eq!(error.reason(), Some(h2::Reason::INTERNAL_ERROR));

    let mut site = Site::scripted(http2(), 200, script).await;
    let mut client = site.server.h2().await;
    let error = client.send(request_h2("GET", "/")).await.await.unwrap_err();
    assert_eq!(error.reason(), Some(h2::Reason::INTERNAL_ERROR));
    site.saw("/", ["called", "polled", "polled", "Failed", "dropped"]).await;
}

#[tokio::test]
async fn a_service_that_fails_ends_its_connection() {
    let mut site = Site::with(http1(), |_| {
        service_fn(|_| ready(Err::<Response<Empty<Bytes>>, _>(BoxError::from("out of order"))))
    })
    .await;
    assert_eq!(fetch(&site, "GET / HTTP/1.1").await, "");
    site.saw("/", ["Failed"]).await;
}

#[tokio::test]
async fn a_panic_ends_its_connection() {
    let script = || Script::new([Step::Data("foo"), Step::Panic]);
    let mut site = Site::scripted(http1(), 200, script).await;
    assert_eq!(fetch(&site, "GET / HTTP/1.1").await, "");
    site.saw("/", ["called", "polled", "polled", "Panicked", "dropped"]).await;
    let error = site.server.connection_ended().await.unwrap_err();
    assert!(error.downcast::<tokio::task::JoinError>().unwrap().is_panic());
}

// Clients that leave.

#[tokio::test]
async fn a_client_that_leaves_a_pending_handler_is_noticed() {
    for leave in [Raw::close, Raw::reset] {
        let mut site = Site::new(http1(), |_, _| pending()).await;
        let mut client = site.server.raw().await;
        client.write("GET / HTTP/1.1\r\nhost: x\r\n\r\n").await;
        site.saw("/", ["called"]).await;
        leave(client);
        // No waiting: tests of what is not noticed rely on that.
        site.server.has_caught_up().await;
        assert_eq!(site.seen.so_far(), ["/ Disconnected"]);
    }
}

#[tokio::test]
async fn a_client_that_leaves_a_pending_body_is_noticed() {
    for leave in [Raw::close, Raw::reset] {
        let mut site = Site::fed(http1()).await;
        let (client, body) = site.opened("/").await;
        leave(client);
        site.saw("/", ["Disconnected"]).await;
        assert!(body.is_closed());
    }
}

#[tokio::test]
async fn a_stream_that_is_reset_is_noticed() {
    // While the handler runs.
    let mut site = Site::new(http2(), |_, _| pending()).await;
    let mut client = site.server.h2().await;
    let (response, mut request) = client.open(request_h2("GET", "/"), false).await;
    site.saw("/", ["called"]).await;
    request.send_reset(h2::Reason::CANCEL);
    site.saw("/", ["Disconnected"]).await;
    assert!(response.await.is_err());

    // While the body waits for data.
    let mut site = Site::fed(http2()).await;
    let mut client = site.server.h2().await;
    let (response, mut request) = client.open(request_h2("GET", "/"), false).await;
    site.saw("/", ["called"]).await;
    let body = site.body().await;
    let mut response = response.await.unwrap();
    body.send(Ok(Frame::data("foo".into()))).unwrap();
    assert_eq!(response.body_mut().data().await.unwrap().unwrap(), "foo");
    site.saw_nothing();
    request.send_reset(h2::Reason::CANCEL);
    site.saw("/", ["Disconnected"]).await;

    // While the body waits for the client to take its data.
    let mut site = Site::scripted(http2(), 200, || {
        Script::new([Step::Data("twelve bytes"), Step::Data("and more")])
    })
    .await;
    let mut client = site.server.h2_with(h2::client::Builder::new().initial_window_size(10)).await;
    let (response, mut request) = client.open(request_h2("GET", "/"), false).await;
    let mut response = response.await.unwrap();
    assert_eq!(response.body_mut().data().await.unwrap().unwrap(), "twelve byt");
    request.send_reset(h2::Reason::CANCEL);
    site.saw("/", ["called", "polled", "polled", "dropped", "Disconnected"]).await;
}

#[tokio::test]
async fn a_connection_that_is_lost_ends_all_its_streams() {
    let mut site = Site::fed(http2()).await;
    let mut client = site.server.h2().await;
    let mut streams = Vec::new();
    for n in 0..10 {
        streams.push(client.send(request_h2("GET", &format!("/{n}"))).await);
        site.saw(&format!("/{n}"), ["called"]).await;
    }
    site.saw_nothing();
    client.close().await;
    let mut ends = Vec::new();
    for _ in 0..10 {
        ends.push(site.seen.wait().await);
    }
    ends.sort();
    assert_eq!(ends, (0..10).map(|n| format!("/{n} Disconnected")).collect::<Vec<_>>());
}

#[tokio::test]
async fn an_outer_layer_that_gives_up_is_a_client_that_has_left() {
    let (tell, seen) = events();
    let service = ServiceBuilder::new()
        .layer(TimeoutLayer::with_status_code(StatusCode::GATEWAY_TIMEOUT, Duration::ZERO))
        .layer(ResponseEndLayer::new(TellEnd(tell)))
        .service(service_fn(|_: Request<Incoming>| pending::<Result<Reply, Infallible>>()));
    let mut site = Site { server: Server::hyper(http1(), service).await, seen, bodies: None };
    let response = fetch(&site, "GET / HTTP/1.1").await;
    assert!(response.starts_with("HTTP/1.1 504 "), "{response}");
    site.saw("/", ["Disconnected"]).await;
}

// Several requests on one connection.

#[tokio::test]
async fn each_of_a_thousand_responses_ends_before_the_next_call() {
    let mut site = Site::scripted(http1(), 200, || Script::new([Step::Data("foo")]).exact(3)).await;
    let mut client = site.server.raw().await;
    for n in 0..1_000 {
        client.write(format!("GET /{n} HTTP/1.1\r\nhost: x\r\n\r\n")).await;
        client.read_until("foo").await;
    }
    for n in 0..1_000 {
        let path = format!("/{n}");
        site.saw(&path, ["called", "polled", "dropped", "Completed"]).await;
    }
}

#[tokio::test]
async fn pipelined_requests_are_served_one_after_the_other() {
    let mut site = Site::scripted(http1(), 200, || Script::new([Step::Data("foo")]).exact(3)).await;
    let mut client = site.server.raw().await;
    let requests = [1, 2, 3].map(|n| format!("GET /{n} HTTP/1.1\r\nhost: x\r\n\r\n"));
    client.write(requests.concat()).await;
    for path in ["/1", "/2", "/3"] {
        client.read_until("foo").await;
        site.saw(path, ["called", "polled", "dropped", "Completed"]).await;
    }
}

// Slow clients.

#[tokio::test]
async fn a_client_that_stops_reading_keeps_its_response_open_until_it_leaves() {
    let mut site = Site::scripted(http1(), 200, || Script::new([Step::Flood])).await;
    let mut client = site.server.raw().await;
    client.write("GET / HTTP/1.1\r\nhost: x\r\n\r\n").await;
    client.read_head().await;
    site.saw("/", ["called"]).await;
    // Until the buffers of both ends are full: no poll while another connection is served.
    let mut polls = 0;
    loop {
        site.server.has_caught_up().await;
        let seen = site.seen.so_far();
        polls += seen.len();
        assert!(seen.iter().all(|event| event == "/ polled"), "{seen:?}");
        if seen.is_empty() {
            break;
        }
    }
    assert_ne!(polls, 0);
    client.close();
    let mut last = site.seen.wait().await;
    while last == "/ polled" {
        last = site.seen.wait().await;
    }
    assert_eq!(last, "/ dropped");
    site.saw("/", ["Disconnected"]).await;
}

#[tokio::test]
async fn a_slow_stream_is_open_as_long_as_it_lasts() {
    let mut site = Site::fed(http1()).await;
    let (mut client, body) = site.opened("/").await;
    for _ in 0..100 {
        body.send(Ok(Frame::data("tick".into()))).unwrap();
        client.read_until("tick").await;
        site.saw_nothing();
    }
    drop(body);
    site.saw("/", ["Completed"]).await;
    client.read_until("\r\n0\r\n\r\n").await;
}

// What hyper does not see: the docs say so, and these tests that it is still so.

#[tokio::test]
async fn a_pipelined_request_hides_that_the_client_has_left() {
    for leave in [Raw::close, Raw::reset] {
        let release = Arc::new(Notify::new());
        let released = release.clone();
        let mut site = Site::new(http1(), move |request, _| {
            let released = released.clone();
            async move {
                match request.uri().path() {
                    "/1" => released.notified().await,
                    _ => pending().await,
                }
                reply(200, Full::from("foo"))
            }
        })
        .await;
        let mut client = site.server.raw().await;
        let requests = ["/1", "/2"].map(|path| format!("GET {path} HTTP/1.1\r\nhost: x\r\n\r\n"));
        client.write(requests.concat()).await;
        site.saw("/1", ["called"]).await;
        leave(client);

        // Without the second request this would end it.
        let mut other = site.server.raw().await;
        other.write("GET /other HTTP/1.1\r\nhost: x\r\n\r\n").await;
        site.saw("/other", ["called"]).await;
        leave(other);
        site.saw("/other", ["Disconnected"]).await;
        site.server.has_caught_up().await;
        site.saw_nothing();

        release.notify_one();
        site.saw("/1", ["Completed"]).await;
    }
}

#[tokio::test]
async fn an_unfinished_upload_hides_that_the_client_has_left() {
    for leave in [Raw::close, Raw::reset] {
        let release = Arc::new(Notify::new());
        let released = release.clone();
        let mut site =
            Site::new(http1(), move |request, teller| uploaded(request, teller, released.clone()))
                .await;
        // Whether the handler does not read it or does, and gets an error.
        for path in ["/ignores", "/reads"] {
            site.upload_and_leave(path, leave).await;
            site.server.has_caught_up().await;
            site.saw_nothing();
            release.notify_one();
            site.saw(path, ["Completed"]).await;
        }
    }
}

#[tokio::test]
async fn an_unfinished_upload_does_not_hide_it_from_who_watches_and_reads_it() {
    for leave in [Raw::close, Raw::reset] {
        let release = Arc::new(Notify::new());
        let released = release.clone();
        let (tell, seen) = events();
        let service = ServiceBuilder::new()
            .layer(ResponseEndLayer::new(TellEnd(tell.clone())).watch_request_body())
            .service(service_fn(move |request: Request<RequestBody<Incoming>>| {
                let teller = Teller::of(&tell, &request);
                teller.say("called");
                let response = uploaded(request, teller, released.clone());
                async { Ok::<_, Infallible>(response.await) }
            }));
        let mut site = Site { server: Server::hyper(http1(), service).await, seen, bodies: None };

        site.upload_and_leave("/reads", leave).await;
        site.saw("/reads", ["Disconnected"]).await;
        // The handler goes on all the same, and its answer is no second end.
        release.notify_one();
        drop(site.server.connection_ended().await);
        site.saw_nothing();

        site.upload_and_leave("/ignores", leave).await;
        site.server.has_caught_up().await;
        site.saw_nothing();
        release.notify_one();
        site.saw("/ignores", ["Completed"]).await;
    }
}

#[tokio::test]
async fn a_client_that_half_closes_has_left_unless_the_server_allows_it() {
    let release = Arc::new(Notify::new());
    let released = release.clone();
    let handler = move |_, _| {
        let released = released.clone();
        async move {
            released.notified().await;
            reply(200, Full::from("foo"))
        }
    };
    let mut site = Site::new(http1(), handler.clone()).await;
    let mut client = site.server.raw().await;
    client.write("GET / HTTP/1.1\r\nhost: x\r\n\r\n").await;
    site.saw("/", ["called"]).await;
    client.close_write().await;
    site.saw("/", ["Disconnected"]).await;
    assert_eq!(client.rest().await, "");

    let mut site = Site::new(half_closed(), handler).await;
    let mut client = site.server.raw().await;
    client.write("GET / HTTP/1.1\r\nhost: x\r\n\r\n").await;
    site.saw("/", ["called"]).await;
    client.close_write().await;
    site.server.has_caught_up().await;
    site.saw_nothing();
    release.notify_one();
    site.saw("/", ["Completed"]).await;
    assert!(client.rest().await.ends_with("foo"));
}

#[tokio::test]
async fn half_close_hides_that_the_client_has_left() {
    let mut site = Site::fed(half_closed()).await;
    let (client, body) = site.opened("/").await;
    client.close();
    site.server.has_caught_up().await;
    site.saw_nothing();
    // Only what is written finds out, sooner or later.
    soon(async {
        while body.send(Ok(Frame::data("foo".into()))).is_ok() {
            tokio::task::yield_now().await;
        }
    })
    .await;
    site.saw("/", ["Disconnected"]).await;
}

// Connections that outlive their response.

#[tokio::test]
async fn an_upgraded_connection_is_open_as_long_as_it_is_held() {
    for (request, status) in [
        ("GET / HTTP/1.1\r\nhost: x\r\nconnection: upgrade\r\nupgrade: echo\r\n\r\n", 101),
        ("CONNECT x:1 HTTP/1.1\r\nhost: x:1\r\n\r\n", 200),
    ] {
        let mut site = Site::echo(http1(), status, true).await;
        let mut client = site.server.raw().await;
        client.write(request).await;
        client.read_head().await;
        client.write("foo").await;
        assert_eq!(client.read_exactly(3).await, "foo");
        let path = if status == 101 { "/" } else { "" };
        site.saw(path, ["called"]).await;
        site.saw_nothing();
        client.close();
        site.saw(path, ["Completed"]).await;

        // Without a hold it is over at once, and the connection works none the less.
        let mut site = Site::echo(http1(), status, false).await;
        let mut client = site.server.raw().await;
        client.write(request).await;
        client.read_head().await;
        site.saw(path, ["called", "Completed"]).await;
        client.write("foo").await;
        assert_eq!(client.read_exactly(3).await, "foo");
    }
}

#[tokio::test]
async fn a_websocket_over_http2_is_open_as_long_as_it_is_held() {
    for held in [true, false] {
        let mut builder = conn::http2::Builder::new(TokioExecutor::new());
        builder.enable_connect_protocol();
        let mut site = Site::echo(Protocol::Http2(builder), 200, held).await;
        let mut client = site.server.h2().await;
        // Its answer comes after the server's settings, which allow what follows.
        assert!(client.send(request_h2("GET", "/not/an/upgrade")).await.await.is_ok());
        site.saw("/not/an/upgrade", ["called", "Completed"]).await;
        let mut request = request_h2("CONNECT", "/");
        request.extensions_mut().insert(h2::ext::Protocol::from_static("websocket"));
        let (response, mut upload) = client.open(request, false).await;
        let mut response = response.await.unwrap();
        site.saw("/", ["called"]).await;
        if !held {
            site.saw("/", ["Completed"]).await;
        }
        upload.send_data("foo".into(), false).unwrap();
        assert_eq!(response.body_mut().data().await.unwrap().unwrap(), "foo");
        site.saw_nothing();
        upload.send_data(Bytes::new(), true).unwrap();
        assert_eq!(read_all(response.body_mut()).await.unwrap(), (Bytes::new(), None));
        if held {
            site.saw("/", ["Completed"]).await;
        }
    }
}

// Other layers around the body.

#[tokio::test]
async fn a_body_is_the_same_inside_and_outside_of_other_layers() {
    let page = || reply(200, Full::from("foo ".repeat(1_000)));
    for inside in [false, true] {
        let (tell, seen) = events();
        let ends = ResponseEndLayer::new(TellEnd(tell));
        let handler = service_fn(move |_: Request<Incoming>| ready(Ok::<_, Infallible>(page())));
        let server = if inside {
            let layers = ServiceBuilder::new().layer(CompressionLayer::new()).layer(ends);
            Server::hyper(http1(), layers.service(handler)).await
        } else {
            let layers = ServiceBuilder::new().layer(ends).layer(CompressionLayer::new());
            Server::hyper(http1(), layers.service(handler)).await
        };
        let mut site = Site { server, seen, bodies: None };
        let response = fetch(&site, "GET / HTTP/1.1\r\naccept-encoding: gzip").await;
        assert!(response.contains("content-encoding: gzip\r\n"), "{response}");
        assert!(response.ends_with("\r\n0\r\n\r\n"), "{response}");
        site.saw("/", ["Completed"]).await;
    }
}

#[tokio::test]
async fn a_body_that_an_outer_layer_reads_is_complete_when_it_has_been_read() {
    async fn buffer<B: Body<Data = Bytes, Error = BoxError>>(
        response: Result<Response<B>, Infallible>,
    ) -> Result<Response<Full<Bytes>>, Infallible> {
        let read = response?.into_body().collect().await.unwrap();
        assert_eq!(read.to_bytes(), "foo");
        // It is not for the client that this response waited.
        pending().await
    }
    let (tell, seen) = events();
    let buffered = ServiceBuilder::new()
        .then(buffer)
        .layer(ResponseEndLayer::new(TellEnd(tell)))
        .service(service_fn(|_: Request<Incoming>| ready(Ok(reply(200, Full::from("foo"))))));
    let server = Server::hyper(http1(), buffered).await;
    let mut site = Site { server, seen, bodies: None };
    let mut client = site.server.raw().await;
    client.write("GET / HTTP/1.1\r\nhost: x\r\n\r\n").await;
    site.saw("/", ["Completed"]).await;
}

#[tokio::test]
async fn a_body_that_is_leaked_has_no_end() {
    let (tell, seen) = events();
    let leaked = ServiceBuilder::new()
        .map_response(|response: Response<_>| {
            response.map(|body| {
                std::mem::forget(body);
                Full::<Bytes>::from("bar")
            })
        })
        .layer(ResponseEndLayer::new(TellEnd(tell)))
        .service(service_fn(|_: Request<Incoming>| {
            ready(Ok::<_, Infallible>(reply(200, Full::from("foo"))))
        }));
    let server = Server::hyper(http1(), leaked).await;
    let mut site = Site { server, seen, bodies: None };
    assert!(fetch(&site, "GET / HTTP/1.1").await.ends_with("bar"));
    site.server.connection_ended().await.unwrap();
    site.saw_nothing();
}

// Beside tower-http.

#[tokio::test]
#[allow(clippy::print_stdout)]
async fn eight_complete_responses_complete_of_which_tower_http_reports_six_as_dropped() {
    let foo = || Script::new([Step::Data("foo")]);
    let trailers = Script::new([Step::Data("foo"), Step::Trailers]);
    let mut announced = reply(200, foo());
    announced.headers_mut().insert(header::CONTENT_LENGTH, 3.into());
    let mut dropped = 0;
    println!("{:40} {:14} ours", "a complete response", "OnEarlyDrop");
    for (name, method, response, whole, is_dropped) in [
        (
            "its length and end known",
            "GET",
            reply(200, foo().exact(3).tells_its_end()),
            "foo",
            false,
        ),
        ("its length known, its end not told", "GET", reply(200, foo().exact(3)), "foo", true),
        ("HEAD", "HEAD", reply(200, foo()), "", true),
        ("204", "GET", reply(204, foo()), "", true),
        ("304", "GET", reply(304, foo()), "", true),
        ("with trailers", "GET", reply(200, trailers), "3\r\nfoo\r\n0\r\n\r\n", true),
        ("a stream of announced Content-Length", "GET", announced, "foo", true),
        ("a stream, chunked, to its end", "GET", reply(200, foo()), "3\r\nfoo\r\n0\r\n\r\n", false),
    ] {
        let (tell, mut theirs) = events();
        let tell_body = tell.clone();
        let response = Arc::new(Mutex::new(Some(response)));
        let mut site = Site::with(http1(), |_| {
            OnEarlyDropLayer::builder()
                .on_future_drop(move |_: &Request<Incoming>| {
                    let tell = tell.clone();
                    move || tell.send("future dropped").unwrap()
                })
                .on_body_drop(OnBodyDropFn::new(move |_: &Request<Incoming>| {
                    let tell = tell_body.clone();
                    |_: &http::response::Parts| move || tell.send("body dropped").unwrap()
                }))
                .layer(service_fn(move |_: Request<Incoming>| {
                    ready(Ok::<_, Infallible>(response.lock().unwrap().take().unwrap()))
                }))
        })
        .await;
        let seen = fetch(&site, &format!("{method} / HTTP/1.1\r\nte: trailers")).await;
        assert_eq!(seen.split_once("\r\n\r\n").unwrap().1, whole, "{name}");
        site.server.connection_ended().await.unwrap();

        let (theirs, ours) = (theirs.so_far().concat(), site.seen.so_far().concat());
        let theirs = if theirs.is_empty() { "-" } else { &theirs };
        println!("{name:40} {theirs:14} {}", ours.trim_start_matches("/ "));
        assert_eq!(theirs, if is_dropped { "body dropped" } else { "-" }, "{name}");
        assert_eq!(ours, "/ Completed", "{name}");
        dropped += usize::from(is_dropped);
    }
    assert_eq!(dropped, 6);
}

// Under axum.

#[tokio::test]
async fn server_sent_events_are_open_as_long_as_somebody_listens() {
    let (feed, body) = unbounded_channel::<&str>();
    let body = Arc::new(Mutex::new(Some(body)));
    let mut site = Site::axum(Router::new().route(
        "/",
        routing::get(async move || {
            let body = body.lock().unwrap().take().unwrap();
            let events = UnboundedReceiverStream::new(body);
            Sse::new(events.map(|data| Ok::<_, Infallible>(sse::Event::default().data(data))))
        }),
    ))
    .await;
    let mut client = site.server.raw().await;
    client.write("GET / HTTP/1.1\r\nhost: x\r\n\r\n").await;
    client.read_head().await;
    for data in ["foo", "bar"] {
        feed.send(data).unwrap();
        client.read_until(&format!("data: {data}\n\n")).await;
        site.saw_nothing();
    }
    client.close();
    site.saw("/", ["Disconnected"]).await;
    feed.closed().await;
}

#[tokio::test]
async fn a_websocket_is_open_as_long_as_it_is_held() {
    let mut site = Site::axum(Router::new().route(
        "/",
        routing::get(async |upgrade: WebSocketUpgrade| {
            let held = hold();
            assert!(held.is_some());
            upgrade.on_upgrade(async move |mut socket| {
                let _held = held;
                while let Some(Ok(ws::Message::Text(text))) = socket.recv().await {
                    socket.send(ws::Message::Text(text)).await.unwrap();
                }
            })
        }),
    ))
    .await;
    let mut client = site.server.raw().await;
    client
        .write(
            "GET / HTTP/1.1\r\nhost: x\r\nconnection: upgrade\r\nupgrade: websocket\r\n\
             sec-websocket-version: 13\r\nsec-websocket-key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n",
        )
        .await;
    let head = client.read_head().await;
    assert!(head.starts_with("HTTP/1.1 101 "), "{head}");
    // A text of three bytes, masked with zeros as a client must (RFC 6455, section 5.2), and the
    // same without a mask.
    client.write(b"\x81\x83\0\0\0\0foo").await;
    assert_eq!(&*client.read_exactly(5).await, b"\x81\x03foo");
    site.saw_nothing();
    client.close();
    site.saw("/", ["Completed"]).await;
}

#[tokio::test]
async fn axum_takes_a_request_body_that_is_watched() {
    let (tell, seen) = events();
    let router = Router::new()
        .route("/", routing::post(async |body: String| body))
        .layer(ResponseEndLayer::new(TellEnd(tell)).watch_request_body());
    let server = Server::host(async |listener| axum::serve(listener, router).await.unwrap()).await;
    let mut site = Site { server, seen, bodies: None };
    let mut client = site.server.raw().await;
    client.write("POST / HTTP/1.1\r\nhost: x\r\ncontent-length: 3\r\n\r\nfoo").await;
    client.read_until("\r\n\r\nfoo").await;
    site.saw("/", ["Completed"]).await;
    client.write("POST / HTTP/1.1\r\nhost: x\r\ncontent-length: 3\r\n\r\nf").await;
    client.close();
    site.saw("/", ["Disconnected"]).await;
}

// Under tonic.

#[tokio::test]
async fn a_grpc_response_completes_with_its_trailers() {
    let mut site = Site::tonic().await;
    let answer = site.grpc("/test.Echo/Unary", "foo").await;
    assert_eq!(answer.data, grpc_message("foo"));
    assert_eq!(answer.trailers.unwrap()["grpc-status"], "0");
    site.saw("/test.Echo/Unary", ["called", "Completed"]).await;

    let answer = site.grpc("/test.Echo/Stream", "foo").await;
    assert_eq!(answer.data, grpc_message("foo").repeat(3));
    assert_eq!(answer.trailers.unwrap()["grpc-status"], "0");
    site.saw("/test.Echo/Stream", ["called", "Completed"]).await;

    // A status that is not OK is as complete as any: in trailers alone, or after messages.
    let answer = site.grpc("/test.Echo/Refuse", "foo").await;
    assert_eq!(answer.headers["grpc-status"], "7");
    site.saw("/test.Echo/Refuse", ["called", "Completed"]).await;
    let answer = site.grpc("/test.Echo/Break", "foo").await;
    assert_eq!(answer.trailers.unwrap()["grpc-status"], "15");
    site.saw("/test.Echo/Break", ["called", "Completed"]).await;
}

#[tokio::test]
async fn a_grpc_call_that_is_cancelled_is_a_disconnect() {
    for path in ["/test.Echo/Hang", "/test.Echo/HangAfterOne"] {
        let mut site = Site::tonic().await;
        let mut client = site.server.h2().await;
        let (response, mut request) = client.open(grpc_request(path), false).await;
        request.send_data(grpc_message("foo"), true).unwrap();
        if path == "/test.Echo/Hang" {
            site.saw(path, ["called"]).await;
        } else {
            let mut response = response.await.unwrap();
            assert_eq!(response.body_mut().data().await.unwrap().unwrap(), grpc_message("foo"));
            site.saw(path, ["called"]).await;
        }
        request.send_reset(h2::Reason::CANCEL);
        site.saw(path, ["Disconnected"]).await;
    }
}

// What the tests share.

type Reply = Response<UnsyncBoxBody<Bytes, BoxError>>;
type Feed = UnboundedSender<Result<Frame<Bytes>, BoxError>>;

/// A server, and what is seen of it.
struct Site {
    server: Server,
    seen: Events<String>,
    /// What feeds the bodies of a site that is fed.
    bodies: Option<Events<Feed>>,
}

impl Site {
    /// Of a service inside of the layer.
    async fn with<S, B>(protocol: Protocol, service: impl FnOnce(Tell) -> S) -> Self
    where
        S: Service<Request<Incoming>, Response = Response<B>> + Clone + Send + 'static,
        S::Future: Send,
        S::Error: Into<BoxError>,
        B: Body<Data: Send, Error: Into<BoxError>> + Send + 'static,
    {
        let (tell, seen) = events();
        let service = ResponseEndLayer::new(TellEnd(tell.clone())).layer(service(tell));
        Self { server: Server::hyper(protocol, service).await, seen, bodies: None }
    }

    /// Of a function inside of the layer.
    async fn new<F>(
        protocol: Protocol,
        handler: impl Fn(Request<Incoming>, Teller) -> F + Clone + Send + 'static,
    ) -> Self
    where
        F: Future<Output = Reply> + Send,
    {
        Self::with(protocol, |tell| {
            service_fn(move |request| {
                let teller = Teller::of(&tell, &request);
                teller.say("called");
                let response = handler(request, teller);
                async { Ok::<_, Infallible>(response.await) }
            })
        })
        .await
    }

    /// Where each body is what `script` returns.
    async fn scripted(
        protocol: Protocol,
        status: u16,
        script: impl Fn() -> Script + Clone + Send + 'static,
    ) -> Self {
        Self::new(protocol, move |_, teller| ready(reply(status, script().told_by(teller)))).await
    }

    /// Where the test feeds the bodies.
    async fn fed(protocol: Protocol) -> Self {
        let (feeds, bodies) = events();
        let mut site = Self::new(protocol, move |_, _| {
            let (feed, body) = unbounded_channel();
            feeds.send(feed).unwrap();
            ready(reply(200, StreamBody::new(UnboundedReceiverStream::new(body))))
        })
        .await;
        site.bodies = Some(bodies);
        site
    }

    /// Where a connection that is upgraded with `status` echoes, and its response is held or not.
    async fn echo(protocol: Protocol, status: u16, held: bool) -> Self {
        Self::new(protocol, move |request, _| {
            if request.uri().path() == "/not/an/upgrade" {
                return ready(reply(204, Empty::new()));
            }
            let held = held.then(|| hold().unwrap());
            tokio::spawn(async move {
                let _held = held;
                let mut connection = TokioIo::new(hyper::upgrade::on(request).await.unwrap());
                let mut buffer = [0; 16];
                loop {
                    match connection.read(&mut buffer).await.unwrap() {
                        0 => break connection.shutdown().await,
                        len => connection.write_all(&buffer[..len]).await.unwrap(),
                    }
                }
            });
            let mut response = reply(status, Empty::new());
            if status == 101 {
                let upgrade = header::HeaderValue::from_static("upgrade");
                response.headers_mut().insert(header::CONNECTION, upgrade);
                response.headers_mut().insert(header::UPGRADE, "echo".parse().unwrap());
            }
            ready(response)
        })
        .await
    }

    /// Of an axum router, served by axum.
    async fn axum(router: Router) -> Self {
        let (tell, seen) = events();
        let router = router.layer(ResponseEndLayer::new(TellEnd(tell)));
        let server =
            Server::host(async |listener| axum::serve(listener, router).await.unwrap()).await;
        Self { server, seen, bodies: None }
    }

    /// Of a gRPC service, served by tonic.
    async fn tonic() -> Self {
        let (tell, seen) = events();
        let router = tonic::transport::Server::builder()
            .layer(ResponseEndLayer::new(TellEnd(tell.clone())))
            .add_service(Echo(tell));
        let server = Server::host(async |listener| {
            router.serve_with_incoming(TcpListenerStream::new(listener)).await.unwrap();
        })
        .await;
        Self { server, seen, bodies: None }
    }

    /// These are the next events at `path`, and no others come before or between them.
    async fn saw(&mut self, path: &str, events: impl IntoIterator<Item = &'static str>) {
        for event in events {
            assert_eq!(self.seen.wait().await, format!("{path} {event}"));
        }
    }

    /// There were no events that are not in `saw`.
    #[track_caller]
    fn saw_nothing(&mut self) {
        assert_eq!(self.seen.so_far(), [""; 0]);
    }

    /// What feeds the next body.
    async fn body(&mut self) -> Feed {
        self.bodies.as_mut().unwrap().wait().await
    }

    /// A client that has seen the first frame of a body that is fed.
    async fn opened(&mut self, path: &str) -> (Raw, Feed) {
        let mut client = self.server.raw().await;
        client.write(format!("GET {path} HTTP/1.1\r\nhost: x\r\n\r\n")).await;
        self.saw(path, ["called"]).await;
        let body = self.body().await;
        body.send(Ok(Frame::data("foo".into()))).unwrap();
        client.read_until("\r\nfoo\r\n").await;
        (client, body)
    }

    /// A client sends a part of its request to [`uploaded`] and leaves.
    async fn upload_and_leave(&mut self, path: &str, leave: fn(Raw)) {
        let mut client = self.server.raw().await;
        client
            .write(format!("POST {path} HTTP/1.1\r\nhost: x\r\ncontent-length: 9\r\n\r\nfoo"))
            .await;
        self.saw(path, ["called"]).await;
        if path == "/reads" {
            self.saw(path, ["read"]).await;
        }
        leave(client);
        if path == "/reads" {
            self.saw(path, ["could not read"]).await;
        }
    }

    async fn grpc(&self, path: &str, message: &str) -> Answer {
        let mut client = self.server.h2().await;
        let (response, mut request) = client.open(grpc_request(path), false).await;
        request.send_data(grpc_message(message), true).unwrap();
        Answer::read(response.await.unwrap()).await
    }
}

type Tell = UnboundedSender<String>;

/// Tells what happens to one request.
#[derive(Clone)]
struct Teller {
    tell: Tell,
    path: String,
}

impl Teller {
    fn of<B>(tell: &Tell, request: &Request<B>) -> Self {
        Self { tell: tell.clone(), path: request.uri().path().to_owned() }
    }

    fn say(&self, what: impl fmt::Display) {
        // The test may be over.
        drop(self.tell.send(format!("{} {what}", self.path)));
    }
}

/// Tells how the response ends.
#[derive(Clone)]
struct TellEnd(Tell);

impl<B> MakeOnEnd<Request<B>> for TellEnd {
    type OnEnd = Box<dyn FnOnce(End) + Send>;

    fn make_on_end(&self, request: &Request<B>) -> Self::OnEnd {
        let teller = Teller::of(&self.0, request);
        Box::new(move |end| teller.say(format_args!("{end:?}")))
    }
}

/// Sends a request for a connection that does not stay, and reads to its end.
async fn fetch(site: &Site, request: &str) -> String {
    let mut client = site.server.raw().await;
    client.write(format!("{request}\r\nhost: x\r\nconnection: close\r\n\r\n")).await;
    client.rest().await
}

async fn fetch_h2(site: &Site, method: &str, path: &str) -> Answer {
    let mut client = site.server.h2().await;
    let response = client.send(request_h2(method, path)).await.await.unwrap();
    Answer::read(response).await
}

struct Answer {
    status: u16,
    headers: HeaderMap,
    data: Bytes,
    trailers: Option<HeaderMap>,
}

impl Answer {
    async fn read(response: Response<h2::RecvStream>) -> Self {
        let (head, mut body) = response.into_parts();
        let (data, trailers) = read_all(&mut body).await.unwrap();
        Self { status: head.status.as_u16(), headers: head.headers, data, trailers }
    }
}

fn request_h2(method: &str, path: &str) -> Request<()> {
    Request::builder().method(method).uri(format!("http://x{path}")).body(()).unwrap()
}

fn half_closed() -> Protocol {
    let mut builder = conn::http1::Builder::new();
    builder.half_close(true);
    Protocol::Http1(builder)
}

fn reply(
    status: u16,
    body: impl Body<Data = Bytes, Error: Into<BoxError>> + Send + 'static,
) -> Reply {
    let body = UnsyncBoxBody::new(body.map_err(Into::into));
    Response::builder().status(status).body(body).unwrap()
}

/// A handler that waits before it answers, and at `/reads` reads the request before that.
async fn uploaded<B>(request: Request<B>, teller: Teller, release: Arc<Notify>) -> Reply
where
    B: Body<Error: fmt::Debug> + Unpin,
{
    if request.uri().path() == "/reads" {
        let mut body = request.into_body();
        while let Some(frame) = body.frame().await {
            teller.say(if frame.is_ok() { "read" } else { "could not read" });
        }
        release.notified().await;
    } else {
        // Here the body is kept: to drop it would not help.
        release.notified().await;
        drop(request);
    }
    reply(200, Full::from("foo"))
}

fn checksum() -> HeaderMap {
    let mut trailers = HeaderMap::new();
    trailers.insert("x-checksum", 7.into());
    trailers
}

#[derive(Clone, Copy)]
enum Step {
    Data(&'static str),
    Trailers,
    Fail,
    Panic,
    /// Data without end.
    Flood,
}

/// A body that does what it is told, and tells what is done to it.
struct Script {
    steps: VecDeque<Step>,
    tells_its_end: bool,
    exact: Option<u64>,
    teller: Option<Teller>,
}

impl Script {
    fn new(steps: impl IntoIterator<Item = Step>) -> Self {
        Self { steps: steps.into_iter().collect(), tells_its_end: false, exact: None, teller: None }
    }

    fn tells_its_end(mut self) -> Self {
        self.tells_its_end = true;
        self
    }

    fn exact(mut self, exact: u64) -> Self {
        self.exact = Some(exact);
        self
    }

    fn told_by(mut self, teller: Teller) -> Self {
        self.teller = Some(teller);
        self
    }

    fn say(&self, what: &str) {
        if let Some(teller) = &self.teller {
            teller.say(what);
        }
    }
}

impl Body for Script {
    type Data = Bytes;
    type Error = BoxError;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        _: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BoxError>>> {
        self.say("polled");
        let frame = match self.steps.pop_front() {
            None => None,
            Some(Step::Data(data)) => Some(Ok(Frame::data(data.into()))),
            Some(Step::Trailers) => Some(Ok(Frame::trailers(checksum()))),
            Some(Step::Fail) => Some(Err("out of ink".into())),
            Some(Step::Panic) => panic!("in a poll of the body"),
            Some(Step::Flood) => {
                self.steps.push_front(Step::Flood);
                Some(Ok(Frame::data(vec![b'x'; 1 << 16].into())))
            }
        };
        Poll::Ready(frame)
    }

    fn is_end_stream(&self) -> bool {
        self.tells_its_end && self.steps.is_empty()
    }

    fn size_hint(&self) -> SizeHint {
        self.exact.map_or_else(SizeHint::new, SizeHint::with_exact)
    }
}

impl Drop for Script {
    fn drop(&mut self) {
        self.say("dropped");
    }
}

/// A gRPC service as tonic's generated code is, with messages of plain bytes.
#[derive(Clone)]
struct Echo(Tell);

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
        Teller::of(&self.0, &request).say("called");
        let method = request.uri().path().trim_start_matches("/test.Echo/").to_owned();
        Box::pin(async move {
            let mut grpc = tonic::server::Grpc::new(Plain);
            if method == "Unary" {
                let unary = service_fn(async |request: tonic::Request<Bytes>| {
                    Ok(tonic::Response::new(request.into_inner()))
                });
                return Ok(grpc.unary(unary, request).await);
            }
            let streaming = service_fn(async |request: tonic::Request<Bytes>| {
                let message = Ok(request.into_inner());
                let messages: Messages = match &*method {
                    "Stream" => Box::pin(tokio_stream::iter(vec![message; 3])),
                    "Refuse" => return Err(Status::permission_denied("no")),
                    "Break" => {
                        Box::pin(tokio_stream::iter([message, Err(Status::data_loss("gone"))]))
                    }
                    "Hang" => pending().await,
                    _ => Box::pin(tokio_stream::once(message).chain(tokio_stream::pending())),
                };
                Ok(tonic::Response::new(messages))
            });
            Ok(grpc.server_streaming(streaming, request).await)
        })
    }
}

fn grpc_request(path: &str) -> Request<()> {
    let mut request = request_h2("POST", path);
    request
        .headers_mut()
        .insert(header::CONTENT_TYPE, header::HeaderValue::from_static("application/grpc"));
    request.headers_mut().insert(header::TE, header::HeaderValue::from_static("trailers"));
    request
}

/// Not compressed, and its length in four bytes.
fn grpc_message(message: &str) -> Bytes {
    let mut framed = vec![0];
    framed.extend(u32::try_from(message.len()).unwrap().to_be_bytes());
    framed.extend(message.as_bytes());
    framed.into()
}
