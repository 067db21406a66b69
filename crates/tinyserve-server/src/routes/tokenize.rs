//! Text to token ids and back, over HTTP.

use axum::extract::{Request, State};
use axum::response::Response;
use serde_json::{Map, json as object};
use tinyserve::model::{ChatTemplate, Tokenizer};

use super::{body, json};
use crate::error::ApiError;
use crate::request::{DetokenizeRequest, TokenizeRequest, Tokenized};
use crate::state::App;

/// `POST /tokenize`.
pub(super) async fn tokenize(
    State(app): State<App>,
    request: Request,
) -> Result<Response, ApiError> {
    let body = body(&app, request).await?;
    let ready = app.ready()?;
    blocking(move || {
        let request = TokenizeRequest::parse(&body)?;
        app.check_model(request.model.as_deref())?;
        let tokenizer = ready.tokenizer()?;
        let tokens = match &request.input {
            Tokenized::Text { text, add_special_tokens } => {
                ready.encode(text, *add_special_tokens)?
            }
            Tokenized::Chat { conversation, add_special_tokens } => {
                let prompt = ready.render(conversation)?;
                ready.encode(&prompt, *add_special_tokens)?
            }
        };
        let strings = request.return_token_strs.then(|| spelt(tokenizer, &tokens));
        let answer = object!({
            "count": tokens.len(),
            "max_model_len": ready.limits.context,
            "tokens": tokens,
            "token_strs": strings,
        });
        Ok(json(answer.to_string()))
    })
    .await
}

fn spelt(tokenizer: &Tokenizer, tokens: &[u32]) -> Vec<String> {
    tokens.iter().map(|&id| tokenizer.id_to_token(id).unwrap_or_default()).collect()
}

/// `POST /detokenize`.
pub(super) async fn detokenize(
    State(app): State<App>,
    request: Request,
) -> Result<Response, ApiError> {
    let body = body(&app, request).await?;
    let ready = app.ready()?;
    blocking(move || {
        let request = DetokenizeRequest::parse(&body, &ready.limits)?;
        app.check_model(request.model.as_deref())?;
        let text = ready.tokenizer()?.decode(&request.tokens, false);
        let text = text.map_err(|error| ApiError::field("tokens", error.to_string()))?;
        Ok(json(object!({ "prompt": text }).to_string()))
    })
    .await
}

/// `GET /tokenizer_info`.
pub(super) async fn info(State(app): State<App>) -> Result<Response, ApiError> {
    let ready = app.ready()?;
    let tokenizer = ready.tokenizer()?;
    let mut info = Map::new();
    for name in ["bos_token", "eos_token", "pad_token", "unk_token"] {
        let token = ready.special_tokens.iter().find(|(known, _)| *known == name);
        info.insert(name.to_owned(), token.map(|(_, text)| text.clone()).into());
    }
    info.insert("vocab_size".to_owned(), tokenizer.vocab_size().into());
    info.insert("model_max_length".to_owned(), ready.limits.context.into());
    let template = ready.template.as_ref().map(ChatTemplate::source);
    info.insert("chat_template".to_owned(), template.into());
    Ok(json(serde_json::Value::Object(info).to_string()))
}

/// Runs what takes a while where it holds nobody else up.
pub(super) async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, ApiError> + Send + 'static,
) -> Result<T, ApiError> {
    match tokio::task::spawn_blocking(work).await {
        Ok(done) => done,
        Err(_) => Err(ApiError::internal("the server made a mistake while it read the request")),
    }
}
