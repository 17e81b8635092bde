use std::{
    fmt,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
};

use http::{Request, Uri};
use pin_project_lite::pin_project;
use tower_catch_unwind::Log;
use tower_layer::Layer;
use tower_request_context::RequestContext;
use tower_service::Service;
use tracing::Span;

use crate::{TraceContext, context};

/// Adds the trace context of the request or the task that calls to what a client sends.
///
/// It fits any client that is a `Service<http::Request<B>>`: hyper-util's, tonic's channel. Where
/// there is no trace context, as behind tower's `Buffer`, that of the [`RequestContext`] in the call's
/// type map counts; a call that has none either is sent as it is.
///
/// # Redirects
///
/// It goes inside of whatever follows redirects, so that it sees every request that is sent; then
/// [`only`](Self::only) keeps the headers from other hosts. That a request is a redirect it cannot
/// see, so without `only` each gets them. Outside, it sees the first request alone, and it is the
/// follower that decides which headers go on: tower-http's keeps these, unless its policy is
/// `FilterCredentials::new().remove_all()`. hyper-util's client and tonic's channel follow none.
#[derive(Clone)]
pub struct PropagateLayer<A = ()> {
    allow: A,
    // Where the panics of `allow` are told, if it is the user's.
    log: Option<Arc<Log>>,
    b3: bool,
}

impl PropagateLayer {
    /// A layer that adds `traceparent`, `tracestate` and `x-request-id`, wherever the request goes.
    pub const fn new() -> Self {
        Self { allow: (), log: None, b3: false }
    }
}

impl<A> PropagateLayer<A> {
    /// Adds nothing to requests that `allow` does not allow, and removes from them what is there:
    /// it may be of another hop, or of the request that is served here.
    ///
    /// Choose this for a client that calls hosts of others (W3C Trace Context Level 2, section
    /// "Information Exposure"), or that follows redirects.
    pub fn only<B>(self, allow: B) -> PropagateLayer<B> {
        PropagateLayer { allow, log: Some(Arc::default()), b3: self.b3 }
    }

    /// Also adds a `b3` header, for callees that know no other.
    pub const fn b3(mut self) -> Self {
        self.b3 = true;
        self
    }
}

impl<A: Allow> PropagateLayer<A> {
    fn allows(&self, uri: &Uri) -> bool {
        match &self.log {
            Some(log) => log.call("allow", || self.allow.allow(uri)).unwrap_or(false),
            None => self.allow.allow(uri),
        }
    }
}

impl Default for PropagateLayer {
    fn default() -> Self {
        Self::new()
    }
}

// Closures are not `Debug`.
impl<A> fmt::Debug for PropagateLayer<A> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PropagateLayer").field("b3", &self.b3).finish_non_exhaustive()
    }
}

impl<S, A: Clone> Layer<S> for PropagateLayer<A> {
    type Service = Propagate<S, A>;

    fn layer(&self, inner: S) -> Self::Service {
        Propagate { inner, layer: self.clone() }
    }
}

/// Middleware that adds the trace context to what a client sends.
#[derive(Clone)]
pub struct Propagate<S, A = ()> {
    inner: S,
    layer: PropagateLayer<A>,
}

impl<S: fmt::Debug, A> fmt::Debug for Propagate<S, A> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Propagate").field("inner", &self.inner).field("layer", &self.layer).finish()
    }
}

impl<S, A, B> Service<Request<B>> for Propagate<S, A>
where
    S: Service<Request<B>>,
    A: Allow,
{
    type Response = S::Response;
    type Error = S::Error;
    type Future = CallFuture<S::Future>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        self.inner.poll_ready(cx)
    }

    fn call(&mut self, mut request: Request<B>) -> Self::Future {
        let mut span = Span::none();
        if !self.layer.allows(request.uri()) {
            context::remove(request.headers_mut());
        } else if let Some(mut call) = call_of(&request) {
            span = call.open_call();
            call.write(request.headers_mut(), self.layer.b3);
        }
        let inner = span.in_scope(|| self.inner.call(request));
        CallFuture { inner: Some(inner), span }
    }
}

/// The call, made from here; or, behind tower's `Buffer` say, from where the type map comes from.
fn call_of<B>(request: &Request<B>) -> Option<TraceContext> {
    let carried = request.extensions().get::<RequestContext>();
    let has_call = |context: &RequestContext| context.get().map(TraceContext::call);
    has_call(&RequestContext::current()).or_else(|| carried.and_then(has_call))
}

pin_project! {
    /// Response future of [`Propagate`].
    #[derive(Debug)]
    #[must_use = "futures do nothing unless polled"]
    pub struct CallFuture<F> {
        // `None` once it is ready, so that it is dropped in its span.
        #[pin]
        inner: Option<F>,
        span: Span,
    }

    impl<F> PinnedDrop for CallFuture<F> {
        fn drop(this: Pin<&mut Self>) {
            let mut this = this.project();
            if this.inner.is_some() {
                this.span.in_scope(|| this.inner.set(None));
            }
        }
    }
}

impl<F: Future> Future for CallFuture<F> {
    type Output = F::Output;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<F::Output> {
        let mut this = self.project();
        let output = this.span.in_scope(|| {
            let inner = this.inner.as_mut().as_pin_mut().expect("polled after it was ready");
            let output = inner.poll(cx);
            if output.is_ready() {
                this.inner.set(None);
            }
            output
        });
        if output.is_ready() {
            // The future may be kept for longer than the call took.
            *this.span = Span::none();
        }
        output
    }
}

/// Says where a [`PropagateLayer`] sends its headers. Closures `Fn(&Uri) -> bool` are this, and
/// `()` allows everything. One that panics allows nothing, and is logged.
pub trait Allow {
    /// Whether a request to `uri` gets them.
    fn allow(&self, uri: &Uri) -> bool;
}

impl Allow for () {
    fn allow(&self, _: &Uri) -> bool {
        true
    }
}

impl<F: Fn(&Uri) -> bool> Allow for F {
    fn allow(&self, uri: &Uri) -> bool {
        self(uri)
    }
}
