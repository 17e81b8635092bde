//! The ways to start tasks beside a request that are compared.
#![allow(dead_code, reason = "each bench uses some of it")]

use std::{
    convert::Infallible,
    future::poll_fn,
    panic::AssertUnwindSafe,
    pin::Pin,
    sync::{Arc, Mutex},
    task::{Context, Poll, ready},
    time::Duration,
};

use bytes::Bytes;
use futures_util::FutureExt as _;
use http::{Request, Response};
use http_body::{Body, Frame, SizeHint};
use http_body_util::{BodyExt, Full};
use pin_project_lite::pin_project;
use scope_spawn::scope::Scope;
use tokio::{
    runtime::Handle,
    sync::Semaphore,
    task::{JoinSet, yield_now},
    time::sleep,
};
use tokio_util::{
    sync::{CancellationToken, DropGuard},
    task::TaskTracker,
};
use tower::{Layer, Service, service_fn};
use tower_scope_spawn::{layer::ScopeSpawnLayer, service::WithScope};
use tower_tasks::{
    AtEnd, RequestContextLayer, SpawnLimit, TaskRegistry, TaskSet, TaskSetLayer, TraceIdLayer,
};
use tracing::Instrument;

/// What a handler starts.
pub(crate) trait Task: Future<Output = ()> + Send + 'static {}
impl<F: Future<Output = ()> + Send + 'static> Task for F {}

/// Waits once, and is woken at once.
pub(crate) fn wait_once() -> impl Task {
    let mut waited = false;
    poll_fn(move |cx| {
        if waited {
            return Poll::Ready(());
        }
        waited = true;
        cx.waker().wake_by_ref();
        Poll::Pending
    })
}

/// A service of requests without a body.
pub(crate) trait Serve:
    Service<Request<()>, Response = Response<Self::Body>, Error = Infallible, Future: Send>
    + Send
    + 'static
{
    type Body: Body<Data: Send, Error: Send> + Send;
}

impl<S, B> Serve for S
where
    S: Service<Request<()>, Response = Response<B>, Error = Infallible, Future: Send>,
    S: Send + 'static,
    B: Body<Data: Send, Error: Send> + Send,
{
    type Body = B;
}

/// A way to start tasks beside a request.
pub(crate) trait Way: Send + Sync + 'static {
    /// A service that starts so many tasks for each request, and answers at once.
    fn service<T: Task>(
        &self,
        tasks: usize,
        task: impl Fn() -> T + Copy + Send + 'static,
    ) -> impl Serve;

    /// Waits for the end of all tasks but so many others.
    fn wait(&self, others: usize) -> impl Future<Output = ()> + Send {
        no_more_tasks_than(others)
    }

    /// Cancels all tasks, if there is a way, and waits for their last destructor.
    async fn cancel(&self) {}
}

/// To be done with one of the ways.
pub(crate) trait Job {
    fn with(self, way: impl Way);
}

pub(crate) fn with_way(name: &str, job: impl Job) {
    let bounds = SpawnLimit::new(1 << 30).per_request(1 << 30);
    match name {
        "tokio::spawn" => job.with(Raw),
        "JoinSet" => job.with(Joined::default()),
        "tracker + child token" => job.with(Tracker::default()),
        "scope-spawn" => job.with(ScopeSpawn::default()),
        "tower-scope-spawn" => job.with(TowerScopeSpawn),
        "by hand" => job.with(ByHand::new(None)),
        "by hand + permit" => job.with(ByHand::new(Some(1 << 30))),
        "ours" => job.with(Ours::new(TaskRegistry::new())),
        "ours, `Keep`" => {
            let registry = TaskRegistry::new().at_end(AtEnd::Keep);
            job.with(Ours { reaper: 0, ..Ours::new(registry) });
        }
        "ours + limit" => job.with(Ours::new(TaskRegistry::new().limit(bounds))),
        "ours in a context" => job.with(InContext(Ours::new(TaskRegistry::new()))),
        "ours + limit + trace-id" => {
            job.with(Traced(Ours::new(TaskRegistry::new().limit(bounds))));
        }
        "ours + timeout" => {
            job.with(Ours { kind: Kind::Timeout, ..Ours::new(TaskRegistry::new()) });
        }
        "ours, graceful" => {
            job.with(Ours { kind: Kind::Graceful, ..Ours::new(TaskRegistry::new()) });
        }
        "ours, in a group" => {
            job.with(InGroup(Ours::new(TaskRegistry::new())));
        }
        _ => panic!("no such way: {name}"),
    }
}

/// Until the runtime has no more, and all have been polled.
pub(crate) async fn no_more_tasks_than(most: usize) {
    let metrics = Handle::current().metrics();
    loop {
        yield_now().await;
        if metrics.num_alive_tasks() <= most {
            break;
        }
    }
}

/// One request, to the last byte of its response.
pub(crate) async fn request(service: &mut impl Serve) {
    let response = head(service).await;
    let mut body = std::pin::pin!(response.into_body());
    while let Some(frame) = body.frame().await {
        drop(frame);
    }
}

/// One request, to the head of its response.
pub(crate) async fn head<S: Serve>(service: &mut S) -> Response<S::Body> {
    let Ok(()) = poll_fn(|cx| service.poll_ready(cx)).await;
    let Ok(response) = service.call(Request::new(())).await;
    response
}

fn answer() -> Response<Full<Bytes>> {
    Response::new(Full::new(Bytes::from_static(b"answer")))
}

/// No owner at all.
pub(crate) struct Raw;

impl Way for Raw {
    fn service<T: Task>(
        &self,
        tasks: usize,
        task: impl Fn() -> T + Copy + Send + 'static,
    ) -> impl Serve {
        service_fn(move |_| async move {
            for _ in 0..tasks {
                tokio::spawn(task());
            }
            Ok(answer())
        })
    }
}

/// A [`JoinSet`] for each request, which somebody joins after the response.
#[derive(Default)]
pub(crate) struct Joined(Arc<Mutex<JoinSet<()>>>);

impl Way for Joined {
    fn service<T: Task>(
        &self,
        tasks: usize,
        task: impl Fn() -> T + Copy + Send + 'static,
    ) -> impl Serve {
        let left = self.0.clone();
        service_fn(move |_| {
            let left = left.clone();
            async move {
                let mut set = JoinSet::new();
                for _ in 0..tasks {
                    set.spawn(task());
                }
                *left.lock().expect("not poisoned") = set;
                Ok(answer())
            }
        })
    }

    async fn wait(&self, _others: usize) {
        let mut set = std::mem::take(&mut *self.0.lock().expect("not poisoned"));
        while set.join_next().await.is_some() {}
    }

    async fn cancel(&self) {
        let mut set = std::mem::take(&mut *self.0.lock().expect("not poisoned"));
        set.abort_all();
        while set.join_next().await.is_some() {}
    }
}

/// A [`TaskTracker`] for the process and a child token for each request.
#[derive(Clone, Default)]
pub(crate) struct Tracker {
    tracker: TaskTracker,
    token: CancellationToken,
}

impl Tracker {
    pub(crate) fn spawn(&self, future: impl Task) {
        let token = self.token.clone();
        self.tracker.spawn(async move {
            tokio::select! {
                () = token.cancelled() => {}
                () = future => {}
            }
        });
    }
}

impl Way for Tracker {
    fn service<T: Task>(
        &self,
        tasks: usize,
        task: impl Fn() -> T + Copy + Send + 'static,
    ) -> impl Serve {
        let process = self.clone();
        service_fn(move |_| {
            let token = process.token.child_token();
            let request = Self { token, ..process.clone() };
            async move {
                for _ in 0..tasks {
                    request.spawn(task());
                }
                Ok(answer())
            }
        })
    }

    async fn cancel(&self) {
        self.token.cancel();
        self.tracker.close();
        self.tracker.wait().await;
    }
}

/// A scope for each request. It cancels when any clone of it is dropped, so somebody keeps it.
#[derive(Default)]
pub(crate) struct ScopeSpawn(Arc<Mutex<Scope>>);

impl Way for ScopeSpawn {
    fn service<T: Task>(
        &self,
        tasks: usize,
        task: impl Fn() -> T + Copy + Send + 'static,
    ) -> impl Serve {
        let kept = self.0.clone();
        service_fn(move |_| {
            let kept = kept.clone();
            async move {
                let scope = Scope::new();
                for _ in 0..tasks {
                    scope.spawn(task());
                }
                *kept.lock().expect("not poisoned") = scope;
                Ok(answer())
            }
        })
    }
}

/// The same by its layer, which cancels what waits when the head is there.
pub(crate) struct TowerScopeSpawn;

impl Way for TowerScopeSpawn {
    fn service<T: Task>(
        &self,
        tasks: usize,
        task: impl Fn() -> T + Copy + Send + 'static,
    ) -> impl Serve {
        let handler = service_fn(move |request: WithScope<Request<()>>| async move {
            for _ in 0..tasks {
                request.scope.spawn(task());
            }
            Ok(answer())
        });
        ScopeSpawnLayer::new().layer(handler)
    }
}

/// What users write today.
pub(crate) struct ByHand(pub(crate) HandScope);

#[derive(Clone)]
pub(crate) struct HandScope {
    tracker: TaskTracker,
    token: CancellationToken,
    permits: Option<Arc<Semaphore>>,
}

impl ByHand {
    pub(crate) fn new(permits: Option<usize>) -> Self {
        let permits = permits.map(|permits| Arc::new(Semaphore::new(permits)));
        Self(HandScope { tracker: TaskTracker::new(), token: CancellationToken::new(), permits })
    }
}

impl HandScope {
    pub(crate) fn spawn(&self, name: &'static str, future: impl Task) {
        let token = self.token.clone();
        let permit = self.permits.as_ref().map(|permits| permits.clone().try_acquire_owned());
        // Full: refused.
        let Ok(permit) = permit.transpose() else { return };
        let task = async move {
            let _permit = permit;
            tokio::select! {
                () = token.cancelled() => {}
                result = AssertUnwindSafe(future).catch_unwind() => {
                    if result.is_err() {
                        tracing::error!("task panicked");
                    }
                }
            }
        };
        self.tracker.spawn(task.instrument(tracing::info_span!("task", name)));
    }
}

impl Way for ByHand {
    fn service<T: Task>(
        &self,
        tasks: usize,
        task: impl Fn() -> T + Copy + Send + 'static,
    ) -> impl Serve {
        self.layer().layer(service_fn(move |request: Request<()>| async move {
            if tasks > 0 {
                let scope = request.extensions().get::<HandScope>().expect("the layer put it in");
                for _ in 0..tasks {
                    scope.spawn("task", task());
                }
            }
            Ok(answer())
        }))
    }

    async fn cancel(&self) {
        self.0.token.cancel();
        self.0.tracker.close();
        self.0.tracker.wait().await;
    }
}

impl ByHand {
    pub(crate) fn layer(&self) -> HandLayer {
        HandLayer(self.0.clone())
    }
}

/// Puts tracker and child token into the request's extensions, and wraps the body to cancel the
/// token if the client leaves.
#[derive(Clone)]
pub(crate) struct HandLayer(HandScope);

#[derive(Clone)]
pub(crate) struct HandService<S> {
    inner: S,
    scope: HandScope,
}

impl<S> Layer<S> for HandLayer {
    type Service = HandService<S>;

    fn layer(&self, inner: S) -> Self::Service {
        HandService { inner, scope: self.0.clone() }
    }
}

impl<S, B, ResBody> Service<Request<B>> for HandService<S>
where
    S: Service<Request<B>, Response = Response<ResBody>>,
{
    type Response = Response<HandBody<ResBody>>;
    type Error = S::Error;
    type Future = HandFuture<S::Future>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        self.inner.poll_ready(cx)
    }

    fn call(&mut self, mut request: Request<B>) -> Self::Future {
        let token = self.scope.token.child_token();
        let guard = Some(token.clone().drop_guard());
        request.extensions_mut().insert(HandScope { token, ..self.scope.clone() });
        HandFuture { inner: self.inner.call(request), guard }
    }
}

pin_project! {
    pub(crate) struct HandFuture<F> {
        #[pin]
        inner: F,
        guard: Option<DropGuard>,
    }
}

impl<F, B, E> Future for HandFuture<F>
where
    F: Future<Output = Result<Response<B>, E>>,
{
    type Output = Result<Response<HandBody<B>>, E>;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let this = self.project();
        let response = ready!(this.inner.poll(cx))?;
        let guard = this.guard.take();
        Poll::Ready(Ok(response.map(|inner| HandBody { inner, guard })))
    }
}

pin_project! {
    pub(crate) struct HandBody<B> {
        #[pin]
        inner: B,
        guard: Option<DropGuard>,
    }
}

impl<B: Body> Body for HandBody<B> {
    type Data = B::Data;
    type Error = B::Error;

    fn poll_frame(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Self::Data>, Self::Error>>> {
        let this = self.project();
        let frame = ready!(this.inner.poll_frame(cx));
        if frame.is_none() {
            this.guard.take().map(DropGuard::disarm);
        }
        Poll::Ready(frame)
    }

    fn is_end_stream(&self) -> bool {
        self.inner.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.inner.size_hint()
    }
}

pub(crate) struct Ours {
    pub(crate) registry: TaskRegistry,
    pub(crate) kind: Kind,
    /// Tasks that are not the user's: one keeps the deadlines, and sleeps on when they are gone.
    pub(crate) reaper: usize,
}

/// What is special about its tasks.
#[derive(Clone, Copy)]
pub(crate) enum Kind {
    Ordinary,
    Timeout,
    Graceful,
}

impl Ours {
    pub(crate) fn new(registry: TaskRegistry) -> Self {
        Self { registry, kind: Kind::Ordinary, reaper: 1 }
    }
}

impl Way for Ours {
    fn service<T: Task>(
        &self,
        tasks: usize,
        task: impl Fn() -> T + Copy + Send + 'static,
    ) -> impl Serve {
        let kind = self.kind;
        TaskSetLayer::new(&self.registry).layer(service_fn(move |_| async move {
            if tasks > 0 {
                let set = TaskSet::current().expect("the layer is there");
                for _ in 0..tasks {
                    let is_spawned = match kind {
                        Kind::Ordinary => set.spawn("task", task()).is_ok(),
                        Kind::Timeout => {
                            set.task("task").timeout(Duration::from_secs(60)).spawn(task()).is_ok()
                        }
                        Kind::Graceful => set.spawn_graceful("task", move |_| task()).is_ok(),
                    };
                    assert!(is_spawned, "nothing is full or closed");
                }
            }
            Ok(answer())
        }))
    }

    fn wait(&self, others: usize) -> impl Future<Output = ()> + Send {
        no_more_tasks_than(self.reaper + others)
    }

    async fn cancel(&self) {
        self.registry.cancel_all();
        self.registry.close();
        self.registry.wait().await;
    }
}

/// In a group, which is waited for before the answer.
struct InGroup(Ours);

impl Way for InGroup {
    fn service<T: Task>(
        &self,
        tasks: usize,
        task: impl Fn() -> T + Copy + Send + 'static,
    ) -> impl Serve {
        TaskSetLayer::new(&self.0.registry).layer(service_fn(move |_| async move {
            if tasks > 0 {
                let group = TaskSet::current().expect("the layer is there").group();
                for _ in 0..tasks {
                    group.spawn("task", task()).expect("nothing is full or closed");
                }
                group.wait().await;
            }
            Ok(answer())
        }))
    }

    fn wait(&self, others: usize) -> impl Future<Output = ()> + Send {
        self.0.wait(others)
    }
}

/// With a value in the request's context, which tasks then have too.
struct InContext(Ours);

impl Way for InContext {
    fn service<T: Task>(
        &self,
        tasks: usize,
        task: impl Fn() -> T + Copy + Send + 'static,
    ) -> impl Serve {
        let value = |request: &Request<()>| request.uri().path().len();
        RequestContextLayer::new(value).layer(self.0.service(tasks, task))
    }

    fn wait(&self, others: usize) -> impl Future<Output = ()> + Send {
        self.0.wait(others)
    }
}

/// With trace ids, which tasks then have too.
struct Traced(Ours);

impl Way for Traced {
    fn service<T: Task>(
        &self,
        tasks: usize,
        task: impl Fn() -> T + Copy + Send + 'static,
    ) -> impl Serve {
        TraceIdLayer::new().layer(self.0.service(tasks, task))
    }

    fn wait(&self, others: usize) -> impl Future<Output = ()> + Send {
        self.0.wait(others)
    }
}

/// So many tasks of 10 ms, not more than `limit` at once: as users write it.
pub(crate) async fn semaphore_and_tracker(tasks: usize, limit: usize) {
    let permits = Arc::new(Semaphore::new(limit));
    let tracker = TaskTracker::new();
    for _ in 0..tasks {
        let permit = loop {
            match permits.clone().try_acquire_owned() {
                Ok(permit) => break permit,
                Err(_) => sleep(Duration::from_millis(1)).await,
            }
        };
        tracker.spawn(async move {
            sleep(Duration::from_millis(10)).await;
            drop(permit);
        });
    }
    tracker.close();
    tracker.wait().await;
}

/// The same with a [`TaskRegistry`].
pub(crate) async fn registry_with_limit(tasks: usize, limit: usize) {
    let registry = TaskRegistry::new().limit(SpawnLimit::new(limit));
    for _ in 0..tasks {
        let mut future = sleep_10_ms();
        while let Err(refused) = registry.spawn("sleep", future) {
            future = refused.future;
            sleep(Duration::from_millis(1)).await;
        }
    }
    registry.close();
    registry.wait().await;
}

async fn sleep_10_ms() {
    sleep(Duration::from_millis(10)).await;
}
