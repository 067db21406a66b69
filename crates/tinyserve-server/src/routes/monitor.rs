//! What monitors ask for: whether it lives, what it does, how fast.

use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde_json::json as object;

use super::json;
use crate::engine::page_stats;
use crate::error::ApiError;
use crate::state::{App, Phase};

/// `GET /health`: 200 when requests are taken, else 503.
pub(crate) async fn health(State(app): State<App>) -> Response {
    match app.phase() {
        Phase::Ready => json(object!({ "status": "ready" }).to_string()),
        phase => ApiError::unavailable(phase.name()).into_response(),
    }
}

/// `GET /version`.
pub(super) async fn version() -> Response {
    json(object!({ "version": env!("CARGO_PKG_VERSION") }).to_string())
}

/// `GET /load`: requests that run or wait.
pub(super) async fn load(State(app): State<App>) -> Result<Response, ApiError> {
    let stats = app.ready()?.engine().stats();
    Ok(json(object!({ "server_load": stats.running + stats.waiting }).to_string()))
}

/// `GET /metrics`, in Prometheus's text format.
pub(super) async fn metrics(State(app): State<App>) -> Response {
    match app.metrics.render() {
        Ok(text) => ([(header::CONTENT_TYPE, "text/plain; version=0.0.4; charset=utf-8")], text)
            .into_response(),
        Err(_) => {
            (StatusCode::INTERNAL_SERVER_ERROR, "the metrics cannot be written").into_response()
        }
    }
}

/// `GET /tinyserve/stats`: what the page at `/` draws, as totals since the start; each replica, and
/// what the counters suggest to change.
pub(super) async fn stats(State(app): State<App>) -> Result<Response, ApiError> {
    let ready = app.ready()?;
    let mut stats = page_stats(ready.engine());
    stats["state"] = app.phase().name().into();
    stats["model"] = app.names[0].as_str().into();
    stats["uptime_seconds"] = app.started.elapsed().as_secs_f64().into();
    Ok(json(stats.to_string()))
}
