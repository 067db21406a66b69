//! `tinyserve bench serve`: requests that arrive over time, as a trace says or at random.

use std::path::PathBuf;
use std::time::Duration;

use anyhow::Result;
use clap::Args;
use serde::Serialize;

use super::load::{Arrival, Figures, replay};
use super::runner::RandomTokens;
use super::source::{ShapeArgs, Source};
use super::trace::{self, BLOCK, TraceRow};
use crate::args::{AdaptiveArgs, EngineArgs, QueueArgs, ScheduleArgs, Sources};
use crate::exit::out_of_range;
use crate::progress::Progress;
use crate::{memory, output, values};

#[derive(Debug, Args)]
pub(crate) struct ServeArgs {
    /// Arrivals and lengths of real requests: a .csv file of Azure's LLM inference traces, or a
    /// .jsonl file of Mooncake's, whose prompts share the blocks that the trace says.
    #[arg(long, value_name = "FILE")]
    trace: Option<PathBuf>,
    /// Most requests.
    #[arg(long, value_name = "N", default_value = "100", value_parser = values::size)]
    num_prompts: usize,
    /// Multiplies the times of the trace: 0.5 is twice as fast, 0 sends all at once.
    #[arg(long, value_name = "FACTOR", default_value = "1", requires = "trace")]
    time_scale: f64,
    /// Multiplies the lengths of the trace; what still exceeds the context is cut.
    #[arg(long, value_name = "FACTOR", default_value = "1", requires = "trace")]
    length_scale: f64,
    /// Requests per second without a trace, at random times (Poisson); inf sends all at once.
    #[arg(long, value_name = "R", default_value = "inf", conflicts_with = "trace")]
    request_rate: f64,
    /// Prompt tokens of each request without a trace.
    #[arg(short = 'p', long, value_name = "N", default_value = "128", conflicts_with = "trace",
          value_parser = values::size)]
    n_prompt: usize,
    /// Tokens that each request generates without a trace.
    #[arg(short = 'n', long, value_name = "N", default_value = "64", conflicts_with = "trace",
          value_parser = values::size)]
    n_gen: usize,
    /// Most requests that are sent and not answered yet [default: no limit].
    #[arg(long, value_name = "N", value_parser = values::size)]
    max_concurrency: Option<usize>,
    /// Share of the requests whose callers lose interest at a random token, 0 to 1.
    #[arg(long, value_name = "SHARE", default_value = "0")]
    abort_share: f64,
    /// Prints one JSON object.
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    shape: ShapeArgs,
    #[command(flatten)]
    engine: EngineArgs,
    #[command(flatten)]
    adaptive: AdaptiveArgs,
    #[command(flatten)]
    schedule: ScheduleArgs,
    #[command(flatten)]
    queue: QueueArgs,
}

/// The figures of a load, and what it left behind.
#[derive(Debug, Serialize)]
struct Report {
    #[serde(flatten)]
    figures: Figures,
    /// Pages that a request or a session holds at the end.
    pages_used: u64,
    /// Resident memory of this process when a tenth of the requests had ended.
    rss_tenth_bytes: Option<u64>,
    rss_end_bytes: Option<u64>,
}

/// Measures and prints.
pub(crate) fn serve(args: &ServeArgs, sources: Sources) -> Result<()> {
    let mut config = args.engine.config(sources)?;
    args.schedule.apply(&mut config);
    args.queue.apply(&mut config);
    args.adaptive.apply(&mut config)?;
    config.check()?;
    for (flag, factor) in [("--time-scale", args.time_scale), ("--length-scale", args.length_scale)]
    {
        if !(factor >= 0.0 && factor.is_finite()) {
            return Err(out_of_range(flag, factor, "0 or more"));
        }
    }
    if !(0.0..=1.0).contains(&args.abort_share) {
        return Err(out_of_range("--abort-share", args.abort_share, "0 to 1"));
    }
    if args.request_rate.is_nan() || args.request_rate <= 0.0 {
        return Err(out_of_range("--request-rate", args.request_rate, "above 0, or inf"));
    }
    for (flag, value) in [
        ("--num-prompts", Some(args.num_prompts)),
        ("--max-concurrency", args.max_concurrency),
        ("--n-prompt (-p)", Some(args.n_prompt)),
        ("--n-gen (-n)", Some(args.n_gen)),
    ] {
        if value == Some(0) {
            return Err(out_of_range(flag, 0, "at least 1"));
        }
    }
    let rows = match &args.trace {
        Some(file) => scaled(trace::read(file, args.num_prompts)?, args),
        None => random(args),
    };
    let longest = rows.iter().map(|row| row.prompt + row.tokens).max().unwrap_or(2);
    let source = Source::open(&args.shape, &config)?;
    let limit = source.limit(&config)?;
    if args.trace.is_none() && longest > limit {
        let expected = format!("at most {limit}, the context");
        return Err(out_of_range("the sum of -p and -n", longest, &expected));
    }
    let longest = longest.min(limit);
    let cut = rows.iter().filter(|row| row.prompt + row.tokens > longest).count();
    config.max_sequence_length = Some(longest);
    let checkpoint = source.checkpoint(&config, (1, longest))?;
    let engine = args.engine.forward.device.load_open(config, checkpoint)?;
    let mut tokens = Prompts::new(engine.engine().limits().vocab);
    let mut arrivals: Vec<_> = rows.iter().map(|row| tokens.arrival(row, longest)).collect();
    leave(&mut arrivals, args.abort_share);
    if cut > 0 {
        eprintln!("{cut} of {} requests are cut to {longest} tokens, the context", rows.len());
    }
    let most = args.max_concurrency.unwrap_or(usize::MAX);
    let mut progress = Progress::new("requests");
    let mut rss_tenth_bytes = None;
    let load = replay(engine.engine(), arrivals, most, |done, total| {
        if rss_tenth_bytes.is_none() && 10 * done >= total {
            rss_tenth_bytes = memory::resident();
        }
        progress.update(done, total);
    })?;
    progress.finish();
    for advice in engine.engine().stats().suggestions() {
        eprintln!("{}: {} {} ({})", advice.fact, advice.knob, advice.change, advice.effect);
    }
    let report = Report {
        figures: Figures::of(&load),
        pages_used: engine.engine().stats().pages_used,
        rss_tenth_bytes,
        rss_end_bytes: memory::resident(),
    };
    if args.json {
        return output::json(&report);
    }
    let megabytes = |bytes: Option<u64>| {
        bytes.map_or("unknown".to_owned(), |bytes| format!("{:.1}", bytes as f64 / 1e6))
    };
    output::text(&report.figures.block(&[
        ("Pages in use at the end:", report.pages_used.to_string()),
        ("Resident memory after a tenth (MB):", megabytes(report.rss_tenth_bytes)),
        ("Resident memory at the end (MB):", megabytes(report.rss_end_bytes)),
    ]))
}

/// Lets the callers of a share of the requests lose interest, each at a random token.
fn leave(arrivals: &mut [Arrival], share: f64) {
    let mut uniform = RandomTokens::seeded(1, 1 << 32);
    let mut share_of = |whole: f64| f64::from(uniform.next()) / (1u64 << 32) as f64 * whole;
    for arrival in arrivals {
        let (chance, at) = (share_of(1.0), share_of(arrival.tokens as f64));
        arrival.leaves_after = (chance < share).then_some(at as usize);
    }
}

/// A trace in the time and the lengths that are asked for.
fn scaled(rows: Vec<TraceRow>, args: &ServeArgs) -> Vec<TraceRow> {
    let length = |tokens: usize| ((tokens as f64 * args.length_scale) as usize).max(1);
    rows.into_iter()
        .map(|row| TraceRow {
            at: row.at.mul_f64(args.time_scale),
            prompt: length(row.prompt),
            tokens: length(row.tokens),
            blocks: row.blocks,
        })
        .collect()
}

/// Requests of one size at random times.
fn random(args: &ServeArgs) -> Vec<TraceRow> {
    let mut uniform = RandomTokens::new(1 << 32);
    let mut at = 0.0;
    (0..args.num_prompts)
        .map(|_| {
            let row = TraceRow {
                at: Duration::from_secs_f64(at),
                prompt: args.n_prompt,
                tokens: args.n_gen,
                blocks: Vec::new(),
            };
            // Times between arrivals of a Poisson process are exponential.
            let share = (f64::from(uniform.next()) + 1.0) / (1u64 << 32) as f64;
            at += if args.request_rate.is_finite() { -share.ln() / args.request_rate } else { 0.0 };
            row
        })
        .collect()
}

/// Makes prompts up.
struct Prompts {
    vocab: usize,
    random: RandomTokens,
}

impl Prompts {
    fn new(vocab: usize) -> Self {
        Self { vocab, random: RandomTokens::new(vocab) }
    }

    /// The request of a row, cut to `longest` tokens in all.
    fn arrival(&mut self, row: &TraceRow, longest: usize) -> Arrival {
        let prompt = row.prompt.min(longest - 1);
        let tokens = row.tokens.min(longest - prompt);
        // Scaled lengths scale the blocks with them.
        let block = match row.blocks.len() {
            0 => prompt,
            _ if row.prompt.div_ceil(BLOCK) >= row.blocks.len() => BLOCK,
            blocks => row.prompt.div_ceil(blocks),
        };
        let mut ids = Vec::with_capacity(prompt);
        for &number in &row.blocks {
            let mut random = RandomTokens::seeded(number.wrapping_add(1), self.vocab);
            ids.extend((0..block).map(|_| random.next()));
        }
        ids.truncate(prompt);
        while ids.len() < prompt {
            ids.push(self.random.next());
        }
        Arrival { at: row.at, prompt: ids, tokens, leaves_after: None }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn equal_blocks_are_equal_tokens_at_every_scale() {
        let mut prompts = Prompts::new(1000);
        let row = |prompt, blocks: &[u64]| TraceRow {
            at: Duration::ZERO,
            prompt,
            tokens: 5,
            blocks: blocks.to_vec(),
        };
        for (length, shared) in [(1300, 1024), (130, 86)] {
            let one = prompts.arrival(&row(length, &[0, 1, 2]), 2000);
            let other = prompts.arrival(&row(length, &[0, 1, 3]), 2000);
            assert_eq!((one.prompt.len(), one.tokens), (length, 5));
            assert_eq!(one.prompt[..shared], other.prompt[..shared]);
            assert_ne!(one.prompt, other.prompt);
        }
        let cut = prompts.arrival(&row(1300, &[0]), 100);
        assert_eq!((cut.prompt.len(), cut.tokens), (99, 1));
    }
}
