//! Perplexity of a text under a model, window by window.

use std::ops::Range;

use tinyserve_kernels::Backend;

use crate::sampler::logprob;
use crate::{Generator, ModelError};

/// How well a model predicts a text.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Perplexity {
    /// Mean negative log likelihood per predicted token, nats.
    pub nll_mean: f64,
    /// `exp(nll_mean)`.
    pub perplexity: f64,
    /// Tokens that were predicted.
    pub tokens: usize,
}

/// Windows over `tokens` tokens and, in each, the tokens that it predicts.
///
/// The first window predicts all but its first token; each later one starts `stride` further on
/// and predicts what no earlier one did, its own first token excepted, which has no context
/// (the sliding window of the Hugging Face perplexity guide).
fn windows(tokens: usize, window: usize, stride: usize) -> Vec<(Range<usize>, Range<usize>)> {
    let mut windows = Vec::new();
    let (mut start, mut predicted) = (0, 0);
    while predicted < tokens {
        let end = (start + window).min(tokens);
        windows.push((start..end, predicted.max(start + 1)..end));
        predicted = end;
        start += stride;
    }
    windows
}

impl<B: Backend> Generator<B> {
    /// Perplexity of `tokens` in windows of at most `window` tokens that start `stride` apart.
    ///
    /// Every window is a dense prefill in chunks of `prefill_chunk`; `progress` is told tokens
    /// computed and tokens in all.
    ///
    /// # Errors
    /// When there are fewer than two tokens, the window or the stride is out of range, or the
    /// model fails.
    pub fn perplexity(
        &mut self,
        tokens: &[u32],
        (window, stride): (usize, usize),
        prefill_chunk: usize,
        mut progress: impl FnMut(usize, usize),
    ) -> Result<Perplexity, ModelError> {
        let setting = |name, found: usize, expected: String| ModelError::Setting {
            name,
            found: found.to_string(),
            expected,
        };
        let limit = self.model().config().max_positions;
        if window < 2 || window > limit {
            return Err(setting("window", window, format!("2 to {limit} tokens, the context")));
        }
        if stride == 0 || stride > window {
            return Err(setting("stride", stride, format!("1 to {window} tokens, the window")));
        }
        if tokens.len() < 2 {
            return Err(setting(
                "text",
                tokens.len(),
                "at least 2 tokens, so that there is one to predict".to_owned(),
            ));
        }
        let windows = windows(tokens.len(), window, stride);
        let total = windows.iter().map(|(range, _)| range.len()).sum();
        let (mut nll, mut predicted, mut computed) = (0.0, 0, 0);
        for (range, targets) in windows {
            // The logits after token t predict token t + 1; the window's last logits predict none.
            let text = &tokens[range.start..range.end];
            self.score(text, prefill_chunk, |row, logits| {
                computed += 1;
                progress(computed, total);
                let target = range.start + row + 1;
                if targets.contains(&target) {
                    nll -= f64::from(logprob(logits, tokens[target]));
                    predicted += 1;
                }
            })?;
        }
        let nll_mean = nll / predicted as f64;
        Ok(Perplexity { nll_mean, perplexity: nll_mean.exp(), tokens: predicted })
    }
}

#[cfg(test)]
mod tests {
    use super::windows;

    #[test]
    fn every_token_but_the_first_is_predicted_once() {
        for (tokens, window, stride) in [(7, 10, 5), (10, 10, 10), (23, 10, 4), (21, 10, 1)] {
            let mut times = vec![0; tokens];
            for (range, targets) in windows(tokens, window, stride) {
                assert!(range.len() <= window && targets.start > range.start);
                for target in targets {
                    times[target] += 1;
                }
            }
            assert_eq!(times[0], 0);
            assert!(times[1..].iter().all(|&n| n == 1), "{tokens} {window} {stride}: {times:?}");
        }
    }

    #[test]
    fn disjoint_windows_cannot_predict_their_first_tokens() {
        let targets: usize = windows(30, 10, 10).iter().map(|(_, targets)| targets.len()).sum();
        assert_eq!(targets, 27);
    }
}
