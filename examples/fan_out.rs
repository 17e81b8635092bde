//! A request that asks three services at once, and lets go of the others as soon as one fails or
//! the client has left.
//!
//! `cargo run --example fan_out` prints what happens, over real sockets. It checks all that it
//! shows, and exits with 0 only if everything came out as it should.

#![expect(clippy::print_stdout, clippy::print_stderr, reason = "it shows what happens")]

use std::{
    error::Error,
    fmt,
    net::{Ipv4Addr, SocketAddr},
    process::ExitCode,
    time::Duration,
};

use axum::{
    Router,
    body::Bytes,
    extract::{Path, State},
    http::{Request, Response, StatusCode},
    response::IntoResponse,
    routing::get,
};
use http_body_util::{BodyExt, Empty};
use hyper::body::Incoming;
use hyper_util::{
    client::legacy::{self, connect::HttpConnector},
    rt::TokioExecutor,
};
use tokio::{
    net::TcpListener,
    sync::{mpsc, oneshot},
    time::timeout,
};
use tower_tasks::{TaskRegistry, TaskSet, TaskSetLayer, task_set::assert_drained};

type Result<T = (), E = Box<dyn Error>> = std::result::Result<T, E>;

// ---- The shop. A request for a quote asks the three services at once.

async fn quote(State(services): State<Services>, tasks: TaskSet) -> Result<String, QuoteError> {
    let group = tasks.try_group();
    let price = group.spawn("price", services.clone().ask("price"))?;
    let stock = group.spawn("stock", services.clone().ask("stock"))?;
    let shipping = group.spawn("shipping", services.ask("shipping"))?;
    group.wait().await?;
    Ok(format!("{} in stock, at {} and {}", stock.await?, price.await?, shipping.await?))
}

#[derive(Clone)]
struct Services {
    address: SocketAddr,
    http: legacy::Client<HttpConnector, Empty<Bytes>>,
}

impl Services {
    async fn ask(self, what: &'static str) -> Result<String, String> {
        let response = get_from(&self.http, self.address, what).await.map_err(|e| e.to_string())?;
        match response.status() {
            StatusCode::OK => text(response).await.map_err(|error| error.to_string()),
            status => Err(format!("it answered {status}")),
        }
    }
}

#[derive(Debug)]
struct QuoteError(String);

impl<E: fmt::Display> From<E> for QuoteError {
    fn from(error: E) -> Self {
        Self(error.to_string())
    }
}

impl IntoResponse for QuoteError {
    fn into_response(self) -> axum::response::Response {
        (StatusCode::BAD_GATEWAY, self.0).into_response()
    }
}

// ---- The services. They answer when the story says so, and notice who does not wait for it.

struct Asked {
    what: String,
    answer: oneshot::Sender<Option<&'static str>>,
}

async fn service(
    Path(what): Path<String>,
    State(story): State<mpsc::UnboundedSender<Asked>>,
) -> Result<&'static str, StatusCode> {
    let (answer, answered) = oneshot::channel();
    let _ = story.send(Asked { what, answer });
    answered.await.ok().flatten().ok_or(StatusCode::SERVICE_UNAVAILABLE)
}

// ---- The story: who does what, and what must come of it.

async fn run() -> Result {
    let (tell, mut asked) = mpsc::unbounded_channel();
    let address = serve(Router::new().route("/{what}", get(service)).with_state(tell)).await?;
    let http = legacy::Client::builder(TokioExecutor::new()).build_http();

    let tasks = TaskRegistry::new();
    let services = Services { address, http: http.clone() };
    let shop = Router::new().route("/quote", get(quote)).with_state(services);
    let shop = serve(shop.layer(TaskSetLayer::new(&tasks))).await?;

    println!("(a) All three answer.");
    let client = tokio::spawn(get_from_owned(http.clone(), shop));
    for (at, question) in three(&mut asked).await?.into_iter().enumerate() {
        let _ = question.answer.send(Some(["7.20", "4.90", "35"][at]));
    }
    let response = client.await??;
    check("the client has its quote", response.status() == StatusCode::OK)?;
    check("of all three", text(response).await? == "35 in stock, at 7.20 and 4.90")?;

    println!("(b) One fails, and the request does not wait for the others.");
    let client = tokio::spawn(get_from_owned(http.clone(), shop));
    let [price, shipping, stock] = three(&mut asked).await?;
    let _ = stock.answer.send(None);
    let response = client.await??;
    check("the client is told so", response.status() == StatusCode::BAD_GATEWAY)?;
    let told = text(response).await?;
    println!("    {told}");
    check("which one, and why", told.contains("`stock` failed") && told.contains("503"))?;
    given_up(price).await?;
    given_up(shipping).await?;

    println!("(c) One has answered when the client leaves.");
    let client = tokio::spawn(get_from_owned(http.clone(), shop));
    let [price, shipping, stock] = three(&mut asked).await?;
    let _ = price.answer.send(Some("7.20"));
    while tasks.len() > 2 {
        tokio::task::yield_now().await;
    }
    client.abort();
    given_up(shipping).await?;
    given_up(stock).await?;

    tasks.close();
    timeout(Duration::from_secs(10), tasks.wait()).await?;
    assert_drained(&tasks);
    println!("The ledger.");
    let ledger = tasks.snapshot();
    let rows: Vec<_> =
        ledger.by_name.iter().map(|(name, of)| (*name, of.completed, of.cancelled)).collect();
    for (name, completed, cancelled) in &rows {
        println!("    {name:9} completed {completed}, cancelled {cancelled}");
    }
    // An error is a result, too.
    let expected = [("price", 2, 1), ("shipping", 1, 2), ("stock", 2, 1)];
    check("every task came to the end that it should have", rows == expected)?;
    check("and each was counted once", ledger.totals.is_exact() && ledger.totals.attempted == 9)
}

async fn serve(router: Router) -> Result<SocketAddr> {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await?;
    let address = listener.local_addr()?;
    tokio::spawn(axum::serve(listener, router).into_future());
    Ok(address)
}

async fn get_from(
    http: &legacy::Client<HttpConnector, Empty<Bytes>>,
    server: SocketAddr,
    path: &str,
) -> Result<Response<Incoming>, legacy::Error> {
    let request = Request::get(format!("http://{server}/{path}")).body(Empty::new());
    http.request(request.expect("a path")).await
}

async fn get_from_owned(
    http: legacy::Client<HttpConnector, Empty<Bytes>>,
    shop: SocketAddr,
) -> Result<Response<Incoming>, legacy::Error> {
    get_from(&http, shop, "quote").await
}

async fn text(response: Response<Incoming>) -> Result<String> {
    Ok(String::from_utf8(response.into_body().collect().await?.to_bytes().to_vec())?)
}

/// What the three services are asked, in the order of their names.
async fn three(asked: &mut mpsc::UnboundedReceiver<Asked>) -> Result<[Asked; 3]> {
    let mut questions = Vec::new();
    for _ in 0..3 {
        let next = timeout(Duration::from_secs(10), asked.recv()).await?;
        questions.push(next.ok_or("the services are gone")?);
    }
    questions.sort_by(|a, b| a.what.cmp(&b.what));
    questions.try_into().map_err(|_| "three were asked".into())
}

/// Nobody waits for this answer any more.
async fn given_up(mut question: Asked) -> Result {
    let gone = timeout(Duration::from_secs(10), question.answer.closed()).await;
    check(&format!("the question to `{}` is given up", question.what), gone.is_ok())
}

fn check(what: &str, holds: bool) -> Result {
    println!("  {} {what}", if holds { "ok" } else { "NO" });
    if holds { Ok(()) } else { Err(format!("not so: {what}").into()) }
}

#[tokio::main]
async fn main() -> ExitCode {
    match timeout(Duration::from_secs(60), run()).await {
        Ok(Ok(())) => ExitCode::SUCCESS,
        Ok(Err(error)) => {
            eprintln!("{error}");
            ExitCode::FAILURE
        }
        Err(_) => {
            eprintln!("it hangs");
            ExitCode::FAILURE
        }
    }
}
