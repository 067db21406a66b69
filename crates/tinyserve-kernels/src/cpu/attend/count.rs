//! What a unit reads, counted.

use tinyserve_kv::{PageSelector, ScoreCost};

use super::tile::PageList;
use super::{Context, Unit};
use crate::cpu::select::Chosen;
use crate::{AttendStats, Attention};

impl Context<'_> {
    /// Pages and bytes that the rows of `unit` read.
    pub(super) fn count(&self, unit: &Unit, list: PageList<'_>, chosen: Chosen) -> AttendStats {
        let layout = self.pages.layout();
        let (size, shape) = (layout.page_size(), layout.shape());
        let element = shape.format.element_bytes();
        let box_bytes = 2 * self.heads.head_dim * element;
        // Tokens of the page that a row is in itself are read as they were appended.
        let open_element = layout.open_format().element_bytes();
        let (sealed_bytes, own_bytes) =
            (2 * layout.token_head_bytes(), 2 * self.heads.head_dim * open_element);
        let mut stats = AttendStats::default();
        for i in 0..unit.rows.len() {
            let tokens = unit.first_visible + i;
            let pages = layout.pages_for(tokens);
            let own = tokens - (pages - 1) * size;
            let (seen, own_read) = match list {
                // What a later row of the tile sees is not counted for this one.
                PageList::All(_) => (pages, true),
                // Only the sequence's last page may be partial.
                PageList::These(list) => {
                    (list.len(), list.last().is_some_and(|&last| last as usize + 1 == pages))
                }
            };
            let sealed = seen - usize::from(own_read);
            let cost = ScoreCost {
                tokens,
                pages,
                budget: seen,
                page_size: size,
                queries: self.heads.group(),
                head_dim: self.heads.head_dim,
                vector_bytes: self.heads.head_dim * element,
            };
            let head = (self.layer, unit.kv_head);
            let scored = match self.sequences[unit.sequence].attention {
                _ if chosen == Chosen::Everything => 0,
                Attention::Policy(policy) => policy.bytes_read(head, &cost),
                Attention::Custom(selector) => selector.bytes_read(head, &cost),
                Attention::Dense => 0,
            };
            // Codes mean nothing without their box, whatever was read to choose them.
            let (boxes, dense_boxes) = if shape.format.is_quantised() {
                (sealed * box_bytes + scored, (pages - 1) * box_bytes)
            } else {
                (scored, 0)
            };
            let bytes = |sealed: usize, own_read: bool| {
                sealed * size * sealed_bytes + if own_read { own * own_bytes } else { 0 }
            };
            stats.pages_read += seen as u64;
            stats.pages_total += pages as u64;
            stats.bytes_read += (bytes(sealed, own_read) + boxes) as u64;
            stats.bytes_dense += (bytes(pages - 1, true) + dense_boxes) as u64;
        }
        stats
    }
}
