//! `streaming`: the first pages and the last ones, whatever the query is.
//!
//! Summary: none; nothing is scored.
//! Score: the page's number, so that the budget beyond the sink pages goes to the newest pages.
//! Its cost does not grow with the context, and language stays fluent, because attention sinks and
//! neighbours hold most of the mass; but what left the window is gone, so it cannot look up
//! anything outside it.
//! Cost: nothing is read but the window.
//! Source: StreamingLLM (Xiao et al., ICLR 2024). Positions are those of the whole text, where
//! StreamingLLM renumbers what is left.

use super::{PageScorer, ScoreCost};
use crate::SelectInput;

/// See the module.
#[derive(Debug)]
pub(super) struct Streaming;

impl PageScorer for Streaming {
    fn name(&self) -> &'static str {
        "streaming"
    }

    fn about(&self) -> &'static str {
        "sink pages and the newest ones (StreamingLLM)"
    }

    fn needs_keys(&self) -> bool {
        false
    }

    fn score(&self, input: &SelectInput<'_>, _budget: usize, scores: &mut [f32]) {
        for scores in scores.chunks_exact_mut(input.page_count()) {
            scores.iter_mut().enumerate().for_each(|(page, score)| *score = page as f32);
        }
    }

    fn bytes_read(&self, _cost: &ScoreCost) -> usize {
        0
    }
}
