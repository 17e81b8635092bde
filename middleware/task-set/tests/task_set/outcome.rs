//! Each outcome, from each way to come to it: what the handle yields is what the ledger says, when
//! the last destructor has run.

use std::{
    future::poll_fn,
    panic::{panic_any, resume_unwind},
    pin::Pin,
    task::{Context, Poll},
};

use tokio::sync::oneshot;
use tower_task_set::{
    AtEnd, Cause, End, Outcome, SpawnLimit, TaskError, TaskHandle, TaskRegistry, TaskSetLayer,
};

use crate::support::*;

/// A future that does one thing in its poll, and one in its drop.
struct Behave<P, D: FnOnce()> {
    poll: P,
    on_drop: Option<D>,
}

impl<P, D: FnOnce()> Behave<P, D> {
    const fn new(poll: P, on_drop: D) -> Self {
        Self { poll, on_drop: Some(on_drop) }
    }
}

impl<P: FnMut() -> Poll<()> + Unpin, D: FnOnce() + Unpin> Future for Behave<P, D> {
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<()> {
        (self.poll)()
    }
}

impl<P, D: FnOnce()> Drop for Behave<P, D> {
    fn drop(&mut self) {
        if let Some(on_drop) = self.on_drop.take() {
            on_drop();
        }
    }
}

/// A registry with a limit, to see that the permit comes back on each path.
struct Tasks {
    registry: TaskRegistry,
    limit: SpawnLimit,
}

impl Tasks {
    fn new() -> Self {
        let limit = SpawnLimit::new(1);
        Self { registry: TaskRegistry::new().limit(limit.clone()), limit }
    }

    /// Asserts that the one task ended like this.
    #[track_caller]
    fn assert_ended(&self, outcome: &str) {
        assert_ledger(&self.registry, &format!("{outcome} 1"));
        assert_eq!(self.limit.in_use(), 0);
        assert_eq!(self.registry.len(), 0);
    }
}

// Completed

#[tokio::test]
async fn a_task_that_is_ready_at_once_or_later_is_completed() {
    for awaits in [0, 1, 5] {
        let tasks = Tasks::new();
        let task = tasks.registry.spawn("task", async move {
            for _ in 0..awaits {
                tokio::task::yield_now().await;
            }
            awaits
        });
        assert_eq!(outcome(task.unwrap()).await, Yield::Completed(awaits));
        tasks.assert_ended("completed");
    }
}

#[tokio::test]
async fn a_task_that_is_told_to_end_and_is_ready_in_the_same_poll_is_completed() {
    let tasks = Tasks::new();
    let (tell_handle, handle) = oneshot::channel::<TaskHandle<()>>();
    let task = tasks.registry.spawn("task", async {
        let handle = handle.await.unwrap();
        handle.cancel();
        drop(handle);
    });
    tell_handle.send(task.unwrap()).unwrap();
    settle().await;
    tasks.assert_ended("completed");
}

#[tokio::test]
async fn an_error_that_a_task_returns_is_its_result() {
    let tasks = Tasks::new();
    let task = tasks.registry.spawn("task", async { Err::<(), _>("no such order") });
    assert_eq!(task.unwrap().await.unwrap(), Err("no such order"));
    tasks.assert_ended("completed");
}

// Cancelled

/// Ways to tell a task to end, and the cause that it is told.
const WAYS: [(&str, Cause); 6] = [
    ("handle", Cause::Requested),
    ("abort handle", Cause::Requested),
    ("its set", Cause::Requested),
    ("the registry", Cause::Shutdown),
    ("the end of its response", Cause::Failed),
    ("the end of its own lifetime", Cause::Disconnected),
];

#[tokio::test(start_paused = true)]
async fn a_task_that_is_told_to_end_is_cancelled_before_its_first_poll_or_at_an_await() {
    for (way, cause) in WAYS {
        for polled in [false, true] {
            let tasks = Tasks::new();
            let request = serve(&TaskSetLayer::new(&tasks.registry).at_end(AtEnd::Cancel));
            let (was_polled, was_dropped) = (Flag::default(), Flag::default());
            let (poll, on_drop) = (was_polled.clone(), was_dropped.clone());
            let future = Behave::new(
                move || {
                    poll.set();
                    Poll::Pending
                },
                move || on_drop.set(),
            );
            let mut task = request.set.task("task");
            if way == "the end of its own lifetime" {
                task = task.on(End::Disconnected, AtEnd::Drain(secs(1)));
            }
            let task = task.spawn(future).unwrap();
            if polled {
                settle().await;
            }
            match way {
                "handle" => task.cancel(),
                "abort handle" => task.cancel_handle().cancel(),
                "its set" => request.set.cancel_all(),
                "the registry" => tasks.registry.cancel_all(),
                "the end of its response" => request.end(End::Failed),
                _ => request.end(End::Disconnected),
            }
            // A lifetime that goes on lets it start.
            let polled = polled || way == "the end of its own lifetime";
            assert_eq!(outcome(task).await, Yield::Cancelled(cause), "{way}");
            assert!(was_dropped.is_set());
            assert_eq!(was_polled.is_set(), polled, "{way}");
            tasks.assert_ended("cancelled");
        }
    }
}

#[tokio::test]
async fn what_a_task_was_told_first_is_what_it_is_told() {
    let tasks = Tasks::new();
    let request = serve(&TaskSetLayer::new(&tasks.registry).at_end(AtEnd::Cancel));
    let task = request.set.spawn("task", forever()).unwrap();
    settle().await;
    request.end(End::Panicked);
    tasks.registry.cancel_all();
    assert_eq!(outcome(task).await, Yield::Cancelled(Cause::Panicked));
    tasks.assert_ended("cancelled");
}

// Timed out

#[tokio::test(start_paused = true)]
async fn a_task_whose_own_time_is_over_has_timed_out() {
    let tasks = Tasks::new();
    let request = serve(&TaskSetLayer::new(&tasks.registry));
    let start = tokio::time::Instant::now();
    let task = request.set.task("task").timeout(secs(3)).spawn(forever()).unwrap();
    assert_eq!(outcome(task).await, Yield::TimedOut);
    assert_eq!(start.elapsed().as_secs(), 3);
    tasks.assert_ended("timed out");
}

// Panicked

#[tokio::test]
async fn a_task_that_panics_in_a_poll_has_panicked() {
    for awaits in [0, 1] {
        let tasks = Tasks::new();
        let task = tasks.registry.spawn("task", async move {
            for _ in 0..awaits {
                tokio::task::yield_now().await;
            }
            panic!("after {awaits}");
        });
        assert_eq!(outcome::<()>(task.unwrap()).await, Yield::Panicked(format!("after {awaits}")));
        tasks.assert_ended("panicked");
    }
}

#[tokio::test]
async fn the_handle_of_a_task_that_panicked_tells_which_and_where() {
    let tasks = Tasks::new();
    let line = line!() + 1;
    let task = tasks.registry.spawn("task", async { panic!("no") });
    let Err(TaskError::Panicked(panic)) = task.unwrap().await else { panic!("it panicked") };
    assert_eq!((panic.message(), panic.task()), ("no", Some("task")));
    let site = panic.spawn_site().unwrap();
    assert_eq!((site.file(), site.line()), (file!(), line));
}

#[tokio::test]
async fn a_payload_of_any_kind_is_a_panic() {
    let not_a_string = "(the payload is not a string)";
    let payloads: [(&str, fn()); 4] = [
        ("static", || panic!("static")),
        (not_a_string, || panic_any(7)),
        // Of what its drop throws nothing is dropped: it holds no memory.
        (not_a_string, || panic_any(OnDrop::new(|| panic_any(())))),
        ("resumed", || resume_unwind(Box::new("resumed"))),
    ];
    for (message, panics) in payloads {
        let tasks = Tasks::new();
        let task = tasks.registry.spawn("task", async move { panics() });
        assert_eq!(outcome(task.unwrap()).await, Yield::Panicked(message.to_owned()));
        tasks.assert_ended("panicked");
    }
}

#[tokio::test]
async fn a_panic_in_the_drop_of_a_task_that_was_ready_is_a_panic() {
    let tasks = Tasks::new();
    let future = Behave::new(|| Poll::Ready(()), || panic!("ready, then not"));
    let task = tasks.registry.spawn("task", future).unwrap();
    assert_eq!(outcome(task).await, Yield::Panicked("ready, then not".to_owned()));
    tasks.assert_ended("panicked");
}

#[tokio::test]
async fn a_panic_in_the_drop_of_a_captured_value_is_a_panic() {
    let tasks = Tasks::new();
    let value = OnDrop::new(|| panic!("captured"));
    let task = tasks.registry.spawn("task", async move {
        let _value = value;
        forever().await;
    });
    let task = task.unwrap();
    settle().await;
    task.cancel();
    assert_eq!(outcome(task).await, Yield::Panicked("captured".to_owned()));
    tasks.assert_ended("panicked");
}

#[tokio::test(start_paused = true)]
async fn a_panic_in_the_drop_of_a_task_that_is_told_to_end_is_a_panic() {
    for polled in [false, true] {
        for way in ["cancelled", "timed out"] {
            let tasks = Tasks::new();
            let future = Behave::new(|| Poll::Pending, || panic!("in the drop"));
            let mut task = tasks.registry.task("task");
            if way == "timed out" {
                task = task.timeout(secs(1));
            }
            let task = task.spawn(future).unwrap();
            if polled {
                settle().await;
            }
            if way == "cancelled" {
                task.cancel();
            }
            assert_eq!(outcome(task).await, Yield::Panicked("in the drop".to_owned()), "{way}");
            tasks.assert_ended("panicked");
        }
    }
}

#[test]
fn a_panic_in_the_drop_of_a_task_that_goes_with_its_runtime_is_a_panic() {
    let tasks = Tasks::new();
    let runtime = current_thread();
    let task = runtime.block_on(async {
        let future = Behave::new(|| Poll::Pending, || panic!("in the drop"));
        let task = tasks.registry.spawn("task", future).unwrap();
        settle().await;
        task
    });
    drop(runtime);
    assert_eq!(now(outcome(task)), Yield::Panicked("in the drop".to_owned()));
    tasks.assert_ended("panicked");
}

#[tokio::test]
async fn the_handle_of_a_task_whose_drop_panicked_tells_which_and_where() {
    let tasks = Tasks::new();
    let future = Behave::new(|| Poll::Ready(()), || panic!("in the drop"));
    let line = line!() + 1;
    let task = tasks.registry.spawn("task", future).unwrap();
    let Err(TaskError::Panicked(panic)) = task.await else { panic!("it panicked") };
    assert_eq!((panic.message(), panic.task()), ("in the drop", Some("task")));
    let site = panic.spawn_site().unwrap();
    assert_eq!((site.file(), site.line()), (file!(), line));
}

#[tokio::test]
async fn a_panic_that_a_task_catches_itself_is_none() {
    let tasks = Tasks::new();
    let task = tasks.registry.spawn("task", async {
        std::panic::catch_unwind(|| panic!("caught")).unwrap_err();
    });
    assert_eq!(outcome(task.unwrap()).await, COMPLETED);
    tasks.assert_ended("completed");
}

#[tokio::test]
async fn siblings_of_a_task_that_panics_go_on() {
    let tasks = TaskRegistry::new();
    let mut request = serve(&TaskSetLayer::new(&tasks));
    let (open, gate) = gate();
    let sibling = request.set.spawn("sibling", gate).unwrap();
    let task = request.set.spawn("task", async { panic!("alone") }).unwrap();
    outcome::<()>(task).await;
    assert_eq!(request.in_poll(|| "served"), "served");
    open.send(()).unwrap();
    assert_eq!(outcome(sibling).await, COMPLETED);
    request.set.spawn("next", async {}).unwrap().await.unwrap();
    assert_ledger(&tasks, "completed 2, panicked 1");
}

// Aborted

#[test]
fn a_task_that_goes_with_its_runtime_is_aborted() {
    for polled in [false, true] {
        let tasks = Tasks::new();
        let runtime = current_thread();
        let task = runtime.block_on(async {
            let task = tasks.registry.spawn("task", forever()).unwrap();
            if polled {
                settle().await;
            }
            task
        });
        drop(runtime);
        assert_eq!(now(outcome(task)), Yield::Aborted(Cause::Shutdown));
        tasks.assert_ended("aborted");
    }
}

#[test]
fn a_task_whose_runtime_is_dropped_while_something_else_unwinds_is_aborted() {
    let tasks = Tasks::new();
    let registry = tasks.registry.clone();
    let unwinding = std::thread::spawn(move || {
        let runtime = current_thread();
        runtime.block_on(async {
            registry.spawn("task", forever()).unwrap();
            settle().await;
        });
        panic!("drops the runtime");
    });
    unwinding.join().unwrap_err();
    tasks.assert_ended("aborted");
}

// When it is booked

#[tokio::test]
async fn a_task_has_not_ended_while_its_destructors_run() {
    let tasks = Tasks::new();
    let seen = Log::new();
    let (registry, limit, log) = (tasks.registry.clone(), tasks.limit.clone(), seen.clone());
    let on_drop = OnDrop::new(move || {
        let counts = registry.snapshot().totals;
        log.push((counts.live, counts.cancelled, limit.in_use()));
    });
    let task = tasks.registry.spawn("task", async move {
        let _on_drop = on_drop;
        forever().await;
    });
    let task = task.unwrap();
    settle().await;
    task.cancel();
    assert_eq!(outcome(task).await, Yield::Cancelled(Cause::Requested));
    assert_eq!(seen.take(), [(1, 0, 1)]);
    tasks.assert_ended("cancelled");
}

#[tokio::test]
async fn who_waits_for_a_task_waits_for_its_destructors() {
    let tasks = TaskRegistry::new();
    let dropped = Flag::default();
    let on_drop = dropped.on_drop();
    let task = tasks.spawn("task", async move {
        let _on_drop = on_drop;
        forever().await;
    });
    let task = task.unwrap();
    settle().await;
    task.cancel();
    tasks.close();
    tasks.wait().await;
    assert!(dropped.is_set());
    assert!(task.is_finished());
}

#[tokio::test]
async fn a_future_is_dropped_before_its_result_can_be_taken() {
    let tasks = TaskRegistry::new();
    let dropped = Flag::default();
    let on_drop = dropped.on_drop();
    let mut kept = Some(on_drop);
    let task = tasks.spawn(
        "task",
        poll_fn(move |_| {
            let _ = kept.as_mut();
            Poll::Ready(())
        }),
    );
    task.unwrap().await.unwrap();
    assert!(dropped.is_set());
}

// In words

#[test]
fn errors_outcomes_and_causes_say_what_happened() {
    let causes = [
        (Cause::Completed, "its response was completed"),
        (Cause::Failed, "its response failed"),
        (Cause::Panicked, "its handler panicked"),
        (Cause::Disconnected, "its client left"),
        (Cause::Shutdown, "the runtime or the process is stopping"),
        (Cause::Requested, "somebody asked for it"),
    ];
    for (cause, text) in causes {
        assert_eq!(cause.to_string(), text);
        let error = TaskError::Cancelled(cause).to_string();
        assert_eq!(error, format!("the task was cancelled: {text}"));
        let error = TaskError::Aborted(cause).to_string();
        assert_eq!(error, format!("the task was aborted: {text}"));
    }
    assert_eq!(TaskError::TimedOut.to_string(), "the task took longer than its timeout");
    let outcomes = [
        (Outcome::Completed, "completed"),
        (Outcome::Cancelled, "cancelled"),
        (Outcome::Aborted, "aborted"),
        (Outcome::TimedOut, "timed out"),
        (Outcome::Panicked, "panicked"),
    ];
    for (outcome, text) in outcomes {
        assert_eq!(outcome.to_string(), text);
    }
    for end in ENDS {
        assert_eq!(format!("{:?}", cause(end)), format!("{end:?}"));
    }
}
