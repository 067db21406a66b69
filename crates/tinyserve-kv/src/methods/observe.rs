//! Attention that was paid to a prompt, which eviction decides by.

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};

use super::dot;
use super::oracle_mass::log_sum_exp;
use crate::{PageSelector, ScoreCost, SelectInput};

/// Attention that the tokens of a prompt were paid in one layer by the queries of one KV head.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct HeadAttention {
    /// Sum over the observed queries of the softmax weight of each token `[tokens]`.
    pub mass: Vec<f32>,
    /// Queries that were observed: rows times query heads.
    pub queries: usize,
}

/// Attention that a prompt was paid, for every layer and KV head that was observed.
#[derive(Debug, Clone, Default)]
pub struct PromptAttention {
    heads: HashMap<(usize, usize), HeadAttention>,
}

impl PromptAttention {
    /// What was paid in `layer` by the queries of `kv_head`; `None` when nobody looked.
    #[must_use]
    pub fn head(&self, layer: usize, kv_head: usize) -> Option<&HeadAttention> {
        self.heads.get(&(layer, kv_head))
    }

    /// Adds the weights `[tokens]` that one query of `kv_head` in `layer` gave.
    pub fn add(&mut self, layer: usize, kv_head: usize, weights: &[f32]) {
        let head = self.heads.entry((layer, kv_head)).or_default();
        if head.mass.len() < weights.len() {
            head.mass.resize(weights.len(), 0.0);
        }
        head.mass.iter_mut().zip(weights).for_each(|(mass, weight)| *mass += weight);
        head.queries += 1;
    }
}

/// Reads every page, and remembers which tokens the queries attended to.
///
/// As a selector it goes with the last tokens of a prompt: what they attend to is what H2O and
/// SnapKV keep.
#[derive(Debug, Default)]
pub struct AttentionObserver(Mutex<PromptAttention>);

impl AttentionObserver {
    /// What was seen.
    #[must_use]
    pub fn finish(self) -> PromptAttention {
        self.0.into_inner().unwrap_or_else(PoisonError::into_inner)
    }
}

impl PageSelector for AttentionObserver {
    fn select(&self, input: &SelectInput<'_>, _selected: &mut Vec<u32>) -> bool {
        let all: Vec<u32> = (0..input.page_count() as u32).collect();
        let weights = attention_weights(input, &all);
        let mut seen = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        for weights in weights {
            seen.add(input.layer(), input.kv_head(), &weights);
        }
        false
    }

    fn needs_keys(&self) -> bool {
        true
    }

    fn bytes_read(&self, _head: (usize, usize), _cost: &ScoreCost) -> usize {
        0
    }
}

/// For each query, the softmax weights over the tokens of the pages of `list`, in their order.
#[must_use]
pub fn attention_weights(input: &SelectInput<'_>, list: &[u32]) -> Vec<Vec<f32>> {
    let mut logits = vec![Vec::new(); input.group()];
    let mut keys = Vec::new();
    for &page in list {
        input.keys(page as usize, &mut keys);
        for (query, logits) in input.queries().zip(&mut logits) {
            let products = keys.chunks_exact(query.len()).map(|key| dot(query, key));
            logits.extend(products.map(|product| input.scale() * product));
        }
    }
    for logits in &mut logits {
        let total = log_sum_exp(logits.iter().copied());
        logits.iter_mut().for_each(|x| *x = (*x - total).exp());
    }
    logits
}
