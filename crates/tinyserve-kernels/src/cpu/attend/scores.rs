//! Scores of keys as they were appended, for blocks of queries.

use std::ops::Range;

use super::softmax::Rows;
use crate::cpu::simd::{Element, LINE, Simd};

/// Queries whose scores are summed up together.
const BLOCK: usize = 8;

/// First query and length of the block of `query`, of `queries`: blocks of 8, then 4, 2 and 1.
#[inline(always)]
pub(super) fn block_of(query: usize, queries: usize) -> (usize, usize) {
    let mut first = query - query % BLOCK;
    let mut length = BLOCK;
    loop {
        while first + length > queries {
            length /= 2;
        }
        if query < first + length {
            return (first, length);
        }
        first += length;
    }
}

/// Vectors of keys whose scores are summed up together for a block of queries, of so many that are
/// left: as many as the registers hold sums for, if there are.
#[inline(always)]
pub(super) fn vectors_together<S: Simd>(block: usize, left: usize) -> usize {
    match block {
        8 => 2,
        4 if S::LANES < 16 => 2,
        1 if S::LANES < 16 && left >= 8 => 8,
        _ => 4,
    }
}

/// Dot products of a block of queries `[head_dim, block]` with the keys of `tokens` of
/// `[head_dim, stride]`, into rows of `out` that are `chunk` apart; whole vectors are written.
#[inline(always)]
pub(super) fn scores<S: Simd, T: Element>(
    simd: S,
    (q, block): (&[f32], usize),
    keys: (&[T], usize),
    tokens: Range<usize>,
    out: (&mut [f32], usize),
) {
    match block {
        8 => scores_of::<S, T, 8>(simd, q, keys, tokens, out),
        4 => scores_of::<S, T, 4>(simd, q, keys, tokens, out),
        2 => scores_of::<S, T, 2>(simd, q, keys, tokens, out),
        _ => scores_of::<S, T, 1>(simd, q, keys, tokens, out),
    }
}

#[inline(always)]
fn scores_of<S: Simd, T: Element, const Q: usize>(
    simd: S,
    q: &[f32],
    (keys, stride): (&[T], usize),
    tokens: Range<usize>,
    (out, chunk): (&mut [f32], usize),
) {
    for at in tokens.clone().step_by(S::LANES) {
        let mut sums = [simd.splat(0.0); Q];
        for (keys, q) in keys.chunks_exact(stride).zip(q.chunks_exact(Q)) {
            let keys = T::load(simd, &keys[at..at + S::LANES]);
            for (sum, &q) in sums.iter_mut().zip(q) {
                *sum = simd.mul_add(simd.splat(q), keys, *sum);
            }
        }
        for (i, &sum) in sums.iter().enumerate() {
            simd.store(sum, &mut out[i * chunk + at - tokens.start..]);
        }
    }
}

/// [`scores`] of `together` whole vectors of keys, as many as [`vectors_together`] says, from
/// token `first` of the chunk on, in pages of `size`, which is whole vectors; into the same columns of
/// `out`. Between the products memory is asked for keys ahead, if `asks`.
#[inline(always)]
pub(super) fn scores_of_vectors<S: Simd, T: Element>(
    simd: S,
    (q, block): (&[f32], usize),
    together: usize,
    (keys, asks): ((&impl Rows<T>, usize, usize), bool),
    out: (&mut [f32], usize),
) {
    let mut vectors = Vectors { simd, keys, asks, out };
    match block {
        8 if S::LANES == 16 => vectors.add::<T, 8, 8, 2>(q, 0),
        8 => {
            vectors.add::<T, 8, 4, 2>(q, 0);
            vectors.asks = false;
            vectors.add::<T, 8, 4, 2>(q, 4);
        }
        4 if S::LANES == 16 => vectors.add::<T, 4, 4, 4>(q, 0),
        4 => vectors.add::<T, 4, 4, 2>(q, 0),
        2 => vectors.add::<T, 2, 2, 4>(q, 0),
        _ if together == 8 => vectors.add::<T, 1, 1, 8>(q, 0),
        _ => vectors.add::<T, 1, 1, 4>(q, 0),
    }
}

/// Channels that are summed up in a step.
const STEP: usize = 4;

/// Adds the products of one channel of some queries with the keys at `key` of some vectors, all
/// `length` long.
#[inline(always)]
fn add_channel<S: Simd, T: Element, const Q: usize, const V: usize>(
    simd: S,
    q: &[f32],
    (vectors, length): (&[&[T]; V], usize),
    key: usize,
    sums: &mut [[S::V; V]; Q],
) {
    if key + S::LANES > length {
        // Never so; the compiler leaves out the checks of every vector instead.
        return;
    }
    let mut keys = [simd.splat(0.0); V];
    for (wide, stored) in keys.iter_mut().zip(vectors) {
        *wide = T::load(simd, &stored[key..key + S::LANES]);
    }
    for (sums, &q) in sums.iter_mut().zip(q) {
        let q = simd.splat(q);
        for (sum, &keys) in sums.iter_mut().zip(&keys) {
            *sum = simd.mul_add(q, keys, *sum);
        }
    }
}

/// See [`scores_of_vectors`].
struct Vectors<'a, S, R> {
    simd: S,
    keys: (&'a R, usize, usize),
    asks: bool,
    out: (&'a mut [f32], usize),
}

impl<S: Simd, R> Vectors<'_, S, R> {
    /// Scores of `V` vectors for `Q` queries, from query `query` of a block of `ALL` on.
    #[inline(always)]
    fn add<T: Element, const ALL: usize, const Q: usize, const V: usize>(
        &mut self,
        q: &[f32],
        query: usize,
    ) where
        R: Rows<T>,
    {
        let (simd, (rows, first, size)) = (self.simd, self.keys);
        let dim = q.len() / ALL;
        // The lanes of a vector from the first channel to the last.
        let length = (dim - 1) * size + S::LANES;
        // Vectors of one page, which ask for their share of another one line after line.
        let of_page = V.min(size / S::LANES);
        let mut vectors = [&[] as &[T]; V];
        let mut ahead = [std::ptr::null(); V];
        let (mut page, mut lane) = (first / size, first % size);
        let mut share = lane * dim;
        for (keys, ahead) in vectors.iter_mut().zip(&mut ahead) {
            *keys = &rows.of(page)[lane..lane + length];
            *ahead = rows.of(page + rows.ahead(page)).as_ptr().wrapping_add(share);
            lane += S::LANES;
            share += STEP * S::LANES;
            if lane == size {
                (page, lane, share) = (page + 1, 0, 0);
            }
        }
        let mut sums = [[simd.splat(0.0); V]; Q];
        let mut key = 0;
        // Several channels a step, beside which counting and asking are little work.
        let steps = q.chunks_exact(STEP * ALL);
        let rest = steps.remainder();
        for q in steps {
            for channel in 0..STEP {
                if self.asks {
                    for ahead in ahead.iter_mut().skip(channel).step_by(STEP) {
                        for line in 0..(STEP * S::LANES * size_of::<T>()).div_ceil(LINE) {
                            simd.prefetch(ahead.wrapping_add(line * LINE / size_of::<T>()));
                        }
                        *ahead = ahead.wrapping_add(of_page * STEP * S::LANES);
                    }
                }
                let q = &q[channel * ALL + query..][..Q];
                add_channel(simd, q, (&vectors, length), key, &mut sums);
                key += size;
            }
        }
        for q in rest.chunks_exact(ALL) {
            add_channel(simd, &q[query..query + Q], (&vectors, length), key, &mut sums);
            key += size;
        }
        let (out, chunk) = &mut self.out;
        for (i, sums) in sums.iter().enumerate() {
            for (v, &sum) in sums.iter().enumerate() {
                simd.store(sum, &mut out[(query + i) * *chunk + first + v * S::LANES..]);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_cover_every_query_once_in_order() {
        for queries in 1..40 {
            let mut next = 0;
            while next < queries {
                let (first, length) = block_of(next, queries);
                assert_eq!(first, next, "of {queries}");
                assert!(matches!(length, 1 | 2 | 4 | 8) && first + length <= queries);
                for query in first..first + length {
                    assert_eq!(block_of(query, queries), (first, length));
                }
                next += length;
            }
        }
    }
}
