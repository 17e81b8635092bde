//! A storm of everything at once: the ledger and those who made the storm agree on every outcome.

#![allow(clippy::print_stdout, clippy::unwrap_used)]

use std::{
    collections::BTreeMap,
    env, panic,
    pin::Pin,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicU64, Ordering::Relaxed},
    },
    task::{Context, Poll, Waker},
    thread::{self, JoinHandle},
    time::{Duration, Instant, SystemTime},
};

use http::{Request, Response};
use http_body::{Body, Frame};
use tokio::{
    runtime::{Builder, Runtime},
    sync::mpsc,
};
use tower::{Layer, Service, service_fn};
use tower_tasks::{
    AtEnd, End, SpawnError, SpawnLimit, TaskError, TaskHandle, TaskRegistry, TaskSet, TaskSetLayer,
    task_set::{Counts, NewTask, Snapshot, assert_drained},
};

/// How long the storm lasts: until this many spawns were tried, or so long at most.
const ATTEMPTS: u64 = 200_000;
const AT_MOST: Duration = Duration::from_secs(5);
const THREADS: u64 = 3;
const RUNTIMES: u64 = 25;
const LIMIT: usize = 300;
const NAMES: [&str; 5] = ["completes", "waits", "panics", "panics in its drop", "nests"];

/// `SplitMix64`: enough for dice, and the whole storm is in one seed.
struct Dice(u64);

impl Dice {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    fn below(&mut self, n: u64) -> u64 {
        self.next() % n
    }

    fn one_in(&mut self, n: u64) -> bool {
        self.below(n) == 0
    }

    fn pick<T: Copy>(&mut self, from: &[T]) -> T {
        from[usize::try_from(self.below(from.len() as u64)).unwrap()]
    }
}

/// What the makers of the storm count themselves.
#[derive(Debug, Default)]
struct Own {
    attempted: AtomicU64,
    refused: AtomicU64,
    /// What the handles yielded, by name and outcome.
    yielded: Mutex<BTreeMap<(&'static str, &'static str), u64>>,
    /// Handles that were dropped, by name.
    unseen: Mutex<BTreeMap<&'static str, u64>>,
}

impl Own {
    fn yielded(&self, name: &'static str, result: &Result<(), TaskError>) {
        let outcome = match result {
            Ok(()) => "completed",
            Err(TaskError::Cancelled(_)) => "cancelled",
            Err(TaskError::Aborted(_)) => "aborted",
            Err(TaskError::TimedOut) => "timed out",
            Err(TaskError::Panicked(_)) => "panicked",
            Err(other) => panic!("{other}"),
        };
        *self.yielded.lock().unwrap().entry((name, outcome)).or_default() += 1;
    }
}

#[derive(Clone)]
struct Storm {
    own: Arc<Own>,
    tasks: TaskRegistry,
    layer: TaskSetLayer,
    handles: mpsc::UnboundedSender<(&'static str, TaskHandle<()>)>,
    runtimes_go: bool,
}

/// Panics, in its drop.
struct PanicsInDrop;

impl Drop for PanicsInDrop {
    fn drop(&mut self) {
        assert!(thread::panicking(), "storm: in the drop");
    }
}

impl Storm {
    /// Tries to spawn one task of some kind, somewhere.
    fn spawn(&self, dice: &mut Dice, set: Option<&TaskSet>, depth: u32) {
        let name = dice.pick(&NAMES);
        let awaits = dice.below(4);
        let waits = dice.one_in(3);
        let storm = self.clone();
        let seed = dice.next();
        let future: Pin<Box<dyn Future<Output = ()> + Send>> = Box::pin(async move {
            for _ in 0..awaits {
                tokio::task::yield_now().await;
            }
            match name {
                "waits" => std::future::pending().await,
                "panics" => panic!("storm: in a poll"),
                "panics in its drop" => {
                    let _bomb = PanicsInDrop;
                    if waits {
                        std::future::pending::<()>().await;
                    }
                }
                "nests" if depth < 3 => {
                    let mut dice = Dice(seed);
                    let set = TaskSet::current().unwrap();
                    for _ in 0..dice.below(4) {
                        storm.spawn(&mut dice, Some(&set), depth + 1);
                    }
                }
                _ => {}
            }
        });
        self.own.attempted.fetch_add(1, Relaxed);
        let spawned = match set {
            Some(set) => choose(set.task(name), dice).spawn(future),
            None => choose(self.tasks.task(name), dice).spawn(future),
        };
        match spawned {
            Ok(handle) => {
                if dice.one_in(6) {
                    handle.cancel();
                }
                if dice.one_in(6) {
                    let cancel = handle.cancel_handle();
                    thread::yield_now();
                    cancel.cancel();
                }
                if dice.one_in(4) {
                    *self.own.unseen.lock().unwrap().entry(name).or_default() += 1;
                } else {
                    self.handles.send((name, handle)).unwrap();
                }
            }
            Err(refused) => {
                let is_meant = match refused.reason {
                    SpawnError::Full => true,
                    SpawnError::Closed => set.is_some() || self.tasks.is_closed(),
                    SpawnError::NoRuntime => self.runtimes_go,
                    _ => false,
                };
                assert!(is_meant, "{}: {:?}", name, refused.reason);
                self.own.refused.fetch_add(1, Relaxed);
            }
        }
    }

    /// Serves one request from its first to its last, and does all sorts of things to it.
    fn request(&self, dice: &mut Dice) {
        let mut service = self.layer.clone().layer(service_fn(|_: Request<()>| async {
            let mut response = Response::new(Pends);
            response.extensions_mut().insert(TaskSet::current().unwrap());
            Ok::<_, std::convert::Infallible>(response)
        }));
        let mut response = Box::pin(service.call(Request::new(())));
        if dice.one_in(20) {
            // Given up before it is polled.
            return;
        }
        let mut cx = Context::from_waker(Waker::noop());
        let Poll::Ready(Ok(response)) = response.as_mut().poll(&mut cx) else { panic!("ready") };
        let set = response.extensions().get::<TaskSet>().unwrap().clone();
        if dice.one_in(2) {
            set.at_end(lifetime(dice));
        }
        let hold = dice.one_in(6).then(|| set.hold());
        for _ in 0..dice.below(12) {
            self.spawn(dice, Some(&set), 0);
        }
        if dice.one_in(10) {
            set.cancel_all();
        }
        drop(response);
        for _ in 0..dice.below(3) {
            // Too late, or held.
            self.spawn(dice, Some(&set), 0);
        }
        drop(hold);
    }

    fn run(&self, mut dice: Dice, attempts: u64, until: Instant) {
        while self.own.attempted.load(Relaxed) < attempts && Instant::now() < until {
            match dice.below(10) {
                0 => self.spawn(&mut dice, None, 0),
                1 => {
                    let other =
                        Self { tasks: self.tasks.clone().at_end(AtEnd::Keep), ..self.clone() };
                    other.spawn(&mut dice, None, 0);
                }
                2 if dice.one_in(200) => self.tasks.cancel_all(),
                _ => self.request(&mut dice),
            }
        }
    }
}

fn choose<'a, O>(mut task: NewTask<'a, O>, dice: &mut Dice) -> NewTask<'a, O> {
    if dice.one_in(3) {
        task = task.at_end(lifetime(dice));
    }
    if dice.one_in(8) {
        task = task.on(end(dice), lifetime(dice));
    }
    if dice.one_in(8) {
        task = task.timeout(Duration::from_millis(dice.below(5)));
    }
    task
}

fn lifetime(dice: &mut Dice) -> AtEnd {
    match dice.below(4) {
        0 => AtEnd::Cancel,
        1 => AtEnd::Drain(Duration::ZERO),
        2 => AtEnd::Drain(Duration::from_millis(dice.below(20))),
        _ => AtEnd::Keep,
    }
}

fn end(dice: &mut Dice) -> End {
    dice.pick(&[End::Completed, End::Failed, End::Panicked, End::Disconnected])
}

struct Pends;

impl Body for Pends {
    type Data = bytes::Bytes;
    type Error = std::convert::Infallible;

    fn poll_frame(
        self: Pin<&mut Self>,
        _: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Self::Data>, Self::Error>>> {
        Poll::Pending
    }
}

/// Takes snapshots as long as the storm lasts: each is exact in itself, and no figure but the live
/// ones ever goes down.
fn watch(tasks: &TaskRegistry, is_over: &AtomicBool) -> u64 {
    let mut last = Snapshot::default();
    let mut taken = 0;
    while !is_over.load(Relaxed) {
        let snapshot = tasks.snapshot();
        check(&snapshot);
        assert_grown(&last.totals, &snapshot.totals);
        for (name, before) in &last.by_name {
            assert_grown(before, &snapshot.by_name[name]);
        }
        last = snapshot;
        taken += 1;
        // A loop without a pause would starve the spawners.
        thread::yield_now();
    }
    taken
}

fn check(snapshot: &Snapshot) {
    assert!(snapshot.totals.is_exact(), "{:?}", snapshot.totals);
    assert_eq!(usize::try_from(snapshot.totals.live).unwrap(), snapshot.live_tasks.len());
    let mut by_name: BTreeMap<&str, u64> = BTreeMap::new();
    for task in &snapshot.live_tasks {
        *by_name.entry(task.name).or_default() += 1;
    }
    let mut sum = [0; 9];
    for (name, counts) in &snapshot.by_name {
        assert!(counts.is_exact(), "{name} {counts:?}");
        assert_eq!(counts.live, by_name.get(name).copied().unwrap_or(0), "{name}");
        for (sum, figure) in sum.iter_mut().zip(figures(counts)) {
            *sum += figure;
        }
    }
    assert_eq!(sum, figures(&snapshot.totals));
}

const fn figures(counts: &Counts) -> [u64; 9] {
    [
        counts.live,
        counts.attempted,
        counts.refused,
        counts.spawned,
        counts.completed,
        counts.cancelled,
        counts.aborted,
        counts.timed_out,
        counts.panicked,
    ]
}

#[track_caller]
fn assert_grown(before: &Counts, after: &Counts) {
    let pairs = figures(before).into_iter().zip(figures(after)).skip(1);
    assert!(pairs.into_iter().all(|(before, after)| before <= after), "{before:?} {after:?}");
}

/// A registry in a storm.
struct Site {
    tasks: TaskRegistry,
    limit: SpawnLimit,
    own: Arc<Own>,
    storm: Storm,
    to_join: mpsc::UnboundedReceiver<(&'static str, TaskHandle<()>)>,
    seed: u64,
}

impl Site {
    fn new(runtimes_go: bool) -> Self {
        // A storm that was seen before, or another.
        let seed = env::var("STORM_SEED").map_or_else(
            |_| SystemTime::UNIX_EPOCH.elapsed().unwrap().as_secs(),
            |seed| seed.parse().unwrap(),
        );
        // Shown when the test fails.
        println!("STORM_SEED={seed}");
        quiet_panics();
        let limit = SpawnLimit::new(LIMIT).per_request(8);
        let tasks = TaskRegistry::new().limit(limit.clone());
        let (handles, to_join) = mpsc::unbounded_channel();
        let own = Arc::new(Own::default());
        let layer = TaskSetLayer::new(&tasks).at_end(AtEnd::Drain(Duration::from_millis(3)));
        let storm = Storm { own: own.clone(), tasks: tasks.clone(), layer, handles, runtimes_go };
        Self { tasks, limit, own, storm, to_join, seed }
    }

    /// Lets the storm loose on threads of this runtime.
    fn start(&self, runtime: &Runtime, attempts: u64, until: Instant) -> Vec<JoinHandle<()>> {
        let maker = |n| {
            let (storm, runtime) = (self.storm.clone(), runtime.handle().clone());
            let dice = Dice(self.seed ^ attempts ^ n);
            thread::spawn(move || {
                let _entered = runtime.enter();
                storm.run(dice, attempts, until);
            })
        };
        (0..THREADS).map(maker).collect()
    }

    /// Waits for all tasks and their handles, on this runtime; and compares.
    fn finish(self, runtime: &Runtime) -> Counts {
        let Self { tasks, limit, own, storm, mut to_join, .. } = self;
        // Nested spawns may still be going on; then all is over.
        tasks.close();
        tasks.cancel_all();
        drop(storm);
        runtime.block_on(async {
            tasks.wait().await;
            while let Some((name, handle)) = to_join.recv().await {
                own.yielded(name, &handle.await);
            }
        });
        assert_drained(&tasks);
        let snapshot = tasks.snapshot();
        check(&snapshot);
        let totals = snapshot.totals;
        assert_eq!(totals.attempted, own.attempted.load(Relaxed));
        assert_eq!(totals.refused, own.refused.load(Relaxed));
        assert_eq!(limit.in_use(), 0);
        let (yielded, unseen) = (own.yielded.lock().unwrap(), own.unseen.lock().unwrap());
        for name in NAMES {
            let counts = &snapshot.by_name[name];
            let seen = |outcome| yielded.get(&(name, outcome)).copied().unwrap_or(0);
            let pairs = [
                (counts.completed, seen("completed")),
                (counts.cancelled, seen("cancelled")),
                (counts.aborted, seen("aborted")),
                (counts.timed_out, seen("timed out")),
                (counts.panicked, seen("panicked")),
            ];
            // What has no handle any more is counted by the ledger alone.
            assert!(pairs.iter().all(|(ledger, seen)| ledger >= seen), "{name}: {pairs:?}");
            let more: u64 = pairs.iter().map(|(ledger, seen)| ledger - seen).sum();
            assert_eq!(more, unseen.get(name).copied().unwrap_or(0), "{name}: {pairs:?}");
        }
        totals
    }
}

fn runtime() -> Runtime {
    Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap()
}

#[test]
fn in_a_storm_the_ledger_and_the_handles_agree() {
    let site = Site::new(false);
    let runtime = runtime();
    let is_over = Arc::new(AtomicBool::new(false));
    let watcher = thread::spawn({
        let (tasks, is_over) = (site.tasks.clone(), is_over.clone());
        move || watch(&tasks, &is_over)
    });
    // A task that waits for ever ends with its request, its registry or its handle; one that is
    // kept, here, when the limit is nearly full of such.
    let sweeper = thread::spawn({
        let (tasks, is_over) = (site.tasks.clone(), is_over.clone());
        move || {
            while !is_over.load(Relaxed) {
                if tasks.len() > LIMIT * 3 / 4 {
                    tasks.cancel_all();
                }
                thread::yield_now();
            }
        }
    });
    for maker in site.start(&runtime, ATTEMPTS, Instant::now() + AT_MOST) {
        maker.join().unwrap();
    }
    let totals = site.finish(&runtime);
    is_over.store(true, Relaxed);
    let snapshots = watcher.join().unwrap();
    sweeper.join().unwrap();
    assert_eq!(totals.aborted, 0, "the runtime lives");
    // It was a storm of everything.
    assert!(snapshots > 10, "{snapshots} snapshots");
    let all =
        [totals.refused, totals.completed, totals.cancelled, totals.panicked, totals.timed_out];
    assert!(all.into_iter().all(|figure| figure > 100), "{totals:?}");
}

#[test]
fn in_a_storm_runtimes_can_come_and_go() {
    let site = Site::new(true);
    let mut attempts = 0;
    let until = Instant::now() + AT_MOST;
    for _ in 0..RUNTIMES {
        let passing = runtime();
        attempts += ATTEMPTS / RUNTIMES / 2;
        let makers = site.start(&passing, attempts, until);
        while site.own.attempted.load(Relaxed) < attempts - ATTEMPTS / RUNTIMES / 4
            && Instant::now() < until
        {
            thread::yield_now();
        }
        // They go on without it.
        drop(passing);
        for maker in makers {
            maker.join().unwrap();
        }
        assert_drained(&site.tasks);
        assert_eq!(site.limit.in_use(), 0);
    }
    let totals = site.finish(&runtime());
    assert!(totals.aborted > 0 && totals.completed > 0 && totals.refused > 0, "{totals:?}");
}

/// The panics of the storm are meant, and there are many.
fn quiet_panics() {
    let hook = panic::take_hook();
    panic::set_hook(Box::new(move |info| {
        let message = info.payload().downcast_ref::<&str>();
        if !message.is_some_and(|message| message.starts_with("storm: ")) {
            hook(info);
        }
    }));
}
