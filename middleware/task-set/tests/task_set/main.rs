//! What tasks and their set do, seen through the public API: without sockets, on a paused clock
//! where time matters.

#![allow(clippy::unwrap_used)]
// A handle, which is a future, is often just what an async block is for.
#![allow(clippy::async_yields_async)]

mod blocking;
mod context;
mod deadline;
#[cfg(feature = "axum")]
mod extract;
mod group;
mod kinds;
mod ledger;
mod lifetime;
mod limit;
mod log;
mod on_panic;
mod outcome;
mod programs;
mod registry;
mod runtime;
mod set;
mod shield;
mod shutdown;
mod stop;
mod support;
mod wakers;
mod within;
