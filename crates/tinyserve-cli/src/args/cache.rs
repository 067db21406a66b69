//! How the KV cache is laid out, and how much memory there is for it.

use clap::Args;
use tinyserve::{KvCacheDtype, OpenPageDtype, TinyServeConfig};

use super::{set, set_some};
use crate::values;

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
