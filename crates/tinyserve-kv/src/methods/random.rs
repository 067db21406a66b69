//! `random`: pages by lot.
//!
//! Summary: none; nothing is scored.
//! Score: a hash of the step, the layer, the head, the queries and the page: fresh at every step,
//! and the same whenever a run is repeated.
//! Cost: nothing is read but the pages that are drawn; of needles it finds, in the mean, its budget
//! in percent.
//! It is the floor: a method that does not beat it has learned nothing from its summaries, and a
//! test that it passes does not need the pages that it leaves out.
//! Source: the random baseline of every table on the subject.

use super::{PageScorer, ScoreCost};
use crate::SelectInput;

/// See the module.
#[derive(Debug)]
pub(super) struct Random;

impl PageScorer for Random {
    fn name(&self) -> &'static str {
        "random"
    }

    fn about(&self) -> &'static str {
        "pages by lot, fresh at every step"
    }

    fn needs_keys(&self) -> bool {
        false
    }

    fn score(&self, input: &SelectInput<'_>, _budget: usize, scores: &mut [f32]) {
        let step = [input.layer(), input.kv_head(), input.tokens()];
        let mut seed = step.iter().fold(0, |hash, &x| mix(hash ^ x as u64));
        for &q in input.queries().flatten() {
            seed = mix(seed ^ u64::from(q.to_bits()));
        }
        // The group shares one draw: otherwise the best of several would be no even lot.
        for scores in scores.chunks_exact_mut(input.page_count()) {
            for (page, score) in scores.iter_mut().enumerate() {
                *score = (mix(seed ^ page as u64) >> 40) as f32;
            }
        }
    }

    fn bytes_read(&self, _cost: &ScoreCost) -> usize {
        0
    }
}

/// The finalizer of SplitMix64.
fn mix(x: u64) -> u64 {
    let x = x.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}
