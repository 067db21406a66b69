//! Numbers from a seed, at the magnitudes where rounding goes wrong.

/// A small deterministic source of numbers (SplitMix64): one seed shrinks better than long vectors.
pub(crate) struct Numbers(pub(crate) u64);

impl Numbers {
    /// The next 64 random bits.
    pub(crate) fn bits(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let x = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        x ^ (x >> 31)
    }

    /// A finite number in [-1, 1) at one of the magnitudes where rounding goes wrong.
    pub(crate) fn number(&mut self) -> f32 {
        const SCALES: [f32; 12] =
            [0.0, 1e-45, 1e-40, 6e-8, 1e-3, 1.0, 1.0, 1.0, 30.0, 65_504.0, 1e6, 1e18];
        let scale = SCALES[(self.bits() % SCALES.len() as u64) as usize];
        scale * ((self.bits() >> 40) as f32 / (1u64 << 23) as f32 - 1.0)
    }

    /// `n` such numbers.
    pub(crate) fn numbers(&mut self, n: usize) -> Vec<f32> {
        (0..n).map(|_| self.number()).collect()
    }
}
