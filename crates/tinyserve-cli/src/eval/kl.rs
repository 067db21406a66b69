//! `tinyserve eval kl`: how far a policy's predictions are from those of dense attention.

use std::path::PathBuf;

use anyhow::Result;
use clap::Args;
use tinyserve_lab::TextRow;

use super::options::{OutputArgs, TrialArgs};
use super::perplexity::{WindowArgs, compare};
use super::table::{Column, Style};
use crate::args::ForwardArgs;

#[derive(Debug, Args)]
pub(crate) struct KlArgs {
    /// A UTF-8 file with the text, or `-` for stdin.
    #[arg(long, value_name = "FILE")]
    text_file: PathBuf,
    #[command(flatten)]
    windows: WindowArgs,
    #[command(flatten)]
    output: OutputArgs,
    #[command(flatten)]
    trials: TrialArgs,
    #[command(flatten)]
    forward: ForwardArgs,
}

/// Measures the divergence of next-token distributions from the dense ones.
pub(crate) fn kl(args: &KlArgs) -> Result<()> {
    let columns = [
        Column { field: "kl_mean", title: "KL, nats", style: Style::Fixed(5) },
        Column { field: "kl_max", title: "largest", style: Style::Fixed(3) },
        Column { field: "top1_agreement", title: "same best token", style: Style::Percent },
    ];
    let measured = |row: &TextRow| (row.bytes_read_ratio, row.kl_mean);
    compare(
        (&args.text_file, &args.windows, &args.output),
        (&args.trials, &args.forward),
        &columns,
        (
            "Divergence from dense against KV bytes read",
            ("KL(dense ‖ policy), nats", true),
            &measured,
        ),
    )
}
