//! A chunk's pages of codes, and the asking for the next chunk's.

use super::softmax::Rows;
use crate::cpu::simd::{LINE, Simd};

/// The pages of a chunk.
#[derive(Clone, Copy)]
pub(super) struct ChunkPages<'s, 'a> {
    /// All bytes of the head's pages.
    pub(super) bytes: &'a [u8],
    /// Where the chunk's pages begin.
    pub(super) starts: &'s [usize],
    /// Bytes of a page.
    pub(super) length: usize,
}

impl Rows<u8> for ChunkPages<'_, '_> {
    #[inline(always)]
    fn of(&self, page: usize) -> &[u8] {
        &self.bytes[self.starts[page]..][..self.length]
    }

    #[inline(always)]
    fn ahead(&self, _: usize) -> usize {
        0
    }
}

/// The next chunk's pages, whose lines memory is asked for one by one: in bursts memory would be busy
/// in some steps of a chunk and wait in others, and so would what comes after a burst.
pub(super) struct NextPages<'s, 'a> {
    pages: ChunkPages<'s, 'a>,
    /// Pages that have been begun, the next line, and lines from it on of its page.
    begun: usize,
    line: *const u8,
    left: usize,
}

impl<'s, 'a> NextPages<'s, 'a> {
    pub(super) fn new(pages: ChunkPages<'s, 'a>) -> Self {
        Self { pages, begun: 0, line: std::ptr::null(), left: 0 }
    }

    /// Asks for the next line; says whether there was one.
    #[inline(always)]
    pub(super) fn ask<S: Simd>(&mut self, simd: S) -> bool {
        if self.left == 0 {
            let Some(&start) = self.pages.starts.get(self.begun) else { return false };
            self.begun += 1;
            self.line = self.pages.bytes.as_ptr().wrapping_add(start);
            self.left = self.pages.length.div_ceil(LINE);
        }
        simd.prefetch_far(self.line);
        self.line = self.line.wrapping_add(LINE);
        self.left -= 1;
        true
    }

    /// Asks for all lines that are left.
    #[inline(always)]
    pub(super) fn ask_rest<S: Simd>(&mut self, simd: S) {
        while self.ask(simd) {}
    }
}
