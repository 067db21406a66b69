//! What was pruned from a sequence, so that it can be pruned again when its pages are gone.

/// Tokens that plugins want removed from a sequence's cache.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Pruning {
    /// Tokens that had been computed then.
    pub(crate) computed: usize,
    /// Places in the cache of those to remove, ascending.
    pub(crate) places: Vec<u32>,
}

/// The prunings of a sequence, in order. Pages go through a pruning as soon as there is room for
/// that, and always before another token is computed: so a text depends on nobody else's pages.
#[derive(Debug, Clone, Default)]
pub(crate) struct Prunings {
    all: Vec<Pruning>,
    /// How many of them the pages have gone through.
    made: usize,
}

impl Prunings {
    pub(crate) fn push(&mut self, pruning: Pruning) {
        self.all.push(pruning);
    }

    pub(crate) fn first(&self) -> Option<&Pruning> {
        self.all.first()
    }

    /// The first that the pages have not gone through.
    pub(crate) fn next(&self) -> Option<&Pruning> {
        self.all.get(self.made)
    }

    /// The pages have gone through the next one.
    pub(crate) fn note_made(&mut self) {
        self.made += 1;
    }

    /// The pages are gone, and with them what they have gone through.
    pub(crate) fn rewind(&mut self) {
        self.made = 0;
    }

    /// Tokens that the pages still hold and are to lose before another token is computed, of which
    /// `computed` are.
    pub(crate) fn due(&self, computed: usize) -> usize {
        let next = &self.all[self.made..];
        tokens(&next[..next.partition_point(|pruning| pruning.computed <= computed)])
    }

    /// Tokens from the first on before which nothing was pruned, or is to be; more than there are
    /// if nothing was.
    pub(crate) fn intact(&self) -> usize {
        // Before the first token that goes, places are positions.
        let firsts = self.all.iter().filter_map(|pruning| pruning.places.first());
        firsts.min().map_or(usize::MAX, |&first| first as usize)
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.all.is_empty()
    }
}

fn tokens(prunings: &[Pruning]) -> usize {
    prunings.iter().map(|pruning| pruning.places.len()).sum()
}
