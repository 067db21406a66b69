//! Sealed pages as codes: how they lie in memory, and the scalar reference of making and reading
//! them.
//!
//! A key is `min + (max − min)·code/highest`, channel by channel: `min` and `max` are the corners of
//! the page's box, which so needs no company. A value is `minimum + scale·code`, with a minimum and
//! a scale for each token and group of channels (the split of KIVI, arXiv 2402.02750).

use std::ops::Range;

use half::f16;

use crate::KvElement;

/// Channels of a value that share a range when codes have 4 bits.
const GROUP_CHANNELS: usize = 64;

/// How one head of a sealed page lies in memory:
/// `keys [head_dim / n, page_size]`, `values [page_size / n, head_dim]` in words of 32 bits that
/// hold `n` codes each, then `scales [groups, page_size]` and `minima [groups, page_size]` in f16.
///
/// A word of keys is neighbouring channels of one token, a word of values neighbouring tokens of one
/// channel: what a dot product adds up lies side by side. Bytes hold codes in order, and in 4 bits
/// the lower halves of a word's bytes hold the first four. Codes without a channel or token are 0.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CodeLayout {
    bits: usize,
    head_dim: usize,
    page_size: usize,
}

impl CodeLayout {
    pub(crate) fn new(bits: usize, head_dim: usize, page_size: usize) -> Self {
        Self { bits, head_dim, page_size }
    }

    /// Channels of a head.
    #[must_use]
    pub fn head_dim(&self) -> usize {
        self.head_dim
    }

    /// Tokens of a page.
    #[must_use]
    pub fn page_size(&self) -> usize {
        self.page_size
    }

    /// Minimum and scale of values of which these are the lowest and the highest; `None` stands for
    /// some that are not finite, and gives NaN for a minimum.
    #[must_use]
    pub fn value_range(&self, range: Option<(f32, f32)>) -> (f16, f16) {
        match range {
            Some((lowest, highest)) => {
                // Both rounded outwards: together they reach from the lowest to the highest.
                let minimum = f16::at_most(lowest);
                let step = (highest - minimum.to_f32()) / f32::from(self.highest());
                (minimum, f16::at_least(step))
            }
            None => (f16::NAN, f16::ZERO),
        }
    }

    /// Bits of a code.
    #[must_use]
    pub fn bits(&self) -> usize {
        self.bits
    }

    /// The highest code.
    #[must_use]
    pub fn highest(&self) -> u8 {
        // 8 bits or 4: it fits.
        ((1usize << self.bits) - 1) as u8
    }

    /// Codes of a word.
    #[must_use]
    pub fn codes_per_word(&self) -> usize {
        32 / self.bits
    }

    /// Words of the keys of one token.
    #[must_use]
    pub fn key_words(&self) -> usize {
        self.head_dim.div_ceil(self.codes_per_word())
    }

    /// Words of the values of one channel.
    #[must_use]
    pub fn value_words(&self) -> usize {
        self.page_size.div_ceil(self.codes_per_word())
    }

    /// Channels of a value that share a scale and a minimum.
    #[must_use]
    pub fn group_channels(&self) -> usize {
        if self.bits == 4 { GROUP_CHANNELS } else { self.head_dim }
    }

    /// Scales of a value.
    #[must_use]
    pub fn groups(&self) -> usize {
        self.head_dim.div_ceil(self.group_channels())
    }

    /// Where the keys' codes lie.
    #[must_use]
    pub fn keys(&self) -> Range<usize> {
        0..4 * self.key_words() * self.page_size
    }

    /// Where the values' codes lie.
    #[must_use]
    pub fn values(&self) -> Range<usize> {
        let start = self.keys().end;
        start..start + 4 * self.value_words() * self.head_dim
    }

    /// Where the values' scales lie.
    #[must_use]
    pub fn scales(&self) -> Range<usize> {
        let start = self.values().end;
        start..start + 2 * self.groups() * self.page_size
    }

    /// Where the values' minima lie.
    #[must_use]
    pub fn minima(&self) -> Range<usize> {
        let start = self.scales().end;
        start..start + 2 * self.groups() * self.page_size
    }

    /// Bytes of one head of a page.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.minima().end
    }

    /// Byte and shift of code `index` of the words at `word`.
    fn place(&self, word: usize, index: usize) -> (usize, usize) {
        (4 * word + index % 4, 4 * (index / 4))
    }

    fn read(&self, codes: &[u8], word: usize, index: usize) -> u8 {
        let (byte, shift) = self.place(word, index);
        (codes[byte] >> shift) & self.highest()
    }

    fn write(&self, codes: &mut [u8], word: usize, index: usize, code: u8) {
        let (byte, shift) = self.place(word, index);
        codes[byte] = codes[byte] & !(self.highest() << shift) | code << shift;
    }
}

/// Keys and values of one head in one sealed page of one layer, as codes.
#[derive(Debug, Clone, Copy)]
pub struct CodePage<'a> {
    layout: CodeLayout,
    bytes: &'a [u8],
}

impl<'a> CodePage<'a> {
    #[inline(always)]
    pub(crate) fn new(layout: CodeLayout, bytes: &'a [u8]) -> Self {
        Self { layout, bytes }
    }

    /// The head's bytes, as [`CodeLayout`] has them.
    #[must_use]
    #[inline(always)]
    pub fn bytes(&self) -> &'a [u8] {
        self.bytes
    }

    /// Scales of the values `[groups, page_size]`.
    #[must_use]
    pub fn scales(&self) -> &'a [f16] {
        bytemuck::cast_slice(&self.bytes[self.layout.scales()])
    }

    /// Minima of the values `[groups, page_size]`.
    #[must_use]
    pub fn minima(&self) -> &'a [f16] {
        bytemuck::cast_slice(&self.bytes[self.layout.minima()])
    }

    /// Channel `channel` of the key of the token at `offset`; `min` and `max` are the page's box.
    ///
    /// # Panics
    /// When the page has no such token or channel.
    #[must_use]
    pub fn key(&self, offset: usize, channel: usize, (min, max): (f32, f32)) -> f32 {
        let Self { layout, bytes } = self;
        assert!(offset < layout.page_size && channel < layout.head_dim, "a key's channel");
        let (word, index) = (channel / layout.codes_per_word(), channel % layout.codes_per_word());
        let code = layout.read(bytes, word * layout.page_size + offset, index);
        let key = min + (max - min) * (f32::from(code) / f32::from(layout.highest()));
        // Rounding must not lead out of the box.
        key.max(min).min(max)
    }

    /// Channel `channel` of the value of the token at `offset`.
    ///
    /// # Panics
    /// When the page has no such token or channel.
    #[must_use]
    pub fn value(&self, offset: usize, channel: usize) -> f32 {
        let layout = self.layout;
        assert!(offset < layout.page_size && channel < layout.head_dim, "a value's channel");
        let codes = &self.bytes[layout.values()];
        let (word, index) = (offset / layout.codes_per_word(), offset % layout.codes_per_word());
        let code = layout.read(codes, word * layout.head_dim + channel, index);
        let at = channel / layout.group_channels() * layout.page_size + offset;
        self.minima()[at].to_f32() + self.scales()[at].to_f32() * f32::from(code)
    }
}

/// Writes the codes of a full page and returns the final box, channel by channel, to `corners`.
///
/// `keys` is `[head_dim, page_size]`, `values` `[page_size, head_dim]`, `out` one head of a page. The
/// box is rounded outwards, and is what codes are counted from. A channel of the keys that holds a
/// NaN or an infinity gets NaN in both corners of the box, a value that does a NaN for its minimum:
/// codes cannot hide it. `wide` is memory that is reused.
pub(crate) fn seal<O: KvElement>(
    layout: CodeLayout,
    (keys, values): (&[O], &[O]),
    out: &mut [u8],
    wide: &mut Vec<f32>,
    mut corners: impl FnMut(usize, f16, f16),
) {
    let (size, dim, per_word) = (layout.page_size, layout.head_dim, layout.codes_per_word());
    out.fill(0);
    let highest = f32::from(layout.highest());
    wide.resize(size.max(dim), 0.0);
    for (channel, keys) in keys.chunks_exact(size).enumerate() {
        let wide = &mut wide[..size];
        widen(keys, wide);
        let (word, index) = (channel / per_word, channel % per_word);
        let Some((lowest, highest_key)) = range(wide) else {
            corners(channel, f16::NAN, f16::NAN);
            continue;
        };
        let (min, max) = (f16::at_most(lowest), f16::at_least(highest_key));
        corners(channel, min, max);
        let (min, max) = (min.to_f32(), max.to_f32());
        let steps = if max > min { highest / (max - min) } else { 0.0 };
        for (offset, &key) in wide.iter().enumerate() {
            let code = nearest((key - min) * steps, highest);
            layout.write(out, word * size + offset, index, code);
        }
    }
    for (offset, values) in values.chunks_exact(dim).enumerate() {
        let wide = &mut wide[..dim];
        widen(values, wide);
        for (group, wide) in wide.chunks(layout.group_channels()).enumerate() {
            let (minimum, scale) = layout.value_range(range(wide));
            let at = group * size + offset;
            for (range, x) in [(layout.scales(), scale), (layout.minima(), minimum)] {
                out[range][2 * at..2 * at + 2].copy_from_slice(&x.to_ne_bytes());
            }
            let codes = &mut out[layout.values()];
            let (word, index) = (offset / per_word, offset % per_word);
            let (minimum, scale) = (minimum.to_f32(), scale.to_f32());
            let steps = if scale > 0.0 { scale.recip() } else { 0.0 };
            for (channel, &value) in wide.iter().enumerate() {
                let channel = group * layout.group_channels() + channel;
                let code = nearest((value - minimum) * steps, highest);
                layout.write(codes, word * dim + channel, index, code);
            }
        }
    }
}

fn widen<O: KvElement>(x: &[O], wide: &mut [f32]) {
    for (wide, x) in wide.iter_mut().zip(x) {
        *wide = x.to_f32();
    }
}

/// The lowest and the highest of `x`, if all are finite.
fn range(x: &[f32]) -> Option<(f32, f32)> {
    let finite = x.iter().all(|x| x.is_finite());
    finite.then(|| {
        x.iter().fold((f32::INFINITY, f32::NEG_INFINITY), |(lowest, highest), &x| {
            (lowest.min(x), highest.max(x))
        })
    })
}

/// The code nearest to `x`; 0 for NaN.
fn nearest(x: f32, highest: f32) -> u8 {
    // The range keeps it below 256 already, but for rounding.
    (x + 0.5).clamp(0.0, highest + 0.5) as u8
}
