//! Activations, vectors and matrices in host memory.

use half::{bf16, f16};

use super::Cpu;
use super::memory::Aligned;
use super::packed::Packed;
use super::path::CpuPath;
use super::turned::turned;
use crate::{DType, HostTensor, KernelError, LinearSpec, MatrixLayout, WeightFormat};

/// Activations `[rows, columns]`, f32, row-major.
#[derive(Debug)]
pub struct CpuTensor {
    values: Aligned,
    columns: usize,
}

impl CpuTensor {
    pub(crate) fn new(columns: usize) -> Self {
        Self { values: Aligned::default(), columns }
    }

    /// Elements of a row.
    #[must_use]
    pub fn columns(&self) -> usize {
        self.columns
    }

    /// Rows at present.
    #[must_use]
    pub fn rows(&self) -> usize {
        self.values.len() / self.columns
    }

    /// All rows, one after the other.
    #[must_use]
    pub fn values(&self) -> &[f32] {
        &self.values
    }

    pub(crate) fn values_mut(&mut self) -> &mut [f32] {
        &mut self.values
    }

    /// Makes it `rows` long; what new rows hold is not defined.
    pub(crate) fn resize(&mut self, rows: usize) {
        self.values.resize(rows * self.columns);
    }
}

/// A norm's scale or shift.
#[derive(Debug)]
pub struct CpuVector(pub(crate) Vec<f32>);

/// A matrix in its stored type, where its file is mapped, and its bias.
#[derive(Debug)]
pub(crate) struct CpuMatrix {
    pub(crate) weight: HostTensor,
    pub(crate) bias: Option<Vec<f32>>,
    pub(crate) inputs: usize,
    pub(crate) outputs: usize,
}

/// Matrices side by side over one input.
#[derive(Debug)]
pub struct CpuLinear {
    pub(crate) weights: CpuWeights,
    pub(crate) inputs: usize,
    pub(crate) outputs: usize,
}

/// The weights of a linear layer.
#[derive(Debug)]
pub(crate) enum CpuWeights {
    /// In their stored type; on vector paths always `[out, in]`.
    Stored { parts: Vec<CpuMatrix>, layout: MatrixLayout },
    /// Quantised.
    Packed(Packed),
}

/// The elements of a matrix in their stored type.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Elements<'a> {
    F32(&'a [f32]),
    F16(&'a [f16]),
    Bf16(&'a [bf16]),
}

impl CpuMatrix {
    pub(crate) fn elements(&self) -> Elements<'_> {
        let bytes = self.weight.bytes();
        match self.weight.dtype() {
            DType::F32 => Elements::F32(bytemuck::cast_slice(bytes)),
            DType::F16 => Elements::F16(bytemuck::cast_slice(bytes)),
            DType::Bf16 => Elements::Bf16(bytemuck::cast_slice(bytes)),
        }
    }
}

pub(crate) fn vector(tensor: &HostTensor) -> Result<Vec<f32>, KernelError> {
    if tensor.shape().len() != 1 {
        return Err(shape_error(tensor, "one dimension".to_owned()));
    }
    Ok(tensor.to_f32(0..tensor.len()))
}

impl CpuLinear {
    pub(crate) fn new(cpu: &Cpu, spec: LinearSpec) -> Result<Self, KernelError> {
        let mut parts: Vec<CpuMatrix> = Vec::with_capacity(spec.parts.len());
        for part in spec.parts {
            let &[first, second] = part.weight.shape() else {
                return Err(shape_error(&part.weight, "two dimensions".to_owned()));
            };
            let (outputs, inputs) = match spec.layout {
                MatrixLayout::OutIn => (first, second),
                MatrixLayout::InOut => (second, first),
            };
            if outputs == 0 || inputs == 0 {
                return Err(shape_error(&part.weight, "no dimension of 0".to_owned()));
            }
            if parts.first().is_some_and(|before| before.inputs != inputs) {
                let expected = format!("an input width of {}, as beside it", parts[0].inputs);
                return Err(shape_error(&part.weight, expected));
            }
            let bias = part.bias.as_ref().map(vector).transpose()?;
            if let (Some(values), Some(tensor)) = (&bias, &part.bias)
                && values.len() != outputs
            {
                return Err(shape_error(tensor, format!("[{outputs}], one per output")));
            }
            parts.push(CpuMatrix { weight: part.weight, bias, inputs, outputs });
        }
        let Some(inputs) = parts.first().map(|part| part.inputs) else {
            return Err(KernelError::Invalid {
                what: "parts of a linear layer",
                found: "0".to_owned(),
                expected: "at least 1".to_owned(),
            });
        };
        let outputs = parts.iter().map(|part| part.outputs).sum();
        let weights = match spec.format {
            WeightFormat::Stored => Self::stored(cpu, parts, spec.layout)?,
            format => CpuWeights::Packed(Packed::new(cpu, format, spec.layout, &parts)?),
        };
        Ok(Self { weights, inputs, outputs })
    }

    /// Keeps weights where their file is mapped, or turns those that lie the slow way round.
    fn stored(
        cpu: &Cpu,
        mut parts: Vec<CpuMatrix>,
        layout: MatrixLayout,
    ) -> Result<CpuWeights, KernelError> {
        if layout == MatrixLayout::OutIn || cpu.path() == CpuPath::Scalar {
            return Ok(CpuWeights::Stored { parts, layout });
        }
        for part in &mut parts {
            part.weight = turned(cpu, &part.weight)?;
        }
        Ok(CpuWeights::Stored { parts, layout: MatrixLayout::OutIn })
    }

    /// Width of the input.
    #[must_use]
    pub fn inputs(&self) -> usize {
        self.inputs
    }

    /// Bytes of weights and biases.
    pub(crate) fn bytes(&self) -> usize {
        match &self.weights {
            CpuWeights::Stored { parts, .. } => {
                let bias = |part: &CpuMatrix| part.bias.as_ref().map_or(0, |bias| 4 * bias.len());
                parts.iter().map(|part| part.weight.bytes().len() + bias(part)).sum()
            }
            CpuWeights::Packed(packed) => packed.bytes(),
        }
    }

    /// Width of the output, all parts together.
    #[must_use]
    pub fn outputs(&self) -> usize {
        self.outputs
    }
}

fn shape_error(tensor: &HostTensor, expected: String) -> KernelError {
    KernelError::Shape {
        what: format!("tensor {:?}", tensor.name()),
        found: tensor.shape().to_vec(),
        expected,
    }
}
