//! Zeroed memory on huge pages where the system has them, committed as it is written.

use std::fmt;
use std::ops::Range;

use memmap2::MmapMut;

use crate::KvError;

/// Memory from here on asks for huge pages: what is smaller would waste most of one.
#[cfg(target_os = "linux")]
const HUGE_PAGE_BYTES: usize = 2 << 20;

/// Zeroed memory that the system commits when it is first touched.
///
/// It begins on a page of the system, so that every page of the cache whose size is a multiple of
/// a cache line begins on one.
pub(crate) struct ZeroedMemory {
    map: MmapMut,
    bytes: usize,
}

impl ZeroedMemory {
    pub(crate) fn new(bytes: usize) -> Result<Self, KvError> {
        // The system maps no empty range.
        let map = MmapMut::map_anon(bytes.max(1)).map_err(|_| KvError::Invalid {
            what: "KV pool",
            found: format!("{bytes} bytes, which the system refuses"),
            expected: "fewer pages, a shorter context or a smaller kv_cache_dtype".to_owned(),
        })?;
        #[cfg(target_os = "linux")]
        if bytes >= HUGE_PAGE_BYTES {
            // Attention strides over more memory than the processor can translate in pages of
            // 4 KiB. A system without huge pages refuses, and serves small ones.
            let _ = map.advise(memmap2::Advice::HugePage);
        }
        Ok(Self { map, bytes })
    }

    /// Keeps `range`, of which little may ever be written, off huge pages: they become resident as a
    /// whole.
    pub(crate) fn commit_finely(&mut self, range: Range<usize>) {
        #[cfg(target_os = "linux")]
        if self.bytes >= HUGE_PAGE_BYTES {
            // A system without huge pages refuses, and has nothing to be told.
            let advice = memmap2::Advice::NoHugePage;
            let _ = self.map.advise_range(advice, range.start, range.len());
        }
        #[cfg(not(target_os = "linux"))]
        let _ = range;
    }

    pub(crate) fn bytes(&self) -> usize {
        self.bytes
    }

    pub(crate) fn elements<E: bytemuck::Pod>(&self, range: Range<usize>) -> &[E] {
        &bytemuck::cast_slice(&self.map[..self.bytes])[range]
    }

    pub(crate) fn elements_mut<E: bytemuck::Pod>(&mut self, range: Range<usize>) -> &mut [E] {
        &mut bytemuck::cast_slice_mut(&mut self.map[..self.bytes])[range]
    }
}

impl fmt::Debug for ZeroedMemory {
    // Gigabytes in a log line help nobody.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ZeroedMemory").field("bytes", &self.bytes).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_begins_on_a_cache_line_and_reaches_its_last_byte() {
        for bytes in [0, 4, 60, 64, 68, 1000 * 4, 1 << 20, 5 << 20] {
            let mut memory = ZeroedMemory::new(bytes).unwrap();
            let all = memory.elements_mut::<f32>(0..bytes / 4);
            assert!(all.as_ptr().addr().is_multiple_of(64), "{bytes} bytes");
            assert!(all.iter().all(|&x| x == 0.0));
            all.fill(1.0);
            assert_eq!(memory.bytes(), bytes);
        }
    }

    #[test]
    #[cfg(target_os = "linux")]
    fn memory_is_committed_when_it_is_written() {
        let resident_pages = || -> usize {
            let text = std::fs::read_to_string("/proc/self/statm").unwrap();
            text.split_whitespace().nth(1).unwrap().parse().unwrap()
        };
        let before = resident_pages();
        let bytes = 1 << 30;
        let mut memory = ZeroedMemory::new(bytes).unwrap();
        let last = bytes / 4 - 1;
        memory.elements_mut::<f32>(last..last + 1)[0] = 1.0;
        let growth = resident_pages().saturating_sub(before);
        assert_eq!(memory.elements::<f32>(last - 1..last + 1), [0.0, 1.0]);
        // All of it would be 262,144 pages of 4 KiB; a huge page or two are at most 1,024, beside
        // what other tests of this process touch.
        assert!(growth < 8_192, "{growth} pages became resident");
    }
}
