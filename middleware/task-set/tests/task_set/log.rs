//! What is logged: a panic, once, where its task and request can be seen.

use std::{cell::RefCell, collections::BTreeMap, fmt, sync::Once};

use tower_request_context::{RequestContext, RequestId, TraceId};
use tower_task_set::{AtEnd, Cause, End, TaskRegistry, TaskSetLayer};
use tracing::{
    Event, Level, Subscriber,
    field::{Field, Visit},
    span,
};
use tracing_subscriber::{
    Layer,
    layer::{Context, SubscriberExt},
    registry::{LookupSpan, Scope},
    util::SubscriberInitExt,
};

use crate::support::*;

#[derive(Clone, Debug)]
pub(crate) struct Logged {
    pub(crate) level: Level,
    pub(crate) message: String,
    pub(crate) fields: BTreeMap<&'static str, String>,
    /// The names of the spans it happened in, outermost first.
    pub(crate) spans: Vec<&'static str>,
}

/// What happened to the spans of the thread: `"enter a"`.
pub(crate) type SpanLog = Vec<String>;

#[derive(Default)]
struct Recording {
    events: Vec<Logged>,
    spans: SpanLog,
    panics: bool,
}

thread_local! {
    static RECORDING: RefCell<Option<Recording>> = const { RefCell::new(None) };
}

/// One for all tests, which tells their threads apart: subscribers that come and go while other
/// threads log for the first time miss events.
struct Recorder;

impl<S: Subscriber + for<'a> LookupSpan<'a>> Layer<S> for Recorder {
    fn on_event(&self, event: &Event<'_>, context: Context<'_, S>) {
        if !event.metadata().target().starts_with("tower_task_set") {
            return;
        }
        let mut fields = Fields::default();
        event.record(&mut fields);
        let message = fields.0.remove("message").unwrap_or_default();
        let spans = context.event_scope(event).into_iter().flat_map(Scope::from_root);
        let spans = spans.map(|span| span.name()).collect();
        let panics = record(|recording| {
            let level = *event.metadata().level();
            recording.events.push(Logged { level, message, fields: fields.0, spans });
            recording.panics
        });
        assert_ne!(panics, Some(true), "the subscriber panics");
    }

    fn on_enter(&self, id: &span::Id, context: Context<'_, S>) {
        note("enter", id, &context);
    }

    fn on_exit(&self, id: &span::Id, context: Context<'_, S>) {
        note("exit", id, &context);
    }

    fn on_close(&self, id: span::Id, context: Context<'_, S>) {
        note("close", &id, &context);
    }
}

fn note<S: Subscriber + for<'a> LookupSpan<'a>>(
    what: &str,
    id: &span::Id,
    context: &Context<'_, S>,
) {
    if let Some(span) = context.span(id) {
        record(|recording| recording.spans.push(format!("{what} {}", span.name())));
    }
}

fn record<R>(f: impl FnOnce(&mut Recording) -> R) -> Option<R> {
    RECORDING.with_borrow_mut(|recording| recording.as_mut().map(f))
}

#[derive(Default)]
struct Fields(BTreeMap<&'static str, String>);

impl Visit for Fields {
    fn record_str(&mut self, field: &Field, value: &str) {
        self.0.insert(field.name(), value.to_owned());
    }

    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        self.0.insert(field.name(), format!("{value:?}"));
    }
}

/// What this thread logs meanwhile.
pub(crate) fn events_of(f: impl FnOnce()) -> Vec<Logged> {
    recorded(Recording::default(), f).events
}

/// What happens to spans on this thread meanwhile.
pub(crate) fn spans_of(f: impl FnOnce()) -> SpanLog {
    recorded(Recording::default(), f).spans
}

fn recorded(recording: Recording, f: impl FnOnce()) -> Recording {
    static INSTALL: Once = Once::new();
    INSTALL.call_once(|| tracing_subscriber::registry().with(Recorder).init());
    RECORDING.set(Some(recording));
    f();
    RECORDING.take().unwrap()
}

fn trace_id() -> TraceId {
    "0af7651916cd43dd8448eb211c80319c".parse().unwrap()
}

fn ids() -> RequestContext {
    let request_id: RequestId = "request-9".parse().unwrap();
    RequestContext::new().with(trace_id()).with(request_id)
}

#[test]
fn a_panic_is_one_event_with_name_place_message_and_ids() {
    let line = line!() + 5;
    let events = events_of(|| {
        current_thread().block_on(async {
            let tasks = TaskRegistry::new();
            let request = ids().sync_scope(|| serve(&TaskSetLayer::new(&tasks)));
            let task = request.set.spawn("bad_task", async {
                tokio::task::yield_now().await;
                panic!("out of\n\u{1b}[31mluck");
            });
            let yielded = outcome::<()>(task.unwrap()).await;
            assert_eq!(yielded, Yield::Panicked(r"out of\n\u{1b}[31mluck".to_owned()));
        });
    });
    let [event] = &events[..] else { panic!("{events:?}") };
    assert_eq!(event.level, Level::ERROR);
    assert_eq!(event.message, "task panicked");
    let field = |name| event.fields.get(name).map(String::as_str);
    assert_eq!(field("task"), Some("bad_task"));
    let site = field("spawned_at").unwrap();
    assert!(site.starts_with(&format!("{}:{line}:", file!())), "{site}");
    assert_eq!(field("panic"), Some(r"out of\n\u{1b}[31mluck"));
    assert_eq!(field("trace_id"), Some("0af7651916cd43dd8448eb211c80319c"));
    assert_eq!(field("request_id"), Some("request-9"));
    assert_eq!(field("thread"), std::thread::current().name());
}

#[test]
fn a_panic_outside_of_any_request_has_no_ids() {
    let events = events_of(|| {
        current_thread().block_on(async {
            let task = TaskRegistry::new().spawn("bad_task", async { panic!("{}", 1) });
            outcome::<()>(task.unwrap()).await;
        });
    });
    let [event] = &events[..] else { panic!("{events:?}") };
    assert!(!event.fields.contains_key("trace_id"), "{event:?}");
    assert!(!event.fields.contains_key("request_id"), "{event:?}");
}

#[test]
fn a_message_is_cut_at_a_kibibyte() {
    let events = events_of(|| {
        current_thread().block_on(async {
            let task =
                TaskRegistry::new().spawn("bad_task", async { panic!("{}", "é".repeat(9999)) });
            outcome::<()>(task.unwrap()).await;
        });
    });
    let message = &events[0].fields["panic"];
    assert_eq!(message.len(), 1024);
    assert!(message.chars().all(|char| char == 'é'));
}

#[test]
fn a_panic_of_a_destructor_is_one_event_too() {
    let events = events_of(|| {
        current_thread().block_on(async {
            let tasks = TaskRegistry::new();
            let request = ids().sync_scope(|| serve(&TaskSetLayer::new(&tasks)));
            let on_drop = OnDrop::new(|| panic!("in the drop"));
            let task = request.set.spawn("bad_drop", drop_later(on_drop));
            let yielded = outcome(task.unwrap()).await;
            assert_eq!(yielded, Yield::Panicked("in the drop".to_owned()));
        });
    });
    let [event] = &events[..] else { panic!("{events:?}") };
    assert_eq!((event.level, &event.fields["task"][..]), (Level::ERROR, "bad_drop"));
    assert!(event.fields["spawned_at"].starts_with(file!()), "{event:?}");
    assert_eq!(
        event.fields.get("trace_id").map(String::as_str),
        Some("0af7651916cd43dd8448eb211c80319c"),
    );
}

/// A future that is ready and drops this only when it is itself dropped.
fn drop_later<T: Send + Unpin>(value: T) -> impl Future<Output = ()> + Send {
    let mut value = Some(value);
    std::future::poll_fn(move |_| {
        // Keeps the closure the owner.
        let _ = value.as_mut();
        std::task::Poll::Ready(())
    })
}

#[test]
fn of_two_panics_of_a_task_the_first_one_is_told() {
    let events = events_of(|| {
        current_thread().block_on(async {
            let tasks = TaskRegistry::new();
            // Stays in the future when its poll has panicked.
            let mut on_drop = Some(OnDrop::new(|| panic!("in the drop")));
            let task = tasks.spawn(
                "worst",
                std::future::poll_fn(move |_| {
                    let _ = on_drop.as_mut();
                    panic!("in the poll")
                }),
            );
            let yielded = outcome::<()>(task.unwrap()).await;
            assert!(matches!(yielded, Yield::Panicked(_)), "{yielded:?}");
            assert_ledger(&tasks, "panicked 1");
        });
    });
    assert_eq!(events.len(), 1, "{events:?}");
    assert_eq!(events[0].fields["panic"], "in the poll");
}

#[test]
fn nothing_is_logged_of_tasks_that_end_in_any_other_way() {
    let events = events_of(|| {
        let runtime = current_thread();
        let tasks = TaskRegistry::new();
        runtime.block_on(async {
            tokio::time::pause();
            let request = serve(&TaskSetLayer::new(&tasks).at_end(AtEnd::Cancel));
            request.set.spawn("completes", async {}).unwrap();
            let cancelled = request.set.spawn("cancelled", forever()).unwrap();
            let timed_out = request.set.task("times out").timeout(secs(1)).spawn(forever());
            assert_eq!(outcome(timed_out.unwrap()).await, Yield::TimedOut);
            request.end(End::Disconnected);
            assert_eq!(outcome(cancelled).await, Yield::Cancelled(Cause::Disconnected));
            tasks.spawn("aborted", forever()).unwrap();
        });
        drop(runtime);
        assert_ledger(&tasks, "completed 1, cancelled 1, aborted 1, timed out 1");
    });
    assert!(events.is_empty(), "{events:?}");
}

#[test]
fn a_panic_of_the_subscriber_is_contained() {
    let recording = Recording { panics: true, ..Recording::default() };
    let recorded = recorded(recording, || {
        current_thread().block_on(async {
            let tasks = TaskRegistry::new();
            let task = tasks.spawn("bad_task", async { panic!("first") });
            assert_eq!(outcome::<()>(task.unwrap()).await, Yield::Panicked("first".to_owned()));
            let on_drop = OnDrop::new(|| panic!("second"));
            let task = tasks.spawn("bad_drop", drop_later(on_drop));
            assert_eq!(outcome(task.unwrap()).await, Yield::Panicked("second".to_owned()));
            assert_ledger(&tasks, "panicked 2");
        });
    });
    assert_eq!(recorded.events.len(), 2);
}
