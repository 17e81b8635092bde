#![allow(missing_docs, clippy::unwrap_used)] // Tests.

use std::{
    error::Error,
    future::{Ready, ready},
    panic::{AssertUnwindSafe, catch_unwind},
    thread,
};

use allocation_counter::measure;
use tower_spawn_limit::{Permit, Refused, SpawnError, SpawnLimit};

#[test]
fn a_limit_of_nothing_refuses_everything() {
    let limit = SpawnLimit::new(0);
    assert_eq!(limit.try_acquire().unwrap_err(), SpawnError::Full);
    assert_eq!(limit.in_use(), 0);
    limit.release();
    assert_eq!(limit.try_acquire().unwrap_err(), SpawnError::Full);
}

#[test]
fn a_full_limit_refuses_until_a_permit_comes_back() {
    let limit = SpawnLimit::new(2);
    let first = limit.try_acquire().unwrap();
    let second = limit.try_acquire().unwrap();
    assert_eq!(limit.try_acquire().unwrap_err(), SpawnError::Full);
    assert_eq!(limit.in_use(), 2, "a refusal takes nothing");
    drop(first);
    assert_eq!(limit.in_use(), 1);
    let third = limit.try_acquire().unwrap();
    assert_eq!(limit.try_acquire().unwrap_err(), SpawnError::Full);
    drop((second, third));
    assert_eq!(limit.in_use(), 0);
}

#[test]
fn a_limit_above_the_largest_is_the_largest() {
    for (asked, limit) in [
        (SpawnLimit::MAX - 1, SpawnLimit::MAX - 1),
        (SpawnLimit::MAX, SpawnLimit::MAX),
        (SpawnLimit::MAX + 1, SpawnLimit::MAX),
        (u32::MAX as usize, SpawnLimit::MAX),
        (u32::MAX as usize + 1, SpawnLimit::MAX),
        (usize::MAX, SpawnLimit::MAX),
    ] {
        assert_eq!(SpawnLimit::new(asked).limit(), limit);
        let changed = SpawnLimit::new(0);
        changed.set_limit(asked);
        assert_eq!(changed.limit(), limit);
        let permits: Vec<_> = (0..1000).map(|_| changed.try_acquire().unwrap()).collect();
        assert_eq!((changed.in_use(), changed.limit()), (1000, limit));
        drop(permits);
        assert_eq!(changed.in_use(), 0);
    }
    let bounds = SpawnLimit::new(usize::MAX).per_request(usize::MAX).queue(usize::MAX);
    assert_eq!(bounds.limit_per_request(), usize::MAX);
}

#[test]
fn requests_are_not_limited_unless_it_is_said() {
    assert_eq!(SpawnLimit::new(3).limit_per_request(), usize::MAX);
    assert_eq!(SpawnLimit::new(3).per_request(0).limit_per_request(), 0);
}

#[test]
fn clones_share_the_count_and_not_the_limit_per_request() {
    let limit = SpawnLimit::new(1);
    let clone = limit.clone().per_request(7);
    assert_eq!(clone.limit_per_request(), 7);
    assert_eq!(limit.limit_per_request(), usize::MAX);

    let permit = clone.try_acquire().unwrap();
    assert_eq!(limit.in_use(), 1);
    assert_eq!(limit.try_acquire().unwrap_err(), SpawnError::Full);
    drop(permit);
    assert!(limit.try_acquire().is_ok());
}

#[test]
fn limits_that_are_no_clones_share_nothing() {
    let one = SpawnLimit::new(1);
    let other = SpawnLimit::new(1);
    let _permit = one.try_acquire().unwrap();
    assert!(other.try_acquire().is_ok());
}

#[test]
fn a_forgotten_permit_stays_taken_until_it_is_released() {
    let limit = SpawnLimit::new(1);
    limit.try_acquire().unwrap().forget();
    assert_eq!(limit.in_use(), 1);
    assert_eq!(limit.try_acquire().unwrap_err(), SpawnError::Full);
    limit.clone().release();
    assert_eq!(limit.in_use(), 0);
    assert!(limit.try_acquire().is_ok());
}

#[test]
fn a_release_too_many_never_makes_the_count_negative() {
    let limit = SpawnLimit::new(1);
    limit.release();
    limit.release();
    assert_eq!(limit.in_use(), 0);
    // And nothing was saved up by it.
    let permit = limit.try_acquire().unwrap();
    assert_eq!(limit.try_acquire().unwrap_err(), SpawnError::Full);
    limit.release();
    drop(permit);
    assert_eq!(limit.in_use(), 0);
}

#[test]
fn a_permit_comes_back_when_its_holder_panics() {
    let limit = SpawnLimit::new(1);
    let panicked = catch_unwind(AssertUnwindSafe(|| {
        let _permit = limit.try_acquire().unwrap();
        panic!("with a permit");
    }));
    assert!(panicked.is_err());
    assert_eq!(limit.in_use(), 0);
}

#[test]
fn a_permit_may_come_back_on_another_thread() {
    let limit = SpawnLimit::new(1);
    let permit = limit.try_acquire().unwrap();
    thread::scope(|scope| {
        scope.spawn(move || drop(permit));
    });
    assert_eq!(limit.in_use(), 0);
}

#[test]
fn threads_that_take_and_give_back_leave_nothing_taken() {
    let limit = SpawnLimit::new(3);
    let most = thread::scope(|scope| {
        let threads: Vec<_> = (0..8)
            .map(|turn| {
                let limit = limit.clone();
                scope.spawn(move || {
                    let mut most = 0;
                    for _ in 0..1000 {
                        let taken = limit.try_acquire();
                        most = most.max(limit.in_use());
                        match taken {
                            Ok(permit) if turn % 2 == 0 => {
                                permit.forget();
                                limit.release();
                            }
                            taken => drop(taken),
                        }
                    }
                    most
                })
            })
            .collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).max()
    });
    assert!((1..=3).contains(&most.unwrap()), "{most:?}");
    assert_eq!(limit.in_use(), 0);
}

#[test]
fn neither_a_permit_nor_a_refusal_costs_an_allocation() {
    let limit = SpawnLimit::new(1);
    let taken = measure(|| limit.try_acquire().unwrap().forget());
    assert_eq!(taken.count_total, 0);
    let refused = measure(|| {
        let reason = limit.try_acquire().unwrap_err();
        let refused = Refused { reason, future: Work(ready(7)) };
        assert_eq!(SpawnError::from(refused), SpawnError::Full);
    });
    assert_eq!(refused.count_total, 0);
    assert_eq!(measure(|| limit.release()).count_total, 0);
    assert_eq!(measure(|| drop(limit.clone())).count_total, 0);
}

#[test]
fn the_limit_tells_its_figures() {
    let limit = SpawnLimit::new(5).per_request(2);
    let permit = limit.try_acquire().unwrap();
    assert_eq!(
        format!("{limit:?}"),
        "SpawnLimit { limit: 5, in_use: 1, waiting: 0, refused: 0, per_request: 2, queue: \
         18446744073709551615 }"
    );
    assert_eq!(format!("{permit:?}"), "Permit { .. }");
    limit.set_limit(1);
    assert!(limit.try_acquire().is_err());
    assert_eq!((limit.refused(), limit.clone().refused()), (1, 1));
}

#[test]
fn limits_and_permits_go_from_thread_to_thread() {
    fn sent<T: Send + Sync>() {}
    sent::<SpawnLimit>();
    sent::<Permit>();
    sent::<SpawnError>();
}

/// No `Debug`, as most futures.
struct Work(Ready<u32>);

fn refused(reason: SpawnError) -> Result<(), Refused<Work>> {
    Err(Refused { reason, future: Work(ready(7)) })
}

#[test]
fn a_refusal_hands_the_future_back_to_run_it_in_place() {
    let Refused { reason, future } = refused(SpawnError::Full).unwrap_err();
    assert_eq!(reason, SpawnError::Full);
    assert_eq!(future.0.into_inner(), 7);
}

#[test]
fn a_refusal_is_an_error_whatever_the_future_is() {
    let refused = refused(SpawnError::Closed).unwrap_err();
    assert_eq!(format!("{refused:?}"), "Refused { reason: Closed, .. }");
    assert_eq!(refused.to_string(), SpawnError::Closed.to_string());
    let boxed: Box<dyn Error + Send + Sync> = Box::new(refused);
    assert!(boxed.downcast_ref::<Refused<Work>>().is_some());
}

#[test]
fn a_question_mark_turns_a_refusal_into_its_reason() {
    fn handler() -> Result<(), SpawnError> {
        refused(SpawnError::NoRuntime)?;
        Ok(())
    }
    assert_eq!(handler(), Err(SpawnError::NoRuntime));
}

#[test]
fn each_reason_has_a_text_of_its_own() {
    let texts = [SpawnError::Full, SpawnError::Closed, SpawnError::NoRuntime].map(|reason| {
        let error: &dyn Error = &reason;
        error.to_string()
    });
    assert!(texts[0].contains("limit"));
    assert!(texts[1].contains("ending"));
    assert!(texts[2].contains("runtime"));
}

#[cfg(feature = "axum")]
mod axum {
    use axum_core::response::{IntoResponse, Response};
    use http::{StatusCode, header};
    use http_body_util::BodyExt;
    use serde_json::Value;

    use super::*;

    async fn parts(response: Response) -> (StatusCode, Option<String>, Option<String>, Value) {
        let status = response.status();
        let header = |name| {
            let mut values = response.headers().get_all(&name).iter();
            let value = values.next().map(|value| value.to_str().unwrap().to_owned());
            assert!(values.next().is_none(), "{name} is there twice");
            value
        };
        let content_type = header(header::CONTENT_TYPE);
        let retry_after = header(header::RETRY_AFTER);
        let body = response.into_body().collect().await.unwrap().to_bytes();
        let problem = serde_json::from_slice(&body).unwrap();
        (status, content_type, retry_after, problem)
    }

    #[tokio::test]
    async fn each_reason_is_a_problem_that_says_whether_to_retry() {
        for (reason, expected, retry) in [
            (SpawnError::Full, StatusCode::SERVICE_UNAVAILABLE, true),
            (SpawnError::Closed, StatusCode::SERVICE_UNAVAILABLE, true),
            (SpawnError::NoRuntime, StatusCode::INTERNAL_SERVER_ERROR, false),
        ] {
            let (status, content_type, retry_after, problem) = parts(reason.into_response()).await;
            assert_eq!(status, expected, "{reason:?}");
            assert_eq!(content_type.as_deref(), Some("application/problem+json"));
            // RFC 9110, section 10.2.3: seconds, a decimal number.
            let seconds = retry_after.map(|seconds| seconds.parse::<u32>().unwrap());
            assert_eq!(seconds.is_some(), retry, "{reason:?}");
            assert_ne!(seconds, Some(0));
            // RFC 9457, section 3.1; with `about:blank` the title is the status's phrase.
            assert_eq!(problem["type"], "about:blank");
            assert_eq!(problem["title"], expected.canonical_reason().unwrap());
            assert_eq!(problem["status"], expected.as_u16());
            assert_eq!(problem["detail"], reason.to_string());
            assert_eq!(problem.as_object().unwrap().len(), 4);
        }
    }

    #[tokio::test]
    async fn a_refusal_is_the_response_that_its_reason_is() {
        let refusal = refused(SpawnError::Full).unwrap_err().into_response();
        let reason = SpawnError::Full.into_response();
        assert_eq!(parts(refusal).await, parts(reason).await);
    }
}
