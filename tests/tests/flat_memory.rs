//! Ten million short tasks: what has ended is gone, with its result, whether its set goes on or not.

#![allow(clippy::unwrap_used)]

use std::{
    alloc::System,
    convert::Infallible,
    future::{pending, ready},
    time::Duration,
};

use cap::Cap;
use http::{Request, Response};
use tokio::task::yield_now;
use tower::{Layer, ServiceExt, service_fn};
use tower_tasks::{AtEnd, TaskRegistry, TaskSet, TaskSetLayer};

/// Counts the bytes that are allocated now. `unsafe` is forbidden here, so it is a crate's.
#[global_allocator]
static ALLOCATOR: Cap<System> = Cap::new(System, usize::MAX);

/// A debug build takes ten times as long for each.
const TASKS: u64 = if cfg!(debug_assertions) { 500_000 } else { 10_000_000 };
const AT_ONCE: u64 = 100;
/// In bytes, of all of them: what is kept to use again is there after the first tenth.
const GROWTH: usize = 64 << 10;

/// Short ones, whose results nobody takes: half are plain, half have choices of their own. Returns
/// when of the set only so many `others` live.
async fn spawn_some(set: &TaskSet, others: usize) {
    for n in 0..AT_ONCE {
        let result = async {
            yield_now().await;
            [1_u8; 100]
        };
        if n % 2 == 0 {
            set.spawn("plain", result).unwrap();
        } else {
            let task = set.task("with choices").at_end(AtEnd::Keep);
            task.timeout(Duration::from_secs(60)).spawn(result).unwrap();
        }
    }
    while set.len() > others {
        yield_now().await;
    }
}

#[tokio::test]
async fn of_ten_million_tasks_that_have_ended_nothing_is_left() {
    let tasks = TaskRegistry::new();
    let layer = TaskSetLayer::new(&tasks);
    let mut open = None;
    let handler = service_fn(|_: Request<()>| {
        open = Some(TaskSet::current().unwrap());
        ready(Ok::<_, Infallible>(Response::new("open".to_owned())))
    });
    let response = layer.layer(handler).oneshot(Request::new(())).await.unwrap();
    let open = open.unwrap();
    open.spawn("stays", pending::<()>()).unwrap();

    let mut live_bytes = Vec::new();
    for tenth in 0..10 {
        let own = tasks.clone();
        for _ in 0..TASKS / AT_ONCE / 30 {
            // A request that comes and goes; one that goes on, as that of a socket; and none.
            let handler = service_fn(async |_: Request<()>| {
                spawn_some(&TaskSet::current().unwrap(), 0).await;
                Ok::<_, Infallible>(Response::new(String::new()))
            });
            layer.layer(handler).oneshot(Request::new(())).await.unwrap();
            spawn_some(&open, 1).await;
            let spawns = async { spawn_some(&TaskSet::current().unwrap(), 1).await };
            own.spawn("spawns", spawns).unwrap().await.unwrap();
        }
        live_bytes.push(ALLOCATOR.allocated());
        let totals = tasks.snapshot().totals;
        assert!(totals.is_exact(), "{totals:?}");
        assert_eq!((totals.live, totals.spawned), (1, 1 + totals.completed), "{tenth}");
    }
    let grown = live_bytes[9].saturating_sub(live_bytes[0]);
    assert!(grown < GROWTH, "{grown} bytes more: {live_bytes:?}");
    drop(response);
}
