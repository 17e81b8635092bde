//! The registry: tasks that belong to no request, the end of all, the observer, and what is left
//! when it is gone.

use std::{
    collections::HashMap,
    sync::{
        Arc, Barrier, Mutex,
        atomic::{AtomicBool, AtomicU64, Ordering::SeqCst},
    },
    thread,
    time::Duration,
};

use tokio::time::Instant;
use tower_task_set::{
    AtEnd, Cause, End, Observe, OnPanic, Outcome, SpawnError, SpawnLimit, StopToken, TaskEvent,
    TaskRegistry, TaskSet, TaskSetLayer, TaskState, assert_drained,
};

use crate::support::*;

// Tasks that belong to no request

#[tokio::test(start_paused = true)]
async fn a_task_of_no_request_is_kept_whatever_is_chosen_for_it() {
    for lifetime in [None, Some(AtEnd::Cancel), Some(AtEnd::Drain(secs(1)))] {
        let tasks = TaskRegistry::new().at_end(AtEnd::Cancel);
        let (open, gate) = gate();
        let mut task = tasks.task("task");
        if let Some(lifetime) = lifetime {
            task = task.at_end(lifetime).on(End::Completed, lifetime);
        }
        let task = task.spawn(gate).unwrap();
        tokio::time::sleep(secs(86_400)).await;
        let live = &tasks.snapshot().live_tasks[0];
        assert_eq!((live.state, live.at_end), (TaskState::Kept, AtEnd::Keep), "{lifetime:?}");
        open.send(()).unwrap();
        assert_eq!(outcome(task).await, COMPLETED);
    }
}

#[tokio::test]
async fn a_task_of_no_request_can_be_told_to_end_and_can_spawn() {
    let tasks = TaskRegistry::new();
    let task = tasks.spawn("task", async {
        let child = TaskSet::current().unwrap().spawn("child", async { 2 }).unwrap();
        child.await.unwrap()
    });
    assert_eq!(task.unwrap().await.unwrap(), 2);
    let task = tasks.spawn("task", forever()).unwrap();
    settle().await;
    task.cancel();
    assert_eq!(outcome(task).await, Yield::Cancelled(Cause::Requested));
    assert_ledger(&tasks, "completed 2, cancelled 1");
}

#[tokio::test]
async fn a_task_of_no_request_can_spawn_whatever_was_chosen_elsewhere_meanwhile() {
    let tasks = TaskRegistry::new();
    let (open, gate) = gate();
    let parent = tasks.spawn("parent", async {
        let set = TaskSet::current().unwrap();
        gate.await;
        set.spawn("child", async { 3 }).unwrap().await.unwrap()
    });
    settle().await;
    // Tasks with other choices have a set of their own.
    let other = tasks.clone().limit(SpawnLimit::new(1));
    other.spawn("other", forever()).unwrap();
    open.send(()).unwrap();
    assert_eq!(parent.unwrap().await.unwrap(), 3);
    assert_ledger(&tasks, "live 1, completed 2");
}

#[tokio::test]
async fn a_task_of_no_request_changes_nothing_for_others() {
    let tasks = TaskRegistry::new();
    let stranger = tasks.spawn("stranger", forever()).unwrap();
    let told = tasks.spawn("task", async {
        let set = TaskSet::current().unwrap();
        set.at_end(AtEnd::Cancel);
        set.on(End::Completed, AtEnd::Cancel);
        set.grace(Duration::ZERO);
        set.on_panic(OnPanic::FailResponse);
        set.cancel_all();
        // It goes on itself, too.
        let asks = |stop: StopToken| async move { (stop.cancelled().await, settle().await).0 };
        set.spawn_graceful("child", asks).unwrap()
    });
    let child = told.unwrap().await.unwrap();
    settle().await;
    child.cancel();
    assert_eq!(outcome(child).await, Yield::Completed(Cause::Requested), "it has its grace");
    assert!(!stranger.is_finished());
    assert!(tasks.spawn("later", async {}).is_ok());
}

#[tokio::test(start_paused = true)]
async fn what_a_task_of_no_request_calls_has_a_set_of_its_own() {
    let tasks = TaskRegistry::new().limit(SpawnLimit::new(10).per_request(1));
    let layer = TaskSetLayer::new(&tasks).at_end(AtEnd::Cancel).deadline(secs(3));
    let stranger = tasks.spawn("stranger", forever()).unwrap();
    let worker = tasks.spawn("worker", async move {
        for _ in 0..2 {
            let call = serve(&layer);
            let task = call.set.spawn("task", forever()).unwrap();
            let full = call.set.spawn("task", forever()).unwrap_err();
            assert_eq!((full.reason, call.set.len()), (SpawnError::Full, 1));
            call.end(End::Completed);
            assert_eq!(outcome(task).await, Yield::Cancelled(Cause::Completed));
        }
        let stuck = serve(&layer);
        tokio::time::sleep(secs(4)).await;
        assert_eq!(stuck.set.spawn("task", async {}).unwrap_err().reason, SpawnError::Closed);
        TaskSet::current().unwrap().spawn("child", async {}).unwrap().await.unwrap();
    });
    worker.unwrap().await.unwrap();
    assert!(!stranger.is_finished());
    assert_ledger(&tasks, "refused 3, live 1, completed 2, cancelled 2");
}

#[tokio::test]
async fn a_task_of_no_request_that_was_told_to_end_spawns_nothing() {
    let tasks = TaskRegistry::new();
    let refused = Log::new();
    let log = refused.clone();
    let on_drop = OnDrop::new(move || {
        let set = TaskSet::current().unwrap();
        log.push(set.spawn("child", async {}).unwrap_err().reason);
    });
    let parent = tasks.spawn("parent", async move {
        let _on_drop = on_drop;
        forever().await;
    });
    let parent = parent.unwrap();
    settle().await;
    tasks.cancel_all();
    assert_eq!(outcome(parent).await, Yield::Cancelled(Cause::Shutdown));
    assert_eq!(refused.take(), [SpawnError::Closed]);
    assert_ledger(&tasks, "refused 1, cancelled 1");
}

#[tokio::test]
async fn the_tasks_of_no_request_can_end_and_start_again_and_again() {
    let tasks = TaskRegistry::new().limit(SpawnLimit::new(1));
    for round in 1..=1_000 {
        let task = tasks.spawn("task", async {}).unwrap();
        tasks.spawn("task", async {}).unwrap_err();
        task.await.unwrap();
        assert_ledger(&tasks, &format!("refused {round}, completed {round}"));
    }
}

#[test]
fn threads_that_spawn_outside_of_requests_are_counted_exactly() {
    const THREADS: u64 = 4;
    const ROUNDS: u64 = 3_000;
    let runtime = multi_thread();
    let limit = SpawnLimit::new(3);
    let tasks = TaskRegistry::new().limit(limit.clone());
    let refused = AtomicU64::new(0);
    thread::scope(|scope| {
        for _ in 0..THREADS {
            scope.spawn(|| {
                let _entered = runtime.enter();
                for round in 0..ROUNDS {
                    // As often as not the last task of the registry ends just now.
                    let other = round % 2 == 0;
                    let tasks =
                        if other { tasks.clone().at_end(AtEnd::Keep) } else { tasks.clone() };
                    if let Err(error) = tasks.spawn("task", async {}) {
                        assert_eq!(error.reason, SpawnError::Full);
                        refused.fetch_add(1, SeqCst);
                    }
                }
            });
        }
        for _ in 0..50 {
            let snapshot = tasks.snapshot();
            assert!(snapshot.totals.is_exact(), "{:?}", snapshot.totals);
            thread::yield_now();
        }
    });
    tasks.close();
    runtime.block_on(tasks.wait());
    let refused = refused.into_inner();
    let completed = THREADS * ROUNDS - refused;
    let mut expected = format!("completed {completed}");
    if refused > 0 {
        expected = format!("refused {refused}, {expected}");
    }
    assert_ledger(&tasks, &expected);
    assert_eq!(limit.in_use(), 0);
}

// The end of all

#[tokio::test]
async fn a_closed_registry_accepts_nothing_and_lets_go_on_what_lives() {
    let tasks = TaskRegistry::new();
    let layer = TaskSetLayer::new(&tasks);
    let request = serve(&layer);
    let (open, gate) = gate();
    let lives = request.set.spawn("lives", async {
        gate.await;
        TaskSet::current().unwrap().spawn("child", async {}).unwrap_err().reason
    });
    assert!(!tasks.is_closed());
    tasks.close();
    tasks.close();
    assert!(tasks.is_closed() && tasks.clone().is_closed());
    let later = serve(&layer);
    for reason in [
        request.set.spawn("late", async {}).unwrap_err().reason,
        later.set.spawn("late", async {}).unwrap_err().reason,
        tasks.spawn("late", async {}).unwrap_err().reason,
    ] {
        assert_eq!(reason, SpawnError::Closed);
    }
    let mut waiting = Box::pin(tasks.wait());
    assert!(poll_once(waiting.as_mut()).is_pending());
    open.send(()).unwrap();
    assert_eq!(lives.unwrap().await.unwrap(), SpawnError::Closed);
    waiting.await;
    assert_ledger(&tasks, "refused 4, completed 1");
}

#[tokio::test]
async fn to_wait_is_to_wait_for_the_close_and_the_last_task() {
    let tasks = TaskRegistry::new();
    let mut idle = Box::pin(tasks.wait());
    assert!(poll_once(idle.as_mut()).is_pending(), "it is not closed");
    let (open, gate) = gate();
    tasks.spawn("task", gate).unwrap();
    tasks.close();
    assert!(poll_once(idle.as_mut()).is_pending(), "a task lives");
    let mut other = Box::pin(tasks.wait());
    assert!(poll_once(other.as_mut()).is_pending());
    drop(other);
    let second = tokio::spawn({
        let tasks = tasks.clone();
        async move { tasks.wait().await }
    });
    open.send(()).unwrap();
    idle.await;
    second.await.unwrap();
    // And when all is over.
    now(tasks.wait());
}

#[test]
fn an_empty_registry_can_be_waited_for_outside_of_a_runtime() {
    let tasks = TaskRegistry::new();
    tasks.close();
    now(tasks.wait());
    tasks.cancel_all();
    assert_ledger(&tasks, "");
}

#[tokio::test]
async fn a_task_that_waits_for_all_tasks_waits_for_itself_until_it_is_told_to_end() {
    let tasks = TaskRegistry::new();
    let own = tasks.clone();
    let task = tasks.spawn("waits for itself", async move { own.wait().await }).unwrap();
    tasks.close();
    settle().await;
    assert!(!task.is_finished());
    tasks.cancel_all();
    assert_eq!(outcome(task).await, Yield::Cancelled(Cause::Shutdown));
    tasks.wait().await;
}

#[tokio::test]
async fn at_shutdown_all_tasks_are_told_to_end_the_kept_ones_too() {
    let tasks = TaskRegistry::new();
    let layer = TaskSetLayer::new(&tasks);
    let (open, ended) = (serve(&layer), serve(&layer));
    let handles = [
        open.set.spawn("running", forever()),
        open.set.task("own choice").at_end(AtEnd::Keep).spawn(forever()),
        ended.set.task("kept").at_end(AtEnd::Keep).spawn(forever()),
        ended.set.spawn("drains", forever()),
        tasks.spawn("of no request", forever()),
        tasks.task("of no request").timeout(secs(3600)).spawn(forever()),
    ];
    settle().await;
    ended.end(End::Completed);
    tasks.close();
    tasks.cancel_all();
    tasks.cancel_all();
    for handle in handles {
        assert_eq!(outcome(handle.unwrap()).await, Yield::Cancelled(Cause::Shutdown));
    }
    now(tasks.wait());
    assert_drained(&tasks);
    assert_ledger(&tasks, "cancelled 6");
}

#[tokio::test]
async fn what_is_spawned_after_a_cancellation_is_not_affected() {
    let tasks = TaskRegistry::new();
    let layer = TaskSetLayer::new(&tasks);
    let before = tasks.spawn("before", forever()).unwrap();
    settle().await;
    tasks.cancel_all();
    let after = tasks.spawn("after", async { 1 }).unwrap();
    assert_eq!(outcome(after).await, Yield::Completed(1));
    assert_eq!(outcome(before).await, Yield::Cancelled(Cause::Shutdown));
    let request = serve(&layer);
    assert_eq!(
        outcome(request.set.spawn("after", async { 2 }).unwrap()).await,
        Yield::Completed(2)
    );
}

#[test]
fn a_registry_that_is_not_closed_refuses_nothing_while_it_cancels() {
    let runtime = multi_thread();
    let tasks = TaskRegistry::new();
    let done = AtomicBool::new(false);
    thread::scope(|scope| {
        let spawners: Vec<_> = (0..3)
            .map(|_| {
                scope.spawn(|| {
                    let _entered = runtime.enter();
                    for _ in 0..5_000 {
                        let reason = tasks.spawn("task", forever()).err().map(|e| e.reason);
                        assert_eq!(reason, None);
                    }
                })
            })
            .collect();
        scope.spawn(|| {
            while !done.load(SeqCst) {
                tasks.cancel_all();
                thread::yield_now();
            }
        });
        let spawned: Vec<_> = spawners.into_iter().map(thread::ScopedJoinHandle::join).collect();
        done.store(true, SeqCst);
        for spawned in spawned {
            spawned.unwrap();
        }
    });
    tasks.close();
    tasks.cancel_all();
    runtime.block_on(tasks.wait());
    assert_ledger(&tasks, "cancelled 15000");
}

/// Closing takes a while here, and wherever it has come to, who waits has to wait for it.
#[test]
fn a_spawn_that_races_the_close_is_waited_for_or_refused() {
    const THREADS: usize = 8;
    let runtime = multi_thread();
    for _ in 0..20 {
        let tasks = TaskRegistry::new();
        let layer = TaskSetLayer::new(&tasks);
        let start = Arc::new(Barrier::new(THREADS + 2));
        let spawned = Arc::new(AtomicU64::new(0));
        let spawners: Vec<_> = (0..THREADS)
            .map(|_| {
                let (tasks, layer, start) = (tasks.clone(), layer.clone(), start.clone());
                let (runtime, spawned) = (runtime.handle().clone(), spawned.clone());
                thread::spawn(move || {
                    let _entered = runtime.enter();
                    // Many sets to go through, wherever this thread's are.
                    let requests: Vec<_> = (0..500).map(|_| serve(&layer)).collect();
                    start.wait();
                    let reason = loop {
                        match tasks.spawn("task", async {}) {
                            Ok(_) => spawned.fetch_add(1, SeqCst),
                            Err(error) => break error.reason,
                        };
                    };
                    assert_eq!(reason, SpawnError::Closed);
                    assert_eq!(
                        requests[0].set.spawn("late", async {}).unwrap_err().reason,
                        SpawnError::Closed,
                    );
                })
            })
            .collect();
        let waiter = thread::spawn({
            let (tasks, start) = (tasks.clone(), start.clone());
            move || {
                start.wait();
                while !tasks.is_closed() {
                    std::hint::spin_loop();
                }
                current_thread().block_on(tasks.wait());
                let totals = tasks.snapshot().totals;
                assert_eq!(totals.live, 0);
                totals.spawned
            }
        });
        start.wait();
        while spawned.load(SeqCst) < 100 {
            thread::yield_now();
        }
        tasks.close();
        let at_wait = waiter.join().unwrap();
        for spawner in spawners {
            spawner.join().unwrap();
        }
        assert_eq!(at_wait, spawned.load(SeqCst), "none was accepted after the wait");
    }
}

#[test]
fn when_the_last_task_is_waited_for_its_permit_is_back_and_its_observer_was_told() {
    let runtime = multi_thread();
    for _ in 0..2_000 {
        let limit = SpawnLimit::new(4);
        let ended = Arc::new(AtomicU64::new(0));
        let count = ended.clone();
        let tasks = TaskRegistry::new().limit(limit.clone()).observer(move |event: &TaskEvent| {
            if let TaskEvent::Ended { .. } = event {
                count.fetch_add(1, SeqCst);
            }
        });
        {
            let _entered = runtime.enter();
            for _ in 0..4 {
                tasks.spawn("task", async {}).unwrap();
            }
        }
        tasks.close();
        // Spinning, to be there the moment it is over.
        let mut waiting = Box::pin(tasks.wait());
        while poll_once(waiting.as_mut()).is_pending() {
            std::hint::spin_loop();
        }
        assert_eq!((limit.in_use(), ended.load(SeqCst)), (0, 4));
    }
}

// The observer

type Seen = Vec<(&'static str, Option<Outcome>)>;

fn observed() -> (TaskRegistry, Arc<Mutex<Seen>>) {
    let seen = Arc::new(Mutex::new(Vec::new()));
    let log = seen.clone();
    let tasks = TaskRegistry::new().observer(move |event: &TaskEvent| {
        let entry = match event {
            TaskEvent::Started { name, site, .. } => {
                assert_eq!(site.file(), file!());
                (*name, None)
            }
            TaskEvent::Ended { name, site, outcome, .. } => {
                assert_eq!(site.file(), file!());
                (*name, Some(*outcome))
            }
            _ => panic!("another event"),
        };
        log.lock().unwrap().push(entry);
    });
    (tasks, seen)
}

#[test]
fn an_observer_sees_the_start_and_the_end_of_each_task_once() {
    let runtime = current_thread();
    let (tasks, seen) = observed();
    let tasks = tasks.limit(SpawnLimit::new(5));
    runtime.block_on(async {
        tokio::time::pause();
        let request = serve(&TaskSetLayer::new(&tasks));
        let set = &request.set;
        set.spawn("completed", async {}).unwrap();
        set.spawn("panicked", async { panic!("observed") }).unwrap();
        set.spawn("cancelled", forever()).unwrap().cancel();
        let timed_out = set.task("timed out").timeout(secs(1)).spawn(forever()).unwrap();
        tasks.spawn("aborted", forever()).unwrap();
        set.spawn("refused", async {}).unwrap_err();
        assert_eq!(outcome(timed_out).await, Yield::TimedOut);
    });
    drop(runtime);
    let seen = std::mem::take(&mut *seen.lock().unwrap());
    assert_eq!(seen.len(), 10, "{seen:?}");
    for (name, outcome) in [
        ("completed", Outcome::Completed),
        ("panicked", Outcome::Panicked),
        ("cancelled", Outcome::Cancelled),
        ("timed out", Outcome::TimedOut),
        ("aborted", Outcome::Aborted),
    ] {
        let of_it: Vec<_> = seen.iter().filter(|(other, _)| *other == name).collect();
        assert_eq!(of_it, [&(name, None), &(name, Some(outcome))]);
    }
}

#[tokio::test]
async fn an_observer_hears_the_same_name_at_the_start_and_the_end_however_many_there_are() {
    // More than a set tells apart, so that the last are one.
    let names: Vec<&'static str> = (0..65_537).map(|n| leak(n.to_string()).as_str()).collect();
    let (tasks, seen) = observed();
    let request = serve(&TaskSetLayer::new(&tasks));
    for name in names {
        request.set.spawn(name, async {}).unwrap();
    }
    tasks.idle().await;
    let mut started = HashMap::new();
    for (name, outcome) in seen.lock().unwrap().iter() {
        *started.entry(*name).or_insert(0) += if outcome.is_none() { 1 } else { -1 };
    }
    started.retain(|_, more| *more != 0);
    assert_eq!(started, HashMap::new(), "started more often than they have ended");
}

#[tokio::test(start_paused = true)]
async fn an_observer_is_told_how_long_a_task_lived() {
    let lived = Log::new();
    let log = lived.clone();
    let tasks = TaskRegistry::new().observer(move |event: &TaskEvent| {
        if let TaskEvent::Ended { elapsed, .. } = event {
            log.push(*elapsed);
        }
    });
    let start = Instant::now();
    let request = serve(&TaskSetLayer::new(&tasks));
    tokio::time::advance(secs(5)).await;
    let task = request.set.task("task").timeout(Duration::from_millis(1_500)).spawn(forever());
    outcome(task.unwrap()).await;
    let lived = lived.take();
    assert_eq!(lived, [start.elapsed().saturating_sub(secs(5))]);
    assert_eq!(lived[0].as_millis() / 10, 150);
}

#[tokio::test]
async fn an_observer_that_panics_harms_nobody() {
    let limit = SpawnLimit::new(1);
    let tasks = TaskRegistry::new()
        .limit(limit.clone())
        .observer(|event: &TaskEvent| panic!("the observer panics at {event:?}"));
    for _ in 0..2 {
        let task = tasks.spawn("task", async { 1 }).unwrap();
        assert_eq!(outcome(task).await, Yield::Completed(1));
        let task = tasks.spawn("task", async { panic!("the task") }).unwrap();
        assert_eq!(outcome::<()>(task).await, Yield::Panicked("the task".to_owned()));
    }
    assert_ledger(&tasks, "completed 2, panicked 2");
    assert_eq!(limit.in_use(), 0);
    tasks.close();
    now(tasks.wait());
}

#[derive(Clone, Default)]
struct Asks(Arc<Mutex<Option<TaskRegistry>>>);

impl Observe for Asks {
    fn observe(&self, event: &TaskEvent) {
        let tasks = self.0.lock().unwrap().clone().unwrap();
        assert!(tasks.snapshot().totals.is_exact());
        let _ = (tasks.len(), tasks.is_closed());
        // It may even spawn, where it knows when to stop.
        if let TaskEvent::Ended { name: "parent", .. } = event {
            tasks.spawn("child", async {}).unwrap();
        }
    }
}

#[tokio::test]
async fn an_observer_can_ask_the_registry_and_spawn() {
    let asks = Asks::default();
    let tasks = TaskRegistry::new().observer(asks.clone());
    *asks.0.lock().unwrap() = Some(tasks.clone());
    let request = serve(&TaskSetLayer::new(&tasks));
    outcome(request.set.spawn("parent", async {}).unwrap()).await;
    outcome(tasks.spawn("parent", async {}).unwrap()).await;
    settle().await;
    assert_ledger(&tasks, "completed 4");
    *asks.0.lock().unwrap() = None;
}

// What is left

/// A registry, and whether all that it owns is gone.
fn watched() -> (TaskRegistry, Flag) {
    let freed = Flag::default();
    let on_drop = freed.on_drop();
    let tasks = TaskRegistry::new().observer(move |_: &_| {
        let _ = &on_drop;
    });
    (tasks, freed)
}

#[test]
fn nothing_is_left_of_a_registry_that_was_dropped() {
    let runtime = current_thread();
    let (tasks, freed) = watched();
    runtime.block_on(async {
        tokio::time::pause();
        let layer = TaskSetLayer::new(&tasks);
        for end in ENDS {
            let request = serve(&layer);
            let set = request.set.clone();
            set.spawn("task", async {}).unwrap();
            set.spawn("drains", forever()).unwrap();
            set.task("times out").timeout(secs(1)).spawn(forever()).unwrap();
            set.task("own").at_end(AtEnd::Drain(secs(2))).spawn(forever()).unwrap();
            drop(set.hold());
            request.end(end);
        }
        // Without tasks, and refused.
        serve(&layer).end(End::Completed);
        tasks.spawn("own", async {}).unwrap();
        tasks.task("own").timeout(secs(1)).spawn(forever()).unwrap();
        tokio::time::sleep(secs(60)).await;
        assert_drained(&tasks);
        drop((tasks, layer));
    });
    assert!(freed.is_set(), "while the runtime is still there");
}

#[test]
fn nothing_is_left_of_a_registry_whose_runtime_was_dropped_first() {
    let runtime = multi_thread();
    let (tasks, freed) = watched();
    runtime.block_on(async {
        let request = serve(&TaskSetLayer::new(&tasks));
        request.set.task("timeout").timeout(secs(3600)).spawn(forever()).unwrap();
        request.set.spawn("drains", forever()).unwrap();
        tasks.spawn("own", forever()).unwrap();
        request.end(End::Completed);
    });
    drop(runtime);
    assert_ledger(&tasks, "aborted 3");
    drop(tasks);
    assert!(freed.is_set());
}

#[test]
fn a_registry_that_refused_all_leaves_nothing() {
    let (tasks, freed) = watched();
    tasks.spawn("no runtime", async {}).unwrap_err();
    let request = serve(&TaskSetLayer::new(&tasks));
    request.set.spawn("no runtime", async {}).unwrap_err();
    request.end(End::Completed);
    let full = tasks.clone().limit(SpawnLimit::new(0));
    current_thread().block_on(async { full.spawn("full", async {}).unwrap_err() });
    tasks.close();
    tasks.spawn("closed", async {}).unwrap_err();
    assert_ledger(&tasks, "refused 4");
    drop((tasks, full));
    assert!(freed.is_set());
}

#[test]
fn a_registry_shows_what_it_is() {
    let tasks = TaskRegistry::default().limit(SpawnLimit::new(3).per_request(2));
    let shown = format!("{tasks:?}");
    assert!(shown.starts_with("TaskRegistry { len: 0, is_closed: false, limit: Some("), "{shown}");
    let layer = format!("{:?}", TaskSetLayer::new(&tasks).at_end(AtEnd::Keep).in_extensions());
    assert!(layer.contains("Keep") && layer.contains("in_extensions: true"), "{layer}");
}
