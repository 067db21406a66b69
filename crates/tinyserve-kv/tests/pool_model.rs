//! The page pool and its tables against a naive model, under any sequence of operations.

use std::panic::{AssertUnwindSafe, catch_unwind};

use proptest::prelude::*;
use tinyserve_kv::{GROUP_PAGES, KvError, PageId, PagePool, PageTable};

#[derive(Debug, Clone)]
enum Operation {
    New,
    Extend { table: usize, tokens: usize },
    Fork { table: usize },
    Truncate { table: usize, tokens: usize },
    Release { table: usize },
}

fn operations() -> impl Strategy<Value = Vec<Operation>> {
    let operation = prop_oneof![
        2 => Just(Operation::New),
        8 => (any::<usize>(), 0usize..20)
            .prop_map(|(table, tokens)| Operation::Extend { table, tokens }),
        3 => any::<usize>().prop_map(|table| Operation::Fork { table }),
        3 => (any::<usize>(), 0usize..60)
            .prop_map(|(table, tokens)| Operation::Truncate { table, tokens }),
        2 => any::<usize>().prop_map(|table| Operation::Release { table }),
    ];
    prop::collection::vec(operation, 1..60)
}

/// A pool with tables, and beside them what each table should read back.
struct World {
    pool: PagePool,
    ids: Vec<PageId>,
    // What each page stores: one number per token.
    memory: Vec<Vec<u32>>,
    tables: Vec<(PageTable, Vec<u32>)>,
    page_size: usize,
    next_token: u32,
}

impl World {
    fn new(capacity: usize, page_size: usize) -> Self {
        let mut pool = PagePool::new(capacity).unwrap();
        let ids: Vec<PageId> = (0..capacity).map(|_| pool.allocate().unwrap()).collect();
        for &id in ids.iter().rev() {
            assert!(pool.release(id));
        }
        let memory = vec![vec![0; page_size]; capacity];
        Self { pool, ids, memory, tables: Vec::new(), page_size, next_token: 1 }
    }

    fn apply(&mut self, operation: &Operation) {
        let n_tables = self.tables.len();
        match *operation {
            Operation::New => self.tables.push((PageTable::new(self.page_size), Vec::new())),
            _ if n_tables == 0 => {}
            Operation::Extend { table, tokens } => self.extend(table % n_tables, tokens),
            Operation::Fork { table } => {
                let (source, expected) = &self.tables[table % n_tables];
                let fork = (source.fork(&mut self.pool), expected.clone());
                assert_eq!(fork.0.pages(), self.tables[table % n_tables].0.pages());
                self.tables.push(fork);
            }
            Operation::Truncate { table, tokens } => {
                let (table, expected) = &mut self.tables[table % n_tables];
                table.truncate(&mut self.pool, tokens);
                expected.truncate(tokens);
            }
            Operation::Release { table } => {
                self.tables.swap_remove(table % n_tables).0.release(&mut self.pool);
            }
        }
    }

    fn extend(&mut self, index: usize, tokens: usize) {
        let (table, expected) = &mut self.tables[index];
        let opens_shared = tokens > 0
            && expected.len() % self.page_size > 0
            && self.pool.holders(*table.pages().last().unwrap()) > 1;
        let pages_of = |tokens: usize| tokens.div_ceil(self.page_size);
        let needed = pages_of(expected.len() + tokens) - pages_of(expected.len())
            + usize::from(opens_shared);
        // The debug form shows everything, the order of the free pages included.
        let before = format!("{:?} {table:?}", self.pool);
        let free = self.pool.free_pages();
        let shared = table.pages().last().copied();
        match table.extend(&mut self.pool, tokens) {
            Err(error) => {
                let capacity = self.pool.capacity();
                assert_eq!(error, KvError::OutOfPages { needed, free, capacity });
                assert!(needed > free);
                assert_eq!(before, format!("{:?} {table:?}", self.pool), "a failed extend");
            }
            Ok(copy) => {
                assert_eq!(self.pool.free_pages(), free - needed);
                assert_eq!(copy.is_some(), opens_shared);
                if let Some(copy) = copy {
                    assert_eq!(Some(copy.from), shared);
                    assert!(self.pool.holders(copy.from) > 0, "the others still read it");
                    self.memory[copy.to.index()] = self.memory[copy.from.index()].clone();
                }
                for position in expected.len()..expected.len() + tokens {
                    let slot = table.slot(position);
                    assert_eq!(self.pool.holders(slot.page), 1, "a write to a shared page");
                    self.memory[slot.page.index()][slot.offset] = self.next_token;
                    expected.push(self.next_token);
                    self.next_token += 1;
                }
            }
        }
    }

    fn check(&self) {
        assert!(self.pool.is_consistent());
        for &id in &self.ids {
            let holders =
                self.tables.iter().filter(|(table, _)| table.pages().contains(&id)).count();
            assert_eq!(self.pool.holders(id) as usize, holders, "holders of page {id:?}");
        }
        let used = self.ids.iter().filter(|&&id| self.pool.holders(id) > 0).count();
        assert_eq!(self.pool.used_pages(), used);
        assert_eq!(self.pool.free_pages() + self.pool.used_pages(), self.ids.len());
        for (table, expected) in &self.tables {
            assert_eq!((table.len(), table.is_empty()), (expected.len(), expected.is_empty()));
            assert_eq!(table.pages().len(), expected.len().div_ceil(self.page_size));
            for (position, &token) in expected.iter().enumerate() {
                let slot = table.slot(position);
                assert_eq!(slot.page, table.pages()[position / self.page_size]);
                assert_eq!(self.memory[slot.page.index()][slot.offset], token);
            }
        }
    }
}

proptest! {
    #[test]
    fn any_sequence_of_operations_matches_the_model(
        capacity in 1usize..24,
        page_size in prop_oneof![Just(1usize), 1usize..9],
        operations in operations(),
    ) {
        let mut world = World::new(capacity, page_size);
        for operation in &operations {
            world.apply(operation);
            world.check();
        }
        for (table, _) in world.tables.drain(..) {
            table.release(&mut world.pool);
        }
        prop_assert_eq!(world.pool.free_pages(), capacity);
        world.check();
    }
}

#[test]
fn a_sequence_that_grows_alone_gets_ascending_pages_again_and_again() {
    let mut pool = PagePool::new(8).unwrap();
    for _ in 0..3 {
        let mut table = PageTable::new(4);
        for _ in 0..31 {
            assert_eq!(table.extend(&mut pool, 1), Ok(None));
        }
        let indices: Vec<usize> = table.pages().iter().map(|page| page.index()).collect();
        assert_eq!(indices, [0, 1, 2, 3, 4, 5, 6, 7]);
        table.truncate(&mut pool, 9);
        assert_eq!(table.extend(&mut pool, 20), Ok(None));
        assert!(table.pages().is_sorted());
        table.release(&mut pool);
    }
}

/// Lengths of the runs of neighbouring pages within one group.
fn runs(table: &PageTable) -> Vec<usize> {
    let follows = |a: &PageId, b: &PageId| {
        b.index() == a.index() + 1 && b.index() / GROUP_PAGES == a.index() / GROUP_PAGES
    };
    table.pages().chunk_by(follows).map(<[PageId]>::len).collect()
}

#[test]
fn sequences_that_grow_together_get_groups_of_their_own() {
    let mut pool = PagePool::new(6 * GROUP_PAGES + 10).unwrap();
    let mut tables: Vec<_> = (0..3).map(|_| PageTable::new(1)).collect();
    for _ in 0..2 * GROUP_PAGES {
        for table in &mut tables {
            assert_eq!(table.extend(&mut pool, 1), Ok(None));
        }
    }
    for table in &tables {
        assert_eq!(runs(table), [GROUP_PAGES; 2]);
        assert!(table.pages()[0].index().is_multiple_of(GROUP_PAGES));
    }
    // What is left is shared, and all of it can be had.
    let mut late: Vec<_> = (0..2).map(|_| PageTable::new(1)).collect();
    for i in 0..10 {
        assert_eq!(late[i % 2].extend(&mut pool, 1), Ok(None));
    }
    assert_eq!(pool.free_pages(), 0);
    assert_eq!(runs(&late[0]), [5]);
    assert_eq!(runs(&late[1]), [5]);
    tables.into_iter().chain(late).for_each(|table| table.release(&mut pool));
    assert_eq!(pool.free_pages(), pool.capacity());
}

#[test]
fn memory_that_was_touched_before_is_used_before_other() {
    let mut pool = PagePool::new(10 * GROUP_PAGES).unwrap();
    for _ in 0..5 {
        let mut tables: Vec<_> = (0..2).map(|_| PageTable::new(1)).collect();
        for table in &mut tables {
            assert_eq!(table.extend(&mut pool, 70), Ok(None));
        }
        let highest = tables.iter().flat_map(PageTable::pages).max().unwrap();
        assert!(highest.index() < 4 * GROUP_PAGES, "{highest:?}");
        tables.into_iter().for_each(|table| table.release(&mut pool));
    }
}

#[test]
fn an_absurd_request_is_refused_and_not_wrapped_around() {
    let mut pool = PagePool::new(4).unwrap();
    for page_size in [1, 3, 16] {
        let mut table = PageTable::new(page_size);
        assert_eq!(table.extend(&mut pool, 2), Ok(None));
        let before = format!("{pool:?} {table:?}");
        for tokens in [usize::MAX, usize::MAX - 1, usize::MAX - 2] {
            assert!(matches!(table.extend(&mut pool, tokens), Err(KvError::OutOfPages { .. })));
        }
        assert_eq!(before, format!("{pool:?} {table:?}"));
        table.release(&mut pool);
    }
}

#[test]
fn documented_panics_are_true() {
    let mut pool = PagePool::new(2).unwrap();
    let page = pool.allocate().unwrap();
    pool.retain(page);
    assert!(!pool.release(page));
    assert!(pool.release(page));
    let mut table = PageTable::new(4);
    table.extend(&mut pool, 3).unwrap();
    let free = {
        let other = pool.allocate().unwrap();
        pool.release(other);
        other
    };
    let mut panics = |what: &str, action: &mut dyn FnMut(&mut PagePool)| {
        let outcome = catch_unwind(AssertUnwindSafe(|| action(&mut pool)));
        assert!(outcome.is_err(), "{what} does not panic");
    };
    panics("sharing a free page", &mut |pool| pool.retain(free));
    panics("releasing a free page", &mut |pool| _ = pool.release(free));
    panics("a slot beyond the tokens", &mut |_| _ = table.slot(3));
    panics("a page size of 0", &mut |_| _ = PageTable::new(0));
    assert!(pool.is_consistent(), "a refused operation changes nothing");
}
