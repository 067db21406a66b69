//! Flags that several commands share, and how they become settings.
//!
//! Each command flattens the groups whose settings change what it does, so that none is accepted
//! and ignored. A flag comes before its environment variable, that before the configuration file.

mod engine;

use std::path::{Path, PathBuf};

use anyhow::Result;
use clap::builder::{PossibleValuesParser, TypedValueParser};
use clap::parser::ValueSource;
use clap::{ArgMatches, Args};
use tinyserve::kernels::{Cpu, CpuOptions, CpuPath, Cuda};
use tinyserve::model::{CacheOutcome, Checkpoint};
use tinyserve::{
    ApproximateAttention, AttentionMode, Device, EntropySignalName, EvictionName, GroupReduceName,
    KvCacheDtype, OpenPageDtype, RopeFrequencyDtype, ScorerName, TinyServe, TinyServeBuilder,
    TinyServeConfig, TinyServeError, Weights,
};

use crate::exit::{Usage, out_of_range};
use crate::progress::Progress;
use crate::{plan, values};
pub(crate) use engine::EngineArgs;

/// Heading of the flags that decide which pages are read.
pub(crate) const SELECTION: &str = "Page selection";

/// Said once of a selection that no kernel makes.
const NO_KERNELS: &str = "this selection has no kernels on this device and is slow; --scorer box, \
                          --group-reduce max and a fixed budget have some";

/// Which model, and a file with settings.
#[derive(Debug, Args)]
pub(crate) struct ModelArgs {
    /// A folder in Hugging Face layout, or builtin:stories260k (the default).
    #[arg(value_name = "MODEL", env = "TINYSERVE_MODEL")]
    model: Option<String>,
    /// A .toml or .json file with settings, spelt as the flags are with _ for -.
    #[arg(long, value_name = "FILE", env = "TINYSERVE_CONFIG", help_heading = "Settings")]
    config: Option<PathBuf>,
}

impl ModelArgs {
    /// The file with settings, if one is given.
    pub(crate) fn file(&self) -> Option<&Path> {
        self.config.as_deref()
    }

    /// The settings of the file, or the defaults, with the model that is asked for.
    pub(crate) fn config(&self) -> Result<TinyServeConfig> {
        let config = match &self.config {
            Some(file) => TinyServeConfig::load(file)?,
            None => TinyServeConfig::default(),
        };
        Ok(self.applied(config))
    }

    /// `config` with the model that is asked for.
    fn applied(&self, mut config: TinyServeConfig) -> TinyServeConfig {
        set(&mut config.model, self.model.clone());
        config
    }
}

/// How weights are kept.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Device")]
pub(crate) struct WeightsArgs {
    /// How weights are kept: auto (as stored), the stored type by name (f32, f16, bf16), or
    /// quantised while they are loaded: int8, or int4 (embedding, head and matrices of fewer than
    /// 128 inputs: int8).
    #[arg(long, value_name = "DTYPE", env = "TINYSERVE_WEIGHTS", value_parser = values::weights)]
    weights: Option<Weights>,
}

impl WeightsArgs {
    pub(crate) fn apply(&self, config: &mut TinyServeConfig) {
        set(&mut config.weights, self.weights);
    }
}

/// How much memory there is.
#[derive(Debug, Args)]
#[command(next_help_heading = "KV cache")]
pub(crate) struct MemoryArgs {
    /// Most memory of the process, in GB of 10⁹ bytes; pages get what weights and activations leave
    /// [default: 80 % of what is available].
    #[arg(
        long,
        value_name = "GB",
        env = "TINYSERVE_TARGET_MEMORY_GB",
        allow_negative_numbers = true
    )]
    target_memory_gb: Option<f64>,
    /// Share of the available memory that the process may take, instead [default: 0.8].
    #[arg(
        long,
        visible_alias = "gpu-memory-utilization",
        value_name = "SHARE",
        env = "TINYSERVE_MEMORY_UTILIZATION",
        allow_negative_numbers = true
    )]
    memory_utilization: Option<f64>,
    /// Bytes of pages [default: what --max-num-seqs of the longest sequences fill, if it fits].
    #[arg(long, value_name = "BYTES", env = "TINYSERVE_KV_CACHE_MEMORY_BYTES",
          value_parser = values::size)]
    kv_cache_memory_bytes: Option<usize>,
}

impl MemoryArgs {
    pub(crate) fn apply(&self, config: &mut TinyServeConfig) {
        set_some(&mut config.target_memory_gb, self.target_memory_gb);
        set_some(&mut config.memory_utilization, self.memory_utilization);
        set_some(&mut config.kv_cache_memory_bytes, self.kv_cache_memory_bytes);
    }
}

/// How requests share steps.
#[derive(Debug, Args)]
#[command(next_help_heading = "Scheduling")]
pub(crate) struct ScheduleArgs {
    /// Copies of the model that share the work; threads and memory are divided among them
    /// [default: 1].
    #[arg(long, value_name = "N", env = "TINYSERVE_REPLICAS", value_parser = values::size)]
    replicas: Option<usize>,
    /// CUDA devices with a copy of the model each, that share the work [default: the one of
    /// --device].
    #[arg(long, value_name = "N", env = "TINYSERVE_NUM_GPUS", value_parser = values::size)]
    num_gpus: Option<usize>,
    /// The numbers of these devices [default: the first --num-gpus].
    #[arg(long, value_name = "N,…", env = "TINYSERVE_GPU_IDS", value_delimiter = ',')]
    gpu_ids: Option<Vec<usize>>,
    /// Devices that one model is split over; only 1 is implemented [default: 1].
    #[arg(long, value_name = "N", env = "TINYSERVE_TENSOR_PARALLEL_SIZE",
          value_parser = values::size)]
    tensor_parallel_size: Option<usize>,
    /// Most sequences that run together in a replica [default: 16].
    #[arg(long, value_name = "N", env = "TINYSERVE_MAX_NUM_SEQS", value_parser = values::size)]
    max_num_seqs: Option<usize>,
    /// Most tokens of one step, decodes and prefill chunks together [default: 512, or more where
    /// --attention-chunk-size or --max-num-seqs are more].
    #[arg(long, value_name = "TOKENS", env = "TINYSERVE_MAX_NUM_BATCHED_TOKENS",
          value_parser = values::size)]
    max_num_batched_tokens: Option<usize>,
    /// Whether the pages of prompts are kept for requests that begin alike [default: true].
    #[arg(long, value_name = "BOOL", env = "TINYSERVE_ENABLE_PREFIX_CACHING", num_args = 0..=1,
          require_equals = true, default_missing_value = "true",
          overrides_with = "no_enable_prefix_caching")]
    enable_prefix_caching: Option<bool>,
    /// The same as --enable-prefix-caching=false.
    #[arg(long, overrides_with = "enable_prefix_caching")]
    no_enable_prefix_caching: bool,
    /// Which kept pages are given up first: lru, or cost (old and cheap to compute again).
    #[arg(long, value_name = "NAME", env = "TINYSERVE_EVICTION_POLICY",
          value_parser = |text: &str| values::name::<EvictionName>(text, "lru or cost"))]
    eviction_policy: Option<EvictionName>,
}

impl ScheduleArgs {
    pub(crate) fn apply(&self, config: &mut TinyServeConfig) {
        set(&mut config.replicas, self.replicas);
        set_some(&mut config.num_gpus, self.num_gpus);
        set_some(&mut config.gpu_ids, self.gpu_ids.clone());
        set(&mut config.tensor_parallel_size, self.tensor_parallel_size);
        set(&mut config.max_num_seqs, self.max_num_seqs);
        set_some(&mut config.max_num_batched_tokens, self.max_num_batched_tokens);
        let caching =
            if self.no_enable_prefix_caching { Some(false) } else { self.enable_prefix_caching };
        set(&mut config.enable_prefix_caching, caching);
        set(&mut config.eviction_policy, self.eviction_policy);
    }
}

/// How many may wait.
#[derive(Debug, Args)]
#[command(next_help_heading = "Scheduling")]
pub(crate) struct QueueArgs {
    /// Requests that may wait in a replica; more are turned away, with 429 over HTTP [default: no
    /// limit; of a server: 1024].
    #[arg(long, value_name = "N", env = "TINYSERVE_MAX_NUM_QUEUED_REQS",
          value_parser = values::size)]
    max_num_queued_reqs: Option<usize>,
    /// Prompt tokens that may wait in a replica; more are turned away [default: no limit; of a
    /// server: 1M].
    #[arg(long, value_name = "TOKENS", env = "TINYSERVE_MAX_NUM_QUEUED_TOKENS",
          value_parser = values::size)]
    max_num_queued_tokens: Option<usize>,
}

impl QueueArgs {
    pub(crate) fn apply(&self, config: &mut TinyServeConfig) {
        set_some(&mut config.max_num_queued_reqs, self.max_num_queued_reqs);
        set_some(&mut config.max_num_queued_tokens, self.max_num_queued_tokens);
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

/// Where the model runs.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Device")]
pub(crate) struct DeviceArgs {
    /// auto (the CPU), cpu, cuda or cuda:N.
    #[arg(long, env = "TINYSERVE_DEVICE", value_parser = values::device)]
    device: Option<Device>,
    /// Threads of the CPU [default: all].
    #[arg(short, long, value_name = "N", env = "TINYSERVE_THREADS", value_parser = values::size)]
    threads: Option<usize>,
    /// Instruction set of the CPU: scalar (the reference, one thread), portable, neon, avx2 or avx512
    /// [default: the best there is].
    #[arg(long, value_name = "PATH", env = "TINYSERVE_CPU", value_parser = values::cpu_path)]
    cpu: Option<CpuPath>,
    #[command(flatten)]
    weights: WeightsArgs,
    /// Folder in which weights that were quantised (int8, int4) are kept for the next start; a file
    /// that is broken or another model's is replaced.
    #[arg(long, value_name = "DIR", env = "TINYSERVE_WEIGHTS_CACHE")]
    weights_cache: Option<PathBuf>,
    /// Whether a CUDA device scores, selects and attends in one launch where it can [default: by
    /// size, see doctor].
    #[arg(long, value_name = "BOOL", env = "TINYSERVE_USE_FUSED_KERNEL",
          num_args = 0..=1, default_missing_value = "true")]
    use_fused_kernel: Option<bool>,
    /// Prints the settings, the device and the memory plan to stderr.
    #[arg(short, long, env = "TINYSERVE_VERBOSE", value_parser = clap::builder::BoolishValueParser::new())]
    verbose: bool,
}

impl DeviceArgs {
    pub(crate) fn apply(&self, config: &mut TinyServeConfig) -> Result<()> {
        set(&mut config.device, self.device);
        set_some(&mut config.threads, self.threads);
        self.weights.apply(config);
        set_some(&mut config.weights_cache, self.weights_cache.clone());
        set_some(&mut config.use_fused_kernel, self.use_fused_kernel);
        match (self.cpu, config.threads) {
            (Some(CpuPath::Scalar), Some(threads)) if threads > 1 => {
                Err(out_of_range("--threads", threads, "1 with --cpu scalar"))
            }
            _ => Ok(()),
        }
    }

    /// The CPU backend that `config` and the flags ask for.
    pub(crate) fn backend(&self, config: &TinyServeConfig) -> Result<Cpu> {
        if !config.cuda_devices().is_empty() {
            let device = String::from(config.device);
            return Err(out_of_range("--device", device, "cpu for this command"));
        }
        let options = CpuOptions { threads: config.threads, path: self.cpu };
        Ok(Cpu::new(options).map_err(TinyServeError::from)?)
    }

    /// Loads the model of `config`, with a progress bar if that takes long.
    pub(crate) fn load(&self, config: TinyServeConfig) -> Result<TinyServe> {
        self.prepare(config, true).map_err(Into::into)
    }

    /// As [`Self::load`], with the facade's own error; moves of the selection budget are told only
    /// if `tells_moves`.
    pub(crate) fn prepare(
        &self,
        config: TinyServeConfig,
        tells_moves: bool,
    ) -> Result<TinyServe, TinyServeError> {
        self.build(TinyServe::builder().config(config), tells_moves)
    }

    /// As [`Self::load`], from a checkpoint that is open already.
    pub(crate) fn load_open(
        &self,
        config: TinyServeConfig,
        checkpoint: Checkpoint,
    ) -> Result<TinyServe> {
        Ok(self.build(TinyServe::builder().config(config).checkpoint(checkpoint), true)?)
    }

    fn build(
        &self,
        mut builder: TinyServeBuilder,
        tells_moves: bool,
    ) -> Result<TinyServe, TinyServeError> {
        let mut progress = Progress::new("loading");
        if let Some(path) = self.cpu {
            builder = builder.cpu_path(path);
        }
        if tells_moves {
            builder = builder.on_budget_move(|moved| {
                let engine = std::thread::current();
                eprintln!("{}: {moved}", engine.name().unwrap_or("engine"));
            });
        }
        let engine = builder.build_with_progress(|done, total| progress.update(done, total))?;
        progress.finish();
        self.tell_of_cache(engine.weights_cache());
        self.tell(engine.config(), engine.backend_name());
        if self.verbose {
            eprint!("{}", plan::lines(engine.memory()));
        }
        Ok(engine)
    }

    /// Prints what became of a cache of weights, if that is a warning or `--verbose` asks.
    pub(crate) fn tell_of_cache(&self, outcome: Option<&CacheOutcome>) {
        match outcome {
            Some(outcome) if outcome.is_warning() => eprintln!("warning: {outcome}"),
            Some(outcome) if self.verbose => eprintln!("{outcome}"),
            _ => {}
        }
    }

    /// With `--verbose`, prints what is in force.
    pub(crate) fn tell(&self, config: &TinyServeConfig, backend: &str) {
        if self.verbose {
            let json = serde_json::to_string(config).unwrap_or_default();
            eprintln!("settings: {json}");
            eprintln!("device: {backend}");
        }
    }
}

/// How the KV cache is laid out.
#[derive(Debug, Args)]
#[command(next_help_heading = "KV cache")]
pub(crate) struct LayoutArgs {
    /// Tokens of one page [default: 16].
    #[arg(long, visible_alias = "block-size", value_name = "TOKENS", env = "TINYSERVE_PAGE_SIZE",
          value_parser = values::size)]
    page_size: Option<usize>,
    /// How keys and values are stored: auto (as the weights), f32, f16, bf16, or, in pages that are
    /// full, int8 or int4.
    #[arg(long, value_name = "DTYPE", env = "TINYSERVE_KV_CACHE_DTYPE",
          value_parser = values::kv_cache_dtype)]
    kv_cache_dtype: Option<KvCacheDtype>,
    /// How keys and values are stored until their page is full and becomes int8 or int4: f16, or
    /// f32, which the CPU has [default: f16].
    #[arg(long, value_name = "DTYPE", env = "TINYSERVE_OPEN_PAGE_DTYPE",
          value_parser = values::open_page_dtype)]
    open_page_dtype: Option<OpenPageDtype>,
    /// Most tokens of a sequence, prompt included [default: the model's context, at most 8192].
    #[arg(long, visible_alias = "max-model-len", value_name = "TOKENS",
          env = "TINYSERVE_MAX_SEQUENCE_LENGTH", value_parser = values::size)]
    max_sequence_length: Option<usize>,
}

impl LayoutArgs {
    pub(crate) fn apply(&self, config: &mut TinyServeConfig) {
        set(&mut config.page_size, self.page_size);
        set(&mut config.kv_cache_dtype, self.kv_cache_dtype);
        set_some(&mut config.open_page_dtype, self.open_page_dtype);
        set_some(&mut config.max_sequence_length, self.max_sequence_length);
    }
}

/// Everything that a forward pass over whole pages depends on.
#[derive(Debug, Args)]
pub(crate) struct ForwardArgs {
    #[command(flatten)]
    pub(crate) model: ModelArgs,
    #[command(flatten)]
    pub(crate) device: DeviceArgs,
    #[command(flatten)]
    layout: LayoutArgs,
    /// Most prompt tokens of one prefill step [default: 256].
    #[arg(long, value_name = "TOKENS", env = "TINYSERVE_ATTENTION_CHUNK_SIZE",
          value_parser = values::size)]
    attention_chunk_size: Option<usize>,
    /// Rounding of rotary frequencies: f32, or weights (as casting a whole model leaves them).
    #[arg(long, value_name = "DTYPE", env = "TINYSERVE_ROPE_FREQUENCY_DTYPE", help_heading = "Device",
          value_parser = |text: &str| values::name::<RopeFrequencyDtype>(text, "f32 or weights"))]
    rope_frequency_dtype: Option<RopeFrequencyDtype>,
}

impl ForwardArgs {
    /// Settings whose values still have to be checked.
    fn unchecked(&self) -> Result<TinyServeConfig> {
        self.applied(self.model.config()?)
    }

    fn applied(&self, mut config: TinyServeConfig) -> Result<TinyServeConfig> {
        self.device.apply(&mut config)?;
        self.layout.apply(&mut config);
        set(&mut config.attention_chunk_size, self.attention_chunk_size);
        set(&mut config.rope_frequency_dtype, self.rope_frequency_dtype);
        Ok(config)
    }

    /// The settings of a command that selects no pages.
    pub(crate) fn config(&self) -> Result<TinyServeConfig> {
        let config = self.unchecked()?;
        config.check()?;
        Ok(config)
    }

    /// The settings of a command that selects pages; `attention` is checked with them.
    pub(crate) fn selecting(
        &self,
        selection: &SelectionArgs,
        attention: Option<AttentionMode>,
        sources: Sources,
    ) -> Result<TinyServeConfig> {
        self.selecting_from(self.model.config()?, selection, attention, sources)
    }

    /// As [`Self::selecting`], over the settings of a file that was read already.
    pub(crate) fn selecting_from(
        &self,
        file: TinyServeConfig,
        selection: &SelectionArgs,
        attention: Option<AttentionMode>,
        sources: Sources,
    ) -> Result<TinyServeConfig> {
        let mut config = self.applied(self.model.applied(file))?;
        set(&mut config.attention, attention);
        selection.apply(&mut config, sources)?;
        config.check()?;
        let policy = config.selection_policy();
        let has_kernels = match config.device {
            Device::Cuda(_) => Cuda::has_kernels(&policy),
            Device::Auto | Device::Cpu => Cpu::has_kernels(&policy),
        };
        if config.attention != AttentionMode::Dense && !has_kernels {
            eprintln!("note: {NO_KERNELS}");
        }
        Ok(config)
    }
}

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
    fn apply(&self, config: &mut TinyServeConfig, sources: Sources) -> Result<()> {
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

fn set<T>(field: &mut T, value: Option<T>) {
    if let Some(value) = value {
        *field = value;
    }
}

fn set_some<T>(field: &mut Option<T>, value: Option<T>) {
    if value.is_some() {
        *field = value;
    }
}
