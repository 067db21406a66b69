//! What Prometheus reads.

use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};

use axum::http::StatusCode;

use crate::engine::Engine;

pub(crate) struct Metrics {
    model: String,
    responses: [AtomicU64; 6],
}

impl Metrics {
    pub(crate) fn new(model: &str) -> Self {
        Self { model: model.to_owned(), responses: Default::default() }
    }

    pub(crate) fn http_response(&self, status: StatusCode) {
        let class = usize::from(status.as_u16() / 100).min(5);
        self.responses[class].fetch_add(1, Ordering::Relaxed);
    }

    pub(crate) fn render(&self, engine: Option<&Engine>) -> Result<String, fmt::Error> {
        let load = engine.map(Engine::load).unwrap_or_default();
        Ok(format!(
            "vllm:num_requests_running{{model_name={:?},engine=\"0\"}} {}\n",
            self.model, load.running
        ))
    }
}
