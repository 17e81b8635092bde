use std::{cell::Cell, mem::ManuallyDrop, sync::Arc};

use tower_request_context::{RequestContext, Scope};
use tower_response_end::{End, Watch};

use crate::{
    registry::{Config, Owner},
    set::Set,
};

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
struct Here {
    set: Cell<Option<ManuallyDrop<Arc<Set>>>>,
    /// What to make the set with if there is none yet.
    layer: Cell<Option<ManuallyDrop<Arc<Config>>>>,
    /// Which task of the set this is, if it is one.
    slot: Cell<u32>,
}

/// No task: the response's own code.
const NO_SLOT: u32 = u32::MAX;

impl Here {
    const fn new() -> Self {
        Self { set: Cell::new(None), layer: Cell::new(None), slot: Cell::new(NO_SLOT) }
    }

    #[inline]
    fn replace_set(&self, set: Option<Arc<Set>>) -> Option<Arc<Set>> {
        self.set.replace(set.map(ManuallyDrop::new)).map(ManuallyDrop::into_inner)
    }

    #[inline]
    fn replace_layer(&self, layer: Option<Arc<Config>>) -> Option<Arc<Config>> {
        self.layer.replace(layer.map(ManuallyDrop::new)).map(ManuallyDrop::into_inner)
    }

    /// No code of others may run in `f`: it would find no set.
    #[inline]
    fn look<R>(&self, f: impl FnOnce(&mut Option<Arc<Set>>) -> R) -> R {
        let mut set = self.replace_set(None);
        let result = f(&mut set);
        self.replace_set(set);
        result
    }

    fn layer(&self) -> Option<Arc<Config>> {
        let layer = self.replace_layer(None);
        self.replace_layer(layer.clone());
        layer
    }
}

/// The set that is current, made now if it is the first time that one is asked for.
pub(crate) fn current() -> Option<Arc<Set>> {
    HERE.with(|here| {
        if let Some(set) = here.look(|set| set.clone()) {
            return Some(set);
        }
        let layer = here.layer()?;
        // May be the code of others, who may ask for the set too.
        let context = RequestContext::current();
        Some(here.look(|set| set.get_or_insert_with(|| Set::new(layer, context)).clone()))
    })
}

/// Whether `set` is the current one.
#[inline]
pub(crate) fn is_current(set: &Arc<Set>) -> bool {
    HERE.with(|here| here.look(|here| here.as_ref().is_some_and(|here| Arc::ptr_eq(here, set))))
}

/// Whether no set is current.
#[inline]
pub(crate) fn is_nowhere() -> bool {
    HERE.with(|here| here.look(|set| set.is_none()))
}

/// Which task of `set` runs here, if one does.
pub(crate) fn slot_in(set: &Arc<Set>) -> Option<u32> {
    let slot = HERE.with(|here| here.slot.get());
    (slot != NO_SLOT && is_current(set)).then_some(slot)
}

/// The task that runs here, if one does.
pub(crate) fn current_task() -> Option<(Arc<Set>, u32)> {
    HERE.with(|here| {
        let slot = here.slot.get();
        let set = if slot == NO_SLOT { None } else { here.look(|set| set.clone()) };
        set.map(|set| (set, slot))
    })
}

/// What was current before a task's code ran.
pub(crate) struct Outside {
    set: Option<Arc<Set>>,
    slot: u32,
}

impl Outside {
    /// Moves a task in.
    #[inline]
    pub(crate) fn enter(set: Option<Arc<Set>>, slot: u32) -> Self {
        HERE.with(|here| Self { set: here.replace_set(set), slot: here.slot.replace(slot) })
    }

    /// Moves it out.
    #[inline]
    pub(crate) fn leave(self) -> Option<Arc<Set>> {
        HERE.with(|here| {
            here.slot.set(self.slot);
            here.replace_set(self.set)
        })
    }

    /// That nothing was: what a task that is dropped by its runtime finds.
    pub(crate) const fn nowhere() -> Self {
        Self { set: None, slot: NO_SLOT }
    }

    pub(crate) const fn is_nowhere(&self) -> bool {
        self.set.is_none()
    }
}

/// The life of one response, as [`Watch`]ed by the task-set layer.
#[derive(Debug)]
pub struct ResponseScope {
    set: Option<Arc<Set>>,
    layer: Option<Arc<Config>>,
    slot: u32,
    /// A layer of the same registry is outside: the set is its.
    nested: bool,
}

impl ResponseScope {
    #[inline]
    pub(crate) fn new(layer: &Arc<Config>) -> Self {
        if HERE.with(|here| here.slot.get()) != NO_SLOT {
            settle();
        }
        let nested = is_owned_by(&layer.owner);
        if nested && !layer.layer.is_empty() {
            if let Some(set) = current() {
                set.add_policy(&layer.layer);
            }
        }
        let layer = (!nested).then(|| layer.clone());
        Self { set: None, layer, slot: NO_SLOT, nested }
    }

    /// The set, now.
    pub(crate) fn set(&mut self) -> Option<Arc<Set>> {
        self.enter(current)
    }

    #[inline]
    fn swap(&mut self) {
        HERE.with(|here| {
            self.set = here.replace_set(self.set.take());
            self.layer = here.replace_layer(self.layer.take());
            self.slot = here.slot.replace(self.slot);
        });
    }
}

/// A task calls a service: while that is current, the task is not to be found.
#[cold]
#[inline(never)]
fn settle() {
    Scope::settle();
}

/// Whether the current set is, or would be, of this registry.
#[inline]
fn is_owned_by(owner: &Arc<Owner>) -> bool {
    HERE.with(|here| {
        let set = here.look(|set| set.as_ref().map(|set| Arc::ptr_eq(set.owner(), owner)));
        set.unwrap_or_else(|| {
            let layer = here.replace_layer(None);
            let is_owned = layer.as_ref().is_some_and(|layer| Arc::ptr_eq(&layer.owner, owner));
            here.replace_layer(layer);
            is_owned
        })
    })
}

impl Watch for ResponseScope {
    #[inline]
    fn enter<R>(&mut self, f: impl FnOnce() -> R) -> R {
        struct Leave<'a>(&'a mut ResponseScope);
        impl Drop for Leave<'_> {
            #[inline]
            fn drop(&mut self) {
                self.0.swap();
            }
        }
        if self.nested {
            return f();
        }
        self.swap();
        let _leave = Leave(self);
        f()
    }

    // At once, so that the tasks are told before they see the drop: a task that feeds the body would
    // else find its channel closed, and end as if it were done. And what is spawned by a destructor
    // comes too late, as it does when the body has come to its end.
    fn before_drop(&mut self, end: End) {
        self.end(end);
    }

    fn end(&mut self, end: End) {
        // From now on no set can be made any more.
        self.layer = None;
        if let Some(set) = &self.set {
            set.end(end);
        }
    }
}
