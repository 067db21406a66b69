//! `tinyserve eval needle`: whether what was planted far back is found.

use std::fs;
use std::path::PathBuf;

use anyhow::{Result, anyhow};
use clap::Args;
use serde::Deserialize;
use tinyserve::model::{LookupTokens, Tokenizer};
use tinyserve_lab::{
    Axes, LookupTask, NeedleRow, NeedleTask, NeedleTest, PasskeyTask, heat_maps, lines,
    needle as ask,
};

use super::options::{Lab, OutputArgs, TrialArgs, Watched, check_svg, draw, lab_error};
use super::perplexity::{by_policy, read};
use super::table::{Column, Style, TRIAL};
use crate::args::ForwardArgs;
use crate::exit::{Quiet, Usage, out_of_range};
use crate::{units, values};

/// Names the tokens of a model that looks things up.
const LOOKUP_FILE: &str = "lookup.json";
/// What hides pass keys when no text is given (the noise of the passkey test of Mohtashami and
/// Jaggi, "Landmark Attention", 2023).
const FILLER: &str = " The grass is green. The sky is blue. The sun is yellow. Here we go. There and \
                      back again.";

#[derive(Debug, Args)]
pub(crate) struct NeedleArgs {
    /// Tokens of a document with its question and answer; each length is tried.
    #[arg(long, value_name = "TOKENS,…", value_delimiter = ',', default_value = "4k",
          value_parser = values::size)]
    context: Vec<usize>,
    /// Questions for each length.
    #[arg(long, value_name = "N", default_value = "32", value_parser = values::size)]
    samples: usize,
    /// Facts in one document: 1 is the passkey test, more are key-value retrieval
    /// [default: 32, in running text 8].
    #[arg(long, value_name = "N", value_parser = values::size)]
    pairs: Option<usize>,
    /// Distractors in each document: tokens that resemble a planted key, with values of their own.
    #[arg(long, value_name = "N", default_value = "0", value_parser = values::size)]
    near_keys: usize,
    /// The same seed gives the same documents.
    #[arg(long, value_name = "N", default_value = "0")]
    seed: u64,
    /// A UTF-8 text to hide pass keys in, for models without lookup.json [default: five sentences
    /// over and over].
    #[arg(long, value_name = "FILE")]
    text_file: Option<PathBuf>,
    /// Draws accuracy by depth and length into an .svg file.
    #[arg(long, value_name = "FILE")]
    heat_map: Option<PathBuf>,
    #[command(flatten)]
    output: OutputArgs,
    #[command(flatten)]
    trials: TrialArgs,
    #[command(flatten)]
    forward: ForwardArgs,
}

/// Which documents a model can be asked about.
enum Task {
    Lookup(LookupTask),
    Passkey { tokenizer: Tokenizer, filler: String },
}

/// Asks and prints.
pub(crate) fn needle(args: &NeedleArgs) -> Result<()> {
    check_svg("--plot", args.output.plot.as_ref())?;
    check_svg("--heat-map", args.heat_map.as_ref())?;
    if args.samples == 0 {
        return Err(out_of_range("--samples", 0, "at least 1"));
    }
    let lab = Lab::open(&args.forward)?;
    let trials = args.trials.trials(lab.model.config().layers, None)?;
    let observed = args.trials.observed(&trials)?;
    let longest = args.context.iter().copied().max().unwrap_or(0);
    if longest > lab.limit() {
        let expected = format!("at most {}, the context", lab.limit());
        return Err(out_of_range("--context", longest, &expected));
    }
    let task = Task::new(args, &lab)?;
    let mut probe = lab.probe(longest, observed)?;
    let mut watched = Watched::new()?;
    let mut rows = Vec::new();
    for &context in &args.context {
        let pairs = args.pairs.unwrap_or(task.pairs());
        let test = NeedleTest { context, pairs, samples: args.samples, seed: args.seed };
        let passkey;
        let of_context: &dyn NeedleTask = match &task {
            Task::Lookup(task) => task,
            Task::Passkey { tokenizer, filler } => {
                passkey = PasskeyTask { tokenizer, filler };
                &passkey
            }
        };
        let of_length = ask(&mut probe, of_context, &test, &trials, &mut watched.control());
        // A length that was interrupted before its first answer has nothing to say.
        rows.extend(of_length.map_err(lab_error)?.into_iter().filter(|row| row.samples > 0));
        if watched.stopped() {
            break;
        }
    }
    watched.quiet();
    if rows.is_empty() {
        return Err(Quiet::Interrupted.into());
    }
    args.output.print(&columns(), &rows)?;
    if let Some(file) = &args.output.plot {
        let points = rows.iter().map(|row| (row.policy, (row.bytes_read_ratio, row.accuracy)));
        let axes = Axes { x: "share of dense KV bytes read", y: "answered", log_y: false };
        draw(file, lines("Needles found against KV bytes read", axes, &by_policy(points)))?;
    }
    if let Some(file) = &args.heat_map {
        draw(file, depth_maps(&rows, &args.context))?;
    }
    watched.finish()
}

impl Task {
    fn new(args: &NeedleArgs, lab: &Lab) -> Result<Self> {
        let file = lab.folder().join(LOOKUP_FILE);
        if file.is_file() {
            if args.text_file.is_some() {
                let sentence = format!(
                    "--text-file is given, expected none: {} says what \
                                        texts of this model are made of",
                    file.display()
                );
                return Err(Usage(sentence).into());
            }
            let tokens = lookup_tokens(&file, lab.model.config().vocab_size)?;
            return Ok(Self::Lookup(LookupTask { tokens, near_keys: args.near_keys }));
        }
        if args.near_keys > 0 {
            let expected = format!("0: this model has no {LOOKUP_FILE}");
            return Err(out_of_range("--near-keys", args.near_keys, &expected));
        }
        let filler = match &args.text_file {
            Some(file) => read(file)?,
            None => FILLER.to_owned(),
        };
        Ok(Self::Passkey { tokenizer: lab.tokenizer()?, filler })
    }

    /// Facts in one document unless asked for.
    fn pairs(&self) -> usize {
        match self {
            Self::Lookup(_) => 32,
            Self::Passkey { .. } => 8,
        }
    }
}

/// The content of `lookup.json`.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Lookup {
    keys: Vec<u32>,
    values: Vec<u32>,
    fillers: Vec<u32>,
    #[serde(default)]
    near_keys: Vec<u32>,
}

fn lookup_tokens(file: &PathBuf, vocabulary: usize) -> Result<LookupTokens> {
    let text = fs::read_to_string(file)
        .map_err(|error| anyhow!("{} cannot be read: {error}", file.display()))?;
    let Lookup { keys, values, fillers, near_keys } =
        serde_json::from_str(&text).map_err(|error| anyhow!("{}: {error}", file.display()))?;
    for (name, tokens) in
        [("keys", &keys), ("values", &values), ("fillers", &fillers), ("near_keys", &near_keys)]
    {
        if tokens.is_empty() && name != "near_keys" {
            return Err(anyhow!("{}: {name} is empty, expected token ids", file.display()));
        }
        if let Some(token) = tokens.iter().find(|&&token| token as usize >= vocabulary) {
            let place = file.display();
            return Err(anyhow!("{place}: {name} has {token}, expected ids below {vocabulary}"));
        }
    }
    Ok(LookupTokens { keys, values, fillers, near_keys })
}

fn columns() -> Vec<Column> {
    let mut columns = TRIAL.to_vec();
    columns.extend([
        Column { field: "context", title: "context", style: Style::Plain },
        Column { field: "accuracy", title: "answered", style: Style::Percent },
        Column { field: "samples", title: "questions", style: Style::Plain },
        Column { field: "bytes_read_ratio", title: "KV read", style: Style::Percent },
    ]);
    columns
}

/// One map for each trial: depths from top to bottom, lengths from left to right.
fn depth_maps(rows: &[NeedleRow], contexts: &[usize]) -> Result<String, tinyserve_lab::LabError> {
    let lengths: Vec<_> = contexts.iter().map(|&n| units::count(n as u64)).collect();
    let depths: Vec<String> = rows.first().map_or(vec![], |row| {
        row.depths.iter().map(|cell| format!("{:.0} %", 100.0 * cell.from)).collect()
    });
    let mut maps: Vec<(String, Vec<Vec<Option<f64>>>)> = Vec::new();
    for row in rows {
        let budget = &row.budget;
        let name = [
            Some(row.policy.to_owned()),
            budget.token_budget.map(|tokens| format!("{tokens} tokens")),
            budget.selection_ratio.map(|ratio| format!("{:.0} %", 100.0 * ratio)),
            budget.top_p_pages.map(|p| format!("top-p {p}")),
        ];
        let name = name.into_iter().flatten().collect::<Vec<_>>().join(" ");
        let column = contexts.iter().position(|&context| context == row.context).unwrap_or(0);
        let empty = || vec![vec![None; contexts.len()]; depths.len()];
        if !maps.iter().any(|(of, _)| *of == name) {
            maps.push((name.clone(), empty()));
        }
        let Some((_, map)) = maps.iter_mut().find(|(of, _)| *of == name) else { continue };
        for (line, cell) in map.iter_mut().zip(&row.depths) {
            line[column] = (cell.samples > 0).then(|| cell.correct as f64 / cell.samples as f64);
        }
    }
    heat_maps("Needles found by depth (down) and context (across)", (&lengths, &depths), &maps)
}
