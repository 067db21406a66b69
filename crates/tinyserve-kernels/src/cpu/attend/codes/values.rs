//! Weighted values of the pages of a chunk.

use std::ops::Range;

use half::f16;
use tinyserve_kv::{CodePages, KvElement};

use super::super::ahead::{Ahead, ChunkPages, NextPages};
use super::super::products::{self, BLOCK, Places, Values};
use super::super::softmax::{OnePage, Rows, State};
use super::super::tile::Tile;
use super::{CodeScratch, MOST_VALUES};
use crate::cpu::simd::{Element, Simd};

impl Tile<'_, CodePages<'_>> {
    /// Adds the values of a chunk's first `count` pages, which are sealed and whose weights begin a
    /// chunk's row.
    #[inline(always)]
    pub(super) fn code_values<S: Simd, const BITS: usize>(
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
        codes.token_factors.resize(MOST_VALUES * blocks, Default::default());
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
                    4.. => MOST_VALUES,
                    2.. => 2,
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
                    let out = (&mut codes.token_factors[i..], q);
                    let next = &mut next.between(queries);
                    *unit = products::store_factors(simd, (row, *unit), out, next);
                }
                let values = Values {
                    chunk: pages,
                    pages: count,
                    places,
                    factors: &codes.token_factors[..q * blocks],
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

    /// Adds the values of page `i`, which is open, whose weights are in `columns` of a chunk.
    #[inline(always)]
    pub(super) fn open_values<S: Simd, O: KvElement + Element>(
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
}
