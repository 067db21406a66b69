//! One request inside a scheduler.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use tinyserve_kernels::{AttendStats, Attention, MOST_TOP_LOGITS};
use tinyserve_kv::{Budget, PageTable};
use tinyserve_model::Sampler;
use tinyserve_plugins::RequestPlugins;

use crate::channel::EventSender;
use crate::history::History;
use crate::metrics::Metrics;
use crate::text::TextStream;
use crate::{
    AttentionChoice, Event, Failure, FinishReason, KvUse, PromptToken, RequestId, StopReason,
    Summary, Timings, Usage,
};

/// Who comes first: the smaller. Waiting time is part of it, so it never changes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Rank {
    /// Nanoseconds from the scheduler's start to the arrival, plus the ageing time for each step
    /// of priority.
    due: i128,
    arrival: u64,
}

impl Rank {
    pub(crate) fn new(
        since_start: Duration,
        priority: i32,
        ageing: Duration,
        id: RequestId,
    ) -> Self {
        let due = since_start.as_nanos() as i128 + i128::from(priority) * ageing.as_nanos() as i128;
        Self { due, arrival: id.0 }
    }
}

/// How a sequence ends.
#[derive(Debug)]
pub(crate) enum End {
    Finished(FinishReason, Option<StopReason>),
    Aborted,
    Failed(Failure),
}

/// Counts a request among those that wait, until it is dropped.
#[derive(Debug)]
pub(crate) struct QueuePlace {
    pub(crate) metrics: Arc<Metrics>,
    pub(crate) tokens: usize,
}

impl Drop for QueuePlace {
    fn drop(&mut self) {
        self.metrics.queued_requests.fetch_sub(1, Ordering::Relaxed);
        self.metrics.queued_tokens.fetch_sub(self.tokens, Ordering::Relaxed);
    }
}

/// A request, its tokens and its pages.
#[derive(Debug)]
pub(crate) struct Sequence {
    pub(crate) id: RequestId,
    pub(crate) rank: Rank,
    pub(crate) events: EventSender,
    pub(crate) attention: AttentionChoice,
    /// Whether `attention` is the engine's, whose budget may move.
    pub(crate) adapts: bool,
    pub(crate) max_tokens: usize,
    pub(crate) min_tokens: usize,
    /// End-of-sequence tokens that end it; none when they are ignored.
    pub(crate) eos: Vec<u32>,
    pub(crate) stop_tokens: Vec<u32>,
    /// `eos` and `stop_tokens`: what must not be drawn before `min_tokens`.
    pub(crate) banned: Vec<u32>,
    pub(crate) top_logprobs: usize,
    pub(crate) prompt_logprobs: Option<usize>,
    /// Prompt tokens whose log-probabilities were told.
    pub(crate) prompt_told: usize,
    pub(crate) session: Option<String>,
    pub(crate) cache_salt: String,
    pub(crate) sampler: Sampler,
    pub(crate) text: TextStream,
    pub(crate) plugins: RequestPlugins,
    /// The prompt, then what was generated.
    pub(crate) tokens: Vec<u32>,
    pub(crate) prompt_len: usize,
    /// The pages; between steps they hold the first `computed()` of `tokens`, less what is pruned.
    pub(crate) table: PageTable,
    /// Tokens that the step being planned computes.
    pub(crate) planned: usize,
    /// Whether none of its steps has run since it got its pages.
    pub(crate) fresh: bool,
    /// How its tokens were computed, by earlier requests of its session too. Of its own answer, how
    /// tokens were computed before the budget moved last; later ones as `attention` says.
    pub(crate) history: History,
    /// Whether it shares pages with others; not after it found no room to prune what it shared.
    pub(crate) shares: bool,
    /// Whether its prompt's pages were offered to others.
    pub(crate) remembered: bool,
    /// Tokens that had been computed, by earlier requests of its session or before its pages were
    /// taken away. If they are computed again, then behind the backs of plugins, who have seen what
    /// there was to see, and with the same prunings in between.
    pub(crate) seen: usize,
    pub(crate) place: Option<QueuePlace>,
    pub(crate) cached_tokens: usize,
    pub(crate) kv: KvUse,
    pub(crate) times: Times,
    pub(crate) end: Option<End>,
}

/// When things happened to a sequence.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Times {
    pub(crate) submitted: Instant,
    pub(crate) started: Option<Instant>,
    pub(crate) prefilled: Option<Instant>,
    pub(crate) first_token: Option<Instant>,
    pub(crate) last_token: Option<Instant>,
    pub(crate) preemptions: u32,
}

impl Times {
    pub(crate) fn new(submitted: Instant) -> Self {
        Self {
            submitted,
            started: None,
            prefilled: None,
            first_token: None,
            last_token: None,
            preemptions: 0,
        }
    }

    fn summary(&self, now: Instant) -> Timings {
        let since = |later: Instant, earlier: Instant| later.saturating_duration_since(earlier);
        let started = self.started.unwrap_or(now);
        let prefilled = self.prefilled.unwrap_or(now);
        Timings {
            queued: since(started, self.submitted),
            prefill: since(prefilled, started),
            ttft: self.first_token.map(|first| since(first, self.submitted)),
            decode: self.last_token.map_or(Duration::ZERO, |last| since(last, prefilled)),
            e2e: since(now, self.submitted),
            preemptions: self.preemptions,
        }
    }
}

impl Sequence {
    /// Of its tokens, those that were computed or are planned; pruned ones are counted.
    pub(crate) fn computed(&self) -> usize {
        self.table.next_position()
    }

    /// Tokens in the cache, those that are about to be pruned not counted.
    pub(crate) fn cached(&self) -> usize {
        self.table.len() - self.history.prunings.due(self.computed())
    }

    /// Tokens to compute before the next one is drawn.
    pub(crate) fn pending(&self) -> usize {
        self.tokens.len() - self.computed()
    }

    pub(crate) fn generated(&self) -> &[u32] {
        &self.tokens[self.prompt_len..]
    }

    /// How many of the likeliest tokens its next draw is told about, if it needs no other logits.
    pub(crate) fn decided_by(&self) -> Option<usize> {
        let k = self.sampler.decided_by()?.max(self.top_logprobs);
        let few = k <= MOST_TOP_LOGITS && self.banned_now().is_empty();
        (few && self.plugins.is_idle()).then_some(k)
    }

    /// Tokens that must not be drawn next.
    pub(crate) fn banned_now(&self) -> &[u32] {
        let early = self.generated().len() < self.min_tokens;
        if early { &self.banned } else { &[] }
    }

    /// Whether its next step computes the one token that was drawn last.
    pub(crate) fn is_decoding(&self) -> bool {
        self.pending() == 1 && !self.generated().is_empty()
    }

    /// Whether the planned step computes the one token that was drawn last.
    pub(crate) fn is_planned_decode(&self) -> bool {
        let end = self.computed();
        self.planned == 1 && end > self.prompt_len && end == self.tokens.len()
    }

    /// Whether its next tokens, or those that are planned, are prompt tokens to be scored.
    pub(crate) fn scores_prompt(&self) -> bool {
        self.prompt_logprobs.is_some() && self.computed() - self.planned < self.prompt_len
    }

    /// Most tokens that one step may compute: prompts read every page and what was generated
    /// selects, so a step has only one of them.
    pub(crate) fn uniform(&self, most: usize) -> usize {
        let done = self.computed();
        let (attention, end) = self.attention_at(done);
        let end = self.history.prunings.next().map_or(end, |pruning| end.min(pruning.computed));
        let end = if done < self.seen { end.min(self.seen) } else { end };
        let end = match attention {
            Attention::Dense => end,
            Attention::Policy(policy) if policy.ignores_newest_page() => end,
            // Later tokens would be seen in the newest page.
            _ if done < self.prompt_len => done + 1,
            _ => end.min(self.reads_all_until().max(done + 1)),
        };
        most.min(end - done)
    }

    /// Which pages the token at position `at` reads, and the position up to which that holds.
    pub(crate) fn attention_at(&self, at: usize) -> (Attention<'_>, usize) {
        match self.history.selection_at(at) {
            (Some(attention), end) => (attention.as_kernel(), end),
            (None, end) if at < self.prompt_len => (Attention::Dense, end.min(self.prompt_len)),
            (None, end) => (self.attention.as_kernel(), end.min(self.tokens.len())),
        }
    }

    /// Tokens that were computed at some time, whether its pages hold them now or not.
    pub(crate) fn ever_computed(&self) -> usize {
        self.seen.max(self.computed() - self.planned)
    }

    /// Writes into its history how its own answer was computed until now.
    pub(crate) fn note_selected(&mut self) {
        let start = self.reads_all_until().max(self.history.select_end());
        self.history.select(start..self.ever_computed(), &self.attention);
    }

    /// Its first so many tokens, pruned ones counted, read all that comes before them.
    fn reads_all_until(&self) -> usize {
        match &self.attention {
            AttentionChoice::Dense => usize::MAX,
            // The token at position `p` sees `p + 1` tokens.
            AttentionChoice::Policy(policy) => {
                self.prompt_len.max(policy.min_context.saturating_sub(1))
            }
            AttentionChoice::Custom(_) => self.prompt_len,
        }
    }

    /// Gives its pages up, to compute what they held again later.
    pub(crate) fn begin_again(&mut self) -> PageTable {
        self.seen = self.ever_computed();
        let empty = PageTable::new(self.table.page_size());
        let table = std::mem::replace(&mut self.table, empty);
        self.planned = 0;
        self.remembered = false;
        self.times.preemptions += 1;
        self.history.prunings.rewind();
        table
    }

    /// Of its tokens, those from the first on that any request computes alike: they read all that
    /// comes before them.
    pub(crate) fn alike(&self) -> &[u32] {
        let alike = self.reads_all_until().min(self.history.alike(usize::MAX));
        &self.tokens[..alike.min(self.tokens.len())]
    }

    /// Whether the budget of the engine's policy decides what its next step reads.
    pub(crate) fn follows_budget(&self) -> bool {
        let AttentionChoice::Policy(policy) = &self.attention else { return false };
        let kept = policy.sink_pages.saturating_add(policy.recent_pages.max(1));
        let pages = self.table.pages().len();
        self.adapts && self.table.len() >= policy.min_context && pages > kept
    }

    /// What names the pages that it selects from one step to the next.
    pub(crate) fn selects_as(&self) -> (RequestId, u64) {
        (self.id, self.kv.pruned_tokens)
    }

    /// Moves the budget of the engine's policy.
    pub(crate) fn set_budget(&mut self, budget: Budget) {
        if !self.adapts {
            return;
        }
        self.note_selected();
        if let AttentionChoice::Policy(policy) = &mut self.attention {
            policy.budget = budget;
        }
    }

    pub(crate) fn note_decode(&mut self, read: &AttendStats) {
        self.kv.decode_steps += 1;
        self.kv.decode.add(read);
    }

    pub(crate) fn is_stop_token(&self, id: u32) -> Option<StopReason> {
        if self.eos.contains(&id) {
            return Some(StopReason::EndOfSequence(id));
        }
        self.stop_tokens.contains(&id).then_some(StopReason::Token(id))
    }

    /// Ends it with `end`, unless it has ended already.
    pub(crate) fn end_with(&mut self, end: End) {
        self.end.get_or_insert(end);
    }

    /// Tells its prompt's next log-probabilities.
    pub(crate) fn tell_prompt(&mut self, tokens: Vec<PromptToken>) {
        if !tokens.is_empty() {
            self.prompt_told += tokens.len();
            self.events.send(Event::Prompt(tokens));
        }
    }

    /// The terminal event of a sequence that has ended.
    pub(crate) fn summary(&self, rest: String, now: Instant) -> Summary {
        Summary {
            rest,
            usage: Usage {
                prompt_tokens: self.prompt_len,
                cached_tokens: self.cached_tokens,
                completion_tokens: self.generated().len(),
            },
            timings: self.times.summary(now),
            kv: KvUse { pages: self.table.pages().len(), ..self.kv },
        }
    }
}
