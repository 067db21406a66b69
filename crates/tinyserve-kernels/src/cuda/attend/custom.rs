//! Selectors on the host, custom ones and policies without kernels: boxes and queries come to it,
//! and keys where they are needed.

use half::{bf16, f16};
use tinyserve_kv::{GROUP_PAGES, PageId, PageKeys, PageSelector, SelectFields, SelectInput};

use super::super::CudaTensor;
use super::super::error::CudaError;
use super::super::launch::{Arg, Shape};
use super::super::memory::Buffer;
use super::super::pages::Element;
use super::Call;
use super::plan::{Pages, TilePlan};
use crate::cpu::ask_selector;
use crate::{AttendSequence, Attention, KernelError};

/// The kernels that gather keys, by format.
const GATHER_KEYS: [&str; 5] = [
    "gather_keys_f32",
    "gather_keys_f16",
    "gather_keys_bf16",
    "gather_keys_int8",
    "gather_keys_int4",
];

/// Fills in the lists of the tiles that a custom selector chooses for.
pub(super) fn ask(
    call: &Call<'_>,
    qkv: &CudaTensor,
    sequences: &[AttendSequence<'_>],
    tiles: &mut [TilePlan],
) -> Result<(), KernelError> {
    let heads = call.heads;
    let (width, dim) = (heads.group() * heads.head_dim, heads.head_dim);
    for tile in tiles {
        let sequence = &sequences[tile.sequence];
        let selector: &dyn PageSelector = match sequence.attention {
            _ if tile.pages != Pages::Chosen => continue,
            Attention::Dense => continue,
            Attention::Policy(policy) => policy,
            Attention::Custom(selector) => selector,
        };
        let tokens = tile.tokens();
        let table = &sequence.pages[..call.pages.layout().pages_for(tokens)];
        let mut row = vec![0f32; heads.q_columns().len()];
        if let Some(values) = &qkv.values {
            let start = 4 * tile.rows.start * heads.qkv_width();
            values.read(call.device, start, bytemuck::cast_slice_mut(&mut row))?;
        }
        let boxes = boxes(call, table)?;
        let keys = match selector.needs_keys() {
            true => Some(keys(call, table, tokens)?),
            false => None,
        };
        for (kv_head, boxes) in boxes.iter().enumerate() {
            let keys = keys.as_ref().map(|all| {
                let of_head = tokens * dim;
                let values = &all[kv_head * of_head..(kv_head + 1) * of_head];
                let page = call.pages.layout().page_size() * dim;
                DownloadedKeys { values, page }
            });
            let input = SelectInput::new(SelectFields {
                layer: call.layer,
                kv_head,
                tokens,
                page_size: call.pages.layout().page_size(),
                head_dim: dim,
                scale: call.score_scale,
                queries: &row[kv_head * width..(kv_head + 1) * width],
                boxes,
                keys: keys.as_ref().map(|keys| keys as &dyn PageKeys),
            });
            let mut list = Vec::new();
            if !ask_selector(selector, &input, &mut list)? {
                list.clear();
                list.extend(0..table.len() as u32);
            }
            tile.chosen.push(list);
        }
    }
    Ok(())
}

/// Keys of one KV head of a sequence, which came from the device.
#[derive(Debug)]
struct DownloadedKeys<'a> {
    /// `[tokens, head_dim]`.
    values: &'a [f32],
    /// Numbers of a page.
    page: usize,
}

impl PageKeys for DownloadedKeys<'_> {
    fn keys(&self, page: usize, out: &mut Vec<f32>) {
        let rest = &self.values[page * self.page..];
        out.clear();
        out.extend_from_slice(&rest[..rest.len().min(self.page)]);
    }
}

/// Keys of a sequence of `tokens` tokens, as its newest one reads them, `[kv_heads, tokens,
/// head_dim]`.
fn keys(call: &Call<'_>, table: &[PageId], tokens: usize) -> Result<Vec<f32>, CudaError> {
    let (device, pages) = (call.device, call.pages);
    let ids: Vec<u32> = table.iter().map(|page| page.index() as u32).collect();
    let ids = Buffer::of(device, &ids, "a page table")?;
    let shape = pages.layout().shape();
    let n = shape.kv_heads * tokens * shape.head_dim;
    let out = Buffer::zeroed(device, 4 * n, "keys for a selector on the host")?;
    let own = table.last().map_or(u32::MAX, |&page| pages.open_slot(page));
    let mut args = vec![
        pages.layer(call.layer),
        ids.arg(),
        out.arg(),
        pages.shape(),
        Arg::count(tokens),
        // A slot that is none is not read.
        Arg::count(own as usize),
    ];
    args.extend(call.code_args());
    let grid = (table.len(), shape.kv_heads, 1);
    // SAFETY: the table's pages are inside the pool, and `out` has room for the keys of all tokens.
    unsafe {
        device.launch(pages.element().kernel(GATHER_KEYS), Shape::new(grid, 128), &args)?;
    }
    let mut all = vec![0f32; n];
    out.read(device, 0, bytemuck::cast_slice_mut(&mut all))?;
    Ok(all)
}

/// Boxes of a table's pages by KV head, `[pages, 2 (min, max), head_dim]`.
fn boxes(call: &Call<'_>, table: &[PageId]) -> Result<Vec<Vec<f32>>, KernelError> {
    let layout = call.pages.layout();
    let shape = layout.shape();
    let (dim, size) = (shape.head_dim, shape.format.element_bytes());
    let group_bytes = shape.kv_heads * layout.group_box_elements() * size;
    let mut all = vec![vec![0.0; table.len() * 2 * dim]; shape.kv_heads];
    let mut bytes = vec![0u8; group_bytes];
    let mut group_read = usize::MAX;
    for (number, page) in table.iter().enumerate() {
        let group = page.index() / GROUP_PAGES;
        if group != group_read {
            let start = call.pages.boxes_start(call.layer) + group * group_bytes;
            call.pages.boxes.read(call.device, start, &mut bytes)?;
            group_read = group;
        }
        for (kv_head, boxes) in all.iter_mut().enumerate() {
            for channel in 0..dim {
                // In memory the maximum comes first.
                for (corner, place) in [(0, dim), (1, 0)] {
                    let row = (kv_head * dim + channel) * 2 + corner;
                    let at = (row * GROUP_PAGES + page.index() % GROUP_PAGES) * size;
                    boxes[2 * number * dim + place + channel] =
                        widened(call.pages.element(), &bytes[at..at + size]);
                }
            }
        }
    }
    Ok(all)
}

fn widened(element: Element, bytes: &[u8]) -> f32 {
    match element {
        Element::F32 => bytemuck::pod_read_unaligned(bytes),
        Element::F16 | Element::Int8 | Element::Int4 => {
            bytemuck::pod_read_unaligned::<f16>(bytes).to_f32()
        }
        Element::Bf16 => bytemuck::pod_read_unaligned::<bf16>(bytes).to_f32(),
    }
}
