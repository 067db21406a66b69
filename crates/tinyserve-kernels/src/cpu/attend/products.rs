//! Attention over pages of codes: products of the codes themselves, and of what is a page's alone.
//!
//! A key's channel is `min + range·code/highest`, so a score is `q·min`, which is the page's alone,
//! and a dot product of the codes with `q·range/highest`. These factors, and a chunk's weights times
//! the scales of its values, are stored as the processor multiplies codes by them: as floats, or as
//! three signed bytes, whose products are exact and of which one instruction makes sixty-four.

mod boxes;
mod keys;
mod values;

pub(super) use boxes::{Widest, factors, load_boxes, normalise, pick_box};
pub(super) use keys::{dots, dots_of_blocks};
pub(super) use values::{Values, products, store_factors};

use crate::cpu::simd::Simd;

/// Tokens, channels or pages side by side: what a [`Simd::Block`] holds.
pub(super) const BLOCK: usize = 16;
/// Codes of an output that are multiplied together.
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

/// The factors of `BLOCK` tokens, in words for each quad of them.
#[derive(Debug, Clone, Copy, Default)]
#[repr(align(64))]
pub(super) struct TokenFactors([[u32; QUAD]; BLOCK / QUAD]);

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
