//! Boxes that stand for a page: what a scorer keeps so that it need not read the keys again.

use super::for_each_page;
use crate::{SelectInput, score_box};

/// How a scorer sums up a page whose tokens do not change any more.
///
/// A page's score is the largest of its boxes' `Σ_d max(q_d·min_d, q_d·max_d)`. So whatever is
/// linear in the query and in its absolute value is such a box, `q·c + |q|·s` the one from `c − s`
/// to `c + s`; and backends, which keep these boxes as they keep those of the keys, score them with
/// the kernels that they have.
pub trait PageSummary: Send + Sync {
    /// Boxes of one page.
    fn boxes(&self) -> usize {
        1
    }

    /// Fills `corners` `[boxes, 2 (min, max), head_dim]` for a page of `page_size` tokens whose keys
    /// are `keys` `[tokens, head_dim]`, fewer in the last page of a sequence.
    fn summarise(&self, keys: &[f32], page_size: usize, corners: &mut [f32]);
}

/// Fills `scores` `[group, pages]` by summing up every page anew: the reference of kernels that
/// read kept summaries.
pub(super) fn score(summary: &dyn PageSummary, input: &SelectInput<'_>, scores: &mut [f32]) {
    let (dim, pages) = (input.head_dim(), input.page_count());
    let mut corners = vec![0.0; summary.boxes() * 2 * dim];
    scores.fill(f32::NEG_INFINITY);
    for_each_page(input, |page, keys| {
        summary.summarise(keys, input.page_size(), &mut corners);
        for corners in corners.chunks_exact(2 * dim) {
            let (min, max) = corners.split_at(dim);
            for (i, query) in input.queries().enumerate() {
                let (score, best) = (score_box(query, min, max), &mut scores[i * pages + page]);
                // A score that is not a number bounds nothing, and stays.
                if score > *best || score.is_nan() {
                    *best = score;
                }
            }
        }
    });
}

/// Makes the box from `centre − spread` to `centre + spread`.
pub(super) fn around(centre: &[f32], spread: &[f32], corners: &mut [f32]) {
    let (min, max) = corners.split_at_mut(centre.len());
    for (d, (&centre, &spread)) in centre.iter().zip(spread).enumerate() {
        (min[d], max[d]) = (centre - spread, centre + spread);
    }
}

/// Makes `min` and `max`, `[head_dim]` each, those of `keys` `[tokens, head_dim]`.
pub(super) fn bounds(keys: &[f32], min: &mut [f32], max: &mut [f32]) {
    let dim = min.len();
    min.copy_from_slice(&keys[..dim]);
    max.copy_from_slice(&keys[..dim]);
    for key in keys.chunks_exact(dim).skip(1) {
        for ((min, max), &k) in min.iter_mut().zip(max.iter_mut()).zip(key) {
            // A NaN key bounds nothing, and stays.
            *min = if k < *min || k.is_nan() { k } else { *min };
            *max = if k > *max || k.is_nan() { k } else { *max };
        }
    }
}
