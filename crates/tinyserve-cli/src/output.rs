//! What goes to stdout, and whether there is a place for what goes to files.

use std::io::{self, ErrorKind, Write};
use std::path::Path;

use anyhow::{Context, Result, anyhow};
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

/// Whether `file` could be written, as far as its folder tells: work of minutes is not followed by
/// the news that it cannot be kept.
pub(crate) fn has_place(file: &Path) -> Result<()> {
    let folder = file.parent().filter(|folder| !folder.as_os_str().is_empty());
    match folder.filter(|folder| !folder.is_dir()) {
        Some(folder) => {
            let (file, folder) = (file.display(), folder.display());
            Err(anyhow!("{file} cannot be written: {folder} is no folder"))
        }
        None => Ok(()),
    }
}
