//! Who gets tokens in the next step, and whose pages.

use std::sync::atomic::Ordering;

use tinyserve_kv::{KvError, Prefix};
use tinyserve_model::ModelError;

use super::{MOST_SCORED_TOKENS, Scheduler, hooks, insert};
use crate::metrics::count;
use crate::sequence::{End, Sequence};
use crate::session::Kept;
use crate::{Event, Runner};

impl<R: Runner> Scheduler<R> {
    /// Hands out, in order: one token to each sequence that decodes, chunks of prompts to those
    /// that run already, then places to those that wait.
    pub(super) fn plan(&mut self) {
        let mut budget = self.config.max_num_batched_tokens;
        let preemptions = self.metrics.preemptions.load(Ordering::Relaxed);
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
        let preempted = self.metrics.preemptions.load(Ordering::Relaxed) > preemptions;
        if preempted && !self.running.is_empty() {
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
        let mut most = self.config.attention_chunk_size.min(*budget);
        if self.running[index].scores_prompt() {
            let scoring = self.running.iter().filter(|sequence| sequence.scores_prompt());
            most = most.min(MOST_SCORED_TOKENS - scoring.map(|s| s.planned).sum::<usize>());
        }
        if most == 0 {
            return;
        }
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
        let sequence = &mut self.running[index];
        sequence.planned = planned;
        sequence.plugins.plan();
        *budget -= planned;
    }

    /// Prunes what is to be pruned before the next token of a running sequence; tells whether that
    /// is done. Where it needs pages, they come from where [`Self::reserve`] has them from.
    fn prune(&mut self, index: usize, budget: &mut usize) -> bool {
        loop {
            match hooks::prune(&mut self.runner, &mut self.running[index]) {
                Ok(()) => return true,
                Err(ModelError::Kv(KvError::OutOfPages { .. })) => {}
                Err(error) => {
                    let sequence = &mut self.running[index];
                    let failure = hooks::cannot_prune(sequence, &error);
                    sequence.end_with(End::Failed(failure));
                    return false;
                }
            }
            if self.evict_session(None) {
                continue;
            }
            let last = self.running.len() - 1;
            if last > index {
                *budget += self.preempt(last);
                continue;
            }
            if last == 0 {
                // Nobody is left to wait for: pages that nobody else knows can be pruned where
                // they are.
                self.running[index].shares = false;
                *budget += self.preempt(index);
            }
            return false;
        }
    }

    /// Takes the pages of a running sequence away, to be computed again later; returns the tokens
    /// that had been planned for it.
    fn preempt(&mut self, index: usize) -> usize {
        let mut sequence = self.running.remove(index);
        let planned = sequence.planned;
        self.runner.release(sequence.begin_again());
        sequence.events.tell();
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
        let continued = kept.map_or(0, |kept| kept.continued_by(sequence));
        let of_session = kept.map_or(0, |kept| kept.reusable(continued));
        let alike = kept.map_or(usize::MAX, |kept| kept.history.alike(continued));
        let prefix = sharable(sequence, alike);
        // Prompts whose every token is scored are computed whole, and those whose attention a plugin
        // adds up: it would miss what the pages of others have received.
        let whole = sequence.prompt_logprobs.is_some() || sequence.plugins.needs().attention_mass;
        let may_share = sequence.shares && !whole;
        let known = if may_share { self.runner.known(prefix) } else { 0 };
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
        if let Some(Kept { mut table, tokens, mut history, .. }) = kept {
            if continued < tokens.len() {
                history.truncate(continued);
            }
            if shares {
                history.prunings.rewind();
                self.runner.release(table);
            } else {
                if of_session < table.next_position() {
                    // A sealed page of codes goes whole.
                    left = self.runner.truncate(&mut table, of_session);
                }
                sequence.table = table;
            }
            (sequence.history, sequence.seen) = (history, continued);
        }
        // A prompt that nobody knows is looked up, too, and counted as one that was not found.
        if shares || of_session == 0 && may_share {
            let prefix = sharable(&sequence, usize::MAX);
            sequence.table = self.runner.start(prefix);
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
}

/// What of a sequence, of whose first tokens any request computes so many alike, may be found among
/// what others have computed, and one token more, which is always computed, for its logits.
fn sharable(sequence: &Sequence, alike: usize) -> Prefix<'_> {
    let most = (sequence.alike().len().min(alike) + 1).min(sequence.tokens.len());
    Prefix { salt: &sequence.cache_salt, tokens: &sequence.tokens[..most] }
}
