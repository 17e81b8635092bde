//! Limits: who may, who waits, and that every permit comes back.

use std::{
    convert::Infallible,
    pin::{Pin, pin},
    sync::mpsc,
    thread,
    time::Duration,
};

use bytes::Bytes;
use http::Request;
use http_body::Body;
use tokio::time::Instant;
use tokio_test::{assert_pending, assert_ready_err, assert_ready_ok, task};
use tower::{Layer, ServiceBuilder, ServiceExt, service_fn};
use tower_spawn_limit::{Level, RequestLimitLayer, SpawnLimitLayer, spawn};
use tower_task_set::{
    Cause, End, SpawnError, SpawnLimit, TaskError, TaskRegistry, TaskSet, TaskSetLayer,
};

use crate::support::*;

/// A registry with this limit, and a request in it that has answered.
fn limited(limit: &SpawnLimit) -> (TaskRegistry, Served) {
    let tasks = TaskRegistry::new().limit(limit.clone());
    let served = serve(&TaskSetLayer::new(&tasks));
    (tasks, served)
}

#[tokio::test(start_paused = true)]
async fn who_waits_gets_the_permits_in_the_order_of_the_asking() {
    let limit = SpawnLimit::new(1);
    let (tasks, served) = limited(&limit);
    let (open, gate) = gate();
    served.set.spawn("holds", gate).unwrap();
    let log = Log::new();
    let mut waiting: Vec<_> = ["first", "second", "third"]
        .map(|name| {
            let log = log.clone();
            task::spawn(served.set.spawn_within(secs(9), name, async move { log.push(name) }))
        })
        .into();
    for waiting in &mut waiting {
        assert_pending!(waiting.poll());
    }
    assert_eq!((limit.in_use(), limit.waiting()), (1, 3));
    assert_eq!(served.set.spawn("late", async {}).unwrap_err().reason, SpawnError::Full);
    open.send(()).unwrap();
    let mut handles = Vec::new();
    for (left, waiting) in (0..3).rev().zip(&mut waiting) {
        settle().await;
        assert!(waiting.is_woken());
        handles.push(assert_ready_ok!(waiting.poll()));
        assert_eq!((limit.in_use(), limit.waiting()), (1, left));
    }
    for handle in handles {
        assert_eq!(outcome(handle).await, COMPLETED);
    }
    assert_eq!(log.take(), ["first", "second", "third"]);
    assert_ledger(&tasks, "refused 1, completed 4");
    assert_eq!((limit.in_use(), limit.waiting(), limit.refused()), (0, 0, 1));
}

#[tokio::test(start_paused = true)]
async fn who_waits_gives_up_when_the_time_is_over_and_is_counted_once() {
    let limit = SpawnLimit::new(1);
    let (tasks, served) = limited(&limit);
    served.set.spawn("holds", forever()).unwrap();
    let start = Instant::now();
    let ran = Flag::default();
    let future = {
        let ran = ran.clone();
        async move { ran.set() }
    };
    let refused = served.set.spawn_within(secs(3), "waits", future).await.unwrap_err();
    assert_eq!(refused.reason, SpawnError::Full);
    assert!((secs(3)..secs(4)).contains(&start.elapsed()), "{:?}", start.elapsed());
    assert!(!ran.is_set());
    assert_ledger(&tasks, "refused 1, live 1");
    assert_eq!((limit.waiting(), limit.refused()), (0, 1));
    // The future is as it was.
    refused.future.await;
    assert!(ran.is_set());
}

#[tokio::test(start_paused = true)]
async fn the_registry_waits_for_its_limit_too() {
    let limit = SpawnLimit::new(1).per_request(0);
    let tasks = TaskRegistry::new().limit(limit.clone());
    let holds = tasks.spawn("holds", forever()).unwrap();
    let mut waiting =
        task::spawn(tasks.task("waits").timeout(secs(1)).within(secs(9)).spawn(forever()));
    assert_pending!(waiting.poll());
    holds.cancel();
    settle().await;
    let handle = assert_ready_ok!(waiting.poll());
    assert_eq!(outcome(handle).await, Yield::TimedOut);
    assert_ledger(&tasks, "cancelled 1, timed out 1");
    assert_eq!(limit.in_use(), 0);
}

#[tokio::test(start_paused = true)]
async fn who_waits_when_its_request_ends_is_closed_out() {
    for end in ENDS {
        let limit = SpawnLimit::new(1);
        let tasks = TaskRegistry::new().limit(limit.clone());
        tasks.spawn("holds", forever()).unwrap();
        let served = serve(&TaskSetLayer::new(&tasks));
        let set = served.set.clone();
        let (ran, dropped) = (Flag::default(), Flag::default());
        let (runs, on_drop) = (ran.clone(), dropped.on_drop());
        let future = async move {
            runs.set();
            drop(on_drop);
        };
        let mut waiting = task::spawn(set.spawn_within(secs(9), "waits", future));
        assert_pending!(waiting.poll());
        served.end(end);
        assert!(waiting.is_woken(), "{end:?}");
        let refused = assert_ready_err!(waiting.poll());
        assert_eq!(refused.reason, SpawnError::Closed);
        drop(refused);
        assert!(!ran.is_set() && dropped.is_set());
        assert_eq!((limit.in_use(), limit.waiting()), (1, 0));
        assert_ledger(&tasks, "refused 1, live 1");
    }
}

#[tokio::test(start_paused = true)]
async fn who_waits_when_its_set_is_cancelled_or_its_registry_closed_is_closed_out() {
    for end in [
        |_: &TaskRegistry, set: &TaskSet| set.cancel_all(),
        |tasks: &TaskRegistry, _: &TaskSet| tasks.close(),
        |tasks: &TaskRegistry, _: &TaskSet| tasks.cancel_all(),
    ] {
        let limit = SpawnLimit::new(1);
        let permit = limit.try_acquire().unwrap();
        let (tasks, served) = limited(&limit);
        let mut waiting = task::spawn(served.set.spawn_within(secs(9), "waits", forever()));
        assert_pending!(waiting.poll());
        end(&tasks, &served.set);
        assert!(waiting.is_woken());
        assert_eq!(assert_ready_err!(waiting.poll()).reason, SpawnError::Closed);
        assert_ledger(&tasks, "refused 1");
        drop(permit);
        assert_eq!(limit.in_use(), 0);
    }
    for end in [TaskRegistry::close, TaskRegistry::begin_drain] {
        let limit = SpawnLimit::new(0);
        let tasks = TaskRegistry::new().limit(limit.clone());
        let mut waiting = task::spawn(tasks.spawn_within(secs(9), "waits", forever()));
        assert_pending!(waiting.poll());
        end(&tasks);
        assert!(waiting.is_woken());
        assert_eq!(assert_ready_err!(waiting.poll()).reason, SpawnError::Closed);
        assert_ledger(&tasks, "refused 1");
    }
}

#[tokio::test(start_paused = true)]
async fn a_registry_where_somebody_only_waited_is_gone_with_its_last_handle() {
    for end in [|_: &TaskRegistry| {}, TaskRegistry::close, TaskRegistry::begin_drain] {
        let gone = Flag::default();
        let on_drop = gone.on_drop();
        let tasks = TaskRegistry::new().limit(SpawnLimit::new(0)).observer(move |_: &_| {
            let _ = &on_drop;
        });
        let group = tasks.group();
        let mut waiting = task::spawn(tasks.spawn_within(secs(9), "waits", forever()));
        let into_group = group.task("waits").within(secs(9)).spawn(forever());
        let mut into_group = task::spawn(into_group);
        assert_pending!(waiting.poll());
        assert_pending!(into_group.poll());
        end(&tasks);
        drop((waiting, into_group));
        assert!(!gone.is_set());
        drop((group, tasks));
        assert!(gone.is_set());
    }
}

#[tokio::test(start_paused = true)]
async fn who_waits_and_is_dropped_leaves_the_line() {
    let limit = SpawnLimit::new(1);
    let permit = limit.try_acquire().unwrap();
    let (tasks, served) = limited(&limit);
    let mut first = task::spawn(served.set.spawn_within(secs(9), "first", forever()));
    let mut second = task::spawn(served.set.spawn_within(secs(9), "second", forever()));
    assert_pending!(first.poll());
    assert_pending!(second.poll());
    drop(first);
    assert_eq!(limit.waiting(), 1);
    drop(permit);
    assert!(second.is_woken());
    // With the permit that has come, and that nobody has taken.
    drop(second);
    assert_eq!((limit.in_use(), limit.waiting()), (0, 0));
    assert_ledger(&tasks, "");
}

#[tokio::test]
async fn what_a_task_with_a_permit_asks_for_waits_nowhere_else_either() {
    let tasks = leak(TaskRegistry::new().limit(SpawnLimit::new(1)));
    let (tell, told) = mpsc::channel();
    let parent = tasks.spawn("parent", async move {
        tell.send(Box::pin(tasks.spawn_within(secs(9), "child", async {}))).unwrap();
        forever().await;
    });
    settle().await;
    // It would wait for its parent, which may wait for it.
    let child = told.recv().unwrap();
    assert_eq!(now(child).unwrap_err().reason, SpawnError::Full);
    parent.unwrap().cancel();
    settle().await;
    assert_ledger(tasks, "refused 1, cancelled 1");
}

#[tokio::test(start_paused = true)]
async fn a_task_with_a_permit_never_waits_for_one() {
    let limit = SpawnLimit::new(1);
    let (tasks, served) = limited(&limit);
    let other = SpawnLimit::new(0);
    let elsewhere = TaskRegistry::new().limit(other.clone());
    let outside: &'static TaskRegistry = leak(elsewhere.clone());
    let (set, start) = (served.set.clone(), Instant::now());
    let made_outside = Box::pin(outside.task("made outside").within(secs(9)).spawn(forever()));
    let task = async move {
        assert_eq!(Level::current(), Level::Task);
        let own = set.spawn_within(secs(9), "own", forever()).await;
        assert_eq!(own.unwrap_err().reason, SpawnError::Full);
        let others = elsewhere.spawn_within(secs(9), "of others", forever()).await;
        assert_eq!(others.unwrap_err().reason, SpawnError::Full);
        let outside = made_outside.await;
        assert_eq!(outside.unwrap_err().reason, SpawnError::Full);
        // Made here, and polled elsewhere.
        Box::pin(
            async move { elsewhere.spawn_within(secs(9), "made here", forever()).await.is_ok() },
        )
    };
    let handle = served.set.spawn("holds", task).unwrap();
    drop(handle.await.unwrap());
    assert_eq!(start.elapsed(), Duration::ZERO);
    assert_eq!((limit.refused(), other.refused()), (1, 2));
    assert_ledger(&tasks, "refused 1, completed 1");
}

#[tokio::test(start_paused = true)]
async fn a_closure_that_blocks_never_waits_for_a_permit() {
    let limit = SpawnLimit::new(1);
    let (_, served) = limited(&limit);
    let level = served.set.spawn_blocking("blocks", |_| Level::current()).unwrap();
    assert_eq!(level.await.unwrap(), Level::Task);
    assert_eq!((limit.in_use(), Level::current()), (0, Level::Free));
}

#[tokio::test(start_paused = true)]
async fn a_service_that_a_task_calls_in_process_does_not_wait_either() {
    let limit = SpawnLimit::new(1);
    let tasks = TaskRegistry::new().limit(limit.clone());
    let inner = TaskRegistry::new();
    let requests = RequestLimitLayer::new(0).wait(secs(9));
    let handler = service_fn(async |_: Request<()>| {
        // A task of a set without a limit, of a service that is called by a task with a permit.
        let task = TaskSet::current().unwrap().spawn("inner", async { Level::current() }).unwrap();
        let unlimited = task.await.unwrap();
        Ok::<_, Infallible>(http::Response::new(Script::on_drop(move || {
            assert_eq!(unlimited, Level::Task);
        })))
    });
    let service = ServiceBuilder::new().layer(TaskSetLayer::new(&inner)).service(handler);
    let start = Instant::now();
    let task = tasks.spawn("caller", async move {
        drop(service.oneshot(Request::new(())).await.unwrap());
        let limited = requests.plain().layer(service_fn(async |()| Ok::<_, Infallible>(())));
        limited.oneshot(()).await.is_err()
    });
    assert!(task.unwrap().await.unwrap());
    assert_eq!(start.elapsed(), Duration::ZERO);
}

#[tokio::test(start_paused = true)]
async fn a_handler_with_the_permit_of_a_request_waits_for_that_of_a_task() {
    let requests = RequestLimitLayer::new(1);
    let limit = SpawnLimit::new(1);
    let tasks = TaskRegistry::new().limit(limit.clone());
    let layers = ServiceBuilder::new().layer(requests.clone().plain());
    let service = layers.layer(TaskSetLayer::new(&tasks).plain()).service(service_fn(async |()| {
        assert_eq!(Level::current(), Level::Request);
        let set = TaskSet::current().unwrap();
        set.spawn("first", tokio::time::sleep(secs(1))).unwrap();
        set.spawn_within(secs(9), "second", async {}).await.map(drop).map_err(SpawnError::from)
    }));
    let start = Instant::now();
    service.oneshot(()).await.unwrap();
    assert!((secs(1)..secs(2)).contains(&start.elapsed()));
}

#[tokio::test(start_paused = true)]
async fn a_request_that_has_its_share_waits_for_its_own_tasks_alone() {
    let limit = SpawnLimit::new(4).per_request(2);
    let tasks = TaskRegistry::new().limit(limit.clone());
    let layer = TaskSetLayer::new(&tasks);
    let (greedy, modest) = (serve(&layer), serve(&layer));
    let own: Vec<_> = (0..2).map(|_| greedy.set.spawn("own", forever()).unwrap()).collect();
    let mut waiting = task::spawn(greedy.set.spawn_within(secs(9), "third", forever()));
    assert_pending!(waiting.poll());
    assert_eq!((limit.in_use(), limit.waiting()), (2, 0));

    // Nobody else is held up by it, and it is not helped by others.
    let others = modest.set.spawn("other", forever()).unwrap();
    others.cancel();
    assert!(matches!(others.await, Err(TaskError::Cancelled(Cause::Requested))));
    assert!(!waiting.is_woken());
    assert_eq!(greedy.set.spawn("fourth", forever()).unwrap_err().reason, SpawnError::Full);

    own[0].cancel();
    settle().await;
    assert!(waiting.is_woken());
    let third = assert_ready_ok!(waiting.poll());
    assert_eq!(greedy.set.spawn("fourth", forever()).unwrap_err().reason, SpawnError::Full);
    assert_eq!((limit.in_use(), greedy.set.len()), (2, 2));
    own[1].cancel();
    third.cancel();
    settle().await;
    // Now it counts otherwise, and all the same.
    for _ in 0..2 {
        greedy.set.spawn("again", forever()).unwrap();
    }
    assert_eq!(greedy.set.spawn("fourth", forever()).unwrap_err().reason, SpawnError::Full);
    greedy.set.cancel_all();
    settle().await;
    assert_eq!((limit.in_use(), limit.refused()), (0, 3));
    assert_ledger(&tasks, "refused 3, cancelled 6");
}

#[tokio::test(start_paused = true)]
async fn who_waits_for_its_share_gives_it_back_if_the_limit_is_then_full() {
    let limit = SpawnLimit::new(1).per_request(1);
    let (tasks, served) = limited(&limit);
    let own = served.set.spawn("own", forever()).unwrap();
    let mut waiting = task::spawn(served.set.spawn_within(secs(9), "waits", forever()));
    assert_pending!(waiting.poll());
    own.cancel();
    settle().await;
    assert!(waiting.is_woken(), "its share is free");
    let other = tasks.spawn("other", forever()).unwrap();
    assert_pending!(waiting.poll());
    assert_eq!(limit.waiting(), 1, "now for the limit");
    other.cancel();
    settle().await;
    assert_ready_ok!(waiting.poll());
    assert_eq!((limit.in_use(), served.set.len()), (1, 1));
    served.set.cancel_all();
    settle().await;
    assert_eq!(limit.in_use(), 0);
    assert_ledger(&tasks, "cancelled 3");
}

/// A set below these layers, and below the registry's limit.
fn below(layer: &SpawnLimitLayer, tasks: &TaskRegistry) -> Served<impl Body<Data = Bytes> + use<>> {
    serve_through(|handler| layer.layer(TaskSetLayer::new(tasks).layer(handler)))
}

#[tokio::test(start_paused = true)]
async fn a_task_takes_a_permit_of_each_limit_over_it_or_none() {
    let (process, service) = (SpawnLimit::new(3), SpawnLimit::new(2).per_request(1));
    let tasks = TaskRegistry::new().limit(process.clone());
    let layer = SpawnLimitLayer::new(service.clone());
    let (mut one, mut two) = (below(&layer, &tasks), below(&layer, &tasks));
    let spawn = |set: &TaskSet| {
        let set = set.clone();
        move || set.spawn("task", forever()).map_err(SpawnError::from)
    };
    let first = one.in_poll(spawn(&one.set)).unwrap();
    assert_eq!((process.in_use(), service.in_use()), (1, 1));
    assert!(matches!(one.in_poll(spawn(&one.set)), Err(SpawnError::Full)), "its share");
    assert_eq!((process.in_use(), service.in_use()), (1, 1));
    // Where no limits are current it is under those of where the set was made.
    assert!(matches!(spawn(&one.set)(), Err(SpawnError::Full)));
    let second = spawn(&two.set)().unwrap();
    assert_eq!((process.in_use(), service.in_use()), (2, 2));
    first.cancel();
    settle().await;
    assert_eq!((process.in_use(), service.in_use()), (1, 1));

    process.set_limit(1);
    assert!(matches!(one.in_poll(spawn(&one.set)), Err(SpawnError::Full)));
    assert_eq!((process.in_use(), service.in_use()), (1, 1), "nothing is taken of the other");
    let set = one.set.clone();
    let mut waiting =
        task::spawn(async move { set.spawn_within(secs(9), "waits", forever()).await });
    assert_pending!(waiting.poll());
    assert_eq!((process.waiting(), service.in_use()), (1, 1));
    second.cancel();
    settle().await;
    assert_ready_ok!(waiting.poll());
    assert_eq!((process.in_use(), service.in_use()), (1, 1));
    assert!(matches!(two.in_poll(spawn(&two.set)), Err(SpawnError::Full)));
    tasks.cancel_all();
    settle().await;
    assert_eq!((process.in_use(), service.in_use()), (0, 0));
    assert_eq!((process.refused(), service.refused()), (2, 2));
    assert_ledger(&tasks, "refused 4, cancelled 3");
}

#[tokio::test(start_paused = true)]
async fn the_same_limit_in_two_places_is_taken_once() {
    let limit = SpawnLimit::new(1);
    let tasks = TaskRegistry::new().limit(limit.clone());
    let layer = SpawnLimitLayer::new(limit.clone());
    let mut served = below(&layer, &tasks);
    let set = served.set.clone();
    let handle = served.in_poll(move || set.spawn("task", async {})).unwrap();
    assert_eq!(limit.in_use(), 1);
    assert_eq!(outcome(handle).await, COMPLETED);
    assert_eq!(limit.in_use(), 0);
}

#[tokio::test(start_paused = true)]
async fn what_a_task_spawns_is_under_the_limits_that_it_is_under() {
    let limit = SpawnLimit::new(3);
    let tasks = TaskRegistry::new();
    let mut served = below(&SpawnLimitLayer::new(limit.clone()), &tasks);
    let (set, registry) = (served.set.clone(), tasks.clone());
    let task = async move {
        assert_eq!(Level::current(), Level::Task);
        let own = set.spawn("child", forever()).unwrap();
        let child = spawn(forever()).unwrap();
        assert!(registry.spawn("of the registry", forever()).is_err());
        assert!(spawn(forever()).is_err());
        tokio::task::yield_now().await;
        assert!(spawn(forever()).is_err());
        child.abort();
        own.cancel();
    };
    let set = served.set.clone();
    let parent = served.in_poll(move || set.spawn("parent", task)).unwrap();
    assert_eq!(outcome(parent).await, COMPLETED);
    settle().await;
    assert_eq!((limit.in_use(), limit.refused()), (0, 3));
    assert_eq!(Level::current(), Level::Free);
    // Of the registry, below the layer.
    let registry = tasks.clone();
    served.in_poll(move || registry.spawn("of the registry", forever())).unwrap();
    assert_eq!(limit.in_use(), 1);
    tasks.cancel_all();
    settle().await;
    assert_eq!(limit.in_use(), 0);
}

type Work = Pin<Box<dyn Future<Output = ()> + Send>>;
type EndIt = fn(&TaskRegistry, tower_task_set::TaskHandle<()>);

#[tokio::test(start_paused = true)]
async fn a_permit_comes_back_once_however_a_task_ends() {
    let quiet =
        |f: fn()| -> Pin<Box<dyn Future<Output = ()> + Send>> { Box::pin(async move { f() }) };
    let on_drop = || OnDrop::new(|| panic!("in a destructor"));
    let ways: Vec<(&str, Work, EndIt)> = vec![
        ("completion", quiet(|| ()), |_, handle| drop(handle)),
        ("a panic", quiet(|| panic!("on purpose")), |_, handle| drop(handle)),
        ("a panic in a destructor", Box::pin(async move { drop(on_drop()) }), |_, handle| {
            drop(handle);
        }),
        ("cancellation", Box::pin(forever()), |_, handle| handle.cancel()),
        ("its abort handle", Box::pin(forever()), |_, handle| handle.cancel_handle().cancel()),
        ("the end of all", Box::pin(forever()), |tasks, _| tasks.cancel_all()),
        ("an abort of all", Box::pin(forever()), |tasks, _| tasks.abort_all()),
        ("a forgotten handle", quiet(|| ()), |_, handle| {
            leak(handle);
        }),
    ];
    for (way, future, end) in ways {
        let (process, service) = (SpawnLimit::new(1).per_request(1), SpawnLimit::new(1));
        let tasks = TaskRegistry::new().limit(process.clone());
        let mut served = below(&SpawnLimitLayer::new(service.clone()), &tasks);
        let set = served.set.clone();
        let handle = served.in_poll(move || set.spawn("task", future)).unwrap();
        assert_eq!((process.in_use(), service.in_use()), (1, 1), "{way}");
        end(&tasks, handle);
        settle().await;
        assert_eq!((process.in_use(), service.in_use()), (0, 0), "{way}");
        assert!(tasks.is_empty());
        // Not more than once: or this would let two in.
        let permits = (process.try_acquire().unwrap(), service.try_acquire().unwrap());
        assert!(process.try_acquire().is_err() && service.try_acquire().is_err(), "{way}");
        drop(permits);
    }
}

#[test]
fn a_permit_comes_back_from_a_runtime_that_is_gone() {
    let (process, service) = (SpawnLimit::new(1), SpawnLimit::new(1));
    let runtime = current_thread();
    let tasks = TaskRegistry::new().limit(process.clone());
    let mut served =
        runtime.block_on(async { below(&SpawnLimitLayer::new(service.clone()), &tasks) });
    let set = served.set.clone();
    let handle = served.in_poll(move || set.spawn("task", forever())).unwrap();
    assert_eq!((process.in_use(), service.in_use()), (1, 1));
    drop(runtime);
    assert_eq!((process.in_use(), service.in_use()), (0, 0));
    assert_eq!(yielded(now(handle)), Yield::Aborted(Cause::Shutdown));
    let set = served.set.clone();
    // Code of the set's own is taken to run on its runtime: accepted, and dropped at once.
    let late = served.in_poll(move || set.spawn("late", forever())).unwrap();
    assert_eq!(yielded(now(late)), Yield::Aborted(Cause::Shutdown));
    let late = served.set.spawn("late", forever());
    assert_eq!(late.unwrap_err().reason, SpawnError::NoRuntime);
    assert_eq!((process.in_use(), service.in_use()), (0, 0));
    let waits = pin!(served.set.spawn_within(secs(9), "waits", forever()));
    assert_eq!(now(waits).unwrap_err().reason, SpawnError::NoRuntime);
    assert_ledger(&tasks, "refused 2, aborted 2");
}

#[test]
fn a_closure_that_blocks_keeps_its_permit_until_it_has_returned() {
    let limit = SpawnLimit::new(1);
    let runtime = current_thread();
    let (tasks, served) = runtime.block_on(async { limited(&limit) });
    let (go, wait) = mpsc::channel::<()>();
    let (tell, started) = mpsc::channel();
    let handle = served.set.spawn_blocking("blocks", move |_| {
        tell.send(()).unwrap();
        let _ = wait.recv();
    });
    started.recv().unwrap();
    // Whoever gave up on it.
    drop(handle);
    served.end(End::Disconnected);
    tasks.cancel_all();
    runtime.shutdown_background();
    assert_eq!(limit.in_use(), 1);
    drop(go);
    while limit.in_use() > 0 {
        thread::yield_now();
    }
}

#[tokio::test(start_paused = true)]
async fn a_limit_that_was_lowered_below_what_is_in_use_lets_nobody_in_until_enough_have_gone() {
    let limit = SpawnLimit::new(3);
    let (tasks, served) = limited(&limit);
    let mut live: Vec<_> = (0..3).map(|_| served.set.spawn("live", forever()).unwrap()).collect();
    limit.set_limit(1);
    let mut waiting = task::spawn(served.set.spawn_within(secs(9), "waits", forever()));
    assert_pending!(waiting.poll());
    for left in [2, 1] {
        live.pop().unwrap().cancel();
        settle().await;
        assert_eq!((limit.in_use(), limit.limit(), limit.waiting()), (left, 1, 1));
        assert!(!waiting.is_woken());
        assert_eq!(served.set.spawn("late", forever()).unwrap_err().reason, SpawnError::Full);
    }
    live.pop().unwrap().cancel();
    settle().await;
    assert_ready_ok!(waiting.poll());
    assert_eq!((limit.in_use(), limit.waiting()), (1, 0));
    tasks.cancel_all();
    settle().await;
    assert_eq!(limit.in_use(), 0);
}
