use std::{
    fmt,
    hash::{DefaultHasher, Hash, Hasher},
    mem,
    panic::Location,
    sync::{Arc, PoisonError},
    thread,
    time::Duration,
};

use tokio::runtime;
use tower_catch_unwind::Log;
use tower_response_end::End;
use tower_spawn_limit::{Refused, SpawnError, SpawnLimit};

use crate::{
    AtEnd, FailFast, Group, Observe, OnPanic, Snapshot, StopToken, TaskHandle,
    ledger::{Base, ForcedTasks},
    lifetime::Policy,
    reaper::Runtime,
    set::{Refusal, Set, Ticket},
    sync::{Mutex, MutexGuard, Notify, OwnedNotified, lock, notify},
    task::Cause,
    task_set::{NewTask, Plan},
};

/// The owner of all tasks of a process, or of a part of it: limits, policies, and the ledger.
///
/// A clone is the same registry. Choices made on a clone are the clone's, and those of the layers
/// that are made with it; the ledger is one.
///
/// Dropping it changes nothing: tasks go on, and are still counted for those who have a clone.
#[derive(Clone)]
pub struct TaskRegistry(Arc<Handle>);

#[derive(Clone)]
struct Handle {
    config: Arc<Config>,
    _users: Option<Arc<Users>>,
}

/// A registry's owner, and the choices made on one of its handles or layers.
#[derive(Clone)]
pub(crate) struct Config {
    pub(crate) owner: Arc<Owner>,
    pub(crate) limit: Option<SpawnLimit>,
    pub(crate) runtime: Option<runtime::Handle>,
    pub(crate) observer: Option<Arc<dyn Observe>>,
    pub(crate) log: Arc<Log>,
    pub(crate) policy: Policy,
    /// That part of it that was chosen on a layer.
    pub(crate) layer: Policy,
}

impl TaskRegistry {
    /// A registry of its own, without a limit.
    pub fn new() -> Self {
        let owner: Arc<Owner> = Arc::default();
        let users = Some(Arc::new(Users(owner.clone())));
        let config = Config {
            owner,
            limit: None,
            runtime: None,
            observer: None,
            log: Arc::default(),
            policy: Policy::default(),
            layer: Policy::default(),
        };
        Self(Arc::new(Handle { config: Arc::new(config), _users: users }))
    }

    /// No more tasks at once than `limit` says: those that are too many are refused.
    pub fn limit(mut self, limit: SpawnLimit) -> Self {
        self.choose().limit = Some(limit);
        self
    }

    /// Runs the tasks on this runtime. The default is the one that is current when a request's set
    /// is first asked for.
    pub fn runtime(mut self, runtime: runtime::Handle) -> Self {
        self.choose().runtime = Some(runtime);
        self
    }

    /// What becomes of tasks at the end of their response, if neither the layer nor the set nor
    /// the task says otherwise.
    pub fn at_end(mut self, lifetime: AtEnd) -> Self {
        self.choose().policy.at_end(lifetime);
        self
    }

    /// The exception to [`at_end`](Self::at_end) for one end.
    pub fn on(mut self, end: End, lifetime: AtEnd) -> Self {
        self.choose().policy.on(end, lifetime);
        self
    }

    /// How long graceful tasks may go on after they were told to end, if neither the layer nor the
    /// set nor the task says otherwise: see [`NewTask::grace`].
    pub fn grace(mut self, grace: Duration) -> Self {
        self.choose().policy.set_grace(grace);
        self
    }

    /// What else becomes of it when a task panics, if neither the layer nor the set nor the task
    /// says otherwise.
    pub fn on_panic(mut self, choice: OnPanic) -> Self {
        self.choose().policy.on_panic(choice);
        self
    }

    /// Tells `observer` of the start and the end of every task.
    pub fn observer(mut self, observer: impl Observe) -> Self {
        self.choose().observer = Some(Arc::new(observer));
        self
    }

    /// Logs at most so many panics in a second, of tasks and of what is called for them; 0 logs
    /// none. The default is 20. The next event says how many were left out, in its field
    /// `suppressed`; the ledger counts them all.
    ///
    /// Choose it by what your log can bear, not by how many panics there may be.
    pub fn max_events_per_second(mut self, max: u32) -> Self {
        self.choose().log = Arc::new(Log::new(max));
        self
    }

    /// Spawns a task that belongs to no request: it is kept until it ends or the process does.
    ///
    /// It runs in the [`RequestContext`](tower_request_context::RequestContext) that is current
    /// here.
    ///
    /// # Errors
    ///
    /// As [`TaskSet::spawn`](crate::TaskSet::spawn); the registry's limit counts, the limit for
    /// each request does not.
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
        match self.admit(&Plan::new(name, Location::caller())) {
            Ok((set, ticket)) => Ok(set.spawn(ticket, ticket.track(&set, future))),
            Err(refusal) => Err(Refused { reason: refusal.reason(), future }),
        }
    }

    /// Spawns a task that belongs to no request; if a limit is full, it waits for a permit at most
    /// so long: see [`TaskSet::spawn_within`](crate::TaskSet::spawn_within).
    ///
    /// # Errors
    ///
    /// As [`spawn`](Self::spawn).
    ///
    /// # Cancel safety
    ///
    /// Dropping it drops the future, of which nothing has run, and gives up the place in the line.
    #[track_caller]
    pub fn spawn_within<F>(
        &self,
        wait: Duration,
        name: &'static str,
        future: F,
    ) -> impl Future<Output = Result<TaskHandle<F::Output>, Refused<F>>> + Send
    where
        F: Future + Send + 'static,
        F::Output: Send + 'static,
    {
        self.task(name).within(wait).spawn(future)
    }

    /// Spawns a task that belongs to no request and is not just dropped when it is told to end:
    /// see [`TaskSet::spawn_graceful`](crate::TaskSet::spawn_graceful).
    ///
    /// It is told when [all are cancelled](Self::cancel_all): by tower-tasks' shutdown, when that
    /// has drained, so close to the deadline. A worker that never comes to its end by itself also
    /// watches for the drain (`ShutdownWatch::draining`), or each shutdown takes all of its budget.
    ///
    /// # Errors
    ///
    /// As [`spawn`](Self::spawn); the closure comes back.
    #[track_caller]
    pub fn spawn_graceful<M, F>(
        &self,
        name: &'static str,
        make: M,
    ) -> Result<TaskHandle<F::Output>, Refused<M>>
    where
        M: FnOnce(StopToken) -> F + Send + 'static,
        F: Future + Send + 'static,
        F::Output: Send + 'static,
    {
        self.task(name).spawn_graceful(make)
    }

    /// Runs a closure that belongs to no request on a thread where it may block: see
    /// [`TaskSet::spawn_blocking`](crate::TaskSet::spawn_blocking).
    ///
    /// # Errors
    ///
    /// As [`spawn`](Self::spawn); the closure comes back.
    ///
    /// # Panics
    ///
    /// As [`TaskSet::spawn_blocking`](crate::TaskSet::spawn_blocking).
    #[track_caller]
    pub fn spawn_blocking<F, T>(
        &self,
        name: &'static str,
        closure: F,
    ) -> Result<TaskHandle<T>, Refused<F>>
    where
        F: FnOnce(StopToken) -> T + Send + 'static,
        T: Send + 'static,
    {
        self.task(name).spawn_blocking(closure)
    }

    /// A task that is yet to be spawned, for choices of its own.
    pub const fn task(&self, name: &'static str) -> NewTask<'_, Self> {
        NewTask::new(self, name)
    }

    /// A group of tasks that belong to no request: see [`TaskSet::group`](crate::TaskSet::group).
    pub fn group(&self) -> Group {
        Group::new(self.clone())
    }

    /// The same, where the first task that fails tells the others to end: see
    /// [`TaskSet::try_group`](crate::TaskSet::try_group).
    pub fn try_group<E: Send + 'static>(&self) -> Group<FailFast<E>> {
        Group::fail_fast(self.clone())
    }

    /// How many tasks live.
    pub fn len(&self) -> usize {
        self.owner().sets().iter().map(|set| set.len()).sum()
    }

    /// Whether no task lives.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Accepts no task that belongs to no request from now on: a spawn of one gets
    /// [`SpawnError::Closed`], in a task of the registry too. Requests in flight, those that still
    /// come, and their tasks may spawn until the registry is [closed](Self::close): they are drained,
    /// and so have to come to their end. There is no way back.
    pub fn begin_drain(&self) {
        self.owner().begin_drain();
    }

    /// Accepts no task from now on: every spawn gets [`SpawnError::Closed`]. Tasks that live go on.
    /// There is no way back.
    ///
    /// A spawn on another thread at the same time is accepted or refused, and never lost:
    /// [`wait`](Self::wait) waits for it, or it has its future back.
    pub fn close(&self) {
        self.owner().close();
    }

    /// Whether it was [closed](Self::close).
    pub fn is_closed(&self) -> bool {
        // The last one that `close` comes to: now all are.
        lock(&self.owner().shards[Owner::SHARDS - 1].0).closed
    }

    /// Tells all tasks that live now to end, for [`Cause::Shutdown`], kept ones too: graceful ones
    /// have their grace. Requests that have a set now get no more tasks; later ones do, unless the
    /// registry is [closed](Self::close).
    pub fn cancel_all(&self) {
        for set in self.owner().sets() {
            set.cancel(Cause::Shutdown);
        }
    }

    /// The same, and ends all grace now: a graceful task is dropped at its next await.
    pub fn abort_all(&self) {
        for set in self.owner().sets() {
            set.abort(Cause::Shutdown);
        }
    }

    /// Waits until no task is found alive, and all destructors have run. Unless the registry is
    /// [closed](Self::close), others may come right after, or may have come where it looked already.
    /// A task of the registry that waits for this waits for itself.
    ///
    /// # Cancel safety
    ///
    /// Cancel safe: it only watches.
    pub async fn idle(&self) {
        loop {
            let mut found = false;
            for set in self.owner().sets() {
                if set.len() > 0 {
                    found = true;
                    set.idle().await;
                }
            }
            if !found {
                return;
            }
        }
    }

    /// Whether `other` is a clone of this one: it has the same ledger.
    pub fn ptr_eq(&self, other: &Self) -> bool {
        Arc::ptr_eq(self.owner(), other.owner())
    }

    /// Waits until the registry is [closed](Self::close) and no task lives: all destructors have
    /// run. A task of the registry that waits for this waits for itself.
    ///
    /// # Cancel safety
    ///
    /// Cancel safe: it only watches.
    pub async fn wait(&self) {
        let owner = self.owner();
        loop {
            let changed = owner.changed();
            if self.is_closed() {
                break;
            }
            changed.await;
        }
        // Closed, a set that has no task gets none any more: to see each without once is enough.
        for set in owner.sets() {
            set.idle().await;
        }
    }

    /// The ledger, now.
    ///
    /// It takes some time in proportion to the number of requests that have tasks, and of tasks;
    /// no lock is held for longer than one of them takes. Of a request with more than a thousand tasks
    /// at once it reads a thousand at a time, and between them lets the thread sleep for as short as
    /// the system can, so that others have the lock: where there may be very many, call it where it
    /// may block.
    pub fn snapshot(&self) -> Snapshot {
        self.owner().snapshot()
    }

    /// Not one of the [`Users`]: nobody may keep it.
    pub(crate) fn of(config: Arc<Config>) -> Self {
        Self(Arc::new(Handle { config, _users: None }))
    }

    pub(crate) fn config(&self) -> &Arc<Config> {
        &self.0.config
    }

    pub(crate) fn admit(&self, plan: &Plan<'_>) -> Result<(Arc<Set>, Ticket), Refusal> {
        loop {
            let Some(set) = self.owner().own_set(self.config()) else {
                self.owner().refuse(plan.name);
                return Err(Refusal::Because(SpawnError::Closed));
            };
            // A set whose last task has just ended is replaced by another.
            match set.admit(plan) {
                Ok(ticket) => return Ok((set, ticket)),
                Err(Refusal::Gone) => {}
                Err(refusal) => return Err(refusal),
            }
        }
    }

    /// Counts an attempt that was refused before it came to a set.
    pub(crate) fn count_refused(&self, plan: &Plan<'_>) {
        self.owner().refuse(plan.name);
    }

    pub(crate) fn changed(&self) -> OwnedNotified {
        self.owner().changed()
    }

    fn owner(&self) -> &Arc<Owner> {
        &self.0.config.owner
    }

    #[cfg(all(test, loom))]
    pub(crate) fn own_set(&self) -> Option<Arc<Set>> {
        self.owner().own_set(self.config())
    }

    #[cfg(test)]
    pub(crate) fn sets_listed(&self) -> usize {
        self.owner().sets().len()
    }

    /// How many places there are for sets, and how many of these are spare.
    #[cfg(all(test, not(loom)))]
    pub(crate) fn places(&self) -> [usize; 2] {
        let places = self.owner().shards.iter().map(|shard| {
            let sets = lock(&shard.0);
            [sets.listed.len(), sets.spare.len()]
        });
        places.fold([0; 2], |sum, places| [sum[0] + places[0], sum[1] + places[1]])
    }

    pub(crate) fn choose(&mut self) -> &mut Config {
        Arc::make_mut(&mut Arc::make_mut(&mut self.0).config)
    }
}

impl Default for TaskRegistry {
    fn default() -> Self {
        Self::new()
    }
}

impl fmt::Debug for TaskRegistry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TaskRegistry")
            .field("len", &self.len())
            .field("is_closed", &self.is_closed())
            .field("limit", &self.config().limit)
            .finish_non_exhaustive()
    }
}

impl fmt::Debug for Config {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Config").field("policy", &self.policy).finish_non_exhaustive()
    }
}

/// Fails if a task of the registry lives: the leak check for tests.
///
/// # Panics
///
/// If a task lives; the message lists them.
#[track_caller]
pub fn assert_drained(registry: &TaskRegistry) {
    demand_drained(&registry.snapshot());
}

#[track_caller]
fn demand_drained(snapshot: &Snapshot) {
    let mut list = String::new();
    for task in &snapshot.live_tasks {
        list.push_str("\n  ");
        list.push_str(&task.to_string());
    }
    // The list may miss a task that lives: where one comes as another ends, it has seen the place of
    // the one too early, and that of the other too late.
    assert!(snapshot.totals.live == 0, "{} tasks live:{list}", snapshot.totals.live);
}

/// What all handles of a registry share.
///
/// Lock order: a shard, then a set in it, then a runtime's deadlines. No code of others runs under
/// any of them.
#[derive(Debug)]
pub(crate) struct Owner {
    shards: [Shard; Self::SHARDS],
    runtimes: std::sync::Mutex<Vec<Arc<Runtime>>>,
    changed: Arc<Notify>,
}

impl Default for Owner {
    fn default() -> Self {
        let shard = |number| Shard(Mutex::new(Sets { number, ..Sets::default() }));
        Self {
            shards: std::array::from_fn(shard),
            runtimes: std::sync::Mutex::default(),
            changed: Arc::default(),
        }
    }
}

/// What all handles and layers of a registry have, and its sets have not.
struct Users(Arc<Owner>);

impl Drop for Users {
    // No request wants a set any more; and each has the owner, which has it.
    fn drop(&mut self) {
        for shard in &self.0.shards {
            let mut sets = lock(&shard.0);
            sets.abandoned = true;
            let spare = mem::take(&mut sets.spare);
            let spare: Vec<_> = spare.into_iter().map(|index| sets.unlist(index)).collect();
            drop(sets);
            drop(spare);
        }
    }
}

/// A set stays in the shard of the thread that made it. Apart by a cache line or two.
#[derive(Debug)]
#[repr(align(128))]
struct Shard(Mutex<Sets>);

#[derive(Debug, Default)]
pub(crate) struct Sets {
    /// Those that are not over, and those that are spare. Strong references: with weak ones a snapshot
    /// would miss a set that is gone but not yet counted, and could be the one to drop it, under a
    /// lock.
    listed: Vec<Option<Arc<Set>>>,
    /// Where none is.
    free: Vec<usize>,
    /// Where one is that is over: for the next request. It keeps its counts, and goes on from there.
    /// It is on the runtime that was seen last, or on none yet.
    spare: Vec<usize>,
    /// Which shard this is.
    number: usize,
    /// It has no [`Users`] any more.
    abandoned: bool,
    /// Those that are over and not listed.
    base: Base,
    closed: bool,
    /// Takes no task that belongs to no request.
    draining: bool,
    /// The set of the tasks that belong to no request: there while it has tasks.
    own: Option<Arc<Set>>,
    /// The runtime that was seen last.
    runtime: Option<Arc<Runtime>>,
}

impl Sets {
    /// Whether it takes tasks that belong to no request.
    const fn takes_own(&self) -> bool {
        !self.closed && !self.draining
    }

    /// The set of the tasks that belong to no request, if it serves here.
    fn own_for(&self, config: &Arc<Config>, handle: Option<&runtime::Handle>) -> Option<Arc<Set>> {
        let serves = |own: &&Arc<Set>| own.is_of(config) && own.is_on(handle) && !own.is_gone();
        self.own.as_ref().filter(serves).cloned()
    }

    pub(crate) const fn is_closed(&self) -> bool {
        self.closed
    }

    /// A set that is [blank](Set::is_blank) and nobody else's, for who has this lock: a spare one if
    /// there is one, else a new one.
    ///
    /// `here`: on the runtime that was seen last. If not, on none.
    #[expect(clippy::inline_always, reason = "in one of two places")]
    #[inline(always)]
    pub(crate) fn take(&mut self, here: bool) -> Taken<'_> {
        let spare = if here { self.spare.pop() } else { None };
        let mut lost = None;
        let index = match spare {
            Some(index) if self.is_nobodys(index) => index,
            spare => {
                lost = spare.and_then(|index| self.unlist(index));
                self.add()
            }
        };
        let set = self.listed[index].as_mut().expect("it is there");
        Taken { set, runtime: self.runtime.as_ref().filter(|_| here), lost }
    }

    #[inline]
    fn is_nobodys(&self, index: usize) -> bool {
        self.listed[index].as_ref().is_some_and(|set| Arc::strong_count(set) == 1)
    }

    #[inline(never)]
    fn add(&mut self) -> usize {
        let place = self.free_place();
        self.listed[place.index] = Some(Set::blank(place));
        place.index
    }

    fn free_place(&mut self) -> Place {
        let index = self.free.pop().unwrap_or_else(|| {
            self.listed.push(None);
            self.listed.len() - 1
        });
        Place { shard: self.number, index }
    }

    /// Counts a set that was spare.
    #[cold]
    #[inline(never)]
    fn unlist(&mut self, index: usize) -> Option<Arc<Set>> {
        let set = self.listed[index].take();
        if let Some(set) = &set {
            set.add_to(&mut self.base, None);
        }
        self.free.push(index);
        set
    }

    /// The runtime that is seen now. What is known of the one before is the code of others: to be
    /// dropped when the lock is not held.
    #[cold]
    #[inline(never)]
    fn see(&mut self, runtime: Arc<Runtime>) -> Before {
        let runtime = self.runtime.replace(runtime);
        let spare = self.spare.iter().filter_map(|index| {
            let set = Arc::get_mut(self.listed[*index].as_mut()?)?;
            set.take_runtime()
        });
        let spare = spare.collect();
        Before { _runtime: runtime, _spare: spare }
    }

    /// Whether it has a use for one more set that is spare.
    fn wants_spare(&self) -> bool {
        /// Of at most 5 kB each.
        const MOST: usize = 8;
        self.spare.len() < MOST && !self.abandoned
    }

    /// All that a snapshot does under the lock. Never inlined, for a bench counts its instructions.
    #[inline(never)]
    #[expect(clippy::type_complexity, reason = "taken apart where it is called")]
    fn for_snapshot(&self) -> (Vec<(&'static str, crate::Counts)>, ForcedTasks, Vec<Arc<Set>>) {
        (self.base.counts(), self.base.forced.clone(), self.listed())
    }

    fn in_use(&self) -> Vec<Arc<Set>> {
        let in_use = |(index, set): (usize, &Option<Arc<Set>>)| {
            if self.spare.contains(&index) { None } else { set.clone() }
        };
        // Not grown step by step, for the lock is held.
        let mut sets = Vec::with_capacity(self.listed.len());
        sets.extend(self.listed.iter().enumerate().filter_map(in_use));
        sets
    }

    /// With those that are spare: they have counts, and perhaps nothing else.
    fn listed(&self) -> Vec<Arc<Set>> {
        // As above.
        let mut sets = Vec::with_capacity(self.listed.len());
        sets.extend(self.listed.iter().flatten().cloned());
        sets
    }
}

/// A set for who has its shard's lock.
pub(crate) struct Taken<'a> {
    pub(crate) set: &'a mut Arc<Set>,
    /// What it is to be on.
    pub(crate) runtime: Option<&'a Arc<Runtime>>,
    /// One that was spare, and that somebody still has. To be dropped when the lock is not held.
    pub(crate) lost: Option<Arc<Set>>,
}

/// What was known of the runtime that a shard has seen before.
pub(crate) struct Before {
    _runtime: Option<Arc<Runtime>>,
    _spare: Vec<Arc<Runtime>>,
}

/// A set's place in its owner.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Place {
    shard: usize,
    index: usize,
}

impl Owner {
    const SHARDS: usize = if cfg!(loom) { 1 } else { 8 };

    /// Whether a set that is over, and [blank](Set::is_blank), is spare from now on; else it is to
    /// [retire](Self::retire).
    #[inline]
    pub(crate) fn spare(&self, set: &Set) -> bool {
        let Place { shard, index } = set.place;
        let mut sets = lock(&self.shards[shard].0);
        let is_here = match (set.runtime(), &sets.runtime) {
            (Some(its), Some(here)) => Arc::ptr_eq(its, here),
            _ => false,
        };
        let is_spare = is_here && sets.wants_spare();
        if is_spare {
            sets.spare.push(index);
        }
        is_spare
    }

    /// Takes one that has retired, and is nobody else's, for a spare one; or drops it.
    pub(crate) fn spare_retired(&self, mut set: Arc<Set>) {
        let Some(blank) = Arc::get_mut(&mut set) else { return };
        let mut sets = lock(&self.shards[blank.place.shard].0);
        if sets.wants_spare() {
            blank.place = sets.free_place();
            let Place { index, .. } = blank.place;
            sets.listed[index] = Some(set);
            sets.spare.push(index);
        }
    }

    /// The set of the tasks that belong to no request, or `None` when closed.
    fn own_set(self: &Arc<Self>, config: &Arc<Config>) -> Option<Arc<Set>> {
        let handle = config.runtime.clone().or_else(|| runtime::Handle::try_current().ok());
        let shard = this_shard();
        let sets = lock(&self.shards[shard].0);
        if !sets.takes_own() {
            return None;
        }
        if let Some(own) = sets.own_for(config, handle.as_ref()) {
            return Some(own);
        }
        drop(sets);
        let (_before, mut sets) = self.lock_for(handle.as_ref());
        // All may be different by now.
        if !sets.takes_own() {
            return None;
        }
        if let Some(own) = sets.own_for(config, handle.as_ref()) {
            return Some(own);
        }
        let Taken { set, runtime, lost } = sets.take(handle.is_some());
        let new = Arc::get_mut(set).expect("it is nobody else's");
        let left = new.begin_own(config, runtime);
        let set = set.clone();
        // One that was made with other choices, or elsewhere, is over when its tasks are.
        let other = sets.own.replace(set.clone());
        drop(sets);
        drop((lost, left));
        if let Some(other) = other {
            other.disown();
        }
        Some(set)
    }

    /// A shard that is about to have a set: on this runtime, which is the one that it has seen last.
    ///
    /// Before the guard comes what is to be dropped after it.
    #[expect(clippy::inline_always, reason = "in one of two places")]
    #[inline(always)]
    pub(crate) fn lock_for(
        self: &Arc<Self>,
        handle: Option<&runtime::Handle>,
    ) -> (Option<Box<Before>>, MutexGuard<'_, Sets>) {
        let shard = &self.shards[this_shard()].0;
        let sets = lock(shard);
        let Some(handle) = handle else { return (None, sets) };
        match &sets.runtime {
            Some(runtime) if runtime.handle.id() == handle.id() => (None, sets),
            _ => {
                drop(sets);
                let runtime = self.runtime(handle.clone());
                let mut sets = lock(shard);
                (Some(Box::new(sets.see(runtime))), sets)
            }
        }
    }

    pub(crate) fn runtime(self: &Arc<Self>, handle: runtime::Handle) -> Arc<Runtime> {
        // The last that is known of a runtime is the code of others: dropped when the lock is not held.
        let _gone: Vec<_>;
        let mut runtimes = self.runtimes.lock().unwrap_or_else(PoisonError::into_inner);
        // One that only this list has was shut down, or has no tasks of ours.
        (*runtimes, _gone) =
            mem::take(&mut *runtimes).into_iter().partition(|it| Arc::strong_count(it) > 1);
        match runtimes.iter().find(|runtime| runtime.handle.id() == handle.id()) {
            Some(runtime) => runtime.clone(),
            None => {
                let runtime = Arc::new(Runtime::new(handle, self));
                runtimes.push(runtime.clone());
                runtime
            }
        }
    }

    #[cfg(all(test, not(loom)))]
    pub(crate) fn runtimes_known(&self) -> Vec<runtime::Id> {
        let runtimes = self.runtimes.lock().unwrap_or_else(PoisonError::into_inner);
        runtimes.iter().map(|runtime| runtime.handle.id()).collect()
    }

    /// Counts an attempt that no set counts any more.
    pub(crate) fn refuse(&self, name: &'static str) {
        self.refuse_in(this_shard(), name);
    }

    pub(crate) fn refuse_late(&self, place: Place, name: &'static str) {
        self.refuse_in(place.shard, name);
    }

    fn refuse_in(&self, shard: usize, name: &'static str) {
        let counts = crate::Counts { attempted: 1, refused: 1, ..Default::default() };
        *lock(&self.shards[shard].0).base.of(name) += counts;
    }

    /// Counts a set that is over, and lets go of it.
    #[expect(clippy::inline_always, reason = "in one of two places, for each set")]
    #[inline(always)]
    pub(crate) fn retire(&self, set: &Arc<Set>) {
        let Place { shard, index } = set.place;
        // Asked here, for it may run the code of others; for nothing, unless a task was told.
        let trace_id = if set.has_orders() { set.trace_id() } else { None };
        let mut sets = lock(&self.shards[shard].0);
        set.add_to(&mut sets.base, trace_id);
        let removed = sets.listed[index].take();
        sets.free.push(index);
        let own = if set.is_own() { sets.own.take_if(|own| Arc::ptr_eq(own, set)) } else { None };
        // Neither is the last one, but nothing hangs on that.
        drop(sets);
        drop((removed, own));
    }

    fn close(&self) {
        for shard in &self.shards {
            let mut sets = lock(&shard.0);
            sets.closed = true;
            for set in sets.listed.iter().flatten() {
                set.close();
            }
        }
        self.tell_changed();
        for set in self.sets() {
            set.tell_closed();
        }
    }

    fn begin_drain(&self) {
        for shard in &self.shards {
            let mut sets = lock(&shard.0);
            sets.draining = true;
            sets.listed.iter().flatten().for_each(|set| set.drain_own());
        }
        self.tell_changed();
    }

    /// Those who wait look again: it is closed or about to be, or a set of its own was cancelled.
    pub(crate) fn tell_changed(&self) {
        notify(&self.changed);
    }

    /// Until those who wait are to look again. Listens from now on.
    pub(crate) fn changed(&self) -> OwnedNotified {
        self.changed.clone().notified_owned()
    }

    /// The sets that are not over, or were not just now.
    pub(crate) fn sets(&self) -> Vec<Arc<Set>> {
        self.shards.iter().flat_map(|shard| lock(&shard.0).in_use()).collect()
    }

    fn snapshot(&self) -> Snapshot {
        let mut snapshot = Snapshot::default();
        for shard in &self.shards {
            let (base, forced, listed) = lock(&shard.0).for_snapshot();
            for (name, counts) in base {
                snapshot.add(name, counts);
            }
            snapshot.forced_tasks.extend(forced.in_request(None));
            // One that retires from now on is not in this base, and keeps its counts.
            for set in listed {
                set.read().add_to(&mut snapshot);
            }
        }
        snapshot
    }
}

/// By thread, so that threads that make many sets meet at different locks.
fn this_shard() -> usize {
    thread_local! {
        static SHARD: usize = {
            let mut hasher = DefaultHasher::new();
            thread::current().id().hash(&mut hasher);
            usize::try_from(hasher.finish() % Owner::SHARDS as u64).unwrap_or(0)
        };
    }
    SHARD.try_with(|shard| *shard).unwrap_or(0)
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    #[test]
    #[should_panic(expected = "1 tasks live")]
    fn who_lives_and_is_not_listed_is_found_by_the_leak_check() {
        let mut snapshot = Snapshot::default();
        snapshot.totals.live = 1;
        demand_drained(&snapshot);
    }
}
