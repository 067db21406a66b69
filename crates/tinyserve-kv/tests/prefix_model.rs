//! The prefix index, the pool and page tables against a naive model, under any interleaving of
//! lookup, append, fork, cut, insert, free, abort and evict.

use proptest::prelude::*;
use tinyserve_kv::{
    EvictionCause, EvictionPolicy, KvError, KvFormat, KvLayout, KvShape, PageId, PagePool,
    PageTable, Prefix, PrefixIndex, PrefixOptions, PrefixStats,
};

#[derive(Debug, Clone)]
enum Operation {
    /// A sequence that begins with what the index knows of its prompt and then computes the rest.
    Admit {
        salt: usize,
        prompt: Vec<u32>,
    },
    Append {
        sequence: usize,
        tokens: Vec<u32>,
    },
    Fork {
        sequence: usize,
    },
    Cut {
        sequence: usize,
        tokens: usize,
    },
    /// Offers the first tokens of a sequence to the index.
    Insert {
        sequence: usize,
        tokens: usize,
    },
    /// Offers all of a sequence and gives its pages back.
    Finish {
        sequence: usize,
    },
    /// Gives the pages of a sequence back.
    Abort {
        sequence: usize,
    },
    Evict {
        pages: usize,
    },
    Clear,
}

fn operations() -> impl Strategy<Value = Vec<Operation>> {
    let tokens = |most| prop::collection::vec(0u32..2, 0..most);
    let sequence = any::<usize>;
    let operation = prop_oneof![
        6 => (0usize..2, tokens(24))
            .prop_map(|(salt, prompt)| Operation::Admit { salt, prompt }),
        6 => (sequence(), tokens(6))
            .prop_map(|(sequence, tokens)| Operation::Append { sequence, tokens }),
        2 => sequence().prop_map(|sequence| Operation::Fork { sequence }),
        2 => (sequence(), 0usize..24)
            .prop_map(|(sequence, tokens)| Operation::Cut { sequence, tokens }),
        3 => (sequence(), 0usize..30)
            .prop_map(|(sequence, tokens)| Operation::Insert { sequence, tokens }),
        3 => sequence().prop_map(|sequence| Operation::Finish { sequence }),
        2 => sequence().prop_map(|sequence| Operation::Abort { sequence }),
        1 => (0usize..5).prop_map(|pages| Operation::Evict { pages }),
        1 => Just(Operation::Clear),
    ];
    prop::collection::vec(operation, 1..80)
}

const SALTS: [&str; 2] = ["", "tenant"];

struct Sequence {
    table: PageTable,
    salt: usize,
    tokens: Vec<u32>,
}

/// An entry of the index as the model has it: all tokens up to the end of a page.
#[derive(Debug, Clone, PartialEq)]
struct Known {
    salt: usize,
    tokens: Vec<u32>,
    page: PageId,
    rank: (u64, u64),
}

struct World {
    pool: PagePool,
    index: PrefixIndex,
    ids: Vec<PageId>,
    /// What each page stores: for every token, the salt and all tokens up to it.
    memory: Vec<Vec<(usize, Vec<u32>)>>,
    sequences: Vec<Sequence>,
    known: Vec<Known>,
    page_size: usize,
    policy: EvictionPolicy,
    max_pages: usize,
    clock: u64,
    spent: u64,
    stats: PrefixStats,
}

impl World {
    fn new(capacity: usize, page_size: usize, policy: EvictionPolicy, max_pages: usize) -> Self {
        let mut pool = PagePool::new(capacity).unwrap();
        let ids: Vec<PageId> = (0..capacity).map(|_| pool.allocate().unwrap()).collect();
        ids.iter().for_each(|&id| assert!(pool.release(id)));
        let layout = layout(page_size);
        let options = PrefixOptions { identity: "a model", layout, policy, max_pages };
        Self {
            pool,
            index: PrefixIndex::new(options),
            ids,
            memory: vec![vec![Default::default(); page_size]; capacity],
            sequences: Vec::new(),
            known: Vec::new(),
            page_size,
            policy,
            max_pages,
            clock: 0,
            spent: 0,
            stats: PrefixStats::default(),
        }
    }

    fn apply(&mut self, operation: &Operation) {
        let n = self.sequences.len();
        match operation {
            Operation::Admit { salt, prompt } => self.admit(*salt, prompt),
            Operation::Evict { pages } => self.evict(*pages, EvictionCause::Room),
            Operation::Clear => {
                self.stats.evicted_by_clear += self.known.len() as u64;
                self.known.clear();
                self.index.clear(&mut self.pool);
            }
            _ if n == 0 => {}
            Operation::Append { sequence, tokens } => self.append(sequence % n, tokens),
            Operation::Fork { sequence } => {
                let Sequence { table, salt, tokens } = &self.sequences[sequence % n];
                let (salt, tokens) = (*salt, tokens.clone());
                let table = table.fork(&mut self.pool);
                self.sequences.push(Sequence { table, salt, tokens });
            }
            Operation::Cut { sequence, tokens } => {
                let sequence = &mut self.sequences[sequence % n];
                sequence.table.truncate(&mut self.pool, *tokens);
                sequence.tokens.truncate(*tokens);
            }
            Operation::Insert { sequence, tokens } => self.insert(sequence % n, *tokens),
            Operation::Finish { sequence } => {
                self.insert(sequence % n, usize::MAX);
                self.sequences.swap_remove(sequence % n).table.release(&mut self.pool);
            }
            Operation::Abort { sequence } => {
                self.sequences.swap_remove(sequence % n).table.release(&mut self.pool);
            }
        }
    }

    fn admit(&mut self, salt: usize, prompt: &[u32]) {
        let prefix = Prefix { salt: SALTS[salt], tokens: prompt };
        let peeked = self.index.peek(prefix);
        let table = self.index.lookup(&mut self.pool, prefix);
        self.clock += 1;
        let mut found = 0;
        for end in (self.page_size..prompt.len()).step_by(self.page_size) {
            let Some(known) = self.find(salt, &prompt[..end]) else { break };
            self.known[known].rank = self.rank(end);
            found = end;
        }
        assert_eq!((table.len(), peeked), (found, found), "the longest known prefix");
        self.stats.lookups += 1;
        self.stats.hits += u64::from(found > 0);
        self.stats.lookup_tokens += prompt.len() as u64;
        self.stats.hit_tokens += found as u64;
        self.sequences.push(Sequence { table, salt, tokens: prompt[..found].to_vec() });
        self.append(self.sequences.len() - 1, &prompt[found..]);
    }

    fn append(&mut self, index: usize, tokens: &[u32]) {
        let before = self.sequences[index].table.len();
        let mut copy = self.sequences[index].table.extend(&mut self.pool, tokens.len());
        if let Err(KvError::OutOfPages { needed, free, .. }) = copy {
            let idle = self.pool.idle_pages();
            self.evict(needed - free, EvictionCause::Room);
            copy = self.sequences[index].table.extend(&mut self.pool, tokens.len());
            // Whatever only the index holds can be had; what sequences hold can not.
            assert_eq!(copy.is_ok(), needed <= free + idle);
        }
        let Ok(copy) = copy else {
            assert_eq!(self.sequences[index].table.len(), before);
            return;
        };
        if let Some(copy) = copy {
            self.memory[copy.to.index()] = self.memory[copy.from.index()].clone();
        }
        let Sequence { table, salt, tokens: of_sequence } = &mut self.sequences[index];
        for &token in tokens {
            let slot = table.slot(of_sequence.len());
            of_sequence.push(token);
            assert_eq!(self.pool.holders(slot.page), 1, "a write to a shared page");
            self.memory[slot.page.index()][slot.offset] = (*salt, of_sequence.clone());
        }
    }

    fn insert(&mut self, index: usize, most: usize) {
        self.clock += 1;
        let (salt, tokens) = (self.sequences[index].salt, self.sequences[index].tokens.clone());
        let tokens = &tokens[..most.min(tokens.len())];
        let mut expected = 0;
        let prefix = Prefix { salt: SALTS[salt], tokens };
        let own = self.sequences[index].table.pages().to_vec();
        let shared: Vec<_> = own.iter().map(|&page| self.pool.holders(page) > 1).collect();
        let inserted = self.index.insert(&mut self.pool, prefix, &mut self.sequences[index].table);
        for (page, end) in (self.page_size..=tokens.len()).step_by(self.page_size).enumerate() {
            let rank = self.rank(end);
            if let Some(known) = self.find(salt, &tokens[..end]) {
                let known = &mut self.known[known];
                if known.page != own[page] && shared[page] {
                    break;
                }
                self.stats.merged_pages += u64::from(known.page != own[page]);
                // The same page is kept once.
                assert_eq!(known.page, self.sequences[index].table.pages()[page]);
                known.rank = rank;
                continue;
            }
            if self.known.len() >= self.max_pages && !self.forget(EvictionCause::Limit) {
                break;
            }
            let rank = self.rank(end);
            let page = self.sequences[index].table.pages()[page];
            self.known.push(Known { salt, tokens: tokens[..end].to_vec(), page, rank });
            expected += 1;
        }
        assert_eq!(inserted, expected);
        self.stats.inserted_pages += expected as u64;
    }

    fn evict(&mut self, pages: usize, cause: EvictionCause) {
        let idle = self.pool.idle_pages();
        let evicted = self.index.evict(&mut self.pool, pages, cause);
        assert_eq!(evicted, pages.min(idle), "idle pages can all be had");
        for _ in 0..evicted {
            assert!(self.forget(cause));
        }
    }

    /// Evicts from the model: the lowest rank of those that nobody follows or holds.
    fn forget(&mut self, cause: EvictionCause) -> bool {
        let followed = |a: &Known| {
            let follows = |b: &Known| {
                b.salt == a.salt
                    && b.tokens.len() == a.tokens.len() + self.page_size
                    && b.tokens.starts_with(&a.tokens)
            };
            self.known.iter().any(follows)
        };
        let held = |known: &Known| {
            self.sequences.iter().any(|sequence| sequence.table.pages().contains(&known.page))
        };
        let candidates = self.known.iter().filter(|&known| !followed(known) && !held(known));
        let first = candidates.min_by_key(|known| (known.rank, usize::MAX - known.tokens.len()));
        let Some(first) = first.cloned() else { return false };
        self.known.retain(|known| *known != first);
        self.spent = self.spent.max(first.rank.0);
        match cause {
            EvictionCause::Room => self.stats.evicted_for_room += 1,
            EvictionCause::Limit => self.stats.evicted_for_limit += 1,
        }
        true
    }

    fn rank(&self, end: usize) -> (u64, u64) {
        match self.policy {
            EvictionPolicy::Lru => (self.clock, self.clock),
            EvictionPolicy::RecomputeCost { dense_tokens } => {
                (self.spent + dense_tokens + (end - self.page_size) as u64, self.clock)
            }
        }
    }

    fn find(&self, salt: usize, tokens: &[u32]) -> Option<usize> {
        self.known.iter().position(|known| known.salt == salt && known.tokens == tokens)
    }

    fn check(&self) {
        assert!(self.pool.is_consistent());
        assert!(self.index.is_consistent(&self.pool));
        assert_eq!(self.index.len(), self.known.len());
        assert!(self.index.len() <= self.max_pages);
        assert_eq!(self.index.stats(), self.stats);
        let mut idle = 0;
        for &id in &self.ids {
            let tables = self.sequences.iter().filter(|s| s.table.pages().contains(&id)).count();
            let cached = self.known.iter().filter(|known| known.page == id).count();
            assert!(cached <= 1);
            assert_eq!(self.pool.holders(id) as usize, tables + cached, "holders of {id:?}");
            idle += usize::from(cached == 1 && tables == 0);
        }
        assert_eq!(self.pool.idle_pages(), idle);
        assert_eq!(self.pool.free_pages() + self.pool.used_pages(), self.ids.len());
        // Nothing that a sequence or the index can reach was written over.
        for sequence in &self.sequences {
            assert_eq!(sequence.table.len(), sequence.tokens.len());
            for end in 1..=sequence.tokens.len() {
                let slot = sequence.table.slot(end - 1);
                let stored = &self.memory[slot.page.index()][slot.offset];
                assert_eq!(stored, &(sequence.salt, sequence.tokens[..end].to_vec()));
            }
        }
        for known in &self.known {
            for offset in 0..self.page_size {
                let end = known.tokens.len() - self.page_size + offset + 1;
                let stored = &self.memory[known.page.index()][offset];
                assert_eq!(stored, &(known.salt, known.tokens[..end].to_vec()));
            }
        }
    }
}

fn layout(page_size: usize) -> KvLayout {
    let (layers, kv_heads, head_dim) = (1, 1, 8);
    KvLayout::new(KvShape { layers, kv_heads, head_dim, page_size, format: KvFormat::F32 }).unwrap()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(512))]

    #[test]
    fn any_interleaving_matches_the_model(
        capacity in 1usize..90,
        page_size in 1usize..5,
        dense_tokens in prop::option::of(0u64..20),
        max_pages in prop_oneof![Just(usize::MAX), 0usize..12],
        operations in operations(),
    ) {
        let policy = dense_tokens.map_or(EvictionPolicy::Lru, |dense_tokens| {
            EvictionPolicy::RecomputeCost { dense_tokens }
        });
        let mut world = World::new(capacity, page_size, policy, max_pages);
        for operation in &operations {
            world.apply(operation);
            world.check();
        }
        for sequence in world.sequences.drain(..) {
            sequence.table.release(&mut world.pool);
        }
        prop_assert_eq!(world.pool.idle_pages(), world.pool.used_pages());
        world.apply(&Operation::Evict { pages: capacity });
        world.check();
        prop_assert_eq!(world.pool.free_pages(), capacity, "nothing leaks");
    }
}

/// An index that already holds `prompts`, each in pages of its own sequence that has ended.
fn filled(policy: EvictionPolicy, pool: &mut PagePool, prompts: &[&[u32]]) -> PrefixIndex {
    let layout = layout(2);
    let max_pages = usize::MAX;
    let mut index = PrefixIndex::new(PrefixOptions { identity: "", layout, policy, max_pages });
    for tokens in prompts {
        let prefix = Prefix { salt: "", tokens };
        let mut table = index.lookup(pool, prefix);
        assert_eq!(table.extend(pool, tokens.len() - table.len()), Ok(None));
        index.insert(pool, prefix, &mut table);
        table.release(pool);
    }
    index
}

#[test]
fn the_last_token_of_a_prompt_is_never_taken_from_the_index() {
    let mut pool = PagePool::new(8).unwrap();
    let index = filled(EvictionPolicy::Lru, &mut pool, &[&[1, 2, 3, 4]]);
    let found = |tokens: &[u32]| index.peek(Prefix { salt: "", tokens });
    assert_eq!(found(&[1, 2, 3, 4, 5]), 4);
    assert_eq!(found(&[1, 2, 3, 4]), 2, "the second page holds the last token");
    assert_eq!(found(&[1, 2, 3]), 2);
    assert_eq!(found(&[1, 2]), 0);
    assert_eq!(found(&[1]), 0);
    assert_eq!(found(&[]), 0);
    assert_eq!(index.peek(Prefix { salt: "other", tokens: &[1, 2, 3, 4, 5] }), 0);
}

#[test]
fn addresses_depend_on_everything_that_pages_depend_on() {
    let address = |identity: &str, page_size: usize, format, salt: &str| {
        let layers = 1;
        let shape = KvShape { layers, kv_heads: 1, head_dim: 8, page_size, format };
        let layout = KvLayout::new(shape).unwrap();
        let (policy, max_pages) = (EvictionPolicy::Lru, 1);
        let index = PrefixIndex::new(PrefixOptions { identity, layout, policy, max_pages });
        let tokens = [7; 8];
        index.hashes(Prefix { salt, tokens: &tokens }).last().unwrap()
    };
    let addresses = [
        address("a", 4, KvFormat::F16, ""),
        address("b", 4, KvFormat::F16, ""),
        address("a", 8, KvFormat::F16, ""),
        address("a", 4, KvFormat::Bf16, ""),
        address("a", 4, KvFormat::F16, "tenant"),
    ];
    for (i, one) in addresses.iter().enumerate() {
        assert!(!addresses[..i].contains(one), "{i}");
    }
    assert_eq!(addresses[0], address("a", 4, KvFormat::F16, ""));
}

#[test]
fn the_cost_policy_keeps_what_is_dear_and_the_other_what_is_recent() {
    // A long prefix that is older, and a short one that is newer.
    let long: Vec<u32> = (0..12).collect();
    let prompts: [&[u32]; 2] = [&long, &[90, 91]];
    let survivors = |policy| {
        let mut pool = PagePool::new(16).unwrap();
        let mut index = filled(policy, &mut pool, &prompts);
        assert_eq!(index.evict(&mut pool, 1, EvictionCause::Room), 1);
        let peek = |tokens: &[u32]| index.peek(Prefix { salt: "", tokens });
        let long: Vec<u32> = (0..13).collect();
        (peek(&long), peek(&[90, 91, 92]))
    };
    assert_eq!(survivors(EvictionPolicy::Lru), (10, 2));
    assert_eq!(survivors(EvictionPolicy::RecomputeCost { dense_tokens: 1 }), (12, 0));
    // Where attention costs nothing beside the rest, cost says what recency says.
    assert_eq!(survivors(EvictionPolicy::RecomputeCost { dense_tokens: u64::MAX }), (10, 2));
}

#[test]
fn pages_in_use_stay_when_the_index_is_cleared() {
    let mut pool = PagePool::new(8).unwrap();
    let mut index = filled(EvictionPolicy::Lru, &mut pool, &[&[1, 2, 3, 4]]);
    let table = index.lookup(&mut pool, Prefix { salt: "", tokens: &[1, 2, 9] });
    assert_eq!((table.len(), pool.used_pages(), pool.idle_pages()), (2, 2, 1));
    assert_eq!(index.evict(&mut pool, 8, EvictionCause::Room), 1);
    index.clear(&mut pool);
    assert_eq!((pool.used_pages(), pool.idle_pages()), (1, 0));
    assert!(index.is_empty() && pool.is_consistent() && index.is_consistent(&pool));
    table.release(&mut pool);
    assert_eq!(pool.free_pages(), 8);
}
