//! Linear layers: their weights, how a backend keeps them, and the product with rows.

use bytes::Bytes;

use super::{Backend, Store};
use crate::cpu::packed_bytes;
use crate::{DType, HostTensor};

/// Which way round a checkpoint stores a matrix.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum MatrixLayout {
    /// `[out, in]`, as `torch.nn.Linear`.
    OutIn,
    /// `[in, out]`, as GPT-2's `Conv1D`.
    InOut,
}

/// How a backend keeps the weights of a linear layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum WeightFormat {
    /// In their stored element type.
    Stored,
    /// Eight bits each, with one f16 scale for every 32 inputs of an output: 8.5 bits.
    Int8,
    /// Four bits each, with an f16 scale and minimum for every 32 inputs of an output: 5 bits.
    Int4,
}

/// The size of a linear layer, known before its weights are loaded.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LinearSize {
    /// Width of the input.
    pub inputs: usize,
    /// Width of the output, all parts together.
    pub outputs: usize,
    /// Whether it has biases.
    pub biased: bool,
    /// Element type of the stored weights.
    pub stored: DType,
    /// How they are kept.
    pub format: WeightFormat,
}

impl LinearSize {
    /// Bytes that the CPU backend takes for it; what [`Backend::linear_bytes`] says afterwards.
    ///
    /// Sizes that no machine can hold are saturated.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        let (inputs, outputs) = (self.inputs as u64, self.outputs as u64);
        match self.format {
            WeightFormat::Stored => {
                let biases = if self.biased { 4 * outputs } else { 0 };
                let elements = inputs.saturating_mul(outputs);
                elements.saturating_mul(self.stored.size() as u64).saturating_add(biases)
            }
            format => packed_bytes(format, inputs, outputs),
        }
    }
}

/// One of the matrices that a linear layer puts side by side.
#[derive(Debug, Clone)]
pub struct LinearPart {
    /// `[out, in]` or `[in, out]`, as the layer's layout says.
    pub weight: HostTensor,
    /// `[out]`.
    pub bias: Option<HostTensor>,
}

/// A linear layer whose output is the outputs of its parts, side by side.
///
/// Query, key and value projections of one input are three parts of one layer; so are gate and up.
#[derive(Debug, Clone)]
pub struct LinearSpec {
    /// The parts; all have the same input width.
    pub parts: Vec<LinearPart>,
    /// How every part is stored.
    pub layout: MatrixLayout,
    /// How the backend keeps them: it quantises while it loads.
    pub format: WeightFormat,
}

/// A quantised linear layer as its backend keeps it: bytes that can be stored and loaded again
/// without quantising, by backends of the same [`Backend::image_layout`].
#[derive(Debug, Clone, PartialEq)]
pub struct LinearImage {
    /// What the weights are quantised to.
    pub format: WeightFormat,
    /// Width of the input.
    pub inputs: usize,
    /// Width of the output, all parts together.
    pub outputs: usize,
    /// Codes and scales in the backend's order.
    pub weights: Bytes,
    /// Biases, one for each output and zeros up to the backend's own width.
    pub bias: Vec<f32>,
}

/// `out = x·Wᵀ + b`.
#[derive(Debug)]
pub struct LinearArgs<'a, B: Backend> {
    /// `[rows, in]`.
    pub x: &'a B::Tensor,
    /// `[out, in]`, with biases.
    pub linear: &'a B::Linear,
    /// How the result is stored.
    pub store: Store,
    /// `[rows, out]`.
    pub out: &'a mut B::Tensor,
}
