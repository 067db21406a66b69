//! From logits to a token: penalties, temperature, truncation, a seeded draw.

use std::collections::hash_map::RandomState;
use std::hash::BuildHasher;

use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};

use crate::ModelError;

/// How a token is drawn. Applied in this order, as Hugging Face transformers does: repetition
/// penalty, temperature, top-k, top-p, min-p.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct SamplingParams {
    /// Divides the logits; 0 takes the most likely token.
    pub temperature: f32,
    /// Keeps the `k` most likely tokens; 0 keeps all.
    pub top_k: usize,
    /// Keeps the fewest most likely tokens whose probabilities reach this sum; 1 keeps all.
    pub top_p: f32,
    /// Keeps tokens at least this share as likely as the most likely one; 0 keeps all.
    pub min_p: f32,
    /// Divides positive and multiplies negative logits of tokens seen before (CTRL, arXiv
    /// 1909.05858); 1 changes nothing.
    pub repetition_penalty: f32,
    /// The draw's seed; `None` takes one from the system.
    pub seed: Option<u64>,
}

impl Default for SamplingParams {
    fn default() -> Self {
        Self {
            temperature: 0.7,
            top_k: 0,
            top_p: 0.9,
            min_p: 0.0,
            repetition_penalty: 1.0,
            seed: None,
        }
    }
}

impl SamplingParams {
    /// Always the most likely token.
    #[must_use]
    pub fn greedy() -> Self {
        Self { temperature: 0.0, top_p: 1.0, ..Self::default() }
    }

    /// Checks every value.
    ///
    /// # Errors
    /// [`ModelError::Setting`] naming the first value that is out of its range; NaN is.
    pub fn check(&self) -> Result<(), ModelError> {
        let rules = [
            ("temperature", self.temperature, self.temperature >= 0.0, "0 or more"),
            ("top_p", self.top_p, self.top_p > 0.0 && self.top_p <= 1.0, "above 0 and at most 1"),
            ("min_p", self.min_p, (0.0..=1.0).contains(&self.min_p), "0 to 1"),
            (
                "repetition_penalty",
                self.repetition_penalty,
                self.repetition_penalty > 0.0,
                "above 0 (1 changes nothing)",
            ),
        ];
        for (name, found, holds, expected) in rules {
            if !(holds && found.is_finite()) {
                return Err(ModelError::Setting {
                    name,
                    found: found.to_string(),
                    expected: format!("a finite number, {expected}"),
                });
            }
        }
        Ok(())
    }
}

/// A drawn token.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct SampledToken {
    /// The token.
    pub id: u32,
    /// Natural logarithm of its probability under the model, before any sampling setting.
    pub logprob: f32,
}

/// Draws the tokens of one sequence.
#[derive(Debug, Clone)]
pub struct Sampler {
    params: SamplingParams,
    rng: ChaCha8Rng,
    candidates: Vec<(u32, f32)>,
    seen: Vec<u32>,
}

impl Sampler {
    /// A sampler for one sequence.
    ///
    /// # Errors
    /// As [`SamplingParams::check`].
    pub fn new(params: SamplingParams) -> Result<Self, ModelError> {
        params.check()?;
        let seed = params.seed.unwrap_or_else(|| RandomState::new().hash_one(0));
        Ok(Self {
            params,
            rng: ChaCha8Rng::seed_from_u64(seed),
            candidates: Vec::new(),
            seen: Vec::new(),
        })
    }

    /// Draws from `logits` `[vocab]`; `history` holds the prompt's and the generated tokens.
    ///
    /// # Errors
    /// [`ModelError::NotFinite`] when no logit is a number above −∞ or one is NaN: the model is
    /// broken, and any token would be made up.
    pub fn sample(&mut self, logits: &[f32], history: &[u32]) -> Result<SampledToken, ModelError> {
        let peak = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        if !peak.is_finite() || logits.iter().any(|x| x.is_nan()) {
            return Err(ModelError::NotFinite { what: "logits" });
        }
        let id = self.draw(logits, history);
        Ok(SampledToken { id, logprob: logprob(logits, id) })
    }

    fn draw(&mut self, logits: &[f32], history: &[u32]) -> u32 {
        let params = self.params;
        self.candidates.clear();
        self.candidates.extend((0..).zip(logits.iter().copied()));
        if params.repetition_penalty != 1.0 {
            self.seen.clear();
            self.seen.extend_from_slice(history);
            self.seen.sort_unstable();
            self.seen.dedup();
            for &token in &self.seen {
                if let Some((_, logit)) = self.candidates.get_mut(token as usize) {
                    *logit = if *logit > 0.0 {
                        *logit / params.repetition_penalty
                    } else {
                        *logit * params.repetition_penalty
                    };
                }
            }
        }
        if params.temperature == 0.0 {
            return most_likely(&self.candidates);
        }
        let candidates = &mut self.candidates;
        let by_likelihood =
            |a: &(u32, f32), b: &(u32, f32)| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0));
        if params.top_k > 0 && params.top_k < candidates.len() {
            candidates.select_nth_unstable_by(params.top_k - 1, by_likelihood);
            candidates.truncate(params.top_k);
        }
        let peak = candidates.iter().map(|&(_, x)| x).fold(f32::NEG_INFINITY, f32::max);
        for (_, x) in candidates.iter_mut() {
            // Scaled after the peak is taken off, so that a tiny temperature cannot overflow.
            *x = ((*x - peak) / params.temperature).exp();
        }
        if params.min_p > 0.0 {
            candidates.retain(|&(_, weight)| weight >= params.min_p);
        }
        if params.top_p < 1.0 {
            candidates.sort_unstable_by(by_likelihood);
            let total: f64 = candidates.iter().map(|&(_, weight)| f64::from(weight)).sum();
            let mut sum = 0.0;
            let kept = candidates.iter().position(|&(_, weight)| {
                sum += f64::from(weight);
                sum >= f64::from(params.top_p) * total
            });
            candidates.truncate(kept.map_or(candidates.len(), |last| last + 1));
        }
        let total: f64 = candidates.iter().map(|&(_, weight)| f64::from(weight)).sum();
        // 53 random bits: the finest uniform draw that an f64 below 1 holds.
        let uniform = (self.rng.next_u64() >> 11) as f64 / (1u64 << 53) as f64;
        let mut left = uniform * total;
        for &(id, weight) in candidates.iter() {
            left -= f64::from(weight);
            if left < 0.0 {
                return id;
            }
        }
        most_likely(candidates)
    }
}

fn most_likely(candidates: &[(u32, f32)]) -> u32 {
    let mut best = (0, f32::NEG_INFINITY);
    for &(id, value) in candidates {
        if value > best.1 {
            best = (id, value);
        }
    }
    best.0
}

fn log_sum_exp(logits: &[f32]) -> f64 {
    let peak = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let sum: f64 = logits.iter().map(|&x| f64::from(x - peak).exp()).sum();
    f64::from(peak) + sum.ln()
}

/// Natural logarithm of the probability that softmax over `logits` `[vocab]` gives `token`.
///
/// # Panics
/// When `token` is not below the vocabulary's size.
#[must_use]
pub fn logprob(logits: &[f32], token: u32) -> f32 {
    (f64::from(logits[token as usize]) - log_sum_exp(logits)) as f32
}

/// The `n` most likely tokens with the natural logarithms of their probabilities, best first.
#[must_use]
pub fn top_logprobs(logits: &[f32], n: usize) -> Vec<SampledToken> {
    let normaliser = log_sum_exp(logits);
    let mut ids: Vec<u32> = (0..).take(logits.len()).collect();
    let best_first =
        |a: &u32, b: &u32| logits[*b as usize].total_cmp(&logits[*a as usize]).then(a.cmp(b));
    if n < ids.len() {
        ids.select_nth_unstable_by(n, best_first);
        ids.truncate(n);
    }
    ids.sort_unstable_by(best_first);
    ids.into_iter()
        .map(|id| SampledToken {
            id,
            logprob: (f64::from(logits[id as usize]) - normaliser) as f32,
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const LOGITS: [f32; 5] = [1.0, 3.0, 2.0, -1.0, 0.0];

    fn counts(params: SamplingParams, draws: usize) -> [usize; 5] {
        let mut sampler = Sampler::new(SamplingParams { seed: Some(7), ..params }).unwrap();
        let mut counts = [0; 5];
        for _ in 0..draws {
            counts[sampler.sample(&LOGITS, &[]).unwrap().id as usize] += 1;
        }
        counts
    }

    #[test]
    fn greedy_takes_the_best_and_the_lower_of_equals() {
        let mut sampler = Sampler::new(SamplingParams::greedy()).unwrap();
        assert_eq!(sampler.sample(&LOGITS, &[]).unwrap().id, 1);
        assert_eq!(sampler.sample(&[0.0, 5.0, 5.0], &[]).unwrap().id, 1);
    }

    #[test]
    fn frequencies_follow_the_softmax() {
        let all = SamplingParams { temperature: 1.0, top_p: 1.0, ..SamplingParams::default() };
        let drawn = counts(all, 20_000);
        for (id, &count) in drawn.iter().enumerate() {
            let expected = f64::from(logprob(&LOGITS, id as u32)).exp();
            let found = count as f64 / 20_000.0;
            // Four standard deviations of a binomial share at its worst, √(0.25/20000).
            assert!((found - expected).abs() < 0.0142, "token {id}: {found} for {expected}");
        }
    }

    #[test]
    fn truncation_keeps_only_what_it_promises() {
        let base = SamplingParams { temperature: 1.0, top_p: 1.0, ..SamplingParams::default() };
        let top_k = counts(SamplingParams { top_k: 2, ..base }, 2000);
        assert!(top_k[0] == 0 && top_k[3] == 0 && top_k[4] == 0 && top_k[2] > 0);
        // Probabilities are .634 .233 .086 .032 .012: two reach .7, three reach .9.
        let top_p = counts(SamplingParams { top_p: 0.7, ..base }, 2000);
        assert!(top_p[1] > 0 && top_p[2] > 0 && top_p[0] == 0);
        let top_p = counts(SamplingParams { top_p: 0.9, ..base }, 2000);
        assert!(top_p[0] > 0 && top_p[4] == 0 && top_p[3] == 0);
        let min_p = counts(SamplingParams { min_p: 0.3, ..base }, 2000);
        assert!(min_p[2] > 0 && min_p[0] == 0);
    }

    #[test]
    fn repetition_penalty_pushes_seen_tokens_down_whatever_their_sign() {
        let params = SamplingParams { repetition_penalty: 2.0, ..SamplingParams::greedy() };
        let mut sampler = Sampler::new(params).unwrap();
        assert_eq!(sampler.sample(&LOGITS, &[1, 1]).unwrap().id, 2);
        assert_eq!(sampler.sample(&[-1.0, -1.5], &[0]).unwrap().id, 1);
        assert_eq!(sampler.sample(&LOGITS, &[9]).unwrap().id, 1, "tokens outside are ignored");
    }

    #[test]
    fn a_seed_repeats_and_no_seed_does_not() {
        let draw = |seed| {
            let params =
                SamplingParams { temperature: 5.0, top_p: 1.0, seed, ..Default::default() };
            let mut sampler = Sampler::new(params).unwrap();
            (0..64).map(|_| sampler.sample(&LOGITS, &[]).unwrap().id).collect::<Vec<_>>()
        };
        assert_eq!(draw(Some(3)), draw(Some(3)));
        assert_ne!(draw(Some(3)), draw(Some(4)));
        assert_ne!(draw(None), draw(None));
    }

    #[test]
    fn settings_out_of_range_are_named() {
        let bad = [
            ("temperature", SamplingParams { temperature: f32::NAN, ..Default::default() }),
            ("temperature", SamplingParams { temperature: -1.0, ..Default::default() }),
            ("temperature", SamplingParams { temperature: f32::INFINITY, ..Default::default() }),
            ("top_p", SamplingParams { top_p: 0.0, ..Default::default() }),
            ("top_p", SamplingParams { top_p: 1.5, ..Default::default() }),
            ("min_p", SamplingParams { min_p: -0.1, ..Default::default() }),
            (
                "repetition_penalty",
                SamplingParams { repetition_penalty: 0.0, ..Default::default() },
            ),
        ];
        for (name, params) in bad {
            let message = params.check().unwrap_err().to_string();
            assert!(message.starts_with(name), "{message}");
        }
    }

    #[test]
    fn tiny_temperature_is_greedy_and_broken_logits_are_refused() {
        let params = SamplingParams { temperature: 1e-30, top_p: 1.0, ..Default::default() };
        let mut sampler = Sampler::new(params).unwrap();
        assert_eq!(sampler.sample(&LOGITS, &[]).unwrap().id, 1);
        assert!(sampler.sample(&[f32::NAN, 1.0], &[]).is_err());
        assert!(sampler.sample(&[f32::NEG_INFINITY; 3], &[]).is_err());
    }

    #[test]
    fn top_logprobs_are_sorted_and_normalised() {
        let top = top_logprobs(&LOGITS, 3);
        assert_eq!(top.iter().map(|t| t.id).collect::<Vec<_>>(), [1, 2, 0]);
        let all = top_logprobs(&LOGITS, 9);
        let total: f64 = all.iter().map(|t| f64::from(t.logprob).exp()).sum();
        assert!((total - 1.0).abs() < 1e-6);
        assert_eq!(top[0].logprob.to_bits(), logprob(&LOGITS, 1).to_bits());
    }
}
