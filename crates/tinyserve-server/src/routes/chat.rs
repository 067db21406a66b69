//! `POST /v1/chat/completions`.

use super::generate::{Asked, Envelope, Prepared, room, truncate};
use crate::error::ApiError;
use crate::output::{ChatOutput, Form};
use crate::request::ChatRequest;
use crate::state::{Ready, Shared};

/// Makes of a body what is submitted, and what it is answered with.
pub(super) fn prepare(
    app: &Shared,
    ready: &Ready,
    envelope: &Envelope,
    json: &[u8],
) -> Result<Prepared<ChatOutput>, ApiError> {
    let ChatRequest { conversation, max_tokens, logprobs, add_special_tokens, settings } =
        ChatRequest::parse(json, &ready.limits)?;
    let header = envelope.header(app, "chatcmpl", &settings)?;
    let text = ready.render(&conversation)?;
    app.log.prompt(&envelope.id, &text);
    let mut tokens =
        ready.encode(&text, add_special_tokens).map_err(|error| error.about("messages"))?;
    truncate(&mut tokens, settings.truncate_prompt_tokens);
    let max_tokens = room(tokens.len(), max_tokens, ready.limits.context, "messages")?;
    let (stream, form, n) = (settings.stream, Form::of(&settings), settings.n);
    let asked = Asked::new(app, envelope, settings);
    let submissions = asked.submissions(&tokens, max_tokens, logprobs, None).collect();
    let output = ChatOutput::new(header, ready.texts(), form, logprobs, (tokens, n));
    Ok(Prepared { output, submissions, stream })
}
