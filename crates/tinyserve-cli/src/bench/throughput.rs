//! `tinyserve bench throughput`: many sequences together, from prompt to last token.

use std::fmt::Write;

use anyhow::Result;
use clap::Args;
use serde::Serialize;
use tinyserve::AttentionMode;

use super::latency::{Format, Mode, load};
use super::report::{Setup, table};
use super::runner::DepthFill;
use super::source::{ShapeArgs, Source};
use super::statistics::{deviation, mean};
use crate::args::{self, ForwardArgs, SelectionArgs, Sources};
use crate::exit::out_of_range;
use crate::{memory, output, values};

#[derive(Debug, Args)]
pub(crate) struct ThroughputArgs {
    /// Prompt tokens of each sequence.
    #[arg(short = 'p', long, value_name = "N", default_value = "128",
          value_parser = values::size)]
    n_prompt: usize,
    /// Tokens that each sequence generates.
    #[arg(short = 'n', long, value_name = "N", default_value = "64", value_parser = values::size)]
    n_gen: usize,
    /// Sequences that run together.
    #[arg(short = 'b', long, value_name = "N,…", value_delimiter = ',', default_value = "1,4,16",
          value_parser = values::size)]
    n_batch: Vec<usize>,
    #[command(flatten)]
    shape: ShapeArgs,
    /// Counted runs of each test, after one that is not counted.
    #[arg(short, long, value_name = "N", default_value = "3", value_parser = values::size)]
    repetitions: usize,
    /// What to print.
    #[arg(short, long, value_name = "FORMAT", default_value = "md")]
    output: Format,
    #[command(flatten)]
    forward: ForwardArgs,
    /// When decode steps select pages.
    #[arg(long, value_name = "MODE", env = "TINYSERVE_ATTENTION", help_heading = args::SELECTION,
          value_parser = args::attention_mode())]
    attention: Option<AttentionMode>,
    #[command(flatten)]
    selection: SelectionArgs,
}

/// A batch size and its speeds: tokens per second over the whole batch.
#[derive(Debug, Clone, Serialize)]
struct Row {
    #[serde(flatten)]
    setup: Setup,
    n_prompt: usize,
    n_gen: usize,
    n_batch: usize,
    attention: &'static str,
    /// Of the prompts.
    pp_ts: f64,
    /// Of what is generated.
    tg_ts: f64,
    /// Of both, from the first prompt to the last token.
    ts: f64,
    stddev_ts: f64,
    rss_bytes: Option<u64>,
}

/// Measures and prints.
pub(crate) fn throughput(args: &ThroughputArgs, sources: Sources) -> Result<()> {
    let config = args.forward.selecting(&args.selection, args.attention, sources)?;
    for (flag, least) in [
        ("--repetitions", args.repetitions),
        ("--n-prompt (-p)", args.n_prompt),
        ("--n-gen (-n)", args.n_gen),
        ("--n-batch (-b)", args.n_batch.iter().copied().min().unwrap_or(0)),
    ] {
        if least == 0 {
            return Err(out_of_range(flag, 0, "at least 1"));
        }
    }
    let source = Source::open(&args.shape, &config)?;
    let (longest, limit) = (args.n_prompt.saturating_add(args.n_gen), source.limit(&config)?);
    if longest > limit {
        let expected = format!("at most {limit}, the context");
        return Err(out_of_range("the sum of -p and -n", longest, &expected));
    }
    let sequences = args.n_batch.iter().copied().max().unwrap_or(1);
    let model = source.name(&config);
    let checkpoint = source.checkpoint(&config, (sequences, longest))?;
    let size = (sequences, longest);
    let (mut runner, setup) =
        load(&args.forward, (&config, model), &checkpoint, size, DepthFill::Prefill)?;
    drop(checkpoint);
    let mode = Mode::new(&config, config.attention);
    let mut rows = Vec::new();
    for &n_batch in &args.n_batch {
        let empty = runner.fill(n_batch, 0, DepthFill::Prefill)?;
        let mut speeds = [Vec::new(), Vec::new(), Vec::new()];
        for run in 0..=args.repetitions {
            let tokens = (args.n_prompt, args.n_gen);
            let taken = runner.time(&empty, tokens, mode.attention())?;
            let [prefill, decode] = taken.map(|sample| sample.elapsed.as_secs_f64());
            // The first run warms up.
            if run > 0 {
                let speed = |tokens: usize, seconds: f64| (n_batch * tokens) as f64 / seconds;
                speeds[0].push(speed(args.n_prompt, prefill));
                speeds[1].push(speed(args.n_gen, decode));
                speeds[2].push(speed(longest, prefill + decode));
            }
        }
        rows.push(Row {
            setup: setup.clone(),
            n_prompt: args.n_prompt,
            n_gen: args.n_gen,
            n_batch,
            attention: mode.name,
            pp_ts: mean(&speeds[0]),
            tg_ts: mean(&speeds[1]),
            ts: mean(&speeds[2]),
            stddev_ts: deviation(&speeds[2]),
            rss_bytes: memory::peak_resident(),
        });
        runner.release(empty);
    }
    match args.output {
        Format::Md => output::text(&markdown(&rows)),
        Format::Csv => output::text(&table(&rows)?),
        Format::Json => output::json(&rows),
    }
}

fn markdown(rows: &[Row]) -> String {
    let mut text = "| model | threads | kv | attention | prompt | generated | batch | pp t/s \
                    | tg t/s | t/s |\n\
                    | --- | ---: | --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |\n"
        .to_owned();
    for row in rows {
        let setup = &row.setup;
        let _ = writeln!(
            text,
            "| {} {} | {} | {} | {} | {} | {} | {} | {:.2} | {:.2} | {:.2} ± {:.2} |",
            setup.model,
            setup.weights,
            setup.n_threads,
            setup.kv_cache_dtype,
            row.attention,
            row.n_prompt,
            row.n_gen,
            row.n_batch,
            row.pp_ts,
            row.tg_ts,
            row.ts,
            row.stddev_ts,
        );
    }
    text
}
