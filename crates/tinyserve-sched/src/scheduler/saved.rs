//! Sessions that are saved to files and restored from them, between steps.

use std::path::Path;

use std::sync::Arc;

use tinyserve_kv::{KvError, Prefix};
use tinyserve_model::{ModelError, SelectedTokens, SessionToSave};

use super::Scheduler;
use crate::history::History;
use crate::session::Kept;
use crate::{AttentionChoice, Runner, SessionInfo};

impl<R: Runner> Scheduler<R> {
    /// Saves the full pages that a session keeps between its requests to a file; returns how many
    /// tokens they hold. Requests wait meanwhile.
    ///
    /// # Errors
    /// When there is no such session, a request of it runs, tokens of it were pruned, it used a page
    /// selector of a request, or the file cannot be written.
    pub fn save_session(&self, id: &str, path: &Path, identity: &str) -> Result<usize, ModelError> {
        let kept = self.sessions.kept(id).filter(|kept| !kept.table.pages().is_empty());
        let Some(Kept { table, tokens, cache_salt, history }) = kept else {
            let expected = "a session that holds pages and whose requests have ended";
            return Err(refused(id, expected));
        };
        if !history.prunings.is_empty() {
            return Err(refused(id, "a session of which no tokens were pruned"));
        }
        let mut selected = Vec::new();
        for (positions, attention) in history.selected() {
            let policy = match (attention, &self.config.attention) {
                (AttentionChoice::Dense, _) => continue,
                (AttentionChoice::Policy(policy), _) => Some(*policy),
                (AttentionChoice::Custom(own), AttentionChoice::Custom(engines))
                    if Arc::ptr_eq(own, engines) =>
                {
                    None
                }
                (AttentionChoice::Custom(_), _) => {
                    let expected =
                        "a session whose requests brought no page selectors of their own";
                    return Err(refused(id, expected));
                }
            };
            selected.push(SelectedTokens { positions: positions.clone(), policy });
        }
        let prefix = Prefix { salt: cache_salt, tokens };
        let session = SessionToSave { identity, prefix, selected: &selected, table };
        self.runner.save_session(path, session)
    }

    /// Restores a session from a file, in place of the one of this name; sessions that rest make
    /// room for it. Requests wait meanwhile.
    ///
    /// # Errors
    /// When requests of a session of this name wait or run, the file is refused, a page selector
    /// that is not a policy was used and this engine has none, or too few pages are available. The
    /// session is then what it was before.
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
        let selected = restored.selected.into_iter().map(|SelectedTokens { positions, policy }| {
            let attention = match (policy, &self.config.attention) {
                (Some(policy), _) => AttentionChoice::Policy(policy),
                (None, AttentionChoice::Custom(engines)) => {
                    AttentionChoice::Custom(engines.clone())
                }
                (None, _) => return None,
            };
            Some((positions, attention))
        });
        let Some(selected) = selected.collect() else {
            self.runner.release(restored.table);
            return Err(ModelError::File {
                file: path.display().to_string(),
                found: "tokens that a custom page selector has computed".to_owned(),
                expected: "an engine with that selector, to compute them again".to_owned(),
            });
        };
        self.sessions.create(id);
        let kept = Kept {
            table: restored.table,
            tokens: restored.tokens,
            cache_salt: restored.salt,
            history: History::of_selected(selected),
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
