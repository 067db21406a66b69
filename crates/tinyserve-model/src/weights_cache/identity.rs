//! What a cache was made from.

use std::path::Path;
use std::time::UNIX_EPOCH;

use serde::{Deserialize, Serialize};

use crate::Checkpoint;
use crate::files::Files;
use crate::mmap::MappedFile;
use crate::weights::WeightFile;

/// Bytes at the start of a file that are looked at: where tensors are named.
const FIRST_BYTES: usize = 64 * 1024;
/// Places of a file that are looked at besides.
const SAMPLES: usize = 256;
/// Bytes at each of them.
const SAMPLE_BYTES: usize = 4096;

/// A weight file as it was when the cache was made.
///
/// Reading all of it would take as long as quantising it does. Size and time tell a file that was
/// written since, as they do for `make`; samples of the content tell another checkpoint's file
/// that was copied here with its time.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct SourceFile {
    name: String,
    bytes: usize,
    /// Nanoseconds since 1970; none where it is no file of its own.
    modified: Option<u64>,
    samples: u32,
}

/// The weight files of `checkpoint`.
pub(super) fn source_files(checkpoint: &Checkpoint) -> Vec<SourceFile> {
    checkpoint.weights().files.iter().map(SourceFile::of).collect()
}

impl SourceFile {
    fn of(file: &WeightFile) -> Self {
        let modified = file.map().and_then(MappedFile::modified);
        let since = modified.and_then(|time| time.duration_since(UNIX_EPOCH).ok());
        Self {
            name: file.name.clone(),
            bytes: file.len(),
            modified: since.map(|since| since.as_nanos() as u64),
            samples: samples(&file.bytes()),
        }
    }
}

/// A checksum of the start, of places all over, and of the end.
fn samples(bytes: &[u8]) -> u32 {
    let mut sum = crc32fast::Hasher::new();
    let (first, rest) = bytes.split_at(bytes.len().min(FIRST_BYTES));
    sum.update(first);
    let step = rest.len().div_ceil(SAMPLES).max(SAMPLE_BYTES);
    for part in rest.chunks(step) {
        sum.update(&part[..part.len().min(SAMPLE_BYTES)]);
    }
    sum.update(&rest[rest.len().saturating_sub(SAMPLE_BYTES)..]);
    sum.finalize()
}

impl Checkpoint {
    /// What a cache of this checkpoint's weights is called: its name, and for a folder which one
    /// of that name.
    pub(super) fn cache_name(&self) -> String {
        let plain = |name: &str| -> String {
            let plain = |c: char| if c.is_alphanumeric() || "-_.".contains(c) { c } else { '-' };
            name.chars().map(plain).collect()
        };
        match self.files() {
            Files::Folder(folder) => {
                let whole = folder.canonicalize().unwrap_or_else(|_| folder.clone());
                let name = whole.file_name().map_or(Path::new("model"), Path::new);
                let place = crc32fast::hash(whole.as_os_str().as_encoded_bytes());
                format!("{}-{place:08x}", plain(&name.to_string_lossy()))
            }
            files @ (Files::Builtin | Files::None(_)) => plain(&files.place()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn samples_see_the_start_the_end_and_places_between() {
        let bytes = vec![0u8; 8 << 20];
        let plain = samples(&bytes);
        let step = ((8 << 20) - FIRST_BYTES).div_ceil(SAMPLES);
        for at in [0, FIRST_BYTES - 1, FIRST_BYTES, FIRST_BYTES + 7 * step, (8 << 20) - 1] {
            let mut other = bytes.clone();
            other[at] = 1;
            assert_ne!(samples(&other), plain, "byte {at}");
        }
        for n in [0, 1, FIRST_BYTES, FIRST_BYTES + 1, FIRST_BYTES + SAMPLE_BYTES] {
            let mut other = vec![0u8; n + 1];
            let short = samples(&other[..n]);
            other[n] = 1;
            assert_ne!(samples(&other), short, "{n} bytes");
        }
    }
}
