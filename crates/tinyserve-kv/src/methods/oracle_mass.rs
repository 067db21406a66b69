//! `oracle-mass`: the true share of attention that the page holds.
//!
//! Summary: none; every key is read, so it saves nothing and no kernel would do it.
//! Score: the logarithm of the page's share of the softmax, over the attention scale, so that all
//! scores are in units of `q·k`. No selection of whole pages holds more attention mass at the same
//! budget (for one query head; a group shares its list). The recall of every other method is to be
//! read against this one's.
//! Cost: all keys, half of what dense attention reads, and an exponential for each of them, for
//! every query head.
//! Source: the upper bound of Twilight's and MagicPIG's figures.

use super::{PageScorer, ScoreCost, dot, for_each_page};
use crate::SelectInput;

/// See the module.
#[derive(Debug)]
pub(super) struct OracleMass;

impl PageScorer for OracleMass {
    fn name(&self) -> &'static str {
        "oracle-mass"
    }

    fn about(&self) -> &'static str {
        "true attention mass of the page: reads all keys"
    }

    fn score(&self, input: &SelectInput<'_>, _budget: usize, scores: &mut [f32]) {
        let pages = input.page_count();
        let scale = input.scale();
        for_each_page(input, |page, keys| {
            for (i, query) in input.queries().enumerate() {
                let logits = keys.chunks_exact(query.len()).map(|key| scale * dot(query, key));
                scores[i * pages + page] = log_sum_exp(logits);
            }
        });
        for scores in scores.chunks_exact_mut(pages) {
            let total = log_sum_exp(scores.iter().copied());
            scores.iter_mut().for_each(|score| *score = (*score - total) / scale);
        }
    }

    fn bytes_read(&self, cost: &ScoreCost) -> usize {
        cost.pages * cost.page_size * cost.vector_bytes
    }
}

/// `ln Σ exp(x)`; `−∞` of nothing.
pub(crate) fn log_sum_exp(logits: impl Iterator<Item = f32> + Clone) -> f32 {
    let peak = logits.clone().fold(f32::NEG_INFINITY, f32::max);
    if peak == f32::NEG_INFINITY {
        return peak;
    }
    let sum: f64 = logits.map(|x| f64::from(x - peak).exp()).sum();
    peak + sum.ln() as f32
}
