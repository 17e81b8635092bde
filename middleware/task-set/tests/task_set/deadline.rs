use std::{
    future::pending,
    pin::{Pin, pin},
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use bytes::Bytes;
use http::{Request, Response};
use http_body::{Body, Frame};
use http_body_util::{BodyExt, Empty, Full};
use tokio::{
    runtime::Builder,
    task::coop::{consume_budget, has_budget_remaining},
    time::{Instant, advance},
};
use tokio_test::{assert_ready_ok, task::spawn};
use tower::{Layer, Service, ServiceExt, service_fn};
use tower_task_set::{
    AtEnd, BodyError, CallError, Cause, End, SpawnError, Stopped, TaskHandle, TaskRegistry,
    TaskSet, TaskSetLayer,
};

use crate::support::{
    Broken, COMPLETED, Flag, Log, Script, Yield, assert_ledger, current_thread, forever, gate, now,
    outcome, poll_once, secs, serve, settle,
};

/// Calls a handler that spawns into its set, and then never answers.
async fn stuck(layer: &TaskSetLayer, request: Request<()>) -> (u16, TaskHandle<()>) {
    let tasks = Log::new();
    let service = layer.layer(service_fn(|_: Request<()>| {
        tasks.push(TaskSet::current().unwrap().spawn("task", forever()).unwrap());
        pending::<Result<Response<Empty<Bytes>>, Broken>>()
    }));
    let response = service.oneshot(request).await.unwrap();
    let status = match response.headers().get("grpc-status") {
        Some(status) => status.to_str().unwrap().parse().unwrap(),
        None => response.status().as_u16(),
    };
    (status, tasks.take().remove(0))
}

fn grpc(timeout: &str) -> Request<()> {
    let request = Request::post("/").version(http::Version::HTTP_2);
    let request = request.header("content-type", "application/grpc");
    request.header("grpc-timeout", timeout).body(()).unwrap()
}

#[tokio::test(start_paused = true)]
async fn a_request_that_takes_too_long_is_answered_and_its_set_ends() {
    let start = Instant::now();
    for (at_end, lives) in [(AtEnd::Cancel, 0), (AtEnd::Drain(secs(5)), 5)] {
        let tasks = TaskRegistry::new().at_end(at_end);
        let start = Instant::now();
        let (status, task) =
            stuck(&TaskSetLayer::new(&tasks).deadline(secs(3)), Request::new(())).await;
        assert_eq!((status, start.elapsed()), (504, secs(3)));
        assert_eq!(outcome(task).await, Yield::Cancelled(Cause::TimedOut));
        assert!(start.elapsed() < secs(4 + lives), "{at_end}");
    }
    let tasks = TaskRegistry::new().at_end(AtEnd::Keep);
    let (_, task) = stuck(&TaskSetLayer::new(&tasks).deadline(secs(3)), Request::new(())).await;
    advance(secs(1_000)).await;
    assert!(!task.is_finished());
    assert!(start.elapsed() > secs(1_000));
}

#[tokio::test(start_paused = true)]
async fn a_handler_that_uses_up_the_budget_of_its_task_has_no_more_time() {
    let tasks = TaskRegistry::new();
    let layer = TaskSetLayer::new(&tasks).deadline(secs(3));
    let mut response = spawn(
        layer
            .layer(service_fn(async |_: Request<()>| {
                loop {
                    consume_budget().await;
                }
                #[expect(unreachable_code, reason = "for its type")]
                Ok::<_, Broken>(Response::new(Empty::<Bytes>::new()))
            }))
            .oneshot(Request::new(())),
    );
    assert!(response.poll().is_pending());
    assert!(!has_budget_remaining());
    advance(secs(4)).await;
    let Poll::Ready(answer) = response.poll() else { panic!("it goes on") };
    assert_eq!(answer.unwrap().status(), 504);
}

#[tokio::test(start_paused = true)]
async fn there_may_be_an_exception_for_this_end() {
    let tasks = TaskRegistry::new().at_end(AtEnd::Keep);
    let layer = TaskSetLayer::new(&tasks).on(End::TimedOut, AtEnd::Cancel).deadline(secs(3));
    let (_, task) = stuck(&layer, Request::new(())).await;
    assert_eq!(outcome(task).await, Yield::Cancelled(Cause::TimedOut));
}

#[tokio::test(start_paused = true)]
async fn a_body_that_takes_too_long_ends_in_an_error() {
    let tasks = TaskRegistry::new().at_end(AtEnd::Cancel);
    let start = Instant::now();
    let dropped = Flag::default();
    let on_drop = dropped.clone();
    let service =
        TaskSetLayer::new(&tasks).deadline(secs(3)).layer(service_fn(async |_: Request<()>| {
            TaskSet::current().unwrap().spawn("task", forever()).unwrap();
            tokio::time::sleep(secs(2)).await;
            Ok::<_, Broken>(Response::new(Script::on_drop({
                let on_drop = on_drop.clone();
                move || on_drop.set()
            })))
        }));
    let response = service.oneshot(Request::new(())).await.unwrap();
    let mut body = pin!(response.into_body());
    let error = body.frame().await.unwrap().unwrap_err();
    assert!(matches!(error, BodyError::Stopped(Stopped::TimedOut)));
    assert_eq!(start.elapsed(), secs(3), "from the call, and not from the head");
    assert!(dropped.is_set());
    assert!(body.frame().await.is_none());
    settle().await;
    assert_ledger(&tasks, "cancelled 1");
}

/// Ends when its task does, as if that were all; or in a last piece that says so.
struct Fed {
    task: TaskHandle<()>,
    last: Option<Bytes>,
    is_over: bool,
}

impl Body for Fed {
    type Data = Bytes;
    type Error = Broken;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Broken>>> {
        Pin::new(&mut self.task).poll(cx).map(|_| {
            self.is_over = true;
            self.last.take().map(|last| Ok(Frame::data(last)))
        })
    }

    fn is_end_stream(&self) -> bool {
        self.is_over
    }
}

#[tokio::test(start_paused = true)]
async fn what_is_made_of_the_end_of_the_tasks_is_not_the_answer() {
    let tasks = TaskRegistry::new().at_end(AtEnd::Cancel);
    let layer = TaskSetLayer::new(&tasks).deadline(secs(3));
    let start = || TaskSet::current().unwrap().spawn("task", forever()).unwrap();
    for fails in [false, true] {
        let service = layer.layer(service_fn(|_: Request<()>| async move {
            let outcome = outcome(start()).await;
            assert_eq!(outcome, Yield::Cancelled(Cause::TimedOut));
            if fails { Err(Broken) } else { Ok(Response::new(Empty::<Bytes>::new())) }
        }));
        let mut response = Box::pin(service.oneshot(Request::new(())));
        assert!(poll_once(response.as_mut()).is_pending());
        advance(secs(3)).await;
        settle().await;
        assert_eq!(tasks.len(), 0, "its tasks have ended before anybody polls it");
        assert_eq!(response.await.unwrap().status(), 504);
    }

    for last in [None, Some(Bytes::from_static(b"]"))] {
        let service = layer.layer(service_fn(|_: Request<()>| async {
            let body = Fed { task: start(), last: last.clone(), is_over: false };
            Ok::<_, Broken>(Response::new(body))
        }));
        let mut body = Box::pin(service.oneshot(Request::new(())).await.unwrap().into_body());
        assert!(poll_once(pin!(body.frame())).is_pending());
        advance(secs(3)).await;
        settle().await;
        assert_eq!(tasks.len(), 0);
        let error = body.frame().await.unwrap().unwrap_err();
        assert!(matches!(error, BodyError::Stopped(Stopped::TimedOut)));
        assert!(body.frame().await.is_none());
    }

    let service = layer.plain().layer(service_fn(|(): ()| async {
        outcome(start()).await;
        Ok::<_, Broken>(())
    }));
    let mut response = Box::pin(service.oneshot(()));
    assert!(poll_once(response.as_mut()).is_pending());
    advance(secs(3)).await;
    settle().await;
    let error = response.await.unwrap_err();
    assert!(matches!(error, CallError::Stopped(Stopped::TimedOut)));
    assert_ledger(&tasks, "cancelled 5");
}

#[tokio::test(start_paused = true)]
async fn a_set_that_ends_at_the_deadline_fails_a_response_that_has_come_to_no_await() {
    for (waits, in_time) in [(2, true), (3, false)] {
        let tasks = TaskRegistry::new().at_end(AtEnd::Cancel);
        let layer = TaskSetLayer::new(&tasks).deadline(secs(3));
        // The body is polled late.
        let served = serve(&layer);
        let fed = served.set.spawn("feed", forever()).unwrap();
        // And so is the future.
        let mut service = layer.layer(service_fn(|_: Request<()>| {
            TaskSet::current().unwrap().spawn("task", forever()).unwrap();
            async { Ok::<_, Broken>(Response::new(Empty::<Bytes>::new())) }
        }));
        let response = service.call(Request::new(()));
        advance(secs(waits)).await;
        settle().await;
        assert_eq!(fed.is_finished(), !in_time);
        let status = response.await.unwrap().status();
        assert_eq!(status, if in_time { 200 } else { 504 });
        served.send(|| Poll::Ready(None));
        let end = spawn(served.body).enter(|cx, body| body.poll_frame(cx));
        match end {
            Poll::Ready(None) => assert!(in_time),
            Poll::Ready(Some(Err(BodyError::Stopped(Stopped::TimedOut)))) => assert!(!in_time),
            end => panic!("{end:?}"),
        }
    }
}

#[tokio::test(start_paused = true)]
async fn a_deadline_fails_its_response_whosever_the_tasks_are() {
    let [outer, inner] = [(); 2].map(|()| TaskRegistry::new().at_end(AtEnd::Cancel));
    let layers = (TaskSetLayer::new(&outer).deadline(secs(3)), TaskSetLayer::new(&inner));
    let service = layers.layer(service_fn(|_: Request<()>| async {
        let task = TaskSet::current().unwrap().spawn("task", forever()).unwrap();
        assert_eq!(outcome(task).await, Yield::Cancelled(Cause::TimedOut));
        Ok::<_, Broken>(Response::new(Empty::<Bytes>::new()))
    }));
    let mut response = Box::pin(service.oneshot(Request::new(())));
    assert!(poll_once(response.as_mut()).is_pending());
    advance(secs(3)).await;
    settle().await;
    assert_ledger(&inner, "cancelled 1");
    assert_eq!(response.await.unwrap().status(), 504);
}

#[tokio::test(start_paused = true)]
async fn a_response_in_time_is_not_touched() {
    let tasks = TaskRegistry::new();
    let service =
        TaskSetLayer::new(&tasks).deadline(secs(3)).layer(service_fn(async |_: Request<()>| {
            tokio::time::sleep(secs(2)).await;
            TaskSet::current().unwrap().spawn("task", tokio::time::sleep(secs(10))).unwrap();
            Ok::<_, Broken>(Response::new(Empty::<Bytes>::new()))
        }));
    let response = service.oneshot(Request::new(())).await.unwrap();
    assert_eq!(response.status(), 200);
    assert!(response.into_body().collect().await.is_ok());
    advance(secs(5)).await;
    assert_ledger(&tasks, "live 1");
    tasks.close();
    tasks.wait().await;
    assert_ledger(&tasks, "completed 1");
}

#[tokio::test(start_paused = true)]
async fn the_smaller_of_the_deadline_and_the_clients_counts() {
    for (timeout, expected) in [
        ("500m", 500),
        ("2S", 2_000),
        ("3S", 3_000),
        ("1H", 3_000),
        ("0n", 0),
        // Not as gRPC wants it: ignored.
        ("1s", 3_000),
        ("-1S", 3_000),
        ("123456789m", 3_000),
        ("", 3_000),
    ] {
        let tasks = TaskRegistry::new().at_end(AtEnd::Cancel);
        let start = Instant::now();
        let (status, task) =
            stuck(&TaskSetLayer::new(&tasks).deadline(secs(3)), grpc(timeout)).await;
        assert_eq!(status, 4, "deadline exceeded");
        let waited = start.elapsed();
        let slack = waited.checked_sub(Duration::from_millis(expected));
        assert!(
            slack.is_some_and(|slack| slack <= Duration::from_millis(1)),
            "{timeout}: {waited:?}"
        );
        assert_eq!(outcome(task).await, Yield::Cancelled(Cause::TimedOut));
    }
}

#[tokio::test(start_paused = true)]
async fn only_a_grpc_client_has_a_say() {
    let tasks = TaskRegistry::new();
    let start = Instant::now();
    let request = Request::get("/").header("grpc-timeout", "1S").body(()).unwrap();
    stuck(&TaskSetLayer::new(&tasks).deadline(secs(3)), request).await;
    assert_eq!(start.elapsed(), secs(3));
}

#[tokio::test(start_paused = true)]
async fn the_clients_wish_alone_may_count() {
    let tasks = TaskRegistry::new();
    let start = Instant::now();
    stuck(&TaskSetLayer::new(&tasks).deadline(Duration::MAX), grpc("7S")).await;
    assert_eq!(start.elapsed(), secs(7));
    let served = serve(&TaskSetLayer::new(&tasks).deadline(Duration::MAX));
    assert_eq!(served.set.deadline(), None);
}

#[tokio::test(start_paused = true)]
async fn the_set_ends_even_if_nobody_polls_the_response() {
    // A client that does not read, and a server that waits for it.
    let tasks = TaskRegistry::new().at_end(AtEnd::Cancel);
    let served = serve(&TaskSetLayer::new(&tasks).deadline(secs(3)));
    let task = served.set.spawn("task", forever()).unwrap();
    assert_eq!(outcome(task).await, Yield::Cancelled(Cause::TimedOut));
    let refused = served.set.spawn("late", forever()).unwrap_err();
    assert_eq!(refused.reason, SpawnError::Closed);
    drop(served);
    assert_ledger(&tasks, "refused 1, cancelled 1");
}

#[tokio::test(start_paused = true)]
async fn a_hold_does_not_outlive_the_deadline() {
    let tasks = TaskRegistry::new().at_end(AtEnd::Cancel);
    let served = serve(&TaskSetLayer::new(&tasks).deadline(secs(3)));
    let (set, hold) = (served.set.clone(), served.set.hold());
    served.end(End::Completed);
    let task = set.spawn("serves the socket", forever()).unwrap();
    advance(secs(2)).await;
    assert_ledger(&tasks, "live 1");
    assert_eq!(outcome(task).await, Yield::Cancelled(Cause::TimedOut));
    assert!(set.spawn("late", forever()).is_err());
    drop(hold);
    assert_ledger(&tasks, "refused 1, cancelled 1");
}

#[tokio::test(start_paused = true)]
async fn the_deadline_can_be_read() {
    let tasks = TaskRegistry::new();
    let start = Instant::now();
    let set = serve(&TaskSetLayer::new(&tasks).deadline(secs(3))).set;
    assert_eq!(set.deadline(), Some(start + secs(3)));
    assert_eq!(serve(&TaskSetLayer::new(&tasks)).set.deadline(), None);
}

/// How many seconds a response has, to the nearest.
fn left(set: &TaskSet) -> Option<u64> {
    let left = set.deadline()?.duration_since(Instant::now());
    Some((left + Duration::from_millis(500)).as_secs())
}

#[tokio::test(start_paused = true)]
async fn a_call_within_a_request_leaves_none_of_its_deadlines_behind() {
    // Equal ones, too; and it may be the first that asks for the set, or not.
    for (outer, inner) in [(Some(9), 3), (Some(3), 3), (None, 3), (Some(2), 3)] {
        for asks_before in [true, false] {
            let tasks = TaskRegistry::new().at_end(AtEnd::Cancel);
            let of = |deadline: Option<u64>| {
                let layer = TaskSetLayer::new(&tasks);
                deadline.map_or(layer.clone(), |deadline| layer.deadline(secs(deadline)))
            };
            let sub = of(Some(inner)).layer(service_fn(async |_: Request<()>| {
                tokio::time::sleep(secs(1)).await;
                let left = left(&TaskSet::current().unwrap()).unwrap();
                Ok::<_, Broken>(Response::new(Full::<Bytes>::from(left.to_string())))
            }));
            let service = of(outer).layer(service_fn(async |_: Request<()>| {
                if asks_before {
                    TaskSet::current().unwrap();
                }
                let call = || async {
                    let response = sub.clone().oneshot(Request::new(())).await?;
                    Ok::<_, Broken>(response.into_body().collect().await.unwrap().to_bytes())
                };
                let (one, other) = tokio::try_join!(call(), call())?;
                assert_eq!(one, (outer.map_or(inner, |outer| outer.min(inner)) - 1).to_string());
                assert_eq!(one, other);
                let set = TaskSet::current().unwrap();
                assert_eq!(left(&set), outer.map(|outer| outer - 1), "{asks_before}");
                let task = set.spawn("task", forever()).unwrap();
                tokio::time::sleep(secs(5)).await;
                assert!(!task.is_finished());
                Ok::<_, Broken>(Response::new(Empty::<Bytes>::new()))
            }));
            let status = service.oneshot(Request::new(())).await.unwrap().status();
            assert_eq!(status == 200, outer != Some(3) && outer != Some(2), "{outer:?}");
        }
    }
}

#[tokio::test(start_paused = true)]
async fn of_nested_deadlines_the_earlier_counts_and_ends_the_one_set() {
    for (outer, inner) in [(Some(9), 3), (None, 3), (Some(3), 9)] {
        for asked_before in [false, true] {
            let tasks = TaskRegistry::new().at_end(AtEnd::Cancel);
            let start = Instant::now();
            let (deadline, task) = (Log::new(), Log::new());
            let inner = TaskSetLayer::new(&tasks).deadline(secs(inner)).layer(service_fn(|_| {
                let set = TaskSet::current().unwrap();
                deadline.push(set.deadline().unwrap());
                task.push(set.spawn("task", forever()).unwrap());
                pending::<Result<Response<Empty<Bytes>>, Broken>>()
            }));
            let between = service_fn(|request: Request<()>| {
                if asked_before {
                    let _ = TaskSet::current().unwrap();
                }
                inner.clone().oneshot(request)
            });
            let mut layer = TaskSetLayer::new(&tasks);
            if let Some(outer) = outer {
                layer = layer.deadline(secs(outer));
            }
            let response = layer.layer(between).oneshot(Request::new(())).await.unwrap();
            assert_eq!(response.status(), 504);
            assert_eq!(start.elapsed(), secs(3));
            assert_eq!(deadline.take(), [start + secs(3)]);
            assert_eq!(outcome(task.take().remove(0)).await, Yield::Cancelled(Cause::TimedOut));
        }
    }
}

#[tokio::test(start_paused = true)]
async fn without_http_a_call_that_takes_too_long_is_an_error() {
    let tasks = TaskRegistry::new().at_end(AtEnd::Cancel);
    let layer = TaskSetLayer::new(&tasks).deadline(secs(3)).plain();
    let task = Log::new();
    let service = layer.layer(service_fn(|job: u32| {
        task.push(TaskSet::current().unwrap().spawn("task", forever()).unwrap());
        async move { if job == 0 { Err::<(), _>(Broken) } else { pending().await } }
    }));
    assert!(matches!(service.clone().oneshot(0).await, Err(CallError::Inner(Broken))));
    let start = Instant::now();
    let error = service.oneshot(1).await.unwrap_err();
    assert!(matches!(error, CallError::Stopped(Stopped::TimedOut)));
    assert_eq!(start.elapsed(), secs(3));
    let [failed, timed_out] = <[_; 2]>::try_from(task.take()).unwrap();
    assert_eq!(outcome(failed).await, Yield::Cancelled(Cause::Failed));
    assert_eq!(outcome(timed_out).await, Yield::Cancelled(Cause::TimedOut));
}

#[tokio::test(start_paused = true)]
async fn a_deadline_ends_a_request_that_has_no_set() {
    let tasks = TaskRegistry::new();
    let service = TaskSetLayer::new(&tasks)
        .deadline(secs(3))
        .layer(service_fn(|_: Request<()>| pending::<Result<Response<Empty<Bytes>>, Broken>>()));
    assert_eq!(service.oneshot(Request::new(())).await.unwrap().status(), 504);
    assert_ledger(&tasks, "");
}

#[tokio::test(start_paused = true)]
async fn what_drains_after_the_deadline_has_its_time() {
    let tasks = TaskRegistry::new().at_end(AtEnd::Drain(secs(5)));
    let served = serve(&TaskSetLayer::new(&tasks).deadline(secs(3)));
    let (open, wait) = gate();
    let set = served.set.clone();
    let task = served.set.spawn("task", async move {
        wait.await;
        set.spawn("child", async {}).unwrap().await.unwrap();
    });
    advance(secs(4)).await;
    settle().await;
    open.send(()).unwrap();
    assert_eq!(outcome(task.unwrap()).await, COMPLETED);
    assert_ledger(&tasks, "completed 2");
}

#[test]
fn what_is_polled_when_its_runtime_was_shut_down_has_no_deadline() {
    for polled_before in [true, false] {
        let tasks = TaskRegistry::new();
        let layer = TaskSetLayer::new(&tasks).deadline(secs(3));
        let runtime = current_thread();
        let handle = runtime.handle().clone();
        let (open, wait) = gate();
        let mut wait = Some(wait);
        let service = service_fn(move |_: Request<()>| {
            let wait = wait.take().unwrap();
            async move {
                wait.await;
                Ok::<_, Broken>(Response::new(Script::on_drop(|| {})))
            }
        });
        let mut response = spawn(layer.layer(service).oneshot(Request::new(())));
        if polled_before {
            let _here = handle.enter();
            assert!(response.poll().is_pending());
        }
        drop(runtime);
        let _here = handle.enter();
        assert!(response.poll().is_pending());
        open.send(()).unwrap();
        let Poll::Ready(Ok(response)) = response.poll() else { panic!("it is ready") };
        let mut body = Box::pin(response.into_body());
        assert!(poll_once(pin!(body.frame())).is_pending());
    }
}

#[test]
fn without_a_time_driver_a_deadline_does_nothing() {
    let runtime = Builder::new_current_thread().build().unwrap();
    let tasks = TaskRegistry::new();
    let layer = TaskSetLayer::new(&tasks).deadline(Duration::ZERO);
    runtime.block_on(async {
        for _ in 0..2 {
            let (open, wait) = gate();
            let wait = Arc::new(tokio::sync::Mutex::new(Some(wait)));
            let service = layer.layer(service_fn(|_: Request<()>| {
                let wait = wait.clone();
                async move {
                    let wait = wait.lock().await.take().unwrap();
                    TaskSet::current().unwrap().spawn("task", async {}).unwrap();
                    wait.await;
                    Ok::<_, Broken>(Response::new(Empty::<Bytes>::new()))
                }
            }));
            let mut response = Box::pin(service.oneshot(Request::new(())));
            assert!(poll_once(response.as_mut()).is_pending());
            settle().await;
            open.send(()).unwrap();
            assert_eq!(response.await.unwrap().status(), 200);
        }
    });
    assert_ledger(&tasks, "completed 2");
}

#[test]
fn without_a_time_driver_no_deadline_counts_that_is_over_at_once() {
    let runtime = Builder::new_current_thread().build().unwrap();
    let tasks = TaskRegistry::new().at_end(AtEnd::Cancel);
    let layer = TaskSetLayer::new(&tasks).deadline(Duration::ZERO);
    runtime.block_on(async {
        let served = serve(&layer);
        let task = served.set.spawn("task", forever()).unwrap();
        let other = served.set.task("task").timeout(Duration::ZERO).spawn(forever()).unwrap();
        settle().await;
        assert!(!task.is_finished() && !other.is_finished());
        served.set.spawn("late", async {}).unwrap().await.unwrap();
        served.end(End::Completed);
        settle().await;
    });
    assert_ledger(&tasks, "completed 1, cancelled 2");
}

#[test]
fn outside_of_a_runtime_a_response_fails_whose_set_has_ended_at_its_deadline() {
    let runtime = Builder::new_current_thread().enable_time().start_paused(true).build().unwrap();
    let tasks = TaskRegistry::new().at_end(AtEnd::Cancel).runtime(runtime.handle().clone());
    let layer = TaskSetLayer::new(&tasks).deadline(Duration::ZERO);
    let service = layer.layer(service_fn(|_: Request<()>| async {
        let task = TaskSet::current().unwrap().spawn("task", forever()).unwrap();
        assert_eq!(outcome(task).await, Yield::Cancelled(Cause::TimedOut));
        Ok::<_, Broken>(Response::new(Empty::<Bytes>::new()))
    }));
    let mut response = spawn(service.oneshot(Request::new(())));
    assert!(response.poll().is_pending());
    runtime.block_on(async {
        advance(secs(1)).await;
        settle().await;
    });
    assert_eq!(assert_ready_ok!(response.poll()).status(), 504);
}

#[test]
fn outside_of_a_runtime_a_deadline_does_nothing() {
    let tasks = TaskRegistry::new();
    let layer = TaskSetLayer::new(&tasks).deadline(Duration::ZERO);
    let mut response = spawn(
        layer
            .layer(service_fn(|_: Request<()>| pending::<Result<Response<Empty<Bytes>>, Broken>>()))
            .oneshot(Request::new(())),
    );
    assert!(response.poll().is_pending());
    let mut served = serve(&layer);
    served.in_poll(|| ());
}

#[test]
fn a_response_may_be_called_outside_of_the_runtime_that_polls_it() {
    let tasks = TaskRegistry::new();
    let layer = TaskSetLayer::new(&tasks).deadline(Duration::from_millis(1));
    let mut service = layer
        .layer(service_fn(|_: Request<()>| pending::<Result<Response<Empty<Bytes>>, Broken>>()));
    let response = tower::Service::call(&mut service, Request::new(()));
    assert_eq!(current_thread().block_on(response).unwrap().status(), 504);
}

#[tokio::test(start_paused = true)]
async fn a_body_that_was_wrapped_says_what_the_inner_one_says() {
    let tasks = TaskRegistry::new();
    let service =
        TaskSetLayer::new(&tasks).deadline(secs(3)).layer(service_fn(async |_: Request<()>| {
            Ok::<_, Broken>(Response::new(Full::new(Bytes::from("hello"))))
        }));
    let body = now(service.oneshot(Request::new(()))).unwrap().into_body();
    assert_eq!(body.size_hint().exact(), Some(5));
    assert!(!body.is_end_stream());
    let mut body = pin!(body);
    assert!(matches!(poll_once(pin!(body.frame())), Poll::Ready(Some(Ok(_)))));
    assert!(body.is_end_stream());
}
