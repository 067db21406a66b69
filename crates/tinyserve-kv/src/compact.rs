//! Moving tokens together after some were pruned.

use crate::{GROUP_PAGES, HostPages, KvElement, PageId, TokenMove, with_element};

impl HostPages {
    /// Moves keys and values of tokens in every layer, in order, and rebuilds the boxes of the
    /// pages that they reach from the keys that these hold then, up to the last one that came.
    ///
    /// Keys are stored rotated, so a key says the same in another place.
    ///
    /// # Panics
    /// When a slot is out of range, or the format has codes: those of a page share its box.
    pub fn move_tokens(&mut self, moves: &[TokenMove]) {
        with_element!(self.layout().shape().format, E => self.move_tokens_as::<E>(moves));
    }

    fn move_tokens_as<E: KvElement>(&mut self, moves: &[TokenMove]) {
        let layout = *self.layout();
        let (dim, size) = (layout.shape().head_dim, layout.page_size());
        for slot in moves.iter().flat_map(|it| [it.from, it.to]) {
            assert!(slot.offset < size, "offset {} in a page", slot.offset);
            assert!(slot.page.index() < self.capacity(), "page {}", slot.page.index());
        }
        for reached in moves.chunk_by(|a, b| a.to.page == b.to.page) {
            self.forget_summaries(reached[0].to.page, None);
        }
        for layer in 0..layout.shape().layers {
            for kv_head in 0..layout.shape().kv_heads {
                let pages = self.layer_elements_mut::<E>(layer);
                for TokenMove { from, to } in moves {
                    let [from_head, to_head] =
                        [from, to].map(|slot| layout.head_offset(slot.page.index(), kv_head));
                    for channel in 0..dim {
                        pages[to_head + channel * size + to.offset] =
                            pages[from_head + channel * size + from.offset];
                    }
                    let from_value = from_head + layout.head_elements() + from.offset * dim;
                    let to_value = to_head + layout.head_elements() + to.offset * dim;
                    pages.copy_within(from_value..from_value + dim, to_value);
                }
                for reached in moves.chunk_by(|a, b| a.to.page == b.to.page) {
                    let page = reached[0].to.page;
                    let tokens = 1 + reached.iter().map(|it| it.to.offset).max().unwrap_or(0);
                    self.rebuild_box::<E>(layer, page, kv_head, tokens);
                }
            }
        }
    }

    /// Makes the box of a page that of its first `tokens` keys.
    fn rebuild_box<E: KvElement>(
        &mut self,
        layer: usize,
        page: PageId,
        kv_head: usize,
        tokens: usize,
    ) {
        let layout = *self.layout();
        for channel in 0..layout.shape().head_dim {
            let keys = &self.head::<E>(layer, page, kv_head).keys[channel * layout.page_size()..];
            let (mut max, mut min) = (keys[0], keys[0]);
            for &key in &keys[1..tokens] {
                // A NaN is neither above nor below, and does not go away again.
                if !(key <= max || max.partial_cmp(&max).is_none()) {
                    max = key;
                }
                if !(key >= min || min.partial_cmp(&min).is_none()) {
                    min = key;
                }
            }
            let group = layout.box_offset(page.index() / GROUP_PAGES, kv_head);
            let row = group + 2 * channel * GROUP_PAGES + page.index() % GROUP_PAGES;
            let boxes = self.layer_boxes_mut::<E>(layer);
            boxes[row] = max;
            boxes[row + GROUP_PAGES] = min;
        }
    }
}
