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
    Activation, Cpu, CpuLinear, CpuOptions, DType, EmbedArgs, KernelError, LinearArgs, LinearSpec,
    MatrixLayout, NormKind, ProjectArgs, Store, WeightFormat,
};

/// Warps of a block of the products of few rows with stored weights; each takes a tile of outputs.
const GEMV_WARPS: usize = 8;
/// Bytes of shared memory that every device gives a block, but for what sums take.
const SHARED_BYTES: usize = (48 << 10) - 1024;
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
    multiprocessors: usize,
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
                let (kernel, shape) = stored_kernel(part, inputs, rows, multiprocessors);
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
fn stored_kernel(
    part: &CudaMatrix,
    inputs: usize,
    rows: usize,
    multiprocessors: usize,
) -> (&'static str, Shape) {
    // Rows that 16 bytes do not divide begin at any address.
    let aligned = (inputs * part.dtype.size()).is_multiple_of(16);
    if rows >= GEMM_ROWS && aligned {
        let kernel = match part.dtype {
            DType::F32 => "gemm_f32",
            DType::F16 => "gemm_f16",
            DType::Bf16 => "gemm_bf16",
        };
        let grid = (part.outputs.div_ceil(GEMM_TILE), rows.div_ceil(GEMM_TILE), 1);
        return (kernel, Shape::new(grid, 256));
    }
    let names = match part.dtype {
        DType::F32 => ["gemv_f32_1", "gemv_f32_2", "gemv_f32_4", "gemv_f32_8", "gemv_f32_any"],
        DType::F16 => ["gemv_f16_1", "gemv_f16_2", "gemv_f16_4", "gemv_f16_8", "gemv_f16_any"],
        DType::Bf16 => {
            ["gemv_bf16_1", "gemv_bf16_2", "gemv_bf16_4", "gemv_bf16_8", "gemv_bf16_any"]
        }
    };
    let [one, two, four, eight, any] = names;
    // Rows that share a pass over the weights, and outputs of a warp.
    let (kernel, together, outputs) = match rows {
        _ if !aligned => (any, 4, 1),
        1 => (one, 1, 1),
        2 => (two, 2, 2),
        3..=4 => (four, 4, 2),
        _ => (eight, 8, 2),
    };
    let most = resident(part.dtype, rows, false) * multiprocessors;
    let blocks = gemv_blocks(part.outputs.div_ceil(outputs), most);
    (kernel, Shape::new((blocks, rows.div_ceil(together), 1), 32 * GEMV_WARPS as u32))
}

/// Blocks that a multiprocessor takes at once, as kernels/gemv.cuh has it: each goes on to further
/// tiles, and none waits for room while others end.
fn resident(dtype: DType, rows: usize, projects: bool) -> usize {
    match (rows, dtype.size()) {
        (1, 2) if projects => 3,
        (1, 2) => 4,
        _ => 2,
    }
}

/// Blocks for `tiles` tiles, at most `most`, that go through the same number of them, or nearly.
fn gemv_blocks(tiles: usize, most: usize) -> usize {
    let blocks = tiles.div_ceil(GEMV_WARPS);
    blocks.div_ceil(blocks.div_ceil(most).max(1))
}

/// A projection in one launch, if it is one of few rows that fit into shared memory with weights as
/// they are stored; gives the arguments back if it is not.
pub(super) fn project<'a>(
    device: &Launcher,
    multiprocessors: usize,
    args: ProjectArgs<'a, Cuda>,
) -> Result<Option<ProjectArgs<'a, Cuda>>, CudaError> {
    let ProjectArgs { norm, linear, activate, out } = &args;
    let gated = activate.as_ref().is_some_and(|activate| activate.gated);
    let Some((part, kernel, together, outputs)) = projection(linear, norm.x.bucket(), gated) else {
        return Ok(Some(args));
    };
    let inputs = linear.inputs;
    let shared = 4 * inputs * (together + 1 + usize::from(norm.bias.is_some()));
    if shared > SHARED_BYTES {
        return Ok(Some(args));
    }
    let width = if gated { linear.outputs / 2 } else { linear.outputs };
    assert_eq!(norm.x.columns(), inputs, "input width of a projection");
    assert_eq!(norm.weight.columns, inputs, "scale of a norm");
    assert!(norm.bias.is_none_or(|bias| bias.columns == inputs), "shift of a norm");
    assert_eq!(out.columns(), width, "output width of a projection");
    assert!(!gated || linear.outputs == 2 * width, "gate beside up");
    let ProjectArgs { norm, activate, out, .. } = args;
    let rows = norm.x.bucket();
    out.resize(device, norm.x.rows())?;
    let activation = activate.map_or(-1, |activate| activation_number(activate.activation));
    let args = [
        part.weight.arg(),
        norm.x.arg(),
        part.bias.arg(),
        out.arg(),
        Arg::count(inputs),
        Arg::count(part.outputs),
        Arg::count(rows),
        Arg::count(width),
        norm.weight.values.arg(),
        norm.bias.map_or(Arg::Pointer(0), |bias| bias.values.arg()),
        Arg::Number(norm.epsilon),
        Arg::flag(norm.kind == NormKind::Layer),
        Arg::Whole(activation),
        Arg::flag(gated),
    ];
    let most = resident(part.dtype, rows, true) * multiprocessors;
    let blocks = gemv_blocks(part.outputs.div_ceil(outputs), most);
    let grid = (blocks, rows.div_ceil(together), 1);
    let mut shape = Shape::new(grid, 32 * GEMV_WARPS as u32);
    shape.shared = u32::try_from(shared).unwrap_or(u32::MAX);
    // SAFETY: widths were checked above, and the rows fit into the shared memory that is asked for.
    unsafe { device.launch(kernel, shape, &args)? };
    Ok(None)
}

/// The matrix of a projection of `rows` rows, its kernel, how many rows share a pass over the
/// weights, and how many outputs a warp takes.
fn projection(
    linear: &CudaLinear,
    rows: usize,
    gated: bool,
) -> Option<(&CudaMatrix, &'static str, usize, usize)> {
    let CudaWeights::Stored(parts) = &linear.weights else { return None };
    let [part] = parts.as_slice() else { return None };
    if !(linear.inputs * part.dtype.size()).is_multiple_of(16) {
        return None;
    }
    let [one, gate, two, four, eight] = match part.dtype {
        DType::F32 => [
            "project_f32_1",
            "project_f32_gated",
            "project_f32_2",
            "project_f32_4",
            "project_f32_8",
        ],
        DType::F16 => [
            "project_f16_1",
            "project_f16_gated",
            "project_f16_2",
            "project_f16_4",
            "project_f16_8",
        ],
        DType::Bf16 => [
            "project_bf16_1",
            "project_bf16_gated",
            "project_bf16_2",
            "project_bf16_4",
            "project_bf16_8",
        ],
    };
    let (kernel, together, outputs) = match rows {
        1 if gated => (gate, 1, 2),
        1 => (one, 1, 1),
        2 => (two, 2, 2),
        3..=4 => (four, 4, 2),
        5..=8 => (eight, 8, 2),
        _ => return None,
    };
    Some((part, kernel, together, outputs))
}

/// A function's number, as kernels/activate.cuh has it.
pub(super) fn activation_number(activation: Activation) -> i32 {
    match activation {
        Activation::GeluTanh => 0,
        Activation::Gelu => 1,
        Activation::Relu => 2,
        Activation::Silu => 3,
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
