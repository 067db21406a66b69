//! The commands as clap sees them.

use clap::{CommandFactory, Parser, Subcommand};
use clap_complete::Shell;

use crate::{analyze, bench, chat, doctor, eval, inspect, output, run, serve, tokenize};

const NOTES: &str = "\
Numbers of tokens take suffixes: k or K is 1024, m or M is 1024², g or G is 1024³.
Settings come from flags, then TINYSERVE_* variables, then --config FILE, then defaults.
Exit codes: 0 done, 1 failed, 2 bad usage, 130 stopped by Ctrl-C (what was generated until then is
printed; a second Ctrl-C ends at once).";

/// Answers prompts with small language models on this machine, reading only the pages of the KV
/// cache that matter.
#[derive(Debug, Parser)]
#[command(name = "tinyserve", version, after_help = NOTES, arg_required_else_help = true)]
pub(crate) struct Cli {
    #[command(subcommand)]
    pub(crate) command: Command,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Continues a prompt: text to stdout as it is made, speed and cache use to stderr.
    #[command(after_help = NOTES)]
    Run(run::RunArgs),
    /// A conversation in the terminal: each turn computes only what is new.
    #[command(after_help = NOTES)]
    Chat(chat::ChatArgs),
    /// Answers requests over HTTP as OpenAI's API does, until Ctrl-C or SIGTERM.
    #[command(after_help = NOTES)]
    Serve(Box<serve::ServeArgs>),
    /// Shows how a text becomes tokens.
    Tokenize(tokenize::TokenizeArgs),
    /// Shows a model's shape and the memory it needs, without loading it.
    Inspect(inspect::InspectArgs),
    /// Shows what this machine has and what is used of it.
    Doctor(doctor::DoctorArgs),
    /// Measures how good a model is, and what page selections do to it.
    Eval {
        #[command(subcommand)]
        command: EvalCommand,
    },
    /// Shows which pages each layer and head of a run reads, as one HTML file with pictures.
    #[command(after_help = NOTES)]
    Analyze(analyze::AnalyzeArgs),
    /// Measures how fast a model is.
    Bench {
        #[command(subcommand)]
        command: BenchCommand,
    },
    /// Writes a completion script for a shell.
    Completions {
        /// The shell.
        shell: Shell,
    },
}

#[derive(Debug, Subcommand)]
pub(crate) enum EvalCommand {
    /// How well the model predicts a text.
    #[command(after_help = NOTES)]
    Perplexity(eval::PerplexityArgs),
    /// How far the predictions through a policy are from those of dense attention.
    #[command(after_help = NOTES)]
    Kl(eval::KlArgs),
    /// Whether facts that were planted far back are found, by policy, length and depth.
    #[command(after_help = NOTES)]
    Needle(eval::NeedleArgs),
    /// How much of the attention the pages that a policy reads hold, by layer and head.
    #[command(after_help = NOTES)]
    Recall(eval::RecallArgs),
}

#[allow(clippy::large_enum_variant, reason = "it is parsed once")]
#[derive(Debug, Subcommand)]
pub(crate) enum BenchCommand {
    /// Speed of prefill (pp) and decode (tg), at each depth and batch size.
    #[command(after_help = NOTES)]
    Latency(bench::LatencyArgs),
    /// Speed of many sequences together, from prompt to last token, at each batch size.
    #[command(after_help = NOTES)]
    Throughput(bench::ThroughputArgs),
    /// Throughput and latencies of requests that arrive over time, in the words of vllm bench serve.
    #[command(after_help = NOTES)]
    Serve(bench::ServeArgs),
    /// Speed of one attention step alone, sparse beside dense.
    #[command(after_help = NOTES)]
    Attention(bench::AttentionArgs),
    /// Memory that a token of the cache takes, by the formats of keys and values.
    #[command(after_help = NOTES)]
    Memory(bench::MemoryArgs),
    /// Time to the first token of each turn of a conversation, beside that without a session.
    #[command(after_help = NOTES)]
    Conversation(bench::ConversationArgs),
    /// Time of restoring a session from a file beside that of computing it again.
    #[command(after_help = NOTES)]
    Session(bench::SessionArgs),
}

/// Writes the completion script of `shell`.
pub(crate) fn completions(shell: Shell) -> anyhow::Result<()> {
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut Cli::command(), "tinyserve", &mut script);
    output::bytes(&script)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn flags_do_not_contradict_each_other() {
        Cli::command().debug_assert();
    }
}
