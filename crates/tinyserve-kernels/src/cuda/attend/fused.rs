//! Which tiles are scored, selected for and attended to in one launch.

use tinyserve_kv::KvLayout;

use super::kernels::fused_kernel;
use super::parts::PART_TOKENS;
use super::plan::{Layout, MOST_QUERIES, Pages, Scored, TilePlan};
use super::{Call, Placed, SELECT_THREADS, Scratch};
use crate::cuda::error::CudaError;
use crate::cuda::launch::{Arg, Shape};
use crate::cuda::memory::grown;
use crate::cuda::pages::{CudaPages, is_wide};

/// What decides between one launch and several.
#[derive(Debug, Clone, Copy, Default)]
pub(in crate::cuda) struct FusedChoice {
    /// What the user asks for, as far as there is a kernel.
    pub(in crate::cuda) forced: Option<bool>,
    /// Most bytes of one launch, where they were measured.
    pub(in crate::cuda) most_bytes: Option<usize>,
}

/// Up to how much reading one launch takes the place of four, where nothing was measured: see
/// [`Cuda::time_fused`](crate::Cuda::time_fused).
///
/// One block then does the work of a KV head. That saves launches, and it leaves multiprocessors
/// idle that could read a part each: what the block reads, and no block of a split launch would,
/// decides.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FusedTable {
    /// By the KV heads of a layer, ascending.
    pub rows: &'static [FusedRow],
    /// Where the numbers come from.
    pub source: &'static str,
}

/// A row of the table.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FusedRow {
    /// For layers of up to so many KV heads.
    pub kv_heads: usize,
    /// Most bytes of boxes, and of keys and values beyond one part of 512 tokens, of a KV head.
    pub most_bytes: usize,
}

/// What a launch costs inside a graph, in nanoseconds.
const LAUNCH_NS: usize = 2000;
/// Launches that one saves: scoring, selecting and merging.
const SAVED: usize = 3;
/// Bytes that a multiprocessor reads in a nanosecond, and multiprocessors of the modelled device.
const BYTES_PER_NS: usize = 20;
const MULTIPROCESSORS: usize = 108;

/// The row of the model: one launch reads `bytes` in `bytes / rate`, split ones in the share of it
/// that remains when all multiprocessors take a part of `kv_heads` lists. Equal where
/// `bytes / rate · (1 − kv_heads / multiprocessors)` is what the saved launches cost.
const fn modelled(kv_heads: usize) -> FusedRow {
    let saved = SAVED * LAUNCH_NS * BYTES_PER_NS;
    FusedRow { kv_heads, most_bytes: saved * MULTIPROCESSORS / (MULTIPROCESSORS - kv_heads) }
}

impl FusedTable {
    /// The table that is in use unless another is measured.
    pub const DEFAULT: Self = Self {
        rows: &[
            modelled(1),
            modelled(2),
            modelled(4),
            modelled(8),
            modelled(16),
            modelled(32),
            modelled(64),
        ],
        source: "a model of launches and bytes (2 µs a launch, 20 GB/s for each of 108 \
                 multiprocessors), not measured on a GPU yet",
    };

    /// Most bytes for a layer of `kv_heads` KV heads; the last row is for all that have more.
    #[must_use]
    pub fn most_bytes(&self, kv_heads: usize) -> usize {
        let row = self.rows.iter().find(|row| kv_heads <= row.kv_heads).or(self.rows.last());
        row.map_or(0, |row| row.most_bytes)
    }
}

/// Whether there is a kernel that does all in one for such pages and `group` queries of a KV head.
pub(in crate::cuda) fn has_fused_kernel(layout: &KvLayout, group: usize) -> bool {
    is_wide(layout) && group <= MOST_QUERIES
}

/// What decides: bytes of the boxes of `total` pages of a KV head, and of keys and values of
/// `budget` pages beyond one part.
pub(in crate::cuda) fn fused_bytes(
    layout: &KvLayout,
    group: usize,
    total: usize,
    budget: usize,
) -> usize {
    let shape = layout.shape();
    // Of a lone query one corner of the two is read.
    let corners = if group == 1 { 1 } else { 2 };
    let boxes = total * corners * shape.head_dim * shape.format.element_bytes();
    let beyond = (budget * layout.page_size()).saturating_sub(PART_TOKENS);
    boxes + beyond * 2 * layout.token_head_bytes()
}

/// Whether `tile`, of `total` pages, is done in one launch. It depends on the tile and the model
/// alone, so that a batch changes nothing.
pub(super) fn is_fused(
    tile: &TilePlan,
    total: usize,
    pages: &CudaPages,
    group: usize,
    choice: FusedChoice,
) -> bool {
    let Pages::Best { scored_by: Scored::Boxes, budget, .. } = tile.pages else { return false };
    let layout = pages.layout();
    let modelled = || FusedTable::DEFAULT.most_bytes(layout.shape().kv_heads);
    let most = choice.most_bytes.unwrap_or_else(modelled);
    let small = fused_bytes(layout, group, total, budget) <= most;
    has_fused_kernel(layout, group) && choice.forced.unwrap_or(small)
}

impl Call<'_> {
    /// Scores, selects and attends in one launch, for the tiles that are small enough.
    pub(super) fn fused(
        &self,
        scratch: &mut Scratch,
        plan: &Layout,
        placed: Placed,
        (out, states): (Arg, Arg),
    ) -> Result<(), CudaError> {
        if plan.fused.is_empty() {
            return Ok(());
        }
        let (device, heads) = (self.device, self.heads);
        let fused = scratch.fused.send(device, &plan.fused)?;
        let bytes = 4 * plan.fused.len() * heads.kv_heads * plan.most_fused_pages;
        let scores = grown(&mut scratch.fused_scores, device, bytes, "page scores")?.arg();
        let kernel = fused_kernel(self.pages.element(), heads.head_dim, heads.group());
        let mut args = vec![
            self.qkv,
            self.pages.layer(self.layer),
            self.pages.layer_boxes(self.layer),
            placed.tables,
            placed.records,
            fused,
            placed.lists,
            scores,
            out,
            states,
            self.pages.shape(),
            Arg::count(heads.group()),
            Arg::count(heads.qkv_width()),
            Arg::Number(self.scale),
            Arg::count(plan.most_fused_pages),
        ];
        // It has the boxes already.
        args.extend(self.code_args().skip(1));
        let shared = u32::try_from(4 * heads.group() * heads.head_dim).unwrap_or(u32::MAX);
        let grid = (plan.fused.len(), heads.kv_heads, 1);
        let shape = Shape { shared, ..Shape::new(grid, SELECT_THREADS) };
        // SAFETY: `plan` was laid out for these pages, and the buffers are as large as it says.
        unsafe { device.launch(kernel, shape, &args) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn more_heads_leave_less_to_share_out() {
        let table = FusedTable::DEFAULT;
        assert!(table.rows.is_sorted_by(|a, b| a.kv_heads < b.kv_heads));
        assert!(table.rows.is_sorted_by(|a, b| a.most_bytes < b.most_bytes));
        assert_eq!(table.most_bytes(3), modelled(4).most_bytes);
        assert_eq!(table.most_bytes(1000), modelled(64).most_bytes);
        // 64 KV heads leave 44 of 108 multiprocessors.
        assert_eq!(modelled(64).most_bytes, 120_000 * 108 / 44);
    }
}
