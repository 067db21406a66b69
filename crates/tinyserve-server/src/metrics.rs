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
use prometheus_client::metrics::family::{Family, MetricConstructor};
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
    n: PerEngine,
    max_tokens: PerEngine,
    max_generation_tokens: PerEngine,
    prompt_tokens: PerEngine,
    generation_tokens: PerEngine,
    prefill: PerEngine,
    decode: PerEngine,
    inference: PerEngine,
}

/// A histogram for each engine.
#[derive(Debug, Clone)]
struct PerEngine(Family<[(&'static str, String); 1], Histogram, Bounds>);

impl PerEngine {
    fn observe(&self, engine: usize, value: f64) {
        self.of(engine).observe(value);
    }

    fn of(&self, engine: usize) -> Histogram {
        self.0.get_or_create_owned(&[engine::engine_label(engine)])
    }
}

/// What the buckets of a histogram end at.
#[derive(Debug, Clone)]
struct Bounds(&'static [f64]);

impl MetricConstructor<Histogram> for Bounds {
    fn new_metric(&self) -> Histogram {
        Histogram::new(self.0.iter().copied())
    }
}

impl RequestMetrics {
    /// There are so many engines: each has its series before it has answered anything.
    pub(crate) fn begin(&self, engines: usize) {
        let Self { n, max_tokens, max_generation_tokens, prompt_tokens, .. } = self;
        let Self { generation_tokens, prefill, decode, inference, .. } = self;
        for histogram in [n, max_tokens, max_generation_tokens, prompt_tokens].into_iter().chain([
            generation_tokens,
            prefill,
            decode,
            inference,
        ]) {
            (0..engines).for_each(|engine| drop(histogram.of(engine)));
        }
    }

    /// A request with `n` choices was taken, the first of them by `engine`.
    pub(crate) fn submitted(&self, engine: usize, n: usize) {
        self.n.observe(engine, n as f64);
    }

    /// A choice is complete that `engine` made.
    pub(crate) fn finished(&self, engine: usize, summary: &Summary, max_tokens: usize) {
        let seconds = |duration: Duration| duration.as_secs_f64();
        let (usage, timings) = (&summary.usage, &summary.timings);
        self.max_tokens.observe(engine, max_tokens as f64);
        self.max_generation_tokens.observe(engine, usage.completion_tokens as f64);
        self.prompt_tokens.observe(engine, usage.prompt_tokens as f64);
        self.generation_tokens.observe(engine, usage.completion_tokens as f64);
        self.prefill.observe(engine, seconds(timings.prefill));
        self.decode.observe(engine, seconds(timings.decode));
        self.inference.observe(engine, seconds(timings.prefill + timings.decode));
    }
}

impl Metrics {
    /// Metrics of the model `model`; `source` tells what the engine counts.
    pub(crate) fn new(model: &str, source: Arc<Source>) -> Self {
        let label = ("model_name".into(), model.to_owned().into());
        let mut registry = Registry::with_labels([label].into_iter());
        registry.register_collector(Box::new(source));
        let mut add = |name: &str, help: &str, bounds: &'static [f64]| {
            let family = Family::new_with_constructor(Bounds(bounds));
            registry.register(format!("vllm:{name}"), help, family.clone());
            PerEngine(family)
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
