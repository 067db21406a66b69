//! Zeroed, cache-line aligned memory that is committed page by page as it is written.

use std::fmt;
use std::ops::Range;

use bytemuck::Zeroable;

use crate::{KvElement, KvError};

/// The memory begins on a cache line; so does every page whose size is a multiple of one, which
/// holds for the usual shapes.
const LINE_BYTES: usize = 64;

/// The unit of allocation.
///
/// It must not ask for more alignment than the system's allocator gives by itself: above that the
/// standard library zeroes by hand, which commits gigabytes before the first token.
#[derive(Clone, Copy, Zeroable, bytemuck::Pod)]
#[repr(C, align(16))]
struct Unit([u8; 16]);

const UNIT_BYTES: usize = size_of::<Unit>();

/// Zeroed memory that the system commits when it is first touched.
pub(crate) struct ZeroedMemory {
    units: Vec<Unit>,
    // Units before the first cache line; the vector never moves its buffer.
    start: usize,
    bytes: usize,
}

impl ZeroedMemory {
    pub(crate) fn new(bytes: usize) -> Result<Self, KvError> {
        let count = (bytes.div_ceil(UNIT_BYTES)).saturating_add(LINE_BYTES / UNIT_BYTES);
        let units: Vec<Unit> =
            bytemuck::allocation::try_zeroed_vec(count).map_err(|()| KvError::Invalid {
                what: "KV pool",
                found: format!("{bytes} bytes per layer, which the system refuses"),
                expected: "fewer pages, a shorter context or a smaller kv_cache_dtype".to_owned(),
            })?;
        let address = units.as_ptr().addr();
        let start = (address.next_multiple_of(LINE_BYTES) - address) / UNIT_BYTES;
        Ok(Self { units, start, bytes })
    }

    pub(crate) fn bytes(&self) -> usize {
        self.bytes
    }

    pub(crate) fn elements<E: KvElement>(&self, range: Range<usize>) -> &[E] {
        &bytemuck::cast_slice(&self.units[self.start..])[range]
    }

    pub(crate) fn elements_mut<E: KvElement>(&mut self, range: Range<usize>) -> &mut [E] {
        &mut bytemuck::cast_slice_mut(&mut self.units[self.start..])[range]
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
        for bytes in [0, 4, 60, 64, 68, 1000 * 4, 1 << 20] {
            let mut memory = ZeroedMemory::new(bytes).unwrap();
            let all = memory.elements_mut::<f32>(0..bytes / 4);
            assert!(all.as_ptr().addr().is_multiple_of(LINE_BYTES), "{bytes} bytes");
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
        // Pages are 4 KiB or more, so all of it would be 262,144 of them, or 16,384 of 64 KiB.
        assert!(growth < 8_192, "{growth} pages became resident");
    }
}
