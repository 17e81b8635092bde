use std::task::Poll;

use crate::sync::{AtomicU32, Ordering};

/// How many polls of tasks are going on, in two rounds: those that had begun when somebody asked
/// whether they are over, and those that began since. So whoever asks waits for no poll that began
/// later, however many come.
///
/// In one word: the polls of either round in 15 bits each, which round they join now, and whether
/// somebody waits for the other. There are no more polls at a time than threads, or nested calls on
/// their stacks.
#[derive(Debug, Default)]
pub(crate) struct Polls(AtomicU32);

/// Which round a poll has joined.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Round(bool);

/// The bits of [`Polls`] that are counts.
const COUNTS: u32 = !(SECOND | ASKED);
/// The second round is joined now, and not the first.
const SECOND: u32 = 1 << 15;
/// Somebody waits for the round that is not joined now.
const ASKED: u32 = 1 << 31;

impl Round {
    /// The one that is joined now.
    const fn now(polls: u32) -> Self {
        Self(polls & SECOND != 0)
    }

    const fn other(self) -> Self {
        Self(!self.0)
    }

    /// One poll in it.
    const fn one(self) -> u32 {
        if self.0 { 1 << 16 } else { 1 }
    }

    const fn is_empty(self, polls: u32) -> bool {
        polls & ((SECOND - 1) * self.one()) == 0
    }
}

impl Polls {
    /// A poll begins.
    pub(crate) fn begin(&self) -> Round {
        let join = |polls| Some(polls + Round::now(polls).one());
        let joined = self.0.fetch_update(Ordering::Relaxed, Ordering::Relaxed, join);
        Round::now(joined.unwrap_or_else(|polls| polls))
    }

    /// It has ended: whether somebody waited for it, and for no other.
    #[must_use]
    pub(crate) fn end(&self, round: Round) -> bool {
        // Whoever sees it ended sees what it did.
        let polls = self.0.fetch_sub(round.one(), Ordering::Release) - round.one();
        polls & ASKED != 0 && round != Round::now(polls) && round.is_empty(polls)
    }

    /// Whether all polls are over that had begun when this was asked first. The next after it was
    /// ready asks anew.
    ///
    /// By one at a time, who sees by other means what a poll has done so far.
    pub(crate) fn ask(&self) -> Poll<()> {
        let mut polls = self.0.load(Ordering::Acquire);
        if polls & COUNTS == 0 && polls & ASKED == 0 {
            return Poll::Ready(());
        }
        if polls & ASKED == 0 {
            polls = self.0.fetch_xor(SECOND | ASKED, Ordering::Acquire) ^ (SECOND | ASKED);
        }
        if !Round::now(polls).other().is_empty(polls) {
            return Poll::Pending;
        }
        self.0.fetch_and(!ASKED, Ordering::Relaxed);
        Poll::Ready(())
    }

    /// Whether somebody waits.
    pub(crate) fn is_asked(&self) -> bool {
        self.0.load(Ordering::Relaxed) & ASKED != 0
    }

    /// Whether no poll is going on.
    pub(crate) fn are_none(&self) -> bool {
        self.0.load(Ordering::Acquire) & COUNTS == 0
    }
}
