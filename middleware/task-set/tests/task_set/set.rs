//! A request's set: where it is current, what it accepts and when, and its handles.

use std::{
    mem,
    pin::Pin,
    sync::{
        Arc, Barrier,
        atomic::{AtomicUsize, Ordering::SeqCst},
    },
    task::{Context, Poll},
    thread,
};

use bytes::Bytes;
use http::{Request, Response};
use http_body_util::Empty;
use tokio::sync::mpsc;
use tower::{Layer, Service, ServiceExt, service_fn};
use tower_task_set::{
    AtEnd, Cause, End, OnPanic, SpawnError, SpawnLimit, TaskHandle, TaskRegistry, TaskSet,
    TaskSetLayer, assert_drained,
};

use crate::support::*;

// Where it is current

#[tokio::test]
async fn the_set_is_current_in_the_handler_the_body_and_its_tasks() {
    let tasks = TaskRegistry::new();
    let dropped = Log::new();
    let log = dropped.clone();
    let body = Script::on_drop(move || log.push(TaskSet::current().map(|set| set.len())));
    let mut body = Some(body);
    let mut service = TaskSetLayer::new(&tasks).layer(service_fn(move |_: Request<()>| {
        // In the call, and in the future.
        TaskSet::current().unwrap().spawn("call", forever()).unwrap();
        let body = body.take().unwrap();
        async {
            let set = TaskSet::current().unwrap();
            assert_eq!(set.len(), 1);
            let task = set.spawn("task", async {
                let before = TaskSet::current().map(|set| set.len());
                tokio::task::yield_now().await;
                (before, TaskSet::current().map(|set| set.len()))
            });
            assert_eq!(task.unwrap().await.unwrap(), (Ok(2), Ok(2)));
            Ok::<_, Broken>(Response::new(body))
        }
    }));
    let response = service.call(Request::new(())).await.unwrap();
    drop(response);
    assert_eq!(dropped.take(), [Ok(1)]);
}

#[tokio::test]
async fn the_set_is_current_in_a_poll_of_the_body() {
    let tasks = TaskRegistry::new();
    let mut request = serve(&TaskSetLayer::new(&tasks));
    request.set.spawn("task", forever()).unwrap();
    assert_eq!(request.in_poll(|| TaskSet::current().map(|set| set.len())), Ok(1));
    assert!(TaskSet::current().is_err(), "and not outside of it");
}

#[tokio::test]
async fn two_requests_have_two_sets() {
    let tasks = TaskRegistry::new();
    let layer = TaskSetLayer::new(&tasks);
    let (first, second) = (serve(&layer), serve(&layer));
    first.set.spawn("task", forever()).unwrap();
    assert_eq!((first.set.len(), second.set.len(), tasks.len()), (1, 0, 1));
    assert!(!first.set.is_empty() && second.set.is_empty() && !tasks.is_empty());
}

#[test]
fn where_there_is_no_set_the_error_names_the_remedies() {
    let error = TaskSet::current().unwrap_err().to_string();
    for remedy in ["TaskSetLayer", "move a `TaskSet` in", "in_extensions", "the response is over"] {
        assert!(error.contains(remedy), "{remedy} is not in: {error}");
    }
}

#[tokio::test]
async fn a_bare_spawn_does_not_see_the_set_and_can_take_it_along() {
    let tasks = TaskRegistry::new();
    let request = serve(&TaskSetLayer::new(&tasks));
    let set = request.set.clone();
    let bare = tokio::spawn(async move {
        let current = TaskSet::current().is_ok();
        let handle = set.spawn("task", async { TaskSet::current().is_ok() }).unwrap();
        (current, handle.await.unwrap())
    });
    assert_eq!(bare.await.unwrap(), (false, true));
}

#[test]
fn a_set_cannot_be_asked_for_when_the_response_is_over_and_had_none() {
    let tasks = TaskRegistry::new();
    let seen = Log::new();
    let log = seen.clone();
    let mut body = Some(Script::on_drop(move || log.push(TaskSet::current().map(|set| set.len()))));
    let mut service = TaskSetLayer::new(&tasks).layer(service_fn(move |_: Request<()>| {
        let mut response = Response::new(body.take().unwrap());
        // Over when it is handed over.
        *response.status_mut() = http::StatusCode::NO_CONTENT;
        async { Ok::<_, Broken>(response) }
    }));
    drop(now(service.call(Request::new(()))).unwrap());
    assert!(matches!(seen.take()[..], [Err(_)]));
    assert_ledger(&tasks, "");
}

// Open, ended, cancelled

#[tokio::test]
async fn when_the_response_is_over_a_handle_outside_is_refused() {
    for end in ENDS {
        let tasks = TaskRegistry::new();
        let request = serve(&TaskSetLayer::new(&tasks).at_end(AtEnd::Keep));
        let set = request.set.clone();
        set.spawn("kept", forever()).unwrap();
        request.end(end);
        let refused = set.spawn("late", async { 7 }).unwrap_err();
        assert_eq!(refused.reason, SpawnError::Closed, "{end:?}");
        assert_eq!(refused.future.await, 7, "it comes back as it was");
        assert_ledger(&tasks, "refused 1, live 1");
    }
}

#[tokio::test]
async fn when_a_set_is_over_and_empty_a_refusal_is_still_counted() {
    let tasks = TaskRegistry::new();
    let request = serve(&TaskSetLayer::new(&tasks));
    let set = request.set.clone();
    set.spawn("task", async {}).unwrap().await.unwrap();
    request.end(End::Completed);
    for _ in 0..3 {
        assert_eq!(set.spawn("late", async {}).unwrap_err().reason, SpawnError::Closed);
    }
    assert_ledger(&tasks, "refused 3, completed 1");
    assert_eq!(tasks.snapshot().by_name["late"].refused, 3);
}

#[tokio::test]
async fn what_was_refused_can_ask_the_set_and_its_registry_when_it_is_dropped() {
    let tasks = TaskRegistry::new();
    let request = serve(&TaskSetLayer::new(&tasks));
    let set = request.set.clone();
    request.end(End::Completed);
    let asked = Flag::default();
    let on_drop = OnDrop::new({
        let (set, tasks, asked) = (set.clone(), tasks.clone(), asked.clone());
        move || {
            set.spawn("again", async {}).unwrap_err();
            let _ = (set.len(), tasks.snapshot(), tasks.len());
            asked.set();
        }
    });
    let refused = set.spawn("late", async move { drop(on_drop) }).unwrap_err();
    assert!(!asked.is_set(), "it was not dropped");
    drop(refused);
    assert!(asked.is_set());
    assert_ledger(&tasks, "refused 2");
}

#[tokio::test]
async fn when_the_response_is_over_a_task_that_may_run_may_spawn() {
    for (lifetime, end) in [(AtEnd::Drain(secs(9)), End::Disconnected), (AtEnd::Keep, End::Failed)]
    {
        let tasks = TaskRegistry::new();
        let request = serve(&TaskSetLayer::new(&tasks).at_end(lifetime));
        let (open, gate) = gate();
        let parent = request.set.spawn("parent", async {
            gate.await;
            let set = TaskSet::current().unwrap();
            let child = set.spawn("child", async { "done" }).unwrap();
            child.await.unwrap()
        });
        request.end(end);
        open.send(()).unwrap();
        assert_eq!(parent.unwrap().await.unwrap(), "done");
        assert_ledger(&tasks, "completed 2");
    }
}

#[tokio::test]
async fn a_task_of_another_set_is_outside() {
    let tasks = TaskRegistry::new();
    let layer = TaskSetLayer::new(&tasks);
    let (ended, other) = (serve(&layer), serve(&layer));
    let set = ended.set.clone();
    set.spawn("keeps it", forever()).unwrap();
    ended.end(End::Completed);
    let spawn = async move { set.spawn("late", async {}).unwrap_err().reason };
    assert_eq!(other.set.spawn("other", spawn).unwrap().await.unwrap(), SpawnError::Closed);
}

#[tokio::test]
async fn a_task_that_was_told_to_end_spawns_nothing_from_its_destructor() {
    let tasks = TaskRegistry::new();
    let request = serve(&TaskSetLayer::new(&tasks).at_end(AtEnd::Cancel));
    let (tell, mut told) = mpsc::unbounded_channel();
    let on_drop = OnDrop::new(move || {
        let set = TaskSet::current().unwrap();
        tell.send(set.spawn("child", async {}).map_err(|refused| refused.reason)).unwrap();
    });
    let parent = request.set.spawn("parent", async move {
        let _on_drop = on_drop;
        forever().await;
    });
    settle().await;
    request.end(End::Disconnected);
    assert_eq!(outcome(parent.unwrap()).await, Yield::Cancelled(Cause::Disconnected));
    assert_eq!(told.recv().await.unwrap().unwrap_err(), SpawnError::Closed);
    assert_ledger(&tasks, "refused 1, cancelled 1");
}

#[tokio::test]
async fn a_cancelled_set_accepts_nothing_from_anywhere() {
    let tasks = TaskRegistry::new();
    let mut request = serve(&TaskSetLayer::new(&tasks));
    let set = request.set.clone();
    let task = set.spawn("task", forever()).unwrap();
    settle().await;
    set.cancel_all();
    set.cancel_all();
    let inside = request.in_poll(|| {
        let set = TaskSet::current().unwrap();
        set.spawn("inside", async {}).unwrap_err().reason
    });
    assert_eq!(inside, SpawnError::Closed);
    assert_eq!(set.spawn("outside", async {}).unwrap_err().reason, SpawnError::Closed);
    assert_eq!(outcome(task).await, Yield::Cancelled(Cause::Requested));
    request.end(End::Completed);
    assert_ledger(&tasks, "refused 2, cancelled 1");
}

#[tokio::test]
async fn a_task_can_cancel_its_own_set() {
    let tasks = TaskRegistry::new();
    let request = serve(&TaskSetLayer::new(&tasks));
    let task = request.set.spawn("task", async {
        let set = TaskSet::current().unwrap();
        set.cancel_all();
        let child = set.spawn("child", async {}).unwrap_err().reason;
        assert_eq!(child, SpawnError::Closed);
        forever().await;
    });
    assert_eq!(outcome(task.unwrap()).await, Yield::Cancelled(Cause::Requested));
    assert_ledger(&tasks, "refused 1, cancelled 1");
}

#[test]
fn a_spawn_that_races_a_cancellation_is_cancelled_or_refused() {
    let runtime = multi_thread();
    let (mut accepted, mut refused) = (0, 0);
    for round in 0..400 {
        let tasks = TaskRegistry::new();
        let request = runtime.block_on(async { serve(&TaskSetLayer::new(&tasks)) });
        let start = Arc::new(Barrier::new(2));
        let (set, wait) = (request.set.clone(), start.clone());
        let spawner = thread::spawn(move || {
            wait.wait();
            (0..20).map(|_| set.spawn("task", forever())).collect::<Vec<_>>()
        });
        start.wait();
        // Both orders come up, whatever the scheduler does.
        for _ in 0..round * 10 {
            std::hint::spin_loop();
        }
        match round % 3 {
            0 => request.set.cancel_all(),
            1 => tasks.cancel_all(),
            _ => {
                request.set.at_end(AtEnd::Cancel);
                request.end(End::Disconnected);
            }
        }
        for spawned in spawner.join().unwrap() {
            match spawned {
                Ok(handle) => {
                    let yielded = runtime.block_on(outcome(handle));
                    assert!(matches!(yielded, Yield::Cancelled(_)), "{yielded:?}");
                    accepted += 1;
                }
                Err(error) => {
                    assert_eq!(error.reason, SpawnError::Closed);
                    refused += 1;
                }
            }
        }
        assert_drained(&tasks);
    }
    assert_eq!(accepted + refused, 8_000);
    assert!(accepted > 0 && refused > 0, "accepted {accepted}, refused {refused}");
}

#[tokio::test]
async fn children_without_end_end_with_their_set() {
    fn bomb(spawned: Arc<AtomicUsize>) -> Pin<Box<dyn Future<Output = ()> + Send>> {
        Box::pin(async move {
            let set = TaskSet::current().unwrap();
            loop {
                spawned.fetch_add(1, SeqCst);
                drop(set.spawn("bomb", bomb(spawned.clone())));
                tokio::task::yield_now().await;
            }
        })
    }

    let tasks = TaskRegistry::new().limit(SpawnLimit::new(500));
    let request = serve(&TaskSetLayer::new(&tasks).at_end(AtEnd::Cancel));
    let spawned = Arc::new(AtomicUsize::new(0));
    request.set.spawn("bomb", bomb(spawned.clone())).unwrap();
    while spawned.load(SeqCst) < 20_000 {
        tokio::task::yield_now().await;
        assert!(tasks.len() <= 500);
    }
    request.end(End::Disconnected);
    tasks.close();
    tasks.wait().await;
    let before = spawned.load(SeqCst);
    settle().await;
    assert_eq!(spawned.load(SeqCst), before, "none of them runs");
    let totals = tasks.snapshot().totals;
    assert_eq!(totals.attempted, 1 + u64::try_from(before).unwrap());
    assert_eq!((totals.cancelled, totals.live), (totals.spawned, 0));
    assert!(totals.is_exact());
}

#[tokio::test]
async fn a_long_line_of_children_of_children_is_no_deeper_than_one() {
    fn child(
        left: u32,
        done: mpsc::UnboundedSender<()>,
    ) -> Pin<Box<dyn Future<Output = ()> + Send>> {
        Box::pin(async move {
            match left.checked_sub(1) {
                None => done.send(()).unwrap(),
                Some(left) => {
                    TaskSet::current().unwrap().spawn("child", child(left, done)).unwrap();
                }
            }
        })
    }

    let tasks = TaskRegistry::new();
    let request = serve(&TaskSetLayer::new(&tasks));
    let (tell, mut done) = mpsc::unbounded_channel();
    request.set.spawn("child", child(100_000, tell)).unwrap();
    done.recv().await.unwrap();
    tasks.close();
    tasks.wait().await;
    assert_ledger(&tasks, "completed 100001");
}

// Spawning in a destructor

#[tokio::test]
async fn a_destructor_of_whatever_the_request_is_made_of_can_spawn() {
    let tasks = TaskRegistry::new();
    let spawn = |name| {
        OnDrop::new(move || {
            TaskSet::current().unwrap().spawn(name, async {}).unwrap();
        })
    };
    let refused = Log::new();
    let log = refused.clone();
    let mut body = Some(Script::on_drop(move || {
        let late = TaskSet::current().unwrap().spawn("body", async { 5 }).unwrap_err();
        log.push((late.reason, now(late.future)));
    }));
    let mut service = TaskSetLayer::new(&tasks).layer(service_fn(move |_: Request<()>| {
        let (in_call, in_future) = (spawn("call"), spawn("future"));
        drop(in_call);
        let body = body.take();
        async move {
            let _in_future = in_future;
            let in_task = spawn("task");
            TaskSet::current().unwrap().spawn("parent", async move { drop(in_task) }).unwrap();
            Ok::<_, Broken>(Response::new(body.unwrap()))
        }
    }));
    let response = service.call(Request::new(())).await.unwrap();
    settle().await;
    let by_name = tasks.snapshot().by_name;
    for name in ["call", "future", "parent", "task"] {
        assert_eq!(by_name[name].completed, 1, "{name}");
    }
    // The response is over when its body is dropped.
    drop(response);
    assert_eq!(refused.take(), [(SpawnError::Closed, 5)]);
    assert_ledger(&tasks, "refused 1, completed 4");
}

#[tokio::test]
async fn the_destructor_of_a_response_future_that_was_given_up_comes_too_late_to_spawn() {
    for asked_before in [false, true] {
        let tasks = TaskRegistry::new();
        let seen = Log::new();
        let service = TaskSetLayer::new(&tasks).layer(service_fn(|_: Request<()>| {
            let log = seen.clone();
            async move {
                let _set = asked_before.then(TaskSet::current);
                let _on_drop = OnDrop::new(move || {
                    let set = TaskSet::current().ok();
                    let spawn = |set: TaskSet| set.spawn("farewell", async {}).unwrap_err().reason;
                    log.push(set.map(spawn));
                });
                forever().await;
                Ok::<_, Broken>(Response::new(Empty::<Bytes>::new()))
            }
        }));
        let mut response = Box::pin(service.oneshot(Request::new(())));
        assert!(poll_once(response.as_mut()).is_pending());
        drop(response);
        assert_eq!(seen.take(), [asked_before.then_some(SpawnError::Closed)]);
        assert_ledger(&tasks, if asked_before { "refused 1" } else { "" });
    }
}

// Handles

#[tokio::test]
async fn dropping_a_handle_changes_nothing() {
    let tasks = TaskRegistry::new();
    let request = serve(&TaskSetLayer::new(&tasks));
    let (open, gate) = gate();
    drop(request.set.spawn("task", gate).unwrap());
    settle().await;
    assert_eq!(request.set.len(), 1);
    open.send(()).unwrap();
    settle().await;
    assert_ledger(&tasks, "completed 1");
}

#[tokio::test]
async fn dropping_sets_layers_and_registries_changes_nothing() {
    let tasks = TaskRegistry::new();
    let layer = TaskSetLayer::new(&tasks);
    let mut request = serve(&layer);
    let (open, gate) = gate();
    let task = request.set.spawn("task", gate).unwrap();
    drop((layer, tasks));
    request.in_poll(|| drop(TaskSet::current()));
    open.send(()).unwrap();
    assert_eq!(outcome(task).await, COMPLETED);
}

#[tokio::test]
async fn what_is_leaked_harms_nobody() {
    let tasks = TaskRegistry::new().limit(SpawnLimit::new(2));
    let layer = TaskSetLayer::new(&tasks).at_end(AtEnd::Cancel);
    let request = serve(&layer);
    leak(request.set.clone());
    leak(request.set.spawn("leaked handle", forever()).unwrap());
    let leaked_hold = serve(&layer);
    leak(leaked_hold.set.hold());
    leaked_hold.set.spawn("leaked hold", forever()).unwrap();
    request.end(End::Completed);
    leaked_hold.end(End::Completed);
    settle().await;
    assert_ledger(&tasks, "live 1, cancelled 1");
    // The hold keeps its set open for ever; the end of the process ends it.
    tasks.close();
    tasks.cancel_all();
    tasks.wait().await;
    assert_ledger(&tasks, "cancelled 2");
}

#[tokio::test]
async fn a_handle_tells_about_its_task() {
    let tasks = TaskRegistry::new();
    let request = serve(&TaskSetLayer::new(&tasks));
    let (open, gate) = gate();
    let task = request.set.spawn("task", gate).unwrap();
    let other = request.set.spawn("other", forever()).unwrap();
    let cancel = task.cancel_handle();
    assert_eq!(task.id(), cancel.id());
    assert_ne!(task.id(), other.id());
    assert!(!task.is_finished() && !cancel.is_finished());
    assert_eq!(
        format!("{task:?}"),
        format!("TaskHandle {{ id: {:?}, is_finished: false }}", task.id()),
    );
    open.send(()).unwrap();
    settle().await;
    assert!(task.is_finished() && cancel.is_finished());
    assert_eq!(
        format!("{cancel:?}"),
        format!("CancelHandle {{ id: {:?}, is_finished: true }}", task.id()),
    );
    assert_eq!(outcome(task).await, COMPLETED);
}

#[tokio::test]
async fn cancelling_by_a_handle_ends_this_task_alone() {
    let tasks = TaskRegistry::new();
    let request = serve(&TaskSetLayer::new(&tasks));
    let spawn = || request.set.spawn("task", forever()).unwrap();
    let (by_handle, by_cancel_handle, other) = (spawn(), spawn(), spawn());
    settle().await;
    by_handle.cancel();
    by_handle.cancel();
    let cancel = by_cancel_handle.cancel_handle();
    cancel.clone().cancel();
    assert_eq!(outcome(by_handle).await, Yield::Cancelled(Cause::Requested));
    assert_eq!(outcome(by_cancel_handle).await, Yield::Cancelled(Cause::Requested));
    settle().await;
    assert!(cancel.is_finished() && !other.is_finished());
    assert_ledger(&tasks, "live 1, cancelled 2");
}

#[tokio::test]
async fn a_handle_of_a_task_that_is_over_does_not_cancel_the_next_in_its_place() {
    let tasks = TaskRegistry::new();
    let request = serve(&TaskSetLayer::new(&tasks));
    let first = request.set.spawn("first", async {}).unwrap();
    settle().await;
    let (open, gate) = gate();
    let second = request.set.spawn("second", gate).unwrap();
    settle().await;
    first.cancel();
    first.cancel_handle().cancel();
    settle().await;
    assert!(!second.is_finished());
    open.send(()).unwrap();
    assert_eq!(outcome(second).await, COMPLETED);
    assert_eq!(outcome(first).await, COMPLETED);
}

#[tokio::test]
async fn nor_does_it_when_as_many_have_been_there_as_can_be_told_apart() {
    let tasks = TaskRegistry::new();
    let request = serve(&TaskSetLayer::new(&tasks));
    let first = request.set.spawn("first", async {}).unwrap();
    let cancel = first.cancel_handle();
    first.await.unwrap();
    for _ in 1..=u16::MAX {
        request.set.spawn("next", async {}).unwrap().await.unwrap();
    }
    let last = request.set.spawn("last", forever()).unwrap();
    settle().await;
    cancel.cancel();
    settle().await;
    assert!(!last.is_finished());
}

#[tokio::test]
async fn cancelling_a_task_that_is_over_does_not_undo_its_result() {
    let tasks = TaskRegistry::new();
    let request = serve(&TaskSetLayer::new(&tasks));
    let task = request.set.spawn("task", async { 5 }).unwrap();
    settle().await;
    task.cancel();
    request.set.cancel_all();
    tasks.cancel_all();
    assert_eq!(outcome(task).await, Yield::Completed(5));
    assert_ledger(&tasks, "completed 1");
}

#[tokio::test]
async fn a_handle_can_be_polled_in_a_select_and_again() {
    let tasks = TaskRegistry::new();
    let request = serve(&TaskSetLayer::new(&tasks));
    let (open, gate) = gate();
    let mut task = request.set.spawn("task", gate).unwrap();
    tokio::select! {
        biased;
        _ = &mut task => panic!("it waits at the gate"),
        () = settle() => {}
    }
    open.send(()).unwrap();
    assert_eq!(outcome(task).await, COMPLETED);
}

#[test]
fn the_types_can_go_to_any_thread() {
    fn any_thread<T: Send + Sync + 'static>() {}
    any_thread::<TaskSet>();
    any_thread::<TaskRegistry>();
    any_thread::<TaskSetLayer>();
    any_thread::<TaskHandle<u8>>();
    any_thread::<tower_task_set::CancelHandle>();
    any_thread::<tower_task_set::Hold>();
    any_thread::<tower_task_set::TaskError>();
    any_thread::<tower_task_set::Snapshot>();
}

// Limits

#[tokio::test]
async fn a_full_limit_refuses_and_hands_the_future_back() {
    let limit = SpawnLimit::new(2);
    let tasks = TaskRegistry::new().limit(limit.clone());
    let layer = TaskSetLayer::new(&tasks);
    let (one, other) = (serve(&layer), serve(&layer));
    let (open, gate) = gate();
    let first = one.set.spawn("task", gate).unwrap();
    other.set.spawn("task", forever()).unwrap();
    for set in [&one.set, &other.set] {
        let refused = set.spawn("task", async { "in place" }).unwrap_err();
        assert_eq!(refused.reason, SpawnError::Full);
        assert_eq!(refused.future.await, "in place");
    }
    assert_eq!(tasks.spawn("task", async {}).unwrap_err().reason, SpawnError::Full);
    assert_eq!(limit.in_use(), 2);
    open.send(()).unwrap();
    first.await.unwrap();
    assert_eq!(limit.in_use(), 1);
    one.set.spawn("task", forever()).unwrap();
    assert_ledger(&tasks, "refused 3, live 2, completed 1");
}

#[tokio::test]
async fn one_request_cannot_take_more_than_its_share() {
    let limit = SpawnLimit::new(5).per_request(2);
    let tasks = TaskRegistry::new().limit(limit.clone());
    let layer = TaskSetLayer::new(&tasks);
    let (one, other) = (serve(&layer), serve(&layer));
    let first = one.set.spawn("task", forever()).unwrap();
    one.set.spawn("task", forever()).unwrap();
    assert_eq!(one.set.spawn("task", async {}).unwrap_err().reason, SpawnError::Full);
    assert_eq!(limit.in_use(), 2, "a refusal keeps nothing");
    other.set.spawn("task", forever()).unwrap();
    // What belongs to no request has no share.
    for _ in 0..2 {
        tasks.spawn("task", forever()).unwrap();
    }
    assert_eq!(tasks.spawn("task", async {}).unwrap_err().reason, SpawnError::Full);
    first.cancel();
    outcome(first).await;
    one.set.spawn("task", forever()).unwrap();
    assert_ledger(&tasks, "refused 2, live 5, cancelled 1");
}

#[tokio::test]
async fn a_limit_of_none_refuses_all() {
    for limit in [SpawnLimit::new(0), SpawnLimit::new(9).per_request(0)] {
        let tasks = TaskRegistry::new().limit(limit);
        let request = serve(&TaskSetLayer::new(&tasks));
        assert_eq!(request.set.spawn("task", async {}).unwrap_err().reason, SpawnError::Full);
        assert_ledger(&tasks, "refused 1");
    }
}

#[tokio::test]
async fn a_task_that_holds_a_permit_is_refused_like_anybody_when_the_limit_is_full() {
    // Nothing waits, so nobody can wait for himself.
    let tasks = TaskRegistry::new().limit(SpawnLimit::new(1));
    let request = serve(&TaskSetLayer::new(&tasks));
    let parent = request.set.spawn("parent", async {
        let child = TaskSet::current().unwrap().spawn("child", async { 3 });
        child.unwrap_err().future.await
    });
    assert_eq!(parent.unwrap().await.unwrap(), 3);
    assert_ledger(&tasks, "refused 1, completed 1");
}

#[tokio::test]
async fn a_refusal_does_not_wait_for_the_end_of_the_request() {
    let tasks = TaskRegistry::new().limit(SpawnLimit::new(1));
    let request = serve(&TaskSetLayer::new(&tasks));
    let set = request.set.clone();
    set.spawn("task", forever()).unwrap();
    // A call, not a future: it has its answer here, while the response goes on and after it.
    assert_eq!(set.spawn("task", async {}).unwrap_err().reason, SpawnError::Full);
    request.end(End::Completed);
    assert_eq!(set.spawn("task", async {}).unwrap_err().reason, SpawnError::Closed);
}

// Sizes

#[test]
#[expect(clippy::large_stack_arrays, clippy::large_futures)] // Just that.
fn a_future_of_a_mebibyte_is_spawned_or_comes_back_whole() {
    let big = thread::Builder::new().stack_size(64 << 20).spawn(|| {
        current_thread().block_on(async {
            let tasks = TaskRegistry::new().limit(SpawnLimit::new(1));
            let request = serve(&TaskSetLayer::new(&tasks));
            let sum = || {
                let bytes = [1_u8; 1 << 20];
                async move {
                    tokio::task::yield_now().await;
                    bytes.iter().map(|byte| u32::from(*byte)).sum::<u32>()
                }
            };
            let task = request.set.spawn("big", sum()).unwrap();
            let refused = request.set.spawn("big", sum()).unwrap_err();
            assert_eq!(task.await.unwrap(), 1 << 20);
            assert_eq!(refused.future.await, 1 << 20);
        });
    });
    big.unwrap().join().unwrap();
}

#[test]
fn a_long_line_of_tasks_that_own_each_others_handles_is_dropped_one_by_one() {
    let runtime = current_thread();
    let tasks = TaskRegistry::new();
    runtime.block_on(async {
        let mut last: Option<TaskHandle<()>> = None;
        for _ in 0..100_000 {
            let before = last.take();
            let task = tasks.spawn("task", async move {
                let _before = before;
                forever().await;
            });
            last = Some(task.unwrap());
        }
        settle().await;
    });
    drop(runtime);
    assert_ledger(&tasks, "aborted 100000");
}

/// Polls the task's future a given number of times: nothing of it is polled again when it is ready.
#[tokio::test]
async fn a_future_is_not_polled_again_when_it_is_ready() {
    struct Once(bool);
    impl Future for Once {
        type Output = ();
        fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
            assert!(!mem::replace(&mut self.0, true), "polled again");
            // A wake-up that comes too late.
            cx.waker().wake_by_ref();
            Poll::Ready(())
        }
    }
    let tasks = TaskRegistry::new();
    let task = tasks.spawn("task", Once(false)).unwrap();
    settle().await;
    assert_eq!(outcome(task).await, COMPLETED);
}

// And of the next request, nothing

#[tokio::test]
async fn what_is_chosen_on_a_handle_after_the_end_is_not_for_the_next_request() {
    let tasks = TaskRegistry::new();
    let layer = TaskSetLayer::new(&tasks);
    let request = serve(&layer);
    let stray = request.set.clone();
    request.end(End::Completed);
    stray.at_end(AtEnd::Cancel);
    stray.on_panic(OnPanic::FailResponse);
    drop(stray);
    // It drains by default, and fails no response.
    let mut request = serve(&layer);
    let set = request.set.clone();
    let panics = set.spawn("panics", async { panic!("on purpose") }).unwrap();
    let drains = set.spawn("drains", tokio::task::yield_now()).unwrap();
    assert_eq!(outcome::<()>(panics).await, Yield::Panicked("on purpose".to_owned()));
    request.in_poll(|| {});
    request.end(End::Completed);
    assert_eq!(outcome(drains).await, COMPLETED);
}
