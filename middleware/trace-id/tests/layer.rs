//! The layers: ids in, through tasks, and out; spans; the response.
#![allow(missing_docs, clippy::unwrap_used)] // Tests.

use std::{
    collections::BTreeMap,
    convert::Infallible,
    fmt::Write,
    pin::Pin,
    sync::{Arc, Mutex, atomic::AtomicUsize, atomic::Ordering::Relaxed},
    task::{Context, Poll, Waker},
};

use allocation_counter::measure;
use http::{HeaderMap, HeaderName, HeaderValue, Request, Response, StatusCode, Uri};
use http_body::{Body, Frame, SizeHint};
use http_body_util::{BodyExt, Empty, Full};
use tokio_test::{assert_pending, assert_ready_err, assert_ready_ok};
use tower::{Layer, Service, ServiceBuilder, ServiceExt, service_fn};
use tower_http::{
    follow_redirect::{FollowRedirectLayer, policy::FilterCredentials},
    request_id::{MakeRequestUuid, PropagateRequestIdLayer, SetRequestIdLayer},
    trace::TraceLayer,
};
use tower_request_context::{RequestContext, RequestId, SpanId, TraceId};
use tower_task_set::{AtEnd, TaskError, TaskRegistry, TaskSet, TaskSetLayer};
use tower_test::mock;
use tower_trace_id::{PropagateLayer, TraceContext, TraceIdLayer, TraceParent, Trust, inject};
use tracing::{
    Event, Id, Span, Subscriber,
    field::{Field, Visit},
    span::{Attributes, Record},
    subscriber::DefaultGuard,
};
use tracing_subscriber::{
    Registry,
    filter::{LevelFilter, Targets},
    layer::{self, SubscriberExt},
    registry::LookupSpan,
    util::SubscriberInitExt,
};

const TRACE: &str = "0af7651916cd43dd8448eb211c80319c";
const SPAN: &str = "b7ad6b7169203331";
const SAMPLED: &str = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";

type EmptyBody = Empty<bytes::Bytes>;

fn request(fields: &[(&'static str, &str)]) -> Request<()> {
    let mut request = Request::new(());
    for (name, value) in fields {
        request.headers_mut().append(*name, HeaderValue::from_bytes(value.as_bytes()).unwrap());
    }
    request
}

fn behind_a_gateway() -> TraceIdLayer {
    TraceIdLayer::new().trust(Trust::Continue)
}

/// The context that the handler sees, and the response.
async fn serve<L>(layer: L, request: Request<()>) -> (TraceContext, Response<()>)
where
    L: Layer<
            tower::util::BoxService<Request<()>, Response<EmptyBody>, Infallible>,
            Service: Service<Request<()>, Response = Response<AnyBody>, Error = Infallible>,
        >,
{
    let seen = Arc::new(Mutex::new(None));
    let handler_seen = seen.clone();
    let handler = service_fn(move |_: Request<()>| {
        let seen = handler_seen.clone();
        async move {
            *seen.lock().unwrap() = TraceContext::current();
            Ok::<_, Infallible>(Response::new(EmptyBody::new()))
        }
    });
    let service = layer.layer(tower::util::BoxService::new(handler));
    let response = service.oneshot(request).await.unwrap().map(drop);
    let context = seen.lock().unwrap().take().unwrap();
    (context, response)
}

type AnyBody = tower_trace_id::ResponseBody<EmptyBody>;

#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Seen {
    name: &'static str,
    fields: BTreeMap<&'static str, String>,
    parent: Option<u64>,
    follows: Vec<u64>,
    id: u64,
    closed: bool,
}

/// What is logged, with the spans that it is logged in, innermost first.
type Line = (String, Vec<u64>);

#[derive(Clone, Default)]
struct Recorder(Arc<Mutex<(Vec<Seen>, Vec<Line>)>>);

impl Recorder {
    fn install(&self) -> DefaultGuard {
        Registry::default().with(self.clone()).set_default()
    }

    fn spans(&self, name: &str) -> Vec<Seen> {
        let all = self.0.lock().unwrap().0.clone();
        all.into_iter().filter(|span| span.name == name).collect()
    }

    fn span(&self, name: &str) -> Seen {
        let [span] = <[_; 1]>::try_from(self.spans(name)).unwrap();
        span
    }

    /// For each line the spans around it.
    fn lines(&self) -> Vec<(String, Vec<Seen>)> {
        let (spans, lines) = self.0.lock().unwrap().clone();
        let find = |id: u64| spans.iter().find(|span| span.id == id).unwrap().clone();
        lines.into_iter().map(|(line, ids)| (line, ids.into_iter().map(find).collect())).collect()
    }
}

struct Fields<'a>(&'a mut BTreeMap<&'static str, String>);

impl Visit for Fields<'_> {
    fn record_debug(&mut self, field: &Field, value: &dyn std::fmt::Debug) {
        let mut text = String::new();
        write!(text, "{value:?}").unwrap();
        self.0.insert(field.name(), text);
    }

    fn record_str(&mut self, field: &Field, value: &str) {
        self.0.insert(field.name(), value.to_owned());
    }
}

impl<S: Subscriber + for<'a> LookupSpan<'a>> layer::Layer<S> for Recorder {
    fn on_new_span(&self, attrs: &Attributes<'_>, id: &Id, cx: layer::Context<'_, S>) {
        let parent = cx.span(id).unwrap().parent().map(|span| span.id().into_u64());
        let name = attrs.metadata().name();
        let mut span = Seen { name, parent, id: id.into_u64(), ..Seen::default() };
        attrs.record(&mut Fields(&mut span.fields));
        self.0.lock().unwrap().0.push(span);
    }

    fn on_record(&self, id: &Id, values: &Record<'_>, _: layer::Context<'_, S>) {
        let mut inner = self.0.lock().unwrap();
        let span = inner.0.iter_mut().rev().find(|span| span.id == id.into_u64()).unwrap();
        values.record(&mut Fields(&mut span.fields));
    }

    fn on_follows_from(&self, id: &Id, follows: &Id, _: layer::Context<'_, S>) {
        let mut inner = self.0.lock().unwrap();
        let span = inner.0.iter_mut().rev().find(|span| span.id == id.into_u64()).unwrap();
        span.follows.push(follows.into_u64());
    }

    fn on_event(&self, event: &Event<'_>, cx: layer::Context<'_, S>) {
        let mut fields = BTreeMap::new();
        event.record(&mut Fields(&mut fields));
        let ids = cx.event_scope(event).into_iter().flatten().map(|span| span.id().into_u64());
        let line = (fields.remove("message").unwrap_or_default(), ids.collect());
        self.0.lock().unwrap().1.push(line);
    }

    fn on_close(&self, id: Id, _: layer::Context<'_, S>) {
        let mut inner = self.0.lock().unwrap();
        let span = inner.0.iter_mut().rev().find(|span| span.id == id.into_u64()).unwrap();
        span.closed = true;
    }
}

/// The ids of a context, as a span's fields say them.
fn ids(context: &TraceContext) -> [String; 3] {
    [
        context.trace_id().to_string(),
        context.span_id().to_string(),
        context.request_id().to_string(),
    ]
}

fn ids_in(span: &Seen) -> [String; 3] {
    ["trace_id", "span_id", "request_id"].map(|field| span.fields[field].clone())
}

#[tokio::test]
async fn behind_a_gateway_the_trace_goes_on() {
    let fields = [("traceparent", SAMPLED), ("tracestate", "a=1"), ("x-request-id", "order-7")];
    let (context, response) = serve(behind_a_gateway(), request(&fields)).await;
    assert_eq!(context.trace_id().to_string(), TRACE);
    assert_eq!(context.parent_id().unwrap().to_string(), SPAN);
    assert_ne!(context.span_id().to_string(), SPAN);
    assert!(context.is_sampled() && !context.is_random());
    assert_eq!(context.trace_state().as_str(), "a=1");
    assert_eq!(response.headers()["x-request-id"], "order-7");
}

#[tokio::test]
async fn by_default_the_trace_restarts_and_links() {
    let fields = [("traceparent", SAMPLED), ("tracestate", "a=1"), ("x-request-id", "order-7")];
    let (context, response) = serve(TraceIdLayer::new(), request(&fields)).await;
    assert_ne!(context.trace_id().to_string(), TRACE);
    assert_eq!(context.parent_id(), None);
    assert_eq!(context.link().unwrap().to_string(), SAMPLED);
    assert!(!context.is_sampled() && context.is_random());
    assert!(context.trace_state().is_empty());
    assert_eq!(response.headers()["x-request-id"], "order-7");
}

#[tokio::test]
async fn trust_can_be_chosen_for_each_request() {
    let layer = || {
        TraceIdLayer::new().trust(|request: &Request<()>| {
            match request.headers().get("authorization") {
                Some(token) if token == "friend" => Trust::Continue,
                Some(token) if token == "panic" => panic!("a user's closure"),
                _ => Trust::Restart,
            }
        })
    };
    for (token, continued) in [("friend", true), ("stranger", false), ("panic", false)] {
        let fields = [("traceparent", SAMPLED), ("authorization", token)];
        let (context, _) = serve(layer(), request(&fields)).await;
        assert_eq!(context.trace_id().to_string() == TRACE, continued, "{token}");
    }
}

#[tokio::test]
async fn the_sampling_decision_can_be_ours() {
    for (ratio, sampled) in
        [(0.0, 0..=0), (1.0, 100..=100), (0.5, 20..=80), (f64::NAN, 0..=0), (7.0, 100..=100)]
    {
        let layer = TraceIdLayer::new().sample_ratio(ratio);
        let (mut count, mut restarted) = (0, 0);
        for _ in 0..100 {
            let fields = [("traceparent", SAMPLED)];
            let (context, _) = serve(layer.clone().trust(Trust::Resample), request(&fields)).await;
            assert_eq!(context.trace_id().to_string(), TRACE);
            count += usize::from(context.is_sampled());
            let (context, _) = serve(layer.clone(), request(&fields)).await;
            restarted += usize::from(context.is_sampled());
            let (context, _) = serve(layer.clone().trust(Trust::Continue), request(&fields)).await;
            assert!(context.is_sampled(), "that is the caller's");
        }
        assert!(
            sampled.contains(&count) && sampled.contains(&restarted),
            "{ratio}: {count}, {restarted}"
        );
    }
}

#[tokio::test]
async fn an_invalid_request_id_is_replaced() {
    for bad in ["", "with space", "\u{1b}[31m", "a\"b", "ü", &"a".repeat(129), &"a".repeat(65536)]
    {
        let Ok(value) = HeaderValue::from_bytes(bad.as_bytes()) else { continue };
        let mut request = request(&[]);
        request.headers_mut().insert("x-request-id", value);
        let (context, response) = serve(TraceIdLayer::new(), request).await;
        let id = context.request_id().as_str();
        assert!(id.len() == 32 && id != bad);
        assert_ne!(id, context.trace_id().to_string(), "that would tell it unasked");
        assert_eq!(response.headers()["x-request-id"], id);
    }
}

/// H24.
#[tokio::test]
async fn the_request_stays_as_it_came() {
    let fields = [
        ("traceparent", "nonsense"),
        ("x-request-id", "b c"),
        ("baggage", "a=1"),
        ("grpc-trace-bin", "AAA"),
        ("uber-trace-id", "1:2:3:4"),
    ];
    let (mock, mut handle) = mock::spawn_layer(behind_a_gateway());
    let mut mock = mock;
    assert_ready_ok!(mock.poll_ready());
    handle.allow(1);
    let mut response = tokio_test::task::spawn(mock.call(request(&fields)));
    assert_pending!(response.poll());
    let (got, send): (Request<()>, _) = handle.next_request().await.unwrap();
    assert_eq!(got.headers(), request(&fields).headers());
    send.send_response(Response::new(EmptyBody::new()));
    assert_ready_ok!(response.poll());
}

#[tokio::test]
async fn readiness_and_errors_are_the_inner_services() {
    let (mut mock, mut handle) =
        mock::spawn_layer::<Request<()>, Response<EmptyBody>, _>(TraceIdLayer::new());
    handle.allow(0);
    assert_pending!(mock.poll_ready());
    handle.allow(1);
    assert!(mock.is_woken());
    assert_ready_ok!(mock.poll_ready());
    let mut response = tokio_test::task::spawn(mock.call(request(&[])));
    assert_pending!(response.poll());
    let (_, send) = handle.next_request().await.unwrap();
    send.send_error("out of luck");
    assert_eq!(assert_ready_err!(response.poll()).to_string(), "out of luck");
    handle.send_error("closed");
    assert_eq!(assert_ready_err!(mock.poll_ready()).to_string(), "closed");
}

/// Notes the trace id and the current span wherever it runs.
struct Watching {
    notes: Arc<Mutex<Vec<Note>>>,
    places: [&'static str; 2],
    polls: usize,
}

type Note = (&'static str, Option<[String; 3]>, Option<u64>);

impl Watching {
    fn note(&self, place: &'static str) {
        let ids = TraceContext::current().as_ref().map(ids);
        self.notes.lock().unwrap().push((place, ids, Span::current().id().map(|id| id.into_u64())));
    }
}

impl Future for Watching {
    type Output = Result<Response<Watching>, Infallible>;

    fn poll(mut self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<Self::Output> {
        self.note(self.places[0]);
        self.polls += 1;
        if self.polls == 1 {
            return Poll::Pending;
        }
        let body =
            Watching { notes: self.notes.clone(), places: ["frame", "drop of body"], polls: 0 };
        Poll::Ready(Ok(Response::new(body)))
    }
}

impl Body for Watching {
    type Data = &'static [u8];
    type Error = Infallible;

    fn poll_frame(
        self: Pin<&mut Self>,
        _: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Self::Data>, Infallible>>> {
        self.note(self.places[0]);
        Poll::Ready(Some(Ok(Frame::data(b"data"))))
    }

    fn is_end_stream(&self) -> bool {
        self.polls == 7
    }

    fn size_hint(&self) -> SizeHint {
        SizeHint::with_exact(42)
    }
}

impl Drop for Watching {
    fn drop(&mut self) {
        self.note(self.places[1]);
    }
}

/// Serves one request to the end of its body, and yields what was seen where.
fn watch(layer: &TraceIdLayer) -> Vec<Note> {
    let notes = Arc::new(Mutex::new(Vec::new()));
    let inner_notes = notes.clone();
    let mut service = layer.layer(service_fn(move |_: Request<()>| {
        let places = ["poll", "drop of future"];
        let future = Watching { notes: inner_notes.clone(), places, polls: 0 };
        future.note("call");
        future
    }));
    let mut cx = Context::from_waker(Waker::noop());
    let mut future = Box::pin(service.call(request(&[])));
    assert!(future.as_mut().poll(&mut cx).is_pending());
    let Poll::Ready(Ok(response)) = future.as_mut().poll(&mut cx) else { panic!("not ready") };
    let mut body = response.into_body();
    assert!(Pin::new(&mut body).poll_frame(&mut cx).is_ready());
    assert_eq!((body.is_end_stream(), body.size_hint().exact()), (false, Some(42)));
    drop((body, future, service.call(request(&[]))));
    assert!(TraceContext::current().is_none());
    std::mem::take(&mut *notes.lock().unwrap())
}

/// H19 too: with no subscriber, with one, and with one that hides our spans.
#[test]
fn context_and_span_are_there_wherever_the_request_runs() {
    const PLACES: [&str; 8] = [
        "call",
        "poll",
        "poll",
        "drop of future",
        "frame",
        "call",
        "drop of body",
        "drop of future",
    ];
    let sorted = |notes: &[Note]| {
        let mut places: Vec<_> = notes.iter().map(|note| note.0).collect();
        places.sort_unstable();
        places
    };
    let mut expected = PLACES;
    expected.sort_unstable();

    let notes = watch(&TraceIdLayer::new());
    assert_eq!(sorted(&notes), expected);
    assert!(notes.iter().all(|(_, ids, span)| ids.is_some() && span.is_none()));

    let recorder = Recorder::default();
    let filter = Targets::new()
        .with_default(LevelFilter::TRACE)
        .with_target("tower_trace_id", LevelFilter::OFF);
    let hidden = Registry::default().with(recorder.clone()).with(filter).set_default();
    assert!(
        watch(&TraceIdLayer::new()).iter().all(|(_, ids, span)| ids.is_some() && span.is_none())
    );
    assert_eq!(recorder.spans("request"), []);
    drop(hidden);

    let installed = recorder.install();
    let notes = watch(&TraceIdLayer::new());
    assert_eq!(sorted(&notes), expected);
    let spans = recorder.spans("request");
    for (place, ids, id) in notes {
        let span = spans.iter().find(|span| Some(span.id) == id).unwrap();
        assert_eq!(ids_in(span), ids.unwrap(), "{place}");
    }
    assert!(spans.iter().all(|span| span.closed));
    drop(installed);
}

#[test]
fn a_default_body_is_empty_and_outside_of_any_request() {
    let body = AnyBody::default();
    assert!(body.is_end_stream());
    assert_eq!(body.size_hint().exact(), Some(0));
}

#[tokio::test]
async fn of_nested_layers_the_outer_one_counts() {
    let recorder = Recorder::default();
    let _installed = recorder.install();
    let seen = Arc::new(Mutex::new(Vec::new()));
    let handler_seen = seen.clone();
    let service = ServiceBuilder::new()
        .layer(TraceIdLayer::new())
        .layer(behind_a_gateway().trace_id_header(HeaderName::from_static("x-inner")))
        .service(service_fn(move |_: Request<()>| {
            handler_seen.lock().unwrap().extend(TraceContext::current());
            async { Ok::<_, Infallible>(Response::new(EmptyBody::new())) }
        }));
    let response = service.oneshot(request(&[("traceparent", SAMPLED)])).await.unwrap();
    let context = seen.lock().unwrap().pop().unwrap();
    assert_ne!(context.trace_id().to_string(), TRACE);
    let span = recorder.span("request");
    assert_eq!(ids_in(&span), ids(&context));
    assert_eq!(span.fields["linked_trace_id"], TRACE);
    assert_eq!(response.headers().get_all("x-request-id").iter().count(), 1);
    assert!(!response.headers().contains_key("x-inner"));
}

#[tokio::test]
async fn behind_a_buffer_the_context_is_in_the_type_map() {
    let inner = service_fn(|request: Request<()>| {
        assert!(TraceContext::current().is_none(), "this is another task");
        let context = request.extensions().get::<RequestContext>().unwrap();
        assert_eq!(context.get::<TraceId>().unwrap().to_string(), TRACE);
        async { Ok::<_, Infallible>(Response::new(EmptyBody::new())) }
    });
    let service = behind_a_gateway().in_extensions().layer(tower::buffer::Buffer::new(inner, 1));
    service.oneshot(request(&[("traceparent", SAMPLED)])).await.unwrap();
}

#[tokio::test]
async fn of_nested_layers_an_inner_one_puts_the_context_of_the_outer_one_there() {
    let inner = service_fn(|request: Request<()>| {
        assert!(TraceContext::current().is_none(), "this is another task");
        let context = request.extensions().get::<RequestContext>().unwrap();
        assert_eq!(context.get::<TraceId>().unwrap().to_string(), TRACE);
        async { Ok::<_, Infallible>(Response::new(EmptyBody::new())) }
    });
    let service = ServiceBuilder::new()
        .layer(behind_a_gateway())
        .layer(TraceIdLayer::new().in_extensions())
        .buffer(1)
        .service(inner);
    service.oneshot(request(&[("traceparent", SAMPLED)])).await.unwrap();
}

#[tokio::test]
async fn a_plain_service_has_a_trace_for_each_call() {
    let recorder = Recorder::default();
    let _installed = recorder.install();
    let service = TraceIdLayer::new().plain().layer(service_fn(async |job: u32| {
        tokio::task::yield_now().await;
        Ok::<_, Infallible>((job, TraceContext::current().unwrap()))
    }));
    let (job, first) = service.clone().oneshot(1).await.unwrap();
    let (_, second) = service.clone().oneshot(2).await.unwrap();
    assert_eq!(job, 1);
    assert_ne!(first.trace_id(), second.trace_id());
    assert_eq!(ids_in(&recorder.spans("request")[1]), ids(&second));

    let carried =
        TraceContext::extract(request(&[("traceparent", SAMPLED)]).headers(), Trust::Continue);
    let scope = RequestContext::new().with_inherited(carried);
    let (_, third) = scope.scope(service.oneshot(3)).await.unwrap();
    assert_eq!(third.trace_id().to_string(), TRACE);
}

#[tokio::test]
async fn the_response_has_one_request_id_and_no_tracestate() {
    let inner = service_fn(async |_: Request<()>| {
        let mut response = Response::new(EmptyBody::new());
        for id in ["upstream-1", "upstream-2"] {
            response.headers_mut().append("x-request-id", HeaderValue::from_static(id));
        }
        response.headers_mut().append("tracestate", HeaderValue::from_static("secret=1"));
        Ok::<_, Infallible>(response)
    });
    let fields = [("traceparent", SAMPLED), ("tracestate", "a=1"), ("x-request-id", "order-7")];
    let service =
        behind_a_gateway().trace_id_header(HeaderName::from_static("x-trace-id")).layer(inner);
    let response = service.oneshot(request(&fields)).await.unwrap();
    let ids: Vec<_> = response.headers().get_all("x-request-id").iter().collect();
    assert_eq!(ids, ["order-7"]);
    assert_eq!(response.headers()["x-trace-id"], TRACE);
    assert_eq!(response.headers().len(), 2, "and nothing else");

    let (context, response) = serve(TraceIdLayer::new(), request(&fields)).await;
    assert_eq!(response.headers().len(), 1, "unasked it does not tell the trace");
    assert_ne!(context.trace_id().to_string(), response.headers()["x-request-id"]);
}

#[tokio::test]
async fn what_a_handler_says_of_the_ids_goes_though_its_map_is_full() {
    for says in [false, true] {
        let inner = service_fn(move |_: Request<()>| {
            let mut response = Response::new(EmptyBody::new());
            let ids = ["x-request-id", "x-request-id", "x-trace-id"];
            for name in ids.into_iter().filter(|_| says) {
                response.headers_mut().append(name, HeaderValue::from_static("upstream"));
            }
            let mut names = (0..).map(|n| HeaderName::try_from(format!("x-{n}")).unwrap());
            let mut fill =
                |name| response.headers_mut().try_append(name, HeaderValue::from_static(""));
            while fill(names.next().unwrap()).is_ok() {}
            std::future::ready(Ok::<_, Infallible>(response))
        });
        let fields = [("traceparent", SAMPLED), ("x-request-id", "order-7")];
        let service =
            behind_a_gateway().trace_id_header(HeaderName::from_static("x-trace-id")).layer(inner);
        let response = service.oneshot(request(&fields)).await.unwrap();
        let told = ["x-request-id", "x-trace-id"]
            .map(|name| response.headers().get_all(name).iter().collect::<Vec<_>>());
        // There is no room for what it had not said.
        let expected = if says { [vec!["order-7"], vec![TRACE]] } else { [vec![], vec![]] };
        assert_eq!(told, expected);
    }
}

/// H3: of hostile headers nothing is in a span, a line or the response.
#[tokio::test]
async fn no_byte_of_an_invalid_value_gets_out() {
    let recorder = Recorder::default();
    let _installed = recorder.install();
    for trust in [Trust::Restart, Trust::Continue] {
        let mut request = request(&[]);
        for name in
            ["traceparent", "tracestate", "b3", "x-b3-traceid", "x-b3-sampled", "x-request-id"]
        {
            let value = HeaderValue::from_bytes(b"evil\"} \xff \tevil").unwrap();
            request.headers_mut().insert(name, value);
        }
        let mut out = HeaderMap::new();
        let (context, response) = serve(TraceIdLayer::new().trust(trust), request).await;
        context.inject(&mut out);
        assert!(!format!("{:?} {:?} {context:?}", response.headers(), out).contains("evil"));
    }
    assert!(!format!("{:?} {:?}", recorder.spans("request"), recorder.lines()).contains("evil"));
}

#[tokio::test]
async fn it_works_on_either_side_of_a_trace_layer() {
    let handler = || {
        service_fn(async |_: Request<EmptyBody>| {
            tracing::info!("line");
            tokio::task::yield_now().await;
            tracing::info!("line");
            Ok::<_, Infallible>(Response::new(Full::new(&b"body"[..])))
        })
    };
    let make = |_: &Request<EmptyBody>| tracing::info_span!("theirs");

    let recorder = Recorder::default();
    let installed = recorder.install();
    let inside = ServiceBuilder::new()
        .layer(behind_a_gateway())
        .layer(TraceLayer::new_for_http().make_span_with(make))
        .service(handler());
    let response = inside
        .oneshot(request(&[("traceparent", SAMPLED)]).map(|()| EmptyBody::new()))
        .await
        .unwrap();
    response.into_body().collect().await.unwrap();
    drop(installed);
    assert_eq!(recorder.span("theirs").parent, Some(recorder.span("request").id));

    let outside = Recorder::default();
    let installed = outside.install();
    let service = ServiceBuilder::new()
        .layer(TraceLayer::new_for_http().make_span_with(make))
        .layer(behind_a_gateway())
        .service(handler());
    let response = service
        .oneshot(request(&[("traceparent", SAMPLED)]).map(|()| EmptyBody::new()))
        .await
        .unwrap();
    response.into_body().collect().await.unwrap();
    drop(installed);
    assert_eq!(outside.span("request").parent, Some(outside.span("theirs").id));

    for recorder in [recorder, outside] {
        let lines = recorder.lines();
        let lines: Vec<_> = lines.iter().filter(|(line, _)| line == "line").collect();
        assert_eq!(lines.len(), 2);
        for (_, spans) in lines {
            assert_eq!(spans.len(), 2);
            assert!(
                spans.iter().any(|span| span.fields.get("trace_id").is_some_and(|id| id == TRACE))
            );
        }
    }
}

#[tokio::test]
async fn beside_tower_https_request_ids_there_is_still_one() {
    let service = ServiceBuilder::new()
        .layer(TraceIdLayer::new())
        .layer(SetRequestIdLayer::x_request_id(MakeRequestUuid))
        .layer(PropagateRequestIdLayer::x_request_id())
        .service(service_fn(async |_: Request<()>| {
            let id = TraceContext::current().unwrap().request_id().to_string();
            Ok::<_, Infallible>(Response::new(id))
        }));
    let response = service.oneshot(request(&[])).await.unwrap();
    let ids: Vec<_> = response.headers().get_all("x-request-id").iter().cloned().collect();
    let body = response.into_body().collect().await.unwrap().to_bytes();
    assert_eq!(ids.iter().map(HeaderValue::as_bytes).collect::<Vec<_>>(), [&body[..]]);
}

/// What one task of each kind sees, and what the handler does.
async fn with_tasks(layer: TraceIdLayer) -> (TraceContext, BTreeMap<&'static str, TraceContext>) {
    let registry = TaskRegistry::new();
    let seen = Arc::new(Mutex::new(BTreeMap::new()));
    let all = seen.clone();
    let service = ServiceBuilder::new().layer(layer).layer(TaskSetLayer::new(&registry)).service(
        service_fn(move |_: Request<()>| {
            let all = all.clone();
            async move {
                let tasks = TaskSet::current().unwrap();
                let look = |name: &'static str| {
                    let all = all.clone();
                    async move {
                        tracing::info!("{name}");
                        tokio::task::yield_now().await;
                        all.lock().unwrap().insert(name, TraceContext::current().unwrap());
                        let context = RequestContext::current();
                        let same = TraceContext::current().unwrap();
                        assert_eq!(context.get::<TraceId>(), Some(&same.trace_id()));
                        assert_eq!(context.get::<SpanId>(), Some(&same.span_id()));
                        assert_eq!(context.get::<RequestId>(), Some(same.request_id()));
                    }
                };
                tasks.spawn("plain", look("plain")).unwrap();
                tasks.task("kept").at_end(AtEnd::Keep).spawn(look("kept")).unwrap();
                let (nested, inner) = (look("nested"), look("inner"));
                let own = tasks.clone();
                tasks
                    .spawn("nested", async move {
                        own.spawn("inner", inner).unwrap();
                        nested.await;
                    })
                    .unwrap()
                    .await
                    .unwrap();
                all.lock().unwrap().insert("handler", TraceContext::current().unwrap());
                Ok::<_, Infallible>(Response::new(EmptyBody::new()))
            }
        }),
    );
    let response = service.oneshot(request(&[("traceparent", SAMPLED)])).await.unwrap();
    response.into_body().collect().await.unwrap();
    registry.close();
    registry.wait().await;
    let mut seen = std::mem::take(&mut *seen.lock().unwrap());
    (seen.remove("handler").unwrap(), seen)
}

fn assert_tasks(handler: &TraceContext, tasks: &BTreeMap<&'static str, TraceContext>) {
    assert_eq!(tasks.len(), 4);
    for context in tasks.values() {
        assert_eq!(context.trace_id(), handler.trace_id());
        assert_eq!(context.request_id(), handler.request_id());
        assert_eq!(context.is_sampled(), handler.is_sampled());
    }
    let mut spans: Vec<_> = tasks.values().map(TraceContext::span_id).collect();
    spans.push(handler.span_id());
    spans.sort_unstable();
    spans.dedup();
    assert_eq!(spans.len(), 5, "each is a span of its own");
    assert_eq!(tasks["plain"].parent_id(), Some(handler.span_id()));
    assert_eq!(tasks["inner"].parent_id(), Some(tasks["nested"].span_id()));
    assert_eq!((tasks["kept"].parent_id(), tasks["plain"].link()), (None, None));
    assert_eq!(tasks["kept"].link(), Some(handler.to_trace_parent()));
}

/// H19.
#[tokio::test]
async fn without_a_subscriber_a_task_has_its_ids() {
    let (handler, tasks) = with_tasks(behind_a_gateway()).await;
    assert_eq!(handler.trace_id().to_string(), TRACE);
    assert_tasks(&handler, &tasks);
}

#[tokio::test]
async fn with_a_filter_that_hides_the_spans_a_task_has_its_ids() {
    let recorder = Recorder::default();
    let filter = Targets::new()
        .with_default(LevelFilter::TRACE)
        .with_target("tower_trace_id", LevelFilter::OFF);
    let _installed = Registry::default().with(recorder.clone()).with(filter).set_default();
    let (handler, tasks) = with_tasks(behind_a_gateway()).await;
    assert_tasks(&handler, &tasks);
    assert_eq!(recorder.spans("task"), []);
}

/// H18, H20.
#[tokio::test]
async fn the_span_of_a_task_repeats_the_trace_id_and_nests_or_links() {
    let recorder = Recorder::default();
    let _installed = recorder.install();
    let (handler, tasks) = with_tasks(behind_a_gateway()).await;
    assert_tasks(&handler, &tasks);
    let request = recorder.span("request");
    assert_eq!(ids_in(&request), ids(&handler));
    let spans = recorder.spans("task");
    assert_eq!(spans.len(), 4);
    let of = |name: &str| spans.iter().find(|span| span.fields["task"] == name).unwrap();
    for (name, context) in &tasks {
        assert_eq!(ids_in(of(name)), ids(context));
    }
    assert_eq!(of("plain").parent, Some(request.id));
    assert_eq!(of("inner").parent, Some(of("nested").id));
    assert_eq!((of("kept").parent, &of("kept").follows), (None, &vec![request.id]));
    for (line, spans) in recorder.lines() {
        assert_eq!(spans[0].fields["task"], line);
        assert_eq!(spans[0].fields["trace_id"], TRACE, "the innermost span has it");
    }
}

#[tokio::test]
async fn a_panic_and_the_list_of_what_lives_have_the_ids() {
    let registry = TaskRegistry::new();
    let tasks = registry.clone();
    let service = ServiceBuilder::new()
        .layer(behind_a_gateway())
        .layer(TaskSetLayer::new(&registry))
        .service(service_fn(move |_: Request<()>| {
            let tasks = tasks.clone();
            async move {
                let set = TaskSet::current().unwrap();
                let waiting = set.spawn("waits", std::future::pending::<()>()).unwrap();
                let live = tasks.snapshot().live_tasks;
                assert_eq!(live[0].trace_id.unwrap().to_string(), TRACE);
                waiting.cancel();

                let panics = set.spawn("panics", async { panic!("out of luck") }).unwrap();
                let Err(TaskError::Panicked(panic)) = panics.await else { panic!("it did not") };
                assert_eq!(panic.trace_id().unwrap().to_string(), TRACE);
                assert_eq!(panic.request_id().unwrap().as_str(), "order-7");
                Ok::<_, Infallible>(Response::new(EmptyBody::new()))
            }
        }));
    let fields = [("traceparent", SAMPLED), ("x-request-id", "order-7")];
    service.oneshot(request(&fields)).await.unwrap();
}

#[tokio::test]
async fn a_kept_task_does_not_hold_the_span_of_its_request_open() {
    let recorder = Recorder::default();
    let _installed = recorder.install();
    let registry = TaskRegistry::new();
    let (finish, finished) = tokio::sync::oneshot::channel::<()>();
    let finished = Mutex::new(Some(finished));
    let service = ServiceBuilder::new()
        .layer(TraceIdLayer::new())
        .layer(TaskSetLayer::new(&registry))
        .service(service_fn(move |_: Request<()>| {
            let finished = finished.lock().unwrap().take().unwrap();
            let tasks = TaskSet::current().unwrap();
            let task = async move { drop(finished.await) };
            tasks.task("kept").at_end(AtEnd::Keep).spawn(task).unwrap();
            async { Ok::<_, Infallible>(Response::new(EmptyBody::new())) }
        }));
    service.oneshot(request(&[])).await.unwrap().into_body().collect().await.unwrap();
    tokio::task::yield_now().await;
    assert!(recorder.span("request").closed);
    assert!(!recorder.span("task").closed);
    drop(finish);
    registry.close();
    registry.wait().await;
    assert!(recorder.span("task").closed);
}

/// H18.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn many_requests_at_once_keep_their_ids_apart() {
    let registry = TaskRegistry::new();
    let calls = Arc::new(AtomicUsize::new(0));
    let client_calls = calls.clone();
    let client = PropagateLayer::new().layer(service_fn(move |call: Request<String>| {
        client_calls.fetch_add(1, Relaxed);
        let parent = call.headers()["traceparent"].to_str().unwrap().to_owned();
        assert_eq!(call.headers()["x-request-id"], call.body().as_str());
        assert_eq!(parent[3..35], format!("{:0>32}", call.body()));
        async move { Ok::<_, Infallible>(parent[36..52].to_owned()) }
    }));
    let service = ServiceBuilder::new()
        .layer(behind_a_gateway())
        .layer(TaskSetLayer::new(&registry))
        .service(service_fn(move |request: Request<()>| {
            let client = client.clone();
            async move {
                let id = request.headers()["x-request-id"].to_str().unwrap().to_owned();
                let tasks = TaskSet::current().unwrap();
                let mut handles = Vec::new();
                for _ in 0..3 {
                    let (client, id) = (client.clone(), id.clone());
                    let task = async move {
                        tokio::task::yield_now().await;
                        client.oneshot(Request::new(id)).await.unwrap()
                    };
                    handles.push(tasks.spawn("call", task).unwrap());
                }
                let mut spans = Vec::new();
                for handle in handles {
                    spans.push(handle.await.unwrap());
                }
                spans.sort_unstable();
                spans.dedup();
                assert_eq!(spans.len(), 3, "a new span id for each call");
                Ok::<_, Infallible>(Response::new(EmptyBody::new()))
            }
        }));
    let requests: Vec<_> = (1..=1000)
        .map(|i| {
            let service = service.clone();
            tokio::spawn(async move {
                let (id, parent) = (format!("{i:x}"), format!("00-{i:032x}-{SPAN}-01"));
                let fields = [("traceparent", parent.as_str()), ("x-request-id", &id)];
                let response = service.oneshot(request(&fields)).await.unwrap();
                assert_eq!(response.headers()["x-request-id"], id);
            })
        })
        .collect();
    for request in requests {
        request.await.unwrap();
    }
    assert_eq!(calls.load(Relaxed), 3000);
}

/// A client that yields the headers that it would send.
async fn sent<L>(layer: L, request: Request<()>) -> HeaderMap
where
    L: Layer<
            tower::util::BoxCloneService<Request<()>, HeaderMap, Infallible>,
            Service: Service<Request<()>, Response = HeaderMap, Error = Infallible>,
        >,
{
    let client = service_fn(async |request: Request<()>| Ok(request.into_parts().0.headers));
    layer.layer(tower::util::BoxCloneService::new(client)).oneshot(request).await.unwrap()
}

fn context_of(fields: &[(&'static str, &str)]) -> TraceContext {
    TraceContext::extract(request(fields).headers(), Trust::Continue)
}

fn scope(context: &TraceContext) -> RequestContext {
    RequestContext::new().with_inherited(context.clone())
}

/// H16.
#[tokio::test]
async fn a_call_has_one_traceparent_with_a_span_id_of_its_own() {
    let context = context_of(&[
        ("traceparent", "cc-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-ff-x"),
        ("tracestate", "a=1 , b=2"),
        ("x-request-id", "order-7"),
    ]);
    let stale = [
        ("traceparent", SAMPLED),
        ("traceparent", SAMPLED),
        ("tracestate", "stale=1"),
        ("tracestate", "stale=2"),
        ("x-request-id", "stale"),
        ("b3", "1"),
        ("x-b3-traceid", TRACE),
        ("x-b3-spanid", SPAN),
        ("x-b3-sampled", "1"),
        ("baggage", "k=v"),
    ];
    let mut spans = vec![context.span_id(), context.parent_id().unwrap()];
    for _ in 0..3 {
        let headers = scope(&context).scope(sent(PropagateLayer::new(), request(&stale))).await;
        assert_eq!(headers.len(), 4, "{headers:?}");
        let parent = TraceParent::parse(headers["traceparent"].as_bytes()).unwrap();
        assert_eq!(parent.to_string(), headers["traceparent"].to_str().unwrap());
        assert_eq!(
            (parent.trace_id, parent.sampled, parent.random),
            (context.trace_id(), true, true)
        );
        assert!(
            headers["traceparent"].to_str().unwrap().ends_with("-03"),
            "unknown flags are not sent"
        );
        assert_eq!(headers["tracestate"], "a=1,b=2");
        assert_eq!(headers["x-request-id"], "order-7");
        assert_eq!(headers["baggage"], "k=v");
        assert!(!spans.contains(&parent.parent_id));
        spans.push(parent.parent_id);
    }
}

#[tokio::test]
async fn without_a_tracestate_a_stale_one_is_removed() {
    let context = TraceContext::start();
    let headers =
        scope(&context).scope(sent(PropagateLayer::new(), request(&[("tracestate", "a=1")]))).await;
    assert!(!headers.contains_key("tracestate"));
}

#[tokio::test]
async fn outside_of_a_request_a_call_is_sent_as_it_is() {
    let fields = [("traceparent", SAMPLED), ("b3", "0")];
    assert_eq!(&sent(PropagateLayer::new(), request(&fields)).await, request(&fields).headers());
    let mut headers = HeaderMap::new();
    inject(&mut headers);
    assert!(headers.is_empty());
}

#[test]
fn inject_is_for_other_clients() {
    let context = context_of(&[("traceparent", SAMPLED)]);
    let mut headers =
        request(&[("traceparent", "00-0-0-0"), ("traceparent", "00-0-0-0")]).into_parts().0.headers;
    scope(&context).sync_scope(|| inject(&mut headers));
    let first = TraceParent::parse(headers["traceparent"].as_bytes()).unwrap();
    assert_eq!(headers.get_all("traceparent").iter().count(), 1);
    scope(&context).sync_scope(|| inject(&mut headers));
    let second = TraceParent::parse(headers["traceparent"].as_bytes()).unwrap();
    assert_eq!((first.trace_id, second.trace_id), (context.trace_id(), context.trace_id()));
    assert_ne!(first.parent_id, second.parent_id);
}

#[tokio::test]
async fn b3_is_sent_if_chosen_and_debug_is_kept() {
    for (b3, state) in [("d", "d"), ("1", "1"), ("0", "0")] {
        let context = context_of(&[("b3", &format!("{TRACE}-{SPAN}-{b3}"))]);
        let headers = scope(&context).scope(sent(PropagateLayer::new().b3(), request(&[]))).await;
        let parent = TraceParent::parse(headers["traceparent"].as_bytes()).unwrap();
        let expected = format!("{TRACE}-{}-{state}-{}", parent.parent_id, context.span_id());
        assert_eq!(headers["b3"].to_str().unwrap(), expected);
        assert!(!parent.random);
    }
}

/// A client whose first two answers lead to another place, and the `traceparent` of each request.
fn redirecting() -> (Redirecting, Arc<Mutex<Vec<Option<HeaderValue>>>>) {
    let seen = Arc::new(Mutex::new(Vec::new()));
    let client_seen = seen.clone();
    let client = service_fn(move |request: Request<EmptyBody>| {
        let mut response = Response::new(EmptyBody::new());
        let next = match request.uri().path() {
            "/1" => "http://here.test/2",
            "/2" => "http://there.test/3",
            _ => "",
        };
        if !next.is_empty() {
            *response.status_mut() = StatusCode::TEMPORARY_REDIRECT;
            response.headers_mut().insert("location", HeaderValue::from_static(next));
        }
        client_seen.lock().unwrap().push(request.headers().get("traceparent").cloned());
        async { Ok::<_, Infallible>(response) }
    });
    (Redirecting::new(client), seen)
}

type Redirecting =
    tower::util::BoxCloneService<Request<EmptyBody>, Response<EmptyBody>, Infallible>;

fn to_here() -> Request<EmptyBody> {
    let mut request = Request::get("http://here.test/1").body(EmptyBody::new()).unwrap();
    // As if a proxy had copied them.
    request.headers_mut().insert("traceparent", HeaderValue::from_static(SAMPLED));
    request
}

/// H16: the layer inside of what follows redirects sees every hop.
#[tokio::test]
async fn another_origin_gets_nothing_on_a_redirect() {
    let (client, seen) = redirecting();
    let here = |uri: &Uri| uri.host() == Some("here.test");
    let client = ServiceBuilder::new()
        .layer(FollowRedirectLayer::new())
        .layer(PropagateLayer::new().only(here))
        .service(client);
    scope(&TraceContext::start()).scope(client.oneshot(to_here())).await.unwrap();
    let seen = seen.lock().unwrap();
    assert_eq!(seen.len(), 3);
    assert!(seen[0].is_some() && seen[1].is_some() && seen[0] != seen[1]);
    assert_ne!(seen[0].as_ref().unwrap(), SAMPLED);
    assert_eq!(seen[2], None);
}

/// H16: outside, the policy of what follows them decides.
#[tokio::test]
async fn another_origin_gets_nothing_from_a_follower_that_removes_headers() {
    let (client, seen) = redirecting();
    let policy = FilterCredentials::new().remove_all();
    let client = ServiceBuilder::new()
        .layer(PropagateLayer::new())
        .layer(FollowRedirectLayer::with_policy(policy))
        .service(client);
    scope(&TraceContext::start()).scope(client.oneshot(to_here())).await.unwrap();
    let seen = seen.lock().unwrap();
    assert_eq!(seen.len(), 3);
    assert!(seen[0].is_some() && seen[0] == seen[1]);
    assert_ne!(seen[0].as_ref().unwrap(), SAMPLED);
    assert_eq!(seen[2], None);
}

#[tokio::test]
async fn the_span_of_a_call_has_the_id_that_is_sent() {
    let recorder = Recorder::default();
    let _installed = recorder.install();
    let context = TraceContext::start();
    let client = PropagateLayer::new().layer(service_fn(async |request: Request<()>| {
        tracing::info!("calling");
        Ok::<_, Infallible>(request.into_parts().0.headers)
    }));
    let headers = scope(&context).scope(client.oneshot(request(&[]))).await.unwrap();
    let sent = TraceParent::parse(headers["traceparent"].as_bytes()).unwrap();
    let span = recorder.span("call");
    assert_eq!(span.fields["span_id"], sent.parent_id.to_string());
    assert_eq!(span.fields["trace_id"], context.trace_id().to_string());
    assert_eq!(recorder.lines()[0].1[0], Seen { closed: true, ..span });
}

#[tokio::test]
async fn a_panic_of_the_choice_sends_nothing() {
    let layer = PropagateLayer::new().only(|_: &Uri| -> bool { panic!("a user's closure") });
    let headers = scope(&TraceContext::start()).scope(sent(layer, request(&[]))).await;
    assert!(headers.is_empty());
}

#[test]
fn everything_can_be_sent_and_shared() {
    fn assert<T: Send + Sync + 'static>(_: &T) {}
    let service = TraceIdLayer::new()
        .on_span(|_: &Span, _: &TraceContext| None)
        .layer(PropagateLayer::new().layer(()));
    assert(&service);
    assert(&service.clone());
    assert(&TraceContext::start());
    assert(&AnyBody::default());
}

#[tokio::test]
async fn a_client_is_ready_when_the_inner_one_is() {
    let (mut mock, mut handle) =
        mock::spawn_layer::<Request<()>, Response<()>, _>(PropagateLayer::new());
    handle.allow(0);
    assert_pending!(mock.poll_ready());
    handle.allow(1);
    assert_ready_ok!(mock.poll_ready());
    let mut call = tokio_test::task::spawn(mock.call(request(&[])));
    assert_pending!(call.poll());
    handle.next_request().await.unwrap().1.send_error("refused");
    assert_eq!(assert_ready_err!(call.poll()).to_string(), "refused");
}

fn theirs(trace: &str, span: u64) -> TraceParent {
    let trace = TraceId::from_hex(trace.as_bytes()).unwrap();
    TraceParent::new(trace, SpanId::from_bytes(span.to_be_bytes()).unwrap()).flags(true, true)
}

#[tokio::test]
async fn the_hook_runs_before_a_span_is_entered_and_hands_ids_back() {
    let recorder = Recorder::default();
    let _installed = recorder.install();
    let counter = AtomicUsize::new(1);
    let seen = Arc::new(Mutex::new(Vec::new()));
    let hook_seen = seen.clone();
    let other = "f".repeat(32);
    let hook = move |span: &Span, context: &TraceContext| {
        assert_ne!(Span::current().id(), span.id(), "not entered yet");
        let name = span.metadata().unwrap().name();
        hook_seen.lock().unwrap().push((
            name,
            context.span_id(),
            context.parent_id(),
            context.link(),
        ));
        Some(theirs(&other, counter.fetch_add(1, Relaxed) as u64))
    };
    let (handler, tasks) = with_tasks(TraceIdLayer::new().on_span(hook)).await;
    assert_tasks(&handler, &tasks);
    assert_eq!(handler.trace_id().to_string(), "f".repeat(32));
    assert_eq!(handler.span_id().to_string(), "0000000000000001");
    assert!(handler.is_sampled() && handler.is_random());
    let request = recorder.span("request");
    assert_eq!(ids_in(&request), ids(&handler), "the span's fields are the final ones");
    for span in recorder.spans("task") {
        assert_eq!(ids_in(&span), ids(&tasks[span.fields["task"].as_str()]));
    }
    let seen = seen.lock().unwrap();
    assert_eq!(seen.len(), 5);
    assert_eq!(seen[0].3.unwrap().to_string(), SAMPLED, "the caller, to link to");
    assert!(seen[1..].iter().filter(|seen| seen.2.is_some()).count() == 3);
}

#[tokio::test]
async fn a_hook_may_keep_the_ids_and_may_panic() {
    let recorder = Recorder::default();
    let _installed = recorder.install();
    let keep = |_: &Span, context: &TraceContext| {
        context.span_id();
        None
    };
    for layer in [
        behind_a_gateway().on_span(keep),
        behind_a_gateway().on_span(|_: &Span, _: &TraceContext| -> Option<TraceParent> {
            panic!("a user's closure")
        }),
    ] {
        let (handler, tasks) = with_tasks(layer).await;
        assert_eq!(handler.trace_id().to_string(), TRACE);
        assert_tasks(&handler, &tasks);
        assert_eq!(ids_in(recorder.spans("request").last().unwrap()), ids(&handler));
    }
}

#[tokio::test]
async fn what_the_caller_says_does_not_follow_a_request_into_another_trace() {
    let recorder = Recorder::default();
    let _installed = recorder.install();
    let other = "e".repeat(32);
    let hook = move |_: &Span, _: &TraceContext| Some(theirs(&other, 7));
    let headers = [("traceparent", SAMPLED), ("tracestate", "vendor=its")];
    let layer = TraceIdLayer::new().trust(Trust::Continue).on_span(hook);
    let (context, _) = serve(layer, request(&headers)).await;
    assert_eq!(context.trace_id().to_string(), "e".repeat(32));
    assert_eq!((context.parent_id(), context.trace_state().as_str()), (None, ""));
    let link = context.link().unwrap();
    assert_eq!(link.to_string(), SAMPLED, "the caller, to link to");
    assert_eq!(recorder.span("request").fields["linked_trace_id"], TRACE);
    // Nor does that it is to be debugged, or if it is not even recorded.
    for (trace, sampled) in [("e".repeat(32), true), (TRACE.to_owned(), false)] {
        let ids = theirs(&trace, 7).flags(sampled, false);
        let hook = move |_: &Span, _: &TraceContext| Some(ids);
        let layer = TraceIdLayer::new().trust(Trust::Continue).on_span(hook);
        let b3 = format!("{TRACE}-b7ad6b7169203331-d");
        let (context, _) = serve(layer, request(&[("b3", &b3)])).await;
        assert_eq!((context.is_sampled(), context.is_debug()), (sampled, false));
    }
}

#[tokio::test]
async fn what_the_caller_says_does_not_follow_a_call_into_another_trace() {
    let recorder = Recorder::default();
    let _installed = recorder.install();
    let other = "e".repeat(32);
    let ids = theirs(&other, 7);
    let hook = move |span: &Span, _: &TraceContext| {
        (span.metadata().unwrap().name() == "call").then_some(ids)
    };
    let layer = TraceIdLayer::new().trust(Trust::Continue).on_span(hook);
    let headers = [("traceparent", SAMPLED), ("tracestate", "vendor=its")];
    let (context, _) = serve(layer, request(&headers)).await;
    let headers = scope(&context).scope(sent(PropagateLayer::new().b3(), request(&[]))).await;
    assert_eq!(headers["traceparent"], ids.to_string());
    assert!(!headers.contains_key("tracestate"));
    assert_eq!(headers["b3"], format!("{other}-0000000000000007-1"));
    assert_eq!(recorder.span("call").fields["linked_trace_id"], TRACE);
}

#[tokio::test]
async fn a_hook_does_not_invent_the_random_flag_of_others() {
    let recorder = Recorder::default();
    let _installed = recorder.install();
    let layer = behind_a_gateway().on_span(|_: &Span, _: &TraceContext| Some(theirs(TRACE, 7)));
    let (context, _) = serve(layer, request(&[("traceparent", SAMPLED)])).await;
    assert_eq!(context.span_id().to_string(), "0000000000000007");
    assert!(!context.is_random());
}

#[tokio::test]
async fn without_a_subscriber_the_hook_is_not_called() {
    let layer = TraceIdLayer::new()
        .on_span(|_: &Span, _: &TraceContext| -> Option<TraceParent> { unreachable!("no span") });
    with_tasks(layer).await;
}

/// What serving the second of two such requests asks of the allocator, when the answer has a header,
/// as nearly all have.
fn second_costs(layer: &TraceIdLayer, fields: &[(&'static str, &str)], asks: bool) -> u64 {
    let mut service = layer.layer(service_fn(move |_: Request<()>| {
        if asks {
            let context = TraceContext::current().unwrap();
            assert!(!context.request_id().as_str().is_empty());
            assert_eq!(RequestContext::current().get(), Some(&context.trace_id()));
        }
        let mut response = Response::new(EmptyBody::new());
        response.headers_mut().insert("content-type", HeaderValue::from_static("text/plain"));
        std::future::ready(Ok::<_, Infallible>(response))
    }));
    let mut serve = || {
        let request = request(fields);
        measure(|| {
            let mut future = std::pin::pin!(service.call(request));
            let mut cx = Context::from_waker(Waker::noop());
            let Poll::Ready(Ok(response)) = future.as_mut().poll(&mut cx) else { panic!("ready") };
            assert_eq!(response.headers().get_all("x-request-id").iter().count(), 1);
        })
        .count_total
    };
    serve();
    serve()
}

#[test]
fn a_request_costs_one_allocation() {
    let kept = ["order-7", "0af76519-16cd-43dd-8448-eb211c80319c", &"a".repeat(128)];
    let told = HeaderName::from_static("x-trace-id");
    let bare = measure(|| {
        let mut headers = HeaderMap::new();
        headers.insert("content-type", HeaderValue::from_static("text/plain"));
    });
    for asks in [false, true] {
        for fields in [&[][..], &[("traceparent", SAMPLED)], &[("b3", "1")]] {
            for id in kept.into_iter().map(Some).chain([None]) {
                let id = id.map(|id| ("x-request-id", id));
                let fields: Vec<_> = fields.iter().copied().chain(id).collect();
                let ours = second_costs(&behind_a_gateway(), &fields, asks);
                assert_eq!(ours, bare.count_total + 1, "{asks} {fields:?}");
                let layer = behind_a_gateway().trace_id_header(told.clone());
                let ours = second_costs(&layer, &fields, asks);
                assert_eq!(ours, bare.count_total + 1, "{asks} {fields:?}, told");
            }
        }
        let fields = [("traceparent", SAMPLED), ("tracestate", "a=1,b=2")];
        assert_eq!(second_costs(&behind_a_gateway(), &fields, asks), bare.count_total + 2);
        assert_eq!(second_costs(&TraceIdLayer::new(), &fields, asks), bare.count_total + 1);
    }
}

/// A thousand heads that are all kept are two more for eight.
#[test]
fn heads_that_are_kept_cost_one_allocation_and_a_quarter() {
    let mut service = TraceIdLayer::new().layer(service_fn(|_: Request<()>| {
        std::future::ready(Ok::<_, Infallible>(Response::new(EmptyBody::new())))
    }));
    let mut kept = Vec::with_capacity(1_000);
    let empty_map = measure(|| {
        let name = HeaderName::from_static("x-request-id");
        HeaderMap::new().insert(name, HeaderValue::from_static("order-7"));
    });
    let costs = measure(|| {
        for _ in 0..1_000 {
            let mut future = std::pin::pin!(service.call(request(&[])));
            let mut cx = Context::from_waker(Waker::noop());
            let Poll::Ready(Ok(response)) = future.as_mut().poll(&mut cx) else { panic!("ready") };
            kept.push(response.headers()["x-request-id"].clone());
        }
    });
    let of_heads = costs.count_total - 1_000 * (empty_map.count_total + 1);
    assert!((248..=252).contains(&of_heads), "{of_heads}");
    let mut ids: Vec<_> = kept.iter().map(HeaderValue::as_bytes).collect();
    ids.sort_unstable();
    ids.dedup();
    assert_eq!(ids.len(), 1_000);
}
