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
    let context = RequestContext::current();
    let set = HERE.with(|here| {
        here.look(|current| {
            *current = match mem::take(current) {
                Current::Unasked(layer) => Current::Set(Set::new(layer, context), JUST_MADE),
                made => made,
            };
            match current {
                Current::Set(set, _) => Some(set.clone()),
                Current::Unasked(_) | Current::Nothing => None,
            }
        })
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
        let nothing = ManuallyDrop::new(Current::Nothing);
        HERE.with(|here| match ManuallyDrop::into_inner(here.0.replace(nothing)) {
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
pub struct ResponseScope {
    /// `None` if a layer of the same registry is outside: the set is its.
    own: Option<Current>,
    // Boxed, for most have none, and all are moved about.
    deadline: Option<Box<Deadline>>,
}

impl ResponseScope {
    #[inline]
    pub(crate) fn new(layer: &Arc<Config>, deadline: Option<Box<Deadline>>) -> Self {
        if is_nowhere() {
            return Self { own: Some(Current::Unasked(layer.clone())), deadline };
        }
        Self::new_within(layer, deadline)
    }

    #[inline(never)]
    fn new_within(layer: &Arc<Config>, mut deadline: Option<Box<Deadline>>) -> Self {
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
        if let Some(deadline) = deadline.as_mut().filter(|_| nested) {
            deadline.tell(made);
        }
        Self { own: (!nested).then(|| Current::Unasked(layer.clone())), deadline }
    }

    #[inline(never)]
    fn release(&mut self) {
        // It may have the set too.
        self.deadline = None;
        if let Some(Current::Set(set, _)) = self.own.take() {
            set.release();
        }
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

impl Drop for ResponseScope {
    #[inline]
    fn drop(&mut self) {
        if let Some(Current::Set(..)) = self.own {
            self.release();
        }
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
    HERE.with(|here| {
        here.look(|current| match current {
            Current::Set(set, _) => Some(set.clone()),
            Current::Unasked(_) | Current::Nothing => None,
        })
    })
}

impl Watch for ResponseScope {
    #[inline]
    fn enter(&mut self) {
        if let Some(own) = &mut self.own {
            // In a task that is not the one it was made in, perhaps.
            Scope::settle();
            HERE.with(|here| here.swap(own));
        }
        if let Some(deadline) = &mut self.deadline {
            UNTIL.with(|until| until.set(Some(deadline.enter(until.get()))));
        }
    }

    #[inline]
    fn leave(&mut self) {
        if let Some(deadline) = &mut self.deadline {
            UNTIL.with(|until| until.set(deadline.leave()));
            deadline.tell(made);
        }
        let Some(own) = &mut self.own else { return };
        HERE.with(|here| here.swap(own));
        if let Current::Set(_, slot @ JUST_MADE) = own {
            *slot = NO_SLOT;
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
        match &mut self.own {
            Some(Current::Set(set, slot)) => {
                *slot = OVER;
                set.end(end);
            }
            // From now on no set can be made any more.
            Some(own) => *own = Current::Nothing,
            // The set is that of a layer outside, whose response this is too, or a part of.
            None => {
                if let Some(deadline) = self.deadline.take() {
                    deadline.end(end);
                }
            }
        }
    }
}

impl Stop for ResponseScope {
    #[inline]
    fn poll_stop(&mut self, cx: &mut Context<'_>) -> Poll<Stopped> {
        if let Some(deadline) = &mut self.deadline {
            if deadline.poll(cx).is_ready() {
                return Poll::Ready(Stopped::TimedOut);
            }
        }
        match &self.own {
            Some(Current::Set(set, slot)) if *slot != OVER || set.has_failed() => {
                set.poll_failed(cx).map(Stopped::Panicked)
            }
            _ => Poll::Pending,
        }
    }
}
