//! The `tracestate` headers of a request, one a line.
#![no_main]

use libfuzzer_sys::fuzz_target;
use tower_trace_id::TraceState;

#[path = "../../tests/oracle/mod.rs"]
mod oracle;

fuzz_target!(|lines: &[u8]| {
    let fields: Vec<_> = lines.split(|&byte| byte == b'\n').map(<[u8]>::to_vec).collect();
    let state = TraceState::parse(fields.iter().map(Vec::as_slice));
    let text = state.as_ref().map(|state| state.as_str().to_owned());
    assert_eq!(text, oracle::tracestate(&fields));
    if let Some(state) = state {
        assert!(state.as_str().len() <= TraceState::MAX);
        assert_eq!(TraceState::parse([state.as_str().as_bytes()]), Some(state));
    }
});
