//! Matrix products over weights as they are stored.
//!
//! Every element of the output is summed in one order, whatever the number of rows: a batch gives
//! each sequence bit for bit what it gets alone.

use std::ops::Range;

use super::Cpu;
use super::columns::Columns;
use super::simd::{Element, Kernel, Simd, dispatch};
use super::tensor::{CpuMatrix, CpuTensor, Elements};
use crate::Store;

/// Multiply-adds below which waking other threads costs more than it saves.
const SERIAL_WORK: usize = 64 * 1024;
/// Outputs of a strip are a multiple of this, so that strips end at whole vectors.
const STRIP: usize = 64;
/// Strips that each thread gets on average.
const STRIPS_PER_THREAD: usize = 4;
/// Bytes of a weight row from which on one row after the other is faster than several at a time.
const STREAM_BYTES: usize = 1024;
/// Sums that are stored together.
const STREAM_OUTPUTS: usize = 16;
/// Bytes of input rows that are reused from the second-level cache while weights stream past.
const ROW_BLOCK_BYTES: usize = 384 * 1024;

/// `out = x·Wᵀ + b`, all parts side by side.
pub(super) fn linear(
    cpu: &Cpu,
    x: &CpuTensor,
    parts: &[CpuMatrix],
    store: Store,
    out: &mut CpuTensor,
) {
    let (path, threads) = (cpu.path(), cpu.threads());
    let (rows, inputs, width) = (x.rows(), x.columns(), out.columns());
    let columns = Columns::new(out.values_mut(), width);
    let run = |part: &CpuMatrix, start: usize, strip: Range<usize>| {
        let (x, add) = (x.values(), store == Store::Add);
        let args = StripArgs { x, rows, part, strip, start, columns, add };
        match part.elements() {
            Elements::F32(w) => dispatch(path, OutIn { args, w }),
            Elements::F16(w) => dispatch(path, OutIn { args, w }),
            Elements::Bf16(w) => dispatch(path, OutIn { args, w }),
        }
    };
    if threads == 1 || rows * inputs * width < SERIAL_WORK {
        let mut start = 0;
        for part in parts {
            run(part, start, 0..part.outputs);
            start += part.outputs;
        }
        return;
    }
    // Several strips per thread, so that a thread that is held up does not hold up all.
    let target = width.div_ceil(threads * STRIPS_PER_THREAD).next_multiple_of(STRIP);
    let strips = parts.iter().map(|part| part.outputs.div_ceil(target)).sum();
    cpu.pool.run(strips, &|_, mut strip| {
        let mut start = 0;
        for part in parts {
            let of_part = part.outputs.div_ceil(target);
            if strip < of_part {
                let outputs = strip * target..((strip + 1) * target).min(part.outputs);
                return run(part, start, outputs);
            }
            strip -= of_part;
            start += part.outputs;
        }
    });
}

struct StripArgs<'a> {
    /// `[rows, inputs]`.
    x: &'a [f32],
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

/// `[out, in]`: dot products of weight rows with input rows, each in one vector accumulator.
struct OutIn<'a, E> {
    args: StripArgs<'a>,
    w: &'a [E],
}

impl<E: Element> Kernel for OutIn<'_, E> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let inputs = self.args.part.inputs;
        let block = (ROW_BLOCK_BYTES / (4 * inputs)).max(8);
        for first in (0..self.args.rows).step_by(block) {
            let rows = first..(first + block).min(self.args.rows);
            let mut output = self.args.strip.start;
            if rows.len() == 1 && inputs * size_of::<E>() >= STREAM_BYTES {
                self.stream(simd, rows.start);
                continue;
            }
            if rows.len() == 1 {
                // Eight weight rows at once: their sums hide each other's latency.
                while output + 8 <= self.args.strip.end {
                    self.tile::<S, 1, 8>(simd, rows.start, output);
                    output += 8;
                }
            }
            while output + 4 <= self.args.strip.end {
                self.row_tiles::<S, 4>(simd, rows.clone(), output);
                output += 4;
            }
            while output < self.args.strip.end {
                self.row_tiles::<S, 1>(simd, rows.clone(), output);
                output += 1;
            }
        }
    }
}

impl<E: Element> OutIn<'_, E> {
    /// One input row, weight row after weight row: memory is read fastest as one stream, and the
    /// processor begins the next sum before the last one is done.
    #[inline(always)]
    fn stream<S: Simd>(&self, simd: S, row: usize) {
        let inputs = self.args.part.inputs;
        let x = &self.args.x[row * inputs..(row + 1) * inputs];
        let whole = inputs - inputs % S::LANES;
        let tail = simd.load_tail(&x[whole..]);
        let mut sums = [0.0; STREAM_OUTPUTS];
        for first in self.args.strip.clone().step_by(STREAM_OUTPUTS) {
            let outputs = STREAM_OUTPUTS.min(self.args.strip.end - first);
            let w = &self.w[first * inputs..(first + outputs) * inputs];
            for (w, out) in w.chunks_exact(inputs).zip(&mut sums) {
                let mut sum = simd.splat(0.0);
                let vectors = w[..whole].chunks_exact(S::LANES);
                for (w, x) in vectors.zip(x[..whole].chunks_exact(S::LANES)) {
                    sum = simd.mul_add(E::load(simd, w), simd.load(x), sum);
                }
                if whole < inputs {
                    sum = simd.mul_add(simd.load_tail(&w[whole..]), tail, sum);
                }
                *out = simd.sum(sum);
            }
            self.args.finish(row, first, &sums[..outputs]);
        }
    }

    #[inline(always)]
    fn row_tiles<S: Simd, const O: usize>(&self, simd: S, rows: Range<usize>, output: usize) {
        let mut row = rows.start;
        if S::LANES == 16 {
            while row + 6 <= rows.end {
                self.tile::<S, 6, O>(simd, row, output);
                row += 6;
            }
        }
        while row + 3 <= rows.end {
            self.tile::<S, 3, O>(simd, row, output);
            row += 3;
        }
        match rows.end - row {
            2 => self.tile::<S, 2, O>(simd, row, output),
            1 => self.tile::<S, 1, O>(simd, row, output),
            _ => {}
        }
    }

    #[inline(always)]
    fn tile<S: Simd, const R: usize, const O: usize>(&self, simd: S, row: usize, output: usize) {
        let inputs = self.args.part.inputs;
        let w: [&[E]; O] =
            std::array::from_fn(|o| &self.w[(output + o) * inputs..(output + o + 1) * inputs]);
        let x: [&[f32]; R] =
            std::array::from_fn(|r| &self.args.x[(row + r) * inputs..(row + r + 1) * inputs]);
        let mut sums = [[simd.splat(0.0); O]; R];
        let whole = inputs - inputs % S::LANES;
        let mut i = 0;
        while i < whole {
            let w: [S::V; O] = std::array::from_fn(|o| E::load(simd, &w[o][i..i + S::LANES]));
            for r in 0..R {
                let x = simd.load(&x[r][i..i + S::LANES]);
                for o in 0..O {
                    sums[r][o] = simd.mul_add(w[o], x, sums[r][o]);
                }
            }
            i += S::LANES;
        }
        if whole < inputs {
            for r in 0..R {
                let x = simd.load_tail(&x[r][whole..]);
                for o in 0..O {
                    let w = simd.load_tail(&w[o][whole..]);
                    sums[r][o] = simd.mul_add(w, x, sums[r][o]);
                }
            }
        }
        for (r, sums) in sums.iter().enumerate() {
            let sums: [f32; O] = std::array::from_fn(|o| simd.sum(sums[o]));
            self.args.finish(row + r, output, &sums);
        }
    }
}
