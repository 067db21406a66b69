//! Which idle page of a prefix index goes first.

use std::cmp::Reverse;
use std::collections::BTreeSet;

/// Which idle pages go first when pages are needed. Of one prefix, its last page always does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum EvictionPolicy {
    /// Those that were found or written least recently.
    #[default]
    Lru,
    /// Those that are both old and cheap to compute again (GreedyDual: Young, "The k-server dual
    /// and loose competitiveness for paging", 1994).
    ///
    /// A page at position `p` costs `p + dense_tokens` to compute, in units of attending to one
    /// token; each use sets its rank to that plus the rank of the last page that was evicted, and
    /// the lowest rank goes first. So a page deep in a long prefix stays longer than a page of a
    /// short one, and nothing stays for ever.
    RecomputeCost {
        /// Tokens of context that cost as much to attend to as everything else about a token.
        dense_tokens: u64,
    },
}

/// Why pages are evicted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum EvictionCause {
    /// A sequence needs pages, and too few are free.
    Room,
    /// The index holds as many pages as it may.
    Limit,
}

/// The entries that no other entry follows, in the order in which they go.
#[derive(Debug)]
pub(super) struct Leaves {
    policy: EvictionPolicy,
    /// Counts uses of the index.
    clock: u64,
    /// The highest rank that was ever evicted.
    spent: u64,
    order: BTreeSet<((u64, u64), Reverse<u32>, u32)>,
}

impl Leaves {
    pub(super) fn new(policy: EvictionPolicy) -> Self {
        Self { policy, clock: 0, spent: 0, order: BTreeSet::new() }
    }

    /// Everything from now on is more recent than everything before.
    pub(super) fn tick(&mut self) {
        self.clock += 1;
    }

    /// The rank of a page at `position` that is used now.
    pub(super) fn rank(&self, position: usize) -> (u64, u64) {
        match self.policy {
            EvictionPolicy::Lru => (self.clock, self.clock),
            EvictionPolicy::RecomputeCost { dense_tokens } => {
                let cost = dense_tokens.saturating_add(position as u64);
                (self.spent.saturating_add(cost), self.clock)
            }
        }
    }

    /// Remembers what was just evicted.
    pub(super) fn charge(&mut self, rank: (u64, u64)) {
        self.spent = self.spent.max(rank.0);
    }

    /// The first leaf that is `idle`. Few are not: a sequence that runs holds one at most.
    pub(super) fn first(&self, idle: impl Fn(u32) -> bool) -> Option<u32> {
        self.order.iter().map(|&(_, _, id)| id).find(|&id| idle(id))
    }

    // Of the pages that one use ranked alike, the deepest goes first.
    pub(super) fn add(&mut self, id: u32, rank: (u64, u64), depth: u32) {
        self.order.insert((rank, Reverse(depth), id));
    }

    pub(super) fn remove(&mut self, id: u32, rank: (u64, u64), depth: u32) {
        self.order.remove(&(rank, Reverse(depth), id));
    }

    pub(super) fn contains(&self, id: u32, rank: (u64, u64), depth: u32) -> bool {
        self.order.contains(&(rank, Reverse(depth), id))
    }

    pub(super) fn len(&self) -> usize {
        self.order.len()
    }

    pub(super) fn clear(&mut self) {
        self.order.clear();
    }
}
