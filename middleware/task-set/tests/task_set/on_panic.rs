use std::{
    panic::{AssertUnwindSafe, catch_unwind},
    pin::pin,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering::SeqCst},
        mpsc,
    },
    task::{Context, Poll, Wake},
    time::Duration,
};

use bytes::Bytes;
use http::{Request, Response, Version};
use http_body::{Body, Frame};
use http_body_util::{BodyExt, Empty};
use tokio::runtime::{Builder, Runtime};
use tokio_test::{assert_pending, assert_ready, assert_ready_ok, task::spawn};
use tower::{Layer, ServiceExt, service_fn};
use tower_catch_unwind::{Panic, catch, install_hook};
use tower_task_set::{
    AtEnd, BodyError, CallError, Cause, End, NewTask, OnPanic, Stopped, TaskHandle, TaskRegistry,
    TaskSet, TaskSetLayer,
};

use crate::{
    log::{events_of, events_so_far},
    support::{
        Broken, COMPLETED, OnDrop, Script, Yield, assert_ledger, current_thread, forever, gate,
        multi_thread, outcome, serve, settle,
    },
};

fn hurt() -> impl Future<Output = ()> + Send {
    std::future::poll_fn(|_| panic!("it hurts"))
}

fn hurts<T>() -> Yield<T> {
    Yield::Panicked("it hurts".to_owned())
}

fn stuck_forever() -> impl Future<Output = Result<Response<Empty<Bytes>>, Broken>> {
    std::future::pending()
}

#[tokio::test]
async fn a_panic_is_the_tasks_own_unless_something_else_is_chosen() {
    let tasks = TaskRegistry::new();
    let mut served = serve(&TaskSetLayer::new(&tasks));
    let sibling = served.set.spawn("sibling", forever()).unwrap();
    let task = served.set.spawn("task", hurt()).unwrap();
    assert_eq!(outcome(task).await, hurts());
    settle().await;
    assert!(!sibling.is_finished());
    served.in_poll(|| ());
    assert_ledger(&tasks, "live 1, panicked 1");
}

#[tokio::test]
async fn what_a_handler_makes_of_a_panic_that_fails_its_response_is_not_the_answer() {
    let tasks = TaskRegistry::new();
    let layer = TaskSetLayer::new(&tasks).on_panic(OnPanic::FailResponse);
    let service = layer.layer(service_fn(|_: Request<()>| async {
        let task = TaskSet::current().unwrap().spawn("task", hurt()).unwrap();
        assert_eq!(outcome(task).await, hurts());
        Ok::<_, Broken>(Response::new(Empty::<Bytes>::new()))
    }));
    assert_eq!(service.oneshot(Request::new(())).await.unwrap().status(), 500);
}

/// A task that is in the middle of a poll, where it closes what it has, and then waits.
struct Closes {
    task: TaskHandle<()>,
    go_on: mpsc::Sender<()>,
}

/// Why it closes it.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Why {
    Panics,
    /// It panics, and catches that.
    Catches,
    /// It comes to its end.
    Ends,
}

const WHYS: [Why; 3] = [Why::Panics, Why::Catches, Why::Ends];

impl Closes {
    fn new(set: &TaskSet, why: Why, blocks: bool) -> Self {
        // By which it is known that a panic has begun.
        install_hook();
        let (tell_closed, closed) = mpsc::channel();
        let (go_on, wait) = mpsc::channel();
        let close = move || {
            let _closes = OnDrop::new(move || {
                tell_closed.send(()).unwrap();
                wait.recv().unwrap();
            });
            assert!(why == Why::Ends, "it hurts");
        };
        let close = move || match why {
            Why::Catches => drop(catch_unwind(AssertUnwindSafe(close))),
            _ => close(),
        };
        let task = if blocks {
            set.spawn_blocking("task", |_| close()).unwrap()
        } else {
            set.spawn("task", async { close() }).unwrap()
        };
        closed.recv().unwrap();
        Self { task, go_on }
    }

    fn go_on(self, runtime: &Runtime) {
        self.go_on.send(()).unwrap();
        drop(runtime.block_on(outcome(self.task)));
    }
}

fn fails_its_response(runtime: &Runtime) -> (TaskRegistry, TaskSetLayer) {
    let tasks = TaskRegistry::new().runtime(runtime.handle().clone());
    let layer = TaskSetLayer::new(&tasks).on_panic(OnPanic::FailResponse);
    (tasks, layer)
}

#[test]
fn a_head_that_comes_while_a_task_is_unwound_waits_for_that() {
    for (why, blocks) in WHYS.into_iter().flat_map(|why| [(why, false), (why, true)]) {
        let runtime = multi_thread();
        let (_, layer) = fails_its_response(&runtime);
        let (tell, told) = mpsc::channel();
        let service = layer.layer(service_fn(|_: Request<()>| {
            tell.send(Closes::new(&TaskSet::current().unwrap(), why, blocks)).unwrap();
            async { Ok::<_, Broken>(Response::new(Empty::<Bytes>::new())) }
        }));
        let mut response = spawn(service.oneshot(Request::new(())));
        if why != Why::Ends {
            assert_pending!(response.poll());
            assert_pending!(response.poll());
            assert!(!response.is_woken());
            told.recv().unwrap().go_on(&runtime);
            assert!(response.is_woken());
        }
        let status = assert_ready_ok!(response.poll()).status();
        assert_eq!(status, if why == Why::Panics { 500 } else { 200 });
        for task in told.try_iter() {
            task.go_on(&runtime);
        }
    }
}

#[test]
fn a_call_of_another_service_that_ends_while_a_task_is_unwound_waits_for_that() {
    for why in WHYS {
        let runtime = multi_thread();
        let (_, layer) = fails_its_response(&runtime);
        let layer = layer.plain();
        let (tell, told) = mpsc::channel();
        let service = layer.layer(service_fn(|()| {
            tell.send(Closes::new(&TaskSet::current().unwrap(), why, false)).unwrap();
            async { Ok::<_, Broken>(1) }
        }));
        let mut response = spawn(service.oneshot(()));
        if why != Why::Ends {
            assert_pending!(response.poll());
            told.recv().unwrap().go_on(&runtime);
        }
        match assert_ready!(response.poll()) {
            Ok(answer) => assert!(answer == 1 && why != Why::Panics),
            Err(CallError::Stopped(Stopped::Panicked(_))) => assert_eq!(why, Why::Panics),
            Err(error) => panic!("{error}"),
        }
        for task in told.try_iter() {
            task.go_on(&runtime);
        }
    }
}

#[test]
fn an_end_of_a_body_that_comes_while_a_task_is_unwound_waits_for_that() {
    for why in WHYS {
        let runtime = multi_thread();
        let (tasks, layer) = fails_its_response(&runtime);
        let mut served = serve(&layer);
        let task = Closes::new(&served.set, why, false);
        // Data pass.
        let data = served.poll(|| Poll::Ready(Some(Ok(Frame::data(Bytes::from_static(b"data"))))));
        assert!(matches!(data, Poll::Ready(Some(Ok(_)))));
        served.send(|| Poll::Ready(None));
        let mut body = spawn(served.body);
        let mut end = body.enter(|cx, body| body.poll_frame(cx));
        if why != Why::Ends {
            assert_pending!(end);
            assert_pending!(body.enter(|cx, body| body.poll_frame(cx)));
        }
        task.go_on(&runtime);
        if why != Why::Ends {
            assert!(body.is_woken());
            end = body.enter(|cx, body| body.poll_frame(cx));
        }
        match assert_ready!(end) {
            None => assert_ne!(why, Why::Panics),
            Some(Err(BodyError::Stopped(Stopped::Panicked(panic)))) => {
                assert_eq!((panic.message(), why), ("it hurts", Why::Panics));
            }
            Some(frame) => panic!("{frame:?}"),
        }
        drop(body);
        runtime.block_on(tasks.idle());
        assert_ledger(&tasks, if why == Why::Panics { "panicked 1" } else { "completed 1" });
    }
}

#[test]
fn an_end_that_comes_while_a_task_is_dropped_and_unwinds_waits_for_that() {
    struct Hurts;
    impl Drop for Hurts {
        fn drop(&mut self) {
            panic!("in drop");
        }
    }
    install_hook();
    for hurts in [false, true] {
        let runtime = multi_thread();
        let (tasks, layer) = fails_its_response(&runtime);
        let served = serve(&layer);
        let (tell, closed) = mpsc::channel();
        let (go_on, wait) = mpsc::channel::<()>();
        let task = served.set.spawn("task", async move {
            tell.send(()).unwrap();
            let _closes = OnDrop::new(move || {
                tell.send(()).unwrap();
                wait.recv().unwrap_err();
            });
            // The first to go.
            let _hurts = hurts.then(|| Hurts);
            forever().await;
        });
        let task = task.unwrap();
        closed.recv().expect("it has started");
        task.cancel();
        closed.recv().expect("it is dropped");
        served.send(|| Poll::Ready(None));
        let mut body = spawn(served.body);
        let mut end = body.enter(|cx, body| body.poll_frame(cx));
        assert_eq!(end.is_pending(), hurts, "{end:?}");
        drop(go_on);
        let outcome = runtime.block_on(outcome(task));
        if hurts {
            assert!(body.is_woken());
            end = body.enter(|cx, body| body.poll_frame(cx));
            assert!(matches!(assert_ready!(end), Some(Err(BodyError::Stopped(_)))));
            assert_eq!(outcome, Yield::Panicked("in drop".to_owned()));
        } else {
            assert!(assert_ready!(end).is_none());
            assert_eq!(outcome, Yield::Cancelled(Cause::Requested));
        }
        drop(body);
        runtime.block_on(tasks.idle());
    }
}

#[test]
fn a_response_is_not_held_back_for_a_panic_that_was_caught() {
    install_hook();
    for blocks in [false, true] {
        let runtime = multi_thread();
        let (_, layer) = fails_its_response(&runtime);
        let mut served = serve(&layer);
        let (tell, caught) = mpsc::channel();
        let (go_on, wait) = mpsc::channel::<()>();
        let work = move || {
            catch(|| panic!("it hurts")).unwrap_err();
            tell.send(()).unwrap();
            wait.recv().unwrap_err();
        };
        let task = if blocks {
            served.set.spawn_blocking("task", move |_| work()).unwrap()
        } else {
            served.set.spawn("task", async move { work() }).unwrap()
        };
        caught.recv().unwrap();
        assert!(assert_ready!(served.poll(|| Poll::Ready(None))).is_none());
        drop(go_on);
        assert_eq!(runtime.block_on(outcome(task)), COMPLETED);
    }
}

#[test]
fn a_deadline_ends_a_response_that_is_held_back() {
    // Where the tasks are, nobody keeps the time.
    let runtime = Builder::new_multi_thread().worker_threads(1).build().unwrap();
    let (_, layer) = fails_its_response(&runtime);
    let (tell, told) = mpsc::channel();
    let service = layer.deadline(Duration::from_millis(1)).layer(service_fn(|_: Request<()>| {
        tell.send(Closes::new(&TaskSet::current().unwrap(), Why::Panics, false)).unwrap();
        async { Ok::<_, Broken>(Response::new(Empty::<Bytes>::new())) }
    }));
    let response = current_thread().block_on(service.oneshot(Request::new(())));
    assert_eq!(response.unwrap().status(), 504);
    told.recv().unwrap().go_on(&runtime);
}

#[test]
fn the_response_is_told_of_a_panic_before_the_log() {
    /// Notes how much was logged when it was woken.
    struct Notes(AtomicUsize);
    impl Wake for Notes {
        fn wake(self: Arc<Self>) {
            self.0.store(events_so_far(), SeqCst);
        }
    }
    struct Hurts;
    impl Drop for Hurts {
        fn drop(&mut self) {
            panic!("it hurts");
        }
    }
    for in_drop in [false, true] {
        let notes = Arc::new(Notes(AtomicUsize::new(usize::MAX)));
        let events = events_of(|| {
            current_thread().block_on(async {
                let layer = TaskSetLayer::new(&TaskRegistry::new());
                let mut served = serve(&layer.on_panic(OnPanic::FailResponse));
                let waker = notes.clone().into();
                let mut context = Context::from_waker(&waker);
                assert!(served.body.as_mut().poll_frame(&mut context).is_pending());
                if in_drop {
                    let hurts = Hurts;
                    let task = std::future::poll_fn(move |_| {
                        let _hurts = &hurts;
                        Poll::Ready(())
                    });
                    served.set.spawn("task", task).unwrap();
                } else {
                    served.set.spawn("task", hurt()).unwrap();
                }
                settle().await;
            });
        });
        assert_eq!((events.len(), notes.0.load(SeqCst)), (1, 0));
    }
}

#[tokio::test(start_paused = true)]
async fn a_panic_does_nothing_to_a_response_that_is_over_though_its_set_is_held() {
    let tasks = TaskRegistry::new();
    let layer = TaskSetLayer::new(&tasks).on_panic(OnPanic::FailResponse);
    let (sets, received) = std::sync::mpsc::channel();
    let service = layer.layer(service_fn(move |_: Request<()>| {
        let set = TaskSet::current().unwrap();
        sets.send((set.hold(), set)).unwrap();
        async { Ok::<_, Broken>(Response::new(Script::on_drop(|| ()))) }
    }));
    let request = Request::head("/").body(()).unwrap();
    let mut body = spawn(service.oneshot(request).await.unwrap().into_body());
    let (_hold, set) = received.recv().unwrap();
    set.spawn("task", hurt()).unwrap();
    settle().await;
    assert_ledger(&tasks, "panicked 1");
    assert_pending!(body.enter(|cx, body| body.poll_frame(cx)));
}

#[tokio::test]
async fn a_panic_may_cancel_the_siblings() {
    let tasks = TaskRegistry::new();
    let mut served = serve(&TaskSetLayer::new(&tasks).on_panic(OnPanic::CancelSiblings));
    let sibling = served.set.spawn("sibling", forever()).unwrap();
    let kept = served.set.task("kept").at_end(AtEnd::Keep).spawn(forever()).unwrap();
    let other = serve(&TaskSetLayer::new(&tasks)).set.spawn("of another set", forever()).unwrap();
    let task = served.set.spawn("task", hurt()).unwrap();
    assert_eq!(outcome(task).await, hurts());
    assert_eq!(outcome(sibling).await, Yield::Cancelled(Cause::Sibling));
    assert_eq!(outcome(kept).await, Yield::Cancelled(Cause::Sibling));
    assert!(served.set.spawn("late", forever()).is_err());
    assert!(!other.is_finished());
    // The response goes on.
    served.in_poll(|| ());
    served.end(End::Completed);
}

#[tokio::test]
async fn a_panic_may_fail_the_response_before_its_head() {
    for (request, status) in [(Request::new(()), 500), (grpc(), 200)] {
        let tasks = TaskRegistry::new().at_end(AtEnd::Cancel);
        let (open, wait) = gate();
        let wait = std::sync::Mutex::new(Some(wait));
        let layer = TaskSetLayer::new(&tasks).on_panic(OnPanic::FailResponse);
        let service = layer.layer(service_fn(|_: Request<()>| {
            let (set, wait) = (TaskSet::current().unwrap(), wait.lock().unwrap().take().unwrap());
            set.spawn("sibling", forever()).unwrap();
            set.spawn("task", async {
                wait.await;
                hurt().await;
            })
            .unwrap();
            stuck_forever()
        }));
        let mut response = spawn(service.oneshot(request));
        assert_pending!(response.poll());
        settle().await;
        assert!(!response.is_woken());
        open.send(()).unwrap();
        settle().await;
        assert!(response.is_woken());
        let response = assert_ready_ok!(response.poll());
        assert_eq!(response.status(), status);
        let panic = response.extensions().get::<Panic>().unwrap();
        assert_eq!((panic.message(), panic.task()), ("it hurts", Some("task")));
        if status == 200 {
            assert_eq!(response.headers()["grpc-status"], "13");
        } else {
            let body = response.into_body().collect().await.unwrap().to_bytes();
            assert!(!String::from_utf8(body.to_vec()).unwrap().contains("hurts"));
        }
        settle().await;
        assert_ledger(&tasks, "cancelled 1, panicked 1");
    }
}

#[tokio::test]
async fn a_panic_may_fail_the_response_after_its_head() {
    for (request, is_grpc) in [(Request::new(()), false), (grpc(), true)] {
        let tasks = TaskRegistry::new();
        let (open, wait) = gate();
        let wait = std::sync::Mutex::new(Some(wait));
        let service = TaskSetLayer::new(&tasks).layer(service_fn(|request: Request<()>| {
            let (set, wait) = (TaskSet::current().unwrap(), wait.lock().unwrap().take().unwrap());
            set.on_panic(OnPanic::FailResponse);
            set.spawn("task", async {
                wait.await;
                hurt().await;
            })
            .unwrap();
            let mut response = Response::new(Script::on_drop(|| ()));
            if let Some(value) = request.headers().get("content-type") {
                response.headers_mut().insert("content-type", value.clone());
            }
            async { Ok::<_, Broken>(response) }
        }));
        let response = service.oneshot(request).await.unwrap();
        let mut body = spawn(response.into_body());
        assert_pending!(body.enter(|cx, mut body| pin!(body.frame()).poll(cx)));
        open.send(()).unwrap();
        settle().await;
        assert!(body.is_woken());
        let frame = assert_ready!(body.enter(|cx, mut body| pin!(body.frame()).poll(cx))).unwrap();
        match frame {
            Ok(frame) => assert_eq!(frame.trailers_ref().unwrap()["grpc-status"], "13"),
            Err(BodyError::Stopped(Stopped::Panicked(panic))) => {
                assert!(!is_grpc);
                assert_eq!(panic.task(), Some("task"));
            }
            Err(error) => panic!("{error}"),
        }
    }
}

#[tokio::test]
async fn a_panic_while_the_response_is_not_polled_is_found_by_its_next_poll() {
    let tasks = TaskRegistry::new();
    let (open, wait) = gate();
    let wait = std::sync::Mutex::new(Some(wait));
    let service = TaskSetLayer::new(&tasks).layer(service_fn(|_: Request<()>| {
        let wait = wait.lock().unwrap().take().unwrap();
        TaskSet::current()
            .unwrap()
            .task("task")
            .on_panic(OnPanic::FailResponse)
            .spawn(hurt())
            .unwrap();
        async {
            wait.await;
            stuck_forever().await
        }
    }));
    let mut response = spawn(service.oneshot(Request::new(())));
    // It has not been polled yet: nothing to wake.
    settle().await;
    assert_pending!(response.poll());
    settle().await;
    drop(open);
    assert_eq!(assert_ready_ok!(response.poll()).status(), 500);
}

#[tokio::test]
async fn a_task_that_is_spawned_while_the_response_awaits_may_fail_it() {
    let tasks = TaskRegistry::new();
    let (open, wait) = gate();
    let wait = std::sync::Mutex::new(Some(wait));
    let service = TaskSetLayer::new(&tasks).layer(service_fn(|_: Request<()>| {
        let (set, wait) = (TaskSet::current().unwrap(), wait.lock().unwrap().take().unwrap());
        let parent = set.clone();
        set.spawn("parent", async move {
            wait.await;
            parent.task("child").on_panic(OnPanic::FailResponse).spawn(hurt()).unwrap();
        })
        .unwrap();
        stuck_forever()
    }));
    let mut response = spawn(service.oneshot(Request::new(())));
    assert_pending!(response.poll());
    open.send(()).unwrap();
    settle().await;
    assert!(response.is_woken());
    assert_eq!(assert_ready_ok!(response.poll()).status(), 500);
}

#[tokio::test]
async fn a_panic_after_the_response_is_only_counted() {
    let tasks = TaskRegistry::new();
    let served = serve(&TaskSetLayer::new(&tasks).on_panic(OnPanic::FailResponse));
    let (open, wait) = gate();
    let task = served.set.spawn("task", async {
        wait.await;
        hurt().await;
    });
    let sibling = served.set.spawn("sibling", async {}).unwrap();
    served.end(End::Completed);
    open.send(()).unwrap();
    assert_eq!(outcome(task.unwrap()).await, hurts());
    assert_eq!(outcome(sibling).await, COMPLETED);
    assert_ledger(&tasks, "completed 1, panicked 1");
}

#[tokio::test]
async fn what_is_chosen_further_inside_counts() {
    use OnPanic::{CancelSiblings, Isolate};
    // For the registry, the layer, the set and the task.
    for (choices, cancelled) in [
        ([None, None, None, None], false),
        ([Some(CancelSiblings), None, None, None], true),
        ([Some(CancelSiblings), Some(Isolate), None, None], false),
        ([None, Some(CancelSiblings), None, None], true),
        ([None, Some(CancelSiblings), Some(Isolate), None], false),
        ([None, None, Some(CancelSiblings), None], true),
        ([None, None, Some(CancelSiblings), Some(Isolate)], false),
        ([None, None, None, Some(CancelSiblings)], true),
    ] {
        let mut tasks = TaskRegistry::new();
        if let Some(choice) = choices[0] {
            tasks = tasks.on_panic(choice);
        }
        let mut layer = TaskSetLayer::new(&tasks);
        if let Some(choice) = choices[1] {
            layer = layer.on_panic(choice);
        }
        let served = serve(&layer);
        if let Some(choice) = choices[2] {
            served.set.on_panic(choice);
        }
        let sibling = served.set.spawn("sibling", forever()).unwrap();
        let mut task = served.set.task("task");
        if let Some(choice) = choices[3] {
            task = task.on_panic(choice);
        }
        assert_eq!(outcome(task.spawn(hurt()).unwrap()).await, hurts());
        settle().await;
        assert_eq!(sibling.is_finished(), cancelled, "{choices:?}");
    }
}

#[tokio::test]
async fn a_choice_for_panics_is_none_for_the_lifetime() {
    let tasks = TaskRegistry::new();
    let served = serve(&TaskSetLayer::new(&tasks).at_end(AtEnd::Cancel));
    let task = served.set.task("task").on_panic(OnPanic::CancelSiblings).spawn(forever()).unwrap();
    served.end(End::Completed);
    assert_eq!(outcome(task).await, Yield::Cancelled(Cause::Completed));
}

#[tokio::test]
async fn a_panic_in_a_drop_or_in_a_closure_that_blocks_counts_as_well() {
    for spawn_one in [
        (|task: NewTask<'_>| {
            let guard = OnDrop::new(|| panic!("it hurts"));
            drop(task.spawn(async { drop(guard) }));
        }) as fn(NewTask<'_>),
        |task| {
            let guard = OnDrop::new(|| panic!("it hurts"));
            let task = task.spawn(async {
                let _guard = guard;
                forever().await;
            });
            task.unwrap().cancel();
        },
        |task| drop(task.spawn_blocking(|_| panic!("it hurts"))),
    ] {
        let tasks = TaskRegistry::new();
        let served = serve(&TaskSetLayer::new(&tasks));
        let sibling = served.set.spawn("sibling", forever()).unwrap();
        spawn_one(served.set.task("task").on_panic(OnPanic::CancelSiblings));
        assert_eq!(outcome(sibling).await, Yield::Cancelled(Cause::Sibling));
    }
}

#[tokio::test]
async fn a_task_that_belongs_to_no_request_has_no_siblings() {
    let tasks = TaskRegistry::new().on_panic(OnPanic::CancelSiblings);
    let other = tasks.spawn("other", forever()).unwrap();
    for choice in [OnPanic::CancelSiblings, OnPanic::FailResponse] {
        let task = tasks.task("task").on_panic(choice).spawn(hurt()).unwrap();
        assert_eq!(outcome(task).await, hurts());
    }
    settle().await;
    assert!(!other.is_finished());
    assert_eq!(outcome(tasks.spawn("later", async {}).unwrap()).await, COMPLETED);
}

#[tokio::test]
async fn without_http_a_panic_of_a_task_may_be_the_error() {
    let tasks = TaskRegistry::new().on_panic(OnPanic::FailResponse);
    let service = TaskSetLayer::new(&tasks).plain().layer(service_fn(|(): ()| {
        TaskSet::current().unwrap().spawn("task", hurt()).unwrap();
        std::future::pending::<Result<(), Broken>>()
    }));
    let error = service.oneshot(()).await.unwrap_err();
    assert!(matches!(error, CallError::Stopped(Stopped::Panicked(_))));
}

#[tokio::test]
async fn of_two_panics_the_first_is_told() {
    let tasks = TaskRegistry::new().on_panic(OnPanic::FailResponse);
    let service = TaskSetLayer::new(&tasks).layer(service_fn(|_: Request<()>| {
        let set = TaskSet::current().unwrap();
        set.spawn("first", hurt()).unwrap();
        set.spawn("second", hurt()).unwrap();
        std::future::pending::<Result<Response<Empty<Bytes>>, Broken>>()
    }));
    let mut response = spawn(service.oneshot(Request::new(())));
    assert_pending!(response.poll());
    settle().await;
    let response = assert_ready_ok!(response.poll());
    assert_eq!(response.extensions().get::<Panic>().unwrap().task(), Some("first"));
    assert_ledger(&tasks, "panicked 2");
}

fn grpc() -> Request<()> {
    let request = Request::post("/").version(Version::HTTP_2);
    request.header("content-type", "application/grpc").body(()).unwrap()
}
