//! `bench latency`: rows that hold together.

use serde_json::Value;

use crate::binary::{tinyserve, words};

fn rows(args: &str) -> Vec<Value> {
    let rows = words(&format!("bench latency -o json {args}")).json();
    rows.as_array().expect("an array of rows").clone()
}

fn number(row: &Value, name: &str) -> f64 {
    row[name].as_f64().unwrap_or_else(|| panic!("{name} of {row}"))
}

#[test]
fn quantised_weights_are_smaller_and_say_so() {
    let size = |weights: &str| {
        let args = ["bench", "latency", "-p", "8", "-n", "0", "-r", "1", "-o", "json", "--weights"];
        let rows = tinyserve(&[&args[..], &[weights]].concat()).json();
        assert_eq!(rows[0]["weights_dtype"], weights);
        rows[0]["model_size"].as_u64().unwrap()
    };
    let (stored, int8, int4) = (size("f32"), size("int8"), size("int4"));
    assert!(int4 < int8 && 3 * int8 < stored, "{stored} {int8} {int4}");
}

#[test]
fn rows_hold_together() {
    let rows = rows("-p 32,64 -n 8 -d 0,100 -r 3 -t 1");
    let sizes = |row: &Value| {
        ["n_prompt", "n_gen", "n_depth"].map(|name| row[name].as_u64().expect("a size"))
    };
    let found: Vec<_> = rows.iter().map(sizes).collect();
    let expected = [[32, 0, 0], [64, 0, 0], [0, 8, 0], [32, 0, 100], [64, 0, 100], [0, 8, 100]];
    assert_eq!(found, expected);
    for row in &rows {
        assert_eq!(row["model"], "builtin:stories260k");
        assert_eq!(row["model_n_params"], 260_032);
        assert_eq!(row["model_size"], 4 * 260_032);
        assert_eq!((&row["weights_dtype"], &row["kv_cache_dtype"]), (&"f32".into(), &"f32".into()));
        assert_eq!((&row["n_threads"], &row["n_batch"]), (&1.into(), &256.into()));
        assert_eq!(row["page_size"], 16);
        assert!(row["cpu_path"].is_string() && row["attention"].is_string());
        assert_eq!(row["bytes_read_ratio"], 1.0);
        let tokens = (sizes(row)[0] + sizes(row)[1]) as f64;
        let ns: Vec<_> = row["samples_ns"].as_array().unwrap().iter().collect();
        let ts: Vec<_> = row["samples_ts"].as_array().unwrap().iter().collect();
        assert_eq!((ns.len(), ts.len()), (3, 3));
        let mut sum = 0.0;
        for (ns, ts) in ns.iter().zip(&ts) {
            let (ns, ts) = (ns.as_f64().unwrap(), ts.as_f64().unwrap());
            assert!((ts * ns / 1e9 / tokens - 1.0).abs() < 1e-3, "{row}");
            sum += ns;
        }
        assert!((number(row, "avg_ns") - sum / 3.0).abs() < 2.0, "{row}");
        assert!(number(row, "avg_ts") > 0.0 && number(row, "stddev_ts") >= 0.0);
        assert!(number(row, "stddev_ns") >= 0.0);
        if cfg!(target_os = "linux") {
            let resident = number(row, "rss_bytes");
            assert!(resident > 1e6 && resident < 100e6, "{resident}");
        }
    }
}

#[test]
fn attention_modes_are_compared() {
    let rows = rows(
        "-p 0 -n 8 -d 256 -r 2 --attention dense,sparse --dense-layers 0 --selection-ratio 0.25",
    );
    assert_eq!(rows.len(), 2);
    assert_eq!((&rows[0]["attention"], &rows[1]["attention"]), (&"dense".into(), &"sparse".into()));
    assert_eq!(number(&rows[0], "bytes_read_ratio"), 1.0);
    // A quarter of the keys and values, and the boxes, a sixteenth of the keys and values.
    let ratio = number(&rows[1], "bytes_read_ratio");
    assert!(ratio > 0.25 && ratio < 0.40, "{ratio}");
    assert_eq!(rows[0]["median_ts_ratio"], Value::Null);
    assert!(number(&rows[1], "median_ts_ratio") > 0.1);
}

#[test]
fn default_sizes_fit_the_context_and_say_so() {
    let ran = words("bench latency -d 448 -r 1 -o json");
    assert!(ran.stderr.contains("-p is 64 at -d 448, not 512"), "{}", ran.stderr);
    assert!(ran.stderr.contains("-n is 64 at -d 448, not 128"), "{}", ran.stderr);
    let rows = ran.json();
    assert_eq!((&rows[0]["n_prompt"], &rows[1]["n_gen"]), (&64.into(), &64.into()));
}

#[test]
fn tables_have_a_row_per_test() {
    let markdown = words("bench latency -p 16 -n 4 -r 1").done();
    let lines: Vec<_> = markdown.lines().collect();
    assert_eq!(lines.len(), 4, "{markdown}");
    assert!(lines[2].contains("| pp16 |") && lines[3].contains("| tg4 |"), "{markdown}");
    assert!(lines.iter().all(|line| line.matches('|').count() == 12), "{markdown}");
    let csv = words("bench latency -p 16 -n 4 -r 1 -o csv").done();
    let lines: Vec<_> = csv.lines().map(|line| line.split(',').count()).collect();
    assert_eq!(lines.len(), 3, "{csv}");
    assert!(lines.iter().all(|&columns| columns == lines[0]), "{csv}");
}

#[test]
fn a_missing_model_is_named() {
    tinyserve(&["bench", "latency", "no/model", "-o", "json"]).refused_with(1, &["no/model"]);
}
