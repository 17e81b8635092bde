//! What stands in for the signals without the feature `signal`.

use std::{
    io,
    task::{Context, Poll},
};

pub(crate) struct Signals;

impl Signals {
    #[expect(clippy::unnecessary_wraps, reason = "with the feature it may fail")]
    pub(crate) const fn listen() -> io::Result<Self> {
        Ok(Self)
    }

    #[expect(clippy::unused_self, clippy::needless_pass_by_ref_mut, reason = "with it, it is used")]
    pub(crate) const fn poll_next(&mut self, _: &mut Context<'_>) -> Poll<i32> {
        Poll::Pending
    }
}
