//! Page tables: which pages hold the tokens of one sequence.

use crate::{KvError, PageId, PagePool};

/// Where one token lies.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Slot {
    /// The page.
    pub page: PageId,
    /// The token's place in the page, below the page size.
    pub offset: usize,
}

/// A page whose content has to be copied before the table that asked for it is written to.
///
/// The other holders of `from` may let it go at any time: copies are made in the order in which
/// they were asked for, before anything else is written to the pages.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[must_use = "the new page is garbage until the copy is made"]
pub struct PageCopy {
    /// The shared page.
    pub from: PageId,
    /// The page that replaces it.
    pub to: PageId,
}

/// The pages of one sequence, in order; all are full but the last.
///
/// A table holds its pages in a [`PagePool`]; give them back with [`PageTable::release`].
#[derive(Debug, PartialEq, Eq)]
pub struct PageTable {
    pages: Vec<PageId>,
    tokens: usize,
    page_size: usize,
}

impl PageTable {
    /// An empty table.
    ///
    /// # Panics
    /// When `page_size` is zero; [`crate::KvLayout`] refuses it with a sentence.
    #[must_use]
    pub fn new(page_size: usize) -> Self {
        assert!(page_size > 0, "page_size is 0");
        Self { pages: Vec::new(), tokens: 0, page_size }
    }

    /// Tokens that the table holds.
    #[must_use]
    pub fn len(&self) -> usize {
        self.tokens
    }

    /// Whether the table holds no token.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.tokens == 0
    }

    /// Tokens of one page.
    #[must_use]
    pub fn page_size(&self) -> usize {
        self.page_size
    }

    /// The pages, first token's page first.
    #[must_use]
    pub fn pages(&self) -> &[PageId] {
        &self.pages
    }

    /// Where token `position` lies.
    ///
    /// # Panics
    /// When the table holds no such token.
    #[must_use]
    pub fn slot(&self, position: usize) -> Slot {
        assert!(position < self.tokens, "position {position} of {} tokens", self.tokens);
        Slot { page: self.pages[position / self.page_size], offset: position % self.page_size }
    }

    /// Makes room for `tokens` more tokens, all or nothing; the caller then writes all of them.
    ///
    /// When the open page is shared, this sequence gets a page of its own in its place, and the
    /// caller has to copy the content before writing (copy on write).
    ///
    /// # Errors
    /// [`KvError::OutOfPages`]; the table and the pool are then unchanged.
    pub fn extend(
        &mut self,
        pool: &mut PagePool,
        tokens: usize,
    ) -> Result<Option<PageCopy>, KvError> {
        // Saturated, an absurd request needs more pages than any pool has, and is refused below.
        let total = self.tokens.saturating_add(tokens).div_ceil(self.page_size);
        let shared_open = (tokens > 0 && !self.tokens.is_multiple_of(self.page_size))
            .then(|| self.pages.len() - 1)
            .filter(|&open| pool.holders(self.pages[open]) > 1);
        let needed = total - self.pages.len() + usize::from(shared_open.is_some());
        if needed > pool.free_pages() {
            return Err(KvError::OutOfPages {
                needed,
                free: pool.free_pages(),
                capacity: pool.capacity(),
            });
        }
        let copy = match shared_open {
            Some(open) => {
                let before = open.checked_sub(1).map(|before| self.pages[before]);
                let copy = PageCopy { from: self.pages[open], to: pool.allocate_after(before)? };
                pool.release(copy.from);
                self.pages[open] = copy.to;
                Some(copy)
            }
            None => None,
        };
        while self.pages.len() < total {
            self.pages.push(pool.allocate_after(self.pages.last().copied())?);
        }
        self.tokens += tokens;
        Ok(copy)
    }

    /// A table over full pages that others hold, which it shares with them.
    pub(crate) fn sharing(pool: &mut PagePool, pages: Vec<PageId>, page_size: usize) -> Self {
        pages.iter().for_each(|&page| pool.retain(page));
        Self { tokens: pages.len() * page_size, pages, page_size }
    }

    /// Shares `page`, which holds the same, in place of the table's own page `index`.
    pub(crate) fn share(&mut self, pool: &mut PagePool, index: usize, page: PageId) {
        pool.retain(page);
        pool.release(std::mem::replace(&mut self.pages[index], page));
    }

    /// A second table over the same pages, which are now shared.
    ///
    /// Every token that was made room for must have been written: a write to a shared page would
    /// reach both tables.
    #[must_use]
    pub fn fork(&self, pool: &mut PagePool) -> Self {
        for &page in &self.pages {
            pool.retain(page);
        }
        Self { pages: self.pages.clone(), tokens: self.tokens, page_size: self.page_size }
    }

    /// Forgets every token from `tokens` on and gives pages that hold none back.
    ///
    /// The box of the page that stays open may be larger than its remaining keys; it still bounds
    /// them.
    pub fn truncate(&mut self, pool: &mut PagePool, tokens: usize) {
        if tokens >= self.tokens {
            return;
        }
        for page in self.pages.drain(tokens.div_ceil(self.page_size)..).rev() {
            pool.release(page);
        }
        self.tokens = tokens;
    }

    /// Gives all pages back.
    pub fn release(mut self, pool: &mut PagePool) {
        self.truncate(pool, 0);
    }
}
