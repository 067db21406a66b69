//! An allocator that counts.
#![allow(dead_code)] // Each test file uses its own part.

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

/// The system's allocator, with a count of calls and the largest one.
pub(crate) struct Watched;

static LARGEST: AtomicUsize = AtomicUsize::new(0);
static CALLS: AtomicUsize = AtomicUsize::new(0);

/// Bytes of the largest single allocation so far.
pub(crate) fn largest() -> usize {
    LARGEST.load(Relaxed)
}

/// Allocations of all threads so far.
pub(crate) fn calls() -> usize {
    CALLS.load(Relaxed)
}

// SAFETY: every call goes to the system's allocator unchanged; growing goes through `alloc`.
#[allow(unsafe_code)]
unsafe impl GlobalAlloc for Watched {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        LARGEST.fetch_max(layout.size(), Relaxed);
        CALLS.fetch_add(1, Relaxed);
        // SAFETY: the caller's promise is passed on.
        unsafe { System.alloc(layout) }
    }
    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        // SAFETY: the caller's promise is passed on.
        unsafe { System.dealloc(pointer, layout) }
    }
}
