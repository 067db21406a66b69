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

/// A token whose key and value are moved, because tokens before it were pruned.
///
/// As with a [`PageCopy`], moves are made in the order in which they were asked for, before
/// anything else is written to the pages.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TokenMove {
    /// Where it lies.
    pub from: Slot,
    /// Where it goes.
    pub to: Slot,
}

/// The pages of one sequence, in order; all are full but the last.
///
/// A token has a place, counted from 0 over the tokens in the cache, and a position in the text.
/// They are the same until tokens are pruned: then those that are left move together, and keep
/// their positions.
///
/// A table holds its pages in a [`PagePool`]; give them back with [`PageTable::release`].
#[derive(Debug, PartialEq, Eq)]
pub struct PageTable {
    pages: Vec<PageId>,
    tokens: usize,
    page_size: usize,
    /// Positions of the first tokens, up to the last one that was there when tokens were pruned.
    /// Empty while nothing is pruned.
    positions: Vec<u32>,
    /// Position of the token after those.
    resumes_at: usize,
}

impl PageTable {
    /// An empty table.
    ///
    /// # Panics
    /// When `page_size` is zero; [`crate::KvLayout`] refuses it with a sentence.
    #[must_use]
    pub fn new(page_size: usize) -> Self {
        assert!(page_size > 0, "page_size is 0");
        Self { pages: Vec::new(), tokens: 0, page_size, positions: Vec::new(), resumes_at: 0 }
    }

    /// Tokens that the table holds; pruned ones are not counted.
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

    /// Where the token at `place` lies.
    ///
    /// # Panics
    /// When the table holds no such token.
    #[must_use]
    pub fn slot(&self, place: usize) -> Slot {
        assert!(place < self.tokens, "place {place} of {} tokens", self.tokens);
        Slot { page: self.pages[place / self.page_size], offset: place % self.page_size }
    }

    /// Position in the text of the token at `place`, or of the one that will come there.
    #[must_use]
    pub fn position(&self, place: usize) -> usize {
        match self.positions.get(place) {
            Some(&position) => position as usize,
            None => self.resumes_at + place - self.positions.len(),
        }
    }

    /// Position of the next token: the tokens that were ever in the table, pruned ones included.
    #[must_use]
    pub fn next_position(&self) -> usize {
        self.position(self.tokens)
    }

    /// First tokens before which nothing was pruned: their places are their positions.
    #[must_use]
    pub fn intact(&self) -> usize {
        let kept = self.positions.iter().enumerate();
        let intact = kept.take_while(|(place, position)| *place == **position as usize).count();
        if intact == self.resumes_at { self.tokens } else { intact }
    }

    /// Removes the tokens at `places`, which are ascending; those that are left move together in
    /// their order, and pages that hold none any more are given back.
    ///
    /// The caller makes the moves, in order, and rebuilds the boxes of the pages that they reach.
    /// Pages that others share are not written to: the table gets pages of its own in their place.
    ///
    /// # Errors
    /// [`KvError::OutOfPages`] when too few pages are free to replace shared ones; nothing has
    /// changed then.
    ///
    /// # Panics
    /// When the places are not ascending or the table holds no such token.
    pub fn prune(
        &mut self,
        pool: &mut PagePool,
        places: &[u32],
    ) -> Result<Vec<TokenMove>, KvError> {
        assert!(places.is_sorted_by(|a, b| a < b), "places are ascending");
        let Some((&first, &last)) = places.first().zip(places.last()) else {
            return Ok(Vec::new());
        };
        assert!((last as usize) < self.tokens, "place {last} of {} tokens", self.tokens);
        let (first, size, left) = (first as usize, self.page_size, self.tokens - places.len());
        let used = left.div_ceil(size);
        // Pages that are written to: none when only the last tokens go.
        let written = first / size..if left > first { used } else { first / size };
        let is_shared = |pool: &PagePool, page: PageId| pool.holders(page) > 1;
        let needed = written.clone().filter(|&i| is_shared(pool, self.pages[i])).count();
        if needed > pool.free_pages() {
            let (free, capacity) = (pool.free_pages(), pool.capacity());
            return Err(KvError::OutOfPages { needed, free, capacity });
        }
        let from = self.pages.clone();
        let mut to = first.min(left);
        for i in written {
            if is_shared(pool, from[i]) {
                let before = i.checked_sub(1).map(|before| self.pages[before]);
                self.pages[i] = pool.allocate_after(before)?;
                if i == first / size {
                    // Its own page has to hold what lies before the first pruned token, too.
                    to = i * size;
                }
            }
        }
        let mut gone = places.iter().map(|&place| place as usize).peekable();
        let stays: Vec<usize> =
            (0..self.tokens).filter(|place| gone.next_if_eq(place).is_none()).collect();
        let slot = |pages: &[PageId], place: usize| Slot {
            page: pages[place / size],
            offset: place % size,
        };
        let moves = (to..left)
            .map(|to| TokenMove { from: slot(&from, stays[to]), to: slot(&self.pages, to) })
            .collect();
        let next = self.next_position();
        self.positions = stays.iter().map(|&place| self.position(place) as u32).collect();
        self.resumes_at = next;
        self.tokens = left;
        self.pages.truncate(used);
        for (i, page) in from.into_iter().enumerate().rev() {
            if self.pages.get(i) != Some(&page) {
                pool.release(page);
            }
        }
        Ok(moves)
    }

    /// Takes over the positions of `other`, a table of as many tokens whose pages were copied.
    ///
    /// # Panics
    /// When the other table holds another number of tokens.
    pub fn copy_positions(&mut self, other: &Self) {
        assert_eq!(self.tokens, other.tokens, "tokens of a copied table");
        self.positions.clone_from(&other.positions);
        self.resumes_at = other.resumes_at;
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
        let positions = Vec::new();
        Self { tokens: pages.len() * page_size, pages, page_size, positions, resumes_at: 0 }
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
        Self {
            pages: self.pages.clone(),
            tokens: self.tokens,
            page_size: self.page_size,
            positions: self.positions.clone(),
            resumes_at: self.resumes_at,
        }
    }

    /// Forgets every token from place `tokens` on and gives pages that hold none back.
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
        if tokens < self.positions.len() {
            self.resumes_at = tokens.checked_sub(1).map_or(0, |last| self.position(last) + 1);
            self.positions.truncate(tokens);
        }
    }

    /// Gives all pages back.
    pub fn release(mut self, pool: &mut PagePool) {
        self.truncate(pool, 0);
    }
}
