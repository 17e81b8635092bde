use std::{mem, panic::Location, sync::Mutex, time::Duration};

use tower_spawn_limit::{Level, Permit, Refused, SpawnError, within};

use crate::{
    GroupHandle, Join, NewTask, StopToken, TaskHandle,
    set::Refusal,
    task::{Blocking, Graceful},
    task_set::{Plan, TaskOwner},
};

/// A task that is yet to be spawned, and waits for its place if there is none: see
/// [`NewTask::within`].
#[derive(Clone, Debug)]
#[must_use = "nothing is spawned yet"]
pub struct Within<'a, O> {
    task: NewTask<'a, O>,
    wait: Duration,
}

impl<'a, O> Within<'a, O> {
    pub(crate) const fn new(task: NewTask<'a, O>, wait: Duration) -> Self {
        Self { task, wait }
    }

    /// What follows may be polled elsewhere than where it was called.
    fn wait_from_here(&self) -> Duration {
        if Level::current() == Level::Task { Duration::ZERO } else { self.wait }
    }
}

#[expect(private_bounds, reason = "nobody else owns tasks")]
impl<O: TaskOwner> Within<'_, O> {
    /// Spawns it.
    ///
    /// # Errors
    ///
    /// As [`TaskSet::spawn`](crate::TaskSet::spawn).
    ///
    /// # Cancel safety
    ///
    /// Dropping it drops the future, of which nothing has run, and gives up the place in the line.
    /// One that is neither polled nor dropped keeps its place, and the permit when it comes.
    #[track_caller]
    pub fn spawn<F>(
        self,
        future: F,
    ) -> impl Future<Output = Result<TaskHandle<F::Output>, Refused<F>>> + Send
    where
        F: Future + Send + 'static,
        F::Output: Send + 'static,
    {
        let (wait, site) = (self.wait_from_here(), Location::caller());
        let (owner, task) = (self.task.owner, self.task);
        async move {
            match admit(owner, task.plan(site), wait).await {
                Ok((set, ticket)) => Ok(set.spawn(ticket, ticket.track(&set, future))),
                Err(reason) => Err(Refused { reason, future }),
            }
        }
    }

    /// Spawns it as a graceful task: see
    /// [`TaskSet::spawn_graceful`](crate::TaskSet::spawn_graceful).
    ///
    /// # Errors
    ///
    /// As [`TaskSet::spawn`](crate::TaskSet::spawn); the closure comes back.
    ///
    /// # Cancel safety
    ///
    /// As [`spawn`](Self::spawn).
    #[track_caller]
    pub fn spawn_graceful<M, F>(
        self,
        make: M,
    ) -> impl Future<Output = Result<TaskHandle<F::Output>, Refused<M>>> + Send
    where
        M: FnOnce(StopToken) -> F + Send + 'static,
        F: Future + Send + 'static,
        F::Output: Send + 'static,
    {
        let (wait, site) = (self.wait_from_here(), Location::caller());
        let (owner, mut task) = (self.task.owner, self.task);
        async move {
            let (plan, stop) = task.plan_with_stop(site, false);
            match admit(owner, plan, wait).await {
                Ok((set, ticket)) => {
                    let work = ticket.track(&set, Graceful::new(make, stop));
                    Ok(set.spawn(ticket, work))
                }
                Err(reason) => Err(Refused { reason, future: make }),
            }
        }
    }

    /// Spawns it as a closure that may block: see
    /// [`TaskSet::spawn_blocking`](crate::TaskSet::spawn_blocking).
    ///
    /// # Errors
    ///
    /// As [`TaskSet::spawn`](crate::TaskSet::spawn); the closure comes back.
    ///
    /// # Panics
    ///
    /// As [`TaskSet::spawn_blocking`](crate::TaskSet::spawn_blocking).
    ///
    /// # Cancel safety
    ///
    /// As [`spawn`](Self::spawn).
    #[track_caller]
    pub fn spawn_blocking<F, T>(
        self,
        closure: F,
    ) -> impl Future<Output = Result<TaskHandle<T>, Refused<F>>> + Send
    where
        F: FnOnce(StopToken) -> T + Send + 'static,
        T: Send + 'static,
    {
        let (wait, site) = (self.wait_from_here(), Location::caller());
        let (owner, mut task) = (self.task.owner, self.task);
        async move {
            let (plan, stop) = task.plan_with_stop(site, true);
            match admit(owner, plan, wait).await {
                Ok((set, ticket)) => {
                    let work = ticket.track(&set, Blocking::new(closure, stop));
                    Ok(set.spawn_blocking(ticket, work))
                }
                Err(reason) => Err(Refused { reason, future: closure }),
            }
        }
    }
}

/// Into a group. It waits for the group's limit too, and gives up when the group ends.
impl<J: Sync> Within<'_, GroupHandle<J>> {
    /// Spawns it.
    ///
    /// # Errors
    ///
    /// As [`GroupHandle::spawn`].
    ///
    /// # Cancel safety
    ///
    /// Dropping it drops the future, of which nothing has run, and gives up the place in the line.
    /// One that is neither polled nor dropped keeps its place, and the permit when it comes.
    #[track_caller]
    pub fn spawn<F>(
        self,
        future: F,
    ) -> impl Future<Output = Result<TaskHandle<J::Value>, Refused<F>>> + Send
    where
        F: Future + Send + 'static,
        J: Join<F::Output>,
    {
        let (wait, site) = (self.wait_from_here(), Location::caller());
        let (owner, task) = (self.task.owner, self.task);
        async move {
            match admit(owner, task.plan(site), wait).await {
                Ok((set, ticket, seat)) => {
                    let work = owner.work(ticket.track(&set, future), seat);
                    Ok(set.spawn(ticket, work))
                }
                Err(reason) => Err(Refused { reason, future }),
            }
        }
    }

    /// Spawns it as a graceful task: see
    /// [`TaskSet::spawn_graceful`](crate::TaskSet::spawn_graceful).
    ///
    /// # Errors
    ///
    /// As [`GroupHandle::spawn`]; the closure comes back.
    ///
    /// # Cancel safety
    ///
    /// As [`spawn`](Self::spawn).
    #[track_caller]
    pub fn spawn_graceful<M, F>(
        self,
        make: M,
    ) -> impl Future<Output = Result<TaskHandle<J::Value>, Refused<M>>> + Send
    where
        M: FnOnce(StopToken) -> F + Send + 'static,
        F: Future + Send + 'static,
        J: Join<F::Output>,
    {
        let (wait, site) = (self.wait_from_here(), Location::caller());
        let (owner, mut task) = (self.task.owner, self.task);
        async move {
            let (plan, stop) = task.plan_with_stop(site, false);
            match admit(owner, plan, wait).await {
                Ok((set, ticket, seat)) => {
                    let tracked = ticket.track(&set, Graceful::new(make, stop));
                    let work = owner.work(tracked, seat);
                    Ok(set.spawn(ticket, work))
                }
                Err(reason) => Err(Refused { reason, future: make }),
            }
        }
    }

    /// Spawns it as a closure that may block: see
    /// [`TaskSet::spawn_blocking`](crate::TaskSet::spawn_blocking).
    ///
    /// # Errors
    ///
    /// As [`GroupHandle::spawn`]; the closure comes back.
    ///
    /// # Panics
    ///
    /// As [`TaskSet::spawn_blocking`](crate::TaskSet::spawn_blocking).
    ///
    /// # Cancel safety
    ///
    /// As [`spawn`](Self::spawn).
    #[track_caller]
    pub fn spawn_blocking<F, T>(
        self,
        closure: F,
    ) -> impl Future<Output = Result<TaskHandle<J::Value>, Refused<F>>> + Send
    where
        F: FnOnce(StopToken) -> T + Send + 'static,
        T: 'static,
        J: Join<T>,
    {
        let (wait, site) = (self.wait_from_here(), Location::caller());
        let (owner, mut task) = (self.task.owner, self.task);
        async move {
            let (plan, stop) = task.plan_with_stop(site, true);
            match admit(owner, plan, wait).await {
                Ok((set, ticket, seat)) => {
                    let tracked = ticket.track(&set, Blocking::new(closure, stop));
                    let work = owner.work(tracked, seat);
                    Ok(set.spawn_blocking(ticket, work))
                }
                Err(reason) => Err(Refused { reason, future: closure }),
            }
        }
    }
}

/// Where one can wait for a place.
pub(crate) trait Line {
    type Place;

    /// Nothing is counted where a limit is full.
    fn try_enter(&self, plan: &Plan<'_>) -> Result<Self::Place, Refusal>;

    /// Until it may refuse what it does not refuse now. Listens from now on.
    fn changed(&self) -> impl Future<Output = ()> + Send;

    fn count_refused(&self, plan: &Plan<'_>);
}

pub(crate) async fn admit<L: Line>(
    line: &L,
    plan: Plan<'_>,
    wait: Duration,
) -> Result<L::Place, SpawnError> {
    let hand = Mutex::default();
    let plan = Plan { hand: Some(&hand), ..plan };
    let attempt = |permit: &mut Option<Permit>| {
        plan.with_hand(|hand| hand.permit = permit.take());
        let entered = line.try_enter(&plan);
        let hand = plan.with_hand(mem::take);
        *permit = hand.permit;
        match (entered, hand.full) {
            (Err(Refusal::Full), Some(limit)) => Err(limit),
            (entered, _) => Ok(entered.map_err(Refusal::reason)),
        }
    };
    let admitted = within(wait, || line.changed(), attempt).await;
    admitted.unwrap_or_else(|| {
        line.count_refused(&plan);
        Err(SpawnError::Full)
    })
}
