//! A `b3` header.
#![no_main]

use libfuzzer_sys::fuzz_target;
use tower_trace_id::B3;

#[path = "../../tests/oracle/mod.rs"]
mod oracle;

fuzz_target!(|value: &[u8]| {
    assert_eq!(oracle::b3_as_text(B3::parse(value)), oracle::b3(value));
});
