//! What an engine tells about itself, by its published names.
#![forbid(unsafe_code)]

use tinyserve::{AttentionMode, Measured, TinyServe, TinyServeConfig, TinyServeRequest};

fn engine(config: TinyServeConfig) -> TinyServe {
    TinyServe::builder().config(config).build().unwrap()
}

/// Answers one request with `tokens` tokens.
fn answer(engine: &TinyServe, tokens: usize) {
    let request = TinyServeRequest::new("Once upon a time").max_tokens(tokens);
    let response = engine.serve(request.temperature(0.0).ignore_eos(true)).unwrap();
    assert_eq!(response.tokens.len(), tokens);
}

#[test]
fn attention_is_counted_and_timed() {
    let dense = engine(TinyServeConfig::default());
    assert_eq!(dense.get_attention_stats(), Default::default());
    answer(&dense, 40);
    let stats = dense.get_attention_stats();
    // The prompt is one step, and the last token is not fed back.
    let layers = dense.model_config().layers as u64;
    assert_eq!((stats.total_attention_calls, stats.total_sparse_operations), (40 * layers, 0));
    assert_eq!((stats.bytes_read, stats.recall), (stats.bytes_dense, None));
    let (one, latency) = (stats.avg_attention_time_ms.unwrap(), dense.get_stats().avg_latency_ms);
    assert!(one > 0.0 && one < latency, "{one} ms of {latency}");

    let selecting = engine(TinyServeConfig {
        attention: AttentionMode::Sparse,
        dense_layers: 2,
        ..TinyServeConfig::default()
    });
    answer(&selecting, 200);
    let stats = selecting.get_attention_stats();
    assert_eq!(stats.total_attention_calls, 200 * layers);
    let most = 199 * (layers - 2);
    assert!((1..=most).contains(&stats.total_sparse_operations), "{stats:?}");
    assert!(stats.bytes_read < stats.bytes_dense, "{stats:?}");
    assert_eq!(stats.recall, Some(selecting.get_stats().kv_hit_rate));
}

#[test]
fn settings_are_adapted_to_what_was_measured() {
    let config = TinyServeConfig { target_latency_ms: 1e-6, ..TinyServeConfig::default() };
    let engine = engine(config.clone());
    // Nothing was measured yet.
    assert_eq!(engine.get_optimized_config(Measured::default()).reasons.len(), 0);
    answer(&engine, 20);
    let optimized = engine.get_optimized_config(Measured::default());
    assert!(optimized.config.selection_ratio < config.selection_ratio, "{optimized:?}");
    assert!(optimized.reasons[0].contains("ms per token, target 0.000001 ms"), "{optimized:?}");
    // What comes out goes in.
    answer(&TinyServe::builder().config(optimized.config).build().unwrap(), 20);
}
