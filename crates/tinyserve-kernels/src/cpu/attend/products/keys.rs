//! Scores: the products of the codes of keys with a page's factors.

use super::super::ahead::{Ahead, NextPages};
use super::{BLOCK, MANY, Places, QuadFactors, half, load, number};
use crate::cpu::simd::{PIECES, Simd};

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
pub(in super::super) fn dots<S: Simd, const Q: usize, const W: usize, const BITS: usize>(
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
pub(in super::super) fn dots_of_blocks<
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
