//! Activations, vectorised within a row.

use std::ops::Range;

use super::columns::Columns;
use super::path::CpuPath;
use super::simd::{Kernel, Simd, dispatch};
use crate::Activation;

/// Applies a feed-forward layer's function to rows.
#[derive(Clone, Copy)]
struct Row {
    activation: Activation,
    gated: bool,
}

impl Row {
    /// `up` is read where the function is gated.
    #[inline(always)]
    fn run<S: Simd>(self, simd: S, x: &[f32], up: &[f32], out: &mut [f32]) {
        for (at, out) in (0..out.len()).step_by(S::LANES).zip(out.chunks_mut(S::LANES)) {
            let range = at..at + out.len();
            let y = function(simd, self.activation, simd.load_up_to(&x[range.clone()]));
            let y = if self.gated { simd.mul(y, simd.load_up_to(&up[range])) } else { y };
            simd.store_up_to(y, out);
        }
    }
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
            Row { activation: self.activation, gated: self.gated }.run(simd, x, up, out);
        }
    }
}

/// The function of a product, applied strip by strip by the threads that compute it, while a strip
/// is in their caches.
#[derive(Clone, Copy)]
pub(super) struct InStore<'a> {
    pub(super) activation: Activation,
    pub(super) gated: bool,
    /// Elements of an output row: the product has as many, or twice as many when gated.
    pub(super) width: usize,
    /// `[rows, width]`.
    pub(super) out: Columns<'a>,
}

impl InStore<'_> {
    /// Applies it to columns `strip` of the output, for which one thread has computed the columns
    /// of the product, and nobody else has any of them.
    pub(super) fn strip(&self, path: CpuPath, product: Columns<'_>, strip: Range<usize>) {
        dispatch(path, Strip { how: self, product, strip });
    }
}

struct Strip<'a> {
    how: &'a InStore<'a>,
    product: Columns<'a>,
    strip: Range<usize>,
}

impl Kernel for Strip<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let Self { how: InStore { activation, gated, width, out }, product, strip } = self;
        let function = Row { activation: *activation, gated: *gated };
        for row in 0..out.row_count() {
            // SAFETY: the strip is this thread's, in the output and in the product.
            let (x, out) =
                unsafe { (product.slice(row, strip.clone()), out.slice(row, strip.clone())) };
            let up: &[f32] = if *gated {
                // SAFETY: as above; these columns lie behind those of `x`, which end at `width`.
                unsafe { product.slice(row, strip.start + width..strip.end + width) }
            } else {
                &[]
            };
            function.run(simd, x, up, out);
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
