//! From settings to an engine that runs.

use tinyserve::kernels::{Cpu, CpuOptions};
use tinyserve::model::{Checkpoint, KvCache, Model, Tokenizer};
use tinyserve::{AttentionMode, RopeFrequencyDtype, TinyServeConfig, TinyServeError};
use tinyserve_sched::{AttentionChoice, Engine, EngineConfig, ModelRunner};

use crate::{ServerConfig, ServerError};

/// A model that is loaded, with its engine.
#[derive(Debug)]
pub struct Loaded {
    pub(crate) engine: Engine,
    pub(crate) config: TinyServeConfig,
    pub(crate) tokenizer: Result<Tokenizer, String>,
    pub(crate) kv_format: &'static str,
}

impl Loaded {
    /// Loads the model of `config` and starts its engine; `change` may adjust the engine's own
    /// settings.
    ///
    /// # Errors
    /// When a setting is out of its range or the checkpoint cannot be used.
    pub fn new(
        config: TinyServeConfig,
        server: &ServerConfig,
        change: impl FnOnce(&mut EngineConfig),
    ) -> Result<Self, ServerError> {
        config.check()?;
        let backend = Cpu::new(CpuOptions { threads: config.threads, ..CpuOptions::default() });
        let backend = backend.map_err(TinyServeError::from)?;
        let mut checkpoint = Checkpoint::load(&config.model)?;
        if config.rope_frequency_dtype == RopeFrequencyDtype::Weights {
            checkpoint.round_rope_frequencies();
        }
        let max_sequence_length = config.sequence_limit(checkpoint.config().max_positions)?;
        let format = config.kv_cache_dtype.resolve(checkpoint.dtype());
        let layout = checkpoint.config().kv_layout(config.page_size, format)?;
        let weights = config.weights.resolve(checkpoint.dtype())?;
        let tokenizer = checkpoint.tokenizer().map_err(|error| error.to_string());
        let mut engine = EngineConfig {
            attention_chunk_size: config.attention_chunk_size,
            max_sequence_length,
            max_num_queued_reqs: Some(server.max_num_queued_reqs),
            max_num_queued_tokens: Some(server.max_num_queued_tokens),
            attention: match config.attention {
                AttentionMode::Dense => AttentionChoice::Dense,
                AttentionMode::Auto | AttentionMode::Sparse => {
                    AttentionChoice::Policy(config.selection_policy())
                }
            },
            eos: checkpoint.config().eos.clone(),
            tokenizer: tokenizer.as_ref().ok().cloned(),
            ..EngineConfig::default()
        };
        change(&mut engine);
        let model = Model::load_as(backend, &checkpoint, weights, |_, _| {})?;
        let pages = layout.pages_for(max_sequence_length) * engine.max_num_seqs;
        let cache = KvCache::new(model.backend(), layout, pages)?;
        let engine = Engine::start("engine", ModelRunner::new(model, cache), engine)?;
        Ok(Self { engine, config, tokenizer, kv_format: format.name() })
    }
}
