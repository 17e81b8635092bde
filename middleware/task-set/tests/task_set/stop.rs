//! Graceful tasks: the signal, its cause, the grace, and what comes after it.

use std::{future::pending, sync::mpsc, time::Duration};

use tokio::time::{Instant, sleep, timeout};
use tower::Layer;
use tower_task_set::{
    AtEnd, CancelHandle, Cause, End, SpawnError, TaskHandle, TaskRegistry, TaskSet, TaskSetLayer,
    TaskState,
};

use crate::support::*;

const DEFAULT: Duration = secs(5);

/// A task that ends when it is told to, and says why it was.
fn cooperative(set: &TaskSet) -> TaskHandle<Cause> {
    set.spawn_graceful("worker", |stop| async move { stop.cancelled().await }).unwrap()
}

/// A task that goes on whatever it is told.
fn stubborn(set: &TaskSet) -> TaskHandle<()> {
    set.spawn_graceful("worker", |_| forever()).unwrap()
}

/// How long a task goes on from now.
async fn lives<T>(task: TaskHandle<T>) -> (Yield<T>, Duration) {
    let start = Instant::now();
    let outcome = outcome(task).await;
    (outcome, start.elapsed())
}

fn assert_about(found: Duration, expected: Duration) {
    let slack = Duration::from_millis(5);
    assert!(found >= expected && found < expected + slack, "{found:?}, not {expected:?}");
}

type Tell = fn(&TaskRegistry, &TaskSet, &TaskHandle<Cause>);

#[tokio::test(start_paused = true)]
async fn of_several_reasons_to_end_the_first_one_counts() {
    type Tell = fn(&TaskRegistry, &TaskSet, &CancelHandle);
    let ways: [(Tell, Cause); 3] = [
        (|_, _, task| task.cancel(), Cause::Requested),
        (|_, set, _| set.cancel_all(), Cause::Requested),
        (|tasks, _, _| tasks.cancel_all(), Cause::Shutdown),
    ];
    for (first, cause) in ways {
        for (second, _) in ways {
            for ends_first in [false, true] {
                let tasks = TaskRegistry::new().at_end(AtEnd::Cancel);
                let served = serve(&TaskSetLayer::new(&tasks));
                let set = served.set.clone();
                let (plain, graceful) = (set.spawn("plain", forever()).unwrap(), cooperative(&set));
                settle().await;
                let tell_both = |tell: Tell| {
                    for task in [plain.cancel_handle(), graceful.cancel_handle()] {
                        tell(&tasks, &set, &task);
                    }
                };
                let mut expected = cause;
                if ends_first {
                    served.end(End::Disconnected);
                    expected = Cause::Disconnected;
                    tell_both(first);
                } else {
                    tell_both(first);
                    served.end(End::Disconnected);
                }
                tell_both(second);
                assert_eq!(outcome(plain).await, Yield::Cancelled(expected));
                assert_eq!(outcome(graceful).await, Yield::Completed(expected));
            }
        }
    }
}

#[tokio::test(start_paused = true)]
async fn a_task_sees_why_it_is_told_at_its_next_poll_and_its_result_counts() {
    let tasks = TaskRegistry::new().at_end(AtEnd::Cancel);
    let layer = TaskSetLayer::new(&tasks);
    let mut told = 0;
    for end in ENDS {
        let served = serve(&layer);
        let task = cooperative(&served.set);
        settle().await;
        served.end(end);
        let (found, lived) = lives(task).await;
        assert_eq!((found, lived), (Yield::Completed(cause(end)), Duration::ZERO));
        told += 1;
    }
    let ways: [(Tell, Cause); 4] = [
        (|_, _, task| task.cancel(), Cause::Requested),
        (|_, _, task| task.cancel_handle().cancel(), Cause::Requested),
        (|_, set, _| set.cancel_all(), Cause::Requested),
        (|tasks, _, _| tasks.cancel_all(), Cause::Shutdown),
    ];
    for (tell, cause) in ways {
        let served = serve(&layer);
        let task = cooperative(&served.set);
        settle().await;
        tell(&tasks, &served.set, &task);
        assert_eq!(tasks.snapshot().live_tasks[0].state, TaskState::Cancelling);
        let (found, lived) = lives(task).await;
        assert_eq!((found, lived), (Yield::Completed(cause), Duration::ZERO));
        told += 1;
    }
    assert_ledger(&tasks, &format!("completed {told}"));
}

#[tokio::test(start_paused = true)]
async fn a_task_is_told_when_its_time_after_the_response_is_over() {
    let tasks = TaskRegistry::new();
    for own in [false, true] {
        let served = serve(&TaskSetLayer::new(&tasks).at_end(AtEnd::Drain(secs(7))));
        let task = served.set.task("worker");
        let task = if own { task.at_end(AtEnd::Drain(secs(3))) } else { task };
        let task = task.spawn_graceful(|stop| async move { stop.cancelled().await }).unwrap();
        served.end(ENDS[0]);
        let (found, lived) = lives(task).await;
        assert_eq!(found, Yield::Completed(Cause::Completed));
        assert_about(lived, if own { secs(3) } else { secs(7) });
    }
}

#[tokio::test(start_paused = true)]
async fn a_task_that_is_told_before_it_starts_finds_that_it_was() {
    let tasks = TaskRegistry::new();
    let task = tasks.spawn_graceful("worker", |stop| async move { stop.cause() }).unwrap();
    task.cancel();
    assert_eq!(outcome(task).await, Yield::Completed(Some(Cause::Requested)));
}

#[tokio::test(start_paused = true)]
async fn when_its_grace_is_over_a_task_is_dropped_and_counts_as_aborted() {
    let tasks = TaskRegistry::new().at_end(AtEnd::Cancel);
    let layer = TaskSetLayer::new(&tasks);
    for end in ENDS {
        let served = serve(&layer);
        let task = stubborn(&served.set);
        settle().await;
        served.end(end);
        let (found, lived) = lives(task).await;
        assert_eq!(found, Yield::Aborted(cause(end)));
        assert_about(lived, DEFAULT);
    }
    let dropped = Flag::default();
    let task = tasks.spawn_graceful("worker", {
        let guard = dropped.on_drop();
        |stop| async move {
            let _guard = guard;
            stop.cancelled().await;
            pending::<()>().await;
        }
    });
    let task = task.unwrap();
    settle().await;
    tasks.cancel_all();
    sleep(Duration::from_millis(4_990)).await;
    assert!(!dropped.is_set(), "it has its grace");
    let (found, _) = lives(task).await;
    assert_eq!(found, Yield::Aborted(Cause::Shutdown));
    assert!(dropped.is_set());
    assert_ledger(&tasks, "aborted 5");
}

#[tokio::test(start_paused = true)]
async fn beside_graceful_tasks_others_are_gone_at_once() {
    let tasks = TaskRegistry::new();
    let mut graceful = Vec::new();
    let mut asleep = Vec::new();
    for _ in 0..200 {
        graceful.push(tasks.spawn_graceful("worker", |_| sleep(secs(3_600))).unwrap());
        asleep.push(tasks.spawn("asleep", sleep(secs(3_600))).unwrap());
    }
    settle().await;
    let start = Instant::now();
    tasks.cancel_all();
    for task in asleep {
        assert_eq!(outcome(task).await, Yield::Cancelled(Cause::Shutdown));
    }
    assert_eq!(start.elapsed(), Duration::ZERO);
    for task in graceful {
        assert_eq!(outcome(task).await, Yield::Aborted(Cause::Shutdown));
    }
    assert_about(start.elapsed(), DEFAULT);
    assert_ledger(&tasks, "cancelled 200, aborted 200");
}

#[tokio::test(start_paused = true)]
async fn the_grace_is_the_tasks_or_the_sets_or_the_layers_or_the_registrys() {
    let tasks = TaskRegistry::new().grace(secs(40));
    let layer = TaskSetLayer::new(&tasks);
    let lives = async |set: &TaskSet, own: Option<Duration>| {
        let task = set.task("worker");
        let task = if let Some(own) = own { task.grace(own) } else { task };
        let task = task.spawn_graceful(|_| forever()).unwrap();
        settle().await;
        task.cancel();
        lives(task).await.1
    };
    let served = serve(&layer);
    assert_about(lives(&served.set, None).await, secs(40));
    let layer = layer.grace(secs(30));
    let served = serve(&layer);
    let set = &served.set;
    assert_about(lives(set, None).await, secs(30));
    set.grace(secs(20));
    assert_about(lives(set, None).await, secs(20));
    assert_about(lives(set, Some(secs(10))).await, secs(10));
    assert_eq!(lives(set, Some(Duration::ZERO)).await, Duration::ZERO);

    let inner = TaskSetLayer::new(&tasks).grace(secs(15));
    let nested = serve_through(|handler| layer.layer(inner.layer(handler)));
    assert_about(lives(&nested.set, None).await, secs(15));
    assert_ledger(&tasks, "aborted 6");
}

#[tokio::test(start_paused = true)]
async fn a_grace_that_is_too_long_to_count_lasts_until_all_are_aborted() {
    let tasks = TaskRegistry::new().grace(Duration::MAX);
    let mut task = tasks.spawn_graceful("worker", |_| forever()).unwrap();
    settle().await;
    tasks.cancel_all();
    assert!(timeout(secs(86_400), &mut task).await.is_err());
    tasks.abort_all();
    assert_eq!(lives(task).await, (Yield::Aborted(Cause::Shutdown), Duration::ZERO));
}

#[tokio::test(start_paused = true)]
async fn to_abort_all_ends_the_grace_of_those_that_have_one_and_cancels_the_others() {
    let tasks = TaskRegistry::new();
    let served = serve(&TaskSetLayer::new(&tasks));
    let set = &served.set;
    let mut told = Vec::new();
    for _ in 0..100 {
        told.push(stubborn(set));
        told.push(tasks.spawn_graceful("worker", |_| forever()).unwrap());
    }
    settle().await;
    set.cancel_all();
    sleep(secs(1)).await;
    let kept = tasks.task("kept").spawn(forever()).unwrap();
    let graceful = tasks.spawn_graceful("late", |_| forever()).unwrap();
    tasks.abort_all();
    for (at, task) in told.into_iter().enumerate() {
        // The first cause is what counts.
        let cause = [Cause::Requested, Cause::Shutdown][at % 2];
        assert_eq!(lives(task).await, (Yield::Aborted(cause), Duration::ZERO));
    }
    assert_eq!(outcome(kept).await, Yield::Cancelled(Cause::Shutdown));
    assert_eq!(outcome(graceful).await, Yield::Aborted(Cause::Shutdown));
    assert_ledger(&tasks, "cancelled 1, aborted 201");
    assert_eq!(set.spawn("late", forever()).unwrap_err().reason, SpawnError::Closed);
}

#[tokio::test(start_paused = true)]
async fn a_timeout_tells_a_graceful_task_first() {
    let tasks = TaskRegistry::new();
    let task = |grace| tasks.task("worker").timeout(secs(3)).grace(grace);
    let cooperative = task(secs(2)).spawn_graceful(|stop| async move { stop.cancelled().await });
    let (found, lived) = lives(cooperative.unwrap()).await;
    assert_eq!(found, Yield::Completed(Cause::TimedOut));
    assert_about(lived, secs(3));
    let (found, lived) = lives(task(secs(2)).spawn_graceful(|_| forever()).unwrap()).await;
    assert_eq!(found, Yield::TimedOut);
    assert_about(lived, secs(5));
    // Told already: that its time is over as well adds nothing.
    let told = task(secs(20)).spawn_graceful(|_| forever()).unwrap();
    settle().await;
    told.cancel();
    let (found, lived) = lives(told).await;
    assert_eq!(found, Yield::Aborted(Cause::Requested));
    assert_about(lived, secs(20));
    assert_ledger(&tasks, "completed 1, aborted 1, timed out 1");
}

#[tokio::test(start_paused = true)]
async fn a_set_that_is_told_does_not_tell_tasks_with_a_lifetime_of_their_own() {
    let tasks = TaskRegistry::new().at_end(AtEnd::Cancel);
    let served = serve(&TaskSetLayer::new(&tasks));
    let kept = served.set.task("kept").at_end(AtEnd::Keep);
    let mut kept = kept.spawn_graceful(|stop| async move { stop.cancelled().await }).unwrap();
    let other = cooperative(&served.set);
    settle().await;
    served.end(ENDS[3]);
    assert_eq!(outcome(other).await, Yield::Completed(Cause::Disconnected));
    assert!(timeout(secs(86_400), &mut kept).await.is_err());
    tasks.cancel_all();
    assert_eq!(outcome(kept).await, Yield::Completed(Cause::Shutdown));
}

#[tokio::test(start_paused = true)]
async fn who_was_told_may_not_spawn_when_the_response_is_over() {
    let tasks = TaskRegistry::new().at_end(AtEnd::Cancel);
    let served = serve(&TaskSetLayer::new(&tasks));
    let task = served.set.spawn_graceful("worker", |stop| async move {
        stop.cancelled().await;
        TaskSet::current().unwrap().spawn("child", forever()).map(drop).map_err(SpawnError::from)
    });
    settle().await;
    served.end(ENDS[0]);
    assert_eq!(outcome(task.unwrap()).await, Yield::Completed(Err(SpawnError::Closed)));
    assert_ledger(&tasks, "refused 1, completed 1");
}

#[tokio::test(start_paused = true)]
async fn a_task_of_a_draining_set_may_spawn_graceful_ones_that_live_as_it_does() {
    let tasks = TaskRegistry::new().at_end(AtEnd::Drain(secs(7)));
    let served = serve(&TaskSetLayer::new(&tasks));
    let (open, gate) = gate();
    let parent = served.set.spawn("parent", async {
        gate.await;
        cooperative(&TaskSet::current().unwrap())
    });
    settle().await;
    served.end(ENDS[0]);
    open.send(()).unwrap();
    let Yield::Completed(child) = outcome(parent.unwrap()).await else { panic!() };
    let (found, lived) = lives(child).await;
    assert_eq!(found, Yield::Completed(Cause::Completed));
    assert_about(lived, secs(7));
}

#[tokio::test]
async fn a_panic_after_the_signal_is_a_panic() {
    let tasks = TaskRegistry::new();
    let task = tasks.spawn_graceful("worker", |stop| async move {
        panic!("told: {}", stop.cancelled().await);
    });
    let task = task.unwrap();
    settle().await;
    tasks.cancel_all();
    let message = "told: the runtime or the process is stopping".to_owned();
    assert_eq!(outcome::<()>(task).await, Yield::Panicked(message));
    let task: TaskHandle<()> = tasks
        .spawn_graceful("worker", |_| -> std::future::Ready<()> { panic!("in the closure") })
        .unwrap();
    assert_eq!(outcome(task).await, Yield::Panicked("in the closure".to_owned()));
    assert_ledger(&tasks, "panicked 2");
}

#[tokio::test]
async fn a_closure_runs_in_its_task_and_a_refusal_gives_it_back() {
    let tasks = TaskRegistry::new();
    let served = serve(&TaskSetLayer::new(&tasks));
    let set = &served.set;
    let task = set.spawn_graceful("worker", |_| {
        let here = tokio::task::id();
        async move { here == tokio::task::id() && TaskSet::current().is_ok() }
    });
    assert_eq!(outcome(task.unwrap()).await, Yield::Completed(true));
    set.cancel_all();
    let (tell, told) = mpsc::channel();
    let refused = set.spawn_graceful("worker", move |_| async move { tell.send("it runs") });
    let refused = refused.unwrap_err();
    assert_eq!(refused.reason, SpawnError::Closed);
    let other = TaskRegistry::new().spawn_graceful("worker", refused.future).unwrap();
    assert_eq!(outcome(other).await, Yield::Completed(Ok(())));
    assert_eq!(told.recv(), Ok("it runs"));
}

#[tokio::test]
async fn a_token_says_the_same_to_all_who_have_it_and_after_the_end() {
    let tasks = TaskRegistry::new();
    let (tell, told) = mpsc::channel();
    let task = tasks.spawn_graceful("worker", move |stop| async move {
        tell.send(stop.clone()).unwrap();
        // Each of many waits, and one gives up.
        let helpers: Vec<_> = (0..50)
            .map(|_| {
                let stop = stop.clone();
                tokio::spawn(async move { stop.cancelled().await })
            })
            .collect();
        assert!(poll_once(std::pin::pin!(stop.cancelled())).is_pending());
        for helper in helpers {
            assert_eq!(helper.await.unwrap(), Cause::Requested);
        }
    });
    let task = task.unwrap();
    settle().await;
    let stop = told.recv().unwrap();
    let early = stop.cancellation_token();
    assert!(!stop.is_cancelled() && !early.is_cancelled());
    assert_eq!(stop.cause(), None);
    task.cancel();
    assert_eq!(outcome(task).await, COMPLETED);
    // Another task is where that was.
    let other = tasks.spawn("other", forever()).unwrap();
    assert_eq!(stop.cause(), Some(Cause::Requested));
    assert_eq!(stop.cancelled().await, Cause::Requested);
    early.cancelled().await;
    stop.cancellation_token().cancelled().await;
    assert_eq!(format!("{stop:?}"), "StopToken { cause: Some(Requested) }");
    other.cancel();
}

#[tokio::test]
async fn each_task_has_a_cancellation_token_that_is_right_for_it() {
    let tasks = TaskRegistry::new();
    let served = serve(&TaskSetLayer::new(&tasks));
    let set = &served.set;
    let spawn = || {
        let (tell, told) = mpsc::channel();
        let task = set.spawn_graceful("worker", move |stop| async move {
            tell.send(stop.cancellation_token()).unwrap();
            stop.cancelled().await
        });
        (task.unwrap(), told)
    };
    let ((alone, alone_told), (other, other_told)) = (spawn(), spawn());
    settle().await;
    let (alone_token, other_token) = (alone_told.recv().unwrap(), other_told.recv().unwrap());
    alone.cancel();
    alone_token.cancelled().await;
    assert!(!other_token.is_cancelled(), "it was not told");
    // To cancel the token tells the task nothing.
    other_token.cancel();
    settle().await;
    assert!(!other.is_finished());
    set.cancel_all();
    assert_eq!(outcome(other).await, Yield::Completed(Cause::Requested));
}

#[test]
fn without_a_time_driver_the_grace_lasts_until_all_are_aborted() {
    let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
    let tasks = TaskRegistry::new().grace(Duration::from_nanos(1));
    runtime.block_on(async {
        // By the first deadline it is known that there is no time.
        let timeless = tasks.task("timeless").timeout(secs(1)).spawn(forever()).unwrap();
        let task = tasks.spawn_graceful("worker", |_| forever()).unwrap();
        settle().await;
        tasks.cancel_all();
        settle().await;
        assert!(timeless.is_finished());
        assert!(!task.is_finished());
        tasks.abort_all();
        assert_eq!(outcome(task).await, Yield::Aborted(Cause::Shutdown));
    });
}

#[test]
fn without_a_time_driver_no_grace_is_none_all_the_same() {
    let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
    runtime.block_on(async {
        let tasks = TaskRegistry::new().grace(Duration::ZERO);
        // By the first deadline it is known that there is no time.
        tasks.task("timeless").timeout(secs(1)).spawn(forever()).unwrap();
        let task = tasks.spawn_graceful("worker", |_| forever()).unwrap();
        settle().await;
        task.cancel();
        settle().await;
        assert!(task.is_finished());
        assert_eq!(outcome(task).await, Yield::Aborted(Cause::Requested));
    });
}

#[test]
fn a_graceful_task_is_aborted_with_its_runtime() {
    let runtime = current_thread();
    let tasks = TaskRegistry::new();
    let told = runtime.block_on(async { tasks.spawn_graceful("worker", |_| forever()).unwrap() });
    let open = runtime.block_on(async { tasks.spawn_graceful("worker", |_| forever()).unwrap() });
    runtime.block_on(settle());
    told.cancel();
    drop(runtime);
    assert_eq!(now(outcome(told)), Yield::Aborted(Cause::Shutdown));
    assert_eq!(now(outcome(open)), Yield::Aborted(Cause::Shutdown));
    assert_ledger(&tasks, "aborted 2");
}

#[test]
fn what_never_yields_is_listed_as_stuck_by_name_and_site() {
    let runtime = multi_thread();
    let tasks = TaskRegistry::new().runtime(runtime.handle().clone()).grace(Duration::ZERO);
    let (open, gate) = mpsc::channel::<()>();
    let (tell, told) = mpsc::channel();
    let line = line!() + 1;
    let stuck = tasks.spawn_graceful("stuck", |_| async move {
        tell.send(()).unwrap();
        gate.recv().unwrap_err();
        "done"
    });
    told.recv().unwrap();
    tasks.cancel_all();
    let list = tasks.snapshot().live_tasks;
    assert_eq!(list.len(), 1);
    assert_eq!((list[0].name, list[0].state), ("stuck", TaskState::Cancelling));
    assert_eq!((list[0].site.file(), list[0].site.line()), (file!(), line));
    drop(open);
    // It ran to its end, and that counts.
    assert_eq!(runtime.block_on(outcome(stuck.unwrap())), Yield::Completed("done"));
    assert_ledger(&tasks, "completed 1");
}
