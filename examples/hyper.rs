//! The layers under hyper, without a framework.
//!
//! `cargo run --example hyper` prints what happens, over real sockets. It checks all that it shows,
//! and exits with 0 only if everything came out as it should.

#![expect(clippy::print_stdout, reason = "it shows what happens")]

use std::{error::Error, net::Ipv4Addr, time::Duration};

use bytes::Bytes;
use http::{Request, Response};
use http_body_util::Full;
use hyper::body::Incoming;
use hyper_util::{
    rt::{TokioExecutor, TokioIo, TokioTimer},
    server::conn::auto,
    service::TowerToHyperService,
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    sync::Notify,
};
use tower::{ServiceBuilder, service_fn};
use tower_tasks::{
    AtEnd, CatchUnwindLayer, SpawnError, TaskRegistry, TaskSet, TaskSetLayer,
    task_set::{Cause, TaskError, assert_drained},
};

type Result<T = (), E = Box<dyn Error + Send + Sync>> = std::result::Result<T, E>;

static MAILED: Notify = Notify::const_new();

async fn handle(request: Request<Incoming>) -> Result<Response<Full<Bytes>>, SpawnError> {
    let tasks = TaskSet::current().map_err(|_| SpawnError::Closed)?;
    if request.uri().path() == "/slow" {
        let query = tasks.task("query").at_end(AtEnd::Cancel).spawn(std::future::pending::<()>())?;
        if let Err(error) = query.await {
            assert!(matches!(error, TaskError::Cancelled(Cause::TimedOut)), "{error}");
        }
    }
    tasks.spawn("mail", async {
        MAILED.notified().await;
        println!("    mailed");
    })?;
    Ok(Response::new("accepted".into()))
}

#[tokio::main]
async fn main() -> Result {
    let tasks = TaskRegistry::new();
    let service = ServiceBuilder::new()
        .layer(CatchUnwindLayer::new())
        .layer(TaskSetLayer::new(&tasks).deadline(Duration::from_millis(300)))
        .service(service_fn(handle));
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await?;
    let address = listener.local_addr()?;
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            let service = TowerToHyperService::new(service.clone());
            tokio::spawn(async move {
                let mut builder = auto::Builder::new(TokioExecutor::new());
                // Without a timer, which it needs for that, a client could take for ever.
                let timer = TokioTimer::new();
                builder.http1().timer(timer).header_read_timeout(Duration::from_millis(200));
                drop(builder.serve_connection(TokioIo::new(stream), service).await);
            });
        }
    });
    let get = async |path: &str| -> Result<String> {
        let mut stream = TcpStream::connect(address).await?;
        let request = format!("GET {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n");
        stream.write_all(request.as_bytes()).await?;
        let mut response = String::new();
        stream.read_to_string(&mut response).await?;
        Ok(response)
    };

    println!("A reply, and a task that goes on after it");
    let response = get("/").await?;
    assert!(response.starts_with("HTTP/1.1 200 ") && response.ends_with("accepted"), "{response}");
    println!("    {}", tasks.snapshot().live_tasks[0]);
    MAILED.notify_one();

    println!("A request that takes too long");
    let response = get("/slow").await?;
    assert!(response.starts_with("HTTP/1.1 504 "), "{response}");
    println!("    {}", response.lines().next_back().unwrap_or_default());

    println!("A client that never ends its head");
    let mut stream = TcpStream::connect(address).await?;
    stream.write_all(b"GET / HTTP/1.1\r\nhost: ").await?;
    let read = stream.read_to_end(&mut Vec::new()).await?;
    println!("    closed after {read} bytes");

    tasks.close();
    tasks.wait().await;
    assert_drained(&tasks);
    let by_name = tasks.snapshot().by_name;
    assert_eq!((by_name["mail"].completed, by_name["query"].cancelled), (1, 1));
    println!("The ledger\n    {:?}", tasks.snapshot().totals);
    Ok(())
}
