//! The shutdown through its public API, on a paused clock: its phases, its requests, its tasks, and
//! what it reports. With real signals and sockets it is in the repository's `tests/`.

#![allow(clippy::unwrap_used)]

use std::{
    cell::Cell,
    convert::Infallible,
    error::Error,
    fmt,
    future::{Future, pending, ready},
    io, panic,
    pin::{Pin, pin},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering::SeqCst},
    },
    task::{Context, Poll, Wake, Waker},
    time::Duration,
};

use bytes::Bytes;
use http::{HeaderName, Method, Request, Response, StatusCode, Version, header};
use http_body::{Body, Frame, SizeHint};
use http_body_util::{BodyExt, Full};
use tokio::{
    sync::Notify,
    time::{Instant, advance, sleep},
};
use tower::{Layer, Service, ServiceBuilder, ServiceExt, service_fn};
use tower_request_context::{RequestContext, TraceId};
use tower_response_end::hold;
use tower_shutdown::{
    BodyError, CallError, Drained, Kind, Report, Requests, RunError, Shutdown, ShutdownLayer,
    ShutdownWatch,
};
use tower_task_set::{Outcome, SpawnError, TaskRegistry, TaskSet, TaskSetLayer};

const fn secs(secs: u64) -> Duration {
    Duration::from_secs(secs)
}

const BUDGET: Duration = secs(25);

/// Without signals: what belongs to the process is not for a test.
fn shutdown() -> Shutdown {
    shutdown_of(BUDGET)
}

fn shutdown_of(budget: Duration) -> Shutdown {
    Shutdown::new(budget).without_signals()
}

type Reply = Result<Response<Full<Bytes>>, Infallible>;

/// A server that ends when it is told to.
fn server(shutdown: &Shutdown) -> impl Future<Output = Result<(), Infallible>> + use<> {
    let signalled = shutdown.signalled();
    async move {
        signalled.await;
        Ok(())
    }
}

async fn settle() {
    for _ in 0..8 {
        tokio::task::yield_now().await;
    }
}

fn poll_once<F: Future>(future: Pin<&mut F>) -> Poll<F::Output> {
    future.poll(&mut Context::from_waker(Waker::noop()))
}

fn panicking_waker() -> Waker {
    struct Panics;
    impl Wake for Panics {
        fn wake(self: Arc<Self>) {
            panic!("the waker panics");
        }
    }
    Arc::new(Panics).into()
}

/// A request whose handler waits for ever.
fn stuck_request(
    layer: &ShutdownLayer,
) -> tower_shutdown::ResponseFuture<impl Future<Output = Reply> + use<>> {
    layer.layer(service_fn(|_: Request<()>| pending::<Reply>())).call(Request::new(()))
}

fn report_of(forced: &Report) -> Vec<(Kind, &str, Option<Outcome>)> {
    forced.forced().iter().map(|it| (it.what, &*it.name, it.outcome)).collect()
}

#[track_caller]
fn assert_adds_up(report: &Report) {
    let Requests { at_begin, later, completed, ended, left, .. } = report.requests;
    assert_eq!(at_begin + later, completed + ended + left, "{report}");
    let of = report.drained;
    let gone = of.completed + of.cancelled + of.aborted + of.timed_out + of.panicked;
    assert_eq!(of.at_begin + of.spawned, gone + of.left, "{report}");
    assert!(report.tasks.is_exact(), "{report}");
    assert_eq!(report.tasks.live, of.left);
    assert_eq!(report.exit_code(), i32::from(!report.forced().is_empty()));
}

// The course of it

#[tokio::test(start_paused = true)]
async fn a_server_with_nothing_to_do_is_over_at_once() {
    let shutdown = shutdown();
    let start = Instant::now();
    let mut run = pin!(shutdown.run(server(&shutdown)));
    assert!(poll_once(run.as_mut()).is_pending());
    assert!(shutdown.watch().is_ready());
    shutdown.begin();
    shutdown.clone().begin();
    let report = run.await.unwrap();
    assert_eq!(start.elapsed(), Duration::ZERO);
    assert!(report.server_ended && report.forced().is_empty());
    assert_eq!((report.exit_code(), report.took, report.budget), (0, Duration::ZERO, BUDGET));
    assert_adds_up(&report);
}

#[tokio::test(start_paused = true)]
async fn a_server_that_ends_by_itself_starts_the_shutdown_and_its_error_comes_with_the_report() {
    let tasks = TaskRegistry::new();
    let start = || tasks.spawn("task", sleep(secs(3))).unwrap();
    start();
    let ended = Shutdown::new(BUDGET).without_signals().settle(secs(5)).tasks(&tasks);
    let report = ended.run(ready(Ok::<_, io::Error>(()))).await.unwrap();
    assert_eq!(report.took, secs(3), "no load balancer is waited for");
    assert_eq!(report.drained.completed, 1);

    let tasks = TaskRegistry::new();
    tasks.spawn("task", sleep(secs(3))).unwrap();
    let failed = shutdown().tasks(&tasks);
    let error = failed.run(ready(Err::<(), _>(io::Error::other("no port")))).await.unwrap_err();
    let RunError::Server { report, .. } = &error else { panic!("{error}") };
    assert_eq!((report.took, report.drained.completed), (secs(3), 1));
    assert!(error.to_string().contains("1 completed"), "{error}");
    assert!(!error.to_string().contains("no port"), "it is the source: {error}");
    assert_eq!(error.source().unwrap().to_string(), "no port");
}

#[tokio::test(start_paused = true)]
async fn a_plan_that_cannot_fit_is_an_error_before_anything_is_served() {
    for unfit in [
        Shutdown::new(secs(5)).settle(secs(6)),
        Shutdown::new(secs(5)).settle(secs(3)).grace(secs(3)),
        Shutdown::new(secs(5)).settle(Duration::MAX).grace(Duration::MAX),
    ] {
        let error = unfit.check().unwrap_err();
        let served = AtomicBool::new(false);
        let server = async {
            served.store(true, SeqCst);
            Ok::<_, Infallible>(())
        };
        let failed = unfit.run(server).await.unwrap_err();
        assert_eq!(failed.source().unwrap().to_string(), error.to_string());
        match failed {
            RunError::Plan(found) => assert_eq!(found, error),
            other => panic!("{other}"),
        }
        assert!(!served.into_inner());
    }
    Shutdown::new(secs(5)).settle(secs(3)).grace(secs(2)).check().unwrap();
}

#[tokio::test(start_paused = true)]
async fn readiness_is_gone_first_and_the_server_serves_on_for_the_settle_delay() {
    let shutdown = shutdown().settle(secs(5));
    let watch = shutdown.watch();
    let start = Instant::now();
    let mut run = pin!(shutdown.run(server(&shutdown)));
    assert!(poll_once(run.as_mut()).is_pending());
    assert!(watch.is_ready() && !watch.is_draining());
    shutdown.begin();
    assert!(!watch.is_ready() && !watch.is_draining());
    let mut service =
        shutdown.layer().layer(service_fn(|_: Request<()>| ready(Reply::Ok(Response::default()))));
    let mut draining = pin!(watch.draining());
    assert!(poll_once(draining.as_mut()).is_pending());
    let served = service.ready().await.unwrap().call(Request::new(())).await.unwrap();
    assert_eq!(served.status(), 200);
    assert!(!served.headers().contains_key(header::CONNECTION), "others are welcome still");
    drop(served);
    let report = run.await.unwrap();
    assert_eq!((start.elapsed(), report.took), (secs(5), secs(5)));
    draining.await;
    assert!(watch.is_draining() && watch.token().is_cancelled());
    assert_eq!((report.requests.later, report.requests.completed), (1, 1));
}

#[tokio::test(start_paused = true)]
async fn requests_then_their_tasks_then_kept_ones_have_all_of_the_budget() {
    let tasks = TaskRegistry::new();
    let shutdown = shutdown().tasks(&tasks);
    let service = ServiceBuilder::new()
        .layer(shutdown.layer())
        .layer(TaskSetLayer::new(&tasks))
        .service(service_fn(|_: Request<()>| async {
            sleep(secs(10)).await;
            // In flight: it may still spawn, and so may its task.
            let set = TaskSet::current().unwrap();
            let child = set.clone();
            set.spawn("task", async move {
                sleep(secs(5)).await;
                child.spawn("child", sleep(secs(5))).map(drop).map_err(|refused| refused.reason)
            })
            .unwrap();
            Reply::Ok(Response::default())
        }));
    tasks.spawn("kept", sleep(secs(23))).unwrap();
    let request = tokio::spawn(async move {
        let response = service.oneshot(Request::new(())).await.unwrap();
        (response.status(), response.into_body().collect().await.is_ok())
    });
    settle().await;
    let start = Instant::now();
    shutdown.begin();
    let report = shutdown.run(server(&shutdown)).await.unwrap();
    assert_eq!(start.elapsed(), secs(23));
    assert_eq!(request.await.unwrap(), (StatusCode::OK, true));
    assert_eq!(report.drained, {
        let mut expected = Drained::default();
        (expected.at_begin, expected.spawned, expected.completed) = (1, 2, 3);
        expected
    });
    assert_eq!(report.requests, {
        let mut expected = Requests::default();
        (expected.at_begin, expected.completed) = (1, 1);
        expected
    });
    assert_adds_up(&report);
    assert_eq!(tasks.spawn("late", async {}).unwrap_err().reason, SpawnError::Closed);
}

#[tokio::test(start_paused = true)]
async fn what_does_not_come_to_its_end_is_cancelled_before_the_deadline_and_aborted_at_it() {
    let tasks = TaskRegistry::new();
    let shutdown = shutdown().tasks(&tasks).grace(secs(4));
    let line = line!() + 1;
    let cancelled = tasks.spawn("cancelled", pending::<()>()).unwrap();
    let graceful = tasks.spawn_graceful("graceful", async |stop| {
        stop.cancelled().await;
        sleep(secs(3)).await;
        Instant::now()
    });
    tasks
        .task("goes on")
        .grace(secs(3600))
        .spawn_graceful(async |_| pending::<()>().await)
        .unwrap();
    let start = Instant::now();
    let report = shutdown.finish().await;
    assert_eq!(graceful.unwrap().await.unwrap() - start, secs(24));
    assert!(cancelled.await.is_err());
    assert_eq!((start.elapsed(), report.took), (BUDGET, BUDGET));
    let mut forced = report_of(&report);
    forced.sort_unstable_by_key(|(what, name, _)| (*what, *name));
    assert_eq!(
        forced,
        [
            (Kind::Task, "cancelled", Some(Outcome::Cancelled)),
            (Kind::Task, "goes on", Some(Outcome::Aborted)),
        ]
    );
    let named = report.forced().iter().find(|it| it.name == "cancelled").unwrap();
    assert_eq!((named.site.unwrap().line(), named.age), (line, secs(21)));
    assert_eq!((report.exit_code(), report.drained.completed), (1, 1));
    assert_adds_up(&report);
}

#[tokio::test(start_paused = true)]
async fn a_budget_of_zero_ends_all_at_once_and_destructors_run() {
    struct OnDrop(Arc<AtomicBool>);
    impl Drop for OnDrop {
        fn drop(&mut self) {
            self.0.store(true, SeqCst);
        }
    }
    let tasks = TaskRegistry::new();
    let shutdown = Shutdown::new(Duration::ZERO).without_signals().tasks(&tasks);
    let dropped = Arc::new(AtomicBool::new(false));
    let on_drop = OnDrop(dropped.clone());
    let task = async move {
        let _on_drop = on_drop;
        pending::<()>().await;
    };
    tasks.spawn("task", task).unwrap();
    tasks.spawn_graceful("graceful", async |_| pending::<()>().await).unwrap();
    let request = tokio::spawn(stuck_request(&shutdown.layer()));
    settle().await;
    let start = Instant::now();
    shutdown.begin();
    let report = shutdown.run(server(&shutdown)).await.unwrap();
    assert_eq!(start.elapsed(), Duration::ZERO, "nothing is waited for that does as it is told");
    assert!(dropped.load(SeqCst));
    assert_eq!(request.await.unwrap().unwrap().status(), StatusCode::SERVICE_UNAVAILABLE);
    assert_eq!(report.forced().len(), 3);
    assert_adds_up(&report);
}

#[tokio::test(start_paused = true)]
async fn a_server_that_does_not_end_is_dropped_when_the_budget_is_spent() {
    let shutdown = shutdown();
    let dropped = Arc::new(());
    let held = dropped.clone();
    let server = async move {
        let end = pending::<Result<(), Infallible>>().await;
        drop(held);
        end
    };
    let start = Instant::now();
    shutdown.begin();
    let report = shutdown.run(server).await.unwrap();
    assert_eq!(start.elapsed(), BUDGET + Duration::from_millis(100));
    assert_eq!(Arc::strong_count(&dropped), 1);
    assert!(!report.server_ended);
    assert!(report.to_string().contains("connections left"), "{report}");
    assert_eq!((report.forced().len(), report.exit_code()), (0, 0), "nobody waited for anything");
}

#[tokio::test(start_paused = true)]
async fn a_budget_without_an_end_waits_as_long_as_it_takes() {
    let tasks = TaskRegistry::new();
    let shutdown = Shutdown::new(Duration::MAX).without_signals().tasks(&tasks);
    let year = secs(365 * 24 * 3600);
    tasks
        .spawn("task", async move {
            let end = Instant::now() + year;
            while Instant::now() < end {
                advance(secs(24 * 3600)).await;
            }
        })
        .unwrap();
    let report = shutdown.finish().await;
    assert!(report.took >= year);
    assert!(report.to_string().contains("all the time"), "{report}");
    assert_eq!(report.exit_code(), 0);
}

#[tokio::test(start_paused = true)]
async fn several_registries_share_the_budget_and_each_is_counted_once() {
    let [one, other] = [TaskRegistry::new(), TaskRegistry::new()];
    let shutdown = shutdown().tasks(&one).tasks(&other).tasks(&one.clone());
    one.spawn("one", sleep(secs(10))).unwrap();
    other.spawn("other", sleep(secs(20))).unwrap();
    other.spawn("stays", pending::<()>()).unwrap();
    let report = shutdown.finish().await;
    assert_eq!(report.took, secs(24));
    assert_eq!((report.tasks.spawned, report.drained.at_begin), (3, 3));
    assert_eq!(report_of(&report), [(Kind::Task, "stays", Some(Outcome::Cancelled))]);
    assert!(one.is_closed() && other.is_closed());
}

#[tokio::test(start_paused = true)]
async fn it_can_be_begun_and_finished_by_several_at_once_and_from_a_task_of_its_own() {
    let tasks = TaskRegistry::new();
    let shutdown = shutdown().tasks(&tasks);
    let own = shutdown.clone();
    // It waits for itself, until it is told to end.
    tasks.spawn("own", async move { own.finish().await }).unwrap();
    settle().await;
    let reports = [shutdown.clone(), shutdown.clone()]
        .map(|shutdown| tokio::spawn(async move { shutdown.finish().await }));
    shutdown.begin();
    for report in reports {
        let report = report.await.unwrap();
        assert_eq!(report.took, secs(24));
        assert_eq!(report_of(&report), [(Kind::Task, "own", Some(Outcome::Cancelled))]);
    }
    // And when all is over.
    assert_eq!(shutdown.finish().await.forced().len(), 1);
}

#[tokio::test(start_paused = true)]
async fn a_waker_that_panics_stops_nothing() {
    let waker = panicking_waker();
    let cx = &mut Context::from_waker(&waker);
    let tasks = TaskRegistry::new();
    let shutdown = shutdown().tasks(&tasks);
    let watch = shutdown.watch();
    let (mut signalled, mut draining) = (pin!(shutdown.signalled()), pin!(watch.draining()));
    assert!(signalled.as_mut().poll(cx).is_pending());
    assert!(draining.as_mut().poll(cx).is_pending());
    let mut stuck = pin!(stuck_request(&shutdown.layer()));
    assert!(stuck.as_mut().poll(cx).is_pending());
    let answered = tokio::spawn(stuck_request(&shutdown.layer()));
    settle().await;

    shutdown.begin();
    let report = shutdown.finish().await;
    assert_eq!((report.requests.at_begin, report.requests.ended), (2, 1), "{report}");
    assert_eq!(answered.await.unwrap().unwrap().status(), StatusCode::SERVICE_UNAVAILABLE);
    assert!(poll_once(signalled).is_ready() && poll_once(draining).is_ready());
}

#[tokio::test(start_paused = true)]
async fn a_waker_that_panics_takes_nothing_from_those_behind_it() {
    let waker = panicking_waker();
    let cx = &mut Context::from_waker(&waker);
    let shutdown = shutdown().settle(secs(1));
    let watch = shutdown.watch();
    let wait = || {
        let (watch, shutdown) = (watch.clone(), shutdown.clone());
        [
            tokio::spawn(async move { watch.draining().await }),
            tokio::spawn(shutdown.signalled()),
            tokio::spawn(async move { drop(shutdown.run(server(&shutdown)).await.unwrap()) }),
        ]
    };
    let mut waiting: Vec<_> = (0..10).flat_map(|_| wait()).collect();
    settle().await;
    let mut draining = pin!(watch.draining());
    assert!(draining.as_mut().poll(cx).is_pending());
    let mut signalled = pin!(shutdown.signalled());
    assert!(signalled.as_mut().poll(cx).is_pending());
    let mut run = Box::pin(shutdown.run(pending::<Result<(), Infallible>>()));
    assert!(run.as_mut().poll(cx).is_pending());
    waiting.extend((0..20).flat_map(|_| wait()));
    settle().await;
    shutdown.begin();
    sleep(secs(2)).await;
    // Its server is not waited for any more.
    drop(run);
    for task in waiting {
        task.await.unwrap();
    }
}

#[tokio::test(start_paused = true)]
async fn what_is_ended_is_forced_though_its_destructor_panics() {
    struct Panics;
    impl Drop for Panics {
        fn drop(&mut self) {
            panic!("while it is dropped");
        }
    }
    struct Stuck {
        _panics: Panics,
    }
    impl Body for Stuck {
        type Data = Bytes;
        type Error = Infallible;
        fn poll_frame(
            self: Pin<&mut Self>,
            _: &mut Context<'_>,
        ) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
            Poll::Pending
        }
    }
    let tasks = TaskRegistry::new();
    let shutdown = shutdown().tasks(&tasks);
    let call = shutdown.layer().layer(service_fn(|_: Request<()>| async {
        let _panics = Panics;
        pending::<Reply>().await
    }));
    let body = shutdown.layer().layer(service_fn(|_: Request<()>| {
        let panics = Panics;
        let body = Stuck { _panics: panics };
        ready(Ok::<_, Infallible>(Response::new(body)))
    }));
    let plain = shutdown.layer().plain().layer(service_fn(|(): ()| async {
        let _panics = Panics;
        pending::<Result<(), Infallible>>().await
    }));
    let call = tokio::spawn(call.oneshot(Request::new(())));
    let body =
        tokio::spawn(async { body.oneshot(Request::new(())).await.unwrap().collect().await });
    let plain = tokio::spawn(plain.oneshot(()));
    let panics = Panics;
    tasks
        .spawn("task", async move {
            let _panics = panics;
            pending::<()>().await;
        })
        .unwrap();
    settle().await;
    let report = shutdown.finish().await;
    assert!(call.await.is_err() && body.await.is_err() && plain.await.is_err());
    assert_eq!((report.requests.ended, report.requests.completed), (3, 0), "{report}");
    assert_eq!((report.forced().len(), report.exit_code()), (4, 1), "{report}");
    assert!(report.forced().iter().all(|it| it.outcome == Some(Outcome::Panicked)), "{report}");
    assert_adds_up(&report);
}

#[tokio::test(start_paused = true)]
async fn a_registry_that_comes_late_is_told_all_that_the_others_were() {
    // In the drain, in the cancel phase, and when all is over.
    for (after, forced) in [(secs(10), 1), (secs(22), 1), (secs(26), 0)] {
        let (first, late) = (TaskRegistry::new(), TaskRegistry::new());
        let shutdown = shutdown().grace(secs(5)).tasks(&first);
        let obeys = first.task("obeys").grace(secs(60)).spawn_graceful(|stop| async move {
            stop.cancelled().await;
            sleep(secs(3)).await;
        });
        late.spawn("late", pending::<()>()).unwrap();
        let add = async {
            sleep(after).await;
            drop(shutdown.clone().tasks(&late));
        };
        let (report, ()) = tokio::join!(shutdown.finish(), add);
        assert_eq!(report.forced().len(), forced, "{report}");
        assert_adds_up(&report);
        obeys.unwrap().await.unwrap();
        assert!(late.is_closed());
        assert_eq!(late.len(), 1 - forced);
        assert_eq!(late.spawn("later", async {}).unwrap_err().reason, SpawnError::Closed);
    }
}

#[tokio::test(start_paused = true)]
async fn a_registry_that_comes_when_all_is_over_or_aborted_is_so_too() {
    let shutdown_one = shutdown();
    let report = shutdown_one.finish().await;
    assert_eq!((report.took, report.exit_code()), (Duration::ZERO, 0));
    let late = TaskRegistry::new();
    drop(shutdown_one.tasks(&late));
    assert!(late.is_closed() && late.is_empty());

    let (first, late) = (TaskRegistry::new(), TaskRegistry::new());
    let shutdown = shutdown().grace(secs(5)).tasks(&first);
    // Held, so that it goes on for 100 ms after the deadline.
    let mut stuck = pin!(stuck_request(&shutdown.layer()));
    assert!(poll_once(stuck.as_mut()).is_pending());
    let graceful = late.task("graceful").grace(secs(60)).spawn_graceful(|_| pending::<()>());
    settle().await;
    let add = async {
        sleep(secs(25) + Duration::from_millis(50)).await;
        drop(shutdown.clone().tasks(&late));
    };
    let (report, ()) = tokio::join!(shutdown.finish(), add);
    assert_eq!(report.requests.left, 1, "{report}");
    assert!(matches!(graceful.unwrap().await, Err(tower_task_set::TaskError::Aborted(_))));
    assert!(report_of(&report).contains(&(Kind::Task, "graceful", Some(Outcome::Aborted))));
}

#[tokio::test(start_paused = true)]
async fn a_finish_waits_for_no_server_that_is_run() {
    let shutdown = shutdown().settle(secs(5));
    let inside = shutdown.run(async {
        shutdown.signalled().await;
        let report = shutdown.finish().await;
        assert_eq!(report.took, secs(5));
        Ok::<(), Infallible>(())
    });
    shutdown.begin();
    assert_eq!(inside.await.unwrap().took, secs(5));

    let shutdown = shutdown_of(BUDGET).settle(secs(5));
    let run = shutdown.run(async {
        shutdown.signalled().await;
        sleep(secs(10)).await;
        Ok::<(), Infallible>(())
    });
    let finish = async { shutdown.finish().await.took };
    let (run, finish) = tokio::join!(run, finish);
    assert_eq!((run.unwrap().took, finish), (secs(10), Duration::ZERO));
}

#[tokio::test(start_paused = true)]
async fn of_several_servers_each_has_its_own_end() {
    let shutdown = shutdown();
    let run = |ends: Option<Result<(), io::Error>>| {
        let shutdown = shutdown.clone();
        tokio::spawn(async move {
            let server = async {
                shutdown.signalled().await;
                match ends {
                    Some(result) => result,
                    None => pending().await,
                }
            };
            shutdown.run(server).await
        })
    };
    let given_up = run(None);
    let fails = run(Some(Err(io::Error::other("it fails"))));
    let ends = run(Some(Ok(())));
    let stays = run(None);
    settle().await;
    let start = Instant::now();
    shutdown.begin();
    sleep(secs(1)).await;
    given_up.abort();
    let (fails, ends, stays) = (fails.await.unwrap(), ends.await.unwrap(), stays.await.unwrap());
    assert_eq!(start.elapsed(), BUDGET + Duration::from_millis(100), "one does not end");
    assert!(matches!(fails, Err(RunError::Server { .. })), "{fails:?}");
    assert!(ends.unwrap().server_ended && !stays.unwrap().server_ended);
}

#[tokio::test(start_paused = true)]
async fn several_servers_are_served_until_the_last_has_ended() {
    let shutdown = shutdown().settle(secs(2));
    let tasks = TaskRegistry::new();
    let shutdown = shutdown.tasks(&tasks);
    let start = Instant::now();
    let first = shutdown.run(async {
        sleep(secs(1)).await;
        Ok::<(), Infallible>(())
    });
    let second = async {
        shutdown.signalled().await;
        assert_eq!(start.elapsed(), secs(1) + secs(2), "it had its settle delay");
        sleep(secs(3)).await;
        let answer = service_fn(|_: Request<()>| async { Reply::Ok(Response::default()) });
        let late = shutdown.layer().layer(answer).oneshot(Request::new(())).await.unwrap();
        assert_eq!(late.status(), StatusCode::OK, "it is served");
        late.into_body().collect().await.unwrap();
        Ok::<(), Infallible>(())
    };
    let (first, second) = tokio::join!(first, shutdown.run(second));
    for report in [first.unwrap(), second.unwrap()] {
        assert_eq!((report.took, report.requests.refused), (secs(5), 0), "{report}");
        assert_eq!((report.requests.later, report.requests.completed), (1, 1), "{report}");
        assert!(report.server_ended);
    }
}

#[tokio::test(start_paused = true)]
async fn a_finish_that_was_given_up_goes_on_where_the_time_is() {
    let tasks = TaskRegistry::new();
    let shutdown = shutdown().tasks(&tasks);
    tasks.spawn("task", pending::<()>()).unwrap();
    let given_up = tokio::time::timeout(secs(10), shutdown.finish()).await;
    assert!(given_up.is_err());
    sleep(secs(4)).await;
    let start = Instant::now();
    let report = shutdown.finish().await;
    assert_eq!((start.elapsed(), report.took), (secs(10), secs(24)));
}

#[tokio::test(start_paused = true)]
async fn a_destructor_may_begin_it_though_it_has_begun() {
    struct Begins(Shutdown);
    impl Drop for Begins {
        fn drop(&mut self) {
            self.0.begin();
        }
    }
    let tasks = TaskRegistry::new();
    let shutdown = shutdown().tasks(&tasks);
    drop(Begins(shutdown.clone()));
    assert!(!shutdown.watch().is_ready());
    let begins = Begins(shutdown.clone());
    let task = async move {
        let _begins = begins;
        pending::<()>().await;
    };
    tasks.spawn("begins", task).unwrap();
    let report = shutdown.finish().await;
    assert_eq!((report.took, report.drained.cancelled), (secs(24), 1));
}

#[test]
fn a_runtime_that_goes_in_the_drain_takes_its_tasks_along_and_another_one_finishes_it() {
    let runtime = || tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let tasks = TaskRegistry::new();
    let shutdown = Shutdown::new(Duration::MAX).without_signals().tasks(&tasks);
    let first = runtime();
    let finish = first.spawn({
        let shutdown = shutdown.clone();
        async move { shutdown.finish().await }
    });
    first.block_on(async {
        tasks.spawn("gone", pending::<()>()).unwrap();
        shutdown.watch().draining().await;
    });
    drop(first);
    assert!(finish.is_finished());
    let report = runtime().block_on(shutdown.finish());
    assert_eq!((report.drained.aborted, report.drained.left), (1, 0));
    assert_eq!(report.exit_code(), 0, "the shutdown has not done that");
    assert_adds_up(&report);
}

#[tokio::test(start_paused = true)]
async fn requests_and_tasks_that_become_fewer_have_another_while() {
    let tasks = TaskRegistry::new();
    let shutdown = Shutdown::new(Duration::ZERO).without_signals().tasks(&tasks);
    let layer = shutdown.layer();
    // Not spawned: each is polled, and so ended, when the test says so.
    let mut requests: Vec<_> = (0..8).map(|_| Box::pin(stuck_request(&layer))).collect();
    for request in &mut requests {
        assert!(poll_once(request.as_mut()).is_pending());
    }
    let mut finish = pin!(shutdown.finish());
    assert!(poll_once(finish.as_mut()).is_pending());
    let each = Duration::from_millis(20);
    while let Some(mut request) = requests.pop() {
        advance(each).await;
        assert!(poll_once(finish.as_mut()).is_pending(), "{} are left", requests.len() + 1);
        drop(poll_once(request.as_mut()));
    }
    let report = finish.await;
    assert_eq!((report.requests.ended, report.requests.left), (8, 0), "{report}");
    assert_eq!(report.took, each * 8);
    assert_adds_up(&report);
}

#[tokio::test(start_paused = true)]
async fn a_registry_that_is_added_during_the_drain_is_drained_and_waited_for() {
    let [early, late] = [TaskRegistry::new(), TaskRegistry::new()];
    let shutdown = shutdown().tasks(&early);
    early.spawn("early", sleep(secs(2))).unwrap();
    let finish = tokio::spawn({
        let shutdown = shutdown.clone();
        async move { shutdown.finish().await }
    });
    sleep(secs(1)).await;
    late.spawn("late", sleep(secs(4))).unwrap();
    drop(shutdown.tasks(&late));
    assert_eq!(late.spawn("too late", async {}).unwrap_err().reason, SpawnError::Closed);
    let report = finish.await.unwrap();
    assert_eq!((report.took, report.drained.completed), (secs(5), 2), "{report}");
    assert!(late.is_closed() && report.exit_code() == 0);
}

#[tokio::test]
async fn the_tasks_of_a_request_that_is_ended_have_ended_for_the_shutdown() {
    use tower_task_set::{AtEnd, Cause, TaskError};

    let tasks = TaskRegistry::new();
    let budget = Duration::from_millis(1);
    let shutdown = Shutdown::new(budget).without_signals().tasks(&tasks);
    let (tell, mut handles) = tokio::sync::mpsc::unbounded_channel();
    let layers = ServiceBuilder::new().layer(shutdown.layer()).layer(TaskSetLayer::new(&tasks));
    let mut requests = Vec::new();
    for _ in 0..100 {
        let tell = tell.clone();
        let mut service = layers.service(service_fn(move |_: Request<()>| {
            let set = TaskSet::current().unwrap();
            let task = set.task("task").at_end(AtEnd::Cancel);
            tell.send(task.spawn(pending::<()>()).unwrap()).unwrap();
            pending::<Reply>()
        }));
        requests.push(tokio::spawn(service.call(Request::new(()))));
    }
    settle().await;
    let report = shutdown.finish().await;
    for request in requests {
        assert_eq!(request.await.unwrap().unwrap().status(), StatusCode::SERVICE_UNAVAILABLE);
    }
    for _ in 0..100 {
        let ended = handles.recv().await.unwrap().await.unwrap_err();
        assert!(matches!(ended, TaskError::Cancelled(Cause::Shutdown)), "{ended:?}");
    }
    assert_eq!((report.requests.ended, report.drained.cancelled), (100, 100), "{report}");
    assert_eq!(report.forced().len(), 200, "{report}");
    assert_adds_up(&report);
}

#[test]
fn begin_works_outside_of_a_runtime_and_nothing_happens_on_drop() {
    let tasks = TaskRegistry::new();
    let shutdown = shutdown().tasks(&tasks);
    let watch = shutdown.watch();
    drop((shutdown.clone(), shutdown.layer(), shutdown.signalled()));
    assert!(watch.is_ready() && !tasks.is_closed());
    shutdown.begin();
    assert!(!watch.is_ready() && !tasks.is_closed());
    drop(shutdown);
    assert!(!watch.is_draining(), "there is nobody to drive it");
}

#[test]
fn without_a_time_driver_its_own_thread_keeps_the_time() {
    let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
    let tasks = TaskRegistry::new();
    let budget = Duration::from_millis(100);
    let shutdown = Shutdown::new(budget).without_signals().tasks(&tasks);
    runtime.block_on(async {
        tasks.spawn("task", pending::<()>()).unwrap();
        shutdown.begin();
        let report = shutdown.run(server(&shutdown)).await.unwrap();
        assert!(report.took >= budget * 4 / 5, "{report}");
        assert_eq!(report.forced().len(), 1);
    });
}

#[test]
fn on_a_runtime_that_was_shut_down_its_own_thread_keeps_the_time() {
    for polled_before in [true, false] {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
        let handle = runtime.handle().clone();
        let tasks = TaskRegistry::new();
        let budget = Duration::from_millis(100);
        let shutdown = Shutdown::new(budget).settle(budget / 2).without_signals().tasks(&tasks);
        let lives = tokio::runtime::Builder::new_current_thread().build().unwrap();
        lives.block_on(async { tasks.spawn("task", pending::<()>()).map(drop).unwrap() });
        let mut run = pin!(shutdown.run(server(&shutdown)));
        shutdown.begin();
        if polled_before {
            let _here = handle.enter();
            assert!(poll_once(run.as_mut()).is_pending());
        }
        drop(runtime);
        let dead = handle.enter();
        assert!(poll_once(run.as_mut()).is_pending());
        drop(dead);
        let report = lives.block_on(run).unwrap();
        assert!(report.took >= budget * 4 / 5, "{report}");
        assert_eq!(report.forced().len(), 1);
    }
}

#[test]
fn without_a_time_driver_nothing_panics_unless_there_is_something_to_wait_for() {
    thread_local! {
        static SEEN: Cell<usize> = const { Cell::new(0) };
    }
    let hook = panic::take_hook();
    panic::set_hook(Box::new(move |info| {
        SEEN.set(SEEN.get() + 1);
        hook(info);
    }));
    let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
    let shutdown = shutdown();
    runtime.block_on(async {
        shutdown.begin();
        shutdown.run(server(&shutdown)).await.unwrap();
    });
    assert_eq!(SEEN.get(), 0);

    let tasks = TaskRegistry::new();
    let shutdown = Shutdown::new(Duration::ZERO).without_signals().tasks(&tasks);
    runtime.block_on(async {
        tasks.spawn("task", pending::<()>()).unwrap();
        shutdown.finish().await;
    });
    assert_eq!(SEEN.get(), 1, "as it is documented");
}

#[tokio::test(start_paused = true)]
async fn a_subscriber_that_panics_stops_nothing() {
    use tracing_subscriber::{
        Layer, layer::Context, layer::SubscriberExt, util::SubscriberInitExt,
    };

    struct Panics;
    impl<S: tracing::Subscriber> Layer<S> for Panics {
        fn on_event(&self, event: &tracing::Event<'_>, _: Context<'_, S>) {
            assert!(!event.metadata().target().starts_with("tower_shutdown"), "a subscriber");
        }
    }
    let _default = tracing_subscriber::registry().with(Panics).set_default();
    let tasks = TaskRegistry::new();
    let shutdown = shutdown().tasks(&tasks);
    tasks.spawn("task", sleep(secs(5))).unwrap();
    let mut run = pin!(shutdown.run(server(&shutdown)));
    assert!(poll_once(run.as_mut()).is_pending());
    shutdown.begin();
    // With its lines of progress.
    let report = run.await.unwrap();
    assert_eq!((report.took, report.drained.completed), (secs(5), 1));
}

#[test]
fn nothing_is_locked_while_it_is_shown() {
    /// Asks for more of the same, as a formatter of others may.
    struct Nested<'a>(&'a Shutdown, usize);
    impl fmt::Write for Nested<'_> {
        fn write_str(&mut self, text: &str) -> fmt::Result {
            self.1 += text.len();
            assert_eq!(self.0.check(), Ok(()));
            Ok(())
        }
    }
    let shutdown = shutdown();
    let mut nested = Nested(&shutdown, 0);
    fmt::write(&mut nested, format_args!("{shutdown:?}")).unwrap();
    assert!(nested.1 > 0);
}

// Requests

#[tokio::test(start_paused = true)]
async fn a_late_request_is_served_and_told_to_close_or_refused_if_so_chosen() {
    for refuse in [false, true] {
        let mut shutdown = shutdown();
        if refuse {
            shutdown = shutdown.refuse_late();
        }
        let stay = Arc::new(Notify::new());
        let leave = stay.clone();
        let server = {
            let signalled = shutdown.signalled();
            async move {
                signalled.await;
                leave.notified().await;
                Ok::<_, Infallible>(())
            }
        };
        let handled = Arc::new(AtomicBool::new(false));
        let handler = handled.clone();
        let mut service = shutdown.layer().layer(service_fn(move |_: Request<()>| {
            handler.store(true, SeqCst);
            ready(Reply::Ok(Response::default()))
        }));
        shutdown.begin();
        let mut run = pin!(shutdown.run(server));
        assert!(poll_once(run.as_mut()).is_pending());

        for (version, content_type) in [
            (Version::HTTP_10, "text/plain"),
            (Version::HTTP_11, "text/plain"),
            (Version::HTTP_2, "text/plain"),
            (Version::HTTP_2, "application/grpc"),
        ] {
            let request = Request::post("/").version(version);
            let request = request.header(header::CONTENT_TYPE, content_type).body(()).unwrap();
            assert!(matches!(
                service.poll_ready(&mut Context::from_waker(Waker::noop())),
                Poll::Ready(Ok(()))
            ));
            let response = service.call(request).await.unwrap();
            let is_grpc = content_type == "application/grpc";
            let expected = if refuse && !is_grpc { 503 } else { 200 };
            assert_eq!(response.status(), expected, "{version:?} {content_type}");
            let grpc_status = response.headers().get("grpc-status").map(|it| it.to_str().unwrap());
            assert_eq!(grpc_status, (refuse && is_grpc).then_some("14"));
            let closes = response.headers().get(header::CONNECTION).is_some_and(|it| it == "close");
            assert_eq!(closes, version < Version::HTTP_2);
            assert_eq!(handled.swap(false, SeqCst), !refuse);
            response.into_body().collect().await.unwrap();
        }

        // Not any more when the server has ended.
        stay.notify_one();
        let report = run.await.unwrap();
        assert_eq!(service.call(Request::new(())).await.unwrap().status(), 503);
        let (served, refused) = if refuse { (0, 4) } else { (4, 0) };
        assert_eq!((report.requests.later, report.requests.refused), (served, refused));
        assert_eq!(report.exit_code(), 0);
        assert_adds_up(&report);
    }
}

#[tokio::test(start_paused = true)]
async fn what_is_left_is_named_by_its_route_with_its_age_and_its_trace_id() {
    #[derive(Clone)]
    struct Matched(&'static str);

    let shutdown = Shutdown::new(Duration::ZERO).without_signals();
    let layer = shutdown.layer().route(|request| {
        assert_ne!(request.uri.path(), "/panics", "as it should");
        Some(request.extensions.get::<Matched>()?.0.into())
    });
    // Nobody polls it again, as a server does whose client reads too slowly.
    let mut bodies = Vec::new();
    let mut trace_ids = Vec::new();
    for (id, path, matched) in
        [(1, "/orders/7", Some("/orders/{id}")), (2, "/panics", None), (3, "/lost", None)]
    {
        let trace_id = TraceId::from_bytes([id; 16]).unwrap();
        let context = RequestContext::new().with(trace_id);
        let mut request = Request::get(path).body(()).unwrap();
        if let Some(matched) = matched {
            request.extensions_mut().insert(Matched(matched));
        }
        let mut service = layer.layer(service_fn(|_: Request<()>| {
            ready(Ok::<_, Infallible>(Response::new(endless())))
        }));
        bodies.push(context.scope(async move { service.call(request).await.unwrap() }).await);
        trace_ids.push(Some(trace_id));
        advance(secs(1)).await;
    }
    let report = shutdown.finish().await;
    assert_eq!((report.requests.left, report.exit_code()), (3, 1));
    assert_adds_up(&report);
    let mut left: Vec<_> =
        report.forced().iter().map(|it| (it.trace_id, &*it.name, it.age.as_secs())).collect();
    left.sort_unstable();
    assert_eq!(
        left,
        [(trace_ids[0], "GET /orders/{id}", 3), (trace_ids[1], "GET", 2), (trace_ids[2], "GET", 1),]
    );
    let text = report.to_string();
    let named = "1 x request GET /orders/{id} (still running, up to 3100 ms old, trace 0101";
    assert!(text.contains(named), "{text}");
    assert!(
        text.contains("2 x request GET (still running, up to 2100 ms old, trace 0202"),
        "{text}"
    );
    assert!(!text.contains("orders/7") && !text.contains("lost"), "{text}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_handler_that_never_yields_is_named() {
    let shutdown = Shutdown::new(Duration::ZERO).without_signals();
    let (entered, has_entered) = std::sync::mpsc::channel();
    let (leave, left) = std::sync::mpsc::channel::<()>();
    let mut service = {
        let slot = std::sync::Mutex::new(Some((entered, left)));
        shutdown.layer().layer(service_fn(move |_: Request<()>| {
            let (entered, left) = slot.lock().unwrap().take().unwrap();
            async move {
                entered.send(()).unwrap();
                let _ = left.recv();
                Reply::Ok(Response::default())
            }
        }))
    };
    let trace_id = TraceId::from_bytes([7; 16]).unwrap();
    let started = Instant::now();
    let request = RequestContext::new()
        .with(trace_id)
        .sync_scope(|| service.call(Request::post("/stuck").body(()).unwrap()));
    let request = tokio::spawn(request);
    has_entered.recv().unwrap();
    let report = shutdown.finish().await;
    assert_eq!(report_of(&report), [(Kind::Request, "POST", None)]);
    let stuck = &report.forced()[0];
    assert_eq!(stuck.trace_id, Some(trace_id));
    assert!(stuck.age >= report.took && stuck.age <= started.elapsed(), "{stuck:?}");
    assert_adds_up(&report);
    drop(leave);
    request.await.unwrap().unwrap();
}

#[tokio::test(start_paused = true)]
async fn the_end_of_the_connection_is_added_to_what_the_response_says_of_it() {
    let shutdown = shutdown();
    shutdown.begin();
    let mut run = pin!(shutdown.run(pending::<Result<(), Infallible>>()));
    assert!(poll_once(run.as_mut()).is_pending());
    assert!(shutdown.watch().is_draining());
    let answer = async |method: Method, status: StatusCode, fill: bool| {
        let mut service = shutdown.layer().layer(service_fn(move |_: Request<()>| {
            let mut response = Response::new(Full::<Bytes>::default());
            *response.status_mut() = status;
            let headers = response.headers_mut();
            headers.insert(header::CONNECTION, "x-hop".parse().unwrap());
            if fill {
                let name = |index: usize| format!("x-{index}").parse::<HeaderName>().unwrap();
                let fills = |index| headers.try_insert(name(index), "x".parse().unwrap()).is_err();
                (0..100_000).position(fills).unwrap();
                headers.remove(header::CONNECTION);
                headers.try_insert("x-last", "x".parse().unwrap()).unwrap();
            }
            ready(Reply::Ok(response))
        }));
        let request = Request::builder().method(method).uri("/").body(()).unwrap();
        let response = service.call(request).await.unwrap();
        let values = response.headers().get_all(header::CONNECTION).iter();
        values.map(|value| value.to_str().unwrap().to_owned()).collect::<Vec<_>>()
    };
    let (ok, switching) = (StatusCode::OK, StatusCode::SWITCHING_PROTOCOLS);
    let refused = StatusCode::FORBIDDEN;
    assert_eq!(answer(Method::GET, ok, false).await, ["x-hop", "close"]);
    assert_eq!(answer(Method::CONNECT, refused, false).await, ["x-hop", "close"]);
    assert_eq!(answer(Method::CONNECT, ok, false).await, ["x-hop"], "it is a tunnel now");
    assert_eq!(answer(Method::GET, switching, false).await, ["x-hop"]);
    assert!(answer(Method::GET, ok, true).await.is_empty(), "there is no place for it");
}

/// A body with a first frame, and no end.
struct Endless(Option<Bytes>);

impl Body for Endless {
    type Data = Bytes;
    type Error = io::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        _: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, io::Error>>> {
        match self.0.take() {
            Some(data) => Poll::Ready(Some(Ok(Frame::data(data)))),
            None => Poll::Pending,
        }
    }

    fn is_end_stream(&self) -> bool {
        false
    }

    fn size_hint(&self) -> SizeHint {
        SizeHint::default()
    }
}

fn endless() -> Endless {
    Endless(Some(Bytes::from_static(b"first")))
}

#[tokio::test(start_paused = true)]
async fn at_the_deadline_the_head_is_503_and_a_body_ends_in_an_error_or_in_trailers() {
    let shutdown = shutdown();
    let context =
        RequestContext::new().with("0af7651916cd43dd8448eb211c80319c".parse::<TraceId>().unwrap());
    let layer = shutdown.layer();
    let mut head = Box::pin(context.clone().sync_scope(|| stuck_request(&layer)));
    assert!(poll_once(head.as_mut()).is_pending());
    let body = |grpc: bool| {
        let mut service = layer.layer(service_fn(move |_: Request<()>| {
            let mut response = Response::new(endless());
            if grpc {
                let grpc = "application/grpc".parse().unwrap();
                response.headers_mut().insert(header::CONTENT_TYPE, grpc);
            }
            ready(Ok::<_, Infallible>(response))
        }));
        let mut request = Request::get("/feed?secret=1").body(()).unwrap();
        if grpc {
            request = Request::post("/feeds.Feeds/Watch?secret=1").body(()).unwrap();
            *request.version_mut() = Version::HTTP_2;
            request.headers_mut().insert(header::CONTENT_TYPE, "application/grpc".parse().unwrap());
        }
        async move {
            let mut body = service.call(request).await.unwrap().into_body();
            assert_eq!(body.frame().await.unwrap().unwrap().into_data().unwrap(), "first");
            body
        }
    };
    let (mut plain, mut grpc) = (body(false).await, body(true).await);
    let bodies = tokio::spawn(async move {
        let error = plain.frame().await.unwrap().unwrap_err();
        let trailers = grpc.frame().await.unwrap().unwrap().into_trailers().unwrap();
        let over = plain.frame().await.is_none() && grpc.frame().await.is_none();
        (error, trailers, over)
    });
    settle().await;
    let finish = tokio::spawn({
        let shutdown = shutdown.clone();
        async move { shutdown.finish().await }
    });
    let response = head.await.unwrap();
    assert_eq!(response.status(), StatusCode::SERVICE_UNAVAILABLE);
    assert_eq!(response.headers()[header::CONNECTION], "close");
    let (error, trailers, over) = bodies.await.unwrap();
    assert!(matches!(error, BodyError::Stopped(_)), "{error}");
    assert_eq!(trailers["grpc-status"], "14");
    assert!(over);

    let report = finish.await.unwrap();
    assert_eq!(report.took, secs(24));
    assert_eq!((report.requests.at_begin, report.requests.ended), (3, 3));
    let mut forced = report_of(&report);
    forced.sort_unstable_by_key(|(what, name, _)| (*what, *name));
    let cancelled = Some(Outcome::Cancelled);
    assert_eq!(
        forced,
        [
            (Kind::Request, "GET", cancelled),
            (Kind::Request, "GET", cancelled),
            (Kind::Request, "POST /feeds.Feeds/Watch", cancelled),
        ],
        "without the path of a request that is not gRPC, and without the query"
    );
    let head = report.forced().iter().find(|it| it.trace_id.is_some()).unwrap();
    assert_eq!(head.trace_id, context.get().copied());
    assert_eq!(head.age, secs(24));
    assert_adds_up(&report);
}

#[tokio::test(start_paused = true)]
async fn what_is_made_of_the_end_of_the_tasks_is_not_the_answer() {
    /// Ends when its task does, as if that were all.
    struct Fed(tower_task_set::TaskHandle<()>);
    impl Body for Fed {
        type Data = Bytes;
        type Error = Infallible;
        fn poll_frame(
            mut self: Pin<&mut Self>,
            cx: &mut Context<'_>,
        ) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
            Pin::new(&mut self.0).poll(cx).map(|_| None)
        }
    }
    let tasks = TaskRegistry::new();
    let shutdown = shutdown_of(secs(3)).tasks(&tasks);
    let layers = ServiceBuilder::new().layer(shutdown.layer()).layer(TaskSetLayer::new(&tasks));
    let start = || TaskSet::current().unwrap().spawn("feed", pending()).unwrap();
    let head = layers.clone().service_fn(|_: Request<()>| async {
        let outcome = start().await;
        assert!(outcome.is_err());
        Ok::<_, Infallible>(Response::new(Full::<Bytes>::default()))
    });
    let mut head = Box::pin(head.oneshot(Request::new(())));
    assert!(poll_once(head.as_mut()).is_pending());
    let body = layers
        .service_fn(|_: Request<()>| async { Ok::<_, Infallible>(Response::new(Fed(start()))) });
    let mut body = Box::pin(body.oneshot(Request::new(())).await.unwrap().into_body());
    assert!(poll_once(pin!(body.frame())).is_pending());

    let finish = tokio::spawn({
        let shutdown = shutdown.clone();
        async move { shutdown.finish().await }
    });
    settle().await;
    advance(secs(3)).await;
    settle().await;
    assert_eq!(tasks.len(), 0, "its tasks have ended before anybody polls it");
    assert_eq!(head.await.unwrap().status(), 503);
    assert!(matches!(body.frame().await, Some(Err(BodyError::Stopped(_)))));
    drop(body);
    let report = finish.await.unwrap();
    assert_eq!((report.requests.completed, report.requests.ended), (0, 2));
    let count = |kind| report.forced().iter().filter(|it| it.what == kind).count();
    assert_eq!((count(Kind::Request), count(Kind::Task)), (2, 2));
    assert_adds_up(&report);
}

#[tokio::test(start_paused = true)]
async fn of_what_is_ready_after_the_deadline_the_last_data_alone_are_passed_on() {
    let shutdown = Shutdown::new(Duration::ZERO).without_signals();
    let mut service = shutdown
        .layer()
        .layer(service_fn(|_: Request<()>| ready(Reply::Ok(Response::new("all".into())))));
    let head = service.call(Request::new(()));
    let mut body = service.call(Request::new(())).await.unwrap().into_body();
    let mut finish = pin!(shutdown.finish());
    assert!(poll_once(finish.as_mut()).is_pending());
    assert_eq!(head.await.unwrap().status(), 503);
    assert_eq!(body.frame().await.unwrap().unwrap().into_data().unwrap(), "all");
    drop(body);
    let report = finish.await;
    assert_eq!((report.requests.completed, report.requests.ended), (1, 1));
}

#[tokio::test(start_paused = true)]
async fn a_client_that_leaves_was_not_forced() {
    let shutdown = shutdown();
    let request = stuck_request(&shutdown.layer());
    let mut finish = pin!(shutdown.finish());
    assert!(poll_once(finish.as_mut()).is_pending());
    drop(request);
    let report = finish.await;
    assert_eq!((report.took, report.requests.completed), (Duration::ZERO, 1));
    assert_eq!(report.exit_code(), 0);
}

#[tokio::test(start_paused = true)]
async fn an_upgrade_that_is_held_is_waited_for_and_reported_as_left() {
    for lets_go in [true, false] {
        let shutdown = shutdown();
        let watch = shutdown.watch();
        let mut service = shutdown.layer().layer(service_fn(move |_: Request<()>| {
            let (held, draining) = (hold().unwrap(), watch.draining());
            tokio::spawn(async move {
                let _held = held;
                if lets_go {
                    draining.await;
                    sleep(secs(2)).await;
                } else {
                    pending::<()>().await;
                }
            });
            let mut response = Response::default();
            *response.status_mut() = StatusCode::SWITCHING_PROTOCOLS;
            ready(Reply::Ok(response))
        }));
        drop(service.call(Request::new(())).await.unwrap());
        let report = shutdown.finish().await;
        if lets_go {
            assert_eq!((report.took, report.requests.completed), (secs(2), 1));
            assert_eq!(report.exit_code(), 0);
        } else {
            assert_eq!(report.took, BUDGET + Duration::from_millis(100));
            assert_eq!((report.requests.left, report.exit_code()), (1, 1));
            assert_eq!(report_of(&report), [(Kind::Request, "GET", None)]);
            assert_eq!(report.forced()[0].age, report.took);
        }
        assert_adds_up(&report);
    }
}

#[tokio::test(start_paused = true)]
async fn readiness_of_the_service_is_that_of_the_inner_one_whatever_happens() {
    type Inner = tower_test::mock::Mock<Request<()>, Response<Full<Bytes>>>;
    let (mut service, mut handle) = tower_test::mock::spawn_with(|mock: Inner| {
        let shutdown = shutdown();
        shutdown.begin();
        shutdown.layer().layer(mock)
    });
    handle.allow(0);
    tokio_test::assert_pending!(service.poll_ready::<Request<()>>());
    handle.allow(1);
    tokio_test::assert_ready_ok!(service.poll_ready::<Request<()>>());
}

#[tokio::test(start_paused = true)]
async fn plain_services_are_counted_refused_and_ended_too() {
    let shutdown = shutdown();
    let mut service = shutdown.layer().plain().layer(service_fn(|wait: u64| async move {
        sleep(secs(wait)).await;
        if wait == 1 { Err("broken") } else { Ok(wait) }
    }));
    let mut call = |wait| tokio::spawn(service.call(wait));
    let (done, failed, ended) = (call(2), call(1), call(3600));
    settle().await;
    let report = shutdown.finish().await;
    assert_eq!(done.await.unwrap().unwrap(), 2);
    assert!(matches!(failed.await.unwrap(), Err(CallError::Inner("broken"))));
    assert!(matches!(ended.await.unwrap(), Err(CallError::Stopped(_))));
    assert!(matches!(call(0).await.unwrap(), Err(CallError::Stopped(_))), "it is too late");
    assert_eq!((report.requests.completed, report.requests.ended), (2, 1));
    assert_eq!(report_of(&report), [(Kind::Request, "call", Some(Outcome::Cancelled))]);
}

// The watch

#[tokio::test(start_paused = true)]
async fn a_handler_finds_the_watch_in_the_type_map_if_so_chosen() {
    for chosen in [false, true] {
        let shutdown = shutdown();
        let mut layer = shutdown.layer();
        if chosen {
            layer = layer.in_extensions();
        }
        let mut service = layer.layer(service_fn(|request: Request<()>| {
            let watch = request.extensions().get::<ShutdownWatch>().cloned();
            let mut response = Response::default();
            response.extensions_mut().insert(watch);
            ready(Reply::Ok(response))
        }));
        let response = service.call(Request::new(())).await.unwrap();
        let watch = response.extensions().get::<Option<ShutdownWatch>>().unwrap();
        assert_eq!(watch.as_ref().map(ShutdownWatch::is_ready), chosen.then_some(true));
    }
}

/// A body that is always ready.
struct Fast;

impl Body for Fast {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(
        self: Pin<&mut Self>,
        _: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        Poll::Ready(Some(Ok(Frame::data(Bytes::from_static(b"tick")))))
    }
}

#[tokio::test(start_paused = true)]
async fn a_body_until_draining_that_is_always_ready_has_an_end() {
    let shutdown = shutdown();
    let mut body = pin!(shutdown.watch().until_draining(Fast));
    for _ in 0..1000 {
        assert!(body.frame().await.is_some(), "nobody has told it to end");
    }
    drop(shutdown.finish().await);
    let rest = body.as_mut().collect().await.unwrap().to_bytes();
    assert_eq!(rest.len(), 16 * "tick".len());
    assert!(body.is_end_stream());
}

#[tokio::test(start_paused = true)]
async fn a_body_until_draining_yields_what_is_ready_and_then_comes_to_its_end() {
    let shutdown = shutdown();
    let mut body = pin!(shutdown.watch().until_draining(endless()));
    assert_eq!(body.size_hint().exact(), None);
    let cx = &mut Context::from_waker(Waker::noop());
    // What is ready comes first, whatever has happened.
    shutdown.begin();
    drop(shutdown.finish().await);
    let first = body.as_mut().poll_frame(cx);
    assert!(matches!(first, Poll::Ready(Some(Ok(_)))));
    assert!(!body.is_end_stream());
    for _ in 0..2 {
        assert!(matches!(body.as_mut().poll_frame(cx), Poll::Ready(None)));
        assert!(body.is_end_stream());
        assert_eq!(body.size_hint().exact(), Some(0));
    }

    let shutdown = self::shutdown();
    let known = shutdown.watch().until_draining(Full::new(Bytes::from_static(b"known")));
    assert_eq!(known.size_hint().exact(), None, "it may be cut short");
    assert_eq!(known.collect().await.unwrap().to_bytes(), "known");

    let body = shutdown.watch().until_draining(endless());
    let read = tokio::spawn(body.collect());
    settle().await;
    assert!(!read.is_finished());
    drop(shutdown.finish().await);
    assert_eq!(read.await.unwrap().unwrap().to_bytes(), "first");
}

// The report

#[tokio::test(start_paused = true)]
async fn the_report_is_read_by_people_and_by_programs() {
    let tasks = TaskRegistry::new();
    let shutdown = shutdown().tasks(&tasks);
    for _ in 0..3 {
        tasks.spawn("write_audit_line", pending::<()>()).unwrap();
    }
    let request = tokio::spawn(stuck_request(&shutdown.layer()));
    settle().await;
    let report = shutdown.finish().await;
    drop(request);
    let text = report.to_string();
    let lines: Vec<_> = text.lines().collect();
    assert_eq!(lines.len(), 3, "{text}");
    assert_eq!(
        lines[0],
        "shut down in 24.000 s of 25.000 s: requests: 1 in flight, 0 later, 0 refused: 0 \
         completed, 1 ended, 0 left; tasks: 3 live, 0 later, 0 refused: 0 completed, 3 cancelled, \
         0 aborted, 0 timed out, 0 panicked, 0 left; 4 forced"
    );
    assert_eq!(lines[2], "  1 x request GET (cancelled, up to 24000 ms old)");
    assert!(
        lines[1]
            .starts_with("  3 x task write_audit_line (cancelled, up to 24000 ms old, spawned at "),
        "{text}"
    );

    #[cfg(feature = "serde")]
    {
        let json = serde_json::to_value(&report).unwrap();
        assert_eq!((&json["took_ms"], &json["budget_ms"]), (&24_000.into(), &25_000.into()));
        assert_eq!((&json["exit_code"], &json["server_ended"]), (&1.into(), &true.into()));
        assert_eq!(json["requests"]["ended"], 1);
        assert_eq!(
            (&json["drained"]["cancelled"], &json["tasks"]["cancelled"]),
            (&3.into(), &3.into())
        );
        let forced = json["forced"].as_array().unwrap();
        assert_eq!(forced.len(), 4);
        let task = forced.iter().find(|it| it["what"] == "task").unwrap();
        assert_eq!(
            (&task["name"], &task["outcome"]),
            (&"write_audit_line".into(), &"cancelled".into())
        );
        assert_eq!(task["age_ms"], 24_000);
        assert!(task["site"].as_str().unwrap().contains("shutdown.rs:"));
        assert!(task["trace_id"].is_null());
    }
}

#[tokio::test(start_paused = true)]
async fn the_text_of_a_report_has_some_lines_however_many_names_clients_choose() {
    let shutdown = Shutdown::new(Duration::ZERO).without_signals();
    let layer = shutdown.layer().route(|request| Some(request.uri.path().to_owned().into()));
    let mut requests = Vec::new();
    for client in 0..100 {
        // The last ones are sent twice.
        for _ in 0..=usize::from(client >= 95) {
            let mut service = layer.layer(service_fn(|_: Request<()>| pending::<Reply>()));
            let request = Request::get(format!("/{client:02}")).body(()).unwrap();
            requests.push(tokio::spawn(service.call(request)));
        }
    }
    settle().await;
    let report = shutdown.finish().await;
    let text = report.to_string();
    let lines: Vec<_> = text.lines().collect();
    assert_eq!(lines.len(), 1 + 20 + 1, "{text}");
    assert!(lines[1].starts_with("  2 x request GET /95 ("), "the largest first: {text}");
    assert!(lines[6].starts_with("  1 x request GET /00 ("), "{text}");
    assert_eq!(lines[21], "  and 80 more, in 80 groups");
    assert_eq!(report.forced().len(), 105);
}

#[tokio::test(start_paused = true)]
async fn a_method_that_has_no_end_is_not_kept() {
    let shutdown = Shutdown::new(Duration::ZERO).without_signals();
    let layer = shutdown.layer();
    let mut requests = Vec::new();
    for len in [1, 32, 33, 300_000] {
        let mut service = layer.layer(service_fn(|_: Request<()>| pending::<Reply>()));
        let request = Request::builder().method(&*"M".repeat(len)).body(()).unwrap();
        requests.push(tokio::spawn(service.call(request)));
    }
    settle().await;
    let report = shutdown.finish().await;
    let mut names: Vec<_> = report.forced().iter().map(|it| &*it.name).collect();
    names.sort_unstable();
    assert_eq!(names, ["M", &"M".repeat(32), "OTHER", "OTHER"]);
}
