//! Pages in host memory: keys, values and boxes, appended to in one pass.

use crate::memory::ZeroedMemory;
use crate::open::OpenPages;
use crate::summaries::Summaries;
use crate::{
    GROUP_PAGES, HeadPage, KvElement, KvError, KvLayout, PageCopy, PageId, PagePool, with_element,
};

/// The bounding box of the keys of one head in one page: channel-wise minimum and maximum.
#[derive(Debug, Clone, Copy)]
pub struct PageBox<'a, E> {
    /// Boxes of the page's group `[head_dim, 2 (max, min), GROUP_PAGES]`, from the page's own on.
    boxes: &'a [E],
}

impl<'a, E: KvElement> PageBox<'a, E> {
    /// Channel-wise maximum, channel by channel.
    pub fn max(&self) -> impl Iterator<Item = E> + use<'a, E> {
        self.boxes.iter().step_by(2 * GROUP_PAGES).copied()
    }

    /// Channel-wise minimum, channel by channel.
    pub fn min(&self) -> impl Iterator<Item = E> + use<'a, E> {
        self.boxes[GROUP_PAGES..].iter().step_by(2 * GROUP_PAGES).copied()
    }
}

/// The bytes of a page pool in host memory.
///
/// Boxes have the element type of the keys as they were appended: the minimum of stored keys is a
/// stored key, so the box is exact. Only boxes of open pages in f32 that become codes are in f16,
/// and rounded outwards.
#[derive(Debug)]
pub struct HostPages {
    pub(crate) layout: KvLayout,
    capacity: usize,
    /// Keys and values `[layers]` of whole groups.
    pub(crate) pages: ZeroedMemory,
    /// Boxes `[layers]` of whole groups.
    pub(crate) boxes: ZeroedMemory,
    /// What scorers keep of pages beside their boxes.
    pub(crate) summaries: Summaries,
    /// Pages without codes, where the format has codes.
    pub(crate) open: OpenPages,
    /// What sealing a page computes with.
    pub(crate) wide: Vec<f32>,
}

impl HostPages {
    /// Memory for `capacity` pages; nothing is touched before it is written.
    ///
    /// # Errors
    /// When the sizes overflow or the system refuses the memory.
    pub fn new(layout: KvLayout, capacity: usize) -> Result<Self, KvError> {
        let shape = layout.shape();
        // The last group is whole, too: what is never written costs nothing ...
        let total = |bytes_per_page: usize| {
            capacity
                .checked_next_multiple_of(GROUP_PAGES)
                .and_then(|pages| bytes_per_page.checked_mul(pages))
                .ok_or_else(|| KvError::Invalid {
                    what: "KV pool",
                    found: format!("{capacity} pages"),
                    expected: "fewer pages: their bytes overflow".to_owned(),
                })
        };
        let boxes = layout.box_bytes_per_page();
        let opens = if shape.format.is_quantised() { shape.layers } else { 0 };
        let mut pages = ZeroedMemory::new(total(layout.bytes_per_page() - boxes)?)?;
        if !capacity.is_multiple_of(GROUP_PAGES) && shape.layers > 0 {
            // ... unless it shares a huge page with what is.
            let layer = pages.bytes() / shape.layers;
            let group = layer / capacity.div_ceil(GROUP_PAGES).max(1);
            for end in (1..=shape.layers).map(|layers| layers * layer) {
                pages.commit_finely(end - group..end);
            }
        }
        Ok(Self {
            layout,
            capacity,
            pages,
            boxes: ZeroedMemory::new(total(boxes)?)?,
            summaries: Summaries::new(),
            open: OpenPages::new(opens, capacity, layout.open_page_bytes()),
            wide: Vec::new(),
        })
    }

    /// The layout of each page.
    #[must_use]
    pub fn layout(&self) -> &KvLayout {
        &self.layout
    }

    /// Pages that there is memory for.
    #[must_use]
    pub fn capacity(&self) -> usize {
        self.capacity
    }

    /// Bytes of address space for pages and boxes; physical memory follows as pages are written.
    #[must_use]
    pub fn reserved_bytes(&self) -> usize {
        self.pages.bytes() + self.boxes.bytes()
    }

    /// Bytes of the pages that hold no codes yet, where the format has codes.
    #[must_use]
    pub fn open_bytes(&self) -> usize {
        self.open.bytes()
    }

    /// Keys and values of `kv_head` in `page` of `layer` without codes: of any page where the
    /// format has none, else of an open page, or of one that was filled when keys were appended
    /// last.
    ///
    /// # Panics
    /// When `E` is not the element of the layout's [`KvLayout::open_format`], an index is out of
    /// range, or the page holds codes.
    #[must_use]
    pub fn head<E: KvElement>(
        &self,
        layer: usize,
        page: PageId,
        kv_head: usize,
    ) -> HeadPage<'_, E> {
        let format = self.layout.open_format();
        assert!(E::FORMAT == format, "the pages hold another element type");
        self.check_head(kv_head);
        self.check_page(page);
        if !self.layout.shape().format.is_quantised() {
            return self.head_pages(layer, kv_head).get(page);
        }
        let Some(open) = self.open.get::<E>(layer, page) else {
            panic!("page {} of layer {layer} holds codes", page.index())
        };
        let length = 2 * self.layout.head_elements();
        let both = &open[kv_head * length..(kv_head + 1) * length];
        HeadPage::new(both, self.layout.page_size())
    }

    /// The box of `kv_head` in `page` of `layer`; garbage while the page holds no token.
    ///
    /// # Panics
    /// When `E` is not the element of the layout's format, or an index is out of range.
    #[must_use]
    pub fn page_box<E: KvElement>(
        &self,
        layer: usize,
        page: PageId,
        kv_head: usize,
    ) -> PageBox<'_, E> {
        self.check_access::<E>(page, kv_head);
        let boxes = self.group_boxes::<E>(layer, page.index() / GROUP_PAGES, kv_head);
        PageBox { boxes: &boxes[page.index() % GROUP_PAGES..] }
    }

    /// The boxes of `kv_head` of a group of pages of `layer`,
    /// `[head_dim, 2 (max, min), GROUP_PAGES]`; those of pages that hold no token are garbage.
    ///
    /// # Panics
    /// When `E` is not the element of the layout's format, or an index is out of range.
    #[must_use]
    pub fn group_boxes<E: KvElement>(&self, layer: usize, group: usize, kv_head: usize) -> &[E] {
        self.check_element::<E>(kv_head);
        assert!(layer < self.layout.shape().layers, "layer {layer}");
        let start = self.layer_box_elements() * layer + self.layout.box_offset(group, kv_head);
        self.boxes.elements::<E>(start..start + self.layout.group_box_elements())
    }

    /// Widens the boxes of a sequence's pages into `out`, `[pages, 2 (min, max), head_dim]`: what
    /// [`crate::SelectFields::boxes`] takes.
    ///
    /// `out` is cleared first and keeps its memory from call to call.
    ///
    /// # Panics
    /// When an index is out of range.
    pub fn boxes_f32(&self, layer: usize, pages: &[PageId], kv_head: usize, out: &mut Vec<f32>) {
        out.clear();
        out.reserve(2 * pages.len() * self.layout.shape().head_dim);
        with_element!(self.layout.shape().format, E => {
            for &page in pages {
                let corners = self.page_box::<E>(layer, page, kv_head);
                out.extend(corners.min().chain(corners.max()).map(KvElement::to_f32));
            }
        });
    }

    /// Copies keys, values and boxes of a page in every layer.
    ///
    /// # Panics
    /// When a page is out of range.
    pub fn copy(&mut self, copy: PageCopy) {
        with_element!(self.layout.shape().format, E => self.copy_as::<E>(copy));
    }

    /// The pages of a layer, where the format has no codes.
    pub(crate) fn layer_elements_mut<E: KvElement>(&mut self, layer: usize) -> &mut [E] {
        assert_eq!(E::FORMAT, self.layout.shape().format, "the pages hold another element type");
        let length = self.layer_bytes() / size_of::<E>();
        self.pages.elements_mut(layer * length..(layer + 1) * length)
    }

    /// The boxes of a layer.
    pub(crate) fn layer_boxes_mut<E: KvElement>(&mut self, layer: usize) -> &mut [E] {
        let length = self.layer_box_elements();
        self.boxes.elements_mut(layer * length..(layer + 1) * length)
    }

    fn copy_as<E: KvElement>(&mut self, PageCopy { from, to }: PageCopy) {
        self.check_page(from);
        self.check_page(to);
        self.forget_summaries(to, None);
        let layout = self.layout;
        let (layer_bytes, layer_boxes) = (self.layer_bytes(), self.layer_box_elements());
        for layer in 0..layout.shape().layers {
            let first = layer * layer_bytes;
            let pages = self.pages.elements_mut::<u8>(first..first + layer_bytes);
            let first = layer * layer_boxes;
            let boxes = self.boxes.elements_mut::<E>(first..first + layer_boxes);
            for kv_head in 0..layout.shape().kv_heads {
                let start = layout.head_range(to.index(), kv_head).start;
                pages.copy_within(layout.head_range(from.index(), kv_head), start);
                let corner = |page: usize| {
                    layout.box_offset(page / GROUP_PAGES, kv_head) + page % GROUP_PAGES
                };
                let (from, to) = (corner(from.index()), corner(to.index()));
                for row in 0..2 * layout.shape().head_dim {
                    boxes[to + row * GROUP_PAGES] = boxes[from + row * GROUP_PAGES];
                }
            }
            if layout.shape().format.is_quantised() {
                self.open.copy(layer, from, to);
            }
        }
    }

    /// Lets go of what is kept of open pages that nobody holds any more: a sequence may end before
    /// its last page is full. Nothing is kept where the format has no codes.
    pub fn forget_free(&mut self, pool: &PagePool) {
        self.open.retain(|page| pool.holders(page) > 0);
    }

    /// Bytes of the pages of one layer.
    pub(crate) fn layer_bytes(&self) -> usize {
        self.pages.bytes() / self.layout.shape().layers
    }

    /// Elements of the boxes of one layer.
    pub(crate) fn layer_box_elements(&self) -> usize {
        self.capacity.next_multiple_of(GROUP_PAGES) * self.layout.box_elements()
    }

    // Ranges alone would not do: beyond a page's heads lies the next page, beyond the last page
    // lies padding.
    fn check_access<E: KvElement>(&self, page: PageId, kv_head: usize) {
        self.check_element::<E>(kv_head);
        self.check_page(page);
    }

    pub(crate) fn check_element<E: KvElement>(&self, kv_head: usize) {
        let format = self.layout.shape().format;
        assert!(E::is_element_of(format), "the pages hold another element type");
        self.check_head(kv_head);
    }

    pub(crate) fn check_head(&self, kv_head: usize) {
        let heads = self.layout.shape().kv_heads;
        assert!(kv_head < heads, "KV head {kv_head} of {heads}");
    }

    pub(crate) fn check_page(&self, page: PageId) {
        assert!(page.index() < self.capacity, "page {} of {}", page.index(), self.capacity);
    }
}

#[cfg(all(test, target_os = "linux"))]
mod tests {
    use half::f16;

    use super::*;
    use crate::{KvFormat, KvShape};

    #[test]
    fn a_group_that_is_not_whole_takes_what_is_written() {
        let resident_pages = || -> usize {
            let text = std::fs::read_to_string("/proc/self/statm").unwrap();
            text.split_whitespace().nth(1).unwrap().parse().unwrap()
        };
        let shape = KvShape {
            layers: 24,
            kv_heads: 16,
            head_dim: 64,
            page_size: 16,
            format: KvFormat::F16,
        };
        let layout = KvLayout::new(shape).unwrap();
        let mut pages = HostPages::new(layout, 3).unwrap();
        let before = resident_pages();
        for layer in 0..shape.layers {
            let start = layer * pages.layer_bytes() / size_of::<f16>();
            for kv_head in 0..shape.kv_heads {
                let at = start + layout.head_offset(0, kv_head);
                let both = pages.pages.elements_mut::<f16>(at..at + 2 * layout.head_elements());
                both.fill(f16::ONE);
            }
        }
        let growth = resident_pages().saturating_sub(before);
        // A page is 1.5 MiB, its group, on huge pages, 96 MiB; other tests touch memory, too.
        assert!(growth < 8_192, "{growth} pages became resident");
    }
}
