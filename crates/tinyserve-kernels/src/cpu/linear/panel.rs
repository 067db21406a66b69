//! Products of many rows: weights are widened once, panel by panel, for all of them.
//!
//! A panel is some outputs by one block of inputs. It is laid out in the order in which tiles read
//! it, and stays in the second-level cache while the rows go past; what a tile reads of its rows
//! stays in the first-level cache for all outputs of the panel.

use std::ops::Range;

use super::super::memory::Aligned;
use super::super::simd::{Element, Kernel, Simd};
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
    /// `[outputs / O][vectors][O][lanes]`, filled up with zeros; O is a tile's outputs.
    weights: Aligned,
    /// `[rows][PANEL_OUTPUTS]`.
    sums: Aligned,
}

/// One strip of outputs, for all rows.
pub(super) struct Panel<'a, E> {
    pub(super) args: StripArgs<'a>,
    /// `[outputs, inputs]`.
    pub(super) w: &'a [E],
    pub(super) scratch: &'a mut PanelScratch,
}

impl<E: Element> Kernel for Panel<'_, E> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        // As many sums as fit into the registers beside what they are made of.
        if S::LANES == 16 { self.panels::<S, 4>(simd) } else { self.panels::<S, 2>(simd) }
    }
}

impl<E: Element> Panel<'_, E> {
    #[inline(always)]
    fn panels<S: Simd, const O: usize>(self, simd: S) {
        let Self { args, w, scratch } = self;
        let inputs = args.part.inputs;
        scratch.weights.resize(PANEL_OUTPUTS * BLOCK_INPUTS);
        scratch.sums.resize(PANEL_OUTPUTS * ROWS);
        let (weights, sums) = (&mut scratch.weights[..], &mut scratch.sums[..]);
        for first in args.strip.clone().step_by(PANEL_OUTPUTS) {
            let outputs = first..(first + PANEL_OUTPUTS).min(args.strip.end);
            for start in (0..args.rows).step_by(ROWS) {
                let rows = start..(start + ROWS).min(args.rows);
                sums[..rows.len() * PANEL_OUTPUTS].fill(0.0);
                for start in (0..inputs).step_by(BLOCK_INPUTS) {
                    let block = start..(start + BLOCK_INPUTS).min(inputs);
                    let bytes = block.len().next_multiple_of(S::LANES) * O;
                    widen::<S, E, O>(simd, (w, inputs), (&outputs, &block), weights);
                    let weights = &weights[..bytes * outputs.len().div_ceil(O)];
                    let x = Rows { x: args.x, inputs, block };
                    multiply::<S, O>(simd, &x, rows.clone(), weights, sums);
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
fn widen<S: Simd, E: Element, const O: usize>(
    simd: S,
    (w, inputs): (&[E], usize),
    (outputs, block): (&Range<usize>, &Range<usize>),
    weights: &mut [f32],
) {
    let step = O * S::LANES;
    let group = block.len().div_ceil(S::LANES) * step;
    for (first, out) in outputs.clone().step_by(O).zip(weights.chunks_exact_mut(group)) {
        for o in 0..O {
            if first + o >= outputs.end {
                for out in out.chunks_exact_mut(step) {
                    simd.store(simd.splat(0.0), &mut out[o * S::LANES..]);
                }
                continue;
            }
            let row = &w[(first + o) * inputs..][block.clone()];
            for (row, out) in row.chunks(S::LANES).zip(out.chunks_exact_mut(step)) {
                simd.store(simd.load_up_to(row), &mut out[o * S::LANES..]);
            }
        }
    }
}

/// One block of inputs of the rows.
struct Rows<'a> {
    /// `[rows, inputs]`.
    x: &'a [f32],
    inputs: usize,
    block: Range<usize>,
}

/// Adds the products of `rows` with a panel to `sums`.
#[inline(always)]
fn multiply<S: Simd, const O: usize>(
    simd: S,
    x: &Rows<'_>,
    rows: Range<usize>,
    weights: &[f32],
    sums: &mut [f32],
) {
    let end = rows.end;
    let tiles = rows.step_by(TILE_ROWS).zip(sums.chunks_mut(TILE_ROWS * PANEL_OUTPUTS));
    // A loop, not a closure: only what is inlined here is compiled for the vectors of `S`.
    for (row, sums) in tiles {
        match end.min(row + TILE_ROWS) - row {
            6 => tile::<S, 6, O>(simd, x, row, weights, sums),
            5 => tile::<S, 5, O>(simd, x, row, weights, sums),
            4 => tile::<S, 4, O>(simd, x, row, weights, sums),
            3 => tile::<S, 3, O>(simd, x, row, weights, sums),
            2 => tile::<S, 2, O>(simd, x, row, weights, sums),
            _ => tile::<S, 1, O>(simd, x, row, weights, sums),
        }
    }
}

/// Rows `row..row + R` times every output of a panel.
#[inline(always)]
fn tile<S: Simd, const R: usize, const O: usize>(
    simd: S,
    x: &Rows<'_>,
    row: usize,
    weights: &[f32],
    sums: &mut [f32],
) {
    let step = O * S::LANES;
    let x: [&[f32]; R] = std::array::from_fn(|r| &x.x[(row + r) * x.inputs..][x.block.clone()]);
    let whole = x[0].len() - x[0].len() % S::LANES;
    let group = x[0].len().div_ceil(S::LANES) * step;
    for (first, weights) in (0..PANEL_OUTPUTS).step_by(O).zip(weights.chunks_exact(group)) {
        let mut vectors = [[simd.splat(0.0); O]; R];
        let mut i = 0;
        for w in weights[..whole * O].chunks_exact(step) {
            let w: [S::V; O] = std::array::from_fn(|o| simd.load(&w[o * S::LANES..]));
            for r in 0..R {
                let x = simd.load(&x[r][i..i + S::LANES]);
                for o in 0..O {
                    vectors[r][o] = simd.mul_add(w[o], x, vectors[r][o]);
                }
            }
            i += S::LANES;
        }
        if whole < x[0].len() {
            let w = &weights[whole * O..];
            for r in 0..R {
                let x = simd.load_tail(&x[r][whole..]);
                for o in 0..O {
                    let w = simd.load(&w[o * S::LANES..]);
                    vectors[r][o] = simd.mul_add(w, x, vectors[r][o]);
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
