//! A `traceparent` header, and what is sent on for it.
#![no_main]

use libfuzzer_sys::fuzz_target;
use tower_trace_id::TraceParent;

#[path = "../../tests/oracle/mod.rs"]
mod oracle;

fuzz_target!(|value: &[u8]| {
    let parent = TraceParent::parse(value);
    assert_eq!(oracle::parent_as_text(parent), oracle::traceparent(value));
    if let Some(parent) = parent {
        assert_eq!(TraceParent::parse(parent.to_header().as_bytes()), Some(parent));
    }
});
