use std::{
    error::Error,
    future::pending,
    sync::{Arc, Mutex},
    time::Duration,
};

use bytes::Bytes;
use http::{Request, Response};
use http_body_util::{BodyExt, Empty, Full};
use tokio_test::{assert_pending, task::spawn};
use tower::{Layer, ServiceExt, service_fn};
use tower_catch_unwind::Panic;
use tower_request_context::{RequestContext, RequestContextLayer};
use tower_task_set::{
    AtEnd, Cause, ShieldError, ShieldLayer, SpawnError, SpawnLimit, TaskError, TaskRegistry,
    TaskSet, TaskSetLayer,
};

use crate::support::{Broken, assert_ledger, gate, secs, settle};

type Answer = Result<Response<Full<Bytes>>, Broken>;

fn hello() -> Response<Full<Bytes>> {
    Response::new(Full::new(Bytes::from("hello")))
}

/// A handler that waits at a gate.
fn gated() -> (
    tokio::sync::oneshot::Sender<()>,
    impl tower::Service<
        Request<()>,
        Response = Response<Full<Bytes>>,
        Error = Broken,
        Future: Send + 'static,
    > + Clone,
) {
    let (open, wait) = gate();
    let wait = Arc::new(Mutex::new(Some(wait)));
    let service = service_fn(move |_: Request<()>| {
        let wait = wait.lock().unwrap().take().unwrap();
        async move {
            wait.await;
            TaskSet::current().unwrap().spawn("child", async {}).unwrap();
            Ok::<_, Broken>(hello())
        }
    });
    (open, service)
}

#[tokio::test]
async fn the_response_comes_back_when_the_client_is_there() {
    let tasks = TaskRegistry::new();
    let (open, handler) = gated();
    let service = (TaskSetLayer::new(&tasks), ShieldLayer::new("handler")).layer(handler);
    let mut response = spawn(service.oneshot(Request::new(())));
    assert_pending!(response.poll());
    let live = tasks.snapshot().live_tasks;
    assert_eq!(live[0].name, "handler");
    assert!(live[0].site.file().ends_with("shield.rs") && live[0].site.file().contains("tests"));
    open.send(()).unwrap();
    settle().await;
    assert!(response.is_woken());
    let response = response.await.unwrap();
    assert_eq!(response.into_body().collect().await.unwrap().to_bytes(), "hello");
    settle().await;
    assert_ledger(&tasks, "completed 2");
}

#[tokio::test]
async fn a_client_that_leaves_does_not_stop_the_handler() {
    // Whatever becomes of the set's other tasks.
    let tasks = TaskRegistry::new().at_end(AtEnd::Cancel);
    let (open, handler) = gated();
    let service = (TaskSetLayer::new(&tasks), ShieldLayer::new("handler")).layer(handler);
    let mut response = spawn(service.oneshot(Request::new(())));
    assert_pending!(response.poll());
    drop(response);
    settle().await;
    assert_ledger(&tasks, "live 1");
    open.send(()).unwrap();
    settle().await;
    // Its child, too.
    assert_ledger(&tasks, "completed 2");
}

#[tokio::test(start_paused = true)]
async fn a_handler_whose_client_has_left_has_the_time_that_the_layer_gives() {
    for (at_end, lives) in [(AtEnd::Cancel, 0), (AtEnd::Drain(secs(3)), 3), (AtEnd::default(), 30)]
    {
        let tasks = TaskRegistry::new().at_end(AtEnd::Keep);
        let shield = ShieldLayer::new("handler").at_end(at_end);
        let service = (TaskSetLayer::new(&tasks), shield)
            .layer(service_fn(|_: Request<()>| pending::<Answer>()));
        let mut response = spawn(service.oneshot(Request::new(())));
        assert_pending!(response.poll());
        drop(response);
        if lives > 0 {
            tokio::time::sleep(secs(lives).saturating_sub(Duration::from_millis(10))).await;
            assert_ledger(&tasks, "live 1");
        }
        tokio::time::sleep(Duration::from_millis(1_100)).await;
        assert_ledger(&tasks, "cancelled 1");
    }
}

#[tokio::test]
async fn a_refused_handler_is_an_answer() {
    for (content_type, status) in [("text/plain", 503), ("application/grpc", 200)] {
        let tasks = TaskRegistry::new().limit(SpawnLimit::new(0));
        let service = (TaskSetLayer::new(&tasks), ShieldLayer::new("handler"))
            .layer(service_fn(async |_: Request<()>| Ok::<_, Broken>(hello())));
        let request = Request::post("/").header("content-type", content_type).body(()).unwrap();
        let response = service.oneshot(request).await.unwrap();
        assert_eq!(response.status(), status);
        let grpc_status = response.headers().get("grpc-status");
        assert_eq!(grpc_status.is_some_and(|status| status == "8"), status == 200);
        let body = response.into_body().collect().await.unwrap().to_bytes();
        assert_eq!(body.is_empty(), status == 200);
        assert_ledger(&tasks, "refused 1");
    }
}

#[tokio::test]
async fn a_panic_of_the_handler_is_an_answer_with_a_mark() {
    let tasks = TaskRegistry::new();
    let service = (TaskSetLayer::new(&tasks), ShieldLayer::new("handler"))
        .layer(service_fn(async |_: Request<()>| -> Answer { panic!("it hurts") }));
    let response = service.oneshot(Request::new(())).await.unwrap();
    assert_eq!(response.status(), 500);
    let panic = response.extensions().get::<Panic>().unwrap();
    assert_eq!((panic.message(), panic.task()), ("it hurts", Some("handler")));
    assert_ledger(&tasks, "panicked 1");
}

#[tokio::test]
async fn an_error_of_the_handler_passes() {
    let tasks = TaskRegistry::new();
    let service = (TaskSetLayer::new(&tasks), ShieldLayer::new("handler"))
        .layer(service_fn(async |_: Request<()>| -> Answer { Err(Broken) }));
    let Broken = service.oneshot(Request::new(())).await.map(drop).unwrap_err();
    assert_ledger(&tasks, "completed 1");
}

#[tokio::test]
async fn a_handler_that_is_told_to_end_is_an_answer() {
    let tasks = TaskRegistry::new();
    let service = (TaskSetLayer::new(&tasks), ShieldLayer::new("handler"))
        .layer(service_fn(|_: Request<()>| pending::<Answer>()));
    let mut response = spawn(service.oneshot(Request::new(())));
    assert_pending!(response.poll());
    tasks.cancel_all();
    settle().await;
    assert_eq!(response.await.unwrap().status(), 503);
    assert_ledger(&tasks, "cancelled 1");
}

#[tokio::test]
async fn without_a_task_set_it_says_so() {
    let service = ShieldLayer::new("handler")
        .layer(service_fn(async |_: Request<()>| Ok::<_, Broken>(hello())));
    assert_eq!(service.oneshot(Request::new(())).await.unwrap().status(), 500);
}

#[tokio::test]
async fn the_handler_keeps_its_context() {
    let tasks = TaskRegistry::new();
    let context = RequestContextLayer::new(|_: &Request<()>| 7_u32);
    let service = (context, TaskSetLayer::new(&tasks), ShieldLayer::new("handler")).layer(
        service_fn(async |_: Request<()>| {
            tokio::task::yield_now().await;
            let seen = RequestContext::current().get::<u32>().copied();
            Ok::<_, Broken>(
                Response::builder()
                    .header("seen", seen.unwrap())
                    .body(Empty::<Bytes>::new())
                    .unwrap(),
            )
        }),
    );
    assert_eq!(service.oneshot(Request::new(())).await.unwrap().headers()["seen"], "7");
}

#[tokio::test]
async fn without_http_what_keeps_it_from_an_answer_is_an_error() {
    let tasks = TaskRegistry::new().limit(SpawnLimit::new(1));
    let layers = (TaskSetLayer::new(&tasks).plain(), ShieldLayer::new("job").plain());
    let service = layers.layer(service_fn(async |job: &'static str| match job {
        "done" => Ok(1),
        "fails" => Err(Broken),
        "panics" => panic!("it hurts"),
        _ => pending().await,
    }));
    let run = |job| service.clone().oneshot(job);
    let inner = |result: Result<i32, tower_task_set::CallError<ShieldError<Broken>>>| match result {
        Ok(value) => Ok(value),
        Err(tower_task_set::CallError::Inner(error)) => Err(error),
        Err(error) => panic!("{error}"),
    };
    assert_eq!(inner(run("done").await).unwrap(), 1);
    assert!(matches!(inner(run("fails").await), Err(ShieldError::Inner(Broken))));
    let panicked = inner(run("panics").await);
    assert!(matches!(panicked, Err(ShieldError::Task(TaskError::Panicked(_)))));
    let mut stuck = spawn(run("hangs"));
    assert_pending!(stuck.poll());
    assert!(matches!(inner(run("done").await), Err(ShieldError::Refused(SpawnError::Full))));
    tasks.cancel_all();
    settle().await;
    let told = inner(stuck.await);
    assert!(matches!(told, Err(ShieldError::Task(TaskError::Cancelled(Cause::Shutdown)))));
    // A box of the service's own error is that error, whatever is between.
    for (error, expected) in [
        (ShieldError::Inner(Broken), Broken.to_string()),
        (ShieldError::Refused(SpawnError::Full), SpawnError::Full.to_string()),
        (
            ShieldError::Task(TaskError::Cancelled(Cause::Shutdown)),
            TaskError::Cancelled(Cause::Shutdown).to_string(),
        ),
    ] {
        assert_eq!(error.to_string(), expected);
        let is_inner = matches!(error, ShieldError::Inner(_));
        let boxed = Box::<dyn Error + Send + Sync>::from(error);
        assert_eq!((boxed.to_string(), boxed.is::<Broken>()), (expected, is_inner));
    }
    let alone = ShieldLayer::new("job").plain().layer(service_fn(async |()| Ok::<_, Broken>(())));
    assert!(matches!(alone.oneshot(()).await, Err(ShieldError::NoTaskSet(_))));
}
