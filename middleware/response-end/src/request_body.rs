#[cfg(not(loom))]
use std::sync::Mutex;
use std::{
    pin::Pin,
    sync::{Arc, PoisonError},
    task::{Context, Poll, Waker},
};

#[cfg(loom)]
use loom::sync::Mutex;

use http_body::{Body, Frame, SizeHint};
use pin_project_lite::pin_project;
use tower_catch_unwind::catch;

pin_project! {
    /// A request's body that is watched for an error of reading it: see
    /// [`watch_request_body`](crate::ResponseEndLayer::watch_request_body).
    #[derive(Debug)]
    pub struct RequestBody<B> {
        #[pin]
        inner: B,
        upload: Upload,
    }
}

impl<B> RequestBody<B> {
    pub(crate) const fn new(inner: B, upload: Upload) -> Self {
        Self { inner, upload }
    }

    /// The body that is watched, which it is no longer.
    pub fn into_inner(self) -> B {
        self.inner
    }
}

impl<B: Body> Body for RequestBody<B> {
    type Data = B::Data;
    type Error = B::Error;

    fn poll_frame(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<B::Data>, B::Error>>> {
        let this = self.project();
        let frame = this.inner.poll_frame(cx);
        if let Poll::Ready(Some(Err(_))) = frame {
            this.upload.fail();
        }
        frame
    }

    fn is_end_stream(&self) -> bool {
        self.inner.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.inner.size_hint()
    }
}

/// What the response knows of how the request's body fares.
#[derive(Clone, Debug, Default)]
pub(crate) struct Upload(Arc<Mutex<State>>);

#[derive(Debug, Default)]
struct State {
    failed: bool,
    /// Of the response: the body may be read on another task than the one that polls it.
    waker: Option<Waker>,
}

impl Upload {
    fn fail(&self) {
        let mut state = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        state.failed = true;
        let waker = state.waker.take();
        drop(state);
        if let Some(waker) = waker {
            // The code of others: who reads the body has its error all the same.
            drop(catch(|| waker.wake()));
        }
    }

    pub(crate) fn poll_failed(&self, cx: &Context<'_>) -> bool {
        let state = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if state.failed {
            return true;
        }
        // No user code under a lock: the old waker is dropped, and the new one cloned, outside.
        if state.waker.as_ref().is_some_and(|waker| waker.will_wake(cx.waker())) {
            return false;
        }
        drop(state);
        let waker = cx.waker().clone();
        let mut state = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let old = state.waker.replace(waker);
        let failed = state.failed;
        drop(state);
        drop(old);
        failed
    }
}

#[cfg(all(test, loom))]
mod loom_tests {
    use std::{
        collections::HashSet,
        sync::{
            Mutex,
            atomic::{AtomicBool, Ordering::SeqCst},
        },
        task::Wake,
    };

    use super::*;

    #[derive(Default)]
    struct Woken(AtomicBool);

    impl Wake for Woken {
        fn wake(self: Arc<Self>) {
            self.0.store(true, SeqCst);
        }
    }

    #[test]
    fn a_failure_that_races_the_polls_is_seen_or_wakes() {
        let reached = Arc::new(Mutex::new(HashSet::new()));
        let reach = reached.clone();
        loom::model(move || {
            let upload = Upload::default();
            let other = upload.clone();
            let other = loom::thread::spawn(move || other.fail());
            let woken = Arc::new(Woken::default());
            let waker = woken.clone().into();
            let cx = Context::from_waker(&waker);
            // The first registers the waker, the second finds that it is there.
            let seen = [upload.poll_failed(&cx), upload.poll_failed(&cx)];
            other.join().unwrap();
            let woken = woken.0.load(SeqCst);
            assert!(seen[1] || woken, "lost");
            assert!(upload.poll_failed(&cx));
            reach.lock().unwrap().insert((seen, woken));
        });
        let expected = [([true, true], false), ([false, true], true), ([false, false], true)];
        assert_eq!(*reached.lock().unwrap(), expected.into());
    }
}
