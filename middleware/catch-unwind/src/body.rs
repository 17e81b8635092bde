use std::{
    error::Error,
    fmt, mem,
    pin::Pin,
    sync::{Arc, OnceLock},
    task::{Context, Poll},
};

use bytes::Bytes;
use http_body::{Body, Frame, SizeHint};
use pin_project_lite::pin_project;

use crate::{Panic, answer, catch, log::Log};

pin_project! {
    /// Response body of [`Catching`](crate::Catching).
    ///
    /// If the inner body panics it ends in [`BodyError::Panicked`], or in trailers if the client
    /// speaks gRPC. A panic of its [`size_hint`](Body::size_hint) or its
    /// [`is_end_stream`](Body::is_end_stream) means that neither is known: it is not asked again.
    #[derive(Debug)]
    pub struct ResponseBody<B> {
        #[pin]
        state: State<B>,
        // `None`: nobody is told.
        log: Option<Arc<Log>>,
        // Whether a panic is told in trailers.
        in_trailers: bool,
        // The panic of a hint, and of which. Not a `Cell`, for the body is `Sync` if the inner
        // one is.
        hint_panic: OnceLock<Box<(Panic, &'static str)>>,
        hint_panic_told: bool,
    }

    impl<B> PinnedDrop for ResponseBody<B> {
        fn drop(this: Pin<&mut Self>) {
            this.drop_inner();
        }
    }
}

pin_project! {
    #[project = StateProj]
    #[derive(Debug)]
    enum State<B> {
        Inner { #[pin] body: B },
        Answer { bytes: Bytes },
        Over,
    }
}

impl<B> ResponseBody<B> {
    pub(crate) fn new(body: B, log: Arc<Log>, in_trailers: bool) -> Self {
        let mut this = Self::of(State::Inner { body });
        this.log = Some(log);
        this.in_trailers = in_trailers;
        this
    }

    pub(crate) fn answer(bytes: Bytes, log: Arc<Log>) -> Self {
        let mut this = Self::of(State::Answer { bytes });
        this.log = Some(log);
        this
    }

    fn of(state: State<B>) -> Self {
        Self {
            state,
            log: None,
            in_trailers: false,
            hint_panic: OnceLock::new(),
            hint_panic_told: false,
        }
    }

    fn drop_inner(mut self: Pin<&mut Self>) {
        self.as_mut().tell_hint_panic();
        let mut this = self.project();
        let is_others = match *this.state {
            State::Inner { .. } => mem::needs_drop::<B>(),
            State::Answer { .. } => true,
            State::Over => false,
        };
        if !is_others {
            this.state.set(State::Over);
        } else if let Err(panic) = catch(|| this.state.set(State::Over)) {
            tell(this.log.as_ref(), &panic, "drop of the body");
        }
    }

    /// What `hint` yields, unless it panics or a hint has done so before.
    fn hint<R>(&self, during: &'static str, hint: impl FnOnce() -> R) -> Option<R> {
        if self.hint_panic.get().is_some() {
            return None;
        }
        let hint = catch(hint);
        hint.map_err(|panic| self.hint_panic.set(Box::new((panic, during)))).ok()
    }

    /// Tells of the panic of a hint: not where it was caught, since hints are asked for where the
    /// request's ids are not current, but in the next poll or the drop.
    fn tell_hint_panic(self: Pin<&mut Self>) {
        let this = self.project();
        if let Some((panic, during)) = this.hint_panic.get().map(|told| &**told) {
            if !mem::replace(this.hint_panic_told, true) {
                tell(this.log.as_ref(), &panic.clone().here(), during);
            }
        }
    }
}

fn tell(log: Option<&Arc<Log>>, panic: &Panic, during: &'static str) {
    if let Some(log) = log {
        log.tell(panic, during, None);
    }
}

/// An empty body of which nobody is told.
impl<B: Default> Default for ResponseBody<B> {
    fn default() -> Self {
        Self::of(State::Inner { body: B::default() })
    }
}

impl<B> Body for ResponseBody<B>
where
    B: Body,
    B::Data: From<Bytes>,
{
    type Data = B::Data;
    type Error = BodyError<B::Error>;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<B::Data>, Self::Error>>> {
        self.as_mut().tell_hint_panic();
        let mut this = self.as_mut().project();
        let panic = match this.state.as_mut().project() {
            StateProj::Inner { body } => match catch(|| body.poll_frame(cx)) {
                Ok(Poll::Pending) => return Poll::Pending,
                Ok(Poll::Ready(frame)) => {
                    // Whoever polls it again finds it over, whatever the inner one would say.
                    if !matches!(&frame, Some(Ok(frame)) if frame.is_data()) {
                        self.drop_inner();
                    }
                    return Poll::Ready(frame.map(|frame| frame.map_err(BodyError::Inner)));
                }
                Err(panic) => panic,
            },
            StateProj::Answer { bytes } => {
                let answer = mem::take(bytes);
                this.state.set(State::Over);
                let frame = || (!answer.is_empty()).then(|| Frame::data(answer.into()));
                match catch(frame) {
                    Ok(frame) => return Poll::Ready(frame.map(Ok)),
                    Err(panic) => panic,
                }
            }
            StateProj::Over => return Poll::Ready(None),
        };
        tell(this.log.as_ref(), &panic, "body");
        let in_trailers = *this.in_trailers;
        // Of what has panicked nothing is called again but its drop.
        self.drop_inner();
        Poll::Ready(Some(if in_trailers {
            Ok(Frame::trailers(answer::INTERNAL.trailers()))
        } else {
            Err(BodyError::Panicked(panic))
        }))
    }

    fn is_end_stream(&self) -> bool {
        match &self.state {
            State::Inner { body } => {
                self.hint("is_end_stream", || body.is_end_stream()).unwrap_or(false)
            }
            State::Answer { bytes } => bytes.is_empty(),
            State::Over => true,
        }
    }

    fn size_hint(&self) -> SizeHint {
        match &self.state {
            State::Inner { body } => {
                self.hint("size_hint", || body.size_hint()).unwrap_or_default()
            }
            State::Answer { bytes } => {
                SizeHint::with_exact(u64::try_from(bytes.len()).unwrap_or(u64::MAX))
            }
            State::Over => SizeHint::with_exact(0),
        }
    }
}

/// Why a [`ResponseBody`] has ended before its end.
///
/// It becomes a boxed error, which servers ask for, if `E` does, and `Inner` becomes just what `E`
/// would, so that whoever looks for an error in it finds that. It cannot be an [`Error`] besides,
/// or boxed errors, which many layers have, could not be an `E`.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub enum BodyError<E> {
    /// The body yielded an error.
    Inner(E),
    /// The body panicked.
    Panicked(Panic),
}

impl<E: fmt::Display> fmt::Display for BodyError<E> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Inner(error) => error.fmt(f),
            Self::Panicked(panic) => write!(f, "the response body {panic}"),
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
            BodyError::Panicked(panic) => panic.into(),
        }
    }
}
