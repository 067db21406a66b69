//! One output, written by several threads at once in columns that do not overlap.

use std::marker::PhantomData;
use std::ops::Range;

/// A borrowed output `[rows, width]` that threads write disjoint parts of.
#[derive(Clone, Copy)]
pub(super) struct Columns<'a> {
    out: *mut f32,
    rows: usize,
    width: usize,
    borrow: PhantomData<&'a mut [f32]>,
}

// SAFETY: it stands for an exclusive borrow of plain numbers, and every use of `slice` promises
// that what threads write does not overlap.
unsafe impl Send for Columns<'_> {}
// SAFETY: as above.
unsafe impl Sync for Columns<'_> {}

impl<'a> Columns<'a> {
    pub(super) fn new(out: &'a mut [f32], width: usize) -> Self {
        Self { rows: out.len() / width, out: out.as_mut_ptr(), width, borrow: PhantomData }
    }

    /// Columns `range` of row `row`.
    ///
    /// # Safety
    /// No two slices that are alive at the same time overlap.
    #[inline(always)]
    #[expect(clippy::mut_from_ref, reason = "the caller promises that slices do not overlap")]
    pub(super) unsafe fn slice(&self, row: usize, range: Range<usize>) -> &mut [f32] {
        assert!(row < self.rows && range.start <= range.end && range.end <= self.width);
        // SAFETY: the range lies in row `row` of an exclusive borrow of rows × width numbers, and
        // the caller promises that no other slice overlaps it.
        unsafe {
            std::slice::from_raw_parts_mut(
                self.out.add(row * self.width + range.start),
                range.len(),
            )
        }
    }
}
