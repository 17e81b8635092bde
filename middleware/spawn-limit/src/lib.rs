//! Bounded spawning.
//!
//! A [`SpawnLimit`] says how many tasks may exist at once, in the process and for each request. A
//! full limit refuses: whoever asked gets a [`Refused`] with a typed reason and the future that was
//! to be spawned, and can run it in place, answer 503, or leave it.
//!
//! A permit is taken before the task is spawned and comes back when the work has really ended.
//! Give a limit to `tower_task_set::TaskRegistry::limit` for all tasks of the process; clones share
//! one count.
//!
//! # Example
//!
//! ```
//! use tower_spawn_limit::{SpawnError, SpawnLimit};
//!
//! let limit = SpawnLimit::new(1);
//! let permit = limit.try_acquire()?;
//! assert_eq!(limit.try_acquire().unwrap_err(), SpawnError::Full);
//! drop(permit);
//! assert!(limit.try_acquire().is_ok());
//! # Ok::<(), SpawnError>(())
//! ```

#[cfg(feature = "axum")]
mod response;

use std::fmt;

#[cfg(loom)]
use loom::sync::{
    Arc,
    atomic::{AtomicUsize, Ordering},
};
#[cfg(not(loom))]
use std::sync::{
    Arc,
    atomic::{AtomicUsize, Ordering},
};

/// How many tasks may exist at once.
///
/// A clone is the same limit: it shares the count, not the choice of
/// [`per_request`](Self::per_request).
#[derive(Clone)]
pub struct SpawnLimit {
    count: Arc<Count>,
    per_request: usize,
}

struct Count {
    limit: usize,
    in_use: AtomicUsize,
}

impl SpawnLimit {
    /// At most `limit` tasks at once; 0 refuses all.
    ///
    /// Choose it by memory: a waiting task costs its future and some 300 bytes, and whatever it
    /// holds.
    pub fn new(limit: usize) -> Self {
        let count = Count { limit, in_use: AtomicUsize::new(0) };
        Self { count: Arc::new(count), per_request: usize::MAX }
    }

    /// At most `limit` tasks at once for each request; 0 refuses all.
    ///
    /// Choose it by what the most demanding honest request needs, so that one request cannot take
    /// what all others share.
    pub const fn per_request(mut self, limit: usize) -> Self {
        self.per_request = limit;
        self
    }

    /// How many permits there are.
    pub fn limit(&self) -> usize {
        self.count.limit
    }

    /// How many permits each request may have; `usize::MAX` if that is not limited.
    pub const fn limit_per_request(&self) -> usize {
        self.per_request
    }

    /// How many permits are taken.
    pub fn in_use(&self) -> usize {
        self.count.in_use.load(Ordering::Relaxed)
    }

    /// Takes a permit, without waiting and without allocating. What a request has is not looked
    /// at: that is known to its task set.
    ///
    /// # Errors
    ///
    /// [`SpawnError::Full`] if all are taken.
    pub fn try_acquire(&self) -> Result<Permit<'_>, SpawnError> {
        // Relaxed: the count alone is shared; it guards no other memory. The check and the
        // addition are one step, so that there are never more than `limit`.
        let more = |in_use| (in_use < self.count.limit).then(|| in_use + 1);
        match self.count.in_use.fetch_update(Ordering::Relaxed, Ordering::Relaxed, more) {
            Ok(_) => Ok(Permit { limit: self }),
            Err(_) => Err(SpawnError::Full),
        }
    }

    /// Gives back a permit that was [forgotten](Permit::forget).
    ///
    /// It cannot know which: a release too many gives back a permit that is still held, and lets
    /// one more in than the limit says. The count never goes below zero.
    pub fn release(&self) {
        let less = |in_use: usize| in_use.checked_sub(1);
        let _ = self.count.in_use.fetch_update(Ordering::Relaxed, Ordering::Relaxed, less);
    }
}

impl fmt::Debug for SpawnLimit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SpawnLimit")
            .field("limit", &self.limit())
            .field("in_use", &self.in_use())
            .field("per_request", &self.limit_per_request())
            .finish()
    }
}

/// One of a [`SpawnLimit`]'s permits, which comes back when this is dropped.
#[derive(Debug)]
#[must_use = "the permit comes back when it is dropped"]
pub struct Permit<'a> {
    limit: &'a SpawnLimit,
}

impl Permit<'_> {
    /// Keeps the permit taken until it is [released](SpawnLimit::release).
    pub fn forget(self) {
        std::mem::forget(self);
    }
}

impl Drop for Permit<'_> {
    fn drop(&mut self) {
        self.limit.release();
    }
}

/// Why a task was not spawned.
///
/// With the feature `axum` it is a response: 503 with `Retry-After`, as
/// `application/problem+json` (RFC 9457), or 500 for [`NoRuntime`](Self::NoRuntime).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum SpawnError {
    /// A limit is full.
    Full,
    /// Whoever would own the task takes no more: the response is over, or the process is about to
    /// stop.
    Closed,
    /// There is no runtime to run it, or it has been shut down.
    NoRuntime,
}

impl fmt::Display for SpawnError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Full => "the limit of tasks is reached",
            Self::Closed => "no more tasks are accepted: their request or the process is ending",
            Self::NoRuntime => "there is no Tokio runtime to run a task",
        })
    }
}

impl std::error::Error for SpawnError {}

/// A spawn that was refused: the reason, and the future as it was given. Nothing of it has run.
///
/// `?` turns it into its [`SpawnError`]. Into a boxed error it goes as that too, with
/// `map_err(SpawnError::from)`, for the future may not be `Sync`.
pub struct Refused<F> {
    /// Why.
    pub reason: SpawnError,
    /// What was to be spawned.
    pub future: F,
}

impl<F> From<Refused<F>> for SpawnError {
    fn from(refused: Refused<F>) -> Self {
        refused.reason
    }
}

// Futures are not `Debug`, and `unwrap` must compile.
impl<F> fmt::Debug for Refused<F> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Refused").field("reason", &self.reason).finish_non_exhaustive()
    }
}

impl<F> fmt::Display for Refused<F> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(&self.reason, f)
    }
}

impl<F> std::error::Error for Refused<F> {}

#[cfg(all(test, loom))]
mod loom_tests {
    use std::collections::BTreeSet;
    use std::sync::{Arc, Mutex};

    use super::*;

    #[test]
    fn two_takers_of_one_permit_never_both_have_it() {
        let seen = Arc::new(Mutex::new(BTreeSet::new()));
        let outcomes = seen.clone();
        loom::model(move || {
            let limit = SpawnLimit::new(1);
            let other = limit.clone();
            let taker =
                loom::thread::spawn(move || other.try_acquire().map(Permit::forget).is_ok());
            let mine = limit.try_acquire().map(Permit::forget).is_ok();
            let theirs = taker.join().unwrap();
            assert!(mine != theirs);
            assert_eq!(limit.in_use(), 1);
            outcomes.lock().unwrap().insert(mine);
        });
        assert_eq!(seen.lock().unwrap().len(), 2, "each must win at least once");
    }

    #[test]
    fn a_permit_that_comes_back_can_be_taken() {
        let seen = Arc::new(Mutex::new(BTreeSet::new()));
        let outcomes = seen.clone();
        loom::model(move || {
            let limit = SpawnLimit::new(1);
            limit.try_acquire().unwrap().forget();
            let other = limit.clone();
            let taker =
                loom::thread::spawn(move || other.try_acquire().map(Permit::forget).is_ok());
            limit.release();
            let taken = taker.join().unwrap();
            assert_eq!(limit.in_use(), usize::from(taken));
            outcomes.lock().unwrap().insert(taken);
        });
        assert_eq!(seen.lock().unwrap().len(), 2, "before and after must both be reached");
    }
}
