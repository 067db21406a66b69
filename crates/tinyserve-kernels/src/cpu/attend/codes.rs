//! Tiles over pages of codes: which pages and queries go together, and where the open page joins.

use std::ops::Range;

use half::f16;
use tinyserve_kv::{CodePages, GROUP_PAGES, HeadPage, KvElement, KvFormat};

use super::ahead::{Ahead, ChunkPages, NextPages};
use super::observe::Records;
use super::products::{self, BLOCK, Pieces, Places, QuadFactors, TINY, Values, Widest};
use super::softmax::{self, OnePage, Rows, Shape, State};
use super::tile::{StoredPages, Tile, TileScratch, chunk_pages, gather};
use crate::cpu::memory::Aligned;
use crate::cpu::simd::{Element, LARGEST, LINE, Simd};

/// Pages of a block of neighbours from which on their boxes are read where they lie; those of fewer
/// are picked out of their groups, so that enough pages share the work on each query.
const NEIGHBOURS: usize = 8;

/// Looks that one line of a row of boxes serves.
const LOOKS: usize = LINE / size_of::<f16>() / BLOCK;

/// Most bytes of a chunk's pages that memory is asked for while the chunk before it is computed.
const MOST_ASKED: usize = 256 * 1024;

/// Most queries whose values are summed up together.
const MOST_VALUES: usize = 4;

/// Most queries whose scores are summed up together.
const MOST_QUERIES: usize = 8;

/// Buffers of pages of codes, reused from tile to tile.
#[derive(Debug, Default)]
pub(super) struct CodeScratch {
    /// Where the pages of a chunk begin, and the next chunk's.
    starts: Vec<usize>,
    /// Channels of a query, padded to whole vectors.
    padded: usize,
    /// Queries, scaled to [`LARGEST`] `[queries, padded]`.
    scaled: Aligned,
    /// What scaled queries count in, the scale of scores included, and what they do times codes
    /// `[queries]`.
    units: Vec<(f32, f32)>,
    /// Boxes that were picked out of their groups `[head_dim, 2 (max, min), BLOCK pages]`.
    corners: Vec<f16>,
    /// Ranges of channels `[padded, BLOCK pages]`; over the page's widest where several queries meet
    /// them.
    ranges: Aligned,
    /// Minima of channels, `[padded, BLOCK pages]`.
    minima: Aligned,
    /// The widest ranges of these pages.
    widest: Widest,
    /// Where these pages are a block of neighbours in the pool, which one: chunks of large pages have
    /// it in common.
    block: Option<usize>,
    /// Factors of some queries for the pages of a look `[quads, queries]`.
    factors: Vec<QuadFactors>,
    /// Scaled queries times the minima of these pages.
    offsets: [[f32; BLOCK]; MOST_QUERIES],
    /// Scales and minima of the values of a chunk, widened `[2, tokens]`.
    value_ranges: Aligned,
    /// Weights times scales of the chunk for some queries `[queries, tokens]`.
    products: Aligned,
    /// Pieces of the products of some queries `[blocks of tokens, queries]`.
    pieces: Vec<Pieces>,
}

impl CodeScratch {
    /// Scales `queries` queries, the one of a number as `query` gives it, for codes up to
    /// `highest_code` and scores that are multiplied by `scale`.
    #[inline(always)]
    pub(super) fn load_queries<'a, S: Simd>(
        &mut self,
        simd: S,
        (queries, dim, highest_code): (usize, usize, u8),
        scale: f32,
        query: impl Fn(usize) -> &'a [f32],
    ) {
        self.padded = dim.next_multiple_of(BLOCK);
        self.block = None;
        self.scaled.resize(queries * self.padded);
        self.units.clear();
        for (i, scaled) in self.scaled.chunks_exact_mut(self.padded).enumerate() {
            let query = query(i);
            let mut largest = simd.splat(TINY);
            for (q, scaled) in query.chunks(S::LANES).zip(scaled.chunks_exact_mut(S::LANES)) {
                let q = simd.load_up_to(q);
                simd.store(q, scaled);
                let negative = simd.sub(simd.splat(0.0), q);
                largest = simd.max(q, simd.max(negative, largest));
            }
            let largest = simd.highest(largest);
            scaled[dim..].fill(0.0);
            let factor = simd.splat(LARGEST / largest);
            for scaled in scaled.chunks_exact_mut(S::LANES) {
                simd.store(simd.mul(simd.load(scaled), factor), scaled);
            }
            let unit = largest / LARGEST * scale;
            self.units.push((unit, unit / f32::from(highest_code)));
        }
        self.corners.resize(2 * dim * BLOCK, f16::ZERO);
        self.ranges.resize(BLOCK * self.padded);
        self.minima.resize(BLOCK * self.padded);
        // Padding meets queries of nothing.
        self.ranges[BLOCK * dim..].fill(0.0);
        self.minima[BLOCK * dim..].fill(0.0);
    }
}

/// Pages whose boxes are side by side in a look at them.
struct Look {
    pages: Range<usize>,
    /// Where the boxes of each page are.
    lanes: [usize; BLOCK],
    /// Whether they are where the look before it left them.
    known: bool,
}

impl StoredPages for CodePages<'_> {
    const CODES: bool = true;

    fn highest_code(&self) -> u8 {
        self.layout().highest()
    }

    #[inline(always)]
    fn add_chunk<S: Simd>(
        tile: &Tile<'_, Self>,
        simd: S,
        pages: Range<usize>,
        shape: (Shape, usize),
        records: (Records, usize),
        scratch: &mut TileScratch,
    ) {
        if tile.pages.layout().bits() == 8 {
            tile.add_code_chunk::<S, 8>(simd, pages, shape, records, scratch);
        } else {
            tile.add_code_chunk::<S, 4>(simd, pages, shape, records, scratch);
        }
    }
}

impl Tile<'_, CodePages<'_>> {
    /// Where the codes of page `i` of the list begin among those of all pages of the head.
    #[inline(always)]
    fn code_start(&self, i: usize) -> usize {
        self.pages.start(self.unit.table(self.context)[self.list.get(i)])
    }

    /// Index in the pool of page `i` of the list.
    #[inline(always)]
    fn pool_index(&self, i: usize) -> usize {
        self.unit.table(self.context)[self.list.get(i)].index()
    }

    /// The boxes of the group of page `index` in the pool, `[head_dim, 2 (max, min), GROUP_PAGES]`.
    #[inline(always)]
    fn boxes_of(&self, index: usize) -> &[f16] {
        let (layer, head) = (self.context.layer, self.unit.kv_head);
        self.context.pages.group_boxes::<f16>(layer, index / GROUP_PAGES, head)
    }

    /// Where the listed pages `pages` begin, and the next chunk's, if memory is asked for them.
    #[inline(always)]
    fn find_pages(&self, pages: &Range<usize>, starts: &mut Vec<usize>) {
        let chunk = chunk_pages(self.pages.layout().page_size());
        let near = chunk * self.pages.layout().bytes() <= MOST_ASKED && self.unit.rows.len() == 1;
        let ahead = if near { chunk } else { 0 };
        let end = (pages.end + ahead).min(self.asked.end).max(pages.end);
        starts.clear();
        starts.extend((pages.start..end).map(|i| self.code_start(i)));
    }

    fn places(&self) -> Places {
        let layout = self.pages.layout();
        Places {
            size: layout.page_size(),
            head_dim: layout.head_dim(),
            key_words: layout.key_words(),
            value_words: layout.value_words(),
            values: layout.values().start,
        }
    }

    /// Page `i` of the list as it was appended.
    fn open_page<O: KvElement>(&self, i: usize) -> HeadPage<'_, O> {
        let page = self.unit.table(self.context)[self.list.get(i)];
        self.context.pages.head(self.context.layer, page, self.unit.kv_head)
    }

    /// Adds listed pages `pages`, one chunk, to the softmax of every query. All of them are sealed
    /// but, perhaps, the one that the tile's rows are in themselves, which comes last.
    #[inline(always)]
    fn add_code_chunk<S: Simd, const BITS: usize>(
        &self,
        simd: S,
        pages: Range<usize>,
        (shape, chunk): (Shape, usize),
        (records, chunk_index): (Records, usize),
        scratch: &mut TileScratch,
    ) {
        let size = self.context.pages.layout().page_size();
        let own = (self.unit.first_visible - 1) / size;
        let last_is_own = self.list.get(pages.end - 1) == own;
        let places = self.places();
        let mut starts = std::mem::take(&mut scratch.codes.starts);
        self.find_pages(&pages, &mut starts);
        let (bytes, length) = (self.pages.bytes(), self.pages.layout().bytes());
        let (own_starts, next_starts) = starts.split_at(pages.len());
        let of_chunk = ChunkPages { bytes, starts: own_starts, length };
        if pages.start == self.asked.start && self.unit.rows.len() == 1 {
            // No chunk before this one asks for them; boxes are read first.
            let index = self.pool_index(pages.start);
            for row in self.boxes_of(index)[index % GROUP_PAGES..].chunks(GROUP_PAGES) {
                simd.prefetch(row.as_ptr());
            }
            NextPages::new(of_chunk).ask_rest(simd);
        }
        let mut next = NextPages::new(ChunkPages { bytes, starts: next_starts, length });
        let sealed = pages.start..pages.end - usize::from(last_is_own);
        let places = (of_chunk, places);
        self.code_scores::<S, BITS>(
            simd,
            sealed.clone(),
            (shape, chunk),
            places,
            (&mut next, scratch),
        );
        let at = sealed.len() * size;
        let seen = |query: usize| match last_is_own {
            true => self.unit.first_visible + query / shape.group - own * size,
            false => 0,
        };
        let open_is_wide = self.context.pages.layout().open_format() == KvFormat::F32;
        if last_is_own {
            let columns = (at, seen(shape.queries - 1));
            let out = (shape, chunk);
            if open_is_wide {
                self.open_scores::<S, f32>(simd, sealed.end, columns, out, scratch);
            } else {
                self.open_scores::<S, f16>(simd, sealed.end, columns, out, scratch);
            }
        }
        let mut state = State::new(&mut scratch.part, shape);
        for (query, scores) in scratch.weights.chunks_exact_mut(chunk).enumerate() {
            let scores = (scores, at + seen(query));
            let next = &mut next.between(shape.queries);
            scratch.peaks[query] = state.raised(simd, query, scores, next);
        }
        for query in 0..shape.queries {
            let weights = &mut scratch.weights[query * chunk..(query + 1) * chunk];
            scratch.shifts[query] = state.soften(
                simd,
                (query, scratch.peaks[query]),
                (&mut weights[..], at + seen(query)),
                &mut next.between(shape.queries),
            );
            if records.counted {
                let weights = &weights[..at + seen(query)];
                records.keep(&mut scratch.records, (chunk_index, query), weights, &state);
            }
        }
        if !sealed.is_empty() {
            let weights = (&scratch.weights[..], chunk);
            let (shifts, codes) = (&scratch.shifts, &mut scratch.codes);
            let out = (&mut state, shape.queries);
            let sealed = (places, sealed.len(), &mut next);
            self.code_values::<S, BITS>(simd, sealed, out, weights, shifts, codes);
        }
        next.ask_rest(simd);
        scratch.codes.starts = starts;
        if last_is_own {
            for query in 0..shape.queries {
                let shift = if sealed.is_empty() { scratch.shifts[query] } else { 1.0 };
                let weights = &scratch.weights[query * chunk..(query + 1) * chunk];
                let weights = ((weights, chunk), shift, at..at + seen(query));
                // The open page is the one after the sealed pages of the chunk.
                if open_is_wide {
                    self.open_values::<S, f32>(simd, sealed.end, (&mut state, query), weights);
                } else {
                    self.open_values::<S, f16>(simd, sealed.end, (&mut state, query), weights);
                }
            }
        }
    }

    /// Adds the values of page `i`, which is open, whose weights are in `columns` of a chunk.
    #[inline(always)]
    fn open_values<S: Simd, O: KvElement + Element>(
        &self,
        simd: S,
        i: usize,
        (state, query): (&mut State<'_>, usize),
        (weights, shift, columns): ((&[f32], usize), f32, Range<usize>),
    ) {
        let size = self.context.pages.layout().page_size();
        let values = &OnePage(self.open_page::<O>(i).values);
        state.add_values(simd, query, weights, &[shift], (values, size), columns);
    }

    /// Scores of the sealed pages `pages`, from the first column of a chunk on.
    #[inline(always)]
    fn code_scores<S: Simd, const BITS: usize>(
        &self,
        simd: S,
        pages: Range<usize>,
        (shape, chunk): (Shape, usize),
        places: (ChunkPages<'_, '_>, Places),
        (next, scratch): (&mut NextPages<'_, '_>, &mut TileScratch),
    ) {
        let (scores, codes) = (&mut scratch.weights[..], &mut scratch.codes);
        codes.factors.resize(MOST_QUERIES * places.1.key_words * (8 / BITS), Default::default());
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
                    8.. if S::LANES == BLOCK => {
                        self.scores_of::<S, 8, 1, BITS>(simd, look, of, out, codes)
                    }
                    4.. if S::LANES == BLOCK => {
                        self.scores_of::<S, 4, 1, BITS>(simd, look, of, out, codes)
                    }
                    2.. if S::LANES == BLOCK => {
                        self.scores_of::<S, 2, 2, BITS>(simd, look, of, out, codes)
                    }
                    2.. => self.scores_of::<S, 2, 1, BITS>(simd, look, of, out, codes),
                    _ if S::LANES == BLOCK => {
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
        let quads = places.key_words * (8 / BITS);
        // Of more queries others' factors have taken their place.
        let known = look.known && Q == queries;
        for (q, offsets) in codes.offsets[..Q].iter_mut().enumerate().filter(|_| !known) {
            let scaled = &codes.scaled[(query + q) * codes.padded..(query + q + 1) * codes.padded];
            let widest = (Q == 1 && queries == 1).then_some(&codes.widest);
            let boxes = (&codes.ranges[..], &codes.minima[..], widest);
            let out = (&mut codes.factors[q..Q * quads], Q);
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
            let (factors, numbers) = ((&codes.factors[..Q * quads], lane), (&starts, &units));
            let out = (&mut scores[query * chunk + page * places.size..], chunk);
            // As many sums as the registers hold beside the codes of a set; halves of int4 take more.
            if Q >= products::MANY && BITS == 8 && places.size.is_multiple_of(4 * BLOCK) {
                products::dots_of_blocks::<S, Q, 2, 4, BITS>(simd, of_page, factors, numbers, out);
            } else if Q >= products::MANY && places.size.is_multiple_of(2 * BLOCK) {
                products::dots_of_blocks::<S, Q, 4, 2, BITS>(simd, of_page, factors, numbers, out);
            } else {
                products::dots::<S, Q, W, BITS>(simd, of_page, factors, numbers, out);
            }
        }
        Q
    }

    /// Scores of the first `tokens` tokens of page `i`, which is open, from column `at` on.
    #[inline(always)]
    fn open_scores<S: Simd, O: KvElement + Element>(
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
            let (_, block) = softmax::block_of(query, shape.queries);
            let q = &scratch.queries[query * dim..(query + block) * dim];
            let out = &mut scratch.weights[query * chunk + at..(query + block) * chunk];
            if whole_vectors {
                softmax::scores(simd, (q, block), (keys, size), 0..tokens, (out, chunk));
            } else {
                let keys = (&scratch.keys[..dim * chunk], chunk);
                softmax::scores(simd, (q, block), keys, 0..tokens, (out, chunk));
            }
            query += block;
        }
    }

    /// Adds the values of a chunk's first `count` pages, which are sealed and whose weights begin a
    /// chunk's row.
    #[inline(always)]
    fn code_values<S: Simd, const BITS: usize>(
        &self,
        simd: S,
        ((pages, places), count, next): (
            (ChunkPages<'_, '_>, Places),
            usize,
            &mut NextPages<'_, '_>,
        ),
        (state, queries): (&mut State<'_>, usize),
        (weights, chunk): (&[f32], usize),
        shifts: &[f32],
        codes: &mut CodeScratch,
    ) {
        let (size, layout) = (places.size, self.pages.layout());
        // Tokens of a page, with those that only fill its last word.
        let padded = places.value_words * layout.codes_per_word();
        let tokens = count * padded;
        let blocks = tokens.div_ceil(BLOCK);
        let channels = layout.group_channels();
        let (scales, minima) = (layout.scales().start, layout.minima().start);
        codes.value_ranges.resize(2 * tokens);
        codes.products.resize(MOST_VALUES * blocks * BLOCK);
        codes.pieces.resize(MOST_VALUES * blocks, Default::default());
        for group in 0..layout.groups() {
            let (out_scales, out_minima) = codes.value_ranges.split_at_mut(tokens);
            let out = out_scales.chunks_exact_mut(padded).zip(out_minima.chunks_exact_mut(padded));
            for (i, (out_scales, out_minima)) in out.enumerate() {
                let bytes = pages.of(i);
                for (out, start) in [(out_scales, scales), (out_minima, minima)] {
                    let halves = &bytes[start + 2 * group * size..][..2 * size];
                    let halves: &[f16] = bytemuck::cast_slice(halves);
                    let (out, padding) = out.split_at_mut(size);
                    padding.fill(0.0);
                    let mut out = out.chunks_exact_mut(S::LANES);
                    let mut halves = halves.chunks_exact(S::LANES);
                    for (halves, out) in halves.by_ref().zip(out.by_ref()) {
                        next.ask(simd);
                        simd.store(simd.load_f16(halves), out);
                    }
                    let (halves, out) = (halves.remainder(), out.into_remainder());
                    if !out.is_empty() {
                        simd.store_tail(simd.load_tail(halves), out);
                    }
                }
            }
            let end = ((group + 1) * channels).min(places.head_dim);
            let mut query = 0;
            while query < queries {
                let q = match queries - query {
                    // As many as the registers hold counts for.
                    4.. if S::LANES == BLOCK => MOST_VALUES,
                    2.. if S::LANES == BLOCK => 2,
                    _ => 1,
                };
                // Query by query in each step: the last operations of a sum wait for each other.
                let mut sums = [(0.0, 0.0, 0.0); MOST_VALUES];
                let rows = codes.products.chunks_exact_mut(blocks * BLOCK);
                for (i, (sums, out)) in sums.iter_mut().zip(rows).enumerate().take(q) {
                    let row = &weights[(query + i) * chunk..(query + i + 1) * chunk];
                    let ranges = codes.value_ranges.split_at(tokens);
                    let next = &mut next.between(queries);
                    let (offset, largest) =
                        products::products(simd, row, ranges, (size, padded), out, next);
                    *sums = (offset, largest, shifts[query + i]);
                }
                let rows = codes.products.chunks_exact(blocks * BLOCK);
                for (i, ((_, unit, _), row)) in sums.iter_mut().zip(rows).enumerate().take(q) {
                    let out = (&mut codes.pieces[i..], q);
                    let next = &mut next.between(queries);
                    *unit = products::split(simd, (row, *unit), out, next);
                }
                let values = Values {
                    chunk: pages,
                    pages: count,
                    places,
                    pieces: &codes.pieces[..q * blocks],
                };
                let (range, target) = (group * channels..end, (&mut *state, query));
                let next = &mut *next;
                match sums {
                    _ if q == MOST_VALUES => {
                        values.add::<S, MOST_VALUES, BITS>(simd, range, target, &sums, next);
                    }
                    [first, second, ..] if q == 2 => {
                        values.add::<S, 2, BITS>(simd, range, target, &[first, second], next);
                    }
                    [first, ..] => values.add::<S, 1, BITS>(simd, range, target, &[first], next),
                }
                query += q;
            }
        }
    }
}
