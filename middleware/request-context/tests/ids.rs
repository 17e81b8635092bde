#![allow(missing_docs, clippy::unwrap_used)] // Tests.

use std::{cell::RefCell, sync::mpsc, thread};

use allocation_counter::measure;
use http::HeaderValue;
use proptest::{prelude::*, sample::Index};
use tower_request_context::{ParseIdError, RequestId, SpanId, TraceId};

/// Slow, and says what it means: W3C Trace Context Level 2, section 3.2.2.
fn bytes_of(digits: &[u8], len: usize) -> Option<Vec<u8>> {
    let text = std::str::from_utf8(digits).ok()?;
    if text.chars().count() != 2 * len {
        return None;
    }
    let mut values = Vec::new();
    for char in text.chars() {
        values.push("0123456789abcdef".chars().position(|digit| digit == char)?);
    }
    let bytes: Vec<u8> =
        values.chunks(2).map(|pair| u8::try_from(16 * pair[0] + pair[1]).unwrap()).collect();
    bytes.iter().any(|byte| *byte != 0).then_some(bytes)
}

#[derive(Clone, Debug)]
enum Change {
    Nothing,
    Byte(Index, u8),
    Insert(Index, u8),
    Remove(Index),
    UpperCase,
    Zeros,
}

/// The digits of an id, mostly with one thing wrong.
fn nearly_digits(len: usize) -> impl Strategy<Value = Vec<u8>> {
    let change = prop_oneof![
        Just(Change::Nothing),
        any::<(Index, u8)>().prop_map(|(at, byte)| Change::Byte(at, byte)),
        any::<(Index, u8)>().prop_map(|(at, byte)| Change::Insert(at, byte)),
        any::<Index>().prop_map(Change::Remove),
        Just(Change::UpperCase),
        Just(Change::Zeros),
    ];
    let digits = prop::collection::vec(prop::sample::select(&b"0123456789abcdef"[..]), len);
    let changed = (digits, change).prop_map(|(mut digits, change)| {
        match change {
            Change::Nothing => {}
            Change::Byte(at, byte) => *at.get_mut(&mut digits) = byte,
            Change::Insert(at, byte) => digits.insert(at.index(digits.len() + 1), byte),
            Change::Remove(at) => {
                digits.remove(at.index(digits.len()));
            }
            Change::UpperCase => digits.make_ascii_uppercase(),
            Change::Zeros => digits.fill(b'0'),
        }
        digits
    });
    prop_oneof![9 => changed, 1 => any::<Vec<u8>>()]
}

proptest! {
    #[test]
    fn a_trace_id_is_read_as_the_oracle_reads_it(digits in nearly_digits(32)) {
        let id = TraceId::from_hex(&digits);
        prop_assert_eq!(id.map(|id| id.to_bytes().to_vec()), bytes_of(&digits, 16));
        if let Ok(text) = std::str::from_utf8(&digits) {
            prop_assert_eq!(text.parse::<TraceId>().ok(), id);
        }
        if let Some(id) = id {
            prop_assert_eq!(id.to_string().into_bytes(), digits);
            prop_assert_eq!(TraceId::from_bytes(id.to_bytes()), Some(id));
        }
    }

    #[test]
    fn a_span_id_is_read_as_the_oracle_reads_it(digits in nearly_digits(16)) {
        let id = SpanId::from_hex(&digits);
        prop_assert_eq!(id.map(|id| id.to_bytes().to_vec()), bytes_of(&digits, 8));
        if let Ok(text) = std::str::from_utf8(&digits) {
            prop_assert_eq!(text.parse::<SpanId>().ok(), id);
        }
        if let Some(id) = id {
            prop_assert_eq!(id.to_string().into_bytes(), digits);
            prop_assert_eq!(SpanId::from_bytes(id.to_bytes()), Some(id));
        }
    }

    #[test]
    fn ids_of_any_bytes_are_read_as_they_are_written(trace: [u8; 16], span: [u8; 8]) {
        let trace_id = TraceId::from_bytes(trace).unwrap();
        prop_assert_eq!(trace_id.to_bytes(), trace);
        prop_assert_eq!(trace_id.to_string().parse(), Ok(trace_id));
        let span_id = SpanId::from_bytes(span).unwrap();
        prop_assert_eq!(span_id.to_bytes(), span);
        prop_assert_eq!(span_id.to_string().parse(), Ok(span_id));
    }

    #[test]
    fn ids_are_ordered_as_their_text_is(one: [u8; 16], other: [u8; 16]) {
        let ids = [one, other].map(|bytes| TraceId::from_bytes(bytes).unwrap());
        let texts = ids.map(|id| id.to_string());
        prop_assert_eq!(ids[0].cmp(&ids[1]), texts[0].cmp(&texts[1]));
    }
}

#[test]
fn digits_are_lower_case_without_a_sign_and_of_one_length() {
    let id = "0af7651916cd43dd8448eb211c80319c";
    assert_eq!(id.parse::<TraceId>().unwrap().to_string(), id);
    for wrong in [
        "0AF7651916CD43DD8448EB211C80319C",
        "+af7651916cd43dd8448eb211c80319c",
        "-af7651916cd43dd8448eb211c80319c",
        " af7651916cd43dd8448eb211c80319c",
        "0xf7651916cd43dd8448eb211c80319c",
        "0af7651916cd43dd8448eb211c80319",
        "0af7651916cd43dd8448eb211c80319c0",
        "af7651916cd43dd8448eb211c80319é",
        "00000000000000000000000000000000",
        "",
    ] {
        assert!(wrong.parse::<TraceId>().is_err(), "{wrong}");
    }
    assert_eq!("00f067aa0ba902b7".parse::<SpanId>().unwrap().to_bytes()[1], 0xf0);
    for wrong in ["0000000000000000", "00F067AA0BA902B7", "+0f067aa0ba902b7", "0f067aa0ba902b"] {
        assert!(wrong.parse::<SpanId>().is_err(), "{wrong}");
    }
    assert_eq!(TraceId::from_bytes([0; 16]), None);
    assert_eq!(SpanId::from_bytes([0; 8]), None);
}

const SAFE: &str = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789._~+/=:@-";

fn is_request_id(bytes: &[u8]) -> bool {
    let chars: Vec<char> = bytes.iter().copied().map(char::from).collect();
    !chars.is_empty() && chars.len() < 129 && chars.iter().all(|char| SAFE.contains(*char))
}

/// The bytes of a header's value, many of them a request id or nearly one.
fn nearly_request_id() -> impl Strategy<Value = Vec<u8>> {
    let safe = prop::collection::vec(prop::sample::select(SAFE.as_bytes()), 0..=131);
    let byte = prop_oneof![Just(b'\t'), b' '..=b'~', 0x80..=0xff_u8];
    let with = (safe.clone(), any::<Index>(), byte.clone()).prop_map(|(mut id, at, byte)| {
        id.insert(at.index(id.len() + 1), byte);
        id
    });
    prop_oneof![safe, with, prop::collection::vec(byte, 0..140)]
}

proptest! {
    #[test]
    fn a_request_id_is_taken_as_the_oracle_takes_it(bytes in nearly_request_id()) {
        let mut value = HeaderValue::from_bytes(&bytes).unwrap();
        value.set_sensitive(true);
        let id = RequestId::from_bytes(value.as_bytes());
        prop_assert_eq!(id.is_some(), is_request_id(&bytes));
        if let Ok(text) = std::str::from_utf8(&bytes) {
            prop_assert_eq!(text.parse::<RequestId>().ok(), id.clone());
        }
        if let Some(id) = id {
            prop_assert_eq!(id.as_str().as_bytes(), &bytes[..]);
            prop_assert_eq!(id.to_header(), value);
            prop_assert_eq!(id.to_string().parse(), Ok(id));
        }
    }

    #[test]
    fn any_text_is_a_request_id_or_an_error(text: String) {
        prop_assert_eq!(text.parse::<RequestId>().is_ok(), is_request_id(text.as_bytes()));
    }
}

#[test]
fn a_request_id_has_1_to_128_safe_characters() {
    let longest = "x".repeat(128);
    for right in ["0", SAFE, &longest] {
        assert_eq!(right.parse::<RequestId>().unwrap().as_str(), right);
    }
    let too_long = "x".repeat(129);
    let huge = "x".repeat(300 << 10);
    for wrong in ["", " ", "a b", "a\tb", "a\nb", "a\"b", "a,b", "a%b", "naïve", &too_long, &huge]
    {
        assert!(wrong.parse::<RequestId>().is_err(), "{wrong:.140}");
        if let Ok(value) = HeaderValue::from_str(wrong) {
            assert_eq!(RequestId::from_bytes(value.as_bytes()), None, "{wrong:.140}");
        }
    }
    for byte in (0x80..=0xff).chain([b'\t']) {
        let value = HeaderValue::from_bytes(&[b'a', byte]).unwrap();
        assert_eq!(RequestId::from_bytes(value.as_bytes()), None, "{byte:#x}");
    }
}

#[test]
fn a_request_id_is_no_secret_whatever_its_header_was() {
    let mut value = HeaderValue::from_static("order-7");
    value.set_sensitive(true);
    let id = RequestId::from_bytes(value.as_bytes()).unwrap();
    assert!(!id.to_header().is_sensitive());
    assert!(value.is_sensitive(), "the header is as it was");
    assert_eq!(format!("{id} {id:?}"), "order-7 RequestId(order-7)");
}

#[test]
fn ids_in_headers_stay_as_they_are_whatever_is_written_after_them() {
    let id = |i: u64| {
        let trace = TraceId::from_bytes((u128::from(i) + 1).to_be_bytes()).unwrap();
        let len = usize::try_from(i).unwrap() % 128 + 1;
        (trace, RequestId::from_bytes(&format!("{i:0>len$}").as_bytes()[..len]).unwrap())
    };
    let headers = move |i| {
        let (trace, request) = id(i);
        (trace.to_header(), request.to_header())
    };
    let kept: Vec<_> = (0..1_000).map(headers).collect();
    for (i, values) in (0..).zip(&kept) {
        let (trace, request) = id(i);
        assert_eq!(values.0, trace.to_string());
        assert_eq!(values.1, request.as_str());
    }
    // On another thread, whose end takes the buffer away, they are the same.
    let last = thread::spawn(move || headers(7)).join().unwrap();
    assert_eq!(last, kept[7]);
}

#[test]
fn ids_in_heads_one_after_another_cost_no_allocation() {
    let trace = TraceId::from_bytes([0xab; 16]).unwrap();
    let head = |len| {
        let id = RequestId::from_bytes(&[b'a'; 128][..len]).unwrap();
        (id.to_header(), trace.to_header())
    };
    drop(head(1));
    let lens = (1..=128).chain([32; 100]);
    assert_eq!(measure(|| lens.for_each(|len| drop(head(len)))).count_total, 0);
}

/// As an HTTP/2 connection with few requests keeps those of its last heads, among others with many.
#[test]
fn an_id_in_a_header_that_is_kept_keeps_little_else() {
    let id: RequestId = "0123456789abcdef0123456789abcdef".parse().unwrap();
    let mut kept = Vec::with_capacity(50);
    let costs = measure(|| {
        for n in 0..2_000 {
            let value = id.to_header();
            if n % 40 == 0 {
                kept.push(value);
            }
        }
    });
    assert!(costs.bytes_current <= 50 * 320, "{}", costs.bytes_current);
}

/// A value that is written while the thread ends, when there may be no buffer any more.
#[test]
fn an_id_is_a_header_too_when_its_thread_ends() {
    struct AtEnd(mpsc::Sender<HeaderValue>);
    impl Drop for AtEnd {
        fn drop(&mut self) {
            self.0.send("order-7".parse::<RequestId>().unwrap().to_header()).unwrap();
        }
    }
    thread_local!(static AT_END: RefCell<Option<AtEnd>> = const { RefCell::new(None) });
    for before in [false, true] {
        let (send, receive) = mpsc::channel();
        let thread = thread::spawn(move || {
            // What is made first is dropped last, or first.
            let warm = || drop("order-6".parse::<RequestId>().unwrap().to_header());
            if before {
                warm();
            }
            AT_END.set(Some(AtEnd(send)));
            warm();
        });
        thread.join().unwrap();
        assert_eq!(receive.recv().unwrap(), "order-7");
    }
}

#[test]
fn ids_are_told_as_text_and_what_is_none_is_not_told() {
    let trace = TraceId::from_bytes([0xab; 16]).unwrap();
    let span = SpanId::from_bytes([0, 0, 0, 0, 0, 0, 0, 1]).unwrap();
    assert_eq!(format!("{trace:?}"), format!("TraceId({})", "ab".repeat(16)));
    assert_eq!(format!("{span:?}"), "SpanId(0000000000000001)");

    let hostile = "\u{1b}[31m";
    let errors: [ParseIdError; 3] = [
        hostile.parse::<TraceId>().unwrap_err(),
        hostile.parse::<SpanId>().unwrap_err(),
        hostile.parse::<RequestId>().unwrap_err(),
    ];
    for error in errors {
        assert_eq!(error.to_string(), "not a valid id");
        assert!(!format!("{error:?}").contains("[31m"));
    }
}
