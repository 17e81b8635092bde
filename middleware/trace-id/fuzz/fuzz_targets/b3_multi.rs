//! The `X-B3-*` headers of a request, one a line: the first byte says which.
#![no_main]

use http::{HeaderMap, HeaderValue};
use libfuzzer_sys::fuzz_target;
use tower_trace_id::B3;

#[path = "../../tests/oracle/mod.rs"]
mod oracle;

const NAMES: [&str; 5] =
    ["x-b3-traceid", "x-b3-spanid", "x-b3-parentspanid", "x-b3-sampled", "x-b3-flags"];

fuzz_target!(|lines: &[u8]| {
    let mut headers = HeaderMap::new();
    for line in lines.split(|&byte| byte == b'\n') {
        let [which, value @ ..] = line else { continue };
        if let Ok(value) = HeaderValue::from_bytes(value) {
            headers.append(NAMES[usize::from(*which) % NAMES.len()], value);
        }
    }
    let first = NAMES.map(|name| headers.get(name).map(HeaderValue::as_bytes));
    assert_eq!(oracle::b3_as_text(B3::parse_multi(&headers)), oracle::b3_multi(first));
});
