//! Scores of pages from boxes, many pages side by side.

use std::marker::PhantomData;
use std::ops::RangeInclusive;

use tinyserve_kv::{GROUP_PAGES, GroupSummaries, KvElement, PageId};

use crate::cpu::attend::Context;
use crate::cpu::simd::{Element, Kernel, LINE, Simd};

/// Scores of all pages of one KV head: the highest of its queries, `+∞` for NaN.
pub(super) struct Scores<'a, E> {
    pub(super) boxes: Boxes<'a, E>,
    pub(super) table: &'a [PageId],
    pub(super) head_dim: usize,
    /// `[group, head_dim]`.
    pub(super) queries: &'a [f32],
    /// `[pages]`.
    pub(super) scores: &'a mut [f32],
}

/// The boxes of one KV head's pages, group by group.
pub(super) enum Boxes<'a, E> {
    /// Those of the keys.
    OfKeys(&'a Context<'a>, usize, PhantomData<E>),
    /// Those that a scorer keeps.
    Kept(GroupSummaries<'a, E>),
}

impl<'a, E: KvElement> Boxes<'a, E> {
    /// `[boxes of a page, head_dim, 2 (max, min), GROUP_PAGES]`.
    #[inline(always)]
    fn group(&self, page: PageId) -> &'a [E] {
        let group = page.index() / GROUP_PAGES;
        match *self {
            Self::OfKeys(context, kv_head, _) => {
                context.pages.group_boxes::<E>(context.layer, group, kv_head)
            }
            Self::Kept(kept) => kept.group(group),
        }
    }
}

impl<E: KvElement + Element> Kernel for Scores<'_, E> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let mut best = [0.0; GROUP_PAGES];
        let mut at = 0;
        while at < self.table.len() {
            // A table that grew in peace is runs of whole groups; others have shorter ones.
            let group = self.table[at].index() / GROUP_PAGES;
            let run = self.table[at..].iter().map(|page| page.index());
            let run = run.take_while(|page| page / GROUP_PAGES == group);
            let (mut length, mut lowest, mut highest) = (0, GROUP_PAGES, 0);
            for page in run {
                length += 1;
                lowest = lowest.min(page % GROUP_PAGES);
                highest = highest.max(page % GROUP_PAGES);
            }
            let ahead = *self.table.get(at + length).unwrap_or(&self.table[at]);
            let one = 2 * self.head_dim * GROUP_PAGES;
            let boxes = self.boxes.group(self.table[at]).chunks_exact(one);
            let ahead = self.boxes.group(ahead).chunks_exact(one);
            best.fill(f32::NEG_INFINITY);
            for both in boxes.zip(ahead) {
                score(simd, (self.queries, self.head_dim), both, lowest..=highest, &mut best);
            }
            let run = self.table[at..at + length].iter().map(|page| page.index());
            for (score, page) in self.scores[at..].iter_mut().zip(run) {
                *score = best[page % GROUP_PAGES];
            }
            at += length;
        }
    }
}

/// Raises `best` to the scores of pages `lanes` of a group, and perhaps of some beside them.
///
/// `boxes` is `[head_dim, 2 (max, min), GROUP_PAGES]`; those of the group `ahead` are asked for.
#[inline(always)]
fn score<S: Simd, E: Element>(
    simd: S,
    (queries, dim): (&[f32], usize),
    (boxes, ahead): (&[E], &[E]),
    lanes: RangeInclusive<usize>,
    best: &mut [f32; GROUP_PAGES],
) {
    let (group, mut query) = (queries.len() / dim, 0);
    while query < group {
        // What the others asked for is on its way; a lone query asks for the row that it needs.
        let ahead = (query == 0).then_some(ahead);
        let both = (boxes, ahead);
        let rest = &queries[query * dim..];
        // As many queries and vectors of pages as the registers hold sums for.
        query += match group - query {
            8.. if S::LANES == 16 => lanes_of::<S, E, 8, 2>(simd, rest, dim, both, &lanes, best),
            8.. => lanes_of::<S, E, 8, 1>(simd, rest, dim, both, &lanes, best),
            4.. if S::LANES == 16 => lanes_of::<S, E, 4, 4>(simd, rest, dim, both, &lanes, best),
            4.. => lanes_of::<S, E, 4, 2>(simd, rest, dim, both, &lanes, best),
            2.. => lanes_of::<S, E, 2, 4>(simd, rest, dim, both, &lanes, best),
            _ => lanes_of::<S, E, 1, 4>(simd, rest, dim, both, &lanes, best),
        };
    }
}

/// Raises `best` to the scores of the first `Q` queries `[Q, head_dim]`; gives `Q`.
#[inline(always)]
fn lanes_of<S: Simd, E: Element, const Q: usize, const V: usize>(
    simd: S,
    queries: &[f32],
    dim: usize,
    both: (&[E], Option<&[E]>),
    lanes: &RangeInclusive<usize>,
    best: &mut [f32; GROUP_PAGES],
) -> usize {
    let queries = &queries[..Q * dim];
    let mut at = lanes.start() - lanes.start() % S::LANES;
    while at <= *lanes.end() {
        at += S::LANES
            * if at + S::LANES <= *lanes.end() && at + V * S::LANES <= GROUP_PAGES {
                rows::<S, E, Q, V>(simd, queries, both, at, best)
            } else {
                rows::<S, E, Q, 1>(simd, queries, both, at, best)
            };
    }
    Q
}

/// Raises `best` to the scores of `Q` queries `[Q, head_dim]` for `V` vectors of pages from `at` on;
/// gives `V`.
#[inline(always)]
fn rows<S: Simd, E: Element, const Q: usize, const V: usize>(
    simd: S,
    queries: &[f32],
    (boxes, ahead): (&[E], Option<&[E]>),
    at: usize,
    best: &mut [f32; GROUP_PAGES],
) -> usize {
    let dim = queries.len() / Q;
    let q: [&[f32]; Q] = std::array::from_fn(|i| &queries[i * dim..(i + 1) * dim]);
    let mut sums = [[simd.splat(0.0); V]; Q];
    // Both rows of a channel, widened once for all queries.
    let mut wide = [[0.0; GROUP_PAGES]; 2];
    let lines = (V * S::LANES * size_of::<E>()).div_ceil(LINE);
    let ahead = ahead.filter(|_| (at * size_of::<E>()).is_multiple_of(LINE));
    for (channel, corners) in boxes.chunks_exact(2 * GROUP_PAGES).enumerate() {
        let corners =
            [&corners[at..at + V * S::LANES], &corners[GROUP_PAGES + at..][..V * S::LANES]];
        // `max(q·min, q·max)`: the sign of `q` says which, so a lone query does not read the other.
        let row = |q: f32| usize::from(q < 0.0);
        if Q == 1 {
            let corners = corners[row(q[0][channel])];
            for (v, sum) in sums[0].iter_mut().enumerate() {
                let corners = E::load(simd, &corners[v * S::LANES..]);
                *sum = simd.mul_add(simd.splat(q[0][channel]), corners, *sum);
            }
        } else {
            for (corners, wide) in corners.iter().zip(&mut wide) {
                for v in 0..V {
                    let corners = E::load(simd, &corners[v * S::LANES..]);
                    simd.store(corners, &mut wide[v * S::LANES..]);
                }
            }
            for (q, sums) in q.iter().zip(&mut sums) {
                let q = q[channel];
                let corners = &wide[row(q)];
                for (v, sum) in sums.iter_mut().enumerate() {
                    *sum = simd.mul_add(simd.splat(q), simd.load(&corners[v * S::LANES..]), *sum);
                }
            }
        }
        if let Some(ahead) = ahead {
            let rows = if Q == 1 { row(q[0][channel])..=row(q[0][channel]) } else { 0..=1 };
            for row in rows {
                let place = ahead.as_ptr().wrapping_add((2 * channel + row) * GROUP_PAGES + at);
                for line in 0..lines {
                    simd.prefetch(place.wrapping_add(line * LINE / size_of::<E>()));
                }
            }
        }
    }
    for sums in &sums {
        for (v, &sum) in sums.iter().enumerate() {
            let best = &mut best[at + v * S::LANES..];
            // A score that is not a number bounds nothing: its page is read.
            let score = simd.min(sum, simd.splat(f32::INFINITY));
            simd.store(simd.max(simd.load(best), score), best);
        }
    }
    V
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use tinyserve_kv::{
        HostPages, KvFormat, KvLayout, KvShape, PagePool, SelectionPolicy, Slot, with_element,
    };

    use super::*;
    use crate::cpu::path::CpuPath;
    use crate::cpu::simd::dispatch;

    struct One<'a, E>(&'a [f32], usize, &'a [E], usize);

    impl<E: Element> Kernel for One<'_, E> {
        type Output = f32;
        #[inline(always)]
        fn run<S: Simd>(self, simd: S) -> f32 {
            let mut best = [f32::NEG_INFINITY; GROUP_PAGES];
            let lanes = self.3..=self.3;
            score(simd, (self.0, self.1), (self.2, self.2), lanes, &mut best);
            best[self.3]
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(256))]

        #[test]
        fn a_score_bounds_every_stored_key_and_is_the_references(
            format in prop::sample::select(&KvFormat::FLOATS[..]),
            group in 1usize..6,
            lane in 0usize..GROUP_PAGES,
            (queries, keys) in (1usize..70, 1usize..10).prop_flat_map(|(dim, tokens)| (
                prop::collection::vec(prop::collection::vec(-50f32..50.0, dim), 6),
                prop::collection::vec(prop::collection::vec(-50f32..50.0, dim), tokens),
            )),
        ) {
            let queries = &queries[..group];
            let (head_dim, page_size) = (queries[0].len(), keys.len());
            let shape = KvShape { layers: 1, kv_heads: 1, head_dim, page_size, format };
            let mut pages = HostPages::new(KvLayout::new(shape).unwrap(), GROUP_PAGES).unwrap();
            let mut pool = PagePool::new(GROUP_PAGES).unwrap();
            let page = (0..=lane).map(|_| pool.allocate().unwrap()).last().unwrap();
            for (offset, key) in keys.iter().enumerate() {
                pages.append(0, Slot { page, offset }, key, key);
            }
            let (mut boxes, flat) = (Vec::new(), queries.concat());
            pages.boxes_f32(0, &[page], 0, &mut boxes);
            let (min, max) = boxes.split_at(head_dim);
            let policy = SelectionPolicy::default();
            let expected = policy.score(queries.iter().map(Vec::as_slice), min, max);
            with_element!(format, E => {
                let boxes = pages.group_boxes::<E>(0, page.index() / GROUP_PAGES, 0);
                for path in CpuPath::available().filter(|&path| path != CpuPath::Scalar) {
                    let lane = page.index() % GROUP_PAGES;
                    let score = dispatch(path, One(&flat, head_dim, boxes, lane));
                    let head = pages.head::<E>(0, page, 0);
                    for key in (0..page_size).map(|token| head.key(token)) {
                        let key: Vec<f64> =
                            key.map(|k| f64::from(KvElement::to_f32(k))).collect();
                        for query in queries {
                            let terms = || query.iter().zip(&key).map(|(&q, k)| f64::from(q) * k);
                            // Sums of f32 in another order differ by their rounding.
                            let slack = 1e-6 * terms().map(f64::abs).sum::<f64>();
                            let product: f64 = terms().sum();
                            prop_assert!(f64::from(score) >= product - slack, "{path}: {score}");
                        }
                    }
                    let error = (score - expected).abs();
                    prop_assert!(error <= 1e-5 * 2500.0 * head_dim as f32, "{path}: {score}");
                }
            });
        }
    }
}
