//! Vectors of f32, one implementation per instruction set, and the dispatch among them.

use half::{bf16, f16};

use super::path::CpuPath;

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
pub(in crate::cpu) mod avx512;
#[cfg(target_arch = "aarch64")]
mod neon;
mod pairs;
mod portable;
mod sums;

/// An array of `$n` whose element `$i` is `$value`.
///
/// Not `from_fn` or `map`: their closures may be compiled apart from the function that
/// [`dispatch`] gives an instruction set, and every instruction in them becomes a call.
macro_rules! array {
    ($n:expr, |$i:ident| $value:expr) => {{
        let mut all = {
            let $i = 0;
            [$value; $n]
        };
        for $i in 1..$n {
            all[$i] = $value;
        }
        all
    }};
}

pub(crate) use array;
pub(crate) use pairs::{PairKernel, PairSimd, dispatch_pairs};

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
        let mut sums = [0.0; N];
        for (sum, &x) in sums.iter_mut().zip(x) {
            *sum = self.sum(x);
        }
        sums
    }
    /// The largest element.
    fn highest(self, x: Self::V) -> f32;
    /// A bit for each element of `x` that is at least `threshold`'s, from the lowest on.
    #[inline(always)]
    fn at_least(self, x: Self::V, threshold: Self::V) -> u32 {
        let (mut elements, mut thresholds) = ([0.0; 16], [0.0; 16]);
        self.store(x, &mut elements);
        self.store(threshold, &mut thresholds);
        let bits = elements.iter().zip(&thresholds).take(Self::LANES).enumerate();
        bits.fold(0, |mask, (i, (x, threshold))| mask | u32::from(x >= threshold) << i)
    }
    /// Asks for the cache line at `address`, which need not be one that may be read, and puts it into
    /// the second-level cache: more lines can be on their way there than into the first.
    fn prefetch<T>(self, address: *const T);

    /// Stores the whole part of each element, which is not negative and below 256, as a byte.
    #[inline(always)]
    fn store_bytes(self, x: Self::V, out: &mut [u8]) {
        let mut wide = [0.0; 16];
        self.store(x, &mut wide);
        for (out, x) in out[..Self::LANES].iter_mut().zip(wide) {
            // It fits; what does not saturates.
            *out = x as u8;
        }
    }

    // Products of codes, for blocks of sixteen outputs side by side.

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
    /// Stores a block into the first sixteen elements.
    fn store_block(self, block: Self::Block, out: &mut [f32]);
    /// The numbers of a block.
    fn block_values(self, block: Self::Block) -> [f32; 16];

    // Sums of codes times f32, which are stored as the processor multiplies codes by them: as they
    // are, or split into signed bytes where bytes are what it multiplies fastest.

    /// The sum that each output of a block has so far.
    type Sums: Copy;
    /// Words that four factors take.
    const QUAD_WORDS: usize;
    /// What the largest factor is scaled to.
    const LARGEST: f32;
    /// What is added to a factor before it is stored.
    const ROUNDING: f32;
    /// Sums that the registers hold beside what is added to them.
    const SUMS: usize;
    /// Parts that long sums are made of, where their order changes the result.
    const CHAINS: usize;

    /// Nothing for every output.
    fn no_sums(self) -> Self::Sums;
    /// Stores four factors of each lane, [`Self::ROUNDING`] added, into lanes `at..` of the first
    /// `QUAD_WORDS` of `out`.
    fn store_quads(self, factors: &[Self::V; 4], out: &mut [BlockWords], at: usize);
    /// Stores the factors of `LANES` inputs, [`Self::ROUNDING`] added: for every four inputs four
    /// words, of which the first `QUAD_WORDS` count, into the first `LANES` words of `out`.
    fn store_factors(self, factors: Self::V, out: &mut [u32]);
    /// Adds the products of each output's four codes with the four factors of every query, word `w`
    /// of which is `word(query, w)`.
    fn add_quads<const Q: usize, const B: usize>(
        self,
        sums: &mut [[Self::Sums; B]; Q],
        codes: &[Self::Codes; B],
        word: impl Fn(usize, usize) -> u32,
    );
    /// `a + b`.
    fn join_sums(self, a: Self::Sums, b: Self::Sums) -> Self::Sums;
    /// `offset + unit·sum` of each output.
    fn totals(self, sums: Self::Sums, offset: f32, unit: f32) -> Self::Block;

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

/// Bytes that memory is read by.
pub(crate) const LINE: usize = 64;

/// A word for each output of a block.
#[derive(Debug, Clone, Copy, Default)]
#[repr(align(64))]
pub(crate) struct BlockWords(pub(crate) [u32; 16]);

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
        CpuPath::Avx512 | CpuPath::Avx512Bf16 => avx512::run(kernel),
        #[cfg(target_arch = "x86_64")]
        CpuPath::Avx2 => avx2::run(kernel),
        #[cfg(target_arch = "aarch64")]
        CpuPath::Neon => neon::run(kernel),
        CpuPath::Portable | CpuPath::PortableBf16 => kernel.run(portable::Portable),
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

    /// `out[lane]` is `1 + 2·Σ` of the sixteen factors times the codes `[4, 16 outputs, 4]` of each
    /// output, the factors stored as those of inputs, and as those of one of sixteen lanes.
    struct Sums<'a> {
        factors: &'a [f32; 16],
        codes: &'a [u8; 256],
        out: [&'a mut [f32; 16]; 2],
    }

    impl Kernel for Sums<'_> {
        type Output = ();
        #[inline(always)]
        fn run<S: Simd>(self, simd: S) {
            const LANE: usize = 5;
            let mut of_inputs = [[0; 4]; 4];
            let mut of_lanes = [[BlockWords::default(); 4]; 4];
            let stored = |x: S::V| simd.mul_add(x, simd.splat(S::LARGEST), simd.splat(S::ROUNDING));
            for at in (0..16).step_by(S::LANES) {
                let words = &mut of_inputs.as_flattened_mut()[at..];
                simd.store_factors(stored(simd.load(&self.factors[at..])), words);
                for (quad, out) in of_lanes.iter_mut().enumerate() {
                    let mut factors = [simd.splat(0.0); 4];
                    for (i, factors) in factors.iter_mut().enumerate() {
                        let mut lanes = [-1.0; 16];
                        lanes[LANE] = self.factors[4 * quad + i];
                        *factors = stored(simd.load(&lanes[at..]));
                    }
                    simd.store_quads(&factors, &mut out[..S::QUAD_WORDS], at);
                }
            }
            let mut sums = [[[simd.no_sums()]; 2]; 2];
            for (quad, codes) in self.codes.as_chunks::<64>().0.iter().enumerate() {
                let [even, odd] = &mut sums;
                let sums = if quad % 2 == 0 { even } else { odd };
                simd.add_quads(sums, &[simd.codes(codes)], |query, word| match query {
                    0 => of_inputs[quad][word],
                    _ => of_lanes[quad][word].0[LANE],
                });
            }
            for (query, out) in self.out.into_iter().enumerate() {
                let sum = simd.join_sums(sums[0][query][0], sums[1][query][0]);
                simd.store_block(simd.totals(sum, 1.0, 2.0 / S::LARGEST), out);
            }
        }
    }

    #[test]
    fn codes_times_factors_add_up() {
        let mut codes = [0; 256];
        for (i, code) in codes.iter_mut().enumerate() {
            *code = (i * 89 % 256) as u8;
        }
        let mut ramp = [0.0; 16];
        for (i, factor) in ramp.iter_mut().enumerate() {
            *factor = (i * 7 % 16) as f32 / 7.5 - 1.0;
        }
        let mut near_bytes = [0.0; 16];
        for (i, factor) in near_bytes.iter_mut().enumerate() {
            // Where the parts of a number carry over into each other.
            let whole = [0, 1, 127, 128, 255, 256, 32_767, 32_768, 65_535, 65_536][i % 10];
            *factor = if i % 2 == 0 { whole } else { -whole } as f32 / 4_161_000.0;
        }
        let ends = std::array::from_fn(|i| [1.0, -1.0, 0.0, 1e-20][i % 4]);
        for factors in [ramp, near_bytes, ends] {
            for path in CpuPath::available().skip(1) {
                let [mut of_inputs, mut of_lane] = [[0.0; 16]; 2];
                let out = [&mut of_inputs, &mut of_lane];
                dispatch(path, Sums { factors: &factors, codes: &codes, out });
                for output in 0..16 {
                    let of = |i: usize| f64::from(codes[i / 4 * 64 + 4 * output + i % 4]);
                    let product = |i: usize| f64::from(factors[i]) * of(i);
                    let expected = 1.0 + 2.0 * (0..16).map(product).sum::<f64>();
                    // What is added up is rounded, and each factor to half a step at most.
                    let most = 1.0 + 2.0 * (0..16).map(|i| product(i).abs()).sum::<f64>();
                    let steps = (0..16).map(of).sum::<f64>() / 4_161_000.0;
                    for found in [of_inputs[output], of_lane[output]] {
                        let off = (f64::from(found) - expected).abs();
                        assert!(
                            off <= 1e-6 * most + 0.5 * steps,
                            "{path}: {found}, not {expected}"
                        );
                    }
                }
            }
        }
    }

    struct Bytes<'a>(&'a [f32], &'a mut [u8]);

    impl Kernel for Bytes<'_> {
        type Output = ();
        #[inline(always)]
        fn run<S: Simd>(self, simd: S) {
            let out = self.1.chunks_exact_mut(S::LANES);
            for (x, out) in self.0.chunks_exact(S::LANES).zip(out) {
                simd.store_bytes(simd.load(x), out);
            }
        }
    }

    #[test]
    fn bytes_are_the_whole_parts() {
        let x: Vec<f32> = (0..1024).map(|i| i as f32 / 4.0).collect();
        for path in CpuPath::available().skip(1) {
            let mut bytes = vec![0; x.len()];
            dispatch(path, Bytes(&x, &mut bytes));
            for (i, &byte) in bytes.iter().enumerate() {
                assert_eq!(usize::from(byte), i / 4, "{path}");
            }
        }
    }

    struct AtLeast<'a>(&'a [f32], f32);

    impl Kernel for AtLeast<'_> {
        type Output = Vec<bool>;
        #[inline(always)]
        fn run<S: Simd>(self, simd: S) -> Vec<bool> {
            let mut all = Vec::new();
            for x in self.0.chunks_exact(S::LANES) {
                let mask = simd.at_least(simd.load(x), simd.splat(self.1));
                all.extend((0..32).map(|i| mask >> i & 1 == 1).take(S::LANES));
                assert!(S::LANES == 32 || mask >> S::LANES == 0);
            }
            all
        }
    }

    #[test]
    fn comparisons_have_a_bit_for_each_element() {
        let x: Vec<f32> = (0..64).map(|i| ((i * 37) % 64) as f32 - 30.0).collect();
        let x = [&x[..], &[f32::NAN, f32::INFINITY, -0.0, f32::NEG_INFINITY].repeat(4)].concat();
        for path in CpuPath::available().skip(1) {
            for threshold in [-31.0, 0.0, 5.0, f32::INFINITY] {
                let expected: Vec<bool> = x.iter().map(|&x| x >= threshold).collect();
                assert_eq!(dispatch(path, AtLeast(&x, threshold)), expected, "{path}");
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
