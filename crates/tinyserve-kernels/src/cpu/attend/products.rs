//! Attention over pages of codes: products in whole numbers, made floats once per page or chunk.
//!
//! A key's channel is `min + range·code/highest`, so a score is `q·min`, which is the page's alone,
//! and a dot product of the codes with `q·range/highest`. These factors, and a chunk's weights times
//! the scales of its values, are rounded to 23 bits and split into three signed bytes: then the
//! products are exact, and a few instructions make sixty-four of them.

use std::ops::Range;

use tinyserve_kv::{CodeLayout, CodePage, GROUP_PAGES};

use super::softmax::State;
use crate::cpu::simd::{Element, LARGEST, PIECES, SPLIT, Simd};

/// Tokens, channels or pages side by side: what a [`Simd::Block`] holds.
pub(super) const BLOCK: usize = 16;
/// Bytes that memory is read by.
const LINE: usize = 64;
/// Codes that one word of each piece meets.
const QUAD: usize = 4;
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

/// [`load_boxes`] of the page in lane `lane` alone, channel after channel: its widest range.
///
/// `corners` is memory for the box, `[2 (max, min), head_dim]`, in whole vectors, as `ranges` and
/// `minima` are.
#[inline(always)]
pub(super) fn load_box<S: Simd, E: Element>(
    simd: S,
    boxes: &[E],
    lane: usize,
    (corners, ranges, minima): (&mut [E], &mut [f32], &mut [f32]),
) -> f32 {
    let (max, min) = corners.split_at_mut(corners.len() / 2);
    let rows = boxes.chunks_exact(2 * GROUP_PAGES);
    for (rows, (max, min)) in rows.zip(max.iter_mut().zip(&mut *min)) {
        (*max, *min) = (rows[lane], rows[GROUP_PAGES + lane]);
    }
    let mut widest = simd.splat(TINY);
    let out = ranges.chunks_exact_mut(S::LANES).zip(minima.chunks_exact_mut(S::LANES));
    let corners = max.chunks_exact(S::LANES).zip(min.chunks_exact(S::LANES));
    for ((max, min), (ranges, minima)) in corners.zip(out) {
        let min = E::load(simd, min);
        let range = simd.sub(E::load(simd, max), min);
        simd.store(range, ranges);
        simd.store(min, minima);
        widest = simd.max(range, widest);
    }
    let widest = simd.highest(widest);
    for ranges in ranges.chunks_exact_mut(S::LANES) {
        simd.store(simd.div(simd.load(ranges), simd.splat(widest)), ranges);
    }
    widest
}

/// Chains that `query·minima` is summed up in, channel by channel in turn: whether many pages or
/// many queries are side by side, so that a page's score is the same to the last bit.
const CHAINS: usize = 4;

#[inline(always)]
fn joined<S: Simd>(simd: S, [a, b, c, d]: [S::V; CHAINS]) -> S::V {
    simd.add(simd.add(a, b), simd.add(c, d))
}

/// Pieces of `scaled·ranges` for `BLOCK` pages, and `query·minima`.
///
/// `out` is `[quads, PIECES, BLOCK]`.
#[inline(always)]
pub(super) fn factors<S: Simd>(
    simd: S,
    (query, scaled): (&[f32], &[f32]),
    (ranges, minima): (&[f32], &[f32]),
    out: &mut [u32],
) -> [f32; BLOCK] {
    let mut offsets = [0.0f32; BLOCK];
    for at in (0..BLOCK).step_by(S::LANES) {
        let mut sums = [simd.splat(0.0); CHAINS];
        for (quad, out) in out.chunks_exact_mut(PIECES * BLOCK).enumerate() {
            let mut factors = [simd.splat(SPLIT); QUAD];
            let chains = factors.iter_mut().zip(&mut sums).enumerate();
            for (c, (factor, sum)) in chains {
                let channel = quad * QUAD + c;
                if channel >= query.len() {
                    break;
                }
                let row = channel * BLOCK + at;
                let range = simd.load(&ranges[row..]);
                *factor = simd.mul_add(range, simd.splat(scaled[channel]), *factor);
                *sum = simd.mul_add(simd.splat(query[channel]), simd.load(&minima[row..]), *sum);
            }
            let (low, rest) = out.split_at_mut(BLOCK);
            let (middle, high) = rest.split_at_mut(BLOCK);
            simd.split_quads(&factors, [&mut low[at..], &mut middle[at..], &mut high[at..]]);
        }
        simd.store(joined(simd, sums), &mut offsets[at..]);
    }
    offsets
}

/// Pieces of `scaled·ranges` for one page, `[vectors of channels, PIECES, LANES / QUAD words]`;
/// `scaled` and `ranges` are whole vectors.
#[inline(always)]
pub(super) fn page_factors<S: Simd>(simd: S, scaled: &[f32], ranges: &[f32], out: &mut [u32]) {
    let bytes: &mut [u8] = bytemuck::cast_slice_mut(out);
    let channels = scaled.chunks_exact(S::LANES).zip(ranges.chunks_exact(S::LANES));
    for ((scaled, ranges), out) in channels.zip(bytes.chunks_exact_mut(PIECES * S::LANES)) {
        let sums = simd.mul_add(simd.load(ranges), simd.load(scaled), simd.splat(SPLIT));
        let (low, rest) = out.split_at_mut(S::LANES);
        let (middle, high) = rest.split_at_mut(S::LANES);
        simd.split(sums, [low, middle, high]);
    }
}

/// `query·minima` of one page for `LANES` queries, `columns` `[head_dim, LANES]`.
#[inline(always)]
pub(super) fn page_offsets<S: Simd>(simd: S, columns: &[f32], minima: &[f32], offsets: &mut [f32]) {
    let mut sums = [simd.splat(0.0); CHAINS];
    let quads = columns.chunks(CHAINS * S::LANES).zip(minima.chunks(CHAINS));
    for (columns, minima) in quads {
        let channels = columns.chunks_exact(S::LANES).zip(minima);
        for ((queries, &min), sum) in channels.zip(&mut sums) {
            *sum = simd.mul_add(simd.load(queries), simd.splat(min), *sum);
        }
    }
    simd.store(joined(simd, sums), offsets);
}

/// Scores of the tokens of one page for `Q` queries, into rows of `out` that are `chunk` apart.
///
/// `factors` are those of `Q` queries, one after the other: where they are `BLOCKED` as [`factors`]
/// has them, with the page in lane `lane`, else as [`page_factors`] has. `starts` and `units` say
/// what the scores of each query begin with, and what they count in. Between the products memory is
/// asked for the lines of `ahead`.
#[inline(always)]
pub(super) fn dots<S: Simd, const Q: usize, const BITS: usize, const BLOCKED: bool>(
    simd: S,
    (page, layout, size): (&[u8], CodeLayout, usize),
    ahead: [&[u8]; 3],
    (factors, lane): (&[u32], usize),
    (starts, units): (&[f32; Q], &[f32; Q]),
    (out, chunk): (&mut [f32], usize),
) {
    let (words, length) = (layout.key_words(), factors.len() / Q);
    let mut queries = [&[] as &[u32]; Q];
    for (query, factors) in queries.iter_mut().zip(factors.chunks_exact(length)) {
        *query = factors;
    }
    // Words from a piece to the next.
    let step = if BLOCKED { BLOCK } else { S::LANES / QUAD };
    let bytes: usize = ahead.iter().map(|part| part.len()).sum();
    let lines_per_word = bytes.div_ceil(LINE).div_ceil(words * size.div_ceil(BLOCK));
    let mut lines = ahead.iter().flat_map(|part| part.chunks(LINE));
    let mut token = 0;
    while token < size {
        let mut counts = [[simd.counts(0); PIECES]; Q];
        for word in 0..words {
            for line in lines.by_ref().take(lines_per_word) {
                simd.prefetch_far(line.as_ptr());
            }
            let codes = load(simd, page, 4 * (word * size + token));
            for part in 0..8 / BITS {
                let quad = word * (8 / BITS) + part;
                let codes = half::<S, BITS>(simd, codes, part);
                let first = if BLOCKED {
                    quad * PIECES * step + lane
                } else {
                    quad / step * PIECES * step + quad % step
                };
                let last = first + (PIECES - 1) * step;
                if last >= length {
                    // Never so; the compiler leaves out the checks of every query instead.
                    break;
                }
                for (factors, counts) in queries.iter().zip(&mut counts) {
                    let factors = &factors[first..first + (PIECES - 1) * step + 1];
                    for (piece, counts) in counts.iter_mut().enumerate() {
                        let factor = factors[piece * step];
                        *counts = simd.add_products(*counts, codes, factor.cast_signed());
                    }
                }
            }
        }
        for (q, counts) in counts.iter().enumerate() {
            let scores = number(simd, counts, (starts[q], units[q]));
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
    let rest = vectors.remainder();
    let mut highest = simd.splat(TINY);
    for x in vectors {
        highest = simd.max(simd.load(x), highest);
    }
    highest = simd.max(simd.load_tail(rest), highest);
    let largest = simd.highest(highest);
    let factor = simd.splat(LARGEST / largest);
    let (low, rest) = out.split_at_mut(products.len());
    let (middle, high) = rest.split_at_mut(products.len());
    let mut at = 0;
    while at + S::LANES <= products.len() {
        let sums = simd.mul_add(simd.load(&products[at..]), factor, simd.splat(SPLIT));
        simd.split(sums, [&mut low[at..], &mut middle[at..], &mut high[at..]]);
        at += S::LANES;
    }
    if at < products.len() {
        let sums = simd.mul_add(simd.load_tail(&products[at..]), factor, simd.splat(SPLIT));
        let mut bytes = [[0; BLOCK]; PIECES];
        let [a, b, c] = &mut bytes;
        simd.split(sums, [a, b, c]);
        for (out, bytes) in [low, middle, high].into_iter().zip(&bytes) {
            let out = &mut out[at..];
            let length = out.len();
            out.copy_from_slice(&bytes[..length]);
        }
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
    /// Pages from the one in use to the one that memory is asked for; 0 asks for none.
    pub(super) ahead: usize,
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
            let ahead = match self.ahead {
                1.. if at == 0 && page + self.ahead < self.pages => {
                    &(self.page)(page + self.ahead).bytes()[self.layout.values()]
                }
                _ => &[],
            };
            let lines_per_word = ahead.len().div_ceil(LINE).div_ceil(words);
            let mut lines = ahead.chunks(LINE);
            for word in 0..words {
                for line in lines.by_ref().take(lines_per_word) {
                    simd.prefetch_far(line.as_ptr());
                }
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
                // More sums than this leave the registers.
                4.. if Q == 1 && S::LANES == BLOCK => {
                    self.add_blocks::<S, Q, 4, BITS>(simd, at, state, sums)
                }
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
