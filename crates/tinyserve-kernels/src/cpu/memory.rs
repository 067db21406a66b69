//! Memory for weights that are packed or turned while they are loaded.

use memmap2::MmapMut;

use crate::KernelError;

/// Memory from here on asks for huge pages: what is smaller would waste most of one.
#[cfg(target_os = "linux")]
const HUGE_PAGE_BYTES: usize = 2 << 20;

/// `bytes` zeroed bytes, on huge pages where the system has them: every step streams through them.
pub(super) fn zeroed(bytes: usize) -> Result<MmapMut, KernelError> {
    // The system maps no empty range.
    let map = MmapMut::map_anon(bytes.max(1)).map_err(|_| KernelError::Invalid {
        what: "memory for weights",
        found: format!("less than {bytes} bytes"),
        expected: "as much as a matrix takes".to_owned(),
    })?;
    #[cfg(target_os = "linux")]
    if bytes >= HUGE_PAGE_BYTES {
        // A system without huge pages refuses, and serves small ones.
        let _ = map.advise(memmap2::Advice::HugePage);
    }
    Ok(map)
}
