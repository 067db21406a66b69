//! `tinyserve tokenize`: how a text becomes tokens.

use anyhow::Result;
use clap::Args;
use serde_json::json;
use tinyserve::model::Tokenizer;

use crate::args::ModelArgs;
use crate::output;
use crate::prompt::PromptArgs;

#[derive(Debug, Args)]
pub(crate) struct TokenizeArgs {
    #[command(flatten)]
    model: ModelArgs,
    #[command(flatten)]
    prompt: PromptArgs,
    /// Leaves out the tokens that the model expects around a text.
    #[arg(long)]
    no_special_tokens: bool,
    /// Prints one JSON object: ids, and how the vocabulary spells them.
    #[arg(long)]
    json: bool,
}

/// Prints the tokens of a text.
pub(crate) fn tokenize(args: &TokenizeArgs) -> Result<()> {
    let text = args.prompt.read()?;
    let tokenizer = Tokenizer::load(&args.model.config()?.model)?;
    let tokens = tokenizer.encode(&text, !args.no_special_tokens)?;
    // Every id that the tokenizer made is one that it can spell.
    let pieces: Vec<_> =
        tokens.iter().map(|&id| tokenizer.id_to_token(id).unwrap_or_default()).collect();
    if args.json {
        return output::json(&json!({ "tokens": tokens, "text_pieces": pieces }));
    }
    let lines = tokens.iter().zip(&pieces).map(|(id, piece)| format!("{id}\t{piece:?}\n"));
    output::text(&lines.collect::<String>())
}
