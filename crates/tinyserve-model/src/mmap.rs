//! Files as memory: the one place of the crate that needs `unsafe`.

use std::fs::File;
use std::io;

use bytes::Bytes;
use memmap2::Mmap;

/// Maps a file into memory; the pages are read when they are first used.
pub(crate) fn map(file: &File) -> io::Result<Bytes> {
    // SAFETY: the map is read-only and private to this process, and the file stays open behind it.
    // What remains is another process that truncates or rewrites the file while a model runs: no
    // program can rule that out for a file it maps, and every loader of weights accepts it.
    // Replacing the file by renaming a new one over it, as downloads do, is harmless.
    let map = unsafe { Mmap::map(file)? };
    Ok(Bytes::from_owner(map))
}
