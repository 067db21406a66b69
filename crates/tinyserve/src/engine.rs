//! The engine: a model, its cache and its tokenizer behind one handle.

mod builder;

use std::ops::ControlFlow;
use std::path::PathBuf;
use std::time::Duration;

use tinyserve_kernels::DType;
use tinyserve_model::{
    CacheOutcome, ChatTemplate, ModelConfig, ModelError, Perplexity, PerplexityWindow, Tokenizer,
    perplexity_windows,
};
use tinyserve_plugins::{Plugin, PluginManager};
use tinyserve_sched::{Engine, Event, EventStream, Request, SessionInfo, Summary, Token};

pub use builder::TinyServeBuilder;

use crate::request::stop_reason;
use crate::{
    AttentionStats, FinishReason, KvUsage, Measured, Optimized, PlannedMemory, Prompt, Stats,
    StreamEvent, Timings, TinyServeConfig, TinyServeError, TinyServeRequest, TinyServeResponse,
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
    threads: usize,
    backend_name: String,
    plugins: PluginManager,
    engine: Engine,
}

impl std::fmt::Debug for TinyServe {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("TinyServe").field("config", &self.config).finish_non_exhaustive()
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

    /// Threads of the CPU that a replica has.
    #[must_use]
    pub fn threads(&self) -> usize {
        self.threads
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
    /// context unless given); `progress` is told windows done and windows in all, in tokens, and
    /// returns whether to go on: when it does not, what was predicted until then counts.
    ///
    /// # Errors
    /// When the text has fewer than two tokens, the stride is out of range, or the model fails.
    pub fn perplexity(
        &self,
        text: &str,
        stride: Option<usize>,
        mut progress: impl FnMut(usize, usize) -> bool,
    ) -> Result<Perplexity, TinyServeError> {
        let tokens = self.tokenizer()?.encode(text, true)?;
        let window = self.max_sequence_length();
        let stride = stride.unwrap_or((window / 2).max(1));
        let windows = perplexity_windows(tokens.len(), (window, stride), window)?;
        let total = windows.iter().map(|window| window.text.len()).sum();
        let (mut logprobs, mut computed) = (Vec::new(), 0);
        'windows: for PerplexityWindow { text, targets } in windows {
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
                        if !progress(computed + next - text.start, total) {
                            // Nobody listens any more, which ends the window's request.
                            break 'windows;
                        }
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

    /// What attention did, by its published names.
    #[must_use]
    pub fn get_attention_stats(&self) -> AttentionStats {
        let stats = self.engine.stats();
        AttentionStats {
            total_attention_calls: stats.attention_calls,
            avg_attention_time_ms: stats.attention_time().map(|time| time.as_secs_f64() * 1e3),
            total_sparse_operations: stats.sparse_operations,
            bytes_read: stats.bytes_read,
            bytes_dense: stats.bytes_dense,
            recall: stats.recall,
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
                reuse: stats.reuse.share(),
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
