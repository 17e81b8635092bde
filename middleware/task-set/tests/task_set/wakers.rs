//! Wakers are the code of others. One that panics hurts nobody but who gave it, and who waits for the
//! same beside it: of those the runtime's lists of waiters wake no more.

use std::{
    pin::{Pin, pin},
    sync::{Arc, mpsc},
    task::{Context, Wake, Waker},
};

use tokio_test::assert_ready;
use tower_task_set::{
    AtEnd, Cause, End, OnPanic, SpawnError, SpawnLimit, TaskRegistry, TaskSetLayer,
};

use crate::support::*;

/// Gives a waker that panics, to what then awaits.
fn wait_badly<F: Future>(future: Pin<&mut F>) {
    assert!(future.poll(&mut Context::from_waker(&bad_waker())).is_pending());
}

fn bad_waker() -> Waker {
    struct Panics;
    impl Wake for Panics {
        fn wake(self: Arc<Self>) {
            panic!("the waker panics");
        }
    }
    Arc::new(Panics).into()
}

#[tokio::test]
async fn that_of_one_who_waits_for_a_permit_loses_no_task_that_gives_one_back() {
    let tasks = TaskRegistry::new().limit(SpawnLimit::new(1));
    let (open, gate) = gate();
    let first = tasks.spawn("first", gate).unwrap();
    let mut second = pin!(tasks.spawn_within(secs(10), "second", async {}));
    wait_badly(second.as_mut());
    open.send(()).unwrap();
    assert_eq!(outcome(first).await, COMPLETED);
    assert_ledger(&tasks, "completed 1");
    // The permit has come.
    let second = assert_ready!(poll_once(second)).unwrap();
    assert_eq!(outcome(second).await, COMPLETED);
    assert_ledger(&tasks, "completed 2");
}

#[tokio::test]
async fn that_of_one_who_waits_for_its_share_loses_no_task_that_gives_one_back() {
    let tasks = TaskRegistry::new().limit(SpawnLimit::new(10).per_request(1));
    let request = serve(&TaskSetLayer::new(&tasks));
    let (open, gate) = gate();
    let set = request.set.clone();
    let first = set.spawn("first", gate).unwrap();
    let mut second = pin!(set.spawn_within(secs(10), "second", async {}));
    wait_badly(second.as_mut());
    open.send(()).unwrap();
    assert_eq!(outcome(first).await, COMPLETED);
    let second = assert_ready!(poll_once(second)).unwrap();
    assert_eq!(outcome(second).await, COMPLETED);
    request.end(End::Completed);
    assert_ledger(&tasks, "completed 2");
}

#[tokio::test]
async fn that_of_one_who_waits_for_the_last_task_leaves_nothing_of_its_set() {
    let tasks = TaskRegistry::new();
    let (open, gate) = gate();
    let task = tasks.spawn("task", gate).unwrap();
    let mut idle = pin!(tasks.idle());
    wait_badly(idle.as_mut());
    open.send(()).unwrap();
    assert_eq!(outcome(task).await, COMPLETED);
    assert_ready!(poll_once(idle));
    // Another set has taken its place.
    assert_eq!(outcome(tasks.spawn("next", async {}).unwrap()).await, COMPLETED);
    let mut wait = pin!(tasks.wait());
    wait_badly(wait.as_mut());
    tasks.close();
    assert_ready!(poll_once(wait));
    assert_ledger(&tasks, "completed 2");
}

#[tokio::test]
async fn that_of_a_response_which_a_panic_fails_is_not_the_tasks_end() {
    let tasks = TaskRegistry::new();
    let mut request = serve(&TaskSetLayer::new(&tasks).on_panic(OnPanic::FailResponse));
    let (open, gate) = gate();
    let task = request.set.spawn("task", async {
        gate.await;
        panic!("it hurts")
    });
    settle().await;
    request.wait(&bad_waker());
    open.send(()).unwrap();
    assert_eq!(outcome::<()>(task.unwrap()).await, Yield::Panicked("it hurts".to_owned()));
    request.end(End::Disconnected);
    assert_ledger(&tasks, "panicked 1");
}

#[tokio::test]
async fn that_of_one_who_watches_a_token_keeps_no_other_from_being_told() {
    let tasks = TaskRegistry::new();
    let request = serve(&TaskSetLayer::new(&tasks).at_end(AtEnd::Cancel));
    let (tell, told) = mpsc::channel();
    let graceful = request.set.spawn_graceful("graceful", move |stop| async move {
        tell.send((stop.clone(), stop.cancellation_token())).unwrap();
        stop.cancelled().await
    });
    let other = request.set.spawn("other", forever()).unwrap();
    settle().await;
    let (stop, token) = told.recv().unwrap();
    let (mut stopped, mut cancelled) = (pin!(stop.cancelled()), pin!(token.cancelled()));
    wait_badly(stopped.as_mut());
    wait_badly(cancelled.as_mut());
    request.end(End::Disconnected);
    assert_eq!(outcome(graceful.unwrap()).await, Yield::Completed(Cause::Disconnected));
    assert_eq!(outcome(other).await, Yield::Cancelled(Cause::Disconnected));
    assert_ready!(poll_once(cancelled));
    assert_ledger(&tasks, "completed 1, cancelled 1");
}

#[tokio::test]
async fn that_of_one_who_waits_to_spawn_does_not_reach_who_ends_its_request() {
    for cancel in [false, true] {
        let tasks = TaskRegistry::new().limit(SpawnLimit::new(1));
        let request = serve(&TaskSetLayer::new(&tasks).at_end(AtEnd::Cancel));
        let set = request.set.clone();
        let task = set.spawn("task", forever()).unwrap();
        settle().await;
        let mut late = pin!(set.spawn_within(secs(10), "late", forever()));
        wait_badly(late.as_mut());
        if cancel {
            set.cancel_all();
        }
        request.end(End::Disconnected);
        assert_eq!(assert_ready!(poll_once(late)).unwrap_err().reason, SpawnError::Closed);
        let cause = if cancel { Cause::Requested } else { Cause::Disconnected };
        assert_eq!(outcome(task).await, Yield::Cancelled(cause));
        assert_ledger(&tasks, "refused 1, cancelled 1");
    }
}

#[tokio::test]
async fn those_of_who_waits_for_a_group_keep_none_of_its_tasks_from_being_told() {
    let tasks = TaskRegistry::new();
    let group = tasks.group().limit(2);
    let handle = group.handle();
    let both = ["one", "other"].map(|name| group.spawn(name, forever()).unwrap());
    settle().await;
    let mut late = pin!(handle.task("late").within(secs(10)).spawn(forever()));
    wait_badly(late.as_mut());
    {
        let mut wait = pin!(group.wait());
        wait_badly(wait.as_mut());
        handle.cancel_all();
        for task in both {
            assert_eq!(outcome(task).await, Yield::Cancelled(Cause::Requested));
        }
        assert_ready!(poll_once(wait));
    }
    assert_eq!(assert_ready!(poll_once(late)).unwrap_err().reason, SpawnError::Closed);
    assert_ledger(&tasks, "refused 1, cancelled 2");
}
