use std::{fmt, sync::Arc};

use http::{HeaderName, HeaderValue};
use tower_request_context::{SpanId, TraceId};

use crate::random::hex;

pub(crate) const TRACEPARENT: HeaderName = HeaderName::from_static("traceparent");
pub(crate) const TRACESTATE: HeaderName = HeaderName::from_static("tracestate");

const SAMPLED: u8 = 0b01;
const RANDOM: u8 = 0b10;

/// What `traceparent` says: W3C Trace Context Level 2, section 3.2.
///
/// [`Display`](fmt::Display) writes it as the header does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub struct TraceParent {
    /// The trace (section 3.2.2.3).
    pub trace_id: TraceId,
    /// The span that calls (section 3.2.2.4).
    pub parent_id: SpanId,
    /// Whether the caller may have recorded it (section 3.2.2.5.1).
    pub sampled: bool,
    /// Whether at least the last seven bytes of the trace id are random (section 3.2.2.5.2).
    pub random: bool,
}

impl TraceParent {
    /// The longest value that is looked at, in bytes, white space and the fields of later versions
    /// included.
    pub const MAX: usize = 512;

    /// The length of a value of version 00, in bytes.
    const LEN: usize = 55;

    /// With both flags unset.
    pub const fn new(trace_id: TraceId, parent_id: SpanId) -> Self {
        Self { trace_id, parent_id, sampled: false, random: false }
    }

    /// Sets the flags.
    pub const fn flags(mut self, sampled: bool, random: bool) -> Self {
        self.sampled = sampled;
        self.random = random;
        self
    }

    /// From the bytes of the header's value, if they are valid.
    ///
    /// - White space around the value is no part of it (RFC 9110, section 5.5).
    /// - Digits are lower case, and neither id is all zero (sections 3.2.2.1 to 3.2.2.5).
    /// - Version `ff` is invalid (section 3.2.2.1), and version `00` ends with its flags.
    /// - A later version may go on after the flags, with a dash (section 3.2.4).
    /// - Flags that are not defined yet are ignored (sections 3.2.2.5.3 and 3.2.4).
    pub fn parse(value: &[u8]) -> Option<Self> {
        if value.len() > Self::MAX {
            return None;
        }
        let value = trim(value);
        let (version, tail) = (value.get(..2)?, value.get(Self::LEN..)?);
        let version = byte_from_hex(version)?;
        let ends = tail.is_empty() || (version != 0 && tail.starts_with(b"-"));
        if version == 0xff || !ends || [2, 35, 52].iter().any(|&at| value.get(at) != Some(&b'-')) {
            return None;
        }
        let flags = byte_from_hex(value.get(53..Self::LEN)?)?;
        Some(Self {
            trace_id: TraceId::from_hex(value.get(3..35)?)?,
            parent_id: SpanId::from_hex(value.get(36..52)?)?,
            sampled: flags & SAMPLED != 0,
            random: flags & RANDOM != 0,
        })
    }

    /// As the header's value: version 00, whatever version it came in (section 3.2.4).
    pub fn to_header(&self) -> HeaderValue {
        // All of it is visible, so this cannot fail.
        HeaderValue::from_bytes(&self.digits()).unwrap_or_else(|_| HeaderValue::from_static(""))
    }

    fn digits(&self) -> [u8; Self::LEN] {
        let mut digits = *b"00-00000000000000000000000000000000-0000000000000000-00";
        let sampled = if self.sampled { SAMPLED } else { 0 };
        let flags = sampled | if self.random { RANDOM } else { 0 };
        let (trace_id, parent_id) = (self.trace_id.to_bytes(), self.parent_id.to_bytes());
        for (start, bytes) in [(3, &trace_id[..]), (36, &parent_id[..]), (53, &[flags][..])] {
            for (pair, byte) in digits[start..].chunks_exact_mut(2).zip(bytes) {
                pair.copy_from_slice(&[hex(byte >> 4), hex(byte & 0xf)]);
            }
        }
        digits
    }
}

impl fmt::Display for TraceParent {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // They are all ASCII, so this cannot fail.
        f.write_str(std::str::from_utf8(&self.digits()).unwrap_or_default())
    }
}

/// What `tracestate` says: W3C Trace Context Level 2, section 3.3.
///
/// The entries of other vendors, carried along as they came and in their order. A clone costs one
/// reference count.
#[derive(Clone, Default, PartialEq, Eq, Hash)]
pub struct TraceState {
    // A copy, not the header's value: that is a part of the buffer that the whole head was read
    // into, which a task must not keep.
    list: Option<Arc<str>>,
}

impl TraceState {
    /// How much is carried along, in bytes. What is longer loses whole entries: first those of
    /// more than 128 bytes, then any, each time the last (section 3.3.3.1, which wants at least
    /// 512 to be carried).
    pub const MAX: usize = 1024;

    /// The most entries that a list may have (section 3.3.2.1).
    pub const ENTRIES_MAX: usize = 32;

    /// The longest key and the longest value, in bytes (sections 3.3.2.2.1 and 3.3.2.2.2).
    const TEXT_MAX: usize = 256;

    /// The longest list of the longest entries, with their commas, and white space around each.
    const LIST_MAX: usize = Self::ENTRIES_MAX * (2 * Self::TEXT_MAX + 4);

    /// From the values of all its header fields in their order, if they are valid.
    ///
    /// - Several fields are one list (section 3.3.2). Its empty entries are left out; an empty
    ///   list is valid.
    /// - White space around an entry is no part of it; at the start of a value it is, at its end
    ///   it is not (sections 3.3.2 and 3.3.2.2.2).
    /// - One entry that is invalid, or more than 32 entries, make the whole list invalid (section
    ///   "A traceparent is Received", step 3). A key that comes twice does not.
    /// - What is longer than 32 of the longest entries, with white space before and after each, is
    ///   not read: 16,512 bytes.
    pub fn parse<'a>(fields: impl IntoIterator<Item = &'a [u8]>) -> Option<Self> {
        let mut entries = [""; Self::ENTRIES_MAX];
        let (mut count, mut read) = (0, 0_usize);
        for field in fields {
            // Before anything is looked at: a value may be of hundreds of kilobytes.
            read = read.saturating_add(field.len()).saturating_add(1);
            if read > Self::LIST_MAX {
                return None;
            }
            for entry in field.split(|&byte| byte == b',').map(trim) {
                if entry.is_empty() {
                    continue;
                }
                *entries.get_mut(count)? = parse_entry(entry)?;
                count += 1;
            }
        }
        let entries = &mut entries[..count];
        let mut len = entries.iter().map(|entry| entry.len() + 1).sum::<usize>();
        // One comma less than entries.
        while len > Self::MAX + 1 {
            let last = entries.iter().rposition(|entry| entry.len() > 128);
            let last = last.or_else(|| entries.iter().rposition(|entry| !entry.is_empty()))?;
            len -= std::mem::take(&mut entries[last]).len() + 1;
        }
        if len == 0 {
            return Some(Self::default());
        }
        // In place first, so that it costs one allocation.
        let mut list = [0; Self::MAX + 1];
        let mut rest = &mut list[..];
        for entry in entries.iter().filter(|entry| !entry.is_empty()) {
            let (text, comma);
            (text, rest) = rest.split_at_mut_checked(entry.len())?;
            (comma, rest) = rest.split_first_mut()?;
            text.copy_from_slice(entry.as_bytes());
            *comma = b',';
        }
        let list = std::str::from_utf8(&list[..len - 1]).ok()?;
        Some(Self { list: Some(list.into()) })
    }

    /// The list as text.
    pub fn as_str(&self) -> &str {
        self.list.as_deref().unwrap_or_default()
    }

    /// The first value of `key`.
    pub fn get(&self, key: &str) -> Option<&str> {
        let mut entries = self.as_str().split(',').filter_map(|entry| entry.split_once('='));
        entries.find_map(|(name, value)| (name == key).then_some(value))
    }

    /// Whether there are no entries: then the header is not sent (section 3.3.2).
    pub fn is_empty(&self) -> bool {
        self.list.is_none()
    }
}

impl fmt::Display for TraceState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// Not what it holds, which is not ours to tell.
impl fmt::Debug for TraceState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TraceState").field("len", &self.as_str().len()).finish_non_exhaustive()
    }
}

/// Sections 3.3.2.2.1, "Key", and 3.3.2.2.2, "Value".
fn parse_entry(entry: &[u8]) -> Option<&str> {
    let at = entry.iter().position(|&byte| byte == b'=')?;
    let (key, value) = (&entry[..at], &entry[at + 1..]);
    let is_start = |byte: &u8| matches!(byte, b'a'..=b'z' | b'0'..=b'9');
    let is_key = |byte: &u8| is_start(byte) || matches!(byte, b'_' | b'-' | b'*' | b'/' | b'@');
    let is_value = |byte: &u8| matches!(byte, 0x20..=0x7e) && !matches!(byte, b',' | b'=');
    let valid = key.first().is_some_and(is_start)
        && key.len() <= TraceState::TEXT_MAX
        && key.iter().all(is_key)
        // Its end is no space: that was trimmed.
        && (1..=TraceState::TEXT_MAX).contains(&value.len())
        && value.iter().all(is_value);
    std::str::from_utf8(entry).ok().filter(|_| valid)
}

fn byte_from_hex(digits: &[u8]) -> Option<u8> {
    let digit = |digit: &u8| match digit {
        b'0'..=b'9' => Some(digit - b'0'),
        b'a'..=b'f' => Some(digit - b'a' + 10),
        _ => None,
    };
    match digits {
        [high, low] => Some(digit(high)? << 4 | digit(low)?),
        _ => None,
    }
}

/// Without the optional white space around it, which HTTP/1 servers take off and HTTP/2 servers
/// do not (RFC 9110, sections 5.5 and 5.6.3).
pub(crate) fn trim(mut value: &[u8]) -> &[u8] {
    while let [b' ' | b'\t', rest @ ..] | [rest @ .., b' ' | b'\t'] = value {
        value = rest;
    }
    value
}
