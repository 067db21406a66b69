//! Matrix products over weights as they are stored.
//!
//! Inputs are multiplied as they are, in f32; but where a path says so ([`CpuPath::rounds_inputs`])
//! they are rounded to bf16 for bf16 weights, once for all outputs, and multiplied in pairs.
//!
//! Every element of the output is summed in one order, whatever the number of rows: a batch gives
//! each sequence bit for bit what it gets alone. In each block of [`BLOCK_INPUTS`] inputs a vector
//! adds up the products of every so-manieth input; its elements are added up as a tree, and the
//! blocks in order.

mod factors;
mod panel;
mod rounded;

use std::ops::Range;
use std::sync::PoisonError;

use half::bf16;

use super::Cpu;
use super::activate::InStore;
use super::columns::Columns;
use super::path::CpuPath;
use super::simd::{Element, Kernel, PairKernel, PairSimd, Simd, array, dispatch, dispatch_pairs};
use super::tensor::{CpuMatrix, CpuTensor, Elements};
use crate::Store;
use factors::{Factors, Pairs, Widened};
pub(super) use panel::PanelScratch;
use panel::{PANEL_ROWS, Panel};
use rounded::rounded;

/// Inputs whose products are added up before the next ones: what six rows of them take stays in
/// the first-level cache.
const BLOCK_INPUTS: usize = 1024;
/// Multiply-adds below which waking other threads costs more than it saves.
const SERIAL_WORK: usize = 64 * 1024;
/// Outputs of a strip are a multiple of this, so that strips end at whole vectors.
const STRIP: usize = 64;
/// Strips that each thread gets on average.
const STRIPS_PER_THREAD: usize = 4;
/// Bytes of a weight row from which on a single input row is multiplied with weights that memory is
/// asked for ahead, not with as many at a time as hide each other's sums.
const STREAM_BYTES: usize = 1024;
/// How far ahead of the products memory is asked for weights.
const AHEAD_BYTES: usize = 8192;
/// Bytes that memory gives at a time.
const LINE_BYTES: usize = 64;
/// Sums that are stored together.
const STREAM_OUTPUTS: usize = 16;

/// Whether a function can be applied where products with `parts` are stored.
pub(super) fn stores_activated(parts: &[CpuMatrix], gated: bool) -> bool {
    !gated || matches!(parts, [gate, up] if gate.outputs == up.outputs)
}

/// `out = x·Wᵀ + b`, all parts side by side; and the function of it, if any, which the parts have
/// to allow ([`stores_activated`]).
pub(super) fn linear(
    cpu: &Cpu,
    x: &CpuTensor,
    parts: &[CpuMatrix],
    store: Store,
    out: &mut CpuTensor,
    function: Option<&InStore<'_>>,
) {
    let (path, threads) = (cpu.path(), cpu.threads());
    let (rows, inputs, width) = (x.rows(), x.columns(), out.columns());
    let columns = Columns::new(out.values_mut(), width);
    let mut buffer;
    let rounded = if parts.iter().any(|part| multiplies_pairs(path, part)) {
        // One operation at a time uses a backend's threads, so this does not wait.
        buffer = cpu.rounded.lock().unwrap_or_else(PoisonError::into_inner);
        rounded(cpu, x, &mut buffer)
    } else {
        &[]
    };
    let run = |thread: usize, part: &CpuMatrix, start: usize, strip: Range<usize>| {
        let (x, add) = (x.values(), store == Store::Add);
        let args = StripArgs { rows, part, strip, start, columns, add };
        if rows >= PANEL_ROWS {
            // Never waited for: each thread has its own.
            let mut scratch = cpu.panels[thread].lock().unwrap_or_else(PoisonError::into_inner);
            let scratch = &mut *scratch;
            match part.elements() {
                Elements::F32(w) => dispatch(path, Panel { args, x, w, scratch }),
                Elements::F16(w) => dispatch(path, Panel { args, x, w, scratch }),
                Elements::Bf16(w) if path.rounds_inputs() => {
                    dispatch_pairs(path, Panel { args, x: rounded, w, scratch });
                }
                Elements::Bf16(w) => dispatch(path, Panel { args, x, w, scratch }),
            }
            return;
        }
        match part.elements() {
            Elements::F32(w) => dispatch(path, OutIn { args, x, w }),
            Elements::F16(w) => dispatch(path, OutIn { args, x, w }),
            Elements::Bf16(w) if path.rounds_inputs() => {
                dispatch_pairs(path, OutIn { args, x: rounded, w });
            }
            Elements::Bf16(w) => dispatch(path, OutIn { args, x, w }),
        }
    };
    if threads == 1 || rows * inputs * width < SERIAL_WORK {
        let mut start = 0;
        for part in parts {
            run(0, part, start, 0..part.outputs);
            start += part.outputs;
        }
        if let Some(function) = function {
            function.strip(path, columns, 0..function.width);
        }
        return;
    }
    if let (Some(function), [gate, up]) = (function.filter(|function| function.gated), parts) {
        // What is computed together lies in two parts, half a strip in each.
        let target = gate.outputs.div_ceil(threads * STRIPS_PER_THREAD).next_multiple_of(STRIP / 2);
        cpu.pool.run(gate.outputs.div_ceil(target), &|thread, strip| {
            let strip = strip * target..((strip + 1) * target).min(gate.outputs);
            run(thread, gate, 0, strip.clone());
            run(thread, up, gate.outputs, strip.clone());
            function.strip(path, columns, strip);
        });
        return;
    }
    // Several strips per thread, so that a thread that is held up does not hold up all.
    let target = width.div_ceil(threads * STRIPS_PER_THREAD).next_multiple_of(STRIP);
    let strips = parts.iter().map(|part| part.outputs.div_ceil(target)).sum();
    cpu.pool.run(strips, &|thread, mut strip| {
        let mut start = 0;
        for part in parts {
            let of_part = part.outputs.div_ceil(target);
            if strip < of_part {
                let outputs = strip * target..((strip + 1) * target).min(part.outputs);
                run(thread, part, start, outputs.clone());
                if let Some(function) = function {
                    function.strip(path, columns, start + outputs.start..start + outputs.end);
                }
                return;
            }
            strip -= of_part;
            start += part.outputs;
        }
    });
}

/// Whether `part` is multiplied with rounded inputs.
fn multiplies_pairs(path: CpuPath, part: &CpuMatrix) -> bool {
    path.rounds_inputs() && matches!(part.elements(), Elements::Bf16(_))
}

struct StripArgs<'a> {
    rows: usize,
    part: &'a CpuMatrix,
    /// Outputs of the part.
    strip: Range<usize>,
    /// Column of the part's first output.
    start: usize,
    columns: Columns<'a>,
    add: bool,
}

impl StripArgs<'_> {
    /// Adds bias and residual to finished sums and stores them.
    #[inline(always)]
    fn finish(&self, row: usize, output: usize, sums: &[f32]) {
        let column = self.start + output;
        // SAFETY: the columns belong to this strip, which is one thread's; the slice ends here.
        let out = unsafe { self.columns.slice(row, column..column + sums.len()) };
        for (i, (out, &sum)) in out.iter_mut().zip(sums).enumerate() {
            let y = sum + self.part.bias.as_ref().map_or(0.0, |bias| bias[output + i]);
            *out = if self.add { *out + y } else { y };
        }
    }
}

/// `[out, in]`, few rows: dot products of weight rows with input rows.
struct OutIn<'a, E, X> {
    args: StripArgs<'a>,
    /// `[rows, inputs]`.
    x: &'a [X],
    w: &'a [E],
}

impl<E: Element> Kernel for OutIn<'_, E, f32> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        self.multiply::<S, Widened<E>>(simd);
    }
}

impl PairKernel for OutIn<'_, bf16, bf16> {
    type Output = ();

    #[inline(always)]
    fn run<S: PairSimd>(self, simd: S) {
        self.multiply::<S, Pairs>(simd);
    }
}

impl<E, X> OutIn<'_, E, X> {
    #[inline(always)]
    fn multiply<S: Simd, F: Factors<S, Weight = E, Input = X>>(&self, simd: S) {
        let inputs = self.args.part.inputs;
        if self.args.rows > 1 || inputs * size_of::<E>() >= STREAM_BYTES {
            return self.batch::<S, F>(simd);
        }
        let mut output = self.args.strip.start;
        // Eight weight rows at once: their sums hide each other's latency.
        while output + 8 <= self.args.strip.end {
            self.tile::<S, F, 1, 8, false>(simd, 0, output);
            output += 8;
        }
        while output < self.args.strip.end {
            self.tile::<S, F, 1, 1, false>(simd, 0, output);
            output += 1;
        }
    }

    /// The first tile of input rows streams some weight rows from memory, those after it read the same
    /// weight rows from the cache.
    #[inline(always)]
    fn batch<S: Simd, F: Factors<S, Weight = E, Input = X>>(&self, simd: S) {
        let rows = self.args.rows;
        for first in self.args.strip.clone().step_by(STREAM_OUTPUTS) {
            let outputs = first..(first + STREAM_OUTPUTS).min(self.args.strip.end);
            let mut row = 0;
            while row < rows {
                let outputs = outputs.clone();
                row += match rows - row {
                    // As many sums as registers hold.
                    8.. if S::LANES == 16 => self.row_tile::<S, F, 8>(simd, row, outputs),
                    4.. => self.row_tile::<S, F, 4>(simd, row, outputs),
                    2.. => self.row_tile::<S, F, 2>(simd, row, outputs),
                    _ => self.row_tile::<S, F, 1>(simd, row, outputs),
                };
            }
        }
    }

    /// Some outputs of `R` rows; gives `R`.
    #[inline(always)]
    fn row_tile<S: Simd, F: Factors<S, Weight = E, Input = X>, const R: usize>(
        &self,
        simd: S,
        row: usize,
        outputs: Range<usize>,
    ) -> usize {
        let mut output = outputs.start;
        while output + 2 <= outputs.end {
            if row == 0 {
                self.tile::<S, F, R, 2, true>(simd, row, output);
            } else {
                self.tile::<S, F, R, 2, false>(simd, row, output);
            }
            output += 2;
        }
        if output < outputs.end {
            self.tile::<S, F, R, 1, false>(simd, row, output);
        }
        R
    }

    #[inline(always)]
    fn tile<S, F, const R: usize, const O: usize, const AHEAD: bool>(
        &self,
        simd: S,
        row: usize,
        output: usize,
    ) where
        S: Simd,
        F: Factors<S, Weight = E, Input = X>,
    {
        let inputs = self.args.part.inputs;
        let w: [&[E]; O] =
            std::array::from_fn(|o| &self.w[(output + o) * inputs..(output + o + 1) * inputs]);
        let x: [&[X]; R] =
            std::array::from_fn(|r| &self.x[(row + r) * inputs..(row + r + 1) * inputs]);
        let mut totals = [[0.0; O]; R];
        for start in (0..inputs).step_by(BLOCK_INPUTS) {
            let block = start..(start + BLOCK_INPUTS).min(inputs);
            let w: [&[E]; O] = std::array::from_fn(|o| &w[o][block.clone()]);
            let x: [&[X]; R] = std::array::from_fn(|r| &x[r][block.clone()]);
            let stream = &self.w[output * inputs + O * start..];
            let sums = block_sums::<S, F, R, O, AHEAD>(simd, (&w, stream), &x);
            for (o, sums) in sums.iter().enumerate() {
                for (totals, sum) in totals.iter_mut().zip(simd.sums(sums)) {
                    totals[o] += sum;
                }
            }
        }
        for (r, totals) in totals.iter().enumerate() {
            self.args.finish(row + r, output, totals);
        }
    }
}

/// The sums of one block's products, `O` weight rows with `R` input rows, not added up across lanes
/// yet.
///
/// Where the weights come from memory, `AHEAD` asks it for those that follow `stream`: rows follow
/// one another, so that `O` of them are one stream, too.
#[inline(always)]
fn block_sums<S: Simd, F: Factors<S>, const R: usize, const O: usize, const AHEAD: bool>(
    simd: S,
    (w, stream): (&[&[F::Weight]; O], &[F::Weight]),
    x: &[&[F::Input]; R],
) -> [[S::V; R]; O] {
    let inputs = x[0].len();
    let mut sums = [[simd.splat(0.0); R]; O];
    let whole = inputs - inputs % F::INPUTS;
    let mut i = 0;
    while i < whole {
        if AHEAD {
            let bytes = O * size_of::<F::Weight>();
            let next = stream.as_ptr().cast::<u8>().wrapping_add(i * bytes + AHEAD_BYTES);
            for line in (0..F::INPUTS * bytes).step_by(LINE_BYTES) {
                simd.prefetch(next.wrapping_add(line));
            }
        }
        let w = array!(O, |o| F::weights(simd, &w[o][i..i + F::INPUTS]));
        for r in 0..R {
            let x = F::inputs(simd, &x[r][i..i + F::INPUTS]);
            for o in 0..O {
                sums[o][r] = F::multiply_add(simd, w[o], x, sums[o][r]);
            }
        }
        i += F::INPUTS;
    }
    if whole < inputs {
        for r in 0..R {
            let x = F::last_inputs(simd, &x[r][whole..]);
            for o in 0..O {
                let w = F::last_weights(simd, &w[o][whole..]);
                sums[o][r] = F::multiply_add(simd, w, x, sums[o][r]);
            }
        }
    }
    sums
}
