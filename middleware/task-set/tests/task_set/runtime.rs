//! Runtimes: none, a dead one, a second one, one without a time driver, one that goes away.

use std::{
    sync::mpsc,
    task::{Context, Poll, Waker},
    thread,
    time::{Duration, Instant},
};

use tokio::runtime::{Builder, Handle, Runtime};
use tower_task_set::{
    AtEnd, Cause, End, SpawnError, SpawnLimit, TaskRegistry, TaskSet, TaskSetLayer, TaskState,
    assert_drained,
};

use crate::{log::events_of, support::*};

fn served_on(runtime: &Runtime, tasks: &TaskRegistry) -> Served {
    let _entered = runtime.enter();
    serve(&TaskSetLayer::new(tasks))
}

// None

#[test]
fn outside_of_a_runtime_a_spawn_is_refused_and_the_future_can_run_elsewhere() {
    let tasks = TaskRegistry::new();
    let request = serve(&TaskSetLayer::new(&tasks));
    let refused = request.set.spawn("task", async {}).unwrap_err();
    assert_eq!(refused.reason, SpawnError::NoRuntime);
    let refused = request.set.task("task").timeout(secs(1)).spawn(async {}).unwrap_err();
    assert_eq!(refused.reason, SpawnError::NoRuntime);
    let refused = tasks.spawn("task", async { 4 }).unwrap_err();
    assert_eq!(refused.reason, SpawnError::NoRuntime);
    assert_eq!(current_thread().block_on(refused.future), 4);
    assert_ledger(&tasks, "refused 3");
    request.end(End::Completed);
    assert_ledger(&tasks, "refused 3");
}

#[test]
fn a_set_that_was_made_outside_of_a_runtime_takes_that_of_its_first_spawn() {
    let tasks = TaskRegistry::new();
    let request = serve(&TaskSetLayer::new(&tasks));
    request.set.spawn("too early", async {}).unwrap_err();
    let runtime = multi_thread();
    let task = runtime.block_on(async { request.set.spawn("task", async {}).unwrap() });
    // From now on it has one, wherever it is asked.
    let other = request.set.spawn("task", async {}).unwrap();
    assert_eq!(runtime.block_on(outcome(task)), COMPLETED);
    assert_eq!(runtime.block_on(outcome(other)), COMPLETED);
}

#[test]
fn a_set_spawns_from_any_thread_onto_the_runtime_it_was_made_on() {
    let runtime = multi_thread();
    let tasks = TaskRegistry::new();
    let request = served_on(&runtime, &tasks);
    let set = request.set.clone();
    let spawner = thread::spawn(move || set.spawn("task", async { Handle::current().id() }));
    let task = spawner.join().unwrap().unwrap();
    assert_eq!(runtime.block_on(task).unwrap(), runtime.handle().id());
}

// A dead one

#[test]
fn on_a_runtime_that_was_shut_down_a_spawn_is_refused() {
    for runtime in [current_thread(), multi_thread()] {
        let limit = SpawnLimit::new(1);
        let tasks = TaskRegistry::new().limit(limit.clone());
        let handle = runtime.handle().clone();
        let request = served_on(&runtime, &tasks);
        drop(runtime);
        let refused = request.set.spawn("task", async { 4 }).unwrap_err();
        assert_eq!(refused.reason, SpawnError::NoRuntime);
        assert_eq!(now(refused.future), 4);
        let tasks_there = tasks.clone().runtime(handle);
        let refused = tasks_there.spawn("task", async { 4 }).unwrap_err();
        assert_eq!(refused.reason, SpawnError::NoRuntime);
        // From within another runtime too.
        let refused = current_thread().block_on(async { request.set.spawn("task", async { 4 }) });
        assert_eq!(refused.unwrap_err().reason, SpawnError::NoRuntime);
        assert_eq!(limit.in_use(), 0);
        assert_ledger(&tasks, "refused 3");
    }
}

#[test]
fn in_a_request_on_one_runtime_a_spawn_onto_another_that_is_dead_is_refused() {
    let dead = multi_thread();
    let tasks = TaskRegistry::new().runtime(dead.handle().clone());
    drop(dead);
    current_thread().block_on(async {
        let mut request = serve(&TaskSetLayer::new(&tasks));
        let refused = request.in_poll(|| {
            let spawned = TaskSet::current().unwrap().spawn("task", async {});
            spawned.map_err(|refused| refused.reason).err()
        });
        assert_eq!(refused, Some(SpawnError::NoRuntime));
        assert_ledger(&tasks, "refused 1");
    });
}

// A second one

#[test]
fn a_registry_can_choose_the_runtime_of_its_tasks() {
    let work = multi_thread();
    let tasks = TaskRegistry::new().runtime(work.handle().clone());
    let serving = current_thread();
    serving.block_on(async {
        let request = serve(&TaskSetLayer::new(&tasks));
        let ran_on = || async { Handle::current().id() };
        let task = request.set.spawn("task", ran_on()).unwrap();
        assert_eq!(task.await.unwrap(), work.handle().id());
        assert_eq!(tasks.spawn("own", ran_on()).unwrap().await.unwrap(), work.handle().id());
        request.set.at_end(AtEnd::Drain(Duration::from_millis(1)));
        let drains = request.set.spawn("drains", forever()).unwrap();
        request.end(End::Completed);
        assert_eq!(outcome(drains).await, Yield::Cancelled(Cause::Completed));
    });
    // And where there is no runtime at all.
    let outside = tasks.spawn("outside", async {}).unwrap();
    assert_eq!(serving.block_on(outcome(outside)), COMPLETED);
}

#[test]
fn a_task_of_no_request_runs_on_the_runtime_it_was_spawned_on() {
    // Whatever other tasks of the registry's live, and where.
    let (first, second) = (multi_thread(), current_thread());
    let tasks = TaskRegistry::new();
    first.block_on(async { tasks.spawn("of the first", forever()).unwrap() });
    let ran_on = second.block_on(async {
        let task = tasks.spawn("of the second", async { Handle::current().id() }).unwrap();
        // If it is not on this runtime it comes through all the same: the other has workers.
        task.await.unwrap()
    });
    assert_eq!(ran_on, second.handle().id());
}

#[test]
fn a_handle_can_be_awaited_on_another_runtime() {
    let (first, second) = (multi_thread(), current_thread());
    let tasks = TaskRegistry::new();
    let (open, gate) = gate();
    let task = first.block_on(async { tasks.spawn("task", gate).unwrap() });
    open.send(()).unwrap();
    assert_eq!(second.block_on(outcome(task)), COMPLETED);
}

#[test]
fn each_runtime_keeps_the_time_of_its_own_tasks() {
    let runtimes = [current_thread(), current_thread()];
    let tasks = TaskRegistry::new();
    let drained = runtimes.each_ref().map(|runtime| {
        runtime.block_on(async {
            tokio::time::pause();
            let request = serve(&TaskSetLayer::new(&tasks).at_end(AtEnd::Drain(secs(5))));
            let task = request.set.spawn("task", forever()).unwrap();
            request.end(End::Completed);
            task
        })
    });
    for (runtime, task) in runtimes.iter().zip(drained) {
        assert!(!task.is_finished());
        runtime.block_on(async {
            let start = tokio::time::Instant::now();
            assert_eq!(outcome(task).await, Yield::Cancelled(Cause::Completed));
            assert_eq!(start.elapsed().as_secs(), 5);
            // The time of the other one stands still.
            tokio::time::advance(secs(60)).await;
        });
    }
}

// One that goes away

#[test]
fn when_a_runtime_is_dropped_its_tasks_are_aborted_and_no_handle_hangs() {
    for runtime in [current_thread(), multi_thread()] {
        let limit = SpawnLimit::new(10);
        let tasks = TaskRegistry::new().limit(limit.clone());
        let request = served_on(&runtime, &tasks);
        let dropped = Flag::default();
        let on_drop = dropped.on_drop();
        let waits = request.set.spawn("waits", async move {
            let _on_drop = on_drop;
            forever().await;
        });
        runtime.block_on(settle());
        // This one may not even have started.
        let fresh = request.set.task("fresh").timeout(secs(3600)).spawn(forever());
        let abandoned = request.set.spawn("abandoned", forever());
        drop(abandoned.unwrap());
        drop(runtime);
        assert!(dropped.is_set());
        let elsewhere = current_thread();
        let aborted = Yield::Aborted(Cause::Shutdown);
        assert_eq!(elsewhere.block_on(outcome(waits.unwrap())), aborted);
        assert_eq!(elsewhere.block_on(outcome(fresh.unwrap())), aborted);
        assert_ledger(&tasks, "aborted 3");
        assert_eq!(limit.in_use(), 0);
        request.end(End::Completed);
        tasks.close();
        now(tasks.wait());
        assert_drained(&tasks);
    }
}

#[test]
fn a_result_outlives_the_runtime_it_was_made_on() {
    let runtime = multi_thread();
    let tasks = TaskRegistry::new();
    let task = runtime.block_on(async { tasks.spawn("task", async { 6 }).unwrap() });
    runtime.block_on(async {
        while !task.is_finished() {
            tokio::task::yield_now().await;
        }
    });
    drop(runtime);
    task.cancel();
    assert_eq!(current_thread().block_on(outcome(task)), Yield::Completed(6));
}

#[test]
fn what_waits_for_the_registry_is_woken_when_the_last_runtime_goes_away() {
    let runtime = current_thread();
    let tasks = TaskRegistry::new();
    runtime.block_on(async {
        tasks.spawn("task", forever()).unwrap();
        settle().await;
    });
    tasks.close();
    let waiting = thread::spawn({
        let tasks = tasks.clone();
        move || current_thread().block_on(tasks.wait())
    });
    drop(runtime);
    waiting.join().unwrap();
    assert_ledger(&tasks, "aborted 1");
}

#[test]
fn a_destructor_can_spawn_while_its_runtime_is_shut_down() {
    for runtime in [current_thread(), multi_thread()] {
        let limit = SpawnLimit::new(2);
        let tasks = TaskRegistry::new().limit(limit.clone());
        let request = served_on(&runtime, &tasks);
        let (tell, told) = mpsc::channel();
        let on_drop = OnDrop::new(move || {
            let child = TaskSet::current().unwrap().spawn("child", forever());
            tell.send(child.map_err(|refused| refused.reason)).unwrap();
        });
        request
            .set
            .spawn("parent", async move {
                let _on_drop = on_drop;
                forever().await;
            })
            .unwrap();
        runtime.block_on(settle());
        drop(runtime);
        let child = told.recv().unwrap().unwrap();
        assert_eq!(current_thread().block_on(outcome(child)), Yield::Aborted(Cause::Shutdown));
        assert_ledger(&tasks, "aborted 2");
        assert_eq!(limit.in_use(), 0);
    }
}

#[test]
fn a_runtime_can_be_shut_down_in_the_background_while_tasks_live() {
    let runtime = multi_thread();
    let tasks = TaskRegistry::new();
    let request = served_on(&runtime, &tasks);
    for _ in 0..100 {
        request.set.spawn("task", forever()).unwrap();
    }
    runtime.shutdown_background();
    tasks.close();
    current_thread().block_on(tasks.wait());
    let totals = tasks.snapshot().totals;
    assert_eq!((totals.spawned, totals.aborted, totals.live), (100, 100, 0));
}

// Kinds of runtime

#[test]
fn on_a_current_thread_runtime_a_drain_is_done_by_the_thread_that_waits() {
    let runtime = current_thread();
    let tasks = TaskRegistry::new();
    let dropped = Flag::default();
    runtime.block_on(async {
        let request = serve(&TaskSetLayer::new(&tasks).at_end(AtEnd::Cancel));
        let on_drop = dropped.on_drop();
        request
            .set
            .spawn("task", async move {
                let _on_drop = on_drop;
                forever().await;
            })
            .unwrap();
        settle().await;
        request.end(End::Completed);
    });
    // Nobody runs it now.
    assert_ledger(&tasks, "live 1");
    tasks.close();
    assert!(!dropped.is_set());
    runtime.block_on(tasks.wait());
    assert!(dropped.is_set());
    assert_ledger(&tasks, "cancelled 1");
}

#[test]
fn a_task_that_never_awaits_is_listed_as_stuck_until_it_ends_by_itself() {
    let runtime = multi_thread();
    let tasks = TaskRegistry::new();
    let request = served_on(&runtime, &tasks);
    let (started, has_started) = mpsc::channel();
    let (release, released) = mpsc::channel::<()>();
    let stuck = request.set.spawn("stuck", async move {
        started.send(()).unwrap();
        released.recv().unwrap();
        "after all"
    });
    let stuck = stuck.unwrap();
    has_started.recv().unwrap();
    request.set.at_end(AtEnd::Cancel);
    request.end(End::Disconnected);
    tasks.close();
    stuck.cancel();
    let snapshot = tasks.snapshot();
    let task = &snapshot.live_tasks[0];
    assert_eq!((task.name, task.state), ("stuck", TaskState::Cancelling));
    assert_eq!(task.site.file(), file!());
    let mut waiting = Box::pin(tasks.wait());
    assert!(poll_once(waiting.as_mut()).is_pending());
    release.send(()).unwrap();
    runtime.block_on(waiting);
    assert_eq!(runtime.block_on(outcome(stuck)), Yield::Completed("after all"));
    assert_ledger(&tasks, "completed 1");
}

// Without a time driver

#[test]
fn without_a_time_driver_nothing_panics_and_a_drain_lasts_until_shutdown() {
    for mut builder in [Builder::new_current_thread(), Builder::new_multi_thread()] {
        let runtime = builder.enable_io().build().unwrap();
        let tasks = TaskRegistry::new();
        runtime.block_on(async {
            let drained = Duration::from_millis(1);
            let first = tasks.task("first").timeout(drained * 3_600_000).spawn(forever());
            // Whoever would keep the time has seen that he cannot, and has gone.
            while Handle::current().metrics().num_alive_tasks() > 1 {
                tokio::task::yield_now().await;
            }
            let request = serve(&TaskSetLayer::new(&tasks).at_end(AtEnd::Drain(drained)));
            let drains = request.set.spawn("drains", forever()).unwrap();
            let own = request.set.task("own").at_end(AtEnd::Drain(drained)).spawn(forever());
            let timeout = request.set.task("timeout").timeout(drained).spawn(forever()).unwrap();
            let dies = request.set.task("dies").at_end(AtEnd::Cancel).spawn(forever()).unwrap();
            let at_once = request.set.task("at once").at_end(AtEnd::Drain(Duration::ZERO));
            let at_once = at_once.spawn(forever()).unwrap();
            request.end(End::Completed);
            assert_eq!(outcome(dies).await, Yield::Cancelled(Cause::Completed));
            assert_eq!(outcome(at_once).await, Yield::Cancelled(Cause::Completed));
            let over = Instant::now() + drained * 5;
            while Instant::now() < over {
                settle().await;
            }
            assert_ledger(&tasks, "live 4, cancelled 2");
            tasks.close();
            tasks.cancel_all();
            for task in [first.unwrap(), drains, own.unwrap(), timeout] {
                assert_eq!(outcome(task).await, Yield::Cancelled(Cause::Shutdown));
            }
        });
    }
}

#[test]
fn without_a_time_driver_one_event_says_what_does_not_work() {
    let runtime = Builder::new_current_thread().build().unwrap();
    let tasks = TaskRegistry::new();
    let events = events_of(|| {
        runtime.block_on(async {
            for _ in 0..3 {
                let request = serve(&TaskSetLayer::new(&tasks));
                for _ in 0..3 {
                    request.set.task("task").timeout(secs(1)).spawn(forever()).unwrap();
                }
                request.end(End::Completed);
                settle().await;
            }
        });
    });
    assert_eq!(events.len(), 1, "{events:?}");
    assert_eq!(events[0].level, tracing::Level::WARN);
    assert!(events[0].message.contains("enable_time"), "{}", events[0].message);
}

// Waking

/// A waker that is woken after its runtime is gone drops the task; that may be under our feet.
#[test]
fn tasks_of_a_dead_runtime_can_be_told_to_end() {
    let tasks = TaskRegistry::new();
    let runtime = multi_thread();
    let request = served_on(&runtime, &tasks);
    for _ in 0..100 {
        let tasks = tasks.clone();
        let on_drop = OnDrop::new(move || drop(tasks.snapshot()));
        request
            .set
            .spawn("task", async move {
                let _on_drop = on_drop;
                forever().await;
            })
            .unwrap();
    }
    let shutdown = thread::spawn(move || drop(runtime));
    for _ in 0..100 {
        tasks.cancel_all();
    }
    shutdown.join().unwrap();
    let totals = tasks.snapshot().totals;
    assert!(totals.is_exact());
    assert_eq!((totals.live, totals.cancelled + totals.aborted), (0, 100));
}

#[test]
fn a_handle_of_a_task_on_a_runtime_that_nobody_runs_is_pending_and_not_lost() {
    let runtime = current_thread();
    let tasks = TaskRegistry::new();
    let mut task = {
        let _entered = runtime.enter();
        tasks.spawn("task", async { 1 }).unwrap()
    };
    let poll = std::pin::Pin::new(&mut task).poll(&mut Context::from_waker(Waker::noop()));
    assert!(matches!(poll, Poll::Pending));
    assert_eq!(runtime.block_on(outcome(task)), Yield::Completed(1));
}

// Under loom tokio has no such callbacks.
#[cfg(not(loom))]
#[test]
fn what_goes_with_the_last_of_a_dead_runtime_may_look_at_the_registry() {
    let tasks = TaskRegistry::new();
    let (tell, told) = mpsc::channel();
    let registry = tasks.clone();
    let on_drop = OnDrop::new(move || tell.send(registry.len()).unwrap());
    // Sets of one thread meet at one lock.
    let runtimes = thread::spawn(move || {
        let run = |runtime: Runtime| {
            let task = async { tasks.spawn("task", async {}).unwrap().await.unwrap() };
            runtime.block_on(task);
        };
        let with_callback = move || {
            let _ = &on_drop;
        };
        run(Builder::new_current_thread().on_thread_park(with_callback).build().unwrap());
        (0..3).for_each(|_| run(current_thread()));
    });
    // Under the lock it would wait for itself.
    assert_eq!(told.recv_timeout(Duration::from_secs(30)), Ok(0));
    runtimes.join().unwrap();
}
