//! Whatever a task is spawned as, and into, it may wait for its place.

use std::{pin::Pin, sync::mpsc, thread};

use tokio::time::Instant;
use tokio_test::{assert_pending, assert_ready_err, assert_ready_ok, task};
use tower_spawn_limit::Level;
use tower_task_set::{
    Cause, Group, GroupHandle, SpawnError, SpawnLimit, TaskHandle, TaskRegistry, TaskSet,
    TaskSetLayer,
};

use crate::support::*;

type Work = Pin<Box<dyn Future<Output = ()> + Send>>;
type EndIt = fn(Group);
type Waiting<'a> = Pin<Box<dyn Future<Output = Result<TaskHandle<()>, SpawnError>> + Send + 'a>>;

/// The ways to wait for a place in a set, in order.
fn ways(set: &TaskSet) -> [Waiting<'_>; 3] {
    let task = |name| set.task(name).within(secs(9));
    let ordinary = task("ordinary").spawn(forever());
    let graceful = task("graceful").spawn_graceful(async |stop| {
        stop.cancelled().await;
    });
    let blocking = task("blocking").spawn_blocking(|_| ());
    [
        Box::pin(async { ordinary.await.map_err(SpawnError::from) }),
        Box::pin(async { graceful.await.map_err(SpawnError::from) }),
        Box::pin(async { blocking.await.map_err(SpawnError::from) }),
    ]
}

/// The same for a group.
fn ways_into(group: &GroupHandle) -> [Waiting<'_>; 3] {
    let task = |name| group.task(name).within(secs(9));
    let ordinary = task("ordinary").spawn(forever());
    let graceful = task("graceful").spawn_graceful(async |stop| {
        stop.cancelled().await;
    });
    let blocking = task("blocking").spawn_blocking(|_| ());
    [
        Box::pin(async { ordinary.await.map_err(SpawnError::from) }),
        Box::pin(async { graceful.await.map_err(SpawnError::from) }),
        Box::pin(async { blocking.await.map_err(SpawnError::from) }),
    ]
}

#[tokio::test(start_paused = true)]
async fn every_kind_of_task_waits_for_its_permit_in_order_and_gives_it_back() {
    for in_group in [false, true] {
        let limit = SpawnLimit::new(1);
        let tasks = TaskRegistry::new().limit(limit.clone());
        let served = serve(&TaskSetLayer::new(&tasks));
        let group = served.set.group();
        let mut holds = served.set.spawn("holds", forever()).unwrap();
        let ways = if in_group { ways_into(&group) } else { ways(&served.set) };
        let mut waiting: Vec<_> = ways.into_iter().map(task::spawn).collect();
        for waiting in &mut waiting {
            assert_pending!(waiting.poll());
        }
        assert_eq!((limit.in_use(), limit.waiting(), group.len()), (1, 3, 0));
        for (left, waiting) in (0..3).rev().zip(&mut waiting) {
            assert!(!waiting.is_woken());
            holds.cancel();
            settle().await;
            assert!(waiting.is_woken());
            holds = assert_ready_ok!(waiting.poll());
            assert_eq!(limit.waiting(), left);
            // The last is a closure, which may have returned by now.
            if left > 0 {
                assert_eq!((limit.in_use(), group.len()), (1, usize::from(in_group)));
            }
        }
        assert_eq!(outcome(holds).await, COMPLETED);
        assert_eq!((limit.in_use(), limit.refused(), group.len()), (0, 0, 0));
        assert_ledger(&tasks, "completed 2, cancelled 2");
    }
}

#[tokio::test(start_paused = true)]
async fn whoever_waits_when_the_request_ends_is_closed_out_with_what_it_gave() {
    for end in ENDS {
        let limit = SpawnLimit::new(1);
        let permit = limit.try_acquire().unwrap();
        let tasks = TaskRegistry::new().limit(limit.clone());
        let served = serve(&TaskSetLayer::new(&tasks));
        let (set, group) = (served.set.clone(), served.set.group());
        let mut waiting: Vec<_> =
            ways(&set).into_iter().chain(ways_into(&group)).map(task::spawn).collect();
        for waiting in &mut waiting {
            assert_pending!(waiting.poll());
        }
        let (ran, came_back) = (Flag::default(), Flag::default());
        let closure = {
            let (ran, came_back) = (ran.clone(), came_back.on_drop());
            move |_| {
                ran.set();
                drop(came_back);
            }
        };
        let mut last = task::spawn(set.task("last").within(secs(9)).spawn_blocking(closure));
        assert_pending!(last.poll());
        served.end(end);
        for waiting in &mut waiting {
            assert!(waiting.is_woken(), "{end:?}");
            assert_eq!(assert_ready_err!(waiting.poll()), SpawnError::Closed, "{end:?}");
        }
        let refused = assert_ready_err!(last.poll());
        assert!(!came_back.is_set());
        drop(refused.future);
        assert!(came_back.is_set() && !ran.is_set());
        assert_eq!((limit.in_use(), limit.waiting()), (1, 0));
        assert_ledger(&tasks, "refused 7");
        drop(permit);
        assert_eq!(limit.in_use(), 0);
    }
}

#[tokio::test(start_paused = true)]
async fn whoever_waits_for_the_registrys_own_set_is_closed_out_when_it_is_cancelled() {
    let tasks = TaskRegistry::new().limit(SpawnLimit::new(1));
    let (tell, told) = tokio::sync::oneshot::channel();
    let lives = tasks.task("lives").grace(secs(100)).spawn_graceful(move |_| async move {
        tell.send(TaskSet::current().unwrap()).unwrap();
        forever().await;
    });
    let set = told.await.unwrap();
    let mut waiting = ways(&set).map(task::spawn);
    for waiting in &mut waiting {
        assert_pending!(waiting.poll());
    }
    // Who waits for another set of the registry goes on.
    let mut other = task::spawn(tasks.task("other").within(secs(9)).spawn(async {}));
    assert_pending!(other.poll());
    tasks.cancel_all();
    for waiting in &mut waiting {
        assert!(waiting.is_woken());
        assert_eq!(assert_ready_err!(waiting.poll()), SpawnError::Closed);
    }
    assert_pending!(other.poll());
    tasks.abort_all();
    settle().await;
    assert!(lives.unwrap().is_finished() && other.is_woken());
    assert_ready_ok!(other.poll()).await.unwrap();
    assert_ledger(&tasks, "refused 3, completed 1, aborted 1");
}

#[tokio::test(start_paused = true)]
async fn a_group_that_is_full_lets_in_who_waits_in_order() {
    let tasks = TaskRegistry::new();
    let group = tasks.group().limit(1);
    let holds = group.spawn("holds", forever()).unwrap();
    let place = |name| group.task(name).within(secs(9)).spawn(forever());
    let (mut first, mut second) = (task::spawn(place("first")), task::spawn(place("second")));
    assert_pending!(first.poll());
    assert_pending!(second.poll());
    assert_eq!(group.spawn("late", forever()).unwrap_err().reason, SpawnError::Full);
    assert_eq!(group.len(), 1);
    holds.cancel();
    settle().await;
    assert!(first.is_woken() && !second.is_woken());
    let holds = assert_ready_ok!(first.poll());
    assert_eq!(group.spawn("late", forever()).unwrap_err().reason, SpawnError::Full);
    holds.cancel();
    settle().await;
    assert!(second.is_woken());
    assert_ready_ok!(second.poll());
    assert_eq!(group.len(), 1);
    group.cancel_all();
    settle().await;
    assert_ledger(&tasks, "refused 2, cancelled 3");
}

#[tokio::test(start_paused = true)]
async fn whoever_waits_when_the_group_ends_is_closed_out() {
    let ends: [(&str, EndIt); 3] = [
        ("told to end", |group| {
            group.cancel_all();
            leak(group);
        }),
        ("dropped", drop),
        ("empty", |group| {
            let mut wait = task::spawn(group.wait());
            tokio_test::assert_ready!(wait.poll());
            leak(wait);
        }),
    ];
    for (way, end) in ends {
        let limit = SpawnLimit::new(0);
        let tasks = TaskRegistry::new().limit(limit.clone());
        let group = tasks.group();
        let handle = group.handle();
        let mut waiting = task::spawn(handle.task("waits").within(secs(9)).spawn(forever()));
        assert_pending!(waiting.poll());
        end(group);
        assert!(waiting.is_woken(), "{way}");
        assert_eq!(assert_ready_err!(waiting.poll()).reason, SpawnError::Closed, "{way}");
        assert_eq!((handle.len(), limit.waiting()), (0, 0), "{way}");
        assert_ledger(&tasks, "refused 1");
    }
}

#[tokio::test(start_paused = true)]
async fn whoever_waits_for_a_group_that_fails_is_closed_out() {
    let tasks = TaskRegistry::new();
    let group = tasks.try_group().limit(1);
    let (open, gate) = gate();
    let fails = async move {
        gate.await;
        Err::<(), _>("on purpose")
    };
    group.spawn("fails", fails).unwrap();
    let place = group.task("waits").within(secs(9)).spawn(async { Ok(()) });
    let mut waiting = task::spawn(place);
    assert_pending!(waiting.poll());
    open.send(()).unwrap();
    settle().await;
    assert!(waiting.is_woken());
    assert_eq!(assert_ready_err!(waiting.poll()).reason, SpawnError::Closed);
    drop(waiting);
    assert!(group.wait().await.is_err());
    assert_ledger(&tasks, "refused 1, completed 1");
}

#[tokio::test(start_paused = true)]
async fn who_gives_up_in_the_line_of_a_group_hands_on_the_place_that_has_come() {
    let tasks = TaskRegistry::new();
    let group = tasks.group().limit(1);
    let holds = group.spawn("holds", forever()).unwrap();
    let place = |name| group.task(name).within(secs(9)).spawn(forever());
    let (mut first, mut second) = (task::spawn(place("first")), task::spawn(place("second")));
    assert_pending!(first.poll());
    assert_pending!(second.poll());
    holds.cancel();
    settle().await;
    assert!(first.is_woken());
    drop(first);
    assert!(second.is_woken());
    assert_ready_ok!(second.poll());
    group.cancel_all();
    settle().await;
    assert_ledger(&tasks, "cancelled 2");
}

#[tokio::test(start_paused = true)]
async fn who_waits_for_a_group_gives_up_when_the_time_is_over_and_is_counted_once() {
    let limit = SpawnLimit::new(1);
    let tasks = TaskRegistry::new().limit(limit.clone());
    for full in ["the group", "the registry"] {
        let group = tasks.group().limit(usize::from(full != "the group"));
        let permit = limit.try_acquire().unwrap();
        let start = Instant::now();
        let make = async |_| ();
        let refused = group.task("waits").within(secs(3)).spawn_graceful(make).await.unwrap_err();
        assert_eq!(refused.reason, SpawnError::Full, "{full}");
        assert!((secs(3)..secs(4)).contains(&start.elapsed()), "{full}");
        assert_eq!((group.len(), limit.waiting()), (0, 0));
        drop(permit);
    }
    assert_ledger(&tasks, "refused 2");
}

#[tokio::test(start_paused = true)]
async fn nobody_holds_a_place_of_the_group_while_it_waits_for_a_permit_or_the_other_way_round() {
    let limit = SpawnLimit::new(1);
    let tasks = TaskRegistry::new().limit(limit.clone());
    let group = tasks.group().limit(1);
    let permit = limit.try_acquire().unwrap();
    let mut waiting = task::spawn(group.task("waits").within(secs(9)).spawn(forever()));
    assert_pending!(waiting.poll());
    assert_eq!((group.len(), limit.waiting()), (0, 1), "for the permit");
    drop(permit);
    assert!(waiting.is_woken());
    // With the permit that has come it finds the group full, if it is.
    limit.set_limit(2);
    let holds = group.spawn("holds", forever()).unwrap();
    assert_pending!(waiting.poll());
    assert_eq!((group.len(), limit.in_use(), limit.waiting()), (1, 1, 0), "for the group");
    holds.cancel();
    settle().await;
    assert_ready_ok!(waiting.poll());
    assert_eq!((group.len(), limit.in_use()), (1, 1));
    drop(waiting);
    group.cancel_all();
    group.wait().await;
    assert_eq!(limit.in_use(), 0);
    assert_ledger(&tasks, "cancelled 2");
}

#[tokio::test(start_paused = true)]
async fn a_task_of_a_group_with_a_limit_never_waits_and_one_without_may() {
    let tasks = TaskRegistry::new();
    let outer = tasks.group().limit(2);
    let start = Instant::now();
    let handle = outer.handle();
    let nested = async move {
        let inner = handle.task("sibling").within(secs(9)).spawn(forever()).await;
        let inner = inner.unwrap();
        let refused = handle.task("another").within(secs(9)).spawn(forever()).await.unwrap_err();
        inner.cancel();
        (Level::current(), refused.reason)
    };
    let nested = outer.spawn("nested", async move {
        assert_eq!(nested.await, (Level::Task, SpawnError::Full));
    });
    assert_eq!(outcome(nested.unwrap()).await, COMPLETED);
    let blocking = outer.spawn_blocking("blocking", |_| assert_eq!(Level::current(), Level::Task));
    assert_eq!(outcome(blocking.unwrap()).await, COMPLETED);
    assert_eq!((start.elapsed(), Level::current()), (secs(0), Level::Free));
    let free = tasks.group();
    let free = free.spawn("free", async { assert_eq!(Level::current(), Level::Free) });
    assert_eq!(outcome(free.unwrap()).await, COMPLETED);
}

#[tokio::test(start_paused = true)]
async fn a_child_outside_of_its_parents_group_waits_for_a_place_in_it_as_long_as_it_has_time() {
    let tasks = TaskRegistry::new();
    let served = serve(&TaskSetLayer::new(&tasks));
    let group = served.set.group().limit(1);
    let (set, handle) = (served.set.clone(), group.handle());
    let start = Instant::now();
    let parent = group.spawn("parent", async move {
        let child = set.spawn("child", async move {
            let refused = handle.task("waits").within(secs(3)).spawn(forever()).await.unwrap_err();
            (Level::current(), refused.reason)
        });
        assert_eq!(child.unwrap().await.unwrap(), (Level::Free, SpawnError::Full));
    });
    assert_eq!(outcome(parent.unwrap()).await, COMPLETED);
    assert!((secs(3)..secs(4)).contains(&start.elapsed()));
    assert_ledger(&tasks, "refused 1, completed 2");
}

#[tokio::test(start_paused = true)]
async fn a_place_in_a_group_comes_back_once_however_its_task_ends() {
    let tasks = TaskRegistry::new();
    let group = tasks.group().limit(1);
    let on_drop = OnDrop::new(|| panic!("in a destructor"));
    let ways: Vec<(&str, Work)> = vec![
        ("completion", Box::pin(async {})),
        ("a panic", Box::pin(async { panic!("on purpose") })),
        ("a panic in a destructor", Box::pin(async move { drop(on_drop) })),
        ("cancellation", Box::pin(forever())),
    ];
    for (way, future) in ways {
        let waits = group.task("task").within(secs(9)).spawn(future);
        let task = waits.await.unwrap();
        settle().await;
        task.cancel();
        drop(task);
        settle().await;
        assert_eq!(group.len(), 0, "{way}");
        // Not more than once: or this would let two in.
        let one = group.spawn("one", forever()).unwrap();
        assert_eq!(group.spawn("two", forever()).unwrap_err().reason, SpawnError::Full, "{way}");
        one.cancel();
        settle().await;
    }
}

#[test]
fn a_closure_that_has_waited_keeps_its_places_until_it_returns() {
    let limit = SpawnLimit::new(1);
    let runtime = current_thread();
    let tasks = TaskRegistry::new().limit(limit.clone());
    let (go, wait) = mpsc::channel::<()>();
    let (tell, started) = mpsc::channel();
    let group = runtime.block_on(async {
        let group = tasks.group().limit(1);
        let closure = move |_| {
            tell.send(()).unwrap();
            let _ = wait.recv();
        };
        drop(group.task("blocks").within(secs(9)).spawn_blocking(closure).await.unwrap());
        group
    });
    started.recv().unwrap();
    let handle = group.handle();
    // Whoever gave up on it.
    drop(group);
    tasks.cancel_all();
    runtime.shutdown_background();
    assert_eq!((handle.len(), limit.in_use()), (1, 1));
    drop(go);
    while !handle.is_empty() {
        thread::yield_now();
    }
    assert_eq!(limit.in_use(), 0);
}

#[tokio::test(start_paused = true)]
async fn a_graceful_task_that_has_waited_is_told_to_end_and_has_its_grace() {
    let limit = SpawnLimit::new(1);
    let tasks = TaskRegistry::new().limit(limit.clone());
    let served = serve(&TaskSetLayer::new(&tasks));
    let holds = served.set.spawn("holds", forever()).unwrap();
    let log = Log::new();
    let mut waiting = task::spawn({
        let log = log.clone();
        let task = served.set.task("graceful").grace(secs(1)).within(secs(9));
        task.spawn_graceful(async move |stop| {
            let cause = stop.cancelled().await;
            log.push(if cause == Cause::Requested { "told" } else { "otherwise" });
            forever().await;
        })
    });
    assert_pending!(waiting.poll());
    holds.cancel();
    settle().await;
    let graceful = assert_ready_ok!(waiting.poll());
    let start = Instant::now();
    graceful.cancel();
    assert_eq!(outcome(graceful).await, Yield::Aborted(Cause::Requested));
    assert!((secs(1)..secs(2)).contains(&start.elapsed()));
    assert_eq!((log.take(), limit.in_use()), (vec!["told"], 0));
}
