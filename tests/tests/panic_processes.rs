//! What nothing can catch: a panic that leaves a destructor while another one unwinds, and any
//! panic under `panic = "abort"`. The process dies, and has said why. And what looks like it, and is
//! caught.
//!
//! The process is this one once more; and the package `tower-tasks-panic-abort`, built by cargo into
//! a folder of its own.

#![cfg(unix)]
#![allow(clippy::unwrap_used)]

#[allow(dead_code)] // Its `main`.
#[path = "../panic-abort/main.rs"]
mod child;

use std::{
    env,
    os::unix::process::ExitStatusExt,
    process::{Command, Output},
};

/// Where this process is to panic, if it is a child.
const ORIGIN: &str = "TOWER_TASKS_TEST_PANICS_IN";

fn run(origin: &str) -> Output {
    Command::new(env::current_exe().unwrap())
        .args(["--exact", "one_panic_ends_no_process_that_unwinds", "--nocapture"])
        .env(ORIGIN, origin)
        .env("RUST_BACKTRACE", "0")
        .output()
        .unwrap()
}

#[track_caller]
fn assert_lives(output: &Output, told: &str) {
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{stderr}");
    let stdout = String::from_utf8_lossy(&output.stdout);
    assert!(stdout.contains(told), "{stdout}\n{stderr}");
}

#[track_caller]
fn assert_dies(output: &Output, told: &[&str]) {
    const SIGABRT: i32 = 6;
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.signal(), Some(SIGABRT), "{stderr}");
    for told in told {
        assert!(stderr.contains(told), "{stderr}");
    }
}

#[test]
fn one_panic_ends_no_process_that_unwinds() {
    if let Ok(origin) = env::var(ORIGIN) {
        return child::serve(origin);
    }
    assert_lives(&run("nowhere"), "200 and 0 of tasks\n");
    assert_lives(&run("handler"), "500 and 0 of tasks\n");
    assert_lives(&run("task"), "200 and 1 of tasks\n");
    assert_lives(&run("drop of a task"), "200 and 1 of tasks\n");
}

#[test]
fn a_panic_that_leaves_a_destructor_while_another_one_unwinds_ends_the_process() {
    for (origin, of) in [("two of a task", "a task"), ("two of the handler", "the handler")] {
        let second = format!("dropped while {of} unwinds");
        assert_dies(&run(origin), &[&format!("in {of}"), &second, "panic in a destructor"]);
    }
}

#[test]
fn under_panic_abort_any_panic_ends_the_process() {
    let folder = concat!(env!("CARGO_TARGET_TMPDIR"), "/panic-abort");
    let built = Command::new(env::var_os("CARGO").unwrap())
        .args(["build", "--quiet", "--package", "tower-tasks-panic-abort", "--target-dir", folder])
        .current_dir(env!("CARGO_MANIFEST_DIR"))
        .env("CARGO_PROFILE_DEV_PANIC", "abort")
        // Symbols would take most of the time.
        .env("CARGO_PROFILE_DEV_DEBUG", "0")
        .output()
        .unwrap();
    assert!(built.status.success(), "{}", String::from_utf8_lossy(&built.stderr));
    let run = |origin: &str| {
        let mut child = Command::new(format!("{folder}/debug/panic-abort"));
        child.arg(origin).env("RUST_BACKTRACE", "0").output().unwrap()
    };
    assert_lives(&run("nowhere"), "200 and 0 of tasks\n");
    for (origin, message) in [
        ("handler", "in the handler"),
        ("task", "in a task"),
        ("drop of a task", "dropped in a task"),
    ] {
        assert_dies(&run(origin), &["tests/panic-abort/main.rs:", message]);
    }
}
