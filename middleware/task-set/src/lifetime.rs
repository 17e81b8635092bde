use std::{fmt, time::Duration};

use tower_response_end::End;

/// What becomes of a task when the response is over, whatever ended it.
///
/// | | when the response is over | when the process is about to stop |
/// |---|---|---|
/// | `Cancel` | cancelled | lives while its response does |
/// | `Drain(d)` | has `d` to finish, then cancelled | drains within the budget, then cancelled |
/// | `Keep` | goes on, owned by the process | drains within the budget, then cancelled |
///
/// The default is `Drain` of 30 seconds: work is not lost because a client left.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum AtEnd {
    /// It is cancelled: at its next await it is dropped.
    Cancel,
    /// It has this long to finish and is then cancelled. Choose what the work takes on a bad day,
    /// and less than the time that the process has for its shutdown.
    Drain(Duration),
    /// It goes on as long as it takes.
    Keep,
}

impl Default for AtEnd {
    fn default() -> Self {
        Self::Drain(Duration::from_secs(30))
    }
}

impl fmt::Display for AtEnd {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Cancel => f.write_str("cancel"),
            Self::Drain(time) => write!(f, "drain({time:?})"),
            Self::Keep => f.write_str("keep"),
        }
    }
}

/// What else becomes of it when a task panics. The panic is logged and counted in any case, and is
/// the task's [outcome](crate::TaskError::Panicked).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum OnPanic {
    /// Nothing.
    #[default]
    Isolate,
    /// All tasks of its set are told to end, for [`Cause::Sibling`](crate::Cause::Sibling), and the
    /// set accepts no more. A task that belongs to no request has no siblings.
    CancelSiblings,
    /// Its response fails: before the head the answer is a 500 or gRPC status 13, after it the body
    /// ends in an error, or in trailers for a gRPC client. When the response is over, nothing.
    ///
    /// A panic closes the task's channels before it is known, and a body may take that for the end
    /// of its data. So a response that comes to an end of its own is held back while a panic unwinds
    /// one of its tasks. That is known by the [hook](tower_catch_unwind::install_hook): without it,
    /// or of a panic that `resume_unwind` goes on with, it is not, and who feeds a response had better
    /// have its [`TaskHandle`](crate::TaskHandle) awaited. A task that catches a panic by other means
    /// than [`catch`](tower_catch_unwind::catch()) holds it back until its next await.
    FailResponse,
}

/// What was chosen, on a layer, a set or a task: for all ends, and for some of them.
#[derive(Clone, Debug, Default)]
pub(crate) struct Policy {
    at_end: Option<AtEnd>,
    on: Vec<(End, AtEnd)>,
    grace: Option<Duration>,
    on_panic: Option<OnPanic>,
}

impl Policy {
    /// What a graceful task has if nobody says otherwise.
    const GRACE: Duration = Duration::from_secs(5);

    pub(crate) fn at_end(&mut self, lifetime: AtEnd) {
        self.at_end = Some(lifetime);
    }

    pub(crate) fn on(&mut self, end: End, lifetime: AtEnd) {
        self.on.retain(|(other, _)| *other != end);
        self.on.push((end, lifetime));
    }

    pub(crate) fn set_grace(&mut self, grace: Duration) {
        self.grace = Some(grace);
    }

    /// How long a graceful task may go on after it was told to end: what was chosen for it, or
    /// else here.
    pub(crate) fn grace(&self, own: Option<&Self>) -> Duration {
        own.and_then(|own| own.grace).or(self.grace).unwrap_or(Self::GRACE)
    }

    pub(crate) fn on_panic(&mut self, choice: OnPanic) {
        self.on_panic = Some(choice);
    }

    /// What was chosen for a panic, if anything.
    pub(crate) fn for_panic(&self) -> Option<OnPanic> {
        self.on_panic
    }

    /// Whether that is to fail the response.
    pub(crate) fn may_fail(&self) -> bool {
        self.on_panic == Some(OnPanic::FailResponse)
    }

    /// What was chosen for this end, if anything.
    pub(crate) fn get(&self, end: End) -> Option<AtEnd> {
        let exception = self.on.iter().find(|(other, _)| *other == end);
        exception.map(|(_, lifetime)| *lifetime).or(self.at_end)
    }

    /// What is chosen for all ends that are no exception.
    pub(crate) fn general(&self) -> Option<AtEnd> {
        self.at_end
    }

    pub(crate) fn has_lifetime(&self) -> bool {
        self.at_end.is_some() || !self.on.is_empty()
    }

    pub(crate) fn is_empty(&self) -> bool {
        !self.has_lifetime() && self.grace.is_none() && self.on_panic.is_none()
    }

    /// Adds what `inner` chose, which counts first.
    pub(crate) fn add(&mut self, inner: &Self) {
        if let Some(lifetime) = inner.at_end {
            self.at_end(lifetime);
        }
        for (end, lifetime) in &inner.on {
            self.on(*end, *lifetime);
        }
        self.grace = inner.grace.or(self.grace);
        self.on_panic = inner.on_panic.or(self.on_panic);
    }
}
