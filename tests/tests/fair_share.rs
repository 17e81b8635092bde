//! One request that wants all there is, and how long the others wait for a place meanwhile.

#![allow(clippy::print_stdout, clippy::unwrap_used)]

use std::{
    convert::Infallible,
    time::{Duration, Instant},
};

use bytes::Bytes;
use http::{Request, Response};
use http_body_util::Full;
use tokio::time::sleep;
use tower::{Layer, ServiceExt, service_fn};
use tower_tasks::{SpawnLimit, TaskRegistry, TaskSet, TaskSetLayer};

const TASK: Duration = Duration::from_millis(5);

/// The 99th percentile of the waits of requests with one task each.
async fn waits_beside_a_greedy_request(limit: SpawnLimit) -> Duration {
    let tasks = TaskRegistry::new().limit(limit);
    let layer = TaskSetLayer::new(&tasks);
    let handler = async |_: Request<()>| {
        let mut response = Response::new(Full::new(Bytes::from_static(b"answer")));
        response.extensions_mut().insert(TaskSet::current().unwrap());
        Ok::<_, Infallible>(response)
    };
    let open = layer.layer(service_fn(handler)).oneshot(Request::new(())).await.unwrap();
    let greedy = open.extensions().get::<TaskSet>().unwrap().clone();
    let spawners: Vec<_> = (0..64)
        .map(|_| {
            let set = greedy.clone();
            tokio::spawn(async move {
                while let Ok(task) =
                    set.spawn_within(Duration::from_secs(9), "greedy", sleep(TASK)).await
                {
                    drop(task.await);
                }
            })
        })
        .collect();
    let mut waits = Vec::new();
    for _ in 0..200 {
        let open = layer.layer(service_fn(handler)).oneshot(Request::new(())).await.unwrap();
        let set = open.extensions().get::<TaskSet>().unwrap().clone();
        let start = Instant::now();
        let task = set.spawn_within(Duration::from_secs(9), "modest", async {}).await.unwrap();
        waits.push(start.elapsed());
        task.await.unwrap();
    }
    drop(open);
    tasks.close();
    for spawner in spawners {
        spawner.await.unwrap();
    }
    waits.sort();
    waits[waits.len() * 99 / 100]
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "it measures time: on a quiet machine"]
async fn a_greedy_request_with_a_share_leaves_places_to_the_others() {
    let without = waits_beside_a_greedy_request(SpawnLimit::new(8)).await;
    let with = waits_beside_a_greedy_request(SpawnLimit::new(8).per_request(4)).await;
    println!("p99 of the wait for a place: {with:?} with a share, {without:?} without one");
    assert!(with < TASK, "{with:?}, and without a share {without:?}");
    assert!(without > TASK, "the request was not greedy: {without:?}");
}
