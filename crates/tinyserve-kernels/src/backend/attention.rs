//! Heads, and the operations over pages: appending, selecting, attending.

use std::fmt;
use std::ops::Range;

use tinyserve_kv::{PageId, PageSelector, SelectionPolicy, Slot};

use super::{Backend, Store};
use crate::{PageLists, Reuse};

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
