//! The page allocator: which pages are free, owned once, or shared by count.

use crate::KvError;

/// Index of a page in a pool.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct PageId(u32);

impl PageId {
    /// The page's index in its pool, below the pool's capacity.
    #[must_use]
    pub fn index(self) -> usize {
        self.0 as usize
    }
}

/// Hands out pages and counts who holds them.
///
/// It deals in indices only; the bytes lie with whoever stores them.
#[derive(Debug, Clone)]
pub struct PagePool {
    holders: Vec<u32>,
    // A stack, the next page on top. It starts with the lowest page on top, and a table gives its
    // pages back last page first: so a sequence that grows alone gets ascending neighbours, which
    // attention reads as one stream. Pages that were used before come before untouched ones, which
    // keeps resident memory at the peak of use.
    free: Vec<PageId>,
}

impl PagePool {
    /// A pool of `capacity` free pages.
    ///
    /// # Errors
    /// When `capacity` is zero or does not fit a 32-bit page index.
    pub fn new(capacity: usize) -> Result<Self, KvError> {
        let Some(count) = u32::try_from(capacity).ok().filter(|&count| count > 0) else {
            return Err(KvError::Invalid {
                what: "page pool capacity",
                found: capacity.to_string(),
                expected: format!("1 to {} pages", u32::MAX),
            });
        };
        Ok(Self { holders: vec![0; capacity], free: (0..count).rev().map(PageId).collect() })
    }

    /// Pages in the pool.
    #[must_use]
    pub fn capacity(&self) -> usize {
        self.holders.len()
    }

    /// Pages that nobody holds.
    #[must_use]
    pub fn free_pages(&self) -> usize {
        self.free.len()
    }

    /// Pages that somebody holds.
    #[must_use]
    pub fn used_pages(&self) -> usize {
        self.capacity() - self.free_pages()
    }

    /// How many hold `page`; 0 means free.
    #[must_use]
    pub fn holders(&self, page: PageId) -> u32 {
        self.holders[page.index()]
    }

    /// Takes a free page; its content is whatever its last holder left.
    ///
    /// # Errors
    /// [`KvError::OutOfPages`] when no page is free.
    pub fn allocate(&mut self) -> Result<PageId, KvError> {
        let page = self.free.pop().ok_or(KvError::OutOfPages {
            needed: 1,
            free: 0,
            capacity: self.capacity(),
        })?;
        self.holders[page.index()] = 1;
        Ok(page)
    }

    /// Adds a holder to a page that is in use.
    ///
    /// # Panics
    /// When `page` is free: its content may already belong to somebody else.
    pub fn retain(&mut self, page: PageId) {
        let holders = &mut self.holders[page.index()];
        assert!(*holders > 0, "page {} is free and cannot be shared", page.0);
        *holders += 1;
    }

    /// Takes a holder away; returns whether the page is now free.
    ///
    /// # Panics
    /// When `page` is free already.
    pub fn release(&mut self, page: PageId) -> bool {
        let holders = &mut self.holders[page.index()];
        assert!(*holders > 0, "page {} is released twice", page.0);
        *holders -= 1;
        if *holders == 0 {
            self.free.push(page);
        }
        *holders == 0
    }

    /// Whether every page is either free, and listed so exactly once, or held.
    #[must_use]
    pub fn is_consistent(&self) -> bool {
        let mut listed = vec![false; self.capacity()];
        let unique =
            self.free.iter().all(|page| !std::mem::replace(&mut listed[page.index()], true));
        unique && self.holders.iter().zip(&listed).all(|(&holders, &free)| (holders == 0) == free)
    }
}
