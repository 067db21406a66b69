//! Tiles over pages of codes: which pages and queries go together, and where the open page joins.

use std::ops::Range;

use half::f16;
use tinyserve_kv::{CodePage, CodePages, GROUP_PAGES, HeadPage};

use super::observe::Records;
use super::products::{self, BLOCK, TINY, Values};
use super::softmax::{self, Shape, State};
use super::tile::{StoredPages, Tile, TileScratch, gather};
use crate::cpu::simd::{LARGEST, PIECES, Simd};

/// Pages of a block of neighbours from which on they share a look at their boxes.
const SHARED_LOOK: usize = 5;

/// Pages from the one in use to the one that memory is asked for.
const PAGES_AHEAD: usize = 4;

/// Buffers of pages of codes, reused from tile to tile.
#[derive(Debug, Default)]
pub(super) struct CodeScratch {
    /// Channels of a query, padded to whole vectors.
    padded: usize,
    /// Queries, scaled to [`LARGEST`] `[queries, padded]`.
    scaled: Vec<f32>,
    /// Queries side by side `[queries / LANES, head_dim, LANES]`.
    columns: Vec<f32>,
    /// What scaled queries times normalised ranges count in `[queries]`.
    units: Vec<f32>,
    /// A page's box `[2 (max, min), padded]`.
    corners: Vec<f16>,
    /// Ranges of channels over the page's widest, `[head_dim, BLOCK pages]` or `[padded]`.
    ranges: Vec<f32>,
    /// Minima of channels, `[head_dim, BLOCK pages]` or `[padded]`.
    minima: Vec<f32>,
    /// Pieces of the factors of a block of queries, as [`products::factors`] or
    /// [`products::page_factors`] has them.
    factors: Vec<u32>,
    /// `query·minima` of one page `[queries]`, in whole blocks.
    offsets: Vec<f32>,
    /// Scales and minima of the values of a chunk, widened `[2, tokens]`.
    value_ranges: Vec<f32>,
    /// Weights times scales of the chunk `[tokens]`.
    products: Vec<f32>,
    /// Pieces of these products `[block, PIECES, tokens]`.
    pieces: Vec<u8>,
}

impl CodeScratch {
    /// Scales the queries, and puts `lanes` of them side by side.
    pub(super) fn load_queries<'a>(
        &mut self,
        lanes: usize,
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
            self.units.push(largest / LARGEST);
            let (first, lane) = (i / lanes * lanes * query.len(), i % lanes);
            self.columns.resize(first + lanes * query.len(), 0.0);
            for (row, &q) in self.columns[first..].chunks_exact_mut(lanes).zip(query) {
                row[lane] = q;
            }
        }
        self.corners.clear();
        self.corners.resize(2 * self.padded, f16::ZERO);
        self.ranges.resize(BLOCK * self.padded, 0.0);
        self.minima.resize(BLOCK * self.padded, 0.0);
    }
}

impl StoredPages for CodePages<'_> {
    const CODES: bool = true;

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

    /// Nothing: pages of codes are asked for line by line between their products, because a whole
    /// page at once fills the queue to memory, and then the products wait.
    #[inline(always)]
    fn prefetch<S: Simd>(_: &Tile<'_, Self>, _: S, _: usize) {}
}

impl Tile<'_, CodePages<'_>> {
    #[inline(always)]
    fn code_page(&self, i: usize) -> CodePage<'_> {
        self.pages.get(self.unit.table(self.context)[self.list.get(i)])
    }

    /// What memory is asked for while page `i` of a chunk that begins with page `first` is scored:
    /// keys and scales of a page ahead, and the values of the chunk's first pages, which no page
    /// before them asks for.
    #[inline(always)]
    fn ahead(&self, i: usize, first: usize) -> [&[u8]; 3] {
        let layout = self.pages.layout();
        let mut lines: [&[u8]; 3] = [&[]; 3];
        if self.unit.rows.len() > 1 {
            return lines;
        }
        if i + PAGES_AHEAD < self.range.end {
            let bytes = self.code_page(i + PAGES_AHEAD).bytes();
            (lines[0], lines[1]) = (&bytes[layout.keys()], &bytes[layout.values().end..]);
        }
        if i < first + PAGES_AHEAD {
            lines[2] = &self.code_page(i).bytes()[layout.values()];
        }
        lines
    }

    /// Page `i` of the list as it was appended.
    fn open_page(&self, i: usize) -> HeadPage<'_, f16> {
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
        let sealed = pages.start..pages.end - usize::from(last_is_own);
        self.code_scores::<S, BITS>(simd, sealed.clone(), (shape, chunk), scratch);
        let at = sealed.len() * size;
        let seen = |query: usize| match last_is_own {
            true => self.unit.first_visible + query / shape.group - own * size,
            false => 0,
        };
        if last_is_own {
            let most = seen(shape.queries - 1);
            self.open_scores(simd, sealed.end, (at, most), (shape, chunk), scratch);
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
            let state = (&mut state, shape);
            self.code_values::<S, BITS>(simd, sealed.clone(), state, weights, shifts, codes);
        }
        if last_is_own {
            let values = self.open_page(sealed.end).values;
            // The open page is the one after the sealed pages of the chunk.
            let values = |_: usize| values;
            for query in 0..shape.queries {
                let shift = if sealed.is_empty() { scratch.shifts[query] } else { 1.0 };
                let weights = (&scratch.weights[query * chunk..(query + 1) * chunk], chunk);
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
        scratch: &mut TileScratch,
    ) {
        let quads = self.pages.layout().key_words() * (8 / BITS);
        let (scores, codes) = (&mut scratch.weights[..], &mut scratch.codes);
        codes.factors.resize(4 * quads.next_multiple_of(4) * PIECES * BLOCK, 0);
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
                let (ranges, minima) = (&mut codes.ranges[..rows], &mut codes.minima[..rows]);
                let widest = products::load_boxes(simd, boxes, lane, ranges, minima);
                let (run, out) = ((first..end, pages.start), (&mut *scores, chunk));
                self.run_scores::<S, BITS>(simd, run, (shape, quads), &widest, out, codes);
            } else {
                for i in first..end {
                    let lane = index(i) % GROUP_PAGES;
                    let (place, out) = ((i, pages.start), (&mut *scores, chunk));
                    self.page_scores::<S, BITS>(simd, place, shape, (boxes, lane), out, codes);
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
        (shape, quads): (Shape, usize),
        widest: &[f32; BLOCK],
        (scores, chunk): (&mut [f32], usize),
        codes: &mut CodeScratch,
    ) {
        let mut query = 0;
        while query < shape.queries {
            let run = (pages.clone(), first);
            let queries = (query, quads, widest);
            let out = (&mut *scores, chunk);
            query += match shape.queries - query {
                4.. => self.run_of::<S, 4, BITS>(simd, run, queries, out, codes),
                2.. => self.run_of::<S, 2, BITS>(simd, run, queries, out, codes),
                _ => self.run_of::<S, 1, BITS>(simd, run, queries, out, codes),
            };
        }
    }

    /// [`Self::run_scores`] for `Q` queries; gives `Q`.
    #[inline(always)]
    fn run_of<S: Simd, const Q: usize, const BITS: usize>(
        &self,
        simd: S,
        (pages, first): (Range<usize>, usize),
        (query, quads, widest): (usize, usize, &[f32; BLOCK]),
        (scores, chunk): (&mut [f32], usize),
        codes: &mut CodeScratch,
    ) -> usize {
        let (size, layout) = (self.context.pages.layout().page_size(), self.pages.layout());
        let length = quads * PIECES * BLOCK;
        let highest = f32::from(layout.highest());
        let mut offsets = [[0.0; BLOCK]; Q];
        for (q, offsets) in offsets.iter_mut().enumerate() {
            let scaled = &codes.scaled[(query + q) * codes.padded..(query + q + 1) * codes.padded];
            let both = (self.query(query + q), scaled);
            let boxes = (&codes.ranges[..], &codes.minima[..]);
            let out = &mut codes.factors[q * length..(q + 1) * length];
            *offsets = products::factors(simd, both, boxes, out);
        }
        let table = self.unit.table(self.context);
        for i in pages {
            let lane = table[self.list.get(i)].index() % BLOCK;
            let (mut starts, mut units) = ([0.0; Q], [0.0; Q]);
            for q in 0..Q {
                starts[q] = offsets[q][lane];
                units[q] = codes.units[query + q] / highest * widest[lane];
            }
            let at = query * chunk + (i - first) * size;
            let ahead = if query == 0 { self.ahead(i, first) } else { [&[] as &[u8]; 3] };
            products::dots::<S, Q, BITS, true>(
                simd,
                (self.code_page(i).bytes(), layout, size),
                ahead,
                (&codes.factors[..Q * length], lane),
                (&starts, &units),
                (&mut scores[at..], chunk),
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
        shape: Shape,
        (boxes, lane): (&[f16], usize),
        (scores, chunk): (&mut [f32], usize),
        codes: &mut CodeScratch,
    ) {
        let (padded, dim) = (codes.padded, shape.head_dim);
        let (ranges, minima) = (&mut codes.ranges[..padded], &mut codes.minima[..padded]);
        let out = (&mut codes.corners[..], ranges, minima);
        let widest = products::load_box(simd, boxes, lane, out);
        let offsets = codes.offsets.chunks_exact_mut(S::LANES);
        for (columns, offsets) in codes.columns.chunks_exact(S::LANES * dim).zip(offsets) {
            products::page_offsets(simd, columns, &codes.minima[..dim], offsets);
        }
        let place = (i, first);
        let mut query = 0;
        while query < shape.queries {
            let out = (&mut *scores, chunk);
            query += match shape.queries - query {
                4.. => self.page_of::<S, 4, BITS>(simd, place, (query, widest), out, codes),
                2.. => self.page_of::<S, 2, BITS>(simd, place, (query, widest), out, codes),
                _ => self.page_of::<S, 1, BITS>(simd, place, (query, widest), out, codes),
            };
        }
    }

    /// [`Self::page_scores`] for `Q` queries; gives `Q`.
    #[inline(always)]
    fn page_of<S: Simd, const Q: usize, const BITS: usize>(
        &self,
        simd: S,
        (i, first): (usize, usize),
        (query, widest): (usize, f32),
        (scores, chunk): (&mut [f32], usize),
        codes: &mut CodeScratch,
    ) -> usize {
        let (size, layout) = (self.context.pages.layout().page_size(), self.pages.layout());
        let (padded, highest) = (codes.padded, f32::from(layout.highest()));
        let length = padded * PIECES / 4;
        let (mut starts, mut units) = ([0.0; Q], [0.0; Q]);
        for q in 0..Q {
            let scaled = &codes.scaled[(query + q) * padded..(query + q + 1) * padded];
            let out = &mut codes.factors[q * length..(q + 1) * length];
            products::page_factors(simd, scaled, &codes.ranges[..padded], out);
            starts[q] = codes.offsets[query + q];
            units[q] = codes.units[query + q] / highest * widest;
        }
        let at = query * chunk + (i - first) * size;
        let ahead = if query == 0 { self.ahead(i, first) } else { [&[] as &[u8]; 3] };
        products::dots::<S, Q, BITS, false>(
            simd,
            (self.code_page(i).bytes(), layout, size),
            ahead,
            (&codes.factors[..Q * length], 0),
            (&starts, &units),
            (&mut scores[at..], chunk),
        );
        Q
    }

    /// Scores of the first `tokens` tokens of page `i`, which is open, from column `at` on.
    #[inline(always)]
    fn open_scores<S: Simd>(
        &self,
        simd: S,
        i: usize,
        (at, tokens): (usize, usize),
        (shape, chunk): (Shape, usize),
        scratch: &mut TileScratch,
    ) {
        let (size, dim) = (self.context.pages.layout().page_size(), shape.head_dim);
        let keys = self.open_page(i).keys;
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
        pages: Range<usize>,
        (state, shape): (&mut State<'_>, Shape),
        (weights, chunk): (&[f32], usize),
        shifts: &[f32],
        codes: &mut CodeScratch,
    ) {
        let (size, layout) = (self.context.pages.layout().page_size(), self.pages.layout());
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
                let both = [(&mut *scales, page.scales()), (&mut *minima, page.minima())];
                for (out, halves) in both {
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
                    ahead: if group + query == 0 && self.unit.rows.len() == 1 {
                        PAGES_AHEAD
                    } else {
                        0
                    },
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
