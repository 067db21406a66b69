//! Ctrl-C: once to stop after the current step, twice to stop at once.

use std::io::IsTerminal;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::{Context, Result};

/// Exit code of a command that Ctrl-C ended.
const INTERRUPTED: i32 = 130;

/// Ctrl-C in a conversation.
#[derive(Debug, Clone, Default)]
pub(crate) struct Conversation {
    answering: Arc<AtomicBool>,
    pressed: Arc<AtomicBool>,
}

impl Conversation {
    /// From now on an answer is written, or the user's turn has come.
    pub(crate) fn answers(&self, answering: bool) {
        self.answering.store(answering, Ordering::Relaxed);
        self.pressed.store(false, Ordering::Relaxed);
    }

    /// Whether it was pressed since.
    pub(crate) fn pressed(&self) -> bool {
        self.pressed.load(Ordering::Relaxed)
    }
}

/// Whether Ctrl-C was pressed.
#[derive(Debug, Clone)]
pub(crate) struct Interrupt(Arc<AtomicBool>);

impl Interrupt {
    /// From now on Ctrl-C (and the system's request to terminate) is noted instead of obeyed; the
    /// second one ends the process.
    pub(crate) fn listen() -> Result<Self> {
        let flag = Arc::new(AtomicBool::new(false));
        let pressed = Arc::clone(&flag);
        ctrlc::set_handler(move || {
            if pressed.swap(true, Ordering::Relaxed) {
                std::process::exit(INTERRUPTED);
            }
        })
        .context("Ctrl-C cannot be listened to")?;
        Ok(Self(flag))
    }

    /// As [`Self::listen`] for a conversation: while an answer is written, Ctrl-C is noted; at the
    /// prompt it says how to leave, and the second in a row leaves.
    pub(crate) fn converse(hint: &'static str) -> Result<Conversation> {
        let conversation = Conversation::default();
        let state = conversation.clone();
        let at_terminal = std::io::stdin().is_terminal();
        ctrlc::set_handler(move || {
            let again = state.pressed.swap(true, Ordering::Relaxed);
            let answering = state.answering.load(Ordering::Relaxed);
            if again || !(answering || at_terminal) {
                std::process::exit(INTERRUPTED);
            }
            if !answering {
                eprint!("\n{hint}");
            }
        })
        .context("Ctrl-C cannot be listened to")?;
        Ok(conversation)
    }

    /// Whether it was pressed.
    pub(crate) fn pressed(&self) -> bool {
        self.0.load(Ordering::Relaxed)
    }
}
