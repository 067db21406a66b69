//! From a checked request to an answer: submitted as a whole, then streamed or collected.

use std::future::poll_fn;
use std::sync::Arc;
use std::time::Duration;

use axum::Extension;
use axum::body::Body;
use axum::extract::{Request, State};
use axum::http::{HeaderMap, header};
use axum::response::{IntoResponse, Response};
use axum::routing::{MethodRouter, post};

use super::tokenize::blocking;
use super::{body, json};
use crate::engine::Submission;
use crate::error::ApiError;
use crate::middleware::{RequestId, SESSION_ID, name_in};
use crate::output::{ChoiceEvent, EventStream, Header, Output};
use crate::request::{Settings, StreamSettings};
use crate::state::{App, Ready, Shared};

/// What a request says outside of its body.
#[derive(Debug, Clone)]
pub(super) struct Envelope {
    pub(super) id: String,
    pub(super) session: Option<String>,
}

impl Envelope {
    pub(super) fn new(id: RequestId, headers: &HeaderMap) -> Self {
        Self { id: id.0, session: name_in(headers, &SESSION_ID) }
    }

    /// What every object of the answer says.
    pub(super) fn header(
        &self,
        app: &Shared,
        prefix: &str,
        settings: &Settings,
    ) -> Result<Header, ApiError> {
        let id = settings.request_id.as_deref().unwrap_or(&self.id);
        Ok(Header {
            id: format!("{prefix}-{id}"),
            created: crate::seconds_since_1970(),
            model: app.check_model(settings.model.as_deref())?.to_owned(),
        })
    }
}

/// A request that is ready to be submitted.
pub(super) struct Prepared<O> {
    pub(super) output: O,
    /// One for each choice, in the order of their indices.
    pub(super) submissions: Vec<Submission>,
    pub(super) stream: Option<StreamSettings>,
}

/// How many tokens a prompt may be answered with.
///
/// # Errors
/// 400 with the numbers when the prompt alone, or with the tokens that are asked for, does not fit
/// into the context.
pub(super) fn room(
    prompt: usize,
    max_tokens: Option<usize>,
    context: usize,
    field: &str,
) -> Result<usize, ApiError> {
    if prompt == 0 {
        return Err(ApiError::field(field, "the prompt is empty, expected at least one token"));
    }
    let left = context.saturating_sub(prompt);
    match max_tokens {
        Some(0) if prompt <= context => Ok(0),
        Some(most) if most > 0 && most <= left => Ok(most),
        None if left > 0 => Ok(left),
        Some(most) if left > 0 => Err(ApiError::too_long(
            "max_tokens",
            format!(
                "the prompt has {prompt} tokens and max_tokens is {most}, expected at most \
                 {context} together, the longest sequence here (n_prompt_tokens {prompt}, n_ctx {context})"
            ),
        )),
        _ => Err(ApiError::too_long(
            field,
            format!(
                "the prompt has {prompt} tokens, expected at most {}: the longest sequence here has \
                 {context} (n_prompt_tokens {prompt}, n_ctx {context})",
                context.saturating_sub(1)
            ),
        )),
    }
}

/// The last tokens of a prompt, if it is to be shortened.
pub(super) fn truncate(tokens: &mut Vec<u32>, most: Option<usize>) {
    if let Some(most) = most
        && tokens.len() > most
    {
        tokens.drain(..tokens.len() - most);
    }
}

/// A request whose body was read and checked, before it is known which choices it has.
pub(super) struct Asked {
    settings: Arc<Settings>,
    session: Option<String>,
    seed: Option<u64>,
}

impl Asked {
    pub(super) fn new(app: &Shared, envelope: &Envelope, settings: Settings) -> Self {
        app.log.unknown_fields(&envelope.id, &settings.unknown);
        let session = settings.extension.session.clone().or_else(|| envelope.session.clone());
        let seed = settings.seed.map(i64::cast_unsigned).or_else(|| app.next_seed());
        Self { settings: Arc::new(settings), session, seed }
    }

    /// What is submitted for each choice that answers `prompt`; each draws its own text.
    pub(super) fn submissions(
        &self,
        prompt: &[u32],
        max_tokens: usize,
        logprobs: Option<usize>,
        prompt_logprobs: Option<usize>,
    ) -> impl Iterator<Item = Submission> {
        (0..self.settings.n as u64).map(move |choice| Submission {
            prompt: prompt.to_vec(),
            max_tokens,
            logprobs,
            prompt_logprobs,
            seed: self.seed.map(|seed| seed.wrapping_add(choice)),
            session: self.session.clone(),
            settings: Arc::clone(&self.settings),
        })
    }
}

/// How a request for one kind of answer becomes one that is ready: on a thread of its own, because
/// long texts take long to tokenise.
pub(super) type Prepare<O> = fn(&Shared, &Ready, &Envelope, &[u8]) -> Result<Prepared<O>, ApiError>;

/// The route of one kind of answer: reads, checks, submits and answers.
pub(super) fn answers<O: Output>(prepare: Prepare<O>) -> MethodRouter<App> {
    post(move |State(app): State<App>, Extension(id): Extension<RequestId>, request| {
        respond(app, id, request, prepare)
    })
}

/// # Errors
/// 503 when the engine takes nothing, 400 for what `prepare` refuses, and as [`answer`].
async fn respond<O: Output>(
    app: App,
    id: RequestId,
    request: Request,
    prepare: Prepare<O>,
) -> Result<Response, ApiError> {
    let envelope = Envelope::new(id, request.headers());
    let ready = app.accepting()?;
    let body = body(&app, request).await?;
    let prepared = {
        let (app, ready) = (app.clone(), ready.clone());
        blocking(move || prepare(&app, &ready, &envelope, &body)).await?
    };
    answer(&app, &ready, prepared).await
}

/// Submits all choices, or none, and answers.
///
/// # Errors
/// 429 when the queue is full; what the engine refuses; for an answer that is not streamed, also
/// what failed while it was computed.
async fn answer<O: Output>(
    app: &App,
    ready: &Arc<Ready>,
    prepared: Prepared<O>,
) -> Result<Response, ApiError> {
    let Prepared { mut output, submissions, stream } = prepared;
    let mut choices = ready.submit(submissions, &app.metrics.requests)?;
    if let Some(settings) = stream {
        let keep_alive = Duration::from_secs_f64(app.config.keep_alive_interval);
        let stream = EventStream::new(output, choices, settings, keep_alive);
        let headers = [
            (header::CONTENT_TYPE, "text/event-stream"),
            (header::CACHE_CONTROL, "no-cache"),
            // Proxies that gather answers are asked not to.
            (header::HeaderName::from_static("x-accel-buffering"), "no"),
        ];
        return Ok((headers, Body::from_stream(stream)).into_response());
    }
    choices.wake_at_ends();
    let mut chunks = Vec::new();
    while let Some((index, event)) = poll_fn(|cx| choices.poll_next(cx)).await {
        if let ChoiceEvent::Failed(error) = event {
            return Err(error);
        }
        output.event(index, event, &mut chunks);
    }
    Ok(json(output.whole()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_context_holds_prompt_and_answer() {
        assert_eq!(room(5, Some(5), 10, "prompt"), Ok(5));
        assert_eq!(room(5, None, 10, "prompt"), Ok(5));
        assert_eq!(room(10, Some(0), 10, "prompt"), Ok(0));
        for (prompt, most, param) in [
            (5, Some(6), "max_tokens"),
            (10, Some(1), "prompt"),
            (10, None, "prompt"),
            (11, Some(0), "prompt"),
            (99, Some(usize::MAX), "prompt"),
        ] {
            let error = room(prompt, most, 10, "prompt").unwrap_err();
            assert_eq!(error.param(), Some(param), "{}", error.message());
            assert!(error.message().contains(&format!("n_prompt_tokens {prompt}, n_ctx 10")));
        }
        assert_eq!(room(0, None, 10, "prompt").unwrap_err().param(), Some("prompt"));
    }

    #[test]
    fn the_end_of_a_long_prompt_is_kept() {
        let mut tokens = vec![1, 2, 3, 4];
        truncate(&mut tokens, Some(9));
        truncate(&mut tokens, None);
        assert_eq!(tokens.len(), 4);
        truncate(&mut tokens, Some(2));
        assert_eq!(tokens, [3, 4]);
    }
}
