//! What tasks and their set do, seen through the public API: without sockets, on a paused clock
//! where time matters.

#![allow(clippy::unwrap_used)]

mod context;
#[cfg(feature = "axum")]
mod extract;
mod ledger;
mod lifetime;
mod log;
mod outcome;
mod registry;
mod runtime;
mod set;
mod support;
