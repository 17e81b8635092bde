//! What becomes of a task when its response is over: by its lifetime, whatever the end, wherever
//! either was chosen.

use std::{
    future::poll_fn,
    panic::{AssertUnwindSafe, catch_unwind},
    pin::{Pin, pin},
    sync::{Arc, Mutex, mpsc},
    task::{Context, Poll, Wake},
    time::Duration,
};

use bytes::Bytes;
use http::{Request, Response};
use http_body_util::Empty;
use tokio::{
    sync::oneshot,
    time::{Instant, advance, sleep, timeout},
};
use tower::{
    Layer, Service, ServiceExt,
    retry::{Policy, RetryLayer},
    service_fn,
};
use tower_request_context::RequestContext;
use tower_response_end::{RequestBody, ResponseEndLayer};
use tower_task_set::{
    AtEnd, Cause, End, Hold, NewTask, Plain, SpawnError, TaskHandle, TaskRegistry, TaskSet,
    TaskSetLayer, TaskState,
};

use crate::support::*;

const DRAIN: AtEnd = AtEnd::Drain(secs(7));
const LIFETIMES: [AtEnd; 3] = [AtEnd::Cancel, DRAIN, AtEnd::Keep];

/// Asserts that `task`, whose response has just ended, ends as its lifetime says.
async fn assert_lives(
    tasks: &TaskRegistry,
    mut task: TaskHandle<()>,
    open: oneshot::Sender<()>,
    lifetime: AtEnd,
    end: End,
) {
    let start = Instant::now();
    let says = || {
        let live = &tasks.snapshot().live_tasks[0];
        (live.state, live.at_end)
    };
    match lifetime {
        AtEnd::Cancel => {
            assert_eq!(outcome(task).await, Yield::Cancelled(cause(end)));
            assert_eq!(start.elapsed(), Duration::ZERO);
        }
        AtEnd::Drain(time) => {
            assert_eq!(says(), (TaskState::Draining, lifetime));
            let slack = Duration::from_millis(5);
            let early = time.saturating_sub(slack);
            assert!(timeout(early, &mut task).await.is_err(), "it has its time");
            assert_eq!(outcome(task).await, Yield::Cancelled(cause(end)));
            let lived = start.elapsed();
            assert!(lived >= time && lived < time + slack, "{lived:?}");
        }
        _ => {
            assert_eq!(says(), (TaskState::Kept, lifetime));
            assert!(timeout(secs(86_400), &mut task).await.is_err());
            open.send(()).unwrap();
            assert_eq!(outcome(task).await, COMPLETED);
        }
    }
}

/// A handler that spawns a task, and then ends like this before there is a head.
async fn end_before_the_head(
    layer: &TaskSetLayer,
    spawn: impl FnOnce(&TaskSet) -> TaskHandle<()> + Send,
    end: End,
) -> TaskHandle<()> {
    let (tell, told) = oneshot::channel();
    let mut spawn = Some((spawn, tell));
    let service = layer.layer(service_fn(|_: Request<()>| {
        let (spawn, tell) = spawn.take().unwrap();
        async move {
            tell.send(spawn(&TaskSet::current().unwrap())).unwrap();
            match end {
                End::Completed => Ok(Response::new(Empty::<Bytes>::new())),
                End::Failed => Err(Broken),
                End::Panicked => panic!("the handler panics"),
                _ => std::future::pending().await,
            }
        }
    }));
    let mut response = Box::pin(service.oneshot(Request::new(())));
    match end {
        End::Panicked => {
            catch_unwind(AssertUnwindSafe(|| poll_once(response.as_mut()).is_ready())).unwrap_err();
        }
        _ => drop(poll_once(response.as_mut())),
    }
    drop(response);
    told.await.unwrap()
}

#[derive(Clone, Copy, Debug)]
enum Place {
    Registry,
    Layer,
    Set,
    Task,
}

const PLACES: [Place; 4] = [Place::Registry, Place::Layer, Place::Set, Place::Task];

fn layer_with(tasks: &TaskRegistry, place: Place, lifetime: AtEnd) -> TaskSetLayer {
    match place {
        Place::Registry => TaskSetLayer::new(&tasks.clone().at_end(lifetime)),
        Place::Layer => TaskSetLayer::new(tasks).at_end(lifetime),
        Place::Set | Place::Task => TaskSetLayer::new(tasks),
    }
}

fn spawn_with(
    set: &TaskSet,
    place: Place,
    lifetime: AtEnd,
    future: impl Future<Output = ()> + Send + 'static,
) -> TaskHandle<()> {
    match place {
        Place::Registry | Place::Layer => set.spawn("task", future).unwrap(),
        Place::Set => {
            set.at_end(lifetime);
            set.spawn("task", future).unwrap()
        }
        Place::Task => set.task("task").at_end(lifetime).spawn(future).unwrap(),
    }
}

#[tokio::test(start_paused = true)]
async fn a_lifetime_holds_for_every_end_in_the_body_wherever_it_was_chosen() {
    for place in PLACES {
        for lifetime in LIFETIMES {
            for end in ENDS {
                let tasks = TaskRegistry::new();
                let request = serve(&layer_with(&tasks, place, lifetime));
                let (open, gate) = gate();
                let task = spawn_with(&request.set, place, lifetime, gate);
                settle().await;
                request.end(end);
                assert_lives(&tasks, task, open, lifetime, end).await;
            }
        }
    }
}

#[tokio::test(start_paused = true)]
async fn a_lifetime_holds_for_every_end_before_the_head_wherever_it_was_chosen() {
    for place in PLACES {
        for lifetime in LIFETIMES {
            for end in ENDS {
                let tasks = TaskRegistry::new();
                let (open, gate) = gate();
                let spawn = |set: &TaskSet| spawn_with(set, place, lifetime, gate);
                let layer = layer_with(&tasks, place, lifetime);
                let task = end_before_the_head(&layer, spawn, end).await;
                assert_lives(&tasks, task, open, lifetime, end).await;
            }
        }
    }
}

#[tokio::test(start_paused = true)]
async fn by_default_a_task_drains_for_30_seconds() {
    let tasks = TaskRegistry::new();
    let request = serve(&TaskSetLayer::new(&tasks));
    let (open, gate) = gate();
    let task = request.set.spawn("task", gate).unwrap();
    request.end(End::Disconnected);
    assert_eq!(AtEnd::default(), AtEnd::Drain(secs(30)));
    assert_lives(&tasks, task, open, AtEnd::Drain(secs(30)), End::Disconnected).await;
}

#[tokio::test(start_paused = true)]
async fn a_task_that_drains_can_finish() {
    let tasks = TaskRegistry::new();
    let request = serve(&TaskSetLayer::new(&tasks).at_end(DRAIN));
    let (open, gate) = gate();
    let task = request.set.spawn("task", gate).unwrap();
    request.end(End::Disconnected);
    tokio::time::advance(secs(6)).await;
    open.send(()).unwrap();
    assert_eq!(outcome(task).await, COMPLETED);
    // Its deadline is gone with it, and hits nobody.
    tokio::time::advance(secs(60)).await;
    assert_ledger(&tasks, "completed 1");
}

#[tokio::test(start_paused = true)]
async fn tasks_with_lifetimes_of_their_own_do_not_hold_each_other_back() {
    let tasks = TaskRegistry::new();
    let request = serve(&TaskSetLayer::new(&tasks).at_end(DRAIN));
    let start = Instant::now();
    let spawn = |time| {
        let task = request.set.task("task").at_end(AtEnd::Drain(time));
        let task = task.spawn(forever()).unwrap();
        async move {
            assert_eq!(outcome(task).await, Yield::Cancelled(Cause::Completed));
            start.elapsed().as_secs()
        }
    };
    let (late, early, at_once) = (spawn(secs(20)), spawn(secs(2)), spawn(secs(0)));
    let usual = request.set.spawn("task", forever()).unwrap();
    request.end(End::Completed);
    assert_eq!(at_once.await, 0);
    assert_eq!(early.await, 2);
    outcome(usual).await;
    assert_eq!(start.elapsed().as_secs(), 7);
    assert_eq!(late.await, 20);
}

#[tokio::test(start_paused = true)]
async fn however_many_tasks_wait_all_are_told() {
    for lifetime in [AtEnd::Cancel, DRAIN] {
        for waiting in [31, 32, 33, 64, 65, 1_000] {
            let tasks = TaskRegistry::new();
            let request = serve(&TaskSetLayer::new(&tasks).at_end(lifetime));
            for n in 0..waiting {
                let task = request.set.task("task");
                // Some have a choice of their own, and some have not waited yet.
                let task = if n % 3 == 0 { task.at_end(lifetime) } else { task };
                task.spawn(forever()).unwrap();
                if n == waiting / 2 {
                    tokio::time::advance(Duration::from_millis(1)).await;
                }
            }
            request.end(End::Completed);
            tasks.close();
            tasks.wait().await;
            assert_ledger(&tasks, &format!("cancelled {waiting}"));
        }
    }
}

// Which of several choices counts

/// One choice among those of a registry, a layer, a set and a task: a lifetime for all ends, and an
/// exception. Which it is can be told by its seconds.
#[derive(Clone, Copy)]
struct Choices(u8);

impl Choices {
    fn at_end(self, place: Place) -> Option<AtEnd> {
        (self.0 & 1 << place as u8 != 0).then(|| AtEnd::Drain(secs(100 + place as u64)))
    }

    fn on(self, place: Place) -> Option<AtEnd> {
        (self.0 & 16 << place as u8 != 0).then(|| AtEnd::Drain(secs(200 + place as u64)))
    }

    /// The first given of those that count.
    fn expected(self, is_exception: bool) -> AtEnd {
        let set = [Place::Set, Place::Layer, Place::Registry];
        let on = |place| self.on(place).filter(|_| is_exception);
        on(Place::Task)
            .or(self.at_end(Place::Task))
            .or_else(|| set.into_iter().find_map(on))
            .or_else(|| set.into_iter().find_map(|place| self.at_end(place)))
            .unwrap_or_default()
    }
}

#[tokio::test]
async fn of_all_choices_the_first_given_in_the_order_of_the_contract_counts() {
    const EXCEPTION: End = End::Failed;
    for choices in (0..=u8::MAX).map(Choices) {
        for end in [EXCEPTION, End::Completed] {
            let mut tasks = TaskRegistry::new();
            if let Some(lifetime) = choices.at_end(Place::Registry) {
                tasks = tasks.at_end(lifetime);
            }
            if let Some(lifetime) = choices.on(Place::Registry) {
                tasks = tasks.on(EXCEPTION, lifetime);
            }
            let mut layer = TaskSetLayer::new(&tasks);
            if let Some(lifetime) = choices.on(Place::Layer) {
                layer = layer.on(EXCEPTION, lifetime);
            }
            if let Some(lifetime) = choices.at_end(Place::Layer) {
                layer = layer.at_end(lifetime);
            }
            let request = serve(&layer);
            let mut task = request.set.task("task");
            if let Some(lifetime) = choices.on(Place::Task) {
                task = task.on(EXCEPTION, lifetime);
            }
            if let Some(lifetime) = choices.at_end(Place::Task) {
                task = task.at_end(lifetime);
            }
            task.spawn(forever()).unwrap();
            // The set may choose when the task is there already.
            if let Some(lifetime) = choices.at_end(Place::Set) {
                request.set.at_end(lifetime);
            }
            if let Some(lifetime) = choices.on(Place::Set) {
                request.set.on(EXCEPTION, lifetime);
            }
            request.end(end);
            let found = tasks.snapshot().live_tasks[0].at_end;
            assert_eq!(found, choices.expected(end == EXCEPTION), "{:#010b} {end:?}", choices.0);
        }
    }
}

#[tokio::test(start_paused = true)]
async fn an_exception_can_be_of_any_lifetime_for_any_end() {
    for exception in ENDS {
        for lifetime in LIFETIMES {
            for end in ENDS {
                let other = if lifetime == AtEnd::Keep { AtEnd::Cancel } else { AtEnd::Keep };
                let expected = if end == exception { lifetime } else { other };
                for of_task in [false, true] {
                    let tasks = TaskRegistry::new();
                    let layer = TaskSetLayer::new(&tasks).at_end(other);
                    let layer = if of_task { layer } else { layer.on(exception, lifetime) };
                    let request = serve(&layer);
                    let (open, gate) = gate();
                    let mut task = request.set.task("task");
                    if of_task {
                        task = task.on(exception, lifetime);
                    }
                    let task = task.spawn(gate).unwrap();
                    settle().await;
                    request.end(end);
                    assert_lives(&tasks, task, open, expected, end).await;
                }
            }
        }
    }
}

#[tokio::test]
async fn of_two_exceptions_for_one_end_the_later_counts() {
    let tasks = TaskRegistry::new();
    let layer = TaskSetLayer::new(&tasks).on(End::Failed, AtEnd::Keep).on(End::Failed, DRAIN);
    let request = serve(&layer);
    request.set.spawn("task", forever()).unwrap();
    request.end(End::Failed);
    assert_eq!(tasks.snapshot().live_tasks[0].at_end, DRAIN);
}

#[tokio::test]
async fn a_choice_on_a_clone_is_the_clones() {
    let tasks = TaskRegistry::new().at_end(DRAIN);
    let kept = tasks.clone().at_end(AtEnd::Keep);
    let layer = TaskSetLayer::new(&kept);
    let cancelled = layer.clone().at_end(AtEnd::Cancel);
    for (layer, lifetime) in
        [(TaskSetLayer::new(&tasks), DRAIN), (layer, AtEnd::Keep), (cancelled, AtEnd::Cancel)]
    {
        let request = serve(&layer);
        request.set.spawn("task", forever()).unwrap();
        assert_eq!(tasks.snapshot().live_tasks[0].at_end, lifetime);
        request.set.cancel_all();
        settle().await;
    }
}

#[tokio::test(start_paused = true)]
async fn what_is_chosen_for_a_set_whose_response_is_over_changes_nothing() {
    let tasks = TaskRegistry::new();
    let request = serve(&TaskSetLayer::new(&tasks).at_end(DRAIN));
    let set = request.set.clone();
    let (open, gate) = gate();
    let task = set.spawn("task", gate).unwrap();
    request.end(End::Completed);
    set.at_end(AtEnd::Keep);
    set.on(End::Completed, AtEnd::Cancel);
    assert_lives(&tasks, task, open, DRAIN, End::Completed).await;
}

#[test]
fn a_lifetime_is_shown_in_words() {
    for (lifetime, text) in [(AtEnd::Cancel, "cancel"), (DRAIN, "drain(7s)"), (AtEnd::Keep, "keep")]
    {
        assert_eq!(lifetime.to_string(), text);
    }
}

// Times that are too short or too long

#[tokio::test(start_paused = true)]
async fn a_drain_of_no_time_is_a_cancellation() {
    for of_task in [false, true] {
        let tasks = TaskRegistry::new();
        let request = serve(&TaskSetLayer::new(&tasks).at_end(AtEnd::Drain(Duration::ZERO)));
        let mut task = request.set.task("task");
        if of_task {
            task = task.at_end(AtEnd::Drain(Duration::ZERO));
        }
        let polled = Flag::default();
        let poll = polled.clone();
        let task = task.spawn(poll_fn(move |_| {
            poll.set();
            Poll::<()>::Pending
        }));
        request.end(End::Completed);
        assert_eq!(outcome(task.unwrap()).await, Yield::Cancelled(Cause::Completed));
        assert!(!polled.is_set());
    }
}

#[tokio::test(start_paused = true)]
async fn a_drain_that_is_too_long_to_count_lasts_for_ever() {
    for of_task in [false, true] {
        let tasks = TaskRegistry::new();
        let forever_long = AtEnd::Drain(Duration::MAX);
        let request = serve(&TaskSetLayer::new(&tasks).at_end(forever_long));
        let (open, gate) = gate();
        let mut task = request.set.task("task");
        if of_task {
            task = task.at_end(forever_long);
        }
        let mut task = task.spawn(gate).unwrap();
        request.end(End::Completed);
        assert!(timeout(secs(31_536_000), &mut task).await.is_err());
        let live = &tasks.snapshot().live_tasks[0];
        assert_eq!((live.state, live.at_end), (TaskState::Draining, forever_long));
        open.send(()).unwrap();
        assert_eq!(outcome(task).await, COMPLETED);
    }
}

// A task's own timeout

#[tokio::test(start_paused = true)]
async fn a_timeout_counts_from_the_spawn_on_whatever_the_response_does() {
    for end in [None, Some(End::Completed), Some(End::Disconnected)] {
        for lifetime in [DRAIN, AtEnd::Keep] {
            let tasks = TaskRegistry::new();
            let request = serve(&TaskSetLayer::new(&tasks).at_end(lifetime));
            let start = Instant::now();
            let task = request.set.task("task").timeout(secs(5)).spawn(forever()).unwrap();
            tokio::time::advance(secs(2)).await;
            let _open = match end {
                Some(end) => {
                    request.end(end);
                    None
                }
                None => Some(request),
            };
            assert_eq!(outcome(task).await, Yield::TimedOut);
            assert_eq!(start.elapsed().as_secs(), 5);
            assert_ledger(&tasks, "timed out 1");
        }
    }
}

#[tokio::test(start_paused = true)]
async fn timeouts_near_and_far_come_when_they_should_in_whatever_order_they_are_set() {
    let tasks = TaskRegistry::new();
    let request = serve(&TaskSetLayer::new(&tasks));
    let timeouts = [90_000, 2_000, 30_250, 500, 1_000, 1_001, 3_600_000, 2_000, 61_000, 3, 30_249];
    let start = Instant::now();
    // One that is done, and was the first of all that are far away.
    let done = request.set.task("done").timeout(Duration::from_millis(1_500)).spawn(async {});
    assert_eq!(outcome(done.unwrap()).await, Yield::Completed(()));
    let live = timeouts.map(|millis| {
        let timeout = Duration::from_millis(millis);
        let task = request.set.task("task").timeout(timeout).spawn(forever()).unwrap();
        tokio::spawn(async move { (outcome(task).await, start.elapsed(), timeout) })
    });
    for task in live {
        let (found, lived, timeout) = task.await.unwrap();
        assert_eq!(found, Yield::TimedOut);
        let late = lived.checked_sub(timeout);
        assert!(late.is_some_and(|late| late < Duration::from_millis(5)), "{lived:?}: {timeout:?}");
    }
    // The reaper sleeps for a second more, and another one starts.
    sleep(secs(5)).await;
    let last = request.set.task("last").timeout(secs(7)).spawn(forever()).unwrap();
    let start = Instant::now();
    assert_eq!(outcome(last).await, Yield::TimedOut);
    assert!(start.elapsed() >= secs(7) && start.elapsed() < Duration::from_millis(7_005));
}

#[tokio::test(start_paused = true)]
async fn each_of_thousands_of_timeouts_comes_while_tasks_come_and_go() {
    const MANY: u64 = 5_000;
    let tasks = TaskRegistry::new();
    let request = serve(&TaskSetLayer::new(&tasks));
    let start = Instant::now();
    let spawn = |millis| {
        let timeout = (start + Duration::from_millis(millis)).duration_since(Instant::now());
        (millis, request.set.task("task").timeout(timeout).spawn(forever()).unwrap())
    };
    let mut live: Vec<_> = (0..MANY).map(|n| spawn(1_500 + n * 7 % MANY)).collect();
    for round in 0..4 {
        sleep(Duration::from_millis(300)).await;
        for at in (round..2_000).step_by(4) {
            let place = usize::try_from(at).unwrap();
            let (_, gone) = std::mem::replace(&mut live[place], spawn(3_000 + at));
            gone.cancel();
        }
    }
    let ends = live.into_iter().map(|(millis, task)| {
        let end = tokio::spawn(async move { (outcome(task).await, start.elapsed()) });
        (Duration::from_millis(millis), end)
    });
    for (due, end) in ends.collect::<Vec<_>>() {
        let (found, lived) = end.await.unwrap();
        assert_eq!(found, Yield::TimedOut);
        assert!(lived >= due && lived < due + Duration::from_millis(5), "{lived:?}: {due:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn of_a_timeout_and_a_drain_the_earlier_ends_the_task() {
    let tasks = TaskRegistry::new();
    let request = serve(&TaskSetLayer::new(&tasks).at_end(DRAIN));
    let start = Instant::now();
    let drains = request.set.task("task").timeout(secs(100)).spawn(forever()).unwrap();
    let own = request.set.task("task").at_end(AtEnd::Drain(secs(8))).timeout(secs(100));
    let own = own.spawn(forever()).unwrap();
    request.end(End::Completed);
    assert_eq!(outcome(drains).await, Yield::Cancelled(Cause::Completed));
    assert_eq!(start.elapsed().as_secs(), 7);
    assert_eq!(outcome(own).await, Yield::Cancelled(Cause::Completed));
    assert_eq!(start.elapsed().as_secs(), 8);
}

#[tokio::test(start_paused = true)]
async fn a_task_that_is_ready_in_time_is_not_hurt_by_its_timeout() {
    let tasks = TaskRegistry::new();
    let request = serve(&TaskSetLayer::new(&tasks));
    let task = request.set.task("task").timeout(secs(5)).spawn(async { 8 }).unwrap();
    assert_eq!(outcome(task).await, Yield::Completed(8));
    // The next one in its place is not hurt either.
    let mut next = request.set.spawn("next", forever()).unwrap();
    assert!(timeout(secs(60), &mut next).await.is_err());
}

#[tokio::test(start_paused = true)]
async fn a_timeout_of_no_time_ends_a_task_that_waits_and_one_too_long_to_count_never_comes() {
    let tasks = TaskRegistry::new();
    let start = Instant::now();
    let none = tasks.task("task").timeout(Duration::ZERO).spawn(forever()).unwrap();
    assert_eq!(outcome(none).await, Yield::TimedOut);
    // The clock of a runtime has millisecond steps.
    assert!(start.elapsed() <= Duration::from_millis(1));
    let mut max = tasks.task("task").timeout(Duration::MAX).spawn(forever()).unwrap();
    assert!(timeout(secs(31_536_000), &mut max).await.is_err());
}

#[tokio::test(start_paused = true)]
async fn many_deadlines_are_kept_in_their_order() {
    let tasks = TaskRegistry::new();
    let start = Instant::now();
    let ended = Log::new();
    // In an order of spawning that is none of their deadlines'.
    for at in (1..=1_000).map(|n| n * 389 % 1_000 + 1) {
        let log = ended.clone();
        let task = tasks.task("task").timeout(Duration::from_millis(at * 10)).spawn(async move {
            let _on_drop = OnDrop::new(move || log.push((at * 10, start.elapsed())));
            forever().await;
        });
        drop(task.unwrap());
    }
    tasks.close();
    tasks.wait().await;
    let ended = ended.take();
    assert_eq!(ended.len(), 1_000);
    assert!(ended.is_sorted_by_key(|(due, _)| *due));
    for (due, at) in ended {
        let due = Duration::from_millis(due);
        assert!(at >= due && at <= due + Duration::from_millis(2), "{due:?} {at:?}");
    }
    assert_ledger(&tasks, "timed out 1000");
}

#[tokio::test(start_paused = true)]
async fn a_drain_of_any_length_ends_on_time_whatever_others_there_are() {
    let tasks = TaskRegistry::new();
    let ended = Log::new();
    let waits_until = |due: Instant| {
        let log = ended.clone();
        async move {
            let _on_drop = OnDrop::new(move || log.push((due, Instant::now())));
            forever().await;
        }
    };
    let around_a_second = [1, 500, 999, 1_000, 1_001, 1_017, 1_999, 2_000, 2_500];
    let far = [59_300, 3_600_000];
    let any = (0..100).map(|n| n * 7_919 % 5_000 + 1);
    for millis in around_a_second.into_iter().chain(far).chain(any) {
        let drain = Duration::from_millis(millis);
        let request = serve(&TaskSetLayer::new(&tasks).at_end(AtEnd::Drain(drain)));
        let due = Instant::now() + drain;
        // Of the set, of the task, and of a child that is spawned when the response is over.
        let set = &request.set;
        drop(set.spawn("of set", waits_until(due)));
        drop(set.task("of task").at_end(AtEnd::Drain(drain)).spawn(waits_until(due)));
        let (open, gate) = gate();
        let child = waits_until(due);
        let parent = set.spawn("parent", async move {
            gate.await;
            let set = TaskSet::current().unwrap();
            drop(set.task("child").at_end(AtEnd::Keep).spawn(child));
        });
        request.end(End::Completed);
        open.send(()).unwrap();
        parent.unwrap().await.unwrap();
        // At all phases of whatever has a period.
        tokio::time::sleep(Duration::from_millis(7)).await;
    }
    tasks.close();
    tasks.wait().await;
    let ended = ended.take();
    assert_eq!(ended.len(), 3 * 111);
    for (due, at) in ended {
        assert!(at >= due, "{:?} early", due.saturating_duration_since(at));
        let late = at.saturating_duration_since(due);
        assert!(late <= Duration::from_millis(2), "{late:?} late");
    }
}

#[tokio::test(start_paused = true)]
async fn when_no_deadline_is_left_nothing_runs_that_is_not_a_task_of_somebody() {
    let alive = || tokio::runtime::Handle::current().metrics().num_alive_tasks();
    let tasks = TaskRegistry::new();
    assert_eq!(alive(), 0);
    let request = serve(&TaskSetLayer::new(&tasks));
    let (open, gate) = gate();
    let task = request.set.task("task").timeout(secs(3_600)).spawn(gate).unwrap();
    request.end(End::Completed);
    open.send(()).unwrap();
    task.await.unwrap();
    tokio::time::advance(secs(2)).await;
    settle().await;
    assert_eq!(alive(), 0);
    // And again, when there is one.
    let task = tasks.task("task").timeout(secs(1)).spawn(forever()).unwrap();
    assert_eq!(outcome(task).await, Yield::TimedOut);
}

#[tokio::test(start_paused = true)]
async fn tasks_that_end_without_an_await_start_nothing_that_keeps_their_deadline() {
    let alive = || tokio::runtime::Handle::current().metrics().num_alive_tasks();
    let tasks = TaskRegistry::new();
    let request = serve(&TaskSetLayer::new(&tasks));
    let task = request.set.spawn("task", async {}).unwrap();
    request.end(End::Completed);
    task.await.unwrap();
    assert_eq!(alive(), 0);
}

#[tokio::test(start_paused = true)]
async fn a_task_whose_time_was_over_before_it_first_ran_ends_at_its_first_await() {
    for timeout in [false, true] {
        let tasks = TaskRegistry::new();
        let request = serve(&TaskSetLayer::new(&tasks).at_end(AtEnd::Drain(secs(10))));
        let mut new = request.set.task("task");
        if timeout {
            new = new.timeout(secs(10));
        }
        let task = new.spawn(forever()).unwrap();
        request.end(End::Completed);
        // Nothing has run since, not even what keeps the time.
        tokio::time::advance(secs(11)).await;
        settle().await;
        assert!(task.is_finished());
        let late = if timeout { Yield::TimedOut } else { Yield::Cancelled(Cause::Completed) };
        assert_eq!(outcome(task).await, late);
    }
}

#[tokio::test(start_paused = true)]
async fn a_task_that_first_awaits_after_its_response_has_its_time_from_the_end_on() {
    let tasks = TaskRegistry::new();
    let request = serve(&TaskSetLayer::new(&tasks).at_end(AtEnd::Drain(secs(10))));
    let ended = Instant::now();
    let task = request.set.spawn("task", forever()).unwrap();
    request.end(End::Completed);
    assert_eq!(outcome(task).await, Yield::Cancelled(Cause::Completed));
    assert_eq!(ended.elapsed(), secs(10));
}

#[tokio::test(start_paused = true)]
async fn a_closure_that_is_spawned_after_the_response_by_a_task_that_never_awaits_is_told_in_time()
{
    let tasks = TaskRegistry::new();
    let request = serve(&TaskSetLayer::new(&tasks).at_end(AtEnd::Drain(secs(10))));
    let set = request.set.clone();
    let (start, started) = std::sync::mpsc::channel();
    let spawns = request.set.spawn("spawns", async move {
        let blocks = set.spawn_blocking("blocks", move |stop| {
            start.send(()).unwrap();
            while stop.cause().is_none() {
                std::thread::yield_now();
            }
            stop.cause()
        });
        blocks.unwrap()
    });
    request.end(End::Completed);
    let blocks = spawns.unwrap().await.unwrap();
    started.recv().unwrap();
    tokio::time::advance(secs(9)).await;
    settle().await;
    assert!(!blocks.is_finished());
    tokio::time::advance(secs(2)).await;
    assert_eq!(outcome(blocks).await, Yield::Completed(Some(Cause::Completed)));
}

// Children

/// Spawns a child of these choices from a task with the lifetime `parent`, when this much of its
/// time after the response is gone; and says how long it lives from then on, or why not.
async fn child_lives(
    parent: AtEnd,
    parent_is_of_set: bool,
    gone: Duration,
    choose: impl FnOnce(NewTask<'_>) -> NewTask<'_> + Send + 'static,
) -> Result<Option<Duration>, SpawnError> {
    const LONG: Duration = secs(100_000);
    let tasks = TaskRegistry::new();
    let layer = TaskSetLayer::new(&tasks);
    let request = serve(&if parent_is_of_set { layer.at_end(parent) } else { layer });
    let (open, gate) = gate();
    let (tell, told) = oneshot::channel();
    let mut task = request.set.task("parent");
    if !parent_is_of_set {
        task = task.at_end(parent);
    }
    let parent = task.spawn(async move {
        gate.await;
        let set = TaskSet::current().unwrap();
        let child = choose(set.task("child")).spawn(forever());
        tell.send(child.map_err(|refused| refused.reason)).unwrap();
    });
    request.end(End::Completed);
    tokio::time::advance(gone).await;
    open.send(()).unwrap();
    let start = Instant::now();
    let mut child = told.await.unwrap()?;
    // The parent is gone: a child's time does not hang on its parent's life.
    assert_eq!(outcome(parent.unwrap()).await, COMPLETED);
    match timeout(LONG, &mut child).await {
        Ok(ended) => {
            assert_eq!(yielded(ended), Yield::Cancelled(Cause::Completed));
            Ok(Some(Duration::from_secs(start.elapsed().as_secs())))
        }
        Err(_) => Ok(None),
    }
}

#[tokio::test(start_paused = true)]
async fn when_the_response_is_over_a_child_has_at_most_the_time_of_its_parent() {
    let parents = [AtEnd::Drain(secs(10)), AtEnd::Drain(Duration::MAX), AtEnd::Keep];
    let children = [
        None,
        Some(AtEnd::Keep),
        Some(AtEnd::Drain(secs(3))),
        Some(AtEnd::Drain(secs(8))),
        Some(AtEnd::Drain(Duration::MAX)),
    ];
    for parent in parents {
        for of_set in [true, false] {
            for child in children {
                let lives = child_lives(parent, of_set, secs(4), move |task| match child {
                    Some(child) => task.at_end(child),
                    None => task,
                });
                let left = (parent == AtEnd::Drain(secs(10))).then_some(secs(6));
                let wants = match child {
                    Some(AtEnd::Drain(time)) if time < secs(100) => Some(time),
                    _ => None,
                };
                let expected = left.into_iter().chain(wants).min();
                assert_eq!(lives.await, Ok(expected), "{parent} {of_set} {child:?}");
            }
        }
    }
}

#[tokio::test(start_paused = true)]
async fn when_the_response_is_over_a_child_that_would_be_cancelled_is_refused() {
    for parent in [DRAIN, AtEnd::Keep] {
        for of_set in [true, false] {
            let lives = child_lives(parent, of_set, secs(1), |task| task.at_end(AtEnd::Cancel));
            assert_eq!(lives.await, Err(SpawnError::Closed));
        }
    }
}

#[tokio::test(start_paused = true)]
async fn a_childs_exception_for_the_end_that_came_counts_and_for_another_does_not() {
    for of_set in [true, false] {
        let lives = child_lives(DRAIN, of_set, secs(1), |task| {
            task.on(End::Completed, AtEnd::Drain(secs(2)))
        });
        assert_eq!(lives.await, Ok(Some(secs(2))));
        let lives = child_lives(DRAIN, of_set, secs(1), |task| task.on(End::Failed, AtEnd::Keep));
        assert_eq!(lives.await, Ok(Some(secs(6))), "of set: {of_set}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_childs_timeout_is_its_own() {
    let tasks = TaskRegistry::new();
    let request = serve(&TaskSetLayer::new(&tasks).at_end(AtEnd::Keep));
    let (open, gate) = gate();
    let parent = request.set.task("parent").timeout(secs(50)).spawn(async {
        gate.await;
        let set = TaskSet::current().unwrap();
        set.task("child").timeout(secs(5)).spawn(forever()).unwrap()
    });
    request.end(End::Completed);
    open.send(()).unwrap();
    let child = parent.unwrap().await.unwrap();
    let start = Instant::now();
    assert_eq!(outcome(child).await, Yield::TimedOut);
    assert_eq!(start.elapsed().as_secs(), 5);
}

#[tokio::test(start_paused = true)]
async fn while_the_response_goes_on_a_child_is_like_any_task_of_the_set() {
    let tasks = TaskRegistry::new();
    let request = serve(&TaskSetLayer::new(&tasks).at_end(AtEnd::Keep));
    let parent = request.set.task("parent").at_end(AtEnd::Cancel).spawn(async {
        let child = TaskSet::current().unwrap().spawn("child", forever()).unwrap();
        drop(child);
        forever().await;
    });
    settle().await;
    request.end(End::Disconnected);
    assert_eq!(outcome(parent.unwrap()).await, Yield::Cancelled(Cause::Disconnected));
    settle().await;
    let live = &tasks.snapshot().live_tasks;
    assert_eq!((live.len(), live[0].name, live[0].state), (1, "child", TaskState::Kept));
}

// Held open

#[tokio::test(start_paused = true)]
async fn a_hold_keeps_the_set_open_until_it_is_dropped() {
    for end in ENDS {
        let tasks = TaskRegistry::new();
        let request = serve(&TaskSetLayer::new(&tasks).at_end(AtEnd::Cancel));
        let set = request.set.clone();
        let hold = set.hold();
        let task = set.spawn("task", forever()).unwrap();
        request.end(end);
        tokio::time::advance(secs(3600)).await;
        assert_eq!(tasks.snapshot().live_tasks[0].state, TaskState::Running);
        let late = set.spawn("late", forever()).unwrap();
        // Also while it is held.
        set.on(End::Completed, AtEnd::Cancel);
        drop(hold);
        for task in [task, late] {
            assert_eq!(outcome(task).await, Yield::Cancelled(cause(end)));
        }
        assert_eq!(set.spawn("later", async {}).unwrap_err().reason, SpawnError::Closed);
        assert_ledger(&tasks, "refused 1, cancelled 2");
    }
}

#[tokio::test]
async fn a_set_is_held_until_the_last_hold_is_dropped() {
    let tasks = TaskRegistry::new();
    let request = serve(&TaskSetLayer::new(&tasks));
    let set = request.set.clone();
    let (first, second) = (set.hold(), set.hold());
    drop(first);
    request.end(End::Completed);
    let third = set.hold();
    drop(second);
    set.spawn("task", async {}).unwrap().await.unwrap();
    // On another thread, where nothing is current.
    std::thread::spawn(|| drop(third)).join().unwrap();
    set.spawn("late", async {}).unwrap_err();
}

#[tokio::test]
async fn a_hold_that_is_gone_before_the_end_or_comes_after_it_holds_nothing() {
    let tasks = TaskRegistry::new();
    let request = serve(&TaskSetLayer::new(&tasks).at_end(AtEnd::Keep));
    let set = request.set.clone();
    drop(set.hold());
    set.spawn("task", forever()).unwrap();
    request.end(End::Completed);
    set.spawn("late", async {}).unwrap_err();
    let hold: Hold = set.hold();
    set.spawn("late", async {}).unwrap_err();
    drop(hold);
    assert_ledger(&tasks, "refused 2, live 1");
}

#[tokio::test]
async fn a_set_that_is_held_can_be_cancelled() {
    let tasks = TaskRegistry::new();
    let request = serve(&TaskSetLayer::new(&tasks));
    let set = request.set.clone();
    let hold = set.hold();
    let task = set.spawn("task", forever()).unwrap();
    request.end(End::Completed);
    tasks.close();
    tasks.cancel_all();
    assert_eq!(outcome(task).await, Yield::Cancelled(Cause::Shutdown));
    now(tasks.wait());
    drop(hold);
    assert_ledger(&tasks, "cancelled 1");
}

#[tokio::test]
async fn a_hold_holds_the_layers_around_too() {
    let tasks = TaskRegistry::new();
    let ended = Log::new();
    let log = ended.clone();
    let around = ResponseEndLayer::new(move |_: &Request<()>| {
        let log = log.clone();
        move |end| log.push(end)
    });
    let layer = TaskSetLayer::new(&tasks);
    let mut request = serve_through(|handler| around.layer(layer.layer(handler)));
    let hold = request.in_poll(|| TaskSet::current().unwrap().hold());
    request.end(End::Disconnected);
    assert_eq!(ended.take(), []);
    drop(hold);
    assert_eq!(ended.take(), [End::Disconnected]);
}

#[tokio::test]
async fn a_hold_on_the_set_of_another_request_does_not_hold_the_one_here() {
    let tasks = TaskRegistry::new();
    let ended = Log::new();
    let log = ended.clone();
    let around = ResponseEndLayer::new(move |_: &Request<()>| {
        let log = log.clone();
        move |end| log.push(end)
    });
    let layer = TaskSetLayer::new(&tasks);
    let other = serve(&layer);
    let set = other.set.clone();
    let mut request = serve_through(|handler| around.layer(layer.layer(handler)));
    let hold = request.in_poll(move || set.hold());
    request.end(End::Completed);
    assert_eq!(ended.take(), [End::Completed]);
    let set = other.set.clone();
    other.end(End::Completed);
    set.spawn("task", async {}).unwrap();
    drop(hold);
    assert_eq!(set.spawn("task", async {}).unwrap_err().reason, SpawnError::Closed);
}

#[tokio::test]
async fn a_task_of_no_request_can_take_a_hold_and_leaves_nothing_behind() {
    let freed = Flag::default();
    let on_drop = freed.on_drop();
    let tasks = TaskRegistry::new().observer(move |_: &_| {
        let _ = &on_drop;
    });
    let hold = tasks.spawn("task", async { TaskSet::current().unwrap().hold() });
    let hold = hold.unwrap().await.unwrap();
    drop(hold);
    assert_ledger(&tasks, "completed 1");
    drop(tasks);
    settle().await;
    assert!(freed.is_set());
}

// Layers in layers

#[tokio::test]
async fn a_second_layer_of_one_registry_makes_no_second_set_and_adds_its_choices() {
    let tasks = TaskRegistry::new().at_end(AtEnd::Cancel);
    let outer = TaskSetLayer::new(&tasks).on(End::Failed, AtEnd::Keep);
    let inner = TaskSetLayer::new(&tasks).at_end(DRAIN);
    let between = Log::new();
    let log = between.clone();
    let mut request = serve_through(|handler| {
        let handler = inner.layer(handler).map_request(move |request| {
            log.push(TaskSet::current().unwrap());
            request
        });
        outer.layer(handler)
    });
    let between = between.take().pop().unwrap();
    between.spawn("task", forever()).unwrap();
    assert_eq!(request.set.len(), 1);
    assert_eq!(request.in_poll(|| TaskSet::current().unwrap().len()), 1);
    assert_eq!(tasks.snapshot().live_tasks[0].at_end, DRAIN);
    request.end(End::Failed);
    assert_eq!(tasks.snapshot().live_tasks[0].at_end, AtEnd::Keep);
    assert_ledger(&tasks, "live 1");
}

#[tokio::test]
async fn the_registrys_choice_does_not_count_again_for_a_second_layer() {
    let tasks = TaskRegistry::new().at_end(AtEnd::Cancel);
    let outer = TaskSetLayer::new(&tasks).at_end(AtEnd::Keep);
    let inner = TaskSetLayer::new(&tasks);
    let request = serve_through(|handler| outer.layer(inner.layer(handler)));
    request.set.spawn("task", forever()).unwrap();
    request.end(End::Failed);
    assert_eq!(tasks.snapshot().live_tasks[0].at_end, AtEnd::Keep);
}

#[tokio::test]
async fn the_response_of_an_inner_layer_of_the_same_registry_is_not_the_end() {
    // A middleware that reads the inner response whole, and answers with another.
    let tasks = TaskRegistry::new();
    let (outer, inner) = (TaskSetLayer::new(&tasks), TaskSetLayer::new(&tasks));
    let request = serve_through(|mut handler| {
        let inner = inner.layer(service_fn(|_: Request<()>| async {
            TaskSet::current().unwrap().spawn("inner", forever()).unwrap();
            Ok::<_, Broken>(Response::new(Empty::<Bytes>::new()))
        }));
        outer.layer(service_fn(move |request: Request<()>| {
            let mut inner = inner.clone();
            let answer = handler.call(request);
            async move {
                drop(inner.call(Request::new(())).await?);
                answer.await
            }
        }))
    });
    assert_eq!(request.set.len(), 1);
    assert_eq!(tasks.snapshot().live_tasks[0].state, TaskState::Running);
    request.set.spawn("more", forever()).unwrap();
}

#[tokio::test]
async fn of_two_layers_with_two_registries_the_inner_set_is_the_current_one() {
    let (outer, inner) = (TaskRegistry::new(), TaskRegistry::new());
    let (outer_layer, inner_layer) = (TaskSetLayer::new(&outer), TaskSetLayer::new(&inner));
    let between = Log::new();
    let log = between.clone();
    let mut request = serve_through(|handler| {
        let handler = inner_layer.layer(handler).map_request(move |request| {
            log.push(TaskSet::current().unwrap());
            request
        });
        outer_layer.layer(handler)
    });
    let outer_set = between.take().pop().unwrap();
    request.set.spawn("inner", forever()).unwrap();
    request.in_poll(|| TaskSet::current().unwrap().spawn("inner", forever()).unwrap());
    outer_set.spawn("outer", forever()).unwrap();
    assert_ledger(&inner, "live 2");
    assert_ledger(&outer, "live 1");
    let set = request.set.clone();
    request.end(End::Completed);
    assert!(set.spawn("late", async {}).is_err() && outer_set.spawn("late", async {}).is_err());
}

#[derive(Clone)]
struct Twice(u8);

impl<T, E> Policy<Request<()>, T, E> for Twice {
    type Future = std::future::Ready<()>;

    fn retry(&mut self, _: &mut Request<()>, _: &mut Result<T, E>) -> Option<Self::Future> {
        self.0 = self.0.checked_sub(1)?;
        Some(std::future::ready(()))
    }

    fn clone_request(&mut self, _: &Request<()>) -> Option<Request<()>> {
        Some(Request::new(()))
    }
}

#[tokio::test]
async fn a_request_that_is_tried_again_keeps_its_set() {
    let tasks = TaskRegistry::new();
    let handler = service_fn(|_: Request<()>| async {
        TaskSet::current().unwrap().spawn("try", forever()).unwrap();
        Ok::<_, Broken>(Response::new(Script::on_drop(|| {})))
    });
    let service = TaskSetLayer::new(&tasks).layer(RetryLayer::new(Twice(2)).layer(handler));
    let response = service.oneshot(Request::new(())).await.unwrap();
    assert_ledger(&tasks, "live 3");
    assert!(tasks.snapshot().live_tasks.iter().all(|task| task.state == TaskState::Running));
    drop(response);
    assert!(tasks.snapshot().live_tasks.iter().all(|task| task.state == TaskState::Draining));
}

// Other services

#[tokio::test]
async fn without_http_the_response_is_over_when_its_future_is() {
    let tasks = TaskRegistry::new().at_end(AtEnd::Cancel);
    let layer: TaskSetLayer<Plain> = TaskSetLayer::new(&tasks).plain();
    for (job, expected) in [
        ("ready", Cause::Completed),
        ("error", Cause::Failed),
        ("panic", Cause::Panicked),
        ("given up", Cause::Disconnected),
    ] {
        let task = Mutex::new(None);
        let service = layer.layer(service_fn(|job: &'static str| {
            let spawned = TaskSet::current().unwrap().spawn("task", forever()).unwrap();
            *task.lock().unwrap() = Some(spawned);
            async move {
                tokio::task::yield_now().await;
                match job {
                    "ready" => Ok(()),
                    "error" => Err(Broken),
                    "panic" => panic!("the worker panics"),
                    _ => std::future::pending().await,
                }
            }
        }));
        let mut response = Box::pin(service.oneshot(job));
        assert!(poll_once(response.as_mut()).is_pending());
        assert_eq!(tasks.snapshot().live_tasks[0].state, TaskState::Running);
        let poll = AssertUnwindSafe(|| poll_once(response.as_mut()).is_ready());
        let panicked = catch_unwind(poll).is_err();
        assert_eq!(panicked, job == "panic");
        drop(response);
        let task = task.into_inner().unwrap().unwrap();
        assert_eq!(outcome(task).await, Yield::Cancelled(expected), "{job}");
    }
}

/// A request body that fails.
struct BadUpload;

impl http_body::Body for BadUpload {
    type Data = &'static [u8];
    type Error = Broken;

    fn poll_frame(
        self: Pin<&mut Self>,
        _: &mut std::task::Context<'_>,
    ) -> Poll<Option<Result<http_body::Frame<Self::Data>, Broken>>> {
        Poll::Ready(Some(Err(Broken)))
    }
}

#[tokio::test]
async fn an_error_of_reading_the_request_ends_a_response_that_watches_for_it() {
    let tasks = TaskRegistry::new().at_end(AtEnd::Cancel);
    let layer = TaskSetLayer::new(&tasks).watch_request_body();
    let task = Mutex::new(None);
    let service = layer.layer(service_fn(|request: Request<RequestBody<BadUpload>>| {
        let spawned = TaskSet::current().unwrap().spawn("task", forever()).unwrap();
        *task.lock().unwrap() = Some(spawned);
        async {
            let mut body = Box::pin(request.into_body());
            let read = poll_fn(|cx| http_body::Body::poll_frame(body.as_mut(), cx)).await;
            assert!(read.unwrap().is_err());
            // It does not care, and goes on.
            std::future::pending::<Result<Response<Empty<Bytes>>, Broken>>().await
        }
    }));
    let mut response = Box::pin(service.oneshot(Request::new(BadUpload)));
    assert!(poll_once(response.as_mut()).is_pending());
    let task = task.lock().unwrap().take().unwrap();
    assert_eq!(outcome(task).await, Yield::Cancelled(Cause::Disconnected));
}

#[tokio::test(start_paused = true)]
async fn a_value_that_panics_in_its_drop_loses_no_deadline_of_others() {
    /// Drops a response when it is woken: as another thread may do at that time.
    struct Drops<T>(Mutex<Option<T>>);
    impl<T: Send + 'static> Wake for Drops<T> {
        fn wake(self: Arc<Self>) {
            drop(self.0.lock().unwrap().take());
        }
    }
    let tasks = TaskRegistry::new();
    let plain = TaskSetLayer::new(&tasks);
    let first = serve(&plain);
    let (tell, told) = mpsc::channel();
    let graceful =
        first.set.task("graceful").timeout(secs(1)).spawn_graceful(move |stop| async move {
            tell.send(stop.clone()).unwrap();
            stop.cancelled().await;
        });
    settle().await;
    let stop = told.recv().unwrap();
    // Its deadline is the last that has the set, and so the value.
    let value = OnDrop::new(|| panic!("the value panics"));
    let context = RequestContext::new().with(Arc::new(Mutex::new(value)));
    let response = context.sync_scope(|| serve(&plain.clone().deadline(secs(1))));
    let waker = Arc::new(Drops(Mutex::new(Some(response)))).into();
    let mut stopped = pin!(stop.cancelled());
    assert!(stopped.as_mut().poll(&mut Context::from_waker(&waker)).is_pending());
    drop(waker);
    let other = serve(&plain);
    let task = other.set.task("other").timeout(secs(1)).spawn(forever()).unwrap();
    settle().await;
    advance(secs(2)).await;
    settle().await;
    assert!(task.is_finished(), "somebody keeps its deadline");
    assert!(graceful.unwrap().is_finished());
}
