//! `tinyserve bench latency`: one sequence, prefill and decode, at each depth.

use anyhow::{Result, anyhow};
use clap::{Args, ValueEnum};
use tinyserve::kernels::{Attention, Cpu};
use tinyserve::kv::{PageTable, SelectionPolicy};
use tinyserve::model::{Checkpoint, KvCache, Model};
use tinyserve::{AttentionMode, RopeFrequencyDtype, TinyServeConfig, TinyServeError};

use super::report::{self, Row, Setup, Test};
use super::runner::{Runner, Sample};
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
enum Format {
    Md,
    Csv,
    Json,
}

/// An attention mode and the policy that it runs with.
struct Mode {
    name: &'static str,
    policy: Option<SelectionPolicy>,
}

impl Mode {
    fn new(config: &TinyServeConfig, attention: AttentionMode) -> Self {
        let config = TinyServeConfig { attention, ..config.clone() };
        match attention {
            AttentionMode::Dense => Self { name: "dense", policy: None },
            AttentionMode::Sparse => {
                Self { name: "sparse", policy: Some(config.selection_policy()) }
            }
            AttentionMode::Auto => Self { name: "auto", policy: Some(config.selection_policy()) },
        }
    }

    fn attention(&self) -> Attention<'_> {
        self.policy.as_ref().map_or(Attention::Dense, Attention::Policy)
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
    let mut checkpoint = Checkpoint::load(&config.model)?;
    if config.rope_frequency_dtype == RopeFrequencyDtype::Weights {
        checkpoint.round_rope_frequencies();
    }
    let context = checkpoint.config().max_positions;
    let limit = match config.max_sequence_length {
        Some(_) => config.sequence_limit(context)?,
        None => context,
    };
    let tests = tests(args, limit)?;
    let (mut runner, setup) = load(args, &config, &checkpoint, &tests)?;
    let mut rows = Vec::new();
    let (mut progress, mut done) = (Progress::new("tests"), 0);
    for of_one_depth in tests.chunk_by(|a, b| a.n_depth == b.n_depth) {
        let filled = runner.fill(of_one_depth[0].n_depth)?;
        for &test in of_one_depth {
            let first = rows.len();
            for (name, samples) in measure(&mut runner, &filled, test, &modes, args.repetitions)? {
                let mut row = Row::new(&setup, test, name, &samples, memory::peak_resident());
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
    match args.output {
        Format::Md => output::text(&report::markdown(&rows)),
        Format::Csv => output::text(&report::csv(&rows)?),
        Format::Json => output::json(&rows),
    }
}

/// Every test that was asked for; sizes that nobody asked for are made to fit, with a note.
fn tests(args: &LatencyArgs, limit: usize) -> Result<Vec<Test>> {
    let (mut tests, mut notes) = (Vec::new(), Vec::new());
    for &n_depth in &args.n_depth {
        let room = limit.saturating_sub(n_depth);
        let place = Place { n_depth, limit, room };
        let prompts = sizes(("-p", &args.n_prompt), DEFAULT_PROMPT, place, &mut notes)?;
        tests.extend(prompts.into_iter().map(|n_prompt| Test { n_prompt, n_gen: 0, n_depth }));
        let gens = sizes(("-n", &args.n_gen), DEFAULT_GEN, place, &mut notes)?;
        tests.extend(gens.into_iter().map(|n_gen| Test { n_prompt: 0, n_gen, n_depth }));
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

fn load(
    args: &LatencyArgs,
    config: &TinyServeConfig,
    checkpoint: &Checkpoint,
    tests: &[Test],
) -> Result<(Runner, Setup)> {
    let backend: Cpu = args.forward.device.backend(config)?;
    let weights = config.weights.resolve(checkpoint.dtype())?;
    let mut setup = Setup {
        model: config.model.clone(),
        model_size: 0,
        model_n_params: checkpoint.parameters() as u64,
        weights_dtype: config.weights.name(checkpoint.dtype()),
        n_batch: config.attention_chunk_size,
        n_threads: backend.threads(),
        cpu_path: backend.path().name(),
        kv_cache_dtype: config.kv_cache_dtype.resolve(checkpoint.dtype()).name(),
        page_size: config.page_size,
    };
    let name = format!("CPU, {}, {} threads", backend.path(), backend.threads());
    args.forward.device.tell(config, &name);
    let mut progress = Progress::new("loading");
    let build = || {
        let format = config.kv_cache_dtype.resolve(checkpoint.dtype());
        let layout = checkpoint.config().kv_layout(config.page_size, format)?;
        let model = Model::load_as(backend, checkpoint, weights, |done, total| {
            progress.update(done, total);
        })?;
        setup.model_size = model.weight_bytes() as u64;
        // One page more than the longest test fills: its copy of the depth's open page.
        let longest = tests.iter().map(|test| test.n_depth + test.tokens()).max().unwrap_or(0);
        let cache = KvCache::new(model.backend(), layout, layout.pages_for(longest) + 1)?;
        Ok::<_, TinyServeError>(Runner::new(model, cache, config.attention_chunk_size))
    };
    Ok((build()?, setup))
}

/// The samples of every mode that makes a difference to the test.
fn measure(
    runner: &mut Runner,
    filled: &PageTable,
    test: Test,
    modes: &[Mode],
    repetitions: usize,
) -> Result<Vec<(&'static str, Vec<Sample>)>> {
    let dense = [Mode { name: "dense", policy: None }];
    // Prefill reads every page, whatever the mode.
    let modes = if test.n_gen == 0 { &dense } else { modes };
    let mut samples: Vec<_> = modes.iter().map(|mode| (mode.name, Vec::new())).collect();
    for run in 0..=repetitions {
        for (mode, (_, samples)) in modes.iter().zip(&mut samples) {
            let sample = match test.n_gen {
                0 => runner.time_prefill(filled, test.n_prompt)?,
                tokens => runner.time_decode(filled, tokens, mode.attention())?,
            };
            // The first run warms up caches, clocks and the pages of the cache.
            if run > 0 {
                samples.push(sample);
            }
        }
    }
    Ok(samples)
}
