//! What is answered, path by path.

mod chat;
mod completions;
mod generate;
mod models;
pub(crate) mod monitor;
mod sessions;
mod tokenize;

use std::time::Duration;

use axum::Router;
use axum::body::Body;
use axum::extract::Request;
use axum::http::{HeaderValue, StatusCode, header};
use axum::middleware::from_fn_with_state;
use axum::response::{Html, IntoResponse, Response};
use axum::routing::{get, post};
use bytes::Bytes;
use http_body_util::{BodyExt, LengthLimitError, Limited};
use tower_http::catch_panic::CatchPanicLayer;
use tower_http::cors::{AllowOrigin, Any, CorsLayer};

use crate::error::ApiError;
use crate::middleware::{around, no_such_path, wrong_method};
use crate::state::App;

const PAGE: &str = include_str!("../page/index.html");
/// What the page may load: itself and this server's answers.
const PAGE_POLICY: &str = "default-src 'none'; script-src 'unsafe-inline'; style-src \
     'unsafe-inline'; connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; \
     frame-ancestors 'none'";

/// Every path.
pub(crate) fn router(app: App) -> Router {
    let cors = cors(&app.config.allowed_origins);
    let router = Router::new()
        .route("/", get(page))
        .route("/health", get(monitor::health))
        .route("/ping", get(monitor::health).post(monitor::health))
        .route("/metrics", get(monitor::metrics))
        .route("/version", get(monitor::version))
        .route("/load", get(monitor::load))
        .route("/tinyserve/stats", get(monitor::stats))
        .route("/v1/models", get(models::list))
        .route("/v1/models/{*id}", get(models::one))
        .route("/v1/completions", generate::answers(completions::prepare))
        .route("/v1/chat/completions", generate::answers(chat::prepare))
        .route("/v1/sessions", get(sessions::list))
        .route("/v1/sessions/{id}", get(sessions::one).delete(sessions::delete))
        .route("/v1/sessions/{id}/save", post(sessions::save))
        .route("/v1/sessions/{id}/restore", post(sessions::restore))
        .route("/tokenize", post(tokenize::tokenize))
        .route("/v1/tokenize", post(tokenize::tokenize))
        .route("/detokenize", post(tokenize::detokenize))
        .route("/v1/detokenize", post(tokenize::detokenize))
        .route("/tokenizer_info", get(tokenize::info))
        .fallback(no_such_path)
        .method_not_allowed_fallback(wrong_method)
        // Innermost: a panic is answered like everything else, with an id and a line in the log.
        .layer(CatchPanicLayer::custom(|_| {
            ApiError::internal("the server made a mistake; other requests are not affected")
                .into_response()
        }))
        .layer(from_fn_with_state(app.clone(), around));
    match cors {
        Some(cors) => router.layer(cors),
        None => router,
    }
    .with_state(app)
}

/// Lets pages of `origins` ask from a browser.
fn cors(origins: &[String]) -> Option<CorsLayer> {
    if origins.is_empty() {
        return None;
    }
    let layer = CorsLayer::new().allow_methods(Any).allow_headers(Any).expose_headers(Any);
    Some(if origins.iter().any(|origin| origin == "*") {
        layer.allow_origin(Any)
    } else {
        let origins = origins.iter().filter_map(|origin| origin.parse::<HeaderValue>().ok());
        layer.allow_origin(AllowOrigin::list(origins))
    })
}

async fn page() -> Response {
    let headers = [
        (header::CONTENT_SECURITY_POLICY, PAGE_POLICY),
        (header::X_CONTENT_TYPE_OPTIONS, "nosniff"),
        (header::REFERRER_POLICY, "no-referrer"),
        (header::CACHE_CONTROL, "no-cache"),
    ];
    (headers, Html(PAGE)).into_response()
}

/// The body of a request that says it is JSON, or does not say what it is.
pub(crate) async fn body(app: &App, request: Request) -> Result<Bytes, ApiError> {
    let kind = request.headers().get(header::CONTENT_TYPE);
    let is_json = |kind: &HeaderValue| {
        let kind = kind.to_str().unwrap_or("?").split(';').next().unwrap_or_default().trim();
        let kind = kind.to_ascii_lowercase();
        // A form is what command-line tools send unless they are told otherwise.
        kind == "application/json"
            || kind.ends_with("+json")
            || kind == "application/x-www-form-urlencoded"
    };
    if !kind.is_none_or(is_json) {
        let message = "the content type is not application/json".to_owned();
        return Err(ApiError::http(StatusCode::UNSUPPORTED_MEDIA_TYPE, message));
    }
    read(app, request.into_body()).await
}

async fn read(app: &App, body: Body) -> Result<Bytes, ApiError> {
    let most = app.config.max_request_bytes;
    let time = Duration::from_secs_f64(app.config.body_timeout);
    match tokio::time::timeout(time, Limited::new(body, most).collect()).await {
        Ok(Ok(collected)) => Ok(collected.to_bytes()),
        Ok(Err(error)) if error.is::<LengthLimitError>() => {
            let message = format!("the body has more than {most} bytes, expected at most as many");
            Err(ApiError::http(StatusCode::PAYLOAD_TOO_LARGE, message))
        }
        Ok(Err(error)) => Err(ApiError::invalid(format!("the body cannot be read: {error}"))),
        Err(_) => {
            let message = format!("the body did not come within {} s", time.as_secs_f64());
            Err(ApiError::http(StatusCode::REQUEST_TIMEOUT, message))
        }
    }
}

/// `object` as the body of an answer.
pub(crate) fn json(text: String) -> Response {
    ([(header::CONTENT_TYPE, HeaderValue::from_static("application/json"))], text).into_response()
}
