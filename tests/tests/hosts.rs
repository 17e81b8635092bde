//! One suite of behaviours, written once, on every host: axum, hyper, tonic with each kind of
//! method, and a bare service without HTTP.
//!
//! Under a gRPC method that streams its answer, the handler runs in the polls of the body.

#![allow(clippy::unwrap_used, clippy::type_complexity)]
// A handle, which is a future, is often just what an async block is for.
#![allow(clippy::async_yields_async)]

mod grpc;

use std::{
    convert::Infallible,
    future::{Future, pending},
    pin::Pin,
    sync::{
        Arc, Mutex,
        atomic::{AtomicU32, Ordering::SeqCst},
    },
    task::{Context, Poll},
    time::Duration,
};

use axum::Router;
use bytes::Bytes;
use http::{Request, Response, StatusCode};
use http_body_util::Full;
use hyper::body::Incoming;
use tokio::sync::oneshot;
use tokio_stream::{Stream, StreamExt, wrappers::TcpListenerStream};
use tonic::{Status, server::NamedService, transport::Channel};
use tower::{Layer, Service, ServiceExt, service_fn};
use tower_tasks::{
    AtEnd, End, SpawnError, SpawnLimit, TaskError, TaskHandle, TaskRegistry, TaskSet, TaskSetLayer,
    task_set::{CallError, Cause, OnPanic, Stopped, TaskEvent, TaskState, assert_drained},
};
use tower_tasks_tests::{Events, Server, events, http2, read_all, soon};

use grpc::Plain;

// The hosts

type Boxed<T> = Pin<Box<dyn Future<Output = T> + Send>>;
/// What a client is told: a text, or a gRPC status, or what the handler says.
type Reply = Result<String, String>;
type Handler = Arc<dyn Fn() -> Boxed<Reply> + Send + Sync>;

/// A handler that is served, and the way to call it. To drop the call is to leave.
struct Host {
    call: Box<dyn Fn() -> Boxed<Reply> + Send + Sync>,
    _server: Option<Server>,
}

const HOSTS: [(&str, fn(TaskSetLayer, Handler) -> Boxed<Host>); 7] = [
    ("axum", |layer, handler| Box::pin(axum(layer, handler))),
    ("hyper", |layer, handler| Box::pin(hyper(layer, handler))),
    ("bare", |layer, handler| Box::pin(std::future::ready(bare(layer, handler)))),
    ("tonic unary", |layer, handler| Box::pin(tonic("unary", layer, handler))),
    ("tonic client stream", |layer, handler| Box::pin(tonic("client", layer, handler))),
    ("tonic server stream", |layer, handler| Box::pin(tonic("server", layer, handler))),
    ("tonic bidirectional", |layer, handler| Box::pin(tonic("both", layer, handler))),
];

async fn axum(layer: TaskSetLayer, handler: Handler) -> Host {
    let handler = move || async move { handler().await.map_err(|_| StatusCode::IM_A_TEAPOT) };
    let router = Router::new().fallback(handler).layer(layer);
    let server = Server::host(async |listener| axum::serve(listener, router).await.unwrap()).await;
    let addr = server.addr();
    let call = move || -> Boxed<Reply> {
        Box::pin(async move {
            let mut client = Server::at(addr).raw().await;
            client.write("GET / HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n").await;
            let response = client.rest().await;
            let (head, body) = response.split_once("\r\n\r\n").ok_or("closed")?;
            reply(head["HTTP/1.1 ".len()..][..3].parse().unwrap(), body)
        })
    };
    Host { call: Box::new(call), _server: Some(server) }
}

async fn hyper(layer: TaskSetLayer, handler: Handler) -> Host {
    let service = layer.layer(service_fn(move |_: Request<Incoming>| {
        let answer = handler();
        async { Ok::<_, Infallible>(http_response(answer.await)) }
    }));
    let server = Server::hyper(http2(), service).await;
    let addr = server.addr();
    let call = move || -> Boxed<Reply> {
        Box::pin(async move {
            let mut client = Server::at(addr).h2().await;
            let response = client.send(Request::get("http://x/").body(()).unwrap()).await;
            let response = soon(response).await.map_err(|error| error.to_string())?;
            let status = response.status();
            let (body, _) = read_all(&mut response.into_body()).await.map_err(|e| e.to_string())?;
            reply(status.as_u16(), std::str::from_utf8(&body).unwrap())
        })
    };
    Host { call: Box::new(call), _server: Some(server) }
}

fn bare(layer: TaskSetLayer, handler: Handler) -> Host {
    let service = layer.plain().layer(service_fn(move |()| handler()));
    let call = move || -> Boxed<Reply> {
        let call = service.clone().oneshot(());
        Box::pin(async {
            // A worker, which contains the panics of its jobs.
            let caught = tower_tasks::catch_unwind::CatchUnwind::new(call).await;
            caught.map_err(|panic| panic.to_string())?.map_err(|error| match error {
                CallError::Inner(error) => error,
                CallError::Stopped(Stopped::TimedOut) => "4".to_owned(),
                CallError::Stopped(Stopped::Panicked(_)) => "13".to_owned(),
                error => error.to_string(),
            })
        })
    };
    Host { call: Box::new(call), _server: None }
}

async fn tonic(method: &'static str, layer: TaskSetLayer, handler: Handler) -> Host {
    let router = tonic::transport::Server::builder().layer(layer).add_service(Grpc(handler));
    let server = Server::host(async |listener| {
        router.serve_with_incoming(TcpListenerStream::new(listener)).await.unwrap();
    })
    .await;
    let channel = Channel::from_shared(format!("http://{}", server.addr())).unwrap();
    let channel = channel.connect_lazy();
    let call = move || -> Boxed<Reply> {
        let client = tonic::client::Grpc::new(channel.clone());
        Box::pin(async move { grpc_reply(grpc_call(client, method).await) })
    };
    Host { call: Box::new(call), _server: Some(server) }
}

// What the glue needs of each protocol.

fn http_response(reply: Reply) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::default());
    match reply {
        Ok(text) => *response.body_mut() = text.into(),
        Err(_) => *response.status_mut() = StatusCode::IM_A_TEAPOT,
    }
    response
}

fn reply(status: u16, body: &str) -> Reply {
    match status {
        200 => Ok(body.to_owned()),
        418 => Err("failed".to_owned()),
        500 => Err("13".to_owned()),
        504 => Err("4".to_owned()),
        other => Err(other.to_string()),
    }
}

fn grpc_reply(reply: Result<Bytes, Status>) -> Reply {
    let text = |bytes: Bytes| String::from_utf8(bytes.to_vec()).unwrap();
    reply.map(text).map_err(|status| match status.code() {
        tonic::Code::Aborted => status.message().to_owned(),
        code => (code as i32).to_string(),
    })
}

/// A gRPC service as tonic's generated code is, with messages of plain bytes.
#[derive(Clone)]
struct Grpc(Handler);

impl NamedService for Grpc {
    const NAME: &'static str = "test.Hosts";
}

type Messages = Pin<Box<dyn Stream<Item = Result<Bytes, Status>> + Send>>;

impl Service<Request<tonic::body::Body>> for Grpc {
    type Response = Response<tonic::body::Body>;
    type Error = Infallible;
    type Future = Boxed<Result<Self::Response, Infallible>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: Request<tonic::body::Body>) -> Self::Future {
        let handler = self.0.clone();
        let run = move || {
            let reply = handler();
            async { reply.await.map(Bytes::from).map_err(Status::aborted) }
        };
        let one = {
            let run = run.clone();
            move || {
                let run = run();
                async { run.await.map(tonic::Response::new) }
            }
        };
        let many = move || {
            let run = run.clone();
            let messages: Messages = Box::pin(tokio_stream::once(()).then(move |()| run()));
            std::future::ready(Ok(tonic::Response::new(messages)))
        };
        let mut grpc = tonic::server::Grpc::new(Plain);
        Box::pin(async move {
            Ok(match request.uri().path() {
                "/test.Hosts/unary" => {
                    grpc.unary(service_fn(move |_: tonic::Request<Bytes>| one()), request).await
                }
                "/test.Hosts/client" => {
                    let service =
                        service_fn(move |_: tonic::Request<tonic::Streaming<Bytes>>| one());
                    grpc.client_streaming(service, request).await
                }
                "/test.Hosts/server" => {
                    let service = service_fn(move |_: tonic::Request<Bytes>| many());
                    grpc.server_streaming(service, request).await
                }
                _ => {
                    let service =
                        service_fn(move |_: tonic::Request<tonic::Streaming<Bytes>>| many());
                    grpc.streaming(service, request).await
                }
            })
        })
    }
}

async fn grpc_call(
    mut client: tonic::client::Grpc<Channel>,
    method: &str,
) -> Result<Bytes, Status> {
    soon(client.ready()).await.unwrap();
    let path = format!("/test.Hosts/{method}").parse().unwrap();
    let (message, stream) = (Bytes::from("x"), tokio_stream::once(Bytes::from("x")));
    let mut messages = match method {
        "unary" => {
            return Ok(client.unary(tonic::Request::new(message), path, Plain).await?.into_inner());
        }
        "client" => {
            let stream = tonic::Request::new(stream);
            return Ok(client.client_streaming(stream, path, Plain).await?.into_inner());
        }
        "server" => {
            client.server_streaming(tonic::Request::new(message), path, Plain).await?.into_inner()
        }
        _ => client.streaming(tonic::Request::new(stream), path, Plain).await?.into_inner(),
    };
    let message = messages.message().await?.unwrap();
    assert!(messages.message().await?.is_none());
    Ok(message)
}

// The suite

/// Where a behaviour is tried.
struct Site {
    serve: fn(TaskSetLayer, Handler) -> Boxed<Host>,
    tasks: TaskRegistry,
}

impl Site {
    async fn serve<F>(&self, handler: impl Fn() -> F + Send + Sync + 'static) -> Host
    where
        F: Future<Output = Reply> + Send + 'static,
    {
        self.serve_with(TaskSetLayer::new(&self.tasks), handler).await
    }

    async fn serve_with<F>(
        &self,
        layer: TaskSetLayer,
        handler: impl Fn() -> F + Send + Sync + 'static,
    ) -> Host
    where
        F: Future<Output = Reply> + Send + 'static,
    {
        (self.serve)(layer, Arc::new(move || Box::pin(handler()))).await
    }

    /// Calls a handler that spawns a task with `spawn` and answers, and yields the task.
    async fn answered<T: Send + 'static>(
        &self,
        layer: TaskSetLayer,
        spawn: impl Fn(&TaskSet) -> T + Send + Sync + 'static,
    ) -> T {
        let (tell, mut told) = events();
        let host = self
            .serve_with(layer, move || {
                drop(tell.send(spawn(&set())));
                async { ok() }
            })
            .await;
        assert_eq!((host.call)().await, ok());
        told.wait().await
    }

    /// The same, of a handler that never answers and whose client leaves.
    async fn left<T: Send + 'static>(
        &self,
        layer: TaskSetLayer,
        spawn: impl Fn(&TaskSet) -> T + Send + Sync + 'static,
    ) -> T {
        let (tell, mut told) = events();
        let host = self
            .serve_with(layer, move || {
                drop(tell.send(spawn(&set())));
                pending()
            })
            .await;
        let call = tokio::spawn((host.call)());
        let spawned = told.wait().await;
        call.abort();
        drop(call.await);
        // The server sees it while it lives.
        let all_ended = async {
            while self
                .tasks
                .snapshot()
                .live_tasks
                .iter()
                .any(|task| task.state == TaskState::Running)
            {
                tokio::task::yield_now().await;
            }
        };
        soon(all_ended).await;
        spawned
    }

    fn layer(&self) -> TaskSetLayer {
        TaskSetLayer::new(&self.tasks)
    }

    async fn drained(&self) {
        self.tasks.close();
        soon(self.tasks.wait()).await;
        assert_drained(&self.tasks);
        assert!(self.tasks.snapshot().totals.is_exact());
    }
}

fn set() -> TaskSet {
    TaskSet::current().unwrap()
}

#[expect(clippy::unnecessary_wraps, reason = "it is a reply")]
fn ok() -> Reply {
    Ok("ok".to_owned())
}

fn spawn_pending(set: &TaskSet) -> TaskHandle<()> {
    set.spawn("task", pending()).unwrap()
}

/// A task at a gate, and the key to it.
fn spawn_gated(set: &TaskSet) -> (TaskHandle<u32>, oneshot::Sender<()>) {
    let (open, gate) = oneshot::channel::<()>();
    let task = set.spawn("task", async {
        drop(gate.await);
        7
    });
    (task.unwrap(), open)
}

async fn cause<T>(task: TaskHandle<T>) -> Cause {
    match soon(task).await.map(drop) {
        Err(TaskError::Cancelled(cause)) => cause,
        other => panic!("{other:?}"),
    }
}

async fn finishes((task, open): (TaskHandle<u32>, oneshot::Sender<()>)) {
    assert!(!task.is_finished());
    open.send(()).unwrap();
    assert_eq!(soon(task).await.unwrap(), 7);
}

fn hurt() -> impl Future<Output = ()> + Send {
    std::future::poll_fn(|_| panic!("it hurts"))
}

macro_rules! behaviours {
    ($($name:ident: |$site:ident| $body:block)*) => {
        $(async fn $name($site: Site) $body)*
        const BEHAVIOURS: &[(&str, fn(Site) -> Boxed<()>)] =
            &[$((stringify!($name), |site| Box::pin($name(site)))),*];
    };
}

behaviours! {
    the_reply_comes_back: |site| {
        let host = site.serve(async || ok()).await;
        assert_eq!((host.call)().await, ok());
        assert_eq!((host.call)().await, ok());
    }
    a_failure_of_the_handler_is_the_clients: |site| {
        let host = site.serve(async || Err("failed".to_owned())).await;
        assert_eq!((host.call)().await, Err("failed".to_owned()));
    }
    the_set_is_current_before_and_after_an_await: |site| {
        let host = site.serve(async || {
            set();
            tokio::task::yield_now().await;
            set();
            ok()
        }).await;
        assert_eq!((host.call)().await, ok());
    }
    whoever_asks_gets_the_same_set: |site| {
        let host = site.serve(async || {
            spawn_pending(&set());
            Ok(set().len().to_string())
        }).await;
        assert_eq!((host.call)().await, Ok("1".to_owned()));
    }
    each_request_has_a_set_of_its_own: |site| {
        let host = site.serve(async || {
            spawn_pending(&set());
            Ok(set().len().to_string())
        }).await;
        for _ in 0..3 {
            assert_eq!((host.call)().await, Ok("1".to_owned()));
        }
    }
    who_does_not_ask_counts_nothing: |site| {
        let host = site.serve(async || ok()).await;
        assert_eq!((host.call)().await, ok());
        assert_eq!(site.tasks.snapshot().totals.attempted, 0);
    }
    a_task_outlives_the_reply: |site| {
        finishes(site.answered(site.layer(), spawn_gated).await).await;
    }
    a_task_may_end_with_the_reply: |site| {
        let task = site.answered(site.layer().at_end(AtEnd::Cancel), spawn_pending).await;
        assert_eq!(cause(task).await, Cause::Completed);
    }
    a_kept_task_goes_on: |site| {
        let gated = site.answered(site.layer().at_end(AtEnd::Keep), spawn_gated).await;
        let live = site.tasks.snapshot().live_tasks;
        assert_eq!(live[0].at_end, AtEnd::Keep);
        finishes(gated).await;
    }
    a_task_that_drains_too_long_is_cancelled: |site| {
        let layer = site.layer().at_end(AtEnd::Drain(Duration::from_millis(20)));
        assert_eq!(cause(site.answered(layer, spawn_pending).await).await, Cause::Completed);
    }
    a_client_that_leaves_cancels_what_ends_with_its_request: |site| {
        let task = site.left(site.layer().at_end(AtEnd::Cancel), spawn_pending).await;
        assert_eq!(cause(task).await, Cause::Disconnected);
    }
    a_client_that_leaves_does_not_stop_what_drains: |site| {
        finishes(site.left(site.layer(), spawn_gated).await).await;
    }
    a_client_that_leaves_does_not_stop_what_is_kept: |site| {
        finishes(site.left(site.layer().at_end(AtEnd::Keep), spawn_gated).await).await;
    }
    the_leaving_of_a_client_may_be_an_exception: |site| {
        let layer = site.layer().on(End::Disconnected, AtEnd::Cancel);
        assert_eq!(cause(site.left(layer.clone(), spawn_pending).await).await, Cause::Disconnected);
        finishes(site.answered(layer, spawn_gated).await).await;
    }
    the_choice_of_a_task_comes_before_that_of_its_layer: |site| {
        let task = site.answered(site.layer().at_end(AtEnd::Keep), |set| {
            set.task("task").at_end(AtEnd::Cancel).spawn(pending::<()>()).unwrap()
        }).await;
        assert_eq!(cause(task).await, Cause::Completed);
    }
    the_choice_of_a_set_comes_before_that_of_its_layer: |site| {
        let task = site.answered(site.layer().at_end(AtEnd::Keep), |set| {
            set.at_end(AtEnd::Cancel);
            spawn_pending(set)
        }).await;
        assert_eq!(cause(task).await, Cause::Completed);
    }
    a_task_may_spawn_into_its_set: |site| {
        let host = site.serve(async || {
            let child = set().spawn("parent", async { set().spawn("child", async { 7 }).unwrap() });
            Ok(child.unwrap().await.unwrap().await.unwrap().to_string())
        }).await;
        assert_eq!((host.call)().await, Ok("7".to_owned()));
        assert_eq!(site.tasks.snapshot().totals.completed, 2);
    }
    a_task_may_still_spawn_when_its_response_is_over: |site| {
        let (task, open) = site.answered(site.layer(), |_| {
            let (open, gate) = oneshot::channel::<()>();
            let task = set().spawn("parent", async {
                drop(gate.await);
                set().spawn("child", async { 7 }).unwrap().await.unwrap()
            });
            (task.unwrap(), open)
        }).await;
        open.send(()).unwrap();
        assert_eq!(soon(task).await.unwrap(), 7);
    }
    nobody_else_may: |site| {
        let (set, task) = site.answered(site.layer(), |set| (set.clone(), spawn_gated(set))).await;
        let end = async {
            while set.spawn("late", async {}).is_ok() {
                tokio::task::yield_now().await;
            }
        };
        soon(end).await;
        assert_eq!(set.spawn("late", async {}).unwrap_err().reason, SpawnError::Closed);
        finishes(task).await;
    }
    a_full_limit_refuses_and_hands_the_future_back: |site| {
        let site = Site { tasks: site.tasks.limit(SpawnLimit::new(1)), ..site };
        let host = site.serve(async || {
            spawn_pending(&set());
            let refused = set().spawn("second", async { 7 }).unwrap_err();
            assert_eq!(refused.reason, SpawnError::Full);
            Ok(refused.future.await.to_string())
        }).await;
        assert_eq!((host.call)().await, Ok("7".to_owned()));
        assert_eq!(site.tasks.snapshot().totals.refused, 1);
    }
    one_request_takes_no_more_than_its_share: |site| {
        let site = Site { tasks: site.tasks.limit(SpawnLimit::new(9).per_request(2)), ..site };
        let host = site.serve(async || {
            let spawned = (0..5).filter(|_| set().spawn("task", pending::<()>()).is_ok()).count();
            Ok(spawned.to_string())
        }).await;
        for _ in 0..2 {
            assert_eq!((host.call)().await, Ok("2".to_owned()));
        }
    }
    a_panic_of_a_task_is_its_own: |site| {
        let host = site.serve(async || match set().spawn("task", hurt()).unwrap().await {
            Err(TaskError::Panicked(panic)) => Ok(panic.message().to_owned()),
            other => Err(format!("{other:?}")),
        }).await;
        assert_eq!((host.call)().await, Ok("it hurts".to_owned()));
        assert_eq!(site.tasks.snapshot().totals.panicked, 1);
    }
    a_panic_of_a_task_may_cancel_its_siblings: |site| {
        let host = site.serve_with(site.layer().on_panic(OnPanic::CancelSiblings), async || {
            let sibling = spawn_pending(&set());
            set().spawn("task", hurt()).unwrap();
            Ok(cause(sibling).await.to_string())
        }).await;
        assert_eq!((host.call)().await, Ok(Cause::Sibling.to_string()));
    }
    a_panic_of_a_task_may_fail_the_response: |site| {
        let host = site.serve_with(site.layer().on_panic(OnPanic::FailResponse), async || {
            set().spawn("task", hurt()).unwrap();
            pending().await
        }).await;
        assert_eq!((host.call)().await, Err("13".to_owned()));
    }
    a_panic_of_the_handler_is_the_end_of_its_set_alone: |site| {
        let (tell, mut told) = events();
        let asked = AtomicU32::new(0);
        let host = site.serve_with(site.layer().at_end(AtEnd::Cancel), move || {
            let tell = tell.clone();
            let first = asked.fetch_add(1, SeqCst) == 0;
            async move {
                if first {
                    drop(tell.send(spawn_pending(&set())));
                    panic!("it hurts");
                }
                ok()
            }
        }).await;
        (host.call)().await.unwrap_err();
        assert_eq!(cause(told.wait().await).await, Cause::Panicked);
        assert_eq!((host.call)().await, ok());
    }
    a_request_that_takes_too_long_fails_and_its_set_ends: |site| {
        let (tell, mut told) = events();
        let layer = site.layer().at_end(AtEnd::Cancel).deadline(Duration::from_millis(50));
        let host = site.serve_with(layer, move || {
            drop(tell.send(spawn_pending(&set())));
            pending()
        }).await;
        assert_eq!((host.call)().await, Err("4".to_owned()));
        assert_eq!(cause(told.wait().await).await, Cause::TimedOut);
    }
    the_deadline_can_be_read: |site| {
        let layer = site.layer().deadline(Duration::from_secs(60));
        let host = site.serve_with(layer, async || {
            let left = set().deadline().unwrap() - tokio::time::Instant::now();
            Ok((left <= Duration::from_secs(60)).to_string())
        }).await;
        assert_eq!((host.call)().await, Ok("true".to_owned()));
    }
    a_task_has_its_own_timeout: |site| {
        let host = site.serve(async || {
            let task = set().task("task").timeout(Duration::from_millis(10)).spawn(pending::<()>());
            Ok(task.unwrap().await.unwrap_err().to_string())
        }).await;
        assert_eq!((host.call)().await, Ok(TaskError::TimedOut.to_string()));
    }
    a_graceful_task_is_told_why: |site| {
        let layer = site.layer().at_end(AtEnd::Cancel);
        let task = site.left(layer, |set| {
            set.spawn_graceful("task", async |stop| stop.cancelled().await).unwrap()
        }).await;
        assert_eq!(soon(task).await.unwrap(), Cause::Disconnected);
    }
    a_closure_that_blocks_is_tracked_and_has_its_set: |site| {
        let host = site.serve(async || {
            let task = set().spawn_blocking("task", |_| set().len());
            Ok(task.unwrap().await.unwrap().to_string())
        }).await;
        assert_eq!((host.call)().await, Ok("1".to_owned()));
    }
    a_handle_yields_what_the_task_does: |site| {
        let host = site.serve(async || {
            Ok(set().spawn("task", async { 7 }).unwrap().await.unwrap().to_string())
        }).await;
        assert_eq!((host.call)().await, Ok("7".to_owned()));
    }
    a_handle_cancels: |site| {
        let host = site.serve(async || {
            let task = spawn_pending(&set());
            task.cancel();
            Ok(cause(task).await.to_string())
        }).await;
        assert_eq!((host.call)().await, Ok(Cause::Requested.to_string()));
    }
    a_set_cancels_all_and_accepts_no_more: |site| {
        let host = site.serve(async || {
            let task = spawn_pending(&set());
            set().cancel_all();
            assert!(set().spawn("late", async {}).is_err());
            Ok(cause(task).await.to_string())
        }).await;
        assert_eq!((host.call)().await, Ok(Cause::Requested.to_string()));
    }
    a_registry_cancels_all: |site| {
        let task = site.answered(site.layer().at_end(AtEnd::Keep), spawn_pending).await;
        site.tasks.cancel_all();
        assert_eq!(cause(task).await, Cause::Shutdown);
    }
    a_closed_registry_accepts_nothing: |site| {
        site.tasks.close();
        let host = site.serve(async || {
            Ok(set().spawn("task", async {}).unwrap_err().reason.to_string())
        }).await;
        assert_eq!((host.call)().await, Ok(SpawnError::Closed.to_string()));
    }
    a_snapshot_says_who_lives_and_where_it_came_from: |site| {
        let (task, open) = site.answered(site.layer(), spawn_gated).await;
        let live = site.tasks.snapshot().live_tasks;
        assert_eq!((live.len(), live[0].name), (1, "task"));
        assert!(live[0].site.file().ends_with("hosts.rs"));
        finishes((task, open)).await;
    }
    an_observer_is_told_of_the_start_and_the_end: |site| {
        let seen = Arc::new(Mutex::new(Vec::new()));
        let see = seen.clone();
        let tasks = site.tasks.observer(move |event: &TaskEvent| {
            see.lock().unwrap().push(matches!(event, TaskEvent::Started { .. }));
        });
        let site = Site { tasks, ..site };
        finishes(site.answered(site.layer(), spawn_gated).await).await;
        site.drained().await;
        assert_eq!(*seen.lock().unwrap(), [true, false]);
    }
    many_requests_at_once_do_not_mix: |site| {
        let site = Site { tasks: site.tasks.limit(SpawnLimit::new(1_000)), ..site };
        let host = site.serve(async || {
            for _ in 0..3 {
                set().spawn("task", tokio::task::yield_now()).unwrap();
            }
            tokio::task::yield_now().await;
            Ok(set().len().to_string())
        }).await;
        let calls: Vec<_> = (0..40).map(|_| tokio::spawn((host.call)())).collect();
        for call in calls {
            assert!(soon(call).await.unwrap().unwrap().parse::<u32>().unwrap() <= 3);
        }
        site.drained().await;
        assert_eq!(site.tasks.snapshot().by_name["task"].completed, 120);
    }
    the_end_of_all_leaves_nothing: |site| {
        let gated = site.answered(site.layer(), spawn_gated).await;
        site.left(site.layer().at_end(AtEnd::Cancel), spawn_pending).await;
        finishes(gated).await;
        site.drained().await;
        let totals = site.tasks.snapshot().totals;
        assert_eq!((totals.completed, totals.cancelled, totals.spawned), (1, 1, 2));
    }
}

#[tokio::test]
#[allow(clippy::print_stdout)]
async fn every_behaviour_is_the_same_on_every_host() {
    let mut failed = Vec::new();
    for (host, serve) in HOSTS {
        for (name, behaviour) in BEHAVIOURS {
            let site = Site { serve, tasks: TaskRegistry::new() };
            // Its panic is told by the panic hook; here, which are wrong.
            if tokio::spawn(soon(behaviour(site))).await.is_err() {
                failed.push(format!("{host}: {name}"));
            }
        }
    }
    println!("{} behaviours on {} hosts", BEHAVIOURS.len(), HOSTS.len());
    assert!(BEHAVIOURS.len() >= 30);
    assert!(failed.is_empty(), "{failed:#?}");
}

// When × what, on tonic

#[derive(Clone, Copy, Debug)]
enum When {
    Completed,
    Status,
    Aborted,
    Panicked,
    TimedOut,
}

#[tokio::test]
async fn a_task_of_a_grpc_call_ends_as_its_lifetime_says_whatever_ends_the_call() {
    let mut failed = Vec::new();
    for (host, serve) in HOSTS.into_iter().filter(|(host, _)| host.starts_with("tonic")) {
        for when in [When::Completed, When::Status, When::Aborted, When::Panicked, When::TimedOut] {
            for what in [AtEnd::Cancel, AtEnd::Drain(Duration::from_secs(3_600)), AtEnd::Keep] {
                let site = Site { serve, tasks: TaskRegistry::new().at_end(what) };
                if tokio::spawn(soon(check(site, when, what))).await.is_err() {
                    failed.push(format!("{host}: {when:?} × {what}"));
                }
            }
        }
    }
    assert!(failed.is_empty(), "{failed:#?}");
}

async fn check(site: Site, when: When, what: AtEnd) {
    let (tell, mut told): (_, Events<(TaskHandle<u32>, oneshot::Sender<()>)>) = events();
    let mut layer = site.layer();
    if let When::TimedOut = when {
        layer = layer.deadline(Duration::from_millis(30));
    }
    let host = site
        .serve_with(layer, move || {
            drop(tell.send(spawn_gated(&set())));
            async move {
                match when {
                    When::Completed => ok(),
                    When::Status => Err("failed".to_owned()),
                    When::Panicked => panic!("it hurts"),
                    When::Aborted | When::TimedOut => pending().await,
                }
            }
        })
        .await;
    let call = tokio::spawn((host.call)());
    let gated = told.wait().await;
    let expected = match when {
        // The status is a part of a complete response.
        When::Completed | When::Status => Cause::Completed,
        When::Aborted => {
            call.abort();
            Cause::Disconnected
        }
        When::Panicked => Cause::Panicked,
        When::TimedOut => Cause::TimedOut,
    };
    drop(call.await);
    if what == AtEnd::Cancel {
        assert_eq!(cause(gated.0).await, expected);
    } else {
        let state = if what == AtEnd::Keep { TaskState::Kept } else { TaskState::Draining };
        let is_so = async {
            while site.tasks.snapshot().live_tasks[0].state != state {
                tokio::task::yield_now().await;
            }
        };
        soon(is_so).await;
        finishes(gated).await;
    }
    site.drained().await;
}
