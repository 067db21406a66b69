//! New folders that appear under their name only when they are complete.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result, bail};

/// Makes `out`, a new or an empty folder, and lets `write` fill it; whatever fails, nothing
/// half-written is left under its name.
pub(crate) fn create(out: &Path, write: impl FnOnce(&Path) -> Result<()>) -> Result<()> {
    if fs::symlink_metadata(out).is_ok() {
        let mut entries = fs::read_dir(out)
            .with_context(|| format!("{}: expected a folder to write to", out.display()))?;
        if entries.next().is_some() {
            bail!("{}: the folder is not empty, expected a new or an empty one", out.display());
        }
    }
    let Some(name) = out.file_name() else {
        bail!("{}: expected the name of a new folder", out.display());
    };
    let mut partial_name = name.to_owned();
    partial_name.push(".partial");
    let partial = out.with_file_name(partial_name);
    let made = fs::create_dir_all(&partial)
        .with_context(|| format!("cannot create {}", partial.display()))
        .and_then(|()| write(&partial));
    made.inspect_err(|_| {
        // The error says what went wrong; a folder that cannot be removed changes nothing in it.
        let _ = fs::remove_dir_all(&partial);
    })?;
    if out.exists() {
        fs::remove_dir(out).with_context(|| format!("cannot replace {}", out.display()))?;
    }
    fs::rename(&partial, out)
        .with_context(|| format!("cannot rename {} to {}", partial.display(), out.display()))
}
