//! Tower middleware that gives every task a request starts an owner, a bound, an end, an outcome
//! and a trace.
//!
//! Independent layers, each useful alone:
//!
//! | module | what it does |
//! |---|---|
//! | [`task_set`] | the request's tasks and the process's registry of them |
//! | [`shutdown`] | drain on shutdown: one budget, a truthful report |
//! | [`spawn_limit`] | bounded spawning, and bounded requests |
//! | [`response_end`] | when a response is really over, and how |
//! | [`request_context`] | values of the request, readable wherever its work runs |
//! | [`catch_unwind`] | panics become outcomes |
//! | [`trace_id`] | trace context and request ids: in, through, and out |
//!
//! The [README](https://github.com/tower-tasks/tower-tasks) has a quick start.
//!
//! # Where each layer goes
//!
//! From the outside in: [`TraceIdLayer`], so that all below has the ids; [`CatchUnwindLayer`], so
//! that a panic of whatever is below becomes an answer; [`ShutdownLayer`], so that a request is
//! over for the shutdown when it is for all below; [`RequestLimitLayer`] and
//! [`SpawnLimitLayer`], or these around one route; [`RequestContextLayer`], so that tasks have its
//! values; [`ResponseEndLayer`] and [`TaskSetLayer`], next to the handler. Layers that answer by
//! themselves, a timeout for instance, go outside of the task set if the tasks shall end as with a
//! client that left, and inside if their answer is a response like any other. With axum put all
//! of them into one `.layer((..))`: each further call of it costs four allocations a request.
//!
//! No order panics, hangs or makes the ledger wrong. These are wrong by nature all the same:
//!
//! | order | why not |
//! |---|---|
//! | [`CatchUnwindLayer`] inside of [`ResponseEndLayer`] or [`TaskSetLayer`] | they see what became of a panic of the body: an error, or with gRPC trailers. The end is `Failed` or `Completed`, and not `Panicked` |
//! | [`ShieldLayer`] outside of [`TaskSetLayer`] | there is no set that could own the handler: the answer is 500 |
//! | [`CatchUnwindLayer`] inside of [`ShieldLayer`] | the handler's task has answered: neither ledger nor [`OnPanic`] hear of its panic |
//! | a retry inside of [`TaskSetLayer`] | all attempts share one set and its limit, and the tasks of an attempt that failed go on beside those of the next; outside, each attempt has a set that ends with it |
//! | tower's `Buffer` inside of any of ours | its `call` runs on another task: there nothing is current, only in the future. `.in_extensions()` puts what is needed into the request; a [`SpawnLimitLayer`] has no such thing, and is not in force for what is spawned in that `call`, as a handler under [`ShieldLayer`] is |
//! | tower-http's `SetRequestIdLayer` inside of [`TraceIdLayer`] | the handler reads another id than log and response have; outside, its id is taken over |
//! | tower's `LoadShed` around [`RequestLimitLayer`] | it sheds what finds the service not ready, and the limit is always ready: it refuses in `call`, without help |
//! | tower's `ConcurrencyLimit`, on either side | its permit comes back with the head, while body and tasks go on |
//!
//! # What happens to the work
//!
//! | | the response future is dropped | the body is dropped | the deadline passes | the process stops |
//! |---|---|---|---|---|
//! | a task of [`TaskSet`] | as its [`AtEnd`] says for `Disconnected` | the same, or for `Completed` if all bytes have passed | as it says for `TimedOut` | drains within the budget, is cancelled, then aborted |
//! | a task of [`TaskRegistry`], or one that is kept | nothing | nothing | nothing | the same |
//! | a closure in `spawn_blocking` | is asked to stop if its task is told to end | the same | the same | is asked, and then reported |
//! | a handler under [`ShieldLayer`] | goes on, as its layer's `at_end` says | it has answered | goes on, likewise | drains as a task |
//! | any other handler, and a body | is dropped | is dropped | is dropped | has the budget, and is then dropped |
//! | [`ResponseEndLayer`]'s hook | `Disconnected` | `Completed` if all announced bytes have passed, else `Disconnected` | outside of the task set `Completed` or `Failed`; inside `Disconnected`, or what the response made of the end of its tasks | the same, of [`ShutdownLayer`] |
//! | a permit of [`SpawnLimit`] | stays until its task has ended | the same | the same | the same |
//! | a caller that waits for a permit | gives up | gives up | gives up | gives up |
//! | a permit of [`RequestLimitLayer`] | comes back | comes back | comes back | comes back |
//! | a panic in that drop | is contained by [`CatchUnwindLayer`] | the same | the same | the same |
//!
//! # Where `current()` works
//!
//! | | [`TaskSet::current`], [`RequestContext::current`] |
//! |---|---|
//! | the handler: in `call`, and in polls and the drop of its future | yes |
//! | polls of the body | yes |
//! | the drop of a future or body that has not come to its end | the set, if it was asked for before; the context |
//! | tasks and blocking closures of ours, and what they spawn with us | yes |
//! | a bare `tokio::spawn` or `spawn_blocking`, axum's `on_upgrade` | no: move the handle in, or use `context.scope(future)` |
//! | a `call` behind tower's `Buffer` | no: `.in_extensions()` and the extractor |
//!
//! # Hosts
//!
//! axum, hyper and tonic take the layers as they are. (Around a whole `Router`, and not by its
//! `layer`, axum wants its own body back: `.map_response(|response| response.map(Body::new))`.)
//! Tested besides, with the same layers:
//!
//! | host | layers | where they go | mind |
//! |---|---|---|---|
//! | warp 0.4 | HTTP | around `warp::service(filter)` | |
//! | `lambda_http` 1.3 | HTTP | around what `run` gets | between two events Lambda freezes the process, tasks that drain too |
//! | poem 3.1 | HTTP | around a service, which is an endpoint by `.compat()` | the body's error, as below |
//! | poem 3.1 | plain | `endpoint.with(layers.compat())` | the response is over before its body is read; an error's text is the answer, so leave out [`CatchUnwindLayer`], or the client reads the message of a panic |
//! | salvo 1.1 | HTTP | `router.hoop(layers.compat())` | its handlers run beside the layers: nothing is current, [`.in_extensions()`](TaskSetLayer::in_extensions) puts the set into the request, and [`CatchUnwindLayer`] sees no panic of theirs; the body's error |
//! | tower-lsp 0.20 | plain | around the `LspService` | |
//! | apalis 1.0 | plain | `WorkerBuilder::layer(layers)` | |
//!
//! *Plain* are the layers by their `.plain()`, where requests are not HTTP's. Where a host wants a
//! body's error to be an `Error`, the outermost layer is tower's `MapResponseLayer` that makes it an
//! `io::Error` with `io::Error::other`.
//!
//! # Features
//!
//! One for each module, all on by default. `axum` adds extractors and responses, through
//! `axum-core`; `signal` makes SIGTERM and SIGINT start the shutdown; `serde` adds `Serialize` for the
//! ledger's snapshot and the shutdown's report; `full` is all of them.

#[cfg(feature = "catch-unwind")]
pub use tower_catch_unwind as catch_unwind;
#[cfg(feature = "request-context")]
pub use tower_request_context as request_context;
#[cfg(feature = "response-end")]
pub use tower_response_end as response_end;
#[cfg(feature = "shutdown")]
pub use tower_shutdown as shutdown;
#[cfg(feature = "spawn-limit")]
pub use tower_spawn_limit as spawn_limit;
#[cfg(feature = "task-set")]
pub use tower_task_set as task_set;
#[cfg(feature = "trace-id")]
pub use tower_trace_id as trace_id;

#[cfg(feature = "catch-unwind")]
pub use tower_catch_unwind::{CatchUnwindLayer, Panic, install_hook};
#[cfg(feature = "request-context")]
pub use tower_request_context::{RequestContext, RequestContextLayer};
#[cfg(feature = "response-end")]
pub use tower_response_end::{End, ResponseEndLayer};
#[cfg(feature = "shutdown")]
pub use tower_shutdown::{Report, Shutdown, ShutdownLayer, ShutdownWatch};
#[cfg(feature = "spawn-limit")]
pub use tower_spawn_limit::{Refused, RequestLimitLayer, SpawnError, SpawnLimit, SpawnLimitLayer};
#[cfg(feature = "task-set")]
pub use tower_task_set::{
    AtEnd, Cause, Group, GroupError, OnPanic, Outcome, ShieldLayer, StopToken, TaskError,
    TaskEvent, TaskHandle, TaskRegistry, TaskSet, TaskSetLayer, assert_drained,
};
#[cfg(feature = "trace-id")]
pub use tower_trace_id::{PropagateLayer, TraceContext, TraceIdLayer, Trust};

/// Runs the README's quick start: `cargo test` of the whole workspace has all features on.
#[cfg(all(doctest, feature = "full"))]
#[doc = include_str!("../README.md")]
struct Readme;
