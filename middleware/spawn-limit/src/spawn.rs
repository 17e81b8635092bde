use std::{
    future::poll_fn,
    panic::Location,
    pin::{Pin, pin},
    task::{Context, Poll},
    time::Duration,
};

use pin_project_lite::pin_project;
use tokio::{runtime::Handle, task::JoinHandle, time::Instant};
use tower_request_context::{RequestContext, Scope, Task};
use tracing::Span;

use crate::{Level, Limits, Permit, Permits, Refused, SpawnError, SpawnLimit, limit::Acquire};

/// Spawns a task within the limits of the layers around, if there are any. It never waits.
///
/// It is `tokio::spawn` for a task that has a permit until its last destructor has run, and that
/// runs in the [`RequestContext`] that is current here, in a span of its own if a value of that
/// makes one. What it spawns is within the same limits.
///
/// # Errors
///
/// The future comes back, and nothing of it has run:
///
/// - [`Full`](SpawnError::Full): a limit is full.
/// - [`NoRuntime`](SpawnError::NoRuntime): this is outside of a runtime. In one that is being shut
///   down the task is dropped at once, which its handle tells.
#[track_caller]
pub fn spawn<F>(future: F) -> Result<JoinHandle<F::Output>, Refused<F>>
where
    F: Future + Send + 'static,
    F::Output: Send + 'static,
{
    match Plan::here().admit() {
        Ok((runtime, home)) => Ok(runtime.spawn(Bounded { future: Some(future), home })),
        Err(reason) => Err(Refused { reason, future }),
    }
}

/// As [`spawn`], but if a limit is full it waits for a permit at most so long.
///
/// While it waits, it gives up when the request is over that it was called in. Code that runs in a
/// task with a permit is refused at once, as with `spawn`: see [`Level`].
///
/// Choose the time by how long the caller can still use the result; what the queue then holds is
/// bounded by [`SpawnLimit::queue`].
///
/// # Errors
///
/// As [`spawn`]; and [`Closed`](SpawnError::Closed) if it waits and the request is over.
///
/// # Cancel safety
///
/// Dropping it drops the future, of which nothing has run, and gives up the place in the line.
#[track_caller]
pub fn spawn_within<F>(
    wait: Duration,
    future: F,
) -> impl Future<Output = Result<JoinHandle<F::Output>, Refused<F>>> + Send
where
    F: Future + Send + 'static,
    F::Output: Send + 'static,
{
    let plan = Plan::here();
    async move {
        match plan.admit_within(wait).await {
            Ok((runtime, home)) => Ok(runtime.spawn(Bounded { future: Some(future), home })),
            Err(reason) => Err(Refused { reason, future }),
        }
    }
}

/// Runs a closure where it may block, within the limits of the layers around. It never waits.
///
/// It is `tokio::task::spawn_blocking` for a closure that has a permit until it returns, whoever
/// gave up on it meanwhile, and that runs in the [`RequestContext`] that is current here.
///
/// # Errors
///
/// As [`spawn`]; what comes back is the closure.
#[track_caller]
pub fn spawn_blocking<F, T>(f: F) -> Result<JoinHandle<T>, Refused<F>>
where
    F: FnOnce() -> T + Send + 'static,
    T: Send + 'static,
{
    match Plan::here().admit() {
        Ok((runtime, home)) => {
            // One that never runs is dropped in this order: the permit comes last.
            let work = (f, home);
            Ok(runtime.spawn_blocking(move || {
                let work = work;
                let (f, mut home) = work;
                home.enter(f)
            }))
        }
        Err(reason) => Err(Refused { reason, future: f }),
    }
}

/// Tries `attempt`, at most so long: again whenever a permit has come of the limit that it found
/// full, which it then has in hand, and whenever what `changed` made is ready, which was made
/// before it looked. For those who write a spawner.
///
/// `None`: the time is over, or there is none to wait. That limit has been told.
///
/// # Cancel safety
///
/// As [`SpawnLimit::acquire_within`].
pub async fn within<T, C: Future<Output = ()>>(
    wait: Duration,
    mut changed: impl FnMut() -> C,
    mut attempt: impl FnMut(&mut Option<Permit>) -> Result<T, SpawnLimit>,
) -> Option<T> {
    let mut in_hand = None;
    if let Ok(done) = attempt(&mut in_hand) {
        return Some(done);
    }
    let since = Instant::now();
    let until = since.checked_add(wait);
    loop {
        let mut changed = pin!(changed());
        let full = match attempt(&mut in_hand) {
            Ok(done) => return Some(done),
            Err(full) => full,
        };
        // What was for nothing.
        drop(in_hand.take());
        let mut acquire = pin!(Acquire::since(full, Level::Task, since, until));
        let permit = poll_fn(|cx| match acquire.as_mut().poll(cx) {
            Poll::Ready(permit) => Poll::Ready(Some(permit)),
            Poll::Pending => changed.as_mut().poll(cx).map(|()| None),
        });
        in_hand = match permit.await {
            Some(Ok(permit)) => Some(permit),
            Some(Err(_)) => return None,
            None => None,
        };
    }
}

/// What was current where a task was asked for.
struct Plan {
    limits: Limits,
    level: Level,
    context: RequestContext,
    task: Task,
}

impl Plan {
    #[track_caller]
    fn here() -> Self {
        Self {
            limits: Limits::current(),
            level: Level::current(),
            context: RequestContext::current(),
            task: Task::new("spawn", Location::caller()),
        }
    }

    fn admit(self) -> Result<(Handle, Home), SpawnError> {
        let runtime = Handle::try_current().map_err(|_| SpawnError::NoRuntime)?;
        let permits = self.limits.try_take(&mut None, None).map_err(|full| {
            full.refuse();
            SpawnError::Full
        })?;
        Ok((runtime, self.home(permits)))
    }

    async fn admit_within(self, wait: Duration) -> Result<(Handle, Home), SpawnError> {
        let runtime = Handle::try_current().map_err(|_| SpawnError::NoRuntime)?;
        // It may be polled elsewhere than where it was called.
        let wait = if self.level == Level::Task { Duration::ZERO } else { wait };
        let attempt = |in_hand: &mut _| match self.limits.try_take(in_hand, None) {
            Ok(permits) => Ok(Ok(permits)),
            Err(_) if self.limits.has_ended() => Ok(Err(SpawnError::Closed)),
            Err(full) => Err(full),
        };
        let permits = within(wait, || self.limits.end(), attempt).await;
        let permits = permits.unwrap_or(Err(SpawnError::Full))?;
        Ok((runtime, self.home(permits)))
    }

    fn home(self, permits: Permits) -> Home {
        let Self { limits, level, context, task } = self;
        let (scope, span) = if context.wants_span() {
            let own = context.inherit(&task);
            let span = own.span(&task);
            (Scope::new(own), span)
        } else {
            (Scope::of_task(context, task), Span::none())
        };
        // Who is spawned by a task that has a permit is waited for by it, perhaps.
        let level = if limits.is_empty() { level } else { Level::Task };
        Home { scope, span, level, permits }
    }
}

/// Where a task runs.
struct Home {
    scope: Scope,
    span: Span,
    level: Level,
    permits: Permits,
}

impl Home {
    fn enter<R>(&mut self, f: impl FnOnce() -> R) -> R {
        let Self { scope, span, level, permits } = self;
        level.enter(|| permits.enter(|| scope.enter(|| span.in_scope(f))))
    }
}

pin_project! {
    /// A task with its permits.
    struct Bounded<F> {
        // Before the permits: they come back when it has been dropped.
        #[pin]
        future: Option<F>,
        home: Home,
    }

    impl<F> PinnedDrop for Bounded<F> {
        fn drop(this: Pin<&mut Self>) {
            let mut this = this.project();
            if this.future.is_some() {
                this.home.enter(|| this.future.set(None));
            }
        }
    }
}

impl<F: Future> Future for Bounded<F> {
    type Output = F::Output;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<F::Output> {
        let mut this = self.project();
        this.home.enter(|| {
            let future = this.future.as_mut().as_pin_mut().expect("polled after it was ready");
            let output = future.poll(cx);
            if output.is_ready() {
                this.future.set(None);
            }
            output
        })
    }
}
