use std::{
    any::{Any, TypeId},
    fmt,
    sync::{Arc, OnceLock},
};

use http::{HeaderMap, HeaderName, HeaderValue};
use tower_catch_unwind::Log;
use tower_request_context::{Inherit, RequestContext, RequestId, SpanId, Task, TraceId};
use tracing::{
    Level, Span,
    field::{self, display},
    level_enabled,
};

use crate::{
    B3, Sampling, TraceParent, TraceState, Trust,
    b3::{B3_SINGLE, X_B3_FLAGS, X_B3_PARENT_SPAN_ID, X_B3_SAMPLED, X_B3_SPAN_ID, X_B3_TRACE_ID},
    random::{self, Ids},
    w3c::{TRACEPARENT, TRACESTATE, trim},
};

pub(crate) const X_REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");

/// Where the code that asks stands in its trace: in a request, in one of its tasks, or in a call
/// that it makes.
///
/// It is the same whether or not there is a subscriber, and whatever its filter hides.
pub struct TraceContext {
    trace_id: TraceId,
    // Drawn when it is first asked for, which in a task it may never be.
    span_id: OnceLock<SpanId>,
    parent_id: Option<SpanId>,
    link: Option<TraceParent>,
    sampled: bool,
    random: bool,
    debug: bool,
    state: TraceState,
    request_id: RequestId,
    on_span: Option<Arc<Logged<dyn OnSpan>>>,
}

/// A hook, and where its panics are told.
pub(crate) struct Logged<H: ?Sized> {
    pub(crate) log: Arc<Log>,
    pub(crate) hook: H,
}

impl Logged<dyn OnSpan> {
    fn call(&self, span: &Span, context: &TraceContext) -> Option<TraceParent> {
        self.log.call("on_span", || self.hook.on_span(span, context)).flatten()
    }
}

impl TraceContext {
    /// That of the request or the task that runs here, if it has one.
    pub fn current() -> Option<Self> {
        RequestContext::current().get().cloned()
    }

    /// A new trace: not sampled, and its id random.
    pub fn start() -> Self {
        Self::extract(&HeaderMap::new(), Trust::Restart)
    }

    /// What the headers of a request say, as far as `trust` goes: what [`TraceIdLayer`] does, for
    /// requests that come some other way. A trace that it starts is not sampled.
    ///
    /// [`TraceIdLayer`]: crate::TraceIdLayer
    pub fn extract(headers: &HeaderMap, trust: Trust) -> Self {
        Self::incoming(headers, trust, 0.0, None)
    }

    pub(crate) fn incoming(
        headers: &HeaderMap,
        trust: Trust,
        sample_ratio: f64,
        on_span: Option<Arc<Logged<dyn OnSpan>>>,
    ) -> Self {
        let ids = Ids::draw();
        let caller = Caller::of(headers);
        let (parent, link) = match trust {
            Trust::Restart => (None, caller.parent),
            Trust::Continue | Trust::Resample => (caller.parent, None),
        };
        let is_w3c = caller.is_w3c && parent.is_some();
        let decision = if trust == Trust::Continue { caller.sampled } else { None };
        Self {
            trace_id: parent.map_or(ids.trace, |parent| parent.trace_id),
            span_id: ids.span.into(),
            parent_id: parent.map(|parent| parent.parent_id),
            link,
            sampled: decision.unwrap_or_else(|| takes(sample_ratio, ids.trace)),
            random: parent.is_none_or(|parent| parent.random),
            debug: trust == Trust::Continue && caller.debug,
            // Not without a valid `traceparent`: section 3.3, and section "No traceparent
            // Received", step 3. The other way round it does no harm.
            state: if is_w3c { state_of(headers) } else { TraceState::default() },
            request_id: request_id_of(headers).unwrap_or_else(|| ids.request_id()),
            on_span,
        }
    }

    /// The trace: the same in the request, its tasks and its calls, unless
    /// [a hook](OnSpan::on_span) has another for a call.
    pub fn trace_id(&self) -> TraceId {
        self.trace_id
    }

    /// The span id of the request, or of the task.
    pub fn span_id(&self) -> SpanId {
        *self.span_id.get_or_init(random::span_id)
    }

    /// The span that this one is part of: the caller's for a request whose trace is continued, the
    /// request's for a task that is not kept.
    pub fn parent_id(&self) -> Option<SpanId> {
        self.parent_id
    }

    /// The span that led to this one without this one being part of it: the caller's for a request
    /// whose trace was restarted, the request's for a kept task.
    pub fn link(&self) -> Option<TraceParent> {
        self.link
    }

    /// Whether the trace is recorded.
    pub fn is_sampled(&self) -> bool {
        self.sampled
    }

    /// Whether at least the last seven bytes of the trace id are random: of our own traces they
    /// are, of others' that is what the caller says (W3C Trace Context Level 2, section
    /// 3.2.2.5.2).
    pub fn is_random(&self) -> bool {
        self.random
    }

    /// Whether B3's debug flag was set, which implies that it is sampled.
    pub fn is_debug(&self) -> bool {
        self.debug
    }

    /// What the caller's `tracestate` says, if the trace is continued.
    pub fn trace_state(&self) -> &TraceState {
        &self.state
    }

    /// The id of the request.
    pub fn request_id(&self) -> &RequestId {
        &self.request_id
    }

    /// This span, as whoever it calls is told of it.
    pub fn to_trace_parent(&self) -> TraceParent {
        TraceParent::new(self.trace_id, self.span_id()).flags(self.sampled, self.random)
    }

    /// Adds the headers of one outgoing call, which has a span id of its own: `traceparent`,
    /// `tracestate` if there is one, and `x-request-id`.
    ///
    /// They replace whatever was there, and B3 headers are removed: a call has one place in one
    /// trace. A map that is full takes no more of them.
    pub fn inject(&self, headers: &mut HeaderMap) {
        self.call().write(headers, false);
    }

    /// That of a call made from here.
    pub(crate) fn call(&self) -> Self {
        self.below(Some(self.span_id()), None)
    }

    pub(crate) fn write(&self, headers: &mut HeaderMap, b3: bool) {
        remove(headers);
        let mut insert = |name, value| drop(headers.try_insert(name, value));
        insert(TRACEPARENT, self.to_trace_parent().to_header());
        if let Ok(state) = HeaderValue::from_str(self.state.as_str()) {
            if !state.is_empty() {
                insert(TRACESTATE, state);
            }
        }
        insert(X_REQUEST_ID, self.request_id.to_header());
        if b3 {
            let sampling = match (self.debug, self.sampled) {
                (true, _) => Sampling::Debug,
                (_, true) => Sampling::Accept,
                _ => Sampling::Deny,
            };
            let ids = Some((self.trace_id, self.span_id()));
            let b3 = B3 { ids, parent_id: self.parent_id, sampling: Some(sampling) };
            if let Some(b3) = b3.to_header() {
                insert(B3_SINGLE, b3);
            }
        }
    }

    /// The span of a request, and what the hook makes of its ids.
    pub(crate) fn open_request(&mut self) -> Span {
        let show = self.on_span.is_none();
        let span = tracing::info_span!(
            "request",
            trace_id = show.then(|| display(self.trace_id)),
            span_id = show.then(|| display(self.span_id())),
            request_id = show.then(|| display(&self.request_id)),
            linked_trace_id = self.link.map(|link| display(link.trace_id)),
        );
        self.adopt(&span);
        span
    }

    /// The span of a call.
    pub(crate) fn open_call(&mut self) -> Span {
        let show = self.on_span.is_none();
        let span = tracing::info_span!(
            "call",
            trace_id = show.then(|| display(self.trace_id)),
            span_id = show.then(|| display(self.span_id())),
            request_id = show.then(|| display(&self.request_id)),
            linked_trace_id = field::Empty,
        );
        self.adopt(&span);
        span
    }

    fn adopt(&mut self, span: &Span) {
        let Some(on_span) = self.on_span.clone().filter(|_| !span.is_disabled()) else { return };
        if let Some(ids) = on_span.call(span, self) {
            if ids.trace_id != self.trace_id {
                self.leave(ids);
                span.record("linked_trace_id", self.link.map(|link| display(link.trace_id)));
            }
            self.span_id = ids.parent_id.into();
            self.sampled = ids.sampled;
            self.debug &= ids.sampled;
        }
        self.record(span);
    }

    /// Leaves the trace for that of `ids`: what was said of the one does not hold for the other.
    fn leave(&mut self, ids: TraceParent) {
        let parent =
            self.parent_id.take().map(|parent_id| TraceParent::new(self.trace_id, parent_id));
        let parent = parent.map(|parent| parent.flags(self.sampled, self.random));
        self.link = parent.or(self.link);
        self.trace_id = ids.trace_id;
        self.random = ids.random;
        self.debug = false;
        self.state = TraceState::default();
    }

    fn record(&self, span: &Span) {
        span.record("trace_id", display(self.trace_id));
        span.record("span_id", display(self.span_id()));
        span.record("request_id", display(&self.request_id));
    }

    /// That of a span below, or beside, this one.
    fn below(&self, parent_id: Option<SpanId>, link: Option<TraceParent>) -> Self {
        Self {
            span_id: OnceLock::new(),
            parent_id,
            link,
            state: self.state.clone(),
            request_id: self.request_id.clone(),
            on_span: self.on_span.clone(),
            ..*self
        }
    }
}

/// Of a clone the span id is the same, so now it is drawn.
impl Clone for TraceContext {
    fn clone(&self) -> Self {
        let clone = self.below(self.parent_id, self.link);
        Self { span_id: self.span_id().into(), ..clone }
    }
}

impl fmt::Debug for TraceContext {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TraceContext")
            .field("trace_id", &self.trace_id)
            .field("span_id", &self.span_id.get())
            .field("parent_id", &self.parent_id)
            .field("link", &self.link)
            .field("sampled", &self.sampled)
            .field("random", &self.random)
            .field("debug", &self.debug)
            .field("state", &self.state)
            .field("request_id", &self.request_id)
            .finish_non_exhaustive()
    }
}

/// A task is a span of its own in the trace of its request.
impl Inherit for TraceContext {
    fn inherit(&self, task: &Task) -> Self {
        if task.kept {
            self.below(None, Some(self.to_trace_parent()))
        } else {
            self.below(Some(self.span_id()), None)
        }
    }

    // Whether somebody takes spans at all: the callsite's own filter decides in `span`.
    fn wants_span(&self) -> bool {
        level_enabled!(Level::INFO)
    }

    fn span(&self, task: &Task) -> Span {
        let show = self.on_span.is_none();
        let around = Span::current();
        let span = tracing::info_span!(
            // A span is open as long as one in it: a kept task must not hold its request's open.
            parent: if task.kept { None } else { around.id() },
            "task",
            task = task.name,
            trace_id = show.then(|| display(self.trace_id)),
            span_id = show.then(|| display(self.span_id())),
            request_id = show.then(|| display(&self.request_id)),
        );
        if span.is_disabled() {
            return span;
        }
        if task.kept {
            span.follows_from(around);
        }
        if let Some(on_span) = &self.on_span {
            // The hook may look at the span id that it replaces, so not at the final one.
            let provisional = self.below(self.parent_id, self.link);
            let ids = on_span.call(&span, &provisional);
            let id = ids.map_or_else(|| provisional.span_id(), |ids| ids.parent_id);
            self.span_id.get_or_init(|| id);
            self.record(&span);
        }
        span
    }

    fn part(&self, wanted: TypeId) -> Option<&dyn Any> {
        if wanted == TypeId::of::<TraceId>() {
            Some(&self.trace_id)
        } else if wanted == TypeId::of::<SpanId>() {
            Some(self.span_id.get_or_init(random::span_id))
        } else if wanted == TypeId::of::<RequestId>() {
            Some(&self.request_id)
        } else {
            None
        }
    }
}

/// Sees each span of ours after it is made and before it is entered: where a tracing system gives
/// it a parent and a link, and ids.
///
/// Closures `Fn(&Span, &TraceContext) -> Option<TraceParent>` are this. It is called for the spans
/// of requests, of tasks and of calls that [`PropagateLayer`](crate::PropagateLayer) makes, where
/// a subscriber wants them. If it panics, the panic is contained and logged.
pub trait OnSpan: Send + Sync + 'static {
    /// A span was made. `context` says where it belongs:
    /// [`parent_id`](TraceContext::parent_id) and [`link`](TraceContext::link).
    ///
    /// What comes back are the ids that the tracing system has given to the span; `None` keeps
    /// those of `context`. The trace id of a task stays that of its request. Where it is another for
    /// a request or a call, that is linked to what would have been its parent, and has no
    /// [state](TraceContext::trace_state) of the caller's.
    fn on_span(&self, span: &Span, context: &TraceContext) -> Option<TraceParent>;
}

impl<F> OnSpan for F
where
    F: Fn(&Span, &TraceContext) -> Option<TraceParent> + Send + Sync + 'static,
{
    fn on_span(&self, span: &Span, context: &TraceContext) -> Option<TraceParent> {
        self(span, context)
    }
}

/// Adds the headers of one outgoing call, made by the request or the task that runs here: see
/// [`TraceContext::inject`]. Where there is none it changes nothing.
///
/// For clients that are no `Service<http::Request<B>>`. Who lets such a client follow redirects
/// sends the headers wherever they lead.
pub fn inject(headers: &mut HeaderMap) {
    if let Some(context) = TraceContext::current() {
        context.inject(headers);
    }
}

/// Removes all headers that [`inject`] adds or replaces.
pub(crate) fn remove(headers: &mut HeaderMap) {
    for name in [
        TRACEPARENT,
        TRACESTATE,
        X_REQUEST_ID,
        B3_SINGLE,
        X_B3_TRACE_ID,
        X_B3_SPAN_ID,
        X_B3_PARENT_SPAN_ID,
        X_B3_SAMPLED,
        X_B3_FLAGS,
    ] {
        headers.remove(name);
    }
}

/// What the caller says of itself, in the first of the formats in which that is valid: W3C, `b3`,
/// `X-B3-*` (B3, section "Http Encodings": the single header takes precedence).
struct Caller {
    parent: Option<TraceParent>,
    is_w3c: bool,
    sampled: Option<bool>,
    debug: bool,
}

impl Caller {
    fn of(headers: &HeaderMap) -> Self {
        let w3c = only(headers, &TRACEPARENT).and_then(TraceParent::parse);
        if let Some(parent) = w3c {
            let sampled = Some(parent.sampled);
            return Self { parent: Some(parent), is_w3c: true, sampled, debug: false };
        }
        // B3, section "Multiple Headers": when extracting, the first value wins.
        let single = headers.get(B3_SINGLE).and_then(|value| B3::parse(value.as_bytes()));
        let b3 = single.or_else(|| B3::parse_multi(headers));
        let sampling = b3.and_then(|b3| b3.sampling);
        let sampled = sampling.map(|sampling| sampling != Sampling::Deny);
        // Nobody says that the id is random.
        let parent = b3.and_then(|b3| b3.ids).map(|(trace_id, span_id)| {
            TraceParent::new(trace_id, span_id).flags(sampled == Some(true), false)
        });
        let debug = sampling == Some(Sampling::Debug);
        Self { parent, is_w3c: false, sampled, debug }
    }
}

fn state_of(headers: &HeaderMap) -> TraceState {
    let fields = headers.get_all(TRACESTATE).into_iter();
    TraceState::parse(fields.map(HeaderValue::as_bytes)).unwrap_or_default()
}

fn request_id_of(headers: &HeaderMap) -> Option<RequestId> {
    // White space around it is cut off, and a value may be of hundreds of kilobytes.
    let value = only(headers, &X_REQUEST_ID).filter(|value| value.len() <= 256)?;
    RequestId::from_bytes(trim(value))
}

/// The header's value, if it has exactly one.
fn only<'a>(headers: &'a HeaderMap, name: &HeaderName) -> Option<&'a [u8]> {
    let mut values = headers.get_all(name).into_iter();
    let value = values.next()?;
    values.next().is_none().then_some(value.as_bytes())
}

/// Whether this share of our traces takes the one of this random id.
fn takes(ratio: f64, id: TraceId) -> bool {
    let [.., a, b, c, d] = id.to_bytes();
    f64::from(u32::from_be_bytes([a, b, c, d])) < ratio * 2_f64.powi(32)
}
