//! `POST /v1/completions`.

use super::body::Body;
use super::{Limits, Prompt, Settings, prompt, settings};
use crate::error::ApiError;

/// Fields that only completions have.
const FIELDS: &[&str] = &["prompt", "logprobs", "echo", "suffix", "add_special_tokens"];
/// Tokens that are generated unless the request says how many; OpenAI's default.
const DEFAULT_MAX_TOKENS: usize = 16;

/// A completion request that makes sense by itself.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct CompletionRequest {
    pub(crate) prompts: Vec<Prompt>,
    pub(crate) max_tokens: usize,
    /// How many alternatives are told with each token; `None` tells no probabilities at all.
    pub(crate) logprobs: Option<usize>,
    pub(crate) echo: bool,
    pub(crate) add_special_tokens: bool,
    pub(crate) settings: Settings,
}

impl CompletionRequest {
    /// Reads and checks a body.
    pub(crate) fn parse(json: &[u8], limits: &Limits) -> Result<Self, ApiError> {
        let body = Body::parse(json, &[settings::FIELDS, FIELDS].concat())?;
        if body.get("suffix").is_some_and(|suffix| suffix.get() != "\"\"") {
            return Err(body.unsupported("suffix", ": text is only continued"));
        }
        let settings = Settings::read(&body, limits)?;
        let echo = body.flag("echo", false)?;
        let max_tokens = settings.max_tokens.unwrap_or(DEFAULT_MAX_TOKENS);
        if max_tokens == 0 && !echo {
            return Err(body.error("max_tokens", "at least 1, or 0 together with echo"));
        }
        if settings.min_tokens > max_tokens {
            return Err(body.error("min_tokens", &format!("at most max_tokens, {max_tokens}")));
        }
        Ok(Self {
            prompts: prompt::read(&body, limits.prompts)?,
            max_tokens,
            logprobs: body.size("logprobs", 0, limits.logprobs)?,
            echo,
            add_special_tokens: body.flag("add_special_tokens", true)?,
            settings,
        })
    }
}
