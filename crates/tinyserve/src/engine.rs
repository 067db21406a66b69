//! The engine: a model, its cache and its tokenizer behind one handle.

use std::ops::ControlFlow;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tinyserve_kernels::{Backend, Cpu, CpuOptions, Cuda, DType};
use tinyserve_kv::{PageSelector, PrefixIndex, PrefixOptions};
use tinyserve_model::{
    CacheOutcome, ChatTemplate, Checkpoint, KvCache, LoadOptions, MemoryPlan, Model, ModelConfig,
    ModelError, Perplexity, PerplexityWindow, Tokenizer, perplexity_windows,
};
use tinyserve_plugins::{Plugin, PluginManager};
use tinyserve_sched::{
    AttentionChoice, Engine, EngineConfig, Event, EventStream, ModelRunner, Request, SessionInfo,
    Summary, Token,
};

use crate::request::stop_reason;

use crate::{
    AttentionMode, Device, FinishReason, KvUsage, Measured, Optimized, PlannedMemory, Prompt,
    RopeFrequencyDtype, Stats, StreamEvent, Timings, TinyServeConfig, TinyServeError,
    TinyServeRequest, TinyServeResponse, Weights,
};

/// A loaded model that answers requests, many at once.
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
    model: ModelConfig,
    tokenizer: Result<Tokenizer, String>,
    chat_template: Result<Option<ChatTemplate>, ModelError>,
    memory: PlannedMemory,
    /// Names what keys and values depend on beside tokens and layout.
    identity: String,
    weight_bytes: usize,
    weights_cache: Option<CacheOutcome>,
    /// Element type of the stored weights.
    stored: DType,
    load: Duration,
    backend_name: String,
    plugins: PluginManager,
    engine: Engine,
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
    checkpoint: Option<Checkpoint>,
    plugins: PluginManager,
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

    /// Plugins of your own; the built-in ones are registered beside them.
    #[must_use]
    pub fn plugins(mut self, plugins: PluginManager) -> Self {
        self.plugins = plugins;
        self
    }

    /// Folder in which quantised weights are kept from one start to the next.
    #[must_use]
    pub fn weights_cache(mut self, folder: impl Into<PathBuf>) -> Self {
        self.config.weights_cache = Some(folder.into());
        self
    }

    /// A checkpoint that is open already, in place of the one that `model` names.
    #[must_use]
    pub fn checkpoint(mut self, checkpoint: Checkpoint) -> Self {
        self.checkpoint = Some(checkpoint);
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
        // Opened before anything is read: a device that is not there is told at once.
        let cuda = match config.device {
            Device::Cuda(number) => Some(Cuda::new(number)?),
            Device::Auto | Device::Cpu => None,
        };
        if cuda.is_some() && config.replicas > 1 {
            return Err(TinyServeError::Setting {
                field: "replicas",
                found: config.replicas.to_string(),
                expected: "1 on a CUDA device".to_owned(),
            });
        }
        let replicas = config.replicas;
        let threads = config.threads.or_else(|| {
            let all = std::thread::available_parallelism().map_or(1, usize::from);
            (replicas > 1).then_some(all)
        });
        let threads = threads.map(|all| (all / replicas).max(1));
        let backends = (0..replicas)
            .map(|_| Cpu::new(CpuOptions { threads, ..self.cpu }))
            .collect::<Result<Vec<_>, _>>()?;
        let (path, threads) = (backends[0].path(), backends[0].threads());
        let backend_name = match (&cuda, replicas) {
            (Some(cuda), _) => format!("cuda:{}, {}", cuda.device().ordinal, cuda.device().name),
            (None, 1) => format!("CPU, {path}, {threads} threads"),
            (None, _) => format!("CPU, {path}, {replicas} replicas of {threads} threads"),
        };
        let mut checkpoint = match self.checkpoint {
            Some(checkpoint) => checkpoint,
            None => Checkpoint::load(&config.model)?,
        };
        if config.rope_frequency_dtype == RopeFrequencyDtype::Weights {
            checkpoint.round_rope_frequencies();
        }
        let weights = config.load_options(checkpoint.dtype())?;
        // Only text needs a tokenizer: a checkpoint without one still serves token ids.
        let tokenizer = checkpoint.tokenizer().map_err(|error| error.to_string());
        let chat_template = checkpoint.chat_template();
        let memory = PlannedMemory::new(&config, &checkpoint, threads)?;
        // What keys and values depend on beside tokens and layout.
        let identity = format!(
            "{} {} {:?}",
            checkpoint.fingerprint(),
            config.weights.name(checkpoint.dtype()),
            config.rope_frequency_dtype
        );
        let loading = Loading {
            config: &config,
            checkpoint: &checkpoint,
            weights,
            plan: memory.plan,
            identity: &identity,
        };
        let attention = match (config.attention, self.selector) {
            (_, Some(selector)) => AttentionChoice::Custom(selector),
            (AttentionMode::Dense, None) => AttentionChoice::Dense,
            (_, None) => AttentionChoice::Policy(config.selection_policy()),
        };
        let plugins = self.plugins;
        config.register_plugins(&plugins)?;
        let scheduling = EngineConfig {
            plugins: plugins.clone(),
            max_sequence_length: memory.max_sequence_length,
            attention,
            eos: checkpoint.config().eos.clone(),
            tokenizer: tokenizer.as_ref().ok().cloned(),
            ..config.scheduling()
        };
        let (engine, weight_bytes, weights_cache) = match cuda {
            Some(cuda) => loading.start(vec![cuda], &scheduling, progress)?,
            None => loading.start(backends, &scheduling, progress)?,
        };
        Ok(TinyServe {
            model: checkpoint.config().clone(),
            tokenizer,
            chat_template,
            memory,
            identity,
            weight_bytes,
            weights_cache,
            stored: checkpoint.dtype(),
            load: start.elapsed(),
            backend_name,
            plugins,
            engine,
            config,
        })
    }
}

/// What models are loaded from, whatever the device.
struct Loading<'a> {
    config: &'a TinyServeConfig,
    checkpoint: &'a Checkpoint,
    weights: LoadOptions,
    plan: MemoryPlan,
    identity: &'a str,
}

impl Loading<'_> {
    /// Loads the model onto each of `backends` and starts their engine; gives the bytes of all
    /// weights, and what became of their cache, too.
    fn start<B: Backend + 'static>(
        &self,
        backends: Vec<B>,
        scheduling: &EngineConfig,
        mut progress: impl FnMut(usize, usize),
    ) -> Result<(Engine, usize, Option<CacheOutcome>), TinyServeError> {
        let Self { config, checkpoint, weights, plan, identity } = self;
        let MemoryPlan { layout, pages, .. } = *plan;
        let policy = config.eviction_policy.resolve(checkpoint);
        let prefixes = PrefixOptions { identity, layout, policy, max_pages: pages };
        let replicas = backends.len();
        let (mut weight_bytes, mut weights_cache) = (0, None);
        let mut runners = Vec::with_capacity(replicas);
        for (index, backend) in backends.into_iter().enumerate() {
            let model = Model::load_with(backend, checkpoint, weights, |done, total| {
                progress(index * total + done, replicas * total);
            })?;
            weight_bytes += model.weight_bytes();
            // The first one may have quantised and written what the others use.
            weights_cache = weights_cache.or_else(|| model.weights_cache().cloned());
            let mut cache = KvCache::new(model.backend(), layout, pages)?;
            if config.enable_prefix_caching {
                cache = cache.with_prefix_index(PrefixIndex::new(prefixes));
            }
            runners.push(ModelRunner::new(model, cache));
        }
        let engine = Engine::start_replicas("tinyserve-engine", runners, scheduling)?;
        Ok((engine, weight_bytes, weights_cache))
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
        self.memory.max_sequence_length
    }

    /// Where the memory of the process goes, as planned before the model was loaded.
    #[must_use]
    pub fn memory(&self) -> &PlannedMemory {
        &self.memory
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

    /// The model's chat template; `None` when it has none.
    ///
    /// # Errors
    /// When it has one that cannot be used.
    pub fn chat_template(&self) -> Result<Option<&ChatTemplate>, TinyServeError> {
        let template = self.chat_template.as_ref().map_err(Clone::clone)?;
        Ok(template.as_ref())
    }

    /// The scheduler's engine, for callers that want its events, sessions and counters.
    #[must_use]
    pub fn engine(&self) -> &Engine {
        &self.engine
    }

    /// The plugins: registers more, switches them, tells what they did.
    #[must_use]
    pub fn plugins(&self) -> &PluginManager {
        &self.plugins
    }

    /// Registers a plugin, enabled, for requests from now on.
    ///
    /// # Errors
    /// When there is one of this name.
    pub fn register_plugin(
        &self,
        name: impl Into<String>,
        plugin: impl Plugin + 'static,
    ) -> Result<(), TinyServeError> {
        Ok(self.plugins.register(name, plugin)?)
    }

    /// Answers a request.
    ///
    /// # Errors
    /// When the prompt is empty or longer than the context, a setting is out of its range, or the
    /// model fails. Other requests are not affected.
    pub fn serve(&self, request: TinyServeRequest) -> Result<TinyServeResponse, TinyServeError> {
        self.serve_stream(request, |_| ControlFlow::Continue(()))
    }

    /// Answers a request and tells `on_event` what happens; `Break` ends it early. What had been
    /// generated until the engine heard of that is told, too.
    ///
    /// # Errors
    /// As [`Self::serve`].
    pub fn serve_stream(
        &self,
        request: TinyServeRequest,
        mut on_event: impl FnMut(StreamEvent) -> ControlFlow<()>,
    ) -> Result<TinyServeResponse, TinyServeError> {
        let request_id = request.request_id.clone();
        let events = self.submit(request)?;
        let mut answer = Answer {
            request_id: if request_id.is_empty() { events.id().to_string() } else { request_id },
            ..Answer::default()
        };
        let mut events = events;
        while let Some(event) = events.next() {
            let (event, end) = match event {
                Event::Prefill { done, total } => (StreamEvent::Prefill { done, total }, None),
                Event::Token(token) => (answer.push(token), None),
                Event::Finished(finished) => {
                    let reason = FinishReason::from(&finished);
                    answer.stop_reason = finished.stop_reason.clone().and_then(stop_reason);
                    (answer.rest(&finished.summary), Some((reason, finished.summary)))
                }
                Event::Aborted(summary) => {
                    (answer.rest(&summary), Some((FinishReason::Cancelled, summary)))
                }
                Event::Failed(failure) => return Err(failure.into()),
                Event::Started { .. } | Event::Prompt(_) => continue,
            };
            let empty = matches!(&event, StreamEvent::Rest { text } if text.is_empty());
            if !empty && on_event(event).is_break() {
                events.abort();
            }
            if let Some((reason, summary)) = end {
                return Ok(self.response(answer, reason, &summary));
            }
        }
        // A stream always has a terminal event.
        Err(tinyserve_sched::AdmissionError::Stopped.into())
    }

    /// Submits a request and returns its events at once; dropping them ends it.
    ///
    /// # Errors
    /// When the prompt is empty or longer than the context, a setting is out of its range, or too
    /// many requests wait.
    pub fn submit(&self, request: TinyServeRequest) -> Result<EventStream, TinyServeError> {
        let prompt = match request.prompt {
            Prompt::Tokens(tokens) => tokens,
            Prompt::Text(text) if text.is_empty() => return Err(ModelError::EmptyPrompt.into()),
            Prompt::Text(text) => self.tokenizer()?.encode(&text, true)?,
        };
        let room = self.engine.limits().max_tokens(prompt.len());
        if room == 0 {
            let (tokens, limit) = (prompt.len(), self.max_sequence_length());
            return Err(ModelError::ContextOverflow { tokens, limit }.into());
        }
        // The context may end an answer earlier than the request does.
        let max_tokens = request.max_tokens.min(room);
        Ok(self.engine.submit(Request {
            max_tokens,
            sampling: request.sampling,
            stop: request.stop,
            ignore_eos: request.ignore_eos,
            priority: request.priority,
            session: request.session_id,
            plugins: request.plugins,
            ..Request::new(prompt)
        })?)
    }

    /// Perplexity of `text` in windows of the context that start `stride` tokens apart (half the
    /// context unless given); `progress` is told windows done and windows in all, in tokens.
    ///
    /// # Errors
    /// When the text has fewer than two tokens, the stride is out of range, or the model fails.
    pub fn perplexity(
        &self,
        text: &str,
        stride: Option<usize>,
        mut progress: impl FnMut(usize, usize),
    ) -> Result<Perplexity, TinyServeError> {
        let tokens = self.tokenizer()?.encode(text, true)?;
        let window = self.max_sequence_length();
        let stride = stride.unwrap_or((window / 2).max(1));
        let windows = perplexity_windows(tokens.len(), (window, stride), window)?;
        let total = windows.iter().map(|window| window.text.len()).sum();
        let (mut logprobs, mut computed) = (Vec::new(), 0);
        for PerplexityWindow { text, targets } in windows {
            let events = self.engine.submit(Request {
                max_tokens: 0,
                prompt_logprobs: Some(0),
                ..Request::new(&tokens[text.clone()])
            })?;
            let mut next = text.start;
            for event in events {
                match event {
                    Event::Prompt(told) => {
                        for token in told {
                            logprobs.extend(token.logprob.filter(|_| targets.contains(&next)));
                            next += 1;
                        }
                        progress(computed + next - text.start, total);
                    }
                    Event::Failed(failure) => return Err(failure.into()),
                    _ => {}
                }
            }
            computed += text.len();
        }
        Ok(Perplexity::of(logprobs))
    }

    /// Creates a session, unless it exists; a request creates the session that it names, too.
    ///
    /// # Errors
    /// When the engine has stopped.
    pub fn create_session(&self, session_id: impl Into<String>) -> Result<(), TinyServeError> {
        answered(self.engine.create_session(session_id).wait())
    }

    /// The sessions, by name.
    ///
    /// # Errors
    /// When the engine has stopped.
    pub fn list_sessions(&self) -> Result<Vec<SessionInfo>, TinyServeError> {
        answered(self.engine.list_sessions().wait())
    }

    /// What is known of a session; `None` when there is none of this name.
    ///
    /// # Errors
    /// When the engine has stopped.
    pub fn get_session_info(
        &self,
        session_id: impl Into<String>,
    ) -> Result<Option<SessionInfo>, TinyServeError> {
        answered(self.engine.session_info(session_id).wait())
    }

    /// Deletes a session and gives its pages back; tells whether it existed.
    ///
    /// # Errors
    /// When the engine has stopped.
    pub fn delete_session(&self, session_id: impl Into<String>) -> Result<bool, TinyServeError> {
        answered(self.engine.delete_session(session_id).wait())
    }

    /// Saves what a session keeps between its requests to a file, as far as it fills whole pages;
    /// returns how many tokens that is. The next request of a session that was restored computes
    /// the others.
    ///
    /// The file is the old one or the new one whatever happens; see
    /// [`tinyserve_model::KvCache::save_session`]. Other requests wait while it is written.
    ///
    /// # Errors
    /// When there is no such session, a request of it runs, or the file cannot be written.
    pub fn save_session(
        &self,
        session_id: impl Into<String>,
        path: impl Into<PathBuf>,
    ) -> Result<usize, TinyServeError> {
        let saved = self.engine.save_session(session_id, path, &self.identity);
        Ok(answered(saved.wait())??)
    }

    /// Restores a session from a file, in place of the one of this name, if there is one.
    ///
    /// # Errors
    /// When requests of that session wait or run, too few pages are available, or the file is
    /// damaged or of another model, kv_cache_dtype or page_size. The session is then what it was.
    pub fn restore_session(
        &self,
        session_id: impl Into<String>,
        path: impl Into<PathBuf>,
    ) -> Result<SessionInfo, TinyServeError> {
        let restored = self.engine.restore_session(session_id, path, &self.identity);
        Ok(answered(restored.wait())??)
    }

    /// Totals over the requests that were answered, by their published names;
    /// [`Self::engine`]'s own counters say more.
    #[must_use]
    pub fn get_stats(&self) -> Stats {
        let stats = self.engine.stats();
        let answered = stats.finished_stop + stats.finished_length;
        let bytes_per_page = self.engine.limits().bytes_per_page as f64;
        let pages = stats.finished_pages as f64 / answered.max(1) as f64;
        let memory = self.weight_bytes as f64 + pages * bytes_per_page;
        Stats {
            total_requests: answered,
            total_tokens: stats.generation_tokens,
            avg_latency_ms: stats.e2e.mean().unwrap_or(0.0) * 1e3,
            avg_memory_gb: if answered > 0 { memory / 1e9 } else { 0.0 },
            // No measurement means that no step left a page out, so nothing was missed.
            kv_hit_rate: stats.recall.unwrap_or(1.0),
        }
    }

    /// One step towards the targets of the settings: a changed copy of them, with reasons. What
    /// `measured` leaves out is taken from the counters.
    #[must_use]
    pub fn get_optimized_config(&self, measured: Measured) -> Optimized {
        let stats = self.engine.stats();
        let per_token = stats.tpot.mean().map(|seconds| seconds * 1e3);
        let pages = (stats.pages_used + stats.pages_idle) as f64;
        let pages = pages * self.engine.limits().bytes_per_page as f64;
        let measured = Measured {
            latency_ms: measured.latency_ms.or(per_token),
            memory_gb: measured.memory_gb.or(Some((self.weight_bytes as f64 + pages) / 1e9)),
        };
        self.config.optimized(measured, self.stored)
    }

    fn response(
        &self,
        answer: Answer,
        finish_reason: FinishReason,
        summary: &Summary,
    ) -> TinyServeResponse {
        let (usage, timings) = (&summary.usage, &summary.timings);
        let stats = &summary.kv.decode;
        let bytes_resident = summary.kv.pages * self.engine.limits().bytes_per_page;
        let milliseconds = |duration: Duration| duration.as_secs_f64() * 1e3;
        let computed = usage.prompt_tokens - usage.cached_tokens;
        let steps = answer.tokens.len().saturating_sub(1);
        TinyServeResponse {
            request_id: answer.request_id,
            generated_text: answer.text,
            tokens: answer.tokens,
            logprobs: answer.logprobs,
            prompt_tokens: usage.prompt_tokens,
            cached_tokens: usage.cached_tokens,
            finish_reason,
            stop_reason: answer.stop_reason,
            latency_ms: milliseconds(timings.e2e),
            memory_usage_gb: (self.weight_bytes + bytes_resident) as f64 / 1e9,
            // No measurement means that no step left a page out, so nothing was missed.
            kv_cache_hit_rate: stats.recall().unwrap_or(1.0),
            timings: Timings {
                queue_ms: milliseconds(timings.queued),
                prefill_ms: milliseconds(timings.prefill),
                prefill_tok_s: computed as f64 / timings.prefill.as_secs_f64(),
                ttft_ms: milliseconds(timings.ttft.unwrap_or_default()),
                decode_ms: milliseconds(timings.decode),
                decode_tok_s: (steps > 0).then(|| steps as f64 / timings.decode.as_secs_f64()),
            },
            kv: KvUsage {
                pages: summary.kv.pages,
                bytes_resident,
                bytes_read: stats.bytes_read,
                bytes_dense: stats.bytes_dense,
                bytes_read_ratio: stats.bytes_ratio(),
                recall: stats.recall(),
                pruned_tokens: summary.kv.pruned_tokens,
                pruned_bytes: summary.kv.pruned_bytes,
            },
        }
    }
}

/// What an engine answered, or that it has stopped.
fn answered<T>(answer: Option<T>) -> Result<T, TinyServeError> {
    answer.ok_or_else(|| tinyserve_sched::AdmissionError::Stopped.into())
}

/// An answer while it grows.
#[derive(Default)]
struct Answer {
    request_id: String,
    text: String,
    tokens: Vec<u32>,
    logprobs: Vec<f32>,
    stop_reason: Option<String>,
}

impl Answer {
    fn push(&mut self, token: Token) -> StreamEvent {
        self.text.push_str(&token.text);
        self.tokens.push(token.id);
        self.logprobs.push(token.logprob);
        StreamEvent::Token { id: token.id, logprob: token.logprob, text: token.text }
    }

    fn rest(&mut self, summary: &Summary) -> StreamEvent {
        self.text.push_str(&summary.rest);
        StreamEvent::Rest { text: summary.rest.clone() }
    }
}
