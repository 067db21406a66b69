//! 128-bit vectors in pairs.

use std::arch::aarch64::*;
use std::arch::asm;

use half::{bf16, f16};

use super::sums::float_sums;
use super::{BlockWords, Kernel, Simd};

/// Proof that the processor has NEON, which is part of every 64-bit Arm processor's base.
#[derive(Clone, Copy)]
pub(super) struct Neon {
    _only_made_after_detection: (),
}

pub(super) fn run<K: Kernel>(kernel: K) -> K::Output {
    #[target_feature(enable = "neon")]
    fn compiled<K: Kernel>(kernel: K, simd: Neon) -> K::Output {
        kernel.run(simd)
    }
    assert!(super::CpuPath::Neon.is_available(), "this processor has no NEON");
    // SAFETY: the processor has the feature, as the line above made sure.
    unsafe { compiled(kernel, Neon { _only_made_after_detection: () }) }
}

/// Calls intrinsics from methods of a type whose existence proves that the processor has them.
macro_rules! intrinsic {
    ($call:expr) => {
        // SAFETY: a value of this type exists, so the processor has the instructions; intrinsics
        // that read or write memory get a pointer to a slice whose length was checked before.
        unsafe { $call }
    };
}

/// Applies an intrinsic to both halves.
macro_rules! halves {
    ($f:ident($($x:expr),+)) => {
        intrinsic!([$f($($x[0]),+), $f($($x[1]),+)])
    };
}

/// Widens four half-precision numbers without the instruction that does it: the compiler offers
/// that one only together with arithmetic in half precision.
///
/// # Safety
/// The processor has NEON.
#[inline(always)]
unsafe fn widen(bits: uint16x4_t) -> float32x4_t {
    // SAFETY: the caller promises the instructions.
    unsafe {
        let bits = vmovl_u16(bits);
        let magnitude = vandq_u32(bits, vdupq_n_u32(0x7fff));
        let sign = vshlq_n_u32::<16>(vandq_u32(bits, vdupq_n_u32(0x8000)));
        // Exponent and fraction in the places of an f32 are a number 2^112 times too small, also
        // where the half was subnormal.
        let scale = vdupq_n_f32(f32::from_bits((112 + 127) << 23));
        let number = vmulq_f32(vreinterpretq_f32_u32(vshlq_n_u32::<13>(magnitude)), scale);
        // Infinity and NaN keep an exponent of ones.
        let special = vcgeq_u32(magnitude, vdupq_n_u32(0x7c00));
        let ones = vandq_u32(special, vdupq_n_u32(0x7f80_0000));
        vreinterpretq_f32_u32(vorrq_u32(vorrq_u32(vreinterpretq_u32_f32(number), ones), sign))
    }
}

impl Simd for Neon {
    type V = [float32x4_t; 2];
    const LANES: usize = 8;

    #[inline(always)]
    fn splat(self, x: f32) -> Self::V {
        intrinsic!([vdupq_n_f32(x); 2])
    }
    #[inline(always)]
    fn load(self, x: &[f32]) -> Self::V {
        let x = &x[..8];
        intrinsic!([vld1q_f32(x.as_ptr()), vld1q_f32(x[4..].as_ptr())])
    }
    #[inline(always)]
    fn load_f16(self, x: &[f16]) -> Self::V {
        let x = &x[..8];
        intrinsic!({
            let bits = vld1q_u16(x.as_ptr().cast());
            [widen(vget_low_u16(bits)), widen(vget_high_u16(bits))]
        })
    }
    #[inline(always)]
    fn load_bf16(self, x: &[bf16]) -> Self::V {
        let x = &x[..8];
        intrinsic!({
            let bits = vld1q_u16(x.as_ptr().cast());
            let wide = [vmovl_u16(vget_low_u16(bits)), vmovl_u16(vget_high_u16(bits))];
            wide.map(|wide| vreinterpretq_f32_u32(vshlq_n_u32::<16>(wide)))
        })
    }
    #[inline(always)]
    fn store(self, x: Self::V, out: &mut [f32]) {
        let out = &mut out[..8];
        intrinsic!({
            vst1q_f32(out.as_mut_ptr(), x[0]);
            vst1q_f32(out[4..].as_mut_ptr(), x[1]);
        });
    }
    #[inline(always)]
    fn add(self, a: Self::V, b: Self::V) -> Self::V {
        halves!(vaddq_f32(a, b))
    }
    #[inline(always)]
    fn sub(self, a: Self::V, b: Self::V) -> Self::V {
        halves!(vsubq_f32(a, b))
    }
    #[inline(always)]
    fn mul(self, a: Self::V, b: Self::V) -> Self::V {
        halves!(vmulq_f32(a, b))
    }
    #[inline(always)]
    fn div(self, a: Self::V, b: Self::V) -> Self::V {
        halves!(vdivq_f32(a, b))
    }
    #[inline(always)]
    fn max(self, a: Self::V, b: Self::V) -> Self::V {
        // The instruction for it gives NaN where one of the two is.
        let larger = halves!(vcgtq_f32(a, b));
        halves!(vbslq_f32(larger, a, b))
    }
    #[inline(always)]
    fn min(self, a: Self::V, b: Self::V) -> Self::V {
        let smaller = halves!(vcltq_f32(a, b));
        halves!(vbslq_f32(smaller, a, b))
    }
    #[inline(always)]
    fn mul_add(self, a: Self::V, b: Self::V, c: Self::V) -> Self::V {
        halves!(vfmaq_f32(c, a, b))
    }
    #[inline(always)]
    fn round(self, x: Self::V) -> Self::V {
        halves!(vrndnq_f32(x))
    }
    #[inline(always)]
    fn scale_by_power(self, x: Self::V, n: Self::V) -> Self::V {
        let exponent = halves!(vcvtq_s32_f32(n));
        let power =
            intrinsic!(exponent.map(|n| {
                vreinterpretq_f32_s32(vshlq_n_s32::<23>(vaddq_s32(n, vdupq_n_s32(127))))
            }));
        halves!(vmulq_f32(x, power))
    }
    #[inline(always)]
    fn sum(self, x: Self::V) -> f32 {
        intrinsic!(vaddvq_f32(vaddq_f32(x[0], x[1])))
    }
    #[inline(always)]
    fn highest(self, x: Self::V) -> f32 {
        intrinsic!(vmaxvq_f32(vmaxq_f32(x[0], x[1])))
    }
    #[inline(always)]
    fn prefetch<T>(self, address: *const T) {
        // SAFETY: a hint never faults, wherever it points, and changes nothing.
        unsafe {
            asm!("prfm pldl2keep, [{}]", in(reg) address,
                options(nostack, preserves_flags, readonly));
        }
    }

    type Codes = [uint8x16_t; 4];
    type Counts = [int32x4_t; 4];
    type Block = [float32x4_t; 4];

    #[inline(always)]
    fn codes(self, bytes: &[u8]) -> Self::Codes {
        let bytes = &bytes[..64];
        std::array::from_fn(|i| intrinsic!(vld1q_u8(bytes[16 * i..].as_ptr())))
    }
    #[inline(always)]
    fn low_halves(self, codes: Self::Codes) -> Self::Codes {
        codes.map(|codes| intrinsic!(vandq_u8(codes, vdupq_n_u8(15))))
    }
    #[inline(always)]
    fn high_halves(self, codes: Self::Codes) -> Self::Codes {
        codes.map(|codes| intrinsic!(vshrq_n_u8::<4>(codes)))
    }
    #[inline(always)]
    fn counts(self, x: i32) -> Self::Counts {
        intrinsic!([vdupq_n_s32(x); 4])
    }
    #[inline(always)]
    fn add_products(self, counts: Self::Counts, codes: Self::Codes, x: i32) -> Self::Counts {
        // In 16 bits, because the product of unsigned and signed bytes is not in every processor.
        intrinsic!({
            let x = vmovl_s8(vreinterpret_s8_s32(vdup_n_s32(x)));
            let (x_low, x_high) = (vget_low_s16(x), vget_high_s16(x));
            std::array::from_fn(|i| {
                let low = vreinterpretq_s16_u16(vmovl_u8(vget_low_u8(codes[i])));
                let high = vreinterpretq_s16_u16(vmovl_u8(vget_high_u8(codes[i])));
                let [a, b, c, d] = [
                    vmull_s16(vget_low_s16(low), x_low),
                    vmull_s16(vget_high_s16(low), x_high),
                    vmull_s16(vget_low_s16(high), x_low),
                    vmull_s16(vget_high_s16(high), x_high),
                ];
                vaddq_s32(counts[i], vpaddq_s32(vpaddq_s32(a, b), vpaddq_s32(c, d)))
            })
        })
    }
    #[inline(always)]
    fn block_zero(self) -> Self::Block {
        intrinsic!([vdupq_n_f32(0.0); 4])
    }
    #[inline(always)]
    fn block_f16(self, bytes: &[u8]) -> Self::Block {
        let bytes = &bytes[..32];
        std::array::from_fn(|i| {
            intrinsic!(widen(vreinterpret_u16_u8(vld1_u8(bytes[8 * i..].as_ptr()))))
        })
    }
    #[inline(always)]
    fn add_counts(
        self,
        sums: Self::Block,
        counts: Self::Counts,
        scale: Self::Block,
        x_scale: f32,
    ) -> Self::Block {
        std::array::from_fn(|i| {
            intrinsic!({
                let scale = vmulq_n_f32(scale[i], x_scale);
                vfmaq_f32(sums[i], vcvtq_f32_s32(counts[i]), scale)
            })
        })
    }
    #[inline(always)]
    fn add_block(self, sums: Self::Block, block: Self::Block, factor: f32) -> Self::Block {
        std::array::from_fn(|i| intrinsic!(vfmaq_n_f32(sums[i], block[i], factor)))
    }
    #[inline(always)]
    fn block(self, x: &[f32]) -> Self::Block {
        let x = &x[..16];
        std::array::from_fn(|i| intrinsic!(vld1q_f32(x[4 * i..].as_ptr())))
    }
    #[inline(always)]
    fn store_block(self, block: Self::Block, out: &mut [f32]) {
        for (out, block) in out[..16].chunks_exact_mut(4).zip(block) {
            let out = &mut out[..4];
            intrinsic!(vst1q_f32(out.as_mut_ptr(), block));
        }
    }
    #[inline(always)]
    fn block_values(self, block: Self::Block) -> [f32; 16] {
        let mut values = [0.0; 16];
        self.store_block(block, &mut values);
        values
    }

    // The product of unsigned and signed bytes is not in every processor.
    float_sums!(4);
}

impl Neon {
    /// Code `i` of each output's four.
    #[inline(always)]
    fn code(self, codes: [uint8x16_t; 4], i: usize) -> [float32x4_t; 4] {
        codes.map(|codes| {
            intrinsic!({
                let words = vreinterpretq_u32_u8(codes);
                let code = match i {
                    0 => vandq_u32(words, vdupq_n_u32(255)),
                    1 => vandq_u32(vshrq_n_u32::<8>(words), vdupq_n_u32(255)),
                    2 => vandq_u32(vshrq_n_u32::<16>(words), vdupq_n_u32(255)),
                    _ => vshrq_n_u32::<24>(words),
                };
                vcvtq_f32_u32(code)
            })
        })
    }
}
