//! The signals that start a shutdown.

use std::{
    io,
    task::{Context, Poll},
};

/// Of SIGTERM and SIGINT; elsewhere than on Unix of ^C alone.
#[cfg(unix)]
pub(crate) struct Signals([(tokio::signal::unix::Signal, i32); 2]);

#[cfg(unix)]
impl Signals {
    /// From now on they do no longer end the process. Within a runtime.
    pub(crate) fn listen() -> io::Result<Option<Self>> {
        use tokio::signal::unix::{SignalKind, signal};
        let listen = |kind: SignalKind| Ok::<_, io::Error>((signal(kind)?, kind.as_raw_value()));
        Ok(Some(Self([listen(SignalKind::terminate())?, listen(SignalKind::interrupt())?])))
    }

    /// The number of the next one.
    pub(crate) fn poll_next(&mut self, cx: &mut Context<'_>) -> Poll<i32> {
        for (signal, number) in &mut self.0 {
            if signal.poll_recv(cx).is_ready() {
                return Poll::Ready(*number);
            }
        }
        Poll::Pending
    }
}

#[cfg(windows)]
pub(crate) struct Signals(tokio::signal::windows::CtrlC);

#[cfg(windows)]
impl Signals {
    pub(crate) fn listen() -> io::Result<Option<Self>> {
        tokio::signal::windows::ctrl_c().map(|ctrl_c| Some(Self(ctrl_c)))
    }

    pub(crate) fn poll_next(&mut self, cx: &mut Context<'_>) -> Poll<i32> {
        // As SIGINT.
        self.0.poll_recv(cx).map(|_| 2)
    }
}
