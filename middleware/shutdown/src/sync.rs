//! The parts that loom replaces in its models.

#[cfg(not(loom))]
pub(crate) use std::sync::atomic::{AtomicU64, Ordering};
#[cfg(not(loom))]
pub(crate) use tokio::sync::Notify;

#[cfg(loom)]
pub(crate) use self::model::Notify;
#[cfg(loom)]
pub(crate) use loom::sync::atomic::{AtomicU64, Ordering};

/// What tokio's `Notify` does for us, of parts that loom sees into: with the real one, which is
/// opaque to it, a model finds hangs that are none and misses some that are.
#[cfg(loom)]
mod model {
    use std::{
        pin::Pin,
        sync::PoisonError,
        task::{Context, Poll, Waker},
    };

    use loom::sync::{Mutex, MutexGuard};

    #[derive(Debug, Default)]
    pub(crate) struct Notify(Mutex<(u64, Vec<Waker>)>);

    pub(crate) struct Notified<'a> {
        notify: &'a Notify,
        generation: u64,
    }

    impl Notify {
        pub(crate) fn notified(&self) -> Notified<'_> {
            Notified { notify: self, generation: self.lock().0 }
        }

        pub(crate) fn notify_waiters(&self) {
            let mut state = self.lock();
            state.0 += 1;
            let wakers = std::mem::take(&mut state.1);
            drop(state);
            wakers.into_iter().for_each(Waker::wake);
        }

        fn lock(&self) -> MutexGuard<'_, (u64, Vec<Waker>)> {
            self.0.lock().unwrap_or_else(PoisonError::into_inner)
        }
    }

    impl Future for Notified<'_> {
        type Output = ();

        fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
            let mut state = self.notify.lock();
            if state.0 != self.generation {
                return Poll::Ready(());
            }
            state.1.push(cx.waker().clone());
            Poll::Pending
        }
    }
}
