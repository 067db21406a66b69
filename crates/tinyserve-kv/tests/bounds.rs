//! Invariant 1: a page's box bounds its keys, and its score bounds `q·k` of each of its tokens.

mod common;

use std::collections::BTreeSet;

use common::{Numbers, layouts_of, read, read_codes, stored};
use proptest::prelude::*;
use tinyserve_kv::{
    HostPages, KvFormat, KvLayout, KvShape, PagePool, PageTable, SelectionPolicy, score_box,
    select_pages,
};

const CAPACITY: usize = 12;

#[derive(Debug, Clone)]
enum Operation {
    Append(usize),
    Truncate(usize),
    /// Continues on a second table over the same pages; the first one is kept or released.
    Fork {
        keep: bool,
    },
    /// Starts again: pages are recycled with their old content.
    Restart,
}

fn operations() -> impl Strategy<Value = Vec<Operation>> {
    let operation = prop_oneof![
        5 => (1usize..70).prop_map(Operation::Append),
        2 => (0usize..130).prop_map(Operation::Truncate),
        2 => any::<bool>().prop_map(|keep| Operation::Fork { keep }),
        1 => Just(Operation::Restart),
    ];
    prop::collection::vec(operation, 1..10)
}

/// A table with the keys it should hold, `[tokens][layers][kv_heads × head_dim]` as stored.
struct Sequence {
    table: PageTable,
    keys: Vec<Vec<Vec<f32>>>,
    // Pages that were cut: their box may be larger than what is left.
    loose: BTreeSet<usize>,
}

struct World {
    layout: KvLayout,
    pages: HostPages,
    pool: PagePool,
    sequences: Vec<Sequence>,
    numbers: Numbers,
}

impl World {
    fn new(layout: KvLayout, seed: u64) -> Self {
        let pages = HostPages::new(layout, CAPACITY).unwrap();
        let mut world = Self {
            layout,
            pages,
            pool: PagePool::new(CAPACITY).unwrap(),
            sequences: Vec::new(),
            numbers: Numbers(seed),
        };
        world.start();
        world
    }

    fn start(&mut self) {
        let table = PageTable::new(self.layout.page_size());
        self.sequences.push(Sequence { table, keys: Vec::new(), loose: BTreeSet::new() });
    }

    fn apply(&mut self, operation: &Operation) {
        let mut sequence = self.sequences.pop().unwrap();
        match *operation {
            Operation::Append(tokens) => self.append(&mut sequence, tokens),
            Operation::Truncate(tokens) => {
                if tokens < sequence.keys.len() {
                    let tokens = self.layout.cut(sequence.keys.len(), tokens);
                    let page_size = self.layout.page_size();
                    sequence.table.truncate(&mut self.pool, tokens);
                    sequence.keys.truncate(tokens);
                    sequence.loose.retain(|&page| page < tokens.div_ceil(page_size));
                    if !tokens.is_multiple_of(page_size) {
                        sequence.loose.insert(tokens / page_size);
                    }
                }
            }
            Operation::Fork { keep } => {
                let fork = Sequence {
                    table: sequence.table.fork(&mut self.pool),
                    keys: sequence.keys.clone(),
                    loose: sequence.loose.clone(),
                };
                let first = std::mem::replace(&mut sequence, fork);
                if keep {
                    self.sequences.push(first);
                } else {
                    first.table.release(&mut self.pool);
                }
            }
            Operation::Restart => {
                sequence.table.release(&mut self.pool);
                self.start();
                return;
            }
        }
        self.sequences.push(sequence);
    }

    fn append(&mut self, sequence: &mut Sequence, tokens: usize) {
        let shape = self.layout.shape();
        let Ok(copy) = sequence.table.extend(&mut self.pool, tokens) else {
            return;
        };
        if let Some(copy) = copy {
            self.pages.copy(copy);
        }
        for position in sequence.table.len() - tokens..sequence.table.len() {
            let slot = sequence.table.slot(position);
            let mut kept = Vec::new();
            for layer in 0..shape.layers {
                let keys = self.numbers.numbers(shape.kv_heads * shape.head_dim);
                let values = self.numbers.numbers(keys.len());
                self.pages.append(layer, slot, &keys, &values);
                kept.push(keys.iter().map(|&x| stored(&self.layout, x)).collect());
            }
            sequence.keys.push(kept);
        }
    }

    fn check(&mut self) {
        let shape = self.layout.shape();
        for sequence in &self.sequences {
            for (index, tokens) in sequence.keys.chunks(shape.page_size).enumerate() {
                let page = sequence.table.pages()[index];
                let tight = !sequence.loose.contains(&index);
                for (layer, kv_head) in
                    (0..shape.layers).flat_map(|l| (0..shape.kv_heads).map(move |h| (l, h)))
                {
                    let sealed = tokens.len() == shape.page_size;
                    let codes = shape.format.code_bits().filter(|_| sealed);
                    let head = match codes {
                        Some(_) => read_codes(&self.pages, layer, page, kv_head),
                        None => read(&self.pages, layer, page, kv_head),
                    };
                    let channels = kv_head * shape.head_dim..(kv_head + 1) * shape.head_dim;
                    let keys: Vec<&[f32]> =
                        tokens.iter().map(|token| &token[layer][channels.clone()]).collect();
                    let tight = (tight || codes.is_some()).then_some(&self.layout);
                    check_box(&keys, &head.min, &head.max, tight);
                    if let Some(bits) = codes {
                        check_codes(&keys, &head.keys, (&head.min, &head.max), bits);
                    } else {
                        assert_eq!(keys.concat(), head.keys[..keys.len() * shape.head_dim]);
                    }
                    let read: Vec<&[f32]> =
                        head.keys.chunks(shape.head_dim).take(keys.len()).collect();
                    for _ in 0..2 {
                        let query = self.numbers.numbers(shape.head_dim);
                        check_score(&query, &read, &head.min, &head.max);
                    }
                }
            }
        }
    }
}

/// A box bounds its keys, and reaches no further than `tight` has to.
fn check_box(keys: &[&[f32]], min: &[f32], max: &[f32], tight: Option<&KvLayout>) {
    for channel in 0..min.len() {
        let column = || keys.iter().map(|key| key[channel]);
        let lowest = column().fold(f32::INFINITY, f32::min);
        let highest = column().fold(f32::NEG_INFINITY, f32::max);
        assert!(min[channel] <= lowest && highest <= max[channel], "channel {channel}");
        let Some(layout) = tight else { continue };
        let rounds = layout.open_format().element_bytes() > layout.shape().format.element_bytes();
        // Neighbours in f16 are at most 1/1024 apart, or the smallest f16.
        let slack = |x: f32| if rounds { x.abs() / 1024.0 + 6e-8 } else { 0.0 };
        assert!(lowest - min[channel] <= slack(lowest), "channel {channel}");
        assert!(max[channel] - highest <= slack(highest), "channel {channel}");
    }
}

/// Keys as read from codes lie in their box, at most half a step from what was stored.
fn check_codes(keys: &[&[f32]], read: &[f32], (min, max): (&[f32], &[f32]), bits: usize) {
    let steps = f64::from((1u32 << bits) - 1);
    for (key, read) in keys.iter().zip(read.chunks(min.len())) {
        for (channel, (&stored, &read)) in key.iter().zip(read).enumerate() {
            let (min, max) = (min[channel], max[channel]);
            assert!(min <= read && read <= max, "{read} in {min}..{max}");
            let half = (f64::from(max) - f64::from(min)) / steps / 2.0;
            let error = (f64::from(stored) - f64::from(read)).abs();
            let rounding = 4.0 * f64::from(f32::EPSILON) * f64::from(max.abs().max(min.abs()));
            assert!(error <= half * (1.0 + 1e-4) + rounding, "{stored} read as {read}: {half}");
        }
    }
}

fn dot(query: &[f32], key: &[f32]) -> f32 {
    query.iter().zip(key).map(|(&q, &k)| q * k).sum()
}

fn check_score(query: &[f32], keys: &[&[f32]], min: &[f32], max: &[f32]) {
    let score = score_box(query, min, max);
    for key in keys {
        let dot = dot(query, key);
        assert!(score >= dot, "score {score} < {dot} for query {query:?} and key {key:?}");
    }
}

proptest! {
    #[test]
    fn boxes_bound_keys_and_scores_bound_products(
        layout in layouts_of(&KvFormat::ALL),
        operations in operations(),
        seed in any::<u64>(),
    ) {
        let mut world = World::new(layout, seed);
        for operation in &operations {
            world.apply(operation);
            world.check();
        }
    }

    /// Magnitudes at which products and sums leave the range of f32: the score may then be NaN,
    /// and a NaN score has to rank above every other.
    #[test]
    fn overflow_never_loses_a_page(
        head_dim in 1usize..20,
        tokens in 1usize..20,
        exponents in prop::collection::vec(-126i32..127, 1..6),
        seed in any::<u64>(),
    ) {
        let mut numbers = Numbers(seed);
        let mut huge = |n: usize| -> Vec<f32> {
            (0..n)
                .map(|_| {
                    let bits = numbers.bits();
                    let exponent = exponents[(bits >> 8) as usize % exponents.len()];
                    let sign = if bits & 1 == 0 { 1.0 } else { -1.0 };
                    sign * 2f32.powi(exponent) * (1.0 + (bits >> 44) as f32 / (1 << 20) as f32)
                })
                .collect()
        };
        let keys: Vec<Vec<f32>> = (0..tokens).map(|_| huge(head_dim)).collect();
        let query = huge(head_dim);
        let corner = |pick: fn(f32, f32) -> f32| -> Vec<f32> {
            (0..head_dim).map(|c| keys.iter().map(|key| key[c]).reduce(pick).unwrap()).collect()
        };
        let score = score_box(&query, &corner(f32::min), &corner(f32::max));
        for key in &keys {
            let dot = dot(&query, key);
            prop_assert!(score >= dot || score.is_nan() || dot.is_nan(), "{} < {}", score, dot);
            prop_assert!(!score.is_nan() || !in_range(&query, &keys), "NaN without overflow");
        }
        let mut selected = Vec::new();
        select_pages(&[f32::MAX, score, f32::MAX, 0.0], 2, 0, 1, &mut selected);
        let expected = if score.is_nan() || score > f32::MAX { [1, 3] } else { [0, 3] };
        prop_assert_eq!(selected, expected);
    }
}

/// Whether no sum of products over any of the keys' channels can leave the range of f32.
fn in_range(query: &[f32], keys: &[Vec<f32>]) -> bool {
    let widest = |c: usize| keys.iter().map(|key| f64::from(key[c]).abs()).fold(0.0, f64::max);
    let sum: f64 = (0..query.len()).map(|c| f64::from(query[c]).abs() * widest(c)).sum();
    sum < f64::from(f32::MAX)
}

#[test]
fn the_largest_score_of_a_group_bounds_every_query() {
    let mut numbers = Numbers(7);
    for _ in 0..256 {
        let keys: Vec<Vec<f32>> = (0..5).map(|_| numbers.numbers(9)).collect();
        let corner = |pick: fn(f32, f32) -> f32| -> Vec<f32> {
            (0..9).map(|c| keys.iter().map(|key| key[c]).reduce(pick).unwrap()).collect()
        };
        let queries = numbers.numbers(4 * 9);
        let (min, max) = (corner(f32::min), corner(f32::max));
        let score = SelectionPolicy::default().score(queries.chunks_exact(9), &min, &max);
        for (query, key) in queries.chunks_exact(9).flat_map(|q| keys.iter().map(move |k| (q, k))) {
            assert!(score >= dot(query, key));
        }
    }
}

#[test]
fn a_nan_key_is_seen_wherever_it_stands_in_its_page() {
    let layouts = KvFormat::ALL.into_iter().flat_map(|format| {
        let shape = KvShape { layers: 1, kv_heads: 1, head_dim: 2, page_size: 4, format };
        let layout = KvLayout::new(shape).unwrap();
        [Some(layout), layout.with_open_format(KvFormat::F32).ok()].into_iter().flatten()
    });
    for layout in layouts {
        let format = layout.shape().format;
        for place in 0..4 {
            let mut pages = HostPages::new(layout, 1).unwrap();
            let mut pool = PagePool::new(1).unwrap();
            let mut table = PageTable::new(4);
            table.extend(&mut pool, 4).unwrap();
            for token in 0..4 {
                let key = [if token == place { f32::NAN } else { token as f32 }, token as f32];
                pages.append(0, table.slot(token), &key, &[0.0; 2]);
            }
            let head = match format.is_quantised() {
                true => read_codes(&pages, 0, table.pages()[0], 0),
                false => read(&pages, 0, table.pages()[0], 0),
            };
            assert!(head.keys[0].is_nan() || !format.is_quantised(), "{format}, token {place}");
            assert!(head.min[0].is_nan() && head.max[0].is_nan(), "{format}, token {place}");
            assert_eq!((head.min[1], head.max[1]), (0.0, 3.0));
            let policy = SelectionPolicy::default();
            assert!(policy.score([&[1.0, 1.0][..]], &head.min, &head.max).is_nan());
            // A finite query beside it does not hide the NaN, whichever comes first.
            let group = [[f32::NAN, 0.0], [1.0, 1.0], [0.0, 2.0]];
            let (min, max) = ([0.0; 2], [1.0; 2]);
            assert!(policy.score(group.iter().map(|q| &q[..]), &min, &max).is_nan());
            assert!(policy.score(group.iter().rev().map(|q| &q[..]), &min, &max).is_nan());
        }
    }
}
