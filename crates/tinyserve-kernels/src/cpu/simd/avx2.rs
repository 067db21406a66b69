//! 256-bit vectors with FMA and half-precision conversion.

use std::arch::x86_64::*;

use half::{bf16, f16};

use super::sums::float_sums;
use super::{BlockWords, Kernel, Simd};

/// Proof that the processor has AVX2, FMA and F16C.
#[derive(Clone, Copy)]
pub(super) struct Avx2 {
    _only_made_after_detection: (),
}

pub(super) fn run<K: Kernel>(kernel: K) -> K::Output {
    #[target_feature(enable = "avx2,fma,f16c")]
    fn compiled<K: Kernel>(kernel: K, simd: Avx2) -> K::Output {
        kernel.run(simd)
    }
    assert!(super::CpuPath::Avx2.is_available(), "this processor has no AVX2");
    // SAFETY: the processor has the features, as the line above made sure.
    unsafe { compiled(kernel, Avx2 { _only_made_after_detection: () }) }
}

/// Calls intrinsics from methods of a type whose existence proves that the processor has them.
macro_rules! intrinsic {
    ($call:expr) => {
        // SAFETY: a value of this type exists, so the processor has the instructions; intrinsics
        // that read or write memory get a pointer to a slice whose length was checked before.
        unsafe { $call }
    };
}

/// The two halves of a vector added up.
///
/// # Safety
/// The processor has AVX.
#[inline(always)]
unsafe fn halves(x: __m256) -> __m128 {
    // SAFETY: the caller promises the instructions.
    unsafe { _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps::<1>(x)) }
}

impl Simd for Avx2 {
    type V = __m256;
    const LANES: usize = 8;

    #[inline(always)]
    fn splat(self, x: f32) -> __m256 {
        intrinsic!(_mm256_set1_ps(x))
    }
    #[inline(always)]
    fn load(self, x: &[f32]) -> __m256 {
        let x = &x[..8];
        intrinsic!(_mm256_loadu_ps(x.as_ptr()))
    }
    #[inline(always)]
    fn load_f16(self, x: &[f16]) -> __m256 {
        let x = &x[..8];
        intrinsic!(_mm256_cvtph_ps(_mm_loadu_si128(x.as_ptr().cast())))
    }
    #[inline(always)]
    fn load_bf16(self, x: &[bf16]) -> __m256 {
        let x = &x[..8];
        intrinsic!({
            let halves = _mm256_cvtepu16_epi32(_mm_loadu_si128(x.as_ptr().cast()));
            _mm256_castsi256_ps(_mm256_slli_epi32::<16>(halves))
        })
    }
    #[inline(always)]
    fn store(self, x: __m256, out: &mut [f32]) {
        let out = &mut out[..8];
        intrinsic!(_mm256_storeu_ps(out.as_mut_ptr(), x));
    }
    #[inline(always)]
    fn add(self, a: __m256, b: __m256) -> __m256 {
        intrinsic!(_mm256_add_ps(a, b))
    }
    #[inline(always)]
    fn sub(self, a: __m256, b: __m256) -> __m256 {
        intrinsic!(_mm256_sub_ps(a, b))
    }
    #[inline(always)]
    fn mul(self, a: __m256, b: __m256) -> __m256 {
        intrinsic!(_mm256_mul_ps(a, b))
    }
    #[inline(always)]
    fn div(self, a: __m256, b: __m256) -> __m256 {
        intrinsic!(_mm256_div_ps(a, b))
    }
    #[inline(always)]
    fn max(self, a: __m256, b: __m256) -> __m256 {
        intrinsic!(_mm256_max_ps(a, b))
    }
    #[inline(always)]
    fn min(self, a: __m256, b: __m256) -> __m256 {
        intrinsic!(_mm256_min_ps(a, b))
    }
    #[inline(always)]
    fn mul_add(self, a: __m256, b: __m256, c: __m256) -> __m256 {
        intrinsic!(_mm256_fmadd_ps(a, b, c))
    }
    #[inline(always)]
    fn round(self, x: __m256) -> __m256 {
        intrinsic!(_mm256_round_ps::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(x))
    }
    #[inline(always)]
    fn scale_by_power(self, x: __m256, n: __m256) -> __m256 {
        intrinsic!({
            let exponent = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127));
            _mm256_mul_ps(x, _mm256_castsi256_ps(_mm256_slli_epi32::<23>(exponent)))
        })
    }
    #[inline(always)]
    fn sum(self, x: __m256) -> f32 {
        intrinsic!({
            let four = halves(x);
            let two = _mm_add_ps(four, _mm_movehl_ps(four, four));
            _mm_cvtss_f32(_mm_add_ss(two, _mm_shuffle_ps::<1>(two, two)))
        })
    }
    #[inline(always)]
    fn highest(self, x: __m256) -> f32 {
        intrinsic!({
            let four = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps::<1>(x));
            let two = _mm_max_ps(four, _mm_movehl_ps(four, four));
            _mm_cvtss_f32(_mm_max_ss(two, _mm_shuffle_ps::<1>(two, two)))
        })
    }
    #[inline(always)]
    fn at_least(self, x: __m256, threshold: __m256) -> u32 {
        intrinsic!(_mm256_movemask_ps(_mm256_cmp_ps::<_CMP_GE_OQ>(x, threshold))).cast_unsigned()
    }
    #[inline(always)]
    fn prefetch<T>(self, address: *const T) {
        // A hint never faults, wherever it points.
        intrinsic!(_mm_prefetch::<_MM_HINT_T1>(address.cast()));
    }

    #[inline(always)]
    fn store_bytes(self, x: __m256, out: &mut [u8]) {
        let out = &mut out[..8];
        intrinsic!({
            let words = _mm256_cvttps_epi32(x);
            let (low, high) = (_mm256_castsi256_si128(words), _mm256_extracti128_si256::<1>(words));
            let halves = _mm_packus_epi32(low, high);
            _mm_storel_epi64(out.as_mut_ptr().cast(), _mm_packus_epi16(halves, halves));
        });
    }
    type Codes = [__m256i; 2];
    type Counts = [__m256i; 2];
    type Block = [__m256; 2];

    #[inline(always)]
    fn codes(self, bytes: &[u8]) -> [__m256i; 2] {
        let bytes = &bytes[..64];
        intrinsic!([
            _mm256_loadu_si256(bytes.as_ptr().cast()),
            _mm256_loadu_si256(bytes[32..].as_ptr().cast()),
        ])
    }
    #[inline(always)]
    fn low_halves(self, codes: [__m256i; 2]) -> [__m256i; 2] {
        // Not `map`, which is too large for the compiler to inline it.
        intrinsic!([
            _mm256_and_si256(codes[0], _mm256_set1_epi8(15)),
            _mm256_and_si256(codes[1], _mm256_set1_epi8(15)),
        ])
    }
    #[inline(always)]
    fn high_halves(self, codes: [__m256i; 2]) -> [__m256i; 2] {
        self.low_halves(intrinsic!([
            _mm256_srli_epi16::<4>(codes[0]),
            _mm256_srli_epi16::<4>(codes[1]),
        ]))
    }
    #[inline(always)]
    fn counts(self, x: i32) -> [__m256i; 2] {
        [intrinsic!(_mm256_set1_epi32(x)); 2]
    }
    #[inline(always)]
    fn add_products(self, counts: [__m256i; 2], codes: [__m256i; 2], x: i32) -> [__m256i; 2] {
        // Products of bytes overflow 16 bits in pairs: even and odd ones go separate ways.
        intrinsic!({
            let x = _mm256_set1_epi32(x);
            let x_even = _mm256_srai_epi16::<8>(_mm256_slli_epi16::<8>(x));
            let x_odd = _mm256_srai_epi16::<8>(x);
            let mut sums = counts;
            for (sums, codes) in sums.iter_mut().zip(codes) {
                let even = _mm256_and_si256(codes, _mm256_set1_epi16(255));
                let even = _mm256_madd_epi16(even, x_even);
                let odd = _mm256_madd_epi16(_mm256_srli_epi16::<8>(codes), x_odd);
                *sums = _mm256_add_epi32(*sums, _mm256_add_epi32(even, odd));
            }
            sums
        })
    }
    #[inline(always)]
    fn block_zero(self) -> [__m256; 2] {
        [self.splat(0.0); 2]
    }
    #[inline(always)]
    fn block_f16(self, bytes: &[u8]) -> [__m256; 2] {
        let bytes = &bytes[..32];
        intrinsic!([
            _mm256_cvtph_ps(_mm_loadu_si128(bytes.as_ptr().cast())),
            _mm256_cvtph_ps(_mm_loadu_si128(bytes[16..].as_ptr().cast())),
        ])
    }
    #[inline(always)]
    fn add_counts(
        self,
        sums: [__m256; 2],
        counts: [__m256i; 2],
        scale: [__m256; 2],
        x_scale: f32,
    ) -> [__m256; 2] {
        let x_scale = self.splat(x_scale);
        let [low, high] = self.widen(counts);
        [
            self.mul_add(low, self.mul(scale[0], x_scale), sums[0]),
            self.mul_add(high, self.mul(scale[1], x_scale), sums[1]),
        ]
    }
    #[inline(always)]
    fn add_block(self, sums: [__m256; 2], block: [__m256; 2], factor: f32) -> [__m256; 2] {
        let factor = self.splat(factor);
        [self.mul_add(block[0], factor, sums[0]), self.mul_add(block[1], factor, sums[1])]
    }
    #[inline(always)]
    fn block(self, x: &[f32]) -> [__m256; 2] {
        [self.load(x), self.load(&x[8..])]
    }
    #[inline(always)]
    fn store_block(self, block: [__m256; 2], out: &mut [f32]) {
        self.store(block[0], out);
        self.store(block[1], &mut out[8..]);
    }
    #[inline(always)]
    fn block_values(self, block: [__m256; 2]) -> [f32; 16] {
        let mut values = [0.0; 16];
        self.store(block[0], &mut values);
        self.store(block[1], &mut values[8..]);
        values
    }

    // Bytes are multiplied in pairs only, whose sums overflow: floats are faster.
    float_sums!(4);
}

impl Avx2 {
    /// Whole numbers as floats.
    #[inline(always)]
    fn widen(self, counts: [__m256i; 2]) -> [__m256; 2] {
        intrinsic!([_mm256_cvtepi32_ps(counts[0]), _mm256_cvtepi32_ps(counts[1])])
    }

    /// Code `i` of each output's four.
    #[inline(always)]
    fn code(self, codes: [__m256i; 2], i: usize) -> [__m256; 2] {
        let [a, b] = codes;
        self.widen(intrinsic!({
            let byte = _mm256_set1_epi32(255);
            match i {
                0 => [_mm256_and_si256(a, byte), _mm256_and_si256(b, byte)],
                1 => [
                    _mm256_and_si256(_mm256_srli_epi32::<8>(a), byte),
                    _mm256_and_si256(_mm256_srli_epi32::<8>(b), byte),
                ],
                2 => [
                    _mm256_and_si256(_mm256_srli_epi32::<16>(a), byte),
                    _mm256_and_si256(_mm256_srli_epi32::<16>(b), byte),
                ],
                _ => [_mm256_srli_epi32::<24>(a), _mm256_srli_epi32::<24>(b)],
            }
        }))
    }
}
