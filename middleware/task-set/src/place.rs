use std::{cell::Cell, sync::Arc};

use tower_request_context::RequestContext;
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
struct Here {
    set: Cell<Option<Arc<Set>>>,
    /// Which task of the set this is.
    slot: Cell<u32>,
    /// What to make the set with if there is none yet.
    layer: Cell<Option<Arc<Config>>>,
}

/// No task: the response's own code.
const NO_SLOT: u32 = u32::MAX;

impl Here {
    const fn new() -> Self {
        Self { set: Cell::new(None), slot: Cell::new(NO_SLOT), layer: Cell::new(None) }
    }

    fn look<R>(&self, f: impl FnOnce(&Option<Arc<Set>>) -> R) -> R {
        // No code of others runs meanwhile, so nobody can find it empty.
        let set = self.set.take();
        let result = f(&set);
        self.set.set(set);
        result
    }
}

/// The set that is current, made now if it is the first time that one is asked for.
pub(crate) fn current() -> Option<Arc<Set>> {
    HERE.try_with(|here| {
        if let Some(set) = here.look(Clone::clone) {
            return Some(set);
        }
        let layer = here.layer.take()?;
        here.layer.set(Some(layer.clone()));
        // May be the code of others, who may ask for the set too.
        let context = RequestContext::current();
        if let Some(set) = here.look(Clone::clone) {
            return Some(set);
        }
        let set = Set::new(layer, context);
        here.set.set(Some(set.clone()));
        Some(set)
    })
    .ok()
    .flatten()
}

/// Whether `set` is the current one.
pub(crate) fn is_current(set: &Arc<Set>) -> bool {
    HERE.try_with(|here| here.look(|here| here.as_ref().is_some_and(|here| Arc::ptr_eq(here, set))))
        .unwrap_or(false)
}

/// Which task of `set` runs here, if one does.
pub(crate) fn slot_in(set: &Arc<Set>) -> Option<u32> {
    let slot = HERE.try_with(|here| here.slot.get()).unwrap_or(NO_SLOT);
    (slot != NO_SLOT && is_current(set)).then_some(slot)
}

/// A task moves its set and slot in, and what was there out. Done twice, all is as before.
#[inline]
pub(crate) fn swap_task(set: &mut Option<Arc<Set>>, slot: &mut u32) {
    // In a thread that is ending nothing is current, and nothing can ask for it.
    let _ = HERE.try_with(|here| {
        *set = here.set.replace(set.take());
        *slot = here.slot.replace(*slot);
    });
}

/// The life of one response, as [`Watch`]ed by the task-set layer.
#[derive(Debug)]
pub struct ResponseScope {
    set: Option<Arc<Set>>,
    slot: u32,
    layer: Option<Arc<Config>>,
    /// A layer of the same registry is outside: the set is its.
    nested: bool,
}

impl ResponseScope {
    pub(crate) fn new(layer: &Arc<Config>) -> Self {
        let nested = is_owned_by(&layer.owner);
        if nested && !layer.layer.is_empty() {
            if let Some(set) = current() {
                set.add_policy(&layer.layer);
            }
        }
        let layer = (!nested).then(|| layer.clone());
        Self { set: None, slot: NO_SLOT, layer, nested }
    }

    /// The set, now.
    pub(crate) fn set(&mut self) -> Option<Arc<Set>> {
        self.enter(current)
    }

    fn swap(&mut self) {
        let _ = HERE.try_with(|here| {
            self.set = here.set.replace(self.set.take());
            self.slot = here.slot.replace(self.slot);
            self.layer = here.layer.replace(self.layer.take());
        });
    }
}

/// Whether the current set is, or would be, of this registry.
fn is_owned_by(owner: &Arc<Owner>) -> bool {
    HERE.try_with(|here| {
        here.look(|set| match set {
            Some(set) => Arc::ptr_eq(set.owner(), owner),
            None => {
                let layer = here.layer.take();
                let owned = layer.as_ref().is_some_and(|layer| Arc::ptr_eq(&layer.owner, owner));
                here.layer.set(layer);
                owned
            }
        })
    })
    .unwrap_or(false)
}

impl Watch for ResponseScope {
    fn enter<R>(&mut self, f: impl FnOnce() -> R) -> R {
        struct Leave<'a>(&'a mut ResponseScope);
        impl Drop for Leave<'_> {
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

    fn end(&mut self, end: End) {
        // From now on no set can be made any more.
        self.layer = None;
        if let Some(set) = self.set.as_ref() {
            set.end(end);
        }
    }
}
