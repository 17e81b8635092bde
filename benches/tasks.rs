//! What a task, and a request that spawns none, cost in instructions and in time.
//!
//! To see where they go, put `--tool=callgrind` and `callgrind_annotate` to work on this program
//! with the arguments `serve WAY SHAPE TASKS REQUESTS`, for instance `serve ours ready 1000 50`.
#![expect(clippy::print_stdout, reason = "a bench prints what it measures")]
#![expect(clippy::cast_precision_loss, reason = "no figure is that large")]

use std::time::{Duration, Instant};

use tokio::runtime::Builder;
use tower_tasks_benches::{
    Budgets, args, grouped, has_valgrind, median, on_all_cores, table,
    this_program_under_callgrind, total_of,
};

use crate::ways::{Job, Task, Way, request, wait_once, with_way};

mod ways;

fn main() {
    let args = args();
    if let Some(("serve", args)) = args.split_first().map(|(first, rest)| (first.as_str(), rest)) {
        let [way, shape, tasks, requests] = args else { panic!("serve WAY SHAPE TASKS REQUESTS") };
        let number = |text: &String| text.parse().expect("a number");
        serve(&Cell { way, shape, tasks: number(tasks) }, false, number(requests));
        return;
    }
    let quick = args.iter().any(|arg| arg == "--quick");
    let mut budgets = Budgets::default();
    if has_valgrind() {
        instructions_per_task(quick, &mut budgets);
        instructions_per_request(quick, &mut budgets);
    }
    time_per_task(quick, &mut budgets);
    budgets.print();
}

/// Requests that each start so many tasks of this shape in this way.
#[derive(Clone, Copy)]
struct Cell<'a> {
    way: &'a str,
    shape: &'a str,
    tasks: usize,
}

fn serve(cell: &Cell<'_>, workers: bool, requests: usize) -> Duration {
    let mut time = Duration::ZERO;
    let Cell { shape, tasks, .. } = *cell;
    with_way(cell.way, Serve { shape, tasks, requests, workers, time: &mut time });
    time
}

struct Serve<'a> {
    shape: &'a str,
    tasks: usize,
    requests: usize,
    /// On a runtime with two of them; otherwise on the current thread.
    workers: bool,
    time: &'a mut Duration,
}

impl Job for Serve<'_> {
    fn with(self, way: impl Way) {
        match self.shape {
            "ready" => self.serve(way, || async {}),
            "waits" => self.serve(way, wait_once),
            shape => panic!("no such shape: {shape}"),
        }
    }
}

impl Serve<'_> {
    fn serve<T: Task>(self, way: impl Way, task: impl Fn() -> T + Copy + Send + 'static) {
        let Self { tasks, requests, .. } = self;
        let (runtime, drivers) = if self.workers {
            (Builder::new_multi_thread().worker_threads(2).enable_all().build(), 1)
        } else {
            (Builder::new_current_thread().enable_all().build(), 0)
        };
        let requests = async move {
            let mut service = way.service(tasks, task);
            let start = Instant::now();
            for _ in 0..requests {
                request(&mut service).await;
                if tasks > 0 {
                    way.wait(drivers).await;
                }
            }
            start.elapsed()
        };
        let runtime = runtime.expect("a runtime");
        *self.time = if self.workers {
            // As handlers do, on a worker.
            runtime.block_on(runtime.spawn(requests)).expect("no panic")
        } else {
            runtime.block_on(requests)
        };
    }
}

/// Instructions per request: by the difference of two runs, so that start, warm-up and end cancel.
fn instructions(cells: &[Cell<'_>]) -> Vec<f64> {
    let runs: Vec<_> = cells
        .iter()
        .flat_map(|cell| {
            let more = (6_000 / cell.tasks.max(1)).clamp(10, 1_000);
            let warm_up = more.div_ceil(4) + 3;
            [(*cell, warm_up), (*cell, warm_up + more)]
        })
        .collect();
    let totals = on_all_cores(&runs, |(cell, requests)| {
        let mut command = this_program_under_callgrind();
        command.args(["serve", cell.way, cell.shape, &cell.tasks.to_string()]);
        let output = command.arg(requests.to_string()).output().expect("valgrind runs");
        total_of(&output.stderr)
    });
    let difference = |(runs, totals): (&[(Cell<'_>, usize)], &[f64])| {
        (totals[1] - totals[0]) / (runs[1].1 - runs[0].1) as f64
    };
    runs.chunks(2).zip(totals.chunks(2)).map(difference).collect()
}

/// The cost of each cell, with ways as rows and shapes as columns.
struct Costs<'a> {
    ways: &'a [&'a str],
    columns: &'a [(&'a str, usize)],
    each: Vec<f64>,
}

impl<'a> Costs<'a> {
    fn cells(ways: &'a [&'a str], columns: &'a [(&'a str, usize)]) -> Vec<Cell<'a>> {
        let row = |way| columns.iter().map(move |&(shape, tasks)| Cell { way, shape, tasks });
        ways.iter().flat_map(|way| row(*way)).collect()
    }

    fn at(&self, way: &str, column: usize) -> f64 {
        let row = self.ways.iter().position(|known| *known == way).expect("it was measured");
        self.each[row * self.columns.len() + column]
    }

    /// Prints the costs and their ratio to `tokio::spawn`.
    fn print(&self, title: &str) {
        let row = |way: &&str| {
            let cell = |column| {
                let cost = self.at(way, column);
                let ratio = cost / self.at("tokio::spawn", column);
                format!("{} ({ratio:.2})", grouped(cost))
            };
            [(*way).to_owned()].into_iter().chain((0..self.columns.len()).map(cell)).collect()
        };
        let rows: Vec<_> = self.ways.iter().map(row).collect();
        let heads = self.columns.iter().map(|(shape, tasks)| format!("{shape}, {tasks}"));
        table(title, &[String::new()].into_iter().chain(heads).collect::<Vec<_>>(), &rows);
    }
}

fn instructions_per_task(quick: bool, budgets: &mut Budgets) {
    let ways = [
        "tokio::spawn",
        "JoinSet",
        "tracker + child token",
        "scope-spawn",
        "by hand",
        "by hand + permit",
        "ours",
        "ours, `Keep`",
        "ours + limit",
        "ours in a context",
        "ours + limit + trace-id",
        "ours + timeout",
        "ours, graceful",
        "ours, in a group",
    ];
    let columns = [("ready", 1000), ("waits", 1000), ("ready", 64), ("waits", 64)];
    let quick_ways =
        ["tokio::spawn", "by hand + permit", "ours", "ours + limit", "ours + limit + trace-id"];
    let (ways, columns) =
        if quick { (&quick_ways[..], &columns[..2]) } else { (&ways[..], &columns[..]) };
    let per_request = instructions(&Costs::cells(ways, columns));
    let tasks = columns.iter().map(|column| column.1 as f64).cycle();
    let each = per_request.into_iter().zip(tasks).map(|(cost, tasks)| cost / tasks).collect();
    let costs = Costs { ways, columns, each };
    // 64 raw tasks happen to suit glibc's allocator: 32 or 100 of them cost what 1,000 do.
    costs.print("Instructions per task, by tasks a request (of tokio::spawn)");
    // By hand has no trace id.
    let budgeted = [
        ("ours", [1.30, 1.40], true),
        ("ours + limit", [1.40, 1.45], true),
        ("ours + limit + trace-id", [1.55, 1.60], false),
    ];
    for (way, most, by_hand) in budgeted {
        for (column, most) in most.into_iter().enumerate() {
            let (shape, tasks) = columns[column];
            let cost = costs.at(way, column);
            let what = format!("{way}, {shape}, {tasks}: instructions, of");
            let raw = costs.at("tokio::spawn", column);
            budgets.most(&format!("{what} tokio::spawn"), cost / raw, most, 3);
            if by_hand {
                let hand = costs.at("by hand + permit", column);
                budgets.most(&format!("{what} by hand + permit"), cost / hand, 0.75, 3);
            }
        }
    }
}

fn instructions_per_request(quick: bool, budgets: &mut Budgets) {
    let ways =
        ["tokio::spawn", "tower-scope-spawn", "by hand", "ours", "ours, `Keep`", "ours + limit"];
    let columns = [("ready", 0), ("ready", 1), ("waits", 1), ("ready", 3), ("waits", 3)];
    let columns = if quick { &columns[..2] } else { &columns[..] };
    let each = instructions(&Costs::cells(&ways, columns));
    let costs = Costs { ways: &ways, columns, each };
    let more = |way: &str, column| costs.at(way, column) - costs.at("tokio::spawn", column);
    let row = |way: &&str| {
        let cell = |column| match *way {
            "tokio::spawn" => grouped(costs.at(way, column)),
            _ => format!("+{}", grouped(more(way, column))),
        };
        [(*way).to_owned()].into_iter().chain((0..columns.len()).map(cell)).collect()
    };
    let rows: Vec<_> = ways.iter().map(row).collect();
    let heads = ["", "nothing spawned", "1 ready", "1 waits", "3 ready", "3 wait"];
    let heads = &heads[..=columns.len()];
    table("Instructions per request, over the bare service with tokio::spawn", heads, &rows);
    budgets.most("nothing spawned: instructions over bare", more("ours", 0), 600.0, 0);
    budgets.most("1 ready task: instructions over tokio::spawn", more("ours", 1), 2000.0, 0);
}

fn time_per_task(quick: bool, budgets: &mut Budgets) {
    let ways = [
        "tokio::spawn",
        "JoinSet",
        "tracker + child token",
        "scope-spawn",
        "by hand + permit",
        "ours",
        "ours + limit",
        "ours + timeout",
    ];
    let columns = [("ready", 1000), ("waits", 1000), ("ready", 64), ("waits", 64)];
    let (rounds, tasks) = if quick { (5, 20_000) } else { (11, 32_000) };
    for workers in [false, true] {
        let cells = Costs::cells(&ways, &columns);
        // In turns, so that what comes and goes on the machine hits all of them.
        let mut times = vec![Vec::new(); cells.len()];
        for _ in 0..rounds {
            for (cell, times) in cells.iter().zip(&mut times) {
                let time = serve(cell, workers, tasks / cell.tasks);
                times.push(time.as_secs_f64() * 1e9 / tasks as f64);
            }
        }
        let each = times.iter().map(|times| median(times)).collect();
        let costs = Costs { ways: &ways, columns: &columns, each };
        let on = if workers { "2 workers" } else { "current thread" };
        costs.print(&format!(
            "Nanoseconds per task on {on}, by tasks a request (of tokio::spawn); noise-prone: \
             medians of {rounds} rounds"
        ));
        for (column, (shape, _)) in columns.iter().enumerate().take(2) {
            let ours = costs.at("ours", column);
            let what = format!("ours, {shape}, 1000, {on}: time (noise-prone), of");
            let raw = costs.at("tokio::spawn", column);
            budgets.most(&format!("{what} tokio::spawn"), ours / raw, 1.45, 2);
            let hand = costs.at("by hand + permit", column);
            budgets.most(&format!("{what} by hand + permit"), ours / hand, 0.8, 2);
        }
    }
    println!();
}
