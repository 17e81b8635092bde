//! What `catch-unwind` costs a poll when nothing panics, in instructions; and what a flood of panics
//! costs the requests beside it: in instructions, and in latency under a real server.
#![expect(clippy::cast_precision_loss, reason = "no figure is that large")]

use std::{
    convert::Infallible,
    future::Future,
    hint::black_box,
    net::SocketAddr,
    pin::{Pin, pin},
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

fn main() {
    let args = args();
    let args: Vec<_> = args.iter().map(String::as_str).collect();
    let quick = match args[..] {
        ["poll", way, what, polls] => return poll(way, what, polls.parse().expect("a number")),
        ["beside", panics, served] => {
            return beside(panics == "panics", served.parse().expect("a number"));
        }
        _ => args.contains(&"--quick"),
    };
    let mut budgets = Budgets::default();
    if has_valgrind() {
        polls(&mut budgets);
        requests_beside_panics(&mut budgets);
    }
    latency_beside_panics(if quick { 3 } else { 9 }, &mut budgets);
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

/// By the difference of two runs.
fn instructions(way: &str, what: &str) -> f64 {
    const POLLS: [u32; 2] = [1_000, 11_000];
    let totals = on_all_cores(&POLLS, |polls| {
        let mut command = this_program_under_callgrind();
        let output = command.args(["poll", way, what, &polls.to_string()]).output();
        total_of(&output.expect("valgrind runs").stderr)
    });
    (totals[1] - totals[0]) / f64::from(POLLS[1] - POLLS[0])
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
    let [alone, beside] = ["nothing", "panics"].map(|panics| {
        let totals = on_all_cores(&SERVED, |served| {
            let mut command = this_program_under_callgrind();
            let output = command.args(["beside", panics, &served.to_string()]).output();
            total_of(&output.expect("valgrind runs").stderr)
        });
        (totals[1] - totals[0]) / f64::from((SERVED[1] - SERVED[0]) * ROUNDS)
    });
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
    Panics,
}

/// The 99th percentile of requests over a real server, beside nothing, as many requests that do not
/// panic, and as many that do: what a flood costs because it is one is in both of the latter.
fn latency_beside_panics(runs: u32, budgets: &mut Budgets) {
    quiet();
    let floods = [Flood::Nothing, Flood::Requests, Flood::Panics];
    let mut p99 = [const { Vec::new() }; 3];
    let mut per_second = [0.0; 3];
    for _ in 0..runs {
        for (flood, (p99, per_second)) in
            floods.into_iter().zip(p99.iter_mut().zip(&mut per_second))
        {
            let (latencies, rate) = under(flood);
            p99.push(percentile(&latencies, 99.0));
            *per_second = rate;
        }
    }
    let p99 = p99.map(|runs| median(&runs));
    let row = |name: &str, at: usize| {
        vec![name.to_owned(), grouped(per_second[at]), format!("{:.0}", p99[at])]
    };
    let rows =
        [row("nothing", 0), row("requests that do not panic", 1), row("requests that panic", 2)];
    table("A request's latency, with this beside it", &["beside", "a second", "p99, µs"], &rows);
    budgets.most("p99 beside panics: times that beside as many requests", p99[2] / p99[1], 1.5, 2);
}

/// The latencies in microseconds, and how many requests there were beside them in a second.
fn under(flood: Flood) -> (Vec<f64>, f64) {
    const TIME: Duration = Duration::from_secs(2);
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

    let clients = runtime();
    let measured = clients.block_on(async {
        let path = if flood == Flood::Panics { "/panic" } else { "/" };
        let beside: Vec<_> = (0..if flood == Flood::Nothing { 0 } else { FLOOD_CLIENTS })
            .map(|_| tokio::spawn(ask(addr, path, Duration::from_millis(10), TIME)))
            .collect();
        let asked: Vec<_> =
            (0..4).map(|_| tokio::spawn(ask(addr, "/", Duration::from_millis(1), TIME))).collect();
        let mut latencies = Vec::new();
        for asked in asked {
            latencies.extend(asked.await.expect("it does not panic"));
        }
        let mut many = 0;
        for beside in beside {
            many += beside.await.expect("it does not panic").len();
        }
        (latencies, many as f64 / TIME.as_secs_f64())
    });
    server.shutdown_background();
    measured
}

/// Each sends a hundred requests in a second. More would measure what a machine with two cores does
/// when it is full.
const FLOOD_CLIENTS: u32 = 10;

fn runtime() -> Runtime {
    Builder::new_multi_thread().worker_threads(2).enable_all().build().expect("a runtime")
}

/// Sends one request after the other over one connection, each so long after the one before if that
/// was answered, and tells how many microseconds each answer took.
async fn ask(addr: SocketAddr, path: &str, every: Duration, time: Duration) -> Vec<f64> {
    let mut stream = TcpStream::connect(addr).await.expect("it listens");
    let request = format!("GET {path} HTTP/1.1\r\nhost: localhost\r\n\r\n");
    let mut latencies = Vec::new();
    let mut answer = vec![0; 4096];
    let mut ticks = interval(every);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let end = Instant::now() + time;
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
