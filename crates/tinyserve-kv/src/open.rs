//! Pages that are being written, where sealed pages hold codes.

use std::ops::Range;

use half::f16;

use crate::PageId;

/// Keys and values in f16 of the pages that hold no codes yet, layer by layer.
///
/// A full page stays here until keys are appended again: the tokens that filled it attend to it as
/// they wrote it, whichever of them came in the same step.
#[derive(Debug)]
pub(crate) struct OpenPages {
    capacity: usize,
    /// Elements of one page of one layer, all heads.
    elements: usize,
    /// One more than the slot of each page `[layers, capacity]`, or 0.
    slot_of: Vec<u32>,
    slots: Vec<OpenSlot>,
    /// Keys and values `[slots][kv_heads][keys [head_dim, page_size], values [page_size, head_dim]]`.
    memory: Vec<f16>,
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
    /// Elements of one page, all heads.
    elements: usize,
    kv_heads: usize,
}

impl OpenPlaces<'_> {
    /// Where keys and values of `kv_head` of an open page lie.
    ///
    /// # Panics
    /// When the page is not open, or the head is out of range.
    #[must_use]
    pub fn range(&self, page: PageId, kv_head: usize) -> Range<usize> {
        let slot = self.slot_of.get(page.index()).and_then(|&slot| slot.checked_sub(1));
        let Some(slot) = slot else { panic!("page {} is not open", page.index()) };
        assert!(kv_head < self.kv_heads, "KV head {kv_head} of {}", self.kv_heads);
        let head = self.elements / self.kv_heads;
        let start = slot as usize * self.elements + kv_head * head;
        start..start + head
    }
}

impl OpenPages {
    pub(crate) fn new(layers: usize, capacity: usize, elements: usize) -> Self {
        Self {
            capacity,
            elements,
            slot_of: vec![0; layers * capacity],
            slots: Vec::new(),
            memory: Vec::new(),
            free: Vec::new(),
            full: Vec::new(),
        }
    }

    /// Bytes of memory.
    pub(crate) fn bytes(&self) -> usize {
        self.memory.len() * size_of::<f16>() + self.slot_of.len() * size_of::<u32>()
    }

    fn slot(&self, layer: usize, page: PageId) -> Option<usize> {
        (self.slot_of[layer * self.capacity + page.index()] as usize).checked_sub(1)
    }

    fn elements_of(&self, slot: usize) -> Range<usize> {
        slot * self.elements..(slot + 1) * self.elements
    }

    /// The page's elements, if it is open or was filled last.
    pub(crate) fn get(&self, layer: usize, page: PageId) -> Option<&[f16]> {
        self.slot(layer, page).map(|slot| &self.memory[self.elements_of(slot)])
    }

    pub(crate) fn get_mut(&mut self, layer: usize, page: PageId) -> Option<&mut [f16]> {
        let elements = self.elements_of(self.slot(layer, page)?);
        Some(&mut self.memory[elements])
    }

    /// The memory of all open pages, and where those of `layer` lie in it.
    pub(crate) fn layer_mut(
        &mut self,
        layer: usize,
        kv_heads: usize,
    ) -> (&mut [f16], OpenPlaces<'_>) {
        let slot_of = self.slot_of.chunks(self.capacity.max(1)).nth(layer).unwrap_or_default();
        (&mut self.memory, OpenPlaces { slot_of, elements: self.elements, kv_heads })
    }

    /// Makes room for a page, whatever it held before.
    pub(crate) fn open(&mut self, layer: usize, page: PageId) {
        if let Some(slot) = self.slot(layer, page) {
            // Its last holder let it go unfilled, or full.
            self.full.retain(|&full| full != slot);
            return;
        }
        let slot = self.free.pop().unwrap_or_else(|| {
            self.memory.resize(self.memory.len() + self.elements, f16::ZERO);
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
                    let (from, to) = (self.elements_of(from), self.elements_of(to));
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
