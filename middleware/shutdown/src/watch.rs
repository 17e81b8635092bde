use std::{
    fmt,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
};

use http_body::{Body, Frame, SizeHint};
use pin_project_lite::pin_project;
use tokio_util::sync::CancellationToken;
use tower_response_end::Waiter;

use crate::state::State;

/// Sees what a [`Shutdown`](crate::Shutdown) is at: for the route that says whether the server is
/// ready, and for what goes on until it ends itself.
///
/// A clone watches the same shutdown. It can be kept in a router's state, or found in the request's
/// type map: see [`ShutdownLayer::in_extensions`](crate::ShutdownLayer::in_extensions).
#[derive(Clone)]
pub struct ShutdownWatch(Arc<State>);

impl ShutdownWatch {
    pub(crate) const fn new(state: Arc<State>) -> Self {
        Self(state)
    }

    /// Whether new requests are welcome: not any more from the first signal on, though they are
    /// served for the time of the settle delay.
    pub fn is_ready(&self) -> bool {
        !self.0.has_begun()
    }

    /// Whether the server has stopped accepting: what goes on without an end should end itself.
    pub fn is_draining(&self) -> bool {
        self.0.is_draining()
    }

    /// Waits until the server stops accepting.
    ///
    /// # Cancel safety
    ///
    /// Cancel safe: it only watches.
    pub fn draining(&self) -> Draining {
        Draining { waiter: self.0.draining.waiter() }
    }

    /// The same for code that takes a [`CancellationToken`]. To cancel it cancels nothing of the
    /// shutdown. A waker that panics may keep others that wait with a token from being woken.
    pub fn token(&self) -> CancellationToken {
        self.0.token.child_token()
    }

    /// A body that comes to its end when the server stops accepting.
    ///
    /// For bodies of unknown length: a feed of events, a long poll. The client takes what it has
    /// for all there was.
    ///
    /// What is ready then is handed out still, 16 frames of it at most: a body that always has one
    /// would not end.
    pub fn until_draining<B>(&self, body: B) -> UntilDraining<B> {
        UntilDraining { body, watch: self.clone(), draining: self.draining(), left: LAST_FRAMES }
    }
}

impl fmt::Debug for ShutdownWatch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ShutdownWatch")
            .field("is_ready", &self.is_ready())
            .field("is_draining", &self.is_draining())
            .finish()
    }
}

/// Future of [`ShutdownWatch::draining`]. A stream ends with it as in
/// `stream.take_until(watch.draining())`, which is futures-util's.
#[must_use = "futures do nothing unless polled"]
pub struct Draining {
    waiter: Waiter,
}

impl Future for Draining {
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        self.waiter.poll_given(cx)
    }
}

impl fmt::Debug for Draining {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Draining").finish_non_exhaustive()
    }
}

pin_project! {
    /// Body of [`ShutdownWatch::until_draining`].
    #[derive(Debug)]
    pub struct UntilDraining<B> {
        #[pin]
        body: B,
        // Asked after each frame: next to nothing, which the other is not.
        watch: ShutdownWatch,
        #[pin]
        draining: Draining,
        // How many frames may still come. Of those, all that come before the drain are none.
        left: u8,
    }
}

/// Of a body that is to end.
const LAST_FRAMES: u8 = 16;

impl<B: Body> Body for UntilDraining<B> {
    type Data = B::Data;
    type Error = B::Error;

    fn poll_frame(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<B::Data>, B::Error>>> {
        let this = self.project();
        if *this.left == 0 {
            return Poll::Ready(None);
        }
        // First what there is: nothing that was ready is lost.
        let frame = match this.body.poll_frame(cx) {
            Poll::Pending if this.draining.poll(cx).is_ready() => Poll::Ready(None),
            frame => frame,
        };
        if matches!(frame, Poll::Ready(None)) {
            *this.left = 0;
        } else if frame.is_ready() && this.watch.0.is_draining() {
            *this.left -= 1;
        }
        frame
    }

    fn is_end_stream(&self) -> bool {
        self.left == 0 || self.body.is_end_stream()
    }

    // It may end before the inner body does: a length would be a promise.
    fn size_hint(&self) -> SizeHint {
        if self.is_end_stream() { SizeHint::with_exact(0) } else { SizeHint::default() }
    }
}
