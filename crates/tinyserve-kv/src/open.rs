//! Pages that are being written, where sealed pages hold codes.

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
    free: Vec<usize>,
    /// Slots of pages that are full.
    full: Vec<usize>,
}

#[derive(Debug)]
struct OpenSlot {
    layer: usize,
    page: Option<PageId>,
    /// `[kv_heads][keys [head_dim, page_size], values [page_size, head_dim]]`.
    elements: Box<[f16]>,
}

impl OpenPages {
    pub(crate) fn new(layers: usize, capacity: usize, elements: usize) -> Self {
        Self {
            capacity,
            elements,
            slot_of: vec![0; layers * capacity],
            slots: Vec::new(),
            free: Vec::new(),
            full: Vec::new(),
        }
    }

    /// Bytes of memory.
    pub(crate) fn bytes(&self) -> usize {
        self.slots.len() * self.elements * size_of::<f16>() + self.slot_of.len() * size_of::<u32>()
    }

    fn slot(&self, layer: usize, page: PageId) -> Option<usize> {
        (self.slot_of[layer * self.capacity + page.index()] as usize).checked_sub(1)
    }

    /// The page's elements, if it is open or was filled last.
    pub(crate) fn get(&self, layer: usize, page: PageId) -> Option<&[f16]> {
        self.slot(layer, page).map(|slot| &*self.slots[slot].elements)
    }

    pub(crate) fn get_mut(&mut self, layer: usize, page: PageId) -> Option<&mut [f16]> {
        self.slot(layer, page).map(|slot| &mut *self.slots[slot].elements)
    }

    /// Makes room for a page, whatever it held before.
    pub(crate) fn open(&mut self, layer: usize, page: PageId) {
        if let Some(slot) = self.slot(layer, page) {
            // Its last holder let it go unfilled, or full.
            self.full.retain(|&full| full != slot);
            return;
        }
        let slot = self.free.pop().unwrap_or_else(|| {
            let elements = vec![f16::ZERO; self.elements].into_boxed_slice();
            self.slots.push(OpenSlot { layer, page: None, elements });
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
        let OpenSlot { layer, page, .. } = &mut self.slots[slot];
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
                    let elements = std::mem::take(&mut self.slots[from].elements);
                    self.slots[to].elements.copy_from_slice(&elements);
                    self.slots[from].elements = elements;
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
