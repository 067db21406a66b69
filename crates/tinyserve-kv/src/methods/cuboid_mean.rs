//! `cuboid-mean`: a box around the same centre whose half-extent is the keys' mean distance from it.
//!
//! Summary: the box's centre `c = (min + max)/2` and the channel-wise mean of `|k − c|`: two
//! vectors, as a box has.
//! Score: `q·c + Σ_d |q_d|·mean|k_d − c_d|`. It lies between the mean and the bound. In a channel
//! where one token stands out the centre lies half way to it and all tokens are equally far from
//! the centre, so the token keeps its whole product: needles in channels of their own are found.
//! Where all tokens are spread out it is tighter than the box.
//! Cost: two vectors a page, as those of `mean-std`.
//! Source: ArkVale (Chen et al., NeurIPS 2024), which found it the best of its page digests.

use super::PageScorer;
use super::summary::{self, PageSummary, around, bounds};
use crate::SelectInput;

/// See the module.
#[derive(Debug)]
pub(super) struct CuboidMean;

impl PageScorer for CuboidMean {
    fn name(&self) -> &'static str {
        "cuboid-mean"
    }

    fn about(&self) -> &'static str {
        "box around the centre as wide as the keys' mean distance from it (ArkVale)"
    }

    fn score(&self, input: &SelectInput<'_>, _budget: usize, scores: &mut [f32]) {
        summary::score(self, input, scores);
    }

    fn summary(&self) -> Option<&dyn PageSummary> {
        Some(self)
    }
}

impl PageSummary for CuboidMean {
    fn summarise(&self, keys: &[f32], _page_size: usize, corners: &mut [f32]) {
        let dim = corners.len() / 2;
        let (mut centre, mut high) = (vec![0.0; dim], vec![0.0; dim]);
        bounds(keys, &mut centre, &mut high);
        centre.iter_mut().zip(&high).for_each(|(c, &hi)| *c = 0.5 * *c + 0.5 * hi);
        let (mut spread, tokens) = (high, (keys.len() / dim) as f32);
        spread.fill(0.0);
        for key in keys.chunks_exact(dim) {
            let pairs = key.iter().zip(&centre);
            spread.iter_mut().zip(pairs).for_each(|(s, (&k, &c))| *s += (k - c).abs() / tokens);
        }
        around(&centre, &spread, corners);
    }
}
