//! The layers, and who waits.
#![allow(missing_docs, clippy::unwrap_used)] // Tests.
// A handle, which is a future, is often just what an async block is for.
#![allow(clippy::async_yields_async)]

use std::{
    convert::Infallible,
    future::{pending, ready},
    sync::Arc,
    task::{Context, Wake},
    time::Duration,
};

use bytes::Bytes;
use http::{Request, Response, StatusCode, Version, header};
use http_body_util::{BodyExt, Full};
use tokio::task::{JoinHandle, yield_now};
use tokio_test::{assert_pending, assert_ready, assert_ready_err, assert_ready_ok, task};
use tower::{Layer, Service, ServiceExt, service_fn};
use tower_spawn_limit::{
    Level, RequestLimitLayer, SpawnError, SpawnLimit, SpawnLimitLayer, request_limit::CallError,
    spawn, spawn_blocking, spawn_within,
};

const LONG: Duration = Duration::from_secs(9);

fn hello(_: Request<()>) -> std::future::Ready<Result<Response<Full<Bytes>>, Infallible>> {
    ready(Ok(Response::new(Full::from("hello"))))
}

/// Runs `f` as the handler of a request below this layer.
async fn below<T>(layer: &SpawnLimitLayer, f: impl AsyncFnOnce() -> T) -> T {
    let mut f = Some(f);
    let handler = service_fn(move |()| {
        let f = f.take().unwrap();
        async move { Ok::<_, Infallible>(f().await) }
    });
    layer.clone().plain().layer(handler).oneshot(()).await.unwrap()
}

#[tokio::test(start_paused = true)]
async fn permits_are_had_in_the_order_of_the_asking_and_the_line_is_bounded() {
    let limit = SpawnLimit::new(1).queue(2);
    let permit = limit.try_acquire().unwrap();
    let mut first = task::spawn(limit.acquire_within(LONG));
    let mut second = task::spawn(limit.acquire_within(LONG));
    assert_pending!(first.poll());
    assert_pending!(second.poll());
    assert_eq!(limit.acquire_within(LONG).await.unwrap_err(), SpawnError::Full);
    assert_eq!((limit.waiting(), limit.refused()), (2, 1));
    drop(permit);
    assert!(first.is_woken() && !second.is_woken());
    assert!(limit.try_acquire().is_err(), "it is the first one's");
    let permit = assert_ready_ok!(first.poll());
    drop(permit);
    drop(assert_ready_ok!(second.poll()));
    assert_eq!((limit.in_use(), limit.waiting()), (0, 0));
}

#[tokio::test(start_paused = true)]
async fn a_limit_that_is_raised_lets_in_as_many_as_there_is_room_for() {
    let limit = SpawnLimit::new(0);
    let mut waiting: Vec<_> = (0..3).map(|_| task::spawn(limit.acquire_within(LONG))).collect();
    for waiting in &mut waiting {
        assert_pending!(waiting.poll());
    }
    limit.set_limit(2);
    assert!(waiting[0].is_woken() && waiting[1].is_woken() && !waiting[2].is_woken());
    assert_eq!((limit.in_use(), limit.waiting()), (2, 1));
    // With a permit that nobody has taken.
    drop(waiting.remove(0));
    drop(assert_ready_ok!(waiting[1].poll()));
    drop(waiting);
    assert_eq!((limit.in_use(), limit.waiting()), (0, 0));
}

#[tokio::test(start_paused = true)]
async fn a_waker_that_panics_keeps_no_other_from_its_permit() {
    struct Panics;
    impl Wake for Panics {
        fn wake(self: Arc<Self>) {
            panic!("the waker panics");
        }
    }
    let limit = SpawnLimit::new(1);
    let permit = limit.try_acquire().unwrap();
    let mut bad = Box::pin(limit.acquire_within(LONG));
    let waker = Arc::new(Panics).into();
    assert_pending!(bad.as_mut().poll(&mut Context::from_waker(&waker)));
    let mut good = task::spawn(limit.acquire_within(LONG));
    assert_pending!(good.poll());
    limit.set_limit(2);
    assert_pending!(good.poll());
    drop(permit);
    assert!(good.is_woken());
    drop(assert_ready_ok!(good.poll()));
    drop(bad);
    assert_eq!((limit.in_use(), limit.waiting()), (0, 0));
}

#[tokio::test(start_paused = true)]
async fn a_wait_has_an_end_and_no_time_is_no_wait() {
    let limit = SpawnLimit::new(0);
    let mut none = task::spawn(limit.acquire_within(Duration::ZERO));
    assert_ready_err!(none.poll());
    let mut waits = task::spawn(limit.acquire_within(LONG));
    assert_pending!(waits.poll());
    tokio::time::advance(LONG + Duration::from_millis(1)).await;
    assert_eq!(assert_ready_err!(waits.poll()), SpawnError::Full);
    assert_eq!((limit.waiting(), limit.refused()), (0, 2));
}

#[test]
fn without_a_runtime_nobody_waits() {
    let limit = SpawnLimit::new(0);
    assert_ready_err!(task::spawn(limit.acquire_within(LONG)).poll());
    assert_eq!(spawn(async {}).unwrap_err().reason, SpawnError::NoRuntime);
    let waits = assert_ready!(task::spawn(spawn_within(LONG, async {})).poll());
    assert_eq!(waits.unwrap_err().reason, SpawnError::NoRuntime);
    let timeless = tokio::runtime::Builder::new_current_thread().build().unwrap();
    let refused = timeless.block_on(limit.acquire_within(LONG));
    assert_eq!(refused.unwrap_err(), SpawnError::Full);
}

#[test]
fn who_is_polled_when_its_runtime_was_shut_down_waits_no_more() {
    let timed = || {
        let builder = &mut tokio::runtime::Builder::new_current_thread();
        builder.enable_time().build().unwrap()
    };
    for polled_before in [true, false] {
        let (limit, runtime) = (SpawnLimit::new(0), timed());
        let layer = RequestLimitLayer::new(0).wait(LONG);
        let handle = runtime.handle().clone();
        let mut permit = task::spawn(limit.acquire_within(LONG));
        let mut spawned = task::spawn(
            SpawnLimitLayer::new(limit.clone())
                .plain()
                .layer(service_fn(|()| async {
                    let spawned = spawn_within(LONG, async {}).await;
                    Ok::<_, Infallible>(spawned.map(drop).map_err(|refused| refused.reason))
                }))
                .oneshot(()),
        );
        let mut request = task::spawn(layer.layer(service_fn(hello)).oneshot(Request::new(())));
        if polled_before {
            let _here = handle.enter();
            assert_pending!(permit.poll());
            assert_pending!(spawned.poll());
            assert_pending!(request.poll());
            assert_eq!((limit.waiting(), layer.waiting()), (2, 1));
        }
        drop(runtime);
        // In another that lives, too.
        let other = timed();
        let _here = if polled_before { other.enter() } else { handle.enter() };
        assert_eq!(assert_ready_err!(permit.poll()), SpawnError::Full);
        assert_eq!(assert_ready_ok!(spawned.poll()), Err(SpawnError::Full));
        assert_eq!(assert_ready_ok!(request.poll()).status(), 503);
        assert_eq!((limit.waiting(), limit.refused(), layer.waiting()), (0, 2, 0));
    }
}

#[tokio::test(start_paused = true)]
async fn a_permit_of_each_layer_comes_back_however_a_task_ends() {
    let (outer, inner) = (SpawnLimit::new(1), SpawnLimit::new(1).per_request(1));
    let layers = [outer.clone(), inner.clone()].map(SpawnLimitLayer::new);
    let in_use = || (outer.in_use(), inner.in_use());
    let ends: [fn(JoinHandle<()>); 3] = [drop, |task| task.abort(), std::mem::forget];
    for panics in [false, true] {
        for end in ends {
            let task = below(&layers[0], async || {
                below(&layers[1], async || {
                    let task = spawn(async move {
                        assert_eq!(Level::current(), Level::Task);
                        assert!(spawn(async {}).is_err(), "it is below the same limits");
                        assert!(spawn_within(LONG, async {}).await.is_err());
                        assert!(!panics, "on purpose");
                    });
                    assert_eq!(spawn(async {}).unwrap_err().reason, SpawnError::Full);
                    task.unwrap()
                })
                .await
            });
            let task = task.await;
            assert_eq!(in_use(), (1, 1));
            end(task);
            yield_now().await;
            yield_now().await;
            assert_eq!(in_use(), (0, 0));
        }
    }
}

#[test]
fn a_permit_comes_back_from_a_runtime_that_is_gone() {
    let limit = SpawnLimit::new(1);
    let layer = SpawnLimitLayer::new(limit.clone());
    let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
    let task = runtime.block_on(below(&layer, async || spawn(pending::<()>()).unwrap()));
    assert_eq!(limit.in_use(), 1);
    drop(runtime);
    assert_eq!(limit.in_use(), 0);
    assert!(assert_ready!(task::spawn(task).poll()).unwrap_err().is_cancelled());
}

#[test]
fn a_closure_that_never_runs_keeps_its_permit_until_it_is_dropped() {
    struct InUse(SpawnLimit, std::sync::mpsc::Sender<usize>);
    impl Drop for InUse {
        fn drop(&mut self) {
            self.1.send(self.0.in_use()).unwrap();
        }
    }
    let runtime =
        tokio::runtime::Builder::new_current_thread().max_blocking_threads(1).build().unwrap();
    let limit = SpawnLimit::new(1);
    let layer = SpawnLimitLayer::new(limit.clone());
    let (go, wait) = std::sync::mpsc::channel::<()>();
    let (tell, told) = std::sync::mpsc::channel();
    runtime.block_on(async {
        drop(tokio::task::spawn_blocking(move || wait.recv()));
        let in_use = InUse(limit.clone(), tell);
        let task = below(&layer, async || spawn_blocking(move || drop(in_use)).unwrap()).await;
        task.abort();
    });
    drop(go);
    assert_eq!(told.recv().unwrap(), 1);
    drop(runtime);
    assert_eq!(limit.in_use(), 0);
}

#[tokio::test]
async fn a_closure_that_blocks_keeps_its_permit_until_it_returns() {
    let limit = SpawnLimit::new(1);
    let (go, wait) = std::sync::mpsc::channel::<()>();
    let layer = SpawnLimitLayer::new(limit.clone());
    let blocks = below(&layer, async || {
        spawn_blocking(move || {
            let _ = wait.recv();
            Level::current()
        })
    });
    let blocks = blocks.await.unwrap();
    blocks.abort();
    assert_eq!(limit.in_use(), 1);
    drop(go);
    let _ = blocks.await;
    while limit.in_use() > 0 {
        yield_now().await;
    }
}

#[tokio::test(start_paused = true)]
async fn who_waits_is_closed_out_when_its_request_ends() {
    let limit = SpawnLimit::new(1);
    let permit = limit.try_acquire().unwrap();
    let layer = SpawnLimitLayer::new(limit.clone());
    let waits = below(&layer, async || {
        let mut waits = task::spawn(Box::pin(spawn_within(LONG, async {})));
        assert_pending!(waits.poll());
        waits
    });
    let mut waits = waits.await;
    assert!(waits.is_woken());
    assert_eq!(assert_ready_err!(waits.poll()).reason, SpawnError::Closed);
    assert_eq!(limit.waiting(), 0);
    drop(permit);
    assert_eq!(limit.in_use(), 0);
}

#[tokio::test(start_paused = true)]
async fn who_has_waited_holds_the_permit_that_has_come() {
    let limit = SpawnLimit::new(1);
    let layer = SpawnLimitLayer::new(limit.clone());
    let permit = limit.try_acquire().unwrap();
    let spawns = below(&layer, async || spawn_within(LONG, pending::<()>()).await.unwrap());
    let mut waits = task::spawn(Box::pin(spawns));
    assert_pending!(waits.poll());
    drop(permit);
    assert!(waits.is_woken());
    let task = assert_ready!(waits.poll());
    assert_eq!(limit.in_use(), 1);
    assert!(limit.try_acquire().is_err());
    task.abort();
    task.await.unwrap_err();
    assert_eq!(limit.in_use(), 0);
}

#[tokio::test(start_paused = true)]
async fn when_all_who_wait_have_given_up_a_permit_that_comes_back_is_for_anybody() {
    let limit = SpawnLimit::new(1);
    let permit = limit.try_acquire().unwrap();
    let mut waits = task::spawn(limit.acquire_within(LONG));
    assert_pending!(waits.poll());
    drop(waits);
    drop(permit);
    drop(limit.try_acquire().unwrap());
    assert_eq!((limit.in_use(), limit.waiting()), (0, 0));
}

#[tokio::test(start_paused = true)]
async fn a_request_counts_until_its_body_is_read_or_dropped_or_nobody_holds_it() {
    let layer = RequestLimitLayer::new(1);
    let mut service = layer.layer(service_fn(hello));
    let response = service.ready().await.unwrap().call(Request::new(())).await.unwrap();
    assert_eq!(layer.in_use(), 1);
    response.into_body().collect().await.unwrap();
    assert_eq!(layer.in_use(), 0);
    drop(service.ready().await.unwrap().call(Request::new(())).await.unwrap());
    assert_eq!(layer.in_use(), 0);
    drop(service.ready().await.unwrap().call(Request::new(())));
    assert_eq!((layer.in_use(), layer.refused()), (0, 0));

    let upgrade = |_: Request<()>| {
        let mut response = Response::new(Full::<Bytes>::default());
        *response.status_mut() = StatusCode::SWITCHING_PROTOCOLS;
        let hold = tower_response_end::hold().unwrap();
        response.extensions_mut().insert(Arc::new(hold));
        ready(Ok::<_, Infallible>(response))
    };
    let response = layer.layer(service_fn(upgrade)).oneshot(Request::new(())).await.unwrap();
    let (mut head, body) = response.into_parts();
    drop(body);
    assert_eq!(layer.in_use(), 1, "the socket is served on");
    head.extensions.clear();
    assert_eq!(layer.in_use(), 0);
}

#[tokio::test(start_paused = true)]
async fn a_request_too_many_is_answered_in_its_own_dialect() {
    let layer = RequestLimitLayer::new(0);
    let mut service = layer.layer(service_fn(hello));
    let refused = service.ready().await.unwrap().call(Request::new(())).await.unwrap();
    assert_eq!(refused.status(), StatusCode::SERVICE_UNAVAILABLE);
    assert_eq!(refused.headers()[header::RETRY_AFTER], "1");
    assert_eq!(refused.headers()[header::CONTENT_TYPE], "application/problem+json");
    let body = refused.into_body().collect().await.unwrap().to_bytes();
    let problem: serde_json::Value = serde_json::from_slice(&body).unwrap();
    assert_eq!(problem["status"], 503);
    assert_eq!(problem["detail"], "the limit of requests is reached");

    let grpc = Request::post("/").version(Version::HTTP_2);
    let grpc = grpc.header(header::CONTENT_TYPE, "application/grpc").body(()).unwrap();
    let refused = service.ready().await.unwrap().call(grpc).await.unwrap();
    assert_eq!(
        (refused.status(), &refused.headers()["grpc-status"]),
        (StatusCode::OK, &"8".parse().unwrap())
    );
    assert!(http_body::Body::is_end_stream(refused.body()));

    let plain = layer.clone().plain().layer(service_fn(async |()| Ok::<_, Infallible>(())));
    assert!(matches!(plain.oneshot(()).await, Err(CallError::Full)));
    assert_eq!((layer.in_use(), layer.refused()), (0, 3));
}

#[tokio::test(start_paused = true)]
async fn a_request_waits_for_its_turn_and_a_service_that_is_only_ready_takes_none() {
    let layer = RequestLimitLayer::new(1).wait(LONG).queue(1);
    let mut idle = layer.layer(service_fn(hello));
    let mut busy = idle.clone();
    idle.ready().await.unwrap();
    let first = busy.ready().await.unwrap().call(Request::new(())).await.unwrap();
    assert_eq!(layer.in_use(), 1, "the idle one has none");
    let mut second = task::spawn(busy.ready().await.unwrap().call(Request::new(())));
    assert_pending!(second.poll());
    assert_eq!(layer.waiting(), 1);
    let third = busy.ready().await.unwrap().call(Request::new(())).await.unwrap();
    assert_eq!(third.status(), 503, "the line is full");
    drop(first);
    assert!(second.is_woken());
    let second = assert_ready_ok!(second.poll());
    assert_eq!((second.status(), layer.in_use()), (StatusCode::OK, 1));
    let mut late = task::spawn(busy.ready().await.unwrap().call(Request::new(())));
    assert_pending!(late.poll());
    tokio::time::advance(LONG + Duration::from_millis(1)).await;
    assert_eq!(assert_ready_ok!(late.poll()).status(), 503);
    drop((idle, second));
    assert_eq!((layer.in_use(), layer.waiting(), layer.refused()), (0, 0, 2));
}

#[tokio::test(start_paused = true)]
async fn a_request_within_a_request_does_not_wait_for_its_permit() {
    let layer = RequestLimitLayer::new(1).wait(LONG).plain();
    let inner = layer.layer(service_fn(async |()| Ok::<_, Infallible>(())));
    let outer = layer.layer(service_fn(move |()| {
        let inner = inner.clone();
        async move {
            assert_eq!(Level::current(), Level::Request);
            Ok::<_, Infallible>(matches!(inner.oneshot(()).await, Err(CallError::Full)))
        }
    }));
    let start = tokio::time::Instant::now();
    assert!(outer.oneshot(()).await.unwrap());
    assert_eq!((start.elapsed(), layer.in_use()), (Duration::ZERO, 0));
}

#[tokio::test(start_paused = true)]
async fn a_limit_of_requests_that_is_changed_holds_for_those_who_wait_too() {
    let layer = RequestLimitLayer::new(1).wait(LONG);
    let mut service = layer.layer(service_fn(hello));
    let first = service.ready().await.unwrap().call(Request::new(())).await.unwrap();
    let mut second = task::spawn(service.ready().await.unwrap().call(Request::new(())));
    assert_pending!(second.poll());
    layer.set_limit(2);
    assert!(second.is_woken());
    let second = assert_ready_ok!(second.poll());
    assert_eq!((layer.limit(), layer.in_use()), (2, 2));
    layer.set_limit(0);
    assert_eq!((layer.limit(), layer.in_use()), (0, 2), "none is ended");
    drop((first, second));
    let mut third = task::spawn(service.ready().await.unwrap().call(Request::new(())));
    assert_pending!(third.poll());
    drop(third);
    assert_eq!((layer.in_use(), layer.waiting()), (0, 0));
}

#[tokio::test(start_paused = true)]
async fn a_plain_request_too_many_is_the_error_of_a_full_limit() {
    let layer = RequestLimitLayer::new(0).plain();
    let service = layer.layer(service_fn(async |()| Ok::<_, Infallible>(())));
    let full = service.oneshot(()).await.unwrap_err();
    assert_eq!(full.to_string(), "the limit of requests is reached");
    let boxed = Box::<dyn std::error::Error + Send + Sync>::from(full);
    assert_eq!(boxed.downcast_ref(), Some(&SpawnError::Full));

    layer.set_limit(1);
    let fails = service_fn(async |()| Err::<(), _>(std::fmt::Error));
    let failed = layer.layer(fails).oneshot(()).await.unwrap_err();
    assert_eq!(failed.to_string(), std::fmt::Error.to_string());
    let boxed = Box::<dyn std::error::Error + Send + Sync>::from(failed);
    assert!(boxed.is::<std::fmt::Error>());
}

#[tokio::test]
async fn a_closure_that_is_refused_comes_back() {
    let layer = SpawnLimitLayer::new(SpawnLimit::new(0));
    let refused = below(&layer, async || spawn_blocking(|| "still whole")).await.unwrap_err();
    assert_eq!(refused.reason, SpawnError::Full);
    assert_eq!((refused.future)(), "still whole");
}
