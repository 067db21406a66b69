//! `tinyserve eval recall`: how much attention the pages that are read hold, by layer and head.

use std::path::PathBuf;

use anyhow::Result;
use clap::Args;
use tinyserve::TinyServeError;
use tinyserve_lab::{Axes, RecallRow, RecallTest, lines, recall as measure};

use super::options::{Lab, OutputArgs, TrialArgs, Watched, check_svg, draw, lab_error};
use super::perplexity::{by_policy, read};
use super::table::{Column, Style, TRIAL};
use crate::args::ForwardArgs;
use crate::exit::Quiet;
use crate::values;

#[derive(Debug, Args)]
pub(crate) struct RecallArgs {
    /// A UTF-8 file with the text, or `-` for stdin.
    #[arg(long, value_name = "FILE")]
    text_file: PathBuf,
    /// Tokens that are read densely before [default: the context less the steps, at most 4096].
    #[arg(long, value_name = "TOKENS", value_parser = values::size)]
    context: Option<usize>,
    /// Steps that are watched: the tokens of the text that follow.
    #[arg(long, value_name = "N", default_value = "32", value_parser = values::size)]
    steps: usize,
    #[command(flatten)]
    output: OutputArgs,
    #[command(flatten)]
    trials: TrialArgs,
    #[command(flatten)]
    forward: ForwardArgs,
}

/// Tokens that are read before, unless asked for.
const CONTEXT: usize = 4096;

/// Measures and prints.
pub(crate) fn recall(args: &RecallArgs) -> Result<()> {
    check_svg("--plot", args.output.plot.as_ref())?;
    let text = read(&args.text_file)?;
    let lab = Lab::open(&args.forward)?;
    let trials = args.trials.trials(lab.model.config().layers, None)?;
    let observed = args.trials.observed(&trials)?;
    let tokens = lab.tokenizer()?.encode(&text, true).map_err(TinyServeError::from)?;
    let most = lab.limit().min(tokens.len()).saturating_sub(args.steps);
    let context = args.context.unwrap_or(CONTEXT.min(most));
    let mut probe = lab.probe(context + args.steps, observed)?;
    let mut watched = Watched::new()?;
    let test = RecallTest { context, steps: args.steps };
    let rows = measure(&mut probe, &tokens, &test, &trials, &mut watched.control());
    let rows = rows.map_err(lab_error)?;
    watched.quiet();
    if rows.is_empty() {
        return Err(Quiet::Interrupted.into());
    }
    args.output.print(&columns(), &rows)?;
    if let Some(file) = &args.output.plot {
        let axes = Axes { x: "share of the pages read", y: "attention mass held", log_y: false };
        draw(file, lines("Recall against pages read", axes, &by_policy(means(&rows).into_iter())))?;
    }
    watched.finish()
}

/// Mean over layers and heads of each trial that selected there.
fn means(rows: &[RecallRow]) -> Vec<(&'static str, (Option<f64>, f64))> {
    let mut trials: Vec<(&RecallRow, f64, f64, f64)> = Vec::new();
    for row in rows {
        match trials.iter_mut().find(|(of, ..)| of.policy == row.policy && of.budget == row.budget)
        {
            Some((_, pages, mass, n)) => {
                *pages += row.pages_read_ratio;
                *mass += row.recall;
                *n += 1.0;
            }
            None => trials.push((row, row.pages_read_ratio, row.recall, 1.0)),
        }
    }
    trials
        .into_iter()
        .map(|(row, pages, mass, n)| (row.policy, (Some(pages / n), mass / n)))
        .collect()
}

fn columns() -> Vec<Column> {
    let mut columns = TRIAL.to_vec();
    columns.extend([
        Column { field: "layer", title: "layer", style: Style::Plain },
        Column { field: "kv_head", title: "KV head", style: Style::Plain },
        Column { field: "recall", title: "attention held", style: Style::Percent },
        Column { field: "recall_min", title: "least", style: Style::Percent },
        Column { field: "top_pages", title: "top pages found", style: Style::Percent },
        Column { field: "reuse", title: "reuse", style: Style::Percent },
        Column { field: "entropy", title: "entropy, nats", style: Style::Fixed(2) },
        Column { field: "pages_read_ratio", title: "pages read", style: Style::Percent },
    ]);
    columns
}
