//! Vectors as arrays: the compiler maps them to what its target has.

use half::{bf16, f16};

use super::Simd;

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
}
