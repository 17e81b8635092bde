//! When a response is really over, and how.
//!
//! [`ResponseEndLayer`] calls a hook once for each request: with [`End::Completed`] when the whole
//! response has been handed to the server, or with what kept it from that. Metrics, access logs
//! and locks that last as long as their response hang on it, as do the other layers of this
//! family.
//!
//! Waiting for the end of the body stream, or for the drop of the body, does not tell. hyper drops
//! a body of known length after its last byte without polling it to `None`, and over HTTP/1 it
//! never polls the body of a HEAD, 204 or 304 at all. A response ends by the first of these signs:
//!
//! | | sign | end |
//! |---|---|---|
//! | R1 | it is handed over and no body will be written: HEAD, 1xx, 204, 304, 2xx to CONNECT | `Completed` |
//! | R2 | it is handed over and its body [is at its end](Body::is_end_stream) | `Completed` |
//! | R3 | the body yields `None` | `Completed` |
//! | R4 | the body yields trailers | `Completed` |
//! | R5 | the body yields data and is then at its end | `Completed` |
//! | R6 | the body is dropped after as many bytes as Content-Length or an exact size hint said, or after it has told who asked that it is at its end | `Completed` |
//! | R7 | the service or the body yields an error | `Failed` |
//! | R8 | either panics, or the response carries the [`Panic`] that it answers to | `Panicked` |
//! | R9 | either is dropped before any of these | `Disconnected` |
//!
//! A layer that may [end](#ending-a-response) a response tells which end that is. Of what it cuts
//! short, layers inside see the drop, which is R9; and of what comes too late, the end that never
//! reaches the client. A layer that commits something on `Completed` has to be the outermost.
//!
//! `Completed` means handed to the server's write buffer, not received by the client; a response
//! with status 500 is as complete as any. With R9 an outer layer may have given up, a timeout for
//! instance: to this layer that is the same as a client that left.
//!
//! # Example
//!
//! ```
//! use std::{convert::Infallible, sync::{Arc, Mutex}};
//! use http::{Request, Response};
//! use http_body_util::{BodyExt, Full};
//! use tower::{Service, ServiceBuilder, ServiceExt, service_fn};
//! use tower_response_end::{End, ResponseEndLayer};
//!
//! # #[tokio::main(flavor = "current_thread")]
//! # async fn main() -> Result<(), Infallible> {
//! let log = Arc::new(Mutex::new(Vec::new()));
//! let hook_log = log.clone();
//! let mut service = ServiceBuilder::new()
//!     .layer(ResponseEndLayer::new(move |request: &Request<()>| {
//!         let (log, path) = (hook_log.clone(), request.uri().path().to_owned());
//!         move |end: End| log.lock().unwrap().push((path, end))
//!     }))
//!     .service(service_fn(async |_| Ok::<_, Infallible>(Response::new(Full::new(&b"hello"[..])))));
//!
//! let read = service.ready().await?.call(Request::get("/read").body(()).unwrap()).await?;
//! read.into_body().collect().await?;
//! let left = service.ready().await?.call(Request::get("/left").body(()).unwrap());
//! drop(left);
//!
//! let log = log.lock().unwrap();
//! assert_eq!(log[0], ("/read".to_owned(), End::Completed));
//! assert_eq!(log[1], ("/left".to_owned(), End::Disconnected));
//! # Ok(()) }
//! ```
//!
//! # Upgrades
//!
//! After 101 Switching Protocols, or 2xx to CONNECT, the socket lives on while response and body
//! are gone (R1). Whoever serves it takes a [`hold`] in the handler and keeps it as long as it is
//! served: the hook is called when the last hold is dropped.
//!
//! # Ending a response
//!
//! For those who write a layer that must end responses: at a deadline, at shutdown. What it knows
//! of one response is its [`Watch`], which is also [`Stop`]: when that says so, the inner future or
//! body is dropped, in scope, and the client is told. Before the head it gets an answer instead, a
//! problem document or a gRPC status; after it the body ends in an error, or in trailers if the
//! client speaks gRPC over HTTP/2. What comes to its own end is passed on, unless
//! [`Stop::poll_end`] says that it is too late. The service's future is a [`StoppableFuture`], its
//! body a [`StoppableBody`]. All responses that one event ends share a [`Signal`].
//!
//! ```
//! use std::{convert::Infallible, future::{Future, pending}, task::{Context, Poll}};
//! use bytes::Bytes;
//! use http::{Request, Response};
//! use http_body_util::Full;
//! use tower_request_context::Dialect;
//! use tower_response_end::{Asked, End, Signal, Stop, StoppableFuture, Stopped, Waiter, Watch};
//!
//! struct InFlight(Waiter);
//!
//! impl Watch for InFlight {
//!     fn end(&mut self, _: End) {}
//! }
//!
//! impl Stop for InFlight {
//!     fn poll_stop(&mut self, cx: &mut Context<'_>) -> Poll<Stopped> {
//!         self.0.poll_given(cx).map(|()| Stopped::Shutdown)
//!     }
//! }
//!
//! # #[tokio::main(flavor = "current_thread")]
//! # async fn main() -> Result<(), Infallible> {
//! let shutdown = Signal::new();
//! // In `Service::call`:
//! let request = Request::new(());
//! let (asked, dialect) = (Asked::of(&request), Dialect::of(&request));
//! let call = |_| pending::<Result<Response<Full<Bytes>>, Infallible>>();
//! let watch = InFlight(shutdown.waiter());
//! let response = StoppableFuture::http(watch, asked, dialect, request, call);
//!
//! shutdown.give();
//! assert_eq!(response.await?.status(), 503);
//! # Ok(()) }
//! ```
//!
//! # Cancellation
//!
//! Dropping the response future or the body drops what it wraps and then calls the hook. The hook
//! runs where the end is found, often in a server's connection task, so it must not block. If it
//! panics, the panic is contained and logged; so it is if the making of it does, and the request is
//! served without. A layer and its clones log at most 20 of these in a second.
//!
//! # What it cannot see
//!
//! hyper does not notice that an HTTP/1 client has left while a pipelined request waits in its
//! buffer, while the request's body has not been received to its end, or with `half_close(true)`:
//! there the response goes on until somebody else ends it. [`ResponseEndLayer::watch_request_body`]
//! helps where the handler reads the request's body: an error of reading it counts as
//! `Disconnected`. A body that is leaked has no end. A body that ends before its Content-Length is
//! `Completed` by its own word, though hyper then breaks the connection. A body that learns its size
//! after it was handed over, or from a layer outside that adds a Content-Length, and is dropped for
//! that before its end, is `Disconnected`.

mod hold;
mod request_body;
mod signal;
mod stop;

use std::{
    convert::{self, Infallible},
    fmt,
    marker::PhantomData,
    mem::{self, ManuallyDrop},
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
    task::{Context, Poll},
};

use bytes::Buf;
use http::{HeaderMap, Method, Request, Response, StatusCode, header};
use http_body::{Body, Frame, SizeHint};
use pin_project_lite::pin_project;
use tower_catch_unwind::{Log, Panic};
use tower_layer::Layer;
use tower_request_context::Dialect;
use tower_service::Service;

use request_body::Upload;

pub use hold::{Hold, Hook, OnEnd, hold};
pub use request_body::RequestBody;
pub use signal::{Signal, Waiter};
pub use stop::{BodyError, CallError, Stop, StoppableBody, StoppableFuture, Stopped};
pub use tower_request_context::{Http, Plain};

/// How a response ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum End {
    /// The whole response was handed to the server.
    Completed,
    /// The service or the body yielded an error.
    Failed,
    /// The service or the body panicked.
    Panicked,
    /// It was dropped half-way: the client left, or an outer layer gave up.
    Disconnected,
    /// The layer that watches it has ended it, for it took longer than it may.
    TimedOut,
}

/// Marks a layer for HTTP that watches the request's body too.
#[derive(Clone, Copy, Debug)]
pub struct WithRequestBody(());

/// Calls a hook when a response is over.
///
/// See the [crate's example](crate#example).
pub struct ResponseEndLayer<M, P = Http> {
    make: M,
    log: Arc<Log>,
    protocol: PhantomData<fn() -> P>,
}

impl<M> ResponseEndLayer<M> {
    /// A layer that asks `make` for a hook for each request.
    pub fn new(make: M) -> Self {
        Self { make, log: Arc::default(), protocol: PhantomData }
    }

    /// The same layer for a `Service` of anything else than HTTP requests: there the response is
    /// over when its future is.
    pub fn plain(self) -> ResponseEndLayer<M, Plain> {
        ResponseEndLayer { make: self.make, log: self.log, protocol: PhantomData }
    }

    /// Also watches the request's body: an error of reading it counts as [`End::Disconnected`],
    /// at once, whatever the handler makes of it. So a layer that makes errors of its own, such as
    /// a limit of the body's size, goes inside.
    ///
    /// The inner service then gets a `Request<RequestBody<B>>`. axum's router and tonic's routes
    /// take that as it is (and box it once more); any other service must name the type or be
    /// generic over it.
    pub fn watch_request_body(self) -> ResponseEndLayer<M, WithRequestBody> {
        ResponseEndLayer { make: self.make, log: self.log, protocol: PhantomData }
    }
}

impl<M, P> ResponseEndLayer<M, P> {
    fn hook<Req>(&self, request: &Req) -> Hook<M::OnEnd>
    where
        M: MakeOnEnd<Req>,
    {
        Hook::made(&self.log, || self.make.make_on_end(request))
    }
}

impl<M: Clone, P> Clone for ResponseEndLayer<M, P> {
    fn clone(&self) -> Self {
        Self { make: self.make.clone(), log: self.log.clone(), protocol: PhantomData }
    }
}

impl<M, P> fmt::Debug for ResponseEndLayer<M, P> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ResponseEndLayer").finish_non_exhaustive()
    }
}

impl<S, M: Clone, P> Layer<S> for ResponseEndLayer<M, P> {
    type Service = ResponseEnd<S, M, P>;

    fn layer(&self, inner: S) -> Self::Service {
        ResponseEnd { inner, layer: self.clone() }
    }
}

/// Middleware that calls a hook when a response is over.
pub struct ResponseEnd<S, M, P = Http> {
    inner: S,
    layer: ResponseEndLayer<M, P>,
}

impl<S: Clone, M: Clone, P> Clone for ResponseEnd<S, M, P> {
    fn clone(&self) -> Self {
        Self { inner: self.inner.clone(), layer: self.layer.clone() }
    }
}

impl<S: fmt::Debug, M, P> fmt::Debug for ResponseEnd<S, M, P> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ResponseEnd")
            .field("inner", &self.inner)
            .field("layer", &self.layer)
            .finish()
    }
}

impl<S, M, B, ResBody> Service<Request<B>> for ResponseEnd<S, M, Http>
where
    S: Service<Request<B>, Response = Response<ResBody>>,
    M: MakeOnEnd<Request<B>>,
    ResBody: Body,
{
    type Response = Response<ResponseBody<ResBody, Hook<M::OnEnd>>>;
    type Error = S::Error;
    type Future = ResponseFuture<S::Future, Hook<M::OnEnd>, Http>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        self.inner.poll_ready(cx)
    }

    fn call(&mut self, request: Request<B>) -> Self::Future {
        let hook = self.layer.hook(&request);
        let asked = Asked::of(&request);
        ResponseFuture::http(hook, asked, request, |request| self.inner.call(request))
    }
}

impl<S, M, B, ResBody> Service<Request<B>> for ResponseEnd<S, M, WithRequestBody>
where
    S: Service<Request<RequestBody<B>>, Response = Response<ResBody>>,
    M: MakeOnEnd<Request<B>>,
    ResBody: Body,
{
    type Response = Response<ResponseBody<ResBody, Hook<M::OnEnd>>>;
    type Error = S::Error;
    type Future = ResponseFuture<S::Future, Hook<M::OnEnd>, Http>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        self.inner.poll_ready(cx)
    }

    fn call(&mut self, request: Request<B>) -> Self::Future {
        let hook = self.layer.hook(&request);
        let (request, asked) = Asked::with_request_body(request);
        ResponseFuture::http(hook, asked, request, |request| self.inner.call(request))
    }
}

impl<S, M, Req> Service<Req> for ResponseEnd<S, M, Plain>
where
    S: Service<Req>,
    M: MakeOnEnd<Req>,
{
    type Response = S::Response;
    type Error = S::Error;
    type Future = ResponseFuture<S::Future, Hook<M::OnEnd>, Plain>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        self.inner.poll_ready(cx)
    }

    fn call(&mut self, request: Req) -> Self::Future {
        let hook = self.layer.hook(&request);
        ResponseFuture::plain(hook, request, |request| self.inner.call(request))
    }
}

/// What a layer that is built on this one does with the life of one response: it gets the end,
/// and may have something of its own current while the inner service's code runs.
pub trait Watch {
    /// The inner service is about to be called, or its future or body to be polled or dropped.
    /// Before the end and after it.
    fn enter(&mut self) {}

    /// That has been done, or has panicked. Follows each [`enter`](Self::enter).
    fn leave(&mut self) {}

    /// The future or the body is about to be dropped, which is this end unless that panics.
    /// [`end`](Self::end) follows when it has been.
    fn before_drop(&mut self, end: End) {
        let _ = end;
    }

    /// The response is over. Called exactly once.
    fn end(&mut self, end: End);
}

/// What must be known of a request to know when its response is over.
#[derive(Debug)]
pub struct Asked {
    kind: Kind,
    /// In which to answer if a layer ends the response: told by [`StoppableFuture::http`].
    dialect: Dialect,
    upload: Option<Upload>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Head,
    Connect,
    Other,
}

impl Asked {
    /// Of a request whose body is not watched.
    pub fn of<B>(request: &Request<B>) -> Self {
        let kind = match *request.method() {
            Method::HEAD => Kind::Head,
            Method::CONNECT => Kind::Connect,
            _ => Kind::Other,
        };
        Self { kind, dialect: Dialect::default(), upload: None }
    }

    /// Of a request whose body is watched from here on.
    pub fn with_request_body<B>(request: Request<B>) -> (Request<RequestBody<B>>, Self) {
        let mut asked = Self::of(&request);
        let upload = asked.upload.insert(Upload::default());
        (request.map(|body| RequestBody::new(body, upload.clone())), asked)
    }
}

/// A [`Watch`], and what is known of the response that it watches.
///
/// All of it in one, for it is moved from the future to the body.
#[derive(Debug)]
struct Watched<W: Watch> {
    watch: W,
    upload: Option<Upload>,
    // How many bytes of the body are to come.
    left: u64,
    // Whether the body has said since its last poll that it is at its end.
    is_at_end: AtomicBool,
    kind: Kind,
    dialect: Dialect,
    // Whether the client of a `StoppableBody` sees trailers.
    in_trailers: bool,
    next: Next,
    ended: bool,
}

impl<W: Watch> Watched<W> {
    fn new(watch: W, asked: Asked) -> Self {
        let Asked { kind, dialect, upload } = asked;
        Self {
            watch,
            upload,
            left: ENDLESS,
            is_at_end: AtomicBool::new(false),
            kind,
            dialect,
            in_trailers: false,
            next: Next::Inner,
            ended: false,
        }
    }

    #[inline]
    fn end(&mut self, end: End) {
        if !mem::replace(&mut self.ended, true) {
            self.watch.end(end);
        }
    }

    /// Drops what is watched: its end, unless it has had that.
    #[inline]
    fn drop_inner<T>(&mut self, end: End, drop_inner: impl FnOnce()) {
        if !self.ended {
            self.watch.before_drop(end);
        }
        // To enter the scope for nothing is half of what a short body costs.
        if mem::needs_drop::<T>() {
            let inside = Inside::enter(self);
            drop_inner();
            inside.leave();
        }
        self.end(end);
    }

    /// R1. See RFC 9110, section 6.4.1.
    #[inline]
    fn has_no_body(&self, status: StatusCode) -> bool {
        match self.kind {
            Kind::Head => true,
            Kind::Connect if status.is_success() => true,
            Kind::Connect | Kind::Other => {
                status.is_informational()
                    || matches!(status, StatusCode::NO_CONTENT | StatusCode::NOT_MODIFIED)
            }
        }
    }

    #[inline]
    fn look_at_upload(&mut self, cx: &Context<'_>) {
        if self.upload.is_some() {
            self.look_at_its_upload(cx);
        }
    }

    #[inline(never)]
    fn look_at_its_upload(&mut self, cx: &Context<'_>) {
        if !self.ended && self.upload.as_ref().is_some_and(|upload| upload.poll_failed(cx)) {
            self.end(End::Disconnected);
        }
    }
}

/// Here code of the inner service runs: in scope, and a panic of it is the end (R8).
///
/// A guard and not a function around that code, for what this returns, a future or a response, is
/// large and would be moved once more.
struct Inside<'a, W: Watch>(&'a mut Watched<W>);

impl<'a, W: Watch> Inside<'a, W> {
    #[inline]
    fn enter(watched: &'a mut Watched<W>) -> Self {
        watched.watch.enter();
        Self(watched)
    }

    #[inline]
    fn leave(self) {
        ManuallyDrop::new(self).0.watch.leave();
    }
}

/// By unwinding.
impl<W: Watch> Drop for Inside<'_, W> {
    #[cold]
    fn drop(&mut self) {
        self.0.watch.leave();
        self.0.end(End::Panicked);
    }
}

pin_project! {
    /// Response future of [`ResponseEnd`], and of the layers that are built on it.
    #[derive(Debug)]
    #[must_use = "futures do nothing unless polled"]
    pub struct ResponseFuture<F, W, P = Http>
    where
        W: Watch,
    {
        // `None` once it is ready, so that it is dropped in scope.
        #[pin]
        inner: Option<F>,
        // `None` once it is ready.
        watched: Option<Watched<W>>,
        protocol: PhantomData<fn() -> P>,
    }

    impl<F, W, P> PinnedDrop for ResponseFuture<F, W, P>
    where
        W: Watch,
    {
        fn drop(this: Pin<&mut Self>) {
            let mut this = this.project();
            if let Some(watched) = this.watched {
                watched.drop_inner::<F>(End::Disconnected, || this.inner.set(None));
            }
        }
    }
}

/// What a response future has yielded, while that may not pass yet.
type Kept<T> = Option<Box<T>>;

impl<F, W: Watch> ResponseFuture<F, W, Http> {
    /// Watches what comes of `call` with `request`, the call of an HTTP service.
    // Not by a closure that owns the request: that is large, and would be copied.
    #[inline]
    pub fn http<R>(watch: W, asked: Asked, request: R, call: impl FnOnce(R) -> F) -> Self {
        Self::new(watch, asked, request, call)
    }
}

impl<F, W: Watch> ResponseFuture<F, W, Plain> {
    /// Watches what comes of `call` with `request`, the call of any other service.
    pub fn plain<R>(watch: W, request: R, call: impl FnOnce(R) -> F) -> Self {
        let asked = Asked { kind: Kind::Other, dialect: Dialect::default(), upload: None };
        Self::new(watch, asked, request, call)
    }
}

impl<F, W: Watch, P> ResponseFuture<F, W, P> {
    /// Watches what comes of `call` with `request`.
    // Where it is inlined into what wraps this, the future is copied once more, and that is large.
    #[inline(never)]
    fn new<R>(watch: W, asked: Asked, request: R, call: impl FnOnce(R) -> F) -> Self {
        let mut watched = Watched::new(watch, asked);
        let inside = Inside::enter(&mut watched);
        let inner = call(request);
        inside.leave();
        Self { inner: Some(inner), watched: Some(watched), protocol: PhantomData }
    }

    /// Ends it, and drops what it has yielded: it is not polled again. Yields the dialect to say so
    /// in.
    #[cold]
    #[inline(never)]
    fn stop<O>(self: Pin<&mut Self>, output: O, end: End) -> Dialect {
        let mut this = self.project();
        let Some(watched) = this.watched else { return Dialect::default() };
        let dialect = watched.dialect;
        watched.drop_inner::<(F, O)>(end, || {
            this.inner.set(None);
            drop(output);
        });
        *this.watched = None;
        dialect
    }
}

impl<F, W, B, E> ResponseFuture<F, W, Http>
where
    F: Future<Output = Result<Response<B>, E>>,
    W: Watch,
    B: Body,
{
    /// Yields the response with what `wrap` makes of the body. `ask` may end it, which is told whether
    /// it is still to come: then it yields what `stopped` makes of the reason.
    // The response is made in one go, for it is large and each move of it is a copy.
    #[inline]
    fn poll_or_stop<T, R>(
        mut self: Pin<&mut Self>,
        kept: &mut Kept<F::Output>,
        cx: &mut Context<'_>,
        wrap: impl FnOnce(ResponseBody<B, W>) -> T,
        ask: impl FnOnce(&mut W, &mut Context<'_>, bool) -> Poll<Option<(End, R)>>,
        stopped: impl FnOnce(R, Dialect) -> Response<T>,
    ) -> Poll<Result<Response<T>, E>> {
        let mut this = self.as_mut().project();
        let watched = this.watched.as_mut().expect("polled after it was ready");
        let inside = Inside::enter(watched);
        let output = poll(this.inner.as_mut(), kept, cx);
        // The body's own code, so in here.
        let (mut over, mut left) = (false, ENDLESS);
        if let Poll::Ready(output) = &output {
            this.inner.set(None);
            if let Ok(response) = output {
                over = response.body().is_end_stream();
                left = response.body().size_hint().exact().unwrap_or(ENDLESS);
            }
        }
        inside.leave();
        watched.look_at_upload(cx);
        match ask(&mut watched.watch, cx, output.is_pending()) {
            Poll::Ready(None) => {}
            Poll::Ready(Some((end, reason))) => {
                let dialect = self.stop(output, end);
                return Poll::Ready(Ok(stopped(reason, dialect)));
            }
            Poll::Pending => {
                keep(kept, output);
                return Poll::Pending;
            }
        }
        let end = match &output {
            Poll::Pending => return Poll::Pending,
            Poll::Ready(Err(_)) => Some(End::Failed),
            Poll::Ready(Ok(response)) => {
                watched.in_trailers = watched.dialect.ends_in_trailers(response);
                if response.extensions().get::<Panic>().is_some() {
                    Some(End::Panicked)
                } else if over || watched.has_no_body(response.status()) {
                    Some(End::Completed)
                } else {
                    watched.left = if left == ENDLESS { content_length(response) } else { left };
                    None
                }
            }
        };
        if let Some(end) = end {
            watched.end(end);
        }
        let watched = this.watched.take();
        output.map_ok(|response| {
            response.map(|body| wrap(ResponseBody { inner: Some(body), watched }))
        })
    }
}

impl<F, W, B, E> Future for ResponseFuture<F, W, Http>
where
    F: Future<Output = Result<Response<B>, E>>,
    W: Watch,
    B: Body,
{
    type Output = Result<Response<ResponseBody<B, W>>, E>;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        self.poll_or_stop(&mut None, cx, convert::identity, never, |never, _| match never {})
    }
}

impl<F, W, T, E> Future for ResponseFuture<F, W, Plain>
where
    F: Future<Output = Result<T, E>>,
    W: Watch,
{
    type Output = Result<T, E>;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        self.poll_or_stop(&mut None, cx, convert::identity, never, |never| match never {})
    }
}

impl<F, W, T, E> ResponseFuture<F, W, Plain>
where
    F: Future<Output = Result<T, E>>,
    W: Watch,
{
    /// As that of an HTTP service.
    fn poll_or_stop<C, R>(
        mut self: Pin<&mut Self>,
        kept: &mut Kept<F::Output>,
        cx: &mut Context<'_>,
        wrap: impl FnOnce(E) -> C,
        ask: impl FnOnce(&mut W, &mut Context<'_>, bool) -> Poll<Option<(End, R)>>,
        stopped: impl FnOnce(R) -> C,
    ) -> Poll<Result<T, C>> {
        let mut this = self.as_mut().project();
        let watched = this.watched.as_mut().expect("polled after it was ready");
        let inside = Inside::enter(watched);
        let output = poll(this.inner.as_mut(), kept, cx);
        if output.is_ready() {
            this.inner.set(None);
        }
        inside.leave();
        match ask(&mut watched.watch, cx, output.is_pending()) {
            Poll::Ready(None) => {}
            Poll::Ready(Some((end, reason))) => {
                self.stop(output, end);
                return Poll::Ready(Err(stopped(reason)));
            }
            Poll::Pending => {
                keep(kept, output);
                return Poll::Pending;
            }
        }
        if let Poll::Ready(output) = &output {
            watched.end(if output.is_ok() { End::Completed } else { End::Failed });
            *this.watched = None;
        }
        output.map_err(wrap)
    }
}

/// Polls the inner future, or yields what is kept of it.
#[inline]
fn poll<F: Future>(
    inner: Pin<&mut Option<F>>,
    kept: &mut Kept<F::Output>,
    cx: &mut Context<'_>,
) -> Poll<F::Output> {
    match inner.as_pin_mut() {
        Some(inner) => inner.poll(cx),
        None => take(kept),
    }
}

#[cold]
#[inline(never)]
fn take<T>(kept: &mut Kept<T>) -> Poll<T> {
    Poll::Ready(*kept.take().expect("polled after it was ready"))
}

#[cold]
#[inline(never)]
fn keep<T>(kept: &mut Kept<T>, output: Poll<T>) {
    if let Poll::Ready(output) = output {
        *kept = Some(Box::new(output));
    }
}

/// Of what ends no response.
fn never<W>(_: &mut W, _: &mut Context<'_>, _: bool) -> Poll<Option<(End, Infallible)>> {
    Poll::Ready(None)
}

/// As the number of bytes that are to come: nobody knows. So many never pass.
const ENDLESS: u64 = u64::MAX;

/// After the hint: hyper wants the two to be equal, and over HTTP/1 it goes by the hint if they are
/// not.
#[inline(never)]
fn content_length<B>(response: &Response<B>) -> u64 {
    let value = response.headers().get(header::CONTENT_LENGTH);
    let digits = value.and_then(|value| value.to_str().ok());
    // `parse` would take a sign.
    let digits = digits.filter(|digits| digits.bytes().all(|byte| byte.is_ascii_digit()));
    digits.and_then(|digits| digits.parse().ok()).unwrap_or(ENDLESS)
}

pin_project! {
    /// Response body of [`ResponseEnd`], and of the layers that are built on it.
    #[derive(Debug)]
    pub struct ResponseBody<B, W>
    where
        W: Watch,
    {
        // `None` only while it is dropped.
        #[pin]
        inner: Option<B>,
        // `None` for a default body alone.
        watched: Option<Watched<W>>,
    }

    impl<B, W> PinnedDrop for ResponseBody<B, W>
    where
        W: Watch,
    {
        fn drop(this: Pin<&mut Self>) {
            let mut this = this.project();
            if let Some(watched) = this.watched {
                // R6 classifies a drop and never ends early: HTTP/2 polls on for trailers after
                // the last byte. A server that has seen the end does not poll again.
                let is_over = watched.left == 0 || *watched.is_at_end.get_mut();
                let end = if is_over { End::Completed } else { End::Disconnected };
                watched.drop_inner::<B>(end, || this.inner.set(None));
            }
        }
    }
}

/// What a further poll of a body yields.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Next {
    /// What the inner body does.
    Inner,
    /// The end that the inner body has come to, when that may pass: the trailers, or nothing.
    End,
    /// Nothing, by the inner body's own word: what else that says of itself still holds.
    AtEnd,
    /// Nothing: the inner body must not be reached.
    Over,
}

/// An empty body that nobody watches.
impl<B: Default, W: Watch> Default for ResponseBody<B, W> {
    fn default() -> Self {
        Self { inner: Some(B::default()), watched: None }
    }
}

impl<B: Body, W: Watch> ResponseBody<B, W> {
    /// Whether it is at its end and `may_end`: else it is polled, and may end otherwise.
    #[inline]
    fn is_at_end_if(&self, may_end: impl FnOnce(&W) -> bool) -> bool {
        let is_at_end = || self.inner.as_ref().is_none_or(Body::is_end_stream);
        match &self.watched {
            Some(watched) if matches!(watched.next, Next::AtEnd | Next::Over) => true,
            Some(watched) => {
                let may_end = || watched.left == 0 || watched.ended || may_end(&watched.watch);
                let is_at_end = is_at_end() && may_end();
                watched.is_at_end.store(is_at_end, Relaxed);
                is_at_end
            }
            None => is_at_end(),
        }
    }

    /// Ends it, and drops what it has yielded. Whether the client sees trailers.
    #[cold]
    #[inline(never)]
    fn stop<T>(self: Pin<&mut Self>, frame: T, end: End) -> bool {
        let mut this = self.project();
        let Some(watched) = this.watched else { return false };
        let in_trailers = watched.in_trailers;
        watched.drop_inner::<(B, T)>(end, || {
            this.inner.set(None);
            drop(frame);
        });
        *this.watched = None;
        in_trailers
    }

    /// Yields the end that the inner body has come to, as [`poll_or_stop`](Self::poll_or_stop).
    #[cold]
    #[inline(never)]
    fn poll_end<E, R>(
        mut self: Pin<&mut Self>,
        kept: &mut Option<Arc<HeaderMap>>,
        cx: &mut Context<'_>,
        ask: impl FnOnce(&mut W, &mut Context<'_>, bool) -> Poll<Option<(End, R)>>,
        stopped: impl FnOnce(R, bool) -> Result<Frame<B::Data>, E>,
    ) -> Poll<Option<Result<Frame<B::Data>, E>>> {
        let this = self.as_mut().project();
        let Some(watched) = this.watched else { return Poll::Ready(None) };
        watched.look_at_upload(cx);
        match ask(&mut watched.watch, cx, false) {
            Poll::Pending => Poll::Pending,
            Poll::Ready(Some((end, reason))) => {
                let in_trailers = self.stop(kept.take(), end);
                Poll::Ready(Some(stopped(reason, in_trailers)))
            }
            Poll::Ready(None) => {
                watched.next = Next::Over;
                watched.end(End::Completed);
                let trailers = kept.take().and_then(Arc::into_inner);
                Poll::Ready(trailers.map(|trailers| Ok(Frame::trailers(trailers))))
            }
        }
    }

    /// Yields frames, with what `wrap` makes of an error. `ask` may end it, which is told whether more
    /// is to come: then it yields what `stopped` makes of the reason, told whether the client sees
    /// trailers.
    // A frame is made in one go, as a response is.
    #[inline]
    fn poll_or_stop<E, R>(
        mut self: Pin<&mut Self>,
        kept: &mut Option<Arc<HeaderMap>>,
        cx: &mut Context<'_>,
        wrap: impl FnOnce(B::Error) -> E,
        ask: impl FnOnce(&mut W, &mut Context<'_>, bool) -> Poll<Option<(End, R)>>,
        stopped: impl FnOnce(R, bool) -> Result<Frame<B::Data>, E>,
    ) -> Poll<Option<Result<Frame<B::Data>, E>>> {
        match self.watched.as_ref().map(|watched| watched.next) {
            Some(Next::Inner) | None => {}
            Some(Next::End) => return self.poll_end(kept, cx, ask, stopped),
            Some(Next::AtEnd | Next::Over) => {
                if let Some(watched) = self.project().watched {
                    watched.next = Next::Over;
                }
                return Poll::Ready(None);
            }
        }
        let mut this = self.as_mut().project();
        let Some(mut inner) = this.inner.as_mut().as_pin_mut() else { return Poll::Ready(None) };
        let Some(watched) = this.watched else {
            return inner.poll_frame(cx).map_err(wrap);
        };
        // It stays so if the inner body panics.
        watched.next = Next::Over;
        *watched.is_at_end.get_mut() = false;
        let inside = Inside::enter(watched);
        let frame = inner.as_mut().poll_frame(cx);
        let is_data = matches!(&frame, Poll::Ready(Some(Ok(frame))) if frame.is_data());
        let at_end = is_data && inner.is_end_stream();
        inside.leave();
        watched.look_at_upload(cx);
        if let Poll::Ready(Some(Ok(frame))) = &frame {
            let len = frame.data_ref().map_or(0, Buf::remaining);
            watched.left = watched.left.saturating_sub(u64::try_from(len).unwrap_or(u64::MAX));
        }
        // The last data pass, by the length that was told. The body's word that they are the last is
        // one of its own ends, which may come too late; so are trailers that tell how it went.
        let mut is_held = false;
        let is_told_later = || !is_data && watched.in_trailers;
        if watched.left > 0 || frame.is_pending() || is_told_later() {
            let is_to_come = is_data && !at_end || frame.is_pending();
            match ask(&mut watched.watch, cx, is_to_come) {
                Poll::Ready(None) => {}
                Poll::Ready(Some((end, reason))) => {
                    let in_trailers = self.stop(frame, end);
                    return Poll::Ready(Some(stopped(reason, in_trailers)));
                }
                Poll::Pending => is_held = true,
            }
        }
        // Taken out and put in again, for trailers are three times as large.
        match frame {
            Poll::Pending => {
                watched.next = Next::Inner;
                Poll::Pending
            }
            Poll::Ready(None) if is_held => {
                watched.next = Next::End;
                Poll::Pending
            }
            Poll::Ready(None) => {
                watched.end(End::Completed);
                Poll::Ready(None)
            }
            // It has failed in any case.
            Poll::Ready(Some(Err(error))) => {
                watched.end(End::Failed);
                Poll::Ready(Some(Err(wrap(error))))
            }
            Poll::Ready(Some(Ok(frame))) => match frame.into_data() {
                Ok(data) => {
                    watched.next = match (at_end, is_held) {
                        (false, _) => Next::Inner,
                        (true, false) => Next::AtEnd,
                        (true, true) => Next::End,
                    };
                    if watched.next == Next::AtEnd {
                        watched.end(End::Completed);
                    }
                    Poll::Ready(Some(Ok(Frame::data(data))))
                }
                Err(frame) if is_held => {
                    *kept = frame.into_trailers().ok().map(Arc::new);
                    watched.next = Next::End;
                    Poll::Pending
                }
                Err(frame) => {
                    watched.end(End::Completed);
                    Poll::Ready(Some(Ok(frame)))
                }
            },
        }
    }
}

impl<B: Body, W: Watch> Body for ResponseBody<B, W> {
    type Data = B::Data;
    type Error = B::Error;

    fn poll_frame(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<B::Data>, B::Error>>> {
        self.poll_or_stop(&mut None, cx, convert::identity, never, |never, _| match never {})
    }

    fn is_end_stream(&self) -> bool {
        self.is_at_end_if(|_| true)
    }

    fn size_hint(&self) -> SizeHint {
        let over = self.watched.as_ref().is_some_and(|watched| watched.next == Next::Over);
        match &self.inner {
            Some(inner) if !over => inner.size_hint(),
            _ => SizeHint::with_exact(0),
        }
    }
}

/// Makes the hook that a [`ResponseEndLayer`] calls. Closures `Fn(&Req) -> impl FnOnce(End)` are
/// this.
pub trait MakeOnEnd<Req> {
    /// The hook.
    type OnEnd: FnOnce(End) + Send + 'static;

    /// The hook for the response to `request`.
    fn make_on_end(&self, request: &Req) -> Self::OnEnd;
}

impl<F, Req, H> MakeOnEnd<Req> for F
where
    F: Fn(&Req) -> H,
    H: FnOnce(End) + Send + 'static,
{
    type OnEnd = H;

    fn make_on_end(&self, request: &Req) -> H {
        self(request)
    }
}
