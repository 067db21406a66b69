//! Settings, changed step by step towards what was asked for, with the reasons.

use tinyserve_sched::{Knob, Measured, Suggestion, Turn};

use crate::{KvCacheDtype, TinyServeConfig, TinyServeError};

/// A share of the pages below which selection is not pushed.
const LEAST_RATIO: f64 = 0.1;
/// What a share is multiplied by, or divided.
const RATIO_STEP: f64 = 0.75;
/// Largest page: beyond it, selection has little to choose from.
const MOST_PAGE_SIZE: usize = 64;
/// Most sequences that run together.
const MOST_SEQS: usize = 256;
/// Fewest tokens of a step.
const LEAST_BATCHED_TOKENS: usize = 64;

/// One setting that was changed.
#[derive(Debug, Clone, PartialEq)]
pub struct Change {
    /// What was measured, and what the change is expected to do.
    pub reason: Suggestion,
    /// The setting before.
    pub from: String,
    /// The setting afterwards.
    pub to: String,
}

/// Changed settings that passed the checks.
#[derive(Debug, Clone, PartialEq)]
pub struct Optimised {
    /// The settings.
    pub config: TinyServeConfig,
    /// What was changed, and why.
    pub changes: Vec<Change>,
}

impl TinyServeConfig {
    /// A copy, changed by one bounded step for each suggestion that `measured` gives rise to; a
    /// setting that is at its bound stays.
    ///
    /// # Errors
    /// When the changed settings are out of range together.
    pub fn optimised(&self, measured: &Measured) -> Result<Optimised, TinyServeError> {
        let mut config = self.clone();
        let mut changes = Vec::new();
        for reason in measured.suggestions(&self.targets()) {
            let turned = config.turn(reason.knob, reason.turn);
            if let Some((from, to)) = turned {
                changes.push(Change { reason, from, to });
            }
        }
        config.check()?;
        Ok(Optimised { config, changes })
    }

    /// Turns a setting by one step; tells what it was and is, or `None` at its bound.
    fn turn(&mut self, knob: Knob, turn: Turn) -> Option<(String, String)> {
        match (knob, turn) {
            (Knob::SelectionRatio, _) => self.turn_budget(turn),
            (Knob::KvCacheDtype, Turn::Lower) => {
                let to = match self.kv_cache_dtype {
                    KvCacheDtype::Auto | KvCacheDtype::F32 => KvCacheDtype::F16,
                    // Codes of a page cannot be taken apart to prune it.
                    _ if self.enable_token_pruning || self.keeps_codes() => return None,
                    KvCacheDtype::F16 | KvCacheDtype::Bf16 => KvCacheDtype::Int8,
                    _ => return None,
                };
                let from = std::mem::replace(&mut self.kv_cache_dtype, to);
                Some((name(&from), name(&to)))
            }
            (Knob::PageSize, Turn::Raise) => {
                let to = (2 * self.page_size).min(MOST_PAGE_SIZE.max(self.page_size));
                step(&mut self.page_size, to)
            }
            (Knob::EnableTokenPruning, Turn::Raise) => {
                let pointless = self.pruning_ratio == 0.0 || self.keeps_codes();
                (!pointless).then(|| step(&mut self.enable_token_pruning, true)).flatten()
            }
            (Knob::MaxNumSeqs, Turn::Raise) => {
                let to = (2 * self.max_num_seqs).min(MOST_SEQS.max(self.max_num_seqs));
                step(&mut self.max_num_seqs, to)
            }
            (Knob::MaxNumSeqs, Turn::Lower) => {
                let to = (self.max_num_seqs / 2).max(1);
                step(&mut self.max_num_seqs, to)
            }
            (Knob::MaxNumBatchedTokens, Turn::Lower) => {
                let now = self.scheduling().max_num_batched_tokens;
                let least = LEAST_BATCHED_TOKENS.max(self.max_num_seqs).min(now);
                let to = (now / 2).max(least);
                let changed = step(&mut { now }, to);
                if changed.is_some() {
                    self.max_num_batched_tokens = Some(to);
                    self.attention_chunk_size = self.attention_chunk_size.min(to);
                }
                changed
            }
            (Knob::KvCacheDtype | Knob::EnableTokenPruning, _)
            | (Knob::PageSize, Turn::Lower)
            | (Knob::MaxNumBatchedTokens, Turn::Raise) => None,
        }
    }

    /// Turns the budget of selection, in whichever way it is stated.
    fn turn_budget(&mut self, turn: Turn) -> Option<(String, String)> {
        let turned = |share: f64| match turn {
            Turn::Lower => (share * RATIO_STEP).max(LEAST_RATIO.min(share)),
            Turn::Raise => (share / RATIO_STEP).min(1.0),
        };
        if let Some(tokens) = &mut self.token_budget {
            let to = match turn {
                Turn::Lower => (*tokens * 3 / 4).max(self.page_size.min(*tokens)),
                Turn::Raise => *tokens * 4 / 3,
            };
            return step(tokens, to);
        }
        if let Some(share) = &mut self.top_p_pages {
            let to = turned(*share);
            return step(share, to);
        }
        let to = turned(self.selection_ratio);
        step(&mut self.selection_ratio, to)
    }
}

fn step<T: PartialEq + ToString>(setting: &mut T, to: T) -> Option<(String, String)> {
    if *setting == to {
        return None;
    }
    let (before, after) = (setting.to_string(), to.to_string());
    *setting = to;
    Some((before, after))
}

/// The name as configuration files spell it.
fn name(dtype: &KvCacheDtype) -> String {
    let value = serde_json::to_value(dtype).unwrap_or_default();
    value.as_str().unwrap_or_default().to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn changed(config: &TinyServeConfig, measured: Measured) -> Vec<(Knob, String, String)> {
        let optimised = config.optimised(&measured).unwrap();
        optimised.changes.into_iter().map(|it| (it.reason.knob, it.from, it.to)).collect()
    }

    #[test]
    fn latency_and_memory_turn_settings_towards_their_targets() {
        let config = TinyServeConfig {
            target_latency_ms: Some(50.0),
            target_memory_gb: Some(4.0),
            ..TinyServeConfig::default()
        };
        let slow = Measured { latency_ms: Some(90.0), ..Measured::default() };
        let texts = |all: &[(Knob, &str, &str)]| -> Vec<(Knob, String, String)> {
            all.iter().map(|(knob, a, b)| (*knob, (*a).to_owned(), (*b).to_owned())).collect()
        };
        let expected = [
            (Knob::SelectionRatio, "0.3", "0.22499999999999998"),
            (Knob::KvCacheDtype, "auto", "f16"),
            (Knob::PageSize, "16", "32"),
        ];
        assert_eq!(changed(&config, slow), texts(&expected));
        let big = Measured { memory_gb: Some(9.0), ..Measured::default() };
        let expected =
            [(Knob::KvCacheDtype, "auto", "f16"), (Knob::EnableTokenPruning, "false", "true")];
        assert_eq!(changed(&config, big), texts(&expected));
        assert_eq!(changed(&config, Measured::default()), []);
        // Nothing is asked for where no target is set.
        assert_eq!(changed(&TinyServeConfig::default(), slow), []);
    }

    #[test]
    fn steps_end_at_their_bounds() {
        let mut config =
            TinyServeConfig { target_latency_ms: Some(1.0), ..TinyServeConfig::default() };
        let slow = Measured { latency_ms: Some(90.0), ..Measured::default() };
        for _ in 0..20 {
            config = config.optimised(&slow).unwrap().config;
        }
        assert_eq!((config.page_size, config.selection_ratio), (64, LEAST_RATIO));
        assert_eq!(changed(&config, slow), []);
        let blind = Measured { recall: Some(0.5), ..Measured::default() };
        for _ in 0..20 {
            config = config.optimised(&blind).unwrap().config;
        }
        assert_eq!(config.selection_ratio, 1.0);
        let budget = TinyServeConfig { token_budget: Some(100), ..config };
        assert_eq!(changed(&budget, blind)[0].2, "133");
        let uneven = Measured { itl_ms: Some((1.0, 90.0)), ..Measured::default() };
        let mut config = TinyServeConfig::default();
        for _ in 0..20 {
            config = config.optimised(&uneven).unwrap().config;
        }
        assert_eq!(config.max_num_batched_tokens, Some(64));
    }
}
