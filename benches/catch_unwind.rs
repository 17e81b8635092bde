//! What `catch-unwind` costs a poll when nothing panics, and what a panic in a task costs, in
//! instructions; and what a flood of panics costs the requests beside it: in instructions, and in
//! latency under a real server.
#![expect(clippy::cast_precision_loss, reason = "no figure is that large")]

use std::{
    convert::Infallible,
    future::Future,
    hint::black_box,
    net::SocketAddr,
    pin::{Pin, pin},
    sync::atomic::{AtomicU32, Ordering::Relaxed},
    task::{Context, Poll, Waker},
    time::{Duration, Instant},
};

use axum::{Router, routing::get};
use bytes::Bytes;
use http::{Request, Response};
use http_body::{Body, Frame};
use http_body_util::Full;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    runtime::{Builder, Runtime},
    time::{MissedTickBehavior, interval},
};
use tower::{Layer, Service, service_fn};
use tower_tasks::{CatchUnwindLayer, TaskRegistry, TaskSetLayer, TraceIdLayer};
use tower_tasks_benches::{
    Budgets, args, grouped, has_valgrind, median, on_all_cores, percentile, table,
    this_program_under_callgrind, total_of,
};
use tracing::{Event, Metadata, Subscriber, level_filters::LevelFilter, span};

fn main() {
    let args = args();
    let args: Vec<_> = args.iter().map(String::as_str).collect();
    let quick = match args[..] {
        ["poll", way, what, polls] => return poll(way, what, polls.parse().expect("a number")),
        ["beside", panics, served] => {
            return beside(panics == "panics", served.parse().expect("a number"));
        }
        ["task", way, end, tasks] => {
            return run_tasks(way == "ours", end == "panics", tasks.parse().expect("a number"));
        }
        _ => args.contains(&"--quick"),
    };
    let mut budgets = Budgets::default();
    if has_valgrind() {
        polls(&mut budgets);
        requests_beside_panics(&mut budgets);
        panics_in_tasks();
    }
    latency_beside_panics(if quick { 3 } else { 7 }, &mut budgets);
    budgets.print();
}

fn polls(budgets: &mut Budgets) {
    let row = |what: &str| {
        let [bare, ours] = ["bare", "ours"].map(|way| instructions(way, what));
        budgets.most(
            &format!("a poll of the {what}: instructions over bare"),
            ours - bare,
            60.0,
            0,
        );
        vec![what.to_owned(), grouped(bare), grouped(ours)]
    };
    let rows: Vec<_> = ["future", "body"].into_iter().map(row).collect();
    table("Instructions per poll", &["", "bare", "ours"], &rows);
}

fn instructions(way: &str, what: &str) -> f64 {
    per_one([1_000, 11_000], &["poll", way, what])
}

/// By the difference of two runs with these arguments and a number.
fn per_one(numbers: [u32; 2], args: &[&str]) -> f64 {
    let totals = on_all_cores(&numbers, |number| {
        let mut command = this_program_under_callgrind();
        let output = command.args(args).arg(number.to_string()).output();
        total_of(&output.expect("valgrind runs").stderr)
    });
    (totals[1] - totals[0]) / f64::from(numbers[1] - numbers[0])
}

fn poll(way: &str, what: &str, polls: u32) {
    let (waits, frames) = if what == "future" { (polls, 0) } else { (0, polls) };
    let handler = service_fn(move |_: Request<()>| Answer { waits, frames });
    if way == "bare" {
        drive(handler);
    } else {
        drive(CatchUnwindLayer::new().layer(handler));
    }
}

fn drive<S, B>(mut service: S)
where
    S: Service<Request<()>, Response = Response<B>, Error = Infallible>,
    B: Body<Data = Bytes>,
{
    let mut cx = Context::from_waker(Waker::noop());
    let mut future = pin!(service.call(Request::new(())));
    let response = loop {
        if let Poll::Ready(Ok(response)) = black_box(future.as_mut()).poll(&mut cx) {
            break response;
        }
    };
    let mut body = pin!(response.into_body());
    while let Poll::Ready(Some(_)) = black_box(body.as_mut()).poll_frame(&mut cx) {}
}

/// Waits so often, and then has so many frames.
struct Answer {
    waits: u32,
    frames: u32,
}

impl Future for Answer {
    type Output = Result<Response<Self>, Infallible>;

    fn poll(mut self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<Self::Output> {
        match self.waits.checked_sub(1) {
            Some(left) => {
                self.waits = black_box(left);
                Poll::Pending
            }
            None => Poll::Ready(Ok(Response::new(Self { waits: 0, frames: self.frames }))),
        }
    }
}

impl Body for Answer {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        _: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        let left = self.frames.checked_sub(1);
        self.frames = black_box(left.unwrap_or_default());
        Poll::Ready(left.map(|_| Ok(Frame::data(Bytes::new()))))
    }
}

/// Whether a request costs more instructions when each tenth is one that panics.
fn requests_beside_panics(budgets: &mut Budgets) {
    // So often, as many requests: what the panics cost is in both runs.
    const SERVED: [u32; 2] = [10, 110];
    let [alone, beside] = ["nothing", "panics"]
        .map(|panics| per_one(SERVED, &["beside", panics]) / f64::from(ROUNDS));
    table(
        "Instructions per request",
        &["alone", "beside panics"],
        &[vec![grouped(alone), grouped(beside)]],
    );
    budgets.most("a request beside panics: times its instructions alone", beside / alone, 1.01, 3);
}

const ROUNDS: u32 = 100;

fn beside(panics: bool, served: u32) {
    quiet();
    let mut service = CatchUnwindLayer::new().layer(service_fn(async |request: Request<()>| {
        assert_ne!(request.uri().path(), "/panic", "as it was asked");
        Ok::<_, Infallible>(Response::new(Full::new(Bytes::from_static(b"whole"))))
    }));
    let mut serve = |path| {
        let mut cx = Context::from_waker(Waker::noop());
        let mut future = pin!(service.call(Request::get(path).body(()).expect("it is a path")));
        let Poll::Ready(Ok(response)) = future.as_mut().poll(&mut cx) else { return };
        let mut body = pin!(response.into_body());
        while let Poll::Ready(Some(_)) = black_box(body.as_mut()).poll_frame(&mut cx) {}
    };
    for _ in 0..ROUNDS {
        for _ in 0..served {
            serve("/");
        }
        if panics {
            serve("/panic");
        }
    }
}

/// What one panic in a task costs, of a registry and of tokio.
fn panics_in_tasks() {
    let row = |way: &str, name: &str| {
        let [returns, panics] =
            ["returns", "panics"].map(|end| per_one([100, 1_100], &["task", way, end]));
        vec![name.to_owned(), grouped(returns), grouped(panics), grouped(panics - returns)]
    };
    let rows = [row("raw", "tokio::spawn"), row("ours", "TaskRegistry::spawn")];
    let heads = ["", "returns", "panics", "the panic alone"];
    table("Instructions per task, awaited", &heads, &rows);
}

fn run_tasks(ours: bool, panics: bool, tasks: u32) {
    quiet();
    let registry = TaskRegistry::new();
    let task = || async move { assert!(!black_box(panics), "as it was asked") };
    Builder::new_current_thread().build().expect("a runtime").block_on(async {
        for _ in 0..tasks {
            if ours {
                let task = registry.spawn("task", task()).expect("there is no limit");
                assert_eq!(task.await.is_err(), panics);
            } else {
                assert_eq!(tokio::spawn(task()).await.is_err(), panics);
            }
        }
    });
}

/// Panics are told by the log alone. With `RUST_BACKTRACE` each has a backtrace, which costs more
/// than all else.
fn quiet() {
    std::panic::set_hook(Box::new(|info| {
        tower_tasks::catch_unwind::record(info);
    }));
}

/// What else is asked of a server while the latency of its requests is measured.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Flood {
    Nothing,
    Requests,
    PanickingRequests,
    Tasks,
    PanickingTasks,
}

impl Flood {
    const ALL: [(Self, &str); 5] = [
        (Self::Nothing, "nothing"),
        (Self::Requests, "requests that do not panic"),
        (Self::PanickingRequests, "requests that panic"),
        (Self::Tasks, "tasks that do not panic"),
        (Self::PanickingTasks, "tasks that panic"),
    ];
}

/// How long each is measured.
const TIME: Duration = Duration::from_secs(1);

/// The 99th percentile of requests over a real server, beside nothing, as many requests or tasks
/// that do not panic, and as many that do: what a flood costs because it is one is in both of the
/// latter.
fn latency_beside_panics(runs: u32, budgets: &mut Budgets) {
    quiet();
    tracing::subscriber::set_global_default(CountErrors).expect("it is the only one");
    let mut p99 = [const { Vec::new() }; 5];
    let mut last = [(0.0, 0); 5];
    // In turn, so that what else the machine does is beside all of them.
    for _ in 0..runs {
        for (at, (flood, _)) in Flood::ALL.into_iter().enumerate() {
            let (latencies, rate, events) = under(flood);
            p99[at].push(percentile(&latencies, 99.0));
            last[at] = (rate, events.max(last[at].1));
        }
    }
    let p99 = p99.map(|runs| median(&runs));
    let rows: Vec<_> = Flood::ALL
        .iter()
        .zip(p99.iter().zip(last))
        .map(|((_, name), (p99, (rate, events)))| {
            vec![(*name).to_owned(), grouped(rate), events.to_string(), format!("{p99:.0}")]
        })
        .collect();
    let heads = ["beside", "a second", "most events", "p99, µs"];
    table("A request's latency, with this beside it", &heads, &rows);
    let [nothing, requests, panics, _, tasks] = p99;
    budgets.most(
        "p99 beside panics: times that beside as many requests",
        panics / requests,
        1.5,
        2,
    );
    budgets.most(
        "p99 beside 10,000 panics of tasks a second: times alone",
        tasks / nothing,
        1.5,
        2,
    );
    let asked_for = f64::from(TASKS_PER_MILLISECOND) * 1e3;
    let missing = asked_for / last[4].0;
    budgets.most("panics of tasks a second: 10,000 over those there were", missing, 1.05, 2);
    // 20 a second, and this may be of two of the log's seconds.
    budgets.most("events of these panics in a second", f64::from(last[4].1), 40.0, 0);
}

/// Takes errors alone, and counts them.
struct CountErrors;

static ERRORS: AtomicU32 = AtomicU32::new(0);

impl Subscriber for CountErrors {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        metadata.is_event() && *metadata.level() <= LevelFilter::ERROR
    }
    fn max_level_hint(&self) -> Option<LevelFilter> {
        Some(LevelFilter::ERROR)
    }
    fn event(&self, _: &Event<'_>) {
        ERRORS.fetch_add(1, Relaxed);
    }
    fn new_span(&self, _: &span::Attributes<'_>) -> span::Id {
        span::Id::from_u64(1)
    }
    fn record(&self, _: &span::Id, _: &span::Record<'_>) {}
    fn record_follows_from(&self, _: &span::Id, _: &span::Id) {}
    fn enter(&self, _: &span::Id) {}
    fn exit(&self, _: &span::Id) {}
}

/// The latencies in microseconds, how many requests or tasks there were beside them in a second,
/// and how many events.
fn under(flood: Flood) -> (Vec<f64>, f64, u32) {
    let tasks = TaskRegistry::new();
    let layers = (TraceIdLayer::new(), CatchUnwindLayer::new(), TaskSetLayer::new(&tasks));
    let app = Router::new()
        .route("/", get(async || "whole"))
        .route("/panic", get(async || -> &'static str { panic!("as it was asked") }))
        .layer(layers);
    let server = runtime();
    let listener = server.block_on(TcpListener::bind(("127.0.0.1", 0))).expect("a port");
    let addr = listener.local_addr().expect("it is bound");
    server.spawn(async move { axum::serve(listener, app).await });
    let errors = ERRORS.load(Relaxed);
    if let Flood::Tasks | Flood::PanickingTasks = flood {
        server.spawn(spawn_tasks(tasks.clone(), flood == Flood::PanickingTasks));
    }

    let clients = runtime();
    let (latencies, mut beside) = clients.block_on(async {
        let (path, many) = match flood {
            Flood::Requests => ("/", FLOOD_CLIENTS),
            Flood::PanickingRequests => ("/panic", FLOOD_CLIENTS),
            _ => ("/", 0),
        };
        let beside: Vec<_> =
            (0..many).map(|_| tokio::spawn(ask(addr, path, Duration::from_millis(10)))).collect();
        let asked: Vec<_> =
            (0..4).map(|_| tokio::spawn(ask(addr, "/", Duration::from_millis(1)))).collect();
        let mut latencies = Vec::new();
        for asked in asked {
            latencies.extend(asked.await.expect("it does not panic"));
        }
        let mut many = 0;
        for beside in beside {
            many += beside.await.expect("it does not panic").len();
        }
        (latencies, many as f64)
    });
    beside += tasks.snapshot().totals.spawned as f64;
    server.shutdown_background();
    (latencies, beside / TIME.as_secs_f64(), ERRORS.load(Relaxed) - errors)
}

const TASKS_PER_MILLISECOND: u32 = 10;

async fn spawn_tasks(tasks: TaskRegistry, panic: bool) {
    // What it missed it makes up for.
    let mut ticks = interval(Duration::from_millis(1));
    loop {
        ticks.tick().await;
        for _ in 0..TASKS_PER_MILLISECOND {
            let task = async move { assert!(!panic, "as it was asked") };
            drop(tasks.spawn("flood", task));
        }
    }
}

/// Each sends a hundred requests in a second. More would measure what a machine with two cores does
/// when it is full.
const FLOOD_CLIENTS: u32 = 10;

fn runtime() -> Runtime {
    Builder::new_multi_thread().worker_threads(2).enable_all().build().expect("a runtime")
}

/// Sends one request after the other over one connection, each so long after the one before if that
/// was answered, and tells how many microseconds each answer took.
async fn ask(addr: SocketAddr, path: &str, every: Duration) -> Vec<f64> {
    let mut stream = TcpStream::connect(addr).await.expect("it listens");
    let request = format!("GET {path} HTTP/1.1\r\nhost: localhost\r\n\r\n");
    let mut latencies = Vec::new();
    let mut answer = vec![0; 4096];
    let mut ticks = interval(every);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let end = Instant::now() + TIME;
    while Instant::now() < end {
        ticks.tick().await;
        let sent = Instant::now();
        stream.write_all(request.as_bytes()).await.expect("it is open");
        // A small answer comes at once.
        let read = stream.read(&mut answer).await.expect("it is open");
        assert!(answer[..read].starts_with(b"HTTP/1.1 "), "it is an answer");
        latencies.push(sent.elapsed().as_secs_f64() * 1e6);
    }
    latencies
}
