//! A cache of several layers, filled, and a query: what attention is measured over.

use std::time::Instant;

use anyhow::{Result, anyhow};
use clap::ValueEnum;
use serde::Serialize;
use tinyserve::kernels::{
    AppendKvArgs, AttendArgs, AttendSequence, AttendStats, Attention, DType, Heads,
};
use tinyserve::kv::{KvError, KvLayout, KvShape, PagePool, PageTable, Slot};
use tinyserve::model::SyntheticNormal;
use tinyserve::{KvCacheDtype, TinyServeError};

use crate::bench::device::Measurable;
use crate::{memory, units};

/// Keys and values of all layers together are at least this large, so that they come from memory
/// and not from a cache.
const LEAST_BYTES: usize = 384 << 20;
/// Tokens that are written at a time.
const FILL_TOKENS: usize = 256;

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
        let mut random = SyntheticNormal::new(0, "keys and values");
        let mut qkv = backend.tensor(heads.qkv_width());
        let mut append = |slots: &[Slot]| {
            backend.upload(&random_rows(heads, slots.len(), &mut random), &mut qkv);
            for pages in &mut layers {
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
        Ok(Self { backend, heads, layers, layout, tables, tokens: args.tokens })
    }

    /// Pages of all sequences in one layer.
    pub(super) fn page_count(&self) -> usize {
        self.tables.iter().map(|table| table.pages().len()).sum()
    }

    /// Seconds of one step through all layers, and what it read.
    pub(super) fn run(&self, attention: Attention<'_>) -> Result<(f64, AttendStats)> {
        let mut random = SyntheticNormal::new(0, "queries");
        let mut qkv = self.backend.tensor(self.heads.qkv_width());
        let rows = self.tables.len();
        self.backend.upload(&random_rows(self.heads, rows, &mut random), &mut qkv);
        let mut out = self.backend.tensor(self.heads.q_columns().len());
        let tables = self.tables.iter().enumerate();
        let sequences: Vec<_> = tables
            .map(|(row, table)| AttendSequence {
                rows: row..row + 1,
                first_position: self.tokens - 1,
                pages: table.pages(),
                attention,
            })
            .collect();
        let mut stats = AttendStats::default();
        self.backend.finish()?;
        let start = Instant::now();
        for pages in &self.layers {
            let args = AttendArgs {
                layer: 0,
                heads: self.heads,
                qkv: &qkv,
                scale: (self.heads.head_dim as f32).sqrt().recip(),
                sequences: &sequences,
                pages,
                measure_recall: false,
                page_lists: None,
                sequence_stats: None,
                observe: None,
                out: &mut out,
            };
            stats.add(&self.backend.attend(args).map_err(TinyServeError::from)?);
        }
        self.backend.finish()?;
        Ok((start.elapsed().as_secs_f64(), stats))
    }

    /// The bandwidth of the backend, measured where the cache lay.
    pub(super) fn into_bandwidth(self) -> Result<f64> {
        let Self { backend, layers, .. } = self;
        drop(layers);
        backend.into_bandwidth()
    }
}

fn random_rows(heads: Heads, rows: usize, random: &mut SyntheticNormal) -> Vec<f32> {
    (0..rows * heads.qkv_width()).map(|_| random.sample()).collect()
}
