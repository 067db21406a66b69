//! `POST /tokenize` and `POST /detokenize`.

use super::Limits;
use super::body::Body;
use super::chat::{Conversation, TEMPLATE_FIELDS};
use crate::error::ApiError;

/// What is tokenised.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Tokenized {
    /// A text.
    Text { text: String, add_special_tokens: bool },
    /// A conversation, through the chat template.
    Chat { conversation: Conversation, add_special_tokens: bool },
}

/// A request to `/tokenize`.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct TokenizeRequest {
    pub(crate) model: Option<String>,
    pub(crate) input: Tokenized,
    pub(crate) return_token_strs: bool,
}

impl TokenizeRequest {
    /// Reads and checks a body.
    pub(crate) fn parse(json: &[u8]) -> Result<Self, ApiError> {
        let known = ["model", "prompt", "add_special_tokens", "return_token_strs"];
        let body = Body::parse(json, &[&known, TEMPLATE_FIELDS].concat())?;
        let input = match (body.has("prompt"), body.has("messages")) {
            (true, false) => Tokenized::Text {
                text: body.value("prompt", "a text")?.unwrap_or_default(),
                add_special_tokens: body.flag("add_special_tokens", true)?,
            },
            (false, true) => Tokenized::Chat {
                conversation: Conversation::read(&body)?,
                add_special_tokens: body.flag("add_special_tokens", false)?,
            },
            _ => return Err(ApiError::field("prompt", "expected either prompt or messages")),
        };
        Ok(Self {
            model: body.value("model", "a text")?,
            input,
            return_token_strs: body.flag("return_token_strs", false)?,
        })
    }
}

/// A request to `/detokenize`.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct DetokenizeRequest {
    pub(crate) model: Option<String>,
    pub(crate) tokens: Vec<u32>,
}

impl DetokenizeRequest {
    /// Reads and checks a body.
    pub(crate) fn parse(json: &[u8], limits: &Limits) -> Result<Self, ApiError> {
        let body = Body::parse(json, &["model", "tokens"])?;
        let expected = format!("a list of token ids below {}", limits.vocab);
        let tokens = body.checked("tokens", &expected, |tokens: &Vec<u32>| {
            tokens.iter().all(|&id| (id as usize) < limits.vocab)
        })?;
        Ok(Self {
            model: body.value("model", "a text")?,
            tokens: tokens.ok_or_else(|| body.error("tokens", &expected))?,
        })
    }
}
