//! Where the time of choosing pages goes.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// What choosing pages took since it was last asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct SelectionTimes {
    /// Scoring boxes.
    pub score: Duration,
    /// Turning scores into page lists.
    pub select: Duration,
}

/// Adds up phases while it is switched on; switched off, it costs one load for each.
#[derive(Debug, Default)]
pub(super) struct Clock {
    on: AtomicBool,
    /// Nanoseconds of all threads together.
    score: AtomicU64,
    select: AtomicU64,
    /// Nanoseconds until the last thread was done.
    wall: AtomicU64,
}

impl Clock {
    pub(super) fn switch(&self, on: bool) {
        self.on.store(on, Ordering::Relaxed);
    }

    /// The time now, if anybody wants to know.
    pub(super) fn start(&self) -> Option<Instant> {
        self.on.load(Ordering::Relaxed).then(Instant::now)
    }

    /// The time from `start` to now was spent on scores.
    pub(super) fn scored(&self, start: Option<Instant>) {
        add(&self.score, start);
    }

    /// The time from `start` to now was spent on lists.
    pub(super) fn listed(&self, start: Option<Instant>) {
        add(&self.select, start);
    }

    /// All threads chose from `start` to now.
    pub(super) fn chose(&self, start: Option<Instant>) {
        add(&self.wall, start);
    }

    /// What was added up, which starts again from zero: the wall's time, divided as the threads
    /// spent theirs.
    pub(super) fn take(&self) -> SelectionTimes {
        let take = |sum: &AtomicU64| sum.swap(0, Ordering::Relaxed);
        let (score, select, wall) = (take(&self.score), take(&self.select), take(&self.wall));
        let share = score as f64 / (score + select).max(1) as f64;
        let score = Duration::from_nanos((share * wall as f64) as u64);
        SelectionTimes { score, select: Duration::from_nanos(wall).saturating_sub(score) }
    }
}

fn add(sum: &AtomicU64, start: Option<Instant>) {
    if let Some(start) = start {
        sum.fetch_add(start.elapsed().as_nanos() as u64, Ordering::Relaxed);
    }
}
