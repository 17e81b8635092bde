//! What comes of each header over real connections, hostile ones among them: in the handler, in the
//! log, in the response, and in the call that a task makes.
#![allow(missing_docs, clippy::unwrap_used)] // Tests.

use std::{
    collections::BTreeSet,
    convert::Infallible,
    fmt::Write as _,
    io,
    pin::Pin,
    sync::{Arc, Mutex},
    task::{Context, Poll},
};

use axum::routing::get;
use bytes::Bytes;
use http::{HeaderMap, HeaderValue, Request, Response};
use http_body_util::Empty;
use hyper::body::Incoming;
use hyper_util::{
    client::legacy::{Client, connect::HttpConnector},
    rt::TokioExecutor,
};
use tokio::{
    net::TcpListener,
    runtime::{Builder, Runtime},
    sync::Barrier,
    task::JoinSet,
};
use tokio_stream::wrappers::TcpListenerStream;
use tonic::{metadata::MetadataMap, server::NamedService, transport::Channel};
use tower::{Layer, Service, ServiceBuilder, ServiceExt, service_fn};
use tower_tasks::{
    CatchUnwindLayer, PropagateLayer, RequestContext, SpawnLimit, TaskRegistry, TaskSet,
    TaskSetLayer, TraceContext, TraceIdLayer,
    request_context::{RequestId, TraceId},
    trace_id::{Propagate, TraceParent, Trust, inject},
};
use tower_tasks_tests::{Events, Protocol, Server, events, http1, read_all, soon};
use tracing::{
    Dispatch, Event, Subscriber,
    dispatcher::set_default,
    field::{Field, Visit},
};
use tracing_subscriber::{
    Registry,
    filter::{LevelFilter, Targets},
    fmt, layer,
    layer::SubscriberExt,
    registry::LookupSpan,
};

use grpc::Plain;

mod grpc;

const TRACE: &str = "0af7651916cd43dd8448eb211c80319c";
const SPAN: &str = "b7ad6b7169203331";
/// The last half of `TRACE`, padded.
const SHORT: &str = "00000000000000008448eb211c80319c";
const OTHER: &str = "00000000000000010000000000000001";
const VALID: &str = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";

/// The header fields of one request, and what must come of them.
struct Case {
    fields: Vec<(&'static str, Vec<u8>)>,
    /// The caller's trace, if it goes on.
    trace: Option<&'static str>,
    flags: &'static str,
    state: String,
    /// The request id that is kept.
    id: Option<String>,
}

/// A request with these fields, of which nothing is taken over.
fn of(fields: &[(&'static str, &[u8])]) -> Case {
    let fields = fields.iter().map(|&(name, value)| (name, value.to_vec())).collect();
    Case { fields, trace: None, flags: "02", state: String::new(), id: None }
}

fn parent(value: &str) -> Case {
    of(&[("traceparent", value.as_bytes())])
}

impl Case {
    fn and(mut self, name: &'static str, value: impl AsRef<[u8]>) -> Self {
        self.fields.push((name, value.as_ref().to_vec()));
        self
    }

    /// The trace goes on, with these flags.
    fn continues(mut self, flags: &'static str) -> Self {
        (self.trace, self.flags) = (Some(TRACE), flags);
        self
    }

    /// Of a trace that begins here.
    fn begins(mut self, flags: &'static str) -> Self {
        (self.trace, self.flags) = (None, flags);
        self
    }

    fn trace(mut self, trace: &'static str) -> Self {
        self.trace = Some(trace);
        self
    }

    fn state(mut self, state: impl Into<String>) -> Self {
        self.state = state.into();
        self
    }

    /// The same field so many times more.
    fn again(mut self, times: usize) -> Self {
        let last = self.fields.last().unwrap().clone();
        self.fields.extend(vec![last; times]);
        self
    }

    fn id(mut self, id: impl Into<String>) -> Self {
        self.id = Some(id.into());
        self
    }
}

/// `VALID` with something else in this place.
fn with(at: usize, digits: &str) -> String {
    format!("{}{digits}{}", &VALID[..at], &VALID[at + digits.len()..])
}

/// W3C Trace Context Level 2, sections 3.2 and 3.3; B3; rows H1 to H24.
#[expect(clippy::too_many_lines, reason = "it is a table")]
fn cases() -> Vec<Case> {
    let zeros = |len| "0".repeat(len);
    let valid = || parent(VALID).continues("01");
    let b3 = |value: &str| of(&[("b3", value.as_bytes())]);
    let multi = |trace: &str, sampled: &str| {
        of(&[("x-b3-traceid", trace.as_bytes())])
            .and("x-b3-spanid", SPAN)
            .and("x-b3-sampled", sampled)
    };
    let id = |value: &[u8]| of(&[("x-request-id", value)]);
    let members = |n: usize, value: &str| {
        (0..n).map(|i| format!("k{i}={value}{i}")).collect::<Vec<_>>().join(",")
    };
    let long = |key: usize, value: usize| format!("{}={}", "k".repeat(key), "v".repeat(value));
    // Of another trace, which would show if it were taken.
    let other = |case: Case| {
        case.and("x-b3-traceid", OTHER).and("x-b3-spanid", SPAN).and("x-b3-sampled", "1")
    };
    let other_b3 = || format!("{OTHER}-{SPAN}-1");
    vec![
        of(&[]),
        // The caller's is valid: 3.2.2, and white space of RFC 9110, section 5.5.
        valid(),
        parent(&with(53, "00")).continues("00"),
        parent(&with(53, "02")).continues("02"),
        parent(&with(53, "03")).continues("03"),
        parent(&with(53, "ff")).continues("03"),
        parent(&with(53, "fc")).continues("00"),
        parent(&format!(" \t{VALID}\t ")).continues("01"),
        parent(&with(0, "cc")).continues("01"),
        parent(&format!("{}-what-the-future-will-be-like", with(0, "01"))).continues("01"),
        parent(&format!("{}-", with(0, "01"))).continues("01"),
        parent(&format!("{}-{}", with(0, "fe"), "x".repeat(512 - 56))).continues("01"),
        of(&[("TraceParent", VALID.as_bytes())])
            .continues("01")
            .and("TRACEstate", "a=1")
            .state("a=1"),
        // It is not.
        parent(&VALID.to_uppercase()),
        parent(&with(3, "0AF7")),
        parent(&with(36, "B7AD")),
        parent(&with(53, "0A")),
        parent(&with(0, "0X")),
        parent(&with(0, "ff")),
        parent(&format!("{VALID}-tail")),
        parent(&format!("{VALID}-")),
        parent(&format!("{}-{}", with(0, "01"), "x".repeat(513 - 56))),
        parent(&format!("{VALID},{VALID}")),
        parent(&format!("\u{a0}{VALID}")),
        parent(&format!("\"{VALID}\"")),
        parent(&format!("{VALID}.")),
        parent(&format!("{}.tail", with(0, "cc"))),
        parent(&with(3, &zeros(32))),
        parent(&with(36, &zeros(16))),
        parent(&VALID[..53]),
        parent(&VALID[..54]),
        parent(&VALID[..36]),
        parent(&VALID[3..]),
        parent(&VALID.replace('-', "_")),
        parent(&VALID.replace('-', "")),
        parent(&with(3, "evil")),
        parent(&with(10, " ")),
        parent(&format!("{}-{}", with(0, "01"), "evil".repeat(16_384))),
        parent(&"evil".repeat(16_384)),
        of(&[("traceparent", b"")]),
        of(&[("traceparent", b"00-\xff\xfe\x80evil\xc3\xa9")]),
        of(&[("traceparent", b"00-0af7651916cd43dd8448eb211c80319c\tevil-b7ad6b7169203331-01")]),
        valid().and("traceparent", VALID).begins("02"),
        parent(&with(3, "1")).and("traceparent", VALID),
        valid().again(50).begins("02"),
        valid().and("TraceParent", "").begins("02"),
        // `tracestate`: 3.3.
        valid().and("tracestate", "a=1").state("a=1"),
        valid()
            .and("tracestate", " a=1 \t,\t, b@v=2 3 ")
            .and("tracestate", "c=4")
            .state("a=1,b@v=2 3,c=4"),
        valid().and("tracestate", ""),
        valid().and("tracestate", ",").and("tracestate", " , ,\t"),
        valid().and("tracestate", ",a=1,, ,b=2,").state("a=1,b=2"),
        valid().and("tracestate", "a=1,a=2").state("a=1,a=2"),
        valid().and("tracestate", "0a@b/c*d-e_f=!~").state("0a@b/c*d-e_f=!~"),
        valid().and("tracestate", "a= 1").state("a= 1"),
        valid().and("tracestate", members(32, "v")).state(members(32, "v")),
        valid().and("tracestate", long(256, 256)).state(long(256, 256)),
        // What is carried is at least 512 bytes: 3.3.3.1.
        valid()
            .and("tracestate", format!("{},{}", long(100, 100), long(200, 200)))
            .and("tracestate", long(100, 210))
            .state(format!("{},{},{}", long(100, 100), long(200, 200), long(100, 210))),
        valid()
            .and("tracestate", format!("a=1,{},b=2", long(256, 256)))
            .and("tracestate", long(256, 256))
            .and("tracestate", "c=3")
            .state(format!("a=1,{},b=2,c=3", long(256, 256))),
        valid().and("tracestate", long(257, 1)),
        valid().and("tracestate", long(1, 257)),
        valid().and("tracestate", "a="),
        valid().and("tracestate", "=1"),
        valid().and("tracestate", "a =1"),
        valid().and("tracestate", "a=1;b").state("a=1;b"),
        valid().and("tracestate", "a=1;b=2"),
        valid().and("tracestate", "a=1\tevil"),
        // H23: as many fields as the server takes, and what they say is long.
        valid().and("tracestate", "").again(90),
        valid().and("tracestate", "a=evil").again(90),
        valid().and("tracestate", format!("a={}", "evil".repeat(60))).again(90),
        valid().and("tracestate", ",".repeat(16_000)),
        valid().and("tracestate", ",".repeat(200_000)).and("tracestate", "a=evil"),
        valid().and("tracestate", "a=1,evil"),
        valid().and("tracestate", "EVIL=1"),
        valid().and("tracestate", "a=1").and("tracestate", "b=evil=evil"),
        valid().and("tracestate", b"a=\xffevil"),
        valid().and("tracestate", members(33, "evil")),
        valid().and("tracestate", format!("a={}", "evil".repeat(65))),
        valid().and("tracestate", format!("a={}", "evil".repeat(16_384))),
        of(&[("tracestate", b"evil=1")]),
        parent(&with(0, "ff")).and("tracestate", "evil=1"),
        b3(&format!("{TRACE}-{SPAN}-1")).continues("01").and("tracestate", "evil=1"),
        // B3, single over multi, and after W3C.
        b3(&format!("{TRACE}-{SPAN}")).continues("00"),
        b3(&format!("{TRACE}-{SPAN}-d")).continues("01"),
        b3(&format!(" {TRACE}-{SPAN}-1-05e3ac9a4f6e3b90\t")).continues("01"),
        b3(&format!("{TRACE}-{SPAN}-2")),
        b3(&format!("{TRACE}-{SPAN}-1-evil")),
        b3(&format!("{}-{SPAN}-1", TRACE.to_uppercase())),
        b3(&format!("{}-{SPAN}-1", zeros(32))),
        b3("evil-evil-evil"),
        b3("-"),
        b3("0").begins("02"),
        b3("1").begins("03"),
        b3("d").begins("03"),
        b3("D").begins("02"),
        b3("true").begins("02"),
        b3(&format!("{}-{SPAN}-1", &TRACE[16..])).continues("01").trace(SHORT),
        b3(&format!("{}-{SPAN}-1", &TRACE[..15])),
        b3(&format!("{TRACE}-{SPAN}-1-0000000000000000")).continues("01"),
        b3(&format!("{TRACE}-{SPAN}-1-{SPAN}-evil")),
        b3(&format!("{TRACE}-{SPAN}-1")).and("b3", other_b3()).continues("01"),
        b3("evil").and("b3", other_b3()),
        b3(&"evil".repeat(16_384)),
        multi(&TRACE[16..], "1").continues("01").trace(SHORT),
        multi(TRACE, "1").and("X-B3-Flags", "1").continues("01"),
        multi(TRACE, "0").and("x-b3-flags", "1").continues("01"),
        multi(TRACE, "1").and("x-b3-parentspanid", "evil"),
        of(&[("x-b3-sampled", b"1")]).begins("03"),
        of(&[("x-b3-flags", b"1")]).begins("03"),
        multi(TRACE, "1").continues("01"),
        multi(TRACE, "0").continues("00"),
        multi(TRACE, "false").continues("00").and("x-b3-spanid", "evil"),
        multi(TRACE, "evil"),
        multi("evil", "1"),
        of(&[("x-b3-traceid", TRACE.as_bytes())]),
        // H15: the first that is valid, in the order W3C, single, multi.
        other(valid().and("b3", other_b3())),
        other(valid().and("b3", "evil")),
        other(b3(&format!("{TRACE}-{SPAN}-0"))).continues("00"),
        other(b3("0")),
        other(parent(&with(0, "ff")).and("b3", format!("{TRACE}-{SPAN}"))).continues("00"),
        other(valid().again(1).and("b3", format!("{TRACE}-{SPAN}-0"))).continues("00"),
        other(parent("evil").and("b3", "evil")).continues("01").trace(OTHER),
        other(b3("")).continues("01").trace(OTHER),
        parent("evil").and("b3", format!("{TRACE}-{SPAN}-1")).continues("01"),
        parent(&with(3, "evil"))
            .and("x-b3-traceid", TRACE)
            .and("x-b3-spanid", SPAN)
            .continues("00"),
        b3("evil").and("x-b3-traceid", TRACE).and("x-b3-spanid", SPAN).continues("00"),
        valid().and("b3", "00000000000000010000000000000001-0000000000000001-0"),
        // Request ids.
        id(b"order-7").id("order-7"),
        id(b"A.z_0~+/=:@-9").id("A.z_0~+/=:@-9"),
        id(b" \torder-7 ").id("order-7"),
        id("a".repeat(128).as_bytes()).id("a".repeat(128)),
        id("evil".repeat(33).as_bytes()),
        id("evil".repeat(16_384).as_bytes()),
        id(b""),
        id(b"order-7").and("X-Request-ID", "order-7"),
        of(&[("X-REQUEST-ID", b"order-7")]).id("order-7"),
        id("a".repeat(129).as_bytes()),
        id("evil".repeat(2_560).as_bytes()),
        id(b"evil,evil-2"),
        id(b"<script>evil</script>"),
        id(b"evil\xc2\x85"),
        id(b"\xef\xbb\xbfevil"),
        of(&[("x_request_id", b"evil"), ("x-request-id-", b"evil")]),
        id(b"evil evil"),
        id(b"evil\tevil"),
        id(br#"evil","level":"FATAL"#),
        id(b"evil%0d%0aset-cookie:evil"),
        id(b"${jndi:ldap://evil}"),
        id(b"evil\xff\xfe"),
        id("ev\u{202e}il".as_bytes()),
        id(b"evil-1").and("x-request-id", "evil-2"),
        // What is not ours goes by.
        valid().and("baggage", "k=v").and("grpc-trace-bin", "AAAA").and("uber-trace-id", "1:2:3:4"),
    ]
}

impl Case {
    /// Values that are invalid here are written with this in them, so that it must be nowhere.
    fn is_hostile(&self) -> bool {
        let evil = |value: &[u8]| value.windows(4).any(|part| part.eq_ignore_ascii_case(b"evil"));
        self.fields.iter().any(|(_, value)| evil(value))
    }
}

/// A writer of log lines that can be read.
#[derive(Clone, Default)]
struct Written(Arc<Mutex<Vec<u8>>>);

impl io::Write for Written {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.lock().unwrap().extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Written {
    fn take(&self) -> String {
        String::from_utf8(std::mem::take(&mut *self.0.lock().unwrap())).unwrap()
    }

    /// Everything of ours, with all fields of all spans.
    fn subscriber(&self) -> Dispatch {
        let text = self.clone();
        let ours = Targets::new()
            .with_target("tower_", LevelFilter::TRACE)
            .with_target("trace_id_hosts", LevelFilter::TRACE);
        let text = fmt::layer().with_ansi(false).with_writer(move || text.clone());
        Dispatch::new(Registry::default().with(ours).with(text))
    }
}

type Propagating = Propagate<Client<HttpConnector, Empty<Bytes>>>;

fn client() -> Propagating {
    PropagateLayer::new().layer(Client::builder(TokioExecutor::new()).build_http())
}

/// A server that tells the headers of what it is sent.
async fn sink() -> (Server, Events<HeaderMap>) {
    let (tell, calls) = events();
    let service = service_fn(move |call: Request<Incoming>| {
        tell.send(call.into_parts().0.headers).unwrap();
        async { Ok::<_, Infallible>(Response::new(Empty::<Bytes>::new())) }
    });
    (Server::hyper(http1(), service).await, calls)
}

/// A service whose request starts a task, which logs a line and makes a call to `to`.
async fn calling(protocol: Protocol, trust: Trust, to: &Server) -> (Server, Events<TraceContext>) {
    let (tell, contexts) = events();
    let (client, to) = (client(), format!("http://{}/", to.addr()));
    let handler = service_fn(move |_: Request<Incoming>| {
        let (tell, client, to) = (tell.clone(), client.clone(), to.clone());
        async move {
            tracing::info!("handler");
            let task = TaskSet::current().unwrap().spawn("call", async move {
                tracing::info!("task");
                let request = Request::get(to).body(Empty::new()).unwrap();
                client.oneshot(request).await.unwrap();
            });
            task.unwrap().await.unwrap();
            tell.send(TraceContext::current().unwrap()).unwrap();
            // As a proxy might that copies what its upstream answers.
            let response = Response::builder().header("tracestate", "upstream=1");
            let response =
                response.header("x-request-id", "upstream-1").header("x-request-id", "upstream-2");
            Ok::<_, Infallible>(response.body(Empty::<Bytes>::new()).unwrap())
        }
    });
    let layer = TraceIdLayer::new().trust(trust).trace_id_header("x-trace-id".parse().unwrap());
    let layers = ServiceBuilder::new().layer(layer).layer(TaskSetLayer::new(&TaskRegistry::new()));
    (Server::hyper(protocol, layers.service(handler)).await, contexts)
}

struct Live {
    log: Written,
    trust: Trust,
    server: Server,
    contexts: Events<TraceContext>,
    sink: Server,
    calls: Events<HeaderMap>,
}

impl Live {
    async fn start(log: Written, protocol: Protocol, trust: Trust) -> Self {
        let (sink, calls) = sink().await;
        let (server, contexts) = calling(protocol, trust, &sink).await;
        Self { log, trust, server, contexts, sink, calls }
    }

    /// What the response to this case must be, which has come with these lines of a head.
    async fn assert(&mut self, case: &Case, head: &str) {
        let name: String = case.fields.iter().fold(String::new(), |mut name, (field, value)| {
            let shown = &value[..value.len().min(80)];
            write!(name, "{field}: {} ", shown.escape_ascii()).unwrap();
            name
        });
        let context = self.contexts.wait().await;
        let call = self.calls.wait().await;
        let is_trusted = self.trust == Trust::Continue;
        let (flags, state) = if is_trusted { (case.flags, &*case.state) } else { ("02", "") };
        let goes_on = case.trace.filter(|_| is_trusted);
        let trace_id = context.trace_id().to_string();
        match goes_on {
            Some(trace) => assert_eq!(trace_id, trace, "{name}"),
            None => assert!(![TRACE, SHORT, OTHER].contains(&&*trace_id), "{name}"),
        }
        let parent = context.parent_id().map(|id| id.to_string());
        assert_eq!(parent.as_deref(), goes_on.map(|_| SPAN), "{name}");
        let link = context.link().map(|link| link.trace_id.to_string());
        assert_eq!(link.as_deref(), case.trace.filter(|_| !is_trusted), "{name}");
        assert_eq!(context.trace_state().as_str(), state, "{name}");
        let request_id = context.request_id().as_str();
        match &case.id {
            Some(id) => assert_eq!(request_id, id, "{name}"),
            None => assert!(request_id.len() == 32 && !case.is_in(request_id), "{name}"),
        }

        let one = |field: &str| {
            let mut lines = head.lines().filter_map(|line| line.split_once(": "));
            let values: Vec<_> = lines.by_ref().filter(|(name, _)| *name == field).collect();
            assert_eq!(values.len(), 1, "{name}: {head}");
            values[0].1
        };
        assert_eq!(one("x-request-id"), request_id, "{name}");
        assert_eq!(one("x-trace-id"), context.trace_id().to_string(), "{name}");
        assert!(!head.contains("tracestate") && !head.contains("upstream"), "{name}: {head}");

        let sent = |field| {
            let values: Vec<_> = call.get_all(field).iter().collect();
            assert!(values.len() <= 1, "{name}: {values:?}");
            values.first().map(|value| value.to_str().unwrap().to_owned())
        };
        let parent = TraceParent::parse(sent("traceparent").unwrap().as_bytes()).unwrap();
        assert_eq!(parent.trace_id, context.trace_id(), "{name}");
        assert!(parent.parent_id != context.span_id() && parent.parent_id.to_string() != SPAN);
        assert_eq!(&sent("traceparent").unwrap()[53..], flags, "{name}");
        assert_eq!(sent("tracestate").unwrap_or_default(), state, "{name}");
        assert_eq!(sent("x-request-id").unwrap(), request_id, "{name}");
        assert_eq!(sent("b3"), None, "{name}");

        let log = self.log.take();
        assert!(log.contains("handler") && log.contains("task"), "{log}");
        for line in log.lines().filter(|line| line.contains("handler") || line.contains("task")) {
            assert!(line.contains(&context.trace_id().to_string()), "{line}");
            assert!(line.contains(request_id), "{line}");
        }
        if case.is_hostile() {
            for text in [log, head.to_owned(), format!("{call:?}")] {
                assert!(!text.to_lowercase().contains("evil"), "{name}: {text}");
            }
        }
    }

    /// That no request has come to the handler.
    async fn assert_refused(&mut self, name: &str) {
        self.server.has_caught_up().await;
        assert!(self.contexts.so_far().is_empty() && self.calls.so_far().is_empty(), "{name}");
        assert!(!self.log.take().contains("evil"), "{name}");
    }
}

impl Case {
    fn is_in(&self, text: &str) -> bool {
        self.fields.iter().any(|(_, value)| !value.is_empty() && text.as_bytes() == *value)
    }

    fn on_http1(&self) -> Vec<u8> {
        let mut request = b"GET / HTTP/1.1\r\nhost: test\r\n".to_vec();
        for (name, value) in &self.fields {
            request.extend([name.as_bytes(), b": ", value, b"\r\n"].concat());
        }
        request.extend(b"\r\n");
        request
    }
}

#[tokio::test]
async fn every_header_over_http1_ends_as_the_specifications_say() {
    let log = Written::default();
    let _guard = set_default(&log.subscriber());
    for trust in [Trust::Continue, Trust::Restart] {
        let mut live = Live::start(log.clone(), http1(), trust).await;
        let mut client = live.server.raw().await;
        for case in cases() {
            client.write(case.on_http1()).await;
            let head = client.read_head().await;
            live.assert(&case, &head).await;
        }
        drop(live.sink);
    }
}

/// H1: what a line end, or what hyper takes for one, makes of a value is another field.
#[tokio::test]
async fn a_line_end_in_a_value_adds_no_field_to_the_response() {
    let log = Written::default();
    let _guard = set_default(&log.subscriber());
    let mut live = Live::start(log, http1(), Trust::Continue).await;
    let mut client = live.server.raw().await;
    for end in ["\r\n", "\n"] {
        let mut case = of(&[("x-request-id", b"order-7")]).id("order-7");
        case.fields[0].1.extend(format!("{end}x-evil: evil").as_bytes());
        client.write(case.on_http1()).await;
        let head = client.read_head().await;
        live.assert(&case, &head).await;
    }
    for byte in [0x00, 0x1b, 0x7f, b'\r', 0x0b] {
        let mut client = live.server.raw().await;
        let value = [b"evil", &[byte][..], b"[31mevil"].concat();
        for name in ["traceparent", "tracestate", "b3", "x-b3-traceid", "x-request-id"] {
            client.write(of(&[(name, &value)]).on_http1()).await;
            let head = client.rest().await;
            assert!(head.starts_with("HTTP/1.1 400") && !head.contains("evil"), "{head}");
            live.assert_refused(name).await;
            client = live.server.raw().await;
        }
    }
    // A line that goes on in the next one, and space before the colon: RFC 9112, section 5.
    for field in
        ["traceparent: evil\r\n evil", "x-request-id: evil\r\n\tevil", "x-request-id : evil"]
    {
        let mut client = live.server.raw().await;
        client.write(format!("GET / HTTP/1.1\r\nhost: test\r\n{field}\r\n\r\n")).await;
        let head = client.rest().await;
        assert!(head.starts_with("HTTP/1.1 400") && !head.contains("evil"), "{head}");
        live.assert_refused(field).await;
    }
}

/// What comes after the body is too late, and not looked at.
#[tokio::test]
async fn trailers_of_a_request_do_not_say_where_it_belongs() {
    let log = Written::default();
    let _guard = set_default(&log.subscriber());
    let mut live = Live::start(log.clone(), http1(), Trust::Continue).await;
    let mut client = live.server.raw().await;
    let trailers = format!("traceparent: {VALID}\r\nx-request-id: evil\r\ntracestate: evil=1\r\n");
    let head = "POST / HTTP/1.1\r\nhost: test\r\ntransfer-encoding: chunked\r\n\
        trailer: traceparent, x-request-id, tracestate\r\n\r\n";
    client.write(format!("{head}2\r\nhi\r\n0\r\n{trailers}\r\n")).await;
    let head = client.read_head().await;
    // Hostile by what is in the trailers.
    live.assert(&of(&[("trailer", b"evil")]), &head).await;

    let mut live = Live::start(log, tower_tasks_tests::http2(), Trust::Continue).await;
    let mut client = live.server.h2().await;
    let request = Request::post("http://test/").body(()).unwrap();
    let (response, mut body) = client.open(request, false).await;
    let mut trailers = HeaderMap::new();
    trailers.insert("traceparent", HeaderValue::from_static(VALID));
    trailers.insert("x-request-id", HeaderValue::from_static("evil"));
    body.send_data(Bytes::from_static(b"hi"), false).unwrap();
    body.send_trailers(trailers).unwrap();
    let response = soon(response).await.unwrap();
    live.assert(&of(&[("trailer", b"evil")]), &lines_of(response.headers())).await;
}

#[tokio::test]
async fn every_header_over_http2_ends_as_the_specifications_say() {
    let log = Written::default();
    let _guard = set_default(&log.subscriber());
    for trust in [Trust::Continue, Trust::Restart] {
        let mut builder = hyper::server::conn::http2::Builder::new(TokioExecutor::new());
        builder.max_header_list_size(1 << 20);
        let mut live = Live::start(log.clone(), Protocol::Http2(builder), trust).await;
        let mut client = live.server.h2().await;
        // H23: more fields than HTTP/1 takes.
        let many =
            of(&[("traceparent", VALID.as_bytes())]).continues("01").and("tracestate", "a=1");
        for case in cases().into_iter().chain([many.again(999)]) {
            let mut request = Request::get("http://test/").body(()).unwrap();
            for (name, value) in &case.fields {
                request.headers_mut().append(*name, HeaderValue::from_bytes(value).unwrap());
            }
            let response = soon(client.send(request).await).await.unwrap();
            live.assert(&case, &lines_of(response.headers())).await;
            read_all(&mut response.into_body()).await.unwrap();
        }
    }
}

fn lines_of(headers: &HeaderMap) -> String {
    headers.iter().fold(String::new(), |mut lines, (name, value)| {
        writeln!(lines, "{name}: {}", value.to_str().unwrap()).unwrap();
        lines
    })
}

/// Frames as no client of good will writes them: the header block has the bytes as they are.
#[tokio::test]
async fn over_http2_no_control_byte_reaches_a_handler() {
    fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
        let len = u32::try_from(payload.len()).unwrap().to_be_bytes();
        [&len[1..], &[kind, flags], &stream.to_be_bytes(), payload].concat()
    }
    /// RFC 7541, section 6.2.2: a literal without indexing.
    fn literal(name: &[u8], value: &[u8]) -> Vec<u8> {
        let len = |text: &[u8]| u8::try_from(text.len()).unwrap();
        [&[0, len(name)], name, &[len(value)], value].concat()
    }
    let log = Written::default();
    let _guard = set_default(&log.subscriber());
    let mut live = Live::start(log, tower_tasks_tests::http2(), Trust::Continue).await;
    let head = |name: &str, value: &[u8]| {
        // `:method: GET`, `:path: /`, `:scheme: http`.
        let block = [&[0x82, 0x84, 0x86], &*literal(name.as_bytes(), value)].concat();
        let start = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
        [&start[..], &frame(4, 0, 0, &[]), &frame(1, 0b101, 1, &block)].concat()
    };
    // So that what is refused below is not refused for the frames.
    let mut client = live.server.raw().await;
    client.write(head("traceparent", VALID.as_bytes())).await;
    assert_eq!(live.contexts.wait().await.trace_id().to_string(), TRACE);
    live.calls.wait().await;
    live.log.take();
    for end in ["\r\n", "\n", "\r", "\0", "\u{1b}[31m", "\u{7f}"] {
        for name in ["traceparent", "tracestate", "b3", "x-b3-traceid", "x-request-id"] {
            let mut client = live.server.raw().await;
            client.write(head(name, format!("evil{end}x-evil: evil").as_bytes())).await;
            live.assert_refused(name).await;
        }
    }
}

/// What a layer answers by itself leads to the log as well.
#[tokio::test]
async fn refusals_and_panics_tell_their_ids() {
    let tasks = TaskRegistry::new().limit(SpawnLimit::new(0));
    let router = axum::Router::new()
        .route("/full", get(async |tasks: TaskSet| tasks.spawn("task", async {}).map(drop)))
        .route("/panic", get(async || -> () { panic!("a handler") }))
        .layer((
            TraceIdLayer::new().trust(Trust::Continue),
            CatchUnwindLayer::new(),
            TaskSetLayer::new(&tasks),
        ));
    let server = Server::host(async |listener| axum::serve(listener, router).await.unwrap()).await;
    for (path, status) in [("/full", "503"), ("/panic", "500")] {
        let mut client = server.raw().await;
        let head = format!("GET {path} HTTP/1.1\r\nhost: test\r\nconnection: close\r\n");
        let ids = format!("traceparent: {VALID}\r\nx-request-id: order-7\r\n\r\n");
        client.write(head + &ids).await;
        let answer = client.rest().await;
        assert!(answer.starts_with(&format!("HTTP/1.1 {status}")), "{answer}");
        assert!(answer.contains("x-request-id: order-7\r\n"), "{answer}");
        let (_, problem) = answer.split_once("\r\n\r\n").unwrap();
        let problem: serde_json::Value = serde_json::from_str(problem).unwrap();
        assert_eq!(
            (&problem["trace_id"], &problem["request_id"]),
            (&TRACE.into(), &"order-7".into())
        );
    }
}

/// A gRPC service that answers with the metadata it was sent, and calls itself once.
#[derive(Clone)]
struct Echo {
    tell: tokio::sync::mpsc::UnboundedSender<(MetadataMap, TraceContext)>,
    to: Option<Channel>,
}

impl NamedService for Echo {
    const NAME: &'static str = "test.Echo";
}

impl Service<Request<tonic::body::Body>> for Echo {
    type Response = Response<tonic::body::Body>;
    type Error = Infallible;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response, Infallible>> + Send>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: Request<tonic::body::Body>) -> Self::Future {
        let Self { tell, to } = self.clone();
        Box::pin(async move {
            let unary = service_fn(move |request: tonic::Request<Bytes>| {
                let (tell, to) = (tell.clone(), to.clone());
                async move {
                    let (metadata, _, message) = request.into_parts();
                    let context = TraceContext::current().unwrap();
                    tell.send((metadata.clone(), context)).unwrap();
                    if let Some(channel) = to {
                        let task = TaskSet::current().unwrap().spawn("call", async move {
                            // As a proxy that hands on all that it was sent.
                            call(channel, metadata).await
                        });
                        task.unwrap().await.unwrap();
                    }
                    Ok(tonic::Response::new(message))
                }
            });
            Ok(tonic::server::Grpc::new(Plain).unary(unary, request).await)
        })
    }
}

async fn call(channel: Channel, metadata: MetadataMap) -> MetadataMap {
    let mut client = tonic::client::Grpc::new(PropagateLayer::new().layer(channel));
    let mut request = tonic::Request::new(Bytes::from("message"));
    *request.metadata_mut() = metadata;
    soon(client.ready()).await.unwrap();
    let path = "/test.Echo/Call".parse().unwrap();
    soon(client.unary(request, path, Plain)).await.unwrap().metadata().clone()
}

async fn echo(to: Option<&Server>) -> (Server, Events<(MetadataMap, TraceContext)>) {
    let (tell, calls) = events();
    let service = Echo { tell, to: to.map(channel) };
    let router = tonic::transport::Server::builder()
        .layer(TraceIdLayer::new().trust(Trust::Continue))
        .layer(TaskSetLayer::new(&TaskRegistry::new()))
        .add_service(service);
    let host = async |listener: TcpListener| {
        router.serve_with_incoming(TcpListenerStream::new(listener)).await.unwrap();
    };
    (Server::host(host).await, calls)
}

fn channel(server: &Server) -> Channel {
    Channel::from_shared(format!("http://{}", server.addr())).unwrap().connect_lazy()
}

/// H22: a client, a server that calls another from a task, and that one, all of tonic.
#[tokio::test]
async fn grpc_carries_the_trace_and_leaves_other_metadata_as_it_is() {
    let (last, mut at_last) = echo(None).await;
    let (first, mut at_first) = echo(Some(&last)).await;
    let mut metadata = MetadataMap::new();
    metadata.insert("traceparent", VALID.parse().unwrap());
    metadata.insert("tracestate", "a=1".parse().unwrap());
    metadata.insert("x-request-id", "order-7".parse().unwrap());
    metadata.insert("tenant", "acme".parse().unwrap());
    let binary = |bytes: &[u8]| tonic::metadata::MetadataValue::from_bytes(bytes);
    metadata.insert_bin("grpc-trace-bin", binary(&[0, 0, 255, 1]));
    metadata.append_bin("data-bin", binary(b"\xff\x00one"));
    metadata.append_bin("data-bin", binary(b"two"));
    let answered = call(channel(&first), metadata.clone()).await;
    assert_eq!(answered.get("x-request-id").unwrap(), "order-7");
    assert_eq!(answered.get_all("x-request-id").iter().count(), 1);
    assert!(!answered.contains_key("tracestate"));

    let (seen, context) = at_first.wait().await;
    assert_eq!(seen.get("traceparent").unwrap(), VALID, "outside of a request it is sent as it is");
    assert_eq!(context.trace_id().to_string(), TRACE);
    let (at_last, last_context) = at_last.wait().await;
    assert_eq!(last_context.trace_id().to_string(), TRACE);
    assert_eq!(last_context.request_id().as_str(), "order-7");
    assert_eq!(last_context.trace_state().as_str(), "a=1");
    assert_eq!(at_last.get_all("traceparent").iter().count(), 1);
    let parent = TraceParent::parse(at_last.get("traceparent").unwrap().as_bytes()).unwrap();
    assert_eq!(Some(parent.parent_id), last_context.parent_id());
    assert!(parent.parent_id.to_string() != SPAN && parent.parent_id != context.span_id());
    for seen in [&seen, &at_last] {
        assert_eq!(seen.get("tenant").unwrap(), "acme");
        assert_eq!(seen.get_bin("grpc-trace-bin").unwrap().to_bytes().unwrap(), [0, 0, 255, 1][..]);
        let data: Vec<_> =
            seen.get_all_bin("data-bin").iter().map(|value| value.to_bytes().unwrap()).collect();
        assert_eq!(data, [&b"\xff\x00one"[..], b"two"]);
    }
}

/// The requests that lines were logged for, each with the number of lines. The ids of a line are
/// those of the context that is current, and of the innermost span that has some.
#[derive(Clone, Default)]
struct Lines(Arc<Mutex<Vec<String>>>);

impl<S: Subscriber + for<'a> LookupSpan<'a>> layer::Layer<S> for Lines {
    fn on_event(&self, event: &Event<'_>, _: layer::Context<'_, S>) {
        #[derive(Default)]
        struct Plan(String);
        impl Visit for Plan {
            fn record_debug(&mut self, _: &Field, _: &dyn std::fmt::Debug) {}
            fn record_str(&mut self, field: &Field, value: &str) {
                if field.name() == "plan" {
                    value.clone_into(&mut self.0);
                }
            }
        }
        let mut plan = Plan::default();
        event.record(&mut plan);
        if plan.0.is_empty() {
            // Of the hosts.
            return;
        }
        assert_ids(&plan.0);
        self.0.lock().unwrap().push(plan.0);
    }
}

/// The plan of a request is its number: in the trace id, and in the request id.
fn assert_ids(plan: &str) {
    let context = RequestContext::current();
    assert_eq!(context.get::<RequestId>().unwrap().as_str(), plan);
    assert_eq!(context.get::<TraceId>().unwrap().to_string(), format!("{plan:0>32}"));
}

const REQUESTS: usize = 1_000;

/// Serves them all at once over HTTP/2; each has three tasks, one of them a closure that blocks,
/// and each of these makes a call or injects its headers.
fn serve_a_thousand(runtime: &Runtime) {
    async fn handle(
        request: Request<Incoming>,
        all: Arc<Barrier>,
        client: Propagating,
        to: String,
    ) -> Result<Response<Empty<Bytes>>, Infallible> {
        let plan = request.headers()["x-request-id"].to_str().unwrap().to_owned();
        // All of them are here before any goes on.
        all.wait().await;
        let tasks = TaskSet::current().unwrap();
        let mut handles = Vec::new();
        for name in ["one", "two"] {
            let (plan, client, to) = (plan.clone(), client.clone(), to.clone());
            let task = tasks.spawn(name, async move {
                tracing::info!(plan, "before");
                let request = Request::get(to).header("plan", &plan).body(Empty::new()).unwrap();
                client.oneshot(request).await.unwrap();
                tracing::info!(plan, "after");
                assert_ids(&plan);
            });
            handles.push(task.unwrap());
        }
        let in_closure = plan.clone();
        let closure = tasks.spawn_blocking("three", move |_| {
            let plan = in_closure;
            tracing::info!(plan, "blocks");
            assert_ids(&plan);
            let mut headers = HeaderMap::new();
            inject(&mut headers);
            assert_eq!(headers["x-request-id"], *plan);
            assert_eq!(headers["traceparent"].to_str().unwrap()[3..35], format!("{plan:0>32}"));
        });
        handles.push(closure.unwrap());
        for handle in handles {
            handle.await.unwrap();
        }
        tracing::info!(plan, "handler");
        assert_ids(&plan);
        Ok(Response::new(Empty::new()))
    }
    runtime.block_on(async {
        let (sink, mut calls) = sink().await;
        let all = Arc::new(Barrier::new(REQUESTS));
        let (client, to) = (client(), format!("http://{}/", sink.addr()));
        let layers = ServiceBuilder::new()
            .layer(TraceIdLayer::new().trust(Trust::Continue))
            .layer(TaskSetLayer::new(&TaskRegistry::new()));
        let service = layers.service(service_fn(move |request| {
            handle(request, all.clone(), client.clone(), to.clone())
        }));
        let mut builder = hyper::server::conn::http2::Builder::new(TokioExecutor::new());
        builder.max_concurrent_streams(u32::try_from(REQUESTS).unwrap());
        let server = Server::hyper(Protocol::Http2(builder), service).await;
        let mut client = server.h2().await;
        let mut responses = JoinSet::new();
        for plan in 1..=REQUESTS {
            let request = Request::get("http://test/")
                .header("traceparent", format!("00-{plan:032}-{SPAN}-01"))
                .header("x-request-id", plan.to_string())
                .body(())
                .unwrap();
            let response = client.send(request).await;
            responses.spawn(async move {
                let response = soon(response).await.unwrap();
                assert!(response.status().is_success());
                assert_eq!(response.headers()["x-request-id"], *plan.to_string());
            });
        }
        while let Some(response) = responses.join_next().await {
            response.unwrap();
        }
        let calls = calls.so_far();
        let mut spans = BTreeSet::new();
        for call in &calls {
            let plan = call["plan"].to_str().unwrap();
            assert_eq!(call["x-request-id"], plan);
            let parent = TraceParent::parse(call["traceparent"].as_bytes()).unwrap();
            assert_eq!(parent.trace_id.to_string(), format!("{plan:0>32}"));
            spans.insert(parent.parent_id.to_string());
        }
        assert_eq!((calls.len(), spans.len()), (2 * REQUESTS, 2 * REQUESTS));
    });
}

/// H18 and H19. On two workers, whose threads and blocking ones all have the subscriber.
#[test]
fn a_thousand_requests_at_once_have_their_own_ids_whatever_is_subscribed() {
    let lines = Lines::default();
    let hides = Targets::new().with_target("trace_id_hosts", LevelFilter::INFO);
    let subscribers = [
        (Dispatch::none(), 0),
        (Dispatch::new(Registry::default().with(lines.clone())), 6 * REQUESTS),
        (Dispatch::new(Registry::default().with(hides).with(lines.clone())), 6 * REQUESTS),
    ];
    for (subscriber, expected) in subscribers {
        let runtime = Builder::new_multi_thread()
            .worker_threads(2)
            .on_thread_start(move || std::mem::forget(set_default(&subscriber)))
            .enable_all()
            .build();
        serve_a_thousand(&runtime.unwrap());
        let mut lines = std::mem::take(&mut *lines.0.lock().unwrap());
        assert_eq!(lines.len(), expected);
        lines.sort_unstable();
        lines.dedup();
        assert_eq!(lines.len(), expected.min(REQUESTS));
    }
}
