//! The prefix index: full pages, found again by the tokens that they and all before them hold.

mod eviction;

use std::collections::HashMap;
use std::hash::{DefaultHasher, Hash, Hasher};

pub use eviction::{EvictionCause, EvictionPolicy};

use crate::{KvLayout, PageId, PagePool, PageTable};
use eviction::Leaves;

/// Address of a full page: a hash of its tokens and of all before them, of the salt, and of what
/// the cache is a cache of.
///
/// It is the same in every index of the same identity, also in other processes of the same build,
/// so that whoever spreads requests over engines can send one where its prefix is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct PageHash(u64);

impl PageHash {
    fn of(parts: impl Hash) -> Self {
        let mut hasher = DefaultHasher::new();
        parts.hash(&mut hasher);
        Self(hasher.finish())
    }
}

/// What pages are found by: tokens from a sequence's first on, and who may share them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Prefix<'a> {
    /// Only sequences of the same salt share pages; empty for everybody.
    pub salt: &'a str,
    /// Token ids.
    pub tokens: &'a [u32],
}

/// How a [`PrefixIndex`] is set up.
#[derive(Debug, Clone, Copy)]
pub struct PrefixOptions<'a> {
    /// Names everything that keys and values depend on beside tokens and layout: the model, how its
    /// weights are kept, its rotary settings.
    pub identity: &'a str,
    /// The layout of the pages.
    pub layout: KvLayout,
    /// Which idle pages go first when pages are needed.
    pub policy: EvictionPolicy,
    /// Most pages that the index keeps.
    pub max_pages: usize,
}

/// What an index has done since it was made.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct PrefixStats {
    /// Lookups.
    pub lookups: u64,
    /// Lookups that found at least one page.
    pub hits: u64,
    /// Tokens that lookups asked for.
    pub lookup_tokens: u64,
    /// Tokens that lookups found, which need not be computed again.
    pub hit_tokens: u64,
    /// Pages taken into the index.
    pub inserted_pages: u64,
    /// Pages given back because the index had the same one already.
    pub merged_pages: u64,
    /// Pages evicted because a sequence needed room.
    pub evicted_for_room: u64,
    /// Pages evicted because the index was full.
    pub evicted_for_limit: u64,
    /// Pages let go when the index was cleared.
    pub evicted_by_clear: u64,
}

/// One full page in the index.
#[derive(Debug)]
struct Entry {
    hash: PageHash,
    /// The entry of the page before this one.
    parent: Option<u32>,
    /// Of the first page of a sequence only; those that follow have their parent's.
    salt: Option<Box<str>>,
    tokens: Box<[u32]>,
    page: PageId,
    /// Pages before this one.
    depth: u32,
    /// Entries whose parent this is.
    children: u32,
    /// What eviction orders leaves by.
    rank: (u64, u64),
}

/// Full pages that outlive the sequences that computed them, shared by reference count.
///
/// A page is addressed by a chained hash; beside it the index keeps the page's tokens, its
/// predecessor and the salt, and compares them. So two prefixes whose hashes collide are told
/// apart: the second one is not found, and never another's page instead of it.
///
/// The index is one of the holders of its pages. A page that it alone holds is idle: its content
/// stays until somebody needs the room, then it is evicted, last pages of a prefix first. A page in
/// use is never evicted. What belongs to a page, its box above all, lies with the page and is
/// shared with it.
#[derive(Debug)]
pub struct PrefixIndex {
    root: PageHash,
    page_size: usize,
    max_pages: usize,
    entries: Vec<Option<Entry>>,
    vacant: Vec<u32>,
    by_hash: HashMap<PageHash, u32>,
    leaves: Leaves,
    stats: PrefixStats,
}

impl PrefixIndex {
    /// An empty index.
    #[must_use]
    pub fn new(options: PrefixOptions<'_>) -> Self {
        let PrefixOptions { identity, layout, policy, max_pages } = options;
        let shape = layout.shape();
        let sizes = (shape.layers, shape.kv_heads, shape.head_dim, shape.page_size);
        Self {
            root: PageHash::of((identity, sizes, shape.format.name())),
            page_size: shape.page_size,
            max_pages,
            entries: Vec::new(),
            vacant: Vec::new(),
            by_hash: HashMap::new(),
            leaves: Leaves::new(policy),
            stats: PrefixStats::default(),
        }
    }

    /// What it has done.
    #[must_use]
    pub fn stats(&self) -> PrefixStats {
        self.stats
    }

    /// Pages that it holds.
    #[must_use]
    pub fn len(&self) -> usize {
        self.by_hash.len()
    }

    /// Whether it holds no page.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.by_hash.is_empty()
    }

    /// The addresses of the full pages of `prefix`, in order.
    pub fn hashes<'a>(&self, prefix: Prefix<'a>) -> impl Iterator<Item = PageHash> + use<'a> {
        let mut hash = PageHash::of((self.root.0, prefix.salt));
        prefix.tokens.chunks_exact(self.page_size).map(move |tokens| {
            hash = PageHash::of((hash.0, tokens));
            hash
        })
    }

    /// Tokens of `prompt` that [`Self::lookup`] would find; nothing is counted or shared.
    #[must_use]
    pub fn peek(&self, prompt: Prefix<'_>) -> usize {
        self.path(reusable(prompt, self.page_size)).count() * self.page_size
    }

    /// A sequence of the longest prefix of `prompt` that is in the index, sharing its pages.
    ///
    /// Its length is how many tokens need not be computed. That is a whole number of pages, and
    /// never the whole prompt: the last token has to be computed for its logits.
    #[must_use]
    pub fn lookup(&mut self, pool: &mut PagePool, prompt: Prefix<'_>) -> PageTable {
        let path: Vec<u32> = self.path(reusable(prompt, self.page_size)).collect();
        self.leaves.tick();
        let mut pages = Vec::with_capacity(path.len());
        for &id in &path {
            self.touch(id);
            pages.push(self.entry(id).page);
        }
        let table = PageTable::sharing(pool, pages, self.page_size);
        self.stats.lookups += 1;
        self.stats.hits += u64::from(!table.is_empty());
        self.stats.lookup_tokens += prompt.tokens.len() as u64;
        self.stats.hit_tokens += table.len() as u64;
        table
    }

    /// Takes the full pages of a sequence into the index; returns how many were new to it.
    ///
    /// `prefix` begins with the tokens that `table` holds, or with as many of them as are to be
    /// found again. All of them must have been written, by dense attention: what a selecting step
    /// computed is near to what a later prefill would compute, not the same. Where the index has
    /// the same page already, the table shares it and gives its own back, unless a fork holds that
    /// too; then the rest is left out.
    ///
    /// From then on these pages are shared. [`PageTable::extend`] copies before it writes to one;
    /// whoever writes by other ways must do the same.
    pub fn insert(
        &mut self,
        pool: &mut PagePool,
        prefix: Prefix<'_>,
        table: &mut PageTable,
    ) -> usize {
        // Behind a pruned token, pages hold other tokens than the prefix has there.
        let tokens = &prefix.tokens[..prefix.tokens.len().min(table.intact())];
        let prefix = Prefix { tokens, ..prefix };
        self.leaves.tick();
        let (mut parent, mut inserted) = (None, 0);
        let pages = self.hashes(prefix).zip(tokens.chunks_exact(self.page_size));
        for (index, (hash, tokens)) in pages.enumerate() {
            let own = table.pages()[index];
            let salt = prefix.salt;
            match self.by_hash.get(&hash).copied() {
                Some(id) if self.matches(id, parent, salt, tokens) => {
                    let page = self.entry(id).page;
                    if page != own {
                        // Whoever holds a page here must hold those before it, or an idle page
                        // could not be evicted for a page in use that follows it. A fork of this
                        // sequence would keep its old page, and share those that follow.
                        if pool.holders(own) > 1 {
                            break;
                        }
                        table.share(pool, index, page);
                        self.stats.merged_pages += 1;
                    }
                    self.touch(id);
                    parent = Some(id);
                }
                // Another prefix has this hash, or another salt this page: they were first.
                Some(_) => break,
                None if pool.is_cached(own) => break,
                None => {
                    if self.len() >= self.max_pages
                        && self.evict(pool, 1, EvictionCause::Limit) == 0
                    {
                        break;
                    }
                    pool.retain_cached(own);
                    let salt = parent.is_none().then(|| salt.into());
                    parent = Some(self.add(hash, parent, salt, tokens.into(), own));
                    inserted += 1;
                }
            }
        }
        self.stats.inserted_pages += inserted as u64;
        inserted
    }

    /// Gives up to `pages` idle pages back to the pool; returns how many.
    ///
    /// It gives as many as it is asked for while [`PagePool::idle_pages`] are left.
    pub fn evict(&mut self, pool: &mut PagePool, pages: usize, cause: EvictionCause) -> usize {
        let mut evicted = 0;
        while evicted < pages {
            let idle = |id| pool.is_idle(self.entry(id).page);
            let Some(id) = self.leaves.first(idle) else { break };
            self.leaves.charge(self.entry(id).rank);
            self.remove(pool, id);
            evicted += 1;
        }
        *match cause {
            EvictionCause::Room => &mut self.stats.evicted_for_room,
            EvictionCause::Limit => &mut self.stats.evicted_for_limit,
        } += evicted as u64;
        evicted
    }

    /// Lets all pages go; those in use stay with their sequences.
    pub fn clear(&mut self, pool: &mut PagePool) {
        self.stats.evicted_by_clear += self.len() as u64;
        for entry in self.entries.drain(..).flatten() {
            pool.release_cached(entry.page);
        }
        self.vacant.clear();
        self.by_hash.clear();
        self.leaves.clear();
    }

    /// Whether entries, hashes, leaves and the pool agree.
    #[must_use]
    pub fn is_consistent(&self, pool: &PagePool) -> bool {
        let entries = || {
            let ids = self.entries.iter().enumerate();
            ids.filter_map(|(id, entry)| Some((id as u32, entry.as_ref()?)))
        };
        let children = |parent| entries().filter(|(_, entry)| entry.parent == Some(parent)).count();
        let parent = |entry: &Entry| {
            entry.parent.map(|id| self.entries[id as usize].as_ref().map(|entry| entry.depth + 1))
        };
        entries().all(|(id, entry)| {
            self.by_hash.get(&entry.hash) == Some(&id)
                && pool.is_cached(entry.page)
                && children(id) == entry.children as usize
                && parent(entry).unwrap_or(Some(0)) == Some(entry.depth)
                && entry.salt.is_some() == entry.parent.is_none()
                && self.leaves.contains(id, entry.rank, entry.depth) == (entry.children == 0)
        }) && entries().count() == self.len()
            && self.len() + self.vacant.len() == self.entries.len()
            && self.leaves.len() == entries().filter(|(_, entry)| entry.children == 0).count()
    }

    /// Entries of the longest known prefix, in order.
    fn path<'a>(&'a self, prefix: Prefix<'a>) -> impl Iterator<Item = u32> + use<'a> {
        let mut parent = None;
        self.hashes(prefix).zip(prefix.tokens.chunks_exact(self.page_size)).map_while(
            move |(hash, tokens)| {
                let id = *self.by_hash.get(&hash)?;
                let known = self.matches(id, parent, prefix.salt, tokens);
                parent = Some(id);
                known.then_some(id)
            },
        )
    }

    fn matches(&self, id: u32, parent: Option<u32>, salt: &str, tokens: &[u32]) -> bool {
        let entry = self.entry(id);
        entry.parent == parent
            && *entry.tokens == *tokens
            && entry.salt.as_deref().is_none_or(|own| own == salt)
    }

    fn entry(&self, id: u32) -> &Entry {
        self.entries[id as usize].as_ref().expect("an id leads to its entry until it is removed")
    }

    fn entry_mut(&mut self, id: u32) -> &mut Entry {
        self.entries[id as usize].as_mut().expect("an id leads to its entry until it is removed")
    }

    /// Marks an entry as used now.
    fn touch(&mut self, id: u32) {
        let (rank, depth) = (self.entry(id).rank, self.entry(id).depth);
        let now = self.leaves.rank(depth as usize * self.page_size);
        if self.entry(id).children == 0 {
            self.leaves.remove(id, rank, depth);
            self.leaves.add(id, now, depth);
        }
        self.entry_mut(id).rank = now;
    }

    fn add(
        &mut self,
        hash: PageHash,
        parent: Option<u32>,
        salt: Option<Box<str>>,
        tokens: Box<[u32]>,
        page: PageId,
    ) -> u32 {
        let mut depth = 0;
        if let Some(parent_id) = parent {
            let parent = self.entry_mut(parent_id);
            parent.children += 1;
            depth = parent.depth + 1;
            let (first_child, rank) = (parent.children == 1, parent.rank);
            if first_child {
                self.leaves.remove(parent_id, rank, depth - 1);
            }
        }
        let rank = self.leaves.rank(depth as usize * self.page_size);
        let entry = Entry { hash, parent, salt, tokens, page, depth, children: 0, rank };
        let id = self.vacant.pop().unwrap_or_else(|| {
            self.entries.push(None);
            // No pool has more pages than a 32-bit index can tell apart.
            (self.entries.len() - 1) as u32
        });
        self.entries[id as usize] = Some(entry);
        self.by_hash.insert(hash, id);
        self.leaves.add(id, rank, depth);
        id
    }

    /// Removes a leaf.
    fn remove(&mut self, pool: &mut PagePool, id: u32) {
        let Some(entry) = self.entries[id as usize].take() else { return };
        self.vacant.push(id);
        self.by_hash.remove(&entry.hash);
        self.leaves.remove(id, entry.rank, entry.depth);
        pool.release_cached(entry.page);
        if let Some(parent_id) = entry.parent {
            let parent = self.entry_mut(parent_id);
            parent.children -= 1;
            let (rank, depth, childless) = (parent.rank, parent.depth, parent.children == 0);
            if childless {
                self.leaves.add(parent_id, rank, depth);
            }
        }
    }
}

/// What of a prompt may come from the index: whole pages that leave its last token out.
fn reusable(prompt: Prefix<'_>, page_size: usize) -> Prefix<'_> {
    let pages = prompt.tokens.len().saturating_sub(1) / page_size;
    Prefix { tokens: &prompt.tokens[..pages * page_size], ..prompt }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{KvFormat, KvShape};

    #[test]
    fn a_hash_that_two_prefixes_share_costs_a_miss_and_no_more() {
        let (layers, kv_heads, head_dim, page_size) = (1, 1, 8, 2);
        let shape = KvShape { layers, kv_heads, head_dim, page_size, format: KvFormat::F16 };
        let layout = KvLayout::new(shape).unwrap();
        let (identity, policy, max_pages) = ("", EvictionPolicy::Lru, 100);
        let mut index = PrefixIndex::new(PrefixOptions { identity, layout, policy, max_pages });
        let mut pool = PagePool::new(64).unwrap();
        let of = |tokens| Prefix { salt: "", tokens };
        let mut fill = |index: &mut PrefixIndex, prefix: Prefix<'_>| {
            let mut table = PageTable::new(page_size);
            assert_eq!(table.extend(&mut pool, prefix.tokens.len()), Ok(None));
            let inserted = index.insert(&mut pool, prefix, &mut table);
            table.release(&mut pool);
            inserted
        };
        assert_eq!(fill(&mut index, of(&[1, 2, 3, 4])), 2);
        // Other tokens, another predecessor, another salt: as if their hashes were those of known
        // pages.
        for (stranger, known) in [
            (of(&[5, 6, 9]), of(&[1, 2])),
            (of(&[3, 4, 9]), of(&[1, 2, 3, 4])),
            (Prefix { salt: "tenant", tokens: &[1, 2, 9] }, of(&[1, 2])),
        ] {
            let hash = index.hashes(stranger).last().unwrap();
            let id = index.by_hash[&index.hashes(known).last().unwrap()];
            index.by_hash.insert(hash, id);
            assert_eq!(index.peek(stranger), 0, "{stranger:?}");
            assert_eq!(fill(&mut index, stranger), 0, "{stranger:?}");
            index.by_hash.remove(&hash);
            assert_eq!(fill(&mut index, stranger), 1, "{stranger:?}");
            assert_eq!(index.peek(stranger), 2, "{stranger:?}");
        }
        assert_eq!(index.peek(of(&[1, 2, 3, 4, 9])), 4);
    }
}
