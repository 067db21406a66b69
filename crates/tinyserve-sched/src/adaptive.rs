//! Moves the selection budget so that decode steps keep to a latency.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use tinyserve_kv::Budget;

use crate::AdmissionError;
use crate::config::setting;

/// Steps whose median decides about a move.
const WINDOW: usize = 16;
/// What a budget is multiplied by when steps take too long.
const DOWN: f64 = 0.8;
/// What it is multiplied by when there is time to spare.
const UP: f64 = 1.1;
/// Share of the target below which there is time to spare.
///
/// A step's time is at most proportional to the budget, so no move leaps over the band between this
/// share and the target: `DOWN` takes a step that is too slow to no less than it, `UP` takes a step
/// that is faster to no more than `UP · SPARE < 1` times the target. Under a constant load the
/// budget therefore comes to rest, at a bound or in the band.
const SPARE: f64 = DOWN;

/// How the budget of the engine's selection policy follows a latency.
///
/// Requests that bring a policy of their own keep it. What a request reads then depends on how fast
/// the machine was, so the same seed may give another text.
#[derive(Clone)]
pub struct Adaptive {
    /// Time of a decode step, which is the time per generated token of whoever is in it, that is
    /// not to be exceeded.
    pub target: Duration,
    /// Least budget, as a multiple of the stated one; above 0 and at most 1.
    pub min_budget: f64,
    /// Largest budget, as a multiple of the stated one; at least 1. No ratio exceeds 1.
    pub max_budget: f64,
    /// Told every move, on the engine's thread.
    pub on_move: Arc<dyn Fn(&BudgetMove) + Send + Sync>,
}

impl fmt::Debug for Adaptive {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { target, min_budget, max_budget, .. } = self;
        let mut shown = f.debug_struct("Adaptive");
        let shown = shown.field("target", target).field("min_budget", min_budget);
        shown.field("max_budget", max_budget).finish_non_exhaustive()
    }
}

impl Adaptive {
    /// Checks every value.
    ///
    /// # Errors
    /// [`AdmissionError::Setting`] naming the first value that is out of its range.
    pub(crate) fn check(&self) -> Result<(), AdmissionError> {
        if self.target.is_zero() {
            return Err(setting("target_latency_ms", 0, "above 0"));
        }
        if !(self.min_budget > 0.0 && self.min_budget <= 1.0) {
            return Err(setting("adaptive_min_budget", self.min_budget, "above 0 and at most 1"));
        }
        if !(self.max_budget >= 1.0 && self.max_budget.is_finite()) {
            return Err(setting("adaptive_max_budget", self.max_budget, "at least 1"));
        }
        Ok(())
    }
}

/// The budget was moved.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct BudgetMove {
    /// What it was.
    pub from: Budget,
    /// What it is.
    pub to: Budget,
    /// Median time of the decode steps since the move before.
    pub measured: Duration,
    /// What it is compared with.
    pub target: Duration,
}

impl fmt::Display for BudgetMove {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (self.from, self.to) {
            (Budget::Tokens(from), Budget::Tokens(to)) => write!(f, "token_budget {from} → {to}")?,
            (Budget::TopP(from), Budget::TopP(to)) => write!(f, "top_p_pages {from:.3} → {to:.3}")?,
            (from, to) => write!(f, "selection_ratio {:.3} → {:.3}", share(from), share(to))?,
        }
        let [measured, target] = [self.measured, self.target].map(|time| time.as_secs_f64() * 1e3);
        write!(f, ": {measured:.3} ms per token, target {target:.3} ms")
    }
}

/// The number of a budget that is a share.
fn share(budget: Budget) -> f64 {
    match budget {
        Budget::Ratio(share) | Budget::TopP(share) => share,
        Budget::Tokens(tokens) => tokens as f64,
    }
}

/// Decides about moves.
#[derive(Debug)]
pub(crate) struct Controller {
    settings: Adaptive,
    stated: Budget,
    /// The budget, as a multiple of the stated one.
    multiple: f64,
    most: f64,
    steps: Vec<Duration>,
}

impl Controller {
    /// A controller that starts at the stated budget.
    pub(crate) fn new(settings: Adaptive, stated: Budget) -> Self {
        let most = match stated {
            Budget::Ratio(share) | Budget::TopP(share) => settings.max_budget.min(1.0 / share),
            Budget::Tokens(_) => settings.max_budget,
        };
        Self { settings, stated, multiple: 1.0, most, steps: Vec::with_capacity(WINDOW) }
    }

    /// The budget now.
    pub(crate) fn budget(&self) -> Budget {
        match self.stated {
            Budget::Ratio(share) => Budget::Ratio((share * self.multiple).min(1.0)),
            Budget::TopP(share) => Budget::TopP((share * self.multiple).min(1.0)),
            Budget::Tokens(tokens) => {
                Budget::Tokens(((tokens as f64 * self.multiple).round() as usize).max(1))
            }
        }
    }

    /// Notes what a decode step took in which the budget mattered; tells the move that follows.
    pub(crate) fn note(&mut self, step: Duration) -> Option<BudgetMove> {
        self.steps.push(step);
        if self.steps.len() < WINDOW {
            return None;
        }
        // One slow step in the window, or one in which recall was measured, moves nothing.
        self.steps.sort_unstable();
        let measured = self.steps[WINDOW / 2];
        self.steps.clear();
        let target = self.settings.target;
        let multiple = if measured > target {
            (self.multiple * DOWN).max(self.settings.min_budget)
        } else if measured < target.mul_f64(SPARE) {
            (self.multiple * UP).min(self.most)
        } else {
            return None;
        };
        let from = self.budget();
        self.multiple = multiple;
        let to = self.budget();
        if from == to {
            return None;
        }
        let moved = BudgetMove { from, to, measured, target };
        (self.settings.on_move)(&moved);
        Some(moved)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use proptest::prelude::*;

    use super::*;

    fn settings(target_ms: f64, min_budget: f64, max_budget: f64) -> Adaptive {
        let target = Duration::from_secs_f64(target_ms / 1e3);
        Adaptive { target, min_budget, max_budget, on_move: Arc::new(|_| {}) }
    }

    fn stated() -> impl Strategy<Value = Budget> {
        prop_oneof![
            (0.01..=1.0).prop_map(Budget::Ratio),
            (0.01..=1.0).prop_map(Budget::TopP),
            (1..5000_usize).prop_map(Budget::Tokens),
        ]
    }

    proptest! {
        #[test]
        fn whatever_steps_take_the_budget_stays_within_its_bounds(
            stated in stated(),
            (min, max) in (0.05..=1.0, 1.0..4.0),
            steps in prop::collection::vec(0.0..100.0_f64, 0..600),
        ) {
            let told = Arc::new(Mutex::new(Vec::new()));
            let tell = Arc::clone(&told);
            let on_move = Arc::new(move |moved: &BudgetMove| tell.lock().unwrap().push(*moved));
            let mut controller = Controller::new(Adaptive { on_move, ..settings(10.0, min, max) }, stated);
            let (mut moves, mut now) = (Vec::new(), controller.budget());
            prop_assert_eq!(now, stated, "it starts at what is stated");
            for ms in steps {
                let moved = controller.note(Duration::from_secs_f64(ms / 1e3));
                moves.extend(moved);
                if let Some(moved) = moved {
                    prop_assert_eq!(moved.from, now);
                    now = moved.to;
                }
                prop_assert_eq!(controller.budget(), now, "nothing moves unsaid");
                // Token budgets are whole.
                let slack = if matches!(stated, Budget::Tokens(_)) { 0.5 } else { 1e-9 };
                let (least, most) = (share(stated) * min - slack, share(stated) * max + slack);
                let found = share(now);
                prop_assert!(found >= least && found <= most, "{found} of {least} to {most}");
                prop_assert!(matches!(now, Budget::Tokens(1..)) || found <= 1.0);
            }
            prop_assert_eq!(&*told.lock().unwrap(), &moves, "each move is told once");
        }

        /// Any machine whose steps take a fixed time and more in proportion to what they read.
        #[test]
        fn under_a_constant_load_it_comes_to_rest_where_it_should(
            fixed in 0.0..20.0_f64,
            reading in 0.1..200.0_f64,
            ratio in 0.02..=1.0_f64,
            (min, max) in (0.05..=1.0, 1.0..4.0),
        ) {
            let mut controller = Controller::new(settings(10.0, min, max), Budget::Ratio(ratio));
            let took = |controller: &Controller| fixed + reading * share(controller.budget());
            let mut last_move = 0;
            for step in 0..2000 {
                let ms = took(&controller);
                if controller.note(Duration::from_secs_f64(ms / 1e3)).is_some() {
                    last_move = step;
                }
            }
            prop_assert!(last_move < 1000, "it does not hunt");
            let (ms, now) = (took(&controller), share(controller.budget()));
            let (least, most) = (ratio * min, (ratio * max).min(1.0));
            let at = |bound: f64| (now - bound).abs() < 1e-9;
            prop_assert!(ms <= 10.0 + 1e-6 || at(least), "{ms} ms at {now}");
            prop_assert!(ms >= 8.0 - 1e-6 || at(most), "{ms} ms at {now}");
        }
    }

    #[test]
    fn one_slow_step_moves_nothing() {
        let mut controller = Controller::new(settings(10.0, 0.25, 1.0), Budget::Ratio(0.3));
        for step in 0..200 {
            let ms = if step % 5 == 0 { 500 } else { 9 };
            assert_eq!(controller.note(Duration::from_millis(ms)), None);
        }
    }

    #[test]
    fn a_move_is_told_in_a_sentence() {
        let mut controller = Controller::new(settings(50.0, 0.25, 1.0), Budget::Ratio(0.3));
        let moved = (0..WINDOW).find_map(|_| controller.note(Duration::from_micros(62_100)));
        assert_eq!(
            moved.unwrap().to_string(),
            "selection_ratio 0.300 → 0.240: 62.100 ms per token, target 50.000 ms"
        );
    }
}
