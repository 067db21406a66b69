//! `tinyserve bench session`: restoring a session from a file beside computing it again.

use std::fmt::Write;
use std::path::PathBuf;

use anyhow::{Context, Result};
use clap::Args;
use serde::Serialize;

use super::latency::{Format, load};
use super::report::{Setup, table};
use super::runner::DepthFill;
use super::source::{ShapeArgs, Source};
use super::statistics::median;
use crate::args::ForwardArgs;
use crate::exit::out_of_range;
use crate::{output, units, values};

#[derive(Debug, Args)]
pub(crate) struct SessionArgs {
    /// Tokens of the session; those that fill whole pages are saved.
    #[arg(short = 'p', long, value_name = "N", default_value = "512", value_parser = values::size)]
    n_prompt: usize,
    /// Folder of the file, which is removed afterwards [default: the system's for such files].
    #[arg(long, value_name = "FOLDER")]
    folder: Option<PathBuf>,
    #[command(flatten)]
    shape: ShapeArgs,
    /// Runs; medians are printed.
    #[arg(short, long, value_name = "N", default_value = "3", value_parser = values::size)]
    repetitions: usize,
    /// What to print.
    #[arg(short, long, value_name = "FORMAT", default_value = "md")]
    output: Format,
    #[command(flatten)]
    forward: ForwardArgs,
}

/// What was measured.
#[derive(Debug, Clone, Serialize)]
struct Row {
    #[serde(flatten)]
    setup: Setup,
    n_prompt: usize,
    n_restored: usize,
    file_bytes: u64,
    prefill_ms: f64,
    save_ms: f64,
    restore_ms: f64,
    /// The time of the prefill over that of restoring.
    speedup: f64,
}

/// Measures and prints.
pub(crate) fn session(args: &SessionArgs) -> Result<()> {
    let config = args.forward.config()?;
    if args.repetitions == 0 {
        return Err(out_of_range("--repetitions", 0, "at least 1"));
    }
    let source = Source::open(&args.shape, &config)?;
    let limit = source.limit(&config)?;
    if args.n_prompt == 0 || args.n_prompt > limit {
        let expected = format!("1 to {limit}, the context");
        return Err(out_of_range("--n-prompt (-p)", args.n_prompt, &expected));
    }
    let model = source.name(&config);
    let checkpoint = source.checkpoint(&config, (1, args.n_prompt))?;
    let sizes = (1, args.n_prompt);
    let (mut runner, setup) =
        load(&args.forward, (&config, model), &checkpoint, sizes, DepthFill::Prefill)?;
    drop(checkpoint);
    let folder = args.folder.clone().unwrap_or_else(std::env::temp_dir);
    let file = folder.join(format!("tinyserve-bench-{}.session", std::process::id()));
    let (mut times, mut file_bytes, mut n_restored) = ([vec![], vec![], vec![]], 0, 0);
    for _ in 0..args.repetitions {
        let of_run = runner.session(args.n_prompt, &file)?;
        let milliseconds =
            [of_run.prefill, of_run.save, of_run.restore].map(units::as_milliseconds);
        times.iter_mut().zip(milliseconds).for_each(|(times, time)| times.push(time));
        n_restored = of_run.tokens;
        let metadata = file.metadata().with_context(|| file.display().to_string())?;
        file_bytes = metadata.len();
    }
    std::fs::remove_file(&file).with_context(|| file.display().to_string())?;
    let [prefill_ms, save_ms, restore_ms] = times.map(|times| median(&times));
    let row = Row {
        setup,
        n_prompt: args.n_prompt,
        n_restored,
        file_bytes,
        prefill_ms,
        save_ms,
        restore_ms,
        speedup: prefill_ms / restore_ms,
    };
    match args.output {
        Format::Md => output::text(&markdown(&row)),
        Format::Csv => output::text(&table(&[row])?),
        Format::Json => output::json(&[row]),
    }
}

fn markdown(row: &Row) -> String {
    let mut text =
        "| model | threads | kv | tokens | file | prefill | save | restore | speed-up |\n\
                    | --- | ---: | --- | ---: | ---: | ---: | ---: | ---: | ---: |\n"
            .to_owned();
    let setup = &row.setup;
    let _ = writeln!(
        text,
        "| {} {} | {} | {} | {} | {} | {} | {} | {} | {:.1} |",
        setup.model,
        setup.weights,
        setup.n_threads,
        setup.kv_cache_dtype,
        row.n_restored,
        units::bytes(row.file_bytes),
        units::milliseconds(row.prefill_ms),
        units::milliseconds(row.save_ms),
        units::milliseconds(row.restore_ms),
        row.speedup,
    );
    text
}
