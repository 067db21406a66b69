//! `POST /v1/chat/completions`.

use axum::Extension;
use axum::extract::{Request, State};
use axum::response::Response;

use super::generate::{Asked, Envelope, Prepared, respond, room, truncate};
use crate::error::ApiError;
use crate::middleware::RequestId;
use crate::output::{ChatOutput, Form};
use crate::request::ChatRequest;
use crate::state::{App, Ready};

pub(super) async fn answer(
    State(app): State<App>,
    Extension(id): Extension<RequestId>,
    request: Request,
) -> Result<Response, ApiError> {
    respond(&app, id, request, prepare).await
}

fn prepare(
    app: &App,
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
