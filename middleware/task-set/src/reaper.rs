use std::{
    collections::BTreeMap,
    future::poll_fn,
    pin::pin,
    sync::{Arc, Mutex, MutexGuard, PoisonError, Weak},
    task::Poll,
    time::Duration,
};

use tokio::{
    runtime::Handle,
    sync::Notify,
    time::{Instant, sleep_until},
};
use tower_catch_unwind::catch;

use crate::{registry::Owner, set::Set};

/// How many tasks are told between two yields.
const BATCH: usize = 128;
/// How often the reaper looks for deadlines of sets, and for timeouts, that are further away than
/// this. Most are met before it does, and so cost next to nothing.
const ROUND: Duration = Duration::from_secs(1);

/// A runtime that tasks of a registry run on, and the one task on it, the reaper, that keeps all
/// their deadlines. It sleeps until the next one, but not for longer than a second, and is gone
/// when it then finds none.
#[derive(Debug)]
pub(crate) struct Runtime {
    pub(crate) handle: Handle,
    owner: Weak<Owner>,
    due: Mutex<Due>,
    /// There is an earlier deadline than the one that the reaper sleeps for.
    sooner: Notify,
}

#[derive(Debug, Default)]
struct Due {
    deadlines: BTreeMap<Key, (Arc<Set>, Who)>,
    next_id: u64,
    reaper: Reaper,
    /// What the reaper sleeps for, if it does.
    alarm: Option<Instant>,
    /// There may be sets with a deadline or a timeout that is far away.
    far: bool,
}

#[derive(Debug, Default, PartialEq, Eq)]
enum Reaper {
    #[default]
    Gone,
    Running,
    /// The runtime has no time driver: nothing is ever due.
    Timeless,
}

/// When, and of several that are due then, which one.
pub(crate) type Key = (Instant, u64);

/// Whose time is over.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Who {
    /// The tasks of the set that have no lifetime of their own.
    Set,
    /// The task in this slot.
    Task(u32),
    /// The response.
    Response,
}

impl Runtime {
    pub(crate) fn new(handle: Handle, owner: &Arc<Owner>) -> Self {
        Self { handle, owner: Arc::downgrade(owner), due: Mutex::default(), sooner: Notify::new() }
    }

    /// Whether it still runs tasks. Asked from outside it costs a spawn, for there is no other way
    /// to see.
    #[inline(never)]
    pub(crate) fn is_alive(&self) -> bool {
        if Handle::try_current().is_ok_and(|here| here.id() == self.handle.id()) {
            return true;
        }
        // A runtime that was shut down drops what it is given at once.
        let mut probe = self.handle.spawn(async {});
        if !probe.is_finished() {
            return true;
        }
        let mut context = std::task::Context::from_waker(std::task::Waker::noop());
        let outcome = std::pin::Pin::new(&mut probe).poll(&mut context);
        !matches!(outcome, Poll::Ready(Err(_)))
    }

    /// Notes a deadline. Called under the set's lock, so that the key is there when the task ends;
    /// [`wind`](Self::wind) afterwards.
    pub(crate) fn add(&self, at: Instant, set: &Arc<Set>, who: Who) -> Option<Key> {
        let mut due = self.lock();
        if due.reaper == Reaper::Timeless {
            return None;
        }
        due.next_id += 1;
        let key = (at, due.next_id);
        due.deadlines.insert(key, (set.clone(), who));
        Some(key)
    }

    /// Whether a deadline so far away is found by the reaper in time: [`expect`](Self::expect) it,
    /// then there is no need to [`add`](Self::add) it.
    pub(crate) fn is_far(time: Duration) -> bool {
        time > ROUND
    }

    /// Sees to it that the reaper looks for sets with a deadline that is far away.
    pub(crate) fn expect(self: &Arc<Self>) {
        let mut due = self.lock();
        due.far = true;
        self.start(due);
    }

    /// Forgets a deadline. The set lives on: the caller has it.
    pub(crate) fn remove(&self, key: Key) {
        self.lock().deadlines.remove(&key);
    }

    /// Sees to it that the reaper wakes for deadlines that were added, of which this is the first.
    pub(crate) fn wind(self: &Arc<Self>, at: Instant) {
        let due = self.lock();
        if due.alarm.is_some_and(|alarm| at < alarm) {
            drop(due);
            self.sooner.notify_one();
        } else {
            self.start(due);
        }
    }

    fn start(self: &Arc<Self>, mut due: MutexGuard<'_, Due>) {
        if due.reaper == Reaper::Gone {
            due.reaper = Reaper::Running;
            drop(due);
            // Dropped at once if the runtime is dead; then no deadline matters.
            drop(self.handle.spawn(Reap { runtime: self.clone(), retired: false }.run()));
        }
    }

    fn lock(&self) -> MutexGuard<'_, Due> {
        self.due.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The reaper.
struct Reap {
    runtime: Arc<Runtime>,
    /// It has said itself that it is gone, and another may be there by now.
    retired: bool,
}

impl Reap {
    async fn run(mut self) {
        let mut round = Instant::now() + ROUND;
        // A runtime without a time driver panics here, and there is no way to ask it. There, no
        // deadline does anything, be it over already.
        if catch(|| sleep_until(round)).is_err() {
            return self.no_time();
        }
        // What was far away when it was asked for need not be so by now.
        self.look_around(round);
        loop {
            let now = Instant::now();
            if now >= round {
                round = now + ROUND;
                self.look_around(round);
                if self.retire() {
                    return;
                }
            }
            let over = self.take_due(now);
            for (key, (set, who)) in over {
                // The set may be the last, with values of others that panic in their drop.
                drop(catch(move || set.lapse(key, who)));
            }
            let Some(alarm) = self.set_alarm(now, round) else {
                tokio::task::yield_now().await;
                continue;
            };
            let mut sleep = pin!(sleep_until(alarm));
            let mut sooner = pin!(self.runtime.sooner.notified());
            poll_fn(|cx| {
                let woken = sooner.as_mut().poll(cx).is_ready();
                if woken || sleep.as_mut().poll(cx).is_ready() {
                    return Poll::Ready(());
                }
                Poll::Pending
            })
            .await;
        }
    }

    /// Takes in the deadlines of sets that come before the next look.
    fn look_around(&self, horizon: Instant) {
        self.runtime.lock().far = false;
        let sets = self.runtime.owner.upgrade().map(|owner| owner.sets()).unwrap_or_default();
        let mut found = false;
        for set in sets {
            // As above.
            found |= catch(move || set.come_near(&self.runtime, horizon)).unwrap_or(true);
        }
        self.runtime.lock().far |= found;
    }

    /// Whether there is nothing to wait for: then it is gone.
    fn retire(&mut self) -> bool {
        let mut due = self.runtime.lock();
        if due.far || !due.deadlines.is_empty() {
            return false;
        }
        due.reaper = Reaper::Gone;
        due.alarm = None;
        self.retired = true;
        true
    }

    fn take_due(&self, now: Instant) -> Vec<(Key, (Arc<Set>, Who))> {
        let mut over = Vec::new();
        let mut due = self.runtime.lock();
        due.alarm = None;
        while let Some(entry) = due.deadlines.first_entry() {
            if entry.key().0 > now || over.len() == BATCH {
                break;
            }
            over.push(entry.remove_entry());
        }
        over
    }

    /// What to sleep for; `None` if something is due already.
    fn set_alarm(&self, now: Instant, round: Instant) -> Option<Instant> {
        let mut due = self.runtime.lock();
        let next = due.deadlines.first_key_value().map_or(round, |((at, _), _)| round.min(*at));
        due.alarm = (next > now).then_some(next);
        due.alarm
    }

    fn no_time(self) {
        tracing::warn!(
            "the runtime has no time driver (`enable_time`): tasks drain without a deadline, and \
             their timeouts do nothing"
        );
        let deadlines = {
            let mut due = self.runtime.lock();
            due.reaper = Reaper::Timeless;
            std::mem::take(&mut due.deadlines)
        };
        drop(deadlines);
    }
}

/// Dropped half-way: with its runtime.
impl Drop for Reap {
    fn drop(&mut self) {
        let mut due = self.runtime.lock();
        if !self.retired && due.reaper == Reaper::Running {
            due.reaper = Reaper::Gone;
        }
    }
}
