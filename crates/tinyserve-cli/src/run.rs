//! `tinyserve run`: continues one prompt.

use std::ops::ControlFlow;
use std::path::PathBuf;

use anyhow::{Result, anyhow};
use clap::Args;
use serde::Serialize;
use tinyserve::model::SamplingParams;
use tinyserve::{
    FinishReason, KvUsage, StreamEvent, TinyServe, TinyServeError, TinyServeRequest,
    TinyServeResponse,
};

use crate::args::{AdaptiveArgs, EngineArgs, PluginArgs, Sources};
use crate::exit::{Quiet, out_of_range};
use crate::interrupt::Interrupt;
use crate::progress::Progress;
use crate::prompt::PromptArgs;
use crate::units::{as_milliseconds, bytes, count, milliseconds, percent};
use crate::{memory, output, values};

#[derive(Debug, Args)]
pub(crate) struct RunArgs {
    #[command(flatten)]
    prompt: PromptArgs,
    /// Most tokens to generate.
    #[arg(short = 'n', long, value_name = "N", default_value = "128", env = "TINYSERVE_MAX_TOKENS",
          value_parser = values::size)]
    max_tokens: usize,
    /// A text that ends the generation; may be given several times.
    #[arg(long, value_name = "TEXT", allow_hyphen_values = true)]
    stop: Vec<String>,
    /// Goes on after an end-of-sequence token.
    #[arg(long, env = "TINYSERVE_IGNORE_EOS",
          value_parser = clap::builder::BoolishValueParser::new())]
    ignore_eos: bool,
    /// Prints one JSON object instead of text.
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    engine: EngineArgs,
    #[command(flatten)]
    adaptive: AdaptiveArgs,
    #[command(flatten)]
    plugins: PluginArgs,
    #[command(flatten)]
    sampling: SamplingArgs,
    /// Begins with what an earlier run saved: of a prompt that begins with the same tokens only the
    /// rest is computed.
    #[arg(long, value_name = "FILE", env = "TINYSERVE_LOAD_SESSION", help_heading = "KV cache")]
    load_session: Option<PathBuf>,
    /// Saves keys and values of the prompt and the answer afterwards, as far as they fill pages.
    #[arg(long, value_name = "FILE", env = "TINYSERVE_SAVE_SESSION", help_heading = "KV cache")]
    save_session: Option<PathBuf>,
}

/// The session of a run that is saved or loaded.
const SESSION: &str = "run";

/// How tokens are drawn.
#[derive(Debug, Args)]
#[command(next_help_heading = "Sampling")]
pub(crate) struct SamplingArgs {
    /// Divides the logits; 0 takes the most likely token.
    #[arg(
        long,
        value_name = "T",
        default_value = "0.7",
        env = "TINYSERVE_TEMPERATURE",
        allow_negative_numbers = true
    )]
    temperature: f32,
    /// Keeps the fewest most likely tokens whose probabilities reach this sum; 1 keeps all.
    #[arg(
        long,
        value_name = "P",
        default_value = "0.9",
        env = "TINYSERVE_TOP_P",
        allow_negative_numbers = true
    )]
    top_p: f32,
    /// Keeps this many of the most likely tokens; 0 keeps all.
    #[arg(long, value_name = "K", default_value = "0", env = "TINYSERVE_TOP_K",
          value_parser = values::size)]
    top_k: usize,
    /// Keeps tokens at least this share as likely as the most likely one; 0 keeps all.
    #[arg(
        long,
        value_name = "P",
        default_value = "0",
        env = "TINYSERVE_MIN_P",
        allow_negative_numbers = true
    )]
    min_p: f32,
    /// Divides the odds of tokens that were seen before; 1 changes nothing.
    #[arg(
        long,
        value_name = "FACTOR",
        default_value = "1",
        env = "TINYSERVE_REPETITION_PENALTY",
        allow_negative_numbers = true
    )]
    repetition_penalty: f32,
    /// Takes this off the logits of tokens that were generated before, -2 to 2.
    #[arg(
        long,
        value_name = "X",
        default_value = "0",
        env = "TINYSERVE_PRESENCE_PENALTY",
        allow_negative_numbers = true
    )]
    presence_penalty: f32,
    /// Takes this off the logit of a token for each time it was generated before, -2 to 2.
    #[arg(
        long,
        value_name = "X",
        default_value = "0",
        env = "TINYSERVE_FREQUENCY_PENALTY",
        allow_negative_numbers = true
    )]
    frequency_penalty: f32,
    /// The same seed gives the same text [default: a new one each time].
    #[arg(long, value_name = "N", env = "TINYSERVE_SEED")]
    seed: Option<u64>,
}

impl SamplingArgs {
    pub(crate) fn params(&self) -> Result<SamplingParams> {
        let params = SamplingParams {
            temperature: self.temperature,
            top_k: self.top_k,
            top_p: self.top_p,
            min_p: self.min_p,
            repetition_penalty: self.repetition_penalty,
            presence_penalty: self.presence_penalty,
            frequency_penalty: self.frequency_penalty,
            seed: self.seed,
        };
        params.check().map_err(TinyServeError::from)?;
        Ok(params)
    }
}

/// Generates and prints.
pub(crate) fn run(args: &RunArgs, sources: Sources) -> Result<()> {
    let mut config = args.engine.config(sources)?;
    // One request: memory for others would only make the plan larger.
    config.max_num_seqs = 1;
    args.plugins.apply(&mut config)?;
    args.adaptive.apply(&mut config)?;
    config.check()?;
    let sampling = args.sampling.params()?;
    if args.max_tokens == 0 {
        return Err(out_of_range("--max-tokens (-n)", 0, "at least 1"));
    }
    if args.stop.iter().any(String::is_empty) {
        return Err(out_of_range("--stop", "empty", "a text"));
    }
    let prompt = args.prompt.read()?;
    if prompt.is_empty() {
        return Err(anyhow!("{} is empty, expected text to continue", args.prompt.place()));
    }
    if let Some(file) = &args.save_session {
        output::has_place(file)?;
    }
    let engine = args.engine.forward.device.load(config)?;
    // Without a tokenizer there would be no text to stream, whatever the prompt is.
    engine.tokenizer()?;
    let mut request = TinyServeRequest::new(prompt);
    request.max_tokens = args.max_tokens;
    request.sampling = sampling;
    request.stop.clone_from(&args.stop);
    request.ignore_eos = args.ignore_eos;
    if args.load_session.is_some() || args.save_session.is_some() {
        request.session_id = Some(SESSION.to_owned());
    }
    if let Some(file) = &args.load_session {
        engine.restore_session(SESSION, file)?;
    }
    let response = generate(&engine, request, !args.json)?;
    if args.json {
        output::json(&report(&engine, &response))?;
    } else {
        output::text("\n")?;
        eprint!("{}", summary(&engine, &response));
    }
    if let Some(file) = &args.save_session {
        let tokens = engine.save_session(SESSION, file)?;
        eprintln!("session   {} tokens saved to {}", count(tokens as u64), file.display());
    }
    match response.finish_reason {
        FinishReason::Cancelled => Err(Quiet::Interrupted.into()),
        FinishReason::Stop | FinishReason::Length => Ok(()),
    }
}

/// Runs the request until it ends, Ctrl-C is pressed or nobody reads `stdout` any more.
fn generate(
    engine: &TinyServe,
    request: TinyServeRequest,
    stream: bool,
) -> Result<TinyServeResponse> {
    let interrupt = Interrupt::listen()?;
    let mut progress = Progress::new("prefill");
    let mut written = Ok(());
    let response = engine.serve_stream(request, |event| {
        match event {
            StreamEvent::Prefill { done, total } => {
                progress.update(done, total);
                if done == total {
                    progress.finish();
                }
            }
            StreamEvent::Token { text, .. } | StreamEvent::Rest { text } => {
                if stream && !text.is_empty() && written.is_ok() {
                    written = output::text(&text);
                }
            }
        }
        if written.is_err() || interrupt.pressed() {
            return ControlFlow::Break(());
        }
        ControlFlow::Continue(())
    });
    progress.finish();
    written?;
    Ok(response?)
}

/// The object of `--json`.
#[derive(Serialize)]
struct Report<'a> {
    text: &'a str,
    tokens: &'a [u32],
    prompt_tokens: usize,
    /// Of the prompt, tokens whose keys and values were there already.
    cached_tokens: usize,
    finish_reason: &'static str,
    stop_reason: Option<&'a str>,
    timings: ReportTimings,
    kv: &'a KvUsage,
    memory: ReportMemory,
}

#[derive(Serialize)]
struct ReportMemory {
    /// Most bytes that the plan allows to be resident.
    planned_bytes: u64,
    /// Most bytes that were.
    resident_bytes: Option<u64>,
}

#[derive(Serialize)]
struct ReportTimings {
    load_ms: f64,
    prefill_ms: f64,
    prefill_tok_s: Option<f64>,
    ttft_ms: Option<f64>,
    decode_ms: f64,
    decode_tok_s: Option<f64>,
}

fn report<'a>(engine: &TinyServe, response: &'a TinyServeResponse) -> Report<'a> {
    let timings = &response.timings;
    // A prompt that was interrupted has no first token, and no speed either.
    let complete = !response.tokens.is_empty();
    Report {
        text: &response.generated_text,
        tokens: &response.tokens,
        prompt_tokens: response.prompt_tokens,
        cached_tokens: response.cached_tokens,
        finish_reason: response.finish_reason.name(),
        stop_reason: response.stop_reason.as_deref(),
        timings: ReportTimings {
            load_ms: as_milliseconds(engine.load_time()),
            prefill_ms: timings.prefill_ms,
            prefill_tok_s: complete.then_some(timings.prefill_tok_s),
            ttft_ms: complete.then_some(timings.ttft_ms),
            decode_ms: timings.decode_ms,
            decode_tok_s: timings.decode_tok_s,
        },
        kv: &response.kv,
        memory: ReportMemory {
            planned_bytes: engine.memory().plan.total_bytes(),
            resident_bytes: memory::peak_resident(),
        },
    }
}

/// What people want to know afterwards, in lines.
fn summary(engine: &TinyServe, response: &TinyServeResponse) -> String {
    let (timings, kv) = (&response.timings, &response.kv);
    let mut lines = format!("\nload      {}\n", milliseconds(as_milliseconds(engine.load_time())));
    let prompt = format!("prefill   {} tokens", count(response.prompt_tokens as u64));
    if response.tokens.is_empty() {
        lines += &format!("{prompt}, interrupted after {}\n", milliseconds(timings.prefill_ms));
    } else {
        lines += &format!(
            "{prompt} in {} ({:.1} tok/s), first token after {}\n",
            milliseconds(timings.prefill_ms),
            timings.prefill_tok_s,
            milliseconds(timings.ttft_ms),
        );
    }
    if response.cached_tokens > 0 {
        lines += &format!("cached    {} tokens of them\n", count(response.cached_tokens as u64));
    }
    let generated = count(response.tokens.len() as u64);
    let reason = match &response.stop_reason {
        Some(stop) => format!("{} ({stop:?})", response.finish_reason.name()),
        None => response.finish_reason.name().to_owned(),
    };
    let speed = match timings.decode_tok_s {
        Some(speed) => format!(" in {} ({speed:.1} tok/s)", milliseconds(timings.decode_ms)),
        None => String::new(),
    };
    lines += &format!("decode    {generated} tokens{speed}, ended by {reason}\n");
    lines += &format!(
        "KV cache  {} pages of {} tokens, {}",
        count(kv.pages as u64),
        engine.config().page_size,
        bytes(kv.bytes_resident as u64),
    );
    if let Some(ratio) = kv.bytes_read_ratio {
        lines += &format!("; read {} of the bytes that dense attention reads", percent(ratio));
    }
    if let Some(recall) = kv.recall {
        lines += &format!("; recall {}", percent(recall));
    }
    if let Some(reuse) = kv.reuse {
        lines += &format!("; reuse {}", percent(reuse));
    }
    if kv.pruned_tokens > 0 {
        let (tokens, freed) = (count(kv.pruned_tokens), bytes(kv.pruned_bytes));
        lines += &format!("; {tokens} tokens pruned, {freed} given back");
    }
    lines.push('\n');
    lines += &format!("memory    planned {}", bytes(engine.memory().plan.total_bytes()));
    if let Some(resident) = memory::peak_resident() {
        lines += &format!(", resident at most {}", bytes(resident));
    }
    lines.push('\n');
    lines
}
