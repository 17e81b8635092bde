//! Models of the races that are ours: every order of what two threads do, up to loom's bound of
//! preemptions. Each asserts that every outcome of its race was reached.

use std::{
    cell::Cell,
    collections::BTreeSet,
    fmt::Debug,
    future::poll_fn,
    panic::Location,
    pin::Pin,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
    task::{Context, Poll, Wake, Waker},
    time::Duration,
};

use loom::{future::block_on, thread};
use tokio::time::Instant;
use tower_catch_unwind::{Panic, unwinding::Observer};
use tower_request_context::RequestContext;
use tower_response_end::End;
use tower_spawn_limit::SpawnError;

use crate::{
    AtEnd, Group, GroupError, OnPanic, StopToken, TaskError, TaskRegistry,
    reaper::Who,
    set::{Refusal, Set, Ticket},
    sync::{self, OwnedNotified},
    task::{Cause, Graceful, Member, Order, Outcome, Tracked},
    task_set::{Choice, Plan, TaskOwner},
    within::admit,
};

/// Runs a model, and returns the outcomes that were reached.
fn outcomes<T: Ord + Debug + Send + 'static>(
    model: impl Fn() -> T + Sync + Send + 'static,
) -> Vec<T> {
    let seen = Arc::new(Mutex::new(BTreeSet::new()));
    let all = seen.clone();
    loom::model(move || {
        let outcome = model();
        all.lock().unwrap().insert(outcome);
    });
    let mut seen = seen.lock().unwrap();
    std::mem::take(&mut *seen).into_iter().collect()
}

fn plan() -> Plan<'static> {
    Plan::new("task", Location::caller())
}

fn set(registry: &TaskRegistry) -> Arc<Set> {
    Set::new(registry.config(), RequestContext::new())
}

fn enter(set: &Arc<Set>) -> Result<Member, SpawnError> {
    match set.enter(&plan(), None) {
        Ok(ticket) => Ok(ticket.member(set)),
        Err(Refusal::Because(reason)) => Err(reason),
        Err(refusal) => panic!("only a set of the registry is gone, and nobody waits: {refusal:?}"),
    }
}

fn complete(mut member: Member) {
    member.outcome = Some(Outcome::Completed);
}

#[track_caller]
fn assert_exact(registry: &TaskRegistry, attempted: u64, refused: u64, live: u64) {
    let counts = registry.snapshot().totals;
    assert!(counts.is_exact(), "{counts:?}");
    assert_eq!((counts.attempted, counts.refused, counts.live), (attempted, refused, live));
}

#[test]
fn a_spawn_that_races_the_end_is_accepted_or_refused_and_counted_once() {
    let seen = outcomes(|| {
        let registry = TaskRegistry::new();
        let set = set(&registry);
        let spawner = thread::spawn({
            let set = set.clone();
            move || enter(&set).map(complete).is_ok()
        });
        set.end(End::Completed);
        let accepted = spawner.join().unwrap();
        assert_exact(&registry, 1, u64::from(!accepted), 0);
        assert_eq!(registry.sets_listed(), 0, "it is over, and is let go");
        accepted
    });
    assert_eq!(seen, [false, true]);
}

#[test]
fn a_spawn_that_races_the_close_is_accepted_and_waited_for_or_refused() {
    let seen = outcomes(|| {
        let registry = TaskRegistry::new();
        let set = set(&registry);
        let spawner = thread::spawn({
            let set = set.clone();
            move || match enter(&set) {
                Ok(member) => {
                    complete(member);
                    true
                }
                Err(reason) => {
                    assert_eq!(reason, SpawnError::Closed);
                    false
                }
            }
        });
        registry.close();
        block_on(registry.wait());
        let before = registry.snapshot().totals;
        let accepted = spawner.join().unwrap();
        let after = registry.snapshot().totals;
        assert_eq!(before.spawned, after.spawned, "nothing is accepted after the wait");
        assert_eq!(after.live, 0);
        accepted
    });
    assert_eq!(seen, [false, true]);
}

#[test]
fn a_set_that_is_made_while_the_registry_closes_is_closed_by_either() {
    let seen = outcomes(|| {
        let registry = TaskRegistry::new();
        let maker = thread::spawn({
            let registry = registry.clone();
            move || {
                let set = set(&registry);
                let accepted = enter(&set).map(complete).is_ok();
                set.end(End::Completed);
                accepted
            }
        });
        registry.close();
        block_on(registry.wait());
        let spawned = registry.snapshot().totals.spawned;
        let accepted = maker.join().unwrap();
        assert_eq!(registry.snapshot().totals.spawned, spawned);
        assert_exact(&registry, 1, u64::from(!accepted), 0);
        accepted
    });
    assert_eq!(seen, [false, true]);
}

#[test]
fn a_spawn_outside_of_requests_that_races_a_drain_is_refused_or_waited_for() {
    let seen = outcomes(|| {
        let registry = TaskRegistry::new();
        let spawner = thread::spawn({
            let registry = registry.clone();
            move || {
                registry.own_set().and_then(|set| enter(&set).ok()).is_some_and(|member| {
                    complete(member);
                    true
                })
            }
        });
        registry.begin_drain();
        block_on(registry.idle());
        let before = registry.snapshot().totals.spawned;
        let accepted = spawner.join().unwrap();
        let after = registry.snapshot().totals;
        assert_eq!((after.spawned, after.live), (before, 0), "nothing comes after it was idle");
        accepted
    });
    assert_eq!(seen, [false, true]);
}

#[test]
fn a_task_that_races_a_shutdown_is_listed_exactly_if_that_has_ended_it() {
    let seen = outcomes(|| {
        let registry = TaskRegistry::new();
        let set = set(&registry);
        let member = enter(&set).unwrap();
        registry.close();
        let task = thread::spawn(move || {
            let mut task = Box::pin(Tracked::new(async {}, member));
            let poll = task.as_mut().poll(&mut Context::from_waker(Waker::noop()));
            matches!(poll, Poll::Ready(Err(TaskError::Cancelled(Cause::Shutdown))))
        });
        registry.cancel_all();
        let forced = task.join().unwrap();
        set.end(End::Completed);
        let snapshot = registry.snapshot();
        assert_eq!(snapshot.forced_tasks.len(), usize::from(forced));
        assert_eq!(snapshot.totals.cancelled, u64::from(forced));
        forced
    });
    assert_eq!(seen, [false, true]);
}

/// Never ready. Tells how often it was polled.
struct Forever<'a>(&'a Cell<u32>);

impl Future for Forever<'_> {
    type Output = ();

    fn poll(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<()> {
        self.0.set(self.0.get() + 1);
        Poll::Pending
    }
}

#[test]
fn a_task_that_awaits_while_it_is_told_to_end_ends() {
    let seen = outcomes(|| {
        let registry = TaskRegistry::new().at_end(AtEnd::Cancel);
        let set = set(&registry);
        let member = enter(&set).unwrap();
        let task = thread::spawn(move || {
            let polled = Cell::new(0);
            // A lost wake-up would be a hang, which loom reports.
            let result = block_on(Tracked::new(Forever(&polled), member));
            assert!(matches!(result, Err(TaskError::Cancelled(Cause::Disconnected))));
            polled.get()
        });
        set.end(End::Disconnected);
        let polled = task.join().unwrap();
        let counts = registry.snapshot().totals;
        assert!(counts.is_exact() && counts.cancelled == 1, "{counts:?}");
        assert_eq!(registry.sets_listed(), 0);
        // loom's executor polls more often than it must.
        polled > 0
    });
    assert_eq!(seen, [false, true], "told before its first poll, and after");
}

#[test]
fn a_spawn_that_races_a_cancellation_is_refused_or_cancelled() {
    let seen = outcomes(|| {
        let registry = TaskRegistry::new();
        let set = set(&registry);
        let spawner = thread::spawn({
            let set = set.clone();
            move || {
                let polled = Cell::new(0);
                let Ok(member) = enter(&set) else { return false };
                let result = block_on(Tracked::new(Forever(&polled), member));
                assert!(matches!(result, Err(TaskError::Cancelled(Cause::Requested))));
                true
            }
        });
        set.cancel(Cause::Requested);
        let accepted = spawner.join().unwrap();
        assert_exact(&registry, 1, u64::from(!accepted), 0);
        accepted
    });
    assert_eq!(seen, [false, true]);
}

#[test]
fn who_waits_for_the_last_task_is_woken_by_it() {
    let seen = outcomes(|| {
        let registry = TaskRegistry::new();
        let set = set(&registry);
        let member = enter(&set).unwrap();
        let task = thread::spawn(move || complete(member));
        let had_to_wait = set.len() > 0;
        block_on(set.idle());
        assert_eq!(set.len(), 0);
        task.join().unwrap();
        had_to_wait
    });
    assert_eq!(seen, [false, true]);
}

#[test]
fn two_last_tasks_let_go_of_the_set_once() {
    let seen = outcomes(|| {
        let registry = TaskRegistry::new();
        let set = set(&registry);
        let (first, second) = (enter(&set).unwrap(), enter(&set).unwrap());
        let task = thread::spawn(move || complete(first));
        complete(second);
        set.end(End::Completed);
        let was_listed = registry.sets_listed() == 1;
        task.join().unwrap();
        assert_eq!(registry.sets_listed(), 0);
        assert_eq!(registry.snapshot().totals.completed, 2, "each is counted once");
        was_listed
    });
    assert_eq!(seen, [false, true]);
}

#[test]
fn a_late_cancellation_does_not_hit_the_next_task_in_the_same_place() {
    let seen = outcomes(|| {
        let registry = TaskRegistry::new();
        let set = set(&registry);
        let Ok(ticket) = set.enter(&plan(), None) else { panic!("it is open") };
        let (first, canceller) = (ticket.member(&set), ticket.canceller(&set));
        let canceller = thread::spawn(move || canceller.cancel(Cause::Requested));
        complete(first);
        let second = enter(&set).unwrap();
        let (slot, in_time) = (second.slot, set.has_orders());
        canceller.join().unwrap();
        assert_eq!(set.order(slot), None);
        complete(second);
        in_time
    });
    assert_eq!(seen, [false, true]);
}

#[test]
fn a_set_of_the_registry_that_just_emptied_is_replaced_by_another() {
    let seen = outcomes(|| {
        let registry = TaskRegistry::new();
        let first = registry.own_set().unwrap();
        let member = enter(&first).unwrap();
        let task = thread::spawn(move || complete(member));
        let second = loop {
            let set = registry.own_set().unwrap();
            match set.enter(&plan(), None) {
                Ok(ticket) => {
                    complete(ticket.member(&set));
                    break set;
                }
                Err(Refusal::Gone) => {}
                Err(refusal) => panic!("refused: {refusal:?}"),
            }
        };
        task.join().unwrap();
        assert_exact(&registry, 2, 0, 0);
        assert_eq!(registry.sets_listed(), 0);
        Arc::ptr_eq(&first, &second)
    });
    assert_eq!(seen, [false, true], "in the first one, and in another");
}

#[test]
fn a_snapshot_while_a_set_goes_over_counts_it_once() {
    let seen = outcomes(|| {
        let registry = TaskRegistry::new();
        let set = set(&registry);
        let member = enter(&set).unwrap();
        // Of two tasks the shutdown ends one.
        complete(enter(&set).unwrap());
        registry.close();
        registry.cancel_all();
        let task = thread::spawn(move || {
            drop(member);
            set.end(End::Completed);
        });
        let snapshot = registry.snapshot();
        let (counts, forced) = (snapshot.totals, snapshot.forced_tasks.len() as u64);
        assert!(counts.is_exact(), "{counts:?}");
        assert_eq!((counts.spawned, counts.completed), (2, 1));
        assert_eq!(counts.aborted, forced, "in the list exactly if it is counted");
        task.join().unwrap();
        assert_exact(&registry, 2, 0, 0);
        assert_eq!(registry.snapshot().forced_tasks.len(), 1);
        counts.live
    });
    assert_eq!(seen, [0, 1]);
}

fn graceful(set: &Arc<Set>) -> (Member, StopToken) {
    let (choice, stop) = Choice::graceful();
    let Ok(ticket) = set.enter(&plan().with(&choice), None) else { panic!("it is open") };
    (ticket.member(set), stop)
}

#[test]
fn a_graceful_task_that_starts_to_listen_while_it_is_told_hears_it() {
    let seen = outcomes(|| {
        let registry = TaskRegistry::new();
        let set = set(&registry);
        let (member, stop) = graceful(&set);
        let task = thread::spawn(move || {
            let waited = Cell::new(false);
            let work = Graceful::new(
                |stop: StopToken| {
                    let waited = &waited;
                    async move {
                        waited.set(!stop.is_cancelled());
                        stop.cancelled().await
                    }
                },
                stop,
            );
            // A signal that is missed would be a hang, which loom reports.
            let result = block_on(Tracked::new(work, member));
            assert!(matches!(result, Ok(Cause::Shutdown)), "{result:?}");
            waited.get()
        });
        set.cancel(Cause::Shutdown);
        let waited = task.join().unwrap();
        let counts = registry.snapshot().totals;
        assert!(counts.is_exact() && counts.completed == 1, "{counts:?}");
        waited
    });
    assert_eq!(seen, [false, true], "told before it looked, and after");
}

#[test]
fn a_task_that_hears_nothing_is_dropped_when_its_grace_is_over() {
    let seen = outcomes(|| {
        let registry = TaskRegistry::new();
        let set = set(&registry);
        let (member, _stop) = graceful(&set);
        let task = thread::spawn(move || {
            let polled = Cell::new(0);
            let result = block_on(Tracked::new(Forever(&polled), member));
            assert!(matches!(result, Err(TaskError::Aborted(Cause::Requested))), "{result:?}");
            polled.get()
        });
        set.cancel(Cause::Requested);
        set.abort(Cause::Shutdown);
        let polled = task.join().unwrap();
        let counts = registry.snapshot().totals;
        assert!(counts.is_exact() && counts.aborted == 1, "{counts:?}");
        polled > 0
    });
    assert_eq!(seen, [false, true], "before its first poll, and after");
}

#[test]
fn a_token_that_is_asked_for_while_its_task_is_told_is_cancelled() {
    let seen = outcomes(|| {
        let registry = TaskRegistry::new();
        let set = set(&registry);
        let (member, stop) = graceful(&set);
        let asks = thread::spawn({
            let stop = stop.clone();
            move || {
                let token = stop.cancellation_token();
                let early = !token.is_cancelled();
                (token, early)
            }
        });
        set.cancel(Cause::Requested);
        let (token, early) = asks.join().unwrap();
        assert!(token.is_cancelled() && stop.cause() == Some(Cause::Requested));
        complete(member);
        early
    });
    assert_eq!(seen, [false, true]);
}

#[test]
fn a_deadline_that_lapses_late_does_not_hit_the_next_task_in_the_same_place() {
    let seen = outcomes(|| {
        let registry = TaskRegistry::new();
        let set = set(&registry);
        let first = enter(&set).unwrap();
        let slot = first.slot;
        let (key, next_key) = ((Instant::now(), 1), (Instant::now(), 2));
        set.set_timeout(slot, key);
        let reaper = thread::spawn({
            let set = set.clone();
            move || set.lapse(key, Who::Task(slot))
        });
        complete(first);
        let second = enter(&set).unwrap();
        assert_eq!(second.slot, slot);
        set.set_timeout(slot, next_key);
        let in_time = set.has_orders();
        reaper.join().unwrap();
        assert_eq!(set.order(slot), None);
        // Its own still counts.
        set.lapse(next_key, Who::Task(slot));
        assert_eq!(set.order(slot), Some(Order::TimeOut));
        complete(second);
        in_time
    });
    assert_eq!(seen, [false, true], "before the first has ended, and after");
}

fn panics(set: &Arc<Set>, member: &Member) {
    set.panicked(member.slot, &Panic::new(Box::new("it hurts")));
}

#[test]
fn a_response_that_is_about_to_wait_hears_of_the_panic_that_fails_it() {
    let seen = outcomes(|| {
        let registry = TaskRegistry::new().on_panic(OnPanic::FailResponse);
        let set = set(&registry);
        let member = enter(&set).unwrap();
        let task = thread::spawn({
            let set = set.clone();
            move || panics(&set, &member)
        });
        let mut waited = false;
        // A panic that is missed would be a hang, which loom reports.
        let panic = block_on(poll_fn(|cx| {
            let failed = set.poll_failed(cx);
            waited |= failed.is_pending();
            failed
        }));
        assert_eq!(panic.message(), "it hurts");
        task.join().unwrap();
        set.end(End::Panicked);
        waited
    });
    assert_eq!(seen, [false, true], "told before it waited, and after");
}

#[test]
fn a_panic_that_races_the_end_of_the_response_fails_it_or_is_ignored() {
    let seen = outcomes(|| {
        let registry = TaskRegistry::new().on_panic(OnPanic::FailResponse);
        let set = set(&registry);
        let member = enter(&set).unwrap();
        let told = Arc::new(Told::default());
        let waker = Waker::from(told.clone());
        let mut cx = Context::from_waker(&waker);
        assert!(set.poll_failed(&cx).is_pending());
        let task = thread::spawn({
            let set = set.clone();
            move || panics(&set, &member)
        });
        set.end(End::Completed);
        task.join().unwrap();
        cx = Context::from_waker(Waker::noop());
        let failed = set.poll_failed(&cx).is_ready();
        assert_eq!(told.0.load(Relaxed), failed, "it is woken exactly then");
        drop(waker);
        assert_eq!(Arc::strong_count(&told), 1, "the waker is not kept");
        failed
    });
    assert_eq!(seen, [false, true]);
}

#[test]
fn an_end_that_a_panic_brings_about_is_held_back_until_the_task_is_unwound() {
    let seen = outcomes(|| {
        let registry = TaskRegistry::new().on_panic(OnPanic::FailResponse);
        let set = set(&registry);
        let member = enter(&set).unwrap();
        let closed = Arc::new(sync::AtomicBool::new(false));
        let task = thread::spawn({
            let (set, closed) = (set.clone(), closed.clone());
            move || {
                set.unwinds();
                closed.store(true, sync::Ordering::Release);
                panics(&set, &member);
                set.end_unwinding();
            }
        });
        let (mut waited, mut failed) = (false, None);
        if closed.load(sync::Ordering::Acquire) {
            assert!(!set.may_end());
            // One that is not woken would be a hang, which loom reports.
            failed = block_on(poll_fn(|cx| {
                let verdict = set.poll_verdict(cx);
                waited |= verdict.is_pending();
                verdict
            }));
            assert_eq!(failed.as_ref().unwrap().message(), "it hurts");
        }
        task.join().unwrap();
        set.end(End::Panicked);
        (failed.is_some(), waited)
    });
    assert_eq!(seen, [(false, false), (true, false), (true, true)]);
}

#[test]
fn an_end_that_is_held_back_passes_when_the_task_has_caught_its_panic_or_the_set_has_ended() {
    for ends in [false, true] {
        let seen = outcomes(move || {
            let registry = TaskRegistry::new().on_panic(OnPanic::FailResponse);
            let set = set(&registry);
            set.unwinds();
            let other = thread::spawn({
                let set = set.clone();
                move || if ends { set.end(End::TimedOut) } else { set.end_unwinding() }
            });
            let mut waited = false;
            let failed = block_on(poll_fn(|cx| {
                let verdict = set.poll_verdict(cx);
                waited |= verdict.is_pending();
                verdict
            }));
            assert!(failed.is_none());
            other.join().unwrap();
            if ends {
                set.end_unwinding();
            } else {
                set.end(End::Completed);
            }
            waited
        });
        assert_eq!(seen, [false, true]);
    }
}

/// Whether it was woken.
#[derive(Default)]
struct Told(AtomicBool);

impl Wake for Told {
    fn wake(self: Arc<Self>) {
        self.0.store(true, Relaxed);
    }
}

/// A set that takes tasks in without a runtime.
struct Entered(Arc<Set>);

impl TaskOwner for Entered {
    fn try_admit(&self, plan: &Plan<'_>) -> Result<(Arc<Set>, Ticket), Refusal> {
        self.0.enter(plan, None).map(|ticket| (self.0.clone(), ticket))
    }

    fn changed(&self) -> OwnedNotified {
        self.0.changed()
    }

    fn count_refused(&self, plan: &Plan<'_>) {
        self.0.count_refused(plan);
    }

    fn ended(&self) -> Option<Cause> {
        None
    }
}

#[test]
fn a_spawn_into_a_group_that_is_told_to_end_is_refused_or_told_and_waited_for() {
    let seen = outcomes(|| {
        let registry = TaskRegistry::new();
        let set = set(&registry);
        let group = Group::new(Entered(set));
        let handle = group.handle();
        let spawner = thread::spawn(move || {
            let polled = Cell::new(0);
            let Ok((set, ticket, seat)) = handle.admit(&plan()) else { return false };
            let work = handle.work(ticket.track(&set, Forever(&polled)), seat);
            let result = block_on(work);
            assert!(matches!(result, Err(TaskError::Cancelled(Cause::Requested))), "{result:?}");
            true
        });
        group.cancel_all();
        block_on(group.wait());
        let live = registry.snapshot().totals.live;
        assert_eq!(live, 0, "who left the group has left the set");
        let accepted = spawner.join().unwrap();
        assert_exact(&registry, 1, u64::from(!accepted), 0);
        accepted
    });
    assert_eq!(seen, [false, true]);
}

#[test]
fn who_waits_in_the_line_of_a_group_that_ends_has_a_place_or_is_closed_out() {
    for is_told in [true, false] {
        let seen = outcomes(move || {
            let registry = TaskRegistry::new();
            let request = set(&registry);
            let group = Group::new(Entered(request.clone())).limit(1);
            let handle = group.handle();
            let (set, ticket, seat) = handle.admit(&plan()).unwrap();
            let holds = handle.work(ticket.track(&set, async {}), seat);
            let waiter = thread::spawn(move || {
                // Who is left in the line would be a hang, which loom reports.
                match block_on(admit(&handle, plan(), Duration::MAX)) {
                    Ok((set, ticket, seat)) => {
                        let _ = block_on(handle.work(ticket.track(&set, async {}), seat));
                        true
                    }
                    Err(reason) => {
                        assert_eq!(reason, SpawnError::Closed);
                        false
                    }
                }
            });
            block_on(holds).unwrap();
            if is_told {
                group.cancel_all();
            }
            block_on(group.wait());
            let spawned = registry.snapshot().totals.spawned;
            let accepted = waiter.join().unwrap();
            assert_eq!(registry.snapshot().totals.spawned, spawned, "it takes no more");
            assert_exact(&registry, 2, u64::from(!accepted), 0);
            // Lets go of the wakers.
            request.end(End::Completed);
            accepted
        });
        assert_eq!(seen, [false, true]);
    }
}

#[test]
fn of_two_tasks_that_fail_at_once_one_is_the_first_and_the_wait_is_for_both() {
    let seen = outcomes(|| {
        let registry = TaskRegistry::new();
        let group = Group::fail_fast(Entered(set(&registry)));
        let handle = group.handle();
        // Both are there before one fails.
        let [one, two] = [1, 2].map(|n: u32| {
            let (set, ticket, seat) = handle.admit(&plan()).unwrap();
            handle.work(ticket.track(&set, async move { Err::<(), _>(n) }), seat)
        });
        let [one, two] = [one, two].map(|work| thread::spawn(|| block_on(work).unwrap_err()));
        let failure = block_on(group.wait()).unwrap_err();
        assert_eq!(registry.snapshot().totals.live, 0);
        let told = [one, two]
            .map(|task| matches!(task.join().unwrap(), TaskError::Cancelled(Cause::Sibling)));
        let GroupError::Failed { error, .. } = failure else { panic!("{failure:?}") };
        (error, told)
    });
    let expected =
        [(1, [false, false]), (1, [false, true]), (2, [false, false]), (2, [true, false])];
    assert_eq!(seen, expected, "either, and the other has failed too or was told in time");
}

/// The same in a runtime, for which sets are kept. It runs nothing.
fn outcomes_with_kept_sets<T: Ord + Debug + Send + 'static>(
    model: impl Fn() -> T + Sync + Send + 'static,
) -> Vec<T> {
    let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
    let _here = runtime.enter();
    outcomes(model)
}

/// Makes a set that knows nothing of another, and brings it to its end. Where it was.
fn serve(registry: &TaskRegistry) -> usize {
    let set = set(registry);
    assert!(!set.has_orders() && set.ended().is_none() && set.len() == 0);
    let member = enter(&set).unwrap();
    set.end(End::Completed);
    let memory = Arc::as_ptr(&set) as usize;
    set.release();
    complete(member);
    memory
}

#[test]
fn two_who_let_go_of_a_set_at_once_and_make_the_next_have_one_each() {
    for value in [None, Some(Arc::new(()))] {
        let seen = outcomes_with_kept_sets(move || {
            let registry = TaskRegistry::new();
            let context = match &value {
                Some(value) => RequestContext::new().with(value.clone()),
                None => RequestContext::new(),
            };
            let old = Set::new(registry.config(), context);
            let memory = Arc::as_ptr(&old) as usize;
            let [one, other] = [enter(&old).unwrap(), enter(&old).unwrap()];
            let worker = thread::spawn({
                let registry = registry.clone();
                move || {
                    complete(one);
                    serve(&registry) == memory
                }
            });
            old.end(End::Completed);
            old.release();
            complete(other);
            let here = serve(&registry) == memory;
            let there = worker.join().unwrap();
            assert_exact(&registry, 4, 0, 0);
            assert_eq!(registry.sets_listed(), 0);
            let kept = value.as_ref().map_or(1, Arc::strong_count);
            assert_eq!(kept, 1, "nothing of it is kept");
            (here, there)
        });
        assert!(seen.contains(&(true, false)) && seen.contains(&(false, true)), "{seen:?}");
    }
}

#[test]
fn a_snapshot_while_a_set_is_kept_and_used_again_counts_all_once() {
    let seen = outcomes_with_kept_sets(|| {
        let registry = TaskRegistry::new();
        let first = serve(&registry);
        let server = thread::spawn({
            let registry = registry.clone();
            move || (serve(&registry), serve(&registry))
        });
        let [before, after] = [registry.snapshot().totals, registry.snapshot().totals];
        assert!(before.is_exact() && after.is_exact(), "{before:?} {after:?}");
        assert!(before.completed <= after.completed && before.spawned <= after.spawned);
        let (second, third) = server.join().unwrap();
        assert_exact(&registry, 3, 0, 0);
        // One that is being read is for nobody else.
        (before.completed, second == first, third == second)
    });
    for completed in 1..=3 {
        assert!(seen.iter().any(|seen| seen.0 == completed), "{seen:?}");
    }
    for is_used_again in [false, true] {
        assert!(seen.iter().any(|seen| seen.1 == is_used_again), "{seen:?}");
        assert!(seen.iter().any(|seen| seen.2 == is_used_again), "{seen:?}");
    }
}

#[test]
fn a_cancellation_of_all_tells_a_set_that_is_used_again_or_does_not_know_it() {
    let seen = outcomes_with_kept_sets(|| {
        let registry = TaskRegistry::new();
        serve(&registry);
        let server = thread::spawn({
            let registry = registry.clone();
            move || {
                let set = set(&registry);
                let told = match enter(&set) {
                    Ok(member) => {
                        let told = set.order(member.slot).is_some();
                        complete(member);
                        told
                    }
                    Err(SpawnError::Closed) => true,
                    Err(reason) => panic!("{reason}"),
                };
                set.end(End::Completed);
                set.release();
                told
            }
        });
        registry.cancel_all();
        let told = server.join().unwrap();
        serve(&registry);
        assert!(registry.snapshot().totals.is_exact());
        told
    });
    assert_eq!(seen, [false, true]);
}

#[test]
fn a_set_that_is_over_as_the_last_handle_goes_is_not_kept() {
    outcomes_with_kept_sets(|| {
        let registry = TaskRegistry::new();
        let owner = Arc::downgrade(&registry.config().owner);
        serve(&registry);
        let set = set(&registry);
        let member = enter(&set).unwrap();
        set.end(End::Completed);
        set.release();
        let worker = thread::spawn(move || complete(member));
        drop(registry);
        worker.join().unwrap();
        assert_eq!(owner.strong_count(), 0);
    });
}
