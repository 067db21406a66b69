//! Matrix products over quantised weights, in integers.
//!
//! Input rows are quantised too, in the groups of the weights: a group's products are summed
//! exactly, and groups are added up in f32, in their order. A row's result depends neither on the
//! rows beside it nor on which thread computes it.

use std::ops::Range;
use std::sync::PoisonError;

use bytemuck::Zeroable;

use super::activate::InStore;
use super::columns::Columns;
use super::norm::Norm;
use super::packed::{BLOCK, CodeBits, GROUP, Packed, QUAD_BYTES, largest};
use super::simd::{Kernel, Simd, array, dispatch};
use super::tensor::CpuTensor;
use super::{Cpu, SERIAL_ELEMENTS};
use crate::{NormKind, Store};

/// Multiply-adds below which waking other threads costs more than it saves.
const SERIAL_WORK: usize = 128 * 1024;
/// Rows up to which one block after the other is read, as one stream of memory, for which a batch
/// of decode steps waits. More rows wait for products, of which two blocks have more in flight.
const STREAM_ROWS: usize = 16;
/// Bytes that memory gives at a time.
const LINE_BYTES: usize = 64;
/// Lines of the largest record.
const LINES: usize = CodeBits::Eight.record_bytes().div_ceil(LINE_BYTES);
/// Blocks that many rows are multiplied with at once.
const PAIR: usize = 2;
/// Groups of a pair of blocks that stay in the first-level cache while rows go past.
const PANEL_GROUPS: usize = 16;
/// Bytes of quantised rows that are reused from the second-level cache while weights stream past.
const ROWS_BYTES: usize = 512 * 1024;

/// A group of one quantised input row.
#[derive(Debug, Clone, Copy, bytemuck::Zeroable)]
#[repr(C)]
pub(crate) struct RowGroup {
    pub(crate) codes: [i8; GROUP],
    pub(crate) scale: f32,
    /// −128 times the sum of the codes: what codes of weights that are 128 too large add up to.
    start: i32,
    /// The sum of the codes, times the scale.
    pub(crate) sum: f32,
}

impl RowGroup {
    #[inline(always)]
    pub(crate) fn of(x: &[f32; GROUP]) -> Self {
        let largest = largest(x);
        let inverse = if largest > 0.0 { 127.0 / largest } else { 0.0 };
        // Adding 1.5·2²³ leaves the nearest whole number in the lowest bits. What is not finite
        // leaves anything there, and a scale that makes it not finite again.
        let (mut codes, mut sum) = ([0; GROUP], 0);
        // A loop, not `map`: that is too large for the compiler to inline it.
        for (code, x) in codes.iter_mut().zip(x) {
            *code = (x * inverse + 12_582_912.0).to_bits() as i8;
            sum += i32::from(*code);
        }
        let scale = if largest.is_finite() { largest / 127.0 } else { f32::NAN };
        Self { codes, scale, start: -128 * sum, sum: scale * sum as f32 }
    }
}

/// How rows are normalised before they are quantised.
#[derive(Clone, Copy)]
pub(super) struct RowNorm<'a> {
    pub(super) kind: NormKind,
    pub(super) epsilon: f32,
    /// `[inputs]`.
    pub(super) weight: &'a [f32],
    /// `[inputs]`.
    pub(super) bias: Option<&'a [f32]>,
    /// `[rows, inputs]`: room for the normalised rows.
    pub(super) out: Columns<'a>,
}

/// Quantises rows, normalised ones if there is a norm.
struct QuantiseRows<'a> {
    /// `[all rows, inputs]`.
    x: &'a [f32],
    inputs: usize,
    norm: Option<RowNorm<'a>>,
    /// Which rows; nobody else has them.
    rows: Range<usize>,
    /// `[all rows, groups]`.
    out: Columns<'a, RowGroup>,
}

impl Kernel for QuantiseRows<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let groups = self.inputs.div_ceil(GROUP);
        for row in self.rows {
            let mut x = &self.x[row * self.inputs..(row + 1) * self.inputs];
            if let Some(RowNorm { kind, epsilon, weight, bias, out }) = &self.norm {
                let (kind, epsilon, bias) = (*kind, *epsilon, *bias);
                // SAFETY: the row is this kernel's alone.
                let out = unsafe { out.rows(row..row + 1) };
                Norm { kind, epsilon, x, weight, bias, out: &mut *out }.run(simd);
                x = out;
            }
            // SAFETY: as above.
            let out = unsafe { self.out.rows(row..row + 1) };
            let (whole, tail) = x.as_chunks::<GROUP>();
            for (x, out) in whole.iter().zip(&mut *out) {
                *out = RowGroup::of(x);
            }
            if !tail.is_empty() {
                let mut x = [0.0; GROUP];
                x[..tail.len()].copy_from_slice(tail);
                out[groups - 1] = RowGroup::of(&x);
            }
        }
    }
}

/// Whether a function can be applied where products with `packed` are stored.
pub(super) fn stores_activated(packed: &Packed, gated: bool) -> bool {
    // A block that held ends of both halves would be two threads'.
    !gated || packed.outputs.is_multiple_of(2 * BLOCK)
}

/// `out = x·Wᵀ + b`, of normalised rows if there is a norm; and the function of it, if any, which
/// the matrix has to allow ([`stores_activated`]).
pub(super) fn linear(
    cpu: &Cpu,
    (x, norm): (&CpuTensor, Option<RowNorm<'_>>),
    packed: &Packed,
    store: Store,
    out: &mut CpuTensor,
    function: Option<&InStore<'_>>,
) {
    let (rows, groups, path) = (x.rows(), packed.groups(), cpu.path());
    // One operation at a time uses a backend's threads, so this does not wait.
    let mut quantised = cpu.quantised.lock().unwrap_or_else(PoisonError::into_inner);
    if quantised.len() < rows * groups {
        quantised.resize(rows * groups, RowGroup::zeroed());
    }
    let quantised = &mut quantised[..rows * groups];
    let (inputs, x) = (packed.inputs, x.values());
    let groups_of = Columns::new(&mut *quantised, groups);
    let quantise = |rows| dispatch(path, QuantiseRows { x, inputs, norm, rows, out: groups_of });
    if cpu.threads() == 1 || x.len() < SERIAL_ELEMENTS {
        quantise(0..rows);
    } else {
        let at_once = rows.div_ceil(4 * cpu.threads());
        cpu.pool.run(rows.div_ceil(at_once), &|_, i| {
            quantise(i * at_once..((i + 1) * at_once).min(rows));
        });
    }
    let columns = Columns::new(out.values_mut(), packed.outputs);
    let (x, add, blocks) = (&*quantised, store == Store::Add, packed.blocks());
    let run = |thread: usize, blocks: Range<usize>, after: Option<usize>| {
        // Never waited for: each thread has its own.
        let mut sums = cpu.sums[thread].lock().unwrap_or_else(PoisonError::into_inner);
        if rows > STREAM_ROWS {
            sums.resize(PAIR * BLOCK * rows.min(rows_at_once(packed)));
        }
        dispatch(path, Product { packed, x, rows, blocks, after, columns, add, sums: &mut sums });
    };
    if cpu.threads() == 1 || rows * packed.inputs * packed.outputs < SERIAL_WORK {
        run(0, 0..blocks, None);
        if let Some(function) = function {
            function.strip(path, columns, 0..function.width);
        }
        return;
    }
    // Gate and up are computed together, and lie in two halves.
    let halves = if function.is_some_and(|function| function.gated) { 2 } else { 1 };
    let blocks = blocks / halves;
    // Several strips per thread, so that a thread that is held up does not hold up all.
    let strip = blocks.div_ceil(4 * cpu.threads()).next_multiple_of(2);
    cpu.pool.run(blocks.div_ceil(strip), &|thread, i| {
        let strip = i * strip..((i + 1) * strip).min(blocks);
        for half in 0..halves {
            let first = half * blocks + strip.start;
            let after = (half + 1 < halves).then_some(first + blocks);
            run(thread, first..half * blocks + strip.end, after);
        }
        if let Some(function) = function {
            let outputs = strip.start * BLOCK..(strip.end * BLOCK).min(function.width);
            function.strip(path, columns, outputs);
        }
    });
}

/// Rows that lie in the second-level cache together.
fn rows_at_once(packed: &Packed) -> usize {
    (ROWS_BYTES / (packed.groups() * size_of::<RowGroup>())).max(STREAM_ROWS)
}

/// Some blocks of outputs, for all rows.
struct Product<'a> {
    packed: &'a Packed,
    /// `[rows, groups]`.
    x: &'a [RowGroup],
    rows: usize,
    blocks: Range<usize>,
    /// The block that is read next, if it is known.
    after: Option<usize>,
    columns: Columns<'a>,
    add: bool,
    /// `[rows at once][PAIR][BLOCK]`, where there are more than [`STREAM_ROWS`].
    sums: &'a mut [f32],
}

impl Kernel for Product<'_> {
    type Output = ();
    const INTEGERS: bool = true;

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        match self.packed.bits {
            CodeBits::Eight => self.rows::<S, false>(simd),
            CodeBits::Four => self.rows::<S, true>(simd),
        }
    }
}

impl Product<'_> {
    #[inline(always)]
    fn rows<S: Simd, const FOUR: bool>(self, simd: S) {
        let Self { packed, rows, ref blocks, .. } = self;
        let sums = self.sums;
        let tiles = Tiles { packed, x: self.x, columns: self.columns, add: self.add };
        for first in (0..rows).step_by(rows_at_once(packed)) {
            let rows = first..(first + rows_at_once(packed)).min(rows);
            let mut block = blocks.start;
            if rows.len() > STREAM_ROWS {
                while block + PAIR <= blocks.end {
                    tiles.pair::<S, FOUR>(simd, &rows, block, sums);
                    block += PAIR;
                }
            }
            while block < blocks.end {
                let next = if block + 1 < blocks.end { Some(block + 1) } else { self.after };
                tiles.stream::<S, FOUR>(simd, rows.clone(), block, next);
                block += 1;
            }
        }
    }
}

/// What every tile of a product reads and writes.
struct Tiles<'a> {
    packed: &'a Packed,
    /// `[rows, groups]`.
    x: &'a [RowGroup],
    columns: Columns<'a>,
    add: bool,
}

impl Tiles<'_> {
    /// Two blocks for many rows, panel after panel of their groups.
    #[inline(always)]
    fn pair<S: Simd, const FOUR: bool>(
        &self,
        simd: S,
        rows: &Range<usize>,
        block: usize,
        sums: &mut [f32],
    ) {
        let groups = self.packed.groups();
        for first in (0..groups).step_by(PANEL_GROUPS) {
            let panel = first..(first + PANEL_GROUPS).min(groups);
            let (mut row, mut sums) = (rows.start, &mut *sums);
            if S::LANES == 16 {
                while row + 6 <= rows.end {
                    sums = self.panel_tile::<S, FOUR, 6>(simd, row, block, &panel, sums);
                    row += 6;
                }
            }
            while row + 2 <= rows.end {
                sums = self.panel_tile::<S, FOUR, 2>(simd, row, block, &panel, sums);
                row += 2;
            }
            if row < rows.end {
                self.panel_tile::<S, FOUR, 1>(simd, row, block, &panel, sums);
            }
        }
    }

    /// Adds the products of one panel to what `sums` holds of those before, or stores the result
    /// where it is the last; returns the sums that follow.
    #[inline(always)]
    fn panel_tile<'s, S: Simd, const FOUR: bool, const R: usize>(
        &self,
        simd: S,
        row: usize,
        block: usize,
        panel: &Range<usize>,
        sums: &'s mut [f32],
    ) -> &'s mut [f32] {
        let (own, after) = sums.split_at_mut(R * PAIR * BLOCK);
        let mut totals = [[simd.block_zero(); PAIR]; R];
        if panel.start > 0 {
            for r in 0..R {
                for o in 0..PAIR {
                    totals[r][o] = simd.block(&own[(r * PAIR + o) * BLOCK..][..BLOCK]);
                }
            }
        }
        let totals = self.tile::<S, FOUR, R, PAIR>(simd, (row, block), panel, None, totals);
        if panel.end == self.packed.groups() {
            self.finish_tile(simd, row, block, &totals);
            return after;
        }
        for r in 0..R {
            for o in 0..PAIR {
                own[(r * PAIR + o) * BLOCK..][..BLOCK]
                    .copy_from_slice(&simd.block_values(totals[r][o]));
            }
        }
        after
    }

    /// One block for few rows, in as few passes as registers allow: each asks for its share of
    /// the next block, so that memory works while the rows are multiplied.
    #[inline(always)]
    fn stream<S: Simd, const FOUR: bool>(
        &self,
        simd: S,
        rows: Range<usize>,
        block: usize,
        next: Option<usize>,
    ) {
        let most = if S::LANES == 16 { 8 } else { 2 };
        let passes = rows.len().div_ceil(most);
        let share = LINES.div_ceil(passes);
        let mut row = rows.start;
        for pass in 0..passes {
            let lines = pass * share..((pass + 1) * share).min(LINES);
            let ahead = next.map(|next| (self.packed.block(next), lines));
            let ahead = ahead.as_ref();
            let n = (rows.end - row).div_ceil(passes - pass);
            match n {
                8 => self.stream_tile::<S, FOUR, 8>(simd, row, block, ahead),
                7 => self.stream_tile::<S, FOUR, 7>(simd, row, block, ahead),
                6 => self.stream_tile::<S, FOUR, 6>(simd, row, block, ahead),
                5 => self.stream_tile::<S, FOUR, 5>(simd, row, block, ahead),
                4 => self.stream_tile::<S, FOUR, 4>(simd, row, block, ahead),
                3 => self.stream_tile::<S, FOUR, 3>(simd, row, block, ahead),
                2 => self.stream_tile::<S, FOUR, 2>(simd, row, block, ahead),
                _ => self.stream_tile::<S, FOUR, 1>(simd, row, block, ahead),
            }
            row += n;
        }
    }

    #[inline(always)]
    fn stream_tile<S: Simd, const FOUR: bool, const R: usize>(
        &self,
        simd: S,
        row: usize,
        block: usize,
        ahead: Option<&(&[u8], Range<usize>)>,
    ) {
        let (groups, zeros) = (0..self.packed.groups(), [[simd.block_zero(); 1]; R]);
        let sums = self.tile::<S, FOUR, R, 1>(simd, (row, block), &groups, ahead, zeros);
        self.finish_tile(simd, row, block, &sums);
    }

    /// Adds the products of `panel`, some groups, of rows `row..row + R` with blocks
    /// `block..block + O`. Asks for some lines of each record of the block that comes next.
    #[inline(always)]
    fn tile<S: Simd, const FOUR: bool, const R: usize, const O: usize>(
        &self,
        simd: S,
        (row, block): (usize, usize),
        panel: &Range<usize>,
        ahead: Option<&(&[u8], Range<usize>)>,
        mut sums: [[S::Block; O]; R],
    ) -> [[S::Block; O]; R] {
        let bits = if FOUR { CodeBits::Four } else { CodeBits::Eight };
        let (groups, bytes) = (self.packed.groups(), bits.record_bytes());
        let w: [&[u8]; O] =
            std::array::from_fn(|o| &self.packed.block(block + o)[..groups * bytes]);
        let x: [&[RowGroup]; R] =
            std::array::from_fn(|r| &self.x[(row + r) * groups..(row + r + 1) * groups]);
        let (w, x) = (
            std::array::from_fn::<_, O, _>(|o| &w[o][..panel.end * bytes]),
            std::array::from_fn::<_, R, _>(|r| &x[r][..panel.end]),
        );
        for group in panel.clone() {
            if let Some((next, lines)) = ahead {
                let next = next.as_ptr().wrapping_add(group * bytes);
                for line in lines.start..lines.end.min(bytes.div_ceil(LINE_BYTES)) {
                    simd.prefetch(next.wrapping_add(line * LINE_BYTES));
                }
            }
            let records: [&[u8]; O] =
                std::array::from_fn(|o| &w[o][group * bytes..(group + 1) * bytes]);
            let x: [&RowGroup; R] = std::array::from_fn(|r| &x[r][group]);
            let mut counts = array!(R, |r| [simd.counts(if FOUR { 0 } else { x[r].start }); O]);
            if FOUR {
                for quad in 0..4 {
                    let codes = array!(O, |o| simd.codes(&records[o][quad * QUAD_BYTES..]));
                    let low = array!(O, |o| simd.low_halves(codes[o]));
                    let high = array!(O, |o| simd.high_halves(codes[o]));
                    for r in 0..R {
                        for (quad, codes) in [(quad, &low), (quad + 4, &high)] {
                            let x = quad_of(x[r], quad);
                            for o in 0..O {
                                counts[r][o] = simd.add_products(counts[r][o], codes[o], x);
                            }
                        }
                    }
                }
            } else {
                for quad in 0..8 {
                    let codes = array!(O, |o| simd.codes(&records[o][quad * QUAD_BYTES..]));
                    for r in 0..R {
                        let x = quad_of(x[r], quad);
                        for o in 0..O {
                            counts[r][o] = simd.add_products(counts[r][o], codes[o], x);
                        }
                    }
                }
            }
            for o in 0..O {
                let halves = &records[o][bits.code_bytes()..];
                let scale = simd.block_f16(halves);
                for r in 0..R {
                    sums[r][o] = simd.add_counts(sums[r][o], counts[r][o], scale, x[r].scale);
                }
                if FOUR {
                    let minimum = simd.block_f16(&halves[2 * BLOCK..]);
                    for r in 0..R {
                        sums[r][o] = simd.add_block(sums[r][o], minimum, x[r].sum);
                    }
                }
            }
        }
        sums
    }

    #[inline(always)]
    fn finish_tile<S: Simd, const R: usize, const O: usize>(
        &self,
        simd: S,
        row: usize,
        block: usize,
        sums: &[[S::Block; O]; R],
    ) {
        for (r, sums) in sums.iter().enumerate() {
            for (o, &sum) in sums.iter().enumerate() {
                self.finish(row + r, block + o, simd.block_values(sum));
            }
        }
    }

    /// Adds bias and residual to finished sums and stores them.
    #[inline(always)]
    fn finish(&self, row: usize, block: usize, mut sums: [f32; BLOCK]) {
        let first = block * BLOCK;
        let n = BLOCK.min(self.packed.outputs - first);
        // SAFETY: the columns belong to this strip, which is one thread's; the slice ends here.
        let out = unsafe { self.columns.slice(row, first..first + n) };
        for (sum, bias) in sums.iter_mut().zip(&self.packed.bias[first..first + BLOCK]) {
            *sum += bias;
        }
        for (out, sum) in out.iter_mut().zip(sums) {
            *out = if self.add { *out + sum } else { sum };
        }
    }
}

/// Four codes of a row, as one number.
#[inline(always)]
fn quad_of(x: &RowGroup, quad: usize) -> i32 {
    let quads: &[i32; GROUP / 4] = bytemuck::cast_ref(&x.codes);
    i32::from_le(quads[quad])
}

#[cfg(all(test, target_arch = "x86_64"))]
mod tests {
    use half::f16;

    use super::super::simd::avx512;
    use super::*;
    use crate::{
        Backend, CpuOptions, CpuPath, DType, HostTensor, LinearPart, LinearSpec, MatrixLayout,
        WeightFormat,
    };

    /// Integers are summed exactly, so that both ways to multiply them give the same bits.
    #[test]
    fn without_vnni_the_numbers_are_the_same() {
        if !CpuPath::Avx512.is_available() {
            return;
        }
        let options = CpuOptions { threads: Some(1), path: Some(CpuPath::Avx512) };
        let cpu = Cpu::new(options).unwrap();
        let (inputs, outputs, rows) = (300, 70, 19);
        let numbers = |n: usize, step: usize| -> Vec<f32> {
            (0..n).map(|i| ((i * step) % 1999) as f32 / 999.0 - 1.0).collect()
        };
        let bytes: Vec<u8> = numbers(inputs * outputs, 7919)
            .iter()
            .flat_map(|&x| f16::from_f32(x).to_le_bytes())
            .collect();
        for format in [WeightFormat::Int8, WeightFormat::Int4] {
            let weight = HostTensor::new("w", bytes.clone().into(), DType::F16, &[outputs, inputs]);
            let parts = vec![LinearPart { weight: weight.unwrap(), bias: None }];
            let spec = LinearSpec { parts, layout: MatrixLayout::OutIn, format };
            let linear = cpu.load_linear(spec).unwrap();
            let super::super::tensor::CpuWeights::Packed(packed) = &linear.weights else {
                unreachable!("quantised weights")
            };
            let groups = packed.groups();
            let mut x = vec![RowGroup::zeroed(); rows * groups];
            let values = numbers(rows * inputs, 104_729);
            let out = Columns::new(&mut x, inputs.div_ceil(GROUP));
            let all = QuantiseRows { x: &values, inputs, norm: None, rows: 0..rows, out };
            dispatch(CpuPath::Avx512, all);
            // One row, a batch in two passes, and enough for pairs of blocks.
            for rows in [1, 5, 16, rows] {
                let product = |out: &mut [f32], vnni: bool| {
                    let columns = Columns::new(out, outputs);
                    let (x, blocks) = (&x[..rows * groups], 0..packed.blocks());
                    let sums = &mut vec![0.0; PAIR * BLOCK * rows];
                    let (after, add) = (None, false);
                    let product = Product { packed, x, rows, blocks, after, columns, add, sums };
                    if vnni {
                        dispatch(CpuPath::Avx512, product);
                    } else {
                        avx512::run_without_vnni(product);
                    }
                };
                let mut found = [vec![0.0; rows * outputs], vec![1.0; rows * outputs]];
                product(&mut found[0], true);
                product(&mut found[1], false);
                assert_eq!(found[0], found[1], "{format:?}, {rows} rows");
                assert!(found[0].iter().any(|&x| x != 0.0));
            }
        }
    }
}
