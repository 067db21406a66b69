//! A trace as one HTML file that needs nothing else.

use serde_json::{Value, json};

use crate::watch::CURVE;
use crate::{LabError, Seen, Trace};

const PAGE: &str = include_str!("report.html");
/// Where the page expects its data.
const PLACE: &str = "/*DATA*/null";
/// Cells of a heat map's axes: longer sequences are drawn in stretches of several pages, longer runs
/// in stretches of several steps.
const MOST_CELLS: usize = 512;
/// Pages that hold this many times the even share are attended to.
const EVEN: f32 = 2.0;
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
    let stretch = pages.div_ceil(MOST_CELLS).max(1);
    let (layers, kv_heads) = (trace.header.layers, trace.header.kv_heads);
    let maps: Vec<Value> = (0..layers)
        .flat_map(|layer| (0..kv_heads).map(move |head| (layer, head)))
        .take(MOST_MAPS)
        .map(|head| map(trace, head, stretch))
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

/// Pages over time for one head, and what it held on average.
fn map(trace: &Trace, (layer, head): (usize, usize), stretch: usize) -> Value {
    let of_head = |seen: &&Seen| (seen.layer, seen.kv_head) == (layer, head);
    let steps = trace.steps.iter().filter_map(|step| step.heads.iter().find(of_head));
    let steps: Vec<&Seen> = steps.collect();
    let columns = steps.chunks(steps.len().div_ceil(MOST_CELLS).max(1));
    let columns: Vec<String> = columns.map(|steps| column(steps, stretch)).collect();
    let of_all = |values: fn(&Seen) -> &[f32]| mean(steps.iter().flat_map(|&s| values(s)).copied());
    json!({
        "layer": layer, "head": head, "columns": columns,
        "held": of_all(|seen| &seen.mass), "entropy": of_all(|seen| &seen.entropy),
        "top": mean(steps.iter().map(|seen| seen.top_pages)),
        "reuse": mean(steps.iter().filter_map(|seen| seen.reuse)),
    })
}

/// A column of a heat map, for a few steps in a row: one digit for each stretch of pages, 1 if some
/// step read one of them, plus 2 if they are attended to on average over the steps.
fn column(steps: &[&Seen], stretch: usize) -> String {
    let cells = steps.iter().map(|seen| seen.page_mass.len().div_ceil(stretch)).max().unwrap_or(0);
    let (mut read, mut mass) = (vec![false; cells], vec![0.0; cells]);
    for seen in steps {
        match &seen.pages {
            Some(pages) => pages.iter().for_each(|&page| read[page as usize / stretch] = true),
            None => read[..seen.page_mass.len().div_ceil(stretch)].fill(true),
        }
        for (mass, pages) in mass.iter_mut().zip(seen.page_mass.chunks(stretch)) {
            *mass += pages.iter().sum::<f32>() / steps.len() as f32;
        }
    }
    let attended = |mass: f32| mass * cells as f32 > EVEN;
    let digit = |(read, mass)| usize::from(read) + 2 * usize::from(attended(mass));
    read.into_iter().zip(mass).map(|cell| digit(cell).to_string()).collect()
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{TraceHeader, TraceStep};

    /// `steps` steps of one head over `pages` pages, of which the first is read and the last holds
    /// all attention.
    fn trace(steps: usize, pages: usize) -> Trace {
        let header = TraceHeader {
            format: TraceHeader::format_name(),
            version: crate::TRACE_VERSION,
            model: "</script>".to_owned(),
            policy: "none".to_owned(),
            page_size: 16,
            layers: 1,
            kv_heads: 1,
            q_heads: 1,
            prompt_tokens: 1,
            step_split_ns: [1; 3],
        };
        let mut page_mass = vec![0.0; pages];
        page_mass[pages - 1] = 1.0;
        let seen = Seen {
            layer: 0,
            kv_head: 0,
            tokens: 16 * pages,
            pages: Some(vec![0]),
            scores: None,
            mass: vec![0.0],
            top_pages: 0.0,
            entropy: vec![0.0],
            reuse: None,
            page_mass,
            best_curve: Vec::new(),
            score_curve: None,
        };
        let (tokens, heads) = (seen.tokens, vec![seen]);
        let step = TraceStep { tokens, bytes_read: 1, bytes_dense: 2, heads };
        Trace { header, steps: vec![step; steps] }
    }

    /// The columns of the only map.
    fn columns(html: &str) -> Vec<String> {
        let (_, rest) = html.split_once("const data = ").unwrap();
        let data = rest.split_once(";\n").unwrap().0;
        let data: Value = serde_json::from_str(data).unwrap();
        serde_json::from_value(data["maps"][0]["columns"].clone()).unwrap()
    }

    #[test]
    fn a_map_says_what_was_read_and_what_was_attended_to() {
        let html = report(&trace(2, 5)).unwrap();
        assert_eq!(columns(&html), ["10002", "10002"]);
        assert_eq!(html.matches("</script>").count(), 1, "a name ended the script");
        let mut both = trace(1, 5);
        both.steps[0].heads[0].pages = None;
        assert_eq!(columns(&report(&both).unwrap()), ["11113"]);
    }

    #[test]
    fn a_long_run_over_a_long_text_stays_a_picture() {
        let html = report(&trace(5000, 2048)).unwrap();
        let columns = columns(&html);
        assert!((256..=512).contains(&columns.len()), "{}", columns.len());
        // Four pages a cell.
        assert!(columns.iter().all(|column| column.len() == 512));
        assert!(columns[0].starts_with("10") && columns[0].ends_with("02"));
        assert!(html.len() < 1 << 20, "{} bytes", html.len());
    }
}
