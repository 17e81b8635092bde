use std::{
    pin::{Pin, pin},
    sync::{Arc, OnceLock},
    task::{Context, Poll},
    time::Duration,
};

use http::Request;
use tokio::{
    runtime::{Handle, Id},
    task::coop::unconstrained,
    time::{Instant, Sleep, sleep_until},
};
use tower_catch_unwind::catch;
use tower_request_context::Dialect;
use tower_response_end::End;

use crate::set::Set;

/// How long a response may take, as chosen on a layer.
#[derive(Clone, Debug)]
pub(crate) struct Limit {
    time: Duration,
    /// The runtime that was seen to have no time driver.
    timeless: Arc<OnceLock<Id>>,
}

impl Limit {
    pub(crate) fn new(time: Duration) -> Self {
        Self { time, timeless: Arc::default() }
    }

    /// The deadline of a response to a request that has just come.
    pub(crate) fn deadline(&self) -> Option<Deadline> {
        self.within(None)
    }

    /// The same, if the client speaks gRPC and may have said how long it will wait.
    #[inline(never)]
    pub(crate) fn of<B>(&self, request: &Request<B>, dialect: Dialect) -> Option<Deadline> {
        let client = dialect.is_grpc().then(|| request.headers().get("grpc-timeout")).flatten();
        self.within(client.and_then(|value| parse(value.as_bytes())))
    }

    fn within(&self, client: Option<Duration>) -> Option<Deadline> {
        let time = client.map_or(self.time, |client| client.min(self.time));
        // What is too long to count is for ever.
        let at = Instant::now().checked_add(time)?;
        let timeless = self.timeless.clone();
        Some(Deadline { at, around: None, told: None, timer: Timer::Unset, timeless })
    }
}

/// When a response has to be over.
#[derive(Debug)]
pub(crate) struct Deadline {
    at: Instant,
    /// That of the response around, while this one's code runs.
    around: Option<Instant>,
    /// The set that knows of it.
    told: Option<Arc<Set>>,
    timer: Timer,
    timeless: Arc<OnceLock<Id>>,
}

#[derive(Debug)]
enum Timer {
    /// Made at the first await: a response that is ready at once needs none.
    Unset,
    Set(Pin<Box<Sleep>>),
    /// There is no time driver, or its runtime was shut down.
    Never,
}

impl Deadline {
    /// What counts inside: the earlier of this one and that around.
    pub(crate) fn enter(&mut self, around: Option<Instant>) -> Instant {
        self.around = around;
        around.map_or(self.at, |around| around.min(self.at))
    }

    /// What counts outside again.
    pub(crate) const fn leave(&mut self) -> Option<Instant> {
        self.around.take()
    }

    /// Tells the set, if it has been made and was not told.
    pub(crate) fn tell(&mut self, made: impl FnOnce() -> Option<Arc<Set>>) {
        if self.told.is_none() {
            self.told = made();
            if let Some(set) = &self.told {
                set.limit_time(self.at);
            }
        }
    }

    /// The response is over, and the set is that of one around it: what counts for that is what
    /// counted before.
    pub(crate) fn end(&self, end: End) {
        match &self.told {
            Some(set) if end == End::TimedOut => set.end(end),
            Some(set) => set.lift_limit(self.at),
            None => {}
        }
    }

    /// Whether it is over for a response that has come to an await, though the timer may not have
    /// been seen; or for one that has not, but whose set has ended for it.
    pub(crate) fn is_over(&self) -> bool {
        let has_awaited = matches!(self.timer, Timer::Set(_));
        // A look at the clock is dear, and a response that has neither awaited nor a set needs none.
        if !has_awaited && self.told.is_none() || Instant::now() < self.at {
            return false;
        }
        has_awaited || self.told.as_ref().is_some_and(|set| set.ended() == Some(End::TimedOut))
    }

    pub(crate) fn poll(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        if let Timer::Unset = self.timer {
            self.timer = self.set();
        }
        match &mut self.timer {
            Timer::Set(sleep) => {
                // What comes before it in this poll may have used up tokio's budget for the task,
                // each time: then a timer says nothing.
                let poll = catch(|| pin!(unconstrained(sleep.as_mut())).poll(cx));
                // That of a runtime that was shut down panics.
                poll.unwrap_or_else(|_| {
                    self.timer = Timer::Never;
                    Poll::Pending
                })
            }
            Timer::Unset | Timer::Never => Poll::Pending,
        }
    }

    fn set(&self) -> Timer {
        let Ok(runtime) = Handle::try_current() else { return Timer::Never };
        if self.timeless.get() == Some(&runtime.id()) {
            return Timer::Never;
        }
        // A runtime without a time driver panics here, and there is no way to ask it.
        match catch(|| sleep_until(self.at)) {
            Ok(sleep) => Timer::Set(Box::pin(sleep)),
            Err(_) => {
                if self.timeless.set(runtime.id()).is_ok() {
                    tracing::warn!(
                        "the runtime has no time driver (`enable_time`): request deadlines do \
                         nothing"
                    );
                }
                Timer::Never
            }
        }
    }
}

/// gRPC over HTTP/2, "Requests": `Timeout` is at most 8 digits and a unit. `None`: it is not.
fn parse(value: &[u8]) -> Option<Duration> {
    let (unit, digits) = value.split_last()?;
    if digits.is_empty() || digits.len() > 8 {
        return None;
    }
    let mut count = 0;
    for digit in digits {
        count = 10 * count + u64::from(digit.checked_sub(b'0').filter(|digit| *digit < 10)?);
    }
    Some(match unit {
        b'H' => Duration::from_secs(3_600 * count),
        b'M' => Duration::from_secs(60 * count),
        b'S' => Duration::from_secs(count),
        b'm' => Duration::from_millis(count),
        b'u' => Duration::from_micros(count),
        b'n' => Duration::from_nanos(count),
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_grpc_timeout_is_up_to_eight_digits_and_a_unit() {
        for (text, time) in [
            ("1H", Duration::from_secs(3_600)),
            ("2M", Duration::from_secs(120)),
            ("3S", Duration::from_secs(3)),
            ("4m", Duration::from_millis(4)),
            ("5u", Duration::from_micros(5)),
            ("6n", Duration::from_nanos(6)),
            ("0n", Duration::ZERO),
            ("00000001S", Duration::from_secs(1)),
            ("99999999H", Duration::from_secs(99_999_999 * 3_600)),
        ] {
            assert_eq!(parse(text.as_bytes()), Some(time), "{text}");
        }
    }

    #[test]
    fn anything_else_is_no_grpc_timeout() {
        for text in [
            "",
            "S",
            "1",
            "1s",
            "1h",
            "123456789S",
            "-1S",
            "+1S",
            "1.5S",
            " 1S",
            "1S ",
            "1 S",
            "١S",
        ] {
            assert_eq!(parse(text.as_bytes()), None, "{text}");
        }
    }

    proptest::proptest! {
        #[test]
        fn whatever_comes_is_read_as_the_specification_says(text in "[0-9]{0,10}[HMSmunx]?") {
            let by_the_book = (2..=9).contains(&text.len())
                && text[..text.len() - 1].bytes().all(|byte| byte.is_ascii_digit())
                && text.ends_with(['H', 'M', 'S', 'm', 'u', 'n']);
            proptest::prop_assert_eq!(parse(text.as_bytes()).is_some(), by_the_book);
        }

        #[test]
        fn no_bytes_make_it_panic(bytes: Vec<u8>) {
            let _ = parse(&bytes);
        }
    }
}
