//! Appending to pages: keys, values and boxes in one pass, and the codes of a page that is full.

use half::f16;

use crate::codes::seal;
use crate::{GROUP_PAGES, HostPages, KvElement, Slot, with_element};

/// Channels of a key that are rounded at a time, on the stack.
const KEY_PIECE: usize = 64;
/// Tokens of a page that are appended together.
const RUN: usize = 16;

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

impl HostPages {
    /// Writes the key and value of one token and grows the box of its page in the same pass.
    ///
    /// `keys` and `values` are `[kv_heads, head_dim]`. The tokens of a page are appended in order:
    /// the one at offset 0 starts a new box, the others grow it. A channel with a NaN key has NaN
    /// in both corners of the box from then on, so that selection cannot hide it.
    ///
    /// Where the format has codes, the token that fills a page seals it: its codes and its final
    /// box are written together.
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
        with_element!(self.layout.shape().format, E => {
            let mut tokens = tokens.into_iter().peekable();
            while let Some(first) = tokens.next() {
                let (mut run, mut length) = ([first; RUN], 1);
                let follows = |length, next: &NewToken<'_>| {
                    next.slot.page == first.slot.page
                        && next.slot.offset == first.slot.offset + length
                };
                while length < RUN
                    && let Some(next) = tokens.next_if(|next| follows(length, next))
                {
                    run[length] = next;
                    length += 1;
                }
                self.append_run::<E>(layer, &run[..length]);
            }
        });
    }

    /// Appends tokens that follow each other in one page: each row of boxes, which lies far from
    /// the next one, is read and written once for all of them.
    fn append_run<E: KvElement>(&mut self, layer: usize, run: &[NewToken<'_>]) {
        let layout = self.layout;
        let (dim, size) = (layout.shape().head_dim, layout.page_size());
        let slot = run[0].slot;
        let end = slot.offset + run.len();
        assert!(end <= size, "offset {} in a page", end - 1);
        for token in run {
            assert_eq!(
                token.keys.len(),
                layout.shape().kv_heads * dim,
                "keys [kv_heads, head_dim]"
            );
            assert_eq!(token.values.len(), token.keys.len(), "values [kv_heads, head_dim]");
        }
        self.check_page(slot.page);
        let quantised = layout.shape().format.is_quantised();
        if quantised && slot.offset == 0 {
            self.open.open(layer, slot.page);
        }
        let (first, first_box) = (layer * self.layer_bytes(), layer * self.layer_box_elements());
        let page = slot.page.index();
        for kv_head in 0..layout.shape().kv_heads {
            let both: &mut [E] = if quantised {
                let open = self.open.get_mut(layer, slot.page);
                let Some(open) = open else { panic!("page {page} of layer {layer} is sealed") };
                let length = 2 * layout.head_elements();
                &mut bytemuck::cast_slice_mut(open)[kv_head * length..(kv_head + 1) * length]
            } else {
                let bytes = layout.head_range(page, kv_head);
                let bytes = first + bytes.start..first + bytes.end;
                bytemuck::cast_slice_mut(self.pages.elements_mut::<u8>(bytes))
            };
            let (stored_keys, stored_values) = both.split_at_mut(layout.head_elements());
            let head = kv_head * dim..(kv_head + 1) * dim;
            let rows = stored_values[slot.offset * dim..end * dim].chunks_exact_mut(dim);
            for (token, row) in run.iter().zip(rows) {
                E::store(&token.values[head.clone()], row);
            }
            let start = first_box + layout.box_offset(page / GROUP_PAGES, kv_head);
            let boxes = self.boxes.elements_mut::<E>(start..start + layout.group_box_elements());
            let columns = stored_keys.chunks_mut(KEY_PIECE * size);
            let boxes = boxes.chunks_mut(KEY_PIECE * 2 * GROUP_PAGES);
            for (piece, (columns, boxes)) in columns.zip(boxes).enumerate() {
                let first = head.start + piece * KEY_PIECE;
                let channels = first..(first + KEY_PIECE).min(head.end);
                let keys = run.iter().map(|token| &token.keys[channels.clone()]);
                append_keys(keys, columns, (slot.offset, size), boxes, page % GROUP_PAGES);
            }
        }
        if quantised && end == size {
            self.seal(layer, slot);
        }
    }

    /// Turns a full page into codes.
    fn seal(&mut self, layer: usize, slot: Slot) {
        let layout = self.layout;
        let (first, first_box) = (layer * self.layer_bytes(), layer * self.layer_box_elements());
        let Self { pages, boxes, open, wide, .. } = self;
        let (Some(codes), Some(elements)) = (layout.codes(), open.get(layer, slot.page)) else {
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

/// Writes the keys of tokens from `offset` on, [`KEY_PIECE`] channels of them at most, into columns
/// `[channels, page_size]`, and grows row `page` of boxes `[channels, 2 (max, min), GROUP_PAGES]`.
fn append_keys<'a, E: KvElement>(
    keys: impl Iterator<Item = &'a [f32]>,
    columns: &mut [E],
    (offset, size): (usize, usize),
    boxes: &mut [E],
    page: usize,
) {
    let channels = columns.len() / size;
    let (mut rounded, mut wide) = ([E::zeroed(); KEY_PIECE], [0.0; KEY_PIECE]);
    let (rounded, wide) = (&mut rounded[..channels], &mut wide[..channels]);
    let (mut max, mut min) = ([0.0; KEY_PIECE], [0.0; KEY_PIECE]);
    let (max, min) = (&mut max[..channels], &mut min[..channels]);
    if offset > 0 {
        for (corners, row) in [(&mut *max, 0), (&mut *min, GROUP_PAGES)] {
            for (x, boxes) in rounded.iter_mut().zip(boxes.chunks_exact(2 * GROUP_PAGES)) {
                *x = boxes[row + page];
            }
            E::widen(rounded, corners);
        }
    }
    for (key, offset) in keys.zip(offset..) {
        E::store(key, rounded);
        for (&x, column) in rounded.iter().zip(columns.chunks_exact_mut(size)) {
            column[offset] = x;
        }
        E::widen(rounded, wide);
        if offset == 0 {
            max.copy_from_slice(wide);
            min.copy_from_slice(wide);
        }
        // A NaN is neither above nor below, and does not go away again. Without branches: which
        // keys make a box grow cannot be guessed.
        for (max, &x) in max.iter_mut().zip(&*wide) {
            *max = if (x <= *max) | max.is_nan() { *max } else { x };
        }
        for (min, &x) in min.iter_mut().zip(&*wide) {
            *min = if (x >= *min) | min.is_nan() { *min } else { x };
        }
    }
    for (corners, row) in [(max, 0), (min, GROUP_PAGES)] {
        E::store(corners, rounded);
        for (&x, boxes) in rounded.iter().zip(boxes.chunks_exact_mut(2 * GROUP_PAGES)) {
            boxes[row + page] = x;
        }
    }
}
