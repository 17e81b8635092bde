use std::{
    error::Error,
    fmt,
    marker::PhantomData,
    mem,
    panic::Location,
    pin::Pin,
    task::{Context, Poll, ready},
};

use bytes::Bytes;
use http::{Request, Response, StatusCode};
use http_body::{Body, Frame, SizeHint};
use pin_project_lite::pin_project;
use tower_layer::Layer;
use tower_request_context::{Answer, Dialect, RequestContext};
use tower_service::Service;

use crate::{AtEnd, Http, NoTaskSet, Plain, SpawnError, Stopped, TaskError, TaskHandle, TaskSet};

/// Runs the handler itself as a task of its request's set, so that a client that leaves does not
/// stop it half-way.
///
/// It goes inside of [`TaskSetLayer`](crate::TaskSetLayer), around the handlers that must not be
/// stopped. The handler's task is counted, limited and drained as any other: when the response is
/// over before the handler is, it has the time that [`at_end`](Self::at_end) gives, and a shutdown
/// waits for it. When the client is still there it gets the response.
///
/// ```
/// use std::convert::Infallible;
/// use bytes::Bytes;
/// use http::{Request, Response};
/// use http_body_util::Empty;
/// use tower::{Service, ServiceBuilder, ServiceExt, service_fn};
/// use tower_task_set::{ShieldLayer, TaskRegistry, TaskSetLayer};
///
/// # #[tokio::main(flavor = "current_thread")]
/// # async fn main() -> Result<(), Infallible> {
/// let tasks = TaskRegistry::new();
/// let mut service = ServiceBuilder::new()
///     .layer(TaskSetLayer::new(&tasks))
///     .layer(ShieldLayer::new("transfer"))
///     .service(service_fn(async |_: Request<()>| {
///         tokio::time::sleep(std::time::Duration::from_millis(50)).await; // Give and take.
///         Ok::<_, Infallible>(Response::new(Empty::<Bytes>::new()))
///     }));
///
/// let response = service.ready().await?.call(Request::new(()));
/// tokio::time::timeout(std::time::Duration::ZERO, response).await.unwrap_err();
/// tasks.close();
/// tasks.wait().await;
/// assert_eq!(tasks.snapshot().by_name["transfer"].completed, 1);
/// # Ok(()) }
/// ```
///
/// Whatever keeps the handler from answering is an answer: a task that is refused one of 503 or 500
/// ([`SpawnError::answer`]), a handler that is told to end 503, a handler that panics 500, which is
/// marked with the [`Panic`](tower_catch_unwind::Panic) for the layers outside. The panic is logged
/// as that of a task. Of a [plain](Self::plain) service it is a [`ShieldError`].
///
/// The future must be `Send + 'static`. What runs in the service's `call`, before there is a future,
/// is not shielded, and neither is the body of the response: it belongs to the connection, and is
/// dropped unread when the client has left, in a place where nothing is current. The body of the request ends in an error then. In the
/// handler's task, [`tower_response_end::hold`] holds nothing; [`TaskSet::hold`] holds the set.
pub struct ShieldLayer<P = Http> {
    name: &'static str,
    site: &'static Location<'static>,
    at_end: AtEnd,
    protocol: PhantomData<fn() -> P>,
}

impl ShieldLayer {
    /// A layer whose tasks have this name.
    #[track_caller]
    pub fn new(name: &'static str) -> Self {
        let site = Location::caller();
        Self { name, site, at_end: AtEnd::default(), protocol: PhantomData }
    }

    /// The same layer for a `Service` of anything else than HTTP requests.
    pub fn plain(self) -> ShieldLayer<Plain> {
        let Self { name, site, at_end, .. } = self;
        ShieldLayer { name, site, at_end, protocol: PhantomData }
    }
}

impl<P> ShieldLayer<P> {
    /// What becomes of a handler whose response is over, whatever was chosen for the set. The
    /// default is the [default](AtEnd::default) of all tasks.
    pub const fn at_end(mut self, lifetime: AtEnd) -> Self {
        self.at_end = lifetime;
        self
    }

    fn spawn<F>(&self, set: Result<TaskSet, NoTaskSet>, future: F) -> State<F::Output>
    where
        F: Future<Output: Send> + Send + 'static,
    {
        let Ok(set) = set else { return State::NoTaskSet };
        match set.task(self.name).at_end(self.at_end).spawn_from(self.site, future) {
            Ok(task) => State::Task(task),
            Err(refused) => State::Refused(refused.reason),
        }
    }
}

impl<P> Clone for ShieldLayer<P> {
    fn clone(&self) -> Self {
        Self { name: self.name, site: self.site, at_end: self.at_end, protocol: PhantomData }
    }
}

impl<P> fmt::Debug for ShieldLayer<P> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ShieldLayer")
            .field("name", &self.name)
            .field("at_end", &self.at_end)
            .finish_non_exhaustive()
    }
}

impl<S, P> Layer<S> for ShieldLayer<P> {
    type Service = Shielded<S, P>;

    fn layer(&self, inner: S) -> Self::Service {
        Shielded { inner, layer: self.clone() }
    }
}

/// Middleware that runs the handler as a task of its request's set.
#[derive(Debug)]
pub struct Shielded<S, P = Http> {
    inner: S,
    layer: ShieldLayer<P>,
}

impl<S: Clone, P> Clone for Shielded<S, P> {
    fn clone(&self) -> Self {
        Self { inner: self.inner.clone(), layer: self.layer.clone() }
    }
}

impl<S, B, ResBody> Service<Request<B>> for Shielded<S, Http>
where
    S: Service<Request<B>, Response = Response<ResBody>, Future: Send + 'static>,
    S::Error: Send + 'static,
    ResBody: Body<Data: From<Bytes>> + Send + 'static,
{
    type Response = Response<ShieldBody<ResBody>>;
    type Error = S::Error;
    type Future = ShieldFuture<Result<S::Response, S::Error>>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        self.inner.poll_ready(cx)
    }

    fn call(&mut self, request: Request<B>) -> Self::Future {
        let dialect = Dialect::of(&request);
        let set = request.extensions().get::<TaskSet>().cloned();
        // The future is a task, in the context that is known now.
        let context = RequestContext::current_or(request.extensions().get());
        let state = context.sync_scope(|| {
            // The set too may be made now.
            let set = set.map_or_else(TaskSet::current, Ok);
            self.layer.spawn(set, self.inner.call(request))
        });
        ShieldFuture { state, dialect, protocol: PhantomData }
    }
}

impl<S, Req> Service<Req> for Shielded<S, Plain>
where
    S: Service<Req, Response: Send + 'static, Error: Send + 'static, Future: Send + 'static>,
{
    type Response = S::Response;
    type Error = ShieldError<S::Error>;
    type Future = ShieldFuture<Result<S::Response, S::Error>, Plain>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        self.inner.poll_ready(cx).map_err(ShieldError::Inner)
    }

    fn call(&mut self, request: Req) -> Self::Future {
        let future = self.inner.call(request);
        let state = self.layer.spawn(TaskSet::current(), future);
        ShieldFuture { state, dialect: Dialect::default(), protocol: PhantomData }
    }
}

/// Response future of [`Shielded`]. Dropping it changes nothing for the handler.
#[derive(Debug)]
#[must_use = "futures do nothing unless polled"]
pub struct ShieldFuture<T, P = Http> {
    state: State<T>,
    dialect: Dialect,
    protocol: PhantomData<fn() -> P>,
}

#[derive(Debug)]
enum State<T> {
    Task(TaskHandle<T>),
    Refused(SpawnError),
    NoTaskSet,
}

impl<T, E> State<Result<T, E>> {
    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<Result<T, ShieldError<E>>> {
        Poll::Ready(match self {
            Self::Task(task) => match ready!(Pin::new(task).poll(cx)) {
                Ok(output) => output.map_err(ShieldError::Inner),
                Err(error) => Err(ShieldError::Task(error)),
            },
            Self::Refused(reason) => Err(ShieldError::Refused(*reason)),
            Self::NoTaskSet => Err(ShieldError::NoTaskSet(NoTaskSet(()))),
        })
    }
}

impl<B, E> Future for ShieldFuture<Result<Response<B>, E>, Http> {
    type Output = Result<Response<ShieldBody<B>>, E>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let answer = match ready!(self.state.poll(cx)) {
            Ok(response) => return Poll::Ready(Ok(response.map(ShieldBody::inner))),
            Err(ShieldError::Inner(error)) => return Poll::Ready(Err(error)),
            Err(ShieldError::Task(TaskError::Panicked(panic))) => {
                Stopped::Panicked(panic).response(self.dialect)
            }
            Err(ShieldError::Task(_)) => SpawnError::Closed.answer().response(self.dialect),
            Err(ShieldError::Refused(reason)) => reason.answer().response(self.dialect),
            Err(ShieldError::NoTaskSet(_)) => NO_TASK_SET.response(self.dialect),
        };
        Poll::Ready(Ok(answer.map(ShieldBody::answer)))
    }
}

/// What is wrong is for the log of whoever has set it up, and not for the client.
const NO_TASK_SET: Answer = Answer::new(StatusCode::INTERNAL_SERVER_ERROR, 13, "no task set");

impl<T, E> Future for ShieldFuture<Result<T, E>, Plain> {
    type Output = Result<T, ShieldError<E>>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        self.state.poll(cx)
    }
}

pin_project! {
    /// Response body of [`Shielded`].
    #[derive(Debug)]
    pub struct ShieldBody<B> {
        #[pin]
        content: Content<B>,
    }
}

pin_project! {
    #[project = ContentProj]
    #[derive(Debug)]
    enum Content<B> {
        Inner { #[pin] body: B },
        // Empty once it was read.
        Answer { bytes: Bytes },
    }
}

impl<B> ShieldBody<B> {
    const fn inner(body: B) -> Self {
        Self { content: Content::Inner { body } }
    }

    const fn answer(bytes: Bytes) -> Self {
        Self { content: Content::Answer { bytes } }
    }
}

impl<B: Default> Default for ShieldBody<B> {
    fn default() -> Self {
        Self::inner(B::default())
    }
}

impl<B: Body<Data: From<Bytes>>> Body for ShieldBody<B> {
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

/// Why a call of a [plain](ShieldLayer::plain) service failed.
///
/// It becomes a boxed error if `E` does: see [`BodyError`](crate::BodyError).
#[derive(Clone, Debug)]
#[non_exhaustive]
pub enum ShieldError<E> {
    /// The service yielded an error.
    Inner(E),
    /// The handler was not started.
    Refused(SpawnError),
    /// No [`TaskSetLayer`](crate::TaskSetLayer) is outside.
    NoTaskSet(NoTaskSet),
    /// The handler was told to end, or has panicked.
    Task(TaskError),
}

impl<E: fmt::Display> fmt::Display for ShieldError<E> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Inner(error) => error.fmt(f),
            Self::Refused(reason) => reason.fmt(f),
            Self::NoTaskSet(error) => error.fmt(f),
            Self::Task(error) => error.fmt(f),
        }
    }
}

impl<E> From<ShieldError<E>> for Box<dyn Error + Send + Sync>
where
    E: Into<Self>,
{
    fn from(error: ShieldError<E>) -> Self {
        match error {
            ShieldError::Inner(error) => error.into(),
            ShieldError::Refused(reason) => reason.into(),
            ShieldError::NoTaskSet(error) => error.into(),
            ShieldError::Task(error) => error.into(),
        }
    }
}
