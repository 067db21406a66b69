//! Support for tests across crates: where their data lies, and a model with everything it needs.
#![forbid(unsafe_code)]

use std::path::PathBuf;

use serde::Deserialize;
use serde::de::DeserializeOwned;
use tinyserve_kernels::{Attention, Backend, Cpu, CpuOptions};
use tinyserve_kv::{KvFormat, PageTable};
use tinyserve_model::{
    Activations, Batch, Checkpoint, KvCache, LogitRows, Model, Observe, SequenceStep, StepOutput,
};

/// A file or folder among this package's data.
#[must_use]
pub fn data(path: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join(path)
}

/// Reads a JSON file among this package's data.
///
/// # Panics
/// When it is not there or says something else.
#[must_use]
pub fn json<T: DeserializeOwned>(path: &str) -> T {
    let path = data(path);
    let text = std::fs::read_to_string(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    serde_json::from_str(&text).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}

/// What transformers made of one text with one of the golden checkpoints.
#[derive(Debug, Clone, Deserialize)]
pub struct GoldenCase {
    /// The prompt.
    pub text: String,
    /// Its tokens, special tokens included.
    pub ids: Vec<u32>,
    /// Logits after the last of them `[vocab]`.
    pub last_logits: Vec<f32>,
    /// The 48 most likely next tokens, one after the other.
    pub greedy: Vec<u32>,
    /// Their text.
    pub greedy_text: String,
    /// Smallest gap between the two best logits on the way.
    pub min_margin: f32,
    /// Mean negative log likelihood of the prompt's tokens, nats.
    pub nll_mean: f64,
}

#[derive(Deserialize)]
struct Golden {
    cases: Vec<GoldenCase>,
}

/// Names of the golden checkpoints.
pub const GOLDEN: [&str; 5] = [
    "gpt2-tiny",
    "gpt2-hub-names",
    "llama-gqa",
    "llama-tied-rope-scaled-bf16",
    "llama-sharded-f16",
];

/// The cases of a golden checkpoint.
#[must_use]
pub fn golden_cases(name: &str) -> Vec<GoldenCase> {
    json::<Golden>(&format!("golden/{name}/expected.json")).cases
}

/// A golden checkpoint that stores half precision as it is opened by default, with the cases that
/// `from_pretrained(dtype=torch.float32)` gives: its rotary frequencies are f32.
///
/// # Panics
/// When it cannot be opened.
#[must_use]
pub fn golden_from_pretrained(name: &str) -> (Checkpoint, Vec<GoldenCase>) {
    let checkpoint = Checkpoint::open(&data(&format!("golden/{name}")));
    let cases = json::<Golden>(&format!("golden/{name}/from_pretrained.json")).cases;
    (checkpoint.unwrap_or_else(|e| panic!("{name}: {e}")), cases)
}

/// A golden checkpoint.
///
/// The reference was cast to the type of its weights and back before it computed, which left its
/// rotary frequencies rounded to that type; so are they here.
///
/// # Panics
/// When it cannot be opened.
#[must_use]
pub fn golden(name: &str) -> Checkpoint {
    let path = data(&format!("golden/{name}"));
    let mut checkpoint = Checkpoint::open(&path).unwrap_or_else(|e| panic!("{name}: {e}"));
    checkpoint.round_rope_frequencies();
    checkpoint
}

/// The CPU backend with its best instruction set on two threads.
///
/// # Panics
/// When threads cannot be started.
#[must_use]
pub fn cpu() -> Cpu {
    Cpu::new(CpuOptions { threads: Some(2), path: None }).expect("two threads")
}

/// A loaded model with a cache, and one step at a time.
#[derive(Debug)]
pub struct Runner<B: Backend> {
    /// The model.
    pub model: Model<B>,
    /// Its cache.
    pub cache: KvCache<B>,
    activations: Activations<B>,
    /// What the last step computed.
    pub output: StepOutput,
}

/// One sequence of a test.
#[derive(Debug)]
pub struct Sequence {
    /// Its pages.
    pub table: PageTable,
    /// Tokens to feed next.
    pub next: Vec<u32>,
    /// Which of them yield logits.
    pub logits: LogitRows,
    /// What to tell about its attention.
    pub observe: Observe,
}

impl<B: Backend> Runner<B> {
    /// Loads `checkpoint` onto `backend`, with room for `pages` pages.
    ///
    /// # Panics
    /// When it cannot be loaded.
    #[must_use]
    pub fn new(
        backend: B,
        checkpoint: &Checkpoint,
        (page_size, format, pages): (usize, KvFormat, usize),
    ) -> Self {
        let model = Model::load(backend, checkpoint, |_, _| {}).expect("a model");
        let layout = model.config().kv_layout(page_size, format).expect("a layout");
        let cache = KvCache::new(model.backend(), layout, pages).expect("a cache");
        let activations = Activations::new(&model);
        Self { model, cache, activations, output: StepOutput::default() }
    }

    /// An empty sequence that will be fed `tokens`.
    #[must_use]
    pub fn sequence(&self, tokens: &[u32], logits: LogitRows) -> Sequence {
        let (table, observe) = (self.cache.new_table(), Observe::NOTHING);
        Sequence { table, next: tokens.to_vec(), logits, observe }
    }

    /// Feeds every sequence its next tokens in one step.
    ///
    /// # Panics
    /// When the step fails.
    pub fn step(&mut self, sequences: &mut [&mut Sequence], attention: Attention<'_>) {
        for sequence in sequences.iter_mut() {
            self.cache
                .extend(self.model.backend(), &mut sequence.table, sequence.next.len())
                .expect("enough pages");
        }
        let steps: Vec<_> = sequences
            .iter()
            .map(|s| SequenceStep {
                tokens: &s.next,
                table: &s.table,
                attention,
                logits: s.logits,
                observe: s.observe,
            })
            .collect();
        let batch = Batch { sequences: &steps, measure_recall: false, list_pages: false };
        self.model
            .forward(&mut self.activations, &mut self.cache, &batch, &mut self.output)
            .expect("a step");
    }

    /// Logits of every position of `tokens`, fed in chunks of `chunk`.
    pub fn all_logits(&mut self, tokens: &[u32], chunk: usize) -> Vec<Vec<f32>> {
        let mut sequence = self.sequence(&[], LogitRows::All);
        let mut rows = Vec::new();
        for chunk in tokens.chunks(chunk) {
            sequence.next = chunk.to_vec();
            self.step(&mut [&mut sequence], Attention::Dense);
            rows.extend(self.output.logits(0).map(<[f32]>::to_vec));
        }
        self.cache.release(sequence.table);
        rows
    }

    /// The `n` most likely tokens after `prompt`, one after the other.
    pub fn greedy(&mut self, prompt: &[u32], n: usize, attention: Attention<'_>) -> Vec<u32> {
        let mut sequence = self.sequence(prompt, LogitRows::Last);
        let mut tokens = Vec::new();
        while tokens.len() < n {
            self.step(&mut [&mut sequence], attention);
            let token = argmax(self.output.logits(0).next().expect("logits"));
            tokens.push(token);
            sequence.next = vec![token];
        }
        self.cache.release(sequence.table);
        tokens
    }
}

/// Index of the largest of `logits`, the first of equals.
#[must_use]
pub fn argmax(logits: &[f32]) -> u32 {
    let mut best = 0;
    for (i, &x) in logits.iter().enumerate() {
        if x > logits[best] {
            best = i;
        }
    }
    best as u32
}

/// Fails unless every value is within `tolerance` of its reference, relative to the largest.
///
/// # Panics
/// When one is not, or is not a number.
#[track_caller]
pub fn assert_close(what: &str, found: &[f32], expected: &[f32], tolerance: f32) {
    assert_eq!(found.len(), expected.len(), "{what}: length");
    let scale = expected.iter().fold(0.0_f32, |a, &b| a.max(b.abs())).max(1e-6);
    for (i, (&found, &expected)) in found.iter().zip(expected).enumerate() {
        let error = (found - expected).abs() / scale;
        assert!(error <= tolerance, "{what}[{i}]: {found} for {expected}, {error:e} of {scale}");
    }
}
