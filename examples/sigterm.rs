//! SIGTERM under load, again and again: the `axum` example must lose nothing.
//!
//! ```text
//! cargo test --release -p tower-tasks-examples --test sigterm -- --ignored --nocapture
//! ```
//!
//! Each time, a fresh process serves HTTP/1.1 and HTTP/2 clients that send one request after the
//! other. Connections of the kinds that keep a graceful server from ending are held open besides.
//! After some answers it gets its signal. Every request whose handler was entered must then have
//! its whole answer at the client, and every task of them must be done; what was held open is
//! reported by its route. In a release build the times are strict.

#![cfg(unix)]
#![allow(clippy::unwrap_used)]
#![expect(clippy::print_stdout, reason = "it tells what it measures")]

use std::{
    env, io,
    net::SocketAddr,
    path::{Path, PathBuf},
    process::Stdio,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::{Duration, Instant},
};

use bytes::Bytes;
use h2::client::SendRequest;
use http::Request;
use serde_json::Value;
use tokio::{
    io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader, Lines},
    net::TcpStream,
    process::{Child, ChildStdout, Command},
    task::JoinSet,
    time::{sleep, timeout},
};

/// In seconds, which the process has for each shutdown. The connections that are held open need all
/// of it.
const GRACE: u64 = 1;
const HTTP1_CLIENTS: usize = 12;
/// Each with several streams at once.
const HTTP2_CLIENTS: usize = 3;
const STREAMS: usize = 4;
/// A request takes up to so many milliseconds. Its task takes some more.
const SLOW_MS: u64 = 150;

type Result<T = (), E = Box<dyn std::error::Error + Send + Sync>> = std::result::Result<T, E>;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_few_sigterms_under_load_lose_nothing() {
    let over = shut_down(4).await;
    assert!(over.iter().all(|over| *over < Duration::from_secs(5)), "{over:?}");
}

#[tokio::test]
async fn ready_turns_to_503_first_and_all_else_is_served_on_for_the_settle_delay() {
    let server = build().await;
    let served = timeout(Duration::from_secs(60), settles(&server)).await;
    served.unwrap().unwrap();
}

async fn settles(server: &Path) -> Result {
    let mut child = start(server, &[("SETTLE", "1")])?;
    let mut out = BufReader::new(child.stdout.take().unwrap()).lines();
    let addr = listening(&mut out).await?;
    assert_eq!(status(addr, "/ready").await?, "200");
    terminate(&child).await?;
    while status(addr, "/ready").await? == "200" {}
    assert_eq!(status(addr, "/ready").await?, "503");
    assert_eq!(status(addr, "/slow?ms=1").await?, "200");
    let json: Value = serde_json::from_str(&out.next_line().await?.ok_or("it reports nothing")?)?;
    assert_eq!(json["report"]["requests"]["refused"], 0);
    assert!(child.wait().await?.success());
    Ok(())
}

/// Of an answer over a connection of its own.
async fn status(addr: SocketAddr, path: &str) -> Result<String> {
    let mut stream = TcpStream::connect(addr).await?;
    let head = format!("GET {path} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n");
    stream.write_all(head.as_bytes()).await?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await?;
    Ok(answer.split(' ').nth(1).ok_or("no status")?.to_owned())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "takes five minutes, and a machine that has time"]
async fn two_hundred_sigterms_under_load_lose_nothing() {
    let over = shut_down(200).await;
    let within = over.iter().filter(|over| **over <= Duration::from_millis(250)).count();
    println!("{within} of 200 returned within the budget and 250 ms");
    assert!(within >= 198);
    assert!(over.iter().all(|over| *over <= Duration::from_secs(1)));
}

/// How much longer than its budget each shutdown took.
async fn shut_down(times: u64) -> Vec<Duration> {
    let server = build().await;
    let (mut all, mut answers, mut tasks) = (Vec::new(), 0, 0);
    for round in 0..times {
        let outcome = timeout(Duration::from_secs(60), one_round(&server, round)).await;
        let Outcome { over, whole } =
            outcome.unwrap().unwrap_or_else(|error| panic!("{round}: {error}"));
        all.push(over);
        answers += whole;
        tasks += whole;
    }
    let mut sorted = all.clone();
    sorted.sort_unstable();
    let at = |percent: usize| sorted[(sorted.len() - 1) * percent / 100];
    println!(
        "{times} shutdowns: {answers} requests entered and answered whole, {tasks} tasks done, none \
         lost; over the budget: median {:?}, p99 {:?}, at most {:?}",
        at(50),
        at(99),
        at(100)
    );
    all
}

/// The example, with the settings that this was built with.
async fn build() -> PathBuf {
    let mut build = Command::new(env!("CARGO"));
    build.args(["build", "--quiet", "-p", "tower-tasks-examples", "--example", "axum"]);
    if !cfg!(debug_assertions) {
        build.arg("--release");
    }
    assert!(build.status().await.unwrap().success());
    // target/PROFILE/deps/this
    let here = env::current_exe().unwrap();
    here.ancestors().nth(2).unwrap().join("examples/axum")
}

fn start(server: &Path, settings: &[(&str, &str)]) -> io::Result<Child> {
    Command::new(server)
        .envs([("PORT", "0"), ("RUST_LOG", "off")])
        .envs(settings.iter().copied())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .kill_on_drop(true)
        .spawn()
}

/// Where it listens, which it says first.
async fn listening(out: &mut Lines<BufReader<ChildStdout>>) -> Result<SocketAddr> {
    let listening = out.next_line().await?.ok_or("it says nothing")?;
    Ok(listening.rsplit('/').next().unwrap().parse()?)
}

async fn terminate(child: &Child) -> Result {
    let pid = child.id().unwrap().to_string();
    assert!(Command::new("kill").args(["-TERM", &pid]).status().await?.success());
    Ok(())
}

struct Outcome {
    over: Duration,
    whole: u64,
}

async fn one_round(server: &Path, round: u64) -> Result<Outcome> {
    let mut child = start(server, &[("GRACE", &GRACE.to_string())])?;
    let mut out = BufReader::new(child.stdout.take().unwrap()).lines();
    let addr = listening(&mut out).await?;

    let held = hold_open(addr).await?;
    let whole = Arc::new(AtomicU64::new(0));
    let mut clients = JoinSet::new();
    for client in 0..HTTP1_CLIENTS as u64 {
        clients.spawn(http1(addr, client, whole.clone()));
    }
    for client in 0..HTTP2_CLIENTS {
        let (requests, connection) = h2::client::handshake(TcpStream::connect(addr).await?).await?;
        clients.spawn(async { connection.await.map_err(Into::into) });
        for stream in 0..STREAMS {
            let id = (client * STREAMS + stream) as u64;
            clients.spawn(http2(requests.clone(), addr, id, whole.clone()));
        }
    }
    // Not always at the same moment.
    while whole.load(Relaxed) < 10 + round * 37 % 190 {
        sleep(Duration::from_millis(1)).await;
    }

    let signalled = Instant::now();
    terminate(&child).await?;
    let line = out.next_line().await?.ok_or("it reports nothing")?;
    let status = child.wait().await?;
    let process = signalled.elapsed();
    // They end when their connections do, all of them.
    while clients.join_next().await.is_some() {}
    drop(held);

    let json: Value = serde_json::from_str(&line)?;
    let whole = whole.load(Relaxed);
    let over = check(&json, status.code(), whole).map_err(|error| format!("{error}: {line}"))?;
    if process > Duration::from_secs(GRACE) + over + Duration::from_secs(2) {
        return Err(format!("the process took {process:?}").into());
    }
    Ok(Outcome { over, whole })
}

/// Whether nothing was lost; how much longer than its budget it took.
fn check(json: &Value, code: Option<i32>, whole: u64) -> Result<Duration> {
    let number = |pointer: &str| {
        json.pointer(pointer).and_then(Value::as_u64).ok_or_else(|| format!("no {pointer}"))
    };
    let equal = |what: &str, found: u64, expected: u64| {
        (found == expected).then_some(()).ok_or(format!("{what}: {found}, not {expected}"))
    };
    let of_task = |figure| number(&format!("/ledger/by_name/log_slow_answer/{figure}"));
    let of_request = |figure| number(&format!("/report/requests/{figure}"));
    let of_drain = |figure| number(&format!("/report/drained/{figure}"));

    // The handler spawns first of all.
    equal("handlers entered and answers at clients", of_task("attempted")?, whole)?;
    equal("tasks spawned", of_task("spawned")?, whole)?;
    equal("tasks completed", of_task("completed")?, whole)?;

    let gone = of_request("completed")? + of_request("ended")? + of_request("left")?;
    equal("requests", of_request("at_begin")? + of_request("later")?, gone)?;
    // The endless events; the socket and the slow reader, which nobody can end.
    equal("requests ended", of_request("ended")?, 1)?;
    equal("requests left", of_request("left")?, 2)?;
    let mut gone = of_drain("left")?;
    for ended in ["completed", "cancelled", "aborted", "timed_out", "panicked"] {
        equal(
            ended,
            number(&format!("/report/tasks/{ended}"))?,
            number(&format!("/ledger/{ended}"))?,
        )?;
        gone += of_drain(ended)?;
    }
    equal("tasks drained", of_drain("at_begin")? + of_drain("spawned")?, gone)?;
    let mut forced: Vec<_> = json["report"]["forced"]
        .as_array()
        .ok_or("nothing was forced")?
        .iter()
        .map(|it| (it["name"].as_str(), it["outcome"].as_str(), it["trace_id"].is_string()))
        .collect();
    forced.sort_unstable();
    let expected = [
        (Some("GET /download"), None, true),
        (Some("GET /echo"), None, true),
        (Some("GET /events"), Some("cancelled"), true),
    ];
    if forced != expected {
        return Err(format!("forced: {forced:?}").into());
    }
    equal("the exit code", code.map_or(99, i32::unsigned_abs).into(), 1)?;

    let took = Duration::from_millis(number("/report/took_ms")?);
    Ok(took.saturating_sub(Duration::from_secs(GRACE)))
}

/// The connections that keep a graceful server from ending.
async fn hold_open(addr: SocketAddr) -> Result<Vec<TcpStream>> {
    const PREFACE: &str = "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
    const HALF_A_HEAD: &str = "GET /slow HTTP/1.1\r\nhost: loc";
    const EVENTS: &str = "GET /events?stay=true HTTP/1.1\r\nhost: localhost\r\n\r\n";
    const SOCKET: &str = "GET /echo?stay=true HTTP/1.1\r\nhost: localhost\r\nconnection: upgrade\r\n\
        upgrade: websocket\r\nsec-websocket-version: 13\r\n\
        sec-websocket-key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n";
    const DOWNLOAD: &str = "GET /download?mb=1000 HTTP/1.1\r\nhost: localhost\r\n\r\n";
    let mut held = Vec::new();
    for (request, status) in [
        (PREFACE, None),
        (HALF_A_HEAD, None),
        (EVENTS, Some("HTTP/1.1 200")),
        (SOCKET, Some("HTTP/1.1 101")),
        (DOWNLOAD, Some("HTTP/1.1 200")),
    ] {
        let mut stream = TcpStream::connect(addr).await?;
        stream.write_all(request.as_bytes()).await?;
        if let Some(status) = status {
            let mut start = [0; 12];
            stream.read_exact(&mut start).await?;
            assert_eq!(start, status.as_bytes());
        }
        held.push(stream);
    }
    Ok(held)
}

/// How long the next request is to take.
fn slow_ms(client: u64, request: u64) -> u64 {
    (client * 31 + request * 17) % SLOW_MS
}

/// Sends one request after the other until the connection is closed.
async fn http1(addr: SocketAddr, client: u64, whole: Arc<AtomicU64>) -> Result {
    let mut stream = BufReader::new(TcpStream::connect(addr).await?);
    for request in 0.. {
        let ms = slow_ms(client, request);
        let head = format!("GET /slow?ms={ms} HTTP/1.1\r\nhost: localhost\r\n\r\n");
        stream.write_all(head.as_bytes()).await?;
        let mut status = String::new();
        stream.read_line(&mut status).await?;
        let (mut line, mut length, mut closes) = (String::new(), 0, false);
        while line != "\r\n" {
            line.clear();
            if stream.read_line(&mut line).await? == 0 {
                return Err(io::Error::from(io::ErrorKind::UnexpectedEof).into());
            }
            let header = line.trim_end().to_ascii_lowercase();
            if let Some(value) = header.strip_prefix("content-length: ") {
                length = value.parse()?;
            }
            closes |= header == "connection: close";
        }
        let mut body = vec![0; length];
        stream.read_exact(&mut body).await?;
        if status.starts_with("HTTP/1.1 200") && body == format!("after {ms} ms\n").as_bytes() {
            whole.fetch_add(1, Relaxed);
        }
        if closes {
            break;
        }
    }
    Ok(())
}

/// The same over one stream after the other.
async fn http2(
    requests: SendRequest<Bytes>,
    addr: SocketAddr,
    client: u64,
    whole: Arc<AtomicU64>,
) -> Result {
    let mut requests = requests;
    for request in 0.. {
        requests = requests.ready().await?;
        let ms = slow_ms(client, request);
        let request = Request::get(format!("http://{addr}/slow?ms={ms}")).body(())?;
        let response = requests.send_request(request, true)?.0.await?;
        let (is_ok, mut body) = (response.status() == 200, response.into_body());
        let mut read = Vec::new();
        while let Some(data) = body.data().await {
            read.extend_from_slice(&data?);
        }
        if is_ok && read == format!("after {ms} ms\n").as_bytes() {
            whole.fetch_add(1, Relaxed);
        }
    }
    Ok(())
}
