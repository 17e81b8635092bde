//! Bounded spawning, and bounded requests.
//!
//! A [`SpawnLimit`] says how many tasks may exist at once, in the process and for each request. A
//! full limit refuses: whoever asked gets a [`Refused`] with a typed reason and the future that was
//! to be spawned, and can run it in place, answer 503, or leave it. Or they wait for a permit for a
//! bounded time, in order: [`spawn_within`].
//!
//! [`SpawnLimitLayer`] puts a limit over everything that is spawned below it, outside of the whole
//! service or of one route: by [`spawn`], which is a bounded `tokio::spawn`, and by the task sets of
//! `tower-task-set`. Limits nest, and a task takes a permit of each or none. What a bare
//! `tokio::spawn` starts is not bounded, nor is what that spawns. To bound all tasks of the process
//! there is `tower_task_set::TaskRegistry::limit`. [`RequestLimitLayer`] bounds requests, to the end
//! of their responses.
//!
//! # Example
//!
//! ```
//! use std::convert::Infallible;
//! use http::{Request, Response};
//! use http_body_util::Full;
//! use tower::{Service, ServiceBuilder, ServiceExt, service_fn};
//! use tower_request_context::Dialect;
//! use tower_spawn_limit::{SpawnError, SpawnLimit, SpawnLimitLayer, spawn};
//!
//! # #[tokio::main(flavor = "current_thread")]
//! # async fn main() -> Result<(), Infallible> {
//! let limit = SpawnLimit::new(10_000).per_request(2);
//! let mut service = ServiceBuilder::new().layer(SpawnLimitLayer::new(limit.clone())).service(
//!     service_fn(async |request: Request<usize>| {
//!         let mails = (0..*request.body()).map(|_| spawn(async { /* mail it */ }));
//!         let all: Result<Vec<_>, _> = mails.collect();
//!         let response = match all.map_err(SpawnError::from) {
//!             Ok(_) => Response::default(),
//!             Err(full) => full.answer().response(Dialect::of(&request)),
//!         };
//!         Ok::<_, Infallible>(response.map(Full::new))
//!     }),
//! );
//! assert_eq!(service.ready().await?.call(Request::new(2)).await?.status(), 200);
//! assert_eq!(service.ready().await?.call(Request::new(3)).await?.status(), 503);
//! assert_eq!(limit.in_use(), 4, "they have not run yet");
//! # Ok(()) }
//! ```
//!
//! # No deadlock
//!
//! Tasks that hold a permit while they wait for one can wait for each other for ever. So whoever
//! runs in a task that has a permit, of whatever limit, is refused at once where others wait, also
//! in a service that it calls in process; a handler with the permit of a request waits for those of
//! tasks and not for that of another request (see [`Level`]). The permits of nested limits are
//! taken all or none. There is no handle of a task that has not started: what waits is who spawns.
//! And every wait has an end, which ends those too that go around a corner which is not seen here:
//! a bare `tokio::spawn`, a channel, a socket.
//!
//! # Cancellation
//!
//! A permit is taken before the task is spawned, and comes back when the work has really ended: when
//! the last destructor has run, however it ended; for a blocking closure when it returns, whoever
//! gave up on it meanwhile. Who waits for a permit and is dropped leaves the line. One that is
//! neither polled nor dropped keeps its place, and the permit when it comes.

mod limit;
mod place;
pub mod request_limit;
mod spawn;
mod sync;

#[cfg(all(test, loom))]
mod loom_tests;
#[cfg(feature = "axum")]
mod response;

use std::{
    fmt,
    marker::PhantomData,
    task::{Context, Poll},
};

use http::{Request, Response, StatusCode};
use http_body::Body;
use tower_layer::Layer;
use tower_request_context::Answer;
use tower_response_end::Asked;
use tower_service::Service;

pub use limit::{Acquire, Permit, SpawnLimit};
pub use place::{Level, LimitScope, Limits, Permits};
pub use request_limit::RequestLimitLayer;
pub use spawn::{spawn, spawn_blocking, spawn_within, within};
pub use tower_request_context::{Http, Plain};

/// Response future of [`SpawnLimited`].
pub type ResponseFuture<F, P = Http> = tower_response_end::ResponseFuture<F, LimitScope, P>;

/// Response body of [`SpawnLimited`].
pub type ResponseBody<B> = tower_response_end::ResponseBody<B, LimitScope>;

/// Puts a limit over everything that is spawned below it.
///
/// It is in force where [`RequestContext::current`] works, on the same terms. A request that spawns
/// nothing costs no allocation.
///
/// See the [crate's example](crate#example).
///
/// [`RequestContext::current`]: tower_request_context::RequestContext::current
pub struct SpawnLimitLayer<P = Http> {
    limit: SpawnLimit,
    protocol: PhantomData<fn() -> P>,
}

impl SpawnLimitLayer {
    /// A layer of this limit, which may be that of other layers too: a task takes a permit of it
    /// once.
    pub const fn new(limit: SpawnLimit) -> Self {
        Self { limit, protocol: PhantomData }
    }

    /// The same layer for a `Service` of anything else than HTTP requests: there the response is
    /// over when its future is.
    pub fn plain(self) -> SpawnLimitLayer<Plain> {
        SpawnLimitLayer { limit: self.limit, protocol: PhantomData }
    }
}

impl<P> Clone for SpawnLimitLayer<P> {
    fn clone(&self) -> Self {
        Self { limit: self.limit.clone(), protocol: PhantomData }
    }
}

impl<P> fmt::Debug for SpawnLimitLayer<P> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SpawnLimitLayer").field("limit", &self.limit).finish_non_exhaustive()
    }
}

impl<S, P> Layer<S> for SpawnLimitLayer<P> {
    type Service = SpawnLimited<S, P>;

    fn layer(&self, inner: S) -> Self::Service {
        SpawnLimited { inner, layer: self.clone() }
    }
}

/// Middleware that puts a limit over everything that is spawned below it.
#[derive(Debug)]
pub struct SpawnLimited<S, P = Http> {
    inner: S,
    layer: SpawnLimitLayer<P>,
}

impl<S: Clone, P> Clone for SpawnLimited<S, P> {
    fn clone(&self) -> Self {
        Self { inner: self.inner.clone(), layer: self.layer.clone() }
    }
}

impl<S, B, ResBody> Service<Request<B>> for SpawnLimited<S, Http>
where
    S: Service<Request<B>, Response = Response<ResBody>>,
    ResBody: Body,
{
    type Response = Response<ResponseBody<ResBody>>;
    type Error = S::Error;
    type Future = ResponseFuture<S::Future>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        self.inner.poll_ready(cx)
    }

    fn call(&mut self, request: Request<B>) -> Self::Future {
        let (scope, asked) = (LimitScope::new(&self.layer.limit), Asked::of(&request));
        ResponseFuture::http(scope, asked, request, |request| self.inner.call(request))
    }
}

impl<S, Req> Service<Req> for SpawnLimited<S, Plain>
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
        let scope = LimitScope::new(&self.layer.limit);
        ResponseFuture::<_, Plain>::plain(scope, request, |request| self.inner.call(request))
    }
}

/// Why a task was not spawned.
///
/// With the feature `axum` it is a response: its [`answer`](Self::answer) to a client that speaks
/// HTTP, since the request is not seen there. A handler of gRPC answers with its
/// [`grpc_status`](Self::grpc_status): with tonic,
/// `Status::new(i32::from(error.grpc_status()).into(), error.to_string())`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum SpawnError {
    /// A limit is full.
    Full,
    /// Whoever would own the task takes no more: the response is over, or the process is about to
    /// stop.
    Closed,
    /// There is no runtime to run it, or it has been shut down.
    NoRuntime,
}

impl SpawnError {
    /// What to answer a client with: 503 with `Retry-After`, or 500 for
    /// [`NoRuntime`](Self::NoRuntime), as a problem document (RFC 9457); for gRPC the
    /// [status](Self::grpc_status).
    pub const fn answer(self) -> Answer {
        let status = match self {
            Self::Full | Self::Closed => StatusCode::SERVICE_UNAVAILABLE,
            Self::NoRuntime => StatusCode::INTERNAL_SERVER_ERROR,
        };
        let answer = Answer::new(status, self.grpc_status(), self.text());
        match self {
            Self::Full | Self::Closed => answer.retry_after(1),
            Self::NoRuntime => answer,
        }
    }

    /// The status of a gRPC answer: `RESOURCE_EXHAUSTED`, `UNAVAILABLE` or `INTERNAL`.
    pub const fn grpc_status(self) -> u8 {
        match self {
            Self::Full => 8,
            Self::Closed => 14,
            Self::NoRuntime => 13,
        }
    }

    const fn text(self) -> &'static str {
        match self {
            Self::Full => "the limit of tasks is reached",
            Self::Closed => "no more tasks are accepted: their request or the process is ending",
            Self::NoRuntime => "there is no Tokio runtime to run a task",
        }
    }
}

impl fmt::Display for SpawnError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.text())
    }
}

impl std::error::Error for SpawnError {}

/// A spawn that was refused: the reason, and the future as it was given. Nothing of it has run.
///
/// `?` turns it into its [`SpawnError`]. Into a boxed error it goes as that too, with
/// `map_err(SpawnError::from)`, for the future may not be `Sync`.
pub struct Refused<F> {
    /// Why.
    pub reason: SpawnError,
    /// What was to be spawned.
    pub future: F,
}

impl<F> From<Refused<F>> for SpawnError {
    fn from(refused: Refused<F>) -> Self {
        refused.reason
    }
}

// Futures are not `Debug`, and `unwrap` must compile.
impl<F> fmt::Debug for Refused<F> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Refused").field("reason", &self.reason).finish_non_exhaustive()
    }
}

impl<F> fmt::Display for Refused<F> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(&self.reason, f)
    }
}

impl<F> std::error::Error for Refused<F> {}
