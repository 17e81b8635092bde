//! The lines of the log, each said in one of three ways: here, on a thread of its own, or as the
//! last before the exit. For a subscriber is the code of others, and may block for ever if nobody
//! reads what it writes.

use std::{
    process,
    sync::{Condvar, Mutex, PoisonError},
    thread,
    time::Duration,
};

use tower_catch_unwind::catch;

use crate::Report;

/// So long a process that exits waits for its last line.
pub(crate) const LAST_LINE: Duration = Duration::from_secs(1);
/// The same if somebody is impatient.
pub(crate) const LAST_LINE_IN_A_HURRY: Duration = Duration::from_millis(50);

/// A line of the log.
pub(crate) enum Line {
    NoSignals,
    Begun { budget: Duration, requests: u32, tasks: u64 },
    CutShort,
    ThirdSignal(i32),
    NoShutdownLeft(i32),
    Report(Report),
    Stuck(Report),
    Failed(String),
}

impl Line {
    fn log(self) {
        match self {
            Self::NoSignals => {
                tracing::warn!(
                    "no signal begins the shutdown: enable the feature `signal`, or say \
                     `without_signals()`"
                );
            }
            Self::Begun { budget, requests, tasks } => {
                tracing::info!(?budget, requests, tasks, "shutting down");
            }
            Self::CutShort => tracing::warn!("the shutdown is cut short"),
            Self::ThirdSignal(signal) => {
                tracing::error!(signal, "third signal: the process exits, whatever goes on");
            }
            Self::NoShutdownLeft(signal) => {
                tracing::warn!(signal, "no shutdown is left: the process exits");
            }
            Self::Report(report) => {
                let forced = report.forced.len();
                if forced == 0 {
                    tracing::info!(forced, "{report}");
                } else {
                    tracing::error!(forced, "{report}");
                }
            }
            Self::Stuck(report) => {
                tracing::error!(
                    "the runtime is stuck: the shutdown is reported from another thread"
                );
                Self::Report(report).log();
            }
            Self::Failed(why) => tracing::error!("{why}"),
        }
    }

    pub(crate) fn say(self) {
        say(|| self.log());
    }

    /// Says it when all others are said, and ends the process with this code: so long after, if that is
    /// not done by then; unless there is no thread to be had for that.
    pub(crate) fn say_and_exit(self, within: Duration, code: i32) -> ! {
        let exit = move || {
            thread::sleep(within);
            process::exit(code);
        };
        if thread::Builder::new().name("shutdown-exit".to_owned()).spawn(exit).is_ok() {
            let saying = SAYING.lock().unwrap_or_else(PoisonError::into_inner);
            drop(SAID.wait_while(saying, |saying| *saying > 0));
        }
        self.say();
        process::exit(code)
    }
}

/// A line that is yet to be said. The last one waits for it.
pub(crate) struct Pending(Line);

impl Pending {
    pub(crate) fn new(line: Line) -> Self {
        count(|saying| saying + 1);
        Self(line)
    }

    /// Says it here.
    pub(crate) fn say(self) {
        let Self(line) = self;
        line.say();
        count(|saying| saying - 1);
    }

    /// Says it without waiting for that.
    pub(crate) fn say_detached(self) {
        // Without a thread it is not said.
        let thread = thread::Builder::new().name("shutdown-log".to_owned());
        if thread.spawn(|| self.say()).is_err() {
            count(|saying| saying - 1);
        }
    }
}

/// How many lines are yet to be said.
static SAYING: Mutex<usize> = Mutex::new(0);
static SAID: Condvar = Condvar::new();

fn count(change: impl FnOnce(usize) -> usize) {
    let mut saying = SAYING.lock().unwrap_or_else(PoisonError::into_inner);
    *saying = change(*saying);
    SAID.notify_all();
}

/// Logs something. A panic of the subscriber goes no further: the shutdown has to go on.
pub(crate) fn say(log: impl FnOnce()) {
    drop(catch(log));
}
