//! `h2o`: keeps the pages with the most attention so far, and the newest ones.
//!
//! State: the attention mass that each page has received, from the observed part of the prompt on.
//! At each step pages are evicted until the budget holds: the one with the least mass first, never
//! a sink or a recent page. What was evicted does not come back. The queries then add their
//! weights over what is left. A page that nobody needed until now is gone when it is asked for:
//! a needle that is planted before its question is known cannot be found.
//! Cost: no summary; a mass for each page and head, and the weights of each step added to it.
//! Source: H2O (Zhang et al., NeurIPS 2023), which evicts single tokens; pages are what this cache
//! evicts, so give it pages of one token to have the original.

use std::boxed::Box;
use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use super::observe::attention_weights;
use super::{Evictor, PromptAttention, ScoreCost};
use crate::{PageSelector, SelectInput, SelectionPolicy};

/// See the module.
#[derive(Debug)]
pub(super) struct H2o;

impl Evictor for H2o {
    fn name(&self) -> &'static str {
        "h2o"
    }

    fn about(&self) -> &'static str {
        "evicts the pages with the least attention so far (H2O, by pages)"
    }

    fn start(
        &self,
        policy: SelectionPolicy,
        prompt: Arc<PromptAttention>,
    ) -> Box<dyn PageSelector> {
        Box::new(Sequence { policy, prompt, heads: Mutex::default() })
    }
}

#[derive(Debug)]
struct Sequence {
    policy: SelectionPolicy,
    prompt: Arc<PromptAttention>,
    heads: Mutex<HashMap<(usize, usize), Head>>,
}

#[derive(Debug, Default)]
struct Head {
    /// Attention that each page received.
    mass: Vec<f32>,
    evicted: Vec<bool>,
}

impl PageSelector for Sequence {
    fn select(&self, input: &SelectInput<'_>, selected: &mut Vec<u32>) -> bool {
        let (layer, pages) = (input.layer(), input.page_count());
        let Some(budget) = self.policy.page_budget(layer, input.tokens(), input.page_size()) else {
            return false;
        };
        let mut heads = self.heads.lock().unwrap_or_else(PoisonError::into_inner);
        let head = heads.entry((layer, input.kv_head())).or_insert_with(|| {
            let seen = self.prompt.head(layer, input.kv_head());
            let mass = seen.map(|seen| seen.mass.chunks(input.page_size()));
            let mass = mass.map(|pages| pages.map(|page| page.iter().sum()).collect());
            Head { mass: mass.unwrap_or_default(), evicted: Vec::new() }
        });
        head.mass.resize(pages, 0.0);
        head.evicted.resize(pages, false);
        let kept = |page: usize| {
            page < self.policy.sink_pages || page + self.policy.recent_pages.max(1) >= pages
        };
        let mut alive: Vec<usize> = (0..pages).filter(|&page| !head.evicted[page]).collect();
        // The least first; of equals the oldest.
        let mut candidates: Vec<usize> =
            alive.iter().copied().filter(|&page| !kept(page)).collect();
        candidates.sort_by(|&a, &b| head.mass[a].total_cmp(&head.mass[b]).then(a.cmp(&b)));
        for &page in candidates.iter().take(alive.len().saturating_sub(budget)) {
            head.evicted[page] = true;
        }
        alive.retain(|&page| !head.evicted[page]);
        selected.extend(alive.iter().map(|&page| page as u32));
        for weights in attention_weights(input, selected) {
            let mut weights = weights.as_slice();
            for &page in &alive {
                let (own, rest) = weights.split_at(input.page_tokens(page));
                head.mass[page] += own.iter().sum::<f32>();
                weights = rest;
            }
        }
        true
    }

    fn needs_keys(&self) -> bool {
        true
    }

    /// None: it goes by weights that attention computes anyway.
    fn bytes_read(&self, _head: (usize, usize), _cost: &ScoreCost) -> usize {
        0
    }
}
