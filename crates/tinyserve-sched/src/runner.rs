//! What a scheduler drives: a model with its pages, or a toy in their place.

use tinyserve_kernels::{AttendStats, Backend};
use tinyserve_kv::{KvError, PagePool, PageTable};
use tinyserve_model::{Activations, Batch, KvCache, Model, ModelError, StepOutput};

/// Sizes of a runner, fixed for its life.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RunnerShape {
    /// Tokens of the vocabulary.
    pub vocab: usize,
    /// Longest sequence that the model was made for.
    pub max_positions: usize,
    /// Tokens of one page.
    pub page_size: usize,
    /// Bytes of one page, its boxes included.
    pub bytes_per_page: usize,
    /// Bytes of the weights.
    pub weight_bytes: usize,
}

/// A model with its pages.
pub trait Runner: Send {
    /// Its sizes.
    fn shape(&self) -> RunnerShape;

    /// Which pages are free.
    fn pool(&self) -> &PagePool;

    /// Makes room for `tokens` more tokens of a sequence, all or nothing.
    ///
    /// # Errors
    /// [`KvError::OutOfPages`]; nothing has changed then.
    fn extend(&mut self, table: &mut PageTable, tokens: usize) -> Result<(), KvError>;

    /// Forgets the tokens of a sequence from `tokens` on.
    fn truncate(&mut self, table: &mut PageTable, tokens: usize);

    /// Removes the tokens of a sequence at `places`, ascending, from every layer.
    ///
    /// # Errors
    /// When pages are missing or cannot be taken apart; nothing has changed then. Unless it says
    /// otherwise, a runner cannot do it.
    fn prune(&mut self, _table: &mut PageTable, _places: &[u32]) -> Result<(), ModelError> {
        Err(ModelError::Kv(KvError::Invalid {
            what: "token pruning",
            found: "asked for".to_owned(),
            expected: "a cache that tokens can be removed from".to_owned(),
        }))
    }

    /// Gives the pages of a sequence back.
    fn release(&mut self, table: PageTable);

    /// Runs one step.
    ///
    /// # Errors
    /// When the model or a page selector refuses it. The step may then be run again, whole or in
    /// parts.
    fn run(&mut self, batch: &Batch<'_>) -> Result<(), ModelError>;

    /// Logits `[vocab]` of the last step: of row `row` among those that sequence `sequence` asked
    /// for.
    ///
    /// # Panics
    /// When there is no such row.
    fn logits(&self, sequence: usize, row: usize) -> &[f32];

    /// What the last step read for sequence `sequence`.
    ///
    /// # Panics
    /// When there is no such sequence.
    fn read(&self, sequence: usize) -> AttendStats;

    /// Entropy of the attention weights of sequence `sequence` in the last step,
    /// `[layers, q_heads]`, if it asked for it.
    fn attention_entropy(&self, _sequence: usize) -> Option<&[f32]> {
        None
    }

    /// Attention mass of each cached token of sequence `sequence` in the last step, if it asked
    /// for it.
    fn attention_mass(&self, _sequence: usize) -> Option<&[f32]> {
        None
    }
}

/// A model on a backend.
#[derive(Debug)]
pub struct ModelRunner<B: Backend> {
    model: Model<B>,
    cache: KvCache<B>,
    activations: Activations<B>,
    output: StepOutput,
}

impl<B: Backend> ModelRunner<B> {
    /// A runner of `model` with the pages of `cache`.
    #[must_use]
    pub fn new(model: Model<B>, cache: KvCache<B>) -> Self {
        let activations = Activations::new(&model);
        Self { model, cache, activations, output: StepOutput::default() }
    }
}

impl<B: Backend> Runner for ModelRunner<B> {
    fn shape(&self) -> RunnerShape {
        let (config, layout) = (self.model.config(), self.cache.layout());
        RunnerShape {
            vocab: config.vocab_size,
            max_positions: config.max_positions,
            page_size: layout.page_size(),
            bytes_per_page: layout.bytes_per_page(),
            weight_bytes: self.model.weight_bytes(),
        }
    }

    fn pool(&self) -> &PagePool {
        self.cache.pool()
    }

    fn extend(&mut self, table: &mut PageTable, tokens: usize) -> Result<(), KvError> {
        self.cache.extend(self.model.backend(), table, tokens).map_err(|error| match error {
            ModelError::Kv(error) => error,
            // The cache has no other error; said so, it is not lost.
            error => KvError::Invalid {
                what: "KV cache",
                found: error.to_string(),
                expected: "pages".to_owned(),
            },
        })
    }

    fn truncate(&mut self, table: &mut PageTable, tokens: usize) {
        self.cache.truncate(table, tokens);
    }

    fn prune(&mut self, table: &mut PageTable, places: &[u32]) -> Result<(), ModelError> {
        self.cache.prune(self.model.backend(), table, places)
    }

    fn release(&mut self, table: PageTable) {
        self.cache.release(table);
    }

    fn run(&mut self, batch: &Batch<'_>) -> Result<(), ModelError> {
        self.model.forward(&mut self.activations, &mut self.cache, batch, &mut self.output)
    }

    fn logits(&self, sequence: usize, row: usize) -> &[f32] {
        let rows = self.output.logits(sequence).nth(row);
        rows.expect("the scheduler asks for rows that it ordered")
    }

    fn read(&self, sequence: usize) -> AttendStats {
        *self.output.sequence_stats(sequence)
    }

    fn attention_entropy(&self, sequence: usize) -> Option<&[f32]> {
        self.output.attention_entropy(sequence)
    }

    fn attention_mass(&self, sequence: usize) -> Option<&[f32]> {
        self.output.attention_mass(sequence)
    }
}
