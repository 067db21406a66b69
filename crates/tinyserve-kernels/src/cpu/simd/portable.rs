//! Vectors as arrays: the compiler maps them to what its target has.

use half::{bf16, f16};

use super::pairs::{add_product, rounded};
use super::sums::float_sums;
use super::{BlockWords, PairSimd, Simd};

const LANES: usize = 8;

/// Works everywhere.
#[derive(Clone, Copy)]
pub(super) struct Portable;

#[inline(always)]
fn map2(a: [f32; LANES], b: [f32; LANES], f: impl Fn(f32, f32) -> f32) -> [f32; LANES] {
    std::array::from_fn(|i| f(a[i], b[i]))
}

impl Simd for Portable {
    type V = [f32; LANES];
    const LANES: usize = LANES;

    #[inline(always)]
    fn splat(self, x: f32) -> Self::V {
        [x; LANES]
    }
    #[inline(always)]
    fn load(self, x: &[f32]) -> Self::V {
        let x = &x[..LANES];
        std::array::from_fn(|i| x[i])
    }
    #[inline(always)]
    fn load_f16(self, x: &[f16]) -> Self::V {
        let x = &x[..LANES];
        std::array::from_fn(|i| x[i].to_f32())
    }
    #[inline(always)]
    fn load_bf16(self, x: &[bf16]) -> Self::V {
        let x = &x[..LANES];
        std::array::from_fn(|i| f32::from_bits(u32::from(x[i].to_bits()) << 16))
    }
    #[inline(always)]
    fn store(self, x: Self::V, out: &mut [f32]) {
        out[..LANES].copy_from_slice(&x);
    }
    #[inline(always)]
    fn add(self, a: Self::V, b: Self::V) -> Self::V {
        map2(a, b, |a, b| a + b)
    }
    #[inline(always)]
    fn sub(self, a: Self::V, b: Self::V) -> Self::V {
        map2(a, b, |a, b| a - b)
    }
    #[inline(always)]
    fn mul(self, a: Self::V, b: Self::V) -> Self::V {
        map2(a, b, |a, b| a * b)
    }
    #[inline(always)]
    fn div(self, a: Self::V, b: Self::V) -> Self::V {
        map2(a, b, |a, b| a / b)
    }
    #[inline(always)]
    fn max(self, a: Self::V, b: Self::V) -> Self::V {
        map2(a, b, |a, b| if a > b { a } else { b })
    }
    #[inline(always)]
    fn min(self, a: Self::V, b: Self::V) -> Self::V {
        map2(a, b, |a, b| if a < b { a } else { b })
    }
    #[inline(always)]
    fn mul_add(self, a: Self::V, b: Self::V, c: Self::V) -> Self::V {
        // Not f32::mul_add: without the instruction that is a slow library call.
        std::array::from_fn(|i| a[i] * b[i] + c[i])
    }
    #[inline(always)]
    fn round(self, x: Self::V) -> Self::V {
        // Adding and taking off 1.5·2²³ rounds to whole numbers in plain arithmetic.
        x.map(|x| (x + 12_582_912.0) - 12_582_912.0)
    }
    #[inline(always)]
    fn scale_by_power(self, x: Self::V, n: Self::V) -> Self::V {
        map2(x, n, |x, n| x * f32::from_bits(((n as i32 + 127) as u32) << 23))
    }
    #[inline(always)]
    fn sum(self, x: Self::V) -> f32 {
        x.iter().sum()
    }
    #[inline(always)]
    fn highest(self, x: Self::V) -> f32 {
        x.into_iter().fold(f32::NEG_INFINITY, f32::max)
    }
    #[inline(always)]
    fn prefetch<T>(self, _address: *const T) {}

    type Codes = [u8; 64];
    type Counts = [i32; 16];
    type Block = [f32; 16];

    #[inline(always)]
    fn codes(self, bytes: &[u8]) -> [u8; 64] {
        std::array::from_fn(|i| bytes[i])
    }
    #[inline(always)]
    fn low_halves(self, codes: [u8; 64]) -> [u8; 64] {
        codes.map(|code| code & 15)
    }
    #[inline(always)]
    fn high_halves(self, codes: [u8; 64]) -> [u8; 64] {
        codes.map(|code| code >> 4)
    }
    #[inline(always)]
    fn counts(self, x: i32) -> [i32; 16] {
        [x; 16]
    }
    #[inline(always)]
    fn add_products(self, counts: [i32; 16], codes: [u8; 64], x: i32) -> [i32; 16] {
        let x = x.to_le_bytes().map(|x| i32::from(x as i8));
        std::array::from_fn(|o| {
            (0..4).fold(counts[o], |n, i| n + i32::from(codes[4 * o + i]) * x[i])
        })
    }
    #[inline(always)]
    fn block_zero(self) -> [f32; 16] {
        [0.0; 16]
    }
    #[inline(always)]
    fn block_f16(self, bytes: &[u8]) -> [f32; 16] {
        std::array::from_fn(|i| f16::from_le_bytes([bytes[2 * i], bytes[2 * i + 1]]).to_f32())
    }
    #[inline(always)]
    fn add_counts(
        self,
        sums: [f32; 16],
        counts: [i32; 16],
        scale: [f32; 16],
        x_scale: f32,
    ) -> [f32; 16] {
        std::array::from_fn(|o| sums[o] + counts[o] as f32 * (scale[o] * x_scale))
    }
    #[inline(always)]
    fn add_block(self, sums: [f32; 16], block: [f32; 16], factor: f32) -> [f32; 16] {
        std::array::from_fn(|o| sums[o] + block[o] * factor)
    }
    #[inline(always)]
    fn block(self, x: &[f32]) -> [f32; 16] {
        std::array::from_fn(|i| x[i])
    }
    #[inline(always)]
    fn store_block(self, block: [f32; 16], out: &mut [f32]) {
        out[..16].copy_from_slice(&block);
    }
    #[inline(always)]
    fn block_values(self, block: [f32; 16]) -> [f32; 16] {
        block
    }

    float_sums!(4);
}

impl Portable {
    /// Code `i` of each output's four.
    #[inline(always)]
    fn code(self, codes: [u8; 64], i: usize) -> [f32; 16] {
        std::array::from_fn(|o| f32::from(codes[4 * o + i]))
    }
}

impl PairSimd for Portable {
    type Pairs = [bf16; 2 * LANES];

    #[inline(always)]
    fn pairs(self, x: &[bf16]) -> Self::Pairs {
        std::array::from_fn(|i| x[i])
    }
    #[inline(always)]
    fn add_pairs(self, sums: Self::V, a: Self::Pairs, b: Self::Pairs) -> Self::V {
        std::array::from_fn(|lane| {
            let [low, high] = [2 * lane, 2 * lane + 1];
            add_product(add_product(sums[lane], a[high], b[high]), a[low], b[low])
        })
    }
    #[inline(always)]
    fn store_rounded(self, x: Self::V, out: &mut [bf16]) {
        for (out, x) in out[..LANES].iter_mut().zip(x) {
            *out = rounded(x);
        }
    }
}
