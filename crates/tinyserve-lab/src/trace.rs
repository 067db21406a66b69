//! The file of a run: which pages each layer and head read at each step.
//!
//! Format, version 2: a gzip stream of JSON, one object a line.
//!
//! The first line is the header: `{"format":"tinyserve-trace","version":2,"model":…,"policy":…,
//! "page_size":…,"layers":…,"kv_heads":…,"q_heads":…,"prompt_tokens":…,"step_split_ns":[…]}`.
//! Each other line is one step: `{"tokens":…,"bytes_read":…,"bytes_dense":…,"heads":[…]}`, with one
//! object of `heads` for each layer and KV head that was watched; its fields are those of [`Seen`].
//! Masses and scores are rounded to four digits after the point, so that they compress.
//! Version 1 had no scores.

use std::fs::File;
use std::io::{BufRead, BufReader, BufWriter, Write};
use std::path::Path;

use flate2::Compression;
use flate2::read::GzDecoder;
use flate2::write::GzEncoder;
use serde::{Deserialize, Serialize};

use crate::{LabError, Seen};

/// The version that is written and read.
pub const TRACE_VERSION: u32 = 2;
const FORMAT: &str = "tinyserve-trace";

/// What all steps of a trace share.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct TraceHeader {
    /// Always `tinyserve-trace`.
    pub format: String,
    /// [`TRACE_VERSION`] when it was written.
    pub version: u32,
    /// The model's name.
    pub model: String,
    /// The method and its budget, in words.
    pub policy: String,
    /// Tokens of one page.
    pub page_size: usize,
    /// Layers of the model.
    pub layers: usize,
    /// KV heads of a layer.
    pub kv_heads: usize,
    /// Query heads of a layer.
    pub q_heads: usize,
    /// Tokens that were read before the first step.
    pub prompt_tokens: usize,
    /// Where the time of a decode step goes without anybody watching, in nanoseconds:
    /// matrix products, attention with selection, everything else.
    pub step_split_ns: [u64; 3],
}

impl TraceHeader {
    /// The value of [`Self::format`].
    #[must_use]
    pub fn format_name() -> String {
        FORMAT.to_owned()
    }
}

/// One step of a trace.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct TraceStep {
    /// Tokens of the sequence, the newest included.
    pub tokens: usize,
    /// KV bytes that were read.
    pub bytes_read: u64,
    /// KV bytes that dense attention reads.
    pub bytes_dense: u64,
    /// What was seen in each layer and KV head.
    pub heads: Vec<Seen>,
}

/// A run.
#[derive(Debug, Clone, PartialEq)]
pub struct Trace {
    /// What all steps share.
    pub header: TraceHeader,
    /// The steps, in order.
    pub steps: Vec<TraceStep>,
}

impl Trace {
    /// Writes the file.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn write(&self, path: &Path) -> Result<(), LabError> {
        let wrong = |error: &dyn std::fmt::Display| file_error(path, error, "a writable file");
        let file = File::create(path).map_err(|error| wrong(&error))?;
        let mut out = GzEncoder::new(BufWriter::new(file), Compression::default());
        let mut line = |json: serde_json::Result<String>| {
            let json = json.map_err(|error| wrong(&error))?;
            writeln!(out, "{json}").map_err(|error| wrong(&error))
        };
        line(serde_json::to_string(&self.header))?;
        for step in &self.steps {
            let mut step = step.clone();
            step.heads.iter_mut().for_each(round);
            line(serde_json::to_string(&step))?;
        }
        let file = out.finish().map_err(|error| wrong(&error))?;
        file.into_inner().map(|_| ()).map_err(|error| wrong(&error))
    }

    /// Reads a file.
    ///
    /// # Errors
    /// When it cannot be read, is no trace, is of another version, or ends too early.
    pub fn read(path: &Path) -> Result<Self, LabError> {
        let expected = format!("a trace of version {TRACE_VERSION}");
        let wrong = |found: &dyn std::fmt::Display| file_error(path, found, &expected);
        let file = File::open(path).map_err(|error| wrong(&error))?;
        let mut lines = BufReader::new(GzDecoder::new(BufReader::new(file))).lines();
        let first = lines.next().unwrap_or_else(|| Ok(String::new()));
        let first = first.map_err(|error| wrong(&error))?;
        // Another version may have other fields: it is looked at first.
        let value: serde_json::Value =
            serde_json::from_str(&first).map_err(|_| wrong(&"something else"))?;
        if value["format"] != FORMAT {
            return Err(wrong(&"something else"));
        }
        if value["version"] != TRACE_VERSION {
            return Err(wrong(&format!("a trace of version {}", value["version"])));
        }
        let header: TraceHeader = serde_json::from_value(value).map_err(|error| wrong(&error))?;
        if header.page_size == 0 {
            return Err(wrong(&"one of pages of 0 tokens"));
        }
        let mut steps = Vec::new();
        for (i, line) in lines.enumerate() {
            let line = line.map_err(|error| wrong(&format!("{error} in step {i}")))?;
            let step: TraceStep = serde_json::from_str(&line)
                .map_err(|error| wrong(&format!("{error} in step {i}")))?;
            let fits = step.heads.iter().all(|seen| {
                let pages = seen.tokens.div_ceil(header.page_size);
                let listed = seen.pages.iter().flatten().all(|&page| (page as usize) < pages);
                let scored = seen.scores.as_ref().is_none_or(|scores| {
                    seen.pages.as_ref().is_some_and(|pages| pages.len() == scores.len())
                });
                listed
                    && scored
                    && seen.page_mass.len() == pages
                    && seen.layer < header.layers
                    && seen.kv_head < header.kv_heads
            });
            if !fits {
                return Err(wrong(&format!("pages or heads beyond the model's in step {i}")));
            }
            steps.push(step);
        }
        Ok(Self { header, steps })
    }
}

fn round(seen: &mut Seen) {
    let Seen { scores, mass, entropy, page_mass, best_curve, score_curve, .. } = seen;
    let scores = scores.iter_mut().flatten().flatten();
    let masses = [mass, entropy, page_mass, best_curve].into_iter().flatten();
    for x in masses.chain(score_curve.iter_mut().flatten()).chain(scores) {
        // What is too large for digits after the point stays as it is.
        let rounded = (*x * 1e4).round() / 1e4;
        *x = if rounded.is_finite() { rounded } else { *x };
    }
}

fn file_error(path: &Path, found: &dyn std::fmt::Display, expected: &str) -> LabError {
    LabError::File {
        file: path.display().to_string(),
        found: found.to_string(),
        expected: expected.to_owned(),
    }
}
