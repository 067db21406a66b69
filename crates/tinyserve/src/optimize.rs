//! Settings that fit measured latency and memory better.

use tinyserve_kernels::DType;

use crate::{AttentionMode, KvCacheDtype, TinyServeConfig, Weights};

/// What was measured; what is `None` is left alone.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Measured {
    /// Mean time per generated token after the first, milliseconds.
    pub latency_ms: Option<f64>,
    /// Memory of the process, 10⁹ bytes.
    pub memory_gb: Option<f64>,
}

/// A changed copy of settings, and why.
#[derive(Debug, Clone, PartialEq)]
pub struct Optimized {
    /// The settings; they are valid if those that they come from are.
    pub config: TinyServeConfig,
    /// What was changed, each with its reason; empty when nothing has to be.
    pub reasons: Vec<String>,
}

/// Shares of the pages are not lowered below this one.
const LEAST_RATIO: f64 = 0.1;
/// Token budgets are not lowered below this one.
const LEAST_BUDGET: usize = 256;
/// Pages are not made larger than this.
const LARGEST_PAGE: usize = 64;
/// What a budget is multiplied by.
const STEP: f64 = 0.7;

impl TinyServeConfig {
    /// One step towards `target_latency_ms` and `target_memory_gb` from what was measured with
    /// these settings, for a model whose weights are stored as `stored`.
    ///
    /// Latency above its target lowers the selection budget, makes pages larger and stores keys and
    /// values in fewer bits; memory above its target stores keys, values and weights in fewer bits
    /// and lets fewer sequences run together. Each step is bounded: measure again before the next.
    #[must_use]
    pub fn optimized(&self, measured: Measured, stored: DType) -> Optimized {
        let mut config = self.clone();
        let mut reasons = Vec::new();
        if let Some(latency) = measured.latency_ms.filter(|&ms| ms > self.target_latency_ms) {
            let why = format!("{latency:.1} ms per token, target {} ms", self.target_latency_ms);
            config.read_less(&why, &mut reasons);
            if config.page_size < LARGEST_PAGE {
                let larger = (2 * config.page_size).min(LARGEST_PAGE);
                reasons.push(format!("page_size {} → {larger}: {why}", config.page_size));
                config.page_size = larger;
            }
            config.store_less(&why, stored, &mut reasons);
        }
        if let (Some(memory), Some(target)) = (measured.memory_gb, self.target_memory_gb)
            && memory > target
        {
            let why = format!("{memory:.3} GB in use, target {target} GB");
            config.store_less(&why, stored, &mut reasons);
            let fewer = match config.weights {
                Weights::Int8 => Some(Weights::Int4),
                Weights::Int4 => None,
                _ => Some(Weights::Int8),
            };
            if let Some(fewer) = fewer {
                reasons.push(format!("weights → {}: {why}", fewer.name(stored)));
                config.weights = fewer;
            }
            if config.max_num_seqs > 1 {
                let half = config.max_num_seqs / 2;
                reasons.push(format!("max_num_seqs {} → {half}: {why}", config.max_num_seqs));
                config.max_num_seqs = half;
            }
        }
        Optimized { config, reasons }
    }

    /// A smaller selection budget, or one at all.
    fn read_less(&mut self, why: &str, reasons: &mut Vec<String>) {
        match self.token_budget {
            _ if self.attention == AttentionMode::Dense => {
                reasons.push(format!("attention dense → auto: {why}"));
                self.attention = AttentionMode::Auto;
            }
            Some(budget) if budget > LEAST_BUDGET => {
                let smaller = ((budget as f64 * STEP) as usize).max(LEAST_BUDGET);
                reasons.push(format!("token_budget {budget} → {smaller}: {why}"));
                self.token_budget = Some(smaller);
            }
            None if self.selection_ratio > LEAST_RATIO => {
                let smaller = (self.selection_ratio * STEP).max(LEAST_RATIO);
                let ratio = self.selection_ratio;
                reasons.push(format!("selection_ratio {ratio} → {smaller:.3}: {why}"));
                self.selection_ratio = smaller;
            }
            _ => {}
        }
    }

    /// Keys and values in 16 bits where they have 32.
    fn store_less(&mut self, why: &str, stored: DType, reasons: &mut Vec<String>) {
        let wide = self.kv_cache_dtype == KvCacheDtype::F32
            || (self.kv_cache_dtype == KvCacheDtype::Auto && stored == DType::F32);
        if wide {
            reasons.push(format!("kv_cache_dtype f32 → f16: {why}"));
            self.kv_cache_dtype = KvCacheDtype::F16;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pressure_lowers_what_is_read_and_kept_and_says_why() {
        let config = TinyServeConfig { target_memory_gb: Some(1.0), ..TinyServeConfig::default() };
        let calm = Measured { latency_ms: Some(1.0), memory_gb: Some(0.5) };
        let found = config.optimized(calm, DType::F32);
        assert_eq!((found.config, found.reasons.len()), (config.clone(), 0));
        let slow = Measured { latency_ms: Some(80.0), memory_gb: None };
        let found = config.optimized(slow, DType::F32);
        assert!((found.config.selection_ratio - 0.21).abs() < 1e-9);
        assert_eq!((found.config.page_size, found.reasons.len()), (32, 3));
        assert!(found.reasons[0].contains("80.0 ms per token, target 50 ms"));
        let large = Measured { latency_ms: None, memory_gb: Some(2.0) };
        let found = config.optimized(large, DType::F16);
        assert_eq!((found.config.weights, found.config.max_num_seqs), (Weights::Int8, 8));
        assert_eq!(found.config.selection_ratio, config.selection_ratio);
    }

    #[test]
    fn steps_are_bounded_and_stay_valid() {
        let both = Measured { latency_ms: Some(1e9), memory_gb: Some(1e9) };
        let mut config = TinyServeConfig {
            attention: AttentionMode::Dense,
            target_memory_gb: Some(1.0),
            ..TinyServeConfig::default()
        };
        let mut steps = 0;
        loop {
            let next = config.optimized(both, DType::F32);
            next.config.check().unwrap();
            if next.reasons.is_empty() {
                break;
            }
            assert_ne!(next.config, config);
            config = next.config;
            steps += 1;
            assert!(steps < 20, "it comes to an end");
        }
        assert_eq!((config.selection_ratio, config.page_size), (LEAST_RATIO, LARGEST_PAGE));
        assert_eq!((config.weights, config.max_num_seqs), (Weights::Int4, 1));
    }
}
