//! A server to play with: every route does something else with its tasks.
//!
//! ```text
//! PORT=3000 GRACE=25 TASK_LIMIT=10000 cargo run --example axum
//!
//! curl -d '' localhost:3000/orders                   # 202 at once; three tasks go on for 50 ms
//! curl -N 'localhost:3000/stream?n=5&every_ms=500'   # leave it with ^C: its task is cancelled
//! curl 'localhost:3000/slow?ms=2000'                 # something in flight
//! curl 'localhost:3000/panic?where=task'             # or handler, or body
//! curl localhost:3000/ready
//! curl localhost:3000/tasks                          # the ledger
//! ```
//!
//! All of it works with `curl --http2-prior-knowledge` too. SIGTERM or ^C stops it: requests and
//! tasks have `GRACE` seconds in all. It exits with 0 if they needed no more, else with 1; with 2
//! if a variable makes no sense.

#![expect(clippy::print_stdout, clippy::print_stderr, reason = "it is a program")]

use std::{
    env,
    fmt::Display,
    future,
    io::{self, IsTerminal},
    net::Ipv4Addr,
    ops::RangeInclusive,
    process::ExitCode,
    str::FromStr,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use axum::{
    Json, Router,
    body::Body,
    extract::{Query, Request, State},
    http::StatusCode,
    response,
    routing::{get, post},
};
use futures_util::{FutureExt, StreamExt, stream};
use serde::{Deserialize, Serialize};
use tokio::{
    net::TcpListener,
    sync::{mpsc, oneshot},
    time::{sleep, timeout},
};
use tokio_stream::wrappers::ReceiverStream;
use tower_tasks::{
    AtEnd, CatchUnwindLayer, End, RequestContext, ResponseEndLayer, SpawnError, SpawnLimit,
    TaskRegistry, TaskSet, TaskSetLayer, TraceIdLayer,
    catch_unwind::install_hook,
    request_context::{RequestId, TraceId},
    task_set::Snapshot,
};

#[derive(Clone)]
struct App {
    tasks: TaskRegistry,
    stopping: Arc<AtomicBool>,
}

fn router(app: App) -> Router {
    let layers = (
        TraceIdLayer::new(),
        CatchUnwindLayer::new(),
        ResponseEndLayer::new(|request: &Request| {
            let (method, path) = (request.method().clone(), request.uri().path().to_owned());
            move |end: End| tracing::info!(%method, path, ?end, "response")
        }),
        TaskSetLayer::new(&app.tasks),
    );
    Router::new()
        .route("/orders", post(create_order))
        .route("/stream", get(stream_ticks))
        .route("/slow", get(answer_slowly))
        .route("/panic", get(panic_somewhere))
        .route("/ready", get(ready))
        .route("/tasks", get(show_tasks))
        .with_state(app)
        .layer(layers)
}

#[derive(Serialize)]
struct Ids {
    request_id: Option<String>,
    trace_id: Option<String>,
}

/// Answers at once; the tasks have the 30 seconds of the default to finish.
async fn create_order(tasks: TaskSet) -> Result<(StatusCode, Json<Ids>), SpawnError> {
    for name in ["send_receipt", "write_audit_line", "warm_cache"] {
        tasks.spawn(name, sleep(Duration::from_millis(50)))?;
    }
    let context = RequestContext::current();
    let request_id = context.get::<RequestId>().map(ToString::to_string);
    let trace_id = context.get::<TraceId>().map(ToString::to_string);
    Ok((StatusCode::ACCEPTED, Json(Ids { request_id, trace_id })))
}

#[derive(Deserialize)]
struct Ticks {
    n: Option<u64>,
    every_ms: Option<u64>,
}

/// A stream, and the task that feeds it and dies with it.
async fn stream_ticks(
    tasks: TaskSet,
    Query(Ticks { n, every_ms }): Query<Ticks>,
) -> response::Result<Body> {
    let n = in_range("n", n.unwrap_or(10), 1..=10_000)?;
    let every_ms = in_range("every_ms", every_ms.unwrap_or(200), 0..=60_000)?;
    let (to_client, ticks) = mpsc::channel(1);
    let feeder = tasks.task("feed_stream").at_end(AtEnd::Cancel).spawn(async move {
        for tick in 1..=n {
            if tick > 1 {
                sleep(Duration::from_millis(every_ms)).await;
            }
            if to_client.send(Ok(format!("tick {tick} of {n}\n"))).await.is_err() {
                break;
            }
        }
    })?;
    // The end of the channel does not tell whether all was sent. A feeder that was cancelled, or
    // has panicked, makes the body end in an error: the client sees that it is cut off.
    let cut_off = feeder.into_stream().filter_map(|end| future::ready(end.err().map(Err)));
    Ok(Body::from_stream(ReceiverStream::new(ticks).chain(cut_off)))
}

#[derive(Deserialize)]
struct Slow {
    ms: Option<u64>,
}

async fn answer_slowly(Query(Slow { ms }): Query<Slow>) -> response::Result<String> {
    let ms = in_range("ms", ms.unwrap_or(1_000), 0..=60_000)?;
    sleep(Duration::from_millis(ms)).await;
    Ok(format!("after {ms} ms\n"))
}

fn in_range(
    name: &str,
    value: u64,
    range: RangeInclusive<u64>,
) -> Result<u64, (StatusCode, String)> {
    if range.contains(&value) {
        return Ok(value);
    }
    let text = format!("{name} must be from {} to {}\n", range.start(), range.end());
    Err((StatusCode::BAD_REQUEST, text))
}

#[derive(Deserialize)]
struct Panic {
    r#where: Where,
}

#[derive(Deserialize)]
#[serde(rename_all = "lowercase")]
enum Where {
    Handler,
    Body,
    Task,
}

/// A panic in the handler is answered with 500. One in the body cuts it off, so that the client can
/// tell: hyper closes the connection, or resets the stream. A task's panic is the task's alone.
async fn panic_somewhere(
    tasks: TaskSet,
    Query(Panic { r#where }): Query<Panic>,
) -> response::Result<(StatusCode, Body)> {
    match r#where {
        Where::Handler => panic!("in the handler, as you asked"),
        Where::Body => {
            let chunks = stream::iter(["some text, and then\n", ""]).map(|chunk| {
                assert!(!chunk.is_empty(), "in the body, as you asked");
                Ok::<_, SpawnError>(chunk)
            });
            Ok((StatusCode::OK, Body::from_stream(chunks)))
        }
        Where::Task => {
            tasks.spawn("panic", async { panic!("in a task, as you asked") })?;
            Ok((StatusCode::ACCEPTED, Body::from("the panic is in the log and in /tasks\n")))
        }
    }
}

/// axum closes its listener and its idle connections at the moment in which this turns to 503: to
/// let a load balancer see it takes a delay between the two.
async fn ready(State(app): State<App>) -> (StatusCode, &'static str) {
    if app.stopping.load(Ordering::Relaxed) {
        (StatusCode::SERVICE_UNAVAILABLE, "stopping")
    } else {
        (StatusCode::OK, "ready")
    }
}

async fn show_tasks(State(app): State<App>) -> Json<Snapshot> {
    Json(app.tasks.snapshot())
}

struct Settings {
    port: u16,
    grace: Duration,
    task_limit: usize,
}

impl Settings {
    fn from_env() -> Result<Self, String> {
        Ok(Self {
            port: variable("PORT", 3_000, 0..=u16::MAX)?,
            grace: Duration::from_secs(variable("GRACE", 25, 0..=3_600)?),
            task_limit: variable("TASK_LIMIT", 10_000, 0..=usize::MAX)?,
        })
    }
}

fn variable<T>(name: &str, default: T, range: RangeInclusive<T>) -> Result<T, String>
where
    T: FromStr + PartialOrd + Display,
{
    let Some(text) = env::var_os(name) else { return Ok(default) };
    match text.to_str().and_then(|text| text.parse().ok()) {
        Some(value) if range.contains(&value) => Ok(value),
        _ => {
            let (least, most) = range.into_inner();
            Err(format!(
                "{name} must be a whole number from {least} to {most}, and is {:?}",
                text.to_string_lossy()
            ))
        }
    }
}

/// Serves until it is told to stop. Whether all requests and tasks could finish within the grace.
async fn serve(settings: Settings) -> io::Result<bool> {
    let limit = SpawnLimit::new(settings.task_limit).per_request(64);
    let tasks = TaskRegistry::new().limit(limit);
    let app = App { tasks: tasks.clone(), stopping: Arc::default() };
    let stopping = app.stopping.clone();
    let stop_signal = stop_signal()?;

    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, settings.port)).await?;
    println!("listening on http://{}", listener.local_addr()?);
    let (stop, stopped) = oneshot::channel::<()>();
    let server = axum::serve(listener, router(app))
        .with_graceful_shutdown(async { stopped.await.unwrap_or_default() });
    let server = tokio::spawn(server.into_future());

    stop_signal.await;
    tracing::info!(grace = ?settings.grace, live = tasks.len(), "stopping");
    stopping.store(true, Ordering::Relaxed);
    let _ = stop.send(());
    // The last of the grace is for tasks that have to be cancelled, and their destructors. Each
    // part has a moment, even of no grace at all.
    let moment = Duration::from_millis(50);
    let last = (settings.grace / 5).clamp(moment, Duration::from_secs(1));
    let drain = async {
        let _ = server.await;
        tasks.close();
        tasks.wait().await;
    };
    let drained = timeout(settings.grace.saturating_sub(last).max(moment), drain).await.is_ok();
    if !drained {
        tasks.close();
        tasks.cancel_all();
        let _ = timeout(last, tasks.wait()).await;
    }
    println!("{}", serde_json::to_string_pretty(&tasks.snapshot())?);
    Ok(drained)
}

/// From now on signals are noted; the future is ready when one has come.
#[cfg(unix)]
fn stop_signal() -> io::Result<impl Future<Output = ()>> {
    use tokio::signal::unix::{SignalKind, signal};
    let (mut terminate, mut interrupt) =
        (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
    Ok(async move {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
    })
}

#[cfg(not(unix))]
fn stop_signal() -> io::Result<impl Future<Output = ()>> {
    Ok(tokio::signal::ctrl_c().map(drop))
}

#[tokio::main]
async fn main() -> ExitCode {
    install_hook(); // panics get their place in the log
    let settings = match Settings::from_env() {
        Ok(settings) => settings,
        Err(error) => {
            eprintln!("axum: {error}");
            return ExitCode::from(2);
        }
    };
    let log = tracing_subscriber::fmt().with_ansi(io::stderr().is_terminal());
    log.with_writer(io::stderr).init();
    match serve(settings).await {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => {
            eprintln!("axum: not all was done when the grace was over");
            ExitCode::FAILURE
        }
        Err(error) => {
            eprintln!("axum: {error}");
            ExitCode::FAILURE
        }
    }
}
