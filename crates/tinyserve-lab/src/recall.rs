//! Recall: how much of the dense attention the pages that are read hold.

use serde::Serialize;
use tinyserve_kernels::{Attention, Backend};
use tinyserve_model::LogitRows;

use crate::{BudgetFields, Control, LabError, Probe, Seen, Trial, Watch};

/// What to read, and how many steps to watch.
#[derive(Debug, Clone, Copy)]
pub struct RecallTest {
    /// Tokens that are read densely before.
    pub context: usize,
    /// Steps that are watched.
    pub steps: usize,
}

/// What the pages of one KV head of one layer held, over all steps that were watched.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct RecallRow {
    /// The method's name.
    pub policy: &'static str,
    /// Its budget.
    #[serde(flatten)]
    pub budget: BudgetFields,
    /// Layer of the model.
    pub layer: usize,
    /// KV head of the layer.
    pub kv_head: usize,
    /// Mean share of the dense attention that the pages hold, over steps and query heads.
    pub recall: f64,
    /// The least of them.
    pub recall_min: f64,
    /// Mean share of the chosen pages that are among those with the most attention.
    pub top_pages: f64,
    /// Mean share of the chosen pages that the step before had chosen, too.
    pub reuse: Option<f64>,
    /// Mean entropy of the dense attention, nats.
    pub entropy: f64,
    /// Pages read, as a share of all.
    pub pages_read_ratio: f64,
    /// Steps that were watched.
    pub steps: usize,
}

/// Reads `context` tokens densely and feeds `steps` more through each trial, watched; stops early
/// when `control` says no, with the trials that are done.
///
/// # Errors
/// When the text or the model's context is too short, or the model fails.
pub fn recall<B: Backend>(
    probe: &mut Probe<B>,
    tokens: &[u32],
    test: &RecallTest,
    trials: &[Trial],
    control: &mut Control<'_>,
) -> Result<Vec<RecallRow>, LabError> {
    let limit = probe.model().config().max_positions.min(tokens.len());
    let setting = |what, found: usize, expected: String| {
        Err(LabError::Setting { what, found: found.to_string(), expected })
    };
    if test.steps == 0 || test.steps >= limit {
        let expected = format!("1 to {}: text and context have {limit} tokens", limit.max(2) - 1);
        return setting("steps", test.steps, expected);
    }
    if test.context == 0 || test.context > limit - test.steps {
        let expected = format!("1 to {}: text and context have {limit} tokens", limit - test.steps);
        return setting("context", test.context, expected);
    }
    let (read, rest) = tokens.split_at(test.context);
    let Some((table, prompt)) = probe.prefill(read, control)? else { return Ok(Vec::new()) };
    let mut rows = Vec::new();
    for (number, trial) in trials.iter().enumerate() {
        let chooser = trial.start(&prompt);
        let watch = Watch::new(chooser.selector());
        let mut fork = probe.fork(&table);
        let mut seen = Vec::new();
        let mut complete = true;
        for (step, token) in rest[..test.steps].iter().enumerate() {
            let attention = Attention::Custom(&watch);
            let stepped = probe.step(&mut fork, &[*token], attention, LogitRows::None, false);
            if let Err(error) = stepped {
                probe.release(fork);
                probe.release(table);
                return Err(error);
            }
            seen.extend(watch.take());
            let done = number * test.steps + step + 1;
            if !control("steps", done, trials.len() * test.steps) {
                complete = false;
                break;
            }
        }
        probe.release(fork);
        if !complete {
            break;
        }
        rows.extend(by_head(trial, seen));
    }
    probe.release(table);
    Ok(rows)
}

fn by_head(trial: &Trial, mut seen: Vec<Seen>) -> Vec<RecallRow> {
    // Stable: the steps of a head stay in order.
    seen.sort_by_key(|seen| (seen.layer, seen.kv_head));
    let heads = seen.chunk_by(|a, b| (a.layer, a.kv_head) == (b.layer, b.kv_head));
    heads.map(|steps| row(trial, steps)).collect()
}

fn row(trial: &Trial, steps: &[Seen]) -> RecallRow {
    let mean = |values: &mut dyn Iterator<Item = f64>| {
        let (sum, n) = values.fold((0.0, 0.0), |(sum, n), x| (sum + x, n + 1.0));
        (n > 0.0).then(|| sum / n)
    };
    let masses = || steps.iter().flat_map(|seen| &seen.mass).map(|&x| f64::from(x));
    let share = |seen: &Seen| {
        seen.pages.as_ref().map_or(1.0, |pages| pages.len() as f64 / seen.page_mass.len() as f64)
    };
    let entropies = steps.iter().flat_map(|seen| &seen.entropy);
    RecallRow {
        policy: trial.name(),
        budget: trial.budget(),
        layer: steps[0].layer,
        kv_head: steps[0].kv_head,
        recall: mean(&mut masses()).unwrap_or(1.0),
        recall_min: masses().fold(1.0, f64::min),
        top_pages: mean(&mut steps.iter().map(|seen| f64::from(seen.top_pages))).unwrap_or(1.0),
        reuse: mean(&mut steps.iter().filter_map(|seen| seen.reuse).map(f64::from)),
        entropy: mean(&mut entropies.map(|&x| f64::from(x))).unwrap_or(0.0),
        pages_read_ratio: mean(&mut steps.iter().map(share)).unwrap_or(1.0),
        steps: steps.len(),
    }
}
