//! Perplexity of a text under a model, window by window.

use std::ops::Range;

use crate::ModelError;

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

impl Perplexity {
    /// Of the natural logarithms of the probabilities that the predicted tokens got.
    #[must_use]
    pub fn of(logprobs: impl IntoIterator<Item = f32>) -> Self {
        let (mut nll, mut tokens) = (0.0, 0);
        for logprob in logprobs {
            nll -= f64::from(logprob);
            tokens += 1;
        }
        let nll_mean = nll / tokens as f64;
        Self { nll_mean, perplexity: nll_mean.exp(), tokens }
    }
}

/// A part of a text that is read at once.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PerplexityWindow {
    /// The tokens that are read.
    pub text: Range<usize>,
    /// Those of them whose prediction counts.
    pub targets: Range<usize>,
}

/// Windows of at most `window` tokens over a text of `tokens` tokens, `stride` apart, for a model
/// whose context is `limit`.
///
/// The first window predicts all but its first token; each later one starts `stride` further on
/// and predicts what no earlier one did, its own first token excepted, which has no context
/// (the sliding window of the Hugging Face perplexity guide).
///
/// # Errors
/// When there are fewer than two tokens, or the window or the stride is out of range.
pub fn perplexity_windows(
    tokens: usize,
    (window, stride): (usize, usize),
    limit: usize,
) -> Result<Vec<PerplexityWindow>, ModelError> {
    let setting = |name, found: usize, expected: String| ModelError::Setting {
        name,
        found: found.to_string(),
        expected,
    };
    if window < 2 || window > limit {
        return Err(setting("window", window, format!("2 to {limit} tokens, the context")));
    }
    if stride == 0 || stride > window {
        return Err(setting("stride", stride, format!("1 to {window} tokens, the window")));
    }
    if tokens < 2 {
        let expected = "at least 2 tokens, so that there is one to predict";
        return Err(setting("text", tokens, expected.to_owned()));
    }
    Ok(windows(tokens, window, stride))
}

fn windows(tokens: usize, window: usize, stride: usize) -> Vec<PerplexityWindow> {
    let mut windows = Vec::new();
    let (mut start, mut predicted) = (0, 0);
    while predicted < tokens {
        let end = (start + window).min(tokens);
        let targets = predicted.max(start + 1)..end;
        windows.push(PerplexityWindow { text: start..end, targets });
        predicted = end;
        start += stride;
    }
    windows
}

#[cfg(test)]
mod tests {
    use super::{PerplexityWindow, windows};

    #[test]
    fn every_token_but_the_first_is_predicted_once() {
        for (tokens, window, stride) in [(7, 10, 5), (10, 10, 10), (23, 10, 4), (21, 10, 1)] {
            let mut times = vec![0; tokens];
            for PerplexityWindow { text, targets } in windows(tokens, window, stride) {
                assert!(text.len() <= window && targets.start > text.start);
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
        let targets: usize = windows(30, 10, 10).iter().map(|window| window.targets.len()).sum();
        assert_eq!(targets, 27);
    }
}
