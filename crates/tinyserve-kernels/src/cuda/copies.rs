//! Pages on their way over the bus, beside the steps.
//!
//! A page is packed into one run of bytes where it lies, which takes the steps' stream no longer than
//! reading it, and crosses the bus on a stream of its own, through pinned memory: steps wait for
//! neither. Events order the two streams, and two stages take turns, so that one page crosses while
//! the host reads or writes another.

use std::sync::Arc;

use cudarc::driver::{CudaEvent, CudaStream, PinnedHostSlice, sys};
use tinyserve_kv::PageId;

use super::device::driver_error;
use super::error::CudaError;
use super::launch::{Arg, Launcher, Shape};
use super::memory::Buffer;
use super::pages::CudaPages;
use crate::KernelError;

/// What stages are allocated for.
const WHAT: &str = "pages on their way to or from the host";
/// Pages that are under way at a time.
pub(super) const STAGES: usize = 2;

/// The stream of copies and its stages; made when the first page is moved.
#[derive(Debug, Default)]
pub(super) struct Copies {
    stream: Option<Arc<CudaStream>>,
    stages: Vec<Stage>,
    next: usize,
}

/// A packed page on the device, and its copy in pinned memory.
#[derive(Debug)]
struct Stage {
    packed: Buffer,
    pinned: PinnedHostSlice<u8>,
    /// When the last page has crossed the bus.
    crossed: Option<CudaEvent>,
    /// When the steps' stream has read or cleared `packed`.
    taken: CudaEvent,
}

impl Drop for Stage {
    fn drop(&mut self) {
        if let Some(crossed) = self.crossed.take() {
            // What goes wrong in a stream is told by the next one who asks.
            let _ = crossed.synchronize();
        }
    }
}

impl Stage {
    fn new(device: &Launcher, bytes: usize) -> Result<Self, CudaError> {
        let packed = Buffer::zeroed(device, bytes, WHAT)?;
        let flags = sys::CU_MEMHOSTALLOC_PORTABLE;
        // SAFETY: a byte of it is written before it is read.
        let pinned = unsafe { device.context.alloc_pinned_with_flags(bytes, flags) };
        let pinned = pinned.map_err(driver_error("pinning memory"))?;
        let taken = recorded(&device.stream)?;
        Ok(Self { packed, pinned, crossed: None, taken })
    }

    /// Waits until nothing crosses any more; its pinned memory.
    fn settled(&mut self) -> Result<&mut [u8], CudaError> {
        if let Some(crossed) = self.crossed.take() {
            crossed.synchronize().map_err(driver_error("waiting for a copy"))?;
        }
        self.pinned.as_mut_slice().map_err(driver_error("reading pinned memory"))
    }
}

impl Copies {
    /// Gives the bytes of each of `ids` to `take`, as [`tinyserve_kv::HostPages::read_page`] has
    /// them; while one is taken, the next is under way.
    pub(super) fn download<E: From<KernelError>>(
        &mut self,
        device: &Launcher,
        pages: &CudaPages,
        ids: &[PageId],
        mut take: impl FnMut(&[u8]) -> Result<(), E>,
    ) -> Result<(), E> {
        let bytes = pages.layout().bytes_per_page();
        let mut arrived = |stage: &mut Stage| {
            let all = stage.settled().map_err(KernelError::from)?;
            take(&all[..bytes])
        };
        let mut under_way = None;
        for &page in ids {
            let started = self.send(device, pages, page).map_err(KernelError::from)?;
            if let Some(before) = under_way.replace(started) {
                arrived(&mut self.stages[before])?;
            }
        }
        under_way.map_or(Ok(()), |last| arrived(&mut self.stages[last]))
    }

    /// Starts a page on its way to the host: what is written into it from now on does not reach
    /// there. The number of its stage.
    fn send(
        &mut self,
        device: &Launcher,
        pages: &CudaPages,
        page: PageId,
    ) -> Result<usize, CudaError> {
        let bytes = pages.layout().bytes_per_page();
        let (number, stream) = self.turn(device, bytes)?;
        let stage = &mut self.stages[number];
        stage.settled()?;
        device.flush()?;
        move_page(device, ["pack_page_16", "pack_page_32"], pages, page, &stage.packed)?;
        let packed = recorded(&device.stream)?;
        stream.wait(&packed).map_err(driver_error("waiting for an event"))?;
        let pinned = stage.pinned.as_mut_slice().map_err(driver_error("reading pinned memory"))?;
        stage.packed.read_on(&stream, &mut pinned[..bytes])?;
        stage.crossed = Some(recorded(&stream)?);
        stage.taken = packed;
        Ok(number)
    }

    /// Starts a page on its way to the device: what is launched from now on finds it there.
    pub(super) fn upload(
        &mut self,
        device: &Launcher,
        pages: &CudaPages,
        page: PageId,
        bytes: &[u8],
    ) -> Result<(), CudaError> {
        let (number, stream) = self.turn(device, bytes.len())?;
        let stage = &mut self.stages[number];
        stage.settled()?[..bytes.len()].copy_from_slice(bytes);
        let pinned = stage.pinned.as_slice().map_err(driver_error("reading pinned memory"))?;
        stream.wait(&stage.taken).map_err(driver_error("waiting for an event"))?;
        stage.packed.write_on(&stream, &pinned[..bytes.len()])?;
        let crossed = recorded(&stream)?;
        // What was launched until now does not wait for it.
        device.flush()?;
        device.stream.wait(&crossed).map_err(driver_error("waiting for an event"))?;
        stage.crossed = Some(crossed);
        move_page(device, ["unpack_page_16", "unpack_page_32"], pages, page, &stage.packed)?;
        stage.taken = recorded(&device.stream)?;
        Ok(())
    }

    /// The stage whose turn it is, with room for `bytes`, and the stream of copies.
    fn turn(
        &mut self,
        device: &Launcher,
        bytes: usize,
    ) -> Result<(usize, Arc<CudaStream>), CudaError> {
        let stream = match &self.stream {
            Some(stream) => stream.clone(),
            None => {
                let stream = device.context.new_stream();
                self.stream.insert(stream.map_err(driver_error("making a stream"))?).clone()
            }
        };
        if self.stages.first().is_none_or(|stage| stage.packed.bytes() < bytes) {
            self.stages.clear();
            let all: Result<Vec<Stage>, CudaError> =
                (0..STAGES).map(|_| Stage::new(device, bytes)).collect();
            self.stages = all?;
        }
        self.next = (self.next + 1) % STAGES;
        Ok((self.next, stream))
    }
}

/// An event behind all work of `stream`.
fn recorded(stream: &CudaStream) -> Result<CudaEvent, CudaError> {
    stream.record_event(None).map_err(driver_error("recording an event"))
}

/// Launches what packs a page or puts it back.
fn move_page(
    device: &Launcher,
    [of_two, of_four]: [&'static str; 2],
    pages: &CudaPages,
    page: PageId,
    packed: &Buffer,
) -> Result<(), CudaError> {
    assert!(page.index() < pages.capacity(), "page {} of {}", page.index(), pages.capacity());
    let (layout, shape) = (pages.layout(), pages.layout().shape());
    let args = [
        pages.layer(0),
        pages.layer_boxes(0),
        packed.arg(),
        Arg::count(page.index()),
        pages.shape(),
        Arg::count(layout.head_bytes() / shape.format.element_bytes()),
        Arg::count(pages.groups()),
    ];
    let grid = (shape.kv_heads, shape.layers, 1);
    let kernel = pages.element().of_boxes([of_four, of_two, of_two]);
    // SAFETY: the page is inside the pool, and there is room for its bytes.
    unsafe { device.launch(kernel, Shape::new(grid, 256), &args)? };
    device.flush()
}
