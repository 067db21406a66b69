//! `POST /v1/completions`.

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
use crate::output::CompletionOutput;
use crate::request::{CompletionRequest, Prompt};
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
) -> Result<Prepared<CompletionOutput>, ApiError> {
    let CompletionRequest { prompts, max_tokens, logprobs, echo, add_special_tokens, settings } =
        CompletionRequest::parse(json, &ready.limits)?;
    app.log.unknown_fields(&envelope.id, &settings.unknown);
    let header = envelope.header(app, "cmpl", &settings)?;
    let mut output = CompletionOutput::new(header, ready.texts());
    output.logprobs = logprobs.is_some();
    output.return_token_ids = settings.return_token_ids;
    output.streamed = settings.stream.is_some();
    output.continuous_usage = settings.stream.is_some_and(|stream| stream.continuous_usage_stats);
    let settings = Arc::new(settings);
    let mut submissions = Vec::with_capacity(prompts.len() * settings.n);
    for prompt in prompts {
        let (mut tokens, text) = match prompt {
            Prompt::Text(text) => (ready.encode(&text, add_special_tokens)?, Some(text)),
            Prompt::Tokens(tokens) => (known(tokens, ready.limits.vocab)?, None),
        };
        if let Some(text) = &text {
            app.log.prompt(&envelope.id, text);
        }
        let whole = tokens.len();
        truncate(&mut tokens, settings.truncate_prompt_tokens);
        let max_tokens = room(tokens.len(), Some(max_tokens), ready.limits.context, "prompt")?;
        let echo_text = match text {
            _ if !echo => None,
            Some(text) if tokens.len() == whole => Some(text),
            _ => Some(ready.decode(&tokens, settings.skip_special_tokens)?),
        };
        output.count_prompt(tokens.len());
        for choice in 0..settings.n {
            output.add_choice(&tokens, echo_text.clone());
            submissions.push(Submission {
                prompt: tokens.clone(),
                max_tokens,
                logprobs,
                prompt_logprobs: logprobs.filter(|_| echo),
                seed: seed_of(&settings, choice),
                session: settings.extension.session.clone().or_else(|| envelope.session.clone()),
                settings: Arc::clone(&settings),
            });
        }
    }
    Ok(Prepared { output, submissions, stream: settings.stream })
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
