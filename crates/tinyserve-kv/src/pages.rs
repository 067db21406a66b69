//! Pages in host memory: keys, values and boxes, appended to in one pass.

use std::ops::Range;

use bytemuck::Zeroable;

use crate::{KvElement, KvError, KvFormat, KvLayout, PageCopy, PageId, Slot, with_element};

/// One cache line; the unit of allocation, so that every page starts aligned for any vector load.
#[derive(Debug, Clone, Copy, Zeroable, bytemuck::Pod)]
#[repr(C, align(64))]
struct Line([u8; 64]);

/// Zeroed memory that the system commits when it is first touched.
#[derive(Debug)]
struct AlignedBytes {
    lines: Vec<Line>,
    bytes: usize,
}

impl AlignedBytes {
    fn new(bytes: usize) -> Result<Self, KvError> {
        let lines = bytemuck::allocation::try_zeroed_vec(bytes.div_ceil(64)).map_err(|()| {
            KvError::Invalid {
                what: "KV pool",
                found: format!("{bytes} bytes per layer, which the system refuses"),
                expected: "fewer pages, a shorter context or a smaller kv_cache_dtype".to_owned(),
            }
        })?;
        Ok(Self { lines, bytes })
    }

    fn elements<E: KvElement>(&self, range: Range<usize>) -> &[E] {
        &bytemuck::cast_slice(&self.lines)[range]
    }

    fn elements_mut<E: KvElement>(&mut self, range: Range<usize>) -> &mut [E] {
        &mut bytemuck::cast_slice_mut(&mut self.lines)[range]
    }
}

/// Keys, values and box of one head in one page of one layer.
#[derive(Debug, Clone, Copy)]
pub struct HeadPage<'a, E> {
    /// Keys `[page_size, head_dim]`; rows beyond the sequence are garbage.
    pub keys: &'a [E],
    /// Values `[page_size, head_dim]`; rows beyond the sequence are garbage.
    pub values: &'a [E],
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
    pages: AlignedBytes,
    boxes: AlignedBytes,
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
                    pages: AlignedBytes::new(total(layout.page_elements())?)?,
                    boxes: AlignedBytes::new(total(layout.box_elements())?)?,
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
        self.layers.iter().map(|layer| layer.pages.bytes + layer.boxes.bytes).sum()
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
        self.check_element::<E>();
        let start = page.index() * self.layout.page_elements() + self.layout.head_offset(kv_head);
        let length = self.layout.head_elements();
        let both = self.layers[layer].pages.elements::<E>(start..start + 2 * length);
        let (keys, values) = both.split_at(length);
        HeadPage { keys, values }
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
        self.check_element::<E>();
        let start = page.index() * self.layout.box_elements() + self.layout.box_offset(kv_head);
        let length = self.layout.shape().head_dim;
        let both = self.layers[layer].boxes.elements::<E>(start..start + 2 * length);
        let (min, max) = both.split_at(length);
        PageBox { min, max }
    }

    /// Writes the key and value of one token and grows the box of its page in the same pass.
    ///
    /// `keys` and `values` are `[kv_heads, head_dim]`. The token at offset 0 starts a new box.
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
        let LayerPages { pages, boxes } = &mut self.layers[layer];
        let page = slot.page.index();
        let page_start = page * layout.page_elements();
        let pages = pages.elements_mut::<E>(page_start..page_start + layout.page_elements());
        let box_start = page * layout.box_elements();
        let boxes = boxes.elements_mut::<E>(box_start..box_start + layout.box_elements());
        let heads = keys.chunks_exact(dim).zip(values.chunks_exact(dim));
        for (kv_head, (key, value)) in heads.enumerate() {
            let row = layout.head_offset(kv_head) + slot.offset * dim;
            let stored_key = &mut pages[row..row + dim];
            let corner = layout.box_offset(kv_head);
            let (min, max) = boxes[corner..corner + 2 * dim].split_at_mut(dim);
            let fresh = slot.offset == 0;
            for channel in 0..dim {
                let stored = E::from_f32(key[channel]);
                stored_key[channel] = stored;
                if fresh || stored.to_f32() < min[channel].to_f32() {
                    min[channel] = stored;
                }
                if fresh || stored.to_f32() > max[channel].to_f32() {
                    max[channel] = stored;
                }
            }
            let value_row = row + layout.head_elements();
            for (stored, &x) in pages[value_row..value_row + dim].iter_mut().zip(value) {
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

    fn check_element<E: KvElement>(&self) {
        let format: KvFormat = self.layout.shape().format;
        assert_eq!(E::FORMAT, format, "the pages hold another element type");
    }
}
