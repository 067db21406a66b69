//! Rows of a benchmark, in llama-bench's words.

use std::fmt::Write;

use serde::Serialize;
use serde_json::Value;

use super::runner::Sample;
use super::statistics::{deviation, mean, median};
use crate::units::{bytes, percent, short_count};

/// What all rows of one invocation share.
#[derive(Debug, Clone, Serialize)]
pub(super) struct Setup {
    pub(super) model: String,
    pub(super) model_size: u64,
    pub(super) model_n_params: u64,
    pub(super) weights_dtype: &'static str,
    pub(super) n_batch: usize,
    pub(super) n_threads: usize,
    pub(super) cpu_path: &'static str,
    pub(super) kv_cache_dtype: &'static str,
    pub(super) page_size: usize,
}

/// What one test runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub(super) struct Test {
    /// Prompt tokens of a prefill test, or 0.
    pub(super) n_prompt: usize,
    /// Decode steps of a decode test, or 0.
    pub(super) n_gen: usize,
    /// Tokens in the cache before.
    pub(super) n_depth: usize,
}

impl Test {
    /// Tokens that a run computes.
    pub(super) fn tokens(self) -> usize {
        self.n_prompt + self.n_gen
    }

    /// The name in a table: `pp512`, `tg128 @ d4096`.
    fn name(self) -> String {
        let what = match self.n_gen {
            0 => format!("pp{}", self.n_prompt),
            n => format!("tg{n}"),
        };
        if self.n_depth == 0 { what } else { format!("{what} @ d{}", self.n_depth) }
    }
}

/// A test and its measurements.
#[derive(Debug, Clone, Serialize)]
pub(super) struct Row {
    #[serde(flatten)]
    setup: Setup,
    #[serde(flatten)]
    test: Test,
    attention: &'static str,
    avg_ns: u64,
    stddev_ns: u64,
    avg_ts: f64,
    stddev_ts: f64,
    samples_ns: Vec<u64>,
    samples_ts: Vec<f64>,
    bytes_read_ratio: Option<f64>,
    /// Median speed over that of the first attention mode of the same test.
    median_ts_ratio: Option<f64>,
    rss_bytes: Option<u64>,
}

impl Row {
    pub(super) fn new(
        setup: &Setup,
        test: Test,
        attention: &'static str,
        samples: &[Sample],
        rss_bytes: Option<u64>,
    ) -> Self {
        let seconds: Vec<_> = samples.iter().map(|sample| sample.elapsed.as_secs_f64()).collect();
        let samples_ns: Vec<_> =
            samples.iter().map(|sample| sample.elapsed.as_nanos() as u64).collect();
        let samples_ts: Vec<_> = seconds.iter().map(|s| test.tokens() as f64 / s).collect();
        Self {
            setup: setup.clone(),
            test,
            attention,
            avg_ns: (mean(&seconds) * 1e9).round() as u64,
            stddev_ns: (deviation(&seconds) * 1e9).round() as u64,
            avg_ts: mean(&samples_ts),
            stddev_ts: deviation(&samples_ts),
            samples_ns,
            samples_ts,
            // Every run of a test reads the same pages, up to what the keys of its tokens select.
            bytes_read_ratio: samples.last().and_then(|sample| sample.stats.bytes_ratio()),
            median_ts_ratio: None,
            rss_bytes,
        }
    }

    /// Compares its median with that of `first`, which ran in turns with it.
    pub(super) fn compare(&mut self, first: &Self) {
        self.median_ts_ratio = Some(median(&self.samples_ts) / median(&first.samples_ts));
    }

    /// The comparison in words.
    pub(super) fn comparison(&self, first: &Self) -> Option<String> {
        let ratio = self.median_ts_ratio?;
        let (test, one, other) = (self.test.name(), self.attention, first.attention);
        Some(format!("{test}: {one} is {ratio:.3} times as fast as {other} (medians)"))
    }
}

/// The rows as a Markdown table like llama-bench's.
pub(super) fn markdown(rows: &[Row]) -> String {
    let mut text = "| model | size | params | cpu | threads | kv | page | attention | test \
                    | t/s | bytes read |\n\
                    | --- | ---: | ---: | --- | ---: | --- | ---: | --- | ---: | ---: | ---: |\n"
        .to_owned();
    for row in rows {
        let setup = &row.setup;
        let read = row.bytes_read_ratio.map_or("—".to_owned(), percent);
        let _ = writeln!(
            text,
            "| {} {} | {} | {} | {} | {} | {} | {} | {} | {} | {:.2} ± {:.2} | {read} |",
            setup.model,
            setup.weights_dtype,
            bytes(setup.model_size),
            short_count(setup.model_n_params),
            setup.cpu_path,
            setup.n_threads,
            setup.kv_cache_dtype,
            setup.page_size,
            row.attention,
            row.test.name(),
            row.avg_ts,
            row.stddev_ts,
        );
    }
    text
}

/// Columns of CSV: every field that is no list.
const COLUMNS: [&str; 20] = [
    "model",
    "model_size",
    "model_n_params",
    "weights_dtype",
    "cpu_path",
    "n_threads",
    "n_batch",
    "kv_cache_dtype",
    "page_size",
    "attention",
    "n_prompt",
    "n_gen",
    "n_depth",
    "avg_ns",
    "stddev_ns",
    "avg_ts",
    "stddev_ts",
    "bytes_read_ratio",
    "median_ts_ratio",
    "rss_bytes",
];

/// The rows as CSV with a header; the samples, which are lists, are left to JSON.
pub(super) fn csv(rows: &[Row]) -> serde_json::Result<String> {
    let mut text = COLUMNS.join(",") + "\n";
    for row in rows {
        let row = serde_json::to_value(row)?;
        text += &(COLUMNS.map(|column| cell(&row[column])).join(",") + "\n");
    }
    Ok(text)
}

fn cell(value: &Value) -> String {
    match value {
        Value::Null => String::new(),
        Value::String(text) => format!("\"{}\"", text.replace('"', "\"\"")),
        other => other.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use tinyserve::kernels::AttendStats;

    use super::*;

    fn row(test: Test, attention: &'static str, milliseconds: &[u64]) -> Row {
        let setup = Setup {
            model: "a \"b\"".to_owned(),
            model_size: 1 << 20,
            model_n_params: 500_000,
            weights_dtype: "f16",
            n_batch: 256,
            n_threads: 2,
            cpu_path: "avx2",
            kv_cache_dtype: "f16",
            page_size: 16,
        };
        let stats = AttendStats { bytes_read: 1, bytes_dense: 4, ..AttendStats::default() };
        let sample = |&ms: &u64| Sample { elapsed: Duration::from_millis(ms), stats };
        Row::new(
            &setup,
            test,
            attention,
            &milliseconds.iter().map(sample).collect::<Vec<_>>(),
            None,
        )
    }

    #[test]
    fn rows_say_what_was_measured() {
        let test = Test { n_prompt: 0, n_gen: 100, n_depth: 4096 };
        let first = row(test, "dense", &[100, 200, 100]);
        let mut second = row(test, "sparse", &[50, 50, 50]);
        second.compare(&first);
        assert_eq!(first.avg_ts, (1000.0 + 500.0 + 1000.0) / 3.0);
        assert_eq!((second.avg_ns, second.stddev_ns), (50_000_000, 0));
        assert_eq!(second.median_ts_ratio, Some(2.0));
        assert!(second.comparison(&first).unwrap().contains("2.000 times as fast as dense"));
        let table = markdown(&[first.clone(), second.clone()]);
        assert_eq!(table.lines().count(), 4);
        assert!(table.contains("| tg100 @ d4096 | 2000.00 ± 0.00 | 25.0 % |"), "{table}");
        let fields = serde_json::to_value(&first).unwrap();
        let fields = fields.as_object().unwrap();
        assert!(fields.iter().all(|(k, v)| v.is_array() || COLUMNS.contains(&k.as_str())));
        assert!(COLUMNS.iter().all(|column| fields.contains_key(*column)));
        let table = csv(&[first, second]).unwrap();
        let lines: Vec<_> = table.lines().collect();
        assert_eq!(lines.len(), 3);
        assert!(table.contains("\"a \"\"b\"\"\""), "{table}");
        assert!(lines[0].starts_with("model,"), "{table}");
    }
}
