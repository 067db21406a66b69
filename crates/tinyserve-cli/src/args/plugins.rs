//! What may end an answer early or take tokens out of its cache.

use anyhow::Result;
use clap::Args;
use tinyserve::{EntropySignalName, TinyServeConfig};

use super::set;
use crate::exit::Usage;
use crate::values;

/// What may end an answer early or take tokens out of its cache.
#[derive(Debug, Args)]
#[command(next_help_heading = "Plugins")]
pub(crate) struct PluginArgs {
    /// Ends an answer when the model has become certain.
    #[arg(long, env = "TINYSERVE_ENABLE_ENTROPY_EARLY_EXIT",
          value_parser = clap::builder::BoolishValueParser::new())]
    enable_entropy_early_exit: bool,
    /// Entropy in nats below which the model is certain [default: 0.5].
    #[arg(
        long,
        value_name = "NATS",
        env = "TINYSERVE_ENTROPY_THRESHOLD",
        allow_negative_numbers = true
    )]
    entropy_threshold: Option<f64>,
    /// Tokens that are generated in any case [default: 10].
    #[arg(long, value_name = "N", env = "TINYSERVE_MIN_TOKENS_BEFORE_EXIT",
          value_parser = values::size)]
    min_tokens_before_exit: Option<usize>,
    /// Whose entropy: attention (of its weights, averaged over layers and heads) or next-token
    /// [default: attention].
    #[arg(long, value_name = "NAME", env = "TINYSERVE_ENTROPY_SIGNAL",
          value_parser = |text: &str| values::name::<EntropySignalName>(text, "attention or next-token"))]
    entropy_signal: Option<EntropySignalName>,
    /// Steps in a row whose entropy has to lie below the threshold [default: 1].
    #[arg(long, value_name = "STEPS", env = "TINYSERVE_ENTROPY_PATIENCE",
          value_parser = values::size)]
    entropy_patience: Option<usize>,
    /// Removes the tokens with the least accumulated attention from the cache, never those of the
    /// sink and recent pages.
    #[arg(long, env = "TINYSERVE_ENABLE_TOKEN_PRUNING",
          value_parser = clap::builder::BoolishValueParser::new())]
    enable_token_pruning: bool,
    /// Share of the cached tokens that one pruning removes at most, 0 to 1 [default: 0.1].
    #[arg(
        long,
        value_name = "SHARE",
        env = "TINYSERVE_PRUNING_RATIO",
        allow_negative_numbers = true
    )]
    pruning_ratio: Option<f64>,
    /// Tokens that always stay in the cache [default: 100].
    #[arg(long, value_name = "N", env = "TINYSERVE_MIN_TOKENS_AFTER_PRUNING",
          value_parser = values::size)]
    min_tokens_after_pruning: Option<usize>,
}

impl PluginArgs {
    /// Sets what is given, whether or not the plugin is enabled: a request may enable it.
    pub(crate) fn offer(&self, config: &mut TinyServeConfig) {
        config.enable_entropy_early_exit |= self.enable_entropy_early_exit;
        config.enable_token_pruning |= self.enable_token_pruning;
        set(&mut config.entropy_threshold, self.entropy_threshold);
        set(&mut config.min_tokens_before_exit, self.min_tokens_before_exit);
        set(&mut config.entropy_signal, self.entropy_signal);
        set(&mut config.entropy_patience, self.entropy_patience);
        set(&mut config.pruning_ratio, self.pruning_ratio);
        set(&mut config.min_tokens_after_pruning, self.min_tokens_after_pruning);
    }

    /// A setting of a plugin that is not enabled would be accepted and ignored: it is refused.
    pub(crate) fn apply(&self, config: &mut TinyServeConfig) -> Result<()> {
        self.offer(config);
        let exit = ("--enable-entropy-early-exit", config.enable_entropy_early_exit);
        let pruning = ("--enable-token-pruning", config.enable_token_pruning);
        let given = [
            ("--entropy-threshold", self.entropy_threshold.is_some(), exit),
            ("--min-tokens-before-exit", self.min_tokens_before_exit.is_some(), exit),
            ("--entropy-signal", self.entropy_signal.is_some(), exit),
            ("--entropy-patience", self.entropy_patience.is_some(), exit),
            ("--pruning-ratio", self.pruning_ratio.is_some(), pruning),
            ("--min-tokens-after-pruning", self.min_tokens_after_pruning.is_some(), pruning),
        ];
        match given.iter().find(|(_, given, (_, enabled))| *given && !enabled) {
            Some((flag, _, (enables, _))) => {
                Err(Usage(format!("{flag} is given, expected {enables} beside it")).into())
            }
            None => Ok(()),
        }
    }
}
