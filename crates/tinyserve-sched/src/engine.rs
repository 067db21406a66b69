//! The engine as its callers see it: one or several threads, each with a model and pages of its own.

use std::collections::HashMap;
use std::hash::{BuildHasher, BuildHasherDefault, DefaultHasher, Hash};
use std::path::PathBuf;
use std::sync::{Mutex, PoisonError};

use tinyserve_model::ModelError;

use crate::channel::{EventStream, Reply};
use crate::intake::Limits;
use crate::worker::{Command, EngineState, SessionFile, Worker};
use crate::{AdmissionError, EngineConfig, Request, RequestId, Runner, SessionInfo, Stats};

/// Tokens of a block by which the engine remembers who computed the beginning of a prompt.
const BLOCK: usize = 64;

/// Most blocks that it remembers; beyond, it forgets them all and starts again.
const MOST_BLOCKS: usize = 1 << 16;

/// A model that answers many requests at once, on a thread of its own, or several of them.
///
/// Every method may be called from any thread, and none waits for a step, except those whose
/// [`Reply`] is waited for. Dropping the engine ends all requests and its threads.
///
/// With several replicas, the requests of a session go to the same one. Another request goes to
/// the replica that computed the longest beginning of its prompt last, unless that one has more to
/// do than [`EngineConfig::max_num_seqs`] beyond the least loaded; else to the least loaded. A
/// replica whose thread has ended gets no more requests: those that it had have failed with a
/// sentence, and its sessions start again elsewhere.
#[derive(Debug)]
pub struct Engine {
    workers: Vec<Worker>,
    /// Which worker computed a block of tokens, with all before it, last.
    blocks: Mutex<HashMap<u64, usize>>,
    /// How much more a worker may have to do than another and still be preferred for what it holds.
    patience: u64,
}

impl Engine {
    /// Starts a thread named `name` that drives `runner`.
    ///
    /// # Errors
    /// When a setting is out of its range or the system refuses a thread.
    #[allow(clippy::needless_pass_by_value, reason = "an engine keeps its settings")]
    pub fn start<R: Runner + 'static>(
        name: &str,
        runner: R,
        config: EngineConfig,
    ) -> Result<Self, AdmissionError> {
        Self::start_replicas(name, vec![runner], &config)
    }

    /// Starts a thread for each of `replicas`, which are equal; their names are `name` and a number.
    ///
    /// # Errors
    /// As [`Self::start`], and when there is no replica.
    pub fn start_replicas<R: Runner + 'static>(
        name: &str,
        replicas: Vec<R>,
        config: &EngineConfig,
    ) -> Result<Self, AdmissionError> {
        if replicas.is_empty() {
            return Err(crate::config::setting("replicas", 0, "at least 1"));
        }
        let patience = config.max_num_seqs as u64;
        let workers = replicas
            .into_iter()
            .enumerate()
            .map(|(index, runner)| Worker::start((name, index), runner, config.clone()));
        let workers = workers.collect::<Result<_, _>>()?;
        Ok(Self { workers, blocks: Mutex::default(), patience })
    }

    /// Submits a request.
    ///
    /// # Errors
    /// When it can never be answered, too many requests wait, or the engine takes none.
    pub fn submit(&self, request: Request) -> Result<EventStream, AdmissionError> {
        let worker = match self.workers.len() {
            1 => 0,
            _ => self.choose(&request)?,
        };
        Ok(self.workers[worker].submit(request)?.of_replica(worker))
    }

    /// The worker for a request.
    fn choose(&self, request: &Request) -> Result<usize, AdmissionError> {
        if let Some(session) = &request.session {
            return self.of_session(session).ok_or(AdmissionError::Stopped);
        }
        let alive = self.alive();
        let loads = alive.map(|worker| (self.workers[worker].load(), worker));
        let (least, mut chosen) = loads.min().ok_or(AdmissionError::Stopped)?;
        let blocks: Vec<u64> = chained_blocks(&request.cache_salt, &request.prompt).collect();
        let mut known = self.blocks.lock().unwrap_or_else(PoisonError::into_inner);
        let holder = blocks.iter().map_while(|block| known.get(block)).last();
        if let Some(&holder) = holder
            && self.workers[holder].state() == EngineState::Running
            && self.workers[holder].load() <= least + self.patience
        {
            chosen = holder;
        }
        if known.len() + blocks.len() > MOST_BLOCKS {
            known.clear();
        }
        known.extend(blocks.into_iter().map(|block| (block, chosen)));
        Ok(chosen)
    }

    /// Workers that take requests.
    fn alive(&self) -> impl Iterator<Item = usize> {
        let workers = self.workers.iter().enumerate();
        workers.filter(|(_, worker)| worker.state() != EngineState::Stopped).map(|(index, _)| index)
    }

    /// The worker of a session: the same as long as it lives (rendezvous hashing).
    fn of_session(&self, session: &str) -> Option<usize> {
        self.alive().max_by_key(|worker| hash((session, worker)))
    }

    /// Ends a request within one step and gives its pages back; does nothing if it has ended.
    pub fn abort(&self, id: RequestId) {
        self.workers.iter().for_each(|worker| worker.send(Command::Abort(id)));
    }

    /// Takes no more requests from now on; the reply comes when all are answered.
    pub fn drain(&self) -> Reply<()> {
        self.workers.iter().for_each(Worker::close);
        Reply::merged(self.workers.iter().map(|worker| worker.ask(Command::Drain)), |_| ())
    }

    /// Ends all requests and the threads, and waits for them.
    pub fn shutdown(&self) {
        self.workers.iter().for_each(Worker::shutdown);
    }

    /// What it is doing: running while at least one replica is.
    #[must_use]
    pub fn state(&self) -> EngineState {
        let states = self.workers.iter().map(Worker::state);
        states.min_by_key(|&state| state as u8).unwrap_or(EngineState::Stopped)
    }

    /// What each replica is doing.
    #[must_use]
    pub fn replica_states(&self) -> Vec<EngineState> {
        self.workers.iter().map(Worker::state).collect()
    }

    /// Sizes that requests have to fit. Pages are those of one replica.
    #[must_use]
    pub fn limits(&self) -> &Limits {
        self.workers[0].limits()
    }

    /// A look at its counters, those of all replicas added up; no step waits for it.
    #[must_use]
    pub fn stats(&self) -> Stats {
        let mut stats = self.workers[0].stats();
        self.workers[1..].iter().for_each(|worker| stats.add(&worker.stats()));
        stats
    }

    /// The counters of each replica.
    #[must_use]
    pub fn replica_stats(&self) -> Vec<Stats> {
        self.workers.iter().map(Worker::stats).collect()
    }

    /// Creates a session, unless it exists. A request creates the session that it names, too.
    pub fn create_session(&self, id: impl Into<String>) -> Reply<()> {
        let id = id.into();
        self.ask_about(&id.clone(), |reply| Command::CreateSession(id, reply))
    }

    /// The sessions, by name.
    pub fn list_sessions(&self) -> Reply<Vec<SessionInfo>> {
        let replies = self.workers.iter().map(|worker| worker.ask(Command::ListSessions));
        Reply::merged(replies, |lists| {
            let mut all: Vec<_> = lists.into_iter().flatten().collect();
            all.sort_by(|a: &SessionInfo, b| a.id.cmp(&b.id));
            all
        })
    }

    /// What is known of a session; the inner `None` means that there is none of this name.
    pub fn session_info(&self, id: impl Into<String>) -> Reply<Option<SessionInfo>> {
        let id = id.into();
        self.ask_about(&id.clone(), |reply| Command::SessionInfo(id, reply))
    }

    /// Deletes a session and gives its pages back; tells whether it existed. Its requests go on.
    pub fn delete_session(&self, id: impl Into<String>) -> Reply<bool> {
        let id = id.into();
        self.ask_about(&id.clone(), |reply| Command::DeleteSession(id, reply))
    }

    /// Saves the full pages that a session keeps between its requests to a file; the reply says how
    /// many tokens they hold. `identity` names what pages depend on beside tokens and layout.
    pub fn save_session(
        &self,
        id: impl Into<String>,
        path: impl Into<PathBuf>,
        identity: impl Into<String>,
    ) -> Reply<Result<usize, ModelError>> {
        let (id, path, identity) = (id.into(), path.into(), identity.into());
        let session = SessionFile { id, path, identity };
        self.ask_about(&session.id.clone(), |reply| Command::SaveSession(session, reply))
    }

    /// Restores a session from a file, in place of the one of this name.
    pub fn restore_session(
        &self,
        id: impl Into<String>,
        path: impl Into<PathBuf>,
        identity: impl Into<String>,
    ) -> Reply<Result<SessionInfo, ModelError>> {
        let (id, path, identity) = (id.into(), path.into(), identity.into());
        let session = SessionFile { id, path, identity };
        self.ask_about(&session.id.clone(), |reply| Command::RestoreSession(session, reply))
    }

    /// Asks the worker of a session; one that has stopped answers nothing.
    fn ask_about<T>(
        &self,
        session: &str,
        command: impl FnOnce(crate::channel::Responder<T>) -> Command,
    ) -> Reply<T> {
        self.workers[self.of_session(session).unwrap_or(0)].ask(command)
    }
}

/// Hashes of whole blocks of a prompt, each with all before it.
fn chained_blocks(salt: &str, prompt: &[u32]) -> impl Iterator<Item = u64> {
    let mut chain = hash(salt);
    prompt.chunks_exact(BLOCK).map(move |tokens| {
        chain = hash((chain, tokens));
        chain
    })
}

fn hash(parts: impl Hash) -> u64 {
    BuildHasherDefault::<DefaultHasher>::default().hash_one(parts)
}
