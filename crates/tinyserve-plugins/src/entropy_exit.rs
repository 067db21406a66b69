//! Ends a request once the model has become certain.

use std::fmt;
use std::str::FromStr;

use crate::{Action, HookResult, Needs, Plugin, PluginError, StepContext};

/// Whose entropy decides.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum EntropySignal {
    /// That of the newest token's attention weights, averaged over layers and heads.
    #[default]
    Attention,
    /// That of the next token's distribution: the softmax of the logits.
    NextToken,
}

impl EntropySignal {
    /// Every signal.
    pub const ALL: [Self; 2] = [Self::Attention, Self::NextToken];

    /// The name as settings spell it.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Attention => "attention",
            Self::NextToken => "next-token",
        }
    }
}

impl fmt::Display for EntropySignal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for EntropySignal {
    type Err = PluginError;

    fn from_str(text: &str) -> Result<Self, PluginError> {
        let signal = Self::ALL.into_iter().find(|signal| signal.name() == text);
        signal
            .ok_or_else(|| PluginError::invalid("entropy_signal", text, "attention or next-token"))
    }
}

/// Ends a request when an entropy stays below a threshold.
///
/// The finish reason is then `stop`, and the stop reason [`EntropyExit::REASON`].
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct EntropyExit {
    /// Whose entropy.
    pub signal: EntropySignal,
    /// Nats, above 0.
    pub threshold: f64,
    /// Tokens that are generated in any case.
    pub min_tokens: usize,
    /// Steps in a row, the current one included, whose entropy must lie below the threshold; at
    /// least 1.
    pub patience: usize,
}

impl Default for EntropyExit {
    fn default() -> Self {
        Self { signal: EntropySignal::default(), threshold: 0.5, min_tokens: 10, patience: 1 }
    }
}

impl EntropyExit {
    /// The name that it is registered by.
    pub const NAME: &'static str = "entropy_early_exit";
    /// The stop reason of the requests that it ends.
    pub const REASON: &'static str = "entropy_early_exit";

    /// The plugin, if its settings are in their ranges.
    ///
    /// # Errors
    /// [`PluginError::Invalid`] naming the first setting that is not.
    pub fn check(self) -> Result<Self, PluginError> {
        if !(self.threshold > 0.0 && self.threshold.is_finite()) {
            let expected = "a number of nats above 0";
            return Err(PluginError::invalid("entropy_threshold", self.threshold, expected));
        }
        if self.patience == 0 {
            return Err(PluginError::invalid("entropy_patience", 0, "at least 1 step"));
        }
        Ok(self)
    }
}

/// Steps in a row whose entropy lay below the threshold.
#[derive(Default)]
struct Streak(usize);

impl Plugin for EntropyExit {
    fn needs(&self) -> Needs {
        let attention_entropy = self.signal == EntropySignal::Attention;
        Needs { attention_entropy, ..Needs::default() }
    }

    fn on_step(&self, context: &mut StepContext<'_>) -> HookResult {
        let generated = context.generated().len();
        if generated + self.patience <= self.min_tokens {
            // This step is too early to be one of those in a row that end the request.
            return Ok(Action::Continue);
        }
        let entropy = match self.signal {
            EntropySignal::NextToken => softmax_entropy(context.logits()),
            EntropySignal::Attention => {
                let all = context.attention_entropy().filter(|all| !all.is_empty());
                let all = all.ok_or("the step did not tell the entropy of its attention")?;
                all.iter().map(|&x| f64::from(x)).sum::<f64>() / all.len() as f64
            }
        };
        let Streak(streak) = context.state();
        // Written so that NaN is not certainty.
        *streak = if entropy < self.threshold { *streak + 1 } else { 0 };
        let stops = *streak >= self.patience && generated >= self.min_tokens;
        Ok(if stops { Action::stop(Self::REASON) } else { Action::Continue })
    }
}

/// Entropy in nats of the softmax of `logits`.
fn softmax_entropy(logits: &[f32]) -> f64 {
    let peak = f64::from(logits.iter().copied().fold(f32::NEG_INFINITY, f32::max));
    let (mut sum, mut depth) = (0.0, 0.0);
    for &logit in logits {
        // A banned token weighs nothing, and nothing times −∞ is not a number.
        if logit > f32::NEG_INFINITY || logit.is_nan() {
            let below = f64::from(logit) - peak;
            let weight = below.exp();
            sum += weight;
            depth += weight * below;
        }
    }
    sum.ln() - depth / sum
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entropies_are_those_of_known_distributions() {
        let near = |x: f64, y: f64| (x - y).abs() < 1e-12;
        assert!(near(softmax_entropy(&[3.0; 64]), 64f64.ln()));
        assert!(near(softmax_entropy(&[0.0, f32::NEG_INFINITY, 0.0]), 2f64.ln()));
        assert!(near(softmax_entropy(&[1000.0, -1000.0]), 0.0));
        let quarter = (0.75f64 / 0.25).ln() as f32;
        let expected = -(0.75 * 0.75f64.ln() + 0.25 * 0.25f64.ln());
        assert!((softmax_entropy(&[quarter, 0.0]) - expected).abs() < 1e-7);
        assert!(softmax_entropy(&[0.0, f32::NAN]).is_nan());
    }
}
