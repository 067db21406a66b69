//! Tiles over pages of codes: which pages and queries go together, and where the open page joins.

use std::ops::Range;

use tinyserve_kv::{CodeLayout, CodePage, GROUP_PAGES, KvElement};

use super::observe::Records;
use super::products::{self, BLOCK, LARGEST, PIECES, TINY, Values};
use super::softmax::{self, Shape, State};
use super::tile::{Tile, TileScratch};
use crate::cpu::simd::{Element, Simd};

/// Buffers of pages of codes, reused from tile to tile.
#[derive(Debug, Default)]
pub(super) struct CodeScratch {
    /// Queries, scaled to [`LARGEST`] `[queries, head_dim]`.
    scaled: Vec<f32>,
    /// What scaled queries times normalised ranges count in `[queries]`.
    units: Vec<f32>,
    /// Ranges of channels over the page's widest `[head_dim, BLOCK pages]`.
    ranges: Vec<f32>,
    /// Minima of channels `[head_dim, BLOCK pages]`.
    minima: Vec<f32>,
    /// Pieces of the factors of a block of queries `[block, quads, PIECES, BLOCK pages]`.
    factors: Vec<u32>,
    /// Scales and minima of the values of a chunk, widened `[2, tokens]`.
    value_ranges: Vec<f32>,
    /// Weights times scales of the chunk `[tokens]`.
    products: Vec<f32>,
    /// Pieces of these products `[block, PIECES, tokens]`.
    pieces: Vec<u8>,
}

impl CodeScratch {
    /// Scales the queries, which are `[queries, head_dim]` in all.
    pub(super) fn load_queries<'a>(&mut self, queries: impl Iterator<Item = &'a [f32]>) {
        self.scaled.clear();
        self.units.clear();
        for query in queries {
            let largest = query
                .iter()
                .fold(TINY, |largest, &q| if q.abs() > largest { q.abs() } else { largest });
            let factor = LARGEST / largest;
            self.scaled.extend(query.iter().map(|&q| q * factor));
            self.units.push(largest / LARGEST);
        }
    }
}

impl<E: KvElement + Element> Tile<'_, E> {
    #[inline(always)]
    pub(super) fn code_page(&self, i: usize) -> CodePage<'_> {
        let page = self.unit.table(self.context)[self.list.get(i)];
        self.context.pages.code_page(self.context.layer, page, self.unit.kv_head)
    }

    /// Adds listed pages `pages`, one chunk, to the softmax of every query. All of them are sealed
    /// but, perhaps, the one that the tile's rows are in themselves, which comes last.
    #[inline(always)]
    pub(super) fn add_code_chunk<S: Simd>(
        &self,
        simd: S,
        pages: Range<usize>,
        (shape, chunk): (Shape, usize),
        (records, chunk_index): (Records, usize),
        layout: CodeLayout,
        scratch: &mut TileScratch,
    ) {
        let size = self.context.pages.layout().page_size();
        let own = (self.unit.first_visible - 1) / size;
        let last_is_own = self.list.get(pages.end - 1) == own;
        let sealed = pages.start..pages.end - usize::from(last_is_own);
        if layout.bits() == 8 {
            self.code_scores::<S, 8>(simd, sealed.clone(), (shape, chunk), layout, scratch);
        } else {
            self.code_scores::<S, 4>(simd, sealed.clone(), (shape, chunk), layout, scratch);
        }
        let at = sealed.len() * size;
        let seen = |query: usize| match last_is_own {
            true => self.unit.first_visible + query / shape.group - own * size,
            false => 0,
        };
        if last_is_own {
            let most = seen(shape.queries - 1);
            let page = sealed.end..pages.end;
            self.open_scores(simd, page, (at, most), (shape, chunk), scratch);
        }
        let mut state = State::new(&mut scratch.part, shape);
        for query in 0..shape.queries {
            let weights = &mut scratch.weights[query * chunk..(query + 1) * chunk];
            scratch.shifts[query] =
                state.soften(simd, query, &mut weights[..], at + seen(query), self.context.scale);
            if records.counted {
                let weights = &weights[..at + seen(query)];
                records.keep(&mut scratch.records, (chunk_index, query), weights, &state);
            }
        }
        if !sealed.is_empty() {
            let state = &mut state;
            let shifts = &scratch.shifts;
            let weights = (&scratch.weights[..], chunk);
            let codes = &mut scratch.codes;
            if layout.bits() == 8 {
                self.code_values::<S, 8>(
                    simd,
                    sealed.clone(),
                    (state, shape),
                    weights,
                    shifts,
                    (layout, codes),
                );
            } else {
                self.code_values::<S, 4>(
                    simd,
                    sealed.clone(),
                    (state, shape),
                    weights,
                    shifts,
                    (layout, codes),
                );
            }
        }
        if last_is_own {
            for query in 0..shape.queries {
                let shift = if sealed.is_empty() { scratch.shifts[query] } else { 1.0 };
                let weights = (&scratch.weights[query * chunk..(query + 1) * chunk], chunk);
                let values = |i: usize| self.page(pages.start + i).values;
                let range = at..at + seen(query);
                state.add_values(simd, query, weights, &[shift], (values, size), range);
            }
        }
    }

    /// Scores of the sealed pages `pages`, from the first column of a chunk on.
    #[inline(always)]
    fn code_scores<S: Simd, const BITS: usize>(
        &self,
        simd: S,
        pages: Range<usize>,
        (shape, chunk): (Shape, usize),
        layout: CodeLayout,
        scratch: &mut TileScratch,
    ) {
        let dim = shape.head_dim;
        let quads = layout.key_words() * (8 / BITS);
        let scores = &mut scratch.weights[..];
        let codes = &mut scratch.codes;
        codes.ranges.resize(dim * BLOCK, 0.0);
        codes.minima.resize(dim * BLOCK, 0.0);
        codes.factors.resize(4 * quads * PIECES * BLOCK, 0);
        let table = self.unit.table(self.context);
        let index = |i: usize| table[self.list.get(i)].index();
        let mut first = pages.start;
        while first < pages.end {
            // Neighbours in the pool share a look at their boxes.
            let block = index(first) / BLOCK;
            let mut end = first + 1;
            while end < pages.end && index(end) / BLOCK == block {
                end += 1;
            }
            let group = block * BLOCK / GROUP_PAGES;
            let boxes =
                self.context.pages.group_boxes::<E>(self.context.layer, group, self.unit.kv_head);
            let lane = block * BLOCK % GROUP_PAGES;
            let widest =
                products::load_boxes(simd, boxes, lane, &mut codes.ranges, &mut codes.minima);
            let mut query = 0;
            while query < shape.queries {
                let run = (first..end, pages.start);
                let left = shape.queries - query;
                let (scores, factors) = ((&mut *scores, chunk), (layout, quads));
                let codes = &mut *codes;
                query += match left {
                    4.. => self.run_scores::<S, 4, BITS>(
                        simd,
                        run,
                        (query, &widest),
                        scores,
                        (factors, codes),
                    ),
                    2.. => self.run_scores::<S, 2, BITS>(
                        simd,
                        run,
                        (query, &widest),
                        scores,
                        (factors, codes),
                    ),
                    _ => self.run_scores::<S, 1, BITS>(
                        simd,
                        run,
                        (query, &widest),
                        scores,
                        (factors, codes),
                    ),
                };
            }
            first = end;
        }
    }

    /// Scores of pages that share a look at their boxes, for `Q` queries; gives `Q`.
    #[inline(always)]
    fn run_scores<S: Simd, const Q: usize, const BITS: usize>(
        &self,
        simd: S,
        (pages, first): (Range<usize>, usize),
        (query, widest): (usize, &[f32; BLOCK]),
        (scores, chunk): (&mut [f32], usize),
        ((layout, quads), codes): ((CodeLayout, usize), &mut CodeScratch),
    ) -> usize {
        let (size, dim) = (self.context.pages.layout().page_size(), self.context.heads.head_dim);
        let length = quads * PIECES * BLOCK;
        let highest = f32::from(layout.highest());
        let (mut offsets, mut units) = ([[0.0; BLOCK]; Q], [[0.0; BLOCK]; Q]);
        for q in 0..Q {
            let scaled = &codes.scaled[(query + q) * dim..(query + q + 1) * dim];
            let both = (self.query(query + q), scaled);
            let boxes = (&codes.ranges[..], &codes.minima[..]);
            let out = &mut codes.factors[q * length..(q + 1) * length];
            offsets[q] = products::factors(both, boxes, out);
            let unit = codes.units[query + q] / highest;
            for (out, widest) in units[q].iter_mut().zip(widest) {
                *out = unit * widest;
            }
        }
        let table = self.unit.table(self.context);
        for i in pages {
            if query == 0 {
                self.prefetch(simd, i);
            }
            let lane = table[self.list.get(i)].index() % BLOCK;
            let at = query * chunk + (i - first) * size;
            products::dots::<S, Q, BITS>(
                simd,
                (self.code_page(i).bytes(), layout, size),
                (&codes.factors[..Q * length], lane),
                (&offsets, &units),
                (&mut scores[at..], chunk),
            );
        }
        Q
    }

    /// The query with this number in the tile.
    #[inline(always)]
    pub(super) fn query(&self, query: usize) -> &[f32] {
        let (group, dim) = (self.context.heads.group(), self.context.heads.head_dim);
        let row = self.unit.rows.start + query / group;
        let at = query % group * dim;
        &self.context.queries(row, self.unit.kv_head)[at..at + dim]
    }

    /// Scores of the first `tokens` tokens of an open page, from column `at` on.
    #[inline(always)]
    fn open_scores<S: Simd>(
        &self,
        simd: S,
        page: Range<usize>,
        (at, tokens): (usize, usize),
        (shape, chunk): (Shape, usize),
        scratch: &mut TileScratch,
    ) {
        let (size, dim) = (self.context.pages.layout().page_size(), shape.head_dim);
        let whole_vectors = size.is_multiple_of(S::LANES);
        if !whole_vectors {
            self.gather(simd, page.clone(), chunk, scratch);
        }
        let keys =
            if whole_vectors { (self.page(page.start).keys, size) } else { (&[] as &[E], size) };
        let mut query = 0;
        while query < shape.queries {
            let (_, block) = softmax::block_of(query, shape.queries);
            let q = &scratch.queries[query * dim..(query + block) * dim];
            let out = &mut scratch.weights[query * chunk + at..(query + block) * chunk];
            if whole_vectors {
                softmax::scores(simd, (q, block), keys, tokens, (out, chunk));
            } else {
                let keys = (&scratch.keys[..dim * chunk], chunk);
                softmax::scores(simd, (q, block), keys, tokens, (out, chunk));
            }
            query += block;
        }
    }

    /// Adds the values of the sealed pages `pages`, whose weights begin a chunk's row.
    #[inline(always)]
    fn code_values<S: Simd, const BITS: usize>(
        &self,
        simd: S,
        pages: Range<usize>,
        (state, shape): (&mut State<'_>, Shape),
        (weights, chunk): (&[f32], usize),
        shifts: &[f32],
        (layout, codes): (CodeLayout, &mut CodeScratch),
    ) {
        let size = self.context.pages.layout().page_size();
        // Tokens of a page, with those that only fill its last word.
        let padded = layout.value_words() * layout.codes_per_word();
        let tokens = pages.len() * padded;
        let channels = layout.group_channels();
        // Two queries a time, where the registers hold their counts.
        let most = if S::LANES == BLOCK { 2 } else { 1 };
        codes.value_ranges.resize(2 * tokens, 0.0);
        codes.products.resize(tokens, 0.0);
        codes.pieces.resize(most * PIECES * tokens, 0);
        for group in 0..layout.groups() {
            let (scales, minima) = codes.value_ranges.split_at_mut(tokens);
            for i in 0..pages.len() {
                let page = self.code_page(pages.start + i);
                for (out, halves) in [(&mut *scales, page.scales()), (&mut *minima, page.minima())]
                {
                    let halves = &halves[group * size..(group + 1) * size];
                    let out = &mut out[i * padded..(i + 1) * padded];
                    out[size..].fill(0.0);
                    let vectors = halves.chunks(S::LANES).zip(out[..size].chunks_mut(S::LANES));
                    for (halves, out) in vectors {
                        simd.store_up_to(simd.load_up_to(halves), out);
                    }
                }
            }
            let end = ((group + 1) * channels).min(shape.head_dim);
            let mut query = 0;
            while query < shape.queries {
                let q = most.min(shape.queries - query);
                let mut sums = [(0.0, 0.0, 0.0); 2];
                for (i, sums) in sums.iter_mut().enumerate().take(q) {
                    let row = &weights[(query + i) * chunk..(query + i + 1) * chunk];
                    let ranges = codes.value_ranges.split_at(tokens);
                    let out = &mut codes.products;
                    let offset = products::products(simd, row, ranges, (size, padded), out);
                    let pieces = &mut codes.pieces[i * PIECES * tokens..(i + 1) * PIECES * tokens];
                    let unit = products::split(simd, &codes.products, pieces);
                    *sums = (offset, unit, shifts[query + i]);
                }
                let values = Values {
                    page: |i: usize| self.code_page(pages.start + i),
                    pages: pages.len(),
                    layout,
                    head_dim: shape.head_dim,
                    pieces: &codes.pieces[..q * PIECES * tokens],
                };
                let (range, target) = (group * channels..end, (&mut *state, query));
                if q == 2 {
                    values.add::<S, 2, BITS>(simd, range, target, &sums);
                } else {
                    values.add::<S, 1, BITS>(simd, range, target, &[sums[0]]);
                }
                query += q;
            }
        }
    }
}
