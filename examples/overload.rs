//! Five times what the limit has room for: the `axum` example answers all, and loses nothing.
//!
//! ```text
//! cargo test --release -p tower-tasks-examples --test overload -- --ignored --nocapture
//! ```
//!
//! A report takes 100 ms; every 100 ms each client asks for one, and there are five times as many
//! clients as reports may be made at once. Some reports panic and some take too long. In the end the
//! clients, the ledger and the limit must have counted the same, and the process holds no more bytes
//! than after a first, short run.

#![allow(clippy::unwrap_used)]
#![expect(clippy::print_stdout, reason = "it tells what it measures")]

use std::{
    alloc::System,
    net::{Ipv4Addr, SocketAddr},
    panic::{set_hook, take_hook},
    time::Duration,
};

use bytes::Bytes;
use cap::Cap;
use http::{HeaderValue, Method, Request, Response, StatusCode, header::RETRY_AFTER, response};
use http_body_util::{BodyExt, Empty};
use hyper::{
    body::Incoming,
    client::conn::{http1, http2},
};
use hyper_util::rt::{TokioExecutor, TokioIo};
use tokio::{
    net::{TcpListener, TcpStream},
    sync::Mutex,
    task::JoinSet,
    time::{Instant, MissedTickBehavior, interval_at, sleep, timeout},
};
use tower_tasks::{assert_drained, task_set::Counts};

use crate::server::{App, Settings, site};

#[allow(dead_code, reason = "the example's own `main`")]
#[path = "axum.rs"]
mod server;

#[global_allocator]
static ALLOCATOR: Cap<System> = Cap::new(System, usize::MAX);

/// What one test allocates is not the other's.
static ALONE: Mutex<()> = Mutex::const_new(());

const EVERY: Duration = Duration::from_millis(100);
/// Much more than a report takes, so that only those time out that are to.
const TOO_LONG: Duration = Duration::from_secs(3);
/// What the runtime and the maps of the ledger may grow by.
const GROWTH: usize = 16 << 10;

type Result<T = (), E = Box<dyn std::error::Error + Send + Sync>> = std::result::Result<T, E>;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_overload_is_answered_and_adds_up() {
    overload(10, Duration::from_secs(2)).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "takes 40 seconds, and a machine that has time"]
async fn half_a_minute_of_overload_is_answered_and_adds_up() {
    overload(100, Duration::from_secs(30)).await;
}

async fn overload(limit: usize, time: Duration) {
    let _alone = ALONE.lock().await;
    quiet_panics();
    let settings = Settings {
        port: 0,
        grace: Duration::from_secs(20),
        settle: Duration::ZERO,
        task_limit: 1_000_000,
        report_limit: limit,
        report_time: TOO_LONG,
    };
    let (router, app, shutdown) = site(&settings).unwrap();
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, settings.port)).await.unwrap();
    let addr = listener.local_addr().unwrap();
    let running = shutdown.clone();
    let server = axum::serve(listener, router).with_graceful_shutdown(shutdown.signalled());
    let server = tokio::spawn(async move { running.run(server).await });

    let mut all = load(addr, &app, limit, Duration::from_secs(1)).await;
    let before = at_rest(&app, usize::MAX).await;
    let start = Instant::now();
    let answers = load(addr, &app, limit, time).await;
    let took = start.elapsed();
    let after = at_rest(&app, before + GROWTH).await;
    all.add(&answers);

    println!(
        "{} requests in {:.1} s, with room for {limit} reports at once: {} accepted, {} refused; \
         live bytes: {before} before, {after} after",
        answers.all(),
        took.as_secs_f64(),
        answers.accepted(),
        answers.refused,
    );
    println!("clients, with a first run: {all:?}");
    let ledger = app.tasks.snapshot().by_name["make_report"];
    println!("ledger: {ledger:?}");
    assert_eq!(Answers::of(&ledger), all);
    assert!(ledger.is_exact() && ledger.attempted == all.all(), "{ledger:?}");
    assert_eq!(app.reports.refused(), all.refused);
    // At five times the limit, four of five are refused; more, as some reports take so long.
    assert!(answers.accepted() > 0 && answers.refused > answers.accepted(), "{answers:?}");
    assert!(after <= before + GROWTH, "{after} bytes live, and before {before}");

    shutdown.begin();
    let report = server.await.unwrap().unwrap();
    assert!(report.forced().is_empty(), "{report}");
    assert_drained(&app.tasks);
}

/// How often what was answered. Of what was accepted, as it must end.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Answers {
    refused: u64,
    completed: u64,
    timed_out: u64,
    panicked: u64,
    other: u64,
}

impl Answers {
    fn of(ledger: &Counts) -> Self {
        Self {
            refused: ledger.refused,
            completed: ledger.completed,
            timed_out: ledger.timed_out,
            panicked: ledger.panicked,
            other: ledger.cancelled + ledger.aborted + ledger.live,
        }
    }

    const fn accepted(&self) -> u64 {
        self.completed + self.timed_out + self.panicked
    }

    const fn all(&self) -> u64 {
        self.accepted() + self.refused + self.other
    }

    const fn add(&mut self, more: &Self) {
        self.refused += more.refused;
        self.completed += more.completed;
        self.timed_out += more.timed_out;
        self.panicked += more.panicked;
        self.other += more.other;
    }
}

/// Each client with a connection of its own, every other one of HTTP/2.
async fn load(addr: SocketAddr, app: &App, limit: usize, time: Duration) -> Answers {
    let count = 5 * u32::try_from(limit).unwrap();
    let mut connections = Vec::new();
    for client in 0..count {
        // One after the other, so that none waits for the server to accept it.
        let mut connection = Connection::new(addr, client % 2 == 1).await.unwrap();
        connection.ask(Method::GET, addr, "/ready").await.unwrap();
        connections.push(connection);
    }
    let mut clients = JoinSet::new();
    let now = Instant::now();
    for (client, connection) in (0..count).zip(connections) {
        // Not all at the same moment.
        let start = now + EVERY * client / count;
        let app = app.clone();
        clients.spawn(async move {
            ask(connection, addr, &app, client, start, start + time).await.unwrap()
        });
    }
    let mut all = Answers::default();
    while let Some(answers) = clients.join_next().await {
        all.add(&answers.unwrap());
    }
    all
}

async fn ask(
    mut connection: Connection,
    addr: SocketAddr,
    app: &App,
    client: u32,
    start: Instant,
    until: Instant,
) -> Result<Answers> {
    let mut clock = interval_at(start, EVERY);
    clock.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut answers = Answers::default();
    for turn in client * 13.. {
        clock.tick().await;
        if Instant::now() >= until {
            break;
        }
        let (path, fate) = match turn % 100 {
            0 => ("/reports?ms=60000", &mut answers.timed_out),
            50..55 => ("/reports?ms=100&panics=true", &mut answers.panicked),
            _ => ("/reports?ms=100", &mut answers.completed),
        };
        let (head, body) = connection.ask(Method::POST, addr, path).await?;
        let after = head.headers.get(RETRY_AFTER).map(HeaderValue::as_bytes);
        match head.status {
            StatusCode::ACCEPTED if body.is_empty() => *fate += 1,
            StatusCode::SERVICE_UNAVAILABLE if after == Some(b"1") => answers.refused += 1,
            _ => answers.other += 1,
        }
        let in_use = app.reports.in_use();
        if in_use > app.reports.limit() {
            return Err(format!("{in_use} reports are made at once").into());
        }
    }
    Ok(answers)
}

enum Connection {
    Http1(http1::SendRequest<Empty<Bytes>>),
    Http2(http2::SendRequest<Empty<Bytes>>),
}

impl Connection {
    async fn new(addr: SocketAddr, http2: bool) -> Result<Self> {
        let stream = TcpStream::connect(addr).await?;
        stream.set_nodelay(true)?;
        let io = TokioIo::new(stream);
        if http2 {
            let (requests, connection) = http2::handshake(TokioExecutor::new(), io).await?;
            tokio::spawn(connection);
            Ok(Self::Http2(requests))
        } else {
            let (requests, connection) = http1::handshake(io).await?;
            tokio::spawn(connection);
            Ok(Self::Http1(requests))
        }
    }

    async fn ask(
        &mut self,
        method: Method,
        addr: SocketAddr,
        path: &str,
    ) -> Result<(response::Parts, Bytes)> {
        let request = Request::builder().method(method).uri(format!("http://{addr}{path}"));
        let response = self.send(request.body(Empty::new())?);
        let (head, body) = timeout(Duration::from_secs(10), response).await??.into_parts();
        Ok((head, body.collect().await?.to_bytes()))
    }

    async fn send(&mut self, request: Request<Empty<Bytes>>) -> Result<Response<Incoming>> {
        Ok(match self {
            Self::Http1(requests) => {
                requests.ready().await?;
                // HTTP/1 wants the path alone.
                let (mut parts, body) = request.into_parts();
                let path = parts.uri.path_and_query().unwrap().as_str();
                parts.headers.insert("host", parts.uri.authority().unwrap().as_str().parse()?);
                parts.uri = path.parse()?;
                requests.send_request(Request::from_parts(parts, body)).await?
            }
            Self::Http2(requests) => {
                requests.ready().await?;
                requests.send_request(request).await?
            }
        })
    }
}

/// Those of reports are meant.
fn quiet_panics() {
    let hook = take_hook();
    set_hook(Box::new(move |panic| {
        if panic.payload().downcast_ref() != Some(&"in a report, as you asked") {
            hook(panic);
        }
    }));
}

/// How many bytes live when no task does and the connections are gone: as soon as these are at most
/// `most`, or change no more.
async fn at_rest(app: &App, most: usize) -> usize {
    let mut last = usize::MAX;
    for _ in 0..100 {
        sleep(EVERY).await;
        let live = ALLOCATOR.allocated();
        if app.tasks.is_empty() && (live == last || last < most && live <= most) {
            return live;
        }
        last = live;
    }
    last
}
