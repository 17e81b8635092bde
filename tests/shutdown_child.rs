//! A process to shut down, for the tests of the shutdown: what it does is its first argument, its
//! budget in milliseconds the second, and what it prints is the report. With a third one its log
//! panics, or blocks.

#![expect(clippy::print_stdout, reason = "it is a program")]

use std::{
    convert::Infallible,
    env,
    future::{self, pending},
    io::Write,
    pin::Pin,
    sync::mpsc,
    task::Poll,
    thread,
    time::Duration,
};

use bytes::Bytes;
use http::{Request, Response};
use http_body_util::Full;
use tokio::time::sleep;
use tower::{Service, ServiceBuilder, service_fn};
use tower_response_end::hold;
use tower_tasks::{
    AtEnd, Report, Shutdown, TaskRegistry, TaskSet, TaskSetLayer, shutdown::RunError,
};
use tracing_subscriber::{
    layer::{Context, SubscriberExt},
    util::SubscriberInitExt,
};

/// Long enough for what comes to its end by itself.
const SOON: Duration = Duration::from_millis(20);

fn main() {
    // Its lines tell how far it has come.
    let log = tracing_subscriber::fmt().with_ansi(false).with_writer(std::io::stderr).finish();
    let mut args = env::args().skip(1);
    let what = args.next().expect("what to do");
    let budget = args.next().and_then(|budget| budget.parse().ok()).expect("a budget");
    log.with(args.next().map(|how| Fails { blocks: how == "blocks" })).init();
    let threads = if what == "current_thread" { 1 } else { 2 };
    let mut runtime = if threads == 1 {
        tokio::runtime::Builder::new_current_thread()
    } else {
        tokio::runtime::Builder::new_multi_thread()
    };
    let runtime = runtime.worker_threads(threads).enable_all().build().expect("a runtime");
    runtime.block_on(run(&what, Duration::from_millis(budget)));
}

/// Whatever the shutdown says.
struct Fails {
    blocks: bool,
}

impl<S: tracing::Subscriber> tracing_subscriber::Layer<S> for Fails {
    fn on_event(&self, event: &tracing::Event<'_>, _: Context<'_, S>) {
        if event.metadata().target().starts_with("tower_shutdown") {
            assert!(self.blocks, "the log panics");
            thread::sleep(Duration::MAX);
        }
    }
}

async fn run(what: &str, budget: Duration) {
    let tasks = TaskRegistry::new();
    let shutdown = Shutdown::new(budget).tasks(&tasks);
    match what {
        "failed" => {
            ready();
            failed(&shutdown).await.exit()
        }
        "gone" => {
            let error = failed(&shutdown).await;
            drop((shutdown, error));
            ready();
            return pending().await;
        }
        "one_of_two_gone" => {
            drop(failed(&shutdown).await);
            drop(shutdown);
            let shutdown = Shutdown::new(budget).tasks(&tasks);
            return serve(what, &shutdown).await;
        }
        "gone_at_its_end" => {
            let report = shutdown.run(server(&shutdown, false)).await.expect("it serves");
            drop(shutdown);
            // So long the thread that has heard the signal could end the process.
            sleep(SOON).await;
            print_and_exit(report)
        }
        "many_gone" => {
            for _ in 0..20 {
                drop(failed(&Shutdown::new(budget)).await);
            }
            drop(shutdown);
            let one_is_left = async {
                while threads_called("shutdown") > 1 {
                    sleep(Duration::from_millis(1)).await;
                }
            };
            tokio::time::timeout(Duration::from_secs(60), one_is_left).await.expect("they end");
            ready();
            return pending().await;
        }
        "by_hand" => {
            drop(tasks.spawn("forever", pending::<()>()));
            let shutdown = shutdown.settle(budget);
            let mut signalled = std::pin::pin!(shutdown.signalled());
            poll_once(signalled.as_mut()).await;
            ready();
            signalled.await;
            let report = shutdown.finish().await;
            print_and_exit(report)
        }
        "destructor_of_the_server" => {
            struct Blocks;
            impl Drop for Blocks {
                fn drop(&mut self) {
                    thread::sleep(Duration::MAX);
                }
            }
            let signalled = shutdown.signalled();
            let server = async {
                let _blocks = Blocks;
                let mut signalled = std::pin::pin!(signalled);
                poll_once(signalled.as_mut()).await;
                ready();
                pending::<Result<(), std::io::Error>>().await
            };
            shutdown.run(server).await.expect("it serves").exit()
        }
        "unpolled" => {
            let signalled = shutdown.signalled();
            let finish = async {
                signalled.await;
                shutdown.finish().await
            };
            drop(tasks.spawn("task", sleep(SOON)));
            let mut finish = std::pin::pin!(finish);
            poll_once(finish.as_mut()).await;
            ready();
            // It is polled until it drains, and then something else is more important.
            while !shutdown.watch().is_draining() {
                poll_once(finish.as_mut()).await;
                sleep(Duration::from_millis(1)).await;
            }
            sleep(budget + Duration::from_secs(3)).await;
            println!("goes on");
            return;
        }
        _ => {}
    }
    // Dropped by what is to run before the signal comes.
    let (runs, running) = mpsc::channel::<()>();
    start(what, &tasks, &shutdown, &runs);
    drop(runs);
    // On this thread, which is not a worker.
    let _ = running.recv();
    serve(what, &shutdown).await;
}

async fn serve(what: &str, shutdown: &Shutdown) {
    let report = shutdown.run(server(shutdown, what == "by_itself")).await.expect("it serves");
    print_and_exit(report)
}

fn print_and_exit(report: Report) -> ! {
    println!("{}", serde_json::to_string(&report).expect("a report is JSON"));
    report.exit()
}

fn server(
    shutdown: &Shutdown,
    ends_by_itself: bool,
) -> impl Future<Output = Result<(), std::io::Error>> + use<> {
    let signalled = shutdown.signalled();
    async move {
        let mut signalled = std::pin::pin!(signalled);
        // Signals are listened to from its first poll on.
        poll_once(signalled.as_mut()).await;
        ready();
        if !ends_by_itself {
            signalled.await;
        }
        Ok(())
    }
}

/// So many of this process.
fn threads_called(name: &str) -> usize {
    let threads = std::fs::read_dir("/proc/self/task").expect("this is Linux");
    let names = threads.flatten().flat_map(|it| std::fs::read_to_string(it.path().join("comm")));
    names.filter(|it| it.trim_end() == name).count()
}

fn ready() {
    println!("ready");
    std::io::stdout().flush().expect("somebody reads it");
}

async fn poll_once<F: Future>(mut future: Pin<&mut F>) {
    let _ = future::poll_fn(|cx| Poll::Ready(future.as_mut().poll(cx))).await;
}

async fn failed(shutdown: &Shutdown) -> RunError<std::io::Error> {
    let server = future::ready(Err::<(), _>(std::io::Error::other("the port is taken")));
    shutdown.run(server).await.expect_err("the server has failed")
}

/// What is there when the signal comes.
fn start(what: &str, tasks: &TaskRegistry, shutdown: &Shutdown, runs: &mpsc::Sender<()>) {
    let layers = ServiceBuilder::new().layer(shutdown.layer()).layer(TaskSetLayer::new(tasks));
    let request = |handle: fn() -> Handled| {
        let mut service = layers.service(service_fn(move |_: Request<()>| handle()));
        drop(tokio::spawn(service.call(Request::new(()))));
    };
    match what {
        "nothing" => {}
        "request" => request(|| Box::pin(async { answer_after(SOON).await })),
        "task" | "by_itself" => drop(tasks.spawn("task", sleep(SOON))),
        "graceful" => drop(tasks.spawn_graceful("graceful", async |stop| {
            stop.cancelled().await;
            sleep(SOON).await;
        })),
        "blocking" => {
            let runs = runs.clone();
            drop(tasks.spawn_blocking("blocking", move |_| {
                drop(runs);
                thread::sleep(SOON);
            }));
        }
        "panic" => drop(tasks.spawn("panic", async {
            sleep(SOON).await;
            panic!("by itself");
        })),
        "timeout" => drop(tasks.task("timeout").timeout(SOON).spawn(pending::<()>())),
        "cancel" => request(|| {
            Box::pin(async {
                let set = TaskSet::current().expect("a layer is above");
                let task = set.task("dies with its response").at_end(AtEnd::Cancel);
                drop(task.spawn(pending::<()>()));
                answer_after(SOON).await
            })
        }),
        "forever" | "destructor" => {
            let says = Says("dropped");
            drop(tasks.spawn("forever", async move {
                let _says = says;
                pending::<()>().await;
            }));
        }
        "goes_on" | "twice" => goes_on(tasks, runs.clone()),
        "thrice" => {
            goes_on(tasks, runs.clone());
            blocks(tasks, runs.clone());
        }
        "stuck_closure" => blocks(tasks, runs.clone()),
        "stuck_request" => request(|| Box::pin(pending())),
        "held" => request(|| {
            Box::pin(async {
                let held = hold();
                drop(tokio::spawn(async move {
                    let _held = held;
                    pending::<()>().await;
                }));
                answer_after(Duration::ZERO).await
            })
        }),
        // Nothing wakes, so the thread that looks for events may be the one that is taken.
        "never_yields" => {
            let runs = runs.clone();
            drop(tasks.spawn("never_yields", async move {
                drop(runs);
                thread::sleep(Duration::MAX);
            }));
        }
        "current_thread" => {
            let watch = shutdown.watch();
            drop(tasks.spawn("takes_the_thread", async move {
                watch.draining().await;
                tracing::info!("takes the thread");
                thread::sleep(Duration::MAX);
            }));
        }
        "no_runtime" => {
            // Its tasks go with it.
            let other = thread::spawn({
                let tasks = tasks.clone();
                move || {
                    let runtime = tokio::runtime::Builder::new_current_thread().build();
                    let runtime = runtime.expect("a runtime");
                    runtime.block_on(async { drop(tasks.spawn("gone", pending::<()>())) });
                }
            });
            other.join().expect("it does not panic");
        }
        _ => panic!("what is {what}?"),
    }
}

/// A graceful task that does not do as it is told.
fn goes_on(tasks: &TaskRegistry, runs: mpsc::Sender<()>) {
    let grace = tasks.task("goes_on").grace(Duration::MAX);
    drop(grace.spawn_graceful(async move |_| {
        drop(runs);
        pending::<()>().await;
    }));
}

fn blocks(tasks: &TaskRegistry, runs: mpsc::Sender<()>) {
    drop(tasks.spawn_blocking("blocks", move |_| {
        drop(runs);
        thread::sleep(Duration::MAX);
    }));
}

type Reply = Result<Response<Full<Bytes>>, Infallible>;
type Handled = std::pin::Pin<Box<dyn Future<Output = Reply> + Send>>;

async fn answer_after(time: Duration) -> Reply {
    sleep(time).await;
    Ok(Response::default())
}

/// Says so when it is dropped.
struct Says(&'static str);

impl Drop for Says {
    fn drop(&mut self) {
        println!("{}", self.0);
    }
}
