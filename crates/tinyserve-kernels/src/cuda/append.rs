//! Writing keys and values into pages, and copying pages.

use tinyserve_kv::{PageCopy, PageId, Slot, TokenMove};

use super::Cuda;
use super::bucket::bucket;
use super::error::CudaError;
use super::launch::{Arg, Launcher, Shape};
use super::memory::Upload;
use super::pages::{CudaPages, Element};
use super::tensor::CudaTensor;
use crate::AppendKvArgs;

/// What the kernel that seals leaves alone.
const NO_PAGE: [u32; 2] = [u32::MAX, 0];

/// Where the rows of a step go; the same for all layers, so it is sent once.
#[derive(Debug, Default)]
pub(super) struct Scratch {
    slots: Vec<Slot>,
    plan: Plan,
    sent: Upload,
    filled: Upload,
}

/// Rows by the page that they go to.
#[derive(Debug, Default)]
struct Plan {
    /// What the kernel takes: for each run of rows of one page its begin and end among the entries,
    /// the page and its slot; then for each entry a row and its token in the page. Both are filled
    /// up to a bucket.
    words: Vec<u32>,
    /// The page of each run.
    pages: Vec<PageId>,
    /// Runs, those of no rows included.
    runs: usize,
}

/// Words of a run.
const RUN: usize = 4;

impl Plan {
    fn new(slots: &[Slot]) -> Self {
        let of = |slot: &Slot| (slot.page.index(), slot.offset);
        let mut order: Vec<u32> = (0..slots.len() as u32).collect();
        order.sort_by_key(|&row| of(&slots[row as usize]));
        let page = |row: u32| slots[row as usize].page;
        let starts: Vec<usize> =
            (0..slots.len()).filter(|&i| i == 0 || page(order[i]) != page(order[i - 1])).collect();
        let runs = bucket(starts.len());
        let mut words = Vec::with_capacity(RUN * runs + 2 * bucket(slots.len()));
        let ends = starts.iter().skip(1).copied().chain([slots.len()]);
        let mut pages = Vec::with_capacity(starts.len());
        for (&start, end) in starts.iter().zip(ends) {
            pages.push(page(order[start]));
            let page = page(order[start]).index() as u32;
            words.extend([start as u32, end as u32, page, NO_PAGE[0]]);
        }
        words.resize(RUN * runs, 0);
        words.extend(order.iter().flat_map(|&row| [row, slots[row as usize].offset as u32]));
        words.resize(RUN * runs + 2 * bucket(slots.len()), 0);
        Self { words, pages, runs }
    }

    /// Notes the slots of open pages.
    fn put_slots(&mut self, slot: impl Fn(PageId) -> u32) {
        for (run, &page) in self.words.chunks_exact_mut(RUN).zip(&self.pages) {
            run[3] = slot(page);
        }
    }
}

/// Writes the keys and values of `qkv` into pages; with `angles`, rotates queries and keys before.
pub(super) fn append_kv(
    device: &Launcher,
    scratch: &mut Scratch,
    angles: Option<&CudaTensor>,
    args: AppendKvArgs<'_, Cuda>,
) -> Result<(), CudaError> {
    let AppendKvArgs { layer, heads, qkv, slots, pages } = args;
    let shape = pages.layout().shape();
    assert_eq!(qkv.columns(), heads.qkv_width(), "width of queries, keys and values");
    assert_eq!(qkv.rows(), slots.len(), "one slot per row");
    assert_eq!(
        (heads.kv_heads, heads.head_dim),
        (shape.kv_heads, shape.head_dim),
        "heads of pages"
    );
    assert!(layer < shape.layers, "layer {layer} of {}", shape.layers);
    if let Some(angles) = angles {
        assert_eq!(angles.columns(), heads.head_dim, "width of the angles");
        assert_eq!(angles.rows(), qkv.rows(), "rows of the angles");
    }
    if scratch.slots != slots {
        for slot in slots {
            assert!(slot.offset < shape.page_size, "offset {} in a page", slot.offset);
            let page = slot.page.index();
            assert!(page < pages.capacity(), "page {page} of {}", pages.capacity());
        }
        scratch.plan = Plan::new(slots);
        scratch.slots.clear();
        scratch.slots.extend_from_slice(slots);
    }
    if let Some(open) = &mut pages.open {
        open.append(device, layer, slots)?;
        scratch.plan.put_slots(|page| open.slot(page).unwrap_or(u32::MAX));
    }
    let plan = &scratch.plan;
    let sent = scratch.sent.send(device, &plan.words)?;
    let (elements, names) = match &pages.open {
        None => {
            let names = ["append_kv_f32", "append_kv_f16", "append_kv_bf16"];
            (pages.layer(layer), pages.element().of_boxes(names))
        }
        Some(_) => (pages.layer_open(layer), "append_kv_open"),
    };
    let mut args = vec![
        qkv.arg(),
        angles.map_or(Arg::Pointer(0), CudaTensor::arg),
        elements,
        pages.layer_boxes(layer),
        sent,
        sent.offset(size_of::<u32>() * RUN * plan.runs),
        pages.shape(),
        Arg::count(heads.qkv_width()),
        Arg::count(heads.k_columns().start),
        Arg::count(heads.v_columns().start),
    ];
    if pages.open.is_some() {
        args.push(pages.heads());
    }
    let queries = if angles.is_some() { heads.q_heads } else { 0 };
    let grid = (plan.runs, heads.kv_heads + queries, 1);
    // SAFETY: every slot is inside the pages or the open pages, and every row inside `qkv` and the
    // angles.
    unsafe { device.launch(names, Shape::new(grid, 128), &args)? };
    let Some(open) = &pages.open else { return Ok(()) };
    let of = |&page: &PageId| [page.index() as u32, pages.open_slot(page)];
    let mut filled: Vec<[u32; 2]> = open.full().iter().map(of).collect();
    if filled.is_empty() {
        return Ok(());
    }
    // As many as a step of about as many filled pages has, so that their launches are alike.
    filled.resize(filled.len().next_power_of_two(), NO_PAGE);
    let args = [
        pages.layer_open(layer),
        pages.layer(layer),
        pages.layer_boxes(layer),
        scratch.filled.send(device, &filled)?,
        pages.shape(),
        pages.heads(),
    ];
    let kernel = match pages.element() {
        Element::Int4 => "seal_pages_int4",
        _ => "seal_pages_int8",
    };
    let grid = (filled.len(), heads.kv_heads, 1);
    // SAFETY: every page is inside the pool, and every slot inside the open pages.
    unsafe { device.launch(kernel, Shape::new(grid, 256), &args) }
}

pub(super) fn copy_page(
    device: &Launcher,
    pages: &mut CudaPages,
    copy: PageCopy,
) -> Result<(), CudaError> {
    let PageCopy { from, to } = copy;
    for page in [from, to] {
        assert!(page.index() < pages.capacity(), "page {} of {}", page.index(), pages.capacity());
    }
    let shape = pages.layout().shape();
    if let Some(open) = &mut pages.open {
        open.copy(device, copy)?;
    }
    let kernel = pages.element().of_boxes(["copy_page_32", "copy_page_16", "copy_page_16"]);
    let head = pages.layout().head_bytes() / shape.format.element_bytes();
    for layer in 0..shape.layers {
        let args = [
            pages.layer(layer),
            pages.layer_boxes(layer),
            Arg::count(from.index()),
            Arg::count(to.index()),
            pages.shape(),
            Arg::count(head),
        ];
        let grid = (shape.kv_heads, 1, 1);
        // SAFETY: both pages are inside the pool.
        unsafe { device.launch(kernel, Shape::new(grid, 256), &args)? };
    }
    Ok(())
}

/// Moves tokens and rebuilds the boxes of the pages that they reach, in every layer.
pub(super) fn move_tokens(
    device: &Launcher,
    uploaded: &mut Upload,
    pages: &CudaPages,
    moves: &[TokenMove],
) -> Result<(), CudaError> {
    let shape = pages.layout().shape();
    assert!(!shape.format.is_quantised(), "the codes of a page share its box");
    for slot in moves.iter().flat_map(|it| [it.from, it.to]) {
        assert!(slot.offset < shape.page_size, "offset {} in a page", slot.offset);
        assert!(slot.page.index() < pages.capacity(), "page {}", slot.page.index());
    }
    let of = |slot: Slot| [slot.page.index() as u32, slot.offset as u32];
    let records: Vec<[[u32; 2]; 2]> = moves.iter().map(|it| [of(it.from), of(it.to)]).collect();
    let records = uploaded.send(device, &records)?;
    let names = ["move_tokens_f32", "move_tokens_f16", "move_tokens_bf16"];
    for layer in 0..shape.layers {
        let args = [
            pages.layer(layer),
            pages.layer_boxes(layer),
            records,
            Arg::count(moves.len()),
            pages.shape(),
        ];
        let grid = (shape.kv_heads, 1, 1);
        // SAFETY: every slot is inside the pages.
        unsafe { device.launch(pages.element().of_boxes(names), Shape::new(grid, 128), &args)? };
    }
    Ok(())
}
