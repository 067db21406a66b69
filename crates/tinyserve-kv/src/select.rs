//! The choice among page scores: the scalar reference that every kernel is held to.

use std::cmp::Ordering;

/// Writes the pages to read into `selected`, in ascending order.
///
/// The first `sink_pages` and the last `max(recent_pages, 1)` pages are always chosen; the rest of
/// `budget` goes to the highest `scores` `[pages]`, ties to the lower page. `selected` has
/// `min(pages, max(budget, sink_pages + max(recent_pages, 1)))` entries.
///
/// +0 and −0 tie. A NaN score bounds nothing, so it ranks with +∞: the page is read, and what went
/// wrong shows as it does in dense attention.
pub fn select_pages(
    scores: &[f32],
    budget: usize,
    sink_pages: usize,
    recent_pages: usize,
    selected: &mut Vec<u32>,
) {
    selected.clear();
    let pages = scores.len();
    let sink = sink_pages.min(pages);
    let recent = pages - recent_pages.max(1).min(pages - sink);
    let wanted = budget.saturating_sub(sink + pages - recent).min(recent - sink);
    // Page indices are 32-bit in page ids already.
    selected.extend((0..pages).map(|page| page as u32));
    let rank = |page: u32| {
        let score = scores[page as usize];
        if score.is_nan() { f32::INFINITY } else { score }
    };
    let best_first = |&a: &u32, &b: &u32| {
        // Without NaN the comparison is never undecided.
        rank(b).partial_cmp(&rank(a)).unwrap_or(Ordering::Equal).then(a.cmp(&b))
    };
    let candidates = &mut selected[sink..recent];
    if wanted > 0 && wanted < candidates.len() {
        candidates.select_nth_unstable_by(wanted - 1, best_first);
    }
    selected.drain(sink + wanted..recent);
    selected[sink..sink + wanted].sort_unstable();
}

/// Softmax mass of `logits` `[tokens]` (attention scores of one query head) that falls on the
/// tokens of the `selected` pages: the recall of a selection.
///
/// `selected` names each page once; pages beyond the tokens add nothing. Without tokens nothing is
/// missed and the mass is 1. A NaN logit gives NaN.
///
/// # Panics
/// When `page_size` is zero.
#[must_use]
pub fn attention_mass(logits: &[f32], selected: &[u32], page_size: usize) -> f32 {
    if logits.is_empty() {
        return 1.0;
    }
    let peak = f64::from(logits.iter().copied().fold(f32::NEG_INFINITY, f32::max));
    let mass = |tokens: &[f32]| tokens.iter().map(|&x| (f64::from(x) - peak).exp()).sum::<f64>();
    let pages = logits.chunks(page_size);
    let kept: f64 =
        selected.iter().filter_map(|&page| pages.clone().nth(page as usize)).map(mass).sum();
    (kept / mass(logits)) as f32
}
