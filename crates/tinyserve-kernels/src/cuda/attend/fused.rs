//! Which tiles are scored, selected for and attended to in one launch.

use super::plan::{MOST_QUERIES, Pages, Scored, TilePlan};
use crate::cuda::pages::CudaPages;

/// Up to which sizes one launch takes the place of three or four.
///
/// One block then does the work of a KV head, which saves launches and what they leave in memory
/// between them, and leaves multiprocessors idle where the work is large.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FusedLimits {
    /// Pages of the sequence, which are scored.
    pub pages: usize,
    /// Tokens of the pages that are read.
    pub tokens: usize,
    /// Where the limits come from.
    pub source: &'static str,
}

impl FusedLimits {
    /// The limits that are in use.
    pub const DEFAULT: Self =
        Self { pages: 256, tokens: 1024, source: "estimated, not measured on a GPU yet" };
}

/// Whether `tile`, of `total` pages, is done in one launch. It depends on the tile alone, so that a
/// batch changes nothing; `forced` is what the user asks for, as far as there is a kernel.
pub(super) fn is_fused(
    tile: &TilePlan,
    total: usize,
    pages: &CudaPages,
    group: usize,
    forced: Option<bool>,
) -> bool {
    let Pages::Best { scored_by: Scored::Boxes, budget, .. } = tile.pages else { return false };
    let limits = FusedLimits::DEFAULT;
    let small = total <= limits.pages && budget * pages.layout().page_size() <= limits.tokens;
    pages.is_wide() && group <= MOST_QUERIES && forced.unwrap_or(small)
}
