//! `oracle`: the true maximum of `q·k` over the page's keys.
//!
//! Summary: none; every key is read, so it saves nothing and no kernel would do it.
//! Score: `max_k q·k`. It is what a box bounds, so the distance between `oracle` and `box` is what
//! the looseness of the bound costs, and the distance between `oracle` and `dense` is what the
//! budget costs. It is the best page for needles; by attention mass [`oracle-mass`] is better.
//! Cost: all keys, half of what dense attention reads.
//! Source: the oracle top-k of Quest's and Twilight's figures.
//!
//! [`oracle-mass`]: super::oracle_mass

use super::{PageScorer, ScoreCost, dot, for_each_page};
use crate::SelectInput;

/// See the module.
#[derive(Debug)]
pub(super) struct Oracle;

impl PageScorer for Oracle {
    fn name(&self) -> &'static str {
        "oracle"
    }

    fn about(&self) -> &'static str {
        "true maximum of q.k over the page's keys: reads them all"
    }

    fn score(&self, input: &SelectInput<'_>, _budget: usize, scores: &mut [f32]) {
        let pages = input.page_count();
        for_each_page(input, |page, keys| {
            for (i, query) in input.queries().enumerate() {
                let products = keys.chunks_exact(query.len()).map(|key| dot(query, key));
                scores[i * pages + page] = products.fold(f32::NEG_INFINITY, f32::max);
            }
        });
    }

    fn bytes_read(&self, cost: &ScoreCost) -> usize {
        cost.pages * cost.page_size * cost.vector_bytes
    }
}
