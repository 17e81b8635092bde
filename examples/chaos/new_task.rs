//! A task that is yet to be spawned, of whatever owner.

use std::time::Duration;

use tower_tasks::{
    SpawnError, TaskHandle, TaskRegistry,
    task_set::{GroupHandle, NewTask, StopToken},
};

use crate::plan::TaskPlan;

pub(crate) enum New<'a> {
    Set(NewTask<'a>),
    Registry(NewTask<'a, TaskRegistry>),
    Group(NewTask<'a, GroupHandle>),
}

impl New<'_> {
    /// What the plan says of how it lives.
    pub(crate) fn choose(self, plan: &TaskPlan) -> Self {
        match self {
            Self::Set(new) => Self::Set(choose(new, plan)),
            Self::Registry(new) => Self::Registry(choose(new, plan)),
            Self::Group(new) => Self::Group(choose(new, plan)),
        }
    }

    pub(crate) fn spawn<F>(self, future: F) -> Result<TaskHandle<()>, SpawnError>
    where
        F: Future<Output = ()> + Send + 'static,
    {
        match self {
            Self::Set(new) => new.spawn(future).map_err(SpawnError::from),
            Self::Registry(new) => new.spawn(future).map_err(SpawnError::from),
            Self::Group(new) => new.spawn(future).map_err(SpawnError::from),
        }
    }

    pub(crate) async fn spawn_within<F>(
        self,
        wait: Duration,
        future: F,
    ) -> Result<TaskHandle<()>, SpawnError>
    where
        F: Future<Output = ()> + Send + 'static,
    {
        match self {
            Self::Set(new) => new.within(wait).spawn(future).await.map_err(SpawnError::from),
            Self::Registry(new) => new.within(wait).spawn(future).await.map_err(SpawnError::from),
            Self::Group(new) => new.within(wait).spawn(future).await.map_err(SpawnError::from),
        }
    }

    pub(crate) fn spawn_graceful<M, F>(self, make: M) -> Result<TaskHandle<()>, SpawnError>
    where
        M: FnOnce(StopToken) -> F + Send + 'static,
        F: Future<Output = ()> + Send + 'static,
    {
        match self {
            Self::Set(new) => new.spawn_graceful(make).map_err(SpawnError::from),
            Self::Registry(new) => new.spawn_graceful(make).map_err(SpawnError::from),
            Self::Group(new) => new.spawn_graceful(make).map_err(SpawnError::from),
        }
    }

    pub(crate) fn spawn_blocking<F>(self, closure: F) -> Result<TaskHandle<()>, SpawnError>
    where
        F: FnOnce(StopToken) + Send + 'static,
    {
        match self {
            Self::Set(new) => new.spawn_blocking(closure).map_err(SpawnError::from),
            Self::Registry(new) => new.spawn_blocking(closure).map_err(SpawnError::from),
            Self::Group(new) => new.spawn_blocking(closure).map_err(SpawnError::from),
        }
    }
}

fn choose<'a, O>(mut new: NewTask<'a, O>, plan: &TaskPlan) -> NewTask<'a, O> {
    if let Some(at_end) = plan.at_end {
        new = new.at_end(at_end);
    }
    if let Some((end, lifetime)) = plan.on {
        new = new.on(end, lifetime);
    }
    if let Some(timeout) = plan.timeout {
        new = new.timeout(timeout);
    }
    new.on_panic(plan.on_panic).grace(Duration::from_millis(5))
}
