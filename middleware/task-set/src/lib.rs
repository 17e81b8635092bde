//! The request's task set and the process's registry of tasks.
//!
//! A handler that starts work beside its request asks for the request's [`TaskSet`] and spawns
//! into it. Each task then has an owner, a bound, an end, an outcome and a name: it is counted by
//! the [`TaskRegistry`], refused if a limit is full, told to end when its time has come, and a
//! panic in it is logged and counted instead of lost.
//!
//! [`TaskSetLayer`] goes inside of layers whose values or ids the tasks shall have, and outside of
//! whatever asks for the set. A request that does not ask costs no allocation. One that does mostly
//! finds the memory of a request before: a registry keeps that of up to 64, at most 5 kB each.
//!
//! # Example
//!
//! ```
//! use bytes::Bytes;
//! use http::{Request, Response};
//! use http_body_util::{BodyExt, Empty};
//! use tower::{Service, ServiceBuilder, ServiceExt, service_fn};
//! use tower_task_set::{SpawnError, TaskRegistry, TaskSet, TaskSetLayer, assert_drained};
//!
//! # fn mail() -> std::pin::Pin<Box<dyn Future<Output = ()> + Send>> { Box::pin(async {}) }
//! # #[tokio::main(flavor = "current_thread")]
//! # async fn main() -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
//! let tasks = TaskRegistry::new();
//! let mut service = ServiceBuilder::new().layer(TaskSetLayer::new(&tasks)).service(service_fn(
//!     |_: Request<()>| async {
//!         let tasks = TaskSet::current()?;
//!         let receipt = tasks.spawn("send_receipt", async { mail().await });
//!         // Refused, the future comes back in the error: here only the reason is wanted.
//!         receipt.map_err(SpawnError::from)?;
//!         Ok::<_, Box<dyn std::error::Error + Send + Sync>>(Response::new(Empty::<Bytes>::new()))
//!     },
//! ));
//!
//! let response = service.ready().await?.call(Request::new(())).await?;
//! response.into_body().collect().await?;
//!
//! tasks.close();
//! tasks.wait().await;
//! assert_drained(&tasks);
//! assert_eq!(tasks.snapshot().by_name["send_receipt"].completed, 1);
//! # Ok(()) }
//! ```
//!
//! # How long a task lives
//!
//! [`AtEnd`] says what becomes of a task when its response is over, that is when the body's last
//! byte has been handed to the server or the client has left. It can be chosen for the registry,
//! the layer, the set and the task, with exceptions for one way of ending; what counts is the first
//! given of: the task's `on`, the task's `at_end`, the set's `on`, the set's `at_end`, the default.
//! Layer and registry choose for the set.
//!
//! | | `Cancel` | `Drain(d)`, the default with 30 s | `Keep` |
//! |---|---|---|---|
//! | response future dropped, body dropped | cancelled | has `d`, then cancelled | goes on |
//! | response completed or failed | cancelled | has `d`, then cancelled | goes on |
//! | handler or body panicked | cancelled | has `d`, then cancelled | goes on |
//! | its request's [deadline](#deadlines) passed | cancelled | has `d`, then cancelled | goes on |
//! | its own timeout passed | timed out | timed out | timed out |
//! | [`cancel_all`](TaskRegistry::cancel_all), the last part of a shutdown | cancelled | cancelled | cancelled |
//! | runtime dropped | aborted | aborted | aborted |
//!
//! What it means to be told to end depends on the kind of the task:
//!
//! | | [`spawn`](TaskSet::spawn) | [`spawn_graceful`](TaskSet::spawn_graceful) | [`spawn_blocking`](TaskSet::spawn_blocking) |
//! |---|---|---|---|
//! | it is told, by any of the above | dropped at its next await: cancelled | sees it and why, has its [grace](NewTask::grace), is then dropped: aborted | sees it and why; runs until it returns. Not started yet: never runs, cancelled |
//! | by its own timeout | dropped: timed out | the same, and then timed out | the same; not started yet: timed out |
//! | it ends by itself after that | | completed | completed |
//! | [`abort_all`](TaskRegistry::abort_all) | cancelled | its grace is over: aborted | told |
//! | runtime dropped | aborted | aborted | runs until it returns. Not started yet: the runtime's choice, run or aborted |
//!
//! Of a [`Group`] all that holds for each of its tasks, and they are told too when it is dropped:
//! with the handler's future when the client has left, with the task that owns it when that ends.
//!
//! A task that drains holds nothing back: neither the last byte of the response nor the next
//! request on the connection.
//!
//! When the response is over, handles outside of the set's tasks get
//! [`SpawnError::Closed`]. A task that may still run may still spawn; what it spawns lives as it
//! does, or shorter if that is chosen. A set that was cancelled accepts nothing.
//!
//! # Deadlines
//!
//! [`deadline`](TaskSetLayer::deadline) gives a response a time, from the call to its end. When that
//! is over, the handler or the body is dropped, and the set ends with [`End::TimedOut`]; then a
//! task's lifetime counts, as ever. The client gets 504 in place of the head; after it the body ends
//! in [`BodyError::Stopped`]. A gRPC client gets status 4, after the head in trailers. The caller of
//! a [plain](TaskSetLayer::plain) service gets [`CallError::Stopped`]. What the handler or the body
//! makes of the end of its tasks then comes too late.
//!
//! It is the backstop where [the server cannot see](tower_response_end#what-it-cannot-see) that a
//! client has left. The set ends in time whatever the server does, and whoever
//! [holds](TaskSet::hold) it. The body ends when it is next polled, which hyper does not do while the
//! client does not read: then the socket stays open until the client closes it.
//!
//! # Limits
//!
//! A task takes a permit of the registry's [limit](TaskRegistry::limit), and of each
//! [`SpawnLimitLayer`](tower_spawn_limit::SpawnLimitLayer) over the place where it is spawned, or
//! else over the place where its set was made. Where one is full, [`TaskSet::spawn`] refuses and
//! [`TaskSet::spawn_within`] waits, as does whatever is spawned after [`NewTask::within`]; what waits
//! for what is told in [`tower_spawn_limit`](tower_spawn_limit#no-deadlock). The permits come back
//! before the task is counted as ended.
//!
//! A [`Group`] has a [limit](Group::limit) of its own, and its tasks are as those with a permit: they
//! do not wait where a limit is full. What such a task spawns into its set, and not into the group,
//! has no place in the group and may wait for one. If the task waits for that child meanwhile, the
//! two end with the child's [time](NewTask::within) and not before.
//!
//! # Where the set is current
//!
//! [`TaskSet::current`] works where
//! [`RequestContext::current`](tower_request_context::RequestContext::current) does, on the same
//! terms: in the handler, in polls and drops of the body, in tasks of the set, and not in a bare
//! `tokio::spawn` or behind a buffer. There, move a `TaskSet` in, or use
//! [`in_extensions`](TaskSetLayer::in_extensions).
//!
//! # Cancellation
//!
//! Nothing here cancels on drop but a [`Group`]: neither a [`TaskHandle`], nor a [`TaskSet`], nor
//! the [`TaskRegistry`]. A task is told to end by its lifetime, its timeout, its handle, its group
//! or its registry. What never awaits cannot be stopped, nor can a closure that blocks; it stays in
//! the [`Snapshot`] as [`Cancelling`](TaskState::Cancelling), by name and place.
//!
//! Of several reasons to end, what a task was told first is its [`Cause`], though it has not come to
//! an await yet. A panic, or a result before the next await, counts for more than what it was told.
//!
//! A task that waits for what it is part of, with [`TaskRegistry::wait`] or [`Group::wait`], waits
//! for itself, until it is told to end.
//!
//! # Only what is `Send`
//!
//! Tasks may run and be dropped on any thread of their runtime, and so must be `Send`:
//!
//! ```compile_fail,E0277
//! let tasks = tower_task_set::TaskRegistry::new();
//! tasks.spawn("not_send", std::future::pending::<std::rc::Rc<()>>());
//! ```
//!
//! ```compile_fail,E0277
//! let tasks = tower_task_set::TaskRegistry::new();
//! let count = std::rc::Rc::new(7);
//! tasks.spawn_blocking("not_send", move |_| *count + 1);
//! ```
//!
//! # Panics
//!
//! A panic in a task is the task's [`Outcome`], and one event at level `ERROR` with the name, the
//! place of the spawn and the trace id, and the place of the panic if a
//! [hook](tower_catch_unwind::install_hook) was installed. Nothing else ends because of it, unless
//! [`OnPanic`] says so. A panic in an [observer](Observe) or in the values of a request is
//! contained, and one event too.
//!
//! What a task's destructors throw goes through the runtime, which drops the payload in the end: one
//! that panics when it is dropped, with another that does so, ends a thread of tokio's, as in any
//! task. What is thrown in a poll or a closure is dropped here, and its further panics are contained.
//!
//! Nothing here panics outside of a runtime, or in one without a time driver: there, `Drain(d)`
//! lasts until shutdown, timeouts and request deadlines do nothing, and one event at level `WARN`
//! says so. What is polled on after its runtime was shut down has no deadline either, and waits for
//! no permit.

mod deadline;
mod group;
mod ledger;
mod lifetime;
mod observe;
mod place;
mod reaper;
mod registry;
mod set;
mod shield;
mod stop;
mod sync;
mod task;
mod task_set;
mod within;

#[cfg(feature = "axum")]
mod extract;
#[cfg(all(test, loom))]
mod loom_tests;

use std::{
    fmt,
    marker::PhantomData,
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use bytes::Bytes;
use http::{Request, Response};
use http_body::Body;
use tower_layer::Layer;
use tower_request_context::{Dialect, RequestContext};
use tower_response_end::{Asked, RequestBody, WithRequestBody};
use tower_service::Service;

pub use group::{FailFast, Group, GroupError, GroupHandle, Join, WaitAll};
pub use ledger::{Counts, ForcedTask, LiveTask, Snapshot, TaskState};
pub use lifetime::{AtEnd, OnPanic};
pub use observe::{Observe, TaskEvent};
pub use place::ResponseScope;
pub use registry::{TaskRegistry, assert_drained};
pub use shield::{ShieldBody, ShieldError, ShieldFuture, ShieldLayer, Shielded};
pub use stop::StopToken;

pub use task::{CancelHandle, Cause, Outcome, TaskError, TaskHandle};
pub use task_set::{Hold, NewTask, NoTaskSet, TaskSet};
pub use tower_response_end::{BodyError, CallError, End, Http, Plain, Stopped};
pub use tower_spawn_limit::{Refused, SpawnError, SpawnLimit};
pub use within::Within;

use deadline::Limit;

/// Response future of [`WithTaskSet`].
pub type ResponseFuture<F, P = Http> = tower_response_end::StoppableFuture<F, ResponseScope, P>;

/// Response body of [`WithTaskSet`].
pub type ResponseBody<B> = tower_response_end::StoppableBody<B, ResponseScope>;

/// Gives every request a [`TaskSet`].
///
/// Of nested layers with different registries the inner set is the current one. A second layer
/// with the same registry makes no second set: what it chooses, it chooses for the set of the
/// first, which its deadline ends too. A service that is called in process, by a handler or a task,
/// has a set of its own if it has a registry of its own.
///
/// See the [crate's example](crate#example).
pub struct TaskSetLayer<P = Http> {
    registry: TaskRegistry,
    in_extensions: bool,
    deadline: Option<Limit>,
    protocol: PhantomData<fn() -> P>,
}

impl TaskSetLayer {
    /// A layer whose sets belong to `registry`.
    pub fn new(registry: &TaskRegistry) -> Self {
        Self {
            registry: registry.clone(),
            in_extensions: false,
            deadline: None,
            protocol: PhantomData,
        }
    }

    /// The same layer for a `Service` of anything else than HTTP requests, a queue's worker for
    /// instance: there the response is over when its future is.
    pub fn plain(self) -> TaskSetLayer<Plain> {
        let Self { registry, deadline, .. } = self;
        TaskSetLayer { registry, in_extensions: false, deadline, protocol: PhantomData }
    }

    /// Also puts the [`TaskSet`] into the request's type map, where the extractor looks first: for
    /// handlers that the layer's scope does not reach, behind a buffer for instance. Costs the
    /// allocations of the set and of the map.
    pub const fn in_extensions(mut self) -> Self {
        self.in_extensions = true;
        self
    }

    /// Also watches the request's body, and takes an error of reading it for the client's leaving:
    /// see [`ResponseEndLayer::watch_request_body`], on the type of the request too.
    ///
    /// [`ResponseEndLayer::watch_request_body`]: tower_response_end::ResponseEndLayer::watch_request_body
    pub fn watch_request_body(self) -> TaskSetLayer<WithRequestBody> {
        let Self { registry, in_extensions, deadline, .. } = self;
        TaskSetLayer { registry, in_extensions, deadline, protocol: PhantomData }
    }
}

impl<P> TaskSetLayer<P> {
    /// What becomes of tasks at the end of their response, if neither the set nor the task says
    /// otherwise.
    pub fn at_end(mut self, lifetime: AtEnd) -> Self {
        let config = self.registry.choose();
        config.policy.at_end(lifetime);
        config.layer.at_end(lifetime);
        self
    }

    /// The exception to [`at_end`](Self::at_end) for one end.
    pub fn on(mut self, end: End, lifetime: AtEnd) -> Self {
        let config = self.registry.choose();
        config.policy.on(end, lifetime);
        config.layer.on(end, lifetime);
        self
    }

    /// How long graceful tasks may go on after they were told to end, if neither the set nor the
    /// task says otherwise: see [`NewTask::grace`].
    pub fn grace(mut self, grace: Duration) -> Self {
        let config = self.registry.choose();
        config.policy.set_grace(grace);
        config.layer.set_grace(grace);
        self
    }

    /// What else becomes of it when a task panics, if neither the set nor the task says otherwise.
    pub fn on_panic(mut self, choice: OnPanic) -> Self {
        let config = self.registry.choose();
        config.policy.on_panic(choice);
        config.layer.on_panic(choice);
        self
    }

    /// Gives a response this long, from the call to its end: see
    /// [Deadlines](crate#deadlines).
    ///
    /// A gRPC client may ask for less (`grpc-timeout`); what is no such value is ignored. tonic reads
    /// it too, at both ends, and may be first with its own answer, which is `CANCELLED`. For its
    /// wish alone choose `Duration::MAX`. Else choose what the slowest honest client takes for the
    /// largest response: an event stream ends by it too.
    ///
    /// That of a layer within another one of the same registry counts until the inner response is
    /// over, whether the set is held or not.
    pub fn deadline(mut self, time: Duration) -> Self {
        self.deadline = Some(Limit::new(time));
        self
    }
}

impl<P> Clone for TaskSetLayer<P> {
    fn clone(&self) -> Self {
        Self {
            registry: self.registry.clone(),
            in_extensions: self.in_extensions,
            deadline: self.deadline.clone(),
            protocol: PhantomData,
        }
    }
}

impl<P> fmt::Debug for TaskSetLayer<P> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TaskSetLayer")
            .field("policy", &self.registry.config().policy)
            .field("in_extensions", &self.in_extensions)
            .field("deadline", &self.deadline)
            .finish_non_exhaustive()
    }
}

impl<S, P> Layer<S> for TaskSetLayer<P> {
    type Service = WithTaskSet<S, P>;

    fn layer(&self, inner: S) -> Self::Service {
        WithTaskSet { inner, layer: Arc::new(self.clone()) }
    }
}

/// Middleware that gives every request a [`TaskSet`].
#[derive(Debug)]
pub struct WithTaskSet<S, P = Http> {
    inner: S,
    // In one, for servers clone a service for each request.
    layer: Arc<TaskSetLayer<P>>,
}

impl<S, P> WithTaskSet<S, P> {
    fn scope<B>(&self, request: &mut Request<B>, dialect: Dialect) -> ResponseScope {
        let config = self.layer.registry.config();
        let mut scope = match &self.layer.deadline {
            None => ResponseScope::new(config),
            Some(limit) => ResponseScope::until(config, limit.of(request, dialect)),
        };
        // What is in the type map must not fall behind: the extractor looks there first.
        if self.layer.in_extensions || request.extensions().get::<TaskSet>().is_some() {
            // Made now, so with the values that are known now.
            let context = RequestContext::current_or(request.extensions().get());
            if let Some(set) = context.sync_scope(|| scope.set()) {
                request.extensions_mut().insert(TaskSet::new(set));
            }
        }
        scope
    }
}

impl<S: Clone, P> Clone for WithTaskSet<S, P> {
    fn clone(&self) -> Self {
        Self { inner: self.inner.clone(), layer: self.layer.clone() }
    }
}

impl<S, B, ResBody> Service<Request<B>> for WithTaskSet<S, Http>
where
    S: Service<Request<B>, Response = Response<ResBody>>,
    ResBody: Body,
    ResBody::Data: From<Bytes>,
{
    type Response = Response<ResponseBody<ResBody>>;
    type Error = S::Error;
    type Future = ResponseFuture<S::Future>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        self.inner.poll_ready(cx)
    }

    fn call(&mut self, mut request: Request<B>) -> Self::Future {
        let dialect = Dialect::of(&request);
        let scope = self.scope(&mut request, dialect);
        let asked = Asked::of(&request);
        ResponseFuture::http(scope, asked, dialect, request, |request| self.inner.call(request))
    }
}

impl<S, B, ResBody> Service<Request<B>> for WithTaskSet<S, WithRequestBody>
where
    S: Service<Request<RequestBody<B>>, Response = Response<ResBody>>,
    ResBody: Body,
    ResBody::Data: From<Bytes>,
{
    type Response = Response<ResponseBody<ResBody>>;
    type Error = S::Error;
    type Future = ResponseFuture<S::Future>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        self.inner.poll_ready(cx)
    }

    fn call(&mut self, mut request: Request<B>) -> Self::Future {
        let dialect = Dialect::of(&request);
        let scope = self.scope(&mut request, dialect);
        let (request, asked) = Asked::with_request_body(request);
        ResponseFuture::http(scope, asked, dialect, request, |request| self.inner.call(request))
    }
}

impl<S, Req> Service<Req> for WithTaskSet<S, Plain>
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
        let config = self.layer.registry.config();
        let scope = match &self.layer.deadline {
            None => ResponseScope::new(config),
            Some(limit) => ResponseScope::until(config, limit.deadline()),
        };
        ResponseFuture::<_, Plain>::plain(scope, request, |request| self.inner.call(request))
    }
}
