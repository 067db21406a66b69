//! Attention over pages of codes: products in whole numbers, made floats once per page or chunk.
//!
//! A key's channel is `min + range·code/highest`, so a score is `q·min`, which is the page's alone,
//! and a dot product of the codes with `q·range/highest`. These factors, and a chunk's weights times
//! the scales of its values, are rounded to 23 bits and split into three signed bytes: then the
//! products are exact, and a few instructions make sixty-four of them.

mod boxes;
mod keys;
mod values;

pub(super) use boxes::{Widest, factors, load_boxes, normalise, pick_box};
pub(super) use keys::{dots, dots_of_blocks};
pub(super) use values::{Values, products, split};

use crate::cpu::simd::{PIECES, Simd};

/// Tokens, channels or pages side by side: what a [`Simd::Block`] holds.
pub(super) const BLOCK: usize = 16;
/// Codes that one word of each piece meets.
const QUAD: usize = 4;
/// Queries from which on lines are asked for before a page, not between its words: their sums leave
/// no register for it.
pub(super) const MANY: usize = 4;
/// Stands for the widest range and the largest number where all are zero.
pub(super) const TINY: f32 = 1e-30;

/// Loads 64 bytes from `at` on, with zeros after the last.
#[inline(always)]
fn load<S: Simd>(simd: S, bytes: &[u8], at: usize) -> S::Codes {
    match bytes.get(at..at + 4 * BLOCK) {
        Some(bytes) => simd.codes(bytes),
        None => simd.codes(&padded(&bytes[at..])),
    }
}

/// The last bytes of a page, and zeros after them.
#[cold]
fn padded(bytes: &[u8]) -> [u8; 4 * BLOCK] {
    let mut padded = [0; 4 * BLOCK];
    padded[..bytes.len()].copy_from_slice(bytes);
    padded
}

/// The four codes of each lane of a word that belong to the word's quad `half`.
#[inline(always)]
fn half<S: Simd, const BITS: usize>(simd: S, codes: S::Codes, half: usize) -> S::Codes {
    match (BITS, half) {
        (8, _) => codes,
        (_, 0) => simd.low_halves(codes),
        _ => simd.high_halves(codes),
    }
}

/// `offset + unit·Σ counts·256^piece`.
#[inline(always)]
fn number<S: Simd>(simd: S, counts: &[S::Counts; PIECES], (offset, unit): (f32, f32)) -> S::Block {
    let mut sums = simd.block(&[offset; BLOCK]);
    let mut unit = unit;
    for &counts in counts {
        sums = simd.add_block(sums, simd.widen(counts), unit);
        unit *= 256.0;
    }
    sums
}

/// The pieces of the factors of one quad of channels for `BLOCK` pages side by side.
#[derive(Debug, Clone, Copy, Default)]
#[repr(align(64))]
pub(super) struct QuadFactors([[u32; BLOCK]; PIECES]);

/// The pieces of `BLOCK` numbers, quad by quad a word for each piece; then a word of garbage, which
/// makes them what one store writes.
#[derive(Debug, Clone, Copy, Default)]
#[repr(align(64))]
pub(super) struct Pieces([[u32; PIECES + 1]; BLOCK / QUAD]);

/// Where the codes of a page lie.
#[derive(Debug, Clone, Copy)]
pub(super) struct Places {
    /// Tokens of a page.
    pub(super) size: usize,
    pub(super) head_dim: usize,
    /// Words of the keys of one token, and of the values of one channel.
    pub(super) key_words: usize,
    pub(super) value_words: usize,
    /// Where the values begin.
    pub(super) values: usize,
}
