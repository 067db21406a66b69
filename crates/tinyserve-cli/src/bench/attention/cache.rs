//! A cache of several layers, filled, and a query: what attention is measured over.

use std::num::NonZero;
use std::thread;

use anyhow::{Result, anyhow};
use clap::ValueEnum;
use serde::Serialize;
use tinyserve::kernels::{
    AppendKvArgs, AttendArgs, AttendSequence, AttendStats, Attention, DType, Heads,
};
use tinyserve::kv::{KvError, KvLayout, KvShape, PagePool, PageTable, Slot};
use tinyserve::model::SyntheticNormal;
use tinyserve::{KvCacheDtype, TinyServeError};

use crate::bench::device::{Measurable, StepSeconds};
use crate::{memory, units};

/// Keys and values of all layers together are at least this large, so that they come from memory
/// and not from a cache.
const LEAST_BYTES: usize = 384 << 20;
/// Tokens that are written at a time.
const FILL_TOKENS: usize = 1024;

/// What is measured.
#[derive(Debug, Clone, Copy)]
pub(super) struct Setup {
    pub(super) q_heads: usize,
    pub(super) kv_heads: usize,
    pub(super) head_dim: usize,
    pub(super) tokens: usize,
    pub(super) sequences: usize,
    pub(super) placement: Placement,
    pub(super) page_size: usize,
    pub(super) kv_cache_dtype: KvCacheDtype,
    /// Unless there are as many as [`LEAST_BYTES`] ask for.
    pub(super) layers: Option<usize>,
}

/// Where the pages of sequences lie that take turns to grow.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Serialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum Placement {
    /// In whole groups of neighbours, as the pool hands them out.
    Groups,
    /// In turn, each page beside another sequence's, as a pool without groups would.
    Alternating,
}

impl Placement {
    /// The tables of `sequences` sequences of `pages` pages each, and room for nothing else.
    fn grow(
        self,
        sequences: usize,
        (tokens, page_size): (usize, usize),
        pages: usize,
    ) -> Result<Vec<PageTable>, KvError> {
        let mut pool = PagePool::new(pages)?;
        let mut tables: Vec<_> = (0..sequences).map(|_| PageTable::new(page_size)).collect();
        let mut taken = Vec::new();
        if self == Self::Alternating {
            while let Ok(page) = pool.allocate() {
                taken.push(page);
            }
        }
        let mut next = taken.into_iter();
        for first in (0..tokens).step_by(page_size) {
            for table in &mut tables {
                // The only free page is the one that the table gets.
                next.next().map(|page| pool.release(page));
                // Nobody shares these pages, so there is none to copy.
                let _ = table.extend(&mut pool, page_size.min(tokens - first))?;
            }
        }
        Ok(tables)
    }
}

/// A cache of several layers, filled, and a query.
pub(super) struct Bench<B: Measurable> {
    pub(super) backend: B,
    pub(super) heads: Heads,
    /// The pages of each layer. They are apart, so that the page which a query's own token filled
    /// is there as it was appended when the query attends, as in a step of a model.
    pub(super) layers: Vec<B::KvPages>,
    /// The layout of one layer.
    pub(super) layout: KvLayout,
    tables: Vec<PageTable>,
    tokens: usize,
    /// The query of each sequence, and what comes of it: a step that comes again finds them where
    /// they were.
    qkv: B::Tensor,
    out: B::Tensor,
}

impl<B: Measurable> Bench<B> {
    pub(super) fn new(backend: B, args: &Setup) -> Result<Self> {
        let shape = KvShape {
            layers: 1,
            kv_heads: args.kv_heads,
            head_dim: args.head_dim,
            page_size: args.page_size,
            format: args.kv_cache_dtype.resolve(DType::F16),
        };
        let layout = KvLayout::new(shape).map_err(TinyServeError::from)?;
        let tokens = args.tokens.saturating_mul(args.sequences);
        let of_one = layout.bytes_per_token().saturating_mul(tokens);
        let layers = args.layers.unwrap_or_else(|| LEAST_BYTES.div_ceil(of_one));
        let count = layout.pages_for(args.tokens).saturating_mul(args.sequences);
        let needed = layout.bytes_per_page().saturating_mul(count).saturating_mul(layers) as u64;
        if let Some(available) = memory::available().filter(|&available| needed > available) {
            let [needed, available] = [needed, available].map(units::bytes);
            return Err(anyhow!(
                "--tokens {} needs {needed}, expected at most the {available} that this machine \
                 has available",
                args.tokens,
            ));
        }
        let heads =
            Heads { q_heads: args.q_heads, kv_heads: args.kv_heads, head_dim: args.head_dim };
        let pages = (0..layers).map(|_| backend.allocate_pages(layout, count));
        let mut layers = pages.collect::<Result<Vec<_>, _>>().map_err(TinyServeError::from)?;
        let size = (args.tokens, args.page_size);
        let tables =
            args.placement.grow(args.sequences, size, count).map_err(TinyServeError::from)?;
        // With the fewest query heads that a row may have: nobody reads these.
        let filled = Heads { q_heads: heads.kv_heads, ..heads };
        let mut qkv = backend.tensor(filled.qkv_width());
        let (mut rows, mut written) = (Vec::new(), 0);
        let mut append = |slots: &[Slot]| {
            rows.resize(slots.len() * filled.qkv_width(), 0.0);
            fill(&mut rows, filled, written);
            written += slots.len();
            backend.upload(&rows, &mut qkv);
            for pages in &mut layers {
                let heads = filled;
                backend.append_kv(AppendKvArgs { layer: 0, heads, qkv: &qkv, slots, pages });
            }
        };
        let last = args.tokens - 1;
        for table in &tables {
            for first in (0..last).step_by(FILL_TOKENS) {
                let tokens = first..last.min(first + FILL_TOKENS);
                append(&tokens.map(|i| table.slot(i)).collect::<Vec<_>>());
            }
        }
        append(&tables.iter().map(|table| table.slot(last)).collect::<Vec<_>>());
        let mut random = SyntheticNormal::new(0, "queries");
        let (mut qkv, out) =
            (backend.tensor(heads.qkv_width()), backend.tensor(heads.q_columns().len()));
        let queries: Vec<f32> =
            (0..tables.len() * heads.qkv_width()).map(|_| random.sample()).collect();
        backend.upload(&queries, &mut qkv);
        Ok(Self { backend, heads, layers, layout, tables, tokens: args.tokens, qkv, out })
    }

    /// Pages of all sequences in one layer.
    pub(super) fn page_count(&self) -> usize {
        self.tables.iter().map(|table| table.pages().len()).sum()
    }

    /// What one step through all layers takes, and what it reads.
    pub(super) fn run(&mut self, attention: Attention<'_>) -> Result<(StepSeconds, AttendStats)> {
        let tables = self.tables.iter().enumerate();
        let sequences: Vec<_> = tables
            .map(|(row, table)| AttendSequence {
                rows: row..row + 1,
                first_position: self.tokens - 1,
                pages: table.pages(),
                attention,
            })
            .collect();
        self.backend.finish()?;
        let (stats, seconds) = self.backend.time(|| {
            let mut stats = AttendStats::default();
            for pages in &self.layers {
                let args = AttendArgs {
                    layer: 0,
                    heads: self.heads,
                    qkv: &self.qkv,
                    scale: (self.heads.head_dim as f32).sqrt().recip(),
                    sequences: &sequences,
                    pages,
                    measure_recall: false,
                    page_lists: None,
                    sequence_stats: None,
                    observe: None,
                    out: &mut self.out,
                };
                stats.add(&self.backend.attend(args).map_err(TinyServeError::from)?);
            }
            Ok(stats)
        })?;
        Ok((seconds, stats))
    }

    /// The bandwidth of the backend, measured where the cache lay.
    pub(super) fn into_bandwidth(self) -> Result<f64> {
        let Self { backend, layers, qkv, out, .. } = self;
        drop((layers, qkv, out));
        backend.into_bandwidth()
    }
}

/// Draws the keys and values of `rows`, the first of which is token `first`, on all threads.
fn fill(rows: &mut [f32], heads: Heads, first: usize) {
    let width = heads.qkv_width();
    let threads = thread::available_parallelism().map_or(1, NonZero::get);
    let of_one = (rows.len() / width).div_ceil(threads);
    thread::scope(|scope| {
        for (i, part) in rows.chunks_mut(of_one * width).enumerate() {
            scope.spawn(move || {
                for (j, row) in part.chunks_mut(width).enumerate() {
                    // A stream of its own for each token, however many threads there are.
                    let token = (first + i * of_one + j) as u64;
                    let mut random = SyntheticNormal::new(token, "keys and values");
                    row[heads.q_columns().len()..].fill_with(|| random.sample());
                }
            });
        }
    });
}
