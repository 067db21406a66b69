//! Scores of the pages of a chunk: which boxes are looked at together, and for which queries.

use std::ops::Range;

use half::f16;
use tinyserve_kv::{CodePages, GROUP_PAGES, KvElement};

use super::super::ahead::{ChunkPages, NextPages};
use super::super::products::{self, BLOCK, Places};
use super::super::scores;
use super::super::softmax::{Rows, Shape};
use super::super::tile::{Tile, TileScratch, gather};
use super::{CodeScratch, MOST_QUERIES};
use crate::cpu::simd::{Element, LINE, Simd};

/// Pages of a block of neighbours from which on their boxes are read where they lie; those of fewer
/// are picked out of their groups, so that enough pages share the work on each query.
const NEIGHBOURS: usize = 8;

/// Looks that one line of a row of boxes serves.
const LOOKS: usize = LINE / size_of::<f16>() / BLOCK;

/// Pages whose boxes are side by side in a look at them.
struct Look {
    pages: Range<usize>,
    /// Where the boxes of each page are.
    lanes: [usize; BLOCK],
    /// Whether they are where the look before it left them.
    known: bool,
}

impl Tile<'_, CodePages<'_>> {
    /// Scores of the sealed pages `pages`, from the first column of a chunk on.
    #[inline(always)]
    pub(super) fn code_scores<S: Simd, const BITS: usize>(
        &self,
        simd: S,
        pages: Range<usize>,
        (shape, chunk): (Shape, usize),
        places: (ChunkPages<'_, '_>, Places),
        (next, scratch): (&mut NextPages<'_, '_>, &mut TileScratch),
    ) {
        let (scores, codes) = (&mut scratch.weights[..], &mut scratch.codes);
        let quads = places.1.key_words * (8 / BITS);
        codes.factors.resize(MOST_QUERIES * quads * S::QUAD_WORDS, Default::default());
        let mut first = pages.start;
        while first < pages.end {
            let look = self.look(simd, first..pages.end, next, codes);
            if shape.queries > 1 && !look.known {
                let ranges = &mut codes.ranges[..shape.head_dim * BLOCK];
                products::normalise(simd, ranges, &codes.widest, next);
            }
            first = look.pages.end;
            let mut query = 0;
            while query < shape.queries {
                let (look, out) = ((&look, shape.queries, pages.start), (&mut *scores, chunk));
                let of = (query, places, &mut *next);
                // As many queries as the registers hold sums for, and words enough that no sum
                // waits.
                query += match shape.queries - query {
                    8.. if S::SUMS >= 8 => {
                        self.scores_of::<S, 8, 1, BITS>(simd, look, of, out, codes)
                    }
                    4.. => self.scores_of::<S, 4, 1, BITS>(simd, look, of, out, codes),
                    2.. => self.scores_of::<S, 2, 2, BITS>(simd, look, of, out, codes),
                    _ if S::SUMS >= 8 => {
                        self.scores_of::<S, 1, 4, BITS>(simd, look, of, out, codes)
                    }
                    _ => self.scores_of::<S, 1, 2, BITS>(simd, look, of, out, codes),
                };
            }
        }
    }

    /// Puts the ranges and minima of the next of the listed pages `pages` side by side.
    #[inline(always)]
    fn look<S: Simd>(
        &self,
        simd: S,
        pages: Range<usize>,
        next: &mut NextPages<'_, '_>,
        codes: &mut CodeScratch,
    ) -> Look {
        let boxes = |index| self.boxes_of(index);
        // Pages of the list from page `i` on, this chunk's or not, that are neighbours in the pool.
        let neighbours = |i: usize| {
            let block = self.pool_index(i) / BLOCK;
            (i..self.asked.end).take_while(|&i| self.pool_index(i) / BLOCK == block).count()
        };
        let dim = self.pages.layout().head_dim();
        let (first, mut lanes) = (pages.start, [0; BLOCK]);
        let index = self.pool_index(first);
        let known = codes.block == Some(index / BLOCK);
        let (count, mut end) = (neighbours(first), first);
        let source = if known || count >= NEIGHBOURS {
            end = (first + count).min(pages.end);
            for (lane, i) in lanes.iter_mut().zip(first..end) {
                *lane = self.pool_index(i) % BLOCK;
            }
            if known {
                return Look { pages: first..end, lanes, known };
            }
            codes.block = Some(index / BLOCK);
            (boxes(index), GROUP_PAGES, index / BLOCK * BLOCK % GROUP_PAGES)
        } else {
            codes.block = None;
            for (column, lane) in lanes.iter_mut().enumerate() {
                if end == pages.end || column > 0 && neighbours(end) >= NEIGHBOURS {
                    break;
                }
                let index = self.pool_index(end);
                products::pick_box(boxes(index), index % GROUP_PAGES, &mut codes.corners, column);
                *lane = column;
                end += 1;
            }
            (&codes.corners[..], BLOCK, 0)
        };
        let (ranges, minima) = (&mut codes.ranges[..dim * BLOCK], &mut codes.minima[..dim * BLOCK]);
        codes.widest = products::load_boxes(simd, source, ranges, minima, next);
        if self.ahead > 0 && source.1 == GROUP_PAGES {
            // Each of the looks that share lines asks for its part of the rows of the next ones.
            let part = source.2 / BLOCK % LOOKS;
            let i = first + count + (LOOKS - 1 - part) * BLOCK;
            if i < self.asked.end {
                let index = self.pool_index(i);
                let lane = index % GROUP_PAGES;
                if lane.is_multiple_of(LOOKS * BLOCK) {
                    let rows = 2 * dim / LOOKS;
                    next.add_boxes(&boxes(index)[part * rows * GROUP_PAGES + lane..], rows);
                }
            }
        }
        Look { pages: first..end, lanes, known }
    }

    /// Scores of the pages of a look for `Q` queries; gives `Q`.
    #[inline(always)]
    fn scores_of<S: Simd, const Q: usize, const W: usize, const BITS: usize>(
        &self,
        simd: S,
        (look, queries, first): (&Look, usize, usize),
        (query, (pages, places), next): (
            usize,
            (ChunkPages<'_, '_>, Places),
            &mut NextPages<'_, '_>,
        ),
        (scores, chunk): (&mut [f32], usize),
        codes: &mut CodeScratch,
    ) -> usize {
        let words = places.key_words * (8 / BITS) * S::QUAD_WORDS;
        // Of more queries others' factors have taken their place.
        let known = look.known && Q == queries;
        for (q, offsets) in codes.offsets[..Q].iter_mut().enumerate().filter(|_| !known) {
            let scaled = &codes.scaled[(query + q) * codes.padded..(query + q + 1) * codes.padded];
            let widest = (Q == 1 && queries == 1).then_some(&codes.widest);
            let boxes = (&codes.ranges[..], &codes.minima[..], widest);
            let out = (&mut codes.factors[q * S::QUAD_WORDS..Q * words], Q);
            let lines = if Q < products::MANY { 4 / Q } else { 0 };
            *offsets = products::factors(simd, scaled, boxes, out, (&mut *next, lines));
        }
        for (i, &lane) in look.pages.clone().zip(&look.lanes) {
            let (mut starts, mut units) = ([0.0; Q], [0.0; Q]);
            for q in 0..Q {
                let unit = codes.units[query + q];
                starts[q] = codes.offsets[q][lane % BLOCK] * unit.0;
                units[q] = unit.1 * codes.widest.ranges[lane % BLOCK];
            }
            let page = i - first;
            let of_page = (pages.of(page), places, &mut *next);
            let (factors, numbers) = ((&codes.factors[..Q * words], lane), (&starts, &units));
            let out = (&mut scores[query * chunk + page * places.size..], chunk);
            // As many sums as the registers hold beside the codes of a set; halves of int4 take more.
            let many = Q >= products::MANY && S::SUMS >= 2 * products::MANY;
            if many && BITS == 8 && places.size.is_multiple_of(4 * BLOCK) {
                products::dots_of_blocks::<S, Q, 2, 4, BITS>(simd, of_page, factors, numbers, out);
            } else if many && places.size.is_multiple_of(2 * BLOCK) {
                products::dots_of_blocks::<S, Q, 4, 2, BITS>(simd, of_page, factors, numbers, out);
            } else {
                products::dots::<S, Q, W, BITS>(simd, of_page, factors, numbers, out);
            }
        }
        Q
    }

    /// Scores of the first `tokens` tokens of page `i`, which is open, from column `at` on.
    #[inline(always)]
    pub(super) fn open_scores<S: Simd, O: KvElement + Element>(
        &self,
        simd: S,
        i: usize,
        (at, tokens): (usize, usize),
        (shape, chunk): (Shape, usize),
        scratch: &mut TileScratch,
    ) {
        let (size, dim) = (self.context.pages.layout().page_size(), shape.head_dim);
        let keys = self.open_page::<O>(i).keys;
        let whole_vectors = size.is_multiple_of(S::LANES);
        if !whole_vectors {
            let out = (&mut scratch.page, &mut scratch.keys);
            gather(simd, (|_: usize| keys, 1), (size, dim), chunk, out);
        }
        let mut query = 0;
        while query < shape.queries {
            let (_, block) = scores::block_of(query, shape.queries);
            let q = &scratch.queries[query * dim..(query + block) * dim];
            let out = &mut scratch.weights[query * chunk + at..(query + block) * chunk];
            if whole_vectors {
                scores::scores(simd, (q, block), (keys, size), 0..tokens, (out, chunk));
            } else {
                let keys = (&scratch.keys[..dim * chunk], chunk);
                scores::scores(simd, (q, block), keys, 0..tokens, (out, chunk));
            }
            query += block;
        }
    }
}
