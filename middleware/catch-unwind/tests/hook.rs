//! Where a panic came from: the hook, which this whole process has.

#![allow(missing_docs, clippy::unwrap_used)] // Tests.

use std::{
    any::Any,
    env,
    panic::{self, AssertUnwindSafe, catch_unwind, panic_any, resume_unwind},
    process::{Command, Output},
    sync::{
        Arc, Barrier, Mutex, Once,
        atomic::{AtomicU32, Ordering::Relaxed},
    },
    thread,
};

use tower_catch_unwind::{CatchUnwind, Panic, catch, install_hook, record};

/// How many panics the hook that was there before has seen.
static SEEN: AtomicU32 = AtomicU32::new(0);

fn installed() {
    static BEFORE: Once = Once::new();
    BEFORE.call_once(|| {
        let print = panic::take_hook();
        panic::set_hook(Box::new(move |info| {
            SEEN.fetch_add(1, Relaxed);
            // Of 64 MiB nobody wants to see anything.
            if !info.payload().is::<String>() {
                print(info);
            }
        }));
    });
    install_hook();
    install_hook();
}

/// Panics without a word to the hook.
fn throw(payload: impl Any + Send) -> ! {
    resume_unwind(Box::new(payload))
}

/// The line it came from, in this file.
fn line(panic: &Panic) -> Option<u32> {
    let location = panic.location()?;
    assert!(location.file().ends_with("hook.rs"), "{location}");
    assert_ne!(location.column(), 0);
    Some(location.line())
}

#[test]
fn the_line_is_that_of_the_user() {
    installed();
    let none: Option<u32> = "x".parse().ok();
    let empty: [u8; 0] = [];
    let begins = line!();
    let panics = [
        catch(|| panic!("a literal")).unwrap_err(),
        catch(|| panic!("formatted {begins}")).unwrap_err(),
        catch(|| panic_any(7_u32)).unwrap_err(),
        catch(|| _ = none.unwrap()).unwrap_err(),
        catch(|| _ = "x".parse::<u32>().unwrap()).unwrap_err(),
        catch(|| assert_eq!(empty[begins as usize], 0)).unwrap_err(),
        catch(|| panic!("{}", "x".repeat(64 << 20))).unwrap_err(),
    ];
    for (expected, panic) in (begins + 2..).zip(panics) {
        assert_eq!(line(&panic), Some(expected), "{panic}");
        let at = panic.location().unwrap();
        assert!(panic.to_string().starts_with(&format!("panicked at {at}: ")), "{panic}");
        assert!(format!("{panic:?}").contains(&at.to_string()));
    }
}

#[tokio::test]
async fn a_future_and_its_drop_have_a_location() {
    struct Panics;
    impl Drop for Panics {
        fn drop(&mut self) {
            panic!("in its drop");
        }
    }
    installed();
    let panic = CatchUnwind::new(async { panic!("in a poll") }).await.unwrap_err();
    assert_eq!(line(&panic), Some(line!() - 1));
    let held = Panics;
    let future = tokio::spawn(CatchUnwind::new(async move {
        let _held = held;
        tokio::task::yield_now().await;
    }));
    assert_eq!(future.await.unwrap().unwrap_err().message(), "in its drop");
}

#[test]
fn the_hook_that_was_there_sees_each_panic_once() {
    // In a process of its own: other tests panic too.
    if in_its_own_process("the_hook_that_was_there_sees_each_panic_once") {
        installed();
        assert!(catch(|| panic!("inside")).is_err());
        assert!(catch_unwind(|| panic!("outside")).is_err());
        assert_eq!(SEEN.load(Relaxed), 2);
    }
}

#[test]
fn threads_do_not_mix() {
    installed();
    let barrier = Arc::new(Barrier::new(8));
    let threads: Vec<_> = (0..8)
        .map(|n| {
            let barrier = barrier.clone();
            thread::spawn(move || {
                barrier.wait();
                for _ in 0..100 {
                    // The same message, at two places.
                    let (panic, expected) = if n % 2 == 0 {
                        (catch(|| panic_any("here")).unwrap_err(), line!())
                    } else {
                        (catch(|| panic_any("here")).unwrap_err(), line!())
                    };
                    assert_eq!(line(&panic), Some(expected));
                }
            })
        })
        .collect();
    for thread in threads {
        thread.join().unwrap();
    }
}

#[test]
fn only_what_is_caught_here_is_recorded() {
    installed();
    let payload = catch_unwind(|| panic!("outside")).unwrap_err();
    assert_eq!(Panic::new(payload).location(), None);
    // Nor is anything kept for later.
    let panic = catch(|| {
        assert!(catch_unwind(|| panic!("stale")).is_err());
    });
    assert!(panic.is_ok());
    assert_eq!(catch(|| throw("stale")).unwrap_err().location(), None);
}

#[test]
fn a_panic_that_the_hook_does_not_see_has_no_location() {
    installed();
    assert_eq!(catch(|| throw("thrown")).unwrap_err().location(), None);
    // Not that of another panic, which was caught before.
    for rethrow in [(|| throw("thrown")) as fn(), || throw(String::from("caught")), || throw(7_u8)]
    {
        for first in [(|| panic_any("caught")) as fn(), || panic_any(7_u32)] {
            let panic = catch(|| {
                assert!(catch_unwind(first).is_err());
                rethrow();
            });
            assert_eq!(panic.unwrap_err().location(), None);
        }
    }
}

#[test]
fn a_payload_that_is_thrown_again_keeps_its_origin() {
    installed();
    let begins = line!();
    let panic = catch(|| {
        let payload = catch_unwind(|| panic!("caught")).unwrap_err();
        resume_unwind(payload)
    });
    assert_eq!(line(&panic.unwrap_err()), Some(begins + 2));
    // As does one that somebody else has caught in here.
    let panic = catch(|| Panic::new(catch_unwind(|| panic!("caught")).unwrap_err())).unwrap();
    assert_eq!(line(&panic), Some(line!() - 1));
}

#[test]
fn catchers_within_catchers_have_each_their_own() {
    installed();
    let begins = line!();
    let outer = catch(|| {
        let inner = catch(|| panic!("inner")).unwrap_err();
        assert_eq!(line(&inner), Some(begins + 2));
        panic!("outer");
    });
    assert_eq!(line(&outer.unwrap_err()), Some(begins + 4));
}

#[test]
fn a_catcher_in_a_destructor_leaves_the_panic_that_runs_it_its_own() {
    struct Catches(Arc<Mutex<Vec<Panic>>>, fn());
    impl Drop for Catches {
        fn drop(&mut self) {
            if let Err(panic) = catch(self.1) {
                self.0.lock().unwrap().push(panic);
            }
        }
    }
    installed();
    let inner = Arc::new(Mutex::new(Vec::new()));
    let begins = line!();
    let cases: [(fn(), Option<u32>); 4] = [
        (|| panic!("the same"), Some(begins + 2)),
        (|| panic!("another"), Some(begins + 3)),
        // It has no record, and must not take the outer one's.
        (|| throw("the same"), None),
        (|| (), None),
    ];
    for (in_drop, expected) in cases {
        let outer = catch(|| {
            let _catches = Catches(inner.clone(), in_drop);
            panic!("the same");
        });
        assert_eq!(line(&outer.unwrap_err()), Some(line!() - 2));
        let inner = inner.lock().unwrap().pop();
        assert_eq!(inner.and_then(|panic| line(&panic)), expected);
    }
}

#[test]
fn a_panic_keeps_its_location_however_many_are_caught_before_and_meanwhile() {
    struct Catches(u32);
    impl Drop for Catches {
        fn drop(&mut self) {
            for n in 0..self.0 {
                drop(panic::catch_unwind(|| panic!("caught: {n}")));
            }
        }
    }
    installed();
    for (before, meanwhile) in [(0, 20), (1, 20), (3, 20), (20, 1), (20, 3)] {
        let panic = catch(|| {
            drop(Catches(before));
            let _catches = Catches(meanwhile);
            panic!("goes on");
        });
        let panic = panic.unwrap_err();
        assert_eq!((panic.message(), line(&panic)), ("goes on", Some(line!() - 3)));
    }
}

#[test]
fn a_panic_has_no_location_rather_than_that_of_another() {
    struct Catches(fn());
    impl Drop for Catches {
        fn drop(&mut self) {
            assert!(panic::catch_unwind(self.0).is_err());
        }
    }
    installed();
    // A text that was made for it tells it from all others; a literal is the same for all.
    let with_text: (fn(), u32) = (|| panic!("the {}", "same".to_owned()), line!());
    for (panics, expected) in [(with_text.0, Some(with_text.1)), (|| panic!("literal"), None)] {
        for (before, meanwhile) in [(true, false), (false, true), (true, true)] {
            let others = [before, meanwhile].map(|panics| -> fn() {
                match (panics, expected) {
                    (false, _) => || panic!("another"),
                    (true, Some(_)) => || panic!("the {}", "same".to_owned()),
                    (true, None) => || panic!("literal"),
                }
            });
            let panic = catch(|| {
                drop(Catches(others[0]));
                let _catches = Catches(others[1]);
                panics();
            });
            assert_eq!(line(&panic.unwrap_err()), expected, "{before} {meanwhile}");
        }
    }
    // Whichever it is, it is there.
    let literal = || panic!("literal");
    let panic = catch(|| {
        let _catches = Catches(literal);
        literal();
    });
    assert_eq!(line(&panic.unwrap_err()), Some(line!() - 5));
}

#[test]
fn nothing_is_kept_of_a_catcher_that_is_left() {
    installed();
    let thrown = catch(|| {
        assert!(catch(|| assert!(catch_unwind(|| panic!("boom")).is_err())).is_ok());
        catch(|| throw("boom")).unwrap_err()
    });
    assert_eq!(thrown.unwrap().location(), None);
}

#[test]
fn a_payload_whose_drop_panics_has_the_location_of_the_first() {
    struct Bomb;
    impl Drop for Bomb {
        fn drop(&mut self) {
            panic!("in the drop of the payload");
        }
    }
    installed();
    let panic = catch(|| panic_any(Bomb)).unwrap_err();
    assert_eq!(line(&panic), Some(line!() - 1));
    assert_eq!(catch(|| throw("thrown")).unwrap_err().location(), None);
}

#[test]
fn a_clone_and_the_name_of_a_task_keep_it() {
    installed();
    let panic = catch(|| panic!("x")).unwrap_err();
    let site = panic::Location::caller();
    let task = panic.clone().in_task("send_receipt", site);
    assert_eq!(line(&task), line(&panic));
    let at = panic.location().unwrap();
    assert_eq!(
        task.to_string(),
        format!("task send_receipt (spawned at {site}) panicked at {at}: x")
    );
}

// Each of these in a process of its own.

#[test]
fn without_a_hook_there_is_no_location() {
    if in_its_own_process("without_a_hook_there_is_no_location") {
        let panic = catch(|| panic!("x")).unwrap_err();
        assert_eq!((panic.message(), panic.location()), ("x", None));
        assert!(panic.backtrace().is_none());
        assert_eq!(panic.to_string(), "panicked: x");
    }
}

#[test]
fn a_later_hook_replaces_it_and_may_record() {
    static RECORDED: Mutex<Vec<bool>> = Mutex::new(Vec::new());
    if in_its_own_process("a_later_hook_replaces_it_and_may_record") {
        installed();
        panic::set_hook(Box::new(|_| ()));
        install_hook();
        let panic = catch(|| panic!("x")).unwrap_err();
        assert_eq!((panic.message(), panic.location()), ("x", None));

        panic::set_hook(Box::new(|info| {
            let recorded = record(info);
            RECORDED.lock().unwrap().push(recorded);
        }));
        let panic = catch(|| panic!("x")).unwrap_err();
        assert_eq!(line(&panic), Some(line!() - 1));
        assert!(catch_unwind(|| panic!("x")).is_err());
        assert_eq!(*RECORDED.lock().unwrap(), [true, false]);

        drop(panic::take_hook());
        assert_eq!(catch(|| panic!("x")).unwrap_err().location(), None);
    }
}

#[test]
fn it_is_not_installed_while_the_thread_panics() {
    struct Installs;
    impl Drop for Installs {
        fn drop(&mut self) {
            install_hook();
        }
    }
    if in_its_own_process("it_is_not_installed_while_the_thread_panics") {
        let panic = catch(|| {
            let _installs = Installs;
            panic!("x");
        });
        assert_eq!(panic.unwrap_err().location(), None);
        assert_eq!(catch(|| panic!("x")).unwrap_err().location(), None);
        // Nor is it too late.
        install_hook();
        assert!(catch(|| panic!("x")).unwrap_err().location().is_some());
    }
}

#[test]
fn a_backtrace_is_there_if_it_is_asked_for() {
    let name = "a_backtrace_is_there_if_it_is_asked_for";
    if env::var_os(INSIDE).is_none() {
        for (asked, backtrace) in [("0", "without"), ("1", "with")] {
            let output = run(name, &[("RUST_BACKTRACE", asked)]);
            let said = String::from_utf8_lossy(&output.stdout);
            assert!(output.status.success(), "{output:?}");
            assert!(said.contains(&format!("caught {backtrace} a backtrace")), "{said}");
        }
        return;
    }
    installed();
    let panic = catch(|| panic!("x")).unwrap_err();
    let with = if panic.backtrace().is_some() { "with" } else { "without" };
    assert!(panic.backtrace().is_none_or(|trace| trace.to_string().contains(name)));
    #[allow(clippy::print_stdout)]
    {
        println!("caught {with} a backtrace");
    }
}

#[test]
fn a_panic_while_unwinding_kills_the_process_with_the_hook_too() {
    struct Panics;
    impl Drop for Panics {
        fn drop(&mut self) {
            panic!("the second panic");
        }
    }
    if env::var_os(INSIDE).is_some() {
        installed();
        let _ = catch(AssertUnwindSafe(|| {
            let _panics = Panics;
            panic!("the first panic");
        }));
        return;
    }
    let output = run("a_panic_while_unwinding_kills_the_process_with_the_hook_too", &[]);
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(!output.status.success());
    assert!(errors.contains("panic in a destructor during cleanup"), "{errors}");
}

const INSIDE: &str = "TOWER_CATCH_UNWIND_TEST";

/// Runs the test of this name in a process of its own, where this is `true`.
fn in_its_own_process(test: &str) -> bool {
    if env::var_os(INSIDE).is_some() {
        return true;
    }
    let output = run(test, &[]);
    assert!(output.status.success(), "{output:?}");
    false
}

fn run(test: &str, env: &[(&str, &str)]) -> Output {
    let output = Command::new(env::current_exe().unwrap())
        .args(["--exact", test, "--nocapture"])
        .env(INSIDE, "1")
        .env_remove("RUST_BACKTRACE")
        .env_remove("RUST_LIB_BACKTRACE")
        .envs(env.iter().copied())
        .output()
        .unwrap();
    assert!(String::from_utf8_lossy(&output.stdout).contains("running 1 test"), "{output:?}");
    output
}
