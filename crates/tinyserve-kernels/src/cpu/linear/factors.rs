//! The two factors of a product: how weights and inputs are loaded, and how they are multiplied.

use std::marker::PhantomData;

use bytemuck::{Pod, Zeroable};
use half::bf16;

use super::super::simd::{Element, PairSimd, Simd};

/// Vectors of weights and of inputs, and their products, which are added up in `S::LANES` sums.
pub(super) trait Factors<S: Simd> {
    /// A weight as it is stored.
    type Weight: Pod;
    /// An element of the rows.
    type Input: Pod;
    /// A weight as panels hold it.
    type Panel: Pod;
    /// [`Self::INPUTS`] weights.
    type Weights: Copy;
    /// As many elements of a row.
    type Inputs: Copy;
    /// Elements of a vector.
    const INPUTS: usize;

    /// Loads the first elements of a weight row.
    fn weights(simd: S, w: &[Self::Weight]) -> Self::Weights;
    /// Loads a weight row's end, which is shorter than a vector, and zeros after it.
    fn last_weights(simd: S, w: &[Self::Weight]) -> Self::Weights;
    /// Loads the first elements of a row.
    fn inputs(simd: S, x: &[Self::Input]) -> Self::Inputs;
    /// Loads a row's end, which is shorter than a vector, and zeros after it.
    fn last_inputs(simd: S, x: &[Self::Input]) -> Self::Inputs;
    /// `w·x + sums`.
    fn multiply_add(simd: S, w: Self::Weights, x: Self::Inputs, sums: S::V) -> S::V;

    /// Writes weights, at most a vector of them, into a panel, and zeros after them.
    fn store_in_panel(simd: S, w: &[Self::Weight], panel: &mut [Self::Panel]);
    /// Loads the first weights of a panel.
    fn weights_of_panel(simd: S, panel: &[Self::Panel]) -> Self::Weights;
}

/// Weights that are widened to f32, and inputs as they are.
pub(super) struct Widened<E>(PhantomData<E>);

impl<S: Simd, E: Element> Factors<S> for Widened<E> {
    type Weight = E;
    type Input = f32;
    type Panel = f32;
    type Weights = S::V;
    type Inputs = S::V;
    const INPUTS: usize = S::LANES;

    #[inline(always)]
    fn weights(simd: S, w: &[E]) -> S::V {
        E::load(simd, w)
    }
    #[inline(always)]
    fn last_weights(simd: S, w: &[E]) -> S::V {
        simd.load_tail(w)
    }
    #[inline(always)]
    fn inputs(simd: S, x: &[f32]) -> S::V {
        simd.load(x)
    }
    #[inline(always)]
    fn last_inputs(simd: S, x: &[f32]) -> S::V {
        simd.load_tail(x)
    }
    #[inline(always)]
    fn multiply_add(simd: S, w: S::V, x: S::V, sums: S::V) -> S::V {
        simd.mul_add(w, x, sums)
    }
    #[inline(always)]
    fn store_in_panel(simd: S, w: &[E], panel: &mut [f32]) {
        simd.store(simd.load_up_to(w), panel);
    }
    #[inline(always)]
    fn weights_of_panel(simd: S, panel: &[f32]) -> S::V {
        simd.load(panel)
    }
}

/// Weights in bf16, and inputs that were rounded to it.
pub(super) struct Pairs;

impl<S: PairSimd> Factors<S> for Pairs {
    type Weight = bf16;
    type Input = bf16;
    type Panel = bf16;
    type Weights = S::Pairs;
    type Inputs = S::Pairs;
    const INPUTS: usize = 2 * S::LANES;

    #[inline(always)]
    fn weights(simd: S, w: &[bf16]) -> S::Pairs {
        simd.pairs(w)
    }
    #[inline(always)]
    fn last_weights(simd: S, w: &[bf16]) -> S::Pairs {
        simd.pairs_up_to(w)
    }
    #[inline(always)]
    fn inputs(simd: S, x: &[bf16]) -> S::Pairs {
        simd.pairs(x)
    }
    #[inline(always)]
    fn last_inputs(simd: S, x: &[bf16]) -> S::Pairs {
        simd.pairs_up_to(x)
    }
    #[inline(always)]
    fn multiply_add(simd: S, w: S::Pairs, x: S::Pairs, sums: S::V) -> S::V {
        simd.add_pairs(sums, w, x)
    }
    #[inline(always)]
    fn store_in_panel(_: S, w: &[bf16], panel: &mut [bf16]) {
        let (weights, zeros) = panel[..2 * S::LANES].split_at_mut(w.len());
        weights.copy_from_slice(w);
        zeros.fill(bf16::zeroed());
    }
    #[inline(always)]
    fn weights_of_panel(simd: S, panel: &[bf16]) -> S::Pairs {
        simd.pairs(panel)
    }
}
