//! What the tests share: servers on loopback ports, clients that see every byte and frame, and
//! events to wait for instead of sleeping.

#![allow(clippy::unwrap_used, clippy::missing_panics_doc)]

use std::{error::Error, fmt, net::SocketAddr, time::Duration};

use bytes::{Bytes, BytesMut};
use h2::{RecvStream, client::SendRequest};
use http::{HeaderMap, Request, Response};
use http_body::Body;
use hyper::{
    body::Incoming,
    server::conn::{http1, http2},
};
use hyper_util::{
    rt::{TokioExecutor, TokioIo},
    server::conn::auto,
    service::TowerToHyperService,
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel},
    task::{JoinHandle, JoinSet},
};
use tower::Service;

/// What any error can become.
pub type BoxError = Box<dyn Error + Send + Sync>;

/// What `future` yields.
///
/// # Panics
///
/// If it takes half a minute: then what the test waits for does not happen.
#[track_caller]
pub fn soon<F: Future>(future: F) -> impl Future<Output = F::Output> {
    let caller = std::panic::Location::caller();
    async move {
        tokio::time::timeout(Duration::from_secs(30), future)
            .await
            .unwrap_or_else(|_| panic!("{caller}: this does not happen"))
    }
}

/// A place to tell what happens, and the place to see it.
pub fn events<T>() -> (UnboundedSender<T>, Events<T>) {
    let (sender, receiver) = unbounded_channel();
    (sender, Events(receiver))
}

/// What has happened, in order.
#[derive(Debug)]
pub struct Events<T>(UnboundedReceiver<T>);

impl<T> Events<T> {
    /// The next event, waited for.
    #[track_caller]
    pub fn wait(&mut self) -> impl Future<Output = T> {
        let event = soon(self.0.recv());
        async { event.await.expect("nobody is left to tell") }
    }

    /// The events that have happened by now and were not seen yet.
    pub fn so_far(&mut self) -> Vec<T> {
        std::iter::from_fn(|| self.0.try_recv().ok()).collect()
    }
}

/// Which protocol a [`Server`] speaks: a hyper builder with its settings.
#[derive(Clone, Debug)]
pub enum Protocol {
    /// HTTP/1, with upgrades.
    Http1(http1::Builder),
    /// HTTP/2.
    Http2(http2::Builder<TokioExecutor>),
    /// Whichever the client speaks, with upgrades.
    Auto(auto::Builder<TokioExecutor>),
}

/// HTTP/1 as hyper is by default.
pub fn http1() -> Protocol {
    Protocol::Http1(http1::Builder::new())
}

/// HTTP/2 as hyper is by default.
pub fn http2() -> Protocol {
    Protocol::Http2(http2::Builder::new(TokioExecutor::new()))
}

/// Both as hyper-util is by default.
pub fn auto() -> Protocol {
    Protocol::Auto(auto::Builder::new(TokioExecutor::new()))
}

/// Something that serves connections on a loopback port until it is dropped.
#[derive(Debug)]
pub struct Server {
    addr: SocketAddr,
    task: JoinHandle<()>,
    ended: Events<Result<(), BoxError>>,
}

impl Server {
    /// Serves `service` with hyper.
    pub async fn hyper<S, B>(protocol: Protocol, service: S) -> Self
    where
        S: Service<Request<Incoming>, Response = Response<B>> + Clone + Send + 'static,
        S::Future: Send,
        S::Error: Into<BoxError>,
        B: Body<Data: Send, Error: Into<BoxError>> + Send + 'static,
    {
        let (ends, ended) = events();
        let mut server = Self::host(async move |listener| {
            // Dropped with the server: then all connections are aborted.
            let mut connections = JoinSet::new();
            loop {
                tokio::select! {
                    accepted = listener.accept() => {
                        let (stream, _) = accepted.unwrap();
                        connections.spawn(serve(protocol.clone(), stream, service.clone()));
                    }
                    Some(end) = connections.join_next() => {
                        drop(ends.send(end.unwrap_or_else(|error| Err(error.into()))));
                    }
                }
            }
        })
        .await;
        server.ended = ended;
        server
    }

    /// Lets `host` serve what comes to a listener: `axum::serve`, or tonic's server.
    pub async fn host<F>(host: impl FnOnce(TcpListener) -> F) -> Self
    where
        F: Future<Output = ()> + Send + 'static,
    {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let addr = listener.local_addr().unwrap();
        Self { addr, task: tokio::spawn(host(listener)), ended: events().1 }
    }

    /// That which listens there, for a client alone: it does not end with this.
    pub fn at(addr: SocketAddr) -> Self {
        Self { addr, task: tokio::spawn(async {}), ended: events().1 }
    }

    /// Where it listens.
    pub const fn addr(&self) -> SocketAddr {
        self.addr
    }

    /// What became of the next hyper connection that has come to its end. A panic is an error.
    #[track_caller]
    pub fn connection_ended(&mut self) -> impl Future<Output = Result<(), BoxError>> {
        self.ended.wait()
    }

    /// A client of bytes.
    pub async fn raw(&self) -> Raw {
        let stream = TcpStream::connect(self.addr).await.unwrap();
        stream.set_nodelay(true).unwrap();
        Raw { stream, read: BytesMut::new() }
    }

    /// A client of HTTP/2 frames.
    pub async fn h2(&self) -> H2 {
        self.h2_with(&h2::client::Builder::new()).await
    }

    /// A client of HTTP/2 frames with these settings.
    pub async fn h2_with(&self, settings: &h2::client::Builder) -> H2 {
        let stream = TcpStream::connect(self.addr).await.unwrap();
        let (requests, connection) = soon(settings.handshake(stream)).await.unwrap();
        let connection = tokio::spawn(async { drop(connection.await) });
        H2 { requests, connection }
    }

    /// Returns when the server has had its time for all that has come to it before, on a runtime
    /// of one thread: it has served some other connections from their first to their last byte.
    /// They reach no service, but count as connections that [ended](Self::connection_ended).
    pub async fn has_caught_up(&self) {
        for _ in 0..3 {
            let mut other = self.raw().await;
            // Not a request in any protocol: the host closes the connection, or we do.
            other.write("\0\r\n\r\n").await;
            other.rest().await;
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.task.abort();
    }
}

async fn serve<S, B>(protocol: Protocol, stream: TcpStream, service: S) -> Result<(), BoxError>
where
    S: Service<Request<Incoming>, Response = Response<B>> + Clone + Send + 'static,
    S::Future: Send,
    S::Error: Into<BoxError>,
    B: Body<Data: Send, Error: Into<BoxError>> + Send + 'static,
{
    stream.set_nodelay(true)?;
    let io = TokioIo::new(stream);
    let service = TowerToHyperService::new(service);
    match protocol {
        Protocol::Http1(http1) => http1.serve_connection(io, service).with_upgrades().await?,
        Protocol::Http2(http2) => http2.serve_connection(io, service).await?,
        Protocol::Auto(auto) => auto.serve_connection_with_upgrades(io, service).await?,
    }
    Ok(())
}

/// A client that writes and reads bytes.
pub struct Raw {
    stream: TcpStream,
    read: BytesMut,
}

impl Raw {
    /// Writes all of `bytes`.
    pub async fn write(&mut self, bytes: impl AsRef<[u8]>) {
        soon(self.stream.write_all(bytes.as_ref())).await.unwrap();
    }

    /// Reads up to and with the first `end`.
    ///
    /// # Panics
    ///
    /// If the server closes the connection before that.
    pub async fn read_until(&mut self, end: &str) -> String {
        loop {
            let found = self.read.windows(end.len()).position(|window| window == end.as_bytes());
            if let Some(at) = found {
                return text(&self.read.split_to(at + end.len()));
            }
            assert_ne!(self.more().await, 0, "closed after {:?}", text(&self.read));
        }
    }

    /// Reads a head: all lines up to and with the empty one.
    pub async fn read_head(&mut self) -> String {
        self.read_until("\r\n\r\n").await
    }

    /// Reads `len` bytes.
    pub async fn read_exactly(&mut self, len: usize) -> Bytes {
        while self.read.len() < len {
            assert_ne!(self.more().await, 0, "closed after {:?}", text(&self.read));
        }
        self.read.split_to(len).freeze()
    }

    /// Reads until the server has closed the connection, with FIN or RST.
    pub async fn rest(mut self) -> String {
        while self.more().await != 0 {}
        text(&self.read)
    }

    /// Sends FIN, and can still read.
    pub async fn close_write(&mut self) {
        self.stream.shutdown().await.unwrap();
    }

    /// Closes the connection with FIN, as dropping it does.
    pub fn close(self) {
        drop(self);
    }

    /// Closes the connection with RST.
    pub fn reset(self) {
        self.stream.set_zero_linger().unwrap();
    }

    async fn more(&mut self) -> usize {
        soon(self.stream.read_buf(&mut self.read)).await.unwrap_or(0)
    }
}

impl fmt::Debug for Raw {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Raw").field("read", &text(&self.read)).finish_non_exhaustive()
    }
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// A client of HTTP/2 frames. Dropping it closes the connection when all streams are over.
#[derive(Debug)]
pub struct H2 {
    requests: SendRequest<Bytes>,
    connection: JoinHandle<()>,
}

impl H2 {
    /// Sends a request without a body, whose stream is reset if the future is dropped.
    pub async fn send(&mut self, request: Request<()>) -> h2::client::ResponseFuture {
        self.open(request, true).await.0
    }

    /// Sends a request, whose body follows unless it is `whole`.
    pub async fn open(
        &mut self,
        request: Request<()>,
        whole: bool,
    ) -> (h2::client::ResponseFuture, h2::SendStream<Bytes>) {
        soon(std::future::poll_fn(|cx| self.requests.poll_ready(cx))).await.unwrap();
        self.requests.send_request(request, whole).unwrap()
    }

    /// Sends a request, or says why the connection takes none.
    pub async fn try_send(
        &mut self,
        request: Request<()>,
    ) -> Result<h2::client::ResponseFuture, h2::Error> {
        soon(std::future::poll_fn(|cx| self.requests.poll_ready(cx))).await?;
        Ok(self.requests.send_request(request, true)?.0)
    }

    /// Closes the socket, whatever goes on.
    pub async fn close(self) {
        self.connection.abort();
        drop(self.connection.await);
    }
}

/// Reads a body to its end: the data, and the trailers if there are any.
pub async fn read_all(body: &mut RecvStream) -> Result<(Bytes, Option<HeaderMap>), h2::Error> {
    let mut all = BytesMut::new();
    while let Some(data) = soon(body.data()).await {
        let data = data?;
        body.flow_control().release_capacity(data.len())?;
        all.extend_from_slice(&data);
    }
    Ok((all.freeze(), soon(body.trailers()).await?))
}
