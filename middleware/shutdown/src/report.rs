#![cfg_attr(feature = "serde", expect(clippy::ref_option_ref, reason = "serde makes it"))]

use std::{borrow::Cow, cmp::Reverse, collections::BTreeMap, fmt, panic::Location, time::Duration};

use tower_request_context::TraceId;
use tower_task_set::{Counts, Outcome};

use crate::log::{LAST_LINE, Line};

/// What a shutdown has found, and what it had to force.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Report {
    /// From the first signal to this report.
    pub took: Duration,
    /// What it might have taken.
    pub budget: Duration,
    /// Whether the server has ended by itself: of several the one of this report; true where none is
    /// [run](crate::Shutdown::run). If not, it was dropped: some connection stayed
    /// open, though perhaps nobody was waiting for anything on it.
    pub server_ended: bool,
    /// What became of the requests.
    pub requests: Requests,
    /// What became of the tasks.
    pub drained: Drained,
    /// The ledger of all registries, from the start of the process on.
    pub tasks: Counts,
    pub(crate) forced: Vec<Forced>,
}

impl Report {
    /// What had to be forced: what was ended by the shutdown instead of by itself, and what still
    /// runs.
    pub fn forced(&self) -> &[Forced] {
        &self.forced
    }

    /// 1 if anything was [forced](Self::forced), else 0.
    pub fn exit_code(&self) -> i32 {
        i32::from(!self.forced.is_empty())
    }

    /// Logs it, and ends the process with the [exit code](Self::exit_code); a second later if the log
    /// blocks.
    ///
    /// To return from `main` instead would drop the runtime, which waits for threads that are stuck
    /// for ever.
    ///
    /// Nothing of `main` is dropped by this. A log or a telemetry that is written by another thread
    /// may lose this last line: then log the report yourself, flush, and call
    /// `std::process::exit(report.exit_code())`.
    pub fn exit(self) -> ! {
        let code = self.exit_code();
        Line::Report(self).say_and_exit(LAST_LINE, code)
    }
}

impl fmt::Display for Report {
    /// Some lines, the first of which says all in figures. What was forced is grouped by name,
    /// place and outcome, with the oldest and its trace id: the 20 largest groups, as it may be a
    /// client who chooses the names. [`forced`](Self::forced) has all.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { requests, drained, .. } = self;
        write!(f, "shut down in {:.3} s of ", self.took.as_secs_f64())?;
        match self.budget {
            Duration::MAX => f.write_str("all the time")?,
            budget => write!(f, "{:.3} s", budget.as_secs_f64())?,
        }
        write!(f, ": {requests}; {drained}; {} forced", self.forced.len())?;
        if !self.server_ended {
            f.write_str("; the server had connections left")?;
        }
        let mut groups = Group::all(&self.forced);
        let others = groups.split_off(groups.len().min(Group::SHOWN));
        for group in groups {
            write!(f, "\n  {group}")?;
        }
        if !others.is_empty() {
            let count: usize = others.iter().map(|group| group.count).sum();
            write!(f, "\n  and {count} more, in {} groups", others.len())?;
        }
        Ok(())
    }
}

#[cfg(feature = "serde")]
impl serde::Serialize for Report {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        use serde::ser::SerializeStruct;
        let mut report = serializer.serialize_struct("Report", 8)?;
        report.serialize_field("took_ms", &text::in_millis(self.took))?;
        report.serialize_field("budget_ms", &text::in_millis(self.budget))?;
        report.serialize_field("server_ended", &self.server_ended)?;
        report.serialize_field("exit_code", &self.exit_code())?;
        report.serialize_field("requests", &self.requests)?;
        report.serialize_field("drained", &self.drained)?;
        report.serialize_field("tasks", &self.tasks)?;
        report.serialize_field("forced", &self.forced)?;
        report.end()
    }
}

/// What became of the requests that came through a [`ShutdownLayer`](crate::ShutdownLayer).
///
/// `at_begin + later = completed + ended + left`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize))]
#[non_exhaustive]
pub struct Requests {
    /// In flight at the first signal.
    pub at_begin: u64,
    /// Came later and were served.
    pub later: u64,
    /// Came too late and were refused.
    pub refused: u64,
    /// Came to their end by themselves, or were left by their client; or were let go by all who
    /// held them, be it by a task that is among the forced.
    pub completed: u64,
    /// Were ended at the deadline.
    pub ended: u64,
    /// Are still in flight: their handler never yields, or holds the response open; or their client
    /// reads no more of it.
    pub left: u64,
}

impl fmt::Display for Requests {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { at_begin, later, refused, completed, ended, left } = self;
        write!(f, "requests: {at_begin} in flight, {later} later, {refused} refused: ")?;
        write!(f, "{completed} completed, {ended} ended, {left} left")
    }
}

/// What became of the tasks of the registries.
///
/// `at_begin + spawned = completed + cancelled + aborted + timed_out + panicked + left`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize))]
#[non_exhaustive]
pub struct Drained {
    /// Lived at the first signal.
    pub at_begin: u64,
    /// Were spawned later.
    pub spawned: u64,
    /// Were refused later.
    pub refused: u64,
    /// Ran to their end.
    pub completed: u64,
    /// Were dropped at an await, or before they started, because they were told to end: by the
    /// shutdown or by something else.
    pub cancelled: u64,
    /// Were dropped because their grace was over.
    pub aborted: u64,
    /// Took longer than their own timeout.
    pub timed_out: u64,
    /// Panicked.
    pub panicked: u64,
    /// Live still: they never yield.
    pub left: u64,
}

impl Drained {
    /// What has happened between two readings of the same ledgers.
    pub(crate) const fn between(begin: &Counts, end: &Counts) -> Self {
        Self {
            at_begin: begin.live,
            spawned: end.spawned - begin.spawned,
            refused: end.refused - begin.refused,
            completed: end.completed - begin.completed,
            cancelled: end.cancelled - begin.cancelled,
            aborted: end.aborted - begin.aborted,
            timed_out: end.timed_out - begin.timed_out,
            panicked: end.panicked - begin.panicked,
            left: end.live,
        }
    }
}

impl fmt::Display for Drained {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { at_begin, spawned, refused, completed, .. } = self;
        let Self { cancelled, aborted, timed_out, panicked, left, .. } = self;
        write!(f, "tasks: {at_begin} live, {spawned} later, {refused} refused: ")?;
        write!(f, "{completed} completed, {cancelled} cancelled, {aborted} aborted, ")?;
        write!(f, "{timed_out} timed out, {panicked} panicked, {left} left")
    }
}

/// Something that a shutdown had to force.
#[derive(Clone, Debug)]
#[cfg_attr(feature = "serde", derive(serde::Serialize))]
#[non_exhaustive]
pub struct Forced {
    /// What it is.
    #[cfg_attr(feature = "serde", serde(serialize_with = "text::display"))]
    pub what: Kind,
    /// Of a task, the name that it was given; of a request, its method and, if that is known, its
    /// [route](crate::ShutdownLayer::route); `call` for one of a plain service.
    pub name: Cow<'static, str>,
    /// Where the task was spawned.
    #[cfg_attr(feature = "serde", serde(serialize_with = "text::option"))]
    pub site: Option<&'static Location<'static>>,
    /// How long it lived, at most; of what still runs, until now.
    #[cfg_attr(feature = "serde", serde(rename = "age_ms", serialize_with = "text::millis"))]
    pub age: Duration,
    /// The trace id of the request, if it has one.
    #[cfg_attr(feature = "serde", serde(serialize_with = "text::option"))]
    pub trace_id: Option<TraceId>,
    /// How it ended. `None`: it still runs.
    #[cfg_attr(feature = "serde", serde(serialize_with = "text::option"))]
    pub outcome: Option<Outcome>,
}

/// A task or a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[non_exhaustive]
pub enum Kind {
    /// A request, with its response.
    Request,
    /// A task of a registry.
    Task,
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Request => "request",
            Self::Task => "task",
        })
    }
}

/// Those of one name, place and outcome, for who reads them.
struct Group<'a> {
    count: usize,
    oldest: &'a Forced,
}

impl<'a> Group<'a> {
    /// So many have a line.
    const SHOWN: usize = 20;

    /// The largest first.
    fn all(forced: &'a [Forced]) -> Vec<Self> {
        let mut groups = BTreeMap::<_, Self>::new();
        for forced in forced {
            let site = forced.site.map(|site| (site.file(), site.line(), site.column()));
            let outcome = forced.outcome.map(|outcome| outcome.to_string());
            let group = groups
                .entry((forced.what, &forced.name, site, outcome))
                .or_insert(Self { count: 0, oldest: forced });
            group.count += 1;
            if group.oldest.age < forced.age {
                group.oldest = forced;
            }
        }
        let mut groups: Vec<_> = groups.into_values().collect();
        groups.sort_by_key(|group| Reverse(group.count));
        groups
    }
}

impl fmt::Display for Group<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Forced { what, name, site, age, trace_id, outcome } = self.oldest;
        write!(f, "{} x {what} {name}", self.count)?;
        match outcome {
            Some(outcome) => write!(f, " ({outcome}")?,
            None => f.write_str(" (still running")?,
        }
        write!(f, ", up to {} ms old", age.as_millis())?;
        if let Some(site) = site {
            write!(f, ", spawned at {site}")?;
        }
        match trace_id {
            Some(id) => write!(f, ", trace {id})"),
            None => f.write_str(")"),
        }
    }
}

#[cfg(feature = "serde")]
mod text {
    use std::{fmt::Display, time::Duration};

    use serde::Serializer;

    pub(super) fn display<T: Display, S: Serializer>(value: &T, to: S) -> Result<S::Ok, S::Error> {
        to.collect_str(value)
    }

    // serde hands it over like this.
    #[expect(clippy::ref_option)]
    pub(super) fn option<T: Display, S: Serializer>(
        value: &Option<T>,
        to: S,
    ) -> Result<S::Ok, S::Error> {
        match value {
            Some(value) => to.collect_str(value),
            None => to.serialize_none(),
        }
    }

    pub(super) fn millis<S: Serializer>(age: &Duration, to: S) -> Result<S::Ok, S::Error> {
        to.serialize_u64(in_millis(*age))
    }

    pub(super) fn in_millis(time: Duration) -> u64 {
        u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
    }
}
