//! A step that is planned runs.

use std::panic::{AssertUnwindSafe, catch_unwind};

use smallvec::SmallVec;
use tinyserve_kernels::PageLists;
use tinyserve_model::{Batch, LogitRows, ModelError, SequenceStep};

use super::{ON_STACK, Scheduler, hooks, model_failure, panicked};
use crate::metrics::count;
use crate::sequence::{End, Sequence};
use crate::{RequestId, Runner};

/// What is measured in some steps only.
#[derive(Debug, Clone, Copy)]
struct Sampled {
    measure_recall: bool,
    list_pages: bool,
}

/// What the sequences of a step selected.
#[derive(Debug, Default)]
pub(super) struct Selected {
    /// The number of the step among those in which somebody decoded.
    step: u64,
    /// In the order of the batch: the request, and how many of its tokens were pruned. After a
    /// pruning pages have other numbers.
    sequences: Vec<(RequestId, u64)>,
    lists: PageLists,
}

impl<R: Runner> Scheduler<R> {
    /// Runs the planned tokens of `members` together; if that fails, each alone, so that only
    /// those that fail alone do fail.
    pub(super) fn run(&mut self, members: &[usize]) {
        let interval = self.config.recall_interval as u64;
        let members_now = members.iter().map(|&i| &self.running[i]);
        let mut decoding = members_now.filter(|s| s.is_planned_decode()).peekable();
        let somebody = decoding.peek().is_some();
        let measure_recall = interval > 0
            && somebody
            && (self.decode_steps.is_multiple_of(interval)
                || decoding.any(|sequence| sequence.kv.decode_steps == 0));
        // Reuse compares a step with the one before it.
        let list_pages = interval > 0 && somebody && self.decode_steps % interval <= 1 % interval;
        let sampled = Sampled { measure_recall, list_pages };
        let failure = match self.forward(members, sampled) {
            Ok(Ok(())) => {
                if list_pages {
                    self.note_reuse(members);
                }
                // A step that measures recall takes longer than attention does.
                let time = self.runner.attention_time().filter(|_| !measure_recall);
                self.metrics.attended(self.runner.layers(), time);
                // Prompts are read in full, whatever the selection: they would hide it.
                if members.iter().all(|&i| self.running[i].planned == 1) {
                    self.metrics.read_in_layers(self.runner.layers());
                }
                for (row, &i) in members.iter().enumerate() {
                    self.commit(row, i);
                }
                return;
            }
            Ok(Err(error)) => model_failure(&error),
            Err(panic) => panicked("the step", panic.as_ref()),
        };
        match members {
            [i] => self.running[*i].end_with(End::Failed(failure)),
            _ => members.iter().for_each(|&i| self.run(&[i])),
        }
    }

    /// Computes the planned tokens of `members`.
    fn forward(
        &mut self,
        members: &[usize],
        Sampled { measure_recall, list_pages }: Sampled,
    ) -> std::thread::Result<Result<(), ModelError>> {
        let (runner, running) = (&mut self.runner, &self.running);
        let steps: SmallVec<[_; ON_STACK]> = members.iter().map(|&i| step(&running[i])).collect();
        let batch = Batch { sequences: &steps, measure_recall, list_pages };
        // What a step that panicked has written, the next one writes again before it reads it.
        catch_unwind(AssertUnwindSafe(|| runner.run(&batch)))
    }

    /// Compares what the last step selected with what the one before did, where that was listed.
    fn note_reuse(&mut self, members: &[usize]) {
        let Self { runner, running, selected, metrics, .. } = self;
        let Some(lists) = runner.page_lists() else { return };
        if selected.step + 1 == self.decode_steps {
            for (row, &i) in members.iter().enumerate() {
                let sequence = &mut running[i];
                let mut before = selected.sequences.iter();
                if let Some(before) = before.position(|other| *other == sequence.selects_as()) {
                    let reuse = lists.reuse(row, &selected.lists, before);
                    sequence.kv.decode.reuse.add(reuse);
                    count(&metrics.pages_compared, reuse.compared);
                    count(&metrics.pages_reused, reuse.reused);
                }
            }
        }
        selected.step = self.decode_steps;
        selected.lists.clone_from(lists);
        selected.sequences.clear();
        selected.sequences.extend(members.iter().map(|&i| running[i].selects_as()));
    }
}

/// What a sequence does in the step that is planned.
fn step(sequence: &Sequence) -> SequenceStep<'_> {
    let end = sequence.computed();
    let start = end - sequence.planned;
    let in_prompt = start < sequence.prompt_len;
    let logits = if in_prompt && sequence.prompt_logprobs.is_some() {
        LogitRows::All
    } else if end == sequence.tokens.len() {
        sequence.decided_by().map_or(LogitRows::Last, LogitRows::Top)
    } else {
        LogitRows::None
    };
    let (attention, _) = sequence.attention_at(start);
    SequenceStep {
        tokens: &sequence.tokens[start..end],
        table: &sequence.table,
        attention,
        logits,
        observe: hooks::observe(sequence, end),
    }
}
