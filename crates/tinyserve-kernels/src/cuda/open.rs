//! Pages that are being written, where sealed pages hold codes.

use std::collections::HashMap;

use tinyserve_kv::{PageCopy, PageId, PagePool, Slot};

use super::error::CudaError;
use super::launch::{Arg, Launcher, Shape};
use super::memory::Buffer;

/// Keys and values in f16 of the pages that hold no codes yet, `[slots][layers]` of pages without
/// codes: a page has the same slot in every layer.
///
/// A full page stays here until the next step appends: the tokens that filled it attend to it as
/// they wrote it, whichever of them came in the same step.
#[derive(Debug)]
pub(super) struct OpenPages {
    elements: Option<Buffer>,
    /// Bytes of a slot.
    slot_bytes: usize,
    page_size: usize,
    slots: HashMap<PageId, u32>,
    free: Vec<u32>,
    /// Pages that the step before filled.
    full: Vec<PageId>,
    /// What was appended last, by which the layers of one step are known.
    appended: Vec<Slot>,
    layer: usize,
}

impl OpenPages {
    pub(super) fn new(slot_bytes: usize, page_size: usize) -> Self {
        Self {
            elements: None,
            slot_bytes,
            page_size,
            slots: HashMap::new(),
            free: Vec::new(),
            full: Vec::new(),
            appended: Vec::new(),
            layer: 0,
        }
    }

    /// The slot of a page that holds no codes, or was filled last.
    pub(super) fn slot(&self, page: PageId) -> Option<u32> {
        self.slots.get(&page).copied()
    }

    /// Where the slots lie, from `layer_bytes` on in each of them.
    pub(super) fn arg(&self, layer_bytes: usize) -> Arg {
        let elements = self.elements.as_ref();
        Arg::Pointer(elements.map_or(0, |elements| elements.at(layer_bytes)))
    }

    /// Makes room for the tokens of a step, in whose first layer full pages go.
    pub(super) fn append(
        &mut self,
        device: &Launcher,
        layer: usize,
        slots: &[Slot],
    ) -> Result<(), CudaError> {
        let same_step = layer > self.layer && self.appended == slots;
        self.layer = layer;
        if same_step {
            return Ok(());
        }
        // Until there is room for all of them, this is no step that a later layer could be of.
        self.appended.clear();
        while let Some(page) = self.full.pop() {
            self.close(page);
        }
        for slot in slots {
            if slot.offset == 0 {
                self.open(device, slot.page)?;
            }
            assert!(self.slots.contains_key(&slot.page), "page {} is sealed", slot.page.index());
            if slot.offset + 1 == self.page_size {
                self.full.push(slot.page);
            }
        }
        self.appended.extend_from_slice(slots);
        Ok(())
    }

    /// Pages that the last step filled.
    pub(super) fn full(&self) -> &[PageId] {
        &self.full
    }

    /// Gives a page a slot, whatever it held before.
    fn open(&mut self, device: &Launcher, page: PageId) -> Result<u32, CudaError> {
        self.full.retain(|&full| full != page);
        if let Some(slot) = self.slot(page) {
            return Ok(slot);
        }
        if self.free.is_empty() {
            self.grow(device)?;
        }
        // Growing has made some.
        let slot = self.free.pop().unwrap_or_default();
        self.slots.insert(page, slot);
        Ok(slot)
    }

    fn grow(&mut self, device: &Launcher) -> Result<(), CudaError> {
        let had = self.slots.len();
        let more = (2 * had).max(4);
        let what = "pages that are not full yet";
        let mut elements = Buffer::zeroed(device, more * self.slot_bytes, what)?;
        if let Some(old) = &self.elements {
            elements.copy_from(device, 0, old)?;
        }
        self.elements = Some(elements);
        // The lowest is taken first.
        self.free.extend((had as u32..more as u32).rev());
        Ok(())
    }

    fn close(&mut self, page: PageId) {
        self.free.extend(self.slots.remove(&page));
    }

    /// Lets a page go that holds codes from now on, whatever it held.
    pub(super) fn close_page(&mut self, page: PageId) {
        self.full.retain(|&full| full != page);
        self.close(page);
    }

    /// Lets go of pages that nobody holds.
    pub(super) fn forget_free(&mut self, pool: &PagePool) {
        let free = |page: &PageId| pool.holders(*page) == 0;
        let gone: Vec<PageId> = self.slots.keys().copied().filter(free).collect();
        gone.into_iter().for_each(|page| self.close_page(page));
    }

    /// Makes `to` what `from` is, open or not.
    pub(super) fn copy(
        &mut self,
        device: &Launcher,
        PageCopy { from, to }: PageCopy,
    ) -> Result<(), CudaError> {
        if from == to {
            return Ok(());
        }
        let Some(slot) = self.slot(from).filter(|_| !self.full.contains(&from)) else {
            self.close_page(to);
            return Ok(());
        };
        let copied = self.open(device, to)?;
        let elements = self.slot_bytes / size_of::<half::f16>();
        let args = [
            self.arg(0),
            Arg::count(slot as usize),
            Arg::count(copied as usize),
            Arg::count(elements),
        ];
        let shape = Shape::new((elements.div_ceil(256), 1, 1), 256);
        // SAFETY: both slots are inside the buffer, and have as many elements.
        unsafe { device.launch("copy_open", shape, &args) }
    }
}
