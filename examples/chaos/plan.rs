//! What one request is meant to do: the dice decide before it is sent, and both sides read it.

use std::{
    sync::{
        OnceLock,
        atomic::{AtomicU8, Ordering::Relaxed},
    },
    time::{Duration, Instant},
};

use tower_tasks::{AtEnd, End, task_set::OnPanic};

/// `SplitMix64`: enough for dice, and the whole run is in one seed.
pub(crate) struct Dice(pub(crate) u64);

impl Dice {
    pub(crate) const fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    pub(crate) const fn below(&mut self, n: u64) -> u64 {
        self.next() % n
    }

    pub(crate) const fn percent(&mut self, percent: u64) -> bool {
        self.below(100) < percent
    }

    pub(crate) const fn millis(&mut self, below: u64) -> Duration {
        Duration::from_millis(self.below(below))
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Protocol {
    Http1,
    Http2,
    Grpc,
}

/// What the handler and the body do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Answer {
    /// With a body of known length.
    Whole(Duration),
    /// With a frame every so often.
    Streams(u32, Duration),
    /// With more than the client takes in before it reads.
    Floods,
    Fails,
    Panics,
    BodyFails,
    BodyPanics,
    /// A timeout answers.
    Never,
    /// The first attempt fails, and the retry of an outer layer streams.
    Retried,
    /// HTTP/1 alone: another protocol on the same socket.
    Upgrades,
}

/// What the client does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Conduct {
    Reads,
    ReadsSlowly,
    /// It leaves when so much time has passed, whatever has come.
    LeavesBeforeHead(Duration),
    LeavesInBody,
    /// It announces a body and sends half of it: to HTTP/1 its leaving is hidden.
    LeavesInUpload,
}

impl Conduct {
    pub(crate) const fn leaves(self) -> bool {
        matches!(self, Self::LeavesBeforeHead(_) | Self::LeavesInBody)
    }
}

#[derive(Clone, Debug)]
pub(crate) struct TaskPlan {
    pub(crate) kind: Kind,
    pub(crate) at_end: Option<AtEnd>,
    pub(crate) on: Option<(End, AtEnd)>,
    pub(crate) timeout: Option<Duration>,
    pub(crate) on_panic: OnPanic,
    pub(crate) handle: HandlePlan,
    /// How long its spawner waits for a permit.
    pub(crate) within: Option<Duration>,
    /// Of the process, and not of the request.
    pub(crate) of_registry: bool,
    pub(crate) children: Vec<TaskPlan>,
    /// Whether it waits until its client leaves, and is then cancelled at once.
    pub(crate) is_measured: bool,
}

/// What a task does; its name tells.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    Ready,
    Yields,
    Sleeps,
    Waits,
    Blocks,
    Panics,
    PanicsInDrop,
    Nests,
    Graceful,
    IgnoresStop,
    Closure,
    ClosurePanics,
    Upgraded,
    Groups,
    /// The handler itself.
    Shield,
}

impl Kind {
    pub(crate) const ALL: [Self; 15] = [
        Self::Ready,
        Self::Yields,
        Self::Sleeps,
        Self::Waits,
        Self::Blocks,
        Self::Panics,
        Self::PanicsInDrop,
        Self::Nests,
        Self::Graceful,
        Self::IgnoresStop,
        Self::Closure,
        Self::ClosurePanics,
        Self::Upgraded,
        Self::Groups,
        Self::Shield,
    ];

    pub(crate) const fn name(self) -> &'static str {
        match self {
            Self::Ready => "ready",
            Self::Yields => "yields",
            Self::Sleeps => "sleeps",
            Self::Waits => "waits",
            Self::Blocks => "blocks",
            Self::Panics => "panics",
            Self::PanicsInDrop => "panics_in_drop",
            Self::Nests => "nests",
            Self::Graceful => "graceful",
            Self::IgnoresStop => "ignores_stop",
            Self::Closure => "closure",
            Self::ClosurePanics => "closure_panics",
            Self::Upgraded => "upgraded",
            Self::Groups => "groups",
            Self::Shield => "shield",
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum HandlePlan {
    /// Its result is compared with the ledger.
    Keep,
    Drop,
    Cancel,
    Abort,
}

/// What a bounded task of no registry does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Bounded {
    Yields,
    Panics,
    /// A closure.
    Blocks,
    /// Its spawner waits for a permit at most so long.
    Waits(Duration),
}

#[derive(Debug)]
pub(crate) struct Plan {
    pub(crate) id: u64,
    pub(crate) protocol: Protocol,
    pub(crate) answer: Answer,
    pub(crate) conduct: Conduct,
    /// Whether its handler is a task.
    pub(crate) is_shielded: bool,
    pub(crate) tasks: Vec<TaskPlan>,
    pub(crate) bounded: Option<Bounded>,
    /// When the client left.
    pub(crate) left: OnceLock<Instant>,
    pub(crate) attempts: AtomicU8,
    /// The last end that a response to it had, by number.
    pub(crate) end: AtomicU8,
}

impl Plan {
    pub(crate) fn new(id: u64, seed: u64) -> Self {
        let mut dice = Dice(seed ^ id.wrapping_mul(0xD6E8_FEB8_6659_FD93));
        let protocol = match dice.below(4) {
            0 => Protocol::Http2,
            1 => Protocol::Grpc,
            _ => Protocol::Http1,
        };
        let answer = match dice.below(200) {
            0..10 => Answer::Panics,
            10..20 => Answer::BodyPanics,
            20..26 => Answer::Fails,
            26..32 => Answer::BodyFails,
            32..34 => Answer::Never,
            34..38 if protocol != Protocol::Grpc => Answer::Retried,
            38..44 if protocol == Protocol::Http1 => Answer::Upgrades,
            44..90 => Answer::Streams(u32::try_from(dice.below(6)).unwrap_or(0), dice.millis(4)),
            90..120 => Answer::Whole(dice.millis(6)),
            _ => Answer::Whole(Duration::ZERO),
        };
        let conduct = match dice.below(200) {
            0..10 => Conduct::LeavesBeforeHead(dice.millis(5)),
            10..20 => Conduct::LeavesInBody,
            20..22 => Conduct::LeavesInUpload,
            22..26 => Conduct::ReadsSlowly,
            _ => Conduct::Reads,
        };
        let is_small = matches!(answer, Answer::Whole(_) | Answer::Streams(..));
        let answer = match conduct {
            Conduct::ReadsSlowly | Conduct::LeavesInBody if is_small && dice.percent(40) => {
                Answer::Floods
            }
            _ => answer,
        };
        let is_shielded = dice.percent(15);
        let tasks = (0..dice.below(5)).map(|_| TaskPlan::new(&mut dice, 0)).collect();
        let bounded = match dice.below(100) {
            0..4 => Some(Bounded::Yields),
            4 => Some(Bounded::Panics),
            5 => Some(Bounded::Blocks),
            6..10 => Some(Bounded::Waits(dice.millis(20))),
            _ => None,
        };
        Self {
            id,
            protocol,
            answer,
            conduct,
            is_shielded,
            tasks,
            bounded,
            left: OnceLock::new(),
            attempts: AtomicU8::new(0),
            end: AtomicU8::new(0),
        }
    }

    pub(crate) fn request_id(&self) -> String {
        request_id(self.id)
    }

    pub(crate) fn trace_id(&self) -> String {
        trace_id(self.id)
    }

    /// Whether the panic of a task may fail the response, or cancel a handler that is its sibling.
    pub(crate) fn may_fail(&self) -> bool {
        fn fails(task: &TaskPlan, is_shielded: bool) -> bool {
            let panics =
                matches!(task.kind, Kind::Panics | Kind::PanicsInDrop | Kind::ClosurePanics);
            let matters = match task.on_panic {
                OnPanic::FailResponse => true,
                OnPanic::CancelSiblings => is_shielded,
                _ => false,
            };
            (panics && matters) || task.children.iter().any(|task| fails(task, is_shielded))
        }
        self.tasks.iter().any(|task| fails(task, self.is_shielded))
    }

    pub(crate) fn left_now(&self) {
        // Only the first counts.
        let _ = self.left.set(Instant::now());
    }

    pub(crate) fn ended(&self, end: End) {
        self.end.store(number(end), Relaxed);
    }

    pub(crate) fn has_ended(&self, end: End) -> bool {
        self.end.load(Relaxed) == number(end)
    }
}

pub(crate) fn request_id(id: u64) -> String {
    format!("chaos-{id}")
}

pub(crate) fn trace_id(id: u64) -> String {
    format!("c4a05{:027x}", id + 1)
}

const fn number(end: End) -> u8 {
    match end {
        End::Completed => 1,
        End::Failed => 2,
        End::Panicked => 3,
        End::Disconnected => 4,
        _ => 5,
    }
}

impl TaskPlan {
    fn new(dice: &mut Dice, depth: u32) -> Self {
        let kind = match dice.below(100) {
            0..2 => Kind::Panics,
            2..4 => Kind::PanicsInDrop,
            4..6 => Kind::Blocks,
            6..12 if depth < 3 => Kind::Nests,
            12..14 if depth < 3 => Kind::Groups,
            14..30 => Kind::Waits,
            30..35 => Kind::Graceful,
            35..38 => Kind::IgnoresStop,
            38..40 => Kind::Closure,
            40..41 => Kind::ClosurePanics,
            41..60 => Kind::Sleeps,
            60..80 => Kind::Yields,
            _ => Kind::Ready,
        };
        let of_registry = dice.percent(4);
        // What waits for ever must be told to end by the end of its response.
        let forever = matches!(kind, Kind::Waits | Kind::Graceful | Kind::IgnoresStop);
        let at_end = match dice.below(8) {
            _ if forever && dice.percent(80) => Some(AtEnd::Cancel),
            0 if !forever => Some(AtEnd::Keep),
            1 => Some(AtEnd::Drain(Duration::ZERO)),
            2 => Some(AtEnd::Drain(dice.millis(20))),
            3 => Some(AtEnd::Cancel),
            _ => None,
        };
        let on = (dice.percent(5) && !forever).then_some((End::Disconnected, AtEnd::Keep));
        // A kept parent's child is kept, if nothing else is chosen.
        let needs_timeout = forever && (of_registry || depth > 0);
        let timeout = (dice.percent(5) || needs_timeout).then(|| dice.millis(10));
        let handle = match dice.below(10) {
            0..2 => HandlePlan::Drop,
            2 => HandlePlan::Cancel,
            3 => HandlePlan::Abort,
            _ => HandlePlan::Keep,
        };
        let children = match kind {
            Kind::Nests | Kind::Groups => {
                (0..dice.below(4)).map(|_| Self::new(dice, depth + 1)).collect()
            }
            _ => Vec::new(),
        };
        let on_panic = match dice.below(6) {
            0 => OnPanic::CancelSiblings,
            1 => OnPanic::FailResponse,
            _ => OnPanic::Isolate,
        };
        let is_measured = kind == Kind::Waits
            && depth == 0
            && at_end == Some(AtEnd::Cancel)
            && timeout.is_none()
            && !of_registry
            && matches!(handle, HandlePlan::Keep | HandlePlan::Drop);
        let within = dice.percent(20).then(|| dice.millis(20));
        Self {
            kind,
            at_end,
            on,
            timeout,
            on_panic,
            handle,
            within,
            of_registry,
            children,
            is_measured,
        }
    }

    /// The task that serves an upgraded connection.
    pub(crate) const fn upgraded() -> Self {
        Self {
            kind: Kind::Upgraded,
            at_end: None,
            on: None,
            timeout: None,
            on_panic: OnPanic::Isolate,
            handle: HandlePlan::Keep,
            within: None,
            of_registry: false,
            children: Vec::new(),
            is_measured: false,
        }
    }
}
