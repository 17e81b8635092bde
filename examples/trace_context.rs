//! What W3C's [validation suite](https://github.com/w3c/trace-context/tree/main/test) for Trace
//! Context drives: a service that calls whatever it is told to, each call from a task of its own.
//!
//! ```text
//! PORT=5000 cargo run --release --example trace_context
//!
//! SPEC_LEVEL=2 STRICT_LEVEL=2 python3 test.py http://127.0.0.1:5000/test
//! curl -i localhost:5000/test -d '[{"url": "http://localhost:7777/", "arguments": []}]'
//! ```
//!
//! `/test` continues the caller's trace, as behind a gateway; `/untrusted` begins a new one, as at
//! a public edge. Both answer `{}` when all calls have been answered.

#![expect(clippy::print_stdout, clippy::print_stderr, reason = "it is a program")]

use std::{env, error::Error, net::Ipv4Addr, process::ExitCode};

use axum::{
    Router,
    body::{Body, Bytes},
    extract::State,
    http::{Request, StatusCode, Uri, header::CONTENT_TYPE},
    response::Result,
    routing::post,
};
use hyper_util::{
    client::legacy::{Client, connect::HttpConnector},
    rt::TokioExecutor,
};
use serde::Deserialize;
use serde_json::Value;
use tokio::net::TcpListener;
use tower::{Layer, ServiceExt};
use tower_tasks::{
    PropagateLayer, TaskRegistry, TaskSet, TaskSetLayer, TraceIdLayer,
    trace_id::{Propagate, Trust},
};

type Propagating = Propagate<Client<HttpConnector, Body>>;

#[derive(Deserialize)]
struct Call {
    url: String,
    arguments: Value,
}

fn router(tasks: &TaskRegistry) -> Router {
    let client = Client::builder(TokioExecutor::new()).build_http();
    let route = |path, trust| {
        let layers = (TraceIdLayer::new().trust(trust), TaskSetLayer::new(tasks));
        Router::new().route(path, post(call_all)).layer(layers)
    };
    route("/test", Trust::Continue)
        .merge(route("/untrusted", Trust::Restart))
        .with_state(PropagateLayer::new().layer(client))
}

async fn call_all(
    tasks: TaskSet,
    State(client): State<Propagating>,
    body: Bytes,
) -> Result<&'static str> {
    let calls: Vec<Call> =
        serde_json::from_slice(&body).map_err(|error| because(StatusCode::BAD_REQUEST, &error))?;
    let mut handles = Vec::with_capacity(calls.len());
    for call in calls {
        handles.push(tasks.spawn("call", send(client.clone(), call))?);
    }
    for handle in handles {
        let sent = handle.await.map_err(|error| because(StatusCode::BAD_GATEWAY, &error))?;
        sent.map_err(|error| because(StatusCode::BAD_GATEWAY, &*error))?;
    }
    Ok("{}")
}

fn because(status: StatusCode, error: &dyn Error) -> (StatusCode, String) {
    (status, format!("{error}\n"))
}

/// The layer on the client adds the headers: here, where the task's context is current.
async fn send(
    client: Propagating,
    Call { url, arguments }: Call,
) -> Result<(), Box<dyn Error + Send + Sync>> {
    let request = Request::post(Uri::try_from(url)?)
        .header(CONTENT_TYPE, "application/json")
        .body(Body::from(arguments.to_string()))?;
    client.oneshot(request).await?;
    Ok(())
}

async fn serve() -> Result<(), Box<dyn Error>> {
    let port = env::var("PORT").map_or(Ok(5_000), |port| port.parse())?;
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, port)).await?;
    println!("listening on http://{}", listener.local_addr()?);
    Ok(axum::serve(listener, router(&TaskRegistry::new())).await?)
}

#[tokio::main]
async fn main() -> ExitCode {
    match serve().await {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("trace_context: {error}");
            ExitCode::FAILURE
        }
    }
}
