//! Operations on rows that know no pages.

use super::{Backend, LinearArgs};

/// Pointwise function of a feed-forward layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Activation {
    /// `0.5·x·(1 + tanh(√(2/π)·(x + 0.044715·x³)))`: `gelu_new`, `gelu_pytorch_tanh`.
    GeluTanh,
    /// `0.5·x·(1 + erf(x/√2))`: the exact `gelu`.
    Gelu,
    /// `max(x, 0)`.
    Relu,
    /// `x / (1 + exp(−x))`, also called swish.
    Silu,
}

/// How a norm centres its rows.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum NormKind {
    /// `(x − mean) / √(variance + ε)`.
    Layer,
    /// `x / √(mean(x²) + ε)`.
    Rms,
}

/// How an operation puts its result into its output.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Store {
    /// Replace what is there.
    Overwrite,
    /// Add to what is there: a residual connection without a pass of its own.
    Add,
}

/// Looks rows up in an embedding table.
#[derive(Debug)]
pub struct EmbedArgs<'a, B: Backend> {
    /// Token table `[vocab, hidden]`.
    pub table: &'a B::Linear,
    /// Token ids `[rows]`, each below `vocab`.
    pub ids: &'a [u32],
    /// How the rows are stored.
    pub store: Store,
    /// `[rows, hidden]`.
    pub out: &'a mut B::Tensor,
}

/// Normalises each row.
#[derive(Debug)]
pub struct NormArgs<'a, B: Backend> {
    /// Which norm.
    pub kind: NormKind,
    /// `[rows, hidden]`.
    pub x: &'a B::Tensor,
    /// Scale `[hidden]`.
    pub weight: &'a B::Vector,
    /// Shift `[hidden]`.
    pub bias: Option<&'a B::Vector>,
    /// Added under the root.
    pub epsilon: f32,
    /// `[rows, hidden]`.
    pub out: &'a mut B::Tensor,
}

/// The pointwise half of a feed-forward layer.
#[derive(Debug)]
pub struct ActivateArgs<'a, B: Backend> {
    /// The function.
    pub activation: Activation,
    /// Whether `x` is `[rows, 2·width]`, gate beside up, and the result `f(gate)·up`.
    pub gated: bool,
    /// `[rows, width]`, or `[rows, 2·width]` when gated.
    pub x: &'a B::Tensor,
    /// `[rows, width]`.
    pub out: &'a mut B::Tensor,
}

/// What reads a residual stream: `out = f(norm(x)·Wᵀ + b)`, without a function `norm(x)·Wᵀ + b`.
#[derive(Debug)]
pub struct ProjectArgs<'a, B: Backend> {
    /// How the input is normalised. Its `out` is room for that; what it holds afterwards is not
    /// defined.
    pub norm: NormArgs<'a, B>,
    /// `[out, in]`, with biases.
    pub linear: &'a B::Linear,
    /// The function, if any.
    pub activate: Option<ProjectActivation<'a, B>>,
    /// `[rows, out]`, or what the function leaves of it.
    pub out: &'a mut B::Tensor,
}

/// The function of a projection.
#[derive(Debug)]
pub struct ProjectActivation<'a, B: Backend> {
    /// The function.
    pub activation: Activation,
    /// Whether the product is `[rows, 2·width]`, gate beside up, and the result `f(gate)·up`.
    pub gated: bool,
    /// Room for the product `[rows, out]`; what it holds afterwards is not defined.
    pub product: &'a mut B::Tensor,
}

/// A projection, one operation after the other.
pub(crate) fn project_step_by_step<B: Backend>(backend: &B, args: ProjectArgs<'_, B>) {
    let ProjectArgs { norm, linear, activate, out } = args;
    let NormArgs { kind, x, weight, bias, epsilon, out: normed } = norm;
    backend.norm(NormArgs { kind, x, weight, bias, epsilon, out: &mut *normed });
    let (x, store) = (&*normed, Store::Overwrite);
    let Some(ProjectActivation { activation, gated, product }) = activate else {
        return backend.linear(LinearArgs { x, linear, store, out });
    };
    backend.linear(LinearArgs { x, linear, store, out: &mut *product });
    backend.activate(ActivateArgs { activation, gated, x: product, out });
}
