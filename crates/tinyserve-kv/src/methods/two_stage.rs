//! `two-stage`: boxes nominate four times the budget, int8 keys decide among the nominees.
//!
//! First stage: the box's bound picks `4 × budget` pages. Second stage: their keys, with 8 bits a
//! channel on the page's own box (`k_d ≈ min_d + code·(max_d − min_d)/255`), give each token's
//! product to within half a step, and a page counts as its best token.
//! It reads one byte a channel of the nominees on top of the boxes, and then ranks nearly as the
//! oracle does, if only the boxes nominate the right pages.
//! Cost: boxes, and a byte a channel of four times the budget's keys; it has no kernel.
//! Sources: the hierarchy of Twilight (arXiv 2502.02770), which prunes a candidate set with
//! quantised keys; the box as the quantiser is ours.

use super::boxes::{self, score_box};
use super::{PageScorer, ScoreCost};
use crate::{SelectInput, select_pages};

/// Pages that are nominated for each page that will be read.
const NOMINEES: usize = 4;

/// See the module.
#[derive(Debug)]
pub(super) struct TwoStage;

impl PageScorer for TwoStage {
    fn name(&self) -> &'static str {
        "two-stage"
    }

    fn about(&self) -> &'static str {
        "boxes nominate 4 x the budget, int8 keys decide (after Twilight)"
    }

    fn score(&self, input: &SelectInput<'_>, budget: usize, scores: &mut [f32]) {
        let (dim, pages) = (input.head_dim(), input.page_count());
        boxes::Box.score(input, budget, scores);
        let best: Vec<f32> = (0..pages)
            .map(|page| scores[page..].iter().step_by(pages).fold(f32::NEG_INFINITY, higher))
            .collect();
        let mut nominees = Vec::new();
        select_pages(&best, NOMINEES.saturating_mul(budget), 0, 0, &mut nominees);
        scores.fill(f32::NEG_INFINITY);
        let mut keys = Vec::new();
        for page in nominees.into_iter().map(|page| page as usize) {
            input.keys(page, &mut keys);
            quantise(&mut keys, input.min(page), input.max(page));
            for (i, query) in input.queries().enumerate() {
                // Both corners are the key: the bound is the product.
                let products = keys.chunks_exact(dim).map(|key| score_box(query, key, key));
                scores[i * pages + page] =
                    products.fold(f32::NEG_INFINITY, |best, score| higher(best, &score));
            }
        }
    }

    fn bytes_read(&self, cost: &ScoreCost) -> usize {
        let nominees = cost.pages.min(NOMINEES.saturating_mul(cost.budget));
        cost.box_bytes() + nominees * cost.page_size * cost.head_dim
    }
}

/// The larger one; a NaN stays, as the only sign that something went wrong.
fn higher(best: f32, score: &f32) -> f32 {
    if *score > best || score.is_nan() { *score } else { best }
}

/// Rounds `keys` `[tokens, head_dim]` to 8 bits a channel on the box.
fn quantise(keys: &mut [f32], min: &[f32], max: &[f32]) {
    for key in keys.chunks_exact_mut(min.len()) {
        for (k, (&lo, &hi)) in key.iter_mut().zip(min.iter().zip(max)) {
            let step = (hi - lo) / 255.0;
            if step > 0.0 {
                *k = lo + ((*k - lo) / step).round().clamp(0.0, 255.0) * step;
            }
        }
    }
}
