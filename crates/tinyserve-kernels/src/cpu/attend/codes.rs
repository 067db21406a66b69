//! Tiles over pages of codes: which pages and queries go together, and where the open page joins.

use std::ops::Range;

use half::f16;
use tinyserve_kv::{CodePages, GROUP_PAGES, HeadPage, KvElement, KvFormat};

use super::observe::Records;
use super::products::{self, BLOCK, Factors, Pieces, Places, QuadFactors, TINY, Values};
use super::softmax::{self, OnePage, Rows, Shape, State};
use super::tile::{Chunk, StoredPages, Tile, TileScratch, gather};
use crate::cpu::memory::Aligned;
use crate::cpu::simd::{Element, LARGEST, LINE, Simd};

/// Pages of a block of neighbours from which on they share a look at their boxes.
const SHARED_LOOK: usize = 5;

/// Most queries whose values are summed up together.
const MOST_VALUES: usize = 4;

/// Most queries whose scores are summed up together.
const MOST_QUERIES: usize = 8;

/// Buffers of pages of codes, reused from tile to tile.
#[derive(Debug, Default)]
pub(super) struct CodeScratch {
    /// Channels of a query, padded to whole vectors.
    padded: usize,
    /// Queries, scaled to [`LARGEST`] `[queries, padded]`.
    scaled: Vec<f32>,
    /// Scaled queries side by side `[queries / LANES, head_dim, LANES]`.
    columns: Vec<f32>,
    /// What scaled queries count in, and what they do times codes `[queries]`.
    units: Vec<(f32, f32)>,
    /// A page's box `[2 (max, min), padded]`.
    corners: Vec<f16>,
    /// Ranges of channels over the page's widest, `[head_dim, BLOCK pages]` or `[padded]`.
    ranges: Aligned,
    /// Minima of channels, `[head_dim, BLOCK pages]` or `[padded]`.
    minima: Aligned,
    /// Factors of some queries for pages that share a look at their boxes `[quads, queries]`.
    shared: Vec<QuadFactors>,
    /// Factors of some queries for one page `[blocks of channels, queries]`.
    own: Vec<Pieces>,
    /// `scaled·minima` of one page `[queries]`, in whole blocks.
    offsets: Vec<f32>,
    /// Scales and minima of the values of a chunk, widened `[2, tokens]`.
    value_ranges: Aligned,
    /// Weights times scales of the chunk `[tokens]`.
    products: Aligned,
    /// Pieces of the products of some queries `[blocks of tokens, queries]`.
    pieces: Vec<Pieces>,
}

impl CodeScratch {
    /// Scales the queries for codes up to `highest_code`, and puts `lanes` of them side by side.
    pub(super) fn load_queries<'a>(
        &mut self,
        (lanes, highest_code): (usize, u8),
        queries: impl ExactSizeIterator<Item = &'a [f32]>,
    ) {
        self.scaled.clear();
        self.units.clear();
        self.columns.clear();
        self.offsets.clear();
        self.offsets.resize(queries.len().next_multiple_of(BLOCK), 0.0);
        for (i, query) in queries.enumerate() {
            let largest = query
                .iter()
                .fold(TINY, |largest, &q| if q.abs() > largest { q.abs() } else { largest });
            let factor = LARGEST / largest;
            self.padded = query.len().next_multiple_of(BLOCK);
            self.scaled.extend(query.iter().map(|&q| q * factor));
            self.scaled.resize((i + 1) * self.padded, 0.0);
            let unit = largest / LARGEST;
            self.units.push((unit, unit / f32::from(highest_code)));
            let (first, lane) = (i / lanes * lanes * query.len(), i % lanes);
            self.columns.resize(first + lanes * query.len(), 0.0);
            for (row, &q) in self.columns[first..].chunks_exact_mut(lanes).zip(query) {
                row[lane] = q * factor;
            }
        }
        self.corners.clear();
        self.corners.resize(2 * self.padded, f16::ZERO);
        self.ranges.resize(BLOCK * self.padded);
        self.minima.resize(BLOCK * self.padded);
    }
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

impl Rows<u8> for Chunk<'_, '_, CodePages<'_>> {
    #[inline(always)]
    fn of(&self, page: usize) -> &[u8] {
        self.tile.code_page(self.first + page)
    }

    #[inline(always)]
    fn ahead(&self, page: usize) -> usize {
        self.tile.ahead(self.first + page)
    }
}

impl Tile<'_, CodePages<'_>> {
    /// The codes of page `i` of the list.
    #[inline(always)]
    fn code_page(&self, i: usize) -> &[u8] {
        self.pages.get(self.unit.table(self.context)[self.list.get(i)]).bytes()
    }

    fn places(&self) -> Places {
        let layout = self.pages.layout();
        Places {
            size: layout.page_size(),
            head_dim: layout.head_dim(),
            key_words: layout.key_words(),
            value_words: layout.value_words(),
            values: layout.values().start,
            scales: layout.scales().start,
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
        if pages.start == self.range.start {
            // No page before these asks for them.
            for i in pages.start..pages.start + self.ahead(pages.start) {
                for line in self.code_page(i).chunks(LINE) {
                    simd.prefetch_far(line.as_ptr());
                }
            }
        }
        let sealed = pages.start..pages.end - usize::from(last_is_own);
        self.code_scores::<S, BITS>(simd, sealed.clone(), (shape, chunk), places, scratch);
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
            let weights = (&scratch.weights[..], chunk);
            let (shifts, codes) = (&scratch.shifts, &mut scratch.codes);
            let out = (&mut state, shape.queries);
            let sealed = (sealed.clone(), places);
            self.code_values::<S, BITS>(simd, sealed, out, weights, shifts, codes);
        }
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
        places: Places,
        scratch: &mut TileScratch,
    ) {
        let (scores, codes) = (&mut scratch.weights[..], &mut scratch.codes);
        codes.shared.resize(MOST_QUERIES * places.key_words * (8 / BITS), Default::default());
        codes.own.resize(MOST_QUERIES * codes.padded / BLOCK, Default::default());
        let table = self.unit.table(self.context);
        let index = |i: usize| table[self.list.get(i)].index();
        let mut first = pages.start;
        while first < pages.end {
            let block = index(first) / BLOCK;
            let mut end = first + 1;
            while end < pages.end && index(end) / BLOCK == block {
                end += 1;
            }
            let group = block * BLOCK / GROUP_PAGES;
            let (layer, head) = (self.context.layer, self.unit.kv_head);
            let boxes = self.context.pages.group_boxes::<f16>(layer, group, head);
            if end - first >= SHARED_LOOK {
                // Neighbours in the pool share a look at their boxes.
                let lane = block * BLOCK % GROUP_PAGES;
                let rows = shape.head_dim * BLOCK;
                // Padding meets queries of nothing.
                codes.ranges[rows..].fill(0.0);
                codes.minima[rows..].fill(0.0);
                let (ranges, minima) = (&mut codes.ranges[..rows], &mut codes.minima[..rows]);
                let widest = products::load_boxes(simd, boxes, lane, ranges, minima);
                let (run, out) = ((first..end, pages.start), (&mut *scores, chunk));
                self.run_scores::<S, BITS>(simd, run, (shape.queries, places), &widest, out, codes);
            } else {
                for i in first..end {
                    let lane = index(i) % GROUP_PAGES;
                    let (page, out) = ((i, pages.start), (&mut *scores, chunk));
                    let queries = (shape.queries, places);
                    self.page_scores::<S, BITS>(simd, page, queries, (boxes, lane), out, codes);
                }
            }
            first = end;
        }
    }

    /// Scores of pages that share a look at their boxes.
    #[inline(always)]
    fn run_scores<S: Simd, const BITS: usize>(
        &self,
        simd: S,
        (pages, first): (Range<usize>, usize),
        (queries, places): (usize, Places),
        widest: &[f32; BLOCK],
        (scores, chunk): (&mut [f32], usize),
        codes: &mut CodeScratch,
    ) {
        let mut query = 0;
        while query < queries {
            let (run, of) = ((pages.clone(), first), (query, places, widest));
            let out = (&mut *scores, chunk);
            // As many queries as the registers hold sums for, and words enough that no sum waits.
            query += match queries - query {
                8.. if S::LANES == BLOCK => self.run_of::<S, 8, 1, BITS>(simd, run, of, out, codes),
                4.. if S::LANES == BLOCK => self.run_of::<S, 4, 1, BITS>(simd, run, of, out, codes),
                2.. if S::LANES == BLOCK => self.run_of::<S, 2, 2, BITS>(simd, run, of, out, codes),
                2.. => self.run_of::<S, 2, 1, BITS>(simd, run, of, out, codes),
                _ if S::LANES == BLOCK => self.run_of::<S, 1, 4, BITS>(simd, run, of, out, codes),
                _ => self.run_of::<S, 1, 2, BITS>(simd, run, of, out, codes),
            };
        }
    }

    /// [`Self::run_scores`] for `Q` queries; gives `Q`.
    #[inline(always)]
    fn run_of<S: Simd, const Q: usize, const W: usize, const BITS: usize>(
        &self,
        simd: S,
        (pages, first): (Range<usize>, usize),
        (query, places, widest): (usize, Places, &[f32; BLOCK]),
        (scores, chunk): (&mut [f32], usize),
        codes: &mut CodeScratch,
    ) -> usize {
        let quads = places.key_words * (8 / BITS);
        let mut offsets = [[0.0; BLOCK]; Q];
        for (q, offsets) in offsets.iter_mut().enumerate() {
            let scaled = &codes.scaled[(query + q) * codes.padded..(query + q + 1) * codes.padded];
            let boxes = (&codes.ranges[..], &codes.minima[..]);
            *offsets = products::factors(simd, scaled, boxes, (&mut codes.shared[q..Q * quads], Q));
        }
        let table = self.unit.table(self.context);
        for i in pages {
            let lane = table[self.list.get(i)].index() % BLOCK;
            let (mut starts, mut units) = ([0.0; Q], [0.0; Q]);
            for q in 0..Q {
                let unit = codes.units[query + q];
                starts[q] = offsets[q][lane] * unit.0;
                units[q] = unit.1 * widest[lane];
            }
            let ahead = if query == 0 { self.ahead(i) } else { 0 };
            products::dots::<S, Q, W, BITS>(
                simd,
                (self.code_page(i), self.code_page(i + ahead), places),
                Factors::Shared(&codes.shared[..Q * quads], lane),
                (&starts, &units),
                (&mut scores[query * chunk + (i - first) * places.size..], chunk),
            );
        }
        Q
    }

    /// Scores of one page.
    #[inline(always)]
    fn page_scores<S: Simd, const BITS: usize>(
        &self,
        simd: S,
        (i, first): (usize, usize),
        (queries, places): (usize, Places),
        (boxes, lane): (&[f16], usize),
        (scores, chunk): (&mut [f32], usize),
        codes: &mut CodeScratch,
    ) {
        let (padded, dim) = (codes.padded, places.head_dim);
        let (ranges, minima) = (&mut codes.ranges[..padded], &mut codes.minima[..padded]);
        let out = (&mut codes.corners[..], ranges, minima);
        let widest = products::load_box(simd, boxes, lane, out);
        let offsets = codes.offsets.chunks_exact_mut(S::LANES);
        for (columns, offsets) in codes.columns.chunks_exact(S::LANES * dim).zip(offsets) {
            products::page_offsets(simd, columns, &codes.minima[..dim], offsets);
        }
        let mut query = 0;
        while query < queries {
            let (page, of) = ((i, first), (query, places, widest));
            let out = (&mut *scores, chunk);
            query += match queries - query {
                8.. if S::LANES == BLOCK => {
                    self.page_of::<S, 8, 1, BITS>(simd, page, of, out, codes)
                }
                4.. if S::LANES == BLOCK => {
                    self.page_of::<S, 4, 1, BITS>(simd, page, of, out, codes)
                }
                2.. if S::LANES == BLOCK => {
                    self.page_of::<S, 2, 2, BITS>(simd, page, of, out, codes)
                }
                2.. => self.page_of::<S, 2, 1, BITS>(simd, page, of, out, codes),
                _ if S::LANES == BLOCK => self.page_of::<S, 1, 4, BITS>(simd, page, of, out, codes),
                _ => self.page_of::<S, 1, 2, BITS>(simd, page, of, out, codes),
            };
        }
    }

    /// [`Self::page_scores`] for `Q` queries; gives `Q`.
    #[inline(always)]
    fn page_of<S: Simd, const Q: usize, const W: usize, const BITS: usize>(
        &self,
        simd: S,
        (i, first): (usize, usize),
        (query, places, widest): (usize, Places, f32),
        (scores, chunk): (&mut [f32], usize),
        codes: &mut CodeScratch,
    ) -> usize {
        let padded = codes.padded;
        let blocks = Q * padded / BLOCK;
        let (mut starts, mut units) = ([0.0; Q], [0.0; Q]);
        for q in 0..Q {
            let scaled = &codes.scaled[(query + q) * padded..(query + q + 1) * padded];
            let out = (&mut codes.own[q..blocks], Q);
            products::page_factors(simd, scaled, &codes.ranges[..padded], out);
            let unit = codes.units[query + q];
            starts[q] = codes.offsets[query + q] * unit.0;
            units[q] = unit.1 * widest;
        }
        let ahead = if query == 0 { self.ahead(i) } else { 0 };
        products::dots::<S, Q, W, BITS>(
            simd,
            (self.code_page(i), self.code_page(i + ahead), places),
            Factors::Own(&codes.own[..blocks]),
            (&starts, &units),
            (&mut scores[query * chunk + (i - first) * places.size..], chunk),
        );
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
                softmax::scores(simd, (q, block), (keys, size), tokens, (out, chunk));
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
        (pages, places): (Range<usize>, Places),
        (state, queries): (&mut State<'_>, usize),
        (weights, chunk): (&[f32], usize),
        shifts: &[f32],
        codes: &mut CodeScratch,
    ) {
        let (size, layout) = (places.size, self.pages.layout());
        // Tokens of a page, with those that only fill its last word.
        let padded = places.value_words * layout.codes_per_word();
        let tokens = pages.len() * padded;
        let blocks = tokens.div_ceil(BLOCK);
        let channels = layout.group_channels();
        let (scales, minima) = (layout.scales().start, layout.minima().start);
        codes.value_ranges.resize(2 * tokens);
        codes.products.resize(blocks * BLOCK);
        codes.pieces.resize(MOST_VALUES * blocks, Default::default());
        for group in 0..layout.groups() {
            let (out_scales, out_minima) = codes.value_ranges.split_at_mut(tokens);
            for i in 0..pages.len() {
                let bytes = self.code_page(pages.start + i);
                let both = [(&mut *out_scales, scales), (&mut *out_minima, minima)];
                for (out, start) in both {
                    let halves = &bytes[start + 2 * group * size..][..2 * size];
                    let halves: &[f16] = bytemuck::cast_slice(halves);
                    let out = &mut out[i * padded..(i + 1) * padded];
                    out[size..].fill(0.0);
                    let vectors = halves.chunks(S::LANES).zip(out[..size].chunks_mut(S::LANES));
                    for (halves, out) in vectors {
                        simd.store_up_to(simd.load_up_to(halves), out);
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
                let mut sums = [(0.0, 0.0, 0.0); MOST_VALUES];
                for (i, sums) in sums.iter_mut().enumerate().take(q) {
                    let row = &weights[(query + i) * chunk..(query + i + 1) * chunk];
                    let ranges = codes.value_ranges.split_at(tokens);
                    let out = &mut codes.products;
                    let (offset, largest) =
                        products::products(simd, row, ranges, (size, padded), out);
                    let products = (&codes.products[..], largest);
                    let unit = products::split(simd, products, (&mut codes.pieces[i..], q));
                    *sums = (offset, unit, shifts[query + i]);
                }
                let values = Values {
                    chunk: Chunk { tile: self, first: pages.start },
                    pages: pages.len(),
                    places,
                    pieces: &codes.pieces[..q * blocks],
                };
                let (range, target) = (group * channels..end, (&mut *state, query));
                match sums {
                    _ if q == MOST_VALUES => {
                        values.add::<S, MOST_VALUES, BITS>(simd, range, target, &sums);
                    }
                    [first, second, ..] if q == 2 => {
                        values.add::<S, 2, BITS>(simd, range, target, &[first, second]);
                    }
                    [first, ..] => values.add::<S, 1, BITS>(simd, range, target, &[first]),
                }
                query += q;
            }
        }
    }
}
