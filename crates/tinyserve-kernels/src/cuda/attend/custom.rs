//! Selectors on the host, custom ones and policies without kernels: boxes and queries come to it.

use half::{bf16, f16};
use tinyserve_kv::{GROUP_PAGES, PageId, PageSelector, SelectFields, SelectInput};

use super::super::CudaTensor;
use super::super::pages::Element;
use super::Call;
use super::plan::{Pages, TilePlan};
use crate::cpu::ask_selector;
use crate::{AttendSequence, Attention, KernelError};

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
        if selector.needs_keys() {
            let found = "found one that needs the keys on the host";
            return Err(KernelError::Selector(format!(
                "{found}, expected one that boxes are enough for on a CUDA device: the box scorer, \
                 or --device cpu"
            )));
        }
        let tokens = tile.tokens();
        let table = &sequence.pages[..call.pages.layout().pages_for(tokens)];
        let mut row = vec![0f32; heads.q_columns().len()];
        if let Some(values) = &qkv.values {
            let start = 4 * tile.rows.start * heads.qkv_width();
            values.read(call.device, start, bytemuck::cast_slice_mut(&mut row))?;
        }
        let boxes = boxes(call, table)?;
        for (kv_head, boxes) in boxes.iter().enumerate() {
            let input = SelectInput::new(SelectFields {
                layer: call.layer,
                kv_head,
                tokens,
                page_size: call.pages.layout().page_size(),
                head_dim: dim,
                scale: call.score_scale,
                queries: &row[kv_head * width..(kv_head + 1) * width],
                boxes,
                keys: None,
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
        Element::F16 => bytemuck::pod_read_unaligned::<f16>(bytes).to_f32(),
        Element::Bf16 => bytemuck::pod_read_unaligned::<bf16>(bytes).to_f32(),
    }
}
