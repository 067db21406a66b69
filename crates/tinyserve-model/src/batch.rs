//! One step of a model as data: what goes in, what comes out.

use std::ops::Range;
use std::time::Duration;

use tinyserve_kernels::{AttendStats, Attention, PageLists, TopLogits, TopRow};
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
    /// None, but the likeliest tokens after the last position, so many of them: from 1 to
    /// [`tinyserve_kernels::MOST_TOP_LOGITS`]. [`StepOutput::top`] has them.
    Top(usize),
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
    /// What to tell about its attention.
    pub observe: Observe,
}

impl SequenceStep<'_> {
    /// Place in the cache of the first new token.
    #[must_use]
    pub fn first_place(&self) -> usize {
        self.table.len() - self.tokens.len()
    }

    /// Position in the text of the first new token: that of its place, unless tokens were pruned.
    #[must_use]
    pub fn first_position(&self) -> usize {
        self.table.next_position() - self.tokens.len()
    }
}

/// What a step tells about the attention of a sequence; nothing of it is computed unless it is
/// asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Observe {
    /// The entropy of the last new token's weights: [`StepOutput::attention_entropy`].
    pub entropy: bool,
    /// The mass that the last so many new tokens give to each cached one:
    /// [`StepOutput::attention_mass`].
    pub mass_rows: usize,
}

impl Observe {
    /// Nothing.
    pub const NOTHING: Self = Self { entropy: false, mass_rows: 0 };
}

/// What all sequences do in a step; their lengths may differ.
#[derive(Debug, Clone)]
pub struct Batch<'a> {
    /// The sequences; at least one.
    pub sequences: &'a [SequenceStep<'a>],
    /// Whether to measure the recall of the selections too, which costs a dense read.
    pub measure_recall: bool,
    /// Whether to tell which pages were selected: [`StepOutput::page_lists`].
    pub list_pages: bool,
}

/// What a step computed. Reused from step to step.
#[derive(Debug, Clone, Default)]
pub struct StepOutput {
    pub(crate) logits: Vec<f32>,
    pub(crate) vocab: usize,
    pub(crate) rows: Vec<Range<usize>>,
    pub(crate) top: TopLogits,
    /// For each sequence, its row of `top`, if it asked for one.
    pub(crate) top_rows: Vec<Option<usize>>,
    pub(crate) stats: AttendStats,
    /// One for each sequence.
    pub(crate) sequence_stats: Vec<AttendStats>,
    /// One for each layer.
    pub(crate) layer_stats: Vec<AttendStats>,
    pub(crate) times_attention: bool,
    pub(crate) attention_time: Option<Duration>,
    pub(crate) page_lists: PageLists,
    pub(crate) observed: Observed,
}

/// What a step observed, for each sequence.
#[derive(Debug, Clone, Default)]
pub(crate) struct Observed {
    pub(crate) entropies: Vec<f32>,
    /// Where each sequence's entropies lie, `[layers, q_heads]`.
    pub(crate) entropy_ranges: Vec<Range<usize>>,
    pub(crate) mass: Vec<f32>,
    /// Where each sequence's mass lies, `[cached tokens]`.
    pub(crate) mass_ranges: Vec<Range<usize>>,
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

    /// The likeliest tokens after the last position of sequence `sequence`: at least as many as it
    /// asked for, or the whole vocabulary; `None` unless it asked for some.
    ///
    /// # Panics
    /// When the step had no such sequence.
    #[must_use]
    pub fn top(&self, sequence: usize) -> Option<TopRow<'_>> {
        self.top_rows[sequence].map(|row| self.top.row(row))
    }

    /// What attention read for sequence `sequence`, over all layers.
    ///
    /// # Panics
    /// When the step had no such sequence.
    #[must_use]
    pub fn sequence_stats(&self, sequence: usize) -> &AttendStats {
        &self.sequence_stats[sequence]
    }

    /// What attention read in each layer, over all sequences.
    #[must_use]
    pub fn layer_stats(&self) -> &[AttendStats] {
        &self.layer_stats
    }

    /// Whether the steps to come take the time of their attention, which is two looks at the clock
    /// for each layer; they do not unless told so.
    pub fn time_attention(&mut self, on: bool) {
        self.times_attention = on;
    }

    /// What attention took in all layers together, page selection included, if its time was taken;
    /// `None` on a device whose operations are not done when they return.
    #[must_use]
    pub fn attention_time(&self) -> Option<Duration> {
        self.attention_time
    }

    /// Entropy in nats of the attention weights of the last token of sequence `sequence`,
    /// `[layers, q_heads]`, over the tokens that were read; `None` unless it was asked for.
    ///
    /// # Panics
    /// When the step had no such sequence.
    #[must_use]
    pub fn attention_entropy(&self, sequence: usize) -> Option<&[f32]> {
        let range = self.observed.entropy_ranges[sequence].clone();
        (!range.is_empty()).then(|| &self.observed.entropies[range])
    }

    /// Attention mass of each cached token of sequence `sequence`, `[cached tokens]`: the weights
    /// that it got, added up over layers, heads and the rows that were asked for; `None` unless
    /// some were.
    ///
    /// # Panics
    /// When the step had no such sequence.
    #[must_use]
    pub fn attention_mass(&self, sequence: usize) -> Option<&[f32]> {
        let range = self.observed.mass_ranges[sequence].clone();
        (!range.is_empty()).then(|| &self.observed.mass[range])
    }

    /// The pages that each sequence's last row selected, if that was asked for; none of sequences
    /// that read everything, and none on a device that keeps its lists to itself.
    #[must_use]
    pub fn page_lists(&self) -> &PageLists {
        &self.page_lists
    }

    /// What attention read, over all layers and sequences.
    #[must_use]
    pub fn stats(&self) -> &AttendStats {
        &self.stats
    }
}
