//! Models of the races for a limit's word and its line. Each asserts that every outcome of its race
//! was reached.

use std::{
    collections::BTreeSet,
    fmt::Debug,
    pin::pin,
    sync::{Arc, Mutex},
    task::{Context, Poll, Waker},
    time::Duration,
};

use loom::{future::block_on, thread};

use super::*;

/// Runs a model, and returns the outcomes that were reached.
fn outcomes<T: Ord + Debug + Send + 'static>(
    model: impl Fn() -> T + Sync + Send + 'static,
) -> Vec<T> {
    let seen = Arc::new(Mutex::new(BTreeSet::new()));
    let all = seen.clone();
    loom::model(move || {
        let outcome = model();
        all.lock().unwrap().insert(outcome);
    });
    let mut seen = seen.lock().unwrap();
    std::mem::take(&mut *seen).into_iter().collect()
}

/// For ever: loom has no clock, and reports who waits in vain.
fn acquire(limit: &SpawnLimit) -> Acquire {
    limit.acquire_within(Duration::MAX)
}

fn poll(acquire: std::pin::Pin<&mut Acquire>) -> Poll<Result<Permit, SpawnError>> {
    acquire.poll(&mut Context::from_waker(Waker::noop()))
}

#[test]
fn two_takers_of_one_permit_never_both_have_it() {
    let seen = outcomes(|| {
        let limit = SpawnLimit::new(1);
        let other = limit.clone();
        let taker = thread::spawn(move || other.try_take());
        let mine = limit.try_take();
        let theirs = taker.join().unwrap();
        assert!(mine != theirs);
        assert_eq!(limit.in_use(), 1);
        mine
    });
    assert_eq!(seen, [false, true]);
}

#[test]
fn a_permit_that_comes_back_can_be_taken() {
    let seen = outcomes(|| {
        let limit = SpawnLimit::new(1);
        assert!(limit.try_take());
        let other = limit.clone();
        let taker = thread::spawn(move || other.try_take());
        limit.release();
        let taken = taker.join().unwrap();
        assert_eq!(limit.in_use(), usize::from(taken));
        taken
    });
    assert_eq!(seen, [false, true]);
}

#[test]
fn who_comes_to_wait_while_a_permit_comes_back_has_it() {
    let seen = outcomes(|| {
        let limit = SpawnLimit::new(1);
        let permit = limit.try_acquire().unwrap();
        let other = limit.clone();
        let waiter = thread::spawn(move || {
            let mut acquire = pin!(acquire(&other));
            let had_to_wait = poll(acquire.as_mut()).map(|permit| permit.unwrap().forget());
            if had_to_wait.is_pending() {
                // A wake-up that was lost would be a hang, which loom reports.
                block_on(acquire).unwrap().forget();
            }
            had_to_wait.is_pending()
        });
        drop(permit);
        let had_to_wait = waiter.join().unwrap();
        assert_eq!((limit.in_use(), limit.waiting()), (1, 0));
        limit.release();
        assert!(limit.try_take(), "nobody is thought to wait");
        had_to_wait
    });
    assert_eq!(seen, [false, true]);
}

#[test]
fn a_permit_for_who_gives_up_is_not_lost() {
    let seen = outcomes(|| {
        let limit = SpawnLimit::new(1);
        let permit = limit.try_acquire().unwrap();
        let mut waiting = Box::pin(acquire(&limit));
        assert!(poll(waiting.as_mut()).is_pending());
        let other = thread::spawn(move || drop(waiting));
        drop(permit);
        let given_to_it = limit.in_use() == 1;
        other.join().unwrap();
        assert_eq!((limit.in_use(), limit.waiting()), (0, 0));
        assert!(limit.try_take());
        given_to_it
    });
    assert_eq!(seen, [false, true]);
}

#[test]
fn nobody_is_let_in_past_the_line() {
    let seen = outcomes(|| {
        let limit = SpawnLimit::new(1);
        let permit = limit.try_acquire().unwrap();
        let mut waiting = Box::pin(acquire(&limit));
        assert!(poll(waiting.as_mut()).is_pending());
        let other = limit.clone();
        let taker = thread::spawn(move || {
            let was_back = other.waiting() == 0;
            assert!(!other.try_take());
            was_back
        });
        drop(permit);
        let was_back = taker.join().unwrap();
        assert!(poll(waiting.as_mut()).is_ready());
        was_back
    });
    assert_eq!(seen, [false, true]);
}

#[test]
fn two_permits_that_come_back_at_once_go_to_two_who_wait() {
    let seen = outcomes(|| {
        let limit = SpawnLimit::new(2);
        let (first, second) = (limit.try_acquire().unwrap(), limit.try_acquire().unwrap());
        let mut one = Box::pin(acquire(&limit));
        assert!(poll(one.as_mut()).is_pending());
        let other = thread::spawn(move || drop(first));
        let mut two = Box::pin(acquire(&limit));
        let had_to_wait = poll(two.as_mut()).is_pending();
        assert!(had_to_wait, "one of the two is taken, and before it is somebody");
        drop(second);
        let before = limit.waiting();
        other.join().unwrap();
        let (one, two) = (poll(one.as_mut()), poll(two.as_mut()));
        assert!(one.is_ready() && two.is_ready());
        assert_eq!((limit.in_use(), limit.waiting()), (2, 0));
        before
    });
    assert_eq!(seen, [0, 1]);
}

#[test]
fn a_limit_that_was_lowered_lets_nobody_in() {
    let seen = outcomes(|| {
        let limit = SpawnLimit::new(2);
        assert!(limit.try_take());
        let other = limit.clone();
        let taker = thread::spawn(move || other.try_take());
        limit.set_limit(1);
        let then = limit.in_use();
        let taken = taker.join().unwrap();
        assert_eq!(limit.in_use(), then);
        assert_eq!(limit.in_use(), 1 + usize::from(taken));
        taken
    });
    assert_eq!(seen, [false, true]);
}

#[test]
fn who_comes_to_wait_while_the_limit_is_raised_is_let_in() {
    let seen = outcomes(|| {
        let limit = SpawnLimit::new(0);
        let other = limit.clone();
        let waiter = thread::spawn(move || {
            let mut acquire = pin!(acquire(&other));
            let had_to_wait = poll(acquire.as_mut()).map(|permit| permit.unwrap().forget());
            if had_to_wait.is_pending() {
                block_on(acquire).unwrap().forget();
            }
            had_to_wait.is_pending()
        });
        limit.set_limit(1);
        let had_to_wait = waiter.join().unwrap();
        assert_eq!((limit.limit(), limit.in_use()), (1, 1));
        had_to_wait
    });
    assert_eq!(seen, [false, true]);
}

#[test]
fn a_permit_comes_back_while_the_limit_is_lowered_and_raised() {
    let seen = outcomes(|| {
        let limit = SpawnLimit::new(1);
        let permit = limit.try_acquire().unwrap();
        let mut waiting = Box::pin(acquire(&limit));
        assert!(poll(waiting.as_mut()).is_pending());
        let other = thread::spawn(move || drop(permit));
        limit.set_limit(0);
        let was_let_in = limit.waiting() == 0;
        limit.set_limit(1);
        other.join().unwrap();
        assert!(poll(waiting.as_mut()).is_ready());
        assert_eq!(limit.waiting(), 0);
        was_let_in
    });
    assert_eq!(seen, [false, true]);
}
