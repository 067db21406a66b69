//! Whole models on the CUDA backend: the golden checkpoints, against what transformers computed.

use std::fs;
use std::path::{Path, PathBuf};

use serde::Deserialize;
use tinyserve_cuda_emulator::ready;
use tinyserve_kernels::{Attention, Backend, Cpu, CpuOptions, Cuda};
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
        self.cache.extend(self.model.backend(), table, tokens.len()).unwrap();
        let step = SequenceStep {
            tokens,
            table,
            attention,
            logits: LogitRows::Last,
            observe: Observe::default(),
        };
        let batch = Batch { sequences: &[step], measure_recall: false, list_pages: false };
        let Self { model, cache, activations, output } = self;
        model.forward(activations, cache, &batch, output).unwrap();
        let logits = self.output.logits(0).next().unwrap();
        logits.to_vec()
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
    for format in [KvFormat::F32, KvFormat::F16, KvFormat::Bf16] {
        let mut runner = Runner::new(Cuda::new(0).unwrap(), &checkpoint, 16, format);
        let policy = SelectionPolicy {
            budget: Budget::Ratio(1.0),
            min_context: 0,
            dense_layers: 0,
            ..SelectionPolicy::default()
        };
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
    let policy = SelectionPolicy {
        budget: Budget::Ratio(0.3),
        min_context: 0,
        dense_layers: 1,
        ..SelectionPolicy::default()
    };
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

/// With few pages read, both backends stay together only if they read the same ones.
#[test]
fn selection_gives_what_it_gives_on_the_cpu() {
    if ready().is_none() {
        return;
    }
    let (checkpoint, cases) = golden("llama-gqa");
    let longest = cases.iter().max_by_key(|case| case.ids.len()).unwrap();
    let policy = SelectionPolicy {
        budget: Budget::Ratio(0.3),
        min_context: 0,
        dense_layers: 0,
        recent_pages: 1,
        ..SelectionPolicy::default()
    };
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
