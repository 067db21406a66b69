//! Sessions on disk: the full pages of a sequence, saved to a file and restored from it.
//!
//! Only full pages are saved. What a sequence holds beyond its last full page, fewer tokens than a
//! page has, is computed again by whoever goes on with it.

mod file;

use std::fs::File;
use std::io::{BufReader, BufWriter};
use std::path::Path;

use tinyserve_kernels::Backend;
use tinyserve_kv::{PageTable, Prefix};

use crate::{KvCache, ModelError};
use file::{Header, Replacement};

/// Bytes that are read or written at a time.
const BUFFER_BYTES: usize = 1 << 20;

/// A session to be saved.
#[derive(Debug, Clone, Copy)]
pub struct SessionToSave<'a> {
    /// Names everything that keys and values depend on beside tokens and layout: the model, how
    /// its weights are kept. Only who asks for the same can restore the session.
    pub identity: &'a str,
    /// The tokens that its pages hold, and who may share them.
    pub prefix: Prefix<'a>,
    /// How many of the first tokens were computed with dense attention, as any request would.
    pub dense_tokens: usize,
    /// Its pages.
    pub table: &'a PageTable,
}

/// A session that was read from a file.
#[derive(Debug)]
pub struct RestoredSession {
    /// Its pages, all of them full.
    pub table: PageTable,
    /// The tokens that they hold.
    pub tokens: Vec<u32>,
    /// Only sequences of the same salt may use them.
    pub salt: String,
    /// How many of the first tokens were computed with dense attention.
    pub dense_tokens: usize,
}

impl<B: Backend> KvCache<B> {
    /// Saves the full pages of a session to `path`; returns how many tokens they hold.
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
        let SessionToSave { identity, prefix, dense_tokens, table } = session;
        if table.next_position() != table.len() {
            return Err(ModelError::Setting {
                name: "session",
                found: format!("pruned to {} of {} tokens", table.len(), table.next_position()),
                expected: "one that holds all of its tokens".to_owned(),
            });
        }
        let page_size = self.layout().page_size();
        let pages = prefix.tokens.len().min(table.len()) / page_size;
        let tokens = &prefix.tokens[..pages * page_size];
        let counts = (tokens.len(), dense_tokens.min(tokens.len()));
        let header = Header::new(identity, prefix.salt, self.layout(), counts);
        let file = Replacement::create(path)?;
        let mut out = BufWriter::with_capacity(BUFFER_BYTES, file.file());
        let failed = |error: std::io::Error| file::unwritable(path, &error);
        let mut write = || -> Result<(), ModelError> {
            header.write(tokens, &mut out).map_err(failed)?;
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
        Ok(tokens.len())
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
        let mut table = self.new_table();
        self.extend(backend, &mut table, tokens.len())?;
        let mut bytes = vec![0; header.page_bytes()];
        for (index, &page) in table.pages().iter().enumerate() {
            let read = file::read_page(path, index, &mut bytes, &mut input);
            let put = read.and_then(|()| Ok(backend.upload_page(&mut self.pages, page, &bytes)?));
            if let Err(error) = put {
                self.release(table);
                return Err(error);
            }
        }
        let dense_tokens = header.dense_tokens;
        Ok(RestoredSession { table, tokens, salt: header.salt, dense_tokens })
    }
}
