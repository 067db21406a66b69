//! Pages in host memory: keys, values and boxes, appended to in one pass.

use crate::memory::ZeroedMemory;
use crate::{KvElement, KvError, KvFormat, KvLayout, PageCopy, PageId, Slot, with_element};

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
    /// Channel-wise minimum `[head_dim]`.
    pub min: &'a [E],
    /// Channel-wise maximum `[head_dim]`.
    pub max: &'a [E],
}

#[derive(Debug)]
struct LayerPages {
    pages: ZeroedMemory,
    boxes: ZeroedMemory,
}

/// The bytes of a page pool in host memory.
///
/// Boxes have the element type of the keys: the minimum of stored keys is a stored key, so the box
/// is exact.
#[derive(Debug)]
pub struct HostPages {
    layout: KvLayout,
    capacity: usize,
    layers: Vec<LayerPages>,
}

impl HostPages {
    /// Memory for `capacity` pages; nothing is touched before it is written.
    ///
    /// # Errors
    /// When the sizes overflow or the system refuses the memory.
    pub fn new(layout: KvLayout, capacity: usize) -> Result<Self, KvError> {
        let bytes = layout.shape().format.element_bytes();
        let total = |elements: usize| {
            elements.checked_mul(bytes).and_then(|page| page.checked_mul(capacity)).ok_or_else(
                || KvError::Invalid {
                    what: "KV pool",
                    found: format!("{capacity} pages"),
                    expected: "fewer pages: their bytes overflow".to_owned(),
                },
            )
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
        let start = page.index() * self.layout.page_elements() + self.layout.head_offset(kv_head);
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
        let start = page.index() * self.layout.box_elements() + self.layout.box_offset(kv_head);
        let length = self.layout.shape().head_dim;
        let both = self.layers[layer].boxes.elements::<E>(start..start + 2 * length);
        let (min, max) = both.split_at(length);
        PageBox { min, max }
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
                let PageBox { min, max } = self.page_box::<E>(layer, page, kv_head);
                out.extend(min.iter().chain(max).map(|&x| KvElement::to_f32(x)));
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
        let page = slot.page.index();
        let page_start = page * layout.page_elements();
        let pages = pages.elements_mut::<E>(page_start..page_start + layout.page_elements());
        let box_start = page * layout.box_elements();
        let boxes = boxes.elements_mut::<E>(box_start..box_start + layout.box_elements());
        let heads = keys.chunks_exact(dim).zip(values.chunks_exact(dim));
        for (kv_head, (key, value)) in heads.enumerate() {
            let head = layout.head_offset(kv_head);
            let (stored_keys, stored_values) =
                pages[head..head + 2 * layout.head_elements()].split_at_mut(layout.head_elements());
            let corner = layout.box_offset(kv_head);
            let (min, max) = boxes[corner..corner + 2 * dim].split_at_mut(dim);
            let fresh = slot.offset == 0;
            for channel in 0..dim {
                let stored = E::from_f32(key[channel]);
                stored_keys[channel * layout.page_size() + slot.offset] = stored;
                let x = stored.to_f32();
                if fresh || x < min[channel].to_f32() || x.is_nan() {
                    min[channel] = stored;
                }
                if fresh || x > max[channel].to_f32() || x.is_nan() {
                    max[channel] = stored;
                }
            }
            let row = &mut stored_values[slot.offset * dim..(slot.offset + 1) * dim];
            for (stored, &x) in row.iter_mut().zip(value) {
                *stored = E::from_f32(x);
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

    fn copy_as<E: KvElement>(&mut self, PageCopy { from, to }: PageCopy) {
        for layer in &mut self.layers {
            for (bytes, length) in [
                (&mut layer.pages, self.layout.page_elements()),
                (&mut layer.boxes, self.layout.box_elements()),
            ] {
                let all = bytes.elements_mut::<E>(0..self.capacity * length);
                let start = from.index() * length;
                all.copy_within(start..start + length, to.index() * length);
            }
        }
    }

    // Ranges alone would not do: beyond a page's heads lies the next page, beyond the last page
    // lies padding.
    fn check_access<E: KvElement>(&self, page: PageId, kv_head: usize) {
        let format: KvFormat = self.layout.shape().format;
        assert_eq!(E::FORMAT, format, "the pages hold another element type");
        let heads = self.layout.shape().kv_heads;
        assert!(kv_head < heads, "KV head {kv_head} of {heads}");
        self.check_page(page);
    }

    fn check_page(&self, page: PageId) {
        assert!(page.index() < self.capacity, "page {} of {}", page.index(), self.capacity);
    }
}
