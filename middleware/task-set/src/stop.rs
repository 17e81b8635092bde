use std::{fmt, sync::Arc};

use tokio_util::sync::CancellationToken;
use tower_catch_unwind::catch;

use crate::{
    Cause,
    sync::{AtomicBool, Mutex, Notify, Ordering, lock, notify},
};

/// Says to a graceful task or a blocking closure that it should end, and why.
///
/// A handle, and no owner: a clone says the same, and dropping it changes nothing. It may go to
/// helpers on other tasks or threads. After the end of its task it says what it said before.
#[derive(Clone)]
pub struct StopToken(Arc<Stop>);

impl StopToken {
    /// Waits until the task is told to end, and yields why.
    ///
    /// # Cancel safety
    ///
    /// Cancel safe: it only watches, and what was told stays told.
    pub async fn cancelled(&self) -> Cause {
        loop {
            // Listens, and then looks: what is told in between is not missed.
            let notified = self.0.notify.notified();
            if let Some(cause) = self.cause() {
                return cause;
            }
            notified.await;
        }
    }

    /// Whether the task was told to end. Cheap enough for each round of a loop.
    pub fn is_cancelled(&self) -> bool {
        self.0.told.load(Ordering::Relaxed)
    }

    /// Why the task was told to end, if it was.
    pub fn cause(&self) -> Option<Cause> {
        // Relaxed, for what counts is read under the lock. Who was woken sees it: the notification
        // came after it.
        if self.is_cancelled() { lock(&self.0.state).cause } else { None }
    }

    /// The same for code that takes a [`CancellationToken`]: cancelled when the task is told to
    /// end. It is made when first asked for. To cancel it cancels nothing of the task.
    pub fn cancellation_token(&self) -> CancellationToken {
        let mut state = lock(&self.0.state);
        if state.cause.is_none() {
            return state.token.get_or_insert_default().clone();
        }
        drop(state);
        let token = CancellationToken::new();
        token.cancel();
        token
    }

    pub(crate) const fn new(stop: Arc<Stop>) -> Self {
        Self(stop)
    }
}

impl fmt::Debug for StopToken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("StopToken").field("cause", &self.cause()).finish()
    }
}

/// What a set and the [`StopToken`]s of one of its tasks share.
#[derive(Default)]
pub(crate) struct Stop {
    /// Set after the cause: so that to look costs no lock while there is nothing to see.
    told: AtomicBool,
    state: Mutex<State>,
    notify: Notify,
}

#[derive(Default)]
struct State {
    cause: Option<Cause>,
    token: Option<CancellationToken>,
}

impl Stop {
    /// Tells it, once. Wakes: not to be called under a lock.
    pub(crate) fn tell(&self, cause: Cause) {
        let mut state = lock(&self.state);
        if state.cause.is_some() {
            return;
        }
        state.cause = Some(cause);
        let token = state.token.take();
        drop(state);
        self.told.store(true, Ordering::Relaxed);
        notify(&self.notify);
        if let Some(token) = token {
            // It wakes too.
            drop(catch(|| token.cancel()));
        }
    }
}

impl fmt::Debug for Stop {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Stop").finish_non_exhaustive()
    }
}
