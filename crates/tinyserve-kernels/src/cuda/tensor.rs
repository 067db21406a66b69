//! Activations, vectors and matrices in device memory.

use super::bucket::bucket;
use super::error::CudaError;
use super::launch::{Arg, Launcher};
use super::memory::Buffer;
use crate::DType;
use crate::cpu::CodeBits;

/// Activations `[rows, columns]`, f32, row-major, on a device.
#[derive(Debug)]
pub struct CudaTensor {
    pub(super) values: Option<Buffer>,
    rows: usize,
    columns: usize,
}

impl CudaTensor {
    pub(super) fn new(columns: usize) -> Self {
        Self { values: None, rows: 0, columns }
    }

    /// Elements of a row.
    #[must_use]
    pub fn columns(&self) -> usize {
        self.columns
    }

    /// Rows at present.
    #[must_use]
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Makes it `rows` long; what it holds is then not defined, unless it was that long.
    pub(super) fn resize(&mut self, device: &Launcher, rows: usize) -> Result<(), CudaError> {
        let bytes = 4 * bucket(rows) * self.columns;
        super::memory::grown(&mut self.values, device, bytes, "activations")?;
        self.rows = rows;
        Ok(())
    }

    /// Rows that launches are made for. There is memory for them; those behind [`Self::rows`] may
    /// hold anything.
    pub(super) fn bucket(&self) -> usize {
        bucket(self.rows)
    }

    /// Its address; null before it has rows.
    pub(super) fn arg(&self) -> Arg {
        self.values.as_ref().map_or(Arg::Pointer(0), Buffer::arg)
    }
}

/// A norm's scale or shift on a device, f32.
#[derive(Debug)]
pub struct CudaVector {
    pub(super) values: Buffer,
    pub(super) columns: usize,
}

/// Matrices side by side over one input, on a device.
#[derive(Debug)]
pub struct CudaLinear {
    pub(super) weights: CudaWeights,
    pub(super) inputs: usize,
    pub(super) outputs: usize,
}

/// The weights of a linear layer.
#[derive(Debug)]
pub(super) enum CudaWeights {
    /// In their stored type.
    Stored(Vec<CudaMatrix>),
    /// Quantised, in the records that the CPU's kernels read.
    Quantised {
        bits: CodeBits,
        /// Groups of inputs.
        groups: usize,
        records: Buffer,
        /// `[outputs, filled up to 16]` f32.
        bias: Buffer,
    },
}

/// A matrix `[outputs, inputs]` in its stored type, and its bias.
#[derive(Debug)]
pub(super) struct CudaMatrix {
    pub(super) weight: Buffer,
    pub(super) dtype: DType,
    /// `[outputs]` f32; zeros where there is none.
    pub(super) bias: Buffer,
    pub(super) outputs: usize,
}

impl CudaLinear {
    /// Width of the input.
    #[must_use]
    pub fn inputs(&self) -> usize {
        self.inputs
    }

    /// Width of the output, all parts together.
    #[must_use]
    pub fn outputs(&self) -> usize {
        self.outputs
    }

    pub(super) fn bytes(&self) -> usize {
        match &self.weights {
            CudaWeights::Stored(parts) => {
                parts.iter().map(|part| part.outputs * (self.inputs * part.dtype.size() + 4)).sum()
            }
            CudaWeights::Quantised { records, bias, .. } => records.bytes() + bias.bytes(),
        }
    }
}
