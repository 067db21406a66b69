//! Running text: how well it is predicted, and how far the predictions are from dense ones.

use serde::Serialize;
use tinyserve_kernels::{AttendStats, Attention, Backend};
use tinyserve_kv::PageTable;
use tinyserve_model::LogitRows;

use crate::needle::best;
use crate::{BudgetFields, Control, LabError, Probe, Trial};

/// What to read, and what to predict of it.
#[derive(Debug, Clone, Copy)]
pub struct TextTest {
    /// Tokens of a window.
    pub window: usize,
    /// First tokens of a window, which are read densely; the others are fed one by one.
    pub prefix: usize,
    /// Windows, one after the other; the text may have fewer.
    pub windows: usize,
}

/// How one trial predicted.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct TextRow {
    /// How keys and values were stored.
    pub kv_cache_dtype: &'static str,
    /// The method's name.
    pub policy: &'static str,
    /// Its budget.
    #[serde(flatten)]
    pub budget: BudgetFields,
    /// Tokens of a window.
    pub window: usize,
    /// First tokens of a window, which were read densely.
    pub prefix: usize,
    /// Mean negative log likelihood per predicted token, nats.
    pub nll_mean: f64,
    /// `exp(nll_mean)`.
    pub perplexity: f64,
    /// Mean divergence of the next-token distribution from the dense one, `KL(dense ‖ this)`, nats.
    pub kl_mean: f64,
    /// The largest divergence.
    pub kl_max: f64,
    /// Share of the steps whose most likely token is the dense one's.
    pub top1_agreement: f64,
    /// Predicted tokens.
    pub tokens: usize,
    /// KV bytes read over those of dense attention.
    pub bytes_read_ratio: Option<f64>,
    /// Attention mass of the pages that were read, measured on every 13th step that selected.
    pub recall: Option<f64>,
}

/// Steps between two measurements of recall; no multiple of the steps that a selection is likely to
/// be kept for.
const RECALL_INTERVAL: usize = 13;

#[derive(Default)]
struct Sums {
    nll: f64,
    kl: f64,
    kl_max: f64,
    agreed: usize,
    tokens: usize,
    stats: AttendStats,
}

/// Feeds the end of each window token by token through each trial's selection; stops early when
/// `control` says no, with the windows that all trials have read until then.
///
/// The dense predictions that trials diverge from are those of `reference`, the same model with
/// keys and values stored in another way, or without one those of `probe` itself.
///
/// # Errors
/// When a window does not fit the model or the text, or the model fails.
pub fn text<B: Backend>(
    (probe, mut reference): (&mut Probe<B>, Option<&mut Probe<B>>),
    tokens: &[u32],
    test: &TextTest,
    trials: &[Trial],
    control: &mut Control<'_>,
) -> Result<Vec<TextRow>, LabError> {
    let limit = probe.model().config().max_positions;
    let setting = |what, found: usize, expected| {
        Err(LabError::Setting { what, found: found.to_string(), expected })
    };
    if test.window < 3 || test.window > limit {
        return setting("window", test.window, format!("3 to {limit} tokens, the model's context"));
    }
    if test.prefix == 0 || test.prefix + 2 > test.window {
        let most = test.window - 2;
        return setting(
            "prefix",
            test.prefix,
            format!("1 to {most}: a window has to predict, too"),
        );
    }
    if tokens.len() < test.window {
        let expected = format!("at least {} tokens, one window", test.window);
        return setting("text", tokens.len(), expected);
    }
    let windows = (tokens.len() / test.window).min(test.windows.max(1));
    let mut sums: Vec<_> = trials.iter().map(|_| Sums::default()).collect();
    let (mut done, all) = (0, windows * (trials.len() + 1));
    'windows: for window in tokens.chunks_exact(test.window).take(windows) {
        let (prefix, rest) = window.split_at(test.prefix);
        let Some((table, prompt)) = probe.prefill(prefix, control)? else { break };
        let mut dense = Vec::new();
        let mut on_step = |_: usize, logits: &[f32], _: u32| dense.push(log_softmax(logits));
        let read = match &mut reference {
            None => feed(probe, &table, rest, Attention::Dense, &mut on_step),
            Some(reference) => match reference.prefill(prefix, control) {
                Ok(Some((table, _))) => {
                    let read = feed(reference, &table, rest, Attention::Dense, &mut on_step);
                    reference.release(table);
                    read
                }
                other => {
                    probe.release(table);
                    other?;
                    break;
                }
            },
        };
        let mut of_window = Vec::new();
        let mut result = read.map(|_| ());
        for trial in trials {
            done += 1;
            if result.is_err() || !control("windows", done, all) {
                probe.release(table);
                result?;
                break 'windows;
            }
            let chooser = trial.start(&prompt);
            let mut sums = Sums::default();
            let read = feed(probe, &table, rest, chooser.attention(), &mut |step, logits, next| {
                sums.add(&dense[step], logits, next);
            });
            result = read.map(|stats| sums.stats = stats);
            of_window.push(sums);
        }
        done += 1;
        probe.release(table);
        result?;
        for (sums, of_window) in sums.iter_mut().zip(&of_window) {
            sums.merge(of_window);
        }
    }
    let stored = probe.cache().layout().shape().format.name();
    let rows = trials.iter().zip(&sums).map(|(trial, sums)| sums.row(stored, trial, test));
    Ok(rows.collect())
}

/// Feeds all of `rest` but its last token to a fork of `table`; `on_step` gets the step's number,
/// its logits and the token that follows.
fn feed<B: Backend>(
    probe: &mut Probe<B>,
    table: &PageTable,
    rest: &[u32],
    attention: Attention<'_>,
    on_step: &mut dyn FnMut(usize, &[f32], u32),
) -> Result<AttendStats, LabError> {
    let mut fork = probe.fork(table);
    let mut stats = AttendStats::default();
    let mut result = Ok(());
    for (step, pair) in rest.windows(2).enumerate() {
        let measure = step.is_multiple_of(RECALL_INTERVAL);
        match probe.step(&mut fork, &pair[..1], attention, LogitRows::Last, measure) {
            Ok(output) => {
                stats.add(output.stats());
                on_step(step, output.logits(0).last().unwrap_or(&[]), pair[1]);
            }
            Err(error) => {
                result = Err(error);
                break;
            }
        }
    }
    probe.release(fork);
    result.map(|()| stats)
}

impl Sums {
    fn add(&mut self, dense: &[f32], logits: &[f32], next: u32) {
        let ours = log_softmax(logits);
        let terms = dense.iter().zip(&ours);
        let kl: f64 = terms
            // A token of no probability adds nothing, however far away it is.
            .filter(|(p, _)| p.is_finite())
            .map(|(&p, &q)| f64::from(p).exp() * (f64::from(p) - f64::from(q)))
            .sum();
        // Rounding may leave a little less than nothing.
        let kl = kl.max(0.0);
        self.nll -= f64::from(ours[next as usize]);
        self.kl += kl;
        self.kl_max = self.kl_max.max(kl);
        self.agreed += usize::from(best(dense) == best(logits));
        self.tokens += 1;
    }

    fn merge(&mut self, other: &Self) {
        self.nll += other.nll;
        self.kl += other.kl;
        self.kl_max = self.kl_max.max(other.kl_max);
        self.agreed += other.agreed;
        self.tokens += other.tokens;
        self.stats.add(&other.stats);
    }

    fn row(&self, kv_cache_dtype: &'static str, trial: &Trial, test: &TextTest) -> TextRow {
        let tokens = self.tokens.max(1) as f64;
        let nll_mean = self.nll / tokens;
        TextRow {
            kv_cache_dtype,
            policy: trial.name(),
            budget: trial.budget(),
            window: test.window,
            prefix: test.prefix,
            nll_mean,
            perplexity: nll_mean.exp(),
            kl_mean: self.kl / tokens,
            kl_max: self.kl_max,
            top1_agreement: self.agreed as f64 / tokens,
            tokens: self.tokens,
            bytes_read_ratio: self.stats.bytes_ratio(),
            recall: self.stats.recall(),
        }
    }
}

/// Logarithms of the probabilities.
fn log_softmax(logits: &[f32]) -> Vec<f32> {
    let peak = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let sum: f64 = logits.iter().map(|&x| f64::from(x - peak).exp()).sum();
    let total = f64::from(peak) + sum.ln();
    logits.iter().map(|&x| (f64::from(x) - total) as f32).collect()
}
