//! `POST /v1/chat/completions`.

use std::sync::Arc;

use axum::Extension;
use axum::extract::{Request, State};
use axum::response::Response;

use super::body;
use super::generate::{Envelope, Prepared, answer as generate, room, seed_of, truncate};
use super::tokenize::blocking;
use crate::engine::Submission;
use crate::error::ApiError;
use crate::middleware::RequestId;
use crate::output::ChatOutput;
use crate::request::ChatRequest;
use crate::state::{App, Ready};

pub(super) async fn answer(
    State(app): State<App>,
    Extension(id): Extension<RequestId>,
    request: Request,
) -> Result<Response, ApiError> {
    let envelope = Envelope::new(id, request.headers());
    let ready = app.accepting()?;
    let body = body(&app, request).await?;
    let prepared = {
        let (app, ready) = (app.clone(), ready.clone());
        blocking(move || prepare(&app, &ready, &envelope, &body)).await?
    };
    generate(&app, &ready, prepared).await
}

fn prepare(
    app: &App,
    ready: &Ready,
    envelope: &Envelope,
    json: &[u8],
) -> Result<Prepared<ChatOutput>, ApiError> {
    let ChatRequest { conversation, max_tokens, logprobs, add_special_tokens, settings } =
        ChatRequest::parse(json, &ready.limits)?;
    app.log.unknown_fields(&envelope.id, &settings.unknown);
    let header = envelope.header(app, "chatcmpl", &settings)?;
    let text = ready.render(&conversation)?;
    app.log.prompt(&envelope.id, &text);
    let mut tokens =
        ready.encode(&text, add_special_tokens).map_err(|error| error.about("messages"))?;
    truncate(&mut tokens, settings.truncate_prompt_tokens);
    let max_tokens = room(tokens.len(), max_tokens, ready.limits.context, "messages")?;
    let settings = Arc::new(settings);
    let submissions = (0..settings.n).map(|choice| Submission {
        prompt: tokens.clone(),
        max_tokens,
        logprobs,
        prompt_logprobs: None,
        seed: seed_of(&settings, choice),
        session: settings.extension.session.clone().or_else(|| envelope.session.clone()),
        settings: Arc::clone(&settings),
    });
    let submissions = submissions.collect();
    let mut output = ChatOutput::new(header, ready.texts(), tokens, settings.n);
    output.logprobs = logprobs;
    output.return_token_ids = settings.return_token_ids;
    output.streamed = settings.stream.is_some();
    output.continuous_usage = settings.stream.is_some_and(|stream| stream.continuous_usage_stats);
    Ok(Prepared { output, submissions, stream: settings.stream })
}
