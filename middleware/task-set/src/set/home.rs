use tower_catch_unwind::catch;
use tower_request_context::{RequestContext, Scope, Task, TraceId};
use tracing::Span;

use super::{Set, members::Inner};
use crate::{AtEnd, lifetime::Policy, task_set::Plan};

/// Where a task runs, besides in its set.
#[derive(Default)]
pub(crate) struct Home {
    scope: Scope,
    span: Option<Span>,
    /// Known without asking the scope: that may be current elsewhere.
    pub(super) trace_id: Option<TraceId>,
}

impl Home {
    fn enter(&mut self) {
        self.scope.swap();
        if let Some(span) = &self.span {
            // A subscriber is the code of others.
            drop(catch(|| span.with_subscriber(|(id, subscriber)| subscriber.enter(id))));
        }
    }

    fn leave(&mut self) {
        if let Some(span) = &self.span {
            drop(catch(|| span.with_subscriber(|(id, subscriber)| subscriber.exit(id))));
        }
        self.scope.swap();
    }
}

impl Set {
    /// The context and the span of a new task, if they are not just the set's context or what is
    /// inherited from it when somebody asks.
    #[inline]
    pub(super) fn new_home(&self, plan: &Plan) -> Option<Box<Home>> {
        let elsewhere = Scope::other_than(&self.context);
        if elsewhere.is_none() && !self.context.inherits() {
            return None;
        }
        self.new_home_in(elsewhere, plan)
    }

    #[inline(never)]
    fn new_home_in(&self, elsewhere: Option<RequestContext>, plan: &Plan) -> Option<Box<Home>> {
        let context = elsewhere.as_ref().unwrap_or(&self.context);
        let task = self.task(plan);
        // The code of whoever made the values.
        let spanned = catch(|| {
            context.wants_span(&task).then(|| {
                let own = context.inherit(&task);
                let span = own.span(&task);
                (Scope::new(own), Some(span).filter(|span| !span.is_disabled()))
            })
        });
        let (scope, span) = match (spanned, elsewhere) {
            (Ok(Some(spanned)), _) => spanned,
            (_, None) => return None,
            (_, Some(context)) => (Scope::of_task(context, task), None),
        };
        let trace_id = catch(|| scope.trace_id()).ok().flatten();
        Some(Box::new(Home { scope, span, trace_id }))
    }

    fn task(&self, plan: &Plan) -> Task {
        Task::new(plan.name, plan.site).kept(self.is_kept(&self.lock(), plan.policy()))
    }

    /// Whether a task with these choices is to outlive its request.
    fn is_kept(&self, inner: &Inner, own: Option<&Policy>) -> bool {
        let chosen = own.and_then(Policy::general).or_else(|| self.policy(inner).general());
        self.own || chosen == Some(AtEnd::Keep)
    }

    #[inline]
    pub(crate) fn has_context(&self) -> bool {
        !self.context.is_empty()
    }

    /// Where to run the task: its own place, or the context of the set.
    fn home(&self, slot: u32, has_extra: bool) -> Home {
        if has_extra {
            let mut inner = self.lock();
            if let Some(home) = inner.extras.get_mut(&slot).and_then(|extra| extra.home.as_mut()) {
                return std::mem::take(&mut **home);
            }
        }
        let scope = if self.context.inherits() {
            let (name, site) = self.name_and_site(slot);
            let inner = self.lock();
            let own = inner.extras.get(&slot).and_then(|extra| extra.policy.as_ref());
            let kept = self.is_kept(&inner, own);
            drop(inner);
            Scope::of_task(self.context.clone(), Task::new(name, site).kept(kept))
        } else {
            Scope::new(self.context.clone())
        };
        Home { scope, ..Home::default() }
    }

    /// The task's code is about to run.
    #[inline(never)]
    pub(crate) fn enter_home(&self, slot: u32, has_extra: bool, home: &mut Option<Home>) {
        home.insert(self.home(slot, has_extra)).enter();
    }

    /// The task's code has run. What is its own is kept for its next poll. Whether the set now
    /// knows more of it than its entry.
    #[inline(never)]
    pub(crate) fn leave_home(&self, slot: u32, home: &mut Option<Home>) -> bool {
        let Some(mut home) = home.take() else { return false };
        home.leave();
        let mut inner = self.lock();
        if let Some(kept) = inner.extras.get_mut(&slot).and_then(|extra| extra.home.as_mut()) {
            **kept = home;
            return true;
        }
        let is_its_own = self.context.inherits() && !home.scope.is_pending();
        if is_its_own {
            inner.extras.entry(slot).or_default().home = Some(Box::new(home));
        } else {
            // Values may be the code of others.
            drop(inner);
            drop(home);
        }
        is_its_own
    }

    /// The task's future is about to be dropped. Whether its context is now the current one.
    #[inline(never)]
    pub(crate) fn enter_drop(&self, slot: u32, has_extra: bool) -> bool {
        let mut home = self.home(slot, has_extra);
        home.enter();
        let nothing_was_current = home.scope.is_empty();
        if !nothing_was_current {
            home.leave();
        } else if home.span.is_some() {
            self.lock().extras.entry(slot).or_default().span = home.span;
        }
        nothing_was_current
    }

    /// It has been dropped, and was [entered](Self::enter_drop).
    #[inline(never)]
    pub(crate) fn leave_drop(&self, slot: u32) {
        let span = self.lock().extras.get_mut(&slot).and_then(|extra| extra.span.take());
        let mut home = Home { span, ..Home::default() };
        home.leave();
        // Values are the code of others.
        drop(catch(|| drop(home)));
    }
}
