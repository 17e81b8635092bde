//! Random schedules of all that can happen to tasks, against a plain sequential model of what the
//! docs say: after each step the ledger is the model's, and so is at last what each handle yields.
//!
//! `SCHEDULES=100000 cargo test --release -p tower-tasks-tests --test state_machine` for more.

#![allow(clippy::unwrap_used)]

use std::{
    collections::BTreeMap,
    convert::Infallible,
    env,
    panic::{self, AssertUnwindSafe, catch_unwind},
    pin::{Pin, pin},
    sync::Once,
    task::{Context, Poll, Waker},
    thread,
    time::Duration,
};

use bytes::Bytes;
use http::{Request, Response};
use http_body::{Body, Frame};
use proptest::{collection::vec, option, prelude::*};
use tokio::{
    runtime::Builder,
    sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel},
    task::yield_now,
};
use tower::{Layer, Service, service_fn};
use tower_tasks::{
    AtEnd, End, SpawnError, SpawnLimit, TaskError, TaskHandle, TaskRegistry, TaskSet, TaskSetLayer,
    task_set::{
        Cause, FailFast, Group, GroupHandle, Hold, NewTask, OnPanic, ResponseBody, StopToken,
        TaskState,
    },
};

const LIMIT: usize = 7;
const PER_REQUEST: usize = 4;

/// In milliseconds. Time goes by in fours, and no deadline is a multiple of that: none comes just
/// when the ledger is read, nor a timeout together with another. Some are near for the reaper and
/// some are far.
const PASSES: [u64; 4] = [8, 20, 2_000, 10_000];
const CHOSEN: [u64; 3] = [5, 33, 3_001];
const TIMEOUTS: [u64; 3] = [3, 31, 2_999];

#[derive(Clone, Copy, Debug)]
enum Kind {
    /// It does what it is sent.
    Ordinary,
    /// It panics when it is dropped, if it has started.
    Bomb,
    /// It ends when it is told to.
    Graceful,
    /// It does not, and has this grace.
    Deaf(u64),
}

impl Kind {
    const fn name(self) -> &'static str {
        match self {
            Self::Ordinary => "ordinary",
            Self::Bomb => "bomb",
            Self::Graceful => "graceful",
            Self::Deaf(_) => "deaf",
        }
    }
}

#[derive(Clone, Copy, Debug)]
enum Life {
    Cancel,
    DrainZero,
    Drain(u64),
    Keep,
}

impl From<Life> for AtEnd {
    fn from(life: Life) -> Self {
        match life {
            Life::Cancel => Self::Cancel,
            Life::DrainZero => Self::Drain(Duration::ZERO),
            Life::Drain(time) => Self::Drain(Duration::from_millis(time)),
            Life::Keep => Self::Keep,
        }
    }
}

#[derive(Clone, Debug)]
struct Choice {
    kind: Kind,
    at_end: Option<Life>,
    on: Option<(End, Life)>,
    /// Of an ordinary task.
    timeout: Option<u64>,
    on_panic: Option<OnPanic>,
}

/// Requests, tasks and groups are named by numbers that are taken modulo how many there are.
#[derive(Clone, Debug)]
enum Step {
    Begin(Life, Option<(End, Life)>, Option<OnPanic>),
    Spawn(usize, Choice),
    SpawnOfRegistry(Choice),
    Nest(usize, Choice),
    /// Of a request or of none; whether it fails fast, and its limit.
    Group(Option<usize>, bool, Option<usize>),
    SpawnInGroup(usize, Choice),
    CancelGroup(usize),
    DropGroup(usize),
    /// Dropped, if it would have to wait.
    WaitForGroup(usize),
    Finish(usize),
    /// By an error, if it is in a group that fails fast.
    Fail(usize),
    Panic(usize),
    CancelTask(usize),
    CancelSet(usize),
    CancelAll,
    AbortAll,
    Close,
    End(usize, End),
    /// The server asks for more of the body.
    Look(usize),
    Hold(usize),
    LetGo(usize),
    DropHandle(usize),
    Pass(u64),
    SetLimit(usize),
}

fn life() -> impl Strategy<Value = Life> {
    prop_oneof![
        Just(Life::Cancel),
        Just(Life::DrainZero),
        prop::sample::select(&CHOSEN[..]).prop_map(Life::Drain),
        Just(Life::Keep),
    ]
}

fn on_panic() -> impl Strategy<Value = Option<OnPanic>> {
    let choices = vec![OnPanic::Isolate, OnPanic::CancelSiblings, OnPanic::FailResponse];
    option::weighted(0.15, prop::sample::select(choices))
}

fn end() -> impl Strategy<Value = End> {
    prop::sample::select(vec![End::Completed, End::Failed, End::Panicked, End::Disconnected])
}

fn choice() -> impl Strategy<Value = Choice> {
    let kind = prop_oneof![
        4 => Just(Kind::Ordinary),
        1 => Just(Kind::Bomb),
        1 => Just(Kind::Graceful),
        1 => prop::sample::select(&CHOSEN[..]).prop_map(Kind::Deaf),
    ];
    let timeout = option::weighted(0.2, prop::sample::select(&TIMEOUTS[..]));
    let on = option::weighted(0.2, (end(), life()));
    let all = (kind, option::of(life()), on, timeout, on_panic());
    all.prop_map(|(kind, at_end, on, timeout, on_panic)| {
        let timeout = timeout.filter(|_| matches!(kind, Kind::Ordinary | Kind::Bomb));
        Choice { kind, at_end, on, timeout, on_panic }
    })
}

fn step() -> impl Strategy<Value = Step> {
    let n = || any::<u16>().prop_map(usize::from);
    prop_oneof![
        3 => (life(), option::weighted(0.3, (end(), life())), on_panic())
            .prop_map(|(life, on, on_panic)| Step::Begin(life, on, on_panic)),
        8 => (n(), choice()).prop_map(|(n, choice)| Step::Spawn(n, choice)),
        2 => choice().prop_map(Step::SpawnOfRegistry),
        4 => (n(), choice()).prop_map(|(n, choice)| Step::Nest(n, choice)),
        2 => (option::weighted(0.8, n()), any::<bool>(), option::of(0..3_usize))
            .prop_map(|(n, fails_fast, limit)| Step::Group(n, fails_fast, limit)),
        5 => (n(), choice()).prop_map(|(n, choice)| Step::SpawnInGroup(n, choice)),
        1 => n().prop_map(Step::CancelGroup),
        1 => n().prop_map(Step::DropGroup),
        1 => n().prop_map(Step::WaitForGroup),
        3 => n().prop_map(Step::Finish),
        2 => n().prop_map(Step::Fail),
        2 => n().prop_map(Step::Panic),
        2 => n().prop_map(Step::CancelTask),
        1 => n().prop_map(Step::CancelSet),
        1 => Just(Step::CancelAll),
        1 => Just(Step::AbortAll),
        1 => Just(Step::Close),
        5 => (n(), end()).prop_map(|(n, end)| Step::End(n, end)),
        2 => n().prop_map(Step::Look),
        1 => n().prop_map(Step::Hold),
        2 => n().prop_map(Step::LetGo),
        1 => n().prop_map(Step::DropHandle),
        4 => prop::sample::select(&PASSES[..]).prop_map(Step::Pass),
        1 => (0..LIMIT + 3).prop_map(Step::SetLimit),
    ]
}

#[test]
fn the_ledger_is_the_models_whatever_happens() {
    quiet_panics();
    let schedules = env::var("SCHEDULES").map_or(300, |n| n.parse().unwrap());
    let config = ProptestConfig {
        cases: schedules,
        max_shrink_iters: 10_000,
        failure_persistence: None,
        ..ProptestConfig::default()
    };
    // Whether others run between a step and the next.
    let steps = vec((step(), prop::bool::weighted(0.7)), 1..40);
    proptest!(config, |(steps in steps)| {
        let runtime = Builder::new_current_thread().enable_all().start_paused(true).build().unwrap();
        runtime.block_on(async {
            let mut both = Both::new();
            for (n, (step, settles)) in steps.iter().enumerate() {
                // Who is told by another's end, and who has ended before, is else a matter of turns.
                if both.model.chains {
                    both.settle().await;
                }
                both.step(step).await;
                if *settles || both.model.chains {
                    both.settle().await;
                    both.compare(n, step);
                }
            }
            both.finish().await;
        });
    });
}

/// What is real, and the model of it.
struct Both {
    tasks: TaskRegistry,
    limit: SpawnLimit,
    sets: Vec<Served>,
    groups: Vec<Grouped>,
    real: Vec<Real>,
    model: Model,
}

struct Real {
    orders: UnboundedSender<Order>,
    /// Until it is dropped.
    handle: Option<TaskHandle<()>>,
}

enum Order {
    Finish,
    Fail,
    Panic,
    Nest(Choice, UnboundedSender<Spawned>),
}

type Spawned = Result<(TaskHandle<()>, UnboundedSender<Order>), SpawnError>;

impl Both {
    fn new() -> Self {
        let limit = SpawnLimit::new(LIMIT).per_request(PER_REQUEST);
        let tasks = TaskRegistry::new().limit(limit.clone());
        let model = Model { limit: LIMIT, ..Model::default() };
        let (sets, groups, real) = (Vec::new(), Vec::new(), Vec::new());
        Self { tasks, limit, sets, groups, real, model }
    }

    #[expect(clippy::too_many_lines, reason = "one arm for each step")]
    async fn step(&mut self, step: &Step) {
        let (sets, tasks) = (self.sets.len(), self.real.len());
        let request = |n: usize| n.checked_rem(sets);
        let task = |n: usize| n.checked_rem(tasks);
        let groups = self.groups.len();
        let group = |n: usize| n.checked_rem(groups);
        match step {
            Step::Begin(at_end, on, on_panic) => {
                let mut layer = TaskSetLayer::new(&self.tasks).at_end((*at_end).into());
                if let Some((end, life)) = on {
                    layer = layer.on(*end, (*life).into());
                }
                if let Some(choice) = on_panic {
                    layer = layer.on_panic(*choice);
                }
                self.sets.push(Served::new(&layer));
                self.model.chains |= on_panic.is_some();
                self.model.requests.push(Asked {
                    at_end: *at_end,
                    on: *on,
                    on_panic: *on_panic,
                    fails: false,
                    cancelled: false,
                    holds: 0,
                    held: None,
                    end: None,
                });
            }
            Step::Spawn(n, choice) => {
                let Some(n) = request(*n) else { return };
                let spawned = spawn(New::Set(self.sets[n].set.task(choice.kind.name())), choice);
                let expected = self.model.spawn(Some(n), None, None, choice);
                self.spawned(spawned, expected);
            }
            Step::SpawnOfRegistry(choice) => {
                let spawned = spawn(New::Registry(self.tasks.task(choice.kind.name())), choice);
                let expected = self.model.spawn(None, None, None, choice);
                self.spawned(spawned, expected);
            }
            Step::Nest(n, choice) => {
                // Before and after, or it would be a matter of whose turn comes first.
                self.settle().await;
                let Some(n) = task(*n) else { return };
                let parent = &self.model.tasks[n];
                // What ends at once may start before that or not.
                let is_told_at_once = matches!(choice.kind, Kind::Bomb | Kind::Deaf(_))
                    && [choice.at_end, choice.on.map(|on| on.1)]
                        .iter()
                        .any(|life| matches!(life, Some(Life::DrainZero)));
                if parent.outcome.is_some() || is_told_at_once {
                    return;
                }
                let (tell, mut told) = unbounded_channel();
                drop(self.real[n].orders.send(Order::Nest(choice.clone(), tell)));
                self.settle().await;
                let spawned = told.try_recv().expect("a task that lives does what it is sent");
                let owner = self.model.tasks[n].owner;
                let expected = self.model.spawn(owner, Some(n), None, choice);
                self.spawned(spawned, expected);
                self.settle().await;
            }
            Step::Group(owner, fails_fast, limit) => {
                let owner = owner.and_then(request);
                let real = match owner {
                    Some(n) => Grouped::new(&self.sets[n].set, *fails_fast, *limit),
                    None => Grouped::new(&self.tasks, *fails_fast, *limit),
                };
                self.groups.push(real);
                let (fails_fast, limit) = (*fails_fast, *limit);
                self.model.chains |= fails_fast;
                self.model.groups.push(Gathered { owner, fails_fast, limit, closed: false });
            }
            Step::SpawnInGroup(n, choice) => {
                let Some(n) = group(*n) else { return };
                let name = choice.kind.name();
                let spawned = match &self.groups[n].handle {
                    Either::All(handle) => spawn(New::Group(handle.task(name)), choice),
                    Either::Try(handle) => spawn(New::TryGroup(handle.task(name)), choice),
                };
                let owner = self.model.groups[n].owner;
                let expected = self.model.spawn(owner, None, Some(n), choice);
                self.spawned(spawned, expected);
            }
            Step::CancelGroup(n) => {
                let Some(n) = group(*n) else { return };
                match &self.groups[n].handle {
                    Either::All(handle) => handle.cancel_all(),
                    Either::Try(handle) => handle.cancel_all(),
                }
                self.model.cancel_group(n, Cause::Requested, None);
            }
            Step::DropGroup(n) => {
                let Some(n) = group(*n) else { return };
                if self.groups[n].group.take().is_some() {
                    self.model.drop_group(n);
                }
            }
            Step::WaitForGroup(n) => {
                self.settle().await;
                let Some(n) = group(*n) else { return };
                let Some(group) = self.groups[n].group.take() else { return };
                let mut cx = Context::from_waker(Waker::noop());
                let waited = match group {
                    Either::All(group) => pin!(group.wait()).poll(&mut cx).map(|()| true),
                    Either::Try(group) => pin!(group.wait()).poll(&mut cx).map(|it| it.is_ok()),
                };
                assert_eq!(waited, self.model.wait_for_group(n));
            }
            Step::Finish(n) | Step::Fail(n) | Step::Panic(n) => {
                let Some(n) = task(*n) else { return };
                let (order, outcome) = match step {
                    Step::Finish(_) => (Order::Finish, Outcome::Completed),
                    Step::Fail(_) => (Order::Fail, Outcome::Completed),
                    _ => (Order::Panic, Outcome::Panicked),
                };
                drop(self.real[n].orders.send(order));
                let task = &mut self.model.tasks[n];
                // Only the first counts.
                if task.sent.is_none() && task.outcome.is_none() {
                    task.sent = Some(outcome);
                    task.fails = matches!(step, Step::Fail(_));
                }
            }
            Step::CancelTask(n) => {
                let Some(n) = task(*n) else { return };
                let Some(handle) = &self.real[n].handle else { return };
                handle.cancel();
                self.model.tell(n, Told::Because(Cause::Requested));
            }
            Step::CancelSet(n) => {
                let Some(n) = request(*n) else { return };
                self.sets[n].set.cancel_all();
                self.model.cancel(Some(n), Cause::Requested);
            }
            Step::CancelAll => {
                self.tasks.cancel_all();
                self.model.cancel_all(Cause::Shutdown);
            }
            Step::AbortAll => {
                self.tasks.abort_all();
                self.model.cancel_all(Cause::Shutdown);
                self.model.end_grace();
            }
            Step::Close => {
                self.tasks.close();
                self.model.closed = true;
            }
            Step::End(n, end) => {
                let Some(n) = request(*n) else { return };
                self.end(n, *end);
            }
            Step::Look(n) => {
                let Some(n) = request(*n) else { return };
                let fails = self.sets[n].body.is_some() && self.model.requests[n].fails;
                assert_eq!(self.sets[n].look(), fails);
                if fails {
                    self.model.end(n, End::Panicked);
                }
            }
            Step::Hold(n) => {
                let Some(n) = request(*n) else { return };
                let hold = self.sets[n].set.hold();
                self.sets[n].holds.push(hold);
                let request = &mut self.model.requests[n];
                request.holds += usize::from(request.end.is_none());
            }
            Step::LetGo(n) => {
                let Some(n) = request(*n) else { return };
                // Of those that hold something, or of those that came too late.
                let was_open = self.model.requests[n].end.is_none();
                if self.sets[n].holds.pop().is_some() && was_open {
                    let request = &mut self.model.requests[n];
                    request.holds -= 1;
                    if let Some(end) = request.held.take_if(|_| request.holds == 0) {
                        self.model.end(n, end);
                    }
                }
            }
            Step::DropHandle(n) => {
                let Some(n) = task(*n) else { return };
                self.real[n].handle = None;
            }
            Step::Pass(millis) => {
                self.settle().await;
                tokio::time::advance(Duration::from_millis(*millis)).await;
                settle().await;
                self.model.pass(*millis);
                self.settle().await;
            }
            Step::SetLimit(limit) => {
                self.limit.set_limit(*limit);
                self.model.limit = *limit;
            }
        }
    }

    #[track_caller]
    fn spawned(&mut self, spawned: Spawned, expected: Result<(), SpawnError>) {
        match spawned {
            Ok((handle, orders)) => {
                assert_eq!(expected, Ok(()), "accepted");
                self.real.push(Real { orders, handle: Some(handle) });
            }
            Err(reason) => assert_eq!(expected, Err(reason)),
        }
    }

    async fn settle(&mut self) {
        settle().await;
        self.model.settle();
    }

    fn compare(&self, n: usize, step: &Step) {
        let at = format!("after step {n}, {step:?}");
        let snapshot = self.tasks.snapshot();
        assert!(snapshot.totals.is_exact(), "{at}: {:?}", snapshot.totals);
        let ledger: BTreeMap<_, _> = snapshot
            .by_name
            .iter()
            .filter(|(_, counts)| counts.attempted > 0)
            .map(|(name, counts)| {
                let ended = [
                    counts.completed,
                    counts.cancelled,
                    counts.aborted,
                    counts.timed_out,
                    counts.panicked,
                ];
                (*name, ([counts.attempted, counts.refused, counts.spawned, counts.live], ended))
            })
            .collect();
        assert_eq!(ledger, self.model.ledger(), "{at}");
        let mut states = snapshot.live_tasks.iter().map(|t| (t.name, t.state)).collect::<Vec<_>>();
        let mut expected = self.model.states();
        states.sort_by_key(|state| format!("{state:?}"));
        expected.sort_by_key(|state| format!("{state:?}"));
        assert_eq!(states, expected, "{at}");
        assert_eq!(self.limit.in_use(), self.model.live(), "{at}");
        assert_eq!(self.tasks.len(), self.model.live(), "{at}");
    }

    /// All responses end, and then all else does.
    fn end(&mut self, n: usize, end: End) {
        if self.sets[n].end(end) {
            // What a body yields of its own comes too late once it is to fail.
            let is_late = self.model.requests[n].fails && end != End::Disconnected;
            self.model.end(n, if is_late { End::Panicked } else { end });
        }
    }

    async fn finish(mut self) {
        self.settle().await;
        for n in 0..self.sets.len() {
            self.sets[n].holds.clear();
            let request = &mut self.model.requests[n];
            request.holds = 0;
            if let Some(end) = request.held.take() {
                self.model.end(n, end);
            }
            self.end(n, End::Completed);
        }
        self.settle().await;
        self.compare(usize::MAX, &Step::Close);
        self.tasks.close();
        self.tasks.abort_all();
        self.model.cancel_all(Cause::Shutdown);
        self.model.end_grace();
        self.settle().await;
        self.tasks.wait().await;
        self.compare(usize::MAX, &Step::AbortAll);
        assert_eq!(self.model.live(), 0);
        for (n, real) in self.groups.into_iter().enumerate() {
            let Some(group) = real.group else { continue };
            let waited = match group {
                Either::All(group) => {
                    group.wait().await;
                    true
                }
                Either::Try(group) => group.wait().await.is_ok(),
            };
            assert_eq!(Poll::Ready(waited), self.model.wait_for_group(n));
        }
        for (real, task) in self.real.into_iter().zip(&self.model.tasks) {
            let Some(handle) = real.handle else { continue };
            let yielded = match handle.await {
                Ok(()) => (Outcome::Completed, None),
                Err(TaskError::Cancelled(cause)) => (Outcome::Cancelled, Some(cause)),
                Err(TaskError::Aborted(cause)) => (Outcome::Aborted, Some(cause)),
                Err(TaskError::TimedOut) => (Outcome::TimedOut, None),
                Err(TaskError::Panicked(_)) => (Outcome::Panicked, None),
                Err(TaskError::Failed) => {
                    assert!(self.model.fails(task));
                    (Outcome::Completed, None)
                }
                Err(other) => panic!("{other}"),
            };
            let (outcome, cause) = yielded;
            assert_eq!(Some(outcome), task.outcome, "{:?}", task.choice);
            assert!(
                cause.is_none_or(|cause| task.causes.contains(&cause)),
                "{cause:?} is none of {:?}",
                task.causes
            );
        }
    }
}

async fn settle() {
    for _ in 0..8 {
        yield_now().await;
    }
}

/// A request whose handler has answered, and whose body is still to be sent.
struct Served {
    set: TaskSet,
    body: Option<Pin<Box<ResponseBody<Ends>>>>,
    end: UnboundedSender<End>,
    holds: Vec<Hold>,
}

impl Served {
    fn new(layer: &TaskSetLayer) -> Self {
        let (end, ends) = unbounded_channel();
        let mut body = Some(Ends(ends));
        let mut service = layer.layer(service_fn(|_: Request<()>| {
            let mut response = Response::new(body.take().unwrap());
            response.extensions_mut().insert(TaskSet::current().unwrap());
            std::future::ready(Ok::<_, Infallible>(response))
        }));
        let mut response = Box::pin(service.call(Request::new(())));
        let polled = response.as_mut().poll(&mut Context::from_waker(Waker::noop()));
        let Poll::Ready(Ok(response)) = polled else { panic!("it is ready") };
        let set = response.extensions().get::<TaskSet>().unwrap().clone();
        Self { set, body: Some(Box::pin(response.into_body())), end, holds: Vec::new() }
    }

    /// Ends the response like this, unless it has ended.
    fn end(&mut self, end: End) -> bool {
        let Some(mut body) = self.body.take() else { return false };
        if end != End::Disconnected {
            self.end.send(end).unwrap();
            let mut cx = Context::from_waker(Waker::noop());
            drop(catch_unwind(AssertUnwindSafe(|| drop(body.as_mut().poll_frame(&mut cx)))));
        }
        true
    }

    /// Whether the body has failed.
    fn look(&mut self) -> bool {
        let Some(body) = &mut self.body else { return false };
        let mut cx = Context::from_waker(Waker::noop());
        let fails = matches!(body.as_mut().poll_frame(&mut cx), Poll::Ready(Some(Err(_))));
        if fails {
            self.body = None;
        }
        fails
    }
}

/// Whether a group fails fast.
enum Either<A, T> {
    All(A),
    Try(T),
}

struct Grouped {
    /// Until it is dropped.
    group: Option<Either<Group, Group<FailFast<()>>>>,
    handle: Either<GroupHandle, GroupHandle<FailFast<()>>>,
}

/// Who makes groups.
trait Groups {
    fn group(&self) -> Group;
    fn try_group(&self) -> Group<FailFast<()>>;
}

impl Groups for TaskSet {
    fn group(&self) -> Group {
        self.group()
    }

    fn try_group(&self) -> Group<FailFast<()>> {
        self.try_group()
    }
}

impl Groups for TaskRegistry {
    fn group(&self) -> Group {
        self.group()
    }

    fn try_group(&self) -> Group<FailFast<()>> {
        self.try_group()
    }
}

impl Grouped {
    fn new(owner: &impl Groups, fails_fast: bool, limit: Option<usize>) -> Self {
        if fails_fast {
            let mut group = owner.try_group();
            if let Some(limit) = limit {
                group = group.limit(limit);
            }
            let handle = Either::Try(group.handle());
            Self { group: Some(Either::Try(group)), handle }
        } else {
            let mut group = owner.group();
            if let Some(limit) = limit {
                group = group.limit(limit);
            }
            let handle = Either::All(group.handle());
            Self { group: Some(Either::All(group)), handle }
        }
    }
}

/// A body that ends as it is sent.
struct Ends(UnboundedReceiver<End>);

impl Body for Ends {
    type Data = Bytes;
    type Error = ();

    fn poll_frame(
        mut self: Pin<&mut Self>,
        _: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Self::Data>, ()>>> {
        match self.0.try_recv() {
            Ok(End::Completed) => Poll::Ready(None),
            Ok(End::Failed) => Poll::Ready(Some(Err(()))),
            Ok(End::Panicked) => panic!("model: a body"),
            _ => Poll::Pending,
        }
    }
}

/// Of a request, of none, or of a group.
enum New<'a> {
    Set(NewTask<'a>),
    Registry(NewTask<'a, TaskRegistry>),
    Group(NewTask<'a, GroupHandle>),
    TryGroup(NewTask<'a, GroupHandle<FailFast<()>>>),
}

/// What a task returns, where nobody asks whether it is an error.
async fn in_any_case(future: impl Future<Output = Result<(), ()>> + Send) {
    future.await.unwrap_or_default();
}

impl New<'_> {
    fn spawn(
        self,
        choice: &Choice,
        future: impl Future<Output = Result<(), ()>> + Send + 'static,
    ) -> Result<TaskHandle<()>, SpawnError> {
        Ok(match self {
            Self::Set(new) => choose(new, choice).spawn(in_any_case(future))?,
            Self::Registry(new) => choose(new, choice).spawn(in_any_case(future))?,
            Self::Group(new) => choose(new, choice).spawn(in_any_case(future))?,
            Self::TryGroup(new) => choose(new, choice).spawn(future)?,
        })
    }

    fn spawn_graceful<F>(
        self,
        choice: &Choice,
        make: impl FnOnce(StopToken) -> F + Send + 'static,
    ) -> Result<TaskHandle<()>, SpawnError>
    where
        F: Future<Output = Result<(), ()>> + Send + 'static,
    {
        Ok(match self {
            Self::Set(new) => choose(new, choice).spawn_graceful(|stop| in_any_case(make(stop)))?,
            Self::Registry(new) => {
                choose(new, choice).spawn_graceful(|stop| in_any_case(make(stop)))?
            }
            Self::Group(new) => {
                choose(new, choice).spawn_graceful(|stop| in_any_case(make(stop)))?
            }
            Self::TryGroup(new) => choose(new, choice).spawn_graceful(make)?,
        })
    }
}

fn choose<'a, O>(mut new: NewTask<'a, O>, choice: &Choice) -> NewTask<'a, O> {
    if let Some(life) = choice.at_end {
        new = new.at_end(life.into());
    }
    if let Some((end, life)) = choice.on {
        new = new.on(end, life.into());
    }
    if let Some(timeout) = choice.timeout {
        new = new.timeout(Duration::from_millis(timeout));
    }
    if let Some(choice) = choice.on_panic {
        new = new.on_panic(choice);
    }
    if let Kind::Deaf(grace) = choice.kind {
        new = new.grace(Duration::from_millis(grace));
    }
    new
}

fn spawn(new: New<'_>, choice: &Choice) -> Spawned {
    let (orders, received) = unbounded_channel();
    let handle = match choice.kind {
        Kind::Ordinary => new.spawn(choice, obey(received)),
        Kind::Bomb => new.spawn(choice, async move {
            let _bomb = Bomb;
            obey(received).await
        }),
        Kind::Graceful => new.spawn_graceful(choice, async move |stop| {
            tokio::select! {
                biased;
                result = obey(received) => result,
                _ = stop.cancelled() => Ok(()),
            }
        }),
        Kind::Deaf(_) => new.spawn_graceful(choice, async move |_stop| obey(received).await),
    };
    handle.map(|handle| (handle, orders))
}

async fn obey(mut orders: UnboundedReceiver<Order>) -> Result<(), ()> {
    loop {
        match orders.recv().await {
            Some(Order::Finish) => return Ok(()),
            Some(Order::Fail) => return Err(()),
            Some(Order::Panic) => panic!("model: a task"),
            Some(Order::Nest(choice, tell)) => {
                let set = TaskSet::current().unwrap();
                drop(tell.send(spawn(New::Set(set.task(choice.kind.name())), &choice)));
            }
            // Who sends is gone at the very end alone.
            None => std::future::pending().await,
        }
    }
}

struct Bomb;

impl Drop for Bomb {
    fn drop(&mut self) {
        assert!(thread::panicking(), "model: a bomb");
    }
}

// The model.

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Outcome {
    Completed,
    Cancelled,
    Aborted,
    TimedOut,
    Panicked,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Told {
    Because(Cause),
    TimedOut,
}

#[derive(Debug)]
struct Asked {
    at_end: Life,
    on: Option<(End, Life)>,
    on_panic: Option<OnPanic>,
    /// When its body is looked at.
    fails: bool,
    cancelled: bool,
    holds: usize,
    held: Option<End>,
    end: Option<End>,
}

#[derive(Clone, Copy, Debug)]
enum Lifetime {
    Until(u64),
    Kept,
}

#[derive(Debug)]
struct Gathered {
    owner: Option<usize>,
    fails_fast: bool,
    limit: Option<usize>,
    closed: bool,
}

#[derive(Debug)]
struct Task {
    owner: Option<usize>,
    own: usize,
    choice: Choice,
    started: bool,
    group: Option<usize>,
    sent: Option<Outcome>,
    /// What was sent is to return an error.
    fails: bool,
    timeout: Option<u64>,
    /// Since the response is over.
    lifetime: Option<Lifetime>,
    told: Option<Told>,
    /// Of all that told it before it could obey, its handle yields one.
    causes: Vec<Cause>,
    grace: Option<u64>,
    grace_is_over: bool,
    outcome: Option<Outcome>,
}

#[derive(Debug, Default)]
struct Model {
    now: u64,
    limit: usize,
    closed: bool,
    /// Which set the registry's own tasks are in: one that was cancelled takes no more.
    own: usize,
    requests: Vec<Asked>,
    groups: Vec<Gathered>,
    tasks: Vec<Task>,
    /// The end of a task may tell others.
    chains: bool,
    refused: BTreeMap<&'static str, u64>,
}

impl Model {
    fn live(&self) -> usize {
        self.tasks.iter().filter(|task| task.outcome.is_none()).count()
    }

    fn members(&self, group: usize) -> impl Iterator<Item = &Task> {
        self.tasks.iter().filter(move |task| task.group == Some(group))
    }

    /// `parent` is the task that does it, if one does.
    fn spawn(
        &mut self,
        owner: Option<usize>,
        parent: Option<usize>,
        group: Option<usize>,
        choice: &Choice,
    ) -> Result<(), SpawnError> {
        self.chains |= choice.on_panic.is_some();
        let result = self.may_spawn(owner, parent, group, choice);
        match result {
            Ok(lifetime) => {
                self.tasks.push(Task {
                    owner,
                    own: self.own,
                    choice: choice.clone(),
                    started: false,
                    group,
                    sent: None,
                    fails: false,
                    timeout: choice.timeout.map(|timeout| self.now + timeout),
                    lifetime,
                    told: None,
                    causes: Vec::new(),
                    grace: None,
                    grace_is_over: false,
                    outcome: None,
                });
                // Its time is over when it begins.
                self.lapse(self.tasks.len() - 1);
            }
            Err(_) => *self.refused.entry(choice.kind.name()).or_default() += 1,
        }
        result.map(drop)
    }

    fn may_spawn(
        &self,
        owner: Option<usize>,
        parent: Option<usize>,
        group: Option<usize>,
        choice: &Choice,
    ) -> Result<Option<Lifetime>, SpawnError> {
        if let Some(n) = group {
            let group = &self.groups[n];
            if group.closed {
                return Err(SpawnError::Closed);
            }
            let live = self.members(n).filter(|task| task.outcome.is_none()).count();
            if group.limit.is_some_and(|limit| live >= limit) {
                return Err(SpawnError::Full);
            }
        }
        let of_owner = self.tasks.iter().filter(|task| task.owner == owner);
        let live = of_owner.filter(|task| task.outcome.is_none()).count();
        let mut lifetime = None;
        let of_cancelled = parent.is_some_and(|parent| self.tasks[parent].own < self.own);
        if self.closed || (owner.is_none() && of_cancelled) {
            return Err(SpawnError::Closed);
        }
        if let Some(request) = owner.map(|owner| &self.requests[owner]) {
            if request.cancelled {
                return Err(SpawnError::Closed);
            }
            if let Some(end) = request.end {
                let parent = parent.map(|parent| &self.tasks[parent]);
                let parent = parent.filter(|parent| parent.told.is_none());
                let parent = parent.ok_or(SpawnError::Closed)?;
                // At most the parent's, and less if less is chosen.
                lifetime = match (choice.of(end), parent.lifetime) {
                    (None | Some(Life::Keep), parent) => parent,
                    (Some(Life::Cancel), _) => return Err(SpawnError::Closed),
                    (Some(life), parent) => {
                        let own = self.now + if let Life::Drain(time) = life { time } else { 0 };
                        match parent {
                            Some(Lifetime::Until(parent)) => Some(Lifetime::Until(own.min(parent))),
                            _ => Some(Lifetime::Until(own)),
                        }
                    }
                };
            }
            if live >= PER_REQUEST {
                return Err(SpawnError::Full);
            }
        }
        if self.live() >= self.limit { Err(SpawnError::Full) } else { Ok(lifetime) }
    }

    fn tell(&mut self, n: usize, told: Told) {
        let now = self.now;
        let task = &mut self.tasks[n];
        if let (None, Told::Because(cause)) = (task.outcome, told) {
            task.causes.push(cause);
        }
        if task.outcome.is_none() && task.told.is_none() {
            task.told = Some(told);
            if let Kind::Deaf(grace) = task.choice.kind {
                task.grace = Some(now + grace);
            }
        }
    }

    fn cancel(&mut self, owner: Option<usize>, cause: Cause) {
        if let Some(owner) = owner {
            self.requests[owner].cancelled = true;
        }
        for n in 0..self.tasks.len() {
            if self.tasks[n].owner == owner {
                self.tell(n, Told::Because(cause));
            }
        }
    }

    fn cancel_group(&mut self, group: usize, cause: Cause, but: Option<usize>) {
        self.groups[group].closed = true;
        for n in 0..self.tasks.len() {
            if self.tasks[n].group == Some(group) && Some(n) != but {
                self.tell(n, Told::Because(cause));
            }
        }
    }

    fn drop_group(&mut self, n: usize) {
        let owner = self.groups[n].owner.map(|owner| &self.requests[owner]);
        let cause = owner.and_then(|owner| owner.end).map_or(Cause::Requested, Cause::from);
        self.cancel_group(n, cause, None);
    }

    /// Whether all have returned `Ok`, where that is asked.
    fn wait_for_group(&mut self, n: usize) -> Poll<bool> {
        if self.members(n).any(|task| task.outcome.is_none()) {
            self.drop_group(n);
            return Poll::Pending;
        }
        self.groups[n].closed = true;
        let is_ok = |task: &Task| task.outcome == Some(Outcome::Completed) && !self.fails(task);
        Poll::Ready(!self.groups[n].fails_fast || self.members(n).all(is_ok))
    }

    /// Whether it has returned an error where that is asked.
    fn fails(&self, task: &Task) -> bool {
        let fails_fast = task.group.is_some_and(|group| self.groups[group].fails_fast);
        // A graceful one that was told first has returned by itself.
        fails_fast && task.fails
    }

    fn cancel_all(&mut self, cause: Cause) {
        self.own += 1;
        self.cancel(None, cause);
        for owner in 0..self.requests.len() {
            self.cancel(Some(owner), cause);
        }
    }

    fn end_grace(&mut self) {
        self.tasks.iter_mut().for_each(|task| task.grace_is_over = true);
    }

    fn end(&mut self, n: usize, end: End) {
        let request = &mut self.requests[n];
        if request.holds > 0 {
            request.held.get_or_insert(end);
            return;
        }
        request.end = Some(end);
        let of_set = match request.on {
            Some((on, life)) if on == end => life,
            _ => request.at_end,
        };
        for task in 0..self.tasks.len() {
            if self.tasks[task].owner != Some(n) {
                continue;
            }
            match self.tasks[task].choice.of(end).unwrap_or(of_set) {
                Life::Cancel | Life::DrainZero => self.tell(task, Told::Because(end.into())),
                Life::Drain(time) => {
                    self.tasks[task].lifetime = Some(Lifetime::Until(self.now + time));
                }
                Life::Keep => self.tasks[task].lifetime = Some(Lifetime::Kept),
            }
        }
    }

    fn pass(&mut self, millis: u64) {
        self.now += millis;
        for n in 0..self.tasks.len() {
            let task = &mut self.tasks[n];
            task.grace_is_over |= task.grace.is_some_and(|until| until <= self.now);
            self.lapse(n);
        }
    }

    /// Tells a task to end whose time is over.
    fn lapse(&mut self, n: usize) {
        let task = &self.tasks[n];
        let until = match task.lifetime {
            Some(Lifetime::Until(until)) if until <= self.now => Some(until),
            _ => None,
        };
        let timeout = task.timeout.filter(|timeout| *timeout <= self.now);
        // What came first.
        match (until, timeout) {
            (Some(until), timeout) if timeout.is_none_or(|timeout| until <= timeout) => {
                let end = task.owner.and_then(|owner| self.requests[owner].end).unwrap();
                self.tell(n, Told::Because(end.into()));
            }
            (_, Some(_)) => self.tell(n, Told::TimedOut),
            _ => {}
        }
    }

    /// Every task has had its turn, and what follows from that too.
    fn settle(&mut self) {
        loop {
            let lived: Vec<_> = self.tasks.iter().map(|task| task.outcome.is_none()).collect();
            self.take_turns();
            let ended = |n: &usize| lived[*n] && self.tasks[*n].outcome.is_some();
            let ended: Vec<_> = (0..lived.len()).filter(ended).collect();
            if ended.is_empty() {
                return;
            }
            for n in ended {
                self.follow(n);
            }
        }
    }

    /// What the end of this task does to others.
    fn follow(&mut self, n: usize) {
        let task = &self.tasks[n];
        let (owner, group, outcome) = (task.owner, task.group, task.outcome);
        if let (Some(Outcome::Panicked), Some(owner)) = (outcome, owner) {
            let choice = task.choice.on_panic.or(self.requests[owner].on_panic);
            match choice.unwrap_or_default() {
                OnPanic::CancelSiblings => self.cancel(Some(owner), Cause::Sibling),
                OnPanic::FailResponse => {
                    let request = &mut self.requests[owner];
                    request.fails |= request.end.is_none();
                }
                _ => {}
            }
        }
        let is_failure = matches!(outcome, Some(Outcome::Panicked | Outcome::TimedOut));
        let group = group.filter(|group| self.groups[*group].fails_fast);
        if let Some(group) = group.filter(|_| is_failure || self.fails(&self.tasks[n])) {
            self.cancel_group(group, Cause::Sibling, Some(n));
        }
    }

    fn take_turns(&mut self) {
        for task in &mut self.tasks {
            if task.outcome.is_some() {
                continue;
            }
            let bursts = matches!(task.choice.kind, Kind::Bomb) && task.started;
            let dropped = match task.told {
                Some(Told::TimedOut) => Outcome::TimedOut,
                _ => Outcome::Cancelled,
            };
            task.outcome = match (task.choice.kind, task.told, task.sent) {
                // What it was told comes first.
                (Kind::Ordinary | Kind::Bomb, Some(_), _) => Some(dropped),
                (_, Some(_), _) if task.grace_is_over => Some(Outcome::Aborted),
                (Kind::Graceful, Some(_), None) => Some(Outcome::Completed),
                (_, _, sent) => sent,
            };
            // It has done as it was told, or was dropped.
            task.fails &= task.told.is_none() || task.sent.is_some();
            if bursts && task.outcome.is_some()
                || matches!(
                    (task.choice.kind, task.outcome),
                    (Kind::Bomb, Some(Outcome::Completed))
                )
            {
                task.outcome = Some(Outcome::Panicked);
            }
            task.started = true;
        }
    }

    fn ledger(&self) -> BTreeMap<&'static str, ([u64; 4], [u64; 5])> {
        let mut ledger = BTreeMap::<_, ([u64; 4], [u64; 5])>::new();
        for task in &self.tasks {
            let ([attempted, _, spawned, live], ended) =
                ledger.entry(task.choice.kind.name()).or_default();
            *attempted += 1;
            *spawned += 1;
            match task.outcome {
                None => *live += 1,
                Some(outcome) => ended[outcome as usize] += 1,
            }
        }
        for (name, n) in &self.refused {
            let ([attempted, refused, ..], _) = ledger.entry(name).or_default();
            *attempted += n;
            *refused += n;
        }
        ledger
    }

    fn states(&self) -> Vec<(&'static str, TaskState)> {
        let state = |task: &Task| match (task.told, task.owner, task.lifetime) {
            (Some(_), ..) => TaskState::Cancelling,
            (None, None, _) | (None, _, Some(Lifetime::Kept)) => TaskState::Kept,
            (None, _, Some(Lifetime::Until(_))) => TaskState::Draining,
            (None, _, None) => TaskState::Running,
        };
        let live = self.tasks.iter().filter(|task| task.outcome.is_none());
        live.map(|task| (task.choice.kind.name(), state(task))).collect()
    }
}

impl Choice {
    /// What was chosen for it, if its response ends like this.
    fn of(&self, end: End) -> Option<Life> {
        match self.on {
            Some((on, life)) if on == end => Some(life),
            _ => self.at_end,
        }
    }
}

/// The panics are meant, and there are many.
fn quiet_panics() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        let hook = panic::take_hook();
        panic::set_hook(Box::new(move |info| {
            let message = info.payload().downcast_ref::<&str>();
            if !message.is_some_and(|message| message.starts_with("model: ")) {
                hook(info);
            }
        }));
    });
}
