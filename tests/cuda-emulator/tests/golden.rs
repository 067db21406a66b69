//! Whole models on the CUDA backend: the golden checkpoints, against what transformers computed.

use std::fs;
use std::path::{Path, PathBuf};

use serde::Deserialize;
use tinyserve_cuda_emulator::ready;
use tinyserve_kernels::{Attention, Backend, Cpu, CpuOptions, Cuda, TopLogits};
use tinyserve_kv::{Budget, KvFormat, PageTable, SelectionPolicy};
use tinyserve_model::{
    Activations, Batch, Checkpoint, KvCache, LogitRows, Model, Observe, SequenceStep, StepOutput,
};

const GOLDEN: [&str; 5] = [
    "gpt2-tiny",
    "gpt2-hub-names",
    "llama-gqa",
    "llama-tied-rope-scaled-bf16",
    "llama-sharded-f16",
];
/// Of the largest logit, as for the CPU.
const TOLERANCE: f32 = 1e-4;
/// Greedy tokens of each case that are followed: the emulator is slow.
const TOKENS: usize = 12;

#[derive(Deserialize)]
struct Golden {
    cases: Vec<Case>,
}

#[derive(Deserialize)]
struct Case {
    ids: Vec<u32>,
    last_logits: Vec<f32>,
    greedy: Vec<u32>,
    min_margin: f32,
}

fn golden(name: &str) -> (Checkpoint, Vec<Case>) {
    let folder: PathBuf = Path::new(env!("CARGO_MANIFEST_DIR")).join("../golden").join(name);
    let mut checkpoint = Checkpoint::open(&folder).unwrap();
    // As the reference computed them.
    checkpoint.round_rope_frequencies();
    let text = fs::read_to_string(folder.join("expected.json")).unwrap();
    (checkpoint, serde_json::from_str::<Golden>(&text).unwrap().cases)
}

/// A model, and one sequence after the other through it.
struct Runner<B: Backend> {
    model: Model<B>,
    cache: KvCache<B>,
    activations: Activations<B>,
    output: StepOutput,
}

impl<B: Backend> Runner<B> {
    fn new(backend: B, checkpoint: &Checkpoint, page_size: usize, format: KvFormat) -> Self {
        let model = Model::load(backend, checkpoint, |_, _| {}).unwrap();
        let layout = model.config().kv_layout(page_size, format).unwrap();
        let cache = KvCache::new(model.backend(), layout, 1024_usize.div_ceil(page_size)).unwrap();
        let activations = Activations::new(&model);
        Self { model, cache, activations, output: StepOutput::default() }
    }

    /// Logits after `tokens`, and what attention read.
    fn step(
        &mut self,
        table: &mut PageTable,
        tokens: &[u32],
        attention: Attention<'_>,
    ) -> Vec<f32> {
        self.batch(std::slice::from_mut(table), &[tokens], attention, LogitRows::Last);
        self.logits(0)
    }

    /// A step of several sequences, each with tokens of its own.
    fn batch(
        &mut self,
        tables: &mut [PageTable],
        tokens: &[&[u32]],
        attention: Attention<'_>,
        logits: LogitRows,
    ) {
        let Self { model, cache, activations, output } = self;
        for (table, tokens) in tables.iter_mut().zip(tokens) {
            cache.extend(model.backend(), table, tokens.len()).unwrap();
        }
        let observe = Observe::default();
        let sequences = tables.iter().zip(tokens).map(|(table, tokens)| SequenceStep {
            tokens,
            table,
            attention,
            logits,
            observe,
        });
        let sequences: Vec<_> = sequences.collect();
        let batch = Batch { sequences: &sequences, measure_recall: false, list_pages: false };
        model.forward(activations, cache, &batch, output).unwrap();
    }

    fn logits(&self, sequence: usize) -> Vec<f32> {
        self.output.logits(sequence).next().unwrap().to_vec()
    }

    /// Logits of a prompt in chunks, then of `n` tokens after it, each the likeliest.
    fn greedy(
        &mut self,
        prompt: &[u32],
        chunk: usize,
        n: usize,
        attention: Attention<'_>,
    ) -> (Vec<f32>, Vec<u32>, Vec<Vec<f32>>) {
        let mut table = self.cache.new_table();
        let mut logits = Vec::new();
        for tokens in prompt.chunks(chunk) {
            logits = self.step(&mut table, tokens, Attention::Dense);
        }
        let first = logits.clone();
        let (mut tokens, mut all) = (Vec::new(), Vec::new());
        for _ in 0..n {
            tokens.push(argmax(&logits));
            logits = self.step(&mut table, &tokens[tokens.len() - 1..], attention);
            all.push(logits.clone());
        }
        self.cache.release(table);
        (first, tokens, all)
    }
}

/// Selects that share of the pages, at any length, behind `dense_layers`.
fn selecting(ratio: f64, dense_layers: usize) -> SelectionPolicy {
    let budget = Budget::Ratio(ratio);
    SelectionPolicy { budget, min_context: 0, dense_layers, ..SelectionPolicy::default() }
}

fn argmax(logits: &[f32]) -> u32 {
    let best = (0..logits.len()).max_by(|&a, &b| logits[a].total_cmp(&logits[b]).then(b.cmp(&a)));
    best.unwrap() as u32
}

fn close(found: &[f32], expected: &[f32], tolerance: f32) -> bool {
    error(found, expected) <= tolerance
}

/// Largest difference, of the largest value that is expected; NaN for what is not a number.
fn error(found: &[f32], expected: &[f32]) -> f32 {
    assert_eq!(found.len(), expected.len());
    let scale = expected.iter().fold(1e-6_f32, |a, b| a.max(b.abs()));
    let errors = found.iter().zip(expected).map(|(a, b)| (a - b).abs() / scale);
    // Not f32::max, which would drop a NaN.
    errors.fold(0.0, |worst, it| if it > worst || it.is_nan() { it } else { worst })
}

#[test]
fn every_checkpoint_prefills_and_decodes_as_transformers_does() {
    if ready().is_none() {
        return;
    }
    let mut compared = 0;
    for (name, page_size) in GOLDEN.into_iter().zip([16, 4, 16, 8, 5]) {
        let (checkpoint, cases) = golden(name);
        let cuda = Cuda::new(0).unwrap();
        let mut runner = Runner::new(cuda, &checkpoint, page_size, KvFormat::F32);
        for (i, case) in cases.iter().enumerate() {
            let chunk = [usize::MAX, 7, 33, 64][i % 4];
            let scale = case.last_logits.iter().fold(0.0_f32, |a, &b| a.max(b.abs()));
            let follow = case.min_margin > 2.0 * TOLERANCE * scale;
            let n = if follow { TOKENS.min(case.greedy.len()) } else { 0 };
            let (logits, tokens, _) = runner.greedy(&case.ids, chunk, n, Attention::Dense);
            assert!(close(&logits, &case.last_logits, TOLERANCE), "{name} case {i}");
            assert_eq!(tokens, case.greedy[..n], "{name} case {i}");
            compared += usize::from(follow);
        }
    }
    assert!(compared >= 15, "only {compared} of 20 had margins to compare tokens");
}

#[test]
fn a_budget_for_every_page_is_dense_to_the_last_bit() {
    if ready().is_none() {
        return;
    }
    let (checkpoint, cases) = golden("llama-gqa");
    let longest = cases.iter().max_by_key(|case| case.ids.len()).unwrap();
    for format in KvFormat::ALL {
        let mut runner = Runner::new(Cuda::new(0).unwrap(), &checkpoint, 16, format);
        let policy = selecting(1.0, 0);
        let dense = runner.greedy(&longest.ids, 64, 6, Attention::Dense);
        let sparse = runner.greedy(&longest.ids, 64, 6, Attention::Policy(&policy));
        assert_eq!(dense, sparse, "{format}");
    }
}

/// What a replayed step computes is what its launches compute, sealing and selecting included.
#[test]
fn steps_that_come_again_are_replayed_and_change_nothing() {
    if ready().is_none() {
        return;
    }
    let (checkpoint, cases) = golden("llama-gqa");
    let longest = cases.iter().max_by_key(|case| case.ids.len()).unwrap();
    let policy = selecting(0.3, 1);
    for (format, attention) in [
        (KvFormat::F16, Attention::Dense),
        (KvFormat::Bf16, Attention::Policy(&policy)),
        (KvFormat::Int8, Attention::Policy(&policy)),
    ] {
        let run = |graphs: bool| {
            let cuda = Cuda::new(0).unwrap().use_graphs(graphs);
            let mut runner = Runner::new(cuda, &checkpoint, 4, format);
            let all = runner.greedy(&longest.ids, 96, 12, attention);
            (all, runner.model.backend().replayed_steps())
        };
        let (expected, none) = run(false);
        let (found, replayed) = run(true);
        assert_eq!(none, 0);
        assert!(replayed >= 4, "{format}: {replayed} of 12 steps were replayed");
        assert_eq!(found, expected, "{format}");
    }
}

/// A batch of three is launched as one of four: its steps are replayed from the start, and compute
/// what they compute when they are launched one by one.
#[test]
fn batches_of_one_bucket_are_one_graph() {
    if ready().is_none() {
        return;
    }
    let (checkpoint, cases) = golden("llama-gqa");
    let longest = cases.iter().max_by_key(|case| case.ids.len()).unwrap();
    let policy = selecting(0.3, 1);
    // Long enough that pages are left out, and not so long that a step reaches another bucket.
    let lengths = [66, 70, 68, 72];
    for (format, fused) in [(KvFormat::F16, true), (KvFormat::Bf16, false)] {
        let run = |graphs: bool| {
            let cuda = Cuda::new(0).unwrap().use_graphs(graphs).use_fused_kernel(Some(fused));
            let mut runner = Runner::new(cuda, &checkpoint, 8, format);
            let mut tables = lengths.map(|_| runner.cache.new_table());
            for (table, length) in tables.iter_mut().zip(lengths) {
                runner.step(table, &longest.ids[..length], Attention::Dense);
            }
            let (mut all, mut captured) = (Vec::new(), Vec::new());
            for sequences in [4, 3] {
                for step in 0..4 {
                    let next = [1, 2, 3, 4].map(|i| [i + step]);
                    let next: Vec<&[u32]> = next.iter().map(<[u32; 1]>::as_slice).collect();
                    let attention = Attention::Policy(&policy);
                    let (tables, next) = (&mut tables[..sequences], &next[..sequences]);
                    runner.batch(tables, next, attention, LogitRows::Last);
                    all.extend((0..sequences).map(|sequence| runner.logits(sequence)));
                }
                let cuda = runner.model.backend();
                captured.push((cuda.captured_steps(), cuda.replayed_steps()));
            }
            tables.into_iter().for_each(|table| runner.cache.release(table));
            (all, captured)
        };
        let (expected, none) = run(false);
        let (found, captured) = run(true);
        assert_eq!(none, [(0, 0); 2]);
        let [(of_four, replayed_four), (of_both, replayed)] = captured[..] else { unreachable!() };
        assert!(of_four >= 1 && of_both == of_four, "{format}: {captured:?}");
        assert_eq!(replayed, replayed_four + 4, "{format}: every step of three: {captured:?}");
        assert_eq!(found, expected, "{format}");
    }
}

/// The likeliest tokens that the device finds are those of its logits, and the first of them is what
/// transformers chose.
#[test]
fn the_likeliest_tokens_are_found_on_the_device() {
    if ready().is_none() {
        return;
    }
    for name in ["gpt2-tiny", "llama-sharded-f16"] {
        let (checkpoint, cases) = golden(name);
        let case = cases.iter().max_by(|a, b| a.min_margin.total_cmp(&b.min_margin)).unwrap();
        let mut runner = Runner::new(Cuda::new(0).unwrap(), &checkpoint, 16, KvFormat::F32);
        let steps = TOKENS.min(case.greedy.len());
        let (first, _, rest) = runner.greedy(&case.ids, usize::MAX, steps, Attention::Dense);
        let mut tables = [runner.cache.new_table()];
        let mut tokens = case.ids.clone();
        for (logits, &greedy) in std::iter::once(&first).chain(&rest).zip(&case.greedy) {
            runner.batch(&mut tables, &[&tokens], Attention::Dense, LogitRows::Top(5));
            let mut expected = TopLogits::default();
            expected.begin(5, logits.len());
            expected.push_row(logits);
            let (found, expected) = (runner.output.top(0).unwrap(), expected.row(0));
            assert_eq!(found.tokens, expected.tokens, "{name}");
            let error = (found.log_sum_exp - expected.log_sum_exp).abs();
            assert!(error < 1e-6 * expected.log_sum_exp.abs().max(1.0), "{name}: {error:e}");
            assert_eq!(runner.output.logits(0).len(), 0, "logits stay on the device");
            tokens = vec![found.tokens[0].0];
            assert_eq!(tokens, [greedy], "{name}");
        }
    }
}

/// With few pages read, both backends stay together only if they read the same ones.
#[test]
fn selection_gives_what_it_gives_on_the_cpu() {
    if ready().is_none() {
        return;
    }
    let (checkpoint, cases) = golden("llama-gqa");
    let longest = cases.iter().max_by_key(|case| case.ids.len()).unwrap();
    let policy = SelectionPolicy { recent_pages: 1, ..selecting(0.3, 0) };
    for format in [KvFormat::F32, KvFormat::F16, KvFormat::Bf16] {
        let cpu = Cpu::new(CpuOptions { threads: Some(1), path: None }).unwrap();
        let mut on_cpu = Runner::new(cpu, &checkpoint, 4, format);
        let mut on_cuda = Runner::new(Cuda::new(0).unwrap(), &checkpoint, 4, format);
        let (_, expected_tokens, expected) =
            on_cpu.greedy(&longest.ids, 64, 8, Attention::Policy(&policy));
        let (_, tokens, found) = on_cuda.greedy(&longest.ids, 64, 8, Attention::Policy(&policy));
        // A sum that is rounded otherwise may end in another half: that much may differ, and the
        // tokens after it.
        let (steps, tolerance) = match format {
            KvFormat::F32 => (expected.len(), TOLERANCE),
            KvFormat::F16 => (1, 5e-4),
            _ => (1, 5e-3),
        };
        if format == KvFormat::F32 {
            assert_eq!(tokens, expected_tokens, "{format}");
        }
        for (found, expected) in found.iter().zip(&expected).take(steps) {
            let error = error(found, expected);
            eprintln!("{format}: error {error:e}, tolerance {tolerance:e}");
            assert!(error <= tolerance, "{format}: {error:e}");
        }
        let dense = on_cpu.greedy(&longest.ids, 64, 8, Attention::Dense).2;
        assert!(!close(&dense[0], &expected[0], TOLERANCE), "{format}: everything was read");
    }
}
