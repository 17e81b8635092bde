use std::{
    fmt,
    future::poll_fn,
    mem,
    pin::pin,
    sync::{
        Arc, Mutex, MutexGuard, OnceLock, PoisonError,
        atomic::{AtomicBool, AtomicU8, AtomicU64, AtomicUsize, Ordering::Relaxed},
    },
    task::{Poll, Waker},
    time::Duration,
};

use tokio::{
    sync::Notify,
    time::{Instant, sleep_until},
};
use tokio_util::sync::CancellationToken;
use tower_catch_unwind::{Log, catch};
use tower_response_end::Signal;
use tower_task_set::{Counts, TaskRegistry};

use crate::{
    Drained, Forced, Kind, Report, Requests,
    in_flight::Reading,
    keeper,
    log::{Line, Pending},
    plan::Plan,
    roll::{Place, Request, Roll},
};

/// What all handles of a shutdown share.
pub(crate) struct State {
    settings: Mutex<Settings>,
    pub(crate) roll: Roll,
    /// Of the panics of callbacks.
    pub(crate) log: Log,
    refused: AtomicU64,
    begun: OnceLock<Begun>,
    beginning: Signal,
    /// The server is to accept nothing more.
    pub(crate) draining: Signal,
    /// The same for code that takes this: its wakers are not caught one by one.
    pub(crate) token: CancellationToken,
    /// What the registries were told so far, which those that come later are told too: so it also
    /// says at once whether it is draining.
    told: AtomicU8,
    /// The requests in flight are to end.
    pub(crate) ending: Signal,
    signals: AtomicU8,
    hurry: OnceLock<std::time::Instant>,
    hurrying: Signal,
    /// Those who drive it, to be told that something has happened, or that it is time to look at the
    /// clock.
    pulse: Mutex<Vec<Waker>>,
    /// Wakes the keeper.
    pub(crate) woken: Arc<Notify>,
    keeper: Mutex<bool>,
    /// How many servers go on, of those that are run.
    servers: AtomicUsize,
    drivers: AtomicUsize,
    /// Whether there was ever one.
    was_driven: AtomicBool,
    /// Of the drivers.
    runs: AtomicUsize,
    beats: AtomicUsize,
}

#[derive(Clone, Debug)]
pub(crate) struct Settings {
    pub(crate) plan: Plan,
    pub(crate) refuse_late: bool,
    pub(crate) signals: bool,
    pub(crate) registries: Vec<TaskRegistry>,
}

/// What was so when it began.
#[derive(Debug)]
pub(crate) struct Begun {
    pub(crate) at: Instant,
    /// The same on a clock that no test can pause: it is what a thread can see.
    real: std::time::Instant,
    pub(crate) plan: Plan,
    requests: Reading,
    tasks: Counts,
}

/// What registries are told: work outside of requests is refused.
const DRAIN: u8 = 1;
/// All is.
const CLOSE: u8 = 2;
/// And tasks are to end.
const CANCEL: u8 = 3;
/// And have no grace any more.
const ABORT: u8 = 4;

fn tell(registry: &TaskRegistry, what: u8) {
    match what {
        DRAIN => registry.begin_drain(),
        CLOSE => registry.close(),
        CANCEL => {
            registry.close();
            registry.cancel_all();
        }
        _ => registry.abort_all(),
    }
}

/// What there is still to wait for.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Left {
    pub(crate) requests: u32,
    pub(crate) tasks: usize,
}

impl Left {
    pub(crate) fn sum(self) -> usize {
        self.tasks.saturating_add(usize::try_from(self.requests).unwrap_or(usize::MAX))
    }
}

impl State {
    pub(crate) fn new(budget: Duration) -> Self {
        Self {
            settings: Mutex::new(Settings {
                plan: Plan { budget, settle: Duration::ZERO, grace: None },
                refuse_late: false,
                signals: true,
                registries: Vec::new(),
            }),
            roll: Roll::default(),
            log: Log::default(),
            refused: AtomicU64::new(0),
            begun: OnceLock::new(),
            beginning: Signal::new(),
            draining: Signal::new(),
            token: CancellationToken::new(),
            told: AtomicU8::new(0),
            ending: Signal::new(),
            signals: AtomicU8::new(0),
            hurry: OnceLock::new(),
            hurrying: Signal::new(),
            pulse: Mutex::default(),
            woken: Arc::default(),
            keeper: Mutex::new(false),
            servers: AtomicUsize::new(0),
            drivers: AtomicUsize::new(0),
            was_driven: AtomicBool::new(false),
            runs: AtomicUsize::new(0),
            beats: AtomicUsize::new(0),
        }
    }

    pub(crate) fn settings(&self) -> MutexGuard<'_, Settings> {
        lock(&self.settings)
    }

    pub(crate) fn registries(&self) -> Vec<TaskRegistry> {
        self.settings().registries.clone()
    }

    /// Drains this registry too.
    pub(crate) fn add(&self, registry: &TaskRegistry) {
        let mut settings = self.settings();
        if settings.registries.iter().any(|known| known.ptr_eq(registry)) {
            return;
        }
        settings.registries.push(registry.clone());
        drop(settings);
        // Asked again each time: what is told meanwhile may come before what is told here.
        let mut what = 0;
        while what < self.told.load(Relaxed) {
            what += 1;
            tell(registry, what);
        }
    }

    fn tell_registries(&self, what: u8) {
        // Before the list is read: who adds to it looks at this afterwards. Relaxed, for there is the
        // lock of the settings between.
        self.told.fetch_max(what, Relaxed);
        for registry in self.registries() {
            tell(&registry, what);
        }
    }

    /// Listens to signals, and has a clock of its own, from now on.
    pub(crate) fn keep(self: &Arc<Self>) -> std::io::Result<()> {
        let mut kept = lock(&self.keeper);
        if !*kept {
            let signals = self.settings().signals;
            keeper::start(self, signals)?;
            *kept = true;
        }
        Ok(())
    }

    /// Begins, if it has not.
    pub(crate) fn begin(&self) -> &Begun {
        let (begun, line) = self.begin_silently();
        line.into_iter().for_each(Pending::say);
        begun
    }

    /// The same for who may not be held up by the log.
    pub(crate) fn begin_silently(&self) -> (&Begun, Option<Pending>) {
        if let Some(begun) = self.begun.get() {
            return (begun, None);
        }
        let plan = self.settings().plan;
        // Not in the initialization: a snapshot may run the code of others.
        let begun = Begun {
            at: Instant::now(),
            real: std::time::Instant::now(),
            plan,
            requests: self.roll.requests.read(),
            tasks: self.tasks(),
        };
        let (requests, tasks) = (begun.requests.in_flight, begun.tasks.live);
        let mut line = None;
        if self.begun.set(begun).is_ok() {
            // Before anybody can be done with all of it.
            line = Some(Pending::new(Line::Begun { budget: plan.budget, requests, tasks }));
            self.beginning.give();
            self.tell();
            self.woken.notify_one();
        }
        (self.begun.get().expect("it was set, now or by another"), line)
    }

    pub(crate) fn begun(&self) -> Option<&Begun> {
        self.begun.get()
    }

    pub(crate) fn has_begun(&self) -> bool {
        self.begun.get().is_some()
    }

    /// Waits until it has begun.
    async fn beginning(&self) -> &Begun {
        let mut beginning = self.beginning.waiter();
        poll_fn(|cx| beginning.poll_given(cx)).await;
        self.begun().expect("it is set before the signal is given")
    }

    /// Waits for the moment to stop accepting, and sees to it that it comes.
    pub(crate) async fn settled(&self) {
        let begun = self.beginning().await;
        let settle = begun.plan.settle.min(begun.plan.budget);
        // Nor is there a panic then for want of a time driver.
        if !settle.is_zero() {
            let until = begun.at.checked_add(settle);
            // Without a time driver, or on a runtime that was shut down, whoever drives the shutdown
            // sees to it.
            let sleep = until.and_then(|until| catch(|| sleep_until(until)).ok());
            let mut sleep = pin!(sleep);
            let mut draining = self.draining.waiter();
            let mut hurrying = self.hurrying.waiter();
            poll_fn(|cx| {
                let sleep = sleep.as_mut().as_pin_mut();
                let is_ready = |it| catch(|| Future::poll(it, cx)).is_ok_and(|it| it.is_ready());
                let settled = sleep.is_some_and(is_ready)
                    || draining.poll_given(cx).is_ready()
                    || hurrying.poll_given(cx).is_ready();
                if settled { Poll::Ready(()) } else { Poll::Pending }
            })
            .await;
        }
        self.drain();
    }

    /// The server is to accept nothing more.
    pub(crate) fn drain(&self) {
        if self.draining.is_given() {
            return;
        }
        self.tell_registries(DRAIN);
        if self.settings().refuse_late {
            self.roll.requests.close();
        }
        self.draining.give();
        // Wakers are the code of others.
        drop(catch(|| self.token.cancel()));
    }

    /// Whether requests and tasks are to end, be it that not all were told yet.
    pub(crate) fn is_cancelled(&self) -> bool {
        self.told.load(Relaxed) >= CANCEL
    }

    pub(crate) fn is_draining(&self) -> bool {
        self.told.load(Relaxed) >= DRAIN
    }

    /// Requests and tasks are to end.
    pub(crate) fn cancel(&self) {
        if self.ending.is_given() {
            return;
        }
        self.roll.requests.close();
        self.tell_registries(CANCEL);
        // Last: of a request that ends first, the tasks would end for that, and be missing among
        // those that were forced.
        self.ending.give();
    }

    pub(crate) fn abort(&self) {
        self.tell_registries(ABORT);
    }

    /// Nothing more is accepted; what is so now is the report.
    pub(crate) fn over(&self, server_ended: bool) -> Report {
        self.drain();
        self.roll.requests.close();
        self.tell_registries(CLOSE);
        self.report(server_ended)
    }

    /// What would come at the deadline comes now.
    pub(crate) fn hurry(&self) -> Option<Pending> {
        let is_first = self.hurry.set(std::time::Instant::now()).is_ok();
        let line = is_first.then(|| Pending::new(Line::CutShort));
        self.hurrying.give();
        self.tell();
        line
    }

    pub(crate) fn is_hurried(&self) -> bool {
        self.hurry.get().is_some()
    }

    /// Which signal this is.
    pub(crate) fn count_signal(&self) -> u8 {
        self.signals.fetch_add(1, Relaxed).saturating_add(1)
    }

    /// Where a request stands, if it is admitted. What is refused is counted.
    pub(crate) fn enter(&self, request: Request) -> Option<Place> {
        let place = self.roll.enter(request);
        if place.is_none() {
            self.refused.fetch_add(1, Relaxed);
        }
        place
    }

    /// Whoever drives the shutdown looks again.
    pub(crate) fn tell(&self) {
        let wakers = mem::take(&mut *lock(&self.pulse));
        for waker in wakers {
            // Each for itself: wakers are the code of others.
            drop(catch(|| waker.wake()));
        }
    }

    /// Wakes this one when it is to look again. First listen, then look.
    pub(crate) fn listen(&self, waker: &Waker) {
        let waker = waker.clone();
        let mut wakers = lock(&self.pulse);
        // One that is not needed is dropped after the lock is released.
        if !wakers.iter().any(|known| known.will_wake(&waker)) {
            wakers.push(waker);
        }
    }

    /// Whoever has this drives the shutdown. One that `runs` it is taken for stuck if it does not
    /// [beat](Driver::beat).
    pub(crate) fn driver(&self, runs: bool) -> Driver<'_> {
        let driver = Driver { state: self, runs };
        // Before the keeper is woken, or it would find the beat of the last one.
        driver.beat();
        self.was_driven.store(true, Relaxed);
        self.drivers.fetch_add(1, Relaxed);
        self.runs.fetch_add(runs.into(), Relaxed);
        self.woken.notify_one();
        driver
    }

    /// Whether it goes on, and somebody drives it.
    pub(crate) fn is_driven(&self) -> bool {
        self.has_begun() && self.drivers.load(Relaxed) > 0
    }

    /// Whether somebody has driven it: who then lets go of it has seen all that was asked of it.
    pub(crate) fn was_driven(&self) -> bool {
        self.was_driven.load(Relaxed)
    }

    /// Whether one of those who drive it runs it.
    pub(crate) fn is_run(&self) -> bool {
        self.has_begun() && self.runs.load(Relaxed) > 0
    }

    pub(crate) fn beats(&self) -> usize {
        self.beats.load(Relaxed)
    }

    /// Whether it should have been over so long ago.
    pub(crate) fn is_overdue_by(&self, time: Duration) -> bool {
        let Some(begun) = self.begun() else { return false };
        let budget_spent = begun.real.checked_add(begun.plan.budget);
        let end = budget_spent.into_iter().chain(self.hurry.get().copied()).min();
        end.is_some_and(|end| end.elapsed() > time)
    }

    /// How many requests are in flight, and how many tasks live.
    pub(crate) fn left(&self) -> Left {
        let tasks = self.registries().iter().map(TaskRegistry::len).sum();
        Left { requests: self.roll.requests.read().in_flight, tasks }
    }

    fn tasks(&self) -> Counts {
        let mut tasks = Counts::default();
        for registry in self.registries() {
            tasks += registry.snapshot().totals;
        }
        tasks
    }

    pub(crate) fn report(&self, server_ended: bool) -> Report {
        let begun = self.begin();
        let (now, mut forced, left) = self.roll.read();
        let count = |count: usize| u64::try_from(count).unwrap_or(u64::MAX);
        let mut requests = Requests {
            at_begin: begun.requests.in_flight.into(),
            later: now.entered_since(begun.requests).into(),
            refused: self.refused.load(Relaxed),
            completed: 0,
            ended: count(forced.len()),
            left: now.in_flight.into(),
        };
        requests.completed = requests.at_begin + requests.later - requests.ended - requests.left;
        forced.extend(left);
        let mut tasks = Counts::default();
        for registry in self.registries() {
            let snapshot = registry.snapshot();
            tasks += snapshot.totals;
            forced.extend(snapshot.forced_tasks.iter().map(Forced::ended_task));
            forced.extend(snapshot.live_tasks.iter().map(Forced::live_task));
        }
        Report {
            took: begun.at.elapsed(),
            budget: begun.plan.budget,
            server_ended,
            requests,
            drained: Drained::between(&begun.tasks, &tasks),
            tasks,
            forced,
        }
    }
}

impl Forced {
    fn ended_task(task: &tower_task_set::ForcedTask) -> Self {
        Self {
            what: Kind::Task,
            name: task.name.into(),
            site: Some(task.site),
            age: task.age,
            trace_id: task.trace_id,
            outcome: Some(task.outcome),
        }
    }

    fn live_task(task: &tower_task_set::LiveTask) -> Self {
        Self {
            what: Kind::Task,
            name: task.name.into(),
            site: Some(task.site),
            age: task.age,
            trace_id: task.trace_id,
            outcome: None,
        }
    }
}

/// The keeper must not wait for what is gone.
impl Drop for State {
    fn drop(&mut self) {
        self.woken.notify_one();
    }
}

impl fmt::Debug for State {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("State").field("begun", &self.begun).finish_non_exhaustive()
    }
}

/// Somebody drives the shutdown.
pub(crate) struct Driver<'a> {
    state: &'a State,
    runs: bool,
}

impl Driver<'_> {
    /// Whether a server goes on that it waits for: not if it is for a host that has its own.
    pub(crate) fn waits_for_servers(&self) -> bool {
        self.runs && self.state.servers.load(Relaxed) > 0
    }

    /// It is polled. Of one that does not run the shutdown nobody asks for that.
    pub(crate) fn beat(&self) {
        self.state.beats.fetch_add(self.runs.into(), Relaxed);
    }
}

impl Drop for Driver<'_> {
    fn drop(&mut self) {
        self.state.drivers.fetch_sub(1, Relaxed);
        self.state.runs.fetch_sub(self.runs.into(), Relaxed);
    }
}

/// A server goes on.
pub(crate) struct Serving<'a>(&'a State);

impl<'a> Serving<'a> {
    pub(crate) fn new(state: &'a State) -> Self {
        state.servers.fetch_add(1, Relaxed);
        Self(state)
    }
}

impl Drop for Serving<'_> {
    fn drop(&mut self) {
        self.0.servers.fetch_sub(1, Relaxed);
        self.0.tell();
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
