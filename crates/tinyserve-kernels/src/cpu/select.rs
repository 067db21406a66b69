//! Choosing pages: scores from the boxes, a budget, a list.

mod best;
mod score;

use std::marker::PhantomData;

use tinyserve_kv::{
    HostKeys, KvElement, PageId, PageSelector, SelectFields, SelectInput, select_pages,
};

use super::attend::Context;
use super::path::CpuPath;
use super::simd::{Element, dispatch};
use crate::{Attention, KernelError};

/// Buffers that choosing reuses.
#[derive(Debug, Default)]
pub(super) struct Choice {
    scores: Vec<f32>,
    boxes: Vec<f32>,
}

/// What was chosen.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) enum Chosen {
    /// Every page, without a look at the boxes.
    #[default]
    Everything,
    /// Every page, after a look at the boxes.
    EverythingSeen,
    /// The pages of the list.
    Listed,
}

/// Fills `list` with the pages that one KV head of one row reads.
///
/// `queries` is `[group, head_dim]`.
pub(super) fn choose<E: KvElement + Element>(
    context: &Context<'_>,
    attention: Attention<'_>,
    (kv_head, table, tokens): (usize, &[PageId], usize),
    queries: &[f32],
    choice: &mut Choice,
    list: &mut Vec<u32>,
) -> Result<Chosen, KernelError> {
    list.clear();
    match attention {
        Attention::Dense => Ok(Chosen::Everything),
        Attention::Policy(policy) if policy.has_kernels() => {
            let size = context.pages.layout().page_size();
            let Some(budget) = policy.page_budget(context.layer, tokens, size) else {
                return Ok(Chosen::Everything);
            };
            choice.scores.resize(table.len(), 0.0);
            let scores = choice.scores.as_mut_slice();
            let (sink, recent) = (policy.sink_pages, policy.recent_pages);
            if context.path == CpuPath::Scalar {
                context.pages.boxes_f32(context.layer, table, kv_head, &mut choice.boxes);
                let boxes = choice.boxes.chunks_exact(2 * context.heads.head_dim);
                for (score, corners) in scores.iter_mut().zip(boxes) {
                    let (min, max) = corners.split_at(context.heads.head_dim);
                    *score = policy.score(queries.chunks_exact(context.heads.head_dim), min, max);
                }
                select_pages(scores, budget, sink, recent, list);
            } else {
                let element = PhantomData::<E>;
                let score = score::Scores { context, table, kv_head, queries, scores, element };
                let start = context.clock.start();
                dispatch(context.path, score);
                context.clock.scored(start);
                let best = best::Best { scores: &choice.scores, budget, sink, recent, list };
                let start = context.clock.start();
                dispatch(context.path, best);
                context.clock.listed(start);
            }
            Ok(Chosen::Listed)
        }
        Attention::Policy(policy) => {
            let size = context.pages.layout().page_size();
            match policy.page_budget(context.layer, tokens, size) {
                Some(_) => {
                    on_host(context, policy, (kv_head, table, tokens), queries, choice, list)
                }
                None => Ok(Chosen::Everything),
            }
        }
        Attention::Custom(selector) => {
            on_host(context, selector, (kv_head, table, tokens), queries, choice, list)
        }
    }
}

/// Asks a selector that knows nothing of devices.
fn on_host(
    context: &Context<'_>,
    selector: &dyn PageSelector,
    (kv_head, table, tokens): (usize, &[PageId], usize),
    queries: &[f32],
    choice: &mut Choice,
    list: &mut Vec<u32>,
) -> Result<Chosen, KernelError> {
    let Context { pages, layer, heads, scale, .. } = *context;
    pages.boxes_f32(layer, table, kv_head, &mut choice.boxes);
    let keys = HostKeys { pages, layer, kv_head, table, tokens };
    let input = SelectInput::new(SelectFields {
        layer,
        kv_head,
        tokens,
        page_size: pages.layout().page_size(),
        head_dim: heads.head_dim,
        scale,
        queries,
        boxes: &choice.boxes,
        keys: Some(&keys),
    });
    let start = context.clock.start();
    let chosen = custom(selector, &input, list);
    context.clock.scored(start);
    chosen
}

fn custom(
    selector: &dyn PageSelector,
    input: &SelectInput<'_>,
    list: &mut Vec<u32>,
) -> Result<Chosen, KernelError> {
    let listed = ask_selector(selector, input, list)?;
    Ok(if listed { Chosen::Listed } else { Chosen::EverythingSeen })
}

/// Asks a custom selector, and checks its list; `false` when every page is to be read.
pub(crate) fn ask_selector(
    selector: &dyn PageSelector,
    input: &SelectInput<'_>,
    list: &mut Vec<u32>,
) -> Result<bool, KernelError> {
    if !selector.select(input, list) {
        return Ok(false);
    }
    let pages = input.page_count();
    let wrong = if list.is_empty() {
        Some("an empty list".to_owned())
    } else if let Some(pair) = list.windows(2).find(|pair| pair[0] >= pair[1]) {
        Some(format!("page {} before page {}", pair[0], pair[1]))
    } else {
        list.last().filter(|&&page| page as usize >= pages).map(|page| format!("page {page}"))
    };
    match wrong {
        None => Ok(true),
        Some(found) => Err(KernelError::Selector(format!(
            "layer {}, KV head {}: found {found}, expected at least one page, in ascending order, \
             below {pages}",
            input.layer(),
            input.kv_head()
        ))),
    }
}
