//! Settings of an engine: one name each in code, files, flags and the environment.

mod check;
mod file;
mod resolve;

use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use tinyserve_kv::SelectionPolicy;

use crate::{
    ApproximateAttention, AttentionMode, Device, EntropySignalName, EvictionName, GroupReduceName,
    KvCacheDtype, OpenPageDtype, RopeFrequencyDtype, ScorerName, Weights,
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
    /// File that says up to which size that is no slower, as it was measured; a start with a device
    /// and a shape of heads and pages that it lacks measures them, and writes them there. Unless it is set, the
    /// built-in table says, which an H200 gave. Refused on the CPU.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub fused_table: Option<PathBuf>,
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
            fused_table: None,
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
