//! Tiles over pages of codes: which pages and queries go together, and where the open page joins.

mod scores;
mod values;

use std::ops::Range;

use half::f16;
use tinyserve_kv::{CodePages, GROUP_PAGES, HeadPage, KvElement, KvFormat};

use super::ahead::{ChunkPages, NextPages};
use super::observe::Records;
use super::products::{BLOCK, Places, TINY, TokenFactors, Widest};
use super::softmax::{Shape, State};
use super::tile::{StoredPages, Tile, TileScratch, chunk_pages};
use crate::cpu::memory::Aligned;
use crate::cpu::simd::{BlockWords, Simd};

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
    /// Queries, scaled to [`Simd::LARGEST`] `[queries, padded]`.
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
    /// Factors of some queries for the pages of a look `[quads, queries, words]`.
    factors: Vec<BlockWords>,
    /// Scaled queries times the minima of these pages.
    offsets: [[f32; BLOCK]; MOST_QUERIES],
    /// Scales and minima of the values of a chunk, widened `[2, tokens]`.
    value_ranges: Aligned,
    /// Weights times scales of the chunk for some queries `[queries, tokens]`.
    products: Aligned,
    /// These products as factors of codes `[blocks of tokens, queries]`.
    token_factors: Vec<TokenFactors>,
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
            let factor = simd.splat(S::LARGEST / largest);
            for scaled in scaled.chunks_exact_mut(S::LANES) {
                simd.store(simd.mul(simd.load(scaled), factor), scaled);
            }
            let unit = largest / S::LARGEST * scale;
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
}
