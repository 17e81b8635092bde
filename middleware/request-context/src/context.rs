use std::{
    any::{Any, TypeId},
    cell::Cell,
    fmt,
    mem::ManuallyDrop,
    panic::Location,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
};

use pin_project_lite::pin_project;
use tracing::Span;

use crate::TraceId;

#[cfg(not(loom))]
thread_local! {
    static HERE: Here = const { Here::new() };
}
#[cfg(loom)]
loom::thread_local! {
    static HERE: Here = Here::new();
}

/// The parts of the current [`Scope`], apart so that a look at one does not move the other.
///
/// Whoever moves a context in moves it out again, so nothing is dropped with the thread: a
/// thread-local without a destructor needs no look at its state, and is there to the very end.
struct Here {
    context: Cell<ManuallyDrop<RequestContext>>,
    task: Cell<Option<WhichTask>>,
}

impl Here {
    const fn new() -> Self {
        Self { context: Cell::new(ManuallyDrop::new(RequestContext::new())), task: Cell::new(None) }
    }

    #[inline]
    fn replace(&self, context: RequestContext) -> RequestContext {
        ManuallyDrop::into_inner(self.context.replace(ManuallyDrop::new(context)))
    }

    #[inline]
    fn is_nowhere(&self) -> bool {
        let current = self.replace(RequestContext::new());
        let is_empty = current.is_empty();
        self.replace(current);
        is_empty && self.task.get().is_none()
    }
}

/// The values of one request.
///
/// A clone costs one reference count and is the same context. Nothing changes a context: `with`
/// makes a new one that also has the old one's values.
#[derive(Clone, Default)]
pub struct RequestContext {
    head: Option<Arc<Link<dyn Value>>>,
}

struct Link<V: ?Sized> {
    parent: RequestContext,
    /// Whether a value here or below is a task's own: what a spawn looks at.
    inherits: bool,
    value: V,
}

/// A long chain must not be dropped recursively: each link would cost a stack frame.
impl<V: ?Sized> Drop for Link<V> {
    fn drop(&mut self) {
        let mut next = self.parent.head.take();
        while let Some(mut link) = next {
            next = Arc::get_mut(&mut link).and_then(|link| link.parent.head.take());
        }
    }
}

impl RequestContext {
    /// A context without values.
    pub const fn new() -> Self {
        Self { head: None }
    }

    /// The context of the request that is being served here, or an [empty](Self::is_empty) one.
    #[inline]
    pub fn current() -> Self {
        Scope::settle();
        HERE.with(|here| {
            let current = here.replace(Self::new());
            let clone = current.clone();
            here.replace(current);
            clone
        })
    }

    /// The [current](Self::current) context; or where that is empty, as in a `call` behind tower's
    /// `Buffer`, this one: of the request's type map, where `.in_extensions()` of a layer puts it.
    /// (Extractors look there first, for they run in the handler.)
    pub fn current_or(carried: Option<&Self>) -> Self {
        let current = Self::current();
        if current.is_empty() { carried.cloned().unwrap_or_default() } else { current }
    }

    /// Whether there are no values: nothing is being served here that has any.
    pub fn is_empty(&self) -> bool {
        self.head.is_none()
    }

    /// Whether both are the same context, not merely equal ones.
    pub fn ptr_eq(&self, other: &Self) -> bool {
        match (&self.head, &other.head) {
            (Some(a), Some(b)) => std::ptr::addr_eq(Arc::as_ptr(a), Arc::as_ptr(b)),
            (None, None) => true,
            _ => false,
        }
    }

    /// The value of type `T` that was added last, if there is one.
    pub fn get<T: 'static>(&self) -> Option<&T> {
        self.links().find_map(|link| link.value.get(TypeId::of::<T>())?.downcast_ref())
    }

    /// This context and `value`, which hides an earlier one of the same type.
    pub fn with<T: Send + Sync + 'static>(&self, value: T) -> Self {
        Self::link(self.clone(), self.inherits(), Shared(value))
    }

    /// This context and `value`, of which every task gets [its own](Inherit).
    pub fn with_inherited<T: Inherit>(&self, value: T) -> Self {
        Self::link(self.clone(), true, Inherited(value))
    }

    /// Runs `future` in this context.
    ///
    /// # Cancel safety
    ///
    /// Cancel safe if `future` is. It is dropped in this context too.
    pub fn scope<F: Future>(self, future: F) -> Scoped<F> {
        Scoped { future: Some(future), scope: Scope::new(self) }
    }

    /// Runs `f` in this context.
    pub fn sync_scope<R>(self, f: impl FnOnce() -> R) -> R {
        Scope::new(self).enter(f)
    }

    /// Whether a task in this context has values of its own.
    pub fn inherits(&self) -> bool {
        self.head.as_ref().is_some_and(|link| link.inherits)
    }

    /// The context of a task that is started in this one.
    pub fn inherit(&self, task: &Task) -> Self {
        // Values that were made for a parent task stand at the head: they are replaced, not
        // hidden, or the chain would grow with each generation.
        let mut base = self;
        while let Some(link) = base.head.as_deref().filter(|link| link.value.inherited()) {
            base = &link.parent;
        }
        // What a newer value hides stays hidden.
        let is_newest = |link: &&Link<dyn Value>| {
            let newer = self.links().take_while(|newer| !std::ptr::addr_eq(*newer, *link));
            !newer.into_iter().any(|newer| newer.value.get(link.value.key()).is_some())
        };
        let own: Vec<_> = self
            .links()
            .take_while(|link| link.inherits)
            .filter(|link| link.value.inherited())
            .filter(is_newest)
            .collect();
        let base = base.clone();
        own.into_iter().rev().fold(base, |context, link| link.value.inherit(context, task))
    }

    /// Without the task that a scope was made for.
    fn started_in(&self) -> &Self {
        match &self.head {
            Some(link) if link.value.key() == TypeId::of::<Started>() => &link.parent,
            _ => self,
        }
    }

    /// Whether a task's values are needed at once, because somebody wants its span.
    #[inline]
    pub fn wants_span(&self) -> bool {
        let mut next = self;
        while let Some(link) = next.head.as_deref().filter(|link| link.inherits) {
            if link.value.wants_span() {
                return true;
            }
            next = &link.parent;
        }
        false
    }

    /// The span of `task`, of whose own context this is; disabled if no value has one.
    pub fn span(&self, task: &Task) -> Span {
        self.links()
            .take_while(|link| link.inherits)
            .map(|link| link.value.span(task))
            .find(|span| !span.is_disabled())
            .unwrap_or_else(Span::none)
    }

    fn link(parent: Self, inherits: bool, value: impl Value) -> Self {
        Self { head: Some(Arc::new(Link { parent, inherits, value })) }
    }

    fn links(&self) -> impl Iterator<Item = &Link<dyn Value>> {
        std::iter::successors(self.head.as_deref(), |link| link.parent.head.as_deref())
    }
}

impl fmt::Debug for RequestContext {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // Values may be secrets, so only their types.
        f.debug_list().entries(self.links().map(|link| link.value.type_name())).finish()
    }
}

/// A value of which every task has its own, derived from that of whoever starts it.
///
/// A trace context is one: the trace is the request's, the span id the task's.
pub trait Inherit: Send + Sync + Sized + 'static {
    /// The value in `task`. Called when something in the task first asks for its context, or when
    /// the task is started, if it [wants a span](Self::wants_span).
    fn inherit(&self, task: &Task) -> Self;

    /// Whether tasks should have a [span](Self::span): asked at each start, so it must be cheap.
    fn wants_span(&self) -> bool {
        false
    }

    /// The span that `task` runs in. `self` is the task's own value.
    fn span(&self, task: &Task) -> Span {
        let _ = task;
        Span::none()
    }

    /// Something that this value contains, for those who ask for it by its own type; of another
    /// type it is nothing. In a task it is found before a value of that type that was added to the request's context later.
    fn part(&self, wanted: TypeId) -> Option<&dyn Any> {
        let _ = wanted;
        None
    }
}

/// What an [`Inherit`] value is told of the task that inherits it.
#[derive(Clone, Copy, Debug)]
#[non_exhaustive]
pub struct Task {
    /// The name that the task was given.
    pub name: &'static str,
    /// Where it was spawned.
    pub site: &'static Location<'static>,
    /// Whether it was told to outlive its request, so that its span should link to the request's
    /// and not nest in it.
    pub kept: bool,
}

impl Task {
    /// A task of this name, spawned at this place.
    pub const fn new(name: &'static str, site: &'static Location<'static>) -> Self {
        Self { name, site, kept: false }
    }

    /// Says whether the task was told to outlive its request.
    pub const fn kept(mut self, kept: bool) -> Self {
        self.kept = kept;
        self
    }
}

/// What is current on a thread while it runs somebody's work: for those who write a layer or a
/// task's wrapper. All others use [`RequestContext::scope`].
///
/// The owner of the work keeps a `Scope` and [enters](Self::enter) it around each poll and the
/// drop. It moves in and out: no reference is counted.
#[derive(Debug, Default)]
pub struct Scope {
    context: RequestContext,
    /// Set: `context` is that of whoever started this task, and the task's own is still to be made.
    task: Option<WhichTask>,
}

/// What knows which task it is, and the context that it was started in, when its own values are to be
/// made. It is told the scope's context.
type WhichTask = fn(&RequestContext) -> Option<(RequestContext, Task)>;

/// A task that is known when its scope is made. In the context, so that a scope is small.
struct Started(Task);

impl Scope {
    /// The scope of work done in `context`.
    pub const fn new(context: RequestContext) -> Self {
        Self { context, task: None }
    }

    /// The scope of a task started in `context`, which gets its own values when something first asks
    /// for them.
    pub fn of_task(context: RequestContext, task: Task) -> Self {
        if !context.inherits() {
            return Self::new(context);
        }
        let started = |context: &RequestContext| {
            context.get().map(|Started(task)| (context.started_in().clone(), *task))
        };
        Self::of_current_task(context.with(Started(task)), started)
    }

    /// The same where the task would have to be looked up for each poll: `task` does that when it
    /// is needed, where the task runs. It is told `context`, and says which context the task was
    /// started in. While it knows no task, what runs there has the values of whoever started it.
    #[inline]
    pub const fn of_current_task(
        context: RequestContext,
        task: fn(&RequestContext) -> Option<(RequestContext, Task)>,
    ) -> Self {
        Self { context, task: Some(task) }
    }

    /// The same where nothing is current, and without a context: `task` is told an empty one when
    /// something asks, and until then nothing is moved or counted. Whoever calls it
    /// [takes it back](Self::take_back), unless it was `false`: then something is current.
    #[inline]
    pub fn lend(task: fn(&RequestContext) -> Option<(RequestContext, Task)>) -> bool {
        HERE.with(|here| {
            let is_free = here.is_nowhere();
            if is_free {
                here.task.set(Some(task));
            }
            is_free
        })
    }

    /// Ends what [`lend`](Self::lend) has begun, and yields what was made, if something has asked.
    #[inline]
    pub fn take_back() -> Option<Self> {
        HERE.with(|here| match here.task.take() {
            Some(_) => None,
            None => Some(Self::new(here.replace(RequestContext::new()))),
        })
    }

    /// Makes the own values of the task that is current, if they are yet to be made: for those who
    /// make another task current inside of it.
    #[inline]
    pub fn settle() {
        if HERE.with(|here| here.task.get()).is_some() {
            Self::make_own();
        }
    }

    /// Whether this is a task's, and the task's own values are yet to be made.
    pub const fn is_pending(&self) -> bool {
        self.task.is_some()
    }

    /// The trace id among the values, if there is one. A task has that of whoever started it.
    pub fn trace_id(&self) -> Option<TraceId> {
        self.context.get().copied()
    }

    /// Runs `f` with this as the current scope.
    pub fn enter<R>(&mut self, f: impl FnOnce() -> R) -> R {
        struct Leave<'a>(&'a mut Scope);
        impl Drop for Leave<'_> {
            fn drop(&mut self) {
                self.0.swap();
            }
        }
        self.swap();
        let _leave = Leave(self);
        f()
    }

    /// Exchanges this scope with the current one. Whoever calls it calls it again.
    #[inline]
    pub fn swap(&mut self) {
        HERE.with(|here| {
            self.context = here.replace(std::mem::take(&mut self.context));
            self.task = here.task.replace(self.task);
        });
    }

    /// Whether nothing is current: nobody's work runs here, or it has no values.
    #[inline]
    pub fn is_nowhere() -> bool {
        HERE.with(Here::is_nowhere)
    }

    /// The current context, if there is one and it is not `context`. When it is, which is what
    /// happens most, this counts no reference.
    #[inline]
    pub fn other_than(context: &RequestContext) -> Option<RequestContext> {
        Self::is_elsewhere(context).then(RequestContext::current)
    }

    /// Whether there is a current context and it is not `context`.
    #[inline]
    pub fn is_elsewhere(context: &RequestContext) -> bool {
        HERE.with(|here| {
            let current = here.replace(RequestContext::new());
            let is_elsewhere = !current.is_empty() && !current.ptr_eq(context);
            here.replace(current);
            is_elsewhere
        })
    }

    #[cold]
    #[inline(never)]
    fn make_own() {
        // Taken out meanwhile, since a user's `Inherit` may ask for the current context; and put
        // back if it panics, since its caller may catch that and go on.
        struct PutBack(Scope);
        impl Drop for PutBack {
            fn drop(&mut self) {
                self.0.swap();
            }
        }
        let mut here = PutBack(Self::default());
        here.0.swap();
        // One that is empty may be lent.
        let own = if here.0.context.inherits() || here.0.context.is_empty() {
            let known = here.0.task.and_then(|which| which(&here.0.context));
            let Some((context, task)) = known else { return };
            context.started_in().inherit(&task)
        } else {
            here.0.context.clone()
        };
        here.0 = Self::new(own);
    }
}

pin_project! {
    /// A future in a context: see [`RequestContext::scope`].
    #[derive(Debug)]
    #[must_use = "futures do nothing unless polled"]
    pub struct Scoped<F> {
        // `None` once it is ready, so that it is dropped in scope.
        #[pin]
        future: Option<F>,
        scope: Scope,
    }

    impl<F> PinnedDrop for Scoped<F> {
        fn drop(this: Pin<&mut Self>) {
            let mut this = this.project();
            if this.future.is_some() {
                this.scope.enter(|| this.future.set(None));
            }
        }
    }
}

impl<F: Future> Future for Scoped<F> {
    type Output = F::Output;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<F::Output> {
        let mut this = self.project();
        this.scope.enter(|| {
            let output =
                this.future.as_mut().as_pin_mut().expect("polled after it was ready").poll(cx);
            if output.is_ready() {
                this.future.set(None);
            }
            output
        })
    }
}

/// What a link of the chain holds: a value that all share, or one that is inherited.
trait Value: Any + Send + Sync {
    /// The type that it is found by.
    fn key(&self) -> TypeId;
    fn get(&self, wanted: TypeId) -> Option<&dyn Any>;
    fn type_name(&self) -> &'static str;

    fn inherited(&self) -> bool {
        false
    }
    fn inherit(&self, context: RequestContext, _: &Task) -> RequestContext {
        context
    }
    fn wants_span(&self) -> bool {
        false
    }
    fn span(&self, _: &Task) -> Span {
        Span::none()
    }
}

struct Shared<T>(T);

impl<T: Send + Sync + 'static> Value for Shared<T> {
    fn key(&self) -> TypeId {
        TypeId::of::<T>()
    }

    fn get(&self, wanted: TypeId) -> Option<&dyn Any> {
        (TypeId::of::<T>() == wanted).then_some(&self.0)
    }

    fn type_name(&self) -> &'static str {
        std::any::type_name::<T>()
    }
}

struct Inherited<T>(T);

impl<T: Inherit> Value for Inherited<T> {
    fn key(&self) -> TypeId {
        TypeId::of::<T>()
    }

    fn get(&self, wanted: TypeId) -> Option<&dyn Any> {
        if TypeId::of::<T>() == wanted {
            return Some(&self.0);
        }
        self.0.part(wanted).filter(|part| (*part).type_id() == wanted)
    }

    fn type_name(&self) -> &'static str {
        std::any::type_name::<T>()
    }

    fn inherited(&self) -> bool {
        true
    }

    fn inherit(&self, context: RequestContext, task: &Task) -> RequestContext {
        context.with_inherited(self.0.inherit(task))
    }

    fn wants_span(&self) -> bool {
        self.0.wants_span()
    }

    fn span(&self, task: &Task) -> Span {
        self.0.span(task)
    }
}
