//! What stands in for the signals without the feature `signal`: there are none.

use std::{
    io,
    task::{Context, Poll},
};

pub(crate) enum Signals {}

impl Signals {
    #[expect(clippy::unnecessary_wraps, reason = "with the feature it may fail")]
    pub(crate) const fn listen() -> io::Result<Option<Self>> {
        Ok(None)
    }

    pub(crate) const fn poll_next(&mut self, _: &mut Context<'_>) -> Poll<i32> {
        match *self {}
    }
}
