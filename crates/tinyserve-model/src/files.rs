//! Where a checkpoint's files are: a folder, the binary itself, or nowhere.

use std::fs::{self, File, Metadata};
use std::io;
use std::path::{Path, PathBuf};

use bytes::Bytes;

use crate::mmap::MappedFile;
use crate::{BUILTIN_MODEL, ModelError, builtin};

/// Largest file that is read whole: above any tokenizer there is.
const MOST_TEXT_BYTES: u64 = 256 << 20;

/// The files of one checkpoint.
#[derive(Debug, Clone)]
pub(crate) enum Files {
    Folder(PathBuf),
    Builtin,
    /// None: the checkpoint was made in memory, and has this name.
    None(String),
}

impl Files {
    /// The files of `model`: a folder, or the name of a built-in model.
    pub(crate) fn locate(model: &str) -> Result<Self, ModelError> {
        match model {
            BUILTIN_MODEL => Ok(Self::Builtin),
            name if name.starts_with("builtin:") => Err(ModelError::Setting {
                name: "model",
                found: name.to_owned(),
                expected: format!("a folder or {BUILTIN_MODEL}"),
            }),
            folder => Self::folder(Path::new(folder)),
        }
    }

    /// The files in `folder`.
    pub(crate) fn folder(folder: &Path) -> Result<Self, ModelError> {
        let expected = format!(
            "a folder with config.json, model.safetensors and tokenizer.json, or {BUILTIN_MODEL}"
        );
        let found = match fs::metadata(folder) {
            Ok(metadata) if metadata.is_dir() => return Ok(Self::Folder(folder.to_owned())),
            Ok(_) => "a file".to_owned(),
            Err(error) if error.kind() == io::ErrorKind::NotFound => "no such folder".to_owned(),
            Err(error) => error.to_string(),
        };
        Err(ModelError::File { file: folder.display().to_string(), found, expected })
    }

    /// What error messages call the whole.
    pub(crate) fn place(&self) -> String {
        match self {
            Self::Folder(folder) => folder.display().to_string(),
            Self::Builtin => BUILTIN_MODEL.to_owned(),
            Self::None(name) => name.clone(),
        }
    }

    /// What error messages call the file `name`.
    pub(crate) fn path(&self, name: &str) -> String {
        match self {
            Self::Folder(folder) => folder.join(name).display().to_string(),
            Self::Builtin | Self::None(_) => format!("{}/{name}", self.place()),
        }
    }

    /// Whether there is something called `name`.
    pub(crate) fn exists(&self, name: &str) -> bool {
        match self {
            Self::Folder(folder) => folder.join(name).exists(),
            Self::Builtin => builtin::file(name).is_some(),
            Self::None(_) => false,
        }
    }

    /// The content of a small file; `None` when there is none.
    pub(crate) fn read(&self, name: &str) -> Result<Option<Bytes>, ModelError> {
        let folder = match self {
            Self::Folder(folder) => folder,
            Self::Builtin => return Ok(builtin::file(name)),
            Self::None(_) => return Ok(None),
        };
        let path = folder.join(name);
        let Some(metadata) = self.metadata(&path, name)? else { return Ok(None) };
        if metadata.len() > MOST_TEXT_BYTES {
            return Err(ModelError::File {
                file: self.path(name),
                found: format!("{} bytes", metadata.len()),
                expected: format!("at most {MOST_TEXT_BYTES}"),
            });
        }
        let bytes = fs::read(&path).map_err(|error| self.unreadable(name, &error))?;
        Ok(Some(bytes.into()))
    }

    /// A large file as memory that is read when it is used, and the map behind it where there is
    /// one; `None` when there is no such file.
    pub(crate) fn map(
        &self,
        name: &str,
    ) -> Result<Option<(Bytes, Option<MappedFile>)>, ModelError> {
        let folder = match self {
            Self::Folder(folder) => folder,
            Self::Builtin => return Ok(builtin::file(name).map(|bytes| (bytes, None))),
            Self::None(_) => return Ok(None),
        };
        let path = folder.join(name);
        let Some(metadata) = self.metadata(&path, name)? else { return Ok(None) };
        if metadata.len() == 0 {
            // Not every system maps nothing.
            return Ok(Some((Bytes::new(), None)));
        }
        let map = File::open(&path).and_then(|file| MappedFile::new(&file));
        let map = map.map_err(|error| self.unreadable(name, &error))?;
        Ok(Some((map.bytes(), Some(map))))
    }

    /// `None` when there is no such file.
    fn metadata(&self, path: &Path, name: &str) -> Result<Option<Metadata>, ModelError> {
        match fs::metadata(path) {
            Ok(metadata) if metadata.is_file() => Ok(Some(metadata)),
            // Opening a pipe would wait for a writer.
            Ok(metadata) => Err(ModelError::File {
                file: self.path(name),
                found: if metadata.is_dir() { "a folder" } else { "a device" }.to_owned(),
                expected: "a file".to_owned(),
            }),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(self.unreadable(name, &error)),
        }
    }

    fn unreadable(&self, name: &str, error: &io::Error) -> ModelError {
        ModelError::Read { file: self.path(name), reason: error.to_string() }
    }
}
