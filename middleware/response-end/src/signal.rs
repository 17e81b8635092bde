#[cfg(not(loom))]
use std::sync::{
    Mutex, MutexGuard,
    atomic::{AtomicBool, Ordering},
};
use std::{
    fmt, mem,
    num::NonZeroU32,
    sync::{
        Arc, PoisonError,
        atomic::{AtomicU16, Ordering::Relaxed},
    },
    task::{Context, Poll, Waker},
};

#[cfg(loom)]
use loom::sync::{
    Mutex, MutexGuard,
    atomic::{AtomicBool, Ordering},
};
use tower_catch_unwind::catch;

/// An event that all responses of a layer wait for, and that comes once: see
/// [Ending a response](crate#ending-a-response).
///
/// A clone is the same event. To wait for it costs no allocation beyond the first so many that
/// wait at once.
#[derive(Clone, Default)]
pub struct Signal(Arc<Shared>);

impl Signal {
    /// One that has not been given.
    pub fn new() -> Self {
        Self::default()
    }

    /// Gives it: whoever waits is woken.
    pub fn give(&self) {
        self.0.given.store(true, Ordering::Release);
        for shard in &self.0.shards {
            let wakers = mem::take(&mut shard.lock().wakers);
            // Not under the lock, and each for itself: wakers are the code of others.
            wakers.into_iter().flatten().for_each(|waker| drop(catch(|| waker.wake())));
        }
    }

    /// Whether it was given.
    pub fn is_given(&self) -> bool {
        self.0.given.load(Ordering::Acquire)
    }

    /// What one response waits with.
    pub fn waiter(&self) -> Waiter {
        Waiter { signal: self.clone(), place: None }
    }
}

impl fmt::Debug for Signal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Signal").field("is_given", &self.is_given()).finish_non_exhaustive()
    }
}

/// Waits for a [`Signal`], on one task at a time. Can be moved between two polls.
pub struct Waiter {
    signal: Signal,
    /// Of its waker.
    place: Option<Place>,
}

/// The shard, and which one in it, from 1 on. 8 bytes, `None` too, for each response has one.
type Place = (u16, NonZeroU32);

impl Waiter {
    /// Whether the signal was given; if not, wakes `cx` when it is.
    pub fn poll_given(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        if self.signal.is_given() {
            return Poll::Ready(());
        }
        self.register(cx);
        // Again: it may have been given before it knew this waker.
        if self.signal.is_given() { Poll::Ready(()) } else { Poll::Pending }
    }

    fn register(&mut self, cx: &Context<'_>) {
        if let Some((shard, number)) = self.place {
            let wakers = self.shard(shard).lock();
            if wakers.get(number).is_none_or(|waker| waker.will_wake(cx.waker())) {
                return;
            }
        }
        // Wakers are the code of others: cloned and dropped outside of the lock.
        let waker = cx.waker().clone();
        let shard = self.place.map_or_else(this_shard, |(shard, _)| shard);
        let mut wakers = self.shard(shard).lock();
        let number = self.place.map_or_else(|| wakers.take_place(), |(_, number)| number);
        let unneeded = match wakers.place(number) {
            Some(place) => place.replace(waker),
            None => Some(waker),
        };
        drop(wakers);
        drop(unneeded);
        self.place = Some((shard, number));
    }

    fn shard(&self, shard: u16) -> &Shard {
        &self.signal.0.shards[usize::from(shard)]
    }
}

impl Drop for Waiter {
    fn drop(&mut self) {
        let Some((shard, number)) = self.place else { return };
        let waker = self.shard(shard).lock().free(number);
        drop(waker);
    }
}

impl fmt::Debug for Waiter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Waiter").field("signal", &self.signal).finish_non_exhaustive()
    }
}

/// One lock would be taken by every response that waits for anything.
const SHARDS: u16 = if cfg!(loom) { 1 } else { 8 };

#[derive(Default)]
struct Shared {
    given: AtomicBool,
    shards: [Shard; SHARDS as usize],
}

/// Apart by a cache line or two.
#[derive(Default)]
#[repr(align(128))]
struct Shard(Mutex<Wakers>);

impl Shard {
    fn lock(&self) -> MutexGuard<'_, Wakers> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Empty, and of no use any more, once the signal was given.
#[derive(Default)]
struct Wakers {
    wakers: Vec<Option<Waker>>,
    free: Vec<NonZeroU32>,
}

impl Wakers {
    fn take_place(&mut self) -> NonZeroU32 {
        self.free.pop().unwrap_or_else(|| {
            self.wakers.push(None);
            let number = u32::try_from(self.wakers.len()).ok().and_then(NonZeroU32::new);
            // There are no 4 billion responses.
            number.unwrap_or(NonZeroU32::MAX)
        })
    }

    fn get(&self, number: NonZeroU32) -> Option<&Waker> {
        self.wakers.get(number.get() as usize - 1)?.as_ref()
    }

    fn place(&mut self, number: NonZeroU32) -> Option<&mut Option<Waker>> {
        self.wakers.get_mut(number.get() as usize - 1)
    }

    fn free(&mut self, number: NonZeroU32) -> Option<Waker> {
        self.free.push(number);
        self.place(number)?.take()
    }
}

/// By thread, so that threads meet at different locks.
fn this_shard() -> u16 {
    static NEXT: AtomicU16 = AtomicU16::new(0);
    thread_local! {
        static SHARD: u16 = NEXT.fetch_add(1, Relaxed) % SHARDS;
    }
    SHARD.try_with(|shard| *shard).unwrap_or(0)
}

#[cfg(all(test, loom))]
mod loom_tests {
    use std::{collections::HashSet, sync::atomic::AtomicBool as StdBool, task::Wake};

    use loom::thread;

    use super::*;

    #[derive(Default)]
    struct Woken(StdBool);

    impl Wake for Woken {
        fn wake(self: Arc<Self>) {
            self.0.store(true, std::sync::atomic::Ordering::SeqCst);
        }
    }

    #[test]
    fn a_signal_that_races_the_polls_is_seen_or_wakes() {
        let reached = Arc::new(std::sync::Mutex::new(HashSet::new()));
        let reach = reached.clone();
        loom::model(move || {
            let signal = Signal::new();
            let other = signal.clone();
            let other = thread::spawn(move || other.give());
            let woken = Arc::new(Woken::default());
            let waker = woken.clone().into();
            let cx = &mut Context::from_waker(&waker);
            let mut waiter = signal.waiter();
            // The first registers the waker, the second finds that it is there.
            let seen = [waiter.poll_given(cx).is_ready(), waiter.poll_given(cx).is_ready()];
            other.join().unwrap();
            let woken = woken.0.load(std::sync::atomic::Ordering::SeqCst);
            assert!(seen[1] || woken, "lost");
            assert!(waiter.poll_given(cx).is_ready());
            reach.lock().unwrap().insert(seen);
        });
        let expected = [[true, true], [false, true], [false, false]];
        assert_eq!(*reached.lock().unwrap(), expected.into());
    }

    #[test]
    fn a_signal_that_races_a_drop_wakes_the_other_who_waits() {
        loom::model(|| {
            let signal = Signal::new();
            let (stays, goes) = (Arc::new(Woken::default()), Arc::new(Woken::default()));
            let mut waiters = [signal.waiter(), signal.waiter()];
            for (waiter, woken) in waiters.iter_mut().zip([&goes, &stays]) {
                let waker = woken.clone().into();
                assert!(waiter.poll_given(&mut Context::from_waker(&waker)).is_pending());
            }
            let [gone, _stays] = waiters;
            let other = thread::spawn(move || drop(gone));
            signal.give();
            other.join().unwrap();
            assert!(stays.0.load(std::sync::atomic::Ordering::SeqCst), "lost");
        });
    }
}
