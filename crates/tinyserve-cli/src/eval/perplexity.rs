//! `tinyserve eval perplexity`: how well the model predicts a text.

use std::path::{Path, PathBuf};

use anyhow::{Result, anyhow};
use clap::Args;
use serde_json::json;
use tinyserve::KvCacheDtype;
use tinyserve_lab::{Axes, Line, TextRow, TextTest, lines, text};

use super::options::{Lab, OutputArgs, TrialArgs, Watched, check_svg, draw, lab_error};
use super::table::{Column, Style, TRIAL};
use crate::args::ForwardArgs;
use crate::exit::{Quiet, Usage};
use crate::units::count;
use crate::{output, prompt, values};

#[derive(Debug, Args)]
pub(crate) struct PerplexityArgs {
    /// A UTF-8 file with the text, or `-` for stdin.
    #[arg(long, value_name = "FILE")]
    text_file: PathBuf,
    /// Tokens from the start of one window to the next, without --policies [default: half the
    /// context].
    #[arg(long, value_name = "TOKENS", value_parser = values::size)]
    stride: Option<usize>,
    #[command(flatten)]
    windows: WindowArgs,
    #[command(flatten)]
    output: OutputArgs,
    #[command(flatten)]
    trials: TrialArgs,
    #[command(flatten)]
    forward: ForwardArgs,
}

/// Which parts of a text are read, and which are predicted.
#[derive(Debug, Args)]
pub(super) struct WindowArgs {
    /// Tokens of a window, with --policies [default: the context, at most 512].
    #[arg(long, value_name = "TOKENS", value_parser = values::size)]
    window: Option<usize>,
    /// First tokens of a window, which are read densely; the others are fed one by one through the
    /// selection [default: half the window].
    #[arg(long, value_name = "TOKENS", value_parser = values::size)]
    prefix: Option<usize>,
    /// Windows, from the start of the text [default: 4].
    #[arg(long, value_name = "N", value_parser = values::size)]
    samples: Option<usize>,
    /// How the dense attention that policies diverge from stores keys and values [default: as
    /// --kv-cache-dtype].
    #[arg(long, value_name = "DTYPE", value_parser = values::kv_cache_dtype)]
    reference_kv_cache_dtype: Option<KvCacheDtype>,
}

/// Window unless asked for, windows unless asked for.
const WINDOW: usize = 512;
const SAMPLES: usize = 4;

/// Measures how well the model predicts a text: all of it with dense attention, or, with
/// `--policies`, the same windows through every policy.
pub(crate) fn perplexity(args: &PerplexityArgs) -> Result<()> {
    if args.trials.given() {
        if args.stride.is_some() {
            let sentence = "--stride is given with --policies, expected --window instead";
            return Err(Usage(sentence.to_owned()).into());
        }
        let measured = |row: &TextRow| (row.bytes_read_ratio, row.perplexity);
        let columns = [
            Column { field: "perplexity", title: "perplexity", style: Style::Fixed(4) },
            Column { field: "nll_mean", title: "nats per token", style: Style::Fixed(5) },
        ];
        return compare(
            (&args.text_file, &args.windows, &args.output),
            (&args.trials, &args.forward),
            &columns,
            ("Perplexity against KV bytes read", ("perplexity", false), &measured),
        );
    }
    let idle = args.trials.idle_flag().or(args.windows.flag()).or(args.output.table_flag());
    if let Some(flag) = idle {
        return Err(Usage(format!("{flag} is given without --policies, expected both")).into());
    }
    dense(args)
}

fn dense(args: &PerplexityArgs) -> Result<()> {
    let mut config = args.forward.config()?;
    let text = read(&args.text_file)?;
    // One window at a time: memory for others would only make the plan larger.
    config.max_num_seqs = 1;
    let engine = args.forward.device.load(config)?;
    let mut watched = Watched::new()?;
    let mut control = watched.control();
    let result =
        engine.perplexity(&text, args.stride, |done, total| control("tokens", done, total));
    drop(control);
    watched.quiet();
    let result = result?;
    if result.tokens == 0 {
        return Err(Quiet::Interrupted.into());
    }
    if args.output.json() {
        output::json(&json!({
            "nll_mean": result.nll_mean,
            "perplexity": result.perplexity,
            "tokens": result.tokens,
        }))?;
    } else {
        output::text(&format!(
            "perplexity {:.4} ({:.6} nats per token over {} tokens)\n",
            result.perplexity,
            result.nll_mean,
            count(result.tokens as u64),
        ))?;
    }
    watched.finish()
}

/// A text that is not empty.
pub(super) fn read(file: &Path) -> Result<String> {
    let text = prompt::read_text(file)?;
    if text.is_empty() {
        return Err(anyhow!("{} is empty, expected text", file.display()));
    }
    Ok(text)
}

impl WindowArgs {
    fn flag(&self) -> Option<&'static str> {
        [
            (self.window.is_some(), "--window"),
            (self.prefix.is_some(), "--prefix"),
            (self.samples.is_some(), "--samples"),
            (self.reference_kv_cache_dtype.is_some(), "--reference-kv-cache-dtype"),
        ]
        .into_iter()
        .find_map(|(given, flag)| given.then_some(flag))
    }

    fn test(&self, limit: usize) -> TextTest {
        let window = self.window.unwrap_or(WINDOW.min(limit));
        TextTest {
            window,
            prefix: self.prefix.unwrap_or(window / 2),
            windows: self.samples.unwrap_or(SAMPLES),
        }
    }
}

/// What a row measures: KV bytes read and a value, for the plot.
type Measured<'a> = &'a dyn Fn(&TextRow) -> (Option<f64>, f64);

/// Feeds the same windows through every policy; prints and draws.
pub(super) fn compare(
    (file, windows, output): (&Path, &WindowArgs, &OutputArgs),
    (trials, forward): (&TrialArgs, &ForwardArgs),
    columns: &[Column],
    (title, (y, log_y), measured): (&str, (&str, bool), Measured<'_>),
) -> Result<()> {
    check_svg("--plot", output.plot.as_ref())?;
    let content = read(file)?;
    let lab = Lab::open(forward)?;
    let chosen = trials.trials(lab.model.config().layers, None)?;
    let observed = trials.observed(&chosen)?;
    let tokens =
        lab.tokenizer()?.encode(&content, true).map_err(tinyserve::TinyServeError::from)?;
    let test = windows.test(lab.limit());
    let mut reference = match windows.reference_kv_cache_dtype {
        Some(dtype) => {
            let mut lab = Lab::open(forward)?;
            lab.config.kv_cache_dtype = dtype;
            // What --open-page-dtype says is of pages that become codes.
            lab.config.open_page_dtype =
                lab.config.open_page_dtype.filter(|_| dtype.is_quantised());
            Some(lab.probe(test.window, 0)?)
        }
        None => None,
    };
    let mut probe = lab.probe(test.window, observed)?;
    let mut watched = Watched::new()?;
    let probes = (&mut probe, reference.as_mut());
    let rows = text(probes, &tokens, &test, &chosen, &mut watched.control());
    let rows = rows.map_err(lab_error)?;
    watched.quiet();
    if rows.iter().all(|row| row.tokens == 0) && watched.stopped() {
        return Err(Quiet::Interrupted.into());
    }
    let mut all = TRIAL.to_vec();
    all.extend_from_slice(columns);
    all.extend([
        Column { field: "bytes_read_ratio", title: "KV read", style: Style::Percent },
        Column { field: "recall", title: "recall", style: Style::Percent },
        Column { field: "tokens", title: "predicted", style: Style::Plain },
    ]);
    output.print(&all, &rows)?;
    if let Some(file) = &output.plot {
        let points = rows.iter().map(|row| (row.policy, measured(row)));
        let axes = Axes { x: "share of dense KV bytes read", y, log_y };
        draw(file, lines(title, axes, &by_policy(points)))?;
    }
    watched.finish()
}

/// One line for each policy, its points in order of the bytes read.
pub(super) fn by_policy(
    points: impl Iterator<Item = (&'static str, (Option<f64>, f64))>,
) -> Vec<Line> {
    let mut lines: Vec<Line> = Vec::new();
    for (policy, (x, y)) in points {
        let Some(x) = x else { continue };
        match lines.iter_mut().find(|line| line.name == policy) {
            Some(line) => line.points.push((x, y)),
            None => lines.push(Line { name: policy.to_owned(), points: vec![(x, y)] }),
        }
    }
    for line in &mut lines {
        line.points.sort_by(|a, b| a.0.total_cmp(&b.0));
    }
    lines
}
