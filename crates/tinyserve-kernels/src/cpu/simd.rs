//! Vectors of f32, one implementation per instruction set, and the dispatch among them.

use half::{bf16, f16};

use super::path::CpuPath;

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
pub(in crate::cpu) mod avx512;
#[cfg(target_arch = "aarch64")]
mod neon;
mod portable;

/// A set of vector instructions.
///
/// A value of the implementing type is the proof that the processor has them: it is only made by
/// [`dispatch`], after [`CpuPath::is_available`] has been asked.
pub(crate) trait Simd: Copy {
    /// A vector of [`Self::LANES`] f32.
    type V: Copy;
    /// Elements of a vector.
    const LANES: usize;

    fn splat(self, x: f32) -> Self::V;
    /// Loads the first `LANES` elements.
    fn load(self, x: &[f32]) -> Self::V;
    fn load_f16(self, x: &[f16]) -> Self::V;
    fn load_bf16(self, x: &[bf16]) -> Self::V;
    /// Stores into the first `LANES` elements.
    fn store(self, x: Self::V, out: &mut [f32]);
    fn add(self, a: Self::V, b: Self::V) -> Self::V;
    fn sub(self, a: Self::V, b: Self::V) -> Self::V;
    fn mul(self, a: Self::V, b: Self::V) -> Self::V;
    fn div(self, a: Self::V, b: Self::V) -> Self::V;
    /// The larger; `b` when one is NaN, as x86 has it.
    fn max(self, a: Self::V, b: Self::V) -> Self::V;
    /// The smaller; `b` when one is NaN.
    fn min(self, a: Self::V, b: Self::V) -> Self::V;
    /// `a·b + c`.
    fn mul_add(self, a: Self::V, b: Self::V, c: Self::V) -> Self::V;
    /// The nearest whole numbers.
    fn round(self, x: Self::V) -> Self::V;
    /// `x·2^n` for whole `n` of −126 to 127.
    fn scale_by_power(self, x: Self::V, n: Self::V) -> Self::V;
    /// The sum of all elements.
    fn sum(self, x: Self::V) -> f32;
    /// [`Self::sum`] of each vector, to the last bit.
    #[inline(always)]
    fn sums<const N: usize>(self, x: &[Self::V; N]) -> [f32; N] {
        std::array::from_fn(|i| self.sum(x[i]))
    }
    /// The largest element.
    fn highest(self, x: Self::V) -> f32;
    /// Asks for the cache line at `address`, which need not be one that may be read.
    fn prefetch<T>(self, address: *const T);

    // Products in integers, for blocks of sixteen outputs side by side.

    /// 64 unsigned codes: four inputs of each output of a block.
    type Codes: Copy;
    /// A whole number for each output of a block.
    type Counts: Copy;
    /// An f32 for each output of a block.
    type Block: Copy;

    /// Loads the first 64 codes.
    fn codes(self, bytes: &[u8]) -> Self::Codes;
    /// The lower four bits of each code.
    fn low_halves(self, codes: Self::Codes) -> Self::Codes;
    /// The upper four bits of each code.
    fn high_halves(self, codes: Self::Codes) -> Self::Codes;
    /// `x` for every output.
    fn counts(self, x: i32) -> Self::Counts;
    /// Adds the products of each output's four codes with the four signed bytes of `x`, exactly.
    fn add_products(self, counts: Self::Counts, codes: Self::Codes, x: i32) -> Self::Counts;
    /// Zero for every output.
    fn block_zero(self) -> Self::Block;
    /// Widens the first sixteen little-endian f16.
    fn block_f16(self, bytes: &[u8]) -> Self::Block;
    /// `sums + counts·(scale·x_scale)`.
    fn add_counts(
        self,
        sums: Self::Block,
        counts: Self::Counts,
        scale: Self::Block,
        x_scale: f32,
    ) -> Self::Block;
    /// `sums + block·factor`.
    fn add_block(self, sums: Self::Block, block: Self::Block, factor: f32) -> Self::Block;
    /// The first sixteen numbers of `x`.
    fn block(self, x: &[f32]) -> Self::Block;
    /// The numbers of a block.
    fn block_values(self, block: Self::Block) -> [f32; 16];

    /// The elements of `x` and zeros after them; `x` is shorter than a vector.
    #[inline(always)]
    fn load_tail<E: Element>(self, x: &[E]) -> Self::V {
        let mut padded = [E::default(); 16];
        padded[..x.len()].copy_from_slice(x);
        E::load(self, &padded)
    }

    /// Loads `x`, which is at most a vector long, with zeros after it.
    #[inline(always)]
    fn load_up_to<E: Element>(self, x: &[E]) -> Self::V {
        if x.len() == Self::LANES { E::load(self, x) } else { self.load_tail(x) }
    }

    /// Stores as many elements as `out` holds, at most a vector.
    #[inline(always)]
    fn store_up_to(self, x: Self::V, out: &mut [f32]) {
        if out.len() == Self::LANES { self.store(x, out) } else { self.store_tail(x, out) }
    }

    /// Stores as many elements as `out` holds; `out` is shorter than a vector.
    #[inline(always)]
    fn store_tail(self, x: Self::V, out: &mut [f32]) {
        let mut padded = [0.0; 16];
        self.store(x, &mut padded);
        out.copy_from_slice(&padded[..out.len()]);
    }

    /// `e^x` to about one unit in the last place; about 1e-38 far below; NaN for NaN.
    #[inline(always)]
    fn exp(self, x: Self::V) -> Self::V {
        // e^x = 2^n · e^r with |r| ≤ ln 2 / 2; ln 2 in two parts keeps r exact, and the
        // polynomial for e^r is Cephes' expf.
        let x = self.max(self.splat(-87.3), self.min(self.splat(88.0), x));
        let n = self.round(self.mul(x, self.splat(std::f32::consts::LOG2_E)));
        let r = self.mul_add(n, self.splat(-0.693_359_4), x);
        let r = self.mul_add(n, self.splat(2.121_944_4e-4), r);
        let mut p = self.splat(1.987_569_2e-4);
        for c in [1.398_199_9e-3, 8.333_452e-3, 4.166_579_6e-2, 0.166_666_65, 0.5] {
            p = self.mul_add(p, r, self.splat(c));
        }
        let e = self.add(self.mul_add(self.mul(r, r), p, r), self.splat(1.0));
        self.scale_by_power(e, n)
    }
}

/// A stored element that vectors can be loaded from.
pub(crate) trait Element: bytemuck::Pod + Default + Send + Sync {
    /// Loads the first `S::LANES` elements, widened.
    fn load<S: Simd>(simd: S, x: &[Self]) -> S::V;
}

impl Element for f32 {
    #[inline(always)]
    fn load<S: Simd>(simd: S, x: &[Self]) -> S::V {
        simd.load(x)
    }
}

impl Element for f16 {
    #[inline(always)]
    fn load<S: Simd>(simd: S, x: &[Self]) -> S::V {
        simd.load_f16(x)
    }
}

impl Element for bf16 {
    #[inline(always)]
    fn load<S: Simd>(simd: S, x: &[Self]) -> S::V {
        simd.load_bf16(x)
    }
}

/// A computation that can be compiled for any instruction set.
///
/// `run` and what it calls with `simd` are `#[inline(always)]`: only inlined into the function
/// that [`dispatch`] compiles for an instruction set do the vectors become instructions.
pub(crate) trait Kernel {
    type Output;
    /// Whether it multiplies codes, for which some processors have instructions of their own.
    #[cfg_attr(not(target_arch = "x86_64"), expect(dead_code, reason = "x86 asks"))]
    const INTEGERS: bool = false;
    fn run<S: Simd>(self, simd: S) -> Self::Output;
}

/// Runs `kernel` with the instructions of `path`.
///
/// # Panics
/// When `path` is [`CpuPath::Scalar`], which has code of its own, or not available.
pub(crate) fn dispatch<K: Kernel>(path: CpuPath, kernel: K) -> K::Output {
    match path {
        #[cfg(target_arch = "x86_64")]
        CpuPath::Avx512 => avx512::run(kernel),
        #[cfg(target_arch = "x86_64")]
        CpuPath::Avx2 => avx2::run(kernel),
        #[cfg(target_arch = "aarch64")]
        CpuPath::Neon => neon::run(kernel),
        CpuPath::Portable => kernel.run(portable::Portable),
        other => unreachable!("the {other} path has no vectors"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Exp<'a>(&'a [f32], &'a mut [f32]);

    impl Kernel for Exp<'_> {
        type Output = ();
        #[inline(always)]
        fn run<S: Simd>(self, simd: S) {
            for (x, out) in self.0.chunks(S::LANES).zip(self.1.chunks_mut(S::LANES)) {
                simd.store_tail(simd.exp(simd.load_tail(x)), out);
            }
        }
    }

    struct Widen<'a, E>(&'a [E], &'a mut [f32]);

    impl<E: Element> Kernel for Widen<'_, E> {
        type Output = ();
        #[inline(always)]
        fn run<S: Simd>(self, simd: S) {
            for (x, out) in self.0.chunks(S::LANES).zip(self.1.chunks_mut(S::LANES)) {
                simd.store(E::load(simd, x), out);
            }
        }
    }

    #[test]
    fn every_half_is_widened_exactly() {
        let halves: Vec<f16> = (0..=u16::MAX).map(f16::from_bits).collect();
        let brains: Vec<bf16> = (0..=u16::MAX).map(bf16::from_bits).collect();
        let same = |wide: f32, expected: f32| {
            wide.to_bits() == expected.to_bits() || wide.is_nan() && expected.is_nan()
        };
        for path in CpuPath::available().skip(1) {
            let mut out = vec![0.0; halves.len()];
            dispatch(path, Widen(&halves, &mut out));
            for (half, &wide) in halves.iter().zip(&out) {
                assert!(same(wide, half.to_f32()), "{path}: {half:?} became {wide}");
            }
            dispatch(path, Widen(&brains, &mut out));
            for (brain, &wide) in brains.iter().zip(&out) {
                assert!(same(wide, brain.to_f32()), "{path}: {brain:?} became {wide}");
            }
        }
    }

    #[test]
    fn exp_is_exact_to_a_few_units() {
        let x: Vec<f32> = (-8700..=8800).map(|i| i as f32 / 100.0).collect();
        for path in CpuPath::available().skip(1) {
            let mut out = vec![0.0; x.len()];
            dispatch(path, Exp(&x, &mut out));
            for (&x, &y) in x.iter().zip(&out) {
                let exact = f64::from(x).exp();
                let error = (f64::from(y) - exact).abs() / exact;
                assert!(error < 3e-7, "{path}: exp({x}) = {y}, error {error:e}");
            }
            let mut far = [1.0; 2];
            dispatch(path, Exp(&[-1e30, f32::NEG_INFINITY], &mut far));
            assert!(far.iter().all(|&y| (0.0..1e-37).contains(&y)), "{path}: {far:?}");
            dispatch(path, Exp(&[f32::NAN, 0.0], &mut far));
            assert!(far[0].is_nan() && far[1] == 1.0, "{path}: {far:?}");
        }
    }
}
