//! A decode step allocates nothing.

mod common;
#[path = "common/watched.rs"]
mod watched;

use common::golden;
use tinyserve_kernels::{Attention, Cpu, CpuOptions};
use tinyserve_kv::{Budget, KvFormat, PageTable, SelectionPolicy};
use tinyserve_model::{
    Activations, Batch, Checkpoint, KvCache, LogitRows, Model, Observe, Sampler, SamplingParams,
    SequenceStep, StepOutput,
};
use watched::Watched;

#[global_allocator]
static ALLOCATOR: Watched = Watched;

const PAGE_SIZE: usize = 4;
/// Tokens before the steps that count: enough pages that a policy leaves some out.
const PROMPT: usize = 67;
const STEPS: usize = 20;

struct Engine {
    model: Model<Cpu>,
    cache: KvCache<Cpu>,
    activations: Activations<Cpu>,
    output: StepOutput,
    sampler: Sampler,
    history: Vec<u32>,
}

impl Engine {
    fn new(name: &str, threads: usize) -> Self {
        let checkpoint = Checkpoint::load(golden(name).to_str().unwrap()).unwrap();
        let cpu = Cpu::new(CpuOptions { threads: Some(threads), ..Default::default() }).unwrap();
        let layout = checkpoint.config().kv_layout(PAGE_SIZE, KvFormat::F16).unwrap();
        let model = Model::load(cpu, &checkpoint, |_, _| ()).unwrap();
        let cache = KvCache::new(model.backend(), layout, 400).unwrap();
        let mut history = Vec::with_capacity(1 << 12);
        history.push(3);
        Self {
            activations: Activations::new(&model),
            output: StepOutput::default(),
            sampler: Sampler::new(SamplingParams { seed: Some(1), ..Default::default() }).unwrap(),
            model,
            cache,
            history,
        }
    }

    /// Gives every sequence `tokens` and draws its next token.
    fn step(&mut self, tables: &mut [PageTable], tokens: &[u32], attention: Attention<'_>) {
        for table in tables.iter_mut() {
            self.cache.extend(self.model.backend(), table, tokens.len()).unwrap();
        }
        let logits = LogitRows::Last;
        let observe = Observe::NOTHING;
        let sequence = |table| SequenceStep { tokens, table, attention, logits, observe };
        // Whoever calls owns the list of sequences: here it lies on the stack.
        let steps: [SequenceStep<'_>; 2] = [sequence(&tables[0]), sequence(&tables[1])];
        let batch =
            Batch { sequences: &steps[..tables.len()], measure_recall: false, list_pages: false };
        let Self { model, cache, activations, output, .. } = self;
        model.forward(activations, cache, &batch, output).unwrap();
        for sequence in 0..tables.len() {
            let logits = self.output.logits(sequence).last().unwrap();
            let token = self.sampler.sample(logits, &self.history).unwrap();
            self.history.push(token.id);
        }
    }
}

#[test]
fn decode_steps_allocate_nothing() {
    let policy = SelectionPolicy {
        budget: Budget::Ratio(0.3),
        dense_layers: 1,
        min_context: 0,
        ..Default::default()
    };
    for name in ["gpt2-tiny", "llama-gqa"] {
        for threads in [1, 2, 3] {
            for attention in [Attention::Dense, Attention::Policy(&policy)] {
                let mut engine = Engine::new(name, threads);
                let mut tables = [engine.cache.new_table(), engine.cache.new_table()];
                engine.step(&mut tables, &[5; PROMPT], attention);
                // Buffers grow to the sizes of a decode step, and the threads wake up once.
                for token in 0..4 {
                    engine.step(&mut tables, &[token], attention);
                }
                let before = watched::calls();
                for token in 0..STEPS {
                    engine.step(&mut tables, &[token as u32], attention);
                }
                let made = watched::calls() - before;
                assert_eq!(made, 0, "{name}, {threads} threads, {attention:?}");
            }
        }
    }
}
