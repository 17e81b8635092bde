use tower_catch_unwind::catch;
use tower_request_context::{RequestContext, Scope, Task, TraceId};
use tower_spawn_limit::{Level, Limits, Permits, SpawnLimit};
use tracing::Span;

use super::{Set, members::Inner};
use crate::{AtEnd, lifetime::Policy, place, task_set::Plan};

/// Where a task runs, besides in its set, if that is not just the set's context.
#[derive(Default)]
pub(crate) struct Home {
    scope: Scope,
    span: Option<Span>,
    /// Of the limits over the place where it was spawned; which are over what it spawns, too.
    pub(super) permits: Permits,
    /// Known without asking the scope: that may be current elsewhere.
    pub(super) trace_id: Option<TraceId>,
}

impl Home {
    fn enter_span(&self) {
        if let Some(span) = &self.span {
            // A subscriber is the code of others.
            drop(catch(|| span.with_subscriber(|(id, subscriber)| subscriber.enter(id))));
        }
    }

    fn leave_span(&self) {
        if let Some(span) = &self.span {
            drop(catch(|| span.with_subscriber(|(id, subscriber)| subscriber.exit(id))));
        }
    }
}

/// What a task that runs has left: what was current before, and what belongs to its home.
pub(crate) struct Away {
    scope: Scope,
    limits: Option<Limits>,
    home: Option<Box<Home>>,
}

impl Away {
    fn enter(&mut self) {
        self.scope.swap();
        if let Some(home) = &self.home {
            home.enter_span();
            if !home.permits.is_empty() {
                Level::Task.raise();
                self.limits = Some(home.permits.raise());
            }
        }
    }
}

impl Set {
    /// The context and the span of a new task, if they are not just the set's context or what is
    /// inherited from it when somebody asks.
    #[inline]
    pub(super) fn new_home(&self, plan: &Plan<'_>) -> Option<Box<Home>> {
        if let Some((set, _)) = place::current_task() {
            // What that was lent is its own.
            if !set.context.ptr_eq(&self.context) {
                Scope::settle();
            }
        }
        let elsewhere = Scope::other_than(&self.context);
        if elsewhere.is_none() && !self.context.inherits() {
            return None;
        }
        self.new_home_in(elsewhere, plan)
    }

    pub(super) fn wants_spans(&self) -> bool {
        // The code of whoever made the values.
        self.context.inherits()
            && self.call("wants_span", || self.context.wants_span()).unwrap_or(false)
    }

    #[inline(never)]
    fn new_home_in(&self, elsewhere: Option<RequestContext>, plan: &Plan<'_>) -> Option<Box<Home>> {
        if elsewhere.is_none() && !self.wants_spans() {
            return None;
        }
        let context = elsewhere.as_ref().unwrap_or(&self.context);
        let kept = self.is_kept(&self.lock(), plan.policy());
        let task = Task::new(plan.name, plan.site).kept(kept);
        let spanned = self.call("inherit", || {
            context.wants_span().then(|| {
                let own = context.inherit(&task);
                let span = own.span(&task);
                (Scope::new(own), Some(span).filter(|span| !span.is_disabled()))
            })
        });
        let (scope, span) = match (spanned, elsewhere) {
            (Some(Some(spanned)), _) => spanned,
            (_, None) => return None,
            (_, Some(context)) => (Scope::of_task(context, task), None),
        };
        let trace_id = self.call("value", || scope.trace_id()).flatten();
        Some(Box::new(Home { scope, span, permits: Permits::default(), trace_id }))
    }

    /// Whether a task with these choices is to outlive its request.
    fn is_kept(&self, inner: &Inner, own: Option<&Policy>) -> bool {
        let chosen = own.and_then(Policy::general).or_else(|| self.policy(inner).general());
        self.own || chosen == Some(AtEnd::Keep)
    }

    /// Takes the permits of the limits over this place, or over where the set was made if it has
    /// none. Of the one that is the registry's the set takes care.
    #[cold]
    #[inline(never)]
    pub(super) fn take_permits(
        &self,
        plan: &Plan<'_>,
        home: &mut Option<Box<Home>>,
    ) -> Result<(), SpawnLimit> {
        let here = Limits::current();
        let limits = if here.is_empty() { &self.limits } else { &here };
        // Out of the plan's lock: what is given back wakes others.
        let mut in_hand = plan.with_hand(|hand| hand.permit.take());
        let permits = limits.try_take(&mut in_hand, self.config().limit.as_ref());
        plan.with_hand(|hand| hand.permit = in_hand);
        let permits = permits?;
        if permits.is_empty() {
            return Ok(());
        }
        let home = home.get_or_insert_with(|| {
            let scope = Scope::of_current_task(self.context.clone(), current_task);
            Box::new(Home { scope, ..Home::default() })
        });
        home.permits = permits;
        Ok(())
    }

    /// The task's code is about to run: in its own place, or in the context of the set. From there
    /// it inherits when something asks, which nearly always nothing does.
    #[inline(never)]
    pub(crate) fn enter_home(&self, slot: u32, has_home: bool, away: &mut Option<Away>) {
        if has_home {
            let home = self.lock().extra_mut(slot).and_then(|extra| extra.home.take());
            if let Some(mut home) = home {
                let scope = std::mem::take(&mut home.scope);
                away.insert(Away { scope, limits: None, home: Some(home) }).enter();
                return;
            }
        }
        let scope = Scope::of_current_task(self.context.clone(), current_task);
        away.insert(Away { scope, limits: None, home: None }).scope.swap();
    }

    /// The task's code has run. What is its own is kept for its next poll. Whether the set now
    /// knows more of it than its entry.
    #[inline(never)]
    pub(crate) fn leave_home(&self, slot: u32, away: &mut Option<Away>) -> bool {
        let Some(mut away) = away.take() else { return false };
        if let Some(home) = &away.home {
            home.leave_span();
        }
        away.scope.swap();
        let Away { scope, limits, home } = away;
        if let Some(limits) = limits {
            limits.leave();
        }
        if home.is_none() && (scope.is_pending() || !self.context.inherits()) {
            // Nobody asked. The set has this context too, so nothing of others is dropped.
            return false;
        }
        let mut home = home.unwrap_or_default();
        home.scope = scope;
        self.lock().extra_of(slot).home = Some(home);
        true
    }

    /// The same for a task that was [lent](Scope::lend) its context, and has asked for it.
    #[cold]
    #[inline(never)]
    pub(crate) fn keep(&self, slot: u32, scope: Scope) -> bool {
        // If nothing is its own, the set has this context too: nothing of others is dropped.
        let inherits = self.context.inherits();
        if inherits {
            let home = Box::new(Home { scope, ..Home::default() });
            self.lock().extra_of(slot).home = Some(home);
        }
        inherits
    }

    /// Runs `f` in the current context, or in the set's if there is none.
    pub(crate) fn in_some_context<R>(&self, f: impl FnOnce() -> R) -> R {
        if RequestContext::current().is_empty() { self.context.clone().sync_scope(f) } else { f() }
    }

    /// The task's future is about to be dropped. Whether its context is now the current one: not if
    /// another is, for there is no place to keep it.
    #[inline(never)]
    pub(crate) fn enter_drop(&self, slot: u32, has_home: bool) -> bool {
        if !place::is_nowhere() || Limits::are_here() {
            return false;
        }
        if !has_home {
            return Scope::lend(current_task);
        }
        if !Scope::is_nowhere() {
            return false;
        }
        let mut away = None;
        // A destructor does not wait.
        let level = Level::current();
        self.enter_home(slot, has_home, &mut away);
        Level::leave(level);
        if let Some(Away { home: Some(home), .. }) = away {
            self.lock().extra_of(slot).home = Some(home);
        }
        true
    }

    /// It has been dropped, and was [entered](Self::enter_drop).
    #[inline]
    pub(crate) fn leave_drop(&self, slot: u32, has_home: bool) {
        if has_home {
            self.leave_home_to_drop(slot);
        } else if let Some(scope) = Scope::take_back() {
            // Values are the code of others.
            drop(catch(|| drop(scope)));
        }
    }

    #[inline(never)]
    fn leave_home_to_drop(&self, slot: u32) {
        let home = self.lock().extra_mut(slot).and_then(|extra| extra.home.take());
        if let Some(home) = &home {
            home.leave_span();
            Limits::default().leave();
        }
        let mut scope = Scope::default();
        scope.swap();
        if home.is_some() || !scope.is_pending() {
            // Values are the code of others.
            drop(catch(|| drop((scope, home))));
        }
    }
}

/// The task that runs here, if it was started in this context, or in whichever if that is empty.
pub(crate) fn current_task(context: &RequestContext) -> Option<(RequestContext, Task)> {
    let (set, slot) = place::current_task()?;
    let is_its = context.is_empty() || set.context.ptr_eq(context);
    if set.context.is_empty() || !is_its {
        return None;
    }
    let (name, site) = set.name_and_site(slot);
    let inner = set.lock();
    let own = inner.extra(slot).and_then(|extra| extra.policy.as_ref());
    let task = Task::new(name, site).kept(set.is_kept(&inner, own));
    Some((set.context.clone(), task))
}
