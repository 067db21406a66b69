//! What a page's keys are multiplied by: the scaled queries times the ranges of its box.

use tinyserve_kv::GROUP_PAGES;

use super::super::ahead::{Ahead, NextPages};
use super::{BLOCK, QUAD, TINY};
use crate::cpu::simd::{BlockWords, Element, Simd};

/// Puts the box of the page in lane `lane` of a group into column `column` of `corners`
/// `[head_dim, 2 (max, min), BLOCK]`; `boxes` is `[head_dim, 2 (max, min), GROUP_PAGES]`.
#[inline(always)]
pub(in super::super) fn pick_box<E: Element>(
    boxes: &[E],
    lane: usize,
    corners: &mut [E],
    column: usize,
) {
    let (lane, column) = (lane % GROUP_PAGES, column % BLOCK);
    let channels = corners.as_chunks_mut::<{ 2 * BLOCK }>().0.iter_mut();
    for (corners, boxes) in channels.zip(boxes.as_chunks::<{ 2 * GROUP_PAGES }>().0) {
        corners[column] = boxes[lane];
        corners[BLOCK + column] = boxes[GROUP_PAGES + lane];
    }
}

/// One channel of [`load_boxes`], not divided; `widest` grows to its ranges.
#[inline(always)]
fn load_channel<S: Simd, E: Element>(
    simd: S,
    (corners, row, lane): (&[E], usize, usize),
    ranges: &mut [f32],
    minima: &mut [f32],
    widest: &mut [S::V; 2],
) {
    for (v, widest) in widest.iter_mut().enumerate().take(BLOCK / S::LANES) {
        let at = v * S::LANES;
        let max = E::load(simd, &corners[lane + at..]);
        let min = E::load(simd, &corners[row + lane + at..]);
        let range = simd.sub(max, min);
        simd.store(range, &mut ranges[at..]);
        simd.store(min, &mut minima[at..]);
        *widest = simd.max(range, *widest);
    }
}

/// The widest ranges of `BLOCK` pages.
#[derive(Debug, Clone, Copy, Default)]
pub(in super::super) struct Widest {
    pub(in super::super) ranges: [f32; BLOCK],
    /// One over each.
    inverse: [f32; BLOCK],
}

/// Ranges and minima of `BLOCK` pages side by side.
///
/// `boxes` is `[head_dim, 2 (max, min), row]`, of which the pages are `lane..`.
#[inline(always)]
pub(in super::super) fn load_boxes<S: Simd, E: Element>(
    simd: S,
    (boxes, row, lane): (&[E], usize, usize),
    ranges: &mut [f32],
    minima: &mut [f32],
    next: &mut NextPages<'_, '_>,
) -> Widest {
    // Channel after channel in turn, so that no maximum waits for the one before it.
    let mut chains = [[simd.splat(TINY); 2]; CHAINS];
    let (quads, rest) = ranges.as_chunks_mut::<{ CHAINS * BLOCK }>();
    let (min_quads, min_rest) = minima.as_chunks_mut::<{ CHAINS * BLOCK }>();
    let groups = boxes.chunks_exact(CHAINS * 2 * row);
    let box_rest = groups.remainder();
    for (boxes, (ranges, minima)) in groups.zip(quads.iter_mut().zip(min_quads)) {
        for (c, widest) in chains.iter_mut().enumerate() {
            let corners = (&boxes[2 * c * row..2 * (c + 1) * row], row, lane);
            let rows = c * BLOCK..(c + 1) * BLOCK;
            next.ask(simd);
            load_channel(simd, corners, &mut ranges[rows.clone()], &mut minima[rows], widest);
        }
    }
    let rows = rest.chunks_exact_mut(BLOCK).zip(min_rest.chunks_exact_mut(BLOCK));
    for (corners, (ranges, minima)) in box_rest.chunks_exact(2 * row).zip(rows) {
        load_channel(simd, (corners, row, lane), ranges, minima, &mut chains[0]);
    }
    let [mut widest, rest @ ..] = chains;
    for chain in rest {
        for (widest, chain) in widest.iter_mut().zip(chain) {
            *widest = simd.max(chain, *widest);
        }
    }
    let mut out = Widest { ranges: [0.0; BLOCK], inverse: [0.0; BLOCK] };
    for (v, &widest) in widest.iter().enumerate().take(BLOCK / S::LANES) {
        let at = v * S::LANES;
        simd.store(widest, &mut out.ranges[at..]);
        // Once a page: divisions are slow.
        simd.store(simd.div(simd.splat(1.0), widest), &mut out.inverse[at..]);
    }
    out
}

/// Divides `ranges` by the widest of their pages.
#[inline(always)]
pub(in super::super) fn normalise<S: Simd>(
    simd: S,
    ranges: &mut [f32],
    widest: &Widest,
    next: &mut NextPages<'_, '_>,
) {
    for (channel, ranges) in ranges.chunks_exact_mut(BLOCK).enumerate() {
        if channel % 2 == 0 {
            next.ask(simd);
        }
        for at in (0..BLOCK).step_by(S::LANES) {
            let inverse = simd.load(&widest.inverse[at..]);
            simd.store(simd.mul(simd.load(&ranges[at..]), inverse), &mut ranges[at..]);
        }
    }
}

/// Chains that channels are summed up in, or compared, in turn.
const CHAINS: usize = 4;

#[inline(always)]
fn joined<S: Simd>(simd: S, [a, b, c, d]: [S::V; CHAINS]) -> S::V {
    simd.add(simd.add(a, b), simd.add(c, d))
}

/// `scaled·ranges` for `BLOCK` pages as factors of codes, quad by quad [`Simd::QUAD_WORDS`] of every
/// `step` times as many of `out`, and `scaled·minima`.
///
/// `scaled` is `[padded]`, `ranges` and `minima` are `[padded, BLOCK]`; ranges that are not
/// [normalised](normalise) come with the `widest`. For each quad up to four lines of the next pages are
/// asked for.
#[inline(always)]
pub(in super::super) fn factors<S: Simd>(
    simd: S,
    scaled: &[f32],
    (ranges, minima, widest): (&[f32], &[f32], Option<&Widest>),
    (out, step): (&mut [BlockWords], usize),
    (next, lines): (&mut NextPages<'_, '_>, usize),
) -> [f32; BLOCK] {
    let mut offsets = [0.0f32; BLOCK];
    for at in (0..BLOCK).step_by(S::LANES) {
        let mut sums = [simd.splat(0.0); CHAINS];
        let boxes = ranges.as_chunks::<{ QUAD * BLOCK }>().0.iter();
        let boxes = boxes.zip(minima.as_chunks::<{ QUAD * BLOCK }>().0);
        let quads = out.chunks_mut(step * S::QUAD_WORDS).zip(scaled.as_chunks::<QUAD>().0);
        for ((out, scaled), (ranges, minima)) in quads.zip(boxes) {
            let mut factors = [simd.splat(S::ROUNDING); QUAD];
            for c in 0..QUAD {
                if c < lines {
                    next.ask(simd);
                }
                let scaled = simd.splat(scaled[c]);
                let row = c * BLOCK + at;
                let mut range = simd.load(&ranges[row..]);
                if let Some(widest) = widest {
                    range = simd.mul(range, simd.load(&widest.inverse[at..]));
                }
                factors[c] = simd.mul_add(range, scaled, factors[c]);
                sums[c] = simd.mul_add(simd.load(&minima[row..]), scaled, sums[c]);
            }
            simd.store_quads(&factors, &mut out[..S::QUAD_WORDS], at);
        }
        simd.store(joined(simd, sums), &mut offsets[at..]);
    }
    offsets
}
