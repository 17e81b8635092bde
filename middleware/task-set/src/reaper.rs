use std::{
    collections::BTreeMap,
    sync::{Arc, PoisonError},
    time::Duration,
};

use tokio::{
    runtime::Handle,
    sync::Notify,
    time::{Instant, sleep_until},
};
use tower_catch_unwind::catch;

use crate::set::Set;

/// How many tasks are told between two yields.
const BATCH: usize = 128;
/// How long the reaper stays without a deadline. Most deadlines are met, and to be gone at once
/// would cost the next request a spawn.
const LINGER: Duration = Duration::from_secs(1);

/// A runtime that tasks of a registry run on, and the one task on it, the reaper, that keeps all
/// their deadlines. It sleeps until the next one, and is gone soon after there is none.
#[derive(Debug)]
pub(crate) struct Runtime {
    pub(crate) handle: Handle,
    due: std::sync::Mutex<Due>,
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
}

impl Runtime {
    pub(crate) fn new(handle: Handle) -> Self {
        Self { handle, due: std::sync::Mutex::default(), sooner: Notify::new() }
    }

    /// Whether it still runs tasks. Asked from outside it costs a spawn, for there is no other way
    /// to see.
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
        !matches!(outcome, std::task::Poll::Ready(Err(_)))
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

    /// Forgets a deadline. The set lives on: the caller has it.
    pub(crate) fn remove(&self, key: Key) {
        self.lock().deadlines.remove(&key);
    }

    /// Sees to it that somebody waits for the deadline of this key.
    pub(crate) fn wind(self: &Arc<Self>, key: Key) {
        let mut due = self.lock();
        match due.reaper {
            Reaper::Gone => {
                due.reaper = Reaper::Running;
                drop(due);
                // Dropped at once if the runtime is dead; then no deadline matters.
                let reap = Reap { runtime: self.clone(), retired: false }.run();
                drop(self.handle.spawn(reap));
            }
            Reaper::Running if due.alarm.is_some_and(|alarm| key.0 < alarm) => {
                drop(due);
                self.sooner.notify_one();
            }
            Reaper::Running | Reaper::Timeless => {}
        }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Due> {
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
        let mut idle_since = None;
        loop {
            let now = Instant::now();
            let mut over = Vec::new();
            let alarm = {
                let mut due = self.runtime.lock();
                while let Some(entry) = due.deadlines.first_entry() {
                    if entry.key().0 > now || over.len() == BATCH {
                        break;
                    }
                    over.push(entry.remove_entry());
                }
                let next = due.deadlines.first_key_value().map(|((at, _), _)| *at);
                due.alarm = over.is_empty().then(|| {
                    idle_since = next.is_none().then(|| idle_since.unwrap_or(now));
                    next.map_or(now + LINGER, |next| next.min(now + LINGER))
                });
                if idle_since.is_some_and(|since| now >= since + LINGER) {
                    due.reaper = Reaper::Gone;
                    self.retired = true;
                    return;
                }
                due.alarm
            };
            if let Some(alarm) = alarm {
                // A runtime without a time driver panics here, and there is no way to ask it.
                let Ok(sleep) = catch(|| sleep_until(alarm)) else {
                    return self.no_time();
                };
                let mut sleep = std::pin::pin!(sleep);
                let mut sooner = std::pin::pin!(self.runtime.sooner.notified());
                std::future::poll_fn(|cx| {
                    let woken = sooner.as_mut().poll(cx).is_ready();
                    if woken || sleep.as_mut().poll(cx).is_ready() {
                        return std::task::Poll::Ready(());
                    }
                    std::task::Poll::Pending
                })
                .await;
            } else {
                for (key, (set, who)) in over {
                    set.lapse(key, who);
                }
                tokio::task::yield_now().await;
            }
        }
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
