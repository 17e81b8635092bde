//! The shutdown of whole processes, by real signals: how long it takes, what it reports, and what
//! the process exits with.

#![cfg(unix)]
#![allow(clippy::unwrap_used)]
#![expect(clippy::print_stdout, reason = "it tells what it measures")]

use std::{
    collections::BTreeSet,
    io::{BufRead, BufReader, Read},
    os::unix::process::ExitStatusExt,
    process::{Child, ChildStderr, ChildStdout, Command, Stdio},
    time::{Duration, Instant},
};

use serde_json::Value;

const SIGINT: i32 = 2;
const SIGTERM: i32 = 15;
/// A machine that runs all tests at once may be so many times slower than one that has time, which
/// release builds are for.
const SLACK: u32 = if cfg!(debug_assertions) { 5 } else { 1 };

/// A process that serves, and is killed if a test forgets it.
struct Process {
    child: Child,
    out: BufReader<ChildStdout>,
    log: BufReader<ChildStderr>,
}

struct Ended {
    code: Option<i32>,
    /// From the signal to the end.
    took: Duration,
    out: String,
    log: String,
}

impl Process {
    fn start(what: &str, budget: Duration) -> Self {
        Self::start_with(what, budget, &[])
    }

    fn start_with(what: &str, budget: Duration, more: &[&str]) -> Self {
        let mut child = Command::new(env!("CARGO_BIN_EXE_shutdown_child"))
            .args([what, &budget.as_millis().to_string()])
            .args(more)
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let mut out = BufReader::new(child.stdout.take().unwrap());
        let mut ready = String::new();
        out.read_line(&mut ready).unwrap();
        assert_eq!(ready, "ready\n", "{what}");
        let log = BufReader::new(child.stderr.take().unwrap());
        Self { child, out, log }
    }

    fn signal(&self, signal: i32) {
        let pid = self.child.id().to_string();
        let kill = Command::new("kill").args([&format!("-{signal}"), &pid]).status().unwrap();
        assert!(kill.success());
    }

    /// Waits until the log says this.
    fn logged(&mut self, what: &str) -> Instant {
        let mut line = String::new();
        while !line.contains(what) {
            line.clear();
            assert_ne!(self.log.read_line(&mut line).unwrap(), 0, "it never says {what:?}");
        }
        Instant::now()
    }

    /// Waits for the end; the time counts from `since`.
    fn wait(mut self, since: Instant) -> Ended {
        let (mut out, mut log) = (String::new(), String::new());
        self.out.read_to_string(&mut out).unwrap();
        self.log.read_to_string(&mut log).unwrap();
        let status = self.child.wait().unwrap();
        assert_eq!(status.signal(), None, "it ends by itself");
        Ended { code: status.code(), took: since.elapsed(), out, log }
    }

    fn terminate(self) -> Ended {
        let since = Instant::now();
        self.signal(SIGTERM);
        self.wait(since)
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Ended {
    /// The report, which is the last line.
    fn report(&self) -> Value {
        let line = self.out.lines().last().unwrap_or_else(|| panic!("no report"));
        serde_json::from_str(line).unwrap_or_else(|_| panic!("no report: {}", self.out))
    }
}

/// `took` by the process's own clock.
fn took(report: &Value) -> Duration {
    Duration::from_millis(report["took_ms"].as_u64().unwrap())
}

fn sum(of: &Value, names: &[&str]) -> u64 {
    names.iter().map(|name| of[name].as_u64().unwrap()).sum()
}

/// What was forced: its name and its outcome, `null` if it still runs.
fn forced(report: &Value) -> BTreeSet<String> {
    let forced = report["forced"].as_array().unwrap();
    forced.iter().map(|it| format!("{} {}", it["name"].as_str().unwrap(), it["outcome"])).collect()
}

#[track_caller]
fn assert_adds_up(report: &Value) {
    let of = &report["requests"];
    let gone = sum(of, &["completed", "ended", "left"]);
    assert_eq!(sum(of, &["at_begin", "later"]), gone, "{report}");
    let ended = ["completed", "cancelled", "aborted", "timed_out", "panicked"];
    let of = &report["drained"];
    let gone = sum(of, &ended) + sum(of, &["left"]);
    assert_eq!(sum(of, &["at_begin", "spawned"]), gone, "{report}");
    let of = &report["tasks"];
    assert_eq!(sum(of, &["spawned"]), sum(of, &ended) + sum(of, &["live"]), "{report}");
    assert_eq!(sum(of, &["attempted"]), sum(of, &["spawned", "refused"]), "{report}");
}

#[test]
fn the_exit_code_is_nonzero_exactly_when_something_was_forced() {
    // (what the process does, what is forced of it)
    let table: [(&str, &[&str]); 17] = [
        ("nothing", &[]),
        ("request", &[]),
        ("task", &[]),
        ("graceful", &[]),
        ("blocking", &[]),
        ("panic", &[]),
        ("timeout", &[]),
        ("cancel", &[]),
        ("by_itself", &[]),
        ("no_runtime", &[]),
        ("forever", &["forever \"cancelled\""]),
        ("goes_on", &["goes_on \"aborted\""]),
        ("stuck_request", &["GET \"cancelled\""]),
        ("held", &["GET null"]),
        ("never_yields", &["never_yields null"]),
        ("stuck_closure", &["blocks null"]),
        ("twice", &["goes_on \"aborted\""]),
    ];
    println!("{:<14} {:>4} {:>8}  forced", "process", "exit", "took");
    for (what, expected) in table {
        // All the time they want for those that come to their end.
        let budget = Duration::from_millis(if expected.is_empty() { 5_000 } else { 500 });
        let ended = Process::start(what, budget).terminate();
        let report = ended.report();
        let found = forced(&report);
        println!(
            "{what:<14} {:>4} {:>5} ms  {found:?}",
            ended.code.unwrap(),
            took(&report).as_millis()
        );
        assert_eq!(found, expected.iter().map(ToString::to_string).collect(), "{what}");
        let code = i32::from(!expected.is_empty());
        assert_eq!(ended.code, Some(code), "{what}");
        assert_eq!(report["exit_code"], code, "{what}");
        assert_adds_up(&report);
        for forced in report["forced"].as_array().unwrap() {
            if forced["what"] == "task" {
                assert!(
                    forced["site"].as_str().unwrap().contains("shutdown_child.rs:"),
                    "{forced}"
                );
                assert!(forced["age_ms"].is_u64(), "{forced}");
            }
        }
    }
}

#[test]
fn a_budget_of_zero_ends_within_250_ms_and_destructors_run() {
    for what in ["destructor", "goes_on", "never_yields", "stuck_closure", "stuck_request", "held"]
    {
        let ended = Process::start(what, Duration::ZERO).terminate();
        let report = ended.report();
        assert!(took(&report) < Duration::from_millis(250) * SLACK, "{what}: {report}");
        assert_eq!(ended.code, Some(1), "{what}");
        assert_eq!(ended.out.starts_with("dropped\n"), what == "destructor", "{}", ended.out);
        println!("{what:<14} run {:?}, process {:?}", took(&report), ended.took);
    }
}

#[test]
fn either_signal_begins_and_a_second_is_the_deadline() {
    for first in [SIGTERM, SIGINT] {
        for what in ["twice", "thrice"] {
            let mut process = Process::start(what, Duration::from_secs(600));
            process.signal(first);
            process.logged("shutting down");
            // Not the log: what is over at once may exit before the line is written.
            let second = Instant::now();
            process.signal(SIGTERM);
            let ended = process.wait(second);
            let mut expected = BTreeSet::from(["goes_on \"aborted\"".to_owned()]);
            if what == "thrice" {
                expected.insert("blocks null".to_owned());
            }
            assert_eq!(forced(&ended.report()), expected);
            assert_eq!(ended.code, Some(1));
            println!("{what}: {:?} from the second signal to the end of the process", ended.took);
            assert!(ended.took < Duration::from_millis(100) * SLACK, "{:?}", ended.took);
        }
    }
}

#[test]
fn a_third_signal_exits_with_its_number_whatever_is_stuck() {
    for (third, code) in [(SIGTERM, 143), (SIGINT, 130)] {
        let mut process = Process::start("current_thread", Duration::from_secs(600));
        process.signal(SIGTERM);
        process.logged("takes the thread");
        process.signal(SIGTERM);
        process.logged("cut short");
        process.signal(third);
        let ended = process.wait(Instant::now());
        assert_eq!(ended.code, Some(code));
        println!("{:?} from the third signal to the end of the process", ended.took);
    }
}

#[test]
fn a_runtime_whose_only_thread_is_taken_is_reported_all_the_same() {
    let ended = Process::start("current_thread", Duration::from_millis(100)).terminate();
    assert_eq!(ended.code, Some(1));
    for told in ["the runtime is stuck", "takes_the_thread (still running", "shutdown_child.rs:"] {
        assert!(ended.log.contains(told), "{}", ended.log);
    }
    println!("{:?} from the signal to the end of the process", ended.took);
    assert!(ended.took > Duration::from_secs(1));
}

#[test]
fn a_log_that_panics_stops_neither_the_shutdown_nor_the_thread_that_listens() {
    let ended = Process::start_with("task", Duration::from_secs(600), &["panics"]).terminate();
    assert_eq!((forced(&ended.report()).len(), ended.code), (0, Some(0)));
    assert!(ended.log.contains("the log panics"), "{}", ended.log);

    let mut process = Process::start_with("thrice", Duration::from_secs(600), &["panics"]);
    process.signal(SIGTERM);
    process.logged("shutting down");
    process.signal(SIGTERM);
    let ended = process.wait(Instant::now());
    assert_eq!((forced(&ended.report()).len(), ended.code), (2, Some(1)));

    let stuck = Process::start_with("current_thread", Duration::from_millis(100), &["panics"]);
    assert_eq!(stuck.terminate().code, Some(1), "from the thread that listens");
}

#[test]
fn a_third_signal_exits_though_the_log_panics() {
    let mut process = Process::start_with("current_thread", Duration::from_secs(600), &["panics"]);
    process.signal(SIGTERM);
    process.logged("takes the thread");
    process.signal(SIGTERM);
    // It is written, and then it panics.
    process.logged("cut short");
    process.signal(SIGTERM);
    assert_eq!(process.wait(Instant::now()).code, Some(143));
}

#[test]
fn a_log_that_blocks_stops_neither_the_shutdown_nor_the_thread_that_listens() {
    let start = |what, budget| Process::start_with(what, budget, &["blocks"]);
    let ended = start("forever", Duration::from_millis(100)).terminate();
    assert_eq!((forced(&ended.report()).len(), ended.code), (1, Some(1)));
    let stuck = start("current_thread", Duration::from_millis(100)).terminate();
    assert_eq!(stuck.code, Some(1), "from the thread that listens");

    let mut process = start("current_thread", Duration::from_secs(600));
    process.signal(SIGTERM);
    process.logged("takes the thread");
    // The second and the third, of which it can say nothing; and perhaps another if they came as one.
    let begun = Instant::now();
    while process.child.try_wait().unwrap().is_none() {
        process.signal(SIGTERM);
        assert!(begun.elapsed() < Duration::from_secs(60), "it goes on");
    }
    assert_eq!(process.wait(Instant::now()).code, Some(143));
}

#[test]
fn a_second_signal_ends_the_settle_delay_of_who_shuts_down_by_hand() {
    let mut process = Process::start("by_hand", Duration::from_secs(600));
    process.signal(SIGTERM);
    process.logged("shutting down");
    let second = Instant::now();
    process.signal(SIGTERM);
    let ended = process.wait(second);
    assert_eq!((forced(&ended.report()).len(), ended.code), (1, Some(1)));
    println!("{:?} from the second signal to the end of the process", ended.took);
    assert!(ended.took < Duration::from_millis(250) * SLACK, "{:?}", ended.took);
}

#[test]
fn a_server_whose_destructor_blocks_is_within_the_budget_too() {
    let ended = Process::start("destructor_of_the_server", Duration::from_millis(100)).terminate();
    assert_eq!(ended.code, Some(0));
    assert!(ended.log.contains("the runtime is stuck"), "{}", ended.log);
}

#[cfg(target_os = "linux")]
#[test]
fn many_shutdowns_that_are_gone_leave_one_thread_that_listens() {
    let process = Process::start("many_gone", Duration::from_secs(600));
    process.signal(SIGTERM);
    assert_eq!(process.wait(Instant::now()).code, Some(143));
}

#[test]
fn a_finish_that_is_not_polled_does_not_end_the_process() {
    let ended = Process::start("unpolled", Duration::from_millis(100)).terminate();
    assert_eq!((&*ended.out, ended.code), ("goes on\n", Some(0)), "{}", ended.log);
}

#[test]
fn a_server_that_fails_ends_the_process_with_its_error_and_the_report() {
    let ended = Process::start("failed", Duration::from_secs(600)).wait(Instant::now());
    assert_eq!(ended.code, Some(1));
    let line = ended.log.lines().last().unwrap();
    assert!(line.contains("the server has failed: the port is taken; shut down in"), "{line}");
}

#[test]
fn a_signal_ends_a_process_whose_shutdown_is_gone() {
    for (signal, code) in [(SIGTERM, 143), (SIGINT, 130)] {
        let process = Process::start("gone", Duration::from_secs(600));
        process.signal(signal);
        assert_eq!(process.wait(Instant::now()).code, Some(code));
    }
}

#[test]
fn a_signal_that_was_heard_does_not_end_a_process_whose_shutdown_is_gone_for_it() {
    for _ in 0..20 {
        let ended = Process::start("gone_at_its_end", Duration::from_secs(600)).terminate();
        assert_eq!(ended.code, Some(0), "{}", ended.log);
    }
}

#[test]
fn a_signal_is_for_the_shutdown_that_is_there_and_not_for_one_that_is_gone() {
    let ended = Process::start("one_of_two_gone", Duration::from_secs(600)).terminate();
    assert_eq!(ended.code, Some(0), "{}", ended.log);
    assert!(ended.report()["server_ended"].as_bool().unwrap());
}
