//! `tinyserve bench throughput`: many sequences together, from prompt to last token.

use std::fmt::Write;
use std::time::Duration;

use anyhow::Result;
use clap::Args;
use serde::Serialize;

use super::latency::{Format, Mode};
use super::load::{Arrival, Figures, Load, replay};
use super::report::table;
use super::runner::RandomTokens;
use super::source::{ShapeArgs, Source};
use super::statistics::deviation;
use crate::args::{EngineArgs, Sources};
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
    engine: EngineArgs,
}

/// A batch size and its figures.
#[derive(Debug, Clone, Serialize)]
struct Row {
    model: String,
    weights: &'static str,
    n_threads: usize,
    kv_cache_dtype: &'static str,
    page_size: usize,
    n_prompt: usize,
    n_gen: usize,
    n_batch: usize,
    attention: &'static str,
    /// Prompt tokens per second until every sequence had its first token.
    pp_ts: f64,
    /// Generated tokens per second of all sequences together, from then on.
    tg_ts: f64,
    /// Deviation of the repetitions' `total_token_throughput`.
    stddev_ts: f64,
    #[serde(flatten)]
    figures: Figures,
    rss_bytes: Option<u64>,
}

/// Measures and prints.
pub(crate) fn throughput(args: &ThroughputArgs, sources: Sources) -> Result<()> {
    let mut config = args.engine.config(sources)?;
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
    config.max_num_seqs = sequences;
    config.max_sequence_length = Some(longest);
    // Every prompt is new: what is kept of old ones would only be in the way.
    config.enable_prefix_caching = false;
    config.check()?;
    let model = source.name(&config);
    let checkpoint = source.checkpoint(&config, (sequences, longest))?;
    let stored = checkpoint.dtype();
    let engine = args.engine.forward.device.load_open(config, checkpoint)?;
    let config = engine.config();
    let mut tokens = RandomTokens::new(engine.engine().limits().vocab);
    let mut rows = Vec::new();
    for &n_batch in &args.n_batch {
        let (mut load, mut speeds) = (Load::default(), Vec::new());
        for run in 0..=args.repetitions {
            let arrivals = (0..n_batch).map(|_| Arrival {
                at: Duration::ZERO,
                prompt: (0..args.n_prompt).map(|_| tokens.next()).collect(),
                tokens: args.n_gen,
                leaves_after: None,
            });
            let one = replay(engine.engine(), arrivals.collect(), n_batch, |_, _| {})?;
            // The first run warms up.
            if run > 0 {
                speeds.push(Figures::of(&one).total_token_throughput);
                load.add(one);
            }
        }
        rows.push(Row {
            model: model.clone(),
            weights: config.weights.name(stored),
            n_threads: engine.threads(),
            kv_cache_dtype: config.kv_cache_dtype.resolve(stored).name(),
            page_size: config.page_size,
            n_prompt: args.n_prompt,
            n_gen: args.n_gen,
            n_batch,
            attention: Mode::new(config, config.attention).name,
            pp_ts: load.prefill_speed(),
            tg_ts: load.decode_speed(),
            stddev_ts: deviation(&speeds),
            figures: Figures::of(&load),
            rss_bytes: memory::peak_resident(),
        });
    }
    match args.output {
        Format::Md => output::text(&text(&rows)),
        Format::Csv => output::text(&table(&rows)?),
        Format::Json => output::json(&rows),
    }
}

/// vLLM's block for each batch size, then how they compare.
fn text(rows: &[Row]) -> String {
    let mut text = String::new();
    for row in rows {
        text += &row.figures.block(&[
            ("Sequences together:", row.n_batch.to_string()),
            ("Prefill throughput (tok/s):", format!("{:.2}", row.pp_ts)),
            ("Decode throughput (tok/s):", format!("{:.2}", row.tg_ts)),
        ]);
    }
    if let [first, others @ ..] = rows {
        for row in others {
            let (one, many, times) = (first.n_batch, row.n_batch, row.tg_ts / first.tg_ts);
            let _ = writeln!(text, "{many} together decode {times:.2} times as fast as {one}.");
        }
    }
    text
}
