//! Responses that a layer ends, step by step.

#![allow(clippy::unwrap_used)]

use std::{
    cell::{Cell, RefCell},
    convert::Infallible,
    future::{Pending, Ready, pending, ready},
    panic::{AssertUnwindSafe, catch_unwind},
    pin::{Pin, pin},
    rc::Rc,
    sync::Arc,
    task::{Context, Poll, Wake, Waker},
};

use bytes::Bytes;
use http::{HeaderMap, HeaderValue, Request, Response, StatusCode, Version};
use http_body::{Body, Frame, SizeHint};
use http_body_util::Empty;
use tokio_test::{
    assert_pending, assert_ready, assert_ready_err, assert_ready_ok,
    task::{self, spawn},
};
use tower_catch_unwind::{Panic, catch};
use tower_request_context::Dialect;
use tower_response_end::{
    Asked, BodyError, CallError,
    End::{self, Completed, Disconnected, Failed, Panicked, TimedOut},
    ResponseBody, ResponseFuture, Signal, Stop, StoppableBody, StoppableFuture, Stopped, Waiter,
    Watch,
};

// Before the head

#[test]
fn a_response_that_is_ended_before_its_head_is_answered() {
    for (stopped, status, grpc_status, end) in [
        (Stopped::TimedOut, 504, "4", TimedOut),
        (Stopped::Panicked(a_panic()), 500, "13", Panicked),
        (Stopped::Shutdown, 503, "14", Disconnected),
    ] {
        let test = Test::new(stopped);
        let mut response = test.call(&get(), test.noted(pending::<Answer>()));
        assert_pending!(response.poll());
        assert_eq!(test.seen(), []);
        test.signal.give();
        assert!(response.is_woken());
        let (head, body) = assert_ready_ok!(response.poll()).into_parts();
        assert_eq!(test.seen(), [Seen::BeforeDrop(end), Seen::Dropped, Seen::Ended(end)]);
        assert_eq!(head.status.as_u16(), status);
        assert_eq!(head.headers["content-type"], "application/problem+json");
        assert_eq!(head.extensions.get::<Panic>().is_some(), end == Panicked);
        let mut body = pin!(body);
        assert_eq!(body.size_hint().exact(), Some(data(poll(body.as_mut())).len() as u64));
        assert!(body.is_end_stream());
        assert!(matches!(poll(body.as_mut()), Poll::Ready(None)));

        let test = Test::new(test.stopped.clone());
        test.signal.give();
        let mut response = test.call(&grpc(Version::HTTP_2), test.noted(pending::<Answer>()));
        let (head, body) = assert_ready_ok!(response.poll()).into_parts();
        assert_eq!(head.status, StatusCode::OK);
        assert_eq!(head.headers["grpc-status"], grpc_status);
        assert!(body.is_end_stream());
        assert!(matches!(poll(pin!(body)), Poll::Ready(None)));
        assert_eq!(test.seen().len(), 3);
    }
}

#[test]
fn a_response_that_is_ready_is_not_ended() {
    let test = Test::new(Stopped::TimedOut);
    test.signal.give();
    let mut response = test.call(&get(), ready(Answer::Ok(Response::new(Script::default()))));
    let response = assert_ready_ok!(response.poll());
    assert_eq!(response.status(), 200);
    assert_eq!(test.seen(), []);
}

#[test]
fn an_answer_that_comes_too_late_is_not_passed_on() {
    for answer in [Ok(()), Err("broken")] {
        let test = Test::new(Stopped::TimedOut);
        test.too_late.set(true);
        let answer = answer.map(|()| Response::new(Script::new(&test, [])));
        let mut response = test.call(&get(), ready(answer));
        assert_eq!(assert_ready_ok!(response.poll()).status(), 504);
        let seen = test.seen();
        assert_eq!(seen.first(), Some(&Seen::BeforeDrop(TimedOut)));
        assert_eq!(seen.last(), Some(&Seen::Ended(TimedOut)));
    }
}

#[test]
fn an_answer_is_held_back_until_it_is_known_whether_it_comes_too_late() {
    for (answer, too_late) in [(Ok(()), false), (Ok(()), true), (Err(()), false), (Err(()), true)] {
        let test = Test::new(Stopped::TimedOut);
        test.is_undecided.set(true);
        let was_ok = answer.is_ok();
        let answer = answer.map(|()| Response::new(Script::new(&test, []))).map_err(|()| "broken");
        let mut response = test.call(&get(), ready(answer));
        let before = test.seen();
        for _ in 0..2 {
            assert_pending!(response.poll());
        }
        assert_eq!(test.seen(), before);
        test.decide(too_late);
        match assert_ready!(response.poll()) {
            Ok(response) => assert_eq!(response.status(), if too_late { 504 } else { 200 }),
            Err(error) => assert_eq!((error, was_ok, too_late), ("broken", false, false)),
        }
        let ended = test.seen().contains(&Seen::Ended(TimedOut));
        assert_eq!(ended, too_late);
    }
    // Dropped meanwhile, in scope.
    let test = Test::new(Stopped::TimedOut);
    test.is_undecided.set(true);
    let answer = Answer::Ok(Response::new(Script::new(&test, [])));
    let mut response = test.call(&get(), ready(answer));
    assert_pending!(response.poll());
    drop(response);
    let end = Disconnected;
    assert_eq!(test.seen(), [Seen::BeforeDrop(end), Seen::Dropped, Seen::Ended(end)]);
}

#[test]
fn an_error_of_the_service_passes_unchanged() {
    let test = Test::new(Stopped::TimedOut);
    let mut response = test.call(&get(), ready(Err::<Response<Script>, _>("broken")));
    assert_eq!(assert_ready_err!(response.poll()), "broken");
    assert_eq!(test.seen(), [Seen::Ended(Failed)]);
}

#[test]
fn a_response_that_is_dropped_is_a_disconnect() {
    let test = Test::new(Stopped::TimedOut);
    let mut response = test.call(&get(), test.noted(pending::<Answer>()));
    assert_pending!(response.poll());
    drop(response);
    let end = Disconnected;
    assert_eq!(test.seen(), [Seen::BeforeDrop(end), Seen::Dropped, Seen::Ended(end)]);
}

#[test]
fn a_panic_in_the_drop_of_what_is_ended_is_the_end() {
    struct PanicOnDrop;
    impl Drop for PanicOnDrop {
        fn drop(&mut self) {
            panic!("in the drop");
        }
    }
    let test = Test::new(Stopped::TimedOut);
    test.signal.give();
    let guard = PanicOnDrop;
    let mut response = test.call(&get(), async {
        let _guard = guard;
        pending::<Answer>().await
    });
    assert!(catch_unwind(AssertUnwindSafe(|| drop(response.poll()))).is_err());
    assert_eq!(test.seen(), [Seen::BeforeDrop(TimedOut), Seen::Ended(Panicked)]);
}

// After it

#[test]
fn a_body_that_is_ended_ends_in_an_error_and_then_in_none() {
    let test = Test::new(Stopped::TimedOut);
    let mut body = test.body(&get(), Script::new(&test, [Some("hello"), None]));
    assert_eq!(data(body.enter(|cx, body| body.poll_frame(cx))), "hello");
    assert_pending!(body.enter(|cx, body| body.poll_frame(cx)));
    assert_eq!(test.seen(), []);
    test.signal.give();
    assert!(body.is_woken());
    let frame = assert_ready!(body.enter(|cx, body| body.poll_frame(cx)));
    assert!(matches!(frame, Some(Err(BodyError::Stopped(Stopped::TimedOut)))));
    assert_eq!(test.seen(), [Seen::BeforeDrop(TimedOut), Seen::Dropped, Seen::Ended(TimedOut)]);
    assert!(body.is_end_stream());
    assert_eq!(body.size_hint().exact(), Some(0));
    assert!(assert_ready!(body.enter(|cx, body| body.poll_frame(cx))).is_none());
    drop(body);
    assert_eq!(test.seen().len(), 3, "the end is told once");
}

#[test]
fn a_grpc_body_that_is_ended_ends_in_trailers() {
    for (stopped, status) in
        [(Stopped::TimedOut, "4"), (Stopped::Panicked(a_panic()), "13"), (Stopped::Shutdown, "14")]
    {
        let test = Test::new(stopped);
        let mut body = test.body(&grpc(Version::HTTP_2), Script::new(&test, [None]));
        test.signal.give();
        let frame = assert_ready!(body.enter(|cx, body| body.poll_frame(cx)));
        assert_eq!(frame.unwrap().unwrap().into_trailers().unwrap()["grpc-status"], status);
        assert!(assert_ready!(body.enter(|cx, body| body.poll_frame(cx))).is_none());
    }
}

#[test]
fn a_client_that_sees_no_trailers_gets_an_error() {
    let web = Request::post("/").header("content-type", "application/grpc-web").body(()).unwrap();
    for request in [grpc(Version::HTTP_11), web] {
        let test = Test::new(Stopped::Shutdown);
        let mut body = test.body(&request, Script::new(&test, [None]));
        test.signal.give();
        let frame = assert_ready!(body.enter(|cx, body| body.poll_frame(cx)));
        assert!(matches!(frame, Some(Err(BodyError::Stopped(Stopped::Shutdown)))));
    }
}

#[test]
fn a_body_that_never_awaits_is_ended_after_a_frame() {
    let test = Test::new(Stopped::TimedOut);
    let mut body = test.body(&get(), Script::new(&test, [Some("a"); 9]));
    assert_eq!(data(body.enter(|cx, body| body.poll_frame(cx))), "a");
    test.signal.give();
    let frame = assert_ready!(body.enter(|cx, body| body.poll_frame(cx)));
    assert!(matches!(frame, Some(Err(BodyError::Stopped(_)))));
}

#[test]
fn the_last_frame_of_a_body_passes() {
    let test = Test::new(Stopped::TimedOut);
    let script = Script { tells_its_end: true, ..Script::new(&test, [Some("all")]) };
    let mut body = test.body(&get(), script);
    test.signal.give();
    assert_eq!(data(body.enter(|cx, body| body.poll_frame(cx))), "all");
    assert_eq!(test.seen(), [Seen::Ended(Completed)]);
    assert!(assert_ready!(body.enter(|cx, body| body.poll_frame(cx))).is_none());
}

#[test]
fn the_last_bytes_by_content_length_pass_though_the_body_tells_no_end() {
    for (frames, passes) in [([Some("hel"), Some("lo")], true), ([Some("he"), Some("lo")], false)] {
        let test = Test::new(Stopped::TimedOut);
        let mut response = Response::new(Script::new(&test, frames));
        response.headers_mut().insert("content-length", 5.into());
        let future: Ready<Answer> = ready(Ok(response));
        let mut body = spawn(assert_ready_ok!(test.call(&get(), future).poll()).into_body());
        assert!(!data(body.enter(|cx, body| body.poll_frame(cx))).is_empty());
        test.signal.give();
        let last = assert_ready!(body.enter(|cx, body| body.poll_frame(cx)));
        assert_eq!(matches!(last, Some(Ok(_))), passes, "{last:?}");
        drop(body);
        let end = if passes { Completed } else { TimedOut };
        assert_eq!(test.seen(), [Seen::BeforeDrop(end), Seen::Dropped, Seen::Ended(end)]);
    }
}

#[test]
fn what_a_body_ends_in_passes() {
    let trailers = Script { trailers: true, ..Script::default() };
    for (script, end, shown) in [
        (Script::default(), Completed, "None"),
        (trailers, Completed, "Some(Ok(Frame { kind: Trailers({}) }))"),
        (Script { fails: true, ..Script::default() }, Failed, "Some(Err(Inner(\"broken\")))"),
    ] {
        let test = Test::new(Stopped::TimedOut);
        let mut body = test.body(&get(), script);
        test.signal.give();
        let frame = assert_ready!(body.enter(|cx, body| body.poll_frame(cx)));
        assert_eq!(format!("{frame:?}"), shown);
        assert_eq!(test.seen(), [Seen::Ended(end)]);
    }
}

#[test]
fn an_end_of_a_body_that_comes_too_late_is_not_passed_on() {
    for version in [Version::HTTP_11, Version::HTTP_2] {
        for (trailers, fails) in [(false, false), (true, false), (false, true)] {
            let test = Test::new(Stopped::TimedOut);
            let script = Script { trailers, fails, ..Script::new(&test, [Some("a")]) };
            let mut body = test.body(&grpc(version), script);
            test.too_late.set(true);
            assert_eq!(data(body.enter(|cx, body| body.poll_frame(cx))), "a");
            let end = assert_ready!(body.enter(|cx, body| body.poll_frame(cx))).unwrap();
            match end {
                Ok(frame) => assert_eq!(frame.into_trailers().unwrap()["grpc-status"], "4"),
                Err(error) => assert!(matches!(error, BodyError::Stopped(Stopped::TimedOut))),
            }
            let ended = [Seen::BeforeDrop(TimedOut), Seen::Dropped, Seen::Ended(TimedOut)];
            assert_eq!(test.seen(), ended);
            assert!(assert_ready!(body.enter(|cx, body| body.poll_frame(cx))).is_none());
        }
    }
    // Nor is one that the body tells with its last data, or afterwards.
    for told_later in [false, true] {
        let test = Test::new(Stopped::TimedOut);
        let tells_later = Rc::new(Cell::new(false));
        let script = Script::new(&test, [Some("a"), Some("]")]);
        let script =
            Script { tells_its_end: !told_later, tells_later: tells_later.clone(), ..script };
        let mut body = test.body(&get(), script);
        assert_eq!(data(body.enter(|cx, body| body.poll_frame(cx))), "a");
        if told_later {
            assert_eq!(data(body.enter(|cx, body| body.poll_frame(cx))), "]");
            assert!(!body.is_end_stream());
            tells_later.set(true);
            assert!(body.is_end_stream());
        }
        test.too_late.set(true);
        assert!(!body.is_end_stream(), "it is to be polled");
        let last = assert_ready!(body.enter(|cx, body| body.poll_frame(cx)));
        assert!(matches!(last, Some(Err(BodyError::Stopped(Stopped::TimedOut)))), "{last:?}");
        let ended = [Seen::BeforeDrop(TimedOut), Seen::Dropped, Seen::Ended(TimedOut)];
        assert_eq!(test.seen(), ended);
    }
    // The last data are not too late, nor what says no more than that.
    let test = Test::new(Stopped::TimedOut);
    let mut response = Response::new(Script::new(&test, [Some("hello")]));
    response.headers_mut().insert("content-length", 5.into());
    let future = ready(Answer::Ok(response));
    let mut body = spawn(assert_ready_ok!(test.call(&get(), future).poll()).into_body());
    test.too_late.set(true);
    let mut next = || body.enter(|cx, body| body.poll_frame(cx));
    assert_eq!(data(next()), "hello");
    assert!(assert_ready!(next()).is_none());
    assert_eq!(test.seen(), [Seen::Ended(Completed)]);
    // But the trailers after them are, if they tell the client how it went.
    let test = Test::new(Stopped::TimedOut);
    let script = Script { trailers: true, ..Script::new(&test, [Some("hello")]) };
    let mut response = Response::new(script);
    response.headers_mut().insert("content-length", 5.into());
    response.headers_mut().insert("content-type", HeaderValue::from_static("application/grpc"));
    let future = ready(Answer::Ok(response));
    let mut call = test.call(&grpc(Version::HTTP_2), future);
    let mut body = spawn(assert_ready_ok!(call.poll()).into_body());
    test.too_late.set(true);
    let mut next = || body.enter(|cx, body| body.poll_frame(cx));
    assert_eq!(data(next()), "hello");
    let trailers = assert_ready!(next()).unwrap().unwrap().into_trailers().unwrap();
    assert_eq!(trailers["grpc-status"], "4");
    assert_eq!(test.seen().last(), Some(&Seen::Ended(TimedOut)));
}

#[test]
fn an_end_of_a_body_is_held_back_until_it_is_known_whether_it_comes_too_late() {
    for (trailers, told, too_late) in [
        (false, false, false),
        (false, false, true),
        (true, false, false),
        (true, false, true),
        (false, true, false),
        (false, true, true),
    ] {
        let test = Test::new(Stopped::TimedOut);
        let script = Script::new(&test, [Some("a")]);
        let script = Script { trailers, tells_its_end: told, ..script };
        let mut body = test.body(&get(), script);
        let mut next = || body.enter(|cx, body| body.poll_frame(cx));
        test.is_undecided.set(true);
        assert_eq!(data(next()), "a", "data pass");
        for _ in 0..2 {
            assert_pending!(next());
        }
        assert_eq!(test.seen(), []);
        assert!(!body.is_end_stream(), "it is to be polled");
        test.decide(too_late);
        assert_eq!(body.is_end_stream(), told && !too_late);
        let end = assert_ready!(body.enter(|cx, body| body.poll_frame(cx)));
        match end {
            None => assert!(!trailers && !too_late),
            Some(Ok(frame)) => assert!(frame.is_trailers() && trailers && !too_late),
            Some(Err(error)) => {
                assert!(matches!(error, BodyError::Stopped(Stopped::TimedOut)) && too_late);
            }
        }
        let end = if too_late { TimedOut } else { Completed };
        assert_eq!(test.seen().last(), Some(&Seen::Ended(end)));
        assert!(assert_ready!(body.enter(|cx, body| body.poll_frame(cx))).is_none());
    }
    // An error of its own is a failure in any case.
    let test = Test::new(Stopped::TimedOut);
    let mut body = test.body(&get(), Script { fails: true, ..Script::new(&test, []) });
    test.is_undecided.set(true);
    let end = assert_ready!(body.enter(|cx, body| body.poll_frame(cx)));
    assert!(matches!(end, Some(Err(BodyError::Inner("broken")))));
    assert_eq!(test.seen(), [Seen::Ended(Failed)]);
    // Dropped meanwhile: the client has not seen the end.
    let test = Test::new(Stopped::TimedOut);
    let mut body = test.body(&get(), Script { trailers: true, ..Script::new(&test, []) });
    test.is_undecided.set(true);
    assert_pending!(body.enter(|cx, body| body.poll_frame(cx)));
    drop(body);
    let end = Disconnected;
    assert_eq!(test.seen(), [Seen::BeforeDrop(end), Seen::Dropped, Seen::Ended(end)]);
}

#[test]
fn a_body_that_is_not_to_be_written_is_ended_if_it_is_polled() {
    let test = Test::new(Stopped::TimedOut);
    let mut body = test.body(&Request::head("/").body(()).unwrap(), Script::new(&test, [None]));
    assert_eq!(test.seen(), [Seen::Ended(Completed)]);
    test.signal.give();
    let frame = assert_ready!(body.enter(|cx, body| body.poll_frame(cx)));
    assert!(matches!(frame, Some(Err(BodyError::Stopped(_)))));
    assert_eq!(test.seen(), [Seen::Ended(Completed), Seen::Dropped]);
}

#[test]
fn a_default_body_is_watched_by_nobody() {
    let body = StoppableBody::<Empty<Bytes>, Test>::default();
    assert!(body.is_end_stream());
    assert!(matches!(poll(pin!(body)), Poll::Ready(None)));
}

#[test]
fn an_error_becomes_a_boxed_one() {
    type Boxed = Box<dyn std::error::Error + Send + Sync>;
    let inner: Boxed = "broken".into();
    assert_eq!(Boxed::from(BodyError::Inner(inner)).to_string(), "broken");
    let stopped: Boxed = BodyError::<Infallible>::Stopped(Stopped::TimedOut).into();
    assert!(matches!(stopped.downcast_ref(), Some(Stopped::TimedOut)));
    let stopped: Boxed = CallError::<Infallible>::Stopped(Stopped::Shutdown).into();
    assert!(matches!(stopped.downcast_ref(), Some(Stopped::Shutdown)));
}

// Without HTTP

#[test]
fn without_http_what_comes_too_late_is_an_error() {
    for output in [Ok(1), Err("broken")] {
        let test = Test::new(Stopped::TimedOut);
        test.too_late.set(true);
        let mut response = spawn(StoppableFuture::plain(test.clone(), (), |()| ready(output)));
        let error = assert_ready_err!(response.poll());
        assert!(matches!(error, CallError::Stopped(Stopped::TimedOut)));
        assert_eq!(test.seen(), [Seen::BeforeDrop(TimedOut), Seen::Ended(TimedOut)]);
    }
}

#[test]
fn without_http_a_call_that_is_ended_is_an_error() {
    let test = Test::new(Stopped::TimedOut);
    let call = |()| test.noted(pending::<Result<(), &str>>());
    let mut response = spawn(StoppableFuture::plain(test.clone(), (), call));
    assert_pending!(response.poll());
    test.signal.give();
    assert!(response.is_woken());
    let error = assert_ready_err!(response.poll());
    assert!(matches!(error, CallError::Stopped(Stopped::TimedOut)));
    assert_eq!(error.to_string(), "the call was given up: the request took too long");
    assert_eq!(test.seen(), [Seen::BeforeDrop(TimedOut), Seen::Dropped, Seen::Ended(TimedOut)]);
}

#[test]
fn without_http_what_the_service_yields_passes() {
    for (output, end) in [(Ok(1), Completed), (Err("broken"), Failed)] {
        let test = Test::new(Stopped::TimedOut);
        test.signal.give();
        let mut response = spawn(StoppableFuture::plain(test.clone(), (), |()| ready(output)));
        match (assert_ready!(response.poll()), output) {
            (Ok(passed), Ok(yielded)) => assert_eq!(passed, yielded),
            (Err(CallError::Inner(passed)), Err(yielded)) => assert_eq!(passed, yielded),
            (passed, _) => panic!("{passed:?}"),
        }
        assert_eq!(test.seen(), [Seen::Ended(end)]);
    }
}

// The signal

#[test]
fn a_signal_wakes_all_who_wait_and_no_one_who_has_gone() {
    let signal = Signal::new();
    let mut waiting: Vec<_> = (0..100).map(|_| spawn(signal.waiter())).collect();
    for waiter in &mut waiting {
        assert_pending!(waiter.enter(|cx, mut waiter| waiter.poll_given(cx)));
    }
    let mut gone = spawn(());
    let mut waiter = signal.waiter();
    assert_pending!(gone.enter(|cx, _| waiter.poll_given(cx)));
    drop(waiter);
    assert!(!signal.is_given());
    signal.give();
    assert!(signal.is_given());
    assert!(!gone.is_woken());
    for waiter in &mut waiting {
        assert!(waiter.is_woken());
        assert_ready!(waiter.enter(|cx, mut waiter| waiter.poll_given(cx)));
    }
    let mut late = spawn(signal.waiter());
    assert_ready!(late.enter(|cx, mut waiter| waiter.poll_given(cx)));
    // Again: nothing happens.
    signal.give();
}

#[test]
fn a_waker_that_panics_keeps_no_other_from_being_woken() {
    struct Panics;
    impl Wake for Panics {
        fn wake(self: Arc<Self>) {
            panic!("the waker panics");
        }
    }
    let signal = Signal::new();
    let waker = Arc::new(Panics).into();
    let (mut before, mut bad, mut after) = (spawn(()), signal.waiter(), spawn(()));
    let mut waiters = [signal.waiter(), signal.waiter()];
    assert_pending!(before.enter(|cx, _| waiters[0].poll_given(cx)));
    assert_pending!(bad.poll_given(&mut Context::from_waker(&waker)));
    assert_pending!(after.enter(|cx, _| waiters[1].poll_given(cx)));
    signal.give();
    assert!(before.is_woken() && after.is_woken());
}

#[test]
fn a_waiter_can_move_to_another_task() {
    let signal = Signal::new();
    let mut waiter = signal.waiter();
    let (mut first, mut second) = (spawn(()), spawn(()));
    assert_pending!(first.enter(|cx, _| waiter.poll_given(cx)));
    assert_pending!(second.enter(|cx, _| waiter.poll_given(cx)));
    signal.give();
    assert!(!first.is_woken());
    assert!(second.is_woken());
}

#[test]
fn to_wait_costs_no_allocation_once_as_many_have_waited_at_once() {
    let signal = Signal::new();
    let mut cx = Context::from_waker(Waker::noop());
    let mut wait = || {
        let mut waiter = signal.waiter();
        assert_pending!(waiter.poll_given(&mut cx));
        assert_pending!(waiter.poll_given(&mut cx));
    };
    wait();
    let allocations = allocation_counter::measure(|| (0..100).for_each(|_| wait()));
    assert_eq!(allocations.count_total, 0);
    assert_eq!(size_of::<Waiter>(), 16);
}

// What it costs

#[test]
fn what_can_be_ended_is_at_most_a_pointer_larger_than_what_is_only_watched() {
    type Future = Pending<()>;
    type Inner = Empty<Bytes>;
    assert_eq!(
        size_of::<StoppableFuture<Future, Test>>(),
        size_of::<ResponseFuture<Future, Test>>() + size_of::<usize>()
    );
    assert_eq!(
        size_of::<StoppableBody<Inner, Test>>(),
        size_of::<ResponseBody<Inner, Test>>() + size_of::<usize>()
    );
}

// Helpers

type Answer = Result<Response<Script>, &'static str>;

#[derive(Clone, Copy, Debug, PartialEq)]
enum Seen {
    BeforeDrop(End),
    Dropped,
    Ended(End),
}

/// A watch that notes what it sees, and ends its response when its signal is given.
#[derive(Clone, Debug)]
struct Test {
    signal: Signal,
    waiter: Rc<RefCell<Waiter>>,
    stopped: Stopped,
    seen: Rc<RefCell<Vec<Seen>>>,
    inside: Rc<RefCell<bool>>,
    /// What comes to its own end does so too late.
    too_late: Rc<Cell<bool>>,
    /// That is not known yet.
    is_undecided: Rc<Cell<bool>>,
}

impl Test {
    fn new(stopped: Stopped) -> Self {
        let signal = Signal::new();
        let waiter = Rc::new(RefCell::new(signal.waiter()));
        let (seen, inside, too_late, is_undecided) = Default::default();
        Self { signal, waiter, stopped, seen, inside, too_late, is_undecided }
    }

    fn seen(&self) -> Vec<Seen> {
        self.seen.borrow().clone()
    }

    fn see(&self, seen: Seen) {
        self.seen.borrow_mut().push(seen);
    }

    /// From now on it is known whether what ends comes too late.
    fn decide(&self, too_late: bool) {
        self.is_undecided.set(false);
        self.too_late.set(too_late);
    }

    fn call<F: Future>(
        &self,
        request: &Request<()>,
        future: F,
    ) -> task::Spawn<StoppableFuture<F, Self>> {
        let (asked, dialect) = (Asked::of(request), Dialect::of(request));
        spawn(StoppableFuture::http(self.clone(), asked, dialect, request, |_| future))
    }

    fn body(
        &self,
        request: &Request<()>,
        script: Script,
    ) -> task::Spawn<StoppableBody<Script, Self>> {
        let mut response = Response::new(script);
        if let Some(value) = request.headers().get("content-type") {
            response.headers_mut().insert("content-type", value.clone());
        }
        let future: Ready<Answer> = ready(Ok(response));
        spawn(assert_ready_ok!(self.call(request, future).poll()).into_body())
    }

    /// `future`, whose drop is seen.
    async fn noted<F: Future>(&self, future: F) -> F::Output {
        let _noted = NoteDrop(self.clone());
        future.await
    }
}

impl Watch for Test {
    fn enter(&mut self) {
        self.inside.replace(true);
    }

    fn leave(&mut self) {
        self.inside.replace(false);
    }

    fn before_drop(&mut self, end: End) {
        self.see(Seen::BeforeDrop(end));
    }

    fn end(&mut self, end: End) {
        self.see(Seen::Ended(end));
    }
}

impl Stop for Test {
    fn poll_stop(&mut self, cx: &mut Context<'_>) -> Poll<Stopped> {
        self.waiter.borrow_mut().poll_given(cx).map(|()| self.stopped.clone())
    }

    fn poll_end(&mut self, cx: &mut Context<'_>) -> Poll<Option<Stopped>> {
        if self.is_undecided.get() {
            // Anything: who decides wakes it.
            cx.waker().wake_by_ref();
            return Poll::Pending;
        }
        Poll::Ready(self.too_late.get().then(|| self.stopped.clone()))
    }

    fn may_end(&self) -> bool {
        !self.is_undecided.get() && !self.too_late.get()
    }
}

/// Notes that it was dropped, in scope.
#[derive(Debug)]
struct NoteDrop(Test);

impl Drop for NoteDrop {
    fn drop(&mut self) {
        assert!(*self.0.inside.borrow(), "out of scope");
        self.0.see(Seen::Dropped);
    }
}

/// A body of these frames, `None` for one that does not come.
#[derive(Debug, Default)]
struct Script {
    frames: Vec<Option<&'static str>>,
    trailers: bool,
    fails: bool,
    tells_its_end: bool,
    tells_later: Rc<Cell<bool>>,
    _noted: Option<NoteDrop>,
}

impl Script {
    fn new(test: &Test, frames: impl IntoIterator<Item = Option<&'static str>>) -> Self {
        let frames = frames.into_iter().collect();
        Self { frames, _noted: Some(NoteDrop(test.clone())), ..Self::default() }
    }
}

impl Body for Script {
    type Data = Bytes;
    type Error = &'static str;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        _: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, &'static str>>> {
        match self.frames.first() {
            Some(None) => return Poll::Pending,
            Some(Some(_)) => {}
            None if self.trailers => {
                return Poll::Ready(Some(Ok(Frame::trailers(HeaderMap::new()))));
            }
            None => return Poll::Ready(self.fails.then_some(Err("broken"))),
        }
        let frame = self.frames.remove(0).map(|data| Ok(Frame::data(Bytes::from(data))));
        Poll::Ready(frame)
    }

    fn is_end_stream(&self) -> bool {
        (self.tells_its_end || self.tells_later.get()) && self.frames.is_empty()
    }

    fn size_hint(&self) -> SizeHint {
        SizeHint::default()
    }
}

fn get() -> Request<()> {
    Request::new(())
}

fn grpc(version: Version) -> Request<()> {
    let request = Request::post("/").version(version);
    request.header("content-type", "application/grpc").body(()).unwrap()
}

fn a_panic() -> Panic {
    catch(|| panic!("it hurts")).unwrap_err()
}

type Polled<E> = Poll<Option<Result<Frame<Bytes>, E>>>;

fn poll<B: Body<Data = Bytes>>(body: Pin<&mut B>) -> Polled<B::Error> {
    body.poll_frame(&mut Context::from_waker(Waker::noop()))
}

#[track_caller]
fn data<E: std::fmt::Debug>(frame: Polled<E>) -> Bytes {
    assert_ready!(frame).unwrap().unwrap().into_data().unwrap()
}
