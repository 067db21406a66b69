//! What a call of attention reads, laid out on the host: tiles, lists and counts.

use std::ops::Range;

use bytemuck::{Pod, Zeroable};
use tinyserve_kv::{KvLayout, PageSelector, ScoreCost, Scorer, SelectionPolicy};

use super::super::bucket::bucket;
use super::super::pages::CudaPages;
use super::fused::{FusedChoice, is_fused};
use super::parts::{Parts, parts_of_list};
use crate::{AttendSequence, AttendStats, Attention, Heads};

/// Queries that one pass over keys and values serves, at most.
pub(super) const MOST_QUERIES: usize = 8;
/// As `ts::NO_PARTS`.
const NO_PARTS: u32 = u32::MAX;
/// Least pages that launches are made for.
const LEAST_BUCKET: usize = 16;
/// As `ts::FUSED`.
const FUSED: u32 = u32::MAX - 1;
/// As `ts::NO_TILE`.
const NO_TILE: u32 = u32::MAX;

/// `ts::Tile` in kernels/tile.cuh: neighbouring rows of one sequence.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Pod, Zeroable)]
#[repr(C)]
pub(super) struct TileRecord {
    row: u32,
    rows: u32,
    visible: u32,
    table: u32,
    pub(super) list: u32,
    pub(super) list_stride: u32,
    pub(super) lengths: u32,
    parts: u32,
    budget: u32,
    sink: u32,
    recent: u32,
    open: u32,
}

impl TileRecord {
    /// A tile of no rows, which fills up a bucket.
    const NOTHING: Self = Self {
        row: 0,
        rows: 0,
        visible: 0,
        table: 0,
        list: 0,
        list_stride: 0,
        lengths: 0,
        parts: NO_PARTS,
        budget: 0,
        sink: 0,
        recent: 0,
        open: u32::MAX,
    };
}

/// What pages are scored by, of what there are kernels for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Scored {
    /// The box of a page.
    Boxes,
    /// Mean and standard deviation of its keys.
    Moments,
}

impl Scored {
    /// What `policy` is run by on a device; `None` where it is run on the host.
    pub(super) fn of(policy: &SelectionPolicy) -> Option<Self> {
        match policy.scorer.name() {
            _ if !policy.ranks_by_maximum() => None,
            _ if policy.scorer == Scorer::BOX => Some(Self::Boxes),
            "mean-std" => Some(Self::Moments),
            _ => None,
        }
    }
}

/// Which pages a tile reads.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Pages {
    /// Every one, without a look at the boxes.
    Everything,
    /// The best ones, as many as the policy's budget.
    Best { scored_by: Scored, budget: usize, sink: usize, recent: usize },
    /// Those that a selector on the host chose, by KV head.
    Chosen,
}

/// A tile before it is laid out.
#[derive(Debug, Clone)]
pub(super) struct TilePlan {
    /// The sequence's number in the call.
    pub(super) sequence: usize,
    /// Rows of the batch.
    pub(super) rows: Range<usize>,
    /// Tokens that the first row sees.
    pub(super) visible: usize,
    pub(super) pages: Pages,
    /// With [`Pages::Chosen`], the list of each KV head.
    pub(super) chosen: Vec<Vec<u32>>,
}

impl TilePlan {
    /// Tokens that the last row sees.
    pub(super) fn tokens(&self) -> usize {
        self.visible + self.rows.len() - 1
    }

    /// Pages that `kv_head` reads, of `total`.
    pub(super) fn length(&self, kv_head: usize, total: usize) -> usize {
        match self.pages {
            Pages::Everything => total,
            Pages::Best { budget, .. } => budget,
            Pages::Chosen => self.chosen[kv_head].len(),
        }
    }

    pub(super) fn has_list(&self) -> bool {
        matches!(self.pages, Pages::Best { .. } | Pages::Chosen)
    }
}

/// Splits every sequence's rows into tiles: one row where pages are selected, elsewhere as many as
/// share a pass, of one page where sealed pages hold codes.
pub(super) fn tiles(
    sequences: &[AttendSequence<'_>],
    layer: usize,
    layout: &KvLayout,
    group: usize,
) -> Vec<TilePlan> {
    let together = (MOST_QUERIES / group).max(1);
    let page_size = layout.page_size();
    // A tile reads one page as it was appended: its rows are in it.
    let one_page = layout.shape().format.is_quantised();
    let mut tiles: Vec<TilePlan> = Vec::new();
    for (number, sequence) in sequences.iter().enumerate() {
        let first = tiles.len();
        for row in sequence.rows.clone() {
            let visible = sequence.first_position + row - sequence.rows.start + 1;
            let pages = match sequence.attention {
                Attention::Dense => Pages::Everything,
                // Until it was asked.
                Attention::Custom(_) => Pages::Chosen,
                Attention::Policy(policy) => {
                    match (policy.page_budget(layer, visible, page_size), Scored::of(policy)) {
                        (None, _) => Pages::Everything,
                        // Until it was asked on the host.
                        (Some(_), None) => Pages::Chosen,
                        (Some(budget), Some(scored_by)) => Pages::Best {
                            scored_by,
                            budget,
                            sink: policy.sink_pages,
                            recent: policy.recent_pages.max(1),
                        },
                    }
                }
            };
            match tiles[first..].last_mut() {
                Some(last)
                    if pages == Pages::Everything
                        && last.pages == Pages::Everything
                        && last.rows.len() < together
                        && !(one_page && (visible - 1).is_multiple_of(page_size)) =>
                {
                    last.rows.end = row + 1;
                }
                _ => tiles.push(TilePlan {
                    sequence: number,
                    rows: row..row + 1,
                    visible,
                    pages,
                    chosen: Vec::new(),
                }),
            }
        }
    }
    tiles
}

/// Tiles as kernels read them.
#[derive(Debug, Default)]
pub(super) struct Layout {
    pub(super) records: Vec<TileRecord>,
    /// Page ids of every sequence, one after the other.
    pub(super) tables: Vec<u32>,
    /// Lengths of the lists, by tile and KV head.
    pub(super) lengths: Vec<u32>,
    /// Tiles whose pages are scored: first those by boxes, then those by moments; either of them
    /// filled up to a bucket.
    pub(super) selecting: Vec<u32>,
    /// How many are scored by boxes.
    pub(super) by_boxes: usize,
    /// Those that are scored, selected for and attended to in one launch, filled up to a bucket, and
    /// most of their pages.
    pub(super) fused: Vec<u32>,
    pub(super) most_fused_pages: usize,
    /// Whether there are others.
    pub(super) attends: bool,
    /// Entries of all lists.
    pub(super) list_entries: usize,
    /// Lists that the host knows, by where they lie.
    pub(super) known_lists: Vec<(usize, Vec<u32>)>,
    /// Parts of one KV head.
    pub(super) parts: Parts,
    /// Most pages that are scored for one tile, as a power of two.
    pub(super) most_pages: usize,
    /// Most queries of a tile.
    pub(super) most_queries: usize,
}

impl Layout {
    pub(super) fn new(
        tiles: &[TilePlan],
        sequences: &[AttendSequence<'_>],
        pages: &CudaPages,
        heads: Heads,
        fused: FusedChoice,
    ) -> Self {
        let layout = pages.layout();
        let mut all = Self { most_queries: 1, ..Self::default() };
        let mut starts = Vec::with_capacity(sequences.len());
        for sequence in sequences {
            starts.push(all.tables.len() as u32);
            all.tables.extend(sequence.pages.iter().map(|page| page.index() as u32));
        }
        for (number, tile) in tiles.iter().enumerate() {
            let total = layout.pages_for(tile.tokens());
            let longest = (0..heads.kv_heads).map(|head| tile.length(head, total)).max();
            let longest = longest.unwrap_or(total);
            let mut record = TileRecord {
                row: tile.rows.start as u32,
                rows: tile.rows.len() as u32,
                visible: tile.visible as u32,
                table: starts[tile.sequence],
                list: 0,
                list_stride: 0,
                lengths: 0,
                parts: NO_PARTS,
                budget: 0,
                sink: 0,
                recent: 0,
                open: pages.open_slot(sequences[tile.sequence].pages[total - 1]),
            };
            if tile.has_list() {
                record.list = all.list_entries as u32;
                record.list_stride = longest as u32;
                record.lengths = all.lengths.len() as u32;
                let lengths = (0..heads.kv_heads).map(|head| tile.length(head, total) as u32);
                all.lengths.extend(lengths);
                for (kv_head, list) in tile.chosen.iter().enumerate() {
                    all.known_lists.push((all.list_entries + kv_head * longest, list.clone()));
                }
                all.list_entries += heads.kv_heads * longest;
            }
            if let Pages::Best { scored_by, budget, sink, recent } = tile.pages {
                let of = |n: usize| u32::try_from(n).unwrap_or(u32::MAX);
                (record.budget, record.sink, record.recent) = (of(budget), of(sink), of(recent));
                match scored_by {
                    _ if is_fused(tile, total, pages, heads.group(), fused) => {
                        all.fused.push(number as u32);
                        record.parts = FUSED;
                    }
                    // Those by boxes first.
                    Scored::Boxes => {
                        all.selecting.insert(all.by_boxes, number as u32);
                        all.by_boxes += 1;
                    }
                    Scored::Moments => all.selecting.push(number as u32),
                }
                let most = match record.parts {
                    FUSED => &mut all.most_fused_pages,
                    _ => &mut all.most_pages,
                };
                *most = total.max(*most);
            }
            let parts = parts_of_list(longest, layout.page_size());
            if tile.rows.len() == 1 && parts > 1 && record.parts != FUSED {
                record.parts = all.parts.place(number, parts);
            }
            all.most_queries = all.most_queries.max(tile.rows.len() * heads.group());
            all.records.push(record);
        }
        all.attends = all.fused.len() < tiles.len();
        all.fill_up();
        all.most_pages = page_bucket(all.most_pages);
        all.most_fused_pages = page_bucket(all.most_fused_pages);
        all
    }

    /// Fills lists of tiles up to buckets, so that steps of nearly as many sequences are alike.
    fn fill_up(&mut self) {
        self.records.resize(bucket(self.records.len()), TileRecord::NOTHING);
        self.fused.resize(bucket(self.fused.len()), NO_TILE);
        let mut by_moments = self.selecting.split_off(self.by_boxes);
        self.by_boxes = bucket(self.by_boxes);
        self.selecting.resize(self.by_boxes, NO_TILE);
        by_moments.resize(bucket(by_moments.len()), NO_TILE);
        self.selecting.append(&mut by_moments);
    }
}

/// Pages that launches are made for, so that steps of nearly the same length are alike.
pub(super) fn page_bucket(pages: usize) -> usize {
    if pages == 0 { 0 } else { pages.next_power_of_two().max(LEAST_BUCKET) }
}

impl Layout {
    /// The same tiles of those rows, reading every page.
    pub(super) fn everything(&self, page_size: usize) -> Self {
        let mut all = Self { most_queries: self.most_queries, ..Self::default() };
        for (number, record) in self.records.iter().enumerate() {
            let mut record = TileRecord { list_stride: 0, parts: NO_PARTS, ..*record };
            if record.rows == 0 {
                all.records.push(record);
                continue;
            }
            let tokens = (record.visible + record.rows - 1) as usize;
            let parts = parts_of_list(tokens.div_ceil(page_size), page_size);
            if record.rows == 1 && parts > 1 {
                record.parts = all.parts.place(number, parts);
            }
            all.records.push(record);
        }
        all
    }
}

/// What the rows of a tile read, as [`crate::Cpu`] counts it.
pub(super) fn count(
    tile: &TilePlan,
    layer: usize,
    layout: &KvLayout,
    heads: Heads,
    attention: Attention<'_>,
) -> AttendStats {
    let (size, format) = (layout.page_size(), layout.shape().format);
    let box_bytes = 2 * heads.head_dim * format.element_bytes();
    // Tokens of the page that a row is in itself are read as they were appended.
    let (sealed_bytes, own_bytes) = (2 * layout.token_head_bytes(), box_bytes);
    let mut stats = AttendStats::default();
    for kv_head in 0..heads.kv_heads {
        for i in 0..tile.rows.len() {
            let tokens = tile.visible + i;
            let pages = layout.pages_for(tokens);
            let own = tokens - (pages - 1) * size;
            let (seen, own_read) = match tile.pages {
                Pages::Everything => (pages, true),
                // The newest page is always among them; only it may be partial.
                Pages::Best { budget, .. } => (budget, true),
                Pages::Chosen => {
                    let list = &tile.chosen[kv_head];
                    (list.len(), list.last().is_some_and(|&last| last as usize + 1 == pages))
                }
            };
            let sealed = seen - usize::from(own_read);
            let cost = ScoreCost {
                tokens,
                pages,
                budget: seen,
                page_size: size,
                queries: heads.group(),
                head_dim: heads.head_dim,
                vector_bytes: heads.head_dim * format.element_bytes(),
            };
            let scored = match (tile.pages, attention) {
                (Pages::Everything, _) => 0,
                (_, Attention::Policy(policy)) => policy.bytes_read((layer, kv_head), &cost),
                (_, Attention::Custom(selector)) => selector.bytes_read((layer, kv_head), &cost),
                (_, Attention::Dense) => 0,
            };
            // Codes mean nothing without their box, whatever was read to choose them.
            let (boxes, dense_boxes) = if format.is_quantised() {
                (sealed * box_bytes + scored, (pages - 1) * box_bytes)
            } else {
                (scored, 0)
            };
            let bytes = |sealed: usize, own_read: bool| {
                sealed * size * sealed_bytes + if own_read { own * own_bytes } else { 0 }
            };
            stats.pages_read += seen as u64;
            stats.pages_total += pages as u64;
            stats.bytes_read += (bytes(sealed, own_read) + boxes) as u64;
            stats.bytes_dense += (bytes(pages - 1, true) + dense_boxes) as u64;
        }
    }
    stats
}
