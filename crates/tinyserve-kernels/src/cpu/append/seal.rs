//! Turning a full page into codes, of which the box is the range.

use half::f16;
use tinyserve_kv::{CodeLayout, GROUP_PAGES, KvElement};

use crate::cpu::simd::{Element, Simd};

/// Rows of codes that are joined into words, and where they are kept.
pub(super) struct Codes<'a> {
    layout: CodeLayout,
    /// Elements from one row to the next: the longer side of a page, in whole vectors.
    stride: usize,
    /// `[codes of a word, stride]`.
    rows: &'a mut [u8],
}

/// Elements of a page's sides are padded to this.
const LANES: usize = 16;

impl<'a> Codes<'a> {
    pub(super) fn new(layout: CodeLayout, rows: &'a mut Vec<u8>) -> Self {
        let longer = layout.head_dim().max(layout.page_size());
        let stride = longer.next_multiple_of(LANES);
        rows.resize(layout.codes_per_word() * stride, 0);
        Self { layout, stride, rows }
    }

    /// Writes the codes of a page whose keys are `[head_dim, page_size]` and values
    /// `[page_size, head_dim]`; its box, which has grown with its keys and is rounded outwards, is in
    /// `lane` of `boxes`.
    ///
    /// A channel of the keys that holds a NaN or an infinity gets NaN in both corners of the box, a
    /// value that does a NaN for its minimum: codes cannot hide it.
    #[inline(always)]
    pub(super) fn seal<S: Simd, O: KvElement + Element>(
        &mut self,
        simd: S,
        (keys, values): (&[O], &[O]),
        (boxes, lane): (&mut [f16], usize),
        out: &mut [u8],
    ) {
        let Self { layout, stride, .. } = *self;
        let (size, dim, per_word) =
            (layout.page_size(), layout.head_dim(), layout.codes_per_word());
        let highest = f32::from(layout.highest());
        let words = out[layout.keys()].chunks_exact_mut(4 * size);
        for (word, words) in words.enumerate() {
            for (i, row) in self.rows.chunks_exact_mut(stride).enumerate() {
                let channel = word * per_word + i;
                row[..size].fill(0);
                if channel >= dim {
                    continue;
                }
                let keys = &keys[channel * size..(channel + 1) * size];
                let corners = &mut boxes[2 * channel * GROUP_PAGES..][..2 * GROUP_PAGES];
                let (max, min) = (corners[lane].to_f32(), corners[GROUP_PAGES + lane].to_f32());
                if !(max.is_finite() && min.is_finite()) {
                    (corners[lane], corners[GROUP_PAGES + lane]) = (f16::NAN, f16::NAN);
                    continue;
                }
                let steps = if max > min { highest / (max - min) } else { 0.0 };
                nearest(simd, keys, (min, steps, highest), row);
            }
            self.join(words);
        }
        for word in 0..layout.value_words() {
            for i in 0..per_word {
                let row = &mut self.rows[i * stride..(i + 1) * stride];
                let token = word * per_word + i;
                row[..dim].fill(0);
                if token >= size {
                    continue;
                }
                let values = &values[token * dim..(token + 1) * dim];
                let groups = values.chunks(layout.group_channels()).enumerate();
                for (group, values) in groups {
                    let (minimum, scale) = layout.value_range(range(simd, values));
                    let at = 2 * (group * size + token);
                    out[layout.scales()][at..at + 2].copy_from_slice(&scale.to_ne_bytes());
                    out[layout.minima()][at..at + 2].copy_from_slice(&minimum.to_ne_bytes());
                    let (minimum, scale) = (minimum.to_f32(), scale.to_f32());
                    if scale > 0.0 {
                        let row = &mut row[group * layout.group_channels()..];
                        nearest(simd, values, (minimum, scale.recip(), highest), row);
                    }
                }
            }
            let words = 4 * word * dim..4 * (word + 1) * dim;
            self.join(&mut out[layout.values()][words]);
        }
    }

    /// Joins the rows into words, the first of each into the first.
    #[inline(always)]
    fn join(&self, words: &mut [u8]) {
        let row = |i: usize| &self.rows[i * self.stride..][..words.len() / 4];
        if self.layout.bits() == 8 {
            let rows = [row(0), row(1), row(2), row(3)];
            join(words, rows);
            return;
        }
        let (low, high) = ([row(0), row(1), row(2), row(3)], [row(4), row(5), row(6), row(7)]);
        join_halves(words, low, high);
    }
}

#[inline(always)]
fn join(words: &mut [u8], [a, b, c, d]: [&[u8]; 4]) {
    let codes = a.iter().zip(b).zip(c).zip(d);
    for (word, (((&a, &b), &c), &d)) in words.chunks_exact_mut(4).zip(codes) {
        word.copy_from_slice(&[a, b, c, d]);
    }
}

#[inline(always)]
fn join_halves(words: &mut [u8], low: [&[u8]; 4], high: [&[u8]; 4]) {
    for byte in 0..4 {
        let codes = low[byte].iter().zip(high[byte]);
        for (word, (&low, &high)) in words.chunks_exact_mut(4).zip(codes) {
            word[byte] = low | high << 4;
        }
    }
}

/// The code nearest to each of `x` into `out`, which is padded to whole vectors.
#[inline(always)]
fn nearest<S: Simd, O: Element>(
    simd: S,
    x: &[O],
    (lowest, steps, highest): (f32, f32, f32),
    out: &mut [u8],
) {
    let (lowest, steps) = (simd.splat(lowest), simd.splat(steps));
    let (half, top) = (simd.splat(0.5), simd.splat(highest + 0.5));
    for (x, out) in x.chunks(S::LANES).zip(out.chunks_mut(S::LANES)) {
        let code = simd.mul(simd.sub(simd.load_up_to(x), lowest), steps);
        let code = simd.max(simd.add(code, half), simd.splat(0.0));
        simd.store_bytes(simd.min(code, top), out);
    }
}

/// The lowest and the highest of `x`, if all are finite.
#[inline(always)]
fn range<S: Simd, O: KvElement + Element>(simd: S, x: &[O]) -> Option<(f32, f32)> {
    let first = KvElement::to_f32(x[0]);
    let (mut low, mut high) = (simd.splat(first), simd.splat(first));
    let vectors = x.chunks_exact(S::LANES);
    let rest = vectors.remainder();
    let mut numbers = true;
    for x in vectors {
        let x = O::load(simd, x);
        numbers &= simd.at_least(x, x).count_ones() as usize == S::LANES;
        (low, high) = (simd.min(x, low), simd.max(x, high));
    }
    let mut highest = simd.highest(high);
    let mut lowest = -simd.highest(simd.sub(simd.splat(0.0), low));
    for &x in rest {
        let x = KvElement::to_f32(x);
        numbers &= !x.is_nan();
        (lowest, highest) = (lowest.min(x), highest.max(x));
    }
    (numbers && lowest.is_finite() && highest.is_finite()).then_some((lowest, highest))
}
