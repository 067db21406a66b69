//! Activations, vectorised within a row.

use super::simd::{Kernel, Simd};
use crate::Activation;

/// Applies a feed-forward layer's function to rows.
pub(super) struct Activate<'a> {
    pub(super) activation: Activation,
    pub(super) gated: bool,
    /// Elements of an output row.
    pub(super) width: usize,
    /// `[rows, width]`, or `[rows, 2·width]` when gated.
    pub(super) x: &'a [f32],
    /// `[rows, width]`.
    pub(super) out: &'a mut [f32],
}

impl Kernel for Activate<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let stride = if self.gated { 2 * self.width } else { self.width };
        let rows = self.x.chunks_exact(stride).zip(self.out.chunks_exact_mut(self.width));
        for (x, out) in rows {
            let (x, up) = x.split_at(self.width);
            for (at, out) in (0..self.width).step_by(S::LANES).zip(out.chunks_mut(S::LANES)) {
                let range = at..at + out.len();
                let y = function(simd, self.activation, simd.load_up_to(&x[range.clone()]));
                let y = if self.gated { simd.mul(y, simd.load_up_to(&up[range])) } else { y };
                simd.store_up_to(y, out);
            }
        }
    }
}

#[inline(always)]
fn function<S: Simd>(simd: S, activation: Activation, x: S::V) -> S::V {
    match activation {
        Activation::Silu => {
            let e = simd.exp(simd.sub(simd.splat(0.0), x));
            simd.div(x, simd.add(simd.splat(1.0), e))
        }
        Activation::GeluTanh => {
            // 0.5·x·(1 + tanh(u)) = x / (1 + e^(−2u)).
            let cube = simd.mul(simd.mul(x, x), x);
            let inner = simd.mul_add(cube, simd.splat(0.044_715), x);
            let e = simd.exp(simd.mul(inner, simd.splat(-1.595_769)));
            simd.div(x, simd.add(simd.splat(1.0), e))
        }
        // In this order NaN stays NaN.
        Activation::Relu => simd.max(simd.splat(0.0), x),
        Activation::Gelu => {
            // erfc keeps the digits of the left tail, where 1 + erf would cancel them.
            let mut lanes = [0.0; 16];
            simd.store(x, &mut lanes);
            for x in &mut lanes[..S::LANES] {
                *x *= 0.5 * libm::erfcf(*x * -std::f32::consts::FRAC_1_SQRT_2);
            }
            simd.load(&lanes)
        }
    }
}
