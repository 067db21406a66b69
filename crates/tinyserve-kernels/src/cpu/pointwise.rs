//! Norms, activations and rotary embedding, vectorised within a row.

use super::simd::{Kernel, Simd};
use crate::{Activation, NormKind};

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
            for (i, (out, &x)) in out.iter_mut().zip(x).enumerate() {
                let y = (x - mean) * scale * self.weight[i];
                *out = self.bias.map_or(y, |bias| y + bias[i]);
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
        Activation::Relu => simd.max(x, simd.splat(0.0)),
        Activation::Gelu => {
            let mut lanes = [0.0; 16];
            simd.store(x, &mut lanes);
            for x in &mut lanes[..S::LANES] {
                *x *= 0.5 * (1.0 + libm::erff(*x * std::f32::consts::FRAC_1_SQRT_2));
            }
            simd.load(&lanes)
        }
    }
}
