//! Prompts that begin alike: the usage says what was not computed again.

use std::path::Path;

use serde_json::{Value, json};
use tinyserve::TinyServeConfig;

use crate::server::{one_thread, quiet, start};

/// The built-in model with a context that it was not trained for, which nothing here depends on.
fn with_a_long_context(folder: &Path) {
    let assets =
        Path::new(env!("CARGO_MANIFEST_DIR")).join("../tinyserve-model/assets/stories260k");
    for entry in assets.read_dir().unwrap() {
        let entry = entry.unwrap();
        std::fs::copy(entry.path(), folder.join(entry.file_name())).unwrap();
    }
    let file = folder.join("config.json");
    let mut config: Value = serde_json::from_slice(&std::fs::read(&file).unwrap()).unwrap();
    config["max_position_embeddings"] = 8192.into();
    std::fs::write(file, config.to_string()).unwrap();
}

#[test]
fn a_prompt_of_4000_tokens_that_was_computed_before_is_told_as_cached() {
    let folder = tempfile::tempdir().unwrap();
    with_a_long_context(folder.path());
    let model = folder.path().to_str().unwrap().to_owned();
    let server = start(quiet(), TinyServeConfig { model, max_num_seqs: 2, ..one_thread() });
    let story: String =
        (0..500).map(|day| format!("On day {day} Lily went to the park. ")).collect();
    let count = server.post("/tokenize", &json!({"prompt": story})).ok()["count"].clone();
    let count = count.as_u64().unwrap();
    assert!((4000..8000).contains(&count), "{count}");
    let ask = |tail: &str| {
        let prompt = format!("{story}{tail}");
        let body = json!({"prompt": prompt, "max_tokens": 2, "temperature": 0});
        let usage = server.post("/v1/completions", &body).ok()["usage"].take();
        let cached = usage["prompt_tokens_details"]["cached_tokens"].as_u64().unwrap();
        (usage["prompt_tokens"].as_u64().unwrap(), cached)
    };
    assert_eq!(ask("Then the sun came out.").1, 0);
    let (prompt, cached) = ask("But one day it was cold and dark.");
    assert!(prompt - cached < 16 + 20 && cached >= 4000 && cached.is_multiple_of(16));
    let metrics = server.get("/metrics").text;
    let counted = |name: &str, label: &str| {
        let mut lines = metrics.lines().filter(|line| line.contains(label));
        let line = lines.find(|line| line.starts_with(&format!("{name}_total{{")));
        let n = line.and_then(|line| line.rsplit(' ').next()).map(str::to_owned);
        n.unwrap_or_else(|| panic!("no {name} of {label:?} in {metrics}"))
    };
    assert_eq!(counted("tinyserve:prefix_lookups", ""), "2");
    assert_eq!(counted("tinyserve:prefix_hits", ""), "1");
    for cause in ["room", "limit", "clear"] {
        let label = format!("cause=\"{cause}\"");
        assert_eq!(counted("tinyserve:prefix_evicted_pages", &label), "0");
    }
}
