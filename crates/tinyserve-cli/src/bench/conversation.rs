//! `tinyserve bench conversation`: the time to the first token, turn by turn.

use std::fmt::Write;
use std::time::Duration;

use anyhow::{Result, anyhow};
use clap::Args;
use serde::Serialize;
use tinyserve::TinyServeError;
use tinyserve::model::SamplingParams;
use tinyserve::sched::{Engine, Event, Request, Summary};

use super::latency::Format;
use super::report::table;
use super::runner::RandomTokens;
use super::source::{ShapeArgs, Source};
use super::statistics::median;
use crate::args::{EngineArgs, Sources};
use crate::exit::out_of_range;
use crate::units::{as_milliseconds, milliseconds};
use crate::{output, values};

#[derive(Debug, Args)]
pub(crate) struct ConversationArgs {
    /// Turns: a message and its answer.
    #[arg(long, value_name = "N", default_value = "5", value_parser = values::size)]
    turns: usize,
    /// Tokens of the first message.
    #[arg(short = 'p', long, value_name = "N", default_value = "128", value_parser = values::size)]
    n_prompt: usize,
    /// Tokens of every later message.
    #[arg(long, value_name = "N", default_value = "32", value_parser = values::size)]
    n_new: usize,
    /// Tokens of each answer.
    #[arg(short = 'n', long, value_name = "N", default_value = "32", value_parser = values::size)]
    n_gen: usize,
    #[command(flatten)]
    shape: ShapeArgs,
    /// Conversations; medians are printed.
    #[arg(short, long, value_name = "N", default_value = "3", value_parser = values::size)]
    repetitions: usize,
    /// What to print.
    #[arg(short, long, value_name = "FORMAT", default_value = "md")]
    output: Format,
    #[command(flatten)]
    engine: EngineArgs,
}

/// One turn.
#[derive(Debug, Clone, Serialize)]
struct Row {
    model: String,
    n_turn: usize,
    /// Tokens of the whole text until its answer.
    n_prompt: usize,
    /// Of those, tokens that the session had kept.
    n_cached: usize,
    ttft_ms: f64,
    /// Of the same prompt, without a session and without what others computed.
    ttft_alone_ms: f64,
}

/// Measures and prints.
pub(crate) fn conversation(args: &ConversationArgs, sources: Sources) -> Result<()> {
    let mut config = args.engine.config(sources)?;
    for (flag, value) in [
        ("--turns", args.turns),
        ("--n-prompt (-p)", args.n_prompt),
        ("--n-new", args.n_new),
        ("--n-gen (-n)", args.n_gen),
        ("--repetitions", args.repetitions),
    ] {
        if value == 0 {
            return Err(out_of_range(flag, 0, "at least 1"));
        }
    }
    // One request at a time, beside the pages that the session keeps.
    config.max_num_seqs = 2;
    let source = Source::open(&args.shape, &config)?;
    let later = args.n_new.saturating_add(args.n_gen).saturating_mul(args.turns - 1);
    let longest = args.n_prompt.saturating_add(args.n_gen).saturating_add(later);
    let limit = source.limit(&config)?;
    if longest > limit {
        let expected = format!("at most {limit}, the context");
        return Err(out_of_range("the length of the conversation", longest, &expected));
    }
    let model = source.name(&config);
    config.max_sequence_length = Some(longest);
    let checkpoint = source.checkpoint(&config, (config.max_num_seqs, longest))?;
    let engine = args.engine.forward.device.load_open(config, checkpoint)?;
    let engine = engine.engine();
    let mut tokens = RandomTokens::new(engine.limits().vocab);
    // The first conversation warms up.
    converse(engine, args, &mut tokens, "warm-up")?;
    let mut turns = vec![Vec::new(); args.turns];
    for run in 0..args.repetitions {
        let told = converse(engine, args, &mut tokens, &run.to_string())?;
        turns.iter_mut().zip(told).for_each(|(turn, told)| turn.push(told));
    }
    let rows: Vec<_> = turns.iter().enumerate().map(|(i, turn)| row(&model, i + 1, turn)).collect();
    match args.output {
        Format::Md => output::text(&markdown(&rows)),
        Format::Csv => output::text(&table(&rows)?),
        Format::Json => output::json(&rows),
    }
}

/// What a turn took: in its session, and alone.
type Turn = (Summary, Duration);

/// Talks once, in a session that is gone afterwards.
fn converse(
    engine: &Engine,
    args: &ConversationArgs,
    tokens: &mut RandomTokens,
    name: &str,
) -> Result<Vec<Turn>> {
    let mut text = Vec::new();
    let mut turns = Vec::new();
    for turn in 0..args.turns {
        let message = if turn == 0 { args.n_prompt } else { args.n_new };
        text.extend((0..message).map(|_| tokens.next()));
        let (_, alone) = answer(
            engine,
            Request {
                // Nobody else's pages are found under a salt of its own.
                cache_salt: format!("{name} {turn}"),
                ..Request::new(&text[..]).max_tokens(1)
            },
        )?;
        let alone = ttft(&alone)?;
        let request = Request::new(&text[..]).max_tokens(args.n_gen).session(name);
        let (answer, summary) = answer(engine, request)?;
        text.extend(answer);
        turns.push((summary, alone));
    }
    match engine.delete_session(name).wait() {
        Some(_) => Ok(turns),
        None => Err(anyhow!("the engine stopped at the end of a conversation")),
    }
}

/// The tokens of an answer, and what it took.
fn answer(engine: &Engine, request: Request) -> Result<(Vec<u32>, Summary)> {
    let request = Request { ignore_eos: true, ..request.sampling(SamplingParams::greedy()) };
    let mut tokens = Vec::new();
    for event in engine.submit(request).map_err(TinyServeError::from)? {
        match event {
            Event::Token(token) => tokens.push(token.id),
            Event::Finished(finished) => return Ok((tokens, finished.summary)),
            Event::Failed(failure) => return Err(TinyServeError::from(failure).into()),
            _ => {}
        }
    }
    Err(anyhow!("the engine stopped in the middle of an answer"))
}

fn ttft(summary: &Summary) -> Result<Duration> {
    summary.timings.ttft.ok_or_else(|| anyhow!("an answer has no first token"))
}

fn row(model: &str, n_turn: usize, turns: &[Turn]) -> Row {
    let median_ms = |of: fn(&Turn) -> Duration| {
        median(&turns.iter().map(|turn| as_milliseconds(of(turn))).collect::<Vec<_>>())
    };
    let usage = turns[0].0.usage;
    Row {
        model: model.to_owned(),
        n_turn,
        n_prompt: usage.prompt_tokens,
        n_cached: usage.cached_tokens,
        ttft_ms: median_ms(|(summary, _)| summary.timings.ttft.unwrap_or_default()),
        ttft_alone_ms: median_ms(|(_, alone)| *alone),
    }
}

fn markdown(rows: &[Row]) -> String {
    let mut text = "| model | turn | tokens | kept | new | TTFT | TTFT without a session |\n\
                    | --- | ---: | ---: | ---: | ---: | ---: | ---: |\n"
        .to_owned();
    for row in rows {
        let _ = writeln!(
            text,
            "| {} | {} | {} | {} | {} | {} | {} |",
            row.model,
            row.n_turn,
            row.n_prompt,
            row.n_cached,
            row.n_prompt - row.n_cached,
            milliseconds(row.ttft_ms),
            milliseconds(row.ttft_alone_ms),
        );
    }
    text
}
