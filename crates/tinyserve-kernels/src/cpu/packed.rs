//! Matrices quantised in groups and packed in the order in which kernels read them.
//!
//! Sixteen outputs lie side by side, and for each group of 32 inputs one record holds all that a
//! kernel needs of them, so that a product reads one stream of bytes:
//!
//! | format | codes                                        | then            | bytes |
//! |--------|----------------------------------------------|-----------------|-------|
//! | int8   | `[8 quads][16 outputs][4 inputs]`, `w + 128` | scale `[16]` f16 | 544  |
//! | int4   | `[4][16 outputs][4 inputs]`, quad `i` in the low half of a byte and quad `i + 4` in the high one | scale `[16]`, minimum `[16]` f16 | 320 |
//!
//! A weight is `scale·code` in int8 and `scale·code + minimum` in int4.

use std::sync::{Mutex, PoisonError};

use bytes::Bytes;
use half::f16;

use super::Cpu;
use super::memory::zeroed;
use super::path::CpuPath;
use super::simd::{Kernel, Simd, dispatch};
use super::tensor::{CpuMatrix, Elements};
use crate::{KernelError, LinearImage, MatrixLayout, WeightFormat};

/// Names the layout above and the search for scales: another name means other bytes.
pub(crate) const IMAGE_LAYOUT: &str = "blocks-of-16-groups-of-32/2";

/// Inputs that share a scale.
pub(crate) const GROUP: usize = 32;
/// Outputs side by side.
pub(crate) const BLOCK: usize = 16;
/// Inputs of an output that lie together.
const QUAD: usize = 4;
/// Bytes of one quad of every output of a block.
pub(crate) const QUAD_BYTES: usize = QUAD * BLOCK;
/// Bytes of one f16 of every output of a block.
const HALF_BYTES: usize = 2 * BLOCK;

/// How many bits a code has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum CodeBits {
    Eight,
    Four,
}

impl CodeBits {
    fn of(format: WeightFormat) -> Self {
        match format {
            WeightFormat::Int4 => Self::Four,
            WeightFormat::Int8 | WeightFormat::Stored => Self::Eight,
        }
    }

    /// Bytes of the codes of a record.
    pub(crate) const fn code_bytes(self) -> usize {
        match self {
            Self::Eight => GROUP * BLOCK,
            Self::Four => GROUP * BLOCK / 2,
        }
    }

    /// Bytes of a record.
    pub(crate) const fn record_bytes(self) -> usize {
        match self {
            Self::Eight => self.code_bytes() + HALF_BYTES,
            Self::Four => self.code_bytes() + 2 * HALF_BYTES,
        }
    }
}

/// A quantised matrix `[outputs, inputs]` and its bias.
#[derive(Debug)]
pub(crate) struct Packed {
    pub(crate) bits: CodeBits,
    pub(crate) inputs: usize,
    pub(crate) outputs: usize,
    /// Records `[blocks, groups]`.
    records: Bytes,
    /// `[blocks·16]`; zeros where there is no bias.
    pub(crate) bias: Vec<f32>,
}

impl Packed {
    /// Quantises matrices over one input, side by side, on the threads of `cpu`.
    pub(crate) fn new(
        cpu: &Cpu,
        format: WeightFormat,
        layout: MatrixLayout,
        parts: &[CpuMatrix],
    ) -> Result<Self, KernelError> {
        let bits = CodeBits::of(format);
        let inputs = parts[0].inputs;
        let outputs: usize = parts.iter().map(|part| part.outputs).sum();
        let (blocks, groups) = (outputs.div_ceil(BLOCK), inputs.div_ceil(GROUP));
        let block_bytes = groups * bits.record_bytes();
        let mut records = zeroed(blocks * block_bytes)?;
        let mut bias = vec![0.0; blocks * BLOCK];
        let mut first = 0;
        for part in parts {
            if let Some(values) = &part.bias {
                bias[first..first + part.outputs].copy_from_slice(values);
            }
            first += part.outputs;
        }
        let chunks: Vec<_> =
            records[..blocks * block_bytes].chunks_exact_mut(block_bytes).map(Mutex::new).collect();
        cpu.pool.run(blocks, &|_, block| {
            // Never waited for: each block is taken once.
            let records = &mut **chunks[block].lock().unwrap_or_else(PoisonError::into_inner);
            let pack = PackBlock { bits, layout, parts, first: block * BLOCK, records };
            match cpu.path() {
                CpuPath::Scalar => pack.pack(),
                path => dispatch(path, pack),
            }
        });
        drop(chunks);
        Ok(Self { bits, inputs, outputs, records: Bytes::from_owner(records), bias })
    }

    /// What [`Self::image`] gave, in the memory where it lies.
    pub(crate) fn from_image(image: LinearImage) -> Result<Self, KernelError> {
        let LinearImage { format, inputs, outputs, weights, bias } = image;
        let bits = match format {
            WeightFormat::Int8 => CodeBits::Eight,
            WeightFormat::Int4 => CodeBits::Four,
            WeightFormat::Stored => {
                return Err(KernelError::Invalid {
                    what: "image of a linear layer",
                    found: "stored weights".to_owned(),
                    expected: "quantised ones".to_owned(),
                });
            }
        };
        let (blocks, groups) = (outputs.div_ceil(BLOCK), inputs.div_ceil(GROUP));
        let bytes = groups.saturating_mul(bits.record_bytes()).saturating_mul(blocks);
        if inputs == 0 || outputs == 0 || weights.len() != bytes || bias.len() != blocks * BLOCK {
            return Err(KernelError::Invalid {
                what: "image of a linear layer",
                found: format!("{} bytes and {} biases", weights.len(), bias.len()),
                expected: format!("what [{outputs}, {inputs}] takes as {format:?}"),
            });
        }
        Ok(Self { bits, inputs, outputs, records: weights, bias })
    }

    /// Its content, shared with it.
    pub(crate) fn image(&self) -> LinearImage {
        let bytes = self.blocks() * self.groups() * self.bits.record_bytes();
        LinearImage {
            format: match self.bits {
                CodeBits::Eight => WeightFormat::Int8,
                CodeBits::Four => WeightFormat::Int4,
            },
            inputs: self.inputs,
            outputs: self.outputs,
            weights: self.records.slice(..bytes),
            bias: self.bias.clone(),
        }
    }

    /// Groups of inputs, the last one filled up with zeros.
    pub(crate) fn groups(&self) -> usize {
        self.inputs.div_ceil(GROUP)
    }

    /// Blocks of outputs, the last one filled up with zeros.
    pub(crate) fn blocks(&self) -> usize {
        self.outputs.div_ceil(BLOCK)
    }

    /// All records.
    pub(crate) fn records(&self) -> &[u8] {
        &self.records[..self.blocks() * self.groups() * self.bits.record_bytes()]
    }

    /// The records of one block, one for each group.
    pub(crate) fn block(&self, block: usize) -> &[u8] {
        let bytes = self.groups() * self.bits.record_bytes();
        &self.records[block * bytes..(block + 1) * bytes]
    }

    /// Bytes of memory.
    pub(crate) fn bytes(&self) -> usize {
        self.records.len() + 4 * self.bias.len()
    }

    /// The group `group` of output `output`: codes, scale and minimum.
    pub(crate) fn group(&self, output: usize, group: usize) -> ([i32; GROUP], f32, f32) {
        let (bits, lane) = (self.bits, output % BLOCK);
        let record = &self.block(output / BLOCK)[group * bits.record_bytes()..];
        let half = |at: usize| {
            let at = bits.code_bytes() + at * HALF_BYTES + 2 * lane;
            f16::from_le_bytes([record[at], record[at + 1]]).to_f32()
        };
        let code = |i: usize| {
            let (quad, at) = (i / QUAD, QUAD * lane + i % QUAD);
            match bits {
                CodeBits::Eight => i32::from(record[quad * QUAD_BYTES + at]) - 128,
                CodeBits::Four => {
                    let byte = record[quad % 4 * QUAD_BYTES + at];
                    i32::from(if quad < 4 { byte & 15 } else { byte >> 4 })
                }
            }
        };
        let minimum = if bits == CodeBits::Four { half(1) } else { 0.0 };
        (std::array::from_fn(code), half(0), minimum)
    }

    /// Adds row `output` to `out` `[inputs]`, or puts it there.
    pub(crate) fn embed_row(&self, output: usize, add: bool, out: &mut [f32]) {
        for (group, out) in out.chunks_mut(GROUP).enumerate() {
            let (codes, scale, minimum) = self.group(output, group);
            for (out, code) in out.iter_mut().zip(codes) {
                let x = scale * code as f32 + minimum;
                *out = if add { *out + x } else { x };
            }
        }
    }
}

/// Bytes of [`Packed`] weights; saturated where no machine can hold them.
pub(crate) fn packed_bytes(format: WeightFormat, inputs: u64, outputs: u64) -> u64 {
    let (blocks, groups) = (outputs.div_ceil(BLOCK as u64), inputs.div_ceil(GROUP as u64));
    let records = blocks.saturating_mul(groups);
    let biases = 4 * blocks * BLOCK as u64;
    records.saturating_mul(CodeBits::of(format).record_bytes() as u64).saturating_add(biases)
}

/// Quantises the outputs of one block.
struct PackBlock<'a> {
    bits: CodeBits,
    layout: MatrixLayout,
    parts: &'a [CpuMatrix],
    /// The block's first output.
    first: usize,
    /// `[groups]`, zeros.
    records: &'a mut [u8],
}

impl Kernel for PackBlock<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, _simd: S) {
        // Plain loops: compiled here for the widest vectors, and the same numbers on every path.
        self.pack();
    }
}

impl PackBlock<'_> {
    #[inline(always)]
    fn pack(self) {
        let record_bytes = self.bits.record_bytes();
        for (group, record) in self.records.chunks_exact_mut(record_bytes).enumerate() {
            let (codes, halves) = record.split_at_mut(self.bits.code_bytes());
            if self.bits == CodeBits::Eight {
                // What no weight is written to is a weight of 0.
                codes.fill(128);
            }
            let (mut first, mut lane) = (0, 0);
            for part in self.parts {
                let end = first + part.outputs;
                while lane < BLOCK && (first..end).contains(&(self.first + lane)) {
                    let x = read_group(part, self.layout, self.first + lane - first, group);
                    write_lane(self.bits, &x, lane, codes, halves);
                    lane += 1;
                }
                first = end;
            }
        }
    }
}

/// Inputs `group·32..` of one output, with zeros behind the last one.
#[inline(always)]
fn read_group(part: &CpuMatrix, layout: MatrixLayout, output: usize, group: usize) -> [f32; GROUP] {
    let start = group * GROUP;
    let n = GROUP.min(part.inputs - start);
    let (first, stride) = match layout {
        MatrixLayout::OutIn => (output * part.inputs + start, 1),
        MatrixLayout::InOut => (start * part.outputs + output, part.outputs),
    };
    let mut x = [0.0; GROUP];
    let places = || (first..).step_by(stride);
    match part.elements() {
        Elements::F32(w) => x[..n].iter_mut().zip(places()).for_each(|(x, at)| *x = w[at]),
        Elements::F16(w) => x[..n].iter_mut().zip(places()).for_each(|(x, at)| *x = w[at].to_f32()),
        Elements::Bf16(w) => {
            x[..n].iter_mut().zip(places()).for_each(|(x, at)| *x = w[at].to_f32());
        }
    }
    x
}

#[inline(always)]
fn write_lane(bits: CodeBits, x: &[f32; GROUP], lane: usize, codes: &mut [u8], halves: &mut [u8]) {
    let mut put = |at: usize, x: f16| {
        halves[at * HALF_BYTES + 2 * lane..][..2].copy_from_slice(&x.to_le_bytes());
    };
    match bits {
        CodeBits::Eight => {
            let (of, scale) = quantise_int8(x);
            put(0, scale);
            for (quad, of) in of.chunks_exact(QUAD).enumerate() {
                codes[quad * QUAD_BYTES + QUAD * lane..][..QUAD].copy_from_slice(of);
            }
        }
        CodeBits::Four => {
            let (of, scale, minimum) = quantise_int4(x);
            put(0, scale);
            put(1, minimum);
            for i in 0..GROUP / 2 {
                let at = i / QUAD * QUAD_BYTES + QUAD * lane + i % QUAD;
                codes[at] = of[i] | (of[i + GROUP / 2] << 4);
            }
        }
    }
}

/// Codes `w/scale + 128`, and the scale.
#[inline(always)]
fn quantise_int8(x: &[f32; GROUP]) -> ([u8; GROUP], f16) {
    let scale = f16::from_f32(largest(x) / 127.0);
    let inverse = if scale.to_f32() == 0.0 { 0.0 } else { scale.to_f32().recip() };
    let mut codes = [0; GROUP];
    for (code, x) in codes.iter_mut().zip(x) {
        *code = (nearest_whole((x * inverse).clamp(-127.0, 127.0)) + 128.0) as u8;
    }
    (codes, scale)
}

/// The nearest whole number to a small one, without a call: adding 1.5·2²³ leaves no room for
/// fractions.
#[inline(always)]
fn nearest_whole(x: f32) -> f32 {
    (x + 12_582_912.0) - 12_582_912.0
}

/// The largest magnitude; NaN if there is one, because its bits are above every number's.
#[inline(always)]
pub(super) fn largest(x: &[f32; GROUP]) -> f32 {
    f32::from_bits(x.iter().fold(0, |most, x| most.max(x.to_bits() & 0x7fff_ffff)))
}

/// Shares of a group's range that are left out at either end: smaller steps between all other
/// weights pay for a few at the ends that are cut off.
const LEFT_OUT: [f32; 3] = [0.0, 0.05, 0.1];
/// Times that codes and the line through them are fitted to each other, from each range.
const FITS: usize = 2;

/// Codes 0 to 15, the scale and the minimum: those of the least squared error among fits from
/// every range that [`LEFT_OUT`] leaves.
#[inline(always)]
fn quantise_int4(x: &[f32; GROUP]) -> ([u8; GROUP], f16, f16) {
    let low = x.iter().fold(f32::INFINITY, |a, &b| a.min(b));
    let high = x.iter().fold(f32::NEG_INFINITY, |a, &b| a.max(b));
    if !largest(x).is_finite() {
        // Broken weights stay broken.
        return ([0; GROUP], f16::NAN, f16::NAN);
    }
    let mut best = ([0.0; GROUP], f16::ZERO, f16::from_f32(low));
    let mut least = f32::INFINITY;
    for below in LEFT_OUT {
        for above in LEFT_OUT {
            let (codes, scale, minimum) =
                fit(x, low + (high - low) * below, high - (high - low) * above);
            let mut errors = [0.0; GROUP];
            for ((out, code), x) in errors.iter_mut().zip(&codes).zip(x) {
                let error = scale.to_f32() * code + minimum.to_f32() - x;
                *out = error * error;
            }
            let error = sum(&errors, |x| x);
            if error < least {
                (least, best) = (error, (codes, scale, minimum));
            }
        }
    }
    let mut codes = [0; GROUP];
    for (out, code) in codes.iter_mut().zip(best.0) {
        *out = code as u8;
    }
    (codes, best.1, best.2)
}

/// Codes as numbers, scale and minimum: from the line that spreads codes over `low..=high`, each
/// time the line through the last codes that is nearest to the weights, and the codes nearest to
/// that.
#[inline(always)]
fn fit(x: &[f32; GROUP], low: f32, high: f32) -> ([f32; GROUP], f16, f16) {
    let mean = sum(x, |x| x) / GROUP as f32;
    let mut codes = nearest(x, (high - low) / 15.0, low);
    let (mut scale, mut minimum) = (f16::ZERO, f16::ZERO);
    for _ in 0..FITS {
        let centre = sum(&codes, |code| code) / GROUP as f32;
        let spread = sum(&codes, |code| (code - centre) * (code - centre));
        let mut products = [0.0; GROUP];
        for ((out, code), x) in products.iter_mut().zip(&codes).zip(x) {
            *out = (code - centre) * (x - mean);
        }
        let slope = if spread > 0.0 { sum(&products, |x| x) / spread } else { 0.0 };
        scale = f16::from_f32(slope);
        minimum = f16::from_f32(mean - scale.to_f32() * centre);
        codes = nearest(x, scale.to_f32(), minimum.to_f32());
    }
    (codes, scale, minimum)
}

/// The nearest codes of `x`, as numbers.
#[inline(always)]
fn nearest(x: &[f32; GROUP], scale: f32, minimum: f32) -> [f32; GROUP] {
    let inverse = if scale == 0.0 { 0.0 } else { scale.recip() };
    let mut codes = [0.0; GROUP];
    for (code, x) in codes.iter_mut().zip(x) {
        *code = nearest_whole(((x - minimum) * inverse).clamp(0.0, 15.0));
    }
    codes
}

/// A sum in an order that vectors of any width keep.
#[inline(always)]
fn sum(x: &[f32; GROUP], f: impl Fn(f32) -> f32) -> f32 {
    let mut lanes = [0.0; 16];
    for x in x.chunks_exact(16) {
        for (lane, &x) in lanes.iter_mut().zip(x) {
            *lane += f(x);
        }
    }
    lanes.iter().sum()
}
