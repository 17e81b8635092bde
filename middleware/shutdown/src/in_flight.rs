use tower_catch_unwind::catch;

use crate::sync::{AtomicU64, Notify, Ordering};

/// The requests in flight, and whether more may come: one word, so that each request is wholly
/// inside, and waited for, or wholly outside, and refused.
///
/// Bit 0: closed. Bits 1 to 31: how many are in flight. Above: how many have entered so far,
/// modulo 2³²: read together, the figures of a report add up.
#[derive(Debug, Default)]
pub(crate) struct InFlight {
    word: AtomicU64,
    idle: Notify,
}

/// The two figures, at one moment.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Reading {
    pub(crate) in_flight: u32,
    entered: u32,
}

impl Reading {
    /// How many have entered since `earlier`.
    pub(crate) const fn entered_since(self, earlier: Self) -> u32 {
        self.entered.wrapping_sub(earlier.entered)
    }
}

const CLOSED: u64 = 1;
const ONE: u64 = 2;
/// All but how many have entered.
const NOW: u64 = u32::MAX as u64;
const ENTERED: u64 = NOW + 1;

impl InFlight {
    /// Whether the request may; it must [leave](Self::leave) then.
    #[must_use]
    pub(crate) fn enter(&self) -> bool {
        let admit =
            |word: u64| (word & CLOSED == 0).then(|| word.wrapping_add(ONE).wrapping_add(ENTERED));
        // Acquire: whoever is refused sees what was done before the closing.
        self.word.fetch_update(Ordering::AcqRel, Ordering::Acquire, admit).is_ok()
    }

    #[cfg(test)]
    pub(crate) fn leave(&self) {
        if self.leave_silently() {
            self.tell();
        }
    }

    /// Leaves; whether the drain is to be [told](Self::tell), which wakes.
    #[must_use]
    pub(crate) fn leave_silently(&self) -> bool {
        // Release: who finds nobody in flight sees what the requests have done.
        let before = self.word.fetch_sub(ONE, Ordering::AcqRel);
        // Only who closes waits: nobody has to be told before.
        before & NOW == ONE | CLOSED
    }

    pub(crate) fn tell(&self) {
        // Wakers are the code of others.
        drop(catch(|| self.idle.notify_waiters()));
    }

    /// Lets nobody in from now on.
    pub(crate) fn close(&self) {
        if self.word.fetch_or(CLOSED, Ordering::AcqRel) & NOW == 0 {
            self.tell();
        }
    }

    pub(crate) fn read(&self) -> Reading {
        let word = self.word.load(Ordering::Acquire);
        let half = |bits: u64| u32::try_from(bits).unwrap_or(u32::MAX);
        Reading { in_flight: half((word & NOW) / ONE), entered: half(word / ENTERED) }
    }

    /// Waits until it is closed and nobody is in flight.
    pub(crate) async fn idle(&self) {
        loop {
            // First listen, then look: the last one may leave in between.
            let notified = self.idle.notified();
            if self.word.load(Ordering::Acquire) & NOW == CLOSED {
                return;
            }
            notified.await;
        }
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    #[test]
    fn the_number_of_those_who_entered_may_wrap() {
        let requests = InFlight::default();
        requests.word.store(NOW << 32, Ordering::Relaxed);
        let before = requests.read();
        assert_eq!((before.in_flight, before.entered), (0, u32::MAX));
        assert!(requests.enter() && requests.enter());
        requests.leave();
        let after = requests.read();
        assert_eq!((after.in_flight, after.entered_since(before)), (1, 2));
        requests.close();
        assert!(!requests.enter());
        assert_eq!(requests.read().entered_since(before), 2, "who is refused has not entered");
    }
}
