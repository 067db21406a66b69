//! Norms, vectorised within a row.

use super::simd::{Kernel, Simd};
use crate::NormKind;

/// Normalises rows.
pub(super) struct Norm<'a> {
    pub(super) kind: NormKind,
    pub(super) epsilon: f32,
    /// `[rows, hidden]`.
    pub(super) x: &'a [f32],
    /// `[hidden]`.
    pub(super) weight: &'a [f32],
    /// `[hidden]`.
    pub(super) bias: Option<&'a [f32]>,
    /// `[rows, hidden]`.
    pub(super) out: &'a mut [f32],
}

impl Kernel for Norm<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let n = self.weight.len();
        for (x, out) in self.x.chunks_exact(n).zip(self.out.chunks_exact_mut(n)) {
            let mean = match self.kind {
                NormKind::Layer => sum(simd, x, |x| x) / n as f32,
                NormKind::Rms => 0.0,
            };
            let centre = simd.splat(mean);
            let squares = sum(simd, x, |x| {
                let x = simd.sub(x, centre);
                simd.mul(x, x)
            });
            let scale = (squares / n as f32 + self.epsilon).sqrt().recip();
            let scale = simd.splat(scale);
            for (at, out) in (0..n).step_by(S::LANES).zip(out.chunks_mut(S::LANES)) {
                let range = at..at + out.len();
                let y = simd.sub(simd.load_up_to(&x[range.clone()]), centre);
                let y = simd.mul(y, scale);
                let mut y = simd.mul(y, simd.load_up_to(&self.weight[range.clone()]));
                if let Some(bias) = self.bias {
                    y = simd.add(y, simd.load_up_to(&bias[range]));
                }
                simd.store_up_to(y, out);
            }
        }
    }
}

#[inline(always)]
fn sum<S: Simd>(simd: S, x: &[f32], f: impl Fn(S::V) -> S::V) -> f32 {
    let mut sum = simd.splat(0.0);
    let mut chunks = x.chunks_exact(S::LANES);
    for x in &mut chunks {
        sum = simd.add(sum, f(simd.load(x)));
    }
    let tail = chunks.remainder();
    if tail.is_empty() {
        return simd.sum(sum);
    }
    // What `f` makes of the zeros behind the last element does not belong to the sum.
    let mut last = [0.0; 16];
    simd.store(f(simd.load_tail(tail)), &mut last);
    simd.sum(sum) + last[..tail.len()].iter().sum::<f32>()
}
