//! Which models are served: one, under each of its names.

use axum::extract::{Path, State};
use axum::response::Response;
use serde_json::{Value, json as object};

use super::json;
use crate::error::ApiError;
use crate::state::App;

/// `GET /v1/models`.
pub(super) async fn list(State(app): State<App>) -> Response {
    let models: Vec<Value> = app.names.iter().map(|name| model(&app, name)).collect();
    json(object!({ "object": "list", "data": models }).to_string())
}

/// `GET /v1/models/{id}`; names may hold slashes.
pub(super) async fn one(
    State(app): State<App>,
    Path(id): Path<String>,
) -> Result<Response, ApiError> {
    app.check_model(Some(&id))?;
    Ok(json(model(&app, &id).to_string()))
}

fn model(app: &App, name: &str) -> Value {
    object!({
        "id": name,
        "object": "model",
        "created": app.created,
        "owned_by": "tinyserve",
        "root": app.root,
        "parent": null,
        // Known when the model is loaded.
        "max_model_len": app.ready().ok().map(|ready| ready.limits.context),
    })
}
