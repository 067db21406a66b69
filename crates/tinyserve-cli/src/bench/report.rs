//! Rows of a benchmark, in llama-bench's words.

use std::fmt::Write;
use std::time::Duration;

use serde::Serialize;
use serde_json::Value;
use tinyserve::kernels::{AttendStats, Profile, SelectionTimes};

use super::runner::Sample;
use super::statistics::{deviation, mean, median};
use crate::units::{bytes, percent, short_count};

/// What all rows of one invocation share.
#[derive(Debug, Clone, Serialize)]
pub(super) struct Setup {
    pub(super) model: String,
    pub(super) model_size: u64,
    pub(super) model_n_params: u64,
    pub(super) weights: &'static str,
    /// Most prompt tokens of one prefill step.
    pub(super) n_ubatch: usize,
    pub(super) device: String,
    pub(super) n_threads: usize,
    /// Instruction set of the CPU, where it computes.
    pub(super) cpu_path: Option<&'static str>,
    pub(super) kv_cache_dtype: &'static str,
    pub(super) page_size: usize,
    pub(super) depth_fill: &'static str,
    /// Bytes of the whole cache, which are committed as they are written.
    pub(super) kv_bytes: u64,
    /// Most bytes that the plan of weights, activations, cache and program has resident; of a device of its
    /// own, without the program.
    pub(super) planned_bytes: u64,
    /// Bytes of weights that every step reads.
    #[serde(skip)]
    pub(super) streamed_bytes: u64,
}

/// What one test runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub(super) struct Test {
    /// Prompt tokens of a prefill test, or 0.
    pub(super) n_prompt: usize,
    /// Decode steps of a decode test, or 0.
    pub(super) n_gen: usize,
    /// Tokens in the cache of each sequence before.
    pub(super) n_depth: usize,
    /// Sequences that run together.
    pub(super) n_batch: usize,
}

impl Test {
    /// Tokens that a run computes for each sequence.
    pub(super) fn tokens(self) -> usize {
        self.n_prompt + self.n_gen
    }

    /// The name in a table: `pp512`, `tg128 @ d4096`.
    fn name(self) -> String {
        let what = match self.n_gen {
            0 => format!("pp{}", self.n_prompt),
            n => format!("tg{n}"),
        };
        let batch = if self.n_batch == 1 { String::new() } else { format!(" x{}", self.n_batch) };
        let depth = if self.n_depth == 0 { String::new() } else { format!(" @ d{}", self.n_depth) };
        format!("{what}{batch}{depth}")
    }
}

/// What a decode step spends its time on, in nanoseconds, from a run of its own.
#[derive(Debug, Clone, Copy, Serialize)]
pub(super) struct StepSplit {
    /// Products with the weights.
    weights_ns: u64,
    /// Scoring the boxes of pages.
    score_ns: u64,
    /// Turning scores into page lists.
    select_ns: u64,
    /// Attention over the pages that are read.
    attend_ns: u64,
    /// Norms, rotary embedding, activations, appending to the cache, sampling.
    rest_ns: u64,
}

impl StepSplit {
    pub(super) fn new(
        steps: usize,
        (elapsed, profile, choice): (Duration, Profile, SelectionTimes),
    ) -> Self {
        let per_step = |time: Duration| time.as_nanos() as u64 / steps as u64;
        let rest = elapsed.saturating_sub(profile.linear + profile.attend);
        Self {
            weights_ns: per_step(profile.linear),
            score_ns: per_step(choice.score),
            select_ns: per_step(choice.select),
            attend_ns: per_step(profile.attend.saturating_sub(choice.score + choice.select)),
            rest_ns: per_step(rest),
        }
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
    /// Share of the pages that steps which select may read.
    selection_ratio: Option<f64>,
    avg_ns: u64,
    stddev_ns: u64,
    avg_ts: f64,
    stddev_ts: f64,
    samples_ns: Vec<u64>,
    samples_ts: Vec<f64>,
    bytes_read_ratio: Option<f64>,
    /// Median speed over that of the first attention mode of the same test.
    median_ts_ratio: Option<f64>,
    /// Bytes of weights, keys, values and boxes that a decoded token has to read.
    bytes_per_token: Option<f64>,
    read_bandwidth_gb_s: Option<f64>,
    /// The time that reading those bytes takes at that bandwidth, over the median time.
    roofline_fraction: Option<f64>,
    step_split: Option<StepSplit>,
    rss_bytes: Option<u64>,
}

impl Row {
    pub(super) fn new(
        setup: &Setup,
        test: Test,
        (attention, selection_ratio): (&'static str, Option<f64>),
        (samples, step_split): (&[Sample], Option<StepSplit>),
        rss_bytes: Option<u64>,
    ) -> Self {
        let all = (test.n_batch * test.tokens()) as f64;
        let step_bytes = |stats: &AttendStats| {
            setup.streamed_bytes as f64 + stats.bytes_read as f64 / test.n_gen as f64
        };
        let seconds: Vec<_> = samples.iter().map(|sample| sample.elapsed.as_secs_f64()).collect();
        let samples_ns: Vec<_> =
            samples.iter().map(|sample| sample.elapsed.as_nanos() as u64).collect();
        let samples_ts: Vec<_> = seconds.iter().map(|s| all / s).collect();
        Self {
            setup: setup.clone(),
            test,
            attention,
            selection_ratio,
            avg_ns: (mean(&seconds) * 1e9).round() as u64,
            stddev_ns: (deviation(&seconds) * 1e9).round() as u64,
            avg_ts: mean(&samples_ts),
            stddev_ts: deviation(&samples_ts),
            samples_ns,
            samples_ts,
            // Every run of a test reads the same pages, up to what the keys of its tokens select.
            bytes_read_ratio: samples.last().and_then(|sample| sample.stats.bytes_ratio()),
            median_ts_ratio: None,
            // A prompt is bound by arithmetic: its tokens share what they read.
            bytes_per_token: samples
                .last()
                .filter(|_| test.n_gen > 0)
                .map(|sample| step_bytes(&sample.stats) / test.n_batch as f64),
            read_bandwidth_gb_s: None,
            roofline_fraction: None,
            step_split,
            rss_bytes,
        }
    }

    /// Holds it to the bytes per second that the machine reads.
    pub(super) fn hold_to(&mut self, bandwidth: f64) {
        self.read_bandwidth_gb_s = Some(bandwidth / 1e9);
        let speed = median(&self.samples_ts);
        self.roofline_fraction = self.bytes_per_token.map(|bytes| bytes * speed / bandwidth);
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
    let mut text = "| model | size | params | cpu | threads | kv | page | attention | fill | test \
                    | t/s | KV read | of bandwidth |\n\
                    | --- | ---: | ---: | --- | ---: | --- | ---: | --- | --- | ---: | ---: | ---: \
                    | ---: |\n"
        .to_owned();
    for row in rows {
        let setup = &row.setup;
        let share = |share: Option<f64>| share.map_or("—".to_owned(), percent);
        let (read, roofline) = (share(row.bytes_read_ratio), share(row.roofline_fraction));
        let fill = if row.test.n_depth == 0 { "—" } else { setup.depth_fill };
        let _ = writeln!(
            text,
            "| {} {} | {} | {} | {} | {} | {} | {} | {} | {fill} | {} \
             | {:.2} ± {:.2} | {read} | {roofline} |",
            setup.model,
            setup.weights,
            bytes(setup.model_size),
            short_count(setup.model_n_params),
            setup.cpu_path.unwrap_or(&setup.device),
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

/// Columns of CSV: every field that is neither a list nor an object.
const COLUMNS: [&str; 29] = [
    "model",
    "model_size",
    "model_n_params",
    "weights",
    "device",
    "cpu_path",
    "n_threads",
    "n_batch",
    "n_ubatch",
    "kv_cache_dtype",
    "page_size",
    "depth_fill",
    "kv_bytes",
    "planned_bytes",
    "attention",
    "selection_ratio",
    "n_prompt",
    "n_gen",
    "n_depth",
    "avg_ns",
    "stddev_ns",
    "avg_ts",
    "stddev_ts",
    "bytes_read_ratio",
    "median_ts_ratio",
    "bytes_per_token",
    "read_bandwidth_gb_s",
    "roofline_fraction",
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

/// Rows of which every field is a column.
pub(super) fn table(rows: &[impl Serialize]) -> serde_json::Result<String> {
    let mut text = String::new();
    for row in rows {
        let Value::Object(fields) = serde_json::to_value(row)? else { continue };
        if text.is_empty() {
            text += &(fields.keys().map(String::as_str).collect::<Vec<_>>().join(",") + "\n");
        }
        text += &(fields.values().map(cell).collect::<Vec<_>>().join(",") + "\n");
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
    use super::*;

    fn row(test: Test, attention: &'static str, milliseconds: &[u64]) -> Row {
        let setup = Setup {
            model: "a \"b\"".to_owned(),
            model_size: 1 << 20,
            model_n_params: 500_000,
            weights: "f16",
            n_ubatch: 256,
            n_threads: 2,
            device: "cpu".to_owned(),
            cpu_path: Some("avx2"),
            kv_cache_dtype: "f16",
            page_size: 16,
            depth_fill: "synthetic",
            kv_bytes: 1 << 30,
            planned_bytes: 0,
            streamed_bytes: 1_000_000,
        };
        let stats = AttendStats { bytes_read: 100, bytes_dense: 400, ..AttendStats::default() };
        let sample = |&ms: &u64| Sample { elapsed: Duration::from_millis(ms), stats };
        Row::new(
            &setup,
            test,
            (attention, None),
            (&milliseconds.iter().map(sample).collect::<Vec<_>>(), None),
            None,
        )
    }

    #[test]
    fn rows_say_what_was_measured() {
        let test = Test { n_prompt: 0, n_gen: 100, n_depth: 4096, n_batch: 2 };
        let first = row(test, "dense", &[100, 200, 100]);
        let mut second = row(test, "sparse", &[50, 50, 50]);
        second.compare(&first);
        assert_eq!(first.avg_ts, (2000.0 + 1000.0 + 2000.0) / 3.0);
        assert_eq!((second.avg_ns, second.stddev_ns), (50_000_000, 0));
        assert_eq!(second.median_ts_ratio, Some(2.0));
        assert!(second.comparison(&first).unwrap().contains("2.000 times as fast as dense"));
        // 100 steps in 50 ms, each a megabyte and a byte: twice a bandwidth of 1 GB/s.
        second.hold_to(1e9);
        assert_eq!(second.bytes_per_token, Some(500_000.5));
        assert!((second.roofline_fraction.unwrap() - 2.0).abs() < 1e-4);
        let table = markdown(&[first.clone(), second.clone()]);
        assert_eq!(table.lines().count(), 4);
        assert!(
            table.contains("| synthetic | tg100 x2 @ d4096 | 4000.00 ± 0.00 | 25.0 % | 200.0 % |"),
            "{table}"
        );
        let fields = serde_json::to_value(&first).unwrap();
        let fields = fields.as_object().unwrap();
        assert!(
            fields
                .iter()
                .all(|(k, v)| v.is_array() || k == "step_split" || COLUMNS.contains(&k.as_str()))
        );
        assert!(COLUMNS.iter().all(|column| fields.contains_key(*column)));
        let table = csv(&[first, second]).unwrap();
        let lines: Vec<_> = table.lines().collect();
        assert_eq!(lines.len(), 3);
        assert!(table.contains("\"a \"\"b\"\"\""), "{table}");
        assert!(lines[0].starts_with("model,"), "{table}");
    }
}
