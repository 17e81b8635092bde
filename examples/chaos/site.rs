//! One life of the server, from its start to its shutdown, and what its driver counts itself.

use std::{
    collections::{BTreeMap, HashMap},
    convert::Infallible,
    future::{IntoFuture, poll_fn},
    io,
    net::SocketAddr,
    pin::{Pin, pin},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError, Weak,
        atomic::{
            AtomicBool, AtomicU64,
            Ordering::{Relaxed, SeqCst},
        },
    },
    task::{Context, Poll},
    thread,
    time::Duration,
};

use axum::{Router, body::Body, extract::Request, response::IntoResponse, routing::any};
use bytes::{Buf, BufMut, Bytes};
use futures_util::{Stream, future::BoxFuture};
use http::{HeaderMap, Method, StatusCode, header};
use http_body::{Frame, SizeHint};
use hyper_util::rt::TokioIo;
use pin_project_lite::pin_project;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpListener,
    task::{JoinHandle, yield_now},
    time::{Sleep, sleep, timeout},
};
use tokio_stream::wrappers::TcpListenerStream;
use tonic::{
    Status,
    codec::{Codec, DecodeBuf, Decoder, EncodeBuf, Encoder},
    server::NamedService,
};
use tower::{
    Layer, Service,
    retry::{Policy, RetryLayer},
    service_fn,
};
use tower_http::timeout::TimeoutLayer;
use tower_tasks::{
    AtEnd, CatchUnwindLayer, End, Outcome, Report, RequestContext, RequestContextLayer,
    RequestLimitLayer, ResponseEndLayer, Shutdown, SpawnError, SpawnLimit, SpawnLimitLayer,
    TaskError, TaskEvent, TaskHandle, TaskRegistry, TaskSet, TaskSetLayer, TraceContext,
    TraceIdLayer,
    request_context::{RequestId, TraceId},
    shutdown::{Forced, Kind as Forces},
    spawn_limit,
    task_set::{Group, ShieldLayer},
    trace_id::Trust,
};

use crate::{
    histogram::Histogram,
    new_task::New,
    plan::{Answer, Bounded, Dice, HandlePlan, Kind, Plan, TaskPlan, request_id, trace_id},
};

/// More than anything takes here; then something hangs.
pub(crate) const FOR_EVER: Duration = Duration::from_secs(20);
/// A handler that never answers has so long.
pub(crate) const TIMEOUT: Duration = Duration::from_millis(250);
const LIMIT: usize = 150;
const REQUESTS: usize = 60;
/// Of all that is spawned for a request, with a registry or without.
const BOUND: usize = 160;
pub(crate) const PIECE: usize = 64;
/// As much as HTTP/2 lets through before somebody reads, and several of it.
pub(crate) const FLOOD: usize = 64 * 1024;
pub(crate) const FLOODS: u32 = 4;
static LETTERS: [u8; FLOOD] = [b'a'; FLOOD];

pub(crate) type BoxError = Box<dyn std::error::Error + Send + Sync>;

/// What lasts for the whole run.
#[derive(Debug)]
pub(crate) struct Run {
    /// From the client's leaving to the last destructor of a task that is cancelled by it.
    pub(crate) cancel_latency: Histogram,
    /// What shutdowns took beyond their budget.
    pub(crate) shutdown_overrun: Histogram,
    pub(crate) totals: Mutex<BTreeMap<&'static str, u64>>,
    differences: Mutex<Vec<String>>,
}

impl Run {
    pub(crate) const fn new() -> Self {
        Self {
            cancel_latency: Histogram::new(),
            shutdown_overrun: Histogram::new(),
            totals: Mutex::new(BTreeMap::new()),
            differences: Mutex::new(Vec::new()),
        }
    }

    #[track_caller]
    pub(crate) fn differs(&self, what: impl Into<String>) {
        let at = std::panic::Location::caller();
        let mut differences = lock(&self.differences);
        // The first ones tell.
        if differences.len() < 100 {
            let difference = format!("{} ({}:{})", what.into(), at.file(), at.line());
            eprintln!("difference: {difference}");
            differences.push(difference);
        }
    }

    #[track_caller]
    fn expect(&self, what: &str, ledger: u64, driver: u64) {
        if ledger != driver {
            self.differs(format!("{what}: {ledger} says the ledger, {driver} the driver"));
        }
    }

    pub(crate) fn differences(&self) -> MutexGuard<'_, Vec<String>> {
        lock(&self.differences)
    }

    pub(crate) fn count(&self, what: &'static str, n: u64) {
        *lock(&self.totals).entry(what).or_default() += n;
    }
}

/// What tasks of one kind did, as they saw it themselves.
#[derive(Debug, Default)]
struct Fates {
    attempted: AtomicU64,
    refused: AtomicU64,
    finished: AtomicU64,
    panicked: AtomicU64,
    /// Dropped before they were finished, or before they started; or refused.
    dropped: AtomicU64,
    /// What the observer was told.
    observed: [AtomicU64; 5],
    started: AtomicU64,
    /// What handles yielded; and how many were not asked.
    yielded: [AtomicU64; 5],
    unseen: AtomicU64,
}

/// Those who would wait for a permit.
#[derive(Debug, Default)]
struct Waits {
    asked: AtomicU64,
    let_in: AtomicU64,
    refused: AtomicU64,
    /// Of those that were decided, not at once.
    waited: AtomicU64,
}

impl Waits {
    /// Runs `spawn`, and sees whether it waits, which in a task it must not.
    async fn see<T>(
        &self,
        in_task: bool,
        run: &Run,
        spawn: impl Future<Output = Result<T, SpawnError>>,
    ) -> Result<T, SpawnError> {
        self.asked.fetch_add(1, Relaxed);
        let mut waited = false;
        let mut spawn = pin!(spawn);
        let result = poll_fn(|cx| {
            let result = spawn.as_mut().poll(cx);
            waited |= result.is_pending();
            result
        })
        .await;
        let decided = if result.is_ok() { &self.let_in } else { &self.refused };
        decided.fetch_add(1, Relaxed);
        self.waited.fetch_add(u64::from(waited), Relaxed);
        if waited && in_task {
            run.differs("a task that has a permit has waited for another");
        }
        result
    }

    /// Those whose request was over before they were decided.
    fn gave_up(&self) -> u64 {
        self.asked.load(SeqCst) - self.let_in.load(SeqCst) - self.refused.load(SeqCst)
    }
}

/// Tasks that no registry knows of.
#[derive(Debug, Default)]
struct Unregistered {
    attempted: AtomicU64,
    refused: AtomicU64,
    /// Polled, or called.
    started: AtomicU64,
    /// Dropped, whatever became of them.
    gone: AtomicU64,
    waits: Waits,
}

pub(crate) struct Site {
    pub(crate) run: Arc<Run>,
    pub(crate) http: SocketAddr,
    pub(crate) grpc: SocketAddr,
    tasks: TaskRegistry,
    limit: SpawnLimit,
    /// That of the layer.
    bound: SpawnLimit,
    shield: ShieldLayer,
    pub(crate) plans: Mutex<HashMap<u64, Arc<Plan>>>,
    fates: [Fates; Kind::ALL.len()],
    waits: [Waits; Kind::ALL.len()],
    unregistered: Unregistered,
    handles: Mutex<Vec<(Kind, TaskHandle<()>)>>,
    /// Requests whose client has read all.
    read: Mutex<Vec<Arc<Plan>>>,
    responses: AtomicU64,
    ends: AtomicU64,
    /// Clients may see anything from now on.
    stopping: AtomicBool,
    /// No task may run from now on.
    over: AtomicBool,
    shutdown: Shutdown,
    /// Tasks that its report has named as still running.
    left: Mutex<Vec<(String, Option<TraceId>)>>,
    requests: RequestLimitLayer,
    /// Of a response.
    pub(crate) deadline: Duration,
    server: Mutex<Option<JoinHandle<Option<Report>>>>,
}

impl Site {
    pub(crate) async fn start(run: &Arc<Run>, dice: &mut Dice) -> Result<Arc<Self>, BoxError> {
        let http = TcpListener::bind("127.0.0.1:0").await?;
        let grpc = TcpListener::bind("127.0.0.1:0").await?;
        let (http_at, grpc_at) = (http.local_addr()?, grpc.local_addr()?);
        let limit = SpawnLimit::new(LIMIT).per_request(6);
        let deadline = Duration::from_millis(if dice.percent(50) { 120 } else { 400 });
        let of_handler = if dice.percent(50) { Duration::ZERO } else { dice.millis(30) };
        let budget = if dice.percent(50) { dice.millis(15) } else { dice.millis(300) };
        let site = Arc::new_cyclic(|site: &Weak<Self>| {
            let observer = site.clone();
            let observe = move |event: &TaskEvent| {
                if let Some(site) = observer.upgrade() {
                    site.observe(event);
                }
            };
            let tasks = TaskRegistry::new().limit(limit.clone()).observer(observe);
            let shutdown = Shutdown::new(budget).grace(budget / 3).tasks(&tasks).without_signals();
            Self {
                run: run.clone(),
                http: http_at,
                grpc: grpc_at,
                tasks,
                limit,
                bound: SpawnLimit::new(BOUND).per_request(7).queue(20),
                shield: ShieldLayer::new(Kind::Shield.name()).at_end(AtEnd::Drain(of_handler)),
                plans: Mutex::default(),
                fates: std::array::from_fn(|_| Fates::default()),
                waits: std::array::from_fn(|_| Waits::default()),
                unregistered: Unregistered::default(),
                handles: Mutex::default(),
                read: Mutex::default(),
                responses: AtomicU64::new(0),
                ends: AtomicU64::new(0),
                stopping: AtomicBool::new(false),
                over: AtomicBool::new(false),
                shutdown,
                left: Mutex::default(),
                requests: RequestLimitLayer::new(REQUESTS),
                deadline,
                server: Mutex::default(),
            }
        });
        let of_http =
            axum::serve(http, site.router()).with_graceful_shutdown(site.shutdown.signalled());
        let of_grpc = tonic::transport::Server::builder()
            .layer(TraceIdLayer::new().trust(Trust::Continue))
            .layer(CatchUnwindLayer::new().max_events_per_second(0))
            .layer(site.shutdown.layer())
            .layer(site.requests.clone())
            .layer(SpawnLimitLayer::new(site.bound.clone()))
            .layer(RequestContextLayer::new(Number::of::<tonic::body::Body>))
            .layer(site.response_end::<tonic::body::Body>())
            .layer(site.task_set())
            .add_service(Grpc(site.clone()))
            .serve_with_incoming_shutdown(TcpListenerStream::new(grpc), site.shutdown.signalled());
        let (shutdown, run) = (site.shutdown.clone(), run.clone());
        let server = tokio::spawn(async move {
            let both = async {
                let (of_http, of_grpc) = tokio::join!(of_http.into_future(), of_grpc);
                of_http?;
                of_grpc.map_err(io::Error::other)
            };
            let report = Box::pin(shutdown.run(both)).await;
            report.map_err(|error| run.differs(format!("the shutdown: {error:?}"))).ok()
        });
        *lock(&site.server) = Some(server);
        Ok(site)
    }

    fn router(self: &Arc<Self>) -> Router {
        let site = self.clone();
        let handler = move |request: Request| serve(site.clone(), request);
        let shield = (self.shield.clone(), WatchLayer(self.clone()));
        let shielded = any(handler.clone()).layer(shield);
        Router::new().route("/shielded", shielded).fallback(handler).layer((
            TraceIdLayer::new().trust(Trust::Continue),
            CatchUnwindLayer::new().max_events_per_second(0),
            self.shutdown.layer(),
            RetryLayer::new(RetryOnce { again: true }),
            TimeoutLayer::with_status_code(StatusCode::GATEWAY_TIMEOUT, TIMEOUT),
            self.requests.clone(),
            SpawnLimitLayer::new(self.bound.clone()),
            RequestContextLayer::new(Number::of::<Body>),
            self.response_end::<Body>(),
            self.task_set(),
        ))
    }

    fn task_set(&self) -> TaskSetLayer {
        TaskSetLayer::new(&self.tasks)
            .at_end(AtEnd::Drain(Duration::from_millis(10)))
            .deadline(self.deadline)
    }

    /// The hook has to be told of each response once.
    fn response_end<B>(
        self: &Arc<Self>,
    ) -> ResponseEndLayer<impl Fn(&http::Request<B>) -> OnEnd + Clone + use<B>> {
        let site = self.clone();
        ResponseEndLayer::new(move |request: &http::Request<B>| -> OnEnd {
            site.responses.fetch_add(1, Relaxed);
            let (site, plan) = (site.clone(), site.plan(request.headers()));
            Box::new(move |end| {
                site.ends.fetch_add(1, Relaxed);
                if let Some(plan) = plan {
                    plan.ended(end);
                }
            })
        })
    }

    fn plan(&self, headers: &HeaderMap) -> Option<Arc<Plan>> {
        lock(&self.plans).get(&Number::from(headers).0).cloned()
    }

    fn observe(&self, event: &TaskEvent) {
        let of =
            |name| &self.fates[Kind::ALL.iter().position(|kind| kind.name() == name).unwrap_or(0)];
        match event {
            TaskEvent::Started { name, .. } => drop(of(*name).started.fetch_add(1, Relaxed)),
            TaskEvent::Ended { name, outcome, .. } => {
                of(*name).observed[index(*outcome)].fetch_add(1, Relaxed);
            }
            _ => {}
        }
    }

    /// Whatever runs for a request must see its ids, and no other's.
    fn check_ids(&self, ids: &Ids, place: &str) {
        match TraceContext::current() {
            Some(context) => {
                if context.trace_id() != ids.trace_id || *context.request_id() != ids.request_id {
                    self.run.differs(format!(
                        "{place} of {} saw the ids of {}",
                        ids.request_id,
                        context.request_id()
                    ));
                }
            }
            None => self.run.differs(format!("{place} of {} saw no ids", ids.request_id)),
        }
        let number = RequestContext::current().get::<Number>().copied();
        if number != Some(ids.number) {
            self.run.differs(format!("{place} of {} saw the value {number:?}", ids.request_id));
        }
    }

    pub(crate) fn is_stopping(&self) -> bool {
        self.stopping.load(SeqCst)
    }

    /// The client of this one has read the whole response.
    pub(crate) fn was_read(&self, plan: &Arc<Plan>) {
        lock(&self.read).push(plan.clone());
    }

    /// Spawns what a plan says, and counts.
    async fn spawn(
        self: &Arc<Self>,
        plan: &Arc<Plan>,
        task: &TaskPlan,
        set: Option<&TaskSet>,
        group: Option<&Group>,
        work: Option<BoxFuture<'static, ()>>,
        in_task: bool,
    ) {
        let fates = &self.fates[task.kind as usize];
        let name = task.kind.name();
        let set = set.filter(|_| !task.of_registry);
        let new = match (group, set) {
            (Some(group), _) => New::Group(group.task(name)),
            (None, Some(set)) => New::Set(set.task(name)),
            (None, None) => New::Registry(self.tasks.task(name)),
        };
        let new = new.choose(task);
        let mut witness = Witness {
            site: self.clone(),
            plan: Some(plan.clone()),
            ids: Ids::of(plan.id),
            kind: task.kind,
            state: State::Idle,
            has_run: false,
            // Nothing but the client's leaving ends it at once.
            is_measured: task.is_measured && plan.conduct.leaves(),
        };
        let result = match task.kind {
            Kind::Closure | Kind::ClosurePanics => {
                let panics = task.kind == Kind::ClosurePanics;
                let closure = move |_stop| {
                    witness.enters();
                    thread::sleep(Duration::from_micros(300));
                    assert!(!panics, "chaos: a closure");
                    witness.state = State::Finished;
                };
                new.spawn_blocking(closure)
            }
            Kind::Graceful => new.spawn_graceful(move |stop| {
                witness.watch(async move {
                    stop.cancelled().await;
                })
            }),
            Kind::IgnoresStop => {
                new.spawn_graceful(move |_stop| witness.watch(std::future::pending()))
            }
            _ => {
                let work = work.unwrap_or_else(|| act(self.clone(), plan.clone(), task.clone()));
                let work = witness.watch(work);
                match task.within {
                    Some(wait) if group.is_none() => {
                        let waits = &self.waits[task.kind as usize];
                        waits.see(in_task, &self.run, new.spawn_within(wait, work)).await
                    }
                    _ => new.spawn(work),
                }
            }
        };
        // Who gives up while it waits has not attempted it.
        fates.attempted.fetch_add(1, Relaxed);
        match result {
            Ok(handle) => {
                match task.handle {
                    HandlePlan::Cancel => handle.cancel(),
                    HandlePlan::Abort => handle.cancel_handle().cancel(),
                    _ => {}
                }
                if task.handle == HandlePlan::Drop {
                    fates.unseen.fetch_add(1, Relaxed);
                } else {
                    lock(&self.handles).push((task.kind, handle));
                }
            }
            Err(reason) => {
                fates.refused.fetch_add(1, Relaxed);
                let is_meant = match reason {
                    SpawnError::Full => true,
                    SpawnError::Closed => set.is_some() || group.is_some() || self.is_stopping(),
                    _ => false,
                };
                if !is_meant {
                    self.run.differs(format!("{name} was refused: {reason}"));
                }
            }
        }
    }

    /// Spawns a task that no registry knows of, and counts.
    async fn spawn_bounded(self: &Arc<Self>, plan: &Plan, bounded: Bounded) {
        let run = &self.run;
        let unregistered = &self.unregistered;
        let mut task = Gone { site: self.clone(), ids: Ids::of(plan.id), has_started: false };
        let result = if bounded == Bounded::Blocks {
            spawn_limit::spawn_blocking(move || task.runs()).map(drop).map_err(SpawnError::from)
        } else {
            let work = async move {
                task.runs();
                yield_now().await;
                assert!(bounded != Bounded::Panics, "chaos: a bounded task");
                task.runs();
            };
            match bounded {
                Bounded::Waits(wait) => {
                    let spawn = spawn_limit::spawn_within(wait, work);
                    let spawn = async { spawn.await.map(drop).map_err(SpawnError::from) };
                    unregistered.waits.see(plan.is_shielded, run, spawn).await
                }
                _ => spawn_limit::spawn(work).map(drop).map_err(SpawnError::from),
            }
        };
        unregistered.attempted.fetch_add(1, Relaxed);
        match result {
            Ok(()) => {}
            // Of a handler that goes on without its client, or waits when that leaves.
            Err(SpawnError::Full | SpawnError::Closed) => {
                unregistered.refused.fetch_add(1, Relaxed);
            }
            Err(reason) => run.differs(format!("a bounded task was refused: {reason}")),
        }
    }

    /// Waits until nothing lives any more, and compares.
    pub(crate) async fn quiet(&self) {
        let idle = async {
            while !self.tasks.is_empty()
                || self.bound.in_use() > 0
                || self.responses.load(SeqCst) != self.ends.load(SeqCst)
            {
                sleep(Duration::from_millis(1)).await;
            }
        };
        if timeout(FOR_EVER, idle).await.is_err() {
            let tasks = self.tasks.snapshot().live_tasks;
            let lists: Vec<_> = tasks.iter().take(5).map(ToString::to_string).collect();
            self.run.differs(format!("{} tasks live on: {}", tasks.len(), lists.join("; ")));
            let (responses, ends) = (self.responses.load(SeqCst), self.ends.load(SeqCst));
            if responses != ends {
                self.run.differs(format!("{responses} responses had {ends} ends"));
            }
        }
        self.compare().await;
    }

    /// Shuts down, whatever goes on, and looks at the report.
    pub(crate) async fn shut_down(&self) {
        self.stopping.store(true, SeqCst);
        self.shutdown.begin();
        let Some(server) = lock(&self.server).take() else { return };
        let Ok(Ok(Some(report))) = timeout(FOR_EVER, server).await else {
            return self.run.differs("the shutdown takes for ever");
        };
        let is_left = |forced: &&Forced| forced.outcome.is_none() && forced.what == Forces::Task;
        let left = report.forced().iter().filter(is_left);
        *lock(&self.left) = left.map(|task| (task.name.to_string(), task.trace_id)).collect();
        self.over.store(true, SeqCst);

        let run = &self.run;
        run.shutdown_overrun.add(report.took.saturating_sub(report.budget));
        run.count("forced", report.forced().len() as u64);
        let (requests, drained) = (&report.requests, &report.drained);
        let ended = requests.completed + requests.ended + requests.left;
        run.expect("requests of the report", requests.at_begin + requests.later, ended);
        let ended = drained.completed
            + drained.cancelled
            + drained.aborted
            + drained.timed_out
            + drained.panicked
            + drained.left;
        run.expect("tasks of the report", drained.at_begin + drained.spawned, ended);
        run.expect("named as left", drained.left, lock(&self.left).len() as u64);
        if !report.tasks.is_exact() || (report.exit_code() == 0) != report.forced().is_empty() {
            run.differs(format!("the report does not add up: {report:?}"));
        }
    }

    /// Another limit, while tasks hold permits of it.
    pub(crate) fn set_limit(&self, limit: usize) {
        self.limit.set_limit(limit);
        self.bound.set_limit(limit + 10);
    }

    async fn compare(&self) {
        let handles = std::mem::take(&mut *lock(&self.handles));
        for (kind, handle) in handles {
            match timeout(FOR_EVER, handle).await {
                Ok(result) => {
                    let outcome = outcome(&result);
                    self.fates[kind as usize].yielded[outcome].fetch_add(1, Relaxed);
                }
                Err(_) => self.run.differs(format!("a handle of {} hangs", kind.name())),
            }
        }
        let run = &self.run;
        let snapshot = self.tasks.snapshot();
        if !snapshot.totals.is_exact() {
            run.differs(format!("not exact: {:?}", snapshot.totals));
        }
        run.expect("live", snapshot.totals.live, 0);
        run.expect("permits", self.limit.in_use() as u64, 0);
        run.expect("permits of requests", self.requests.in_use() as u64, 0);
        run.expect("permits of the layer", self.bound.in_use() as u64, 0);
        run.expect("waiting", (self.limit.waiting() + self.bound.waiting()) as u64, 0);
        let of = |count: &AtomicU64| count.load(SeqCst);
        let unregistered = &self.unregistered;
        let gave_up = unregistered.waits.gave_up();
        let (attempted, refused) = (of(&unregistered.attempted), of(&unregistered.refused));
        run.expect("bounded, gone", of(&unregistered.gone), attempted + gave_up);
        run.expect("bounded, started", of(&unregistered.started), attempted - refused);
        for kind in Kind::ALL {
            let (name, fates) = (kind.name(), &self.fates[kind as usize]);
            let ledger = snapshot.by_name.get(name).copied().unwrap_or_default();
            if kind == Kind::Shield {
                // The layer has the handles, and answers if it is refused.
                let spawned = of(&fates.started);
                fates.unseen.store(spawned, SeqCst);
                fates.refused.store(of(&fates.attempted).saturating_sub(spawned), SeqCst);
            }
            run.expect(&format!("{name}, attempted"), ledger.attempted, of(&fates.attempted));
            run.expect(&format!("{name}, refused"), ledger.refused, of(&fates.refused));
            run.expect(&format!("{name}, started"), ledger.spawned, of(&fates.started));
            run.expect(&format!("{name}, completed"), ledger.completed, of(&fates.finished));
            run.expect(&format!("{name}, panicked"), ledger.panicked, of(&fates.panicked));
            let ended = ledger.cancelled + ledger.aborted + ledger.timed_out;
            let dropped = ended + ledger.refused + self.waits[kind as usize].gave_up();
            run.expect(&format!("{name}, dropped"), dropped, of(&fates.dropped));
            let outcomes = [
                ledger.completed,
                ledger.cancelled,
                ledger.aborted,
                ledger.timed_out,
                ledger.panicked,
            ];
            let mut unseen = 0;
            for (n, ledger) in outcomes.into_iter().enumerate() {
                let yielded = of(&fates.yielded[n]);
                run.expect(&format!("{name}, observed {n}"), ledger, of(&fates.observed[n]));
                if yielded > ledger {
                    run.differs(format!(
                        "{name}: handles yielded {n} {yielded} times, not {ledger}"
                    ));
                }
                unseen += ledger.saturating_sub(yielded);
            }
            run.expect(&format!("{name}, unseen"), unseen, of(&fates.unseen));
        }
        for plan in std::mem::take(&mut *lock(&self.read)) {
            if !plan.has_ended(End::Completed) {
                run.differs(format!("was read to its end, and had another: {plan:?}"));
            }
        }
    }

    /// When it is over: what it comes to.
    pub(crate) fn add_up(&self) {
        let totals = self.tasks.snapshot().totals;
        for (what, n) in [
            ("attempted", totals.attempted),
            ("refused", totals.refused),
            ("completed", totals.completed),
            ("cancelled", totals.cancelled),
            ("aborted", totals.aborted),
            ("timed out", totals.timed_out),
            ("panicked", totals.panicked),
            ("responses", self.responses.load(SeqCst)),
            ("shielded", self.fates[Kind::Shield as usize].attempted.load(SeqCst)),
            ("bounded alone", self.unregistered.attempted.load(SeqCst)),
        ] {
            self.run.count(what, n);
        }
        for waits in self.waits.iter().chain([&self.unregistered.waits]) {
            for (what, n) in [
                ("spawn_within: let in", waits.let_in.load(SeqCst)),
                ("spawn_within: refused", waits.refused.load(SeqCst)),
                ("spawn_within: gave up", waits.gave_up()),
                ("spawn_within: had to wait", waits.waited.load(SeqCst)),
            ] {
                self.run.count(what, n);
            }
        }
    }
}

type OnEnd = Box<dyn FnOnce(End) + Send>;

const fn index(outcome: Outcome) -> usize {
    match outcome {
        Outcome::Completed => 0,
        Outcome::Cancelled => 1,
        Outcome::Aborted => 2,
        Outcome::TimedOut => 3,
        _ => 4,
    }
}

const fn outcome(result: &Result<(), TaskError>) -> usize {
    match result {
        Ok(()) => 0,
        Err(TaskError::Cancelled(_)) => 1,
        Err(TaskError::Aborted(_)) => 2,
        Err(TaskError::TimedOut) => 3,
        Err(_) => 4,
    }
}

/// What the work of a request has to see.
#[derive(Clone)]
struct Ids {
    number: Number,
    trace_id: TraceId,
    request_id: RequestId,
}

impl Ids {
    fn of(id: u64) -> Self {
        let trace_id = trace_id(id).parse().expect("32 digits");
        let request_id = request_id(id).parse().expect("few letters");
        Self { number: Number(id), trace_id, request_id }
    }
}

/// That of a plan: a value of the request's context.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Number(u64);

impl Number {
    fn of<B>(request: &http::Request<B>) -> Self {
        Self::from(request.headers())
    }
}

impl From<&HeaderMap> for Number {
    fn from(headers: &HeaderMap) -> Self {
        let number = headers.get("x-plan").and_then(|id| id.to_str().ok()?.parse().ok());
        Self(number.unwrap_or(u64::MAX))
    }
}

#[derive(Clone, Copy, PartialEq)]
enum State {
    Idle,
    Polled,
    Finished,
    /// Its own destructor is about to panic.
    Bursts,
}

/// Sees what becomes of a task from within, and tells it when it is dropped.
struct Witness {
    site: Arc<Site>,
    /// `None` of a handler whose client has left before.
    plan: Option<Arc<Plan>>,
    ids: Ids,
    kind: Kind,
    state: State,
    has_run: bool,
    is_measured: bool,
}

impl Witness {
    const fn watch<F>(self, future: F) -> Witnessed<F> {
        Witnessed { future, witness: self }
    }

    fn enters(&mut self) {
        self.state = State::Polled;
        self.has_run = true;
        let is_left = |site: &Site| {
            let (name, trace_id) = (self.kind.name(), Some(self.ids.trace_id));
            lock(&site.left).iter().any(|task| task.0 == name && task.1 == trace_id)
        };
        if self.site.over.load(SeqCst) && !is_left(&self.site) {
            self.site.run.differs(format!("{} ran after the shutdown", self.kind.name()));
        }
        self.site.check_ids(&self.ids, self.kind.name());
    }
}

impl Drop for Witness {
    fn drop(&mut self) {
        let fates = &self.site.fates[self.kind as usize];
        let fate = match self.state {
            State::Finished => &fates.finished,
            // Unwound out of a poll.
            State::Polled | State::Bursts => &fates.panicked,
            State::Idle => &fates.dropped,
        };
        fate.fetch_add(1, SeqCst);
        let left = self.plan.as_ref().and_then(|plan| plan.left.get());
        if let Some(left) = left.filter(|_| self.is_measured && self.has_run) {
            self.site.run.cancel_latency.add(left.elapsed());
        }
    }
}

pin_project! {
    struct Witnessed<F> {
        #[pin]
        future: F,
        witness: Witness,
    }

    impl<F> PinnedDrop for Witnessed<F> {
        fn drop(this: Pin<&mut Self>) {
            let witness = this.project().witness;
            if witness.kind == Kind::PanicsInDrop && witness.has_run && !thread::panicking() {
                witness.state = State::Bursts;
                panic!("chaos: in a drop");
            }
        }
    }
}

impl<F: Future> Future for Witnessed<F> {
    type Output = F::Output;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<F::Output> {
        let this = self.project();
        this.witness.enters();
        let output = this.future.poll(cx);
        this.witness.state = if output.is_ready() { State::Finished } else { State::Idle };
        output
    }
}

/// Sees what becomes of handlers that are tasks.
#[derive(Clone)]
struct WatchLayer(Arc<Site>);

impl<S> Layer<S> for WatchLayer {
    type Service = Watch<S>;

    fn layer(&self, inner: S) -> Watch<S> {
        Watch { inner, site: self.0.clone() }
    }
}

#[derive(Clone)]
struct Watch<S> {
    inner: S,
    site: Arc<Site>,
}

impl<S: Service<http::Request<B>>, B> Service<http::Request<B>> for Watch<S> {
    type Response = S::Response;
    type Error = S::Error;
    type Future = Witnessed<S::Future>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.inner.poll_ready(cx)
    }

    fn call(&mut self, request: http::Request<B>) -> Self::Future {
        self.site.fates[Kind::Shield as usize].attempted.fetch_add(1, Relaxed);
        let witness = Witness {
            site: self.site.clone(),
            plan: None,
            ids: Ids::of(Number::of(&request).0),
            kind: Kind::Shield,
            state: State::Idle,
            has_run: false,
            is_measured: false,
        };
        witness.watch(self.inner.call(request))
    }
}

/// What a bounded task holds, and sees.
struct Gone {
    site: Arc<Site>,
    ids: Ids,
    has_started: bool,
}

impl Gone {
    fn runs(&mut self) {
        self.site.check_ids(&self.ids, "a bounded task");
        if !std::mem::replace(&mut self.has_started, true) {
            self.site.unregistered.started.fetch_add(1, Relaxed);
        }
    }
}

impl Drop for Gone {
    fn drop(&mut self) {
        self.site.unregistered.gone.fetch_add(1, SeqCst);
    }
}

/// What a task does.
fn act(site: Arc<Site>, plan: Arc<Plan>, task: TaskPlan) -> BoxFuture<'static, ()> {
    Box::pin(async move {
        match task.kind {
            Kind::Yields => {
                for _ in 0..3 {
                    yield_now().await;
                }
            }
            Kind::Sleeps => sleep(Duration::from_millis(plan.id % 8)).await,
            Kind::Waits => std::future::pending().await,
            // Of a runtime's thread, and deaf to its cancellation meanwhile.
            Kind::Blocks => {
                for _ in 0..2 {
                    thread::sleep(Duration::from_micros(500));
                    yield_now().await;
                }
            }
            Kind::Panics => {
                yield_now().await;
                panic!("chaos: a task");
            }
            Kind::PanicsInDrop => {
                for _ in 0..plan.id % 3 {
                    sleep(Duration::from_millis(1)).await;
                }
            }
            Kind::Nests => {
                let set = TaskSet::current().ok();
                for child in &task.children {
                    site.spawn(&plan, child, set.as_ref(), None, None, true).await;
                    yield_now().await;
                }
            }
            // The owner of a group waits for it, or drops it.
            Kind::Groups => {
                let group = match TaskSet::current() {
                    Ok(set) => set.group(),
                    Err(_) => site.tasks.group(),
                }
                .limit(2);
                for child in &task.children {
                    site.spawn(&plan, child, None, Some(&group), None, true).await;
                }
                yield_now().await;
                if plan.id.is_multiple_of(2) {
                    group.wait().await;
                }
            }
            _ => {}
        }
    })
}

/// The handler, of HTTP/1 and HTTP/2.
async fn serve(site: Arc<Site>, mut request: Request) -> axum::response::Response {
    let Some(plan) = site.plan(request.headers()) else {
        return status(StatusCode::NOT_FOUND);
    };
    let (set, attempt) = site.begin(&plan).await;
    match plan.answer {
        Answer::Whole(after) => {
            if !after.is_zero() {
                sleep(after).await;
            }
            Body::from(vec![b'a'; PIECE]).into_response()
        }
        Answer::Fails => status(StatusCode::INTERNAL_SERVER_ERROR),
        Answer::Panics => panic!("chaos: the handler"),
        Answer::Never => std::future::pending().await,
        Answer::Retried if attempt == 0 => status(StatusCode::SERVICE_UNAVAILABLE),
        Answer::Upgrades => {
            let upgrade = hyper::upgrade::on(&mut request);
            let hold = set.as_ref().map(TaskSet::hold);
            let work = async move {
                if let Ok(upgraded) = upgrade.await {
                    let mut upgraded = TokioIo::new(upgraded);
                    let mut ping = [0; 4];
                    // The client may leave.
                    if upgraded.read_exact(&mut ping).await.is_ok() {
                        let _ = upgraded.write_all(b"pong").await;
                    }
                }
                drop(hold);
            };
            let task = TaskPlan::upgraded();
            let work = Some(Box::pin(work) as BoxFuture<'static, ()>);
            site.spawn(&plan, &task, set.as_ref(), None, work, plan.is_shielded).await;
            let switched = [(header::CONNECTION, "upgrade"), (header::UPGRADE, "chaos")];
            (StatusCode::SWITCHING_PROTOCOLS, switched).into_response()
        }
        answer => Body::new(Pieces::new(site, plan.clone(), answer)).into_response(),
    }
}

fn status(status: StatusCode) -> axum::response::Response {
    status.into_response()
}

impl Site {
    /// What all handlers do first: they look at their ids, and start their tasks.
    async fn begin(self: &Arc<Self>, plan: &Arc<Plan>) -> (Option<TaskSet>, u8) {
        self.check_ids(&Ids::of(plan.id), "handler");
        let attempt = plan.attempts.fetch_add(1, Relaxed);
        let set = TaskSet::current().ok();
        if set.is_none() {
            self.run.differs("a handler has no task set");
        }
        for task in &plan.tasks {
            self.spawn(plan, task, set.as_ref(), None, None, plan.is_shielded).await;
        }
        if let Some(bounded) = plan.bounded {
            self.spawn_bounded(plan, bounded).await;
        }
        (set, attempt)
    }
}

/// A body that comes in pieces, and may come to grief after the first.
struct Pieces {
    site: Arc<Site>,
    plan: Arc<Plan>,
    ids: Ids,
    left: u32,
    every: Duration,
    piece: &'static [u8],
    wait: Option<Pin<Box<Sleep>>>,
    grief: bool,
    is_polled: bool,
}

impl Pieces {
    fn new(site: Arc<Site>, plan: Arc<Plan>, answer: Answer) -> Self {
        let (left, every) = match answer {
            Answer::Streams(pieces, every) => (pieces, every),
            Answer::Floods => (FLOODS, Duration::ZERO),
            _ => (2, Duration::from_millis(1)),
        };
        let grief = matches!(answer, Answer::BodyFails | Answer::BodyPanics);
        let piece = if answer == Answer::Floods { &LETTERS } else { &LETTERS[..PIECE] };
        Self {
            ids: Ids::of(plan.id),
            site,
            plan,
            left,
            every,
            piece,
            wait: None,
            grief,
            is_polled: false,
        }
    }

    fn poll_piece(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Bytes, BoxError>>> {
        self.site.check_ids(&self.ids, "body");
        self.is_polled = true;
        if self.left == 0 {
            return Poll::Ready(None);
        }
        if !self.every.is_zero() {
            let wait = self.wait.get_or_insert_with(|| Box::pin(sleep(self.every)));
            std::task::ready!(wait.as_mut().poll(cx));
            self.wait = None;
        }
        self.left -= 1;
        if self.grief && self.left == 0 {
            assert!(self.plan.answer != Answer::BodyPanics, "chaos: the body");
            return Poll::Ready(Some(Err("chaos".into())));
        }
        Poll::Ready(Some(Ok(Bytes::from_static(self.piece))))
    }
}

impl http_body::Body for Pieces {
    type Data = Bytes;
    type Error = BoxError;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BoxError>>> {
        self.poll_piece(cx).map(|piece| piece.map(|piece| piece.map(Frame::data)))
    }

    fn size_hint(&self) -> SizeHint {
        SizeHint::new()
    }
}

impl Stream for Pieces {
    type Item = Result<Bytes, Status>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let piece = std::task::ready!(self.poll_piece(cx));
        Poll::Ready(piece.map(|piece| piece.map_err(|_| Status::unavailable("chaos"))))
    }
}

impl Drop for Pieces {
    fn drop(&mut self) {
        // That of a shielded handler whose client has left is nobody's.
        if self.is_polled || !self.plan.is_shielded {
            self.site.check_ids(&self.ids, "drop of the body");
        }
    }
}

/// Sends a request once more that was answered with 503, if it is without a body.
#[derive(Clone)]
struct RetryOnce {
    again: bool,
}

impl<B, E> Policy<Request, http::Response<B>, E> for RetryOnce {
    type Future = std::future::Ready<()>;

    fn retry(
        &mut self,
        _: &mut Request,
        result: &mut Result<http::Response<B>, E>,
    ) -> Option<Self::Future> {
        let is_refused =
            |response: &http::Response<B>| response.status() == StatusCode::SERVICE_UNAVAILABLE;
        let again = self.again && result.as_ref().is_ok_and(is_refused);
        self.again = false;
        again.then(|| std::future::ready(()))
    }

    fn clone_request(&mut self, request: &Request) -> Option<Request> {
        if request.method() != Method::GET {
            return None;
        }
        let mut clone = Request::new(Body::empty());
        *clone.uri_mut() = request.uri().clone();
        *clone.version_mut() = request.version();
        *clone.headers_mut() = request.headers().clone();
        Some(clone)
    }
}

/// A gRPC service as tonic's generated code is, with messages of plain bytes.
#[derive(Clone)]
struct Grpc(Arc<Site>);

impl NamedService for Grpc {
    const NAME: &'static str = "chaos.Chaos";
}

impl Service<http::Request<tonic::body::Body>> for Grpc {
    type Response = http::Response<tonic::body::Body>;
    type Error = Infallible;
    type Future = BoxFuture<'static, Result<Self::Response, Infallible>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: http::Request<tonic::body::Body>) -> Self::Future {
        let site = self.0.clone();
        let handler = service_fn(move |request| answer(site.clone(), request));
        if !request.uri().path().ends_with("/shielded") {
            return Box::pin({ handler }.call(request));
        }
        let layers = (self.0.shield.clone(), WatchLayer(self.0.clone()));
        let response = layers.layer(handler).call(request);
        Box::pin(async { Ok(response.await?.map(tonic::body::Body::new)) })
    }
}

async fn answer(
    site: Arc<Site>,
    request: http::Request<tonic::body::Body>,
) -> Result<http::Response<tonic::body::Body>, Infallible> {
    let plan = site.plan(request.headers());
    let handler = service_fn(move |_: tonic::Request<Bytes>| {
        let (site, plan) = (site.clone(), plan.clone());
        async move {
            let plan = plan.ok_or_else(|| Status::not_found("no plan"))?;
            site.begin(&plan).await;
            let answer = match plan.answer {
                Answer::Fails => return Err(Status::unavailable("chaos")),
                Answer::Panics => panic!("chaos: the handler"),
                Answer::Never => std::future::pending().await,
                Answer::Whole(after) => {
                    sleep(after).await;
                    Answer::Streams(1, Duration::ZERO)
                }
                answer => answer,
            };
            Ok(tonic::Response::new(Pieces::new(site, plan, answer)))
        }
    });
    Ok(tonic::server::Grpc::new(Plain).server_streaming(handler, request).await)
}

/// Messages are bytes as they are.
#[derive(Clone, Copy)]
struct Plain;

impl Codec for Plain {
    type Encode = Bytes;
    type Decode = Bytes;
    type Encoder = Self;
    type Decoder = Self;

    fn encoder(&mut self) -> Self {
        Self
    }

    fn decoder(&mut self) -> Self {
        Self
    }
}

impl Encoder for Plain {
    type Item = Bytes;
    type Error = Status;

    fn encode(&mut self, message: Bytes, to: &mut EncodeBuf<'_>) -> Result<(), Status> {
        to.put(message);
        Ok(())
    }
}

impl Decoder for Plain {
    type Item = Bytes;
    type Error = Status;

    fn decode(&mut self, from: &mut DecodeBuf<'_>) -> Result<Option<Bytes>, Status> {
        Ok(Some(from.copy_to_bytes(from.remaining())))
    }
}

pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
