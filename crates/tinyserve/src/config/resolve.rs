//! What settings come to: devices, layouts, policies, limits.

use std::time::{Duration, TryFromFloatSecsError};

use tinyserve_kernels::DType;
use tinyserve_kv::{Budget, KvLayout, SelectionPolicy};
use tinyserve_model::{LoadOptions, ModelConfig};
use tinyserve_plugins::{EntropyExit, PluginManager, TokenPruning};
use tinyserve_sched::EngineConfig;

use crate::{AttentionMode, Device, TinyServeConfig, TinyServeError};

/// Most tokens of a step when neither the user nor a larger setting asks for more.
const DEFAULT_MAX_NUM_BATCHED_TOKENS: usize = 512;

/// Most tokens of a sequence when neither the user nor the model asks for fewer.
const DEFAULT_MAX_SEQUENCE_LENGTH: usize = 8192;

impl TinyServeConfig {
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

    /// `target_latency_ms` as a time.
    pub(crate) fn target_latency(&self) -> Result<Duration, TryFromFloatSecsError> {
        Duration::try_from_secs_f64(self.target_latency_ms / 1e3)
    }

    pub(super) fn entropy_exit(&self) -> EntropyExit {
        EntropyExit {
            signal: self.entropy_signal.into(),
            threshold: self.entropy_threshold,
            min_tokens: self.min_tokens_before_exit,
            patience: self.entropy_patience,
        }
    }

    pub(super) fn token_pruning(&self) -> TokenPruning {
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

#[cfg(test)]
mod tests {
    use super::*;

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
