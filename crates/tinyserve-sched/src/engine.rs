//! An engine: one thread that owns a scheduler, and the handle through which others talk to it.

use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;

use crate::channel::{EventStream, Reply, Responder, reply};
use crate::intake::{Intake, Limits, Submission};
use crate::metrics::{Metrics, count};
use crate::{
    AdmissionError, EngineConfig, Request, RequestId, Runner, Scheduler, SessionInfo, Stats,
};

/// What an engine is doing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum EngineState {
    /// It takes requests.
    Running,
    /// It answers the requests that it has, and takes no more.
    Draining,
    /// Its thread has ended.
    Stopped,
}

/// What the thread is told.
enum Command {
    Submit(Submission),
    Abort(RequestId),
    CreateSession(String, Responder<()>),
    ListSessions(Responder<Vec<SessionInfo>>),
    SessionInfo(String, Responder<Option<SessionInfo>>),
    DeleteSession(String, Responder<bool>),
    Drain(Responder<()>),
    Shutdown,
}

/// A model that answers many requests at once, on a thread of its own.
///
/// Every method may be called from any thread, and none waits for a step, except those whose
/// [`Reply`] is waited for. Dropping the engine ends all requests and the thread.
#[derive(Debug)]
pub struct Engine {
    intake: Arc<Intake>,
    metrics: Arc<Metrics>,
    commands: Sender<Command>,
    state: Arc<State>,
    thread: Mutex<Option<JoinHandle<()>>>,
}

/// The engine's state, for all threads.
#[derive(Debug, Default)]
struct State(AtomicU8);

impl State {
    fn get(&self) -> EngineState {
        match self.0.load(Ordering::Acquire) {
            0 => EngineState::Running,
            1 => EngineState::Draining,
            _ => EngineState::Stopped,
        }
    }

    /// Moves on; there is no way back.
    fn advance(&self, to: EngineState) {
        self.0.fetch_max(to as u8, Ordering::AcqRel);
    }
}

/// Says that the thread has ended, however it did.
struct Ended(Arc<State>);

impl Drop for Ended {
    fn drop(&mut self) {
        self.0.advance(EngineState::Stopped);
    }
}

impl Engine {
    /// Starts a thread named `name` that drives `runner`.
    ///
    /// # Errors
    /// When a setting is out of its range or the system refuses a thread.
    pub fn start<R: Runner + 'static>(
        name: &str,
        runner: R,
        config: EngineConfig,
    ) -> Result<Self, AdmissionError> {
        let scheduler = Scheduler::new(runner, config)?;
        let (intake, metrics) = (Arc::clone(scheduler.intake()), Arc::clone(scheduler.metrics()));
        let (commands, received) = channel();
        let state = Arc::new(State::default());
        let ended = Ended(Arc::clone(&state));
        let thread = std::thread::Builder::new().name(name.to_owned()).spawn(move || {
            let _ended = ended;
            drive(scheduler, &received);
        });
        let thread = thread.map_err(|error| {
            crate::config::setting("engine thread", error, "a thread that the system starts")
        })?;
        Ok(Self { intake, metrics, commands, state, thread: Mutex::new(Some(thread)) })
    }

    /// Submits a request.
    ///
    /// # Errors
    /// When it can never be answered, too many requests wait, or the engine takes none.
    pub fn submit(&self, request: Request) -> Result<EventStream, AdmissionError> {
        match self.state.get() {
            EngineState::Running => {}
            EngineState::Draining => return Err(AdmissionError::ShuttingDown),
            EngineState::Stopped => return Err(AdmissionError::Stopped),
        }
        let commands = self.commands.clone();
        let (submission, events) = self.intake.take(request, move |id| {
            // An engine that is gone has ended the request already.
            let _ = commands.send(Command::Abort(id));
        })?;
        self.commands.send(Command::Submit(submission)).map_err(|_| AdmissionError::Stopped)?;
        Ok(events)
    }

    /// Ends a request within one step and gives its pages back; does nothing if it has ended.
    pub fn abort(&self, id: RequestId) {
        let _ = self.commands.send(Command::Abort(id));
    }

    /// Takes no more requests from now on; the reply comes when all are answered.
    pub fn drain(&self) -> Reply<()> {
        self.state.advance(EngineState::Draining);
        self.ask(Command::Drain)
    }

    /// Ends all requests and the thread, and waits for it.
    pub fn shutdown(&self) {
        self.state.advance(EngineState::Draining);
        let _ = self.commands.send(Command::Shutdown);
        let thread = self.thread.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(thread) = thread {
            // A panic of the thread has been printed, and every request was told.
            let _ = thread.join();
        }
    }

    /// What it is doing.
    #[must_use]
    pub fn state(&self) -> EngineState {
        self.state.get()
    }

    /// Sizes that requests have to fit.
    #[must_use]
    pub fn limits(&self) -> &Limits {
        self.intake.limits()
    }

    /// A look at its counters; no step waits for it.
    #[must_use]
    pub fn stats(&self) -> Stats {
        self.metrics.read()
    }

    /// Creates a session, unless it exists. A request creates the session that it names, too.
    pub fn create_session(&self, id: impl Into<String>) -> Reply<()> {
        let id = id.into();
        self.ask(|reply| Command::CreateSession(id, reply))
    }

    /// The sessions, by name.
    pub fn list_sessions(&self) -> Reply<Vec<SessionInfo>> {
        self.ask(Command::ListSessions)
    }

    /// What is known of a session; the inner `None` means that there is none of this name.
    pub fn session_info(&self, id: impl Into<String>) -> Reply<Option<SessionInfo>> {
        let id = id.into();
        self.ask(|reply| Command::SessionInfo(id, reply))
    }

    /// Deletes a session and gives its pages back; tells whether it existed. Its requests go on.
    pub fn delete_session(&self, id: impl Into<String>) -> Reply<bool> {
        let id = id.into();
        self.ask(|reply| Command::DeleteSession(id, reply))
    }

    fn ask<T>(&self, command: impl FnOnce(Responder<T>) -> Command) -> Reply<T> {
        let (responder, reply) = reply();
        // An engine that is gone drops the responder, and the reply is `None`.
        let _ = self.commands.send(command(responder));
        reply
    }

    /// Counts a request that a dispatcher refused for this engine.
    #[doc(hidden)]
    pub fn count_rejection(&self) {
        count(&self.metrics.rejected, 1);
    }
}

impl Drop for Engine {
    fn drop(&mut self) {
        self.shutdown();
    }
}

/// The thread: commands between steps, steps while there is something to do.
fn drive<R: Runner>(mut scheduler: Scheduler<R>, commands: &Receiver<Command>) {
    let mut drains = Vec::new();
    loop {
        if scheduler.is_idle() {
            drains.drain(..).for_each(|drain: Responder<()>| drain.send(()));
            let command = match scheduler.next_expiry() {
                None => commands.recv().map_err(|_| RecvTimeoutError::Disconnected),
                Some(left) => commands.recv_timeout(left),
            };
            match command {
                Ok(Command::Shutdown) | Err(RecvTimeoutError::Disconnected) => break,
                Ok(command) => obey(&mut scheduler, command, &mut drains),
                Err(RecvTimeoutError::Timeout) => scheduler.expire_sessions(),
            }
        }
        while let Ok(command) = commands.try_recv() {
            if matches!(command, Command::Shutdown) {
                return end(scheduler, commands, drains);
            }
            obey(&mut scheduler, command, &mut drains);
        }
        if !scheduler.is_idle() {
            scheduler.step();
        }
    }
    end(scheduler, commands, drains);
}

fn obey<R: Runner>(
    scheduler: &mut Scheduler<R>,
    command: Command,
    drains: &mut Vec<Responder<()>>,
) {
    match command {
        Command::Submit(submission) => scheduler.add(submission),
        Command::Abort(id) => scheduler.abort(id),
        Command::CreateSession(id, reply) => {
            scheduler.create_session(&id);
            reply.send(());
        }
        Command::ListSessions(reply) => reply.send(scheduler.list_sessions()),
        Command::SessionInfo(id, reply) => reply.send(scheduler.session_info(&id)),
        Command::DeleteSession(id, reply) => reply.send(scheduler.delete_session(&id)),
        Command::Drain(reply) => drains.push(reply),
        // The loop looks for it before.
        Command::Shutdown => {}
    }
}

/// Ends whatever is open, requests that were submitted too late included.
fn end<R: Runner>(
    mut scheduler: Scheduler<R>,
    commands: &Receiver<Command>,
    mut drains: Vec<Responder<()>>,
) {
    while let Ok(command) = commands.try_recv() {
        obey(&mut scheduler, command, &mut drains);
    }
    scheduler.abort_all();
    scheduler.clear_sessions();
    drains.into_iter().for_each(|drain| drain.send(()));
}
