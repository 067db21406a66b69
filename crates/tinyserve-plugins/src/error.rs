//! What the manager refuses, and how a plugin fails.

use thiserror::Error;

/// What a manager or a built-in plugin refuses.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum PluginError {
    /// A name that is taken.
    #[error("plugin \"{0}\" is registered already: give the new one another name")]
    Taken(String),
    /// A name that nobody has.
    #[error("no plugin is called \"{name}\", expected {expected}")]
    Unknown {
        /// The name that was asked for.
        name: String,
        /// The names that there are, in words.
        expected: String,
    },
    /// A setting is out of its range.
    #[error("{what} is {found}, expected {expected}")]
    Invalid {
        /// The setting's name.
        what: &'static str,
        /// The value that was found.
        found: String,
        /// The values that are allowed, in words.
        expected: String,
    },
}

impl PluginError {
    pub(crate) fn invalid(
        what: &'static str,
        found: impl std::fmt::Display,
        expected: impl Into<String>,
    ) -> Self {
        Self::Invalid { what, found: found.to_string(), expected: expected.into() }
    }
}

/// Why a plugin ended a request without meaning to.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[error("plugin \"{plugin}\" failed in {hook}: {message}")]
pub struct PluginFailure {
    /// The plugin's name.
    pub plugin: String,
    /// The hook that failed.
    pub hook: &'static str,
    /// The error that it returned, or what it panicked with.
    pub message: String,
}
