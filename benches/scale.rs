//! A million live tasks, ten thousand sets, and a limit that is always full. Each measurement is in
//! a process of its own.
#![expect(clippy::print_stdout, reason = "a bench prints what it measures")]
#![expect(clippy::cast_precision_loss, reason = "no figure is that large")]

use std::{
    fs,
    future::pending,
    sync::atomic::{AtomicBool, AtomicUsize, Ordering},
    thread,
    time::{Duration, Instant},
};

use tokio::{
    runtime::{Builder, Runtime},
    task::yield_now,
    time::sleep,
};
use tower_tasks::TaskRegistry;
use tower_tasks_benches::{
    Budgets, args, grouped, median, numbers_of, of_this_process, percentile, table,
};

use crate::ways::{Job, Ours, Task, Way, head, request, with_way};

mod ways;

fn main() {
    let args = args();
    let args: Vec<_> = args.iter().map(String::as_str).collect();
    let number = |text: &str| text.parse().expect("a number");
    match args[..] {
        ["live", way, shape, threads, tasks] => {
            let workers = threads == WORKERS;
            with_way(way, Live { shape, workers, tasks: number(tasks) });
        }
        ["limited", way, tasks] => limited(way, number(tasks)),
        ["snapshots", QUIET, sets] => snapshots(number(sets), false),
        ["snapshots", _, sets] => snapshots(number(sets), true),
        _ => {
            let quick = args.contains(&"--quick");
            let million = if quick { "100000" } else { "1000000" };
            let mut budgets = Budgets::default();
            resident(million, &mut budgets);
            cancelled(million, if quick { 3 } else { 7 }, &mut budgets);
            under_a_limit(million, if quick { 1 } else { 7 }, &mut budgets);
            snapshot_of_many_sets("10000");
            budgets.print();
        }
    }
}

const QUIET: &str = "without snapshots";

const CURRENT: &str = "current thread";
const WORKERS: &str = "2 workers";

fn runtime(workers: bool) -> Runtime {
    let runtime = if workers {
        Builder::new_multi_thread().worker_threads(2).enable_all().build()
    } else {
        Builder::new_current_thread().enable_all().build()
    };
    runtime.expect("a runtime")
}

/// Starts the tasks in one request, and prints the resident bytes that they take and the
/// milliseconds until they are cancelled.
struct Live<'a> {
    shape: &'a str,
    workers: bool,
    tasks: usize,
}

static POLLED: AtomicUsize = AtomicUsize::new(0);

impl Job for Live<'_> {
    fn with(self, way: impl Way) {
        match self.shape {
            "pending" => self.measure(&way, || async {
                POLLED.fetch_add(1, Ordering::Relaxed);
                pending::<()>().await;
            }),
            "sleeping" => self.measure(&way, || async {
                POLLED.fetch_add(1, Ordering::Relaxed);
                sleep(Duration::from_secs(3600)).await;
            }),
            shape => panic!("no such shape: {shape}"),
        }
    }
}

impl Live<'_> {
    fn measure<T: Task>(self, way: &impl Way, task: impl Fn() -> T + Copy + Send + 'static) {
        let mut service = way.service(self.tasks, task);
        runtime(self.workers).block_on(async {
            let before = of_this_process("VmRSS");
            let response = head(&mut service).await;
            while POLLED.load(Ordering::Relaxed) < self.tasks {
                if self.workers {
                    sleep(Duration::from_millis(1)).await;
                } else {
                    yield_now().await;
                }
            }
            let resident = of_this_process("VmRSS") - before;
            let start = Instant::now();
            way.cancel().await;
            let time = start.elapsed();
            drop(response);
            println!("{} {}", resident / self.tasks as f64, time.as_secs_f64() * 1e3);
        });
    }
}

fn number(text: &str) -> String {
    grouped(text.parse().expect("a number"))
}

const LIVE_WAYS: [&str; 6] = [
    "tokio::spawn",
    "JoinSet",
    "tracker + child token",
    "by hand + permit",
    "ours",
    "ours + limit",
];

fn resident(tasks: &str, budgets: &mut Budgets) {
    let columns =
        [("pending", CURRENT), ("pending", WORKERS), ("sleeping", CURRENT), ("sleeping", WORKERS)];
    let mut raw = [0.0; 4];
    let mut rows = Vec::new();
    for way in LIVE_WAYS {
        let mut row = vec![way.to_owned()];
        for (column, (shape, threads)) in columns.into_iter().enumerate() {
            let bytes = numbers_of(&["live", way, shape, threads, tasks])[0];
            if way == "tokio::spawn" {
                raw[column] = bytes;
            }
            let ratio = bytes / raw[column];
            row.push(format!("{bytes:.0} ({ratio:.2})"));
            if way == "ours" {
                let what = format!("ours: resident bytes, {shape}, {threads}, of tokio::spawn");
                budgets.most(&what, ratio, 1.10, 2);
            }
        }
        rows.push(row);
    }
    let heads = columns.map(|(shape, threads)| format!("{shape}, {threads}"));
    let heads: Vec<_> = [String::new()].into_iter().chain(heads).collect();
    table(
        &format!("Resident bytes per task, of {} (of tokio::spawn)", number(tasks)),
        &heads,
        &rows,
    );
}

fn cancelled(tasks: &str, rounds: usize, budgets: &mut Budgets) {
    let ways = ["JoinSet", "by hand + permit", "ours"];
    let threads = [CURRENT, WORKERS];
    let mut times = vec![Vec::new(); ways.len() * threads.len()];
    for _ in 0..rounds {
        let cells = ways.iter().flat_map(|way| threads.map(|threads| (*way, threads)));
        for (times, (way, threads)) in times.iter_mut().zip(cells) {
            times.push(numbers_of(&["live", way, "pending", threads, tasks])[1]);
        }
    }
    let mut rows = Vec::new();
    for (way, times) in ways.iter().zip(times.chunks(threads.len())) {
        let cell = |times: &Vec<f64>| {
            format!(
                "{:.0} ({:.0} to {:.0})",
                median(times),
                percentile(times, 0.0),
                percentile(times, 100.0)
            )
        };
        rows.push([(*way).to_owned()].into_iter().chain(times.iter().map(cell)).collect());
    }
    let heads: Vec<_> = [""].into_iter().chain(threads).collect();
    let title = format!(
        "Milliseconds to cancel {} pending tasks, to the last destructor: medians of {rounds} \
         rounds in turn (least to most)",
        number(tasks)
    );
    table(&title, &heads, &rows);
    for (column, threads) in threads.iter().enumerate() {
        let ratio = median(&times[4 + column]) / median(&times[column]);
        budgets.most(&format!("ours: time to cancel, {threads}, of JoinSet"), ratio, 0.85, 2);
    }
}

/// Prints the CPU time in milliseconds and the peak of resident bytes.
fn limited(way: &str, tasks: usize) {
    const LIMIT: usize = 50_000;
    let runtime = runtime(false);
    match way {
        "by hand" => runtime.block_on(ways::semaphore_and_tracker(tasks, LIMIT)),
        _ => runtime.block_on(ways::registry_with_limit(tasks, LIMIT)),
    }
    // Nanoseconds that this thread, and there is only one, was running.
    let stat = fs::read_to_string("/proc/self/schedstat").unwrap_or_default();
    let time = stat.split(' ').next().and_then(|time| time.parse().ok()).unwrap_or(0.0_f64);
    println!("{} {}", time / 1e6, of_this_process("VmHWM"));
}

fn under_a_limit(tasks: &str, rounds: usize, budgets: &mut Budgets) {
    let ways = ["by hand", "ours"];
    let mut figures = [const { Vec::new() }; 4];
    for _ in 0..rounds {
        for (at, way) in ways.iter().enumerate() {
            let numbers = numbers_of(&["limited", way, tasks]);
            figures[2 * at].push(numbers[0]);
            figures[2 * at + 1].push(numbers[1]);
        }
    }
    let [hand_time, hand_peak, time, peak] = figures.map(|figures| median(&figures));
    let row = |way: &str, time: f64, peak: f64| {
        vec![way.to_owned(), format!("{time:.0}"), grouped(peak / 1e6)]
    };
    let rows = [row("Semaphore + TaskTracker", hand_time, hand_peak), row("ours", time, peak)];
    let title = format!("{} tasks of 10 ms under a limit of 50,000, current thread", number(tasks));
    table(&title, &["", "CPU time, ms", "resident peak, MB"], &rows);
    let what = "a million under a limit: CPU time, of Semaphore + TaskTracker";
    budgets.most(what, time / hand_time, 1.25, 2);
}

/// One thread serves requests with a task each while many others are open; another may take one
/// snapshot after another. Prints milliseconds of the median and the longest snapshot, how many
/// requests were served in a second, and the microseconds that they took: median, 99.9 % and most.
fn snapshots(sets: usize, snapshots: bool) {
    const TIME: Duration = Duration::from_secs(3);
    let registry = TaskRegistry::new();
    let way = Ours::new(registry.clone());
    let runtime = runtime(false);
    let mut held = Vec::new();
    let mut open = way.service(3, pending::<()>);
    for _ in 0..sets {
        held.push(runtime.block_on(head(&mut open)));
    }
    let stop = AtomicBool::new(false);
    let (times, waits) = thread::scope(|scope| {
        let snapshots = scope.spawn(|| {
            let mut times = Vec::new();
            while snapshots && !stop.load(Ordering::Relaxed) {
                let start = Instant::now();
                let snapshot = registry.snapshot();
                times.push(start.elapsed().as_secs_f64() * 1e3);
                assert!(snapshot.live_tasks.len() >= 3 * sets, "all of them live");
            }
            times
        });
        let mut waits = Vec::new();
        runtime.block_on(async {
            let mut service = way.service(1, || async {});
            let start = Instant::now();
            while start.elapsed() < TIME {
                let start = Instant::now();
                request(&mut service).await;
                waits.push(start.elapsed().as_secs_f64() * 1e6);
                yield_now().await;
            }
        });
        stop.store(true, Ordering::Relaxed);
        (snapshots.join().expect("no panic"), waits)
    });
    let times = if times.is_empty() { vec![0.0] } else { times };
    println!(
        "{} {} {} {} {} {}",
        median(&times),
        percentile(&times, 100.0),
        waits.len() as f64 / TIME.as_secs_f64(),
        median(&waits),
        percentile(&waits, 99.9),
        percentile(&waits, 100.0),
    );
}

fn snapshot_of_many_sets(sets: &str) {
    let row = |kind: &str| {
        let numbers = numbers_of(&["snapshots", kind, sets]);
        let mut row = vec![kind.to_owned()];
        row.extend(numbers.iter().enumerate().map(|(at, number)| match at {
            2 => grouped(*number),
            0 | 1 if kind == QUIET => "-".to_owned(),
            _ => format!("{number:.1}"),
        }));
        row
    };
    table(
        &format!(
            "Snapshots of {} sets with 3 tasks each, one after another without a pause",
            number(sets)
        ),
        &["", "snapshot, ms", "longest", "requests/s meanwhile", "each, µs", "99.9 %", "longest"],
        &[row(QUIET), row("with snapshots")],
    );
}
