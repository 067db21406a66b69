//! Weighted values: the products of their codes with weights times scales.

use std::ops::Range;

use super::super::ahead::{Ahead, NextPages};
use super::super::softmax::{Rows, State};
use super::{BLOCK, MANY, Places, QUAD, TINY, TokenFactors, half, load};
use crate::cpu::simd::Simd;

/// Weights times scales into `out`, page by page `padded` tokens, which are zero beyond `size`, and
/// zeros after the last page; the sum of weights times minima, and the largest product.
#[inline(always)]
pub(in super::super) fn products<S: Simd>(
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

/// `products`, which are not negative and at most `largest`, as factors of codes, in whole blocks into
/// every `step`-th of `out`; what they count in.
#[inline(always)]
pub(in super::super) fn store_factors<S: Simd>(
    simd: S,
    (products, largest): (&[f32], f32),
    (out, step): (&mut [TokenFactors], usize),
    next: &mut impl Ahead,
) -> f32 {
    let factor = simd.splat(S::LARGEST / largest);
    for (block, products) in products.chunks_exact(BLOCK).enumerate() {
        next.ask(simd);
        let words = out[block * step].0.as_flattened_mut();
        for at in (0..BLOCK).step_by(S::LANES) {
            let rounding = simd.splat(S::ROUNDING);
            let factors = simd.mul_add(simd.load(&products[at..]), factor, rounding);
            simd.store_factors(factors, &mut words[at..]);
        }
    }
    largest / S::LARGEST
}

/// What the values of sealed pages are added up from.
pub(in super::super) struct Values<'a, P> {
    pub(in super::super) chunk: P,
    pub(in super::super) pages: usize,
    pub(in super::super) places: Places,
    /// Weights times scales `[blocks of tokens, Q]`.
    pub(in super::super) factors: &'a [TokenFactors],
}

impl<P: Rows<u8>> Values<'_, P> {
    /// `Σ weight·code` of channels `at..at + V·BLOCK` for `Q` queries.
    #[inline(always)]
    fn sums<S: Simd, const Q: usize, const V: usize, const BITS: usize>(
        &self,
        simd: S,
        at: usize,
        next: &mut NextPages<'_, '_>,
    ) -> [[S::Sums; V]; Q] {
        let mut sums = [[simd.no_sums(); V]; Q];
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
                        self.factors.get(block * Q..).and_then(|rows| rows.first_chunk::<Q>());
                    // Never nothing, as with keys.
                    let Some(rows) = rows else { break };
                    let mut halves = codes;
                    for codes in &mut halves {
                        *codes = half::<S, BITS>(simd, *codes, part);
                    }
                    if Q < MANY {
                        next.ask(simd);
                    }
                    simd.add_quads(&mut sums, &halves, |query, word| rows[query].0[lane][word]);
                }
            }
        }
        sums
    }

    /// `out·shift + Σ weight·value` of `channels`, for `Q` queries from `query` on.
    ///
    /// `sums` is, for each query, the sum of weights times minima, what its factors count in, and
    /// what earlier sums shrink by. Meanwhile lines of the next pages are asked for.
    #[inline(always)]
    pub(in super::super) fn add<S: Simd, const Q: usize, const BITS: usize>(
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
                4.. if Q == 1 && S::SUMS >= 2 * MANY => {
                    self.add_blocks::<S, Q, 4, BITS>(simd, at, state, sums, next)
                }
                2.. if Q < MANY || S::SUMS >= 2 * MANY => {
                    self.add_blocks::<S, Q, 2, BITS>(simd, at, state, sums, next)
                }
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
        let of_codes = self.sums::<S, Q, V, BITS>(simd, at, next);
        let mut block = [0.0; BLOCK];
        for (q, (of_codes, &(offset, unit, shift))) in of_codes.iter().zip(sums).enumerate() {
            for (v, &sum) in of_codes.iter().enumerate() {
                simd.store_block(simd.totals(sum, offset, unit), &mut block);
                state.add_block(simd, query + q, at + v * BLOCK, shift, &block);
            }
        }
        V * BLOCK
    }
}
