//! `tinyserve bench memory`: what a token of the cache takes, from memory that is really resident.

use std::fmt::Write;

use anyhow::{Result, anyhow};
use clap::Args;
use clap::builder::{PossibleValuesParser, TypedValueParser};
use serde::Serialize;
use tinyserve::kernels::{AppendKvArgs, Backend, Cpu, CpuOptions, DType, Heads};
use tinyserve::kv::{KvLayout, PagePool, PageTable, Slot};
use tinyserve::model::{SyntheticModel, SyntheticNormal, SyntheticShape};
use tinyserve::{KvCacheDtype, TinyServeError};

use super::latency::Format;
use super::report::table;
use crate::exit::out_of_range;
use crate::{memory, output, units, values};

/// Tokens that are written at a time.
const FILL_TOKENS: usize = 256;

#[derive(Debug, Args)]
pub(crate) struct MemoryArgs {
    /// Shapes of the models whose cache is filled.
    #[arg(
        long,
        value_delimiter = ',',
        default_value = "tinyllama-1.1b,gpt2-345m",
        value_parser = PossibleValuesParser::new(SyntheticShape::ALL.map(SyntheticShape::name))
            .try_map(|name| name.parse::<SyntheticShape>())
    )]
    shape: Vec<SyntheticShape>,
    /// How keys and values are stored; ratios are to the first.
    #[arg(long, value_name = "DTYPE,…", value_delimiter = ',', default_value = "f16,int8,int4",
          value_parser = values::kv_cache_dtype)]
    kv_cache_dtype: Vec<KvCacheDtype>,
    /// Tokens of the sequence in the cache.
    #[arg(short = 'd', long, value_name = "N", default_value = "8k", value_parser = values::size)]
    depth: usize,
    /// Tokens of one page.
    #[arg(long, visible_alias = "block-size", value_name = "TOKENS", default_value = "16",
          value_parser = values::size)]
    page_size: usize,
    /// What to print.
    #[arg(short, long, value_name = "FORMAT", default_value = "md")]
    output: Format,
}

/// One format of one shape.
#[derive(Debug, Serialize)]
struct Row {
    shape: &'static str,
    kv_cache_dtype: &'static str,
    n_depth: usize,
    page_size: usize,
    layers: usize,
    kv_heads: usize,
    head_dim: usize,
    /// Bytes that became resident while the cache was made and filled.
    resident_bytes: u64,
    /// Those of each token.
    bytes_per_token: f64,
    /// Bytes of a token by the layout: keys and values with their scales, and its share of boxes.
    layout_bytes_per_token: f64,
    /// Over the resident bytes of the shape's first format.
    ratio: f64,
}

/// Fills caches and prints what they take.
pub(crate) fn memory(args: &MemoryArgs) -> Result<()> {
    for (flag, value) in [("--depth", args.depth), ("--page-size", args.page_size)] {
        if value == 0 {
            return Err(out_of_range(flag, 0, "at least 1"));
        }
    }
    let mut rows = Vec::new();
    for &shape in &args.shape {
        let first = rows.len();
        for dtype in &args.kv_cache_dtype {
            let mut row = measure(shape, *dtype, args)?;
            let first = rows.get(first).map_or(row.resident_bytes, |row: &Row| row.resident_bytes);
            row.ratio = row.resident_bytes as f64 / first as f64;
            rows.push(row);
        }
    }
    match args.output {
        Format::Md => output::text(&markdown(&rows)),
        Format::Csv => output::text(&table(&rows)?),
        Format::Json => output::json(&rows),
    }
}

fn measure(shape: SyntheticShape, dtype: KvCacheDtype, args: &MemoryArgs) -> Result<Row> {
    let model = SyntheticModel::new(shape, DType::F16).config().map_err(TinyServeError::from)?;
    let format = dtype.resolve(DType::F16);
    let layout = model.kv_layout(args.page_size, format).map_err(TinyServeError::from)?;
    let needed =
        (layout.bytes_per_page() as u64).saturating_mul(layout.pages_for(args.depth) as u64);
    if let Some(available) = memory::available().filter(|&available| needed > available) {
        let [needed, available] = [needed, available].map(units::bytes);
        return Err(anyhow!(
            "--depth {} of {} in {format} needs {needed}, expected at most the {available} that \
             this machine has available",
            args.depth,
            shape.name(),
        ));
    }
    let heads =
        Heads { q_heads: model.q_heads, kv_heads: model.kv_heads, head_dim: model.head_dim };
    let resident_bytes = fill(heads, layout, args.depth)?;
    let tokens = args.depth as f64;
    Ok(Row {
        shape: shape.name(),
        kv_cache_dtype: format.name(),
        n_depth: args.depth,
        page_size: args.page_size,
        layers: model.layers,
        kv_heads: model.kv_heads,
        head_dim: model.head_dim,
        resident_bytes,
        bytes_per_token: resident_bytes as f64 / tokens,
        layout_bytes_per_token: layout.bytes_per_page() as f64 / args.page_size as f64,
        ratio: 1.0,
    })
}

/// Bytes that become resident while a cache is made and `tokens` tokens are appended to it.
fn fill(heads: Heads, layout: KvLayout, tokens: usize) -> Result<u64> {
    let backend = Cpu::new(CpuOptions::default()).map_err(TinyServeError::from)?;
    let mut random = SyntheticNormal::new(0, "keys and values");
    let mut qkv = backend.tensor(heads.qkv_width());
    let most = FILL_TOKENS.min(tokens);
    // The same keys and values for every layer and chunk take as much memory as others.
    let row: Vec<f32> = (0..most * heads.qkv_width()).map(|_| random.sample()).collect();
    backend.upload(&row, &mut qkv);
    let resident =
        || memory::resident().ok_or_else(|| anyhow!("this system does not say what is resident"));
    let before = resident()?;
    let pages = layout.pages_for(tokens);
    let mut pool = PagePool::new(pages).map_err(TinyServeError::from)?;
    let mut cache = backend.allocate_pages(layout, pages).map_err(TinyServeError::from)?;
    let mut table = PageTable::new(layout.page_size());
    // Nobody shares these pages, so there is none to copy.
    let _ = table.extend(&mut pool, tokens).map_err(TinyServeError::from)?;
    for first in (0..tokens).step_by(FILL_TOKENS) {
        let rows = FILL_TOKENS.min(tokens - first);
        backend.upload(&row[..rows * heads.qkv_width()], &mut qkv);
        let slots: Vec<Slot> = (first..first + rows).map(|i| table.slot(i)).collect();
        for layer in 0..layout.shape().layers {
            let (qkv, slots, pages) = (&qkv, slots.as_slice(), &mut cache);
            backend.append_kv(AppendKvArgs { layer, heads, qkv, slots, pages });
        }
    }
    let after = resident()?;
    table.release(&mut pool);
    Ok(after.saturating_sub(before))
}

fn markdown(rows: &[Row]) -> String {
    let mut text = "| shape | kv | page | tokens | resident | bytes per token | by the layout \
                    | of the first |\n\
                    | --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |\n"
        .to_owned();
    for row in rows {
        let _ = writeln!(
            text,
            "| {} | {} | {} | {} | {} | {:.0} | {:.0} | {:.3} |",
            row.shape,
            row.kv_cache_dtype,
            row.page_size,
            row.n_depth,
            units::bytes(row.resident_bytes),
            row.bytes_per_token,
            row.layout_bytes_per_token,
            row.ratio,
        );
    }
    text
}
