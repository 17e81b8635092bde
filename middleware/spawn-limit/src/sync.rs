//! The parts that loom replaces in its models.

use std::panic::{AssertUnwindSafe, catch_unwind};

#[cfg(not(loom))]
pub(crate) use std::sync::{
    Arc, Mutex, MutexGuard,
    atomic::{AtomicBool, AtomicU64, Ordering},
};

#[cfg(loom)]
pub(crate) use loom::sync::{
    Arc, Mutex, MutexGuard,
    atomic::{AtomicBool, AtomicU64, Ordering},
};

/// Ours are not poisoned: no code of others runs under them.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}

/// Wakes. A waker is the code of others: if it panics, who gives something back goes on.
pub(crate) fn contain(wake: impl FnOnce()) {
    let Err(payload) = catch_unwind(AssertUnwindSafe(wake)) else { return };
    // What it has thrown may panic in its drop, and that may go on without end.
    std::mem::forget(catch_unwind(AssertUnwindSafe(|| drop(payload))));
}
