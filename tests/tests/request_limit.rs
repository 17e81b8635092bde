//! `RequestLimitLayer` over real sockets: a response counts until its last byte, or until its client
//! has left, and a request too many is answered.

#![allow(clippy::unwrap_used)]

use std::{
    convert::Infallible,
    pin::Pin,
    sync::{Arc, Mutex},
    task::{Context, Poll},
};

use bytes::Bytes;
use http::{Request, Response};
use http_body::{Body, Frame};
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};
use tokio_stream::{Stream, StreamExt, wrappers::TcpListenerStream};
use tonic::{Code, Status, server::NamedService, transport::Channel};
use tower::{Layer, Service, service_fn};
use tower_tasks::RequestLimitLayer;
use tower_tasks_tests::{Protocol, Server, http1, http2, read_all, soon};

use grpc::Plain;

mod grpc;

/// A body that yields what it is sent.
struct Fed(UnboundedReceiver<Bytes>);

impl Body for Fed {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        self.0.poll_recv(cx).map(|data| data.map(|data| Ok(Frame::data(data))))
    }
}

type Feeds = Arc<Mutex<Vec<UnboundedSender<Bytes>>>>;

/// A server that serves one request at once, whose bodies are fed.
async fn site(protocol: Protocol) -> (Server, RequestLimitLayer, Feeds) {
    let (limit, feeds) = (RequestLimitLayer::new(1), Feeds::default());
    let fed = feeds.clone();
    let service = limit.layer(service_fn(move |_: Request<hyper::body::Incoming>| {
        let (feed, body) = unbounded_channel();
        feed.send(Bytes::from_static(b"first")).unwrap();
        fed.lock().unwrap().push(feed);
        std::future::ready(Ok::<_, Infallible>(Response::new(Fed(body))))
    }));
    (Server::hyper(protocol, service).await, limit, feeds)
}

/// Waits until nothing is in use.
async fn is_free(limit: &RequestLimitLayer) {
    soon(async {
        while limit.in_use() > 0 {
            tokio::task::yield_now().await;
        }
    })
    .await;
}

const GET: &str = "GET / HTTP/1.1\r\nhost: x\r\n\r\n";

#[tokio::test]
async fn over_http_1_a_stream_counts_until_its_last_byte_or_its_clients_leaving() {
    let (server, limit, feeds) = site(http1()).await;
    let mut client = server.raw().await;
    client.write(GET).await;
    client.read_until("first\r\n").await;
    let mut other = server.raw().await;
    other.write(GET).await;
    let refused = other.read_head().await;
    assert!(refused.starts_with("HTTP/1.1 503 "), "{refused}");
    assert!(refused.contains("retry-after: 1\r\n"), "{refused}");
    assert!(refused.contains("content-type: application/problem+json\r\n"), "{refused}");
    other.read_until("}").await;
    assert_eq!((limit.in_use(), limit.refused()), (1, 1));

    feeds.lock().unwrap().clear();
    client.read_until("0\r\n\r\n").await;
    is_free(&limit).await;
    // On the same connection that was refused.
    other.write(GET).await;
    other.read_until("first\r\n").await;
    assert_eq!(limit.in_use(), 1);
    other.close();
    is_free(&limit).await;
    assert_eq!(limit.refused(), 1);
}

#[tokio::test]
async fn over_http_2_a_stream_counts_until_its_last_byte_or_its_clients_leaving() {
    let (server, limit, feeds) = site(http2()).await;
    let mut client = server.h2().await;
    let get = || Request::get("http://x/").body(()).unwrap();
    let mut first = soon(client.send(get()).await).await.unwrap().into_body();
    assert_eq!(soon(first.data()).await.unwrap().unwrap(), "first");
    let refused = soon(client.send(get()).await).await.unwrap();
    assert_eq!(
        (refused.status().as_u16(), &refused.headers()["retry-after"]),
        (503, &"1".parse().unwrap())
    );
    read_all(&mut refused.into_body()).await.unwrap();
    assert_eq!((limit.in_use(), limit.refused()), (1, 1));

    feeds.lock().unwrap().clear();
    read_all(&mut first).await.unwrap();
    is_free(&limit).await;
    let second = soon(client.send(get()).await).await.unwrap();
    assert_eq!((second.status().as_u16(), limit.in_use()), (200, 1));
    // Resets the stream.
    drop(second);
    is_free(&limit).await;
    assert_eq!(limit.refused(), 1);
}

/// A gRPC service with a stream that has no end.
#[derive(Clone)]
struct Endless;

impl NamedService for Endless {
    const NAME: &'static str = "test.Endless";
}

type Messages = Pin<Box<dyn Stream<Item = Result<Bytes, Status>> + Send>>;

impl Service<Request<tonic::body::Body>> for Endless {
    type Response = Response<tonic::body::Body>;
    type Error = Infallible;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response, Infallible>> + Send>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: Request<tonic::body::Body>) -> Self::Future {
        let service = service_fn(async |request: tonic::Request<Bytes>| {
            let first = tokio_stream::once(Ok(request.into_inner()));
            let messages: Messages = Box::pin(first.chain(tokio_stream::pending()));
            Ok(tonic::Response::new(messages))
        });
        Box::pin(async move {
            Ok(tonic::server::Grpc::new(Plain).server_streaming(service, request).await)
        })
    }
}

#[tokio::test]
async fn over_tonic_a_stream_counts_until_its_client_leaves_and_others_are_exhausted() {
    let limit = RequestLimitLayer::new(1);
    let router = tonic::transport::Server::builder().layer(limit.clone()).add_service(Endless);
    let server = Server::host(async |listener| {
        router.serve_with_incoming(TcpListenerStream::new(listener)).await.unwrap();
    })
    .await;
    let channel = Channel::from_shared(format!("http://{}", server.addr())).unwrap();
    let channel = channel.connect_lazy();
    let call = async || {
        let mut client = tonic::client::Grpc::new(channel.clone());
        soon(client.ready()).await.unwrap();
        let path = "/test.Endless/stream".parse().unwrap();
        let message = tonic::Request::new(Bytes::from_static(b"x"));
        soon(client.server_streaming(message, path, Plain)).await
    };
    let mut first = call().await.unwrap().into_inner();
    assert_eq!(soon(first.message()).await.unwrap().unwrap(), "x");
    let refused = call().await.unwrap_err();
    assert_eq!(refused.code(), Code::ResourceExhausted);
    assert_eq!((limit.in_use(), limit.refused()), (1, 1));
    drop(first);
    is_free(&limit).await;
    call().await.unwrap();
    assert_eq!(limit.refused(), 1);
}
