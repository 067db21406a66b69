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

/// Up to how much reading one launch takes the place of four, where no file says: see
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

impl FusedTable {
    /// The table that is in use unless another is measured: what
    /// [`Cuda::time_fused`](crate::Cuda::time_fused) found on one device, in
    /// docs/benchmarks/2026-11-26-gpu-fused.json.
    pub const DEFAULT: Self = Self {
        rows: &[
            FusedRow { kv_heads: 4, most_bytes: 0 },
            FusedRow { kv_heads: 6, most_bytes: 6144 },
            FusedRow { kv_heads: 12, most_bytes: 0 },
            FusedRow { kv_heads: 16, most_bytes: 0 },
        ],
        source: "measured on an NVIDIA H200 with f16 pages of 16 tokens, where several launches in \
                 a graph were as fast but for the smallest lists",
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
    fn the_last_row_is_for_all_that_have_more_heads() {
        let table = FusedTable {
            rows: &[
                FusedRow { kv_heads: 2, most_bytes: 1 },
                FusedRow { kv_heads: 4, most_bytes: 2 },
            ],
            source: "made up",
        };
        assert_eq!([1, 2, 3, 4, 1000].map(|n| table.most_bytes(n)), [1, 1, 2, 2, 2]);
        assert!(FusedTable::DEFAULT.rows.is_sorted_by(|a, b| a.kv_heads < b.kv_heads));
    }
}
