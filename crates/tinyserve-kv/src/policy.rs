//! Selection policies: which pages a decode step reads, as data that every backend can run.

use crate::top_p::{estimated_mass, select_mass};
use crate::{KvError, PageSelector, ScoreCost, Scorer, SelectInput, score_box, select_pages};

/// How many pages are read.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Budget {
    /// `max(1, floor(ratio × pages))`, where 0.29 of 100 pages is 29 although 0.29 has no exact
    /// binary form and the product is 28.999….
    Ratio(f64),
    /// As many whole pages as this many tokens fill, at least one.
    Tokens(usize),
    /// The best pages until the estimated attention mass reaches this share (Twilight, Tactic).
    TopP(f64),
}

impl Budget {
    /// Pages that may be read out of `pages`, always-kept pages included: at least 1, and no more
    /// than there are. Top-p may read them all.
    ///
    /// # Panics
    /// When a token budget meets a `page_size` of zero.
    #[must_use]
    pub fn pages(self, pages: usize, page_size: usize) -> usize {
        let budget = match self {
            // The ratio and the product are each off by half an ulp at most.
            Self::Ratio(ratio) => (ratio * pages as f64 * (1.0 + 2.0 * f64::EPSILON)) as usize,
            Self::Tokens(tokens) => tokens / page_size,
            Self::TopP(_) => pages,
        };
        budget.clamp(1, pages.max(1))
    }
}

/// How the scores of the query heads that share a KV head become one.
///
/// Attention reads one page list for all heads of a group, so they have to agree. The mean of the
/// queries would be one more way; it bounds nothing, and a head that looks the other way cancels
/// what its neighbour is sure of.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum GroupReduce {
    /// The largest: still an upper bound for every query of the group. A head with long queries
    /// is heard before one with short ones.
    #[default]
    Max,
    /// Each query's scores become shares by a softmax over the pages, which are added up: a head
    /// that is sure of its pages outvotes one that is indifferent (the soft vote of TokenSelect,
    /// arXiv 2411.02886, there over tokens and all heads).
    SoftmaxVote,
}

/// Which pages a decode step reads.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct SelectionPolicy {
    /// What a page is scored by.
    pub scorer: Scorer,
    /// How many pages are read.
    pub budget: Budget,
    /// First pages that are always read: evicting attention sinks collapses generation.
    pub sink_pages: usize,
    /// Last pages that are always read; the page of the newest token is read even when this is 0.
    pub recent_pages: usize,
    /// First layers that read everything: their attention is not sparse (Quest).
    pub dense_layers: usize,
    /// Contexts below this many tokens read everything.
    pub min_context: usize,
    /// How the scores of the query heads that share a KV head become one.
    pub group_reduce: GroupReduce,
}

impl Default for SelectionPolicy {
    fn default() -> Self {
        Self {
            scorer: Scorer::BOX,
            budget: Budget::Ratio(0.3),
            sink_pages: 1,
            recent_pages: 2,
            dense_layers: 2,
            min_context: 1024,
            group_reduce: GroupReduce::Max,
        }
    }
}

impl SelectionPolicy {
    /// Checks the budget.
    ///
    /// # Errors
    /// When a ratio is not in (0, 1] or a token budget is 0.
    pub fn check(&self) -> Result<(), KvError> {
        match self.budget {
            Budget::Ratio(ratio) if !(ratio > 0.0 && ratio <= 1.0) => Err(KvError::Invalid {
                what: "selection_ratio",
                found: ratio.to_string(),
                expected: "above 0 and at most 1".to_owned(),
            }),
            Budget::Tokens(0) => Err(KvError::Invalid {
                what: "token_budget",
                found: "0".to_owned(),
                expected: "at least 1 token".to_owned(),
            }),
            Budget::TopP(p) if !(p > 0.0 && p <= 1.0) => Err(KvError::Invalid {
                what: "top_p_pages",
                found: p.to_string(),
                expected: "above 0 and at most 1".to_owned(),
            }),
            _ => Ok(()),
        }
    }

    /// Whether it reads the pages with the highest scores of any query of the group, as many as
    /// are known beforehand: what backends have kernels for, where they have one for the scorer.
    /// Anything else is chosen on the host, which is slow.
    #[must_use]
    pub fn ranks_by_maximum(&self) -> bool {
        self.group_reduce == GroupReduce::Max && !matches!(self.budget, Budget::TopP(_))
    }

    /// Whether the newest page, which is read anyway, has no say in which others are: so a step
    /// that computes several of its tokens selects for each as a step of its own would, although
    /// the page's box and keys are then those of all of them.
    #[must_use]
    pub fn ignores_newest_page(&self) -> bool {
        let scores_alone = self.scorer.summary().is_some() || !self.scorer.needs_keys();
        self.ranks_by_maximum() && scores_alone
    }

    /// Pages that a step of `layer` reads out of the pages of `tokens` tokens, or `None` when it
    /// reads them all: dense layer, short context, or a budget that covers every page.
    #[must_use]
    pub fn page_budget(&self, layer: usize, tokens: usize, page_size: usize) -> Option<usize> {
        if layer < self.dense_layers || tokens < self.min_context {
            return None;
        }
        let pages = tokens.div_ceil(page_size);
        let kept = self.sink_pages.saturating_add(self.recent_pages.max(1));
        let budget = self.budget.pages(pages, page_size).max(kept);
        match self.budget {
            // How many they are shows when the mass is estimated.
            Budget::TopP(_) => (kept < pages).then_some(pages),
            Budget::Ratio(_) | Budget::Tokens(_) => (budget < pages).then_some(budget),
        }
    }

    /// Score of one page by its box for the queries that share its KV head: what kernels for boxes
    /// compute.
    ///
    /// Each query, `min` and `max` are `[head_dim]`. NaN when a query's score is.
    #[must_use]
    pub fn score<'a>(
        &self,
        queries: impl IntoIterator<Item = &'a [f32]>,
        min: &[f32],
        max: &[f32],
    ) -> f32 {
        let scores = queries.into_iter().map(|query| score_box(query, min, max));
        // `f32::max` would drop a NaN, and with it the only sign that the page bounds nothing.
        scores.fold(
            f32::NEG_INFINITY,
            |best, score| {
                if score > best || score.is_nan() { score } else { best }
            },
        )
    }

    /// Scores of all pages `[pages]` for the queries that share a KV head; `budget` of them will
    /// be read. NaN where a query's score is.
    #[must_use]
    pub fn scores(&self, input: &SelectInput<'_>, budget: usize) -> Vec<f32> {
        let pages = input.page_count();
        let mut scores = vec![0.0; input.group() * pages];
        self.scorer.score(input, budget, &mut scores);
        let (first, rest) = scores.split_at_mut(pages);
        match self.group_reduce {
            GroupReduce::Max => {
                for scores in rest.chunks_exact(pages) {
                    for (best, &score) in first.iter_mut().zip(scores) {
                        // `f32::max` would drop a NaN, and with it the only sign that the page
                        // bounds nothing.
                        if score > *best || score.is_nan() {
                            *best = score;
                        }
                    }
                }
            }
            GroupReduce::SoftmaxVote => {
                softmax(first, input.scale());
                for scores in rest.chunks_exact_mut(pages) {
                    softmax(scores, input.scale());
                    first.iter_mut().zip(scores).for_each(|(sum, share)| *sum += *share);
                }
            }
        }
        scores.truncate(pages);
        scores
    }
}

/// Turns scores into shares: the softmax of `scale · score`. A NaN stays one, and takes no share.
fn softmax(scores: &mut [f32], scale: f32) {
    let peak = scores.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    if peak.is_infinite() {
        // Infinite scores share everything among themselves.
        for x in scores.iter_mut().filter(|x| !x.is_nan()) {
            *x = if *x == peak { 1.0 } else { 0.0 };
        }
        return;
    }
    let weight = |x: f32| (scale * (x - peak)).exp();
    let total: f32 = scores.iter().filter(|x| !x.is_nan()).map(|&x| weight(x)).sum();
    scores.iter_mut().for_each(|x| *x = weight(*x) / total);
}

impl PageSelector for SelectionPolicy {
    fn select(&self, input: &SelectInput<'_>, selected: &mut Vec<u32>) -> bool {
        let pages = input.page_count();
        let Some(budget) = self.page_budget(input.layer(), input.tokens(), input.page_size())
        else {
            return false;
        };
        let scores = self.scores(input, budget);
        if let Budget::TopP(p) = self.budget {
            let always = |page| page < self.sink_pages || page + self.recent_pages.max(1) >= pages;
            select_mass(&scores, &estimated_mass(input), p, always, selected);
            return selected.len() < pages;
        }
        select_pages(&scores, budget, self.sink_pages, self.recent_pages, selected);
        true
    }

    fn needs_keys(&self) -> bool {
        self.scorer.needs_keys() || matches!(self.budget, Budget::TopP(_))
    }

    fn bytes_read(&self, (layer, _): (usize, usize), cost: &ScoreCost) -> usize {
        if self.page_budget(layer, cost.tokens, cost.page_size).is_none() {
            return 0; // nothing was scored
        }
        let estimated = match self.budget {
            Budget::TopP(_) => {
                // Mean and variance for the estimate, and the box that guards it.
                let guard = if self.scorer == Scorer::BOX { 0 } else { cost.box_bytes() };
                2 * cost.pages * cost.vector_bytes + guard
            }
            Budget::Ratio(_) | Budget::Tokens(_) => 0,
        };
        self.scorer.bytes_read(cost) + estimated
    }

    fn page_scores(&self, input: &SelectInput<'_>) -> Option<Vec<f32>> {
        let budget = self.page_budget(input.layer(), input.tokens(), input.page_size())?;
        Some(self.scores(input, budget))
    }
}
