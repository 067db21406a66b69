//! A page pool with its bytes on a backend.

use tinyserve_kernels::Backend;
use tinyserve_kv::{KvLayout, PageCopy, PagePool, PageTable};

use crate::ModelError;

/// The KV cache of one model on one device: which pages are free, and their bytes.
#[derive(Debug)]
pub struct KvCache<B: Backend> {
    layout: KvLayout,
    pool: PagePool,
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
            pages: backend.allocate_pages(layout, pages)?,
            released: false,
        })
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

    /// An empty sequence.
    #[must_use]
    pub fn new_table(&self) -> PageTable {
        PageTable::new(self.layout.page_size())
    }

    /// Makes room for `tokens` more tokens of a sequence, copying its open page if it is shared.
    ///
    /// # Errors
    /// When too few pages are free; nothing has changed then.
    pub fn extend(
        &mut self,
        backend: &B,
        table: &mut PageTable,
        tokens: usize,
    ) -> Result<(), ModelError> {
        if std::mem::take(&mut self.released) {
            backend.forget_free_pages(&mut self.pages, &self.pool);
        }
        if let Some(copy) = table.extend(&mut self.pool, tokens)? {
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
        for (&from, &to) in table.pages().iter().zip(copy.pages()) {
            backend.copy_page(&mut self.pages, PageCopy { from, to });
        }
        Ok(copy)
    }

    /// Forgets the tokens of a sequence from `tokens` on; the number that are left.
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

    /// Gives the pages of a sequence back.
    pub fn release(&mut self, table: PageTable) {
        table.release(&mut self.pool);
        self.released = true;
    }
}
