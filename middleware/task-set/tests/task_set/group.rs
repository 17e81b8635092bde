//! Groups: who is told to end when, and what the wait yields.

use std::{future::poll_fn, pin::pin, sync::mpsc, task::Poll, time::Duration};

use tokio::time::{Instant, sleep, timeout};
use tower_task_set::{
    AtEnd, Cause, Group, GroupError, SpawnError, SpawnLimit, TaskError, TaskHandle, TaskRegistry,
    TaskSet, TaskSetLayer, TaskState,
};

use crate::support::*;

/// Comes to its end, well or not.
async fn ends<T>(how: Result<T, &'static str>) -> Result<T, &'static str> {
    tokio::task::yield_now().await;
    how
}

async fn asleep() -> Result<(), &'static str> {
    sleep(secs(3_600)).await;
    Ok(())
}

/// What a group has failed with, as text.
fn failure(result: Result<(), GroupError<&'static str>>) -> String {
    result.err().map_or_else(String::new, |error| error.to_string())
}

/// What a group does, for the comparison with those of others.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Does {
    /// The others are told to end; when all have, the wait yields the first failure.
    First,
    /// The same, and the wait yields all failures.
    All,
    /// All are told to end; when they have, the wait yields that.
    Told,
    /// All are told to end, and whoever let go of the group waits for them.
    TellsAndWaits,
    /// All are told to end, and nobody waits.
    Tells,
    /// It goes on, unseen.
    Leaks,
    /// The process dies.
    Dies,
    /// The inner one is told to end; its failures are the affair of its owner.
    Inner,
}

#[expect(clippy::print_stdout, reason = "a table to read")]
#[tokio::test(start_paused = true)]
async fn a_group_does_what_those_of_go_java_and_trio_do() {
    use Does::{All, Dies, First, Inner, Leaks, TellsAndWaits, Told};
    let tasks = TaskRegistry::new();
    let table = [
        // What happens, then errgroup with a context, StructuredTaskScope (JEP 505), Trio's
        // nursery, and ours.
        ("first error", [First, First, All], first_error(&tasks).await),
        ("panic", [Dies, First, All], panic(&tasks).await),
        ("cancelled from outside", [Told, Told, Told], from_outside(&tasks).await),
        ("dropped", [Leaks, TellsAndWaits, TellsAndWaits], dropped(&tasks).await),
        ("nested", [Inner, Inner, Inner], nested(&tasks).await),
    ];
    println!("{:24}{:10}{:22}{:15}ours", "", "errgroup", "StructuredTaskScope", "nursery");
    for (case, others, found) in table {
        let [errgroup, scope, nursery] = others.map(|does| format!("{does:?}"));
        println!("{case:24}{errgroup:10}{scope:22}{nursery:15}{found:?}");
        // Where all others agree, ours does too.
        assert!(others.iter().any(|other| *other != others[0]) || found == others[0], "{case}");
    }
    assert_eq!(tasks.len(), 0);
}

async fn first_error(tasks: &TaskRegistry) -> Does {
    let group = tasks.try_group();
    let well = group.spawn("well", async { Ok(7) }).unwrap();
    let mut others = Vec::new();
    for _ in 0..50 {
        others.push(group.spawn("other", asleep()).unwrap());
    }
    let failed = group.spawn("failed", ends(Err::<(), _>("the first"))).unwrap();
    let late = group.spawn("late", async {
        sleep(secs(1)).await;
        Err::<(), _>("the second")
    });
    let start = Instant::now();
    assert_eq!(failure(group.wait().await), "task `failed` failed: the first");
    assert_eq!(start.elapsed(), Duration::ZERO);
    assert_eq!(outcome(well).await, Yield::Completed(7));
    assert!(matches!(failed.await, Err(TaskError::Failed)));
    for other in others.into_iter().chain([late.unwrap()]) {
        assert!(other.is_finished(), "the wait is for all");
        assert_eq!(outcome(other).await, Yield::Cancelled(Cause::Sibling));
    }
    Does::First
}

async fn panic(tasks: &TaskRegistry) -> Does {
    let group = tasks.try_group();
    let other = group.spawn("other", asleep()).unwrap();
    group.spawn("panics", async { panic!("at the first poll") as Result<(), _> }).unwrap();
    let found = failure(group.wait().await);
    assert!(found.starts_with("task `panics`: ") && found.ends_with("at the first poll"));
    assert_eq!(outcome(other).await, Yield::Cancelled(Cause::Sibling));
    Does::First
}

async fn from_outside(tasks: &TaskRegistry) -> Does {
    let served = serve(&TaskSetLayer::new(tasks).at_end(AtEnd::Cancel));
    let group = served.set.try_group();
    let task = group.spawn("task", asleep()).unwrap();
    settle().await;
    served.end(ENDS[3]);
    assert_eq!(failure(group.wait().await), "task `task`: the task was cancelled: its client left");
    assert_eq!(outcome(task).await, Yield::Cancelled(Cause::Disconnected));
    Does::Told
}

async fn dropped(tasks: &TaskRegistry) -> Does {
    let group = tasks.group();
    let task = group.spawn("task", asleep()).unwrap();
    settle().await;
    drop(group);
    assert!(!task.is_finished());
    assert_eq!(tasks.snapshot().live_tasks[0].state, TaskState::Cancelling);
    assert_eq!(outcome(task).await, Yield::Cancelled(Cause::Requested));
    Does::Tells
}

async fn nested(tasks: &TaskRegistry) -> Does {
    let outer = tasks.try_group();
    let inner_of = |tasks: &TaskRegistry| {
        let (tasks, (tell, told)) = (tasks.clone(), mpsc::channel());
        let owner = outer.spawn("owner", async move {
            let inner = tasks.try_group();
            tell.send(inner.spawn("inner", asleep()).unwrap()).unwrap();
            inner.spawn("fails", ends(Err::<(), _>("inside"))).unwrap();
            Ok::<_, &str>(failure(inner.wait().await))
        });
        (owner.unwrap(), told)
    };
    // The inner one fails: that is its owner's affair.
    let (owner, told) = inner_of(tasks);
    assert_eq!(owner.await.unwrap(), "task `fails` failed: inside");
    assert_eq!(outcome(told.recv().unwrap()).await, Yield::Cancelled(Cause::Sibling));
    // The outer one fails: the inner one ends with its owner.
    let (tell, told) = mpsc::channel();
    let owner = outer.spawn("owner", {
        let tasks = tasks.clone();
        async move {
            let inner = tasks.group();
            tell.send(inner.spawn("inner", asleep()).unwrap()).unwrap();
            inner.wait().await;
            Ok::<_, &str>(())
        }
    });
    settle().await;
    outer.spawn("fails", ends(Err::<(), _>("outside"))).unwrap();
    assert_eq!(failure(outer.wait().await), "task `fails` failed: outside");
    assert_eq!(outcome(owner.unwrap()).await, Yield::Cancelled(Cause::Sibling));
    assert_eq!(outcome(told.recv().unwrap()).await, Yield::Cancelled(Cause::Requested));
    Does::Inner
}

#[tokio::test(start_paused = true)]
async fn the_cause_of_a_drop_is_the_end_of_the_response_if_that_has_come() {
    let tasks = TaskRegistry::new().at_end(AtEnd::Keep);
    for end in ENDS {
        let served = serve(&TaskSetLayer::new(&tasks));
        let group = served.set.group();
        let task = group.spawn("task", forever()).unwrap();
        settle().await;
        served.end(end);
        settle().await;
        assert!(!task.is_finished());
        drop(group);
        assert_eq!(outcome(task).await, Yield::Cancelled(cause(end)));
    }
    let served = serve(&TaskSetLayer::new(&tasks));
    let group = served.set.group();
    let task = group.spawn("task", forever()).unwrap();
    let owner = served.set.spawn("owner", async move {
        let _group = group;
        panic!("with a group");
    });
    assert_eq!(outcome::<()>(owner.unwrap()).await, Yield::Panicked("with a group".to_owned()));
    assert_eq!(outcome(task).await, Yield::Cancelled(Cause::Panicked));
}

#[tokio::test(start_paused = true)]
async fn graceful_and_blocking_siblings_are_told_why() {
    let tasks = TaskRegistry::new();
    let group = tasks.try_group();
    let cooperative = group
        .spawn_graceful("cooperative", |stop| async move { Ok::<_, &str>(stop.cancelled().await) });
    let stubborn = group.task("stubborn").grace(secs(3)).spawn_graceful(|_| asleep());
    let (tell, told) = mpsc::channel();
    let blocking = group.spawn_blocking("blocking", move |stop| {
        tell.send(()).unwrap();
        while !stop.is_cancelled() {
            std::thread::yield_now();
        }
        Ok::<_, &str>(stop.cause())
    });
    told.recv().unwrap();
    let timed = group.task("timed").timeout(Duration::ZERO).spawn(asleep()).unwrap();
    assert_eq!(failure(group.wait().await), "task `timed`: the task took longer than its timeout");
    assert_eq!(outcome(timed).await, Yield::TimedOut);
    assert_eq!(outcome(cooperative.unwrap()).await, Yield::Completed(Cause::Sibling));
    assert_eq!(outcome(blocking.unwrap()).await, Yield::Completed(Some(Cause::Sibling)));
    assert_eq!(outcome(stubborn.unwrap()).await, Yield::Aborted(Cause::Sibling));
    assert_ledger(&tasks, "completed 2, aborted 1, timed out 1");
}

#[tokio::test(start_paused = true)]
async fn a_task_that_is_told_to_end_fails_no_other_but_is_not_ok() {
    let tasks = TaskRegistry::new();
    let group = tasks.try_group();
    let told = group.spawn("told", asleep()).unwrap();
    let other = group.spawn("other", async {
        sleep(secs(9)).await;
        Ok::<_, &str>(7)
    });
    settle().await;
    told.cancel();
    assert_eq!(
        failure(group.wait().await),
        "task `told`: the task was cancelled: somebody asked for it"
    );
    assert_eq!(outcome(other.unwrap()).await, Yield::Completed(7));
    // A failure that comes later counts more.
    let group = tasks.try_group();
    let told = group.spawn("told", asleep()).unwrap();
    settle().await;
    told.cancel();
    settle().await;
    group.spawn("fails", ends(Err::<(), _>("later"))).unwrap();
    assert_eq!(failure(group.wait().await), "task `fails` failed: later");
}

#[tokio::test]
async fn all_well_is_ok_and_the_handles_yield_what_is_in_the_results() {
    let tasks = TaskRegistry::new();
    let group = tasks.try_group();
    let number = group.spawn("number", ends(Ok(7))).unwrap();
    let text = group.spawn_graceful("text", |_| ends(Ok("seven"))).unwrap();
    let done = group.spawn_blocking("done", |_| Ok(())).unwrap();
    group.wait().await.unwrap();
    let values = (number.await.unwrap(), text.await.unwrap(), done.await.unwrap());
    assert_eq!(values, (7, "seven", ()));
    assert_eq!(failure(tasks.try_group().wait().await), "");
}

#[tokio::test]
async fn in_a_group_that_is_not_told_otherwise_each_task_ends_as_it_does() {
    let tasks = TaskRegistry::new();
    let group = tasks.group();
    let panics = group.spawn("panics", async { panic!("alone") }).unwrap();
    let fails = group.spawn("fails", ends(Err::<(), _>("alone"))).unwrap();
    let well = group.spawn("well", ends(Ok(7))).unwrap();
    group.wait().await;
    assert_eq!(outcome::<()>(panics).await, Yield::Panicked("alone".to_owned()));
    assert_eq!(outcome(fails).await, Yield::Completed(Err("alone")));
    assert_eq!(outcome(well).await, Yield::Completed(Ok(7)));
    assert_ledger(&tasks, "completed 2, panicked 1");
}

#[tokio::test]
async fn a_destructor_that_panics_fails_the_group() {
    let tasks = TaskRegistry::new();
    for told in [false, true] {
        let group = tasks.try_group();
        let other = group.spawn("other", asleep()).unwrap();
        let bomb = OnDrop::new(|| panic!("in the drop"));
        let bomb = group.spawn(
            "bomb",
            poll_fn(move |_| {
                let _bomb = &bomb;
                if told { Poll::Pending } else { Poll::Ready(Ok::<_, &str>(())) }
            }),
        );
        let bomb = bomb.unwrap();
        settle().await;
        if told {
            bomb.cancel();
        }
        let found = failure(group.wait().await);
        assert!(found.ends_with("a destructor of the task panicked"), "{found}");
        assert_eq!(outcome(other).await, Yield::Cancelled(Cause::Sibling));
        assert_eq!(outcome(bomb).await, Yield::Panicked("in the drop".to_owned()));
    }
}

#[tokio::test]
async fn an_error_that_nobody_takes_may_panic_when_it_is_dropped() {
    struct Bomb(#[expect(dead_code, reason = "it is dropped")] OnDrop<fn()>);
    let tasks = TaskRegistry::new();
    let bomb = || Bomb(OnDrop::new(|| panic!("in the error's drop")));
    let group = tasks.try_group();
    let second = group.spawn_graceful("second", move |stop| async move {
        stop.cancelled().await;
        Err::<(), _>(bomb())
    });
    let first = group.spawn("first", async move { Err::<(), _>(bomb()) });
    let Err(GroupError::Failed { task, error }) = group.wait().await else { panic!() };
    assert_eq!(task, "first");
    leak(error);
    for task in [first.unwrap(), second.unwrap()] {
        assert!(matches!(task.await, Err(TaskError::Failed)));
    }
    assert_ledger(&tasks, "completed 2");
}

#[tokio::test]
async fn its_tasks_spawn_into_it_by_a_handle_until_it_is_empty() {
    let tasks = TaskRegistry::new();
    let served = serve(&TaskSetLayer::new(&tasks));
    let group = served.set.group();
    let handle = group.handle();
    let seen = Log::new();
    group
        .spawn("parent", {
            let (handle, seen) = (handle.clone(), seen.clone());
            async move {
                for n in 0..3 {
                    let seen = seen.clone();
                    let child = async move {
                        tokio::task::yield_now().await;
                        seen.push(n);
                    };
                    handle.spawn("child", child).unwrap();
                }
            }
        })
        .unwrap();
    assert_eq!((group.len(), group.is_empty()), (1, false));
    group.wait().await;
    let mut seen = seen.take();
    seen.sort_unstable();
    assert_eq!(seen, [0, 1, 2]);
    assert!(handle.is_empty());
    assert_eq!(handle.spawn("late", async {}).unwrap_err().reason, SpawnError::Closed);
    // It counts as one of the set.
    assert_ledger(&tasks, "refused 1, completed 4");
    served.set.spawn("other", async {}).unwrap();
}

#[tokio::test]
async fn a_group_that_was_told_to_end_takes_no_more() {
    let tasks = TaskRegistry::new();
    let group = tasks.group();
    let task = group.spawn("task", forever()).unwrap();
    group.cancel_all();
    assert_eq!(outcome(task).await, Yield::Cancelled(Cause::Requested));
    let handle = group.handle();
    assert_eq!(group.spawn("late", async {}).unwrap_err().reason, SpawnError::Closed);
    drop(group);
    assert_eq!(handle.spawn_blocking("late", |_| ()).unwrap_err().reason, SpawnError::Closed);
    assert_eq!(format!("{handle:?}"), "GroupHandle { len: 0, .. }");
    // Others of the registry are not concerned.
    assert_eq!(outcome(tasks.spawn("other", async {}).unwrap()).await, COMPLETED);
    assert_ledger(&tasks, "refused 2, completed 1, cancelled 1");
}

#[tokio::test]
async fn its_limit_counts_beside_those_of_the_registry() {
    let limit = SpawnLimit::new(3);
    let tasks = TaskRegistry::new().limit(limit.clone());
    let group = tasks.group().limit(2);
    let first = group.spawn("task", forever()).unwrap();
    group.spawn("task", forever()).unwrap();
    assert_eq!(group.spawn("task", forever()).unwrap_err().reason, SpawnError::Full);
    assert_eq!(limit.in_use(), 2, "it has asked for no permit");
    first.cancel();
    settle().await;
    group.spawn("task", forever()).unwrap();
    tasks.spawn("other", forever()).unwrap();
    let other = tasks.group();
    assert_eq!(other.spawn("task", forever()).unwrap_err().reason, SpawnError::Full);
    assert!(other.is_empty(), "who is refused has no place");
    drop(group);
    settle().await;
    assert_ledger(&tasks, "refused 2, live 1, cancelled 3");
    let none = tasks.group().limit(0);
    assert_eq!(none.spawn("task", forever()).unwrap_err().reason, SpawnError::Full);
}

#[tokio::test(start_paused = true)]
async fn a_wait_that_is_given_up_ends_the_group_and_one_that_is_lent_does_not() {
    let tasks = TaskRegistry::new();
    let group = tasks.group();
    let task = group.spawn("task", forever()).unwrap();
    assert!(timeout(secs(1), group.wait()).await.is_err());
    assert_eq!(outcome(task).await, Yield::Cancelled(Cause::Requested));

    let group = tasks.group();
    let (open, gate) = gate();
    let task = group.spawn("task", gate).unwrap();
    let mut wait = pin!(group.wait());
    assert!(timeout(secs(1), &mut wait).await.is_err());
    open.send(()).unwrap();
    wait.await;
    assert_eq!(outcome(task).await, COMPLETED);
}

#[tokio::test(start_paused = true)]
async fn a_task_that_waits_for_its_own_group_waits_until_it_is_told_to_end() {
    let tasks = TaskRegistry::new();
    let (tell, told) = tokio::sync::oneshot::channel::<Group>();
    let group = tasks.group();
    let task = group.spawn("waits", async move { told.await.unwrap().wait().await }).unwrap();
    tell.send(group).map_err(drop).unwrap();
    let of_all = tasks.spawn("waits_for_all", {
        let tasks = tasks.clone();
        async move { tasks.wait().await }
    });
    tasks.close();
    assert!(timeout(secs(86_400), tasks.wait()).await.is_err());
    assert_eq!(tasks.snapshot().live_tasks.len(), 2, "both are listed");
    tasks.cancel_all();
    tasks.wait().await;
    assert_eq!(outcome(task).await, Yield::Cancelled(Cause::Shutdown));
    assert_eq!(outcome(of_all.unwrap()).await, Yield::Cancelled(Cause::Shutdown));
}

#[tokio::test]
async fn after_the_response_it_serves_tasks_that_may_still_run() {
    let tasks = TaskRegistry::new();
    let served = serve(&TaskSetLayer::new(&tasks));
    let group = served.set.group();
    let handle = group.handle();
    let (open, gate) = gate();
    let parent = served.set.spawn("parent", async move {
        gate.await;
        let child = group.spawn("child", async {}).map(drop).map_err(SpawnError::from);
        group.wait().await;
        child
    });
    served.end(ENDS[0]);
    assert_eq!(handle.spawn("late", async {}).unwrap_err().reason, SpawnError::Closed);
    open.send(()).unwrap();
    assert_eq!(outcome(parent.unwrap()).await, Yield::Completed(Ok(())));
    assert_ledger(&tasks, "refused 1, completed 2");
}

#[tokio::test]
async fn a_group_made_in_a_task_of_the_registry_outlasts_the_sets_of_the_registry() {
    let tasks = TaskRegistry::new();
    let group = tasks.spawn("parent", async { TaskSet::current().unwrap().group() });
    let Yield::Completed(group) = outcome(group.unwrap()).await else { panic!() };
    // The set that was current has no task by now.
    settle().await;
    let task: TaskHandle<()> = group.spawn("task", forever()).unwrap();
    drop(group);
    assert_eq!(outcome(task).await, Yield::Cancelled(Cause::Requested));
    assert_ledger(&tasks, "completed 1, cancelled 1");
}

#[test]
fn a_runtime_that_is_dropped_ends_the_wait() {
    let runtime = current_thread();
    let tasks = TaskRegistry::new();
    let group = runtime.block_on(async {
        let group = tasks.try_group();
        group.spawn("task", asleep()).unwrap();
        settle().await;
        group
    });
    drop(runtime);
    let found = failure(now(group.wait()));
    assert_eq!(found, "task `task`: the task was aborted: the runtime or the process is stopping");
    assert_ledger(&tasks, "aborted 1");
}

/// A task that owns a group, in which a task owns a group, and so on.
fn nest(tasks: TaskRegistry, depth: u32) -> std::pin::Pin<Box<dyn Future<Output = ()> + Send>> {
    Box::pin(async move {
        let group = tasks.group();
        if depth > 0 {
            group.spawn("nested", nest(tasks.clone(), depth - 1)).unwrap();
            group.wait().await;
        } else {
            forever().await;
        }
    })
}

#[test]
fn a_hundred_thousand_groups_within_each_other_end_without_recursion() {
    for with_runtime in [false, true] {
        let runtime = current_thread();
        let tasks = TaskRegistry::new();
        let group = runtime.block_on(async {
            let group = tasks.group();
            group.spawn("nested", nest(tasks.clone(), 100_000)).unwrap();
            while tasks.len() < 100_001 {
                tokio::task::yield_now().await;
            }
            group
        });
        if with_runtime {
            drop(runtime);
            drop(group);
        } else {
            runtime.block_on(async {
                group.cancel_all();
                group.wait().await;
                tasks.close();
                tasks.wait().await;
            });
        }
        let totals = tasks.snapshot().totals;
        assert!(totals.is_exact() && totals.live == 0, "{totals:?}");
        assert_eq!(totals.cancelled + totals.aborted, 100_001);
    }
}

#[tokio::test]
async fn whoever_is_told_to_end_may_tell_others_in_turn() {
    let tasks = TaskRegistry::new();
    let served = serve(&TaskSetLayer::new(&tasks));
    let group = served.set.group();
    let handle = group.handle();
    // In a destructor, in a waker's turn, and by a token of a library.
    let (set, all) = (served.set.clone(), tasks.clone());
    let guard = OnDrop::new(move || {
        handle.cancel_all();
        set.cancel_all();
        all.cancel_all();
    });
    for _ in 0..100 {
        group.spawn("task", forever()).unwrap();
    }
    let first = group.spawn("first", async move {
        let _guard = guard;
        forever().await;
    });
    settle().await;
    drop(first.unwrap());
    drop(group);
    tasks.close();
    tasks.wait().await;
    assert_ledger(&tasks, "cancelled 101");
}
