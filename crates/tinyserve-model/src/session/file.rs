//! The session file, version 2.
//!
//! All numbers are little endian.
//!
//! | bytes | what |
//! |---|---|
//! | 8 | `TSSESSIO` |
//! | 4 | the version |
//! | 4 | length of the header |
//! | … | the header: one JSON object |
//! | 4 each | the tokens, those that no page holds included |
//! | 8 | XXH3 of everything before |
//! | `page_bytes` + 8 each | a page as [`tinyserve_kv::HostPages::read_page`] has it, and its XXH3, seeded with the page's number |
//!
//! The length of the file follows from the header; a longer or shorter one is refused. A page that
//! lies in another's place has a wrong checksum, because the seed differs.
//!
//! `selected` in the header names the tokens that selecting steps computed, and what selected.
//! Version 1 did not, and held the tokens of its pages only; it is refused.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use tinyserve_kv::KvLayout;
use twox_hash::XxHash3_64;

use super::selected::{SelectedTokens, Stored};
use crate::ModelError;

const MAGIC: [u8; 8] = *b"TSSESSIO";
const VERSION: u32 = 2;
/// Longest header: no file may make the reader allocate more. It holds a model's name, a salt, and
/// some 200 bytes for each change of what selects.
const MOST_HEADER_BYTES: u32 = 4 << 20;
const CHECKSUM_BYTES: usize = 8;
const SAVED: &str = "a session file that was written completely: save it again";

/// What a file says of its pages.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Header {
    pub(super) identity: String,
    pub(super) salt: String,
    kv_cache_dtype: String,
    layers: usize,
    kv_heads: usize,
    head_dim: usize,
    page_size: usize,
    page_bytes: usize,
    tokens: usize,
    /// Full pages, which hold the first tokens.
    pub(super) pages: usize,
    selected: Vec<Stored>,
    /// Bytes before the pages.
    #[serde(skip)]
    front_bytes: u64,
}

impl Header {
    pub(super) fn new(
        identity: &str,
        salt: &str,
        layout: &KvLayout,
        (tokens, pages): (usize, usize),
    ) -> Self {
        let shape = layout.shape();
        Self {
            identity: identity.to_owned(),
            salt: salt.to_owned(),
            kv_cache_dtype: shape.format.name().to_owned(),
            layers: shape.layers,
            kv_heads: shape.kv_heads,
            head_dim: shape.head_dim,
            page_size: shape.page_size,
            page_bytes: layout.bytes_per_page(),
            tokens,
            pages,
            selected: Vec::new(),
            front_bytes: 0,
        }
    }

    /// With what selected.
    pub(super) fn selecting(mut self, selected: &[SelectedTokens]) -> Self {
        self.selected = selected.iter().map(Stored::new).collect();
        self
    }

    /// What selected.
    pub(super) fn selected(&self, path: &Path) -> Result<Vec<SelectedTokens>, ModelError> {
        let mut after = 0;
        let all = self.selected.iter().enumerate().map(|(index, stored)| {
            let read = stored.read(after, self.tokens).map_err(|refused| ModelError::Field {
                file: path.display().to_string(),
                field: format!("selected[{index}].{}", refused.field),
                found: refused.found,
                expected: refused.expected,
            })?;
            after = read.positions.end;
            Ok(read)
        });
        all.collect()
    }

    /// Bytes of one page, its checksum apart.
    pub(super) fn page_bytes(&self) -> usize {
        self.page_bytes
    }

    pub(super) fn write(&self, tokens: &[u32], out: &mut impl Write) -> io::Result<()> {
        let json = serde_json::to_vec(self)?;
        let length = u32::try_from(json.len()).ok().filter(|&length| length <= MOST_HEADER_BYTES);
        let length = length
            .ok_or_else(|| io::Error::other("its salt and what selected need too long a header"))?;
        let mut front = Vec::with_capacity(16 + json.len() + 4 * tokens.len());
        front.extend(MAGIC);
        front.extend(VERSION.to_le_bytes());
        front.extend(length.to_le_bytes());
        front.extend(json);
        front.extend(tokens.iter().flat_map(|token| token.to_le_bytes()));
        out.write_all(&front)?;
        out.write_all(&XxHash3_64::oneshot(&front).to_le_bytes())
    }

    /// Reads what comes before the pages of a file of `length` bytes, and the tokens.
    pub(super) fn read(
        path: &Path,
        length: u64,
        input: &mut impl Read,
    ) -> Result<(Self, Vec<u32>), ModelError> {
        let mut front = Vec::new();
        let mut more = |front: &mut Vec<u8>, bytes: u64, what: &str| {
            // No number in a file makes the reader allocate more than the file has.
            let rest = length.saturating_sub(front.len() as u64);
            if bytes > rest {
                return Err(refused(path, format!("{rest} bytes where {what} begins"), SAVED));
            }
            let start = front.len();
            front.resize(start + bytes as usize, 0);
            input.read_exact(&mut front[start..]).map_err(|error| unreadable(path, &error))
        };
        more(&mut front, 16, "the version")?;
        if front[..8] != MAGIC {
            return Err(refused(path, "another kind of file".to_owned(), SAVED));
        }
        let [version, header_bytes] = [8, 12]
            .map(|at| u32::from_le_bytes([front[at], front[at + 1], front[at + 2], front[at + 3]]));
        if version != VERSION {
            let expected = "version 2: save the session again with this version of TinyServe";
            return Err(refused(path, format!("version {version}"), expected));
        }
        if header_bytes > MOST_HEADER_BYTES {
            return Err(refused(path, format!("a header of {header_bytes} bytes"), SAVED));
        }
        more(&mut front, u64::from(header_bytes), "the header")?;
        let header: Self = serde_json::from_slice(&front[16..])
            .map_err(|error| refused(path, format!("a damaged header ({error})"), SAVED))?;
        let tokens_start = front.len();
        let token_bytes = (header.tokens as u64).saturating_mul(4);
        more(&mut front, token_bytes, "the list of tokens")?;
        let end = front.len();
        more(&mut front, CHECKSUM_BYTES as u64, "the checksum")?;
        if XxHash3_64::oneshot(&front[..end]).to_le_bytes() != front[end..] {
            let found = "a header and tokens that differ from their checksum".to_owned();
            return Err(refused(path, found, SAVED));
        }
        let tokens = front[tokens_start..end].chunks_exact(4);
        let tokens = tokens.map(|t| u32::from_le_bytes([t[0], t[1], t[2], t[3]])).collect();
        Ok((Self { front_bytes: front.len() as u64, ..header }, tokens))
    }

    /// Refuses a file of another model or layout, or of another length than it should have.
    pub(super) fn check(
        &self,
        path: &Path,
        identity: &str,
        layout: &KvLayout,
        length: u64,
    ) -> Result<(), ModelError> {
        let own = Self::new(identity, &self.salt, layout, (self.tokens, self.pages));
        let number = |n: usize| n.to_string();
        for (field, found, expected) in [
            ("model", self.identity.clone(), own.identity),
            ("kv_cache_dtype", self.kv_cache_dtype.clone(), own.kv_cache_dtype),
            ("page_size", number(self.page_size), number(own.page_size)),
            ("layers", number(self.layers), number(own.layers)),
            ("kv_heads", number(self.kv_heads), number(own.kv_heads)),
            ("head_dim", number(self.head_dim), number(own.head_dim)),
            ("page_bytes", number(self.page_bytes), number(own.page_bytes)),
        ] {
            if found != expected {
                return Err(ModelError::Field {
                    file: path.display().to_string(),
                    field: field.to_owned(),
                    found,
                    expected: format!("{expected}, as this engine has it"),
                });
            }
        }
        if self.pages > self.tokens / self.page_size {
            let found = format!("{} pages of {} tokens", self.pages, self.tokens);
            return Err(refused(path, found, "pages that tokens fill"));
        }
        let pages = self.pages as u64;
        let expected = (self.page_bytes + CHECKSUM_BYTES) as u64;
        let expected = pages.saturating_mul(expected).saturating_add(self.front_bytes);
        if length != expected {
            let expected = format!("{expected}, which its header leads to: {SAVED}");
            return Err(refused(path, format!("{length} bytes"), &expected));
        }
        Ok(())
    }
}

pub(super) fn write_page(index: usize, bytes: &[u8], out: &mut impl Write) -> io::Result<()> {
    out.write_all(bytes)?;
    out.write_all(&checksum(index, bytes))
}

pub(super) fn read_page(
    path: &Path,
    index: usize,
    bytes: &mut [u8],
    input: &mut impl Read,
) -> Result<(), ModelError> {
    let mut stored = [0; CHECKSUM_BYTES];
    input
        .read_exact(bytes)
        .and_then(|()| input.read_exact(&mut stored))
        .map_err(|error| unreadable(path, &error))?;
    if checksum(index, bytes) != stored {
        return Err(refused(path, format!("page {index} with a wrong checksum"), SAVED));
    }
    Ok(())
}

fn checksum(index: usize, bytes: &[u8]) -> [u8; CHECKSUM_BYTES] {
    XxHash3_64::oneshot_with_seed(index as u64, bytes).to_le_bytes()
}

/// A file that is being written, to take the place of another one.
///
/// It is locked while it is written. One that is not is what a process left that was killed.
#[derive(Debug)]
pub(super) struct Replacement {
    path: PathBuf,
    partial: PathBuf,
    file: File,
    complete: bool,
}

impl Replacement {
    pub(super) fn create(path: &Path) -> Result<Self, ModelError> {
        let mut name = path.file_name().map(std::ffi::OsStr::to_owned).ok_or_else(|| {
            refused(path, "no file name".to_owned(), "the path of a file to save the session to")
        })?;
        name.push(".partial");
        let partial = path.with_file_name(name);
        let failed = |error: io::Error| unwritable(path, &error);
        let busy = || refused(&partial, "another process writing it".to_owned(), "one at a time");
        if partial.exists() {
            let left = File::options().write(true).open(&partial).map_err(failed)?;
            left.try_lock().map_err(|_| busy())?;
            fs::remove_file(&partial).map_err(failed)?;
        }
        let mut options = OpenOptions::new();
        options.write(true).create_new(true);
        #[cfg(unix)]
        std::os::unix::fs::OpenOptionsExt::mode(&mut options, 0o600);
        let file = options.open(&partial).map_err(failed)?;
        file.try_lock().map_err(|_| busy())?;
        Ok(Self { path: path.to_owned(), partial, file, complete: false })
    }

    pub(super) fn file(&self) -> &File {
        &self.file
    }

    /// Puts the file in its place, once all of it is on the disk.
    pub(super) fn commit(mut self) -> Result<(), ModelError> {
        let moved = self.file.sync_all().and_then(|()| fs::rename(&self.partial, &self.path));
        moved.map_err(|error| unwritable(&self.path, &error))?;
        self.complete = true;
        // The name is on the disk when its folder is; where folders cannot be opened it is later.
        let folder = self.path.parent().filter(|folder| !folder.as_os_str().is_empty());
        if let Ok(folder) = File::open(folder.unwrap_or(Path::new("."))) {
            folder.sync_all().map_err(|error| unwritable(&self.path, &error))?;
        }
        Ok(())
    }
}

impl Drop for Replacement {
    fn drop(&mut self) {
        if !self.complete {
            // What cannot be removed is removed by the next one that saves here.
            let _ = fs::remove_file(&self.partial);
        }
    }
}

fn refused(path: &Path, found: String, expected: &str) -> ModelError {
    ModelError::File { file: path.display().to_string(), found, expected: expected.to_owned() }
}

pub(super) fn unreadable(path: &Path, error: &io::Error) -> ModelError {
    ModelError::Read { file: path.display().to_string(), reason: error.to_string() }
}

pub(super) fn unwritable(path: &Path, error: &io::Error) -> ModelError {
    ModelError::Write { file: path.display().to_string(), reason: error.to_string() }
}
