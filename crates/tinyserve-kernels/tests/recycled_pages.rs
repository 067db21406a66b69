//! Pages that another sequence filled with NaN and infinities, let go, and a new one was given.

mod common;

use common::{Cache, LAYER, Numbers, backends, bits, shapes};
use proptest::prelude::*;
use tinyserve_kernels::{
    AppendKvArgs, AttendArgs, AttendSequence, AttendStats, Attention, Backend, Cpu, Heads,
};
use tinyserve_kv::{
    Budget, HostPages, KvLayout, PageId, PagePool, PageTable, Scorer, SelectionPolicy, Slot,
};

/// What no key and no value of the new sequence may ever meet.
const GARBAGE: [f32; 3] = [f32::NAN, f32::INFINITY, f32::NEG_INFINITY];

/// Appends the tokens from `first` on; `qkv` is `[tokens, qkv_width]`.
fn append(cpu: &Cpu, heads: Heads, qkv: &[f32], slots: &[Slot], pages: &mut HostPages) {
    let mut tensor = cpu.tensor(heads.qkv_width());
    cpu.upload(qkv, &mut tensor);
    cpu.append_kv(AppendKvArgs { layer: LAYER, heads, qkv: &tensor, slots, pages });
}

/// A pool all of whose pages were filled with garbage by a sequence that is gone.
fn used(cpu: &Cpu, heads: Heads, layout: KvLayout, capacity: usize) -> (PagePool, HostPages) {
    let mut pool = PagePool::new(capacity).unwrap();
    let mut pages = cpu.allocate_pages(layout, capacity).unwrap();
    let mut table = PageTable::new(layout.page_size());
    let tokens = capacity * layout.page_size();
    assert_eq!(table.extend(&mut pool, tokens).unwrap(), None);
    let slots: Vec<Slot> = (0..tokens).map(|token| table.slot(token)).collect();
    let qkv: Vec<f32> =
        (0..tokens * heads.qkv_width()).map(|i| GARBAGE[i % GARBAGE.len()]).collect();
    append(cpu, heads, &qkv, &slots, &mut pages);
    // What scorers keep of these pages is of garbage, too.
    for policy in policies() {
        let last = &qkv[(tokens - 1) * heads.qkv_width()..];
        step(cpu, heads, last, tokens - 1, (table.pages(), &pages), Attention::Policy(&policy));
    }
    table.release(&mut pool);
    assert_eq!(pool.free_pages(), capacity);
    (pool, pages)
}

/// Policies with kernels: by the keys' boxes, and by what scorers keep.
fn policies() -> [SelectionPolicy; 4] {
    ["box", "mean-std", "cuboid-mean", "two-boxes"].map(|scorer| SelectionPolicy {
        scorer: Scorer::named(scorer).unwrap(),
        budget: Budget::Ratio(0.4),
        dense_layers: 0,
        min_context: 0,
        sink_pages: 0,
        recent_pages: 1,
        ..Default::default()
    })
}

/// What the last `rows` of the tokens get, when the tokens lie in `table`.
fn attend(
    cpu: &Cpu,
    heads: Heads,
    (qkv, rows): (&[f32], usize),
    (table, pages): (&[PageId], &HostPages),
    attention: Attention<'_>,
) -> Vec<f32> {
    let tokens = qkv.len() / heads.qkv_width();
    let qkv = &qkv[(tokens - rows) * heads.qkv_width()..];
    let (out, stats) = step(cpu, heads, qkv, tokens - rows, (table, pages), attention);
    assert!(stats.recall().is_none_or(f64::is_finite), "recall of a recycled page");
    out
}

/// What the tokens `qkv` from `first_position` on get.
fn step(
    cpu: &Cpu,
    heads: Heads,
    qkv: &[f32],
    first_position: usize,
    (table, pages): (&[PageId], &HostPages),
    attention: Attention<'_>,
) -> (Vec<f32>, AttendStats) {
    let width = heads.qkv_width();
    let (mut tensor, mut out) = (cpu.tensor(width), cpu.tensor(heads.q_columns().len()));
    cpu.upload(qkv, &mut tensor);
    let sequence =
        AttendSequence { rows: 0..qkv.len() / width, first_position, pages: table, attention };
    let stats = cpu.attend(AttendArgs {
        layer: LAYER,
        heads,
        qkv: &tensor,
        scale: (heads.head_dim as f32).sqrt().recip(),
        sequences: &[sequence],
        pages,
        measure_recall: true,
        page_lists: None,
        sequence_stats: None,
        observe: None,
        out: &mut out,
    });
    (out.values().to_vec(), stats.unwrap())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(128))]

    #[test]
    fn what_a_page_held_before_never_shows(
        (heads, layout) in shapes(),
        tokens in prop_oneof![Just(1usize), 2usize..70],
        rows in 1usize..20,
        seed in any::<u64>(),
    ) {
        let rows = rows.min(tokens);
        let (mut numbers, width) = (Numbers(seed), heads.qkv_width());
        let qkv = numbers.numbers(tokens * width);
        let more = 4 * layout.page_size() + 1;
        let new = numbers.numbers(more * width);
        let policies = policies();
        let attentions = || {
            std::iter::once(Attention::Dense).chain(policies.iter().map(Attention::Policy))
        };
        for cpu in backends(1) {
            // One page to spare, to copy an open page to.
            let capacity = layout.pages_for(tokens + more) + 1;
            let (mut pool, mut pages) = used(&cpu, heads, layout, capacity);
            let mut table = PageTable::new(layout.page_size());
            prop_assert_eq!(table.extend(&mut pool, tokens).unwrap(), None);
            let slots: Vec<Slot> = (0..tokens).map(|token| table.slot(token)).collect();
            append(&cpu, heads, &qkv, &slots, &mut pages);
            // The same in memory that held zeros before.
            let mut clean = cpu.allocate_pages(layout, capacity).unwrap();
            append(&cpu, heads, &qkv, &slots, &mut clean);
            for attention in attentions() {
                let run = |pages: &HostPages| {
                    attend(&cpu, heads, (&qkv, rows), (table.pages(), pages), attention)
                };
                let (found, expected) = (run(&pages), run(&clean));
                prop_assert!(found.iter().all(|x| x.is_finite()), "{} {attention:?}", cpu.path());
                prop_assert_eq!(bits(&found), bits(&expected), "{} {:?}", cpu.path(), attention);
            }
            // A fork that grows copies the open page, garbage and all, and then has pages enough
            // after it that the copy is read for what its box says.
            let mut fork = table.fork(&mut pool);
            let copy = fork.extend(&mut pool, more).unwrap();
            prop_assert_eq!(copy.is_some(), tokens % layout.page_size() != 0);
            let slots: Vec<Slot> = (tokens..tokens + more).map(|token| fork.slot(token)).collect();
            let grown = [&qkv[..], &new[..]].concat();
            for pages in [&mut pages, &mut clean] {
                if let Some(copy) = copy {
                    cpu.copy_page(pages, copy);
                }
                append(&cpu, heads, &new, &slots, pages);
            }
            // What a sequence gets that never was a fork, in pages of its own.
            let mut own = cpu.allocate_pages(layout, capacity).unwrap();
            let slots: Vec<Slot> = (0..tokens + more).map(|token| fork.slot(token)).collect();
            append(&cpu, heads, &grown, &slots, &mut own);
            for attention in attentions() {
                let run = |pages: &HostPages| {
                    attend(&cpu, heads, (&grown, 1), (fork.pages(), pages), attention)
                };
                let expected = run(&own);
                for pages in [&pages, &clean] {
                    let found = run(pages);
                    prop_assert_eq!(bits(&found), bits(&expected), "{} {:?}", cpu.path(), attention);
                }
            }
        }
    }
}

#[test]
fn garbage_that_a_sequence_does_read_shows() {
    // Otherwise the test above would prove nothing.
    let (heads, layout) = shape();
    for cpu in backends(1) {
        let mut cache = Cache::new(heads, layout, &[5]);
        let mut qkv = Numbers(9).numbers(5 * heads.qkv_width());
        let key = 2 * heads.qkv_width() + heads.k_columns().start;
        qkv[key] = f32::NAN;
        cache.append(&cpu, 0, 0, &qkv);
        let query = &qkv[..heads.qkv_width()];
        let (out, _) = cache.attend(&cpu, query, &[(0, 4, 1, Attention::Dense)], false).unwrap();
        assert!(out.iter().all(|x| x.is_nan()), "{}: {out:?}", cpu.path());
    }
}

fn shape() -> (Heads, KvLayout) {
    use tinyserve_kv::{KvFormat, KvShape};
    let shape =
        KvShape { layers: 2, kv_heads: 1, head_dim: 6, page_size: 4, format: KvFormat::F32 };
    (Heads { q_heads: 2, kv_heads: 1, head_dim: 6 }, KvLayout::new(shape).unwrap())
}
