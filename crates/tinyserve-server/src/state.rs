//! What all requests share: settings, the model once it is loaded, and how far the server is.

use std::ops::Deref;
use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Instant;

use tinyserve::TinyServe;
use tinyserve::model::{ChatTemplate, Tokenizer};
use tinyserve::sched::{Engine, EngineState};

use crate::ServerConfig;
use crate::auth::Keys;
use crate::engine::{Choices, Submission};
use crate::error::ApiError;
use crate::log::Log;
use crate::metrics::{Metrics, RequestMetrics, Source};
use crate::output::TokenTexts;
use crate::request::{Conversation, Limits};
use crate::saved::SessionFolder;

/// How far a server is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum Phase {
    Loading,
    Ready,
    Draining,
    Dead,
}

impl Phase {
    const ALL: [Self; 4] = [Self::Loading, Self::Ready, Self::Draining, Self::Dead];

    /// In a word.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Loading => "loading",
            Self::Ready => "ready",
            Self::Draining => "draining",
            Self::Dead => "dead",
        }
    }
}

/// What all requests share. Cloning shares it.
#[derive(Clone)]
pub(crate) struct App(Arc<Shared>);

impl Deref for App {
    type Target = Shared;

    fn deref(&self) -> &Shared {
        &self.0
    }
}

/// The inside of [`App`].
pub(crate) struct Shared {
    pub(crate) config: ServerConfig,
    pub(crate) keys: Keys,
    pub(crate) log: Log,
    pub(crate) metrics: Metrics,
    /// Where the metrics look for what the engine counts.
    pub(crate) source: Arc<Source>,
    /// Names that requests may call the model by; at least one.
    pub(crate) names: Vec<String>,
    /// The model as it was asked for.
    pub(crate) root: String,
    /// Seconds since 1970 when the server started.
    pub(crate) created: u64,
    pub(crate) started: Instant,
    /// Where sessions are saved, if they may be.
    pub(crate) sessions: Option<SessionFolder>,
    /// Requests that brought no seed where the server has one.
    seeded: AtomicU64,
    phase: AtomicU8,
    ready: OnceLock<Arc<Ready>>,
}

/// What is there once the model is loaded.
pub(crate) struct Ready {
    pub(crate) model: Arc<TinyServe>,
    pub(crate) limits: Limits,
    /// The chat template, or why there is none.
    pub(crate) template: Option<ChatTemplate>,
    pub(crate) special_tokens: Vec<(&'static str, String)>,
    pub(crate) tokenizer: Result<Tokenizer, String>,
}

impl App {
    /// A server that is loading the model `root`.
    pub(crate) fn new(config: ServerConfig, sessions: Option<SessionFolder>, root: &str) -> Self {
        let mut names = config.served_model_name.clone();
        if names.is_empty() {
            names.push(own_name(root));
        }
        let source = Arc::new(Source::default());
        Self(Arc::new(Shared {
            keys: Keys::new(&config.api_key),
            log: Log { level: config.log_level, prompts: config.log_prompts },
            metrics: Metrics::new(&names[0], Arc::clone(&source)),
            source,
            names,
            root: root.to_owned(),
            created: crate::seconds_since_1970(),
            started: Instant::now(),
            sessions,
            seeded: AtomicU64::new(0),
            phase: AtomicU8::new(Phase::Loading as u8),
            ready: OnceLock::new(),
            config,
        }))
    }
}

/// What a model is called that nobody named: its folder's name, or the built-in one's.
fn own_name(root: &str) -> String {
    let last = root.trim_end_matches('/').rsplit(['/', '\\', ':']).next();
    let last = last.filter(|name| crate::request::is_name(name) && *name != "." && *name != "..");
    last.unwrap_or("model").to_owned()
}

impl Shared {
    /// How far the server is; an engine that stopped by itself is dead.
    pub(crate) fn phase(&self) -> Phase {
        let phase = Phase::ALL[usize::from(self.phase.load(Ordering::Acquire))];
        match (phase, self.ready.get()) {
            (Phase::Ready, Some(ready)) if ready.engine().state() == EngineState::Stopped => {
                Phase::Dead
            }
            _ => phase,
        }
    }

    /// The seed of the next request that brings none, where the server has one: another for each,
    /// far from the next, because the choices of a request count on from it.
    pub(crate) fn next_seed(&self) -> Option<u64> {
        const APART: u64 = 0x9E37_79B9_7F4A_7C15;
        let seed = self.config.seed?;
        let before = self.seeded.fetch_add(1, Ordering::Relaxed);
        Some(seed.wrapping_add(before.wrapping_mul(APART)))
    }

    /// Moves on.
    pub(crate) fn set_phase(&self, phase: Phase) {
        self.phase.store(phase as u8, Ordering::Release);
    }

    /// The model is there: requests may come.
    pub(crate) fn set_ready(&self, ready: Ready) {
        // A server loads once.
        if self.ready.set(Arc::new(ready)).is_ok() {
            let (loading, ready) = (Phase::Loading as u8, Phase::Ready as u8);
            // A server that was asked to stop meanwhile stays at that.
            let _ =
                self.phase.compare_exchange(loading, ready, Ordering::AcqRel, Ordering::Acquire);
        }
    }

    /// The loaded model, for whatever needs no engine that takes requests.
    ///
    /// # Errors
    /// 503 while it is not there.
    pub(crate) fn ready(&self) -> Result<Arc<Ready>, ApiError> {
        let missing = || ApiError::unavailable("the model is being loaded, try again");
        self.ready.get().cloned().ok_or_else(missing)
    }

    /// The loaded model, for a request that generates.
    ///
    /// # Errors
    /// 503 while it loads, when it drains, and when it is dead.
    pub(crate) fn accepting(&self) -> Result<Arc<Ready>, ApiError> {
        match self.phase() {
            Phase::Ready => self.ready(),
            Phase::Loading => Err(ApiError::unavailable("the model is being loaded, try again")),
            Phase::Draining => Err(ApiError::unavailable(
                "the server stops and takes no new requests, try another or wait for it to restart",
            )),
            Phase::Dead => {
                Err(ApiError::unavailable("the engine stopped, the server must restart"))
            }
        }
    }

    /// The name that a request calls the model by, or the first one.
    ///
    /// # Errors
    /// 404 when there is no such model.
    pub(crate) fn check_model(&self, model: Option<&str>) -> Result<&str, ApiError> {
        let Some(model) = model else { return Ok(&self.names[0]) };
        let found = self.names.iter().find(|name| *name == model);
        found.map(String::as_str).ok_or_else(|| {
            ApiError::no_model(crate::request::shown(model).as_str(), &self.names[0])
        })
    }
}

impl Ready {
    /// The engine that requests run on.
    pub(crate) fn engine(&self) -> &Engine {
        self.model.engine()
    }

    /// Submits every choice of a request, or none.
    ///
    /// # Errors
    /// As [`Choices::submit`].
    pub(crate) fn submit(
        &self,
        submissions: Vec<Submission>,
        metrics: &Arc<RequestMetrics>,
    ) -> Result<Choices, ApiError> {
        Choices::submit(&self.model, submissions, metrics)
    }

    /// The tokenizer.
    ///
    /// # Errors
    /// 400 when the model has none: it takes and gives token ids only.
    pub(crate) fn tokenizer(&self) -> Result<&Tokenizer, ApiError> {
        self.tokenizer.as_ref().map_err(|reason| {
            ApiError::field("prompt", format!("this model takes token ids only: {reason}"))
        })
    }

    /// The ids of `text`.
    ///
    /// # Errors
    /// 400 when there is no tokenizer or it does not know a part of the text.
    pub(crate) fn encode(&self, text: &str, add_special: bool) -> Result<Vec<u32>, ApiError> {
        let tokens = self.tokenizer()?.encode(text, add_special);
        tokens.map_err(|error| ApiError::field("prompt", error.to_string()))
    }

    /// The text of `tokens`.
    ///
    /// # Errors
    /// 400 when there is no tokenizer, or it fails.
    pub(crate) fn decode(&self, tokens: &[u32], skip_special: bool) -> Result<String, ApiError> {
        let text = self.tokenizer()?.decode(tokens, skip_special);
        text.map_err(|error| ApiError::field("prompt", error.to_string()))
    }

    /// The prompt of a conversation.
    ///
    /// # Errors
    /// 400 when there is no template, or it refuses the conversation.
    pub(crate) fn render(&self, conversation: &Conversation) -> Result<String, ApiError> {
        let Some(template) = &self.template else {
            return Err(ApiError::field(
                "messages",
                "this model has no chat template: start the server with --chat-template FILE, or \
                 use /v1/completions",
            ));
        };
        let prompt = template.render(conversation.input());
        prompt.map_err(|error| ApiError::field("messages", error.to_string()))
    }

    /// How tokens are spelt in answers.
    pub(crate) fn texts(&self) -> TokenTexts {
        TokenTexts(self.tokenizer.as_ref().ok().cloned())
    }
}

#[cfg(test)]
mod tests {
    use super::own_name;

    #[test]
    fn models_are_called_by_the_last_part_of_where_they_are() {
        for (root, name) in [
            ("builtin:stories260k", "stories260k"),
            ("/models/tiny/", "tiny"),
            ("tiny", "tiny"),
            ("..", "model"),
            ("/", "model"),
        ] {
            assert_eq!(own_name(root), name, "{root}");
        }
    }
}
