//! Products of many rows by cuBLAS, where it is installed.
//!
//! Its tensor cores multiply halves. Activations are f32: each number goes in as a sum of halves, so
//! that a product is as exact as those of our own kernels, which add up in f32, too.

use cudarc::cublas::result::gemm_ex;
use cudarc::cublas::{CudaBlas, sys};

use super::Cuda;
use super::bucket::MOST_ROWS;
use super::error::CudaError;
use super::graph::undisturbed;
use super::launch::{Arg, Launcher, Shape};
use super::memory::{Buffer, grown};
use super::tensor::{CudaMatrix, CudaTensor};
use super::workload::{CudaWorkload, f32s};
use crate::{DType, WeightFormat};

/// Rows that are multiplied at once: what lies between is then a few tens of MB at most.
const ROWS: usize = 256;
const WHAT: &str = "a product by cuBLAS";

/// What the library takes on a device of compute capability 9.0, the most of all, as its manual
/// says (`cublasSetWorkspace`).
const WORKSPACE_BYTES: u64 = 32 << 20;

/// Most bytes of what products take, where they are multiplied by cuBLAS.
pub(super) fn most_bytes(workload: &CudaWorkload<'_>) -> u64 {
    let CudaWorkload { tokens, logits: (logits, vocab), widest: (inputs, outputs), .. } = *workload;
    let (dtype, format) = workload.weights;
    let multiplies = tokens.max(logits) > MOST_ROWS && format == WeightFormat::Stored;
    if !multiplies || version().is_err() {
        return 0;
    }
    let outputs = if logits > MOST_ROWS { outputs.max(vocab) } else { outputs };
    let rows = ROWS.min(tokens.max(logits));
    // Parts of two bytes, counted in fours.
    let halves = match dtype {
        DType::F32 => 0,
        DType::F16 => 2,
        DType::Bf16 => 3,
    };
    let sums = f32s(&[rows, outputs]).saturating_add(f32s(&[rows]));
    let parts = f32s(&[(halves * rows * inputs).div_ceil(2)]);
    WORKSPACE_BYTES.saturating_add(sums).saturating_add(parts)
}

/// The library, and buffers that products reuse.
#[derive(Debug, Default)]
pub(super) struct Products {
    /// Whether our own kernels multiply although it is there.
    pub(super) unused: bool,
    /// Looked for when it is first needed: loading it takes time, and memory.
    library: Option<Option<CudaBlas>>,
    parts: Option<Buffer>,
    exponents: Option<Buffer>,
    sums: Option<Buffer>,
}

/// Where a product goes.
pub(super) struct Target<'a> {
    pub(super) out: &'a CudaTensor,
    /// First column.
    pub(super) column: usize,
    pub(super) add: bool,
}

/// Its version, or why our own kernels multiply instead.
pub(super) fn version() -> Result<[i32; 3], CudaError> {
    // SAFETY: loading the library runs its constructors; nothing else is called.
    if !unsafe { sys::is_culib_present() } {
        return Err(CudaError::NoCublas);
    }
    use sys::libraryPropertyType as Property;
    let mut version = [0; 3];
    let parts = [Property::MAJOR_VERSION, Property::MINOR_VERSION, Property::PATCH_LEVEL];
    for (part, number) in parts.into_iter().zip(&mut version) {
        // SAFETY: the pointer is to a number of our own.
        let done = unsafe { sys::cublasGetProperty(part, number) };
        done.result().map_err(|error| failed("asking cuBLAS for its version", &error))?;
    }
    Ok(version)
}

fn failed(what: &'static str, error: &cudarc::cublas::result::CublasError) -> CudaError {
    CudaError::Driver { what, message: format!("{:?}", error.0) }
}

impl Drop for Products {
    fn drop(&mut self) {
        let _guard = undisturbed();
        self.library = None;
    }
}

impl Products {
    /// Whether cuBLAS multiplies; it is started if it was not.
    pub(super) fn are_there(&mut self, device: &Launcher) -> bool {
        !self.unused && self.library(device).is_some()
    }

    fn library(&mut self, device: &Launcher) -> Option<&CudaBlas> {
        let start = || {
            version().ok()?;
            let _guard = undisturbed();
            // One that cannot be started, say without memory, is as good as none.
            CudaBlas::new(device.stream.clone()).ok()
        };
        self.library.get_or_insert_with(start).as_ref()
    }

    /// `out = x·Wᵀ + b`, in columns of `out`: launched at once, since the library's kernels are.
    pub(super) fn multiply(
        &mut self,
        device: &Launcher,
        x: &CudaTensor,
        part: &CudaMatrix,
        target: Target<'_>,
    ) -> Result<(), CudaError> {
        device.directly(|| self.multiply_now(device, x, part, target))
    }

    fn multiply_now(
        &mut self,
        device: &Launcher,
        x: &CudaTensor,
        part: &CudaMatrix,
        Target { out, column, add }: Target<'_>,
    ) -> Result<(), CudaError> {
        let (inputs, outputs) = (x.columns(), part.outputs);
        for first in (0..x.rows()).step_by(ROWS) {
            let rows = ROWS.min(x.rows() - first);
            let from = x.arg().offset(4 * first * inputs);
            let sums = grown(&mut self.sums, device, 4 * rows * outputs, WHAT)?.arg();
            let exponents = match part.dtype {
                DType::F16 => grown(&mut self.exponents, device, 4 * rows, WHAT)?.arg(),
                DType::F32 | DType::Bf16 => Arg::Pointer(0),
            };
            let (parts, count) = self.split(device, from, exponents, (rows, inputs), part.dtype)?;
            for number in 0..count {
                let size = part.dtype.size();
                let of_part = parts.offset(number * rows * inputs * size);
                let shape = (outputs, rows, inputs);
                let first = number == 0;
                self.gemm(device, shape, (part.weight.arg(), of_part, sums), part.dtype, first)?;
            }
            let to = out.arg().offset(4 * first * out.columns());
            let args = [
                sums,
                exponents,
                part.bias.arg(),
                to,
                Arg::count(outputs),
                Arg::count(out.columns()),
                Arg::count(column),
                Arg::flag(add),
            ];
            // SAFETY: `sums` has these rows of `outputs`, `out` those from `first` on, and where
            // there are exponents there is one for each row.
            unsafe { device.launch("store_products", Cuda::pointwise(rows, outputs), &args)? };
        }
        Ok(())
    }

    /// Rows as parts of the weights' type; how many parts.
    fn split(
        &mut self,
        device: &Launcher,
        from: Arg,
        exponents: Arg,
        (rows, inputs): (usize, usize),
        dtype: DType,
    ) -> Result<(Arg, usize), CudaError> {
        let count = match dtype {
            DType::F32 => return Ok((from, 1)),
            DType::F16 => 2,
            DType::Bf16 => 3,
        };
        let bytes = count * rows * inputs * dtype.size();
        let parts = grown(&mut self.parts, device, bytes, WHAT)?.arg();
        let sizes = [Arg::count(inputs), Arg::count(rows)];
        let shape = Shape::new((rows, 1, 1), 256);
        // SAFETY: `from` has these rows, and `parts` and `exponents` room for them.
        unsafe {
            match dtype {
                DType::F16 => {
                    let args = [from, parts, exponents, sizes[0], sizes[1]];
                    device.launch("split_f16", shape, &args)?;
                }
                _ => device.launch("split_bf16", shape, &[from, parts, sizes[0], sizes[1]])?,
            }
        }
        Ok((parts, count))
    }

    /// `sums = x·Wᵀ`, or added to what is there unless it is the `first`.
    fn gemm(
        &mut self,
        device: &Launcher,
        (outputs, rows, inputs): (usize, usize, usize),
        (weights, x, sums): (Arg, Arg, Arg),
        dtype: DType,
        first: bool,
    ) -> Result<(), CudaError> {
        let Some(library) = self.library(device) else { return Err(CudaError::NoCublas) };
        let kind = match dtype {
            DType::F32 => sys::cudaDataType::CUDA_R_32F,
            DType::F16 => sys::cudaDataType::CUDA_R_16F,
            DType::Bf16 => sys::cudaDataType::CUDA_R_16BF,
        };
        let of = |n: usize| i32::try_from(n).unwrap_or(i32::MAX);
        let (one, beta) = (1f32, if first { 0f32 } else { 1f32 });
        let pointer = |arg: Arg| arg.address() as usize;
        // It loads code when a kind of product comes first.
        let _guard = undisturbed();
        // cuBLAS counts columns first: what is [rows, n] here is n by rows there.
        // SAFETY: the sizes are those of the three buffers, and the two factors live long enough.
        let done = unsafe {
            gemm_ex(
                *library.handle(),
                sys::cublasOperation_t::CUBLAS_OP_T,
                sys::cublasOperation_t::CUBLAS_OP_N,
                of(outputs),
                of(rows),
                of(inputs),
                (&raw const one).cast(),
                std::ptr::with_exposed_provenance(pointer(weights)),
                kind,
                of(inputs),
                std::ptr::with_exposed_provenance(pointer(x)),
                kind,
                of(inputs),
                (&raw const beta).cast(),
                std::ptr::with_exposed_provenance_mut(pointer(sums)),
                sys::cudaDataType::CUDA_R_32F,
                of(outputs),
                sys::cublasComputeType_t::CUBLAS_COMPUTE_32F,
                sys::cublasGemmAlgo_t::CUBLAS_GEMM_DEFAULT,
            )
        };
        done.map_err(|error| failed(WHAT, &error))
    }
}
