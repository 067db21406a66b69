//! Conversations in files: what was said, and beside it its keys and values.

use std::fs::{self, OpenOptions};
use std::io::{ErrorKind, Write};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, anyhow};
use serde::{Deserialize, Serialize};
use tinyserve::model::ChatMessage;

use super::{Chat, SESSION};
use crate::units::count;

/// What `NAME.json` holds. `NAME.session` only saves computing it again.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Conversation {
    messages: Vec<ChatMessage>,
}

impl Chat<'_> {
    /// Saves the conversation; tells what was saved.
    pub(super) fn save(&self, name: &str) -> Result<String> {
        if !self.messages.iter().any(|message| message.role == "user") {
            return Err(anyhow!("nothing was said yet"));
        }
        let (said, cached) = files(name, "/save")?;
        let messages = self.messages.clone();
        write(&said, &serde_json::to_vec_pretty(&Conversation { messages })?)?;
        let session = self.engine.get_session_info(SESSION)?;
        // A short conversation has filled no page; what an earlier one saved here is not its own.
        if session.is_none_or(|session| session.cached_pages == 0) {
            match fs::remove_file(&cached) {
                Err(error) if error.kind() != ErrorKind::NotFound => {
                    return Err(error)
                        .with_context(|| format!("{} cannot be removed", cached.display()));
                }
                _ => {}
            }
            return Ok(format!("saved {} messages\n", count(self.messages.len() as u64)));
        }
        let tokens = self.engine.save_session(SESSION, &cached)?;
        Ok(format!(
            "saved {} messages, and keys and values of {} tokens\n",
            count(self.messages.len() as u64),
            count(tokens as u64)
        ))
    }

    /// Goes on with a conversation that was saved, in place of this one; tells what was loaded.
    ///
    /// Keys and values that cannot be used are computed again with the next answer.
    pub(super) fn load(&mut self, name: &str) -> Result<String> {
        let (said, cached) = files(name, "/load")?;
        let text = fs::read(&said).with_context(|| format!("{} cannot be read", said.display()))?;
        let Conversation { messages } = serde_json::from_slice(&text).map_err(|error| {
            anyhow!("{} is no saved conversation, expected messages: {error}", said.display())
        })?;
        self.reset()?;
        self.messages = messages;
        let messages = count(self.messages.len() as u64);
        if !cached.exists() {
            return Ok(format!("loaded {messages} messages\n"));
        }
        Ok(match self.engine.restore_session(SESSION, &cached) {
            Ok(session) => format!(
                "loaded {messages} messages, and keys and values of {} tokens\n",
                count(session.cached_tokens as u64)
            ),
            Err(error) => {
                format!("loaded {messages} messages; keys and values are computed again: {error}\n")
            }
        })
    }
}

/// The files of a conversation called `name`.
fn files(name: &str, command: &str) -> Result<(PathBuf, PathBuf)> {
    if name.is_empty() || Path::new(name).file_name().is_none() {
        return Err(anyhow!("{command} needs the name of a file, without an ending"));
    }
    Ok((PathBuf::from(format!("{name}.json")), PathBuf::from(format!("{name}.session"))))
}

/// Writes a file that is its owner's alone; whatever happens, it is the old one or the new one.
fn write(path: &Path, bytes: &[u8]) -> Result<()> {
    let mut partial = path.as_os_str().to_owned();
    partial.push(".partial");
    let partial = PathBuf::from(partial);
    let mut options = OpenOptions::new();
    options.write(true).create(true).truncate(true);
    #[cfg(unix)]
    std::os::unix::fs::OpenOptionsExt::mode(&mut options, 0o600);
    let written = options.open(&partial).and_then(|mut file| {
        file.write_all(bytes)?;
        file.sync_all()?;
        fs::rename(&partial, path)
    });
    written.with_context(|| {
        // What cannot be removed is written over by the next one that saves here.
        let _ = fs::remove_file(&partial);
        format!("{} cannot be written", path.display())
    })
}
