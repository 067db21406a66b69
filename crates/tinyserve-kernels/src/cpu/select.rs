//! Choosing pages: scores from boxes, a budget, a list.

mod best;
mod score;

use std::marker::PhantomData;

use tinyserve_kv::{
    HostKeys, KvElement, PageId, PageSelector, Scorer, SelectFields, SelectInput, SelectionPolicy,
};

use super::attend::Context;
use super::path::CpuPath;
use super::simd::{Element, dispatch};
use crate::{Attention, KernelError};

use score::{Boxes, Scores};

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

/// Whether there are kernels that choose as `policy` says: from boxes of some kind.
pub(super) fn has_kernels(policy: &SelectionPolicy) -> bool {
    let boxes = policy.scorer == Scorer::BOX || policy.scorer.summary().is_some();
    boxes && policy.ranks_by_maximum()
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
        Attention::Policy(policy) => {
            let size = context.pages.layout().page_size();
            let Some(budget) = policy.page_budget(context.layer, tokens, size) else {
                return Ok(Chosen::Everything);
            };
            if context.path == CpuPath::Scalar || !has_kernels(policy) {
                return on_host(context, policy, (kv_head, table, tokens), queries, choice, list);
            }
            choice.scores.resize(table.len(), 0.0);
            let start = context.clock.start();
            let mut score = |boxes: Boxes<'_, E>| {
                let scores = choice.scores.as_mut_slice();
                let head_dim = context.heads.head_dim;
                dispatch(context.path, Scores { boxes, table, head_dim, queries, scores });
            };
            if policy.scorer == Scorer::BOX {
                score(Boxes::OfKeys(context, kv_head, PhantomData));
            } else {
                let Context { pages, layer, .. } = *context;
                let keys = HostKeys { pages, layer, kv_head, table, tokens };
                pages.with_summaries::<E, ()>(policy.scorer, keys, |kept| {
                    score(Boxes::Kept(kept));
                })?;
            }
            context.clock.scored(start);
            let (sink, recent) = (policy.sink_pages, policy.recent_pages);
            let best = best::Best { scores: &choice.scores, budget, sink, recent, list };
            let start = context.clock.start();
            dispatch(context.path, best);
            context.clock.listed(start);
            Ok(Chosen::Listed)
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
