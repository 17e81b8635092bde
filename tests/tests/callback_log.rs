//! What is logged of callbacks that panic: so much for each layer, and not for the process.

#![allow(clippy::unwrap_used)]

use std::{
    convert::Infallible,
    fmt,
    panic::resume_unwind,
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

use bytes::Bytes;
use futures_util::FutureExt;
use http::{Request, Response, Uri, request::Parts};
use http_body_util::Empty;
use tower::{Layer, Service, service_fn, util::BoxCloneSyncService};
use tower_tasks::{
    End, PropagateLayer, ResponseEndLayer, Shutdown, TraceContext, TraceIdLayer, trace_id::Trust,
};
use tracing::{
    Event, Span, Subscriber,
    field::{Field, Visit},
};
use tracing_subscriber::layer::{self, SubscriberExt};

type Inner = BoxCloneSyncService<Request<()>, Response<Empty<Bytes>>, Infallible>;

/// Makes a layer with a callback that panics, and serves a request with it.
type Make = fn() -> Box<dyn Fn()>;

const CALLBACKS: [(&str, Make); 6] = [
    ("on_end", || requests(ResponseEndLayer::new(|_: &Request<()>| |_: End| throw()))),
    ("make_on_end", || {
        requests(ResponseEndLayer::new(|_: &Request<()>| -> fn(End) { throw() }).plain())
    }),
    ("trust", || requests(TraceIdLayer::new().trust(|_: &Request<()>| -> Trust { throw() }))),
    ("on_span", || requests(TraceIdLayer::new().on_span(|_: &Span, _: &TraceContext| throw()))),
    ("allow", || requests(PropagateLayer::new().only(|_: &Uri| throw()))),
    ("route", || {
        let shutdown = Shutdown::new(Duration::from_secs(1));
        requests(shutdown.layer().route(|_: &Parts| throw()))
    }),
];

/// Panics without a word to the panic hook.
fn throw() -> ! {
    resume_unwind(Box::new("a user's callback"))
}

/// Each through a clone, as under axum.
fn requests<L>(layer: L) -> Box<dyn Fn()>
where
    L: Layer<Inner> + Clone + 'static,
    L::Service: Service<Request<()>, Error: fmt::Debug>,
{
    let inner = Inner::new(service_fn(async |_| Ok(Response::new(Empty::new()))));
    Box::new(move || {
        let call = layer.clone().layer(inner.clone()).call(Request::new(()));
        drop(call.now_or_never().unwrap().unwrap());
    })
}

/// Of each event how many panics were left out before it.
#[derive(Clone, Default)]
struct Told(Arc<Mutex<Vec<u64>>>);

impl Told {
    fn during(&self, f: impl FnOnce()) {
        tracing::subscriber::with_default(tracing_subscriber::registry().with(self.clone()), f);
    }

    fn events(&self) -> Vec<u64> {
        self.0.lock().unwrap().clone()
    }
}

impl<S: Subscriber> layer::Layer<S> for Told {
    fn on_event(&self, event: &Event<'_>, _: layer::Context<'_, S>) {
        struct Suppressed(u64);

        impl Visit for Suppressed {
            fn record_u64(&mut self, field: &Field, value: u64) {
                if field.name() == "suppressed" {
                    self.0 = value;
                }
            }
            fn record_debug(&mut self, _: &Field, _: &dyn fmt::Debug) {}
        }

        let mut suppressed = Suppressed(0);
        event.record(&mut suppressed);
        self.0.lock().unwrap().push(suppressed.0);
    }
}

#[test]
fn a_layer_whose_callback_panics_takes_no_event_from_another() {
    for (callback, make) in CALLBACKS {
        // Of the same kind: the second comes when the first may tell nothing more.
        for serve in [make(), make()] {
            let (told, start) = (Told::default(), Instant::now());
            told.during(|| (0..50).for_each(|_| serve()));
            let (told, seconds) = (told.events().len(), start.elapsed().as_secs());
            let most = usize::try_from(20 * (seconds + 1)).unwrap();
            assert!((20..=most).contains(&told), "{told} of {callback} in {seconds} s");
        }
    }
}

#[test]
fn an_event_says_how_many_of_its_layer_were_left_out_before() {
    let (_, make) = CALLBACKS[0];
    let (serve, told) = (make(), Told::default());
    let mut served = 0;
    // Until the next second has begun.
    told.during(|| {
        while told.events().iter().all(|left_out| *left_out == 0) {
            serve();
            served += 1;
        }
    });
    let events = told.events();
    let told = u64::try_from(events.len()).unwrap();
    assert!(told > 20, "{told}");
    assert_eq!(served, told + events.iter().sum::<u64>());
}
