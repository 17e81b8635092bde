use std::{
    error::Error,
    fmt,
    future::{self, poll_fn},
    io, iter,
    pin::{Pin, pin},
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use tokio::time::{Instant, Sleep, sleep_until};
use tower_catch_unwind::catch;
use tower_task_set::TaskRegistry;
use tracing::field;

use crate::{
    PlanError, Report, ShutdownLayer, ShutdownWatch,
    log::{LAST_LINE, Line, say},
    plan::{Course, Phase},
    state::{Driver, Left, Serving, State},
};

/// How often a shutdown that waits says so.
const PROGRESS: Duration = Duration::from_secs(1);

/// The shutdown of a server: one budget, from the first signal to the report.
///
/// A clone is the same shutdown, and what is chosen on it is chosen for all. Dropping it changes
/// nothing: without [`run`](Self::run), [`finish`](Self::finish) or
/// [`signalled`](Self::signalled) it does nothing at all.
///
/// See the [crate's example](crate#example).
#[derive(Clone)]
pub struct Shutdown(Arc<State>);

impl Shutdown {
    /// A shutdown that takes at most `budget`.
    ///
    /// How to choose it: under Kubernetes `terminationGracePeriodSeconds` less what `preStop` takes
    /// and less two seconds; elsewhere what your supervisor waits before it kills. Zero ends
    /// everything at once, and destructors still run. `Duration::MAX` waits for as long as it takes.
    pub fn new(budget: Duration) -> Self {
        Self(Arc::new(State::new(budget)))
    }

    /// Drains the tasks of `registry` too. Several registries share the budget. One that is added when
    /// the shutdown has begun is told at once what the others were told until then, and is missing in
    /// the figures of the beginning.
    pub fn tasks(self, registry: &TaskRegistry) -> Self {
        self.0.add(registry);
        self
    }

    /// Serves on for so long after the first signal, while [`ShutdownWatch::is_ready`] is false
    /// already. A part of the budget; none by default.
    ///
    /// How to choose it: as long as your load balancer takes to see that and to send nothing more,
    /// which is the period of its health check times the failures that it wants. Under Kubernetes
    /// `preStop` does the same outside of the process.
    pub fn settle(self, delay: Duration) -> Self {
        self.0.settings().plan.settle = delay;
        self
    }

    /// Tells requests and tasks to end so long before the budget is spent. It is the time of
    /// graceful tasks to come to their end, and of the server to hand out the last answers. The
    /// default is a fifth of the budget, one second at most, and no more than the settle delay leaves.
    ///
    /// How to choose it: as long as your graceful tasks need once they are told. Theirs, of 5 seconds
    /// by default, is cut short by it.
    pub fn grace(self, grace: Duration) -> Self {
        self.0.settings().plan.grace = Some(grace);
        self
    }

    /// Refuses requests that come when the server has stopped accepting: over connections that were
    /// open then. By default they are served until the server has ended, as the client cannot know
    /// better: an HTTP/1 client learns it from a `Connection: close`, an HTTP/2 client from a GOAWAY
    /// that is on its way.
    pub fn refuse_late(self) -> Self {
        self.0.settings().refuse_late = true;
        self
    }

    /// Begins at [`begin`](Self::begin) and at nothing else.
    pub fn without_signals(self) -> Self {
        self.0.settings().signals = false;
        self
    }

    /// The layer that knows the requests in flight.
    pub fn layer(&self) -> ShutdownLayer {
        ShutdownLayer::new(self.0.clone())
    }

    /// A handle for handlers: whether the server is ready, and when it drains.
    pub fn watch(&self) -> ShutdownWatch {
        ShutdownWatch::new(self.0.clone())
    }

    /// Whether the plan fits in the budget. [`run`](Self::run) asks this first; for hosts that are
    /// driven by hand, ask it at start-up.
    ///
    /// # Errors
    ///
    /// [`PlanError`] if it does not.
    pub fn check(&self) -> Result<(), PlanError> {
        self.0.settings().plan.check()
    }

    /// Begins the shutdown, as the first signal does. Once; what comes later changes nothing.
    ///
    /// It returns at once, and can be called anywhere: in a handler, in a task, outside of a
    /// runtime.
    pub fn begin(&self) {
        self.0.begin();
    }

    /// Waits for the moment to stop accepting: for the signal, and then the settle delay. It is what
    /// servers call their shutdown signal.
    ///
    /// With the feature `signal`, SIGTERM and SIGINT are listened to from its first poll on, or from
    /// that of [`run`](Self::run). If that fails, it says so in the log.
    ///
    /// # Cancel safety
    ///
    /// Cancel safe: made anew, it goes on where it was.
    pub fn signalled(&self) -> impl Future<Output = ()> + Send + use<> {
        let state = self.0.clone();
        async move {
            if let Err(error) = state.keep() {
                tracing::error!(%error, "cannot listen to signals: only `begin` begins the shutdown");
            }
            state.settled().await;
        }
    }

    /// Serves until the signal, and then drains: returns when the server, its requests and its tasks
    /// are done, or the budget is spent, and drops the server.
    ///
    /// `server` should stop accepting when [`signalled`](Self::signalled) is ready. A server that
    /// ends by itself starts the shutdown too.
    ///
    /// Several servers can run under one shutdown: call this for each, at the same time. The signal
    /// stops them all, and so does the end of any one, with an error too. No call returns before all
    /// have ended, or the budget is spent. One that is not polled yet is not waited for.
    ///
    /// A second signal cuts the shutdown short: what would come at the deadline comes at once. A
    /// third exits the process, with 128 and the number of the signal. The report's code ends it if
    /// the runtime is so stuck that this is not even polled for a second after the budget: do not
    /// keep it without polling it.
    ///
    /// When this and all other handles are gone, and the process goes on, a signal ends it again, as
    /// if it had come third.
    ///
    /// # Errors
    ///
    /// [`RunError`]: before it serves, if the plan does not fit or signals cannot be listened to; and
    /// when all is done, if the server has ended with an error. Its [`exit`](RunError::exit) ends the
    /// process.
    ///
    /// # Panics
    ///
    /// If the server does.
    ///
    /// # Cancel safety
    ///
    /// Not cancel safe: dropped, it drops the server. What goes on is then yours to
    /// [finish](Self::finish).
    pub async fn run<S, T, E>(&self, server: S) -> Result<Report, RunError<E>>
    where
        S: IntoFuture<Output = Result<T, E>>,
    {
        self.check().map_err(RunError::Plan)?;
        self.0.keep().map_err(RunError::Signals)?;
        // Before the server, which is dropped first: that may hold it up too.
        let driver = self.0.driver(true);
        let server = pin!(server.into_future());
        let server = Server::Serves { server, _serving: Serving::new(&self.0) };
        let (report, ended) = self.drive(&driver, server).await;
        match ended {
            Some(Err(error)) => Err(RunError::Server { error, report: Box::new(report) }),
            Some(Ok(_)) | None => Ok(report),
        }
    }

    /// Drains now, for hosts that are driven by hand: when they accept nothing more. Returns when
    /// requests and tasks are done, or the budget is spent.
    ///
    /// It never ends the process, also if it is not polled: that only [`run`](Self::run) does.
    ///
    /// Connections are the host's: it has to tell them to end, and to drop them afterwards. Not at
    /// once: a request is done when its response was handed to its connection, which has to write
    /// it still.
    ///
    /// # Cancel safety
    ///
    /// Cancel safe: the shutdown stands still until it is called again; the time goes on.
    pub async fn finish(&self) -> Report {
        if let Err(error) = self.0.keep() {
            tracing::error!(%error, "the shutdown has no thread: only the runtime's clock counts");
        }
        self.0.begin();
        let server = Server::<future::Ready<()>>::Ended(None);
        self.drive(&self.0.driver(false), server).await.0
    }

    async fn drive<F: Future>(
        &self,
        driver: &Driver<'_>,
        mut server: Server<'_, F>,
    ) -> (Report, Option<F::Output>) {
        let state = &*self.0;
        let mut course = None;
        let mut alarm = Alarm::new();
        let mut left = pin!(self.left());
        let mut still = 0;
        let report = poll_fn(|cx| {
            driver.beat();
            // Before anything is looked at: what comes after that is not missed.
            state.listen(cx.waker());
            if server.poll_ended(cx) {
                state.begin();
            }
            let Some(begun) = state.begun() else { return Poll::Pending };
            let now = Instant::now();
            let course = course.get_or_insert_with(|| {
                alarm.progress = now.checked_add(PROGRESS);
                Course::new(&begun.plan, begun.at)
            });
            if !driver.waits_for_servers() {
                course.skip_settling(now);
            }
            if state.is_hurried() {
                course.hurry(now);
            }
            loop {
                if course.phase() == Phase::Aborting && course.end().is_some_and(|end| end <= now) {
                    let left = state.left().sum();
                    if left > 0 && left < still {
                        course.go_on(now);
                    }
                    still = left;
                }
                let is_draining = course.phase() >= Phase::Draining;
                let done =
                    is_draining && !driver.waits_for_servers() && left.as_mut().poll(cx).is_ready();
                match course.step(now, done) {
                    None => break,
                    Some(Phase::Settling) => {}
                    Some(Phase::Draining) => state.drain(),
                    Some(Phase::Cancelling) => state.cancel(),
                    Some(Phase::Aborting) => {
                        state.abort();
                        // To tell very many takes a while too.
                        course.go_on(Instant::now());
                        still = state.left().sum();
                    }
                    // Before the server is dropped: what goes with it was not done.
                    Some(Phase::Over) => return Poll::Ready(state.over(server.has_ended())),
                }
                // It may have ended by that.
                server.poll_ended(cx);
            }
            alarm.poll(cx, course, state);
            Poll::Pending
        })
        .await;
        (report, server.into_output())
    }

    /// Waits until requests and tasks are done.
    async fn left(&self) {
        self.0.roll.requests.close();
        self.0.roll.requests.idle().await;
        let mut done = 0;
        loop {
            let registries = self.0.registries();
            // None is taken away, but one may have been added meanwhile.
            if registries.len() == done {
                return;
            }
            for registry in &registries {
                registry.idle().await;
            }
            for registry in &registries {
                registry.close();
                registry.wait().await;
            }
            done = registries.len();
        }
    }
}

impl fmt::Debug for Shutdown {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // Not under the lock: the formatter is the code of others.
        let settings = self.0.settings().clone();
        f.debug_struct("Shutdown")
            .field("settings", &settings)
            .field("watch", &self.watch())
            .finish()
    }
}

/// A server, and then what it ended with.
enum Server<'a, F: Future> {
    Serves { server: Pin<&'a mut F>, _serving: Serving<'a> },
    Ended(Option<F::Output>),
}

impl<F: Future> Server<'_, F> {
    fn poll_ended(&mut self, cx: &mut Context<'_>) -> bool {
        if let Self::Serves { server, .. } = self {
            let Poll::Ready(output) = server.as_mut().poll(cx) else { return false };
            *self = Self::Ended(Some(output));
        }
        true
    }

    const fn has_ended(&self) -> bool {
        matches!(self, Self::Ended(_))
    }

    fn into_output(self) -> Option<F::Output> {
        match self {
            Self::Serves { .. } => None,
            Self::Ended(output) => output,
        }
    }
}

/// Wakes for the next phase, and for a line of progress.
struct Alarm {
    sleep: Option<Pin<Box<Sleep>>>,
    /// There is no time driver, or its runtime was shut down: the shutdown's thread has to do.
    timeless: bool,
    progress: Option<Instant>,
}

impl Alarm {
    const fn new() -> Self {
        Self { sleep: None, timeless: false, progress: None }
    }

    fn poll(&mut self, cx: &mut Context<'_>, course: &Course, state: &State) {
        loop {
            let now = Instant::now();
            if self.progress.is_some_and(|at| at <= now) {
                self.progress = now.checked_add(PROGRESS);
                let Left { requests, tasks } = state.left();
                let remaining = course.deadline().map(|at| at.saturating_duration_since(now));
                let remaining = remaining.map(field::debug);
                say(|| tracing::info!(requests, tasks, remaining, "still shutting down"));
            }
            let next = course.end().into_iter().chain(self.progress).min();
            let Some(next) = next.filter(|_| !self.timeless) else { return };
            if let Some(sleep) = &mut self.sleep {
                if sleep.deadline() != next {
                    sleep.as_mut().reset(next);
                }
            } else {
                // A runtime without a time driver panics here, and there is no way to ask it.
                self.sleep = catch(|| Box::pin(sleep_until(next))).ok();
            }
            let Some(sleep) = &mut self.sleep else {
                self.timeless = true;
                return;
            };
            // One of a runtime that was shut down panics here.
            let poll = catch(|| sleep.as_mut().poll(cx));
            self.timeless = poll.is_err();
            if !matches!(poll, Ok(Poll::Ready(()))) {
                return;
            }
            if course.end().is_some_and(|end| end <= Instant::now()) {
                // It is looked at in the next poll.
                cx.waker().wake_by_ref();
                return;
            }
        }
    }
}

/// Why [`Shutdown::run`] has no report to return.
#[derive(Debug)]
#[non_exhaustive]
pub enum RunError<E> {
    /// The plan does not fit in the budget. Nothing was served.
    Plan(PlanError),
    /// Signals cannot be listened to, or the thread for that cannot be started. Nothing was served.
    Signals(io::Error),
    /// The server has ended with an error. Requests and tasks were drained all the same.
    Server {
        /// The error.
        error: E,
        /// The report.
        report: Box<Report>,
    },
}

impl<E: Into<Box<dyn Error + Send + Sync>>> RunError<E> {
    /// Logs it, with what caused it and the report if there is one, and ends the process with 1; a
    /// second later if the log blocks.
    ///
    /// To return it from `main` instead would drop the runtime, which waits for threads that are
    /// stuck for ever. For a log that has to be flushed see [`Report::exit`].
    ///
    /// ```no_run
    /// # use std::time::Duration;
    /// # use tower_shutdown::Shutdown;
    /// # async fn serve() -> std::io::Result<()> { Ok(()) }
    /// # #[tokio::main]
    /// # async fn main() {
    /// let shutdown = Shutdown::new(Duration::from_secs(25));
    /// shutdown.run(serve()).await.unwrap_or_else(|error| error.exit()).exit()
    /// # }
    /// ```
    pub fn exit(self) -> ! {
        // The formatting of an error is the code of others.
        let why = catch(|| match self {
            Self::Plan(error) => error.to_string(),
            Self::Signals(error) => format!("cannot listen to signals: {error}"),
            Self::Server { error, report } => {
                let error = error.into();
                let causes =
                    iter::successors(Some(&*error as _), |cause: &&dyn Error| (*cause).source());
                let causes = causes.map(ToString::to_string).collect::<Vec<_>>().join(": ");
                format!("the server has failed: {causes}; {report}")
            }
        });
        let why = why.unwrap_or_else(|_| "the server has failed".to_owned());
        Line::Failed(why).say_and_exit(LAST_LINE, 1)
    }
}

/// Without what is its [`source`](Error::source).
impl<E> fmt::Display for RunError<E> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Plan(_) => f.write_str("the plan of the shutdown does not fit"),
            Self::Signals(_) => f.write_str("cannot listen to signals"),
            Self::Server { report, .. } => write!(f, "the server has failed; {report}"),
        }
    }
}

impl<E: Error + 'static> Error for RunError<E> {
    fn source(&self) -> Option<&(dyn Error + 'static)> {
        match self {
            Self::Plan(error) => Some(error),
            Self::Signals(error) => Some(error),
            Self::Server { error, .. } => Some(error),
        }
    }
}
