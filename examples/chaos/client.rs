//! Clients that misbehave, and look at what comes back.

use std::{
    io,
    sync::Arc,
    time::{Duration, Instant},
};

use bytes::{Buf, Bytes, BytesMut};
use futures_util::future::join_all;
use h2::{RecvStream, client::SendRequest};
use http::{HeaderMap, Request, Version};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    task::JoinHandle,
    time::{sleep, timeout},
};

use crate::{
    plan::{Answer, Conduct, Plan, Protocol},
    site::{BoxError, FLOOD, FLOODS, FOR_EVER, PIECE, Site, TIMEOUT},
};

/// What a client has seen of a response.
#[derive(Debug, PartialEq)]
enum Seen {
    /// Its status, or that of gRPC; and how many bytes.
    Whole(u16, usize),
    /// It broke off after the head, or before it.
    Cut,
    /// Another protocol took over, and answered.
    Switched,
    /// The client was gone.
    Left,
}

/// A client with a connection for each protocol, which it opens when it needs one.
pub(crate) struct Client {
    site: Arc<Site>,
    http1: Option<Http1>,
    http2: Option<Http2>,
    grpc: Option<Http2>,
}

impl Client {
    pub(crate) const fn new(site: Arc<Site>) -> Self {
        Self { site, http1: None, http2: None, grpc: None }
    }

    /// Sends some requests: one after another over HTTP/1, at once over HTTP/2.
    pub(crate) async fn send(&mut self, plans: &[Arc<Plan>]) {
        let Self { site, http1, http2, grpc } = self;
        let of = |protocol| plans.iter().filter(move |plan| plan.protocol == protocol);
        let over_http1 = async {
            for plan in of(Protocol::Http1) {
                let mut connection = match http1.take() {
                    Some(connection) => connection,
                    None => match Http1::open(site).await {
                        Ok(connection) => connection,
                        Err(error) => return failed(site, &error),
                    },
                };
                let sent = Instant::now();
                let seen = timeout(FOR_EVER, connection.exchange(site, plan)).await;
                check(site, plan, sent, &seen.unwrap_or_else(|_| Err("it takes for ever".into())));
                *http1 = Some(connection).filter(|connection| connection.is_alive);
            }
        };
        let over_http2 = Http2::exchange_all(http2, site, of(Protocol::Http2).collect());
        let over_grpc = Http2::exchange_all(grpc, site, of(Protocol::Grpc).collect());
        tokio::join!(over_http1, over_http2, over_grpc);
    }
}

fn failed(site: &Site, error: &io::Error) {
    if !site.is_stopping() {
        site.run.differs(format!("a connection: {error}"));
    }
}

/// Whether a client may see this.
fn check(site: &Site, plan: &Arc<Plan>, sent: Instant, seen: &Result<Seen, BoxError>) {
    let is_grpc = plan.protocol == Protocol::Grpc;
    let good = if is_grpc { 0 } else { 200 };
    let bytes_of = |pieces: u32, piece| pieces as usize * (piece + if is_grpc { 5 } else { 0 });
    let bytes = |pieces| bytes_of(pieces, PIECE);
    if matches!(seen, Ok(Seen::Left)) {
        return;
    }
    site.run.count("answered", 1);
    // A deadline, a panic that fails the response, a full limit and whoever stops may answer
    // instead of anyone.
    let is_late = sent.elapsed() >= site.deadline.min(TIMEOUT);
    let is_full = matches!(seen, Ok(Seen::Whole(503 | 8, _)));
    if site.is_stopping() || is_late || is_full || plan.may_fail() {
        return;
    }
    let is_meant = match (seen, plan.answer) {
        (Ok(Seen::Whole(status, len)), Answer::Whole(_)) => *status == good && *len == bytes(1),
        (Ok(Seen::Whole(status, len)), Answer::Streams(pieces, _)) => {
            *status == good && *len == bytes(pieces)
        }
        (Ok(Seen::Whole(status, len)), Answer::Floods) => {
            *status == good && *len == bytes_of(FLOODS, FLOOD)
        }
        (Ok(Seen::Whole(status, len)), Answer::Retried) => *status == good && *len == bytes(2),
        (Ok(Seen::Whole(status, _)), Answer::Panics) => *status == if is_grpc { 13 } else { 500 },
        (Ok(Seen::Whole(status, _)), Answer::Fails) => *status == if is_grpc { 14 } else { 500 },
        // Never a clean end of half a body.
        (Ok(Seen::Whole(13, _)), Answer::BodyPanics)
        | (Ok(Seen::Whole(14, _)), Answer::BodyFails) => is_grpc,
        (Ok(Seen::Cut), Answer::BodyPanics | Answer::BodyFails) => !is_grpc,
        (Ok(Seen::Switched), Answer::Upgrades) => true,
        _ => false,
    };
    if !is_meant {
        site.run.differs(format!("a client has seen {seen:?} of {plan:?}"));
    } else if matches!(plan.answer, Answer::Whole(_) | Answer::Streams(..) | Answer::Floods) {
        site.was_read(plan);
    }
}

fn check_request_id(site: &Site, plan: &Plan, headers: &HeaderMap) {
    let mut ids = headers.get_all("x-request-id").iter();
    let id = ids.next().and_then(|id| id.to_str().ok());
    if (id != Some(&plan.request_id()) || ids.next().is_some()) && !site.is_stopping() {
        site.run.differs(format!("{} was answered with the id {id:?}", plan.request_id()));
    }
}

/// A connection of bytes.
struct Http1 {
    stream: TcpStream,
    read: BytesMut,
    is_alive: bool,
}

impl Http1 {
    async fn open(site: &Site) -> io::Result<Self> {
        let stream = TcpStream::connect(site.http).await?;
        stream.set_nodelay(true)?;
        Ok(Self { stream, read: BytesMut::new(), is_alive: true })
    }

    async fn exchange(&mut self, site: &Site, plan: &Plan) -> Result<Seen, BoxError> {
        let (method, more) = match (plan.conduct, plan.answer) {
            (Conduct::LeavesInUpload, _) => ("POST", "content-length: 10\r\n\r\nhalf of"),
            (_, Answer::Upgrades) => ("GET", "connection: upgrade\r\nupgrade: chaos\r\n\r\n"),
            _ => ("GET", "\r\n"),
        };
        let path = path(plan);
        let head = format!(
            "{method} {path} HTTP/1.1\r\nhost: chaos\r\nx-plan: {}\r\nx-request-id: {}\r\n\
             traceparent: {}\r\n{more}",
            plan.id,
            plan.request_id(),
            trace_parent(plan),
        );
        // Until it is read to its end.
        self.is_alive = false;
        self.stream.write_all(head.as_bytes()).await?;
        match plan.conduct {
            Conduct::LeavesBeforeHead(after) => {
                sleep(after).await;
                return self.leave(plan);
            }
            Conduct::LeavesInUpload => {
                sleep(Duration::from_millis(1)).await;
                return self.leave(plan);
            }
            _ => {}
        }
        let Some(head) = self.head().await? else { return Ok(Seen::Cut) };
        let mut headers = [httparse::EMPTY_HEADER; 32];
        let mut response = httparse::Response::new(&mut headers);
        response.parse(&head)?;
        let status = response.code.unwrap_or(0);
        let get = |name: &str| {
            let mut all = response.headers.iter().filter(|header| header.name == name);
            let first = all.next().and_then(|header| std::str::from_utf8(header.value).ok());
            first.filter(|_| all.next().is_none())
        };
        // What the timeout has answered has an id too, since it is further in.
        if get("x-request-id") != Some(&plan.request_id()) && !site.is_stopping() {
            site.run.differs(format!("{} was answered with another id", plan.request_id()));
        }
        if plan.conduct == Conduct::LeavesInBody {
            return self.leave(plan);
        }
        if status == 101 {
            if plan.id.is_multiple_of(3) {
                return self.leave(plan);
            }
            self.stream.write_all(b"ping").await?;
            // The task may have been refused.
            while self.read.len() < 4 && self.more(Duration::ZERO).await? {}
            return Ok(Seen::Switched);
        }
        let pause = match plan.conduct {
            Conduct::ReadsSlowly => Duration::from_millis(2),
            _ => Duration::ZERO,
        };
        let closes = get("connection") == Some("close");
        let len = match get("content-length") {
            Some(len) => self.skip(len.parse()?, pause).await?,
            None => self.chunks(pause).await?,
        };
        let Some(len) = len else { return Ok(Seen::Cut) };
        self.is_alive = !closes;
        Ok(Seen::Whole(status, len))
    }

    /// Closes, with FIN or with RST.
    fn leave(&mut self, plan: &Plan) -> Result<Seen, BoxError> {
        if plan.id.is_multiple_of(2) {
            self.stream.set_zero_linger()?;
        }
        plan.left_now();
        Ok(Seen::Left)
    }

    async fn head(&mut self) -> io::Result<Option<Bytes>> {
        loop {
            if let Some(at) = find(&self.read, b"\r\n\r\n") {
                return Ok(Some(self.read.split_to(at + 4).freeze()));
            }
            if !self.more(Duration::ZERO).await? {
                return Ok(None);
            }
        }
    }

    async fn skip(&mut self, len: usize, pause: Duration) -> io::Result<Option<usize>> {
        while self.read.len() < len {
            if !self.more(pause).await? {
                return Ok(None);
            }
        }
        self.read.advance(len);
        Ok(Some(len))
    }

    /// The sum of all chunks, to the last one.
    async fn chunks(&mut self, pause: Duration) -> Result<Option<usize>, BoxError> {
        let mut sum = 0;
        loop {
            let Some(at) = find(&self.read, b"\r\n") else {
                if self.more(pause).await? {
                    continue;
                }
                return Ok(None);
            };
            let line = self.read.split_to(at + 2);
            let len = usize::from_str_radix(std::str::from_utf8(&line[..at])?, 16)?;
            if self.skip(len + 2, pause).await?.is_none() {
                return Ok(None);
            }
            if len == 0 {
                return Ok(Some(sum));
            }
            sum += len;
        }
    }

    async fn more(&mut self, pause: Duration) -> io::Result<bool> {
        if !pause.is_zero() {
            sleep(pause).await;
        }
        match self.stream.read_buf(&mut self.read).await {
            Ok(len) => Ok(len > 0),
            Err(error) if error.kind() == io::ErrorKind::ConnectionReset => Ok(false),
            Err(error) => Err(error),
        }
    }
}

fn find(bytes: &[u8], what: &[u8]) -> Option<usize> {
    bytes.windows(what.len()).position(|window| window == what)
}

const fn path(plan: &Plan) -> &'static str {
    if plan.is_shielded { "/shielded" } else { "/open" }
}

fn trace_parent(plan: &Plan) -> String {
    format!("00-{}-{:016x}-01", plan.trace_id(), plan.id + 1)
}

/// A connection of frames.
struct Http2 {
    requests: SendRequest<Bytes>,
    connection: JoinHandle<()>,
}

impl Drop for Http2 {
    fn drop(&mut self) {
        self.connection.abort();
    }
}

impl Http2 {
    async fn open(site: &Site, protocol: Protocol) -> io::Result<Self> {
        let grpc = protocol == Protocol::Grpc;
        let stream = TcpStream::connect(if grpc { site.grpc } else { site.http }).await?;
        stream.set_nodelay(true)?;
        let (requests, connection) =
            h2::client::handshake(stream).await.map_err(io::Error::other)?;
        Ok(Self { requests, connection: tokio::spawn(async { drop(connection.await) }) })
    }

    async fn exchange_all(this: &mut Option<Self>, site: &Site, plans: Vec<&Arc<Plan>>) {
        let Some(first) = plans.first() else { return };
        if this.as_ref().is_none_or(|this| this.connection.is_finished()) {
            match Self::open(site, first.protocol).await {
                Ok(connection) => *this = Some(connection),
                Err(error) => return failed(site, &error),
            }
        }
        let Some(connection) = this else { return };
        // One of them alone may take the whole connection with it.
        let closes = plans.len() == 1
            && first.id.is_multiple_of(4)
            && matches!(first.conduct, Conduct::LeavesBeforeHead(_));
        if closes {
            let Conduct::LeavesBeforeHead(after) = first.conduct else { return };
            let sent = send(&mut connection.requests.clone(), first, true).await;
            sleep(after).await;
            first.left_now();
            *this = None;
            return drop(sent);
        }
        let all = plans.into_iter().map(|plan| {
            let mut requests = connection.requests.clone();
            async move {
                let sent = Instant::now();
                let seen = timeout(FOR_EVER, exchange(&mut requests, site, plan)).await;
                check(site, plan, sent, &seen.unwrap_or_else(|_| Err("it takes for ever".into())));
            }
        });
        join_all(all).await;
    }
}

type Sent = (h2::client::ResponseFuture, h2::SendStream<Bytes>);

async fn send(
    requests: &mut SendRequest<Bytes>,
    plan: &Plan,
    whole: bool,
) -> Result<Sent, h2::Error> {
    std::future::poll_fn(|cx| requests.poll_ready(cx)).await?;
    let request = Request::builder()
        .version(Version::HTTP_2)
        .header("x-plan", plan.id)
        .header("x-request-id", plan.request_id())
        .header("traceparent", trace_parent(plan));
    let grpc = plan.protocol == Protocol::Grpc;
    let request = if grpc {
        request
            .method("POST")
            .uri(format!("http://chaos/chaos.Chaos{}", path(plan)))
            .header("content-type", "application/grpc")
            .header("te", "trailers")
    } else {
        request
            .method(if whole { "GET" } else { "POST" })
            .uri(format!("http://chaos{}", path(plan)))
    };
    let request = request.body(()).expect("it is valid");
    let (response, mut body) = requests.send_request(request, whole && !grpc)?;
    if !whole {
        // Two of a message's five first bytes.
        body.send_data(Bytes::from_static(&[0; 2]), false)?;
    } else if grpc {
        body.send_data(Bytes::from_static(&[0; 5]), true)?;
    }
    Ok((response, body))
}

async fn exchange(
    requests: &mut SendRequest<Bytes>,
    site: &Site,
    plan: &Arc<Plan>,
) -> Result<Seen, BoxError> {
    let whole = plan.conduct != Conduct::LeavesInUpload;
    let (response, mut body) = send(requests, plan, whole).await?;
    let leaves_after = match plan.conduct {
        Conduct::LeavesBeforeHead(after) => Some(after),
        Conduct::LeavesInUpload => Some(Duration::from_millis(1)),
        _ => None,
    };
    if let Some(after) = leaves_after {
        sleep(after).await;
        plan.left_now();
        body.send_reset(h2::Reason::CANCEL);
        return Ok(Seen::Left);
    }
    let Ok(response) = response.await else { return Ok(Seen::Cut) };
    check_request_id(site, plan, response.headers());
    let (head, mut stream) = response.into_parts();
    if plan.conduct == Conduct::LeavesInBody {
        plan.left_now();
        // Resets the stream.
        drop((stream, body));
        return Ok(Seen::Left);
    }
    let Ok((len, trailers)) = read(&mut stream, plan.conduct).await else { return Ok(Seen::Cut) };
    if plan.protocol != Protocol::Grpc {
        return Ok(Seen::Whole(head.status.as_u16(), len));
    }
    let status = trailers.as_ref().unwrap_or(&head.headers).get("grpc-status");
    let status = status.and_then(|status| status.to_str().ok()?.parse().ok());
    Ok(status.map_or(Seen::Cut, |status| Seen::Whole(status, len)))
}

async fn read(
    stream: &mut RecvStream,
    conduct: Conduct,
) -> Result<(usize, Option<HeaderMap>), h2::Error> {
    let mut len = 0;
    while let Some(data) = stream.data().await {
        let data = data?;
        if conduct == Conduct::ReadsSlowly {
            sleep(Duration::from_millis(2)).await;
        }
        stream.flow_control().release_capacity(data.len())?;
        len += data.len();
    }
    Ok((len, stream.trailers().await?))
}
