//! Models of the races on the word of the requests in flight: every order of what the threads do,
//! up to loom's bound of preemptions.

use std::{
    collections::BTreeSet,
    sync::{Arc, Mutex},
};

use loom::{future::block_on, thread};

use crate::in_flight::InFlight;

/// Runs a model, and asserts that it ends in each of these ways and in no other.
fn reaches<T>(expected: &[T], model: impl Fn() -> T + Send + Sync + 'static)
where
    T: Clone + std::fmt::Debug + Ord + Send + 'static,
{
    let reached = Arc::new(Mutex::new(BTreeSet::new()));
    let reach = reached.clone();
    loom::model(move || {
        let outcome = model();
        reach.lock().unwrap().insert(outcome);
    });
    assert_eq!(*reached.lock().unwrap(), expected.iter().cloned().collect());
}

#[test]
fn a_request_that_races_the_closing_is_refused_or_waited_for() {
    reaches(&[false, true], || {
        let requests = Arc::new(InFlight::default());
        let served = Arc::new(loom::cell::Cell::new(0));
        let request = thread::spawn({
            let (requests, served) = (requests.clone(), served.clone());
            move || {
                let admitted = requests.enter();
                if admitted {
                    // Loom reports a race if the drain does not wait for this.
                    served.set(1);
                    requests.leave();
                }
                admitted
            }
        });
        requests.close();
        block_on(requests.idle());
        // Not `join` before: what counts is seen through the word alone.
        let seen = served.get();
        let admitted = request.join().unwrap();
        assert_eq!(seen, i32::from(admitted));
        let reading = requests.read();
        assert_eq!(reading.in_flight, 0);
        assert_eq!(reading.entered_since(Default::default()), u32::from(admitted));
        admitted
    });
}

#[test]
fn two_requests_race_to_be_the_last_and_the_drain_is_told() {
    reaches(&[[false, false], [false, true], [true, false], [true, true]], || {
        let requests = Arc::new(InFlight::default());
        let request = || {
            let requests = requests.clone();
            thread::spawn(move || {
                let admitted = requests.enter();
                if admitted {
                    requests.leave();
                }
                admitted
            })
        };
        let (one, other) = (request(), request());
        requests.close();
        block_on(requests.idle());
        [one.join().unwrap(), other.join().unwrap()]
    });
}

#[test]
fn a_drain_that_listens_before_the_closing_is_told_too() {
    reaches(&[false, true], || {
        let requests = Arc::new(InFlight::default());
        let drain = thread::spawn({
            let requests = requests.clone();
            move || block_on(requests.idle())
        });
        let request = thread::spawn({
            let requests = requests.clone();
            move || {
                let admitted = requests.enter();
                if admitted {
                    requests.leave();
                }
                admitted
            }
        });
        requests.close();
        requests.close();
        drain.join().unwrap();
        request.join().unwrap()
    });
}

/// That the models find what they are for: a request that takes its entry back silently.
#[test]
#[should_panic(expected = "deadlock")]
fn a_leave_that_tells_nobody_is_found() {
    loom::model(|| {
        let requests = Arc::new(InFlight::default());
        let request = thread::spawn({
            let requests = requests.clone();
            move || {
                if requests.enter() {
                    let _ = requests.leave_silently();
                }
            }
        });
        requests.close();
        block_on(requests.idle());
        request.join().unwrap();
    });
}
