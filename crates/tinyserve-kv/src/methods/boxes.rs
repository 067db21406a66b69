//! `box`: the largest product that any key inside the page's bounding box could have.
//!
//! Summary: the channel-wise minimum and maximum of the keys, after rotary embedding.
//! Score: `Σ_d max(q_d·min_d, q_d·max_d)`, an upper bound of `q·k` over the page; it is the only
//! method here that bounds, so a page that is left out cannot hold a better token than its score.
//! The bound is loose where a page's keys differ much: one page of 16 unrelated keys has a box that
//! holds nearly everything.
//! Cost: two vectors a page, beside `2·page_size` of keys and values; a query that has its KV head
//! for itself reads one of them, because its signs say which corner.
//! Sources: Quest (Tang et al., ICML 2024); TinyServe (arXiv 2509.12211), equation 2.

use super::PageScorer;
use crate::SelectInput;

/// See the module.
#[derive(Debug)]
pub(super) struct Box;

impl PageScorer for Box {
    fn name(&self) -> &'static str {
        "box"
    }

    fn about(&self) -> &'static str {
        "upper bound over the page's bounding box (Quest, TinyServe)"
    }

    fn needs_keys(&self) -> bool {
        false
    }

    fn score(&self, input: &SelectInput<'_>, _budget: usize, scores: &mut [f32]) {
        for (query, scores) in input.queries().zip(scores.chunks_exact_mut(input.page_count())) {
            for (page, score) in scores.iter_mut().enumerate() {
                *score = score_box(query, input.min(page), input.max(page));
            }
        }
    }
}

/// Upper bound of `query·key` over every key in the box (equation 2 of arXiv 2509.12211).
///
/// All slices are `[head_dim]`. Terms are added in channel order and rounded one by one, as a plain
/// dot product does it, so against such a product the bound is exact in floating point; against one
/// that adds in another order or fuses it holds to rounding. Terms that overflow to both infinities
/// give NaN, which [`crate::select_pages`] ranks above every number.
#[must_use]
pub fn score_box(query: &[f32], min: &[f32], max: &[f32]) -> f32 {
    debug_assert!(query.len() == min.len() && min.len() == max.len(), "slices [head_dim]");
    query.iter().zip(min.iter().zip(max)).map(|(&q, (&lo, &hi))| (q * lo).max(q * hi)).sum()
}
