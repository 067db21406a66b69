//! Which pages a step says that it selected.

mod common;

use common::{Cache, LAYER, Numbers, backends};
use tinyserve_kernels::{Attention, Heads, PageLists, Reuse};
use tinyserve_kv::{KvFormat, KvLayout, KvShape, PageSelector, SelectInput, SelectionPolicy};

const HEADS: Heads = Heads { q_heads: 4, kv_heads: 2, head_dim: 32 };

/// The first page, one that depends on who asks, and the last.
struct Fixed;

fn list(tokens: usize, kv_head: usize) -> Vec<u32> {
    vec![0, (tokens % 3 + kv_head + 1) as u32, (tokens.div_ceil(16) - 1) as u32]
}

impl PageSelector for Fixed {
    fn select(&self, input: &SelectInput<'_>, selected: &mut Vec<u32>) -> bool {
        selected.extend(list(input.tokens(), input.kv_head()));
        true
    }
}

#[test]
fn the_lists_of_last_rows_are_told_and_nothing_else_is() {
    let shape =
        KvShape { layers: 2, kv_heads: 2, head_dim: 32, page_size: 16, format: KvFormat::F32 };
    let layout = KvLayout::new(shape).unwrap();
    let lengths = [100, 120, 90];
    let mut numbers = Numbers(1);
    for cpu in backends(2) {
        let mut cache = Cache::new(HEADS, layout, &lengths);
        for (index, &tokens) in lengths.iter().enumerate() {
            let qkv = numbers.numbers(tokens * HEADS.qkv_width());
            cache.append(&cpu, index, 0, &qkv);
        }
        let rows = numbers.numbers(8 * HEADS.qkv_width());
        // Three rows of the first sequence select, each for itself; four of the second read all.
        let steps = [
            (0, 97, 3, Attention::Custom(&Fixed)),
            (1, 116, 4, Attention::Dense),
            (2, 89, 1, Attention::Custom(&Fixed)),
        ];
        let mut lists = PageLists::default();
        let told = cache.attend_listing(&cpu, &rows, &steps, (false, Some(&mut lists))).unwrap();
        let mut expected = PageLists::default();
        for (sequence, tokens) in [(0, 100), (2, 90)] {
            for kv_head in 0..2 {
                expected.push((LAYER, sequence, kv_head), &list(tokens, kv_head));
            }
        }
        assert_eq!(lists, expected);
        assert_eq!(lists.reuse(2, &expected, 2), Reuse { compared: 6, reused: 6 });
        assert_eq!(
            told,
            cache.attend(&cpu, &rows, &steps, false).unwrap(),
            "telling changes nothing"
        );
        // A budget that covers every page leaves nothing to select.
        let policy = SelectionPolicy { min_context: 0, dense_layers: 2, ..Default::default() };
        let steps = [(1, 112, 8, Attention::Policy(&policy))];
        lists.clear();
        cache.attend_listing(&cpu, &rows, &steps, (false, Some(&mut lists))).unwrap();
        assert!(lists.is_empty());
    }
}
