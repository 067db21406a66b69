//! Attention over pages: what any page list gives, and what batches and chunks must not change.

mod common;

use common::{Cache, Numbers, backends, bits, shapes};
use proptest::prelude::*;
use tinyserve_kernels::{AttendStats, Attention};
use tinyserve_kv::{Budget, PageSelector, SelectInput, SelectionPolicy};

/// A list that depends on nothing but a seed, the row and the head.
struct AnyList(u64);

impl AnyList {
    fn list(&self, tokens: usize, kv_head: usize, pages: usize) -> Vec<u32> {
        let mut numbers = Numbers(self.0 ^ ((tokens as u64) << 32) ^ kv_head as u64);
        // Few pages, half of them, or most.
        let share = numbers.number();
        let mut list: Vec<u32> = (0..pages as u32).filter(|_| numbers.number() < share).collect();
        if list.is_empty() {
            list.push((numbers.bits() % pages as u64) as u32);
        }
        list
    }
}

impl PageSelector for AnyList {
    fn select(&self, input: &SelectInput<'_>, selected: &mut Vec<u32>) -> bool {
        selected.extend(self.list(input.tokens(), input.kv_head(), input.page_count()));
        true
    }
}

/// Names every page, or says that every page is read.
struct Everything {
    by_list: bool,
}

impl PageSelector for Everything {
    fn select(&self, input: &SelectInput<'_>, selected: &mut Vec<u32>) -> bool {
        if self.by_list {
            selected.extend(0..input.page_count() as u32);
        }
        self.by_list
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(256))]

    #[test]
    fn a_list_gives_dense_attention_masked_to_its_tokens(
        (heads, layout) in shapes(),
        tokens in prop_oneof![Just(1usize), 2usize..70],
        rows in 1usize..4,
        seed in any::<u64>(),
    ) {
        let rows = rows.min(tokens);
        let (mut numbers, width) = (Numbers(seed), heads.qkv_width());
        let qkv = numbers.numbers(tokens * width);
        let selector = AnyList(seed);
        for cpu in backends(1) {
            let mut cache = Cache::new(heads, layout, &[tokens]);
            cache.append(&cpu, 0, 0, &qkv);
            let first = tokens - rows;
            let steps = [(0, first, rows, Attention::Custom(&selector))];
            let (out, stats) = cache.attend(&cpu, &qkv[first * width..], &steps, false).unwrap();
            let mut expected_stats = AttendStats::default();
            let (size, dim) = (layout.page_size(), heads.head_dim);
            let codes = layout.shape().format.is_quantised();
            let element = layout.shape().format.element_bytes();
            let own_bytes = 2 * dim * layout.open_format().element_bytes();
            let sealed_bytes = 2 * layout.token_head_bytes();
            let bytes = |own: bool, read: usize| read * if own { own_bytes } else { sealed_bytes };
            for row in 0..rows {
                let seen = first + row + 1;
                let pages = layout.pages_for(seen);
                for head in 0..heads.q_heads {
                    let kv_head = head / heads.group();
                    let list = selector.list(seen, kv_head, pages);
                    let reads = |token: usize| list.contains(&((token / size) as u32));
                    let at = (first + row) * width + head * heads.head_dim;
                    let query = &qkv[at..at + heads.head_dim];
                    let expected = cache.masked((0, seen, kv_head), query, reads);
                    let at = (row * heads.q_heads + head) * heads.head_dim;
                    for (&found, expected) in out[at..].iter().zip(expected) {
                        let error = (f64::from(found) - expected).abs();
                        prop_assert!(error <= 1e-5, "{}: {found}, not {expected}", cpu.path());
                    }
                    if head % heads.group() == 0 {
                        let of_page = |token: &usize| token / size == pages - 1;
                        let read: usize = (0..seen)
                            .filter(|&token| reads(token))
                            .map(|token| bytes(of_page(&token), 1))
                            .sum();
                        let own = (0..seen).filter(of_page).count();
                        let dense = bytes(true, own) + bytes(false, seen - own);
                        // A selector looks at all boxes; codes mean nothing without theirs.
                        let boxes = 2 * dim * element;
                        let dense_boxes = if codes { (pages - 1) * boxes } else { 0 };
                        let own_read = list.last() == Some(&(pages as u32 - 1));
                        let sealed = if codes { list.len() - usize::from(own_read) } else { 0 };
                        expected_stats.pages_read += list.len() as u64;
                        expected_stats.pages_total += pages as u64;
                        expected_stats.bytes_read += (read + (pages + sealed) * boxes) as u64;
                        expected_stats.bytes_dense += (dense + dense_boxes) as u64;
                    }
                }
            }
            prop_assert_eq!(stats, expected_stats);
        }
    }

    #[test]
    fn scores_far_from_zero_weigh_like_scores_near_it(
        (heads, layout) in shapes(),
        tokens in 1usize..70,
        level in prop::sample::select(vec![-900f32, -200.0, 200.0, 900.0]),
        seed in any::<u64>(),
    ) {
        let (mut numbers, width) = (Numbers(seed), heads.qkv_width());
        let mut qkv = numbers.numbers(tokens * width);
        let scale = (heads.head_dim as f32).sqrt().recip();
        // One channel lifts every score by the level, in numbers that every format holds.
        let query = 16.0;
        let key = (level / scale / query).round();
        for row in qkv.chunks_exact_mut(width) {
            for head in row[heads.q_columns()].chunks_exact_mut(heads.head_dim) {
                head[0] = query;
            }
            for head in row[heads.k_columns()].chunks_exact_mut(heads.head_dim) {
                head[0] = key;
            }
        }
        for cpu in backends(1) {
            let mut cache = Cache::new(heads, layout, &[tokens]);
            cache.append(&cpu, 0, 0, &qkv);
            let last = &qkv[(tokens - 1) * width..];
            let steps = [(0, tokens - 1, 1, Attention::Dense)];
            let (out, _) = cache.attend(&cpu, last, &steps, false).unwrap();
            let queries = last[..heads.q_heads * heads.head_dim].chunks_exact(heads.head_dim);
            let found = out.chunks_exact(heads.head_dim);
            for (head, (query, found)) in queries.zip(found).enumerate() {
                let expected = cache.masked((0, tokens, head / heads.group()), query, |_| true);
                for (&found, expected) in found.iter().zip(expected) {
                    // A sum of 900/scale is off by up to 8 of its half-units of 6e-8: 4e-4 of a score.
                    let error = (f64::from(found) - expected).abs();
                    prop_assert!(error <= 1e-3, "{}: {found}, not {expected}", cpu.path());
                }
            }
        }
    }

    #[test]
    fn a_full_budget_is_dense_to_the_last_bit(
        (heads, layout) in shapes(),
        tokens in 1usize..60,
        rows in 1usize..24,
        seed in any::<u64>(),
    ) {
        let rows = rows.min(tokens);
        let (mut numbers, width) = (Numbers(seed), heads.qkv_width());
        let qkv = numbers.numbers(tokens * width);
        let policy = SelectionPolicy {
            budget: Budget::Ratio(1.0), dense_layers: 0, min_context: 0, ..Default::default()
        };
        let few = Budget::Ratio(0.01);
        let policies = [
            policy,
            SelectionPolicy { budget: Budget::Tokens(tokens + layout.page_size()), ..policy },
            SelectionPolicy { budget: few, dense_layers: common::LAYER + 1, ..policy },
            SelectionPolicy { budget: few, min_context: tokens + 1, ..policy },
            SelectionPolicy { budget: few, recent_pages: tokens, ..policy },
        ];
        for cpu in backends(1) {
            let mut cache = Cache::new(heads, layout, &[tokens]);
            cache.append(&cpu, 0, 0, &qkv);
            let first = tokens - rows;
            let attend = |attention: Attention<'_>| {
                cache.attend(&cpu, &qkv[first * width..], &[(0, first, rows, attention)], true)
                    .unwrap()
            };
            let (dense, dense_stats) = attend(Attention::Dense);
            prop_assert!(dense.iter().all(|x| x.is_finite()));
            for policy in &policies {
                let (out, stats) = attend(Attention::Policy(policy));
                prop_assert_eq!(bits(&out), bits(&dense), "{} {:?}", cpu.path(), policy);
                prop_assert_eq!(stats, dense_stats);
            }
            for by_list in [true, false] {
                let selector = Everything { by_list };
                let (out, stats) = attend(Attention::Custom(&selector));
                prop_assert_eq!(bits(&out), bits(&dense), "{}", cpu.path());
                prop_assert_eq!(stats.pages_read, dense_stats.pages_read);
                // The selector looked at every box; nothing was missed.
                prop_assert!(stats.bytes_read > stats.bytes_dense);
                prop_assert_eq!(stats.recall_count, 0);
            }
        }
    }

    #[test]
    fn a_batch_gives_each_sequence_what_it_gets_alone(
        (heads, layout) in shapes(),
        sequences in prop::collection::vec((0usize..50, 1usize..20, 0usize..3), 1..5),
        seed in any::<u64>(),
    ) {
        let (mut numbers, width) = (Numbers(seed), heads.qkv_width());
        let policy = SelectionPolicy {
            budget: Budget::Ratio(0.4),
            dense_layers: 0,
            min_context: 12,
            ..Default::default()
        };
        let selector = AnyList(seed);
        let lengths: Vec<usize> = sequences.iter().map(|(first, rows, _)| first + rows).collect();
        let tokens: Vec<Vec<f32>> =
            lengths.iter().map(|&length| numbers.numbers(length * width)).collect();
        let steps: Vec<_> = sequences
            .iter()
            .enumerate()
            .map(|(index, &(first, rows, kind))| {
                let attention = match kind {
                    0 => Attention::Dense,
                    1 => Attention::Policy(&policy),
                    _ => Attention::Custom(&selector),
                };
                (index, first, rows, attention)
            })
            .collect();
        let new = |&(index, first, ..): &(usize, usize, usize, Attention<'_>)| {
            &tokens[index][first * width..]
        };
        let together: Vec<f32> = steps.iter().flat_map(new).copied().collect();
        for cpu in backends(2) {
            let mut cache = Cache::new(heads, layout, &lengths);
            for (&(index, first, ..), qkv) in steps.iter().zip(&tokens) {
                cache.append(&cpu, index, 0, &qkv[..first * width]);
            }
            let places: Vec<_> = steps.iter().map(|&(index, first, ..)| (index, first)).collect();
            let rows: Vec<_> = steps.iter().map(new).collect();
            cache.append_batch(&cpu, &places, &rows);
            let (batch, stats) = cache.attend(&cpu, &together, &steps, true).unwrap();
            let (mut alone, mut sum) = (Vec::new(), AttendStats::default());
            for step in &steps {
                let (out, stats) =
                    cache.attend(&cpu, new(step), std::slice::from_ref(step), true).unwrap();
                alone.extend(out);
                sum.add(&stats);
            }
            prop_assert_eq!(bits(&batch), bits(&alone), "{}", cpu.path());
            // Sums of recalls are added up in another order.
            prop_assert!((stats.recall_sum - sum.recall_sum).abs() < 1e-9);
            let rest = |stats| AttendStats { recall_sum: 0.0, ..stats };
            prop_assert_eq!(rest(stats), rest(sum));
        }
    }

    #[test]
    fn chunks_give_what_one_prefill_gives(
        (heads, layout) in shapes(),
        chunks in prop::collection::vec(1usize..25, 1..5),
        min_context in 1usize..60,
        kind in 0usize..3,
        seed in any::<u64>(),
    ) {
        let (mut numbers, width) = (Numbers(seed), heads.qkv_width());
        let tokens = chunks.iter().sum();
        let qkv = numbers.numbers(tokens * width);
        // Rows that select: the box of a row's own page differs, as later keys of the prompt are
        // in it or not, but that page is always read.
        let policy = SelectionPolicy {
            budget: Budget::Ratio(0.4), dense_layers: 0, min_context, ..Default::default()
        };
        let selector = AnyList(seed);
        let attention = match kind {
            0 => Attention::Dense,
            1 => Attention::Policy(&policy),
            _ => Attention::Custom(&selector),
        };
        for (whole, cpu) in backends(1).into_iter().zip(backends(3)) {
            let mut cache = Cache::new(heads, layout, &[tokens]);
            cache.append(&whole, 0, 0, &qkv);
            let (expected, _) =
                cache.attend(&whole, &qkv, &[(0, 0, tokens, attention)], false).unwrap();
            let mut cache = Cache::new(heads, layout, &[tokens]);
            let (mut first, mut found) = (0, Vec::new());
            for &rows in &chunks {
                let qkv = &qkv[first * width..(first + rows) * width];
                cache.append(&cpu, 0, first, qkv);
                let steps = [(0, first, rows, attention)];
                found.extend(cache.attend(&cpu, qkv, &steps, false).unwrap().0);
                first += rows;
            }
            prop_assert_eq!(bits(&found), bits(&expected), "{}", cpu.path());
        }
    }
}
