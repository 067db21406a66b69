//! Online softmax of a tile of rows over a page list (Milakov and Gimelshein, arXiv 1805.02867).
//!
//! A row goes through the same additions in the same order whichever rows share its tile, so it
//! gets bit for bit what it gets alone. Per page: scores of all queries, weights, weighted values.

use std::marker::PhantomData;
use std::ops::Range;

use tinyserve_kv::{KvElement, KvFormat};

use super::{Context, Item};
use crate::cpu::simd::{Element, Kernel, Simd};

/// What the processor fetches at a time.
const LINE_BYTES: usize = 64;
/// Keys whose scores are summed up together.
const KEYS: usize = 4;
/// Vectors of an output that are added up together.
const VECTORS: usize = 4;

/// Buffers of a tile, reused from item to item.
#[derive(Debug, Default)]
pub(super) struct TileScratch {
    /// Queries `[queries, stride]`; `stride` is `head_dim` padded with zeros to whole vectors.
    queries: Vec<f32>,
    /// Keys and values of one page, widened: `[page_size, stride]`.
    keys: Vec<f32>,
    values: Vec<f32>,
    /// Scores, then weights of one page `[queries, page_size]`, padded to whole vectors.
    weights: Vec<f32>,
    /// Highest score so far, per query.
    peaks: Vec<f32>,
    /// Sum of weights so far, per query.
    sums: Vec<f32>,
    /// What this page's peak makes of earlier sums, per query.
    shifts: Vec<f32>,
    /// Weighted values so far `[queries, stride]`.
    out: Vec<f32>,
}

/// Rows of one sequence and the query heads of one KV head, over listed pages.
pub(super) struct Tile<'a, E> {
    pub(super) context: &'a Context<'a>,
    pub(super) item: &'a Item<'a>,
    /// Tokens that the first row sees; each next row sees one more.
    pub(super) first_visible: usize,
    /// Indices into the sequence's pages, ascending; each holds a token that the last row sees.
    pub(super) list: &'a [u32],
    pub(super) scratch: &'a mut TileScratch,
    pub(super) element: PhantomData<E>,
}

/// Keys or values of one page: rows of `length` elements, `stride` apart.
#[derive(Clone, Copy)]
struct Rows<'a, T> {
    values: &'a [T],
    stride: usize,
    length: usize,
}

impl<'a, T> Rows<'a, T> {
    #[inline(always)]
    fn row(&self, row: usize) -> &'a [T] {
        &self.values[row * self.stride..row * self.stride + self.length]
    }
}

impl<E: KvElement + Element> Kernel for Tile<'_, E> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let Self { context, item, first_visible, list, scratch, .. } = self;
        let (dim, group) = (context.heads.head_dim, context.heads.group());
        let size = context.pages.layout().page_size();
        let queries = item.rows.len() * group;
        let stride = dim.next_multiple_of(S::LANES);
        scratch.start(queries, stride, size.next_multiple_of(S::LANES));
        let rows =
            item.rows.clone().flat_map(|row| context.queries(row, item.kv_head).chunks_exact(dim));
        for (query, padded) in rows.zip(scratch.queries.chunks_exact_mut(stride)) {
            padded[..dim].copy_from_slice(query);
        }
        for (i, &index) in list.iter().enumerate() {
            // One row is through with a page before the processor guesses where the next one is.
            if let (1, Some(&next)) = (item.rows.len(), list.get(i + 1)) {
                let page = item.sequence.pages[next as usize];
                let page = context.pages.head::<E>(context.layer, page, item.kv_head);
                for rows in [page.keys, page.values] {
                    for line in rows.chunks(LINE_BYTES / size_of::<E>()) {
                        simd.prefetch(line.as_ptr());
                    }
                }
            }
            let first_token = index as usize * size;
            let visible = |query: usize| {
                (first_visible + query / group).saturating_sub(first_token).min(size)
            };
            let page = item.sequence.pages[index as usize];
            let page = context.pages.head::<E>(context.layer, page, item.kv_head);
            // Tokens behind those that the last row sees are garbage: they are never touched.
            let stored = |values| Rows { values, stride: dim, length: dim };
            let (keys, values) = (stored(page.keys), stored(page.values));
            // Widening pays when several queries read the page; the numbers are the same.
            if queries > 1 && (E::FORMAT != KvFormat::F32 || dim < stride) {
                let last = visible(queries - 1);
                let mut wide =
                    (std::mem::take(&mut scratch.keys), std::mem::take(&mut scratch.values));
                let keys = widen(simd, &keys, last, stride, &mut wide.0);
                let values = widen(simd, &values, last, stride, &mut wide.1);
                scratch.add_page(simd, (keys, values), context.scale, visible);
                (scratch.keys, scratch.values) = wide;
            } else {
                scratch.add_page(simd, (keys, values), context.scale, visible);
            }
        }
        for (r, row) in item.rows.clone().enumerate() {
            // SAFETY: rows and KV heads of items do not overlap, and the slice ends in this loop.
            let out = unsafe { context.columns.slice(row, context.columns_of(item.kv_head)) };
            for (g, out) in out.chunks_exact_mut(dim).enumerate() {
                let query = r * group + g;
                let inverse = scratch.sums[query].recip();
                let sums = &scratch.out[query * stride..][..dim];
                for (out, &sum) in out.iter_mut().zip(sums) {
                    *out = sum * inverse;
                }
            }
        }
    }
}

/// Copies the first `rows` rows into `out`, widened and padded with zeros to `stride`.
#[inline(always)]
fn widen<'a, S: Simd, E: Element>(
    simd: S,
    stored: &Rows<'_, E>,
    rows: usize,
    stride: usize,
    out: &'a mut Vec<f32>,
) -> Rows<'a, f32> {
    out.resize(rows * stride, 0.0);
    for (row, out) in out.chunks_exact_mut(stride).enumerate() {
        let x = stored.row(row).chunks(S::LANES);
        for (x, out) in x.zip(out.chunks_exact_mut(S::LANES)) {
            simd.store(simd.load_up_to(x), out);
        }
    }
    Rows { values: out, stride, length: stride }
}

impl TileScratch {
    fn start(&mut self, queries: usize, stride: usize, page: usize) {
        for (buffer, length, value) in [
            (&mut self.queries, queries * stride, 0.0),
            (&mut self.weights, queries * page, 0.0),
            (&mut self.peaks, queries, f32::NEG_INFINITY),
            (&mut self.sums, queries, 0.0),
            (&mut self.shifts, queries, 0.0),
            (&mut self.out, queries * stride, 0.0),
        ] {
            buffer.clear();
            buffer.resize(length, value);
        }
    }

    /// Adds one page to the softmax of every query; `visible` tells how many of its tokens a
    /// query sees.
    #[inline(always)]
    fn add_page<S: Simd, T: Element>(
        &mut self,
        simd: S,
        (keys, values): (Rows<'_, T>, Rows<'_, T>),
        scale: f32,
        visible: impl Fn(usize) -> usize,
    ) {
        let queries = self.peaks.len();
        let most = if S::LANES == 16 { 4 } else { 2 };
        let mut query = 0;
        while query < queries {
            let tokens = visible(query);
            let same = query..(query + most).min(queries);
            // Queries that see as many tokens go together; the others have a page to themselves.
            let together = same.len() == most && visible(same.end - 1) == tokens;
            match (tokens, together) {
                (0, _) => query += 1,
                (_, true) if most == 4 => {
                    self.add_to::<S, T, 4>(simd, (&keys, &values), scale, query, tokens);
                    query += 4;
                }
                (_, true) => {
                    self.add_to::<S, T, 2>(simd, (&keys, &values), scale, query, tokens);
                    query += 2;
                }
                (_, false) => {
                    self.add_to::<S, T, 1>(simd, (&keys, &values), scale, query, tokens);
                    query += 1;
                }
            }
        }
    }

    /// Adds the first `tokens` tokens of a page to the softmax of `Q` queries from `query` on.
    #[inline(always)]
    fn add_to<S: Simd, T: Element, const Q: usize>(
        &mut self,
        simd: S,
        (keys, values): (&Rows<'_, T>, &Rows<'_, T>),
        scale: f32,
        query: usize,
        tokens: usize,
    ) {
        let stride = self.queries.len() / self.peaks.len();
        let page = self.weights.len() / self.peaks.len();
        let q = Rows { values: &self.queries[query * stride..], stride, length: stride };
        let weights = &mut self.weights[query * page..(query + Q) * page];
        let mut key = 0;
        while key + KEYS <= tokens {
            scores::<S, T, Q, KEYS>(simd, &q, keys, key, (weights, page));
            key += KEYS;
        }
        while key < tokens {
            scores::<S, T, Q, 1>(simd, &q, keys, key, (weights, page));
            key += 1;
        }
        for (i, weights) in weights.chunks_exact_mut(page).enumerate() {
            let weights = &mut weights[..tokens.next_multiple_of(S::LANES)];
            let before = self.peaks[query + i];
            let (peak, sum) = soften(simd, weights, tokens, scale, before);
            // Usually the peak stays, and what it would scale is not scaled.
            let shift = if before == peak { 1.0 } else { (before - peak).exp() };
            self.peaks[query + i] = peak;
            self.shifts[query + i] = shift;
            self.sums[query + i] = self.sums[query + i] * shift + sum;
        }
        let shifts = std::array::from_fn(|i| self.shifts[query + i]);
        let weights = Rows { values: weights, stride: page, length: tokens };
        let out = &mut self.out[query * stride..(query + Q) * stride];
        let mut at = 0;
        while at + VECTORS * S::LANES <= values.length {
            let range = at..at + VECTORS * S::LANES;
            add_values::<S, T, Q, VECTORS>(simd, &weights, values, range, shifts, (out, stride));
            at += VECTORS * S::LANES;
        }
        while at < values.length {
            let range = at..(at + S::LANES).min(values.length);
            add_values::<S, T, Q, 1>(simd, &weights, values, range, shifts, (out, stride));
            at += S::LANES;
        }
    }
}

/// Dot products of `Q` queries with `K` keys from `key` on, into rows of `out`.
#[inline(always)]
fn scores<S: Simd, T: Element, const Q: usize, const K: usize>(
    simd: S,
    q: &Rows<'_, f32>,
    keys: &Rows<'_, T>,
    key: usize,
    (out, page): (&mut [f32], usize),
) {
    let q: [&[f32]; Q] = std::array::from_fn(|i| q.row(i));
    let k: [&[T]; K] = std::array::from_fn(|i| keys.row(key + i));
    let mut sums = [[simd.splat(0.0); K]; Q];
    let whole = keys.length - keys.length % S::LANES;
    let mut at = 0;
    while at < whole {
        let mut wide = [simd.splat(0.0); K];
        for (k, wide) in k.iter().zip(&mut wide) {
            *wide = T::load(simd, &k[at..at + S::LANES]);
        }
        for (q, sums) in q.iter().zip(&mut sums) {
            let q = simd.load(&q[at..at + S::LANES]);
            for (k, sum) in wide.iter().zip(sums) {
                *sum = simd.mul_add(q, *k, *sum);
            }
        }
        at += S::LANES;
    }
    if whole < keys.length {
        for (q, sums) in q.iter().zip(&mut sums) {
            let q = simd.load(&q[whole..whole + S::LANES]);
            for (k, sum) in k.iter().zip(sums) {
                *sum = simd.mul_add(q, simd.load_tail(&k[whole..]), *sum);
            }
        }
    }
    for (i, sums) in sums.iter().enumerate() {
        let out = &mut out[i * page + key..i * page + key + K];
        if K == KEYS {
            let sums = [sums[0], sums[1 % K], sums[2 % K], sums[3 % K]];
            out.copy_from_slice(&simd.sum_four(sums));
        } else {
            for (out, &sum) in out.iter_mut().zip(sums) {
                *out = simd.sum(sum);
            }
        }
    }
}

/// Turns scores into weights; gives the highest score, that of earlier pages included, and the
/// sum of the weights. `scores` is padded to whole vectors, the first `tokens` of it count.
#[inline(always)]
fn soften<S: Simd>(
    simd: S,
    scores: &mut [f32],
    tokens: usize,
    scale: f32,
    before: f32,
) -> (f32, f32) {
    let scale = simd.splat(scale);
    let mut peak = simd.splat(before);
    for scores in scores[..tokens].chunks_exact_mut(S::LANES) {
        let scaled = simd.mul(simd.load(scores), scale);
        simd.store(scaled, scores);
        peak = simd.max(peak, scaled);
    }
    let whole = tokens - tokens % S::LANES;
    if whole < tokens {
        let tail = &mut scores[whole..];
        let scaled = simd.mul(simd.load(tail), scale);
        simd.store(scaled, tail);
        // What lies behind the last token is left over from other pages.
        tail[tokens - whole..].fill(f32::NEG_INFINITY);
        peak = simd.max(peak, simd.load(tail));
    }
    let highest = simd.highest(peak);
    let peak = simd.splat(highest);
    for scores in scores.chunks_exact_mut(S::LANES) {
        simd.store(simd.exp(simd.sub(simd.load(scores), peak)), scores);
    }
    scores[tokens..].fill(0.0);
    let mut sum = simd.splat(0.0);
    for weights in scores.chunks_exact(S::LANES) {
        sum = simd.add(sum, simd.load(weights));
    }
    (highest, simd.sum(sum))
}

/// `out = out·shift + Σ_t weights[t]·values[t]` in columns `range`, which are `V` vectors, the
/// last of them perhaps partly.
#[inline(always)]
fn add_values<S: Simd, T: Element, const Q: usize, const V: usize>(
    simd: S,
    weights: &Rows<'_, f32>,
    values: &Rows<'_, T>,
    range: Range<usize>,
    shifts: [f32; Q],
    (out, stride): (&mut [f32], usize),
) {
    let at = |v: usize| range.start + v * S::LANES;
    let w: [&[f32]; Q] = std::array::from_fn(|i| weights.row(i));
    let mut sums = [[simd.splat(0.0); V]; Q];
    for (i, sums) in sums.iter_mut().enumerate() {
        let shift = simd.splat(shifts[i]);
        for (v, sum) in sums.iter_mut().enumerate() {
            *sum = simd.mul(simd.load(&out[i * stride + at(v)..]), shift);
        }
    }
    for token in 0..weights.length {
        let value = &values.row(token)[range.clone()];
        let mut wide = [simd.splat(0.0); V];
        for (v, wide) in wide.iter_mut().enumerate() {
            *wide = if V == 1 {
                simd.load_up_to(value)
            } else {
                T::load(simd, &value[v * S::LANES..(v + 1) * S::LANES])
            };
        }
        for (w, sums) in w.iter().zip(&mut sums) {
            let w = simd.splat(w[token]);
            for (value, sum) in wide.iter().zip(sums) {
                *sum = simd.mul_add(w, *value, *sum);
            }
        }
    }
    for (i, sums) in sums.iter().enumerate() {
        for (v, &sum) in sums.iter().enumerate() {
            simd.store(sum, &mut out[i * stride + at(v)..]);
        }
    }
}
