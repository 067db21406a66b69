//! What goes to stdout.

use std::io::{self, ErrorKind, Write};

use anyhow::{Context, Result};
use serde::Serialize;

use crate::exit::Quiet;

/// Writes `bytes` to stdout at once.
pub(crate) fn bytes(bytes: &[u8]) -> Result<()> {
    let mut out = io::stdout().lock();
    match out.write_all(bytes).and_then(|()| out.flush()) {
        Err(error) if error.kind() == ErrorKind::BrokenPipe => Err(Quiet::ClosedPipe.into()),
        result => result.context("stdout cannot be written"),
    }
}

/// Writes `text` to stdout at once.
pub(crate) fn text(text: &str) -> Result<()> {
    bytes(text.as_bytes())
}

/// Writes `value` as one line of JSON.
pub(crate) fn json(value: &impl Serialize) -> Result<()> {
    let mut json = serde_json::to_string(value).context("JSON cannot be written")?;
    json.push('\n');
    text(&json)
}
