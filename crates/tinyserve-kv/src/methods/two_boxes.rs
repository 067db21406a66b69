//! `two-boxes`: a box around each half of the page, of which the better one counts.
//!
//! Summary: minimum and maximum of the keys of the first and of the second half of the page: twice
//! the bytes of a box.
//! Score: the larger of the two bounds. It still bounds every key of the page, and is never above
//! the score of the one box, because each half's box lies inside it. Attention goes on reading
//! whole pages, whose size suits the memory, while scores see pages half as long.
//! Source: LServe (Yang et al., MLSys 2025), whose pages have logical pages inside.

use super::boxes::score_box;
use super::{PageScorer, ScoreCost, for_each_page};
use crate::SelectInput;

/// See the module.
#[derive(Debug)]
pub(super) struct TwoBoxes;

impl PageScorer for TwoBoxes {
    fn name(&self) -> &'static str {
        "two-boxes"
    }

    fn about(&self) -> &'static str {
        "the better of the bounds over the page's two halves (LServe)"
    }

    fn score(&self, input: &SelectInput<'_>, _budget: usize, scores: &mut [f32]) {
        let (dim, pages) = (input.head_dim(), input.page_count());
        let (mut min, mut max) = (vec![0.0; dim], vec![0.0; dim]);
        scores.fill(f32::NEG_INFINITY);
        for_each_page(input, |page, keys| {
            // A page of one token has one half.
            let half = input.page_size().div_ceil(2) * dim;
            for keys in keys.chunks(half) {
                min.copy_from_slice(&keys[..dim]);
                max.copy_from_slice(&keys[..dim]);
                for key in keys.chunks_exact(dim) {
                    for ((min, max), &k) in min.iter_mut().zip(&mut max).zip(key) {
                        // A NaN key bounds nothing, and stays.
                        *min = if k < *min || k.is_nan() { k } else { *min };
                        *max = if k > *max || k.is_nan() { k } else { *max };
                    }
                }
                for (i, query) in input.queries().enumerate() {
                    let (score, best) =
                        (score_box(query, &min, &max), &mut scores[i * pages + page]);
                    if score > *best || score.is_nan() {
                        *best = score;
                    }
                }
            }
        });
    }

    fn bytes_read(&self, cost: &ScoreCost) -> usize {
        4 * cost.pages * cost.vector_bytes
    }
}
