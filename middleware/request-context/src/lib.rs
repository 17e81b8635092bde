//! Immutable values of the request being served, readable wherever its work runs.
//!
//! A [`RequestContext`] is what Go's `context.WithValue` and Gin's `c.Copy()` are for, without
//! their races: a value is put in once, by a layer, and from then on everything below that layer
//! reads it with [`RequestContext::current`]: the handler, the response body, the destructors of
//! both, and the tasks and blocking closures that a task set starts for the request. Capturing all
//! of it is one cheap clone.
//!
//! [`RequestContextLayer`] goes outside of whatever reads the value. It does not follow a request
//! where nothing of ours runs: a bare `tokio::spawn`, a connection upgrade's callback, or a `call`
//! that a buffer runs on its own task. There, move a `RequestContext` in and use
//! [`scope`](RequestContext::scope), or take it from the request's type map, where
//! [`in_extensions`](RequestContextLayer::in_extensions) puts it.
//!
//! | where | `RequestContext::current()` |
//! |---|---|
//! | handler, extractor, inner middleware: in `call` and in its future | yes |
//! | response body: `poll_frame`, and the drop of future and body | yes |
//! | a task or a blocking closure of `tower-task-set` | yes |
//! | `tokio::spawn`, `tokio::task::spawn_blocking`, `std::thread::spawn` | no: move it in, then `scope` or `sync_scope` |
//! | axum's `on_upgrade` callback | no: likewise |
//! | `call` of a service behind tower's `Buffer` | no: put it into the type map, for [`current_or`](RequestContext::current_or); its future sees it |
//!
//! # Example
//!
//! ```
//! use http::{Request, Response};
//! use http_body_util::BodyExt;
//! use tower::{Service, ServiceBuilder, ServiceExt, service_fn};
//! use tower_request_context::{RequestContext, RequestContextLayer};
//!
//! struct Tenant(String);
//!
//! # #[tokio::main(flavor = "current_thread")]
//! # async fn main() -> Result<(), std::convert::Infallible> {
//! let mut service = ServiceBuilder::new()
//!     .layer(RequestContextLayer::new(|request: &Request<String>| {
//!         Tenant(request.uri().host().unwrap_or("nobody").to_owned())
//!     }))
//!     .service(service_fn(|_request| async {
//!         let context = RequestContext::current();
//!         let tenant = context.get::<Tenant>().expect("the layer is above");
//!         Ok::<_, std::convert::Infallible>(Response::new(tenant.0.clone()))
//!     }));
//!
//! let request = Request::get("http://acme.test/").body(String::new()).unwrap();
//! let response = service.ready().await?.call(request).await?;
//! assert_eq!(response.into_body().collect().await?.to_bytes(), "acme.test");
//! # Ok(()) }
//! ```
//!
//! # Cancellation
//!
//! The context holds values and does nothing. A value is dropped with the last clone of a context
//! that contains it.

mod answer;
mod context;
mod ids;

#[cfg(feature = "axum")]
mod extract;

use std::{
    fmt,
    marker::PhantomData,
    pin::Pin,
    task::{Context, Poll},
};

use http::{Request, Response};
use http_body::{Body, Frame, SizeHint};
use pin_project_lite::pin_project;
use tower_layer::Layer;
use tower_service::Service;

pub use answer::{Answer, Dialect};
pub use context::{Inherit, RequestContext, Scope, Scoped, Task};
#[cfg(feature = "axum")]
pub use extract::NoRequestContext;
pub use ids::{ParseIdError, RequestId, SpanId, TraceId};

/// Marks a layer for HTTP: the response is over when its body is. Every layer is one unless it
/// was made [`plain`](RequestContextLayer::plain).
#[derive(Clone, Copy, Debug)]
pub struct Http(());

/// Marks a layer for any other `Service`: the response is over when its future is.
#[derive(Clone, Copy, Debug)]
pub struct Plain(());

/// Adds one value, made from the request, to the [`RequestContext`] of everything inside.
///
/// See the [crate's example](crate#example).
pub struct RequestContextLayer<M, P = Http> {
    make: M,
    in_extensions: bool,
    protocol: PhantomData<fn() -> P>,
}

impl<M> RequestContextLayer<M> {
    /// A layer that adds what `make` makes of each request.
    ///
    /// # Panics
    ///
    /// The service, in its `call`, if `make` does: without the value there is nothing to serve the
    /// request with. A layer that catches panics goes outside.
    pub const fn new(make: M) -> Self {
        Self { make, in_extensions: false, protocol: PhantomData }
    }

    /// The same layer for a `Service` of anything else than HTTP requests.
    pub fn plain(self) -> RequestContextLayer<M, Plain> {
        RequestContextLayer { make: self.make, in_extensions: false, protocol: PhantomData }
    }

    /// Also puts the [`RequestContext`] into the request's type map, for code that the layer's
    /// scope does not reach: a service behind a buffer. Layers further in keep it up to date.
    pub const fn in_extensions(mut self) -> Self {
        self.in_extensions = true;
        self
    }
}

impl<M: Clone, P> Clone for RequestContextLayer<M, P> {
    fn clone(&self) -> Self {
        Self { make: self.make.clone(), in_extensions: self.in_extensions, protocol: PhantomData }
    }
}

// Closures are not `Debug`.
impl<M, P> fmt::Debug for RequestContextLayer<M, P> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RequestContextLayer")
            .field("in_extensions", &self.in_extensions)
            .finish_non_exhaustive()
    }
}

impl<S, M: Clone, P> Layer<S> for RequestContextLayer<M, P> {
    type Service = WithContext<S, M, P>;

    fn layer(&self, inner: S) -> Self::Service {
        WithContext { inner, layer: self.clone() }
    }
}

/// Middleware that adds a value to the [`RequestContext`] of each request.
pub struct WithContext<S, M, P = Http> {
    inner: S,
    layer: RequestContextLayer<M, P>,
}

impl<S: Clone, M: Clone, P> Clone for WithContext<S, M, P> {
    fn clone(&self) -> Self {
        Self { inner: self.inner.clone(), layer: self.layer.clone() }
    }
}

impl<S: fmt::Debug, M, P> fmt::Debug for WithContext<S, M, P> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("WithContext")
            .field("inner", &self.inner)
            .field("layer", &self.layer)
            .finish()
    }
}

impl<S, M, B, ResBody> Service<Request<B>> for WithContext<S, M, Http>
where
    S: Service<Request<B>, Response = Response<ResBody>>,
    M: MakeValue<Request<B>>,
{
    type Response = Response<ResponseBody<ResBody>>;
    type Error = S::Error;
    type Future = ResponseFuture<S::Future, Http>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        self.inner.poll_ready(cx)
    }

    fn call(&mut self, mut request: Request<B>) -> Self::Future {
        let value = self.layer.make.make_value(&request);
        let carried = request.extensions().get::<RequestContext>();
        // What is in the type map must not fall behind: extractors look there first.
        let in_extensions = self.layer.in_extensions || carried.is_some();
        let context = RequestContext::current_or(carried).with(value);
        if in_extensions {
            request.extensions_mut().insert(context.clone());
        }
        ResponseFuture::new(context, || self.inner.call(request))
    }
}

impl<S, M, Req> Service<Req> for WithContext<S, M, Plain>
where
    S: Service<Req>,
    M: MakeValue<Req>,
{
    type Response = S::Response;
    type Error = S::Error;
    type Future = ResponseFuture<S::Future, Plain>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        self.inner.poll_ready(cx)
    }

    fn call(&mut self, request: Req) -> Self::Future {
        let context = RequestContext::current().with(self.layer.make.make_value(&request));
        ResponseFuture::new(context, || self.inner.call(request))
    }
}

pin_project! {
    /// Response future of [`WithContext`].
    #[derive(Debug)]
    #[must_use = "futures do nothing unless polled"]
    pub struct ResponseFuture<F, P = Http> {
        // `None` once it is ready, so that it is dropped in scope.
        #[pin]
        inner: Option<F>,
        scope: Scope,
        protocol: PhantomData<fn() -> P>,
    }

    impl<F, P> PinnedDrop for ResponseFuture<F, P> {
        fn drop(this: Pin<&mut Self>) {
            let mut this = this.project();
            if this.inner.is_some() {
                this.scope.enter(|| this.inner.set(None));
            }
        }
    }
}

impl<F, P> ResponseFuture<F, P> {
    fn new(context: RequestContext, call: impl FnOnce() -> F) -> Self {
        let mut scope = Scope::new(context);
        let inner = scope.enter(call);
        Self { inner: Some(inner), scope, protocol: PhantomData }
    }

    fn poll_inner(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<(F::Output, Scope)>
    where
        F: Future,
    {
        let mut this = self.project();
        let output = this.scope.enter(|| {
            let inner = this.inner.as_mut().as_pin_mut().expect("polled after it was ready");
            let output = inner.poll(cx);
            if output.is_ready() {
                this.inner.set(None);
            }
            output
        });
        output.map(|output| (output, std::mem::take(this.scope)))
    }
}

impl<F, B, E> Future for ResponseFuture<F, Http>
where
    F: Future<Output = Result<Response<B>, E>>,
{
    type Output = Result<Response<ResponseBody<B>>, E>;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        self.poll_inner(cx).map(|(result, scope)| {
            result.map(|response| response.map(|body| ResponseBody { inner: Some(body), scope }))
        })
    }
}

impl<F, T, E> Future for ResponseFuture<F, Plain>
where
    F: Future<Output = Result<T, E>>,
{
    type Output = Result<T, E>;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        self.poll_inner(cx).map(|(result, _)| result)
    }
}

pin_project! {
    /// Response body of [`WithContext`].
    #[derive(Debug)]
    pub struct ResponseBody<B> {
        // `None` only while it is dropped.
        #[pin]
        inner: Option<B>,
        scope: Scope,
    }

    impl<B> PinnedDrop for ResponseBody<B> {
        fn drop(this: Pin<&mut Self>) {
            let mut this = this.project();
            this.scope.enter(|| this.inner.set(None));
        }
    }
}

/// An empty body outside of any context.
impl<B: Default> Default for ResponseBody<B> {
    fn default() -> Self {
        Self { inner: Some(B::default()), scope: Scope::default() }
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
        match this.inner.as_pin_mut() {
            Some(inner) => this.scope.enter(|| inner.poll_frame(cx)),
            None => Poll::Ready(None),
        }
    }

    fn is_end_stream(&self) -> bool {
        self.inner.as_ref().is_none_or(Body::is_end_stream)
    }

    fn size_hint(&self) -> SizeHint {
        self.inner.as_ref().map_or_else(|| SizeHint::with_exact(0), Body::size_hint)
    }
}

/// Makes the value that a [`RequestContextLayer`] adds. Closures `Fn(&Req) -> T` are this.
pub trait MakeValue<Req> {
    /// What is added, and what [`RequestContext::get`] finds it by.
    type Value: Send + Sync + 'static;

    /// The value for `request`.
    fn make_value(&self, request: &Req) -> Self::Value;
}

impl<F, Req, T> MakeValue<Req> for F
where
    F: Fn(&Req) -> T,
    T: Send + Sync + 'static,
{
    type Value = T;

    fn make_value(&self, request: &Req) -> T {
        self(request)
    }
}
