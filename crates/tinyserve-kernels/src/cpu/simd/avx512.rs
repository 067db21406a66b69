//! 512-bit vectors.

use std::arch::x86_64::*;

use half::{bf16, f16};

use super::{BlockWords, Kernel, PairKernel, PairSimd, Simd};

// A factor that is added to [`SPLIT`] is rounded to a whole number of at most [`LARGEST`] and split
// into signed bytes, `low + 256·middle + 65,536·high`: then its products with codes are exact, and
// one instruction makes sixty-four of them.

/// Signed bytes that a factor is split into.
const PIECES: usize = 3;
/// The largest number that is split: its sum with [`SPLIT`] keeps its exponent.
const LARGEST: f32 = 4_161_000.0;
/// 1.5·2²³, which rounds what is added to it to a whole number in the lowest bits of the sum, and
/// what makes the two lower bytes of these bits 128 larger than the signed pieces.
const SPLIT: f32 = 12_582_912.0 + 32_896.0;
/// What the third byte is larger by than the signed piece: the lower byte of the exponent.
const ABOVE: u8 = 0x40;

/// Proof that the processor has AVX-512 F, BW, VL and DQ, and VNNI and BF16 if it says so.
#[derive(Clone, Copy)]
pub(super) struct Avx512<const VNNI: bool, const BF16: bool = false> {
    _only_made_after_detection: (),
}

pub(super) fn run<K: Kernel>(kernel: K) -> K::Output {
    let vnni = K::INTEGERS && is_x86_feature_detected!("avx512vnni");
    run_with(kernel, vnni)
}

/// As on a processor that has no VNNI.
#[cfg(test)]
pub(in super::super) fn run_without_vnni<K: Kernel>(kernel: K) -> K::Output {
    run_with(kernel, false)
}

fn run_with<K: Kernel>(kernel: K, vnni: bool) -> K::Output {
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c")]
    fn compiled<K: Kernel>(kernel: K, simd: Avx512<false>) -> K::Output {
        kernel.run(simd)
    }
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma,f16c")]
    fn with_vnni<K: Kernel>(kernel: K, simd: Avx512<true>) -> K::Output {
        kernel.run(simd)
    }
    assert!(super::CpuPath::Avx512.is_available(), "this processor has no AVX-512");
    if vnni {
        // SAFETY: the processor has the features, as the assertion and the caller made sure.
        return unsafe { with_vnni(kernel, Avx512 { _only_made_after_detection: () }) };
    }
    // SAFETY: the processor has the features, as the assertion above made sure.
    unsafe { compiled(kernel, Avx512 { _only_made_after_detection: () }) }
}

/// Runs products of bf16 pairs.
pub(super) fn run_pairs<K: PairKernel>(kernel: K) -> K::Output {
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,avx2,fma,f16c")]
    fn compiled<K: PairKernel>(kernel: K, simd: Avx512<false, true>) -> K::Output {
        kernel.run(simd)
    }
    assert!(super::CpuPath::Avx512Bf16.is_available(), "this processor has no AVX-512 BF16");
    // SAFETY: the processor has the features, as the assertion above made sure.
    unsafe { compiled(kernel, Avx512 { _only_made_after_detection: () }) }
}

/// Calls intrinsics from methods of a type whose existence proves that the processor has them.
macro_rules! intrinsic {
    ($call:expr) => {
        // SAFETY: a value of this type exists, so the processor has the instructions; intrinsics
        // that read or write memory get a pointer to a slice whose length was checked before.
        unsafe { $call }
    };
}

/// The four quarters of a vector added up.
///
/// # Safety
/// The processor has AVX-512 F and DQ.
#[inline(always)]
unsafe fn quarters(x: __m512) -> __m128 {
    // SAFETY: the caller promises the instructions.
    unsafe {
        let eight = _mm256_add_ps(_mm512_castps512_ps256(x), _mm512_extractf32x8_ps::<1>(x));
        _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps::<1>(eight))
    }
}

impl<const VNNI: bool, const BF16: bool> Simd for Avx512<VNNI, BF16> {
    type V = __m512;
    const LANES: usize = 16;

    #[inline(always)]
    fn splat(self, x: f32) -> __m512 {
        intrinsic!(_mm512_set1_ps(x))
    }
    #[inline(always)]
    fn load(self, x: &[f32]) -> __m512 {
        let x = &x[..16];
        intrinsic!(_mm512_loadu_ps(x.as_ptr()))
    }
    #[inline(always)]
    fn load_f16(self, x: &[f16]) -> __m512 {
        let x = &x[..16];
        // Rounding as usual, which there is none of: told to suppress exceptions, as the plain
        // intrinsic does, the instruction could not read memory, and would need a shuffle.
        intrinsic!(_mm512_cvt_roundph_ps::<_MM_FROUND_CUR_DIRECTION>(_mm256_loadu_si256(
            x.as_ptr().cast()
        )))
    }
    #[inline(always)]
    fn load_bf16(self, x: &[bf16]) -> __m512 {
        let x = &x[..16];
        intrinsic!({
            let halves = _mm512_cvtepu16_epi32(_mm256_loadu_si256(x.as_ptr().cast()));
            _mm512_castsi512_ps(_mm512_slli_epi32::<16>(halves))
        })
    }
    #[inline(always)]
    fn store(self, x: __m512, out: &mut [f32]) {
        let out = &mut out[..16];
        intrinsic!(_mm512_storeu_ps(out.as_mut_ptr(), x));
    }
    #[inline(always)]
    fn add(self, a: __m512, b: __m512) -> __m512 {
        intrinsic!(_mm512_add_ps(a, b))
    }
    #[inline(always)]
    fn sub(self, a: __m512, b: __m512) -> __m512 {
        intrinsic!(_mm512_sub_ps(a, b))
    }
    #[inline(always)]
    fn mul(self, a: __m512, b: __m512) -> __m512 {
        intrinsic!(_mm512_mul_ps(a, b))
    }
    #[inline(always)]
    fn div(self, a: __m512, b: __m512) -> __m512 {
        intrinsic!(_mm512_div_ps(a, b))
    }
    #[inline(always)]
    fn max(self, a: __m512, b: __m512) -> __m512 {
        intrinsic!(_mm512_max_ps(a, b))
    }
    #[inline(always)]
    fn min(self, a: __m512, b: __m512) -> __m512 {
        intrinsic!(_mm512_min_ps(a, b))
    }
    #[inline(always)]
    fn mul_add(self, a: __m512, b: __m512, c: __m512) -> __m512 {
        intrinsic!(_mm512_fmadd_ps(a, b, c))
    }
    #[inline(always)]
    fn round(self, x: __m512) -> __m512 {
        intrinsic!(_mm512_roundscale_ps::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(x))
    }
    #[inline(always)]
    fn scale_by_power(self, x: __m512, n: __m512) -> __m512 {
        intrinsic!(_mm512_scalef_ps(x, n))
    }
    #[inline(always)]
    fn sum(self, x: __m512) -> f32 {
        intrinsic!({
            let four = quarters(x);
            let two = _mm_add_ps(four, _mm_movehl_ps(four, four));
            _mm_cvtss_f32(_mm_add_ss(two, _mm_shuffle_ps::<1>(two, two)))
        })
    }
    #[inline(always)]
    fn sums<const N: usize>(self, x: &[__m512; N]) -> [f32; N] {
        let mut sums = [0.0; N];
        let (fours, rest) = x.as_chunks::<4>();
        let (out, out_rest) = sums.as_chunks_mut::<4>();
        for (x, out) in fours.iter().zip(out) {
            *out = four_sums(self, x);
        }
        for (&x, out) in rest.iter().zip(out_rest) {
            *out = self.sum(x);
        }
        sums
    }
    #[inline(always)]
    fn highest(self, x: __m512) -> f32 {
        intrinsic!(_mm512_reduce_max_ps(x))
    }
    #[inline(always)]
    fn at_least(self, x: __m512, threshold: __m512) -> u32 {
        u32::from(intrinsic!(_mm512_cmp_ps_mask::<_CMP_GE_OQ>(x, threshold)))
    }
    #[inline(always)]
    fn prefetch<T>(self, address: *const T) {
        // A hint never faults, wherever it points.
        intrinsic!(_mm_prefetch::<_MM_HINT_T1>(address.cast()));
    }

    #[inline(always)]
    fn store_bytes(self, x: __m512, out: &mut [u8]) {
        let out = &mut out[..16];
        intrinsic!({
            let bytes = _mm512_cvtepi32_epi8(_mm512_cvttps_epi32(x));
            _mm_storeu_si128(out.as_mut_ptr().cast(), bytes);
        });
    }
    type Codes = __m512i;
    type Counts = __m512i;
    type Block = __m512;

    #[inline(always)]
    fn codes(self, bytes: &[u8]) -> __m512i {
        let bytes = &bytes[..64];
        intrinsic!(_mm512_loadu_si512(bytes.as_ptr().cast()))
    }
    #[inline(always)]
    fn low_halves(self, codes: __m512i) -> __m512i {
        intrinsic!(_mm512_and_si512(codes, _mm512_set1_epi8(15)))
    }
    #[inline(always)]
    fn high_halves(self, codes: __m512i) -> __m512i {
        self.low_halves(intrinsic!(_mm512_srli_epi16::<4>(codes)))
    }
    #[inline(always)]
    fn counts(self, x: i32) -> __m512i {
        intrinsic!(_mm512_set1_epi32(x))
    }
    #[inline(always)]
    fn add_products(self, counts: __m512i, codes: __m512i, x: i32) -> __m512i {
        if VNNI {
            return intrinsic!(_mm512_dpbusd_epi32(counts, codes, _mm512_set1_epi32(x)));
        }
        // Products of bytes overflow 16 bits in pairs: even and odd ones go separate ways.
        intrinsic!({
            let x = _mm512_set1_epi32(x);
            let (even, odd) =
                (_mm512_and_si512(codes, _mm512_set1_epi16(255)), _mm512_srli_epi16::<8>(codes));
            let x_even = _mm512_srai_epi16::<8>(_mm512_slli_epi16::<8>(x));
            let even = _mm512_madd_epi16(even, x_even);
            let odd = _mm512_madd_epi16(odd, _mm512_srai_epi16::<8>(x));
            _mm512_add_epi32(counts, _mm512_add_epi32(even, odd))
        })
    }
    #[inline(always)]
    fn block_zero(self) -> __m512 {
        self.splat(0.0)
    }
    #[inline(always)]
    fn block_f16(self, bytes: &[u8]) -> __m512 {
        let bytes = &bytes[..32];
        intrinsic!(_mm512_cvt_roundph_ps::<_MM_FROUND_CUR_DIRECTION>(_mm256_loadu_si256(
            bytes.as_ptr().cast()
        )))
    }
    #[inline(always)]
    fn add_counts(self, sums: __m512, counts: __m512i, scale: __m512, x_scale: f32) -> __m512 {
        let counts = intrinsic!(_mm512_cvtepi32_ps(counts));
        self.mul_add(counts, self.mul(scale, self.splat(x_scale)), sums)
    }
    #[inline(always)]
    fn add_block(self, sums: __m512, block: __m512, factor: f32) -> __m512 {
        self.mul_add(block, self.splat(factor), sums)
    }
    #[inline(always)]
    fn block(self, x: &[f32]) -> __m512 {
        self.load(x)
    }
    #[inline(always)]
    fn store_block(self, block: __m512, out: &mut [f32]) {
        self.store(block, out);
    }
    #[inline(always)]
    fn block_values(self, block: __m512) -> [f32; 16] {
        let mut values = [0.0; 16];
        self.store(block, &mut values);
        values
    }

    type Sums = [__m512i; PIECES];
    const QUAD_WORDS: usize = PIECES;
    const LARGEST: f32 = LARGEST;
    const ROUNDING: f32 = SPLIT;
    const SUMS: usize = 8;
    // They are exact.
    const CHAINS: usize = 1;

    #[inline(always)]
    fn no_sums(self) -> [__m512i; PIECES] {
        [self.counts(0); PIECES]
    }
    #[inline(always)]
    fn store_factors(self, factors: __m512, out: &mut [u32]) {
        let out = &mut out[..16];
        intrinsic!({
            // The first bytes of four numbers side by side, then their second ones and so on.
            let order = _mm512_broadcast_i32x4(_mm_setr_epi8(
                0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15,
            ));
            let pieces = _mm512_shuffle_epi8(_mm512_castps_si512(factors), order);
            let above = i32::from_ne_bytes([ABOVE; 4]);
            let flip = i32::from_ne_bytes([0x80; 4]);
            let flip = _mm512_broadcast_i32x4(_mm_setr_epi32(flip, flip, above, 0));
            _mm512_storeu_si512(out.as_mut_ptr().cast(), _mm512_sub_epi8(pieces, flip));
        });
    }
    #[inline(always)]
    fn store_quads(self, factors: &[__m512; 4], out: &mut [BlockWords], at: usize) {
        let (low, out) = out.split_at_mut(1);
        let (middle, high) = out.split_at_mut(1);
        let low = &mut low[0].0[at..][..16];
        let (middle, high) = (&mut middle[0].0[at..][..16], &mut high[0].0[at..][..16]);
        intrinsic!({
            let (a, b) = (_mm512_castps_si512(factors[0]), _mm512_castps_si512(factors[1]));
            let (c, d) = (_mm512_castps_si512(factors[2]), _mm512_castps_si512(factors[3]));
            let (words, bytes) = (_mm512_set1_epi32(0xffff), _mm512_set1_epi16(0xff));
            // Bits of `x` where the mask has ones, of `y` elsewhere.
            macro_rules! select {
                ($mask:ident, $x:expr, $y:expr) => {
                    _mm512_ternarylogic_epi32::<0xca>($mask, $x, $y)
                };
            }
            let (ac, bd) = (
                select!(words, a, _mm512_slli_epi32::<16>(c)),
                select!(words, b, _mm512_slli_epi32::<16>(d)),
            );
            let (ac_high, bd_high) = (
                select!(words, _mm512_srli_epi32::<16>(a), c),
                select!(words, _mm512_srli_epi32::<16>(b), d),
            );
            let flip = _mm512_set1_epi8(-128);
            let l = select!(bytes, ac, _mm512_slli_epi16::<8>(bd));
            let m = select!(bytes, _mm512_srli_epi16::<8>(ac), bd);
            let h = select!(bytes, ac_high, _mm512_slli_epi16::<8>(bd_high));
            let h = _mm512_sub_epi8(h, _mm512_set1_epi8(ABOVE.cast_signed()));
            _mm512_storeu_si512(low.as_mut_ptr().cast(), _mm512_xor_si512(l, flip));
            _mm512_storeu_si512(middle.as_mut_ptr().cast(), _mm512_xor_si512(m, flip));
            _mm512_storeu_si512(high.as_mut_ptr().cast(), h);
        });
    }
    #[inline(always)]
    fn add_quads<const Q: usize, const B: usize>(
        self,
        sums: &mut [[[__m512i; PIECES]; B]; Q],
        codes: &[__m512i; B],
        word: impl Fn(usize, usize) -> u32,
    ) {
        for (query, sums) in sums.iter_mut().enumerate() {
            for piece in 0..PIECES {
                let x = word(query, piece).cast_signed();
                for (sums, &codes) in sums.iter_mut().zip(codes) {
                    sums[piece] = self.add_products(sums[piece], codes, x);
                }
            }
        }
    }
    #[inline(always)]
    fn join_sums(self, a: [__m512i; PIECES], b: [__m512i; PIECES]) -> [__m512i; PIECES] {
        let mut sums = a;
        for (sum, b) in sums.iter_mut().zip(b) {
            *sum = intrinsic!(_mm512_add_epi32(*sum, b));
        }
        sums
    }
    #[inline(always)]
    fn totals(self, sums: [__m512i; PIECES], offset: f32, unit: f32) -> __m512 {
        let mut total = self.splat(offset);
        let mut unit = unit;
        for counts in sums {
            let counts = intrinsic!(_mm512_cvtepi32_ps(counts));
            total = self.add_block(total, counts, unit);
            unit *= 256.0;
        }
        total
    }
}

impl PairSimd for Avx512<false, true> {
    type Pairs = __m512bh;

    #[inline(always)]
    fn pairs(self, x: &[bf16]) -> __m512bh {
        let x = &x[..32];
        // SAFETY: 32 numbers of 16 bits are as long as the vector, of which any bits are one.
        unsafe { x.as_ptr().cast::<__m512bh>().read_unaligned() }
    }
    #[inline(always)]
    fn add_pairs(self, sums: __m512, a: __m512bh, b: __m512bh) -> __m512 {
        intrinsic!(_mm512_dpbf16_ps(sums, a, b))
    }
    #[inline(always)]
    fn store_rounded(self, x: __m512, out: &mut [bf16]) {
        let out = &mut out[..16];
        let rounded = intrinsic!(_mm512_cvtneps_pbh(x));
        // SAFETY: sixteen numbers of 16 bits are as long as the vector, and any bits are such.
        unsafe { out.as_mut_ptr().cast::<__m256bh>().write_unaligned(rounded) }
    }
}

/// The tree of [`Simd::sum`], for four vectors at once: halves, quarters, pairs, one.
#[inline(always)]
fn four_sums<S: Simd<V = __m512>>(simd: S, &[a, b, c, d]: &[__m512; 4]) -> [f32; 4] {
    let mut sums = [0.0; 16];
    let four = intrinsic!({
        let halves = |a, b| {
            let (low, high) =
                (_mm512_shuffle_f32x4::<0x44>(a, b), _mm512_shuffle_f32x4::<0xee>(a, b));
            _mm512_add_ps(low, high)
        };
        let (ab, cd) = (halves(a, b), halves(c, d));
        let four = _mm512_add_ps(
            _mm512_shuffle_f32x4::<0x88>(ab, cd),
            _mm512_shuffle_f32x4::<0xdd>(ab, cd),
        );
        let two = _mm512_add_ps(four, _mm512_permute_ps::<0x4e>(four));
        let one = _mm512_add_ps(two, _mm512_permute_ps::<0xb1>(two));
        // Every fourth element, side by side.
        _mm512_maskz_compress_ps(0x1111, one)
    });
    simd.store(four, &mut sums);
    [sums[0], sums[1], sums[2], sums[3]]
}
