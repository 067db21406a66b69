//! Which pages decode steps read.

use anyhow::Result;
use clap::builder::{PossibleValuesParser, TypedValueParser};
use clap::parser::ValueSource;
use clap::{ArgMatches, Args};
use tinyserve::{
    ApproximateAttention, AttentionMode, GroupReduceName, ScorerName, TinyServeConfig,
};

use super::{set, set_some};
use crate::exit::Usage;
use crate::values;

/// Heading of the flags that decide which pages are read.
pub(crate) const SELECTION: &str = "Page selection";

/// Which pages decode steps read.
#[derive(Debug, Args)]
#[command(next_help_heading = SELECTION)]
pub(crate) struct SelectionArgs {
    /// Share of the pages that a selecting step reads, above 0 and at most 1 [default: 0.3].
    #[arg(
        long,
        value_name = "SHARE",
        env = "TINYSERVE_SELECTION_RATIO",
        allow_negative_numbers = true
    )]
    selection_ratio: Option<f64>,
    /// Tokens that a selecting step reads, instead of a share.
    #[arg(long, visible_alias = "sparse-token-budget", value_name = "TOKENS",
          env = "TINYSERVE_TOKEN_BUDGET", value_parser = values::size)]
    token_budget: Option<usize>,
    /// Share of the estimated attention mass that a selecting step reads, instead of a share of
    /// the pages.
    #[arg(long, value_name = "P", env = "TINYSERVE_TOP_P_PAGES", allow_negative_numbers = true)]
    top_p_pages: Option<f64>,
    #[arg(long, value_name = "NAME", env = "TINYSERVE_SCORER", value_parser = values::scorer,
          help = values::scorer_help())]
    scorer: Option<ScorerName>,
    /// A scorer by which every step approximates attention, or off: the same as --attention sparse
    /// with that --scorer [default: off].
    #[arg(long, value_name = "NAME", env = "TINYSERVE_APPROXIMATE_ATTENTION",
          value_parser = values::approximate_attention)]
    approximate_attention: Option<ApproximateAttention>,
    /// How query heads that share a KV head agree on pages: max, or softmax-vote on the host.
    #[arg(long, value_name = "HOW", env = "TINYSERVE_GROUP_REDUCE", value_parser = values::group_reduce)]
    group_reduce: Option<GroupReduceName>,
    /// First pages that are always read [default: 1].
    #[arg(long, value_name = "PAGES", env = "TINYSERVE_SINK_PAGES", value_parser = values::size)]
    sink_pages: Option<usize>,
    /// Last pages that are always read [default: 2].
    #[arg(long, value_name = "PAGES", env = "TINYSERVE_RECENT_PAGES", value_parser = values::size)]
    recent_pages: Option<usize>,
    /// First layers that always read everything [default: 2].
    #[arg(long, visible_alias = "sparse-skip-layers", value_name = "LAYERS",
          env = "TINYSERVE_DENSE_LAYERS", value_parser = values::size)]
    dense_layers: Option<usize>,
    /// Contexts below this many tokens are read in full [default: 1024, with sparse 0].
    #[arg(long, value_name = "TOKENS", env = "TINYSERVE_SPARSE_MIN_CONTEXT",
          value_parser = values::size)]
    sparse_min_context: Option<usize>,
}

impl SelectionArgs {
    pub(super) fn apply(&self, config: &mut TinyServeConfig, sources: Sources) -> Result<()> {
        // A flag replaces variables, and either replaces what the file says.
        let given = [
            ("--selection-ratio", sources.selection_ratio),
            ("--token-budget", sources.token_budget),
            ("--top-p-pages", sources.top_p_pages),
        ];
        let by = |source| given.iter().filter(move |(_, from)| *from == Some(source));
        let source = [ValueSource::CommandLine, ValueSource::EnvVariable]
            .into_iter()
            .find(|&source| by(source).next().is_some());
        if let Some(source) = source {
            if let [(first, _), (second, _), ..] = by(source).collect::<Vec<_>>()[..] {
                let sentence = format!("{first} and {second} are both given, expected one of them");
                return Err(Usage(sentence).into());
            }
            let from = |of: Option<ValueSource>| of == Some(source);
            config.token_budget = self.token_budget.filter(|_| from(sources.token_budget));
            config.top_p_pages = self.top_p_pages.filter(|_| from(sources.top_p_pages));
            let ratio = self.selection_ratio.filter(|_| from(sources.selection_ratio));
            set(&mut config.selection_ratio, ratio);
        }
        set(&mut config.group_reduce, self.group_reduce);
        set(&mut config.scorer, self.scorer);
        set(&mut config.approximate_attention, self.approximate_attention);
        set(&mut config.sink_pages, self.sink_pages);
        set(&mut config.recent_pages, self.recent_pages);
        set(&mut config.dense_layers, self.dense_layers);
        set_some(&mut config.sparse_min_context, self.sparse_min_context);
        Ok(())
    }
}

/// Reads `auto`, `dense` or `sparse`.
pub(crate) fn attention_mode() -> impl TypedValueParser<Value = AttentionMode> {
    PossibleValuesParser::new(["auto", "dense", "sparse"])
        .try_map(|text| values::name::<AttentionMode>(&text, "auto, dense or sparse"))
}

/// Where the two ways to state a budget come from.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Sources {
    selection_ratio: Option<ValueSource>,
    token_budget: Option<ValueSource>,
    top_p_pages: Option<ValueSource>,
}

impl Sources {
    /// Of the command that was given.
    pub(crate) fn of(matches: &ArgMatches) -> Self {
        let mut command = matches;
        while let Some((_, inner)) = command.subcommand() {
            command = inner;
        }
        // Not every command has the two flags.
        let source = |id| match command.try_contains_id(id) {
            Ok(true) => command.value_source(id),
            _ => None,
        };
        Self {
            selection_ratio: source("selection_ratio"),
            token_budget: source("token_budget"),
            top_p_pages: source("top_p_pages"),
        }
    }
}

/// How the selection budget follows a latency.
#[derive(Debug, Args)]
#[command(next_help_heading = SELECTION)]
pub(crate) struct AdaptiveArgs {
    /// Moves the selection budget so that decode steps keep to --target-latency-ms, and says each
    /// move; the same seed may give another text then.
    #[arg(long, env = "TINYSERVE_ADAPTIVE",
          value_parser = clap::builder::BoolishValueParser::new())]
    adaptive: bool,
    /// Milliseconds per generated token that --adaptive keeps to [default: 50].
    #[arg(
        long,
        value_name = "MS",
        env = "TINYSERVE_TARGET_LATENCY_MS",
        allow_negative_numbers = true
    )]
    target_latency_ms: Option<f64>,
    /// Least budget that --adaptive moves to, as a multiple of the stated one [default: 0.25].
    #[arg(
        long,
        value_name = "FACTOR",
        env = "TINYSERVE_ADAPTIVE_MIN_BUDGET",
        allow_negative_numbers = true
    )]
    adaptive_min_budget: Option<f64>,
    /// Largest budget that --adaptive moves to, as a multiple of the stated one [default: 1].
    #[arg(
        long,
        value_name = "FACTOR",
        env = "TINYSERVE_ADAPTIVE_MAX_BUDGET",
        allow_negative_numbers = true
    )]
    adaptive_max_budget: Option<f64>,
}

impl AdaptiveArgs {
    /// What only the controller reads is refused without it.
    pub(crate) fn apply(&self, config: &mut TinyServeConfig) -> Result<()> {
        config.adaptive |= self.adaptive;
        set(&mut config.target_latency_ms, self.target_latency_ms);
        set(&mut config.adaptive_min_budget, self.adaptive_min_budget);
        set(&mut config.adaptive_max_budget, self.adaptive_max_budget);
        let given = [
            ("--target-latency-ms", self.target_latency_ms.is_some()),
            ("--adaptive-min-budget", self.adaptive_min_budget.is_some()),
            ("--adaptive-max-budget", self.adaptive_max_budget.is_some()),
        ];
        match given.iter().find(|(_, given)| *given && !config.adaptive) {
            Some((flag, _)) => {
                Err(Usage(format!("{flag} is given, expected --adaptive beside it")).into())
            }
            None => Ok(()),
        }
    }
}
