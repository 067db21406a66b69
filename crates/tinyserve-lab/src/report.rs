//! A trace as one HTML file that needs nothing else.

use serde_json::{Value, json};

use crate::watch::CURVE;
use crate::{LabError, Trace};

const PAGE: &str = include_str!("report.html");
/// Where the page expects its data.
const PLACE: &str = "/*DATA*/null";
/// Cells of a heat map's page axis: longer sequences are drawn in stretches of several pages.
const MOST_CELLS: usize = 512;
/// Heads that are drawn; a model with more is shown by its first ones.
const MOST_MAPS: usize = 48;

/// The report of `trace`.
///
/// # Errors
/// When the trace has no step.
pub fn report(trace: &Trace) -> Result<String, LabError> {
    let Some(last) = trace.steps.last() else {
        return Err(LabError::Setting {
            what: "trace",
            found: "no step".to_owned(),
            expected: "at least one decode step".to_owned(),
        });
    };
    let pages = last.tokens.div_ceil(trace.header.page_size);
    let stretch = pages.div_ceil(MOST_CELLS);
    let (layers, kv_heads) = (trace.header.layers, trace.header.kv_heads);
    let maps: Vec<Value> = (0..layers)
        .flat_map(|layer| (0..kv_heads).map(move |head| (layer, head)))
        .take(MOST_MAPS)
        .map(|(layer, head)| map(trace, (layer, head), pages.div_ceil(stretch), stretch))
        .collect();
    let steps: Vec<Value> = trace
        .steps
        .iter()
        .map(|step| {
            let mass = mean(step.heads.iter().flat_map(|seen| &seen.mass).copied());
            let reuse = mean(step.heads.iter().filter_map(|seen| seen.reuse));
            json!({
                "tokens": step.tokens, "read": step.bytes_read, "dense": step.bytes_dense,
                "mass": mass, "reuse": reuse,
            })
        })
        .collect();
    let data = json!({
        "header": trace.header, "stretch": stretch, "maps": maps, "steps": steps, "curve": curve(trace),
        "chosen": chosen(trace), "reuse": reuse_by_distance(trace),
    });
    // Nothing in the data may end the script that it lies in.
    let data = data.to_string().replace("</", "<\\/");
    Ok(PAGE.replacen(PLACE, &data, 1))
}

/// Attention held at fixed shares of the pages: by the best of them, and by those with the best
/// scores.
fn curve(trace: &Trace) -> Vec<Value> {
    let heads = || trace.steps.iter().flat_map(|step| &step.heads);
    // Dense layers have no scores: they would be in one line and not in the other.
    let scored = heads().any(|seen| seen.score_curve.is_some());
    let counted = || heads().filter(|seen| seen.score_curve.is_some() || !scored);
    let at = |i: usize, share: &f64| {
        let best = mean(counted().filter_map(|seen| seen.best_curve.get(i)).copied());
        let by_score = counted().filter_map(|seen| seen.score_curve.as_ref()?.get(i));
        json!({ "share": share, "best": best, "scored": mean(by_score.copied()) })
    };
    CURVE.iter().enumerate().map(|(i, share)| at(i, share)).collect()
}

/// Mean of what there is; null of nothing.
fn mean(values: impl Iterator<Item = f32>) -> Value {
    let (sum, n) = values.fold((0.0, 0usize), |(sum, n), x| (sum + f64::from(x), n + 1));
    if n == 0 { Value::Null } else { json!(sum / n as f64) }
}

/// Rounded, so that thousands of them stay small.
fn rounded(x: f64) -> f64 {
    (x * 1000.0).round() / 1000.0
}

/// Pages over time for one head: for each step and stretch of pages, the share that was read and
/// the attention that it holds.
fn map(trace: &Trace, (layer, head): (usize, usize), cells: usize, stretch: usize) -> Value {
    let (mut read, mut mass) = (Vec::new(), Vec::new());
    let (mut held, mut entropy, mut top, mut reuse) = (vec![], vec![], vec![], vec![]);
    for step in &trace.steps {
        let Some(seen) = step.heads.iter().find(|s| (s.layer, s.kv_head) == (layer, head)) else {
            continue;
        };
        let mut row = vec![0.0; cells];
        match &seen.pages {
            Some(pages) => {
                pages.iter().for_each(|&page| row[page as usize / stretch] += 1.0 / stretch as f64);
            }
            None => row.fill(1.0),
        }
        read.push(row.into_iter().map(rounded).collect::<Vec<_>>());
        let sums = seen.page_mass.chunks(stretch).map(|pages| pages.iter().sum::<f32>());
        mass.push(sums.map(|x| rounded(f64::from(x))).collect::<Vec<_>>());
        held.extend(&seen.mass);
        entropy.extend(&seen.entropy);
        top.push(seen.top_pages);
        reuse.extend(seen.reuse);
    }
    json!({
        "layer": layer, "head": head, "read": read, "mass": mass,
        "held": mean(held.into_iter()), "entropy": mean(entropy.into_iter()),
        "top": mean(top.into_iter()), "reuse": mean(reuse.into_iter()),
    })
}

/// Share of the pages and share of the attention of every selection, for the scatter over the
/// curve of what was possible.
fn chosen(trace: &Trace) -> Vec<Value> {
    let seen = trace.steps.iter().flat_map(|step| &step.heads);
    let chosen: Vec<_> = seen.filter_map(|seen| Some((seen, seen.pages.as_ref()?))).collect();
    // A few thousand points show what there is to see.
    let every = chosen.len().div_ceil(4000).max(1);
    chosen
        .iter()
        .step_by(every)
        .map(|(seen, pages)| {
            let share = pages.len() as f64 / seen.page_mass.len() as f64;
            let mass = seen.mass.iter().map(|&x| f64::from(x)).sum::<f64>();
            json!([rounded(share), rounded(mass / seen.mass.len() as f64)])
        })
        .collect()
}

/// Share of a selection's pages that the same head had also read so many steps before.
fn reuse_by_distance(trace: &Trace) -> Vec<Value> {
    let mut distances = Vec::new();
    let mut distance = 1;
    while distance < trace.steps.len() && distance <= 64 {
        let (mut sum, mut n) = (0.0, 0);
        for (now, then) in trace.steps[distance..].iter().zip(&trace.steps) {
            for seen in &now.heads {
                let before =
                    then.heads.iter().find(|s| (s.layer, s.kv_head) == (seen.layer, seen.kv_head));
                let both = before.and_then(|b| Some((seen.pages.as_ref()?, b.pages.as_ref()?)));
                let Some((now, before)) = both else { continue };
                let again = now.iter().filter(|page| before.binary_search(page).is_ok()).count();
                sum += again as f64 / now.len() as f64;
                n += 1;
            }
        }
        if n > 0 {
            distances.push(json!([distance, sum / f64::from(n)]));
        }
        distance *= 2;
    }
    distances
}
