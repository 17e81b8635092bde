use std::{
    cell::Cell,
    mem::{self, ManuallyDrop},
    sync::Arc,
    task::{Context, Poll},
};

use tokio::time::Instant;
use tower_request_context::{RequestContext, Scope};
use tower_response_end::{End, Stop, Stopped, Watch};

use crate::{deadline::Deadline, registry::Config, set::Set};

thread_local! {
    /// When the response that is served here has to be over.
    static UNTIL: Cell<Option<Instant>> = const { Cell::new(None) };
}

#[cfg(not(loom))]
thread_local! {
    static HERE: Here = const { Here::new() };
}
#[cfg(loom)]
loom::thread_local! {
    static HERE: Here = Here::new();
}

/// What is current on this thread.
///
/// Whoever runs a request's code, its response or one of its tasks, *moves* its set in before and
/// out after: no reference is counted and nothing is allocated. The set of a request is made when
/// something in it first asks, and the response then finds it in its hands.
///
/// As everything is moved out again, nothing is dropped with the thread: a thread-local without a
/// destructor needs no look at its state.
struct Here(Cell<ManuallyDrop<Current>>);

#[derive(Debug, Default)]
enum Current {
    #[default]
    Nothing,
    /// A request that has not asked for its set yet: what to make it with.
    Unasked(Arc<Config>),
    /// A set, and which of its tasks this is, if it is one.
    Set(Arc<Set>, u32),
}

impl Current {
    /// The set, if it has been made.
    fn set(&self) -> Option<Arc<Set>> {
        match self {
            Self::Set(set, _) => Some(set.clone()),
            Self::Unasked(_) | Self::Nothing => None,
        }
    }
}

/// No task: the response's own code.
const NO_SLOT: u32 = u32::MAX;
/// The same, and the response is over: what makes it fail from now on comes too late.
const OVER: u32 = u32::MAX - 1;
/// The same, and the set was made by it just now. Below are the tasks.
pub(crate) const JUST_MADE: u32 = u32::MAX - 2;

impl Here {
    const fn new() -> Self {
        Self(Cell::new(ManuallyDrop::new(Current::Nothing)))
    }

    /// Exchanges it with what is current.
    #[inline]
    fn swap(&self, other: &mut Current) {
        let inside = ManuallyDrop::new(mem::take(other));
        let outside = ManuallyDrop::into_inner(self.0.replace(inside));
        // It is nothing by now, which the compiler does not see.
        mem::forget(mem::replace(other, outside));
    }

    #[inline]
    fn take(&self) -> Current {
        ManuallyDrop::into_inner(self.0.replace(ManuallyDrop::new(Current::Nothing)))
    }

    /// Where it was [taken](Self::take).
    #[inline]
    fn put(&self, current: Current) {
        let nothing = self.0.replace(ManuallyDrop::new(current));
        debug_assert!(matches!(*nothing, Current::Nothing));
    }

    /// No code of others may run in `f`: it would find nothing.
    #[inline]
    fn look<R>(&self, f: impl FnOnce(&mut Current) -> R) -> R {
        let mut current = Current::Nothing;
        self.swap(&mut current);
        let result = f(&mut current);
        self.swap(&mut current);
        mem::forget(current);
        result
    }
}

/// The set that is current, made now if it is the first time that one is asked for.
pub(crate) fn current() -> Option<Arc<Set>> {
    let made = HERE.with(|here| {
        here.look(|current| match current {
            Current::Set(set, _) => Some(Some(set.clone())),
            Current::Unasked(_) => None,
            Current::Nothing => Some(None),
        })
    });
    made.unwrap_or_else(make)
}

/// The set of the request that has not asked for one yet.
#[inline(never)]
fn make() -> Option<Arc<Set>> {
    // May be the code of others, who may ask for the set too.
    // Mostly there is none, and that is seen for less.
    let context =
        if Scope::is_nowhere() { RequestContext::new() } else { RequestContext::current() };
    let set = HERE.with(|here| match here.take() {
        Current::Unasked(layer) => {
            let set = Set::new(&layer, context);
            here.put(Current::Set(set.clone(), JUST_MADE));
            Some(set)
        }
        made => {
            let set = made.set();
            here.put(made);
            set
        }
    })?;
    if let Some(at) = UNTIL.with(Cell::get) {
        set.expect_limit(at);
    }
    Some(set)
}

/// Which task of `set` runs here, or that it is not one; `None` if the set is not current.
#[inline]
pub(crate) fn slot_of(set: &Arc<Set>) -> Option<u32> {
    HERE.with(|here| {
        here.look(|current| match current {
            Current::Set(here, slot) if Arc::ptr_eq(here, set) => Some(*slot),
            _ => None,
        })
    })
}

/// When the response that is served here has to be over, if it is one of `set`.
pub(crate) fn limit(set: &Arc<Set>) -> Option<Instant> {
    UNTIL.with(Cell::get).filter(|_| slot_of(set).is_some())
}

/// Whether nothing is current.
#[inline]
pub(crate) fn is_nowhere() -> bool {
    HERE.with(|here| here.look(|current| matches!(current, Current::Nothing)))
}

/// Which task of `set` runs here, if one does.
pub(crate) fn slot_in(set: &Arc<Set>) -> Option<u32> {
    slot_of(set).filter(|slot| *slot < JUST_MADE)
}

/// The task that runs here, if one does.
pub(crate) fn current_task() -> Option<(Arc<Set>, u32)> {
    HERE.with(|here| {
        here.look(|current| match current {
            Current::Set(set, slot) if *slot < JUST_MADE => Some((set.clone(), *slot)),
            _ => None,
        })
    })
}

/// What is current while a task's code runs; then, what was before.
pub(crate) struct InTask(Current);

impl InTask {
    /// Moves a task in.
    #[inline]
    pub(crate) fn enter(set: Option<Arc<Set>>, slot: u32) -> Self {
        let mut task = set.map_or(Current::Nothing, |set| Current::Set(set, slot));
        HERE.with(|here| here.swap(&mut task));
        Self(task)
    }

    /// Moves it out.
    #[inline]
    pub(crate) fn leave(mut self) -> Option<Arc<Set>> {
        HERE.with(|here| here.swap(&mut self.0));
        match self.0 {
            Current::Set(set, _) => Some(set),
            _ => None,
        }
    }

    /// Leaves it in, where nothing was before, to be [taken](Self::take) out.
    #[inline]
    pub(crate) fn stay(self) {
        mem::forget(self);
    }

    /// Moves out the task that [stayed](Self::stay) in.
    #[inline]
    pub(crate) fn take() -> Option<Arc<Set>> {
        HERE.with(|here| match here.take() {
            Current::Set(set, _) => Some(set),
            _ => None,
        })
    }

    pub(crate) const fn is_from_nowhere(&self) -> bool {
        matches!(self.0, Current::Nothing)
    }
}

/// The life of one response, as [`Watch`]ed by the task-set layer.
#[derive(Debug)]
pub struct ResponseScope(Response);

/// Two words and one distinction, for it is moved about and looked at often: what one has to be
/// asked about a deadline, the most need not be, for they have none.
#[derive(Debug)]
enum Response {
    /// The set is its own, and there is no deadline.
    Own(Own),
    /// There is a deadline. `None`: there is not, but a layer of the same registry is outside, and
    /// the set is its.
    Other(Option<Box<Timed>>),
}

#[derive(Debug)]
struct Timed {
    /// Dropped first, for it may have the set too.
    deadline: Deadline,
    /// `None`: nested.
    own: Option<Own>,
}

/// A response's own set, or what to make it with.
#[derive(Debug)]
struct Own(Current);

impl ResponseScope {
    #[inline]
    pub(crate) fn new(layer: &Arc<Config>) -> Self {
        if is_nowhere() {
            return Self(Response::Own(Own(Current::Unasked(layer.clone()))));
        }
        Self::new_within(layer)
    }

    #[inline(never)]
    fn new_within(layer: &Arc<Config>) -> Self {
        let (nested, in_task) = HERE.with(|here| {
            here.look(|current| match current {
                // The tasks in a set of the registry's own are strangers: a call has no part in it.
                Current::Set(set, slot) => {
                    let nested = !set.is_own() && Arc::ptr_eq(set.owner(), &layer.owner);
                    (nested, *slot < JUST_MADE)
                }
                Current::Unasked(around) => (Arc::ptr_eq(&around.owner, &layer.owner), false),
                Current::Nothing => (false, false),
            })
        });
        if in_task {
            settle();
        }
        if nested && !layer.layer.is_empty() {
            if let Some(set) = current() {
                set.add_policy(&layer.layer);
            }
        }
        if nested {
            Self(Response::Other(None))
        } else {
            Self(Response::Own(Own(Current::Unasked(layer.clone()))))
        }
    }

    #[inline(never)]
    pub(crate) fn until(layer: &Arc<Config>, deadline: Option<Deadline>) -> Self {
        let scope = Self::new(layer);
        let Some(mut deadline) = deadline else { return scope };
        let own = match scope.0 {
            Response::Own(own) => Some(own),
            Response::Other(_) => {
                deadline.tell(made);
                None
            }
        };
        Self(Response::Other(Some(Box::new(Timed { deadline, own }))))
    }

    /// The set, now.
    pub(crate) fn set(&mut self) -> Option<Arc<Set>> {
        // Values may be the code of others, and panic.
        struct Leave<'a>(&'a mut ResponseScope);
        impl Drop for Leave<'_> {
            fn drop(&mut self) {
                self.0.leave();
            }
        }
        self.enter();
        let _leave = Leave(self);
        current()
    }
}

/// A task calls a service: while that is current, the task is not to be found.
#[cold]
#[inline(never)]
fn settle() {
    Scope::settle();
}

/// The set that is current, if it has been made.
#[cold]
fn made() -> Option<Arc<Set>> {
    HERE.with(|here| here.look(|current| current.set()))
}

impl Watch for ResponseScope {
    #[inline]
    fn enter(&mut self) {
        match &mut self.0 {
            Response::Own(own) => own.enter(),
            Response::Other(None) => {}
            Response::Other(Some(timed)) => timed.enter(),
        }
    }

    #[inline]
    fn leave(&mut self) {
        match &mut self.0 {
            Response::Own(own) => own.leave(),
            Response::Other(None) => {}
            Response::Other(Some(timed)) => timed.leave(),
        }
    }

    // At once, so that the tasks are told before they see the drop: a task that feeds the body would
    // else find its channel closed, and end as if it were done. And what is spawned by a destructor
    // comes too late, as it does when the body has come to its end.
    fn before_drop(&mut self, end: End) {
        self.end(end);
    }

    #[inline]
    fn end(&mut self, end: End) {
        match &mut self.0 {
            Response::Own(own) => own.end(end),
            Response::Other(None) => {}
            Response::Other(Some(timed)) => {
                if let Some(own) = &mut timed.own {
                    own.end(end);
                } else {
                    // The set is that of a layer outside, whose response this is too, or a part of.
                    timed.deadline.end(end);
                    self.0 = Response::Other(None);
                }
            }
        }
    }
}

impl Stop for ResponseScope {
    #[inline]
    fn poll_stop(&mut self, cx: &mut Context<'_>) -> Poll<Stopped> {
        match &mut self.0 {
            Response::Own(own) => own.poll_stop(cx),
            Response::Other(None) => Poll::Pending,
            Response::Other(Some(timed)) => timed.poll_stop(cx),
        }
    }

    #[inline]
    fn poll_end(&mut self, cx: &mut Context<'_>) -> Poll<Option<Stopped>> {
        match &mut self.0 {
            Response::Own(own) => own.poll_end(cx),
            Response::Other(None) => Poll::Ready(None),
            Response::Other(Some(timed)) => timed.poll_end(cx),
        }
    }

    #[inline]
    fn may_end(&self) -> bool {
        match &self.0 {
            Response::Own(own) => own.may_end(),
            Response::Other(None) => true,
            Response::Other(Some(timed)) => timed.may_end(),
        }
    }
}

impl Timed {
    #[inline(never)]
    fn enter(&mut self) {
        if let Some(own) = &mut self.own {
            own.enter();
        }
        UNTIL.with(|until| until.set(Some(self.deadline.enter(until.get()))));
    }

    #[inline(never)]
    fn leave(&mut self) {
        UNTIL.with(|until| until.set(self.deadline.leave()));
        self.deadline.tell(made);
        if let Some(own) = &mut self.own {
            own.leave();
        }
    }

    #[inline(never)]
    fn poll_stop(&mut self, cx: &mut Context<'_>) -> Poll<Stopped> {
        if self.deadline.poll(cx).is_ready() {
            return Poll::Ready(Stopped::TimedOut);
        }
        self.own.as_ref().map_or(Poll::Pending, |own| own.poll_stop(cx))
    }

    // Tasks were told, and what waits for them may be ready before the timer is seen.
    #[inline(never)]
    fn poll_end(&mut self, cx: &mut Context<'_>) -> Poll<Option<Stopped>> {
        if self.deadline.is_over() {
            return Poll::Ready(Some(Stopped::TimedOut));
        }
        let end = self.own.as_ref().map_or(Poll::Ready(None), |own| own.poll_end(cx));
        if end.is_pending() && self.deadline.poll(cx).is_ready() {
            return Poll::Ready(Some(Stopped::TimedOut));
        }
        end
    }

    #[inline(never)]
    fn may_end(&self) -> bool {
        !self.deadline.is_over() && self.own.as_ref().is_none_or(Own::may_end)
    }
}

impl Own {
    #[inline(never)]
    fn release(&mut self) {
        if let Current::Set(set, _) = mem::take(&mut self.0) {
            set.release();
        }
    }

    #[inline]
    fn enter(&mut self) {
        // In a task that is not the one it was made in, perhaps.
        Scope::settle();
        HERE.with(|here| here.swap(&mut self.0));
    }

    #[inline]
    fn leave(&mut self) {
        HERE.with(|here| here.swap(&mut self.0));
        if let Current::Set(_, slot @ JUST_MADE) = &mut self.0 {
            *slot = NO_SLOT;
        }
    }

    #[inline]
    fn end(&mut self, end: End) {
        if let Current::Set(set, slot) = &mut self.0 {
            *slot = OVER;
            set.end(end);
        } else {
            // From now on no set can be made any more.
            self.0 = Current::Nothing;
        }
    }

    #[inline]
    fn poll_stop(&self, cx: &mut Context<'_>) -> Poll<Stopped> {
        match &self.0 {
            Current::Set(set, slot) if *slot != OVER => set.poll_failed(cx).map(Stopped::Panicked),
            _ => Poll::Pending,
        }
    }

    /// The set, if a panic of a task may be why the response does not end as it would.
    #[inline]
    fn may_fail(&self) -> Option<&Arc<Set>> {
        match &self.0 {
            Current::Set(set, slot) if *slot != OVER && set.may_fail() => Some(set),
            _ => None,
        }
    }

    #[inline]
    fn poll_end(&self, cx: &Context<'_>) -> Poll<Option<Stopped>> {
        match self.may_fail() {
            Some(set) => set.poll_verdict(cx).map(|failed| failed.map(Stopped::Panicked)),
            None => Poll::Ready(None),
        }
    }

    #[inline]
    fn may_end(&self) -> bool {
        self.may_fail().is_none_or(|set| set.may_end())
    }
}

impl Drop for Own {
    #[inline]
    fn drop(&mut self) {
        if let Current::Set(..) = self.0 {
            self.release();
        }
    }
}
