//! Drain on shutdown: one budget, a truthful report.
//!
//! [`Shutdown`] takes a server from the first signal to the exit of its process within one budget,
//! whatever its connections do. [`ShutdownLayer`] counts the requests in flight to the end of their
//! responses, and ends those that are left at the deadline. The [`Report`] says what became of every
//! request and task, and names what had to be forced.
//!
//! The layer goes outside of the task set, so that a request is over when its tasks know it, and
//! inside of the trace ids, so that the report has them. A request is named by its method, and by its
//! route if [`ShutdownLayer::route`] tells it: never by what its client wrote.
//!
//! # Example
//!
//! ```
//! use std::time::Duration;
//! use bytes::Bytes;
//! use http::{Request, Response};
//! use http_body_util::{BodyExt, Full};
//! use tower::{Service, ServiceBuilder, ServiceExt, service_fn};
//! use tower_shutdown::Shutdown;
//! use tower_task_set::{TaskRegistry, TaskSet, TaskSetLayer};
//!
//! # type BoxError = Box<dyn std::error::Error + Send + Sync>;
//! # #[tokio::main(flavor = "current_thread")]
//! # async fn main() -> Result<(), BoxError> {
//! let tasks = TaskRegistry::new();
//! let shutdown = Shutdown::new(Duration::from_secs(25)).tasks(&tasks);
//! let service = ServiceBuilder::new()
//!     .layer(shutdown.layer())
//!     .layer(TaskSetLayer::new(&tasks))
//!     .service(service_fn(|_: Request<()>| async {
//!         TaskSet::current()?.spawn("send_receipt", async { /* mail it */ })?;
//!         Ok::<_, BoxError>(Response::new(Full::<Bytes>::default()))
//!     }));
//!
//! // What serves until it is told to stop: `axum::serve`, for instance.
//! let (stop, mut client) = (shutdown.signalled(), service.clone());
//! let server = async {
//!     client.ready().await?.call(Request::new(())).await?.into_body().collect().await?;
//!     shutdown.begin(); // as SIGTERM does, with the feature `signal`
//!     stop.await;
//!     Ok::<_, BoxError>(())
//! };
//! let report = shutdown.run(server).await.map_err(|error| error.to_string())?;
//!
//! assert_eq!(report.drained.completed, 1);
//! assert_eq!(report.exit_code(), 0); // `report.exit()` exits with it
//! # Ok(()) }
//! ```
//!
//! # What comes when
//!
//! | phase | begins | |
//! |---|---|---|
//! | settle | with the first signal, [`begin`](Shutdown::begin), or the end of the server | [`is_ready`](ShutdownWatch::is_ready) is false; all is served as before |
//! | drain | after the [settle delay](Shutdown::settle), none by default | the server stops accepting; work outside of requests is refused; [`draining`](ShutdownWatch::draining) is ready |
//! | cancel | the [grace](Shutdown::grace) before the deadline | requests end: 503 with Retry-After or gRPC status 14 before the head, an error or trailers after it. Tasks are told to end, for [`Cause::Shutdown`](tower_task_set::Cause::Shutdown); what requests make of that comes too late. No spawn and no request is accepted |
//! | abort | at the deadline | graceful tasks have no grace any more |
//! | over | 100 ms later, or up to a second while requests and tasks become fewer | the report; the server is dropped |
//!
//! What is done is over at once: in the drain, requests in flight are waited for, then their tasks
//! and those that are kept, as long as any part of the budget is left. Requests in flight and their
//! tasks may spawn until they are told to end; a spawn that comes too late is refused, and none is
//! lost.
//!
//! A second signal is the deadline. A third exits the process at once.
//!
//! # Hosts
//!
//! | | how |
//! |---|---|
//! | axum | `shutdown.run(axum::serve(listener, app).with_graceful_shutdown(shutdown.signalled()))` |
//! | tonic | `shutdown.run(Server::builder().add_routes(routes).serve_with_shutdown(addr, shutdown.signalled()))` |
//! | hyper-util | accept until `signalled()`, then `GracefulShutdown::shutdown()`; all of it in one future that [`run`](Shutdown::run) drives |
//! | by hand | accept until `signalled()`, then [`finish`](Shutdown::finish); then give the connections a moment, 100 ms, to write what was handed to them, and drop them |
//!
//! Each of them is in `tests/` of the repository. What they need of their own:
//!
//! - hyper's HTTP/1 waits 30 s at most for the head of a request, but only if the builder has a
//!   `timer`: without one for ever. `axum::serve` sets it.
//! - No host has a bound for the HTTP/2 handshake: a client that sends the preface and no SETTINGS
//!   holds a graceful server open. `run` returns at the deadline all the same.
//! - axum's `on_upgrade` runs the socket on a task that nobody waits for: take a
//!   [hold](tower_task_set::TaskSet::hold) in the handler, and let the socket have it. Or spawn what
//!   serves the socket into the `TaskSet`, to be kept.
//! - hyper resolves the upgrade even of a request that was answered otherwise: where a 101 comes too
//!   late, what would serve the socket runs all the same.
//!
//! # Kubernetes
//!
//! The budget is `terminationGracePeriodSeconds`, less what `preStop` takes, less two seconds: that
//! is for the signal to come, the last log line to go, and the process to end. With the default of
//! 30 s and a `preStop` of 3 s it is 25 s.
//!
//! A pod gets its SIGTERM while endpoints and load balancers still send to it. `preStop` with a
//! `sleep` of some seconds waits for them outside of the process; the
//! [settle delay](Shutdown::settle) does it inside, and the readiness probe sees it: let `/ready`
//! answer 503 when [`is_ready`](ShutdownWatch::is_ready) is false, and the delay be
//! `periodSeconds` times `failureThreshold` of the probe. One of the two is enough.
//!
//! # What goes on until it ends itself
//!
//! A feed of events, a long poll, a socket: they watch [`ShutdownWatch::draining`] and end
//! themselves, or are ended at the deadline. For bodies there is
//! [`until_draining`](ShutdownWatch::until_draining); a stream ends with futures-util's
//! `take_until(watch.draining())`. An upgraded socket that is held and does not look cannot be
//! ended: it is reported as left.
//!
//! # Cancellation
//!
//! Dropping a [`Shutdown`], its layer or a watch changes nothing. When all of them are gone, the
//! signals that were listened to end the process again. A response that is dropped counts as
//! completed: its client has left.
//!
//! # Runtimes
//!
//! [`run`](Shutdown::run), [`finish`](Shutdown::finish) and [`signalled`](Shutdown::signalled) start
//! one thread, which listens to signals and wakes the shutdown 20 times a second while it goes on:
//! so a task that never yields, which may keep the runtime's own driver from running, cannot hold it
//! up. If all threads of a runtime are blocked, `run` is not polled: then that thread makes the
//! report and exits the process. A log that blocks holds up whoever writes to it, but no exit for
//! longer than a second. When the last shutdown is gone, one thread that listened stays for the life
//! of the process: a signal then ends it.
//!
//! Without a time driver that thread alone keeps the time; a settle delay then needs `run`. A runtime
//! cannot be asked for one: if there is anything to wait for, one panic of tokio's is seen by the
//! panic hook, and goes no further. Under `panic = "abort"` it ends the process: there, the runtime
//! needs `enable_time`.
//!
//! # Differences from axum's, tonic's and hyper-util's own graceful shutdown
//!
//! They wait for connections, and without a bound; tasks, upgraded sockets and streams that never
//! end are not theirs. Here they only tell connections to end.

mod in_flight;
mod keeper;
mod layer;
mod log;
mod plan;
mod report;
mod roll;
mod shutdown;
#[cfg_attr(not(feature = "signal"), path = "no_signals.rs")]
mod signals;
mod state;
mod sync;
mod watch;

#[cfg(all(test, loom))]
mod loom_tests;

pub use layer::{CountRequests, ResponseBody, ResponseFuture, ShutdownLayer};
pub use plan::PlanError;
pub use report::{Drained, Forced, Kind, Report, Requests};
pub use shutdown::{RunError, Shutdown};
pub use tower_response_end::{BodyError, CallError, Http, Plain};
pub use watch::{Draining, ShutdownWatch, UntilDraining};
