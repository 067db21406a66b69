//! A page pool with its bytes on a backend.

use tinyserve_kernels::Backend;
use tinyserve_kv::{
    EvictionCause, KvError, KvLayout, PageCopy, PagePool, PageTable, Prefix, PrefixIndex,
};

use crate::ModelError;

/// The KV cache of one model on one device: which pages are free, and their bytes.
///
/// With a [`PrefixIndex`], full pages outlive their sequences: [`Self::start`] begins a sequence
/// with those that it shares with earlier ones, [`Self::remember`] offers a sequence's pages to
/// later ones, and [`Self::extend`] evicts pages that nobody uses when too few are free.
#[derive(Debug)]
pub struct KvCache<B: Backend> {
    layout: KvLayout,
    pool: PagePool,
    prefixes: Option<PrefixIndex>,
    pub(crate) pages: B::KvPages,
    /// Whether pages were released that the backend has not been told of.
    released: bool,
}

impl<B: Backend> KvCache<B> {
    /// A cache of `pages` free pages.
    ///
    /// # Errors
    /// When the backend has no memory for them.
    pub fn new(backend: &B, layout: KvLayout, pages: usize) -> Result<Self, ModelError> {
        Ok(Self {
            layout,
            pool: PagePool::new(pages)?,
            prefixes: None,
            pages: backend.allocate_pages(layout, pages)?,
            released: false,
        })
    }

    /// Keeps full pages for sequences that begin alike, in `index`, which is empty and made for
    /// this cache's layout.
    #[must_use]
    pub fn with_prefix_index(mut self, index: PrefixIndex) -> Self {
        self.prefixes = Some(index);
        self
    }

    /// The prefix index, if there is one.
    #[must_use]
    pub fn prefix_index(&self) -> Option<&PrefixIndex> {
        self.prefixes.as_ref()
    }

    /// The layout of each page.
    #[must_use]
    pub fn layout(&self) -> &KvLayout {
        &self.layout
    }

    /// Which pages are free.
    #[must_use]
    pub fn pool(&self) -> &PagePool {
        &self.pool
    }

    /// Pages that a sequence can get: free ones, and those that only the prefix index holds.
    #[must_use]
    pub fn available_pages(&self) -> usize {
        self.pool.free_pages() + self.pool.idle_pages()
    }

    /// A sequence that holds as much of the beginning of `prompt` as the prefix index knows, at
    /// most all but its last token; its length is how many tokens need not be computed.
    #[must_use]
    pub fn start(&mut self, prompt: Prefix<'_>) -> PageTable {
        match &mut self.prefixes {
            Some(index) => index.lookup(&mut self.pool, prompt),
            None => self.new_table(),
        }
    }

    /// Offers the full pages of a sequence, whose first tokens are `prefix`, to later ones.
    ///
    /// All of `prefix` must have been computed, with dense attention; see
    /// [`PrefixIndex::insert`]. Without an index nothing happens.
    pub fn remember(&mut self, prefix: Prefix<'_>, table: &mut PageTable) {
        if let Some(index) = &mut self.prefixes {
            index.insert(&mut self.pool, prefix, table);
        }
    }

    /// Forgets every prefix; pages that sequences use stay with them.
    pub fn forget_prefixes(&mut self) {
        if let Some(index) = &mut self.prefixes {
            index.clear(&mut self.pool);
        }
    }

    /// An empty sequence.
    #[must_use]
    pub fn new_table(&self) -> PageTable {
        PageTable::new(self.layout.page_size())
    }

    /// Makes room for `tokens` more tokens of a sequence, copying its open page if it is shared and
    /// evicting idle pages if too few are free.
    ///
    /// # Errors
    /// When too few pages are available; nothing has changed then.
    pub fn extend(
        &mut self,
        backend: &B,
        table: &mut PageTable,
        tokens: usize,
    ) -> Result<(), ModelError> {
        if std::mem::take(&mut self.released) {
            backend.forget_free_pages(&mut self.pages, &self.pool);
        }
        let copy = match (table.extend(&mut self.pool, tokens), &mut self.prefixes) {
            (Err(KvError::OutOfPages { needed, free, capacity }), Some(index)) => {
                let available = free + self.pool.idle_pages();
                if needed > available {
                    let free = available;
                    return Err(KvError::OutOfPages { needed, free, capacity }.into());
                }
                index.evict(&mut self.pool, needed - free, EvictionCause::Room);
                table.extend(&mut self.pool, tokens)?
            }
            (result, _) => result?,
        };
        if let Some(copy) = copy {
            backend.copy_page(&mut self.pages, copy);
        }
        Ok(())
    }

    /// A second sequence that starts with the same tokens and shares their pages.
    #[must_use]
    pub fn fork(&mut self, table: &PageTable) -> PageTable {
        table.fork(&mut self.pool)
    }

    /// A second sequence of the same tokens in pages of its own.
    ///
    /// # Errors
    /// When too few pages are free; nothing has changed then.
    pub fn duplicate(&mut self, backend: &B, table: &PageTable) -> Result<PageTable, ModelError> {
        let mut copy = self.new_table();
        self.extend(backend, &mut copy, table.len())?;
        copy.copy_positions(table);
        for (&from, &to) in table.pages().iter().zip(copy.pages()) {
            backend.copy_page(&mut self.pages, PageCopy { from, to });
        }
        Ok(copy)
    }

    /// Removes the tokens of a sequence at `places`, which are ascending, from every layer: those
    /// that are left move together and keep their positions, and pages that hold none any more are
    /// free again.
    ///
    /// # Errors
    /// When a shared page would have to be replaced and too few are available, or pages of this
    /// format cannot be taken apart; nothing has changed then.
    ///
    /// # Panics
    /// When the places are not ascending or the sequence has no such token.
    pub fn prune(
        &mut self,
        backend: &B,
        table: &mut PageTable,
        places: &[u32],
    ) -> Result<(), ModelError> {
        // Asked first: a table that has been pruned cannot be put back.
        backend.move_tokens(&mut self.pages, &[])?;
        let moves = match (table.prune(&mut self.pool, places), &mut self.prefixes) {
            (Err(KvError::OutOfPages { needed, free, capacity }), Some(index)) => {
                let available = free + self.pool.idle_pages();
                if needed > available {
                    let free = available;
                    return Err(KvError::OutOfPages { needed, free, capacity }.into());
                }
                index.evict(&mut self.pool, needed - free, EvictionCause::Room);
                table.prune(&mut self.pool, places)?
            }
            (result, _) => result?,
        };
        Ok(backend.move_tokens(&mut self.pages, &moves)?)
    }

    /// Forgets the tokens of a sequence from place `tokens` on; the number that are left.
    ///
    /// A sealed page of codes cannot be opened again: where the format has codes and `tokens` ends
    /// within such a page, the whole page is forgotten, and its tokens are to be computed again.
    #[must_use = "fewer tokens may be left than were asked for"]
    pub fn truncate(&mut self, table: &mut PageTable, tokens: usize) -> usize {
        let tokens = self.layout.cut(table.len(), tokens.min(table.len()));
        table.truncate(&mut self.pool, tokens);
        self.released = true;
        tokens
    }

    /// Forgets the open page of a sequence that is to rest, where open pages lie apart from those
    /// that hold codes: there is memory for those of sequences that run, and for no more.
    pub fn rest(&mut self, table: &mut PageTable) {
        if self.layout.shape().format.is_quantised() {
            let full = table.len() - table.len() % self.layout.page_size();
            let left = self.truncate(table, full);
            debug_assert_eq!(left, full, "pages are cut at their borders");
        }
    }

    /// Gives the pages of a sequence back.
    pub fn release(&mut self, table: PageTable) {
        table.release(&mut self.pool);
        self.released = true;
    }
}
