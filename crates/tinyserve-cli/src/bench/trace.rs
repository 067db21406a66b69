//! Arrival times and lengths of real requests, from files.

use std::fs;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, anyhow};
use serde::Deserialize;

/// One request of a trace.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct TraceRow {
    /// From the first request.
    pub(super) at: Duration,
    pub(super) prompt: usize,
    pub(super) tokens: usize,
    /// Which blocks of [`BLOCK`] tokens the prompt consists of: equal numbers, equal tokens. Empty
    /// where the trace does not say.
    pub(super) blocks: Vec<u64>,
}

/// Tokens of a block of Mooncake's traces.
pub(super) const BLOCK: usize = 512;

/// A line of Mooncake's traces (FAST '25): milliseconds, lengths in tokens, blocks.
#[derive(Deserialize)]
struct MooncakeLine {
    timestamp: f64,
    input_length: usize,
    output_length: usize,
    #[serde(default)]
    hash_ids: Vec<u64>,
}

/// Reads a trace of Azure (`.csv` with TIMESTAMP, ContextTokens and GeneratedTokens) or of Mooncake
/// (`.jsonl` with timestamp, `input_length`, `output_length` and `hash_ids`); at most `most` rows.
pub(super) fn read(file: &Path, most: usize) -> Result<Vec<TraceRow>> {
    let place = file.display();
    let text = fs::read_to_string(file).with_context(|| format!("{place} cannot be read"))?;
    let parse: fn(&str) -> Option<(f64, TraceRow)> = match file.extension().and_then(|e| e.to_str())
    {
        Some("csv") => azure,
        Some("jsonl") => mooncake,
        _ => return Err(anyhow!("{place} has another ending, expected .csv or .jsonl")),
    };
    let lines = text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty());
    let header = usize::from(text.starts_with("TIMESTAMP"));
    let mut rows = Vec::new();
    for (number, line) in lines.skip(header).take(most) {
        let row = parse(line).ok_or_else(|| {
            anyhow!(
                "{place}: line {} is {line:?}, expected TIMESTAMP,ContextTokens,GeneratedTokens in \
                 a .csv file or an object with timestamp, input_length and output_length in a \
                 .jsonl file",
                number + 1
            )
        })?;
        rows.push(row);
    }
    let Some(start) = rows.iter().map(|(seconds, _)| *seconds).min_by(f64::total_cmp) else {
        return Err(anyhow!("{place} holds no request"));
    };
    rows.sort_by(|(a, _), (b, _)| a.total_cmp(b));
    let rows = rows.into_iter().map(|(seconds, row)| TraceRow {
        at: Duration::try_from_secs_f64(seconds - start).unwrap_or_default(),
        ..row
    });
    Ok(rows.collect())
}

fn row(prompt: usize, tokens: usize, blocks: Vec<u64>) -> TraceRow {
    TraceRow { at: Duration::ZERO, prompt, tokens, blocks }
}

/// `2023-11-16 18:15:46.6805900,374,44`: seconds of the month, and the row.
fn azure(line: &str) -> Option<(f64, TraceRow)> {
    let mut fields = line.trim().split(',');
    let (date, time) = fields.next()?.split_once(' ')?;
    let day: f64 = date.rsplit('-').next()?.parse().ok()?;
    let mut seconds = day * 86400.0;
    let mut unit = 3600.0;
    for part in time.split(':') {
        seconds += part.parse::<f64>().ok()? * unit;
        unit /= 60.0;
    }
    let (prompt, tokens) = (fields.next()?.parse().ok()?, fields.next()?.parse().ok()?);
    seconds.is_finite().then(|| (seconds, row(prompt, tokens, Vec::new())))
}

fn mooncake(line: &str) -> Option<(f64, TraceRow)> {
    let line: MooncakeLine = serde_json::from_str(line).ok()?;
    let seconds = line.timestamp / 1e3;
    let row = row(line.input_length, line.output_length, line.hash_ids);
    seconds.is_finite().then_some((seconds, row))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_kinds_of_lines_are_read() {
        let (seconds, found) = azure("2023-11-16 01:02:03.5,374,44").unwrap();
        assert_eq!((seconds, found), (16.0 * 86400.0 + 3723.5, row(374, 44, Vec::new())));
        let line =
            r#"{"timestamp": 1500, "input_length": 6, "output_length": 5, "hash_ids": [7, 8]}"#;
        assert_eq!(mooncake(line).unwrap(), (1.5, row(6, 5, vec![7, 8])));
        assert!(azure("2023-11-16,1,2").is_none() && mooncake("{}").is_none());
    }
}
