use std::{
    mem,
    sync::{Mutex, PoisonError},
    time::{Duration, Instant},
};

use tracing::field;

use crate::{Panic, answer::Seen, catch};

/// Tells of each panic, but of no more than so many in a second.
///
/// `tower-task-set` tells of the panics of tasks in events of its own.
#[doc(hidden)]
#[derive(Debug)]
pub struct Log {
    per_second: u32,
    window: Mutex<Window>,
}

#[derive(Debug)]
struct Window {
    since: Option<Instant>,
    told: u32,
    /// Since the last event.
    suppressed: u64,
}

impl Log {
    pub const fn new(per_second: u32) -> Self {
        let window = Window { since: None, told: 0, suppressed: 0 };
        Self { per_second, window: Mutex::new(window) }
    }

    /// Calls a callback of the user's. A panic in it is told and goes no further.
    #[inline]
    pub fn call<R>(&self, callback: &'static str, f: impl FnOnce() -> R) -> Option<R> {
        catch(f).map_err(|panic| self.tell_callback(panic, callback)).ok()
    }

    /// With the ids of the current request, if it has none.
    #[cold]
    pub fn tell_callback(&self, panic: Panic, callback: &'static str) {
        let Some(suppressed) = self.admit() else { return };
        let panic = panic.here();
        // The subscriber is the code of others.
        drop(catch(|| {
            tracing::error!(
                panic = panic.message(),
                location = panic.location().map(field::display),
                callback,
                thread = panic.thread(),
                trace_id = panic.trace_id().map(field::display),
                request_id = panic.request_id().map(field::display),
                suppressed,
                "callback panicked"
            );
        }));
    }

    /// Tells of a panic `during` this. Never panics.
    #[cold]
    pub(crate) fn tell(&self, panic: &Panic, during: &'static str, seen: Option<&Seen>) {
        let Some(suppressed) = self.admit() else { return };
        let path = seen.and_then(Seen::path);
        // The subscriber is the code of others.
        drop(catch(|| {
            tracing::error!(
                panic = panic.message(),
                location = panic.location().map(field::display),
                during,
                thread = panic.thread(),
                trace_id = panic.trace_id().map(field::display),
                request_id = panic.request_id().map(field::display),
                method = seen.and_then(Seen::method),
                path = path.as_deref(),
                suppressed,
                "request panicked"
            );
        }));
    }

    /// Runs `f`, which drops a `T` of the user's. A panic in it is told and goes no further.
    pub(crate) fn contain<T>(&self, during: &'static str, seen: Option<&Seen>, f: impl FnOnce()) {
        if !mem::needs_drop::<T>() {
            f();
        } else if let Err(panic) = catch(f) {
            self.tell(&panic, during, seen);
        }
    }

    /// Whether there may be an event, and then how many panics nobody was told of before, if there
    /// were any.
    pub fn admit(&self) -> Option<Option<u64>> {
        let suppressed = self.admit_at(Instant::now())?;
        Some((suppressed != 0).then_some(suppressed))
    }

    fn admit_at(&self, now: Instant) -> Option<u64> {
        let mut window = self.window.lock().unwrap_or_else(PoisonError::into_inner);
        let age = window.since.map(|since| now.saturating_duration_since(since));
        if age.is_none_or(|age| age >= Duration::from_secs(1)) {
            window.since = Some(now);
            window.told = 0;
        }
        if window.told < self.per_second {
            window.told += 1;
            Some(mem::take(&mut window.suppressed))
        } else {
            window.suppressed += 1;
            None
        }
    }
}

/// Tells of at most 20 panics in a second.
impl Default for Log {
    fn default() -> Self {
        Self::new(20)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_flood_is_told_of_so_many_times_a_second_and_the_rest_is_counted() {
        let log = Log::new(2);
        let start = Instant::now();
        let at = |ms| log.admit_at(start + Duration::from_millis(ms));
        assert_eq!([at(0), at(1), at(2), at(999)], [Some(0), Some(0), None, None]);
        assert_eq!([at(1000), at(1001), at(1002)], [Some(2), Some(0), None]);
        // However long the silence was.
        assert_eq!([at(9000), at(9001), at(9002)], [Some(1), Some(0), None]);
    }

    #[test]
    fn a_limit_of_zero_tells_nothing() {
        assert_eq!(Log::new(0).admit(), None);
    }
}
