//! Metrics, health and load.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use serde_json::json;

use tinyserve::TinyServeConfig;

use crate::server::{quiet, shared, start};

/// Samples by name and labels; the format is checked line by line.
fn samples(text: &str) -> BTreeMap<String, f64> {
    let mut samples = BTreeMap::new();
    for line in text.lines() {
        if line.starts_with('#') {
            assert!(
                ["# HELP ", "# TYPE ", "# EOF", "# UNIT "]
                    .iter()
                    .any(|start| line.starts_with(start)),
                "{line}"
            );
            continue;
        }
        let (name, value) = line.rsplit_once(' ').expect("a name and a value");
        samples.insert(name.to_owned(), value.parse().unwrap_or_else(|_| panic!("{line}")));
    }
    samples
}

fn scrape() -> BTreeMap<String, f64> {
    let answer = shared().get("/metrics");
    assert!(answer.header("content-type").unwrap().starts_with("text/plain; version=0.0.4"));
    samples(&answer.text)
}

const LABELS: &str = "{model_name=\"stories260k\",engine=\"0\"}";

fn of(samples: &BTreeMap<String, f64>, name: &str) -> f64 {
    let name = format!("{name}{LABELS}");
    *samples.get(&name).unwrap_or_else(|| panic!("no {name} in {samples:#?}"))
}

#[test]
fn metrics_have_the_names_that_routers_and_benches_read() {
    let body = json!({"prompt": "Once upon a time", "max_tokens": 7, "ignore_eos": true});
    shared().post("/v1/completions", &body).ok();
    let samples = scrape();
    for gauge in ["num_requests_running", "num_requests_waiting", "kv_cache_usage_perc"] {
        let value = of(&samples, &format!("vllm:{gauge}"));
        assert!(value >= 0.0, "{gauge}");
        // One series each: readers take the first.
        let series = samples.keys().filter(|key| key.starts_with(&format!("vllm:{gauge}")));
        assert_eq!(series.count(), 1, "{gauge}");
    }
    for counter in [
        "prompt_tokens_total",
        "generation_tokens_total",
        "num_preemptions_total",
        "prefix_cache_queries_total",
        "prefix_cache_hits_total",
    ] {
        assert!(of(&samples, &format!("vllm:{counter}")) >= 0.0);
    }
    assert!(of(&samples, "vllm:generation_tokens_total") >= 7.0);
    for histogram in [
        "time_to_first_token_seconds",
        "inter_token_latency_seconds",
        "request_time_per_output_token_seconds",
        "e2e_request_latency_seconds",
        "request_queue_time_seconds",
        "request_prefill_time_seconds",
        "request_decode_time_seconds",
        "request_inference_time_seconds",
        "request_prompt_tokens",
        "request_generation_tokens",
        "request_max_num_generation_tokens",
        "request_params_max_tokens",
        "request_params_n",
        "iteration_tokens_total",
    ] {
        let count = of(&samples, &format!("vllm:{histogram}_count"));
        assert!(count >= 1.0, "{histogram}");
        let infinity = format!(
            "vllm:{histogram}_bucket{{model_name=\"stories260k\",le=\"+Inf\",engine=\"0\"}}"
        );
        assert_eq!(samples.get(&infinity), Some(&count), "{histogram} {infinity}");
    }
    let finer = samples.keys().any(|key| {
        key.starts_with("vllm:inter_token_latency_seconds_bucket") && key.contains("le=\"0.001\"")
    });
    assert!(finer, "{samples:#?}");
    assert!(
        samples
            .keys()
            .any(|key| key.starts_with("vllm:cache_config_info{")
                && key.contains("block_size=\"16\""))
    );
    assert!(samples.keys().any(|key| key.starts_with("vllm:request_success_total{")
        && key.contains("finished_reason=\"length\"")));
    assert!(samples.keys().filter(|key| key.starts_with("tinyserve:")).count() >= 5);
}

#[test]
fn counters_count_what_was_asked() {
    let body = json!({"prompt": "Once upon a time", "max_tokens": 9, "ignore_eos": true});
    let before = scrape();
    shared().post("/v1/completions", &body).ok();
    let after = scrape();
    // Other tests ask the same server.
    let grew = |name: &str, least: f64| {
        let grown = of(&after, name) - of(&before, name);
        assert!(grown >= least, "{name} grew by {grown}, expected at least {least}");
    };
    grew("vllm:prompt_tokens_total", 5.0);
    grew("vllm:generation_tokens_total", 9.0);
    grew("vllm:e2e_request_latency_seconds_count", 1.0);
    grew("vllm:request_generation_tokens_sum", 9.0);
    grew("vllm:inter_token_latency_seconds_count", 8.0);
}

#[test]
fn each_replica_tells_what_it_does() {
    let config = TinyServeConfig { replicas: 2, threads: Some(2), ..TinyServeConfig::default() };
    let server = start(quiet(), config);
    for session in 0..8 {
        let body = json!({
            "prompt": "Once upon a time", "max_tokens": 5, "ignore_eos": true,
            "tinyserve": {"session": session.to_string()},
        });
        server.post("/v1/completions", &body).ok();
    }
    let stats = server.stats();
    let replicas = stats["replicas"].as_array().unwrap();
    assert_eq!(replicas.len(), 2, "{stats}");
    for name in ["requests", "sessions"] {
        let each: Vec<_> = replicas.iter().map(|one| one[name].as_u64().unwrap()).collect();
        assert_eq!(each.iter().sum::<u64>(), 8, "{stats}");
        assert!(each.iter().all(|&n| n > 0), "{stats}");
    }
    assert!(replicas.iter().all(|one| one["state"] == "running"), "{stats}");
    assert_eq!(stats["generated_tokens"], 40);
    let text = server.get("/metrics").text;
    let all = samples(&text);
    for (name, least, sum) in [
        ("vllm:generation_tokens_total", 5.0, 40.0),
        ("vllm:request_success_total", 1.0, 8.0),
        ("vllm:e2e_request_latency_seconds_count", 1.0, 8.0),
        ("vllm:request_generation_tokens_sum", 5.0, 40.0),
        ("vllm:request_params_n_count", 1.0, 8.0),
        ("tinyserve:sessions", 1.0, 8.0),
    ] {
        let finished = if name.contains("success") { ",finished_reason=\"length\"" } else { "" };
        let of_engine = |engine: usize| {
            let labels = format!("{{model_name=\"stories260k\",engine=\"{engine}\"{finished}}}");
            *all.get(&format!("{name}{labels}")).unwrap_or_else(|| panic!("{name}{labels}: {text}"))
        };
        assert!(of_engine(0) >= least && of_engine(1) >= least, "{name}: {text}");
        assert_eq!(of_engine(0) + of_engine(1), sum, "{name}");
        let family = name.trim_end_matches("_count").trim_end_matches("_sum");
        let family = family.trim_end_matches("_total");
        let named = |line: &str| {
            line.split(' ').nth(2).map(|name| name.trim_end_matches("_total") == family)
        };
        let kinds =
            text.lines().filter(|line| line.starts_with("# TYPE") && named(line) == Some(true));
        assert_eq!(kinds.count(), 1, "{family}: {text}");
    }
    assert!(stats["suggestions"].is_array(), "{stats}");
}

#[test]
fn a_scrape_is_short() {
    scrape();
    let start = Instant::now();
    (0..50).for_each(|_| drop(shared().get("/metrics")));
    let each = start.elapsed() / 50;
    // A scrape itself takes far under 1 ms; machines that run tests do other things too.
    println!("a scrape takes {each:?}, its transfer included");
    assert!(each < Duration::from_millis(500), "{each:?}");
}

#[test]
fn health_version_and_load_are_told() {
    assert_eq!(shared().get("/health").ok()["status"], "ready");
    assert_eq!(shared().get("/ping").ok()["status"], "ready");
    assert_eq!(shared().get("/version").ok()["version"], env!("CARGO_PKG_VERSION"));
    assert!(shared().get("/load").ok()["server_load"].is_u64());
}
