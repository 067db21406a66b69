//! What goes into an engine and what comes out.

use serde::Serialize;
use tinyserve_model::SamplingParams;
use tinyserve_sched::{Finished, StopReason};

/// A prompt as text or as token ids.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Prompt {
    /// Text, tokenised with the model's special tokens.
    Text(String),
    /// Token ids, taken as they are.
    Tokens(Vec<u32>),
}

impl From<&str> for Prompt {
    fn from(text: &str) -> Self {
        Self::Text(text.to_owned())
    }
}

impl From<String> for Prompt {
    fn from(text: String) -> Self {
        Self::Text(text)
    }
}

impl From<Vec<u32>> for Prompt {
    fn from(tokens: Vec<u32>) -> Self {
        Self::Tokens(tokens)
    }
}

/// One request.
#[derive(Debug, Clone, PartialEq)]
pub struct TinyServeRequest {
    /// What to continue.
    pub prompt: Prompt,
    /// Most tokens to generate.
    pub max_tokens: usize,
    /// How tokens are drawn.
    pub sampling: SamplingParams,
    /// Texts that end the generation; they are not part of the result.
    pub stop: Vec<String>,
    /// Whether to go on after an end-of-sequence token.
    pub ignore_eos: bool,
    /// Lower runs first; ties by arrival.
    pub priority: i32,
    /// The session that the request belongs to: its pages stay for the session's next request, which
    /// computes only what is new.
    pub session_id: Option<String>,
    /// Plugins that this request uses, or does not, whatever the engine does.
    pub plugins: Vec<(String, bool)>,
    /// The caller's name for the request; one is made up when it is empty.
    pub request_id: String,
}

impl TinyServeRequest {
    /// A request with the default settings: 512 tokens, temperature 0.7, top-p 0.9.
    #[must_use]
    pub fn new(prompt: impl Into<Prompt>) -> Self {
        Self {
            prompt: prompt.into(),
            max_tokens: 512,
            sampling: SamplingParams::default(),
            stop: Vec::new(),
            ignore_eos: false,
            priority: 0,
            session_id: None,
            plugins: Vec::new(),
            request_id: String::new(),
        }
    }

    /// Sets the most tokens to generate.
    #[must_use]
    pub fn max_tokens(mut self, max_tokens: usize) -> Self {
        self.max_tokens = max_tokens;
        self
    }

    /// Sets the temperature; 0 takes the most likely token.
    #[must_use]
    pub fn temperature(mut self, temperature: f32) -> Self {
        self.sampling.temperature = temperature;
        self
    }

    /// Sets the probability mass that is drawn from.
    #[must_use]
    pub fn top_p(mut self, top_p: f32) -> Self {
        self.sampling.top_p = top_p;
        self
    }

    /// Sets the seed of the draws.
    #[must_use]
    pub fn seed(mut self, seed: u64) -> Self {
        self.sampling.seed = Some(seed);
        self
    }

    /// Adds a text that ends the generation.
    #[must_use]
    pub fn stop(mut self, stop: impl Into<String>) -> Self {
        self.stop.push(stop.into());
        self
    }

    /// Goes on after an end-of-sequence token, or does not.
    #[must_use]
    pub fn ignore_eos(mut self, ignore_eos: bool) -> Self {
        self.ignore_eos = ignore_eos;
        self
    }

    /// Sets the priority; lower runs first.
    #[must_use]
    pub fn priority(mut self, priority: i32) -> Self {
        self.priority = priority;
        self
    }

    /// Puts the request into a session.
    #[must_use]
    pub fn session(mut self, session_id: impl Into<String>) -> Self {
        self.session_id = Some(session_id.into());
        self
    }

    /// Uses a plugin for this request, or does not, whatever the engine does.
    #[must_use]
    pub fn plugin(mut self, name: impl Into<String>, enabled: bool) -> Self {
        self.plugins.push((name.into(), enabled));
        self
    }

    /// Names the request.
    #[must_use]
    pub fn request_id(mut self, request_id: impl Into<String>) -> Self {
        self.request_id = request_id.into();
        self
    }
}

/// Why a request ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum FinishReason {
    /// A stop token, a stop text or a plugin.
    Stop,
    /// The token limit or the context's end.
    Length,
    /// The caller ended it.
    Cancelled,
}

impl FinishReason {
    /// The name as JSON spells it.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Stop => "stop",
            Self::Length => "length",
            Self::Cancelled => "cancelled",
        }
    }
}

impl From<&Finished> for FinishReason {
    fn from(finished: &Finished) -> Self {
        match finished.reason {
            tinyserve_sched::FinishReason::Stop => Self::Stop,
            tinyserve_sched::FinishReason::Length => Self::Length,
        }
    }
}

/// What stopped an answer, in a word; see [`TinyServeResponse::stop_reason`].
pub(crate) fn stop_reason(reason: StopReason) -> Option<String> {
    match reason {
        StopReason::EndOfSequence(_) => None,
        StopReason::Token(id) => Some(id.to_string()),
        StopReason::Text(text) => Some(text),
        StopReason::Plugin { reason, .. } => Some(reason),
    }
}

/// What happens while a request runs.
#[derive(Debug, Clone, PartialEq)]
pub enum StreamEvent {
    /// Part of the prompt is in the cache.
    Prefill {
        /// Prompt tokens in the cache.
        done: usize,
        /// Prompt tokens.
        total: usize,
    },
    /// A token was drawn. Its text may be empty while a character or a stop text is incomplete.
    Token {
        /// The token.
        id: u32,
        /// Natural logarithm of its probability.
        logprob: f32,
        /// Text that is new with it.
        text: String,
    },
    /// Text that was held back until the end.
    Rest {
        /// The text.
        text: String,
    },
}

/// How long the parts of a request took.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize)]
pub struct Timings {
    /// Milliseconds in the queue.
    pub queue_ms: f64,
    /// Milliseconds to compute the prompt.
    pub prefill_ms: f64,
    /// Prompt tokens that were computed per second.
    pub prefill_tok_s: f64,
    /// Milliseconds to the first token.
    pub ttft_ms: f64,
    /// Milliseconds of the decode steps.
    pub decode_ms: f64,
    /// Tokens per second of the decode steps, the first token excluded; null without a step.
    pub decode_tok_s: Option<f64>,
}

/// What a request held and read in the cache.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize)]
pub struct KvUsage {
    /// Pages that it held at its end.
    pub pages: usize,
    /// Bytes of those pages, boxes included.
    pub bytes_resident: usize,
    /// Bytes that its decode steps read.
    pub bytes_read: u64,
    /// Bytes that dense decode steps would have read.
    pub bytes_dense: u64,
    /// The former over the latter; null without a decode step.
    pub bytes_read_ratio: Option<f64>,
    /// Share of the dense attention mass that the selected pages held, measured on sampled steps;
    /// null when no step selected.
    pub recall: Option<f64>,
    /// Share of the selected pages that the step before had selected, too, measured on sampled
    /// steps; null when no two steps in a row that select were compared.
    pub reuse: Option<f64>,
    /// Tokens that plugins removed from its cache.
    pub pruned_tokens: u64,
    /// Bytes of the pages that it gave back then.
    pub pruned_bytes: u64,
}

/// A finished request.
#[derive(Debug, Clone, PartialEq)]
pub struct TinyServeResponse {
    /// The request's name.
    pub request_id: String,
    /// The new text, without the prompt.
    pub generated_text: String,
    /// The new tokens; an end-of-sequence token is the last of them when it ended the text.
    pub tokens: Vec<u32>,
    /// Natural logarithm of each token's probability.
    pub logprobs: Vec<f32>,
    /// Tokens of the prompt.
    pub prompt_tokens: usize,
    /// Prompt tokens whose keys and values were in the cache already.
    pub cached_tokens: usize,
    /// Why it ended.
    pub finish_reason: FinishReason,
    /// What stopped it: a stop text, a stop token's number, or a plugin's reason. `None` for an
    /// end-of-sequence token, and when nothing stopped it.
    pub stop_reason: Option<String>,
    /// Milliseconds from submission to the last token.
    pub latency_ms: f64,
    /// Weights and the request's pages, in units of 10⁹ bytes.
    pub memory_usage_gb: f64,
    /// Measured recall of the selected pages; 1 when every step read every page.
    pub kv_cache_hit_rate: f64,
    /// How long its parts took.
    pub timings: Timings,
    /// What it held and read in the cache.
    pub kv: KvUsage,
}

/// What attention did, in prompts and answers.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize)]
pub struct AttentionStats {
    /// Attentions of a layer, over all sequences of a step.
    pub total_attention_calls: u64,
    /// Mean time of one of them, page selection included, milliseconds, taken in one of 13 steps;
    /// steps that measured recall are left out. `None` before the first, and on CUDA devices, which
    /// compute meanwhile.
    pub avg_attention_time_ms: Option<f64>,
    /// Of all, those that left pages out.
    pub total_sparse_operations: u64,
    /// Bytes of keys, values and boxes that decode steps read.
    pub bytes_read: u64,
    /// Bytes that dense decode steps would have read.
    pub bytes_dense: u64,
    /// Mean measured recall of the selected pages; `None` while no step that selects was measured.
    pub recall: Option<f64>,
}

/// Totals over the requests that an engine has answered.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize)]
pub struct Stats {
    /// Answered requests.
    pub total_requests: u64,
    /// Generated tokens.
    pub total_tokens: u64,
    /// Mean latency, milliseconds.
    pub avg_latency_ms: f64,
    /// Mean memory of the weights and a request's pages, 10⁹ bytes.
    pub avg_memory_gb: f64,
    /// Mean measured recall of the selected pages; 1 when every step read every page.
    pub kv_hit_rate: f64,
}
