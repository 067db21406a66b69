//! The `tinyserve` command: what it can do, and how it ends.
#![forbid(unsafe_code)]

mod analyze;
mod args;
mod bench;
mod chat;
mod cli;
mod doctor;
mod eval;
mod exit;
mod inspect;
mod interrupt;
mod output;
mod plan;
mod progress;
mod prompt;
mod run;
mod self_test;
mod serve;
mod tokenize;
mod units;
mod values;

use std::process::ExitCode;

use clap::{CommandFactory, FromArgMatches};
use tinyserve::memory;

use cli::{BenchCommand, Cli, Command, EvalCommand};

fn main() -> ExitCode {
    let matches = Cli::command().get_matches();
    let sources = args::Sources::of(&matches);
    let cli = Cli::from_arg_matches(&matches).unwrap_or_else(|error| error.exit());
    let result = match &cli.command {
        Command::Run(args) => run::run(args, sources),
        Command::Serve(args) => serve::serve(args, sources),
        Command::Chat(args) => chat::chat(args, sources),
        Command::Tokenize(args) => tokenize::tokenize(args),
        Command::Inspect(args) => inspect::inspect(args),
        Command::Doctor(args) => doctor::doctor(args),
        Command::Eval { command } => match command {
            EvalCommand::Perplexity(args) => eval::perplexity(args),
            EvalCommand::Kl(args) => eval::kl(args),
            EvalCommand::Needle(args) => eval::needle(args),
            EvalCommand::Recall(args) => eval::recall(args),
        },
        Command::Bench { command } => match command {
            BenchCommand::Latency(args) => bench::latency(args, sources),
            BenchCommand::Throughput(args) => bench::throughput(args, sources),
            BenchCommand::Attention(args) => bench::attention(args),
            BenchCommand::Memory(args) => bench::memory(args),
            BenchCommand::Serve(args) => bench::serve(args, sources),
            BenchCommand::Conversation(args) => bench::conversation(args, sources),
            BenchCommand::Session(args) => bench::session(args),
        },
        Command::Analyze(args) => analyze::analyze(args),
        Command::Completions { shell } => cli::completions(*shell),
    };
    exit::code(result)
}
