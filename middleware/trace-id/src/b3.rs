use std::fmt::Write;

use http::{HeaderMap, HeaderName, HeaderValue};
use tower_request_context::{SpanId, TraceId};

use crate::w3c::trim;

pub(crate) const B3_SINGLE: HeaderName = HeaderName::from_static("b3");
pub(crate) const X_B3_TRACE_ID: HeaderName = HeaderName::from_static("x-b3-traceid");
pub(crate) const X_B3_SPAN_ID: HeaderName = HeaderName::from_static("x-b3-spanid");
pub(crate) const X_B3_PARENT_SPAN_ID: HeaderName = HeaderName::from_static("x-b3-parentspanid");
pub(crate) const X_B3_SAMPLED: HeaderName = HeaderName::from_static("x-b3-sampled");
pub(crate) const X_B3_FLAGS: HeaderName = HeaderName::from_static("x-b3-flags");

/// What B3 headers say: [openzipkin/b3-propagation](https://github.com/openzipkin/b3-propagation).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub struct B3 {
    /// The trace, and the span that calls; `None` if only a decision was sent (section "Sampling
    /// State").
    pub ids: Option<(TraceId, SpanId)>,
    /// The parent of the span that calls (section "`ParentSpanId`"). Zeros are none.
    pub parent_id: Option<SpanId>,
    /// The decision; `None` leaves it to whoever is called (section "Sampling State", "Defer").
    pub sampling: Option<Sampling>,
}

/// Whether a trace is recorded (section "Sampling State").
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Sampling {
    /// It is not.
    Deny,
    /// It is.
    Accept,
    /// It is, whatever the load.
    Debug,
}

impl B3 {
    /// The longest value of any of its headers that is looked at, in bytes, white space included.
    pub const MAX: usize = 128;

    /// From the bytes of a `b3` header's value, if they are valid (section "Single Header").
    ///
    /// That is `{trace id}-{span id}`, then `-{sampling}` and `-{parent}` if wanted; or the
    /// sampling state alone. An id of 16 digits is padded with zeros on the left.
    pub fn parse(value: &[u8]) -> Option<Self> {
        if value.len() > Self::MAX {
            return None;
        }
        let mut fields = trim(value).split(|&byte| byte == b'-');
        let (first, second) = (fields.next()?, fields.next());
        let Some(second) = second else {
            return Some(Self { ids: None, parent_id: None, sampling: Some(sampling(first)?) });
        };
        let ids = Some((trace_id(first)?, SpanId::from_hex(second)?));
        let sampling = fields.next().map_or(Some(None), |field| sampling(field).map(Some))?;
        let parent_id = fields.next().map_or(Ok(None), parent_id).ok()?;
        fields.next().is_none().then_some(Self { ids, parent_id, sampling })
    }

    /// From `X-B3-TraceId` and its like, if they are there and valid (section "Multiple Headers").
    ///
    /// Of a header that comes twice the first counts. `X-B3-Sampled` may be `true` or `false`,
    /// which old tracers send. One header that is malformed makes all of them invalid, but for
    /// `X-B3-Flags`, of which any value but `1` is ignored.
    pub fn parse_multi(headers: &HeaderMap) -> Option<Self> {
        let get = |name: &HeaderName| {
            let value = headers.get(name).map(HeaderValue::as_bytes);
            match value {
                Some(value) if value.len() > Self::MAX => None,
                value => Some(value.map(trim)),
            }
        };
        let ids = match (get(&X_B3_TRACE_ID)?, get(&X_B3_SPAN_ID)?) {
            (Some(trace), Some(span)) => Some((trace_id(trace)?, SpanId::from_hex(span)?)),
            (None, None) => None,
            _ => return None,
        };
        let parent_id = get(&X_B3_PARENT_SPAN_ID)?.map_or(Ok(None), parent_id).ok()?;
        let sampled = match get(&X_B3_SAMPLED)? {
            None => None,
            Some(b"1" | b"true") => Some(Sampling::Accept),
            Some(b"0" | b"false") => Some(Sampling::Deny),
            Some(_) => return None,
        };
        let is_debug = matches!(get(&X_B3_FLAGS), Some(Some(b"1")));
        let sampling = if is_debug { Some(Sampling::Debug) } else { sampled };
        (ids.is_some() || sampling.is_some()).then_some(Self { ids, parent_id, sampling })
    }

    /// As the value of a `b3` header; `None` if it says nothing.
    pub(crate) fn to_header(self) -> Option<HeaderValue> {
        let mut value = String::with_capacity(68);
        if let Some((trace_id, span_id)) = self.ids {
            write!(value, "{trace_id}-{span_id}").ok()?;
        }
        if let Some(sampling) = self.sampling {
            let dash = if value.is_empty() { "" } else { "-" };
            let sampling = match sampling {
                Sampling::Deny => '0',
                Sampling::Accept => '1',
                Sampling::Debug => 'd',
            };
            write!(value, "{dash}{sampling}").ok()?;
            if let (Some(parent_id), Some(_)) = (self.parent_id, self.ids) {
                write!(value, "-{parent_id}").ok()?;
            }
        }
        HeaderValue::try_from(value).ok().filter(|value| !value.is_empty())
    }
}

/// Section "`TraceId`": 32 or 16 digits. The short one is padded on the left: W3C Trace Context
/// Level 2, section "Interoperating with existing systems which use shorter identifiers".
fn trace_id(digits: &[u8]) -> Option<TraceId> {
    if digits.len() != 16 {
        return TraceId::from_hex(digits);
    }
    let mut padded = [0; 16];
    padded[8..].copy_from_slice(&SpanId::from_hex(digits)?.to_bytes());
    TraceId::from_bytes(padded)
}

/// Section "`ParentSpanId`". Nothing is made of it, so one of zeros, which some send for a root,
/// does not spoil the rest.
fn parent_id(digits: &[u8]) -> Result<Option<SpanId>, ()> {
    let id = SpanId::from_hex(digits);
    if id.is_some() || digits == b"0000000000000000" { Ok(id) } else { Err(()) }
}

fn sampling(field: &[u8]) -> Option<Sampling> {
    match field {
        b"0" => Some(Sampling::Deny),
        b"1" => Some(Sampling::Accept),
        b"d" => Some(Sampling::Debug),
        _ => None,
    }
}
