//! `tinyserve bench latency`: prefill and decode, at each depth and batch size.

use anyhow::{Result, anyhow};
use clap::{Args, ValueEnum};
use tinyserve::kernels::{Attention, Cuda, Profiled};
use tinyserve::kv::{Budget, PageTable, SelectionPolicy};
use tinyserve::model::{Checkpoint, DeviceLimits, KvCache, LargestStep, MemoryPlan, Model};
use tinyserve::{AttentionMode, Device, TinyServeConfig, TinyServeError};

use super::bandwidth::read_bandwidth;
use super::device::Measurable;
use super::report::{self, Row, Setup, StepSplit, Test};
use super::runner::{DepthFill, Runner, Sample};
use super::source::{ShapeArgs, Source};
use crate::args::{self, ForwardArgs, SelectionArgs, Sources};
use crate::exit::{Usage, out_of_range};
use crate::progress::Progress;
use crate::{memory, output, values};

const DEFAULT_PROMPT: usize = 512;
const DEFAULT_GEN: usize = 128;

#[derive(Debug, Args)]
pub(crate) struct LatencyArgs {
    /// Prompt tokens of the prefill tests; 0 has none [default: 512, or what the context holds].
    #[arg(short = 'p', long, value_name = "N,…", value_delimiter = ',',
          value_parser = values::size)]
    n_prompt: Vec<usize>,
    /// Tokens of the decode tests; 0 has none [default: 128, or what the context holds].
    #[arg(short = 'n', long, value_name = "N,…", value_delimiter = ',',
          value_parser = values::size)]
    n_gen: Vec<usize>,
    /// Tokens in the cache before each test.
    #[arg(short = 'd', long, value_name = "N,…", value_delimiter = ',', default_value = "0",
          value_parser = values::size)]
    n_depth: Vec<usize>,
    /// Sequences that run together.
    #[arg(short = 'b', long, value_name = "N,…", value_delimiter = ',', default_value = "1",
          value_parser = values::size)]
    n_batch: Vec<usize>,
    #[command(flatten)]
    shape: ShapeArgs,
    /// Fills the depth of a shape by the forward pass, not with random keys and values.
    #[arg(long, requires = "shape")]
    real_prefill: bool,
    /// Counted runs of each test, after one that is not counted.
    #[arg(short, long, value_name = "N", default_value = "5", value_parser = values::size)]
    repetitions: usize,
    /// What to print.
    #[arg(short, long, value_name = "FORMAT", default_value = "md")]
    output: Format,
    #[command(flatten)]
    forward: ForwardArgs,
    /// When decode steps select pages; modes in a list take turns, run by run, and are compared.
    #[arg(long, value_name = "MODE,…", value_delimiter = ',', env = "TINYSERVE_ATTENTION", help_heading = args::SELECTION,
          value_parser = args::attention_mode())]
    attention: Vec<AttentionMode>,
    #[command(flatten)]
    selection: SelectionArgs,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Format {
    Md,
    Csv,
    Json,
}

/// An attention mode and the policy that it runs with.
pub(super) struct Mode {
    pub(super) name: &'static str,
    policy: Option<SelectionPolicy>,
}

impl Mode {
    pub(super) fn new(config: &TinyServeConfig, attention: AttentionMode) -> Self {
        let config = TinyServeConfig { attention, ..config.clone() };
        match attention {
            AttentionMode::Dense => Self { name: "dense", policy: None },
            AttentionMode::Sparse => {
                Self { name: "sparse", policy: Some(config.selection_policy()) }
            }
            AttentionMode::Auto => Self { name: "auto", policy: Some(config.selection_policy()) },
        }
    }

    pub(super) fn attention(&self) -> Attention<'_> {
        self.policy.as_ref().map_or(Attention::Dense, Attention::Policy)
    }

    /// The name, and the share of the pages if it is one.
    fn described(&self) -> (&'static str, Option<f64>) {
        let ratio = self.policy.as_ref().and_then(|policy| match policy.budget {
            Budget::Ratio(ratio) => Some(ratio),
            Budget::Tokens(_) | Budget::TopP(_) => None,
        });
        (self.name, ratio)
    }
}

/// Measures and prints.
pub(crate) fn latency(args: &LatencyArgs, sources: Sources) -> Result<()> {
    let attention = args.attention.first().copied();
    let config = args.forward.selecting(&args.selection, attention, sources)?;
    if args.repetitions == 0 {
        return Err(out_of_range("--repetitions", 0, "at least 1"));
    }
    let modes: Vec<_> = match args.attention.as_slice() {
        [] => vec![Mode::new(&config, config.attention)],
        modes => modes.iter().map(|&mode| Mode::new(&config, mode)).collect(),
    };
    if args.n_batch.contains(&0) {
        return Err(out_of_range("--n-batch (-b)", 0, "at least 1"));
    }
    let source = Source::open(&args.shape, &config)?;
    let fill = match (source.is_synthetic(), args.real_prefill) {
        (true, false) => DepthFill::Synthetic,
        _ => DepthFill::Prefill,
    };
    let tests = tests(args, source.limit(&config)?)?;
    let model = source.name(&config);
    let sequences = args.n_batch.iter().copied().max().unwrap_or(1);
    let longest = tests.iter().map(|test| test.n_depth + test.tokens()).max().unwrap_or(0);
    let checkpoint = source.checkpoint(&config, (sequences, longest))?;
    let sizes = (sequences, longest);
    let forward = &args.forward;
    let rows = match config.device {
        Device::Cuda(number) => {
            let cuda = Cuda::new(number).map_err(TinyServeError::from)?;
            let cuda = config.choose_fused(cuda, checkpoint.config(), checkpoint.dtype())?;
            let described = Described::cuda(&cuda);
            let loaded =
                load_on(cuda, described, forward, (&config, model), &checkpoint, sizes, fill);
            // What a backend copies is not needed twice.
            drop(checkpoint);
            run(args, loaded?, (&tests, &modes, sequences, fill), |runner, _| {
                Ok(runner.backend().copy_bandwidth().map_err(TinyServeError::from)?)
            })?
        }
        Device::Auto | Device::Cpu => {
            let loaded = load(forward, (&config, model), &checkpoint, sizes, fill);
            drop(checkpoint);
            run(args, loaded?, (&tests, &modes, sequences, fill), |runner, threads| {
                // Its buffer comes after the model has gone.
                drop(runner);
                Ok(read_bandwidth(threads))
            })?
        }
    };
    match args.output {
        Format::Md => output::text(&report::markdown(&rows)),
        Format::Csv => output::text(&report::csv(&rows)?),
        Format::Json => output::json(&rows),
    }
}

/// The rows of all tests; `bandwidth` measures what the device reads in a second.
fn run<B: Measurable + Sync>(
    args: &LatencyArgs,
    (mut runner, setup): (Runner<B>, Setup),
    (tests, modes, sequences, fill): (&[Test], &[Mode], usize, DepthFill),
    bandwidth: impl FnOnce(Runner<B>, usize) -> Result<f64>,
) -> Result<Vec<Row>> {
    let mut rows = Vec::new();
    let (mut progress, mut done) = (Progress::new("tests"), 0);
    for of_one_depth in tests.chunk_by(|a, b| a.n_depth == b.n_depth) {
        let filled = runner.fill(sequences, of_one_depth[0].n_depth, fill)?;
        for &test in of_one_depth {
            let first = rows.len();
            let filled = &filled[..test.n_batch];
            for (mode, samples, split) in
                measure(&mut runner, filled, test, modes, args.repetitions)?
            {
                let measured = (samples.as_slice(), split);
                let mut row = Row::new(&setup, test, mode, measured, memory::peak_resident());
                if rows.len() > first {
                    row.compare(&rows[first]);
                }
                rows.push(row);
            }
            for row in &rows[first..] {
                if let Some(sentence) = row.comparison(&rows[first]) {
                    eprintln!("{sentence}");
                }
            }
            done += 1;
            progress.update(done, tests.len());
        }
        runner.release(filled);
    }
    progress.finish();
    let bandwidth = bandwidth(runner, setup.n_threads)?;
    rows.iter_mut().for_each(|row| row.hold_to(bandwidth));
    Ok(rows)
}

/// Every test that was asked for; sizes that nobody asked for are made to fit, with a note.
fn tests(args: &LatencyArgs, limit: usize) -> Result<Vec<Test>> {
    let (mut tests, mut notes) = (Vec::new(), Vec::new());
    for &n_depth in &args.n_depth {
        let room = limit.saturating_sub(n_depth);
        let place = Place { n_depth, limit, room };
        let prompts = sizes(("-p", &args.n_prompt), DEFAULT_PROMPT, place, &mut notes)?;
        let gens = sizes(("-n", &args.n_gen), DEFAULT_GEN, place, &mut notes)?;
        for &n_batch in &args.n_batch {
            let test = |n_prompt, n_gen| Test { n_prompt, n_gen, n_depth, n_batch };
            tests.extend(prompts.iter().map(|&n_prompt| test(n_prompt, 0)));
            tests.extend(gens.iter().map(|&n_gen| test(0, n_gen)));
        }
    }
    tests.retain(|test| test.tokens() > 0);
    if tests.is_empty() {
        return Err(Usage("-p and -n are 0, expected at least one test".to_owned()).into());
    }
    for note in notes {
        eprintln!("note: {note}");
    }
    Ok(tests)
}

/// How much of the context a test at some depth can use.
#[derive(Clone, Copy)]
struct Place {
    n_depth: usize,
    limit: usize,
    room: usize,
}

fn sizes(
    (flag, asked): (&str, &[usize]),
    default: usize,
    Place { n_depth: depth, limit, room }: Place,
    notes: &mut Vec<String>,
) -> Result<Vec<usize>> {
    if room == 0 {
        return Err(anyhow!("-d {depth} leaves no room in a context of {limit} tokens"));
    }
    if asked.is_empty() {
        if room < default {
            notes.push(format!(
                "{flag} is {room} at -d {depth}, not {default}: the context is {limit} tokens"
            ));
        }
        return Ok(vec![default.min(room)]);
    }
    match asked.iter().find(|&&n| n > room) {
        Some(n) => Err(anyhow!(
            "{flag} {n} at -d {depth} needs {} tokens, expected at most {limit}, the context",
            n.saturating_add(depth),
        )),
        None => Ok(asked.to_vec()),
    }
}

/// What rows and notes say of a device.
pub(super) struct Described {
    /// In a sentence.
    text: String,
    device: String,
    threads: usize,
    cpu_path: Option<&'static str>,
    /// Bytes of memory of its own that are free, if it has some.
    free: Option<u64>,
}

impl Described {
    fn cuda(cuda: &Cuda) -> Self {
        let device = format!("cuda:{}", cuda.device().ordinal);
        let text = format!("{device}, {}", cuda.device().name);
        // The thread that launches.
        let free = Some(cuda.device().free as u64);
        Self { text, device, threads: 1, cpu_path: None, free }
    }
}

/// The model on the CPU, with a cache for `sequences` sequences of `longest` tokens.
pub(super) fn load(
    forward: &ForwardArgs,
    named: (&TinyServeConfig, String),
    checkpoint: &Checkpoint,
    sizes: (usize, usize),
    fill: DepthFill,
) -> Result<(Runner, Setup)> {
    let backend = forward.device.backend(named.0)?;
    let described = Described {
        text: format!("CPU, {}, {} threads", backend.path(), backend.threads()),
        device: "cpu".to_owned(),
        threads: backend.threads(),
        cpu_path: Some(backend.path().name()),
        free: None,
    };
    load_on(backend, described, forward, named, checkpoint, sizes, fill)
}

/// The model on `backend`.
fn load_on<B: Measurable + Sync>(
    backend: B,
    described: Described,
    forward: &ForwardArgs,
    (config, name): (&TinyServeConfig, String),
    checkpoint: &Checkpoint,
    (sequences, longest): (usize, usize),
    fill: DepthFill,
) -> Result<(Runner<B>, Setup)> {
    let weights = config.load_options(checkpoint.dtype())?;
    let mut setup = Setup {
        model: name,
        model_size: 0,
        model_n_params: checkpoint.parameters() as u64,
        weights: config.weights.name(checkpoint.dtype()),
        n_ubatch: config.attention_chunk_size,
        device: described.device,
        n_threads: described.threads,
        cpu_path: described.cpu_path,
        kv_cache_dtype: config.kv_cache_dtype.resolve(checkpoint.dtype()).name(),
        page_size: config.page_size,
        depth_fill: fill.name(),
        kv_bytes: 0,
        planned_bytes: 0,
        streamed_bytes: 0,
    };
    forward.device.tell(config, &described.text);
    let mut progress = Progress::new("loading");

    let build = || {
        let layout = config.kv_layout(checkpoint.config(), checkpoint.dtype())?;
        // A page more for each sequence: its copy of the depth's open page.
        let pages = sequences * (layout.pages_for(longest) + 1);
        let (tokens, threads) = (config.attention_chunk_size, described.threads);
        // The depth's open page stays beside the copy of it that a run goes on with.
        let open = 2 * sequences;
        let largest = LargestStep { tokens, sequences: open, logits: sequences, threads };
        let plan = MemoryPlan::new(checkpoint, weights.format, layout, largest, pages);
        // Of the memory that the pages lie in: what the process holds lies elsewhere beside a device's.
        let plan = match described.free {
            Some(free) => {
                let gathers_keys = !Cuda::has_kernels(&config.selection_policy());
                let limits = DeviceLimits { context: longest, free, gathers_keys };
                plan.on_device(checkpoint, weights.format, largest, limits)
            }
            None => plan.process_bytes(memory::process()),
        };
        setup.planned_bytes = plan.total_bytes();
        let backend = Profiled::new(backend);
        let model = Model::load_with(backend, checkpoint, &weights, |done, total| {
            progress.update(done, total);
        })?;
        forward.device.tell_of_cache(model.weights_cache());
        setup.model_size = model.weight_bytes() as u64;
        setup.streamed_bytes = model.streamed_bytes() as u64;
        setup.kv_bytes = (pages * layout.bytes_per_page()) as u64;
        let cache = KvCache::new(model.backend(), layout, pages)?;
        Ok::<_, TinyServeError>(Runner::new(model, cache, config.attention_chunk_size))
    };
    let runner = build()?;
    Ok((runner, setup))
}

/// A mode, its runs, and what a decode step spends its time on.
type Measured = ((&'static str, Option<f64>), Vec<Sample>, Option<StepSplit>);

/// The samples of every mode that makes a difference to the test.
fn measure<B: Measurable + Sync>(
    runner: &mut Runner<B>,
    filled: &[PageTable],
    test: Test,
    modes: &[Mode],
    repetitions: usize,
) -> Result<Vec<Measured>> {
    let dense = [Mode { name: "dense", policy: None }];
    // Prefill reads every page, whatever the mode.
    let modes = if test.n_gen == 0 { &dense } else { modes };
    let mut measured: Vec<Measured> =
        modes.iter().map(|mode| (mode.described(), Vec::new(), None)).collect();
    for run in 0..=repetitions {
        for (mode, (_, samples, _)) in modes.iter().zip(&mut measured) {
            let tokens = (test.n_prompt, test.n_gen);
            let [prefill, decode] = runner.time(filled, tokens, mode.attention())?;
            // The first run warms up caches, clocks and the pages of the cache.
            if run > 0 {
                samples.push(if test.n_gen == 0 { prefill } else { decode });
            }
        }
    }
    // A device's operations are under way when they return, and cannot be timed one by one.
    if test.n_gen > 0 && runner.backend().is_synchronous() {
        // Reading the clock at every operation would slow a small model's counted runs down.
        for (mode, (_, _, split)) in modes.iter().zip(&mut measured) {
            let spent = runner.profile(filled, test.n_gen, mode.attention())?;
            *split = Some(StepSplit::new(test.n_gen, spent));
        }
    }
    Ok(measured)
}
