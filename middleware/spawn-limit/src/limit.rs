use std::{
    collections::BTreeMap,
    fmt,
    panic::{AssertUnwindSafe, catch_unwind},
    pin::Pin,
    task::{Context, Poll, Waker},
    time::Duration,
};

use pin_project_lite::pin_project;
use tokio::{
    runtime::Handle,
    time::{Instant, Sleep, sleep_until},
};
use tower_response_end::{End, OnEnd};

use crate::{
    Level, SpawnError,
    sync::{Arc, AtomicU64, Mutex, MutexGuard, Ordering, contain, lock},
};

/// How many tasks may exist at once.
///
/// A clone is the same limit: it shares the count, not the choices of
/// [`per_request`](Self::per_request) and [`queue`](Self::queue).
///
/// A limit of 0 is always full. One above [`MAX`](Self::MAX) is that.
#[derive(Clone)]
pub struct SpawnLimit {
    count: Arc<Count>,
    per_request: usize,
    queue: usize,
}

impl SpawnLimit {
    /// The largest limit, some 2 billion: so many tasks would take 600 GB.
    pub const MAX: usize = MAX as usize;

    /// At most `limit` tasks at once.
    ///
    /// Choose it by memory: a waiting task costs its future and some 300 bytes, and whatever it
    /// holds.
    pub fn new(limit: usize) -> Self {
        Self {
            count: Arc::new(Count::new(limit, None)),
            per_request: usize::MAX,
            queue: usize::MAX,
        }
    }

    /// At most `limit` tasks at once for each request; 0 refuses all.
    ///
    /// Choose it by what the most demanding honest request needs, so that one request cannot take
    /// what all others share.
    pub const fn per_request(mut self, limit: usize) -> Self {
        self.per_request = limit;
        self
    }

    /// At most `waiting` wait for a permit at once: those that are more are refused without a
    /// wait. The default is no bound but the time that each has.
    ///
    /// Choose it by what can be served in that time: the limit, times the time that is waited,
    /// divided by the time that a task takes. Who is further back in the line waits in vain.
    pub const fn queue(mut self, waiting: usize) -> Self {
        self.queue = waiting;
        self
    }

    /// Changes the limit, for all clones. When it returns nobody is let in over the new one. What
    /// is in use stays so: below that, the limit is full until enough has come back.
    pub fn set_limit(&self, limit: usize) {
        self.count.set_limit(limit);
    }

    /// How many permits there are.
    pub fn limit(&self) -> usize {
        of_word(self.count.word().limit())
    }

    /// How many permits each request may have; `usize::MAX` if that is not limited.
    pub const fn limit_per_request(&self) -> usize {
        self.per_request
    }

    /// How many permits are taken.
    pub fn in_use(&self) -> usize {
        of_word(self.count.word().in_use())
    }

    /// How many wait for one. Who waits for other tasks of its own request is not among them.
    pub fn waiting(&self) -> usize {
        self.count.line().waiting.len()
    }

    /// How often somebody was refused because this limit was full, or a request's share of it, at
    /// once or after a wait.
    pub fn refused(&self) -> u64 {
        self.count.refused.load(Ordering::Relaxed)
    }

    /// Whether both are the same limit, not merely equal ones.
    pub fn ptr_eq(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.count, &other.count)
    }

    /// Takes a permit, without waiting and without allocating. What a request has is not looked
    /// at: that is known to who spawns for it.
    ///
    /// Code that runs with the permit of a task [has a level](Level): it should say so, and does if
    /// it is spawned by this crate or by `tower-task-set`.
    ///
    /// # Errors
    ///
    /// [`SpawnError::Full`] if all are taken, or others wait for one.
    pub fn try_acquire(&self) -> Result<Permit, SpawnError> {
        self.take().ok_or_else(|| {
            self.refuse();
            SpawnError::Full
        })
    }

    /// Takes a permit, waiting for it at most so long, in the order in which it was asked for.
    ///
    /// Whoever runs with the permit of a task is refused at once when the limit is full: see
    /// [`Level`]. So is who is too many for the [queue](Self::queue), and whoever waits outside of a
    /// runtime, or in one without a time driver or that was shut down; unless it waits for as long as
    /// it takes, `Duration::MAX`, which needs no clock.
    ///
    /// # Errors
    ///
    /// [`SpawnError::Full`] if there was none in that time.
    ///
    /// # Cancel safety
    ///
    /// Dropping it gives up the place in the line, or the permit that has come. As long as it is
    /// neither polled nor dropped, it may be given a permit that then nobody uses.
    pub fn acquire_within(&self, wait: Duration) -> Acquire {
        Acquire::new(self.clone(), Level::Task, wait)
    }

    /// As [`try_acquire`](Self::try_acquire), for who keeps account of what is taken by other
    /// means than a [`Permit`]: each `true` asks for one [`release`](Self::release). Nothing is
    /// counted as refused.
    #[inline]
    pub fn try_take(&self) -> bool {
        self.count.try_take()
    }

    /// Gives back what was [taken](Self::try_take).
    ///
    /// It cannot know what: a release too many gives back a permit that is still held, and lets
    /// one more in than the limit says. The count never goes below zero.
    #[inline]
    pub fn release(&self) {
        self.count.release();
    }

    /// Counts somebody as [refused](Self::refused).
    pub fn refuse(&self) {
        let whole = self.count.whole.as_ref().unwrap_or(&self.count);
        whole.refused.fetch_add(1, Ordering::Relaxed);
    }

    /// A limit of its own for what one request may have: see [`per_request`](Self::per_request).
    /// Whom it refuses is counted as refused by this one.
    pub fn share(&self) -> Self {
        let count = Count::new(self.per_request, Some(self.count.clone()));
        Self { count: Arc::new(count), per_request: usize::MAX, queue: self.queue }
    }

    pub(crate) fn take(&self) -> Option<Permit> {
        self.try_take().then(|| self.taken())
    }

    /// One that was taken.
    fn taken(&self) -> Permit {
        Permit(Some(self.count.clone()))
    }
}

impl fmt::Debug for SpawnLimit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let word = self.count.word();
        f.debug_struct("SpawnLimit")
            .field("limit", &word.limit())
            .field("in_use", &word.in_use())
            .field("waiting", &self.waiting())
            .field("refused", &self.refused())
            .field("per_request", &self.per_request)
            .field("queue", &self.queue)
            .finish()
    }
}

/// One of a [`SpawnLimit`]'s permits, which comes back when this is dropped.
///
/// Leaking it keeps the permit taken for ever.
#[must_use = "the permit comes back when it is dropped"]
pub struct Permit(Option<Arc<Count>>);

impl Permit {
    /// Whether it is one of this limit's.
    pub fn is_of(&self, limit: &SpawnLimit) -> bool {
        self.0.as_ref().is_some_and(|count| Arc::ptr_eq(count, &limit.count))
    }

    /// Keeps the permit taken until it is [released](SpawnLimit::release).
    pub fn forget(mut self) {
        self.0 = None;
    }
}

impl Drop for Permit {
    fn drop(&mut self) {
        if let Some(count) = self.0.take() {
            count.release();
        }
    }
}

/// It comes back at the end of a response.
impl OnEnd for Permit {
    fn on_end(self, _: End) {}
}

impl fmt::Debug for Permit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Permit").finish_non_exhaustive()
    }
}

pin_project! {
    /// Waits for a permit: see [`SpawnLimit::acquire_within`].
    #[must_use = "futures do nothing unless polled"]
    pub struct Acquire {
        turn: Turn,
        // Who holds that, or more, does not wait.
        never: Level,
        until: Option<Instant>,
        // Made when it has to wait: most need no clock.
        #[pin]
        sleep: Option<Sleep>,
    }
}

impl Acquire {
    pub(crate) fn new(limit: SpawnLimit, never: Level, wait: Duration) -> Self {
        let now = Instant::now();
        // What is too long to count is waited for ever.
        Self::since(limit, never, now, now.checked_add(wait))
    }

    /// For who has waited since then already.
    pub(crate) fn since(
        limit: SpawnLimit,
        never: Level,
        since: Instant,
        until: Option<Instant>,
    ) -> Self {
        Self { turn: Turn { limit, since, place: None }, never, until, sleep: None }
    }
}

impl Future for Acquire {
    type Output = Result<Permit, SpawnError>;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let mut this = self.project();
        let turn = this.turn;
        let has_time = this.until.is_none_or(|until| until > turn.since);
        let may_wait = has_time && Level::current() < *this.never;
        if turn.place.is_none() {
            if let Some(permit) = turn.limit.take() {
                return Poll::Ready(Ok(permit));
            }
            let sleep = this.until.map(sleep_without_panic);
            if !may_wait || sleep.as_ref().is_some_and(Option::is_none) {
                return Poll::Ready(turn.refused());
            }
            this.sleep.set(sleep.flatten());
        }
        let in_time = may_wait && this.sleep.as_pin_mut().is_none_or(|sleep| is_pending(sleep, cx));
        match turn.poll(cx) {
            Poll::Pending if in_time => Poll::Pending,
            Poll::Ready(true) => Poll::Ready(Ok(turn.limit.taken())),
            // Not in the line any more, but perhaps given a permit in the last moment.
            _ if turn.leave() => Poll::Ready(Ok(turn.limit.taken())),
            _ => Poll::Ready(turn.refused()),
        }
    }
}

impl fmt::Debug for Acquire {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Acquire").field("limit", &self.turn.limit).finish_non_exhaustive()
    }
}

/// `None` outside of a runtime, or in one without a time driver, for which there is no other
/// question than this panic.
fn sleep_without_panic(until: Instant) -> Option<Sleep> {
    Handle::try_current().ok()?;
    catch_unwind(|| sleep_until(until)).ok()
}

/// None is, once its runtime was shut down: that panics too.
fn is_pending(sleep: Pin<&mut Sleep>, cx: &mut Context<'_>) -> bool {
    catch_unwind(AssertUnwindSafe(|| sleep.poll(cx).is_pending())).unwrap_or(false)
}

/// A place in a limit's line, given up when this is dropped.
struct Turn {
    limit: SpawnLimit,
    since: Instant,
    place: Option<Place>,
}

impl Turn {
    /// Whether a permit was taken, or the line is too long.
    fn poll(&mut self, cx: &Context<'_>) -> Poll<bool> {
        let count = &self.limit.count;
        // The code of others: not under the lock.
        let waker = cx.waker().clone();
        match self.place {
            None => match count.join(self.since, self.limit.queue, waker) {
                Joined::Taken => Poll::Ready(true),
                Joined::Full => Poll::Ready(false),
                Joined::Waits(place) => {
                    self.place = Some(place);
                    Poll::Pending
                }
            },
            Some(place) if count.waits(place, waker) => Poll::Pending,
            Some(_) => {
                self.place = None;
                Poll::Ready(true)
            }
        }
    }

    /// Whether a permit had come.
    fn leave(&mut self) -> bool {
        self.place.take().is_some_and(|place| self.limit.count.leave(place))
    }

    fn refused(&self) -> Result<Permit, SpawnError> {
        self.limit.refuse();
        Err(SpawnError::Full)
    }
}

impl Drop for Turn {
    fn drop(&mut self) {
        if self.leave() {
            self.limit.release();
        }
    }
}

/// What all clones of a limit share.
///
/// One word tells the limit, how much of it is in use, and whether somebody waits. While nobody
/// does, whoever comes or goes changes it in one step, without a lock. While somebody does, only
/// who has the lock changes it, and nobody is let in past the line: a permit that comes back goes
/// to the first in it. Whenever the lock is free, somebody waits only if the limit is full.
struct Count {
    word: AtomicU64,
    refused: AtomicU64,
    line: Mutex<Line>,
    /// What this is a request's share of.
    whole: Option<Arc<Count>>,
}

#[derive(Default)]
struct Line {
    /// Who is not here any more has been given a permit.
    waiting: BTreeMap<Place, Waker>,
    last: u64,
}

/// By the time since when it has waited, perhaps in other lines before.
type Place = (Instant, u64);

enum Joined {
    Taken,
    Full,
    Waits(Place),
}

/// From the lowest bit: 32 that are in use, 31 of the limit, one that says whether somebody waits.
#[derive(Clone, Copy)]
struct Word(u64);

const MAX: u32 = u32::MAX >> 1;
const LIMIT: u32 = 32;
const WAITS: u64 = 1 << 63;

impl Word {
    fn new(limit: usize) -> Self {
        let limit = u32::try_from(limit).map_or(MAX, |limit| limit.min(MAX));
        Self(u64::from(limit) << LIMIT)
    }

    const fn in_use(self) -> u64 {
        self.0 & u32::MAX as u64
    }

    const fn limit(self) -> u64 {
        (self.0 & !WAITS) >> LIMIT
    }

    const fn waits(self) -> bool {
        self.0 & WAITS != 0
    }

    const fn has_room(self) -> bool {
        self.in_use() < self.limit()
    }

    const fn one_more(self) -> Self {
        Self(self.0 + 1)
    }

    const fn one_less(self) -> Self {
        Self(self.0 - 1)
    }

    const fn with_line(self) -> Self {
        Self(self.0 | WAITS)
    }

    const fn with_limit_of(self, other: Self) -> Self {
        const KEPT: u64 = WAITS | u32::MAX as u64;
        Self(self.0 & KEPT | other.0 & !KEPT)
    }
}

/// It is at most 2^32, and on a small machine not even that.
fn of_word(count: u64) -> usize {
    usize::try_from(count).unwrap_or(usize::MAX)
}

impl Count {
    fn new(limit: usize, whole: Option<Arc<Self>>) -> Self {
        let word = AtomicU64::new(Word::new(limit).0);
        Self { word, refused: AtomicU64::new(0), line: Mutex::new(Line::default()), whole }
    }

    fn word(&self) -> Word {
        Word(self.word.load(Ordering::Relaxed))
    }

    fn line(&self) -> MutexGuard<'_, Line> {
        lock(&self.line)
    }

    /// Changes the word if it has not changed meanwhile.
    // Acquire and Release, so that who has a permit sees what was done by who had it before.
    #[inline]
    fn change(&self, word: &mut Word, to: impl FnOnce(Word) -> Word) -> bool {
        let changed = self.word.compare_exchange_weak(
            word.0,
            to(*word).0,
            Ordering::AcqRel,
            Ordering::Relaxed,
        );
        changed.map_err(|now| word.0 = now).is_ok()
    }

    #[inline]
    fn try_take(&self) -> bool {
        let mut word = self.word();
        while word.has_room() && !word.waits() {
            if self.change(&mut word, Word::one_more) {
                return true;
            }
        }
        false
    }

    #[inline]
    fn release(&self) {
        let mut word = self.word();
        loop {
            if word.waits() {
                if self.hand_on() {
                    return;
                }
                word = self.word();
            } else if word.in_use() == 0 || self.change(&mut word, Word::one_less) {
                return;
            }
        }
    }

    /// Gives a permit that comes back to the first in the line. `false` if there is none any more.
    #[cold]
    #[inline(never)]
    fn hand_on(&self) -> bool {
        let mut line = self.line();
        let word = self.word();
        if !word.waits() {
            return false;
        }
        if word.in_use() > 0 {
            self.word.store(word.one_less().0, Ordering::Release);
        }
        let next = self.let_in(&mut line);
        drop(line);
        if let Some(next) = next {
            contain(|| next.wake());
        }
        true
    }

    /// Gives a permit to the first in the line, if there is one.
    fn let_in(&self, line: &mut Line) -> Option<Waker> {
        let word = self.word();
        if !word.has_room() {
            return None;
        }
        let (_, next) = line.waiting.pop_first()?;
        let word = if line.waiting.is_empty() { Word(word.0 & !WAITS) } else { word };
        self.word.store(word.one_more().0, Ordering::Release);
        Some(next)
    }

    fn set_limit(&self, limit: usize) {
        let mut line = self.line();
        let mut word = self.word();
        while !self.change(&mut word, |word| word.with_limit_of(Word::new(limit))) {}
        let next: Vec<_> = std::iter::from_fn(|| self.let_in(&mut line)).collect();
        drop(line);
        for next in next {
            contain(|| next.wake());
        }
    }

    /// Goes to the end of the line, unless there is room by now.
    fn join(&self, since: Instant, most: usize, waker: Waker) -> Joined {
        let mut line = self.line();
        let mut word = self.word();
        loop {
            // Before anything is promised: who was let in since the look without the lock has
            // made room, or has not.
            if word.has_room() && !word.waits() {
                if self.change(&mut word, Word::one_more) {
                    drop(line);
                    return Joined::Taken;
                }
            } else if line.waiting.len() >= most {
                drop(line);
                return Joined::Full;
            } else if word.waits() || self.change(&mut word, Word::with_line) {
                break;
            }
        }
        line.last += 1;
        let place = (since, line.last);
        line.waiting.insert(place, waker);
        Joined::Waits(place)
    }

    /// Whether this one still waits; and who is to be woken then.
    fn waits(&self, place: Place, waker: Waker) -> bool {
        let mut line = self.line();
        let old = match line.waiting.get_mut(&place) {
            Some(waiting) => Ok(std::mem::replace(waiting, waker)),
            None => Err(waker),
        };
        drop(line);
        // Wakers are dropped without the lock too.
        old.is_ok()
    }

    /// Goes out of the line. Whether a permit had been given to it.
    fn leave(&self, place: Place) -> bool {
        let mut line = self.line();
        let waker = line.waiting.remove(&place);
        if waker.is_some() && line.waiting.is_empty() {
            self.word.fetch_and(!WAITS, Ordering::AcqRel);
        }
        drop(line);
        waker.is_none()
    }
}
