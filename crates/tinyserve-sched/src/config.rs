//! Settings of an engine.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::time::Duration;

use tinyserve_model::Tokenizer;
use tinyserve_plugins::PluginManager;

use crate::{Adaptive, AdmissionError, AttentionChoice, Clock};

/// Settings of an engine. Names are those of flags and configuration files.
#[derive(Debug, Clone)]
pub struct EngineConfig {
    /// Most sequences that run together.
    pub max_num_seqs: usize,
    /// Most tokens of one step, decodes and prefill chunks together; at least `max_num_seqs`.
    pub max_num_batched_tokens: usize,
    /// Most prompt tokens of one request in one step.
    pub attention_chunk_size: usize,
    /// Most tokens of a sequence, prompt included.
    pub max_sequence_length: usize,
    /// Most requests that wait for their first step.
    pub max_num_queued_reqs: Option<usize>,
    /// Most prompt tokens of the requests that wait for their first step.
    pub max_num_queued_tokens: Option<usize>,
    /// Waiting so long counts as much as one step of priority.
    ///
    /// So a request of priority `p` is overtaken only by requests of priority `q < p` that arrive
    /// less than `(p − q) · priority_ageing` after it.
    pub priority_ageing: Duration,
    /// A session without a request for so long is deleted.
    pub session_timeout: Duration,
    /// Measure the recall of page selection at every so many decode steps, and at each request's
    /// first; 0 never does. A measured step also reads the keys that the selection left out, so
    /// one step in 16 costs about a sixteenth of what selection saves. Reuse is measured then,
    /// too: it costs copying the page lists of that step and the next.
    pub recall_interval: usize,
    /// Which pages decode steps read unless a request says otherwise.
    pub attention: AttentionChoice,
    /// Lets the budget of `attention`, which must be a policy, follow a latency.
    pub adaptive: Option<Adaptive>,
    /// The model's end-of-sequence tokens.
    pub eos: Vec<u32>,
    /// Turns tokens into text; without one there is no text, and stop texts are refused.
    pub tokenizer: Option<Tokenizer>,
    /// What steers how requests decode; the engine takes a handle, and who keeps another can
    /// register plugins, switch them and look at their statistics meanwhile.
    pub plugins: PluginManager,
    /// What each engine's thread does first.
    pub on_start: OnStart,
    /// Where the time comes from.
    pub clock: Clock,
    /// The number of the next request; clones of a configuration share it, so that replicas number
    /// their requests together.
    pub next_id: Arc<AtomicU64>,
}

/// Called on the thread of each replica, with its number, before it takes a request: a thread may
/// have to be placed or named.
#[derive(Clone, Default)]
pub struct OnStart(Option<Arc<dyn Fn(usize) + Send + Sync>>);

impl OnStart {
    /// Calls `start` with the number of each replica.
    #[must_use]
    pub fn new(start: impl Fn(usize) + Send + Sync + 'static) -> Self {
        Self(Some(Arc::new(start)))
    }

    pub(crate) fn call(&self, replica: usize) {
        if let Some(start) = &self.0 {
            start(replica);
        }
    }
}

impl fmt::Debug for OnStart {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(if self.0.is_some() { "OnStart(_)" } else { "OnStart(nothing)" })
    }
}

impl Default for EngineConfig {
    fn default() -> Self {
        Self {
            max_num_seqs: 16,
            max_num_batched_tokens: 512,
            attention_chunk_size: 256,
            max_sequence_length: 8192,
            max_num_queued_reqs: None,
            max_num_queued_tokens: None,
            priority_ageing: Duration::from_secs(10),
            session_timeout: Duration::from_secs(300),
            recall_interval: 16,
            attention: AttentionChoice::Dense,
            adaptive: None,
            eos: Vec::new(),
            tokenizer: None,
            plugins: PluginManager::new(),
            on_start: OnStart::default(),
            clock: Clock::system(),
            next_id: Arc::new(AtomicU64::new(1)),
        }
    }
}

impl EngineConfig {
    /// Checks every value.
    ///
    /// # Errors
    /// [`AdmissionError::Setting`] naming the first value that is out of its range.
    pub fn check(&self) -> Result<(), AdmissionError> {
        let at_least_one = [
            ("max_num_seqs", self.max_num_seqs),
            ("attention_chunk_size", self.attention_chunk_size),
            ("max_sequence_length", self.max_sequence_length),
        ];
        let zero = at_least_one.iter().find(|(_, value)| *value == 0);
        if let Some((name, _)) = zero {
            return Err(setting(name, 0, "at least 1"));
        }
        if self.max_num_batched_tokens < self.max_num_seqs {
            let expected = format!(
                "at least {}, the value of max_num_seqs: each sequence decodes one token in a step",
                self.max_num_seqs
            );
            return Err(setting("max_num_batched_tokens", self.max_num_batched_tokens, &expected));
        }
        let Some(adaptive) = &self.adaptive else { return Ok(()) };
        if !matches!(self.attention, AttentionChoice::Policy(_)) {
            let expected = "false where no policy selects pages: there is no budget to move";
            return Err(setting("adaptive", true, expected));
        }
        adaptive.check()
    }
}

/// A setting that is out of its range.
#[allow(clippy::needless_pass_by_value)]
pub(crate) fn setting(
    name: &'static str,
    found: impl fmt::Display,
    expected: &str,
) -> AdmissionError {
    AdmissionError::Setting { name, found: found.to_string(), expected: expected.to_owned() }
}
