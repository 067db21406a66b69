//! A server's life: bind, load, answer, drain, end.

use std::sync::Arc;
use std::time::Duration;

use tinyserve::model::{ChatTemplate, Checkpoint};
use tinyserve::{TinyServe, TinyServeError};
use tokio::runtime::Runtime;
use tokio::sync::{Notify, watch};

use crate::listener::{Listener, serve};
use crate::metrics::EngineView;
use crate::request::Limits;
use crate::routes::router;
use crate::saved::SessionFolder;
use crate::state::{App, Phase, Ready};
use crate::{SchedulingPolicy, ServerConfig, ServerError};

/// How often the server looks whether running requests have ended, or the engine has.
const LOOK: Duration = Duration::from_millis(20);
/// How long answers have to leave when the engine has ended them.
const LEAVE: Duration = Duration::from_secs(1);

/// A bound server that does not answer yet.
pub struct Server {
    runtime: Runtime,
    listener: Listener,
    config: ServerConfig,
    sessions: Option<SessionFolder>,
    stop: Arc<Notify>,
}

/// Asks a server to stop, from any thread.
#[derive(Debug, Clone)]
pub struct Stopper(Arc<Notify>);

impl Stopper {
    /// Asks the server to drain and to end, as a signal does.
    pub fn stop(&self) {
        self.0.notify_one();
    }
}

impl Server {
    /// Binds the address that `config` names.
    ///
    /// # Errors
    /// When a setting is out of its range or the address cannot be listened on.
    pub fn bind(config: ServerConfig) -> Result<Self, ServerError> {
        config.check()?;
        let sessions = match &config.session_folder {
            Some(path) => Some(SessionFolder::open(path, config.max_saved_sessions)?),
            None if config.restore_sessions => {
                return Err(ServerError::Setting {
                    field: "restore_sessions",
                    found: "true".to_owned(),
                    expected: "session_folder beside it".to_owned(),
                });
            }
            None => None,
        };
        // The engine computes on threads of its own. One thread carries the bytes of a small
        // machine: more would wake each other up at every step, at the cost of the engine.
        let processors = std::thread::available_parallelism().map_or(1, usize::from);
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads((processors / 8).clamp(1, 4))
            .thread_name("http")
            .enable_all()
            .build()?;
        let listener = runtime.block_on(Listener::bind(&config))?;
        Ok(Self { runtime, listener, config, sessions, stop: Arc::new(Notify::new()) })
    }

    /// Where clients reach it, such as `http://127.0.0.1:8000`.
    #[must_use]
    pub fn address(&self) -> String {
        self.listener.address()
    }

    /// A handle that stops the server.
    #[must_use]
    pub fn stopper(&self) -> Stopper {
        Stopper(Arc::clone(&self.stop))
    }

    /// Answers until a signal or a [`Stopper`] asks it to stop, and running requests have ended or
    /// their time is over. `load` makes the engine of the model `model`; until it is done, requests
    /// are answered with 503.
    ///
    /// # Errors
    /// When `load` fails, or the engine stops by itself.
    pub fn run(
        self,
        model: &str,
        load: impl FnOnce() -> Result<TinyServe, TinyServeError> + Send + 'static,
    ) -> Result<(), ServerError> {
        let Self { runtime, listener, config, sessions, stop } = self;
        let app = App::new(config, sessions, model);
        let result = runtime.block_on(live(app, listener, &stop, load));
        // What still blocks a thread must not keep the process.
        runtime.shutdown_timeout(LEAVE);
        result
    }
}

async fn live(
    app: App,
    listener: Listener,
    stop: &Notify,
    load: impl FnOnce() -> Result<TinyServe, TinyServeError> + Send + 'static,
) -> Result<(), ServerError> {
    let mut signals = Signals::listen()?;
    let (closing, closed) = watch::channel(false);
    let address = listener.address();
    let connections = {
        let (router, config) = (router(app.clone()), app.config.clone());
        tokio::spawn(async move { serve(listener, router, &config, closed).await })
    };
    let loading = {
        let app = app.clone();
        tokio::task::spawn_blocking(move || loaded(&app, load()?))
    };
    let ready = tokio::select! {
        loaded = loading => match loaded {
            Ok(loaded) => loaded?,
            Err(_) => return Err(ServerError::Dead("loading the model went wrong".to_owned())),
        },
        () = asked(stop, &mut signals) => return Ok(()),
    };
    app.set_ready(ready);
    app.log.info(&format!("serving {} on {address}", app.names.join(", ")));
    let mut alive = tokio::time::interval(LOOK);
    loop {
        tokio::select! {
            () = asked(stop, &mut signals) => break,
            _ = alive.tick() => if app.phase() == Phase::Dead {
                return Err(ServerError::Dead("see above".to_owned()));
            },
        }
    }
    app.set_phase(Phase::Draining);
    drain(&app, stop, &mut signals).await;
    // Everybody was told how it ended: what is still open is closed when its answer has left.
    closing.send_replace(true);
    let _ = tokio::time::timeout(LEAVE, connections).await;
    app.log.info("stopped");
    Ok(())
}

/// Waits until requests have ended, their time is over, or somebody asks once more.
async fn drain(app: &App, stop: &Notify, signals: &mut Signals) {
    let Ok(ready) = app.ready() else { return };
    let time = Duration::from_secs_f64(app.config.drain_timeout);
    let stats = ready.engine().stats();
    app.log.info(&format!(
        "stopping: {} requests run and {} wait, they have {} s",
        stats.running,
        stats.waiting,
        time.as_secs_f64()
    ));
    let ended = ready.engine().drain();
    tokio::select! {
        _ = tokio::time::timeout(time, ended) => {}
        () = asked(stop, signals) => {}
    }
    let _ = tokio::task::spawn_blocking(move || ready.engine().shutdown()).await;
}

/// What requests need of a loaded engine.
fn loaded(app: &App, model: TinyServe) -> Result<Ready, ServerError> {
    let checkpoint = Checkpoint::load(&app.root)?;
    let special_tokens = checkpoint.special_tokens()?;
    let template = match &app.config.chat_template {
        Some(path) => {
            let source = std::fs::read_to_string(path).map_err(|error| ServerError::Setting {
                field: "chat_template",
                found: format!("{} ({error})", path.display()),
                expected: "a file with a template".to_owned(),
            })?;
            Some(ChatTemplate::new(path.display().to_string(), source, special_tokens.clone())?)
        }
        None => checkpoint.chat_template()?,
    };
    restore_sessions(app, &model)?;
    let model = Arc::new(model);
    let sizes = *model.engine().limits();
    let limits = Limits {
        prompts: app.config.max_prompts_per_request,
        choices: app.config.max_n,
        logprobs: app.config.max_logprobs,
        stops: app.config.max_stop_strings,
        context: sizes.max_sequence_length,
        vocab: sizes.vocab,
        priorities: app.config.scheduling_policy == SchedulingPolicy::Priority,
    };
    app.metrics.requests.begin(model.engine().replica_states().len());
    let format = model.config().kv_cache_dtype.resolve(checkpoint.dtype()).name();
    let look = {
        let model = Arc::clone(&model);
        move || EngineView {
            engines: model.engine().replica_stats(),
            plugins: model.plugins().stats(),
            page_size: sizes.page_size,
            page_bytes: sizes.bytes_per_page,
            cache_dtype: format,
        }
    };
    // A server loads once.
    let _ = app.source.0.set(Box::new(look));
    let tokenizer = model.tokenizer().cloned().map_err(|error| error.to_string());
    Ok(Ready { model, limits, template, special_tokens, tokenizer })
}

/// Restores saved sessions where the settings ask for it; tells of those that are refused.
fn restore_sessions(app: &App, model: &TinyServe) -> Result<(), ServerError> {
    let Some(folder) = app.sessions.as_ref().filter(|_| app.config.restore_sessions) else {
        return Ok(());
    };
    let restored = folder.restore_all(model, |id, why| {
        app.log.info(&format!("session {id} is not restored: {why}"));
    })?;
    app.log.info(&format!("restored {restored} sessions"));
    Ok(())
}

/// Waits for a signal or a [`Stopper`].
async fn asked(stop: &Notify, signals: &mut Signals) {
    tokio::select! {
        () = stop.notified() => {}
        () = signals.next() => {}
    }
}

/// The system's requests to end.
struct Signals {
    #[cfg(unix)]
    terminate: tokio::signal::unix::Signal,
}

impl Signals {
    fn listen() -> std::io::Result<Self> {
        #[cfg(unix)]
        {
            use tokio::signal::unix::{SignalKind, signal};
            Ok(Self { terminate: signal(SignalKind::terminate())? })
        }
        #[cfg(not(unix))]
        Ok(Self {})
    }

    async fn next(&mut self) {
        let interrupted = async {
            // Without a handler for Ctrl-C the system ends the process itself.
            if tokio::signal::ctrl_c().await.is_err() {
                std::future::pending::<()>().await;
            }
        };
        #[cfg(unix)]
        tokio::select! {
            () = interrupted => {}
            _ = self.terminate.recv() => {}
        }
        #[cfg(not(unix))]
        interrupted.await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_server_whose_engine_stopped_says_that_it_is_dead() {
        let model = tinyserve::model::BUILTIN_MODEL;
        let app = App::new(ServerConfig::default(), None, model);
        assert_eq!(app.phase(), Phase::Loading);
        let engine = TinyServe::builder().threads(1).build().unwrap();
        app.set_ready(loaded(&app, engine).unwrap());
        assert_eq!(app.phase(), Phase::Ready);
        let ready = app.accepting().unwrap();
        ready.engine().shutdown();
        assert_eq!(app.phase(), Phase::Dead);
        let refused = app.accepting().err().unwrap();
        assert_eq!(refused.status(), axum::http::StatusCode::SERVICE_UNAVAILABLE);
        assert!(refused.message().contains("engine stopped"));
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        let health =
            runtime.block_on(crate::routes::monitor::health(axum::extract::State(app.clone())));
        assert_eq!(health.status(), axum::http::StatusCode::SERVICE_UNAVAILABLE);
        // One that is asked to stop meanwhile drains, dead or not.
        app.set_phase(Phase::Draining);
        assert_eq!(app.phase(), Phase::Draining);
    }

    #[test]
    fn a_server_whose_engine_stops_ends_with_an_error() {
        let config =
            ServerConfig { port: 0, log_level: crate::LogLevel::Off, ..ServerConfig::default() };
        let server = Server::bind(config).unwrap();
        let ended = server.run(tinyserve::model::BUILTIN_MODEL, || {
            let engine = TinyServe::builder().threads(1).build()?;
            engine.engine().shutdown();
            Ok(engine)
        });
        assert!(matches!(ended, Err(ServerError::Dead(_))), "{ended:?}");
    }
}
