//! Settings of a server: one name each in code, files, flags and the environment.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use tinyserve::TinyServeConfig;

use crate::ServerError;

/// How much of what happens is written to stderr.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LogLevel {
    /// Nothing but what makes the server end.
    Off,
    /// What goes wrong, and when the server starts and stops.
    #[default]
    Info,
    /// Every request: its id, path, status and time; no text of prompts or answers.
    Debug,
}

/// Which of the requests that wait runs first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum SchedulingPolicy {
    /// The one that came first; a request with a priority is refused.
    Fcfs,
    /// The one whose `priority` is lower, then the one that came first.
    #[default]
    Priority,
}

/// Settings of a server.
///
/// The same names are keys of a JSON or TOML file, flags (`--served-model-name`) and environment
/// variables (`TINYSERVE_SERVED_MODEL_NAME`) of the command.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ServerConfig {
    /// Address that is listened on.
    pub host: String,
    /// Port that is listened on; 0 takes a free one.
    pub port: u16,
    /// A Unix socket that is listened on instead.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub uds: Option<PathBuf>,
    /// Keys that requests must bring one of; none lets everybody in.
    #[serde(skip_serializing)]
    pub api_key: Vec<String>,
    /// Names that requests may call the model by; unless given, the model's own.
    pub served_model_name: Vec<String>,
    /// A file with a chat template that replaces the checkpoint's.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub chat_template: Option<PathBuf>,
    /// Folder that requests may save sessions in and restore them from; without one they may not.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub session_folder: Option<PathBuf>,
    /// Whether saved sessions are restored when the server starts.
    pub restore_sessions: bool,
    /// Sessions that are saved at once.
    pub max_saved_sessions: usize,
    /// Whether the priorities of requests count, or they run in the order that they come.
    pub scheduling_policy: SchedulingPolicy,
    /// Seed of requests that bring none: the same requests in the same order get the same answers.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub seed: Option<u64>,
    /// Bytes of a request's body.
    pub max_request_bytes: usize,
    /// Prompts of one request.
    pub max_prompts_per_request: usize,
    /// Answers to each prompt.
    pub max_n: usize,
    /// Alternatives whose probabilities are told with each token.
    pub max_logprobs: usize,
    /// Stop strings of one request.
    pub max_stop_strings: usize,
    /// Connections that are open at once; more wait to be accepted.
    pub max_connections: usize,
    /// Seconds that a client has for sending the head of a request.
    pub header_timeout: f64,
    /// Seconds that a client has for sending the body of a request.
    pub body_timeout: f64,
    /// Seconds that a client may leave what was sent to it unread.
    pub write_timeout: f64,
    /// Seconds without an event after which a stream gets a comment.
    pub keep_alive_interval: f64,
    /// Seconds that running requests have when the server is asked to stop.
    pub drain_timeout: f64,
    /// Origins whose pages may ask from a browser; `*` allows all.
    pub allowed_origins: Vec<String>,
    /// How much of what happens is written to stderr.
    pub log_level: LogLevel,
    /// Whether prompts are written to stderr too.
    pub log_prompts: bool,
}

impl Default for ServerConfig {
    fn default() -> Self {
        Self {
            host: "127.0.0.1".to_owned(),
            port: 8000,
            uds: None,
            api_key: Vec::new(),
            served_model_name: Vec::new(),
            chat_template: None,
            session_folder: None,
            restore_sessions: false,
            max_saved_sessions: 1000,
            scheduling_policy: SchedulingPolicy::Priority,
            seed: None,
            max_request_bytes: 32 << 20,
            max_prompts_per_request: 1024,
            max_n: 64,
            max_logprobs: 20,
            max_stop_strings: 4,
            max_connections: 4096,
            header_timeout: 10.0,
            body_timeout: 30.0,
            write_timeout: 30.0,
            keep_alive_interval: 15.0,
            drain_timeout: 30.0,
            allowed_origins: Vec::new(),
            log_level: LogLevel::Info,
            log_prompts: false,
        }
    }
}

impl ServerConfig {
    /// Checks every value that can be checked without a socket.
    ///
    /// # Errors
    /// [`ServerError::Setting`], naming the first field that is out of its range.
    pub fn check(&self) -> Result<(), ServerError> {
        let wrong = |field, found: String, expected: &str| {
            Err(ServerError::Setting { field, found, expected: expected.to_owned() })
        };
        let at_least_one = [
            ("max_request_bytes", self.max_request_bytes),
            ("max_prompts_per_request", self.max_prompts_per_request),
            ("max_n", self.max_n),
            ("max_stop_strings", self.max_stop_strings),
            ("max_connections", self.max_connections),
            ("max_saved_sessions", self.max_saved_sessions),
        ];
        for (field, value) in at_least_one {
            if value == 0 {
                return wrong(field, value.to_string(), "at least 1");
            }
        }
        let seconds = [
            ("header_timeout", self.header_timeout, 0.001),
            ("body_timeout", self.body_timeout, 0.001),
            ("write_timeout", self.write_timeout, 0.001),
            ("keep_alive_interval", self.keep_alive_interval, 0.001),
            ("drain_timeout", self.drain_timeout, 0.0),
        ];
        for (field, value, least) in seconds {
            // A day is longer than anybody waits, and far from what a clock can add up.
            if !(least..=86_400.0).contains(&value) {
                return wrong(field, value.to_string(), &format!("{least} to 86400 seconds"));
            }
        }
        if self.api_key.iter().any(|key| key.trim().is_empty()) {
            return wrong("api_key", "empty".to_owned(), "at least one character");
        }
        if self.served_model_name.iter().any(|name| !crate::request::is_name(name)) {
            return wrong("served_model_name", "no name".to_owned(), "1 to 256 visible characters");
        }
        for origin in &self.allowed_origins {
            if axum::http::HeaderValue::from_str(origin).is_err() {
                return wrong("allowed_origins", format!("{origin:?}"), "an origin or *");
            }
        }
        Ok(())
    }
}

/// Reads a `.json` or `.toml` file that holds settings of an engine and of a server; keys that it
/// leaves out keep their defaults.
///
/// # Errors
/// As [`TinyServeConfig::load`].
pub fn load_config(path: &Path) -> Result<(TinyServeConfig, ServerConfig), ServerError> {
    let unusable = |message: String| ServerError::Config { path: path.to_owned(), message };
    let text = std::fs::read_to_string(path).map_err(|error| unusable(error.to_string()))?;
    let all: Map<String, Value> = match path.extension().and_then(|extension| extension.to_str()) {
        Some("json") => serde_json::from_str(&text).map_err(|error| unusable(error.to_string()))?,
        Some("toml") => {
            toml::from_str(&text).map_err(|error| unusable(error.message().replace('\n', " ")))?
        }
        _ => return Err(unusable("a configuration file ends in .json or .toml".to_owned())),
    };
    let ours = |name: &str| KEYS.contains(&name);
    let (server, engine): (Map<_, _>, Map<_, _>) =
        all.into_iter().partition(|(name, _)| ours(name));
    let server: ServerConfig = serde_json::from_value(Value::Object(server))
        .map_err(|error| unusable(error.to_string()))?;
    let engine: TinyServeConfig = serde_json::from_value(Value::Object(engine))
        .map_err(|error| unusable(error.to_string()))?;
    server.check().map_err(|error| unusable(error.to_string()))?;
    engine.check().map_err(|error| unusable(error.to_string()))?;
    Ok((engine, server))
}

/// `config` with an end to the queue where it has none: a server takes requests from whoever asks.
#[must_use]
pub fn with_bounded_queue(mut config: TinyServeConfig) -> TinyServeConfig {
    config.max_num_queued_reqs.get_or_insert(MOST_QUEUED_REQUESTS);
    config.max_num_queued_tokens.get_or_insert(MOST_QUEUED_TOKENS);
    config
}

/// Requests that wait unless the settings say otherwise.
const MOST_QUEUED_REQUESTS: usize = 1024;
/// Their prompt tokens.
const MOST_QUEUED_TOKENS: usize = 1 << 20;

/// Every key of a server's settings in a file; all others are the engine's.
const KEYS: &[&str] = &[
    "host",
    "port",
    "uds",
    "api_key",
    "served_model_name",
    "chat_template",
    "session_folder",
    "restore_sessions",
    "max_saved_sessions",
    "scheduling_policy",
    "seed",
    "max_request_bytes",
    "max_prompts_per_request",
    "max_n",
    "max_logprobs",
    "max_stop_strings",
    "max_connections",
    "header_timeout",
    "body_timeout",
    "write_timeout",
    "keep_alive_interval",
    "drain_timeout",
    "allowed_origins",
    "log_level",
    "log_prompts",
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_setting_is_a_key_of_files() {
        let config = ServerConfig {
            uds: Some("s".into()),
            chat_template: Some("t".into()),
            session_folder: Some("f".into()),
            seed: Some(1),
            ..ServerConfig::default()
        };
        let json = serde_json::to_value(&config).unwrap();
        for name in json.as_object().unwrap().keys() {
            assert!(KEYS.contains(&name.as_str()), "{name}");
        }
    }

    #[test]
    fn files_hold_settings_of_both() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("all.toml");
        std::fs::write(&path, "port = 81\napi_key = [\"k\"]\npage_size = 32\n").unwrap();
        let (engine, server) = load_config(&path).unwrap();
        assert_eq!((engine.page_size, server.port), (32, 81));
        assert_eq!(server.api_key, ["k"]);
        for (text, expected) in [
            ("prot = 80", "prot"),
            ("port = 70000", "70000"),
            ("max_n = 0", "max_n is 0"),
            ("drain_timeout = -1.0", "drain_timeout is -1"),
            ("api_key = [\" \"]", "api_key is empty"),
            ("page_size = 0", "page_size is 0"),
        ] {
            std::fs::write(&path, text).unwrap();
            let message = load_config(&path).unwrap_err().to_string();
            assert!(message.contains(expected) && message.contains("all.toml"), "{message}");
        }
    }
}
