//! Six things that happen to tasks, and a shutdown, on a real server with a real client.
//!
//! `cargo run --example quickstart` prints what happens when it happens, and the ledger at the end.
//! It checks all that it shows, and exits with 0 only if everything came out as it should.

#![expect(clippy::print_stdout, clippy::print_stderr, reason = "it shows what happens")]

use std::{
    error::Error,
    fmt::Display,
    future, io,
    net::{Ipv4Addr, SocketAddr},
    process::ExitCode,
    sync::{Arc, LazyLock},
    time::{Duration, Instant},
};

use axum::{
    Router,
    body::{Body, Bytes},
    extract::State,
    http::{Method, Request, Response, StatusCode, header::RETRY_AFTER},
    routing::{get, post},
};
use futures_util::{StreamExt, future::try_join_all, stream};
use http_body_util::{BodyExt, Empty};
use hyper::body::Incoming;
use hyper_util::{
    client::legacy::{self, connect::HttpConnector},
    rt::TokioExecutor,
};
use tokio::sync::{Semaphore, broadcast, mpsc};
use tokio_stream::wrappers::ReceiverStream;
use tower_tasks::{
    AtEnd, CatchUnwindLayer, Shutdown, SpawnError, SpawnLimit, SpawnLimitLayer, TaskRegistry,
    TaskSet, TaskSetLayer,
    catch_unwind::install_hook,
    task_set::{Counts, Outcome, TaskEvent, TaskState, assert_drained},
};

type Result<T = (), E = Box<dyn Error>> = std::result::Result<T, E>;

// ---- The server. Its handlers ask for the `TaskSet` of their request, and spawn into it.

#[derive(Clone)]
struct App {
    /// What tasks wait for: a mail server, a database. It answers once for each permit.
    backend: Arc<Semaphore>,
    market: broadcast::Sender<&'static str>,
}

impl App {
    async fn ask_backend(self) {
        if let Ok(answer) = self.backend.acquire().await {
            answer.forget();
        }
    }
}

/// (a) Answers at once. The tasks have 30 seconds more, which is the default.
async fn create_order(State(app): State<App>, tasks: TaskSet) -> Result<StatusCode, SpawnError> {
    tasks.spawn("send_receipt", app.clone().ask_backend())?;
    tasks.spawn("write_audit_line", app.clone().ask_backend())?;
    tasks.spawn("warm_cache", app.ask_backend())?;
    Ok(StatusCode::ACCEPTED)
}

/// (b) Streams prices. When the client has left, this work is for nobody.
async fn stream_prices(State(app): State<App>, tasks: TaskSet) -> Result<Body, SpawnError> {
    tasks.at_end(AtEnd::Cancel);
    let mut market = app.market.subscribe();
    let (to_client, prices) = mpsc::channel(1);
    tasks.spawn("feed_stream", async move {
        while let Ok(price) = market.recv().await {
            if to_client.send(Ok::<_, SpawnError>(price)).await.is_err() {
                break;
            }
        }
    })?;
    tasks.spawn("watch_market", future::pending::<()>())?;
    Ok(Body::from_stream(ReceiverStream::new(prices)))
}

/// (c) A task has a bug. Its request is answered all the same.
async fn upload_photo(tasks: TaskSet) -> Result<StatusCode, SpawnError> {
    tasks.spawn("make_thumbnail", async { panic!("cannot decode photo.tiff") })?;
    Ok(StatusCode::ACCEPTED)
}

/// (c) The handler has one.
async fn delete_photo() -> StatusCode {
    panic!("cannot find photo.tiff")
}

/// (c) The body has one.
async fn download_photo() -> Body {
    Body::from_stream(stream::iter(["half of it", ""]).then(async |part| {
        // So that the first part is sent.
        tokio::task::yield_now().await;
        assert!(!part.is_empty(), "cannot read photo.tiff");
        Ok::<_, SpawnError>(part)
    }))
}

/// (d) Wants more tasks than a request may have: `?` makes the refusal a 503.
async fn import_rows(State(app): State<App>, tasks: TaskSet) -> Result<StatusCode, SpawnError> {
    for _row in 0..5 {
        tasks.spawn("import_row", app.clone().ask_backend())?;
    }
    Ok(StatusCode::ACCEPTED)
}

/// (e) Is wanted by more than there is room for: its route has a limit.
async fn make_report(State(app): State<App>, tasks: TaskSet) -> Result<StatusCode, SpawnError> {
    tasks.spawn("make_report", app.ask_backend())?;
    Ok(StatusCode::ACCEPTED)
}

/// (f) Starts something that takes as long as it takes.
async fn rebuild_index(tasks: TaskSet) -> Result<StatusCode, SpawnError> {
    tasks.task("rebuild_index").at_end(AtEnd::Keep).spawn(future::pending::<()>())?;
    Ok(StatusCode::ACCEPTED)
}

// ---- The story: who does what, and what must come of it.

async fn run() -> Result {
    // The owner of all tasks. It tells us how they fare.
    let (ended, mut ends) = mpsc::unbounded_channel();
    let limit = SpawnLimit::new(1_000).per_request(4);
    let observer = move |event: &TaskEvent| match event {
        TaskEvent::Started { name, .. } => say("task", format!("{name} started")),
        TaskEvent::Ended { name, outcome, .. } => {
            say("task", format!("{name} {outcome}"));
            let _ = ended.send(*outcome);
        }
        _ => {}
    };
    let tasks = TaskRegistry::new().limit(limit.clone()).observer(observer);

    let app = App { backend: Arc::new(Semaphore::new(0)), market: broadcast::channel(8).0 };
    let reports = SpawnLimit::new(AT_ONCE);
    let limited = SpawnLimitLayer::new(reports.clone());
    let budget = Duration::from_secs(1);
    let shutdown = Shutdown::new(budget).grace(budget).without_signals().tasks(&tasks);
    let router = Router::new()
        .route("/orders", post(create_order))
        .route("/prices", get(stream_prices))
        .route("/photos", post(upload_photo).delete(delete_photo).get(download_photo))
        .route("/rows", post(import_rows))
        .route("/reports", post(make_report).layer(limited))
        .route("/index", post(rebuild_index))
        .with_state(app.clone())
        .layer((CatchUnwindLayer::new(), shutdown.layer(), TaskSetLayer::new(&tasks)));

    let listener = tokio::net::TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await?;
    let http = legacy::Client::builder(TokioExecutor::new()).build_http();
    let client = Client { server: listener.local_addr()?, http };
    say("server", format!("listens on http://{}", client.server));
    let server = axum::serve(listener, router).with_graceful_shutdown(shutdown.signalled());
    let running = shutdown.clone();
    let server = tokio::spawn(async move { running.run(server).await });
    let mut log = install_log();

    println!("\n(a) The reply comes first: the tasks are drained after it.");
    client.send(Method::POST, "/orders", StatusCode::ACCEPTED).await?;
    check("its three tasks still run", tasks.len() == 3)?;
    app.backend.add_permits(3);
    expect(&mut ends, 3, Outcome::Completed).await?;

    println!("\n(b) The client leaves in the middle of a stream: `Cancel` tasks die with it.");
    let mut response = client.send(Method::GET, "/prices", StatusCode::OK).await?;
    for price in ["101.50", "101.75"] {
        app.market.send(price)?;
        let frame = response.body_mut().frame().await.ok_or("the stream has ended")??;
        check(&format!("the client reads {price}"), frame.into_data().is_ok_and(|it| it == price))?;
    }
    say("client", "leaves");
    drop(response);
    expect(&mut ends, 2, Outcome::Cancelled).await?;

    println!("\n(c) A task panics, a handler, a body: the log has each once, with its place.");
    let_it_panic(&client, &mut ends, &mut log).await?;

    println!("\n(d) Five tasks where a request may have four: the fifth is refused.");
    let response = client.send(Method::POST, "/rows", StatusCode::SERVICE_UNAVAILABLE).await?;
    let one_second = response.headers().get(RETRY_AFTER).is_some_and(|after| after == "1");
    check("with Retry-After: 1", one_second)?;
    check("the four others run", lives(&tasks, 4).await)?;
    app.backend.add_permits(4);
    expect(&mut ends, 4, Outcome::Completed).await?;

    println!(
        "\n(e) Five times as many requests as a route may have tasks: some are refused, none lost."
    );
    overload(&client, &mut ends, &app, &tasks, &reports).await?;

    println!("\n(f) A task is kept: it lives on, until the process stops.");
    client.send(Method::POST, "/index", StatusCode::ACCEPTED).await?;
    check("one task lives", lives(&tasks, 1).await)?;
    let live = tasks.snapshot().live_tasks;
    let [task] = &live[..] else { return Err("one task should live".into()) };
    say("ledger", task);
    check("it is kept", task.state == TaskState::Kept)?;

    println!(
        "\nThe process stops, within a second: what is done is done, the rest is told to end."
    );
    shutdown.begin(); // as SIGTERM does, unless it is left out as here
    let report = server.await??;
    expect(&mut ends, 1, Outcome::Cancelled).await?;
    say("report", &report);
    let forced: Vec<_> = report.forced().iter().map(|forced| &*forced.name).collect();
    check("the kept task had to be forced, and it alone", forced == ["rebuild_index"])?;
    check("so the process would exit with 1", report.exit_code() == 1)?;
    let late = tasks.spawn("too_late", async {}).err().ok_or("a closed registry took a task")?;
    check("what comes too late is refused", late.reason == SpawnError::Closed)?;
    assert_drained(&tasks);
    check("no task lives, and all permits are back", tasks.is_empty() && limit.in_use() == 0)?;

    println!("\nThe ledger.");
    let ledger = tasks.snapshot();
    let mut rows: Vec<_> = ledger.by_name.iter().map(|(name, of)| (*name, figures(of))).collect();
    rows.push(("total", figures(&ledger.totals)));
    print_row("task", COLUMNS.split(' '));
    for (name, figures) in &rows {
        print_row(name, figures);
    }
    println!();
    check("every task came to the end that it should have", rows == EXPECTED)?;
    check("attempted = refused + spawned; spawned = live + ended", ledger.totals.is_exact())
}

const COLUMNS: &str =
    "attempted refused spawned live completed cancelled aborted timed-out panicked";

const EXPECTED: [(&str, [u64; 9]); 11] = [
    ("feed_stream", [1, 0, 1, 0, 0, 1, 0, 0, 0]),
    ("import_row", [5, 1, 4, 0, 4, 0, 0, 0, 0]),
    ("make_report", [15, 12, 3, 0, 3, 0, 0, 0, 0]),
    ("make_thumbnail", [1, 0, 1, 0, 0, 0, 0, 0, 1]),
    ("rebuild_index", [1, 0, 1, 0, 0, 1, 0, 0, 0]),
    ("send_receipt", [1, 0, 1, 0, 1, 0, 0, 0, 0]),
    ("too_late", [1, 1, 0, 0, 0, 0, 0, 0, 0]),
    ("warm_cache", [1, 0, 1, 0, 1, 0, 0, 0, 0]),
    ("watch_market", [1, 0, 1, 0, 0, 1, 0, 0, 0]),
    ("write_audit_line", [1, 0, 1, 0, 1, 0, 0, 0, 0]),
    ("total", [28, 14, 14, 0, 10, 3, 0, 0, 1]),
];

#[rustfmt::skip]
fn figures(of: &Counts) -> [u64; 9] {
    [of.attempted, of.refused, of.spawned, of.live,
     of.completed, of.cancelled, of.aborted, of.timed_out, of.panicked]
}

/// So many reports may be made at once.
const AT_ONCE: usize = 3;

async fn overload(
    client: &Client,
    ends: &mut mpsc::UnboundedReceiver<Outcome>,
    app: &App,
    tasks: &TaskRegistry,
    reports: &SpawnLimit,
) -> Result {
    say("client", format!("POST /reports, {} times at once", 5 * AT_ONCE));
    let requests = (0..5 * AT_ONCE).map(|_| client.request(Method::POST, "/reports"));
    let responses = try_join_all(requests).await?;
    let count = |so: fn(&Response<Incoming>) -> bool| responses.iter().filter(|it| so(it)).count();
    let accepted = count(|it| it.status() == StatusCode::ACCEPTED);
    let refused = count(|it| it.status() == StatusCode::SERVICE_UNAVAILABLE);
    let told_when = count(|it| it.headers().contains_key(RETRY_AFTER));
    check(&format!("{accepted} are accepted, as many as there is room for"), accepted == AT_ONCE)?;
    check(&format!("{refused} are refused: all others"), accepted + refused == responses.len())?;
    check("each of these is told when to come again", told_when == refused)?;
    check(
        "the limit says so too",
        (reports.in_use(), reports.refused()) == (accepted, refused as u64),
    )?;
    check("a task lives for each that was accepted", lives(tasks, accepted).await)?;
    app.backend.add_permits(accepted);
    expect(ends, AT_ONCE, Outcome::Completed).await?;
    check("all permits are back", lives(tasks, 0).await && reports.in_use() == 0)
}

async fn let_it_panic(
    client: &Client,
    ends: &mut mpsc::UnboundedReceiver<Outcome>,
    log: &mut mpsc::UnboundedReceiver<String>,
) -> Result {
    let mut logged = |parts: &[&str]| {
        let line = log.try_recv()?;
        let place = ["ERROR", "location=", "quickstart.rs:"];
        let so = place.iter().chain(parts).all(|part| line.contains(part));
        check("the log has place and message", so)
    };
    client.send(Method::POST, "/photos", StatusCode::ACCEPTED).await?;
    expect(ends, 1, Outcome::Panicked).await?;
    logged(&["make_thumbnail", "cannot decode photo.tiff"])?;
    client.send(Method::DELETE, "/photos", StatusCode::INTERNAL_SERVER_ERROR).await?;
    logged(&["DELETE", "cannot find photo.tiff"])?;
    let response = client.send(Method::GET, "/photos", StatusCode::OK).await?;
    let cut_off = response.into_body().collect().await.is_err();
    check("the client can tell that the body is cut off", cut_off)?;
    logged(&["cannot read photo.tiff"])
}

#[tokio::main]
async fn main() -> ExitCode {
    // Says what the default hook says, in one line.
    std::panic::set_hook(Box::new(|panic| say("hook", panic.to_string().replace('\n', " "))));
    install_hook(); // The log has the place too.
    let end = tokio::time::timeout(Duration::from_secs(10), run()).await;
    if let Err(error) = end.unwrap_or_else(|_| Err("it is not done within 10 seconds".into())) {
        eprintln!("\nquickstart: {error}");
        return ExitCode::FAILURE;
    }
    println!("\nEverything came out as it should.");
    ExitCode::SUCCESS
}

// ---- What is left: the client, the log, and the columns.

struct Client {
    server: SocketAddr,
    http: legacy::Client<HttpConnector, Empty<Bytes>>,
}

impl Client {
    async fn request(&self, method: Method, path: &str) -> Result<Response<Incoming>> {
        let uri = format!("http://{}{path}", self.server);
        let request = Request::builder().method(method).uri(uri).body(Empty::new())?;
        Ok(self.http.request(request).await?)
    }

    async fn send(&self, method: Method, path: &str, so: StatusCode) -> Result<Response<Incoming>> {
        say("client", format!("{method} {path}"));
        let response = self.request(method, path).await?;
        check(&format!("the reply is {}", response.status()), response.status() == so)?;
        Ok(response)
    }
}

/// Waits until so many tasks have ended, and checks how.
async fn expect(ends: &mut mpsc::UnboundedReceiver<Outcome>, count: usize, how: Outcome) -> Result {
    let mut so = true;
    for _ in 0..count {
        so &= ends.recv().await == Some(how);
    }
    check(&format!("{count} {how}"), so)
}

/// The log goes into our columns, and to whoever checks it.
fn install_log() -> mpsc::UnboundedReceiver<String> {
    struct Line(mpsc::UnboundedSender<String>);
    impl io::Write for Line {
        fn write(&mut self, line: &[u8]) -> io::Result<usize> {
            let text = String::from_utf8_lossy(line).trim().to_owned();
            say("log", &text);
            let _ = self.0.send(text);
            Ok(line.len())
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }
    let (lines, log) = mpsc::unbounded_channel();
    let format = tracing_subscriber::fmt().with_ansi(false).without_time().with_target(false);
    format.with_writer(move || Line(lines.clone())).init();
    log
}

fn say(who: &str, what: impl Display) {
    static START: LazyLock<Instant> = LazyLock::new(Instant::now);
    println!("{:>5} ms  {who:<6}  {what}", START.elapsed().as_millis());
}

/// Whether so many tasks live. The observer hears of an end just before the ledger counts it.
async fn lives(tasks: &TaskRegistry, count: usize) -> bool {
    let counted = async {
        while tasks.len() != count {
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(Duration::from_secs(10), counted).await.is_ok()
}

fn check(what: &str, so: bool) -> Result {
    say(if so { "  ok" } else { "WRONG" }, what);
    if so { Ok(()) } else { Err(format!("this did not come true: {what}").into()) }
}

fn print_row(name: &str, cells: impl IntoIterator<Item = impl Display>) {
    print!("  {name:<16}");
    for (cell, column) in cells.into_iter().zip(COLUMNS.split(' ')) {
        print!("  {cell:>width$}", width = column.len());
    }
    println!();
}
