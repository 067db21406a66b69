//! `tinyserve eval`: how good a model is.

use std::path::PathBuf;

use anyhow::{Result, anyhow};
use clap::Args;
use serde_json::json;

use crate::args::ForwardArgs;
use crate::progress::Progress;
use crate::units::count;
use crate::{output, prompt, values};

#[derive(Debug, Args)]
pub(crate) struct PerplexityArgs {
    /// A UTF-8 file with the text, or `-` for stdin.
    #[arg(long, value_name = "FILE")]
    text_file: PathBuf,
    /// Tokens from the start of one window to the next [default: half the context].
    #[arg(long, value_name = "TOKENS", value_parser = values::size)]
    stride: Option<usize>,
    /// Prints one JSON object.
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    forward: ForwardArgs,
}

/// Measures how well the model predicts a text.
pub(crate) fn perplexity(args: &PerplexityArgs) -> Result<()> {
    let mut config = args.forward.config()?;
    // One window at a time: memory for others would only make the plan larger.
    config.max_num_seqs = 1;
    let text = prompt::read_text(&args.text_file)?;
    if text.is_empty() {
        return Err(anyhow!("{} is empty, expected text", args.text_file.display()));
    }
    let engine = args.forward.device.load(config)?;
    let mut progress = Progress::new("tokens");
    let result = engine.perplexity(&text, args.stride, |done, total| {
        progress.update(done, total);
    })?;
    progress.finish();
    if args.json {
        return output::json(&json!({
            "nll_mean": result.nll_mean,
            "perplexity": result.perplexity,
            "tokens": result.tokens,
        }));
    }
    output::text(&format!(
        "perplexity {:.4} ({:.6} nats per token over {} tokens)\n",
        result.perplexity,
        result.nll_mean,
        count(result.tokens as u64),
    ))
}
