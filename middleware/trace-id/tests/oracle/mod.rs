//! The parsers as the words of the specifications have them: on text, field by field, without a
//! thought for cost. The property tests and the fuzz targets compare with them.
#![allow(dead_code)] // Each of them uses some.

use std::str;

use tower_trace_id::{B3, Sampling, TraceParent};

pub(crate) type Parent = (String, String, bool, bool);
pub(crate) type Ids = (Option<(String, String)>, Option<String>, Option<char>);

fn is_hex(text: &str, len: usize) -> bool {
    text.chars().count() == len && text.chars().all(|c| "0123456789abcdef".contains(c))
}

fn is_id(text: &str, len: usize) -> bool {
    is_hex(text, len) && text.chars().any(|c| c != '0')
}

fn ows(text: &str) -> &str {
    text.trim_matches([' ', '\t'])
}

pub(crate) fn traceparent(value: &[u8]) -> Option<Parent> {
    // What a later version says after the flags need not be text.
    let text = String::from_utf8_lossy(value);
    let fields: Vec<_> = ows(&text).split('-').collect();
    let [version, trace, parent, flags, more @ ..] = &fields[..] else { return None };
    let ok = is_hex(version, 2)
        && *version != "ff"
        && is_id(trace, 32)
        && is_id(parent, 16)
        && is_hex(flags, 2)
        && value.len() <= 512
        && (*version != "00" || more.is_empty());
    let bits = format!("{:08b}", u8::from_str_radix(flags, 16).ok()?);
    ok.then(|| (trace.to_string(), parent.to_string(), bits.ends_with('1'), &bits[6..7] == "1"))
}

pub(crate) fn tracestate(fields: &[Vec<u8>]) -> Option<String> {
    if fields.iter().map(|field| field.len() + 1).sum::<usize>() > 32 * 516 {
        return None;
    }
    let list = fields.join(&b","[..]);
    let list = String::from_utf8(list).ok()?;
    let mut entries: Vec<_> = list.split(',').map(ows).filter(|e| !e.is_empty()).collect();
    let starts = "abcdefghijklmnopqrstuvwxyz0123456789";
    let keys = format!("{starts}_-*/@");
    for entry in &entries {
        let (key, value) = entry.split_once('=')?;
        let ok = key.starts_with(|c| starts.contains(c))
            && key.chars().all(|c| keys.contains(c))
            && key.len() <= 256
            && !value.is_empty()
            && value.len() <= 256
            && value.chars().all(|c| (' '..='~').contains(&c) && c != '=');
        if !ok {
            return None;
        }
    }
    if entries.len() > 32 {
        return None;
    }
    while entries.join(",").len() > 1024 {
        let large = entries.iter().rposition(|entry| entry.len() > 128);
        entries.remove(large.unwrap_or(entries.len() - 1));
    }
    Some(entries.join(","))
}

fn trace(text: &str) -> Option<String> {
    (is_id(text, 32) || is_id(text, 16)).then(|| format!("{text:0>32}"))
}

#[allow(clippy::option_option)] // Invalid, none, or one.
fn parent(text: Option<&str>) -> Option<Option<String>> {
    match text {
        None => Some(None),
        Some(text) if is_hex(text, 16) => Some(is_id(text, 16).then(|| text.to_owned())),
        Some(_) => None,
    }
}

pub(crate) fn b3(value: &[u8]) -> Option<Ids> {
    let text = str::from_utf8(value).ok().filter(|text| text.len() <= 128)?;
    let fields: Vec<_> = ows(text).split('-').collect();
    let state = |field: &str| ["0", "1", "d"].contains(&field).then(|| field.chars().next());
    match fields[..] {
        [only] => Some((None, None, state(only)?)),
        [id, span, ref more @ ..] if more.len() <= 2 && is_id(span, 16) => {
            let sampling = more.first().map_or(Some(None), |field| state(field))?;
            Some((Some((trace(id)?, span.into())), parent(more.get(1).copied())?, sampling))
        }
        _ => None,
    }
}

/// The first values of `X-B3-TraceId`, `SpanId`, `ParentSpanId`, `Sampled`, `Flags`.
pub(crate) fn b3_multi(first: [Option<&[u8]>; 5]) -> Option<Ids> {
    let [flags, texts @ ..] = {
        let [id, span, parent, sampled, flags] = first;
        [flags, id, span, parent, sampled]
    };
    let mut known = [None; 4];
    for (text, known) in texts.into_iter().zip(&mut known) {
        let Some(text) = text else { continue };
        *known = Some(ows(str::from_utf8(text).ok().filter(|text| text.len() <= 128)?));
    }
    let ids = match (known[0], known[1]) {
        (Some(id), Some(span)) if is_id(span, 16) => Some((trace(id)?, span.to_owned())),
        (None, None) => None,
        _ => return None,
    };
    let parent = parent(known[2])?;
    let sampled = match known[3] {
        None => None,
        Some("1" | "true") => Some('1'),
        Some("0" | "false") => Some('0'),
        Some(_) => return None,
    };
    let flags = flags.filter(|flags| flags.len() <= 128);
    let debug = flags.and_then(|flags| str::from_utf8(flags).ok()).map(ows) == Some("1");
    let sampling = if debug { Some('d') } else { sampled };
    (ids.is_some() || sampling.is_some()).then_some((ids, parent, sampling))
}

pub(crate) fn request_id(values: &[Vec<u8>]) -> Option<String> {
    let [value] = values else { return None };
    let text = str::from_utf8(value).ok().filter(|text| text.len() <= 256).map(ows)?;
    let safe = |c: char| c.is_ascii_alphanumeric() || "._~+/=:@-".contains(c);
    ((1..=128).contains(&text.len()) && text.chars().all(safe)).then(|| text.to_owned())
}

pub(crate) fn parent_as_text(parent: Option<TraceParent>) -> Option<Parent> {
    let TraceParent { trace_id, parent_id, sampled, random, .. } = parent?;
    Some((trace_id.to_string(), parent_id.to_string(), sampled, random))
}

pub(crate) fn b3_as_text(b3: Option<B3>) -> Option<Ids> {
    let B3 { ids, parent_id, sampling, .. } = b3?;
    let sampling = sampling.map(|sampling| match sampling {
        Sampling::Deny => '0',
        Sampling::Accept => '1',
        Sampling::Debug => 'd',
        _ => unreachable!(),
    });
    let ids = ids.map(|(trace, span)| (trace.to_string(), span.to_string()));
    Some((ids, parent_id.map(|id| id.to_string()), sampling))
}
