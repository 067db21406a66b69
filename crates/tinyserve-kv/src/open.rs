//! Pages that are being written, where sealed pages hold codes.

use std::ops::Range;

use crate::{KvElement, PageId};

/// Keys and values of the pages that hold no codes yet, layer by layer, as floats.
///
/// A full page stays here until keys are appended again: the tokens that filled it attend to it as
/// they wrote it, whichever of them came in the same step.
#[derive(Debug)]
pub(crate) struct OpenPages {
    capacity: usize,
    /// Bytes of one page of one layer, all heads.
    page_bytes: usize,
    /// One more than the slot of each page `[layers, capacity]`, or 0.
    slot_of: Vec<u32>,
    slots: Vec<OpenSlot>,
    /// Keys and values `[slots][kv_heads][keys [head_dim, page_size], values [page_size, head_dim]]`
    /// in words, on which floats of either length begin.
    memory: Vec<u32>,
    free: Vec<usize>,
    /// Slots of pages that are full.
    full: Vec<usize>,
}

#[derive(Debug)]
struct OpenSlot {
    layer: usize,
    page: Option<PageId>,
}

/// Where the open pages of one layer lie in their memory.
#[derive(Debug, Clone, Copy)]
pub struct OpenPlaces<'a> {
    /// One more than the slot of each page, or 0; none where the format has no codes.
    slot_of: &'a [u32],
    /// Bytes of one page, all heads.
    page_bytes: usize,
    kv_heads: usize,
}

impl OpenPlaces<'_> {
    /// Where keys and values of `kv_head` of an open page lie, in bytes.
    ///
    /// # Panics
    /// When the page is not open, or the head is out of range.
    #[must_use]
    pub fn range(&self, page: PageId, kv_head: usize) -> Range<usize> {
        let slot = self.slot_of.get(page.index()).and_then(|&slot| slot.checked_sub(1));
        let Some(slot) = slot else { panic!("page {} is not open", page.index()) };
        assert!(kv_head < self.kv_heads, "KV head {kv_head} of {}", self.kv_heads);
        let head = self.page_bytes / self.kv_heads;
        let start = slot as usize * self.page_bytes + kv_head * head;
        start..start + head
    }
}

impl OpenPages {
    pub(crate) fn new(layers: usize, capacity: usize, page_bytes: usize) -> Self {
        Self {
            capacity,
            page_bytes,
            slot_of: vec![0; layers * capacity],
            slots: Vec::new(),
            memory: Vec::new(),
            free: Vec::new(),
            full: Vec::new(),
        }
    }

    /// Bytes of memory.
    pub(crate) fn bytes(&self) -> usize {
        (self.memory.len() + self.slot_of.len()) * size_of::<u32>()
    }

    fn slot(&self, layer: usize, page: PageId) -> Option<usize> {
        (self.slot_of[layer * self.capacity + page.index()] as usize).checked_sub(1)
    }

    /// Words of one page of one layer: a page has keys and values of two bytes at least.
    fn page_words(&self) -> usize {
        self.page_bytes / size_of::<u32>()
    }

    fn words_of(&self, slot: usize) -> Range<usize> {
        slot * self.page_words()..(slot + 1) * self.page_words()
    }

    /// The page's elements, if it is open or was filled last.
    pub(crate) fn get<O: KvElement>(&self, layer: usize, page: PageId) -> Option<&[O]> {
        let words = self.words_of(self.slot(layer, page)?);
        Some(bytemuck::cast_slice(&self.memory[words]))
    }

    pub(crate) fn get_mut<O: KvElement>(&mut self, layer: usize, page: PageId) -> Option<&mut [O]> {
        let words = self.words_of(self.slot(layer, page)?);
        Some(bytemuck::cast_slice_mut(&mut self.memory[words]))
    }

    /// Whether the page is open or was filled last.
    pub(crate) fn has(&self, layer: usize, page: PageId) -> bool {
        self.slot(layer, page).is_some()
    }

    /// The memory of all open pages, and where those of `layer` lie in it.
    pub(crate) fn layer_mut(
        &mut self,
        layer: usize,
        kv_heads: usize,
    ) -> (&mut [u8], OpenPlaces<'_>) {
        let slot_of = self.slot_of.chunks(self.capacity.max(1)).nth(layer).unwrap_or_default();
        let places = OpenPlaces { slot_of, page_bytes: self.page_bytes, kv_heads };
        (bytemuck::cast_slice_mut(&mut self.memory), places)
    }

    /// Makes room for a page, whatever it held before.
    pub(crate) fn open(&mut self, layer: usize, page: PageId) {
        if let Some(slot) = self.slot(layer, page) {
            // Its last holder let it go unfilled, or full.
            self.full.retain(|&full| full != slot);
            return;
        }
        let slot = self.free.pop().unwrap_or_else(|| {
            self.memory.resize(self.memory.len() + self.page_words(), 0);
            self.slots.push(OpenSlot { layer, page: None });
            self.slots.len() - 1
        });
        self.slots[slot].layer = layer;
        self.slots[slot].page = Some(page);
        // As many slots as pages and layers at most, which 32 bits count.
        self.slot_of[layer * self.capacity + page.index()] = slot as u32 + 1;
    }

    /// Notes that a page is full.
    pub(crate) fn fill(&mut self, layer: usize, page: PageId) {
        if let Some(slot) = self.slot(layer, page) {
            self.full.push(slot);
        }
    }

    /// Lets a page go that its last holder may have left open.
    pub(crate) fn close_page(&mut self, layer: usize, page: PageId) {
        if let Some(slot) = self.slot(layer, page) {
            self.full.retain(|&full| full != slot);
            self.close(slot);
        }
    }

    /// Lets full pages go.
    pub(crate) fn close_full(&mut self) {
        while let Some(slot) = self.full.pop() {
            self.close(slot);
        }
    }

    /// Lets the pages go that `in_use` denies.
    pub(crate) fn retain(&mut self, in_use: impl Fn(PageId) -> bool) {
        for slot in 0..self.slots.len() {
            if self.slots[slot].page.is_some_and(|page| !in_use(page)) {
                self.full.retain(|&full| full != slot);
                self.close(slot);
            }
        }
    }

    fn close(&mut self, slot: usize) {
        let OpenSlot { layer, page } = &mut self.slots[slot];
        if let Some(page) = page.take() {
            self.slot_of[*layer * self.capacity + page.index()] = 0;
            self.free.push(slot);
        }
    }

    /// Makes `to` what `from` is, open or not.
    pub(crate) fn copy(&mut self, layer: usize, from: PageId, to: PageId) {
        if from == to {
            return;
        }
        let open = self.slot(layer, from).filter(|slot| !self.full.contains(slot));
        match (open, self.slot(layer, to)) {
            (Some(from), _) => {
                self.open(layer, to);
                if let Some(to) = self.slot(layer, to) {
                    let (from, to) = (self.words_of(from), self.words_of(to));
                    self.memory.copy_within(from, to.start);
                }
            }
            (None, Some(old)) => {
                self.full.retain(|&full| full != old);
                self.close(old);
            }
            (None, None) => {}
        }
    }
}
