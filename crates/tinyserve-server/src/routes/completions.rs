//! `POST /v1/completions`.

use super::generate::{Asked, Envelope, Prepared, room, truncate};
use crate::error::ApiError;
use crate::output::{CompletionOutput, Form};
use crate::request::{CompletionRequest, Prompt};
use crate::state::{Ready, Shared};

/// Makes of a body what is submitted, and what it is answered with.
pub(super) fn prepare(
    app: &Shared,
    ready: &Ready,
    envelope: &Envelope,
    json: &[u8],
) -> Result<Prepared<CompletionOutput>, ApiError> {
    let CompletionRequest { prompts, max_tokens, logprobs, echo, add_special_tokens, settings } =
        CompletionRequest::parse(json, &ready.limits)?;
    let header = envelope.header(app, "cmpl", &settings)?;
    let form = Form::of(&settings);
    let mut output = CompletionOutput::new(header, ready.texts(), form, logprobs.is_some());
    let (stream, n, most) = (settings.stream, settings.n, settings.truncate_prompt_tokens);
    let skip_special_tokens = settings.skip_special_tokens;
    let asked = Asked::new(app, envelope, settings);
    let mut submissions = Vec::with_capacity(prompts.len() * n);
    for prompt in prompts {
        let (mut tokens, text) = match prompt {
            Prompt::Text(text) => (ready.encode(&text, add_special_tokens)?, Some(text)),
            Prompt::Tokens(tokens) => (known(tokens, ready.limits.vocab)?, None),
        };
        if let Some(text) = &text {
            app.log.prompt(&envelope.id, text);
        }
        let whole = tokens.len();
        truncate(&mut tokens, most);
        let max_tokens = room(tokens.len(), Some(max_tokens), ready.limits.context, "prompt")?;
        let echo_text = match text {
            _ if !echo => None,
            Some(text) if tokens.len() == whole => Some(text),
            _ => Some(ready.decode(&tokens, skip_special_tokens)?),
        };
        output.count_prompt(tokens.len());
        (0..n).for_each(|_| output.add_choice(&tokens, echo_text.clone()));
        let prompt_logprobs = logprobs.filter(|_| echo);
        submissions.extend(asked.submissions(&tokens, max_tokens, logprobs, prompt_logprobs));
    }
    Ok(Prepared { output, submissions, stream })
}

/// Token ids that the model knows.
fn known(tokens: Vec<u32>, vocab: usize) -> Result<Vec<u32>, ApiError> {
    match tokens.iter().find(|&&id| id as usize >= vocab) {
        None => Ok(tokens),
        Some(id) => Err(ApiError::field(
            "prompt",
            format!("prompt holds the token {id}, expected ids below {vocab}"),
        )),
    }
}
