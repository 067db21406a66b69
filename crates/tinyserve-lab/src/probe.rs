//! A model with a cache, one sequence at a time, step by step.

use std::sync::Arc;

use tinyserve_kernels::{Attention, Backend};
use tinyserve_kv::{AttentionObserver, KvLayout, PageTable, PromptAttention};
use tinyserve_model::{
    Activations, Batch, KvCache, LogitRows, Model, Observe, SequenceStep, StepOutput,
};

use crate::{Control, LabError};

/// Most tokens of one prefill step, unless set.
const CHUNK: usize = 256;
/// Pages beyond a sequence's own: a fork copies its open page and adds a few tokens.
const SPARE_TOKENS: usize = 512;

/// A model, its cache and its buffers.
#[derive(Debug)]
pub struct Probe<B: Backend> {
    model: Model<B>,
    cache: KvCache<B>,
    activations: Activations<B>,
    output: StepOutput,
    observed: usize,
    chunk: usize,
}

impl<B: Backend> Probe<B> {
    /// Room for one sequence of `tokens` tokens in pages of `layout`, which is one of the model, and
    /// for forks of it that go a little further.
    ///
    /// # Errors
    /// When there is no memory.
    pub fn new(model: Model<B>, layout: KvLayout, tokens: usize) -> Result<Self, LabError> {
        let pages = layout.pages_for(tokens) + 2 * layout.pages_for(SPARE_TOKENS) + 2;
        let cache = KvCache::new(model.backend(), layout, pages)?;
        let (activations, output) = (Activations::new(&model), StepOutput::default());
        Ok(Self { model, cache, activations, output, observed: 0, chunk: CHUNK })
    }

    /// Watches the last `tokens` tokens of each prefill, which eviction decides by.
    pub fn observe(&mut self, tokens: usize) {
        self.observed = tokens;
    }

    /// Sets the most tokens of one prefill step.
    pub fn prefill_chunk(&mut self, tokens: usize) {
        self.chunk = tokens.max(1);
    }

    /// The model.
    #[must_use]
    pub fn model(&self) -> &Model<B> {
        &self.model
    }

    /// The cache.
    #[must_use]
    pub fn cache(&self) -> &KvCache<B> {
        &self.cache
    }

    /// Computes `tokens` densely; `None` when `control` says no.
    ///
    /// # Errors
    /// When the model fails; the cache is then as it was.
    pub fn prefill(
        &mut self,
        tokens: &[u32],
        control: &mut Control<'_>,
    ) -> Result<Option<(PageTable, Arc<PromptAttention>)>, LabError> {
        let mut table = self.cache.new_table();
        let observer = AttentionObserver::default();
        let dense = tokens.len() - self.observed.min(tokens.len());
        let steps = tokens[..dense].chunks(self.chunk).map(|chunk| (chunk, false));
        let watched = tokens[dense..].chunks(self.chunk).map(|chunk| (chunk, true));
        for (chunk, watched) in steps.chain(watched) {
            let attention = if watched { Attention::Custom(&observer) } else { Attention::Dense };
            if let Err(error) = self.step(&mut table, chunk, attention, LogitRows::None, false) {
                self.release(table);
                return Err(error);
            }
            if !control("prefill", table.len(), tokens.len()) {
                self.release(table);
                return Ok(None);
            }
        }
        Ok(Some((table, Arc::new(observer.finish()))))
    }

    /// A second sequence that starts with the same tokens and shares their pages.
    pub fn fork(&mut self, table: &PageTable) -> PageTable {
        self.cache.fork(table)
    }

    /// Gives the pages of a sequence back.
    pub fn release(&mut self, table: PageTable) {
        self.cache.release(table);
    }

    /// Feeds `tokens` to a sequence.
    ///
    /// # Errors
    /// When the model fails.
    pub fn step(
        &mut self,
        table: &mut PageTable,
        tokens: &[u32],
        attention: Attention<'_>,
        logits: LogitRows,
        measure_recall: bool,
    ) -> Result<&StepOutput, LabError> {
        self.cache.extend(self.model.backend(), table, tokens.len())?;
        let observe = Observe::default();
        let step = SequenceStep { tokens, table, attention, logits, observe };
        let batch = Batch { sequences: &[step], measure_recall, list_pages: false };
        self.model.forward(&mut self.activations, &mut self.cache, &batch, &mut self.output)?;
        Ok(&self.output)
    }
}
