//! How requests share steps, and how many may wait.

use clap::Args;
use tinyserve::{EvictionName, TinyServeConfig};

use super::{set, set_some};
use crate::values;

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
