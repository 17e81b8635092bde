//! What a request and its tasks cost in allocations, exactly.
//!
//! Counted on this thread, which does all the work: the runtime has no other.

#![allow(clippy::unwrap_used)]

use std::{
    array,
    collections::BTreeSet,
    convert::Infallible,
    future::{pending, ready},
    mem,
    pin::{Pin, pin},
    sync::Arc,
    task::{Context, Poll, Waker},
    time::Duration,
};

use allocation_counter::measure;
use http::{Request, Response};
use http_body::{Body, Frame};
use tokio::{
    runtime::{Builder, Runtime},
    task::JoinError,
};
use tower::{Layer, Service, service_fn};
use tower_request_context::{Inherit, RequestContext, Task};
use tower_task_set::{
    AtEnd, Observe, SpawnLimit, TaskError, TaskEvent, TaskHandle, TaskRegistry, TaskSet,
    TaskSetLayer,
};

type Handler = Arc<dyn Fn()>;

fn runtime() -> Runtime {
    Builder::new_current_thread().enable_all().build().unwrap()
}

/// Lets all tasks run that can: the runtime runs some of them for each yield.
async fn settle() {
    for _ in 0..64 {
        tokio::task::yield_now().await;
    }
}

/// A service that does this in its call, and whose response goes on until it is dropped.
fn service(
    handler: Handler,
) -> impl Service<Request<()>, Response = Response<Frameless>, Error = Infallible> {
    service_fn(move |_| {
        handler();
        ready(Ok(Response::new(Frameless)))
    })
}

/// The allocations of one request to `service`, from the call to the end of its tasks, when some
/// have been served before. The tasks run, and then the response is over.
fn of_request<S: Service<Request<()>>>(mut service: S) -> u64 {
    let runtime = runtime();
    let mut serve = || {
        runtime.block_on(async {
            let response = service.call(Request::new(())).await;
            settle().await;
            drop(response);
            settle().await;
        });
    };
    for _ in 0..3 {
        serve();
    }
    let cost = measure(serve);
    assert_eq!(cost.count_current, 0, "nothing stays");
    cost.count_total
}

/// What the layer adds to that, if the handler does this. The memory of the set, and of what it knows
/// of up to some tasks, is that of the request before.
fn added(layer: &TaskSetLayer, handler: impl Fn() + 'static) -> u64 {
    let bare = of_request(service(Arc::new(|| {})));
    of_request(layer.layer(service(Arc::new(handler)))) - bare
}

/// A service whose requests ask for their sets, and do nothing else.
fn asking(layer: &TaskSetLayer) -> impl Service<Request<()>> {
    layer.layer(service(Arc::new(|| drop(TaskSet::current().unwrap()))))
}

/// So many sets that are over a shard of a registry keeps.
const KEPT: usize = 8;

/// The same for a request that finds no memory of another: those of others have it.
fn added_at_first(layer: &TaskSetLayer, handler: impl Fn() + 'static) -> u64 {
    fn beside<S: Service<Request<()>>>(
        mut others: impl Service<Request<()>>,
        mut service: S,
    ) -> impl Service<Request<()>, Response = S::Response, Error = S::Error> {
        service_fn(move |request| {
            let others: [_; KEPT + 1] = array::from_fn(|_| others.call(Request::new(())));
            let response = service.call(request);
            async move {
                let response = response.await;
                drop(others);
                response
            }
        })
    }
    let bare = of_request(beside(asking(layer), service(Arc::new(|| {}))));
    of_request(beside(asking(layer), layer.layer(service(Arc::new(handler))))) - bare
}

fn layers() -> [TaskSetLayer; 3] {
    let tasks = TaskRegistry::new().at_end(AtEnd::Cancel);
    let limited = tasks.clone().limit(SpawnLimit::new(10_000).per_request(5_000));
    [
        TaskSetLayer::new(&tasks),
        TaskSetLayer::new(&limited),
        TaskSetLayer::new(&tasks).at_end(AtEnd::Drain(Duration::ZERO)),
    ]
}

fn spawn(future: impl Future<Output = ()> + Send + 'static) {
    TaskSet::current().unwrap().spawn("task", future).unwrap();
}

#[test]
fn a_request_that_does_not_ask_for_its_set_costs_nothing() {
    for layer in layers() {
        assert_eq!(added(&layer, || {}), 0);
        let nested =
            layer.layer(TaskSetLayer::new(&TaskRegistry::new()).layer(service(Arc::new(|| {}))));
        assert_eq!(of_request(nested), of_request(service(Arc::new(|| {}))));
    }
}

#[test]
fn up_to_four_tasks_at_once_cost_one_allocation_each_and_one_for_all() {
    for layer in layers() {
        for n in 0..=4 {
            let ready = added_at_first(&layer, move || {
                TaskSet::current().unwrap();
                (0..n).for_each(|_| spawn(async {}));
            });
            assert_eq!(ready, n + 1);
            let waits = added_at_first(&layer, move || {
                TaskSet::current().unwrap();
                (0..n).for_each(|_| spawn(pending()));
            });
            assert_eq!(waits, n + 1);
        }
    }
}

#[test]
fn a_request_after_another_has_its_memory_and_costs_one_allocation_for_each_task() {
    for layer in layers() {
        // What more than some tasks need is given back.
        for (n, more) in [(0, 0), (1, 0), (4, 0), (5, 0), (64, 0), (65, 3), (1_000, 4)] {
            let ready = added(&layer, move || {
                TaskSet::current().unwrap();
                (0..n).for_each(|_| spawn(async {}));
            });
            assert_eq!(ready, n + more);
            let waits = added(&layer, move || {
                TaskSet::current().unwrap();
                (0..n).for_each(|_| spawn(pending()));
            });
            assert_eq!(waits, n + more);
        }
        let timeouts = added(&layer, || {
            let set = TaskSet::current().unwrap();
            for _ in 0..8 {
                let task = set.task("task").timeout(Duration::from_secs(60));
                task.spawn(pending::<()>()).unwrap();
            }
        });
        assert_eq!(timeouts, 8);
        let graceful = added(&layer, || {
            let set = TaskSet::current().unwrap();
            for _ in 0..8 {
                set.spawn_graceful("task", |stop| async move { stop.is_cancelled() }).unwrap();
            }
        });
        assert_eq!(graceful, 8 + 8);
    }
}

#[test]
fn whatever_is_chosen_a_request_after_another_has_its_memory() {
    struct Sees;
    impl Observe for Sees {
        fn observe(&self, _: &TaskEvent) {}
    }
    let other = runtime();
    let registry = TaskRegistry::new();
    for registry in
        [registry.clone().observer(Sees), registry.clone().runtime(other.handle().clone())]
    {
        let layer = TaskSetLayer::new(&registry);
        assert_eq!(added(&layer, || drop(TaskSet::current().unwrap())), 0);
    }
    let context = RequestContext::new().with(7);
    let layer = TaskSetLayer::new(&registry);
    let cost = context.sync_scope(|| added(&layer, || drop(TaskSet::current().unwrap())));
    assert_eq!(cost, 0);
}

#[test]
fn some_requests_at_once_have_the_memory_of_as_many_before() {
    let runtime = runtime();
    let _here = runtime.enter();
    let [layer, ..] = layers();
    let at_once = |requests: usize| {
        let mut service = asking(&layer);
        let mut calls = Vec::with_capacity(requests);
        let mut serve = || {
            calls.extend((0..requests).map(|_| service.call(Request::new(()))));
            calls.clear();
        };
        serve();
        measure(serve).count_total
    };
    assert_eq!([1, 2, KEPT, KEPT + 1, KEPT + 5].map(at_once), [0, 0, 0, 1, 5]);
}

#[test]
fn a_request_with_a_deadline_has_the_memory_of_the_one_before_too() {
    let with = |tasks| {
        let layer = TaskSetLayer::new(&TaskRegistry::new()).deadline(Duration::from_secs(60));
        added(&layer, move || {
            TaskSet::current().unwrap();
            (0..tasks).for_each(|_| spawn(async {}));
        })
    };
    // The deadline, a place in the reaper's list, and what few sets have.
    assert_eq!((with(0), with(1), with(64)), (3, 3 + 1, 3 + 64));
}

#[test]
fn a_long_request_keeps_little_of_what_one_before_has_needed() {
    let layer = TaskSetLayer::new(&TaskRegistry::new().at_end(AtEnd::Cancel));
    let bytes_after = |tasks: usize, graceful: usize| {
        let mut long = layer.layer(service(Arc::new(|| spawn(pending()))));
        let mut wide = layer.layer(service(Arc::new(move || {
            let set = TaskSet::current().unwrap();
            (0..tasks).for_each(|_| spawn(pending()));
            for _ in 0..graceful {
                set.spawn_graceful("task", |stop| async move { stop.is_cancelled() }).unwrap();
            }
        })));
        let runtime = runtime();
        let mut open = Vec::with_capacity(200);
        let mut serve = |requests: usize| {
            runtime.block_on(async {
                for _ in 0..requests {
                    let response = wide.call(Request::new(())).await;
                    settle().await;
                    drop(response);
                    settle().await;
                    open.push(long.call(Request::new(())).await);
                }
            });
        };
        serve(3);
        measure(|| serve(100)).bytes_current / 100
    };
    let least = bytes_after(1, 0);
    for (tasks, graceful) in [(4, 0), (64, 0), (65, 0), (1_000, 0), (1, 8), (1, 9), (64, 100)] {
        let more = bytes_after(tasks, graceful) - least;
        assert!(more < 4_096, "{more} bytes more after {tasks} and {graceful}");
    }
}

#[test]
fn of_a_request_with_very_many_tasks_little_memory_is_kept_for_the_next() {
    const TASKS: usize = 10_000;
    let names: Vec<&'static str> =
        (0..TASKS).map(|n| &*Box::leak(n.to_string().into_boxed_str())).collect();
    // With a registry of its own: that keeps the names.
    let serve = |what: &'static str, names: &[&'static str]| {
        let layer = TaskSetLayer::new(&TaskRegistry::new().at_end(AtEnd::Cancel));
        let names = names.to_vec();
        let mut service = layer.layer(service(Arc::new(move || {
            let set = TaskSet::current().unwrap();
            for name in &names {
                let mut task = set.task(if what == "names" { name } else { "task" });
                if what == "choices" {
                    task = task.timeout(Duration::from_secs(60));
                }
                task.spawn(pending::<()>()).unwrap();
            }
        })));
        runtime().block_on(async {
            let response = service.call(Request::new(())).await;
            settle().await;
            drop(response);
        });
    };
    for what in ["tasks", "names", "choices"] {
        serve(what, &names[..1]);
        let cost = measure(|| serve(what, &names));
        assert!(cost.bytes_total > 100 * TASKS as u64);
        assert!(cost.bytes_current < 16 << 10, "{what}: {} bytes", cost.bytes_current);
    }
}

#[test]
fn names_of_their_own_cost_tasks_nothing() {
    let [layer, ..] = layers();
    let cost = added_at_first(&layer, || {
        let set = TaskSet::current().unwrap();
        set.spawn("first", pending::<()>()).unwrap();
        set.spawn("second", pending::<()>()).unwrap();
        set.spawn("third", pending::<()>()).unwrap();
        set.spawn("fourth", pending::<()>()).unwrap();
    });
    assert_eq!(cost, 5);
}

#[test]
fn more_tasks_at_once_cost_one_allocation_more_for_each_two_doublings() {
    for layer in layers() {
        for (n, more) in [(8, 0), (9, 1), (16, 1), (17, 2), (64, 2), (65, 3), (256, 3), (1_000, 4)]
        {
            let ready = added_at_first(&layer, move || (0..n).for_each(|_| spawn(async {})));
            assert_eq!(ready, n + 1 + more);
            let waits = added_at_first(&layer, move || (0..n).for_each(|_| spawn(pending())));
            assert_eq!(waits, n + 1 + more);
        }
    }
}

#[test]
fn tasks_one_after_another_cost_one_allocation_each_and_leave_nothing() {
    const TASKS: u64 = 100_000;
    let runtime = runtime();
    let tasks = TaskRegistry::new();
    let set = runtime.block_on(async { set_of(&tasks) });
    let run = |tasks: u64| {
        runtime.block_on(async {
            for _ in 0..tasks {
                set.spawn("task", async { [0_u8; 64] }).unwrap().await.unwrap();
            }
        });
    };
    run(10);
    let none = measure(|| run(0));
    let cost = measure(|| run(TASKS));
    assert_eq!(cost.count_total - none.count_total, TASKS);
    assert_eq!(cost.count_current, 0);
    assert!(cost.bytes_max < 4_096, "{cost:?}");
}

#[test]
fn a_handle_costs_nothing() {
    let [layer, ..] = layers();
    let cost = added_at_first(&layer, || {
        let set = TaskSet::current().unwrap();
        let task: TaskHandle<()> = set.spawn("task", pending()).unwrap();
        let cancel = task.cancel_handle();
        task.cancel();
        cancel.clone().cancel();
        assert_eq!(set.clone().len(), 1);
    });
    // The one more knows what this task alone was told.
    assert_eq!(cost, 2 + 1);
}

#[test]
fn choices_of_a_tasks_own_cost_one_allocation_for_four() {
    let [layer, ..] = layers();
    let cost = added_at_first(&layer, || {
        let set = TaskSet::current().unwrap();
        for _ in 0..4 {
            let task = set.task("task").at_end(AtEnd::Cancel);
            task.spawn(pending::<()>()).unwrap();
        }
    });
    assert_eq!(cost, 5 + 1);
}

#[test]
fn a_graceful_task_costs_one_allocation_more_and_all_of_them_one_for_each_doubling() {
    let [layer, ..] = layers();
    // Of the set itself, and of what it knows of such tasks.
    for (n, more) in [(1, 1), (4, 1), (8, 2), (9, 1 + 3), (1_000, 4 + 9)] {
        let cost = added_at_first(&layer, move || {
            let set = TaskSet::current().unwrap();
            for _ in 0..n {
                set.spawn_graceful("task", |stop| async move { stop.is_cancelled() }).unwrap();
            }
        });
        assert_eq!(cost, n + 1 + n + more, "{n}");
    }
}

#[test]
fn a_timeout_costs_one_allocation_for_each_doubling() {
    let [layer, ..] = layers();
    for (n, more) in [(1, 1), (4, 1), (8, 2), (9, 1 + 3), (1_000, 4 + 9)] {
        let cost = added_at_first(&layer, move || {
            let set = TaskSet::current().unwrap();
            for _ in 0..n {
                let task = set.task("task").timeout(Duration::from_secs(60));
                task.spawn(pending::<()>()).unwrap();
            }
        });
        assert_eq!(cost, n + 1 + more, "{n}");
    }
}

#[test]
fn a_group_costs_two_allocations_and_its_tasks_one_for_four() {
    let [layer, ..] = layers();
    let cost = added_at_first(&layer, || {
        let set = TaskSet::current().unwrap();
        let group = set.group();
        for _ in 0..3 {
            group.spawn("task", ready(())).unwrap();
        }
        set.spawn("owner", group.wait()).unwrap();
    });
    assert_eq!(cost, 5 + 2 + 1);
}

#[test]
fn a_refusal_costs_nothing_where_there_is_a_set() {
    let runtime = runtime();
    let _entered = runtime.enter();
    let limited = |limit| set_of(&TaskRegistry::new().limit(limit));
    let closed = TaskRegistry::new();
    let set_of_closed = set_of(&closed);
    closed.close();
    let cancelled = set_of(&TaskRegistry::new());
    cancelled.cancel_all();
    let over = {
        let tasks = TaskRegistry::new();
        let mut service = TaskSetLayer::new(&tasks).layer(service_fn(answer));
        let response = now(service.call(Request::new(())));
        response.unwrap().extensions().get::<TaskSet>().unwrap().clone()
    };
    for (why, set) in [
        ("the limit is full", limited(SpawnLimit::new(0))),
        ("the request's share is taken", limited(SpawnLimit::new(9).per_request(0))),
        ("the registry is closed", set_of_closed),
        ("the set is cancelled", cancelled),
        ("the response is over", over),
    ] {
        let refused = || drop(set.spawn("task", async {}).unwrap_err());
        refused();
        let cost = measure(refused);
        assert_eq!(cost.count_total, 0, "{why}");
    }
}

/// A value that each task would have of its own, if it asked.
struct Own;

impl Inherit for Own {
    fn inherit(&self, _: &Task) -> Self {
        Self
    }
}

#[test]
fn a_context_that_its_tasks_do_not_read_costs_nothing() {
    let [layer, ..] = layers();
    for context in
        [RequestContext::new().with(7), RequestContext::new().with(7).with_inherited(Own)]
    {
        let cost = context.clone().sync_scope(|| {
            added_at_first(&layer, move || {
                // Nor one that is not read in the handler.
                spawn(async { tokio::task::yield_now().await });
                spawn(pending());
            })
        });
        assert_eq!(cost, 3);
    }
}

#[test]
fn a_value_of_its_own_that_a_task_reads_is_made_and_kept_once() {
    let [layer, ..] = layers();
    let context = RequestContext::new().with_inherited(Own);
    let cost = context.sync_scope(|| {
        added_at_first(&layer, || {
            spawn(async {
                assert!(RequestContext::current().get::<Own>().is_some());
                tokio::task::yield_now().await;
                assert!(RequestContext::current().get::<Own>().is_some());
            });
        })
    });
    // The value, a list of all such values while it is made, and two to keep it.
    assert_eq!(cost, 2 + 1 + 1 + 2);
}

// Sizes

/// A future of so many bytes, and of one allocation.
struct Sized<const N: usize>([u8; N]);

impl<const N: usize> Future for Sized<N> {
    type Output = ();

    fn poll(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<()> {
        Poll::Ready(())
    }
}

fn raw<const N: usize>(_: &TaskSet) -> (u64, u64) {
    let cost = measure(|| drop(tokio::spawn(Sized([0; N]))));
    (cost.count_total, cost.bytes_total)
}

fn ours<const N: usize>(set: &TaskSet) -> (u64, u64) {
    let cost = measure(|| drop(set.spawn("task", Sized([0; N])).unwrap()));
    (cost.count_total, cost.bytes_total)
}

#[test]
fn a_task_is_at_most_16_bytes_larger_than_the_runtimes_own() {
    // As the runtime's steps show: it rounds its one allocation up to 128 bytes.
    type Cost = fn(&TaskSet) -> (u64, u64);
    let pairs: [(usize, Cost, Cost); 17] = [
        (0, ours::<0>, raw::<16>),
        (1, ours::<1>, raw::<17>),
        (8, ours::<8>, raw::<24>),
        (9, ours::<9>, raw::<25>),
        (24, ours::<24>, raw::<40>),
        (120, ours::<120>, raw::<136>),
        (128, ours::<128>, raw::<144>),
        (136, ours::<136>, raw::<152>),
        (137, ours::<137>, raw::<153>),
        (144, ours::<144>, raw::<160>),
        (256, ours::<256>, raw::<272>),
        (264, ours::<264>, raw::<280>),
        (265, ours::<265>, raw::<281>),
        (512, ours::<512>, raw::<528>),
        (520, ours::<520>, raw::<536>),
        (1_000, ours::<1_000>, raw::<1_016>),
        (1_500, ours::<1_500>, raw::<1_516>),
    ];
    let mut steps = BTreeSet::new();
    for (bytes, ours, raw) in pairs {
        let runtime = runtime();
        let tasks = TaskRegistry::new();
        runtime.block_on(async {
            let set = set_of(&tasks);
            // So that both find the runtime as they leave it.
            let (_, _) = (raw(&set), ours(&set));
            settle().await;
            let (raw, ours) = (raw(&set), ours(&set));
            assert_eq!((raw.0, ours.0), (1, 1));
            assert!(ours.1 <= raw.1, "a future of {bytes}: {} bytes for {}", ours.1, raw.1);
            steps.insert(raw.1);
        });
    }
    assert!(steps.len() > 4, "the sizes reach over some steps: {steps:?}");
}

/// The set of a request that goes on.
fn set_of(tasks: &TaskRegistry) -> TaskSet {
    let mut service = TaskSetLayer::new(tasks).layer(service_fn(answer));
    let response = now(service.call(Request::new(()))).unwrap();
    let set = response.extensions().get::<TaskSet>().unwrap().clone();
    mem::forget(set.hold());
    set
}

/// Puts its set into the response, whose body is not at its end.
async fn answer(_: Request<()>) -> Result<Response<Frameless>, Infallible> {
    let mut response = Response::new(Frameless);
    response.extensions_mut().insert(TaskSet::current().unwrap());
    Ok(response)
}

struct Frameless;

impl Body for Frameless {
    type Data = bytes::Bytes;
    type Error = Infallible;

    fn poll_frame(
        self: Pin<&mut Self>,
        _: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Self::Data>, Infallible>>> {
        Poll::Pending
    }
}

fn now<F: Future>(future: F) -> F::Output {
    let mut future = pin!(future);
    match future.as_mut().poll(&mut Context::from_waker(Waker::noop())) {
        Poll::Ready(output) => output,
        Poll::Pending => panic!("it is not ready"),
    }
}

#[test]
fn an_error_is_so_small_that_a_result_is_no_larger_than_the_runtimes_own() {
    assert!(size_of::<TaskError>() <= 16);
    assert_eq!(size_of::<Result<Result<(), TaskError>, JoinError>>(), 24);
    assert_eq!(size_of::<Result<(), JoinError>>(), 24);
}
