#[cfg(not(loom))]
use std::sync::{Mutex, MutexGuard};
use std::{
    cell::Cell,
    fmt, mem,
    sync::{Arc, PoisonError},
};

#[cfg(loom)]
use loom::sync::{Mutex, MutexGuard};
use tower_catch_unwind::{Log, catch};

use crate::{End, Watch};

#[cfg(not(loom))]
thread_local! {
    static HERE: Cell<Scope> = const { Cell::new(Scope::Outside) };
}
#[cfg(loom)]
loom::thread_local! {
    static HERE: Cell<Scope> = Cell::new(Scope::Outside);
}

/// What is current while a hooked response's code runs.
#[derive(Debug, Default)]
enum Scope {
    #[default]
    Outside,
    /// The holds of this response, made when the first is taken.
    Inside(Option<Arc<Holds>>),
}

impl Scope {
    fn replace(self) -> Self {
        // Where a thread's locals are gone nobody can ask for a hold either.
        HERE.try_with(|here| here.replace(self)).unwrap_or_default()
    }
}

/// Keeps the response that is being served here, and those around it, from being over: see
/// [Upgrades](crate#upgrades).
///
/// `None` outside of a layer that can be held. A hold that is taken when the response is over
/// holds nothing. It holds no task set: tower-task-set's `TaskSet::hold` holds both.
pub fn hold() -> Option<Hold> {
    let Scope::Inside(holds) = Scope::Outside.replace() else {
        return None;
    };
    let holds = holds.unwrap_or_default();
    holds.lock().held += 1;
    Scope::Inside(Some(holds.clone())).replace();
    Some(Hold(holds))
}

/// Keeps a response from being over until it is dropped.
///
/// Leaking it leaves the response open for ever.
#[must_use = "it holds until it is dropped"]
pub struct Hold(Arc<Holds>);

impl Drop for Hold {
    fn drop(&mut self) {
        let mut state = self.0.lock();
        state.held -= 1;
        let last = state.held == 0;
        let (waiting, around) =
            if last { (state.waiting.take(), state.around.take()) } else { (None, None) };
        drop(state);
        if let Some(end) = waiting {
            end();
        }
        drop(around);
    }
}

impl fmt::Debug for Hold {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Hold").finish_non_exhaustive()
    }
}

/// The holds on one response.
#[derive(Default)]
struct Holds(Mutex<State>);

#[derive(Default)]
struct State {
    held: usize,
    /// The end, if it has come while held.
    waiting: Option<Box<dyn FnOnce() + Send>>,
    /// While held: who holds a response holds the one around it too.
    around: Option<Hold>,
}

impl Holds {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Called where the response around this one is current. Before that ends: it does not while
    /// code inside of it runs.
    fn hold_around(&self) {
        let mut state = self.lock();
        if state.held > 0 && state.around.is_none() {
            // Of two locks, always that of the inner response first.
            state.around = hold();
        }
    }
}

impl fmt::Debug for Holds {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Holds").finish_non_exhaustive()
    }
}

/// What a [`Hook`] calls. Closures `FnOnce(End)` are this.
pub trait OnEnd: Send + 'static {
    /// The response is over.
    fn on_end(self, end: End);
}

impl<F: FnOnce(End) + Send + 'static> OnEnd for F {
    fn on_end(self, end: End) {
        self(end);
    }
}

/// A [`Watch`] that calls a hook with the end, when nobody [holds](hold) the response any more.
pub struct Hook<H> {
    // Never locked: a hook need not be `Sync`, and a body with it must be if the inner one is.
    on_end: std::sync::Mutex<Option<H>>,
    // While inside, what is current around it.
    scope: Scope,
    // Of a layer whose hooks are the user's.
    log: Option<Arc<Log>>,
}

impl<H> Hook<H> {
    /// Calls `hook`. If that panics, the panic is contained, and seen by the panic hook alone.
    pub const fn new(hook: H) -> Self {
        Self { on_end: std::sync::Mutex::new(Some(hook)), scope: Scope::Inside(None), log: None }
    }

    /// Calls what `make` makes, unless that panics. Panics are told to `log`.
    pub(crate) fn made(log: &Arc<Log>, make: impl FnOnce() -> H) -> Self {
        let on_end = std::sync::Mutex::new(log.call("make_on_end", make));
        Self { on_end, scope: Scope::Inside(None), log: Some(log.clone()) }
    }

    /// The hook, until the end.
    pub fn get_mut(&mut self) -> Option<&mut H> {
        self.on_end.get_mut().unwrap_or_else(PoisonError::into_inner).as_mut()
    }
}

impl<H> fmt::Debug for Hook<H> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Hook").finish_non_exhaustive()
    }
}

impl<H: OnEnd> Watch for Hook<H> {
    fn enter(&mut self) {
        self.scope = mem::take(&mut self.scope).replace();
    }

    fn leave(&mut self) {
        self.scope = mem::take(&mut self.scope).replace();
        if let Scope::Inside(Some(holds)) = &self.scope {
            holds.hold_around();
        }
    }

    fn end(&mut self, end: End) {
        let hook = self.on_end.get_mut().unwrap_or_else(PoisonError::into_inner);
        let Some(hook) = hook.take() else { return };
        let log = self.log.take();
        let tell = move || {
            if let (Err(panic), Some(log)) = (catch(|| hook.on_end(end)), log) {
                log.tell_callback(panic, "on_end");
            }
        };
        match &self.scope {
            Scope::Inside(Some(holds)) => {
                let mut state = holds.lock();
                if state.held > 0 {
                    state.waiting = Some(Box::new(tell));
                } else {
                    drop(state);
                    tell();
                }
            }
            _ => tell(),
        }
    }
}

#[cfg(all(test, loom))]
mod loom_tests {
    use std::{collections::HashSet, sync::Mutex};

    use loom::thread::{self, JoinHandle};

    use super::*;

    /// Whose thread called a hook.
    #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
    enum Teller {
        /// That which found the end.
        End,
        /// Any that dropped a hold.
        Drop,
    }

    type Told = Arc<Mutex<Vec<Teller>>>;

    /// A hook, and what it was told.
    fn hook() -> (Hook<impl FnOnce(End) + Send + 'static>, Told) {
        let told = Told::default();
        let (here, tell) = (thread::current().id(), told.clone());
        let hook = Hook::new(move |_| {
            let teller = if thread::current().id() == here { Teller::End } else { Teller::Drop };
            tell.lock().unwrap().push(teller);
        });
        (hook, told)
    }

    #[track_caller]
    fn once(told: &Told) -> Teller {
        let told = told.lock().unwrap();
        assert_eq!(told.len(), 1);
        told[0]
    }

    fn within<R>(watch: &mut impl Watch, f: impl FnOnce() -> R) -> R {
        watch.enter();
        let result = f();
        watch.leave();
        result
    }

    fn drop_elsewhere(held: Option<Hold>) -> JoinHandle<()> {
        thread::spawn(move || drop(held.unwrap()))
    }

    /// Runs a model, and asserts that it ends in each of these ways and in no other.
    fn reaches<T>(expected: &[T], model: impl Fn() -> T + Send + Sync + 'static)
    where
        T: Clone + fmt::Debug + Eq + std::hash::Hash + Send + 'static,
    {
        let reached = Arc::new(Mutex::new(HashSet::new()));
        let reach = reached.clone();
        loom::model(move || {
            let outcome = model();
            reach.lock().unwrap().insert(outcome);
        });
        assert_eq!(*reached.lock().unwrap(), expected.iter().cloned().collect());
    }

    #[test]
    fn the_end_races_the_last_hold_and_is_told_once() {
        reaches(&[[Teller::End], [Teller::Drop]], || {
            let (mut hook, told) = hook();
            let other = drop_elsewhere(within(&mut hook, hold));
            hook.end(End::Completed);
            other.join().unwrap();
            [once(&told)]
        });
    }

    #[test]
    fn two_holds_race_to_be_the_last_and_the_end_is_told_once() {
        reaches(&[[Teller::End], [Teller::Drop]], || {
            let (mut hook, told) = hook();
            let here = within(&mut hook, hold);
            let other = drop_elsewhere(within(&mut hook, hold));
            hook.end(End::Completed);
            drop(here);
            other.join().unwrap();
            [once(&told)]
        });
    }

    #[test]
    fn a_hold_that_is_dropped_while_it_comes_to_hold_what_is_around_leaves_nothing_held() {
        use Teller::{Drop, End as Found};
        reaches(&[[Found, Found], [Found, Drop], [Drop, Found], [Drop, Drop]], || {
            let (mut outer, outer_told) = hook();
            let (mut inner, inner_told) = hook();
            let other = within(&mut outer, || {
                let other = within(&mut inner, || drop_elsewhere(hold()));
                inner.end(End::Completed);
                other
            });
            outer.end(End::Completed);
            other.join().unwrap();
            [once(&inner_told), once(&outer_told)]
        });
    }
}
