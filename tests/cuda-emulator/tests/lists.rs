//! The page lists that kernels choose are those of the CPU backend, ties included.

mod common;

use tinyserve_cuda_emulator::ready;
use tinyserve_kernels::{Attention, Backend, Cpu, CpuOptions, Cuda, Heads, PageLists};
use tinyserve_kv::{Budget, KvFormat, KvLayout, PagePool, PageTable, Scorer, SelectionPolicy};

use common::sequence::{self, Step, layout};

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

/// A sequence that attends, and where its pages lie.
#[derive(Debug, Clone, Copy)]
struct Sequence {
    heads: Heads,
    tokens: usize,
    /// Each page in another group than the one before, instead of side by side.
    scattered: bool,
}

impl Sequence {
    fn rows(&self, numbers: &mut Whole) -> Vec<f32> {
        (0..self.tokens * self.heads.qkv_width()).map(|_| numbers.next()).collect()
    }
}

/// A sequence in the pages of a backend, of which the newest row attends.
struct Cache<'a, B: Backend> {
    sequence: sequence::Sequence<B>,
    newest: &'a [f32],
    first_position: usize,
}

impl<'a, B: Backend> Cache<'a, B> {
    fn new(backend: &B, layout: KvLayout, sequence: Sequence, rows: &'a [f32]) -> Self {
        let Sequence { heads, tokens, scattered } = sequence;
        let count = layout.pages_for(tokens);
        let capacity = if scattered { 4 * 64 * count.div_ceil(64) } else { count + 70 };
        let mut pool = PagePool::new(capacity).unwrap();
        let mut table = PageTable::new(layout.page_size());
        if scattered {
            let all: Vec<_> = (0..capacity).map(|_| pool.allocate().unwrap()).collect();
            for i in 0..count {
                // The only free page is the one that the table gets.
                pool.release(all[i % 4 * (capacity / 4) + i / 4]);
                let more = layout.page_size().min(tokens - i * layout.page_size());
                assert!(table.extend(&mut pool, more).unwrap().is_none());
            }
        } else {
            // Not from a border of the boxes' groups on.
            for _ in 0..3 {
                pool.allocate().unwrap();
            }
            assert!(table.extend(&mut pool, tokens).unwrap().is_none());
        }
        let mut sequence =
            sequence::Sequence::in_table(backend, heads, layout, &pool, table).unwrap();
        sequence.append(backend, rows);
        let newest = &rows[(tokens - 1) * heads.qkv_width()..];
        Self { sequence, newest, first_position: tokens - 1 }
    }

    /// Attention, and the lists that the backend tells; one on a device tells none here.
    fn attend(&self, backend: &B, policy: &SelectionPolicy) -> PageLists {
        let mut lists = PageLists::default();
        let step = Step {
            rows: self.newest,
            first_position: self.first_position,
            attention: Attention::Policy(policy),
            scale: 0.35,
            page_lists: Some(&mut lists),
        };
        self.sequence.attend(backend, step).unwrap();
        lists
    }
}

/// The policies of each page size.
fn policies() -> [(usize, Vec<(Budget, &'static str)>); 3] {
    [
        (4, vec![(Budget::Ratio(0.3), "box"), (Budget::Ratio(0.05), "box")]),
        (16, vec![(Budget::Tokens(100), "box")]),
        (8, vec![(Budget::Ratio(0.5), "mean-std"), (Budget::Ratio(0.2), "box")]),
    ]
}

#[test]
fn kernels_list_what_the_cpu_lists() {
    let Some(ready) = ready() else { return };
    let simd = Cpu::new(CpuOptions { threads: Some(1), path: None }).unwrap();
    let cpus = [Cpu::reference(), simd];
    ready.orders(|seed| {
        let mut cuda = Cuda::new(0).unwrap();
        let mut numbers = Whole(7 + seed);
        let sequence = Sequence { heads: HEADS, tokens: TOKENS, scattered: false };
        let rows = sequence.rows(&mut numbers);
        for (i, format) in KvFormat::ALL.into_iter().enumerate() {
            for (page_size, policies) in policies() {
                let layout = layout(HEADS, page_size, format);
                let on_device = Cache::new(&cuda, layout, sequence, &rows);
                for (budget, scorer) in policies {
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
                    let case = format!("order {seed}, {format}, {page_size}, {budget:?}, {scorer}");
                    let expected = cpus
                        .each_ref()
                        .map(|cpu| Cache::new(cpu, layout, sequence, &rows).attend(cpu, &policy));
                    assert_eq!(expected[0], expected[1], "{case}: the two paths of the CPU");
                    for fused in [None, Some(true), Some(false)] {
                        cuda = cuda.use_fused_kernel(fused);
                        on_device.attend(&cuda, &policy);
                        let lists = cuda.page_lists().unwrap();
                        assert_eq!(lists.len(), HEADS.kv_heads, "{case}, fused {fused:?}");
                        let mut found = PageLists::default();
                        for (kv_head, list) in lists.iter().enumerate() {
                            found.push((0, 0, kv_head), list);
                            assert!(list.len() < layout.pages_for(TOKENS), "{case}: it selects");
                        }
                        assert_eq!(found, expected[0], "{case}, fused {fused:?}");
                    }
                }
            }
        }
    });
}

/// Boxes of whole groups and of single pages, for any number of queries; lists longer than a block
/// holds at once.
#[test]
fn pages_may_lie_anywhere() {
    let Some(ready) = ready() else { return };
    let cpu = Cpu::reference();
    let cases = [(1, 300, 2), (5, 300, 2), (17, 140, 1), (3, 5000, 2)];
    ready.orders(|seed| {
        let cuda = Cuda::new(0).unwrap().use_fused_kernel(Some(false));
        for (group, tokens, page_size) in cases {
            for (i, scattered) in [false, true].into_iter().enumerate() {
                let heads = Heads { q_heads: 2 * group, kv_heads: 2, head_dim: 20 };
                let sequence = Sequence { heads, tokens, scattered };
                let rows = sequence.rows(&mut Whole(seed));
                let format = [KvFormat::F16, KvFormat::F32][(i + group / 2) % 2];
                let layout = layout(heads, page_size, format);
                let policy = SelectionPolicy {
                    budget: Budget::Ratio(0.4),
                    dense_layers: 0,
                    min_context: 0,
                    ..SelectionPolicy::default()
                };
                let expected = Cache::new(&cpu, layout, sequence, &rows).attend(&cpu, &policy);
                Cache::new(&cuda, layout, sequence, &rows).attend(&cuda, &policy);
                let mut found = PageLists::default();
                for (kv_head, list) in cuda.page_lists().unwrap().iter().enumerate() {
                    found.push((0, 0, kv_head), list);
                }
                assert_eq!(found, expected, "order {seed}, {sequence:?}, {format}");
            }
        }
    });
}
