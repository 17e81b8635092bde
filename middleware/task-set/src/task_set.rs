use std::{fmt, panic::Location, sync::Arc, time::Duration};

use tower_response_end::{End, hold};
use tower_spawn_limit::{Refused, SpawnError};

use crate::{
    AtEnd, TaskHandle, TaskRegistry,
    lifetime::Policy,
    place,
    set::{Refusal, Set},
    task::Cause,
};

/// The tasks of one request.
///
/// A handle: a clone is the same set, and dropping it changes nothing. The set is made when a
/// request first asks for it.
#[derive(Clone)]
pub struct TaskSet(Arc<Set>);

impl TaskSet {
    /// The set of the request that is being served here: in the handler, in the polls and the drop
    /// of the response's body, and in tasks of the set.
    ///
    /// # Errors
    ///
    /// [`NoTaskSet`] if there is none: no [`TaskSetLayer`](crate::TaskSetLayer) is above, or this
    /// runs on a task that is not ours.
    pub fn current() -> Result<Self, NoTaskSet> {
        place::current().map(Self).ok_or(NoTaskSet(()))
    }

    /// Spawns a task. It never waits and never panics.
    ///
    /// The task runs on the runtime that the set was made on, whatever thread this is called from.
    /// What becomes of it when the response is over is the set's choice: [`task`](Self::task) is
    /// for tasks with choices of their own.
    ///
    /// `name` is what the task is counted and reported by.
    ///
    /// # Errors
    ///
    /// The future comes back, and nothing of it has run:
    ///
    /// - [`Closed`](SpawnError::Closed): the response is over, or its tasks were told to end. A
    ///   task of the set that may still run may still spawn: what it spawns has at most its own
    ///   lifetime and remaining time.
    /// - [`Full`](SpawnError::Full): a limit is reached.
    /// - [`NoRuntime`](SpawnError::NoRuntime): the set was made outside of a runtime and this is
    ///   outside of one too, or its runtime was shut down. While a runtime is being shut down, a
    ///   task may be accepted and dropped at once: that is told by its handle.
    #[track_caller]
    pub fn spawn<F>(
        &self,
        name: &'static str,
        future: F,
    ) -> Result<TaskHandle<F::Output>, Refused<F>>
    where
        F: Future + Send + 'static,
        F::Output: Send + 'static,
    {
        start(&self.0, &Plan::new(name, Location::caller()), future)
    }

    /// A task that is yet to be spawned, for choices of its own.
    pub const fn task(&self, name: &'static str) -> NewTask<'_> {
        NewTask { owner: TaskOwner::Set(&self.0), name, choice: None }
    }

    /// What becomes of the set's tasks at the end of the response, if they do not say otherwise.
    /// When that has come, this changes nothing.
    pub fn at_end(&self, lifetime: AtEnd) {
        let mut policy = Policy::default();
        policy.at_end(lifetime);
        self.0.add_policy(&policy);
    }

    /// The exception to [`at_end`](Self::at_end) for one end.
    pub fn on(&self, end: End, lifetime: AtEnd) {
        let mut policy = Policy::default();
        policy.on(end, lifetime);
        self.0.add_policy(&policy);
    }

    /// How many of its tasks live.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Whether none of its tasks lives.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Tells all its tasks to end, for [`Cause::Requested`], and accepts no more.
    pub fn cancel_all(&self) {
        self.0.cancel(Cause::Requested);
    }

    /// Keeps the set open when the response is over, until the hold is dropped: for a connection
    /// that was upgraded and lives on. Also [holds](hold) the layers around it. When the response
    /// is over already, it holds nothing.
    pub fn hold(&self) -> Hold {
        let around = hold();
        let held = self.0.hold().then(|| self.0.clone());
        Hold { set: held, _around: around }
    }

    pub(crate) const fn new(set: Arc<Set>) -> Self {
        Self(set)
    }
}

impl fmt::Debug for TaskSet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TaskSet").field("len", &self.len()).finish_non_exhaustive()
    }
}

/// Keeps a set open until it is dropped: see [`TaskSet::hold`].
///
/// Leaking it leaves the set open for ever.
#[must_use = "it holds until it is dropped"]
pub struct Hold {
    set: Option<Arc<Set>>,
    _around: Option<tower_response_end::Hold>,
}

impl Drop for Hold {
    fn drop(&mut self) {
        if let Some(set) = self.set.take() {
            set.let_go();
        }
    }
}

impl fmt::Debug for Hold {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Hold").finish_non_exhaustive()
    }
}

/// Somebody asked for a [`TaskSet`] where there is none.
///
/// With the feature `axum` it is the extractor's rejection: status 500, and this text.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NoTaskSet(pub(crate) ());

impl fmt::Display for NoTaskSet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(
            "no task set here: add `TaskSetLayer` outside of this handler; if it is there, this \
             runs on another task than the handler's, so move a `TaskSet` in, or add \
             `.in_extensions()` to the layer and use the extractor; or the response is over",
        )
    }
}

impl std::error::Error for NoTaskSet {}

/// A task that is yet to be spawned, and its choices.
#[derive(Clone, Debug)]
#[must_use = "nothing is spawned yet"]
pub struct NewTask<'a> {
    owner: TaskOwner<'a>,
    name: &'static str,
    choice: Option<Choice>,
}

#[derive(Clone, Copy, Debug)]
enum TaskOwner<'a> {
    Set(&'a Arc<Set>),
    Registry(&'a TaskRegistry),
}

impl<'a> NewTask<'a> {
    pub(crate) const fn of_registry(registry: &'a TaskRegistry, name: &'static str) -> Self {
        Self { owner: TaskOwner::Registry(registry), name, choice: None }
    }

    /// What becomes of it when the response is over. A task that belongs to no request is kept.
    pub fn at_end(mut self, lifetime: AtEnd) -> Self {
        self.choice().policy.at_end(lifetime);
        self
    }

    /// The exception to [`at_end`](Self::at_end) for one end.
    pub fn on(mut self, end: End, lifetime: AtEnd) -> Self {
        self.choice().policy.on(end, lifetime);
        self
    }

    /// Gives the task this long from its spawn on. Then it is dropped at its next await, and its
    /// handle yields [`TimedOut`](crate::TaskError::TimedOut).
    pub fn timeout(mut self, timeout: Duration) -> Self {
        self.choice().timeout = Some(timeout);
        self
    }

    /// Spawns it.
    ///
    /// # Errors
    ///
    /// As [`TaskSet::spawn`].
    #[track_caller]
    pub fn spawn<F>(self, future: F) -> Result<TaskHandle<F::Output>, Refused<F>>
    where
        F: Future + Send + 'static,
        F::Output: Send + 'static,
    {
        let mut plan = Plan::new(self.name, Location::caller());
        plan.choice = self.choice;
        match self.owner {
            TaskOwner::Set(set) => start(set, &plan, future),
            TaskOwner::Registry(registry) => registry.start(&plan, future),
        }
    }

    fn choice(&mut self) -> &mut Choice {
        self.choice.get_or_insert_default()
    }
}

/// What was chosen for one task.
#[derive(Clone, Debug, Default)]
struct Choice {
    policy: Policy,
    timeout: Option<Duration>,
}

/// What a set is asked to admit.
pub(crate) struct Plan {
    pub(crate) name: &'static str,
    pub(crate) site: &'static Location<'static>,
    choice: Option<Choice>,
}

impl Plan {
    pub(crate) const fn new(name: &'static str, site: &'static Location<'static>) -> Self {
        Self { name, site, choice: None }
    }

    pub(crate) const fn has_choices(&self) -> bool {
        self.choice.is_some()
    }

    pub(crate) fn timeout(&self) -> Option<Duration> {
        self.choice.as_ref()?.timeout
    }

    pub(crate) fn policy(&self) -> Option<&Policy> {
        self.choice.as_ref().map(|choice| &choice.policy).filter(|policy| !policy.is_empty())
    }
}

#[track_caller]
fn start<F>(set: &Arc<Set>, plan: &Plan, future: F) -> Result<TaskHandle<F::Output>, Refused<F>>
where
    F: Future + Send + 'static,
    F::Output: Send + 'static,
{
    match set.admit(plan) {
        Ok(ticket) => Ok(set.spawn(&ticket, future)),
        Err(Refusal::Because(reason)) => Err(Refused { reason, future }),
        Err(Refusal::Gone) => match set.successor(plan) {
            Some(registry) => registry.start(plan, future),
            None => Err(Refused { reason: SpawnError::Closed, future }),
        },
    }
}
