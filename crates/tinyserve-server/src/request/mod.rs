//! Requests as clients write them, checked field by field before anything runs.

mod body;
mod chat;
mod completion;
mod extension;
mod prompt;
mod settings;
mod tokenize;

pub(crate) use body::shown;
pub(crate) use chat::{ChatRequest, Conversation};
pub(crate) use completion::CompletionRequest;
pub(crate) use extension::Extension;
pub(crate) use prompt::Prompt;
pub(crate) use settings::{Settings, StreamSettings, is_name};
pub(crate) use tokenize::{DetokenizeRequest, TokenizeRequest, Tokenized};

/// What a request may ask for at most.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Limits {
    /// Prompts of one request.
    pub(crate) prompts: usize,
    /// Answers to each prompt.
    pub(crate) choices: usize,
    /// Alternatives whose probabilities are told.
    pub(crate) logprobs: usize,
    /// Stop strings.
    pub(crate) stops: usize,
    /// Tokens of a sequence.
    pub(crate) context: usize,
    /// Tokens of the vocabulary.
    pub(crate) vocab: usize,
    /// Whether a request may have a priority.
    pub(crate) priorities: bool,
}
