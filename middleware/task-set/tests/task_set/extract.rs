//! The set as an extractor, and a refusal as a response.

use axum_core::{
    extract::{FromRequestParts, OptionalFromRequestParts},
    response::IntoResponse,
};
use bytes::Bytes;
use http::{Request, Response, StatusCode, header};
use http_body_util::{BodyExt, Empty};
use tower::{Service, ServiceBuilder, ServiceExt, service_fn};
use tower_task_set::{
    NoTaskSet, Refused, SpawnError, SpawnLimit, TaskRegistry, TaskSet, TaskSetLayer,
};

use crate::support::*;

type Answer = Result<Response<Empty<Bytes>>, Broken>;

async fn extract(request: Request<()>) -> Result<TaskSet, NoTaskSet> {
    <TaskSet as FromRequestParts<()>>::from_request_parts(&mut request.into_parts().0, &()).await
}

#[expect(clippy::unnecessary_wraps)] // It is what services return.
fn answer() -> Answer {
    Ok(Response::new(Empty::new()))
}

#[tokio::test]
async fn the_extractor_yields_the_current_set() {
    let tasks = TaskRegistry::new();
    let service = ServiceBuilder::new().layer(TaskSetLayer::new(&tasks)).service_fn(
        |request: Request<()>| async {
            extract(request).await.unwrap().spawn("task", async {}).unwrap();
            answer()
        },
    );
    service.oneshot(Request::new(())).await.unwrap();
    assert_eq!(tasks.snapshot().totals.spawned, 1);
}

#[tokio::test]
async fn the_extractor_looks_into_the_type_map_first() {
    let (mapped, current) = (TaskRegistry::new(), TaskRegistry::new());
    let in_map = serve(&TaskSetLayer::new(&mapped));
    let set = in_map.set.clone();
    let service = ServiceBuilder::new()
        .layer(TaskSetLayer::new(&current))
        .map_request(move |mut request: Request<()>| {
            request.extensions_mut().insert(set.clone());
            request
        })
        .service_fn(|request| async {
            extract(request).await.unwrap().spawn("task", async {}).unwrap();
            answer()
        });
    service.oneshot(Request::new(())).await.unwrap();
    assert_eq!(mapped.snapshot().totals.spawned, 1);
    assert_eq!(current.snapshot().totals.spawned, 0);
}

#[tokio::test]
async fn behind_a_buffer_the_type_map_has_the_set() {
    let tasks = TaskRegistry::new();
    let mut service = ServiceBuilder::new()
        .layer(TaskSetLayer::new(&tasks).in_extensions())
        .buffer(4)
        .service(service_fn(|request: Request<()>| {
            // The call runs on the buffer's own task.
            assert!(TaskSet::current().is_err());
            let set = request.extensions().get::<TaskSet>().unwrap();
            set.spawn("call", forever()).unwrap();
            async {
                // The future does not, and it is the same set.
                assert_eq!(TaskSet::current().unwrap().len(), 1);
                extract(request).await.unwrap().spawn("future", forever()).unwrap();
                answer()
            }
        }));
    let response = service.ready().await.unwrap().call(Request::new(())).await.unwrap();
    assert_ledger(&tasks, "live 2");
    drop(response);
    assert_eq!(tasks.snapshot().totals.attempted, 2);
}

#[tokio::test]
async fn of_two_layers_the_extractor_yields_the_inner_ones_set() {
    for outer_in_extensions in [false, true] {
        for inner_in_extensions in [false, true] {
            let (outer, inner) = (TaskRegistry::new(), TaskRegistry::new());
            let layer = |tasks: &TaskRegistry, in_extensions| {
                let layer = TaskSetLayer::new(tasks);
                if in_extensions { layer.in_extensions() } else { layer }
            };
            let service = ServiceBuilder::new()
                .layer(layer(&outer, outer_in_extensions))
                .layer(layer(&inner, inner_in_extensions))
                .service_fn(|request: Request<()>| async {
                    extract(request).await.unwrap().spawn("task", async {}).unwrap();
                    answer()
                });
            service.oneshot(Request::new(())).await.unwrap();
            let spawned = [&outer, &inner].map(|tasks| tasks.snapshot().totals.spawned);
            assert_eq!(spawned, [0, 1], "{outer_in_extensions} {inner_in_extensions}");
        }
    }
}

#[tokio::test]
async fn without_a_set_the_rejection_names_the_remedies() {
    let rejection = extract(Request::new(())).await.unwrap_err();
    let text = rejection.to_string();
    let response = rejection.into_response();
    assert_eq!(response.status(), StatusCode::INTERNAL_SERVER_ERROR);
    let body = response.into_body().collect().await.unwrap().to_bytes();
    assert_eq!(body, text);
    assert!(text.contains("`TaskSetLayer`") && text.contains("`.in_extensions()`"), "{text}");
}

#[tokio::test]
async fn who_can_do_without_a_set_is_told_whether_there_is_one() {
    async fn extract(request: Request<()>) -> Option<TaskSet> {
        let parts = &mut request.into_parts().0;
        let Ok(set) =
            <TaskSet as OptionalFromRequestParts<()>>::from_request_parts(parts, &()).await;
        set
    }
    assert!(extract(Request::new(())).await.is_none());
    let tasks = TaskRegistry::new();
    let service = ServiceBuilder::new().layer(TaskSetLayer::new(&tasks)).service_fn(
        |request: Request<()>| async {
            extract(request).await.unwrap().spawn("task", async {}).unwrap();
            answer()
        },
    );
    service.oneshot(Request::new(())).await.unwrap();
    assert_eq!(tasks.snapshot().totals.spawned, 1);
}

#[tokio::test]
async fn a_refusal_is_a_response_with_a_problem() {
    let full = TaskRegistry::new().limit(SpawnLimit::new(0));
    let refused: Refused<_> = full.spawn("task", async {}).unwrap_err();
    let closed = TaskRegistry::new();
    closed.close();
    let error: SpawnError = closed.spawn("task", async {}).unwrap_err().into();
    for (response, detail) in [
        (refused.into_response(), SpawnError::Full.to_string()),
        (error.into_response(), SpawnError::Closed.to_string()),
    ] {
        assert_eq!(response.status(), StatusCode::SERVICE_UNAVAILABLE);
        assert_eq!(response.headers()[header::CONTENT_TYPE], "application/problem+json");
        assert_eq!(response.headers()[header::RETRY_AFTER], "1");
        let body = response.into_body().collect().await.unwrap().to_bytes();
        let problem: serde_json::Value = serde_json::from_slice(&body).unwrap();
        assert_eq!((&problem["status"], &problem["detail"]), (&503.into(), &detail.into()));
    }
    let response = SpawnError::NoRuntime.into_response();
    assert_eq!(response.status(), StatusCode::INTERNAL_SERVER_ERROR);
}
