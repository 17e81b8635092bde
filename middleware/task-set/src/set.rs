use std::{
    collections::{BTreeMap, HashMap},
    fmt,
    panic::Location,
    sync::{Arc, OnceLock},
    task::Waker,
    time::Duration,
};

use smallvec::SmallVec;
use tokio::{runtime::Handle, time::Instant};
use tower_catch_unwind::catch;
use tower_request_context::{RequestContext, Scope, Task, TraceId};
use tower_response_end::{End, hold};
use tower_spawn_limit::{Refused, SpawnError};
use tracing::Span;

use crate::{
    AtEnd, Counts, LiveTask, Snapshot, TaskEvent, TaskRegistry, TaskState,
    ledger::{Kind, OTHER},
    lifetime::Policy,
    place,
    reaper::{Key, Runtime, Who},
    registry::{self, Config, Owner},
    sync::{AtomicBool, Mutex, MutexGuard, Notify, Ordering, lock},
    task::{Canceller, Cause, Member, Order, Outcome, TaskHandle, Tracked},
};

/// The tasks of one request.
///
/// A handle: a clone is the same set, and dropping it changes nothing. The set is made when a
/// request first asks for it.
#[derive(Clone)]
pub struct TaskSet(Arc<Set>);

impl TaskSet {
    /// The set of the request that is being served here: in the handler, in the polls and the drop
    /// of the response's body, and in tasks of the set.
    ///
    /// # Errors
    ///
    /// [`NoTaskSet`] if there is none: no [`TaskSetLayer`](crate::TaskSetLayer) is above, or this
    /// runs on a task that is not ours.
    pub fn current() -> Result<Self, NoTaskSet> {
        place::current().map(Self).ok_or(NoTaskSet(()))
    }

    /// Spawns a task. It never waits and never panics.
    ///
    /// The task runs on the runtime that the set was made on, whatever thread this is called from.
    /// What becomes of it when the response is over is the set's choice: [`task`](Self::task) is
    /// for tasks with choices of their own.
    ///
    /// `name` is what the task is counted and reported by.
    ///
    /// # Errors
    ///
    /// The future comes back, and nothing of it has run:
    ///
    /// - [`Closed`](SpawnError::Closed): the response is over, or its tasks were told to end. A
    ///   task of the set that may still run may still spawn: what it spawns has at most its own
    ///   lifetime and remaining time.
    /// - [`Full`](SpawnError::Full): a limit is reached.
    /// - [`NoRuntime`](SpawnError::NoRuntime): the set was made outside of a runtime and this is
    ///   outside of one too, or its runtime was shut down. While a runtime is being shut down, a
    ///   task may be accepted and dropped at once: that is told by its handle.
    #[track_caller]
    pub fn spawn<F>(
        &self,
        name: &'static str,
        future: F,
    ) -> Result<TaskHandle<F::Output>, Refused<F>>
    where
        F: Future + Send + 'static,
        F::Output: Send + 'static,
    {
        start(&self.0, &Plan::new(name, Location::caller()), future)
    }

    /// A task that is yet to be spawned, for choices of its own.
    pub const fn task(&self, name: &'static str) -> NewTask<'_> {
        NewTask { owner: TaskOwner::Set(&self.0), name, choice: None }
    }

    /// What becomes of the set's tasks at the end of the response, if they do not say otherwise.
    /// When that has come, this changes nothing.
    pub fn at_end(&self, lifetime: AtEnd) {
        let mut policy = Policy::default();
        policy.at_end(lifetime);
        self.0.add_policy(&policy);
    }

    /// The exception to [`at_end`](Self::at_end) for one end.
    pub fn on(&self, end: End, lifetime: AtEnd) {
        let mut policy = Policy::default();
        policy.on(end, lifetime);
        self.0.add_policy(&policy);
    }

    /// How many of its tasks live.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Whether none of its tasks lives.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Tells all its tasks to end, for [`Cause::Requested`], and accepts no more.
    pub fn cancel_all(&self) {
        self.0.cancel(Cause::Requested);
    }

    /// Keeps the set open when the response is over, until the hold is dropped: for a connection
    /// that was upgraded and lives on. Also [holds](hold) the layers around it. When the response
    /// is over already, it holds nothing.
    pub fn hold(&self) -> Hold {
        let around = hold();
        let held = self.0.hold().then(|| self.0.clone());
        Hold { set: held, _around: around }
    }

    pub(crate) const fn new(set: Arc<Set>) -> Self {
        Self(set)
    }
}

impl fmt::Debug for TaskSet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TaskSet").field("len", &self.len()).finish_non_exhaustive()
    }
}

/// Keeps a set open until it is dropped: see [`TaskSet::hold`].
///
/// Leaking it leaves the set open for ever.
#[must_use = "it holds until it is dropped"]
pub struct Hold {
    set: Option<Arc<Set>>,
    _around: Option<tower_response_end::Hold>,
}

impl Drop for Hold {
    fn drop(&mut self) {
        if let Some(set) = self.set.take() {
            set.let_go();
        }
    }
}

impl fmt::Debug for Hold {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Hold").finish_non_exhaustive()
    }
}

/// Somebody asked for a [`TaskSet`] where there is none.
///
/// With the feature `axum` it is the extractor's rejection: status 500, and this text.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NoTaskSet(pub(crate) ());

impl fmt::Display for NoTaskSet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(
            "no task set here: add `TaskSetLayer` outside of this handler; if it is there, this \
             runs on another task than the handler's, so move a `TaskSet` in, or add \
             `.in_extensions()` to the layer and use the extractor; or the response is over",
        )
    }
}

impl std::error::Error for NoTaskSet {}

/// A task that is yet to be spawned, and its choices.
#[derive(Clone, Debug)]
#[must_use = "nothing is spawned yet"]
pub struct NewTask<'a> {
    owner: TaskOwner<'a>,
    name: &'static str,
    choice: Option<Choice>,
}

#[derive(Clone, Copy, Debug)]
enum TaskOwner<'a> {
    Set(&'a Arc<Set>),
    Registry(&'a TaskRegistry),
}

impl<'a> NewTask<'a> {
    pub(crate) const fn of_registry(registry: &'a TaskRegistry, name: &'static str) -> Self {
        Self { owner: TaskOwner::Registry(registry), name, choice: None }
    }

    /// What becomes of it when the response is over. A task that belongs to no request is kept.
    pub fn at_end(mut self, lifetime: AtEnd) -> Self {
        self.choice().policy.at_end(lifetime);
        self
    }

    /// The exception to [`at_end`](Self::at_end) for one end.
    pub fn on(mut self, end: End, lifetime: AtEnd) -> Self {
        self.choice().policy.on(end, lifetime);
        self
    }

    /// Gives the task this long from its spawn on. Then it is dropped at its next await, and its
    /// handle yields [`TimedOut`](crate::TaskError::TimedOut).
    pub fn timeout(mut self, timeout: Duration) -> Self {
        self.choice().timeout = Some(timeout);
        self
    }

    /// Spawns it.
    ///
    /// # Errors
    ///
    /// As [`TaskSet::spawn`].
    #[track_caller]
    pub fn spawn<F>(self, future: F) -> Result<TaskHandle<F::Output>, Refused<F>>
    where
        F: Future + Send + 'static,
        F::Output: Send + 'static,
    {
        let mut plan = Plan::new(self.name, Location::caller());
        plan.choice = self.choice;
        match self.owner {
            TaskOwner::Set(set) => start(set, &plan, future),
            TaskOwner::Registry(registry) => registry.start(&plan, future),
        }
    }

    fn choice(&mut self) -> &mut Choice {
        self.choice.get_or_insert_default()
    }
}

/// What was chosen for one task.
#[derive(Clone, Debug, Default)]
struct Choice {
    policy: Policy,
    timeout: Option<Duration>,
}

/// What a set is asked to admit.
pub(crate) struct Plan {
    pub(crate) name: &'static str,
    site: &'static Location<'static>,
    choice: Option<Choice>,
}

impl Plan {
    pub(crate) const fn new(name: &'static str, site: &'static Location<'static>) -> Self {
        Self { name, site, choice: None }
    }

    fn policy(&self) -> Option<&Policy> {
        self.choice.as_ref().map(|choice| &choice.policy).filter(|policy| !policy.is_empty())
    }
}

#[track_caller]
fn start<F>(set: &Arc<Set>, plan: &Plan, future: F) -> Result<TaskHandle<F::Output>, Refused<F>>
where
    F: Future + Send + 'static,
    F::Output: Send + 'static,
{
    match set.admit(plan) {
        Ok(ticket) => Ok(set.spawn(&ticket, future)),
        Err(refusal) => Err(Refused { reason: refusal.reason(), future }),
    }
}

/// Why a set does not admit a task.
#[derive(Debug)]
pub(crate) enum Refusal {
    Because(SpawnError),
    /// It is over, and has counted nothing: its registry has another by now.
    Gone,
}

impl Refusal {
    fn reason(self) -> SpawnError {
        match self {
            Self::Because(reason) => reason,
            Self::Gone => SpawnError::Closed,
        }
    }
}

/// A task that its set counts, and that is yet to be given to the runtime.
///
/// Small, to be returned in registers.
#[must_use = "the set counts it: make it a member"]
pub(crate) struct Ticket {
    slot: u32,
    generation: u16,
    has_extra: bool,
}

impl Ticket {
    #[inline]
    pub(crate) fn member(&self, set: &Arc<Set>) -> Member {
        Member::new(set.clone(), self.slot, self.has_extra)
    }

    #[inline]
    pub(crate) fn canceller(&self, set: &Arc<Set>) -> Canceller {
        Canceller { set: set.clone(), slot: self.slot, generation: self.generation }
    }
}

/// One request's tasks: all that is known of them, in one allocation, under one lock.
pub(crate) struct Set {
    config: Arc<Config>,
    context: RequestContext,
    born: Instant,
    runtime: Option<Arc<Runtime>>,
    /// That of the first spawn, for a set that was made outside of a runtime.
    late_runtime: OnceLock<Arc<Runtime>>,
    pub(crate) place: registry::Place,
    /// Of the registry: it belongs to no request, and is over when it is empty.
    own: bool,
    /// Some task has been told something: look under the lock.
    orders: AtomicBool,
    inner: Mutex<Inner>,
}

struct Inner {
    /// What was chosen, once it differs from the layer's choice.
    policy: Option<Box<Policy>>,
    kinds: SmallVec<[Kind; 4]>,
    /// Where a name and site are in `kinds`, when these are many.
    // Boxed, for nearly no set has one and all have to hold it.
    #[expect(clippy::box_collection)]
    index: Option<Box<HashMap<(usize, usize), usize>>>,
    tasks: SmallVec<[Entry; 4]>,
    /// The first entry that is free; its `since` is the next.
    free: u32,
    live: u32,
    /// What only some tasks have.
    extras: BTreeMap<u32, Extra>,
    end: Option<End>,
    /// Accepts nothing, whether it has ended or not: the registry is closed.
    closed: bool,
    /// All tasks were told to end.
    cancelled: bool,
    stage: Stage,
    /// What the tasks without a lifetime of their own were told.
    order: Option<Order>,
    /// Theirs, once the response is over.
    lifetime: Option<Lifetime>,
    holds: u32,
    held_end: Option<End>,
    idle: Option<Arc<Notify>>,
}

/// Who counts what is attempted here.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Stage {
    /// The set.
    Counting,
    /// A set of the registry takes no task any more: the registry has another.
    Gone,
    /// The set's counts are in the base of its shard, which counts what comes too late.
    Retired,
}

/// One task. 24 bytes: with its future, what a task costs while it waits.
struct Entry {
    /// Registered at the first await, taken out when the task is told something.
    waker: Option<Waker>,
    /// When it first awaited: in ticks since the set was made.
    since: u32,
    kind: u16,
    /// Which of the tasks that come to be in this place one after another.
    generation: u16,
}

/// Of `Entry::since`: in a second, so that it lasts for two years.
const TICKS: u32 = 64;
/// As `Entry::kind`: nobody is here.
const FREE: u16 = u16::MAX;
/// So many kinds a set tells apart; what is more is counted as one other.
const KINDS_MAX: usize = FREE as usize - 1;
/// So many kinds are looked through one by one.
const KINDS_LISTED: usize = 16;
/// As an index of an entry: none is free.
const NONE: u32 = u32::MAX;
/// So many tasks are woken for each lock.
const WAKERS: usize = 32;

/// What is known of a task beyond its entry.
#[derive(Default)]
struct Extra {
    /// Its own choices; with these it has a lifetime of its own.
    policy: Option<Policy>,
    /// That lifetime, once the response is over.
    lifetime: Option<Lifetime>,
    order: Option<Order>,
    timeout: Option<Key>,
    home: Option<Box<Home>>,
    trace_id: Option<TraceId>,
    /// For the observer.
    started: Option<Instant>,
    /// Entered while the task is dropped.
    span: Option<Span>,
}

impl Extra {
    const fn has_own_lifetime(&self) -> bool {
        self.policy.is_some() || self.lifetime.is_some()
    }
}

/// What was chosen for the time after the response, and the deadline that follows from it.
#[derive(Clone, Copy)]
struct Lifetime {
    at_end: AtEnd,
    until: Option<Instant>,
    key: Option<Key>,
}

impl Lifetime {
    fn begin(at_end: AtEnd) -> Self {
        let until = match at_end {
            // What is too long to count is for ever.
            AtEnd::Drain(time) => Instant::now().checked_add(time),
            AtEnd::Cancel | AtEnd::Keep => None,
        };
        Self { at_end, until, key: None }
    }

    /// The lifetime of a task that is spawned by one with this lifetime, after the response.
    fn of_child(self, chosen: Option<AtEnd>) -> Result<Self, SpawnError> {
        let child = match chosen {
            None => return Ok(self.inherited()),
            Some(AtEnd::Cancel) => return Err(SpawnError::Closed),
            Some(chosen) => Self::begin(chosen),
        };
        let is_longer = match (child.until, self.until) {
            (Some(child), Some(parent)) => child > parent,
            (None, Some(_)) => true,
            (_, None) => false,
        };
        Ok(if is_longer { self.inherited() } else { child })
    }

    /// The same, for another task.
    fn inherited(self) -> Self {
        Self { key: None, ..self }
    }

    fn is_far(&self) -> bool {
        matches!(self.at_end, AtEnd::Drain(time) if Runtime::is_far(time))
    }

    fn is_over(&self) -> bool {
        matches!(self.at_end, AtEnd::Cancel | AtEnd::Drain(Duration::ZERO))
    }
}

/// Where a task runs, besides in its set.
#[derive(Default)]
pub(crate) struct Home {
    scope: Scope,
    span: Option<Span>,
}

impl Home {
    fn enter(&mut self) {
        self.scope.swap();
        if let Some(span) = &self.span {
            // A subscriber is the code of others.
            drop(catch(|| span.with_subscriber(|(id, subscriber)| subscriber.enter(id))));
        }
    }

    fn leave(&mut self) {
        if let Some(span) = &self.span {
            drop(catch(|| span.with_subscriber(|(id, subscriber)| subscriber.exit(id))));
        }
        self.scope.swap();
    }
}

impl Set {
    /// Of a request.
    pub(crate) fn new(layer: Arc<Config>, context: RequestContext) -> Arc<Self> {
        let handle = layer.runtime.clone().or_else(|| Handle::try_current().ok());
        let owner = layer.owner.clone();
        owner.add(handle, |place, runtime, closed| {
            Self::make(layer, context, place, runtime, closed, false)
        })
    }

    /// Of the registry.
    pub(crate) fn own(
        config: Arc<Config>,
        place: registry::Place,
        runtime: Option<Arc<Runtime>>,
    ) -> Arc<Self> {
        Self::make(config, RequestContext::new(), place, runtime, false, true)
    }

    fn make(
        config: Arc<Config>,
        context: RequestContext,
        place: registry::Place,
        runtime: Option<Arc<Runtime>>,
        closed: bool,
        own: bool,
    ) -> Arc<Self> {
        Arc::new(Self {
            config,
            context,
            born: Instant::now(),
            runtime,
            late_runtime: OnceLock::new(),
            place,
            own,
            orders: AtomicBool::new(false),
            inner: Mutex::new(Inner {
                policy: None,
                kinds: SmallVec::new(),
                index: None,
                tasks: SmallVec::new(),
                free: NONE,
                live: 0,
                extras: BTreeMap::new(),
                end: None,
                closed,
                cancelled: false,
                stage: Stage::Counting,
                order: None,
                lifetime: own.then(|| Lifetime::begin(AtEnd::Keep)),
                holds: 0,
                held_end: None,
                idle: None,
            }),
        })
    }

    pub(crate) fn owner(&self) -> &Arc<Owner> {
        &self.config.owner
    }

    pub(crate) fn is_of(&self, config: &Arc<Config>) -> bool {
        Arc::ptr_eq(&self.config, config)
    }

    pub(crate) fn len(&self) -> usize {
        self.lock().live as usize
    }

    pub(crate) fn is_gone(&self) -> bool {
        self.lock().stage != Stage::Counting
    }

    #[inline]
    fn runtime(&self) -> Option<&Arc<Runtime>> {
        self.runtime.as_ref().or_else(|| self.late_runtime.get())
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        lock(&self.inner)
    }

    /// After a change that may have been the last: counts the set as over, or moves counts out
    /// that are about to overflow.
    #[inline]
    fn settle(self: &Arc<Self>, over: bool, full: bool) {
        if over || full {
            self.settle_now(over);
        }
    }

    #[inline(never)]
    fn settle_now(self: &Arc<Self>, over: bool) {
        if over {
            self.owner().retire(self);
        } else {
            self.owner().fold(self);
        }
    }

    /// Takes a task in, or says why not. Either way the attempt is counted, unless the set is gone.
    // Not inlined: it is the half of a spawn that does not depend on the future's type.
    #[inline(never)]
    pub(crate) fn admit(self: &Arc<Self>, plan: &Plan) -> Result<Ticket, Refusal> {
        let Some(runtime) = self.live_runtime() else {
            return Err(self.refuse(self.lock(), plan, SpawnError::NoRuntime));
        };
        self.enter(plan, Some(runtime))
    }

    /// Gives a task that was admitted to the runtime.
    #[inline]
    #[track_caller]
    pub(crate) fn spawn<F>(self: &Arc<Self>, ticket: &Ticket, future: F) -> TaskHandle<F::Output>
    where
        F: Future + Send + 'static,
        F::Output: Send + 'static,
    {
        let member = ticket.member(self);
        let runtime = self.runtime().expect("who is admitted has one");
        let join = runtime.handle.spawn(Tracked::new(future, member));
        TaskHandle::new(join, ticket.canceller(self))
    }

    /// Takes a task in without looking for a runtime to run it.
    #[inline]
    pub(crate) fn enter(
        self: &Arc<Self>,
        plan: &Plan,
        runtime: Option<&Arc<Runtime>>,
    ) -> Result<Ticket, Refusal> {
        let home = self.new_home(plan);
        let mut inner = self.lock();
        let lifetime = match self.may_enter(&inner, plan) {
            Ok(lifetime) => lifetime,
            Err(reason) => {
                let refusal = self.refuse(inner, plan, reason);
                drop(home);
                return Err(refusal);
            }
        };
        let kind = inner.kind(plan);
        let count = &mut inner.kinds[kind];
        count.attempted += 1;
        count.spawned += 1;
        let full = count.is_full();
        inner.live += 1;
        let (slot, generation) = inner.take_slot(kind);
        let observed = self.config.observer.is_some();
        let has_extra = plan.choice.is_some() || lifetime.is_some() || home.is_some() || observed;
        if has_extra {
            self.enter_with(inner, plan, runtime, slot, lifetime, home);
        } else {
            drop(inner);
        }
        self.settle(false, full);
        Ok(Ticket { slot, generation, has_extra })
    }

    /// The rest of it, for a task that the set knows more of.
    #[inline(never)]
    fn enter_with(
        self: &Arc<Self>,
        mut inner: MutexGuard<'_, Inner>,
        plan: &Plan,
        runtime: Option<&Arc<Runtime>>,
        slot: u32,
        lifetime: Option<Box<Lifetime>>,
        home: Option<Box<Home>>,
    ) {
        let extra = self.new_extra(plan, runtime, slot, lifetime, home);
        let keys = [extra.timeout, extra.lifetime.and_then(|lifetime| lifetime.key)];
        inner.extras.insert(slot, extra);
        drop(inner);
        if let (Some((at, _)), Some(runtime)) = (keys.into_iter().flatten().min(), runtime) {
            runtime.wind(at);
        }
        if let Some(observer) = &self.config.observer {
            let event = TaskEvent::Started { name: plan.name, site: plan.site };
            drop(catch(|| observer.observe(&event)));
        }
    }

    /// Whether the task may, with a permit taken; and the lifetime of its own that it has from the
    /// task that spawns it, if it has.
    #[inline]
    fn may_enter(
        self: &Arc<Self>,
        inner: &Inner,
        plan: &Plan,
    ) -> Result<Option<Box<Lifetime>>, SpawnError> {
        if inner.closed || inner.cancelled || inner.stage != Stage::Counting {
            return Err(SpawnError::Closed);
        }
        let lifetime = match inner.end {
            None => None,
            Some(end) => self.may_enter_late(inner, plan, end)?,
        };
        if let Some(limit) = &self.config.limit {
            if !self.own && inner.live as usize >= limit.limit_per_request() {
                return Err(SpawnError::Full);
            }
            limit.try_acquire()?.forget();
        }
        Ok(lifetime)
    }

    /// After the response: a task that may still run may still spawn.
    #[inline(never)]
    fn may_enter_late(
        self: &Arc<Self>,
        inner: &Inner,
        plan: &Plan,
        end: End,
    ) -> Result<Option<Box<Lifetime>>, SpawnError> {
        let parent = place::slot_in(self).ok_or(SpawnError::Closed)?;
        if inner.order(parent).is_some() {
            return Err(SpawnError::Closed);
        }
        let own = inner.extras.get(&parent).and_then(|extra| extra.lifetime);
        let lifetime = match (plan.policy(), own.or(inner.lifetime)) {
            (Some(policy), Some(parent)) => Some(parent.of_child(policy.get(end))?),
            // It lives as its parent does, or as all others do.
            _ => own.map(Lifetime::inherited),
        };
        Ok(lifetime.map(Box::new))
    }

    fn new_extra(
        self: &Arc<Self>,
        plan: &Plan,
        runtime: Option<&Arc<Runtime>>,
        slot: u32,
        lifetime: Option<Box<Lifetime>>,
        home: Option<Box<Home>>,
    ) -> Extra {
        let mut lifetime = lifetime.map(|lifetime| *lifetime);
        if let Some(lifetime) = &mut lifetime {
            lifetime.key = self.note(runtime, lifetime.until, Who::Task(slot));
        }
        let timeout = plan.choice.as_ref().and_then(|choice| choice.timeout);
        let timeout = timeout.and_then(|timeout| Instant::now().checked_add(timeout));
        Extra {
            // What belongs to no request is kept.
            policy: plan.policy().filter(|_| !self.own).cloned(),
            lifetime,
            timeout: self.note(runtime, timeout, Who::Task(slot)),
            trace_id: home.as_ref().and_then(|home| home.scope.trace_id()),
            home,
            started: self.config.observer.as_ref().map(|_| Instant::now()),
            ..Extra::default()
        }
    }

    /// Counts a refusal.
    fn refuse(
        self: &Arc<Self>,
        mut inner: MutexGuard<'_, Inner>,
        plan: &Plan,
        reason: SpawnError,
    ) -> Refusal {
        if inner.stage != Stage::Counting {
            if self.own {
                return Refusal::Gone;
            }
            drop(inner);
            self.owner().refuse_late(self.place, plan.name);
            return Refusal::Because(reason);
        }
        let kind = inner.kind(plan);
        let count = &mut inner.kinds[kind];
        count.attempted += 1;
        count.refused += 1;
        let full = count.is_full();
        let over = inner.is_over(self.own);
        drop(inner);
        self.settle(over, full);
        Refusal::Because(reason)
    }

    /// The runtime, if it still runs tasks.
    fn live_runtime(self: &Arc<Self>) -> Option<&Arc<Runtime>> {
        let runtime = match self.runtime() {
            Some(runtime) => runtime,
            None => {
                let here = self.owner().runtime(Handle::try_current().ok()?);
                self.late_runtime.get_or_init(|| here)
            }
        };
        // The set's own code runs on a runtime that lives.
        (place::is_current(self) || runtime.is_alive()).then_some(runtime)
    }

    /// The context and the span of a new task, if they are not just the set's context or what is
    /// inherited from it when somebody asks.
    #[inline]
    fn new_home(&self, plan: &Plan) -> Option<Box<Home>> {
        let elsewhere = Scope::other_than(&self.context);
        if elsewhere.is_none() && !self.context.inherits() {
            return None;
        }
        self.new_home_in(elsewhere, plan)
    }

    #[inline(never)]
    fn new_home_in(&self, elsewhere: Option<RequestContext>, plan: &Plan) -> Option<Box<Home>> {
        let context = elsewhere.as_ref().unwrap_or(&self.context);
        let task = self.task(plan);
        // The code of whoever made the values.
        let spanned = catch(|| {
            context.wants_span(&task).then(|| {
                let own = context.inherit(&task);
                let span = own.span(&task);
                let span = Some(span).filter(|span| !span.is_disabled());
                Box::new(Home { scope: Scope::new(own), span })
            })
        });
        if let Ok(Some(home)) = spanned {
            return Some(home);
        }
        elsewhere.map(|context| Box::new(Home { scope: Scope::of_task(context, task), span: None }))
    }

    fn task(&self, plan: &Plan) -> Task {
        let kept = self.own || plan.policy().and_then(Policy::general) == Some(AtEnd::Keep);
        Task::new(plan.name, plan.site).kept(kept)
    }

    /// Notes a deadline, if there is one and a runtime that keeps it.
    fn note(
        self: &Arc<Self>,
        runtime: Option<&Arc<Runtime>>,
        until: Option<Instant>,
        who: Who,
    ) -> Option<Key> {
        runtime?.add(until?, self, who)
    }

    /// Forgets a deadline that was [noted](Self::note).
    fn forget(&self, key: Option<Key>) {
        if let (Some(key), Some(runtime)) = (key, self.runtime()) {
            runtime.remove(key);
        }
    }

    /// Whether some task was told something: then it looks at its [`order`](Self::order).
    #[inline]
    pub(crate) fn has_orders(&self) -> bool {
        // Relaxed, for what counts is read under the lock. A task that misses the flag here has
        // either not given its waker yet, and looks again when it does; or it was woken after the
        // flag was set, and what it does then is ordered after that.
        self.orders.load(Ordering::Relaxed)
    }

    #[inline(never)]
    pub(crate) fn order(&self, slot: u32) -> Option<Order> {
        self.lock().order(slot)
    }

    /// The task awaits for the first time. It may have been told something while its waker was not
    /// known.
    #[inline(never)]
    pub(crate) fn wait(&self, slot: u32, waker: &Waker) -> Option<Order> {
        let age = self.born.elapsed();
        let ticks = u64::from(age.subsec_nanos() / (1_000_000_000 / TICKS));
        let since = age.as_secs().saturating_mul(TICKS.into()).saturating_add(ticks);
        let waker = waker.clone();
        let mut inner = self.lock();
        let order = inner.order(slot);
        let entry = &mut inner.tasks[slot as usize];
        entry.since = u32::try_from(since).unwrap_or(u32::MAX);
        let unneeded = match order {
            None => entry.waker.replace(waker),
            Some(_) => Some(waker),
        };
        drop(inner);
        drop(unneeded);
        order
    }

    #[inline]
    pub(crate) fn has_context(&self) -> bool {
        !self.context.is_empty()
    }

    /// Where to run the task: its own place, or the context of the set.
    fn home(&self, slot: u32, has_extra: bool) -> Home {
        if has_extra {
            let mut inner = self.lock();
            if let Some(home) = inner.extras.get_mut(&slot).and_then(|extra| extra.home.as_mut()) {
                return std::mem::take(&mut **home);
            }
        }
        let scope = if self.context.inherits() {
            let (name, site) = self.name_and_site(slot);
            Scope::of_task(self.context.clone(), Task::new(name, site).kept(self.own))
        } else {
            Scope::new(self.context.clone())
        };
        Home { scope, span: None }
    }

    /// The task's code is about to run.
    #[inline(never)]
    pub(crate) fn enter_home(&self, slot: u32, has_extra: bool, home: &mut Option<Home>) {
        home.insert(self.home(slot, has_extra)).enter();
    }

    /// The task's code has run. What is its own is kept for its next poll. Whether the set now
    /// knows more of it than its entry.
    #[inline(never)]
    pub(crate) fn leave_home(&self, slot: u32, home: &mut Option<Home>) -> bool {
        let Some(mut home) = home.take() else { return false };
        home.leave();
        let mut inner = self.lock();
        if let Some(kept) = inner.extras.get_mut(&slot).and_then(|extra| extra.home.as_mut()) {
            **kept = home;
            return true;
        }
        let is_its_own = self.context.inherits() && !home.scope.is_pending();
        if is_its_own {
            inner.extras.entry(slot).or_default().home = Some(Box::new(home));
        } else {
            // Values may be the code of others.
            drop(inner);
            drop(home);
        }
        is_its_own
    }

    /// The task's future is about to be dropped. Whether its context is now the current one.
    #[inline(never)]
    pub(crate) fn enter_drop(&self, slot: u32, has_extra: bool) -> bool {
        let mut home = self.home(slot, has_extra);
        home.enter();
        let nothing_was_current = home.scope.is_empty();
        if !nothing_was_current {
            home.leave();
        } else if home.span.is_some() {
            self.lock().extras.entry(slot).or_default().span = home.span;
        }
        nothing_was_current
    }

    /// It has been dropped, and was [entered](Self::enter_drop).
    #[inline(never)]
    pub(crate) fn leave_drop(&self, slot: u32) {
        let span = self.lock().extras.get_mut(&slot).and_then(|extra| extra.span.take());
        let mut home = Home { scope: Scope::default(), span };
        home.leave();
        // Values are the code of others.
        drop(catch(|| drop(home)));
    }

    /// The task has ended, and its destructors have run. What others wait for is done before it is
    /// counted: who finds no task alive finds the permit free, and the observer told.
    #[inline(never)]
    pub(crate) fn leave(self: &Arc<Self>, slot: u32, has_extra: bool, outcome: Outcome) {
        if has_extra {
            self.part(slot, outcome);
        }
        if let Some(limit) = &self.config.limit {
            limit.release();
        }
        let mut inner = self.lock();
        let (kind, waker) = inner.free_slot(slot);
        inner.kinds[kind].end(outcome);
        if !inner.extras.is_empty() {
            inner.extras.remove(&slot);
        }
        inner.live -= 1;
        if inner.live == 0 {
            self.leave_last(inner);
        } else {
            drop(inner);
        }
        drop(waker);
    }

    #[inline(never)]
    fn leave_last(self: &Arc<Self>, mut inner: MutexGuard<'_, Inner>) {
        let idle = inner.idle.take();
        self.forget(inner.lifetime.as_mut().and_then(|lifetime| lifetime.key.take()));
        let over = inner.is_over(self.own);
        drop(inner);
        if let Some(idle) = idle {
            idle.notify_waiters();
        }
        self.settle(over, false);
    }

    /// Ends what the set knows of a task beyond its entry.
    #[inline(never)]
    fn part(&self, slot: u32, outcome: Outcome) {
        let Some(extra) = self.lock().extras.remove(&slot) else { return };
        self.forget(extra.timeout);
        self.forget(extra.lifetime.and_then(|lifetime| lifetime.key));
        // An observer, values and a span: the code of others.
        if let (Some(observer), Some(started)) = (&self.config.observer, extra.started) {
            let (name, site) = self.name_and_site(slot);
            let event = TaskEvent::Ended { name, site, outcome, elapsed: started.elapsed() };
            drop(catch(|| observer.observe(&event)));
        }
        drop(catch(|| drop(extra)));
    }

    pub(crate) fn name_and_site(&self, slot: u32) -> (&'static str, &'static Location<'static>) {
        let inner = self.lock();
        let kind = &inner.kinds[usize::from(inner.tasks[slot as usize].kind)];
        (kind.name, kind.site)
    }

    /// The response is over.
    pub(crate) fn end(self: &Arc<Self>, end: End) {
        let mut inner = self.lock();
        if inner.end.is_some() {
            return;
        }
        if inner.holds > 0 {
            inner.held_end.get_or_insert(end);
            return;
        }
        inner.end = Some(end);
        if inner.live == 0 || inner.cancelled {
            let over = inner.is_over(self.own);
            drop(inner);
            return self.settle(over, false);
        }
        let chosen = self.policy(&inner).get(end).unwrap_or_default();
        let order = Order::Cancel(end.into());
        let mut told = false;
        let mut earliest = None;
        let mut lifetime = Lifetime::begin(chosen);
        if lifetime.is_over() {
            inner.order = Some(order);
            told = true;
        } else if !lifetime.is_far() {
            lifetime.key = self.note(self.runtime(), lifetime.until, Who::Set);
            earliest = lifetime.until;
        }
        let is_far = lifetime.is_far();
        inner.lifetime = Some(lifetime);
        for (slot, extra) in &mut inner.extras {
            let Some(policy) = &extra.policy else { continue };
            let mut lifetime = Lifetime::begin(policy.get(end).unwrap_or(chosen));
            if lifetime.is_over() {
                extra.order.get_or_insert(order);
                told = true;
            } else {
                lifetime.key = self.note(self.runtime(), lifetime.until, Who::Task(*slot));
                earliest = earliest.into_iter().chain(lifetime.until).min();
            }
            extra.lifetime = Some(lifetime);
        }
        drop(inner);
        if let Some(runtime) = self.runtime() {
            if is_far {
                runtime.expect();
            }
            if let Some(at) = earliest {
                runtime.wind(at);
            }
        }
        if told {
            self.wake_told();
        }
    }

    /// The reaper looks for deadlines that were far away, and takes in what comes before
    /// `horizon`. Whether this set has one.
    pub(crate) fn come_near(self: &Arc<Self>, runtime: &Arc<Runtime>, horizon: Instant) -> bool {
        if !self.runtime().is_some_and(|own| Arc::ptr_eq(own, runtime)) {
            return false;
        }
        let mut inner = self.lock();
        if inner.live == 0 || inner.order.is_some() {
            return false;
        }
        let Some(lifetime) = &mut inner.lifetime else { return false };
        let Some(until) = lifetime.until else { return false };
        if lifetime.key.is_none() && until <= horizon {
            lifetime.key = runtime.add(until, self, Who::Set);
        }
        true
    }

    /// A deadline that was [noted](Self::note) has come.
    pub(crate) fn lapse(&self, key: Key, who: Who) {
        let mut inner = self.lock();
        let order = Order::Cancel(inner.end.map_or(Cause::Requested, Cause::from));
        match who {
            Who::Set => match &mut inner.lifetime {
                Some(lifetime) if lifetime.key == Some(key) => {
                    lifetime.key = None;
                    inner.order.get_or_insert(order);
                    drop(inner);
                    self.wake_told();
                }
                _ => {}
            },
            Who::Task(slot) => {
                let Some(extra) = inner.extras.get_mut(&slot) else {
                    return;
                };
                if extra.timeout == Some(key) {
                    extra.timeout = None;
                    extra.order.get_or_insert(Order::TimeOut);
                } else if let Some(lifetime) =
                    extra.lifetime.as_mut().filter(|lifetime| lifetime.key == Some(key))
                {
                    lifetime.key = None;
                    extra.order.get_or_insert(order);
                } else {
                    return;
                }
                self.wake_one(inner, slot);
            }
        }
    }

    /// Tells one task to end.
    pub(crate) fn cancel_task(&self, slot: u32, generation: u16) {
        let mut inner = self.lock();
        let entry = &inner.tasks[slot as usize];
        if entry.kind != FREE && entry.generation == generation {
            let extra = inner.extras.entry(slot).or_default();
            extra.order.get_or_insert(Order::Cancel(Cause::Requested));
            self.wake_one(inner, slot);
        }
    }

    /// Tells all tasks to end, and accepts no more.
    pub(crate) fn cancel(&self, cause: Cause) {
        let mut inner = self.lock();
        inner.cancelled = true;
        let order = Order::Cancel(cause);
        inner.order.get_or_insert(order);
        for extra in inner.extras.values_mut().filter(|extra| extra.has_own_lifetime()) {
            extra.order.get_or_insert(order);
        }
        drop(inner);
        self.wake_told();
    }

    fn wake_one(&self, mut inner: MutexGuard<'_, Inner>, slot: u32) {
        self.orders.store(true, Ordering::Relaxed);
        let waker = inner.tasks[slot as usize].waker.take();
        drop(inner);
        if let Some(waker) = waker {
            waker.wake();
        }
    }

    /// Wakes whoever was told something and does not know yet, some at a time: to wake a task of a
    /// dead runtime is to drop it.
    fn wake_told(&self) {
        self.orders.store(true, Ordering::Relaxed);
        let mut next = 0;
        loop {
            let mut wakers: SmallVec<[Waker; WAKERS]> = SmallVec::new();
            let mut inner = self.lock();
            while wakers.len() < WAKERS && next < inner.tasks.len() {
                // There are no more than `u32::MAX`.
                let slot = u32::try_from(next).unwrap_or(NONE);
                if inner.tasks[next].waker.is_some() && inner.order(slot).is_some() {
                    wakers.extend(inner.tasks[next].waker.take());
                }
                next += 1;
            }
            drop(inner);
            if wakers.is_empty() {
                return;
            }
            wakers.into_iter().for_each(Waker::wake);
        }
    }

    /// Accepts no task from now on.
    pub(crate) fn close(&self) {
        self.lock().closed = true;
    }

    /// The registry has another for the tasks that belong to no request.
    pub(crate) fn disown(self: &Arc<Self>) {
        let mut inner = self.lock();
        if inner.stage == Stage::Counting {
            inner.stage = Stage::Gone;
        }
        let over = inner.is_over(self.own);
        drop(inner);
        self.settle(over, false);
    }

    fn policy<'a>(&'a self, inner: &'a Inner) -> &'a Policy {
        inner.policy.as_deref().unwrap_or(&self.config.policy)
    }

    /// Adds what was chosen on the set, or by a layer further inside.
    pub(crate) fn add_policy(&self, chosen: &Policy) {
        let mut inner = self.lock();
        inner.policy.get_or_insert_with(|| Box::new(self.config.policy.clone())).add(chosen);
    }

    /// Whether it could still be held.
    fn hold(&self) -> bool {
        let mut inner = self.lock();
        let open = inner.end.is_none();
        if open {
            inner.holds += 1;
        }
        open
    }

    fn let_go(self: &Arc<Self>) {
        let mut inner = self.lock();
        inner.holds -= 1;
        let end = if inner.holds == 0 { inner.held_end.take() } else { None };
        drop(inner);
        if let Some(end) = end {
            self.end(end);
        }
    }

    /// Waits until no task lives.
    pub(crate) async fn idle(&self) {
        loop {
            let notified = {
                let mut inner = self.lock();
                if inner.live == 0 {
                    return;
                }
                // Made under the lock under which the last task looks for it, so that it cannot be
                // missed.
                inner.idle.get_or_insert_default().clone().notified_owned()
            };
            notified.await;
        }
    }

    /// Counts it as over, if it is, and if that has not been done.
    pub(crate) fn retire(&self, mut add: impl FnMut(&'static str, Counts)) -> bool {
        let mut inner = self.lock();
        if !inner.is_over(self.own) {
            return false;
        }
        inner.stage = Stage::Retired;
        for kind in &inner.kinds {
            add(kind.name, kind.counts(0));
        }
        true
    }

    /// Moves what is over out of it.
    pub(crate) fn fold(&self, mut add: impl FnMut(&'static str, Counts)) {
        let mut inner = self.lock();
        if inner.stage != Stage::Retired {
            for kind in &mut inner.kinds {
                add(kind.name, kind.take());
            }
        }
    }

    /// All that is known of it now.
    pub(crate) fn read(&self) -> Reading {
        // Made before the lock is taken; a few may come in between.
        let mut tasks = Vec::with_capacity(self.len());
        let inner = self.lock();
        let general = self.policy(&inner).general().unwrap_or_default();
        for (slot, entry) in (0..).zip(&inner.tasks) {
            if entry.kind == FREE {
                continue;
            }
            let extra = if inner.extras.is_empty() { None } else { inner.extras.get(&slot) };
            let own = extra.filter(|extra| extra.has_own_lifetime());
            let lifetime = match own {
                Some(own) => own.lifetime,
                None => inner.lifetime,
            };
            let chosen = own.and_then(|own| own.policy.as_ref()?.general()).unwrap_or(general);
            let state = match lifetime {
                _ if inner.order(slot).is_some() => TaskState::Cancelling,
                None => TaskState::Running,
                Some(Lifetime { at_end: AtEnd::Keep, .. }) => TaskState::Kept,
                Some(_) => TaskState::Draining,
            };
            tasks.push(ReadTask {
                kind: entry.kind,
                since: entry.since,
                state,
                at_end: lifetime.map_or(chosen, |lifetime| lifetime.at_end),
                trace_id: extra.and_then(|extra| extra.trace_id),
            });
        }
        let kinds = inner.kinds.to_vec();
        drop(inner);
        let trace_id = self.context.get().copied();
        Reading { kinds, tasks, age: self.born.elapsed(), trace_id }
    }

    pub(crate) fn tell_drop_panic(&self, slot: u32) {
        let (name, site) = self.name_and_site(slot);
        // The subscriber is the user's code.
        drop(catch(|| {
            tracing::error!(task = name, spawned_at = %site, "task panicked while it was dropped");
        }));
    }
}

impl fmt::Debug for Set {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Set").field("len", &self.len()).finish_non_exhaustive()
    }
}

impl Inner {
    /// What the task in this slot was told.
    fn order(&self, slot: u32) -> Option<Order> {
        match self.extras.get(&slot) {
            Some(extra) if extra.order.is_some() || extra.has_own_lifetime() => extra.order,
            _ => self.order,
        }
    }

    /// Whether nothing will be counted here any more. A set of the registry takes no more tasks
    /// then: it would have to be counted twice.
    fn is_over(&mut self, own: bool) -> bool {
        let over = self.live == 0
            && self.holds == 0
            && (own || self.end.is_some())
            && self.stage != Stage::Retired;
        if over && own {
            self.stage = Stage::Gone;
        }
        over
    }

    #[inline]
    fn kind(&mut self, plan: &Plan) -> usize {
        match self.kinds.first() {
            Some(first) if first.is(plan.name, plan.site) => 0,
            _ => self.other_kind(plan),
        }
    }

    #[inline(never)]
    fn other_kind(&mut self, plan: &Plan) -> usize {
        let found = match &self.index {
            None => self.kinds.iter().position(|kind| kind.is(plan.name, plan.site)),
            Some(index) => index.get(&address(plan.name, plan.site)).copied(),
        };
        found.unwrap_or_else(|| self.add_kind(plan))
    }

    #[cold]
    fn add_kind(&mut self, plan: &Plan) -> usize {
        if self.kinds.len() > KINDS_MAX {
            return KINDS_MAX;
        }
        let other = self.kinds.len() == KINDS_MAX;
        self.kinds.push(Kind::new(if other { OTHER } else { plan.name }, plan.site));
        if self.kinds.len() > KINDS_LISTED {
            let kinds = &self.kinds;
            let index = self.index.get_or_insert_with(|| {
                let listed = kinds.iter().enumerate();
                Box::new(listed.map(|(at, kind)| (address(kind.name, kind.site), at)).collect())
            });
            index.insert(address(plan.name, plan.site), self.kinds.len() - 1);
        }
        self.kinds.len() - 1
    }

    fn take_slot(&mut self, kind: usize) -> (u32, u16) {
        // There are less than `FREE`.
        let kind = u16::try_from(kind).unwrap_or(FREE - 1);
        if let Some(entry) = self.tasks.get_mut(self.free as usize) {
            let slot = std::mem::replace(&mut self.free, entry.since);
            entry.since = 0;
            entry.kind = kind;
            return (slot, entry.generation);
        }
        self.tasks.push(Entry { waker: None, since: 0, kind, generation: 0 });
        // A million tasks are some 300 MB: there are no 4 billion.
        (u32::try_from(self.tasks.len() - 1).unwrap_or(NONE), 0)
    }

    fn free_slot(&mut self, slot: u32) -> (usize, Option<Waker>) {
        let entry = &mut self.tasks[slot as usize];
        let kind = std::mem::replace(&mut entry.kind, FREE);
        entry.since = std::mem::replace(&mut self.free, slot);
        entry.generation = entry.generation.wrapping_add(1);
        (kind.into(), entry.waker.take())
    }
}

fn address(name: &'static str, site: &'static Location<'static>) -> (usize, usize) {
    (name.as_ptr() as usize, std::ptr::from_ref(site) as usize)
}

/// What was read of a set for a snapshot.
pub(crate) struct Reading {
    kinds: Vec<Kind>,
    tasks: Vec<ReadTask>,
    age: Duration,
    trace_id: Option<TraceId>,
}

struct ReadTask {
    kind: u16,
    since: u32,
    state: TaskState,
    at_end: AtEnd,
    trace_id: Option<TraceId>,
}

impl Reading {
    pub(crate) fn add_to(self, snapshot: &mut Snapshot) {
        let mut live = vec![0; self.kinds.len()];
        snapshot.live_tasks.reserve(self.tasks.len());
        for task in self.tasks {
            let kind = usize::from(task.kind);
            live[kind] += 1;
            let since = Duration::from_secs(1) * task.since / TICKS;
            snapshot.live_tasks.push(LiveTask {
                name: self.kinds[kind].name,
                site: self.kinds[kind].site,
                age: self.age.saturating_sub(since),
                state: task.state,
                trace_id: task.trace_id.or(self.trace_id),
                at_end: task.at_end,
            });
        }
        for (kind, live) in self.kinds.into_iter().zip(live) {
            snapshot.add(kind.name, kind.counts(live));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_waiting_task_costs_its_set_24_bytes() {
        assert_eq!(size_of::<Entry>(), 24);
    }

    #[test]
    fn a_set_folds_its_counts_before_they_overflow() {
        let registry = TaskRegistry::new();
        let set = Set::new(registry.config().clone(), RequestContext::new());
        let plan = Plan::new("task", Location::caller());
        let first = set.enter(&plan, None).expect("it is open").member(&set);
        let nearly = u64::from(u32::MAX / 2) - 2;
        set.lock().kinds[0].attempted += u32::try_from(nearly).expect("fits");
        set.lock().kinds[0].refused += u32::try_from(nearly).expect("fits");

        let enter = |_| set.enter(&plan, None).expect("it is open").member(&set);
        let members: Vec<_> = (0..5).map(enter).collect();
        let counts = registry.snapshot().totals;
        assert!(counts.is_exact(), "{counts:?}");
        assert_eq!((counts.attempted, counts.live), (nearly + 6, 6));
        assert!(set.lock().kinds[0].attempted < 10, "what is over was moved out");

        drop((first, members));
        set.end(End::Completed);
        let counts = registry.snapshot().totals;
        assert!(counts.is_exact(), "{counts:?}");
        assert_eq!((counts.attempted, counts.aborted, counts.live), (nearly + 6, 6, 0));
    }

    #[test]
    fn many_kinds_in_one_set_are_told_apart() {
        let registry = TaskRegistry::new();
        let set = Set::new(registry.config().clone(), RequestContext::new());
        let site = Location::caller();
        let names: Vec<&'static str> =
            (0..100).map(|n| &*Box::leak(n.to_string().into_boxed_str())).collect();
        for name in names.iter().chain(&names) {
            drop(set.enter(&Plan::new(name, site), None).expect("it is open").member(&set));
        }
        let by_name = registry.snapshot().by_name;
        assert_eq!(by_name.len(), 100);
        assert!(by_name.values().all(|counts| counts.spawned == 2));
    }
}
