//! A log of JSON lines of which each has the trace id of its request, the lines of tasks included.
//!
//! ```text
//! PORT=3000 cargo run --example json_logs
//!
//! curl -i -d '' localhost:3000/orders
//! ```
//!
//! `trace_id`, `span_id` and `request_id` are members of the line itself, beside `message`. That is
//! where OpenTelemetry wants them in JSON logs ("Trace Context in non-OTLP Log Formats"), and where
//! the rules of Loki, Elasticsearch or Datadog find them without being told a path. The formatter
//! takes them from the request's context, and not from spans: so a span of one's own around a line
//! does not hide them, nor does a filter that lets no span through.
//!
//! Without a formatter of one's own, `tracing_subscriber::fmt().json()` has them at `span.trace_id`,
//! wherever the innermost span is one of ours.

#![expect(clippy::print_stderr, reason = "it is a program")]

use std::{env, error::Error, fmt, net::Ipv4Addr, panic, process::ExitCode, time::Duration};

use axum::{Router, http::StatusCode, routing::post};
use serde_json::{Map, Value};
use tokio::{net::TcpListener, time::sleep};
use tower_tasks::{
    AtEnd, CatchUnwindLayer, End, RequestContext, ResponseEndLayer, SpawnError, TaskRegistry,
    TaskSet, TaskSetLayer, TraceIdLayer, catch_unwind,
    request_context::{RequestId, SpanId, TraceId},
};
use tracing::{
    Event, Subscriber,
    field::{Field, Visit},
};
use tracing_subscriber::{
    fmt::{
        FmtContext, FormatEvent, FormatFields,
        format::Writer,
        time::{FormatTime, SystemTime},
    },
    registry::LookupSpan,
};

/// One line of JSON for each event.
struct JsonLines;

impl<S, N> FormatEvent<S, N> for JsonLines
where
    S: Subscriber + for<'a> LookupSpan<'a>,
    N: for<'a> FormatFields<'a> + 'static,
{
    fn format_event(
        &self,
        spans: &FmtContext<'_, S, N>,
        mut writer: Writer<'_>,
        event: &Event<'_>,
    ) -> fmt::Result {
        let mut timestamp = String::new();
        SystemTime.format_time(&mut Writer::new(&mut timestamp))?;
        let mut line = Line::default();
        line.add("timestamp", timestamp);
        line.add("level", event.metadata().level().as_str());
        line.add("target", event.metadata().target());
        event.record(&mut line);
        let span = spans.lookup_current();
        line.add("span", span.map(|span| span.name()));
        // Last, so that no field of the event's can be taken for them.
        let context = RequestContext::current();
        line.add("trace_id", context.get::<TraceId>().map(ToString::to_string));
        line.add("span_id", context.get::<SpanId>().map(ToString::to_string));
        line.add("request_id", context.get::<RequestId>().map(ToString::to_string));
        writeln!(writer, "{}", Value::Object(line.0))
    }
}

#[derive(Default)]
struct Line(Map<String, Value>);

impl Line {
    fn add(&mut self, name: &str, value: impl Into<Value>) {
        self.0.insert(name.to_owned(), value.into());
    }
}

impl Visit for Line {
    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        self.add(field.name(), format!("{value:?}"));
    }

    fn record_str(&mut self, field: &Field, value: &str) {
        self.add(field.name(), value);
    }

    fn record_i64(&mut self, field: &Field, value: i64) {
        self.add(field.name(), value);
    }

    fn record_u64(&mut self, field: &Field, value: u64) {
        self.add(field.name(), value);
    }

    fn record_bool(&mut self, field: &Field, value: bool) {
        self.add(field.name(), value);
    }
}

async fn create_order(tasks: TaskSet) -> Result<StatusCode, SpawnError> {
    tracing::info!(items = 3, "order received");
    tasks.spawn("send_receipt", async {
        sleep(Duration::from_millis(20)).await;
        tracing::info!("receipt sent");
    })?;
    tasks.task("write_audit_line").at_end(AtEnd::Keep).spawn(async {
        // A span that knows nothing of traces.
        tracing::info_span!("audit").in_scope(|| tracing::info!("audit line written"));
    })?;
    tasks.spawn_blocking("render_invoice", |_| tracing::info!("invoice rendered"))?;
    tasks.spawn("warm_cache", async { panic!("the cache is on fire") })?;
    Ok(StatusCode::ACCEPTED)
}

fn router(tasks: &TaskRegistry, trace_ids: TraceIdLayer) -> Router {
    let layers = (
        trace_ids,
        CatchUnwindLayer::new(),
        ResponseEndLayer::new(|_: &axum::extract::Request| {
            |end: End| tracing::info!(?end, "response")
        }),
        TaskSetLayer::new(tasks),
    );
    Router::new().route("/orders", post(create_order)).layer(layers)
}

async fn serve() -> Result<(), Box<dyn Error>> {
    let port = env::var("PORT").map_or(Ok(3_000), |port| port.parse())?;
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, port)).await?;
    eprintln!("listening on http://{}", listener.local_addr()?);
    Ok(axum::serve(listener, router(&TaskRegistry::new(), TraceIdLayer::new())).await?)
}

#[tokio::main]
async fn main() -> ExitCode {
    tracing_subscriber::fmt().event_format(JsonLines).init();
    // A panic that becomes a line of the log, with its place, is not printed besides.
    let print = panic::take_hook();
    panic::set_hook(Box::new(move |info| {
        if !catch_unwind::record(info) {
            print(info);
        }
    }));
    match serve().await {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("json_logs: {error}");
            ExitCode::FAILURE
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{
        collections::BTreeSet,
        io,
        sync::{Mutex, PoisonError},
    };

    use axum::{body::Body, http::Request};
    use tower::ServiceExt;
    use tower_tasks::trace_id::Trust;

    use super::*;

    static LOG: Mutex<Vec<u8>> = Mutex::new(Vec::new());

    struct Log;

    impl io::Write for Log {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            LOG.lock().unwrap_or_else(PoisonError::into_inner).write(bytes)
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[tokio::test]
    async fn each_line_is_json_and_has_the_trace_id_of_its_request_at_the_top() {
        tracing_subscriber::fmt().event_format(JsonLines).with_writer(|| Log).init();
        let tasks = TaskRegistry::new();
        let ids = ["0af7651916cd43dd8448eb211c80319c", "4bf92f3577b34da6a3ce929d0e0e4736"];
        let trusting = TraceIdLayer::new().trust(Trust::Continue);
        for id in ids {
            let request = Request::post("/orders")
                .header("traceparent", format!("00-{id}-b7ad6b7169203331-01"))
                .body(Body::empty())
                .expect("it is well-formed");
            let answer = router(&tasks, trusting.clone()).oneshot(request).await;
            assert_eq!(answer.map(|answer| answer.status()), Ok(StatusCode::ACCEPTED));
        }
        tasks.close();
        tasks.wait().await;

        let log = String::from_utf8(LOG.lock().map(|log| log.clone()).unwrap_or_default());
        let log = log.expect("it is UTF-8");
        let mut told = BTreeSet::new();
        for line in log.lines() {
            let line: Value = serde_json::from_str(line).unwrap_or_else(|_| panic!("{line}"));
            let text = |name: &str| line[name].as_str().unwrap_or_default().to_owned();
            assert_eq!(text("span_id").len(), 16, "{line}");
            assert!(!text("request_id").is_empty(), "{line}");
            assert!(told.insert((text("trace_id"), text("message"))), "twice: {line}");
        }
        let expected = [
            "order received",
            "response",
            "receipt sent",
            "audit line written",
            "invoice rendered",
            "task panicked",
        ];
        let expected =
            ids.iter().flat_map(|id| expected.map(|what| (id.to_string(), what.to_owned())));
        assert_eq!(told, expected.collect());
    }
}
