//! Products of many rows: weights are laid out once, panel by panel, for all of them, and widened
//! unless they are multiplied as they are stored.
//!
//! A panel is some outputs by one block of inputs. It is laid out in the order in which tiles read
//! it, and stays in the second-level cache while the rows go past; what a tile reads of its rows
//! stays in the first-level cache for all outputs of the panel.

use std::ops::Range;

use half::bf16;

use super::super::memory::Aligned;
use super::super::simd::{Element, Kernel, PairKernel, PairSimd, Simd, array};
use super::factors::{Factors, Pairs, Widened};
use super::{BLOCK_INPUTS, StripArgs};

/// Rows from which on widening pays for itself.
pub(super) const PANEL_ROWS: usize = 33;
/// Outputs of a panel.
const PANEL_OUTPUTS: usize = 64;
/// Rows of a tile.
const TILE_ROWS: usize = 6;
/// Rows whose sums are kept while the blocks of inputs go past.
const ROWS: usize = 44 * TILE_ROWS;

/// Buffers of one thread.
#[derive(Debug, Default)]
pub(in super::super) struct PanelScratch {
    /// `[outputs / O][vectors][O][vector]`, filled up with zeros; O is a tile's outputs. What
    /// takes less room than f32 fills a part of it.
    weights: Aligned,
    /// `[rows][PANEL_OUTPUTS]`.
    sums: Aligned,
}

/// One strip of outputs, for all rows.
pub(super) struct Panel<'a, E, X> {
    pub(super) args: StripArgs<'a>,
    /// `[rows, inputs]`.
    pub(super) x: &'a [X],
    /// `[outputs, inputs]`.
    pub(super) w: &'a [E],
    pub(super) scratch: &'a mut PanelScratch,
}

impl<E: Element> Kernel for Panel<'_, E, f32> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        self.multiply::<S, Widened<E>>(simd);
    }
}

impl PairKernel for Panel<'_, bf16, bf16> {
    type Output = ();

    #[inline(always)]
    fn run<S: PairSimd>(self, simd: S) {
        self.multiply::<S, Pairs>(simd);
    }
}

impl<E, X> Panel<'_, E, X> {
    #[inline(always)]
    fn multiply<S: Simd, F: Factors<S, Weight = E, Input = X>>(self, simd: S) {
        // As many sums as fit into the registers beside what they are made of.
        if S::LANES == 16 { self.panels::<S, F, 4>(simd) } else { self.panels::<S, F, 2>(simd) }
    }

    #[inline(always)]
    fn panels<S: Simd, F: Factors<S, Weight = E, Input = X>, const O: usize>(self, simd: S) {
        let Self { args, x, w, scratch } = self;
        let inputs = args.part.inputs;
        scratch.weights.resize(PANEL_OUTPUTS * BLOCK_INPUTS);
        scratch.sums.resize(PANEL_OUTPUTS * ROWS);
        let weights: &mut [F::Panel] = bytemuck::cast_slice_mut(&mut scratch.weights);
        let sums = &mut scratch.sums[..];
        for first in args.strip.clone().step_by(PANEL_OUTPUTS) {
            let outputs = first..(first + PANEL_OUTPUTS).min(args.strip.end);
            for start in (0..args.rows).step_by(ROWS) {
                let rows = start..(start + ROWS).min(args.rows);
                sums[..rows.len() * PANEL_OUTPUTS].fill(0.0);
                for start in (0..inputs).step_by(BLOCK_INPUTS) {
                    let block = start..(start + BLOCK_INPUTS).min(inputs);
                    let group = block.len().next_multiple_of(F::INPUTS) * O;
                    lay_out::<S, F, O>(simd, (w, inputs), (&outputs, &block), weights);
                    let weights = &weights[..group * outputs.len().div_ceil(O)];
                    let x = Rows { x, inputs, block };
                    multiply::<S, F, O>(simd, &x, rows.clone(), weights, sums);
                }
                for (row, sums) in rows.zip(sums.chunks_exact(PANEL_OUTPUTS)) {
                    args.finish(row, first, &sums[..outputs.len()]);
                }
            }
        }
    }
}

/// Writes a panel's weights in the order of [`PanelScratch::weights`].
#[inline(always)]
fn lay_out<S: Simd, F: Factors<S>, const O: usize>(
    simd: S,
    (w, inputs): (&[F::Weight], usize),
    (outputs, block): (&Range<usize>, &Range<usize>),
    weights: &mut [F::Panel],
) {
    let step = O * F::INPUTS;
    let group = block.len().div_ceil(F::INPUTS) * step;
    for (first, out) in outputs.clone().step_by(O).zip(weights.chunks_exact_mut(group)) {
        for o in 0..O {
            if first + o >= outputs.end {
                for out in out.chunks_exact_mut(step) {
                    F::store_in_panel(simd, &[], &mut out[o * F::INPUTS..]);
                }
                continue;
            }
            let row = &w[(first + o) * inputs..][block.clone()];
            for (row, out) in row.chunks(F::INPUTS).zip(out.chunks_exact_mut(step)) {
                F::store_in_panel(simd, row, &mut out[o * F::INPUTS..]);
            }
        }
    }
}

/// One block of inputs of the rows.
struct Rows<'a, X> {
    /// `[rows, inputs]`.
    x: &'a [X],
    inputs: usize,
    block: Range<usize>,
}

/// Adds the products of `rows` with a panel to `sums`.
#[inline(always)]
fn multiply<S: Simd, F: Factors<S>, const O: usize>(
    simd: S,
    x: &Rows<'_, F::Input>,
    rows: Range<usize>,
    weights: &[F::Panel],
    sums: &mut [f32],
) {
    let end = rows.end;
    let tiles = rows.step_by(TILE_ROWS).zip(sums.chunks_mut(TILE_ROWS * PANEL_OUTPUTS));
    // A loop, not a closure: only what is inlined here is compiled for the vectors of `S`.
    for (row, sums) in tiles {
        match end.min(row + TILE_ROWS) - row {
            6 => tile::<S, F, 6, O>(simd, x, row, weights, sums),
            5 => tile::<S, F, 5, O>(simd, x, row, weights, sums),
            4 => tile::<S, F, 4, O>(simd, x, row, weights, sums),
            3 => tile::<S, F, 3, O>(simd, x, row, weights, sums),
            2 => tile::<S, F, 2, O>(simd, x, row, weights, sums),
            _ => tile::<S, F, 1, O>(simd, x, row, weights, sums),
        }
    }
}

/// Rows `row..row + R` times every output of a panel.
#[inline(always)]
fn tile<S: Simd, F: Factors<S>, const R: usize, const O: usize>(
    simd: S,
    x: &Rows<'_, F::Input>,
    row: usize,
    weights: &[F::Panel],
    sums: &mut [f32],
) {
    let step = O * F::INPUTS;
    let x: [&[F::Input]; R] =
        std::array::from_fn(|r| &x.x[(row + r) * x.inputs..][x.block.clone()]);
    let whole = x[0].len() - x[0].len() % F::INPUTS;
    let group = x[0].len().div_ceil(F::INPUTS) * step;
    for (first, weights) in (0..PANEL_OUTPUTS).step_by(O).zip(weights.chunks_exact(group)) {
        let mut vectors = [[simd.splat(0.0); O]; R];
        let mut i = 0;
        for w in weights[..whole * O].chunks_exact(step) {
            let w: [F::Weights; O] = array!(O, |o| F::weights_of_panel(simd, &w[o * F::INPUTS..]));
            for r in 0..R {
                let x = F::inputs(simd, &x[r][i..i + F::INPUTS]);
                for o in 0..O {
                    vectors[r][o] = F::multiply_add(simd, w[o], x, vectors[r][o]);
                }
            }
            i += F::INPUTS;
        }
        if whole < x[0].len() {
            let w = &weights[whole * O..];
            for r in 0..R {
                let x = F::last_inputs(simd, &x[r][whole..]);
                for o in 0..O {
                    let w = F::weights_of_panel(simd, &w[o * F::INPUTS..]);
                    vectors[r][o] = F::multiply_add(simd, w, x, vectors[r][o]);
                }
            }
        }
        for (r, vectors) in vectors.iter().enumerate() {
            let totals = &mut sums[r * PANEL_OUTPUTS + first..][..O];
            for (total, sum) in totals.iter_mut().zip(simd.sums(vectors)) {
                *total += sum;
            }
        }
    }
}
