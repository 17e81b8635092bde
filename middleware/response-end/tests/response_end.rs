//! The end of a response, step by step: nothing here needs a runtime or a socket.

#![allow(clippy::unwrap_used)]

use std::{
    cell::{Cell, RefCell},
    collections::VecDeque,
    convert::Infallible,
    fmt,
    future::{self, Ready, ready},
    hint::black_box,
    mem,
    panic::panic_any,
    pin::{Pin, pin},
    rc::Rc,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicUsize, Ordering::SeqCst},
    },
    task::{Context, Poll, Waker},
    thread,
};

use bytes::{Buf, Bytes};
use http::{HeaderMap, Method, Request, Response, StatusCode, header};
use http_body::{Body, Frame, SizeHint};
use http_body_util::{BodyExt, Empty, Full};
use proptest::{collection::vec, option, prelude::*};
use tokio_test::{
    assert_pending, assert_ready, assert_ready_err, assert_ready_ok,
    task::{self, spawn},
};
use tower::{
    Layer, Service, ServiceBuilder, ServiceExt,
    limit::{ConcurrencyLimitLayer, GlobalConcurrencyLimitLayer},
    retry::{Policy, RetryLayer},
    service_fn,
};
use tower_catch_unwind::{Panic, catch};
use tower_response_end::{
    Asked,
    End::{self, Completed, Disconnected, Failed, Panicked},
    Hold, Hook, MakeOnEnd, RequestBody, ResponseBody, ResponseEndLayer, ResponseFuture, Watch,
    hold,
};
use tower_test::mock;

// R1

#[test]
fn a_response_without_a_body_is_complete_when_it_is_handed_over() {
    for (method, status) in [
        (Method::HEAD, 200),
        (Method::HEAD, 404),
        (Method::GET, 100),
        (Method::GET, 101),
        (Method::GET, 103),
        (Method::GET, 204),
        (Method::POST, 204),
        (Method::GET, 304),
        (Method::CONNECT, 200),
        (Method::CONNECT, 299),
    ] {
        let ends = Ends::default();
        let response = answer(&ends, request(&method), reply(status, Script::new([Step::Data(3)])));
        assert_eq!(ends.told(), [Completed], "{method} {status}");
        drop(response);
        assert_eq!(ends.told(), [Completed], "{method} {status}");
    }
}

#[test]
fn any_other_response_goes_on_when_it_is_handed_over() {
    for (method, status) in [
        (Method::GET, 200),
        (Method::POST, 201),
        (Method::GET, 206),
        (Method::GET, 301),
        (Method::GET, 500),
        (Method::CONNECT, 301),
        (Method::CONNECT, 404),
    ] {
        let ends = Ends::default();
        let response = answer(&ends, request(&method), reply(status, Script::new([Step::Data(3)])));
        assert_eq!(ends.told(), [], "{method} {status}");
        drop(response);
        assert_eq!(ends.told(), [Disconnected], "{method} {status}");
    }
}

#[test]
fn a_body_that_is_not_to_be_written_can_still_be_polled() {
    // HTTP/2 does, for HEAD and 204.
    let ends = Ends::default();
    let response =
        answer(&ends, request(&Method::HEAD), reply(200, Script::new([Step::Data(3), Step::Fail])));
    let mut body = pin!(response.into_body());
    assert_eq!(shown(&poll(body.as_mut())), "data(3)");
    assert_eq!(shown(&poll(body.as_mut())), "error");
    assert_eq!(ends.told(), [Completed]);
}

// R2

#[test]
fn a_body_at_its_end_is_complete_when_it_is_handed_over() {
    let ends = Ends::default();
    let response = answer(&ends, get(), reply(200, Script::new([]).tells_its_end()));
    assert_eq!(ends.told(), [Completed]);
    assert!(response.body().is_end_stream());
    drop(response);
    assert_eq!(ends.told(), [Completed]);
}

// R3

#[test]
fn none_completes_before_the_body_is_dropped() {
    let ends = Ends::default();
    let response = answer(&ends, get(), reply(200, Script::new([Step::Data(3)])));
    let mut body = pin!(response.into_body());
    assert_eq!(shown(&poll(body.as_mut())), "data(3)");
    assert_eq!(ends.told(), []);
    assert_eq!(shown(&poll(body.as_mut())), "none");
    assert_eq!(ends.told(), [Completed]);
}

// R4

#[test]
fn trailers_complete_and_pass_unchanged() {
    let ends = Ends::default();
    let response = answer(&ends, get(), reply(200, Script::new([Step::Trailers])));
    let mut body = Box::pin(response.into_body());
    let Poll::Ready(Some(Ok(frame))) = poll(body.as_mut()) else { panic!("no frame") };
    assert_eq!(ends.told(), [Completed]);
    assert_eq!(frame.into_trailers().unwrap(), trailers());
    drop(body);
    assert_eq!(ends.told(), [Completed]);
}

// R5

#[test]
fn data_after_which_the_body_is_at_its_end_completes_in_the_same_poll() {
    let ends = Ends::default();
    let script = Script::new([Step::Pending, Step::Data(3), Step::Data(4)]).tells_its_end();
    let polls = script.polls.clone();
    let response = answer(&ends, get(), reply(200, script));
    let mut body = Box::pin(response.into_body());
    assert_eq!(shown(&poll(body.as_mut())), "pending");
    assert_eq!(shown(&poll(body.as_mut())), "data(3)");
    assert_eq!(ends.told(), []);
    // The frame is not kept back, and the hook has been called by the time it is there.
    assert_eq!(shown(&poll(body.as_mut())), "data(4)");
    assert_eq!(ends.told(), [Completed]);
    assert_eq!(polls.load(SeqCst), 3);
    drop(body);
    assert_eq!(ends.told(), [Completed]);
}

#[test]
fn an_empty_data_frame_is_no_end_by_itself() {
    let ends = Ends::default();
    let script = Script::new([Step::Data(0), Step::Data(0)]).tells_its_end();
    let response = answer(&ends, get(), reply(200, script));
    let mut body = pin!(response.into_body());
    assert_eq!(shown(&poll(body.as_mut())), "data(0)");
    assert_eq!(ends.told(), []);
    assert_eq!(shown(&poll(body.as_mut())), "data(0)");
    assert_eq!(ends.told(), [Completed]);
}

// R6

#[test]
fn a_drop_after_all_announced_bytes_completes() {
    for (announced, frames, end) in [
        (Announced::Header("7"), vec![3, 4], Completed),
        (Announced::Header("7"), vec![3, 5], Completed),
        (Announced::Header("7"), vec![3, 3], Disconnected),
        (Announced::Header("0"), vec![], Completed),
        (Announced::Hint(7), vec![3, 4], Completed),
        (Announced::Hint(7), vec![3, 3], Disconnected),
        (Announced::Hint(0), vec![], Completed),
        (Announced::Nothing, vec![3, 4], Disconnected),
        // Not numbers, or not one number.
        (Announced::Header(""), vec![], Disconnected),
        (Announced::Header("+7"), vec![7], Disconnected),
        (Announced::Header("7, 8"), vec![8], Disconnected),
        (Announced::Header("99999999999999999999"), vec![7], Disconnected),
    ] {
        let ends = Ends::default();
        let mut script = Script::new(frames.iter().copied().map(Step::Data));
        let mut response = Response::builder();
        match announced {
            Announced::Nothing => {}
            Announced::Hint(exact) => script.exact = Some(exact),
            Announced::Header(value) => {
                response = response.header(header::CONTENT_LENGTH, value);
            }
        }
        let response = answer(&ends, get(), response.body(script).unwrap());
        let mut body = Box::pin(response.into_body());
        for len in &frames {
            assert_eq!(shown(&poll(body.as_mut())), format!("data({len})"));
        }
        assert_eq!(ends.told(), [], "{announced:?} {frames:?}: ends early");
        drop(body);
        assert_eq!(ends.told(), [end], "{announced:?} {frames:?}");
    }
}

/// A body that is at its end some time after its only frame.
#[derive(Default)]
struct Late {
    is_known: Arc<AtomicBool>,
    polled: bool,
}

impl Body for Late {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(mut self: Pin<&mut Self>, _: &mut Context<'_>) -> Polled<Bytes, Infallible> {
        if mem::replace(&mut self.polled, true) {
            return Poll::Pending;
        }
        Poll::Ready(Some(Ok(Frame::data(Bytes::from_static(b"foo")))))
    }

    fn is_end_stream(&self) -> bool {
        self.polled && self.is_known.load(SeqCst)
    }
}

#[test]
fn a_drop_after_the_body_has_told_its_end_completes() {
    let body = |polled| {
        let (ends, late) = (Ends::default(), Late { polled, ..Late::default() });
        let known = late.is_known.clone();
        let body = Box::pin(answer(&ends, get(), reply(200, late)).into_body());
        (ends, known, body)
    };
    for polled in [false, true] {
        let (ends, known, mut body) = body(polled);
        if !polled {
            assert_eq!(shown(&poll(body.as_mut())), "data(3)");
        }
        assert!(!body.is_end_stream());
        known.store(true, SeqCst);
        assert!(body.is_end_stream());
        assert_eq!(ends.told(), []);
        drop(body);
        assert_eq!(ends.told(), [Completed]);
    }
    // Nobody has asked, so nobody was told the end.
    let (ends, known, unasked) = body(true);
    known.store(true, SeqCst);
    drop(unasked);
    assert_eq!(ends.told(), [Disconnected]);
    // Who asks and polls again does not take it for the end.
    let (ends, known, mut polled) = body(true);
    known.store(true, SeqCst);
    assert!(polled.is_end_stream());
    assert_eq!(shown(&poll(polled.as_mut())), "pending");
    drop(polled);
    assert_eq!(ends.told(), [Disconnected]);
}

#[test]
fn trailers_may_follow_the_last_announced_byte() {
    // HTTP/2 polls on for them.
    let ends = Ends::default();
    let mut script = Script::new([Step::Data(3), Step::Trailers]);
    script.exact = Some(3);
    let response = answer(&ends, get(), reply(200, script));
    let mut body = pin!(response.into_body());
    assert_eq!(shown(&poll(body.as_mut())), "data(3)");
    assert_eq!(ends.told(), []);
    assert_eq!(shown(&poll(body.as_mut())), "trailers");
    assert_eq!(ends.told(), [Completed]);
}

#[test]
fn the_sum_of_the_bytes_saturates() {
    /// Says that it is of `usize::MAX` bytes.
    struct Huge;
    impl Buf for Huge {
        fn remaining(&self) -> usize {
            usize::MAX
        }
        fn chunk(&self) -> &[u8] {
            &[]
        }
        fn advance(&mut self, _: usize) {}
    }
    struct HugeBody;
    impl Body for HugeBody {
        type Data = Huge;
        type Error = Infallible;
        fn poll_frame(self: Pin<&mut Self>, _: &mut Context<'_>) -> Polled<Huge, Infallible> {
            Poll::Ready(Some(Ok(Frame::data(Huge))))
        }
    }
    let ends = Ends::default();
    let response =
        Response::builder().header(header::CONTENT_LENGTH, u64::MAX).body(HugeBody).unwrap();
    let response = answer(&ends, get(), response);
    let mut body = Box::pin(response.into_body());
    for _ in 0..3 {
        assert!(matches!(poll(body.as_mut()), Poll::Ready(Some(Ok(_)))));
    }
    drop(body);
    assert_eq!(ends.told(), [Completed]);
}

// R7

#[tokio::test]
async fn an_error_of_the_service_fails_and_passes_unchanged() {
    let ends = Ends::default();
    let (mut service, mut handle) = mock::spawn_layer::<Request<()>, Response<Empty<Bytes>>, _>(
        ResponseEndLayer::new(ends.clone()),
    );
    assert_ready_ok!(service.poll_ready());
    let mut call = spawn(service.call(get()));
    assert_pending!(call.poll());
    handle.next_request().await.unwrap().1.send_error("out of ink");
    assert_eq!(ends.told(), []);
    assert!(call.is_woken());
    assert_eq!(assert_ready_err!(call.poll()).to_string(), "out of ink");
    assert_eq!(ends.told(), [Failed]);
    drop(call);
    assert_eq!(ends.told(), [Failed]);
}

#[test]
fn an_error_of_the_body_fails() {
    let ends = Ends::default();
    let script = Script::new([Step::Data(3), Step::Fail]);
    let response = answer(&ends, get(), reply(200, script));
    let mut body = Box::pin(response.into_body());
    assert_eq!(shown(&poll(body.as_mut())), "data(3)");
    assert_eq!(shown(&poll(body.as_mut())), "error");
    assert_eq!(ends.told(), [Failed]);
    drop(body);
    assert_eq!(ends.told(), [Failed]);
}

// R8

#[test]
fn a_panic_in_call_is_an_end() {
    let ends = Ends::default();
    let mut service = ResponseEndLayer::new(ends.clone()).layer(service_fn(
        |_: Request<()>| -> Ready<Result<Response<Script>, Infallible>> { panic!("in call") },
    ));
    assert!(panics(|| drop(service.call(get()))));
    assert_eq!(ends.told(), [Panicked]);
    // The service itself is as it was.
    assert!(panics(|| drop(service.call(get()))));
    assert_eq!(ends.told(), [Panicked, Panicked]);
}

#[test]
fn a_panic_of_what_makes_the_hook_leaves_the_request_without_one() {
    let make = |_: &Request<()>| -> fn(End) { panic!("no hook") };
    let answer = || service_fn(async |_| Ok::<_, Infallible>(Response::new(Empty::<Bytes>::new())));
    let layer = ResponseEndLayer::new(make);
    let mut call = spawn(layer.layer(answer()).call(get()));
    assert_eq!(assert_ready_ok!(call.poll()).status(), 200);
    let answer_any = service_fn(async |_: Request<RequestBody<()>>| {
        Ok::<_, Infallible>(Response::new(Empty::<Bytes>::new()))
    });
    let mut call = spawn(layer.clone().watch_request_body().layer(answer_any).call(get()));
    assert_eq!(assert_ready_ok!(call.poll()).status(), 200);
    let mut call = spawn(layer.plain().layer(answer()).call(get()));
    assert_eq!(assert_ready_ok!(call.poll()).status(), 200);
}

#[test]
fn a_panic_in_a_poll_of_the_future_is_an_end() {
    let ends = Ends::default();
    let mut service = ResponseEndLayer::new(ends.clone()).layer(service_fn(|_: Request<()>| {
        future::poll_fn(|_| -> Poll<Result<Response<Script>, Infallible>> {
            panic!("in the future")
        })
    }));
    let mut call = spawn(service.call(get()));
    assert!(panics(|| drop(call.poll())));
    assert_eq!(ends.told(), [Panicked]);
    drop(call);
    assert_eq!(ends.told(), [Panicked]);
}

#[test]
fn a_panic_in_the_drop_of_the_future_is_an_end() {
    let ends = Ends::default();
    let mut service = ResponseEndLayer::new(ends.clone()).layer(service_fn(|_: Request<()>| {
        let bomb = Bomb;
        async move {
            future::pending::<()>().await;
            drop(bomb);
            Ok::<_, Infallible>(Response::new(Script::new([])))
        }
    }));
    let mut call = spawn(service.call(get()));
    assert_pending!(call.poll());
    assert!(panics(|| drop(call)));
    assert_eq!(ends.told(), [Panicked]);
}

#[test]
fn a_panic_in_the_drop_of_a_future_that_is_ready_is_an_end() {
    /// Keeps its bomb, unlike an async block, until it is dropped.
    struct Loaded(Option<Response<Script>>, #[allow(dead_code)] Bomb);
    impl Future for Loaded {
        type Output = Result<Response<Script>, Infallible>;
        fn poll(mut self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<Self::Output> {
            Poll::Ready(Ok(self.0.take().unwrap()))
        }
    }
    let ends = Ends::default();
    let mut service = ResponseEndLayer::new(ends.clone())
        .layer(service_fn(|_: Request<()>| Loaded(Some(Response::new(Script::new([]))), Bomb)));
    let mut call = spawn(service.call(get()));
    assert!(panics(|| drop(call.poll())));
    drop(call);
    assert_eq!(ends.told(), [Panicked]);
}

#[test]
fn a_panic_in_a_poll_of_the_body_is_an_end() {
    let ends = Ends::default();
    let mut script = Script::new([Step::Data(3), Step::Panic]);
    // All bytes are out, but that was no end yet.
    script.exact = Some(3);
    let response = answer(&ends, get(), reply(200, script));
    let mut body = Box::pin(response.into_body());
    assert_eq!(shown(&poll(body.as_mut())), "data(3)");
    assert!(panics(|| drop(poll(body.as_mut()))));
    assert_eq!(ends.told(), [Panicked]);
    drop(body);
    assert_eq!(ends.told(), [Panicked]);
}

#[test]
fn a_panic_in_the_drop_of_the_body_is_an_end() {
    for (steps, exact) in [(vec![Step::Data(3)], None), (vec![], Some(0))] {
        let ends = Ends::default();
        let mut script = Script::new(steps);
        script.exact = exact;
        script.on_drop = Some(Box::new(|| panic!("in the drop")));
        let response = answer(&ends, get(), reply(200, script));
        assert!(panics(|| drop(response)));
        assert_eq!(ends.told(), [Panicked]);
    }
}

#[test]
fn a_panic_in_the_drop_of_a_body_that_is_over_is_not_told() {
    let ends = Ends::default();
    let mut script = Script::new([]);
    script.on_drop = Some(Box::new(|| panic!("in the drop")));
    let response = answer(&ends, get(), reply(200, script));
    let mut body = Box::pin(response.into_body());
    assert_eq!(shown(&poll(body.as_mut())), "none");
    assert!(panics(|| drop(body)));
    assert_eq!(ends.told(), [Completed]);
}

#[test]
fn a_panic_in_what_a_body_says_of_itself_is_an_end() {
    for (asked_of, hands_over) in [
        (Says::EndStream { after: 0 }, false),
        (Says::SizeHint, false),
        (Says::EndStream { after: 1 }, true),
    ] {
        let ends = Ends::default();
        let mut script = Script::new([Step::Data(3)]);
        script.panics_when_asked = Some(asked_of);
        let mut script = Some(script);
        let mut service =
            ResponseEndLayer::new(ends.clone()).layer(service_fn(move |_: Request<()>| {
                ready(Ok::<_, Infallible>(Response::new(script.take().unwrap())))
            }));
        let mut call = spawn(service.call(get()));
        match catch(|| assert_ready_ok!(call.poll())) {
            Ok(response) => {
                assert!(hands_over);
                let mut body = Box::pin(response.into_body());
                assert!(panics(|| drop(poll(body.as_mut()))));
                assert_eq!(shown(&poll(body.as_mut())), "none");
            }
            Err(_) => assert!(!hands_over),
        }
        assert_eq!(ends.told(), [Panicked], "{asked_of:?}");
        drop(call);
        assert_eq!(ends.told(), [Panicked], "{asked_of:?}");
    }
}

#[test]
fn the_answer_to_a_panic_ends_as_panicked() {
    // Even if it has no body to write.
    for method in [Method::GET, Method::HEAD] {
        let ends = Ends::default();
        let mut response = reply(500, Full::<Bytes>::from("sorry"));
        let panic: Panic = catch(|| panic!("below")).unwrap_err();
        response.extensions_mut().insert(panic);
        let response = answer(&ends, request(&method), response);
        assert_eq!(ends.told(), [Panicked]);
        let mut body = pin!(response.into_body());
        assert_eq!(shown(&poll(body.as_mut())), "data(5)");
        assert_eq!(shown(&poll(body.as_mut())), "none");
        assert_eq!(ends.told(), [Panicked]);
    }
}

// R9

#[tokio::test]
async fn dropping_the_future_is_a_disconnect() {
    for polled in [false, true] {
        let ends = Ends::default();
        let (mut service, _handle) = mock::spawn_layer::<Request<()>, Response<Empty<Bytes>>, _>(
            ResponseEndLayer::new(ends.clone()),
        );
        assert_ready_ok!(service.poll_ready());
        let mut call = spawn(service.call(get()));
        if polled {
            assert_pending!(call.poll());
        }
        assert_eq!(ends.told(), []);
        drop(call);
        assert_eq!(ends.told(), [Disconnected]);
    }
}

#[test]
fn dropping_the_body_half_way_is_a_disconnect() {
    let ends = Ends::default();
    let script = Script::new([Step::Data(3), Step::Pending, Step::Data(4)]).tells_its_end();
    let response = answer(&ends, get(), reply(200, script));
    let mut body = Box::pin(response.into_body());
    assert_eq!(shown(&poll(body.as_mut())), "data(3)");
    assert_eq!(shown(&poll(body.as_mut())), "pending");
    assert_eq!(ends.told(), []);
    drop(body);
    assert_eq!(ends.told(), [Disconnected]);
}

// All of them.

proptest! {
    #[test]
    fn the_end_is_that_of_the_first_sign(case in Case::any()) {
        let ends = Ends::default();
        let mut response = Response::builder().status(case.status);
        if let Some(length) = case.content_length {
            response = response.header(header::CONTENT_LENGTH, length);
        }
        if case.marked {
            let panic: Panic = catch(|| panic_any(())).unwrap_err();
            response = response.extension(panic);
        }
        let response = answer(
            &ends,
            request(&case.method),
            response.body(case.script()).unwrap(),
        );
        let mut body = Box::pin(response.into_body());
        let mut bare = Box::pin(case.script());
        let mut fused = false;
        for _ in 0..case.polls {
            let ours = catch(|| shown(&poll(body.as_mut())));
            if fused {
                prop_assert_eq!(ours.unwrap(), "none");
                continue;
            }
            if let Ok(theirs) = catch(|| shown(&poll(bare.as_mut()))) {
                fused = matches!(&*theirs, "none" | "error" | "trailers");
                prop_assert_eq!(ours.unwrap(), theirs);
            } else {
                fused = true;
                prop_assert!(ours.is_err());
            }
        }
        drop(body);
        prop_assert_eq!(ends.told(), [case.end()]);
    }

    #[test]
    fn what_a_body_says_of_itself_passes_unchanged(
        steps in vec(Step::any(), 0..6),
        tells_its_end: bool,
        exact in option::of(0..8_u64),
        asked in vec(0..3, 0..30),
    ) {
        let script = || {
            let mut script = Script::new(steps.clone());
            script.tells_its_end = tells_its_end;
            script.exact = exact;
            script
        };
        let ends = Ends::default();
        let mut body = Box::pin(answer(&ends, get(), reply(200, script())).into_body());
        let mut bare = Box::pin(script());
        for question in asked {
            match question {
                0 => prop_assert_eq!(body.is_end_stream(), bare.is_end_stream()),
                1 => {
                    let (ours, theirs) = (body.size_hint(), bare.size_hint());
                    prop_assert_eq!(ours.lower(), theirs.lower());
                    prop_assert_eq!(ours.upper(), theirs.upper());
                }
                _ => {
                    let ours = catch(|| shown(&poll(body.as_mut()))).ok();
                    let theirs = catch(|| shown(&poll(bare.as_mut()))).ok();
                    prop_assert_eq!(&ours, &theirs);
                    if !ours.is_some_and(|ours| ours.starts_with("data") || ours == "pending") {
                        // Over, whatever the inner body thinks of itself.
                        prop_assert!(body.is_end_stream());
                        prop_assert_eq!(body.size_hint().exact(), Some(0));
                        return Ok(());
                    }
                }
            }
        }
        // Asking has changed nothing: no end but those of the polls.
        prop_assert!(ends.told().iter().all(|end| *end == Completed));
    }
}

// The body after its end.

#[test]
fn a_body_that_says_it_is_at_its_end_is_not_polled_again() {
    let ends = Ends::default();
    let mut script = Script::new([Step::Data(3)]).tells_its_end();
    script.exact = Some(9);
    let polls = script.polls.clone();
    let mut body = Box::pin(answer(&ends, get(), reply(200, script)).into_body());
    assert_eq!(shown(&poll(body.as_mut())), "data(3)");
    // What it says of its size is its own until somebody has seen the end.
    assert_eq!(body.size_hint().exact(), Some(9));
    for _ in 0..2 {
        assert_eq!(shown(&poll(body.as_mut())), "none");
        assert_eq!(body.size_hint().exact(), Some(0));
    }
    assert_eq!(polls.load(SeqCst), 1);
    assert_eq!(ends.told(), [Completed]);
}

#[test]
fn a_body_that_is_over_yields_none_for_ever() {
    for last in [Step::Trailers, Step::Fail, Step::Panic] {
        let ends = Ends::default();
        let script = Script::new([last, Step::Data(3)]);
        let polls = script.polls.clone();
        let response = answer(&ends, get(), reply(200, script));
        let mut body = pin!(response.into_body());
        drop(catch(|| drop(poll(body.as_mut()))));
        let told = ends.told();
        assert_eq!(told.len(), 1);
        for _ in 0..3 {
            assert_eq!(shown(&poll(body.as_mut())), "none");
        }
        assert_eq!(polls.load(SeqCst), 1, "the inner body was polled again");
        assert_eq!(ends.told(), told);
    }
}

#[test]
fn none_is_not_asked_for_twice() {
    let ends = Ends::default();
    let script = Script::new([]);
    let polls = script.polls.clone();
    let response = answer(&ends, get(), reply(200, script));
    let mut body = pin!(response.into_body());
    for _ in 0..3 {
        assert_eq!(shown(&poll(body.as_mut())), "none");
    }
    assert_eq!(polls.load(SeqCst), 1);
    assert_eq!(ends.told(), [Completed]);
}

#[test]
fn a_default_body_is_watched_by_nobody() {
    let mut body = ResponseBody::<Full<Bytes>, Hook<OnEnd>>::default();
    assert!(body.is_end_stream());
    assert_eq!(body.size_hint().exact(), Some(0));
    assert_eq!(shown(&poll(Pin::new(&mut body))), "none");
}

#[test]
fn a_body_is_sync_if_the_inner_one_is() {
    fn is_send_and_sync(_: &(impl Send + Sync)) {}
    // The hooks that `Ends` makes may be sent, but not shared.
    is_send_and_sync(&answer(&Ends::default(), get(), reply(200, Script::new([]))));
}

#[test]
fn the_end_is_told_when_the_inner_body_has_been_dropped() {
    let ends = Ends::default();
    let mut script = Script::new([]);
    let seen = ends.clone();
    script.on_drop = Some(Box::new(move || assert_eq!(seen.told(), [])));
    drop(answer(&ends, get(), reply(200, script)));
    assert_eq!(ends.told(), [Disconnected]);
}

#[test]
fn a_million_frames_cost_no_allocation() {
    /// Of one byte, and empty, by turns.
    struct Drizzle(u32);
    impl Body for Drizzle {
        type Data = Bytes;
        type Error = Infallible;
        fn poll_frame(mut self: Pin<&mut Self>, _: &mut Context<'_>) -> Polled<Bytes, Infallible> {
            let data = if self.0 % 2 == 0 { Bytes::new() } else { Bytes::from_static(b"d") };
            let left = self.0.checked_sub(1);
            self.0 = left.unwrap_or(0);
            Poll::Ready(left.map(|_| Ok(Frame::data(data))))
        }
    }
    static COMPLETED: AtomicUsize = AtomicUsize::new(0);
    let mut service = ResponseEndLayer::new(|_: &Request<()>| {
        |end| assert_eq!((end, COMPLETED.fetch_add(1, SeqCst)), (Completed, 0))
    })
    .layer(service_fn(|_| ready(Ok::<_, Infallible>(Response::new(Drizzle(1_000_000))))));
    let request = get();
    let mut passed = (0, 0);
    let allocated = allocation_counter::measure(|| {
        let mut cx = Context::from_waker(Waker::noop());
        let call = pin!(service.call(request));
        let mut body = pin!(assert_ready_ok!(call.poll(&mut cx)).into_body());
        while let Some(frame) = assert_ready!(body.as_mut().poll_frame(&mut cx)) {
            passed.0 += 1;
            passed.1 += frame.unwrap().into_data().unwrap().len();
        }
    });
    assert_eq!(passed, (1_000_000, 500_000));
    assert_eq!(allocated.count_total, 0);
    assert_eq!(COMPLETED.load(SeqCst), 1);
    assert_eq!(allocation_counter::measure(|| drop(black_box(Box::new(1)))).count_total, 1);
}

// The service.

#[tokio::test]
async fn readiness_is_that_of_the_inner_service() {
    let ends = Ends::default();
    let (mut service, mut handle) = mock::spawn_layer::<Request<()>, Response<Empty<Bytes>>, _>(
        ResponseEndLayer::new(ends.clone()),
    );
    handle.allow(0);
    assert_pending!(service.poll_ready());
    handle.allow(1);
    assert!(service.is_woken());
    assert_ready_ok!(service.poll_ready());
    // The mock panics if another instance than the one that is ready is called.
    let mut call = spawn(service.call(get()));
    assert_pending!(service.poll_ready());
    let (_, reply) = handle.next_request().await.unwrap();
    reply.send_response(Response::new(Empty::new()));
    assert_ready_ok!(call.poll());
    assert_eq!(ends.told(), [Completed]);
    handle.send_error("closed");
    assert_eq!(assert_ready_err!(service.poll_ready()).to_string(), "closed");
    assert_eq!(ends.told(), [Completed]);
}

#[tokio::test]
async fn dropping_a_ready_service_gives_back_what_it_reserved() {
    let ends = Ends::default();
    let (service, _handle) =
        mock::spawn_with::<Request<()>, Response<Empty<Bytes>>, _, _>(|mock| {
            ServiceBuilder::new()
                .layer(ResponseEndLayer::new(ends.clone()))
                .layer(ConcurrencyLimitLayer::new(1))
                .service(mock)
        });
    let (mut first, mut second) = (service.clone(), service);
    assert_ready_ok!(first.poll_ready());
    assert_pending!(second.poll_ready());
    drop(first);
    assert!(second.is_woken());
    assert_ready_ok!(second.poll_ready());
    assert_eq!(ends.told(), []);
}

#[tokio::test]
async fn the_end_is_told_when_the_future_has_given_back_what_it_held() {
    let permits = Arc::new(tokio::sync::Semaphore::new(1));
    let free_at_end = Arc::new(Mutex::new(None));
    let (in_hook, told) = (permits.clone(), free_at_end.clone());
    let mut service = ServiceBuilder::new()
        .layer(ResponseEndLayer::new(move |_: &Request<()>| {
            let (permits, told) = (in_hook.clone(), told.clone());
            move |end| *told.lock().unwrap() = Some((end, permits.available_permits()))
        }))
        .layer(GlobalConcurrencyLimitLayer::with_semaphore(permits.clone()))
        .service(service_fn(|_| future::pending::<Result<Response<Script>, Infallible>>()));
    let call = service.ready().await.unwrap().call(get());
    drop(call);
    assert_eq!(*free_at_end.lock().unwrap(), Some((Disconnected, 1)));
    assert_eq!(permits.available_permits(), 1);
}

#[tokio::test]
async fn every_attempt_of_a_retry_has_its_end_and_the_request_has_one() {
    #[derive(Clone)]
    struct Twice;
    impl Policy<Request<()>, Response<Wrapped<Script>>, Infallible> for Twice {
        type Future = Ready<()>;
        fn retry(
            &mut self,
            _: &mut Request<()>,
            result: &mut Result<Response<Wrapped<Script>>, Infallible>,
        ) -> Option<Ready<()>> {
            let busy = matches!(result, Ok(response) if response.status() == 503);
            busy.then(|| ready(()))
        }
        fn clone_request(&mut self, request: &Request<()>) -> Option<Request<()>> {
            Some(request.clone())
        }
    }
    let (attempts, requests) = (Ends::default(), Ends::default());
    let mut statuses = [200, 503, 503].to_vec();
    let statuses = Arc::new(Mutex::new(&mut statuses));
    let service = ServiceBuilder::new()
        .layer(ResponseEndLayer::new(requests.clone()))
        .layer(RetryLayer::new(Twice))
        .layer(ResponseEndLayer::new(attempts.clone()))
        .service(service_fn(|_| {
            let status = statuses.lock().unwrap().pop().unwrap();
            ready(Ok::<_, Infallible>(reply(status, Script::new([Step::Data(1)]))))
        }));
    let response = service.oneshot(get()).await.unwrap();
    assert_eq!(attempts.told(), [Disconnected, Disconnected]);
    assert_eq!(requests.told(), []);
    response.into_body().collect().await.unwrap();
    assert_eq!(attempts.told(), [Disconnected, Disconnected, Completed]);
    assert_eq!(requests.told(), [Completed]);
}

#[tokio::test]
async fn the_loser_of_a_hedge_is_disconnected() {
    let ends = Ends::default();
    let (mut service, mut handle) = mock::spawn_layer::<Request<()>, Response<Empty<Bytes>>, _>(
        ResponseEndLayer::new(ends.clone()),
    );
    assert_ready_ok!(service.poll_ready());
    let mut slow = spawn(service.call(get()));
    assert_ready_ok!(service.poll_ready());
    let mut fast = spawn(service.call(get()));
    assert_pending!(slow.poll());
    assert_pending!(fast.poll());
    let (_, _slow) = handle.next_request().await.unwrap();
    let (_, reply) = handle.next_request().await.unwrap();
    reply.send_response(Response::new(Empty::new()));
    let response = assert_ready_ok!(fast.poll());
    drop(slow);
    assert_eq!(ends.told(), [Completed, Disconnected]);
    drop(response);
    assert_eq!(ends.told(), [Completed, Disconnected]);
}

// The hook.

#[test]
fn the_hook_is_made_of_the_request_before_the_service_sees_it() {
    let uri = Arc::new(Mutex::new(None));
    let (in_make, in_service) = (uri.clone(), uri.clone());
    let layer = ResponseEndLayer::new(move |request: &Request<()>| {
        *in_make.lock().unwrap() = Some(request.uri().clone());
        |_| {}
    });
    let mut service = layer.layer(service_fn(move |request: Request<()>| {
        assert_eq!(in_service.lock().unwrap().as_ref(), Some(request.uri()));
        ready(Ok::<_, Infallible>(Response::new(Script::new([]))))
    }));
    drop(service.call(Request::get("/order").body(()).unwrap()));
    assert_eq!(uri.lock().unwrap().as_ref().unwrap(), "/order");
}

#[test]
fn a_panic_of_the_hook_reaches_nobody() {
    fn panicking(calls: &Arc<AtomicUsize>) -> impl Fn(&Request<()>) -> OnEnd + Clone {
        let calls = calls.clone();
        move |_| {
            let calls = calls.clone();
            Box::new(move |_| {
                calls.fetch_add(1, SeqCst);
                // Its payload panics when it is dropped.
                panic_any(Bomb)
            })
        }
    }
    let calls = Arc::new(AtomicUsize::new(0));
    let layer = ResponseEndLayer::new(panicking(&calls));

    // In a poll of the body: the frame comes through.
    let script = Script::new([Step::Data(3)]).tells_its_end();
    let mut script = Some(script);
    let mut service = layer.layer(service_fn(move |_: Request<()>| {
        ready(Ok::<_, Infallible>(Response::new(script.take().unwrap())))
    }));
    let response = assert_ready_ok!(spawn(service.call(get())).poll());
    let mut body = Box::pin(response.into_body());
    assert_eq!(shown(&poll(body.as_mut())), "data(3)");
    assert_eq!(calls.load(SeqCst), 1);

    // In a drop.
    let mut service = layer.layer(service_fn(|_: Request<()>| {
        future::pending::<Result<Response<Script>, Infallible>>()
    }));
    drop(service.call(get()));
    assert_eq!(calls.load(SeqCst), 2);

    // While the service's own panic unwinds, which is the one that goes on.
    let mut service =
        layer.layer(service_fn(|_: Request<()>| -> Ready<Result<Response<Script>, Infallible>> {
            panic!("its own")
        }));
    let panic = catch(|| drop(service.call(get()))).unwrap_err();
    assert_eq!(panic.message(), "its own");
    assert_eq!(calls.load(SeqCst), 3);
}

// Holds.

#[test]
fn a_hold_delays_the_end_until_it_is_dropped() {
    let ends = Ends::default();
    let (response, held) = hold_in_handler(&ends, reply(101, Script::new([])));
    drop(response);
    assert_eq!(ends.told(), []);
    drop(held);
    assert_eq!(ends.told(), [Completed]);
}

#[test]
fn the_end_that_is_told_after_a_hold_is_that_of_the_first_sign() {
    let ends = Ends::default();
    let (response, held) = hold_in_handler(&ends, reply(200, Script::new([Step::Fail])));
    let mut body = Box::pin(response.into_body());
    assert_eq!(shown(&poll(body.as_mut())), "error");
    assert_eq!(shown(&poll(body.as_mut())), "none");
    drop(body);
    assert_eq!(ends.told(), []);
    drop(held);
    assert_eq!(ends.told(), [Failed]);
}

#[test]
fn a_hold_that_is_gone_before_the_end_changes_nothing() {
    let ends = Ends::default();
    let (response, held) = hold_in_handler(&ends, reply(200, Script::new([])));
    drop(held);
    assert_eq!(ends.told(), []);
    let mut body = pin!(response.into_body());
    assert_eq!(shown(&poll(body.as_mut())), "none");
    assert_eq!(ends.told(), [Completed]);
}

#[test]
fn of_two_holds_the_last_counts() {
    let ends = Ends::default();
    let (first, second) = (Slot::default(), Slot::default());
    let (response, ()) = with_handler(&ends, reply(204, Script::new([])), || {
        first.put(hold());
        second.put(hold());
    });
    drop(response);
    first.release();
    assert_eq!(ends.told(), []);
    second.release();
    assert_eq!(ends.told(), [Completed]);
}

#[test]
fn a_hold_can_be_taken_where_the_body_is_polled() {
    let ends = Ends::default();
    let slot = Slot::default();
    let mut script = Script::new([Step::Data(3)]);
    let in_poll = slot.clone();
    script.on_poll = Some(Box::new(move || in_poll.put(hold())));
    let response = answer(&ends, get(), reply(200, script));
    let mut body = Box::pin(response.into_body());
    assert_eq!(shown(&poll(body.as_mut())), "data(3)");
    drop(body);
    assert_eq!(ends.told(), []);
    slot.release();
    assert_eq!(ends.told(), [Disconnected]);
}

#[test]
fn a_hold_that_is_taken_after_the_end_holds_nothing() {
    let ends = Ends::default();
    let slot = Slot::default();
    let mut script = Script::new([]).tells_its_end();
    let in_drop = slot.clone();
    script.on_drop = Some(Box::new(move || in_drop.put(hold())));
    let response = answer(&ends, get(), reply(200, script));
    assert_eq!(ends.told(), [Completed]);
    drop(response);
    assert!(slot.is_full());
    slot.release();
    assert_eq!(ends.told(), [Completed]);
}

#[test]
fn a_hold_holds_the_responses_around_it() {
    for holds_first in [false, true] {
        let (outer, inner) = (Ends::default(), Ends::default());
        let slot = Slot::default();
        let in_handler = slot.clone();
        let mut service = ServiceBuilder::new()
            .layer(ResponseEndLayer::new(outer.clone()))
            .layer(ResponseEndLayer::new(inner.clone()))
            .service(service_fn(move |_: Request<()>| {
                let slot = in_handler.clone();
                if holds_first {
                    // In `call`, not in the future.
                    slot.put(hold());
                }
                async move {
                    if !holds_first {
                        slot.put(hold());
                    }
                    Ok::<_, Infallible>(reply(204, Script::new([])))
                }
            }));
        drop(assert_ready_ok!(spawn(service.call(get())).poll()));
        assert_eq!((outer.told(), inner.told()), (vec![], vec![]));
        slot.release();
        assert_eq!((outer.told(), inner.told()), (vec![Completed], vec![Completed]));
    }
}

#[test]
fn a_hold_does_not_hold_what_is_served_inside_of_it() {
    let (outer, inner) = (Ends::default(), Ends::default());
    let slot = Slot::default();
    let in_handler = slot.clone();
    let part = ServiceBuilder::new()
        .layer(ResponseEndLayer::new(inner.clone()))
        .service(service_fn(|_| ready(Ok::<_, Infallible>(reply(204, Script::new([]))))));
    let mut service =
        ResponseEndLayer::new(outer.clone()).layer(service_fn(move |request: Request<()>| {
            in_handler.put(hold());
            let mut part = part.clone();
            async move {
                // In process, as a batch does for each of its parts.
                part.call(request.clone()).await?;
                part.call(request).await
            }
        }));
    drop(assert_ready_ok!(spawn(service.call(get())).poll()));
    assert_eq!((outer.told(), inner.told()), (vec![], vec![Completed, Completed]));
    slot.release();
    assert_eq!((outer.told(), inner.told()), (vec![Completed], vec![Completed, Completed]));
}

#[test]
fn one_of_several_responses_inside_can_hold_the_one_around() {
    let (outer, inner) = (Ends::default(), Ends::default());
    let slots = [Slot::default(), Slot::default()];
    let mut next = slots.clone().into_iter();
    let part = Arc::new(Mutex::new(ResponseEndLayer::new(inner.clone()).layer(service_fn(
        move |_: Request<()>| {
            next.next().unwrap().put(hold());
            ready(Ok::<_, Infallible>(reply(204, Script::new([]))))
        },
    ))));
    let mut service =
        ResponseEndLayer::new(outer.clone()).layer(service_fn(move |request: Request<()>| {
            let part = part.clone();
            async move {
                let first = part.lock().unwrap().call(request.clone());
                let second = part.lock().unwrap().call(request);
                first.await?;
                second.await
            }
        }));
    drop(assert_ready_ok!(spawn(service.call(get())).poll()));
    assert_eq!((outer.told(), inner.told()), (vec![], vec![]));
    slots[0].release();
    assert_eq!((outer.told(), inner.told()), (vec![], vec![Completed]));
    slots[1].release();
    assert_eq!((outer.told(), inner.told()), (vec![Completed], vec![Completed, Completed]));
}

#[test]
fn a_hold_that_is_dropped_where_it_was_taken_holds_nothing_around() {
    let (outer, inner) = (Ends::default(), Ends::default());
    let mut service = ServiceBuilder::new()
        .layer(ResponseEndLayer::new(outer.clone()))
        .layer(ResponseEndLayer::new(inner.clone()))
        .service(service_fn(|_: Request<()>| {
            drop(hold().unwrap());
            ready(Ok::<_, Infallible>(reply(204, Script::new([]))))
        }));
    let response = assert_ready_ok!(spawn(service.call(get())).poll());
    assert_eq!((outer.told(), inner.told()), (vec![Completed], vec![Completed]));
    drop(response);
}

#[test]
fn a_panic_of_one_hook_does_not_keep_the_next_from_being_called() {
    let ends = Ends::default();
    let slot = Slot::default();
    let in_handler = slot.clone();
    let mut service = ServiceBuilder::new()
        .layer(ResponseEndLayer::new(ends.clone()))
        .layer(ResponseEndLayer::new(|_: &Request<()>| |_| panic!("in a hook")))
        .service(service_fn(move |_: Request<()>| {
            in_handler.put(hold());
            ready(Ok::<_, Infallible>(reply(204, Script::new([]))))
        }));
    drop(assert_ready_ok!(spawn(service.call(get())).poll()));
    slot.release();
    assert_eq!(ends.told(), [Completed]);
}

#[test]
fn a_hold_can_be_dropped_on_another_thread() {
    let ends = Ends::default();
    let (response, held) = hold_in_handler(&ends, reply(101, Script::new([])));
    drop(response);
    thread::spawn(move || drop(held)).join().unwrap();
    assert_eq!(ends.told(), [Completed]);
}

#[test]
fn a_leaked_hold_leaves_the_response_open() {
    let ends = Ends::default();
    let (response, held) = hold_in_handler(&ends, reply(101, Script::new([])));
    std::mem::forget(held);
    drop(response);
    assert_eq!(ends.told(), []);
}

#[test]
fn outside_of_a_layer_there_is_nothing_to_hold() {
    assert!(hold().is_none());
    let ends = Ends::default();
    let (response, held) = hold_in_handler(&ends, reply(101, Script::new([])));
    assert!(hold().is_none(), "the handler's scope is left again");
    // Holds are of the thread that serves, not of its children.
    let (_response, other) = with_handler(&ends, reply(101, Script::new([])), || {
        thread::spawn(|| hold().is_none()).join().unwrap()
    });
    assert!(other);
    drop((response, held));
    // A panic leaves it as well.
    let mut service = ResponseEndLayer::new(ends).layer(service_fn(
        |_: Request<()>| -> Ready<Result<Response<Script>, Infallible>> {
            let _held = hold();
            panic!("while it holds")
        },
    ));
    assert!(panics(|| drop(service.call(get()))));
    assert!(hold().is_none());
}

#[test]
fn the_holds_of_two_requests_do_not_mix() {
    let ends = [Ends::default(), Ends::default()];
    let slots = [Slot::default(), Slot::default()];
    let mut calls: Vec<_> = ends
        .iter()
        .zip(&slots)
        .map(|(ends, slot)| {
            let slot = slot.clone();
            let mut service =
                ResponseEndLayer::new(ends.clone()).layer(service_fn(move |_: Request<()>| {
                    let slot = slot.clone();
                    async move {
                        let first = hold();
                        yield_once().await;
                        slot.put(hold());
                        drop(first);
                        Ok::<_, Infallible>(reply(204, Script::new([])))
                    }
                }));
            spawn(service.call(get()))
        })
        .collect();
    for call in &mut calls {
        assert_pending!(call.poll());
    }
    for call in &mut calls {
        assert_ready_ok!(call.poll());
    }
    slots[1].release();
    assert_eq!((ends[0].told(), ends[1].told()), (vec![], vec![Completed]));
    slots[0].release();
    assert_eq!(ends[0].told(), [Completed]);
}

// A layer for any other service.

#[tokio::test]
async fn without_http_the_response_is_over_when_its_future_is() {
    let ends = Ends::default();
    let (mut service, mut handle) =
        mock::spawn_layer::<&str, &str, _>(ResponseEndLayer::new(ends.clone()).plain());
    assert_ready_ok!(service.poll_ready());
    let mut call = spawn(service.call("job"));
    assert_pending!(call.poll());
    handle.next_request().await.unwrap().1.send_response("done");
    assert_eq!(ends.told(), []);
    assert_eq!(assert_ready_ok!(call.poll()), "done");
    assert_eq!(ends.told(), [Completed]);
    drop(call);
    assert_eq!(ends.told(), [Completed]);

    assert_ready_ok!(service.poll_ready());
    let mut call = spawn(service.call("job"));
    assert_pending!(call.poll());
    handle.next_request().await.unwrap().1.send_error("no paper");
    assert_eq!(assert_ready_err!(call.poll()).to_string(), "no paper");
    assert_eq!(ends.told(), [Completed, Failed]);

    assert_ready_ok!(service.poll_ready());
    let mut call = spawn(service.call("job"));
    assert_pending!(call.poll());
    drop(call);
    assert_eq!(ends.told(), [Completed, Failed, Disconnected]);
}

#[test]
fn without_http_a_panic_is_an_end_too() {
    let ends = Ends::default();
    let layer = ResponseEndLayer::new(ends.clone()).plain();
    let mut service =
        layer.layer(service_fn(|_: u8| -> Ready<Result<(), Infallible>> { panic!("in call") }));
    assert!(panics(|| drop(service.call(1))));
    assert_eq!(ends.told(), [Panicked]);
    let mut service = layer.layer(service_fn(|_: u8| {
        future::poll_fn(|_| -> Poll<Result<(), Infallible>> { panic!("in the future") })
    }));
    let mut call = spawn(service.call(1));
    assert!(panics(|| assert_ready_ok!(call.poll())));
    drop(call);
    assert_eq!(ends.told(), [Panicked, Panicked]);
}

#[test]
fn without_http_a_response_can_be_held() {
    let ends = Ends::default();
    let slot = Slot::default();
    let in_handler = slot.clone();
    let mut service =
        ResponseEndLayer::new(ends.clone()).plain().layer(service_fn(move |_: u8| {
            in_handler.put(hold());
            ready(Ok::<_, Infallible>(()))
        }));
    assert_ready_ok!(spawn(service.call(1)).poll());
    assert_eq!(ends.told(), []);
    slot.release();
    assert_eq!(ends.told(), [Completed]);
}

// The request's body.

#[test]
fn an_error_of_reading_the_request_is_a_disconnect_at_once() {
    for answers in [false, true] {
        let ends = Ends::default();
        let layer = ResponseEndLayer::new(ends.clone()).watch_request_body();
        let mut service = layer.layer(service_fn(
            async |request: Request<RequestBody<Script>>| -> Result<_, Infallible> {
                let mut body = pin!(request.into_body());
                assert!(body.frame().await.unwrap().is_ok());
                yield_once().await;
                assert!(body.frame().await.unwrap().is_err());
                if !answers {
                    future::pending::<()>().await;
                }
                Ok(reply(400, Script::new([]).tells_its_end()))
            },
        ));
        let upload = Script::new([Step::Data(3), Step::Fail]);
        let mut call = spawn(service.call(Request::post("/").body(upload).unwrap()));
        assert_pending!(call.poll());
        assert_eq!(ends.told(), []);
        if answers {
            let response = assert_ready_ok!(call.poll());
            assert_eq!(response.status(), 400);
        } else {
            assert_pending!(call.poll());
        }
        assert_eq!(ends.told(), [Disconnected]);
        drop(call);
        assert_eq!(ends.told(), [Disconnected]);
    }
}

#[test]
fn an_error_of_reading_on_another_task_wakes_the_response() {
    let ends = Ends::default();
    let (mut call, mut reader) =
        upload_elsewhere(&ends, Script::new([Step::Pending, Step::Fail]), future::pending());
    assert_pending!(call.poll());
    assert_pending!(reader.poll());
    assert!(!call.is_woken());
    assert!(assert_ready!(reader.poll()).is_err());
    assert!(call.is_woken());
    assert_eq!(ends.told(), []);
    assert_pending!(call.poll());
    assert_eq!(ends.told(), [Disconnected]);
}

#[test]
fn an_error_of_reading_on_another_task_wakes_the_body() {
    let ends = Ends::default();
    let (mut call, mut reader) = upload_elsewhere(
        &ends,
        Script::new([Step::Pending, Step::Fail]),
        ready(reply(200, Script::new([Step::Pending, Step::Pending]))),
    );
    let response = assert_ready_ok!(call.poll());
    let mut body = spawn(response.into_body());
    assert_pending!(body.enter(|cx, body| body.poll_frame(cx)));
    assert_pending!(reader.poll());
    assert!(assert_ready!(reader.poll()).is_err());
    // The task of the body and no longer that of the future, if they are two.
    assert!(body.is_woken());
    assert!(!call.is_woken());
    assert_pending!(body.enter(|cx, body| body.poll_frame(cx)));
    assert_eq!(ends.told(), [Disconnected]);
}

#[test]
fn an_error_of_reading_before_the_first_poll_is_seen_by_it() {
    let ends = Ends::default();
    let (mut call, mut reader) =
        upload_elsewhere(&ends, Script::new([Step::Fail]), future::pending());
    assert!(assert_ready!(reader.poll()).is_err());
    assert_eq!(ends.told(), []);
    assert_pending!(call.poll());
    assert_eq!(ends.told(), [Disconnected]);
}

#[test]
fn an_upload_that_arrives_whole_is_no_sign() {
    let ends = Ends::default();
    let (mut call, mut reader) = upload_elsewhere(
        &ends,
        Script::new([Step::Data(3), Step::Trailers]),
        ready(reply(200, Script::new([Step::Data(3)]))),
    );
    assert!(assert_ready!(reader.poll()).is_ok());
    let response = assert_ready_ok!(call.poll());
    let mut body = pin!(response.into_body());
    assert_eq!(shown(&poll(body.as_mut())), "data(3)");
    assert_eq!(ends.told(), []);
    assert_eq!(shown(&poll(body.as_mut())), "none");
    assert_eq!(ends.told(), [Completed]);
}

#[test]
fn an_error_of_reading_after_the_end_changes_nothing() {
    let ends = Ends::default();
    let (mut call, mut reader) =
        upload_elsewhere(&ends, Script::new([Step::Fail]), ready(reply(200, Script::new([]))));
    let response = assert_ready_ok!(call.poll());
    let mut body = Box::pin(response.into_body());
    assert_eq!(shown(&poll(body.as_mut())), "none");
    assert!(assert_ready!(reader.poll()).is_err());
    assert_eq!(shown(&poll(body.as_mut())), "none");
    drop(body);
    assert_eq!(ends.told(), [Completed]);
}

#[test]
fn the_request_body_passes_unchanged() {
    let mut service = ResponseEndLayer::new(Ends::default()).watch_request_body().layer(
        service_fn(async |request: Request<RequestBody<Script>>| {
            let mut body = request.into_body();
            assert_eq!(body.size_hint().exact(), Some(3));
            assert!(!body.is_end_stream());
            let frame = body.frame().await.unwrap().unwrap();
            assert_eq!(frame.into_data().unwrap(), "ddd");
            assert!(body.is_end_stream());
            assert!(body.into_inner().steps.is_empty());
            Ok::<_, Infallible>(reply(204, Script::new([])))
        }),
    );
    let mut upload = Script::new([Step::Data(3)]).tells_its_end();
    upload.exact = Some(3);
    let mut call = spawn(service.call(Request::post("/").body(upload).unwrap()));
    assert_ready_ok!(call.poll());
}

// A layer that is built on this one.

#[test]
fn all_code_of_the_inner_service_runs_in_scope_and_the_end_is_told_once() {
    let log = Rc::new(Log::default());
    let inner = log.clone();
    let call = ResponseFuture::http(Recording(log.clone()), Asked::of(&get()), get(), move |_| {
        inner.note("call");
        NotingFuture(inner)
    });
    let response = assert_ready_ok!(spawn(call).poll());
    let mut body = Box::pin(response.into_body());
    assert_eq!(shown(&poll(body.as_mut())), "data(3)");
    assert_eq!(shown(&poll(body.as_mut())), "none");
    drop(body);
    assert_eq!(
        log.lines(),
        [
            "in: call",
            "in: poll of the future",
            "in: drop of the future",
            "in: poll of the body",
            "in: poll of the body",
            "out: Completed",
            "in: drop of the body",
        ]
    );

    let log = Rc::new(Log::default());
    let inner = log.clone();
    drop(ResponseFuture::http(Recording(log.clone()), Asked::of(&get()), get(), move |_| {
        NotingFuture(inner)
    }));
    assert_eq!(
        log.lines(),
        ["out: before the drop", "in: drop of the future", "out: Disconnected"]
    );
}

#[derive(Default)]
struct Log {
    inside: Cell<bool>,
    lines: RefCell<Vec<String>>,
}

impl Log {
    fn note(&self, what: &str) {
        let place = if self.inside.get() { "in" } else { "out" };
        self.lines.borrow_mut().push(format!("{place}: {what}"));
    }

    fn lines(&self) -> Vec<String> {
        self.lines.borrow().clone()
    }
}

struct Recording(Rc<Log>);

impl Watch for Recording {
    fn enter(&mut self) {
        self.0.inside.set(true);
    }

    fn leave(&mut self) {
        self.0.inside.set(false);
    }

    fn before_drop(&mut self, end: End) {
        assert_eq!(end, Disconnected);
        self.0.note("before the drop");
    }

    fn end(&mut self, end: End) {
        self.0.note(&format!("{end:?}"));
    }
}

struct NotingFuture(Rc<Log>);

impl Future for NotingFuture {
    type Output = Result<Response<NotingBody>, Infallible>;

    fn poll(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<Self::Output> {
        self.0.note("poll of the future");
        let log = self.0.clone();
        Poll::Ready(Ok(Response::new(NotingBody(log, Some("foo".into())))))
    }
}

impl Drop for NotingFuture {
    fn drop(&mut self) {
        self.0.note("drop of the future");
    }
}

struct NotingBody(Rc<Log>, Option<Bytes>);

impl Body for NotingBody {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(mut self: Pin<&mut Self>, _: &mut Context<'_>) -> Polled<Bytes, Infallible> {
        self.0.note("poll of the body");
        Poll::Ready(self.1.take().map(|data| Ok(Frame::data(data))))
    }
}

impl Drop for NotingBody {
    fn drop(&mut self) {
        self.0.note("drop of the body");
    }
}

// What the tests share.

type OnEnd = Box<dyn FnOnce(End) + Send>;
type Wrapped<B> = ResponseBody<B, Hook<OnEnd>>;
type Polled<D, E> = Poll<Option<Result<Frame<D>, E>>>;

/// Makes hooks, and knows what they were told, in order.
#[derive(Clone, Default)]
struct Ends(Arc<Mutex<Vec<End>>>);

impl Ends {
    fn told(&self) -> Vec<End> {
        self.0.lock().unwrap().clone()
    }
}

impl<Req> MakeOnEnd<Req> for Ends {
    type OnEnd = OnEnd;

    fn make_on_end(&self, _: &Req) -> OnEnd {
        let told = self.0.clone();
        Box::new(move |end| told.lock().unwrap().push(end))
    }
}

fn request(method: &Method) -> Request<()> {
    Request::builder().method(method).body(()).unwrap()
}

fn get() -> Request<()> {
    request(&Method::GET)
}

fn reply<B>(status: u16, body: B) -> Response<B> {
    Response::builder().status(status).body(body).unwrap()
}

/// The response as the layer hands it over.
fn answer<B: Body>(
    ends: &Ends,
    request: Request<()>,
    response: Response<B>,
) -> Response<Wrapped<B>> {
    let mut response = Some(response);
    let layer = ResponseEndLayer::new(ends.clone());
    let mut service =
        layer.layer(service_fn(|_| ready(Ok::<_, Infallible>(response.take().unwrap()))));
    let mut call = spawn(service.call(request));
    assert_ready_ok!(call.poll())
}

/// The response as the layer hands it over, and what the handler got from `f`.
fn with_handler<R>(
    ends: &Ends,
    response: Response<Script>,
    f: impl FnOnce() -> R,
) -> (Response<Wrapped<Script>>, R) {
    let mut result = None;
    let mut handler = Some(|| (response, f()));
    let mut service = ResponseEndLayer::new(ends.clone()).layer(service_fn(|_| {
        let (response, got) = handler.take().unwrap()();
        result = Some(got);
        ready(Ok::<_, Infallible>(response))
    }));
    let response = assert_ready_ok!(spawn(service.call(get())).poll());
    drop(service);
    (response, result.unwrap())
}

fn hold_in_handler(ends: &Ends, response: Response<Script>) -> (Response<Wrapped<Script>>, Hold) {
    let (response, held) = with_handler(ends, response, hold);
    (response, held.unwrap())
}

/// Where a handler leaves its hold.
#[derive(Clone, Default)]
struct Slot(Arc<Mutex<Option<Hold>>>);

impl Slot {
    fn put(&self, held: Option<Hold>) {
        assert!(held.is_some());
        *self.0.lock().unwrap() = held;
    }

    fn is_full(&self) -> bool {
        self.0.lock().unwrap().is_some()
    }

    fn release(&self) {
        let held = self.0.lock().unwrap().take();
        assert!(held.is_some());
    }
}

/// A call of a service that lets another task read the request, and that task.
#[allow(clippy::type_complexity)]
fn upload_elsewhere(
    ends: &Ends,
    upload: Script,
    response: impl Future<Output = Response<Script>>,
) -> (
    task::Spawn<impl Future<Output = Result<Response<Wrapped<Script>>, Infallible>>>,
    task::Spawn<impl Future<Output = Result<(), Broken>>>,
) {
    let mut body = None;
    let mut response = Some(response);
    let layer = ResponseEndLayer::new(ends.clone()).watch_request_body();
    let call = layer
        .layer(service_fn(|request: Request<RequestBody<Script>>| {
            body = Some(request.into_body());
            let response = response.take().unwrap();
            async { Ok::<_, Infallible>(response.await) }
        }))
        .call(Request::post("/").body(upload).unwrap());
    let mut body = Box::pin(body.unwrap());
    let reader = async move {
        while let Some(frame) = body.frame().await {
            frame?;
        }
        Ok(())
    };
    (spawn(call), spawn(reader))
}

/// Pending once.
async fn yield_once() {
    let mut yielded = false;
    future::poll_fn(|_| {
        if std::mem::replace(&mut yielded, true) { Poll::Ready(()) } else { Poll::Pending }
    })
    .await;
}

/// Panics when it is dropped.
struct Bomb;

impl Drop for Bomb {
    fn drop(&mut self) {
        panic!("boom");
    }
}

fn panics(f: impl FnOnce()) -> bool {
    catch(f).is_err()
}

fn poll<B: Body>(body: Pin<&mut B>) -> Polled<B::Data, B::Error> {
    body.poll_frame(&mut Context::from_waker(Waker::noop()))
}

fn shown<D: Buf, E>(frame: &Polled<D, E>) -> String {
    match frame {
        Poll::Pending => "pending".to_owned(),
        Poll::Ready(None) => "none".to_owned(),
        Poll::Ready(Some(Err(_))) => "error".to_owned(),
        Poll::Ready(Some(Ok(frame))) => match frame.data_ref() {
            Some(data) => format!("data({})", data.remaining()),
            None => "trailers".to_owned(),
        },
    }
}

fn trailers() -> HeaderMap {
    let mut trailers = HeaderMap::new();
    trailers.insert("grpc-status", 0.into());
    trailers
}

#[derive(Debug)]
enum Announced {
    Nothing,
    Hint(u64),
    Header(&'static str),
}

/// What a body is asked, by others than those that poll it.
#[derive(Clone, Copy, Debug)]
enum Says {
    SizeHint,
    EndStream { after: usize },
}

#[derive(Clone, Copy, Debug)]
enum Step {
    Pending,
    Data(usize),
    Trailers,
    Fail,
    Panic,
}

impl Step {
    fn any() -> impl Strategy<Value = Self> {
        prop_oneof![
            Just(Self::Pending),
            (0..4_usize).prop_map(Self::Data),
            (0..4_usize).prop_map(Self::Data),
            Just(Self::Trailers),
            Just(Self::Fail),
            Just(Self::Panic),
        ]
    }
}

type Action = Box<dyn FnOnce() + Send + Sync>;

/// A body that does what it is told.
#[derive(Default)]
struct Script {
    steps: VecDeque<Step>,
    tells_its_end: bool,
    exact: Option<u64>,
    polls: Arc<AtomicUsize>,
    panics_when_asked: Option<Says>,
    on_poll: Option<Action>,
    on_drop: Option<Action>,
}

impl Script {
    fn new(steps: impl IntoIterator<Item = Step>) -> Self {
        let mut script = Self::default();
        script.steps.extend(steps);
        script
    }

    fn tells_its_end(mut self) -> Self {
        self.tells_its_end = true;
        self
    }
}

impl fmt::Debug for Script {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(&self.steps).finish()
    }
}

impl Body for Script {
    type Data = Bytes;
    type Error = Broken;

    fn poll_frame(mut self: Pin<&mut Self>, _: &mut Context<'_>) -> Polled<Bytes, Broken> {
        self.polls.fetch_add(1, SeqCst);
        if let Some(action) = self.on_poll.take() {
            action();
        }
        Poll::Ready(match self.steps.pop_front() {
            None => None,
            Some(Step::Pending) => return Poll::Pending,
            Some(Step::Data(len)) => Some(Ok(Frame::data(vec![b'd'; len].into()))),
            Some(Step::Trailers) => Some(Ok(Frame::trailers(trailers()))),
            Some(Step::Fail) => Some(Err(Broken)),
            Some(Step::Panic) => panic!("in a poll of the body"),
        })
    }

    fn is_end_stream(&self) -> bool {
        if let Some(Says::EndStream { after }) = self.panics_when_asked {
            assert_ne!(self.polls.load(SeqCst), after, "asked for the end");
        }
        self.tells_its_end && self.steps.is_empty()
    }

    fn size_hint(&self) -> SizeHint {
        if let Some(Says::SizeHint) = self.panics_when_asked {
            panic!("asked for the size");
        }
        self.exact.map_or_else(SizeHint::new, SizeHint::with_exact)
    }
}

impl Drop for Script {
    fn drop(&mut self) {
        if let Some(action) = self.on_drop.take() {
            action();
        }
    }
}

#[derive(Debug)]
struct Broken;

impl fmt::Display for Broken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("broken")
    }
}

impl std::error::Error for Broken {}

/// One response, and how often its body is polled before it is dropped.
#[derive(Clone, Debug)]
struct Case {
    method: Method,
    status: StatusCode,
    marked: bool,
    content_length: Option<u64>,
    exact: Option<u64>,
    tells_its_end: bool,
    steps: Vec<Step>,
    polls: usize,
}

impl Case {
    fn any() -> impl Strategy<Value = Self> {
        (
            prop_oneof![
                8 => Just(Method::GET),
                1 => Just(Method::HEAD),
                1 => Just(Method::CONNECT)
            ],
            prop_oneof![
                8 => Just(StatusCode::OK),
                1 => Just(StatusCode::NOT_FOUND),
                1 => Just(StatusCode::NO_CONTENT),
                1 => Just(StatusCode::NOT_MODIFIED),
                1 => Just(StatusCode::SWITCHING_PROTOCOLS)
            ],
            prop::bool::weighted(0.1),
            option::of(0..8_u64),
            option::of(0..8_u64),
            any::<bool>(),
            vec(Step::any(), 0..6),
            0..9_usize,
        )
            .prop_map(
                |(method, status, marked, content_length, exact, tells_its_end, steps, polls)| {
                    Self {
                        method,
                        status,
                        marked,
                        content_length,
                        exact,
                        tells_its_end,
                        steps,
                        polls,
                    }
                },
            )
    }

    fn script(&self) -> Script {
        let mut script = Script::new(self.steps.iter().copied());
        script.tells_its_end = self.tells_its_end;
        script.exact = self.exact;
        script
    }

    /// The table in the crate's docs, read slowly.
    fn end(&self) -> End {
        let at_end_after = |polls| self.tells_its_end && polls >= self.steps.len();
        if self.marked {
            return Panicked;
        }
        let unwritten = [101, 204, 304].contains(&self.status.as_u16())
            || self.method == Method::HEAD
            || self.method == Method::CONNECT && self.status == StatusCode::OK;
        if unwritten || at_end_after(0) {
            return Completed;
        }
        let mut passed = 0;
        for poll in 0..self.polls {
            match self.steps.get(poll) {
                None | Some(Step::Trailers) => return Completed,
                Some(Step::Fail) => return Failed,
                Some(Step::Panic) => return Panicked,
                Some(Step::Data(_)) if at_end_after(poll + 1) => return Completed,
                Some(Step::Data(len)) => passed += *len as u64,
                Some(Step::Pending) => {}
            }
        }
        match self.exact.or(self.content_length) {
            Some(announced) if passed >= announced => Completed,
            _ => Disconnected,
        }
    }
}
