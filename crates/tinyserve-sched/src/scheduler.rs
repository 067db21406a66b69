//! Who runs next: a state machine that plans a step, runs it and hands its results out.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::time::Duration;

use smallvec::SmallVec;
use tinyserve_kernels::{Attention, PageLists};
use tinyserve_kv::{KvError, PageId, Prefix};
use tinyserve_model::{Batch, LogitRows, ModelError, SequenceStep};

use crate::adaptive::Controller;
use crate::intake::{Intake, Submission};
use crate::metrics::{Metrics, count, gauge};
use crate::sequence::{End, Sequence};
use crate::session::{Kept, SessionInfo, Sessions};
use crate::{
    AttentionChoice, EngineConfig, Event, Failure, FailureKind, FinishReason, Finished, RequestId, Runner, Stats,
};

mod commit;
mod hooks;
mod saved;

/// Sequences of a step that need no allocation.
const ON_STACK: usize = 16;

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

    /// Hands out, in order: one token to each sequence that decodes, chunks of prompts to those
    /// that run already, then places to those that wait.
    fn plan(&mut self) {
        let mut budget = self.config.max_num_batched_tokens;
        let preemptions = self.metrics.preemptions.load(std::sync::atomic::Ordering::Relaxed);
        for decoding in [true, false] {
            let mut i = 0;
            while i < self.running.len() && budget > 0 {
                let sequence = &self.running[i];
                if sequence.planned == 0 && sequence.is_decoding() == decoding {
                    self.reserve(i, &mut budget);
                }
                i += 1;
            }
        }
        if self.metrics.preemptions.load(std::sync::atomic::Ordering::Relaxed) > preemptions {
            // Who waits would take the pages that were just taken from somebody.
            return;
        }
        while self.running.len() < self.config.max_num_seqs && budget > 0 {
            let Some(index) = self.next_waiting().and_then(|next| self.start(next)) else { break };
            self.reserve(index, &mut budget);
        }
    }

    /// Plans the next tokens of a running sequence, as many as `budget` and pages allow.
    ///
    /// Pages come, in order, from the free ones, from sessions that rest, and from running
    /// sequences that come later: lowest priority first, newest first.
    fn reserve(&mut self, index: usize, budget: &mut usize) {
        if !self.prune(index, budget) {
            return;
        }
        let most = self.config.attention_chunk_size.min(*budget);
        let wanted = self.running[index].uniform(most);
        let planned = loop {
            if self.runner.extend(&mut self.running[index].table, wanted).is_ok() {
                break wanted;
            }
            if self.evict_session(None) {
                continue;
            }
            let last = self.running.len() - 1;
            if last > index {
                *budget += self.preempt(last);
                continue;
            }
            // Nobody comes later: take what there is, or wait for those who come before.
            let table = &mut self.running[index].table;
            let page_size = table.page_size();
            let room = (table.pages().len() + self.runner.pool().free_pages()) * page_size;
            let room = wanted.min(room - table.len());
            break if room > 0 && self.runner.extend(table, room).is_ok() { room } else { 0 };
        };
        self.running[index].planned = planned;
        *budget -= planned;
    }

    /// Prunes what is to be pruned before the next token of a running sequence; tells whether that
    /// is done. Where it needs pages, they come from where [`Self::reserve`] has them from.
    fn prune(&mut self, index: usize, budget: &mut usize) -> bool {
        loop {
            let sequence = &mut self.running[index];
            match hooks::prune(&mut self.runner, sequence) {
                Ok(()) => return true,
                Err(ModelError::Kv(KvError::OutOfPages { .. })) => {
                    if self.evict_session(None) {
                        continue;
                    }
                    let last = self.running.len() - 1;
                    if last > index {
                        *budget += self.preempt(last);
                        continue;
                    }
                    if last == 0 {
                        // Nobody is left to wait for: pages that nobody else knows can be pruned
                        // where they are.
                        sequence.shares = false;
                        *budget += self.preempt(index);
                    }
                    return false;
                }
                Err(error) => {
                    let failure = hooks::cannot_prune(sequence, &error);
                    sequence.end_with(End::Failed(failure));
                    return false;
                }
            }
        }
    }

    /// Takes the pages of a running sequence away, to be computed again later; returns the tokens
    /// that had been planned for it.
    fn preempt(&mut self, index: usize) -> usize {
        let mut sequence = self.running.remove(index);
        let planned = sequence.planned;
        self.runner.release(sequence.begin_again());
        count(&self.metrics.preemptions, 1);
        insert(&mut self.waiting, sequence);
        planned
    }

    /// The first that waits for nothing but capacity: of each session, the oldest request waits
    /// for the one that runs, and the others wait for the oldest.
    fn next_waiting(&self) -> Option<usize> {
        self.waiting.iter().position(|sequence| {
            let Some(session) = &sequence.session else { return true };
            let same = |other: &&Sequence| other.session.as_ref() == Some(session);
            self.running.iter().find(same).is_none()
                && self.waiting.iter().filter(same).all(|other| other.id >= sequence.id)
        })
    }

    /// Lets a waiting sequence run if its tokens fit beside those that run; returns its place.
    fn start(&mut self, index: usize) -> Option<usize> {
        let sequence = &self.waiting[index];
        let page_size = sequence.table.page_size();
        let session = sequence.session.as_deref();
        let kept = session.and_then(|session| self.sessions.kept(session));
        let of_session = kept.map_or(0, |kept| reusable(sequence, kept));
        let prefix = sharable(sequence);
        // Prompts whose every token is scored are computed whole.
        let shares = sequence.prompt_logprobs.is_none() && sequence.shares;
        let known = if shares { self.runner.known(prefix) } else { 0 };
        let shares = known > of_session;
        let reused = of_session.max(known);
        let reused_pages =
            if shares { 0 } else { kept.map_or(0, |kept| kept.pages_of(of_session)) };
        // Where tokens were pruned, a few fewer would do.
        let needed = (sequence.tokens.len() - reused + 1).div_ceil(page_size);
        let own = kept.map_or(0, |kept| kept.table.pages().len() - reused_pages);
        let others = self.sessions.kept_pages(session);
        // Pages that only the index holds are available until they are shared.
        let shared = if shares { known / page_size } else { 0 };
        let available = (self.runner.available_pages() + own + others).saturating_sub(shared);
        // Each that runs may need a page soon; it would have to be taken away again.
        if !self.running.is_empty() && needed + self.running.len() > available {
            return None;
        }
        let mut sequence = self.waiting.remove(index);
        let kept = sequence.session.as_deref().and_then(|session| self.sessions.take(session));
        let mut left = reused;
        match kept {
            Some(Kept { table, .. }) if shares => self.runner.release(table),
            Some(Kept { mut table, tokens, dense, prunings, .. }) => {
                if reused < tokens.len() {
                    // A sealed page of codes goes whole.
                    left = self.runner.truncate(&mut table, reused);
                } else {
                    sequence.prunings = prunings;
                }
                sequence.table = table;
                // What follows tokens of selecting steps is not what any request would compute.
                sequence.dense = if left > dense { dense } else { usize::MAX };
            }
            None => {}
        }
        if shares {
            sequence.table = self.runner.start(sharable(&sequence));
        }
        let reused = if shares { sequence.table.len() } else { left };
        self.tell_started(&mut sequence, reused);
        Some(insert(&mut self.running, sequence))
    }

    fn tell_started(&mut self, sequence: &mut Sequence, cached_tokens: usize) {
        // One that comes back after a preemption has left the queue already.
        if sequence.place.take().is_none() {
            return;
        }
        let now = self.config.clock.now();
        let queued = now.saturating_duration_since(sequence.times.submitted);
        sequence.times.started = Some(now);
        sequence.cached_tokens = cached_tokens;
        count(&self.metrics.prompt_tokens, sequence.prompt_len as u64);
        count(&self.metrics.cached_tokens, cached_tokens as u64);
        self.metrics.queue_time.record(queued);
        sequence.events.send(Event::Started { cached_tokens, queued });
    }

    /// Runs the planned tokens of `members` together; if that fails, each alone, so that only
    /// those that fail alone do fail.
    fn run(&mut self, members: &[usize]) {
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
        let dense = sequence.dense_tokens();
        let Sequence { table, mut tokens, session, cache_salt, events, prunings, .. } = sequence;
        let kept = match session {
            Some(session) => {
                let total = tokens.len();
                tokens.truncate(table.next_position());
                let keeps = !failed && !table.is_empty();
                if keeps {
                    let prunings = prunings.into_made();
                    let kept = Kept { table, tokens, cache_salt, dense, prunings };
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
            let evicted = stats.evicted_for_room + stats.evicted_for_limit;
            gauge(&self.metrics.prefix_hits, stats.hits as usize);
            gauge(&self.metrics.prefix_evicted_pages, evicted as usize);
        }
    }

    /// Offers the pages of a sequence, which has not failed, to requests that begin alike.
    fn remember(&mut self, sequence: &mut Sequence) {
        let dense = sequence.dense_tokens();
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
        self.set_gauges();
        existed
    }

    /// Deletes all sessions.
    pub fn clear_sessions(&mut self) {
        self.sessions.clear(&mut self.runner);
        self.set_gauges();
    }
}

/// What is measured in some steps only.
#[derive(Debug, Clone, Copy)]
struct Sampled {
    measure_recall: bool,
    list_pages: bool,
}

/// What the sequences of a step selected.
#[derive(Debug, Default)]
struct Selected {
    /// The number of the step among those in which somebody decoded.
    step: u64,
    /// In the order of the batch: the request, and how many of its tokens were pruned. After a
    /// pruning pages have other numbers.
    sequences: Vec<(RequestId, u64)>,
    lists: PageLists,
}

/// Puts a sequence into its place by rank; returns the place.
fn insert(sequences: &mut Vec<Sequence>, sequence: Sequence) -> usize {
    let index = sequences.partition_point(|other| other.rank < sequence.rank);
    sequences.insert(index, sequence);
    index
}

/// Tokens at the start of a sequence that a session's pages hold, one fewer than it has at most:
/// the last token is always computed, for its logits.
///
/// A cut inside a page would leave a box that is larger than its keys, so cuts are whole pages.
fn reusable(sequence: &Sequence, kept: &Kept) -> usize {
    if sequence.cache_salt != kept.cache_salt || sequence.prompt_logprobs.is_some() {
        return 0;
    }
    let most = sequence.tokens.len() - 1;
    let intact = kept.table.intact();
    let same = sequence.tokens.iter().zip(&kept.tokens).take_while(|(a, b)| a == b).count();
    let page_size = kept.table.page_size();
    match same.min(most) {
        all if all == kept.tokens.len() => all,
        // Where tokens were pruned, what lies behind them is all that follows or nothing.
        some => some.min(intact) - some.min(intact) % page_size,
    }
}

/// What of a sequence may be found among what others have computed, and one token more, which is
/// always computed, for its logits.
fn sharable(sequence: &Sequence) -> Prefix<'_> {
    let most = (sequence.alike().len() + 1).min(sequence.tokens.len());
    Prefix { salt: &sequence.cache_salt, tokens: &sequence.tokens[..most] }
}

/// What a sequence does in the step that is planned.
fn step(sequence: &Sequence) -> SequenceStep<'_> {
    let end = sequence.computed();
    let start = end - sequence.planned;
    let in_prompt = start < sequence.prompt_len;
    let logits = if in_prompt && sequence.prompt_logprobs.is_some() {
        LogitRows::All
    } else if end == sequence.tokens.len() {
        LogitRows::Last
    } else {
        LogitRows::None
    };
    let attention = if in_prompt { Attention::Dense } else { sequence.attention.as_kernel() };
    SequenceStep {
        tokens: &sequence.tokens[start..end],
        table: &sequence.table,
        attention,
        logits,
        observe: hooks::observe(sequence, end),
    }
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
