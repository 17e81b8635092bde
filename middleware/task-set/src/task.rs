use std::{
    any::Any,
    fmt,
    mem::{forget, replace},
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
    thread,
};

use pin_project_lite::pin_project;
use tower_catch_unwind::{
    Panic, catch, destructor,
    unwinding::{self, Observed},
};
use tower_request_context::Scope;
use tower_response_end::End;
use tower_spawn_limit::Level;

use crate::{
    StopToken,
    place::{self, InTask},
    set::{CONTEXT, LENT, MAY_FAIL, ORDERS, Set, current_task},
};

/// Why a task was told to end.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Cause {
    /// Its response was completed, and its time after that is over.
    Completed,
    /// Its response failed: the service or the body yielded an error.
    Failed,
    /// Its handler or body panicked.
    Panicked,
    /// Its client left, or an outer layer gave up on the response.
    Disconnected,
    /// Its own timeout passed, and it was asked to come to an end; or its response took longer than
    /// [it may](crate::TaskSetLayer::deadline).
    TimedOut,
    /// The process is about to stop, or its runtime did.
    Shutdown,
    /// Somebody cancelled it by its handle, or its whole set.
    Requested,
    /// Another task of its group failed, or one of its set panicked: see
    /// [`OnPanic::CancelSiblings`].
    ///
    /// [`OnPanic::CancelSiblings`]: crate::OnPanic::CancelSiblings
    Sibling,
}

impl From<End> for Cause {
    fn from(end: End) -> Self {
        match end {
            End::Completed => Self::Completed,
            End::Panicked => Self::Panicked,
            End::Disconnected => Self::Disconnected,
            End::TimedOut => Self::TimedOut,
            // An end that is not known here yet is some failure.
            _ => Self::Failed,
        }
    }
}

impl fmt::Display for Cause {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Completed => "its response was completed",
            Self::Failed => "its response failed",
            Self::Panicked => "its handler panicked",
            Self::Disconnected => "its client left",
            Self::TimedOut => "its time is over",
            Self::Shutdown => "the runtime or the process is stopping",
            Self::Requested => "somebody asked for it",
            Self::Sibling => "another task beside it failed",
        })
    }
}

/// Why a task has no result.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub enum TaskError {
    /// It was told to end, and was dropped at an await or before it started.
    Cancelled(Cause),
    /// It was dropped because its grace was over, or with its runtime.
    Aborted(Cause),
    /// Its own timeout passed.
    TimedOut,
    /// It panicked, in a poll or while it was dropped.
    Panicked(Panic),
    /// It returned an error, which its [group](crate::TaskSet::try_group) has.
    Failed,
}

impl TaskError {
    /// Whether the task has failed, and was not just told to end.
    pub(crate) const fn is_failure(&self) -> bool {
        matches!(self, Self::Panicked(_) | Self::TimedOut | Self::Failed)
    }
}

impl fmt::Display for TaskError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Cancelled(cause) => write!(f, "the task was cancelled: {cause}"),
            Self::Aborted(cause) => write!(f, "the task was aborted: {cause}"),
            Self::TimedOut => f.write_str("the task took longer than its timeout"),
            Self::Panicked(panic) => fmt::Display::fmt(panic, f),
            Self::Failed => f.write_str("the task returned an error, which its group has"),
        }
    }
}

impl std::error::Error for TaskError {}

/// How a task ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Outcome {
    /// It ran to its end.
    Completed,
    /// It was told to end, and was dropped at an await or before it started.
    Cancelled,
    /// It was dropped because its grace was over, or with its runtime.
    Aborted,
    /// Its own timeout passed.
    TimedOut,
    /// It panicked, in a poll or while it was dropped.
    Panicked,
}

impl Outcome {
    pub(crate) const COUNT: usize = 5;
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Completed => "completed",
            Self::Cancelled => "cancelled",
            Self::Aborted => "aborted",
            Self::TimedOut => "timed out",
            Self::Panicked => "panicked",
        })
    }
}

/// What a task was told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Order {
    Cancel(Cause),
    /// After its grace.
    Abort(Cause),
    TimeOut,
}

impl Order {
    const fn outcome(self) -> Outcome {
        match self {
            Self::Cancel(_) => Outcome::Cancelled,
            Self::Abort(_) => Outcome::Aborted,
            Self::TimeOut => Outcome::TimedOut,
        }
    }

    const fn error(self) -> TaskError {
        match self {
            Self::Cancel(cause) => TaskError::Cancelled(cause),
            Self::Abort(cause) => TaskError::Aborted(cause),
            Self::TimeOut => TaskError::TimedOut,
        }
    }

    /// Why, for those who are asked.
    pub(crate) const fn cause(self) -> Cause {
        match self {
            Self::Cancel(cause) | Self::Abort(cause) => cause,
            Self::TimeOut => Cause::TimedOut,
        }
    }

    /// What becomes of it when the task was asked, and its grace is over.
    pub(crate) const fn after_grace(self) -> Self {
        match self {
            Self::Cancel(cause) | Self::Abort(cause) => Self::Abort(cause),
            Self::TimeOut => Self::TimeOut,
        }
    }
}

pin_project! {
    /// What is spawned: the user's future as a member of its set.
    ///
    /// The runtime drops it as soon as it is ready, before it stores the result, and catches what
    /// panics then. So a task's end is booked when its last destructor has run: by the drop of
    /// `member`, which comes after that of `future`.
    #[must_use = "futures do nothing unless polled"]
    pub(crate) struct Tracked<F> {
        #[pin]
        future: F,
        member: Member,
    }

    impl<F> PinnedDrop for Tracked<F> {
        fn drop(this: Pin<&mut Self>) {
            this.project().member.enter_drop();
        }
    }
}

impl<F> Tracked<F> {
    pub(crate) const fn new(future: F, member: Member) -> Self {
        Self { future, member }
    }
}

impl<F: Future> Future for Tracked<F> {
    type Output = Result<F::Output, TaskError>;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let this = self.project();
        match this.member.poll(|| this.future.poll(cx)) {
            Ok(Poll::Ready(output)) => Poll::Ready(Ok(output)),
            Ok(Poll::Pending) => match this.member.wait(cx) {
                Some(order) => Poll::Ready(Err(this.member.obey(order))),
                None => Poll::Pending,
            },
            Err(error) => Poll::Ready(Err(error)),
        }
    }
}

pin_project! {
    /// A graceful task: what makes its future, and then that. Made in the first poll, so that what
    /// makes it runs in the task too.
    #[project = StageOf]
    pub(crate) enum Graceful<M, F> {
        Made { make: Option<(M, StopToken)> },
        Runs { #[pin] future: F },
    }
}

impl<M, F> Graceful<M, F> {
    pub(crate) const fn new(make: M, stop: StopToken) -> Self {
        Self::Made { make: Some((make, stop)) }
    }
}

impl<M, F> Future for Graceful<M, F>
where
    M: FnOnce(StopToken) -> F,
    F: Future,
{
    type Output = F::Output;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<F::Output> {
        loop {
            match self.as_mut().project() {
                StageOf::Runs { future } => return future.poll(cx),
                StageOf::Made { make } => {
                    let (make, stop) = make.take().expect("it is not polled after a panic");
                    let future = make(stop);
                    self.set(Self::Runs { future });
                }
            }
        }
    }
}

/// A closure that blocks, as a future that is ready when it was polled once.
pub(crate) struct Blocking<F>(Option<(F, StopToken)>);

impl<F> Blocking<F> {
    pub(crate) const fn new(closure: F, stop: StopToken) -> Self {
        Self(Some((closure, stop)))
    }
}

// It is called by value, and never where it lies.
impl<F> Unpin for Blocking<F> {}

impl<F, T> Future for Blocking<F>
where
    F: FnOnce(StopToken) -> T,
{
    type Output = T;

    fn poll(mut self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<T> {
        let (closure, stop) = self.0.take().expect("it is polled once");
        Poll::Ready(closure(stop))
    }
}

/// A task's place in its set, from the spawn to the last destructor.
///
/// 16 bytes: what this adds to a task's allocation. The runtime rounds that up to 128, so that a
/// few bytes more may double a small task.
pub(crate) struct Member {
    /// `None` only while the task's code runs: the set is then the current one of the thread.
    pub(crate) set: Option<Arc<Set>>,
    pub(crate) slot: u32,
    pub(crate) outcome: Option<Outcome>,
    /// The set keeps a [`Home`](crate::set::Home) of it, or tells an observer of its end.
    pub(crate) has_home: bool,
    phase: Phase,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Phase {
    Started,
    /// It has come to an await, and the set has its waker.
    Waits,
    /// Its future is ready and about to be dropped. What that is dropped in was not left: the set,
    /// and perhaps the task's context.
    Stays {
        in_scope: bool,
    },
    /// Its future is being dropped, in what these bits say.
    Dropping(u8),
}

/// Bits of [`Phase::Dropping`]: something else was unwinding by then.
const UNWINDING: u8 = 1;
/// The task's context was entered.
const IN_SCOPE: u8 = 1 << 1;
/// The set is told of panics.
const OBSERVED: u8 = 1 << 2;

impl Member {
    pub(crate) const fn new(set: Arc<Set>, slot: u32, has_home: bool) -> Self {
        Self { set: Some(set), slot, outcome: None, has_home, phase: Phase::Started }
    }

    #[inline]
    fn set(&self) -> &Arc<Set> {
        self.set.as_ref().expect("the set is here while the task's code does not run")
    }

    #[inline]
    fn obey(&mut self, order: Order) -> TaskError {
        self.outcome = Some(order.outcome());
        order.error()
    }

    /// Polls the task's future, unless it was told to end: in its set, context and span. A panic is
    /// caught and told.
    #[inline]
    fn poll<T>(&mut self, poll: impl FnOnce() -> Poll<T>) -> Result<Poll<T>, TaskError> {
        let mut marks = self.set().marks();
        if marks & ORDERS != 0 {
            if let Some(order) = self.set().order(self.slot) {
                return Err(self.obey(order));
            }
        }
        if self.has_home {
            marks |= CONTEXT;
        }
        let (mut away, mut level) = (None, Level::Free);
        let mut outside = None;
        if marks != 0 {
            level = self.set().level().raise();
            if marks & CONTEXT != 0 {
                if !self.has_home && Scope::lend(current_task) {
                    marks = marks & !CONTEXT | LENT;
                } else {
                    self.set().enter_home(self.slot, self.has_home, &mut away);
                }
            }
            // From here on nothing unwinds until it is put back.
            if marks & MAY_FAIL != 0 {
                outside = Some(unwinding::replace(Some(Observed::new(self.set().clone()))));
            }
        }
        let inside = InTask::enter(self.set.take(), self.slot);
        let mut result = Poll::Pending;
        // No guard that leaves: nothing unwinds past this.
        let caught = catch(|| result = poll());
        let is_plain = marks & (CONTEXT | MAY_FAIL) == 0;
        if caught.is_ok() && result.is_ready() && is_plain && inside.is_from_nowhere() {
            // Who polls it drops it now: its destructors run in the set too.
            self.phase = Phase::Stays { in_scope: marks & LENT != 0 };
            self.outcome = Some(Outcome::Completed);
            inside.stay();
            if marks != 0 {
                Level::leave(level);
            }
            forget((away, caught));
            return Ok(result);
        }
        let caught = caught.map_err(|panic| self.tell(panic));
        forget(replace(&mut self.set, inside.leave()));
        if let Some(outside) = outside {
            self.end_unwinding(outside);
        }
        if marks & CONTEXT != 0 {
            self.has_home |= self.set().leave_home(self.slot, &mut away);
        } else if marks & LENT != 0 {
            if let Some(scope) = Scope::take_back() {
                self.has_home = self.set().keep(self.slot, scope);
            }
        }
        if marks != 0 {
            Level::leave(level);
        }
        // It is `None` by now, which the compiler does not see.
        forget(away);
        match caught {
            Err(panic) => {
                self.outcome = Some(Outcome::Panicked);
                Err(TaskError::Panicked(panic))
            }
            Ok(()) => {
                if result.is_ready() {
                    self.outcome = Some(Outcome::Completed);
                }
                Ok(result)
            }
        }
    }

    /// Out of line: it is rare, and there is one for each type of future otherwise.
    #[cold]
    #[inline(never)]
    fn tell(&self, panic: Panic) -> Panic {
        match place::current() {
            Some(set) => set.tell_panic(self.slot, panic),
            None => panic,
        }
    }

    /// The set is told of panics no more, but who was before.
    #[cold]
    #[inline(never)]
    fn end_unwinding(&self, outside: Option<Observed>) {
        if unwinding::replace(outside).is_some_and(|observed| observed.has_begun()) {
            self.set().end_unwinding();
        }
    }

    #[cold]
    #[inline(never)]
    fn tell_drop(&mut self) {
        let first = self.outcome.replace(Outcome::Panicked);
        if let Some(set) = self.set.as_ref().filter(|_| first != Some(Outcome::Panicked)) {
            // For the ids: what was lent is the task's no more.
            set.in_some_context(|| set.tell_drop_panic(self.slot, destructor::panic()));
        }
    }

    /// The task has come to an await. The waker is registered once, and then looked again for an
    /// order: one that was given before the set knew the waker has woken nobody.
    #[inline]
    fn wait(&mut self, cx: &Context<'_>) -> Option<Order> {
        if self.phase == Phase::Waits {
            return None;
        }
        self.phase = Phase::Waits;
        self.set().wait(self.slot, cx.waker())
    }

    /// The future is about to be dropped: in its set and context too. `Drop` leaves them.
    ///
    /// There is no place to keep what was current before. So this is done only where nothing was:
    /// always, but where a dead runtime drops a future in the middle of its spawn.
    #[inline]
    fn enter_drop(&mut self) {
        let mut dropping = if thread::panicking() { UNWINDING } else { 0 };
        dropping |= match self.phase {
            Phase::Stays { in_scope: true } => IN_SCOPE,
            Phase::Stays { in_scope: false } => 0,
            _ => self.enter_to_drop(),
        };
        destructor::enter();
        self.phase = Phase::Dropping(dropping);
    }

    /// What it has entered.
    #[inline(never)]
    fn enter_to_drop(&mut self) -> u8 {
        let set = self.set();
        let marks = set.marks();
        let is_away = self.has_home || marks & CONTEXT != 0;
        let mut entered = 0;
        if is_away && set.enter_drop(self.slot, self.has_home) {
            entered |= IN_SCOPE;
        }
        if marks & MAY_FAIL != 0 {
            let outside = unwinding::replace(Some(Observed::new(set.clone())));
            if outside.is_some() {
                unwinding::replace(outside);
            } else {
                entered |= OBSERVED;
            }
        }
        let inside = InTask::enter(self.set.take(), self.slot);
        if inside.is_from_nowhere() {
            inside.stay();
        } else {
            self.set = inside.leave();
        }
        entered
    }
}

impl Drop for Member {
    #[inline]
    fn drop(&mut self) {
        let obeyed = self.outcome;
        let mut was_in_scope = false;
        if let Phase::Dropping(dropping) = self.phase {
            was_in_scope = dropping & IN_SCOPE != 0;
            if self.set.is_none() {
                forget(replace(&mut self.set, InTask::take()));
            }
            if thread::panicking() && dropping & UNWINDING == 0 {
                // A destructor of the task's has.
                self.tell_drop();
            }
            if dropping & OBSERVED != 0 {
                self.end_unwinding(None);
            }
            destructor::leave();
        }
        let Some(set) = self.set.take() else { return };
        if was_in_scope {
            set.leave_drop(self.slot, self.has_home);
        }
        let outcome = self.outcome.unwrap_or(Outcome::Aborted);
        set.leave(self.slot, self.has_home, obeyed, outcome);
        set.release();
    }
}

/// A task of a set: a future of its result.
///
/// Dropping it changes nothing: the task goes on, and its result is dropped.
///
/// # Cancel safety
///
/// It can be polled in a `select!`: the result stays until it is taken.
// Not `must_use`: most tasks are started to go on by themselves.
pub struct TaskHandle<T> {
    join: tokio::task::JoinHandle<Result<T, TaskError>>,
    canceller: Canceller,
}

impl<T> TaskHandle<T> {
    pub(crate) const fn new(
        join: tokio::task::JoinHandle<Result<T, TaskError>>,
        canceller: Canceller,
    ) -> Self {
        Self { join, canceller }
    }

    /// Tells the task to end, for [`Cause::Requested`]: it is dropped at its next await. A task
    /// that has ended, or never awaits, is not affected.
    pub fn cancel(&self) {
        if !self.join.is_finished() {
            self.canceller.cancel(Cause::Requested);
        }
    }

    /// Whether the task has ended, and its destructors have run.
    pub fn is_finished(&self) -> bool {
        self.join.is_finished()
    }

    /// The id that tokio gave the task.
    pub fn id(&self) -> tokio::task::Id {
        self.join.id()
    }

    /// Something to cancel the task with, without its result.
    pub fn cancel_handle(&self) -> CancelHandle {
        CancelHandle { task: self.join.abort_handle(), canceller: self.canceller.clone() }
    }
}

impl<T> Future for TaskHandle<T> {
    type Output = Result<T, TaskError>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        Poll::Ready(match ready!(Pin::new(&mut self.join).poll(cx)) {
            Ok(result) => result,
            Err(error) => Err(match error.try_into_panic() {
                // Caught by the runtime: of the destructors.
                Ok(payload) => TaskError::Panicked(self.canceller.drop_panic(payload)),
                // Not by us: we never abort a task.
                Err(_) => TaskError::Aborted(Cause::Shutdown),
            }),
        })
    }
}

impl<T> fmt::Debug for TaskHandle<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TaskHandle")
            .field("id", &self.id())
            .field("is_finished", &self.is_finished())
            .finish()
    }
}

/// Cancels a task. A clone cancels the same task; dropping it changes nothing.
#[derive(Clone)]
pub struct CancelHandle {
    task: tokio::task::AbortHandle,
    canceller: Canceller,
}

impl CancelHandle {
    /// Tells the task to end: see [`TaskHandle::cancel`].
    pub fn cancel(&self) {
        if !self.task.is_finished() {
            self.canceller.cancel(Cause::Requested);
        }
    }

    /// Whether the task has ended, and its destructors have run.
    pub fn is_finished(&self) -> bool {
        self.task.is_finished()
    }

    /// The id that tokio gave the task.
    pub fn id(&self) -> tokio::task::Id {
        self.task.id()
    }
}

impl fmt::Debug for CancelHandle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("CancelHandle")
            .field("id", &self.id())
            .field("is_finished", &self.is_finished())
            .finish()
    }
}

/// Which task of which set.
#[derive(Clone)]
pub(crate) struct Canceller {
    pub(crate) set: Arc<Set>,
    pub(crate) slot: u32,
    /// Slots are used again; this says for which time.
    pub(crate) generation: u16,
    pub(crate) kind: u16,
}

impl Canceller {
    pub(crate) fn cancel(&self, cause: Cause) {
        self.set.cancel_task(self.slot, self.generation, cause);
    }

    pub(crate) fn name(&self) -> &'static str {
        self.set.kind(self.kind).0
    }

    fn drop_panic(&self, payload: Box<dyn Any + Send>) -> Panic {
        self.set.drop_panic(self, payload)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_task_is_16_bytes_larger_than_its_future() {
        assert_eq!(size_of::<Member>(), 16);
        assert_eq!(size_of::<Tracked<[u8; 1]>>(), 24);
        assert_eq!(size_of::<Tracked<[u64; 2]>>(), 32);
        assert_eq!(size_of::<Tracked<[u64; 19]>>(), 168);
        assert_eq!(size_of::<TaskHandle<()>>(), 24);
    }

    #[test]
    fn a_graceful_task_with_its_token_is_at_most_32_bytes_larger_than_its_future() {
        type Keeps<F> = (F, StopToken);
        assert!(size_of::<Tracked<Graceful<(), Keeps<[u8; 1]>>>>() <= 8 + 32);
        assert!(size_of::<Tracked<Graceful<(), Keeps<[u64; 2]>>>>() <= 16 + 32);
        assert!(size_of::<Tracked<Graceful<[u64; 2], Keeps<[u64; 19]>>>>() <= 152 + 32);
    }

    #[test]
    fn an_error_does_not_make_a_task_larger() {
        type Stored<T> = Result<T, tokio::task::JoinError>;
        assert!(size_of::<TaskError>() <= 16);
        assert_eq!(size_of::<Stored<Result<(), TaskError>>>(), size_of::<Stored<()>>());
    }
}
