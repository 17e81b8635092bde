//! What requests and their tasks ask of the allocator.
#![expect(clippy::cast_precision_loss, reason = "no figure is that large")]

use std::{
    convert::Infallible,
    future::{pending, ready},
    pin::{Pin, pin},
    task::{Context, Poll, Waker},
    time::Duration,
};

use allocation_counter::{AllocationInfo, measure};
use http::{HeaderName, HeaderValue, Request, Response, header::CONTENT_TYPE};
use scope_spawn::scope::Scope;
use tokio::{
    runtime::{Builder, Runtime},
    task::JoinSet,
    task::yield_now,
    time::sleep,
};
use tower::{Layer, Service, service_fn};
use tower_http::request_id::{MakeRequestUuid, PropagateRequestIdLayer, SetRequestIdLayer};
use tower_tasks::{TaskRegistry, TraceContext, TraceIdLayer, task_set::StopToken, trace_id::Trust};
use tower_tasks_benches::{Budgets, args, grouped, median, table};
use tracing::Level;

use crate::ways::{ByHand, Job, Task, Tracker, Way, head, request, wait_once, with_way};

mod ways;

const WAYS: [&str; 12] = [
    "tokio::spawn",
    "JoinSet",
    "tracker + child token",
    "scope-spawn",
    "tower-scope-spawn",
    "by hand",
    "by hand + permit",
    "ours",
    "ours + limit",
    "ours + timeout",
    "ours, graceful",
    "ours, in a group",
];

fn main() {
    let quick = args().iter().any(|arg| arg == "--quick");
    let mut budgets = Budgets::default();
    per_request(&mut budgets);
    trace_ids(&mut budgets);
    bytes_in_the_future(&mut budgets);
    live(if quick { 100_000 } else { 1_000_000 });
    let (tasks, rounds) = if quick { (100_000, 1) } else { (1_000_000, 7) };
    under_a_limit(tasks, rounds, &mut budgets);
    budgets.print();
}

fn runtime() -> Runtime {
    Builder::new_current_thread().enable_all().build().expect("a runtime")
}

/// Allocations and bytes of one request in the steady state.
struct Steady<'a, F> {
    tasks: usize,
    task: F,
    result: &'a mut (f64, f64),
}

impl<T: Task, F: Fn() -> T + Copy + Send + 'static> Job for Steady<'_, F> {
    fn with(self, way: impl Way) {
        const REQUESTS: u32 = 50;
        let mut service = way.service(self.tasks, self.task);
        let runtime = runtime();
        let mut serve = |requests| {
            runtime.block_on(async {
                for _ in 0..requests {
                    request(&mut service).await;
                    way.wait(0).await;
                }
            });
        };
        serve(REQUESTS);
        // The difference of two, for there is something that each `block_on` does.
        let once = measure(|| serve(REQUESTS));
        let twice = measure(|| serve(2 * REQUESTS));
        let per_request =
            |once: u64, twice: u64| (twice as f64 - once as f64) / f64::from(REQUESTS);
        *self.result = (
            per_request(once.count_total, twice.count_total),
            per_request(once.bytes_total, twice.bytes_total),
        );
    }
}

fn steady<T: Task>(
    way: &str,
    tasks: usize,
    task: impl Fn() -> T + Copy + Send + 'static,
) -> (f64, f64) {
    let mut result = (0.0, 0.0);
    with_way(way, Steady { tasks, task, result: &mut result });
    result
}

/// How many allocations so many tasks may cost a request: one each and one more, and beyond four one
/// for each doubling.
fn most(tasks: usize) -> f64 {
    match tasks {
        0 => 0.0,
        1..=4 => tasks as f64 + 1.0,
        _ => tasks as f64 + 1.0 + (tasks as f64 / 4.0).log2().ceil(),
    }
}

fn per_request(budgets: &mut Budgets) {
    let counts = [0, 1, 3, 4, 8, 64, 1000];
    let mut rows = Vec::new();
    for way in WAYS {
        let mut row = vec![way.to_owned()];
        for tasks in counts {
            let (allocations, bytes) = steady(way, tasks, wait_once);
            row.push(format!("{} / {}", shortest(allocations), grouped(bytes)));
            if way == "ours" || way == "ours + limit" {
                let most = most(tasks);
                let what = format!("{way}: allocations of a request, {tasks} tasks that");
                budgets.most(&format!("{what} wait"), allocations, most, 0);
                if tasks > 0 {
                    let (allocations, _) = steady(way, tasks, || async {});
                    budgets.most(&format!("{what} are ready"), allocations, most, 0);
                }
            }
        }
        if way == "ours + timeout" || way == "ours, graceful" {
            // What they are listed in grows, too.
            for tasks in [8, 64, 1000] {
                let more = steady(way, tasks, wait_once).0 - steady("ours", tasks, wait_once).0;
                let each = if way == "ours, graceful" { 0.0 } else { tasks as f64 };
                let what = format!("{way}: allocations more, {tasks} tasks");
                budgets.most(&what, more, most(tasks) - each, 0);
            }
        }
        rows.push(row);
    }
    let heads = counts.map(|tasks| format!("{tasks} tasks"));
    let heads: Vec<_> = [String::new()].into_iter().chain(heads).collect();
    table(
        "Allocations / bytes requested per request in the steady state; tasks wait once",
        &heads,
        &rows,
    );
}

/// Of a request that spawns nothing, without a subscriber. The handler's answer has a header, as
/// nearly all have.
fn trace_ids(budgets: &mut Budgets) {
    const PARENT: HeaderValue =
        HeaderValue::from_static("00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01");
    const STATE: HeaderValue = HeaderValue::from_static("a=1");
    const ID: HeaderValue = HeaderValue::from_static("0af76519-16cd-43dd-8448-eb211c80319c");
    let handler = service_fn(|_: Request<()>| {
        let mut response = Response::new(());
        response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("text/plain"));
        ready(Ok::<_, Infallible>(response))
    });
    let pair =
        (SetRequestIdLayer::x_request_id(MakeRequestUuid), PropagateRequestIdLayer::x_request_id());
    let ours = || TraceIdLayer::new().trust(Trust::Continue).layer(handler);
    let parent = &[(TRACEPARENT, PARENT)][..];
    let with_id = &[(TRACEPARENT, PARENT), (X_REQUEST_ID, ID)][..];
    let with_state = &[(TRACEPARENT, PARENT), (TRACESTATE, STATE)][..];
    let asking = service_fn(move |request| {
        assert!(TraceContext::current().is_some());
        handler.clone().call(request)
    });
    let bare = serve_once(handler, &[]);
    let rows = [
        ("tower-http's request-id pair", serve_once(pair.layer(handler), &[])),
        (
            "tower-otel",
            serve_once(tower_otel::trace::HttpLayer::server(Level::INFO).layer(handler), parent),
        ),
        ("ours, a new trace", serve_once(ours(), &[])),
        ("ours, `traceparent`", serve_once(ours(), parent)),
        ("ours, `traceparent` and `x-request-id`", serve_once(ours(), with_id)),
        (
            "ours, a handler that asks",
            serve_once(TraceIdLayer::new().trust(Trust::Continue).layer(asking), with_id),
        ),
        ("ours, `tracestate` too", serve_once(ours(), with_state)),
    ];
    for (way, count) in &rows[2..6] {
        budgets.most(&format!("{way}: allocations"), (count - bare) as f64, 1.0, 0);
    }
    let rows = rows.map(|(way, count)| vec![way.to_owned(), grouped((count - bare) as f64)]);
    let heads = ["Trace ids", "allocations"].map(str::to_owned);
    table("Allocations per request over the bare service, without a subscriber", &heads, &rows);
}

const TRACEPARENT: HeaderName = HeaderName::from_static("traceparent");
const TRACESTATE: HeaderName = HeaderName::from_static("tracestate");
const X_REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");

/// Allocations of the second of two requests.
fn serve_once<S: Service<Request<()>>>(
    mut service: S,
    fields: &[(HeaderName, HeaderValue)],
) -> u64 {
    let mut count = 0;
    for _ in 0..2 {
        let mut request = Request::new(());
        request.headers_mut().extend(fields.iter().cloned());
        let info = measure(|| {
            let mut response = pin!(service.call(request));
            let mut cx = Context::from_waker(Waker::noop());
            assert!(response.as_mut().poll(&mut cx).is_ready());
        });
        count = info.count_total;
    }
    count
}

/// `2`, but `2.46`.
fn shortest(value: f64) -> String {
    if value.fract() == 0.0 { grouped(value) } else { format!("{value:.2}") }
}

/// A future of so many words.
struct Words<const N: usize>([usize; N]);

impl<const N: usize> Future for Words<N> {
    type Output = ();

    fn poll(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<()> {
        std::hint::black_box(&self.0);
        Poll::Ready(())
    }
}

/// A graceful task, which keeps its token.
struct Keeps<const N: usize>(Words<N>, StopToken);

impl<const N: usize> Future for Keeps<N> {
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        std::hint::black_box(&self.1);
        Pin::new(&mut self.0).poll(cx)
    }
}

/// Bytes of the allocation that a task with a future of `N` words has, in the runtime's steps.
fn task_of<const N: usize>(way: &str) -> u64 {
    let words = || Words([0; N]);
    runtime().block_on(async {
        match way {
            "tokio::spawn" => second(|| drop(tokio::spawn(words()))),
            "JoinSet" => {
                let mut set = JoinSet::new();
                second(|| drop(set.spawn(words())))
            }
            "tracker + child token" => {
                let tracker = Tracker::default();
                second(|| tracker.spawn(words()))
            }
            "scope-spawn" => {
                let scope = Scope::new();
                second(|| drop(scope.spawn(words())))
            }
            "by hand + permit" => {
                let hand = ByHand::new(Some(9)).0;
                second(|| hand.spawn("words", words()))
            }
            "ours" => {
                let registry = TaskRegistry::new();
                second(|| drop(registry.spawn("words", words())))
            }
            // What a task has apart from its own allocation is not its future's.
            "ours, graceful" => {
                let registry = TaskRegistry::new();
                second(|| {
                    drop(registry.spawn_graceful("words", |stop| Keeps(Words([0; N]), stop)));
                })
            }
            "ours, in a group" => {
                let group = TaskRegistry::new().group();
                second(|| drop(group.spawn("words", words())))
            }
            _ => panic!("no such way: {way}"),
        }
    })
}

/// What the second call of it allocates, in whole steps of 128 bytes.
fn second(mut spawn: impl FnMut()) -> u64 {
    spawn();
    measure(spawn).bytes_max / STEP * STEP
}

const STEP: u64 = 128;

/// With the number of bytes of each.
macro_rules! sizes {
    ($($words:literal)*) => {
        [$(($words * 8, task_of::<$words> as fn(&str) -> u64)),*]
    };
}

fn bytes_in_the_future(budgets: &mut Budgets) {
    const FITS: u64 = 3 * STEP;
    let ways = [
        "tokio::spawn",
        "JoinSet",
        "tracker + child token",
        "scope-spawn",
        "by hand + permit",
        "ours",
        "ours, graceful",
        "ours, in a group",
    ];
    let sizes = sizes!(0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20 21 22 23 24 25 26 27 28
        29 30 31 32 33 34 35 36);
    let largest = |way: &str| {
        let fit = sizes.iter().filter(|(_, task_of)| task_of(way) <= FITS);
        fit.map(|(bytes, _)| *bytes).max().unwrap_or(0)
    };
    let raw = largest("tokio::spawn");
    let mut rows = Vec::new();
    for way in ways {
        let added = raw - largest(way);
        let tasks = [1, 3, 8, 15].map(|words| sizes[words].1(way).to_string());
        rows.push([way.to_owned(), added.to_string()].into_iter().chain(tasks).collect());
        match way {
            "ours" => budgets.most("ours: bytes in the future", f64::from(added), 16.0, 0),
            "ours, graceful" => {
                budgets.most("ours, graceful: bytes in the future", f64::from(added), 32.0, 0);
            }
            _ => {}
        }
    }
    table(
        &format!(
            "Bytes added to the future, by the largest one whose task fits into {FITS} bytes; and \
             bytes of the task for futures of some sizes"
        ),
        &["", "added", "8 bytes", "24 bytes", "64 bytes", "120 bytes"],
        &rows,
    );
}

/// Bytes that a live task holds.
struct Live<'a, F> {
    tasks: usize,
    task: F,
    result: &'a mut f64,
}

impl<T: Task, F: Fn() -> T + Copy + Send + 'static> Job for Live<'_, F> {
    fn with(self, way: impl Way) {
        let runtime = runtime();
        let mut service = way.service(self.tasks, self.task);
        let mut kept = None;
        let info = measure(|| {
            runtime.block_on(async {
                kept = Some(head(&mut service).await);
                // Each of them has been polled once.
                for _ in 0..self.tasks / 30 {
                    yield_now().await;
                }
            });
        });
        *self.result = info.bytes_current as f64 / self.tasks as f64;
    }
}

fn live(tasks: usize) {
    // Not those whose tasks end with their handler, or keep it until they do.
    let left_out = ["tower-scope-spawn", "ours, in a group"];
    let ways = WAYS.into_iter().filter(|way| !left_out.contains(way));
    let bytes = |way: &str| {
        let mut bytes = [0.0; 2];
        let [pends, sleeps] = &mut bytes;
        with_way(way, Live { tasks, task: pending::<()>, result: pends });
        with_way(way, Live { tasks, task: || sleep(Duration::from_secs(3600)), result: sleeps });
        bytes
    };
    let raw = bytes("tokio::spawn");
    let mut rows = Vec::new();
    for way in ways {
        let bytes = bytes(way);
        let mut row = vec![way.to_owned()];
        for (bytes, raw) in bytes.into_iter().zip(raw) {
            row.push(format!("{bytes:.0} ({:.2})", bytes / raw));
        }
        rows.push(row);
    }
    let title = format!(
        "Bytes requested for a live task, of {} in one request (of tokio::spawn)",
        grouped(tasks as f64)
    );
    table(&title, &["", "pending", "sleeping"], &rows);
}

fn under_a_limit(tasks: usize, rounds: usize, budgets: &mut Budgets) {
    const LIMIT: usize = 50_000;
    let run = |work: &dyn Fn(&Runtime)| -> AllocationInfo {
        let runtime = runtime();
        measure(|| work(&runtime))
    };
    let mut infos = [const { Vec::new() }; 2];
    for _ in 0..rounds {
        let [hand, ours] = &mut infos;
        hand.push(run(&|runtime| runtime.block_on(ways::semaphore_and_tracker(tasks, LIMIT))));
        ours.push(run(&|runtime| runtime.block_on(ways::registry_with_limit(tasks, LIMIT))));
    }
    let [hand, ours] = infos.map(|infos: Vec<AllocationInfo>| {
        let of_rounds = |of: fn(&AllocationInfo) -> u64| {
            median(&infos.iter().map(|info| of(info) as f64).collect::<Vec<_>>())
        };
        (of_rounds(|info| info.bytes_max), of_rounds(|info| info.count_total))
    });
    let rows = [("Semaphore + TaskTracker", hand), ("ours", ours)]
        .map(|(way, (peak, count))| vec![way.to_owned(), grouped(peak), grouped(count)]);
    let title = format!(
        "{} tasks of 10 ms under a limit of {}: medians of {rounds} rounds in turn",
        grouped(tasks as f64),
        grouped(LIMIT as f64)
    );
    table(&title, &["", "bytes at the peak", "allocations"], &rows);
    let what = "a million under a limit: peak, of Semaphore + TaskTracker";
    budgets.most(what, ours.0 / hand.0, 1.25, 2);
}
