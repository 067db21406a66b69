//! One step of a model as data: what goes in, what comes out.

use std::ops::Range;

use tinyserve_kernels::{AttendStats, Attention};
use tinyserve_kv::PageTable;

/// Which positions of a sequence's step yield logits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LogitRows {
    /// None: a prefill chunk that is not the last.
    None,
    /// The last one.
    Last,
    /// Every one.
    All,
}

/// What one sequence does in a step.
#[derive(Debug, Clone)]
pub struct SequenceStep<'a> {
    /// New tokens; at least one.
    pub tokens: &'a [u32],
    /// The sequence's pages, already extended to hold `tokens`.
    pub table: &'a PageTable,
    /// Which pages each of the new tokens reads.
    pub attention: Attention<'a>,
    /// Which of the new tokens yield logits.
    pub logits: LogitRows,
}

impl SequenceStep<'_> {
    /// Position of the first new token.
    #[must_use]
    pub fn first_position(&self) -> usize {
        self.table.len() - self.tokens.len()
    }
}

/// What all sequences do in a step; their lengths may differ.
#[derive(Debug, Clone)]
pub struct Batch<'a> {
    /// The sequences; at least one.
    pub sequences: &'a [SequenceStep<'a>],
    /// Whether to measure the recall of the selections too, which costs a dense read.
    pub measure_recall: bool,
}

/// What a step computed. Reused from step to step.
#[derive(Debug, Clone, Default)]
pub struct StepOutput {
    pub(crate) logits: Vec<f32>,
    pub(crate) vocab: usize,
    pub(crate) rows: Vec<Range<usize>>,
    pub(crate) stats: AttendStats,
    /// One for each sequence.
    pub(crate) sequence_stats: Vec<AttendStats>,
}

impl StepOutput {
    /// Logits of sequence `sequence`, one row `[vocab]` per position that asked for them.
    ///
    /// # Panics
    /// When the step had no such sequence.
    pub fn logits(&self, sequence: usize) -> impl ExactSizeIterator<Item = &[f32]> {
        let rows = self.rows[sequence].clone();
        rows.map(|row| &self.logits[row * self.vocab..(row + 1) * self.vocab])
    }

    /// What attention read for sequence `sequence`, over all layers.
    ///
    /// # Panics
    /// When the step had no such sequence.
    #[must_use]
    pub fn sequence_stats(&self, sequence: usize) -> &AttendStats {
        &self.sequence_stats[sequence]
    }

    /// What attention read, over all layers and sequences.
    #[must_use]
    pub fn stats(&self) -> &AttendStats {
        &self.stats
    }
}
