//! Online softmax of a tile of rows over a page list (Milakov and Gimelshein, arXiv 1805.02867).
//!
//! The list is read in chunks of a fixed number of pages, and cut into parts of a fixed number of
//! chunks. A row goes through the same additions in the same order whichever rows share its tile
//! and whoever computes its parts, so it gets bit for bit what it gets alone.

use std::ops::Range;
use std::sync::{Mutex, PoisonError};

use tinyserve_kv::{HeadPage, HeadPages, KvElement, KvLayout};

use super::ahead::Nothing;
use super::codes::CodeScratch;
use super::observe::Records;
use super::softmax::{self, Rows, Shape, State};
use super::{Context, Unit, products, scores};
use crate::cpu::memory::Aligned;
use crate::cpu::simd::{Element, Kernel, LINE, Simd};

/// Tokens of a chunk, when its pages are small enough: one softmax update for all of them.
const CHUNK_TOKENS: usize = 256;
/// Tokens of a part, when its chunks are small enough: what threads share out among them.
const PART_TOKENS: usize = 1024;
/// How far ahead of the arithmetic listed pages are asked for.
const PREFETCH_BYTES: usize = 16 * 1024;
/// Most pages ahead.
const PREFETCH_PAGES: usize = 4;

/// Pages of a chunk.
pub(super) fn chunk_pages(page_size: usize) -> usize {
    (CHUNK_TOKENS / page_size).max(1)
}

/// Pages of a part: whole chunks.
pub(super) fn part_pages(page_size: usize) -> usize {
    let chunk = chunk_pages(page_size);
    (PART_TOKENS / (chunk * page_size)).max(1) * chunk
}

/// Pages ahead of the one in use that memory is asked for, line by line: a whole page at once would
/// fill the queue to memory, and what comes next would wait. One row is through with a page before
/// the processor guesses where the next one is; a tile of many rows is not.
pub(super) fn pages_ahead(layout: &KvLayout, rows: usize) -> usize {
    if rows == 1 { (PREFETCH_BYTES / layout.head_bytes()).min(PREFETCH_PAGES) } else { 0 }
}

/// The pages that a tile reads, as indices into its sequence's page table.
#[derive(Clone, Copy)]
pub(super) enum PageList<'a> {
    /// The first so many.
    All(usize),
    /// These, ascending.
    These(&'a [u32]),
}

impl PageList<'_> {
    pub(super) fn len(&self) -> usize {
        match self {
            Self::All(pages) => *pages,
            Self::These(list) => list.len(),
        }
    }

    #[inline(always)]
    pub(super) fn get(&self, i: usize) -> usize {
        match self {
            Self::All(_) => i,
            Self::These(list) => list[i] as usize,
        }
    }
}

/// Buffers of a tile, reused from tile to tile.
#[derive(Debug, Default)]
pub(super) struct TileScratch {
    /// Queries times the scale in blocks of [`scores::block_of`] queries, each `[head_dim, block]`.
    pub(super) queries: Vec<f32>,
    /// One page of keys, widened `[head_dim, page_size]`, padded to whole vectors.
    pub(super) page: Vec<f32>,
    /// A chunk of keys whose pages are not whole vectors `[head_dim, chunk]`.
    pub(super) keys: Vec<f32>,
    /// Scores, then weights `[queries, chunk]`.
    pub(super) weights: Aligned,
    /// Highest score with the current chunk's, per query.
    pub(super) peaks: Vec<f32>,
    /// What the current chunk's peak makes of earlier sums, per query.
    pub(super) shifts: Vec<f32>,
    /// The softmax of the current part.
    pub(super) part: Vec<f32>,
    /// The softmax of all parts before it.
    pub(super) total: Vec<f32>,
    /// The [`Records`] of the tile's list, when mass is asked for.
    pub(super) records: Vec<f32>,
    /// What pages of codes need.
    pub(super) codes: CodeScratch,
}

/// Where a tile leaves what it computed.
pub(super) enum Target<'a> {
    /// In the rows of the output.
    Rows,
    /// In a [`State`], to be merged with those of other parts; its [`Records`] follow it.
    Part(&'a mut [f32]),
}

/// The pages of one KV head in one layer, in one of the ways that they are stored.
pub(super) trait StoredPages: Copy {
    /// Whether they hold codes.
    const CODES: bool;

    /// The highest of their codes.
    fn highest_code(&self) -> u8 {
        0
    }

    /// Adds listed pages `pages`, one chunk, to the softmax of every query of `tile`.
    fn add_chunk<S: Simd>(
        tile: &Tile<'_, Self>,
        simd: S,
        pages: Range<usize>,
        shape: (Shape, usize),
        records: (Records, usize),
        scratch: &mut TileScratch,
    );
}

/// Rows of one sequence and the query heads of one KV head, over listed pages.
pub(super) struct Tile<'a, P> {
    pub(super) context: &'a Context<'a>,
    pub(super) unit: &'a Unit,
    pub(super) pages: P,
    pub(super) list: PageList<'a>,
    /// Which pages of the list are read; it begins with a part.
    pub(super) range: Range<usize>,
    pub(super) target: Target<'a>,
    /// Pages of the list, `range` among them, that this thread reads in a row.
    pub(super) asked: Range<usize>,
    /// Pages from one to the one that memory is asked for meanwhile.
    pub(super) ahead: usize,
    pub(super) scratch: &'a mut TileScratch,
    /// Where the mass of the list's tokens goes, unless the list is read in parts.
    pub(super) mass: &'a Mutex<Vec<f32>>,
}

impl<P: StoredPages> Kernel for Tile<'_, P> {
    type Output = ();
    const INTEGERS: bool = P::CODES;

    #[inline(always)]
    fn run<S: Simd>(mut self, simd: S) {
        let (context, unit) = (self.context, self.unit);
        let size = context.pages.layout().page_size();
        let shape = context.shape(unit.rows.len());
        let mut chunk = (chunk_pages(size) * size).next_multiple_of(S::LANES);
        let mut scratch = std::mem::take(self.scratch);
        scratch.load_queries(context, unit);
        if P::CODES {
            // Scores are written in whole blocks, wherever their page ends.
            chunk = (chunk + products::BLOCK).next_multiple_of(products::BLOCK);
            let queries = (shape.queries, shape.head_dim, self.pages.highest_code());
            let codes = &mut scratch.codes;
            codes.load_queries(simd, queries, context.scale, |query| self.query(query));
        }
        scratch.weights.resize(shape.queries * chunk);
        scratch.peaks.resize(shape.queries, 0.0);
        scratch.shifts.resize(shape.queries, 0.0);
        let (chunk_pages, part_pages) = (chunk_pages(size), part_pages(size));
        let counted = context.mass_queries(unit);
        let mut records = context.records(unit.rows.len());
        records.counted = !counted.is_empty();
        scratch.records.resize(records.len(self.range.len()), 0.0);
        let mut first = self.range.start;
        while first < self.range.end {
            let end = (first + part_pages).min(self.range.end);
            State::reset(&mut scratch.part, shape);
            while first < end {
                let pages = first..(first + chunk_pages).min(end);
                first = pages.end;
                let records = (records, (pages.start - self.range.start) / chunk_pages);
                P::add_chunk(&self, simd, pages, (shape, chunk), records, &mut scratch);
            }
            match &mut self.target {
                Target::Part(part) => {
                    let (state, kept) = part.split_at_mut(scratch.part.len());
                    state.copy_from_slice(&scratch.part);
                    kept[..scratch.records.len()].copy_from_slice(&scratch.records);
                }
                Target::Rows if end <= part_pages => {
                    std::mem::swap(&mut scratch.part, &mut scratch.total);
                }
                Target::Rows => {
                    State::new(&mut scratch.total, shape).merge(simd, &mut scratch.part);
                }
            }
        }
        if matches!(self.target, Target::Rows) {
            if records.counted {
                let mut mass = self.mass.lock().unwrap_or_else(PoisonError::into_inner);
                mass.clear();
                mass.resize(self.list.len() * size, 0.0);
                let state = State::new(&mut scratch.total, shape);
                records.add_mass(&scratch.records, &state, counted, &mut mass);
            }
            context.finish(unit, &mut scratch.total);
        }
        *self.scratch = scratch;
    }
}

impl TileScratch {
    /// Scales the queries of `unit` and turns them round, block by block.
    fn load_queries(&mut self, context: &Context<'_>, unit: &Unit) {
        let (dim, group) = (context.heads.head_dim, context.heads.group());
        let queries = unit.rows.len() * group;
        self.queries.resize(queries * dim, 0.0);
        for (r, row) in unit.rows.clone().enumerate() {
            let heads = context.queries(row, unit.kv_head).chunks_exact(dim);
            for (g, query) in heads.enumerate() {
                let index = r * group + g;
                let (first, length) = scores::block_of(index, queries);
                let block = &mut self.queries[first * dim..(first + length) * dim];
                for (column, &x) in block.chunks_exact_mut(length).zip(query) {
                    column[index - first] = x * context.scale;
                }
            }
        }
    }
}

impl<P: StoredPages> Tile<'_, P> {
    /// The query with this number in the tile.
    #[inline(always)]
    pub(super) fn query(&self, query: usize) -> &[f32] {
        let (group, dim) = (self.context.heads.group(), self.context.heads.head_dim);
        let row = self.unit.rows.start + query / group;
        let at = query % group * dim;
        &self.context.queries(row, self.unit.kv_head)[at..at + dim]
    }

    /// Pages from page `i` to the one that memory is asked for meanwhile: none at the end.
    #[inline(always)]
    pub(super) fn ahead(&self, i: usize) -> usize {
        if i + self.ahead < self.asked.end { self.ahead } else { 0 }
    }
}

/// Pages of a tile from the first of a chunk on.
#[derive(Clone, Copy)]
pub(super) struct Chunk<'t, 'a, P> {
    pub(super) tile: &'t Tile<'a, P>,
    pub(super) first: usize,
}

/// Their keys.
struct Keys<'t, 'a, E>(Chunk<'t, 'a, HeadPages<'a, E>>);
/// Their values.
struct PageValues<'t, 'a, E>(Chunk<'t, 'a, HeadPages<'a, E>>);

impl<E: KvElement + Element> Rows<E> for Keys<'_, '_, E> {
    #[inline(always)]
    fn of(&self, page: usize) -> &[E] {
        self.0.tile.page(self.0.first + page).keys
    }

    #[inline(always)]
    fn ahead(&self, page: usize) -> usize {
        self.0.tile.ahead(self.0.first + page)
    }
}

impl<E: KvElement + Element> Rows<E> for PageValues<'_, '_, E> {
    #[inline(always)]
    fn of(&self, page: usize) -> &[E] {
        self.0.tile.page(self.0.first + page).values
    }

    #[inline(always)]
    fn ahead(&self, page: usize) -> usize {
        self.0.tile.ahead(self.0.first + page)
    }
}

impl<E: KvElement + Element> StoredPages for HeadPages<'_, E> {
    const CODES: bool = false;

    #[inline(always)]
    fn add_chunk<S: Simd>(
        tile: &Tile<'_, Self>,
        simd: S,
        pages: Range<usize>,
        shape: (Shape, usize),
        records: (Records, usize),
        scratch: &mut TileScratch,
    ) {
        tile.add_chunk(simd, pages, shape, records, scratch);
    }
}

impl<E: KvElement + Element> Tile<'_, HeadPages<'_, E>> {
    #[inline(always)]
    fn page(&self, i: usize) -> HeadPage<'_, E> {
        self.pages.get(self.unit.table(self.context)[self.list.get(i)])
    }

    /// Tokens of the listed pages `pages` that the tile's row `row` sees. They come first: only
    /// the last pages of a list hold tokens that some rows do not see, or no token at all.
    #[inline(always)]
    fn visible(&self, pages: &Range<usize>, row: usize) -> usize {
        let size = self.context.pages.layout().page_size();
        let tokens = self.unit.first_visible + row;
        if (self.list.get(pages.end - 1) + 1) * size <= tokens {
            return pages.len() * size;
        }
        pages.clone().map(|i| tokens.saturating_sub(self.list.get(i) * size).min(size)).sum()
    }

    #[inline(always)]
    fn add_chunk<S: Simd>(
        &self,
        simd: S,
        pages: Range<usize>,
        (shape, chunk): (Shape, usize),
        (records, chunk_index): (Records, usize),
        scratch: &mut TileScratch,
    ) {
        let (size, group) = (self.context.pages.layout().page_size(), shape.group);
        let dim = shape.head_dim;
        let most = self.visible(&pages, shape.queries / group - 1);
        let tokens = |query: usize| {
            if shape.queries == group { most } else { self.visible(&pages, query / group) }
        };
        let whole_vectors = size.is_multiple_of(S::LANES);
        if pages.start == self.asked.start {
            // No page before these asks for them.
            for i in pages.start..pages.start + self.ahead(pages.start) {
                let page = self.page(i);
                for line in [page.keys, page.values]
                    .iter()
                    .flat_map(|rows| rows.chunks(LINE / size_of::<E>()))
                {
                    simd.prefetch(line.as_ptr());
                }
            }
        }
        let of_chunk = Chunk { tile: self, first: pages.start };
        if !whole_vectors {
            let chunk_keys = (&mut scratch.page, &mut scratch.keys);
            let keys = |i: usize| self.page(pages.start + i).keys;
            gather(simd, (keys, pages.len()), (size, dim), chunk, chunk_keys);
        }
        // Whole vectors either way.
        let ahead = if whole_vectors { self.ahead * size } else { 0 };
        let together = softmax::tokens_together::<S>(shape.queries, ahead).min(most.max(1));
        for first in (0..most).step_by(together) {
            let mut query = 0;
            while query < shape.queries {
                let (_, block) = scores::block_of(query, shape.queries);
                let q = (&scratch.queries[query * dim..(query + block) * dim], block);
                let out = &mut scratch.weights[query * chunk..(query + block) * chunk];
                let tokens = first..tokens(query + block - 1).min(first + together);
                if whole_vectors {
                    let asks = query == 0 && self.ahead > 0;
                    self.page_scores(simd, q, (of_chunk, tokens, asks), (out, chunk));
                } else {
                    let keys = (&scratch.keys[..dim * chunk], chunk);
                    scores::scores(simd, q, keys, tokens.clone(), (&mut out[first..], chunk));
                }
                query += block;
            }
        }
        let mut state = State::new(&mut scratch.part, shape);
        for (query, scores) in scratch.weights.chunks_exact_mut(chunk).enumerate() {
            let scores = (scores, tokens(query));
            scratch.peaks[query] = state.raised(simd, query, scores, &mut Nothing);
        }
        for query in 0..shape.queries {
            let tokens = tokens(query);
            let weights = &mut scratch.weights[query * chunk..(query + 1) * chunk];
            scratch.shifts[query] = state.soften(
                simd,
                (query, scratch.peaks[query]),
                (&mut weights[..], tokens),
                &mut Nothing,
            );
            if records.counted {
                let weights = &weights[..tokens];
                records.keep(&mut scratch.records, (chunk_index, query), weights, &state);
            }
        }
        for first in (0..most).step_by(together) {
            let these =
                |tokens: Range<usize>| tokens.start.max(first)..tokens.end.min(first + together);
            let mut query = 0;
            while query < shape.queries {
                let block = softmax::value_block::<S>(shape.queries - query);
                let weights = &scratch.weights[query * chunk..(query + block) * chunk];
                let shifts = match first {
                    0 => &scratch.shifts[query..query + block],
                    _ => &[1.0; 8][..block],
                };
                // What every query of the block sees goes together, the rest query by query: a
                // weight of nothing would still turn a value that is not a number into one that
                // shows.
                let common = tokens(query);
                let values = (&PageValues(of_chunk), size);
                let range = these(0..common);
                state.add_values(simd, query, (weights, chunk), shifts, values, range);
                for i in 0..block {
                    let own = these(common..tokens(query + i));
                    if !own.is_empty() {
                        let weights = &weights[i * chunk..(i + 1) * chunk];
                        let (query, weights) = (query + i, (weights, chunk));
                        state.add_values(simd, query, weights, &[1.0], values, own);
                    }
                }
                query += block;
            }
        }
    }

    /// Scores of `tokens` of pages that are whole vectors, several vectors at a time: one of keys alone
    /// would leave the processor waiting for its sum, or for queries.
    #[inline(always)]
    fn page_scores<S: Simd>(
        &self,
        simd: S,
        (q, block): (&[f32], usize),
        (pages, tokens, asks): (Chunk<'_, '_, HeadPages<'_, E>>, Range<usize>, bool),
        (out, chunk): (&mut [f32], usize),
    ) {
        let size = self.context.pages.layout().page_size();
        let (mut at, tokens) = (tokens.start, tokens.end);
        loop {
            let left = tokens.saturating_sub(at) / S::LANES;
            let together = scores::vectors_together::<S>(block, left);
            if together > left {
                break;
            }
            let keys = ((&Keys(pages), at, size), asks);
            scores::scores_of_vectors(simd, (q, block), together, keys, (&mut *out, chunk));
            at += together * S::LANES;
        }
        while at < tokens {
            let (page, lane) = (at / size, at % size);
            let keys = (self.page(pages.first + page).keys, size);
            let end = size.min(lane + tokens - at);
            scores::scores(simd, (q, block), keys, lane..end, (&mut out[at..], chunk));
            at += size - lane;
        }
    }
}

/// Puts the keys of pages that are not whole vectors side by side, widened: `[head_dim, chunk]`.
///
/// `keys` gives those of each page, `[dim, size]`.
#[inline(always)]
pub(super) fn gather<'k, S: Simd, T: Element>(
    simd: S,
    (keys, pages): (impl Fn(usize) -> &'k [T], usize),
    (size, dim): (usize, usize),
    chunk: usize,
    (page, out): (&mut Vec<f32>, &mut Vec<f32>),
) {
    page.resize((size * dim).next_multiple_of(S::LANES), 0.0);
    out.resize(dim * chunk, 0.0);
    for i in 0..pages {
        for (x, wide) in keys(i).chunks(S::LANES).zip(page.chunks_exact_mut(S::LANES)) {
            simd.store(simd.load_up_to(x), wide);
        }
        let columns = out.chunks_exact_mut(chunk);
        for (column, out) in page.chunks_exact(size).zip(columns) {
            out[i * size..(i + 1) * size].copy_from_slice(column);
        }
    }
}
