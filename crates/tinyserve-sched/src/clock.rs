//! Time, which tests may move by hand.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant, SystemTime};

/// Where a scheduler reads the time.
#[derive(Debug, Clone, Default)]
pub struct Clock(Option<Arc<Manual>>);

#[derive(Debug)]
struct Manual {
    start: Instant,
    start_of_day: SystemTime,
    nanoseconds: AtomicU64,
}

impl Clock {
    /// The system's clock.
    #[must_use]
    pub fn system() -> Self {
        Self(None)
    }

    /// A clock that stands still between calls of [`Self::advance`].
    #[must_use]
    pub fn manual() -> Self {
        Self(Some(Arc::new(Manual {
            start: Instant::now(),
            start_of_day: SystemTime::UNIX_EPOCH,
            nanoseconds: AtomicU64::new(0),
        })))
    }

    /// Moves a manual clock; the system's clock moves by itself.
    pub fn advance(&self, by: Duration) {
        if let Some(manual) = &self.0 {
            manual.nanoseconds.fetch_add(by.as_nanos() as u64, Ordering::Relaxed);
        }
    }

    /// The time, for differences.
    #[must_use]
    pub fn now(&self) -> Instant {
        self.0.as_ref().map_or_else(Instant::now, |manual| manual.start + manual.elapsed())
    }

    /// The time of day.
    #[must_use]
    pub fn time_of_day(&self) -> SystemTime {
        let manual = self.0.as_ref().map(|manual| manual.start_of_day + manual.elapsed());
        manual.unwrap_or_else(SystemTime::now)
    }
}

impl Manual {
    fn elapsed(&self) -> Duration {
        Duration::from_nanos(self.nanoseconds.load(Ordering::Relaxed))
    }
}
