//! What plugins did.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Duration;

/// What one plugin did since it was registered.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PluginStats {
    /// The plugin's name.
    pub name: String,
    /// Plugins with a lower value run first.
    pub priority: i32,
    /// Whether requests use it unless they choose otherwise.
    pub enabled: bool,
    /// Hooks that ran.
    pub calls: u64,
    /// Hooks that returned an answer.
    pub successes: u64,
    /// Hooks that returned an error, panicked, or answered something impossible.
    pub errors: u64,
    /// What the hooks took together.
    pub total_time: Duration,
    /// Requests that it stopped.
    pub early_exit_count: u64,
    /// Times that it had tokens removed.
    pub pruning_count: u64,
    /// Tokens that it had removed.
    pub pruned_tokens: u64,
    /// Bytes of the pages of the sequences that it pruned, before, added up over the times.
    pub bytes_before_pruning: u64,
    /// The same, afterwards.
    pub bytes_after_pruning: u64,
}

#[derive(Debug, Default)]
pub(crate) struct Counters {
    calls: AtomicU64,
    errors: AtomicU64,
    nanoseconds: AtomicU64,
    early_exits: AtomicU64,
    prunings: AtomicU64,
    pruned_tokens: AtomicU64,
    bytes_before: AtomicU64,
    bytes_after: AtomicU64,
}

impl Counters {
    pub(crate) fn called(&self, took: Duration, failed: bool) {
        self.calls.fetch_add(1, Relaxed);
        self.errors.fetch_add(u64::from(failed), Relaxed);
        self.nanoseconds.fetch_add(took.as_nanos() as u64, Relaxed);
    }

    pub(crate) fn stopped(&self) {
        self.early_exits.fetch_add(1, Relaxed);
    }

    pub(crate) fn pruned(&self, tokens: usize, (before, after): (u64, u64)) {
        self.prunings.fetch_add(1, Relaxed);
        self.pruned_tokens.fetch_add(tokens as u64, Relaxed);
        self.bytes_before.fetch_add(before, Relaxed);
        self.bytes_after.fetch_add(after, Relaxed);
    }

    pub(crate) fn stats(&self, name: &str, priority: i32, enabled: bool) -> PluginStats {
        // Read first, so that what runs meanwhile never shows more errors than calls.
        let errors = self.errors.load(Relaxed);
        let calls = self.calls.load(Relaxed).max(errors);
        PluginStats {
            name: name.to_owned(),
            priority,
            enabled,
            calls,
            successes: calls - errors,
            errors,
            total_time: Duration::from_nanos(self.nanoseconds.load(Relaxed)),
            early_exit_count: self.early_exits.load(Relaxed),
            pruning_count: self.prunings.load(Relaxed),
            pruned_tokens: self.pruned_tokens.load(Relaxed),
            bytes_before_pruning: self.bytes_before.load(Relaxed),
            bytes_after_pruning: self.bytes_after.load(Relaxed),
        }
    }
}
