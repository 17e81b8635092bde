use std::{error::Error, fmt, time::Duration};

use tokio::time::Instant;

/// How long destructors have after the end of the budget, and after a second signal.
const LAST: Duration = Duration::from_millis(100);
const LAST_IN_A_HURRY: Duration = Duration::from_millis(50);
/// And each time that requests and tasks have become fewer, for there may be very many; and at most.
const LAST_MORE: Duration = Duration::from_millis(25);
const LAST_MAX: Duration = Duration::from_secs(1);
/// The time of graceful tasks to end once they are told, unless chosen otherwise: a fifth of the
/// budget, but no more than this.
const GRACE_MAX: Duration = Duration::from_secs(1);

/// What the budget is spent on.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Plan {
    pub(crate) budget: Duration,
    pub(crate) settle: Duration,
    pub(crate) grace: Option<Duration>,
}

impl Plan {
    pub(crate) fn check(&self) -> Result<(), PlanError> {
        let Self { budget, settle, .. } = *self;
        let grace = self.grace.unwrap_or_default();
        if settle.checked_add(grace).is_some_and(|needed| needed <= budget) {
            Ok(())
        } else {
            Err(PlanError { budget, settle, grace })
        }
    }

    /// When each phase is over, from the beginning on.
    fn ends(&self) -> [Duration; 4] {
        let Self { budget, settle, grace } = *self;
        let left = budget.saturating_sub(settle);
        let grace = grace.unwrap_or((budget / 5).min(GRACE_MAX)).min(left);
        [settle.min(budget), budget.saturating_sub(grace), budget, budget.saturating_add(LAST)]
    }
}

/// The settle delay and the grace take more than the budget has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PlanError {
    budget: Duration,
    settle: Duration,
    grace: Duration,
}

impl fmt::Display for PlanError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { budget, settle, grace } = self;
        write!(
            f,
            "the shutdown's budget of {budget:?} is less than its settle delay of {settle:?} and \
             its grace of {grace:?}"
        )
    }
}

impl Error for PlanError {}

/// What a shutdown is at. One comes after the other, and none comes back.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Phase {
    /// It has begun, and the server serves on, so that load balancers can see it.
    Settling,
    /// The server accepts nothing; requests and tasks go on.
    Draining,
    /// Requests and tasks were told to end.
    Cancelling,
    /// The grace is over.
    Aborting,
    Over,
}

/// The course of one shutdown: a plan, from its beginning on.
///
/// It knows no clock and no server: it is told.
#[derive(Debug)]
pub(crate) struct Course {
    phase: Phase,
    /// Of the phases until `Over`, each one's end. `None` is never.
    ends: [Option<Instant>; 4],
}

impl Course {
    pub(crate) fn new(plan: &Plan, began: Instant) -> Self {
        let mut ends = plan.ends().map(|end| began.checked_add(end));
        if ends[Phase::Cancelling as usize].is_none() {
            // A grace before that never begins, however long it is.
            ends[Phase::Draining as usize] = None;
        }
        Self { phase: Phase::Settling, ends }
    }

    pub(crate) const fn phase(&self) -> Phase {
        self.phase
    }

    /// When the phase is over at the latest.
    pub(crate) const fn end(&self) -> Option<Instant> {
        match self.phase {
            Phase::Over => None,
            phase => self.ends[phase as usize],
        }
    }

    /// When the budget is spent.
    pub(crate) const fn deadline(&self) -> Option<Instant> {
        self.ends[Phase::Cancelling as usize]
    }

    /// What was told to end does so, but is not done: it has another while, and so on, up to a bound.
    pub(crate) fn go_on(&mut self, now: Instant) {
        let most = self.deadline().and_then(|deadline| deadline.checked_add(LAST_MAX));
        let end = &mut self.ends[Phase::Aborting as usize];
        *end = (*end).max(now.checked_add(LAST_MORE)).into_iter().chain(most).min();
    }

    /// The server accepts nothing already: there is nobody to wait for a load balancer for.
    pub(crate) fn skip_settling(&mut self, now: Instant) {
        self.bring_forward(Phase::Settling, now);
    }

    /// What would come at the deadline comes now.
    pub(crate) fn hurry(&mut self, now: Instant) {
        self.bring_forward(Phase::Cancelling, now);
        self.bring_forward_to(Phase::Aborting, now.checked_add(LAST_IN_A_HURRY));
    }

    /// Moves on by one phase if it is time to, or if there is nothing left to wait for.
    pub(crate) fn step(&mut self, now: Instant, done: bool) -> Option<Phase> {
        use Phase::{Aborting, Cancelling, Draining, Over, Settling};
        let is_over = self.end().is_some_and(|end| end <= now);
        self.phase = match self.phase {
            Settling if is_over => Draining,
            Draining | Cancelling | Aborting if done => Over,
            Draining if is_over => Cancelling,
            Cancelling if is_over => Aborting,
            Aborting if is_over => Over,
            Settling | Draining | Cancelling | Aborting | Over => return None,
        };
        Some(self.phase)
    }

    /// This phase, and those before it, end at `at`, if they would not earlier.
    fn bring_forward(&mut self, last: Phase, at: Instant) {
        for end in &mut self.ends[..=last as usize] {
            *end = Some(end.map_or(at, |end| end.min(at)));
        }
    }

    fn bring_forward_to(&mut self, phase: Phase, at: Option<Instant>) {
        let end = &mut self.ends[phase as usize];
        *end = (*end).into_iter().chain(at).min();
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use std::iter;

    use Phase::{Aborting, Cancelling, Draining, Over};

    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    const fn plan(budget: u64, settle: u64, grace: Option<u64>) -> Plan {
        Plan {
            budget: Duration::from_secs(budget),
            settle: Duration::from_secs(settle),
            grace: match grace {
                Some(grace) => Some(Duration::from_secs(grace)),
                None => None,
            },
        }
    }

    /// The phases that are entered when nothing is ever done, and when.
    fn phases(course: &mut Course, began: Instant) -> Vec<(Phase, Duration)> {
        let mut now = began;
        iter::from_fn(|| {
            if let Some(end) = course.end() {
                assert_eq!(course.step(end - Duration::from_nanos(1), false), None);
                now = now.max(end);
            }
            course.step(now, false).map(|phase| (phase, now - began))
        })
        .collect()
    }

    #[test]
    fn each_phase_takes_what_it_needs_of_the_one_budget() {
        let began = Instant::now();
        let of = |plan: Plan| phases(&mut Course::new(&plan, began), began);
        let at = |budget, [draining, cancelling]: [u64; 2]| {
            let budget = Duration::from_secs(budget);
            vec![
                (Draining, Duration::from_secs(draining)),
                (Cancelling, Duration::from_secs(cancelling)),
                (Aborting, budget),
                (Over, budget + LAST),
            ]
        };
        assert_eq!(of(plan(25, 0, None)), at(25, [0, 24]));
        assert_eq!(of(plan(25, 5, None)), at(25, [5, 24]));
        assert_eq!(of(plan(25, 5, Some(10))), at(25, [5, 15]));
        assert_eq!(of(plan(25, 5, Some(20))), at(25, [5, 5]));
        assert_eq!(of(plan(25, 5, Some(0))), at(25, [5, 25]));
        assert_eq!(of(plan(0, 0, None)), at(0, [0, 0]));
        let short = Plan { budget: SECOND, ..plan(0, 0, None) };
        assert_eq!(of(short)[1], (Cancelling, SECOND * 4 / 5), "the grace is a fifth");
    }

    #[test]
    fn a_plan_that_cannot_fit_is_an_error_and_then_the_budget_counts() {
        assert_eq!(plan(25, 5, Some(20)).check(), Ok(()));
        assert_eq!(plan(0, 0, None).check(), Ok(()));
        assert_eq!(plan(25, 25, None).check(), Ok(()));
        let huge = Plan { settle: Duration::MAX, ..plan(25, 0, Some(1)) };
        for unfit in [plan(25, 5, Some(21)), plan(25, 26, None), plan(0, 0, Some(1)), huge] {
            let error = unfit.check().expect_err("it is too much").to_string();
            assert!(error.contains("budget"), "{error}");
            let began = Instant::now();
            let over = phases(&mut Course::new(&unfit, began), began).pop();
            assert_eq!(over, Some((Over, unfit.budget + LAST)));
        }
    }

    #[test]
    fn what_is_done_is_over_but_the_settle_delay_is_waited_for() {
        let began = Instant::now();
        let mut course = Course::new(&plan(25, 5, None), began);
        assert_eq!(course.step(began + 4 * SECOND, true), None);
        assert_eq!(course.step(began + 5 * SECOND, true), Some(Draining));
        assert_eq!(course.step(began + 5 * SECOND, true), Some(Over));
        assert_eq!((course.step(began + 99 * SECOND, true), course.end()), (None, None));

        let mut course = Course::new(&plan(25, 5, None), began);
        course.skip_settling(began + SECOND);
        assert_eq!(course.step(began + SECOND, false), Some(Draining));
        assert_eq!(course.end(), Some(began + 24 * SECOND), "the rest is as planned");
    }

    #[test]
    fn a_budget_without_an_end_is_waited_for() {
        let began = Instant::now();
        let endless = Plan { budget: Duration::MAX, ..plan(0, 0, None) };
        let mut graceful = Course::new(&Plan { grace: Some(Duration::MAX), ..endless }, began);
        assert_eq!(graceful.step(began, false), Some(Draining));
        assert_eq!(graceful.end(), None);
        let mut course = Course::new(&endless, began);
        assert_eq!(course.step(began, false), Some(Draining));
        assert_eq!(course.end(), None);
        assert_eq!(course.step(began + SECOND * 1_000_000_000, false), None);
        let now = began + SECOND;
        course.hurry(now);
        assert_eq!(course.step(now, false), Some(Cancelling));
        assert_eq!(course.step(now, false), Some(Aborting));
        assert_eq!(course.step(now + LAST_IN_A_HURRY, false), Some(Over));
    }

    #[test]
    fn what_becomes_fewer_has_another_while_but_a_second_at_most() {
        let began = Instant::now();
        let mut course = Course::new(&plan(0, 0, None), began);
        while course.step(began, false).is_some() {}
        let mut now = began;
        for _ in 0..100 {
            now = course.end().expect("it has one");
            course.go_on(now);
        }
        assert_eq!(now, began + LAST_MAX);
        assert_eq!(course.step(now, false), Some(Over));
    }

    #[test]
    fn a_second_signal_brings_the_deadline_forward_and_never_back() {
        let began = Instant::now();
        for settled in [false, true] {
            let mut course = Course::new(&plan(25, 5, None), began);
            let now = began + SECOND * if settled { 6 } else { 1 };
            while course.step(now, false).is_some() {}
            course.hurry(now);
            course.hurry(now + SECOND);
            let mut entered = Vec::new();
            entered.extend(iter::from_fn(|| course.step(now, false)));
            assert_eq!(entered, [Draining, Cancelling, Aborting][usize::from(settled)..]);
            assert_eq!(course.end(), Some(now + LAST_IN_A_HURRY));
        }

        let mut course = Course::new(&plan(25, 5, None), began);
        let late = began + 25 * SECOND + LAST;
        course.hurry(late);
        let over = phases(&mut course, began).pop();
        assert_eq!(over, Some((Over, 25 * SECOND + LAST)), "it is no reason to wait longer");
    }
}
