//! The engine: a model, its cache and its tokenizer behind one handle.

use std::ops::ControlFlow;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tinyserve_kernels::{Attention, Cpu, CpuOptions};
use tinyserve_kv::{PageSelector, SelectionPolicy};
use tinyserve_model::{
    CacheOutcome, Checkpoint, FinishReason, Generation, GenerationEvent, GenerationOutcome,
    Generator, IncrementalDecoder, KvCache, Model, ModelConfig, ModelError, Perplexity,
    StopMatcher, Tokenizer,
};

use crate::{
    AttentionMode, KvUsage, Prompt, RopeFrequencyDtype, Stats, StreamEvent, Timings,
    TinyServeConfig, TinyServeError, TinyServeRequest, TinyServeResponse, Weights,
};

/// Decode steps between two measurements of recall.
const RECALL_INTERVAL: usize = 16;

/// A loaded model that answers requests, one at a time.
///
/// ```
/// use tinyserve::{TinyServe, TinyServeRequest};
///
/// let engine = TinyServe::builder().model("builtin:stories260k").page_size(16).build()?;
/// let request = TinyServeRequest::new("Once upon a time").max_tokens(24).temperature(0.0);
/// let response = engine.serve(request)?;
/// assert!(response.generated_text.contains("Lily"));
/// assert_eq!(engine.get_stats().total_requests, 1);
/// # Ok::<(), tinyserve::TinyServeError>(())
/// ```
pub struct TinyServe {
    config: TinyServeConfig,
    attention: DecodeAttention,
    model: ModelConfig,
    tokenizer: Result<Tokenizer, String>,
    max_sequence_length: usize,
    weight_bytes: usize,
    weights_cache: Option<CacheOutcome>,
    load: Duration,
    backend_name: String,
    state: Mutex<State>,
}

struct State {
    generator: Generator<Cpu>,
    stats: Stats,
    last_id: u64,
}

enum DecodeAttention {
    Dense,
    Policy(SelectionPolicy),
    Custom(Arc<dyn PageSelector>),
}

impl DecodeAttention {
    fn as_kernel(&self) -> Attention<'_> {
        match self {
            Self::Dense => Attention::Dense,
            Self::Policy(policy) => Attention::Policy(policy),
            Self::Custom(selector) => Attention::Custom(selector.as_ref()),
        }
    }
}

impl std::fmt::Debug for TinyServe {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("TinyServe").field("config", &self.config).finish_non_exhaustive()
    }
}

/// Collects settings and builds a [`TinyServe`].
#[derive(Default)]
pub struct TinyServeBuilder {
    config: TinyServeConfig,
    selector: Option<Arc<dyn PageSelector>>,
    cpu: CpuOptions,
}

impl TinyServeBuilder {
    /// Replaces all settings.
    #[must_use]
    pub fn config(mut self, config: TinyServeConfig) -> Self {
        self.config = config;
        self
    }

    /// A folder in Hugging Face layout, or `builtin:stories260k`.
    #[must_use]
    pub fn model(mut self, model: impl Into<String>) -> Self {
        self.config.model = model.into();
        self
    }

    /// Tokens of one page.
    #[must_use]
    pub fn page_size(mut self, page_size: usize) -> Self {
        self.config.page_size = page_size;
        self
    }

    /// When decode steps select pages.
    #[must_use]
    pub fn attention(mut self, attention: AttentionMode) -> Self {
        self.config.attention = attention;
        self
    }

    /// Share of the pages that a selecting step reads.
    #[must_use]
    pub fn selection_ratio(mut self, ratio: f64) -> Self {
        self.config.selection_ratio = ratio;
        self
    }

    /// Tokens that a selecting step reads, instead of a share.
    #[must_use]
    pub fn token_budget(mut self, tokens: usize) -> Self {
        self.config.token_budget = Some(tokens);
        self
    }

    /// Threads of the CPU.
    #[must_use]
    pub fn threads(mut self, threads: usize) -> Self {
        self.config.threads = Some(threads);
        self
    }

    /// How weights are kept in memory.
    #[must_use]
    pub fn weights(mut self, weights: Weights) -> Self {
        self.config.weights = weights;
        self
    }

    /// Which of the CPU's instruction sets to use, instead of the best.
    #[must_use]
    pub fn cpu_path(mut self, path: tinyserve_kernels::CpuPath) -> Self {
        self.cpu.path = Some(path);
        self
    }

    /// A page selector of your own in place of the policy that the settings describe.
    #[must_use]
    pub fn selector(mut self, selector: Arc<dyn PageSelector>) -> Self {
        self.selector = Some(selector);
        self
    }

    /// Folder in which quantised weights are kept from one start to the next.
    #[must_use]
    pub fn weights_cache(mut self, folder: impl Into<PathBuf>) -> Self {
        self.config.weights_cache = Some(folder.into());
        self
    }

    /// Loads the model.
    ///
    /// # Errors
    /// When a setting is out of its range or the checkpoint cannot be used.
    pub fn build(self) -> Result<TinyServe, TinyServeError> {
        self.build_with_progress(|_, _| {})
    }

    /// Loads the model; `progress` is told layers done and layers in all.
    ///
    /// # Errors
    /// As [`Self::build`].
    pub fn build_with_progress(
        self,
        progress: impl FnMut(usize, usize),
    ) -> Result<TinyServe, TinyServeError> {
        let start = Instant::now();
        let config = self.config;
        config.check()?;
        let backend = Cpu::new(CpuOptions { threads: config.threads, ..self.cpu })?;
        let backend_name = format!("CPU, {}, {} threads", backend.path(), backend.threads());
        let mut checkpoint = Checkpoint::load(&config.model)?;
        if config.rope_frequency_dtype == RopeFrequencyDtype::Weights {
            checkpoint.round_rope_frequencies();
        }
        let max_sequence_length = config.sequence_limit(checkpoint.config().max_positions)?;
        let format = config.kv_cache_dtype.resolve(checkpoint.dtype());
        let layout = checkpoint.config().kv_layout(config.page_size, format)?;
        let weights = config.load_options(checkpoint.dtype())?;
        // Only text needs a tokenizer: a checkpoint without one still serves token ids.
        let tokenizer = checkpoint.tokenizer().map_err(|error| error.to_string());
        let model = Model::load_with(backend, &checkpoint, &weights, progress)?;
        let weight_bytes = model.weight_bytes();
        let weights_cache = model.weights_cache().cloned();
        let pages = layout.pages_for(max_sequence_length);
        let cache = KvCache::new(model.backend(), layout, pages)?;
        let attention = match (config.attention, self.selector) {
            (_, Some(selector)) => DecodeAttention::Custom(selector),
            (AttentionMode::Dense, None) => DecodeAttention::Dense,
            (_, None) => DecodeAttention::Policy(config.selection_policy()),
        };
        Ok(TinyServe {
            attention,
            model: checkpoint.config().clone(),
            tokenizer,
            max_sequence_length,
            weight_bytes,
            weights_cache,
            load: start.elapsed(),
            backend_name,
            state: Mutex::new(State {
                generator: Generator::new(model, cache),
                stats: Stats::default(),
                last_id: 0,
            }),
            config,
        })
    }
}

impl TinyServe {
    /// Starts from the default settings and the built-in model.
    #[must_use]
    pub fn builder() -> TinyServeBuilder {
        TinyServeBuilder::default()
    }

    /// The settings it was built with.
    #[must_use]
    pub fn config(&self) -> &TinyServeConfig {
        &self.config
    }

    /// The model's shape.
    #[must_use]
    pub fn model_config(&self) -> &ModelConfig {
        &self.model
    }

    /// Most tokens of a sequence, prompt included.
    #[must_use]
    pub fn max_sequence_length(&self) -> usize {
        self.max_sequence_length
    }

    /// What the model runs on, in words.
    #[must_use]
    pub fn backend_name(&self) -> &str {
        &self.backend_name
    }

    /// What became of the cache of weights, where one was asked for.
    #[must_use]
    pub fn weights_cache(&self) -> Option<&CacheOutcome> {
        self.weights_cache.as_ref()
    }

    /// How long loading took.
    #[must_use]
    pub fn load_time(&self) -> Duration {
        self.load
    }

    /// The model's tokenizer.
    ///
    /// # Errors
    /// When the checkpoint has none that can be used.
    pub fn tokenizer(&self) -> Result<&Tokenizer, TinyServeError> {
        self.tokenizer
            .as_ref()
            .map_err(|message| ModelError::NoTokenizer { message: message.clone() }.into())
    }

    /// Answers a request.
    ///
    /// # Errors
    /// When the prompt is empty or longer than the context, a setting is out of its range, or the
    /// model fails. Other requests are not affected.
    pub fn serve(&self, request: TinyServeRequest) -> Result<TinyServeResponse, TinyServeError> {
        self.serve_stream(request, |_| ControlFlow::Continue(()))
    }

    /// Answers a request and tells `on_event` what happens; `Break` ends it early.
    ///
    /// # Errors
    /// As [`Self::serve`].
    pub fn serve_stream(
        &self,
        request: TinyServeRequest,
        mut on_event: impl FnMut(StreamEvent) -> ControlFlow<()>,
    ) -> Result<TinyServeResponse, TinyServeError> {
        let start = Instant::now();
        let prompt = match request.prompt {
            Prompt::Tokens(tokens) => tokens,
            Prompt::Text(text) if text.is_empty() => return Err(ModelError::EmptyPrompt.into()),
            Prompt::Text(text) => self.tokenizer()?.encode(&text, true)?,
        };
        let mut text = Text::new(self.tokenizer.as_ref().ok(), &prompt, &request.stop)?;
        let stop_tokens: &[u32] = if request.ignore_eos { &[] } else { &self.model.eos };
        let generation = Generation {
            prompt: &prompt,
            max_tokens: request.max_tokens,
            sampling: request.sampling,
            stop_tokens,
            attention: self.attention.as_kernel(),
            prefill_chunk: self.config.attention_chunk_size,
            max_sequence_length: self.max_sequence_length,
            recall_interval: RECALL_INTERVAL,
        };
        let mut state = self.lock()?;
        let outcome = state.generator.generate(&generation, &mut |event| {
            let (event, stopped) = match event {
                GenerationEvent::Prefilled { done, total } => {
                    (StreamEvent::Prefill { done, total }, false)
                }
                GenerationEvent::Token { token, ends } => {
                    let (text, stopped) =
                        if ends { Default::default() } else { text.push(token.id)? };
                    (StreamEvent::Token { id: token.id, logprob: token.logprob, text }, stopped)
                }
            };
            Ok(match on_event(event) {
                _ if stopped => ControlFlow::Break(FinishReason::Stop),
                ControlFlow::Break(()) => ControlFlow::Break(FinishReason::Cancelled),
                ControlFlow::Continue(()) => ControlFlow::Continue(()),
            })
        })?;
        let rest = text.finish()?;
        if !rest.is_empty() {
            // The request is over: there is nothing left for a `Break` to end.
            let _ = on_event(StreamEvent::Rest { text: rest });
        }
        state.last_id += 1;
        let request_id = match request.request_id {
            id if id.is_empty() => format!("req-{}", state.last_id),
            id => id,
        };
        let bytes_per_page = state.generator.cache().layout().bytes_per_page();
        let response = self.response(Finished {
            request_id,
            prompt_tokens: prompt.len(),
            text: text.shown,
            outcome: &outcome,
            bytes_per_page,
            latency: start.elapsed(),
        });
        state.stats.add(&response);
        Ok(response)
    }

    /// Perplexity of `text` in windows of the context that start `stride` tokens apart (half the
    /// context unless given).
    ///
    /// # Errors
    /// When the text has fewer than two tokens, the stride is out of range, or the model fails.
    pub fn perplexity(
        &self,
        text: &str,
        stride: Option<usize>,
        progress: impl FnMut(usize, usize),
    ) -> Result<Perplexity, TinyServeError> {
        let tokens = self.tokenizer()?.encode(text, true)?;
        let window = self.max_sequence_length;
        let windows = (window, stride.unwrap_or((window / 2).max(1)));
        let chunk = self.config.attention_chunk_size;
        Ok(self.lock()?.generator.perplexity(&tokens, windows, chunk, progress)?)
    }

    /// Totals over the requests that have finished.
    #[must_use]
    pub fn get_stats(&self) -> Stats {
        self.state.lock().unwrap_or_else(PoisonError::into_inner).stats
    }

    fn lock(&self) -> Result<MutexGuard<'_, State>, TinyServeError> {
        self.state.lock().map_err(|_| TinyServeError::Poisoned)
    }

    fn response(&self, finished: Finished<'_>) -> TinyServeResponse {
        let outcome = finished.outcome;
        let stats = &outcome.decode_stats;
        let bytes_resident = outcome.pages * finished.bytes_per_page;
        let seconds = |duration: Duration| duration.as_secs_f64();
        TinyServeResponse {
            request_id: finished.request_id,
            generated_text: finished.text,
            tokens: outcome.tokens.iter().map(|token| token.id).collect(),
            logprobs: outcome.tokens.iter().map(|token| token.logprob).collect(),
            prompt_tokens: finished.prompt_tokens,
            finish_reason: outcome.finish_reason,
            latency_ms: seconds(finished.latency) * 1e3,
            memory_usage_gb: (self.weight_bytes + bytes_resident) as f64 / 1e9,
            // No measurement means that no step left a page out, so nothing was missed.
            kv_cache_hit_rate: stats.recall().unwrap_or(1.0),
            timings: Timings {
                prefill_ms: seconds(outcome.prefill) * 1e3,
                prefill_tok_s: finished.prompt_tokens as f64 / seconds(outcome.prefill),
                ttft_ms: seconds(outcome.ttft) * 1e3,
                decode_ms: seconds(outcome.decode) * 1e3,
                decode_tok_s: (outcome.decode_steps > 0)
                    .then(|| outcome.decode_steps as f64 / seconds(outcome.decode)),
            },
            kv: KvUsage {
                pages: outcome.pages,
                bytes_resident,
                bytes_read: stats.bytes_read,
                bytes_dense: stats.bytes_dense,
                bytes_read_ratio: stats.bytes_ratio(),
                recall: stats.recall(),
            },
        }
    }
}

/// What a response is made of.
struct Finished<'a> {
    request_id: String,
    prompt_tokens: usize,
    text: String,
    outcome: &'a GenerationOutcome,
    bytes_per_page: usize,
    latency: Duration,
}

/// The text of a request while it grows.
struct Text {
    decoder: Option<IncrementalDecoder>,
    stops: StopMatcher,
    stopped: bool,
    shown: String,
}

impl Text {
    fn new(
        tokenizer: Option<&Tokenizer>,
        prompt: &[u32],
        stops: &[String],
    ) -> Result<Self, TinyServeError> {
        Ok(Self {
            decoder: tokenizer.map(|tokenizer| IncrementalDecoder::new(tokenizer, prompt)),
            stops: StopMatcher::new(stops),
            stopped: false,
            shown: String::new(),
        })
    }

    fn push(&mut self, id: u32) -> Result<(String, bool), ModelError> {
        let Some(decoder) = &mut self.decoder else { return Ok(Default::default()) };
        let (text, stopped) = self.stops.push(&decoder.push(id)?);
        self.shown.push_str(&text);
        self.stopped = stopped;
        Ok((text, stopped))
    }

    fn finish(&mut self) -> Result<String, ModelError> {
        let (false, Some(decoder)) = (self.stopped, &mut self.decoder) else {
            return Ok(String::new());
        };
        let (mut text, stopped) = self.stops.push(&decoder.finish()?);
        if !stopped {
            text.push_str(&self.stops.finish());
        }
        self.shown.push_str(&text);
        Ok(text)
    }
}
