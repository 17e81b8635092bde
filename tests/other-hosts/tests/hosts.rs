//! The same layers, unchanged, under whatever else accepts Tower layers: one test for each host,
//! in which one call runs to its end and one is dropped.

use std::{
    convert::Infallible,
    future::{Future, pending},
    io,
    sync::{Arc, Mutex},
    time::Duration,
};

use bytes::Bytes;
use http::{Request, Response};
use http_body_util::{BodyExt, Full, combinators::BoxBody};
use serde_json::json;
use tokio::{sync::oneshot, task::yield_now};
use tower::{Layer, Service, ServiceExt, service_fn, util::MapResponseLayer};
use tower_tasks::{
    AtEnd, CatchUnwindLayer, End, ResponseEndLayer, Shutdown, ShutdownLayer, SpawnError,
    SpawnLimit, SpawnLimitLayer, TaskRegistry, TaskSet, TaskSetLayer, TraceContext, TraceIdLayer,
    assert_drained,
    catch_unwind::CatchUnwind,
    response_end::{MakeOnEnd, Plain},
};

type Http = (
    (TraceIdLayer, CatchUnwindLayer, ShutdownLayer),
    (SpawnLimitLayer, ResponseEndLayer<Ends>, TaskSetLayer),
);
type PlainStack = (
    (TraceIdLayer<(), Plain>, CatchUnwindLayer<(), Plain>, ShutdownLayer<Plain>),
    (SpawnLimitLayer<Plain>, ResponseEndLayer<Ends, Plain>, TaskSetLayer<Plain>),
);

#[derive(Clone, Default)]
struct Ends(Arc<Mutex<Vec<End>>>);

impl<Req> MakeOnEnd<Req> for Ends {
    type OnEnd = Box<dyn FnOnce(End) + Send>;

    fn make_on_end(&self, _: &Req) -> Self::OnEnd {
        let Self(ends) = self.clone();
        Box::new(move |end| ends.lock().unwrap().push(end))
    }
}

struct Site {
    tasks: TaskRegistry,
    shutdown: Shutdown,
    ends: Ends,
}

impl Site {
    fn new() -> Self {
        let tasks = TaskRegistry::new();
        let shutdown = Shutdown::new(Duration::from_mins(1)).without_signals().tasks(&tasks);
        Self { tasks, shutdown, ends: Ends::default() }
    }

    /// Outermost first.
    fn http(&self) -> Http {
        let limit = SpawnLimitLayer::new(SpawnLimit::new(1));
        let (ends, tasks) =
            (ResponseEndLayer::new(self.ends.clone()), TaskSetLayer::new(&self.tasks));
        let outer = (TraceIdLayer::new(), CatchUnwindLayer::new(), self.shutdown.layer());
        (outer, (limit, ends, tasks))
    }

    fn plain(&self) -> PlainStack {
        let ((ids, catch, shutdown), (limit, ends, tasks)) = self.http();
        let outer = (ids.plain(), catch.plain(), shutdown.plain());
        (outer, (limit.plain(), ends.plain(), tasks.plain()))
    }

    /// Drops the call when its task runs.
    async fn leave(&self, call: impl Future) {
        let runs = async {
            while self.tasks.is_empty() {
                yield_now().await;
            }
        };
        tokio::select! {
            _ = call => panic!("a call that stays has ended"),
            () = runs => {}
        }
    }

    /// After one call that was answered and one that was left.
    async fn adds_up(self) {
        let report = self.shutdown.finish().await;
        assert_eq!(report.exit_code(), 0, "{report:?}");
        assert_drained(&self.tasks);
        assert_eq!(*self.ends.0.lock().unwrap(), [End::Completed, End::Disconnected]);

        let snapshot = self.tasks.snapshot();
        assert!(snapshot.totals.is_exact());
        assert_eq!((snapshot.totals.attempted, snapshot.totals.refused), (3, 1));
        assert_eq!(snapshot.by_name["works"].completed, 1);
        assert_eq!(snapshot.by_name["refused"].refused, 1);
        assert_eq!(snapshot.by_name["stays"].cancelled, 1);
    }
}

/// What every handler does in the scope of its layers.
async fn handle(stays: bool) -> &'static str {
    assert!(TraceContext::current().is_some());
    handle_in(TaskSet::current().unwrap(), stays).await
}

async fn handle_in(tasks: TaskSet, stays: bool) -> &'static str {
    if stays {
        tasks.task("stays").at_end(AtEnd::Cancel).spawn(pending::<()>()).unwrap();
        pending::<()>().await;
    }
    let (end, ended) = oneshot::channel::<()>();
    let works = tasks.spawn("works", ended).unwrap();
    assert_eq!(tasks.spawn("refused", async {}).unwrap_err().reason, SpawnError::Full);
    end.send(()).unwrap();
    works.await.unwrap().unwrap();
    "worked"
}

async fn answer<B>(request: Request<B>) -> Result<Response<Full<Bytes>>, Infallible> {
    Ok(Response::new(handle(request.uri().path() == "/true").await.into()))
}

async fn read<B: http_body::Body<Error: std::fmt::Debug>>(body: B) -> Bytes {
    body.collect().await.unwrap().to_bytes()
}

/// For hosts that want an `Error` in a body, which ours become when they are boxed.
fn io_errors<B>(response: Response<B>) -> Response<BoxBody<Bytes, io::Error>>
where
    B: http_body::Body<Data = Bytes> + Send + Sync + 'static,
    B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
{
    response.map(|body| body.map_err(io::Error::other).boxed())
}

#[tokio::test]
async fn warp_is_a_service() {
    use warp::Filter;

    let site = Site::new();
    let filter = warp::path!(bool).then(handle);
    let service = site.http().layer(warp::service(filter));
    let call = |path: &str| {
        service.clone().oneshot(Request::get(path).body(Full::<Bytes>::default()).unwrap())
    };

    assert_eq!(read(call("/false").await.unwrap().into_body()).await, "worked");
    site.leave(call("/true")).await;
    site.adds_up().await;
}

#[tokio::test]
async fn lambda_http_takes_a_service() {
    use lambda_http::{Adapter, LambdaEvent};

    let site = Site::new();
    let service = site.http().layer(service_fn(answer));
    // Accepted, but not run: they ask Lambda for events, and hand them to the adapter.
    drop(lambda_http::run(service.clone()));
    drop(lambda_http::run_with_streaming_response(service.clone()));
    let mut adapter = Adapter::from(service);
    let mut call = |path: &str| {
        let event = json!({
            "version": "2.0", "routeKey": "$default", "isBase64Encoded": false,
            "rawPath": path, "headers": {}, "requestContext": {
                "http": { "method": "GET", "path": path }, "stage": "$default", "timeEpoch": 0,
            },
        });
        let event = serde_json::from_value(event).unwrap();
        adapter.call(LambdaEvent::new(event, lambda_http::Context::default()))
    };

    let answer = serde_json::to_value(call("/false").await.unwrap()).unwrap();
    assert_eq!(answer["body"], "worked");
    site.leave(call("/true")).await;
    site.adds_up().await;
}

/// Its handlers run beside the layers' future and not in it, so that they find what the request
/// carries, nothing is current, and a panic of theirs passes `catch-unwind` by.
#[tokio::test]
async fn salvo_takes_layers_for_http() {
    use salvo::{
        Depot, FlowCtrl, Handler, handler,
        http::{ReqBody, uri::Scheme},
        prelude::TowerLayerCompat,
    };

    #[handler]
    async fn answer(request: &mut salvo::Request) -> &'static str {
        assert!(TaskSet::current().is_err());
        assert_ne!(request.uri().path(), "/panic");
        let tasks = request.extensions().get::<TaskSet>().unwrap().clone();
        handle_in(tasks, request.uri().path() == "/true").await
    }

    let site = Site::new();
    let (outer, (limit, ends, tasks)) = site.http();
    let layers = (MapResponseLayer::new(io_errors), outer, limit, ends, tasks.in_extensions());
    let flow = [Arc::new(layers.compat::<ReqBody>()) as Arc<dyn Handler>, Arc::new(answer)];
    let call = async |path: &str| {
        let request = Request::get(path).body(ReqBody::None).unwrap();
        let mut request = salvo::Request::from_hyper(request, Scheme::HTTP);
        let mut response = salvo::Response::new();
        FlowCtrl::new(flow.to_vec())
            .call_next(&mut request, &mut Depot::new(), &mut response)
            .await;
        response.take_body()
    };

    assert!(CatchUnwind::new(call("/panic")).await.is_err());
    assert_eq!(site.ends.0.lock().unwrap().pop(), Some(End::Disconnected));
    assert_eq!(read(call("/false").await).await, "worked");
    site.leave(call("/true")).await;
    site.adds_up().await;
}

/// It answers with the text of an error, the message of a panic too.
#[tokio::test]
async fn poem_takes_plain_layers() {
    use poem::{Endpoint, EndpointExt, endpoint::make, middleware::TowerLayerCompatExt};

    let site = Site::new();
    let endpoint = make(async |request: poem::Request| {
        assert_ne!(request.uri().path(), "/panic", "a secret");
        handle(request.uri().path() == "/true").await
    });
    let endpoint = endpoint.with(site.plain().compat());
    let call = |path: &str| {
        endpoint.get_response(poem::Request::builder().uri(path.parse().unwrap()).finish())
    };

    let panicked = call("/panic").await;
    assert_eq!(panicked.status(), poem::http::StatusCode::INTERNAL_SERVER_ERROR);
    assert!(panicked.into_body().into_string().await.unwrap().contains("a secret"));
    assert_eq!(site.ends.0.lock().unwrap().pop(), Some(End::Panicked));
    assert_eq!(call("/false").await.into_body().into_string().await.unwrap(), "worked");
    site.leave(call("/true")).await;
    site.adds_up().await;
}

#[tokio::test]
async fn poem_takes_a_service_for_http() {
    use poem::{Endpoint, endpoint::TowerCompatExt};

    let site = Site::new();
    let layers = (MapResponseLayer::new(io_errors), site.http());
    let endpoint = layers.layer(service_fn(answer)).compat();
    let call = |path: &str| {
        endpoint.get_response(poem::Request::builder().uri(path.parse().unwrap()).finish())
    };

    assert_eq!(call("/false").await.into_body().into_string().await.unwrap(), "worked");
    site.leave(call("/true")).await;
    site.adds_up().await;
}

#[tokio::test]
async fn tower_lsp_takes_plain_layers() {
    use tower_lsp::{LanguageServer, LspService, Server, jsonrpc, lsp_types};

    struct Backend;

    #[tower_lsp::async_trait]
    impl LanguageServer for Backend {
        async fn initialize(
            &self,
            _: lsp_types::InitializeParams,
        ) -> jsonrpc::Result<lsp_types::InitializeResult> {
            Ok(lsp_types::InitializeResult::default())
        }

        async fn shutdown(&self) -> jsonrpc::Result<()> {
            Ok(())
        }
    }

    impl Backend {
        async fn answer(&self, stays: bool) -> jsonrpc::Result<&'static str> {
            Ok(handle(stays).await)
        }
    }

    let site = Site::new();
    let serve = async |stays: bool| {
        let (mut service, client) =
            LspService::build(|_| Backend).custom_method("answer", Backend::answer).finish();
        let initialize =
            jsonrpc::Request::build("initialize").params(json!({ "capabilities": {} }));
        service.call(initialize.id(1).finish()).await.unwrap().unwrap();

        let call = json!({ "jsonrpc": "2.0", "id": 2, "method": "answer", "params": stays });
        let call = call.to_string();
        let input = format!("Content-Length: {}\r\n\r\n{call}", call.len());
        let mut output = Vec::new();
        let server = Server::new(input.as_bytes(), &mut output, client);
        server.serve(site.plain().layer(service)).await;
        String::from_utf8(output).unwrap()
    };

    let output = serve(false).await;
    assert!(output.contains(r#""result":"worked""#), "{output}");
    site.leave(serve(true)).await;
    site.adds_up().await;
}

#[tokio::test]
async fn apalis_takes_plain_layers() {
    use apalis::prelude::{MemoryStorage, TaskSink, WorkerBuilder, WorkerContext};

    let site = Site::new();
    let worker = async |stays: bool| {
        let mut jobs = MemoryStorage::new();
        jobs.push(stays).await.unwrap();
        WorkerBuilder::new("worker").backend(jobs).layer(site.plain()).build(
            async |stays: bool, worker: WorkerContext| {
                handle(stays).await;
                worker.stop().unwrap();
            },
        )
    };

    worker(false).await.run().await.unwrap();
    site.leave(worker(true).await.run()).await;
    site.adds_up().await;
}
