use std::{
    cell::Cell,
    fmt,
    num::{NonZeroU64, NonZeroU128},
    str::FromStr,
};

use bytes::{Bytes, BytesMut};
use http::HeaderValue;

thread_local! {
    static BUFFER: Cell<BytesMut> = Cell::default();
}

/// The size of a buffer in bytes: of some eight ids. A value that is kept keeps all of it, and an
/// HTTP/2 connection keeps those of its last heads, up to fifty, to compress the next ones.
const BUFFER_SIZE: usize = 256;

/// The most that a head tells: a request id of 128 bytes and a trace id.
const HEAD_MAX: usize = 128 + 32;

/// The value of a header, which is all visible.
///
/// Such a value mostly lives until its head is written, so those of a thread share a buffer: they
/// cost no allocation as long as the ones before are gone when it has been filled.
fn header(text: &[u8]) -> HeaderValue {
    let write = |buffer: &Cell<BytesMut>| {
        let mut next = buffer.take();
        // Before the first id of a head, so that there is room for the second one too.
        if next.capacity() < HEAD_MAX {
            let _ = next.try_reclaim(BUFFER_SIZE);
        }
        if next.capacity() < text.len() {
            next.reserve(BUFFER_SIZE);
        }
        next.extend_from_slice(text);
        let value = next.split().freeze();
        buffer.set(next);
        value
    };
    let value = BUFFER.try_with(write).unwrap_or_else(|_| Bytes::copy_from_slice(text));
    HeaderValue::from_maybe_shared(value).unwrap_or_else(|_| HeaderValue::from_static(""))
}

/// The id of a trace: 16 bytes, not all zero.
///
/// Written as 32 lower-case hexadecimal digits (W3C Trace Context Level 2, section 3.2.2.3).
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct TraceId(NonZeroU128);

impl TraceId {
    /// From bytes, most significant first; `None` if all are zero.
    pub const fn from_bytes(bytes: [u8; 16]) -> Option<Self> {
        match NonZeroU128::new(u128::from_be_bytes(bytes)) {
            Some(id) => Some(Self(id)),
            None => None,
        }
    }

    /// The bytes, most significant first.
    pub const fn to_bytes(self) -> [u8; 16] {
        self.0.get().to_be_bytes()
    }

    /// From exactly 32 lower-case hexadecimal digits that are not all zero.
    pub fn from_hex(digits: &[u8]) -> Option<Self> {
        Self::from_bytes(u128::to_be_bytes(parse_hex(digits, 32)?))
    }

    /// The id as a header's value, for a head that is written soon: it shares a buffer of 256 bytes
    /// with others, which is freed when the last of them is dropped.
    pub fn to_header(self) -> HeaderValue {
        const DIGITS: &[u8; 16] = b"0123456789abcdef";
        let mut digits = [0; 32];
        for (pair, byte) in digits.chunks_exact_mut(2).zip(self.to_bytes()) {
            pair.copy_from_slice(
                &[byte >> 4, byte & 0xf].map(|nibble| DIGITS[usize::from(nibble)]),
            );
        }
        header(&digits)
    }
}

/// The id of a span: 8 bytes, not all zero.
///
/// Written as 16 lower-case hexadecimal digits (W3C Trace Context Level 2, section 3.2.2.4).
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SpanId(NonZeroU64);

impl SpanId {
    /// From bytes, most significant first; `None` if all are zero.
    pub const fn from_bytes(bytes: [u8; 8]) -> Option<Self> {
        match NonZeroU64::new(u64::from_be_bytes(bytes)) {
            Some(id) => Some(Self(id)),
            None => None,
        }
    }

    /// The bytes, most significant first.
    pub const fn to_bytes(self) -> [u8; 8] {
        self.0.get().to_be_bytes()
    }

    /// From exactly 16 lower-case hexadecimal digits that are not all zero.
    pub fn from_hex(digits: &[u8]) -> Option<Self> {
        let id = u64::try_from(parse_hex(digits, 16)?).ok()?;
        Self::from_bytes(id.to_be_bytes())
    }
}

/// `str::from_str_radix` would take upper case and a sign.
fn parse_hex(digits: &[u8], len: usize) -> Option<u128> {
    if digits.len() != len {
        return None;
    }
    digits.iter().try_fold(0, |id, digit| {
        let digit = match digit {
            b'0'..=b'9' => digit - b'0',
            b'a'..=b'f' => digit - b'a' + 10,
            _ => return None,
        };
        Some(id << 4 | u128::from(digit))
    })
}

impl fmt::Display for TraceId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:032x}", self.0)
    }
}

impl fmt::Debug for TraceId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "TraceId({self})")
    }
}

impl FromStr for TraceId {
    type Err = ParseIdError;

    fn from_str(text: &str) -> Result<Self, ParseIdError> {
        Self::from_hex(text.as_bytes()).ok_or(ParseIdError(()))
    }
}

impl fmt::Display for SpanId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:016x}", self.0)
    }
}

impl fmt::Debug for SpanId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "SpanId({self})")
    }
}

impl FromStr for SpanId {
    type Err = ParseIdError;

    fn from_str(text: &str) -> Result<Self, ParseIdError> {
        Self::from_hex(text.as_bytes()).ok_or(ParseIdError(()))
    }
}

/// The id of a request: 1 to 128 characters of `A-Z a-z 0-9 . _ ~ + / = : @ -`, so that it can go
/// into a log or a header as it is.
// In place, and not the header's value that it came in: that is a part of the buffer that the
// whole head was read into, which a task must not keep.
#[derive(Clone, PartialEq, Eq, Hash)]
pub struct RequestId {
    len: u8,
    chars: [u8; Self::MAX],
}

impl RequestId {
    const MAX: usize = 128;

    /// From the bytes of a header's value, if they are an id.
    pub fn from_bytes(id: &[u8]) -> Option<Self> {
        let is_safe = |byte: &u8| byte.is_ascii_alphanumeric() || b"._~+/=:@-".contains(byte);
        // The length first: a value may be of hundreds of kilobytes.
        if !(1..=Self::MAX).contains(&id.len()) || !id.iter().all(is_safe) {
            return None;
        }
        let mut chars = [0; Self::MAX];
        chars[..id.len()].copy_from_slice(id);
        Some(Self { len: u8::try_from(id.len()).ok()?, chars })
    }

    /// The id as text.
    pub fn as_str(&self) -> &str {
        // They are all ASCII, so this cannot fail.
        std::str::from_utf8(&self.chars[..self.len.into()]).unwrap_or_default()
    }

    /// The id as a header's value, for a head that is written soon: it shares a buffer of 256 bytes
    /// with others, which is freed when the last of them is dropped.
    pub fn to_header(&self) -> HeaderValue {
        header(&self.chars[..self.len.into()])
    }
}

impl fmt::Display for RequestId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl fmt::Debug for RequestId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "RequestId({self})")
    }
}

impl FromStr for RequestId {
    type Err = ParseIdError;

    fn from_str(text: &str) -> Result<Self, ParseIdError> {
        Self::from_bytes(text.as_bytes()).ok_or(ParseIdError(()))
    }
}

/// The text is not an id. What it was is not told: it may be hostile.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ParseIdError(());

impl fmt::Display for ParseIdError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("not a valid id")
    }
}

impl std::error::Error for ParseIdError {}
