mod home;
mod members;
mod reading;

use std::{
    any::Any,
    fmt, mem,
    panic::Location,
    pin::pin,
    sync::{Arc, OnceLock},
    task::{Context, Poll, Waker},
    thread,
    time::Duration,
};

use smallvec::SmallVec;
use tokio::{runtime::Handle, time::Instant};
use tower_catch_unwind::{Panic, catch, unwinding};
use tower_request_context::{RequestContext, Scope, TraceId};
use tower_response_end::End;
use tower_spawn_limit::{Level, Limits, SpawnError, SpawnLimit};
use tracing::field;

use crate::{
    OnPanic, TaskEvent, TaskRegistry,
    ledger::{Base, Kind},
    lifetime::Policy,
    place,
    reaper::{Key, Runtime, Who},
    registry::{self, Config, Owner, Taken},
    stop::Stop,
    sync::{
        self, AtomicU8, AtomicU32, Mutex, MutexGuard, Notify, Ordering, OwnedNotified, get_mut,
        lock,
    },
    task::{Canceller, Cause, Member, Order, Outcome, TaskError, TaskHandle, Tracked},
    task_set::Plan,
};

pub(crate) use home::{Home, current_task};

use members::{Deadline, Extra, FREE, Inner, Lifetime, NONE, NOT_YET, Rare, Stage, Watch};

/// Bits of [`Set::marks`]: some task has been told something. Look under the lock.
pub(crate) const ORDERS: u8 = 1;
/// Its tasks run in a context. Without, and without [`CARE`], the set has no values of others.
pub(crate) const CONTEXT: u8 = 1 << 1;
/// The context of a task is [lent](Scope::lend).
pub(crate) const LENT: u8 = 1 << 4;
/// Its tasks have a [level](Set::level).
const LEVEL: u8 = 1 << 2;
/// There is more to a spawn than to a plain one.
const CARE: u8 = 1 << 3;

/// The response is to fail. Look under the lock.
const FAILED: u8 = 1 << 5;
/// The registry has a limit.
const LIMITED: u8 = 1 << 6;
/// A panic of some task may fail the response, and is counted while it [unwinds](Set::unwinding).
pub(crate) const MAY_FAIL: u8 = 1 << 7;

/// So many tasks are woken for each lock.
const WAKERS: usize = 32;

/// One request's tasks: all that is known of them, in one allocation, under one lock.
///
/// Its registry lists it, so that nobody need have it for it to be counted. When it is over, one of
/// two things comes:
///
/// - Nothing in it is the code of others, as in most: it is [spare](Owner::spare). It stays where it
///   is, with its counts, and the next request goes on with it; unless somebody still has it then,
///   which it is left to, and its counts go to its shard.
/// - Else it [retires](Owner::retire): its counts go to its shard, and it is listed no more. When
///   the last who has it [lets go](Self::release), it is emptied, and becomes
///   [spare](Owner::spare_retired) too.
#[repr(C)]
pub(crate) struct Set {
    /// First, beside the count of references: what is written again and again.
    inner: Mutex<Inner>,
    /// What is to be looked at before a poll or a spawn, if anything is.
    marks: AtomicU8,
    /// In how many polls and drops of its tasks a panic has begun that the task does not catch by
    /// [`catch`].
    unwinding: AtomicU32,
    /// Of the registry: it belongs to no request, and is over when it is empty.
    own: bool,
    /// What its tasks hold, and so may not wait for.
    level: Level,
    /// `None` for some while it is spare.
    config: Option<Arc<Config>>,
    context: RequestContext,
    runtime: Option<Arc<Runtime>>,
    born: Instant,
    pub(crate) place: registry::Place,
    /// The limits over the place where it was made.
    limits: Limits,
    /// That of the first spawn, for a set that was made outside of a runtime.
    late_runtime: OnceLock<Arc<Runtime>>,
}

impl Set {
    /// Of a request.
    // In one place, and never inlined: it is what a request pays that asks for its set.
    #[inline(never)]
    pub(crate) fn new(config: &Arc<Config>, context: RequestContext) -> Arc<Self> {
        let handle = match &config.runtime {
            Some(runtime) => Some(runtime.clone()),
            None => Handle::try_current().ok(),
        };
        let limits = if Limits::are_here() { Limits::current() } else { Limits::default() };
        let level = match &config.limit {
            Some(_) => Level::Task,
            // Of a service that is called in process: who has called it waits for its tasks.
            None => Level::current(),
        };
        let born = Instant::now();
        // Dropped when the lock is not held any more, as is what comes before it.
        let (_lost, _left);
        let (_before, mut sets) = config.owner.lock_for(handle.as_ref());
        let closed = sets.is_closed();
        let Taken { set, runtime, lost } = sets.take(handle.is_some());
        _lost = lost;
        let new = Arc::get_mut(set).expect("it is nobody else's");
        _left = new.begin(config, runtime, context, limits, level, born);
        get_mut(&mut new.inner).begin(closed, false);
        set.clone()
    }

    /// Begins as the registry's: its tasks are from many places.
    pub(crate) fn begin_own(
        &mut self,
        config: &Arc<Config>,
        runtime: Option<&Arc<Runtime>>,
    ) -> Option<Box<Left>> {
        let level = if config.limit.is_some() { Level::Task } else { Level::Free };
        let (context, limits) = (RequestContext::new(), Limits::default());
        let left = self.begin(config, runtime, context, limits, level, Instant::now());
        self.own = true;
        // There is no response.
        self.marks.fetch_and(!MAY_FAIL, Ordering::Relaxed);
        get_mut(&mut self.inner).begin(false, true);
        left
    }

    /// One that is [blank](Self::is_blank).
    #[inline(never)]
    pub(crate) fn blank(place: registry::Place) -> Arc<Self> {
        Arc::new(Self {
            config: None,
            context: RequestContext::new(),
            born: Instant::now(),
            runtime: None,
            late_runtime: OnceLock::new(),
            place,
            own: false,
            limits: Limits::default(),
            level: Level::Free,
            marks: AtomicU8::new(0),
            unwinding: AtomicU32::new(0),
            inner: Mutex::default(),
        })
    }

    /// Begins, as it is [blank](Self::is_blank), but for what those have left in it who still had it
    /// when it was spare.
    #[expect(clippy::inline_always, reason = "in one of two places, with arguments on the stack")]
    #[inline(always)]
    fn begin(
        &mut self,
        config: &Arc<Config>,
        runtime: Option<&Arc<Runtime>>,
        context: RequestContext,
        limits: Limits,
        level: Level,
        born: Instant,
    ) -> Option<Box<Left>> {
        if self.runtime.is_none() {
            self.runtime = runtime.cloned();
        }
        let is_there = self.runtime.as_ref().map(Arc::as_ptr) == runtime.map(Arc::as_ptr);
        let mut left = None;
        if !is_there || get_mut(&mut self.inner).has_more() {
            left = Some(Box::new(self.tidy(runtime)));
        }
        debug_assert!(self.is_blank());
        let mut marks = 0;
        if !context.is_empty() {
            marks |= CONTEXT;
        }
        if level != Level::Free {
            marks |= LEVEL;
        }
        let is_chosen = config.runtime.is_some() || runtime.is_none();
        if is_chosen || !limits.is_empty() || config.observer.is_some() {
            marks |= CARE;
        }
        if config.limit.is_some() {
            marks |= LIMITED;
        }
        if config.policy.may_fail() {
            marks |= MAY_FAIL;
        }
        if !self.is_of(config) {
            // What was there had no code of others, or it would have gone with the request.
            self.config = Some(config.clone());
        }
        fill(&mut self.context, context);
        fill(&mut self.limits, limits);
        self.born = born;
        self.own = false;
        self.level = level;
        self.marks.store(marks, Ordering::Relaxed);
        left
    }

    #[cold]
    #[inline(never)]
    fn tidy(&mut self, runtime: Option<&Arc<Runtime>>) -> Left {
        let before = mem::replace(&mut self.runtime, runtime.cloned());
        Left { _more: get_mut(&mut self.inner).take_more(), _runtime: before }
    }

    /// Lets go of it. If it has [retired](Self::retire), and nobody else has it, it is for another
    /// request.
    #[inline]
    pub(crate) fn release(self: Arc<Self>) {
        // Two who let go at once may both see the other: then it is just freed.
        if Arc::strong_count(&self) == 1 {
            self.recycle();
        }
    }

    // Values, wakers and a runtime are the code of others: dropped in the end.
    #[inline(never)]
    fn recycle(mut self: Arc<Self>) {
        let Some(set) = Arc::get_mut(&mut self) else { return };
        let Some(config) = set.config.take() else { return };
        let _runtimes = (set.runtime.take(), set.late_runtime.take());
        let _context = mem::take(&mut set.context);
        let _limits = mem::take(&mut set.limits);
        let _more = get_mut(&mut set.inner).clear();
        config.owner.spare_retired(self);
    }

    /// Whether there is nothing in it but counts, and memory for some tasks.
    fn is_blank(&mut self) -> bool {
        let is_nowhere = self.context.is_empty() && self.limits.is_empty();
        is_nowhere && self.late_runtime.get().is_none() && get_mut(&mut self.inner).is_blank()
    }

    pub(crate) fn take_runtime(&mut self) -> Option<Arc<Runtime>> {
        self.runtime.take()
    }

    #[inline]
    fn config(&self) -> &Arc<Config> {
        self.config.as_ref().expect("whoever has it keeps it from being spare")
    }

    pub(crate) fn owner(&self) -> &Arc<Owner> {
        &self.config().owner
    }

    pub(crate) fn is_of(&self, config: &Arc<Config>) -> bool {
        self.config.as_ref().is_some_and(|own| Arc::ptr_eq(own, config))
    }

    /// Whether it is the registry's, for tasks that belong to no request.
    pub(crate) const fn is_own(&self) -> bool {
        self.own
    }

    pub(crate) fn len(&self) -> usize {
        self.lock().live as usize
    }

    /// Whether its tasks run on this runtime; without one, whether it has none.
    pub(crate) fn is_on(&self, runtime: Option<&Handle>) -> bool {
        self.runtime().map(|runtime| runtime.handle.id()) == runtime.map(Handle::id)
    }

    pub(crate) fn is_gone(&self) -> bool {
        self.lock().stage != Stage::Counting
    }

    /// What its tasks hold.
    #[inline]
    pub(crate) const fn level(&self) -> Level {
        self.level
    }

    #[inline]
    pub(crate) fn runtime(&self) -> Option<&Arc<Runtime>> {
        self.runtime.as_ref().or_else(|| self.late_runtime.get())
    }

    #[inline]
    fn lock(&self) -> MutexGuard<'_, Inner> {
        lock(&self.inner)
    }

    /// After a change that may have been the last.
    #[inline]
    fn settle(self: &Arc<Self>, over: bool) {
        if over {
            self.retire();
        }
    }

    /// It [is over](Inner::is_over).
    #[inline(never)]
    fn retire(self: &Arc<Self>) {
        self.owner().retire(self);
    }

    /// Settles it where no task lives, for who has the lock.
    #[inline(never)]
    fn settle_empty(self: &Arc<Self>, mut inner: MutexGuard<'_, Inner>) {
        let idle = inner.rare.as_mut().and_then(|rare| rare.idle.take());
        self.forget(inner.lifetime.as_mut().and_then(|lifetime| lifetime.key.take()));
        let over = inner.is_over(self.own);
        // As it may stay: its memory is.
        let has_none = !self.own && self.marks() & (CONTEXT | CARE) == 0;
        let is_blank = has_none && inner.is_blank();
        drop(inner);
        notify(idle);
        if over && !(is_blank && self.owner().spare(self)) {
            self.retire();
        }
    }

    /// Takes a task in, or says why not. Either way the attempt is counted, unless the set is gone.
    #[inline(never)]
    pub(crate) fn admit(self: &Arc<Self>, plan: &Plan<'_>) -> Result<Ticket, Refusal> {
        let ticket = if plan.is_plain() { self.admit_plainly(plan.name, plan.site) } else { None };
        ticket.map_or_else(|| self.admit_with_care(plan), Ok)
    }

    /// The same if it is not [admitted plainly](Self::admit_plainly).
    #[inline(never)]
    pub(crate) fn admit_with_care(self: &Arc<Self>, plan: &Plan<'_>) -> Result<Ticket, Refusal> {
        let Some(runtime) = self.live_runtime() else {
            return Err(self.refuse(self.lock(), plan, SpawnError::NoRuntime));
        };
        self.enter(plan, Some(runtime))
    }

    /// The same for the most common case, if it is one: code of the set's own spawns a task that
    /// has nothing of its own, while the set is open and has room.
    // In each spawn, where name and site are at hand: that takes 40 instructions less than a call.
    #[expect(clippy::inline_always, reason = "as above")]
    #[inline(always)]
    pub(crate) fn admit_plainly(
        self: &Arc<Self>,
        name: &'static str,
        site: &'static Location<'static>,
    ) -> Option<Ticket> {
        // Its own code runs, so its runtime does.
        let here = place::slot_of(self)?;
        let marks = self.marks();
        if marks & CARE != 0 || Limits::are_here() || Scope::is_elsewhere(&self.context) {
            return None;
        }
        if marks & CONTEXT != 0 && self.wants_spans() {
            return None;
        }
        let mut inner = self.lock();
        let mut taken = None;
        if inner.is_open() && self.has_room(&inner, marks) {
            taken = Some(inner.take_in(name, site, since(Some(here))));
        }
        // In one place, or this is a call.
        drop(inner);
        let (slot, generation, kind) = taken?;
        Some(Ticket { slot, generation, kind, has_home: false })
    }

    /// Whether a permit was taken, if there has to be one. If not, there may be one yet.
    #[inline]
    fn has_room(&self, inner: &Inner, marks: u8) -> bool {
        marks & LIMITED == 0 || self.take_room(inner)
    }

    #[inline(never)]
    fn take_room(&self, inner: &Inner) -> bool {
        self.config().limit.as_ref().is_none_or(|limit| {
            let has_share = self.own || (inner.live as usize) < limit.limit_per_request();
            // What a request has of its share is counted elsewhere once somebody waits for it.
            has_share && inner.rare.is_none() && limit.try_take()
        })
    }

    /// Gives a task that was admitted to the runtime.
    #[expect(clippy::inline_always, reason = "as the runtime's own, in the one place for its type")]
    #[inline(always)]
    #[track_caller]
    pub(crate) fn spawn<W, T>(self: &Arc<Self>, ticket: Ticket, work: W) -> TaskHandle<T>
    where
        W: Future<Output = Result<T, TaskError>> + Send + 'static,
        T: Send + 'static,
    {
        let runtime = self.runtime().expect("who is admitted has one");
        let join = runtime.handle.spawn(work);
        TaskHandle::new(join, ticket.canceller(self))
    }

    /// The same for a task that blocks, and so is ready when it was polled once.
    #[track_caller]
    pub(crate) fn spawn_blocking<W, T>(self: &Arc<Self>, ticket: Ticket, work: W) -> TaskHandle<T>
    where
        W: Future<Output = Result<T, TaskError>> + Send + 'static,
        T: Send + 'static,
    {
        let runtime = self.runtime().expect("who is admitted has one");
        let join = runtime.handle.spawn_blocking(move || {
            let mut context = Context::from_waker(Waker::noop());
            match pin!(work).poll(&mut context) {
                Poll::Ready(result) => result,
                Poll::Pending => unreachable!("it blocks until it is ready"),
            }
        });
        TaskHandle::new(join, ticket.canceller(self))
    }

    /// Takes a task in without looking for a runtime to run it.
    #[inline(never)]
    pub(crate) fn enter(
        self: &Arc<Self>,
        plan: &Plan<'_>,
        runtime: Option<&Arc<Runtime>>,
    ) -> Result<Ticket, Refusal> {
        let mut home = self.new_home(plan);
        let mut full = None;
        if Limits::are_here() || !self.limits.is_empty() {
            full = self.take_permits(plan, &mut home).err();
        }
        let since = since(place::slot_of(self));
        let mut inner = self.lock();
        let lifetime = match self.may_enter(&inner, plan, full) {
            Ok(lifetime) => lifetime,
            Err(denial) => {
                let refusal = self.deny(inner, plan, denial);
                drop(home);
                return Err(refusal);
            }
        };
        let (slot, generation, kind) = inner.take_in(plan.name, plan.site, since);
        let has_home = home.is_some() || self.config().observer.is_some();
        if plan.has_choices() || lifetime.is_some() || has_home {
            self.enter_with(inner, plan, runtime, slot, lifetime, home);
        } else {
            drop(inner);
        }
        Ok(Ticket { slot, generation, kind, has_home })
    }

    /// The rest of it, for a task that the set knows more of.
    #[inline(never)]
    fn enter_with(
        self: &Arc<Self>,
        mut inner: MutexGuard<'_, Inner>,
        plan: &Plan<'_>,
        runtime: Option<&Arc<Runtime>>,
        slot: u32,
        lifetime: Option<Box<Lifetime>>,
        home: Option<Box<Home>>,
    ) {
        let extra = self.new_extra(&inner, plan, runtime, slot, lifetime, home);
        let keys = [extra.timeout_key, extra.lifetime.and_then(|lifetime| lifetime.key)];
        let far_timeout = extra.timeout.filter(|_| extra.timeout_key.is_none());
        inner.add_extra(slot, extra);
        let put_off = mem::replace(&mut inner.watch, Watch::Needed) == Watch::PutOff;
        let far = put_off | far_timeout.is_some_and(|at| inner.expect_timeout(at));
        drop(inner);
        if far {
            self.watch_deadline();
        }
        if let (Some((at, _)), Some(runtime)) = (keys.into_iter().flatten().min(), runtime) {
            runtime.wind(at);
        }
        if let Some(observer) = &self.config().observer {
            // As it is counted, and as it will be told to have ended.
            let (name, site) = self.name_and_site(slot);
            let event = TaskEvent::Started { name, site };
            self.call("observer", || observer.observe(&event));
        }
    }

    /// Whether the task may, with a permit taken; and the lifetime of its own that it has from the
    /// task that spawns it, if it has.
    #[inline]
    fn may_enter(
        self: &Arc<Self>,
        inner: &Inner,
        plan: &Plan<'_>,
        full: Option<SpawnLimit>,
    ) -> Result<Option<Box<Lifetime>>, Denial> {
        if inner.is_refusing() {
            return Err(Denial::Because(SpawnError::Closed));
        }
        let lifetime = match inner.end() {
            None => None,
            Some(end) => self.may_enter_late(inner, plan, end).map_err(Denial::Because)?,
        };
        if let Some(full) = full {
            return Err(Denial::Full(full));
        }
        if let Some(limit) = &self.config().limit {
            match inner.share() {
                None if self.own || (inner.live as usize) < limit.limit_per_request() => {}
                None => return Err(Denial::Share),
                Some(share) if plan.take(share) => {}
                Some(share) => return Err(Denial::Full(share.clone())),
            }
            // As the last: of what is taken before, nothing may be given back under the lock.
            if !plan.take(limit) {
                return Err(Denial::Full(limit.clone()));
            }
        }
        Ok(lifetime)
    }

    /// Counts the refusal, unless whoever asks waits for the limit that is full.
    #[cold]
    #[inline(never)]
    fn deny(
        self: &Arc<Self>,
        mut inner: MutexGuard<'_, Inner>,
        plan: &Plan<'_>,
        denial: Denial,
    ) -> Refusal {
        let full = match (denial, &self.config().limit) {
            (Denial::Full(full), _) => full,
            (Denial::Share, Some(limit)) if plan.waits() => {
                let live = inner.live;
                // From now on this counts what the set has.
                let share = inner.rare_mut().share.get_or_insert_with(|| {
                    let share = limit.share();
                    for _ in 0..live {
                        share.try_take();
                    }
                    share
                });
                share.clone()
            }
            (Denial::Share, Some(limit)) => limit.clone(),
            (Denial::Share, None) => return self.refuse(inner, plan, SpawnError::Full),
            (Denial::Because(reason), _) => return self.refuse(inner, plan, reason),
        };
        let is_own = self.config().limit.as_ref().is_some_and(|limit| limit.ptr_eq(&full));
        let taken = inner.share().cloned().filter(|_| is_own);
        let refusal = if plan.waits() {
            // Whoever waits may never come back, and an empty set of the registry's that stays listed
            // keeps the registry for ever.
            let over = inner.is_over(self.own);
            drop(inner);
            plan.with_hand(|hand| hand.full = Some(full));
            self.settle(over);
            Refusal::Full
        } else {
            full.refuse();
            self.refuse(inner, plan, SpawnError::Full)
        };
        // It wakes others.
        if let Some(share) = taken {
            share.release();
        }
        refusal
    }

    /// After the response: a task that may still run may still spawn.
    #[inline(never)]
    fn may_enter_late(
        self: &Arc<Self>,
        inner: &Inner,
        plan: &Plan<'_>,
        end: End,
    ) -> Result<Option<Box<Lifetime>>, SpawnError> {
        let parent = place::slot_in(self).ok_or(SpawnError::Closed)?;
        if inner.is_told(parent) {
            return Err(SpawnError::Closed);
        }
        let own = inner.extra(parent).and_then(|extra| extra.lifetime);
        let lifetime = match (plan.policy(), own.or(inner.lifetime)) {
            (Some(policy), Some(parent)) => Some(parent.of_child(policy.get(end))?),
            // It lives as its parent does, or as all others do.
            _ => own.map(Lifetime::inherited),
        };
        Ok(lifetime.map(Box::new))
    }

    fn new_extra(
        self: &Arc<Self>,
        inner: &Inner,
        plan: &Plan<'_>,
        runtime: Option<&Arc<Runtime>>,
        slot: u32,
        lifetime: Option<Box<Lifetime>>,
        home: Option<Box<Home>>,
    ) -> Extra {
        let mut lifetime = lifetime.map(|lifetime| *lifetime);
        if let Some(lifetime) = &mut lifetime {
            lifetime.key = self.note(runtime, lifetime.until, Who::Task(slot));
        }
        let timeout = plan.timeout().and_then(|timeout| Instant::now().checked_add(timeout));
        let near = timeout.filter(|_| !plan.timeout().is_some_and(Runtime::is_far));
        if plan.on_panic() == Some(OnPanic::FailResponse) && !self.own {
            self.marks.fetch_or(MAY_FAIL, Ordering::Relaxed);
        }
        Extra {
            // What belongs to no request is kept.
            policy: plan.policy().filter(|_| !self.own).cloned(),
            on_panic: plan.on_panic(),
            lifetime,
            timeout,
            timeout_key: self.note(runtime, near, Who::Task(slot)),
            stop: plan.stop().cloned(),
            grace: plan.grace(self.policy(inner)),
            trace_id: home.as_ref().and_then(|home| home.trace_id),
            home,
            started: self.config().observer.as_ref().map(|_| Instant::now()),
            ..Extra::default()
        }
    }

    /// Counts a refusal.
    #[cold]
    #[inline(never)]
    fn refuse(
        self: &Arc<Self>,
        mut inner: MutexGuard<'_, Inner>,
        plan: &Plan<'_>,
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
        let kind = inner.kind(plan.name, plan.site);
        let count = &mut inner.kinds[kind];
        count.attempted += 1;
        count.refused += 1;
        let over = inner.is_over(self.own);
        drop(inner);
        self.settle(over);
        Refusal::Because(reason)
    }

    /// Who takes a task that this set of the registry does not, as it is gone. If it was cancelled,
    /// nobody: the attempt is counted.
    #[cold]
    pub(crate) fn successor(&self, plan: &Plan<'_>) -> Option<TaskRegistry> {
        if self.lock().is_cancelled() {
            self.owner().refuse_late(self.place, plan.name);
            return None;
        }
        Some(TaskRegistry::of(self.config().clone()))
    }

    /// The runtime, if it still runs tasks.
    fn live_runtime(self: &Arc<Self>) -> Option<&Arc<Runtime>> {
        let runtime = match &self.runtime {
            Some(runtime) => runtime,
            None => self.late_runtime()?,
        };
        // The set's own code runs on a runtime that lives; if it is not another's that was chosen.
        let is_here = self.config().runtime.is_none() && place::slot_of(self).is_some();
        (is_here || runtime.is_alive()).then_some(runtime)
    }

    /// That of the first spawn.
    // Out of line, as is all that is rare: it would make room on the stack of every spawn.
    #[cold]
    #[inline(never)]
    fn late_runtime(&self) -> Option<&Arc<Runtime>> {
        if self.late_runtime.get().is_none() {
            let here = self.owner().runtime(Handle::try_current().ok()?);
            let _ = self.late_runtime.set(here);
        }
        self.late_runtime.get()
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
    #[inline]
    fn forget(&self, key: Option<Key>) {
        if let Some(key) = key {
            self.forget_noted(key);
        }
    }

    #[inline(never)]
    fn forget_noted(&self, key: Key) {
        if let Some(runtime) = self.runtime() {
            runtime.remove(key);
        }
    }

    /// What a task looks at before it is polled.
    #[inline]
    pub(crate) fn marks(&self) -> u8 {
        // Relaxed, for what counts is read under the lock. A task that misses `ORDERS` here has
        // either not given its waker yet, and looks again when it does; or it was woken after the
        // mark was set, and what it does then is ordered after that.
        self.marks.load(Ordering::Relaxed)
    }

    fn mark_orders(&self) {
        self.marks.fetch_or(ORDERS, Ordering::Relaxed);
    }

    /// Whether some task was told something: then it looks at its [`order`](Self::order).
    pub(crate) fn has_orders(&self) -> bool {
        self.marks() & ORDERS != 0
    }

    #[inline(never)]
    pub(crate) fn order(&self, slot: u32) -> Option<Order> {
        self.lock().order(slot)
    }

    /// The task awaits for the first time. It may have been told something while its waker was not
    /// known.
    #[inline(never)]
    pub(crate) fn wait(&self, slot: u32, waker: &Waker) -> Option<Order> {
        let waker = waker.clone();
        let mut inner = self.lock();
        let put_off = mem::replace(&mut inner.watch, Watch::Needed) == Watch::PutOff;
        let (order, unneeded) = inner.awaits(slot, waker, self.born);
        drop(inner);
        drop(unneeded);
        if put_off {
            self.watch_deadline();
        }
        order
    }

    /// The task has ended, and its destructors have run. What others wait for is done before it is
    /// counted: who finds no task alive finds the permit free, and the observer told.
    ///
    /// `obeyed` is the outcome before its destructors have run.
    #[inline]
    pub(crate) fn leave(
        self: &Arc<Self>,
        slot: u32,
        has_home: bool,
        obeyed: Option<Outcome>,
        outcome: Outcome,
    ) {
        if has_home {
            self.part(slot, outcome);
        }
        if self.marks() & LIMITED != 0 {
            self.give_back();
        }
        let mut inner = self.lock();
        if inner.is_involved() {
            return self.leave_with_care(inner, slot, obeyed, outcome);
        }
        let waker = inner.count_out(slot, outcome);
        if inner.live == 0 {
            self.settle_empty(inner);
        } else {
            drop(inner);
        }
        drop(waker);
    }

    #[inline]
    fn give_back(&self) {
        if let Some(limit) = &self.config().limit {
            limit.release();
        }
    }

    #[inline(never)]
    fn leave_with_care(
        self: &Arc<Self>,
        mut inner: MutexGuard<'_, Inner>,
        slot: u32,
        obeyed: Option<Outcome>,
        outcome: Outcome,
    ) {
        let is_shutdown = inner.is_cancelled() && inner.is_closed();
        if is_shutdown && matches!(obeyed, None | Some(Outcome::Cancelled | Outcome::Aborted)) {
            inner.note_forced(slot, self.born, outcome);
        }
        if inner.has_extras() {
            inner.remove_extra(slot).into_iter().for_each(|key| self.forget(key));
        }
        let waker = inner.count_out(slot, outcome);
        let share = inner.share().cloned();
        if inner.live == 0 {
            self.settle_empty(inner);
        } else {
            drop(inner);
        }
        if let Some(share) = share {
            share.release();
        }
        drop(waker);
    }

    /// Ends what of that is the code of others.
    #[inline(never)]
    fn part(&self, slot: u32, outcome: Outcome) {
        let mut inner = self.lock();
        let Some(extra) = inner.extra_mut(slot) else { return };
        let (home, started) = (extra.home.take(), extra.started);
        drop(inner);
        // An observer, values and a span: the code of others.
        if let (Some(observer), Some(started)) = (&self.config().observer, started) {
            let (name, site) = self.name_and_site(slot);
            let event = TaskEvent::Ended { name, site, outcome, elapsed: started.elapsed() };
            self.call("observer", || observer.observe(&event));
        }
        self.call("drop of a value", || drop(home));
    }

    pub(crate) fn name_and_site(&self, slot: u32) -> (&'static str, &'static Location<'static>) {
        let inner = self.lock();
        let kind = &inner.kinds[inner.tasks[slot as usize].kind];
        (kind.name, kind.site)
    }

    /// The name and the site of the tasks of a kind.
    pub(crate) fn kind(&self, kind: u16) -> (&'static str, &'static Location<'static>) {
        let Kind { name, site, .. } = self.lock().kinds[kind];
        (name, site)
    }

    /// How the response has ended, if it has.
    pub(crate) fn ended(&self) -> Option<End> {
        self.lock().end()
    }

    /// Counts an attempt that was refused before it came here.
    #[cold]
    pub(crate) fn count_refused(self: &Arc<Self>, plan: &Plan<'_>) {
        if let Refusal::Gone = self.refuse(self.lock(), plan, SpawnError::Closed) {
            self.owner().refuse_late(self.place, plan.name);
        }
    }

    /// The response is over. Its deadline waits for nobody who holds it.
    pub(crate) fn end(self: &Arc<Self>, end: End) {
        let mut inner = self.lock();
        // Most have tasks, which have a while, and nothing else.
        let chosen = self.config().policy.get(end).unwrap_or_default();
        let is_held = inner.holds > 0;
        if is_held || inner.live == 0 || !inner.is_plain() || !Lifetime::is_far(chosen) {
            return self.end_with_care(inner, end);
        }
        inner.set_end(end);
        let waker = self.take_waker(&mut inner);
        let watch = inner.drain(Lifetime::begin(chosen));
        drop(inner);
        if watch {
            self.watch_deadline();
        }
        // The code of others.
        waker.into_iter().for_each(let_go);
    }

    /// The same, whatever there is.
    #[inline(never)]
    fn end_with_care(self: &Arc<Self>, mut inner: MutexGuard<'_, Inner>, end: End) {
        if inner.end().is_some() {
            return;
        }
        if inner.holds > 0 && end != End::TimedOut {
            inner.held_end.get_or_insert(end);
            return;
        }
        inner.set_end(end);
        // Who lets go as the last has nothing to tell any more, and retires it.
        inner.held_end = None;
        // Wakers are the code of others.
        let waker = self.take_waker(&mut inner);
        for deadline in inner.deadlines() {
            self.forget(deadline.key.take());
        }
        let changed = inner.take_changed();
        if inner.live == 0 {
            self.settle_empty(inner);
        } else if inner.is_cancelled() {
            drop(inner);
        } else {
            self.end_each(inner, end);
        }
        notify(changed);
        waker.into_iter().for_each(let_go);
    }

    /// Begins the lifetime of all, and of each that has made a choice of its own.
    fn end_each(self: &Arc<Self>, mut inner: MutexGuard<'_, Inner>, end: End) {
        let chosen = self.policy(&inner).get(end).unwrap_or_default();
        let mut lifetime = Lifetime::begin(chosen);
        let order = Order::Cancel(end.into());
        let mut news = News::default();
        let mut watch = false;
        let all = lifetime.is_over();
        if Lifetime::is_far(chosen) {
            watch = inner.drain(lifetime);
        } else {
            if all {
                inner.order = Some(order);
                news.told = true;
            } else {
                lifetime.key = self.note(self.runtime(), lifetime.until, Who::Set);
                news.earliest = lifetime.until;
            }
            inner.lifetime = Some(lifetime);
        }
        for (slot, extra) in inner.extras_mut() {
            let Some(policy) = &extra.policy else {
                if all && extra.stop.is_some() {
                    self.tell(slot, extra, order, &mut news);
                }
                continue;
            };
            let mut lifetime = Lifetime::begin(policy.get(end).unwrap_or(chosen));
            if lifetime.is_over() {
                self.tell(slot, extra, order, &mut news);
            } else {
                lifetime.key = self.note(self.runtime(), lifetime.until, Who::Task(slot));
                news.expect(lifetime.until);
            }
            extra.lifetime = Some(lifetime);
        }
        drop(inner);
        if watch {
            self.watch_deadline();
        }
        self.spread(news);
    }

    /// The response has to be over by then, or what is served within it, which then
    /// [says when it is](Self::lift_limit): a user of this deadline.
    pub(crate) fn limit_time(self: &Arc<Self>, at: Instant) {
        self.add_limit(at, 1);
    }

    /// The same, for a response that will say so itself.
    pub(crate) fn expect_limit(self: &Arc<Self>, at: Instant) {
        self.add_limit(at, 0);
    }

    fn add_limit(self: &Arc<Self>, at: Instant, users: usize) {
        let mut inner = self.lock();
        if inner.end().is_some() {
            return;
        }
        if let Some(known) = inner.deadlines().iter_mut().find(|known| known.at == at) {
            known.users += users;
            return;
        }
        let key = self.note(self.runtime(), Some(at), Who::Response);
        inner.rare_mut().deadlines.push(Deadline { at, key, users });
        drop(inner);
        if let Some(runtime) = self.runtime() {
            runtime.wind(at);
        }
    }

    /// What was served within the response has had its end in time.
    pub(crate) fn lift_limit(&self, at: Instant) {
        let mut inner = self.lock();
        let Some(deadlines) = inner.rare.as_mut().map(|rare| &mut rare.deadlines) else { return };
        let Some(index) = deadlines.iter().position(|known| known.at == at) else { return };
        deadlines[index].users = deadlines[index].users.saturating_sub(1);
        if deadlines[index].users == 0 {
            self.forget(deadlines.swap_remove(index).key);
        }
    }

    pub(crate) fn deadline(&self) -> Option<Instant> {
        self.lock().deadlines().iter().map(|deadline| deadline.at).min()
    }

    /// Whether it may be that a panic of a task is what the response ends in.
    #[inline]
    pub(crate) fn may_fail(&self) -> bool {
        self.marks() & MAY_FAIL != 0
    }

    /// Whether the response, which comes to an end of its own, is to fail. What has brought the end
    /// about may be a panic that is still unwinding its task: then it is not known, and wakes `cx`
    /// when it is.
    #[cold]
    pub(crate) fn poll_verdict(&self, cx: &Context<'_>) -> Poll<Option<Panic>> {
        if self.is_unwinding() {
            // The code of others.
            let waker = cx.waker().clone();
            let mut inner = self.lock();
            let old = inner.response.replace(waker);
            // Whoever ends it, or ends to unwind, takes the waker after that.
            let waits = inner.failed().is_none() && inner.end().is_none() && self.is_unwinding();
            drop(inner);
            drop(old);
            if waits {
                return Poll::Pending;
            }
        }
        Poll::Ready(self.lock().failed().cloned())
    }

    /// Whether [that](Self::poll_verdict) is known, and it is not to fail.
    #[cold]
    pub(crate) fn may_end(&self) -> bool {
        !self.is_unwinding() && self.marks() & FAILED == 0
    }

    fn is_unwinding(&self) -> bool {
        self.unwinding.load(Ordering::Acquire) > 0
    }

    /// The poll or the drop of a task is over in which a panic [had begun](unwinding::Observer).
    #[cold]
    pub(crate) fn end_unwinding(&self) {
        let mut inner = self.lock();
        // Under the lock, for who takes the waker otherwise. Whoever sees it without sees that it has
        // failed.
        self.unwinding.fetch_sub(1, Ordering::Release);
        let waker = inner.response.take();
        drop(inner);
        waker.into_iter().for_each(wake);
    }

    /// Whether the response is to fail; if not, wakes `cx` when it is.
    pub(crate) fn poll_failed(&self, cx: &Context<'_>) -> Poll<Panic> {
        let inner = self.lock();
        if let Some(panic) = inner.failed() {
            return Poll::Ready(panic.clone());
        }
        let is_known = inner.response.as_ref().is_some_and(|waker| waker.will_wake(cx.waker()));
        if is_known || inner.end().is_some() {
            return Poll::Pending;
        }
        drop(inner);
        let waker = cx.waker().clone();
        let mut inner = self.lock();
        let old = inner.response.replace(waker);
        let failed = inner.failed().cloned();
        drop(inner);
        drop(old);
        failed.map_or(Poll::Pending, Poll::Ready)
    }

    /// Takes the waker of a response whose set is over, and whether it is to be woken: then it is
    /// [held back](Self::poll_verdict).
    #[inline]
    fn take_waker(&self, inner: &mut Inner) -> Option<(Waker, bool)> {
        let waker = inner.response.take()?;
        Some((waker, self.is_unwinding()))
    }

    /// A task has panicked.
    #[cold]
    pub(crate) fn panicked(self: &Arc<Self>, slot: u32, panic: &Panic) {
        let mut inner = self.lock();
        let own = inner.extra(slot).and_then(|extra| extra.on_panic);
        match own.or(self.policy(&inner).for_panic()).unwrap_or_default() {
            OnPanic::CancelSiblings if !self.own => {
                drop(inner);
                // It wakes others, where the task cannot unwind.
                drop(catch(|| self.cancel(Cause::Sibling)));
            }
            OnPanic::FailResponse if inner.end().is_none() => {
                inner.rare_mut().failed.get_or_insert_with(|| panic.clone());
                self.marks.fetch_or(FAILED, Ordering::Relaxed);
                let waker = inner.response.take();
                drop(inner);
                waker.into_iter().for_each(wake);
            }
            _ => {}
        }
    }

    /// Sees to it that the reaper looks for a deadline of its tasks that is far away.
    #[inline(never)]
    fn watch_deadline(&self) {
        if let Some(runtime) = self.runtime() {
            runtime.expect();
        }
    }

    /// The reaper looks for deadlines that were far away, and takes in what comes before
    /// `horizon`. Whether this set has one.
    pub(crate) fn come_near(self: &Arc<Self>, runtime: &Arc<Runtime>, horizon: Instant) -> bool {
        if !self.runtime().is_some_and(|own| Arc::ptr_eq(own, runtime)) {
            return false;
        }
        let mut inner = self.lock();
        let mut left = inner.begin_timeouts(horizon);
        while left > 0 {
            let note = |until, slot| runtime.add(until, self, Who::Task(slot));
            left = inner.note_timeouts(left, horizon, note);
            if left > 0 {
                drop(inner);
                pause();
                inner = self.lock();
            }
        }
        let others = inner.has_far_timeouts();
        if inner.live == 0 || inner.order.is_some() {
            return others;
        }
        let Some(lifetime) = &mut inner.lifetime else { return others };
        let Some(until) = lifetime.until else { return others };
        if lifetime.key.is_none() && until <= horizon {
            lifetime.key = runtime.add(until, self, Who::Set);
        }
        true
    }

    /// A deadline that was [noted](Self::note) has come.
    pub(crate) fn lapse(self: &Arc<Self>, key: Key, who: Who) {
        let mut inner = self.lock();
        let order = Order::Cancel(inner.end().map_or(Cause::Requested, Cause::from));
        let mut news = News::default();
        match who {
            Who::Response => {
                let own = inner.deadlines().iter_mut().find(|own| own.key == Some(key));
                let Some(deadline) = own else { return };
                deadline.key = None;
                drop(inner);
                return self.end(End::TimedOut);
            }
            Who::Set => {
                let Some(lifetime) = inner.lifetime.as_mut().filter(|own| own.key == Some(key))
                else {
                    return;
                };
                lifetime.key = None;
                self.tell_all(&mut inner, order, &mut news, |extra| !extra.has_own_lifetime());
            }
            Who::Task(slot) => {
                let was_told = inner.is_told(slot);
                let Some(extra) = inner.extra_mut(slot) else { return };
                if extra.timeout_key == Some(key) {
                    (extra.timeout, extra.timeout_key) = (None, None);
                    if was_told {
                        return;
                    }
                    self.tell(slot, extra, Order::TimeOut, &mut news);
                } else if extra.grace_key == Some(key) {
                    extra.grace_key = None;
                    extra.end_grace();
                } else if let Some(lifetime) =
                    extra.lifetime.as_mut().filter(|lifetime| lifetime.key == Some(key))
                {
                    lifetime.key = None;
                    self.tell(slot, extra, order, &mut news);
                } else {
                    return;
                }
                return self.spread_to(inner, slot, news);
            }
        }
        drop(inner);
        self.spread(news);
    }

    #[cfg(all(test, loom))]
    pub(crate) fn set_timeout(&self, slot: u32, key: Key) {
        self.lock().extra_of(slot).timeout_key = Some(key);
    }

    /// Tells one task to end.
    pub(crate) fn cancel_task(self: &Arc<Self>, slot: u32, generation: u16, cause: Cause) {
        let mut inner = self.lock();
        let entry = &inner.tasks[slot as usize];
        // What it was told first counts.
        if entry.kind != FREE && entry.generation == generation && !inner.is_told(slot) {
            let mut news = News::default();
            let extra = inner.extra_of(slot);
            self.tell(slot, extra, Order::Cancel(cause), &mut news);
            self.spread_to(inner, slot, news);
        }
    }

    /// Tells all tasks to end, and accepts no more. For other tasks that belong to no request, the
    /// registry makes another set.
    pub(crate) fn cancel(self: &Arc<Self>, cause: Cause) {
        self.cancel_now(cause, false);
    }

    /// The same, and none has any grace.
    pub(crate) fn abort(self: &Arc<Self>, cause: Cause) {
        self.cancel_now(cause, true);
    }

    fn cancel_now(self: &Arc<Self>, cause: Cause, abort: bool) {
        let mut inner = self.lock();
        inner.cancel();
        let over = self.own && inner.disown();
        let mut news = News::default();
        self.tell_all(&mut inner, Order::Cancel(cause), &mut news, |_| true);
        if abort {
            inner.extras_mut().for_each(|(_, extra)| extra.cut_grace());
        }
        // Here, so that whoever finds it cancelled under the lock sees it.
        self.mark_orders();
        let changed = inner.take_changed();
        drop(inner);
        self.spread(news);
        notify(changed);
        if self.own {
            self.owner().tell_changed();
        }
        self.settle(over);
    }

    /// Tells all tasks that have nothing of their own, and of the others those that `which` says.
    fn tell_all(
        self: &Arc<Self>,
        inner: &mut Inner,
        order: Order,
        news: &mut News,
        which: impl Fn(&Extra) -> bool,
    ) {
        inner.order.get_or_insert(order);
        news.told = true;
        for (slot, extra) in inner.extras_mut() {
            if extra.is_told_alone() && which(extra) {
                self.tell(slot, extra, order, news);
            }
        }
    }

    /// Tells the task in this slot. One that is graceful goes on for its grace; what it was told
    /// first is what counts.
    fn tell(self: &Arc<Self>, slot: u32, extra: &mut Extra, order: Order, news: &mut News) {
        let Some(stop) = &extra.stop else {
            extra.order.get_or_insert(order);
            news.told = true;
            return;
        };
        if extra.told.is_some() {
            return;
        }
        extra.told = Some(order);
        news.stops.push((stop.clone(), order.cause()));
        match extra.grace {
            // It does as it is told if it has not started, and else what it likes.
            None => {
                extra.order = Some(order);
                news.told = true;
            }
            Some(Duration::ZERO) => {
                extra.end_grace();
                news.told = true;
            }
            Some(grace) => {
                // What is too long to count is for ever.
                let until = Instant::now().checked_add(grace);
                extra.grace_key = self.note(self.runtime(), until, Who::Task(slot));
                news.expect(until);
            }
        }
    }

    /// Does what is left to do when tasks were told something, now that the lock is released.
    #[inline]
    fn spread(&self, news: News) {
        if news.told || news.earliest.is_some() || !news.stops.is_empty() {
            self.spread_now(news);
        }
    }

    #[inline(never)]
    fn spread_now(&self, news: News) {
        if let (Some(at), Some(runtime)) = (news.earliest, self.runtime()) {
            runtime.wind(at);
        }
        for (stop, cause) in news.stops {
            stop.tell(cause);
        }
        if news.told {
            self.wake_told();
        }
    }

    /// The same when it was this task alone.
    fn spread_to(&self, mut inner: MutexGuard<'_, Inner>, slot: u32, news: News) {
        let mut waker = None;
        // One that is in its grace is not woken yet: its waker is registered only once.
        if inner.order(slot).is_some() {
            self.mark_orders();
            waker = inner.tasks[slot as usize].waker.take();
        }
        drop(inner);
        self.spread(News { told: false, ..news });
        if let Some(waker) = waker {
            waker.wake();
        }
    }

    /// Wakes whoever was told something and does not know yet, some at a time: to wake a task of a
    /// dead runtime is to drop it.
    fn wake_told(&self) {
        self.mark_orders();
        let mut next = 0;
        loop {
            let mut wakers: SmallVec<[Waker; WAKERS]> = SmallVec::new();
            let mut inner = self.lock();
            while wakers.len() < WAKERS && next < inner.tasks.len() {
                // There are no more than `NONE`.
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

    /// Until it may take tasks no more that it takes now. Listens from now on.
    pub(crate) fn changed(&self) -> OwnedNotified {
        if self.own {
            return self.owner().changed();
        }
        self.lock().rare_mut().changed.get_or_insert_default().clone().notified_owned()
    }

    /// After a [`close`](Self::close), for which there are locks.
    pub(crate) fn tell_closed(&self) {
        let changed = self.lock().take_changed();
        notify(changed);
    }

    /// Accepts no task from now on.
    pub(crate) fn close(&self) {
        self.lock().close();
    }

    /// The same if it belongs to no request, though the registry is not closed yet.
    pub(crate) fn drain_own(&self) {
        if self.own {
            self.lock().drain_own();
        }
    }

    /// The registry has another for the tasks that belong to no request.
    pub(crate) fn disown(self: &Arc<Self>) {
        let over = self.lock().disown();
        self.settle(over);
    }

    fn policy<'a>(&'a self, inner: &'a Inner) -> &'a Policy {
        inner.rare.as_ref().and_then(|rare| rare.policy.as_ref()).unwrap_or(&self.config().policy)
    }

    /// Adds what was chosen on the set, or by a layer further inside.
    pub(crate) fn add_policy(&self, chosen: &Policy) {
        let mut inner = self.lock();
        // Nothing is chosen for the next request.
        if self.own || inner.stage != Stage::Counting {
            return;
        }
        inner.rare_mut().policy.get_or_insert_with(|| self.config().policy.clone()).add(chosen);
        if chosen.may_fail() {
            self.marks.fetch_or(MAY_FAIL, Ordering::Relaxed);
        }
    }

    /// Whether it could still be held.
    pub(crate) fn hold(&self) -> bool {
        let mut inner = self.lock();
        let open = inner.end().is_none() && !self.own;
        if open {
            inner.holds += 1;
        }
        open
    }

    pub(crate) fn let_go(self: &Arc<Self>) {
        let mut inner = self.lock();
        inner.holds -= 1;
        let end = if inner.holds == 0 { inner.held_end.take() } else { None };
        let over = end.is_none() && inner.is_over(self.own);
        drop(inner);
        match end {
            Some(end) => self.end(end),
            None => self.settle(over),
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
                inner.rare_mut().idle.get_or_insert_default().clone().notified_owned()
            };
            notified.await;
        }
    }

    /// As that of [`Inner`].
    #[expect(clippy::inline_always, reason = "in one of two places, for each set")]
    #[inline(always)]
    pub(crate) fn add_to(&self, base: &mut Base, trace_id: Option<TraceId>) {
        self.lock().add_to(base, trace_id);
    }

    /// A poll of the task has panicked.
    pub(crate) fn tell_panic(self: &Arc<Self>, slot: u32, panic: Panic) -> Panic {
        let (name, site) = self.name_and_site(slot);
        let panic = panic.in_task(name, site);
        // First, for what the task had is gone already, and the response may be about to end for it.
        self.panicked(slot, &panic);
        self.log((name, site), Some(&panic), "task panicked");
        panic
    }

    /// A destructor of the task has panicked. With what is known here only of a panic that was
    /// recorded.
    pub(crate) fn tell_drop_panic(self: &Arc<Self>, slot: u32, panic: Option<Panic>) {
        let (name, site) = self.name_and_site(slot);
        let panic = panic.map(|panic| panic.in_task(name, site));
        let unknown = || Panic::new(Box::new("while it was dropped")).in_task(name, site);
        // First, as above.
        self.panicked(slot, &panic.clone().unwrap_or_else(unknown));
        self.log((name, site), panic.as_ref(), "task panicked while it was dropped");
        if let Some(panic) = panic {
            self.lock().keep_drop_panic(slot, panic);
        }
    }

    /// Calls a callback of the user's. A panic in it is told and goes no further.
    fn call<R>(&self, callback: &'static str, f: impl FnOnce() -> R) -> Option<R> {
        let result = catch(f);
        // For the ids: nothing need be current here.
        let tell = |panic| {
            self.context.clone().sync_scope(|| self.config().log.tell_callback(panic, callback));
        };
        result.map_err(tell).ok()
    }

    fn log(
        &self,
        (task, site): (&'static str, &'static Location<'static>),
        panic: Option<&Panic>,
        what: &'static str,
    ) {
        let Some(suppressed) = self.config().log.admit() else { return };
        // The subscriber is the code of others.
        drop(catch(|| {
            let here = RequestContext::current();
            let trace_id = panic.map_or_else(|| here.get().copied(), Panic::trace_id);
            let request_id = panic.map_or_else(|| here.get(), Panic::request_id);
            tracing::error!(
                task,
                spawned_at = %site,
                panic = panic.map(Panic::message),
                location = panic.and_then(Panic::location).map(field::display),
                thread = panic.and_then(Panic::thread),
                trace_id = trace_id.map(field::display),
                request_id = request_id.map(field::display),
                suppressed,
                "{what}"
            );
        }));
    }

    /// What a destructor of a task has panicked with.
    #[cold]
    pub(crate) fn drop_panic(&self, task: &Canceller, payload: Box<dyn Any + Send>) -> Panic {
        let mut inner = self.lock();
        let Kind { name, site, .. } = inner.kinds[task.kind];
        let kept = inner.take_drop_panic(task.slot, task.generation);
        drop(inner);
        // The ids are the request's, not those of who awaits the handle.
        let panic = self.context.clone().sync_scope(|| Panic::new(payload));
        kept.unwrap_or_else(|| panic.in_task(name, site))
    }
}

/// No lock: it may be held where the panic is.
impl unwinding::Observer for Set {
    fn unwinds(&self) {
        // What the panic does from now on is seen after this.
        self.unwinding.fetch_add(1, Ordering::Relaxed);
    }
}

impl fmt::Debug for Set {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Set").field("len", &self.len()).finish_non_exhaustive()
    }
}

/// What was left in a set that was spare: the code of others.
pub(crate) struct Left {
    _more: (Option<Waker>, Option<Box<Rare>>),
    _runtime: Option<Arc<Runtime>>,
}

/// What is left to do when tasks were told something.
#[derive(Default)]
struct News {
    /// Some task may have to be woken.
    told: bool,
    stops: Vec<(Arc<Stop>, Cause)>,
    /// The first of the deadlines that were noted.
    earliest: Option<Instant>,
}

impl News {
    fn expect(&mut self, until: Option<Instant>) {
        self.earliest = self.earliest.into_iter().chain(until).min();
    }
}

/// Puts a value where none is: the compiler would keep the destructor of what is replaced.
#[inline]
fn fill<T>(place: &mut T, value: T) {
    mem::forget(mem::replace(place, value));
}

/// As [`Entry::since`](members::Entry), for a task that is spawned here.
///
/// In the poll that has made the set its tasks are as old as that. The clock costs more than all
/// else of a spawn.
#[inline]
const fn since(here: Option<u32>) -> u32 {
    if matches!(here, Some(place::JUST_MADE)) { 0 } else { NOT_YET }
}

/// Between parts of what is read under a lock: who waits for that is to have it. After a yield it would
/// be taken again before they are awake.
fn pause() {
    thread::sleep(Duration::from_micros(1));
}

#[cold]
fn let_go((waker, wakes): (Waker, bool)) {
    if wakes {
        wake(waker);
    }
}

/// The code of others, where a task cannot unwind.
fn wake(waker: Waker) {
    drop(catch(|| waker.wake()));
}

fn notify(notify: Option<Arc<Notify>>) {
    if let Some(notify) = notify {
        sync::notify(&notify);
    }
}

/// Why a task may not enter.
enum Denial {
    Because(SpawnError),
    /// This one is full.
    Full(SpawnLimit),
    /// The request has all that it may have.
    Share,
}

/// Why a set does not admit a task. Small, to be returned in registers.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Refusal {
    Because(SpawnError),
    /// A limit is full, for which the caller waits: it has it in hand. Nothing has been counted.
    Full,
    /// It is over, and has counted nothing: its registry has another by now.
    Gone,
}

impl Refusal {
    /// For who does not wait, and does not look elsewhere.
    pub(crate) const fn reason(self) -> SpawnError {
        match self {
            Self::Because(reason) => reason,
            Self::Full => SpawnError::Full,
            Self::Gone => SpawnError::Closed,
        }
    }
}

/// A task that its set counts, and that is yet to be given to the runtime.
///
/// Small, to be returned in registers.
#[derive(Clone, Copy)]
#[must_use = "the set counts it: make it a member"]
pub(crate) struct Ticket {
    slot: u32,
    generation: u16,
    kind: u16,
    /// As that of the [`Member`].
    has_home: bool,
}

impl Ticket {
    #[inline]
    pub(crate) fn member(self, set: &Arc<Set>) -> Member {
        Member::new(set.clone(), self.slot, self.has_home)
    }

    /// The future as a member of the set.
    #[inline]
    pub(crate) fn track<F>(self, set: &Arc<Set>, future: F) -> Tracked<F> {
        Tracked::new(future, self.member(set))
    }

    #[inline]
    pub(crate) fn canceller(self, set: &Arc<Set>) -> Canceller {
        let Self { slot, generation, kind, .. } = self;
        Canceller { set: set.clone(), slot, generation, kind }
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use std::{collections::BTreeSet, task::Wake};

    use tokio::runtime::Builder;

    use super::{members::Entry, *};
    use crate::{AtEnd, TaskRegistry, TaskState};

    #[test]
    fn a_waiting_task_costs_its_set_24_bytes() {
        assert_eq!(size_of::<Entry>(), 24);
    }

    #[test]
    fn a_set_that_was_held_is_over_when_it_is_let_go_whatever_has_ended_it() {
        let (completed, timed_out) = (End::Completed, End::TimedOut);
        for (ends, counts) in [
            (&[completed][..], completed),
            (&[timed_out], timed_out),
            (&[completed, timed_out], timed_out),
            (&[timed_out, completed], timed_out),
        ] {
            let registry = TaskRegistry::new();
            let set = Set::new(registry.config(), RequestContext::new());
            assert!(set.hold());
            for end in ends {
                set.end(*end);
            }
            assert_eq!(registry.sets_listed(), 1);
            set.let_go();
            assert_eq!((registry.sets_listed(), set.ended()), (0, Some(counts)), "{ends:?}");
        }
    }

    #[test]
    fn a_set_that_is_held_is_open_while_its_tasks_live() {
        let registry = TaskRegistry::new();
        let set = Set::new(registry.config(), RequestContext::new());
        let plan = Plan::new("task", Location::caller());
        let lives = set.enter(&plan, None).expect("it is open").member(&set);
        assert!(set.hold());
        set.end(End::Completed);
        assert_eq!(set.ended(), None);
        drop(set.enter(&plan, None).expect("it is held").member(&set));
        set.let_go();
        assert_eq!(set.ended(), Some(End::Completed));
        assert!(matches!(
            set.enter(&plan, None).map(drop),
            Err(Refusal::Because(SpawnError::Closed))
        ));
        drop(lives);
        assert_eq!(registry.sets_listed(), 0);
    }

    #[test]
    fn a_set_of_a_closed_registry_is_not_open() {
        let registry = TaskRegistry::new();
        registry.close();
        let set = Set::new(registry.config(), RequestContext::new());
        assert!(!set.lock().is_open());
    }

    #[test]
    fn counts_beyond_32_bits_are_right() {
        let registry = TaskRegistry::new();
        let set = Set::new(registry.config(), RequestContext::new());
        let plan = Plan::new("task", Location::caller());
        drop(set.enter(&plan, None).expect("it is open").member(&set));
        let many = 3 * u64::from(u32::MAX);
        set.lock().kinds[0].attempted += many;
        set.lock().kinds[0].refused += many;
        for over in [false, true] {
            if over {
                set.end(End::Completed);
            }
            let counts = registry.snapshot().totals;
            assert!(counts.is_exact(), "{counts:?}");
            assert_eq!((counts.attempted, counts.refused), (many + 1, many));
        }
    }

    #[test]
    fn a_set_in_the_memory_of_another_knows_nothing_of_it() {
        let woken = Arc::new(Woken);
        let value = Arc::new(());
        let runtime = Builder::new_current_thread().enable_all().start_paused(true).build();
        let runtime = runtime.expect("a runtime");
        let _here = runtime.enter();
        let first = TaskRegistry::new();
        let limited = first.clone().limit(SpawnLimit::new(30)).on_panic(OnPanic::FailResponse);
        let set = Set::new(limited.config(), RequestContext::new().with(value.clone()));
        let memory = Arc::as_ptr(&set);
        runtime.block_on(async {
            let mut chosen = Policy::default();
            chosen.at_end(AtEnd::Keep);
            set.add_policy(&chosen);
            set.expect_limit(Instant::now() + Duration::from_secs(3_600));
            let sites = [0; 20].map(|_| "task").into_iter().chain(["a", "b", "c", "d", "e"]);
            let members: Vec<_> = sites
                .map(|name| Plan::new(name, Location::caller()))
                .map(|plan| set.admit(&plan).expect("there is room").member(&set))
                .collect();
            assert_eq!((members.len(), set.len()), (25, 25));
            tokio::time::advance(Duration::from_secs(60)).await;
            set.wait(3, &woken.clone().into());
            let waker = woken.clone().into();
            assert!(set.poll_failed(&Context::from_waker(&waker)).is_pending());
            drop(waker);
            let panic = Panic::new(Box::new("it panics"));
            set.panicked(0, &panic);
            assert!(set.poll_failed(&Context::from_waker(Waker::noop())).is_ready());
            assert!(set.hold());
            set.close();
            set.cancel(Cause::Shutdown);
            set.end(End::TimedOut);
            set.let_go();
            drop(members);
            assert_eq!(first.snapshot().forced_tasks.len(), 25);
        });
        set.release();
        assert_eq!(Arc::strong_count(&value), 1, "it keeps nothing of others");
        assert_eq!(Arc::strong_count(&woken), 1);

        let set = Set::new(first.config(), RequestContext::new());
        assert_eq!(Arc::as_ptr(&set), memory);
        assert_eq!((set.len(), set.ended(), set.deadline()), (0, None, None));
        assert!(set.context.is_empty() && set.limits.is_empty());
        assert_eq!((set.marks(), set.level(), set.is_own()), (0, Level::Free, false));
        assert!(
            !set.is_gone() && set.poll_failed(&Context::from_waker(Waker::noop())).is_pending()
        );
        let plan = Plan::new("another", Location::caller());
        let members = [(); 3].map(|()| set.enter(&plan, None).expect("no limit").member(&set));
        assert_eq!(set.policy(&set.lock()).get(End::Completed), None);
        assert!(set.wait(members[0].slot, Waker::noop()).is_none());
        let snapshot = first.snapshot();
        assert_eq!(snapshot.by_name["another"].spawned, 3);
        assert_eq!((snapshot.totals.spawned, snapshot.live_tasks.len()), (25 + 3, 3));
        for task in &snapshot.live_tasks {
            assert!(task.age < Duration::from_secs(60), "{task}");
            assert_eq!(task.state, TaskState::Running);
        }
        assert_eq!(snapshot.forced_tasks.len(), 25, "no more");
        set.end(End::Completed);
        drop(members);
        assert_eq!(first.sets_listed(), 0);
        set.release();

        let set = Set::new(first.config(), RequestContext::new());
        assert_eq!(Arc::as_ptr(&set), memory);
        assert_eq!(first.snapshot().by_name["another"].aborted, 3, "still");
        assert!(first.snapshot().totals.is_exact());
        set.end(End::Completed);
        set.release();
        assert_eq!(first.sets_listed(), 0);
    }

    #[test]
    fn sets_that_are_kept_are_gone_with_all_who_could_have_a_request() {
        let runtime = Builder::new_current_thread().build().expect("a runtime");
        let _here = runtime.enter();
        for with_value in [false, true] {
            let registry = TaskRegistry::new();
            let layer = crate::TaskSetLayer::new(&registry);
            let owner = Arc::downgrade(&registry.config().owner);
            let context = || {
                let context = RequestContext::new();
                if with_value { context.with(1) } else { context }
            };
            let sets = [(); 3].map(|()| Set::new(registry.config(), context()));
            let [one, other, last] = sets;
            let plan = Plan::new("task", Location::caller());
            let (own, ticket) = registry.admit(&plan).expect("it is open");
            drop(ticket.member(&own));
            own.release();
            for set in [one, other] {
                set.end(End::Completed);
                set.release();
            }
            drop(registry);
            let clone = layer.clone();
            drop(layer);
            assert!(owner.strong_count() > 0);
            drop(clone);
            // That is not over yet, and is not kept then.
            assert!(owner.strong_count() > 0);
            last.end(End::Completed);
            last.release();
            assert_eq!(owner.strong_count(), 0);
        }
    }

    #[test]
    fn what_is_chosen_or_waited_for_when_a_set_is_spare_is_not_the_next_requests() {
        let runtime = Builder::new_current_thread().build().expect("a runtime");
        let _here = runtime.enter();
        let registry = TaskRegistry::new().limit(SpawnLimit::new(0).queue(1));
        let make = || Set::new(registry.config(), RequestContext::new());
        let mut chosen = Policy::default();
        chosen.at_end(AtEnd::Cancel);
        chosen.on_panic(OnPanic::FailResponse);
        for late in [false, true] {
            let set = make();
            let memory = Arc::as_ptr(&set);
            let stray = set.clone();
            if !late {
                stray.add_policy(&chosen);
            }
            set.end(End::Completed);
            set.release();
            stray.add_policy(&chosen);
            stray.release();
            let next = make();
            assert_eq!(Arc::as_ptr(&next), memory);
            let inner = next.lock();
            assert_eq!(next.policy(&inner).get(End::Completed), None);
            assert_eq!(next.policy(&inner).for_panic(), None);
            drop(inner);
            next.end(End::Completed);
            next.release();
        }

        let set = make();
        let waiter = set.clone();
        let hand = std::sync::Mutex::default();
        let plan = Plan { hand: Some(&hand), ..Plan::new("task", Location::caller()) };
        assert!(matches!(waiter.admit(&plan), Err(Refusal::Full)));
        set.end(End::Completed);
        set.release();
        drop(waiter.changed());
        assert!(matches!(waiter.admit(&plan), Err(Refusal::Because(SpawnError::Closed))));
        drop(waiter);
        assert!(make().lock().rare.is_none());
    }

    #[test]
    fn a_set_that_was_spare_is_as_a_new_one() {
        let runtime = Builder::new_current_thread().enable_all().start_paused(true).build();
        let runtime = runtime.expect("a runtime");
        let _here = runtime.enter();
        let registry = TaskRegistry::new();
        let limited = registry.clone().limit(SpawnLimit::new(3)).at_end(AtEnd::Keep);
        let of = |set: &Arc<Set>| {
            let state = format!("{:?}", set.lock().state());
            let general = set.policy(&set.lock()).general();
            (state, general, set.marks(), set.level(), set.is_own(), set.born)
        };
        let new = [&registry, &limited].map(|registry| {
            let registry = registry.clone();
            of(&Set::new(registry.config(), RequestContext::new()))
        });
        // A new one each.
        assert_eq!(registry.places(), [2, 0]);
        for (with, is_own) in [(&registry, false), (&limited, false), (&registry, true)] {
            for (next, new) in [&registry, &limited].into_iter().zip(&new) {
                let memory = {
                    let plan = Plan::new("task", Location::caller());
                    let (set, ticket) = if is_own {
                        with.admit(&plan).expect("there is room")
                    } else {
                        let set = Set::new(with.config(), RequestContext::new());
                        let ticket = set.admit(&plan).expect("there is room");
                        (set, ticket)
                    };
                    drop(ticket.member(&set));
                    set.end(End::Completed);
                    let memory = Arc::as_ptr(&set);
                    set.lock().spoil();
                    set.release();
                    memory
                };
                let set = Set::new(next.config(), RequestContext::new());
                assert_eq!(Arc::as_ptr(&set), memory);
                assert_eq!(of(&set), *new);
                set.end(End::Completed);
                set.release();
            }
        }
    }

    #[test]
    fn a_set_without_values_stays_where_it_is_and_another_comes_back_empty() {
        let runtime = Builder::new_current_thread().build().expect("a runtime");
        let _here = runtime.enter();
        let plan = Plan::new("task", Location::caller());
        for (context, stays) in
            [(RequestContext::new(), true), (RequestContext::new().with(1), false)]
        {
            let registry = TaskRegistry::new();
            let set = Set::new(registry.config(), context);
            drop(set.enter(&plan, None).expect("it is open").member(&set));
            set.end(End::Completed);
            assert_eq!(registry.places(), [1, usize::from(stays)]);
            assert!(!set.lock().kinds[0].is_unused());
            set.release();
            assert_eq!(registry.places(), [1, 1]);
            let set = Set::new(registry.config(), RequestContext::new());
            assert_eq!(set.lock().kinds[0].is_unused(), !stays);
            assert_eq!(registry.snapshot().totals.aborted, 1);
        }
        // Nor does it lose a place if somebody still has what is in it.
        let registry = TaskRegistry::new();
        let strays: Vec<_> = (0..100)
            .map(|_| {
                let set = Set::new(registry.config(), RequestContext::new());
                set.end(End::Completed);
                set
            })
            .collect();
        assert_eq!(registry.places(), [1, 1]);
        drop(strays);
    }

    #[test]
    fn an_observer_that_has_the_registry_does_not_keep_it() {
        struct Owns(#[expect(dead_code, reason = "it is what it is for")] TaskRegistry);
        impl crate::Observe for Owns {
            fn observe(&self, _: &TaskEvent) {}
        }
        let runtime = Builder::new_current_thread().build().expect("a runtime");
        let _here = runtime.enter();
        let registry = TaskRegistry::new();
        let owner = Arc::downgrade(&registry.config().owner);
        let observed = registry.clone().observer(Owns(registry));
        let set = Set::new(observed.config(), RequestContext::new());
        set.end(End::Completed);
        set.release();
        assert_eq!(observed.places(), [1, 1]);
        drop(observed);
        assert_eq!(owner.strong_count(), 0);
    }

    #[test]
    fn a_set_is_kept_for_requests_of_its_runtime() {
        let runtimes = [(); 3].map(|()| Builder::new_current_thread().build().expect("one"));
        let [one, other, third] = runtimes;
        let registry = TaskRegistry::new();
        let on = |runtime: &tokio::runtime::Runtime| {
            let _here = runtime.enter();
            let set = Set::new(registry.config(), RequestContext::new());
            assert!(set.is_on(Some(runtime.handle())));
            let plan = Plan::new("task", Location::caller());
            drop(set.enter(&plan, set.runtime()).expect("it is open").member(&set));
            set.end(End::Completed);
            let memory = Arc::as_ptr(&set);
            set.release();
            memory
        };
        assert_eq!(on(&one), on(&one));
        on(&other);
        assert_eq!(on(&other), on(&other));
        // Somebody has it while another runtime is seen.
        let stray = {
            let _here = other.enter();
            Set::new(registry.config(), RequestContext::new())
        };
        stray.end(End::Completed);
        on(&one);
        drop(stray);
        on(&one);
        on(&one);
        // One that is on no runtime takes none of it.
        let set = Set::new(registry.config(), RequestContext::new());
        assert!(set.is_on(None));
        set.end(End::Completed);
        set.release();
        let handle = other.handle().clone();
        drop(other);
        on(&one);
        on(&third);
        let counts = registry.snapshot().totals;
        assert!(counts.aborted == 10 && counts.is_exact(), "{counts:?}");
        let runtimes = registry.config().owner.runtimes_known();
        assert!(!runtimes.contains(&handle.id()), "what nobody needs any more is not kept");
    }

    struct Woken;

    impl Wake for Woken {
        fn wake(self: Arc<Self>) {}
    }

    #[test]
    fn each_task_has_its_own_place_whatever_memory_its_set_finds() {
        let runtime = Builder::new_current_thread().build().expect("a runtime");
        let _here = runtime.enter();
        let registry = TaskRegistry::new();
        let plan = Plan::new("task", Location::caller());
        for tasks in [1, 4, 5, 64, 65, 300, 5, 1_000, 300, 9, 64, 2_000, 16] {
            let set = Set::new(registry.config(), RequestContext::new());
            let enter = |_| set.enter(&plan, None).expect("it is open").member(&set);
            let members: Vec<_> = (0..tasks).map(enter).collect();
            let slots: BTreeSet<_> = members.iter().map(|member| member.slot).collect();
            assert_eq!(slots.len(), tasks);
            assert_eq!(registry.snapshot().live_tasks.len(), tasks);
            set.end(End::Completed);
            drop(members);
            assert_eq!(registry.sets_listed(), 0);
            set.release();
        }
    }

    #[test]
    fn what_others_still_have_is_for_no_other_request() {
        let runtime = Builder::new_current_thread().build().expect("a runtime");
        let _here = runtime.enter();
        let registry = TaskRegistry::new();
        let make = || Set::new(registry.config(), RequestContext::new());
        let plan = Plan::new("task", Location::caller());
        let (set, other) = (make(), make());
        drop(set.enter(&plan, None).expect("it is open").member(&set));
        let kept = set.clone();
        set.end(End::Completed);
        set.release();
        assert_eq!(kept.ended(), Some(End::Completed), "as it was");
        let next = make();
        assert_ne!(Arc::as_ptr(&next), Arc::as_ptr(&kept));
        // It is counted all the same, and what comes too late too.
        assert_eq!(registry.snapshot().totals.aborted, 1);
        assert!(kept.enter(&plan, None).is_err());
        assert_eq!(registry.snapshot().totals.refused, 1);
        // Not over: the registry has it.
        other.release();
        assert_ne!(Arc::as_ptr(&make()), Arc::as_ptr(&kept));
        assert_eq!(registry.sets_listed(), 3);
    }

    #[test]
    fn what_is_done_to_all_sets_does_nothing_to_those_that_come_after() {
        let runtime = Builder::new_current_thread().build().expect("a runtime");
        let _here = runtime.enter();
        let registry = TaskRegistry::new();
        let plan = Plan::new("task", Location::caller());
        let make = || Set::new(registry.config(), RequestContext::new());
        let set = make();
        let memory = Arc::as_ptr(&set);
        set.end(End::Completed);
        set.release();
        registry.cancel_all();
        registry.abort_all();
        registry.begin_drain();
        let set = make();
        assert_eq!(Arc::as_ptr(&set), memory);
        let member = set.enter(&plan, None).expect("the registry is not closed").member(&set);
        assert!(!set.has_orders());
        set.end(End::Completed);
        drop(member);
        set.release();
        registry.close();
        let set = make();
        assert_eq!(Arc::as_ptr(&set), memory);
        assert!(set.enter(&plan, None).is_err(), "it is closed now");
    }

    #[test]
    fn whatever_names_the_requests_before_had_each_is_counted() {
        let runtime = Builder::new_current_thread().build().expect("a runtime");
        let _here = runtime.enter();
        let names: Vec<&'static str> =
            (0..40).map(|n| &*Box::leak(n.to_string().into_boxed_str())).collect();
        for different in [1, 2, 4, 5, 7, 40] {
            let registry = TaskRegistry::new();
            let mut expected = std::collections::BTreeMap::new();
            for request in 0..100 {
                let set = Set::new(registry.config(), RequestContext::new());
                assert!(set.lock().kinds.iter().count() <= 4, "what it keeps is small");
                for task in 0..request % 6 {
                    let name = names[(7 * request + 5 * task) % different];
                    let plan = Plan::new(name, Location::caller());
                    drop(set.enter(&plan, None).expect("it is open").member(&set));
                    *expected.entry(name).or_insert(0) += 1;
                }
                set.end(End::Completed);
                set.release();
            }
            assert_eq!(registry.places(), [1, 1], "it was always the same");
            let by_name = registry.snapshot().by_name;
            let counted = by_name.into_iter().map(|(name, counts)| (name, counts.aborted));
            assert_eq!(counted.collect::<Vec<_>>(), expected.into_iter().collect::<Vec<_>>());
        }
    }

    #[test]
    fn the_kind_that_was_last_is_the_first_of_the_next_request() {
        let runtime = Builder::new_current_thread().build().expect("a runtime");
        let _here = runtime.enter();
        let registry = TaskRegistry::new();
        let site = Location::caller();
        for name in ["one", "other", "other", "one"] {
            let set = Set::new(registry.config(), RequestContext::new());
            drop(set.enter(&Plan::new(name, site), None).expect("it is open").member(&set));
            set.end(End::Completed);
            set.release();
            let next = Set::new(registry.config(), RequestContext::new());
            assert_eq!(next.lock().kinds[0].name, name);
            next.end(End::Completed);
            next.release();
        }
        let by_name = registry.snapshot().by_name;
        assert_eq!(by_name.values().map(|counts| counts.spawned).collect::<Vec<_>>(), [2, 2]);
    }

    #[test]
    fn many_kinds_in_one_set_are_told_apart() {
        let registry = TaskRegistry::new();
        let set = Set::new(registry.config(), RequestContext::new());
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
