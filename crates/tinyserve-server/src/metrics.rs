//! What Prometheus reads: vLLM's names, which routers and benchmarks know, and our own.
//!
//! A scrape reads counters that the engine writes without a lock, so no step waits for it. What
//! is known of a request when it ends is counted by the thread that carries its answer.

mod buckets;
mod engine;

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use axum::http::StatusCode;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::Registry;
use tinyserve::sched::Summary;

pub(crate) use engine::{EngineView, Source};

/// Everything that is counted.
pub(crate) struct Metrics {
    registry: Registry,
    pub(crate) requests: Arc<RequestMetrics>,
    responses: Family<Vec<(&'static str, String)>, Counter>,
}

/// What is counted when a request comes and when it ends.
#[derive(Debug)]
pub(crate) struct RequestMetrics {
    n: Histogram,
    max_tokens: Histogram,
    max_generation_tokens: Histogram,
    prompt_tokens: Histogram,
    generation_tokens: Histogram,
    prefill: Histogram,
    decode: Histogram,
    inference: Histogram,
}

impl RequestMetrics {
    /// A request with `n` choices was taken.
    pub(crate) fn submitted(&self, n: usize) {
        self.n.observe(n as f64);
    }

    /// A choice is complete.
    pub(crate) fn finished(&self, summary: &Summary, max_tokens: usize) {
        let seconds = |duration: Duration| duration.as_secs_f64();
        let (usage, timings) = (&summary.usage, &summary.timings);
        self.max_tokens.observe(max_tokens as f64);
        self.max_generation_tokens.observe(usage.completion_tokens as f64);
        self.prompt_tokens.observe(usage.prompt_tokens as f64);
        self.generation_tokens.observe(usage.completion_tokens as f64);
        self.prefill.observe(seconds(timings.prefill));
        self.decode.observe(seconds(timings.decode));
        self.inference.observe(seconds(timings.prefill + timings.decode));
    }
}

impl Metrics {
    /// Metrics of the model `model`; `source` tells what the engine counts.
    pub(crate) fn new(model: &str, source: Arc<Source>) -> Self {
        let labels = [("model_name", model.to_owned()), ("engine", "0".to_owned())];
        let labels = labels.map(|(name, value)| (name.into(), value.into()));
        let mut registry = Registry::with_labels(labels.into_iter());
        registry.register_collector(Box::new(source));
        let mut add = |name: &str, help: &str, bounds: &[f64]| {
            let histogram = Histogram::new(bounds.iter().copied());
            registry.register(format!("vllm:{name}"), help, histogram.clone());
            histogram
        };
        let (counts, seconds) = (buckets::COUNTS, buckets::LATENCY);
        let requests = RequestMetrics {
            n: add("request_params_n", "Choices of a request", &[1.0, 2.0, 5.0, 10.0, 20.0]),
            max_tokens: add("request_params_max_tokens", "Most tokens that were asked for", counts),
            max_generation_tokens: add(
                "request_max_num_generation_tokens",
                "Most tokens that were generated",
                counts,
            ),
            prompt_tokens: add("request_prompt_tokens", "Tokens of a prompt", counts),
            generation_tokens: add("request_generation_tokens", "Tokens of an answer", counts),
            prefill: add(
                "request_prefill_time_seconds",
                "From the first step to the end of the prompt",
                seconds,
            ),
            decode: add(
                "request_decode_time_seconds",
                "From the end of the prompt to the last token",
                seconds,
            ),
            inference: add(
                "request_inference_time_seconds",
                "From the first step to the last token",
                seconds,
            ),
        };
        let responses = Family::<Vec<(&'static str, String)>, Counter>::default();
        registry.register("tinyserve:http_responses", "Answers by their status", responses.clone());
        Self { registry, requests: Arc::new(requests), responses }
    }

    /// A request was answered.
    pub(crate) fn http_response(&self, status: StatusCode) {
        self.responses.get_or_create(&vec![("status", status.as_u16().to_string())]).inc();
    }

    /// Everything in Prometheus's text format.
    pub(crate) fn render(&self) -> Result<String, fmt::Error> {
        let mut text = String::with_capacity(32 << 10);
        prometheus_client::encoding::text::encode(&mut text, &self.registry)?;
        Ok(text)
    }
}
