//! `two-boxes`: a box around each half of the page, of which the better one counts.
//!
//! Summary: minimum and maximum of the keys of the first and of the second half of the page: twice
//! the bytes of a box.
//! Score: the larger of the two bounds. It still bounds every key of the page, and is never above
//! the score of the one box, because each half's box lies inside it. Attention goes on reading
//! whole pages, whose size suits the memory, while scores see pages half as long.
//! Cost: four vectors a page, so scoring takes twice the time of `box`; among random codes it finds
//! in a fourth of the budget what one box finds.
//! Source: LServe (Yang et al., MLSys 2025), whose pages have logical pages inside.

use super::summary::{self, PageSummary, bounds};
use super::{PageScorer, ScoreCost};
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
        summary::score(self, input, scores);
    }

    fn bytes_read(&self, cost: &ScoreCost) -> usize {
        2 * cost.box_bytes()
    }

    fn summary(&self) -> Option<&dyn PageSummary> {
        Some(self)
    }
}

impl PageSummary for TwoBoxes {
    fn boxes(&self) -> usize {
        2
    }

    fn summarise(&self, keys: &[f32], page_size: usize, corners: &mut [f32]) {
        let dim = corners.len() / 4;
        // What ends in its first half has that half twice.
        let (first, second) = keys.split_at(keys.len().min(page_size.div_ceil(2) * dim));
        let halves = [first, if second.is_empty() { first } else { second }];
        for (keys, corners) in halves.into_iter().zip(corners.chunks_exact_mut(2 * dim)) {
            let (min, max) = corners.split_at_mut(dim);
            bounds(keys, min, max);
        }
    }
}
