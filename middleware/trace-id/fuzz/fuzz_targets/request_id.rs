//! The `x-request-id` headers of a request, one a line.
#![no_main]

use http::{HeaderMap, HeaderValue};
use libfuzzer_sys::fuzz_target;
use tower_trace_id::{TraceContext, Trust};

#[path = "../../tests/oracle/mod.rs"]
mod oracle;

fuzz_target!(|lines: &[u8]| {
    let mut headers = HeaderMap::new();
    let mut values = Vec::new();
    for line in lines.split(|&byte| byte == b'\n') {
        if let Ok(value) = HeaderValue::from_bytes(line) {
            headers.append("x-request-id", value);
            values.push(line.to_vec());
        }
    }
    let made = TraceContext::extract(&headers, Trust::Restart).request_id().to_string();
    match oracle::request_id(&values) {
        Some(id) => assert_eq!(made, id),
        None => assert!(made.len() == 32 && made.bytes().all(|byte| byte.is_ascii_hexdigit())),
    }
});
