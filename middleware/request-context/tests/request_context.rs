#![allow(missing_docs, clippy::unwrap_used)] // Tests.

use std::{
    any::{Any, TypeId},
    cell::Cell,
    convert::Infallible,
    panic::{AssertUnwindSafe, Location, catch_unwind, resume_unwind},
    pin::Pin,
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering::Relaxed},
        mpsc,
    },
    task::{Context, Poll, Waker},
    thread,
};

use http::{HeaderMap, Request, Response};
use http_body::{Body, Frame, SizeHint};
use http_body_util::{BodyExt, Empty, Full};
use tokio_test::{assert_pending, assert_ready, assert_ready_err, assert_ready_ok, task};
use tower::{Layer, Service, ServiceBuilder, ServiceExt, buffer::Buffer, service_fn};
use tower_request_context::{
    Inherit, RequestContext, RequestContextLayer, ResponseBody, Scope, Scoped, SpanId, Task,
    TraceId, WithContext,
};
use tower_test::mock::{self, Mock};
use tracing::Span;
use tracing_subscriber::util::SubscriberInitExt;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Tenant(u32);

struct User(&'static str);

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

fn frame<B: Body + Unpin>(body: &mut B) -> Poll<Option<Result<Frame<B::Data>, B::Error>>> {
    Pin::new(body).poll_frame(&mut Context::from_waker(Waker::noop()))
}

fn panics(f: impl FnOnce()) -> bool {
    catch_unwind(AssertUnwindSafe(f)).is_err()
}

// --- An inner service that notes what it sees.

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Place {
    Call,
    Poll,
    FutureDrop,
    Frame,
    BodyDrop,
}
use Place::{BodyDrop, Call, FutureDrop, Poll as FuturePoll};

/// What was seen where. Panics at the place where it is told to.
#[derive(Clone, Default)]
struct Notes {
    seen: Arc<Mutex<Vec<(Place, Option<u32>)>>>,
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
    fn taken(&self) -> Vec<(Place, Option<u32>)> {
        std::mem::take(&mut self.seen.lock().unwrap())
    }

    /// Pending once. The body yields two frames.
    fn service<Req>(
        &self,
    ) -> impl Service<
        Req,
        Response = Response<NotingBody>,
        Error = Infallible,
        Future = NotingFuture,
    > + Clone
    + use<Req> {
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

struct NotingBody {
    notes: Notes,
    frames: u32,
}

impl Body for NotingBody {
    type Data = &'static [u8];
    type Error = Infallible;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        _: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<&'static [u8]>, Infallible>>> {
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

// --- The layer.

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
            Ok::<_, Infallible>(Response::new(Empty::<&[u8]>::new()))
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
        Ok::<_, Infallible>(Response::new(Empty::<&[u8]>::new()))
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
        .layer(service_fn(|_: Request<()>| async { Err::<Response<Empty<&[u8]>>, _>("refused") }));
    let error = assert_ready_err!(task::spawn(service.call(request())).poll());
    assert_eq!(error, "refused");
}

#[test]
fn a_value_lives_as_long_as_its_response_or_whoever_captured_it() {
    let value = Arc::new(());
    let made = value.clone();
    let mut service =
        RequestContextLayer::new(move |_: &Request<()>| made.clone()).layer(service_fn(
            |_: Request<()>| async { Ok::<_, Infallible>(Response::new(Empty::<&[u8]>::new())) },
        ));
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

// --- What a layer owes its inner service.

type HttpMock = Mock<Request<()>, Response<Full<&'static [u8]>>>;

fn mock() -> (HttpMock, mock::Handle<Request<()>, Response<Full<&'static [u8]>>>) {
    mock::pair()
}

#[test]
fn readiness_is_that_of_the_inner_service() {
    let (inner, mut handle) = mock();
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
    handle.send_error("closed");
    assert_ready_ok!(service.poll_ready());
    drop(service.call(1));
    assert_eq!(assert_ready_err!(service.poll_ready()).to_string(), "closed");
}

#[test]
fn a_clone_must_become_ready_by_itself() {
    let (inner, mut handle) = mock();
    let mut service = mock::Spawn::new(layer_of(7).layer(inner));
    handle.allow(1);
    assert_ready_ok!(service.poll_ready());
    let mut clone = service.clone();
    assert_pending!(clone.poll_ready());
    drop(service.call(request()));
    handle.allow(1);
    assert_ready_ok!(clone.poll_ready());
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

// --- The body.

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
    struct Sized {
        hint: SizeHint,
        end: bool,
    }
    impl Body for Sized {
        type Data = &'static [u8];
        type Error = &'static str;
        fn poll_frame(
            self: Pin<&mut Self>,
            _: &mut Context<'_>,
        ) -> Poll<Option<Result<Frame<&'static [u8]>, &'static str>>> {
            Poll::Ready(Some(Err("broken")))
        }
        fn is_end_stream(&self) -> bool {
            self.end
        }
        fn size_hint(&self) -> SizeHint {
            self.hint.clone()
        }
    }

    let mut between = SizeHint::new();
    between.set_lower(3);
    between.set_upper(u64::MAX);
    for hint in [SizeHint::new(), SizeHint::with_exact(5), between] {
        for end in [false, true] {
            let mut service = layer_of(7).layer(service_fn(|_: Request<()>| {
                let hint = hint.clone();
                async move { Ok::<_, Infallible>(Response::new(Sized { hint, end })) }
            }));
            let response = assert_ready_ok!(task::spawn(service.call(request())).poll());
            let mut body = response.into_body();
            assert_eq!(body.size_hint().lower(), hint.lower());
            assert_eq!(body.size_hint().upper(), hint.upper());
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

// --- The request's type map.

/// The tenant and the user in the context in the type map, and whether it is the current one.
fn in_the_type_map<B>(request: &Request<B>) -> Option<(Option<u32>, Option<&'static str>, bool)> {
    let context = request.extensions().get::<RequestContext>()?;
    let tenant = context.get().map(|Tenant(id)| *id);
    let user = context.get().map(|User(name)| *name);
    Some((tenant, user, context.ptr_eq(&RequestContext::current())))
}

/// Notes what is in the type map and what is current in `call`.
type TypeMapNotes = Arc<Mutex<Vec<Option<(Option<u32>, Option<&'static str>, bool)>>>>;

fn type_map_service(
    notes: &TypeMapNotes,
) -> impl Service<
    Request<()>,
    Response = Response<Empty<&'static [u8]>>,
    Error = Infallible,
    Future: Send,
> + Clone
+ Send
+ use<> {
    let notes = notes.clone();
    service_fn(move |request: Request<()>| {
        notes.lock().unwrap().push(in_the_type_map(&request));
        async { Ok::<_, Infallible>(Response::new(Empty::new())) }
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

#[tokio::test]
async fn behind_a_buffer_an_inner_layer_adds_to_the_context_in_the_type_map() {
    let notes = TypeMapNotes::default();
    let inner =
        RequestContextLayer::new(|_: &Request<()>| User("ada")).layer(type_map_service(&notes));
    let mut service = layer_of(7).in_extensions().layer(Buffer::new(inner, 1));
    service.ready().await.unwrap().call(request()).await.unwrap();
    assert_eq!(*notes.lock().unwrap(), [Some((Some(7), Some("ada"), true))]);
}

// --- Where the table in the crate's docs says that it is current, and where not.

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

// --- `scope` and `sync_scope`.

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
    assert!(!Scope::is_current(&context));
    context.clone().sync_scope(|| {
        assert!(RequestContext::current().ptr_eq(&context));
        assert!(Scope::is_current(&context));
        assert!(!Scope::is_current(&context_of(7)));
    });
    assert!(Scope::is_current(&RequestContext::new()));
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
        [(FuturePoll, Some(7)), (FuturePoll, Some(7)), (FutureDrop, Some(7)), (BodyDrop, None)]
    );
}

/// Pending twice, and notes each time what it sees.
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
    let steps = || Steps { polls: 0, seen: Vec::new() };
    // Each bit says whose turn it is: all orders of three turns each.
    let orders = (0_u32..1 << 6).filter(|order| order.count_ones() == 3);
    let mut count = 0;
    for order in orders {
        count += 1;
        context_of(0).sync_scope(|| {
            let mut futures = [
                task::spawn(context_of(1).scope(steps())),
                // Nested: its inner scope is its own too.
                task::spawn(context_of(9).scope(context_of(2).scope(steps()))),
            ]
            .map(Some);
            // The types differ, so they are boxed by what they do.
            let [first, second] = &mut futures;
            let mut ready = [None, None];
            for turn in 0..6 {
                if order >> turn & 1 == 0 {
                    if let Poll::Ready(seen) = first.as_mut().unwrap().poll() {
                        ready[0] = Some(seen);
                    }
                } else if let Poll::Ready(seen) = second.as_mut().unwrap().poll() {
                    ready[1] = Some(seen);
                }
                assert_eq!(tenant(), Some(0));
            }
            assert_eq!(ready, [Some(vec![Some(1); 3]), Some(vec![Some(2); 3])]);
        });
    }
    assert_eq!(count, 20);
}
