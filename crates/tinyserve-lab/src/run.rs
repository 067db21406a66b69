//! A run that is watched step by step: what becomes a trace.

use std::time::Instant;

use tinyserve_kernels::{Attention, Backend, Profiled};
use tinyserve_model::LogitRows;

use crate::needle::best;
use crate::{Control, LabError, Probe, Trace, TraceHeader, TraceStep, Trial, Watch};

/// Steps that are timed without being watched.
const TIMED: usize = 16;

/// What to run.
#[derive(Debug, Clone, Copy)]
pub struct TracedRun<'a> {
    /// What the trace calls the model.
    pub model: &'a str,
    /// What the trace calls the trial.
    pub policy: &'a str,
    /// Tokens that are read densely before.
    pub prompt: &'a [u32],
    /// Decode steps, each feeding the most likely token.
    pub steps: usize,
}

/// Runs `trial` and notes what it reads; `None` when `control` says no before the first step, and
/// fewer steps when it says no later.
///
/// # Errors
/// When the prompt is empty or does not fit, or the model fails.
pub fn traced<B: Backend + Sync>(
    probe: &mut Probe<Profiled<B>>,
    run: &TracedRun<'_>,
    trial: &Trial,
    control: &mut Control<'_>,
) -> Result<Option<Trace>, LabError> {
    let limit = probe.model().config().max_positions;
    let TracedRun { prompt, steps, .. } = *run;
    let setting = |what, found: usize, expected: String| {
        Err(LabError::Setting { what, found: found.to_string(), expected })
    };
    if prompt.is_empty() || prompt.len() > limit {
        let expected = format!("1 to {limit} tokens, the model's context");
        return setting("the prompt's length", prompt.len(), expected);
    }
    if steps == 0 || steps > limit - prompt.len() {
        let expected =
            format!("1 to {}, what the prompt leaves of the context", limit - prompt.len());
        return setting("steps", steps, expected);
    }
    // The prompt's last token is the first that is fed through the selection.
    let (read, last) = prompt.split_at(prompt.len() - 1);
    let (table, observed) = if read.is_empty() {
        (probe.cache().new_table(), std::sync::Arc::default())
    } else {
        match probe.prefill(read, control)? {
            Some(prefilled) => prefilled,
            None => return Ok(None),
        }
    };
    let chooser = trial.start(&observed);
    let watch = Watch::new(chooser.selector());
    let mut fork = probe.fork(&table);
    let (mut token, mut traced, mut result) = (last[0], Vec::new(), Ok(()));
    for step in 0..steps {
        let attention = Attention::Custom(&watch);
        match probe.step(&mut fork, &[token], attention, LogitRows::Last, false) {
            Ok(output) => token = best(output.logits(0).last().unwrap_or(&[])),
            Err(error) => {
                result = Err(error);
                break;
            }
        }
        traced.push(watch.take());
        if !control("steps", step + 1, steps) {
            break;
        }
    }
    probe.release(fork);
    let timed =
        result.and_then(|()| time(probe, &table, last[0], steps.min(TIMED), trial, &observed));
    probe.release(table);
    let (step_split_ns, ratio) = timed?;
    let config = probe.model().config();
    let layout = probe.cache().layout();
    let header = TraceHeader {
        format: TraceHeader::format_name(),
        version: crate::TRACE_VERSION,
        model: run.model.to_owned(),
        policy: run.policy.to_owned(),
        page_size: layout.page_size(),
        layers: config.layers,
        kv_heads: config.kv_heads,
        q_heads: config.q_heads,
        prompt_tokens: prompt.len(),
        step_split_ns,
    };
    let per_token = layout.bytes_per_token() as u64;
    let steps = traced
        .into_iter()
        .enumerate()
        .map(|(step, heads)| {
            let tokens = prompt.len() + step;
            let bytes_dense = tokens as u64 * per_token;
            // Timed steps count bytes as kernels read them; the later ones read the same share.
            let share = ratio.get(step).or(ratio.last()).copied().unwrap_or(1.0);
            TraceStep {
                tokens,
                bytes_read: (bytes_dense as f64 * share) as u64,
                bytes_dense,
                heads,
            }
        })
        .collect();
    Ok(Some(Trace { header, steps }))
}

/// Where the time of a step goes, and the share of the bytes that each step reads, unwatched.
fn time<B: Backend + Sync>(
    probe: &mut Probe<Profiled<B>>,
    table: &tinyserve_kv::PageTable,
    mut token: u32,
    steps: usize,
    trial: &Trial,
    observed: &std::sync::Arc<tinyserve_kv::PromptAttention>,
) -> Result<([u64; 3], Vec<f64>), LabError> {
    let chooser = trial.start(observed);
    let mut fork = probe.fork(table);
    let (mut ratios, mut result) = (Vec::new(), Ok(()));
    probe.model().backend().switch(true);
    probe.model().backend().take();
    let start = Instant::now();
    for _ in 0..steps {
        match probe.step(&mut fork, &[token], chooser.attention(), LogitRows::Last, false) {
            Ok(output) => {
                ratios.push(output.stats().bytes_ratio().unwrap_or(1.0));
                token = best(output.logits(0).last().unwrap_or(&[]));
            }
            Err(error) => {
                result = Err(error);
                break;
            }
        }
    }
    let elapsed = start.elapsed();
    let profile = probe.model().backend().take();
    probe.model().backend().switch(false);
    probe.release(fork);
    result?;
    let rest = elapsed.saturating_sub(profile.linear + profile.attend);
    let per_step = |time: std::time::Duration| time.as_nanos() as u64 / steps.max(1) as u64;
    Ok(([per_step(profile.linear), per_step(profile.attend), per_step(rest)], ratios))
}
