//! A server with the whole stack, clients that misbehave, and a ledger that must be exact.
//!
//! ```text
//! cargo run --release --example chaos -- --requests 1000000
//!
//! --requests N      so many requests; 20,000 if nothing is said
//! --duration 30m    or so long: s, m or h
//! --seed N          of all dice; printed, and new if it is not given
//! --report FILE     writes what it has found as JSON
//! ```
//!
//! axum serves HTTP/1.1 and HTTP/2, tonic gRPC. Clients leave before the head, in the body or in
//! the upload, with FIN, RST or a reset stream, or read slowly; handlers, bodies and tasks panic;
//! tasks nest, block, overrun and ignore what they are told; limits are hit, and waited for in
//! vain or not; handlers are shielded; timeouts pass, attempts are retried, connections upgraded;
//! and the server is shut down at any moment and started again. The driver counts for itself what
//! becomes of each task.
//!
//! When it is quiet, now and then and at the end, driver, observer, handles and ledger must agree,
//! no task may live, and all permits must be back. Whatever runs must see the ids of its own
//! request; nothing may run after its shutdown. Each difference is printed, and then the exit code
//! is 1.

#![expect(clippy::print_stdout, clippy::print_stderr, reason = "it is a program")]

mod client;
mod histogram;
mod new_task;
mod plan;
mod site;
mod vitals;

use std::{
    env, fs,
    io::{self, IsTerminal, Write},
    panic,
    process::ExitCode,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::{Duration, Instant, SystemTime},
};

use tokio::task::JoinSet;
use tower_tasks::catch_unwind::install_hook;

use crate::{
    client::Client,
    plan::{Dice, Plan},
    site::{BoxError, Run, Site, lock},
    vitals::Vitals,
};

const WORKERS: usize = 64;
/// A client sends so many requests before it looks whether it is quiet time.
const AT_ONCE: u64 = 4;
/// It is quiet after so many.
const SEGMENT: u64 = 5_000;
/// What live bytes may grow by between a tenth and the end, besides 2 in 100.
const GROWTH: usize = 64 * 1024;

struct Options {
    requests: u64,
    duration: Duration,
    seed: u64,
    report: Option<String>,
}

impl Options {
    fn read() -> Result<Self, BoxError> {
        let mut requests = None;
        let mut duration = None;
        let mut seed = SystemTime::UNIX_EPOCH.elapsed()?.as_secs();
        let mut report = None;
        let mut args = env::args().skip(1);
        while let Some(arg) = args.next() {
            let value = args.next().ok_or_else(|| format!("{arg} needs a value"))?;
            let number = || value.replace('_', "").parse::<u64>();
            match arg.as_str() {
                "--requests" => requests = Some(number()?),
                "--seed" => seed = number()?,
                "--report" => report = Some(value),
                "--duration" => {
                    let unit = value.trim_start_matches(|char: char| char.is_ascii_digit());
                    let number = &value[..value.len() - unit.len()];
                    let seconds = match unit {
                        "s" => 1,
                        "m" => 60,
                        "h" => 3600,
                        _ => return Err(format!("{value} is no duration, as 30m is").into()),
                    };
                    duration =
                        Some(Duration::from_secs(number.parse::<u32>()?.max(1).into()) * seconds);
                }
                _ => return Err(format!("{arg} is no option").into()),
            }
        }
        let requests =
            requests.unwrap_or(if duration.is_some() { u64::MAX } else { 20_000 }).max(1);
        Ok(Self { requests, duration: duration.unwrap_or(Duration::MAX), seed, report })
    }
}

fn main() -> ExitCode {
    let options = match Options::read() {
        Ok(options) => options,
        Err(error) => {
            eprintln!("{error}");
            return ExitCode::from(2);
        }
    };
    quiet_panics();
    println!("seed {}", options.seed);
    let run = Arc::new(Run::new());
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build();
    let started = Instant::now();
    let samples = match runtime {
        Ok(runtime) => {
            let samples = runtime.block_on(drive(&options, &run, started));
            runtime.shutdown_timeout(site::FOR_EVER);
            samples
        }
        Err(error) => Err(error.into()),
    };
    match samples {
        Ok(samples) => finish(&options, &run, &samples, started.elapsed()),
        Err(error) => {
            eprintln!("{error}");
            ExitCode::from(2)
        }
    }
}

/// What there was when a server had been shut down, after so many requests.
#[derive(Clone, Copy, Debug, serde::Serialize)]
struct Sample {
    requests: u64,
    #[serde(flatten)]
    vitals: Vitals,
}

async fn drive(
    options: &Options,
    run: &Arc<Run>,
    started: Instant,
) -> Result<Vec<Sample>, BoxError> {
    let mut dice = Dice(options.seed);
    let segment = SEGMENT.min(options.requests.div_ceil(10)).max(AT_ONCE);
    // Its growth must not be taken for a leak.
    let mut samples = Vec::with_capacity(100_000);
    let next = Arc::new(AtomicU64::new(0));
    let progress = Progress::new();
    // In thousandths.
    let share = |done: u64| {
        let of_time = started.elapsed().as_millis() * 1000 / options.duration.as_millis();
        let of_requests = u128::from(done) * 1000 / u128::from(options.requests);
        u64::try_from(of_time.max(of_requests)).unwrap_or(1000)
    };
    while share(next.load(Relaxed)) < 1000 {
        let site = Site::start(run, &mut dice).await?;
        for life in 1.. {
            let first = next.load(Relaxed);
            let until = (first + segment).min(options.requests);
            let mut workers = JoinSet::new();
            for _ in 0..WORKERS {
                workers.spawn(work(site.clone(), next.clone(), until, options.seed));
            }
            site.set_limit(usize::try_from(20 + dice.below(200)).unwrap_or(20));
            // At any moment, whatever is under way.
            let abrupt = dice.percent(30);
            if abrupt {
                let at = first + dice.below(segment);
                while next.load(Relaxed) < at && !workers.is_empty() {
                    tokio::time::sleep(Duration::from_millis(1)).await;
                    while workers.try_join_next().is_some() {}
                }
                site.shut_down().await;
            }
            while let Some(worker) = workers.join_next().await {
                if let Err(error) = worker {
                    run.differs(format!("a client: {error}"));
                }
            }
            site.quiet().await;
            // Each worker has found that nothing was left, and counted that.
            let done = next.load(Relaxed).min(until);
            next.store(done, Relaxed);
            progress.show(share(done), done, started.elapsed(), run);
            let ends = share(done) >= 1000 || (samples.is_empty() && share(done) >= 100);
            if abrupt {
                run.count("shutdowns under load", 1);
            } else if ends || life == 3 {
                site.shut_down().await;
                run.count("shutdowns at rest", 1);
                site.quiet().await;
            } else {
                continue;
            }
            site.add_up();
            break;
        }
        drop(site);
        // What is left of connections ends with their tasks.
        tokio::time::sleep(Duration::from_millis(50)).await;
        let requests = next.load(Relaxed).min(options.requests);
        if share(requests) >= 100 {
            samples.push(Sample { requests, vitals: Vitals::now() });
        }
    }
    progress.end();
    Ok(samples)
}

async fn work(site: Arc<Site>, next: Arc<AtomicU64>, until: u64, seed: u64) {
    let mut client = Client::new(site.clone());
    while !site.is_stopping() {
        let first = next.fetch_add(AT_ONCE, Relaxed);
        if first >= until {
            break;
        }
        let plans: Vec<_> =
            (first..until.min(first + AT_ONCE)).map(|id| Arc::new(Plan::new(id, seed))).collect();
        lock(&site.plans).extend(plans.iter().map(|plan| (plan.id, plan.clone())));
        client.send(&plans).await;
        let mut all = lock(&site.plans);
        for plan in &plans {
            all.remove(&plan.id);
        }
    }
}

fn finish(options: &Options, run: &Run, samples: &[Sample], elapsed: Duration) -> ExitCode {
    let latency = &run.cancel_latency;
    let (p50, p99) = (latency.quantile(500), latency.quantile(990));
    println!("{} s", elapsed.as_secs());
    for (what, n) in &*lock(&run.totals) {
        println!("{what}: {n}");
    }
    println!(
        "cancelled after its client left: {} tasks, p50 {p50:?}, p99 {p99:?}, max {:?}",
        latency.count(),
        latency.max()
    );
    let overrun = &run.shutdown_overrun;
    println!(
        "shutdowns beyond their budget: p50 {:?}, max {:?}",
        overrun.quantile(500),
        overrun.max()
    );
    if let (Some(first), Some(last)) = (samples.first(), samples.last()) {
        let (before, after) = (first.vitals, last.vitals);
        println!("live bytes: {} at {} requests", before.live_bytes, first.requests);
        println!("live bytes: {} at {} requests", after.live_bytes, last.requests);
        println!("resident bytes: {} and {}", before.resident_bytes, after.resident_bytes);
        println!("open files: {} and {}", before.open_files, after.open_files);
        if after.live_bytes > before.live_bytes + before.live_bytes / 50 + GROWTH {
            run.differs("live bytes have grown");
        }
        if after.open_files > before.open_files {
            run.differs("open files have grown");
        }
    }
    let differences = run.differences().clone();
    println!("{} differences", differences.len());
    if let Some(file) = &options.report {
        let report = serde_json::json!({
            "seed": options.seed,
            "seconds": elapsed.as_secs_f64(),
            "totals": *lock(&run.totals),
            "cancel_latency_seconds": {
                "count": latency.count(),
                "p50": p50.as_secs_f64(),
                "p99": p99.as_secs_f64(),
                "max": latency.max().as_secs_f64(),
            },
            "samples": samples,
            "differences": differences,
        });
        if let Err(error) = fs::write(file, format!("{report:#}\n")) {
            eprintln!("{file}: {error}");
            return ExitCode::from(2);
        }
    }
    ExitCode::from(u8::from(!differences.is_empty()))
}

/// A bar, on a terminal.
struct Progress {
    is_shown: bool,
}

impl Progress {
    fn new() -> Self {
        Self { is_shown: io::stderr().is_terminal() }
    }

    fn show(&self, thousandths: u64, done: u64, elapsed: Duration, run: &Run) {
        if self.is_shown {
            let full = usize::try_from(thousandths.min(1000) / 25).unwrap_or(0);
            let rate = done * 1000 / u64::try_from(elapsed.as_millis()).unwrap_or(1).max(1);
            eprint!(
                "\r[{:<40}] {done} requests, {rate}/s, {} differences ",
                "#".repeat(full),
                run.differences().len()
            );
            let _ = io::stderr().flush();
        }
    }

    fn end(&self) {
        if self.is_shown {
            eprintln!();
        }
    }
}

/// The panics of the chaos are meant, and there are many.
fn quiet_panics() {
    let hook = panic::take_hook();
    panic::set_hook(Box::new(move |info| {
        let message = info.payload().downcast_ref::<&str>();
        if !message.is_some_and(|message| message.starts_with("chaos: ")) {
            hook(info);
        }
    }));
    install_hook();
}
