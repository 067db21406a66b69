//! What one call of attention leaves behind for the next one, and for another at the same time:
//! nothing.

mod common;

use std::panic::{AssertUnwindSafe, catch_unwind};

use common::{Cache, Numbers, backends, bits};
use tinyserve_kernels::{Attention, Heads, KernelError};
use tinyserve_kv::{KvFormat, KvLayout, KvShape, PageSelector, SelectInput};

const HEADS: Heads = Heads { q_heads: 4, kv_heads: 4, head_dim: 16 };
/// Enough for the work to be split over threads.
const TOKENS: usize = 700;

/// Reads the newest page; what happens in the last KV head is the test's.
struct Newest<F>(F);

impl<F: Fn() + Send + Sync> PageSelector for Newest<F> {
    fn select(&self, input: &SelectInput<'_>, selected: &mut Vec<u32>) -> bool {
        if input.kv_head() == HEADS.kv_heads - 1 {
            (self.0)();
        }
        selected.push(input.page_count() as u32 - 1);
        true
    }
}

/// Lists no page in the last KV head.
struct Empty;

impl PageSelector for Empty {
    fn select(&self, input: &SelectInput<'_>, selected: &mut Vec<u32>) -> bool {
        selected.extend((input.kv_head() != HEADS.kv_heads - 1).then_some(0));
        true
    }
}

fn layout() -> KvLayout {
    let Heads { kv_heads, head_dim, .. } = HEADS;
    let format = KvFormat::F16;
    KvLayout::new(KvShape { layers: 2, kv_heads, head_dim, page_size: 16, format }).unwrap()
}

#[test]
fn a_call_that_fails_or_panics_leaves_nothing_to_the_next() {
    let (width, mut numbers) = (HEADS.qkv_width(), Numbers(3));
    let qkv = numbers.numbers(TOKENS * width);
    let query = &qkv[..width];
    for threads in [1, 3] {
        for cpu in backends(threads) {
            let mut cache = Cache::new(HEADS, layout(), &[TOKENS]);
            cache.append(&cpu, 0, 0, &qkv);
            let attend =
                |attention| cache.attend(&cpu, query, &[(0, TOKENS - 1, 1, attention)], true);
            let (expected, expected_stats) = attend(Attention::Dense).unwrap();
            let bad = Newest(|| panic!("a selector of somebody's own"));
            let panicked = catch_unwind(AssertUnwindSafe(|| attend(Attention::Custom(&bad))));
            assert!(panicked.is_err());
            let (out, stats) = attend(Attention::Dense).unwrap();
            assert_eq!(stats, expected_stats, "{} on {threads}, after a panic", cpu.path());
            assert_eq!(bits(&out), bits(&expected));
            let error = attend(Attention::Custom(&Empty)).unwrap_err();
            assert!(matches!(error, KernelError::Selector(_)), "{error}");
            let (out, stats) = attend(Attention::Dense).unwrap();
            assert_eq!(stats, expected_stats, "{} on {threads}, after an error", cpu.path());
            assert_eq!(bits(&out), bits(&expected));
        }
    }
}

#[test]
fn callers_of_one_backend_count_their_own() {
    let (width, mut numbers) = (HEADS.qkv_width(), Numbers(4));
    let qkv = numbers.numbers(TOKENS * width);
    // With little work, without threads; with much, with them.
    for (tokens, threads) in [(40, 1), (40, 2), (TOKENS, 1), (TOKENS, 2)] {
        for cpu in backends(threads) {
            let mut cache = Cache::new(HEADS, layout(), &[tokens]);
            cache.append(&cpu, 0, 0, &qkv[..tokens * width]);
            let attend = |attention| {
                let steps = [(0, tokens - 1, 1, attention)];
                cache.attend(&cpu, &qkv[..width], &steps, true)
            };
            let newest = Newest(std::thread::yield_now);
            let kinds =
                || [Attention::Dense, Attention::Custom(&newest), Attention::Custom(&Empty)];
            let alone = kinds().map(&attend);
            std::thread::scope(|scope| {
                for (kind, alone) in kinds().into_iter().zip(&alone) {
                    let (attend, path) = (&attend, cpu.path());
                    scope.spawn(move || {
                        for _ in 0..200 {
                            let found = attend(kind);
                            assert_eq!(&found, alone, "{path}, {tokens} tokens, {threads} threads");
                        }
                    });
                }
            });
        }
    }
}
