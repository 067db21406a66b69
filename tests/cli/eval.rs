//! `eval`: policies beside dense attention, and how mistakes are answered.

use std::path::PathBuf;

use serde_json::Value;
use tempfile::TempDir;
use tinyserve_model::{InductionGeometry, InductionModel};

use crate::binary::{text, tinyserve, words};

/// A folder with the model that looks things up.
fn induction() -> (TempDir, PathBuf) {
    let home = tempfile::tempdir().unwrap();
    let folder = home.path().join("induction");
    std::fs::create_dir(&folder).unwrap();
    InductionModel::new(InductionGeometry::Outlier).write(&folder).unwrap();
    (home, folder)
}

fn story(home: &TempDir) -> PathBuf {
    let file = home.path().join("story.txt");
    let story = "Once upon a time there was a little girl named Lily. She loved to play outside \
                 with her dog. One day they went to the park and saw a big red ball. ";
    std::fs::write(&file, story.repeat(12)).unwrap();
    file
}

fn number(row: &Value, field: &str) -> f64 {
    row[field].as_f64().unwrap_or_else(|| panic!("{field} of {row}"))
}

#[test]
fn needles_are_found_by_policy_and_drawn() {
    let (home, model) = induction();
    let (plot, map) = (home.path().join("plot.svg"), home.path().join("map.svg"));
    let args = "--context 512,1k --policies dense,box,streaming --token-budget 64 --samples 16 \
                --seed 3 --dense-layers 0 --json";
    let mut all =
        vec!["eval", "needle", text(&model), "--plot", text(&plot), "--heat-map", text(&map)];
    all.extend(args.split_whitespace());
    let rows = tinyserve(&all).json();
    let rows = rows.as_array().unwrap();
    let names: Vec<_> = rows.iter().map(|row| row["policy"].as_str().unwrap()).collect();
    assert_eq!(names, ["dense", "box", "streaming", "dense", "box", "streaming"]);
    for (i, row) in rows.iter().enumerate() {
        assert_eq!(row["context"], if i < 3 { 512 } else { 1024 });
        assert_eq!(row["samples"], 16);
        let depths: f64 =
            row["depths"].as_array().unwrap().iter().map(|cell| number(cell, "samples")).sum();
        assert_eq!(depths, 16.0);
        match row["policy"].as_str().unwrap() {
            "streaming" => assert!(number(row, "accuracy") < 0.5, "{row}"),
            _ => assert_eq!(row["accuracy"], 1.0, "{row}"),
        }
    }
    assert_eq!(rows[0]["bytes_read_ratio"], 1.0);
    assert!(number(&rows[4], "bytes_read_ratio") < 0.2);
    for picture in [&plot, &map] {
        let svg = std::fs::read_to_string(picture).unwrap();
        assert!(
            svg.starts_with("<svg")
                && svg.contains("streaming")
                && svg.trim_end().ends_with("</svg>")
        );
    }
    // The same seed asks the same; the text of the table is the same rows.
    assert_eq!(tinyserve(&all).json(), Value::from(rows.clone()));
    let table = tinyserve(&all[..all.len() - 1]).done();
    assert_eq!(table.lines().count(), 2 + rows.len());
    assert!(table.contains("| box | 64 | 512 | 100.0 % | 16 |"), "{table}");
}

#[test]
fn pass_keys_can_hide_in_running_text() {
    let few = words("eval needle --context 400 --pairs 17 --policies dense").refused(2);
    assert!(few.contains("--pairs is 17") && few.contains("1 to 16 names"), "{few}");
    let short = words("eval needle --context 40 --pairs 2 --policies dense").refused(2);
    assert!(short.contains("--context is 40"), "{short}");
    let flags = "eval needle --context 400 --pairs 2 --samples 4 --policies dense,random \
                 --dense-layers 0 --json";
    let rows = words(flags).json();
    assert_eq!(rows[0]["samples"], 4, "{rows}");
    assert_eq!(rows[0]["pairs"], 2);
}

#[test]
fn predictions_through_policies_are_held_against_dense_ones() {
    let (home, _) = induction();
    let file = story(&home);
    let flags = "--policies dense,box,oracle-mass,streaming --selection-ratio 0.2,0.999 \
                 --dense-layers 0 --window 256 --prefix 128 --samples 2 --sink-pages 0 --json";
    let rows = |command: &str| {
        let mut args = vec!["eval", command, "--text-file", text(&file)];
        args.extend(flags.split_whitespace());
        tinyserve(&args).json()
    };
    let perplexity = rows("perplexity");
    assert_eq!(perplexity, rows("kl"), "two views of one test");
    let rows = perplexity.as_array().unwrap();
    assert_eq!(rows.len(), 7, "dense once, the others with each budget");
    let dense = &rows[0];
    assert_eq!((&dense["kl_mean"], &dense["top1_agreement"]), (&0.0.into(), &1.0.into()));
    assert_eq!(dense["tokens"], 2 * 127);
    assert!((number(dense, "perplexity") - number(dense, "nll_mean").exp()).abs() < 1e-9);
    for pair in rows[1..].chunks(2) {
        assert!(number(&pair[0], "bytes_read_ratio") < number(&pair[1], "bytes_read_ratio"));
        assert!(number(&pair[0], "kl_mean") > number(&pair[1], "kl_mean"), "{pair:?}");
    }
    let kl = |i: usize| number(&rows[i], "kl_mean");
    assert!(kl(3) < kl(5), "the oracle of mass is nearer than a window: {} {}", kl(3), kl(5));
}

#[test]
fn the_divergence_of_codes_is_from_dense_attention_over_floats() {
    let home = tempfile::tempdir().unwrap();
    let file = story(&home);
    let kl = |dtype: &str, reference: &[&str]| {
        let mut args = vec!["eval", "kl", "--text-file", text(&file), "--kv-cache-dtype", dtype];
        args.extend(reference);
        args.extend("--policies dense --window 128 --samples 1 --json".split_whitespace());
        let rows = tinyserve(&args).json();
        assert_eq!(rows[0]["kv_cache_dtype"], dtype);
        number(&rows[0], "kl_mean")
    };
    let from_f32 = |dtype| kl(dtype, &["--reference-kv-cache-dtype", "f32"]);
    assert_eq!((from_f32("f32"), kl("int4", &[])), (0.0, 0.0));
    let [f16, int8, int4] = ["f16", "int8", "int4"].map(from_f32);
    assert!(f16 < int8 && int8 < int4 && int4 < 0.1, "{f16} {int8} {int4}");
}

#[test]
fn recall_is_told_by_layer_and_head() {
    let (home, _) = induction();
    let file = story(&home);
    let plot = home.path().join("recall.svg");
    let mut args = vec!["eval", "recall", "--text-file", text(&file), "--plot", text(&plot)];
    args.extend(
        "--policies dense,box,oracle-mass,random --token-budget 64 --dense-layers 1 --context 256 \
         --steps 8 --group-reduce softmax-vote --json"
            .split_whitespace(),
    );
    let rows = tinyserve(&args).json();
    let rows = rows.as_array().unwrap();
    // Five layers of four KV heads.
    assert_eq!(rows.len(), 4 * 5 * 4);
    let mean = |policy: &str| {
        let selected = rows.iter().filter(|row| row["policy"] == policy && row["layer"] != 0);
        let recalls: Vec<_> = selected.map(|row| number(row, "recall")).collect();
        recalls.iter().sum::<f64>() / recalls.len() as f64
    };
    assert!((mean("dense") - 1.0).abs() < 1e-5);
    assert!(mean("oracle-mass") > mean("box") && mean("box") > mean("random"));
    for row in rows.iter().filter(|row| row["layer"] == 0) {
        assert!((number(row, "recall") - 1.0).abs() < 1e-5, "a dense layer: {row}");
    }
    assert!(std::fs::read_to_string(plot).unwrap().contains("oracle-mass"));
}

#[test]
fn mistakes_are_answered_with_what_would_do() {
    let (home, model) = induction();
    let file = story(&home);
    let refused = |args: &str, words: &[&str]| {
        let mut all: Vec<_> = args.split_whitespace().collect();
        for arg in &mut all {
            *arg = match *arg {
                "MODEL" => text(&model),
                "FILE" => text(&file),
                arg => arg,
            };
        }
        let stderr = tinyserve(&all).refused(2);
        for word in words {
            assert!(stderr.contains(word), "{args}: {word:?} is not in {stderr:?}");
        }
    };
    let needle = "eval needle MODEL --dense-layers 0 --policies";
    refused(&format!("{needle} bocks"), &["bocks", "cuboid-mean", "snapkv"]);
    refused("eval needle MODEL", &["--policies is missing", "dense, box"]);
    refused("eval needle MODEL --policies box", &["--dense-layers is 2", "the model's 2 layers"]);
    refused(&format!("{needle} box --token-budget 0"), &["--token-budget is 0"]);
    refused(&format!("{needle} box --selection-ratio 1.5"), &["--selection-ratio is 1.5"]);
    refused(&format!("{needle} box --top-p-pages -1"), &["--top-p-pages is -1"]);
    refused(&format!("{needle} box --context 256k"), &["--context is 262144", "131072"]);
    refused(&format!("{needle} box --context 100"), &["--context is 100", "at least"]);
    refused(&format!("{needle} box --pairs 65"), &["--pairs is 65", "1 to 64"]);
    refused(&format!("{needle} box --samples 0"), &["--samples is 0"]);
    refused(&format!("{needle} box --plot x.png"), &["--plot is x.png", ".svg"]);
    let nowhere = words("eval needle --policies dense --heat-map no/such/map.svg");
    nowhere.refused_with(1, &["no/such/map.svg cannot be written", "no/such is no folder"]);
    refused(&format!("{needle} box --observe 8"), &["--observe", "h2o and snapkv"]);
    refused(&format!("{needle} box --reselect-interval 0"), &["--reselect-interval is 0"]);
    refused(&format!("{needle} box --text-file FILE"), &["--text-file", "lookup.json"]);
    refused("eval needle --policies dense --context 512 --near-keys 3", &["--near-keys is 3"]);
    let text_test = "eval perplexity --text-file FILE";
    refused(&format!("{text_test} --token-budget 64"), &["--token-budget", "without --policies"]);
    refused(&format!("{text_test} --plot a.svg"), &["--plot", "without --policies"]);
    refused(&format!("{text_test} --policies box --stride 4"), &["--stride", "--window"]);
    refused(&format!("{text_test} --policies box --window 1k"), &["--window is 1024", "512"]);
    refused(&format!("{text_test} --policies box --prefix 512"), &["--prefix is 512", "1 to 510"]);
    refused("eval recall --text-file FILE --policies box --steps 0", &["--steps is 0"]);
    std::fs::write(model.join("lookup.json"), "{\"keys\": [9999]").unwrap();
    let broken = tinyserve(&["eval", "needle", text(&model), "--policies", "dense"]).refused(1);
    assert!(broken.contains("lookup.json"), "{broken}");
}
