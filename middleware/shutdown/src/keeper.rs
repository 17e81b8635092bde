//! A thread of the shutdown's own.
//!
//! A task that never yields may take the runtime's driver with it: nobody is told of a signal or
//! of the time any more, though other threads have nothing to do. This one has a driver of its own.

use std::{
    future::poll_fn,
    io,
    pin::pin,
    sync::{
        Arc, Weak,
        atomic::{AtomicBool, AtomicUsize, Ordering::SeqCst},
        mpsc,
    },
    task::Poll,
    thread,
    time::{Duration, Instant},
};

use tokio::{runtime, sync::Notify};
use tower_catch_unwind::catch;

use crate::{
    log::{LAST_LINE, LAST_LINE_IN_A_HURRY, Line, Pending},
    signals::Signals,
    state::State,
};

/// How often it makes the shutdown look at the clock, once that has begun.
const TICK: Duration = Duration::from_millis(50);
/// So long after its end, a shutdown that does not even look is taken for stuck.
const PATIENCE: Duration = Duration::from_secs(1);

/// How many listen to signals for a shutdown that there is: of the whole process, as signals are.
static LISTENING: AtomicUsize = AtomicUsize::new(0);
/// One listens that has outlived its shutdown, for all that will.
static OUTLIVED: AtomicBool = AtomicBool::new(false);

/// Starts it, and returns when signals are listened to. It is gone when the state is, unless it
/// listens: nobody else would hear a signal any more.
pub(crate) fn start(state: &Arc<State>, with_signals: bool) -> io::Result<()> {
    let keeper = Keeper { state: Arc::downgrade(state), woken: state.woken.clone() };
    let (tell, told) = mpsc::sync_channel(1);
    thread::Builder::new().name("shutdown".to_owned()).spawn(move || {
        let runtime = match runtime::Builder::new_current_thread().enable_all().build() {
            Ok(runtime) => runtime,
            Err(error) => return drop(tell.send(Err(error))),
        };
        let entered = runtime.enter();
        let signals = if with_signals { Signals::listen() } else { Ok(None) };
        drop(entered);
        match signals {
            Ok(signals) => {
                LISTENING.fetch_add(signals.is_some().into(), SeqCst);
                drop(tell.send(Ok(())));
                if with_signals && signals.is_none() {
                    Line::NoSignals.say();
                }
                runtime.block_on(keeper.run(signals));
            }
            Err(error) => drop(tell.send(Err(error))),
        }
    })?;
    told.recv().unwrap_or_else(|_| Err(io::Error::other("the shutdown's thread has ended")))
}

struct Keeper {
    state: Weak<State>,
    woken: Arc<Notify>,
}

impl Keeper {
    async fn run(self, mut signals: Option<Signals>) {
        let mut pace = Pace::default();
        let mut unheard = None;
        while let Some(state) = self.state.upgrade() {
            let ticks = state.is_driven();
            if ticks {
                state.tell();
            }
            if state.is_run() {
                pace.look(&state);
            } else {
                pace = Pace::default();
            }
            // Only a handle may keep it alive while this waits.
            let_go(state);
            let mut woken = pin!(self.woken.notified());
            let mut tick = pin!(tokio::time::sleep(TICK));
            let signal = poll_fn(|cx| {
                if let Some(Poll::Ready(number)) = signals.as_mut().map(|it| it.poll_next(cx)) {
                    return Poll::Ready(Some(number));
                }
                if woken.as_mut().poll(cx).is_ready() || ticks && tick.as_mut().poll(cx).is_ready()
                {
                    return Poll::Ready(None);
                }
                Poll::Pending
            })
            .await;
            match self.state.upgrade() {
                Some(state) => {
                    if let Some(number) = signal {
                        obey(&state, number);
                    }
                    // If this is the last who has it, and nobody drove it, then nobody sees what the
                    // signal has begun. Else it may be over for that signal.
                    let was_driven = state.was_driven();
                    if let_go(state) && !was_driven {
                        unheard = signal;
                    }
                }
                None => unheard = signal,
            }
        }
        if let Some(signals) = signals {
            LISTENING.fetch_sub(1, SeqCst);
            outlive(signals, unheard, !OUTLIVED.swap(true, SeqCst)).await;
        }
    }
}

/// Whether this was the last who had it. What goes with it is the code of others, and may panic.
fn let_go(state: Arc<State>) -> bool {
    let last = Arc::into_inner(state);
    let is_last = last.is_some();
    drop(catch(|| drop(last)));
    is_last
}

/// The shutdown is gone, and the process goes on. What listened to a signal once keeps it from
/// ending the process for ever, so that is done here: by the `first` that comes to this. The others
/// do it for what has come until now, which that may have left to them.
async fn outlive(mut signals: Signals, mut unheard: Option<i32>, first: bool) {
    loop {
        let next = poll_fn(|cx| match signals.poll_next(cx) {
            Poll::Ready(number) => Poll::Ready(Some(number)),
            Poll::Pending if first => Poll::Pending,
            Poll::Pending => Poll::Ready(None),
        });
        let number = match unheard.take() {
            None => next.await,
            unheard => unheard,
        };
        let Some(number) = number else { return };
        // Else it is for another shutdown.
        if LISTENING.load(SeqCst) == 0 {
            Line::NoShutdownLeft(number).say_and_exit(LAST_LINE_IN_A_HURRY, 128 + number);
        }
    }
}

fn obey(state: &State, signal: i32) {
    let line = match state.count_signal() {
        1 => state.begin_silently().1,
        2 => state.hurry(),
        _ => Line::ThirdSignal(signal).say_and_exit(LAST_LINE_IN_A_HURRY, 128 + signal),
    };
    // Not here: this goes on to listen.
    line.into_iter().for_each(Pending::say_detached);
}

/// Whether a shutdown that is run goes on.
#[derive(Default)]
struct Pace {
    beats: usize,
    since: Option<Instant>,
}

impl Pace {
    fn look(&mut self, state: &State) {
        let stands_still = self.stands_still(state.beats(), Instant::now());
        if stands_still && state.is_overdue_by(PATIENCE) {
            let report = state.report(false);
            let code = report.exit_code();
            Line::Stuck(report).say_and_exit(LAST_LINE, code);
        }
    }

    fn stands_still(&mut self, beats: usize, now: Instant) -> bool {
        if self.beats != beats || self.since.is_none() {
            self.beats = beats;
            self.since = Some(now);
        }
        self.since.is_some_and(|since| now.saturating_duration_since(since) > PATIENCE)
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    #[test]
    fn a_run_that_comes_after_another_has_its_time_from_its_own_beginning_on() {
        let state = State::new(Duration::ZERO);
        state.begin();
        let (mut pace, mut now) = (Pace::default(), Instant::now());
        let given_up = state.driver(true);
        assert!(!pace.stands_still(state.beats(), now));
        now += 2 * PATIENCE;
        assert!(pace.stands_still(state.beats(), now), "it is not polled");
        drop(given_up);
        assert!(!state.is_run());
        // Not polled yet, and the keeper has not looked in between.
        let _again = state.driver(true);
        assert!(!pace.stands_still(state.beats(), now));
    }

    #[test]
    fn only_one_that_runs_is_asked_for_its_beat() {
        let state = State::new(Duration::ZERO);
        state.begin();
        let finishes = state.driver(false);
        assert!(state.is_driven() && !state.is_run());
        let runs = state.driver(true);
        assert!(state.is_run());
        let beats = state.beats();
        finishes.beat();
        assert_eq!(state.beats(), beats, "it does not speak for the other");
        runs.beat();
        assert_eq!(state.beats(), beats + 1);
    }
}
