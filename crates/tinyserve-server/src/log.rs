//! What is written to stderr: one line for one thing, without anybody's text.

use std::time::Duration;

use axum::http::{Method, StatusCode};

use crate::LogLevel;
use crate::request::shown;

/// Writes what the settings ask for.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Log {
    pub(crate) level: LogLevel,
    pub(crate) prompts: bool,
}

impl Log {
    /// Something that happened to the server as a whole.
    pub(crate) fn info(self, line: &str) {
        if self.level >= LogLevel::Info {
            eprintln!("{line}");
        }
    }

    /// A request that was answered.
    pub(crate) fn request(
        self,
        id: &str,
        method: &Method,
        path: &str,
        status: StatusCode,
        time: Duration,
    ) {
        if self.level >= LogLevel::Debug
            || (status.is_server_error() && self.level >= LogLevel::Info)
        {
            let ms = time.as_secs_f64() * 1e3;
            eprintln!("{id} {method} {} {} {ms:.1} ms", shown(path), status.as_u16());
        }
    }

    /// Fields of a body that nobody reads; the text of names only.
    pub(crate) fn unknown_fields(self, id: &str, fields: &[String]) {
        if self.level >= LogLevel::Debug && !fields.is_empty() {
            eprintln!("{id} ignores {}", fields.join(", "));
        }
    }

    /// A prompt, only where the settings ask for it.
    pub(crate) fn prompt(self, id: &str, text: &str) {
        if self.prompts {
            eprintln!("{id} prompt: {text:?}");
        }
    }
}
