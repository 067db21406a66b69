//! Pruned tables: what is left, where it lies, and what others that share its pages keep.

mod common;

use common::{Numbers, layouts, read, stored};
use proptest::prelude::*;
use tinyserve_kv::{
    EvictionPolicy, HostPages, KvError, KvFormat, KvLayout, KvShape, PagePool, PageTable, Prefix,
    PrefixIndex, PrefixOptions, Slot,
};

/// A sequence beside what it should hold.
struct Sequence {
    table: PageTable,
    /// Position and seed of each token that is left.
    tokens: Vec<(usize, u64)>,
    next: usize,
}

impl Sequence {
    fn append(&mut self, pool: &mut PagePool, pages: &mut HostPages, seeds: &[u64]) {
        if let Some(copy) = self.table.extend(pool, seeds.len()).unwrap() {
            pages.copy(copy);
        }
        let shape = pages.layout().shape();
        for &seed in seeds {
            let slot = self.table.slot(self.tokens.len());
            for layer in 0..shape.layers {
                let (keys, values) = token(seed, layer, shape.kv_heads * shape.head_dim);
                pages.append(layer, slot, &keys, &values);
            }
            self.tokens.push((self.next, seed));
            self.next += 1;
        }
    }

    fn prune(&mut self, pool: &mut PagePool, pages: &mut HostPages, places: &[u32]) {
        let moves = self.table.prune(pool, places).unwrap();
        pages.move_tokens(&moves);
        let mut place = 0;
        self.tokens.retain(|_| {
            place += 1;
            !places.contains(&(place - 1))
        });
    }

    /// Positions, keys, values and boxes.
    fn check(&self, pages: &HostPages, boxes_are_exact: bool) {
        let shape = pages.layout().shape();
        assert_eq!(self.table.len(), self.tokens.len());
        assert_eq!(self.table.pages().len(), pages.layout().pages_for(self.tokens.len()));
        assert_eq!(self.table.next_position(), self.next);
        let moved = self.tokens.iter().enumerate().find(|(i, (position, _))| i != position);
        let intact = moved.map_or(self.tokens.len(), |(i, _)| i);
        assert!(self.table.intact() == intact || self.tokens.is_empty(), "{}", self.table.intact());
        let dim = shape.head_dim;
        for (place, &(position, seed)) in self.tokens.iter().enumerate() {
            assert_eq!(self.table.position(place), position);
            let Slot { page, offset } = self.table.slot(place);
            for layer in 0..shape.layers {
                let (keys, values) = token(seed, layer, shape.kv_heads * dim);
                for head in 0..shape.kv_heads {
                    let found = read(pages, layer, page, head);
                    let at = offset * dim..(offset + 1) * dim;
                    let expected = |x: &[f32]| -> Vec<f32> {
                        let own = &x[head * dim..(head + 1) * dim];
                        own.iter().map(|&x| stored(pages.layout(), x)).collect()
                    };
                    assert_eq!(found.keys[at.clone()], expected(&keys));
                    assert_eq!(found.values[at], expected(&values));
                }
            }
        }
        for (i, &page) in self.table.pages().iter().enumerate() {
            let tokens = (self.tokens.len() - i * shape.page_size).min(shape.page_size);
            for (layer, head) in
                (0..shape.layers).flat_map(|l| (0..shape.kv_heads).map(move |h| (l, h)))
            {
                let found = read(pages, layer, page, head);
                for d in 0..dim {
                    let keys = || (0..tokens).map(|t| found.keys[t * dim + d]);
                    let low = keys().fold(f32::INFINITY, f32::min);
                    let high = keys().fold(f32::NEG_INFINITY, f32::max);
                    if boxes_are_exact {
                        assert_eq!((found.min[d], found.max[d]), (low, high));
                    } else {
                        assert!(found.min[d] <= low && found.max[d] >= high);
                    }
                }
            }
        }
    }
}

/// Keys and values of a token, `[width]` each.
fn token(seed: u64, layer: usize, width: usize) -> (Vec<f32>, Vec<f32>) {
    let mut numbers = Numbers(seed.wrapping_mul(31).wrapping_add(layer as u64));
    (numbers.numbers(width), numbers.numbers(width))
}

/// Ascending places below `tokens`, each with the given chance, never all of them.
fn places(numbers: &mut Numbers, tokens: usize, share: u64) -> Vec<u32> {
    let mut places: Vec<u32> =
        (0..tokens as u32).filter(|_| numbers.bits() % 100 < share).collect();
    if places.len() == tokens {
        places.pop();
    }
    places
}

proptest! {
    #[test]
    fn what_is_left_is_whole_and_nobody_else_notices(
        layout in layouts(),
        first in 0usize..50,
        steps in prop::collection::vec((0usize..20, 0u64..100, any::<bool>()), 1..5),
        seed in any::<u64>(),
    ) {
        let mut numbers = Numbers(seed);
        let mut pool = PagePool::new(600).unwrap();
        let mut pages = HostPages::new(layout, 600).unwrap();
        let mut own = Sequence {
            table: PageTable::new(layout.page_size()), tokens: Vec::new(), next: 0,
        };
        let mut seeds = |n| (0..n).map(|_| numbers.bits()).collect::<Vec<u64>>();
        own.append(&mut pool, &mut pages, &seeds(first));
        let mut forks = Vec::new();
        for (appended, share, forks_off) in steps {
            if forks_off {
                let table = own.table.fork(&mut pool);
                forks.push(Sequence { table, tokens: own.tokens.clone(), next: own.next });
            }
            let gone = places(&mut Numbers(seed ^ share), own.tokens.len(), share);
            own.prune(&mut pool, &mut pages, &gone);
            own.check(&pages, false);
            own.append(&mut pool, &mut pages, &seeds(appended));
            own.check(&pages, false);
            prop_assert!(pool.is_consistent());
        }
        for fork in &mut forks {
            // Another sequence may go on from the same pages, and be pruned for itself.
            fork.check(&pages, false);
            fork.append(&mut pool, &mut pages, &seeds(3));
            fork.prune(&mut pool, &mut pages, &[1]);
        }
        for sequence in forks.iter().chain([&own]) {
            sequence.check(&pages, false);
        }
        for sequence in forks.into_iter().chain([own]) {
            sequence.table.release(&mut pool);
        }
        prop_assert_eq!(pool.used_pages(), 0);
    }

    #[test]
    fn boxes_are_those_of_the_keys_that_are_left(
        layout in layouts(),
        tokens in 1usize..80,
        share in 1u64..100,
        seed in any::<u64>(),
    ) {
        let mut numbers = Numbers(seed);
        let (mut pool, mut pages) =
            (PagePool::new(80).unwrap(), HostPages::new(layout, 80).unwrap());
        let mut own = Sequence {
            table: PageTable::new(layout.page_size()), tokens: Vec::new(), next: 0,
        };
        let seeds: Vec<u64> = (0..tokens).map(|_| numbers.bits()).collect();
        own.append(&mut pool, &mut pages, &seeds);
        own.prune(&mut pool, &mut pages, &places(&mut numbers, tokens - 1, share));
        own.check(&pages, true);
        own.append(&mut pool, &mut pages, &seeds[..1]);
        own.check(&pages, true);
    }
}

#[test]
fn cutting_a_pruned_sequence_takes_positions_with_it() {
    let mut pool = PagePool::new(4).unwrap();
    let mut table = PageTable::new(4);
    assert_eq!(table.extend(&mut pool, 8).unwrap(), None);
    let moves = table.prune(&mut pool, &[2, 3, 5]).unwrap();
    assert_eq!((moves.len(), table.len(), table.next_position()), (3, 5, 8));
    assert_eq!(table.extend(&mut pool, 1).unwrap(), None);
    let positions = |table: &PageTable| -> Vec<usize> {
        (0..table.len()).map(|place| table.position(place)).collect()
    };
    assert_eq!((positions(&table), table.intact()), (vec![0, 1, 4, 6, 7, 8], 2));
    table.truncate(&mut pool, 4);
    assert_eq!((positions(&table), table.next_position()), (vec![0, 1, 4, 6], 7));
    table.truncate(&mut pool, 2);
    assert_eq!((table.next_position(), table.intact()), (2, 2));
    table.truncate(&mut pool, 0);
    assert_eq!((table.next_position(), table.intact(), pool.used_pages()), (0, 0, 0));
}

#[test]
fn without_a_page_for_what_is_shared_nothing_changes() {
    let mut pool = PagePool::new(3).unwrap();
    let mut table = PageTable::new(2);
    assert_eq!(table.extend(&mut pool, 6).unwrap(), None);
    let fork = table.fork(&mut pool);
    let before = table.pages().to_vec();
    let refused = table.prune(&mut pool, &[1]).unwrap_err();
    assert_eq!(refused, KvError::OutOfPages { needed: 3, free: 0, capacity: 3 });
    assert_eq!((table.pages(), table.len(), table.next_position()), (&before[..], 6, 6));
    // Cutting the end off needs no page.
    assert_eq!(table.prune(&mut pool, &[4, 5]).unwrap(), []);
    assert_eq!((table.len(), table.next_position()), (4, 6), "what is gone keeps its positions");
    assert!(pool.is_consistent());
    fork.release(&mut pool);
    table.release(&mut pool);
    assert_eq!(pool.free_pages(), 3);
}

#[test]
fn a_prefix_index_learns_no_page_behind_a_pruned_token() {
    let shape =
        KvShape { layers: 1, kv_heads: 1, head_dim: 2, page_size: 2, format: KvFormat::F32 };
    let layout = KvLayout::new(shape).unwrap();
    let (identity, policy, max_pages) = ("model", EvictionPolicy::Lru, 8);
    let mut index = PrefixIndex::new(PrefixOptions { identity, layout, policy, max_pages });
    let mut pool = PagePool::new(8).unwrap();
    let mut table = PageTable::new(2);
    assert_eq!(table.extend(&mut pool, 10).unwrap(), None);
    let _ = table.prune(&mut pool, &[5]).unwrap();
    let tokens: Vec<u32> = (0..10).collect();
    let prefix = Prefix { salt: "", tokens: &tokens };
    assert_eq!(index.insert(&mut pool, prefix, &mut table), 2);
    assert_eq!(index.peek(prefix), 4);
}
