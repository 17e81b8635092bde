//! A whole axum server on loopback: instructions per request, and how soon after a disconnect the
//! request's tasks are gone.
#![expect(clippy::print_stdout, reason = "a bench prints what it measures")]
#![expect(clippy::cast_precision_loss, reason = "no figure is that large")]

use std::{
    convert::Infallible,
    fs,
    io::{BufRead, BufReader, Read, Write, stdin},
    net::{SocketAddr, TcpStream},
    pin::Pin,
    process::{Command, Stdio},
    sync::{Mutex, PoisonError},
    task::{Context, Poll},
    thread,
    time::{Duration, Instant},
};

use axum::{
    Extension, Router,
    body::Body,
    extract::{FromRequestParts, Path},
    http::{Request, Response, request::Parts},
    routing::get,
};
use bytes::Bytes;
use http_body::Frame;
use http_body_util::BodyExt;
use tokio::{
    net::TcpListener,
    runtime::{Builder, Runtime},
    sync::oneshot,
    task::JoinHandle,
    time::sleep,
};
use tower::{layer::util::Identity, util::MapResponseLayer};
use tower_tasks::{
    AtEnd, End, RequestContextLayer, ResponseEndLayer, TaskRegistry, TaskSet, TaskSetLayer,
};
use tower_tasks_benches::{
    Budgets, args, grouped, has_valgrind, numbers, on_all_cores, percentile, table, this_program,
    this_program_under_callgrind, total_of,
};

use crate::ways::{ByHand, HandScope, Task, wait_once};

mod ways;

fn main() {
    let args = args();
    let args: Vec<_> = args.iter().map(String::as_str).collect();
    match args[..] {
        ["serve", way] => serve_until_told(way),
        ["disconnect", way, threads, connections] => {
            disconnect(way, threads == WORKERS, connections.parse().expect("a number"));
        }
        _ => {
            let quick = args.contains(&"--quick");
            let mut budgets = Budgets::default();
            if has_valgrind() {
                instructions(if quick { 150 } else { 900 }, &mut budgets);
            }
            cancel_latency(if quick { "200" } else { "1000" }, &mut budgets);
            budgets.print();
        }
    }
}

const CURRENT: &str = "current thread";
const WORKERS: &str = "2 workers";

fn runtime(workers: bool) -> Runtime {
    let runtime = if workers {
        Builder::new_multi_thread().worker_threads(2).enable_all().build()
    } else {
        Builder::new_current_thread().enable_all().build()
    };
    runtime.expect("a runtime")
}

/// What a handler starts its tasks with.
trait Spawn: FromRequestParts<()> + Send + 'static {
    fn spawn(&self, task: impl Task);

    /// Starts a task that is cancelled when the response ends, by this value or by the body's drop
    /// of what is returned.
    fn spawn_until_end(&self, task: impl Task) -> Option<AbortOnDrop>;
}

/// With nothing.
struct Bare;

impl FromRequestParts<()> for Bare {
    type Rejection = Infallible;

    async fn from_request_parts(_: &mut Parts, (): &()) -> Result<Self, Infallible> {
        Ok(Self)
    }
}

impl Spawn for Bare {
    fn spawn(&self, task: impl Task) {
        tokio::spawn(task);
    }

    fn spawn_until_end(&self, task: impl Task) -> Option<AbortOnDrop> {
        Some(AbortOnDrop(tokio::spawn(task)))
    }
}

struct AbortOnDrop(JoinHandle<()>);

impl Drop for AbortOnDrop {
    fn drop(&mut self) {
        self.0.abort();
    }
}

impl Spawn for Extension<HandScope> {
    fn spawn(&self, task: impl Task) {
        self.0.spawn("task", task);
    }

    fn spawn_until_end(&self, task: impl Task) -> Option<AbortOnDrop> {
        self.0.spawn("task", task);
        None
    }
}

impl Spawn for TaskSet {
    fn spawn(&self, task: impl Task) {
        self.spawn("task", task).expect("nothing is full or closed");
    }

    fn spawn_until_end(&self, task: impl Task) -> Option<AbortOnDrop> {
        let task = self.task("task").at_end(AtEnd::Cancel).spawn(task);
        task.expect("nothing is full or closed");
        None
    }
}

fn routes<S: Spawn>() -> Router {
    fn three<T: Task>(spawner: &impl Spawn, task: impl Fn() -> T) -> &'static str {
        for _ in 0..3 {
            spawner.spawn(task());
        }
        "answer"
    }
    let sleeps = || async { sleep(Duration::from_millis(1)).await };
    Router::new()
        .route("/plain", get(async || "answer"))
        .route("/ready", get(async |spawner: S| three(&spawner, || async {})))
        .route("/waits", get(async |spawner: S| three(&spawner, wait_once)))
        .route("/sleeps", get(async move |spawner: S| three(&spawner, sleeps)))
        .route("/stream/{connection}", get(stream::<S>))
}

fn app(way: &str) -> Router {
    let ours = TaskSetLayer::new(&TaskRegistry::new());
    match way {
        "no layer" => routes::<Bare>(),
        "identity layer" => routes::<Bare>().layer(Identity::new()),
        "a layer that wraps the body" => {
            routes::<Bare>().layer(MapResponseLayer::new(|response: Response<Body>| {
                response.map(|body| body.map_err(std::convert::identity))
            }))
        }
        "by hand" => routes::<Extension<HandScope>>().layer(ByHand::new(None).layer()),
        "ours" => routes::<TaskSet>().layer(ours),
        "ours, all layers" => routes::<TaskSet>().layer((
            RequestContextLayer::new(|request: &Request<Body>| request.uri().path().len()),
            ResponseEndLayer::new(|_: &Request<Body>| |_: End| {}),
            ours,
        )),
        _ => panic!("no such way: {way}"),
    }
}

/// Serves on one thread, and prints its port, until its input ends.
fn serve_until_told(way: &str) {
    let (told, end) = oneshot::channel::<()>();
    thread::spawn(move || {
        let _ = stdin().read_to_end(&mut Vec::new());
        drop(told);
    });
    runtime(false).block_on(async {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        println!("{}", listener.local_addr().expect("an address").port());
        tokio::select! {
            result = axum::serve(listener, app(way)) => result.expect("it serves"),
            _ = end => {}
        }
    });
}

/// Instructions of a server that is started, and asked so often for this.
fn total(way: &str, path: &str, requests: usize) -> f64 {
    let mut command = this_program_under_callgrind();
    command.args(["serve", way]).stdin(Stdio::piped()).stdout(Stdio::piped());
    let mut server = command.stderr(Stdio::piped()).spawn().expect("valgrind runs");
    let mut port = String::new();
    let mut stdout = BufReader::new(server.stdout.take().expect("it is piped"));
    stdout.read_line(&mut port).expect("it prints its port");
    let port: u16 = port.trim().parse().expect("a port");
    let mut connection = connect(SocketAddr::from(([127, 0, 0, 1], port)));
    for headers in CLIENTS.into_iter().cycle().take(requests) {
        ask(&mut connection, path, headers, b"answer");
    }
    // Also ends its input.
    let output = server.wait_with_output().expect("it ends");
    total_of(&output.stderr)
}

fn connect(address: SocketAddr) -> TcpStream {
    let connection = TcpStream::connect(address).expect("it listens");
    connection.set_nodelay(true).expect("a socket");
    connection
}

/// What curl, Requests and Firefox send besides the host. In turn: what a request costs depends on
/// its headers, and on the state of the heap that these leave behind.
const CLIENTS: [&str; 3] = [
    "User-Agent: curl/8.14.1\r\n\
     Accept: */*\r\n",
    "User-Agent: python-requests/2.32.5\r\n\
     Accept-Encoding: gzip, deflate\r\n\
     Accept: */*\r\n\
     Connection: keep-alive\r\n",
    "User-Agent: Mozilla/5.0 (X11; Linux x86_64; rv:140.0) Gecko/20100101 Firefox/140.0\r\n\
     Accept: text/html,application/xhtml+xml,application/xml;q=0.9,*/*;q=0.8\r\n\
     Accept-Language: en-US,en;q=0.5\r\n\
     Accept-Encoding: gzip, deflate, br, zstd\r\n\
     Connection: keep-alive\r\n\
     Upgrade-Insecure-Requests: 1\r\n\
     Sec-Fetch-Dest: document\r\n\
     Sec-Fetch-Mode: navigate\r\n\
     Sec-Fetch-Site: none\r\n\
     Sec-Fetch-User: ?1\r\n\
     Priority: u=0, i\r\n",
];

/// Sends a request, and waits until this part of the response's body has come.
fn ask(connection: &mut TcpStream, path: &str, headers: &str, until: &[u8]) {
    let request = format!("GET {path} HTTP/1.1\r\nHost: localhost\r\n{headers}\r\n");
    connection.write_all(request.as_bytes()).expect("the server reads");
    let mut response = Vec::new();
    let mut buffer = [0; 1024];
    while !response.ends_with(until) {
        let read = connection.read(&mut buffer).expect("the server answers");
        assert!(read > 0, "the server has closed: {}", String::from_utf8_lossy(&response));
        response.extend_from_slice(&buffer[..read]);
    }
}

fn instructions(requests: usize, budgets: &mut Budgets) {
    let ways = [
        "no layer",
        "identity layer",
        "a layer that wraps the body",
        "by hand",
        "ours",
        "ours, all layers",
    ];
    let paths = ["/plain", "/ready", "/waits", "/sleeps"];
    let warm_up = 150;
    let runs: Vec<_> = ways
        .iter()
        .flat_map(|way| paths.map(|path| (way, path)))
        .flat_map(|(way, path)| [(way, path, warm_up), (way, path, warm_up + requests)])
        .collect();
    let totals = on_all_cores(&runs, |(way, path, requests)| total(way, path, *requests));
    let costs: Vec<_> =
        totals.chunks(2).map(|totals| (totals[1] - totals[0]) / requests as f64).collect();
    let cost = |way: &str, column: usize| {
        let row = ways.iter().position(|known| *known == way).expect("it was measured");
        costs[row * paths.len() + column]
    };
    let row = |way: &&str| {
        let cell = |column| {
            let ratio = cost(way, column) / cost("identity layer", column);
            format!("{} ({ratio:.3})", grouped(cost(way, column)))
        };
        [(*way).to_owned()].into_iter().chain((0..paths.len()).map(cell)).collect()
    };
    let rows: Vec<_> = ways.iter().map(row).collect();
    table(
        "Instructions per request of an axum server on one thread (of that with an identity layer)",
        &["", "nothing spawned", "3 tasks, ready", "3 wait once", "3 sleep 1 ms"],
        &rows,
    );
    let most = [1.07, 1.15, 1.15, 1.15];
    for ((column, path), most) in paths.into_iter().enumerate().zip(most) {
        let ratio = cost("ours", column) / cost("identity layer", column);
        budgets.most(&format!("axum server, {path}: instructions"), ratio, most, 3);
    }
}

/// When the guards of a connection were dropped: the one in the body, and the task's.
type Drops = [Option<Instant>; 2];

static DROPS: Mutex<Vec<Drops>> = Mutex::new(Vec::new());

/// Notes when it is dropped.
struct Guard {
    connection: usize,
    of: usize,
}

const BODY: usize = 0;
const TASK: usize = 1;

impl Drop for Guard {
    fn drop(&mut self) {
        let now = Instant::now();
        let mut drops = DROPS.lock().unwrap_or_else(PoisonError::into_inner);
        if drops.len() <= self.connection {
            drops.resize(self.connection + 1, Drops::default());
        }
        drops[self.connection][self.of] = Some(now);
    }
}

/// A body that says hello and does not end.
struct Hello {
    said: bool,
    _guard: Guard,
    _abort: Option<AbortOnDrop>,
}

impl http_body::Body for Hello {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        _: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        if self.said {
            return Poll::Pending;
        }
        self.said = true;
        Poll::Ready(Some(Ok(Frame::data(Bytes::from_static(b"hello")))))
    }
}

async fn stream<S: Spawn>(Path(connection): Path<usize>, spawner: S) -> Body {
    let guard = Guard { connection, of: TASK };
    let abort = spawner.spawn_until_end(async move {
        let _guard = guard;
        std::future::pending::<()>().await;
    });
    Body::new(Hello { said: false, _guard: Guard { connection, of: BODY }, _abort: abort })
}

/// Disconnects so many clients, one after another, while as many others are connected. Prints for
/// each the microseconds from the drop of its body to the drop of its task, after how busy the
/// machine was meanwhile.
fn disconnect(way: &str, workers: bool, connections: usize) {
    let runtime = runtime(workers);
    let listener = runtime.block_on(TcpListener::bind("127.0.0.1:0")).expect("a port");
    let address = listener.local_addr().expect("an address");
    let app = app(way);
    let server = async { axum::serve(listener, app).await.expect("it serves") };
    let (told, end) = oneshot::channel::<()>();
    let serving = thread::spawn(move || {
        runtime.block_on(async {
            let server = tokio::spawn(server);
            let _ = end.await;
            server.abort();
        });
    });
    let open = |connection: usize| {
        let mut client = connect(address);
        ask(&mut client, &format!("/stream/{connection}"), CLIENTS[0], b"hello\r\n");
        client
    };
    let mut clients: Vec<_> = (0..connections).map(open).collect();
    let before = jiffies();
    for (connection, client) in clients.iter_mut().enumerate() {
        *client = open(connections + connection);
        thread::sleep(Duration::from_millis(3));
    }
    thread::sleep(Duration::from_millis(200));
    let [all, idle] = jiffies();
    println!("{}", 100.0 - (idle - before[1]) / (all - before[0]) * 100.0);
    let drops = DROPS.lock().expect("nobody panicked with it").clone();
    assert_eq!(drops.len(), connections, "the others are connected");
    for drops in drops {
        let [Some(body), Some(task)] = drops else { panic!("something was not dropped") };
        let latency = match task.checked_duration_since(body) {
            Some(later) => later.as_secs_f64(),
            None => -(body - task).as_secs_f64(),
        };
        println!("{}", latency * 1e6);
    }
    drop(told);
    serving.join().expect("no panic");
}

/// Of the whole machine since it started: all, and those it was idle.
fn jiffies() -> [f64; 2] {
    let stat = fs::read_to_string("/proc/stat").unwrap_or_default();
    let line = stat.lines().next().unwrap_or_default();
    let jiffies: Vec<f64> =
        line.split_whitespace().skip(1).filter_map(|jiffies| jiffies.parse().ok()).collect();
    [jiffies.iter().sum(), jiffies.get(3).copied().unwrap_or_default()]
}

fn cancel_latency(connections: &str, budgets: &mut Budgets) {
    let mut rows = Vec::new();
    for threads in [CURRENT, WORKERS] {
        for way in ["identity layer", "by hand", "ours"] {
            // Both ends of all connections are here, which may be more files than it may open.
            let mut shell = Command::new("sh");
            let limit = "ulimit -n $(ulimit -H -n); exec \"$0\" \"$@\"";
            shell.args(["-c", limit]).arg(this_program().get_program());
            let figures = numbers(shell.args(["disconnect", way, threads, connections]));
            let (busy, latencies) = figures.split_first().expect("there is one");
            let way = if way == "identity layer" { "JoinHandle::abort" } else { way };
            let mut row = vec![format!("{way}, {threads}")];
            for percent in [50.0, 99.0, 100.0] {
                row.push(format!("{:.0}", percentile(latencies, percent)));
            }
            row.push(format!("{busy:.0} %"));
            rows.push(row);
            if way == "ours" {
                let what = format!("disconnect, {threads}, machine {busy:.0} % busy: p99, ms");
                budgets.most(&what, percentile(latencies, 99.0) / 1e3, 2.0, 3);
            }
        }
    }
    let title = format!(
        "Microseconds from hyper's drop of the body to the task's last destructor, over \
         {connections} disconnects with {connections} connections open (the budget is for a \
         machine that is at most half busy)"
    );
    table(&title, &["", "median", "99 %", "most", "machine busy"], &rows);
}
