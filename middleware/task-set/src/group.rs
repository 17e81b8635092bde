use std::{
    collections::BTreeMap,
    fmt,
    future::poll_fn,
    ops::Deref,
    pin::{Pin, pin},
    sync::{Arc, OnceLock},
    task::{Context, Poll, ready},
    thread,
};

use pin_project_lite::pin_project;
use tower_catch_unwind::{Panic, catch};
use tower_spawn_limit::{Level, Refused, SpawnError, SpawnLimit};

use crate::{
    Cause, NewTask, StopToken, TaskError, TaskHandle,
    set::{Refusal, Set, Ticket},
    sync::{Mutex, Notify, OwnedNotified, lock, notify},
    task::{Canceller, Tracked},
    task_set::{Plan, TaskOwner},
    within::Line,
};

/// Tasks that end together: dropped, it tells them to end.
///
/// Made by [`TaskSet::group`](crate::TaskSet::group) and
/// [`TaskSet::try_group`](crate::TaskSet::try_group), mostly to ask several things at once and to
/// go on with the results. Its tasks are also those of the set, or of the registry: they count
/// there, have the lifetimes and limits of there, and may be told to end from there. A group within
/// a group is one that a task of the outer group owns: with the task it ends.
///
/// What it is dropped with is their [`Cause`]: the end of the response if that has come, as when
/// the client has left; [`Panicked`](Cause::Panicked) if its owner panics; or else
/// [`Requested`](Cause::Requested). The drop does not wait: graceful tasks still have their grace,
/// and closures that block return when they do.
///
/// # Example
///
/// ```
/// use tower_task_set::{TaskRegistry, TaskError};
///
/// # #[tokio::main(flavor = "current_thread")]
/// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
/// # let tasks = TaskRegistry::new();
/// let group = tasks.try_group();
/// let price = group.spawn("price", async { Ok::<_, String>(7) })?;
/// let stock = group.spawn("stock", async { Ok(35) })?;
/// group.wait().await?;
/// assert_eq!(price.await? + stock.await?, 42);
///
/// let group = tasks.try_group();
/// let asleep = group.spawn("asleep", std::future::pending::<Result<(), _>>())?;
/// group.spawn("fails", async { Err::<(), _>("no such thing".to_owned()) })?;
/// let error = group.wait().await.unwrap_err();
/// assert_eq!(error.to_string(), "task `fails` failed: no such thing");
/// assert!(matches!(asleep.await, Err(TaskError::Cancelled(_))));
/// # Ok(()) }
/// ```
#[must_use = "dropped, it tells its tasks to end"]
pub struct Group<J = WaitAll>(GroupHandle<J>);

impl Group {
    pub(crate) fn new(owner: impl TaskOwner) -> Self {
        Self(GroupHandle { shared: Shared::new(owner, None), join: WaitAll(()) })
    }

    /// Waits until all tasks have ended: all destructors have run. Its tasks may go on to spawn
    /// meanwhile; when it is empty it takes no more.
    ///
    /// A task that waits for its own group waits for itself.
    ///
    /// # Cancel safety
    ///
    /// Dropped half-way, it drops the group, which tells its tasks to end. Poll it by reference
    /// where that is not wanted.
    pub async fn wait(self) {
        self.0.shared.empty().await;
    }
}

impl<E: Send + 'static> Group<FailFast<E>> {
    pub(crate) fn fail_fast(owner: impl TaskOwner) -> Self {
        let first = Arc::new(First { failure: Mutex::new(None) });
        let shared = Shared::new(owner, Some(first.clone()));
        Self(GroupHandle { shared, join: FailFast(first) })
    }

    /// Waits until all tasks have ended, and yields the first failure: all destructors have run.
    /// Its tasks may go on to spawn meanwhile; when it is empty it takes no more.
    ///
    /// A task that waits for its own group waits for itself.
    ///
    /// # Errors
    ///
    /// What the first failure was. If no task has failed, but one was told to end from elsewhere,
    /// that: `Ok` says that each task has returned `Ok`.
    ///
    /// # Cancel safety
    ///
    /// Dropped half-way, it drops the group, which tells its tasks to end. Poll it by reference
    /// where that is not wanted.
    pub async fn wait(self) -> Result<(), GroupError<E>> {
        self.0.shared.empty().await;
        let failure = lock(&self.0.join.0.failure).take();
        failure.map_or(Ok(()), Err)
    }
}

impl<J> Group<J> {
    /// At most `limit` of its tasks at once: what is too many is refused, or
    /// [waits](crate::NewTask::within). 0 refuses all.
    ///
    /// A task of a group with a limit is as one with a permit: it [does not
    /// wait](tower_spawn_limit::Level) where a limit is full. What it spawns elsewhere
    /// [may](crate#limits).
    ///
    /// Choose it by what the other side of the tasks can take at once, and before the first is
    /// spawned: those from before it do not count.
    pub fn limit(self, limit: usize) -> Self {
        self.0.shared.limit.get_or_init(|| SpawnLimit::new(limit)).set_limit(limit);
        self
    }

    /// A handle of it, for its tasks.
    pub fn handle(&self) -> GroupHandle<J>
    where
        J: Clone,
    {
        self.0.clone()
    }
}

/// What is done with the handle is done with the group.
impl<J> Deref for Group<J> {
    type Target = GroupHandle<J>;

    fn deref(&self) -> &GroupHandle<J> {
        &self.0
    }
}

impl<J> fmt::Debug for Group<J> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Group").field("len", &self.len()).finish_non_exhaustive()
    }
}

impl<J> Drop for Group<J> {
    fn drop(&mut self) {
        let shared = &self.0.shared;
        let cause = if thread::panicking() { Some(Cause::Panicked) } else { shared.owner.ended() };
        shared.cancel(cause.unwrap_or(Cause::Requested), None);
    }
}

/// Spawns into a [`Group`]: for its tasks. A clone is the same group, and dropping it changes
/// nothing.
#[derive(Clone)]
pub struct GroupHandle<J = WaitAll> {
    shared: Arc<Shared>,
    join: J,
}

impl<J> GroupHandle<J> {
    /// Spawns a task: see [`TaskSet::spawn`](crate::TaskSet::spawn).
    ///
    /// # Errors
    ///
    /// As there. [`Closed`](SpawnError::Closed) also if the group was told to end, is dropped, or
    /// has [become empty](Group::wait), and [`Full`](SpawnError::Full) if its limit is reached.
    #[track_caller]
    pub fn spawn<F>(
        &self,
        name: &'static str,
        future: F,
    ) -> Result<TaskHandle<J::Value>, Refused<F>>
    where
        F: Future + Send + 'static,
        J: Join<F::Output>,
    {
        self.task(name).spawn(future)
    }

    /// Spawns a graceful task: see [`TaskSet::spawn_graceful`](crate::TaskSet::spawn_graceful).
    ///
    /// # Errors
    ///
    /// As [`spawn`](Self::spawn).
    #[track_caller]
    pub fn spawn_graceful<M, F>(
        &self,
        name: &'static str,
        make: M,
    ) -> Result<TaskHandle<J::Value>, Refused<M>>
    where
        M: FnOnce(StopToken) -> F + Send + 'static,
        F: Future + Send + 'static,
        J: Join<F::Output>,
    {
        self.task(name).spawn_graceful(make)
    }

    /// Runs a closure on a thread where it may block: see
    /// [`TaskSet::spawn_blocking`](crate::TaskSet::spawn_blocking).
    ///
    /// # Errors
    ///
    /// As [`spawn`](Self::spawn).
    ///
    /// # Panics
    ///
    /// As [`TaskSet::spawn_blocking`](crate::TaskSet::spawn_blocking).
    #[track_caller]
    pub fn spawn_blocking<F, T>(
        &self,
        name: &'static str,
        closure: F,
    ) -> Result<TaskHandle<J::Value>, Refused<F>>
    where
        F: FnOnce(StopToken) -> T + Send + 'static,
        T: 'static,
        J: Join<T>,
    {
        self.task(name).spawn_blocking(closure)
    }

    /// A task that is yet to be spawned, for choices of its own.
    pub fn task(&self, name: &'static str) -> NewTask<'_, Self> {
        NewTask::new(self, name)
    }

    /// How many of its tasks live.
    pub fn len(&self) -> usize {
        lock(&self.shared.state).live
    }

    /// Whether none of its tasks lives.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Tells all its tasks to end, for [`Cause::Requested`], and accepts no more.
    pub fn cancel_all(&self) {
        self.shared.cancel(Cause::Requested, None);
    }

    pub(crate) fn admit(&self, plan: &Plan<'_>) -> Result<(Arc<Set>, Ticket, Seat), SpawnError> {
        self.shared.admit(plan).map_err(Refusal::reason)
    }
}

impl<J> Line for GroupHandle<J> {
    type Place = (Arc<Set>, Ticket, Seat);

    fn try_enter(&self, plan: &Plan<'_>) -> Result<Self::Place, Refusal> {
        self.shared.admit(plan)
    }

    fn changed(&self) -> impl Future<Output = ()> + Send {
        let own = lock(&self.shared.state).changed.get_or_insert_default().clone();
        either(own.notified_owned(), self.shared.owner.changed())
    }

    fn count_refused(&self, plan: &Plan<'_>) {
        self.shared.owner.count_refused(plan);
    }
}

async fn either(one: OwnedNotified, other: OwnedNotified) {
    let (mut one, mut other) = (pin!(one), pin!(other));
    poll_fn(|cx| match one.as_mut().poll(cx) {
        Poll::Ready(()) => Poll::Ready(()),
        Poll::Pending => other.as_mut().poll(cx),
    })
    .await;
}

impl<J: Clone> GroupHandle<J> {
    pub(crate) fn work<F>(&self, tracked: Tracked<F>, seat: Seat) -> Grouped<F, J> {
        Grouped { tracked, seat, join: self.join.clone() }
    }
}

impl<J> fmt::Debug for GroupHandle<J> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("GroupHandle").field("len", &self.len()).finish_non_exhaustive()
    }
}

/// What a [`Group`] makes of what its tasks return: [`WaitAll`] or [`FailFast`].
pub trait Join<Output>: sealed::Sealed + Clone + Send + 'static {
    /// What a task's handle yields.
    type Value: Send + 'static;

    /// Takes what a task has returned. An error fails the group.
    #[doc(hidden)]
    fn join(
        &self,
        output: Output,
        task: impl FnOnce() -> &'static str,
    ) -> Result<Self::Value, TaskError>;
}

mod sealed {
    pub trait Sealed {}
}

/// How a [`Group`] is by default: each task ends as it does, and its handle yields what it returns.
#[derive(Clone, Debug)]
pub struct WaitAll(());

impl sealed::Sealed for WaitAll {}

impl<T: Send + 'static> Join<T> for WaitAll {
    type Value = T;

    fn join(&self, output: T, _: impl FnOnce() -> &'static str) -> Result<T, TaskError> {
        Ok(output)
    }
}

/// How a [`Group`] is that ends at the first failure: see
/// [`TaskSet::try_group`](crate::TaskSet::try_group).
pub struct FailFast<E>(Arc<First<E>>);

impl<E> sealed::Sealed for FailFast<E> {}

impl<T, E> Join<Result<T, E>> for FailFast<E>
where
    T: Send + 'static,
    E: Send + 'static,
{
    type Value = T;

    fn join(
        &self,
        output: Result<T, E>,
        task: impl FnOnce() -> &'static str,
    ) -> Result<T, TaskError> {
        output.map_err(|error| {
            self.0.set(GroupError::Failed { task: task(), error });
            TaskError::Failed
        })
    }
}

impl<E> Clone for FailFast<E> {
    fn clone(&self) -> Self {
        Self(self.0.clone())
    }
}

impl<E> fmt::Debug for FailFast<E> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("FailFast").finish_non_exhaustive()
    }
}

/// Why not all tasks of a [`FailFast`] group have returned `Ok`.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub enum GroupError<E> {
    /// A task has returned an error.
    Failed {
        /// The name that it was given.
        task: &'static str,
        /// What it has returned.
        error: E,
    },
    /// A task has returned nothing.
    Lost {
        /// The name that it was given.
        task: &'static str,
        /// Why.
        error: TaskError,
    },
}

impl<E: fmt::Display> fmt::Display for GroupError<E> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Failed { task, error } => write!(f, "task `{task}` failed: {error}"),
            Self::Lost { task, error } => write!(f, "task `{task}`: {error}"),
        }
    }
}

// Also for errors that are none by this trait, texts and `anyhow`'s for instance.
impl<E: fmt::Debug + fmt::Display> std::error::Error for GroupError<E> {}

/// What has gone wrong first.
struct First<E> {
    failure: Mutex<Option<GroupError<E>>>,
}

impl<E> First<E> {
    fn set(&self, failure: GroupError<E>) {
        let mut first = lock(&self.failure);
        // That a task was told to end is no failure, and is only told if there is none.
        let is_news = match &*first {
            None => true,
            Some(GroupError::Lost { error, .. }) => !error.is_failure() && failure.is_failure(),
            Some(GroupError::Failed { .. }) => false,
        };
        let unwanted = if is_news { first.replace(failure) } else { Some(failure) };
        drop(first);
        // The code of others.
        drop(catch(|| drop(unwanted)));
    }
}

impl<E> GroupError<E> {
    fn is_failure(&self) -> bool {
        match self {
            Self::Failed { .. } => true,
            Self::Lost { error, .. } => error.is_failure(),
        }
    }
}

/// Takes the tasks that have returned nothing.
trait Lose: Send + Sync {
    fn lose(&self, task: &'static str, error: TaskError);
}

impl<E: Send> Lose for First<E> {
    fn lose(&self, task: &'static str, error: TaskError) {
        self.set(GroupError::Lost { task, error });
    }
}

/// What a group, its handles and its tasks share.
struct Shared {
    owner: Box<dyn TaskOwner>,
    /// Of a group that fails fast.
    first: Option<Arc<dyn Lose>>,
    limit: OnceLock<SpawnLimit>,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    /// Tasks, and those that are about to be.
    live: usize,
    members: BTreeMap<u64, Canceller>,
    next_id: u64,
    /// It takes no more: whoever is about to come in is told this.
    closed: Option<Cause>,
    empty: Option<Arc<Notify>>,
    /// For those who wait to come in: told when that is for nothing.
    changed: Option<Arc<Notify>>,
}

impl Shared {
    fn new(owner: impl TaskOwner, first: Option<Arc<dyn Lose>>) -> Arc<Self> {
        let (limit, state) = (OnceLock::new(), Mutex::default());
        Arc::new(Self { owner: Box::new(owner), first, limit, state })
    }

    fn admit(self: &Arc<Self>, plan: &Plan<'_>) -> Result<(Arc<Set>, Ticket, Seat), Refusal> {
        let mut seat = self.seat(plan).inspect_err(|refusal| {
            // Who waits is counted in the end.
            if matches!(refusal, Refusal::Because(_)) {
                self.owner.count_refused(plan);
            }
        })?;
        let (set, ticket) = self.owner.try_admit(plan)?;
        seat.take(&ticket.canceller(&set));
        Ok((set, ticket, seat))
    }

    fn seat(self: &Arc<Self>, plan: &Plan<'_>) -> Result<Seat, Refusal> {
        let closed = || Refusal::Because(SpawnError::Closed);
        if lock(&self.state).closed.is_some() {
            return Err(closed());
        }
        let limit = self.limit.get();
        if let Some(full) = limit.filter(|limit| !plan.take(limit)) {
            if plan.waits() {
                plan.with_hand(|hand| hand.full = Some(full.clone()));
                return Err(Refusal::Full);
            }
            return Err(Refusal::Because(SpawnError::Full));
        }
        let mut state = lock(&self.state);
        let id = state.next_id;
        state.next_id += 1;
        state.live += 1;
        let is_closed = state.closed.is_some();
        drop(state);
        // Gives back what was taken.
        let group = self.clone();
        let seat = Seat { group, id, limited: limit.is_some(), told: true, unwinding: true };
        if is_closed { Err(closed()) } else { Ok(seat) }
    }

    /// Tells all tasks but this one to end, and takes no more.
    fn cancel(&self, cause: Cause, but: Option<u64>) {
        let mut state = lock(&self.state);
        state.closed.get_or_insert(cause);
        let others = state.members.iter().filter(|(id, _)| Some(**id) != but);
        let others: Vec<_> = others.map(|(_, member)| member.clone()).collect();
        let changed = state.changed.take();
        drop(state);
        if let Some(changed) = changed {
            notify(&changed);
        }
        for member in others {
            member.cancel(cause);
        }
    }

    /// Waits until no task lives, and takes no more then.
    async fn empty(&self) {
        loop {
            let notified = {
                let mut state = lock(&self.state);
                if state.live == 0 {
                    state.closed.get_or_insert(Cause::Requested);
                    let changed = state.changed.take();
                    drop(state);
                    if let Some(changed) = changed {
                        notify(&changed);
                    }
                    return;
                }
                // Made under the lock under which the last task looks for it, so that it cannot be
                // missed.
                state.empty.get_or_insert_default().clone().notified_owned()
            };
            notified.await;
        }
    }
}

/// A task's place in its group, from before the spawn until after the last destructor.
pub(crate) struct Seat {
    group: Arc<Shared>,
    id: u64,
    /// With a permit of the group's limit.
    limited: bool,
    /// The group knows what has become of the task, or there is none yet.
    told: bool,
    /// Something else was unwinding already when the task was about to be dropped.
    unwinding: bool,
}

impl Seat {
    /// There is a task now.
    fn take(&mut self, member: &Canceller) {
        self.told = false;
        let mut state = lock(&self.group.state);
        let closed = state.closed;
        state.members.insert(self.id, member.clone());
        drop(state);
        // In between.
        if let Some(cause) = closed {
            member.cancel(cause);
        }
    }

    /// What the task is called.
    fn name(&self) -> &'static str {
        let member = lock(&self.group.state).members.get(&self.id).cloned();
        member.map_or("", |member| member.name())
    }

    /// The task has no result.
    #[cold]
    #[inline(never)]
    fn lose(&self, error: &TaskError) {
        let Some(first) = &self.group.first else { return };
        if !matches!(error, TaskError::Failed) {
            first.lose(self.name(), error.clone());
        }
        if error.is_failure() {
            self.group.cancel(Cause::Sibling, Some(self.id));
        }
    }
}

impl Drop for Seat {
    fn drop(&mut self) {
        if thread::panicking() && !self.unwinding {
            let panic = Panic::new(Box::new("a destructor of the task panicked"));
            self.lose(&TaskError::Panicked(panic));
        } else if !self.told {
            self.lose(&TaskError::Aborted(Cause::Shutdown));
        }
        // Before it is counted, as by a set.
        if let Some(limit) = self.group.limit.get().filter(|_| self.limited) {
            limit.release();
        }
        let mut state = lock(&self.group.state);
        let member = state.members.remove(&self.id);
        state.live -= 1;
        let empty = if state.live == 0 { state.empty.take() } else { None };
        drop(state);
        drop(member);
        if let Some(empty) = empty {
            notify(&empty);
        }
    }
}

pin_project! {
    /// A task of a group.
    ///
    /// It has left the group when its last destructor has run: by the drop of `seat`, which comes
    /// after that of `tracked`.
    #[must_use = "futures do nothing unless polled"]
    pub(crate) struct Grouped<F, J> {
        #[pin]
        tracked: Tracked<F>,
        seat: Seat,
        join: J,
    }

    impl<F, J> PinnedDrop for Grouped<F, J> {
        fn drop(this: Pin<&mut Self>) {
            this.project().seat.unwinding = thread::panicking();
        }
    }
}

impl<F, J> Future for Grouped<F, J>
where
    F: Future,
    J: Join<F::Output>,
{
    type Output = Result<J::Value, TaskError>;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let this = self.project();
        let seat = this.seat;
        let before = seat.limited.then(|| Level::Task.raise());
        // No guard that leaves: a task's panic does not unwind past this.
        let polled = this.tracked.poll(cx);
        if let Some(before) = before {
            Level::leave(before);
        }
        let result = ready!(polled);
        let result = result.and_then(|output| this.join.join(output, || seat.name()));
        seat.told = true;
        if let Err(error) = &result {
            seat.lose(error);
        }
        Poll::Ready(result)
    }
}
