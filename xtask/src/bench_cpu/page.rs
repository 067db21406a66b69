//! The page that is written: tables, and what is needed to repeat them.

use std::fmt::Write;
use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::Result;
use serde_json::Value;

use super::DeepRows;

/// Markdown that grows.
pub(super) struct Page {
    text: String,
    date: String,
    peers: bool,
}

/// What a decode step is divided into.
const PARTS: [&str; 5] = ["weights_ns", "score_ns", "select_ns", "attend_ns", "rest_ns"];

/// A label, a row, why there is none, speeds, the peer's speeds.
type Case<'a> = (String, Option<&'a Value>, Option<&'a str>, &'a [f64], &'a [f64]);

impl Page {
    /// Begins with the machine, the date, the commit and the command.
    pub(super) fn new(root: &Path, peers: bool) -> Result<Self> {
        let date = printed(Command::new("date").arg("+%F"));
        let git = |args: &[&str]| printed(Command::new("git").args(args).current_dir(root));
        let changed =
            if git(&["status", "--porcelain", "-uno"]).is_empty() { "" } else { " with changes" };
        let args: Vec<_> = std::env::args().skip(1).collect();
        let mut page = Self { text: String::new(), date, peers };
        let _ = write!(
            page.text,
            "# `cargo xtask bench-cpu`, {}\n\n\
             Commit {}{changed}.\n{}.\n\
             Medians over all rounds; random weights, which say how fast and not how well.\n\
             \"Of bandwidth\" is the time that reading the needed bytes takes at the read bandwidth \
             measured in the same run, over the time it took; a model that fits a cache exceeds \
             it.\n\n\
             ```sh\ncargo xtask {}\n```\n",
            page.date,
            git(&["rev-parse", "--short", "HEAD"]),
            machine(),
            args.join(" "),
        );
        Ok(page)
    }

    pub(super) fn date(&self) -> &str {
        &self.date
    }

    pub(super) fn heading(&mut self, title: &str) {
        let _ = write!(self.text, "\n## {title}\n");
    }

    pub(super) fn text(&mut self, text: &str) {
        let _ = write!(self.text, "\n{text}\n");
    }

    /// The whole page, which is printed too.
    pub(super) fn finish(self) -> String {
        println!("{}", self.text);
        self.text
    }

    fn header(&mut self, columns: &[&str]) {
        let peers: &[&str] = if self.peers { &["llama.cpp t/s", "ratio"] } else { &[] };
        let columns = [columns, peers].concat();
        let _ = writeln!(self.text, "\n| {} |", columns.join(" | "));
        let _ = writeln!(self.text, "|---|{}", "---:|".repeat(columns.len() - 1));
    }

    fn row(&mut self, mut cells: Vec<String>, ours: Option<f64>, peers: &[f64]) {
        if self.peers {
            let peer = median(peers);
            cells.push(cell(peer, 2));
            cells.push(cell(ours.zip(peer).map(|(ours, peer)| ours / peer), 2));
        }
        let _ = writeln!(self.text, "| {} |", cells.join(" | "));
    }

    pub(super) fn table_of_speeds<'a>(&mut self, cases: impl Iterator<Item = Case<'a>>) {
        self.header(&["model", "t/s", "runs", "of bandwidth", "GB/s", "weights", "attend", "rest"]);
        let mut notes = Vec::new();
        for (label, row, refused, ours, peers) in cases {
            notes.extend(refused.map(|sentence| format!("{label}: {sentence}.")));
            let field = |name: &str| row.and_then(|row| number(row, name));
            let part = |name: &str| row.and_then(|row| number(&row["step_split"], name));
            let whole: f64 = PARTS.into_iter().filter_map(part).sum();
            let share = |name: &str| percent(part(name).map(|ns| ns / whole));
            let cells = vec![
                label,
                cell(median(ours), 2),
                ours.len().to_string(),
                percent(field("roofline_fraction")),
                cell(field("read_bandwidth_gb_s"), 1),
                share("weights_ns"),
                share("attend_ns"),
                share("rest_ns"),
            ];
            self.row(cells, median(ours), peers);
        }
        for note in notes {
            self.text(&note);
        }
    }

    pub(super) fn table_of_attention(&mut self, rows: &[Value]) {
        let peers = std::mem::take(&mut self.peers);
        self.header(&[
            "heads",
            "attention",
            "µs",
            "GB/s",
            "of bandwidth",
            "of FMA",
            "speed-up",
            "byte ceiling",
        ]);
        for row in rows {
            let field = |name: &str| number(row, name);
            let heads = format!("{}/{}", row["q_heads"], row["kv_heads"]);
            let attention = field("selection_ratio").map_or("dense".to_owned(), |x| x.to_string());
            let cells = vec![
                heads,
                attention,
                cell(field("median_ns").map(|ns| ns / 1e3), 1),
                cell(field("gb_s"), 1),
                percent(field("roofline_fraction")),
                percent(field("fma_fraction")),
                cell(field("speedup"), 2),
                cell(field("byte_ceiling"), 2),
            ];
            self.row(cells, None, &[]);
        }
        self.peers = peers;
    }

    pub(super) fn table_of_depth<'a>(
        &mut self,
        lines: impl Iterator<Item = (String, &'a DeepRows)>,
    ) {
        self.header(&[
            "model",
            "attention",
            "t/s",
            "ratio to dense",
            "of bandwidth",
            "score",
            "select",
            "attend",
            "peak GB",
            "weights + KV GB",
        ]);
        let mut notes = Vec::new();
        for (label, line) in lines {
            notes.extend(line.refused.as_ref().map(|sentence| format!("{label}: {sentence}.")));
            let dense = line.ours.iter().find(|(row, _)| row["attention"] == "dense");
            let dense = dense.and_then(|(_, speeds)| median(speeds));
            for (row, speeds) in &line.ours {
                let field = |name: &str| number(row, name);
                let part = |name: &str| number(&row["step_split"], name);
                let whole: f64 = PARTS.into_iter().filter_map(part).sum();
                let share = |name: &str| percent(part(name).map(|ns| ns / whole));
                let speed = median(speeds);
                let held = field("model_size").zip(field("kv_bytes")).map(|(w, kv)| (w + kv) / 1e9);
                let cells = vec![
                    label.clone(),
                    row["attention"].as_str().unwrap_or("—").to_owned(),
                    cell(speed, 2),
                    cell(speed.zip(dense).map(|(speed, dense)| speed / dense), 2),
                    percent(field("roofline_fraction")),
                    share("score_ns"),
                    share("select_ns"),
                    share("attend_ns"),
                    cell(field("rss_bytes").map(|bytes| bytes / 1e9), 2),
                    cell(held, 2),
                ];
                self.row(cells, speed, &line.peers);
            }
        }
        for note in notes {
            self.text(&note);
        }
    }
}

/// A field of a row, if it is a number.
pub(super) fn number(row: &Value, name: &str) -> Option<f64> {
    row[name].as_f64()
}

fn cell(value: Option<f64>, decimals: usize) -> String {
    value.map_or("—".to_owned(), |value| format!("{value:.decimals$}"))
}

fn percent(share: Option<f64>) -> String {
    share.map_or("—".to_owned(), |share| format!("{:.1} %", share * 100.0))
}

fn median(samples: &[f64]) -> Option<f64> {
    let mut sorted = samples.to_vec();
    sorted.sort_by(f64::total_cmp);
    let (low, high) =
        (sorted.get(sorted.len().checked_sub(1)? / 2)?, sorted.get(sorted.len() / 2)?);
    Some((low + high) / 2.0)
}

/// What a command prints, or nothing where there is no such command.
fn printed(command: &mut Command) -> String {
    let output = command.output().map(|output| output.stdout).unwrap_or_default();
    String::from_utf8_lossy(&output).trim().to_owned()
}

/// The processor, its cores and its memory, where the system says so in files.
fn machine() -> String {
    let field = |file: &str, name: &str| {
        let text = fs::read_to_string(file).unwrap_or_default();
        let line = text.lines().find(|line| line.starts_with(name));
        line.and_then(|line| line.split_once(':')).map(|(_, value)| value.trim().to_owned())
    };
    let processor = field("/proc/cpuinfo", "model name").unwrap_or_else(|| "unknown".to_owned());
    let memory = field("/proc/meminfo", "MemTotal").unwrap_or_else(|| "unknown".to_owned());
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let os = std::env::consts::OS;
    format!("{processor}, {cores} cores offered, {memory} of memory, {os}")
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn page(peers: bool) -> Page {
        Page { text: String::new(), date: String::new(), peers }
    }

    #[test]
    fn medians_of_few_samples() {
        assert_eq!(median(&[]), None);
        assert_eq!(median(&[3.0, 1.0, 2.0]), Some(2.0));
        assert_eq!(median(&[4.0, 1.0]), Some(2.5));
    }

    #[test]
    fn speeds_stand_beside_the_peers() {
        let row = json!({
            "roofline_fraction": 0.5, "read_bandwidth_gb_s": 20.0,
            "step_split": { "weights_ns": 60, "attend_ns": 30, "rest_ns": 10 },
        });
        let cases = || {
            let (ours, peers) = (&[30.0][..], &[10.0][..]);
            let refused = ("b int8".to_owned(), None, Some("not built in"), &[][..], &[][..]);
            [("a f16".to_owned(), Some(&row), None, ours, peers), refused].into_iter()
        };
        let mut with = page(true);
        with.table_of_speeds(cases());
        let line =
            "| a f16 | 30.00 | 1 | 50.0 % | 20.0 | 60.0 % | 30.0 % | 10.0 % | 10.00 | 3.00 |";
        assert!(with.text.contains(line), "{}", with.text);
        assert!(with.text.contains("b int8: not built in."), "{}", with.text);
        let mut without = page(false);
        without.table_of_speeds(cases());
        assert!(!without.text.contains("llama.cpp") && !without.text.contains("3.00"));
    }

    #[test]
    fn every_cell_of_attention_has_its_column() {
        let mut page = page(false);
        let row = json!({ "q_heads": 32, "kv_heads": 4, "fma_fraction": 0.25, "speedup": 2.0 });
        page.table_of_attention(&[row]);
        let columns: Vec<_> =
            page.text.trim().lines().map(|line| line.split('|').count()).collect();
        assert!(columns.iter().all(|&n| n == columns[0]), "{}", page.text);
        assert!(page.text.contains("| 32/4 | dense | — | — | — | 25.0 % | 2.00 | — |"));
    }

    #[test]
    fn memory_stands_beside_what_is_held() {
        let row = |attention: &str, speeds: [f64; 2]| {
            json!({
                "attention": attention, "samples_ts": speeds,
                "model_size": 1e9, "kv_bytes": 2e9, "rss_bytes": 3.2e9,
                "step_split": {
                    "weights_ns": 60, "score_ns": 6, "select_ns": 4, "attend_ns": 20, "rest_ns": 10
                },
            })
        };
        let mut rows = DeepRows::default();
        rows.add(vec![row("dense", [1.0, 1.0]), row("sparse", [1.0, 3.0])]);
        rows.add(vec![row("sparse", [3.0, 3.0])]);
        let mut page = page(false);
        page.table_of_depth([("m".to_owned(), &rows)].into_iter());
        let line = "| m | sparse | 3.00 | 3.00 | — | 6.0 % | 4.0 % | 20.0 % | 3.20 | 3.00 |";
        assert!(page.text.contains(line), "{}", page.text);
    }
}
