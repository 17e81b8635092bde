//! A server to play with: every route does something else with its tasks.
//!
//! ```text
//! PORT=3000 GRACE=25 TASK_LIMIT=10000 REPORT_LIMIT=10 REPORT_TIME=10 cargo run --example axum
//!
//! curl -d '' localhost:3000/orders                   # 202 at once; three tasks go on for 50 ms
//! curl -id '' 'localhost:3000/reports?ms=5000'       # ten at once; then 503, with Retry-After
//! curl -N 'localhost:3000/stream?n=5&every_ms=500'   # leave it with ^C: its task is cancelled
//! curl 'localhost:3000/slow?ms=2000'                 # something in flight
//! curl 'localhost:3000/panic?where=task'             # or handler, or body
//! curl -N localhost:3000/events                      # has no end but that of the server
//! curl -o all localhost:3000/download?mb=100         # read it as slowly as you like
//! websocat ws://localhost:3000/echo                  # a socket, which ends with the server too
//! curl localhost:3000/ready
//! curl localhost:3000/tasks                          # the ledger
//! curl localhost:3000/limit                          # that of reports
//! ```
//!
//! All of it works with `curl --http2-prior-knowledge` too. SIGTERM or ^C stops it: `/ready` is 503
//! from then on; it serves on for `SETTLE` seconds, none by default, so that a load balancer can see
//! that; requests and tasks have `GRACE` seconds in all. It prints the report and the ledger, and
//! exits with 0 if nothing had to be forced, else with 1; with 2 if a variable makes no sense. Add
//! `?stay=true` to `/events` or `/echo` for one that does not look at the shutdown.

#![expect(clippy::print_stderr, reason = "it is a program")]

use std::{
    env,
    error::Error,
    fmt::Display,
    future,
    io::{self, IsTerminal, Write},
    net::Ipv4Addr,
    ops::RangeInclusive,
    process::ExitCode,
    str::FromStr,
    time::Duration,
};

use axum::{
    Json, Router,
    body::Body,
    extract::{
        MatchedPath, Query, Request, State,
        ws::{Message, WebSocketUpgrade},
    },
    http::StatusCode,
    response::{
        self, IntoResponse, Response, Sse,
        sse::{Event, KeepAlive},
    },
    routing::{get, post},
};
use futures_util::{FutureExt, StreamExt, stream};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use tokio::{
    net::TcpListener,
    sync::mpsc,
    time::{interval, sleep},
};
use tokio_stream::wrappers::ReceiverStream;
use tower_tasks::{
    AtEnd, CatchUnwindLayer, End, Report, RequestContext, ResponseEndLayer, Shutdown,
    ShutdownWatch, SpawnError, SpawnLimit, SpawnLimitLayer, TaskRegistry, TaskSet, TaskSetLayer,
    TraceIdLayer,
    catch_unwind::install_hook,
    request_context::{RequestId, TraceId},
    shutdown::PlanError,
    task_set::Snapshot,
};

#[derive(Clone)]
pub(crate) struct App {
    pub(crate) tasks: TaskRegistry,
    shutdown: ShutdownWatch,
    pub(crate) reports: SpawnLimit,
    report_time: Duration,
}

fn router(app: App, shutdown: &Shutdown) -> Router {
    let limited = SpawnLimitLayer::new(app.reports.clone());
    let layers = (
        TraceIdLayer::new(),
        CatchUnwindLayer::new(),
        shutdown.layer().route(|request| {
            let matched = request.extensions.get::<MatchedPath>()?;
            Some(matched.as_str().to_owned().into())
        }),
        ResponseEndLayer::new(|request: &Request| {
            let (method, path) = (request.method().clone(), request.uri().path().to_owned());
            move |end: End| tracing::info!(%method, path, ?end, "response")
        }),
        TaskSetLayer::new(&app.tasks),
    );
    Router::new()
        .route("/orders", post(create_order))
        .route("/reports", post(make_report).layer(limited))
        .route("/stream", get(stream_ticks))
        .route("/slow", get(answer_slowly))
        .route("/events", get(send_events))
        .route("/download", get(download))
        .route("/echo", get(echo))
        .route("/panic", get(panic_somewhere))
        .route("/ready", get(ready))
        .route("/tasks", get(show_tasks))
        .route("/limit", get(show_limit))
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
struct MakeReport {
    ms: Option<u64>,
    #[serde(default)]
    panics: bool,
}

/// A report is much work: only so many are made at once, and none for too long. Whoever comes when
/// there is no room is told to come again.
async fn make_report(
    tasks: TaskSet,
    State(App { report_time, .. }): State<App>,
    Query(MakeReport { ms, panics }): Query<MakeReport>,
) -> response::Result<StatusCode> {
    let ms = in_range("ms", ms.unwrap_or(500), 0..=60_000)?;
    tasks.task("make_report").timeout(report_time).spawn(async move {
        sleep(Duration::from_millis(ms)).await;
        assert!(!panics, "in a report, as you asked");
    })?;
    Ok(StatusCode::ACCEPTED)
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
    let n = in_range("n", n.unwrap_or(10), 0..=1_000_000)?;
    let every_ms = in_range("every_ms", every_ms.unwrap_or(200), 0..=60_000)?;
    let (to_client, ticks) = mpsc::channel(1);
    let feeder = tasks.task("feed_stream").at_end(AtEnd::Cancel).spawn(async move {
        for tick in 1..=n {
            if tick > 1 {
                sleep(Duration::from_millis(every_ms)).await;
            }
            if to_client.send(Ok(format!("tick {tick} of {n}\n"))).await.is_err() {
                // The client has left. To return now would be to have completed.
                future::pending::<()>().await;
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

/// A shutdown waits for the answer, and for the task that it leaves behind.
async fn answer_slowly(
    tasks: TaskSet,
    Query(Slow { ms }): Query<Slow>,
) -> response::Result<String> {
    let ms = in_range("ms", ms.unwrap_or(1_000), 0..=60_000)?;
    tasks.spawn("log_slow_answer", sleep(Duration::from_millis(ms + 50)))?;
    sleep(Duration::from_millis(ms)).await;
    Ok(format!("after {ms} ms\n"))
}

#[derive(Deserialize)]
struct Stay {
    #[serde(default)]
    stay: bool,
}

/// One event a second, until the server stops accepting.
async fn send_events(
    State(App { shutdown, .. }): State<App>,
    Query(Stay { stay }): Query<Stay>,
) -> Response {
    let ticks = stream::unfold(interval(Duration::from_secs(1)), async |mut ticks| {
        ticks.tick().await;
        Some((Ok::<_, SpawnError>(Event::default().data("tick")), ticks))
    });
    if stay {
        return Sse::new(ticks).keep_alive(KeepAlive::default()).into_response();
    }
    let events = ticks.take_until(shutdown.draining());
    Sse::new(events).keep_alive(KeepAlive::default()).into_response()
}

#[derive(Deserialize)]
struct Size {
    mb: Option<u64>,
}

async fn download(Query(Size { mb }): Query<Size>) -> response::Result<Body> {
    const CHUNK: &[u8] = &[b'x'; 1 << 16];
    let mb = in_range("mb", mb.unwrap_or(1), 0..=10_000)?;
    let chunks = stream::iter((0..mb * 16).map(|_| Ok::<_, SpawnError>(CHUNK)));
    Ok(Body::from_stream(chunks))
}

/// The hold keeps the request in flight: axum waits for no socket.
async fn echo(
    socket: WebSocketUpgrade,
    tasks: TaskSet,
    State(App { shutdown, .. }): State<App>,
    Query(Stay { stay }): Query<Stay>,
) -> Response {
    let held = tasks.hold();
    socket.on_upgrade(move |mut socket| async move {
        let _held = held;
        loop {
            let message = tokio::select! {
                message = socket.recv() => message,
                () = shutdown.draining(), if !stay => break,
            };
            let Some(Ok(message)) = message else { return };
            let is_data = matches!(message, Message::Text(_) | Message::Binary(_));
            if is_data && socket.send(message).await.is_err() {
                return;
            }
        }
        let _ = socket.send(Message::Close(None)).await;
    })
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
            let chunks = stream::iter(["some text, and then\n", ""]).then(async |chunk| {
                // So that the first one is sent.
                tokio::task::yield_now().await;
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

/// This turns to 503 first, and axum closes its listener and its idle connections after the settle
/// delay.
async fn ready(State(app): State<App>) -> (StatusCode, &'static str) {
    if app.shutdown.is_ready() {
        (StatusCode::OK, "ready")
    } else {
        (StatusCode::SERVICE_UNAVAILABLE, "stopping")
    }
}

async fn show_tasks(State(app): State<App>) -> Json<Snapshot> {
    Json(app.tasks.snapshot())
}

async fn show_limit(State(App { reports, .. }): State<App>) -> Json<Value> {
    let (limit, in_use, refused) = (reports.limit(), reports.in_use(), reports.refused());
    Json(json!({ "limit": limit, "in_use": in_use, "refused": refused }))
}

pub(crate) struct Settings {
    pub(crate) port: u16,
    pub(crate) grace: Duration,
    pub(crate) settle: Duration,
    pub(crate) task_limit: usize,
    pub(crate) report_limit: usize,
    pub(crate) report_time: Duration,
}

impl Settings {
    fn from_env() -> Result<Self, String> {
        Ok(Self {
            port: variable("PORT", 3_000, 0..=u16::MAX)?,
            grace: Duration::from_secs(variable("GRACE", 25, 0..=3_600)?),
            settle: Duration::from_secs(variable("SETTLE", 0, 0..=3_600)?),
            task_limit: variable("TASK_LIMIT", 10_000, 0..=usize::MAX)?,
            report_limit: variable("REPORT_LIMIT", 10, 0..=usize::MAX)?,
            report_time: Duration::from_secs(variable("REPORT_TIME", 10, 0..=3_600)?),
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

/// What is served, what it is made of, and its end.
pub(crate) fn site(settings: &Settings) -> Result<(Router, App, Shutdown), PlanError> {
    let limit = SpawnLimit::new(settings.task_limit).per_request(64);
    let tasks = TaskRegistry::new().limit(limit);
    let shutdown = Shutdown::new(settings.grace).settle(settings.settle).tasks(&tasks);
    shutdown.check()?;
    let reports = SpawnLimit::new(settings.report_limit);
    let report_time = settings.report_time;
    let app = App { tasks, shutdown: shutdown.watch(), reports, report_time };
    Ok((router(app.clone(), &shutdown), app, shutdown))
}

/// Serves until it is told to stop, and drains.
async fn serve(settings: Settings) -> Result<(Report, TaskRegistry), Box<dyn Error>> {
    let (router, app, shutdown) = site(&settings)?;
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, settings.port)).await?;
    let address = listener.local_addr()?;
    let server = axum::serve(listener, router).with_graceful_shutdown(shutdown.signalled());
    let server = async {
        // Only now: before, a signal would still end the process.
        say(format_args!("listening on http://{address}"));
        server.await
    };
    let report = shutdown.run(server).await.unwrap_or_else(|error| error.exit());
    Ok((report, app.tasks))
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
        Ok((report, tasks)) => {
            say(json!({ "report": report, "ledger": tasks.snapshot() }));
            report.exit()
        }
        Err(error) => {
            eprintln!("axum: {error}");
            ExitCode::from(if error.is::<PlanError>() { 2 } else { 1 })
        }
    }
}

/// Whoever reads it may be gone: that changes nothing.
fn say(line: impl Display) {
    drop(writeln!(io::stdout(), "{line}"));
}
