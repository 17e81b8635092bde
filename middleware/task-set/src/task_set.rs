use std::{
    fmt,
    panic::Location,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use tokio::time::Instant;
use tower_response_end::{End, hold};
use tower_spawn_limit::{Permit, Refused, SpawnError, SpawnLimit};

use crate::{
    AtEnd, FailFast, Group, GroupHandle, Join, OnPanic, StopToken, TaskHandle, TaskRegistry,
    Within,
    lifetime::Policy,
    place,
    set::{Refusal, Set, Ticket},
    stop::Stop,
    sync::OwnedNotified,
    task::{Blocking, Cause, Graceful},
    within::Line,
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
    /// In a task that belongs to no request it is a set of the
    /// [registry](crate::TaskRegistry::spawn), which others spawn into too: for more tasks like
    /// that, and no more. There is no response to end or to hold, and choices for all and
    /// [`cancel_all`](Self::cancel_all) change nothing, for they would meet strangers; tasks that
    /// end together are a [`group`](Self::group).
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
        let site = Location::caller();
        let other;
        let (set, ticket) = match self.0.admit_plainly(name, site) {
            Some(ticket) => (&self.0, ticket),
            None => match self.admit_with_care(&Plan::new(name, site)) {
                Ok((set, ticket)) => {
                    other = set;
                    (&other, ticket)
                }
                Err(reason) => return Err(Refused { reason, future }),
            },
        };
        Ok(set.spawn(ticket, ticket.track(set, future)))
    }

    /// As [`spawn`](Self::spawn), but if a limit is full it waits for a permit at most so long, in
    /// the order in which others have asked.
    ///
    /// It gives up with [`Closed`](SpawnError::Closed) when its request ends. In a task that has a
    /// permit itself nothing waits: it is refused at once, as with `spawn`, for tasks that wait for
    /// each other's permits would wait for ever (see
    /// [`Level`](tower_spawn_limit::Level)). So it is in a handler that is a task of its set. The
    /// attempt is counted when it is decided.
    ///
    /// Choose the time by how long the caller can still use the result.
    ///
    /// # Errors
    ///
    /// As [`spawn`](Self::spawn).
    ///
    /// # Cancel safety
    ///
    /// Dropping it drops the future, of which nothing has run, and gives up the place in the line.
    /// One that is neither polled nor dropped keeps its place, and the permit when it comes.
    #[track_caller]
    pub fn spawn_within<F>(
        &self,
        wait: Duration,
        name: &'static str,
        future: F,
    ) -> impl Future<Output = Result<TaskHandle<F::Output>, Refused<F>>> + Send
    where
        F: Future + Send + 'static,
        F::Output: Send + 'static,
    {
        self.task(name).within(wait).spawn(future)
    }

    /// Spawns a task that is not just dropped when it is told to end.
    ///
    /// It is given a [`StopToken`] that tells it, and then has its [grace](NewTask::grace), 5
    /// seconds by default, to come to an end by itself. What it yields within that time counts.
    /// When the time is over, it is dropped at its next await, and its handle yields
    /// [`Aborted`](crate::TaskError::Aborted).
    ///
    /// # Errors
    ///
    /// As [`spawn`](Self::spawn); the closure comes back.
    #[track_caller]
    pub fn spawn_graceful<M, F>(
        &self,
        name: &'static str,
        make: M,
    ) -> Result<TaskHandle<F::Output>, Refused<M>>
    where
        M: FnOnce(StopToken) -> F + Send + 'static,
        F: Future + Send + 'static,
        F::Output: Send + 'static,
    {
        self.task(name).spawn_graceful(make)
    }

    /// Runs a closure on a thread where it may block.
    ///
    /// Nothing can stop it once it has started: it is told by its [`StopToken`], and should look
    /// now and then. It is a task until it returns, whoever has given up on it: it keeps its
    /// permit, and is listed as [`Cancelling`](crate::TaskState::Cancelling) when it was told to
    /// end. One that was told before it started does not start, and counts as cancelled when a
    /// thread comes to it.
    ///
    /// # Errors
    ///
    /// As [`spawn`](Self::spawn); the closure comes back.
    ///
    /// # Panics
    ///
    /// If the operating system has no thread for it, and the runtime none that blocks.
    #[track_caller]
    pub fn spawn_blocking<F, T>(
        &self,
        name: &'static str,
        closure: F,
    ) -> Result<TaskHandle<T>, Refused<F>>
    where
        F: FnOnce(StopToken) -> T + Send + 'static,
        T: Send + 'static,
    {
        self.task(name).spawn_blocking(closure)
    }

    /// A task that is yet to be spawned, for choices of its own.
    pub const fn task(&self, name: &'static str) -> NewTask<'_> {
        NewTask::new(self, name)
    }

    /// Tasks of this set that end together: see [`Group`].
    pub fn group(&self) -> Group {
        Group::new(self.clone())
    }

    /// The same, where the first task that fails tells the others to end, for [`Cause::Sibling`]:
    /// one that returns an error, panics, or takes longer than its timeout.
    ///
    /// Its tasks return `Result<T, E>`. The error is the group's, and is what
    /// [`wait`](Group::<FailFast<E>>::wait) yields; the handles yield `T`.
    pub fn try_group<E: Send + 'static>(&self) -> Group<FailFast<E>> {
        Group::fail_fast(self.clone())
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

    /// How long the set's graceful tasks may go on after they were told to end, if they do not say
    /// otherwise. It holds for those that are spawned from now on.
    pub fn grace(&self, grace: Duration) {
        let mut policy = Policy::default();
        policy.set_grace(grace);
        self.0.add_policy(&policy);
    }

    /// What else becomes of it when one of its tasks panics, if that does not say otherwise.
    pub fn on_panic(&self, choice: OnPanic) {
        let mut policy = Policy::default();
        policy.on_panic(choice);
        self.0.add_policy(&policy);
    }

    /// When its response has to be over, if [the layer](crate::TaskSetLayer::deadline) says so: the
    /// time that a call to somebody else may take.
    pub fn deadline(&self) -> Option<Instant> {
        // The set is told after the poll in which it was made.
        self.0.deadline().into_iter().chain(place::limit(&self.0)).min()
    }

    /// How many of its tasks live. In a task that belongs to no request, that is how many live of
    /// those that were spawned beside it, by whomever.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Whether none of its tasks lives.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Tells all its tasks to end, for [`Cause::Requested`], and accepts no more.
    pub fn cancel_all(&self) {
        if !self.0.is_own() {
            self.0.cancel(Cause::Requested);
        }
    }

    /// Keeps the set open when the response is over, until the hold is dropped: for a connection
    /// that was upgraded and lives on. Also [holds](hold) the layers around it, where the set is
    /// the current one. When the response is over already, or there never was one, it holds nothing.
    pub fn hold(&self) -> Hold {
        let held = self.0.hold().then(|| self.0.clone());
        // What is around here is not around the set of another request.
        let around = held.as_ref().filter(|set| place::slot_of(set).is_some()).and_then(|_| hold());
        Hold { set: held, _around: around }
    }

    pub(crate) const fn new(set: Arc<Set>) -> Self {
        Self(set)
    }

    #[inline]
    fn admit_with_care(&self, plan: &Plan<'_>) -> Result<(Arc<Set>, Ticket), SpawnError> {
        match self.0.admit_with_care(plan) {
            Ok(ticket) => Ok((self.0.clone(), ticket)),
            Err(refusal) => admit_elsewhere(&self.0, plan, refusal).map_err(Refusal::reason),
        }
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
///
/// `O` is what it is spawned into: a [`TaskSet`], a [`TaskRegistry`](crate::TaskRegistry) or a
/// [`Group`].
#[derive(Clone, Debug)]
#[must_use = "nothing is spawned yet"]
pub struct NewTask<'a, O = TaskSet> {
    pub(crate) owner: &'a O,
    name: &'static str,
    choice: Option<Choice>,
}

impl<'a, O> NewTask<'a, O> {
    pub(crate) const fn new(owner: &'a O, name: &'static str) -> Self {
        Self { owner, name, choice: None }
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

    /// What else becomes of it when this task panics.
    pub fn on_panic(mut self, choice: OnPanic) -> Self {
        self.choice().policy.on_panic(choice);
        self
    }

    /// Gives the task this long from its spawn on. Then it is told to end: an ordinary task is
    /// dropped at its next await, and its handle yields [`TimedOut`](crate::TaskError::TimedOut).
    pub fn timeout(mut self, timeout: Duration) -> Self {
        self.choice().timeout = Some(timeout);
        self
    }

    /// How long a graceful task may go on after it was told to end. The default is 5 seconds.
    ///
    /// Choose what it takes to leave things in order. At a shutdown it has no more than the grace of
    /// that, which is then to be as long. Zero is none: the task is dropped at its next await.
    ///
    /// It changes nothing for other tasks.
    pub fn grace(mut self, grace: Duration) -> Self {
        self.choice().policy.set_grace(grace);
        self
    }

    /// If a limit is full, it waits for its place at most so long, whatever it is then spawned as:
    /// see [`TaskSet::spawn_within`].
    ///
    /// Into a group it also waits for the group's [limit](crate::Group::limit), and gives up with
    /// [`Closed`](SpawnError::Closed) when the group is told to end. It holds no place of one limit
    /// while it waits for that of another.
    ///
    /// ```
    /// # use std::time::Duration;
    /// # #[tokio::main(flavor = "current_thread")]
    /// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// # let tasks = tower_task_set::TaskRegistry::new();
    /// let group = tasks.group().limit(2);
    /// for page in 0..6 {
    ///     let ask = async move { /* ask for the page */ page };
    ///     group.task("ask").within(Duration::from_secs(5)).spawn(ask).await?;
    ///     assert!(group.len() <= 2);
    /// }
    /// group.wait().await;
    /// # Ok(()) }
    /// ```
    pub const fn within(self, wait: Duration) -> Within<'a, O> {
        Within::new(self, wait)
    }

    fn choice(&mut self) -> &mut Choice {
        self.choice.get_or_insert_default()
    }

    pub(crate) fn plan(&self, site: &'static Location<'static>) -> Plan<'_> {
        Plan { choice: self.choice.as_ref(), ..Plan::new(self.name, site) }
    }

    pub(crate) fn plan_with_stop(
        &mut self,
        site: &'static Location<'static>,
        blocks: bool,
    ) -> (Plan<'_>, StopToken) {
        let stop = Arc::<Stop>::default();
        let choice = self.choice();
        choice.stop = Some(stop.clone());
        choice.blocks = blocks;
        (self.plan(site), StopToken::new(stop))
    }
}

#[expect(private_bounds, reason = "nobody else owns tasks")]
impl<O: TaskOwner> NewTask<'_, O> {
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
        self.spawn_from(Location::caller(), future)
    }

    /// The same, for somebody who was called there.
    #[track_caller]
    pub(crate) fn spawn_from<F>(
        self,
        site: &'static Location<'static>,
        future: F,
    ) -> Result<TaskHandle<F::Output>, Refused<F>>
    where
        F: Future + Send + 'static,
        F::Output: Send + 'static,
    {
        match self.owner.admit(&self.plan(site)) {
            Ok((set, ticket)) => Ok(set.spawn(ticket, ticket.track(&set, future))),
            Err(reason) => Err(Refused { reason, future }),
        }
    }

    /// Spawns it as a graceful task: see [`TaskSet::spawn_graceful`].
    ///
    /// # Errors
    ///
    /// As [`TaskSet::spawn`].
    #[track_caller]
    pub fn spawn_graceful<M, F>(mut self, make: M) -> Result<TaskHandle<F::Output>, Refused<M>>
    where
        M: FnOnce(StopToken) -> F + Send + 'static,
        F: Future + Send + 'static,
        F::Output: Send + 'static,
    {
        let owner = self.owner;
        let (plan, stop) = self.plan_with_stop(Location::caller(), false);
        match owner.admit(&plan) {
            Ok((set, ticket)) => {
                let work = ticket.track(&set, Graceful::new(make, stop));
                Ok(set.spawn(ticket, work))
            }
            Err(reason) => Err(Refused { reason, future: make }),
        }
    }

    /// Spawns it as a closure that may block: see [`TaskSet::spawn_blocking`].
    ///
    /// # Errors
    ///
    /// As [`TaskSet::spawn`].
    ///
    /// # Panics
    ///
    /// As [`TaskSet::spawn_blocking`].
    #[track_caller]
    pub fn spawn_blocking<F, T>(mut self, closure: F) -> Result<TaskHandle<T>, Refused<F>>
    where
        F: FnOnce(StopToken) -> T + Send + 'static,
        T: Send + 'static,
    {
        let owner = self.owner;
        let (plan, stop) = self.plan_with_stop(Location::caller(), true);
        match owner.admit(&plan) {
            Ok((set, ticket)) => {
                let work = ticket.track(&set, Blocking::new(closure, stop));
                Ok(set.spawn_blocking(ticket, work))
            }
            Err(reason) => Err(Refused { reason, future: closure }),
        }
    }
}

/// Into a group.
impl<J> NewTask<'_, GroupHandle<J>> {
    /// Spawns it.
    ///
    /// # Errors
    ///
    /// As [`GroupHandle::spawn`].
    #[track_caller]
    pub fn spawn<F>(self, future: F) -> Result<TaskHandle<J::Value>, Refused<F>>
    where
        F: Future + Send + 'static,
        J: Join<F::Output>,
    {
        let owner = self.owner;
        match owner.admit(&self.plan(Location::caller())) {
            Ok((set, ticket, seat)) => {
                let work = owner.work(ticket.track(&set, future), seat);
                Ok(set.spawn(ticket, work))
            }
            Err(reason) => Err(Refused { reason, future }),
        }
    }

    /// Spawns it as a graceful task: see [`TaskSet::spawn_graceful`].
    ///
    /// # Errors
    ///
    /// As [`GroupHandle::spawn`].
    #[track_caller]
    pub fn spawn_graceful<M, F>(mut self, make: M) -> Result<TaskHandle<J::Value>, Refused<M>>
    where
        M: FnOnce(StopToken) -> F + Send + 'static,
        F: Future + Send + 'static,
        J: Join<F::Output>,
    {
        let owner = self.owner;
        let (plan, stop) = self.plan_with_stop(Location::caller(), false);
        match owner.admit(&plan) {
            Ok((set, ticket, seat)) => {
                let tracked = ticket.track(&set, Graceful::new(make, stop));
                let work = owner.work(tracked, seat);
                Ok(set.spawn(ticket, work))
            }
            Err(reason) => Err(Refused { reason, future: make }),
        }
    }

    /// Spawns it as a closure that may block: see [`TaskSet::spawn_blocking`].
    ///
    /// # Errors
    ///
    /// As [`GroupHandle::spawn`].
    ///
    /// # Panics
    ///
    /// As [`TaskSet::spawn_blocking`].
    #[track_caller]
    pub fn spawn_blocking<F, T>(mut self, closure: F) -> Result<TaskHandle<J::Value>, Refused<F>>
    where
        F: FnOnce(StopToken) -> T + Send + 'static,
        T: 'static,
        J: Join<T>,
    {
        let owner = self.owner;
        let (plan, stop) = self.plan_with_stop(Location::caller(), true);
        match owner.admit(&plan) {
            Ok((set, ticket, seat)) => {
                let tracked = ticket.track(&set, Blocking::new(closure, stop));
                let work = owner.work(tracked, seat);
                Ok(set.spawn_blocking(ticket, work))
            }
            Err(reason) => Err(Refused { reason, future: closure }),
        }
    }
}

/// Whose tasks they are: a set or a registry.
pub(crate) trait TaskOwner: Send + Sync + 'static {
    /// A task whose plan [waits](Plan::waits) is not counted where a limit is full.
    fn try_admit(&self, plan: &Plan<'_>) -> Result<(Arc<Set>, Ticket), Refusal>;

    /// Until it may refuse what it does not refuse now. Listens from now on.
    fn changed(&self) -> OwnedNotified;

    fn admit(&self, plan: &Plan<'_>) -> Result<(Arc<Set>, Ticket), SpawnError> {
        self.try_admit(plan).map_err(Refusal::reason)
    }

    /// Counts an attempt that a group refuses.
    fn count_refused(&self, plan: &Plan<'_>);

    /// Why what is left is told to end, if it has ended.
    fn ended(&self) -> Option<Cause>;
}

impl TaskOwner for TaskSet {
    fn try_admit(&self, plan: &Plan<'_>) -> Result<(Arc<Set>, Ticket), Refusal> {
        match self.0.admit(plan) {
            Ok(ticket) => Ok((self.0.clone(), ticket)),
            Err(refusal) => admit_elsewhere(&self.0, plan, refusal),
        }
    }

    fn changed(&self) -> OwnedNotified {
        self.0.changed()
    }

    fn count_refused(&self, plan: &Plan<'_>) {
        self.0.count_refused(plan);
    }

    fn ended(&self) -> Option<Cause> {
        self.0.ended().map(Cause::from)
    }
}

impl TaskOwner for TaskRegistry {
    fn try_admit(&self, plan: &Plan<'_>) -> Result<(Arc<Set>, Ticket), Refusal> {
        self.admit(plan)
    }

    fn changed(&self) -> OwnedNotified {
        self.changed()
    }

    fn count_refused(&self, plan: &Plan<'_>) {
        self.count_refused(plan);
    }

    fn ended(&self) -> Option<Cause> {
        None
    }
}

impl<O: TaskOwner> Line for O {
    type Place = (Arc<Set>, Ticket);

    fn try_enter(&self, plan: &Plan<'_>) -> Result<Self::Place, Refusal> {
        self.try_admit(plan)
    }

    fn changed(&self) -> impl Future<Output = ()> + Send {
        TaskOwner::changed(self)
    }

    fn count_refused(&self, plan: &Plan<'_>) {
        TaskOwner::count_refused(self, plan);
    }
}

/// What was chosen for one task.
#[derive(Clone, Debug, Default)]
pub(crate) struct Choice {
    policy: Policy,
    timeout: Option<Duration>,
    /// What tells it to stop, if that is not just dropping it.
    stop: Option<Arc<Stop>>,
    /// It cannot be dropped once it runs.
    blocks: bool,
}

#[cfg(all(test, loom))]
impl Choice {
    pub(crate) fn graceful() -> (Self, StopToken) {
        let stop = Arc::<Stop>::default();
        (Self { stop: Some(stop.clone()), ..Self::default() }, StopToken::new(stop))
    }
}

/// What a set is asked to admit.
#[derive(Clone, Copy)]
pub(crate) struct Plan<'a> {
    pub(crate) name: &'static str,
    pub(crate) site: &'static Location<'static>,
    pub(crate) choice: Option<&'a Choice>,
    /// Of who waits where a limit is full.
    // Nobody waits for the lock. A plan must be `Sync`, to be seen by a future that is `Send`.
    pub(crate) hand: Option<&'a Mutex<Hand>>,
}

/// What goes to and fro between a set and who waits to spawn.
#[derive(Default)]
pub(crate) struct Hand {
    /// The one that has come, if one has.
    pub(crate) permit: Option<Permit>,
    /// The limit that is full.
    pub(crate) full: Option<SpawnLimit>,
}

impl<'a> Plan<'a> {
    pub(crate) const fn new(name: &'static str, site: &'static Location<'static>) -> Self {
        Self { name, site, choice: None, hand: None }
    }

    #[cfg(all(test, loom))]
    pub(crate) const fn with(self, choice: &'a Choice) -> Self {
        Self { choice: Some(choice), ..self }
    }

    /// Whether nothing is asked for but a task.
    #[inline]
    pub(crate) const fn is_plain(&self) -> bool {
        self.choice.is_none() && self.hand.is_none()
    }

    /// Whether it is to be told which limit is full, and not counted.
    pub(crate) const fn waits(&self) -> bool {
        self.hand.is_some()
    }

    /// Takes a permit, be it the one in hand. That of another limit stays there.
    pub(crate) fn take(&self, limit: &SpawnLimit) -> bool {
        self.with_hand(|hand| match hand.permit.take_if(|permit| permit.is_of(limit)) {
            Some(permit) => {
                permit.forget();
                true
            }
            None => limit.try_take(),
        })
    }

    pub(crate) fn with_hand<R>(&self, f: impl FnOnce(&mut Hand) -> R) -> R {
        match self.hand {
            Some(hand) => f(&mut hand.lock().unwrap_or_else(PoisonError::into_inner)),
            None => f(&mut Hand::default()),
        }
    }

    pub(crate) const fn has_choices(&self) -> bool {
        self.choice.is_some()
    }

    pub(crate) fn timeout(&self) -> Option<Duration> {
        self.choice?.timeout
    }

    pub(crate) fn on_panic(&self) -> Option<OnPanic> {
        self.choice?.policy.for_panic()
    }

    pub(crate) fn policy(&self) -> Option<&'a Policy> {
        self.choice.map(|choice| &choice.policy).filter(|policy| policy.has_lifetime())
    }

    pub(crate) fn stop(&self) -> Option<&'a Arc<Stop>> {
        self.choice?.stop.as_ref()
    }

    /// How long it may go on after it was told to end, by its own choice or else this one's; for
    /// what blocks there is no such time.
    pub(crate) fn grace(&self, general: &Policy) -> Option<Duration> {
        let choice = self.choice.filter(|choice| !choice.blocks)?;
        choice.stop.as_ref().map(|_| general.grace(Some(&choice.policy)))
    }
}

/// After a refusal: a set of the registry that is over has a successor.
#[cold]
fn admit_elsewhere(
    set: &Arc<Set>,
    plan: &Plan<'_>,
    refusal: Refusal,
) -> Result<(Arc<Set>, Ticket), Refusal> {
    match refusal {
        Refusal::Gone => match set.successor(plan) {
            Some(registry) => registry.admit(plan),
            None => Err(Refusal::Because(SpawnError::Closed)),
        },
        refusal => Err(refusal),
    }
}
