//! Rows as a table, as lines of a picture, and as the contexts from which selecting pays.

use std::fmt::Write;

use tinyserve::kv::Scorer;
use tinyserve_lab::Line;

use super::Row;
use super::cache::Placement;
use crate::units::percent;

/// How many there are, and where their pages lie.
fn sequences(row: &Row) -> String {
    match (row.n_sequences, row.placement) {
        (1, _) => "1".to_owned(),
        (n, Placement::Groups) => format!("{n} in groups"),
        (n, Placement::Alternating) => format!("{n} alternating"),
    }
}

pub(super) fn markdown(rows: &[Row]) -> String {
    let mut text = "| heads | head dim | tokens | sequences | page | kv | threads | attention | µs \
                    | clock | host µs | score, select, attend | tokens/ms | GB/s | of bandwidth | of FMA | speed-up \
                    | byte ceiling |\n\
                    | --- | ---: | ---: | --- | ---: | --- | ---: | --- | ---: | --- | ---: | ---: \
                    | ---: | ---: \
                    | ---: | ---: | ---: | ---: |\n"
        .to_owned();
    for row in rows {
        let ratio = row.selection_ratio.map_or(String::new(), |ratio| format!(" {ratio}"));
        let scorer = scorer(row).map_or(String::new(), |name| format!(" {name}"));
        let _ = writeln!(
            text,
            "| {}/{} | {} | {} | {} | {} | {} | {} | {}{scorer}{ratio} | {:.1} ± {:.1} \
             | {} | {} | {} | {:.0} | {:.1} | {} | {} | {:.2} | {:.2} |",
            row.q_heads,
            row.kv_heads,
            row.head_dim,
            row.n_tokens,
            sequences(row),
            row.page_size,
            row.kv_cache_dtype,
            row.n_threads,
            row.attention,
            row.median_ns / 1e3,
            row.stddev_ns / 1e3,
            row.clock,
            row.host_ns.map_or("—".to_owned(), |ns| format!("{:.1}", ns / 1e3)),
            [row.score_ns, row.select_ns, row.attend_ns]
                .map(|ns| ns.map_or("—".to_owned(), |ns| format!("{:.1}", ns / 1e3)))
                .join(", "),
            row.throughput_tokens_per_ms,
            row.gb_s,
            percent(row.roofline_fraction),
            row.fma_fraction.map_or("—".to_owned(), percent),
            row.speedup,
            row.byte_ceiling,
        );
    }
    text
}

/// What its pages are scored by, unless by their boxes.
fn scorer(row: &Row) -> Option<&'static str> {
    row.scorer.filter(|&name| name != Scorer::BOX.name())
}

/// What a line of the picture and a crossover are of.
fn series(row: &Row) -> String {
    let scorer = scorer(row).map_or(String::new(), |name| format!("{name}, "));
    let ratio = row.selection_ratio.map_or(String::new(), |ratio| format!("ratio {ratio}, "));
    format!(
        "{scorer}{ratio}pages of {}, {}, {}/{} heads",
        row.page_size, row.kv_cache_dtype, row.q_heads, row.kv_heads
    )
}

pub(super) fn lines(rows: &[Row]) -> Vec<Line> {
    let mut lines: Vec<Line> = Vec::new();
    for row in rows.iter().filter(|row| row.selection_ratio.is_some()) {
        let (name, point) = (series(row), (row.n_tokens as f64, row.speedup));
        match lines.iter_mut().find(|line| line.name == name) {
            Some(line) => line.points.push(point),
            None => lines.push(Line { name, points: vec![point] }),
        }
    }
    for line in &mut lines {
        line.points.sort_by(|a, b| a.0.total_cmp(&b.0));
    }
    lines
}

/// As fast as dense attention: what the other lines have to be above.
pub(super) fn even(rows: &[Row]) -> Line {
    let tokens = || rows.iter().map(|row| row.n_tokens as f64);
    let ends = [tokens().fold(f64::INFINITY, f64::min), tokens().fold(0.0, f64::max)];
    Line { name: "dense".to_owned(), points: ends.map(|x| (x, 1.0)).to_vec() }
}

/// For each series of several lengths, from where on selecting pays.
pub(super) fn crossovers(rows: &[Row]) -> String {
    let mut text = String::new();
    for Line { name, points } in lines(rows).iter().filter(|line| line.points.len() > 1) {
        // The shortest length from which on no longer one is slower.
        let slower = points.iter().rposition(|point| point.1 <= 1.0);
        let first = slower.map_or(Some(0), |at| (at + 1 < points.len()).then_some(at + 1));
        let from = match first {
            Some(at) => format!("pays from {} tokens on", points[at].0),
            None => "does not pay".to_owned(),
        };
        let _ = writeln!(text, "\n{name}: {from}");
    }
    text
}
