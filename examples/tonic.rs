//! The layers under tonic: a unary method, and one that streams.
//!
//! `cargo run --example tonic` prints what happens, over real sockets. It checks all that it shows,
//! and exits with 0 only if everything came out as it should. It needs no `protoc`: the messages are
//! bytes, and [`Greeter`] is what would be generated.

#![expect(clippy::print_stdout, reason = "it shows what happens")]

use std::{
    convert::Infallible,
    error::Error,
    future::Future,
    net::Ipv4Addr,
    pin::Pin,
    task::{Context, Poll},
    time::Duration,
};

use bytes::{Buf, BufMut, Bytes};
use http::{Request, Response};
use tokio::{net::TcpListener, sync::mpsc};
use tokio_stream::wrappers::{ReceiverStream, TcpListenerStream};
use tonic::{
    Code, Status,
    body::Body,
    client::Grpc,
    codec::{Codec, DecodeBuf, Decoder, EncodeBuf, Encoder},
    server::NamedService,
    transport::{Channel, Server},
};
use tower::{Service, service_fn};
use tower_tasks::{
    AtEnd, CatchUnwindLayer, TaskRegistry, TaskSet, TaskSetLayer, task_set::assert_drained,
};

type Result<T = (), E = Box<dyn Error + Send + Sync>> = std::result::Result<T, E>;

/// Greets whoever it is, and writes it down afterwards.
async fn greet(name: tonic::Request<Bytes>) -> Result<tonic::Response<Bytes>, Status> {
    let tasks = TaskSet::current().map_err(|error| Status::internal(error.to_string()))?;
    if name.get_ref() == "nobody" {
        std::future::pending::<()>().await;
    }
    tasks.spawn("audit", async { println!("    audited") }).map_err(|refused| {
        Status::new(i32::from(refused.reason.grpc_status()).into(), refused.reason.to_string())
    })?;
    Ok(tonic::Response::new(name.into_inner()))
}

/// Numbers, from a task that ends with its call.
async fn count(_: tonic::Request<Bytes>) -> Result<tonic::Response<Numbers>, Status> {
    let tasks = TaskSet::current().map_err(|error| Status::internal(error.to_string()))?;
    let (feed, numbers) = mpsc::channel(1);
    tasks
        .task("feed")
        .at_end(AtEnd::Cancel)
        .spawn(async move {
            for n in 0.. {
                let sent = feed.send(Ok(Bytes::from(format!("{n}")))).await;
                if sent.is_err() {
                    std::future::pending::<()>().await;
                }
            }
        })
        .map_err(|refused| Status::unavailable(refused.reason.to_string()))?;
    Ok(tonic::Response::new(ReceiverStream::new(numbers)))
}

type Numbers = ReceiverStream<Result<Bytes, Status>>;

#[tokio::main]
async fn main() -> Result {
    let tasks = TaskRegistry::new();
    let router = Server::builder()
        .layer(CatchUnwindLayer::new())
        .layer(TaskSetLayer::new(&tasks).deadline(Duration::from_millis(500)))
        .add_service(Greeter);
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await?;
    let address = listener.local_addr()?;
    tokio::spawn(router.serve_with_incoming(TcpListenerStream::new(listener)));
    let channel = Channel::from_shared(format!("http://{address}"))?.connect().await?;
    let mut client = Grpc::new(channel);

    println!("A unary call");
    client.ready().await?;
    let greeting =
        client.unary(tonic::Request::new("you".into()), "/Greeter/greet".parse()?, Messages);
    assert_eq!(greeting.await?.into_inner(), "you");

    println!("A call that takes longer than the server allows");
    client.ready().await?;
    let request = tonic::Request::new("nobody".into());
    let Err(status) = client.unary(request, "/Greeter/greet".parse()?, Messages).await else {
        return Err("it was answered".into());
    };
    assert_eq!(status.code(), Code::DeadlineExceeded);
    println!("    {}", status.message());

    println!("A stream whose client leaves after three numbers");
    client.ready().await?;
    let request = tonic::Request::new(Bytes::new());
    let numbers = client.server_streaming(request, "/Greeter/count".parse()?, Messages).await?;
    let mut numbers = numbers.into_inner();
    for expected in ["0", "1", "2"] {
        assert_eq!(numbers.message().await?.ok_or("it has ended")?, expected);
    }
    drop(numbers);

    tasks.close();
    tasks.wait().await;
    assert_drained(&tasks);
    let by_name = tasks.snapshot().by_name;
    assert_eq!((by_name["audit"].completed, by_name["feed"].cancelled), (1, 1));
    println!("The ledger\n    {:?}", tasks.snapshot().totals);
    Ok(())
}

// ---- What tonic's code generator would write.

#[derive(Clone)]
struct Greeter;

impl NamedService for Greeter {
    const NAME: &'static str = "Greeter";
}

impl Service<Request<Body>> for Greeter {
    type Response = Response<Body>;
    type Error = Infallible;
    type Future = Pin<Box<dyn Future<Output = Result<Response<Body>, Infallible>> + Send>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: Request<Body>) -> Self::Future {
        Box::pin(async {
            let mut grpc = tonic::server::Grpc::new(Messages);
            Ok(if request.uri().path() == "/Greeter/greet" {
                grpc.unary(service_fn(greet), request).await
            } else {
                grpc.server_streaming(service_fn(count), request).await
            })
        })
    }
}

/// Messages are bytes, as they are.
struct Messages;

impl Codec for Messages {
    type Encode = Bytes;
    type Decode = Bytes;
    type Encoder = Self;
    type Decoder = Self;

    fn encoder(&mut self) -> Self {
        Self
    }

    fn decoder(&mut self) -> Self {
        Self
    }
}

impl Encoder for Messages {
    type Item = Bytes;
    type Error = Status;

    fn encode(&mut self, message: Bytes, to: &mut EncodeBuf<'_>) -> Result<(), Status> {
        to.put(message);
        Ok(())
    }
}

impl Decoder for Messages {
    type Item = Bytes;
    type Error = Status;

    fn decode(&mut self, from: &mut DecodeBuf<'_>) -> Result<Option<Bytes>, Status> {
        Ok(Some(from.copy_to_bytes(from.remaining())))
    }
}
