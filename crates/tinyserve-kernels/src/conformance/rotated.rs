//! Queries and keys that are rotated on the way into the pages.

use tinyserve_kv::{
    Budget, KvFormat, KvLayout, KvShape, PagePool, PageTable, SelectionPolicy, Slot,
};

use super::input::Numbers;
use super::{CaseOutcome, Part, values};
use crate::backend::rotate_then_append;
use crate::{
    AttendArgs, AttendSequence, Attention, Backend, Heads, KernelError, RotaryAnglesArgs,
    RotateAndAppendArgs,
};

const PAGE_SIZE: usize = 8;
/// Tokens of each sequence before the last.
const CACHED: [usize; 3] = [21, 8, 15];

/// It is its operations one after the other, to the bit: each of them has cases of its own.
pub(super) fn run<B: Backend>(
    backend: &B,
    part: &mut Part,
    outcomes: &mut Vec<CaseOutcome>,
) -> Result<(), KernelError> {
    for (q_heads, kv_heads, head_dim) in [(4, 2, 6), (8, 1, 64), (2, 2, 160)] {
        let heads = Heads { q_heads, kv_heads, head_dim };
        for &format in backend.kv_formats() {
            if !part.takes_next() {
                continue;
            }
            let case = format!("{format} {q_heads} and {kv_heads} heads of {head_dim}");
            let expected = attended(backend, (heads, format), rotate_then_append)?;
            let found = attended(backend, (heads, format), B::rotate_and_append)?;
            let bits = |values: &[f32]| values.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
            let max_error = if bits(&found) == bits(&expected) { 0.0 } else { f32::NAN };
            outcomes.push(CaseOutcome { op: "rotate_and_append", case, max_error, tolerance: 0.0 });
        }
    }
    Ok(())
}

/// What attention over chosen pages gives after prompts and a token of each sequence: it depends on
/// queries, keys, values and boxes.
fn attended<B: Backend>(
    backend: &B,
    (heads, format): (Heads, KvFormat),
    append: impl Fn(&B, RotateAndAppendArgs<'_, B>),
) -> Result<Vec<f32>, KernelError> {
    let Heads { kv_heads, head_dim, .. } = heads;
    let shape = KvShape { layers: 1, kv_heads, head_dim, page_size: PAGE_SIZE, format };
    let layout = KvLayout::new(shape)?;
    let capacity = CACHED.iter().map(|tokens| layout.pages_for(tokens + 1)).sum();
    let mut pool = PagePool::new(capacity)?;
    let mut pages = backend.allocate_pages(layout, capacity)?;
    let mut tables: Vec<PageTable> = CACHED.iter().map(|_| PageTable::new(PAGE_SIZE)).collect();
    let mut numbers = Numbers::new(9);
    let inverse_frequencies: Vec<f32> =
        (0..head_dim / 2).map(|i| 10_000f32.powf(-2.0 * i as f32 / head_dim as f32)).collect();
    let (mut angles, mut qkv) = (backend.tensor(head_dim), backend.tensor(heads.qkv_width()));
    for step in [CACHED, [1; 3]] {
        let (mut slots, mut positions): (Vec<Slot>, Vec<u32>) = (Vec::new(), Vec::new());
        for (table, new) in tables.iter_mut().zip(step) {
            let cached = table.len();
            table.extend(&mut pool, new)?;
            slots.extend((cached..cached + new).map(|token| table.slot(token)));
            positions.extend(cached as u32..(cached + new) as u32);
        }
        backend.rotary_angles(RotaryAnglesArgs {
            positions: &positions,
            inverse_frequencies: &inverse_frequencies,
            out: &mut angles,
        });
        backend.upload(&numbers.take(slots.len() * heads.qkv_width()), &mut qkv);
        append(
            backend,
            RotateAndAppendArgs {
                angles: &angles,
                layer: 0,
                heads,
                qkv: &mut qkv,
                slots: &slots,
                pages: &mut pages,
            },
        );
    }
    let policy = SelectionPolicy {
        budget: Budget::Ratio(0.5),
        dense_layers: 0,
        min_context: 0,
        ..SelectionPolicy::default()
    };
    let sequences: Vec<_> = tables
        .iter()
        .enumerate()
        .map(|(row, table)| AttendSequence {
            rows: row..row + 1,
            first_position: table.len() - 1,
            pages: table.pages(),
            attention: Attention::Policy(&policy),
        })
        .collect();
    let mut out = backend.tensor(heads.q_columns().len());
    backend.attend(AttendArgs {
        layer: 0,
        heads,
        qkv: &qkv,
        scale: (head_dim as f32).sqrt().recip(),
        sequences: &sequences,
        pages: &pages,
        measure_recall: false,
        page_lists: None,
        sequence_stats: None,
        observe: None,
        out: &mut out,
    })?;
    Ok(values(backend, &out))
}
