//! Developer habits as commands: `cargo xtask <command>`.
//!
//! Knows the workspace and its manifests; knows nothing of what the crates compute.
#![forbid(unsafe_code)]

mod architecture;
mod bench_cpu;
mod ci;
mod clients;
mod folder;
mod induction_model;
mod kernels;
mod licences;
mod load;
mod page;
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
    /// Run clients that others wrote against the binary: openai-python and lm-eval.
    ///
    /// Installs them into virtual environments under target/, with the versions that
    /// tests/clients/ names. Skipped, with a reason, where Python or its packages cannot be had.
    Clients(clients::Args),
    /// Open the server's page in a headless browser, and look at what it shows.
    ///
    /// Skipped, with a reason, where there is no Chromium.
    Page(page::Args),
    /// Load the server with impatient clients, and print what became of them.
    ///
    /// Fails when an answer is a 5xx or breaks off, or a page leaks.
    Load(load::Args),
    /// Measure the CPU: every number of its table, as a page of docs/benchmarks.
    ///
    /// Runs the release binary on random weights; the whole table takes the better part of an
    /// hour and 16 GB of memory. With --llama-bench, llama.cpp takes turns with it.
    BenchCpu(bench_cpu::Args),
    /// Compile kernels/*.cu to the PTX that tinyserve-kernels embeds, and write their table.
    ///
    /// nvcc comes from NVCC, CUDA_HOME or PATH; where there is none, a private environment is made
    /// from pinned wheels under target/ (about 110 MB to download, Python needed).
    BuildKernels,
    /// Check that the PTX is what the sources give, and that the kernels hold.
    ///
    /// Rules of the sources; the same PTX again; no spills; 16-byte loads; the assembler of the
    /// oldest driver; every kernel under the emulator. Names what this machine has to skip.
    CheckKernels(kernels::CheckArgs),
}

fn main() -> ExitCode {
    let done = match Args::parse().command {
        Command::Ci => ci::run(&root()),
        Command::CheckArchitecture => architecture::run(&root()),
        Command::RandomModel(args) => random_model::run(&args),
        Command::InductionModel(args) => induction_model::run(&args),
        Command::Clients(args) => clients::run(&root(), args),
        Command::Page(args) => page::run(&root(), &args),
        Command::Load(args) => load::run(&root(), &args),
        Command::BenchCpu(args) => bench_cpu::run(&root(), &args),
        Command::BuildKernels => kernels::build(&root()),
        Command::CheckKernels(args) => kernels::check(&root(), &args),
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
