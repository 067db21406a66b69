//! How much attention mass the boxes find, against pages picked at random.

mod common;

use std::sync::Mutex;

use common::{Cache, Numbers};
use tinyserve_kernels::{Attention, Cpu, CpuOptions, Heads};
use tinyserve_kv::{
    Budget, KvFormat, KvLayout, KvShape, PageSelector, SelectInput, SelectionPolicy,
};

const TOKENS: usize = 500;
const TRIALS: u64 = 24;
const HEADS: Heads = Heads { q_heads: 4, kv_heads: 2, head_dim: 32 };

/// As many pages as a budget gives, the newest among them, the others at random.
struct AtRandom {
    budget: Budget,
    numbers: Mutex<Numbers>,
}

impl PageSelector for AtRandom {
    fn select(&self, input: &SelectInput<'_>, selected: &mut Vec<u32>) -> bool {
        let pages = input.page_count();
        let mut numbers = self.numbers.lock().unwrap();
        let mut others: Vec<u32> = (0..pages as u32 - 1).collect();
        for _ in 1..self.budget.pages(pages, input.page_size()) {
            selected.push(others.swap_remove(numbers.bits() as usize % others.len()));
        }
        selected.push(pages as u32 - 1);
        selected.sort_unstable();
        true
    }
}

/// Mean recall of the boxes and of random pages, over trials.
fn recalls(peaked: bool, ratio: f64) -> (f64, f64) {
    let cpu = Cpu::new(CpuOptions { threads: Some(1), path: None }).unwrap();
    let Heads { kv_heads, head_dim, .. } = HEADS;
    let (page_size, format) = (16, KvFormat::F16);
    let layout =
        KvLayout::new(KvShape { layers: 2, kv_heads, head_dim, page_size, format }).unwrap();
    let policy = SelectionPolicy {
        budget: Budget::Ratio(ratio),
        sink_pages: 0,
        recent_pages: 0,
        dense_layers: 0,
        min_context: 0,
        ..Default::default()
    };
    let (mut boxes, mut random) = (0.0, 0.0);
    for trial in 0..TRIALS {
        let mut numbers = Numbers(trial);
        let width = HEADS.qkv_width();
        let mut qkv = numbers.numbers(TOKENS * width);
        let keys = HEADS.k_columns();
        if peaked {
            // The keys of a page crowd around a point of the page's own.
            for page in qkv.chunks_mut(page_size * width) {
                let centre = numbers.numbers(keys.len());
                for row in page.chunks_exact_mut(width) {
                    for (key, centre) in row[keys.clone()].iter_mut().zip(&centre) {
                        *key = 3.0 * centre + 0.3 * *key;
                    }
                }
            }
        }
        let mut cache = Cache::new(HEADS, layout, &[TOKENS]);
        cache.append(&cpu, 0, 0, &qkv);
        let query: Vec<f32> = numbers.numbers(width).iter().map(|x| 3.0 * x).collect();
        let recall = |attention: Attention<'_>| {
            let steps = [(0, TOKENS - 1, 1, attention)];
            let (_, stats) = cache.attend(&cpu, &query, &steps, true).unwrap();
            if ratio < 1.0 {
                assert_eq!(stats.recall_count, HEADS.q_heads as u64);
            } else {
                // Nothing is chosen, so nothing can be missed, and nothing is measured.
                assert_eq!((stats.pages_read, stats.recall()), (stats.pages_total, None));
            }
            stats.recall().unwrap_or(1.0)
        };
        boxes += recall(Attention::Policy(&policy));
        let selector = AtRandom { budget: policy.budget, numbers: Mutex::new(numbers) };
        random += recall(Attention::Custom(&selector));
    }
    (boxes / TRIALS as f64, random / TRIALS as f64)
}

#[test]
fn boxes_find_more_than_random_pages_do() {
    for peaked in [false, true] {
        let mut before = 0.0;
        for ratio in [0.1, 0.3, 0.5, 1.0] {
            let (boxes, random) = recalls(peaked, ratio);
            println!("peaked {peaked}, budget {ratio}: boxes {boxes:.3}, random {random:.3}");
            assert!(boxes >= random, "peaked {peaked} {ratio}: {boxes} under {random}");
            assert!(boxes >= before, "a larger budget keeps what a smaller one found");
            before = boxes;
            if peaked {
                assert!(boxes > 0.5, "{ratio}: {boxes}");
            }
        }
        assert_eq!(before, 1.0);
    }
}
