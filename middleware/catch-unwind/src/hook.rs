use std::{
    any::{Any, TypeId},
    backtrace::{Backtrace, BacktraceStatus},
    cell::Cell,
    fmt,
    mem::ManuallyDrop,
    panic::{self, Location, PanicHookInfo},
    sync::{Arc, Once},
    thread,
};

use crate::catch::message_of;

/// Lets every [`Panic`](crate::Panic) know where it came from: sets a panic hook that
/// [records](record), and then calls the hook that was there, which prints as it always did.
///
/// Call it once in `main`, before other threads may panic; nothing else in this family touches the
/// hook. A second call does nothing, nor does one on a thread that is panicking. A hook that is set
/// later replaces this one: it may call [`record`]. Where each line must be JSON, set one that does
/// instead of this: the hook that was there prints text.
pub fn install_hook() {
    static INSTALLED: Once = Once::new();
    // There the hook must not be changed, and the panic would poison the `Once`.
    if thread::panicking() {
        return;
    }
    INSTALLED.call_once(|| {
        let previous = panic::take_hook();
        panic::set_hook(Box::new(move |info| {
            record(info);
            previous(info);
        }));
    });
}

/// Remembers where a panic came from until it is caught: for those who have a panic hook of their
/// own, and call this in it.
///
/// Whether it was remembered: if something in this family is about to catch the panic on this
/// thread. That is told but where it is [contained](crate::CatchUnwind#cancel-safety), or one of
/// [too many](crate::CatchUnwindLayer::max_events_per_second): a hook that prints only what was not
/// remembered is silent about these.
///
/// It takes a backtrace too if `RUST_BACKTRACE` or `RUST_LIB_BACKTRACE` asks for one.
pub fn record(info: &PanicHookInfo<'_>) -> bool {
    // A panic in here would abort the process. So: no lock, no user code, and no thread-local that
    // may be gone.
    let depth = depth();
    if depth == 0 {
        return false;
    }
    // First: to take a backtrace may take a while.
    unwinding::begin(depth);
    let backtrace = Backtrace::capture();
    let record = Record {
        message: message_of(info.payload()),
        payload: info.payload().type_id(),
        text: text_of(info.payload()),
        site: info.location().map(Site::new),
        backtrace: (backtrace.status() == BacktraceStatus::Captured).then(|| Arc::new(backtrace)),
        depth,
    };
    let mut records = replace(Vec::new());
    if records.len() == RECORDS_MAX {
        // The first and the last are of those that may still go on.
        records.remove(RECORDS_MAX / 2);
    }
    records.push(record);
    replace(records);
    true
}

/// What cannot be called in a [`catch`](crate::catch()), since it is a destructor that the compiler
/// calls: `tower-task-set`'s, for those of a task. Between `enter` and `leave`, which must come on
/// the same thread, what panics is recorded as in a catcher.
#[doc(hidden)]
pub mod destructor {
    use crate::Panic;

    #[inline]
    pub fn enter() {
        super::enter();
    }

    #[inline]
    pub fn leave() {
        super::leave();
    }

    /// What unwinds now, if it was recorded.
    #[cold]
    pub fn panic() -> Option<Panic> {
        super::take_last().map(Panic::of_record)
    }
}

/// For who must know that a panic has begun before its destructors run, and not only when it is
/// caught: `tower-task-set`, of tasks.
#[doc(hidden)]
pub mod unwinding {
    use std::{cell::Cell, fmt, sync::Arc};

    /// What is told of a panic on the thread where it is [current](replace).
    pub trait Observer: fmt::Debug + Send + Sync {
        /// A panic has been recorded, and is about to unwind. Called in the panic hook, where a
        /// panic aborts the process.
        fn unwinds(&self);
    }

    /// An observer of the panics that the next catcher is to catch, and whether it was told of one.
    #[derive(Debug)]
    pub struct Observed {
        observer: Arc<dyn Observer>,
        depth: u32,
        has_begun: bool,
    }

    impl Observed {
        pub fn new(observer: Arc<dyn Observer>) -> Self {
            Self { observer, depth: super::depth() + 1, has_begun: false }
        }

        /// Whether a panic has begun since.
        pub const fn has_begun(&self) -> bool {
            self.has_begun
        }
    }

    thread_local! {
        static HERE: Cell<Option<Observed>> = const { Cell::new(None) };
    }

    /// Makes it current on this thread, and yields what was.
    pub fn replace(observed: Option<Observed>) -> Option<Observed> {
        HERE.try_with(|here| here.replace(observed)).ok().flatten()
    }

    pub(super) fn begin(depth: u32) {
        let Some(mut observed) = replace(None) else { return };
        if observed.depth == depth && !observed.has_begun {
            observed.has_begun = true;
            observed.observer.unwinds();
        }
        replace(Some(observed));
    }
}

/// A place in the source code, written as `file:line:column`.
#[derive(Clone, PartialEq, Eq)]
pub struct Site {
    file: Box<str>,
    line: u32,
    column: u32,
}

impl Site {
    fn new(location: &Location<'_>) -> Self {
        Self { file: location.file().into(), line: location.line(), column: location.column() }
    }

    /// The file, as the compiler was told its name.
    pub fn file(&self) -> &str {
        &self.file
    }

    /// The line, counted from 1.
    pub const fn line(&self) -> u32 {
        self.line
    }

    /// The column, counted from 1.
    pub const fn column(&self) -> u32 {
        self.column
    }
}

impl fmt::Display for Site {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}:{}", self.file, self.line, self.column)
    }
}

impl fmt::Debug for Site {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Site({self})")
    }
}

/// What the hook has seen of a panic.
pub(crate) struct Record {
    /// Short and escaped, as in the `Panic`.
    pub(crate) message: Box<str>,
    payload: TypeId,
    /// Where it was said, if that was made for this panic alone.
    text: Option<usize>,
    pub(crate) site: Option<Site>,
    pub(crate) backtrace: Option<Arc<Backtrace>>,
    /// How many catchers were on the stack. What was recorded further out is not of the last one.
    depth: u32,
}

/// The panic of the innermost catcher with this payload, unless it cannot be told from another.
///
/// The last one that was recorded may be another: `resume_unwind` does not call the hook, and
/// others may have caught a panic before it, or one of its destructors.
pub(crate) fn take(message: &str, payload: &(dyn Any + Send)) -> Option<Record> {
    let (text, payload) = (text_of(payload), payload.type_id());
    take_if(|records| {
        let is_alike = |&at: &usize| {
            let record = &records[at];
            record.payload == payload && *record.message == *message
        };
        let alike: Vec<_> = (0..records.len()).filter(is_alike).collect();
        let same = alike.iter().rfind(|&&at| text.is_some() && records[at].text == text);
        let last = alike.last().filter(|_| {
            alike.windows(2).all(|pair| records[pair[0]].site == records[pair[1]].site)
        });
        same.or(last).copied()
    })
}

/// The last panic in the innermost catcher.
pub(crate) fn take_last() -> Option<Record> {
    take_if(|records| records.len().checked_sub(1))
}

/// That of the records in the innermost catcher which `find` says.
fn take_if(find: impl FnOnce(&[Record]) -> Option<usize>) -> Option<Record> {
    let depth = depth();
    let mut records = replace(Vec::new());
    let outer = records.iter().take_while(|record| record.depth < depth).count();
    let record = find(&records[outer..]).map(|at| records.remove(outer + at));
    replace(records);
    record
}

/// The text of a panic that was made for it: where it is. It is moved, and not copied, from what
/// the hook sees to what is caught.
fn text_of(payload: &(dyn Any + Send)) -> Option<usize> {
    let text = payload.downcast_ref::<String>()?;
    (!text.is_empty()).then(|| text.as_ptr().addr())
}

/// How many catchers are on this thread's stack.
pub(crate) fn depth() -> u32 {
    STATE.try_with(|state| state.get() / CATCHER).unwrap_or(0)
}

/// A catcher begins: each has its [`leave`].
#[inline]
pub(crate) fn enter() {
    let _ = STATE.try_with(|state| state.set(state.get() + CATCHER));
}

/// The catcher has caught what there was.
#[inline]
pub(crate) fn leave() {
    let state = STATE.try_with(|state| {
        state.set(state.get() - CATCHER);
        state.get()
    });
    if state.is_ok_and(|state| state & RECORDED != 0) {
        clear();
    }
}

/// What was recorded in the catcher that is left and nobody took is of panics that others caught.
#[cold]
#[inline(never)]
fn clear() {
    let depth = depth();
    let mut records = replace(Vec::new());
    records.retain(|record| record.depth <= depth);
    replace(records);
}

thread_local! {
    /// How many catchers are on this thread's stack, and whether there is a record: one number, so
    /// that a catcher has one to look at.
    static STATE: Cell<u32> = const { Cell::new(0) };
    /// The records, in the order of their panics, for while one unwinds its destructors may catch
    /// others.
    ///
    /// Without a destructor, so that it is there to the very end of the thread: each catcher clears
    /// what was recorded in it.
    static RECORDS: Cell<ManuallyDrop<Vec<Record>>> = const { Cell::new(ManuallyDrop::new(Vec::new())) };
}

const RECORDED: u32 = 1;
const CATCHER: u32 = 2;

/// A panic in a destructor, in the destructor of which, and so on: more than that are not nested.
const RECORDS_MAX: usize = 8;

#[cold]
fn replace(mut records: Vec<Record>) -> Vec<Record> {
    if records.is_empty() {
        // Nobody clears what is empty, and a thread must leave no buffer behind.
        records = Vec::new();
    }
    let replaced = RECORDS.try_with(|here| {
        let _ = STATE.try_with(|state| {
            let recorded = if records.is_empty() { 0 } else { RECORDED };
            state.set(state.get() & !RECORDED | recorded);
        });
        here.replace(ManuallyDrop::new(records))
    });
    replaced.map(ManuallyDrop::into_inner).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_thread_keeps_no_buffer_when_there_is_no_record() {
        replace(Vec::with_capacity(4));
        assert_eq!(replace(Vec::new()).capacity(), 0);
    }
}
