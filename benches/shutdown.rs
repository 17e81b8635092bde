//! A shutdown of many live tasks: whether the time is linear in their number.
#![expect(clippy::cast_precision_loss, reason = "no figure is that large")]

use std::{
    convert::Infallible,
    future::{pending, ready},
    time::Duration,
};

use http::{Request, Response};
use http_body_util::Full;
use tokio::{
    runtime::{Builder, Runtime},
    sync::watch,
};
use tower::{Layer, Service, service_fn};
use tower_tasks::{AtEnd, Report, Shutdown, TaskRegistry, TaskSet, TaskSetLayer};
use tower_tasks_benches::{Budgets, args, grouped, median, table};

/// How the tasks end.
#[derive(Clone, Copy)]
enum End {
    /// By themselves, all when it begins.
    Finished,
    Cancelled,
    /// Graceful ones, which do not do as they are told.
    Aborted,
}

const MOST: usize = 100_000;

fn main() {
    let runs = if args().iter().any(|arg| arg == "--quick") { 1 } else { 5 };
    let mut budgets = Budgets::default();
    let mut rows = Vec::new();
    for (how, end) in
        [("finished", End::Finished), ("cancelled", End::Cancelled), ("aborted", End::Aborted)]
    {
        for (sets, many) in [("one set", false), ("a set each", true)] {
            for (threads, workers) in [("current thread", 0), ("2 workers", 2)] {
                let millis = [MOST / 4, MOST / 2, MOST].map(|tasks| {
                    let runs = (0..runs).map(|_| shut_down(tasks, end, many, workers));
                    median(&runs.collect::<Vec<_>>())
                });
                let name = format!("{how}, {sets}, {threads}");
                let mut row = vec![name.clone()];
                row.extend(millis.map(|millis| format!("{millis:.1}")));
                row.push(format!("{:.0}", millis[2] * 1e6 / MOST as f64));
                rows.push(row);
                budgets.most(
                    &format!("{name}: ms for {}", grouped(MOST as f64)),
                    millis[2],
                    1e3,
                    0,
                );
                let growth = millis[2] / millis[0].max(0.1);
                budgets.most(&format!("{name}: times for four times as many"), growth, 8.0, 1);
            }
        }
    }
    let head = |tasks: usize| format!("{}, ms", grouped(tasks as f64));
    let heads =
        ["tasks".to_owned(), head(MOST / 4), head(MOST / 2), head(MOST), "ns a task".to_owned()];
    table("A shutdown of live tasks", &heads, &rows);
    budgets.print();
}

fn runtime(workers: usize) -> Runtime {
    let runtime = if workers > 0 {
        Builder::new_multi_thread().worker_threads(workers).enable_all().build()
    } else {
        Builder::new_current_thread().enable_all().build()
    };
    runtime.expect("a runtime")
}

/// The milliseconds that it took by its own report.
fn shut_down(count: usize, end: End, many: bool, workers: usize) -> f64 {
    runtime(workers).block_on(async {
        let tasks = TaskRegistry::new().at_end(AtEnd::Keep);
        let budget = if matches!(end, End::Finished) { Duration::MAX } else { Duration::ZERO };
        let shutdown = Shutdown::new(budget).without_signals().tasks(&tasks);
        let mut service = TaskSetLayer::new(&tasks).layer(service_fn(|_: Request<()>| {
            let mut response = Response::new(Full::new(bytes::Bytes::from_static(b"to be read")));
            response.extensions_mut().insert(TaskSet::current().expect("a layer is above"));
            ready(Ok::<_, Infallible>(response))
        }));
        let (start, begun) = watch::channel(0_usize);
        let mut set = None;
        let mut responses = Vec::new();
        for _ in 0..count {
            if many || set.is_none() {
                let response =
                    service.call(Request::new(())).await.unwrap_or_else(|no| match no {});
                set = response.extensions().get::<TaskSet>().cloned();
                responses.push(response);
            }
            let set = set.as_ref().expect("it was made");
            let (mut begun, start) = (begun.clone(), start.clone());
            let spawned = match end {
                End::Finished => set
                    .spawn("task", async move {
                        start.send_modify(|started| *started += 1);
                        drop(start);
                        let _ = begun.wait_for(|started| *started > MOST).await;
                    })
                    .is_ok(),
                End::Cancelled => set
                    .spawn("task", async move {
                        start.send_modify(|started| *started += 1);
                        pending::<()>().await;
                    })
                    .is_ok(),
                End::Aborted => set
                    .task("task")
                    .grace(Duration::MAX)
                    .spawn_graceful(async move |_| {
                        start.send_modify(|started| *started += 1);
                        pending::<()>().await;
                    })
                    .is_ok(),
            };
            assert!(spawned, "nothing limits it");
        }
        // All of them wait.
        while *begun.borrow() < count {
            tokio::task::yield_now().await;
        }
        drop(responses);
        if let End::Finished = end {
            start.send_modify(|started| *started = MOST + 1);
        }
        let report = shutdown.finish().await;
        check(&report, count, end);
        report.took.as_secs_f64() * 1e3
    })
}

fn check(report: &Report, count: usize, end: End) {
    let of = &report.drained;
    let found = match end {
        End::Finished => of.completed,
        End::Cancelled => of.cancelled,
        End::Aborted => of.aborted,
    };
    // Those that finish may have begun to before the report's first figures.
    let whole = matches!(end, End::Finished) || found == count as u64;
    assert!(whole && of.left == 0, "{report}");
}
