//! Sessions that are saved to files and restored from them, between steps.

use std::path::Path;

use tinyserve_kv::{KvError, Prefix};
use tinyserve_model::{ModelError, SessionToSave};

use super::Scheduler;
use crate::pruning::Prunings;
use crate::session::Kept;
use crate::{Runner, SessionInfo};

impl<R: Runner> Scheduler<R> {
    /// Saves the full pages that a session keeps between its requests to a file; returns how many
    /// tokens they hold. Requests wait meanwhile.
    ///
    /// # Errors
    /// When there is no such session, a request of it runs, or the file cannot be written.
    pub fn save_session(&self, id: &str, path: &Path, identity: &str) -> Result<usize, ModelError> {
        let Some(Kept { table, tokens, cache_salt, dense, .. }) = self.sessions.kept(id) else {
            let expected = "a session that holds pages and whose requests have ended";
            return Err(refused(id, expected));
        };
        let prefix = Prefix { salt: cache_salt, tokens };
        let session = SessionToSave { identity, prefix, dense_tokens: *dense, table };
        self.runner.save_session(path, session)
    }

    /// Restores a session from a file, in place of the one of this name; sessions that rest make
    /// room for it. Requests wait meanwhile.
    ///
    /// # Errors
    /// When requests of a session of this name wait or run, the file is refused, or too few pages
    /// are available. The session is then what it was before.
    pub fn restore_session(
        &mut self,
        id: &str,
        path: &Path,
        identity: &str,
    ) -> Result<SessionInfo, ModelError> {
        if self.sessions.open_requests(id) > 0 {
            return Err(refused(id, "a session whose requests have ended"));
        }
        let restored = loop {
            match self.runner.restore_session(path, identity) {
                Err(ModelError::Kv(KvError::OutOfPages { .. })) if self.evict_session(Some(id)) => {
                }
                result => break result?,
            }
        };
        self.sessions.create(id);
        let kept = Kept {
            table: restored.table,
            tokens: restored.tokens,
            cache_salt: restored.salt,
            dense: restored.dense_tokens,
            // Files do not tell.
            selected: Vec::new(),
            prunings: Prunings::default(),
        };
        if let Some(before) = self.sessions.keep(id, kept) {
            self.runner.release(before.table);
        }
        self.set_gauges();
        self.sessions.info(id).ok_or_else(|| refused(id, "a session that was just created"))
    }
}

fn refused(id: &str, expected: &str) -> ModelError {
    ModelError::Setting { name: "session", found: format!("{id:?}"), expected: expected.to_owned() }
}
