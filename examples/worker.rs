//! A worker that takes jobs from a queue: the same layers without HTTP.
//!
//! `cargo run --example worker` prints what happens. It checks all that it shows, and exits with 0
//! only if everything came out as it should.

#![expect(clippy::print_stdout, clippy::print_stderr, reason = "it shows what happens")]

use std::{error::Error, process::ExitCode, time::Duration};

use tokio::{
    sync::{mpsc, oneshot},
    time::timeout,
};
use tower::{Service, ServiceBuilder, ServiceExt, service_fn};
use tower_tasks::{
    TaskRegistry, TaskSet, TaskSetLayer,
    task_set::{Cause, StopToken, TaskState, assert_drained},
};

type Result<T = (), E = Box<dyn Error + Send + Sync>> = std::result::Result<T, E>;

/// A photo to be put on the page.
struct Job {
    photo: &'static str,
    /// When it may be fetched.
    fetched: oneshot::Receiver<()>,
}

/// Does one job. The page is told when the photo is there; that the job is done does not wait for
/// it.
async fn publish(job: Job) -> Result<usize> {
    let tasks = TaskSet::current()?;
    job.fetched.await?;
    // Much work for the processor: not on the threads where others wait.
    let resize = tasks.spawn_blocking("resize", move |stop| resize(job.photo, &stop));
    let size = resize.map_err(|refused| refused.reason)?.await?;
    let notify = tasks.spawn("notify_page", async { /* and wait for its answer */ });
    notify.map_err(|refused| refused.reason)?;
    println!("    {} is published, {size} bytes", job.photo);
    Ok(size)
}

fn resize(photo: &str, stop: &StopToken) -> usize {
    // A closure is not cancelled: one that takes long looks now and then.
    (0..1_000).take_while(|_| !stop.is_cancelled()).map(|line| line % photo.len()).sum()
}

/// Takes jobs until it is told to stop, and then finishes the one in hand.
async fn consume(
    mut queue: mpsc::Receiver<Job>,
    mut worker: impl Service<Job, Response = usize, Error = impl Into<Box<dyn Error + Send + Sync>>>,
    stop: StopToken,
) -> Result<(mpsc::Receiver<Job>, Cause)> {
    loop {
        let job = tokio::select! {
            // What is there to be told comes first.
            biased;
            cause = stop.cancelled() => return Ok((queue, cause)),
            job = queue.recv() => job.ok_or("the queue is gone")?,
        };
        worker.ready().await.map_err(Into::into)?.call(job).await.map_err(Into::into)?;
    }
}

// ---- The story: what happens, and what must come of it.

async fn run() -> Result {
    let tasks = TaskRegistry::new();
    let worker =
        ServiceBuilder::new().layer(TaskSetLayer::new(&tasks).plain()).service(service_fn(publish));

    println!("Two tasks of the process: one that takes jobs, and one that says that it is there.");
    let (queue, jobs) = mpsc::channel(8);
    let consumer = tasks.task("consumer").grace(Duration::from_secs(10));
    let consumer = consumer
        .spawn_graceful(move |stop| consume(jobs, worker, stop))
        .map_err(|refused| refused.reason)?;
    tasks
        .spawn("heartbeat", async {
            loop {
                tokio::time::sleep(Duration::from_secs(1)).await;
            }
        })
        .map_err(|refused| refused.reason)?;

    let mut fetch = Vec::new();
    for photo in ["dawn.jpg", "noon.jpg", "dusk.jpg"] {
        let (fetched, is_fetched) = oneshot::channel();
        queue.send(Job { photo, fetched: is_fetched }).await.map_err(|_| "the consumer is gone")?;
        fetch.push(fetched);
    }
    let mut fetch = fetch.into_iter();
    let mut fetched = || fetch.next().ok_or("three jobs")?.send(()).map_err(|()| "it is lost");

    println!("The first job is done, and the second is in hand when the process is to stop.");
    fetched()?;
    // Two jobs are out of the queue when there is room for all but one.
    while queue.capacity() < 7 || !tasks.snapshot().by_name.contains_key("notify_page") {
        tokio::task::yield_now().await;
    }
    consumer.cancel();
    let state = tasks.snapshot().live_tasks.into_iter().find(|task| task.name == "consumer");
    check("the consumer is told", state.is_some_and(|it| it.state == TaskState::Cancelling))?;
    fetched()?;
    let (mut left, cause) = consumer.await??;
    check("it has finished what it had in hand, and says why", cause == Cause::Requested)?;
    check("the third job is left", left.try_recv().is_ok_and(|job| job.photo == "dusk.jpg"))?;

    println!("What is left of the process has no end of its own.");
    tasks.close();
    check("it does not end", timeout(Duration::from_millis(20), tasks.wait()).await.is_err())?;
    tasks.cancel_all();
    timeout(Duration::from_secs(10), tasks.wait()).await?;
    assert_drained(&tasks);

    println!("The ledger.");
    let ledger = tasks.snapshot();
    let rows: Vec<_> =
        ledger.by_name.iter().map(|(name, of)| (*name, of.completed, of.cancelled)).collect();
    for (name, completed, cancelled) in &rows {
        println!("    {name:12} completed {completed}, cancelled {cancelled}");
    }
    let expected =
        [("consumer", 1, 0), ("heartbeat", 0, 1), ("notify_page", 2, 0), ("resize", 2, 0)];
    check("every task came to the end that it should have", rows == expected)
}

fn check(what: &str, holds: bool) -> Result {
    println!("  {} {what}", if holds { "ok" } else { "NO" });
    if holds { Ok(()) } else { Err(format!("not so: {what}").into()) }
}

#[tokio::main]
async fn main() -> ExitCode {
    match timeout(Duration::from_secs(60), run()).await {
        Ok(Ok(())) => ExitCode::SUCCESS,
        Ok(Err(error)) => {
            eprintln!("{error}");
            ExitCode::FAILURE
        }
        Err(_) => {
            eprintln!("it hangs");
            ExitCode::FAILURE
        }
    }
}
