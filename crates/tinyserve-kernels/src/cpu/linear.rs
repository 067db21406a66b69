//! Matrix products over weights as they are stored.
//!
//! Every element of the output is summed in one order, whatever the number of rows: a batch gives
//! each sequence bit for bit what it gets alone.

use std::ops::Range;
use std::sync::PoisonError;

use super::Cpu;
use super::columns::Columns;
use super::path::CpuPath;
use super::simd::{Element, Kernel, Simd, dispatch};
use super::tensor::{CpuMatrix, CpuTensor, Elements};
use crate::{MatrixLayout, Store};

/// Multiply-adds below which waking other threads costs more than it saves.
const SERIAL_WORK: usize = 64 * 1024;
/// Outputs of a strip are a multiple of this, so that strips end at whole vectors.
const STRIP: usize = 64;
/// Rows up to which `[in, out]` weights are streamed as they lie.
const STREAMED_ROWS: usize = 4;
/// Bytes of a weight row from which on one row after the other is faster than several at a time.
const STREAM_BYTES: usize = 1024;
/// Sums that are stored together.
const STREAM_OUTPUTS: usize = 16;
/// How far ahead of its use a stream is asked for.
const STREAM_AHEAD: usize = 2048;
/// Bytes of input rows that are reused from the second-level cache while weights stream past.
const ROW_BLOCK_BYTES: usize = 384 * 1024;

/// `out = x·Wᵀ + b`, all parts side by side.
pub(super) fn linear(
    cpu: &Cpu,
    x: &CpuTensor,
    (parts, layout): (&[CpuMatrix], MatrixLayout),
    store: Store,
    out: &mut CpuTensor,
) {
    let (path, threads) = (cpu.path(), cpu.threads());
    let (rows, inputs, width) = (x.rows(), x.columns(), out.columns());
    let columns = Columns::new(out.values_mut(), width);
    let run = |thread: usize, part: &CpuMatrix, start: usize, strip: Range<usize>| {
        let (x, add) = (x.values(), store == Store::Add);
        let strip = StripArgs { x, rows, part, strip, start, columns, add };
        // Waited for only where callers share a backend of one thread.
        let mut sums = cpu.sums[thread].lock().unwrap_or_else(PoisonError::into_inner);
        match part.elements() {
            Elements::F32(w) => run_strip(path, layout, (strip, &mut sums), w),
            Elements::F16(w) => run_strip(path, layout, (strip, &mut sums), w),
            Elements::Bf16(w) => run_strip(path, layout, (strip, &mut sums), w),
        }
    };
    if threads == 1 || rows * inputs * width < SERIAL_WORK {
        let mut start = 0;
        for part in parts {
            run(0, part, start, 0..part.outputs);
            start += part.outputs;
        }
        return;
    }
    // Several strips per thread, so that a thread that is held up does not hold up all. A row of
    // stored [in, out] weights streams best in long runs.
    let strips_per_thread = match layout {
        MatrixLayout::InOut if rows <= STREAMED_ROWS => 1,
        _ => 4,
    };
    let target = width.div_ceil(threads * strips_per_thread).next_multiple_of(STRIP);
    let strips = parts.iter().map(|part| part.outputs.div_ceil(target)).sum();
    cpu.pool.run(strips, &|thread, mut strip| {
        let mut start = 0;
        for part in parts {
            let of_part = part.outputs.div_ceil(target);
            if strip < of_part {
                let outputs = strip * target..((strip + 1) * target).min(part.outputs);
                return run(thread, part, start, outputs);
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

fn run_strip<E: Element>(
    path: CpuPath,
    layout: MatrixLayout,
    (args, sums): (StripArgs<'_>, &mut Vec<f32>),
    w: &[E],
) {
    match layout {
        MatrixLayout::OutIn => dispatch(path, OutIn { args, w }),
        MatrixLayout::InOut if args.rows <= STREAMED_ROWS => {
            dispatch(path, InOutFew { strip: InOutRows { args, w }, sums });
        }
        MatrixLayout::InOut => dispatch(path, InOut { args, w }),
    }
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
                    simd.prefetch(w.as_ptr().wrapping_add(STREAM_AHEAD / size_of::<E>()));
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

/// `[in, out]`, few rows: weight rows are added up as they stream by, several at a time.
struct InOutFew<'a, E> {
    strip: InOutRows<'a, E>,
    /// Holds the sums of the strip while they grow, and is kept by its thread.
    sums: &'a mut Vec<f32>,
}

/// A strip of `[in, out]` weights.
struct InOutRows<'a, E> {
    args: StripArgs<'a>,
    w: &'a [E],
}

impl<E: Element> Kernel for InOutFew<'_, E> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        // As many weight rows at a time as registers hold their factors.
        let Self { strip, sums } = self;
        sums.clear();
        sums.resize(strip.args.rows * strip.args.strip.len(), 0.0);
        match strip.args.rows {
            1 => strip.stream::<S, 1, 8>(simd, sums),
            2 => strip.stream::<S, 2, 4>(simd, sums),
            3 => strip.stream::<S, 3, 4>(simd, sums),
            4 => strip.stream::<S, 4, 4>(simd, sums),
            rows => assert_eq!(rows, 0, "at most {STREAMED_ROWS} rows are streamed"),
        }
    }
}

impl<E: Element> InOutRows<'_, E> {
    #[inline(always)]
    fn stream<S: Simd, const R: usize, const K: usize>(&self, simd: S, sums: &mut [f32]) {
        let (inputs, strip) = (self.args.part.inputs, self.args.strip.len());
        let mut i = 0;
        while i + K <= inputs {
            self.add_rows::<S, R, K>(simd, i, sums);
            i += K;
        }
        while i < inputs {
            self.add_rows::<S, R, 1>(simd, i, sums);
            i += 1;
        }
        for (row, sums) in sums.chunks_exact(strip).enumerate() {
            self.args.finish(row, self.args.strip.start, sums);
        }
    }

    #[inline(always)]
    fn add_rows<S: Simd, const R: usize, const K: usize>(
        &self,
        simd: S,
        i: usize,
        sums: &mut [f32],
    ) {
        let StripArgs { part, strip, .. } = &self.args;
        let (inputs, outputs) = (part.inputs, part.outputs);
        let w: [&[E]; K] = std::array::from_fn(|k| {
            &self.w[(i + k) * outputs + strip.start..(i + k) * outputs + strip.end]
        });
        let mut x = [[simd.splat(0.0); K]; R];
        for (r, x) in x.iter_mut().enumerate() {
            for (x, &value) in x.iter_mut().zip(&self.args.x[r * inputs + i..][..K]) {
                *x = simd.splat(value);
            }
        }
        let whole = strip.len() - strip.len() % S::LANES;
        // Slices of one known length let the compiler drop the checks inside the loop.
        let mut rows = sums.chunks_exact_mut(strip.len());
        let mut sums: [&mut [f32]; R] = std::array::from_fn(|_| rows.next().unwrap_or_default());
        let heads: [&[E]; K] = std::array::from_fn(|k| &w[k][..whole]);
        let mut o = 0;
        while o < whole {
            let mut w = [simd.splat(0.0); K];
            for (w, head) in w.iter_mut().zip(&heads) {
                // The rows lie apart: the processor does not guess where the next ones start.
                simd.prefetch(head.as_ptr().wrapping_add(o + K * outputs));
                *w = E::load(simd, &head[o..o + S::LANES]);
            }
            for (x, sums) in x.iter().zip(&mut sums) {
                let mut sum = simd.load(&sums[o..o + S::LANES]);
                for (w, x) in w.iter().zip(x) {
                    sum = simd.mul_add(*w, *x, sum);
                }
                simd.store(sum, &mut sums[o..o + S::LANES]);
            }
            o += S::LANES;
        }
        if whole < strip.len() {
            for (x, sums) in x.iter().zip(&mut sums) {
                let tail = &mut sums[whole..];
                let mut sum = simd.load_tail(tail);
                for (w, x) in w.iter().zip(x) {
                    sum = simd.mul_add(simd.load_tail(&w[whole..]), *x, sum);
                }
                simd.store_tail(sum, tail);
            }
        }
    }
}

/// `[in, out]`, many rows: panels of weights are widened once and used for every row.
struct InOut<'a, E> {
    args: StripArgs<'a>,
    w: &'a [E],
}

/// Vectors of outputs in a panel.
const PANEL_VECTORS: usize = 4;

impl<E: Element> Kernel for InOut<'_, E> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let (inputs, outputs) = (self.args.part.inputs, self.args.part.outputs);
        let wide = PANEL_VECTORS * S::LANES;
        let mut panel = vec![0.0; inputs * wide];
        for output in self.args.strip.clone().step_by(wide) {
            let n = wide.min(self.args.strip.end - output);
            for (i, panel) in panel.chunks_exact_mut(wide).enumerate() {
                let w = &self.w[i * outputs + output..i * outputs + output + n];
                for (w, panel) in w.chunks(S::LANES).zip(panel.chunks_exact_mut(S::LANES)) {
                    simd.store(simd.load_up_to(w), panel);
                }
            }
            let mut row = 0;
            if S::LANES == 16 {
                while row + 6 <= self.args.rows {
                    self.tile::<S, 6>(simd, &panel, (row, output, n));
                    row += 6;
                }
            }
            while row + 2 <= self.args.rows {
                self.tile::<S, 2>(simd, &panel, (row, output, n));
                row += 2;
            }
            while row < self.args.rows {
                self.tile::<S, 1>(simd, &panel, (row, output, n));
                row += 1;
            }
        }
    }
}

impl<E: Element> InOut<'_, E> {
    #[inline(always)]
    fn tile<S: Simd, const R: usize>(
        &self,
        simd: S,
        panel: &[f32],
        (row, output, n): (usize, usize, usize),
    ) {
        let inputs = self.args.part.inputs;
        let x: [&[f32]; R] =
            std::array::from_fn(|r| &self.args.x[(row + r) * inputs..(row + r + 1) * inputs]);
        let mut sums = [[simd.splat(0.0); PANEL_VECTORS]; R];
        for (i, panel) in panel.chunks_exact(PANEL_VECTORS * S::LANES).enumerate() {
            let w: [S::V; PANEL_VECTORS] =
                std::array::from_fn(|v| simd.load(&panel[v * S::LANES..(v + 1) * S::LANES]));
            for r in 0..R {
                let x = simd.splat(x[r][i]);
                for v in 0..PANEL_VECTORS {
                    sums[r][v] = simd.mul_add(w[v], x, sums[r][v]);
                }
            }
        }
        let mut plain = [0.0; 16 * PANEL_VECTORS];
        for (r, sums) in sums.iter().enumerate() {
            for (v, &sum) in sums.iter().enumerate() {
                simd.store(sum, &mut plain[v * S::LANES..]);
            }
            self.args.finish(row + r, output, &plain[..n]);
        }
    }
}
