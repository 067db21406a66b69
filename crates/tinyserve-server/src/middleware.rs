//! What happens around every request: its id, its key, its line in the log.

use std::time::Instant;

use axum::extract::{Request, State};
use axum::http::{HeaderMap, HeaderName, HeaderValue, Method};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};

use crate::error::ApiError;
use crate::ids;
use crate::state::App;

/// The header that names a request, in both directions.
pub(crate) const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");
/// The header that names a session; routers keep a session on one server by it.
pub(crate) const SESSION_ID: HeaderName = HeaderName::from_static("x-session-id");
/// Longest name that a header may give to something.
const LONGEST_NAME: usize = 256;

/// The name that a client gave to its request, or one that was made up.
#[derive(Debug, Clone)]
pub(crate) struct RequestId(pub(crate) String);

/// The name in a header, if it is one: visible ASCII, and not too long.
pub(crate) fn name_in(headers: &HeaderMap, header: &HeaderName) -> Option<String> {
    let name = headers.get(header)?.to_str().ok()?.trim();
    let visible = name.bytes().all(|byte| byte.is_ascii_graphic());
    (visible && (1..=LONGEST_NAME).contains(&name.len())).then(|| name.to_owned())
}

/// Names the request, checks its key, lets it run, and notes how it ended.
pub(crate) async fn around(State(app): State<App>, mut request: Request, next: Next) -> Response {
    let start = Instant::now();
    let id = name_in(request.headers(), &REQUEST_ID).unwrap_or_else(ids::random);
    let (method, path) = (request.method().clone(), request.uri().path().to_owned());
    request.extensions_mut().insert(RequestId(id.clone()));
    let allowed = app.keys.check(&method, &path, request.headers());
    let mut response = match allowed {
        Ok(()) => next.run(request).await,
        Err(error) => error.into_response(),
    };
    if let Ok(value) = HeaderValue::from_str(&id) {
        response.headers_mut().insert(REQUEST_ID, value);
    }
    app.metrics.http_response(response.status());
    app.log.request(&id, &method, &path, response.status(), start.elapsed());
    response
}

/// 404 in JSON.
pub(crate) async fn no_such_path(method: Method, request: Request) -> ApiError {
    ApiError::not_found(format!(
        "there is nothing at {method} {}, expected a path such as POST /v1/completions",
        crate::request::shown(request.uri().path())
    ))
}

/// 405 in JSON.
pub(crate) async fn wrong_method(method: Method, request: Request) -> ApiError {
    ApiError::http(
        axum::http::StatusCode::METHOD_NOT_ALLOWED,
        format!("{} does not answer {method}", crate::request::shown(request.uri().path())),
    )
}
