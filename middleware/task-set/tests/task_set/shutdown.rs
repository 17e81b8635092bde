//! What the ledger says of tasks that a shutdown has ended, and who may spawn during a drain.

use std::{sync::mpsc, time::Duration};

use tower_request_context::{RequestContext, TraceId};
use tower_task_set::{
    AtEnd, End, Outcome, SpawnError, TaskRegistry, TaskSet, TaskSetLayer, assert_drained,
};

use crate::support::*;

fn trace_id() -> TraceId {
    "0af7651916cd43dd8448eb211c80319c".parse().unwrap()
}

/// Names and outcomes, in order of the names.
fn forced(tasks: &TaskRegistry) -> Vec<(&'static str, Outcome)> {
    let mut forced: Vec<_> =
        tasks.snapshot().forced_tasks.iter().map(|task| (task.name, task.outcome)).collect();
    forced.sort_unstable_by_key(|(name, _)| *name);
    forced
}

#[tokio::test(start_paused = true)]
async fn what_a_shutdown_has_ended_is_listed_by_name_site_age_and_trace_id() {
    let tasks = TaskRegistry::new();
    let layer = TaskSetLayer::new(&tasks);
    let context = RequestContext::new().with(trace_id());
    let served = context.sync_scope(|| serve(&layer));
    let line = line!() + 1;
    served.set.spawn("in_request", forever()).unwrap();
    tasks.spawn("own", forever()).unwrap();
    settle().await;
    tokio::time::advance(secs(3)).await;
    assert!(forced(&tasks).is_empty());
    tasks.close();
    tasks.cancel_all();
    tasks.wait().await;

    let check = || {
        let mut listed = tasks.snapshot().forced_tasks;
        listed.sort_unstable_by_key(|task| task.name);
        let [task, own] = &listed[..] else { panic!("{listed:?}") };
        assert_eq!((task.name, task.outcome), ("in_request", Outcome::Cancelled));
        assert_eq!((task.site.file(), task.site.line()), (file!(), line));
        assert_eq!((task.age, task.trace_id), (secs(3), Some(trace_id())));
        assert_eq!((own.name, own.outcome, own.trace_id), ("own", Outcome::Cancelled, None));
    };
    // Of the set, and then, when that is over, of the ledger.
    check();
    served.end(End::Completed);
    check();
    assert_ledger(&tasks, "cancelled 2");
}

#[tokio::test(start_paused = true)]
async fn what_something_else_has_told_to_end_was_not_forced() {
    let tasks = TaskRegistry::new().at_end(AtEnd::Cancel);
    let layer = TaskSetLayer::new(&tasks);
    let ended = serve(&layer);
    ended.set.spawn("a response that ended", forever()).unwrap();
    let own = tasks.spawn("its handle", forever()).unwrap();
    let served = serve(&layer);
    served.set.spawn("its set", forever()).unwrap();
    tasks.task("its own time").timeout(secs(1)).spawn(forever()).unwrap();
    let drained = serve(&layer);
    let drain = drained.set.task("its drain").at_end(AtEnd::Drain(secs(1)));
    drain.spawn(forever()).unwrap();
    settle().await;
    drained.end(End::Completed);
    settle().await;
    tokio::time::sleep(secs(3)).await;
    // Told, and not gone yet when the shutdown comes.
    ended.end(End::Completed);
    own.cancel();
    served.set.cancel_all();
    tasks.close();
    tasks.cancel_all();
    tasks.abort_all();
    tasks.wait().await;
    assert_eq!(forced(&tasks), []);
    assert_ledger(&tasks, "cancelled 4, timed out 1");
}

#[tokio::test(start_paused = true)]
async fn what_is_told_something_else_after_a_shutdown_was_forced() {
    let tasks = TaskRegistry::new().at_end(AtEnd::Cancel);
    let layer = TaskSetLayer::new(&tasks);
    let served = serve(&layer);
    served.set.spawn("its response ends", forever()).unwrap();
    let other = serve(&layer);
    let cancelled = other.set.spawn("its handle", forever()).unwrap();
    let own = other.set.task("its own lifetime").at_end(AtEnd::Keep).spawn(forever()).unwrap();
    settle().await;
    tasks.cancel_all();
    served.end(End::Completed);
    cancelled.cancel();
    own.cancel();
    other.set.cancel_all();
    tasks.close();
    tasks.wait().await;
    let cancelled = Outcome::Cancelled;
    assert_eq!(
        forced(&tasks),
        [
            ("its handle", cancelled),
            ("its own lifetime", cancelled),
            ("its response ends", cancelled)
        ]
    );
    other.end(End::Completed);
    assert_eq!(forced(&tasks).len(), 3);
}

#[tokio::test(start_paused = true)]
async fn what_was_told_to_end_while_the_registry_was_open_was_not_forced() {
    let tasks = TaskRegistry::new();
    let served = serve(&TaskSetLayer::new(&tasks));
    served.set.spawn("in a request", forever()).unwrap();
    tasks.spawn("own", forever()).unwrap();
    tasks.cancel_all();
    tasks.idle().await;
    served.end(End::Completed);
    assert_eq!(forced(&tasks), []);
    tasks.spawn("own", forever()).unwrap();
    tasks.close();
    tasks.cancel_all();
    tasks.wait().await;
    assert_eq!(forced(&tasks), [("own", Outcome::Cancelled)]);
    assert_ledger(&tasks, "cancelled 3");
}

#[tokio::test(start_paused = true)]
async fn of_graceful_tasks_those_were_forced_whose_grace_was_over() {
    let tasks = TaskRegistry::new();
    let cooperates = tasks.spawn_graceful("cooperates", |stop| async move {
        stop.cancelled().await;
        tokio::time::sleep(secs(1)).await;
    });
    tasks
        .spawn_graceful("panics", |stop| async move {
            stop.cancelled().await;
            panic!("of its own");
        })
        .unwrap();
    tasks.spawn_graceful("goes on", |_| forever()).unwrap();
    tasks.task("is cut off").grace(Duration::MAX).spawn_graceful(|_| forever()).unwrap();
    settle().await;
    tasks.close();
    tasks.cancel_all();
    cooperates.unwrap().await.unwrap();
    tokio::time::sleep(secs(60)).await;
    assert_eq!(forced(&tasks), [("goes on", Outcome::Aborted)]);
    tasks.abort_all();
    tasks.wait().await;
    let aborted = Outcome::Aborted;
    assert_eq!(forced(&tasks), [("goes on", aborted), ("is cut off", aborted)]);
    assert_ledger(&tasks, "completed 1, aborted 2, panicked 1");
}

#[tokio::test(start_paused = true)]
async fn a_graceful_task_that_something_else_has_told_was_forced_if_a_shutdown_cuts_its_grace() {
    let tasks = TaskRegistry::new().at_end(AtEnd::Cancel).grace(secs(9));
    let served = serve(&TaskSetLayer::new(&tasks));
    let set = &served.set;
    set.spawn_graceful("its response", |_| forever()).unwrap();
    let handle = set.spawn_graceful("its handle", |_| forever()).unwrap();
    let over = set.task("has had its grace").grace(secs(1));
    over.spawn_graceful(|_| forever()).unwrap();
    let timeout = set.task("its own time").timeout(secs(1));
    timeout.spawn_graceful(|_| forever()).unwrap();
    settle().await;
    handle.cancel();
    tokio::time::sleep(secs(2)).await;
    served.end(End::Completed);
    tokio::time::sleep(secs(2)).await;
    tasks.close();
    tasks.cancel_all();
    settle().await;
    assert_eq!(forced(&tasks), []);
    tasks.abort_all();
    tasks.wait().await;
    let aborted = Outcome::Aborted;
    assert_eq!(forced(&tasks), [("its handle", aborted), ("its response", aborted)]);
    assert_ledger(&tasks, "aborted 3, timed out 1");
}

#[tokio::test]
async fn a_destructor_that_panics_when_a_shutdown_drops_its_task_hides_nothing() {
    struct Panics;
    impl Drop for Panics {
        fn drop(&mut self) {
            panic!("in drop");
        }
    }
    let tasks = TaskRegistry::new();
    let panics = Panics;
    tasks
        .spawn("panics in drop", async move {
            let _panics = panics;
            forever().await;
        })
        .unwrap();
    settle().await;
    tasks.close();
    tasks.cancel_all();
    tasks.wait().await;
    assert_eq!(forced(&tasks), [("panics in drop", Outcome::Panicked)]);
}

#[tokio::test]
async fn what_comes_to_its_end_though_it_was_told_was_not_forced() {
    let tasks = TaskRegistry::new();
    let (running, runs) = mpsc::channel();
    let (release, released) = mpsc::channel::<()>();
    let blocking = tasks.spawn_blocking("blocks", move |_| {
        running.send(()).unwrap();
        released.recv().unwrap();
    });
    runs.recv().unwrap();
    tasks.close();
    tasks.cancel_all();
    tasks.abort_all();
    let snapshot = tasks.snapshot();
    assert_eq!((snapshot.live_tasks.len(), snapshot.forced_tasks.len()), (1, 0));
    release.send(()).unwrap();
    blocking.unwrap().await.unwrap();
    tasks.wait().await;
    assert_eq!(forced(&tasks), []);
    assert_ledger(&tasks, "completed 1");
}

#[tokio::test]
async fn in_a_drain_requests_and_their_tasks_may_spawn_and_nobody_else() {
    let tasks = TaskRegistry::new();
    let layer = TaskSetLayer::new(&tasks);
    let mut request = serve(&layer);
    let (open, gate) = gate();
    let own = tasks
        .spawn("own", async {
            gate.await;
            TaskSet::current().unwrap().spawn("child of own", async {}).unwrap_err().reason
        })
        .unwrap();
    tasks.begin_drain();
    tasks.begin_drain();
    assert!(!tasks.is_closed());
    assert_eq!(tasks.spawn("own", async {}).unwrap_err().reason, SpawnError::Closed);
    open.send(()).unwrap();
    assert_eq!(own.await.unwrap(), SpawnError::Closed);

    // In flight, as a task of it after its end, and one that comes later.
    let (open, other) = crate::support::gate();
    let task = request.in_poll(move || {
        TaskSet::current().unwrap().spawn("task", async {
            other.await;
            TaskSet::current().unwrap().spawn("child", async {}).map(drop).map_err(|it| it.reason)
        })
    });
    request.end(End::Completed);
    open.send(()).unwrap();
    task.unwrap().await.unwrap().unwrap();
    let late = serve(&layer);
    late.set.spawn("late", async {}).unwrap();
    late.end(End::Completed);
    tasks.idle().await;
    assert_drained(&tasks);
    assert_ledger(&tasks, "refused 2, completed 4");
}

#[tokio::test]
async fn what_is_cancelled_in_a_drain_is_forced_if_the_registry_is_closed_by_then() {
    for (closes, listed) in [(false, &[][..]), (true, &["own", "request"])] {
        let tasks = TaskRegistry::new();
        let served = serve(&TaskSetLayer::new(&tasks));
        let own = tasks.spawn("own", forever()).unwrap();
        let request = served.set.spawn("request", forever()).unwrap();
        settle().await;
        tasks.begin_drain();
        if closes {
            tasks.close();
        }
        tasks.cancel_all();
        own.await.unwrap_err();
        request.await.unwrap_err();
        let mut names: Vec<_> =
            tasks.snapshot().forced_tasks.iter().map(|task| task.name).collect();
        names.sort_unstable();
        assert_eq!(names, listed);
        assert_ledger(&tasks, "cancelled 2");
    }
}

#[tokio::test]
async fn idle_is_waited_for_whether_it_is_closed_or_not() {
    let tasks = TaskRegistry::new();
    now(tasks.idle());
    let (open, first) = gate();
    let (open_other, other) = gate();
    tasks.spawn("first", first).unwrap();
    let set = serve(&TaskSetLayer::new(&tasks));
    set.set.spawn("other", other).unwrap();
    let mut idle = Box::pin(tasks.idle());
    assert!(poll_once(idle.as_mut()).is_pending());
    open.send(()).unwrap();
    settle().await;
    assert!(poll_once(idle.as_mut()).is_pending(), "of another set");
    open_other.send(()).unwrap();
    idle.await;
    assert!(tasks.is_empty());
    assert!(tasks.ptr_eq(&tasks.clone()) && !tasks.ptr_eq(&TaskRegistry::new()));
}
