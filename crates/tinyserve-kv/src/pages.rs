//! Pages in host memory: keys, values and boxes, appended to in one pass.

use crate::memory::ZeroedMemory;
use crate::{
    GROUP_PAGES, KvElement, KvError, KvFormat, KvLayout, PageCopy, PageId, Slot, with_element,
};

/// Keys and values of one head in one page of one layer.
#[derive(Debug, Clone, Copy)]
pub struct HeadPage<'a, E> {
    /// Keys `[head_dim, page_size]`; columns beyond the sequence are garbage.
    pub keys: &'a [E],
    /// Values `[page_size, head_dim]`; rows beyond the sequence are garbage.
    pub values: &'a [E],
    page_size: usize,
}

impl<'a, E: KvElement> HeadPage<'a, E> {
    /// The key of the token at `offset`, channel by channel.
    ///
    /// # Panics
    /// When the page has no such token.
    pub fn key(&self, offset: usize) -> impl Iterator<Item = E> + use<'a, E> {
        assert!(offset < self.page_size, "offset {offset} in a page of {}", self.page_size);
        self.keys[offset..].iter().step_by(self.page_size).copied()
    }
}

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

/// Channels of a key that are rounded at a time, on the stack.
const KEY_PIECE: usize = 64;

#[derive(Debug)]
pub(crate) struct LayerPages {
    pub(crate) pages: ZeroedMemory,
    pub(crate) boxes: ZeroedMemory,
}

/// The bytes of a page pool in host memory.
///
/// Boxes have the element type of the keys: the minimum of stored keys is a stored key, so the box
/// is exact.
#[derive(Debug)]
pub struct HostPages {
    layout: KvLayout,
    capacity: usize,
    pub(crate) layers: Vec<LayerPages>,
}

impl HostPages {
    /// Memory for `capacity` pages; nothing is touched before it is written.
    ///
    /// # Errors
    /// When the sizes overflow or the system refuses the memory.
    pub fn new(layout: KvLayout, capacity: usize) -> Result<Self, KvError> {
        let bytes = layout.shape().format.element_bytes();
        // The last group is whole, too: what is never written costs nothing.
        let total = |elements: usize| {
            capacity
                .checked_next_multiple_of(GROUP_PAGES)
                .and_then(|pages| elements.checked_mul(bytes)?.checked_mul(pages))
                .ok_or_else(|| KvError::Invalid {
                    what: "KV pool",
                    found: format!("{capacity} pages"),
                    expected: "fewer pages: their bytes overflow".to_owned(),
                })
        };
        let layers = (0..layout.shape().layers)
            .map(|_| {
                Ok(LayerPages {
                    pages: ZeroedMemory::new(total(layout.page_elements())?)?,
                    boxes: ZeroedMemory::new(total(layout.box_elements())?)?,
                })
            })
            .collect::<Result<_, KvError>>()?;
        Ok(Self { layout, capacity, layers })
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

    /// Bytes of address space; physical memory follows as pages are written.
    #[must_use]
    pub fn reserved_bytes(&self) -> usize {
        self.layers.iter().map(|layer| layer.pages.bytes() + layer.boxes.bytes()).sum()
    }

    /// Keys and values of `kv_head` in `page` of `layer`.
    ///
    /// # Panics
    /// When `E` is not the element of the layout's format, or an index is out of range.
    #[must_use]
    pub fn head<E: KvElement>(
        &self,
        layer: usize,
        page: PageId,
        kv_head: usize,
    ) -> HeadPage<'_, E> {
        self.check_access::<E>(page, kv_head);
        let start = self.layout.head_offset(page.index(), kv_head);
        let length = self.layout.head_elements();
        let both = self.layers[layer].pages.elements::<E>(start..start + 2 * length);
        let (keys, values) = both.split_at(length);
        HeadPage { keys, values, page_size: self.layout.page_size() }
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
        let start = self.layout.box_offset(group, kv_head);
        let boxes = &self.layers[layer].boxes;
        boxes.elements::<E>(start..start + self.layout.group_box_elements())
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

    /// Writes the key and value of one token and grows the box of its page in the same pass.
    ///
    /// `keys` and `values` are `[kv_heads, head_dim]`. The tokens of a page are appended in order:
    /// the one at offset 0 starts a new box, the others grow it. A channel with a NaN key has NaN
    /// in both corners of the box from then on, so that selection cannot hide it.
    ///
    /// # Panics
    /// When a slice has another length or an index is out of range.
    pub fn append(&mut self, layer: usize, slot: Slot, keys: &[f32], values: &[f32]) {
        with_element!(self.layout.shape().format, E => self.append_as::<E>(layer, slot, keys, values));
    }

    fn append_as<E: KvElement>(&mut self, layer: usize, slot: Slot, keys: &[f32], values: &[f32]) {
        let layout = self.layout;
        let dim = layout.shape().head_dim;
        assert!(slot.offset < layout.page_size(), "offset {} in a page", slot.offset);
        assert_eq!(keys.len(), layout.shape().kv_heads * dim, "keys [kv_heads, head_dim]");
        assert_eq!(values.len(), keys.len(), "values [kv_heads, head_dim]");
        self.check_page(slot.page);
        let LayerPages { pages, boxes } = &mut self.layers[layer];
        let (page, size) = (slot.page.index(), layout.page_size());
        let heads = keys.chunks_exact(dim).zip(values.chunks_exact(dim));
        for (kv_head, (key, value)) in heads.enumerate() {
            let head = layout.head_offset(page, kv_head);
            let both = pages.elements_mut::<E>(head..head + 2 * layout.head_elements());
            let (stored_keys, stored_values) = both.split_at_mut(layout.head_elements());
            E::store(value, &mut stored_values[slot.offset * dim..(slot.offset + 1) * dim]);
            let start = layout.box_offset(page / GROUP_PAGES, kv_head);
            let boxes = boxes.elements_mut::<E>(start..start + layout.group_box_elements());
            let columns = stored_keys.chunks_exact_mut(size);
            let corners = boxes.chunks_exact_mut(2 * GROUP_PAGES);
            let mut rounded = [E::zeroed(); KEY_PIECE];
            let mut places = columns.zip(corners);
            for key in key.chunks(KEY_PIECE) {
                E::store(key, &mut rounded[..key.len()]);
                for (&x, (column, corners)) in rounded[..key.len()].iter().zip(&mut places) {
                    column[slot.offset] = x;
                    let (max, min) = corners.split_at_mut(GROUP_PAGES);
                    let (max, min) = (&mut max[page % GROUP_PAGES], &mut min[page % GROUP_PAGES]);
                    // A NaN is neither above nor below, and does not go away again.
                    if slot.offset == 0 || !(x <= *max || is_nan(*max)) {
                        *max = x;
                    }
                    if slot.offset == 0 || !(x >= *min || is_nan(*min)) {
                        *min = x;
                    }
                }
            }
        }
    }

    /// Copies keys, values and boxes of a page in every layer.
    ///
    /// # Panics
    /// When a page is out of range.
    pub fn copy(&mut self, copy: PageCopy) {
        with_element!(self.layout.shape().format, E => self.copy_as::<E>(copy));
    }

    /// Keys and values of a layer.
    pub(crate) fn layer_elements_mut<E: KvElement>(&mut self, layer: usize) -> &mut [E] {
        let pages = &mut self.layers[layer].pages;
        pages.elements_mut::<E>(0..pages.bytes() / size_of::<E>())
    }

    /// Boxes of a layer.
    pub(crate) fn layer_boxes_mut<E: KvElement>(&mut self, layer: usize) -> &mut [E] {
        let boxes = &mut self.layers[layer].boxes;
        boxes.elements_mut::<E>(0..boxes.bytes() / size_of::<E>())
    }

    fn copy_as<E: KvElement>(&mut self, PageCopy { from, to }: PageCopy) {
        self.check_page(from);
        self.check_page(to);
        let layout = self.layout;
        let (from, to, length) = (from.index(), to.index(), 2 * layout.head_elements());
        for layer in &mut self.layers {
            let (pages, boxes) = (layer.pages.bytes(), layer.boxes.bytes());
            let pages = layer.pages.elements_mut::<E>(0..pages / size_of::<E>());
            let boxes = layer.boxes.elements_mut::<E>(0..boxes / size_of::<E>());
            for kv_head in 0..layout.shape().kv_heads {
                let start = layout.head_offset(from, kv_head);
                pages.copy_within(start..start + length, layout.head_offset(to, kv_head));
                let corner = |page: usize| {
                    layout.box_offset(page / GROUP_PAGES, kv_head) + page % GROUP_PAGES
                };
                for row in 0..2 * layout.shape().head_dim {
                    boxes[corner(to) + row * GROUP_PAGES] = boxes[corner(from) + row * GROUP_PAGES];
                }
            }
        }
    }

    // Ranges alone would not do: beyond a page's heads lies the next page, beyond the last page
    // lies padding.
    fn check_access<E: KvElement>(&self, page: PageId, kv_head: usize) {
        self.check_element::<E>(kv_head);
        self.check_page(page);
    }

    fn check_element<E: KvElement>(&self, kv_head: usize) {
        let format: KvFormat = self.layout.shape().format;
        assert_eq!(E::FORMAT, format, "the pages hold another element type");
        let heads = self.layout.shape().kv_heads;
        assert!(kv_head < heads, "KV head {kv_head} of {heads}");
    }

    pub(crate) fn check_page(&self, page: PageId) {
        assert!(page.index() < self.capacity, "page {} of {}", page.index(), self.capacity);
    }
}

/// Whether `x` is not a number, for any element.
fn is_nan<E: KvElement>(x: E) -> bool {
    x.partial_cmp(&x).is_none()
}
