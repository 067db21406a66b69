//! The page allocator: which pages are free, owned once, or shared by count, and where the next one
//! of a sequence comes from.

use crate::{GROUP_PAGES, KvError};

const _: () = assert!(GROUP_PAGES == u64::BITS as usize, "a group is one word of bits");

/// Index of a page in a pool.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct PageId(u32);

impl PageId {
    /// The page's index in its pool, below the pool's capacity.
    #[must_use]
    #[inline]
    pub fn index(self) -> usize {
        self.0 as usize
    }

    fn at(group: usize, lane: u32) -> Self {
        // Below the capacity, which fits.
        Self((group * GROUP_PAGES) as u32 + lane)
    }

    fn group(self) -> usize {
        self.index() / GROUP_PAGES
    }

    fn bit(self) -> u64 {
        1 << (self.index() % GROUP_PAGES)
    }
}

/// Hands out pages and counts who holds them.
///
/// It deals in indices only; the bytes lie with whoever stores them.
///
/// Pages that lie side by side are scored side by side and read as one stream, so a sequence gets
/// its pages in whole groups while there are any ([`Self::allocate_after`]). Low groups come first,
/// so that memory which was touched before is used again before the rest is touched.
#[derive(Debug, Clone)]
pub struct PagePool {
    holders: Vec<u32>,
    /// The free pages of each group, one bit each.
    free: Vec<u64>,
    free_pages: usize,
    /// The pages of each group that a prefix index holds, one bit each.
    cached: Vec<u64>,
    /// Pages that only a prefix index holds.
    idle_pages: usize,
}

impl PagePool {
    /// A pool of `capacity` free pages.
    ///
    /// # Errors
    /// When `capacity` is zero or does not fit a 32-bit page index.
    pub fn new(capacity: usize) -> Result<Self, KvError> {
        if u32::try_from(capacity).ok().filter(|&count| count > 0).is_none() {
            return Err(KvError::Invalid {
                what: "page pool capacity",
                found: capacity.to_string(),
                expected: format!("1 to {} pages", u32::MAX),
            });
        }
        let groups = capacity.div_ceil(GROUP_PAGES);
        let mut pool = Self {
            holders: vec![0; capacity],
            free: Vec::new(),
            free_pages: capacity,
            cached: vec![0; groups],
            idle_pages: 0,
        };
        pool.free = (0..groups).map(|group| pool.whole(group)).collect();
        Ok(pool)
    }

    /// Pages in the pool.
    #[must_use]
    pub fn capacity(&self) -> usize {
        self.holders.len()
    }

    /// Pages that nobody holds.
    #[must_use]
    pub fn free_pages(&self) -> usize {
        self.free_pages
    }

    /// Pages that only a prefix index holds, which can be evicted.
    #[must_use]
    pub fn idle_pages(&self) -> usize {
        self.idle_pages
    }

    /// Pages that somebody holds, idle ones included.
    #[must_use]
    pub fn used_pages(&self) -> usize {
        self.capacity() - self.free_pages()
    }

    /// How many hold `page`, a prefix index included; 0 means free.
    #[must_use]
    pub fn holders(&self, page: PageId) -> u32 {
        self.holders[page.index()]
    }

    /// Takes the lowest free page; its content is whatever its last holder left.
    ///
    /// # Errors
    /// [`KvError::OutOfPages`] when no page is free.
    pub fn allocate(&mut self) -> Result<PageId, KvError> {
        let lowest = self.free.iter().position(|&free| free != 0);
        self.take(lowest.map(|group| PageId::at(group, self.free[group].trailing_zeros())))
    }

    /// Takes the page that best follows `previous` in a sequence, or the first page of one.
    ///
    /// That is its neighbour; else the start of a group that is wholly free, the next one if
    /// possible; else a place in the widest gap. A gap whose lower neighbour is in use is begun in
    /// its middle, so that whoever is there can go on growing.
    ///
    /// # Errors
    /// [`KvError::OutOfPages`] when no page is free.
    pub fn allocate_after(&mut self, previous: Option<PageId>) -> Result<PageId, KvError> {
        let page = previous
            .and_then(|previous| self.neighbour(previous))
            .or_else(|| self.free_group(previous))
            .or_else(|| self.widest_gap());
        self.take(page)
    }

    /// Adds a holder to a page that is in use.
    ///
    /// # Panics
    /// When `page` is free: its content may already belong to somebody else.
    pub fn retain(&mut self, page: PageId) {
        assert!(self.holders(page) > 0, "page {} is free and cannot be shared", page.0);
        self.idle_pages -= usize::from(self.is_idle(page));
        self.holders[page.index()] += 1;
    }

    /// Takes a holder away; returns whether the page is now free.
    ///
    /// # Panics
    /// When `page` is free already.
    pub fn release(&mut self, page: PageId) -> bool {
        assert!(self.holders(page) > 0, "page {} is released twice", page.0);
        // An idle page's only holder is an index, which has its own way to let go.
        assert!(!self.is_idle(page), "page {} is held by a prefix index alone", page.0);
        self.holders[page.index()] -= 1;
        self.idle_pages += usize::from(self.is_idle(page));
        self.free_if_unheld(page)
    }

    /// Makes a prefix index one more holder of a page that is in use.
    pub(crate) fn retain_cached(&mut self, page: PageId) {
        assert!(!self.is_cached(page), "page {} is cached twice", page.0);
        self.retain(page);
        self.cached[page.group()] |= page.bit();
    }

    /// Takes the prefix index away from the holders; returns whether the page is now free.
    pub(crate) fn release_cached(&mut self, page: PageId) -> bool {
        assert!(self.is_cached(page), "page {} is not cached", page.0);
        self.idle_pages -= usize::from(self.is_idle(page));
        self.cached[page.group()] &= !page.bit();
        self.holders[page.index()] -= 1;
        self.free_if_unheld(page)
    }

    /// Whether a prefix index is one of the holders.
    pub(crate) fn is_cached(&self, page: PageId) -> bool {
        self.cached[page.group()] & page.bit() != 0
    }

    /// Whether a prefix index is the only holder.
    pub(crate) fn is_idle(&self, page: PageId) -> bool {
        self.is_cached(page) && self.holders(page) == 1
    }

    /// Whether every page is either free, and counted so exactly once, or held.
    #[must_use]
    pub fn is_consistent(&self) -> bool {
        let pages = || (0..self.capacity() as u32).map(PageId);
        let is_free = |page: PageId| self.free[page.group()] & page.bit() != 0;
        let listed: u32 = self.free.iter().map(|free| free.count_ones()).sum();
        pages().all(|page| (self.holders(page) == 0) == is_free(page))
            && pages().all(|page| !self.is_cached(page) || self.holders(page) > 0)
            && pages().filter(|&page| self.is_idle(page)).count() == self.idle_pages
            && listed as usize == self.free_pages
    }

    fn take(&mut self, page: Option<PageId>) -> Result<PageId, KvError> {
        let capacity = self.capacity();
        let page = page.ok_or(KvError::OutOfPages { needed: 1, free: 0, capacity })?;
        self.free[page.group()] &= !page.bit();
        self.free_pages -= 1;
        self.holders[page.index()] = 1;
        Ok(page)
    }

    fn free_if_unheld(&mut self, page: PageId) -> bool {
        let free = self.holders(page) == 0;
        if free {
            self.free[page.group()] |= page.bit();
            self.free_pages += 1;
        }
        free
    }

    /// The bits of a group's pages; the last group may have fewer than others.
    fn whole(&self, group: usize) -> u64 {
        let pages = (self.capacity() - group * GROUP_PAGES).min(GROUP_PAGES);
        u64::MAX >> (GROUP_PAGES - pages)
    }

    /// The page after `previous` in its group, if it is free.
    fn neighbour(&self, previous: PageId) -> Option<PageId> {
        let next = PageId(previous.0 + 1);
        (next.group() == previous.group() && self.free[next.group()] & next.bit() != 0)
            .then_some(next)
    }

    /// The first page of a wholly free group: the one after `previous`, or else the lowest.
    fn free_group(&self, previous: Option<PageId>) -> Option<PageId> {
        let is_free = |&group: &usize| self.free[group] == self.whole(group);
        let next = previous.map(|page| page.group() + 1).filter(|&next| next < self.free.len());
        let group = next.filter(is_free).or_else(|| (0..self.free.len()).find(is_free))?;
        Some(PageId::at(group, 0))
    }

    /// A place in the lowest of the longest runs of free pages of a group.
    fn widest_gap(&self) -> Option<PageId> {
        let runs = self.free.iter().enumerate().map(|(group, &free)| (longest_run(free), group));
        // The lower of two equal gaps, as `max` alone would not have it.
        let ((length, start), group) = runs.rev().max_by_key(|&((length, _), _)| length)?;
        let skipped = if start == 0 { 0 } else { length / 2 };
        (length > 0).then(|| PageId::at(group, start + skipped))
    }
}

/// Length and lowest start of the longest run of ones.
fn longest_run(mut bits: u64) -> (u32, u32) {
    let (mut best, mut at) = ((0, 0), 0);
    while bits != 0 {
        let zeros = bits.trailing_zeros();
        // A shift by all 64 bits is none.
        (bits, at) = (bits >> zeros, at + zeros);
        let ones = bits.trailing_ones();
        if ones > best.0 {
            best = (ones, at);
        }
        bits = bits.checked_shr(ones).unwrap_or(0);
        at += ones;
    }
    best
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_are_found_at_both_ends_of_a_group() {
        let cases = [
            (0, (0, 0)),
            (u64::MAX, (64, 0)),
            (1, (1, 0)),
            (1 << 63, (1, 63)),
            (0b0110_1110, (3, 1)),
            (0b1110_0111, (3, 0)),
            (u64::MAX << 10, (54, 10)),
        ];
        for (bits, expected) in cases {
            assert_eq!(longest_run(bits), expected, "{bits:b}");
        }
    }
}
