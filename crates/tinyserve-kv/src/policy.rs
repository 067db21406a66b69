//! Selection policies: which pages a decode step reads, as data that every backend can run.

use crate::{KvError, PageSelector, SelectInput, score_box, select_pages};

/// What a page is scored by.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum Scorer {
    /// The upper bound of `q·k` over the page's bounding box: `Σ_d max(q_d·min_d, q_d·max_d)`
    /// (TinyServe, arXiv 2509.12211, equation 2; the same as Quest's).
    #[default]
    Box,
}

/// How many pages are read.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Budget {
    /// `max(1, floor(ratio × pages))`, where 0.29 of 100 pages is 29 although 0.29 has no exact
    /// binary form and the product is 28.999….
    Ratio(f64),
    /// As many whole pages as this many tokens fill, at least one.
    Tokens(usize),
}

impl Budget {
    /// Pages that may be read out of `pages`, always-kept pages included: at least 1, and no more
    /// than there are.
    ///
    /// # Panics
    /// When a token budget meets a `page_size` of zero.
    #[must_use]
    pub fn pages(self, pages: usize, page_size: usize) -> usize {
        let budget = match self {
            // The ratio and the product are each off by half an ulp at most.
            Self::Ratio(ratio) => (ratio * pages as f64 * (1.0 + 2.0 * f64::EPSILON)) as usize,
            Self::Tokens(tokens) => tokens / page_size,
        };
        budget.clamp(1, pages.max(1))
    }
}

/// How the scores of the query heads that share a KV head become one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum GroupReduce {
    /// The largest: still an upper bound for every query of the group.
    #[default]
    Max,
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
            scorer: Scorer::Box,
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
            _ => Ok(()),
        }
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
        (budget < pages).then_some(budget)
    }

    /// Score of one page for the queries that share its KV head.
    ///
    /// Each query, `min` and `max` are `[head_dim]`. NaN when a query's score is.
    #[must_use]
    pub fn score<'a>(
        &self,
        queries: impl IntoIterator<Item = &'a [f32]>,
        min: &[f32],
        max: &[f32],
    ) -> f32 {
        let scores = queries.into_iter().map(|query| match self.scorer {
            Scorer::Box => score_box(query, min, max),
        });
        match self.group_reduce {
            // `f32::max` would drop a NaN, and with it the only sign that the page bounds nothing.
            GroupReduce::Max => scores.fold(f32::NEG_INFINITY, |best, score| {
                if score > best || score.is_nan() { score } else { best }
            }),
        }
    }
}

impl PageSelector for SelectionPolicy {
    fn select(&self, input: &SelectInput<'_>, selected: &mut Vec<u32>) -> bool {
        let Some(budget) = self.page_budget(input.layer(), input.tokens(), input.page_size())
        else {
            return false;
        };
        let scores: Vec<f32> = (0..input.page_count())
            .map(|page| self.score(input.queries(), input.min(page), input.max(page)))
            .collect();
        select_pages(&scores, budget, self.sink_pages, self.recent_pages, selected);
        true
    }
}
