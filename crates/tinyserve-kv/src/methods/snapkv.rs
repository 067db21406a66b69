//! `snapkv`: keeps what the end of the prompt attended to, for good.
//!
//! State: the pages that are kept, decided once, at the first step after the prompt.
//! Each token's votes are the attention that the observed queries at the prompt's end gave it; the
//! votes are max-pooled over 7 neighbours, so that a hit keeps its surroundings; a page counts as
//! its best token. The budget goes to the best pages, and everything generated later is kept, too.
//! A question at the prompt's end chooses what it needs; one that comes later finds what is left.
//! Cost: the last tokens of the prompt are observed, once; afterwards nothing is scored.
//! Source: SnapKV (Li et al., NeurIPS 2024), which keeps single tokens where this cache keeps
//! pages.

use std::boxed::Box;
use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use super::{Evictor, PromptAttention, ScoreCost};
use crate::{PageSelector, SelectInput, SelectionPolicy, select_pages};

/// Tokens that the votes are pooled over.
const POOL: usize = 7;

/// See the module.
#[derive(Debug)]
pub(super) struct SnapKv;

impl Evictor for SnapKv {
    fn name(&self) -> &'static str {
        "snapkv"
    }

    fn about(&self) -> &'static str {
        "keeps what the end of the prompt attended to (SnapKV, by pages)"
    }

    fn start(
        &self,
        policy: SelectionPolicy,
        prompt: Arc<PromptAttention>,
    ) -> Box<dyn PageSelector> {
        Box::new(Sequence { policy, prompt, kept: Mutex::default() })
    }
}

#[derive(Debug)]
struct Sequence {
    policy: SelectionPolicy,
    prompt: Arc<PromptAttention>,
    /// For each layer and KV head.
    kept: Mutex<HashMap<(usize, usize), Kept>>,
}

/// The pages that are kept, and how many there were then.
type Kept = (Vec<u32>, usize);

impl PageSelector for Sequence {
    fn select(&self, input: &SelectInput<'_>, selected: &mut Vec<u32>) -> bool {
        let (layer, pages) = (input.layer(), input.page_count());
        let Some(budget) = self.policy.page_budget(layer, input.tokens(), input.page_size()) else {
            return false;
        };
        let mut kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        let (list, then) = kept.entry((layer, input.kv_head())).or_insert_with(|| {
            let seen = self.prompt.head(layer, input.kv_head());
            let mut votes = pooled(seen.map_or(&[], |seen| seen.mass.as_slice()));
            votes.resize(input.tokens(), 0.0);
            let scores: Vec<f32> = votes
                .chunks(input.page_size())
                .map(|page| page.iter().copied().fold(f32::NEG_INFINITY, f32::max))
                .collect();
            let mut list = Vec::new();
            let (sink, recent) = (self.policy.sink_pages, self.policy.recent_pages);
            select_pages(&scores, budget, sink, recent, &mut list);
            (list, pages)
        });
        selected.extend_from_slice(list);
        selected.extend(*then as u32..pages as u32);
        true
    }

    /// None: it went by weights that attention computed anyway.
    fn bytes_read(&self, _head: (usize, usize), _cost: &ScoreCost) -> usize {
        0
    }
}

/// The largest vote among the [`POOL`] tokens around each token.
fn pooled(votes: &[f32]) -> Vec<f32> {
    (0..votes.len())
        .map(|at| {
            let around = at.saturating_sub(POOL / 2)..(at + POOL / 2 + 1).min(votes.len());
            votes[around].iter().copied().fold(f32::NEG_INFINITY, f32::max)
        })
        .collect()
}
