//! `tokenize`, `inspect`, `doctor`, `eval perplexity`, `completions`.

use serde_json::{Value, json};
use tinyserve_tests::{GOLDEN, data};

use crate::binary::{text, tinyserve, whole_cases, with_stdin, words};

#[test]
fn tokenize_shows_ids_and_pieces() {
    let plain = tinyserve(&["tokenize", "-p", "Once upon a time"]).done();
    assert_eq!(plain, "1\t\"<s>\"\n403\t\"▁Once\"\n407\t\"▁upon\"\n261\t\"▁a\"\n378\t\"▁time\"\n");
    let object = tinyserve(&["tokenize", "-p", "Once", "--json", "--no-special-tokens"]).json();
    assert_eq!(object, json!({ "tokens": [403], "text_pieces": ["▁Once"] }));
    for name in GOLDEN {
        let folder = data(&format!("golden/{name}"));
        for case in whole_cases(name) {
            let args = ["tokenize", text(&folder), "--prompt-file", "-", "--json"];
            let object = with_stdin(&args, case.text.as_bytes()).json();
            assert_eq!(object["tokens"], json!(case.ids), "{name}: {:?}", case.text);
        }
    }
}

#[test]
fn tokenize_needs_nothing_but_a_tokenizer() {
    let folder = tempfile::tempdir().unwrap();
    let file = data("golden/llama-gqa/tokenizer.json");
    std::fs::copy(file, folder.path().join("tokenizer.json")).unwrap();
    tinyserve(&["tokenize", text(folder.path()), "-p", "a"]).done();
}

#[test]
fn inspect_plans_memory_before_loading() {
    let object = words("inspect --json").json();
    assert_eq!((&object["architecture"], &object["layers"]), (&"llama".into(), &5.into()));
    assert_eq!(object["parameters"], 260_032);
    assert_eq!(object["tokenizer"]["vocab_size"], 512);
    assert_eq!(object["files"][0]["name"], "model.safetensors");
    assert_eq!(object["kv"]["bytes_per_token"], 5 * 4 * 8 * 2 * 4);
    let tensors = object["tensors"].as_array().unwrap();
    let bytes: u64 = tensors
        .iter()
        .filter(|tensor| tensor["parameter"] == true)
        .map(|tensor| tensor["bytes"].as_u64().unwrap())
        .sum();
    assert_eq!(object["weight_bytes"], bytes);

    let folder = data("golden/llama-tied-rope-scaled-bf16");
    let args = ["inspect", text(&folder), "--json", "--page-size", "8", "--kv-cache-dtype", "f32"];
    let object = tinyserve(&args).json();
    let plan = object["memory_plan"].as_array().unwrap();
    let contexts: Vec<_> = plan.iter().map(|row| row["context"].as_u64().unwrap()).collect();
    assert_eq!(contexts, [512, 1024, 2048]);
    for row in plan {
        let size = |name: &str| row[name].as_u64().unwrap();
        assert_eq!(size("pages"), size("context") / 8);
        let per_token = object["kv"]["bytes_per_token"].as_u64().unwrap();
        assert_eq!(size("kv_bytes"), size("context") * per_token);
        // A box is two vectors per page where keys and values are two per token.
        assert_eq!(size("box_bytes"), size("kv_bytes") / 8);
        let model = size("weight_bytes") + size("scratch_bytes") + size("process_bytes");
        assert_eq!(size("total_bytes"), model + size("kv_bytes") + size("box_bytes"));
    }
    let plain = tinyserve(&["inspect", text(&folder), "--tensors"]).done();
    for part in ["llama3 scaling", "bf16", "embed_tokens", "2048"] {
        assert!(plain.contains(part), "{part:?} is not in {plain}");
    }
}

#[test]
fn doctor_says_what_is_used_and_what_is_not() {
    let object = words("doctor --json").json();
    assert_eq!(object["version"], env!("CARGO_PKG_VERSION"));
    let paths = object["cpu"]["paths"].as_array().unwrap();
    assert!(paths.contains(&"scalar".into()) && paths.contains(&object["cpu"]["path"]));
    assert!(object["cpu"]["threads"].as_u64().unwrap() >= 1);
    // What rounds can be asked for, and is not taken otherwise.
    let rounding = object["cpu"]["rounding_paths"].as_array().unwrap();
    assert!(
        rounding.contains(&"portable-bf16".into()) && rounding.iter().all(|it| paths.contains(it))
    );
    let features = object["cpu"]["features"].as_array().unwrap();
    let has_pairs = features.contains(&"avx512bf16".into()) && paths.contains(&"avx512".into());
    assert_eq!(rounding.contains(&"avx512-bf16".into()), has_pairs, "{object}");
    // There are devices, or there is a sentence that says why not.
    let devices = object["gpus"].as_array().unwrap();
    assert_eq!(devices.is_empty(), object["cuda"].is_string(), "{object}");
    assert_eq!(object["self_test"], Value::Null);
    assert!(!rounding.contains(&object["cpu"]["path"]), "{object}");
    let plain = words("doctor --cpu portable-bf16").done();
    let line = plain.lines().find(|line| line.starts_with("rounding ")).unwrap();
    assert!(line.contains("bf16 weights") && line.contains("portable-bf16"), "{plain}");
    let plain = words("doctor --cpu scalar").done();
    assert!(plain.contains("path       scalar") && plain.contains("GPUs "), "{plain}");
}

#[test]
fn the_self_test_passes_on_every_path() {
    let object = words("doctor --self-test --json").json();
    let tests = object["self_test"].as_array().unwrap();
    assert_eq!(tests.len(), object["cpu"]["paths"].as_array().unwrap().len());
    for test in tests {
        assert_eq!(test["passed"], true, "{test}");
        for op in test["ops"].as_array().unwrap() {
            assert!(op["cases"].as_u64().unwrap() > 0, "{op}");
            assert!(op["worst_error_of_tolerance"].as_f64().is_some_and(|x| x <= 1.0), "{op}");
        }
    }
    let plain = words("doctor --self-test --cpu portable").done();
    assert!(plain.contains("self-test of portable: PASS"), "{plain}");
}

#[test]
fn perplexity_is_the_references() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("text.txt");
    for name in ["llama-gqa", "gpt2-tiny"] {
        let model = data(&format!("golden/{name}"));
        for case in whole_cases(name).iter().filter(|case| case.ids.len() > 1) {
            std::fs::write(&file, &case.text).unwrap();
            let args = ["eval", "perplexity", text(&model), "--text-file", text(&file), "--json"];
            let object = tinyserve(&args).json();
            let nll = object["nll_mean"].as_f64().unwrap();
            assert!((nll - case.nll_mean).abs() < 1e-4, "{name}: {nll} for {}", case.nll_mean);
            let perplexity = object["perplexity"].as_f64().unwrap();
            assert!((perplexity - nll.exp()).abs() < 1e-9 * perplexity);
            assert_eq!(object["tokens"], case.ids.len() - 1);
        }
    }
}

#[test]
fn the_stride_moves_the_windows() {
    let story = data("data/models/stories260k/karpathy_expected_stdout.txt");
    let perplexity = |more: &[&str]| {
        let args = ["eval", "perplexity", "--text-file", text(&story), "--json"];
        let object = tinyserve(&[&args[..], more].concat()).json();
        (object["tokens"].as_u64().unwrap(), object["perplexity"].as_f64().unwrap())
    };
    let whole = perplexity(&[]);
    let short = ["--max-sequence-length", "64", "--stride"];
    let (tight, wide) =
        (perplexity(&[&short[..], &["16"]].concat()), perplexity(&[&short[..], &["64"]].concat()));
    assert_eq!(whole.0, tight.0);
    assert!(wide.0 < whole.0, "disjoint windows cannot predict their first tokens");
    assert!(whole.1 < tight.1 && tight.1 < wide.1, "{whole:?} {tight:?} {wide:?}");
}

#[test]
fn completions_name_the_commands() {
    for shell in ["bash", "zsh", "fish"] {
        let script = tinyserve(&["completions", shell]).done();
        assert!(script.contains("tokenize") && script.contains("selection-ratio"));
    }
}

#[test]
fn inspect_fits_pages_into_the_memory_there_is() {
    let object = words("inspect --json --target-memory-gb 0.5 --weights int8").json();
    let plan = &object["memory"];
    let size = |name: &str| plan[name].as_u64().unwrap();
    assert_eq!((size("target_bytes"), object["weights"].as_str()), (500_000_000, Some("int8")));
    assert!(size("weight_bytes") < object["weight_bytes"].as_u64().unwrap() / 3);
    let page = (size("kv_bytes") + size("box_bytes")) / size("pages");
    let fixed = size("process_bytes") + size("weight_bytes") + size("scratch_bytes");
    let rest = 500_000_000 - fixed;
    assert_eq!(size("pages_that_fit"), rest / page);
    assert_eq!(size("tokens_that_fit"), 16 * size("pages_that_fit"));
    // The built-in model's context is shorter than what fits: there is room for 16 of the longest.
    assert_eq!((size("longest_context"), size("pages")), (512, 16 * 32));
    let formats = plan["formats"].as_array().unwrap();
    let f16 = formats.iter().find(|format| format["kv_cache_dtype"] == "f16").unwrap();
    assert_eq!(f16["bytes_per_token"], 5 * 4 * 8 * 2 * 2);
    let text = words("inspect --target-memory-gb 0.5 --weights int8").done();
    for part in ["476.84 MiB", "longest context 512 tokens", "boxes/page", "int8"] {
        assert!(text.contains(part), "{part:?} is not in {text}");
    }
    // What does not fit is said, and the rest is shown.
    let small = words("inspect --json --target-memory-gb 0.001").json();
    let error = small["memory"]["error"].as_str().unwrap();
    assert!(error.contains("target_memory_gb is 0.001"), "{error}");
}

#[test]
fn run_keeps_to_its_plan() {
    let object = words("run -p Once -n 4 --temperature 0 --json").json();
    let memory = &object["memory"];
    let [planned, resident] =
        ["planned_bytes", "resident_bytes"].map(|name| memory[name].as_u64().unwrap());
    assert!(resident as f64 <= 1.05 * planned as f64, "{memory}");
    words("run -p Once --target-memory-gb 0.001")
        .refused_with(1, &["target_memory_gb", "expected"]);
    words("run -p Once --target-memory-gb 0").refused_with(1, &["target_memory_gb", "expected"]);
}
