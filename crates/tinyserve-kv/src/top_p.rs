//! Top-p budgets: reads pages, the best first, until the estimated attention mass reaches p.
//!
//! A page's mass is estimated from the first two moments of its keys: if the keys of a page of S
//! tokens were normal with mean μ and variances σ², its tokens would weigh
//! `S·exp(q·μ + ½·Σ_d q_d²·σ_d²)` together (q includes the attention scale). That is good where
//! keys are smooth. Where one token stands out it is far too low, and the budget would end before
//! the page that matters; and far too high where q²σ² is large. Two guards: the exponent never
//! exceeds the box's bound, and a page counts for at least one token half way between its mean and
//! its bound.
//!
//! Sources: top-p budgets are Twilight's (arXiv 2502.02770); the estimate from moments is after
//! Tactic (arXiv 2502.12216); the guards are ours.

use crate::methods::{Moments, log_sum_exp};
use crate::{SelectInput, score_box};

/// Estimated shares of the attention mass, `[group, pages]`; each query's add up to 1.
pub(crate) fn estimated_mass(input: &SelectInput<'_>) -> Vec<f32> {
    let (pages, scale) = (input.page_count(), input.scale());
    let mut mass = vec![0.0; input.group() * pages];
    let (mut moments, mut keys) = (Moments::default(), Vec::new());
    for page in 0..pages {
        input.keys(page, &mut keys);
        moments.of(&keys, input.head_dim());
        for (i, query) in input.queries().enumerate() {
            let bound = scale * score_box(query, input.min(page), input.max(page));
            let terms = || query.iter().map(|&q| scale * q);
            let mean: f32 = terms().zip(&moments.mean).map(|(q, &m)| q * m).sum();
            let variance: f32 = terms().zip(&moments.variance).map(|(q, &v)| q * q * v).sum();
            let smooth = (input.page_tokens(page) as f32).ln() + (mean + 0.5 * variance).min(bound);
            mass[i * pages + page] = smooth.max(0.5 * (mean + bound));
        }
    }
    for mass in mass.chunks_exact_mut(pages) {
        let total = log_sum_exp(mass.iter().copied());
        mass.iter_mut().for_each(|x| *x = (*x - total).exp());
    }
    mass
}

/// Writes pages into `selected`, ascending: those that are always kept, then the best by `scores`
/// `[pages]` until every query's estimated `mass` `[group, pages]` reaches `p`.
pub(crate) fn select_mass(
    scores: &[f32],
    mass: &[f32],
    p: f64,
    always: impl Fn(usize) -> bool,
    selected: &mut Vec<u32>,
) {
    let pages = scores.len();
    let mut order: Vec<usize> = (0..pages).collect();
    let rank = |page: usize| {
        let score = if scores[page].is_nan() { f32::INFINITY } else { scores[page] };
        (!always(page), -score)
    };
    order.sort_by(|&a, &b| {
        let (a_rank, b_rank) = (rank(a), rank(b));
        a_rank.0.cmp(&b_rank.0).then(a_rank.1.total_cmp(&b_rank.1)).then(a.cmp(&b))
    });
    let mut reached = vec![0.0f64; mass.len() / pages];
    for page in order {
        // A mass that is not a number never reaches anything: everything is read.
        if !always(page) && reached.iter().all(|&sum| sum >= p) {
            break;
        }
        selected.push(page as u32);
        for (sum, mass) in reached.iter_mut().zip(mass.chunks_exact(pages)) {
            *sum += f64::from(mass[page]);
        }
    }
    selected.sort_unstable();
}
