//! Bounded requests.

use std::{
    error::Error,
    fmt,
    marker::PhantomData,
    mem,
    pin::Pin,
    task::{Context, Poll, ready},
    time::Duration,
};

use bytes::Bytes;
use http::{Request, Response, StatusCode};
use http_body::{Body, Frame, SizeHint};
use pin_project_lite::pin_project;
use tower_layer::Layer;
use tower_request_context::{Answer, Dialect, Http, Plain};
use tower_response_end::{Asked, End, Hook, Watch};
use tower_service::Service;

use crate::{Acquire, Level, Permit, SpawnError, SpawnLimit};

/// Serves at most so many requests at once.
///
/// A request counts until its response is [over](tower_response_end): a stream until its last byte
/// or its client's leaving, an upgraded connection as long as it is [held]. One that is too many is
/// refused, at once or after a [wait](Self::wait): with 503 and Retry-After as a problem document
/// (RFC 9457), with status 8 (`RESOURCE_EXHAUSTED`) for gRPC. An instance that was polled ready
/// takes nothing from others. The inner service has to be `Clone`: a request that waits takes the
/// instance with it that was polled ready.
///
/// A clone is the same limit, and tells its figures.
///
/// [held]: tower_response_end::hold
///
/// ```
/// # use std::convert::Infallible;
/// # use bytes::Bytes;
/// # use http::{Request, Response};
/// # use http_body_util::{BodyExt, Full};
/// # use tower::{Service, ServiceBuilder, ServiceExt, service_fn};
/// # use tower_spawn_limit::RequestLimitLayer;
/// # #[tokio::main(flavor = "current_thread")]
/// # async fn main() -> Result<(), Infallible> {
/// let limit = RequestLimitLayer::new(1);
/// let mut service = ServiceBuilder::new()
///     .layer(limit.clone())
///     .service(service_fn(async |_| Ok::<_, Infallible>(Response::new(Full::<Bytes>::from("hi")))));
///
/// let first = service.ready().await?.call(Request::new(())).await?;
/// assert_eq!(limit.in_use(), 1, "its body has not been read");
/// let second = service.ready().await?.call(Request::new(())).await?;
/// assert_eq!(second.status(), 503);
/// assert_eq!(second.headers()["retry-after"], "1");
///
/// first.into_body().collect().await?;
/// assert_eq!((limit.in_use(), limit.refused()), (0, 1));
/// # Ok(()) }
/// ```
pub struct RequestLimitLayer<P = Http> {
    limit: SpawnLimit,
    wait: Duration,
    protocol: PhantomData<fn() -> P>,
}

impl RequestLimitLayer {
    /// At most `limit` requests at once; 0 refuses all. Above [`SpawnLimit::MAX`] it is that.
    ///
    /// Choose it by what all that they hold may take: memory, connections of a pool.
    pub fn new(limit: usize) -> Self {
        Self { limit: SpawnLimit::new(limit), wait: Duration::ZERO, protocol: PhantomData }
    }

    /// The same layer for a `Service` of anything else than HTTP requests: there the response is
    /// over when its future is, and a refusal is an error, [`CallError::Full`].
    pub fn plain(self) -> RequestLimitLayer<Plain> {
        RequestLimitLayer { limit: self.limit, wait: self.wait, protocol: PhantomData }
    }
}

impl<P> RequestLimitLayer<P> {
    /// Lets a request that is too many wait for its turn, at most so long and in order. The default
    /// is not to wait.
    ///
    /// Choose it by how long a client waits with pleasure; and bound the line, for those who wait
    /// take memory as well: see [`queue`](Self::queue). A request that is called in process, by
    /// code that runs within a request or a task with a permit, does not wait: see [`Level`].
    pub fn wait(mut self, wait: Duration) -> Self {
        self.wait = wait;
        self
    }

    /// At most `waiting` wait at once: see [`SpawnLimit::queue`].
    pub fn queue(mut self, waiting: usize) -> Self {
        self.limit = self.limit.queue(waiting);
        self
    }

    /// Changes the limit: see [`SpawnLimit::set_limit`].
    pub fn set_limit(&self, limit: usize) {
        self.limit.set_limit(limit);
    }

    /// How many requests may be served at once.
    pub fn limit(&self) -> usize {
        self.limit.limit()
    }

    /// How many are served.
    pub fn in_use(&self) -> usize {
        self.limit.in_use()
    }

    /// How many wait for their turn.
    pub fn waiting(&self) -> usize {
        self.limit.waiting()
    }

    /// How many were refused, at once or after a wait.
    pub fn refused(&self) -> u64 {
        self.limit.refused()
    }
}

impl<P> Clone for RequestLimitLayer<P> {
    fn clone(&self) -> Self {
        Self { limit: self.limit.clone(), wait: self.wait, protocol: PhantomData }
    }
}

impl<P> fmt::Debug for RequestLimitLayer<P> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RequestLimitLayer")
            .field("limit", &self.limit())
            .field("in_use", &self.in_use())
            .field("waiting", &self.waiting())
            .field("refused", &self.refused())
            .field("wait", &self.wait)
            .finish()
    }
}

impl<S, P> Layer<S> for RequestLimitLayer<P> {
    type Service = RequestLimited<S, P>;

    fn layer(&self, inner: S) -> Self::Service {
        RequestLimited { inner, layer: self.clone() }
    }
}

/// Middleware that serves at most so many requests at once.
#[derive(Debug)]
pub struct RequestLimited<S, P = Http> {
    inner: S,
    layer: RequestLimitLayer<P>,
}

impl<S, P> RequestLimited<S, P> {
    /// Waits for a permit, with the instance that was polled ready: only with the permit may it be
    /// called.
    fn wait<Req, F>(&mut self, request: Req, dialect: Dialect) -> ResponseFuture<S, Req, F, P>
    where
        S: Clone,
    {
        let RequestLimitLayer { limit, wait, .. } = &self.layer;
        let acquire = Acquire::new(limit.clone(), Level::Request, *wait);
        let fresh = self.inner.clone();
        let service = mem::replace(&mut self.inner, fresh);
        let waiting = Some(Waiting { service, request });
        ResponseFuture { state: State::Waiting { acquire, waiting, dialect } }
    }
}

impl<S: Clone, P> Clone for RequestLimited<S, P> {
    fn clone(&self) -> Self {
        Self { inner: self.inner.clone(), layer: self.layer.clone() }
    }
}

impl<S, B, ResBody> Service<Request<B>> for RequestLimited<S, Http>
where
    S: Service<Request<B>, Response = Response<ResBody>> + Clone,
    ResBody: Body,
    ResBody::Data: From<Bytes>,
{
    type Response = Response<ResponseBody<ResBody>>;
    type Error = S::Error;
    type Future = ResponseFuture<S, Request<B>, S::Future>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        self.inner.poll_ready(cx)
    }

    fn call(&mut self, request: Request<B>) -> Self::Future {
        let Some(permit) = self.layer.limit.take() else {
            let dialect = Dialect::of(&request);
            return self.wait(request, dialect);
        };
        ResponseFuture { state: State::http(permit, &mut self.inner, request) }
    }
}

impl<S, Req> Service<Req> for RequestLimited<S, Plain>
where
    S: Service<Req> + Clone,
{
    type Response = S::Response;
    type Error = CallError<S::Error>;
    type Future = ResponseFuture<S, Req, S::Future, Plain>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        self.inner.poll_ready(cx).map_err(CallError::Inner)
    }

    fn call(&mut self, request: Req) -> Self::Future {
        let Some(permit) = self.layer.limit.take() else {
            return self.wait(request, Dialect::default());
        };
        ResponseFuture { state: State::plain(permit, &mut self.inner, request) }
    }
}

pin_project! {
    /// Response future of [`RequestLimited`].
    #[must_use = "futures do nothing unless polled"]
    pub struct ResponseFuture<S, Req, F, P = Http> {
        #[pin]
        state: State<S, Req, F, P>,
    }
}

pin_project! {
    #[project = StateProj]
    enum State<S, Req, F, P> {
        Waiting {
            #[pin]
            acquire: Acquire,
            // `None` once it is over.
            waiting: Option<Waiting<S, Req>>,
            dialect: Dialect,
        },
        Serving {
            #[pin]
            future: tower_response_end::ResponseFuture<F, Counted, P>,
        },
    }
}

/// A request, and the instance that was polled ready for it.
struct Waiting<S, Req> {
    service: S,
    request: Req,
}

impl<S, B, F> State<S, Request<B>, F, Http> {
    fn http(permit: Permit, service: &mut S, request: Request<B>) -> Self
    where
        S: Service<Request<B>, Future = F>,
    {
        let (watch, asked) = (Counted::new(permit), Asked::of(&request));
        let call = |request| service.call(request);
        let future = tower_response_end::ResponseFuture::http(watch, asked, request, call);
        Self::Serving { future }
    }
}

impl<S, Req, F> State<S, Req, F, Plain> {
    fn plain(permit: Permit, service: &mut S, request: Req) -> Self
    where
        S: Service<Req, Future = F>,
    {
        let watch = Counted::new(permit);
        let call = |request| service.call(request);
        let future = tower_response_end::ResponseFuture::<_, _, Plain>::plain(watch, request, call);
        Self::Serving { future }
    }
}

impl<S, B, ResBody> Future for ResponseFuture<S, Request<B>, S::Future, Http>
where
    S: Service<Request<B>, Response = Response<ResBody>>,
    ResBody: Body,
{
    type Output = Result<Response<ResponseBody<ResBody>>, S::Error>;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let mut state = self.project().state;
        loop {
            let (permit, mut waiting) = match state.as_mut().project() {
                StateProj::Serving { future } => {
                    let response = ready!(future.poll(cx))?;
                    return Poll::Ready(Ok(response.map(ResponseBody::inner)));
                }
                StateProj::Waiting { acquire, waiting, dialect } => {
                    let permit = ready!(acquire.poll(cx));
                    let waiting = waiting.take().expect("polled after it was ready");
                    match permit {
                        Ok(permit) => (permit, waiting),
                        Err(_) => {
                            let refusal = FULL.response(*dialect);
                            return Poll::Ready(Ok(refusal.map(ResponseBody::answer)));
                        }
                    }
                }
            };
            let serving = State::http(permit, &mut waiting.service, waiting.request);
            state.set(serving);
        }
    }
}

const TEXT: &str = "the limit of requests is reached";
/// gRPC's `RESOURCE_EXHAUSTED`.
const FULL: Answer = Answer::new(StatusCode::SERVICE_UNAVAILABLE, 8, TEXT).retry_after(1);

impl<S, Req> Future for ResponseFuture<S, Req, S::Future, Plain>
where
    S: Service<Req>,
{
    type Output = Result<S::Response, CallError<S::Error>>;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let mut state = self.project().state;
        loop {
            let (permit, mut waiting) = match state.as_mut().project() {
                StateProj::Serving { future } => {
                    return future.poll(cx).map_err(CallError::Inner);
                }
                StateProj::Waiting { acquire, waiting, .. } => {
                    let permit = ready!(acquire.poll(cx));
                    let waiting = waiting.take().expect("polled after it was ready");
                    match permit {
                        Ok(permit) => (permit, waiting),
                        Err(_) => return Poll::Ready(Err(CallError::Full)),
                    }
                }
            };
            let serving = State::plain(permit, &mut waiting.service, waiting.request);
            state.set(serving);
        }
    }
}

impl<S, Req, F, P> fmt::Debug for ResponseFuture<S, Req, F, P> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let waits = matches!(self.state, State::Waiting { .. });
        f.debug_struct("ResponseFuture").field("waits", &waits).finish_non_exhaustive()
    }
}

/// The life of one response with a permit: while nobody [holds](tower_response_end::hold) it, it
/// gives that back.
#[derive(Debug)]
struct Counted {
    hook: Hook<Permit>,
    /// While inside, what is held around it.
    around: Level,
}

impl Counted {
    const fn new(permit: Permit) -> Self {
        Self { hook: Hook::new(permit), around: Level::Free }
    }
}

impl Watch for Counted {
    fn enter(&mut self) {
        self.around = Level::Request.raise();
        self.hook.enter();
    }

    fn leave(&mut self) {
        self.hook.leave();
        Level::leave(self.around);
    }

    fn end(&mut self, end: End) {
        self.hook.end(end);
    }
}

pin_project! {
    /// Response body of [`RequestLimited`].
    #[derive(Debug)]
    pub struct ResponseBody<B> {
        #[pin]
        content: Content<B>,
    }
}

pin_project! {
    #[project = ContentProj]
    #[derive(Debug)]
    enum Content<B> {
        Inner { #[pin] body: tower_response_end::ResponseBody<B, Counted> },
        // Of a refusal; empty once it was read.
        Answer { bytes: Bytes },
    }
}

impl<B> ResponseBody<B> {
    const fn inner(body: tower_response_end::ResponseBody<B, Counted>) -> Self {
        Self { content: Content::Inner { body } }
    }

    const fn answer(bytes: Bytes) -> Self {
        Self { content: Content::Answer { bytes } }
    }
}

/// An empty body that does not count.
impl<B: Default> Default for ResponseBody<B> {
    fn default() -> Self {
        Self::inner(tower_response_end::ResponseBody::default())
    }
}

impl<B> Body for ResponseBody<B>
where
    B: Body,
    B::Data: From<Bytes>,
{
    type Data = B::Data;
    type Error = B::Error;

    fn poll_frame(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Self::Data>, Self::Error>>> {
        match self.project().content.project() {
            ContentProj::Inner { body } => body.poll_frame(cx),
            ContentProj::Answer { bytes } if bytes.is_empty() => Poll::Ready(None),
            ContentProj::Answer { bytes } => {
                Poll::Ready(Some(Ok(Frame::data(mem::take(bytes).into()))))
            }
        }
    }

    fn is_end_stream(&self) -> bool {
        match &self.content {
            Content::Inner { body } => body.is_end_stream(),
            Content::Answer { bytes } => bytes.is_empty(),
        }
    }

    fn size_hint(&self) -> SizeHint {
        match &self.content {
            Content::Inner { body } => body.size_hint(),
            Content::Answer { bytes } => SizeHint::with_exact(bytes.len() as u64),
        }
    }
}

/// Why a call of a [plain](RequestLimitLayer::plain) service failed.
///
/// It becomes a boxed error if `E` does: the inner one stays as it is.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub enum CallError<E> {
    /// The service yielded an error.
    Inner(E),
    /// The limit is full. The service was not called.
    Full,
}

impl<E: fmt::Display> fmt::Display for CallError<E> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Inner(error) => error.fmt(f),
            Self::Full => f.write_str(TEXT),
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
            CallError::Full => SpawnError::Full.into(),
        }
    }
}
