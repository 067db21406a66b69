//! What a step computed becomes tokens, text and events.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::Instant;

use tinyserve_kernels::TopRow;
use tinyserve_kv::Prefix;
use tinyserve_model::{SampleContext, logprob, top_logprobs, top_logprobs_of};

use super::{Scheduler, hooks, model_failure, panicked, tokenizer_failure};
use crate::metrics::{Metrics, count};
use crate::sequence::{End, Sequence};
use crate::{Event, Failure, FinishReason, PromptToken, Runner, StopReason, Token};

impl<R: Runner> Scheduler<R> {
    /// Hands the results of member `row` of the last step to running sequence `index`.
    pub(super) fn commit(&mut self, row: usize, index: usize) {
        let Self { runner, running, metrics, logits, .. } = self;
        let sequence = &mut running[index];
        let now = self.config.clock.now();
        let commit = || sequence.commit((runner, row), now, metrics, logits);
        let result = catch_unwind(AssertUnwindSafe(commit));
        let failure = match result {
            Ok(Ok(())) => {
                let offers = sequence.shares && !sequence.remembered;
                if sequence.computed() >= sequence.prompt_len && offers {
                    // From now on, requests with the same beginning find it.
                    sequence.remembered = true;
                    let dense = sequence.alike().len().min(sequence.prompt_len);
                    let Sequence { tokens, cache_salt, table, .. } = sequence;
                    runner.remember(Prefix { salt: cache_salt, tokens: &tokens[..dense] }, table);
                }
                return;
            }
            Ok(Err(failure)) => failure,
            Err(panic) => panicked("drawing a token", panic.as_ref()),
        };
        self.running[index].end_with(End::Failed(failure));
    }
}

/// What a token is drawn from.
#[derive(Debug, Clone, Copy)]
enum Logits<'a> {
    /// Every logit, `[vocab]`.
    All(&'a [f32]),
    /// The likeliest tokens, which decide the draw.
    Top(TopRow<'a>),
}

impl Sequence {
    fn commit<R: Runner>(
        &mut self,
        (runner, row): (&mut R, usize),
        now: Instant,
        metrics: &Metrics,
        edited: &mut Vec<f32>,
    ) -> Result<(), Failure> {
        let decodes = self.is_planned_decode();
        let planned = std::mem::take(&mut self.planned);
        let (end, total) = (self.computed(), self.tokens.len());
        let start = end - planned;
        let mut last_row = 0;
        if start < self.prompt_len
            && let Some(n) = self.prompt_logprobs
        {
            self.commit_prompt((&*runner, row), start, n);
            last_row = planned - 1;
        }
        if decodes {
            let read = runner.read(row);
            self.note_decode(&read);
            metrics.read_by_decode(&read);
        } else {
            self.events.send(Event::Prefill { done: end, total });
            count(&metrics.prefill_tokens, planned as u64);
            hooks::prefill((runner, row), self, start..end)?;
        }
        if end < total || self.end.is_some() {
            return Ok(());
        }
        self.times.prefilled.get_or_insert(now);
        if self.max_tokens == 0 {
            self.end_with(End::Finished(FinishReason::Length, None));
            return Ok(());
        }
        if let Some(top) = runner.top(row) {
            self.draw(Logits::Top(top))?;
        } else if self.plugins.is_idle() {
            self.draw(Logits::All(runner.logits(row, last_row)))?;
        } else {
            edited.clear();
            edited.extend_from_slice(runner.logits(row, last_row));
            hooks::step((runner, row), self, edited, decodes)?;
            if self.end.is_some() {
                return Ok(());
            }
            self.draw(Logits::All(edited))?;
        }
        self.note_token(now, metrics);
        Ok(())
    }

    /// Tells how likely the prompt's tokens were, from the logits of every token from `start` on.
    fn commit_prompt<R: Runner>(&mut self, (runner, row): (&R, usize), start: usize, n: usize) {
        let mut told = Vec::new();
        if self.prompt_told == 0 {
            let (id, top_logprobs) = (self.tokens[0], Vec::new());
            told.push(PromptToken { id, logprob: None, top_logprobs });
        }
        // The logits after a token predict the next one. What was told before a preemption is not
        // told again.
        let next = self.prompt_told.max(start + 1).max(1);
        for position in next..(self.computed() + 1).min(self.prompt_len) {
            let logits = runner.logits(row, position - 1 - start);
            let id = self.tokens[position];
            let logprob = Some(logprob(logits, id));
            told.push(PromptToken { id, logprob, top_logprobs: top(logits, n) });
        }
        self.tell_prompt(told);
    }

    /// Draws the next token, tells it, and ends the sequence where it ends.
    fn draw(&mut self, logits: Logits<'_>) -> Result<(), Failure> {
        let early = self.generated().len() < self.min_tokens;
        let (prompt, generated) = self.tokens.split_at(self.prompt_len);
        let banned: &[u32] = if early { &self.banned } else { &[] };
        let context = SampleContext { prompt, generated, banned };
        let (drawn, top_logprobs) = match logits {
            Logits::All(logits) => {
                (self.sampler.sample_after(logits, context), top(logits, self.top_logprobs))
            }
            Logits::Top(likeliest) => {
                (self.sampler.sample_top(likeliest), top_logprobs_of(likeliest, self.top_logprobs))
            }
        };
        let drawn = drawn.map_err(|error| model_failure(&error))?;
        self.tokens.push(drawn.id);
        let generated = self.generated().len();
        let mut stop = self.is_stop_token(drawn.id);
        let mut text = String::new();
        if stop.is_none() {
            let may_stop = generated >= self.min_tokens;
            text = self.text.push(drawn.id, may_stop).map_err(|error| tokenizer_failure(&error))?;
            stop = self.text.stopped().map(|stop| StopReason::Text(stop.to_owned()));
        }
        let (id, logprob) = (drawn.id, drawn.logprob);
        self.events.send(Event::Token(Token { id, logprob, top_logprobs, text }));
        if stop.is_some() {
            self.end_with(End::Finished(FinishReason::Stop, stop));
        } else if generated >= self.max_tokens {
            self.end_with(End::Finished(FinishReason::Length, None));
        }
        Ok(())
    }

    fn note_token(&mut self, now: Instant, metrics: &Metrics) {
        count(&metrics.generation_tokens, 1);
        if self.times.first_token.is_none() {
            self.times.first_token = Some(now);
            metrics.ttft.record(now.saturating_duration_since(self.times.submitted));
        }
        if let Some(last) = self.times.last_token.replace(now) {
            metrics.itl.record(now.saturating_duration_since(last));
        }
    }
}

/// The `n` most likely tokens; nothing is sorted when none are asked for.
fn top(logits: &[f32], n: usize) -> Vec<tinyserve_model::SampledToken> {
    if n == 0 { Vec::new() } else { top_logprobs(logits, n) }
}
