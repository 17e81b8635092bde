//! Closures that block: tasks until they return, whoever has given up on them.

use std::{sync::mpsc, time::Duration};

use tokio::runtime::Builder;
use tower_request_context::RequestContext;
use tower_task_set::{
    AtEnd, Cause, SpawnError, SpawnLimit, StopToken, TaskError, TaskHandle, TaskRegistry, TaskSet,
    TaskSetLayer, TaskState,
};

use crate::support::*;

/// A closure that has started, and returns when it is let.
#[track_caller]
fn blocked(set: &TaskSet) -> (TaskHandle<()>, mpsc::Sender<()>) {
    let (tell, told) = mpsc::channel();
    let (open, gate) = mpsc::channel();
    let task = set.spawn_blocking("blocked", move |_| {
        tell.send(()).unwrap();
        gate.recv().unwrap();
    });
    told.recv().unwrap();
    (task.unwrap(), open)
}

#[tokio::test]
async fn its_result_is_what_the_handle_yields() {
    let tasks = TaskRegistry::new();
    let task = tasks.spawn_blocking("blocking", |stop| (7, stop.is_cancelled()));
    assert_eq!(outcome(task.unwrap()).await, Yield::Completed((7, false)));
    assert_ledger(&tasks, "completed 1");
}

#[tokio::test]
async fn it_is_a_task_until_it_returns_and_keeps_its_permit() {
    let limit = SpawnLimit::new(1);
    let tasks = TaskRegistry::new().at_end(AtEnd::Cancel).limit(limit.clone());
    let served = serve(&TaskSetLayer::new(&tasks));
    let line = line!() + 1;
    let (task, open) = blocked(&served.set);
    // Everybody gives up on it.
    drop(task);
    served.end(ENDS[3]);
    tasks.cancel_all();
    tasks.abort_all();
    tasks.close();
    assert_eq!(limit.in_use(), 1);
    let list = tasks.snapshot().live_tasks;
    assert_eq!((list[0].name, list[0].state), ("blocked", TaskState::Cancelling));
    assert_eq!((list[0].site.file(), list[0].site.line()), (file!(), line));
    assert!(poll_once(std::pin::pin!(tasks.wait())).is_pending());
    open.send(()).unwrap();
    tasks.wait().await;
    assert_eq!(limit.in_use(), 0);
    assert_ledger(&tasks, "completed 1");
}

#[tokio::test(start_paused = true)]
async fn it_is_told_to_end_and_why() {
    let tasks = TaskRegistry::new();
    let (tell, told) = mpsc::channel();
    let closure = || {
        let tell = tell.clone();
        move |stop: StopToken| {
            tell.send(()).unwrap();
            while !stop.is_cancelled() {
                std::thread::yield_now();
            }
            stop.cause()
        }
    };
    let task = tasks.spawn_blocking("blocking", closure());
    let timed = tasks.task("timed").timeout(Duration::from_secs(1)).spawn_blocking(closure());
    // One that is told before it starts does not run.
    told.recv().unwrap();
    told.recv().unwrap();
    tokio::time::advance(Duration::from_secs(1)).await;
    assert_eq!(outcome(timed.unwrap()).await, Yield::Completed(Some(Cause::TimedOut)));
    tasks.cancel_all();
    assert_eq!(outcome(task.unwrap()).await, Yield::Completed(Some(Cause::Shutdown)));
    assert_ledger(&tasks, "completed 2");
}

/// A runtime with one thread for what blocks.
fn one_thread() -> tokio::runtime::Runtime {
    Builder::new_current_thread().enable_all().max_blocking_threads(1).build().unwrap()
}

#[test]
fn one_that_is_told_to_end_before_it_starts_never_runs() {
    let runtime = one_thread();
    runtime.block_on(async {
        let tasks = TaskRegistry::new();
        let served = serve(&TaskSetLayer::new(&tasks).at_end(AtEnd::Cancel));
        let (first, open) = blocked(&served.set);
        let dropped = Flag::default();
        let queue = |name| {
            let (guard, set) = (dropped.on_drop(), served.set.clone());
            set.spawn_blocking(name, move |_| {
                let _guard = guard;
                panic!("it runs")
            })
            .unwrap()
        };
        let told = queue("told");
        let timed = served.set.task("timed").timeout(Duration::ZERO);
        let timed = timed.spawn_blocking(|_| panic!("it runs")).unwrap();
        let at_end = queue("at_end");
        told.cancel();
        settle().await;
        served.end(ENDS[0]);
        assert_eq!(tasks.len(), 4);
        open.send(()).unwrap();
        assert_eq!(outcome(first).await, COMPLETED);
        assert_eq!(outcome::<()>(told).await, Yield::Cancelled(Cause::Requested));
        assert_eq!(outcome::<()>(timed).await, Yield::TimedOut);
        assert_eq!(outcome::<()>(at_end).await, Yield::Cancelled(Cause::Completed));
        assert!(dropped.is_set());
        assert_ledger(&tasks, "completed 1, cancelled 2, timed out 1");
    });
}

#[tokio::test]
async fn the_set_and_the_context_are_current_in_it_and_in_its_destructors() {
    let tasks = TaskRegistry::new();
    let served = serve(&TaskSetLayer::new(&tasks));
    let context = RequestContext::new().with("a value");
    let seen = Log::new();
    let look = {
        let seen = seen.clone();
        move || {
            let value = RequestContext::current().get::<&str>().copied();
            seen.push((TaskSet::current().is_ok(), value));
        }
    };
    let task = context.sync_scope(|| {
        let guard = OnDrop::new(look.clone());
        tasks.spawn_blocking("blocking", move |_| {
            let _guard = guard;
            look();
            TaskSet::current().unwrap().spawn_blocking("child", move |_| look())
        })
    });
    let Yield::Completed(child) = outcome(task.unwrap()).await else { panic!() };
    assert_eq!(outcome(child.unwrap()).await, COMPLETED);
    assert_eq!(seen.take(), [(true, Some("a value")); 3]);
    drop(served);
}

#[tokio::test]
async fn its_panic_is_caught_and_told() {
    let tasks = TaskRegistry::new();
    let line = line!() + 1;
    let task = tasks.spawn_blocking::<_, ()>("blocking", |_| panic!("in the closure"));
    let Err(TaskError::Panicked(panic)) = task.unwrap().await else { unreachable!() };
    assert_eq!((panic.message(), panic.task()), ("in the closure", Some("blocking")));
    assert_eq!(panic.spawn_site().map(std::panic::Location::line), Some(line));
    assert_ledger(&tasks, "panicked 1");
}

#[test]
fn a_destructor_that_panics_in_one_that_never_runs_counts_as_a_panic() {
    let runtime = one_thread();
    runtime.block_on(async {
        let tasks = TaskRegistry::new();
        let served = serve(&TaskSetLayer::new(&tasks));
        let (first, open) = blocked(&served.set);
        let bomb = OnDrop::new(|| panic!("in the drop"));
        let task = served.set.spawn_blocking("bomb", move |_| drop(bomb)).unwrap();
        task.cancel();
        open.send(()).unwrap();
        assert_eq!(outcome(first).await, COMPLETED);
        assert_eq!(outcome(task).await, Yield::Panicked("in the drop".to_owned()));
        assert_ledger(&tasks, "completed 1, panicked 1");
    });
}

#[test]
fn without_a_runtime_it_is_refused_and_comes_back() {
    let tasks = TaskRegistry::new();
    let refused = tasks.spawn_blocking("blocking", |_| "it runs").unwrap_err();
    assert_eq!(refused.reason, SpawnError::NoRuntime);
    let runtime = current_thread();
    let tasks = TaskRegistry::new().runtime(runtime.handle().clone());
    let task = tasks.spawn_blocking("blocking", refused.future).unwrap();
    assert_eq!(runtime.block_on(outcome(task)), Yield::Completed("it runs"));
    drop(runtime);
    let refused = tasks.spawn_blocking("blocking", |_| ()).unwrap_err();
    assert_eq!(refused.reason, SpawnError::NoRuntime);
    assert_ledger(&tasks, "refused 1, completed 1");
}

#[test]
fn a_runtime_that_is_shut_down_waits_for_nothing_and_what_runs_is_tracked_on() {
    let runtime = one_thread();
    let tasks = TaskRegistry::new();
    let (first, open, queued) = runtime.block_on(async {
        let served = serve(&TaskSetLayer::new(&tasks));
        let (first, open) = blocked(&served.set);
        let queued = served.set.spawn_blocking("queued", |_| ());
        (first, open, queued.unwrap())
    });
    runtime.shutdown_background();
    assert_ledger(&tasks, "live 2");
    open.send(()).unwrap();
    let other = current_thread();
    assert_eq!(other.block_on(outcome(first)), COMPLETED);
    // The pool's choice: the thread may still come to it.
    let queued = other.block_on(outcome(queued));
    assert!(matches!(queued, COMPLETED | Yield::Aborted(Cause::Shutdown)), "{queued:?}");
    tasks.close();
    other.block_on(tasks.wait());
    assert_eq!(tasks.snapshot().totals.spawned, 2);
}

#[test]
fn the_drop_of_a_runtime_refuses_nothing_silently() {
    let runtime = current_thread();
    let tasks = TaskRegistry::new();
    let spawned = Log::new();
    runtime
        .block_on(async {
            let (set, log) = (tasks.clone(), spawned.clone());
            // In a destructor while the runtime is dropped: accepted, and told.
            let late = OnDrop::new(move || log.push(set.spawn_blocking("late", |_| ())));
            tasks.spawn("task", async move {
                let _late = late;
                forever().await;
            })
        })
        .unwrap();
    runtime.block_on(settle());
    drop(runtime);
    for late in spawned.take() {
        let task = late.unwrap();
        let yielded = current_thread().block_on(outcome(task));
        assert!(matches!(yielded, COMPLETED | Yield::Aborted(Cause::Shutdown)), "{yielded:?}");
    }
    assert_eq!(tasks.len(), 0);
}
