//! The hook for spans, with a bridge to OpenTelemetry such as its users write, and an exporter in
//! memory: what `on_span` is for.
#![allow(missing_docs, clippy::unwrap_used)] // Tests.

use std::{
    collections::BTreeMap,
    convert::Infallible,
    sync::{Arc, Mutex},
};

use bytes::Bytes;
use http::{HeaderMap, Request, Response};
use http_body_util::{BodyExt, Empty};
use opentelemetry::{
    Context, SpanId as OtelSpanId, TraceId as OtelTraceId,
    trace::{SpanContext, TraceContextExt, TraceFlags, TraceState, TracerProvider},
};
use opentelemetry_sdk::trace::{InMemorySpanExporter, SdkTracerProvider, SpanData};
use tokio::runtime::Builder;
use tower::{Layer, ServiceBuilder, ServiceExt, service_fn};
use tower_tasks::{
    AtEnd, PropagateLayer, TaskRegistry, TaskSet, TaskSetLayer, TraceContext, TraceIdLayer,
    request_context::{SpanId, TraceId},
    trace_id::{TraceParent, Trust},
};
use tracing::{Dispatch, Span, dispatcher::set_default};
use tracing_opentelemetry::OpenTelemetrySpanExt;
use tracing_subscriber::{Layer as _, Registry, filter::LevelFilter, layer::SubscriberExt};

const TRACE: &str = "0af7651916cd43dd8448eb211c80319c";
const PARENT: &str = "b7ad6b7169203331";

/// Hands parents and links to OpenTelemetry, and the ids that it makes back.
fn bridge(span: &Span, context: &TraceContext) -> Option<TraceParent> {
    let here = |span_id| TraceParent::new(context.trace_id(), span_id);
    let parent = context.parent_id().map(here).or_else(|| {
        // A kept task: beside its request, but in its trace.
        context.link().filter(|link| link.trace_id == context.trace_id())
    });
    match (parent, context.link()) {
        (Some(parent), _) => {
            let state = context.trace_state().as_str().parse().unwrap_or_default();
            let parent = remote(parent.flags(context.is_sampled(), false), state);
            span.set_parent(Context::new().with_remote_span_context(parent)).ok()?;
        }
        (None, Some(caller)) => span.add_link(remote(caller, TraceState::default())),
        (None, None) => {}
    }
    let given = span.context().span().span_context().clone();
    // All zero where a filter hides the span from OpenTelemetry.
    let trace_id = TraceId::from_bytes(given.trace_id().to_bytes())?;
    let span_id = SpanId::from_bytes(given.span_id().to_bytes())?;
    Some(TraceParent::new(trace_id, span_id).flags(given.is_sampled(), true))
}

fn remote(parent: TraceParent, state: TraceState) -> SpanContext {
    let flags = if parent.sampled { TraceFlags::SAMPLED } else { TraceFlags::default() };
    let trace_id = OtelTraceId::from_bytes(parent.trace_id.to_bytes());
    let span_id = OtelSpanId::from_bytes(parent.parent_id.to_bytes());
    SpanContext::new(trace_id, span_id, flags, true, state)
}

struct Exported(InMemorySpanExporter, SdkTracerProvider);

impl Exported {
    /// Runs `future` with what is at least of this level for OpenTelemetry, and all for another
    /// layer.
    fn run<F: Future>(level: LevelFilter, future: F) -> (Self, F::Output) {
        let exporter = InMemorySpanExporter::default();
        let provider = SdkTracerProvider::builder().with_simple_exporter(exporter.clone()).build();
        let tracer = provider.tracer("test");
        let layer = tracing_opentelemetry::layer().with_tracer(tracer).with_filter(level);
        let other = tracing_subscriber::fmt::layer().with_writer(std::io::sink);
        let subscriber = Dispatch::new(Registry::default().with(layer).with(other));
        let _guard = set_default(&subscriber);
        // A span that is closed on another thread lets go of its parent only if that has it too.
        let runtime = Builder::new_current_thread()
            .on_thread_start(move || std::mem::forget(set_default(&subscriber)))
            .enable_all()
            .build();
        let output = runtime.unwrap().block_on(future);
        (Self(exporter, provider), output)
    }

    /// The spans by their name; a task's by the task's.
    fn spans(&self) -> BTreeMap<String, SpanData> {
        self.1.force_flush().unwrap();
        let name = |span: &SpanData| {
            let task = span.attributes.iter().find(|attribute| attribute.key.as_str() == "task");
            task.map_or(span.name.to_string(), |task| task.value.to_string())
        };
        self.0.get_finished_spans().unwrap().into_iter().map(|span| (name(&span), span)).collect()
    }
}

/// What one request has seen: its contexts, and the headers that it has sent.
type Seen = BTreeMap<&'static str, TraceContext>;

/// One request with a task that calls, a kept one and a closure that blocks.
async fn serve(trust: Trust, headers: &[(&'static str, &str)]) -> (Seen, HeaderMap) {
    let tasks = TaskRegistry::new();
    let seen = Arc::new(Mutex::new((Seen::new(), HeaderMap::new())));
    let note = |name: &'static str| {
        let seen = seen.clone();
        move || drop(seen.lock().unwrap().0.insert(name, TraceContext::current().unwrap()))
    };
    let client_seen = seen.clone();
    let client = PropagateLayer::new().layer(service_fn(move |call: Request<()>| {
        client_seen.lock().unwrap().1 = call.into_parts().0.headers;
        async { Ok::<_, Infallible>(()) }
    }));
    let (in_handler, in_task, in_kept, in_closure) =
        (note("request"), note("plain"), note("kept"), note("blocking"));
    let handler = service_fn(async |_: Request<()>| {
        in_handler();
        let set = TaskSet::current().unwrap();
        let (client, in_task, in_kept, in_closure) =
            (client.clone(), in_task.clone(), in_kept.clone(), in_closure.clone());
        let plain = set.spawn("plain", async move {
            in_task();
            client.oneshot(Request::new(())).await
        });
        let kept = set.task("kept").at_end(AtEnd::Keep).spawn(async move {
            tokio::task::yield_now().await;
            in_kept();
        });
        let blocking = set.spawn_blocking("blocking", move |_| in_closure());
        let _ = plain.unwrap().await.unwrap();
        blocking.unwrap().await.unwrap();
        drop(kept.unwrap());
        Ok::<_, Infallible>(Response::new(Empty::<Bytes>::new()))
    });
    let layer = TraceIdLayer::new().trust(trust).on_span(bridge);
    let service =
        ServiceBuilder::new().layer(layer).layer(TaskSetLayer::new(&tasks)).service(handler);
    let mut request = Request::new(());
    for &(name, value) in headers {
        request.headers_mut().append(name, value.parse().unwrap());
    }
    service.oneshot(request).await.unwrap().into_body().collect().await.unwrap();
    tasks.close();
    tasks.wait().await;
    std::mem::take(&mut *seen.lock().unwrap())
}

fn incoming(flags: &str) -> String {
    format!("00-{TRACE}-{PARENT}-{flags}")
}

/// Each exported span has the ids that its code has seen, and is a child of the request's.
fn assert_exported(spans: &BTreeMap<String, SpanData>, seen: &Seen, sent: &HeaderMap) {
    assert_eq!(spans.len(), 5, "{:?}", spans.keys());
    let request = &spans["request"];
    for (&name, context) in seen {
        let span = &spans[name];
        let id =
            (span.span_context.trace_id().to_string(), span.span_context.span_id().to_string());
        assert_eq!(id, (context.trace_id().to_string(), context.span_id().to_string()), "{name}");
        assert_eq!(span.span_context.trace_id(), request.span_context.trace_id());
        if name != "request" {
            assert_eq!(span.parent_span_id, request.span_context.span_id(), "{name}");
        }
    }
    let sent = TraceParent::parse(sent["traceparent"].as_bytes()).unwrap();
    let call = &spans["call"];
    assert_eq!(call.parent_span_id, spans["plain"].span_context.span_id());
    assert_eq!(call.span_context.span_id().to_bytes(), sent.parent_id.to_bytes());
    assert_eq!(call.span_context.trace_id().to_bytes(), sent.trace_id.to_bytes());
}

#[test]
fn the_callers_trace_goes_on_in_the_exporter() {
    let headers = [("traceparent", &*incoming("01")), ("tracestate", "a=1")];
    let (exported, (seen, sent)) =
        Exported::run(LevelFilter::INFO, serve(Trust::Continue, &headers));
    let spans = exported.spans();
    let request = &spans["request"];
    assert_eq!(request.span_context.trace_id().to_string(), TRACE);
    assert_eq!(request.parent_span_id.to_string(), PARENT);
    assert!(request.parent_span_is_remote);
    assert_exported(&spans, &seen, &sent);
    assert!(sent["traceparent"].to_str().unwrap().ends_with("-01"), "random is not invented");
    assert_eq!(sent["tracestate"], "a=1");
}

#[test]
fn a_trace_that_restarts_is_opentelemetrys_and_links_to_the_callers() {
    let (exported, (seen, sent)) = Exported::run(
        LevelFilter::INFO,
        serve(Trust::Restart, &[("traceparent", &incoming("01"))]),
    );
    let spans = exported.spans();
    let request = &spans["request"];
    assert_ne!(request.span_context.trace_id().to_string(), TRACE);
    assert_eq!(request.parent_span_id, OtelSpanId::INVALID);
    let link = &request.links[0].span_context;
    assert_eq!(
        (link.trace_id().to_string(), link.span_id().to_string()),
        (TRACE.into(), PARENT.into())
    );
    assert_exported(&spans, &seen, &sent);
    assert!(sent["traceparent"].to_str().unwrap().ends_with("-03"), "its sampler decides");
}

#[test]
fn what_the_caller_does_not_record_is_not_exported_and_goes_on() {
    let (exported, (seen, sent)) = Exported::run(
        LevelFilter::INFO,
        serve(Trust::Continue, &[("traceparent", &incoming("00"))]),
    );
    assert!(exported.spans().is_empty());
    for context in seen.values() {
        assert_eq!(context.trace_id().to_string(), TRACE);
        assert!(!context.is_sampled());
    }
    let sent = sent["traceparent"].to_str().unwrap();
    assert!(sent.contains(TRACE) && sent.ends_with("-00"), "{sent}");
}

#[test]
fn a_filter_that_hides_the_spans_from_opentelemetry_leaves_ids_that_are_valid() {
    let (exported, (seen, sent)) = Exported::run(
        LevelFilter::ERROR,
        serve(Trust::Continue, &[("traceparent", &incoming("01"))]),
    );
    assert!(exported.spans().is_empty());
    assert_eq!(seen.len(), 4);
    assert!(seen.values().all(|context| context.trace_id().to_string() == TRACE));
    let sent = TraceParent::parse(sent["traceparent"].as_bytes()).unwrap();
    assert!(sent.trace_id.to_string() == TRACE && sent.sampled);
}
