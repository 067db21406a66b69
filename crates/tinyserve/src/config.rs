//! Settings of an engine: one name each in code, files, flags and the environment.

use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::{Deserialize, Serialize};
use tinyserve_kernels::DType;
use tinyserve_kv::{Budget, KvLayout, SelectionPolicy};
use tinyserve_model::{LoadOptions, ModelConfig};
use tinyserve_plugins::{EntropyExit, PluginManager, TokenPruning};
use tinyserve_sched::EngineConfig;

use crate::{
    ApproximateAttention, AttentionMode, Device, EntropySignalName, EvictionName, GroupReduceName,
    KvCacheDtype, OpenPageDtype, RopeFrequencyDtype, ScorerName, TinyServeError, Weights,
};

/// Settings of an engine.
///
/// The same names are keys of a JSON or TOML file, flags (`--selection-ratio`) and environment
/// variables (`TINYSERVE_SELECTION_RATIO`) of the command. An unknown key is an error.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct TinyServeConfig {
    /// A folder in Hugging Face layout, or `builtin:stories260k`.
    pub model: String,
    /// Where the model runs.
    pub device: Device,
    /// Threads of the CPU; all that the system offers unless set.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub threads: Option<usize>,
    /// How weights are kept in memory.
    #[serde(alias = "dtype")]
    pub weights: Weights,
    /// Folder in which quantised weights are kept from one start to the next; only for `weights`
    /// int8 and int4.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub weights_cache: Option<PathBuf>,
    /// Whether a CUDA device scores, selects and attends in one launch, as far as it has a kernel for
    /// the shape; unless it is set, sizes decide. Refused on the CPU.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub use_fused_kernel: Option<bool>,
    /// Tokens of one page.
    #[serde(alias = "block_size")]
    pub page_size: usize,
    /// When decode steps select pages.
    pub attention: AttentionMode,
    /// Share of the pages that a selecting step reads, above 0 and at most 1.
    pub selection_ratio: f64,
    /// Tokens that a selecting step reads, instead of a share.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub token_budget: Option<usize>,
    /// Share of the estimated attention mass that a selecting step reads, instead of a share of
    /// the pages.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub top_p_pages: Option<f64>,
    /// What a page is scored by.
    pub scorer: ScorerName,
    /// How the scores of the query heads that share a KV head become one.
    pub group_reduce: GroupReduceName,
    /// A scorer by which every step at every length approximates attention, or `off`: the same as
    /// `attention = "sparse"` with that `scorer`.
    pub approximate_attention: ApproximateAttention,
    /// First pages that are always read.
    pub sink_pages: usize,
    /// Last pages that are always read.
    pub recent_pages: usize,
    /// First layers that always read everything.
    pub dense_layers: usize,
    /// Contexts below this many tokens are read in full; see [`AttentionMode`] for the default.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub sparse_min_context: Option<usize>,
    /// How keys and values are stored.
    pub kv_cache_dtype: KvCacheDtype,
    /// How keys and values are stored until their page is full, with `kv_cache_dtype` int8 or int4:
    /// f16 unless set. Refused with others, and f32 on CUDA.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub open_page_dtype: Option<OpenPageDtype>,
    /// What the frequencies of the rotary embedding are rounded to.
    pub rope_frequency_dtype: RopeFrequencyDtype,
    /// Most prompt tokens of one prefill step.
    pub attention_chunk_size: usize,
    /// Most tokens of a sequence, prompt included; unless set, the model's context, at most 8192,
    /// or fewer where memory holds fewer.
    #[serde(alias = "max_model_len", skip_serializing_if = "Option::is_none")]
    pub max_sequence_length: Option<usize>,
    /// Mean time per generated token that `get_optimized_config` and `adaptive` steer towards,
    /// milliseconds.
    pub target_latency_ms: f64,
    /// Whether the selection budget is moved while the engine runs, so that decode steps keep to
    /// `target_latency_ms`. Then the same seed may give another text.
    pub adaptive: bool,
    /// Least budget that `adaptive` moves to, as a multiple of the stated one; above 0 and at most 1.
    pub adaptive_min_budget: f64,
    /// Largest budget that `adaptive` moves to, as a multiple of the stated one; at least 1.
    pub adaptive_max_budget: f64,
    /// Copies of the model, each with threads, weights and pages of its own, that share the work.
    pub replicas: usize,
    /// CUDA devices with a copy of the model each, that share the work; the first ones unless
    /// `gpu_ids` says which.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub num_gpus: Option<usize>,
    /// The numbers of these devices.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub gpu_ids: Option<Vec<usize>>,
    /// Devices that one model is split over; only 1 is implemented.
    pub tensor_parallel_size: usize,
    /// Most sequences that run together in a replica.
    pub max_num_seqs: usize,
    /// Most tokens of one step, decodes and prefill chunks together; unless set, 512, or more where
    /// `attention_chunk_size` or `max_num_seqs` are more.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_num_batched_tokens: Option<usize>,
    /// Most requests that wait for their first step; no limit unless set.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_num_queued_reqs: Option<usize>,
    /// Most prompt tokens of the requests that wait for their first step; no limit unless set.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_num_queued_tokens: Option<usize>,
    /// Whether the pages of prompts are kept for requests that begin alike.
    pub enable_prefix_caching: bool,
    /// Which kept pages are given up first when their room is needed.
    pub eviction_policy: EvictionName,
    /// Seconds of waiting that count as much as one step of priority.
    pub priority_ageing: f64,
    /// Seconds without a request after which a session is deleted.
    pub session_timeout: f64,
    /// Most memory of the process, in units of 10⁹ bytes; unless set, `memory_utilization`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub target_memory_gb: Option<f64>,
    /// Share of the available memory that the process may take, above 0 and at most 1; 0.8 unless
    /// set.
    #[serde(alias = "gpu_memory_utilization", skip_serializing_if = "Option::is_none")]
    pub memory_utilization: Option<f64>,
    /// Bytes of pages, those of all replicas together; unless set, as many as `max_num_seqs` of the
    /// longest sequences fill, or fewer where memory holds fewer.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub kv_cache_memory_bytes: Option<usize>,
    /// Whether requests end when the model has become certain.
    pub enable_entropy_early_exit: bool,
    /// Nats below which an entropy is certainty.
    pub entropy_threshold: f64,
    /// Tokens that are generated before an early exit.
    pub min_tokens_before_exit: usize,
    /// Whose entropy decides.
    pub entropy_signal: EntropySignalName,
    /// Steps in a row whose entropy has to lie below the threshold.
    pub entropy_patience: usize,
    /// Whether tokens with little attention are removed from the cache.
    pub enable_token_pruning: bool,
    /// Share of the cached tokens that one pruning removes at most, 0 to 1.
    pub pruning_ratio: f64,
    /// Tokens that always stay in the cache.
    pub min_tokens_after_pruning: usize,
}

impl Default for TinyServeConfig {
    fn default() -> Self {
        let policy = SelectionPolicy::default();
        Self {
            model: tinyserve_model::BUILTIN_MODEL.to_owned(),
            device: Device::Auto,
            threads: None,
            weights: Weights::Auto,
            weights_cache: None,
            use_fused_kernel: None,
            page_size: 16,
            attention: AttentionMode::Auto,
            selection_ratio: 0.3,
            token_budget: None,
            top_p_pages: None,
            scorer: ScorerName::default(),
            group_reduce: GroupReduceName::Max,
            approximate_attention: ApproximateAttention::default(),
            sink_pages: policy.sink_pages,
            recent_pages: policy.recent_pages,
            dense_layers: policy.dense_layers,
            sparse_min_context: None,
            kv_cache_dtype: KvCacheDtype::Auto,
            open_page_dtype: None,
            rope_frequency_dtype: RopeFrequencyDtype::F32,
            attention_chunk_size: 256,
            max_sequence_length: None,
            target_latency_ms: 50.0,
            adaptive: false,
            adaptive_min_budget: 0.25,
            adaptive_max_budget: 1.0,
            replicas: 1,
            num_gpus: None,
            gpu_ids: None,
            tensor_parallel_size: 1,
            max_num_seqs: 16,
            max_num_batched_tokens: None,
            max_num_queued_reqs: None,
            max_num_queued_tokens: None,
            enable_prefix_caching: true,
            eviction_policy: EvictionName::Lru,
            priority_ageing: 10.0,
            session_timeout: 300.0,
            target_memory_gb: None,
            memory_utilization: None,
            kv_cache_memory_bytes: None,
            enable_entropy_early_exit: false,
            entropy_threshold: 0.5,
            min_tokens_before_exit: 10,
            entropy_signal: EntropySignalName::Attention,
            entropy_patience: 1,
            enable_token_pruning: false,
            pruning_ratio: 0.1,
            min_tokens_after_pruning: 100,
        }
    }
}

/// Most tokens of a step when neither the user nor a larger setting asks for more.
const DEFAULT_MAX_NUM_BATCHED_TOKENS: usize = 512;

/// Most tokens of a sequence when neither the user nor the model asks for fewer.
const DEFAULT_MAX_SEQUENCE_LENGTH: usize = 8192;

impl TinyServeConfig {
    /// Reads a `.json` or `.toml` file; keys that it leaves out keep their defaults.
    ///
    /// # Errors
    /// When the file cannot be read, has another ending, holds an unknown key or a value of the
    /// wrong type, or a value is out of its range.
    pub fn load(path: impl AsRef<Path>) -> Result<Self, TinyServeError> {
        let path = path.as_ref();
        let format = FileFormat::of(path)?;
        let text = std::fs::read_to_string(path)
            .map_err(|source| TinyServeError::ConfigIo { path: path.into(), source })?;
        let config: Self = match format {
            FileFormat::Json => serde_json::from_str(&text).map_err(|e| e.to_string()),
            FileFormat::Toml => toml::from_str(&text).map_err(|e| one_line(&e)),
        }
        .map_err(|message| TinyServeError::ConfigFormat { path: path.into(), message })?;
        config.check().map_err(|error| TinyServeError::ConfigFormat {
            path: path.into(),
            message: error.to_string(),
        })?;
        Ok(config)
    }

    /// Writes a `.json` or `.toml` file.
    ///
    /// # Errors
    /// When the file cannot be written or has another ending.
    pub fn save(&self, path: impl AsRef<Path>) -> Result<(), TinyServeError> {
        let path = path.as_ref();
        let text = match FileFormat::of(path)? {
            FileFormat::Json => serde_json::to_string_pretty(self).map_err(|e| e.to_string()),
            FileFormat::Toml => toml::to_string_pretty(self).map_err(|e| e.to_string()),
        }
        .map_err(|message| TinyServeError::ConfigFormat { path: path.into(), message })?;
        std::fs::write(path, text + "\n")
            .map_err(|source| TinyServeError::ConfigIo { path: path.into(), source })
    }

    /// Checks every value that can be checked without a model.
    ///
    /// # Errors
    /// [`TinyServeError::Setting`], naming the first field that is out of its range.
    pub fn check(&self) -> Result<(), TinyServeError> {
        let at_least_one = [
            ("page_size", Some(self.page_size)),
            ("attention_chunk_size", Some(self.attention_chunk_size)),
            ("threads", self.threads),
            ("max_sequence_length", self.max_sequence_length),
            ("replicas", Some(self.replicas)),
            ("num_gpus", self.num_gpus),
            ("max_num_seqs", Some(self.max_num_seqs)),
            ("max_num_batched_tokens", self.max_num_batched_tokens),
        ];
        for (field, value) in at_least_one {
            if value == Some(0) {
                return Err(TinyServeError::Setting {
                    field,
                    found: "0".to_owned(),
                    expected: "at least 1".to_owned(),
                });
            }
        }
        if let Some(folder) = &self.weights_cache
            && !matches!(self.weights, Weights::Int8 | Weights::Int4)
        {
            return Err(TinyServeError::Setting {
                field: "weights_cache",
                found: format!("{} with weights as they are stored", folder.display()),
                expected: "weights int8 or int4: only quantised weights are cached".to_owned(),
            });
        }
        self.check_open_page_dtype()?;
        if let Some(fused) = self.use_fused_kernel.filter(|_| self.cuda_devices().is_empty()) {
            return Err(TinyServeError::Setting {
                field: "use_fused_kernel",
                found: format!("{fused} with device {}", String::from(self.device)),
                expected: "a CUDA device: the CPU has no launches to save".to_owned(),
            });
        }
        if !(self.target_latency_ms > 0.0 && self.target_latency_ms.is_finite()) {
            return Err(TinyServeError::Setting {
                field: "target_latency_ms",
                found: self.target_latency_ms.to_string(),
                expected: "a number above 0".to_owned(),
            });
        }
        self.check_adaptive()?;
        self.check_gpus()?;
        if self.tensor_parallel_size != 1 {
            return Err(TinyServeError::Setting {
                field: "tensor_parallel_size",
                found: self.tensor_parallel_size.to_string(),
                expected: "1: splitting one model over several devices is not implemented"
                    .to_owned(),
            });
        }
        if let Some(threads) = self.threads.filter(|&threads| threads < self.replicas) {
            return Err(TinyServeError::Setting {
                field: "replicas",
                found: self.replicas.to_string(),
                expected: format!("at most {threads}, the value of threads: each needs one"),
            });
        }
        for (field, seconds) in
            [("priority_ageing", self.priority_ageing), ("session_timeout", self.session_timeout)]
        {
            if Duration::try_from_secs_f64(seconds).is_err() {
                return Err(TinyServeError::Setting {
                    field,
                    found: seconds.to_string(),
                    expected: "seconds, 0 or more".to_owned(),
                });
            }
        }
        self.scheduling().check()?;
        if let Some(gigabytes) = self.target_memory_gb
            && !(gigabytes > 0.0 && gigabytes.is_finite())
        {
            return Err(TinyServeError::Setting {
                field: "target_memory_gb",
                found: gigabytes.to_string(),
                expected: "a number above 0".to_owned(),
            });
        }
        if let Some(share) = self.memory_utilization {
            let expected = match self.target_memory_gb {
                _ if !(share > 0.0 && share <= 1.0) => "a share above 0 and at most 1",
                Some(_) => "none beside target_memory_gb: both say how much memory to take",
                None => "",
            };
            if !expected.is_empty() {
                return Err(TinyServeError::Setting {
                    field: "memory_utilization",
                    found: share.to_string(),
                    expected: expected.to_owned(),
                });
            }
        }
        self.entropy_exit().check()?;
        self.token_pruning().check()?;
        if self.enable_token_pruning
            && self.pruning_ratio > 0.0
            && self.kv_cache_dtype.is_quantised()
        {
            return Err(TinyServeError::Setting {
                field: "kv_cache_dtype",
                found: self.kv_cache_dtype.name().to_owned(),
                expected: "auto, f32, f16 or bf16 where tokens are pruned: codes of a page share \
                           its box"
                    .to_owned(),
            });
        }
        if let Some(scorer) = self.approximate_attention.0 {
            let named = ScorerName(scorer);
            let other = self.scorer != ScorerName::default() && self.scorer != named;
            if self.attention == AttentionMode::Dense || other {
                return Err(TinyServeError::Setting {
                    field: "approximate_attention",
                    found: scorer.name().to_owned(),
                    expected: "off where attention is dense or another scorer is set".to_owned(),
                });
            }
        }
        Ok(self.selection_policy().check()?)
    }

    /// The CUDA devices that get a copy of the model each; none for the CPU.
    #[must_use]
    pub fn cuda_devices(&self) -> Vec<usize> {
        match (&self.gpu_ids, self.num_gpus, self.device) {
            (Some(ids), _, _) => ids.clone(),
            (None, Some(n), _) => (0..n).collect(),
            (None, None, Device::Cuda(number)) => vec![number],
            (None, None, Device::Auto | Device::Cpu) => Vec::new(),
        }
    }

    fn check_open_page_dtype(&self) -> Result<(), TinyServeError> {
        let Some(dtype) = self.open_page_dtype else { return Ok(()) };
        let wrong = |beside: &str, expected: &str| {
            let found = format!("{} with {beside}", dtype.format());
            let expected = expected.to_owned();
            Err(TinyServeError::Setting { field: "open_page_dtype", found, expected })
        };
        if !self.kv_cache_dtype.is_quantised() {
            let expected = "kv_cache_dtype int8 or int4: other pages stay as they are when they \
                            are full";
            return wrong(&format!("kv_cache_dtype {}", self.kv_cache_dtype.name()), expected);
        }
        if dtype == OpenPageDtype::F32 && !self.cuda_devices().is_empty() {
            let expected = "f16 on CUDA devices, whose kernels read open pages in it";
            return wrong("a CUDA device", expected);
        }
        Ok(())
    }

    fn check_gpus(&self) -> Result<(), TinyServeError> {
        let wrong = |field, found: String, expected: String| {
            Err(TinyServeError::Setting { field, found, expected })
        };
        let devices = self.cuda_devices();
        if let Some(ids) = &self.gpu_ids {
            let shown = format!("{ids:?}");
            let twice = |(i, id): (usize, &usize)| ids[..i].contains(id);
            if ids.is_empty() || ids.iter().enumerate().any(twice) {
                return wrong("gpu_ids", shown, "numbers of devices, each once".to_owned());
            }
            if let Some(n) = self.num_gpus.filter(|&n| n != ids.len()) {
                let expected = format!("{n} of them, the value of num_gpus");
                return wrong("gpu_ids", shown, expected);
            }
        }
        let chosen = self.gpu_ids.is_some() || self.num_gpus.is_some();
        // `cuda` alone is `cuda:0`.
        if chosen && !matches!(self.device, Device::Auto | Device::Cuda(0)) {
            let expected = "auto or cuda where num_gpus or gpu_ids name the devices".to_owned();
            return wrong("device", String::from(self.device), expected);
        }
        if !devices.is_empty() && self.replicas > 1 {
            let expected = "1 on CUDA devices: gpu_ids names those that get a copy of the model";
            return wrong("replicas", self.replicas.to_string(), expected.to_owned());
        }
        Ok(())
    }

    fn check_adaptive(&self) -> Result<(), TinyServeError> {
        let wrong = |field, found: String, expected: &str| {
            Err(TinyServeError::Setting { field, found, expected: expected.to_owned() })
        };
        let (min, max) = (self.adaptive_min_budget, self.adaptive_max_budget);
        if !(min > 0.0 && min <= 1.0) {
            return wrong("adaptive_min_budget", min.to_string(), "above 0 and at most 1");
        }
        if !(max >= 1.0 && max.is_finite()) {
            return wrong("adaptive_max_budget", max.to_string(), "a number of at least 1");
        }
        if !self.adaptive {
            return Ok(());
        }
        if self.attention == AttentionMode::Dense {
            let expected = "false with dense attention: there is no selection budget to move";
            return wrong("adaptive", "true".to_owned(), expected);
        }
        let full = self.selection_ratio >= 1.0 && self.token_budget.is_none();
        if min == 1.0 && (max == 1.0 || full && self.top_p_pages.is_none()) {
            let expected = "below 1 with adaptive: these bounds leave no room to move";
            return wrong("adaptive_min_budget", min.to_string(), expected);
        }
        Ok(())
    }

    /// How a model whose weights are stored as `stored` is loaded.
    ///
    /// # Errors
    /// When another float type than the stored one is asked for.
    pub fn load_options(&self, stored: DType) -> Result<LoadOptions, TinyServeError> {
        Ok(LoadOptions { format: self.weights.resolve(stored)?, cache: self.weights_cache.clone() })
    }

    /// How the pages of `model`, whose weights are stored as `stored`, lie in memory.
    ///
    /// # Errors
    /// When the page size is 0 or too large, or `open_page_dtype` is set where no page becomes codes.
    pub fn kv_layout(
        &self,
        model: &ModelConfig,
        stored: DType,
    ) -> Result<KvLayout, TinyServeError> {
        let layout = model.kv_layout(self.page_size, self.kv_cache_dtype.resolve(stored))?;
        match self.open_page_dtype {
            Some(dtype) => Ok(layout.with_open_format(dtype.format())?),
            None => Ok(layout),
        }
    }

    /// What the scheduler is told; the facade adds what only a loaded model knows.
    pub(crate) fn scheduling(&self) -> EngineConfig {
        let seconds = |seconds| Duration::try_from_secs_f64(seconds).unwrap_or_default();
        let most = self.attention_chunk_size.max(self.max_num_seqs);
        EngineConfig {
            max_num_seqs: self.max_num_seqs,
            max_num_batched_tokens: self
                .max_num_batched_tokens
                .unwrap_or(most.max(DEFAULT_MAX_NUM_BATCHED_TOKENS)),
            attention_chunk_size: self.attention_chunk_size,
            max_num_queued_reqs: self.max_num_queued_reqs,
            max_num_queued_tokens: self.max_num_queued_tokens,
            priority_ageing: seconds(self.priority_ageing),
            session_timeout: seconds(self.session_timeout),
            ..EngineConfig::default()
        }
    }

    fn entropy_exit(&self) -> EntropyExit {
        EntropyExit {
            signal: self.entropy_signal.into(),
            threshold: self.entropy_threshold,
            min_tokens: self.min_tokens_before_exit,
            patience: self.entropy_patience,
        }
    }

    fn token_pruning(&self) -> TokenPruning {
        TokenPruning {
            ratio: self.pruning_ratio,
            min_tokens: self.min_tokens_after_pruning,
            sink_tokens: self.sink_pages.saturating_mul(self.page_size),
            recent_tokens: self.recent_pages.saturating_mul(self.page_size),
        }
    }

    /// Registers the built-in plugins, those that are not enabled switched off.
    pub(crate) fn register_plugins(&self, plugins: &PluginManager) -> Result<(), TinyServeError> {
        plugins.register(EntropyExit::NAME, self.entropy_exit())?;
        plugins.register(TokenPruning::NAME, self.token_pruning())?;
        for (name, enabled) in [
            (EntropyExit::NAME, self.enable_entropy_early_exit),
            (TokenPruning::NAME, self.enable_token_pruning),
        ] {
            if !enabled {
                plugins.disable(name)?;
            }
        }
        Ok(())
    }

    /// The policy that these settings describe.
    #[must_use]
    pub fn selection_policy(&self) -> SelectionPolicy {
        let approximate = self.approximate_attention.0;
        let min_context = match self.attention {
            _ if approximate.is_some() => 0,
            AttentionMode::Sparse => 0,
            AttentionMode::Auto | AttentionMode::Dense => SelectionPolicy::default().min_context,
        };
        let ratio = self.top_p_pages.map_or(Budget::Ratio(self.selection_ratio), Budget::TopP);
        SelectionPolicy {
            scorer: approximate.unwrap_or(self.scorer.0),
            budget: self.token_budget.map_or(ratio, Budget::Tokens),
            sink_pages: self.sink_pages,
            recent_pages: self.recent_pages,
            dense_layers: self.dense_layers,
            min_context: self.sparse_min_context.unwrap_or(min_context),
            group_reduce: self.group_reduce.into(),
        }
    }

    /// Most tokens of a sequence of a model whose own limit is `context`.
    ///
    /// # Errors
    /// When `max_sequence_length` is set beyond the model's context.
    pub fn sequence_limit(&self, context: usize) -> Result<usize, TinyServeError> {
        match self.max_sequence_length {
            Some(limit) if limit > context => Err(TinyServeError::Setting {
                field: "max_sequence_length",
                found: limit.to_string(),
                expected: format!("at most {context}, the context that the model was made for"),
            }),
            Some(limit) => Ok(limit),
            None => Ok(context.min(DEFAULT_MAX_SEQUENCE_LENGTH)),
        }
    }
}

enum FileFormat {
    Json,
    Toml,
}

impl FileFormat {
    fn of(path: &Path) -> Result<Self, TinyServeError> {
        match path.extension().and_then(|extension| extension.to_str()) {
            Some("json") => Ok(Self::Json),
            Some("toml") => Ok(Self::Toml),
            _ => Err(TinyServeError::ConfigFormat {
                path: path.into(),
                message: "a configuration file ends in .json or .toml".to_owned(),
            }),
        }
    }
}

/// A TOML error without the excerpt that it draws under its sentence.
fn one_line(error: &toml::de::Error) -> String {
    error.message().replace('\n', " ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_round_trip_and_leave_defaults_alone() {
        let dir = tempfile::tempdir().unwrap();
        let config = TinyServeConfig {
            page_size: 32,
            token_budget: Some(512),
            attention: AttentionMode::Sparse,
            scorer: "mean-std".to_owned().try_into().unwrap(),
            group_reduce: GroupReduceName::SoftmaxVote,
            kv_cache_dtype: KvCacheDtype::Bf16,
            ..TinyServeConfig::default()
        };
        for name in ["c.json", "c.toml"] {
            let path = dir.path().join(name);
            config.save(&path).unwrap();
            assert_eq!(TinyServeConfig::load(&path).unwrap(), config);
        }
        let path = dir.path().join("partial.toml");
        std::fs::write(&path, "block_size = 8\nmax_model_len = 100\n").unwrap();
        let loaded = TinyServeConfig::load(&path).unwrap();
        assert_eq!((loaded.page_size, loaded.max_sequence_length), (8, Some(100)));
        assert_eq!(loaded.selection_ratio, 0.3);
    }

    #[test]
    fn devices_have_names_and_numbers() {
        let of = |text: &str| Device::try_from(text.to_owned());
        assert_eq!(of("cuda"), Ok(Device::Cuda(0)));
        for device in [Device::Auto, Device::Cpu, Device::Cuda(3)] {
            assert_eq!(of(&String::from(device)), Ok(device));
        }
        for wrong in ["gpu", "cuda:", "cuda:x", "cuda:-1", ""] {
            assert!(of(wrong).unwrap_err().contains("cuda:N"), "{wrong}");
        }
    }

    #[test]
    fn devices_are_named_one_way_or_the_other() {
        let of = |device, num_gpus, gpu_ids: Option<&[usize]>| {
            let gpu_ids = gpu_ids.map(<[_]>::to_vec);
            let config = TinyServeConfig { device, num_gpus, gpu_ids, ..Default::default() };
            config.check().unwrap();
            config.cuda_devices()
        };
        assert_eq!(of(Device::Cpu, None, None), [0; 0]);
        assert_eq!(of(Device::Cuda(3), None, None), [3]);
        assert_eq!(of(Device::Auto, Some(2), None), [0, 1]);
        assert_eq!(of(Device::Cuda(0), None, Some(&[2, 0])), [2, 0]);
        assert_eq!(of(Device::Auto, Some(1), Some(&[5])), [5]);
    }

    #[test]
    fn mistakes_are_named() {
        let dir = tempfile::tempdir().unwrap();
        let cases = [
            ("a.toml", "pages = 3", "pages"),
            ("b.json", r#"{"selection_ratio": 0}"#, "selection_ratio is 0"),
            ("c.json", r#"{"selection_ratio": 1.5}"#, "selection_ratio is 1.5"),
            ("d.toml", "page_size = 0", "page_size is 0"),
            ("e.toml", "num_gpus = 0", "num_gpus is 0"),
            ("u.toml", "gpu_ids = [1, 1]", "gpu_ids is [1, 1], expected numbers of devices"),
            ("v.toml", "num_gpus = 3\ngpu_ids = [0, 2]", "gpu_ids is [0, 2], expected 3"),
            ("w.toml", "num_gpus = 2\ndevice = \"cpu\"", "device is cpu, expected auto or cuda"),
            ("x.toml", "device = \"cuda\"\nreplicas = 2", "replicas is 2, expected 1 on CUDA"),
            ("l.toml", "max_num_seqs = 0", "max_num_seqs is 0"),
            ("o.toml", "tensor_parallel_size = 2", "tensor_parallel_size is 2, expected 1"),
            ("p.toml", "replicas = 3\nthreads = 2", "replicas is 3, expected at most 2"),
            (
                "m.toml",
                "max_num_batched_tokens = 3",
                "max_num_batched_tokens is 3, expected at least 16",
            ),
            ("n.toml", "session_timeout = -1.0", "session_timeout is -1"),
            ("j.toml", "target_memory_gb = 0.0", "target_memory_gb is 0"),
            ("k.toml", "target_memory_gb = inf", "target_memory_gb is inf"),
            ("q.toml", "gpu_memory_utilization = 1.5", "memory_utilization is 1.5"),
            ("r.toml", "memory_utilization = 0.5\ntarget_memory_gb = 1.0", "target_memory_gb"),
            ("i.toml", "weights = \"int3\"", "int3"),
            ("o.toml", "weights_cache = \"here\"", "weights_cache is here"),
            ("f.toml", "kv_cache_dtype = \"int3\"", "int3"),
            (
                "y.toml",
                "open_page_dtype = \"f32\"",
                "open_page_dtype is f32 with kv_cache_dtype auto, expected kv_cache_dtype int8",
            ),
            (
                "z.toml",
                "open_page_dtype = \"f16\"\nkv_cache_dtype = \"f32\"",
                "open_page_dtype is f16 with kv_cache_dtype f32, expected kv_cache_dtype int8",
            ),
            (
                "0.toml",
                "open_page_dtype = \"f32\"\nkv_cache_dtype = \"int4\"\nnum_gpus = 2",
                "open_page_dtype is f32 with a CUDA device, expected f16 on CUDA",
            ),
            (
                "1.toml",
                "open_page_dtype = \"bf16\"\nkv_cache_dtype = \"int4\"",
                "unknown variant `bf16`, expected one of `f16`",
            ),
            ("g.json", "{", "EOF"),
            ("h.yaml", "", ".json or .toml"),
            (
                "q.toml",
                "adaptive = true\nattention = \"dense\"",
                "adaptive is true, expected false",
            ),
            ("r.toml", "adaptive_min_budget = 0.0", "adaptive_min_budget is 0"),
            ("s.toml", "adaptive_max_budget = 0.5", "adaptive_max_budget is 0.5"),
            ("t.toml", "adaptive = true\nadaptive_min_budget = 1.0", "no room to move"),
            ("j.toml", "scorer = \"bocks\"", "cuboid-mean"),
            ("k.json", r#"{"top_p_pages": 1.5}"#, "top_p_pages is 1.5"),
        ];
        for (name, text, expected) in cases {
            let path = dir.path().join(name);
            std::fs::write(&path, text).unwrap();
            let message = TinyServeConfig::load(&path).unwrap_err().to_string();
            assert!(message.contains(expected) && message.contains(name), "{message}");
            assert!(!message.contains('\n'), "{message}");
        }
        let missing = TinyServeConfig::load(dir.path().join("none.toml")).unwrap_err();
        assert!(missing.to_string().contains("none.toml"));
    }

    #[test]
    fn the_mode_decides_the_minimum_context() {
        let of = |attention, sparse_min_context| {
            TinyServeConfig { attention, sparse_min_context, ..TinyServeConfig::default() }
                .selection_policy()
                .min_context
        };
        assert_eq!(of(AttentionMode::Auto, None), 1024);
        assert_eq!(of(AttentionMode::Sparse, None), 0);
        assert_eq!(of(AttentionMode::Sparse, Some(64)), 64);
        assert_eq!(of(AttentionMode::Auto, Some(64)), 64);
    }
}
