//! Sessions over HTTP.

use axum::extract::{Path, State};
use axum::response::Response;

use crate::error::ApiError;
use crate::state::App;

fn none() -> ApiError {
    ApiError::not_found("there are no sessions")
}

pub(super) async fn list(State(_): State<App>) -> Result<Response, ApiError> {
    Err(none())
}
pub(super) async fn delete_all(State(_): State<App>) -> Result<Response, ApiError> {
    Err(none())
}
pub(super) async fn one(State(_): State<App>, Path(_): Path<String>) -> Result<Response, ApiError> {
    Err(none())
}
pub(super) async fn delete(
    State(_): State<App>,
    Path(_): Path<String>,
) -> Result<Response, ApiError> {
    Err(none())
}
pub(super) async fn save(
    State(_): State<App>,
    Path(_): Path<String>,
) -> Result<Response, ApiError> {
    Err(none())
}
pub(super) async fn restore(
    State(_): State<App>,
    Path(_): Path<String>,
) -> Result<Response, ApiError> {
    Err(none())
}
