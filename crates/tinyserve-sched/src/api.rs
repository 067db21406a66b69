//! What callers give to an engine and get from it: every type of the engine API.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use thiserror::Error;
use tinyserve_kernels::{AttendStats, Attention};
use tinyserve_kv::{PageSelector, SelectionPolicy};
use tinyserve_model::{SampledToken, SamplingParams};

/// A request's number: unique in its engine, in the order of submission.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct RequestId(pub u64);

impl fmt::Display for RequestId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "req-{}", self.0)
    }
}

/// Which pages decode steps read. Prompts are read in full.
#[derive(Clone)]
pub enum AttentionChoice {
    /// All of them.
    Dense,
    /// Those that a policy chooses, where the pages live.
    Policy(SelectionPolicy),
    /// Those that a selector of the caller chooses, on the host.
    Custom(Arc<dyn PageSelector>),
}

impl AttentionChoice {
    /// As the kernels take it.
    #[must_use]
    pub fn as_kernel(&self) -> Attention<'_> {
        match self {
            Self::Dense => Attention::Dense,
            Self::Policy(policy) => Attention::Policy(policy),
            Self::Custom(selector) => Attention::Custom(selector.as_ref()),
        }
    }
}

impl fmt::Debug for AttentionChoice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.as_kernel().fmt(f)
    }
}

/// One request: a prompt and how it is continued.
///
/// `n` answers to one prompt are `n` requests.
#[derive(Debug, Clone)]
pub struct Request {
    /// Token ids; at least one.
    pub prompt: Vec<u32>,
    /// Most tokens to generate. 0 only with `prompt_logprobs`: the prompt is scored, nothing more.
    pub max_tokens: usize,
    /// Tokens before which neither a stop token nor a stop text ends the answer.
    pub min_tokens: usize,
    /// How tokens are drawn.
    pub sampling: SamplingParams,
    /// Added to the logits of these tokens, -100 to 100.
    pub logit_bias: Vec<(u32, f32)>,
    /// Texts that end the answer, found across token borders.
    pub stop: Vec<String>,
    /// Whether the stop text that was found belongs to the answer.
    pub include_stop: bool,
    /// Whether special tokens are left out of the text.
    pub skip_special_tokens: bool,
    /// Tokens that end the answer, beside the model's end-of-sequence tokens.
    pub stop_tokens: Vec<u32>,
    /// Whether to go on after an end-of-sequence token.
    pub ignore_eos: bool,
    /// How many of the most likely tokens to tell beside each drawn one.
    pub top_logprobs: usize,
    /// Tells the prompt's log-probabilities, with so many of the most likely tokens beside each.
    /// The whole prompt is computed then, cached or not.
    pub prompt_logprobs: Option<usize>,
    /// Lower runs first; ties by arrival. Waiting counts: see [`crate::EngineConfig::priority_ageing`].
    pub priority: i32,
    /// The session that the request belongs to: its pages stay for the session's next request.
    /// Requests of one session run one after the other, in the order of submission.
    pub session: Option<String>,
    /// Which pages decode steps read; the engine's default unless set.
    pub attention: Option<AttentionChoice>,
    /// Cached pages are shared only among requests of the same salt.
    pub cache_salt: String,
    /// Plugins that this request uses, or does not, whatever the engine does.
    pub plugins: Vec<(String, bool)>,
}

impl Request {
    /// A request with the default settings: 512 tokens, temperature 0.7, top-p 0.9.
    #[must_use]
    pub fn new(prompt: impl Into<Vec<u32>>) -> Self {
        Self {
            prompt: prompt.into(),
            max_tokens: 512,
            min_tokens: 0,
            sampling: SamplingParams::default(),
            logit_bias: Vec::new(),
            stop: Vec::new(),
            include_stop: false,
            skip_special_tokens: true,
            stop_tokens: Vec::new(),
            ignore_eos: false,
            top_logprobs: 0,
            prompt_logprobs: None,
            priority: 0,
            session: None,
            attention: None,
            cache_salt: String::new(),
            plugins: Vec::new(),
        }
    }

    /// Sets the most tokens to generate.
    #[must_use]
    pub fn max_tokens(mut self, max_tokens: usize) -> Self {
        self.max_tokens = max_tokens;
        self
    }

    /// Sets how tokens are drawn.
    #[must_use]
    pub fn sampling(mut self, sampling: SamplingParams) -> Self {
        self.sampling = sampling;
        self
    }

    /// Puts the request into a session.
    #[must_use]
    pub fn session(mut self, session: impl Into<String>) -> Self {
        self.session = Some(session.into());
        self
    }
}

/// Why a request is not taken.
#[derive(Debug, Clone, PartialEq, Error)]
#[non_exhaustive]
pub enum AdmissionError {
    /// There is nothing to continue.
    #[error("the prompt is empty, expected at least one token")]
    EmptyPrompt,
    /// The sequence would be longer than the context.
    #[error(
        "the prompt has {prompt} tokens and {max_tokens} more are asked for, expected at most \
         {limit} together, the longest sequence"
    )]
    TooLong {
        /// Tokens of the prompt.
        prompt: usize,
        /// Tokens to generate.
        max_tokens: usize,
        /// The longest sequence.
        limit: usize,
    },
    /// The sequence would need more pages than there are.
    #[error(
        "the request needs {needed} pages of {page_size} tokens, and the cache has {pages}: ask \
         for fewer tokens or give the cache more memory"
    )]
    NeverFits {
        /// Pages that the longest answer needs.
        needed: usize,
        /// Pages of the cache.
        pages: usize,
        /// Tokens of one page.
        page_size: usize,
    },
    /// Too many requests wait already; trying again later may succeed.
    #[error("{queued} {what} wait already, at most {limit} may")]
    QueueFull {
        /// `requests` or `prompt tokens`.
        what: &'static str,
        /// How many wait.
        queued: usize,
        /// How many may.
        limit: usize,
    },
    /// The engine takes no more requests.
    #[error("the engine is shutting down")]
    ShuttingDown,
    /// The engine's thread has ended.
    #[error("the engine has stopped")]
    Stopped,
    /// A setting is out of its range.
    #[error("{name} is {found}, expected {expected}")]
    Setting {
        /// The setting.
        name: &'static str,
        /// The value that was found.
        found: String,
        /// The values that are allowed, in words.
        expected: String,
    },
}

/// What happens to a request: any number of the first four, then exactly one of the last three.
#[derive(Debug, Clone, PartialEq)]
pub enum Event {
    /// It left the queue: its first step runs now. Told once, even if it is preempted later.
    Started {
        /// Prompt tokens that were in the cache already.
        cached_tokens: usize,
        /// How long it waited.
        queued: Duration,
    },
    /// Part of the prompt is in the cache.
    Prefill {
        /// Tokens in the cache.
        done: usize,
        /// Tokens to be computed before the next token is drawn.
        total: usize,
    },
    /// Log-probabilities of the next tokens of the prompt, in order.
    Prompt(Vec<PromptToken>),
    /// A token was drawn.
    Token(Token),
    /// The answer is complete.
    Finished(Finished),
    /// The caller ended it, or the engine shut down.
    Aborted(Summary),
    /// It failed; no other request is affected.
    Failed(Failure),
}

impl Event {
    /// Whether nothing follows.
    #[must_use]
    pub fn is_terminal(&self) -> bool {
        matches!(self, Self::Finished(_) | Self::Aborted(_) | Self::Failed(_))
    }
}

/// A drawn token.
#[derive(Debug, Clone, PartialEq)]
pub struct Token {
    /// The token.
    pub id: u32,
    /// Natural logarithm of its probability under the model, before any sampling setting.
    pub logprob: f32,
    /// The most likely tokens, best first, as many as were asked for.
    pub top_logprobs: Vec<SampledToken>,
    /// Text that is complete with it. Often empty: while a character or a stop text is
    /// incomplete, for tokens that are no text, and always without a tokenizer.
    pub text: String,
}

/// A prompt's token and how likely it was.
#[derive(Debug, Clone, PartialEq)]
pub struct PromptToken {
    /// The token.
    pub id: u32,
    /// Natural logarithm of its probability; `None` for the first, which nothing predicts.
    pub logprob: Option<f32>,
    /// The tokens that were most likely in its place, best first, as many as were asked for.
    pub top_logprobs: Vec<SampledToken>,
}

/// Why an answer is complete.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum FinishReason {
    /// A stop token, a stop text or a plugin; [`Finished::stop_reason`] says which.
    Stop,
    /// `max_tokens`.
    Length,
}

impl FinishReason {
    /// The name as JSON spells it.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Stop => "stop",
            Self::Length => "length",
        }
    }
}

/// What stopped an answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum StopReason {
    /// An end-of-sequence token of the model.
    EndOfSequence(u32),
    /// One of the request's stop tokens.
    Token(u32),
    /// One of the request's stop texts.
    Text(String),
    /// A plugin.
    Plugin {
        /// Its name.
        plugin: String,
        /// Why, as the plugin says.
        reason: String,
    },
}

/// A complete answer.
#[derive(Debug, Clone, PartialEq)]
pub struct Finished {
    /// Why it is complete.
    pub reason: FinishReason,
    /// What stopped it, if something did.
    pub stop_reason: Option<StopReason>,
    /// Counts and times.
    pub summary: Summary,
}

/// What a request was and cost.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Summary {
    /// Text that was held back until the end; it belongs after the last token's.
    pub rest: String,
    /// Tokens.
    pub usage: Usage,
    /// Times.
    pub timings: Timings,
    /// The cache.
    pub kv: KvUse,
}

/// Tokens of a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Usage {
    /// Tokens of the prompt.
    pub prompt_tokens: usize,
    /// Prompt tokens whose keys and values were in the cache already.
    pub cached_tokens: usize,
    /// Generated tokens, a stop token included.
    pub completion_tokens: usize,
}

/// How long the parts of a request took.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Timings {
    /// From submission to the first step.
    pub queued: Duration,
    /// From the first step to the end of the prompt.
    pub prefill: Duration,
    /// From submission to the first token.
    pub ttft: Option<Duration>,
    /// From the end of the prompt to the last token.
    pub decode: Duration,
    /// From submission to the end.
    pub e2e: Duration,
    /// Times that its pages were taken away and computed again.
    pub preemptions: u32,
}

/// What a request held and read in the cache.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct KvUse {
    /// Pages that it held at its end.
    pub pages: usize,
    /// Decode steps.
    pub decode_steps: u64,
    /// What its decode steps read.
    pub decode: AttendStats,
    /// Tokens that plugins had removed from it.
    pub pruned_tokens: u64,
    /// Bytes of the pages that it gave back then.
    pub pruned_bytes: u64,
}

/// Why a request failed.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[error("{sentence}")]
pub struct Failure {
    /// Of what kind.
    pub kind: FailureKind,
    /// What happened, in a sentence.
    pub sentence: String,
}

/// Kinds of failure.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum FailureKind {
    /// The model or a page selector refused the step, or computed what is no number.
    Model,
    /// The tokenizer could not decode what was generated.
    Tokenizer,
    /// A plugin failed, or asked for what cannot be done.
    Plugin,
    /// A bug: the step panicked.
    Panic,
    /// The engine ended before the request did.
    EngineStopped,
}
