//! `tinyserve bench attention`: one attention step alone, sparse beside dense.

use std::fmt::Write;
use std::time::Instant;

use anyhow::{Result, anyhow};
use clap::{Args, ValueEnum};
use serde::Serialize;
use tinyserve::kernels::{
    AppendKvArgs, AttendArgs, AttendSequence, AttendStats, Attention, Backend, Cpu, CpuOptions,
    CpuPath, DType, Heads,
};
use tinyserve::kv::{
    Budget, HostPages, KvError, KvLayout, KvShape, PagePool, PageTable, SelectionPolicy, Slot,
};
use tinyserve::model::SyntheticNormal;
use tinyserve::{KvCacheDtype, TinyServeError};

use super::bandwidth::read_bandwidth;
use super::latency::Format;
use super::report::table;
use super::statistics::{deviation, mean, median};
use crate::exit::{Usage, out_of_range};
use crate::units::percent;
use crate::{memory, output, units, values};

/// Keys and values of all layers together are at least this large, so that they come from memory
/// and not from a cache.
const LEAST_BYTES: usize = 384 << 20;
/// Tokens that are written at a time.
const FILL_TOKENS: usize = 256;

#[derive(Debug, Args)]
pub(crate) struct AttentionArgs {
    /// Query heads.
    #[arg(long, value_name = "N", default_value = "32", value_parser = values::size)]
    q_heads: usize,
    /// Key/value heads, a divisor of the query heads.
    #[arg(long, value_name = "N", default_value = "4", value_parser = values::size)]
    kv_heads: usize,
    /// Channels of one head.
    #[arg(long, value_name = "N", default_value = "64", value_parser = values::size)]
    head_dim: usize,
    /// Tokens of each sequence in the cache.
    #[arg(long, value_name = "N", default_value = "32k", value_parser = values::size)]
    tokens: usize,
    /// Sequences, which grew side by side and attend in one step.
    #[arg(long, value_name = "N", default_value = "1", value_parser = values::size)]
    sequences: usize,
    /// Where the pages of sequences that grow side by side lie.
    #[arg(long, value_name = "WHERE", default_value = "groups")]
    placement: Placement,
    /// Tokens of one page.
    #[arg(long, value_name = "TOKENS", default_value = "16", value_parser = values::size)]
    page_size: usize,
    /// Element type of keys and values: f32, f16 or bf16.
    #[arg(long, value_name = "DTYPE", default_value = "f16", value_parser = values::kv_cache_dtype)]
    kv_cache_dtype: KvCacheDtype,
    /// Shares of the pages to read; each takes turns with dense attention.
    #[arg(
        long,
        value_name = "SHARE,…",
        value_delimiter = ',',
        default_value = "0.1,0.3",
        allow_negative_numbers = true
    )]
    ratios: Vec<f64>,
    /// Counted runs, after one that is not counted.
    #[arg(short, long, value_name = "N", default_value = "9", value_parser = values::size)]
    repetitions: usize,
    /// What to print.
    #[arg(short, long, value_name = "FORMAT", default_value = "md")]
    output: Format,
    /// Threads of the CPU [default: all].
    #[arg(short, long, value_name = "N", env = "TINYSERVE_THREADS", value_parser = values::size)]
    threads: Option<usize>,
    /// Instruction set of the CPU: scalar (the reference, one thread), portable, avx2 or avx512
    /// [default: the best there is].
    #[arg(long, value_name = "PATH", env = "TINYSERVE_CPU", value_parser = values::cpu_path)]
    cpu: Option<CpuPath>,
}

/// Where the pages of sequences lie that take turns to grow.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Serialize)]
#[serde(rename_all = "lowercase")]
enum Placement {
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

/// One way to attend, and its measurements.
#[derive(Debug, Clone, Serialize)]
struct Row {
    q_heads: usize,
    kv_heads: usize,
    head_dim: usize,
    n_tokens: usize,
    n_sequences: usize,
    placement: Placement,
    page_size: usize,
    kv_cache_dtype: &'static str,
    n_threads: usize,
    cpu_path: &'static str,
    /// Layers that a run goes through; times are of one.
    n_layers: usize,
    attention: &'static str,
    selection_ratio: Option<f64>,
    avg_ns: f64,
    stddev_ns: f64,
    median_ns: f64,
    /// Bytes of keys, values and boxes that one step reads.
    bytes_per_step: f64,
    gb_s: f64,
    read_bandwidth_gb_s: f64,
    /// The time that reading those bytes takes at that bandwidth, over the median time.
    roofline_fraction: f64,
    /// The time that a multiply-add for each element read and each query head that shares it
    /// takes at the speed measured in the same run, over the median time.
    fma_fraction: Option<f64>,
    fma_gflop_s: Option<f64>,
    /// Dense attention's median time over this one.
    speedup: f64,
    /// Dense attention's bytes over these: what the speed-up would be if bytes were all.
    byte_ceiling: f64,
}

/// A cache of several layers, filled, and a query.
struct Bench {
    backend: Cpu,
    heads: Heads,
    layers: usize,
    pages: HostPages,
    tables: Vec<PageTable>,
    tokens: usize,
}

/// Measures and prints.
pub(crate) fn attention(args: &AttentionArgs) -> Result<()> {
    check(args)?;
    let options = CpuOptions { threads: args.threads, path: args.cpu };
    let backend = Cpu::new(options).map_err(TinyServeError::from)?;
    let (threads, path) = (backend.threads(), backend.path().name());
    let mut modes = vec![None];
    for &ratio in &args.ratios {
        let policy = SelectionPolicy {
            budget: Budget::Ratio(ratio),
            dense_layers: 0,
            min_context: 0,
            ..SelectionPolicy::default()
        };
        policy.check().map_err(|_| out_of_range("--ratios", ratio, "above 0 and at most 1"))?;
        modes.push(Some(policy));
    }
    let bench = Bench::new(backend, args)?;
    let mut samples = vec![Vec::new(); modes.len()];
    let mut stats = vec![AttendStats::default(); modes.len()];
    for run in 0..=args.repetitions {
        for (i, mode) in modes.iter().enumerate() {
            let (seconds, of_run) =
                bench.run(mode.as_ref().map_or(Attention::Dense, Attention::Policy))?;
            // The first run warms up.
            if run > 0 {
                samples[i].push(1e9 * seconds / bench.layers as f64);
            }
            stats[i] = of_run;
        }
    }
    let layers = bench.layers;
    let fma = bench.backend.measure_fma();
    let element = bench.pages.layout().shape().format.element_bytes();
    let operations = 2.0 * bench.heads.group() as f64 / element as f64;
    drop(bench);
    let bandwidth = read_bandwidth(threads);
    let (dense, dense_bytes) = (median(&samples[0]), stats[0].bytes_read as f64);
    let rows: Vec<_> = modes
        .iter()
        .zip(samples.iter().zip(&stats))
        .map(|(mode, (samples, stats))| {
            let (time, bytes) = (median(samples), stats.bytes_read as f64 / layers as f64);
            let ratio = mode.as_ref().and_then(|policy| match policy.budget {
                Budget::Ratio(ratio) => Some(ratio),
                Budget::Tokens(_) | Budget::TopP(_) => None,
            });
            Row {
                q_heads: args.q_heads,
                kv_heads: args.kv_heads,
                head_dim: args.head_dim,
                n_tokens: args.tokens,
                n_sequences: args.sequences,
                placement: args.placement,
                page_size: args.page_size,
                kv_cache_dtype: args.kv_cache_dtype.resolve(DType::F16).name(),
                n_threads: threads,
                cpu_path: path,
                n_layers: layers,
                attention: if ratio.is_some() { "sparse" } else { "dense" },
                selection_ratio: ratio,
                avg_ns: mean(samples),
                stddev_ns: deviation(samples),
                median_ns: time,
                bytes_per_step: bytes,
                gb_s: bytes / time,
                read_bandwidth_gb_s: bandwidth / 1e9,
                roofline_fraction: 1e9 * bytes / time / bandwidth,
                fma_fraction: fma.map(|fma| 1e9 * bytes * operations / time / fma),
                fma_gflop_s: fma.map(|fma| fma / 1e9),
                speedup: dense / time,
                byte_ceiling: dense_bytes / stats.bytes_read as f64,
            }
        })
        .collect();
    match args.output {
        Format::Md => output::text(&markdown(&rows)),
        Format::Csv => output::text(&table(&rows)?),
        Format::Json => output::json(&rows),
    }
}

fn check(args: &AttentionArgs) -> Result<()> {
    for (flag, value) in [
        ("--q-heads", args.q_heads),
        ("--kv-heads", args.kv_heads),
        ("--head-dim", args.head_dim),
        ("--tokens", args.tokens),
        ("--sequences", args.sequences),
        ("--page-size", args.page_size),
        ("--repetitions", args.repetitions),
    ] {
        if value == 0 {
            return Err(out_of_range(flag, 0, "at least 1"));
        }
    }
    if !args.q_heads.is_multiple_of(args.kv_heads) {
        let (heads, kv_heads) = (args.q_heads, args.kv_heads);
        let sentence = format!("--kv-heads is {kv_heads}, expected a divisor of {heads}");
        return Err(Usage(sentence).into());
    }
    if args.placement == Placement::Alternating && args.sequences == 1 {
        return Err(out_of_range("--sequences", 1, "at least 2 with --placement alternating"));
    }
    if args.cpu == Some(CpuPath::Scalar) && args.threads.is_some_and(|threads| threads > 1) {
        return Err(out_of_range("--threads", args.threads.unwrap_or(0), "1 with --cpu scalar"));
    }
    Ok(())
}

impl Bench {
    fn new(backend: Cpu, args: &AttentionArgs) -> Result<Self> {
        let shape = |layers| KvShape {
            layers,
            kv_heads: args.kv_heads,
            head_dim: args.head_dim,
            page_size: args.page_size,
            format: args.kv_cache_dtype.resolve(DType::F16),
        };
        let layout = |layers| KvLayout::new(shape(layers)).map_err(TinyServeError::from);
        let tokens = args.tokens.saturating_mul(args.sequences);
        let of_one = layout(1)?.bytes_per_token().saturating_mul(tokens);
        let layers = LEAST_BYTES.div_ceil(of_one);
        let layout = layout(layers)?;
        let count = layout.pages_for(args.tokens).saturating_mul(args.sequences);
        let needed = layout.bytes_per_page().saturating_mul(count) as u64;
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
        let mut pages = backend.allocate_pages(layout, count).map_err(TinyServeError::from)?;
        let size = (args.tokens, args.page_size);
        let tables =
            args.placement.grow(args.sequences, size, count).map_err(TinyServeError::from)?;
        let mut random = SyntheticNormal::new(0, "keys and values");
        let mut qkv = backend.tensor(heads.qkv_width());
        for table in &tables {
            for first in (0..args.tokens).step_by(FILL_TOKENS) {
                let rows = FILL_TOKENS.min(args.tokens - first);
                backend.upload(&random_rows(heads, rows, &mut random), &mut qkv);
                let slots: Vec<Slot> = (first..first + rows).map(|i| table.slot(i)).collect();
                for layer in 0..layers {
                    let (qkv, slots, pages) = (&qkv, slots.as_slice(), &mut pages);
                    backend.append_kv(AppendKvArgs { layer, heads, qkv, slots, pages });
                }
            }
        }
        Ok(Self { backend, heads, layers, pages, tables, tokens: args.tokens })
    }

    /// Seconds of one step through all layers, and what it read.
    fn run(&self, attention: Attention<'_>) -> Result<(f64, AttendStats)> {
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
        let start = Instant::now();
        for layer in 0..self.layers {
            let args = AttendArgs {
                layer,
                heads: self.heads,
                qkv: &qkv,
                scale: (self.heads.head_dim as f32).sqrt().recip(),
                sequences: &sequences,
                pages: &self.pages,
                measure_recall: false,
                sequence_stats: None,
                observe: None,
                out: &mut out,
            };
            stats.add(&self.backend.attend(args).map_err(TinyServeError::from)?);
        }
        Ok((start.elapsed().as_secs_f64(), stats))
    }
}

fn random_rows(heads: Heads, rows: usize, random: &mut SyntheticNormal) -> Vec<f32> {
    (0..rows * heads.qkv_width()).map(|_| random.sample()).collect()
}

/// How many there are, and where their pages lie.
fn sequences(row: &Row) -> String {
    match (row.n_sequences, row.placement) {
        (1, _) => "1".to_owned(),
        (n, Placement::Groups) => format!("{n} in groups"),
        (n, Placement::Alternating) => format!("{n} alternating"),
    }
}

fn markdown(rows: &[Row]) -> String {
    let mut text = "| heads | head dim | tokens | sequences | page | kv | threads | attention | µs | GB/s \
                    | of bandwidth | of FMA | speed-up | byte ceiling |\n\
                    | --- | ---: | ---: | --- | ---: | --- | ---: | --- | ---: | ---: | ---: | ---: \
                    | ---: | ---: |\n"
        .to_owned();
    for row in rows {
        let ratio = row.selection_ratio.map_or(String::new(), |ratio| format!(" {ratio}"));
        let _ = writeln!(
            text,
            "| {}/{} | {} | {} | {} | {} | {} | {} | {}{ratio} | {:.1} ± {:.1} | {:.1} | {} | {} \
             | {:.2} | {:.2} |",
            row.q_heads,
            row.kv_heads,
            row.head_dim,
            row.n_tokens,
            sequences(row),
            row.page_size,
            row.kv_cache_dtype,
            row.n_threads,
            row.attention,
            row.median_ns / 1e3,
            row.stddev_ns / 1e3,
            row.gb_s,
            percent(row.roofline_fraction),
            row.fma_fraction.map_or("—".to_owned(), percent),
            row.speedup,
            row.byte_ceiling,
        );
    }
    text
}
