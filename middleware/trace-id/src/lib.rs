//! W3C trace context, B3 and request ids: in, through the request's tasks, and out.
//!
//! [`TraceIdLayer`] gives every request a [`TraceContext`], from its headers or new, and a span
//! with the fields `trace_id`, `span_id` and `request_id`. Whatever runs for the request finds it
//! with [`TraceContext::current`]: the handler, the response body, the tasks and blocking closures
//! of its task set. Each task is a span of its own that repeats `trace_id`, so that the innermost
//! span of a log line always has it; a task that outlives its request links to the request's span
//! and does not nest in it. [`PropagateLayer`] and [`inject`] hand the context on to what is
//! called.
//!
//! The ids are in the request context, not in the span: they are there without a subscriber and
//! whatever its filter hides. In the context, `get::<TraceId>()`, `get::<SpanId>()` and
//! `get::<RequestId>()` find them too.
//!
//! The layer goes outside of whatever logs or answers. It works on either side of tower-http's
//! `TraceLayer`: the outer span is the parent. Of nested layers the outer one counts.
//!
//! # Example
//!
//! ```
//! use http::{Request, Response};
//! use http_body_util::Empty;
//! use tower::{Service, ServiceBuilder, ServiceExt, service_fn};
//! use tower_trace_id::{TraceContext, TraceIdLayer, Trust};
//!
//! # #[tokio::main(flavor = "current_thread")]
//! # async fn main() -> Result<(), std::convert::Infallible> {
//! let mut service = ServiceBuilder::new()
//!     .layer(TraceIdLayer::new().trust(Trust::Continue)) // behind my gateway
//!     .service(service_fn(async |_: Request<()>| {
//!         let context = TraceContext::current().expect("the layer is above");
//!         assert_eq!(context.trace_id().to_string(), "0af7651916cd43dd8448eb211c80319c");
//!         Ok::<_, std::convert::Infallible>(Response::new(Empty::<&[u8]>::new()))
//!     }));
//!
//! let request = Request::get("/orders")
//!     .header("traceparent", "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01")
//!     .header("x-request-id", "order-7");
//! let response = service.ready().await?.call(request.body(()).unwrap()).await?;
//! assert_eq!(response.headers()["x-request-id"], "order-7");
//! # Ok(()) }
//! ```
//!
//! # What is read
//!
//! The first of these that is there and valid: `traceparent` ([`TraceParent::parse`]) with
//! `tracestate` ([`TraceState::parse`]), `b3` ([`B3::parse`]), `X-B3-*` ([`B3::parse_multi`]); or
//! else a new trace begins. `x-request-id` is kept if it comes once and is a valid [`RequestId`],
//! whoever sends it; or else one is made. What is invalid is ignored, and no byte of it gets into
//! a span, a response or a call. No other header is touched, and the request's stay as they came.
//!
//! How much of a valid trace context is taken over is a matter of [`Trust`]; by default only a
//! link to it is kept.
//!
//! # What the response says
//!
//! `x-request-id`, exactly once: what the handler set is replaced, since it may be an upstream's,
//! and the header should lead to our log lines. The trace id is told
//! [if asked for](TraceIdLayer::trace_id_header). `tracestate` is removed, if the handler has
//! copied one from somewhere (W3C Trace Context Level 2, section "Privacy Considerations", "Other
//! risks").
//!
//! # In the log
//!
//! Subscribers that print the fields of spans have the ids on every line of a request and of its
//! tasks. In JSON, tracing-subscriber has those of the innermost span alone at `span.trace_id`: a
//! line in a span of one's own has them further out, in `spans`. Log stores find `trace_id` best as
//! a member of the line itself; the repository's `examples/json_logs.rs` puts it there, from the
//! context.
//!
//! # Costs
//!
//! Without a subscriber a request costs one system call for its ids and one allocation; one more if
//! the trace is continued and has a `tracestate`. The ids that a response tells are written into a
//! buffer of the thread's, which is used again when the heads before are gone; while heads are kept,
//! as HTTP/2 keeps the last ones of a connection, there is a new one for each eight ids. A task costs
//! nothing until something in it asks for its context.
//!
//! # OpenTelemetry
//!
//! There is no dependency on it. [`TraceIdLayer::on_span`] takes a hook that is called before a
//! span of ours is entered, which is when `set_parent` must be called; it can hand back the ids
//! that OpenTelemetry has given to the span. A bridge of some twenty lines, for current versions, is
//! in the repository's `tests/opentelemetry`.
//!
//! # Cancellation
//!
//! The layer only watches: dropping the response future or the body drops what they wrap, in the
//! request's context and span.

mod b3;
mod context;
mod propagate;
mod random;
mod w3c;

use std::{
    fmt,
    marker::PhantomData,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
};

use http::{HeaderMap, HeaderName, HeaderValue, Request, Response};
use http_body::{Body, Frame, SizeHint};
use pin_project_lite::pin_project;
use tower_catch_unwind::Log;
use tower_layer::Layer;
use tower_request_context::{RequestContext, Scope};
use tower_service::Service;
use tracing::Span;

use context::Logged;

pub use b3::{B3, Sampling};
pub use context::{OnSpan, TraceContext, inject};
pub use propagate::{Allow, CallFuture, Propagate, PropagateLayer};
pub use tower_request_context::{Http, Plain, RequestId, SpanId, TraceId};
pub use w3c::{TraceParent, TraceState};

/// How much of a valid trace context is taken over from whoever calls (W3C Trace Context Level 2,
/// sections "Security Considerations" and 3.4).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Trust {
    /// Nothing: a new trace begins, and [links](TraceContext::link) to the caller's. For the edge,
    /// where a stranger could forge trace ids and have everything recorded at our cost.
    #[default]
    Restart,
    /// All of it: the trace goes on, and with it the decision to record it. For callers of one's
    /// own, behind a gateway for instance.
    Continue,
    /// The trace goes on, but whether it is recorded is [decided here](TraceIdLayer::sample_ratio).
    Resample,
}

/// Gives every request a [`TraceContext`], and a span with its ids.
///
/// See the [crate's example](crate#example).
pub struct TraceIdLayer<T = Trust, P = Http> {
    trust: T,
    sample_ratio: f64,
    trace_id_header: Option<HeaderName>,
    on_span: Option<Arc<Logged<dyn OnSpan>>>,
    // Made with the first callback of the user's.
    log: Option<Arc<Log>>,
    in_extensions: bool,
    protocol: PhantomData<fn() -> P>,
}

impl TraceIdLayer {
    /// A layer for the public edge: it trusts nobody, and samples no trace.
    pub const fn new() -> Self {
        Self {
            trust: Trust::Restart,
            sample_ratio: 0.0,
            trace_id_header: None,
            on_span: None,
            log: None,
            in_extensions: false,
            protocol: PhantomData,
        }
    }
}

impl<T> TraceIdLayer<T> {
    /// How much is taken over from the caller: a [`Trust`], or a closure that chooses one for each
    /// request, for instance by who has been authenticated.
    pub fn trust<U>(mut self, trust: U) -> TraceIdLayer<U> {
        self.log.get_or_insert_default();
        self.with(trust)
    }

    /// The same layer for a `Service` of anything else than HTTP requests, a queue's worker for
    /// instance. Each call begins a new trace, unless it is made in a [`TraceContext`].
    pub fn plain(self) -> TraceIdLayer<(), Plain> {
        self.with(())
    }

    fn with<U, P>(self, trust: U) -> TraceIdLayer<U, P> {
        TraceIdLayer {
            trust,
            sample_ratio: self.sample_ratio,
            trace_id_header: self.trace_id_header,
            on_span: self.on_span,
            log: self.log,
            in_extensions: self.in_extensions,
            protocol: PhantomData,
        }
    }

    /// Also tells the trace id in this response header: `x-trace-id`, for instance.
    pub fn trace_id_header(mut self, name: HeaderName) -> Self {
        self.trace_id_header = Some(name);
        self
    }

    /// Also puts the [`RequestContext`] into the request's type map, for code that the layer's
    /// scope does not reach: a service behind a buffer.
    pub const fn in_extensions(mut self) -> Self {
        self.in_extensions = true;
        self
    }
}

impl<T, P> TraceIdLayer<T, P> {
    /// The share of traces, from 0.0 to 1.0, that are marked as sampled where the decision is
    /// ours: traces that begin here, and those that are resampled. It is 0.0 if not set, as W3C
    /// Trace Context Level 2 has it in section 3.2.2.5.1. What is less, or no number, is 0.0,
    /// and what is more is 1.0.
    ///
    /// Choose it by what may be recorded: everything that is called records what is sampled here.
    pub const fn sample_ratio(mut self, ratio: f64) -> Self {
        self.sample_ratio = ratio;
        self
    }

    /// Calls `hook` for each span before it is entered.
    pub fn on_span(mut self, hook: impl OnSpan) -> Self {
        let log = self.log.get_or_insert_default().clone();
        self.on_span = Some(Arc::new(Logged { log, hook }));
        self
    }

    /// The context of a request that came with these headers, around which `outer` is current.
    fn begin(&self, outer: &RequestContext, headers: &HeaderMap, trust: Trust) -> Place {
        if outer.get::<TraceContext>().is_some() {
            return Place { scope: Scope::new(outer.clone()), span: Span::none(), own: None };
        }
        let on_span = self.on_span.clone();
        let mut context = TraceContext::incoming(headers, trust, self.sample_ratio, on_span);
        let span = context.open_request();
        let context = outer.with_inherited(context);
        Place { scope: Scope::new(context.clone()), span, own: Some(context) }
    }
}

impl Default for TraceIdLayer {
    fn default() -> Self {
        Self::new()
    }
}

impl<T: Clone, P> Clone for TraceIdLayer<T, P> {
    fn clone(&self) -> Self {
        Self {
            trust: self.trust.clone(),
            sample_ratio: self.sample_ratio,
            trace_id_header: self.trace_id_header.clone(),
            on_span: self.on_span.clone(),
            log: self.log.clone(),
            in_extensions: self.in_extensions,
            protocol: PhantomData,
        }
    }
}

// Closures are not `Debug`.
impl<T, P> fmt::Debug for TraceIdLayer<T, P> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TraceIdLayer")
            .field("sample_ratio", &self.sample_ratio)
            .field("trace_id_header", &self.trace_id_header)
            .field("in_extensions", &self.in_extensions)
            .finish_non_exhaustive()
    }
}

impl<S, T: Clone, P> Layer<S> for TraceIdLayer<T, P> {
    type Service = WithTraceId<S, T, P>;

    fn layer(&self, inner: S) -> Self::Service {
        WithTraceId { inner, layer: self.clone() }
    }
}

/// Middleware that gives every request a [`TraceContext`].
pub struct WithTraceId<S, T = Trust, P = Http> {
    inner: S,
    layer: TraceIdLayer<T, P>,
}

impl<S: Clone, T: Clone, P> Clone for WithTraceId<S, T, P> {
    fn clone(&self) -> Self {
        Self { inner: self.inner.clone(), layer: self.layer.clone() }
    }
}

impl<S: fmt::Debug, T, P> fmt::Debug for WithTraceId<S, T, P> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("WithTraceId")
            .field("inner", &self.inner)
            .field("layer", &self.layer)
            .finish()
    }
}

impl<S, T, B, ResBody> Service<Request<B>> for WithTraceId<S, T, Http>
where
    S: Service<Request<B>, Response = Response<ResBody>>,
    T: ChooseTrust<Request<B>>,
{
    type Response = Response<ResponseBody<ResBody>>;
    type Error = S::Error;
    type Future = ResponseFuture<S::Future, Http>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        self.inner.poll_ready(cx)
    }

    fn call(&mut self, mut request: Request<B>) -> Self::Future {
        let layer = &self.layer;
        let carried = request.extensions().get::<RequestContext>();
        // What is in the type map must not fall behind: extractors look there first.
        let in_extensions = layer.in_extensions || carried.is_some();
        let outer = RequestContext::current_or(carried);
        let choose = || layer.trust.choose_trust(&request);
        let trust = match &layer.log {
            Some(log) => log.call("trust", choose).unwrap_or_default(),
            None => choose(),
        };
        let place = layer.begin(&outer, request.headers(), trust);
        if in_extensions {
            // Of nested layers an outer one may have made it, without this choice.
            request.extensions_mut().insert(place.own.as_ref().unwrap_or(&outer).clone());
        }
        let header = layer.trace_id_header.clone();
        ResponseFuture::new(place, header, || self.inner.call(request))
    }
}

impl<S, Req> Service<Req> for WithTraceId<S, (), Plain>
where
    S: Service<Req>,
{
    type Response = S::Response;
    type Error = S::Error;
    type Future = ResponseFuture<S::Future, Plain>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        self.inner.poll_ready(cx)
    }

    fn call(&mut self, request: Req) -> Self::Future {
        let outer = RequestContext::current();
        let place = self.layer.begin(&outer, &HeaderMap::new(), Trust::Restart);
        ResponseFuture::new(place, None, || self.inner.call(request))
    }
}

/// What is current while the request is served.
#[derive(Debug)]
struct Place {
    scope: Scope,
    span: Span,
    /// The context that this layer has made: not an outer one's.
    own: Option<RequestContext>,
}

impl Place {
    fn enter<R>(&mut self, f: impl FnOnce() -> R) -> R {
        let Self { scope, span, .. } = self;
        scope.enter(|| span.in_scope(f))
    }

    fn answer(&self, headers: &mut HeaderMap, trace_id_header: Option<&HeaderName>) {
        let Some(context) = self.own.as_ref().and_then(RequestContext::get::<TraceContext>) else {
            return;
        };
        headers.remove(w3c::TRACESTATE);
        let mut put = |name: &HeaderName, value: &dyn Fn() -> HeaderValue| {
            if headers.try_insert(name, value()).is_err() {
                // A full map takes nothing, not even for a name that it has.
                headers.remove(name);
                drop(headers.try_insert(name, value()));
            }
        };
        put(&context::X_REQUEST_ID, &|| context.request_id().to_header());
        if let Some(name) = trace_id_header {
            put(name, &|| context.trace_id().to_header());
        }
    }
}

pin_project! {
    /// Response future of [`WithTraceId`].
    #[derive(Debug)]
    #[must_use = "futures do nothing unless polled"]
    pub struct ResponseFuture<F, P = Http> {
        // `None` once it is ready, so that it is dropped in its place.
        #[pin]
        inner: Option<F>,
        // `None` once it is ready.
        place: Option<Place>,
        trace_id_header: Option<HeaderName>,
        protocol: PhantomData<fn() -> P>,
    }

    impl<F, P> PinnedDrop for ResponseFuture<F, P> {
        fn drop(this: Pin<&mut Self>) {
            let mut this = this.project();
            if let Some(place) = this.place {
                place.enter(|| this.inner.set(None));
            }
        }
    }
}

impl<F, P> ResponseFuture<F, P> {
    fn new(
        mut place: Place,
        trace_id_header: Option<HeaderName>,
        call: impl FnOnce() -> F,
    ) -> Self {
        let inner = place.enter(call);
        Self { inner: Some(inner), place: Some(place), trace_id_header, protocol: PhantomData }
    }

    fn poll_inner(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<(F::Output, Place)>
    where
        F: Future,
    {
        let mut this = self.project();
        let place = this.place.as_mut().expect("polled after it was ready");
        let output = place.enter(|| {
            let inner = this.inner.as_mut().as_pin_mut().expect("is there until it is ready");
            let output = inner.poll(cx);
            if output.is_ready() {
                this.inner.set(None);
            }
            output
        });
        output.map(|output| (output, this.place.take().expect("is there until now")))
    }
}

impl<F, B, E> Future for ResponseFuture<F, Http>
where
    F: Future<Output = Result<Response<B>, E>>,
{
    type Output = Result<Response<ResponseBody<B>>, E>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        self.as_mut().poll_inner(cx).map(|(result, place)| {
            let mut response = result?;
            place.answer(response.headers_mut(), self.project().trace_id_header.as_ref());
            Ok(response.map(|body| ResponseBody { inner: Some(body), place: Some(place) }))
        })
    }
}

impl<F, R, E> Future for ResponseFuture<F, Plain>
where
    F: Future<Output = Result<R, E>>,
{
    type Output = Result<R, E>;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        self.poll_inner(cx).map(|(result, _)| result)
    }
}

pin_project! {
    /// Response body of [`WithTraceId`].
    #[derive(Debug)]
    pub struct ResponseBody<B> {
        // `None` only while it is dropped.
        #[pin]
        inner: Option<B>,
        // `None` for a default body alone.
        place: Option<Place>,
    }

    impl<B> PinnedDrop for ResponseBody<B> {
        fn drop(this: Pin<&mut Self>) {
            let mut this = this.project();
            if let Some(place) = this.place {
                place.enter(|| this.inner.set(None));
            }
        }
    }
}

/// An empty body outside of any request.
impl<B: Default> Default for ResponseBody<B> {
    fn default() -> Self {
        Self { inner: Some(B::default()), place: None }
    }
}

impl<B: Body> Body for ResponseBody<B> {
    type Data = B::Data;
    type Error = B::Error;

    fn poll_frame(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Self::Data>, Self::Error>>> {
        let this = self.project();
        match (this.inner.as_pin_mut(), this.place) {
            (Some(inner), Some(place)) => place.enter(|| inner.poll_frame(cx)),
            (Some(inner), None) => inner.poll_frame(cx),
            (None, _) => Poll::Ready(None),
        }
    }

    fn is_end_stream(&self) -> bool {
        self.inner.as_ref().is_none_or(Body::is_end_stream)
    }

    fn size_hint(&self) -> SizeHint {
        self.inner.as_ref().map_or_else(|| SizeHint::with_exact(0), Body::size_hint)
    }
}

/// Chooses how much is taken over from whoever sends a request. A [`Trust`] is this, the same for
/// all, and closures `Fn(&Req) -> Trust` are. If one panics, it is [`Trust::Restart`], and logged.
pub trait ChooseTrust<Req> {
    /// The trust in whoever sends `request`.
    fn choose_trust(&self, request: &Req) -> Trust;
}

impl<Req> ChooseTrust<Req> for Trust {
    fn choose_trust(&self, _: &Req) -> Trust {
        *self
    }
}

impl<F: Fn(&Req) -> Trust, Req> ChooseTrust<Req> for F {
    fn choose_trust(&self, request: &Req) -> Trust {
        self(request)
    }
}
