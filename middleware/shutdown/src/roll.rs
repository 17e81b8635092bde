use std::{
    borrow::Cow,
    fmt::{self, Write},
    mem,
    sync::{
        Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU16, Ordering::Relaxed},
    },
    time::Duration,
};

use http::{Method, uri::PathAndQuery};
use tokio::time::Instant;
use tower_request_context::TraceId;
use tower_task_set::Outcome;

use crate::{
    Forced, Kind,
    in_flight::{InFlight, Reading},
};

/// The requests in flight, each with what a report would say of it: one that never yields cannot
/// be asked when that is wanted.
#[derive(Debug, Default)]
pub(crate) struct Roll {
    /// How many there are. Written under a shard's lock, so that who has all of them finds as many
    /// as this says.
    pub(crate) requests: InFlight,
    shards: [Shard; SHARDS as usize],
}

/// One lock would be taken by every request twice.
const SHARDS: u16 = 8;

/// Apart by a cache line or two.
#[derive(Debug, Default)]
#[repr(align(128))]
struct Shard(Mutex<Entries>);

#[derive(Debug, Default)]
struct Entries {
    slots: Vec<Slot>,
    /// The first free one.
    free: Option<u32>,
    /// Those that were ended, how old they were, and how.
    ended: Vec<(Request, Duration, Outcome)>,
}

#[derive(Debug)]
enum Slot {
    Free { next: Option<u32> },
    Taken(Request),
}

/// Where a request stands in the roll.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Place {
    shard: u16,
    slot: u32,
}

impl Roll {
    /// Where the request stands, if it is admitted; it must [leave](Self::leave) then.
    pub(crate) fn enter(&self, request: Request) -> Option<Place> {
        let shard = this_shard();
        let mut entries = self.lock(shard);
        let admitted = self.requests.enter().then(|| Place { shard, slot: entries.next() });
        // Without the request, which is dropped outside of the lock.
        let Some(place) = admitted else {
            drop(entries);
            return None;
        };
        entries.put(place.slot, Slot::Taken(request));
        Some(place)
    }

    /// The request is over; and how, if the shutdown has ended it.
    pub(crate) fn leave(&self, place: Place, ended: Option<Outcome>) {
        let mut entries = self.lock(place.shard);
        let mut request = entries.take(place.slot);
        if let Some(outcome) = ended {
            let ended = request.take().map(|request| (request.started.elapsed(), request));
            entries.ended.extend(ended.map(|(age, request)| (request, age, outcome)));
        }
        let is_last = self.requests.leave_silently();
        drop(entries);
        if is_last {
            self.requests.tell();
        }
    }

    /// The figures, those that were ended, and those in flight: all of one moment.
    pub(crate) fn read(&self) -> (Reading, Vec<Forced>, Vec<Forced>) {
        let shards: Vec<_> = (0..SHARDS).map(|shard| self.lock(shard)).collect();
        let reading = self.requests.read();
        let ended: Vec<_> = shards.iter().flat_map(|entries| &entries.ended).cloned().collect();
        let taken = |slot: &Slot| match slot {
            Slot::Taken(request) => Some(request.clone()),
            Slot::Free { .. } => None,
        };
        let slots = shards.iter().flat_map(|entries| &entries.slots);
        let left: Vec<_> = slots.filter_map(taken).collect();
        drop(shards);
        let ended =
            ended.into_iter().map(|(request, age, outcome)| request.forced(age, Some(outcome)));
        let left = left.into_iter().map(|request| request.forced(request.started.elapsed(), None));
        (reading, ended.collect(), left.collect())
    }

    fn lock(&self, shard: u16) -> MutexGuard<'_, Entries> {
        self.shards[usize::from(shard)].0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Entries {
    /// A free slot, which is to be [put](Self::put) something into.
    fn next(&mut self) -> u32 {
        // There are no 4 billion requests.
        self.free.unwrap_or_else(|| u32::try_from(self.slots.len()).unwrap_or(u32::MAX))
    }

    fn put(&mut self, slot: u32, taken: Slot) {
        match self.slots.get_mut(slot as usize) {
            None => self.slots.push(taken),
            Some(free) => {
                if let Slot::Free { next } = mem::replace(free, taken) {
                    self.free = next;
                }
            }
        }
    }

    fn take(&mut self, slot: u32) -> Option<Request> {
        let taken = self.slots.get_mut(slot as usize)?;
        match mem::replace(taken, Slot::Free { next: self.free.replace(slot) }) {
            Slot::Taken(request) => Some(request),
            Slot::Free { .. } => None,
        }
    }
}

/// By thread, so that threads meet at different locks.
fn this_shard() -> u16 {
    static NEXT: AtomicU16 = AtomicU16::new(0);
    thread_local! {
        static SHARD: u16 = NEXT.fetch_add(1, Relaxed) % SHARDS;
    }
    SHARD.try_with(|shard| *shard).unwrap_or(0)
}

/// What is known of a request.
#[derive(Clone, Debug)]
pub(crate) struct Request {
    pub(crate) name: Name,
    pub(crate) started: Instant,
    pub(crate) trace_id: Option<TraceId>,
}

impl Request {
    fn forced(&self, age: Duration, outcome: Option<Outcome>) -> Forced {
        Forced {
            what: Kind::Request,
            name: self.name.to_string().into(),
            site: None,
            age,
            trace_id: self.trace_id,
            outcome,
        }
    }
}

/// What a request is reported by. What a stranger may have written is left out, or is of few
/// characters and not many of them.
#[derive(Clone, Debug)]
pub(crate) enum Name {
    /// The call of a plain service.
    Call,
    /// The method is a [short](tower_catch_unwind::short_method) one.
    Http(Method, Route),
}

/// A path may hold what nobody should read: only what a route is called is told.
#[derive(Clone, Debug)]
pub(crate) enum Route {
    Unknown,
    Named(Cow<'static, str>),
    /// The path of a gRPC request, which names its method if it is well-formed. Nothing is copied:
    /// it is a reference into what the server has read.
    Grpc(PathAndQuery),
}

impl fmt::Display for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        /// Of a route; longer ones have no end.
        const MAX: usize = 256;
        let Self::Http(method, route) = self else { return f.write_str("call") };
        f.write_str(method.as_str())?;
        let route = match route {
            Route::Named(name) => name,
            Route::Grpc(path) if is_grpc_method(path.path(), MAX) => path.path(),
            Route::Grpc(_) | Route::Unknown => return Ok(()),
        };
        f.write_char(' ')?;
        route.chars().flat_map(char::escape_debug).take(MAX).try_for_each(|char| f.write_char(char))
    }
}

/// gRPC over HTTP/2, "Requests": `Path` is `/`, the service's name, `/` and the method's, which are
/// names of protocol buffers by all that is usual.
fn is_grpc_method(path: &str, max: usize) -> bool {
    let is_name = |name: &str, extra: &[u8]| {
        !name.is_empty()
            && name.bytes().all(|byte| byte.is_ascii_alphanumeric() || extra.contains(&byte))
    };
    path.len() <= max
        && path
            .strip_prefix('/')
            .and_then(|path| path.split_once('/'))
            .is_some_and(|(service, method)| is_name(service, b"_.") && is_name(method, b"_"))
}

#[cfg(all(test, not(loom)))]
mod tests {
    use tower_catch_unwind::short_method;

    use super::*;

    fn name(method: &str, route: Route) -> String {
        let method = method.parse().expect("it is a token");
        Name::Http(short_method(&method), route).to_string()
    }

    fn grpc(path: &str) -> String {
        name("POST", Route::Grpc(path.parse().expect("it is a path")))
    }

    #[test]
    fn a_name_has_no_byte_of_a_stranger_but_such_as_name_a_method() {
        assert_eq!(name("GET", Route::Unknown), "GET");
        assert_eq!(name(&"M".repeat(300_000), Route::Unknown), "OTHER");
        assert_eq!(Name::Call.to_string(), "call");
        for path in ["/orders.v1.Orders/Watch", "/Orders/watch_all"] {
            assert_eq!(grpc(path), format!("POST {path}"));
            assert_eq!(grpc(&format!("{path}?secret=1")), format!("POST {path}"));
        }
        let long = format!("/{}/Watch", "x".repeat(250));
        for path in ["/", "//", "/a/", "//b", "/a/b/c", "/a/b.c", "/a%20b/c", "/a~/b", "*", &long] {
            assert_eq!(grpc(path), "POST", "{path}");
        }
    }

    #[test]
    fn a_name_that_the_user_gave_is_short_and_escaped() {
        let given = name("GET", Route::Named("/orders/{id}\n\u{1b}[31m".into()));
        assert_eq!(given, r"GET /orders/{id}\n\u{1b}[31m");
        let long = name("GET", Route::Named("é".repeat(9999).into()));
        assert_eq!(long, format!("GET {}", "é".repeat(256)));
    }

    #[test]
    fn a_slot_is_used_again_and_the_roll_is_no_longer_than_it_ever_was() {
        let roll = Roll::default();
        let enter = || {
            let request = Request { name: Name::Call, started: Instant::now(), trace_id: None };
            roll.enter(request).expect("it is open")
        };
        for _ in 0..3 {
            let places = [enter(), enter(), enter()];
            assert_eq!(roll.read().2.len(), 3);
            roll.leave(places[1], None);
            roll.leave(places[0], Some(Outcome::Cancelled));
            let again = enter();
            assert_eq!(again.slot, places[0].slot);
            roll.leave(again, None);
            roll.leave(places[2], None);
        }
        let (reading, ended, left) = roll.read();
        assert_eq!((reading.in_flight, ended.len(), left.len()), (0, 3, 0));
        assert_eq!(roll.lock(this_shard()).slots.len(), 3);
    }
}
