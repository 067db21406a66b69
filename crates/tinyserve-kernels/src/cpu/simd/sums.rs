//! Sums of codes times f32 in floats, for processors that multiply bytes no faster.

/// What a [`Simd`](super::Simd) that has `code` for the codes of each output sums up in floats, and
/// whose registers hold `$sums` sums.
macro_rules! float_sums {
    ($sums:expr) => {
        type Sums = Self::Block;
        const QUAD_WORDS: usize = 4;
        const LARGEST: f32 = 1.0;
        const ROUNDING: f32 = 0.0;
        const SUMS: usize = $sums;
        const CHAINS: usize = 2;

        #[inline(always)]
        fn no_sums(self) -> Self::Block {
            self.block_zero()
        }
        #[inline(always)]
        fn store_quads(self, factors: &[Self::V; 4], out: &mut [BlockWords], at: usize) {
            for (&factors, out) in factors.iter().zip(out) {
                self.store(factors, bytemuck::cast_slice_mut(&mut out.0[at..]));
            }
        }
        #[inline(always)]
        fn store_factors(self, factors: Self::V, out: &mut [u32]) {
            self.store(factors, bytemuck::cast_slice_mut(out));
        }
        #[inline(always)]
        fn add_quads<const Q: usize, const B: usize>(
            self,
            sums: &mut [[Self::Block; B]; Q],
            codes: &[Self::Codes; B],
            word: impl Fn(usize, usize) -> u32,
        ) {
            for i in 0..4 {
                let mut wide = [self.block_zero(); B];
                for (wide, &codes) in wide.iter_mut().zip(codes) {
                    *wide = self.code(codes, i);
                }
                for (query, sums) in sums.iter_mut().enumerate() {
                    let factor = f32::from_bits(word(query, i));
                    for (sums, &wide) in sums.iter_mut().zip(&wide) {
                        *sums = self.add_block(*sums, wide, factor);
                    }
                }
            }
        }
        #[inline(always)]
        fn join_sums(self, a: Self::Block, b: Self::Block) -> Self::Block {
            self.add_block(a, b, 1.0)
        }
        #[inline(always)]
        fn totals(self, sums: Self::Block, offset: f32, unit: f32) -> Self::Block {
            self.add_block(self.block(&[offset; 16]), sums, unit)
        }
    };
}

pub(super) use float_sums;
