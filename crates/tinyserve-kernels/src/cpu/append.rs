//! Appending to pages, each head on a thread of its own, and turning full pages into codes.
//!
//! What is written is what [`HostPages::append_tokens`] writes, which is the reference.
//!
//! [`HostPages::append_tokens`]: tinyserve_kv::HostPages::append_tokens

mod seal;

use std::ops::Range;
use std::sync::PoisonError;

use half::f16;
use tinyserve_kv::{GROUP_PAGES, KvElement, KvLayout, LayerMut, OpenPlaces, Slot, with_elements};

use super::columns::Columns;
use super::simd::{Element, Kernel, Simd, dispatch};
use super::{Cpu, CpuTensor};
use crate::{AppendKvArgs, Heads};

use seal::Codes;

/// Channels of a key that are rounded at a time, on the stack.
const PIECE: usize = 64;
/// Elements of keys below which waking other threads costs more than it saves.
const SERIAL_ELEMENTS: usize = 512;

pub(super) fn append_kv(cpu: &Cpu, args: AppendKvArgs<'_, Cpu>) {
    let AppendKvArgs { layer, heads, qkv, slots, pages } = args;
    let layout = *pages.layout();
    let shape = layout.shape();
    let stored = (shape.kv_heads, shape.head_dim);
    assert_eq!((heads.kv_heads, heads.head_dim), stored, "heads of pages");
    pages.write_tokens(layer, slots, |layer| {
        let LayerMut { pages, boxes, open, places } = layer;
        let lengths = (pages.len(), boxes.len(), open.len());
        let step = Step {
            layout,
            heads,
            qkv,
            slots,
            pages: Columns::new(pages, lengths.0.max(1)),
            boxes: Columns::new(boxes, lengths.1.max(1)),
            open: Columns::new(open, lengths.2.max(1)),
            places,
        };
        let one = |thread: usize, kv_head: usize| {
            // A panic left nothing behind that is read before it is written.
            let mut scratch = cpu.scratch[thread].lock().unwrap_or_else(PoisonError::into_inner);
            let rows = scratch.sealed_rows();
            with_elements!(layout, (E, O) => {
                let elements = std::marker::PhantomData::<(E, O)>;
                dispatch(cpu.path, Head { step: &step, kv_head, rows, elements });
            });
        };
        if slots.len() * shape.kv_heads * shape.head_dim < SERIAL_ELEMENTS {
            (0..shape.kv_heads).for_each(|kv_head| one(0, kv_head));
        } else {
            cpu.pool.run(shape.kv_heads, &one);
        }
    });
}

/// The tokens of a call, and the layer that they go to.
struct Step<'a> {
    layout: KvLayout,
    heads: Heads,
    qkv: &'a CpuTensor,
    slots: &'a [Slot],
    pages: Columns<'a, u8>,
    boxes: Columns<'a, u8>,
    open: Columns<'a, u8>,
    places: OpenPlaces<'a>,
}

/// One head of all tokens of a [`Step`]: boxes of `E`, keys and values of `O`.
struct Head<'a, E, O> {
    step: &'a Step<'a>,
    kv_head: usize,
    /// Memory that is reused.
    rows: &'a mut Vec<u8>,
    elements: std::marker::PhantomData<(E, O)>,
}

impl<E: KvElement + Element, O: KvElement + Element> Kernel for Head<'_, E, O> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(mut self, simd: S) {
        let slots = self.step.slots;
        let mut first = 0;
        while first < slots.len() {
            // Tokens of a page that follow each other look at its box once.
            let mut end = first + 1;
            while end < slots.len()
                && slots[end].page == slots[first].page
                && slots[end].offset == slots[first].offset + (end - first)
            {
                end += 1;
            }
            self.write(simd, first..end);
            first = end;
        }
    }
}

impl<E: KvElement + Element, O: KvElement + Element> Head<'_, E, O> {
    /// Writes neighbouring tokens of one page.
    #[inline(always)]
    fn write<S: Simd>(&mut self, simd: S, tokens: Range<usize>) {
        let Step { layout, heads, qkv, slots, .. } = *self.step;
        let (size, dim) = (layout.page_size(), heads.head_dim);
        let Slot { page, offset } = slots[tokens.start];
        let bytes = layout.head_range(page.index(), self.kv_head);
        let start = layout.box_offset(page.index() / GROUP_PAGES, self.kv_head);
        let corners = start..start + layout.group_box_elements();
        let corners = corners.start * size_of::<E>()..corners.end * size_of::<E>();
        // SAFETY: this head's pages and boxes are written by this call of the kernel alone, page by
        // page; here and below, each slice ends with this call.
        let boxes: &mut [E] =
            bytemuck::cast_slice_mut(unsafe { self.step.boxes.slice(0, corners) });
        // SAFETY: as above.
        let stored = unsafe { self.step.pages.slice(0, bytes) };
        let (both, sealed): (&mut [O], _) = match layout.codes() {
            None => (bytemuck::cast_slice_mut(stored), None),
            Some(codes) => {
                let open = self.step.places.range(page, self.kv_head);
                // SAFETY: as above.
                let open = unsafe { self.step.open.slice(0, open) };
                (bytemuck::cast_slice_mut(open), Some((codes, stored)))
            }
        };
        let becomes_codes = sealed.is_some();
        // A closure, so that it is compiled for the instructions of the caller.
        let store = |x: &[f32], out: &mut [O]| {
            if becomes_codes { O::store_open(x, out) } else { O::store(x, out) }
        };
        let (keys, values) = both.split_at_mut(layout.head_elements());
        let row = |token: usize, columns: Range<usize>| {
            let first = columns.start + self.kv_head * dim;
            &qkv.values()[token * heads.qkv_width() + first..][..dim]
        };
        for (token, value) in tokens.clone().zip(values[offset * dim..].chunks_exact_mut(dim)) {
            store(row(token, heads.v_columns()), value);
        }
        let lane = page.index() % GROUP_PAGES;
        let pieces = keys.chunks_mut(PIECE * size).zip(boxes.chunks_mut(PIECE * 2 * GROUP_PAGES));
        for (piece, (columns, corners)) in pieces.enumerate() {
            let channels = piece * PIECE..((piece + 1) * PIECE).min(dim);
            let keys = tokens.clone().map(|token| &row(token, heads.k_columns())[channels.clone()]);
            grow(simd, (keys, store), (columns, offset, size), (corners, lane));
        }
        if let Some((codes, out)) = sealed
            && offset + tokens.len() == size
        {
            // Of what becomes codes, boxes are in f16.
            let boxes: &mut [f16] = bytemuck::cast_slice_mut(boxes);
            Codes::new(codes, self.rows).seal(simd, (&*keys, &*values), (boxes, lane), out);
        }
    }
}

/// Writes up to [`PIECE`] channels of neighbouring keys from `offset` on into `columns`
/// `[channels, size]`, as `store` rounds them, and grows their box in `lane` of `corners`.
#[inline(always)]
fn grow<'k, S: Simd, E: KvElement + Element, O: KvElement + Element>(
    simd: S,
    (keys, store): (impl Iterator<Item = &'k [f32]>, impl Fn(&[f32], &mut [O])),
    (columns, offset, size): (&mut [O], usize, usize),
    (corners, lane): (&mut [E], usize),
) {
    let mut rounded = [O::zeroed(); PIECE];
    let (mut max, mut min) = ([E::zeroed(); PIECE], [E::zeroed(); PIECE]);
    for (rows, (max, min)) in
        corners.chunks_exact(2 * GROUP_PAGES).zip(max.iter_mut().zip(&mut min))
    {
        (*max, *min) = (rows[lane], rows[GROUP_PAGES + lane]);
    }
    let (mut highest, mut lowest) = (wide(simd, &max), wide(simd, &min));
    let mut channels = 0;
    for (i, key) in keys.enumerate() {
        channels = key.len();
        store(key, &mut rounded[..channels]);
        for (column, &x) in columns.chunks_exact_mut(size).zip(&rounded) {
            column[offset + i] = x;
        }
        if offset + i == 0 {
            (highest, lowest) = (wide(simd, &rounded), wide(simd, &rounded));
            continue;
        }
        for at in (0..PIECE).step_by(S::LANES) {
            let x = O::load(simd, &rounded[at..]);
            let (high, low) = (&mut highest[at..], &mut lowest[at..]);
            simd.store(simd.max(x, simd.load(high)), high);
            simd.store(simd.min(x, simd.load(low)), low);
            // A number of which all lanes are at least themselves is none but NaN.
            if simd.at_least(x, x).count_ones() as usize != S::LANES {
                let lanes = rounded[at..].iter().zip(high).zip(low).take(S::LANES);
                for ((x, high), low) in lanes {
                    if x.to_f32().is_nan() {
                        (*high, *low) = (f32::NAN, f32::NAN);
                    }
                }
            }
        }
    }
    if O::FORMAT == E::FORMAT {
        // Stored keys, which are rounded already.
        E::store(&highest, &mut max);
        E::store(&lowest, &mut min);
    } else {
        for channel in 0..channels {
            max[channel] = E::at_least(highest[channel]);
            min[channel] = E::at_most(lowest[channel]);
        }
    }
    let rows = corners.chunks_exact_mut(2 * GROUP_PAGES).take(channels);
    for (rows, (&max, &min)) in rows.zip(max.iter().zip(&min)) {
        (rows[lane], rows[GROUP_PAGES + lane]) = (max, min);
    }
}

#[inline(always)]
fn wide<S: Simd, E: Element>(simd: S, x: &[E; PIECE]) -> [f32; PIECE] {
    let mut wide = [0.0; PIECE];
    for at in (0..PIECE).step_by(S::LANES) {
        simd.store(E::load(simd, &x[at..]), &mut wide[at..]);
    }
    wide
}
