//! What is logged: a panic, once, where its task and request can be seen.

use std::{cell::RefCell, collections::BTreeMap, fmt, sync::Once};

use tokio::runtime::Runtime;
use tower_catch_unwind::{Panic, Site, install_hook};
use tower_request_context::{RequestContext, RequestId, TraceId};
use tower_task_set::{
    AtEnd, Cause, End, TaskError, TaskEvent, TaskHandle, TaskRegistry, TaskSet, TaskSetLayer,
};
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
        if !event.metadata().target().starts_with("tower_") {
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

/// How many of [`events_of`] there are by now.
pub(crate) fn events_so_far() -> usize {
    RECORDING.with_borrow(|recording| recording.as_ref().map_or(0, |it| it.events.len()))
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

/// Where a panic was, of the file of this test.
fn line_of(location: Option<&Site>) -> Option<u32> {
    location.filter(|site| site.file().ends_with(file!())).map(Site::line)
}

fn panic_of<T: fmt::Debug>(result: Result<T, TaskError>) -> Panic {
    match result {
        Err(TaskError::Panicked(panic)) => panic,
        other => panic!("{other:?}"),
    }
}

/// The event's `location` and the handle's are both this line.
#[track_caller]
fn assert_told_at(line: u32, events: &[Logged], panic: &Panic) {
    let [event] = events else { panic!("{events:?}") };
    assert!(event.fields["location"].contains(&format!("{}:{line}:", file!())), "{event:?}");
    assert_eq!(event.fields["trace_id"], trace_id().to_string());
    assert_eq!(event.fields["panic"], panic.message());
    assert_eq!(event.fields["task"], panic.task().unwrap());
    assert!(event.fields["spawned_at"].starts_with(file!()), "{event:?}");
    assert_eq!(line_of(panic.location()), Some(line), "{panic}");
    assert_eq!(panic.trace_id(), Some(trace_id()));
}

type Panics = fn(&TaskSet) -> TaskHandle<()>;

#[test]
fn with_the_hook_each_panic_of_a_task_says_where_it_was() {
    install_hook();
    let cases: [(u32, Panics); 5] = [
        (line!(), |tasks| tasks.spawn("first poll", async { panic!("first") }).unwrap()),
        (line!() + 3, |tasks| {
            let later = async {
                tokio::task::yield_now().await;
                panic!("later");
            };
            tasks.spawn("later poll", later).unwrap()
        }),
        (line!() + 1, |tasks| {
            let on_drop = OnDrop::new(|| panic!("in its drop when it is ready"));
            tasks.spawn("drop", drop_later(on_drop)).unwrap()
        }),
        (line!() + 1, |tasks| {
            let on_drop = OnDrop::new(|| panic!("before it has run"));
            let task = tasks.spawn("never polled", drop_later(on_drop)).unwrap();
            task.cancel();
            task
        }),
        (line!() + 2, |tasks| {
            let hold = async {
                let _on_drop = OnDrop::new(|| panic!("while it is cancelled"));
                TaskSet::current().unwrap().cancel_all();
                forever().await;
            };
            tasks.spawn("cancelled", hold).unwrap()
        }),
    ];
    for (line, spawn) in cases {
        let run = |runtime: Runtime| {
            let tasks = TaskRegistry::new();
            let panic = runtime.block_on(async {
                let request = ids().sync_scope(|| serve(&TaskSetLayer::new(&tasks)));
                panic_of(spawn(&request.set).await)
            });
            assert_ledger(&tasks, "panicked 1");
            panic
        };
        let mut panic = None;
        let events = events_of(|| panic = Some(run(current_thread())));
        assert_told_at(line, &events, &panic.unwrap());
        // The handle is awaited on another thread. What others log is not seen here.
        assert_eq!(line_of(run(multi_thread()).location()), Some(line));
    }
}

#[test]
fn a_nested_task_says_where_it_was_and_its_parent_goes_on() {
    install_hook();
    let line = line!() + 8;
    let events = events_of(|| {
        current_thread().block_on(async {
            let tasks = TaskRegistry::new();
            let request = ids().sync_scope(|| serve(&TaskSetLayer::new(&tasks)));
            let parent = request.set.spawn("parent", async {
                let set = TaskSet::current().unwrap();
                let child = async {
                    panic!("nested");
                };
                panic_of(set.spawn("child", child).unwrap().await)
            });
            let panic = parent.unwrap().await.unwrap();
            assert_eq!((line_of(panic.location()), panic.task()), (Some(line), Some("child")));
            assert_ledger(&tasks, "completed 1, panicked 1");
        });
    });
    assert_eq!(events.len(), 1, "{events:?}");
}

#[test]
fn what_a_task_has_caught_itself_is_no_other_panics_place() {
    install_hook();
    let events = events_of(|| {
        current_thread().block_on(async {
            let tasks = TaskRegistry::new();
            let catches = tasks.spawn("catches", async {
                drop(std::panic::catch_unwind(|| panic!("the same")));
            });
            assert_eq!(outcome(catches.unwrap()).await, COMPLETED);
            // The hook does not see this one.
            let throws = tasks.spawn("throws", async {
                std::panic::resume_unwind(Box::new("the same"));
            });
            assert_eq!(panic_of::<()>(throws.unwrap().await).location(), None);
            let on_drop = OnDrop::new(|| std::panic::resume_unwind(Box::new("the same")));
            let drops = tasks.spawn("drops", drop_later(on_drop)).unwrap();
            assert_eq!(panic_of(drops.await).location(), None);
        });
    });
    assert!(events.iter().all(|event| !event.fields.contains_key("location")), "{events:?}");
    assert_eq!(events.len(), 2);
}

#[test]
fn a_task_that_throws_again_what_it_caught_keeps_the_place() {
    install_hook();
    current_thread().block_on(async {
        let tasks = TaskRegistry::new();
        let line = line!() + 2;
        let throws = tasks.spawn("throws", async {
            let caught = std::panic::catch_unwind(|| panic!("again"));
            // Others in between are none of its.
            drop(std::panic::catch_unwind(|| panic!("another")));
            std::panic::resume_unwind(caught.unwrap_err());
        });
        let panic = panic_of::<()>(throws.unwrap().await);
        assert_eq!((panic.message(), line_of(panic.location())), ("again", Some(line)));
    });
}

#[test]
fn the_handles_of_many_drops_that_panic_have_each_their_own() {
    install_hook();
    current_thread().block_on(async {
        let tasks = TaskRegistry::new();
        let spawn = |n: usize| {
            let on_drop = OnDrop::new(move || panic!("drop {n}"));
            tasks.spawn("drops", drop_later(on_drop)).unwrap()
        };
        let handles: Vec<_> = (0..20).map(spawn).collect();
        for (n, handle) in handles.into_iter().enumerate() {
            // So many are kept; of the others the handle knows what was said.
            let kept = n >= 12;
            let panic = panic_of(handle.await);
            assert_eq!(panic.message(), format!("drop {n}"));
            assert_eq!(panic.location().is_some(), kept, "{n}");
            assert_eq!(panic.task(), Some("drops"));
        }
    });
}

#[test]
fn a_flood_of_panicking_tasks_floods_no_log() {
    let mut seconds = 0;
    let events = events_of(|| {
        current_thread().block_on(async {
            let tasks = TaskRegistry::new().max_events_per_second(5);
            let started = std::time::Instant::now();
            for n in 0..200 {
                let on_drop = OnDrop::new(move || assert!(n % 2 == 0, "in the drop"));
                let task = tasks.spawn("bad_task", async move {
                    let _on_drop = on_drop;
                    assert!(n % 2 == 1, "in the poll");
                });
                panic_of(task.unwrap().await);
            }
            assert_ledger(&tasks, "panicked 200");
            seconds = started.elapsed().as_secs();
        });
    });
    let told = u64::try_from(events.len()).unwrap();
    assert!((5..=5 * (seconds + 1)).contains(&told), "{told} in {seconds} s");
}

#[test]
fn a_registry_that_may_log_nothing_logs_nothing() {
    let events = events_of(|| {
        current_thread().block_on(async {
            let tasks = TaskRegistry::new().max_events_per_second(0);
            panic_of(tasks.spawn("bad_task", async { panic!() }).unwrap().await);
        });
    });
    assert!(events.is_empty(), "{events:?}");
}

#[test]
fn an_observer_that_panics_is_one_event_for_each_call_with_its_place() {
    install_hook();
    let line = line!() + 3;
    let events = events_of(|| {
        current_thread().block_on(async {
            let observer = |_: &TaskEvent| panic!("observed");
            let tasks = TaskRegistry::new().observer(observer);
            let request = ids().sync_scope(|| serve(&TaskSetLayer::new(&tasks)));
            let task = request.set.spawn("task", async {}).unwrap();
            assert_eq!(outcome(task).await, COMPLETED);
        });
    });
    assert_eq!(events.len(), 2, "{events:?}");
    for event in events {
        assert_eq!((&*event.message, event.level), ("callback panicked", Level::ERROR));
        assert_eq!((&*event.fields["callback"], &*event.fields["panic"]), ("observer", "observed"));
        assert!(event.fields["location"].contains(&format!("{}:{line}:", file!())), "{event:?}");
        assert_eq!(event.fields["trace_id"], trace_id().to_string());
    }
}
