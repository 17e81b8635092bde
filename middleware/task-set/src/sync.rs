//! The parts that loom replaces in its models.

use tower_catch_unwind::catch;

#[cfg(not(loom))]
pub(crate) use std::sync::{
    Mutex, MutexGuard,
    atomic::{AtomicBool, AtomicU8, AtomicU32, Ordering},
};
#[cfg(not(loom))]
pub(crate) use tokio::sync::{Notify, futures::OwnedNotified};

#[cfg(loom)]
pub(crate) use self::model::{Notify, OwnedNotified};
#[cfg(loom)]
pub(crate) use loom::sync::{
    Mutex, MutexGuard,
    atomic::{AtomicBool, AtomicU8, AtomicU32, Ordering},
};

/// Ours are not poisoned: no code of others runs under them.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}

/// The same where nobody else has it.
pub(crate) fn get_mut<T>(mutex: &mut Mutex<T>) -> &mut T {
    mutex.get_mut().unwrap_or_else(std::sync::PoisonError::into_inner)
}

/// Wakes all who wait. A waker is the code of others: if it panics, who tells them goes on.
pub(crate) fn notify(notify: &Notify) {
    drop(catch(|| notify.notify_waiters()));
}

/// What tokio's `Notify` does for us, of parts that loom sees into: the real one is opaque to it,
/// and a model with it finds hangs that are none and misses some that are.
#[cfg(loom)]
mod model {
    use std::{
        ops::Deref,
        pin::Pin,
        sync::Arc,
        task::{Context, Poll, Waker},
    };

    use super::{Mutex, lock};

    #[derive(Debug, Default)]
    pub(crate) struct Notify(Mutex<(u64, Vec<Waker>)>);

    pub(crate) struct Notified<N> {
        notify: N,
        generation: u64,
    }

    pub(crate) type OwnedNotified = Notified<Arc<Notify>>;

    impl Notify {
        pub(crate) fn notified(&self) -> Notified<&Self> {
            let generation = lock(&self.0).0;
            Notified { notify: self, generation }
        }

        pub(crate) fn notified_owned(self: Arc<Self>) -> Notified<Arc<Self>> {
            let generation = lock(&self.0).0;
            Notified { notify: self, generation }
        }

        pub(crate) fn notify_waiters(&self) {
            let mut state = lock(&self.0);
            state.0 += 1;
            let wakers = std::mem::take(&mut state.1);
            drop(state);
            wakers.into_iter().for_each(Waker::wake);
        }
    }

    impl<N: Deref<Target = Notify> + Unpin> Future for Notified<N> {
        type Output = ();

        fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
            let mut state = lock(&self.notify.0);
            if state.0 != self.generation {
                return Poll::Ready(());
            }
            state.1.push(cx.waker().clone());
            Poll::Pending
        }
    }
}
