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
/// later replaces this one: it may call [`record`].
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
/// thread. A hook that is to print only what nobody else tells can go by that.
///
/// It takes a backtrace too if `RUST_BACKTRACE` or `RUST_LIB_BACKTRACE` asks for one.
pub fn record(info: &PanicHookInfo<'_>) -> bool {
    // A panic in here would abort the process. So: no lock, no user code, and no thread-local that
    // may be gone.
    let catches = HERE.try_with(|here| here.catchers.get() != 0).unwrap_or(false);
    if !catches {
        return false;
    }
    let backtrace = Backtrace::capture();
    let record = Record {
        message: message_of(info.payload()),
        payload: info.payload().type_id(),
        site: info.location().map(Site::new),
        backtrace: (backtrace.status() == BacktraceStatus::Captured).then(|| Arc::new(backtrace)),
    };
    replace(Some(Box::new(record)));
    true
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
    message: Box<str>,
    payload: TypeId,
    pub(crate) site: Option<Site>,
    pub(crate) backtrace: Option<Arc<Backtrace>>,
}

/// The last panic of this thread in a catcher, if it was this one.
///
/// There may be another one: `resume_unwind` does not call the hook, and an earlier panic may have
/// been caught by others.
pub(crate) fn take(message: &str, payload: &(dyn Any + Send)) -> Option<Box<Record>> {
    let record = replace(None)?;
    if *record.message == *message && record.payload == payload.type_id() {
        return Some(record);
    }
    replace(Some(record));
    None
}

/// A catcher begins. What it returns goes to [`leave`].
#[inline]
pub(crate) fn enter() -> Option<Box<Record>> {
    let _ = HERE.try_with(|here| here.catchers.set(here.catchers.get() + 1));
    // In a destructor: what is recorded is the panic that runs it, which is not this catcher's.
    if thread::panicking() { replace(None) } else { None }
}

/// The catcher has caught what there was.
#[inline]
pub(crate) fn leave(outer: Option<Box<Record>>) {
    let recorded = HERE.try_with(|here| {
        here.catchers.set(here.catchers.get() - 1);
        here.recorded.get()
    });
    if recorded != Ok(false) || outer.is_some() {
        clear(outer);
    }
}

/// A record that nobody took is of a panic that others have caught.
#[cold]
fn clear(outer: Option<Box<Record>>) {
    let is_last = HERE.try_with(|here| here.catchers.get() == 0);
    if outer.is_some() || is_last == Ok(true) {
        replace(outer);
    }
}

thread_local! {
    static HERE: Here = const {
        Here { catchers: Cell::new(0), recorded: Cell::new(false), record: Cell::new(None) }
    };
}

/// Without a destructor, so that it needs no look at its state, and is there to the very end of
/// the thread. The last catcher to leave clears the record.
struct Here {
    /// How many catchers are on this thread's stack.
    catchers: Cell<u32>,
    /// Whether there is a record.
    recorded: Cell<bool>,
    record: Cell<Option<ManuallyDrop<Box<Record>>>>,
}

#[cold]
fn replace(record: Option<Box<Record>>) -> Option<Box<Record>> {
    let replaced = HERE.try_with(|here| {
        here.recorded.set(record.is_some());
        here.record.replace(record.map(ManuallyDrop::new))
    });
    replaced.ok().flatten().map(ManuallyDrop::into_inner)
}
