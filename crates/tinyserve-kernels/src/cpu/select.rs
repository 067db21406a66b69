//! Choosing pages: scores from the boxes, a budget, a list.

use tinyserve_kv::{
    KvElement, PageId, PageSelector, Scorer, SelectFields, SelectInput, SelectionPolicy,
    select_pages,
};

use super::attend::Context;
use super::path::CpuPath;
use super::simd::{Element, Kernel, Simd, dispatch};
use crate::{Attention, KernelError};

/// Buffers that choosing reuses.
#[derive(Debug, Default)]
pub(super) struct Choice {
    scores: Vec<f32>,
    boxes: Vec<f32>,
}

/// What was chosen.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) enum Chosen {
    /// Every page, without a look at the boxes.
    #[default]
    Everything,
    /// Every page, after a look at the boxes.
    EverythingSeen,
    /// The pages of the list.
    Listed,
}

/// Fills `list` with the pages that one KV head of one row reads.
///
/// `queries` is `[group, head_dim]`.
pub(super) fn choose<E: KvElement + Element>(
    context: &Context<'_>,
    attention: Attention<'_>,
    (kv_head, table, tokens): (usize, &[PageId], usize),
    queries: &[f32],
    choice: &mut Choice,
    list: &mut Vec<u32>,
) -> Result<Chosen, KernelError> {
    list.clear();
    match attention {
        Attention::Dense => Ok(Chosen::Everything),
        Attention::Policy(policy) => {
            let size = context.pages.layout().page_size();
            let Some(budget) = policy.page_budget(context.layer, tokens, size) else {
                return Ok(Chosen::Everything);
            };
            choice.scores.clear();
            choice.scores.resize(table.len(), 0.0);
            let scores = choice.scores.as_mut_slice();
            if context.path == CpuPath::Scalar {
                context.pages.boxes_f32(context.layer, table, kv_head, &mut choice.boxes);
                let boxes = choice.boxes.chunks_exact(2 * context.heads.head_dim);
                for (score, corners) in scores.iter_mut().zip(boxes) {
                    let (min, max) = corners.split_at(context.heads.head_dim);
                    *score = policy.score(queries.chunks_exact(context.heads.head_dim), min, max);
                }
            } else {
                let element = std::marker::PhantomData::<E>;
                let scores = Scores { context, policy, table, kv_head, queries, scores, element };
                dispatch(context.path, scores);
            }
            select_pages(&choice.scores, budget, policy.sink_pages, policy.recent_pages, list);
            Ok(Chosen::Listed)
        }
        Attention::Custom(selector) => {
            context.pages.boxes_f32(context.layer, table, kv_head, &mut choice.boxes);
            let input = SelectInput::new(SelectFields {
                layer: context.layer,
                kv_head,
                tokens,
                page_size: context.pages.layout().page_size(),
                head_dim: context.heads.head_dim,
                queries,
                boxes: &choice.boxes,
            });
            custom(selector, &input, list)
        }
    }
}

fn custom(
    selector: &dyn PageSelector,
    input: &SelectInput<'_>,
    list: &mut Vec<u32>,
) -> Result<Chosen, KernelError> {
    if !selector.select(input, list) {
        return Ok(Chosen::EverythingSeen);
    }
    let pages = input.page_count();
    let wrong = if list.is_empty() {
        Some("an empty list".to_owned())
    } else if let Some(pair) = list.windows(2).find(|pair| pair[0] >= pair[1]) {
        Some(format!("page {} before page {}", pair[0], pair[1]))
    } else {
        list.last().filter(|&&page| page as usize >= pages).map(|page| format!("page {page}"))
    };
    match wrong {
        None => Ok(Chosen::Listed),
        Some(found) => Err(KernelError::Selector(format!(
            "layer {}, KV head {}: found {found}, expected at least one page, in ascending order, \
             below {pages}",
            input.layer(),
            input.kv_head()
        ))),
    }
}

/// Scores of the boxes of all pages of one KV head.
struct Scores<'a, E> {
    context: &'a Context<'a>,
    policy: &'a SelectionPolicy,
    table: &'a [PageId],
    kv_head: usize,
    queries: &'a [f32],
    /// `[pages]`.
    scores: &'a mut [f32],
    element: std::marker::PhantomData<E>,
}

impl<E: KvElement + Element> Kernel for Scores<'_, E> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let Context { pages, layer, heads, .. } = *self.context;
        let Scorer::Box = self.policy.scorer;
        for (score, &page) in self.scores.iter_mut().zip(self.table) {
            let corners = pages.page_box::<E>(layer, page, self.kv_head);
            let mut queries = self.queries.chunks_exact(heads.head_dim);
            let first =
                queries.next().map_or(f32::NAN, |q| bound(simd, q, corners.min, corners.max));
            *score = queries.fold(first, |best, q| {
                let score = bound(simd, q, corners.min, corners.max);
                // Not f32::max: a score that is not a number has to reach the choice.
                if score > best || score.is_nan() { score } else { best }
            });
        }
    }
}

/// `Σ_d max(q_d·min_d, q_d·max_d)`.
#[inline(always)]
fn bound<S: Simd, E: Element>(simd: S, q: &[f32], min: &[E], max: &[E]) -> f32 {
    let mut sum = simd.splat(0.0);
    let whole = q.len() - q.len() % S::LANES;
    let mut d = 0;
    while d < whole {
        let q = simd.load(&q[d..d + S::LANES]);
        let low = simd.mul(q, E::load(simd, &min[d..d + S::LANES]));
        let high = simd.mul(q, E::load(simd, &max[d..d + S::LANES]));
        sum = simd.add(sum, simd.max(low, high));
        d += S::LANES;
    }
    if whole < q.len() {
        let q = simd.load_tail(&q[whole..]);
        let low = simd.mul(q, simd.load_tail(&min[whole..]));
        let high = simd.mul(q, simd.load_tail(&max[whole..]));
        sum = simd.add(sum, simd.max(low, high));
    }
    simd.sum(sum)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use tinyserve_kv::{HostPages, KvFormat, KvLayout, KvShape, PagePool, Slot, with_element};

    use super::*;

    struct Bound<'a, E>(&'a [f32], &'a [E], &'a [E]);

    impl<E: Element> Kernel for Bound<'_, E> {
        type Output = f32;
        #[inline(always)]
        fn run<S: Simd>(self, simd: S) -> f32 {
            bound(simd, self.0, self.1, self.2)
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(256))]

        #[test]
        fn a_score_bounds_every_stored_key(
            format in prop::sample::select(&KvFormat::ALL[..]),
            (query, keys) in (1usize..70, 1usize..10).prop_flat_map(|(dim, tokens)| (
                prop::collection::vec(-50f32..50.0, dim),
                prop::collection::vec(prop::collection::vec(-50f32..50.0, dim), tokens),
            )),
        ) {
            let (head_dim, page_size) = (query.len(), keys.len());
            let shape = KvShape { layers: 1, kv_heads: 1, head_dim, page_size, format };
            let mut pages = HostPages::new(KvLayout::new(shape).unwrap(), 1).unwrap();
            let page = PagePool::new(1).unwrap().allocate().unwrap();
            for (offset, key) in keys.iter().enumerate() {
                pages.append(0, Slot { page, offset }, key, key);
            }
            with_element!(format, E => {
                let corners = pages.page_box::<E>(0, page, 0);
                for path in CpuPath::available().filter(|&path| path != CpuPath::Scalar) {
                    let score = dispatch(path, Bound(&query, corners.min, corners.max));
                    let head = pages.head::<E>(0, page, 0);
                    for key in (0..page_size).map(|token| head.key(token)) {
                        let terms: Vec<f64> = query
                            .iter()
                            .zip(key)
                            .map(|(&q, k)| f64::from(q) * f64::from(KvElement::to_f32(k)))
                            .collect();
                        // Sums of f32 in another order differ by their rounding.
                        let slack = 1e-6 * terms.iter().map(|x| x.abs()).sum::<f64>();
                        let product: f64 = terms.iter().sum();
                        prop_assert!(f64::from(score) >= product - slack, "{path}: {score}");
                    }
                }
            });
        }
    }
}
