//! A million live tasks, ten thousand sets, and a limit that is always full. Each measurement is in
//! a process of its own.
#![expect(clippy::print_stdout, reason = "a bench prints what it measures")]
#![expect(clippy::cast_precision_loss, reason = "no figure is that large")]

use std::{
    any::Any,
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
    Budgets, args, grouped, has_valgrind, median, numbers_of, of_this_process, on_all_cores,
    percentile, table, this_program_under_callgrind, total_of,
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
        ["snapshot", sets] => drop(with_sets(number(sets), 0).registry.snapshot()),
        ["snapshots", kind, sets, own] => snapshots(number(sets), number(own), kind != QUIET),
        _ => {
            let quick = args.contains(&"--quick");
            let million = if quick { "100000" } else { "1000000" };
            let mut budgets = Budgets::default();
            resident(million, &mut budgets);
            cancelled(million, if quick { 3 } else { 7 }, &mut budgets);
            under_a_limit(million, if quick { 1 } else { 7 }, &mut budgets);
            let rounds = if quick { 1 } else { 3 };
            snapshots_of("sets with 3 tasks each", ["10000", "0"], rounds, &mut budgets);
            snapshots_of("tasks in one set", ["0", million], rounds, &mut budgets);
            if has_valgrind() {
                instructions_under_a_lock("10000", &mut budgets);
                growth(million, &mut budgets);
            }
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

/// Starts the tasks in one request, and prints the resident bytes that they take, and the
/// milliseconds until they are cancelled and those until they were started.
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
            let start = Instant::now();
            let response = head(&mut service).await;
            while POLLED.load(Ordering::Relaxed) < self.tasks {
                if self.workers {
                    sleep(Duration::from_millis(1)).await;
                } else {
                    yield_now().await;
                }
            }
            let started = start.elapsed();
            let resident = of_this_process("VmRSS") - before;
            let start = Instant::now();
            way.cancel().await;
            let time = start.elapsed();
            drop(response);
            let [time, started] = [time, started].map(|time| time.as_secs_f64() * 1e3);
            println!("{} {time} {started}", resident / self.tasks as f64);
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
    let mut cancelled = vec![Vec::new(); ways.len() * threads.len()];
    let mut started = cancelled.clone();
    for _ in 0..rounds {
        let cells = ways.iter().flat_map(|way| threads.map(|threads| (*way, threads)));
        for (at, (way, threads)) in cells.enumerate() {
            let numbers = numbers_of(&["live", way, "pending", threads, tasks]);
            cancelled[at].push(numbers[1]);
            started[at].push(numbers[2]);
        }
    }
    let tasks = number(tasks);
    for (what, name, times, most) in [
        (format!("start {tasks} tasks, to the last first poll"), "start", started, 1.5),
        (
            format!("cancel {tasks} pending tasks, to the last destructor"),
            "cancel",
            cancelled,
            0.85,
        ),
    ] {
        let row = |(way, times): (&&str, &[Vec<f64>])| {
            let cell = |times: &Vec<f64>| {
                let [least, most] = [0.0, 100.0].map(|percent| percentile(times, percent));
                format!("{:.0} ({least:.0} to {most:.0})", median(times))
            };
            [(*way).to_owned()].into_iter().chain(times.iter().map(cell)).collect()
        };
        let rows: Vec<_> = ways.iter().zip(times.chunks(threads.len())).map(row).collect();
        let heads: Vec<_> = [""].into_iter().chain(threads).collect();
        let title =
            format!("Milliseconds to {what}: medians of {rounds} rounds in turn (least to most)");
        table(&title, &heads, &rows);
        for (column, threads) in threads.iter().enumerate() {
            let ratio = median(&times[4 + column]) / median(&times[column]);
            budgets.most(&format!("ours: time to {name}, {threads}, of JoinSet"), ratio, most, 2);
        }
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

/// Requests with three tasks each that stay open, all made by one thread: they share a lock. And
/// tasks in the registry's own set, which have another.
fn with_sets(sets: usize, own: usize) -> WithSets {
    let registry = TaskRegistry::new();
    let way = Ours::new(registry.clone());
    let runtime = runtime(false);
    let mut open = way.service(3, pending::<()>);
    let held = (0..sets).map(|_| -> Box<dyn Any> { Box::new(runtime.block_on(head(&mut open))) });
    let held = held.collect();
    let entered = runtime.enter();
    for _ in 0..own {
        drop(registry.spawn("task", pending::<()>()).expect("nothing is full or closed"));
    }
    drop(entered);
    WithSets { _held: held, registry, way, runtime }
}

struct WithSets {
    _held: Vec<Box<dyn Any>>,
    registry: TaskRegistry,
    way: Ours,
    runtime: Runtime,
}

/// One thread serves requests with a task each, and spawns besides, at the very locks that all those
/// others share which are open; another may take one snapshot after another. Prints milliseconds of
/// the median and the longest snapshot, the microseconds of the longest spawn during a snapshot (the
/// median of all snapshots), how many requests were served in a second, and the microseconds that
/// they and the spawns took: 99.9 % and most.
fn snapshots(sets: usize, own: usize, snapshots: bool) {
    const TIME: Duration = Duration::from_secs(3);
    let with_sets = with_sets(sets, own);
    let WithSets { registry, way, runtime, .. } = &with_sets;
    let stop = AtomicBool::new(false);
    let (snapshots, requests, spawns) = thread::scope(|scope| {
        let snapshots = scope.spawn(|| {
            let mut times = Vec::new();
            while snapshots && !stop.load(Ordering::Relaxed) {
                let start = Instant::now();
                let snapshot = registry.snapshot();
                times.push((start, start.elapsed()));
                assert!(snapshot.live_tasks.len() >= 3 * sets + own, "all of them live");
            }
            times
        });
        let (mut requests, mut spawns) = (Vec::new(), Vec::new());
        runtime.block_on(async {
            let mut service = way.service(1, || async {});
            let begin = Instant::now();
            while begin.elapsed() < TIME {
                let start = Instant::now();
                request(&mut service).await;
                requests.push(micros(start.elapsed()));
                let start = Instant::now();
                registry.spawn("task", async {}).expect("nothing is full or closed");
                spawns.push((start, start.elapsed()));
                yield_now().await;
            }
        });
        stop.store(true, Ordering::Relaxed);
        (snapshots.join().expect("no panic"), requests, spawns)
    });
    let during = |&(start, took): &(Instant, Duration)| {
        // The one before may have waited into it.
        let first = spawns.partition_point(|spawn| spawn.0 < start).saturating_sub(1);
        let spawns = spawns[first..].iter().take_while(|spawn| spawn.0 < start + took);
        spawns.map(|spawn| micros(spawn.1)).fold(0.0, f64::max)
    };
    let during: Vec<_> = snapshots.iter().map(during).collect();
    let times: Vec<_> = snapshots.iter().map(|snapshot| micros(snapshot.1) / 1e3).collect();
    let [during, times] =
        [during, times].map(|figures| if figures.is_empty() { vec![0.0] } else { figures });
    let spawns: Vec<_> = spawns.iter().map(|spawn| micros(spawn.1)).collect();
    println!(
        "{} {} {} {} {} {} {} {}",
        median(&times),
        percentile(&times, 100.0),
        median(&during),
        requests.len() as f64 / TIME.as_secs_f64(),
        percentile(&requests, 99.9),
        percentile(&requests, 100.0),
        percentile(&spawns, 99.9),
        percentile(&spawns, 100.0),
    );
}

fn micros(time: Duration) -> f64 {
    time.as_secs_f64() * 1e6
}

fn snapshots_of(what: &str, [sets, own]: [&str; 2], rounds: usize, budgets: &mut Budgets) {
    let kinds = [QUIET, "with snapshots"];
    let mut figures = [const { Vec::new() }; 2];
    for _ in 0..rounds {
        for (figures, kind) in figures.iter_mut().zip(kinds) {
            figures.push(numbers_of(&["snapshots", kind, sets, own]));
        }
    }
    let figures = figures.map(|rounds: Vec<Vec<f64>>| {
        let of_rounds = |at| median(&rounds.iter().map(|numbers| numbers[at]).collect::<Vec<_>>());
        (0..rounds[0].len()).map(of_rounds).collect::<Vec<_>>()
    });
    let row = |(kind, numbers): (&str, &Vec<f64>)| {
        let mut row = vec![kind.to_owned()];
        row.extend(numbers.iter().enumerate().map(|(at, number)| match at {
            3 => grouped(*number),
            0..=2 if kind == QUIET => "-".to_owned(),
            _ => format!("{number:.1}"),
        }));
        row
    };
    let rows: Vec<_> = kinds.into_iter().zip(&figures).map(row).collect();
    let what = format!("{} {what}", number(if own == "0" { sets } else { own }));
    table(
        &format!(
            "Snapshots of {what}, one after another without a pause: medians of {rounds} rounds \
             in turn"
        ),
        &[
            "",
            "snapshot, ms",
            "longest",
            "longest spawn in one, µs, median",
            "requests/s meanwhile",
            "each, 99.9 %, µs",
            "longest",
            "a spawn, 99.9 %, µs",
            "longest",
        ],
        &rows,
    );
    // The longest of all is how long others had the processor, with snapshots and without.
    let longest = format!("snapshots of {what}: µs of the longest spawn in one (noise-prone)");
    budgets.most(&longest, figures[1][2], 1000.0, 0);
    let spawns = format!("snapshots of {what}: µs of 99.9 % of spawns (noise-prone)");
    budgets.most(&spawns, figures[1][6], 1000.0, 0);
}

/// The longest that a snapshot does under one lock: all of the sets are in one shard.
fn instructions_under_a_lock(sets: &str, budgets: &mut Budgets) {
    let mut command = this_program_under_callgrind();
    command.env("VALGRIND_OPTS", "--toggle-collect=*Sets::for_snapshot*");
    let output = command.args(["snapshot", sets]).output().expect("valgrind runs");
    let total = total_of(&output.stderr);
    assert!(total > 0.0, "the function is there");
    // A millisecond, of a slow processor.
    let what = format!("a snapshot of {} sets: instructions under one lock", number(sets));
    budgets.most(&what, total, 1e6, 0);
}

/// Instructions per task, to start and to cancel them, do not grow with the number of tasks. If any
/// of it recursed by task, a million would overflow the stack.
fn growth(most: &str, budgets: &mut Budgets) {
    let mut counts = vec!["0", "10000", "100000", "1000000"];
    counts.retain(|count| count.len() <= most.len());
    let totals = on_all_cores(&counts, |count| {
        let mut command = this_program_under_callgrind();
        let output = command.args(["live", "ours", "pending", CURRENT, count]).output();
        total_of(&output.expect("valgrind runs").stderr)
    });
    let tasks = counts.iter().map(|count| count.parse::<f64>().expect("a number"));
    let each = tasks.zip(&totals).skip(1).map(|(tasks, total)| (total - totals[0]) / tasks);
    let each: Vec<_> = each.collect();
    let heads = counts.iter().skip(1).map(|count| number(count));
    let heads: Vec<_> = [String::new()].into_iter().chain(heads).collect();
    let row = ["ours".to_owned()].into_iter().chain(each.iter().map(|each| grouped(*each)));
    table(
        "Instructions per pending task, from its start to its end, by tasks in one request",
        &heads,
        &[row.collect()],
    );
    let ratio = percentile(&each, 100.0) / percentile(&each, 0.0);
    budgets.most(
        "ours: instructions per task, the count with most of that with least",
        ratio,
        1.1,
        3,
    );
}
