//! Attention over pages of codes: products in whole numbers, made floats once per page or chunk.
//!
//! A key's channel is `min + range·code/highest`, so a score is `q·min`, which is the page's alone,
//! and a dot product of the codes with `q·range/highest`. These factors, and a chunk's weights times
//! the scales of its values, are rounded to 23 bits and split into three signed bytes: then the
//! products are exact, and a few instructions make sixty-four of them.

use std::ops::Range;

use tinyserve_kv::{CodeLayout, CodePage, GROUP_PAGES};

use super::softmax::State;
use crate::cpu::simd::{Element, Simd};

/// Tokens, channels or pages side by side: what a [`Simd::Block`] holds.
pub(super) const BLOCK: usize = 16;
/// Signed bytes that a factor is split into.
pub(super) const PIECES: usize = 3;
/// Codes that one word of each piece meets.
const QUAD: usize = 4;
/// What the largest factor becomes: less than 2²², so that the sum with [`ROUND`] keeps its exponent.
pub(super) const LARGEST: f32 = 4_194_000.0;
/// 1.5·2²³: what is added to it is rounded to a whole number, in the lowest bits of the sum.
const ROUND: f32 = 12_582_912.0;
/// Makes the bits of a sum with [`ROUND`] a number whose bytes are 128 above the signed pieces.
const ABOVE: u32 = 0x0080_8080u32.wrapping_sub(ROUND.to_bits());
/// Takes 128 off each byte.
const SIGNED: u32 = 0x8080_8080;
/// Stands for the widest range and the largest number where all are zero.
pub(super) const TINY: f32 = 1e-30;

/// Loads 64 bytes from `at` on, with zeros after the last.
#[inline(always)]
fn load<S: Simd>(simd: S, bytes: &[u8], at: usize) -> S::Codes {
    let bytes = &bytes[at..];
    if bytes.len() >= 4 * BLOCK {
        return simd.codes(bytes);
    }
    let mut padded = [0; 4 * BLOCK];
    padded[..bytes.len()].copy_from_slice(bytes);
    simd.codes(&padded)
}

/// The four codes of each lane of a word that belong to the word's quad `half`.
#[inline(always)]
fn half<S: Simd, const BITS: usize>(simd: S, codes: S::Codes, half: usize) -> S::Codes {
    match (BITS, half) {
        (8, _) => codes,
        (_, 0) => simd.low_halves(codes),
        _ => simd.high_halves(codes),
    }
}

/// A block of ones.
#[inline(always)]
fn ones<S: Simd>(simd: S) -> S::Block {
    let mut bytes = [0; 2 * BLOCK];
    for pair in bytes.chunks_exact_mut(2) {
        pair.copy_from_slice(&half::f16::ONE.to_le_bytes());
    }
    simd.block_f16(&bytes)
}

/// `offset + unit·Σ counts·256^piece`.
#[inline(always)]
fn number<S: Simd>(
    simd: S,
    counts: &[S::Counts; PIECES],
    (offset, unit): (f32, f32),
) -> [f32; BLOCK] {
    let one = ones(simd);
    let mut sums = simd.add_block(simd.block_zero(), one, offset);
    let mut unit = unit;
    for &counts in counts {
        sums = simd.add_counts(sums, counts, one, unit);
        unit *= 256.0;
    }
    simd.block_values(sums)
}

/// Ranges and minima of `BLOCK` neighbouring pages: the widest ranges.
///
/// `boxes` is `[head_dim, 2 (max, min), GROUP_PAGES]`; ranges are divided by the widest.
#[inline(always)]
pub(super) fn load_boxes<S: Simd, E: Element>(
    simd: S,
    boxes: &[E],
    lane: usize,
    ranges: &mut [f32],
    minima: &mut [f32],
) -> [f32; BLOCK] {
    let mut widest = [simd.splat(TINY); 2];
    let rows = ranges.chunks_exact_mut(BLOCK).zip(minima.chunks_exact_mut(BLOCK));
    for (corners, (ranges, minima)) in boxes.chunks_exact(2 * GROUP_PAGES).zip(rows) {
        for (v, widest) in widest.iter_mut().enumerate().take(BLOCK / S::LANES) {
            let at = v * S::LANES;
            let max = E::load(simd, &corners[lane + at..]);
            let min = E::load(simd, &corners[GROUP_PAGES + lane + at..]);
            let range = simd.sub(max, min);
            simd.store(range, &mut ranges[at..]);
            simd.store(min, &mut minima[at..]);
            *widest = simd.max(range, *widest);
        }
    }
    for ranges in ranges.chunks_exact_mut(BLOCK) {
        for (v, &widest) in widest.iter().enumerate().take(BLOCK / S::LANES) {
            let at = v * S::LANES;
            simd.store(simd.div(simd.load(&ranges[at..]), widest), &mut ranges[at..]);
        }
    }
    let mut out = [0.0; BLOCK];
    for (v, &widest) in widest.iter().enumerate().take(BLOCK / S::LANES) {
        simd.store(widest, &mut out[v * S::LANES..]);
    }
    out
}

/// Pieces of `scaled·ranges`, quad by quad, and `query·minima`, for `BLOCK` pages.
#[inline(always)]
pub(super) fn factors(
    (query, scaled): (&[f32], &[f32]),
    (ranges, minima): (&[f32], &[f32]),
    out: &mut [u32],
) -> [f32; BLOCK] {
    let mut offsets = [0.0f32; BLOCK];
    for (quad, out) in out.chunks_exact_mut(PIECES * BLOCK).enumerate() {
        let mut above = [[0x0080_8080u32; BLOCK]; QUAD];
        for (c, above) in above.iter_mut().enumerate() {
            let channel = quad * QUAD + c;
            if channel >= query.len() {
                break;
            }
            let (q, scaled) = (query[channel], scaled[channel]);
            let rows = channel * BLOCK..(channel + 1) * BLOCK;
            let (ranges, minima) = (&ranges[rows.clone()], &minima[rows]);
            for page in 0..BLOCK {
                above[page] = (ranges[page] * scaled + ROUND).to_bits().wrapping_add(ABOVE);
                offsets[page] += q * minima[page];
            }
        }
        let [a, b, c, d] = above;
        let (low, rest) = out.split_at_mut(BLOCK);
        let (middle, high) = rest.split_at_mut(BLOCK);
        for page in 0..BLOCK {
            let (a, b, c, d) = (a[page], b[page], c[page], d[page]);
            let outer_ab = a & 0x00ff_00ff | (b & 0x00ff_00ff) << 8;
            let outer_cd = c & 0x00ff_00ff | (d & 0x00ff_00ff) << 8;
            let middle_ab = a >> 8 & 0xff | b & 0xff00;
            let middle_cd = c >> 8 & 0xff | d & 0xff00;
            low[page] = (outer_ab & 0xffff | outer_cd << 16) ^ SIGNED;
            middle[page] = (middle_ab | middle_cd << 16) ^ SIGNED;
            high[page] = (outer_ab >> 16 | outer_cd & 0xffff_0000) ^ SIGNED;
        }
    }
    offsets
}

/// Scores of the tokens of one page for `Q` queries, into rows of `out` that are `chunk` apart.
///
/// `factors` is `[Q, quads, PIECES, BLOCK]`, of which `lane` is the page's.
#[inline(always)]
pub(super) fn dots<S: Simd, const Q: usize, const BITS: usize>(
    simd: S,
    (page, layout, size): (&[u8], CodeLayout, usize),
    (factors, lane): (&[u32], usize),
    (offsets, units): (&[[f32; BLOCK]; Q], &[[f32; BLOCK]; Q]),
    (out, chunk): (&mut [f32], usize),
) {
    let words = layout.key_words();
    let length = factors.len() / Q;
    let mut token = 0;
    while token < size {
        let mut counts = [[simd.counts(0); PIECES]; Q];
        for word in 0..words {
            let codes = load(simd, page, 4 * (word * size + token));
            for part in 0..8 / BITS {
                let quad = word * (8 / BITS) + part;
                let codes = half::<S, BITS>(simd, codes, part);
                for (q, counts) in counts.iter_mut().enumerate() {
                    let at = q * length + quad * PIECES * BLOCK + lane;
                    let factors = &factors[at..at + (PIECES - 1) * BLOCK + 1];
                    for (piece, counts) in counts.iter_mut().enumerate() {
                        let factor = factors[piece * BLOCK].cast_signed();
                        *counts = simd.add_products(*counts, codes, factor);
                    }
                }
            }
        }
        for (q, counts) in counts.iter().enumerate() {
            let scores = number(simd, counts, (offsets[q][lane], units[q][lane]));
            out[q * chunk + token..][..BLOCK].copy_from_slice(&scores);
        }
        token += BLOCK;
    }
}

/// Weights times scales into `out`, page by page `padded` tokens, which are zero beyond `size`; the
/// sum of weights times minima.
#[inline(always)]
pub(super) fn products<S: Simd>(
    simd: S,
    weights: &[f32],
    (scales, minima): (&[f32], &[f32]),
    (size, padded): (usize, usize),
    out: &mut [f32],
) -> f32 {
    // Pages without a gap are one.
    let (size, padded) = if size == padded { (out.len(), out.len()) } else { (size, padded) };
    let mut sums = simd.splat(0.0);
    let mut rest = 0.0;
    let ranges = scales.chunks_exact(padded).zip(minima.chunks_exact(padded));
    let pages = out.chunks_exact_mut(padded).zip(weights.chunks(size));
    for ((out, weights), (scales, minima)) in pages.zip(ranges) {
        let mut at = 0;
        while at + S::LANES <= size {
            let weights = simd.load(&weights[at..]);
            simd.store(simd.mul(weights, simd.load(&scales[at..])), &mut out[at..]);
            sums = simd.mul_add(weights, simd.load(&minima[at..]), sums);
            at += S::LANES;
        }
        for at in at..size {
            out[at] = weights[at] * scales[at];
            rest += weights[at] * minima[at];
        }
        out[size..].fill(0.0);
    }
    simd.sum(sums) + rest
}

/// Pieces of `products` `[tokens]`, which are not negative, into `out` `[PIECES, tokens]`; what they
/// count in.
#[inline(always)]
pub(super) fn split<S: Simd>(simd: S, products: &[f32], out: &mut [u8]) -> f32 {
    let vectors = products.chunks_exact(S::LANES);
    let mut largest = vectors.remainder().iter().fold(TINY, |a, &x| if x > a { x } else { a });
    let mut highest = simd.splat(largest);
    for x in vectors {
        highest = simd.max(simd.load(x), highest);
    }
    largest = simd.highest(highest);
    let factor = LARGEST / largest;
    let (low, rest) = out.split_at_mut(products.len());
    let (middle, high) = rest.split_at_mut(products.len());
    let pieces = low.iter_mut().zip(middle).zip(high);
    for (&x, ((low, middle), high)) in products.iter().zip(pieces) {
        let above = (x * factor + ROUND).to_bits().wrapping_add(ABOVE) ^ SIGNED;
        (*low, *middle, *high) = (above as u8, (above >> 8) as u8, (above >> 16) as u8);
    }
    largest / LARGEST
}

/// What the values of sealed pages are added up from.
pub(super) struct Values<'a, F> {
    /// Page of the chunk → its codes.
    pub(super) page: F,
    pub(super) pages: usize,
    pub(super) layout: CodeLayout,
    pub(super) head_dim: usize,
    /// Pieces of weights times scales `[Q, PIECES, tokens]`, in whole words.
    pub(super) pieces: &'a [u8],
}

impl<'p, F: Fn(usize) -> CodePage<'p>> Values<'_, F> {
    /// `Σ weight·value` of channels `at..at + V·BLOCK` for `Q` queries, in counts.
    #[inline(always)]
    fn counts<S: Simd, const Q: usize, const V: usize, const BITS: usize>(
        &self,
        simd: S,
        at: usize,
    ) -> [[[S::Counts; PIECES]; V]; Q] {
        let mut counts = [[[simd.counts(0); PIECES]; V]; Q];
        let tokens = self.pieces.len() / (Q * PIECES);
        let (words, start) = (self.layout.value_words(), self.layout.values().start);
        for page in 0..self.pages {
            let bytes = (self.page)(page).bytes();
            for word in 0..words {
                let mut codes = [simd.codes(&[0; 4 * BLOCK]); V];
                for (v, codes) in codes.iter_mut().enumerate() {
                    let row = word * self.head_dim + at + v * BLOCK;
                    *codes = load(simd, bytes, start + 4 * row);
                }
                for part in 0..8 / BITS {
                    let quad = (page * words + word) * (8 / BITS) + part;
                    for (q, counts) in counts.iter_mut().enumerate() {
                        for piece in 0..PIECES {
                            let first = (q * PIECES + piece) * tokens + quad * QUAD;
                            let x = &self.pieces[first..first + QUAD];
                            let x = i32::from_le_bytes([x[0], x[1], x[2], x[3]]);
                            for (counts, &codes) in counts.iter_mut().zip(&codes) {
                                let codes = half::<S, BITS>(simd, codes, part);
                                counts[piece] = simd.add_products(counts[piece], codes, x);
                            }
                        }
                    }
                }
            }
        }
        counts
    }

    /// `out·shift + Σ weight·value` of `channels`, for `Q` queries from `query` on.
    ///
    /// `sums` is, for each query, the sum of weights times minima, what its pieces count in, and
    /// what earlier sums shrink by.
    #[inline(always)]
    pub(super) fn add<S: Simd, const Q: usize, const BITS: usize>(
        &self,
        simd: S,
        channels: Range<usize>,
        (state, query): (&mut State<'_>, usize),
        sums: &[(f32, f32, f32); Q],
    ) {
        let mut at = channels.start;
        while at < channels.end {
            let state = (&mut *state, query);
            at += match (channels.end - at).div_ceil(BLOCK) {
                4.. if S::LANES == BLOCK => self.add_blocks::<S, Q, 4, BITS>(simd, at, state, sums),
                2.. => self.add_blocks::<S, Q, 2, BITS>(simd, at, state, sums),
                _ => self.add_blocks::<S, Q, 1, BITS>(simd, at, state, sums),
            };
        }
    }

    /// [`Self::add`] for `V` blocks of channels; their number.
    #[inline(always)]
    fn add_blocks<S: Simd, const Q: usize, const V: usize, const BITS: usize>(
        &self,
        simd: S,
        at: usize,
        (state, query): (&mut State<'_>, usize),
        sums: &[(f32, f32, f32); Q],
    ) -> usize {
        let counts = self.counts::<S, Q, V, BITS>(simd, at);
        for (q, (counts, &(offset, unit, shift))) in counts.iter().zip(sums).enumerate() {
            for (v, counts) in counts.iter().enumerate() {
                let block = number(simd, counts, (offset, unit));
                state.add_block(simd, query + q, at + v * BLOCK, shift, &block);
            }
        }
        V * BLOCK
    }
}
