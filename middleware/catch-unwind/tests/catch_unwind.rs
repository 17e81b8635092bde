#![allow(missing_docs, clippy::unwrap_used)] // Tests.

use std::{
    any::{Any, TypeId},
    cell::Cell,
    env, mem,
    panic::{AssertUnwindSafe, Location, catch_unwind, panic_any, resume_unwind},
    pin::{Pin, pin},
    process::{Command, Output},
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering::Relaxed},
        mpsc,
    },
    task::{Context, Poll, Waker},
    thread,
};

use tokio_test::{assert_pending, assert_ready, task};
use tower_catch_unwind::{CatchUnwind, Panic, catch};
use tower_request_context::{Inherit, RequestContext, RequestId, Scope, Task, TraceId};

const NOT_A_STRING: &str = "(the payload is not a string)";

/// Panics when it is dropped, with a payload that panics when it is dropped, and so on.
struct Bomb {
    left: u32,
}

const BOMB: Bomb = Bomb { left: 4 };

impl Drop for Bomb {
    fn drop(&mut self) {
        if let Some(left) = self.left.checked_sub(1) {
            throw(Self { left });
        }
    }
}

/// Panics without a word to the panic hook.
fn throw(payload: impl Any + Send) -> ! {
    resume_unwind(Box::new(payload))
}

/// What a [`Script`] does.
#[derive(Clone, Copy, Default)]
struct Plan {
    pending: u32,
    in_poll: Option<fn()>,
    in_drop: Option<fn()>,
    output: u32,
}

/// A future that counts, and panics where it is told to.
struct Script {
    plan: Plan,
    counts: Arc<Counts>,
}

#[derive(Default)]
struct Counts {
    polls: AtomicU32,
    drops: AtomicU32,
}

impl Plan {
    fn script(self) -> Script {
        Script { plan: self, counts: Arc::default() }
    }
}

impl Future for Script {
    type Output = u32;

    fn poll(mut self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<u32> {
        self.counts.polls.fetch_add(1, Relaxed);
        if let Some(pending) = self.plan.pending.checked_sub(1) {
            self.plan.pending = pending;
            return Poll::Pending;
        }
        if let Some(panic) = self.plan.in_poll {
            panic();
        }
        Poll::Ready(self.plan.output)
    }
}

impl Drop for Script {
    fn drop(&mut self) {
        self.counts.drops.fetch_add(1, Relaxed);
        if let Some(panic) = self.plan.in_drop {
            panic();
        }
    }
}

fn message(result: Result<u32, Panic>) -> String {
    result.unwrap_err().message().to_owned()
}

/// The message of a panic with this text.
fn told(text: impl Into<String>) -> String {
    Panic::new(Box::new(text.into())).message().to_owned()
}

#[test]
fn a_future_that_does_not_panic_is_left_alone() {
    let script = Plan { pending: 2, output: 7, ..Plan::default() }.script();
    let counts = script.counts.clone();
    let mut future = task::spawn(CatchUnwind::new(script));
    assert_pending!(future.poll());
    assert_pending!(future.poll());
    assert_eq!(counts.drops.load(Relaxed), 0);
    assert_eq!(assert_ready!(future.poll()).unwrap(), 7);
    assert_eq!(counts.polls.load(Relaxed), 3);
    assert_eq!(counts.drops.load(Relaxed), 1, "dropped when it is ready");
    drop(future);
    assert_eq!(counts.drops.load(Relaxed), 1);
}

#[test]
fn the_future_is_polled_with_the_waker_of_whoever_polls() {
    let (sender, receiver) = tokio::sync::oneshot::channel::<u32>();
    let mut future = task::spawn(CatchUnwind::new(receiver));
    assert_pending!(future.poll());
    assert!(!future.is_woken());
    sender.send(7).unwrap();
    assert!(future.is_woken());
    assert_eq!(assert_ready!(future.poll()).unwrap(), Ok(7));
}

#[test]
fn a_closure_that_does_not_panic_is_left_alone() {
    assert_eq!(catch(|| 7).unwrap(), 7);
}

#[test]
fn every_kind_of_payload_from_every_origin_becomes_a_panic() {
    let x = "x".repeat(Panic::MESSAGE_MAX);
    let payloads: [(fn(), &str); 6] = [
        (|| throw("a literal"), "a literal"),
        (|| throw(String::from("a string")), "a string"),
        (|| throw(7_u32), NOT_A_STRING),
        (|| throw(()), NOT_A_STRING),
        (|| throw(BOMB), NOT_A_STRING),
        (|| throw("x".repeat(64 << 20)), &x),
    ];
    for (panic, expected) in payloads {
        let poll = |in_poll, in_drop, pending| {
            let mut future = task::spawn(CatchUnwind::new(
                Plan { pending, in_poll, in_drop, ..Plan::default() }.script(),
            ));
            for _ in 0..pending {
                assert_pending!(future.poll());
            }
            message(assert_ready!(future.poll()))
        };
        let messages = catch_unwind(AssertUnwindSafe(|| {
            drop(CatchUnwind::new(Plan { in_drop: Some(panic), ..Plan::default() }.script()));
            [
                catch(panic).unwrap_err().message().to_owned(),
                poll(Some(panic), None, 0),
                poll(Some(panic), None, 1),
                poll(None, Some(panic), 0),
                poll(Some(panic), Some(|| throw(BOMB)), 0),
            ]
        }));
        // What escapes must not reach the test harness, which would drop it.
        let messages = messages.map_err(mem::forget).expect("nothing escapes");
        let origins = ["a closure", "the first poll", "a later poll", "the drop", "poll and drop"];
        for (origin, message) in origins.into_iter().zip(messages) {
            assert_eq!(message, expected, "{origin}");
        }
    }
}

#[test]
fn what_the_macros_throw_is_told() {
    let luck = "luck";
    assert_eq!(catch(|| panic!("out of luck")).unwrap_err().message(), "out of luck");
    assert_eq!(catch(|| panic!("out of {luck}")).unwrap_err().message(), "out of luck");
    assert_eq!(catch(|| panic_any(7)).unwrap_err().message(), NOT_A_STRING);
    let index = catch(|| Vec::<u8>::new()[luck.len()]).unwrap_err();
    assert!(index.message().contains("out of bounds"), "{index}");
}

#[test]
fn what_the_closure_holds_is_dropped_where_it_is_caught() {
    let bomb = Plan { in_drop: Some(|| throw("in its drop")), ..Plan::default() }.script();
    assert_eq!(catch(move || drop(bomb)).unwrap_err().message(), "in its drop");
}

#[test]
fn a_future_that_panicked_is_dropped_at_once_and_never_polled_again() {
    let script = Plan { in_poll: Some(|| throw("once")), ..Plan::default() }.script();
    let counts = script.counts.clone();
    let mut future = task::spawn(CatchUnwind::new(script));
    assert_eq!(message(assert_ready!(future.poll())), "once");
    assert_eq!(counts.drops.load(Relaxed), 1);

    // Which is the caller's mistake, and no outcome of the future.
    assert!(catch_unwind(AssertUnwindSafe(|| future.poll())).is_err());
    drop(future);
    assert_eq!(counts.polls.load(Relaxed), 1);
    assert_eq!(counts.drops.load(Relaxed), 1);
}

#[test]
fn of_two_panics_the_first_one_is_told() {
    let script = Plan {
        in_poll: Some(|| throw("first")),
        in_drop: Some(|| throw("second")),
        ..Plan::default()
    }
    .script();
    let counts = script.counts.clone();
    let mut future = task::spawn(CatchUnwind::new(script));
    assert_eq!(message(assert_ready!(future.poll())), "first");
    assert_eq!(counts.drops.load(Relaxed), 1, "its drop did panic");
}

#[test]
fn a_drop_that_panics_when_the_future_is_ready_is_the_outcome_and_the_output_is_dropped() {
    struct Ready {
        output: Option<Script>,
    }
    impl Future for Ready {
        type Output = Script;
        fn poll(mut self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<Script> {
            Poll::Ready(self.output.take().unwrap())
        }
    }
    impl Drop for Ready {
        fn drop(&mut self) {
            throw("in its drop");
        }
    }

    for in_drop in [None, Some((|| throw("and the output's too")) as fn())] {
        let output = Plan { in_drop, ..Plan::default() }.script();
        let counts = output.counts.clone();
        let mut future = task::spawn(CatchUnwind::new(Ready { output: Some(output) }));
        let panic = assert_ready!(future.poll()).err().unwrap();
        assert_eq!(panic.message(), "in its drop");
        assert_eq!(counts.drops.load(Relaxed), 1);
    }
}

#[test]
fn a_drop_that_panics_between_polls_is_contained() {
    let script =
        Plan { pending: 1, in_drop: Some(|| throw("in its drop")), ..Plan::default() }.script();
    let counts = script.counts.clone();
    let mut future = task::spawn(CatchUnwind::new(script));
    assert_pending!(future.poll());
    assert!(catch_unwind(AssertUnwindSafe(|| drop(future))).is_ok());
    assert_eq!(counts.drops.load(Relaxed), 1);
}

/// Runs the test of this name in a process of its own. `None` in that process.
fn in_its_own_process(test: &str) -> Option<Output> {
    const INSIDE: &str = "TOWER_CATCH_UNWIND_TEST";
    if env::var_os(INSIDE).is_some() {
        return None;
    }
    let output = Command::new(env::current_exe().unwrap())
        .args(["--exact", test, "--nocapture"])
        .env(INSIDE, "1")
        .output()
        .unwrap();
    let ran = String::from_utf8_lossy(&output.stdout);
    assert!(ran.contains("running 1 test"), "{test} in {ran}");
    Some(output)
}

#[test]
fn a_drop_that_panics_while_another_panic_unwinds_is_contained() {
    // In a process of its own, since it dies if the panic is not contained.
    let name = "a_drop_that_panics_while_another_panic_unwinds_is_contained";
    if let Some(output) = in_its_own_process(name) {
        let errors = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{}: {errors}", output.status);
        assert!(errors.contains("the second panic"), "{errors}");
        return;
    }
    for pending in [0, 1] {
        let script =
            Plan { pending, in_drop: Some(|| panic!("the second panic")), ..Plan::default() }
                .script();
        let counts = script.counts.clone();
        let mut future = task::spawn(CatchUnwind::new(script));
        let panic = catch(|| {
            for _ in 0..pending {
                assert_pending!(future.poll());
            }
            let _dropped = future;
            throw("the first panic");
        });
        assert_eq!(panic.unwrap_err().message(), "the first panic");
        assert_eq!(counts.drops.load(Relaxed), 1);
    }
}

#[test]
fn a_panic_is_caught_while_another_one_unwinds() {
    // As above.
    struct Catches(mpsc::Sender<String>);
    impl Drop for Catches {
        fn drop(&mut self) {
            let mut future = pin!(CatchUnwind::new(
                Plan { in_poll: Some(|| throw("inside")), ..Plan::default() }.script()
            ));
            let polled = future.as_mut().poll(&mut Context::from_waker(Waker::noop()));
            self.0.send(message(assert_ready!(polled))).unwrap();
        }
    }

    if let Some(output) = in_its_own_process("a_panic_is_caught_while_another_one_unwinds") {
        assert!(output.status.success(), "{output:?}");
        return;
    }
    let (sender, receiver) = mpsc::channel();
    let panic = catch(|| {
        let _catches = Catches(sender);
        throw("outside");
    });
    assert_eq!(panic.unwrap_err().message(), "outside");
    assert_eq!(receiver.recv().unwrap(), "inside");
}

#[test]
fn nothing_catches_a_panic_that_leaves_a_destructor_while_another_one_unwinds() {
    let name = "nothing_catches_a_panic_that_leaves_a_destructor_while_another_one_unwinds";
    let Some(output) = in_its_own_process(name) else {
        let _ = catch(|| {
            let _bomb = BOMB;
            throw("the first panic");
        });
        return;
    };
    assert!(!output.status.success());
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(errors.contains("panic in a destructor during cleanup"), "{errors}");
}

#[test]
fn nothing_is_allocated_unless_there_is_a_panic() {
    let script = Plan { pending: 3, ..Plan::default() }.script();
    let unpolled = Plan::default().script();
    let allocated = allocation_counter::measure(|| {
        let mut cx = Context::from_waker(Waker::noop());
        let mut future = pin!(CatchUnwind::new(script));
        while future.as_mut().poll(&mut cx).is_pending() {}
        drop(CatchUnwind::new(unpolled));
        assert!(catch(|| ()).is_ok());
    });
    assert_eq!(allocated.count_total, 0);
}

#[test]
fn a_huge_message_is_not_copied() {
    let message = "\u{200b}".repeat(16 << 20);
    let allocated = allocation_counter::measure(|| drop(Panic::new(Box::new(message))));
    assert!((1..16 << 10).contains(&allocated.bytes_max), "{allocated:?}");
}

#[test]
fn the_payload_is_dropped_once() {
    struct Payload(Arc<AtomicU32>);
    impl Drop for Payload {
        fn drop(&mut self) {
            self.0.fetch_add(1, Relaxed);
        }
    }

    let drops = Arc::new(AtomicU32::new(0));
    let panic = Panic::new(Box::new(Payload(drops.clone())));
    assert_eq!(drops.load(Relaxed), 1);
    drop(panic);
    assert_eq!(drops.load(Relaxed), 1);
}

#[test]
fn of_a_payload_that_is_no_string_nothing_is_told() {
    struct Secret;
    let panic = Panic::new(Box::new(Secret));
    assert_eq!(panic.message(), NOT_A_STRING);
    assert!(!format!("{panic} {panic:?}").contains("Secret"));
}

#[tokio::test]
async fn the_panic_of_a_join_error_is_told() {
    let error = tokio::spawn(async { panic!("in a task") }).await.unwrap_err();
    assert_eq!(Panic::new(error.into_panic()).message(), "in a task");
}

#[test]
fn line_ends_escape_sequences_and_backslashes_are_escaped() {
    assert_eq!(told("one\ntwo\r\n\tthree\0"), r"one\ntwo\r\n\tthree\0");
    assert_eq!(told("\u{1b}[31mred\u{7f}\u{9b}"), r"\u{1b}[31mred\u{7f}\u{9b}");
    assert_eq!(told("admin\u{202e}nimda\u{2066}"), r"admin\u{202e}nimda\u{2066}");
    assert_eq!(told("line\u{2028}paragraph\u{2029}"), r"line\u{2028}paragraph\u{2029}");
    // So that an escape cannot be mistaken for what was written in the message.
    assert_eq!(told(r"C:\new"), r"C:\\new");
}

#[test]
fn ordinary_text_is_told_as_it_is() {
    let text = r#"called `Option::unwrap()`: "it's" {1, 2} – naïve 日本語 🦀"#;
    assert_eq!(told(text), text);
}

#[test]
fn no_character_that_controls_a_terminal_or_the_order_of_text_is_ever_told() {
    let hostile = |char: char| {
        char.is_control()
            || matches!(char,
                '\u{ad}' | '\u{61c}' | '\u{180e}' | '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}'
                | '\u{2060}'..='\u{206f}' | '\u{feff}' | '\u{fff9}'..='\u{fffb}'
                | '\u{e0000}'..='\u{e007f}')
    };
    let all: Vec<char> = ('\0'..=char::MAX).collect();
    for some in all.chunks(64) {
        let message = told(some.iter().collect::<String>());
        assert_eq!(message.chars().find(|char| hostile(*char)), None, "{message}");
    }
}

#[test]
fn a_message_is_cut_between_characters_and_never_within_an_escape() {
    let full = "x".repeat(Panic::MESSAGE_MAX);
    assert_eq!(told(&full), full);
    assert_eq!(told(format!("{full}x")), full);

    for (char, told_as) in
        [('x', "x"), ('é', "é"), ('🦀', "🦀"), ('\n', r"\n"), ('\u{202e}', r"\u{202e}")]
    {
        for before in Panic::MESSAGE_MAX - 10..=Panic::MESSAGE_MAX {
            let mut expected = "y".repeat(before);
            let message = format!("{expected}{char}z");
            if before + told_as.len() <= Panic::MESSAGE_MAX {
                expected.push_str(told_as);
            }
            if expected.len() < Panic::MESSAGE_MAX && expected.len() > before {
                expected.push('z');
            }
            assert_eq!(told(message), expected, "{char:?} after {before}");
        }
    }
    assert_eq!(told("\n".repeat(1 << 20)).len(), Panic::MESSAGE_MAX);
}

fn trace_id() -> TraceId {
    "0af7651916cd43dd8448eb211c80319c".parse().unwrap()
}

#[test]
fn the_ids_are_those_of_the_request_that_is_current_where_it_is_caught() {
    let request_id: RequestId = "order-7".parse().unwrap();
    let context = RequestContext::new().with(trace_id()).with(request_id.clone());

    let panic = context.clone().sync_scope(|| catch(|| throw("here"))).unwrap_err();
    assert_eq!(panic.trace_id(), Some(trace_id()));
    assert_eq!(panic.request_id(), Some(&request_id));

    let below = context.clone().scope(CatchUnwind::new(async { throw("here") }));
    let panic = assert_ready!(task::spawn(below).poll()).map(|()| 0).unwrap_err();
    assert_eq!(panic.trace_id(), Some(trace_id()));
    assert_eq!(panic.request_id(), Some(&request_id));

    let above = CatchUnwind::new(context.scope(async { throw("here") }));
    let panic = assert_ready!(task::spawn(above).poll()).map(|()| 0).unwrap_err();
    assert_eq!(panic.trace_id(), None, "the scope was left before it is caught");
    assert_eq!(panic.request_id(), None);
}

/// A value whose inheritance may panic, and that has the trace id as a part.
struct Trace {
    id: TraceId,
    panics: bool,
}

impl Inherit for Trace {
    fn inherit(&self, _: &Task) -> Self {
        assert!(!self.panics, "while it is inherited");
        Self { ..*self }
    }

    fn part(&self, wanted: TypeId) -> Option<&dyn Any> {
        (wanted == TypeId::of::<TraceId>()).then_some(&self.id)
    }
}

fn in_a_task<R>(panics: bool, f: impl FnOnce() -> R) -> R {
    let trace = Trace { id: trace_id(), panics };
    let context = RequestContext::new().with_inherited(trace);
    Scope::of_task(context, Task::new("task", Location::caller())).enter(f)
}

#[test]
fn in_a_task_the_ids_are_the_tasks_own() {
    let panic = in_a_task(false, || catch(|| throw("in a task"))).unwrap_err();
    assert_eq!(panic.trace_id(), Some(trace_id()));
}

#[test]
fn a_value_that_panics_while_it_is_inherited_costs_the_ids_and_not_the_outcome() {
    let panic = in_a_task(true, || catch(|| throw("in a task"))).unwrap_err();
    assert_eq!(panic.message(), "in a task");
    assert_eq!(panic.trace_id(), None);
}

#[test]
fn what_such_a_value_panics_with_is_dropped() {
    /// Is asked for the ids where a panic is caught.
    struct Throws(Arc<AtomicU32>);
    impl Inherit for Throws {
        fn inherit(&self, _: &Task) -> Self {
            Self(self.0.clone())
        }
        fn part(&self, _: TypeId) -> Option<&dyn Any> {
            throw(self.0.clone())
        }
    }
    let count = Arc::<AtomicU32>::default();
    let context = RequestContext::new().with_inherited(Throws(count.clone()));
    let panic = context.sync_scope(|| catch(|| throw("here"))).unwrap_err();
    assert_eq!((panic.message(), panic.trace_id()), ("here", None));
    // That of the context went with the scope.
    assert_eq!(Arc::strong_count(&count), 1);
}

#[test]
fn the_thread_is_named_if_it_has_a_name() {
    let caught = |thread: thread::Builder| {
        let thread = thread.spawn(|| catch(|| throw("here")).unwrap_err());
        thread.unwrap().join().unwrap()
    };
    let panic = caught(thread::Builder::new().name("worker-7".into()));
    assert_eq!(panic.thread(), Some("worker-7"));
    assert_eq!(caught(thread::Builder::new()).thread(), None);
}

#[test]
fn a_panic_is_caught_in_a_destructor_at_the_end_of_a_thread() {
    struct Late(Cell<Option<mpsc::Sender<Panic>>>);
    impl Drop for Late {
        fn drop(&mut self) {
            let panic = catch(|| throw("late")).unwrap_err();
            self.0.take().unwrap().send(panic).unwrap();
        }
    }
    thread_local!(static LATE: Late = const { Late(Cell::new(None)) });

    for context_first in [true, false] {
        let (sender, receiver) = mpsc::channel();
        let thread = thread::spawn(move || {
            // The destructors run in the order of the first use, or in the opposite one.
            if context_first {
                assert!(RequestContext::current().is_empty());
            }
            LATE.with(|late| late.0.set(Some(sender)));
            assert!(RequestContext::current().is_empty());
        });
        assert_eq!(receiver.recv().unwrap().message(), "late");
        thread.join().unwrap();
    }
}

#[test]
fn a_task_is_named_with_the_place_it_was_spawned_at() {
    let site = Location::caller();
    let panic = Panic::new(Box::new("in a task"));
    let in_task = panic.clone().in_task("send_receipt", site);
    assert_eq!(in_task.task(), Some("send_receipt"));
    assert_eq!(in_task.spawn_site(), Some(site));
    assert_eq!(
        in_task.to_string(),
        format!("task send_receipt (spawned at {site}) panicked: in a task")
    );
    assert_eq!(in_task.message(), "in a task");
    assert_eq!(in_task.thread(), panic.thread());

    assert_eq!(panic.task(), None, "a clone is left as it was");
    assert_eq!(panic.spawn_site(), None);
    assert_eq!(panic.to_string(), "panicked: in a task");
}

#[test]
fn a_panic_goes_through_debug_and_as_an_error_with_all_it_knows() {
    let context =
        RequestContext::new().with(trace_id()).with("order-7".parse::<RequestId>().unwrap());
    let panic = context.sync_scope(|| Panic::new(Box::new("one\ntwo")));
    let panic = panic.in_task("send_receipt", Location::caller());
    let debug = format!("{panic:?}");
    for known in [r"one\\ntwo", "send_receipt", file!(), "TraceId(0af7", "RequestId(order-7)"] {
        assert!(debug.contains(known), "{known} in {debug}");
    }
    let boxed: Box<dyn std::error::Error + Send + Sync> = Box::new(panic);
    assert!(boxed.to_string().ends_with(r"panicked: one\ntwo"));
}
