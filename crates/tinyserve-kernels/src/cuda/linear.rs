//! Matrices on a device: loading, products with rows, embedding.

use std::sync::OnceLock;

use super::Cuda;
use super::bucket::{MOST_ROWS, bucket, filled};
use super::cublas::{Products, Target};
use super::error::CudaError;
use super::launch::{Arg, Launcher, Shape};
use super::memory::{Buffer, Staging, Upload, grown};
use super::tensor::{CudaLinear, CudaMatrix, CudaWeights};
use super::workload::CudaWorkload;
use super::workload::f32s;
use crate::cpu::{CodeBits, CpuWeights, GROUP};
use crate::{
    Cpu, CpuLinear, CpuOptions, DType, EmbedArgs, KernelError, LinearArgs, LinearSpec,
    MatrixLayout, Store, WeightFormat,
};

/// Outputs of a block of the products over stored weights.
const GEMV_OUTPUTS: usize = 8;
/// Rows and outputs of a block of the products of many rows.
const GEMM_TILE: usize = 64;
/// Rows from which on weights go through shared memory: below, most of a tile would be empty.
const GEMM_ROWS: usize = 32;
/// Outputs of a block of the products over quantised weights.
const QUANTISED_OUTPUTS: usize = 16;

/// Quantised input rows, and what cuBLAS needs.
#[derive(Debug, Default)]
pub(super) struct Scratch {
    pub(super) products: Products,
    codes: Option<Buffer>,
    scales: Option<Buffer>,
    sums: Option<Buffer>,
}

/// Most bytes of quantised rows.
pub(super) fn most_bytes(workload: &CudaWorkload<'_>) -> u64 {
    if workload.weights.1 == WeightFormat::Stored {
        return 0;
    }
    let groups = workload.widest.0.div_ceil(GROUP);
    let n = bucket(workload.tokens.max(workload.logits.0)) * groups;
    f32s(&[n, GROUP / 4]) + 2 * f32s(&[n])
}

/// Takes a linear layer over from a checkpoint.
pub(super) fn load(
    device: &Launcher,
    staging: &mut Staging,
    spec: LinearSpec,
) -> Result<CudaLinear, KernelError> {
    let (layout, format) = (spec.layout, spec.format);
    let name = spec.parts.first().map_or_else(String::new, |part| part.weight.name().to_owned());
    let what = format!("tensor {name:?}");
    // The CPU's loader checks shapes, and quantises on its threads.
    let host = match format {
        WeightFormat::Stored => CpuLinear::new(&Cpu::reference(), spec)?,
        _ => CpuLinear::new(host_threads()?, spec)?,
    };
    let (inputs, outputs) = (host.inputs, host.outputs);
    let weights = match host.weights {
        CpuWeights::Packed(packed) => CudaWeights::Quantised {
            bits: packed.bits,
            groups: packed.groups(),
            records: staging.upload(device, packed.records(), &what)?,
            bias: Buffer::of(device, &packed.bias, &what)?,
        },
        CpuWeights::Stored { parts, .. } => {
            let one_type =
                parts.windows(2).all(|pair| pair[0].weight.dtype() == pair[1].weight.dtype());
            let mut matrices = Vec::new();
            // Parts of one type lie side by side, and are multiplied with in one launch.
            let runs: Vec<_> = if one_type { vec![&parts[..]] } else { parts.chunks(1).collect() };
            for run in runs {
                let outputs = run.iter().map(|part| part.outputs).sum();
                let dtype = run[0].weight.dtype();
                let mut weight = Buffer::zeroed(device, outputs * inputs * dtype.size(), &what)?;
                let mut bias = vec![0f32; outputs];
                let mut first = 0;
                for part in run {
                    let stored = staging.upload(device, part.weight.bytes(), &what)?;
                    let to = weight.at(first * inputs * dtype.size());
                    match layout {
                        MatrixLayout::OutIn => {
                            weight.copy_from(device, first * inputs * dtype.size(), &stored)?;
                        }
                        MatrixLayout::InOut => {
                            turn(device, &stored, to, (inputs, part.outputs), dtype)?;
                        }
                    }
                    if let Some(values) = &part.bias {
                        bias[first..first + part.outputs].copy_from_slice(values);
                    }
                    first += part.outputs;
                }
                let bias = Buffer::of(device, &bias, &what)?;
                matrices.push(CudaMatrix { weight, dtype, bias, outputs });
            }
            CudaWeights::Stored(matrices)
        }
    };
    Ok(CudaLinear { weights, inputs, outputs })
}

/// The threads that quantise; started when first needed.
fn host_threads() -> Result<&'static Cpu, KernelError> {
    static THREADS: OnceLock<Cpu> = OnceLock::new();
    if let Some(cpu) = THREADS.get() {
        return Ok(cpu);
    }
    let cpu = Cpu::new(CpuOptions::default())?;
    Ok(THREADS.get_or_init(|| cpu))
}

/// Turns a matrix `[rows, columns]` to `[columns, rows]`.
fn turn(
    device: &Launcher,
    from: &Buffer,
    to: u64,
    (rows, columns): (usize, usize),
    dtype: DType,
) -> Result<(), CudaError> {
    let kernel = if dtype.size() == 4 { "transpose_32" } else { "transpose_16" };
    let mut shape = Shape::new((columns.div_ceil(32), rows.div_ceil(32), 1), 32);
    shape.block.1 = 8;
    let args = [from.arg(), Arg::Pointer(to), Arg::count(rows), Arg::count(columns)];
    // SAFETY: both hold rows·columns elements of this size.
    unsafe { device.launch(kernel, shape, &args) }
}

/// `out = x·Wᵀ + b`.
pub(super) fn linear(
    device: &Launcher,
    scratch: &mut Scratch,
    args: LinearArgs<'_, Cuda>,
) -> Result<(), CudaError> {
    let LinearArgs { x, linear, store, out } = args;
    assert_eq!(x.columns(), linear.inputs, "input width of a linear layer");
    assert_eq!(out.columns(), linear.outputs, "output width of a linear layer");
    let (rows, inputs, add) = (x.bucket(), linear.inputs, store == Store::Add);
    out.resize(device, x.rows())?;
    match &linear.weights {
        CudaWeights::Stored(parts) => {
            let mut column = 0;
            // A step that may come again is launched whole, and cuBLAS launches for itself.
            let by_cublas = rows > MOST_ROWS && scratch.products.are_there(device);
            for part in parts {
                if by_cublas {
                    let to = Target { out: &*out, column, add };
                    scratch.products.multiply(device, x, part, to)?;
                    column += part.outputs;
                    continue;
                }
                let (kernel, shape) = stored_kernel(part, inputs, rows);
                let args = [
                    part.weight.arg(),
                    x.arg(),
                    part.bias.arg(),
                    out.arg(),
                    Arg::count(inputs),
                    Arg::count(part.outputs),
                    Arg::count(rows),
                    Arg::count(linear.outputs),
                    Arg::count(column),
                    Arg::flag(add),
                ];
                // SAFETY: widths were checked above, and parts lie side by side in `out`.
                unsafe { device.launch(kernel, shape, &args)? };
                column += part.outputs;
            }
            Ok(())
        }
        CudaWeights::Quantised { bits, groups, records, bias } => {
            let n = rows * groups;
            let codes = grown(&mut scratch.codes, device, n * GROUP, "quantised rows")?.arg();
            let scales = grown(&mut scratch.scales, device, 4 * n, "quantised rows")?.arg();
            let sums = grown(&mut scratch.sums, device, 4 * n, "quantised rows")?.arg();
            let args = [x.arg(), codes, scales, sums, Arg::count(inputs), Arg::count(*groups)];
            // SAFETY: `x` has `rows` rows of `inputs`, and the rest room for their groups.
            unsafe {
                let shape = Shape::new((rows, groups.div_ceil(4), 1), 128);
                device.launch("quantise_rows", shape, &args)?;
            }
            let (kernel, together) = match (bits, rows) {
                (CodeBits::Eight, 1) => ("gemv_int8_1", 1),
                (CodeBits::Eight, _) => ("gemv_int8_4", 4),
                (CodeBits::Four, 1) => ("gemv_int4_1", 1),
                (CodeBits::Four, _) => ("gemv_int4_4", 4),
            };
            let blocks = linear.outputs.div_ceil(QUANTISED_OUTPUTS);
            let mut shape = Shape::new((blocks, rows.div_ceil(together), 1), 32);
            shape.block.1 = 8;
            let args = [
                records.arg(),
                codes,
                scales,
                sums,
                bias.arg(),
                out.arg(),
                Arg::count(linear.outputs),
                Arg::count(*groups),
                Arg::count(rows),
                Arg::flag(add),
            ];
            // SAFETY: widths were checked above; records and biases are filled up to 16 outputs.
            unsafe { device.launch(kernel, shape, &args) }
        }
    }
}

/// The kernel for `rows` rows of `inputs` numbers, and how it is launched.
fn stored_kernel(part: &CudaMatrix, inputs: usize, rows: usize) -> (&'static str, Shape) {
    // Rows that 16 bytes do not divide begin at any address.
    if rows >= GEMM_ROWS && (inputs * part.dtype.size()).is_multiple_of(16) {
        let kernel = match part.dtype {
            DType::F32 => "gemm_f32",
            DType::F16 => "gemm_f16",
            DType::Bf16 => "gemm_bf16",
        };
        let grid = (part.outputs.div_ceil(GEMM_TILE), rows.div_ceil(GEMM_TILE), 1);
        return (kernel, Shape::new(grid, 256));
    }
    let (kernel, together) = gemv(part.dtype, inputs, rows);
    let grid = (part.outputs.div_ceil(GEMV_OUTPUTS), rows.div_ceil(together), 1);
    let mut shape = Shape::new(grid, 32);
    shape.block.1 = 4;
    (kernel, shape)
}

/// The kernel for `rows` rows, and how many of them share a pass over the weights.
fn gemv(dtype: DType, inputs: usize, rows: usize) -> (&'static str, usize) {
    let names = match dtype {
        DType::F32 => ["gemv_f32_1", "gemv_f32_2", "gemv_f32_4", "gemv_f32_8", "gemv_f32_any"],
        DType::F16 => ["gemv_f16_1", "gemv_f16_2", "gemv_f16_4", "gemv_f16_8", "gemv_f16_any"],
        DType::Bf16 => {
            ["gemv_bf16_1", "gemv_bf16_2", "gemv_bf16_4", "gemv_bf16_8", "gemv_bf16_any"]
        }
    };
    let [one, two, four, eight, any] = names;
    match rows {
        // Rows that 16 bytes do not divide begin at any address.
        _ if !(inputs * dtype.size()).is_multiple_of(16) => (any, 4),
        1 => (one, 1),
        2 => (two, 2),
        3..=4 => (four, 4),
        _ => (eight, 8),
    }
}

/// Looks rows up in an embedding table.
pub(super) fn embed(
    device: &Launcher,
    uploaded: &mut Upload,
    args: EmbedArgs<'_, Cuda>,
) -> Result<(), CudaError> {
    let EmbedArgs { table, ids, store, out } = args;
    assert_eq!(out.columns(), table.inputs, "width of an embedding");
    assert!(ids.iter().all(|&id| (id as usize) < table.outputs), "a row of the table");
    out.resize(device, ids.len())?;
    let (hidden, add) = (table.inputs, store == Store::Add);
    let ids_arg = uploaded.send(device, &filled(ids, 0))?;
    let shape = Cuda::pointwise(out.bucket(), hidden);
    match &table.weights {
        CudaWeights::Stored(parts) => {
            let [part] = parts.as_slice() else {
                panic!("an embedding table is one matrix, found {}", parts.len());
            };
            let kernel = match part.dtype {
                DType::F32 => "embed_f32",
                DType::F16 => "embed_f16",
                DType::Bf16 => "embed_bf16",
            };
            let args = [part.weight.arg(), ids_arg, out.arg(), Arg::count(hidden), Arg::flag(add)];
            // SAFETY: every id is a row of the table, and `out` has a row for each.
            unsafe { device.launch(kernel, shape, &args) }
        }
        CudaWeights::Quantised { bits, groups, records, .. } => {
            let kernel = match bits {
                CodeBits::Eight => "embed_int8",
                CodeBits::Four => "embed_int4",
            };
            let args = [
                records.arg(),
                ids_arg,
                out.arg(),
                Arg::count(hidden),
                Arg::count(*groups),
                Arg::flag(add),
            ];
            // SAFETY: as above.
            unsafe { device.launch(kernel, shape, &args) }
        }
    }
}
