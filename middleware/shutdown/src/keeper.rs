//! A thread of the shutdown's own.
//!
//! A task that never yields may take the runtime's driver with it: nobody is told of a signal or
//! of the time any more, though other threads have nothing to do. This one has a driver of its own.

use std::{
    future::poll_fn,
    io,
    pin::pin,
    process,
    sync::{Arc, Weak, mpsc},
    task::Poll,
    thread,
    time::{Duration, Instant},
};

use tokio::{runtime, sync::Notify};

use crate::{signals::Signals, state::State};

/// How often it makes the shutdown look at the clock, once that has begun.
const TICK: Duration = Duration::from_millis(50);
/// So long after its end, a shutdown that does not even look is taken for stuck.
const PATIENCE: Duration = Duration::from_secs(1);

/// Starts it, and returns when signals are listened to. It is gone when the state is.
pub(crate) fn start(state: &Arc<State>, with_signals: bool) -> io::Result<()> {
    let keeper = Keeper { state: Arc::downgrade(state), woken: state.woken.clone() };
    let (tell, told) = mpsc::sync_channel(1);
    thread::Builder::new().name("shutdown".to_owned()).spawn(move || {
        let runtime = match runtime::Builder::new_current_thread().enable_all().build() {
            Ok(runtime) => runtime,
            Err(error) => return drop(tell.send(Err(error))),
        };
        let entered = runtime.enter();
        let signals = with_signals.then(Signals::listen).transpose();
        drop(entered);
        match signals {
            Ok(signals) => {
                drop(tell.send(Ok(())));
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
        while let Some(state) = self.state.upgrade() {
            let ticks = state.is_driven();
            if ticks {
                state.tell();
                pace.look(&state);
            }
            // Only a handle may keep it alive while this waits.
            drop(state);
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
            if let (Some(number), Some(state)) = (signal, self.state.upgrade()) {
                obey(&state, number);
            }
        }
    }
}

fn obey(state: &State, signal: i32) {
    match state.count_signal() {
        1 => {
            state.begin();
        }
        2 => state.hurry(),
        _ => {
            tracing::error!(signal, "third signal: the process exits, whatever goes on");
            process::exit(128 + signal);
        }
    }
}

/// Whether the shutdown goes on.
#[derive(Default)]
struct Pace {
    beats: usize,
    since: Option<Instant>,
}

impl Pace {
    fn look(&mut self, state: &State) {
        let beats = state.beats();
        if self.beats != beats || self.since.is_none() {
            self.beats = beats;
            self.since = Some(Instant::now());
        }
        let is_stuck = self.since.is_some_and(|since| since.elapsed() > PATIENCE);
        if is_stuck && state.is_overdue_by(PATIENCE) {
            tracing::error!("the runtime is stuck: the shutdown is reported from another thread");
            state.report(false).exit();
        }
    }
}
