#![doc = include_str!("../README.md")]
#![forbid(unsafe_code)]

mod auth;
mod config;
mod engine;
mod error;
mod ids;
mod listener;
mod log;
mod metrics;
mod middleware;
mod output;
mod request;
mod routes;
mod saved;
mod server;
mod state;
mod stream;

use std::path::PathBuf;
use std::time::{SystemTime, UNIX_EPOCH};

use thiserror::Error;

pub use config::{LogLevel, SchedulingPolicy, ServerConfig, load_config, with_bounded_queue};
pub use server::{Server, Stopper};

/// Why a server does not start, or ends.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum ServerError {
    /// A setting is out of its range.
    #[error("{field} is {found}, expected {expected}")]
    Setting {
        /// The field, as the configuration spells it.
        field: &'static str,
        /// The value that was found.
        found: String,
        /// The values that are allowed, in words.
        expected: String,
    },
    /// A configuration file cannot be read or used.
    #[error("{}: {message}", .path.display())]
    Config {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        message: String,
    },
    /// The address cannot be listened on.
    #[error("cannot listen on {address}: {reason}")]
    Bind {
        /// The address.
        address: String,
        /// The system's words.
        reason: String,
    },
    /// The system gives no threads or no signals.
    #[error("the server cannot start: {0}")]
    System(#[from] std::io::Error),
    /// The model cannot be loaded.
    #[error(transparent)]
    Engine(#[from] tinyserve::TinyServeError),
    /// The model's files cannot be used.
    #[error(transparent)]
    Model(#[from] tinyserve::model::ModelError),
    /// The engine stopped by itself.
    #[error("the engine stopped: {0}")]
    Dead(String),
}

fn seconds_since_1970() -> u64 {
    // A clock before 1970 is wrong anyway.
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs())
}
