//! What a scheduler drives: a model with its pages, or a toy in their place.

use std::path::Path;
use std::time::Duration;

use tinyserve_kernels::{AttendStats, Backend, PageLists, TopRow};
use tinyserve_kv::{KvError, PagePool, PageTable, Prefix, PrefixStats};
use tinyserve_model::{
    Activations, Batch, KvCache, Model, ModelError, RestoredSession, SessionToSave, StepOutput,
};

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

    /// Pages that a sequence can get: free ones, and those that are kept only to be found again.
    fn available_pages(&self) -> usize {
        self.pool().free_pages()
    }

    /// Tokens that [`Self::start`] would find.
    fn known(&self, _prompt: Prefix<'_>) -> usize {
        0
    }

    /// A sequence that shares the pages of the longest known beginning of `prompt`, at most all but
    /// its last token. Unless it says otherwise, a runner knows none.
    fn start(&mut self, _prompt: Prefix<'_>) -> PageTable {
        PageTable::new(self.shape().page_size)
    }

    /// Offers the full pages of a sequence, whose first tokens are `prefix` and were computed with
    /// dense attention, to later ones.
    fn remember(&mut self, _prefix: Prefix<'_>, _table: &mut PageTable) {}

    /// What came of it; `None` for a runner that knows no beginnings.
    fn prefix_stats(&self) -> Option<PrefixStats> {
        None
    }

    /// Makes room for `tokens` more tokens of a sequence, all or nothing.
    ///
    /// # Errors
    /// [`KvError::OutOfPages`]; nothing has changed then.
    fn extend(&mut self, table: &mut PageTable, tokens: usize) -> Result<(), KvError>;

    /// Forgets the tokens of a sequence from `tokens` on; how many are left, which may be fewer.
    fn truncate(&mut self, table: &mut PageTable, tokens: usize) -> usize;

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

    /// Saves the full pages of a session to a file; see [`KvCache::save_session`].
    ///
    /// # Errors
    /// When the file cannot be written. Unless it says otherwise, a runner has nothing to save.
    fn save_session(&self, _path: &Path, _session: SessionToSave<'_>) -> Result<usize, ModelError> {
        Err(no_files())
    }

    /// Reads a session from a file; see [`KvCache::restore_session`].
    ///
    /// # Errors
    /// When the file is refused or too few pages are available; nothing has changed then.
    fn restore_session(
        &mut self,
        _path: &Path,
        _identity: &str,
    ) -> Result<RestoredSession, ModelError> {
        Err(no_files())
    }

    /// Lets go of what only sequences that run have memory for; see [`KvCache::rest`]. Unless it
    /// says otherwise, a runner keeps everything.
    fn rest(&mut self, _table: &mut PageTable) {}

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

    /// The likeliest tokens after sequence `sequence` in the last step, if it asked for those alone.
    ///
    /// # Panics
    /// When there is no such sequence.
    fn top(&self, sequence: usize) -> Option<TopRow<'_>>;

    /// What the last step read for sequence `sequence`.
    ///
    /// # Panics
    /// When there is no such sequence.
    fn read(&self, sequence: usize) -> AttendStats;

    /// The pages that the sequences of the last step selected, if that was asked for.
    fn page_lists(&self) -> Option<&PageLists> {
        None
    }

    /// What the last step read in each layer; none where there are no layers.
    fn layers(&self) -> &[AttendStats] {
        &[]
    }

    /// What attention took in the last step, in all layers together; `None` where nobody
    /// took the time.
    fn attention_time(&self) -> Option<Duration> {
        None
    }

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

fn no_files() -> ModelError {
    ModelError::Setting {
        name: "session file",
        found: "asked for".to_owned(),
        expected: "a runner whose pages hold bytes".to_owned(),
    }
}

/// The time of attention is taken in one of so many steps. A prime, so that it falls together with
/// nothing else that happens now and then.
const TIMED_STEPS: usize = 13;

/// A model on a backend.
#[derive(Debug)]
pub struct ModelRunner<B: Backend> {
    model: Model<B>,
    cache: KvCache<B>,
    activations: Activations<B>,
    output: StepOutput,
    steps: usize,
}

impl<B: Backend> ModelRunner<B> {
    /// A runner of `model` with the pages of `cache`.
    #[must_use]
    pub fn new(model: Model<B>, cache: KvCache<B>) -> Self {
        let activations = Activations::new(&model);
        Self { model, cache, activations, output: StepOutput::default(), steps: 0 }
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

    fn available_pages(&self) -> usize {
        self.cache.available_pages()
    }

    fn known(&self, prompt: Prefix<'_>) -> usize {
        self.cache.prefix_index().map_or(0, |index| index.peek(prompt))
    }

    fn start(&mut self, prompt: Prefix<'_>) -> PageTable {
        self.cache.start(prompt)
    }

    fn remember(&mut self, prefix: Prefix<'_>, table: &mut PageTable) {
        self.cache.remember(prefix, table);
    }

    fn prefix_stats(&self) -> Option<PrefixStats> {
        Some(self.cache.prefix_index()?.stats())
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

    fn truncate(&mut self, table: &mut PageTable, tokens: usize) -> usize {
        self.cache.truncate(table, tokens)
    }

    fn prune(&mut self, table: &mut PageTable, places: &[u32]) -> Result<(), ModelError> {
        self.cache.prune(self.model.backend(), table, places)
    }

    fn save_session(&self, path: &Path, session: SessionToSave<'_>) -> Result<usize, ModelError> {
        self.cache.save_session(self.model.backend(), path, session)
    }

    fn restore_session(
        &mut self,
        path: &Path,
        identity: &str,
    ) -> Result<RestoredSession, ModelError> {
        self.cache.restore_session(self.model.backend(), path, identity)
    }

    fn rest(&mut self, table: &mut PageTable) {
        self.cache.rest(table);
    }

    fn release(&mut self, table: PageTable) {
        self.cache.release(table);
    }

    fn run(&mut self, batch: &Batch<'_>) -> Result<(), ModelError> {
        self.output.time_attention(self.steps.is_multiple_of(TIMED_STEPS));
        self.steps += 1;
        self.model.forward(&mut self.activations, &mut self.cache, batch, &mut self.output)
    }

    fn logits(&self, sequence: usize, row: usize) -> &[f32] {
        let rows = self.output.logits(sequence).nth(row);
        rows.expect("the scheduler asks for rows that it ordered")
    }

    fn top(&self, sequence: usize) -> Option<TopRow<'_>> {
        self.output.top(sequence)
    }

    fn read(&self, sequence: usize) -> AttendStats {
        *self.output.sequence_stats(sequence)
    }

    fn page_lists(&self) -> Option<&PageLists> {
        Some(self.output.page_lists())
    }

    fn layers(&self) -> &[AttendStats] {
        self.output.layer_stats()
    }

    fn attention_time(&self) -> Option<Duration> {
        self.output.attention_time()
    }

    fn attention_entropy(&self, sequence: usize) -> Option<&[f32]> {
        self.output.attention_entropy(sequence)
    }

    fn attention_mass(&self, sequence: usize) -> Option<&[f32]> {
        self.output.attention_mass(sequence)
    }
}
