//! From logits to a token: penalties, temperature, truncation, a seeded draw.

use std::cmp::Ordering;
use std::collections::hash_map::RandomState;
use std::hash::BuildHasher;

use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};
use tinyserve_kernels::{MOST_TOP_LOGITS, TopRow, log_sum_exp};

use crate::ModelError;

/// How a token is drawn. Applied in this order: repetition penalty, frequency and presence penalty,
/// logit bias, top-k, temperature, min-p, top-p.
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
    /// Taken off the logit of each generated token (OpenAI's `presence_penalty`); 0 changes nothing.
    pub presence_penalty: f32,
    /// Taken off the logit of each generated token as often as it was generated (OpenAI's
    /// `frequency_penalty`); 0 changes nothing.
    pub frequency_penalty: f32,
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
            presence_penalty: 0.0,
            frequency_penalty: 0.0,
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
            (
                "presence_penalty",
                self.presence_penalty,
                (-2.0..=2.0).contains(&self.presence_penalty),
                "-2 to 2",
            ),
            (
                "frequency_penalty",
                self.frequency_penalty,
                (-2.0..=2.0).contains(&self.frequency_penalty),
                "-2 to 2",
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

/// Most likely tokens that top-p puts in order first.
const TOP_P_SORTED: usize = 256;

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
    bias: Vec<(u32, f32)>,
    candidates: Vec<(u32, f32)>,
    seen: Vec<u32>,
}

/// What a draw looks back at.
#[derive(Debug, Clone, Copy, Default)]
pub struct SampleContext<'a> {
    /// Tokens of the prompt.
    pub prompt: &'a [u32],
    /// Tokens that were generated so far.
    pub generated: &'a [u32],
    /// Tokens that must not be drawn now.
    pub banned: &'a [u32],
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
            bias: Vec::new(),
            candidates: Vec::new(),
            seen: Vec::new(),
        })
    }

    /// The same sampler, which adds to the logits of some tokens (OpenAI's `logit_bias`).
    ///
    /// # Errors
    /// [`ModelError::Setting`] when a bias is not a number from -100 to 100.
    pub fn with_bias(mut self, bias: Vec<(u32, f32)>) -> Result<Self, ModelError> {
        if let Some((_, wrong)) = bias.iter().find(|(_, x)| !(-100.0..=100.0).contains(x)) {
            return Err(ModelError::Setting {
                name: "logit_bias",
                found: wrong.to_string(),
                expected: "numbers from -100 to 100".to_owned(),
            });
        }
        self.bias = bias;
        Ok(self)
    }

    /// Draws from `logits` `[vocab]`; `history` holds the tokens before, for the repetition penalty.
    ///
    /// # Errors
    /// As [`Self::sample_after`].
    pub fn sample(&mut self, logits: &[f32], history: &[u32]) -> Result<SampledToken, ModelError> {
        self.sample_after(logits, SampleContext { prompt: history, ..SampleContext::default() })
    }

    /// Draws from `logits` `[vocab]`, the next token after `context`.
    ///
    /// # Errors
    /// [`ModelError::NotFinite`] when no logit is a number above −∞ or one is NaN: the model is
    /// broken, and any token would be made up.
    pub fn sample_after(
        &mut self,
        logits: &[f32],
        context: SampleContext<'_>,
    ) -> Result<SampledToken, ModelError> {
        let peak = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        if !peak.is_finite() || logits.iter().any(|x| x.is_nan()) {
            return Err(ModelError::NotFinite { what: "logits" });
        }
        let id = self.draw(logits, context);
        Ok(SampledToken { id, logprob: logprob(logits, id) })
    }

    /// How many of the likeliest tokens decide the next draw, whatever the other logits are; `None`
    /// where they matter, too.
    #[must_use]
    pub fn decided_by(&self) -> Option<usize> {
        let params = &self.params;
        let penalty = params.repetition_penalty != 1.0
            || params.presence_penalty != 0.0
            || params.frequency_penalty != 0.0;
        let k = if params.temperature == 0.0 { 1 } else { params.top_k };
        let few = (1..=MOST_TOP_LOGITS).contains(&k);
        (few && !penalty && self.bias.is_empty()).then_some(k)
    }

    /// Draws what [`Self::sample_after`] would draw from all logits, out of the likeliest tokens: as
    /// many as [`Self::decided_by`] says, or more.
    ///
    /// # Errors
    /// As [`Self::sample_after`].
    pub fn sample_top(&mut self, top: TopRow<'_>) -> Result<SampledToken, ModelError> {
        let Some((&(likeliest, _), k)) = top.tokens.first().zip(self.decided_by()) else {
            return Err(ModelError::Setting {
                name: "likeliest tokens",
                found: format!("{} for these sampling settings", top.tokens.len()),
                expected: "all logits, or as many tokens as decide the draw".to_owned(),
            });
        };
        if top.log_sum_exp.is_nan() {
            return Err(ModelError::NotFinite { what: "logits" });
        }
        let mut id = likeliest;
        if self.params.temperature > 0.0 {
            self.candidates.clear();
            self.candidates.extend_from_slice(&top.tokens[..k.min(top.tokens.len())]);
            id = self.draw_candidate();
        }
        let logit = top.tokens.iter().find(|token| token.0 == id).map_or(f32::NAN, |token| token.1);
        Ok(SampledToken { id, logprob: (f64::from(logit) - top.log_sum_exp) as f32 })
    }

    /// Changes the candidates' logits by what was said before and by what the request asks for.
    fn adjust(&mut self, context: SampleContext<'_>) {
        let params = self.params;
        let (candidates, seen) = (&mut self.candidates, &mut self.seen);
        if params.repetition_penalty != 1.0 {
            seen.clear();
            seen.extend_from_slice(context.prompt);
            seen.extend_from_slice(context.generated);
            seen.sort_unstable();
            seen.dedup();
            for &token in seen.iter() {
                if let Some((_, logit)) = candidates.get_mut(token as usize) {
                    *logit = if *logit > 0.0 {
                        *logit / params.repetition_penalty
                    } else {
                        *logit * params.repetition_penalty
                    };
                }
            }
        }
        if params.presence_penalty != 0.0 || params.frequency_penalty != 0.0 {
            seen.clear();
            seen.extend_from_slice(context.generated);
            seen.sort_unstable();
            for same in seen.chunk_by(|a, b| a == b) {
                if let Some((_, logit)) = candidates.get_mut(same[0] as usize) {
                    let often = same.len() as f32;
                    *logit -= params.presence_penalty + params.frequency_penalty * often;
                }
            }
        }
        for &(token, bias) in &self.bias {
            if let Some((_, logit)) = candidates.get_mut(token as usize) {
                *logit += bias;
            }
        }
        for &token in context.banned {
            if let Some((_, logit)) = candidates.get_mut(token as usize) {
                *logit = f32::NEG_INFINITY;
            }
        }
    }

    fn draw(&mut self, logits: &[f32], context: SampleContext<'_>) -> u32 {
        let params = self.params;
        self.candidates.clear();
        self.candidates.extend((0..).zip(logits.iter().copied()));
        self.adjust(context);
        if params.temperature == 0.0 {
            return most_likely(&self.candidates);
        }
        let candidates = &mut self.candidates;
        if params.top_k > 0 {
            if params.top_k < candidates.len() {
                candidates.select_nth_unstable_by(params.top_k - 1, by_likelihood);
                candidates.truncate(params.top_k);
            }
            // In the order in which a device lists them: a seed draws the same.
            candidates.sort_unstable_by(by_likelihood);
        }
        self.draw_candidate()
    }

    /// Draws one of the candidates that top-k leaves.
    fn draw_candidate(&mut self) -> u32 {
        let params = self.params;
        let candidates = &mut self.candidates;
        let peak = candidates.iter().map(|&(_, x)| x).fold(f32::NEG_INFINITY, f32::max);
        for (_, x) in candidates.iter_mut() {
            // Scaled after the peak is taken off, so that a tiny temperature cannot overflow.
            *x = ((*x - peak) / params.temperature).exp();
        }
        if params.min_p > 0.0 {
            candidates.retain(|&(_, weight)| weight >= params.min_p);
        }
        if params.top_p < 1.0 {
            let total: f64 = candidates.iter().map(|&(_, weight)| f64::from(weight)).sum();
            // Few tokens hold most of the mass: the rest needs no order.
            let mut sorted = candidates.len().min(TOP_P_SORTED);
            loop {
                if sorted < candidates.len() {
                    candidates.select_nth_unstable_by(sorted - 1, by_likelihood);
                }
                candidates[..sorted].sort_unstable_by(by_likelihood);
                let mut sum = 0.0;
                let reached = candidates[..sorted].iter().position(|&(_, weight)| {
                    sum += f64::from(weight);
                    sum >= f64::from(params.top_p) * total
                });
                if let Some(last) = reached {
                    candidates.truncate(last + 1);
                }
                if reached.is_some() || sorted == candidates.len() {
                    break;
                }
                sorted = (8 * sorted).min(candidates.len());
            }
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

/// The likelier first, and of equals the lower; -0 and 0 are equal, as they are to a device.
fn by_likelihood(a: &(u32, f32), b: &(u32, f32)) -> Ordering {
    b.1.partial_cmp(&a.1).unwrap_or(Ordering::Equal).then(a.0.cmp(&b.0))
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
    let token = |id: u32| (id, logits[id as usize]);
    let best_first = |a: &u32, b: &u32| by_likelihood(&token(*a), &token(*b));
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

/// As [`top_logprobs`], of the likeliest tokens that a device found: at most as many as it found.
#[must_use]
pub fn top_logprobs_of(top: TopRow<'_>, n: usize) -> Vec<SampledToken> {
    let token = |&(id, logit): &(u32, f32)| SampledToken {
        id,
        logprob: (f64::from(logit) - top.log_sum_exp) as f32,
    };
    top.tokens.iter().take(n).map(token).collect()
}

#[cfg(test)]
mod tests {
    use tinyserve_kernels::TopLogits;

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
    fn the_likeliest_tokens_decide_what_all_logits_would() {
        let logits: Vec<f32> = (0..300).map(|i| ((i * 37) % 23) as f32 / 4.0 - 2.0).collect();
        let mut top = TopLogits::default();
        top.begin(64, logits.len());
        top.push_row(&logits);
        let base =
            SamplingParams { temperature: 0.9, top_p: 1.0, seed: Some(5), ..Default::default() };
        for params in [
            SamplingParams::greedy(),
            SamplingParams { top_k: 1, ..base },
            SamplingParams { top_k: 40, ..base },
            SamplingParams { top_k: 64, top_p: 0.8, min_p: 0.05, ..base },
        ] {
            let mut from_all = Sampler::new(params).unwrap();
            let mut from_top = from_all.clone();
            assert!(from_top.decided_by().is_some_and(|k| k <= 64), "{params:?}");
            for _ in 0..200 {
                let expected = from_all.sample(&logits, &[]).unwrap();
                assert_eq!(from_top.sample_top(top.row(0)).unwrap(), expected, "{params:?}");
            }
        }
        assert_eq!(top_logprobs_of(top.row(0), 5), top_logprobs(&logits, 5));
        for params in [
            base,
            SamplingParams { top_k: MOST_TOP_LOGITS + 1, ..base },
            SamplingParams { top_k: 4, repetition_penalty: 1.1, ..base },
            SamplingParams { presence_penalty: 0.1, ..SamplingParams::greedy() },
        ] {
            let mut sampler = Sampler::new(params).unwrap();
            assert_eq!(sampler.decided_by(), None, "{params:?}");
            assert!(sampler.sample_top(top.row(0)).is_err(), "{params:?}");
        }
        let mut greedy = Sampler::new(SamplingParams::greedy()).unwrap();
        top.begin(1, 2);
        top.push_row(&[f32::NAN, 1.0]);
        assert!(greedy.sample_top(top.row(0)).is_err());
        let biased = greedy.with_bias(vec![(1, 2.0)]).unwrap();
        assert_eq!(biased.decided_by(), None);
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
    fn presence_counts_a_generated_token_once_and_frequency_each_time() {
        let draw = |params: SamplingParams, context| {
            Sampler::new(params).unwrap().sample_after(&LOGITS, context).unwrap().id
        };
        let [once, twice] = [&[1][..], &[1, 1]]
            .map(|generated| SampleContext { generated, ..SampleContext::default() });
        let presence = SamplingParams { presence_penalty: 0.9, ..SamplingParams::greedy() };
        assert_eq!((draw(presence, once), draw(presence, twice)), (1, 1));
        let frequency = SamplingParams { frequency_penalty: 0.9, ..SamplingParams::greedy() };
        assert_eq!((draw(frequency, once), draw(frequency, twice)), (1, 2));
        let prompt = SampleContext { prompt: &[1, 1], ..SampleContext::default() };
        assert_eq!(draw(frequency, prompt), 1, "the prompt is not held against a token");
    }

    #[test]
    fn bias_and_bans_decide_what_is_drawn_and_leave_the_logprob_alone() {
        let greedy = Sampler::new(SamplingParams::greedy()).unwrap();
        let mut biased = greedy.clone().with_bias(vec![(3, 100.0), (9, 1.0)]).unwrap();
        let token = biased.sample(&LOGITS, &[]).unwrap();
        assert_eq!((token.id, token.logprob), (3, logprob(&LOGITS, 3)));
        let banned = SampleContext { banned: &[1, 2], ..SampleContext::default() };
        assert_eq!(greedy.clone().sample_after(&LOGITS, banned).unwrap().id, 0);
        assert!(greedy.with_bias(vec![(0, f32::NAN)]).is_err());
    }

    #[test]
    fn top_p_keeps_as_many_of_a_flat_distribution_as_it_takes() {
        let logits = vec![0.0; 5000];
        let params =
            SamplingParams { temperature: 1.0, top_p: 0.5, seed: Some(1), ..Default::default() };
        let mut sampler = Sampler::new(params).unwrap();
        let drawn: Vec<_> = (0..500).map(|_| sampler.sample(&logits, &[]).unwrap().id).collect();
        assert!(drawn.iter().all(|&id| id < 2500), "the lower of equals come first");
        assert!(drawn.iter().any(|&id| id > 2000), "half of 5000 are kept, not fewer");
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
            ("presence_penalty", SamplingParams { presence_penalty: 2.5, ..Default::default() }),
            (
                "frequency_penalty",
                SamplingParams { frequency_penalty: f32::NAN, ..Default::default() },
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
