use std::{
    collections::{BTreeMap, HashMap},
    fmt,
    hash::{BuildHasherDefault, Hasher},
    ops::AddAssign,
    panic::Location,
    sync::Arc,
    time::Duration,
};

use tower_request_context::TraceId;

use crate::{AtEnd, task::Outcome};

/// How many names are told apart; the tasks of further ones are counted as [`OTHER`].
const NAMES_MAX: usize = 1024;
pub(crate) const OTHER: &str = "other";

/// What became of the tasks that somebody tried to spawn.
///
/// `attempted = refused + spawned` and
/// `spawned = live + completed + cancelled + aborted + timed_out + panicked`, each counted on its
/// own.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize))]
#[non_exhaustive]
pub struct Counts {
    /// Calls of a spawning method.
    pub attempted: u64,
    /// Those that were refused.
    pub refused: u64,
    /// Those that became tasks.
    pub spawned: u64,
    /// Tasks that have not ended.
    pub live: u64,
    /// Tasks that ran to their end.
    pub completed: u64,
    /// Tasks that were dropped at an await, or before they started, because they were told to end.
    pub cancelled: u64,
    /// Tasks that were dropped because their grace was over, or with their runtime.
    pub aborted: u64,
    /// Tasks whose own timeout passed.
    pub timed_out: u64,
    /// Tasks that panicked, in a poll or while they were dropped.
    pub panicked: u64,
}

impl Counts {
    /// Whether the two equations hold. They do, in every snapshot.
    pub const fn is_exact(&self) -> bool {
        let ended = self.completed + self.cancelled + self.aborted + self.timed_out + self.panicked;
        self.attempted == self.refused + self.spawned && self.spawned == self.live + ended
    }
}

impl AddAssign for Counts {
    fn add_assign(&mut self, other: Self) {
        self.attempted += other.attempted;
        self.refused += other.refused;
        self.spawned += other.spawned;
        self.live += other.live;
        self.completed += other.completed;
        self.cancelled += other.cancelled;
        self.aborted += other.aborted;
        self.timed_out += other.timed_out;
        self.panicked += other.panicked;
    }
}

/// The ledger of a [`TaskRegistry`](crate::TaskRegistry) at one time.
///
/// Request by request it is a photograph. The requests are read one after another, so the sum of
/// tasks that live at once may be off by those that came and went meanwhile; the equations of
/// [`Counts`] hold all the same, and no figure but `live` ever goes down.
///
/// Where a request has had more than 1,024 tasks at once, its counts are a photograph, and the list
/// of its tasks is read after that in parts, so that no spawn waits for all of a long list: those
/// that ended or came meanwhile may be in it or not, and none is in it twice. Whether any task lives,
/// `live` says, and not whether the list is empty.
#[derive(Clone, Debug, Default)]
#[cfg_attr(feature = "serde", derive(serde::Serialize))]
#[non_exhaustive]
pub struct Snapshot {
    /// All tasks.
    #[cfg_attr(feature = "serde", serde(flatten))]
    pub totals: Counts,
    /// By the name that they were given: at most 1,024 names, and `other`.
    pub by_name: BTreeMap<&'static str, Counts>,
    /// The tasks that live, in no order.
    pub live_tasks: Vec<LiveTask>,
    /// The tasks that a shutdown has ended, in no order: those that were
    /// [told to end](crate::TaskRegistry::cancel_all) before anything else told them to, or had time
    /// left when [all were aborted](crate::TaskRegistry::abort_all), and did not come to their end,
    /// when the registry was [closed](crate::TaskRegistry::close). While it is open, such an end is
    /// some end, and is not listed.
    pub forced_tasks: Vec<ForcedTask>,
}

impl Snapshot {
    pub(crate) fn add(&mut self, name: &'static str, counts: Counts) {
        self.totals += counts;
        let full = self.by_name.len() >= NAMES_MAX && !self.by_name.contains_key(name);
        *self.by_name.entry(if full { OTHER } else { name }).or_default() += counts;
    }
}

/// A task that has not ended.
#[derive(Clone, Debug)]
#[cfg_attr(feature = "serde", derive(serde::Serialize))]
#[non_exhaustive]
pub struct LiveTask {
    /// The name that it was given.
    pub name: &'static str,
    /// Where it was spawned.
    #[cfg_attr(feature = "serde", serde(serialize_with = "text::display"))]
    pub site: &'static Location<'static>,
    /// How long it has lived, at most. It counts, to 16 ms, from some moment between its spawn and
    /// its first await; in a set of more than eight tasks, from the first await of one of the seven
    /// before it. Of a task that has not come to an await yet, or was spawned in the poll in which
    /// the set was first asked for, it is the age of its set.
    #[cfg_attr(feature = "serde", serde(rename = "age_ms", serialize_with = "text::millis"))]
    pub age: Duration,
    /// What it is doing.
    #[cfg_attr(feature = "serde", serde(serialize_with = "text::display"))]
    pub state: TaskState,
    /// The trace id of its request, if that has one.
    #[cfg_attr(feature = "serde", serde(serialize_with = "text::option"))]
    pub trace_id: Option<TraceId>,
    /// What becomes of it at the end of its response; once that has come, what was chosen then.
    #[cfg_attr(feature = "serde", serde(serialize_with = "text::display"))]
    pub at_end: AtEnd,
}

impl fmt::Display for LiveTask {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { name, site, age, state, .. } = self;
        write!(f, "{name} ({state}, {} ms old, spawned at {site}", age.as_millis())?;
        match self.trace_id {
            Some(id) => write!(f, ", trace {id})"),
            None => f.write_str(")"),
        }
    }
}

/// A task that a shutdown has ended.
#[derive(Clone, Debug)]
#[cfg_attr(feature = "serde", derive(serde::Serialize))]
#[non_exhaustive]
pub struct ForcedTask {
    /// The name that it was given.
    pub name: &'static str,
    /// Where it was spawned.
    #[cfg_attr(feature = "serde", serde(serialize_with = "text::display"))]
    pub site: &'static Location<'static>,
    /// How long it lived, at most: see [`LiveTask::age`].
    #[cfg_attr(feature = "serde", serde(rename = "age_ms", serialize_with = "text::millis"))]
    pub age: Duration,
    /// The trace id of its request, if that has one.
    #[cfg_attr(feature = "serde", serde(serialize_with = "text::option"))]
    pub trace_id: Option<TraceId>,
    /// How it ended: cancelled, aborted, or panicked while it was dropped for that.
    #[cfg_attr(feature = "serde", serde(serialize_with = "text::display"))]
    pub outcome: Outcome,
}

/// What a live task is doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum TaskState {
    /// It runs, and its response is not over.
    Running,
    /// Its response is over, and it has some time to finish.
    Draining,
    /// Its response is over, or it never had one, and it has all the time it wants.
    Kept,
    /// It was told to end. One that stays in this state is stuck: it never awaits.
    Cancelling,
}

impl fmt::Display for TaskState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Running => "running",
            Self::Draining => "draining",
            Self::Kept => "kept",
            Self::Cancelling => "cancelling",
        })
    }
}

/// The counts of one set, and of those before it in its place, for one name and spawn site. What
/// lives is counted where it is listed.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Kind {
    pub(crate) name: &'static str,
    pub(crate) site: &'static Location<'static>,
    pub(crate) attempted: u64,
    pub(crate) refused: u64,
    spawned: u64,
    ended: [u64; Outcome::COUNT],
}

impl Kind {
    pub(crate) const fn new(name: &'static str, site: &'static Location<'static>) -> Self {
        Self { name, site, attempted: 0, refused: 0, spawned: 0, ended: [0; Outcome::COUNT] }
    }

    /// Names and sites by their address: a comparison of texts costs more than a slot, and here
    /// two of the same text do no harm.
    pub(crate) fn is(&self, name: &'static str, site: &'static Location<'static>) -> bool {
        std::ptr::eq(self.name, name) && std::ptr::eq(self.site, site)
    }

    /// A task of this kind begins.
    #[inline]
    pub(crate) fn begin(&mut self) {
        self.attempted += 1;
        self.spawned += 1;
    }

    pub(crate) fn end(&mut self, outcome: Outcome) {
        self.ended[outcome as usize] += 1;
    }

    /// Whether there is nothing to count.
    pub(crate) const fn is_unused(&self) -> bool {
        self.attempted == 0
    }

    /// How many live, by the other counts.
    pub(crate) fn live(&self) -> u64 {
        self.spawned.saturating_sub(self.ended.iter().sum())
    }

    /// Adds what is over.
    #[inline]
    pub(crate) fn add_to(&self, sum: &mut Counts) {
        let ended = |outcome: Outcome| self.ended[outcome as usize];
        sum.attempted += self.attempted;
        sum.refused += self.refused;
        sum.spawned += self.spawned;
        sum.completed += ended(Outcome::Completed);
        sum.cancelled += ended(Outcome::Cancelled);
        sum.aborted += ended(Outcome::Aborted);
        sum.timed_out += ended(Outcome::TimedOut);
        sum.panicked += ended(Outcome::Panicked);
    }

    pub(crate) fn counts(&self, live: u64) -> Counts {
        let mut counts = Counts { live, ..Counts::default() };
        self.add_to(&mut counts);
        counts
    }
}

/// The counts of the sets that are over and not listed any more, by name.
///
/// A name is found by its address, and the few texts that have several are merged in a snapshot.
#[derive(Debug, Default)]
pub(crate) struct Base {
    index: HashMap<(usize, usize), usize, BuildHasherDefault<AddressHasher>>,
    counts: Vec<(&'static str, Counts)>,
    /// Where the last name is in them: mostly that of the next too.
    last: usize,
    pub(crate) forced: ForcedTasks,
}

impl Base {
    /// The counts of this name.
    #[inline]
    pub(crate) fn of(&mut self, name: &'static str) -> &mut Counts {
        match self.counts.get(self.last) {
            Some((last, _)) if std::ptr::eq(*last, name) => {}
            _ => self.last = self.find(name),
        }
        &mut self.counts[self.last].1
    }

    #[inline(never)]
    fn find(&mut self, name: &'static str) -> usize {
        let address = (name.as_ptr() as usize, name.len());
        let known = self.counts.len();
        let index = match self.index.get(&address) {
            Some(index) => *index,
            None if known < NAMES_MAX => {
                self.index.insert(address, known);
                known
            }
            None => NAMES_MAX,
        };
        if index == known {
            self.counts.push((if known < NAMES_MAX { name } else { OTHER }, Counts::default()));
        }
        index
    }

    pub(crate) fn counts(&self) -> Vec<(&'static str, Counts)> {
        self.counts.clone()
    }
}

/// The tasks that a shutdown has ended: in chunks, of which whoever reads them under a lock copies
/// the pointers.
#[derive(Clone, Debug, Default)]
pub(crate) struct ForcedTasks(Vec<Arc<Vec<ForcedTask>>>);

impl ForcedTasks {
    const CHUNK: usize = 256;

    pub(crate) fn push(&mut self, task: ForcedTask) {
        match self.0.last_mut() {
            // Copied if somebody still reads it.
            Some(last) if last.len() < Self::CHUNK => Arc::make_mut(last).push(task),
            _ => self.0.push(Arc::new(vec![task])),
        }
    }

    /// Each of them, and where it has no trace id of its own with that of its request.
    pub(crate) fn in_request(
        &self,
        trace_id: Option<TraceId>,
    ) -> impl Iterator<Item = ForcedTask> + '_ {
        self.0
            .iter()
            .flat_map(|chunk| &**chunk)
            .map(move |task| ForcedTask { trace_id: task.trace_id.or(trace_id), ..task.clone() })
    }
}

/// Addresses need no defence against collisions: no stranger chooses them.
#[derive(Debug, Default)]
pub(crate) struct AddressHasher(u64);

impl Hasher for AddressHasher {
    fn write(&mut self, bytes: &[u8]) {
        for byte in bytes {
            self.write_usize(usize::from(*byte));
        }
    }

    fn write_usize(&mut self, address: usize) {
        // Fibonacci hashing: the multiplication spreads the bits upwards, the rotation brings
        // them down to where the table looks.
        self.0 = (self.0 ^ address as u64).wrapping_mul(0x9E37_79B9_7F4A_7C15).rotate_left(32);
    }

    fn finish(&self) -> u64 {
        self.0
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
        to.serialize_u64(u64::try_from(age.as_millis()).unwrap_or(u64::MAX))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whoever_reads_what_was_forced_copies_pointers_and_sees_nothing_later() {
        let task = |age| ForcedTask {
            name: "task",
            site: Location::caller(),
            age: Duration::from_secs(age),
            trace_id: None,
            outcome: Outcome::Cancelled,
        };
        let mut forced = ForcedTasks::default();
        let most = 4 * ForcedTasks::CHUNK as u64;
        (0..most - 1).for_each(|age| forced.push(task(age)));
        let read = forced.clone();
        let shared = |(one, other): (&Arc<_>, &Arc<_>)| Arc::ptr_eq(one, other);
        assert!(read.0.iter().zip(&forced.0).all(shared));
        (most - 1..=most).for_each(|age| forced.push(task(age)));
        let ages = |forced: &ForcedTasks| -> Vec<_> {
            forced.in_request(None).map(|task| task.age.as_secs()).collect()
        };
        assert_eq!(ages(&read), (0..most - 1).collect::<Vec<_>>());
        assert_eq!(ages(&forced), (0..=most).collect::<Vec<_>>());
        assert_eq!(read.0.iter().zip(&forced.0).filter(|it| shared(*it)).count(), 3, "the rest");
    }

    #[test]
    fn names_beyond_the_first_1024_are_one_other() {
        let mut base = Base::default();
        let one = Counts { attempted: 1, refused: 1, ..Counts::default() };
        let names: Vec<&'static str> =
            (0..NAMES_MAX + 10).map(|n| &*Box::leak(n.to_string().into_boxed_str())).collect();
        for name in names.iter().chain(&names) {
            *base.of(name) += one;
        }
        let counts = base.counts();
        assert_eq!(counts.len(), NAMES_MAX + 1);
        assert_eq!(counts[NAMES_MAX].0, OTHER);
        assert_eq!(counts[NAMES_MAX].1.attempted, 20);
        assert!(counts[..NAMES_MAX].iter().all(|(_, counts)| counts.attempted == 2));
    }
}
