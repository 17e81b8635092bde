use std::time::Duration;

use tower_request_context::TraceId;

use super::{
    Set,
    members::{FREE, Lifetime, in_ticks},
};
use crate::{
    AtEnd, LiveTask, Snapshot, TaskState,
    ledger::{ForcedTasks, Kind},
};

/// What was read of a set for a snapshot.
pub(crate) struct Reading {
    kinds: Vec<Kind>,
    tasks: Vec<ReadTask>,
    forced: ForcedTasks,
    age: Duration,
    trace_id: Option<TraceId>,
}

struct ReadTask {
    kind: u16,
    since: u32,
    state: TaskState,
    at_end: AtEnd,
    trace_id: Option<TraceId>,
}

impl Reading {
    pub(crate) fn add_to(self, snapshot: &mut Snapshot) {
        let mut live = vec![0; self.kinds.len()];
        snapshot.live_tasks.reserve(self.tasks.len());
        for task in self.tasks {
            let kind = usize::from(task.kind);
            live[kind] += 1;
            let since = in_ticks(task.since);
            snapshot.live_tasks.push(LiveTask {
                name: self.kinds[kind].name,
                site: self.kinds[kind].site,
                age: self.age.saturating_sub(since),
                state: task.state,
                trace_id: task.trace_id.or(self.trace_id),
                at_end: task.at_end,
            });
        }
        snapshot.forced_tasks.extend(self.forced.in_request(self.trace_id));
        for (kind, live) in self.kinds.into_iter().zip(live) {
            snapshot.add(kind.name, kind.counts(live));
        }
    }
}

impl Set {
    /// All that is known of it now.
    pub(crate) fn read(&self) -> Reading {
        // Made before the lock is taken; a few may come in between.
        let mut tasks = Vec::with_capacity(self.len());
        let inner = self.lock();
        let general = self.policy(&inner).general().unwrap_or_default();
        for (slot, entry) in (0..).zip(&inner.tasks) {
            if entry.kind == FREE {
                continue;
            }
            let extra = inner.extras.get(slot);
            let own = extra.filter(|extra| extra.has_own_lifetime());
            let lifetime = match own {
                Some(own) => own.lifetime,
                None => inner.lifetime,
            };
            let chosen = own.and_then(|own| own.policy.as_ref()?.general()).unwrap_or(general);
            let state = match lifetime {
                _ if inner.is_told(slot) => TaskState::Cancelling,
                None => TaskState::Running,
                Some(Lifetime { at_end: AtEnd::Keep, .. }) => TaskState::Kept,
                Some(_) => TaskState::Draining,
            };
            tasks.push(ReadTask {
                kind: entry.kind,
                since: entry.since,
                state,
                at_end: lifetime.map_or(chosen, |lifetime| lifetime.at_end),
                trace_id: extra.and_then(|extra| extra.trace_id),
            });
        }
        let kinds = inner.kinds.to_vec();
        let forced = inner.rare.as_ref().map(|rare| rare.forced.clone()).unwrap_or_default();
        drop(inner);
        Reading { kinds, tasks, forced, age: self.born.elapsed(), trace_id: self.trace_id() }
    }

    /// That of the request. Not under a lock.
    pub(crate) fn trace_id(&self) -> Option<TraceId> {
        // A part of a value: the code of others.
        self.call("value", || self.context.get().copied()).flatten()
    }
}
