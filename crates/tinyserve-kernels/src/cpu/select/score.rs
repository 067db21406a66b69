//! Scores of pages from boxes, many pages side by side.

use std::marker::PhantomData;
use std::ops::RangeInclusive;

use tinyserve_kv::{GROUP_PAGES, GroupSummaries, KvElement, PageId};

use crate::cpu::attend::Context;
use crate::cpu::simd::{Element, Kernel, Simd};

/// Queries that are scored together.
const QUERIES: usize = 2;
/// Vectors of pages that are scored together.
const VECTORS: usize = 4;

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
    let mut at = lanes.start() - lanes.start() % S::LANES;
    let mut fresh = true;
    while at <= *lanes.end() {
        let wide = at + S::LANES <= *lanes.end() && at + VECTORS * S::LANES <= GROUP_PAGES;
        let vectors = if wide { VECTORS } else { 1 };
        for (i, q) in queries.chunks(QUERIES * dim).enumerate() {
            // A lone query needs one of the two rows; a group of them needs both in all likelihood.
            let ahead = (i == 0 && fresh).then_some((ahead, queries.len() > dim));
            match (q.len() == QUERIES * dim, wide) {
                (true, true) => rows::<S, E, 2, VECTORS>(simd, q, (boxes, ahead), at, best),
                (true, false) => rows::<S, E, 2, 1>(simd, q, (boxes, ahead), at, best),
                (false, true) => rows::<S, E, 1, VECTORS>(simd, q, (boxes, ahead), at, best),
                (false, false) => rows::<S, E, 1, 1>(simd, q, (boxes, ahead), at, best),
            }
        }
        fresh = false;
        at += vectors * S::LANES;
    }
}

/// Raises `best` to the scores of `Q` queries `[Q, head_dim]` for `V` vectors of pages from `at` on.
#[inline(always)]
fn rows<S: Simd, E: Element, const Q: usize, const V: usize>(
    simd: S,
    queries: &[f32],
    (boxes, ahead): (&[E], Option<(&[E], bool)>),
    at: usize,
    best: &mut [f32; GROUP_PAGES],
) {
    let dim = queries.len() / Q;
    let q: [&[f32]; Q] = std::array::from_fn(|i| &queries[i * dim..(i + 1) * dim]);
    let mut sums = [[simd.splat(0.0); V]; Q];
    for (channel, corners) in boxes.chunks_exact(2 * GROUP_PAGES).enumerate() {
        for (q, sums) in q.iter().zip(&mut sums) {
            let q = q[channel];
            // `max(q·min, q·max)`: the sign of `q` says which, so the other one is not read.
            let row = &corners[usize::from(q < 0.0) * GROUP_PAGES..][..GROUP_PAGES];
            let wide = simd.splat(q);
            for (v, sum) in sums.iter_mut().enumerate() {
                *sum = simd.mul_add(wide, E::load(simd, &row[at + v * S::LANES..]), *sum);
            }
        }
        if let Some((ahead, both)) = ahead {
            let corners = &ahead[channel * 2 * GROUP_PAGES..][..2 * GROUP_PAGES];
            let row = if both { 0 } else { usize::from(q[0][channel] < 0.0) * GROUP_PAGES };
            let length = if both { 2 * GROUP_PAGES } else { GROUP_PAGES };
            for line in corners[row..row + length].chunks(64 / size_of::<E>()) {
                simd.prefetch(line.as_ptr());
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
