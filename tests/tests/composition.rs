//! Our layers in every order, with each other and with tower's and tower-http's on every side: no
//! panic of theirs, no hang, and a ledger that agrees with those who spawned.

#![allow(clippy::unwrap_used)]

use std::{
    collections::BTreeMap,
    convert::Infallible,
    panic::{self, AssertUnwindSafe},
    sync::{
        Arc, Mutex, Once,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::Duration,
};

use bytes::Bytes;
use futures_util::{FutureExt, future::BoxFuture, stream};
use http::{HeaderValue, Method, Request, Response, StatusCode, Version, header::CONTENT_TYPE};
use http_body::{Body, Frame};
use http_body_util::{BodyExt, StreamBody, combinators::UnsyncBoxBody};
use tokio::time::{Instant, sleep, timeout};
use tower::{
    BoxError, Layer, Service, ServiceExt,
    buffer::BufferLayer,
    limit::ConcurrencyLimitLayer,
    load_shed::LoadShedLayer,
    retry::{Policy, RetryLayer},
    service_fn,
    timeout::TimeoutLayer,
    util::{BoxCloneService, MapRequestLayer},
};
use tower_http::{
    compression::CompressionLayer,
    request_id::{MakeRequestUuid, PropagateRequestIdLayer, SetRequestIdLayer},
    trace::TraceLayer,
};
use tower_tasks::{
    AtEnd, CatchUnwindLayer, End, PropagateLayer, RequestContext, RequestContextLayer,
    RequestLimitLayer, ResponseEndLayer, Shutdown, SpawnLimit, SpawnLimitLayer, TaskError,
    TaskHandle, TaskRegistry, TaskSet, TaskSetLayer, TraceContext, TraceIdLayer, assert_drained,
    task_set::ShieldLayer,
};

type Reply = Response<UnsyncBoxBody<Bytes, BoxError>>;
type Stack = BoxCloneService<Request<String>, Reply, BoxError>;
type Named = (&'static str, fn(&Site, Stack) -> Stack);

/// In the order of the docs, outermost first: those that every stack has.
const OURS: [Named; 5] = [
    ("trace-id", |_, inner| wrap(&TraceIdLayer::new().in_extensions(), inner)),
    ("catch-unwind", |_, inner| wrap(&CatchUnwindLayer::new().max_events_per_second(0), inner)),
    ("request-context", |_, inner| {
        wrap(&RequestContextLayer::new(|_: &_| "value").in_extensions(), inner)
    }),
    ("response-end", |site, inner| wrap(&site.response_end(), inner)),
    ("task-set", |site, inner| wrap(&site.task_set(), inner)),
];

/// And those that some have.
const SOME: [Named; 7] = [
    ("shutdown", |_, inner| wrap(&Shutdown::new(FOR_EVER).without_signals().layer(), inner)),
    ("task-set with a deadline", |site, inner| wrap(&site.task_set().deadline(3 * TIMEOUT), inner)),
    ("spawn-limit", |_, inner| wrap(&SpawnLimitLayer::new(SpawnLimit::new(6)), inner)),
    ("spawn-limit of requests", |_, inner| wrap(&RequestLimitLayer::new(4), inner)),
    ("spawn-limit of requests that wait", |_, inner| {
        wrap(&RequestLimitLayer::new(2).wait(TIMEOUT).queue(3), inner)
    }),
    ("shield", |site, inner| {
        let site = site.clone();
        // Counted as any other, where there is a set that takes it.
        let count = move |request: Request<String>| {
            let carried = request.extensions().get::<TaskSet>().is_some();
            let has_set = carried || TaskSet::current().is_ok();
            site.own.shielded.fetch_add(u64::from(has_set), Relaxed);
            request
        };
        wrap(&(MapRequestLayer::new(count), ShieldLayer::new("shield")), inner)
    }),
    ("propagate", |_, inner| wrap(&PropagateLayer::new(), inner)),
];

const OTHERS: [Named; 9] = [
    ("Buffer", |_, inner| wrap(&BufferLayer::new(8), inner)),
    ("Timeout", |_, inner| wrap(&TimeoutLayer::new(TIMEOUT), inner)),
    ("LoadShed", |_, inner| wrap(&LoadShedLayer::new(), inner)),
    ("Retry", |_, inner| wrap(&RetryLayer::new(OnceMore { left: 1 }), inner)),
    ("ConcurrencyLimit", |_, inner| wrap(&ConcurrencyLimitLayer::new(1), inner)),
    ("compression", |_, inner| wrap(&CompressionLayer::new(), inner)),
    ("tower-http's timeout", |_, inner| {
        let layer = tower_http::timeout::TimeoutLayer::with_status_code(
            StatusCode::GATEWAY_TIMEOUT,
            TIMEOUT,
        );
        wrap(&layer, inner)
    }),
    ("trace", |_, inner| wrap(&TraceLayer::new_for_http(), inner)),
    ("request-id", |_, inner| {
        let layers = (
            SetRequestIdLayer::x_request_id(MakeRequestUuid),
            PropagateRequestIdLayer::x_request_id(),
        );
        wrap(&layers, inner)
    }),
];

const TIMEOUT: Duration = Duration::from_secs(1);
/// More than anything takes here: then something hangs.
const FOR_EVER: Duration = Duration::from_secs(3600);
const PIECES: u32 = 3;

/// What the handler does, and when its client leaves.
const REQUESTS: [(&str, Duration); 11] = [
    ("/completes", FOR_EVER),
    ("/completes", Duration::ZERO),
    ("/completes", Duration::from_millis(15)),
    ("/panics", FOR_EVER),
    ("/fails", FOR_EVER),
    ("/body-panics", FOR_EVER),
    ("/body-fails", FOR_EVER),
    ("/is-slow", FOR_EVER),
    ("/is-slow", Duration::from_millis(15)),
    ("/never-answers", Duration::from_millis(15)),
    ("/completes", FOR_EVER),
];

#[tokio::test(start_paused = true)]
async fn our_layers_work_in_every_order() {
    for order in permutations(&OURS) {
        Site::default().prove(&order).await;
    }
}

#[tokio::test(start_paused = true)]
async fn our_layers_work_in_every_pair_of_orders() {
    let [.., task_set] = OURS;
    let all = [&OURS[..], &SOME].concat();
    for &outer in &all {
        for &inner in &all {
            Site::default().prove(&[outer, inner]).await;
            Site::default().prove(&[outer, inner, task_set]).await;
        }
    }
}

#[tokio::test(start_paused = true)]
async fn a_layer_that_some_have_works_in_every_place() {
    for some in SOME {
        for place in 0..=OURS.len() {
            let mut order = OURS.to_vec();
            order.insert(place, some);
            Site::default().prove(&order).await;
        }
    }
}

#[tokio::test(start_paused = true)]
async fn a_layer_of_others_works_in_every_place() {
    for other in OTHERS {
        for place in 0..=OURS.len() {
            let mut order = OURS.to_vec();
            order.insert(place, other);
            Site::default().prove(&order).await;
        }
        // Next to each of ours alone.
        for ours in [&OURS[..], &SOME].concat() {
            Site::default().prove(&[other, ours]).await;
            Site::default().prove(&[ours, other]).await;
        }
    }
}

#[tokio::test(start_paused = true)]
async fn two_layers_of_others_work_on_every_side() {
    for outer in OTHERS {
        for inner in OTHERS {
            Site::default().prove(&[&[outer, inner], &OURS[..]].concat()).await;
            Site::default().prove(&[&[outer], &OURS[..], &[inner]].concat()).await;
            Site::default().prove(&[&OURS[..], &[outer, inner]].concat()).await;
        }
    }
}

// What the docs of the facade say of orders.

#[tokio::test(start_paused = true)]
async fn a_timeout_outside_ends_the_tasks_as_a_client_that_left_and_inside_as_an_answer() {
    let [.., task_set] = OURS;
    for (name, inside) in [("Timeout", End::Failed), ("tower-http's timeout", End::Completed)] {
        let timeout = other(name);
        for (order, end) in [
            ([timeout, OURS[3], task_set], End::Disconnected),
            ([OURS[3], task_set, timeout], inside),
        ] {
            let site = Site::default();
            let reply = site.stack(&order).oneshot(request("/is-slow")).await;
            assert_eq!(reply.is_ok(), name != "Timeout");
            drop(reply);
            assert_eq!(*site.ends.lock().unwrap(), [end], "{}", names(&order));
        }
    }
}

#[tokio::test(start_paused = true)]
async fn a_retry_outside_gives_each_attempt_a_set_and_inside_they_share_one() {
    let [.., task_set] = OURS;
    for (order, spawned, cancelled) in [
        ([other("Retry"), OURS[3], task_set], 2, 1),
        // The first attempt's tasks go on, and count for the limit of each request.
        ([OURS[3], task_set, other("Retry")], 1, 0),
    ] {
        let site = Site::default();
        let stack = site.stack(&order);
        let mut reply = Box::pin(stack.oneshot(request("/fails-once-then-never-answers")));
        assert!(timeout(Duration::from_millis(50), &mut reply).await.is_err());
        let counts = site.tasks.snapshot().by_name["waits"];
        assert_eq!((counts.spawned, counts.cancelled), (spawned, cancelled), "{}", names(&order));
    }
}

#[tokio::test(start_paused = true)]
async fn a_panic_is_an_end_of_its_own_unless_a_body_of_an_inner_catch_has_answered_it() {
    let [_, catch, _, response_end, _] = OURS;
    for (order, what, grpc, end) in [
        ([catch, response_end], "/panics", false, End::Panicked),
        ([response_end, catch], "/panics", false, End::Panicked),
        ([response_end, catch], "/panics", true, End::Panicked),
        ([catch, response_end], "/body-panics", false, End::Panicked),
        ([catch, response_end], "/body-panics", true, End::Panicked),
        ([response_end, catch], "/body-panics", false, End::Failed),
        ([response_end, catch], "/body-panics", true, End::Completed),
    ] {
        quiet_panics();
        let site = Site::default();
        let mut request = request(what);
        if grpc {
            *request.method_mut() = Method::POST;
            *request.version_mut() = Version::HTTP_2;
            request
                .headers_mut()
                .insert(CONTENT_TYPE, HeaderValue::from_static("application/grpc"));
        }
        let reply = site.stack(&order).oneshot(request).await.unwrap();
        drop(reply.into_body().collect().await);
        assert_eq!(*site.ends.lock().unwrap(), [end], "{} {what}", names(&order));
    }
}

#[tokio::test(start_paused = true)]
async fn a_shield_outside_of_the_task_set_answers_by_itself_and_inside_it_keeps_the_handler() {
    let [.., task_set] = OURS;
    let shield = SOME.into_iter().find(|some| some.0 == "shield").unwrap();
    for (order, status, live) in [
        ([shield, task_set], StatusCode::INTERNAL_SERVER_ERROR, 0),
        ([task_set, shield], StatusCode::OK, 1),
    ] {
        let site = Site::default();
        let reply = site.stack(&order).oneshot(request("/completes")).await.unwrap();
        assert_eq!(reply.status(), status, "{}", names(&order));
        // Its client leaves.
        let leaves = timeout(TIMEOUT / 2, site.stack(&order).oneshot(request("/is-slow"))).await;
        assert_eq!(leaves.is_err(), live == 1, "{}", names(&order));
        let counts = site.tasks.snapshot().by_name.get("shield").copied().unwrap_or_default();
        assert_eq!(counts.live, live, "{}", names(&order));
    }
}

#[tokio::test(start_paused = true)]
async fn a_catch_outside_of_a_shield_sees_its_panic_and_inside_it_answers_before() {
    let [_, catch, _, response_end, task_set] = OURS;
    let shield = SOME.into_iter().find(|some| some.0 == "shield").unwrap();
    for (order, panicked) in [
        ([response_end, catch, task_set, shield], 1),
        // The task has not panicked: it has answered.
        ([response_end, task_set, shield, catch], 0),
    ] {
        quiet_panics();
        let site = Site::default();
        let reply = site.stack(&order).oneshot(request("/panics")).await.unwrap();
        assert_eq!(reply.status(), StatusCode::INTERNAL_SERVER_ERROR, "{}", names(&order));
        drop(reply.into_body().collect().await);
        assert_eq!(*site.ends.lock().unwrap(), [End::Panicked], "{}", names(&order));
        assert_eq!(site.tasks.snapshot().by_name["shield"].panicked, panicked);
    }
}

#[tokio::test(start_paused = true)]
async fn behind_a_buffer_the_call_has_no_set_but_the_one_in_the_type_map() {
    let site = Site::default();
    let seen = Arc::new(Mutex::new(Vec::new()));
    let seen_in_call = seen.clone();
    let handler = service_fn(move |request: Request<String>| {
        let carried = request.extensions().get::<TaskSet>().is_some();
        let seen = [TaskSet::current().is_ok(), carried];
        seen_in_call.lock().unwrap().push(seen);
        let seen = seen_in_call.clone();
        async move {
            seen.lock().unwrap().push([TaskSet::current().is_ok(), carried]);
            Ok::<_, Infallible>(Response::new(String::new()))
        }
    });
    let stack = site.task_set().layer(BufferLayer::new(1).layer(handler));
    stack.oneshot(request("/")).await.unwrap();
    let in_call_and_in_its_future = [[false, true], [true, true]];
    assert_eq!(*seen.lock().unwrap(), in_call_and_in_its_future);
}

#[tokio::test(start_paused = true)]
async fn behind_a_buffer_tasks_and_calls_have_the_context_in_the_type_map() {
    /// What the handler has, a child task, one that is spawned from a bare task, and a call.
    async fn seen() -> [Option<(&'static str, String)>; 3] {
        let has = || {
            let context = RequestContext::current();
            let id = context.get::<TraceContext>().map(|context| context.trace_id().to_string());
            context.get::<&'static str>().copied().zip(id)
        };
        let set = TaskSet::current().unwrap();
        let child = set.spawn("child", async move { has() }).unwrap().await.unwrap();
        let moved = async move { set.spawn("moved", async move { has() }).unwrap().await.unwrap() };
        [has(), child, tokio::spawn(moved).await.unwrap()]
    }
    let handler = service_fn(|_: Request<String>| async {
        let [handler, child, moved] = seen().await;
        assert_eq!((&child, &moved), (&handler, &handler));
        let (_, id) = handler.unwrap();
        Ok::<_, Infallible>(Response::new(http_body_util::Full::new(Bytes::from(id))))
    });
    let outer = || {
        let values = RequestContextLayer::new(|_: &Request<String>| "value").in_extensions();
        let name = http::HeaderName::from_static("x-trace-id");
        let trace_id = TraceIdLayer::new().in_extensions().trace_id_header(name);
        (trace_id, values, BufferLayer::new(1))
    };
    let tasks = || TaskSetLayer::new(&TaskRegistry::new());
    for stack in [
        wrap(&(outer(), tasks()), handler),
        wrap(&(outer(), tasks(), ShieldLayer::new("shield")), handler),
        wrap(&(outer(), tasks().in_extensions()), handler),
        wrap(&(outer(), tasks().in_extensions(), ShieldLayer::new("shield")), handler),
    ] {
        let reply = stack.oneshot(request("/")).await.unwrap();
        let told = reply.headers()["x-trace-id"].clone();
        assert_eq!(reply.into_body().collect().await.unwrap().to_bytes(), told.as_bytes());
    }
    // A client of the handler's own, which hands its request's context over.
    let client = service_fn(|call: Request<String>| async move {
        Ok::<_, Infallible>(call.headers().get("traceparent").is_some())
    });
    let client = (BufferLayer::new(1), PropagateLayer::new()).layer(client);
    let context = RequestContext::new().with_inherited(TraceContext::start());
    for (hands_over, is_sent) in [(true, true), (false, false)] {
        let mut call = request("/");
        if hands_over {
            call.extensions_mut().insert(context.clone());
        }
        let sent = context.clone().scope(client.clone().oneshot(call)).await.unwrap();
        assert_eq!(sent, is_sent);
    }
}

#[tokio::test(start_paused = true)]
async fn the_request_id_of_an_outer_layer_is_taken_over_and_an_inner_one_makes_another() {
    let set = SetRequestIdLayer::x_request_id(MakeRequestUuid);
    let handler = service_fn(async |request: Request<String>| {
        let ours = TraceContext::current().unwrap().request_id().to_string();
        let read = request.headers()["x-request-id"].to_str().unwrap().to_owned();
        Ok::<_, Infallible>(Response::new([ours, read].join(" ")))
    });
    let trace = TraceIdLayer::new();
    let outside = (set.clone(), trace.clone()).layer(handler);
    let inside = (trace, set).layer(handler);
    for (same, reply) in [
        (true, outside.oneshot(request("/")).await.unwrap()),
        (false, inside.oneshot(request("/")).await.unwrap()),
    ] {
        let told = reply.headers()["x-request-id"].clone();
        let body = reply.into_body().collect().await.unwrap().to_bytes();
        let (ours, read) = std::str::from_utf8(&body).unwrap().split_once(' ').unwrap();
        assert_eq!(told, ours);
        assert_eq!(ours == read, same);
    }
}

/// What one stack shares, and its own count.
#[derive(Clone, Default)]
struct Site {
    tasks: Tasks,
    made: Arc<AtomicU64>,
    ends: Arc<Mutex<Vec<End>>>,
    own: Arc<Own>,
}

#[derive(Clone)]
struct Tasks(TaskRegistry, SpawnLimit);

impl Default for Tasks {
    fn default() -> Self {
        let limit = SpawnLimit::new(100).per_request(4);
        Self(TaskRegistry::new().limit(limit.clone()), limit)
    }
}

impl std::ops::Deref for Tasks {
    type Target = TaskRegistry;

    fn deref(&self) -> &TaskRegistry {
        &self.0
    }
}

#[derive(Default)]
struct Own {
    attempted: AtomicU64,
    refused: AtomicU64,
    /// What shields spawn, whose handles are theirs.
    shielded: AtomicU64,
    handles: Mutex<Vec<TaskHandle<()>>>,
    calls: AtomicU64,
}

impl Site {
    fn response_end(&self) -> ResponseEndLayer<impl Fn(&Request<String>) -> OnEnd + Clone + use<>> {
        let (made, ends) = (self.made.clone(), self.ends.clone());
        ResponseEndLayer::new(move |_: &Request<String>| -> OnEnd {
            made.fetch_add(1, Relaxed);
            let ends = ends.clone();
            Box::new(move |end| ends.lock().unwrap().push(end))
        })
    }

    fn task_set(&self) -> TaskSetLayer {
        TaskSetLayer::new(&self.tasks).at_end(AtEnd::Cancel).in_extensions()
    }

    fn stack(&self, order: &[Named]) -> Stack {
        let site = self.clone();
        let handler = service_fn(move |request| handle(site.clone(), request));
        let handler = wrap(&tower::layer::util::Identity::new(), handler);
        order.iter().rev().fold(handler, |inner, (_, layer)| layer(self, inner))
    }

    /// Sends all requests, one after another and then at once, and checks what is left.
    async fn prove(self, order: &[Named]) {
        quiet_panics();
        let has = |name| order.iter().any(|layer| layer.0 == name);
        let at = names(order);
        let stack = self.stack(order);
        for (what, patience) in REQUESTS {
            client(stack.clone(), what, patience, &at).await;
        }
        let at_once = REQUESTS.map(|(what, patience)| client(stack.clone(), what, patience, &at));
        futures_util::future::join_all(at_once).await;
        drop(stack);

        self.tasks.close();
        let idle = timeout(FOR_EVER, self.tasks.wait()).await;
        assert!(idle.is_ok(), "{at}: {:?}", self.tasks.snapshot());
        assert_drained(&self.tasks);
        let snapshot = self.tasks.snapshot();
        let ledger = snapshot.totals;
        let shield = snapshot.by_name.get("shield").copied().unwrap_or_default();
        assert!(ledger.is_exact() && shield.is_exact(), "{at}: {ledger:?}");
        assert_eq!(shield.attempted, self.own.shielded.load(Relaxed), "{at}");
        let own = |of_all: u64, of_shields: u64| of_all - of_shields;
        let attempted = own(ledger.attempted, shield.attempted);
        assert_eq!(attempted, self.own.attempted.load(Relaxed), "{at}");
        assert_eq!(own(ledger.refused, shield.refused), self.own.refused.load(Relaxed), "{at}");
        let mut yielded = BTreeMap::<_, u64>::new();
        let handles = std::mem::take(&mut *self.own.handles.lock().unwrap());
        for handle in handles {
            let outcome = match timeout(FOR_EVER, handle).await.expect("it has ended") {
                Ok(()) => "completed",
                Err(TaskError::Cancelled(_)) => "cancelled",
                Err(TaskError::Panicked(_)) => "panicked",
                Err(other) => panic!("{at}: {other}"),
            };
            *yielded.entry(outcome).or_default() += 1;
        }
        let of = |outcome| yielded.get(outcome).copied().unwrap_or(0);
        assert_eq!(own(ledger.completed, shield.completed), of("completed"), "{at}");
        assert_eq!(own(ledger.cancelled, shield.cancelled), of("cancelled"), "{at}");
        assert_eq!(own(ledger.panicked, shield.panicked), of("panicked"), "{at}");
        assert_eq!(own(ledger.spawned, shield.spawned), yielded.values().sum::<u64>(), "{at}");
        assert_eq!(self.tasks.1.in_use(), 0, "{at}");
        // Each ended once, and there were some.
        let told = self.ends.lock().unwrap().len() as u64;
        assert_eq!(self.made.load(Relaxed), told, "{at}");
        assert_eq!(told > 0, has("response-end"), "{at}");
        // A shield that finds no set outside of it answers by itself.
        let place = |name: &str| order.iter().position(|layer| layer.0.starts_with(name));
        let set = place("task-set");
        let is_bare = place("shield").is_some_and(|shield| Some(shield) < set);
        assert_eq!(ledger.attempted > 0, set.is_some() && !is_bare, "{at}");
    }
}

type OnEnd = Box<dyn FnOnce(End) + Send>;

async fn client(stack: Stack, what: &'static str, patience: Duration, at: &str) {
    let until = Instant::now() + patience;
    let reads = async move {
        let reply = stack.oneshot(request(what)).await?;
        if reply.status() == StatusCode::OK && reply.headers().contains_key("x-handler-has-trace") {
            let ids = reply.headers().get_all("x-request-id").iter().count();
            assert!(ids <= 1, "{ids} request ids");
        }
        reply.into_body().collect().await.map(|_| ())
    };
    // Where no layer of ours catches it, a panic of the handler comes here.
    let ends = AssertUnwindSafe(reads).catch_unwind();
    if let Err(_elapsed) = tokio::time::timeout_at(until, ends).await {
        assert!(patience < FOR_EVER, "{at}: {what} hangs");
    }
}

fn request(what: &str) -> Request<String> {
    Request::get(what).header("accept-encoding", "gzip").body(String::new()).unwrap()
}

type Work = fn() -> BoxFuture<'static, ()>;

async fn handle(
    site: Site,
    request: Request<String>,
) -> Result<Response<UnsyncBoxBody<Bytes, BoxError>>, BoxError> {
    let carried = request.extensions().get::<TaskSet>().cloned();
    let set = TaskSet::current().ok().or(carried);
    let outer = TraceContext::current().map(|context| context.trace_id());
    let value = RequestContext::current().get::<&str>().copied();
    let tasks: [(_, Work); 4] = [
        ("completes", || sleep(Duration::from_millis(5)).boxed()),
        ("waits", || std::future::pending().boxed()),
        ("panics", || async { panic!("composition: a task") }.boxed()),
        // The limit of each request refuses this one, unless one of the others is over.
        ("completes", || std::future::ready(()).boxed()),
    ];
    for (name, task) in tasks.into_iter().chain([tasks[1]]).take_while(|_| set.is_some()) {
        let task = async move {
            // No task sees what its request does not.
            assert_eq!(TraceContext::current().map(|context| context.trace_id()), outer);
            assert_eq!(RequestContext::current().get::<&str>().copied(), value);
            task().await;
        };
        site.own.attempted.fetch_add(1, Relaxed);
        match set.as_ref().unwrap().spawn(name, task) {
            Ok(handle) => site.own.handles.lock().unwrap().push(handle),
            Err(_) => drop(site.own.refused.fetch_add(1, Relaxed)),
        }
    }
    match request.uri().path() {
        "/panics" => panic!("composition: the handler"),
        "/fails" => return Err("it fails".into()),
        "/is-slow" => sleep(2 * TIMEOUT).await,
        "/never-answers" => std::future::pending::<()>().await,
        "/fails-once-then-never-answers" => {
            if site.own.calls.fetch_add(1, Relaxed) == 0 {
                return Err("it fails once".into());
            }
            std::future::pending::<()>().await;
        }
        _ => {}
    }
    let what = request.uri().path().to_owned();
    let pieces = stream::unfold(0, move |n| {
        let what = what.clone();
        async move {
            sleep(Duration::from_millis(10)).await;
            match what.as_str() {
                "/body-panics" if n == 1 => panic!("composition: the body"),
                "/body-fails" if n == 1 => Some((Err(BoxError::from("it fails")), n + 1)),
                _ if n == PIECES => None,
                _ => Some((Ok(Frame::data(Bytes::from(vec![b'a'; 50]))), n + 1)),
            }
        }
    });
    let mut response = Response::builder().version(request.version());
    if let Some(content_type) = request.headers().get(CONTENT_TYPE) {
        response = response.header(CONTENT_TYPE, content_type);
    }
    if outer.is_some() {
        response = response.header("x-handler-has-trace", "yes");
    }
    Ok(response.body(StreamBody::new(pieces).boxed_unsync()).unwrap())
}

/// Tries once more after an error.
#[derive(Clone)]
struct OnceMore {
    left: u32,
}

impl Policy<Request<String>, Reply, BoxError> for OnceMore {
    type Future = std::future::Ready<()>;

    fn retry(
        &mut self,
        _: &mut Request<String>,
        result: &mut Result<Reply, BoxError>,
    ) -> Option<Self::Future> {
        let retry = result.is_err() && self.left > 0;
        self.left -= u32::from(retry);
        retry.then(|| std::future::ready(()))
    }

    fn clone_request(&mut self, request: &Request<String>) -> Option<Request<String>> {
        Some(request.clone())
    }
}

/// The same types for all layers.
fn wrap<L, S, T, B>(layer: &L, inner: S) -> Stack
where
    L: Layer<S, Service = T>,
    T: Service<
            Request<String>,
            Response = Response<B>,
            Error: Into<BoxError>,
            Future: Send + 'static,
        > + Clone
        + Send
        + 'static,
    B: Body<Data = Bytes, Error: Into<BoxError>> + Send + 'static,
{
    let outer = layer
        .layer(inner)
        .map_response(|reply: Response<B>| {
            reply.map(|body| body.map_err(Into::into).boxed_unsync())
        })
        .map_err(Into::into);
    BoxCloneService::new(outer)
}

fn other(name: &str) -> Named {
    OTHERS.into_iter().find(|other| other.0 == name).unwrap()
}

fn names(order: &[Named]) -> String {
    order.iter().map(|layer| layer.0).collect::<Vec<_>>().join(" > ")
}

fn permutations(of: &[Named]) -> Vec<Vec<Named>> {
    let Some((first, rest)) = of.split_first() else { return vec![Vec::new()] };
    let mut all = Vec::new();
    for order in permutations(rest) {
        for place in 0..=order.len() {
            let mut order = order.clone();
            order.insert(place, *first);
            all.push(order);
        }
    }
    all
}

/// The panics are meant, and there are many.
fn quiet_panics() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        let hook = panic::take_hook();
        panic::set_hook(Box::new(move |info| {
            let message = info.payload().downcast_ref::<&str>();
            if !message.is_some_and(|message| message.starts_with("composition: ")) {
                hook(info);
            }
        }));
    });
}
