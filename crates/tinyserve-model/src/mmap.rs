//! Files as memory, and memory that goes back to the system: the one place of the crate that needs
//! `unsafe`.

use std::alloc::{Layout, handle_alloc_error};
use std::fs::File;
use std::io;
use std::sync::Arc;
use std::time::SystemTime;

use bytes::Bytes;
use memmap2::{Mmap, MmapMut};

/// A file that is mapped into memory; the pages are read when they are first used.
#[derive(Debug, Clone)]
pub(crate) struct MappedFile {
    map: Arc<Mmap>,
    modified: Option<SystemTime>,
}

impl MappedFile {
    pub(crate) fn new(file: &File) -> io::Result<Self> {
        // SAFETY: the map is read-only and shared, and the file stays open behind it. What remains
        // is another process that truncates or rewrites the file while a model runs: no program
        // can rule that out for a file it maps, and every loader of weights accepts it. Replacing
        // the file by renaming a new one over it, as downloads do, is harmless.
        let map = unsafe { Mmap::map(file)? };
        // Not every file system knows.
        let modified = file.metadata()?.modified().ok();
        Ok(Self { map: Arc::new(map), modified })
    }

    /// When the file was last written, if that is known.
    pub(crate) fn modified(&self) -> Option<SystemTime> {
        self.modified
    }

    /// Its content.
    pub(crate) fn bytes(&self) -> Bytes {
        Bytes::from_owner(self.clone())
    }

    /// Takes what was read out of this process's memory; what is used again is read again.
    pub(crate) fn release(&self) {
        #[cfg(target_os = "linux")]
        // SAFETY: the map is shared and read-only, so that its pages hold what the file holds, and
        // a page that is used after this is filled from the file as it was the first time.
        unsafe {
            // Only memory is at stake: a system that refuses keeps it.
            let _ = self.map.unchecked_advise(memmap2::UncheckedAdvice::DontNeed);
        }
    }
}

/// Memory of `length` bytes from the beginning of a page on, as `fill` leaves it.
///
/// All of it goes back to the system when it is dropped: an allocator keeps some of what is freed
/// for later.
pub(crate) fn filled(length: usize, fill: impl FnOnce(&mut [u8])) -> Bytes {
    let Ok(mut map) = MmapMut::map_anon(length) else {
        // As `Vec` does.
        handle_alloc_error(Layout::array::<u8>(length).unwrap_or(Layout::new::<u8>()));
    };
    fill(&mut map);
    Bytes::from_owner(map)
}

impl AsRef<[u8]> for MappedFile {
    fn as_ref(&self) -> &[u8] {
        &self.map
    }
}
