//! Watches a selection: what it chose, what it missed, what it chose again.

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};

use serde::{Deserialize, Serialize};
use tinyserve_kv::{PageSelector, ScoreCost, SelectInput, attention_weights};

/// Shares of the pages at which recall is noted.
pub(crate) const CURVE: [f64; 8] = [0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.75];

/// One selection of one KV head in one step.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Seen {
    /// Layer of the model.
    pub layer: usize,
    /// KV head of the layer.
    pub kv_head: usize,
    /// Tokens of the sequence.
    pub tokens: usize,
    /// Pages that were read, ascending; `None` is all of them.
    pub pages: Option<Vec<u32>>,
    /// Scores of the pages that were read, in their order and in the method's own units; `None`
    /// where everything was read or the method has no scores. An infinite one is `None`, too.
    pub scores: Option<Vec<Option<f32>>>,
    /// Share of each query head's dense attention that the pages hold.
    pub mass: Vec<f32>,
    /// Share of the pages that were chosen among those that hold the most attention: as many as
    /// were chosen.
    pub top_pages: f32,
    /// Entropy of each query head's dense attention, nats.
    pub entropy: Vec<f32>,
    /// Share of the pages that this head had read in the step before, too.
    pub reuse: Option<f32>,
    /// Attention that each page holds, the mean over the query heads.
    pub page_mass: Vec<f32>,
    /// Share of the attention in the pages with the most of it, at fixed shares of the pages: what
    /// a selection could hold at best.
    pub best_curve: Vec<f32>,
    /// The same in the pages with the best scores: what the method would hold at other budgets.
    pub score_curve: Option<Vec<f32>>,
}

/// A selector that does what another one does, and notes it.
///
/// It reads every key at every step that it watches, on the host: it is for looking, not for speed.
pub struct Watch<'a> {
    inner: Option<&'a dyn PageSelector>,
    seen: Mutex<Vec<Seen>>,
    before: Mutex<HashMap<(usize, usize), Vec<u32>>>,
}

impl<'a> Watch<'a> {
    /// Watches `inner`, or dense attention.
    #[must_use]
    pub fn new(inner: Option<&'a dyn PageSelector>) -> Self {
        Self { inner, seen: Mutex::default(), before: Mutex::default() }
    }

    /// What was seen since the last call, by layer and KV head.
    #[must_use]
    pub fn take(&self) -> Vec<Seen> {
        let mut seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        let mut seen = std::mem::take(&mut *seen);
        seen.sort_by_key(|seen| (seen.layer, seen.kv_head));
        seen
    }
}

impl std::fmt::Debug for Watch<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Watch")
    }
}

/// Page numbers, those with the largest `values` `[pages]` first; a NaN ranks with +∞, as it does
/// where pages are selected.
fn best_first(values: &[f32]) -> Vec<u32> {
    let rank = |page: u32| {
        let value = values[page as usize];
        if value.is_nan() { f32::INFINITY } else { value }
    };
    let mut pages: Vec<u32> = (0..values.len() as u32).collect();
    pages.sort_by(|&a, &b| rank(b).total_cmp(&rank(a)));
    pages
}

/// Attention in the first of `order` `[pages]`, at each share of [`CURVE`].
fn curve(order: &[u32], page_mass: &[f32]) -> Vec<f32> {
    let held = |share: &f64| {
        let kept = ((share * order.len() as f64) as usize).max(1);
        order[..kept].iter().map(|&page| page_mass[page as usize]).sum()
    };
    CURVE.iter().map(held).collect()
}

impl PageSelector for Watch<'_> {
    fn select(&self, input: &SelectInput<'_>, selected: &mut Vec<u32>) -> bool {
        let listed = self.inner.is_some_and(|inner| inner.select(input, selected));
        let pages = input.page_count();
        let all: Vec<u32> = (0..pages as u32).collect();
        let list = if listed { selected.as_slice() } else { &all };
        let weights = attention_weights(input, &all);
        let sum_of = |weights: &[f32], page: u32| -> f32 {
            let start = page as usize * input.page_size();
            weights[start..start + input.page_tokens(page as usize)].iter().sum()
        };
        let mass = weights.iter().map(|w| list.iter().map(|&page| sum_of(w, page)).sum()).collect();
        let entropy = weights
            .iter()
            .map(|w| -w.iter().filter(|&&p| p > 0.0).map(|p| p * p.ln()).sum::<f32>())
            .collect();
        let heads = weights.len() as f32;
        let page_mass: Vec<f32> = all
            .iter()
            .map(|&page| weights.iter().map(|w| sum_of(w, page)).sum::<f32>() / heads)
            .collect();
        let best = best_first(&page_mass);
        let found = best[..list.len()].iter().filter(|page| list.binary_search(page).is_ok());
        let top_pages = found.count() as f32 / list.len() as f32;
        let best_curve = curve(&best, &page_mass);
        let all_scores = self.inner.and_then(|inner| inner.page_scores(input));
        let score_curve = all_scores.as_ref().map(|scores| curve(&best_first(scores), &page_mass));
        let scores = all_scores.filter(|_| listed).map(|scores| {
            let of_page = |&page: &u32| Some(scores[page as usize]).filter(|x| x.is_finite());
            list.iter().map(of_page).collect()
        });
        let key = (input.layer(), input.kv_head());
        let mut before = self.before.lock().unwrap_or_else(PoisonError::into_inner);
        let reuse = before.insert(key, list.to_vec()).map(|before| {
            let again = list.iter().filter(|page| before.binary_search(page).is_ok());
            again.count() as f32 / list.len() as f32
        });
        drop(before);
        let seen = Seen {
            layer: input.layer(),
            kv_head: input.kv_head(),
            tokens: input.tokens(),
            pages: listed.then(|| list.to_vec()),
            scores,
            mass,
            top_pages,
            entropy,
            reuse,
            page_mass,
            best_curve,
            score_curve,
        };
        self.seen.lock().unwrap_or_else(PoisonError::into_inner).push(seen);
        listed
    }

    fn needs_keys(&self) -> bool {
        true
    }

    fn bytes_read(&self, head: (usize, usize), cost: &ScoreCost) -> usize {
        self.inner.map_or(0, |inner| inner.bytes_read(head, cost))
    }
}
