use std::{cell::Cell, fmt, mem::ManuallyDrop, sync::Arc};

use tokio::sync::{Notify, futures::OwnedNotified};
use tower_response_end::{End, Watch};

use crate::{
    Permit, SpawnLimit,
    sync::{AtomicBool, Ordering},
};

#[cfg(not(loom))]
thread_local! {
    static HERE: Here = const { Here::new() };
}
#[cfg(loom)]
loom::thread_local! {
    static HERE: Here = Here::new();
}

/// What is current on this thread. Whoever moves something in moves it out again, so nothing is
/// dropped with the thread: a thread-local without a destructor needs no look at its state.
struct Here {
    place: Cell<ManuallyDrop<Place>>,
    level: Cell<Level>,
}

impl Here {
    const fn new() -> Self {
        Self { place: Cell::new(ManuallyDrop::new(Place::NOWHERE)), level: Cell::new(Level::Free) }
    }

    #[inline]
    fn replace(&self, place: Place) -> Place {
        ManuallyDrop::into_inner(self.place.replace(ManuallyDrop::new(place)))
    }
}

/// The limits over what is spawned here.
#[derive(Debug, Default)]
struct Place {
    limits: Limits,
    /// What to add to them when somebody asks: then the request gets a count of its own.
    layer: Option<SpawnLimit>,
}

impl Place {
    const NOWHERE: Self = Self { limits: Limits(None), layer: None };
}

/// What the code that runs here holds, which decides what it may wait for.
///
/// Whoever holds a permit waits for none of its level or below: permits would wait for each other.
/// So in a task that has one, a full limit refuses at once, and so it does in a request that has
/// one when it calls, in process, a service that limits its requests.
///
/// For those who write a spawner or a layer. It cannot see what a bare `tokio::spawn`, a channel or
/// a socket lies between: that ends with the time that is waited.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub enum Level {
    /// No permit.
    #[default]
    Free,
    /// That of a request.
    Request,
    /// That of a task.
    Task,
}

impl Level {
    /// That of the code that runs here.
    #[inline]
    pub fn current() -> Self {
        HERE.with(|here| here.level.get())
    }

    /// Makes this the current one, unless a higher one is, and returns what was. Whoever calls it
    /// [leaves](Self::leave) it again.
    #[inline]
    pub fn raise(self) -> Self {
        HERE.with(|here| here.level.replace(here.level.get().max(self)))
    }

    /// Makes that the current one which was before a [`raise`](Self::raise).
    #[inline]
    pub fn leave(before: Self) {
        HERE.with(|here| here.level.set(before));
    }

    /// Runs `f` on this level, or on the current one if that is higher.
    #[inline]
    pub fn enter<R>(self, f: impl FnOnce() -> R) -> R {
        struct Leave(Level);
        impl Drop for Leave {
            fn drop(&mut self) {
                Level::leave(self.0);
            }
        }
        let _leave = Leave(self.raise());
        f()
    }
}

/// The limits over what is spawned in some place: those of the layers around it, and of each
/// request there what is its share.
///
/// For those who write a spawner. A clone is the same limits.
#[derive(Clone, Default)]
pub struct Limits(Option<Arc<Scope>>);

/// Those of one request, and of one layer.
struct Scope {
    /// The share of this request.
    share: Option<SpawnLimit>,
    /// `None`: an outer layer has it already.
    limit: Option<SpawnLimit>,
    outer: Limits,
    ended: AtomicBool,
    end: Arc<Notify>,
}

impl Limits {
    /// Those of this place.
    pub fn current() -> Self {
        HERE.with(|here| {
            let Place { mut limits, layer } = here.replace(Place::NOWHERE);
            if let Some(limit) = layer {
                limits = limits.with(limit);
            }
            let current = limits.clone();
            here.replace(Place { limits, layer: None });
            current
        })
    }

    /// Whether there is none.
    #[inline]
    pub const fn is_empty(&self) -> bool {
        self.0.is_none()
    }

    /// Whether there is none here. Cheaper than to ask for the current ones.
    #[inline]
    pub fn are_empty_here() -> bool {
        HERE.with(|here| {
            let place = here.replace(Place::NOWHERE);
            let is_empty = place.limits.is_empty() && place.layer.is_none();
            here.replace(place);
            is_empty
        })
    }

    /// Whether both are those of the same place.
    pub fn ptr_eq(&self, other: &Self) -> bool {
        match (&self.0, &other.0) {
            (Some(a), Some(b)) => Arc::ptr_eq(a, b),
            (a, b) => a.is_none() && b.is_none(),
        }
    }

    /// Whether this limit is among them.
    pub fn contains(&self, limit: &SpawnLimit) -> bool {
        self.each().any(|other| other.ptr_eq(limit))
    }

    /// Runs `f` with these as the current ones.
    pub fn enter<R>(&mut self, f: impl FnOnce() -> R) -> R {
        struct Leave<'a>(&'a mut Limits, Place);
        impl Drop for Leave<'_> {
            fn drop(&mut self) {
                let outside = std::mem::take(&mut self.1);
                *self.0 = HERE.with(|here| here.replace(outside)).limits;
            }
        }
        let inside = Place { limits: std::mem::take(self), layer: None };
        let outside = HERE.with(|here| here.replace(inside));
        let _leave = Leave(self, outside);
        f()
    }

    /// Takes a permit of each, or none and says which is full. What is in hand counts; if it is
    /// for nothing here, it is given back.
    ///
    /// # Errors
    ///
    /// The one that is full. Nothing is counted as refused.
    pub fn try_take(&self, in_hand: Option<Permit>) -> Result<Permits, SpawnLimit> {
        let mut in_hand = in_hand;
        for (taken, limit) in self.each().enumerate() {
            if let Some(permit) = in_hand.take_if(|permit| permit.is_of(limit)) {
                permit.forget();
            } else if !limit.try_take() {
                self.each().take(taken).for_each(SpawnLimit::release);
                return Err(limit.clone());
            }
        }
        Ok(Permits(self.clone()))
    }

    /// Until the request whose limits these are is over, if they are one's. Listens from now on.
    pub(crate) fn end(&self) -> OwnedNotified {
        self.0.as_ref().map(|scope| scope.end.clone()).unwrap_or_default().notified_owned()
    }

    /// Whether it is.
    pub(crate) fn has_ended(&self) -> bool {
        self.0.as_ref().is_some_and(|scope| scope.ended.load(Ordering::Acquire))
    }

    fn with(self, limit: SpawnLimit) -> Self {
        let share = limit.limit_per_request();
        let share = (share < SpawnLimit::MAX).then(|| SpawnLimit::new(share));
        let limit = (!self.contains(&limit)).then_some(limit);
        Self(Some(Arc::new(Scope {
            share,
            limit,
            outer: self,
            ended: AtomicBool::new(false),
            end: Arc::default(),
        })))
    }

    /// From the inside out: what many share is taken last.
    fn each(&self) -> impl Iterator<Item = &SpawnLimit> {
        let scopes = std::iter::successors(self.0.as_deref(), |scope| scope.outer.0.as_deref());
        scopes.flat_map(|scope| scope.share.iter().chain(&scope.limit))
    }
}

/// A long chain must not be dropped recursively: each link would cost a stack frame.
impl Drop for Scope {
    fn drop(&mut self) {
        let mut next = self.outer.0.take();
        while let Some(mut scope) = next {
            next = Arc::get_mut(&mut scope).and_then(|scope| scope.outer.0.take());
        }
    }
}

impl fmt::Debug for Limits {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(self.each()).finish()
    }
}

/// A permit of each of some [`Limits`], which come back when this is dropped.
#[derive(Debug, Default)]
#[must_use = "the permits come back when it is dropped"]
pub struct Permits(Limits);

impl Permits {
    /// Whose they are.
    pub(crate) const fn limits(&mut self) -> &mut Limits {
        &mut self.0
    }

    /// Keeps them taken until they are [released](Limits::release).
    pub fn forget(mut self) {
        self.0 = Limits(None);
    }
}

impl Limits {
    /// Gives back what was [forgotten](Permits::forget).
    pub fn release(&self) {
        self.each().for_each(SpawnLimit::release);
    }
}

impl Drop for Permits {
    fn drop(&mut self) {
        self.0.release();
    }
}

/// The life of one response, as [`Watch`]ed by the layer that limits what it spawns.
#[derive(Debug)]
pub struct LimitScope(Place);

impl LimitScope {
    #[inline]
    pub(crate) fn new(limit: &SpawnLimit) -> Self {
        let limits = if Limits::are_empty_here() { Limits(None) } else { Limits::current() };
        Self(Place { limits, layer: Some(limit.clone()) })
    }

    #[inline]
    fn swap(&mut self) {
        HERE.with(|here| self.0 = here.replace(std::mem::take(&mut self.0)));
    }
}

impl Watch for LimitScope {
    #[inline]
    fn enter(&mut self) {
        self.swap();
    }

    #[inline]
    fn leave(&mut self) {
        self.swap();
    }

    fn end(&mut self, _: End) {
        // If nobody has asked yet, nobody waits for these.
        if let (None, Some(scope)) = (&self.0.layer, &self.0.limits.0) {
            scope.ended.store(true, Ordering::Release);
            scope.end.notify_waiters();
        }
    }
}
