//! One output, written by several threads at once in columns that do not overlap.

use std::marker::PhantomData;
use std::ops::Range;

/// A borrowed output `[rows, width]` that threads write disjoint parts of.
#[derive(Clone, Copy)]
pub(super) struct Columns<'a, T = f32> {
    out: *mut T,
    rows: usize,
    width: usize,
    borrow: PhantomData<&'a mut [T]>,
}

// SAFETY: it stands for an exclusive borrow, and every use of `slice` and `rows` promises
// that what threads write does not overlap.
unsafe impl<T: Send> Send for Columns<'_, T> {}
// SAFETY: as above.
unsafe impl<T: Send> Sync for Columns<'_, T> {}

impl<'a, T> Columns<'a, T> {
    pub(super) fn new(out: &'a mut [T], width: usize) -> Self {
        Self { rows: out.len() / width, out: out.as_mut_ptr(), width, borrow: PhantomData }
    }

    /// How many rows there are.
    pub(super) fn row_count(&self) -> usize {
        self.rows
    }

    /// Columns `range` of row `row`.
    ///
    /// # Safety
    /// No two slices that are alive at the same time overlap.
    #[inline(always)]
    #[expect(clippy::mut_from_ref, reason = "the caller promises that slices do not overlap")]
    pub(super) unsafe fn slice(&self, row: usize, range: Range<usize>) -> &mut [T] {
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

    /// All columns of rows `range`.
    ///
    /// # Safety
    /// As [`Self::slice`].
    #[inline(always)]
    #[expect(clippy::mut_from_ref, reason = "the caller promises that slices do not overlap")]
    pub(super) unsafe fn rows(&self, range: Range<usize>) -> &mut [T] {
        assert!(range.start <= range.end && range.end <= self.rows);
        // SAFETY: the rows lie in an exclusive borrow of rows × width elements, and the caller
        // promises that no other slice overlaps them.
        unsafe {
            std::slice::from_raw_parts_mut(
                self.out.add(range.start * self.width),
                range.len() * self.width,
            )
        }
    }
}
