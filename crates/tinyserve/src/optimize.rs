//! Settings that fit measured latency and memory better.

use tinyserve_kernels::DType;
use tinyserve_kv::KvFormat;

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
/// Shares of the estimated attention mass are not lowered below this one.
const LEAST_TOP_P: f64 = 0.5;
/// Pages are not made larger than this.
const LARGEST_PAGE: usize = 64;
/// No pruning removes a larger share than this.
const LARGEST_PRUNING: f64 = 0.5;
/// What a budget is multiplied by.
const STEP: f64 = 0.7;

impl TinyServeConfig {
    /// One step towards `target_latency_ms` and `target_memory_gb` from what was measured with
    /// these settings, for a model whose weights are stored as `stored`.
    ///
    /// Latency above its target lowers the selection budget, makes pages larger and stores keys and
    /// values in fewer bits, down to int8; memory above its target stores keys, values and weights
    /// in fewer bits, down to int4, and lets fewer sequences run together. Where tokens are pruned,
    /// more of them are instead of codes, which no token can be taken out of. Each step is bounded:
    /// measure again before the next.
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
            config.store_less(KvCacheDtype::Int8, stored, &why, &mut reasons);
        }
        if let (Some(memory), Some(target)) = (measured.memory_gb, self.target_memory_gb)
            && memory > target
        {
            let why = format!("{memory:.3} GB in use, target {target} GB");
            // Both may ask for fewer bits; one step is enough.
            if config.kv_cache_dtype == self.kv_cache_dtype {
                config.store_less(KvCacheDtype::Int4, stored, &why, &mut reasons);
            }
            config.prune_more(&why, &mut reasons);
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
        match (self.token_budget, self.top_p_pages) {
            _ if self.attention == AttentionMode::Dense => {
                reasons.push(format!("attention dense → auto: {why}"));
                self.attention = AttentionMode::Auto;
            }
            (Some(budget), _) if budget > LEAST_BUDGET => {
                let smaller = ((budget as f64 * STEP) as usize).max(LEAST_BUDGET);
                reasons.push(format!("token_budget {budget} → {smaller}: {why}"));
                self.token_budget = Some(smaller);
            }
            (None, Some(share)) if share > LEAST_TOP_P => {
                let smaller = (share * STEP).max(LEAST_TOP_P);
                reasons.push(format!("top_p_pages {share} → {smaller:.3}: {why}"));
                self.top_p_pages = Some(smaller);
            }
            (None, None) if self.selection_ratio > LEAST_RATIO => {
                let smaller = (self.selection_ratio * STEP).max(LEAST_RATIO);
                let ratio = self.selection_ratio;
                reasons.push(format!("selection_ratio {ratio} → {smaller:.3}: {why}"));
                self.selection_ratio = smaller;
            }
            _ => {}
        }
    }

    /// Keys and values in the next fewer bits, but no fewer than `least` has.
    fn store_less(
        &mut self,
        least: KvCacheDtype,
        stored: DType,
        why: &str,
        reasons: &mut Vec<String>,
    ) {
        let found = self.kv_cache_dtype.resolve(stored);
        let fewer = match found {
            KvFormat::F32 => KvCacheDtype::F16,
            KvFormat::F16 | KvFormat::Bf16 if !self.prunes() => KvCacheDtype::Int8,
            KvFormat::Int8 if least == KvCacheDtype::Int4 => KvCacheDtype::Int4,
            _ => return,
        };
        reasons.push(format!("kv_cache_dtype {} → {}: {why}", found.name(), fewer.name()));
        self.kv_cache_dtype = fewer;
    }

    /// A larger share of the tokens removed, where any are.
    fn prune_more(&mut self, why: &str, reasons: &mut Vec<String>) {
        if self.prunes() && self.pruning_ratio < LARGEST_PRUNING {
            let ratio = self.pruning_ratio;
            let larger = (ratio / STEP).min(LARGEST_PRUNING);
            reasons.push(format!("pruning_ratio {ratio} → {larger:.3}: {why}"));
            self.pruning_ratio = larger;
        }
    }

    /// Whether tokens are taken out of the cache.
    fn prunes(&self) -> bool {
        self.enable_token_pruning && self.pruning_ratio > 0.0
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

    /// What steps under both kinds of pressure come to, and how many there were.
    fn pressed(mut config: TinyServeConfig) -> (TinyServeConfig, usize) {
        let both = Measured { latency_ms: Some(1e9), memory_gb: Some(1e9) };
        config.target_memory_gb = Some(1.0);
        for steps in 0..20 {
            let next = config.optimized(both, DType::F32);
            next.config.check().unwrap();
            if next.reasons.is_empty() {
                assert_eq!(next.config, config);
                return (config, steps);
            }
            assert_ne!(next.config, config);
            config = next.config;
        }
        panic!("it comes to no end");
    }

    #[test]
    fn steps_are_bounded_and_stay_valid() {
        let dense =
            TinyServeConfig { attention: AttentionMode::Dense, ..TinyServeConfig::default() };
        let (end, _) = pressed(dense);
        assert_eq!((end.selection_ratio, end.page_size), (LEAST_RATIO, LARGEST_PAGE));
        assert_eq!((end.weights, end.max_num_seqs), (Weights::Int4, 1));
        assert_eq!((end.kv_cache_dtype, end.enable_token_pruning), (KvCacheDtype::Int4, false));
    }

    #[test]
    fn the_budget_that_is_in_force_is_lowered() {
        let stated = TinyServeConfig::default();
        let top_p = TinyServeConfig { top_p_pages: Some(0.9), ..stated.clone() };
        let tokens = TinyServeConfig { token_budget: Some(1000), ..top_p.clone() };
        let (end, _) = pressed(top_p.clone());
        assert_eq!((end.top_p_pages, end.selection_ratio), (Some(LEAST_TOP_P), 0.3));
        let (end, _) = pressed(tokens);
        assert_eq!((end.token_budget, end.top_p_pages), (Some(LEAST_BUDGET), Some(0.9)));
    }

    #[test]
    fn whoever_prunes_prunes_more_and_stores_no_codes() {
        let config = TinyServeConfig { enable_token_pruning: true, ..TinyServeConfig::default() };
        let (end, _) = pressed(config);
        assert_eq!((end.kv_cache_dtype, end.pruning_ratio), (KvCacheDtype::F16, LARGEST_PRUNING));
    }

    #[test]
    fn bits_go_one_step_at_a_time() {
        let config = TinyServeConfig { target_memory_gb: Some(1.0), ..TinyServeConfig::default() };
        let slow = Measured { latency_ms: Some(80.0), memory_gb: None };
        let large = Measured { latency_ms: None, memory_gb: Some(2.0) };
        let both = Measured { latency_ms: Some(80.0), memory_gb: Some(2.0) };
        let after = |from: KvCacheDtype, measured| {
            let config = TinyServeConfig { kv_cache_dtype: from, ..config.clone() };
            config.optimized(measured, DType::F32).config.kv_cache_dtype
        };
        use KvCacheDtype::{Auto, Bf16, F16, Int4, Int8};
        for (from, faster, smaller) in
            [(Auto, F16, F16), (F16, Int8, Int8), (Bf16, Int8, Int8), (Int8, Int8, Int4)]
        {
            assert_eq!((after(from, slow), after(from, large)), (faster, smaller), "{from:?}");
            assert_eq!(after(from, both), smaller, "{from:?}");
        }
        assert_eq!((after(Int4, slow), after(Int4, large)), (Int4, Int4));
    }
}
