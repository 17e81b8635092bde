//! Panics become outcomes.
//!
//! [`CatchUnwindLayer`] answers a request whose handler panics, and ends a response whose body
//! panics so that the client can tell it from a complete one. One event is logged for each panic;
//! nothing that was said in it reaches the client.
//!
//! | where | HTTP | gRPC | [plain](CatchUnwindLayer::plain) |
//! |---|---|---|---|
//! | `call`, the future, its drop once it is ready | 500, a problem document (RFC 9457) | status 13 | [`CallError::Panicked`] |
//! | `poll_frame` of the body | [`BodyError::Panicked`] | trailers with status 13 | |
//! | `size_hint`, `is_end_stream` of the body | it is not known | it is not known | |
//! | drop of the future half-way, drop of the body | no difference | no difference | no difference |
//! | `poll_ready` | goes on | goes on | goes on |
//!
//! A body that ends in an error is cut off: a chunk is missing, or the stream is reset. Over HTTP/1.0
//! one without a length ends with its connection (RFC 9112, section 6.3), and nobody can tell.
//!
//! A layer inside may ask for hints before it hands the response over, as `tower-response-end` and
//! `tower-task-set` do: a panic of theirs is then one of the future.
//!
//! A panic of `poll_ready` goes on, since there is no request to answer and the service is broken.
//! It is logged, unless something in this family that is further out catches it, and so tells of it.
//!
//! It goes inside of what says which request it is (request ids, trace context), for a [`Panic`]
//! has the ids that are current where it is caught, and outside of all whose panics it shall
//! catch. An answer to a panic carries the [`Panic`] in its extensions.
//!
//! Whatever else runs code that may panic has [`CatchUnwind`], a future that yields a `Panic` when
//! the future in it panics, and [`catch`](catch()), which does the same for a closure. A `Panic`
//! can be logged, stored and passed on as it is: its message is short and escaped, and nothing of
//! the payload is left to panic a second time.
//!
//! # Example
//!
//! ```
//! use std::convert::Infallible;
//! use bytes::Bytes;
//! use http::{Request, Response};
//! use http_body_util::Empty;
//! use tower::{Service, ServiceBuilder, ServiceExt, service_fn};
//! use tower_catch_unwind::{CatchUnwindLayer, Panic};
//!
//! # #[tokio::main(flavor = "current_thread")]
//! # async fn main() -> Result<(), Infallible> {
//! // Once, in `main`: the log then says where a panic came from.
//! tower_catch_unwind::install_hook();
//! # std::panic::set_hook(Box::new(|info| drop(tower_catch_unwind::record(info)))); // Quiet.
//!
//! let mut service = ServiceBuilder::new()
//!     .layer(CatchUnwindLayer::new())
//!     .service(service_fn(async |_: Request<()>| -> Result<Response<Empty<Bytes>>, Infallible> {
//!         panic!("out of\nluck")
//!     }));
//! let response = service.ready().await?.call(Request::new(())).await?;
//!
//! assert_eq!(response.status(), 500);
//! assert_eq!(response.headers()["content-type"], "application/problem+json");
//! let panic = response.extensions().get::<Panic>().unwrap();
//! assert_eq!(panic.message(), r"out of\nluck");
//! assert!(panic.location().unwrap().file().ends_with(".rs"));
//! # Ok(()) }
//! ```
//!
//! # gRPC
//!
//! A request is gRPC if it is a POST whose content type is `application/grpc`, with or without a
//! codec (`+proto`). Before the head its answer is trailers-only: status 200, its own content type, and
//! `grpc-status: 13`. After it `grpc-status: 13` comes in trailers, unless it has come over HTTP/1,
//! where hyper leaves them out: there the body ends in an error.
//!
//! For grpc-web (`application/grpc-web`, `-text`, with or without a codec) the answer before the
//! head is the same, which its clients understand. After it the body ends in an error, since
//! grpc-web has its trailers in the body, where a message may have been cut. Inside of a layer that
//! turns grpc-web into gRPC, a request is gRPC.
//!
//! # Cancellation
//!
//! Dropping the response future or the body drops what it wraps. A panic in that drop is contained
//! and logged, also while another panic unwinds the thread.
//!
//! # Panics
//!
//! Nothing can catch a panic under `panic = "abort"`, a panic that leaves a destructor which runs
//! because of a panic, a panic in a panic hook, or an overflow of the stack: the process dies.

mod answer;
mod body;
mod catch;
mod hook;
mod log;

use std::{
    error::Error,
    fmt,
    marker::PhantomData,
    panic::resume_unwind,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
};

use bytes::Bytes;
use http::{Request, Response};
use http_body::Body;
use pin_project_lite::pin_project;
use tower_layer::Layer;
use tower_service::Service;

use answer::Seen;
use catch::catch_with;

pub use body::{BodyError, ResponseBody};
pub use catch::{CatchUnwind, Panic, catch};
pub use hook::{Site, install_hook, record};
pub use tower_request_context::{Http, Plain};
#[doc(hidden)]
pub use {
    answer::short_method,
    hook::{destructor, unwinding},
    log::Log,
};

/// Makes outcomes of the panics of everything inside.
///
/// See the [crate's example](crate#example).
pub struct CatchUnwindLayer<M = (), P = Http> {
    on_panic: M,
    log: Arc<Log>,
    protocol: PhantomData<fn() -> P>,
}

impl CatchUnwindLayer {
    /// A layer that gives the default answer to every panic, and logs at most 20 in a second.
    pub fn new() -> Self {
        Self { on_panic: (), log: Arc::default(), protocol: PhantomData }
    }
}

impl<M> CatchUnwindLayer<M> {
    /// Asks what `on_panic` makes of the request for the answer to a panic before the head.
    ///
    /// ```
    /// # use bytes::Bytes;
    /// # use http::{Request, Response};
    /// # use tower_catch_unwind::{CatchUnwindLayer, Panic};
    /// let layer = CatchUnwindLayer::new().on_panic(|request: &Request<()>| {
    ///     // For each request, so it had better be cheap.
    ///     let wants_html = request.uri().path().starts_with("/pages/");
    ///     // `None`: the default answer.
    ///     move |_: &Panic| wants_html.then(|| Response::new(Bytes::from("<h1>Sorry</h1>")))
    /// });
    /// # let _ = tower::Layer::layer(&layer, tower::service_fn(async |_: Request<()>| {
    /// #     Ok::<_, ()>(Response::new(http_body_util::Empty::<Bytes>::new()))
    /// # }));
    /// ```
    ///
    /// A gRPC client gets the default answer unless there is a `grpc-status` in the headers of
    /// this one. If it panics itself, the default answers. The answer to HEAD loses its content.
    pub fn on_panic<N>(self, on_panic: N) -> CatchUnwindLayer<N> {
        CatchUnwindLayer { on_panic, log: self.log, protocol: PhantomData }
    }
}

impl CatchUnwindLayer {
    /// The same layer for a `Service` of anything else than HTTP requests: there a panic is an
    /// error, [`CallError::Panicked`].
    pub fn plain(self) -> CatchUnwindLayer<(), Plain> {
        CatchUnwindLayer { on_panic: (), log: self.log, protocol: PhantomData }
    }
}

impl<M, P> CatchUnwindLayer<M, P> {
    /// Logs at most so many panics in a second; 0 logs none. The next event says how many were
    /// left out, in its field `suppressed`.
    ///
    /// Choose it by what your log can bear, not by how many panics there may be. It holds for this
    /// layer and its clones.
    pub fn max_events_per_second(mut self, max: u32) -> Self {
        self.log = Arc::new(Log::new(max));
        self
    }
}

impl Default for CatchUnwindLayer {
    fn default() -> Self {
        Self::new()
    }
}

impl<M: Clone, P> Clone for CatchUnwindLayer<M, P> {
    fn clone(&self) -> Self {
        Self { on_panic: self.on_panic.clone(), log: self.log.clone(), protocol: PhantomData }
    }
}

// Closures are not `Debug`.
impl<M, P> fmt::Debug for CatchUnwindLayer<M, P> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("CatchUnwindLayer").field("log", &self.log).finish_non_exhaustive()
    }
}

impl<S, M: Clone, P> Layer<S> for CatchUnwindLayer<M, P> {
    type Service = Catching<S, M, P>;

    fn layer(&self, inner: S) -> Self::Service {
        Catching { inner, layer: self.clone() }
    }
}

/// Middleware that makes outcomes of panics.
pub struct Catching<S, M = (), P = Http> {
    inner: S,
    layer: CatchUnwindLayer<M, P>,
}

impl<S: Clone, M: Clone, P> Clone for Catching<S, M, P> {
    fn clone(&self) -> Self {
        Self { inner: self.inner.clone(), layer: self.layer.clone() }
    }
}

impl<S: fmt::Debug, M, P> fmt::Debug for Catching<S, M, P> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Catching").field("inner", &self.inner).field("layer", &self.layer).finish()
    }
}

impl<S, M, P> Catching<S, M, P> {
    fn poll_ready<Req>(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), S::Error>>
    where
        S: Service<Req>,
    {
        // It goes on, so whoever catches it tells of it.
        if hook::depth() > 0 {
            return self.inner.poll_ready(cx);
        }
        let ready =
            catch_with(|| self.inner.poll_ready(cx), |payload| (Panic::of(&*payload), payload));
        ready.unwrap_or_else(|(panic, payload)| {
            self.layer.log.tell(&panic, "poll_ready", None);
            resume_unwind(payload)
        })
    }
}

impl<S, M, B, ResBody> Service<Request<B>> for Catching<S, M, Http>
where
    S: Service<Request<B>, Response = Response<ResBody>>,
    M: MakeOnPanic<Request<B>>,
    ResBody: Body,
    ResBody::Data: From<Bytes>,
{
    type Response = Response<ResponseBody<ResBody>>;
    type Error = S::Error;
    type Future = ResponseFuture<S::Future, M::OnPanic, Http>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        Self::poll_ready(self, cx)
    }

    fn call(&mut self, request: Request<B>) -> Self::Future {
        let seen = Seen::of(&request);
        let mut on_panic = None;
        let called = catch(|| {
            on_panic = Some(self.layer.on_panic.make_on_panic(&request));
            self.inner.call(request)
        });
        ResponseFuture::new(called, on_panic, seen, &self.layer.log)
    }
}

impl<S, Req> Service<Req> for Catching<S, (), Plain>
where
    S: Service<Req>,
{
    type Response = S::Response;
    type Error = CallError<S::Error>;
    type Future = ResponseFuture<S::Future, (), Plain>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        Self::poll_ready(self, cx).map_err(CallError::Inner)
    }

    fn call(&mut self, request: Req) -> Self::Future {
        let called = catch(|| self.inner.call(request));
        ResponseFuture::new(called, None, Seen::default(), &self.layer.log)
    }
}

pin_project! {
    /// Response future of [`Catching`].
    #[must_use = "futures do nothing unless polled"]
    pub struct ResponseFuture<F, A, P = Http> {
        // `None` if the call has panicked, and once it is ready.
        #[pin]
        inner: Option<F>,
        // Of the call.
        panic: Option<Panic>,
        on_panic: Option<A>,
        seen: Seen,
        // `None` once it is ready.
        log: Option<Arc<Log>>,
        protocol: PhantomData<fn() -> P>,
    }

    impl<F, A, P> PinnedDrop for ResponseFuture<F, A, P> {
        fn drop(this: Pin<&mut Self>) {
            let mut this = this.project();
            if let Some(log) = this.log {
                log.contain::<F>("drop of the future", Some(this.seen), || this.inner.set(None));
                log.contain::<A>("drop of on_panic", Some(this.seen), || *this.on_panic = None);
            }
        }
    }
}

impl<F, A, P> ResponseFuture<F, A, P> {
    fn new(called: Result<F, Panic>, on_panic: Option<A>, seen: Seen, log: &Arc<Log>) -> Self {
        let (inner, panic) = match called {
            Ok(inner) => (Some(inner), None),
            Err(panic) => {
                log.tell(&panic, "call", Some(&seen));
                (None, Some(panic))
            }
        };
        Self { inner, panic, on_panic, seen, log: Some(log.clone()), protocol: PhantomData }
    }

    /// What the inner future yields. Of all that have panicked the first is told to the client.
    fn poll_inner(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Result<F::Output, Panic>>
    where
        F: Future,
    {
        let mut this = self.project();
        let tell = |panic: &Panic, during| {
            if let Some(log) = &*this.log {
                log.tell(panic, during, Some(this.seen));
            }
        };
        if let Some(panic) = this.panic.take() {
            return Poll::Ready(Err(panic));
        }
        let inner = this.inner.as_mut().as_pin_mut().expect("polled after it was ready");
        let output = match catch(|| inner.poll(cx)) {
            Ok(Poll::Pending) => return Poll::Pending,
            Ok(Poll::Ready(output)) => Ok(output),
            Err(panic) => {
                tell(&panic, "future");
                Err(panic)
            }
        };
        let Err(panic) = catch(|| this.inner.set(None)) else {
            return Poll::Ready(output);
        };
        tell(&panic, "drop of the future");
        Poll::Ready(Err(match output {
            Ok(output) => {
                if let Err(panic) = catch(|| drop(output)) {
                    tell(&panic, "drop of the response");
                }
                panic
            }
            Err(first) => first,
        }))
    }
}

impl<F, A, B, E> Future for ResponseFuture<F, A, Http>
where
    F: Future<Output = Result<Response<B>, E>>,
    A: FnOnce(&Panic) -> Option<Response<Bytes>>,
    B: Body,
{
    type Output = Result<Response<ResponseBody<B>>, E>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let result = ready!(self.as_mut().poll_inner(cx));
        let this = self.project();
        let log = this.log.take().expect("is there until now");
        let seen = &*this.seen;
        let panic = match result {
            Ok(result) => {
                log.contain::<A>("drop of on_panic", Some(seen), || *this.on_panic = None);
                return Poll::Ready(result.map(|response| {
                    let in_trailers = seen.dialect.ends_in_trailers(&response);
                    response.map(|body| ResponseBody::new(body, log, in_trailers))
                }));
            }
            Err(panic) => panic,
        };
        // What the client does not understand is dropped in here, too: it is the code of others.
        let answer = catch(|| {
            let response = this.on_panic.take()?(&panic)?;
            seen.understands(&response).then(|| seen.dialect.fit(response))
        });
        if let Err(panic) = &answer {
            log.tell(panic, "on_panic", Some(seen));
        }
        let mut response = match answer {
            Ok(Some(response)) => response,
            _ => seen.default_answer(&panic),
        };
        response.extensions_mut().insert(panic);
        Poll::Ready(Ok(response.map(|bytes| ResponseBody::answer(bytes, log))))
    }
}

impl<F, T, E> Future for ResponseFuture<F, (), Plain>
where
    F: Future<Output = Result<T, E>>,
{
    type Output = Result<T, CallError<E>>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let result = ready!(self.as_mut().poll_inner(cx));
        *self.project().log = None;
        Poll::Ready(match result {
            Ok(result) => result.map_err(CallError::Inner),
            Err(panic) => Err(CallError::Panicked(panic)),
        })
    }
}

impl<F: fmt::Debug, A, P> fmt::Debug for ResponseFuture<F, A, P> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ResponseFuture").field("inner", &self.inner).finish_non_exhaustive()
    }
}

/// Makes what answers a panic, if there is one: see [`CatchUnwindLayer::on_panic`].
///
/// `()` leaves it to the default. Closures
/// `Fn(&Req) -> impl FnOnce(&Panic) -> Option<Response<Bytes>>` are this: what they take from the
/// request is what they pay for.
pub trait MakeOnPanic<Req> {
    /// Makes the answer, or `None` for the default one.
    type OnPanic: FnOnce(&Panic) -> Option<Response<Bytes>>;

    /// What answers a panic of `request`. Called before the inner service is; if it panics, that
    /// is answered by the default.
    fn make_on_panic(&self, request: &Req) -> Self::OnPanic;
}

impl<Req> MakeOnPanic<Req> for () {
    type OnPanic = fn(&Panic) -> Option<Response<Bytes>>;

    fn make_on_panic(&self, _: &Req) -> Self::OnPanic {
        |_| None
    }
}

impl<F, Req, H> MakeOnPanic<Req> for F
where
    F: Fn(&Req) -> H,
    H: FnOnce(&Panic) -> Option<Response<Bytes>>,
{
    type OnPanic = H;

    fn make_on_panic(&self, request: &Req) -> H {
        self(request)
    }
}

/// Why a call of a [plain](CatchUnwindLayer::plain) service failed.
///
/// It becomes a boxed error if `E` does: see [`BodyError`].
#[derive(Clone, Debug)]
#[non_exhaustive]
pub enum CallError<E> {
    /// The service yielded an error.
    Inner(E),
    /// The service panicked.
    Panicked(Panic),
}

impl<E: fmt::Display> fmt::Display for CallError<E> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Inner(error) => error.fmt(f),
            Self::Panicked(panic) => write!(f, "the service {panic}"),
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
            CallError::Panicked(panic) => panic.into(),
        }
    }
}
