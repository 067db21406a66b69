//! One thread that owns a scheduler, and the handle through which an engine talks to it.

use std::path::PathBuf;
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;

use tinyserve_model::ModelError;

use crate::channel::{EventStream, Reply, Responder, reply};
use crate::intake::{Intake, Limits, Submission};
use crate::metrics::Metrics;
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
pub(crate) enum Command {
    Submit(Submission),
    Abort(RequestId),
    CreateSession(String, Responder<()>),
    ListSessions(Responder<Vec<SessionInfo>>),
    SessionInfo(String, Responder<Option<SessionInfo>>),
    DeleteSession(String, Responder<bool>),
    SaveSession(SessionFile, Responder<Result<usize, ModelError>>),
    RestoreSession(SessionFile, Responder<Result<SessionInfo, ModelError>>),
    Drain(Responder<()>),
    Shutdown,
}

/// A session, and the file that it is saved to or restored from.
pub(crate) struct SessionFile {
    pub(crate) id: String,
    pub(crate) path: PathBuf,
    /// What the engine's pages depend on beside tokens and layout.
    pub(crate) identity: String,
}

/// A thread with a scheduler. Dropping it ends all its requests and the thread.
#[derive(Debug)]
pub(crate) struct Worker {
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
struct Ended {
    state: Arc<State>,
    metrics: Arc<Metrics>,
}

impl Drop for Ended {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.metrics.lose_everything();
        }
        self.state.advance(EngineState::Stopped);
    }
}

impl Worker {
    /// Starts the thread of replica `replica`, named `name` and its number, that drives `runner`.
    pub(crate) fn start<R: Runner + 'static>(
        (name, replica): (&str, usize),
        runner: R,
        config: EngineConfig,
    ) -> Result<Self, AdmissionError> {
        let on_start = config.on_start.clone();
        let scheduler = Scheduler::new(runner, config)?;
        let (intake, metrics) = (Arc::clone(scheduler.intake()), Arc::clone(scheduler.metrics()));
        let (commands, received) = channel();
        let state = Arc::new(State::default());
        let ended = Ended { state: Arc::clone(&state), metrics: Arc::clone(&metrics) };
        let name = format!("{name}-{replica}");
        let thread = std::thread::Builder::new().name(name).spawn(move || {
            on_start.call(replica);
            drive(scheduler, &received, ended);
        });
        let thread = thread.map_err(|error| {
            crate::config::setting("engine thread", error, "a thread that the system starts")
        })?;
        Ok(Self { intake, metrics, commands, state, thread: Mutex::new(Some(thread)) })
    }

    pub(crate) fn submit(&self, request: Request) -> Result<EventStream, AdmissionError> {
        match self.state.get() {
            EngineState::Running => {}
            EngineState::Draining => return Err(AdmissionError::ShuttingDown),
            EngineState::Stopped => return Err(AdmissionError::Stopped),
        }
        let commands = self.commands.clone();
        let (submission, events) = self.intake.take(request, move |id| {
            // A thread that is gone has ended the request already.
            let _ = commands.send(Command::Abort(id));
        })?;
        self.commands.send(Command::Submit(submission)).map_err(|_| AdmissionError::Stopped)?;
        Ok(events)
    }

    /// Requests that wait or run.
    pub(crate) fn load(&self) -> u64 {
        let waiting = self.metrics.queued_requests.load(Ordering::Relaxed) as u64;
        waiting.max(self.metrics.waiting.load(Ordering::Relaxed))
            + self.metrics.running.load(Ordering::Relaxed)
    }

    pub(crate) fn send(&self, command: Command) {
        // A thread that is gone has ended everything, and drops what it would have answered to.
        let _ = self.commands.send(command);
    }

    pub(crate) fn ask<T>(&self, command: impl FnOnce(Responder<T>) -> Command) -> Reply<T> {
        let (responder, reply) = reply();
        self.send(command(responder));
        reply
    }

    /// Takes no more requests.
    pub(crate) fn close(&self) {
        self.state.advance(EngineState::Draining);
    }

    /// Ends all requests and the thread, and waits for it.
    pub(crate) fn shutdown(&self) {
        self.close();
        self.send(Command::Shutdown);
        let thread = self.thread.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(thread) = thread {
            // A panic of the thread has been printed, and every request was told.
            let _ = thread.join();
        }
    }

    pub(crate) fn state(&self) -> EngineState {
        self.state.get()
    }

    pub(crate) fn limits(&self) -> &Limits {
        self.intake.limits()
    }

    pub(crate) fn stats(&self) -> Stats {
        self.metrics.read()
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        self.shutdown();
    }
}

/// The thread: commands between steps, steps while there is something to do.
fn drive<R: Runner>(mut scheduler: Scheduler<R>, commands: &Receiver<Command>, ended: Ended) {
    // Should the thread panic, this is dropped before the scheduler: whoever hears that a request
    // failed finds the engine stopped.
    let _ended = ended;
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
        Command::SaveSession(SessionFile { id, path, identity }, reply) => {
            reply.send(scheduler.save_session(&id, &path, &identity));
        }
        Command::RestoreSession(SessionFile { id, path, identity }, reply) => {
            reply.send(scheduler.restore_session(&id, &path, &identity));
        }
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
