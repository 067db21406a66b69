//! A chunk's pages of codes, and the asking for the next chunk's.

use half::f16;
use tinyserve_kv::GROUP_PAGES;

use super::products::MANY;
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

/// What memory is asked for meanwhile, a little at a time.
pub(super) trait Ahead {
    /// Asks for the next line, if there is one.
    fn ask<S: Simd>(&mut self, simd: S);
}

/// Nothing is asked for.
pub(super) struct Nothing;

impl Ahead for Nothing {
    #[inline(always)]
    fn ask<S: Simd>(&mut self, _: S) {}
}

/// The next chunk's pages, whose lines memory is asked for one by one, and boxes after it: in bursts,
/// even of two, memory would be busy in some steps of a chunk and wait in others, and so would what
/// comes after a burst.
pub(super) struct NextPages<'s, 'a> {
    pages: ChunkPages<'s, 'a>,
    /// Pages that have been begun, the next line, and lines from it on of its page.
    begun: usize,
    line: *const u8,
    left: usize,
    /// The next row of boxes, and how many there are.
    row: *const f16,
    rows: usize,
}

impl<'s, 'a> NextPages<'s, 'a> {
    pub(super) fn new(pages: ChunkPages<'s, 'a>) -> Self {
        Self { pages, begun: 0, line: std::ptr::null(), left: 0, row: std::ptr::null(), rows: 0 }
    }

    /// Takes the first lanes of `rows` rows of boxes on, which begin with `boxes`.
    #[inline(always)]
    pub(super) fn add_boxes(&mut self, boxes: &[f16], rows: usize) {
        (self.row, self.rows) = (boxes.as_ptr(), rows);
    }

    /// Asks for the next row of boxes, or, after the last one, for the next line.
    #[inline(always)]
    pub(super) fn ask_box<S: Simd>(&mut self, simd: S) {
        if self.rows == 0 {
            self.ask(simd);
            return;
        }
        simd.prefetch(self.row);
        self.row = self.row.wrapping_add(GROUP_PAGES);
        self.rows -= 1;
    }

    /// Asks for up to `lines` lines.
    #[inline(always)]
    pub(super) fn ask_lines<S: Simd>(&mut self, simd: S, mut lines: usize) {
        while lines > 0 {
            if self.left == 0 && !self.begin() {
                return;
            }
            let count = lines.min(self.left);
            for line in 0..count {
                simd.prefetch(self.line.wrapping_add(line * LINE));
            }
            self.line = self.line.wrapping_add(count * LINE);
            self.left -= count;
            lines -= count;
        }
    }

    /// Asks for all lines that are left.
    #[inline(always)]
    pub(super) fn ask_rest<S: Simd>(&mut self, simd: S) {
        self.ask_lines(simd, usize::MAX);
    }

    /// Goes on to the next page, if there is one.
    #[inline(always)]
    fn begin(&mut self) -> bool {
        let Some(&start) = self.pages.starts.get(self.begun) else { return false };
        self.begun += 1;
        self.line = self.pages.bytes.as_ptr().wrapping_add(start);
        self.left = self.pages.length.div_ceil(LINE);
        true
    }

    /// Itself; asked for in every fourth step only where many queries share a chunk, whose steps are
    /// more than there are lines to ask for.
    #[inline(always)]
    pub(super) fn between(&mut self, queries: usize) -> Between<'_, 's, 'a> {
        let every = if queries < MANY { 1 } else { 4 };
        Between { next: self, left: every, every }
    }
}

impl Ahead for NextPages<'_, '_> {
    #[inline(always)]
    fn ask<S: Simd>(&mut self, simd: S) {
        if self.left == 0 && !self.begin() {
            return;
        }
        simd.prefetch(self.line);
        self.line = self.line.wrapping_add(LINE);
        self.left -= 1;
    }
}

/// See [`NextPages::between`].
pub(super) struct Between<'n, 's, 'a> {
    next: &'n mut NextPages<'s, 'a>,
    left: usize,
    every: usize,
}

impl Ahead for Between<'_, '_, '_> {
    #[inline(always)]
    fn ask<S: Simd>(&mut self, simd: S) {
        self.left -= 1;
        if self.left == 0 {
            self.left = self.every;
            self.next.ask(simd);
        }
    }
}
