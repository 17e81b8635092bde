use std::time::Duration;

use tower_request_context::TraceId;

use super::{
    Set,
    members::{FREE, Inner, Lifetime, NONE, in_ticks},
    pause,
};
use crate::{
    AtEnd, LiveTask, Snapshot, TaskState,
    ledger::{ForcedTasks, Kind},
};

/// So many entries are read under one lock: some ten microseconds.
const PART: usize = 1024;

/// What was read of a set for a snapshot.
pub(crate) struct Reading {
    kinds: Vec<Kind>,
    /// How many tasks lived when the counts were read, if the list of them is of a time after that.
    live: Option<u32>,
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
            // One that has come since the counts were read.
            let Some(live) = live.get_mut(kind) else { continue };
            *live += 1;
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
        if let Some(all) = self.live {
            live = live_by_kind(&self.kinds, all.into());
        }
        snapshot.forced_tasks.extend(self.forced.in_request(self.trace_id));
        for (kind, live) in self.kinds.into_iter().zip(live) {
            if !kind.is_unused() {
                snapshot.add(kind.name, kind.counts(live));
            }
        }
    }
}

/// What the counts say. If that is not how many live together, the first kind shows it.
fn live_by_kind(kinds: &[Kind], all: u64) -> Vec<u64> {
    let mut live: Vec<_> = kinds.iter().map(Kind::live).collect();
    let others: u64 = live.iter().skip(1).sum();
    if let Some(first) = live.first_mut() {
        *first = all.saturating_sub(others);
    }
    live
}

impl Set {
    /// All that is known of it now. The list of many tasks is read in parts, so that few who want
    /// the lock meanwhile wait for all of it.
    pub(crate) fn read(&self) -> Reading {
        // Made before the lock is taken; a few may come in between.
        let mut tasks = Vec::with_capacity(self.len());
        let inner = self.lock();
        let kinds = inner.kinds.iter().copied().collect();
        let forced = inner.rare.as_ref().map(|rare| rare.forced.clone()).unwrap_or_default();
        let entries = inner.tasks.len();
        let live = (entries > PART).then_some(inner.live);
        self.read_part(&inner, 0, &mut tasks);
        drop(inner);
        for begin in (PART..entries).step_by(PART) {
            pause();
            self.read_part(&self.lock(), begin, &mut tasks);
        }
        let (age, trace_id) = (self.born.elapsed(), self.trace_id());
        Reading { kinds, live, tasks, forced, age, trace_id }
    }

    /// Never inlined, for a bench counts its instructions.
    #[inline(never)]
    fn read_part(&self, inner: &Inner, begin: usize, tasks: &mut Vec<ReadTask>) {
        // Nor is anything chosen for one that is spare.
        if inner.live == 0 {
            return;
        }
        let general = self.policy(inner).general().unwrap_or_default();
        // There are no more than `NONE`.
        let first = u32::try_from(begin).unwrap_or(NONE);
        for (slot, entry) in (first..).zip(inner.tasks.iter().skip(begin).take(PART)) {
            if entry.kind == FREE {
                continue;
            }
            let extra = inner.extra(slot);
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
                since: inner.since(slot),
                state,
                at_end: lifetime.map_or(chosen, |lifetime| lifetime.at_end),
                trace_id: extra.and_then(|extra| extra.trace_id),
            });
        }
    }

    /// That of the request. Not under a lock.
    pub(crate) fn trace_id(&self) -> Option<TraceId> {
        // A part of a value: the code of others.
        self.call("value", || self.context.get().copied()).flatten()
    }
}
