//! Full pages as bytes, to be kept elsewhere and put back.

use crate::{GROUP_PAGES, HostPages, KvElement, PageId, with_element};

impl HostPages {
    /// Appends the bytes of a full page to `out`: for each layer, for each KV head, what the layout
    /// keeps of its keys and values, then for each head its box, `[head_dim, 2 (max, min)]`. They
    /// are [`crate::KvLayout::bytes_per_page`] bytes, little endian, and the same wherever the page
    /// lies.
    ///
    /// # Panics
    /// When the page is out of range.
    pub fn read_page(&self, page: PageId, out: &mut Vec<u8>) {
        self.check_page(page);
        out.reserve(self.layout().bytes_per_page());
        with_element!(self.layout().shape().format, E => self.read_page_as::<E>(page, out));
    }

    fn read_page_as<E: KvElement>(&self, page: PageId, out: &mut Vec<u8>) {
        let layout = *self.layout();
        for layer in 0..layout.shape().layers {
            let pages = self.layer_bytes() * layer;
            for kv_head in 0..layout.shape().kv_heads {
                let head = layout.head_range(page.index(), kv_head);
                let head = pages + head.start..pages + head.end;
                out.extend_from_slice(self.pages.elements::<u8>(head));
            }
            for kv_head in 0..layout.shape().kv_heads {
                let boxes = self.group_boxes::<E>(layer, page.index() / GROUP_PAGES, kv_head);
                let own = boxes.iter().skip(page.index() % GROUP_PAGES).step_by(GROUP_PAGES);
                own.for_each(|corner| out.extend_from_slice(bytemuck::bytes_of(corner)));
            }
        }
    }

    /// Puts a full page back that [`Self::read_page`] wrote.
    ///
    /// # Panics
    /// When the page is out of range or `bytes` has another length.
    pub fn write_page(&mut self, page: PageId, bytes: &[u8]) {
        self.check_page(page);
        assert_eq!(bytes.len(), self.layout().bytes_per_page(), "bytes of a page");
        self.forget_summaries(page, None);
        with_element!(self.layout().shape().format, E => self.write_page_as::<E>(page, bytes));
    }

    fn write_page_as<E: KvElement>(&mut self, page: PageId, mut bytes: &[u8]) {
        let layout = *self.layout();
        let (layer_bytes, layer_boxes) = (self.layer_bytes(), self.layer_box_elements());
        for layer in 0..layout.shape().layers {
            for kv_head in 0..layout.shape().kv_heads {
                let head = layout.head_range(page.index(), kv_head);
                let head = layer * layer_bytes + head.start..layer * layer_bytes + head.end;
                let head = self.pages.elements_mut::<u8>(head);
                head.copy_from_slice(take(&mut bytes, head.len()));
            }
            for kv_head in 0..layout.shape().kv_heads {
                let start = layer * layer_boxes;
                let start = start + layout.box_offset(page.index() / GROUP_PAGES, kv_head);
                let group = start..start + layout.group_box_elements();
                let boxes = self.boxes.elements_mut::<E>(group);
                let own = boxes.iter_mut().skip(page.index() % GROUP_PAGES).step_by(GROUP_PAGES);
                for corner in own {
                    let stored = take(&mut bytes, size_of::<E>());
                    bytemuck::bytes_of_mut(corner).copy_from_slice(stored);
                }
            }
            if layout.shape().format.is_quantised() {
                self.open.close_page(layer, page);
            }
        }
    }
}

/// Splits the next `length` bytes off.
fn take<'a>(bytes: &mut &'a [u8], length: usize) -> &'a [u8] {
    let (taken, rest) = bytes.split_at(length);
    *bytes = rest;
    taken
}
