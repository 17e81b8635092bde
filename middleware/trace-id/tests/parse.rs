//! The parsers, against slow ones that follow the words of the specifications.
#![allow(missing_docs, clippy::print_stdout, clippy::unwrap_used)] // Tests.

use http::{HeaderMap, HeaderValue};
use oracle::{b3_as_text, parent_as_text};
use proptest::{collection::vec, prelude::*, sample::select, string::string_regex};
use tower_trace_id::{B3, Sampling, SpanId, TraceContext, TraceId, TraceParent, TraceState, Trust};

mod oracle;

const TRACE: &str = "0af7651916cd43dd8448eb211c80319c";
const SPAN: &str = "b7ad6b7169203331";

/// Mostly as it should be, and else anything.
fn mostly(good: &'static str) -> impl Strategy<Value = Vec<u8>> {
    let odd = "[0-9a-f]{0,40}|[0-9A-F]{16}|0{16}|0{32}|[ -~]{0,6}|-|";
    prop_oneof![
        12 => string_regex(good).unwrap().prop_map(String::into_bytes),
        1 => string_regex(odd).unwrap().prop_map(String::into_bytes),
        1 => vec(any::<u8>(), 0..6),
    ]
}

fn space() -> impl Strategy<Value = Vec<u8>> {
    prop_oneof![6 => Just(String::new()), 1 => string_regex("[ \t]{1,3}").unwrap(), 1 => string_regex("[ \t]{500}|\n").unwrap()]
        .prop_map(String::into_bytes)
}

/// Fields with dashes between them and white space around.
fn dashed(fields: Vec<BoxedStrategy<Vec<u8>>>, optional: usize) -> impl Strategy<Value = Vec<u8>> {
    let most = fields.len();
    (space(), fields, most - optional..=most, space()).prop_map(|(before, fields, count, after)| {
        [before, fields[..count].join(&b"-"[..]), after].concat()
    })
}

/// One byte of it is another, or gone, or there twice.
fn damaged(value: impl Strategy<Value = Vec<u8>>) -> impl Strategy<Value = Vec<u8>> {
    let one = (any::<prop::sample::Index>(), any::<u8>(), 0..12_u8);
    (value, one).prop_map(|(mut value, (at, byte, how))| {
        if !value.is_empty() {
            let at = at.index(value.len());
            match how {
                0 => value[at] = byte,
                1 => drop(value.remove(at)),
                2 => value.insert(at, value[at]),
                _ => {}
            }
        }
        value
    })
}

fn traceparent() -> impl Strategy<Value = Vec<u8>> {
    let fields = vec![
        mostly("00|00|00|ff|cc|01|[0-9a-f]{2}").boxed(),
        mostly("[0-9a-f]{32}").boxed(),
        mostly("[0-9a-f]{16}").boxed(),
        mostly("0[0-3]|[0-9a-f]{2}").boxed(),
        mostly("[a-z-]{0,20}").boxed(),
    ];
    damaged(dashed(fields, 2))
}

fn tracestate() -> impl Strategy<Value = Vec<Vec<u8>>> {
    let key = || {
        prop_oneof![
            30 => string_regex("[a-z0-9][a-z0-9_*/@-]{0,8}").unwrap(),
            2 => string_regex("[a-z0-9]{250,257}").unwrap(),
            1 => string_regex("[ -~]{0,4}").unwrap(),
        ]
    };
    let value = || {
        prop_oneof![
            30 => string_regex("[!-+./0-9:;<>?@A-Z~-]{1,12}").unwrap(),
            4 => string_regex("[a-z]{100,140}").unwrap(),
            2 => string_regex("[a-z]{250,257}").unwrap(),
            2 => string_regex("[ -~]{0,4}").unwrap(),
        ]
    };
    let entry = || {
        (space(), key(), value(), space()).prop_map(|(before, key, value, after)| {
            [before, format!("{key}={value}").into_bytes(), after].concat()
        })
    };
    let entry = move || prop_oneof![12 => entry().boxed(), 1 => space().boxed()];
    let few = move || vec(entry(), 0..6).prop_map(|entries| entries.join(&b","[..]));
    let field = prop_oneof![8 => few().boxed(), 1 => damaged(few()).boxed()];
    vec(field, 0..9)
}

fn b3_single() -> impl Strategy<Value = Vec<u8>> {
    let ids = vec![
        mostly("[0-9a-f]{32}|[0-9a-f]{16}").boxed(),
        mostly("[0-9a-f]{16}").boxed(),
        mostly("[01d]").boxed(),
        mostly("[0-9a-f]{16}|0{16}").boxed(),
        mostly("[01d]").boxed(),
    ];
    let alone = dashed(vec![mostly("[01d]").boxed()], 0);
    damaged(prop_oneof![4 => dashed(ids, 3).boxed(), 1 => alone.boxed()])
}

const MULTI: [&str; 5] =
    ["x-b3-traceid", "x-b3-spanid", "x-b3-parentspanid", "x-b3-sampled", "x-b3-flags"];

/// The values of each header. What `http` does not let in is left out.
fn b3_multi() -> impl Strategy<Value = [Vec<Vec<u8>>; 5]> {
    let values = |good: &'static str, most: usize| {
        let one = (space(), mostly(good), space()).prop_map(|(a, b, c)| [a, b, c].concat());
        let keep = |value: &Vec<u8>| HeaderValue::from_bytes(value).is_ok();
        vec(damaged(one).prop_filter("no header", keep), usize::from(most > 1)..=most)
    };
    [
        values("[0-9a-f]{32}|[0-9a-f]{16}", 2).boxed(),
        values("[0-9a-f]{16}", 2).boxed(),
        values("[0-9a-f]{16}|0{16}", 1).boxed(),
        values("0|1|true|false", 1).boxed(),
        values("0|1", 1).boxed(),
    ]
}

fn headers<V: AsRef<[u8]>>(fields: impl IntoIterator<Item = (&'static str, V)>) -> HeaderMap {
    let mut map = HeaderMap::new();
    for (name, value) in fields {
        map.append(name, HeaderValue::from_bytes(value.as_ref()).unwrap());
    }
    map
}

fn continued<V: AsRef<[u8]>>(fields: impl IntoIterator<Item = (&'static str, V)>) -> TraceContext {
    TraceContext::extract(&headers(fields), Trust::Continue)
}

proptest! {
    #[test]
    fn a_traceparent_is_what_the_oracle_says(value in traceparent()) {
        let parent = TraceParent::parse(&value);
        prop_assert_eq!(parent_as_text(parent), oracle::traceparent(&value));
        if let Some(parent) = parent {
            let sent = parent.to_header();
            prop_assert_eq!(sent.to_str().unwrap(), parent.to_string());
            prop_assert_eq!(TraceParent::parse(sent.as_bytes()), Some(parent));
            prop_assert_eq!(oracle::traceparent(sent.as_bytes()), parent_as_text(Some(parent)));
        }
    }

    #[test]
    fn a_tracestate_is_what_the_oracle_says(fields in tracestate()) {
        let state = TraceState::parse(fields.iter().map(Vec::as_slice));
        let text = state.as_ref().map(|state| state.as_str().to_owned());
        prop_assert_eq!(&text, &oracle::tracestate(&fields));
        if let Some(state) = state {
            prop_assert_eq!(TraceState::parse([state.as_str().as_bytes()]), Some(state));
        }
    }

    #[test]
    fn a_b3_header_is_what_the_oracle_says(value in b3_single()) {
        prop_assert_eq!(b3_as_text(B3::parse(&value)), oracle::b3(&value));
    }

    #[test]
    fn the_b3_headers_are_what_the_oracle_says(values in b3_multi()) {
        let fields = MULTI.iter().zip(&values).flat_map(|(&name, values)| {
            values.iter().map(move |value| (name, value))
        });
        let first = values.each_ref().map(|values| values.first().map(Vec::as_slice));
        prop_assert_eq!(b3_as_text(B3::parse_multi(&headers(fields))), oracle::b3_multi(first));
    }

    #[test]
    fn a_request_id_is_what_the_oracle_says(values in vec(
        damaged((space(), mostly("[A-Za-z0-9._~+/=:@-]{1,130}"), space())
            .prop_map(|(a, b, c)| [a, b, c].concat()))
            .prop_filter("no header", |value| HeaderValue::from_bytes(value).is_ok()),
        0..3,
    )) {
        let context = continued(values.iter().map(|value| ("x-request-id", value)));
        let made = context.request_id().to_string();
        match oracle::request_id(&values) {
            Some(id) => prop_assert_eq!(made, id),
            None => prop_assert!(made.len() == 32 && made.bytes().all(|b| b.is_ascii_hexdigit())),
        }
    }

    #[test]
    fn no_bytes_can_make_a_parser_panic(bytes in vec(any::<u8>(), 0..600)) {
        prop_assert_eq!(parent_as_text(TraceParent::parse(&bytes)), oracle::traceparent(&bytes));
        prop_assert_eq!(b3_as_text(B3::parse(&bytes)), oracle::b3(&bytes));
        let state = TraceState::parse([&bytes[..]]).map(|state| state.to_string());
        prop_assert_eq!(state, oracle::tracestate(&[bytes]));
    }

    #[test]
    fn the_first_valid_format_counts(
        w3c in select(vec![None, Some(true), Some(false)]),
        single in select(vec![None, Some(true), Some(false)]),
        multi in select(vec![None, Some(true), Some(false)]),
    ) {
        let mut fields = Vec::new();
        let mut expected = None;
        let id = |digit: &str, valid: Option<bool>| {
            if valid == Some(true) { digit.repeat(32) } else { "0".repeat(32) }
        };
        if w3c.is_some() {
            fields.push(("traceparent", format!("00-{}-{SPAN}-01", id("a", w3c))));
        }
        if single.is_some() {
            fields.push(("b3", format!("{}-{SPAN}-1", id("b", single))));
        }
        if multi.is_some() {
            fields.push(("x-b3-traceid", id("c", multi)));
            fields.push(("x-b3-spanid", SPAN.into()));
        }
        for (digit, valid) in [("a", w3c), ("b", single), ("c", multi)] {
            if valid == Some(true) && expected.is_none() {
                expected = Some(digit.repeat(32));
            }
        }
        let context = continued(fields);
        prop_assert_eq!(context.parent_id().is_some(), expected.is_some());
        let trace_id = context.trace_id().to_string();
        if let Some(expected) = expected {
            prop_assert_eq!(trace_id, expected);
        } else {
            prop_assert_ne!(trace_id, "0".repeat(32));
        }
    }
}

/// Whether the property tests can fail: what they draw is neither all valid nor all invalid.
#[test]
fn the_strategies_draw_valid_and_invalid_values() {
    fn share<T>(strategy: impl Strategy<Value = T>, valid: impl Fn(T) -> bool) {
        use proptest::{strategy::ValueTree, test_runner::TestRunner};
        let mut runner = TestRunner::deterministic();
        let drawn = (0..1000).filter(|_| valid(strategy.new_tree(&mut runner).unwrap().current()));
        let share = drawn.count();
        assert!((100..=900).contains(&share), "{share} of 1000 are valid");
    }
    share(traceparent(), |value| oracle::traceparent(&value).is_some());
    share(tracestate(), |fields| oracle::tracestate(&fields).is_some());
    share(b3_single(), |value| oracle::b3(&value).is_some());
    share(b3_multi(), |values| {
        oracle::b3_multi(values.each_ref().map(|values| values.first().map(Vec::as_slice)))
            .is_some()
    });
}

fn parse(value: &str) -> Option<TraceParent> {
    TraceParent::parse(value.as_bytes())
}

/// H6, and the cases of W3C's own suite.
#[test]
fn versions_and_ids_of_a_traceparent() {
    for good in [
        format!("00-{TRACE}-{SPAN}-00"),
        format!("cc-{TRACE}-{SPAN}-01"),
        format!("cc-{TRACE}-{SPAN}-01-what-the-future-will-be-like"),
        format!("01-{TRACE}-{SPAN}-01-"),
        format!("\t {TRACE}").replace(TRACE, &format!("00-{TRACE}-{SPAN}-01 \t")),
    ] {
        let parent = parse(&good).expect(&good);
        assert_eq!(
            (parent.trace_id.to_string(), parent.parent_id.to_string()),
            (TRACE.into(), SPAN.into())
        );
    }
    for bad in [
        String::new(),
        "00".into(),
        format!("00-{TRACE}-{SPAN}-"),
        format!("00-{TRACE}-{SPAN}"),
        format!("00-{TRACE}-{SPAN}-1"),
        format!("00-{TRACE}-{SPAN}-001"),
        format!("00-{TRACE}-{SPAN}-01."),
        format!("00-{TRACE}-{SPAN}-01-what-the-future-will-be-like"),
        format!("00-{TRACE}-{SPAN}-0A"),
        format!("cc-{TRACE}-{SPAN}-01.what-the-future-will-be-like"),
        format!("ff-{TRACE}-{SPAN}-01"),
        format!("CC-{TRACE}-{SPAN}-01"),
        format!("0-{TRACE}-{SPAN}-01"),
        format!("000-{TRACE}-{SPAN}-01"),
        format!("00-{}-{SPAN}-01", TRACE.to_uppercase()),
        format!("00-{TRACE}-{}-01", SPAN.to_uppercase()),
        format!("00-{}-{SPAN}-01", "0".repeat(32)),
        format!("00-{TRACE}-{}-01", "0".repeat(16)),
        format!("00-{TRACE}a-{SPAN}-01"),
        format!("00-{TRACE}-{SPAN}a-01"),
        format!("00-{TRACE}-{SPAN}-01, 00-{TRACE}-{SPAN}-01"),
    ] {
        assert_eq!(parse(&bad), None, "{bad}");
    }
}

/// H7.
#[test]
fn flags_are_bits_and_unknown_ones_are_zeroed() {
    for flags in 0..=u8::MAX {
        let parent = parse(&format!("00-{TRACE}-{SPAN}-{flags:02x}")).unwrap();
        assert_eq!((parent.sampled, parent.random), (flags & 1 != 0, flags & 2 != 0));
        assert_eq!(parent.to_string(), format!("00-{TRACE}-{SPAN}-{:02x}", flags & 3));
    }
}

/// H8.
#[test]
fn the_random_flag_is_copied_and_never_invented() {
    for (flags, random) in [("00", false), ("01", false), ("02", true), ("ff", true)] {
        let context = continued([("traceparent", format!("00-{TRACE}-{SPAN}-{flags}"))]);
        assert_eq!(context.is_random(), random);
        assert_eq!(context.to_trace_parent().random, random);
    }
    let b3 = continued([("b3", format!("{TRACE}-{SPAN}-1"))]);
    assert!(!b3.is_random(), "nobody said so");
    assert!(TraceContext::start().is_random(), "of our own we know");
    let restarted = headers([("traceparent", format!("00-{TRACE}-{SPAN}-00"))]);
    assert!(TraceContext::extract(&restarted, Trust::Restart).is_random());
}

/// H2, H21.
#[test]
fn bytes_that_are_no_text_are_invalid_and_white_space_is_trimmed() {
    let mut value = format!("00-{TRACE}-{SPAN}-01").into_bytes();
    for at in 0..value.len() {
        for byte in [b'\t', 0x80, 0xff, b' ', b'\n'] {
            let old = std::mem::replace(&mut value[at], byte);
            assert_eq!(TraceParent::parse(&value), None, "{byte} at {at}");
            value[at] = old;
        }
    }
    let context = continued([
        ("traceparent", format!(" \t00-{TRACE}-{SPAN}-01\t ")),
        ("tracestate", " a=1 \t".into()),
        ("x-request-id", " \torder-7 ".into()),
    ]);
    assert_eq!(context.trace_id().to_string(), TRACE);
    assert_eq!(context.trace_state().as_str(), "a=1");
    assert_eq!(context.request_id().as_str(), "order-7");
}

/// H4: the length comes first.
#[test]
fn a_long_value_is_invalid_whatever_it_says() {
    let long = " ".repeat(300_000);
    assert_eq!(parse(&format!("00-{TRACE}-{SPAN}-01{long}")), None);
    assert_eq!(parse(&format!("cc-{TRACE}-{SPAN}-01-{}", "a".repeat(300_000))), None);
    assert_eq!(B3::parse(format!("{TRACE}-{SPAN}{long}").as_bytes()), None);
    assert_eq!(TraceState::parse([format!("a=1{long}").as_bytes()]), None);
    let context = continued([("x-request-id", format!("a{long}"))]);
    assert_eq!(context.request_id().as_str().len(), 32);
    // Longer than a value of version 00, and yet a traceparent.
    assert!(parse(&format!("cc-{TRACE}-{SPAN}-01-{}", "a".repeat(512 - 56))).is_some());
}

/// H5.
#[test]
fn what_comes_twice() {
    let traceparent = format!("00-{TRACE}-{SPAN}-01");
    let context = continued([("traceparent", &traceparent), ("traceparent", &traceparent)]);
    assert_ne!(context.trace_id().to_string(), TRACE);
    assert_eq!(context.parent_id(), None);

    let context = continued([
        ("traceparent", traceparent.as_str()),
        ("tracestate", "foo=1,bar=2"),
        ("tracestate", ""),
        ("tracestate", "baz=3"),
    ]);
    assert_eq!(context.trace_state().as_str(), "foo=1,bar=2,baz=3");

    let context = continued([("x-request-id", "one"), ("x-request-id", "one")]);
    assert_ne!(context.request_id().as_str(), "one");

    let context = continued([
        ("x-b3-traceid", TRACE),
        ("x-b3-spanid", SPAN),
        ("x-b3-traceid", "nonsense"),
        ("x-b3-sampled", "1"),
        ("x-b3-sampled", "0"),
    ]);
    assert_eq!(context.trace_id().to_string(), TRACE);
    assert!(context.is_sampled());
}

fn state(list: &str) -> Option<String> {
    TraceState::parse([list.as_bytes()]).map(|state| state.to_string())
}

/// H11, and the cases of W3C's own suite.
#[test]
fn the_entries_of_a_tracestate() {
    for (list, kept) in [
        ("", ""),
        (" ,\t,", ""),
        ("foo=1 \t , \t bar=2, \t baz=3", "foo=1,bar=2,baz=3"),
        ("foo=1,foo=2", "foo=1,foo=2"),
        ("foo@=1,foo@bar@baz=2", "foo@=1,foo@bar@baz=2"),
        ("foo=  a  b  ", "foo=  a  b"),
        ("0=~!\"#", "0=~!\"#"),
    ] {
        assert_eq!(state(list).as_deref(), Some(kept), "{list:?}");
    }
    for bad in [
        "foo =1",
        "FOO=1",
        "foo.bar=1",
        "@foo=1,bar=2",
        "foo=bar=baz",
        "foo=,bar=3",
        "foo",
        "=1",
        "_a=1",
        "a=\tb",
        "a=ü",
    ] {
        assert_eq!(state(bad), None, "{bad:?}");
    }
    for (key, value, valid) in [(256, 256, true), (257, 1, false), (1, 257, false)] {
        let list = format!("{}={}", "k".repeat(key), "v".repeat(value));
        assert_eq!(state(&list), valid.then_some(list));
    }
    let longest = |between: &str| {
        let entry = |n| format!("{}{n:02}={}", "k".repeat(254), "v".repeat(256));
        let list: Vec<_> = (0..32).map(entry).collect();
        format!("{}{}", &between[1..], list.join(between))
    };
    for between in [",", ", ", " , "] {
        assert!(state(&longest(between)).is_some(), "{between:?}");
    }
    assert_eq!(state(&longest("  ,  ")), None);
    let entries = |count: usize| vec!["a=1"; count].join(",");
    assert_eq!(state(&entries(32)), Some(entries(32)));
    assert_eq!(state(&entries(33)), None);

    let state = TraceState::parse([&b"rojo=1"[..], b"congo=2,rojo=3"]).unwrap();
    assert_eq!(
        (state.get("rojo"), state.get("congo"), state.get("ro")),
        (Some("1"), Some("2"), None)
    );
}

/// H11.
#[test]
fn a_long_tracestate_loses_whole_entries_large_ones_first() {
    let entry = |key: &str, len: usize| format!("{key}={}", "v".repeat(len - key.len() - 1));
    // 512 bytes are always kept.
    let list = [entry("a", 200), entry("b", 128), entry("c", 182)].join(",");
    assert_eq!((list.len(), state(&list)), (512, Some(list)));

    let small: Vec<_> = (0..10).map(|i| entry(&format!("s{i}"), 100)).collect();
    let list = [&[entry("large", 129)][..], &small].concat().join(",");
    assert_eq!(state(&list), Some(small.join(",")), "the large one goes, though it is first");

    let exact: Vec<_> = (0..9).map(|i| entry(&format!("x{i}"), 128)).collect();
    assert_eq!(state(&exact.join(",")), Some(exact[..7].join(",")), "of small ones the last");

    let large: Vec<_> = (0..5).map(|i| entry(&format!("l{i}"), 250)).collect();
    assert_eq!(state(&large.join(",")), Some(large[..4].join(",")), "of large ones too");
}

/// H12, H13.
#[test]
fn a_tracestate_goes_with_its_traceparent_and_not_the_other_way_round() {
    let traceparent = format!("00-{TRACE}-{SPAN}-01");
    assert!(continued([("tracestate", "a=1")]).trace_state().is_empty());
    let invalid = continued([("traceparent", "00-0-0-00"), ("tracestate", "a=1")]);
    assert!(invalid.trace_state().is_empty());
    let b3 = format!("{TRACE}-{SPAN}-1");
    let of_b3 = continued([("b3", b3.as_str()), ("tracestate", "a=1")]);
    assert_eq!((of_b3.trace_id().to_string().as_str(), of_b3.trace_state().as_str()), (TRACE, ""));

    let context = continued([("traceparent", traceparent.as_str()), ("tracestate", "A=1")]);
    assert_eq!(context.trace_id().to_string(), TRACE);
    assert!(context.trace_state().is_empty());

    let headers = headers([("traceparent", traceparent.as_str()), ("tracestate", "a=1")]);
    let restarted = TraceContext::extract(&headers, Trust::Restart);
    assert!(restarted.trace_state().is_empty(), "section 3.4, \"Restart trace\"");
    assert_eq!(TraceContext::extract(&headers, Trust::Resample).trace_state().as_str(), "a=1");
}

/// H14.
#[test]
fn b3_decisions_and_short_ids() {
    let context = continued([("b3", format!("{SPAN}-{SPAN}-d"))]);
    assert_eq!(context.trace_id().to_string(), format!("{SPAN:0>32}"));
    assert!(context.is_sampled() && context.is_debug() && !context.is_random());

    for (b3, sampled, debug) in [("0", false, false), ("1", true, false), ("d", true, true)] {
        let context = continued([("b3", b3)]);
        assert_eq!((context.is_sampled(), context.is_debug()), (sampled, debug));
        assert_eq!(context.parent_id(), None);
        assert!(context.is_random(), "the trace is new");
    }

    let multi = [("x-b3-traceid", TRACE), ("x-b3-spanid", SPAN)];
    let single = format!("{}-{SPAN}-0", "b".repeat(32));
    let both = continued(multi.iter().copied().chain([("b3", single.as_str())]));
    assert_eq!(both.trace_id().to_string(), "b".repeat(32), "single over multi");
    let flags =
        continued(multi.iter().copied().chain([("x-b3-sampled", "0"), ("x-b3-flags", "1")]));
    assert!(flags.is_sampled() && flags.is_debug(), "debug implies it");
    let malformed = continued(multi.iter().copied().chain([("x-b3-parentspanid", "-")]));
    assert_ne!(malformed.trace_id().to_string(), TRACE);

    let b3 = B3::parse(format!("{TRACE}-{SPAN}-1-{}", "0".repeat(16)).as_bytes()).unwrap();
    assert_eq!((b3.parent_id, b3.sampling), (None, Some(Sampling::Accept)));
}

/// H10: the edge.
#[test]
fn a_stranger_decides_nothing() {
    for fields in [
        vec![("traceparent", format!("00-{TRACE}-{SPAN}-03"))],
        vec![("b3", format!("{TRACE}-{SPAN}-d"))],
        vec![("b3", "d".into())],
    ] {
        let ids = fields[0].1.len() > 1;
        let context = TraceContext::extract(&headers(fields), Trust::Restart);
        assert_ne!(context.trace_id().to_string(), TRACE);
        assert_eq!(context.parent_id(), None);
        assert!(!context.is_sampled() && !context.is_debug());
        assert_eq!(context.link().map(|link| link.trace_id.to_string()), ids.then(|| TRACE.into()));
    }
    let sampled = headers([("traceparent", format!("00-{TRACE}-{SPAN}-01"))]);
    let resampled = TraceContext::extract(&sampled, Trust::Resample);
    assert_eq!(resampled.trace_id().to_string(), TRACE);
    assert!(!resampled.is_sampled());
}

/// H9: each low nibble of this many ids, by chi-square with 15 degrees of freedom; the bound is
/// that of p = 1e-6 for one of 28 nibbles.
fn assert_ids_are_uniform(count: u32) {
    let mut counts = vec![[0_u32; 16]; 28];
    let mut ids = Vec::new();
    let mut spans = Vec::new();
    for _ in 0..count {
        let context = TraceContext::start();
        let (trace, span): (TraceId, SpanId) = (context.trace_id(), context.span_id());
        for (i, byte) in trace.to_bytes()[9..].iter().enumerate() {
            counts[2 * i][usize::from(byte >> 4)] += 1;
            counts[2 * i + 1][usize::from(byte & 0xf)] += 1;
        }
        for (i, byte) in span.to_bytes()[1..].iter().enumerate() {
            counts[14 + 2 * i][usize::from(byte >> 4)] += 1;
            counts[14 + 2 * i + 1][usize::from(byte & 0xf)] += 1;
        }
        ids.push(trace);
        spans.push(span);
    }
    for (nibble, counts) in counts.iter().enumerate() {
        let expected = f64::from(count) / 16.0;
        let chi = counts.iter().map(|&n| (f64::from(n) - expected).powi(2) / expected).sum::<f64>();
        assert!(chi < 60.0, "nibble {nibble}: {chi}");
    }
    ids.sort_unstable();
    assert!(ids.windows(2).all(|two| two[0] != two[1]));
    spans.sort_unstable();
    assert!(spans.windows(2).all(|two| two[0] != two[1]));
}

#[test]
fn ids_are_uniform_and_differ() {
    assert_ids_are_uniform(50_000);
}

#[test]
#[ignore = "a minute in release: CONTRIBUTING names it"]
fn ten_million_ids_are_uniform_and_differ() {
    assert_ids_are_uniform(10_000_000);
}

#[test]
fn ids_differ_between_threads() {
    let threads: Vec<_> = (0..4)
        .map(|_| {
            std::thread::spawn(|| {
                (0..1000).map(|_| TraceContext::start().trace_id()).collect::<Vec<_>>()
            })
        })
        .collect();
    let mut ids: Vec<_> = threads.into_iter().flat_map(|thread| thread.join().unwrap()).collect();
    ids.sort_unstable();
    assert!(ids.windows(2).all(|two| two[0] != two[1]));
}

/// The child is this test again, in a process of its own.
#[test]
fn ids_differ_between_processes() {
    const CHILD: &str = "TOWER_TRACE_ID_CHILD";
    let ids = || (0..100).map(|_| TraceContext::start().trace_id().to_string());
    if std::env::var_os(CHILD).is_some() {
        for id in ids() {
            println!("id={id}");
        }
        return;
    }
    let child = || {
        let mut command = std::process::Command::new(std::env::current_exe().unwrap());
        command.args(["--exact", "ids_differ_between_processes", "--nocapture"]).env(CHILD, "1");
        let output = String::from_utf8(command.output().unwrap().stdout).unwrap();
        let ids =
            output.lines().filter_map(|line| line.split_once("id=")).map(|(_, id)| id.to_owned());
        ids.collect::<Vec<_>>()
    };
    let mut all = [child(), child(), ids().collect()].concat();
    assert_eq!(all.len(), 300);
    all.sort_unstable();
    all.dedup();
    assert_eq!(all.len(), 300);
}
