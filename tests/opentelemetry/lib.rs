//! OpenTelemetry behind the hook for spans: see `tests`.
