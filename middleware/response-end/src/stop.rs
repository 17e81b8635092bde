use std::{
    error::Error,
    fmt, mem,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
};

use bytes::Bytes;
use http::{HeaderMap, Response, StatusCode};
use http_body::{Body, Frame, SizeHint};
use pin_project_lite::pin_project;
use tower_catch_unwind::Panic;
use tower_request_context::{Answer, Dialect};

use crate::{Asked, End, Http, Kept, Plain, ResponseBody, ResponseFuture, Watch};

/// A [`Watch`] that may end the response that it watches, before its end.
///
/// For those who write a layer: see [Ending a response](crate#ending-a-response).
pub trait Stop: Watch {
    /// Whether the response is to end now, and why; if not, wakes `cx` when it is to.
    ///
    /// Asked whenever the future or the body has come to an await, and after every frame of data:
    /// it should cost next to nothing while nothing is to end. Once ready, it stays so.
    fn poll_stop(&mut self, cx: &mut Context<'_>) -> Poll<Stopped>;

    /// The same when the future is ready, or the body has come to an end of its own: whether that
    /// came too late. What was yielded is dropped then, in scope, and the response ends as if it had
    /// been stopped before. If it is not known yet, the end is held back until it is, and `cx` woken.
    /// Data that fill an announced length are never too late.
    ///
    /// For who does more to end a response than to say so here, such as to cancel what it waits for:
    /// what the inner service makes of that is not its answer.
    fn poll_end(&mut self, cx: &mut Context<'_>) -> Poll<Option<Stopped>> {
        let _ = cx;
        Poll::Ready(None)
    }

    /// Whether [`poll_end`](Self::poll_end) would let it end now: who implements one of the two
    /// implements both. Asked when the body says that it is at its end: if not, it is polled for that.
    fn may_end(&self) -> bool {
        true
    }
}

/// Asks it, while more `is_to_come` or when the inner future or body has come to its own end.
#[inline]
fn ask<W: Stop>(
    watch: &mut W,
    cx: &mut Context<'_>,
    is_to_come: bool,
) -> Poll<Option<(End, Stopped)>> {
    let stopped = if is_to_come {
        match watch.poll_stop(cx) {
            Poll::Ready(stopped) => Some(stopped),
            Poll::Pending => None,
        }
    } else {
        ready!(watch.poll_end(cx))
    };
    Poll::Ready(stopped.map(|stopped| (stopped.end(), stopped)))
}

/// Why a layer has ended a response before its end.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub enum Stopped {
    /// It took longer than it may. Before the head: 504, gRPC status 4.
    TimedOut,
    /// Something that belongs to it has panicked. Before the head: 500, gRPC status 13.
    Panicked(Panic),
    /// The server is shutting down. Before the head: 503 with Retry-After, gRPC status 14.
    Shutdown,
}

impl Stopped {
    /// What the [`Watch`] is told.
    pub(crate) const fn end(&self) -> End {
        match self {
            Self::TimedOut => End::TimedOut,
            Self::Panicked(_) => End::Panicked,
            Self::Shutdown => End::Disconnected,
        }
    }

    const fn answer(&self) -> Answer {
        match self {
            Self::TimedOut => {
                Answer::new(StatusCode::GATEWAY_TIMEOUT, 4, "the request took too long")
            }
            Self::Panicked(_) => {
                Answer::new(StatusCode::INTERNAL_SERVER_ERROR, 13, "internal error")
            }
            Self::Shutdown => {
                let answer =
                    Answer::new(StatusCode::SERVICE_UNAVAILABLE, 14, "the server is shutting down");
                // From another server, or the next of this one.
                answer.retry_after(1)
            }
        }
    }

    /// The answer in place of the response. One to a panic is marked with it, for the layers
    /// outside.
    pub fn response(self, dialect: Dialect) -> Response<Bytes> {
        let answer = self.answer();
        let Self::Panicked(panic) = self else {
            return answer.response(dialect);
        };
        let (trace_id, request_id) = (panic.trace_id(), panic.request_id());
        let mut response = answer.response_with_ids(dialect, trace_id, request_id);
        response.extensions_mut().insert(panic);
        response
    }
}

impl fmt::Display for Stopped {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::TimedOut => f.write_str("the request took too long"),
            Self::Panicked(panic) => panic.fmt(f),
            Self::Shutdown => f.write_str("the server is shutting down"),
        }
    }
}

impl Error for Stopped {}

pin_project! {
    /// Response future of a layer that may [end](Stop) the response.
    ///
    /// It keeps what the inner future has yielded while that is [held back](Stop::poll_end), and so
    /// is `Send` if that is too.
    #[must_use = "futures do nothing unless polled"]
    pub struct StoppableFuture<F, W, P = Http>
    where
        F: Future,
        W: Watch,
    {
        #[pin]
        inner: ResponseFuture<F, W, P>,
        kept: Kept<F::Output>,
    }

    impl<F, W, P> PinnedDrop for StoppableFuture<F, W, P>
    where
        F: Future,
        W: Watch,
    {
        fn drop(this: Pin<&mut Self>) {
            let this = this.project();
            if let Some(output) = this.kept.take() {
                this.inner.stop(output, End::Disconnected);
            }
        }
    }
}

impl<F, W, P> fmt::Debug for StoppableFuture<F, W, P>
where
    F: Future + fmt::Debug,
    W: Watch + fmt::Debug,
    P: fmt::Debug,
{
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("StoppableFuture").field("inner", &self.inner).finish_non_exhaustive()
    }
}

impl<F: Future, W: Watch> StoppableFuture<F, W, Http> {
    /// Watches what comes of `call` with `request`, the call of an HTTP service, until `watch` ends
    /// it. `dialect` is that of the request: it is answered in it.
    #[inline]
    pub fn http<R>(
        watch: W,
        asked: Asked,
        dialect: Dialect,
        request: R,
        call: impl FnOnce(R) -> F,
    ) -> Self {
        let asked = Asked { dialect, ..asked };
        Self { inner: ResponseFuture::new(watch, asked, request, call), kept: None }
    }
}

impl<F: Future, W: Watch> StoppableFuture<F, W, Plain> {
    /// Watches what comes of `call` with `request`, the call of any other service, until `watch`
    /// ends it.
    pub fn plain<R>(watch: W, request: R, call: impl FnOnce(R) -> F) -> Self {
        Self { inner: ResponseFuture::plain(watch, request, call), kept: None }
    }
}

impl<F, W, B, E> Future for StoppableFuture<F, W, Http>
where
    F: Future<Output = Result<Response<B>, E>>,
    W: Stop,
    B: Body,
{
    type Output = Result<Response<StoppableBody<B, W>>, E>;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let this = self.project();
        this.inner.poll_or_stop(this.kept, cx, StoppableBody::of, ask, |stopped, dialect| {
            stopped.response(dialect).map(StoppableBody::answer)
        })
    }
}

impl<F, W, T, E> Future for StoppableFuture<F, W, Plain>
where
    F: Future<Output = Result<T, E>>,
    W: Stop,
{
    type Output = Result<T, CallError<E>>;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let this = self.project();
        this.inner.poll_or_stop(this.kept, cx, CallError::Inner, ask, CallError::Stopped)
    }
}

pin_project! {
    /// Response body of a layer that may [end](Stop) the response: in [`BodyError::Stopped`], or in
    /// trailers if the client speaks gRPC over HTTP/2.
    #[derive(Debug)]
    pub struct StoppableBody<B, W>
    where
        W: Watch,
    {
        #[pin]
        state: State<B, W>,
    }
}

pin_project! {
    #[project = StateProj]
    #[derive(Debug)]
    enum State<B, W>
    where
        W: Watch,
    {
        // Trailers, while they may not pass yet: nobody shares them, but to drop no `Arc` is less than
        // to drop no `Box`.
        Inner { #[pin] body: ResponseBody<B, W>, kept: Option<Arc<HeaderMap>> },
        // Until it has been yielded: then it is empty.
        Answer { bytes: Bytes },
    }
}

impl<B, W: Watch> StoppableBody<B, W> {
    const fn of(body: ResponseBody<B, W>) -> Self {
        Self { state: State::Inner { body, kept: None } }
    }

    const fn answer(bytes: Bytes) -> Self {
        Self { state: State::Answer { bytes } }
    }
}

/// An empty body that nobody watches.
impl<B: Default, W: Watch> Default for StoppableBody<B, W> {
    fn default() -> Self {
        Self::of(ResponseBody::default())
    }
}

impl<B, W> Body for StoppableBody<B, W>
where
    B: Body,
    B::Data: From<Bytes>,
    W: Stop,
{
    type Data = B::Data;
    type Error = BodyError<B::Error>;

    fn poll_frame(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<B::Data>, Self::Error>>> {
        match self.project().state.project() {
            StateProj::Inner { body, kept } => {
                body.poll_or_stop(kept, cx, BodyError::Inner, ask, |stopped, in_trailers| {
                    if in_trailers {
                        Ok(Frame::trailers(stopped.answer().trailers()))
                    } else {
                        Err(BodyError::Stopped(stopped))
                    }
                })
            }
            StateProj::Answer { bytes } => {
                let answer = mem::take(bytes);
                Poll::Ready((!answer.is_empty()).then(|| Ok(Frame::data(answer.into()))))
            }
        }
    }

    fn is_end_stream(&self) -> bool {
        match &self.state {
            State::Inner { body, kept } => kept.is_none() && body.is_at_end_if(W::may_end),
            State::Answer { bytes } => bytes.is_empty(),
        }
    }

    fn size_hint(&self) -> SizeHint {
        match &self.state {
            State::Inner { body, .. } => body.size_hint(),
            State::Answer { bytes } => {
                SizeHint::with_exact(u64::try_from(bytes.len()).unwrap_or(u64::MAX))
            }
        }
    }
}

/// Why a [`StoppableBody`] has ended before its end.
///
/// It becomes a boxed error, which servers ask for, if `E` does, and `Inner` becomes just what `E`
/// would, so that whoever looks for an error in it finds that. It cannot be an [`Error`] besides,
/// or boxed errors, which many layers have, could not be an `E`.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub enum BodyError<E> {
    /// The body yielded an error.
    Inner(E),
    /// A layer has ended it.
    Stopped(Stopped),
}

impl<E: fmt::Display> fmt::Display for BodyError<E> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Inner(error) => error.fmt(f),
            Self::Stopped(stopped) => write!(f, "the response body was cut off: {stopped}"),
        }
    }
}

impl<E> From<BodyError<E>> for Box<dyn Error + Send + Sync>
where
    E: Into<Self>,
{
    fn from(error: BodyError<E>) -> Self {
        match error {
            BodyError::Inner(error) => error.into(),
            BodyError::Stopped(stopped) => stopped.into(),
        }
    }
}

/// Why a call of a [plain](Plain) service failed.
///
/// It becomes a boxed error if `E` does: see [`BodyError`].
#[derive(Clone, Debug)]
#[non_exhaustive]
pub enum CallError<E> {
    /// The service yielded an error.
    Inner(E),
    /// A layer has ended the call.
    Stopped(Stopped),
}

impl<E: fmt::Display> fmt::Display for CallError<E> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Inner(error) => error.fmt(f),
            Self::Stopped(stopped) => write!(f, "the call was given up: {stopped}"),
        }
    }
}

impl<E> From<CallError<E>> for Box<dyn Error + Send + Sync>
where
    E: Into<Self>,
{
    fn from(error: CallError<E>) -> Self {
        match error {
            CallError::Inner(error) => error.into(),
            CallError::Stopped(stopped) => stopped.into(),
        }
    }
}
