//! Plugins between steps: what they see of a sequence, and what is done for them.

use std::ops::Range;

use tinyserve_kv::KvError;
use tinyserve_model::{ModelError, Observe};
use tinyserve_plugins::{Finish, PluginFailure, Prefilled, Pruned, Step, Verdict};

use crate::sequence::{End, Sequence};
use crate::{Failure, FailureKind, FinishReason, Runner, StopReason};

/// What a step of `sequence` that ends before its token `end` has to tell of its attention.
pub(super) fn observe(sequence: &Sequence, end: usize) -> Observe {
    let needs = sequence.plugins.needs();
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
    let first = std::mem::take(&mut sequence.fresh);
    if sequence.plugins.is_idle() {
        return Ok(());
    }
    let prefilled = Prefilled {
        last: computed.end == sequence.tokens.len(),
        computed,
        first,
        cached_tokens: sequence.table.len(),
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
        cached_tokens: sequence.table.len(),
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
    let bytes_per_page = runner.shape().bytes_per_page;
    let bytes = |sequence: &Sequence| (sequence.table.pages().len() * bytes_per_page) as u64;
    let bytes_before = bytes(sequence);
    match runner.prune(&mut sequence.table, &verdict.prune) {
        Ok(()) => {
            let bytes_after = bytes(sequence);
            sequence.plugins.pruned(&verdict, Pruned { bytes_before, bytes_after });
            sequence.kv.pruned_tokens += verdict.prune.len() as u64;
            sequence.kv.pruned_bytes += bytes_before - bytes_after;
            Ok(())
        }
        // Shared pages have to be replaced before they can be left: when there is no room for that
        // now, there is no memory to be won now.
        Err(ModelError::Kv(KvError::OutOfPages { .. })) => Ok(()),
        Err(error) => {
            let plugins = sequence.plugins.pruning().collect::<Vec<_>>().join("\", \"");
            let sentence = format!("plugin \"{plugins}\" cannot prune: {error}");
            Err(Failure { kind: FailureKind::Plugin, sentence })
        }
    }
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
