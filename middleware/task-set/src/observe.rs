use std::{panic::Location, time::Duration};

use crate::Outcome;

/// Sees the start and the end of every task of a registry: what metrics are made of.
///
/// Closures `Fn(&TaskEvent)` are this. It is called on the thread that spawns or ends the task, so
/// it must not block. The ledger counts an end just after its observer was told. If it panics, the
/// panic is contained and logged.
pub trait Observe: Send + Sync + 'static {
    /// A task has started or ended.
    fn observe(&self, event: &TaskEvent);
}

impl<F> Observe for F
where
    F: Fn(&TaskEvent) + Send + Sync + 'static,
{
    fn observe(&self, event: &TaskEvent) {
        self(event);
    }
}

/// What an [`Observe`]r is told.
#[derive(Clone, Copy, Debug)]
#[non_exhaustive]
pub enum TaskEvent {
    /// A task was accepted, and is about to be spawned.
    #[non_exhaustive]
    Started {
        /// The name that it was given; `other`, of more than 65,534 with their places in one request.
        name: &'static str,
        /// Where it was spawned.
        site: &'static Location<'static>,
    },
    /// A task has ended, and its destructors have run.
    #[non_exhaustive]
    Ended {
        /// As at its start.
        name: &'static str,
        /// Where it was spawned.
        site: &'static Location<'static>,
        /// How it ended.
        outcome: Outcome,
        /// How long it lived.
        elapsed: Duration,
    },
}
