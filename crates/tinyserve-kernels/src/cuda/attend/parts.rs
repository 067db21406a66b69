//! Long lists of one row are read in parts, by a block for each, which are then merged.

use std::ops::Range;

/// Tokens of a part, of lists of up to four; of longer lists, parts are up to twice as long. A list of
/// one row is read by a block for each.
pub(super) const PART_TOKENS: usize = 512;
/// Parts of one KV head that one launch leaves to be merged, at most, unless one row has more: enough
/// blocks for any device, and a bound for the buffer that they lie in.
pub(super) const MOST_PARTS: usize = 2048;

/// Pages of [`PART_TOKENS`].
pub(super) fn part_pages(page_size: usize) -> usize {
    (PART_TOKENS / page_size).max(1)
}

/// Most parts of a list of `pages` pages, as `parts_of_list` in kernels/tile.cuh: it depends on the
/// list alone, and so does what its parts add up to.
pub(super) fn parts_of_list(pages: usize, page_size: usize) -> usize {
    let least = part_pages(page_size);
    pages.div_ceil(least).min(4).max(pages.div_ceil(2 * least))
}

/// Where the parts of tiles lie, and which launches leave them there: the next one begins where the
/// last one's are merged.
#[derive(Debug, Default)]
pub(super) struct Parts {
    /// Tiles with which launches begin, the first one left aside.
    starts: Vec<usize>,
    /// Parts of the last launch.
    last: usize,
    /// Most parts of a launch.
    pub(super) most: usize,
    /// Most parts of a tile.
    of_tile: usize,
}

impl Parts {
    /// Where `parts` of tile `number` begin among those of its launch; tiles come in order.
    pub(super) fn place(&mut self, number: usize, parts: usize) -> u32 {
        if self.last > 0 && self.last + parts > MOST_PARTS {
            self.starts.push(number);
            self.last = 0;
        }
        let start = self.last;
        self.last += parts;
        self.most = self.most.max(self.last);
        self.of_tile = self.of_tile.max(parts);
        start as u32
    }

    /// Blocks that a tile's list is shared out to: a power of two, so that steps of nearly the same
    /// length are alike.
    pub(super) fn blocks(&self) -> usize {
        self.of_tile.max(1).next_power_of_two()
    }

    /// The tiles of each launch, of `tiles` in all.
    pub(super) fn launches(&self, tiles: usize) -> impl Iterator<Item = Range<usize>> {
        let starts = std::iter::once(0).chain(self.starts.iter().copied());
        let ends = self.starts.iter().copied().chain([tiles]);
        starts.zip(ends).map(|(start, end)| start..end)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn short_lists_have_short_parts() {
        let parts = [0, 32, 33, 128, 129, 256, 257, 2048].map(|pages| parts_of_list(pages, 16));
        assert_eq!(parts, [0, 1, 2, 4, 4, 4, 5, 32]);
        assert_eq!(parts_of_list(7, 1024), 4);
    }

    #[test]
    fn launches_leave_no_more_parts_than_there_is_room_for() {
        let mut parts = Parts::default();
        let launches = |parts: &Parts| {
            parts.launches(9).map(|tiles| [tiles.start, tiles.end]).collect::<Vec<_>>()
        };
        assert_eq!((launches(&parts), parts.blocks(), parts.most), (vec![[0, 9]], 1, 0));
        assert_eq!(parts.place(0, MOST_PARTS), 0);
        assert_eq!(launches(&parts), [[0, 9]]);
        let half = MOST_PARTS / 2;
        let rest = [(2, half), (3, half), (4, 3), (7, MOST_PARTS + 1), (8, 2)];
        let found = rest.map(|(tile, of_tile)| parts.place(tile, of_tile));
        assert_eq!(found, [0, half as u32, 0, 0, 0]);
        assert_eq!(launches(&parts), [[0, 2], [2, 4], [4, 7], [7, 8], [8, 9]]);
        assert_eq!((parts.most, parts.blocks()), (MOST_PARTS + 1, 2 * MOST_PARTS));
    }
}
