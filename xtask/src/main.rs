//! Developer habits as commands: `cargo xtask <command>`.
//!
//! Knows the workspace and its manifests; knows nothing of what the crates compute.
#![forbid(unsafe_code)]

mod architecture;
mod bench_cpu;
mod ci;
mod folder;
mod induction_model;
mod random_model;
mod sources;

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Parser, Subcommand};

/// Developer habits as commands.
#[derive(Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask", disable_help_subcommand = true)]
struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Run everything that a change must pass, in order, up to the first failure.
    ///
    /// Formatting, lints, documentation, a release build without a C compiler, tests. The
    /// architecture check is one of the tests.
    Ci,
    /// Check what the crates may know of each other, and where `unsafe` may stand.
    ///
    /// Prints each rule that is broken and where. The rules are in xtask/src/architecture.rs
    /// and xtask/src/sources.rs, and are explained in docs/architecture.md.
    CheckArchitecture,
    /// Write a checkpoint folder with random weights, for measuring speed.
    ///
    /// The folder has Hugging Face's layout: config.json, generation_config.json, tokenizer.json
    /// and model.safetensors. The text that such a model generates means nothing, and its
    /// attention is nearly uniform: measure speed and memory with it, never quality.
    RandomModel(random_model::Args),
    /// Write a checkpoint folder whose weights are set so that the model looks things up.
    ///
    /// It answers a key with the value that stood behind it, up to 64K tokens before, exactly with
    /// dense attention: `tinyserve eval needle` shows with it what a page selection loses. The
    /// folder also has lookup.json, which names the tokens to make such texts of.
    InductionModel(induction_model::Args),
    /// Measure the CPU: every number of its table, as a page of docs/benchmarks.
    ///
    /// Runs the release binary on random weights; the whole table takes the better part of an
    /// hour and 16 GB of memory. With --llama-bench, llama.cpp takes turns with it.
    BenchCpu(bench_cpu::Args),
}

fn main() -> ExitCode {
    let done = match Args::parse().command {
        Command::Ci => ci::run(&root()),
        Command::CheckArchitecture => architecture::run(&root()),
        Command::RandomModel(args) => random_model::run(&args),
        Command::InductionModel(args) => induction_model::run(&args),
        Command::BenchCpu(args) => bench_cpu::run(&root(), &args),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// The workspace's root folder: the one above this package.
fn root() -> PathBuf {
    let package = std::env::var_os("CARGO_MANIFEST_DIR")
        .map_or_else(|| PathBuf::from(env!("CARGO_MANIFEST_DIR")), PathBuf::from);
    package.parent().map(PathBuf::from).unwrap_or(package)
}

/// The cargo that runs us, so that a chosen toolchain stays chosen.
fn cargo() -> std::process::Command {
    std::process::Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()))
}
