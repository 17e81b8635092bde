//! A task that is yet to be spawned, of whatever owner.

use tower_tasks::{
    Refused, SpawnError, TaskHandle, TaskRegistry,
    task_set::{GroupHandle, NewTask, StopToken},
};

use crate::plan::TaskPlan;

pub(crate) enum New<'a> {
    OfSet(NewTask<'a>),
    OfRegistry(NewTask<'a, TaskRegistry>),
    OfGroup(NewTask<'a, GroupHandle>),
}

impl New<'_> {
    /// What the plan says of how it lives.
    pub(crate) fn choose(self, plan: &TaskPlan) -> Self {
        match self {
            Self::OfSet(new) => Self::OfSet(choose(new, plan)),
            Self::OfRegistry(new) => Self::OfRegistry(choose(new, plan)),
            Self::OfGroup(new) => Self::OfGroup(choose(new, plan)),
        }
    }

    pub(crate) fn spawn<F>(self, future: F) -> Result<TaskHandle<()>, SpawnError>
    where
        F: Future<Output = ()> + Send + 'static,
    {
        match self {
            Self::OfSet(new) => new.spawn(future).map_err(reason),
            Self::OfRegistry(new) => new.spawn(future).map_err(reason),
            Self::OfGroup(new) => new.spawn(future).map_err(reason),
        }
    }

    pub(crate) fn spawn_graceful<M, F>(self, make: M) -> Result<TaskHandle<()>, SpawnError>
    where
        M: FnOnce(StopToken) -> F + Send + 'static,
        F: Future<Output = ()> + Send + 'static,
    {
        match self {
            Self::OfSet(new) => new.spawn_graceful(make).map_err(reason),
            Self::OfRegistry(new) => new.spawn_graceful(make).map_err(reason),
            Self::OfGroup(new) => new.spawn_graceful(make).map_err(reason),
        }
    }

    pub(crate) fn spawn_blocking<F>(self, closure: F) -> Result<TaskHandle<()>, SpawnError>
    where
        F: FnOnce(StopToken) + Send + 'static,
    {
        match self {
            Self::OfSet(new) => new.spawn_blocking(closure).map_err(reason),
            Self::OfRegistry(new) => new.spawn_blocking(closure).map_err(reason),
            Self::OfGroup(new) => new.spawn_blocking(closure).map_err(reason),
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
    new.grace(std::time::Duration::from_millis(5))
}

fn reason<F>(refused: Refused<F>) -> SpawnError {
    refused.reason
}
