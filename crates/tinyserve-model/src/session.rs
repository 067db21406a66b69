//! Sessions on disk: the full pages of a sequence, saved to a file and restored from it.
//!
//! Only full pages are saved. What a sequence holds beyond its last full page, fewer tokens than a
//! page has, is computed again by whoever goes on with it: the file tells which tokens these are,
//! and how all of them were computed.

mod file;
mod selected;

use std::fs::File;
use std::io::{BufReader, BufWriter};
use std::path::Path;

use tinyserve_kernels::Backend;
use tinyserve_kv::{PageTable, Prefix};

use crate::{KvCache, ModelError};
use file::{Header, Replacement};
pub use selected::SelectedTokens;

/// Bytes that are read or written at a time.
const BUFFER_BYTES: usize = 1 << 20;

/// A session to be saved.
#[derive(Debug, Clone, Copy)]
pub struct SessionToSave<'a> {
    /// Names everything that keys and values depend on beside tokens and layout: the model, how
    /// its weights are kept. Only who asks for the same can restore the session.
    pub identity: &'a str,
    /// Its tokens, of which its pages hold the first, and who may share them.
    pub prefix: Prefix<'a>,
    /// Those of the tokens that selecting steps computed, ascending.
    pub selected: &'a [SelectedTokens],
    /// Its pages.
    pub table: &'a PageTable,
}

/// A session that was read from a file.
#[derive(Debug)]
pub struct RestoredSession {
    /// Its pages, all of them full.
    pub table: PageTable,
    /// Its tokens, of which the pages hold the first.
    pub tokens: Vec<u32>,
    /// Only sequences of the same salt may use them.
    pub salt: String,
    /// Those of the tokens that selecting steps computed, ascending.
    pub selected: Vec<SelectedTokens>,
}

impl<B: Backend> KvCache<B> {
    /// Saves the full pages of a session and all of its tokens to `path`; returns how many tokens
    /// the pages hold.
    ///
    /// The file is written beside `path` and then put in its place, so that whatever happens, and
    /// whenever, `path` is the old file or the new one. It is readable by its owner alone: tokens
    /// can be read from it.
    ///
    /// # Errors
    /// When the file cannot be written, another process is writing it, or tokens of the session
    /// were pruned.
    pub fn save_session(
        &self,
        backend: &B,
        path: &Path,
        session: SessionToSave<'_>,
    ) -> Result<usize, ModelError> {
        let SessionToSave { identity, prefix, selected, table } = session;
        if table.next_position() != table.len() {
            return Err(ModelError::Setting {
                name: "session",
                found: format!("pruned to {} of {} tokens", table.len(), table.next_position()),
                expected: "one that holds all of its tokens".to_owned(),
            });
        }
        let page_size = self.layout().page_size();
        let pages = prefix.tokens.len().min(table.len()) / page_size;
        let counts = (prefix.tokens.len(), pages);
        let header = Header::new(identity, prefix.salt, self.layout(), counts).selecting(selected);
        let file = Replacement::create(path)?;
        let mut out = BufWriter::with_capacity(BUFFER_BYTES, file.file());
        let failed = |error: std::io::Error| file::unwritable(path, &error);
        let mut write = || -> Result<(), ModelError> {
            header.write(prefix.tokens, &mut out).map_err(failed)?;
            let mut index = 0;
            backend.download_pages(&self.pages, &table.pages()[..pages], |bytes| {
                index += 1;
                file::write_page(index - 1, bytes, &mut out).map_err(failed)
            })?;
            std::io::Write::flush(&mut out).map_err(failed)
        };
        let written = write();
        drop(out);
        written?;
        file.commit()?;
        Ok(pages * page_size)
    }

    /// Reads a session that [`Self::save_session`] wrote into pages of this cache.
    ///
    /// # Errors
    /// When the file cannot be read, is no session file, was written for another `identity` or
    /// layout, is damaged or cut short, or too few pages are available. Nothing is restored then.
    pub fn restore_session(
        &mut self,
        backend: &B,
        path: &Path,
        identity: &str,
    ) -> Result<RestoredSession, ModelError> {
        let opened = File::open(path).and_then(|file| Ok((file.metadata()?.len(), file)));
        let (length, opened) = opened.map_err(|error| file::unreadable(path, &error))?;
        let mut input = BufReader::with_capacity(BUFFER_BYTES, opened);
        let (header, tokens) = Header::read(path, length, &mut input)?;
        header.check(path, identity, self.layout(), length)?;
        let selected = header.selected(path)?;
        let mut table = self.new_table();
        self.extend(backend, &mut table, header.pages * self.layout().page_size())?;
        let mut bytes = vec![0; header.page_bytes()];
        for (index, &page) in table.pages().iter().enumerate() {
            let read = file::read_page(path, index, &mut bytes, &mut input);
            let put = read.and_then(|()| Ok(backend.upload_page(&mut self.pages, page, &bytes)?));
            if let Err(error) = put {
                self.release(table);
                return Err(error);
            }
        }
        Ok(RestoredSession { table, tokens, salt: header.salt, selected })
    }
}
