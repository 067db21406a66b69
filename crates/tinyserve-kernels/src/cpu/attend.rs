//! Paged attention: one kernel over a page list, whether the list is a selection or everything.

use std::marker::PhantomData;
use std::ops::Range;

use rayon::prelude::*;
use tinyserve_kv::{HostPages, KvElement, PageId, with_element};

use super::columns::Columns;
use super::path::CpuPath;
use super::select::{Choice, Chosen, choose};
use super::simd::{Element, Kernel, Simd, dispatch};
use super::{Cpu, CpuTensor};
use crate::reference;
use crate::{AttendArgs, AttendSequence, AttendStats, Attention, Heads, KernelError};

/// Rows of a prefill chunk that share one pass over the pages.
const ROW_TILE: usize = 16;
/// Multiply-adds below which waking other threads costs more than it saves.
const SERIAL_WORK: usize = 32 * 1024;

/// Rows of one sequence and the query heads of one KV head: what one thread does at a time.
struct Item<'a> {
    sequence: &'a AttendSequence<'a>,
    /// Rows of the batch.
    rows: Range<usize>,
    kv_head: usize,
}

/// What every item of a call needs.
pub(super) struct Context<'a> {
    pub(super) path: CpuPath,
    pub(super) layer: usize,
    pub(super) heads: Heads,
    pub(super) pages: &'a HostPages,
    pub(super) scale: f32,
    qkv: &'a CpuTensor,
    measure_recall: bool,
    columns: Columns<'a>,
}

pub(super) fn attend(cpu: &Cpu, args: AttendArgs<'_, Cpu>) -> Result<AttendStats, KernelError> {
    let AttendArgs { layer, heads, qkv, scale, sequences, pages, measure_recall, out } = args;
    let width = heads.q_columns().len();
    let columns = Columns::new(out.values_mut(), width);
    // Heads that do not fill a wide vector waste it: the narrower one has less to waste.
    let path = match cpu.path() {
        CpuPath::Avx512 if heads.head_dim < 16 => CpuPath::Avx2,
        path => path,
    };
    let context = Context { path, layer, heads, pages, scale, qkv, measure_recall, columns };
    let items: Vec<Item<'_>> = sequences
        .iter()
        .flat_map(|sequence| tiles(sequence, layer, pages.layout().page_size()))
        .flat_map(|(sequence, rows)| {
            (0..heads.kv_heads).map(move |kv_head| Item { sequence, rows: rows.clone(), kv_head })
        })
        .collect();
    let work: usize =
        sequences.iter().map(|s| s.rows.len() * (s.first_position + s.rows.len()) * width).sum();
    let add = |mut a: AttendStats, b: AttendStats| {
        a.add(&b);
        a
    };
    let pool = cpu.pool.as_ref().filter(|_| items.len() > 1 && work >= SERIAL_WORK);
    let Some(pool) = pool else {
        let mut scratch = Scratch::default();
        return items
            .iter()
            .map(|item| context.run(item, &mut scratch))
            .try_fold(AttendStats::default(), |sum, stats| Ok(add(sum, stats?)));
    };
    pool.install(|| {
        items
            .par_iter()
            .map_init(Scratch::default, |scratch, item| context.run(item, scratch))
            .try_reduce(AttendStats::default, |a, b| Ok(add(a, b)))
    })
}

/// Splits the rows of a sequence into tiles: up to [`ROW_TILE`] rows that read everything, or one
/// row that selects.
fn tiles<'a>(
    sequence: &'a AttendSequence<'a>,
    layer: usize,
    page_size: usize,
) -> impl Iterator<Item = (&'a AttendSequence<'a>, Range<usize>)> {
    let Range { start: first, end } = sequence.rows;
    let selects = move |row: usize| match sequence.attention {
        Attention::Dense => false,
        Attention::Policy(policy) => {
            let tokens = sequence.first_position + row - first + 1;
            policy.page_budget(layer, tokens, page_size).is_some()
        }
        Attention::Custom(_) => true,
    };
    let mut next = first;
    std::iter::from_fn(move || {
        let start = next;
        next += usize::from(start < end);
        while next < end && next - start < ROW_TILE && !selects(start) && !selects(next) {
            next += 1;
        }
        (start < next).then(|| (sequence, start..next))
    })
}

/// Buffers that a thread reuses from item to item.
#[derive(Default)]
struct Scratch {
    /// Page list of the row.
    list: Vec<u32>,
    /// What choosing pages needs.
    choice: Choice,
    keys: Vec<f32>,
    values: Vec<f32>,
    /// Attention weights of one page `[page_size]`, padded to whole vectors.
    weights: Vec<f32>,
    /// Per query head of the tile: running maximum, running sum, then the output so far.
    peaks: Vec<f32>,
    sums: Vec<f32>,
    out: Vec<f32>,
}

impl Context<'_> {
    fn run(&self, item: &Item<'_>, scratch: &mut Scratch) -> Result<AttendStats, KernelError> {
        with_element!(self.pages.layout().shape().format, E => self.run_as::<E>(item, scratch))
    }

    fn run_as<E: KvElement + Element>(
        &self,
        item: &Item<'_>,
        scratch: &mut Scratch,
    ) -> Result<AttendStats, KernelError> {
        let layout = self.pages.layout();
        let last_row = item.rows.end - 1 - item.sequence.rows.start;
        let tokens = item.sequence.first_position + last_row + 1;
        let total = layout.pages_for(tokens);
        let queries = self.queries(item.rows.start, item.kv_head);
        let mut list = std::mem::take(&mut scratch.list);
        let chosen = choose::<E>(
            self,
            item.sequence.attention,
            (item.kv_head, &item.sequence.pages[..total], tokens),
            queries,
            &mut scratch.choice,
            &mut list,
        )?;
        if chosen != Chosen::Listed {
            list.clear();
            list.extend(0..total as u32);
        }
        let head = Head {
            pages: self.pages,
            layer: self.layer,
            kv_head: item.kv_head,
            table: item.sequence.pages,
            first_visible: item.sequence.first_position + item.rows.start + 1
                - item.sequence.rows.start,
            dim: self.heads.head_dim,
            scale: self.scale,
        };
        if self.path == CpuPath::Scalar {
            self.reference::<E>(item, &list);
        } else {
            let (list, element) = (list.as_slice(), PhantomData::<E>);
            dispatch(self.path, Tile { context: self, item, head: &head, list, scratch, element });
        }
        let mut stats = self.count(item, &list, chosen);
        if self.measure_recall && chosen == Chosen::Listed && list.len() < total {
            for query in queries.chunks_exact(self.heads.head_dim) {
                let row = reference::AttendRow {
                    pages: self.pages,
                    layer: self.layer,
                    kv_head: item.kv_head,
                    table: item.sequence.pages,
                    tokens,
                    query,
                    scale: self.scale,
                };
                stats.recall_sum += f64::from(reference::recall::<E>(&row, &list));
                stats.recall_count += 1;
            }
        }
        scratch.list = list;
        Ok(stats)
    }

    /// Queries `[group, head_dim]` of `row` that share `kv_head`.
    fn queries(&self, row: usize, kv_head: usize) -> &[f32] {
        let width = self.heads.group() * self.heads.head_dim;
        let start = row * self.heads.qkv_width() + kv_head * width;
        &self.qkv.values()[start..start + width]
    }

    /// Columns of the output that belong to `kv_head`.
    fn columns_of(&self, kv_head: usize) -> Range<usize> {
        let width = self.heads.group() * self.heads.head_dim;
        kv_head * width..(kv_head + 1) * width
    }

    fn reference<E: KvElement>(&self, item: &Item<'_>, list: &[u32]) {
        let size = self.pages.layout().page_size();
        for row in item.rows.clone() {
            let tokens = item.sequence.first_position + row - item.sequence.rows.start + 1;
            // A later row of the tile may see a page that this one does not.
            let seen = list.partition_point(|&page| (page as usize) * size < tokens);
            // SAFETY: rows and KV heads of items do not overlap, and the slice ends in this loop.
            let out = unsafe { self.columns.slice(row, self.columns_of(item.kv_head)) };
            let queries = self.queries(row, item.kv_head).chunks_exact(self.heads.head_dim);
            for (query, out) in queries.zip(out.chunks_exact_mut(self.heads.head_dim)) {
                let row = reference::AttendRow {
                    pages: self.pages,
                    layer: self.layer,
                    kv_head: item.kv_head,
                    table: item.sequence.pages,
                    tokens,
                    query,
                    scale: self.scale,
                };
                reference::attend_row::<E>(&row, &list[..seen], out);
            }
        }
    }

    fn count(&self, item: &Item<'_>, list: &[u32], chosen: Chosen) -> AttendStats {
        let layout = self.pages.layout();
        let (size, head_bytes) = (layout.page_size(), 2 * layout.token_head_bytes());
        let mut stats = AttendStats::default();
        for row in item.rows.clone() {
            let tokens = item.sequence.first_position + row - item.sequence.rows.start + 1;
            let pages = layout.pages_for(tokens);
            // What a later row of the tile sees is not counted for this one.
            let seen = &list[..list.partition_point(|&page| (page as usize) * size < tokens)];
            let read: usize =
                seen.iter().map(|&page| (tokens - page as usize * size).min(size)).sum();
            // A box is a minimum and a maximum: as many bytes as one token's key and value.
            let boxes = if chosen == Chosen::Everything { 0 } else { pages };
            stats.pages_read += seen.len() as u64;
            stats.pages_total += pages as u64;
            stats.bytes_read += ((read + boxes) * head_bytes) as u64;
            stats.bytes_dense += (tokens * head_bytes) as u64;
        }
        stats
    }
}

/// Where one KV head of one sequence lies.
struct Head<'a> {
    pages: &'a HostPages,
    layer: usize,
    kv_head: usize,
    table: &'a [PageId],
    /// Tokens that the tile's first row sees; each next row sees one more.
    first_visible: usize,
    dim: usize,
    scale: f32,
}

/// Online softmax of a tile of rows over a page list (Milakov and Gimelshein, arXiv 1805.02867).
///
/// A row goes through the same steps whichever rows share its tile.
struct Tile<'a, E> {
    context: &'a Context<'a>,
    item: &'a Item<'a>,
    head: &'a Head<'a>,
    list: &'a [u32],
    scratch: &'a mut Scratch,
    element: PhantomData<E>,
}

impl<E: KvElement + Element> Kernel for Tile<'_, E> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let Self { context, item, head, list, scratch, .. } = self;
        let (dim, group) = (head.dim, context.heads.group());
        let size = context.pages.layout().page_size();
        let queries = item.rows.len() * group;
        scratch.peaks.clear();
        scratch.peaks.resize(queries, f32::NEG_INFINITY);
        scratch.sums.clear();
        scratch.sums.resize(queries, 0.0);
        scratch.out.clear();
        scratch.out.resize(queries * dim, 0.0);
        scratch.weights.clear();
        scratch.weights.resize(size.next_multiple_of(S::LANES), 0.0);
        let last_visible = head.first_visible + item.rows.len() - 1;
        for &index in list {
            let first_token = index as usize * size;
            let visible = (last_visible - first_token).min(size);
            let page = head.pages.head::<E>(head.layer, head.table[index as usize], head.kv_head);
            let (keys, values) = (&page.keys[..visible * dim], &page.values[..visible * dim]);
            let page = PageRows { first_token, dim, group, scale: head.scale };
            // Widening pays when several queries read the page; the numbers are the same.
            if queries > 1 && E::as_f32(keys).is_none() {
                let mut wide =
                    (std::mem::take(&mut scratch.keys), std::mem::take(&mut scratch.values));
                widen(simd, keys, &mut wide.0);
                widen(simd, values, &mut wide.1);
                page.add::<S, f32>(simd, context, item, head, (&wide.0, &wide.1), scratch);
                (scratch.keys, scratch.values) = wide;
            } else {
                page.add::<S, E>(simd, context, item, head, (keys, values), scratch);
            }
        }
        for (r, row) in item.rows.clone().enumerate() {
            // SAFETY: rows and KV heads of items do not overlap, and the slice ends in this loop.
            let out = unsafe { context.columns.slice(row, context.columns_of(item.kv_head)) };
            for (g, out) in out.chunks_exact_mut(dim).enumerate() {
                let query = r * group + g;
                let inverse = scratch.sums[query].recip();
                let sums = &scratch.out[query * dim..(query + 1) * dim];
                for (out, &sum) in out.iter_mut().zip(sums) {
                    *out = sum * inverse;
                }
            }
        }
    }
}

#[inline(always)]
fn widen<S: Simd, E: Element>(simd: S, x: &[E], out: &mut Vec<f32>) {
    out.clear();
    out.resize(x.len(), 0.0);
    for (x, out) in x.chunks(S::LANES).zip(out.chunks_mut(S::LANES)) {
        simd.store_up_to(simd.load_up_to(x), out);
    }
}

/// One page on its way into the softmax of every query of a tile.
struct PageRows {
    first_token: usize,
    dim: usize,
    group: usize,
    scale: f32,
}

impl PageRows {
    #[inline(always)]
    fn add<S: Simd, T: Element>(
        &self,
        simd: S,
        context: &Context<'_>,
        item: &Item<'_>,
        head: &Head<'_>,
        (keys, values): (&[T], &[T]),
        scratch: &mut Scratch,
    ) {
        let Self { first_token, dim, group, scale } = *self;
        let in_page = keys.len() / dim;
        for (r, row) in item.rows.clone().enumerate() {
            let visible = (head.first_visible + r).saturating_sub(first_token).min(in_page);
            if visible == 0 {
                continue;
            }
            let queries = context.queries(row, item.kv_head);
            for (g, q) in queries.chunks_exact(dim).enumerate() {
                let query = r * group + g;
                let weights = &mut scratch.weights;
                let mut peak = scratch.peaks[query];
                for (weight, key) in weights.iter_mut().zip(keys.chunks_exact(dim)).take(visible) {
                    *weight = scale * dot(simd, q, key);
                    peak = peak.max(*weight);
                }
                let shift = (scratch.peaks[query] - peak).exp();
                scratch.peaks[query] = peak;
                let peak = simd.splat(peak);
                for weights in
                    weights[..visible.next_multiple_of(S::LANES)].chunks_exact_mut(S::LANES)
                {
                    let weight = simd.exp(simd.sub(simd.load(weights), peak));
                    simd.store(weight, weights);
                }
                let sum: f32 = weights[..visible].iter().sum();
                scratch.sums[query] = scratch.sums[query] * shift + sum;
                let out = &mut scratch.out[query * dim..(query + 1) * dim];
                add_values(simd, &weights[..visible], values, shift, out);
            }
        }
    }
}

#[inline(always)]
fn dot<S: Simd, T: Element>(simd: S, q: &[f32], key: &[T]) -> f32 {
    let mut sums = [simd.splat(0.0); 2];
    let whole = q.len() - q.len() % S::LANES;
    let mut i = 0;
    while i + 2 * S::LANES <= whole {
        for (k, sum) in sums.iter_mut().enumerate() {
            let at = i + k * S::LANES;
            let q = simd.load(&q[at..at + S::LANES]);
            *sum = simd.mul_add(q, T::load(simd, &key[at..at + S::LANES]), *sum);
        }
        i += 2 * S::LANES;
    }
    if i < whole {
        let q = simd.load(&q[i..whole]);
        sums[0] = simd.mul_add(q, T::load(simd, &key[i..whole]), sums[0]);
    }
    if whole < q.len() {
        let q = simd.load_tail(&q[whole..]);
        sums[1] = simd.mul_add(q, simd.load_tail(&key[whole..]), sums[1]);
    }
    simd.sum(simd.add(sums[0], sums[1]))
}

/// `out = out·shift + Σ_t weights[t]·values[t]`.
#[inline(always)]
fn add_values<S: Simd, T: Element>(
    simd: S,
    weights: &[f32],
    values: &[T],
    shift: f32,
    out: &mut [f32],
) {
    let dim = out.len();
    let shift = simd.splat(shift);
    let whole = dim - dim % S::LANES;
    let mut d = 0;
    while d + 4 * S::LANES <= whole {
        let mut sums: [S::V; 4] = std::array::from_fn(|v| {
            let at = d + v * S::LANES;
            simd.mul(simd.load(&out[at..at + S::LANES]), shift)
        });
        for (&weight, value) in weights.iter().zip(values.chunks_exact(dim)) {
            let weight = simd.splat(weight);
            for (v, sum) in sums.iter_mut().enumerate() {
                let at = d + v * S::LANES;
                *sum = simd.mul_add(weight, T::load(simd, &value[at..at + S::LANES]), *sum);
            }
        }
        for (v, &sum) in sums.iter().enumerate() {
            let at = d + v * S::LANES;
            simd.store(sum, &mut out[at..at + S::LANES]);
        }
        d += 4 * S::LANES;
    }
    while d < whole {
        let mut sum = simd.mul(simd.load(&out[d..d + S::LANES]), shift);
        for (&weight, value) in weights.iter().zip(values.chunks_exact(dim)) {
            sum = simd.mul_add(simd.splat(weight), T::load(simd, &value[d..d + S::LANES]), sum);
        }
        simd.store(sum, &mut out[d..d + S::LANES]);
        d += S::LANES;
    }
    if whole < dim {
        let mut sum = simd.mul(simd.load_tail(&out[whole..]), shift);
        for (&weight, value) in weights.iter().zip(values.chunks_exact(dim)) {
            sum = simd.mul_add(simd.splat(weight), simd.load_tail(&value[whole..]), sum);
        }
        simd.store_tail(sum, &mut out[whole..]);
    }
}
