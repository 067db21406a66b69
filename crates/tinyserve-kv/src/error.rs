//! The one error type of the crate.

use thiserror::Error;

/// What the cache refuses, with what was found and what was expected.
#[derive(Debug, Clone, PartialEq, Error)]
#[non_exhaustive]
pub enum KvError {
    /// A setting is out of its range.
    #[error("{what} is {found}, expected {expected}")]
    Invalid {
        /// The setting's name, as flags and configuration files spell it.
        what: &'static str,
        /// The value that was found.
        found: String,
        /// The values that are allowed, in words.
        expected: String,
    },
    /// The pool has fewer free pages than were asked for.
    #[error("the KV pool has {free} free pages of {capacity}, {needed} are needed")]
    OutOfPages {
        /// Pages that were asked for.
        needed: usize,
        /// Pages that are free.
        free: usize,
        /// Pages in the pool.
        capacity: usize,
    },
}
