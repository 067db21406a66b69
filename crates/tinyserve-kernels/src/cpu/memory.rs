//! Memory for weights that are packed or turned while they are loaded, and for activations.

use std::ops::{Deref, DerefMut};

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

/// Numbers whose first one begins a cache line: a vector that crosses lines is read twice.
#[derive(Debug, Default)]
pub(super) struct Aligned {
    lines: Vec<Line>,
    len: usize,
}

#[derive(Debug, Clone, Copy, bytemuck::Zeroable, bytemuck::Pod)]
#[repr(C, align(64))]
struct Line([f32; 16]);

impl Aligned {
    /// Makes it `len` long; what new places hold is not defined.
    pub(super) fn resize(&mut self, len: usize) {
        self.lines.resize(len.div_ceil(16), Line([0.0; 16]));
        self.len = len;
    }
}

impl Deref for Aligned {
    type Target = [f32];

    fn deref(&self) -> &[f32] {
        &bytemuck::cast_slice(&self.lines)[..self.len]
    }
}

impl DerefMut for Aligned {
    fn deref_mut(&mut self) -> &mut [f32] {
        &mut bytemuck::cast_slice_mut(&mut self.lines)[..self.len]
    }
}
