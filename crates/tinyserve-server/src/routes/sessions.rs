//! Sessions over HTTP: which there are, what they hold, their files, and their end.

use std::path::PathBuf;
use std::time::{Instant, SystemTime, UNIX_EPOCH};

use axum::extract::{Path, Request, State};
use axum::http::StatusCode;
use axum::response::Response;
use serde_json::{Value, json as object};
use tinyserve::sched::SessionInfo;

use super::{body, json};
use crate::error::ApiError;
use crate::request::shown;
use crate::saved::{self, SessionFileError, SessionFolder};
use crate::state::{App, Ready};

/// `GET /v1/sessions`: those of the engine, and the names of those that are saved.
pub(super) async fn list(State(app): State<App>) -> Result<Response, ApiError> {
    let sessions = app.ready()?.engine().list_sessions().await.ok_or_else(stopped)?;
    let sessions: Vec<Value> = sessions.iter().map(session).collect();
    let names = app.sessions.as_ref().map_or(Ok(Vec::new()), SessionFolder::names);
    let names = names.map_err(|error| unreadable(&error))?;
    Ok(json(object!({ "object": "list", "data": sessions, "saved": names }).to_string()))
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

/// `DELETE /v1/sessions/{id}`: its pages are free again, and its file is gone.
pub(super) async fn delete(
    State(app): State<App>,
    Path(id): Path<String>,
) -> Result<Response, ApiError> {
    let existed = app.ready()?.engine().delete_session(id.clone()).await.ok_or_else(stopped)?;
    let saved = app.sessions.as_ref().map_or(Ok(false), |folder| folder.delete(&id));
    if saved.map_err(|error| unreadable(&error))? || existed {
        return Ok(json(object!({ "id": id, "object": "session", "deleted": true }).to_string()));
    }
    Err(missing(&id))
}

/// `POST /v1/sessions/{id}/save`: what it holds, as far as it fills whole pages, goes to its file.
pub(super) async fn save(
    State(app): State<App>,
    Path(id): Path<String>,
    request: Request,
) -> Result<Response, ApiError> {
    let (ready, file) = file_of(&app, &id, request).await?;
    let found = ready.engine().session_info(id.clone()).await.ok_or_else(stopped)?;
    found.ok_or_else(|| missing(&id))?;
    let start = Instant::now();
    let (tokens, bytes) =
        with_folder(&app, &id, move |folder, id| folder.save(&ready.model, id, &file)).await?;
    Ok(json(
        object!({
            "id": id,
            "object": "session.saved",
            "saved_tokens": tokens,
            "bytes": bytes,
            "ms": start.elapsed().as_secs_f64() * 1e3,
        })
        .to_string(),
    ))
}

/// `POST /v1/sessions/{id}/restore`: what its file holds, in place of what it holds now.
pub(super) async fn restore(
    State(app): State<App>,
    Path(id): Path<String>,
    request: Request,
) -> Result<Response, ApiError> {
    let (ready, file) = file_of(&app, &id, request).await?;
    let info = with_folder(&app, &id, move |folder, id| folder.restore(&ready.model, id, &file));
    Ok(json(session(&info.await?).to_string()))
}

/// The engine and the file of a session.
///
/// # Errors
/// 400 when sessions are not saved here, this one cannot be, or the request says more than it can.
async fn file_of(
    app: &App,
    id: &str,
    request: Request,
) -> Result<(std::sync::Arc<Ready>, PathBuf), ApiError> {
    let said = body(app, request).await?;
    if !matches!(said.trim_ascii(), b"" | b"{}") {
        return Err(ApiError::invalid(
            "the body says something, expected none: a session is saved in the server's folder under its own name",
        ));
    }
    let Some(folder) = &app.sessions else {
        return Err(ApiError::invalid(
            "this server saves no sessions: start it with --session-folder DIR",
        ));
    };
    let file = folder.file(id).ok_or_else(|| {
        ApiError::field(
            "id",
            format!(
                "the session {:?} cannot be saved, expected a name of {}",
                shown(id),
                saved::NAME
            ),
        )
    })?;
    Ok((app.ready()?, file))
}

/// Does on a thread of its own what waits for the disk and the engine.
async fn with_folder<T: Send + 'static>(
    app: &App,
    id: &str,
    work: impl FnOnce(&SessionFolder, &str) -> Result<T, SessionFileError> + Send + 'static,
) -> Result<T, ApiError> {
    let (shared, name) = (app.clone(), id.to_owned());
    let done = tokio::task::spawn_blocking(move || {
        let folder = shared.sessions.as_ref()?;
        Some(work(folder, &name).map_err(|error| refused(folder, &name, &error)))
    });
    match done.await {
        Ok(Some(result)) => result,
        _ => Err(ApiError::internal("saving or restoring the session went wrong")),
    }
}

/// Why a session was not saved or restored, as clients hear it.
fn refused(folder: &SessionFolder, id: &str, error: &SessionFileError) -> ApiError {
    let conflict = |message| ApiError::http(StatusCode::CONFLICT, message);
    match error {
        SessionFileError::NoFile => {
            ApiError::not_found(format!("no session {:?} is saved here", shown(id)))
        }
        SessionFileError::Full(saved) => {
            conflict(format!("{saved} sessions are saved already, as many as may be: delete one"))
        }
        SessionFileError::Refused(error) => {
            let sentence = folder.sentence(error);
            if SessionFileError::is_about_the_session(error) {
                conflict(sentence)
            } else if SessionFileError::is_about_room(error) {
                ApiError::overloaded(sentence)
            } else if SessionFileError::is_about_the_file(error) {
                ApiError::invalid(sentence)
            } else {
                ApiError::internal(sentence)
            }
        }
    }
}

fn unreadable(error: &std::io::Error) -> ApiError {
    ApiError::internal(format!("the folder of saved sessions: {error}"))
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
