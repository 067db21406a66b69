//! What the user says, line by line: edited and recalled at a terminal, as it comes through a pipe.

use std::io::{self, BufRead, IsTerminal};

use anyhow::{Context, Result};
use rustyline::error::ReadlineError;
use rustyline::history::MemHistory;
use rustyline::{Behavior, Config, Editor};

/// What came.
pub(super) enum Line {
    Said(String),
    /// Ctrl-C.
    Interrupted,
    /// The input has ended, as by Ctrl-D.
    End,
}

/// Where lines come from.
pub(super) enum Lines {
    Terminal(Box<Editor<(), MemHistory>>),
    Piped,
}

impl Lines {
    /// Lines of a terminal, if stdin is one.
    pub(super) fn open() -> Result<Self> {
        if !io::stdin().is_terminal() {
            return Ok(Self::Piped);
        }
        // Whatever stdout is, what is typed is shown where it is typed.
        let config = Config::builder().behavior(Behavior::PreferTerm).auto_add_history(true);
        let editor = Editor::with_history(config.build(), MemHistory::new());
        Ok(Self::Terminal(Box::new(editor.context("the terminal cannot be used")?)))
    }

    pub(super) fn is_terminal(&self) -> bool {
        matches!(self, Self::Terminal(_))
    }

    /// The next line, asked for at a terminal.
    pub(super) fn next(&mut self) -> Result<Line> {
        let Self::Terminal(editor) = self else {
            let mut line = String::new();
            let read = io::stdin().lock().read_line(&mut line).context("stdin cannot be read")?;
            return Ok(if read == 0 { Line::End } else { Line::Said(line) });
        };
        match editor.readline("> ") {
            Ok(line) => Ok(Line::Said(line)),
            Err(ReadlineError::Interrupted) => Ok(Line::Interrupted),
            Err(ReadlineError::Eof) => Ok(Line::End),
            Err(error) => Err(error).context("the terminal cannot be read"),
        }
    }
}
