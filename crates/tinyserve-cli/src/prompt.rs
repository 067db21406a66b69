//! Text from a flag, a file or stdin.

use std::fs;
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, anyhow};
use clap::Args;

/// Exactly one source of a prompt.
#[derive(Debug, Args)]
#[group(required = true, multiple = false)]
pub(crate) struct PromptArgs {
    /// The prompt.
    #[arg(short, long, value_name = "TEXT", allow_hyphen_values = true)]
    pub(crate) prompt: Option<String>,
    /// A file with the prompt, taken as it is, or `-` for stdin.
    #[arg(long, value_name = "FILE")]
    pub(crate) prompt_file: Option<PathBuf>,
}

impl PromptArgs {
    /// The prompt's text, which may be empty.
    pub(crate) fn read(&self) -> Result<String> {
        match (&self.prompt, &self.prompt_file) {
            (Some(text), _) => Ok(text.clone()),
            (None, Some(file)) => read_text(file),
            (None, None) => Err(anyhow!("no prompt was given")),
        }
    }

    /// Where the prompt comes from, in words.
    pub(crate) fn place(&self) -> String {
        match &self.prompt_file {
            Some(file) => place(file),
            None => "the prompt".to_owned(),
        }
    }
}

/// The text of a UTF-8 file, or of stdin for `-`.
pub(crate) fn read_text(file: &Path) -> Result<String> {
    let bytes = if is_stdin(file) {
        let mut bytes = Vec::new();
        io::stdin().lock().read_to_end(&mut bytes).map(|_| bytes)
    } else {
        fs::read(file)
    }
    .with_context(|| format!("{} cannot be read", place(file)))?;
    String::from_utf8(bytes).map_err(|error| {
        let offset = error.utf8_error().valid_up_to();
        anyhow!(
            "{} is not UTF-8 text: found byte 0x{:02x} at offset {offset}, expected UTF-8",
            place(file),
            error.as_bytes()[offset],
        )
    })
}

fn is_stdin(file: &Path) -> bool {
    file == Path::new("-")
}

fn place(file: &Path) -> String {
    if is_stdin(file) { "stdin".to_owned() } else { file.display().to_string() }
}
