//! Rotary embedding: rotate-half, vectorised within a head.

use super::simd::{Kernel, Simd};
use crate::Heads;

/// Rotates the queries and keys of rows in place.
pub(super) struct Rotary<'a> {
    pub(super) heads: Heads,
    /// `[rows, head_dim]`: cosines, then sines.
    pub(super) angles: &'a [f32],
    /// `[rows, heads.qkv_width()]`.
    pub(super) qkv: &'a mut [f32],
}

impl Kernel for Rotary<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let (dim, rotated) = (self.heads.head_dim, self.heads.v_columns().start);
        let rows = self.qkv.chunks_exact_mut(self.heads.qkv_width());
        for (angles, row) in self.angles.chunks_exact(dim).zip(rows) {
            let (cos, sin) = angles.split_at(dim / 2);
            for head in row[..rotated].chunks_exact_mut(dim) {
                let (low, high) = head.split_at_mut(dim / 2);
                let pairs = low.chunks_mut(S::LANES).zip(high.chunks_mut(S::LANES));
                for ((low, high), (cos, sin)) in
                    pairs.zip(cos.chunks(S::LANES).zip(sin.chunks(S::LANES)))
                {
                    let (a, b) = (simd.load_up_to(low), simd.load_up_to(high));
                    let (cos, sin) = (simd.load_up_to(cos), simd.load_up_to(sin));
                    simd.store_up_to(simd.sub(simd.mul(a, cos), simd.mul(b, sin)), low);
                    simd.store_up_to(simd.add(simd.mul(b, cos), simd.mul(a, sin)), high);
                }
            }
        }
    }
}
