use std::{
    cell::Cell,
    fmt,
    mem::{self, ManuallyDrop},
    sync::Arc,
};

use tokio::sync::{Notify, futures::OwnedNotified};
use tower_response_end::{End, Watch};

use crate::{
    Permit, SpawnLimit,
    sync::{AtomicBool, Ordering, contain},
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
    /// Whether there are limits in it: for those who only look.
    is_limited: Cell<bool>,
    level: Cell<Level>,
}

impl Here {
    const fn new() -> Self {
        Self {
            place: Cell::new(ManuallyDrop::new(Place::NOWHERE)),
            is_limited: Cell::new(false),
            level: Cell::new(Level::Free),
        }
    }

    #[inline]
    fn replace(&self, place: Place) -> Place {
        self.is_limited.set(place.layer.is_some() || !place.limits.is_empty());
        ManuallyDrop::into_inner(self.place.replace(ManuallyDrop::new(place)))
    }

    /// Exchanges the limits, which are made if they are yet to be.
    fn exchange(&self, change: impl FnOnce(&mut Limits)) {
        let Place { mut limits, layer } = self.replace(Place::NOWHERE);
        if let Some(limit) = layer {
            limits = limits.with(&limit);
        }
        change(&mut limits);
        self.replace(Place { limits, layer: None });
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
        let mut current = Self(None);
        HERE.with(|here| here.exchange(|limits| current = limits.clone()));
        current
    }

    /// Whether there is none.
    #[inline]
    pub const fn is_empty(&self) -> bool {
        self.0.is_none()
    }

    /// Makes these the current ones again.
    pub fn leave(mut self) {
        self.swap();
    }

    fn swap(&mut self) {
        HERE.with(|here| here.exchange(|limits| mem::swap(limits, self)));
    }

    /// Whether there are any in this place. Cheaper than to ask for the current ones.
    #[inline]
    pub fn are_here() -> bool {
        HERE.with(|here| here.is_limited.get())
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

    /// Takes a permit of each but this one, which the caller sees to; or none and says which is
    /// full. What is in hand counts; if it is for nothing here, it is given back.
    ///
    /// # Errors
    ///
    /// The one that is full. Nothing is counted as refused.
    pub fn try_take(
        &self,
        in_hand: &mut Option<Permit>,
        but: Option<&SpawnLimit>,
    ) -> Result<Permits, SpawnLimit> {
        let mut taken = Permits { limits: self.clone(), but: but.cloned(), count: 0 };
        for limit in self.each_but(but) {
            if let Some(permit) = in_hand.take_if(|permit| permit.is_of(limit)) {
                permit.forget();
            } else if !limit.try_take() {
                return Err(limit.clone());
            }
            taken.count += 1;
        }
        Ok(taken)
    }

    /// Until the request whose limits these are is over, if they are one's. Listens from now on.
    pub(crate) fn end(&self) -> OwnedNotified {
        self.0.as_ref().map(|scope| scope.end.clone()).unwrap_or_default().notified_owned()
    }

    /// Whether it is.
    pub(crate) fn has_ended(&self) -> bool {
        self.0.as_ref().is_some_and(|scope| scope.ended.load(Ordering::Acquire))
    }

    fn with(self, limit: &SpawnLimit) -> Self {
        let share = (limit.limit_per_request() < SpawnLimit::MAX).then(|| limit.share());
        let limit = (!self.contains(limit)).then(|| limit.clone());
        Self(Some(Arc::new(Scope {
            share,
            limit,
            outer: self,
            ended: AtomicBool::new(false),
            end: Arc::default(),
        })))
    }

    fn each_but(&self, but: Option<&SpawnLimit>) -> impl Iterator<Item = &SpawnLimit> {
        self.each().filter(move |limit| but.is_none_or(|but| !but.ptr_eq(limit)))
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
pub struct Permits {
    limits: Limits,
    /// Not of this one.
    but: Option<SpawnLimit>,
    /// So many of them, from the inside.
    count: usize,
}

impl Permits {
    /// Whether there is none.
    pub const fn is_empty(&self) -> bool {
        self.count == 0
    }

    /// Makes the limits current whose permits these are, and returns those that were. Whoever calls
    /// it [leaves](Limits::leave) them again.
    #[must_use = "those are to be the current ones again"]
    pub fn raise(&self) -> Limits {
        let mut limits = self.limits.clone();
        limits.swap();
        limits
    }

    /// Runs `f` where the limits are current whose permits these are.
    pub fn enter<R>(&self, f: impl FnOnce() -> R) -> R {
        struct Leave(Limits);
        impl Drop for Leave {
            fn drop(&mut self) {
                self.0.swap();
            }
        }
        let _leave = Leave(self.raise());
        f()
    }
}

impl Drop for Permits {
    fn drop(&mut self) {
        self.limits.each_but(self.but.as_ref()).take(self.count).for_each(SpawnLimit::release);
    }
}

/// The life of one response, as [`Watch`]ed by the layer that limits what it spawns.
#[derive(Debug)]
pub struct LimitScope(Place);

impl LimitScope {
    #[inline]
    pub(crate) fn new(limit: &SpawnLimit) -> Self {
        let limits = if Limits::are_here() { Limits::current() } else { Limits(None) };
        Self(Place { limits, layer: Some(limit.clone()) })
    }

    #[inline]
    fn swap(&mut self) {
        HERE.with(|here| self.0 = here.replace(mem::take(&mut self.0)));
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
            contain(|| scope.end.notify_waiters());
        }
    }
}
