//! `tinyserve bench attention`: one attention step alone, sparse beside dense.

mod cache;
mod table;

use std::fs;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow};
use clap::Args;
use serde::Serialize;
use tinyserve::kernels::{AttendStats, Attention, Cpu, CpuOptions, CpuPath, Cuda, DType};
use tinyserve::kv::{Budget, PageSummary, SelectionPolicy};
use tinyserve::{Device, KvCacheDtype, ScorerName, TinyServeError};
use tinyserve_lab::Axes;

use super::device::Measurable;
use super::latency::Format;
use super::report;
use super::statistics::{deviation, mean, median};
use crate::exit::{Quiet, Usage, out_of_range};
use crate::interrupt::Interrupt;
use crate::progress::Progress;
use crate::{output, values};

use cache::{Bench, Placement, Setup};
use table::{crossovers, even, lines, markdown};

#[derive(Debug, Args)]
pub(crate) struct AttentionArgs {
    /// Query heads.
    #[arg(long, value_name = "N", default_value = "32", value_parser = values::size)]
    q_heads: usize,
    /// Key/value heads, divisors of the query heads.
    #[arg(long, value_name = "N,…", value_delimiter = ',', default_value = "4",
          value_parser = values::size)]
    kv_heads: Vec<usize>,
    /// Channels of one head.
    #[arg(long, value_name = "N", default_value = "64", value_parser = values::size)]
    head_dim: usize,
    /// Tokens of each sequence in the cache.
    #[arg(long, value_name = "N,…", value_delimiter = ',', default_value = "32k",
          value_parser = values::size)]
    tokens: Vec<usize>,
    /// Sequences, which grew side by side and attend in one step.
    #[arg(long, value_name = "N", default_value = "1", value_parser = values::size)]
    sequences: usize,
    /// Where the pages of sequences that grow side by side lie.
    #[arg(long, value_name = "WHERE", default_value = "groups")]
    placement: Placement,
    /// Tokens of one page [default: 16].
    #[arg(long, value_name = "TOKENS,…", value_delimiter = ',', value_parser = values::size)]
    page_size: Vec<usize>,
    /// Pages of each sequence, instead of the size of one: with --tokens the published
    /// benchmark_attention(input_size, num_pages), of 10 runs that are not counted and 100 that are.
    #[arg(long, value_name = "N", conflicts_with = "page_size", value_parser = values::size)]
    num_pages: Option<usize>,
    /// How keys and values are stored: f32, f16, bf16, int8 or int4.
    #[arg(long, value_name = "DTYPE,…", value_delimiter = ',', default_value = "f16",
          value_parser = values::kv_cache_dtype)]
    kv_cache_dtype: Vec<KvCacheDtype>,
    /// Shares of the pages to read; each takes turns with dense attention.
    #[arg(
        long,
        value_name = "SHARE,…",
        value_delimiter = ',',
        default_value = "0.1,0.3",
        allow_negative_numbers = true
    )]
    ratios: Vec<f64>,
    /// What pages are scored by: each with each share.
    #[arg(long, value_name = "NAME,…", value_delimiter = ',', default_value = "box",
          value_parser = values::scorer)]
    scorer: Vec<ScorerName>,
    /// Counted runs [default: 9, with --num-pages 100].
    #[arg(short, long, value_name = "N", value_parser = values::size)]
    repetitions: Option<usize>,
    /// Runs before them that are not counted [default: 1, with --num-pages 10].
    #[arg(long, value_name = "N", value_parser = values::size)]
    warm_ups: Option<usize>,
    /// Draws the speed-up over dense attention against the tokens in the cache into an .svg file.
    #[arg(long, value_name = "FILE")]
    plot: Option<PathBuf>,
    /// What to print.
    #[arg(short, long, value_name = "FORMAT", default_value = "md")]
    output: Format,
    /// Threads of the CPU [default: all].
    #[arg(short, long, value_name = "N", env = "TINYSERVE_THREADS", value_parser = values::size)]
    threads: Option<usize>,
    /// Instruction set of the CPU: scalar (the reference, one thread), portable, neon, avx2 or
    /// avx512, or one of those that `run` has [default: the best there is].
    #[arg(long, value_name = "PATH", env = "TINYSERVE_CPU", value_parser = values::cpu_path)]
    cpu: Option<CpuPath>,
    /// auto (the CPU), cpu, cuda or cuda:N.
    #[arg(long, env = "TINYSERVE_DEVICE", default_value = "auto", value_parser = values::device)]
    device: Device,
    /// Layers that a run goes through [default: as many as no processor's cache holds].
    #[arg(long, value_name = "N", value_parser = values::size)]
    layers: Option<usize>,
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
    device: String,
    n_threads: usize,
    cpu_path: Option<&'static str>,
    /// Layers that a run goes through; times are of one.
    n_layers: usize,
    attention: &'static str,
    scorer: Option<&'static str>,
    selection_ratio: Option<f64>,
    /// Runs that are counted: fewer than asked for after Ctrl-C.
    n_runs: usize,
    /// Whose clock times are read from: `host`, or `device` for events around its launches.
    clock: &'static str,
    avg_attention_time_ms: f64,
    /// Tokens in the cache over the average time.
    throughput_tokens_per_ms: f64,
    avg_ns: f64,
    stddev_ns: f64,
    median_ns: f64,
    /// Laying a step out on the host, where the device has a clock of its own: the median.
    host_ns: Option<f64>,
    /// Scoring pages, turning scores into lists, and reading the pages: medians of runs of their
    /// own, in which the phases are timed.
    /// Only the CPU tells them apart.
    score_ns: Option<f64>,
    select_ns: Option<f64>,
    attend_ns: Option<f64>,
    /// Bytes of keys, values and boxes, and of what the scorer keeps beside them, that one layer
    /// has in memory.
    bytes_resident: usize,
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

/// Tokens of one page unless asked for.
const PAGE_SIZE: usize = 16;
/// Runs that are not counted and runs that are, unless asked for.
const RUNS: (usize, usize) = (1, 9);
/// The same of the published benchmark_attention.
const PUBLISHED_RUNS: (usize, usize) = (10, 100);
/// Runs whose phases are timed apart, at most.
const SPLIT_RUNS: usize = 5;

/// Measures every combination and prints.
pub(crate) fn attention(args: &AttentionArgs) -> Result<()> {
    check(args)?;
    let mut modes = vec![None];
    for (scorer, &ratio) in
        args.scorer.iter().flat_map(|name| args.ratios.iter().map(move |ratio| (name, ratio)))
    {
        let policy = SelectionPolicy {
            scorer: scorer.0,
            budget: Budget::Ratio(ratio),
            dense_layers: 0,
            min_context: 0,
            ..SelectionPolicy::default()
        };
        policy.check().map_err(|_| out_of_range("--ratios", ratio, "above 0 and at most 1"))?;
        modes.push(Some(policy));
    }
    let setups = setups(args);
    let mut bandwidth = None;
    let mut rows = Vec::new();
    let interrupt = Interrupt::listen()?;
    let mut progress = Progress::new("caches");
    for (done, &setup) in setups.iter().enumerate() {
        progress.update(done, setups.len());
        rows.extend(match args.device {
            Device::Cuda(number) => {
                let cuda = Cuda::new(number).map_err(TinyServeError::from)?;
                measure(cuda, (args, &interrupt), setup, &modes, &mut bandwidth)?
            }
            Device::Auto | Device::Cpu => {
                let options = CpuOptions { threads: args.threads, path: args.cpu };
                let cpu = Cpu::new(options).map_err(TinyServeError::from)?;
                measure(cpu, (args, &interrupt), setup, &modes, &mut bandwidth)?
            }
        });
        if interrupt.pressed() {
            break;
        }
    }
    progress.finish();
    match args.output {
        Format::Md => output::text(&format!("{}{}", markdown(&rows), crossovers(&rows)))?,
        Format::Csv => output::text(&report::table(&rows)?)?,
        Format::Json => output::json(&rows)?,
    }
    if let Some(file) = &args.plot {
        let title = "Speed-up of an attention step over dense attention";
        let mut drawn = lines(&rows);
        drawn.push(even(&rows));
        let axes = Axes { x: "tokens in the cache", y: "times as fast", log_y: false };
        let svg = tinyserve_lab::lines(title, axes, &drawn);
        let svg = svg.map_err(|error| anyhow!("{error}"))?;
        fs::write(file, svg).with_context(|| format!("{} cannot be written", file.display()))?;
    }
    if interrupt.pressed() { Err(Quiet::Interrupted.into()) } else { Ok(()) }
}

/// Tokens of the cache that a self-test attends to: keys and values are more than a device's cache
/// holds.
const SELF_TEST_TOKENS: usize = 32 << 10;

/// Runs of a self-test whose median counts, and the time after which there are no more.
const SELF_TEST_RUNS: usize = 9;
const SELF_TEST_TIME: Duration = Duration::from_millis(500);

/// The median of the times that `run` tells.
pub(crate) fn typical(mut run: impl FnMut() -> Result<f64>) -> Result<f64> {
    let (start, mut times) = (Instant::now(), Vec::new());
    while times.is_empty() || (times.len() < SELF_TEST_RUNS && start.elapsed() < SELF_TEST_TIME) {
        times.push(run()?);
    }
    Ok(median(&times))
}

/// Bytes that dense attention, and attention to a tenth of the pages, read in a second.
pub(crate) fn bandwidths(number: usize) -> Result<Vec<(&'static str, f64)>> {
    let setup = Setup {
        q_heads: 32,
        kv_heads: 8,
        head_dim: 128,
        tokens: SELF_TEST_TOKENS,
        sequences: 1,
        placement: Placement::Groups,
        page_size: PAGE_SIZE,
        kv_cache_dtype: KvCacheDtype::F16,
        layers: Some(1),
    };
    let mut bench = Bench::new(Cuda::new(number).map_err(TinyServeError::from)?, &setup)?;
    let policy = SelectionPolicy {
        budget: Budget::Ratio(0.1),
        dense_layers: 0,
        min_context: 0,
        ..SelectionPolicy::default()
    };
    let modes =
        [("dense attention", Attention::Dense), ("sparse attention", Attention::Policy(&policy))];
    modes
        .into_iter()
        .map(|(name, mode)| {
            // The first one loads kernels.
            let (_, stats) = bench.run(mode)?;
            let seconds = typical(|| Ok(bench.run(mode)?.0.step))?;
            Ok((name, stats.bytes_read as f64 / seconds))
        })
        .collect()
}

fn setups(args: &AttentionArgs) -> Vec<Setup> {
    let mut setups = Vec::new();
    for &kv_cache_dtype in &args.kv_cache_dtype {
        for &kv_heads in &args.kv_heads {
            for &tokens in &args.tokens {
                let sizes = match args.num_pages {
                    Some(pages) => vec![tokens.div_ceil(pages)],
                    None if args.page_size.is_empty() => vec![PAGE_SIZE],
                    None => args.page_size.clone(),
                };
                setups.extend(sizes.into_iter().map(|page_size| Setup {
                    q_heads: args.q_heads,
                    kv_heads,
                    head_dim: args.head_dim,
                    tokens,
                    sequences: args.sequences,
                    placement: args.placement,
                    page_size,
                    kv_cache_dtype,
                    layers: args.layers,
                }));
            }
        }
    }
    setups
}

/// Runs that are not counted, and runs that are.
fn runs(args: &AttentionArgs) -> (usize, usize) {
    let (warm_ups, repetitions) = if args.num_pages.is_some() { PUBLISHED_RUNS } else { RUNS };
    (args.warm_ups.unwrap_or(warm_ups), args.repetitions.unwrap_or(repetitions))
}

/// Dense attention and each policy over one cache, in turns; after Ctrl-C as often as until then,
/// but once.
fn measure<B: Measurable>(
    backend: B,
    (args, interrupt): (&AttentionArgs, &Interrupt),
    setup: Setup,
    modes: &[Option<SelectionPolicy>],
    bandwidth: &mut Option<f64>,
) -> Result<Vec<Row>> {
    let (device, threads, path) = (backend.device(), backend.threads(), backend.path());
    let clock = backend.clock();
    let mut bench = Bench::new(backend, &setup)?;
    let mut hosts = vec![Vec::new(); modes.len()];
    let mut samples = vec![Vec::new(); modes.len()];
    let mut stats = vec![AttendStats::default(); modes.len()];
    let (warm_ups, repetitions) = runs(args);
    for run in 0..warm_ups + repetitions {
        if run > warm_ups && interrupt.pressed() {
            break;
        }
        for (i, mode) in modes.iter().enumerate() {
            let (seconds, of_run) =
                bench.run(mode.as_ref().map_or(Attention::Dense, Attention::Policy))?;
            if run >= warm_ups {
                let per_layer = |seconds: f64| 1e9 * seconds / bench.layers.len() as f64;
                samples[i].push(per_layer(seconds.step));
                hosts[i].extend(seconds.host.map(per_layer));
            }
            stats[i] = of_run;
        }
    }
    let layers = bench.layers.len();
    let resident = |mode: &Option<SelectionPolicy>| {
        let kept = mode.filter(|policy| path.is_some() && Cpu::has_kernels(policy));
        let kept = kept.and_then(|policy| policy.scorer.summary()).map_or(0, PageSummary::boxes);
        let page = bench.layout.bytes_per_page() + kept * bench.layout.box_bytes_per_page();
        page * bench.page_count()
    };
    let residents: Vec<_> = modes.iter().map(resident).collect();
    bench.backend.time_selection(true);
    let mut splits = vec![[const { Vec::new() }; 3]; modes.len()];
    for run in 0..repetitions.min(SPLIT_RUNS) {
        if run > 0 && interrupt.pressed() {
            break;
        }
        for (mode, split) in modes.iter().zip(&mut splits) {
            bench.backend.take_selection_times();
            let attention = mode.as_ref().map_or(Attention::Dense, Attention::Policy);
            let (seconds, _) = bench.run(attention)?;
            let Some(times) = bench.backend.take_selection_times() else { continue };
            let per_layer = |seconds: f64| 1e9 * seconds / layers as f64;
            let [score, select] =
                [times.score, times.select].map(|time| per_layer(time.as_secs_f64()));
            let phases = [score, select, per_layer(seconds.step) - score - select];
            split.iter_mut().zip(phases).for_each(|(phase, time)| phase.push(time));
        }
    }
    let fma = bench.backend.fma();
    // A multiply and an add for each query head, for each element of a page's keys and values.
    let operations = (4 * bench.heads.group() * bench.layout.head_elements()) as f64;
    let bandwidth = match *bandwidth {
        Some(bandwidth) => bandwidth,
        None => *bandwidth.insert(bench.into_bandwidth()?),
    };
    let (dense, dense_bytes) = (median(&samples[0]), stats[0].bytes_read as f64);
    let rows = modes.iter().enumerate().map(|(i, mode)| {
        let (samples, stats) = (&samples[i], &stats[i]);
        let [score, select, attend] = [0, 1, 2].map(|phase| {
            let times = &splits[i][phase];
            (!times.is_empty()).then(|| median(times))
        });
        let (time, bytes) = (median(samples), stats.bytes_read as f64 / layers as f64);
        let ratio = mode.as_ref().and_then(|policy| match policy.budget {
            Budget::Ratio(ratio) => Some(ratio),
            Budget::Tokens(_) | Budget::TopP(_) => None,
        });
        Row {
            q_heads: setup.q_heads,
            kv_heads: setup.kv_heads,
            head_dim: setup.head_dim,
            n_tokens: setup.tokens,
            n_sequences: setup.sequences,
            placement: setup.placement,
            page_size: setup.page_size,
            kv_cache_dtype: setup.kv_cache_dtype.resolve(DType::F16).name(),
            device: device.clone(),
            n_threads: threads,
            cpu_path: path,
            n_layers: layers,
            attention: if ratio.is_some() { "sparse" } else { "dense" },
            scorer: mode.as_ref().map(|policy| policy.scorer.name()),
            selection_ratio: ratio,
            n_runs: samples.len(),
            clock,
            avg_attention_time_ms: mean(samples) / 1e6,
            throughput_tokens_per_ms: 1e6 * setup.tokens as f64 / mean(samples),
            avg_ns: mean(samples),
            stddev_ns: deviation(samples),
            median_ns: time,
            host_ns: (!hosts[i].is_empty()).then(|| median(&hosts[i])),
            score_ns: score,
            select_ns: select,
            attend_ns: attend,
            bytes_resident: residents[i],
            bytes_per_step: bytes,
            gb_s: bytes / time,
            read_bandwidth_gb_s: bandwidth / 1e9,
            roofline_fraction: 1e9 * bytes / time / bandwidth,
            fma_fraction: fma.map(|fma| {
                let pages = stats.pages_read as f64 / layers as f64;
                1e9 * pages * operations / time / fma
            }),
            fma_gflop_s: fma.map(|fma| fma / 1e9),
            speedup: dense / time,
            byte_ceiling: dense_bytes / stats.bytes_read as f64,
        }
    });
    Ok(rows.collect())
}

fn check(args: &AttentionArgs) -> Result<()> {
    let lists = [
        ("--kv-heads", &args.kv_heads),
        ("--tokens", &args.tokens),
        ("--page-size", &args.page_size),
    ];
    let lists = lists.into_iter().flat_map(|(flag, list)| list.iter().map(move |&n| (flag, n)));
    let single = [
        ("--q-heads", args.q_heads),
        ("--head-dim", args.head_dim),
        ("--sequences", args.sequences),
        ("--repetitions", args.repetitions.unwrap_or(1)),
        ("--num-pages", args.num_pages.unwrap_or(1)),
        ("--layers", args.layers.unwrap_or(1)),
    ];
    for (flag, value) in single.into_iter().chain(lists) {
        if value == 0 {
            return Err(out_of_range(flag, 0, "at least 1"));
        }
    }
    if let Some(kv_heads) = args.kv_heads.iter().find(|&&n| !args.q_heads.is_multiple_of(n)) {
        let sentence = format!("--kv-heads is {kv_heads}, expected a divisor of {}", args.q_heads);
        return Err(Usage(sentence).into());
    }
    if args.placement == Placement::Alternating && args.sequences == 1 {
        return Err(out_of_range("--sequences", 1, "at least 2 with --placement alternating"));
    }
    if args.cpu == Some(CpuPath::Scalar) && args.threads.is_some_and(|threads| threads > 1) {
        return Err(out_of_range("--threads", args.threads.unwrap_or(0), "1 with --cpu scalar"));
    }
    match &args.plot {
        Some(file) if file.extension().is_none_or(|extension| extension != "svg") => {
            Err(out_of_range("--plot", file.display(), "a file that ends in .svg"))
        }
        Some(file) => output::has_place(file),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct Command {
        #[command(flatten)]
        args: AttentionArgs,
    }

    #[test]
    fn the_published_benchmark_has_its_own_numbers_of_runs() {
        let of = |flags: &str| {
            let words = std::iter::once("attention").chain(flags.split_whitespace());
            runs(&Command::parse_from(words).args)
        };
        assert_eq!(of("--tokens 4k"), RUNS);
        assert_eq!(of("--tokens 4k --num-pages 256"), (10, 100));
        assert_eq!(of("--num-pages 256 --warm-ups 0 -r 3"), (0, 3));
    }
}
