//! Times, counted in fixed memory.

use std::{
    sync::atomic::{AtomicU64, Ordering::Relaxed},
    time::Duration,
};

/// Counts times in steps of an eighth of their size.
#[derive(Debug)]
pub(crate) struct Histogram {
    steps: [AtomicU64; 512],
    max: AtomicU64,
}

impl Histogram {
    pub(crate) const fn new() -> Self {
        Self { steps: [const { AtomicU64::new(0) }; 512], max: AtomicU64::new(0) }
    }

    pub(crate) fn add(&self, time: Duration) {
        let nanos = u64::try_from(time.as_nanos()).unwrap_or(u64::MAX);
        self.steps[step(nanos)].fetch_add(1, Relaxed);
        self.max.fetch_max(nanos, Relaxed);
    }

    pub(crate) fn count(&self) -> u64 {
        self.steps.iter().map(|step| step.load(Relaxed)).sum()
    }

    pub(crate) fn max(&self) -> Duration {
        Duration::from_nanos(self.max.load(Relaxed))
    }

    /// Not less than this share of all, in thousandths, took at most so long.
    pub(crate) fn quantile(&self, thousandths: u64) -> Duration {
        let wanted = (self.count() * thousandths).div_ceil(1000).max(1);
        let mut seen = 0;
        for (index, step) in self.steps.iter().enumerate() {
            seen += step.load(Relaxed);
            if seen >= wanted {
                return Duration::from_nanos(upper(index)).min(self.max());
            }
        }
        self.max()
    }
}

/// Three bits after the first one.
const fn step(nanos: u64) -> usize {
    let nanos = if nanos < 8 { 8 } else { nanos };
    let log = nanos.ilog2();
    (log as usize) * 8 + ((nanos >> (log - 3)) & 7) as usize
}

const fn upper(step: usize) -> u64 {
    let (log, eighth) = (step / 8, step as u64 % 8);
    if log < 3 { 8 } else { (9 + eighth).saturating_mul(1 << (log - 3)) }
}
