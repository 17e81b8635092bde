//! Streams that are reset as soon as they are opened, by the hundred thousand: each response has its
//! end, each task its outcome, and nothing of them is left.

#![allow(clippy::unwrap_used)]

use std::{
    alloc::System,
    convert::Infallible,
    future::pending,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
};

use cap::Cap;
use http::{Request, Response};
use hyper::body::Incoming;
use tokio::task::yield_now;
use tower::{ServiceBuilder, service_fn};
use tower_tasks::{
    AtEnd, End, ResponseEndLayer, TaskRegistry, TaskSet, TaskSetLayer, assert_drained,
};
use tower_tasks_tests::{Server, http2, soon};

/// Counts the bytes that are allocated now. `unsafe` is forbidden here, so it is a crate's.
#[global_allocator]
static ALLOCATOR: Cap<System> = Cap::new(System, usize::MAX);

const STREAMS: u64 = 100_000;
const AT_ONCE: u64 = 20;

#[derive(Clone, Default)]
struct Counts {
    calls: Arc<AtomicU64>,
    disconnected: Arc<AtomicU64>,
}

#[tokio::test]
async fn a_hundred_thousand_streams_that_are_reset_at_once_leave_nothing() {
    let tasks = TaskRegistry::new().at_end(AtEnd::Cancel);
    let counts = Counts::default();
    let (calls, disconnected) = (counts.calls.clone(), counts.disconnected.clone());
    let service = ServiceBuilder::new()
        .layer(ResponseEndLayer::new(move |_: &Request<Incoming>| {
            calls.fetch_add(1, Relaxed);
            let disconnected = disconnected.clone();
            move |end| {
                disconnected.fetch_add(u64::from(end == End::Disconnected), Relaxed);
            }
        }))
        .layer(TaskSetLayer::new(&tasks))
        .service(service_fn(|_| async {
            TaskSet::current().unwrap().spawn("waits", pending::<()>()).unwrap();
            pending::<Result<Response<String>, Infallible>>().await
        }));
    let server = Server::hyper(http2(), service).await;

    let mut live_bytes = Vec::new();
    for streams in [STREAMS / 10, STREAMS] {
        reset(&server, streams).await;
        soon(tasks.idle()).await;
        server.has_caught_up().await;
        assert_drained(&tasks);
        live_bytes.push(ALLOCATOR.allocated());
    }
    let (calls, ends) = (counts.calls.load(Relaxed), counts.disconnected.load(Relaxed));
    let totals = tasks.snapshot().totals;
    assert!(calls > STREAMS / 100, "{calls} were served before they were reset");
    assert_eq!(ends, calls);
    assert!(totals.is_exact(), "{totals:?}");
    assert_eq!((totals.spawned, totals.cancelled), (calls, calls));
    // What the server keeps to use again differs from run to run, but not by the streams.
    let kept = live_bytes[1].saturating_sub(live_bytes[0]) as u64;
    assert!(kept < (STREAMS - STREAMS / 10) / 2, "half a byte for each stream: {live_bytes:?}");
}

/// Opens so many, and resets each when it has been sent, over connections that the server closes
/// when it has had enough. Some are served before.
async fn reset(server: &Server, mut left: u64) {
    while left > 0 {
        let mut client = server.h2().await;
        'connection: while left > 0 {
            let mut streams = Vec::new();
            for _ in 0..AT_ONCE {
                let request = Request::get("http://x/").body(()).unwrap();
                let Ok(stream) = client.try_send(request).await else { break 'connection };
                streams.push(stream);
                left = left.saturating_sub(1);
            }
            for _ in 0..3 {
                yield_now().await;
            }
        }
        client.close().await;
    }
}
