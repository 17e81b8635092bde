//! The request's context in its tasks, and what each task has of its own.

use std::{
    any::{Any, TypeId},
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering::SeqCst},
    },
};

use tower_request_context::{Inherit, RequestContext, Task, TraceId};
use tower_task_set::{AtEnd, Cause, End, TaskRegistry, TaskSet, TaskSetLayer};
use tracing::Span;

use crate::{
    log::{events_of, spans_of},
    support::*,
};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Tenant(u32);

fn tenant() -> Option<u32> {
    RequestContext::current().get().map(|Tenant(id)| *id)
}

fn context_of(id: u32) -> RequestContext {
    RequestContext::new().with(Tenant(id))
}

fn serve_as(id: u32, tasks: &TaskRegistry) -> Served {
    context_of(id).sync_scope(|| serve(&TaskSetLayer::new(tasks)))
}

// The same for all

#[tokio::test]
async fn a_task_has_the_context_of_its_request_before_and_after_an_await_and_in_its_drop() {
    let tasks = TaskRegistry::new();
    let request = serve_as(1, &tasks);
    let seen = Log::new();
    let log = seen.clone();
    let task = request.set.spawn("task", async move {
        let on_drop = log.clone();
        let _on_drop = OnDrop::new(move || on_drop.push(tenant()));
        log.push(tenant());
        tokio::task::yield_now().await;
        log.push(tenant());
        forever().await;
    });
    let task = task.unwrap();
    settle().await;
    task.cancel();
    outcome(task).await;
    assert_eq!(seen.take(), [Some(1); 3]);
    assert_eq!(tenant(), None);
}

#[test]
fn a_task_has_its_context_in_its_drop_whatever_drops_it() {
    let seen = Log::new();
    let spawn = |set: &TaskSet| {
        let log = seen.clone();
        let on_drop = OnDrop::new(move || log.push(tenant()));
        set.spawn("task", async move {
            let _on_drop = on_drop;
            forever().await;
        })
        .unwrap()
    };
    let tasks = TaskRegistry::new();
    let runtime = current_thread();
    runtime.block_on(async {
        // Before it was polled.
        let request = serve_as(1, &tasks);
        let task = spawn(&request.set);
        task.cancel();
        outcome(task).await;
        assert_eq!(seen.take(), [Some(1)]);
        // By the runtime, in this one's own context or none.
        let request = serve_as(2, &tasks);
        spawn(&request.set);
        settle().await;
        spawn(&request.set);
    });
    drop(runtime);
    assert_eq!(seen.take(), [Some(2); 2]);
}

#[tokio::test]
async fn a_task_that_is_spawned_where_there_is_no_context_has_that_of_the_request() {
    let tasks = TaskRegistry::new();
    let request = serve_as(1, &tasks);
    let set = request.set.clone();
    let bare = tokio::spawn(async move {
        assert_eq!(tenant(), None);
        set.spawn("task", async { tenant() }).unwrap().await.unwrap()
    });
    assert_eq!(bare.await.unwrap(), Some(1));
}

#[tokio::test]
async fn a_task_that_is_spawned_in_another_context_has_that_one() {
    let tasks = TaskRegistry::new();
    let request = serve_as(1, &tasks);
    let spawn = || {
        request.set.spawn("task", async {
            let before = tenant();
            tokio::task::yield_now().await;
            let child = TaskSet::current().unwrap().spawn("child", async { tenant() }).unwrap();
            (before, tenant(), child.await.unwrap())
        })
    };
    let task = context_of(2).sync_scope(spawn).unwrap();
    assert_eq!(task.await.unwrap(), (Some(2), Some(2), Some(2)));
}

#[tokio::test]
async fn a_task_of_no_request_has_the_context_it_is_spawned_in() {
    let tasks = TaskRegistry::new();
    let task = context_of(3).sync_scope(|| tasks.spawn("task", async { tenant() })).unwrap();
    assert_eq!(task.await.unwrap(), Some(3));
    assert_eq!(tasks.spawn("task", async { tenant() }).unwrap().await.unwrap(), None);
    let request = serve_as(4, &tasks);
    let own = tasks.clone();
    let task = request.set.spawn("task", async move {
        own.spawn("of no request", async { tenant() }).unwrap().await.unwrap()
    });
    assert_eq!(task.unwrap().await.unwrap(), Some(4));
}

#[tokio::test]
async fn a_task_that_is_spawned_elsewhere_shows_the_trace_id_of_there() {
    let ids: [TraceId; 2] =
        ["0af7651916cd43dd8448eb211c80319c", "4bf92f3577b34da6a3ce929d0e0e4736"]
            .map(|id| id.parse().unwrap());
    let tasks = TaskRegistry::new();
    let here = RequestContext::new().with(ids[0]);
    let request = here.sync_scope(|| serve(&TaskSetLayer::new(&tasks)));
    request.set.spawn("here", forever()).unwrap();
    let there = RequestContext::new().with(ids[1]);
    there.sync_scope(|| request.set.spawn("there", forever())).unwrap();
    context_of(1).sync_scope(|| request.set.spawn("no trace", forever())).unwrap();
    let shown = |name| {
        let live = tasks.snapshot().live_tasks;
        live.iter().find(|task| task.name == name).unwrap().trace_id
    };
    assert_eq!(shown("here"), Some(ids[0]));
    assert_eq!(shown("there"), Some(ids[1]));
    // It is still a task of this request.
    assert_eq!(shown("no trace"), Some(ids[0]));
}

#[test]
fn tasks_of_many_requests_never_see_each_others_context() {
    let runtime = multi_thread();
    let tasks = TaskRegistry::new();
    runtime.block_on(async {
        let requests: Vec<_> = (0..50).map(|id| (id, serve_as(id, &tasks))).collect();
        let mut handles = Vec::new();
        for (id, request) in &requests {
            for _ in 0..10 {
                let id = *id;
                let task = request.set.spawn("task", async move {
                    let set = TaskSet::current().unwrap();
                    for _ in 0..50 {
                        assert_eq!(tenant(), Some(id));
                        tokio::task::yield_now().await;
                    }
                    let child = set.spawn("child", async { tenant() }).unwrap();
                    assert_eq!(child.await.unwrap(), Some(id));
                });
                handles.push(task.unwrap());
            }
        }
        for handle in handles {
            assert_eq!(outcome(handle).await, COMPLETED);
        }
    });
    assert_eq!(tasks.snapshot().totals.completed, 1_000);
}

// Each its own

/// A value of which every task has its own.
#[derive(Clone, Default)]
struct Lineage {
    /// The names of the tasks, from the request's on.
    names: Vec<&'static str>,
    kept: bool,
    /// How many were made.
    made: Arc<AtomicUsize>,
    spans: bool,
    panics_in: &'static str,
}

impl Lineage {
    /// With a span for each task, or without.
    fn new(spans: bool) -> Self {
        Self::panicking(spans, "")
    }

    /// Panics in its method of this name.
    fn panicking(spans: bool, panics_in: &'static str) -> Self {
        let mut value = Self::default();
        value.spans = spans;
        value.panics_in = panics_in;
        value
    }

    fn check(&self, place: &'static str) {
        assert_ne!(self.panics_in, place, "a value panics");
    }

    fn made(&self) -> usize {
        self.made.load(SeqCst)
    }
}

impl Inherit for Lineage {
    fn inherit(&self, task: &Task) -> Self {
        self.check("inherit");
        assert_eq!(task.site.file(), file!());
        self.made.fetch_add(1, SeqCst);
        let mut own = self.clone();
        own.names.push(task.name);
        own.kept = task.kept;
        own
    }

    fn wants_span(&self) -> bool {
        self.check("wants_span");
        self.spans
    }

    fn span(&self, _: &Task) -> Span {
        self.check("span");
        if self.spans { tracing::info_span!("task_span") } else { Span::none() }
    }
}

impl Drop for Lineage {
    fn drop(&mut self) {
        if !self.names.is_empty() && self.panics_in == "drop" {
            self.panics_in = "";
            panic!("a value panics in its drop");
        }
    }
}

fn serve_with(value: &Lineage, tasks: &TaskRegistry) -> Served {
    let context = RequestContext::new().with_inherited(value.clone());
    context.sync_scope(|| serve(&TaskSetLayer::new(tasks)))
}

fn names() -> Vec<&'static str> {
    RequestContext::current().get::<Lineage>().map_or_else(Vec::new, |own| own.names.clone())
}

fn kept() -> bool {
    RequestContext::current().get::<Lineage>().unwrap().kept
}

#[tokio::test]
async fn a_tasks_own_value_is_made_when_it_is_first_asked_for_and_once() {
    let tasks = TaskRegistry::new();
    let value = Lineage::default();
    let request = serve_with(&value, &tasks);
    let seen = Log::new();
    let log = seen.clone();
    let made = value.made.clone();
    let task = request.set.spawn("parent", async move {
        tokio::task::yield_now().await;
        assert_eq!(made.load(SeqCst), 0, "nobody has asked");
        let on_drop = log.clone();
        let _on_drop = OnDrop::new(move || on_drop.push(names()));
        for _ in 0..3 {
            log.push(names());
            tokio::task::yield_now().await;
        }
    });
    assert_eq!(outcome(task.unwrap()).await, COMPLETED);
    assert_eq!(seen.take(), vec![vec!["parent"]; 4]);
    assert_eq!(value.made(), 1);
    request.set.spawn("reads nothing", async {}).unwrap().await.unwrap();
    assert_eq!(value.made(), 1);
}

#[tokio::test]
async fn a_service_that_a_task_calls_has_the_tasks_values() {
    for asked_before in [false, true] {
        let (tasks, others) = (TaskRegistry::new(), TaskRegistry::new());
        let value = Lineage::default();
        let request = serve_with(&value, &tasks);
        let task = request.set.spawn("parent", async move {
            if asked_before {
                assert_eq!(names(), ["parent"]);
            }
            let mut called = serve(&TaskSetLayer::new(&others));
            let child = called.set.spawn("child", async { names() }).unwrap();
            let seen = called.in_poll(names);
            called.end(End::Completed);
            (seen, names(), child.await.unwrap())
        });
        let (seen, own, child) = task.unwrap().await.unwrap();
        assert_eq!((&seen[..], &own[..]), (&["parent"][..], &["parent"][..]));
        assert_eq!(child, ["parent", "child"]);
        assert_eq!(value.made(), 2);
    }
}

#[tokio::test]
async fn a_value_that_is_first_asked_for_in_the_drop_is_made_there() {
    let tasks = TaskRegistry::new();
    let value = Lineage::default();
    let request = serve_with(&value, &tasks);
    let seen = Log::new();
    let log = seen.clone();
    let task = request.set.spawn("task", async move {
        let _on_drop = OnDrop::new(move || log.push(names()));
        tokio::task::yield_now().await;
    });
    assert_eq!(outcome(task.unwrap()).await, COMPLETED);
    assert_eq!(seen.take(), [["task"]]);
}

#[tokio::test]
async fn a_childs_value_is_made_of_its_parents() {
    for spans in [false, true] {
        let tasks = TaskRegistry::new();
        let value = Lineage::new(spans);
        let request = serve_with(&value, &tasks);
        let task = request.set.spawn("parent", async {
            assert_eq!(names(), ["parent"]);
            TaskSet::current()
                .unwrap()
                .spawn("child", async {
                    tokio::task::yield_now().await;
                    names()
                })
                .unwrap()
        });
        let child = task.unwrap().await.unwrap();
        assert_eq!(child.await.unwrap(), ["parent", "child"], "spans: {spans}");
    }
}

#[tokio::test]
async fn a_value_is_told_whether_its_task_outlives_the_request() {
    for spans in [false, true] {
        let tasks = TaskRegistry::new();
        let value = Lineage::new(spans);
        let request = serve_with(&value, &tasks);
        let set = &request.set;
        let drains = set.spawn("task", async { kept() }).unwrap();
        assert!(!drains.await.unwrap());
        let is_kept = set.task("task").at_end(AtEnd::Keep).spawn(async { kept() }).unwrap();
        assert!(is_kept.await.unwrap(), "by its own choice, spans: {spans}");
        let context = RequestContext::new().with_inherited(value.clone());
        let of_none = context.sync_scope(|| tasks.spawn("task", async { kept() })).unwrap();
        assert!(of_none.await.unwrap(), "it has no request, spans: {spans}");
        set.at_end(AtEnd::Keep);
        let by_set = set.spawn("task", async { kept() }).unwrap();
        assert!(by_set.await.unwrap(), "by its set's choice, spans: {spans}");
        let cancelled = set.task("task").at_end(AtEnd::Cancel).spawn(async { kept() }).unwrap();
        assert!(!cancelled.await.unwrap());
    }
}

#[test]
fn a_tasks_span_is_entered_in_its_polls_and_its_drop_and_nowhere_else() {
    let value = Lineage::new(true);
    let spans = spans_of(|| {
        current_thread().block_on(async {
            let tasks = TaskRegistry::new();
            let request = serve_with(&value, &tasks);
            let on_drop = OnDrop::new(|| tracing::info_span!("in drop").in_scope(|| ()));
            let task = request.set.spawn("task", async move {
                let _on_drop = on_drop;
                tokio::task::yield_now().await;
            });
            let task = task.unwrap();
            settle().await;
            assert!(Span::current().is_none());
            assert_eq!(outcome(task).await, COMPLETED);
            let task = request.set.spawn("never polled", forever()).unwrap();
            task.cancel();
            outcome(task).await;
        });
    });
    let (enter, exit, close) = ("enter task_span", "exit task_span", "close task_span");
    let mut expected = vec![enter, exit];
    // The future's locals go in its last poll.
    expected.extend([enter, "enter in drop", "exit in drop", "close in drop", exit]);
    expected.extend([enter, exit, close]);
    expected.extend([enter, exit, close]);
    assert_eq!(spans, expected);
    assert_eq!(value.made(), 2);
}

#[test]
fn a_task_that_is_dropped_at_an_await_is_dropped_in_its_span() {
    let value = Lineage::new(true);
    let spans = spans_of(|| {
        current_thread().block_on(async {
            let tasks = TaskRegistry::new();
            let request = serve_with(&value, &tasks);
            let on_drop = OnDrop::new(|| tracing::info_span!("in drop").in_scope(|| ()));
            let task = request.set.spawn("task", async move {
                let _on_drop = on_drop;
                forever().await;
            });
            let task = task.unwrap();
            settle().await;
            task.cancel();
            assert_eq!(outcome(task).await, Yield::Cancelled(Cause::Requested));
        });
    });
    let (enter, exit, close) = ("enter task_span", "exit task_span", "close task_span");
    let expected =
        [enter, exit, enter, "enter in drop", "exit in drop", "close in drop", exit, close];
    assert_eq!(spans, expected);
}

#[test]
fn a_panic_is_logged_in_the_tasks_span() {
    let value = Lineage::new(true);
    let events = events_of(|| {
        current_thread().block_on(async {
            let tasks = TaskRegistry::new();
            let request = serve_with(&value, &tasks);
            let task = request.set.spawn("task", async { panic!("in its span") }).unwrap();
            outcome::<()>(task).await;
            let on_drop = OnDrop::new(|| panic!("in its span"));
            let task = request.set.spawn("task", async move {
                let _on_drop = on_drop;
                forever().await;
            });
            let task = task.unwrap();
            settle().await;
            task.cancel();
            outcome(task).await;
        });
    });
    let spans: Vec<_> = events.iter().map(|event| event.spans.clone()).collect();
    assert_eq!(spans, [["task_span"], ["task_span"]]);
}

#[tokio::test]
async fn a_value_that_panics_fails_nobody_else() {
    for place in ["inherit", "wants_span", "span"] {
        for spans in [false, true] {
            let tasks = TaskRegistry::new();
            let value = Lineage::panicking(spans, place);
            let request = serve_with(&value, &tasks);
            for _ in 0..2 {
                let task = request.set.spawn("task", async { 1 }).unwrap();
                assert_eq!(outcome(task).await, Yield::Completed(1), "{place}");
            }
            if place == "inherit" {
                // Who asks for it has asked for the panic.
                let reads = request.set.spawn("reads", async { names() }).unwrap();
                assert!(matches!(outcome(reads).await, Yield::Panicked(_)));
                assert_ledger(&tasks, "completed 2, panicked 1");
            } else {
                assert_ledger(&tasks, "completed 2");
            }
        }
    }
}

#[tokio::test]
async fn a_value_that_panics_in_its_drop_is_contained() {
    for spans in [false, true] {
        for cancelled in [false, true] {
            let tasks = TaskRegistry::new();
            let value = Lineage::panicking(spans, "drop");
            let request = serve_with(&value, &tasks);
            let task = request.set.spawn("task", async move {
                // The task's own, which goes with it.
                let _ = RequestContext::current().get::<Lineage>().is_some();
                if cancelled {
                    forever().await;
                }
            });
            let task = task.unwrap();
            settle().await;
            task.cancel();
            let expected = if cancelled { Yield::Cancelled(Cause::Requested) } else { COMPLETED };
            assert_eq!(outcome(task).await, expected, "spans: {spans}");
            assert_ledger(&tasks, if cancelled { "cancelled 1" } else { "completed 1" });
        }
    }
}

struct PanicsInDrop;

impl Drop for PanicsInDrop {
    fn drop(&mut self) {
        panic!("a value panics in its drop");
    }
}

#[tokio::test]
async fn a_value_of_the_request_that_panics_in_its_drop_is_not_its_last_tasks_panic() {
    let tasks = TaskRegistry::new();
    let context = RequestContext::new().with(PanicsInDrop);
    let request = context.sync_scope(|| serve(&TaskSetLayer::new(&tasks).at_end(AtEnd::Keep)));
    let (open, gate) = gate();
    // A handle keeps the set, and with it the context: this one is dropped.
    let (tell, told) = tokio::sync::oneshot::channel();
    drop(request.set.spawn("last", async {
        gate.await;
        tell.send(()).unwrap();
    }));
    request.end(End::Completed);
    open.send(()).unwrap();
    told.await.unwrap();
    settle().await;
    assert_ledger(&tasks, "completed 1");
    // The registry is as it was.
    tasks.spawn("next", async {}).unwrap().await.unwrap();
    tasks.close();
    now(tasks.wait());
    assert_ledger(&tasks, "completed 2");
}

/// A value that asks for the set while it is made, and whenever it is asked.
struct Asks(Mutex<Vec<usize>>);

impl Inherit for Asks {
    fn inherit(&self, _: &Task) -> Self {
        let set = TaskSet::current().unwrap();
        Self(Mutex::new(vec![set.len()]))
    }

    fn wants_span(&self) -> bool {
        TaskSet::current().is_ok_and(|set| set.len() < 100)
    }

    fn part(&self, _: TypeId) -> Option<&dyn Any> {
        let _ = TaskSet::current().map(|set| set.len());
        None
    }
}

#[tokio::test]
async fn a_value_can_ask_for_the_set_of_the_task_it_is_made_for() {
    let tasks = TaskRegistry::new();
    let context = RequestContext::new().with_inherited(Asks(Mutex::default()));
    let mut request = context.sync_scope(|| serve(&TaskSetLayer::new(&tasks)));
    let read = || RequestContext::current().get::<Asks>().unwrap().0.lock().unwrap().clone();
    // Made lazily, in the task.
    let task = request.set.spawn("task", async move { read() }).unwrap();
    assert_eq!(task.await.unwrap(), [1]);
    // Made at the spawn, for it wants a span: where the set is current.
    let task = request
        .in_poll(move || TaskSet::current().unwrap().spawn("task", async move { read() }).unwrap());
    assert_eq!(task.await.unwrap(), [0]);
}
