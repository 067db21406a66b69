//! Quantised weights on disk: one file for each checkpoint and format, in a folder of the user's.
//!
//! ```text
//! magic [8]  version u32  header bytes u32  header checksum u32
//! header, JSON: layout, format, source files, matrices, checksums
//! zeros up to a multiple of 4096
//! matrices, each from a multiple of 64: weights, then biases as f32
//! ```
//!
//! Numbers are little-endian. A file that is not what its header says, or was made from another
//! checkpoint, is never used: it is replaced. It is written under another name first, so that a
//! half-written one is never found.

mod format;
mod identity;

use std::fmt;
use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use tinyserve_kernels::{LinearImage, WeightFormat};

use crate::mmap::MappedFile;
use crate::{Checkpoint, ModelError};
use format::{Content, Header};
use identity::source_files;

/// What became of a cache of weights.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum CacheOutcome {
    /// The weights are the file's.
    Used {
        /// The file.
        file: PathBuf,
    },
    /// The weights were quantised, and the file holds them now.
    Written {
        /// The file.
        file: PathBuf,
        /// Why the file that was there could not be used; `None` when there was none.
        replaced: Option<String>,
    },
    /// The weights were quantised, and the file could not be written.
    NotWritten {
        /// The file.
        file: PathBuf,
        /// What the system says.
        reason: String,
    },
}

impl CacheOutcome {
    /// Whether it is something that a user should hear of without asking.
    #[must_use]
    pub fn is_warning(&self) -> bool {
        !matches!(self, Self::Used { .. } | Self::Written { replaced: None, .. })
    }
}

impl fmt::Display for CacheOutcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Used { file } => write!(f, "weights cache {}: used", file.display()),
            Self::Written { file, replaced: None } => {
                write!(f, "weights cache {}: written", file.display())
            }
            Self::Written { file, replaced: Some(why) } => {
                let file = file.display();
                write!(f, "weights cache {file}: {why}, so weights were quantised and it replaced")
            }
            Self::NotWritten { file, reason } => {
                write!(f, "weights cache {} cannot be written: {reason}", file.display())
            }
        }
    }
}

/// The cache of one checkpoint in one format.
pub(crate) struct WeightsCache {
    file: PathBuf,
    /// What the file must say of itself.
    expected: Header,
    found: Found,
}

enum Found {
    Nothing,
    Content(Content),
    Unusable(String),
}

impl WeightsCache {
    /// Looks for the cache of `checkpoint` in `folder`, which is made if there is none.
    pub(crate) fn open(
        folder: &Path,
        checkpoint: &Checkpoint,
        format: WeightFormat,
        layout: Option<&'static str>,
    ) -> Result<Self, ModelError> {
        let wrong = |found: &str, expected: &str| ModelError::Setting {
            name: "weights_cache",
            found: format!("{} with {found}", folder.display()),
            expected: expected.to_owned(),
        };
        let format = match format {
            WeightFormat::Int8 => "int8",
            WeightFormat::Int4 => "int4",
            WeightFormat::Stored => {
                return Err(wrong("weights as they are stored", "weights int8 or int4"));
            }
        };
        let layout = layout.ok_or_else(|| wrong("this device", "a CPU"))?;
        fs::create_dir_all(folder).map_err(|error| ModelError::File {
            file: folder.display().to_string(),
            found: error.to_string(),
            expected: "a folder for cached weights, or a place where one can be made".to_owned(),
        })?;
        let file = folder.join(format!("{}-{format}.weights", checkpoint.cache_name()));
        let expected = Header::new(layout, format, source_files(checkpoint));
        let found = match read(&file, &expected) {
            Ok(None) => Found::Nothing,
            Ok(Some(content)) => Found::Content(content),
            Err(why) => Found::Unusable(why),
        };
        Ok(Self { file, expected, found })
    }

    /// The matrix `name`, if the cache has it in that format and with those inputs and outputs.
    pub(crate) fn image(
        &self,
        name: &str,
        shape: (WeightFormat, usize, usize),
    ) -> Option<LinearImage> {
        let Found::Content(content) = &self.found else { return None };
        let image = content.image(name)?;
        ((image.format, image.inputs, image.outputs) == shape).then_some(image)
    }

    /// Writes what had to be quantised.
    pub(crate) fn close(self, images: Vec<(String, LinearImage)>) -> CacheOutcome {
        let Self { file, expected, found } = self;
        let (mut images, replaced) = match found {
            Found::Content(_) if images.is_empty() => return CacheOutcome::Used { file },
            Found::Content(content) => {
                let mut all = content.images();
                all.retain(|(name, _)| images.iter().all(|(other, _)| other != name));
                all.extend(images);
                (all, Some("not all matrices of the model are in it".to_owned()))
            }
            Found::Unusable(why) => (images, Some(why)),
            Found::Nothing => (images, None),
        };
        images.sort_by(|(a, _), (b, _)| a.cmp(b));
        match write(&file, expected, &images) {
            Ok(()) => CacheOutcome::Written { file, replaced },
            Err(error) => CacheOutcome::NotWritten { file, reason: error.to_string() },
        }
    }
}

/// The content of a cache; `None` when there is no file. An error says why it cannot be used.
fn read(file: &Path, expected: &Header) -> Result<Option<Content>, String> {
    let opened = match File::open(file) {
        Ok(opened) => opened,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(error.to_string()),
    };
    let metadata = opened.metadata().map_err(|error| error.to_string())?;
    if !metadata.is_file() || metadata.len() == 0 {
        return Err("it is no file with content".to_owned());
    }
    let map = MappedFile::new(&opened).map_err(|error| error.to_string())?;
    Content::parse(&map.bytes(), expected).map(Some)
}

/// Writes beside the file, then takes its place.
fn write(file: &Path, header: Header, images: &[(String, LinearImage)]) -> io::Result<()> {
    let beside = file.with_extension(format!("weights.{}.part", std::process::id()));
    let written = File::create(&beside).and_then(|opened| {
        let mut out = io::BufWriter::with_capacity(1 << 20, opened);
        header.write(images, &mut out)?;
        out.flush()?;
        out.get_ref().sync_all()
    });
    let renamed = written.and_then(|()| fs::rename(&beside, file));
    if renamed.is_err() {
        // What could not be written is no use to anyone, and its removal may fail as well.
        let _ = fs::remove_file(&beside);
    }
    renamed
}
