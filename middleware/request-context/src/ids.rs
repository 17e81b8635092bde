use std::{
    fmt,
    num::{NonZeroU64, NonZeroU128},
    str::FromStr,
};

use http::HeaderValue;

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
///
/// It is kept as a header's value: taking one from a request or giving one to a response copies
/// nothing.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct RequestId(HeaderValue);

impl RequestId {
    /// The id that `value` is, if it is one.
    pub fn from_header(value: &HeaderValue) -> Option<Self> {
        Self::is_valid(value.as_bytes()).then(|| {
            let mut value = value.clone();
            // It is no secret, whatever the header's sender thought.
            value.set_sensitive(false);
            Self(value)
        })
    }

    /// The id as text.
    pub fn as_str(&self) -> &str {
        // Its characters are all visible ASCII, so this cannot fail.
        self.0.to_str().unwrap_or_default()
    }

    /// The id as a header's value.
    pub fn as_header(&self) -> &HeaderValue {
        &self.0
    }

    fn is_valid(id: &[u8]) -> bool {
        // The length first: a value may be of hundreds of kilobytes.
        (1..=128).contains(&id.len())
            && id.iter().all(|byte| byte.is_ascii_alphanumeric() || b"._~+/=:@-".contains(byte))
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
        if !Self::is_valid(text.as_bytes()) {
            return Err(ParseIdError(()));
        }
        HeaderValue::from_str(text).map(Self).map_err(|_| ParseIdError(()))
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
