use std::{
    any::Any,
    fmt::{self, Write},
    future::{Future, pending, ready},
    panic::{AssertUnwindSafe, catch_unwind},
    pin::{Pin, pin},
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering::SeqCst},
        mpsc,
    },
    task::{Context, Poll, Waker},
    time::Duration,
};

use bytes::Bytes;
use http::{Request, Response};
use http_body::{Body, Frame, SizeHint};
use tokio::{
    runtime::{Builder, Runtime},
    sync::oneshot,
};
use tower::{Layer, Service};
use tower_task_set::{
    Cause, Counts, End, ResponseBody, TaskError, TaskHandle, TaskRegistry, TaskSet, TaskSetLayer,
};

pub(crate) const ENDS: [End; 4] = [End::Completed, End::Failed, End::Panicked, End::Disconnected];

pub(crate) const fn secs(secs: u64) -> Duration {
    Duration::from_secs(secs)
}

pub(crate) fn cause(end: End) -> Cause {
    end.into()
}

/// A request whose handler has answered, and whose body is still to be sent.
pub(crate) struct Served<B: Body = ResponseBody<Script>> {
    /// The set that was current in the handler.
    pub(crate) set: TaskSet,
    pub(crate) body: Pin<Box<B>>,
    script: mpsc::Sender<Step>,
}

type Data = Bytes;
type Step = Box<dyn FnOnce() -> Poll<Option<Result<Frame<Data>, Broken>>> + Send>;

pub(crate) fn serve(layer: &TaskSetLayer) -> Served {
    serve_through(|handler| layer.layer(handler))
}

/// The same, through what `wrap` puts around the handler.
pub(crate) fn serve_through<S, B>(wrap: impl FnOnce(Handler) -> S) -> Served<B>
where
    S: Service<Request<()>, Response = Response<B>, Error = Broken>,
    B: Body<Data = Data>,
{
    let (script, steps) = mpsc::channel();
    let mut service = wrap(Handler(Some(Script { steps, on_drop: None })));
    let response = now(service.call(Request::new(()))).unwrap();
    let set = response.extensions().get::<TaskSet>().unwrap().clone();
    Served { set, body: Box::pin(response.into_body()), script }
}

impl<B: Body<Data = Data>> Served<B> {
    /// Ends the response like this.
    pub(crate) fn end(mut self, end: End) {
        match end {
            End::Completed => drop(self.poll(|| Poll::Ready(None))),
            End::Failed => drop(self.poll(|| Poll::Ready(Some(Err(Broken))))),
            End::Panicked => {
                let poll = || self.poll(|| panic!("the body panics"));
                assert!(catch_unwind(AssertUnwindSafe(poll)).is_err());
            }
            _ => {}
        }
    }

    /// Runs `f` in a poll of the body.
    pub(crate) fn in_poll<R: Send + 'static>(
        &mut self,
        f: impl FnOnce() -> R + Send + 'static,
    ) -> R {
        let (tell, told) = mpsc::channel();
        let poll = self.poll(move || {
            tell.send(f()).unwrap();
            Poll::Pending
        });
        assert!(poll.is_pending());
        told.recv().unwrap()
    }

    /// Polls the body, which awaits, with this waker.
    pub(crate) fn wait(&mut self, waker: &Waker) {
        assert!(self.body.as_mut().poll_frame(&mut Context::from_waker(waker)).is_pending());
    }

    /// What the body does in its next poll.
    pub(crate) fn send(
        &self,
        step: impl FnOnce() -> Poll<Option<Result<Frame<Data>, Broken>>> + Send + 'static,
    ) {
        self.script.send(Box::new(step)).unwrap();
    }

    pub(crate) fn poll(
        &mut self,
        step: impl FnOnce() -> Poll<Option<Result<Frame<Data>, Broken>>> + Send + 'static,
    ) -> Poll<Option<Result<Frame<Data>, B::Error>>> {
        self.send(step);
        self.body.as_mut().poll_frame(&mut Context::from_waker(Waker::noop()))
    }
}

/// Answers at once, with the set that is current in it.
pub(crate) struct Handler(Option<Script>);

impl Service<Request<()>> for Handler {
    type Response = Response<Script>;
    type Error = Broken;
    type Future = std::future::Ready<Result<Self::Response, Broken>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Broken>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, _: Request<()>) -> Self::Future {
        let mut response = Response::new(self.0.take().unwrap());
        response.extensions_mut().insert(TaskSet::current().unwrap());
        ready(Ok(response))
    }
}

/// A body that does in each poll what it is sent.
pub(crate) struct Script {
    steps: mpsc::Receiver<Step>,
    pub(crate) on_drop: Option<Box<dyn FnOnce() + Send>>,
}

impl Script {
    /// A body that never yields anything, and does this when it is dropped.
    pub(crate) fn on_drop(f: impl FnOnce() + Send + 'static) -> Self {
        Self { steps: mpsc::channel().1, on_drop: Some(Box::new(f)) }
    }
}

impl Body for Script {
    type Data = Data;
    type Error = Broken;

    fn poll_frame(
        self: Pin<&mut Self>,
        _: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Data>, Broken>>> {
        self.steps.try_recv().map_or(Poll::Pending, |step| step())
    }

    fn is_end_stream(&self) -> bool {
        false
    }

    fn size_hint(&self) -> SizeHint {
        SizeHint::default()
    }
}

impl Drop for Script {
    fn drop(&mut self) {
        if let Some(on_drop) = self.on_drop.take() {
            on_drop();
        }
    }
}

#[derive(Clone, Copy, Debug)]
pub(crate) struct Broken;

impl fmt::Display for Broken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("broken")
    }
}

impl std::error::Error for Broken {}

/// The output of a future that is ready at its first poll.
#[track_caller]
pub(crate) fn now<F: Future>(future: F) -> F::Output {
    match poll_once(pin!(future)) {
        Poll::Ready(output) => output,
        Poll::Pending => panic!("it is not ready"),
    }
}

pub(crate) fn poll_once<F: Future>(future: Pin<&mut F>) -> Poll<F::Output> {
    future.poll(&mut Context::from_waker(Waker::noop()))
}

/// What a handle yielded.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Yield<T = ()> {
    Completed(T),
    Cancelled(Cause),
    Aborted(Cause),
    TimedOut,
    /// With this message.
    Panicked(String),
}

pub(crate) const COMPLETED: Yield = Yield::Completed(());

pub(crate) async fn outcome<T>(handle: TaskHandle<T>) -> Yield<T> {
    yielded(handle.await)
}

pub(crate) fn yielded<T>(result: Result<T, TaskError>) -> Yield<T> {
    match result {
        Ok(value) => Yield::Completed(value),
        Err(TaskError::Cancelled(cause)) => Yield::Cancelled(cause),
        Err(TaskError::Aborted(cause)) => Yield::Aborted(cause),
        Err(TaskError::TimedOut) => Yield::TimedOut,
        Err(TaskError::Panicked(panic)) => Yield::Panicked(panic.message().to_owned()),
        Err(error) => panic!("{error}"),
    }
}

/// Asserts what the ledger says: `"refused 1, live 2, completed 3"`, without what is none. What was
/// attempted and spawned follows from that.
#[track_caller]
pub(crate) fn assert_ledger(tasks: &TaskRegistry, expected: &str) {
    let snapshot = tasks.snapshot();
    let totals = snapshot.totals;
    assert!(totals.is_exact(), "{totals:?}");
    assert!(snapshot.by_name.values().all(Counts::is_exact), "{snapshot:?}");
    assert_eq!(usize::try_from(totals.live), Ok(snapshot.live_tasks.len()));
    let mut found = String::new();
    for (name, count) in [
        ("refused", totals.refused),
        ("live", totals.live),
        ("completed", totals.completed),
        ("cancelled", totals.cancelled),
        ("aborted", totals.aborted),
        ("timed out", totals.timed_out),
        ("panicked", totals.panicked),
    ] {
        if count > 0 {
            let comma = if found.is_empty() { "" } else { ", " };
            write!(found, "{comma}{name} {count}").unwrap();
        }
    }
    assert_eq!(found, expected);
}

/// Runs what can run now.
pub(crate) async fn settle() {
    for _ in 0..8 {
        tokio::task::yield_now().await;
    }
}

/// What a task waits at until it is opened; dropped, it is open too.
pub(crate) fn gate() -> (oneshot::Sender<()>, impl Future<Output = ()> + Send) {
    let (open, gate) = oneshot::channel();
    (open, async {
        let _ = gate.await;
    })
}

pub(crate) fn forever() -> impl Future<Output = ()> + Send {
    pending()
}

/// Never drops it. A leak check finds it all the same.
pub(crate) fn leak<T: Any + Send + Sync>(value: T) -> &'static T {
    static LEAKED: Mutex<Vec<&'static (dyn Any + Send + Sync)>> = Mutex::new(Vec::new());
    let value: &'static T = Box::leak(Box::new(value));
    LEAKED.lock().unwrap().push(value);
    value
}

/// Says whether it was dropped.
#[derive(Clone, Debug, Default)]
pub(crate) struct Flag(Arc<AtomicBool>);

impl Flag {
    pub(crate) fn set(&self) {
        self.0.store(true, SeqCst);
    }

    pub(crate) fn is_set(&self) -> bool {
        self.0.load(SeqCst)
    }

    /// Sets it when what this returns is dropped.
    pub(crate) fn on_drop(&self) -> impl Send + Sync + use<> {
        let flag = self.clone();
        OnDrop::new(move || flag.set())
    }
}

/// Runs a closure when it is dropped.
pub(crate) struct OnDrop<F: FnOnce()>(Option<F>);

impl<F: FnOnce()> OnDrop<F> {
    pub(crate) const fn new(f: F) -> Self {
        Self(Some(f))
    }
}

impl<F: FnOnce()> Drop for OnDrop<F> {
    fn drop(&mut self) {
        if let Some(f) = self.0.take() {
            f();
        }
    }
}

/// A list that several write.
pub(crate) struct Log<T>(Arc<Mutex<Vec<T>>>);

impl<T> Log<T> {
    pub(crate) fn new() -> Self {
        Self(Arc::default())
    }

    pub(crate) fn push(&self, entry: T) {
        self.0.lock().unwrap().push(entry);
    }

    pub(crate) fn take(&self) -> Vec<T> {
        std::mem::take(&mut *self.0.lock().unwrap())
    }
}

impl<T> Clone for Log<T> {
    fn clone(&self) -> Self {
        Self(self.0.clone())
    }
}

pub(crate) fn current_thread() -> Runtime {
    Builder::new_current_thread().enable_all().build().unwrap()
}

pub(crate) fn multi_thread() -> Runtime {
    Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap()
}
