use std::{
    array,
    hash::{BuildHasher, Hasher, RandomState},
};

use tower_request_context::{RequestId, SpanId, TraceId};

/// What a request may need, drawn at once: a draw is a system call.
///
/// Nothing is kept for the next draw. What a process keeps, a forked child would repeat, and to
/// find out that it is one would cost a system call too. All bits are the generator's: no time, no
/// process id, no counter.
pub(crate) struct Ids {
    pub(crate) trace: TraceId,
    pub(crate) span: SpanId,
    request: [u8; 16],
}

impl Ids {
    pub(crate) fn draw() -> Self {
        loop {
            let bytes = random::<40>();
            let trace = TraceId::from_bytes(array::from_fn(|i| bytes[i]));
            let span = SpanId::from_bytes(array::from_fn(|i| bytes[16 + i]));
            if let (Some(trace), Some(span)) = (trace, span) {
                return Self { trace, span, request: array::from_fn(|i| bytes[24 + i]) };
            }
        }
    }

    /// 32 hexadecimal digits. Not the trace id's, which a response does not tell unasked.
    pub(crate) fn request_id(&self) -> RequestId {
        let mut digits = [0; 32];
        for (pair, byte) in digits.chunks_exact_mut(2).zip(self.request) {
            pair.copy_from_slice(&[hex(byte >> 4), hex(byte & 0xf)]);
        }
        RequestId::from_bytes(&digits).expect("digits are safe")
    }
}

pub(crate) fn span_id() -> SpanId {
    loop {
        if let Some(id) = SpanId::from_bytes(random()) {
            return id;
        }
    }
}

/// The lower-case digit of a number below 16.
pub(crate) const fn hex(nibble: u8) -> u8 {
    match nibble {
        0..=9 => b'0' + nibble,
        _ => b'a' - 10 + nibble,
    }
}

fn random<const N: usize>() -> [u8; N] {
    let mut bytes = [0; N];
    if getrandom::fill(&mut bytes).is_err() {
        // A request must not fail for want of an id. The standard library's keys are random too,
        // if there is any randomness to be had.
        for chunk in bytes.chunks_mut(8) {
            let hash = RandomState::new().build_hasher().finish().to_ne_bytes();
            chunk.copy_from_slice(&hash[..chunk.len()]);
        }
    }
    bytes
}
