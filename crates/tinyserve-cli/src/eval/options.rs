//! Flags that the tests share, and how they become trials.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Error, Result, anyhow};
use clap::Args;
use serde::Serialize;
use tinyserve::kernels::{Backend, Cpu};
use tinyserve::kv::{Budget, Method, Reselect, SelectionPolicy};
use tinyserve::model::{Checkpoint, Model, ModelError, Tokenizer};
use tinyserve::{GroupReduceName, RopeFrequencyDtype, TinyServeConfig, TinyServeError};
use tinyserve_lab::{LabError, Probe, Trial};

use super::table::{Column, csv, markdown};
use crate::args::ForwardArgs;
use crate::bench::Format;
use crate::exit::{Quiet, Usage, out_of_range};
use crate::interrupt::Interrupt;
use crate::progress::Progress;
use crate::{output, values};

/// Heading of the flags that say what is compared.
const TRIALS: &str = "Policies";

/// Which methods are compared, and with what budgets.
#[derive(Debug, Args)]
#[command(next_help_heading = TRIALS)]
pub(crate) struct TrialArgs {
    #[arg(long, value_name = "NAME,…", value_delimiter = ',', value_parser = values::method,
          help = values::methods_help())]
    policies: Vec<Method>,
    /// Tokens that a step may read; each budget is tried with each method.
    #[arg(long, value_name = "TOKENS,…", value_delimiter = ',', value_parser = values::size)]
    token_budget: Vec<usize>,
    /// Share of the pages that a step may read [default: 0.3, unless another budget is given].
    #[arg(long, value_name = "SHARE,…", value_delimiter = ',', allow_negative_numbers = true)]
    selection_ratio: Vec<f64>,
    /// Share of the estimated attention mass that a step reads.
    #[arg(long, value_name = "P,…", value_delimiter = ',', allow_negative_numbers = true)]
    top_p_pages: Vec<f64>,
    /// First pages that are always read [default: 1].
    #[arg(long, value_name = "PAGES", value_parser = values::size)]
    sink_pages: Option<usize>,
    /// Last pages that are always read [default: 2].
    #[arg(long, value_name = "PAGES", value_parser = values::size)]
    recent_pages: Option<usize>,
    /// First layers that always read everything [default: 2].
    #[arg(long, value_name = "LAYERS", value_parser = values::size)]
    dense_layers: Option<usize>,
    /// How query heads that share a KV head agree on pages: max or softmax-vote.
    #[arg(long, value_name = "HOW", value_parser = values::group_reduce)]
    group_reduce: Option<GroupReduceName>,
    /// Keeps a selection for so many steps.
    #[arg(long, value_name = "STEPS", value_parser = values::size,
          conflicts_with = "reselect_similarity")]
    reselect_interval: Option<usize>,
    /// Keeps a selection while the cosine between the queries is at least this.
    #[arg(long, value_name = "COSINE", allow_negative_numbers = true)]
    reselect_similarity: Option<f32>,
    /// Last tokens of what is read before, whose attention h2o and snapkv decide by [default: 32].
    #[arg(long, value_name = "TOKENS", value_parser = values::size)]
    observe: Option<usize>,
}

/// Tokens whose attention eviction decides by: SnapKV's window.
const OBSERVE: usize = 32;

impl TrialArgs {
    /// Whether any method is named.
    pub(crate) fn given(&self) -> bool {
        !self.policies.is_empty()
    }

    /// A flag that would change nothing because no method is named.
    pub(crate) fn idle_flag(&self) -> Option<&'static str> {
        [
            (!self.token_budget.is_empty(), "--token-budget"),
            (!self.selection_ratio.is_empty(), "--selection-ratio"),
            (!self.top_p_pages.is_empty(), "--top-p-pages"),
            (self.sink_pages.is_some(), "--sink-pages"),
            (self.recent_pages.is_some(), "--recent-pages"),
            (self.dense_layers.is_some(), "--dense-layers"),
            (self.group_reduce.is_some(), "--group-reduce"),
            (self.reselect_interval.is_some(), "--reselect-interval"),
            (self.reselect_similarity.is_some(), "--reselect-similarity"),
            (self.observe.is_some(), "--observe"),
        ]
        .into_iter()
        .find_map(|(given, flag)| given.then_some(flag))
    }

    /// Every method with every budget; dense attention, which has none, once. Without a name,
    /// `default` is tried.
    pub(crate) fn trials(&self, layers: usize, default: Option<Method>) -> Result<Vec<Trial>> {
        let mut policies = self.policies.clone();
        policies.extend(default.filter(|_| self.policies.is_empty()));
        if policies.is_empty() {
            let names = Method::names(|_| true);
            let sentence = format!("--policies is missing, expected some of {names}");
            return Err(Usage(sentence).into());
        }
        let tokens = self.token_budget.iter().map(|&tokens| Budget::Tokens(tokens));
        let ratios = self.selection_ratio.iter().map(|&ratio| Budget::Ratio(ratio));
        let masses = self.top_p_pages.iter().map(|&p| Budget::TopP(p));
        let mut budgets: Vec<_> = tokens.chain(ratios).chain(masses).collect();
        let of_defaults = SelectionPolicy::default();
        if budgets.is_empty() {
            budgets.push(of_defaults.budget);
        }
        let dense_layers = self.dense_layers.unwrap_or(of_defaults.dense_layers);
        let selects = policies.iter().any(|method| !matches!(method, Method::Dense));
        if selects && dense_layers >= layers {
            let expected = format!(
                "fewer than the model's {layers} layers: otherwise nothing is ever selected"
            );
            return Err(out_of_range("--dense-layers", dense_layers, &expected));
        }
        let reselect = match (self.reselect_interval, self.reselect_similarity) {
            (Some(0), _) => return Err(out_of_range("--reselect-interval", 0, "at least 1")),
            (Some(steps), _) => Some(Reselect::Every(steps)),
            (None, Some(cosine)) if !(-1.0..=1.0).contains(&cosine) => {
                return Err(out_of_range("--reselect-similarity", cosine, "a cosine, -1 to 1"));
            }
            (None, similarity) => similarity.map(Reselect::Below),
        };
        let mut trials = Vec::new();
        for &method in &policies {
            for (i, &budget) in budgets.iter().enumerate() {
                if matches!(method, Method::Dense) && i > 0 {
                    continue;
                }
                let policy = SelectionPolicy {
                    budget,
                    sink_pages: self.sink_pages.unwrap_or(of_defaults.sink_pages),
                    recent_pages: self.recent_pages.unwrap_or(of_defaults.recent_pages),
                    dense_layers,
                    min_context: 0,
                    group_reduce: self.group_reduce.unwrap_or_default().into(),
                    ..of_defaults
                };
                policy.check().map_err(TinyServeError::from)?;
                let trial = Trial::new(method, policy);
                trials.push(match reselect {
                    Some(when) => trial.reselect(when),
                    None => trial,
                });
            }
        }
        Ok(trials)
    }

    /// Tokens to observe, when a trial needs that.
    pub(crate) fn observed(&self, trials: &[Trial]) -> Result<usize> {
        match (trials.iter().any(Trial::evicts), self.observe) {
            (true, observe) => Ok(observe.unwrap_or(OBSERVE)),
            (false, None) => Ok(0),
            (false, Some(tokens)) => {
                Err(out_of_range("--observe", tokens, "no value: only h2o and snapkv observe"))
            }
        }
    }
}

/// What is printed, and drawn.
#[derive(Debug, Args)]
#[command(next_help_heading = "Output")]
pub(crate) struct OutputArgs {
    /// What to print [default: md].
    #[arg(short, long, value_name = "FORMAT")]
    output: Option<Format>,
    /// Prints one JSON array; the same as -o json.
    #[arg(long, conflicts_with = "output")]
    json: bool,
    /// Draws the results into an .svg file.
    #[arg(long, value_name = "FILE")]
    pub(super) plot: Option<PathBuf>,
}

impl OutputArgs {
    pub(super) fn json(&self) -> bool {
        self.json || self.output == Some(Format::Json)
    }

    /// A flag that asks for a table.
    pub(super) fn table_flag(&self) -> Option<&'static str> {
        if self.output.is_some_and(|format| format != Format::Json) {
            return Some("--output (-o)");
        }
        self.plot.is_some().then_some("--plot")
    }

    /// Prints `rows`.
    pub(super) fn print<T: Serialize>(&self, columns: &[Column], rows: &[T]) -> Result<()> {
        if self.json() {
            return output::json(&rows);
        }
        let values: Vec<_> =
            rows.iter().map(serde_json::to_value).collect::<Result<_, _>>().context("a row")?;
        output::text(&match self.output {
            Some(Format::Csv) => csv(columns, &values),
            _ => markdown(columns, &values),
        })
    }
}

/// Checks the name of a picture before anything is computed.
pub(super) fn check_svg(flag: &str, file: Option<&PathBuf>) -> Result<()> {
    match file {
        Some(file) if file.extension().is_none_or(|extension| extension != "svg") => {
            Err(out_of_range(flag, file.display(), "a file that ends in .svg"))
        }
        Some(file) => output::has_place(file),
        None => Ok(()),
    }
}

/// Writes a picture.
pub(super) fn draw(file: &Path, svg: Result<String, LabError>) -> Result<()> {
    let svg = svg.map_err(lab_error)?;
    fs::write(file, svg).with_context(|| format!("{} cannot be written", file.display()))
}

/// A model to test, and what belongs to it.
pub(crate) struct Lab<B: Backend = Cpu> {
    pub(crate) config: TinyServeConfig,
    pub(crate) checkpoint: Checkpoint,
    pub(crate) model: Model<B>,
}

impl Lab {
    /// Loads the model that the flags name.
    pub(crate) fn open(forward: &ForwardArgs) -> Result<Self> {
        Self::open_on(forward, |cpu| cpu)
    }
}

impl<B: Backend> Lab<B> {
    /// Loads the model that the flags name onto what `wrap` makes of the CPU.
    pub(crate) fn open_on(forward: &ForwardArgs, wrap: impl FnOnce(Cpu) -> B) -> Result<Self> {
        let config = forward.config()?;
        let mut checkpoint = Checkpoint::load(&config.model).map_err(TinyServeError::from)?;
        if config.rope_frequency_dtype == RopeFrequencyDtype::Weights {
            checkpoint.round_rope_frequencies();
        }
        config.sequence_limit(checkpoint.config().max_positions)?;
        let weights = config.load_options(checkpoint.dtype())?;
        let backend = forward.device.backend(&config)?;
        let name = format!("CPU, {}, {} threads", backend.path(), backend.threads());
        let mut progress = Progress::new("loading");
        let model = Model::load_with(wrap(backend), &checkpoint, &weights, |done, total| {
            progress.update(done, total);
        })
        .map_err(TinyServeError::from)?;
        progress.finish();
        forward.device.tell_of_cache(model.weights_cache());
        forward.device.tell(&config, &name);
        Ok(Self { config, checkpoint, model })
    }

    /// The model's tokenizer.
    pub(crate) fn tokenizer(&self) -> Result<Tokenizer> {
        Ok(self.checkpoint.tokenizer().map_err(TinyServeError::from)?)
    }

    /// Most tokens of a sequence: the model's context, or what the user allows.
    pub(crate) fn limit(&self) -> usize {
        let context = self.model.config().max_positions;
        self.config.max_sequence_length.map_or(context, |limit| limit.min(context))
    }

    /// Where the checkpoint's other files are.
    pub(super) fn folder(&self) -> &Path {
        Path::new(&self.config.model)
    }

    /// Room for sequences of `tokens` tokens.
    pub(crate) fn probe(self, tokens: usize, observed: usize) -> Result<Probe<B>> {
        let layout = self.config.kv_layout(self.checkpoint.config(), self.checkpoint.dtype())?;
        let mut probe = Probe::new(self.model, layout, tokens).map_err(lab_error)?;
        probe.observe(observed);
        probe.prefill_chunk(self.config.attention_chunk_size);
        Ok(probe)
    }
}

/// Progress and Ctrl-C of a long test.
pub(crate) struct Watched {
    interrupt: Interrupt,
    progress: Option<(&'static str, Progress)>,
}

impl Watched {
    pub(crate) fn new() -> Result<Self> {
        Ok(Self { interrupt: Interrupt::listen()?, progress: None })
    }

    /// What a test calls between its steps.
    pub(crate) fn control(&mut self) -> impl FnMut(&'static str, usize, usize) -> bool {
        |what, done, total| {
            if self.progress.as_ref().is_none_or(|(of, _)| *of != what) {
                self.progress = Some((what, Progress::new(what)));
            }
            if let Some((_, progress)) = &mut self.progress {
                progress.update(done, total);
            }
            !self.interrupt.pressed()
        }
    }

    /// After the results are printed: what ends the command.
    pub(crate) fn finish(self) -> Result<()> {
        if self.interrupt.pressed() { Err(Quiet::Interrupted.into()) } else { Ok(()) }
    }

    /// Whether Ctrl-C was pressed.
    pub(crate) fn stopped(&self) -> bool {
        self.interrupt.pressed()
    }

    /// Clears the progress bar.
    pub(crate) fn quiet(&mut self) {
        self.progress = None;
    }
}

/// A test's error as the command shows it: settings by the names of their flags.
pub(crate) fn lab_error(error: LabError) -> Error {
    match error {
        LabError::Setting { what, found, expected } => {
            let flags = ["context", "pairs", "near_keys", "window", "prefix", "steps", "samples"];
            if flags.contains(&what) {
                return out_of_range(&format!("--{}", what.replace('_', "-")), found, &expected);
            }
            anyhow!("{what} is {found}, expected {expected}")
        }
        LabError::Model(error) => TinyServeError::from(error).into(),
        LabError::Kv(error) => TinyServeError::from(ModelError::from(error)).into(),
        LabError::Kernel(error) => TinyServeError::from(error).into(),
        error => error.into(),
    }
}
