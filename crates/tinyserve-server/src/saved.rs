//! Sessions in files: the one folder that requests can reach, and the names they reach it by.

use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::time::SystemTime;

use tinyserve::model::ModelError;
use tinyserve::sched::SessionInfo;
use tinyserve::{TinyServe, TinyServeError};

use crate::ServerError;

/// How the files end.
const ENDING: &str = ".session";
/// Longest name of a session that is saved; with the ending it fits every file system.
const LONGEST_NAME: usize = 128;
/// What a name may be, in words.
pub(crate) const NAME: &str = "1 to 128 letters, digits, - _ or . (not first), as it names a file";

/// The folder that sessions are saved in: each in a file that is called as the session is.
#[derive(Debug)]
pub(crate) struct SessionFolder {
    path: PathBuf,
    most: usize,
    /// Held while files are counted and one is added.
    adding: Mutex<()>,
}

/// Why a session was not saved or restored.
#[derive(Debug)]
pub(crate) enum SessionFileError {
    /// There is no file of this name.
    NoFile,
    /// So many are saved already.
    Full(usize),
    /// What the engine says of the session or of its file.
    Refused(TinyServeError),
}

impl SessionFolder {
    /// The folder at `path`, made if it is missing, for at most `most` files.
    ///
    /// # Errors
    /// When it is no folder, cannot be made or cannot be read.
    pub(crate) fn open(path: &Path, most: usize) -> Result<Self, ServerError> {
        let folder = Self { path: path.to_owned(), most, adding: Mutex::default() };
        std::fs::create_dir_all(path).and_then(|()| folder.names()).map_err(|error| {
            ServerError::Setting {
                field: "session_folder",
                found: format!("{} ({error})", path.display()),
                expected: "a folder that can be read and written".to_owned(),
            }
        })?;
        Ok(folder)
    }

    /// The file of the session `id`; `None` when a session of this name has none.
    pub(crate) fn file(&self, id: &str) -> Option<PathBuf> {
        is_file_name(id).then(|| self.path.join(format!("{id}{ENDING}")))
    }

    /// The names of the sessions that are saved, those that were saved last at the end.
    pub(crate) fn names(&self) -> std::io::Result<Vec<String>> {
        let mut found = Vec::new();
        for entry in std::fs::read_dir(&self.path)? {
            let entry = entry?;
            let name = entry.file_name();
            let id = name.to_str().and_then(|name| name.strip_suffix(ENDING));
            let Some(id) = id.filter(|id| is_file_name(id)) else { continue };
            // One that was deleted meanwhile is not there.
            let Ok(about) = entry.metadata() else { continue };
            let saved = about.modified().unwrap_or(SystemTime::UNIX_EPOCH);
            found.push((saved, id.to_owned()));
        }
        found.sort();
        Ok(found.into_iter().map(|(_, id)| id).collect())
    }

    /// Saves what the session `id` holds to `file`; how many tokens, and the bytes of the file.
    pub(crate) fn save(
        &self,
        engine: &TinyServe,
        id: &str,
        file: &Path,
    ) -> Result<(usize, u64), SessionFileError> {
        let _adding = self.adding.lock().unwrap_or_else(PoisonError::into_inner);
        let saved = self.names().map_or(0, |names| names.len());
        if saved >= self.most && !file.exists() {
            return Err(SessionFileError::Full(saved));
        }
        let tokens = engine.save_session(id, file).map_err(SessionFileError::Refused)?;
        Ok((tokens, std::fs::metadata(file).map_or(0, |about| about.len())))
    }

    /// Restores the session `id` from `file`.
    pub(crate) fn restore(
        &self,
        engine: &TinyServe,
        id: &str,
        file: &Path,
    ) -> Result<SessionInfo, SessionFileError> {
        if !file.exists() {
            return Err(SessionFileError::NoFile);
        }
        engine.restore_session(id, file).map_err(SessionFileError::Refused)
    }

    /// Restores every session that is saved and tells of each that is refused; how many were
    /// restored. What was saved last is restored last: it stays when memory is short.
    pub(crate) fn restore_all(
        &self,
        engine: &TinyServe,
        mut refused: impl FnMut(&str, String),
    ) -> std::io::Result<usize> {
        let mut restored = 0;
        for id in self.names()? {
            let Some(file) = self.file(&id) else { continue };
            match self.restore(engine, &id, &file) {
                Ok(_) => restored += 1,
                Err(SessionFileError::Refused(error)) => refused(&id, self.sentence(&error)),
                // Deleted since the folder was read.
                Err(_) => {}
            }
        }
        Ok(restored)
    }

    /// Deletes the file of the session `id`; tells whether there was one.
    pub(crate) fn delete(&self, id: &str) -> std::io::Result<bool> {
        let Some(file) = self.file(id) else { return Ok(false) };
        match std::fs::remove_file(file) {
            Ok(()) => Ok(true),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// What `error` says, with files called by their names: where the folder is, clients need not
    /// know.
    pub(crate) fn sentence(&self, error: &TinyServeError) -> String {
        let mut folder = self.path.display().to_string();
        if !folder.ends_with('/') {
            folder.push('/');
        }
        error.to_string().replace(&folder, "")
    }
}

impl SessionFileError {
    /// Whether the session is in the way: its requests run, or it holds nothing that can be saved.
    pub(crate) fn is_about_the_session(error: &TinyServeError) -> bool {
        matches!(error, TinyServeError::Model(ModelError::Setting { .. }))
    }

    /// Whether there was no room for its pages.
    pub(crate) fn is_about_room(error: &TinyServeError) -> bool {
        use tinyserve::kv::KvError::OutOfPages;
        matches!(error, TinyServeError::Model(ModelError::Kv(OutOfPages { .. })))
    }

    /// Whether the file is damaged or another model's.
    pub(crate) fn is_about_the_file(error: &TinyServeError) -> bool {
        matches!(error, TinyServeError::Model(ModelError::File { .. } | ModelError::Field { .. }))
    }
}

/// Whether a session may be saved under its own name: nothing that means something to a file
/// system, in any folder.
fn is_file_name(id: &str) -> bool {
    let fits = |byte: u8| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte);
    (1..=LONGEST_NAME).contains(&id.len()) && !id.starts_with('.') && id.bytes().all(fits)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_plain_names_are_files() {
        for name in ["a", "bob-2_B.c", &"x".repeat(128)] {
            assert!(is_file_name(name), "{name}");
        }
        for name in [
            "",
            ".",
            "..",
            ".a",
            "a/b",
            "../a",
            "/a",
            "a\\b",
            "a b",
            "a\0",
            "é",
            "a:b",
            "a\n",
            "~",
            "*",
            &"x".repeat(129),
        ] {
            assert!(!is_file_name(name), "{name:?}");
        }
    }

    #[test]
    fn files_are_listed_by_age_and_others_are_not() {
        let root = tempfile::tempdir().unwrap();
        let path = root.path().join("made/here");
        let folder = SessionFolder::open(&path, 9).unwrap();
        for (name, age) in [
            ("b.session", 30),
            ("a.session", 10),
            ("c.session", 20),
            (".d.session", 1),
            ("e.txt", 1),
        ] {
            let file = std::fs::File::create(path.join(name)).unwrap();
            file.set_modified(SystemTime::now() - std::time::Duration::from_secs(age)).unwrap();
        }
        assert_eq!(folder.names().unwrap(), ["b", "c", "a"]);
        assert!(folder.delete("c").unwrap() && !folder.delete("c").unwrap());
        assert!(!folder.delete("../c").unwrap());
        assert_eq!(folder.names().unwrap(), ["b", "a"]);
        let file = path.join("e.txt");
        let refused = SessionFolder::open(&file, 9).unwrap_err().to_string();
        assert!(refused.contains("session_folder is") && refused.contains("e.txt"), "{refused}");
    }
}
