//! `tinyserve analyze`: which pages each layer and head of a run reads, as one HTML file.

use std::fs;
use std::path::PathBuf;

use anyhow::{Context, Result, anyhow};
use clap::Args;
use tinyserve::TinyServeError;
use tinyserve::kernels::Profiled;
use tinyserve::kv::{Method, Scorer};
use tinyserve_lab::{Trace, TracedRun, Trial, report, traced};

use crate::args::ForwardArgs;
use crate::eval::{Lab, TrialArgs, Watched, lab_error};
use crate::exit::{Quiet, Usage};
use crate::{output, prompt, values};

#[derive(Debug, Args)]
pub(crate) struct AnalyzeArgs {
    /// The prompt.
    #[arg(short, long, value_name = "TEXT", allow_hyphen_values = true)]
    prompt: Option<String>,
    /// A file with the prompt, taken as it is, or `-` for stdin.
    #[arg(long, value_name = "FILE", conflicts_with = "prompt")]
    prompt_file: Option<PathBuf>,
    /// A trace that an earlier run wrote, instead of a prompt: nothing is run.
    #[arg(long, value_name = "FILE", conflicts_with_all = ["prompt", "prompt_file", "trace"])]
    from: Option<PathBuf>,
    /// Decode steps that are watched [default: 64].
    #[arg(short = 'n', long, value_name = "N", value_parser = values::size, conflicts_with = "from")]
    steps: Option<usize>,
    /// The report, an .html file.
    #[arg(long, value_name = "FILE", default_value = "report.html")]
    report: PathBuf,
    /// Keeps the trace, a .trace file that --from reads.
    #[arg(long, value_name = "FILE")]
    trace: Option<PathBuf>,
    #[command(flatten)]
    trials: TrialArgs,
    #[command(flatten)]
    forward: ForwardArgs,
}

/// Steps unless asked for.
const STEPS: usize = 64;

/// Runs, or reads a trace, and writes the report.
pub(crate) fn analyze(args: &AnalyzeArgs) -> Result<()> {
    for file in std::iter::once(&args.report).chain(&args.trace) {
        output::has_place(file)?;
    }
    let (trace, watched) = match &args.from {
        Some(file) => {
            let idle = args.trials.given().then_some("--policies").or(args.trials.idle_flag());
            if let Some(flag) = idle {
                let sentence =
                    format!("{flag} is given with --from, expected none: nothing is run");
                return Err(Usage(sentence).into());
            }
            (Trace::read(file).map_err(lab_error)?, None)
        }
        None => {
            let mut watched = Watched::new()?;
            (run(args, &mut watched)?, Some(watched))
        }
    };
    if let Some(file) = &args.trace {
        trace.write(file).map_err(lab_error)?;
    }
    let html = report(&trace).map_err(lab_error)?;
    let file = &args.report;
    fs::write(file, &html).with_context(|| format!("{} cannot be written", file.display()))?;
    output::text(&format!("{}: {} steps\n", file.display(), trace.steps.len()))?;
    watched.map_or(Ok(()), Watched::finish)
}

fn run(args: &AnalyzeArgs, watched: &mut Watched) -> Result<Trace> {
    let text = match (&args.prompt, &args.prompt_file) {
        (Some(text), _) => text.clone(),
        (None, Some(file)) => prompt::read_text(file)?,
        (None, None) => {
            let sentence = "there is no prompt, expected --prompt, --prompt-file or --from";
            return Err(Usage(sentence.to_owned()).into());
        }
    };
    if text.is_empty() {
        return Err(anyhow!("the prompt is empty, expected text to continue"));
    }
    let lab = Lab::open_on(&args.forward, Profiled::new)?;
    let trials = args.trials.trials(lab.model.config().layers, Some(Method::Score(Scorer::BOX)))?;
    let [trial] = trials.as_slice() else {
        let sentence = format!("{} policies and budgets are given, expected one", trials.len());
        return Err(Usage(sentence).into());
    };
    let observed = args.trials.observed(&trials)?;
    let tokens = lab.tokenizer()?.encode(&text, true).map_err(TinyServeError::from)?;
    let steps = args.steps.unwrap_or(STEPS);
    let model = lab.config.model.clone();
    let policy = described(trial);
    let mut probe = lab.probe(tokens.len() + steps, observed)?;
    let run = TracedRun { model: &model, policy: &policy, prompt: &tokens, steps };
    let trace = traced(&mut probe, &run, trial, &mut watched.control()).map_err(lab_error)?;
    watched.quiet();
    trace.ok_or_else(|| Quiet::Interrupted.into())
}

/// A trial in words.
fn described(trial: &Trial) -> String {
    let (name, budget) = (trial.name(), trial.budget());
    let parts = [
        budget.token_budget.map(|tokens| format!("{tokens} tokens")),
        budget.selection_ratio.map(|ratio| format!("{:.0} % of the pages", 100.0 * ratio)),
        budget.top_p_pages.map(|p| format!("top-p {p}")),
    ];
    match parts.into_iter().flatten().next() {
        Some(budget) => format!("{name}, {budget}"),
        None => name.to_owned(),
    }
}
