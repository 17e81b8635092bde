#![allow(missing_docs, clippy::unwrap_used)] // Tests.

use std::{
    any::{Any, TypeId},
    cell::Cell,
    convert::Infallible,
    future::{Ready, ready},
    panic::{AssertUnwindSafe, Location, catch_unwind, resume_unwind},
    pin::{Pin, pin},
    ptr,
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering::Relaxed},
        mpsc,
    },
    task::{Context, Poll, Waker},
    thread,
};

use allocation_counter::measure;
use http::{HeaderMap, Request, Response};
use http_body::{Body, Frame, SizeHint};
use http_body_util::{BodyExt, Empty, Full};
use tokio_test::{assert_pending, assert_ready, assert_ready_err, assert_ready_ok, task};
use tower::{
    Layer, Service, ServiceBuilder, ServiceExt, buffer::Buffer, service_fn, util::ServiceFn,
};
use tower_request_context::{
    Inherit, RequestContext, RequestContextLayer, ResponseBody, Scope, Scoped, SpanId, Task,
    TraceId, WithContext,
};
use tower_test::mock;
use tracing::Span;
use tracing_subscriber::util::SubscriberInitExt;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Tenant(u32);

struct User(&'static str);

type EmptyBody = Empty<&'static [u8]>;
type Answer = Ready<Result<Response<EmptyBody>, Infallible>>;

/// The tenant of the request that is served here.
fn tenant() -> Option<u32> {
    RequestContext::current().get().map(|Tenant(id)| *id)
}

fn user() -> Option<&'static str> {
    RequestContext::current().get().map(|User(name)| *name)
}

fn context_of(id: u32) -> RequestContext {
    RequestContext::new().with(Tenant(id))
}

fn layer_of<Req>(id: u32) -> RequestContextLayer<impl Fn(&Req) -> Tenant + Clone> {
    RequestContextLayer::new(move |_: &Req| Tenant(id))
}

fn request() -> Request<()> {
    Request::new(())
}

type Polled<B> = Poll<Option<Result<Frame<<B as Body>::Data>, <B as Body>::Error>>>;

fn frame<B: Body + Unpin>(body: &mut B) -> Polled<B> {
    Pin::new(body).poll_frame(&mut Context::from_waker(Waker::noop()))
}

fn panics(f: impl FnOnce()) -> bool {
    catch_unwind(AssertUnwindSafe(f)).is_err()
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Place {
    Call,
    Poll,
    FutureDrop,
    Frame,
    BodyDrop,
}
use Place::{BodyDrop, Call, FutureDrop, Poll as FuturePoll};

/// The tenant that was seen there.
type Seen = (Place, Option<u32>);

/// What was seen where. Panics at the place where it is told to.
#[derive(Clone, Debug, Default)]
struct Notes {
    seen: Arc<Mutex<Vec<Seen>>>,
    panic_in: Option<Place>,
}

impl Notes {
    fn note(&self, place: Place) {
        self.seen.lock().unwrap().push((place, tenant()));
        if self.panic_in == Some(place) && !thread::panicking() {
            resume_unwind(Box::new(place));
        }
    }

    /// What was noted since this was last asked for.
    fn taken(&self) -> Vec<Seen> {
        std::mem::take(&mut self.seen.lock().unwrap())
    }

    /// Pending once. The body yields two frames.
    fn service<Req>(&self) -> ServiceFn<impl FnMut(Req) -> NotingFuture + Clone + use<Req>> {
        let notes = self.clone();
        service_fn(move |_: Req| {
            notes.note(Call);
            NotingFuture { notes: notes.clone(), pending: true }
        })
    }
}

struct NotingFuture {
    notes: Notes,
    pending: bool,
}

impl Future for NotingFuture {
    type Output = Result<Response<NotingBody>, Infallible>;

    fn poll(mut self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<Self::Output> {
        self.notes.note(FuturePoll);
        if std::mem::take(&mut self.pending) {
            return Poll::Pending;
        }
        let notes = self.notes.clone();
        Poll::Ready(Ok(Response::new(NotingBody { notes, frames: 2 })))
    }
}

impl Drop for NotingFuture {
    fn drop(&mut self) {
        self.notes.note(FutureDrop);
    }
}

#[derive(Debug)]
struct NotingBody {
    notes: Notes,
    frames: u32,
}

impl Body for NotingBody {
    type Data = &'static [u8];
    type Error = Infallible;

    fn poll_frame(mut self: Pin<&mut Self>, _: &mut Context<'_>) -> Polled<Self> {
        self.notes.note(Place::Frame);
        Poll::Ready(self.frames.checked_sub(1).map(|left| {
            self.frames = left;
            Ok(Frame::data(&b"frame"[..]))
        }))
    }
}

impl Drop for NotingBody {
    fn drop(&mut self) {
        self.notes.note(BodyDrop);
    }
}

#[test]
fn the_value_is_current_wherever_the_inner_service_runs_and_nowhere_else() {
    let notes = Notes::default();
    let mut service = layer_of(7).layer(notes.service());

    let mut future = task::spawn(service.call(request()));
    assert_eq!(notes.taken(), [(Call, Some(7))]);
    assert_eq!(tenant(), None);

    assert_pending!(future.poll());
    assert_eq!(notes.taken(), [(FuturePoll, Some(7))]);
    assert_eq!(tenant(), None);

    let mut body = assert_ready_ok!(future.poll()).into_body();
    assert_eq!(notes.taken(), [(FuturePoll, Some(7)), (FutureDrop, Some(7))]);
    drop(future);
    assert_eq!(notes.taken(), []);
    assert_eq!(tenant(), None);

    for _ in 0..2 {
        let data = assert_ready!(frame(&mut body)).unwrap().unwrap().into_data();
        assert_eq!(data.unwrap(), b"frame");
        assert_eq!(notes.taken(), [(Place::Frame, Some(7))]);
        assert_eq!(tenant(), None);
    }
    assert!(assert_ready!(frame(&mut body)).is_none());
    assert_eq!(notes.taken(), [(Place::Frame, Some(7))]);

    drop(body);
    assert_eq!(notes.taken(), [(BodyDrop, Some(7))]);
    assert_eq!(tenant(), None);
}

#[test]
fn a_response_that_is_dropped_early_is_dropped_in_scope() {
    let notes = Notes::default();
    let mut service = layer_of(7).layer(notes.service());

    drop(service.call(request()));
    assert_eq!(notes.taken(), [(Call, Some(7)), (FutureDrop, Some(7))]);

    let mut future = task::spawn(service.call(request()));
    assert_pending!(future.poll());
    notes.taken();
    drop(future);
    assert_eq!(notes.taken(), [(FutureDrop, Some(7))]);

    let mut future = task::spawn(service.call(request()));
    assert_pending!(future.poll());
    let mut body = assert_ready_ok!(future.poll()).into_body();
    assert!(assert_ready!(frame(&mut body)).is_some());
    notes.taken();
    drop(body);
    assert_eq!(notes.taken(), [(BodyDrop, Some(7))]);
    assert_eq!(tenant(), None);
}

#[test]
fn a_panic_anywhere_restores_what_was_current() {
    for place in [Call, FuturePoll, FutureDrop, Place::Frame, BodyDrop] {
        let notes = Notes { panic_in: Some(place), ..Notes::default() };
        let mut service = layer_of(7).layer(notes.service());
        context_of(1).sync_scope(|| {
            assert!(panics(|| {
                let mut future = task::spawn(service.call(request()));
                assert_pending!(future.poll());
                let mut body = assert_ready_ok!(future.poll()).into_body();
                let _ = frame(&mut body);
            }));
            assert_eq!(tenant(), Some(1), "after a panic in {place:?}");
        });
        let seen = notes.taken();
        assert!(seen.contains(&(place, Some(7))), "{seen:?}");
        assert!(seen.iter().all(|(_, tenant)| *tenant == Some(7)), "{seen:?}");
        assert_eq!(tenant(), None);
    }
}

#[test]
fn a_panic_while_the_value_is_made_restores_what_was_current() {
    fn make(_: &Request<()>) -> Tenant {
        resume_unwind(Box::new("no tenant"))
    }
    let notes = Notes::default();
    let mut service = RequestContextLayer::new(make).layer(notes.service());
    context_of(1).sync_scope(|| {
        assert!(panics(|| drop(service.call(request()))));
        assert_eq!(tenant(), Some(1));
    });
    assert_eq!(notes.taken(), []);
}

#[test]
fn the_value_is_made_from_each_request_in_the_context_outside_of_the_layer() {
    let mut service = RequestContextLayer::new(|request: &Request<u32>| {
        assert_eq!(tenant(), Some(1));
        Tenant(*request.body())
    })
    .layer(service_fn(|_| async {
        Ok::<_, Infallible>(Response::new(tenant().unwrap().to_string()))
    }));
    context_of(1).sync_scope(|| {
        for id in [7, 8] {
            let mut future = task::spawn(service.call(Request::new(id)));
            let body = assert_ready_ok!(future.poll()).into_body();
            let bytes = assert_ready_ok!(task::spawn(body.collect()).poll()).to_bytes();
            assert_eq!(bytes, id.to_string());
        }
    });
}

#[test]
fn a_named_type_makes_values_for_every_kind_of_request() {
    #[derive(Clone)]
    struct FromExtensions;
    impl<B> tower_request_context::MakeValue<Request<B>> for FromExtensions {
        type Value = Tenant;
        fn make_value(&self, request: &Request<B>) -> Tenant {
            *request.extensions().get().unwrap()
        }
    }

    let notes = Notes::default();
    let layer = RequestContextLayer::new(FromExtensions);
    let mut with_unit = layer.layer(notes.service());
    let mut with_text = layer.layer(notes.service());
    let request = Request::builder().extension(Tenant(7));
    drop(with_unit.call(request.body(()).unwrap()));
    let request = Request::builder().extension(Tenant(8));
    drop(with_text.call(request.body("text").unwrap()));
    let calls: Vec<_> = notes.taken().into_iter().filter(|seen| seen.0 == Call).collect();
    assert_eq!(calls, [(Call, Some(7)), (Call, Some(8))]);
}

#[test]
fn of_nested_layers_the_inner_one_hides_its_own_type_and_shows_the_others() {
    let inner = service_fn(|_: Request<()>| {
        assert_eq!((tenant(), user()), (Some(2), Some("ada")));
        async {
            assert_eq!((tenant(), user()), (Some(2), Some("ada")));
            Ok::<_, Infallible>(Response::new(EmptyBody::new()))
        }
    });
    let mut service = ServiceBuilder::new()
        .layer(layer_of(1))
        .layer(RequestContextLayer::new(|_: &Request<()>| User("ada")))
        .layer(layer_of(2))
        .service(inner);
    assert_ready_ok!(task::spawn(service.call(request())).poll());
}

#[test]
fn the_context_of_the_caller_is_visible_below_the_layer() {
    let mut service = layer_of(7).layer(service_fn(|_: Request<()>| async {
        assert_eq!((tenant(), user()), (Some(7), Some("ada")));
        Ok::<_, Infallible>(Response::new(EmptyBody::new()))
    }));
    let future = RequestContext::new().with(User("ada")).sync_scope(|| service.call(request()));
    // It was captured in `call`: whoever polls need not have it.
    assert_ready_ok!(task::spawn(future).poll());
}

#[test]
fn plain_is_for_any_request() {
    let mut service =
        RequestContextLayer::new(|job: &u32| Tenant(*job)).plain().layer(service_fn(|job: u32| {
            assert_eq!(tenant(), Some(job));
            async move {
                assert_eq!(tenant(), Some(job));
                if job == 7 { Ok("done") } else { Err("failed") }
            }
        }));
    assert_eq!(assert_ready_ok!(task::spawn(service.call(7)).poll()), "done");
    assert_eq!(assert_ready_err!(task::spawn(service.call(8)).poll()), "failed");
    assert_eq!(tenant(), None);
}

#[test]
fn plain_drops_the_future_in_scope() {
    let notes = Notes::default();
    let mut service = layer_of::<&str>(7).plain().layer(notes.service::<&str>());
    drop(service.call("job"));
    let mut future = task::spawn(service.call("job"));
    assert_pending!(future.poll());
    // The response is over when the future is: what it returns is on its own.
    let response = assert_ready_ok!(future.poll());
    drop(response);
    assert_eq!(
        notes.taken(),
        [
            (Call, Some(7)),
            (FutureDrop, Some(7)),
            (Call, Some(7)),
            (FuturePoll, Some(7)),
            (FuturePoll, Some(7)),
            (FutureDrop, Some(7)),
            (BodyDrop, None),
        ]
    );
}

#[test]
fn an_error_passes_through_as_it_is() {
    let mut service = layer_of(7)
        .layer(service_fn(|_: Request<()>| async { Err::<Response<EmptyBody>, _>("refused") }));
    let error = assert_ready_err!(task::spawn(service.call(request())).poll());
    assert_eq!(error, "refused");
}

#[test]
fn a_value_lives_as_long_as_its_response_or_whoever_captured_it() {
    let value = Arc::new(());
    let made = value.clone();
    let mut service = RequestContextLayer::new(move |_: &Request<()>| made.clone()).layer(
        service_fn(|_: Request<()>| async { Ok::<_, Infallible>(Response::new(EmptyBody::new())) }),
    );
    let idle = Arc::strong_count(&value);

    let mut future = task::spawn(service.call(request()));
    let response = assert_ready_ok!(future.poll());
    drop(future);
    assert_eq!(Arc::strong_count(&value), idle + 1);
    drop(response);
    assert_eq!(Arc::strong_count(&value), idle);

    drop(service.call(request()));
    assert_eq!(Arc::strong_count(&value), idle, "dropped before its first poll");

    let captured = RequestContext::new().with(value.clone());
    let clone = captured.clone();
    drop(captured);
    assert_eq!(Arc::strong_count(&value), idle + 1);
    drop(clone);
    assert_eq!(Arc::strong_count(&value), idle);
}

#[test]
fn readiness_is_that_of_the_inner_service() {
    let (inner, mut handle) = mock::pair::<Request<()>, Response<Full<&[u8]>>>();
    let mut service = mock::Spawn::new(layer_of(7).layer(inner));

    handle.allow(0);
    assert_pending!(service.poll_ready());
    handle.allow(1);
    assert!(service.is_woken());
    assert_ready_ok!(service.poll_ready());

    // The mock panics if this is not the instance that was ready.
    let mut future = task::spawn(service.call(request()));
    assert_pending!(service.poll_ready());
    assert_pending!(future.poll());
    let (_, response) = assert_ready!(task::spawn(handle.next_request()).poll()).unwrap();
    response.send_response(Response::new(Full::new(b"hello")));
    assert!(future.is_woken());
    assert_ready_ok!(future.poll());

    handle.send_error("closed");
    assert_eq!(assert_ready_err!(service.poll_ready()).to_string(), "closed");
}

#[test]
fn readiness_is_that_of_the_inner_service_when_plain() {
    let (inner, mut handle) = mock::pair::<u32, u32>();
    let mut service = mock::Spawn::new(layer_of::<u32>(7).plain().layer(inner));
    handle.allow(0);
    assert_pending!(service.poll_ready());
    handle.allow(1);
    assert_ready_ok!(service.poll_ready());
    drop(service.call(1));
    handle.send_error("closed");
    assert_eq!(assert_ready_err!(service.poll_ready()).to_string(), "closed");
}

#[test]
fn a_clone_is_a_clone_of_the_inner_service() {
    /// Ready when it was asked, and a clone of it was not asked.
    struct Asked(bool);
    impl Clone for Asked {
        fn clone(&self) -> Self {
            Self(false)
        }
    }
    impl Service<Request<()>> for Asked {
        type Response = Response<EmptyBody>;
        type Error = Infallible;
        type Future = Answer;
        fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
            self.0 = true;
            Poll::Ready(Ok(()))
        }
        fn call(&mut self, _: Request<()>) -> Self::Future {
            assert!(std::mem::take(&mut self.0), "not ready");
            ready(Ok(Response::new(EmptyBody::new())))
        }
    }

    let mut service = layer_of(7).layer(Asked(false));
    let cx = &mut Context::from_waker(Waker::noop());
    assert_ready_ok!(service.poll_ready(cx));
    let mut clone = service.clone();
    assert!(panics(|| drop(clone.call(request()))), "the clone was not asked");
    drop(service.call(request()));
    assert_ready_ok!(clone.poll_ready(cx));
    drop(clone.call(request()));
}

#[test]
fn the_layer_and_what_it_makes_go_where_the_inner_ones_go() {
    fn sent<T: Send + Sync + 'static>() {}
    fn debugged<T: std::fmt::Debug>(_: &T) {}
    type Make = fn(&Request<()>) -> Tenant;
    sent::<RequestContext>();
    sent::<RequestContextLayer<Make>>();
    sent::<WithContext<(), Make>>();
    sent::<ResponseBody<Full<&[u8]>>>();
    sent::<tower_request_context::ResponseFuture<std::future::Ready<()>>>();
    sent::<Scoped<std::future::Ready<()>>>();
    debugged(&layer_of::<Request<()>>(7));
    debugged(&layer_of::<Request<()>>(7).layer("inner"));
}

#[tokio::test]
async fn the_body_is_the_inner_one_frame_by_frame() {
    let mut trailers = HeaderMap::new();
    trailers.insert("x-checksum", "7".parse().unwrap());
    let inner =
        Full::new(&b"hello"[..]).with_trailers(std::future::ready(Some(Ok(trailers.clone()))));
    let mut service = Some(inner);
    let mut service = layer_of(7).layer(service_fn(move |_: Request<()>| {
        let response = Response::builder().status(404).header("x-a", "b");
        let response = response.body(service.take().unwrap()).unwrap();
        async { Ok::<_, Infallible>(response) }
    }));
    let (parts, mut body) = service.call(request()).await.unwrap().into_parts();
    assert_eq!(parts.status, 404);
    assert_eq!(parts.headers["x-a"], "b");
    assert_eq!(body.frame().await.unwrap().unwrap().into_data().unwrap(), b"hello");
    assert_eq!(body.frame().await.unwrap().unwrap().into_trailers().unwrap(), trailers);
    assert!(body.frame().await.is_none());
}

#[test]
fn the_body_tells_size_and_end_as_the_inner_one_does() {
    struct Tells {
        lower: u64,
        upper: Option<u64>,
        end: bool,
    }
    impl Body for Tells {
        type Data = &'static [u8];
        type Error = &'static str;
        fn poll_frame(self: Pin<&mut Self>, _: &mut Context<'_>) -> Polled<Self> {
            Poll::Ready(Some(Err("broken")))
        }
        fn is_end_stream(&self) -> bool {
            self.end
        }
        fn size_hint(&self) -> SizeHint {
            let mut hint = SizeHint::new();
            hint.set_lower(self.lower);
            if let Some(upper) = self.upper {
                hint.set_upper(upper);
            }
            hint
        }
    }

    for (lower, upper) in [(0, None), (5, Some(5)), (3, Some(u64::MAX))] {
        for end in [false, true] {
            let mut service = layer_of(7).layer(service_fn(|_: Request<()>| {
                ready(Ok::<_, Infallible>(Response::new(Tells { lower, upper, end })))
            }));
            let response = assert_ready_ok!(task::spawn(service.call(request())).poll());
            let mut body = response.into_body();
            assert_eq!(body.size_hint().lower(), lower);
            assert_eq!(body.size_hint().upper(), upper);
            assert_eq!(body.is_end_stream(), end);
            assert_eq!(assert_ready!(frame(&mut body)).unwrap().unwrap_err(), "broken");
        }
    }
}

#[test]
fn an_empty_body_can_be_had_without_a_request() {
    let mut body = ResponseBody::<Full<&[u8]>>::default();
    assert!(body.is_end_stream());
    assert_eq!(body.size_hint().exact(), Some(0));
    assert!(assert_ready!(frame(&mut body)).is_none());
}

/// The tenant and the user in the type map's context, and whether it is the current one.
type InTypeMap = (Option<u32>, Option<&'static str>, bool);

/// What was in the type map in each `call`.
type TypeMapNotes = Arc<Mutex<Vec<Option<InTypeMap>>>>;

fn in_the_type_map<B>(request: &Request<B>) -> Option<InTypeMap> {
    let context = request.extensions().get::<RequestContext>()?;
    let tenant = context.get().map(|Tenant(id)| *id);
    let user = context.get().map(|User(name)| *name);
    Some((tenant, user, context.ptr_eq(&RequestContext::current())))
}

fn type_map_service(notes: &TypeMapNotes) -> ServiceFn<impl FnMut(Request<()>) -> Answer + use<>> {
    let notes = notes.clone();
    service_fn(move |request: Request<()>| {
        notes.lock().unwrap().push(in_the_type_map(&request));
        ready(Ok(Response::new(EmptyBody::new())))
    })
}

#[test]
fn the_context_is_in_the_type_map_only_if_asked_for() {
    let notes = TypeMapNotes::default();
    drop(layer_of(7).layer(type_map_service(&notes)).call(request()));
    let layer = layer_of(7).in_extensions();
    drop(layer.layer(type_map_service(&notes)).call(request()));
    assert_eq!(*notes.lock().unwrap(), [None, Some((Some(7), None, true))]);
}

#[test]
fn an_inner_layer_renews_the_context_in_the_type_map() {
    let notes = TypeMapNotes::default();
    let mut service = ServiceBuilder::new()
        .layer(layer_of(7).in_extensions())
        .layer(RequestContextLayer::new(|_: &Request<()>| User("ada")))
        .service(type_map_service(&notes));
    drop(service.call(request()));
    assert_eq!(*notes.lock().unwrap(), [Some((Some(7), Some("ada"), true))]);
}

#[test]
fn what_is_current_outside_of_a_layer_counts_and_not_what_the_type_map_had() {
    let notes = TypeMapNotes::default();
    let mut service = layer_of(8).layer(type_map_service(&notes));
    let mut request = request();
    request.extensions_mut().insert(context_of(7));
    let scoped = context_of(7).with(User("ada"));
    drop(scoped.sync_scope(|| service.call(request)));
    assert_eq!(*notes.lock().unwrap(), [Some((Some(8), Some("ada"), true))]);
}

#[test]
fn the_context_in_a_type_map_counts_where_none_is_current() {
    assert!(RequestContext::current_or(None).is_empty());
    let carried = context_of(7);
    let current_or_carried = || RequestContext::current_or(Some(&carried));
    assert_eq!(current_or_carried().sync_scope(tenant), Some(7));
    let current = context_of(8).sync_scope(current_or_carried);
    assert_eq!(current.sync_scope(tenant), Some(8));
}

#[tokio::test]
async fn behind_a_buffer_an_inner_layer_adds_to_the_context_in_the_type_map() {
    let notes = TypeMapNotes::default();
    let inner =
        RequestContextLayer::new(|_: &Request<()>| User("ada")).layer(type_map_service(&notes));
    let mut service = layer_of(7).in_extensions().layer(Buffer::new(inner, 1));
    service.ready().await.unwrap().call(request()).await.unwrap();
    assert_eq!(*notes.lock().unwrap(), [Some((Some(7), Some("ada"), true))]);
}

#[tokio::test]
async fn behind_a_buffer_the_future_sees_it_and_call_sees_the_type_map_alone() {
    let notes = Notes::default();
    let type_map = TypeMapNotes::default();
    let inner = notes.service();
    let noted = type_map.clone();
    let inner = inner.map_request(move |request: Request<()>| {
        noted.lock().unwrap().push(in_the_type_map(&request));
        request
    });
    let mut service = layer_of(7).in_extensions().layer(Buffer::new(inner, 1));

    let mut future = task::spawn(service.ready().await.unwrap().call(request()));
    while notes.seen.lock().unwrap().len() < 2 {
        assert_pending!(future.poll());
        tokio::task::yield_now().await;
    }
    drop(future);
    assert_eq!(notes.taken(), [(Call, None), (FuturePoll, Some(7)), (FutureDrop, Some(7))]);
    assert_eq!(*type_map.lock().unwrap(), [Some((Some(7), None, false))]);
}

#[tokio::test]
async fn below_a_buffer_the_layer_works_as_ever() {
    let notes = Notes::default();
    let mut service = Buffer::new(layer_of(7).layer(notes.service()), 1);
    let mut future = task::spawn(service.ready().await.unwrap().call(request()));
    while notes.seen.lock().unwrap().len() < 2 {
        assert_pending!(future.poll());
        tokio::task::yield_now().await;
    }
    drop(future);
    assert_eq!(notes.taken(), [(Call, Some(7)), (FuturePoll, Some(7)), (FutureDrop, Some(7))]);
}

#[tokio::test]
async fn a_spawned_task_or_thread_sees_it_only_if_it_is_moved_in() {
    let bare_and_moved = context_of(7).scope(async {
        let context = RequestContext::current();
        let bare = (
            tokio::spawn(async { tenant() }).await.unwrap(),
            tokio::task::spawn_blocking(tenant).await.unwrap(),
            thread::spawn(tenant).join().unwrap(),
        );
        let (in_blocking, in_thread) = (context.clone(), context.clone());
        let moved = (
            tokio::spawn(context.scope(async { tenant() })).await.unwrap(),
            tokio::task::spawn_blocking(|| in_blocking.sync_scope(tenant)).await.unwrap(),
            thread::spawn(|| in_thread.sync_scope(tenant)).join().unwrap(),
        );
        assert_eq!(tenant(), Some(7));
        (bare, moved)
    });
    let (bare, moved) = bare_and_moved.await;
    assert_eq!(bare, (None, None, None));
    assert_eq!(moved, (Some(7), Some(7), Some(7)));
    assert_eq!(tenant(), None);
}

#[test]
fn scopes_nest_and_end() {
    assert!(RequestContext::current().is_empty());
    context_of(1).sync_scope(|| {
        context_of(2).sync_scope(|| assert_eq!(tenant(), Some(2)));
        assert_eq!(tenant(), Some(1));
        RequestContext::new().sync_scope(|| assert!(RequestContext::current().is_empty()));
        assert_eq!(tenant(), Some(1));

        let mut future = task::spawn(context_of(3).scope(async {
            assert_eq!(tenant(), Some(3));
            let inner = context_of(4).scope(async { tenant() });
            assert_eq!(tenant(), Some(3));
            assert_eq!(inner.await, Some(4));
            tenant()
        }));
        assert_eq!(tenant(), Some(1));
        assert_eq!(assert_ready!(future.poll()), Some(3));
        assert_eq!(tenant(), Some(1));
    });
    assert!(RequestContext::current().is_empty());
}

#[test]
fn the_current_context_is_the_one_that_was_entered() {
    let context = context_of(7);
    assert!(Scope::other_than(&context).is_none());
    context.clone().sync_scope(|| {
        assert!(RequestContext::current().ptr_eq(&context));
        assert!(Scope::other_than(&context).is_none());
        assert!(Scope::other_than(&context_of(7)).unwrap().ptr_eq(&context));
    });
}

#[test]
fn a_panic_in_a_scope_restores_what_was_current() {
    context_of(1).sync_scope(|| {
        assert!(panics(|| context_of(2).sync_scope(|| resume_unwind(Box::new(())))));
        assert_eq!(tenant(), Some(1));

        let mut future = task::spawn(context_of(2).scope(async { resume_unwind(Box::new(())) }));
        assert!(panics(|| assert_pending!(future.poll())));
        assert_eq!(tenant(), Some(1));

        let notes = Notes { panic_in: Some(FutureDrop), ..Notes::default() };
        let mut service = notes.service();
        for ready in [false, true] {
            let mut future = task::spawn(context_of(2).scope(service.call(())));
            assert!(panics(|| {
                assert_pending!(future.poll());
                if ready {
                    let _ = future.poll();
                }
                drop(future);
            }));
            assert_eq!(tenant(), Some(1));
        }
    });
}

#[test]
fn the_future_is_dropped_in_its_scope_as_soon_as_it_is_ready() {
    let notes = Notes::default();
    let mut service = notes.service();

    let mut future = task::spawn(context_of(7).scope(service.call(())));
    assert_eq!(notes.taken(), [(Call, None)], "made before it is in scope");
    assert_pending!(future.poll());
    let response = assert_ready_ok!(future.poll());
    let expected = [(FuturePoll, Some(7)), (FuturePoll, Some(7)), (FutureDrop, Some(7))];
    assert_eq!(notes.taken(), expected);
    drop((future, response));
    assert_eq!(notes.taken(), [(BodyDrop, None)]);

    let mut future = task::spawn(context_of(7).scope(service.call(())));
    assert_pending!(future.poll());
    notes.taken();
    drop(future);
    assert_eq!(notes.taken(), [(FutureDrop, Some(7))], "between polls");

    drop(context_of(7).scope(service.call(())));
    assert_eq!(notes.taken(), [(Call, None), (FutureDrop, Some(7))], "before the first");
}

#[test]
fn a_scope_goes_with_its_future_from_thread_to_thread() {
    let notes = Notes::default();
    let mut service = notes.service();
    let mut future = Box::pin(context_of(7).scope(service.call(())));
    notes.taken();
    let poll = |mut future: Pin<Box<Scoped<NotingFuture>>>| {
        thread::spawn(move || {
            let cx = &mut Context::from_waker(Waker::noop());
            let ready = context_of(1).sync_scope(|| future.as_mut().poll(cx).is_ready());
            assert_eq!(tenant(), None);
            (future, ready)
        })
        .join()
        .unwrap()
    };
    let ready;
    (future, ready) = poll(future);
    assert!(!ready);
    let (future, ready) = poll(future);
    assert!(ready);
    thread::spawn(|| drop(future)).join().unwrap();
    assert_eq!(
        notes.taken(),
        [(FuturePoll, Some(7)), (FuturePoll, Some(7)), (FutureDrop, Some(7)), (BodyDrop, Some(1))]
    );
}

/// Pending twice, and notes each time what it sees.
#[derive(Default)]
struct Steps {
    polls: u32,
    seen: Vec<Option<u32>>,
}

impl Future for Steps {
    type Output = Vec<Option<u32>>;

    fn poll(mut self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<Self::Output> {
        self.seen.push(tenant());
        self.polls += 1;
        if self.polls < 3 {
            return Poll::Pending;
        }
        Poll::Ready(std::mem::take(&mut self.seen))
    }
}

#[test]
fn two_futures_never_see_each_others_values_in_whatever_order_they_are_polled() {
    // Each bit is a turn: all 20 orders of three turns each.
    let orders: Vec<_> = (0_u32..1 << 6).filter(|order| order.count_ones() == 3).collect();
    assert_eq!(orders.len(), 20);
    for order in orders {
        context_of(0).sync_scope(|| {
            let mut one = task::spawn(context_of(1).scope(Steps::default()));
            let nested = context_of(2).scope(Steps::default());
            let mut other = task::spawn(context_of(9).scope(nested));
            let mut seen = Vec::new();
            for turn in 0..6 {
                let polled = if order >> turn & 1 == 0 { one.poll() } else { other.poll() };
                assert_eq!(tenant(), Some(0));
                if let Poll::Ready(values) = polled {
                    seen.push(values);
                }
            }
            seen.sort();
            assert_eq!(seen, [vec![Some(1); 3], vec![Some(2); 3]], "{order:06b}");
        });
    }
}

#[test]
fn a_new_value_leaves_the_context_it_was_added_to_as_it_was() {
    let empty = RequestContext::new();
    let first = empty.with(Tenant(1));
    let second = first.with(Tenant(2));
    let third = first.with(User("ada"));
    assert!(empty.is_empty() && !first.is_empty());
    assert_eq!(empty.get::<Tenant>(), None);
    assert_eq!(first.get(), Some(&Tenant(1)));
    assert!(first.get::<User>().is_none());
    assert_eq!(second.get(), Some(&Tenant(2)));
    assert_eq!(third.get(), Some(&Tenant(1)));
    assert!(third.get::<User>().is_some());
    assert!(second.get::<User>().is_none());
}

#[test]
fn a_clone_is_the_same_context_and_an_equal_one_is_not() {
    let context = context_of(7);
    let clone = context.clone();
    assert!(clone.ptr_eq(&context));
    assert!(!context_of(7).ptr_eq(&context));
    assert!(!context.with(Tenant(7)).ptr_eq(&context));
    assert!(!context.ptr_eq(&RequestContext::new()));
    assert!(RequestContext::new().ptr_eq(&RequestContext::default()));

    let value = context.get::<Tenant>().unwrap();
    assert!(ptr::eq(clone.get().unwrap(), value), "values are never copied");
    assert!(ptr::eq(context.with(User("ada")).get().unwrap(), value));
}

#[test]
fn debug_names_the_types_and_never_prints_the_values() {
    #[derive(Debug)]
    struct Token(#[expect(dead_code, reason = "only its `Debug` reads it")] &'static str);

    assert!(format!("{:?}", Token("hunter2")).contains("hunter2"));
    let context = RequestContext::new().with(Token("hunter2")).with_inherited(Count(4242));
    let debug = format!("{context:?} {:?}", Scope::new(context.clone()));
    assert!(debug.contains("Token") && debug.contains("Count"), "{debug}");
    let layer = RequestContextLayer::new(|_: &Request<()>| Token("hunter2"));
    let mut service = layer.layer(service_fn(|_| ready(Ok::<_, Infallible>(Response::new(())))));
    let debug = format!("{debug} {:?} {:?}", service.call(request()), context.scope(ready(())));
    assert!(!debug.contains("hunter2") && !debug.contains("4242"), "{debug}");
}

#[test]
fn a_value_costs_one_allocation_and_all_else_none() {
    let mut service = layer_of(7).layer(service_fn(|_: Request<()>| {
        ready(Ok::<_, Infallible>(Response::new(Full::new(&b"hello"[..]))))
    }));
    let waker = Waker::noop();
    let request = request();
    let served = measure(|| {
        let mut cx = Context::from_waker(waker);
        let mut future = pin!(service.call(request));
        let mut body = assert_ready_ok!(future.as_mut().poll(&mut cx)).into_body();
        while assert_ready!(frame(&mut body)).is_some() {}
    });
    assert_eq!(served.count_total, 1);

    let (context, _) = lineage();
    let mut scope = Scope::of_task(context.clone(), a_task());
    assert_eq!(measure(|| drop(context.clone())).count_total, 0);
    assert_eq!(measure(|| assert_eq!(context.get(), Some(&Tenant(7)))).count_total, 0);
    assert_eq!(measure(|| scope.enter(|| ())).count_total, 0);
    let asked = measure(|| drop(scope.enter(RequestContext::current)));
    assert_eq!(asked.count_total, 2, "the value, and a list of what is inherited");
    assert_eq!(measure(|| drop(scope.enter(RequestContext::current))).count_total, 0);
}

#[test]
fn a_million_values_are_dropped_without_overflowing_the_stack() {
    let small = thread::Builder::new().stack_size(128 << 10);
    let thread = small.spawn(|| {
        let mut context = RequestContext::new();
        let mut middle = None;
        for id in 0..1_000_000 {
            context = context.with(Tenant(id));
            if id == 500_000 {
                middle = Some(context.clone());
            }
        }
        assert_eq!(context.get(), Some(&Tenant(999_999)));
        drop(context);
        // The rest is still whole.
        let middle = middle.unwrap();
        assert_eq!(middle.get(), Some(&Tenant(500_000)));
        assert!(middle.get::<User>().is_none());
    });
    thread.unwrap().join().unwrap();
}

#[test]
fn a_value_may_use_the_context_when_it_is_dropped() {
    struct Asks(mpsc::Sender<Option<u32>>);
    impl Drop for Asks {
        fn drop(&mut self) {
            self.0.send(tenant()).unwrap();
        }
    }

    let (sender, seen) = mpsc::channel();
    context_of(1).sync_scope(|| {
        let context = context_of(7).with(Asks(sender));
        context.sync_scope(|| assert!(seen.try_recv().is_err()));
        assert_eq!(seen.recv(), Ok(Some(1)), "it goes after its scope has ended");
    });
}

/// A value of which every task has its own.
struct Lineage {
    depth: u32,
    name: &'static str,
    kept: bool,
    site: Option<&'static Location<'static>>,
    span_id: SpanId,
    made: Arc<AtomicUsize>,
}

impl Lineage {
    fn new(made: &Arc<AtomicUsize>) -> Self {
        Self {
            depth: 0,
            name: "request",
            kept: false,
            site: None,
            span_id: SpanId::from_bytes([1; 8]).unwrap(),
            made: made.clone(),
        }
    }
}

impl Inherit for Lineage {
    fn inherit(&self, task: &Task) -> Self {
        self.made.fetch_add(1, Relaxed);
        Self {
            depth: self.depth + 1,
            name: task.name,
            kept: task.kept,
            site: Some(task.site),
            span_id: SpanId::from_bytes([2; 8]).unwrap(),
            made: self.made.clone(),
        }
    }

    fn wants_span(&self) -> bool {
        self.depth > 0
    }

    fn span(&self, task: &Task) -> Span {
        tracing::info_span!("lineage", task = task.name)
    }

    fn part(&self, wanted: TypeId) -> Option<&dyn Any> {
        (wanted == TypeId::of::<SpanId>()).then_some(&self.span_id)
    }
}

/// Another one, with nothing but what it must have.
#[derive(Debug)]
struct Count(u32);

impl Inherit for Count {
    fn inherit(&self, _: &Task) -> Self {
        Self(self.0 + 1)
    }
}

/// A request with a tenant and a lineage.
fn lineage() -> (RequestContext, Arc<AtomicUsize>) {
    let made = Arc::default();
    (context_of(7).with_inherited(Lineage::new(&made)), made)
}

fn a_task() -> Task {
    Task::new("task", Location::caller())
}

fn depth(context: &RequestContext) -> Option<u32> {
    context.get().map(|lineage: &Lineage| lineage.depth)
}

fn count(context: &RequestContext) -> Option<u32> {
    context.get().map(|Count(count)| *count)
}

fn span_id(context: &RequestContext) -> Option<u8> {
    context.get().map(|id: &SpanId| id.to_bytes()[0])
}

#[test]
fn a_task_has_its_own_of_what_it_inherits_and_shares_the_rest() {
    let (context, _) = lineage();
    let task = a_task().kept(true);
    let own = context.inherit(&task);

    let lineage: &Lineage = own.get().unwrap();
    assert_eq!(lineage.depth, 1);
    assert_eq!((lineage.name, lineage.kept, lineage.site), ("task", true, Some(task.site)));
    assert!(ptr::eq(own.get::<Tenant>().unwrap(), context.get().unwrap()));

    let lineage: &Lineage = context.get().unwrap();
    assert_eq!((lineage.depth, lineage.name), (0, "request"), "the request's is as it was");
}

#[test]
fn what_is_inherited_is_replaced_and_never_grows() {
    let (top, _) = lineage();
    // In the last one a layer's own value stands at the head.
    for mut context in [
        top.clone(),
        top.with_inherited(Count(0)),
        top.with(User("ada")).with_inherited(Count(0)),
        top.with_inherited(Count(0)).with(User("ada")),
    ] {
        let counts = count(&context).is_some();
        let task = a_task();
        let first = format!("{:?}", context.inherit(&task));
        for _ in 0..100_000 {
            context = context.inherit(&task);
        }
        assert_eq!(depth(&context), Some(100_000));
        assert_eq!(count(&context), counts.then_some(100_000));
        assert_eq!(context.get(), Some(&Tenant(7)));
        assert_eq!(format!("{context:?}"), first, "the same values, hidden ones included");
    }
}

#[test]
fn of_two_inherited_values_of_a_type_a_task_gets_the_newer_one() {
    let (context, made) = lineage();
    let context = context.with_inherited(Lineage { depth: 10, ..Lineage::new(&made) });
    let own = context.inherit(&a_task());
    assert_eq!(depth(&own), Some(11));
    assert_eq!(made.load(Relaxed), 1);
    assert_eq!(format!("{own:?}").matches("Lineage").count(), 1);

    let apart = context_of(7).with_inherited(Count(0)).with(User("ada")).with_inherited(Count(10));
    assert_eq!(count(&apart.inherit(&a_task())), Some(11));
}

#[test]
fn inherited_values_of_several_types_stay_in_their_order() {
    let context = lineage().0.with_inherited(Count(5));
    let own = context.inherit(&a_task());
    assert_eq!((depth(&own), count(&own)), (Some(1), Some(6)));
    assert_eq!(format!("{own:?}"), format!("{context:?}"));
}

#[test]
fn where_nothing_is_inherited_a_task_has_the_context_as_it_is() {
    let context = context_of(7);
    assert!(!context.inherits());
    assert!(context.inherit(&a_task()).ptr_eq(&context));
    assert!(!RequestContext::new().inherits());
    assert!(!context.wants_span());

    let mut scope = Scope::of_task(context.clone(), a_task());
    assert!(!scope.is_pending());
    assert!(scope.enter(RequestContext::current).ptr_eq(&context));

    let inherits = context.with_inherited(Count(0));
    assert!(inherits.inherits());
    assert!(inherits.with(User("ada")).inherits());
}

#[test]
fn a_part_is_found_by_its_own_type() {
    struct Sloppy;
    impl Inherit for Sloppy {
        fn inherit(&self, _: &Task) -> Self {
            Self
        }
        fn part(&self, _: TypeId) -> Option<&dyn Any> {
            Some(&7_u64)
        }
    }
    let (context, _) = lineage();
    assert_eq!(span_id(&context), Some(1));
    assert_eq!(span_id(&context.inherit(&a_task())), Some(2));
    assert!(context.get::<TraceId>().is_none());

    let three = SpanId::from_bytes([3; 8]).unwrap();
    assert_eq!(span_id(&context.with(three)), Some(3), "what was added last hides a part too");
    let older = RequestContext::new().with(three);
    assert_eq!(span_id(&older.with_inherited(Lineage::new(&Arc::default()))), Some(1));
    assert_eq!(span_id(&older.with_inherited(Count(0))), Some(3));

    // What is of another type is nothing, in a request as in its tasks.
    let context = RequestContext::new().with_inherited(Count(1)).with_inherited(Sloppy);
    assert_eq!(count(&context), Some(1));
    assert_eq!(count(&context.inherit(&a_task())), Some(2));
}

#[test]
fn a_span_is_wanted_if_one_of_the_values_wants_it() {
    let (context, _) = lineage();
    assert!(!context.wants_span());
    let context = context.inherit(&a_task());
    for context in [context.clone(), context.with(User("ada")), context.with_inherited(Count(0))] {
        assert!(context.wants_span());
    }
    assert!(!context_of(7).with_inherited(Count(0)).wants_span());
}

#[test]
fn the_span_of_a_task_is_the_newest_one_that_is_enabled() {
    struct Newer(bool);
    impl Inherit for Newer {
        fn inherit(&self, _: &Task) -> Self {
            Self(self.0)
        }
        fn span(&self, _: &Task) -> Span {
            if self.0 { tracing::info_span!("newer") } else { Span::none() }
        }
    }
    let name = |context: &RequestContext| {
        let span = context.span(&a_task());
        assert_eq!(span.metadata().is_none(), span.is_disabled());
        span.metadata().map(tracing::Metadata::name)
    };

    let _subscriber = tracing_subscriber::registry().set_default();
    let (context, _) = lineage();
    assert_eq!(name(&context), Some("lineage"));
    assert_eq!(name(&context.with(User("ada"))), Some("lineage"));
    assert_eq!(name(&context.with_inherited(Newer(true))), Some("newer"));
    assert_eq!(name(&context.with_inherited(Newer(false))), Some("lineage"));
    assert_eq!(name(&RequestContext::new().with_inherited(Count(0))), None);
    assert_eq!(name(&RequestContext::new()), None);
}

#[test]
fn a_task_gets_its_own_values_when_it_first_asks_and_only_once() {
    let (context, made) = lineage();
    let mut scope =
        Scope::of_current_task(context.clone(), |context| Some((context.clone(), a_task())));

    scope.enter(|| assert!(Scope::other_than(&context).is_none()));
    scope.enter(|| RequestContext::new().sync_scope(|| assert_eq!(tenant(), None)));
    assert!(scope.is_pending());
    assert_eq!(made.load(Relaxed), 0, "nobody has asked");

    let first = scope.enter(RequestContext::current);
    assert_eq!((depth(&first), made.load(Relaxed)), (Some(1), 1));
    assert!(!scope.is_pending());
    let again = scope.enter(|| {
        assert!(Scope::other_than(&first).is_none());
        assert!(Scope::other_than(&context).unwrap().ptr_eq(&first));
        RequestContext::current()
    });
    assert!(again.ptr_eq(&first));
    assert_eq!(made.load(Relaxed), 1);
    assert_eq!(depth(&context), Some(0));
}

/// Asks for the current context while it is inherited, and panics the first time.
struct Asks(Arc<AtomicUsize>);

impl Inherit for Asks {
    fn inherit(&self, _: &Task) -> Self {
        drop(RequestContext::current());
        if self.0.fetch_add(1, Relaxed) == 0 {
            resume_unwind(Box::new("the first time"));
        }
        Self(self.0.clone())
    }
}

#[test]
fn a_panic_while_a_value_is_inherited_leaves_the_task_in_its_context() {
    let attempts = Arc::<AtomicUsize>::default();
    let context = context_of(7).with_inherited(Asks(attempts.clone()));
    let mut scope =
        Scope::of_current_task(context.clone(), |context| Some((context.clone(), a_task())));
    scope.enter(|| {
        assert!(panics(|| drop(RequestContext::current())));
        assert!(Scope::other_than(&context).is_none());
        assert_eq!(tenant(), Some(7), "the next one who asks tries again");
        assert_eq!(tenant(), Some(7));
        assert_eq!(attempts.load(Relaxed), 2);
    });
    assert!(!scope.is_pending());
    assert_eq!(tenant(), None);
}

#[test]
fn two_swaps_of_a_scope_are_none() {
    let mut scope = Scope::new(context_of(7));
    context_of(1).sync_scope(|| {
        scope.swap();
        assert_eq!(tenant(), Some(7));
        scope.swap();
        assert_eq!(tenant(), Some(1));
    });
    assert_eq!(scope.enter(tenant), Some(7));
    assert!(Scope::is_nowhere() && !scope.enter(Scope::is_nowhere));
    assert_eq!(Scope::default().enter(tenant), None);
}

#[test]
fn a_task_may_be_known_or_looked_up_when_its_values_are_made() {
    let (context, _) = lineage();
    let known = Scope::of_task(context.clone(), a_task());
    let looked_up =
        Scope::of_current_task(context.clone(), |context| Some((context.clone(), a_task())));
    for mut scope in [known, looked_up] {
        scope.enter(|| assert!(!Scope::is_nowhere()));
        assert!(scope.is_pending());
        let own = scope.enter(RequestContext::current);
        assert!(!scope.is_pending());
        assert_eq!(format!("{own:?}"), format!("{context:?}"));
    }

    let mut unknown = Scope::of_current_task(context.clone(), |_| None);
    assert!(unknown.enter(RequestContext::current).ptr_eq(&context));
    assert!(unknown.is_pending(), "it may be known when it is asked for again");
    let mut inherits_nothing = Scope::of_current_task(context_of(7), |_| unreachable!());
    assert_eq!(inherits_nothing.enter(tenant), Some(7));
}

#[test]
fn a_scope_can_be_settled_before_anybody_asks() {
    let (context, made) = lineage();
    let mut scope = Scope::of_task(context, a_task());
    scope.enter(|| {
        Scope::settle();
        Scope::settle();
    });
    assert!(!scope.is_pending() && made.load(Relaxed) == 1);
}

#[test]
fn a_scope_tells_the_trace_id_without_making_the_tasks_own_values() {
    let (context, made) = lineage();
    let id = TraceId::from_bytes([7; 16]).unwrap();
    let scope = Scope::of_task(context.with(id), a_task());
    assert_eq!(scope.trace_id(), Some(id));
    assert_eq!(Scope::new(context).trace_id(), None);
    assert!(scope.is_pending());
    assert_eq!(made.load(Relaxed), 0);
}

#[test]
fn destructors_at_the_end_of_a_thread_may_ask_and_open_scopes() {
    type Before = bool;
    type After = bool;
    type Sender = mpsc::Sender<(Before, Option<u32>, After)>;
    struct Late(Cell<Option<Sender>>);
    impl Drop for Late {
        fn drop(&mut self) {
            let before = RequestContext::current().is_empty();
            let inside = context_of(7).sync_scope(tenant);
            let after = RequestContext::current().is_empty();
            self.0.take().unwrap().send((before, inside, after)).unwrap();
        }
    }
    thread_local!(static LATE: Late = const { Late(Cell::new(None)) });

    let mut seen = Vec::new();
    for context_first in [true, false] {
        let (sender, receiver) = mpsc::channel();
        let thread = thread::spawn(move || {
            // The destructors run in the order of the first use, or in the opposite one.
            if context_first {
                assert_eq!(tenant(), None);
            }
            LATE.with(|late| late.0.set(Some(sender)));
            assert_eq!(context_of(1).sync_scope(tenant), Some(1));
        });
        seen.push(receiver.recv().unwrap());
        thread.join().unwrap();
    }
    assert_eq!(seen, [(true, Some(7), true); 2]);
}

#[cfg(feature = "axum")]
mod axum {
    use axum_core::{extract::FromRequestParts, response::IntoResponse};
    use tower_request_context::NoRequestContext;

    use super::*;

    async fn extracted(request: Request<()>) -> Result<Option<u32>, NoRequestContext> {
        let (mut parts, ()) = request.into_parts();
        let context = RequestContext::from_request_parts(&mut parts, &()).await?;
        Ok(context.get().map(|Tenant(id)| *id))
    }

    #[tokio::test]
    async fn the_extractor_yields_the_current_context() {
        let found = context_of(7).scope(extracted(request())).await;
        assert_eq!(found.unwrap(), Some(7));
    }

    #[tokio::test]
    async fn the_extractor_looks_at_the_type_map_first() {
        let mut request = request();
        request.extensions_mut().insert(context_of(8));
        let found = context_of(7).scope(extracted(request.clone())).await;
        assert_eq!(found.unwrap(), Some(8));
        assert_eq!(extracted(request).await.unwrap(), Some(8));
    }

    #[tokio::test]
    async fn the_extractor_yields_what_an_inner_layer_has_added() {
        let mut service = ServiceBuilder::new()
            .layer(RequestContextLayer::new(|_: &Request<()>| User("ada")).in_extensions())
            .layer(layer_of(7))
            .service(service_fn(|request| async {
                assert_eq!(extracted(request).await.unwrap(), Some(7));
                Ok::<_, Infallible>(Response::new(EmptyBody::new()))
            }));
        service.call(request()).await.unwrap();
    }

    #[tokio::test]
    async fn where_something_runs_the_handler_on_another_task_the_type_map_helps() {
        for (layer, expected) in [(layer_of(7), "no context"), (layer_of(7).in_extensions(), "7")] {
            let handler = service_fn(|request: Request<()>| async {
                let found = tokio::spawn(extracted(request)).await.unwrap();
                let text = found.map_or("no context".to_owned(), |id| id.unwrap().to_string());
                Ok::<_, Infallible>(Response::new(text))
            });
            let response = layer.layer(handler).call(request()).await.unwrap();
            let body = response.into_body().collect().await.unwrap().to_bytes();
            assert_eq!(body, expected);
        }
    }

    #[tokio::test]
    async fn the_rejection_names_both_remedies() {
        let rejection = extracted(request()).await.unwrap_err();
        let text = rejection.to_string();
        assert!(text.contains("`RequestContextLayer`"), "{text}");
        assert!(text.contains("`.in_extensions()`"), "{text}");
        let error: &dyn std::error::Error = &rejection;
        assert_eq!(error.to_string(), text);

        let response = rejection.into_response();
        assert_eq!(response.status(), 500);
        let body = response.into_body().collect().await.unwrap().to_bytes();
        assert_eq!(body, text);
    }
}

#[test]
fn a_task_does_not_uncover_an_inherited_value_that_a_newer_one_hides() {
    #[derive(Debug, PartialEq)]
    struct Count(u32);
    impl Inherit for Count {
        fn inherit(&self, _: &Task) -> Self {
            Self(self.0 + 1)
        }
    }
    let context = RequestContext::new().with_inherited(Count(1)).with(Count(9));
    assert_eq!(context.get(), Some(&Count(9)));
    let task = Task::new("task", std::panic::Location::caller());
    assert_eq!(context.inherit(&task).get(), Some(&Count(9)));
}
