//! Attention over pages of codes: products in whole numbers, made floats once per page or chunk.
//!
//! A key's channel is `min + range·code/highest`, so a score is `q·min`, which is the page's alone,
//! and a dot product of the codes with `q·range/highest`. These factors, and a chunk's weights times
//! the scales of its values, are rounded to 23 bits and split into three signed bytes: then the
//! products are exact, and a few instructions make sixty-four of them.

use std::ops::Range;

use tinyserve_kv::GROUP_PAGES;

use super::ahead::{Ahead, NextPages};
use super::softmax::{Rows, State};
use crate::cpu::simd::{Element, LARGEST, PIECES, SPLIT, Simd};

/// Tokens, channels or pages side by side: what a [`Simd::Block`] holds.
pub(super) const BLOCK: usize = 16;
/// Codes that one word of each piece meets.
const QUAD: usize = 4;
/// Queries from which on lines are asked for before a page, not between its words: their sums leave
/// no register for it.
pub(super) const MANY: usize = 4;
/// Stands for the widest range and the largest number where all are zero.
pub(super) const TINY: f32 = 1e-30;

/// Loads 64 bytes from `at` on, with zeros after the last.
#[inline(always)]
fn load<S: Simd>(simd: S, bytes: &[u8], at: usize) -> S::Codes {
    match bytes.get(at..at + 4 * BLOCK) {
        Some(bytes) => simd.codes(bytes),
        None => simd.codes(&padded(&bytes[at..])),
    }
}

/// The last bytes of a page, and zeros after them.
#[cold]
fn padded(bytes: &[u8]) -> [u8; 4 * BLOCK] {
    let mut padded = [0; 4 * BLOCK];
    padded[..bytes.len()].copy_from_slice(bytes);
    padded
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

/// `offset + unit·Σ counts·256^piece`.
#[inline(always)]
fn number<S: Simd>(simd: S, counts: &[S::Counts; PIECES], (offset, unit): (f32, f32)) -> S::Block {
    let mut sums = simd.block(&[offset; BLOCK]);
    let mut unit = unit;
    for &counts in counts {
        sums = simd.add_block(sums, simd.widen(counts), unit);
        unit *= 256.0;
    }
    sums
}

/// The pieces of the factors of one quad of channels for `BLOCK` pages side by side.
#[derive(Debug, Clone, Copy, Default)]
#[repr(align(64))]
pub(super) struct QuadFactors([[u32; BLOCK]; PIECES]);

/// The pieces of `BLOCK` numbers, quad by quad a word for each piece; then a word of garbage, which
/// makes them what one store writes.
#[derive(Debug, Clone, Copy, Default)]
#[repr(align(64))]
pub(super) struct Pieces([[u32; PIECES + 1]; BLOCK / QUAD]);

/// Puts the box of the page in lane `lane` of a group into column `column` of `corners`
/// `[head_dim, 2 (max, min), BLOCK]`; `boxes` is `[head_dim, 2 (max, min), GROUP_PAGES]`.
#[inline(always)]
pub(super) fn pick_box<E: Element>(boxes: &[E], lane: usize, corners: &mut [E], column: usize) {
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
pub(super) struct Widest {
    pub(super) ranges: [f32; BLOCK],
    /// One over each.
    inverse: [f32; BLOCK],
}

/// Ranges and minima of `BLOCK` pages side by side.
///
/// `boxes` is `[head_dim, 2 (max, min), row]`, of which the pages are `lane..`.
#[inline(always)]
pub(super) fn load_boxes<S: Simd, E: Element>(
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
pub(super) fn normalise<S: Simd>(
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

/// Pieces of `scaled·ranges` for `BLOCK` pages, quad by quad into every `step`-th of `out`, and
/// `scaled·minima`.
///
/// `scaled` is `[padded]`, `ranges` and `minima` are `[padded, BLOCK]`; ranges that are not
/// [normalised](normalise) come with the `widest`. For each quad up to four lines of the next pages are
/// asked for.
#[inline(always)]
pub(super) fn factors<S: Simd>(
    simd: S,
    scaled: &[f32],
    (ranges, minima, widest): (&[f32], &[f32], Option<&Widest>),
    (out, step): (&mut [QuadFactors], usize),
    (next, lines): (&mut NextPages<'_, '_>, usize),
) -> [f32; BLOCK] {
    let mut offsets = [0.0f32; BLOCK];
    for at in (0..BLOCK).step_by(S::LANES) {
        let mut sums = [simd.splat(0.0); CHAINS];
        let boxes = ranges.as_chunks::<{ QUAD * BLOCK }>().0.iter();
        let boxes = boxes.zip(minima.as_chunks::<{ QUAD * BLOCK }>().0);
        let quads = out.iter_mut().step_by(step).zip(scaled.as_chunks::<QUAD>().0);
        for ((out, scaled), (ranges, minima)) in quads.zip(boxes) {
            let mut factors = [simd.splat(SPLIT); QUAD];
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
            let [low, middle, high] = &mut out.0;
            simd.split_quads(&factors, [&mut low[at..], &mut middle[at..], &mut high[at..]]);
        }
        simd.store(joined(simd, sums), &mut offsets[at..]);
    }
    offsets
}

/// Where the codes of a page lie.
#[derive(Debug, Clone, Copy)]
pub(super) struct Places {
    /// Tokens of a page.
    pub(super) size: usize,
    pub(super) head_dim: usize,
    /// Words of the keys of one token, and of the values of one channel.
    pub(super) key_words: usize,
    pub(super) value_words: usize,
    /// Where the values begin.
    pub(super) values: usize,
}

/// Adds the products of some codes of the keys of a block of tokens with `factors`
/// `[quads, queries]` of the page in lane `lane`.
#[inline(always)]
fn add_word<S: Simd, const Q: usize, const BITS: usize>(
    simd: S,
    codes: S::Codes,
    (factors, lane): (&[QuadFactors], usize),
    counts: &mut [[S::Counts; PIECES]; Q],
) {
    for (part, rows) in factors.as_chunks::<Q>().0.iter().enumerate() {
        let codes = half::<S, BITS>(simd, codes, part);
        for (row, counts) in rows.iter().zip(&mut *counts) {
            for (piece, counts) in row.0.iter().zip(counts) {
                *counts = simd.add_products(*counts, codes, piece[lane % BLOCK].cast_signed());
            }
        }
    }
}

/// Scores of the tokens of one page for `Q` queries, into rows of `out` that are `chunk` apart.
///
/// `factors` is `[quads, queries]`, of which the page has lane `lane`. `starts` and `units` say what
/// the scores of each query begin with, and what they count in. `W` words at a time are summed up
/// apart, so that no product waits for the one before it.
#[inline(always)]
pub(super) fn dots<S: Simd, const Q: usize, const W: usize, const BITS: usize>(
    simd: S,
    (page, places, next): (&[u8], Places, &mut NextPages<'_, '_>),
    (factors, lane): (&[QuadFactors], usize),
    (starts, units): (&[f32; Q], &[f32; Q]),
    (out, chunk): (&mut [f32], usize),
) {
    let (row, quads) = (4 * places.size, Q * (8 / BITS));
    let keys = &page[..places.key_words * row];
    if Q >= MANY {
        for _ in 0..places.key_words / 4 {
            next.ask(simd);
            next.ask_box(simd);
        }
    }
    for (block, token) in (0..places.size).step_by(BLOCK).enumerate() {
        let mut counts = [[[simd.counts(0); PIECES]; Q]; W];
        let mut at = block * 4 * BLOCK;
        let groups = factors.chunks_exact(W * quads);
        let rest = groups.remainder();
        for factors in groups {
            for (w, counts) in counts.iter_mut().enumerate() {
                // Lines of pages and boxes in turn, a word without any between them.
                if Q < MANY && w % 2 == 0 {
                    next.ask(simd);
                } else if Q < MANY && w % 4 == 1 {
                    next.ask_box(simd);
                }
                let factors = (&factors[w * quads..(w + 1) * quads], lane);
                add_word::<S, Q, BITS>(simd, load(simd, keys, at), factors, counts);
                at += row;
            }
        }
        for factors in rest.chunks_exact(quads) {
            add_word::<S, Q, BITS>(simd, load(simd, keys, at), (factors, lane), &mut counts[0]);
            at += row;
        }
        for q in 0..Q {
            let mut sums = counts[0][q];
            for counts in &counts[1..] {
                for (sum, &counts) in sums.iter_mut().zip(&counts[q]) {
                    *sum = simd.add_whole(*sum, counts);
                }
            }
            let scores = number(simd, &sums, (starts[q], units[q]));
            simd.store_block(scores, &mut out[q * chunk + token..]);
        }
    }
}

/// [`dots`] for pages of whole sets of `B` blocks of tokens, whose scores are summed up together for
/// `G` queries at a time: a factor is read once for all blocks of a set. For a single block reading
/// factors takes longer than multiplying by them.
#[inline(always)]
pub(super) fn dots_of_blocks<
    S: Simd,
    const Q: usize,
    const G: usize,
    const B: usize,
    const BITS: usize,
>(
    simd: S,
    (page, places, next): (&[u8], Places, &mut NextPages<'_, '_>),
    (factors, lane): (&[QuadFactors], usize),
    (starts, units): (&[f32; Q], &[f32; Q]),
    (out, chunk): (&mut [f32], usize),
) {
    let (row, quads) = (4 * places.size, Q * (8 / BITS));
    let keys = &page[..places.key_words * row];
    for token in (0..places.size).step_by(B * BLOCK) {
        for first in (0..Q).step_by(G) {
            for _ in 0..places.key_words / 8 {
                next.ask(simd);
                next.ask_box(simd);
            }
            let mut counts = [[[simd.counts(0); PIECES]; B]; G];
            let words = keys[4 * token..].chunks(row).zip(factors.chunks_exact(quads));
            for (word, factors) in words {
                let word = &word[..B * 4 * BLOCK];
                let mut codes = [simd.codes(&[0; 4 * BLOCK]); B];
                for (b, codes) in codes.iter_mut().enumerate() {
                    *codes = simd.codes(&word[b * 4 * BLOCK..]);
                }
                for (part, rows) in factors.as_chunks::<Q>().0.iter().enumerate() {
                    let mut halves = codes;
                    for codes in &mut halves {
                        *codes = half::<S, BITS>(simd, *codes, part);
                    }
                    for (row, counts) in rows[first..first + G].iter().zip(&mut counts) {
                        for (piece, words) in row.0.iter().enumerate() {
                            let x = words[lane % BLOCK].cast_signed();
                            for (counts, &codes) in counts.iter_mut().zip(&halves) {
                                counts[piece] = simd.add_products(counts[piece], codes, x);
                            }
                        }
                    }
                }
            }
            for (g, counts) in counts.iter().enumerate() {
                let q = first + g;
                for (b, counts) in counts.iter().enumerate() {
                    let scores = number(simd, counts, (starts[q], units[q]));
                    simd.store_block(scores, &mut out[q * chunk + token + b * BLOCK..]);
                }
            }
        }
    }
}

/// Weights times scales into `out`, page by page `padded` tokens, which are zero beyond `size`, and
/// zeros after the last page; the sum of weights times minima, and the largest product.
#[inline(always)]
pub(super) fn products<S: Simd>(
    simd: S,
    weights: &[f32],
    (scales, minima): (&[f32], &[f32]),
    (size, padded): (usize, usize),
    out: &mut [f32],
    next: &mut impl Ahead,
) -> (f32, f32) {
    let (out, behind) = out.split_at_mut(scales.len());
    behind.fill(0.0);
    // Pages without a gap are one.
    let (size, padded) = if size == padded { (out.len(), out.len()) } else { (size, padded) };
    let mut sums = simd.splat(0.0);
    let mut highest = simd.splat(TINY);
    let (mut rest, mut highest_rest) = (0.0, TINY);
    let mut page = 0;
    for weights in weights.chunks(size) {
        if page >= out.len() {
            break;
        }
        let of_page = page..page + padded;
        let out = &mut out[of_page.clone()];
        let (scales, minima) = (&scales[of_page.clone()], &minima[of_page]);
        page += padded;
        let mut at = 0;
        while at + S::LANES <= size {
            next.ask(simd);
            let weights = simd.load(&weights[at..]);
            let product = simd.mul(weights, simd.load(&scales[at..]));
            simd.store(product, &mut out[at..]);
            highest = simd.max(product, highest);
            sums = simd.mul_add(weights, simd.load(&minima[at..]), sums);
            at += S::LANES;
        }
        for at in at..size {
            out[at] = weights[at] * scales[at];
            highest_rest = if out[at] > highest_rest { out[at] } else { highest_rest };
            rest += weights[at] * minima[at];
        }
        out[size..].fill(0.0);
    }
    (simd.sum(sums) + rest, simd.highest(highest).max(highest_rest))
}

/// Pieces of `products`, which are not negative and at most `largest`, in whole blocks into every
/// `step`-th of `out`; what they count in.
#[inline(always)]
pub(super) fn split<S: Simd>(
    simd: S,
    (products, largest): (&[f32], f32),
    (out, step): (&mut [Pieces], usize),
    next: &mut impl Ahead,
) -> f32 {
    let factor = simd.splat(LARGEST / largest);
    for (block, products) in products.chunks_exact(BLOCK).enumerate() {
        next.ask(simd);
        let words = out[block * step].0.as_flattened_mut();
        for at in (0..BLOCK).step_by(S::LANES) {
            let sums = simd.mul_add(simd.load(&products[at..]), factor, simd.splat(SPLIT));
            simd.split(sums, &mut words[at..]);
        }
    }
    largest / LARGEST
}

/// What the values of sealed pages are added up from.
pub(super) struct Values<'a, P> {
    pub(super) chunk: P,
    pub(super) pages: usize,
    pub(super) places: Places,
    /// Pieces of weights times scales `[blocks of tokens, Q]`.
    pub(super) pieces: &'a [Pieces],
}

impl<P: Rows<u8>> Values<'_, P> {
    /// `Σ weight·value` of channels `at..at + V·BLOCK` for `Q` queries, in counts.
    #[inline(always)]
    fn counts<S: Simd, const Q: usize, const V: usize, const BITS: usize>(
        &self,
        simd: S,
        at: usize,
        next: &mut NextPages<'_, '_>,
    ) -> [[[S::Counts; PIECES]; V]; Q] {
        let mut counts = [[[simd.counts(0); PIECES]; V]; Q];
        let Places { value_words: words, head_dim, values, .. } = self.places;
        let mut quad = 0;
        for page in 0..self.pages {
            let bytes = self.chunk.of(page);
            if Q >= MANY {
                next.ask_lines(simd, words);
            }
            for word in 0..words {
                let place = values + 4 * (word * head_dim + at);
                if Q < MANY {
                    next.ask(simd);
                }
                let mut codes = [simd.codes(&[0; 4 * BLOCK]); V];
                if V == 1 {
                    codes[0] = load(simd, bytes, place);
                } else {
                    let bytes = &bytes[place..place + V * 4 * BLOCK];
                    for (v, codes) in codes.iter_mut().enumerate() {
                        *codes = simd.codes(&bytes[v * 4 * BLOCK..]);
                    }
                }
                for part in 0..8 / BITS {
                    let (block, lane) = (quad / (BLOCK / QUAD), quad % (BLOCK / QUAD));
                    quad += 1;
                    let rows =
                        self.pieces.get(block * Q..).and_then(|rows| rows.first_chunk::<Q>());
                    // Never nothing, as with keys.
                    let Some(rows) = rows else { break };
                    let mut halves = codes;
                    for codes in &mut halves {
                        *codes = half::<S, BITS>(simd, *codes, part);
                    }
                    if Q < MANY {
                        next.ask(simd);
                    }
                    for (row, counts) in rows.iter().zip(&mut counts) {
                        for piece in 0..PIECES {
                            let x = row.0[lane][piece].cast_signed();
                            for (counts, &codes) in counts.iter_mut().zip(&halves) {
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
    /// what earlier sums shrink by. Meanwhile lines of the next pages are asked for.
    #[inline(always)]
    pub(super) fn add<S: Simd, const Q: usize, const BITS: usize>(
        &self,
        simd: S,
        channels: Range<usize>,
        (state, query): (&mut State<'_>, usize),
        sums: &[(f32, f32, f32); Q],
        next: &mut NextPages<'_, '_>,
    ) {
        let mut at = channels.start;
        while at < channels.end {
            let state = (&mut *state, query);
            let next = &mut *next;
            at += match (channels.end - at) / BLOCK {
                // More sums than this leave the registers.
                4.. if Q == 1 && S::LANES == BLOCK => {
                    self.add_blocks::<S, Q, 4, BITS>(simd, at, state, sums, next)
                }
                2.. => self.add_blocks::<S, Q, 2, BITS>(simd, at, state, sums, next),
                _ => self.add_blocks::<S, Q, 1, BITS>(simd, at, state, sums, next),
            };
        }
    }

    /// [`Self::add`] for `V` blocks of channels, of which only a single one may be a part; their
    /// number.
    #[inline(always)]
    fn add_blocks<S: Simd, const Q: usize, const V: usize, const BITS: usize>(
        &self,
        simd: S,
        at: usize,
        (state, query): (&mut State<'_>, usize),
        sums: &[(f32, f32, f32); Q],
        next: &mut NextPages<'_, '_>,
    ) -> usize {
        let counts = self.counts::<S, Q, V, BITS>(simd, at, next);
        let mut block = [0.0; BLOCK];
        for (q, (counts, &(offset, unit, shift))) in counts.iter().zip(sums).enumerate() {
            for (v, counts) in counts.iter().enumerate() {
                simd.store_block(number(simd, counts, (offset, unit)), &mut block);
                state.add_block(simd, query + q, at + v * BLOCK, shift, &block);
            }
        }
        V * BLOCK
    }
}
