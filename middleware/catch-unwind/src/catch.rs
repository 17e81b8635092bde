use std::{
    any::Any,
    backtrace::Backtrace,
    fmt, mem,
    panic::{AssertUnwindSafe, Location, catch_unwind},
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    thread,
};

use pin_project_lite::pin_project;
use tower_request_context::{RequestContext, RequestId, TraceId};

use crate::hook::{self, Record, Site};

pin_project! {
    /// A future that yields [`Panic`] if `F` panics, in a poll or in its drop.
    ///
    /// `F` is dropped when it is ready or has panicked, and never polled again.
    ///
    /// # Cancel safety
    ///
    /// Cancel safe if `F` is. A panic in the drop of an `F` that was not ready is contained, and
    /// seen by the panic hook alone, also while another panic unwinds the thread.
    #[derive(Debug)]
    #[must_use = "futures do nothing unless polled"]
    pub struct CatchUnwind<F> {
        // `None` once it is ready.
        #[pin]
        future: Option<F>,
    }

    impl<F> PinnedDrop for CatchUnwind<F> {
        fn drop(this: Pin<&mut Self>) {
            let mut this = this.project();
            if this.future.is_some() {
                drop(catch(|| this.future.set(None)));
            }
        }
    }
}

impl<F> CatchUnwind<F> {
    /// Catches the panics of `future`.
    pub const fn new(future: F) -> Self {
        Self { future: Some(future) }
    }
}

impl<F: Future> Future for CatchUnwind<F> {
    type Output = Result<F::Output, Panic>;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let mut future = self.project().future;
        let inner = future.as_mut().as_pin_mut().expect("polled after it was ready");
        let output = match catch(|| inner.poll(cx)) {
            Ok(Poll::Pending) => return Poll::Pending,
            Ok(Poll::Ready(output)) => Ok(output),
            Err(panic) => Err(panic),
        };
        match catch(|| future.set(None)) {
            Err(panic) if output.is_ok() => {
                drop(catch(|| drop(output)));
                Poll::Ready(Err(panic))
            }
            // Of two panics the first one is told.
            _ => Poll::Ready(output),
        }
    }
}

/// Calls `f`, and yields [`Panic`] if it panics.
///
/// What `f` has broken when it panics is the caller's concern: it is not asked to be unwind safe.
#[inline]
pub fn catch<R>(f: impl FnOnce() -> R) -> Result<R, Panic> {
    catch_with(f, Panic::new)
}

/// Calls `f`, and `on_panic` with its payload if it panics, which must not panic.
#[inline]
pub(crate) fn catch_with<R, T>(
    f: impl FnOnce() -> R,
    on_panic: impl FnOnce(Box<dyn Any + Send>) -> T,
) -> Result<R, T> {
    hook::enter();
    // No guard that leaves: nothing unwinds past this.
    let result = catch_unwind(AssertUnwindSafe(f)).map_err(on_panic);
    hook::leave();
    result
}

/// A panic that was caught.
///
/// Found in a response's extensions, it marks the response as the answer to a panic.
#[derive(Clone)]
pub struct Panic(Arc<Caught>);

#[derive(Clone)]
struct Caught {
    message: Box<str>,
    location: Option<Site>,
    backtrace: Option<Arc<Backtrace>>,
    thread: Option<Box<str>>,
    task: Option<(&'static str, &'static Location<'static>)>,
    trace_id: Option<TraceId>,
    request_id: Option<RequestId>,
}

impl Panic {
    /// The longest message, in bytes of UTF-8. What is longer is cut.
    pub const MESSAGE_MAX: usize = 1024;

    /// Of what `std::panic::catch_unwind` or a `JoinError` has caught, here and now: the ids are
    /// those of the current request, the thread is this one.
    ///
    /// The payload is dropped. If that panics, the panic is contained.
    #[cold]
    pub fn new(payload: Box<dyn Any + Send>) -> Self {
        let panic = Self::of(&*payload);
        discard(payload);
        panic
    }

    /// As [`new`](Self::new), of a payload that is still needed.
    pub(crate) fn of(payload: &(dyn Any + Send)) -> Self {
        let message = message_of(payload);
        let record = hook::take(&message, payload);
        let (location, backtrace) =
            record.map(|record| (record.site, record.backtrace)).unwrap_or_default();
        Self::here_and_now(message, location, backtrace)
    }

    /// Of a panic that is not caught yet.
    pub(crate) fn of_record(record: Record) -> Self {
        Self::here_and_now(record.message, record.site, record.backtrace)
    }

    fn here_and_now(
        message: Box<str>,
        location: Option<Site>,
        backtrace: Option<Arc<Backtrace>>,
    ) -> Self {
        let (trace_id, request_id) = current_ids();
        Self(Arc::new(Caught {
            message,
            location,
            backtrace,
            thread: thread::current().name().map(Into::into),
            task: None,
            trace_id,
            request_id,
        }))
    }

    /// With the ids of the current request, if it has none.
    pub(crate) fn here(mut self) -> Self {
        if self.0.trace_id.is_none() && self.0.request_id.is_none() {
            let caught = Arc::make_mut(&mut self.0);
            (caught.trace_id, caught.request_id) = current_ids();
        }
        self
    }

    /// Says in which task it happened: its name, and where it was spawned.
    pub fn in_task(mut self, name: &'static str, site: &'static Location<'static>) -> Self {
        Arc::make_mut(&mut self.0).task = Some((name, site));
        self
    }

    /// What was said, escaped so that it can go into any log as it is, and cut at
    /// [`MESSAGE_MAX`](Self::MESSAGE_MAX) bytes.
    pub fn message(&self) -> &str {
        &self.0.message
    }

    /// Where it happened, if a hook [records](crate::record) and it was caught in
    /// [`catch`](crate::catch()), as everything here is. `None` too where that cannot be told:
    /// another with the same literal message was caught by others meanwhile, or many were.
    pub fn location(&self) -> Option<&Site> {
        self.0.location.as_ref()
    }

    /// The backtrace, where there is a [`location`](Self::location) and `RUST_BACKTRACE` or
    /// `RUST_LIB_BACKTRACE` asks for one.
    pub fn backtrace(&self) -> Option<&Backtrace> {
        self.0.backtrace.as_deref()
    }

    /// The name of the thread, if it has one.
    pub fn thread(&self) -> Option<&str> {
        self.0.thread.as_deref()
    }

    /// The name of the task, if it was in one.
    pub fn task(&self) -> Option<&'static str> {
        self.0.task.map(|(name, _)| name)
    }

    /// Where the task was spawned, if it was in one.
    pub fn spawn_site(&self) -> Option<&'static Location<'static>> {
        self.0.task.map(|(_, site)| site)
    }

    /// The trace id of the request, if it has one.
    pub fn trace_id(&self) -> Option<TraceId> {
        self.0.trace_id
    }

    /// The id of the request, if it has one.
    pub fn request_id(&self) -> Option<&RequestId> {
        self.0.request_id.as_ref()
    }
}

impl fmt::Display for Panic {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some((name, site)) = self.0.task {
            write!(f, "task {name} (spawned at {site}) ")?;
        }
        match self.location() {
            Some(location) => write!(f, "panicked at {location}: {}", self.message()),
            None => write!(f, "panicked: {}", self.message()),
        }
    }
}

impl fmt::Debug for Panic {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Panic")
            .field("message", &self.message())
            .field("location", &self.location())
            .field("thread", &self.thread())
            .field("task", &self.task())
            .field("spawn_site", &self.spawn_site())
            .field("trace_id", &self.trace_id())
            .field("request_id", &self.request_id())
            .finish()
    }
}

impl std::error::Error for Panic {}

fn current_ids() -> (Option<TraceId>, Option<RequestId>) {
    // A value that the task inherits is made by user code, perhaps only now.
    let ids = catch_unwind(AssertUnwindSafe(|| {
        let context = RequestContext::current();
        (context.get().copied(), context.get().cloned())
    }));
    ids.map_err(discard).unwrap_or_default()
}

/// Drops a payload. If that panics, the second one is leaked: its drop may panic as well, and so on
/// for ever (rust-lang/rust#86027).
fn discard(payload: Box<dyn Any + Send>) {
    let dropped = catch_unwind(AssertUnwindSafe(|| drop(payload)));
    dropped.unwrap_or_else(mem::forget);
}

/// What a panic with this payload says, short and escaped.
pub(crate) fn message_of(payload: &(dyn Any + Send)) -> Box<str> {
    if let Some(message) = payload.downcast_ref::<&str>() {
        escape(message, Panic::MESSAGE_MAX)
    } else if let Some(message) = payload.downcast_ref::<String>() {
        escape(message, Panic::MESSAGE_MAX)
    } else {
        "(the payload is not a string)".into()
    }
}

/// At most `max` bytes, without a line end, an escape sequence or anything else that does not
/// print.
pub(crate) fn escape(text: &str, max: usize) -> Box<str> {
    let mut escaped = String::new();
    for char in text.chars() {
        let end = escaped.len();
        match char {
            // `escape_debug` would escape these for a literal, which this is not.
            '"' | '\'' => escaped.push(char),
            _ => escaped.extend(char.escape_debug()),
        }
        if escaped.len() > max {
            escaped.truncate(end);
            break;
        }
    }
    escaped.into()
}
