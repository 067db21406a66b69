//! Products of bf16 in pairs, for which some processors have instructions.
//!
//! Every implementation gives what Intel defines for VDPBF16PS and VCVTNEPS2BF16, whatever the
//! processor's rounding mode is: sums are rounded to the nearest even number, denormal numbers are
//! taken for zero, and denormal results become zero.

use half::bf16;

use super::{CpuPath, Simd};

/// Vector instructions with products of bf16 pairs among them.
pub(crate) trait PairSimd: Simd {
    /// `2·LANES` numbers.
    type Pairs: Copy;

    /// Loads the first `2·LANES` elements.
    fn pairs(self, x: &[bf16]) -> Self::Pairs;
    /// `sums + a·b` of the two numbers of each lane, the second one's product first; each of the
    /// two sums is rounded once.
    fn add_pairs(self, sums: Self::V, a: Self::Pairs, b: Self::Pairs) -> Self::V;
    /// Stores the nearest bf16 into the first `LANES` elements.
    fn store_rounded(self, x: Self::V, out: &mut [bf16]);

    /// Loads `x`, which is at most `2·LANES` long, with zeros after it.
    #[inline(always)]
    fn pairs_up_to(self, x: &[bf16]) -> Self::Pairs {
        if x.len() == 2 * Self::LANES {
            return self.pairs(x);
        }
        let mut padded = [bf16::ZERO; 32];
        padded[..x.len()].copy_from_slice(x);
        self.pairs(&padded)
    }

    /// Stores the nearest bf16 of as many elements as `out` holds, at most a vector.
    #[inline(always)]
    fn store_rounded_up_to(self, x: Self::V, out: &mut [bf16]) {
        if out.len() == Self::LANES {
            return self.store_rounded(x, out);
        }
        let mut padded = [bf16::ZERO; 16];
        self.store_rounded(x, &mut padded);
        out.copy_from_slice(&padded[..out.len()]);
    }
}

/// A computation for instructions that multiply pairs; as [`super::Kernel`] otherwise.
pub(crate) trait PairKernel {
    type Output;
    fn run<S: PairSimd>(self, simd: S) -> Self::Output;
}

/// Runs `kernel` with the instructions of `path`.
///
/// # Panics
/// When `path` does not multiply pairs ([`CpuPath::rounds_inputs`]), or is not available.
pub(crate) fn dispatch_pairs<K: PairKernel>(path: CpuPath, kernel: K) -> K::Output {
    match path {
        #[cfg(target_arch = "x86_64")]
        CpuPath::Avx512Bf16 => super::avx512::run_pairs(kernel),
        CpuPath::PortableBf16 => kernel.run(super::portable::Portable),
        other => unreachable!("the {other} path multiplies no pairs"),
    }
}

/// `sum + a·b`, rounded once.
#[inline(always)]
pub(super) fn add_product(sum: f32, a: bf16, b: bf16) -> f32 {
    let widen = |x: bf16| f64::from(without_denormal(f32::from_bits(u32::from(x.to_bits()) << 16)));
    // The product is exact in f64. Its sum is rounded there and again to f32, to the same number
    // as at once: f64 has more than twice the bits of what is added up (Figueroa, "When is double
    // rounding innocuous?", 1995).
    let sum = f64::from(without_denormal(sum)) + widen(a) * widen(b);
    without_denormal(sum as f32)
}

/// The nearest bf16.
#[inline(always)]
pub(super) fn rounded(x: f32) -> bf16 {
    bf16::from_f32(without_denormal(x))
}

/// Zero, of the same sign, for a denormal number.
#[inline(always)]
fn without_denormal(x: f32) -> f32 {
    if x.abs() < f32::MIN_POSITIVE { 0f32.copysign(x) } else { x }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Paths that multiply pairs.
    fn paths() -> impl Iterator<Item = CpuPath> {
        CpuPath::available().filter(|path| path.rounds_inputs())
    }

    /// Sums of 64 products, in pairs.
    struct Sums<'a>(&'a [f32; 32], [&'a [bf16; 64]; 2]);

    impl PairKernel for Sums<'_> {
        type Output = Vec<f32>;
        #[inline(always)]
        fn run<S: PairSimd>(self, simd: S) -> Vec<f32> {
            let Self(sums, [a, b]) = self;
            let mut out = vec![0.0; sums.len()];
            for (i, out) in out.chunks_exact_mut(S::LANES).enumerate() {
                let (at, of) = (i * S::LANES, 2 * i * S::LANES);
                let (a, b) = (simd.pairs(&a[of..]), simd.pairs(&b[of..]));
                simd.store(simd.add_pairs(simd.load(&sums[at..]), a, b), out);
            }
            out
        }
    }

    struct Rounded<'a>(&'a [f32]);

    impl PairKernel for Rounded<'_> {
        type Output = Vec<bf16>;
        #[inline(always)]
        fn run<S: PairSimd>(self, simd: S) -> Vec<bf16> {
            let mut out = vec![bf16::ZERO; self.0.len()];
            for (x, out) in self.0.chunks(S::LANES).zip(out.chunks_mut(S::LANES)) {
                simd.store_rounded_up_to(simd.load_up_to(x), out);
            }
            out
        }
    }

    /// Numbers of every kind and size: bits of any value, and those that rounding is about.
    fn numbers() -> impl Strategy<Value = f32> {
        prop_oneof![
            8 => any::<u32>().prop_map(f32::from_bits),
            8 => -2.0f32..2.0,
            1 => prop::sample::select(vec![
                0.0,
                -0.0,
                f32::INFINITY,
                f32::NEG_INFINITY,
                f32::NAN,
                f32::MIN_POSITIVE,
                f32::MAX,
                // Below, at and above the middle of two bf16.
                f32::from_bits(0x3f80_7fff),
                f32::from_bits(0x3f80_8000),
                f32::from_bits(0x3f81_8000),
                f32::from_bits(0x3f80_8001),
                // Rounds to infinity.
                f32::from_bits(0x7f7f_8000),
                // Denormal; the first would round up to a number that is not.
                f32::from_bits(0x007f_ffff),
                f32::from_bits(0x8000_0001),
            ]),
        ]
    }

    /// The same number, or both none: processors choose among NaNs by rules of their own.
    fn same(a: f32, b: f32) -> bool {
        a.to_bits() == b.to_bits() || a.is_nan() && b.is_nan()
    }

    proptest! {
        #[test]
        fn pairs_are_added_up_as_the_instruction_is_defined(
            sums in prop::array::uniform32(numbers()),
            a in prop::collection::vec(numbers(), 64),
            b in prop::collection::vec(numbers(), 64),
        ) {
            let narrow = |x: &[f32]| -> [bf16; 64] {
                // Cut off, not rounded: what is stored may be denormal, too.
                std::array::from_fn(|i| bf16::from_bits((x[i].to_bits() >> 16) as u16))
            };
            let (a, b) = (narrow(&a), narrow(&b));
            for path in paths() {
                let found = dispatch_pairs(path, Sums(&sums, [&a, &b]));
                for (lane, (&sum, &found)) in sums.iter().zip(&found).enumerate() {
                    // Fused multiply-adds, the upper number's first, denormals left out.
                    let expected = [2 * lane + 1, 2 * lane].iter().fold(sum, |sum, &i| {
                        let [a, b] = [a[i], b[i]].map(|x| without_denormal(x.to_f32()));
                        without_denormal(a.mul_add(b, without_denormal(sum)))
                    });
                    prop_assert!(same(found, expected), "{path}: {found:e}, not {expected:e}");
                }
            }
        }

        #[test]
        fn numbers_become_the_nearest_bf16(x in prop::collection::vec(numbers(), 1..40)) {
            for path in paths() {
                let found = dispatch_pairs(path, Rounded(&x));
                for (&x, &found) in x.iter().zip(&found) {
                    // Half a step of a bf16 up, less if that ends between an even one and the next.
                    let odd = x.to_bits() >> 16 & 1;
                    let bits = x.to_bits().wrapping_add(0x7fff + odd) >> 16 << 16;
                    let expected = match x {
                        x if x.is_nan() => f32::NAN,
                        x if x.is_normal() || x == 0.0 => f32::from_bits(bits),
                        x if x.is_infinite() => x,
                        x => 0f32.copysign(x),
                    };
                    prop_assert!(same(found.to_f32(), expected), "{path}: {x:e} became {found:e}");
                }
            }
        }
    }
}
