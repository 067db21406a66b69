//! Appending to pages: keys, values and boxes in one pass, and the codes of a page that is full.

use half::f16;

#[cfg(doc)]
use crate::KvLayout;
use crate::codes::seal;
use crate::open::OpenPlaces;
use crate::{GROUP_PAGES, HostPages, KvElement, Slot, with_elements};

/// Channels of a key that are rounded at a time, on the stack.
const KEY_PIECE: usize = 64;

/// Keys and values of one token, `[kv_heads, head_dim]` each, and where they go.
#[derive(Debug, Clone, Copy)]
pub struct NewToken<'a> {
    /// Where it goes.
    pub slot: Slot,
    /// Keys of all heads.
    pub keys: &'a [f32],
    /// Values of all heads.
    pub values: &'a [f32],
}

/// One layer of pages, borrowed for several heads to be written at once.
#[derive(Debug)]
pub struct LayerMut<'a> {
    /// Keys and values of whole groups: [`KvLayout::head_range`] says where those of a head lie.
    pub pages: &'a mut [u8],
    /// Boxes of whole groups: [`KvLayout::box_offset`] says where those of a head begin, in
    /// elements.
    pub boxes: &'a mut [u8],
    /// Keys and values of open pages in [`KvLayout::open_format`], where the format has codes.
    pub open: &'a mut [u8],
    /// Where the layer's open pages lie in them.
    pub places: OpenPlaces<'a>,
}

impl HostPages {
    /// Has `write` do for the tokens that go to `slots` what [`Self::append_tokens`] does: keys,
    /// values, boxes, and the codes of pages that they fill.
    ///
    /// # Panics
    /// When an index is out of range, or a page is sealed already.
    pub fn write_tokens(&mut self, layer: usize, slots: &[Slot], write: impl FnOnce(LayerMut<'_>)) {
        let shape = self.layout.shape();
        let quantised = shape.format.is_quantised();
        assert!(layer < shape.layers, "layer {layer}");
        self.open.close_full();
        for slot in slots {
            assert!(slot.offset < shape.page_size, "offset {} in a page", slot.offset);
            self.check_page(slot.page);
            self.forget_summaries(slot.page, Some(layer));
            if quantised && slot.offset == 0 {
                self.open.open(layer, slot.page);
            }
            assert!(
                !quantised || self.open.has(layer, slot.page),
                "page {} of layer {layer} is sealed",
                slot.page.index()
            );
        }
        let pages = layer * self.layer_bytes()..(layer + 1) * self.layer_bytes();
        let element = shape.format.element_bytes();
        let boxes = self.layer_box_elements() * element;
        let (open, places) = self.open.layer_mut(layer, shape.kv_heads);
        let (pages, boxes) = (
            self.pages.elements_mut(pages),
            self.boxes.elements_mut(layer * boxes..(layer + 1) * boxes),
        );
        write(LayerMut { pages, boxes, open, places });
        for slot in slots.iter().filter(|slot| quantised && slot.offset + 1 == shape.page_size) {
            self.open.fill(layer, slot.page);
        }
    }

    /// Writes the key and value of one token and grows the box of its page in the same pass.
    ///
    /// `keys` and `values` are `[kv_heads, head_dim]`. The tokens of a page are appended in order:
    /// the one at offset 0 starts a new box, the others grow it. A channel with a NaN key has NaN
    /// in both corners of the box from then on, so that selection cannot hide it.
    ///
    /// Where the format has codes, the token that fills a page seals it: its codes and its final
    /// box are written together. Keys and values beyond ±65,504 saturate there, whatever open pages
    /// are in: boxes are in f16.
    ///
    /// # Panics
    /// When a slice has another length, an index is out of range, or the page is sealed already.
    pub fn append(&mut self, layer: usize, slot: Slot, keys: &[f32], values: &[f32]) {
        self.append_tokens(layer, [NewToken { slot, keys, values }]);
    }

    /// [`Self::append`] for the tokens of one step, in order.
    ///
    /// Where the format has codes, pages that this fills are still there as they were appended,
    /// for [`Self::head`], until keys are appended again.
    ///
    /// # Panics
    /// As [`Self::append`].
    pub fn append_tokens<'a>(
        &mut self,
        layer: usize,
        tokens: impl IntoIterator<Item = NewToken<'a>>,
    ) {
        self.open.close_full();
        with_elements!(self.layout, (E, O) => {
            for token in tokens {
                self.append_as::<E, O>(layer, token);
            }
        });
    }

    fn append_as<E: KvElement, O: KvElement>(&mut self, layer: usize, token: NewToken<'_>) {
        let NewToken { slot, keys, values } = token;
        let layout = self.layout;
        let (dim, size) = (layout.shape().head_dim, layout.page_size());
        assert!(slot.offset < size, "offset {} in a page", slot.offset);
        assert_eq!(keys.len(), layout.shape().kv_heads * dim, "keys [kv_heads, head_dim]");
        assert_eq!(values.len(), keys.len(), "values [kv_heads, head_dim]");
        self.check_page(slot.page);
        self.forget_summaries(slot.page, Some(layer));
        let quantised = layout.shape().format.is_quantised();
        let store = if quantised { O::store_open } else { O::store };
        if quantised && slot.offset == 0 {
            self.open.open(layer, slot.page);
        }
        let (first, first_box) = (layer * self.layer_bytes(), layer * self.layer_box_elements());
        let page = slot.page.index();
        let heads = keys.chunks_exact(dim).zip(values.chunks_exact(dim));
        for (kv_head, (key, value)) in heads.enumerate() {
            let both: &mut [O] = if quantised {
                let open = self.open.get_mut(layer, slot.page);
                let Some(open) = open else { panic!("page {page} of layer {layer} is sealed") };
                let length = 2 * layout.head_elements();
                &mut open[kv_head * length..(kv_head + 1) * length]
            } else {
                let bytes = layout.head_range(page, kv_head);
                let bytes = first + bytes.start..first + bytes.end;
                bytemuck::cast_slice_mut(self.pages.elements_mut::<u8>(bytes))
            };
            let (stored_keys, stored_values) = both.split_at_mut(layout.head_elements());
            store(value, &mut stored_values[slot.offset * dim..(slot.offset + 1) * dim]);
            let start = first_box + layout.box_offset(page / GROUP_PAGES, kv_head);
            let boxes = self.boxes.elements_mut::<E>(start..start + layout.group_box_elements());
            let columns = stored_keys.chunks_exact_mut(size);
            let corners = boxes.chunks_exact_mut(2 * GROUP_PAGES);
            let mut rounded = [O::zeroed(); KEY_PIECE];
            let mut places = columns.zip(corners);
            for key in key.chunks(KEY_PIECE) {
                store(key, &mut rounded[..key.len()]);
                for (&x, (column, corners)) in rounded[..key.len()].iter().zip(&mut places) {
                    column[slot.offset] = x;
                    let (max, min) = corners.split_at_mut(GROUP_PAGES);
                    let (max, min) = (&mut max[page % GROUP_PAGES], &mut min[page % GROUP_PAGES]);
                    let (above, below) = (E::at_least(x.to_f32()), E::at_most(x.to_f32()));
                    // A NaN is neither above nor below, and does not go away again.
                    if slot.offset == 0 || !(above <= *max || is_nan(*max)) {
                        *max = above;
                    }
                    if slot.offset == 0 || !(below >= *min || is_nan(*min)) {
                        *min = below;
                    }
                }
            }
        }
        if quantised && slot.offset + 1 == size {
            self.seal::<O>(layer, slot);
        }
    }

    /// Turns a full page into codes.
    fn seal<O: KvElement>(&mut self, layer: usize, slot: Slot) {
        let layout = self.layout;
        let (first, first_box) = (layer * self.layer_bytes(), layer * self.layer_box_elements());
        let Self { pages, boxes, open, wide, .. } = self;
        let (Some(codes), Some(elements)) = (layout.codes(), open.get::<O>(layer, slot.page))
        else {
            return;
        };
        let page = slot.page.index();
        for (kv_head, both) in elements.chunks_exact(2 * layout.head_elements()).enumerate() {
            let bytes = layout.head_range(page, kv_head);
            let out = pages.elements_mut::<u8>(first + bytes.start..first + bytes.end);
            let start = first_box + layout.box_offset(page / GROUP_PAGES, kv_head);
            let boxes = boxes.elements_mut::<f16>(start..start + layout.group_box_elements());
            let both = both.split_at(layout.head_elements());
            seal(codes, both, out, wide, |channel, min, max| {
                let row = 2 * channel * GROUP_PAGES + page % GROUP_PAGES;
                (boxes[row], boxes[row + GROUP_PAGES]) = (max, min);
            });
        }
        open.fill(layer, slot.page);
    }
}

/// Whether `x` is not a number, for any element.
fn is_nan<E: KvElement>(x: E) -> bool {
    x.partial_cmp(&x).is_none()
}
