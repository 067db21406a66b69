//! Cases of the operations over pages: appending, selecting, attending.

use tinyserve_kv::{
    Budget, KvFormat, KvLayout, KvShape, PageCopy, PagePool, PageTable, SelectionPolicy, Slot,
};

use super::input::Numbers;
use super::{CaseOutcome, max_error, values};
use crate::{
    AppendKvArgs, AttendArgs, AttendSequence, AttendStats, Attention, Backend, Cpu, Heads,
    KernelError,
};

/// A softmax and sums over a few hundred tokens in f32 against f64.
const TOLERANCE: f32 = 5e-6;

/// One case: its heads, pages, what each sequence holds and what reads it.
struct Case {
    heads: Heads,
    page_size: usize,
    format: KvFormat,
    /// Tokens in the cache before the step, and new tokens, of each sequence.
    sequences: Vec<(usize, usize)>,
    policy: Option<SelectionPolicy>,
    layer: usize,
}

pub(super) fn run<B: Backend>(
    backend: &B,
    reference: &Cpu,
    outcomes: &mut Vec<CaseOutcome>,
) -> Result<(), KernelError> {
    for case in cases() {
        let (found, found_stats) = attend(backend, &case)?;
        let (expected, expected_stats) = attend(reference, &case)?;
        let error = max_error(&found, &expected);
        // What was read is counted, not computed: it is equal or wrong.
        let same = found_stats == expected_stats;
        outcomes.push(CaseOutcome {
            op: if case.policy.is_some() { "select and attend" } else { "append_kv and attend" },
            case: case.describe(),
            max_error: if same { error } else { f32::NAN },
            tolerance: TOLERANCE,
        });
    }
    Ok(())
}

impl Case {
    fn describe(&self) -> String {
        let Heads { q_heads, kv_heads, head_dim } = self.heads;
        let Self { page_size, format, sequences, policy, layer, .. } = self;
        let budget = policy.map(|policy| format!(" {:?} in layer {layer}", policy.budget));
        format!(
            "{format} {q_heads} over {kv_heads} heads of {head_dim}, pages of {page_size}, \
             (cached, new) {sequences:?}{}",
            budget.unwrap_or_default()
        )
    }
}

fn cases() -> Vec<Case> {
    let heads = [(1, 1, 1), (2, 2, 5), (4, 2, 6), (8, 1, 12), (3, 3, 40), (8, 2, 64), (2, 1, 128)];
    let mut cases = Vec::new();
    for (i, (q_heads, kv_heads, head_dim)) in heads.into_iter().enumerate() {
        let heads = Heads { q_heads, kv_heads, head_dim };
        for format in KvFormat::ALL {
            for (j, page_size) in [1, 4, 16, 33].into_iter().enumerate() {
                // One token alone, a prompt, a chunk after a prefix, a decode, a mixed batch.
                let sequences = [
                    vec![(0, 1)],
                    vec![(0, 37)],
                    vec![(29, 18)],
                    vec![(100, 1)],
                    vec![(50, 1), (0, 20), (15, 1), (3, 9)],
                ];
                let case = |sequences: &[(usize, usize)], policy, layer| Case {
                    heads,
                    page_size,
                    format,
                    sequences: sequences.to_vec(),
                    policy,
                    layer,
                };
                cases.push(case(&sequences[(i + j) % 5], None, 1));
                cases.push(case(&sequences[(i + j + 2) % 5], None, 0));
                let budget = match (i + j) % 3 {
                    0 => Budget::Ratio(0.3),
                    1 => Budget::Tokens(3 * page_size),
                    _ => Budget::Ratio(1.0),
                };
                let policy = SelectionPolicy {
                    budget,
                    sink_pages: j % 2,
                    recent_pages: i % 3,
                    dense_layers: 1,
                    min_context: 0,
                    ..SelectionPolicy::default()
                };
                for sequences in [vec![(100, 1)], vec![(60, 1), (20, 1), (0, 1)], vec![(40, 3)]] {
                    cases.push(case(&sequences, Some(policy), 1));
                }
                cases.push(case(&[(100, 1)], Some(policy), 0));
            }
        }
    }
    cases
}

/// Keys whose pages have clearly different scores, so that rounding cannot swap two of them: each
/// page's keys are its own multiple of one direction.
fn keys(numbers: &mut Numbers, position: usize, page_size: usize, head_dim: usize) -> Vec<f32> {
    let page = position / page_size;
    // A permutation of the pages below 256, so that the best pages are not neighbours.
    let height = 0.05 + (page * 167 % 256) as f32 / 256.0;
    (0..head_dim).map(|_| height * (1.0 + 0.001 * numbers.next())).collect()
}

fn attend<B: Backend>(backend: &B, case: &Case) -> Result<(Vec<f32>, AttendStats), KernelError> {
    let Case { heads, page_size, format, layer, .. } = *case;
    let layout = KvLayout::new(KvShape {
        layers: 2,
        kv_heads: heads.kv_heads,
        head_dim: heads.head_dim,
        page_size,
        format,
    })?;
    let pages_of = |&(cached, new): &(usize, usize)| layout.pages_for(cached + new);
    // One page more than needed, so that the case can move a page.
    let capacity = case.sequences.iter().map(pages_of).sum::<usize>() + 1;
    let mut pool = PagePool::new(capacity)?;
    let mut pages = backend.allocate_pages(layout, capacity)?;
    let mut numbers = Numbers::new(7);
    let row = |position: usize, numbers: &mut Numbers| -> Vec<f32> {
        let mut qkv: Vec<f32> =
            (0..heads.q_columns().len()).map(|_| 1.0 + numbers.next()).collect();
        for _ in 0..heads.kv_heads {
            qkv.extend(keys(numbers, position, page_size, heads.head_dim));
        }
        qkv.extend(numbers.take(heads.v_columns().len()));
        qkv
    };
    let append = |qkv: &[f32], slots: &[Slot], pages: &mut B::KvPages| {
        let mut tensor = backend.tensor(heads.qkv_width());
        backend.upload(qkv, &mut tensor);
        backend.append_kv(AppendKvArgs { layer, heads, qkv: &tensor, slots, pages });
        tensor
    };
    let mut tables: Vec<PageTable> = Vec::new();
    for &(cached, new) in &case.sequences {
        let mut table = PageTable::new(page_size);
        let none = table.extend(&mut pool, cached + new)?;
        debug_assert!(none.is_none(), "nothing is shared");
        let qkv: Vec<f32> = (0..cached).flat_map(|p| row(p, &mut numbers)).collect();
        let slots: Vec<Slot> = (0..cached).map(|p| table.slot(p)).collect();
        if cached > 0 {
            append(&qkv, &slots, &mut pages);
        }
        tables.push(table);
    }
    // A copied page is read like the page it was copied from.
    let moved = pool.allocate()?;
    let first = tables[0].pages()[0];
    backend.copy_page(&mut pages, PageCopy { from: first, to: moved });
    let mut lists: Vec<_> = tables.iter().map(|table| table.pages().to_vec()).collect();
    if case.sequences[0].0 >= page_size {
        lists[0][0] = moved;
    }
    let (mut qkv, mut slots, mut sequences) = (Vec::new(), Vec::new(), Vec::new());
    for (i, &(cached, new)) in case.sequences.iter().enumerate() {
        let start = slots.len();
        for position in cached..cached + new {
            qkv.extend(row(position, &mut numbers));
            slots.push(tables[i].slot(position));
        }
        sequences.push(AttendSequence {
            rows: start..slots.len(),
            first_position: cached,
            pages: &lists[i],
            attention: case.policy.as_ref().map_or(Attention::Dense, Attention::Policy),
        });
    }
    let qkv = append(&qkv, &slots, &mut pages);
    let mut out = backend.tensor(heads.q_columns().len());
    let stats = backend.attend(AttendArgs {
        layer,
        heads,
        qkv: &qkv,
        scale: (heads.head_dim as f32).sqrt().recip(),
        sequences: &sequences,
        pages: &pages,
        measure_recall: false,
        out: &mut out,
    })?;
    Ok((values(backend, &out), stats))
}
