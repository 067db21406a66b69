//! Sessions: pages that stay between the requests of a conversation.

use std::collections::BTreeMap;
use std::time::{Duration, Instant, SystemTime};

use tinyserve_kv::PageTable;

use crate::history::History;
use crate::sequence::Sequence;
use crate::{Clock, Runner};

/// What is known of a session.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SessionInfo {
    /// Its name.
    pub id: String,
    /// When it was created.
    pub created_at: SystemTime,
    /// When its last request arrived or ended.
    pub last_activity: SystemTime,
    /// Requests that have ended.
    pub request_count: u64,
    /// Their tokens, prompts and answers.
    pub total_tokens: u64,
    /// Tokens whose keys and values it holds.
    pub cached_tokens: usize,
    /// Pages that it holds while no request of it runs.
    pub cached_pages: usize,
}

/// One session.
#[derive(Debug)]
struct Session {
    created_at: SystemTime,
    last_activity: SystemTime,
    used: Instant,
    request_count: u64,
    total_tokens: u64,
    /// Requests of it that wait or run.
    open_requests: usize,
    /// What is left of it while none of its requests runs.
    kept: Option<Kept>,
}

/// What is left of a session between two requests. Its pages may go; the next request then computes
/// the tokens again, and gets what it would have found.
#[derive(Debug)]
pub(crate) struct Kept {
    /// Pages of the first tokens.
    pub(crate) table: PageTable,
    /// The tokens that were computed; some may be pruned.
    pub(crate) tokens: Vec<u32>,
    pub(crate) cache_salt: String,
    pub(crate) history: History,
}

impl Kept {
    /// Tokens at the start of a sequence that go on from here, one fewer than it has at most: the
    /// last token is always computed, for its logits.
    ///
    /// A cut inside a page would leave a box that is larger than its keys, so cuts are whole pages.
    pub(crate) fn continued_by(&self, sequence: &Sequence) -> usize {
        if sequence.cache_salt != self.cache_salt || sequence.prompt_logprobs.is_some() {
            return 0;
        }
        let most = sequence.tokens.len() - 1;
        let same = sequence.tokens.iter().zip(&self.tokens).take_while(|(a, b)| a == b).count();
        let page_size = self.table.page_size();
        match same.min(most) {
            all if all == self.tokens.len() => all,
            // Where tokens were pruned, what lies behind them is all that follows or nothing.
            some => {
                let intact = some.min(self.history.prunings.intact());
                intact - intact % page_size
            }
        }
    }

    /// Tokens that the pages hold of those that go on, pruned ones counted.
    pub(crate) fn reusable(&self, continued: usize) -> usize {
        continued.min(self.table.next_position())
    }

    /// Pages that hold the first `reused` tokens, of which pruned ones are either all or none.
    pub(crate) fn pages_of(&self, reused: usize) -> usize {
        let all = reused == self.table.next_position();
        let places = if all { self.table.len() } else { reused };
        places.div_ceil(self.table.page_size())
    }

    /// Takes the pages away.
    fn begin_again(&mut self) -> PageTable {
        self.history.prunings.rewind();
        let empty = PageTable::new(self.table.page_size());
        std::mem::replace(&mut self.table, empty)
    }
}

/// The sessions of an engine.
#[derive(Debug)]
pub(crate) struct Sessions {
    by_id: BTreeMap<String, Session>,
    clock: Clock,
    timeout: Duration,
}

impl Sessions {
    pub(crate) fn new(clock: Clock, timeout: Duration) -> Self {
        Self { by_id: BTreeMap::new(), clock, timeout }
    }

    pub(crate) fn len(&self) -> usize {
        self.by_id.len()
    }

    /// Creates a session, unless it exists.
    pub(crate) fn create(&mut self, id: &str) {
        if !self.by_id.contains_key(id) {
            let now = self.clock.time_of_day();
            let session = Session {
                created_at: now,
                last_activity: now,
                used: self.clock.now(),
                request_count: 0,
                total_tokens: 0,
                open_requests: 0,
                kept: None,
            };
            self.by_id.insert(id.to_owned(), session);
        }
    }

    /// A request of the session arrived.
    pub(crate) fn open(&mut self, id: &str) {
        self.create(id);
        let (now, used) = (self.clock.time_of_day(), self.clock.now());
        if let Some(session) = self.by_id.get_mut(id) {
            session.open_requests += 1;
            (session.last_activity, session.used) = (now, used);
        }
    }

    /// A request of the session ended after `tokens` tokens, prompt and answer, and leaves `kept`,
    /// which comes back if the session is gone.
    pub(crate) fn close(&mut self, id: &str, tokens: usize, kept: Option<Kept>) -> Option<Kept> {
        let (now, used) = (self.clock.time_of_day(), self.clock.now());
        let Some(session) = self.by_id.get_mut(id) else { return kept };
        session.open_requests = session.open_requests.saturating_sub(1);
        session.request_count += 1;
        session.total_tokens += tokens as u64;
        (session.last_activity, session.used) = (now, used);
        match kept {
            Some(kept) => session.kept.replace(kept),
            None => None,
        }
    }

    /// Requests of the session that wait or run.
    pub(crate) fn open_requests(&self, id: &str) -> usize {
        self.by_id.get(id).map_or(0, |session| session.open_requests)
    }

    /// Leaves `kept` to a session; returns what it had, or `kept` if there is no such session.
    pub(crate) fn keep(&mut self, id: &str, kept: Kept) -> Option<Kept> {
        let (now, used) = (self.clock.time_of_day(), self.clock.now());
        let Some(session) = self.by_id.get_mut(id) else { return Some(kept) };
        (session.last_activity, session.used) = (now, used);
        session.kept.replace(kept)
    }

    /// Takes what is left of the session.
    pub(crate) fn take(&mut self, id: &str) -> Option<Kept> {
        self.by_id.get_mut(id)?.kept.take()
    }

    pub(crate) fn kept(&self, id: &str) -> Option<&Kept> {
        self.by_id.get(id)?.kept.as_ref()
    }

    /// The tables of sessions that rest.
    pub(crate) fn tables(&self) -> impl Iterator<Item = &PageTable> {
        self.by_id.values().filter_map(|session| Some(&session.kept.as_ref()?.table))
    }

    /// Pages that sessions other than `but` hold.
    pub(crate) fn kept_pages(&self, but: Option<&str>) -> usize {
        let others = self.by_id.iter().filter(|(id, _)| Some(id.as_str()) != but);
        others.filter_map(|(_, session)| Some(session.kept.as_ref()?.table.pages().len())).sum()
    }

    /// Gives the pages of the least recently used session other than `but` back; tells whether
    /// there was one.
    pub(crate) fn evict<R: Runner>(&mut self, runner: &mut R, but: Option<&str>) -> bool {
        let others = self.by_id.iter_mut().filter(|(id, _)| Some(id.as_str()) != but);
        let with_pages = others.filter_map(|(_, session)| {
            let kept = session.kept.as_mut().filter(|kept| !kept.table.pages().is_empty())?;
            Some((session.used, kept))
        });
        match with_pages.min_by_key(|(used, _)| *used) {
            Some((_, kept)) => {
                runner.release(kept.begin_again());
                true
            }
            None => false,
        }
    }

    /// Deletes a session; tells whether it existed. Requests of it go on, and keep nothing.
    pub(crate) fn delete<R: Runner>(&mut self, runner: &mut R, id: &str) -> bool {
        let Some(session) = self.by_id.remove(id) else { return false };
        if let Some(kept) = session.kept {
            runner.release(kept.table);
        }
        true
    }

    /// Deletes sessions that nobody used for too long; tells how many.
    pub(crate) fn expire<R: Runner>(&mut self, runner: &mut R) -> usize {
        let (now, timeout) = (self.clock.now(), self.timeout);
        let expired = |session: &Session| {
            session.open_requests == 0 && now.saturating_duration_since(session.used) >= timeout
        };
        let ids: Vec<_> = self
            .by_id
            .iter()
            .filter(|(_, session)| expired(session))
            .map(|(id, _)| id.clone())
            .collect();
        for id in &ids {
            self.delete(runner, id);
        }
        ids.len()
    }

    /// How long until the next session expires, if one does: a timeout may lie beyond all times.
    pub(crate) fn next_expiry(&self) -> Option<Duration> {
        let now = self.clock.now();
        let idle = self.by_id.values().filter(|session| session.open_requests == 0);
        let expiries = idle.filter_map(|session| session.used.checked_add(self.timeout));
        expiries.map(|expiry| expiry.saturating_duration_since(now)).min()
    }

    /// Deletes all sessions.
    pub(crate) fn clear<R: Runner>(&mut self, runner: &mut R) {
        let ids: Vec<_> = self.by_id.keys().cloned().collect();
        for id in ids {
            self.delete(runner, &id);
        }
    }

    pub(crate) fn info(&self, id: &str) -> Option<SessionInfo> {
        let session = self.by_id.get(id)?;
        let kept = session.kept.as_ref();
        Some(SessionInfo {
            id: id.to_owned(),
            created_at: session.created_at,
            last_activity: session.last_activity,
            request_count: session.request_count,
            total_tokens: session.total_tokens,
            cached_tokens: kept.map_or(0, |kept| kept.table.len()),
            cached_pages: kept.map_or(0, |kept| kept.table.pages().len()),
        })
    }

    pub(crate) fn list(&self) -> Vec<SessionInfo> {
        self.by_id.keys().filter_map(|id| self.info(id)).collect()
    }
}
