//! Answers as clients read them: whole objects, and chunks of a stream.

mod chat;
mod completion;
mod logprobs;
mod sse;

use serde::Serialize;

pub(crate) use chat::ChatOutput;
pub(crate) use completion::CompletionOutput;
pub(crate) use logprobs::TokenTexts;
pub(crate) use sse::EventStream;

use crate::error::ApiError;
use crate::request::Settings;

/// A token with the natural logarithms of probabilities.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct ScoredToken {
    /// The token.
    pub(crate) id: u32,
    /// Its own; `None` for the first of a prompt, which nothing precedes.
    pub(crate) logprob: Option<f32>,
    /// The most likely tokens in its place, best first.
    pub(crate) top: Vec<(u32, f32)>,
}

/// What happens to one choice of a request.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum ChoiceEvent {
    /// The prompt is read; its tokens, if they were to be told.
    Prompt(Vec<ScoredToken>),
    /// A token was drawn; the text that is complete with it.
    Token { token: ScoredToken, text: String },
    /// The choice is complete.
    End(Ending),
    /// The choice failed.
    Failed(ApiError),
}

/// How a choice ended.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Ending {
    /// Text that was held back until now.
    pub(crate) text: String,
    /// `stop` or `length`.
    pub(crate) finish_reason: &'static str,
    /// The stop string, the stop token's id, or the plugin that ended it.
    pub(crate) stop_reason: Option<StopReason>,
    /// Prompt tokens whose keys and values were there already.
    pub(crate) cached_tokens: usize,
    /// What the engine tells beyond OpenAI's fields.
    pub(crate) detail: Option<serde_json::Value>,
}

/// What ended a text.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(untagged)]
pub(crate) enum StopReason {
    /// A stop string, or the name of a plugin's rule.
    Text(String),
    /// A token of `stop_token_ids`.
    Token(u32),
}

/// Tokens of a request, counted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize)]
pub(crate) struct Usage {
    pub(crate) prompt_tokens: usize,
    pub(crate) completion_tokens: usize,
    pub(crate) total_tokens: usize,
    pub(crate) prompt_tokens_details: PromptDetails,
}

/// Where prompt tokens came from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize)]
pub(crate) struct PromptDetails {
    pub(crate) cached_tokens: usize,
}

impl Usage {
    pub(crate) fn new(
        prompt_tokens: usize,
        completion_tokens: usize,
        cached_tokens: usize,
    ) -> Self {
        Self {
            prompt_tokens,
            completion_tokens,
            total_tokens: prompt_tokens + completion_tokens,
            prompt_tokens_details: PromptDetails { cached_tokens },
        }
    }
}

/// What every object of an answer says.
#[derive(Debug, Clone)]
pub(crate) struct Header {
    /// Such as `cmpl-…`.
    pub(crate) id: String,
    /// Seconds since 1970.
    pub(crate) created: u64,
    /// The name that the model is served by.
    pub(crate) model: String,
}

/// How an answer is written.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Form {
    /// Whether chunks are written; else everything is kept for the end.
    streamed: bool,
    /// Whether every chunk tells the usage.
    continuous_usage: bool,
    /// Whether tokens are told by their ids, too.
    return_token_ids: bool,
}

impl Form {
    /// What a request asks for.
    pub(crate) fn of(settings: &Settings) -> Self {
        Self {
            streamed: settings.stream.is_some(),
            continuous_usage: settings.stream.is_some_and(|stream| stream.continuous_usage_stats),
            return_token_ids: settings.return_token_ids,
        }
    }
}

/// An answer or a chunk of one, around its choices.
#[derive(Serialize)]
struct Object<'a, Choices> {
    id: &'a str,
    object: &'static str,
    created: u64,
    model: &'a str,
    system_fingerprint: &'static str,
    choices: Choices,
    #[serde(skip_serializing_if = "Option::is_none")]
    usage: Option<Usage>,
    #[serde(skip_serializing_if = "Option::is_none")]
    prompt_token_ids: Option<&'a [u32]>,
}

impl Header {
    /// The object of kind `object` with these choices.
    fn object<Choices>(
        &self,
        object: &'static str,
        choices: Choices,
        usage: Option<Usage>,
    ) -> Object<'_, Choices> {
        Object {
            id: &self.id,
            object,
            created: self.created,
            model: &self.model,
            system_fingerprint: FINGERPRINT,
            choices,
            usage,
            prompt_token_ids: None,
        }
    }
}

/// Version of what made an answer.
const FINGERPRINT: &str = concat!("tinyserve-", env!("CARGO_PKG_VERSION"));

/// A kind of answer: it is fed events, and written out whole or in chunks.
pub(crate) trait Output: Send + 'static {
    /// Chunks that come before anything was computed.
    fn begin(&mut self, out: &mut Vec<u8>);

    /// Takes an event of choice `index`, and writes the chunks that it leads to.
    fn event(&mut self, index: usize, event: ChoiceEvent, out: &mut Vec<u8>);

    /// The whole answer, when every choice has ended.
    fn whole(self) -> String;

    /// Tokens so far.
    fn usage(&self) -> Usage;

    /// The chunk that tells the usage.
    fn usage_chunk(&self, out: &mut Vec<u8>);
}

/// Writes `object` as one event of a stream.
pub(crate) fn write_event(object: &impl Serialize, out: &mut Vec<u8>) {
    let start = out.len();
    out.extend_from_slice(b"data: ");
    // Our own types: numbers that JSON does not know become null, and nothing else can fail.
    match serde_json::to_writer(&mut *out, object) {
        Ok(()) => out.extend_from_slice(b"\n\n"),
        Err(_) => out.truncate(start),
    }
}
