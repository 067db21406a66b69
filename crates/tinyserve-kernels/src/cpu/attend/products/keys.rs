//! Scores: the products of the codes of keys with a page's factors.

use super::super::ahead::{Ahead, NextPages};
use super::{BLOCK, MANY, Places, half};
use crate::cpu::simd::{BlockWords, Simd};

/// More than any page has whose last block of keys ends behind it: fewer than a block of tokens of
/// fewer than a block of channels.
const SHORT: usize = 1024;

/// A page that is shorter than `SHORT`, and zeros after it.
#[cold]
fn lengthened(page: &[u8]) -> [u8; SHORT] {
    let mut copy = [0; SHORT];
    copy[..page.len()].copy_from_slice(page);
    copy
}

/// Adds the products of some codes of the keys of some blocks of tokens, for `Q` queries from `first`
/// on, with `factors` `[quads, all queries, words]` of the page in lane `lane`.
#[inline(always)]
fn add_word<S: Simd, const ALL: usize, const Q: usize, const B: usize, const BITS: usize>(
    simd: S,
    codes: &[S::Codes; B],
    (factors, first, lane): (&[BlockWords], usize, usize),
    sums: &mut [[S::Sums; B]; Q],
) {
    for (part, rows) in factors.chunks_exact(ALL * S::QUAD_WORDS).enumerate() {
        let mut halves = *codes;
        for codes in &mut halves {
            *codes = half::<S, BITS>(simd, *codes, part);
        }
        let rows = &rows[first * S::QUAD_WORDS..(first + Q) * S::QUAD_WORDS];
        simd.add_quads(sums, &halves, |query, word| {
            rows[query * S::QUAD_WORDS + word].0[lane % BLOCK]
        });
    }
}

/// Scores of the tokens of one page for `Q` queries, into rows of `out` that are `chunk` apart.
///
/// `factors` is `[quads, queries, words]`, of which the page has lane `lane`. `starts` and `units` say what
/// the scores of each query begin with, and what they count in. `W` words at a time are summed up
/// apart, so that no product waits for the one before it: a part of [`Simd::CHAINS`] that are added
/// up in order, so that a query gets the same scores whatever others are beside it.
#[inline(always)]
pub(in super::super) fn dots<S: Simd, const Q: usize, const W: usize, const BITS: usize>(
    simd: S,
    (page, places, next): (&[u8], Places, &mut NextPages<'_, '_>),
    (factors, lane): (&[BlockWords], usize),
    (starts, units): (&[f32; Q], &[f32; Q]),
    (out, chunk): (&mut [f32], usize),
) {
    let (row, words) = (4 * places.size, Q * S::QUAD_WORDS * (8 / BITS));
    let end = (places.key_words - 1) * row + 4 * places.size.next_multiple_of(BLOCK);
    let copy;
    let page = if end <= page.len() {
        page
    } else {
        // Not in the loop: a call there would put all sums out of the registers.
        copy = lengthened(page);
        &copy
    };
    let keys = &page[..end];
    if Q >= MANY {
        for _ in 0..places.key_words / 4 {
            next.ask(simd);
            next.ask_box(simd);
        }
    }
    let chains = if S::CHAINS > W { S::CHAINS } else { W };
    for (block, token) in (0..places.size).step_by(BLOCK).enumerate() {
        let mut totals = [simd.no_sums(); Q];
        for first in (0..chains).step_by(W) {
            let mut sums = [[[simd.no_sums()]; Q]; W];
            let groups = factors.chunks_exact(chains * words);
            let rest = groups.remainder();
            let mut at = block * 4 * BLOCK;
            for factors in groups {
                for (w, sums) in sums.iter_mut().enumerate() {
                    // Lines of pages and boxes in turn, a word without any between them.
                    if Q < MANY && w % 2 == 0 {
                        next.ask(simd);
                    } else if Q < MANY && w % 4 == 1 {
                        next.ask_box(simd);
                    }
                    let codes = [simd.codes(&keys[at + (first + w) * row..][..4 * BLOCK])];
                    let factors = &factors[(first + w) * words..(first + w + 1) * words];
                    add_word::<S, Q, Q, 1, BITS>(simd, &codes, (factors, 0, lane), sums);
                }
                at += chains * row;
            }
            if first == 0 {
                for factors in rest.chunks_exact(words) {
                    let codes = [simd.codes(&keys[at..at + 4 * BLOCK])];
                    add_word::<S, Q, Q, 1, BITS>(simd, &codes, (factors, 0, lane), &mut sums[0]);
                    at += row;
                }
            }
            for sums in &sums {
                for (total, &[sum]) in totals.iter_mut().zip(sums) {
                    *total = simd.join_sums(*total, sum);
                }
            }
        }
        for q in 0..Q {
            let scores = simd.totals(totals[q], starts[q], units[q]);
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
    (factors, lane): (&[BlockWords], usize),
    (starts, units): (&[f32; Q], &[f32; Q]),
    (out, chunk): (&mut [f32], usize),
) {
    let (row, words) = (4 * places.size, Q * S::QUAD_WORDS * (8 / BITS));
    let keys = &page[..places.key_words * row];
    for token in (0..places.size).step_by(B * BLOCK) {
        for first in (0..Q).step_by(G) {
            for _ in 0..places.key_words / 8 {
                next.ask(simd);
                next.ask_box(simd);
            }
            let mut sums = [[simd.no_sums(); B]; G];
            for (word, factors) in keys[4 * token..].chunks(row).zip(factors.chunks_exact(words)) {
                let word = &word[..B * 4 * BLOCK];
                let mut codes = [simd.codes(&[0; 4 * BLOCK]); B];
                for (b, codes) in codes.iter_mut().enumerate() {
                    *codes = simd.codes(&word[b * 4 * BLOCK..]);
                }
                let factors = (factors, first, lane);
                add_word::<S, Q, G, B, BITS>(simd, &codes, factors, &mut sums);
            }
            for (g, sums) in sums.iter().enumerate() {
                let q = first + g;
                for (b, &sum) in sums.iter().enumerate() {
                    let scores = simd.totals(sum, starts[q], units[q]);
                    simd.store_block(scores, &mut out[q * chunk + token + b * BLOCK..]);
                }
            }
        }
    }
}
