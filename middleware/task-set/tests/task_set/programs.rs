//! Random programs under nested limits, on a paused clock: none is left idle with a handle that
//! nobody resolves. Whoever waits has an hour, and nothing else takes more than some seconds: so a
//! wait that ends by its time has waited for something that would never have come.

use std::{
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering::SeqCst},
    },
    time::Duration,
};

use tokio::time::{Instant, sleep};
use tower::{Layer, Service, service_fn};
use tower_spawn_limit::{RequestLimitLayer, SpawnLimitLayer};
use tower_task_set::{SpawnLimit, TaskRegistry, TaskSet, TaskSetLayer};

const HOUR: Duration = Duration::from_secs(3600);

type Work<T> = Pin<Box<dyn Future<Output = T> + Send>>;

/// xorshift64*: the seed says all.
#[derive(Clone)]
struct Random(u64);

impl Random {
    fn below(&mut self, end: usize) -> usize {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        let high = self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 33;
        usize::try_from(high).unwrap() % end
    }

    fn fork(&mut self) -> Self {
        Self(self.0.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ self.below(usize::MAX >> 33) as u64 | 1)
    }
}

#[derive(Clone)]
struct World {
    tasks: TaskRegistry,
    process: SpawnLimit,
    routes: [SpawnLimitLayer; 2],
    requests: RequestLimitLayer,
    left: Arc<AtomicUsize>,
    late: Arc<AtomicUsize>,
}

impl World {
    fn new(random: &mut Random) -> Self {
        let mut limit = || {
            let limit = SpawnLimit::new(1 + random.below(3));
            if random.below(2) == 0 { limit } else { limit.per_request(1 + random.below(2)) }
        };
        let (process, routes) = (limit(), [limit(), limit()]);
        let requests = RequestLimitLayer::new(1 + random.below(3)).wait(HOUR);
        Self {
            tasks: TaskRegistry::new().limit(process.clone()),
            process,
            routes: routes.map(SpawnLimitLayer::new),
            requests,
            left: Arc::new(AtomicUsize::new(64)),
            late: Arc::default(),
        }
    }

    /// Whether there may be one task more.
    fn one_more(&self) -> bool {
        self.left.fetch_update(SeqCst, SeqCst, |left| left.checked_sub(1)).is_ok()
    }

    /// Serves a request in process, below none, one or both of the routes' limits.
    fn request(self, mut random: Random, depth: usize) -> Work<()> {
        let world = self.clone();
        let inner = random.fork();
        let handler = service_fn(move |()| world.clone().program(inner.clone(), depth));
        let handler = TaskSetLayer::new(&self.tasks).plain().layer(handler);
        let [one, two] = self.routes.clone().map(SpawnLimitLayer::plain);
        let requests = self.requests.clone().plain();
        macro_rules! call {
            ($service:expr) => {{
                let mut service = requests.layer($service);
                Box::pin(async move { drop(service.call(()).await) })
            }};
        }
        match random.below(4) {
            0 => call!(handler),
            1 => call!(one.layer(handler)),
            2 => call!(two.layer(handler)),
            _ => call!(one.layer(two.layer(handler))),
        }
    }

    fn program(self, mut random: Random, depth: usize) -> Work<Result<(), ()>> {
        Box::pin(async move {
            let Ok(set) = TaskSet::current() else { return Ok(()) };
            let mut handles = Vec::new();
            for _ in 0..random.below(5) {
                let (world, inner) = (self.clone(), random.fork());
                let spawns = depth > 0 && self.one_more();
                let child = async move { world.program(inner, depth.saturating_sub(1)).await };
                match random.below(8) {
                    0 | 1 if spawns => handles.extend(set.spawn("task", child)),
                    2 | 3 if spawns => {
                        let start = Instant::now();
                        let spawned = set.spawn_within(HOUR, "waits", child).await;
                        if start.elapsed() >= HOUR {
                            self.late.fetch_add(1, SeqCst);
                        }
                        // Or it is run in place.
                        match spawned {
                            Ok(handle) => handles.push(handle),
                            Err(refused) if random.below(2) == 0 => drop(refused.future.await),
                            Err(_) => {}
                        }
                    }
                    4 if spawns => {
                        let group = set.group().limit(1 + random.below(2));
                        drop(group.task("of a group").within(HOUR).spawn(child).await);
                        let start = Instant::now();
                        for _ in 0..random.below(3) {
                            let (world, inner) = (self.clone(), random.fork());
                            if !self.one_more() {
                                break;
                            }
                            let child = async move { world.program(inner, depth - 1).await };
                            drop(group.task("of a group").within(HOUR).spawn(child).await);
                        }
                        if start.elapsed() >= HOUR {
                            self.late.fetch_add(1, SeqCst);
                        }
                        group.wait().await;
                    }
                    5 if spawns => self.clone().request(random.fork(), depth - 1).await,
                    6 => {
                        if let Some(handle) = handles.pop() {
                            drop(handle.await);
                        }
                    }
                    7 => sleep(Duration::from_millis(random.below(100) as u64)).await,
                    _ => tokio::task::yield_now().await,
                }
            }
            for handle in handles {
                drop(handle.await);
            }
            Ok(())
        })
    }
}

fn run(seed: u64) {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_time()
        .start_paused(true)
        .build()
        .unwrap();
    runtime.block_on(async move {
        let mut random = Random(seed);
        let world = World::new(&mut random);
        let start = Instant::now();
        let depth = 1 + random.below(8);
        let requests: Vec<_> = (0..=random.below(4))
            .map(|_| tokio::spawn(world.clone().request(random.fork(), depth)))
            .collect();
        for request in requests {
            request.await.unwrap();
        }
        world.tasks.close();
        world.tasks.wait().await;
        assert!(start.elapsed() < HOUR, "seed {seed}: somebody waited in vain");
        assert_eq!(world.late.load(SeqCst), 0, "seed {seed}");
        let counts = world.tasks.snapshot().totals;
        assert!(counts.is_exact() && counts.live == 0, "seed {seed}: {counts:?}");
        assert_eq!((world.process.in_use(), world.process.waiting()), (0, 0), "seed {seed}");
        assert_eq!((world.requests.in_use(), world.requests.waiting()), (0, 0), "seed {seed}");
    });
}

#[test]
fn no_program_is_left_idle_with_a_handle_that_nobody_resolves() {
    for seed in 1..=10_000 {
        run(seed);
    }
}
