use std::{
    collections::HashMap,
    iter, mem,
    ops::{Index, IndexMut},
    panic::Location,
    sync::Arc,
    task::Waker,
    time::Duration,
};

use smallvec::SmallVec;
use tokio::time::Instant;
use tower_catch_unwind::Panic;
use tower_request_context::TraceId;
use tower_response_end::End;
use tower_spawn_limit::{SpawnError, SpawnLimit};

use super::Home;
use crate::{
    AtEnd, Cause, ForcedTask, OnPanic, Outcome,
    ledger::{Base, ForcedTasks, Kind, OTHER},
    lifetime::Policy,
    reaper::{Key, Runtime},
    stop::Stop,
    sync::Notify,
    task::Order,
};

// In this order, so that a spawn and an end meet at few cache lines.
#[repr(C)]
pub(super) struct Inner {
    pub(super) live: u32,
    /// The first entry that is free; its `since` is the next.
    pub(super) free: u32,
    /// Accepts nothing, whether it has ended or not: the registry is closed.
    closed: bool,
    /// The same, for the tasks that belong to no request: the registry is about to be closed.
    draining: bool,
    /// All tasks were told to end.
    cancelled: bool,
    /// It is one of these, or has ended, or is counted elsewhere: a spawn looks at this alone.
    shut: bool,
    pub(super) stage: Stage,
    end: Option<End>,
    pub(super) watch: Watch,
    pub(super) held_end: Option<End>,
    pub(super) rare: Option<Box<Rare>>,
    pub(super) tasks: SmallVec<[Entry; FEW]>,
    /// What only some tasks have, and of which: in no order, and found by their entries.
    extras: Vec<(u32, Extra)>,
    pub(super) kinds: Kinds,
    clock: Clock,
    pub(super) holds: u32,
    /// What the tasks without a lifetime of their own were told.
    pub(super) order: Option<Order>,
    /// No timeout that is far away comes before this, if there are any.
    next_timeout: Option<Instant>,
    /// Theirs, once the response is over.
    pub(super) lifetime: Option<Lifetime>,
    /// Of the response, while it awaits.
    pub(super) response: Option<Waker>,
}

/// What few sets have. Apart, so that all others are small, and a task that ends has one thing to
/// look at.
#[derive(Default)]
pub(super) struct Rare {
    /// What was chosen, once it differs from the layer's choice.
    pub(super) policy: Option<Policy>,
    /// Where a name and site are in `kinds`, when these are many.
    index: Option<HashMap<(usize, usize), usize>>,
    pub(super) idle: Option<Arc<Notify>>,
    /// For those who wait to spawn: told when that may be for nothing.
    pub(super) changed: Option<Arc<Notify>>,
    /// What the request has of its share, once somebody waits for that. `live` says it before.
    pub(super) share: Option<SpawnLimit>,
    /// Of tasks that panicked in their drop, for their handles: the runtime knows only what they
    /// panicked with. The last few, for nobody may ask.
    drop_panics: Vec<(u32, u16, Panic)>,
    /// What a shutdown has ended.
    pub(super) forced: ForcedTasks,
    /// Why the response is to fail.
    pub(super) failed: Option<Panic>,
    pub(super) deadlines: Vec<Deadline>,
}

/// When the response has to be over, or one within it. Kept here too, since nobody may poll the
/// response by then.
pub(super) struct Deadline {
    pub(super) at: Instant,
    pub(super) key: Option<Key>,
    /// How many responses have it.
    pub(super) users: usize,
}

/// How old the set is, for tasks that await. A look at a clock costs as much as all else of that, so
/// one look is for all tasks that were there by then: each was spawned before, and awaits after. Of
/// many that come one by one, only one in eight takes it.
#[derive(Default)]
struct Clock {
    /// At the last look.
    ticks: u32,
    /// How many have used that since.
    used: u8,
    /// No task has come since.
    is_set: bool,
}

impl Clock {
    #[inline]
    fn ticks(&mut self, born: Instant, live: u32) -> u32 {
        if !self.is_set {
            self.used += 1;
            if self.used >= 8 || live <= 8 {
                *self = Self { ticks: ticks_of(born.elapsed()), used: 0, is_set: true };
            }
        }
        self.ticks
    }
}

/// Whether somebody must look for the deadline of the tasks when the response is over. It cannot be
/// kept before one of them awaits, and many a set has only tasks that never do.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Watch {
    Unneeded,
    /// The response is over.
    PutOff,
    /// A task has awaited, or is told by other means.
    Needed,
}

/// Who counts what is attempted here.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Stage {
    /// The set.
    Counting,
    /// A set of the registry takes no task any more: the registry has another.
    Gone,
    /// It is over. Its counts stay as they are: in the base of its shard by now or soon; or here, if
    /// it is spare. What comes too late its shard counts.
    Retired,
}

/// One task. 24 bytes: with its future, what a task costs while it waits.
pub(super) struct Entry {
    /// Registered at the first await, taken out when the task is told something.
    pub(super) waker: Option<Waker>,
    /// When it first awaited, or 0 if it is as old as its set: in ticks since that was made. Of a
    /// task that has an [`Extra`] it is there, and here is [where](PLACED) that is.
    since: u32,
    pub(super) kind: u16,
    /// Which of the tasks that come to be in this place one after another.
    pub(super) generation: u16,
}

/// Of `Entry::since`: in a second, so that it lasts for a year.
pub(super) const TICKS: u32 = 64;
/// As `Entry::kind`: nobody is here.
pub(super) const FREE: u16 = u16::MAX;
/// As `Entry::since`: it has not awaited yet.
pub(super) const NOT_YET: u32 = PLACED - 1;
/// A bit of `Entry::since`: the others are the place of its `Extra`.
const PLACED: u32 = 1 << 31;
/// So many kinds besides the first a set tells apart; what is more is counted as the last of them.
const KINDS_MAX: usize = FREE as usize - 1;
/// So many kinds are looked through one by one.
const KINDS_LISTED: usize = 16;
/// As an index of an entry: none is free. A million tasks are some 300 MB: there are no 2 billion.
pub(super) const NONE: u32 = PLACED - 1;
/// So many are in the set itself.
const FEW: usize = 8;
/// So many are kept for the next set, some 1.5 kB: its request may be a long one with few tasks.
const ENTRIES_KEPT: usize = 64;
/// As `ENTRIES_KEPT`: some 2 kB.
const EXTRAS_KEPT: usize = FEW;

/// The kinds of a set's tasks. The first lies apart, where a spawn and an end need not look for it:
/// most sets have no other.
#[repr(C)]
pub(super) struct Kinds {
    /// [Unused](Kind::is_unused) until there is one.
    first: Kind,
    rest: SmallVec<[Kind; 3]>,
    /// Which of them was looked for in the rest the last time.
    recent: u16,
}

impl Default for Kinds {
    fn default() -> Self {
        Self { first: Kind::new("", Location::caller()), rest: SmallVec::new(), recent: 0 }
    }
}

impl Kinds {
    /// Another request begins: its tasks are likely to be as the last ones.
    #[inline]
    fn begin(&mut self) {
        if let Some(recent) = usize::from(mem::take(&mut self.recent)).checked_sub(1) {
            mem::swap(&mut self.first, &mut self.rest[recent]);
        }
    }

    /// As new. What was the first is likely to be that of the next set, too.
    #[inline]
    fn clear(&mut self) {
        self.first = Kind::new(self.first.name, self.first.site);
        self.recent = 0;
        self.rest.clear();
        if self.rest.spilled() {
            self.rest = SmallVec::new();
        }
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = &Kind> {
        iter::once(&self.first).chain(&self.rest)
    }
}

impl Index<u16> for Kinds {
    type Output = Kind;

    #[inline]
    fn index(&self, kind: u16) -> &Kind {
        match usize::from(kind).checked_sub(1) {
            None => &self.first,
            Some(place) => &self.rest[place],
        }
    }
}

impl IndexMut<u16> for Kinds {
    #[inline]
    fn index_mut(&mut self, kind: u16) -> &mut Kind {
        match usize::from(kind).checked_sub(1) {
            None => &mut self.first,
            Some(place) => &mut self.rest[place],
        }
    }
}

/// What is known of a task beyond its entry.
#[derive(Default)]
pub(super) struct Extra {
    /// Instead of that of its entry.
    pub(super) since: u32,
    /// Its own choices; with these it has a lifetime of its own.
    pub(super) policy: Option<Policy>,
    pub(super) on_panic: Option<OnPanic>,
    /// That lifetime, once the response is over.
    pub(super) lifetime: Option<Lifetime>,
    /// What it is to do at its next await.
    pub(super) order: Option<Order>,
    pub(super) timeout: Option<Instant>,
    /// Of one that is noted; one that is far away is not yet.
    pub(super) timeout_key: Option<Key>,
    /// It is told to stop by this, and always by itself.
    pub(super) stop: Option<Arc<Stop>>,
    /// What that has told it.
    pub(super) told: Option<Order>,
    /// How long it may then go on; a closure that blocks has no choice.
    pub(super) grace: Option<Duration>,
    /// When that is over.
    pub(super) grace_key: Option<Key>,
    /// All were aborted before it was over.
    pub(super) is_cut_short: bool,
    pub(super) home: Option<Box<Home>>,
    pub(super) trace_id: Option<TraceId>,
    /// For the observer.
    pub(super) started: Option<Instant>,
}

impl Extra {
    pub(super) const fn has_own_lifetime(&self) -> bool {
        self.policy.is_some() || self.lifetime.is_some()
    }

    /// Whether it is told what it is told by itself, and not with all others.
    pub(super) const fn is_told_alone(&self) -> bool {
        self.order.is_some() || self.stop.is_some() || self.has_own_lifetime()
    }

    /// It has no more time, if it was told to end.
    pub(super) fn end_grace(&mut self) {
        if let Some(told) = self.told {
            self.order.get_or_insert(told.after_grace());
        }
    }

    /// The same, before that is over.
    pub(super) fn cut_grace(&mut self) {
        self.is_cut_short |= matches!(self.told, Some(Order::Cancel(_))) && self.order.is_none();
        self.end_grace();
    }
}

/// What was chosen for the time after the response, and the deadline that follows from it.
#[derive(Clone, Copy)]
pub(super) struct Lifetime {
    pub(super) at_end: AtEnd,
    pub(super) until: Option<Instant>,
    pub(super) key: Option<Key>,
}

impl Lifetime {
    #[expect(clippy::inline_always, reason = "at the end of each response")]
    #[inline(always)]
    pub(super) fn begin(at_end: AtEnd) -> Self {
        let until = match at_end {
            // What is too long to count is for ever.
            AtEnd::Drain(time) => Instant::now().checked_add(time),
            AtEnd::Cancel | AtEnd::Keep => None,
        };
        Self { at_end, until, key: None }
    }

    /// The lifetime of a task that is spawned by one with this lifetime, after the response.
    pub(super) fn of_child(self, chosen: Option<AtEnd>) -> Result<Self, SpawnError> {
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
    pub(super) fn inherited(self) -> Self {
        Self { key: None, ..self }
    }

    pub(super) fn is_far(at_end: AtEnd) -> bool {
        matches!(at_end, AtEnd::Drain(time) if Runtime::is_far(time))
    }

    pub(super) fn is_over(&self) -> bool {
        matches!(self.at_end, AtEnd::Cancel | AtEnd::Drain(Duration::ZERO))
    }
}

impl Default for Inner {
    fn default() -> Self {
        Self {
            kinds: Kinds::default(),
            tasks: SmallVec::new(),
            free: NONE,
            live: 0,
            clock: Clock::default(),
            extras: Vec::new(),
            next_timeout: None,
            end: None,
            closed: false,
            draining: false,
            cancelled: false,
            shut: false,
            stage: Stage::Counting,
            order: None,
            lifetime: None,
            holds: 0,
            held_end: None,
            watch: Watch::Unneeded,
            response: None,
            rare: None,
        }
    }
}

impl Inner {
    /// Is that of another set from now on, as it is [blank](Self::is_blank).
    #[expect(clippy::inline_always, reason = "in one of two places, for each set")]
    #[inline(always)]
    pub(super) fn begin(&mut self, closed: bool, own: bool) {
        // Each by its name, or one could be forgotten.
        let Self {
            live: _,
            free: _,
            closed: is_closed,
            draining,
            cancelled,
            shut,
            stage,
            end,
            watch,
            held_end,
            kinds,
            tasks: _,
            extras: _,
            clock,
            holds: _,
            order,
            next_timeout,
            lifetime,
            response: _,
            rare: _,
        } = self;
        *is_closed = closed;
        *draining = false;
        *cancelled = false;
        *shut = closed;
        *stage = Stage::Counting;
        *end = None;
        *watch = Watch::Unneeded;
        *held_end = None;
        kinds.begin();
        *clock = Clock::default();
        *order = None;
        *next_timeout = None;
        *lifetime = own.then(|| Lifetime::begin(AtEnd::Keep));
    }

    /// Whether there is nothing in it but counts, and memory for some tasks.
    #[inline]
    pub(super) fn is_blank(&self) -> bool {
        let is_small = self.tasks.len() <= ENTRIES_KEPT
            && self.extras.capacity() <= EXTRAS_KEPT
            && !self.kinds.rest.spilled();
        let has_none = (self.live, self.holds) == (0, 0) && self.extras.is_empty();
        has_none && is_small && !self.has_more()
    }

    /// Whether it has what few sets have, and is the code of others.
    #[inline]
    pub(super) fn has_more(&self) -> bool {
        self.response.is_some() || self.rare.is_some()
    }

    /// All that a set has to begin with again.
    #[cfg(all(test, not(loom)))]
    pub(super) fn state(&self) -> impl std::fmt::Debug + use<> {
        (
            (self.closed, self.draining, self.cancelled, self.shut),
            (self.stage == Stage::Counting, self.end, self.held_end, self.holds, self.live),
            (self.watch == Watch::Unneeded, self.clock.ticks, self.clock.used, self.clock.is_set),
            (self.order, self.next_timeout),
            self.lifetime.map(|lifetime| (lifetime.at_end, lifetime.until, lifetime.key)),
        )
    }

    /// What a request may leave behind.
    #[cfg(all(test, not(loom)))]
    pub(super) fn spoil(&mut self) {
        (self.closed, self.draining, self.cancelled, self.shut) = (true, true, true, true);
        (self.watch, self.held_end) = (Watch::PutOff, Some(End::Failed));
        self.clock = Clock { ticks: 7, used: 7, is_set: true };
        self.order = Some(Order::TimeOut);
        self.next_timeout = Some(Instant::now());
        self.lifetime = Some(Lifetime::begin(AtEnd::Drain(Duration::from_secs(1))));
    }

    /// Makes it [blank](Self::is_blank): no task lives. Its counts are lost, and what was the code of
    /// others comes back.
    pub(super) fn clear(&mut self) -> (Option<Waker>, Option<Box<Rare>>) {
        if self.tasks.len() > ENTRIES_KEPT {
            self.tasks = SmallVec::new();
            self.free = NONE;
        }
        if self.extras.capacity() > EXTRAS_KEPT {
            self.extras = Vec::new();
        }
        self.kinds.clear();
        self.take_more()
    }

    pub(super) fn take_more(&mut self) -> (Option<Waker>, Option<Box<Rare>>) {
        (self.response.take(), self.rare.take())
    }

    /// Adds the counts of a set that is over.
    ///
    /// `trace_id` is its own, if a shutdown has ended any of its tasks.
    #[expect(clippy::inline_always, reason = "in one of two places, for each set")]
    #[inline(always)]
    pub(super) fn add_to(&self, base: &mut Base, trace_id: Option<TraceId>) {
        let Kinds { first, rest, .. } = &self.kinds;
        // Unused where nothing was attempted.
        if !first.is_unused() {
            first.add_to(base.of(first.name));
        }
        for kind in rest {
            kind.add_to(base.of(kind.name));
        }
        // They stay here as the counts do, for a snapshot that has found it listed.
        if let Some(rare) = &self.rare {
            rare.forced.in_request(trace_id).for_each(|task| base.forced.push(task));
        }
    }

    /// The response is over, and its tasks have a time that is far away. Whether the reaper is to
    /// look for that now.
    #[inline]
    pub(super) fn drain(&mut self, lifetime: Lifetime) -> bool {
        self.lifetime = Some(lifetime);
        let watch = self.watch == Watch::Needed;
        if !watch {
            self.watch = Watch::PutOff;
        }
        watch
    }

    /// What few sets have, for this one.
    pub(super) fn rare_mut(&mut self) -> &mut Rare {
        self.rare.get_or_insert_default()
    }

    pub(super) fn share(&self) -> Option<&SpawnLimit> {
        self.rare.as_ref()?.share.as_ref()
    }

    pub(super) fn failed(&self) -> Option<&Panic> {
        self.rare.as_ref()?.failed.as_ref()
    }

    pub(super) fn deadlines(&mut self) -> &mut [Deadline] {
        self.rare.as_mut().map_or(&mut [], |rare| &mut rare.deadlines)
    }

    /// What to tell those who wait to spawn.
    pub(super) fn take_changed(&mut self) -> Option<Arc<Notify>> {
        self.rare.as_mut()?.changed.take()
    }

    /// What the task in this slot is to do at its next await.
    pub(super) fn order(&self, slot: u32) -> Option<Order> {
        match self.extra(slot) {
            Some(extra) if extra.is_told_alone() => extra.order,
            _ => self.order,
        }
    }

    /// Notes the task that leaves this slot, if it was the shutdown that has ended it.
    #[cold]
    #[inline(never)]
    pub(super) fn note_forced(&mut self, slot: u32, born: Instant, outcome: Outcome) {
        let extra = self.extra(slot);
        let told = match extra {
            Some(extra) if extra.is_told_alone() => extra.told.or(extra.order),
            _ => self.order,
        };
        let is_cut_short = extra.is_some_and(|extra| extra.is_cut_short);
        if !is_cut_short && told.map(Order::cause) != Some(Cause::Shutdown) {
            return;
        }
        let entry = &self.tasks[slot as usize];
        let kind = &self.kinds[entry.kind];
        let task = ForcedTask {
            name: kind.name,
            site: kind.site,
            age: born.elapsed().saturating_sub(in_ticks(self.since(slot))),
            trace_id: extra.and_then(|extra| extra.trace_id),
            outcome,
        };
        self.rare_mut().forced.push(task);
    }

    /// Whether the task in this slot was told to end, be it that it may still go on.
    pub(super) fn is_told(&self, slot: u32) -> bool {
        self.order(slot).is_some() || self.extra(slot).is_some_and(|extra| extra.told.is_some())
    }

    /// Takes no task any more, for the registry has another set. Whether it is over.
    pub(super) fn disown(&mut self) -> bool {
        if self.stage == Stage::Counting {
            self.stage = Stage::Gone;
            self.shut = true;
        }
        self.is_over(true)
    }

    /// Whether nothing will be counted here any more. Says so once, to who then lets go of it: it
    /// takes no more tasks, and would else be counted twice.
    #[inline]
    pub(super) fn is_over(&mut self, own: bool) -> bool {
        let over = self.live == 0
            && self.holds == 0
            && (own || self.end.is_some())
            && self.stage != Stage::Retired;
        if over {
            self.stage = Stage::Retired;
            self.shut = true;
        }
        over
    }

    #[inline]
    pub(super) fn kind(&mut self, name: &'static str, site: &'static Location<'static>) -> u16 {
        if self.kinds.first.is(name, site) { 0 } else { self.other_kind(name, site) }
    }

    /// Whether all that is asked for is given: the response goes on, and nobody was told anything.
    #[inline]
    pub(super) fn is_open(&self) -> bool {
        debug_assert_eq!(self.shut, self.is_refusing() || self.end.is_some());
        !self.shut
    }

    /// Whether it accepts nothing, and did not just end.
    pub(super) fn is_refusing(&self) -> bool {
        self.closed || self.draining || self.cancelled || self.stage != Stage::Counting
    }

    /// Whether it is [open](Self::is_open), and all that is known of its tasks is in their entries.
    #[inline]
    pub(super) fn is_plain(&self) -> bool {
        self.is_open() && !self.is_involved()
    }

    pub(super) fn is_closed(&self) -> bool {
        self.closed
    }

    pub(super) fn close(&mut self) {
        (self.closed, self.shut) = (true, true);
    }

    pub(super) fn drain_own(&mut self) {
        (self.draining, self.shut) = (true, true);
    }

    pub(super) fn is_cancelled(&self) -> bool {
        self.cancelled
    }

    pub(super) fn cancel(&mut self) {
        (self.cancelled, self.shut) = (true, true);
    }

    pub(super) fn end(&self) -> Option<End> {
        self.end
    }

    pub(super) fn set_end(&mut self, end: End) {
        (self.end, self.shut) = (Some(end), true);
    }

    /// Takes a task in: its slot, generation and kind.
    #[expect(clippy::inline_always, reason = "in one of two places, for each spawn")]
    #[inline(always)]
    pub(super) fn take_in(
        &mut self,
        name: &'static str,
        site: &'static Location<'static>,
        since: u32,
    ) -> (u32, u16, u16) {
        let kind = self.kind(name, site);
        self.kinds[kind].begin();
        self.live += 1;
        self.clock.is_set = false;
        let (slot, generation) = self.take_slot(kind, since);
        (slot, generation, kind)
    }

    /// Counts the task in this slot as ended.
    #[inline]
    pub(super) fn count_out(&mut self, slot: u32, outcome: Outcome) -> Option<Waker> {
        let entry = &mut self.tasks[slot as usize];
        let kind = std::mem::replace(&mut entry.kind, FREE);
        entry.since = std::mem::replace(&mut self.free, slot);
        entry.generation = entry.generation.wrapping_add(1);
        let waker = entry.waker.take();
        self.kinds[kind].end(outcome);
        self.live -= 1;
        waker
    }

    /// Whether there is more to a task that ends than its entry.
    #[inline]
    pub(super) fn is_involved(&self) -> bool {
        self.cancelled || self.rare.is_some() || self.has_extras()
    }

    /// Whether some task has more than its entry.
    #[inline]
    pub(super) fn has_extras(&self) -> bool {
        !self.extras.is_empty()
    }

    #[inline]
    fn place(&self, slot: u32) -> Option<usize> {
        let since = self.tasks[slot as usize].since;
        (since & PLACED != 0).then_some((since & !PLACED) as usize)
    }

    pub(super) fn extra(&self, slot: u32) -> Option<&Extra> {
        self.place(slot).map(|place| &self.extras[place].1)
    }

    pub(super) fn extra_mut(&mut self, slot: u32) -> Option<&mut Extra> {
        self.place(slot).map(|place| &mut self.extras[place].1)
    }

    /// That of the task in this slot, which has one from now on.
    pub(super) fn extra_of(&mut self, slot: u32) -> &mut Extra {
        let place = match self.place(slot) {
            Some(place) => place,
            None => self.add_extra(slot, Extra::default()),
        };
        &mut self.extras[place].1
    }

    /// Where it is now. The task has none yet.
    pub(super) fn add_extra(&mut self, slot: u32, mut extra: Extra) -> usize {
        extra.since = self.tasks[slot as usize].since;
        self.extras.push((slot, extra));
        self.note_place(self.extras.len() - 1);
        self.extras.len() - 1
    }

    pub(super) fn extras_mut(&mut self) -> impl Iterator<Item = (u32, &mut Extra)> {
        self.extras.iter_mut().map(|(slot, extra)| (*slot, extra))
    }

    fn take_extra(&mut self, slot: u32) -> Option<Extra> {
        let place = self.place(slot)?;
        let (_, extra) = self.extras.swap_remove(place);
        self.tasks[slot as usize].since = extra.since;
        if place < self.extras.len() {
            self.note_place(place);
        }
        Some(extra)
    }

    fn note_place(&mut self, place: usize) {
        let slot = self.extras[place].0;
        // There are no more than entries.
        self.tasks[slot as usize].since = PLACED | u32::try_from(place).unwrap_or(NONE);
    }

    /// As `Entry::since`, wherever it is.
    pub(super) fn since(&self, slot: u32) -> u32 {
        self.extra(slot).map_or(self.tasks[slot as usize].since, |extra| extra.since)
    }

    /// The task has come to an await: keeps its waker, unless it is told something at once. Yields
    /// that, and a waker that is not needed.
    #[inline]
    pub(super) fn awaits(
        &mut self,
        slot: u32,
        waker: Waker,
        born: Instant,
    ) -> (Option<Order>, Option<Waker>) {
        let entry = &mut self.tasks[slot as usize];
        if entry.since & PLACED != 0 {
            return self.awaits_with_extra(slot, waker, born);
        }
        if entry.since == NOT_YET {
            entry.since = self.clock.ticks(born, self.live);
        }
        match self.order {
            None => (None, entry.waker.replace(waker)),
            order => (order, Some(waker)),
        }
    }

    #[inline(never)]
    fn awaits_with_extra(
        &mut self,
        slot: u32,
        waker: Waker,
        born: Instant,
    ) -> (Option<Order>, Option<Waker>) {
        if self.since(slot) == NOT_YET {
            let ticks = self.clock.ticks(born, self.live);
            self.extra_of(slot).since = ticks;
        }
        match self.order(slot) {
            None => (None, self.tasks[slot as usize].waker.replace(waker)),
            order => (order, Some(waker)),
        }
    }

    /// Forgets what is known of this task beyond its entry, and what of that is noted.
    pub(super) fn remove_extra(&mut self, slot: u32) -> [Option<Key>; 3] {
        let extra = self.take_extra(slot);
        if self.extras.is_empty() {
            self.next_timeout = None;
        }
        let keys = |extra: Extra| {
            let lifetime = extra.lifetime.and_then(|lifetime| lifetime.key);
            [extra.timeout_key, lifetime, extra.grace_key]
        };
        extra.map(keys).unwrap_or_default()
    }

    /// There is a timeout that is far away. Whether it is the only one that is known.
    pub(super) fn expect_timeout(&mut self, at: Instant) -> bool {
        let before = self.next_timeout;
        self.next_timeout = Some(before.map_or(at, |before| before.min(at)));
        before.is_none()
    }

    /// How many extras there are to look through for timeouts that are near by now: none, if no
    /// timeout is.
    pub(super) fn begin_timeouts(&mut self, horizon: Instant) -> usize {
        let is_near = self.next_timeout.is_some_and(|next| next <= horizon);
        if !is_near {
            return 0;
        }
        self.next_timeout = None;
        self.extras.len()
    }

    /// Looks through some of the extras before `end`, and notes the timeouts that are near. Where to
    /// go on: between two calls extras may come, last, and the last may take the place of one that
    /// goes, so from the end on none is missed.
    pub(super) fn note_timeouts(
        &mut self,
        end: usize,
        horizon: Instant,
        note: impl Fn(Instant, u32) -> Option<Key>,
    ) -> usize {
        /// So many under one lock.
        const PART: usize = 1024;
        let end = end.min(self.extras.len());
        let begin = end.saturating_sub(PART);
        for (slot, extra) in &mut self.extras[begin..end] {
            let Some(at) = extra.timeout.filter(|_| extra.timeout_key.is_none()) else { continue };
            if at <= horizon {
                extra.timeout_key = note(at, *slot);
            } else {
                self.next_timeout = self.next_timeout.into_iter().chain([at]).min();
            }
        }
        begin
    }

    /// Whether there are timeouts that are far away.
    pub(super) fn has_far_timeouts(&self) -> bool {
        self.next_timeout.is_some()
    }

    #[inline(never)]
    fn other_kind(&mut self, name: &'static str, site: &'static Location<'static>) -> u16 {
        let Kinds { first, rest, .. } = &mut self.kinds;
        if first.is_unused() {
            *first = Kind::new(name, site);
            return 0;
        }
        let index = self.rare.as_ref().and_then(|rare| rare.index.as_ref());
        let found = match index {
            None => rest.iter().position(|kind| kind.is(name, site)),
            Some(index) => index.get(&address(name, site)).copied(),
        };
        let place = found.unwrap_or_else(|| self.add_kind(name, site));
        // There are less than `FREE`.
        self.kinds.recent = u16::try_from(1 + place).unwrap_or(FREE - 1);
        self.kinds.recent
    }

    /// Its place in the rest.
    #[cold]
    fn add_kind(&mut self, name: &'static str, site: &'static Location<'static>) -> usize {
        let rest = &mut self.kinds.rest;
        if rest.len() == KINDS_MAX {
            return KINDS_MAX - 1;
        }
        let is_last = rest.len() == KINDS_MAX - 1;
        rest.push(Kind::new(if is_last { OTHER } else { name }, site));
        if rest.len() >= KINDS_LISTED {
            let index = self.rare.get_or_insert_default().index.get_or_insert_with(|| {
                let listed = rest.iter().enumerate();
                listed.map(|(at, kind)| (address(kind.name, kind.site), at)).collect()
            });
            index.insert(address(name, site), rest.len() - 1);
        }
        rest.len() - 1
    }

    #[expect(clippy::inline_always, reason = "as above")]
    #[inline(always)]
    fn take_slot(&mut self, kind: u16, since: u32) -> (u32, u16) {
        let slot = self.free;
        let Some(entry) = self.tasks.get_mut(slot as usize) else {
            return self.take_new_slot(kind, since);
        };
        self.free = std::mem::replace(&mut entry.since, since);
        entry.kind = kind;
        (slot, entry.generation)
    }

    #[cold]
    #[inline(never)]
    fn take_new_slot(&mut self, kind: u16, since: u32) -> (u32, u16) {
        // Many a set has one task.
        if self.tasks.is_empty() {
            self.tasks.push(Entry { waker: None, since, kind, generation: 0 });
            return (0, 0);
        }
        self.grow();
        self.take_slot(kind, since)
    }

    /// Makes some free entries.
    fn grow(&mut self) {
        /// What nobody uses yet costs memory.
        const MOST: usize = 64;
        if self.tasks.len() == self.tasks.capacity() {
            // To 16, 64, 256: by four and not by two, for to move the entries is most of what a
            // task among many costs its set.
            let len = self.tasks.len();
            self.tasks.reserve(if len == FEW { FEW } else { 3 * len });
        }
        // There are no more than `NONE`.
        let begin = u32::try_from(self.tasks.len()).unwrap_or(NONE);
        let more = (self.tasks.capacity() - self.tasks.len()).min(MOST);
        let free = |since| Entry { waker: None, since, kind: FREE, generation: 0 };
        self.tasks.extend((begin + 1..).take(more).map(free));
        if let Some(last) = self.tasks.last_mut() {
            last.since = NONE;
        }
        self.free = begin;
    }

    /// The task in this slot has panicked in its drop.
    pub(super) fn keep_drop_panic(&mut self, slot: u32, panic: Panic) {
        const MAX: usize = 8;
        let generation = self.tasks[slot as usize].generation;
        let kept = &mut self.rare_mut().drop_panics;
        if kept.len() == MAX {
            kept.remove(0);
        }
        kept.push((slot, generation, panic));
    }

    pub(super) fn take_drop_panic(&mut self, slot: u32, generation: u16) -> Option<Panic> {
        let is_its = |kept: &(u32, u16, Panic)| (kept.0, kept.1) == (slot, generation);
        let kept = &mut self.rare.as_mut()?.drop_panics;
        let at = kept.iter().position(is_its)?;
        Some(kept.remove(at).2)
    }
}

fn ticks_of(age: Duration) -> u32 {
    let ticks = u64::from(age.subsec_nanos() / (1_000_000_000 / TICKS));
    let ticks = age.as_secs().saturating_mul(TICKS.into()).saturating_add(ticks);
    u32::try_from(ticks).unwrap_or(NOT_YET).min(NOT_YET - 1)
}

/// How old the set was at `Entry::since`. What has not awaited is taken to be as old as that.
pub(super) fn in_ticks(since: u32) -> Duration {
    let ticks = if since == NOT_YET { 0 } else { since };
    Duration::from_secs(1) * ticks / TICKS
}

fn address(name: &'static str, site: &'static Location<'static>) -> (usize, usize) {
    (name.as_ptr() as usize, std::ptr::from_ref(site) as usize)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;

    use super::*;

    #[test]
    fn ticks_tell_an_age_for_a_year_and_are_nothing_else_after_that() {
        for age in [Duration::ZERO, Duration::from_secs(1), Duration::from_secs(365 * 86_400)] {
            assert_eq!(in_ticks(ticks_of(age)), age);
        }
        let years = [2, 3, 5, 10].map(|years| Duration::from_secs(years * 365 * 86_400));
        for age in years.into_iter().chain([Duration::MAX]) {
            let ticks = ticks_of(age);
            assert!(ticks != NOT_YET && ticks & PLACED == 0);
        }
    }

    proptest! {
        #[test]
        fn what_is_known_of_a_task_is_found_by_its_slot(
            steps in prop::collection::vec((0..24_u32, 0..3), 0..200),
        ) {
            let (mut inner, mut lives, mut oracle) =
                (Inner::default(), BTreeMap::new(), BTreeMap::new());
            for (since, (slot, step)) in (0..).zip(steps) {
                let grace = Some(Duration::from_secs(since.into()));
                match (step, lives.contains_key(&slot)) {
                    (0, false) => {
                        let (slot, _, _) = inner.take_in("task", Location::caller(), since);
                        prop_assert_eq!(lives.insert(slot, since), None, "it was free");
                        prop_assert!(inner.extra(slot).is_none());
                    }
                    (0, true) => {
                        inner.remove_extra(slot);
                        inner.count_out(slot, Outcome::Completed);
                        lives.remove(&slot);
                        oracle.remove(&slot);
                    }
                    (1, true) => {
                        inner.extra_of(slot).grace = grace;
                        oracle.insert(slot, grace);
                    }
                    (_, true) => {
                        let removed = inner.take_extra(slot).map(|extra| extra.grace);
                        prop_assert_eq!(removed, oracle.remove(&slot));
                    }
                    (_, false) => {}
                }
                for (slot, since) in &lives {
                    let found = inner.extra(*slot).map(|extra| extra.grace);
                    prop_assert_eq!(found, oracle.get(slot).copied());
                    prop_assert_eq!(inner.since(*slot), *since);
                }
                let all: BTreeMap<_, _> =
                    inner.extras_mut().map(|(slot, extra)| (slot, extra.grace)).collect();
                prop_assert_eq!(&all, &oracle);
                prop_assert_eq!(inner.has_extras(), !oracle.is_empty());
                prop_assert_eq!(inner.live as usize, lives.len());
                for slot in (0..).take(inner.tasks.len()).filter(|slot| !lives.contains_key(slot)) {
                    prop_assert!(inner.extra(slot).is_none(), "{} is free", slot);
                }
            }
        }
    }
}
