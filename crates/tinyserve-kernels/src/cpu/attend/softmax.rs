//! The arithmetic of a tile: weights of scores, weighted values, and the merging of parts.

use std::ops::Range;

use super::ahead::Ahead;
use crate::cpu::simd::{Element, LINE, Simd};

/// Scores further below the highest weigh nothing that f32 could add to a sum.
const DEEPEST: f32 = -87.3;

/// Queries whose values are added up together, of so many that are left: as many as the registers
/// hold sums for, so that a value is widened once for all of them.
#[inline(always)]
pub(super) fn value_block<S: Simd>(left: usize) -> usize {
    match left {
        8.. if S::LANES == 16 => 8,
        4.. => 4,
        2.. => 2,
        _ => 1,
    }
}

/// Tokens of a chunk whose keys, or values, all `queries` go through one after the other, so that the
/// first-level cache reads them but once: as many as memory is asked for `ahead`, if it is.
#[inline(always)]
pub(super) fn tokens_together<S: Simd>(queries: usize, ahead: usize) -> usize {
    match ahead {
        // Few queries go through them but once, and large registers hold the sums of many.
        _ if S::LANES == 16 || queries < TILED => usize::MAX,
        0 => 64,
        ahead => ahead,
    }
}

/// Queries from which on a chunk is read in parts, see [`tokens_together`].
const TILED: usize = 4;

/// The keys, or the values, of a chunk's pages and of those after it. Not closures: the compiler
/// calls one in the innermost loops, and every call puts all sums out of the registers.
pub(super) trait Rows<T> {
    /// Those of a page.
    fn of(&self, page: usize) -> &[T];

    /// Pages from page `page` to the one that memory is asked for meanwhile.
    fn ahead(&self, page: usize) -> usize;
}

/// One page, whatever its number.
pub(super) struct OnePage<'a, T>(pub(super) &'a [T]);

impl<T> Rows<T> for OnePage<'_, T> {
    #[inline(always)]
    fn of(&self, _: usize) -> &[T] {
        self.0
    }

    #[inline(always)]
    fn ahead(&self, _: usize) -> usize {
        0
    }
}

/// The queries of a tile.
#[derive(Debug, Clone, Copy)]
pub(super) struct Shape {
    pub(super) queries: usize,
    /// Queries of one row.
    pub(super) group: usize,
    pub(super) head_dim: usize,
    /// `head_dim`, padded to whole vectors of every instruction set.
    pub(super) stride: usize,
    /// Whether entropies are added up, too.
    pub(super) observed: bool,
}

impl Shape {
    /// Numbers of a [`State`].
    pub(super) fn state(&self) -> usize {
        self.queries * (3 + self.stride)
    }
}

/// The softmax of each query over the tokens so far.
pub(super) struct State<'a> {
    shape: Shape,
    /// Highest score `[queries]`.
    peaks: &'a mut [f32],
    /// Sum of weights `[queries]`.
    sums: &'a mut [f32],
    /// Sum of weights times how far their scores lie from the highest `[queries]`; only when
    /// observed.
    depths: &'a mut [f32],
    /// Weighted values `[queries, stride]`.
    out: &'a mut [f32],
}

impl<'a> State<'a> {
    /// A view of `numbers`, `[Shape::state]`.
    #[inline(always)]
    pub(super) fn new(numbers: &'a mut [f32], shape: Shape) -> Self {
        let (peaks, rest) = numbers.split_at_mut(shape.queries);
        let (sums, rest) = rest.split_at_mut(shape.queries);
        let (depths, out) = rest.split_at_mut(shape.queries);
        Self { shape, peaks, sums, depths, out }
    }

    /// Makes `numbers` the state before the first token.
    #[inline(always)]
    pub(super) fn reset(numbers: &mut Vec<f32>, shape: Shape) {
        numbers.clear();
        numbers.resize(shape.queries, f32::NEG_INFINITY);
        numbers.resize(shape.state(), 0.0);
    }

    /// Adds the tokens of a later part.
    #[inline(always)]
    pub(super) fn merge<S: Simd>(&mut self, simd: S, part: &mut [f32]) {
        let stride = self.shape.stride;
        let part = State::new(part, self.shape);
        for query in 0..self.shape.queries {
            if part.peaks[query] == f32::NEG_INFINITY && part.sums[query] == 0.0 {
                // A row of a prefill tile may see nothing of the last part.
                continue;
            }
            let (mine, theirs) = (self.peaks[query], part.peaks[query]);
            let peak = if theirs > mine || theirs.is_nan() { theirs } else { mine };
            let keep = if mine == peak { 1.0 } else { (mine - peak).exp() };
            let add = if theirs == peak { 1.0 } else { (theirs - peak).exp() };
            if self.shape.observed {
                self.depths[query] = self.deepened(query, mine - peak) * keep
                    + part.deepened(query, theirs - peak) * add;
            }
            self.peaks[query] = peak;
            self.sums[query] = self.sums[query] * keep + part.sums[query] * add;
            let (keep, add) = (simd.splat(keep), simd.splat(add));
            let out = self.out[query * stride..(query + 1) * stride].chunks_exact_mut(S::LANES);
            let more = part.out[query * stride..(query + 1) * stride].chunks_exact(S::LANES);
            for (out, more) in out.zip(more) {
                let sum = simd.mul_add(simd.load(more), add, simd.mul(simd.load(out), keep));
                simd.store(sum, out);
            }
        }
    }

    /// What `depths` becomes when the highest score lies `by` (at most 0) below a new one, before
    /// its weights shrink.
    #[inline(always)]
    fn deepened(&self, query: usize, by: f32) -> f32 {
        // Before the first token there is no highest score, and nothing that could lie deep.
        if by == f32::NEG_INFINITY { 0.0 } else { self.depths[query] + by * self.sums[query] }
    }

    /// Highest score of `query` so far.
    #[inline(always)]
    pub(super) fn peak(&self, query: usize) -> f32 {
        self.peaks[query]
    }

    /// `ln Σ exp(score)` of `query`.
    #[inline(always)]
    pub(super) fn lse(&self, query: usize) -> f32 {
        self.peaks[query] + self.sums[query].ln()
    }

    /// Entropy of the weights of `query` in nats: `ln Σ w − Σ w·ln w / Σ w` for the weights
    /// `w = exp(score − peak)`.
    pub(super) fn entropy(&self, query: usize) -> f32 {
        let sum = self.sums[query];
        // Rounding may leave a distribution on one token a hair below zero; NaN stays.
        let entropy = sum.ln() - self.depths[query] / sum;
        if entropy < 0.0 { 0.0 } else { entropy }
    }

    /// Writes the weighted mean of the values of `query` into `out` `[head_dim]`.
    pub(super) fn finish(&self, query: usize, out: &mut [f32]) {
        let inverse = self.sums[query].recip();
        for (out, &sum) in out.iter_mut().zip(&self.out[query * self.shape.stride..]) {
            *out = sum * inverse;
        }
    }

    /// `out = out·shift + block` for channels `at..` of `query`; those beyond the last are garbage.
    #[inline(always)]
    pub(super) fn add_block<S: Simd>(
        &mut self,
        simd: S,
        query: usize,
        at: usize,
        shift: f32,
        block: &[f32; 16],
    ) {
        let shift = simd.splat(shift);
        let out = &mut self.out[query * self.shape.stride + at..][..block.len()];
        for at in (0..block.len()).step_by(S::LANES) {
            let sum = simd.mul_add(simd.load(&out[at..]), shift, simd.load(&block[at..]));
            simd.store(sum, &mut out[at..]);
        }
    }

    /// Highest score of `query` so far, the first `tokens` tokens of a chunk included. Meanwhile
    /// `next` is asked for.
    #[inline(always)]
    pub(super) fn raised<S: Simd>(
        &self,
        simd: S,
        query: usize,
        (scores, tokens): (&mut [f32], usize),
        next: &mut impl Ahead,
    ) -> f32 {
        let scores = &mut scores[..tokens.next_multiple_of(S::LANES)];
        // What lies behind the last token is left over, or belongs to tokens that are not seen.
        scores[tokens..].fill(f32::NEG_INFINITY);
        let mut highest = simd.splat(self.peaks[query]);
        for scores in scores.chunks_exact(S::LANES) {
            next.ask(simd);
            highest = simd.max(highest, simd.load(scores));
        }
        simd.highest(highest)
    }

    /// Turns the scores of the first `tokens` tokens of a chunk into weights, and adds them up;
    /// gives the factor that earlier weights shrink by. `peak` is the highest score, as
    /// [`Self::raised`] gives it for all queries first: its last steps wait for each other, and
    /// those of several queries do so together. Meanwhile `next` is asked for.
    #[inline(always)]
    pub(super) fn soften<S: Simd>(
        &mut self,
        simd: S,
        (query, peak): (usize, f32),
        (scores, tokens): (&mut [f32], usize),
        next: &mut impl Ahead,
    ) -> f32 {
        if tokens == 0 {
            return 1.0;
        }
        let before = self.peaks[query];
        let scores = &mut scores[..tokens.next_multiple_of(S::LANES)];
        let mut sum = simd.splat(0.0);
        let mut depth = simd.splat(0.0);
        if self.shape.observed {
            for scores in scores.chunks_exact_mut(S::LANES) {
                let below = simd.sub(simd.load(scores), simd.splat(peak));
                let weights = simd.exp(below);
                simd.store(weights, scores);
                sum = simd.add(sum, weights);
                // Where the exponential ends, depth ends too: nothing times −∞ is not a number.
                let below = simd.max(simd.splat(DEEPEST), below);
                depth = simd.mul_add(weights, below, depth);
            }
        } else {
            for scores in scores.chunks_exact_mut(S::LANES) {
                next.ask(simd);
                let weights = simd.exp(simd.sub(simd.load(scores), simd.splat(peak)));
                next.ask(simd);
                simd.store(weights, scores);
                sum = simd.add(sum, weights);
            }
        }
        // Far below zero the exponential is small, not nothing: too small for the sum to notice,
        // but not to be multiplied by a value that is not a number.
        scores[tokens..].fill(0.0);
        // Usually the peak stays, and what it would scale is not scaled.
        let shift = if before == peak { 1.0 } else { (before - peak).exp() };
        if self.shape.observed {
            self.depths[query] = self.deepened(query, before - peak) * shift + simd.sum(depth);
        }
        self.peaks[query] = peak;
        self.sums[query] = self.sums[query] * shift + simd.sum(sum);
        shift
    }

    /// `out = out·shift + Σ_t weights[t]·values[t]` for the queries from `query` on, as many as
    /// there are `shifts`, and the tokens `range` of a chunk.
    ///
    /// `weights` is `[queries, chunk]`; page `i` of the chunk is `values(i)`, `[size, head_dim]`.
    /// Memory is asked for values ahead while those of the first queries are added.
    #[inline(always)]
    pub(super) fn add_values<S: Simd, T: Element>(
        &mut self,
        simd: S,
        query: usize,
        weights: (&[f32], usize),
        shifts: &[f32],
        values: (&impl Rows<T>, usize),
        range: Range<usize>,
    ) {
        match shifts.len() {
            8 => self.add_to::<S, T, _, 8, 2>(simd, query, weights, shifts, values, range),
            4 if S::LANES == 16 => {
                self.add_to::<S, T, _, 4, 4>(simd, query, weights, shifts, values, range);
            }
            4 => self.add_to::<S, T, _, 4, 3>(simd, query, weights, shifts, values, range),
            2 => self.add_to::<S, T, _, 2, 4>(simd, query, weights, shifts, values, range),
            _ if S::LANES == 16 => {
                self.add_to::<S, T, _, 1, 4>(simd, query, weights, shifts, values, range);
            }
            _ => self.add_to::<S, T, _, 1, 8>(simd, query, weights, shifts, values, range),
        }
    }

    #[inline(always)]
    fn add_to<S: Simd, T: Element, R: Rows<T>, const Q: usize, const V: usize>(
        &mut self,
        simd: S,
        query: usize,
        weights: (&[f32], usize),
        shifts: &[f32],
        values: (&R, usize),
        range: Range<usize>,
    ) {
        let (dim, stride) = (self.shape.head_dim, self.shape.stride);
        let out = (&mut self.out[query * stride..(query + Q) * stride], stride);
        let rows = Values { values, dim, range, asks: query == 0 };
        let shifts = std::array::from_fn(|i| shifts[i]);
        let (mut at, out) = (0, out.0);
        while at < dim {
            // As many whole vectors at a time as registers hold sums for; then a part of one.
            let left = (dim - at) / S::LANES;
            // Two and two rather than three and a single one.
            let most = left >= V && !(V == 3 && left == 4);
            let shift = (shifts, (&mut *out, stride));
            at += S::LANES
                * if most {
                    rows.add::<S, T, Q, V>(simd, weights, at, shift)
                } else if left >= 2 {
                    rows.add::<S, T, Q, 2>(simd, weights, at, shift)
                } else {
                    rows.add::<S, T, Q, 1>(simd, weights, at, shift)
                };
        }
    }
}

/// Values of the tokens `range` of a chunk.
struct Values<'a, R> {
    /// `[size, dim]` of each page; the page size.
    values: (&'a R, usize),
    dim: usize,
    range: Range<usize>,
    /// Whether memory is asked for values ahead.
    asks: bool,
}

impl<R> Values<'_, R> {
    /// Adds columns `at..` of every value, `V` vectors, the last of them perhaps partly; gives `V`.
    #[inline(always)]
    fn add<S: Simd, T: Element, const Q: usize, const V: usize>(
        &self,
        simd: S,
        (weights, chunk): (&[f32], usize),
        at: usize,
        (shifts, (out, stride)): ([f32; Q], (&mut [f32], usize)),
    ) -> usize
    where
        R: Rows<T>,
    {
        let mut sums = [[simd.splat(0.0); V]; Q];
        for (i, sums) in sums.iter_mut().enumerate() {
            let shift = simd.splat(shifts[i]);
            for (v, sum) in sums.iter_mut().enumerate() {
                *sum = simd.mul(simd.load(&out[i * stride + at + v * S::LANES..]), shift);
            }
        }
        let (pages, size) = self.values;
        let end = (at + V * S::LANES).min(self.dim);
        let mut token = self.range.start;
        while token < self.range.end {
            let (index, first) = (token / size, token % size);
            let tokens = (size - first).min(self.range.end - token);
            let ahead = pages.ahead(index);
            let asks = self.asks && ahead > 0;
            let ahead = pages.of(index + ahead)[first * self.dim..].as_ptr();
            let rows = pages.of(index)[first * self.dim..].chunks_exact(self.dim).take(tokens);
            let w: [&[f32]; Q] = std::array::from_fn(|i| &weights[i * chunk + token..][..tokens]);
            for (t, row) in rows.enumerate() {
                let row = &row[at..end];
                if asks {
                    // Passes over as many tokens as are ahead share lines out in their order: memory
                    // gives neighbours faster. Others ask for what they themselves come to next.
                    let shared = S::LANES < 16 && Q >= TILED;
                    let place = ahead.wrapping_add(match shared {
                        true => at * tokens + t * V * S::LANES,
                        false => t * self.dim + at,
                    });
                    for line in 0..(V * S::LANES * size_of::<T>()).div_ceil(LINE) {
                        simd.prefetch(place.wrapping_add(line * LINE / size_of::<T>()));
                    }
                }
                let mut wide = [simd.splat(0.0); V];
                for (v, wide) in wide.iter_mut().enumerate() {
                    *wide = if V == 1 {
                        simd.load_up_to(row)
                    } else {
                        T::load(simd, &row[v * S::LANES..(v + 1) * S::LANES])
                    };
                }
                for (w, sums) in w.iter().zip(&mut sums) {
                    let w = simd.splat(w[t]);
                    for (value, sum) in wide.iter().zip(sums) {
                        *sum = simd.mul_add(w, *value, *sum);
                    }
                }
            }
            token += tokens;
        }
        for (i, sums) in sums.iter().enumerate() {
            for (v, &sum) in sums.iter().enumerate() {
                simd.store(sum, &mut out[i * stride + at + v * S::LANES..]);
            }
        }
        V
    }
}
