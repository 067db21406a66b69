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
}

/// Reads every page, and remembers which tokens the queries attended to.
///
/// As a selector it goes with the last tokens of a prompt: what they attend to is what H2O and
/// SnapKV keep. Threads ask it in any order, and it remembers the same.
#[derive(Debug, Default)]
pub struct AttentionObserver(Mutex<HashMap<(usize, usize), Sums>>);

/// Sums that do not depend on their order, as sums of floats do: pages with nearly the same
/// attention would be evicted by chance.
#[derive(Debug, Default)]
struct Sums {
    /// For each token, in units of 1 / [`ONE`].
    mass: Vec<u128>,
    queries: usize,
}

/// The weight 1. Weights of 2⁻⁷⁶ and more are whole multiples of the unit, and 2²⁸ queries fit.
const ONE: f64 = (1u128 << 100) as f64;

impl Sums {
    fn add(&mut self, weights: &[f32]) {
        if self.mass.len() < weights.len() {
            self.mass.resize(weights.len(), 0);
        }
        let weights = weights.iter().map(|&weight| (f64::from(weight) * ONE) as u128);
        self.mass.iter_mut().zip(weights).for_each(|(mass, weight)| *mass += weight);
        self.queries += 1;
    }
}

impl AttentionObserver {
    /// What was seen.
    #[must_use]
    pub fn finish(self) -> PromptAttention {
        let seen = self.0.into_inner().unwrap_or_else(PoisonError::into_inner);
        let of_head = |Sums { mass, queries }: Sums| HeadAttention {
            mass: mass.into_iter().map(|mass| (mass as f64 / ONE) as f32).collect(),
            queries,
        };
        PromptAttention { heads: seen.into_iter().map(|(at, sums)| (at, of_head(sums))).collect() }
    }
}

impl PageSelector for AttentionObserver {
    fn select(&self, input: &SelectInput<'_>, _selected: &mut Vec<u32>) -> bool {
        let all: Vec<u32> = (0..input.page_count() as u32).collect();
        let weights = attention_weights(input, &all);
        let mut seen = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let sums = seen.entry((input.layer(), input.kv_head())).or_default();
        weights.iter().for_each(|weights| sums.add(weights));
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
