//! Sessions over HTTP: which there are, what they hold, and their end.

use std::time::{SystemTime, UNIX_EPOCH};

use axum::extract::{Path, State};
use axum::response::Response;
use serde_json::{Value, json as object};
use tinyserve::sched::SessionInfo;

use super::json;
use crate::error::ApiError;
use crate::request::shown;
use crate::state::App;

/// `GET /v1/sessions`.
pub(super) async fn list(State(app): State<App>) -> Result<Response, ApiError> {
    let sessions = app.ready()?.engine().list_sessions().await.ok_or_else(stopped)?;
    let sessions: Vec<Value> = sessions.iter().map(session).collect();
    Ok(json(object!({ "object": "list", "data": sessions }).to_string()))
}

/// `GET /v1/sessions/{id}`.
pub(super) async fn one(
    State(app): State<App>,
    Path(id): Path<String>,
) -> Result<Response, ApiError> {
    let found = app.ready()?.engine().session_info(id.clone()).await.ok_or_else(stopped)?;
    let found = found.ok_or_else(|| missing(&id))?;
    Ok(json(session(&found).to_string()))
}

/// `DELETE /v1/sessions/{id}`: its pages are free again.
pub(super) async fn delete(
    State(app): State<App>,
    Path(id): Path<String>,
) -> Result<Response, ApiError> {
    match app.ready()?.engine().delete_session(id.clone()).await {
        Some(true) => {
            Ok(json(object!({ "id": id, "object": "session", "deleted": true }).to_string()))
        }
        Some(false) => Err(missing(&id)),
        None => Err(stopped()),
    }
}

fn session(info: &SessionInfo) -> Value {
    let seconds =
        |time: SystemTime| time.duration_since(UNIX_EPOCH).map_or(0.0, |t| t.as_secs_f64());
    object!({
        "id": info.id,
        "object": "session",
        "created_at": seconds(info.created_at),
        "last_activity": seconds(info.last_activity),
        "request_count": info.request_count,
        "total_tokens": info.total_tokens,
        "cached_tokens": info.cached_tokens,
        "cached_pages": info.cached_pages,
    })
}

fn missing(id: &str) -> ApiError {
    ApiError::not_found(format!("there is no session {:?}", shown(id)))
}

fn stopped() -> ApiError {
    ApiError::unavailable("the engine stopped")
}
