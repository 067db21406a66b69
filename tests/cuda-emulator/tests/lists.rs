//! The page lists that kernels choose are those of the reference, ties included.

use tinyserve_cuda_emulator::ready;
use tinyserve_kernels::{
    AppendKvArgs, AttendArgs, AttendSequence, Attention, Backend, Cuda, Heads,
};
use tinyserve_kv::{
    Budget, HostPages, KvFormat, KvLayout, KvShape, NewToken, PagePool, PageSelector, PageTable,
    Scorer, SelectFields, SelectInput, SelectionPolicy, Slot,
};

const HEADS: Heads = Heads { q_heads: 4, kv_heads: 2, head_dim: 8 };
const TOKENS: usize = 333;

/// Small whole numbers, from a seed (splitmix64): sums of their products are exact in any order, and
/// many of them are equal.
struct Whole(u64);

impl Whole {
    fn next(&mut self) -> f32 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut x = self.0;
        x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((x ^ (x >> 31)) % 5) as f32 - 2.0
    }
}

/// Lists of the device and of the reference for the newest token.
fn lists(cuda: &Cuda, policy: &SelectionPolicy, layout: KvLayout, seed: u64) -> [Vec<Vec<u32>>; 2] {
    let size = layout.page_size();
    let capacity = layout.pages_for(TOKENS) + 70;
    let mut pool = PagePool::new(capacity).unwrap();
    let mut pages = cuda.allocate_pages(layout, capacity).unwrap();
    let mut host = HostPages::new(layout, capacity).unwrap();
    let mut table = PageTable::new(size);
    // Not from a border of the boxes' groups on.
    for _ in 0..3 {
        pool.allocate().unwrap();
    }
    assert!(table.extend(&mut pool, TOKENS).unwrap().is_none());
    let mut numbers = Whole(seed);
    let rows: Vec<f32> = (0..TOKENS * HEADS.qkv_width()).map(|_| numbers.next()).collect();
    let slots: Vec<Slot> = (0..TOKENS).map(|token| table.slot(token)).collect();
    let mut qkv = cuda.tensor(HEADS.qkv_width());
    cuda.upload(&rows, &mut qkv);
    let args = AppendKvArgs { layer: 0, heads: HEADS, qkv: &qkv, slots: &slots, pages: &mut pages };
    cuda.append_kv(args);
    host.append_tokens(
        0,
        rows.chunks_exact(HEADS.qkv_width()).zip(&slots).map(|(row, &slot)| NewToken {
            slot,
            keys: &row[HEADS.k_columns()],
            values: &row[HEADS.v_columns()],
        }),
    );
    let query = &rows[(TOKENS - 1) * HEADS.qkv_width()..][HEADS.q_columns()];
    let mut last = cuda.tensor(HEADS.qkv_width());
    cuda.upload(&rows[(TOKENS - 1) * HEADS.qkv_width()..], &mut last);
    let mut out = cuda.tensor(HEADS.q_columns().len());
    let sequence = AttendSequence {
        rows: 0..1,
        first_position: TOKENS - 1,
        pages: table.pages(),
        attention: Attention::Policy(policy),
    };
    cuda.attend(AttendArgs {
        layer: 0,
        heads: HEADS,
        qkv: &last,
        scale: 0.35,
        sequences: &[sequence],
        pages: &pages,
        measure_recall: false,
        page_lists: None,
        sequence_stats: None,
        observe: None,
        out: &mut out,
    })
    .unwrap();
    let found = cuda.page_lists().unwrap();
    let mut boxes = Vec::new();
    let expected = (0..HEADS.kv_heads).map(|kv_head| {
        host.boxes_f32(0, table.pages(), kv_head, &mut boxes);
        let keys = tinyserve_kv::HostKeys {
            pages: &host,
            layer: 0,
            kv_head,
            table: table.pages(),
            tokens: TOKENS,
        };
        let width = HEADS.group() * HEADS.head_dim;
        let input = SelectInput::new(SelectFields {
            layer: 0,
            kv_head,
            tokens: TOKENS,
            page_size: size,
            head_dim: HEADS.head_dim,
            scale: 0.35,
            queries: &query[kv_head * width..(kv_head + 1) * width],
            boxes: &boxes,
            keys: Some(&keys),
        });
        let mut list = Vec::new();
        assert!(policy.select(&input, &mut list));
        list
    });
    let expected = expected.collect();
    [found, expected]
}

#[test]
fn kernels_list_what_the_reference_lists() {
    let Some(ready) = ready() else { return };
    ready.orders(|seed| {
        for fused in [None, Some(true), Some(false)] {
            let cuda = Cuda::new(0).unwrap().use_fused_kernel(fused);
            for (i, format) in KvFormat::ALL.into_iter().enumerate() {
                for (page_size, budget, scorer) in [
                    (4, Budget::Ratio(0.3), "box"),
                    (16, Budget::Tokens(100), "box"),
                    (4, Budget::Ratio(0.05), "box"),
                    (8, Budget::Ratio(0.5), "mean-std"),
                ] {
                    // Codes stand for numbers that are not whole: moments of them are rounded.
                    if scorer != "box" && format.is_quantised() {
                        continue;
                    }
                    let policy = SelectionPolicy {
                        scorer: Scorer::named(scorer).unwrap(),
                        budget,
                        sink_pages: i % 3,
                        recent_pages: 1 + i % 2,
                        dense_layers: 0,
                        min_context: 0,
                        ..SelectionPolicy::default()
                    };
                    let shape = KvShape {
                        layers: 1,
                        kv_heads: HEADS.kv_heads,
                        head_dim: HEADS.head_dim,
                        page_size,
                        format,
                    };
                    let layout = KvLayout::new(shape).unwrap();
                    let [found, expected] = lists(&cuda, &policy, layout, 7 + seed);
                    let case = format!("{format}, {page_size}, {budget:?}, {scorer}, {fused:?}");
                    assert_eq!(found, expected, "{case}");
                    assert!(found[0].len() < layout.pages_for(TOKENS), "{case}");
                }
            }
        }
    });
}
