//! `mean-std`: the mean key, moved towards the query by one standard deviation in each channel.
//!
//! Summary: channel-wise mean `μ` and standard deviation `σ` of the keys: as many bytes as a box.
//! Score: `q·μ + Σ_d |q_d|·σ_d`. Where keys of a page are alike it ranks pages by what attention
//! would really give them, better than any bound. A single token that stands out is averaged away:
//! with 16 tokens it keeps about 0.3 of its own product, so needles among noise are lost first.
//! Cost: two vectors a page, made from its keys when the page is first scored after a token was
//! written to it.
//! Sources: the estimate of a page's mass from its first two moments (Tactic, arXiv 2502.12216);
//! the linear form, which costs what a box costs, is ours.

use super::PageScorer;
use super::summary::{self, PageSummary, around};
use crate::SelectInput;

/// See the module.
#[derive(Debug)]
pub(super) struct MeanStd;

impl PageScorer for MeanStd {
    fn name(&self) -> &'static str {
        "mean-std"
    }

    fn about(&self) -> &'static str {
        "mean key plus one standard deviation towards the query"
    }

    fn score(&self, input: &SelectInput<'_>, _budget: usize, scores: &mut [f32]) {
        summary::score(self, input, scores);
    }

    fn summary(&self) -> Option<&dyn PageSummary> {
        Some(self)
    }
}

impl PageSummary for MeanStd {
    fn summarise(&self, keys: &[f32], _page_size: usize, corners: &mut [f32]) {
        let mut moments = Moments::default();
        moments.of(keys, corners.len() / 2);
        moments.variance.iter_mut().for_each(|v| *v = v.sqrt());
        around(&moments.mean, &moments.variance, corners);
    }
}

/// Channel-wise mean and variance of a page's keys.
#[derive(Debug, Default)]
pub(crate) struct Moments {
    /// `[head_dim]`.
    pub(crate) mean: Vec<f32>,
    /// `[head_dim]`, never negative.
    pub(crate) variance: Vec<f32>,
}

impl Moments {
    /// Takes them of `keys` `[tokens, head_dim]`.
    pub(crate) fn of(&mut self, keys: &[f32], head_dim: usize) {
        let tokens = (keys.len() / head_dim) as f32;
        for sums in [&mut self.mean, &mut self.variance] {
            sums.clear();
            sums.resize(head_dim, 0.0);
        }
        for key in keys.chunks_exact(head_dim) {
            self.mean.iter_mut().zip(key).for_each(|(mean, &k)| *mean += k / tokens);
        }
        for key in keys.chunks_exact(head_dim) {
            let pairs = key.iter().zip(&self.mean);
            for (variance, (&k, &mean)) in self.variance.iter_mut().zip(pairs) {
                *variance += (k - mean) * (k - mean) / tokens;
            }
        }
    }
}
