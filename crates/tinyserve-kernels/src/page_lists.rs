//! Which pages selections chose.

use std::ops::Range;

/// The page lists of a step, each of one layer, sequence and KV head.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct PageLists {
    pages: Vec<u32>,
    lists: Vec<(Owner, Range<usize>)>,
}

/// Whose list it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Owner {
    sequence: usize,
    layer: usize,
    kv_head: usize,
}

/// How many pages a selection chose, and how many of them were chosen before.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Reuse {
    /// Pages that the lists name which were compared.
    pub compared: u64,
    /// Of those, pages that the lists before name, too.
    pub reused: u64,
}

impl Reuse {
    /// Adds `other` to these counts.
    pub fn add(&mut self, other: Self) {
        self.compared += other.compared;
        self.reused += other.reused;
    }

    /// The share of the pages that was chosen before; `None` if nothing was compared.
    #[must_use]
    pub fn share(&self) -> Option<f64> {
        (self.compared > 0).then(|| self.reused as f64 / self.compared as f64)
    }
}

impl PageLists {
    /// Forgets all lists; their memory is used again.
    pub fn clear(&mut self) {
        self.pages.clear();
        self.lists.clear();
    }

    /// Whether there are none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.lists.is_empty()
    }

    /// Adds the list of a KV head of sequence `sequence` of the batch in layer `layer`: places in
    /// the sequence's page table, ascending.
    pub fn push(&mut self, (layer, sequence, kv_head): (usize, usize, usize), list: &[u32]) {
        let start = self.pages.len();
        self.pages.extend_from_slice(list);
        self.lists.push((Owner { sequence, layer, kv_head }, start..self.pages.len()));
    }

    /// Compares the lists of sequence `sequence` with those that it had in a step before, where it
    /// was sequence `sequence_before`. What only one of the steps has a list for is left out.
    #[must_use]
    pub fn reuse(&self, sequence: usize, before: &Self, sequence_before: usize) -> Reuse {
        let mut earlier = before.of(sequence_before).peekable();
        let mut reuse = Reuse::default();
        for (head, list) in self.of(sequence) {
            while earlier.next_if(|(other, _)| *other < head).is_some() {}
            if let Some((_, old)) = earlier.next_if(|(other, _)| *other == head) {
                reuse.compared += list.len() as u64;
                reuse.reused += common(list, old) as u64;
            }
        }
        reuse
    }

    /// The lists of a sequence by layer and KV head, ascending.
    fn of(&self, sequence: usize) -> impl Iterator<Item = ((usize, usize), &[u32])> {
        let own = self.lists.iter().filter(move |(owner, _)| owner.sequence == sequence);
        own.map(|(owner, range)| ((owner.layer, owner.kv_head), &self.pages[range.clone()]))
    }
}

/// How many numbers two ascending lists have in common.
fn common(a: &[u32], b: &[u32]) -> usize {
    let mut b = b.iter().copied().peekable();
    let same = |x: &&u32| {
        while b.next_if(|y| y < x).is_some() {}
        b.next_if_eq(x).is_some()
    };
    a.iter().filter(same).count()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_both_steps_list_is_compared() {
        let (mut before, mut now) = (PageLists::default(), PageLists::default());
        for (owner, list) in [
            ((2, 0, 0), &[0, 1, 5][..]),
            ((2, 0, 1), &[0, 7]),
            ((2, 1, 0), &[0, 1, 2, 3]),
            ((3, 0, 0), &[4, 6]),
            ((3, 1, 0), &[2]),
        ] {
            before.push(owner, list);
        }
        // The second sequence has become the first, and is read by selection in one layer more.
        for (owner, list) in
            [((2, 0, 0), &[1, 3, 4][..]), ((3, 0, 0), &[1, 2]), ((4, 0, 0), &[0, 9])]
        {
            now.push(owner, list);
        }
        assert_eq!(now.reuse(0, &before, 1), Reuse { compared: 5, reused: 3 });
        assert_eq!(now.reuse(1, &before, 0), Reuse::default());
        now.clear();
        assert!(now.is_empty() && now.reuse(0, &before, 1) == Reuse::default());
    }
}
