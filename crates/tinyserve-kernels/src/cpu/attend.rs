//! Paged attention: one kernel over a page list, whether the list is a selection or everything.

mod tile;

use std::marker::PhantomData;
use std::ops::Range;
use std::sync::{OnceLock, PoisonError};

use tinyserve_kv::{HostPages, KvElement, with_element};

use super::columns::Columns;
use super::path::CpuPath;
use super::select::{Choice, Chosen, choose};
use super::simd::{Element, dispatch};
use super::{Cpu, CpuTensor};
use crate::reference;
use crate::{AttendArgs, AttendSequence, AttendStats, Attention, Heads, KernelError};

use tile::{Tile, TileScratch};

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
    let (width, shape) = (heads.q_columns().len(), pages.layout().shape());
    assert_eq!(
        (heads.kv_heads, heads.head_dim),
        (shape.kv_heads, shape.head_dim),
        "heads of pages"
    );
    assert!(heads.q_heads.is_multiple_of(heads.kv_heads), "query heads of one KV head");
    assert_eq!(qkv.columns(), heads.qkv_width(), "width of queries, keys and values");
    assert_eq!(out.columns(), width, "output width of attention");
    // Threads write rows at the same time: that is sound because each is written for one sequence.
    let mut written = vec![false; out.rows()];
    for row in sequences.iter().flat_map(|sequence| sequence.rows.clone()) {
        assert!(!std::mem::replace(&mut written[row], true), "row {row} is in two sequences");
    }
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
    // They belong to the call, not to the threads: a panic or another caller must not reach them.
    let results: Vec<OnceLock<_>> = items.iter().map(|_| OnceLock::new()).collect();
    let run = |thread: usize, item: usize| {
        // Only waited for when two callers share a backend. Whoever panicked left nothing that is
        // read before it is written.
        let mut scratch = cpu.scratch[thread].lock().unwrap_or_else(PoisonError::into_inner);
        // It is empty: each item is run once.
        let _ = results[item].set(context.run(&items[item], &mut scratch));
    };
    if work < SERIAL_WORK {
        (0..items.len()).for_each(|item| run(0, item));
    } else {
        cpu.pool.run(items.len(), &run);
    }
    // In the order of the items, so that neither sums nor errors depend on who was faster.
    let mut stats = AttendStats::default();
    for result in results.into_iter().filter_map(OnceLock::into_inner) {
        stats.add(&result?);
    }
    Ok(stats)
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
        (start < next).then_some((sequence, start..next))
    })
}

/// Buffers that a thread reuses from item to item.
#[derive(Debug, Default)]
pub(super) struct Scratch {
    /// Page list of the row.
    list: Vec<u32>,
    /// What choosing pages needs.
    choice: Choice,
    /// What the tile's softmax needs.
    tile: TileScratch,
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
        if self.path == CpuPath::Scalar {
            self.reference::<E>(item, &list);
        } else {
            let tile = Tile {
                context: self,
                item,
                first_visible: tokens + 1 - item.rows.len(),
                list: &list,
                scratch: &mut scratch.tile,
                element: PhantomData::<E>,
            };
            dispatch(self.path, tile);
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
