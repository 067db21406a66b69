//! Plugins between steps: what they see of a sequence, and what is done for them.

use std::ops::Range;

use tinyserve_kv::KvError;
use tinyserve_model::{ModelError, Observe};
use tinyserve_plugins::{Finish, PluginFailure, Prefilled, Pruned, Step, Verdict};

use crate::pruning::Pruning;
use crate::sequence::{End, Sequence};
use crate::{Failure, FailureKind, FinishReason, Runner, RunnerShape, StopReason};

/// What a step of `sequence` that ends before its token `end` has to tell of its attention.
pub(super) fn observe(sequence: &Sequence, end: usize) -> Observe {
    let needs = sequence.plugins.needs();
    if end <= sequence.seen {
        return Observe::NOTHING;
    }
    Observe {
        entropy: needs.attention_entropy && end == sequence.tokens.len(),
        mass_rows: if needs.attention_mass { usize::MAX } else { 0 },
    }
}

/// The request was admitted.
pub(super) fn request(sequence: &mut Sequence) {
    match sequence.plugins.on_request() {
        Ok(verdict) => stop(sequence, verdict),
        Err(failed) => sequence.end_with(End::Failed(failure(&failed))),
    }
}

/// The tokens at positions `computed` are in the cache.
pub(super) fn prefill<R: Runner>(
    (runner, row): (&mut R, usize),
    sequence: &mut Sequence,
    computed: Range<usize>,
) -> Result<(), Failure> {
    if computed.end <= sequence.seen {
        return Ok(());
    }
    let first = std::mem::take(&mut sequence.fresh);
    if sequence.plugins.is_idle() {
        return Ok(());
    }
    let prefilled = Prefilled {
        last: computed.end == sequence.tokens.len(),
        computed,
        first,
        cached_tokens: sequence.cached(),
        mass: runner.attention_mass(row),
    };
    let verdict = sequence.plugins.on_prefill(&prefilled).map_err(|failed| failure(&failed))?;
    act(runner, sequence, verdict)
}

/// Logits are there; plugins may change them.
pub(super) fn step<R: Runner>(
    (runner, row): (&mut R, usize),
    sequence: &mut Sequence,
    logits: &mut [f32],
    decodes: bool,
) -> Result<(), Failure> {
    let step = Step {
        generated: &sequence.tokens[sequence.prompt_len..],
        cached_tokens: sequence.cached(),
        logits,
        attention_entropy: runner.attention_entropy(row),
        // The last part of a prompt has told it already.
        mass: runner.attention_mass(row).filter(|_| decodes),
    };
    let verdict = sequence.plugins.on_step(step).map_err(|failed| failure(&failed))?;
    act(runner, sequence, verdict)
}

/// The sequence ends with `end`.
pub(super) fn finish(sequence: &mut Sequence, end: &End) {
    let reason = match end {
        End::Finished(reason, _) => reason.name(),
        End::Aborted => "cancelled",
        End::Failed(_) => "failed",
    };
    let generated = &sequence.tokens[sequence.prompt_len..];
    sequence.plugins.on_finish(Finish { generated, reason });
}

/// Does what plugins want done.
fn act<R: Runner>(
    runner: &mut R,
    sequence: &mut Sequence,
    verdict: Verdict,
) -> Result<(), Failure> {
    if verdict.prune.is_empty() {
        stop(sequence, verdict);
        return Ok(());
    }
    let RunnerShape { page_size, bytes_per_page, .. } = runner.shape();
    let bytes = |tokens: usize| (tokens.div_ceil(page_size) * bytes_per_page) as u64;
    let bytes_before = bytes(sequence.cached());
    let (computed, places) = (sequence.computed(), verdict.prune.clone());
    sequence.history.prunings.push(Pruning { computed, places });
    match prune(runner, sequence) {
        // Shared pages have to be replaced before they can be left. There is no room for that now:
        // the next plan makes some.
        Ok(()) | Err(ModelError::Kv(KvError::OutOfPages { .. })) => {}
        Err(error) => return Err(cannot_prune(sequence, &error)),
    }
    let bytes_after = bytes(sequence.cached());
    sequence.plugins.pruned(&verdict, Pruned { bytes_before, bytes_after });
    sequence.kv.pruned_tokens += verdict.prune.len() as u64;
    sequence.kv.pruned_bytes += bytes_before - bytes_after;
    Ok(())
}

/// Prunes what is to be pruned before another token of `sequence` is computed.
///
/// # Errors
/// When pages are missing or cannot be taken apart; what was pruned until then is.
pub(super) fn prune<R: Runner>(runner: &mut R, sequence: &mut Sequence) -> Result<(), ModelError> {
    let computed = sequence.computed();
    while let Some(due) = sequence.history.prunings.next().filter(|due| due.computed == computed) {
        runner.prune(&mut sequence.table, &due.places)?;
        sequence.history.prunings.note_made();
    }
    Ok(())
}

pub(super) fn cannot_prune(sequence: &Sequence, error: &ModelError) -> Failure {
    let plugins = sequence.plugins.pruning().collect::<Vec<_>>().join("\", \"");
    let sentence = format!("plugin \"{plugins}\" cannot prune: {error}");
    Failure { kind: FailureKind::Plugin, sentence }
}

/// Ends the sequence if a plugin wants it.
fn stop(sequence: &mut Sequence, verdict: Verdict) {
    if let Some(stop) = verdict.stop {
        let reason = StopReason::Plugin { plugin: stop.plugin, reason: stop.reason };
        sequence.end_with(End::Finished(FinishReason::Stop, Some(reason)));
    }
}

fn failure(failed: &PluginFailure) -> Failure {
    Failure { kind: FailureKind::Plugin, sentence: failed.to_string() }
}
