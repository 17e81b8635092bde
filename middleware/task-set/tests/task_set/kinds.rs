//! What holds for tasks of each kind, wherever they are spawned.

use std::{future::poll_fn, pin::pin, sync::mpsc, task::Poll, time::Duration};

use tokio::runtime::Handle;
use tokio_test::{assert_pending, assert_ready_err, assert_ready_ok};
use tower_request_context::{Inherit, RequestContext, Task};
use tower_task_set::{
    AtEnd, Cause, End, Group, SpawnError, SpawnLimit, TaskEvent, TaskHandle, TaskRegistry, TaskSet,
    TaskSetLayer,
};
use tracing::Span;

use crate::{log::spans_of, support::*};

#[derive(Clone, Copy, Debug, PartialEq)]
enum Kind {
    Ordinary,
    Graceful,
    Blocking,
}

const KINDS: [Kind; 3] = [Kind::Ordinary, Kind::Graceful, Kind::Blocking];

/// What tasks are spawned into.
enum Into {
    Set(TaskSet),
    Registry(TaskRegistry),
    Group(Group),
}

impl Into {
    /// Each of them, of one registry.
    fn each(tasks: &TaskRegistry, set: &TaskSet) -> [Self; 4] {
        [
            Self::Set(set.clone()),
            Self::Registry(tasks.clone()),
            Self::Group(set.group()),
            Self::Group(tasks.group()),
        ]
    }

    /// Does `work` in a task, once.
    fn spawn<T: Send + 'static>(
        &self,
        kind: Kind,
        work: impl FnOnce() -> T + Send + 'static,
    ) -> Result<TaskHandle<T>, SpawnError> {
        use Kind::{Blocking, Graceful, Ordinary};
        Ok(match (self, kind) {
            (Self::Set(set), Ordinary) => set.spawn("task", async { work() })?,
            (Self::Set(set), Graceful) => set.spawn_graceful("task", |_| async { work() })?,
            (Self::Set(set), Blocking) => set.spawn_blocking("task", |_| work())?,
            (Self::Registry(all), Ordinary) => all.spawn("task", async { work() })?,
            (Self::Registry(all), Graceful) => all.spawn_graceful("task", |_| async { work() })?,
            (Self::Registry(all), Blocking) => all.spawn_blocking("task", |_| work())?,
            (Self::Group(group), Ordinary) => group.spawn("task", async { work() })?,
            (Self::Group(group), Graceful) => group.spawn_graceful("task", |_| async { work() })?,
            (Self::Group(group), Blocking) => group.spawn_blocking("task", |_| work())?,
        })
    }
}

#[test]
fn tasks_run_on_the_runtime_of_the_registry_from_wherever_they_are_spawned() {
    let (first, second) = (current_thread(), multi_thread());
    let tasks = TaskRegistry::new().runtime(second.handle().clone());
    let check = || {
        let served = serve(&TaskSetLayer::new(&tasks));
        let mut handles = Vec::new();
        for into in Into::each(&tasks, &served.set) {
            for kind in KINDS {
                handles.push(into.spawn(kind, || Handle::current().id()).unwrap());
            }
            // The drop of a group would tell them to end.
            leak(into);
        }
        handles
    };
    // Outside of a runtime, and on another.
    let handles = check().into_iter().chain(first.block_on(async { check() }));
    for task in handles.collect::<Vec<_>>() {
        let on = first.block_on(outcome(task));
        assert_eq!(on, Yield::Completed(second.handle().id()));
    }
    assert_ledger(&tasks, "completed 24");
}

#[tokio::test]
async fn tasks_have_their_set_and_context_and_a_permit_until_they_have_ended() {
    let limit = SpawnLimit::new(1);
    let events = Log::new();
    let observer = {
        let events = events.clone();
        move |event: &TaskEvent| match event {
            TaskEvent::Started { name, .. } => events.push(format!("{name} started")),
            TaskEvent::Ended { name, outcome, .. } => events.push(format!("{name} {outcome}")),
            _ => {}
        }
    };
    let tasks = TaskRegistry::new().limit(limit.clone()).observer(observer);
    let served = serve(&TaskSetLayer::new(&tasks));
    let context = RequestContext::new().with("a value");
    for into in Into::each(&tasks, &served.set) {
        for kind in KINDS {
            let taken = limit.clone();
            let look = move || {
                let value = RequestContext::current().get::<&str>().copied();
                (TaskSet::current().is_ok(), value, taken.in_use())
            };
            let task = context.clone().sync_scope(|| into.spawn(kind, look)).unwrap();
            // A closure may have returned by now.
            if kind != Kind::Blocking {
                assert_eq!(into.spawn(kind, || ()).unwrap_err(), SpawnError::Full);
            }
            let found = outcome(task).await;
            assert_eq!(found, Yield::Completed((true, Some("a value"), 1)), "{kind:?}");
            // A blocking one is counted on its own thread.
            while limit.in_use() > 0 {
                tokio::task::yield_now().await;
            }
            assert_eq!(events.take(), ["task started", "task completed"]);
        }
    }
    tasks.close();
    for into in Into::each(&tasks, &served.set) {
        for kind in KINDS {
            assert_eq!(into.spawn(kind, || ()).unwrap_err(), SpawnError::Closed);
        }
    }
    tasks.wait().await;
    assert_ledger(&tasks, "refused 20, completed 12");
}

#[tokio::test]
async fn a_panic_is_the_tasks_own_in_each_kind() {
    let tasks = TaskRegistry::new();
    let served = serve(&TaskSetLayer::new(&tasks));
    for into in Into::each(&tasks, &served.set) {
        for kind in KINDS {
            let task = into.spawn::<()>(kind, || panic!("in the task")).unwrap();
            assert_eq!(outcome(task).await, Yield::Panicked("in the task".to_owned()));
        }
    }
    tasks.close();
    tasks.wait().await;
    assert_ledger(&tasks, "panicked 12");
}

#[tokio::test(start_paused = true)]
async fn choices_for_one_task_hold_for_each_kind() {
    for kind in KINDS {
        let tasks = TaskRegistry::new().at_end(AtEnd::Keep);
        let served = serve(&TaskSetLayer::new(&tasks));
        let group = served.set.group();
        let spawn = |at_end, exception| {
            let (tell, told) = mpsc::channel();
            let new = group.task("task").at_end(at_end).on(End::Disconnected, exception);
            let task = match kind {
                Kind::Ordinary => new.spawn(async move {
                    tell.send(()).unwrap();
                    forever().await;
                    None
                }),
                Kind::Graceful => {
                    let task = new.spawn_graceful(|stop| async move {
                        tell.send(()).unwrap();
                        Some(stop.cancelled().await)
                    });
                    task.map_err(|refused| panic!("{refused}"))
                }
                Kind::Blocking => {
                    let task = new.spawn_blocking(move |stop| {
                        tell.send(()).unwrap();
                        while !stop.is_cancelled() {
                            std::thread::yield_now();
                        }
                        stop.cause()
                    });
                    task.map_err(|refused| panic!("{refused}"))
                }
            };
            (task.unwrap_or_else(|refused| panic!("{refused}")), told)
        };
        let (told, started) = spawn(AtEnd::Keep, AtEnd::Cancel);
        let (kept, kept_started) = spawn(AtEnd::Cancel, AtEnd::Keep);
        settle().await;
        started.recv().unwrap();
        kept_started.recv().unwrap();
        served.end(End::Disconnected);
        let ended = |cause| match kind {
            Kind::Ordinary => Yield::Cancelled(cause),
            Kind::Graceful | Kind::Blocking => Yield::Completed(Some(cause)),
        };
        assert_eq!(outcome(told).await, ended(Cause::Disconnected));
        settle().await;
        assert!(!kept.is_finished());
        kept.cancel();
        assert_eq!(outcome(kept).await, ended(Cause::Requested));
        group.wait().await;
    }
}

#[tokio::test(start_paused = true)]
async fn no_time_is_too_short_or_too_long() {
    let tasks = TaskRegistry::new();
    for time in [Duration::ZERO, Duration::from_nanos(1), Duration::MAX] {
        let task = tasks.task("task").timeout(time).grace(time).at_end(AtEnd::Drain(time));
        let mut tasks_of_each = vec![
            task.clone().spawn(forever()).unwrap(),
            task.spawn_graceful(|_| forever()).unwrap(),
        ];
        // The clock jumps, by a week.
        tokio::time::advance(secs(7 * 86_400)).await;
        settle().await;
        if time == Duration::MAX {
            assert!(tasks_of_each.iter().all(|task| !task.is_finished()));
            tasks.abort_all();
            let graceful = outcome(tasks_of_each.pop().unwrap()).await;
            assert_eq!(graceful, Yield::Aborted(Cause::Shutdown));
        } else {
            for task in tasks_of_each {
                assert_eq!(outcome(task).await, Yield::TimedOut);
            }
        }
    }
}

#[tokio::test(start_paused = true)]
async fn no_deadline_of_a_response_and_no_wait_is_too_short_or_too_long() {
    for time in [Duration::ZERO, Duration::from_nanos(1), Duration::MAX] {
        let tasks = TaskRegistry::new().limit(SpawnLimit::new(1));
        let layer = TaskSetLayer::new(&tasks).deadline(time).at_end(AtEnd::Drain(time));
        let request = serve(&layer);
        let set = &request.set;
        assert_eq!(set.deadline().is_none(), time == Duration::MAX);
        let task = set.spawn("task", forever()).unwrap();
        let mut waits = pin!(set.spawn_within(time, "waits", async {}));
        if time.is_zero() {
            assert_eq!(assert_ready_err!(poll_once(waits.as_mut())).reason, SpawnError::Full);
        } else {
            assert_pending!(poll_once(waits.as_mut()));
        }
        // The clock jumps, by a thousand years.
        tokio::time::advance(secs(1_000 * 365 * 86_400)).await;
        settle().await;
        if time == Duration::MAX {
            assert_pending!(poll_once(waits.as_mut()));
            task.cancel();
            settle().await;
            let late = assert_ready_ok!(poll_once(waits.as_mut()));
            assert_eq!(outcome(late).await, COMPLETED);
        } else {
            assert_eq!(outcome(task).await, Yield::Cancelled(Cause::TimedOut));
            settle().await;
        }
        assert_eq!(tasks.len(), 0);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_task_that_blocks_in_place_is_listed_until_it_goes_on() {
    let tasks = TaskRegistry::new();
    let (open, gate) = mpsc::channel::<()>();
    let (tell, told) = mpsc::channel();
    let task = tasks.spawn("in_place", async move {
        tokio::task::block_in_place(|| {
            tell.send(()).unwrap();
            gate.recv().unwrap_err();
        });
        // It was told meanwhile, and is dropped here.
        let mut first = true;
        poll_fn(|_| if std::mem::take(&mut first) { Poll::Pending } else { Poll::Ready(()) }).await;
    });
    told.recv().unwrap();
    tasks.close();
    tasks.abort_all();
    assert_eq!(tasks.snapshot().live_tasks[0].to_string().split(' ').next(), Some("in_place"));
    drop(open);
    tasks.wait().await;
    assert_eq!(outcome(task.unwrap()).await, Yield::Cancelled(Cause::Shutdown));
}

/// A value with a span of its own, by which each request is known.
#[derive(Clone)]
struct Own(u32, Span);

impl Inherit for Own {
    fn inherit(&self, _: &Task) -> Self {
        self.clone()
    }

    fn wants_span(&self) -> bool {
        true
    }

    fn span(&self, _: &Task) -> Span {
        self.1.clone()
    }
}

#[test]
fn no_value_and_no_span_of_a_request_is_seen_in_another() {
    // Installs the subscriber.
    spans_of(|| ());
    let runtime = multi_thread();
    let tasks = TaskRegistry::new().runtime(runtime.handle().clone());
    let mut all = Vec::new();
    let bare = || RequestContext::current().is_empty() && Span::current().is_none();
    for n in 0..100 {
        let own = Own(n, tracing::info_span!("request", n));
        let id = own.1.id();
        assert!(id.is_some(), "there is a subscriber");
        let context = RequestContext::new().with_inherited(own);
        let served = context.clone().sync_scope(|| serve(&TaskSetLayer::new(&tasks)));
        let looks = move || {
            let context = RequestContext::current();
            context.get::<Own>().is_some_and(|own| own.0 == n) && Span::current().id() == id
        };
        let polls = {
            let looks = looks.clone();
            move || async move {
                let guard = OnDrop::new({
                    let looks = looks.clone();
                    move || assert!(looks(), "in the drop")
                });
                for _ in 0..20 {
                    assert!(looks(), "in a poll");
                    tokio::task::yield_now().await;
                }
                drop(guard);
                assert!(looks(), "at the end");
            }
        };
        let group = served.set.group();
        all.push(served.set.spawn("task", polls.clone()()).unwrap());
        all.push(
            served
                .set
                .spawn_graceful("task", {
                    let polls = polls.clone();
                    |_| polls()
                })
                .unwrap_or_else(|refused| panic!("{refused}")),
        );
        let in_closure = looks.clone();
        let closure = move |_| assert!(in_closure(), "in the closure");
        all.push(served.set.spawn_blocking("task", closure).unwrap_or_else(|e| panic!("{e}")));
        all.push(group.spawn("task", polls()).unwrap());
        // Beside them, on the same threads.
        let beside = runtime.spawn(async move {
            for _ in 0..20 {
                assert!(bare(), "beside");
                tokio::task::yield_now().await;
            }
        });
        drop(beside);
        assert!(bare(), "where they are spawned");
        leak(group);
    }
    for task in all {
        assert_eq!(runtime.block_on(outcome(task)), COMPLETED);
    }
    runtime.block_on(async { assert!(bare(), "afterwards") });
    assert_ledger(&tasks, "completed 400");
}
