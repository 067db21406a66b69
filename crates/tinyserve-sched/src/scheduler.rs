//! Who runs next: a state machine that plans a step, runs it and hands its results out.

use std::sync::Arc;
use std::time::Duration;

use smallvec::SmallVec;
use tinyserve_kv::{PageId, Prefix};
use tinyserve_model::ModelError;

use crate::adaptive::Controller;
use crate::intake::{Intake, Submission};
use crate::metrics::{Metrics, count, gauge};
use crate::sequence::{End, Sequence};
use crate::session::{Kept, SessionInfo, Sessions};
use crate::{
    AttentionChoice, EngineConfig, Event, Failure, FailureKind, FinishReason, Finished, RequestId,
    Runner, Stats,
};

mod commit;
mod hooks;
mod plan;
mod run;
mod saved;

use run::Selected;

/// Sequences of a step that need no allocation.
const ON_STACK: usize = 16;

/// Most tokens of prompts that one step scores: each of them has logits over the whole vocabulary.
pub const MOST_SCORED_TOKENS: usize = 64;

/// Requests over one runner. It knows no thread and no clock but the one of its configuration: an
/// [`crate::Engine`] drives it on a thread, and tests drive it by hand.
#[derive(Debug)]
pub struct Scheduler<R: Runner> {
    runner: R,
    config: EngineConfig,
    metrics: Arc<Metrics>,
    intake: Arc<Intake>,
    /// Without pages, first come first.
    waiting: Vec<Sequence>,
    /// With pages, first come first.
    running: Vec<Sequence>,
    sessions: Sessions,
    /// Steps in which somebody decoded.
    decode_steps: u64,
    /// Logits that plugins may change.
    logits: Vec<f32>,
    /// Moves the budget of the engine's own policy.
    controller: Option<Controller>,
    /// What the last step that was listed selected.
    selected: Selected,
}

impl<R: Runner> Scheduler<R> {
    /// A scheduler without requests.
    ///
    /// # Errors
    /// When a setting is out of its range.
    pub fn new(runner: R, config: EngineConfig) -> Result<Self, crate::AdmissionError> {
        config.check()?;
        let metrics = Arc::new(Metrics::default());
        let pages = runner.pool().capacity();
        gauge(&metrics.pages, pages);
        let intake = Intake::new(config.clone(), (runner.shape(), pages), Arc::clone(&metrics));
        let controller = match (&config.adaptive, &config.attention) {
            (Some(adaptive), AttentionChoice::Policy(policy)) => {
                Some(Controller::new(adaptive.clone(), policy.budget))
            }
            _ => None,
        };
        let sessions = Sessions::new(config.clock.clone(), config.session_timeout);
        Ok(Self {
            runner,
            metrics,
            intake: Arc::new(intake),
            waiting: Vec::new(),
            running: Vec::new(),
            sessions,
            decode_steps: 0,
            logits: Vec::new(),
            controller,
            selected: Selected::default(),
            config,
        })
    }

    /// What checks requests for this scheduler, on any thread.
    #[must_use]
    pub fn intake(&self) -> &Arc<Intake> {
        &self.intake
    }

    /// Every page that a sequence or a session holds, as often as it is held: what is used in the
    /// runner's pool and is not here has leaked.
    pub fn held_pages(&self) -> impl Iterator<Item = PageId> {
        let running = self.running.iter().chain(&self.waiting).map(|sequence| &sequence.table);
        let tables = running.chain(self.sessions.tables());
        tables.flat_map(|table| table.pages().iter().copied())
    }

    /// What it drives.
    #[must_use]
    pub fn runner(&self) -> &R {
        &self.runner
    }

    /// A look at the counters.
    #[must_use]
    pub fn stats(&self) -> Stats {
        self.metrics.read()
    }

    pub(crate) fn metrics(&self) -> &Arc<Metrics> {
        &self.metrics
    }

    /// Whether there is nothing to do.
    #[must_use]
    pub fn is_idle(&self) -> bool {
        self.waiting.is_empty() && self.running.is_empty()
    }

    /// Takes a request; it joins the batch in a later step.
    pub fn add(&mut self, submission: Submission) {
        let mut sequence = *submission.0;
        if let Some(session) = &sequence.session {
            self.sessions.open(session);
        }
        if let Some(controller) = &self.controller {
            sequence.set_budget(controller.budget());
        }
        hooks::request(&mut sequence);
        if sequence.end.is_some() {
            self.retire([sequence]);
            return;
        }
        insert(&mut self.waiting, sequence);
        self.set_gauges();
    }

    /// Ends a request and gives its pages back, unless it has ended already.
    pub fn abort(&mut self, id: RequestId) {
        let ended = [&mut self.waiting, &mut self.running].into_iter().find_map(|sequences| {
            let index = sequences.iter().position(|sequence| sequence.id == id)?;
            Some(sequences.remove(index))
        });
        if let Some(mut sequence) = ended {
            sequence.end_with(End::Aborted);
            self.retire([sequence]);
        }
    }

    /// Ends every request.
    pub fn abort_all(&mut self) {
        let all: Vec<_> = self.waiting.drain(..).chain(self.running.drain(..)).collect();
        let all = all.into_iter().map(|mut sequence| {
            sequence.end_with(End::Aborted);
            sequence
        });
        self.retire(all.collect::<Vec<_>>());
    }

    /// Plans a step, runs it and hands its results out; tells whether there was one.
    pub fn step(&mut self) -> bool {
        let stepped = self.run_planned();
        self.running.iter_mut().for_each(|sequence| sequence.events.tell());
        stepped
    }

    fn run_planned(&mut self) -> bool {
        self.expire_sessions();
        self.plan();
        let members: SmallVec<[usize; ON_STACK]> =
            (0..self.running.len()).filter(|&i| self.running[i].planned > 0).collect();
        if members.is_empty() {
            // A sequence that could not be pruned has ended in the plan.
            if !self.sweep() {
                self.give_up();
            }
            return false;
        }
        let decodes = members.iter().any(|&i| self.running[i].is_planned_decode());
        let followed = self.controller.is_some() && self.follows_budget(&members);
        let start = self.config.clock.now();
        self.metrics.step_tokens.record(members.iter().map(|&i| self.running[i].planned).sum());
        self.run(&members);
        self.decode_steps += u64::from(decodes);
        let took = self.config.clock.now().saturating_duration_since(start);
        count(&self.metrics.steps, 1);
        self.metrics.step.record(took);
        if followed {
            self.adapt(took);
        }
        self.sweep();
        true
    }

    /// Whether the step that is planned only decodes, and the budget matters to it: what prompts
    /// take is not the budget's doing.
    fn follows_budget(&self, members: &[usize]) -> bool {
        let mut members = members.iter().map(|&i| &self.running[i]);
        members.clone().all(Sequence::is_planned_decode) && members.any(Sequence::follows_budget)
    }

    /// Lets the controller know what a decode step took, and every sequence what it decides.
    fn adapt(&mut self, took: Duration) {
        let moved = self.controller.as_mut().and_then(|controller| controller.note(took));
        if let Some(moved) = moved {
            count(&self.metrics.budget_moves, 1);
            let all = self.running.iter_mut().chain(&mut self.waiting);
            all.for_each(|sequence| sequence.set_budget(moved.to));
        }
    }

    /// Ends sequences that have come to an end; tells whether there were any.
    fn sweep(&mut self) -> bool {
        let ended: Vec<_> =
            self.running.extract_if(.., |sequence| sequence.end.is_some()).collect();
        let some = !ended.is_empty();
        self.retire(ended);
        some
    }

    /// Gives pages back or leaves them to sessions, then tells everybody that it is over.
    fn retire(&mut self, ended: impl IntoIterator<Item = Sequence>) {
        let terminals: Vec<_> = ended.into_iter().map(|sequence| self.close(sequence)).collect();
        // Whoever hears of the end finds the counters up to date.
        self.set_gauges();
        for (events, terminal) in terminals {
            events.finish(terminal);
        }
    }

    fn close(&mut self, mut sequence: Sequence) -> (crate::channel::EventSender, Event) {
        let now = self.config.clock.now();
        let end = sequence.end.take().unwrap_or(End::Aborted);
        let (rest, end) = match (sequence.text.finish(), end) {
            (_, End::Failed(failure)) => (String::new(), End::Failed(failure)),
            (Ok(rest), end) => (rest, end),
            (Err(error), _) => (String::new(), End::Failed(tokenizer_failure(&error))),
        };
        hooks::finish(&mut sequence, &end);
        let summary = sequence.summary(rest, now);
        let failed = matches!(end, End::Failed(_));
        let (metrics, timings) = (&self.metrics, &summary.timings);
        let terminal = match end {
            End::Failed(failure) => {
                count(&metrics.failed, 1);
                Event::Failed(failure)
            }
            End::Aborted => {
                count(&metrics.aborted, 1);
                Event::Aborted(summary)
            }
            End::Finished(reason, stop_reason) => {
                let counter = match reason {
                    FinishReason::Stop => &metrics.finished_stop,
                    FinishReason::Length => &metrics.finished_length,
                };
                count(counter, 1);
                count(&metrics.finished_pages, summary.kv.pages as u64);
                metrics.e2e.record(timings.e2e);
                if summary.usage.completion_tokens > 1 {
                    let steps = summary.usage.completion_tokens as u32 - 1;
                    metrics.tpot.record(timings.decode / steps);
                }
                Event::Finished(Finished { reason, stop_reason, summary })
            }
        };
        if !failed {
            self.remember(&mut sequence);
        }
        sequence.note_selected();
        let computed = sequence.ever_computed();
        let Sequence { mut table, mut tokens, session, cache_salt, history, events, .. } = sequence;
        let kept = match session {
            Some(session) => {
                let total = tokens.len();
                self.runner.rest(&mut table);
                tokens.truncate(computed);
                let keeps = !failed && !tokens.is_empty();
                if keeps {
                    let kept = Kept { table, tokens, cache_salt, history };
                    self.sessions.close(&session, total, Some(kept)).map(|kept| kept.table)
                } else {
                    self.sessions.close(&session, total, None);
                    Some(table)
                }
            }
            None => Some(table),
        };
        if let Some(table) = kept {
            self.runner.release(table);
        }
        (events, terminal)
    }

    /// A plan of nothing for somebody: a bug, of which the first in line is told instead of
    /// waiting for ever.
    fn give_up(&mut self) {
        let stuck = if self.running.is_empty() { &mut self.waiting } else { &mut self.running };
        if stuck.is_empty() {
            return;
        }
        let mut sequence = stuck.remove(0);
        let sentence = format!(
            "the scheduler found no step for a request of {} tokens with {} of {} pages free",
            sequence.tokens.len(),
            self.runner.pool().free_pages(),
            self.runner.pool().capacity(),
        );
        sequence.end_with(End::Failed(Failure { kind: FailureKind::Panic, sentence }));
        self.retire([sequence]);
    }

    fn set_gauges(&self) {
        gauge(&self.metrics.running, self.running.len());
        gauge(&self.metrics.waiting, self.waiting.len());
        gauge(&self.metrics.sessions, self.sessions.len());
        let pool = self.runner.pool();
        gauge(&self.metrics.pages_used, pool.used_pages() - pool.idle_pages());
        gauge(&self.metrics.pages_idle, pool.idle_pages());
        if let Some(stats) = self.runner.prefix_stats() {
            let metrics = &self.metrics;
            for (counter, n) in [
                (&metrics.prefix_lookups, stats.lookups),
                (&metrics.prefix_hits, stats.hits),
                (&metrics.prefix_hit_tokens, stats.hit_tokens),
                (&metrics.prefix_evicted_for_room, stats.evicted_for_room),
                (&metrics.prefix_evicted_for_limit, stats.evicted_for_limit),
                (&metrics.prefix_evicted_by_clear, stats.evicted_by_clear),
            ] {
                gauge(counter, n as usize);
            }
        }
    }

    /// Offers the pages of a sequence, which has not failed, to requests that begin alike.
    fn remember(&mut self, sequence: &mut Sequence) {
        let dense = sequence.alike().len().min(sequence.computed());
        let Sequence { tokens, cache_salt, table, .. } = sequence;
        let prefix = Prefix { salt: cache_salt, tokens: &tokens[..dense] };
        self.runner.remember(prefix, table);
    }

    fn evict_session(&mut self, but: Option<&str>) -> bool {
        let evicted = self.sessions.evict(&mut self.runner, but);
        count(&self.metrics.sessions_evicted, u64::from(evicted));
        evicted
    }

    /// Deletes sessions that nobody used for too long.
    pub fn expire_sessions(&mut self) {
        let expired = self.sessions.expire(&mut self.runner);
        if expired > 0 {
            count(&self.metrics.sessions_expired, expired as u64);
            self.set_gauges();
        }
    }

    /// How long until a session may expire.
    #[must_use]
    pub fn next_expiry(&self) -> Option<Duration> {
        self.sessions.next_expiry()
    }

    /// Creates a session, unless it exists.
    pub fn create_session(&mut self, id: &str) {
        self.sessions.create(id);
        self.set_gauges();
    }

    /// The sessions, by name.
    #[must_use]
    pub fn list_sessions(&self) -> Vec<SessionInfo> {
        self.sessions.list()
    }

    /// What is known of a session.
    #[must_use]
    pub fn session_info(&self, id: &str) -> Option<SessionInfo> {
        self.sessions.info(id)
    }

    /// Deletes a session and gives its pages back; tells whether it existed. Requests of it that
    /// wait or run go on; what they leave is not kept.
    pub fn delete_session(&mut self, id: &str) -> bool {
        let existed = self.sessions.delete(&mut self.runner, id);
        // A later session of this name is another one.
        for sequence in self.running.iter_mut().chain(&mut self.waiting) {
            sequence.session.take_if(|session| session == id);
        }
        self.set_gauges();
        existed
    }

    /// Deletes all sessions.
    pub fn clear_sessions(&mut self) {
        self.sessions.clear(&mut self.runner);
        self.set_gauges();
    }
}

/// Puts a sequence into its place by rank; returns the place.
fn insert(sequences: &mut Vec<Sequence>, sequence: Sequence) -> usize {
    let index = sequences.partition_point(|other| other.rank < sequence.rank);
    sequences.insert(index, sequence);
    index
}

fn model_failure(error: &ModelError) -> Failure {
    Failure { kind: FailureKind::Model, sentence: error.to_string() }
}

fn tokenizer_failure(error: &ModelError) -> Failure {
    Failure { kind: FailureKind::Tokenizer, sentence: error.to_string() }
}

fn panicked(what: &str, panic: &(dyn std::any::Any + Send)) -> Failure {
    let message = panic.downcast_ref::<String>().map(String::as_str);
    let message = message.or_else(|| panic.downcast_ref::<&str>().copied());
    let message = message.unwrap_or("no message").replace('\n', " ");
    let sentence = format!("{what} of the request panicked, which is a bug: {message}");
    Failure { kind: FailureKind::Panic, sentence }
}
