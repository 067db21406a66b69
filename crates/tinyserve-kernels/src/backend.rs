//! The seam between a model and a device: the operations that a forward pass needs.

use std::fmt;
use std::ops::Range;

use bytes::Bytes;
use tinyserve_kv::{
    KvFormat, KvLayout, PageCopy, PageId, PagePool, PageSelector, SelectionPolicy, Slot, TokenMove,
};

use crate::cpu::packed_bytes;
use crate::{DType, HostTensor, KernelError, PageLists, Reuse, TopLogitsArgs};

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

/// How an operation puts its result into its output.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Store {
    /// Replace what is there.
    Overwrite,
    /// Add to what is there: a residual connection without a pass of its own.
    Add,
}

/// Heads in a fused projection `[rows, (q_heads + 2·kv_heads)·head_dim]`: queries, keys, values.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Heads {
    /// Query heads; a multiple of `kv_heads`.
    pub q_heads: usize,
    /// Key/value heads.
    pub kv_heads: usize,
    /// Channels of one head.
    pub head_dim: usize,
}

impl Heads {
    /// Query heads that share one KV head.
    #[must_use]
    pub fn group(&self) -> usize {
        self.q_heads / self.kv_heads
    }

    /// Columns of the queries.
    #[must_use]
    pub fn q_columns(&self) -> Range<usize> {
        0..self.q_heads * self.head_dim
    }

    /// Columns of the keys.
    #[must_use]
    pub fn k_columns(&self) -> Range<usize> {
        let start = self.q_heads * self.head_dim;
        start..start + self.kv_heads * self.head_dim
    }

    /// Columns of the values.
    #[must_use]
    pub fn v_columns(&self) -> Range<usize> {
        let start = (self.q_heads + self.kv_heads) * self.head_dim;
        start..start + self.kv_heads * self.head_dim
    }

    /// Columns of the fused projection.
    #[must_use]
    pub fn qkv_width(&self) -> usize {
        (self.q_heads + 2 * self.kv_heads) * self.head_dim
    }
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

/// Angles of the rotary embedding, once per step for all layers.
#[derive(Debug)]
pub struct RotaryAnglesArgs<'a, B: Backend> {
    /// Position of each row `[rows]`.
    pub positions: &'a [u32],
    /// Angle per position and channel pair `[head_dim / 2]`.
    pub inverse_frequencies: &'a [f32],
    /// `[rows, head_dim]`: cosines `[head_dim / 2]`, then sines.
    pub out: &'a mut B::Tensor,
}

/// Rotates queries and keys in place: channel `i` with channel `i + head_dim / 2` (rotate-half).
#[derive(Debug)]
pub struct RotaryArgs<'a, B: Backend> {
    /// What [`Backend::rotary_angles`] wrote.
    pub angles: &'a B::Tensor,
    /// Heads of `qkv`.
    pub heads: Heads,
    /// `[rows, heads.qkv_width()]`; values stay as they are.
    pub qkv: &'a mut B::Tensor,
}

/// Writes keys and values into pages and grows the boxes in the same pass.
#[derive(Debug)]
pub struct AppendKvArgs<'a, B: Backend> {
    /// The layer whose pages are written.
    pub layer: usize,
    /// Heads of `qkv`.
    pub heads: Heads,
    /// `[rows, heads.qkv_width()]`.
    pub qkv: &'a B::Tensor,
    /// Where each row goes `[rows]`; all different, rows of one page in ascending order.
    pub slots: &'a [Slot],
    /// The pages.
    pub pages: &'a mut B::KvPages,
}

/// Rotates queries and keys, and writes keys and values into pages.
#[derive(Debug)]
pub struct RotateAndAppendArgs<'a, B: Backend> {
    /// What [`Backend::rotary_angles`] wrote.
    pub angles: &'a B::Tensor,
    /// The layer whose pages are written.
    pub layer: usize,
    /// Heads of `qkv`.
    pub heads: Heads,
    /// `[rows, heads.qkv_width()]`; the queries are rotated in place, and what the keys are
    /// afterwards is not defined.
    pub qkv: &'a mut B::Tensor,
    /// As [`AppendKvArgs::slots`].
    pub slots: &'a [Slot],
    /// The pages.
    pub pages: &'a mut B::KvPages,
}

/// One operation after the other.
pub(crate) fn rotate_then_append<B: Backend>(backend: &B, args: RotateAndAppendArgs<'_, B>) {
    let RotateAndAppendArgs { angles, layer, heads, qkv, slots, pages } = args;
    backend.rotary(RotaryArgs { angles, heads, qkv: &mut *qkv });
    backend.append_kv(AppendKvArgs { layer, heads, qkv, slots, pages });
}

/// Which pages attention reads.
#[derive(Clone, Copy)]
pub enum Attention<'a> {
    /// All of them.
    Dense,
    /// Those that a policy chooses, where the pages live.
    Policy(&'a SelectionPolicy),
    /// Those that a custom selector chooses, on the host. It must not use the backend that asks
    /// it, which would wait for itself.
    Custom(&'a dyn PageSelector),
}

impl fmt::Debug for Attention<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Dense => f.write_str("Dense"),
            Self::Policy(policy) => f.debug_tuple("Policy").field(policy).finish(),
            Self::Custom(_) => f.write_str("Custom"),
        }
    }
}

/// The rows of one sequence in a batch, and what they attend to.
#[derive(Debug, Clone)]
pub struct AttendSequence<'a> {
    /// Rows of the batch that are this sequence's, in order of position; no other sequence's.
    pub rows: Range<usize>,
    /// Position of the first row among the tokens in the cache; row `i` sees tokens
    /// `0..=first_position + i`. Pruned tokens are not counted.
    pub first_position: usize,
    /// The sequence's pages; they hold the rows' own keys already.
    pub pages: &'a [PageId],
    /// Which pages each row reads. Every row selects for itself.
    pub attention: Attention<'a>,
}

/// Causal attention over pages.
#[derive(Debug)]
pub struct AttendArgs<'a, B: Backend> {
    /// The layer whose pages are read.
    pub layer: usize,
    /// Heads of `qkv`.
    pub heads: Heads,
    /// `[rows, heads.qkv_width()]`, of which the queries are read.
    pub qkv: &'a B::Tensor,
    /// Factor of the scores before the softmax, usually `1/√head_dim`.
    pub scale: f32,
    /// The sequences of the batch.
    pub sequences: &'a [AttendSequence<'a>],
    /// The pages.
    pub pages: &'a B::KvPages,
    /// Whether to measure recall too, which reads every key of the sequences that select.
    pub measure_recall: bool,
    /// Where to add the page lists of each sequence's last row, by KV head. A backend that keeps
    /// lists where its pages are adds none.
    pub page_lists: Option<&'a mut PageLists>,
    /// What each sequence read `[sequences]`, added to what is there: requests that share a step
    /// are told apart.
    pub sequence_stats: Option<&'a mut [AttendStats]>,
    /// What to tell about the weights; nothing of it is computed unless it is asked for.
    pub observe: Option<ObserveArgs<'a, B::Tensor>>,
    /// `[rows, q_heads·head_dim]`.
    pub out: &'a mut B::Tensor,
}

/// What attention tells about its weights `p_t = exp(s_t − lse)`, where `s_t` is the scaled score
/// of token `t` and the tokens are those that were read.
#[derive(Debug)]
pub struct ObserveArgs<'a, T> {
    /// Log-sum-exp of the scores, `ln Σ_t exp(s_t)`, `[rows, q_heads]`.
    pub lse: &'a mut T,
    /// Entropy of the weights in nats, `lse − Σ_t p_t·s_t`, `[rows, q_heads]`. It comes out of the
    /// pass that computes the result.
    pub entropy: &'a mut T,
    /// What each token got, which costs a pass over weights that are kept for it, but none over
    /// keys.
    pub mass: Option<MassArgs<'a, T>>,
}

/// The attention mass of each token: its weights, added up over rows and the query heads of a KV
/// head.
#[derive(Debug)]
pub struct MassArgs<'a, T> {
    /// For each sequence, those of its rows whose weights are added up; it may be empty.
    pub rows: &'a [Range<usize>],
    /// How the result is stored; what is added to has the same shape.
    pub store: Store,
    /// `[rows of pages, page_size]`: for each sequence whose rows are not empty, in order, a row of
    /// pages `[kv_heads, pages of the sequence]`. Tokens that were not read have no mass.
    pub out: &'a mut T,
}

/// What attention read, added up over rows, heads and layers.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct AttendStats {
    /// Pages read, counted per [row, kv_head].
    pub pages_read: u64,
    /// Pages that dense attention would read, counted the same way.
    pub pages_total: u64,
    /// Bytes of keys, values and boxes read.
    pub bytes_read: u64,
    /// Bytes of keys and values that dense attention would read.
    pub bytes_dense: u64,
    /// Sum of the recalls that were measured, one per [row, q_head] that selected.
    pub recall_sum: f64,
    /// How many recalls were measured.
    pub recall_count: u64,
    /// How much of the selections was selected in the step before, where that was compared.
    pub reuse: Reuse,
}

impl AttendStats {
    /// Adds `other` to these counts.
    pub fn add(&mut self, other: &Self) {
        self.pages_read += other.pages_read;
        self.pages_total += other.pages_total;
        self.bytes_read += other.bytes_read;
        self.bytes_dense += other.bytes_dense;
        self.recall_sum += other.recall_sum;
        self.recall_count += other.recall_count;
        self.reuse.add(other.reuse);
    }

    /// Bytes read as a share of what dense attention reads; `None` before anything was read.
    #[must_use]
    pub fn bytes_ratio(&self) -> Option<f64> {
        (self.bytes_dense > 0).then(|| self.bytes_read as f64 / self.bytes_dense as f64)
    }

    /// Mean share of the dense attention mass that the pages read hold; `None` if never measured.
    #[must_use]
    pub fn recall(&self) -> Option<f64> {
        (self.recall_count > 0).then(|| self.recall_sum / self.recall_count as f64)
    }
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

/// A device: its memory, and the operations of a forward pass over it.
///
/// Tensors are activations `[rows, columns]` in f32; operations resize their outputs to the rows
/// of their inputs. An operation panics on shapes that do not fit: the model, not the user, made
/// them. What a user or a file can get wrong is refused with a [`KernelError`] when memory is
/// created or weights are loaded.
pub trait Backend: Send + Sized {
    /// Activations `[rows, columns]`, f32.
    type Tensor: Send + fmt::Debug;
    /// A norm's scale or shift `[columns]`.
    type Vector: Send + Sync + fmt::Debug;
    /// Matrices `[out, in]` with biases, or an embedding table.
    type Linear: Send + Sync + fmt::Debug;
    /// The bytes of a page pool.
    type KvPages: Send + fmt::Debug;

    /// An activation tensor of no rows; it grows as operations write it, and never shrinks.
    fn tensor(&self, columns: usize) -> Self::Tensor;

    /// Takes a vector over from a checkpoint.
    ///
    /// # Errors
    /// When the tensor is not one-dimensional, or the device has no memory for it.
    fn load_vector(&self, vector: &HostTensor) -> Result<Self::Vector, KernelError>;

    /// Takes a linear layer over from a checkpoint.
    ///
    /// # Errors
    /// When shapes do not fit each other, or the device has no memory for it.
    fn load_linear(&self, spec: LinearSpec) -> Result<Self::Linear, KernelError>;

    /// Bytes that the weights and biases of a linear layer take.
    fn linear_bytes(&self, linear: &Self::Linear) -> usize;

    /// Names what [`LinearImage::weights`] hold; `None` where a backend makes no images.
    fn image_layout(&self) -> Option<&'static str> {
        None
    }

    /// A quantised layer's content; `None` for weights as they are stored.
    fn linear_image(&self, _linear: &Self::Linear) -> Option<LinearImage> {
        None
    }

    /// Takes over what [`Self::linear_image`] gave. The bytes must be what it gave: sizes are
    /// checked, codes cannot be.
    ///
    /// # Errors
    /// When the sizes do not fit each other, or the backend makes no images.
    fn load_linear_image(&self, _image: LinearImage) -> Result<Self::Linear, KernelError> {
        Err(KernelError::Invalid {
            what: "image of a linear layer",
            found: "a backend that makes none".to_owned(),
            expected: "the backend that made it".to_owned(),
        })
    }

    /// Whether products of bf16 weights, as they are stored, round their inputs to bf16 first.
    fn rounds_inputs(&self) -> bool {
        false
    }

    /// The formats of keys and values that it has: those without codes, unless it says more.
    fn kv_formats(&self) -> &'static [KvFormat] {
        &KvFormat::FLOATS
    }

    /// The formats that it has for open pages where full ones become codes.
    fn open_formats(&self) -> &'static [KvFormat] {
        &[KvFormat::F16]
    }

    /// Memory for `pages` pages, in one of [`Self::kv_formats`] and, where that has codes, of
    /// [`Self::open_formats`].
    ///
    /// # Errors
    /// When the device has no memory for them, or open pages are in a format that it has not.
    fn allocate_pages(&self, layout: KvLayout, pages: usize) -> Result<Self::KvPages, KernelError>;

    /// Copies a page, for copy on write.
    fn copy_page(&self, pages: &mut Self::KvPages, copy: PageCopy);

    /// Lets go of what it keeps, apart from the pages' own places, of pages that nobody holds.
    ///
    /// Called after pages were released. A backend that keeps nothing elsewhere does nothing.
    fn forget_free_pages(&self, _pages: &mut Self::KvPages, _pool: &PagePool) {}

    /// Gives the bytes of full pages to `take`, one after the other, as
    /// [`tinyserve_kv::HostPages::read_page`] has them, whatever the device's own layout is. While
    /// one page is taken, a device copies the next.
    ///
    /// `take` calls no operation of the backend.
    ///
    /// # Errors
    /// When the device fails, or `take` does: no page is taken then any more.
    fn download_pages<E: From<KernelError>>(
        &self,
        pages: &Self::KvPages,
        ids: &[PageId],
        take: impl FnMut(&[u8]) -> Result<(), E>,
    ) -> Result<(), E>;

    /// Puts a full page back that [`Self::download_pages`] wrote, here or on another device.
    ///
    /// # Errors
    /// When the device fails; the page is then garbage.
    fn upload_page(
        &self,
        pages: &mut Self::KvPages,
        page: PageId,
        bytes: &[u8],
    ) -> Result<(), KernelError>;

    /// Moves tokens within pages, in order, after some were pruned, and rebuilds the boxes of the
    /// pages that they reach, up to the last token that came: keys, values and boxes of all layers.
    ///
    /// # Errors
    /// When pages of this format cannot be taken apart.
    fn move_tokens(
        &self,
        pages: &mut Self::KvPages,
        moves: &[TokenMove],
    ) -> Result<(), KernelError>;

    /// Looks rows up in an embedding table.
    fn embed(&self, args: EmbedArgs<'_, Self>);

    /// Normalises rows.
    fn norm(&self, args: NormArgs<'_, Self>);

    /// Multiplies by a matrix.
    fn linear(&self, args: LinearArgs<'_, Self>);

    /// Prepares the angles of a step.
    fn rotary_angles(&self, args: RotaryAnglesArgs<'_, Self>);

    /// Rotates queries and keys.
    fn rotary(&self, args: RotaryArgs<'_, Self>);

    /// Writes keys and values into pages.
    fn append_kv(&self, args: AppendKvArgs<'_, Self>);

    /// Rotates queries and keys, and writes keys and values into pages: what [`Self::rotary`] and
    /// [`Self::append_kv`] do, in one pass where a backend can.
    fn rotate_and_append(&self, args: RotateAndAppendArgs<'_, Self>) {
        rotate_then_append(self, args);
    }

    /// Attends over pages.
    ///
    /// # Errors
    /// [`KernelError::Selector`] when a custom selector returns a list that is empty, unsorted or
    /// out of range.
    fn attend(&self, args: AttendArgs<'_, Self>) -> Result<AttendStats, KernelError>;

    /// Applies a feed-forward layer's function.
    fn activate(&self, args: ActivateArgs<'_, Self>);

    /// Normalises rows, multiplies them by a matrix, and applies a feed-forward layer's function:
    /// what [`Self::norm`], [`Self::linear`] and [`Self::activate`] do, in fewer passes where a
    /// backend can.
    fn project(&self, args: ProjectArgs<'_, Self>) {
        project_step_by_step(self, args);
    }

    /// Copies rows of `x` into `out`, in the order of `rows`.
    fn gather_rows(&self, x: &Self::Tensor, rows: &[u32], out: &mut Self::Tensor);

    /// Finds the likeliest tokens of rows of logits, where the logits are: of a large vocabulary
    /// only these come to the host.
    fn top_logits(&self, args: TopLogitsArgs<'_, Self>);

    /// Copies a tensor to the host: `out` becomes `[rows · columns]`.
    fn download(&self, x: &Self::Tensor, out: &mut Vec<f32>);

    /// Fills a tensor from the host; `values` is `[rows · columns]`.
    fn upload(&self, values: &[f32], out: &mut Self::Tensor);

    /// Whether operations are done when they return.
    fn is_synchronous(&self) -> bool {
        true
    }

    /// Tells what went wrong on the device since it was last asked.
    ///
    /// Operations return before a device has run them, so that they cannot tell themselves; what
    /// they wrote is then not defined. Ask after a download. The CPU has nothing to tell.
    ///
    /// # Errors
    /// The first thing that went wrong.
    fn check(&self) -> Result<(), KernelError> {
        Ok(())
    }
}
