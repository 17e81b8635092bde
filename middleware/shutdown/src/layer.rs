use std::{
    borrow::Cow,
    fmt,
    marker::PhantomData,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
};

use bytes::Bytes;
use http::{HeaderValue, Method, Request, Response, StatusCode, Version, header, request::Parts};
use http_body::{Body, Frame, SizeHint};
use pin_project_lite::pin_project;
use tokio::time::Instant;
use tower_catch_unwind::short_method;
use tower_layer::Layer;
use tower_request_context::{Dialect, RequestContext};
use tower_response_end::{
    Asked, BodyError, CallError, End, Hook, Http, OnEnd, Plain, Stop, StoppableBody,
    StoppableFuture, Stopped, Waiter, Watch,
};
use tower_service::Service;
use tower_task_set::Outcome;

use crate::{
    ShutdownWatch,
    roll::{self, Name, Place, Route},
    state::State,
};

/// Counts the requests in flight, refuses those that come too late, and ends those that are left at
/// the deadline.
///
/// It has one place in a stack: a request that comes through two layers of a shutdown counts twice.
///
/// See the [crate's example](crate#example).
pub struct ShutdownLayer<P = Http> {
    state: Arc<State>,
    in_extensions: bool,
    route: Option<Arc<RouteOf>>,
    protocol: PhantomData<fn() -> P>,
}

type RouteOf = dyn Fn(&Parts) -> Option<Cow<'static, str>> + Send + Sync;

impl ShutdownLayer {
    pub(crate) const fn new(state: Arc<State>) -> Self {
        Self { state, in_extensions: false, route: None, protocol: PhantomData }
    }

    /// The same layer for a `Service` of anything else than HTTP requests: there a request is in
    /// flight until its future is ready, and what is refused or ended is a [`CallError`].
    pub fn plain(self) -> ShutdownLayer<Plain> {
        ShutdownLayer {
            state: self.state,
            in_extensions: false,
            route: None,
            protocol: PhantomData,
        }
    }

    /// Puts a [`ShutdownWatch`] into the request's type map, where axum's `Extension` finds it.
    /// Costs the allocations of the map.
    pub const fn in_extensions(mut self) -> Self {
        self.in_extensions = true;
        self
    }

    /// Asks `route` by which route a request came, for the report to name it by.
    ///
    /// By default a request is named by its method, and one of gRPC by its path too, which names
    /// what is called. Other paths are left out: they are what a stranger has written, and may hold
    /// what nobody should read. What `route` says is cut at 256 characters, and escaped.
    ///
    /// ```
    /// # use std::time::Duration;
    /// # use tower_shutdown::Shutdown;
    /// /// What the router has put there. axum's is `MatchedPath`, in layers of a `Router`.
    /// #[derive(Clone)]
    /// struct Matched(&'static str);
    ///
    /// let shutdown = Shutdown::new(Duration::from_secs(25));
    /// // For each request, so it had better be cheap.
    /// let layer = shutdown.layer().route(|request| {
    ///     let matched = request.extensions.get::<Matched>()?;
    ///     Some(matched.0.into())
    /// });
    /// # let _ = layer;
    /// ```
    pub fn route(
        mut self,
        route: impl Fn(&Parts) -> Option<Cow<'static, str>> + Send + Sync + 'static,
    ) -> Self {
        self.route = Some(Arc::new(route));
        self
    }

    fn name<B>(&self, request: Request<B>, dialect: Dialect) -> (Name, Request<B>) {
        let method = short_method(request.method());
        let (route, request) = match &self.route {
            None => (None, request),
            Some(route) => {
                let (parts, body) = request.into_parts();
                let route = self.state.log.call("route", || route(&parts)).flatten();
                (route, Request::from_parts(parts, body))
            }
        };
        let grpc = || request.uri().path_and_query().filter(|_| dialect.is_grpc()).cloned();
        let route = match route {
            Some(name) => Route::Named(name),
            None => grpc().map_or(Route::Unknown, Route::Grpc),
        };
        (Name::Http(method, route), request)
    }
}

impl<P> Clone for ShutdownLayer<P> {
    fn clone(&self) -> Self {
        Self {
            state: self.state.clone(),
            in_extensions: self.in_extensions,
            route: self.route.clone(),
            protocol: PhantomData,
        }
    }
}

impl<P> fmt::Debug for ShutdownLayer<P> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ShutdownLayer")
            .field("in_extensions", &self.in_extensions)
            .finish_non_exhaustive()
    }
}

impl<S, P> Layer<S> for ShutdownLayer<P> {
    type Service = CountRequests<S, P>;

    fn layer(&self, inner: S) -> Self::Service {
        CountRequests { inner, layer: self.clone() }
    }
}

/// Middleware that knows the requests in flight.
#[derive(Debug)]
pub struct CountRequests<S, P = Http> {
    inner: S,
    layer: ShutdownLayer<P>,
}

impl<S: Clone, P> Clone for CountRequests<S, P> {
    fn clone(&self) -> Self {
        Self { inner: self.inner.clone(), layer: self.layer.clone() }
    }
}

// `poll_ready` refuses nothing: a server would hang on a service that is not ready, and could not
// answer on one that fails.
impl<S, B, ResBody> Service<Request<B>> for CountRequests<S, Http>
where
    S: Service<Request<B>, Response = Response<ResBody>>,
    ResBody: Body<Data: From<Bytes>>,
{
    type Response = Response<ResponseBody<ResBody>>;
    type Error = S::Error;
    type Future = ResponseFuture<S::Future>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        self.inner.poll_ready(cx)
    }

    fn call(&mut self, request: Request<B>) -> Self::Future {
        let state = &self.layer.state;
        let (asked, dialect) = (Asked::of(&request), Dialect::of(&request));
        let (name, mut request) = self.layer.name(request, dialect);
        let in_flight = InFlight::enter(state, name);
        let closes = (request.version() < Version::HTTP_2).then(|| Closes {
            state: state.clone(),
            connects: *request.method() == Method::CONNECT,
        });
        if self.layer.in_extensions {
            request.extensions_mut().insert(ShutdownWatch::new(state.clone()));
        }
        let is_refused = in_flight.is_refused();
        let inner = StoppableFuture::http(in_flight, asked, dialect, request, |request| Admitted {
            inner: (!is_refused).then(|| self.inner.call(request)),
        });
        ResponseFuture { inner, closes }
    }
}

impl<S, Req> Service<Req> for CountRequests<S, Plain>
where
    S: Service<Req>,
{
    type Response = S::Response;
    type Error = CallError<S::Error>;
    type Future = ResponseFuture<S::Future, Plain>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        self.inner.poll_ready(cx).map_err(CallError::Inner)
    }

    fn call(&mut self, request: Req) -> Self::Future {
        let in_flight = InFlight::enter(&self.layer.state, Name::Call);
        let is_refused = in_flight.is_refused();
        let inner = StoppableFuture::<_, _, Plain>::plain(in_flight, request, |request| Admitted {
            inner: (!is_refused).then(|| self.inner.call(request)),
        });
        ResponseFuture { inner, closes: None }
    }
}

pin_project! {
    /// Response future of [`CountRequests`].
    #[derive(Debug)]
    #[must_use = "futures do nothing unless polled"]
    pub struct ResponseFuture<F, P = Http>
    where
        F: Future,
    {
        #[pin]
        inner: StoppableFuture<Admitted<F>, InFlight, P>,
        // Over HTTP/2 the host sends a GOAWAY.
        closes: Option<Closes>,
    }
}

/// The connection is to be closed after a response during the drain.
#[derive(Debug)]
struct Closes {
    state: Arc<State>,
    /// It is asked to become a tunnel.
    connects: bool,
}

impl Closes {
    /// Whether this is a response, and not the beginning of something else on its connection.
    fn after(&self, status: StatusCode) -> bool {
        self.state.is_draining()
            && status != StatusCode::SWITCHING_PROTOCOLS
            && !(self.connects && status.is_success())
    }
}

impl<F, B, E> Future for ResponseFuture<F>
where
    F: Future<Output = Result<Response<B>, E>>,
    B: Body<Data: From<Bytes>>,
{
    type Output = Result<Response<ResponseBody<B>>, E>;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let this = self.project();
        let mut output = ready!(this.inner.poll(cx));
        if let (Some(closes), Ok(response)) = (this.closes, &mut output) {
            if closes.after(response.status()) {
                // A full map takes no more. What the inner service says of its connection stays.
                let close = HeaderValue::from_static("close");
                drop(response.headers_mut().try_append(header::CONNECTION, close));
            }
        }
        Poll::Ready(output.map(|response| response.map(|inner| ResponseBody { inner })))
    }
}

impl<F, T, E> Future for ResponseFuture<F, Plain>
where
    F: Future<Output = Result<T, E>>,
{
    type Output = Result<T, CallError<E>>;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        self.project().inner.poll(cx)
    }
}

pin_project! {
    /// Response body of [`CountRequests`].
    #[derive(Debug)]
    pub struct ResponseBody<B> {
        #[pin]
        inner: StoppableBody<B, InFlight>,
    }
}

/// An empty body that nobody counts.
impl<B: Default> Default for ResponseBody<B> {
    fn default() -> Self {
        Self { inner: StoppableBody::default() }
    }
}

impl<B> Body for ResponseBody<B>
where
    B: Body<Data: From<Bytes>>,
{
    type Data = B::Data;
    type Error = BodyError<B::Error>;

    fn poll_frame(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<B::Data>, Self::Error>>> {
        self.project().inner.poll_frame(cx)
    }

    fn is_end_stream(&self) -> bool {
        self.inner.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.inner.size_hint()
    }
}

pin_project! {
    /// The future of a request that was admitted. Of one that was not there is none: it waits until
    /// it is ended, which is at once.
    #[derive(Debug)]
    struct Admitted<F> {
        #[pin]
        inner: Option<F>,
    }
}

impl<F: Future> Future for Admitted<F> {
    type Output = F::Output;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<F::Output> {
        self.project().inner.as_pin_mut().map_or(Poll::Pending, |inner| inner.poll(cx))
    }
}

/// One request, from the call to the end of its response.
#[derive(Debug)]
struct InFlight {
    hook: Hook<Leave>,
    /// For the deadline. `None`: it was refused.
    deadline: Option<(Arc<State>, Waiter)>,
    is_told: bool,
}

impl InFlight {
    fn enter(state: &Arc<State>, name: Name) -> Self {
        let started = Instant::now();
        let trace_id =
            state.log.call("value", || RequestContext::current().get().copied()).flatten();
        let place = state.enter(roll::Request { name, started, trace_id });
        let admitted = place.map(|place| (state.clone(), place));
        Self {
            deadline: admitted.as_ref().map(|(state, _)| (state.clone(), state.ending.waiter())),
            hook: Hook::new(Leave { admitted, was_ended: false }),
            is_told: false,
        }
    }

    const fn is_refused(&self) -> bool {
        self.deadline.is_none()
    }
}

impl Watch for InFlight {
    fn enter(&mut self) {
        self.hook.enter();
    }

    fn leave(&mut self) {
        self.hook.leave();
    }

    fn before_drop(&mut self, end: End) {
        // Told, it may still have come to its end with what it had ready; and if it is dropped for
        // that, the end may be a panic.
        if self.is_told && end == End::Disconnected {
            if let Some(leave) = self.hook.get_mut() {
                leave.was_ended = true;
            }
        }
        self.hook.before_drop(end);
    }

    fn end(&mut self, end: End) {
        self.hook.end(end);
    }
}

impl Stop for InFlight {
    fn poll_stop(&mut self, cx: &mut Context<'_>) -> Poll<Stopped> {
        if let Some((_, waiter)) = &mut self.deadline {
            ready!(waiter.poll_given(cx));
            self.is_told = true;
        }
        Poll::Ready(Stopped::Shutdown)
    }

    // Tasks are cancelled too, and what waits for them may be ready before this is seen.
    fn poll_end(&mut self, _: &mut Context<'_>) -> Poll<Option<Stopped>> {
        if self.may_end() {
            return Poll::Ready(None);
        }
        if let Some((state, _)) = &self.deadline {
            // All of it, before this request's tasks end with it, or they would not be among the
            // forced.
            state.cancel();
        }
        self.is_told = true;
        Poll::Ready(Some(Stopped::Shutdown))
    }

    fn may_end(&self) -> bool {
        self.deadline.as_ref().is_none_or(|(state, _)| !state.is_cancelled())
    }
}

/// What is done when the response is over and nobody holds it any more.
#[derive(Debug)]
struct Leave {
    /// `None`: it was refused.
    admitted: Option<(Arc<State>, Place)>,
    was_ended: bool,
}

impl OnEnd for Leave {
    fn on_end(self, end: End) {
        let outcome = match end {
            End::Panicked => Outcome::Panicked,
            _ => Outcome::Cancelled,
        };
        if let Some((state, place)) = self.admitted {
            state.roll.leave(place, self.was_ended.then_some(outcome));
        }
    }
}
