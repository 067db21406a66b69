//! The memory plan has room for everything that the backend allocates.

use std::path::Path;

use tinyserve_cuda_emulator::{install_cublas, ready};
use tinyserve_kernels::{Attention, Cuda, WeightFormat};
use tinyserve_kv::{Budget, KvFormat, PageTable, SelectionPolicy};
use tinyserve_model::{
    Activations, Batch, Checkpoint, DeviceLimits, KvCache, LargestStep, LogitRows, MemoryPlan,
    Model, Observe, SequenceStep, StepOutput,
};

const SEQUENCES: usize = 3;
/// Tokens of a sequence in one step.
const CHUNK: usize = 24;
const CONTEXT: usize = 80;
const STEP: LargestStep = LargestStep {
    tokens: SEQUENCES * CHUNK,
    sequences: SEQUENCES,
    logits: SEQUENCES * CHUNK,
    threads: 1,
};

/// Sequences that are computed together: prompts in chunks, then tokens one by one.
fn run(model: &Model<Cuda>, cache: &mut KvCache<Cuda>, policy: &SelectionPolicy) {
    let mut activations = Activations::new(model);
    let mut output = StepOutput::default();
    let mut tables = [(); SEQUENCES].map(|()| cache.new_table());
    let mut step = |tables: &mut [PageTable], chunk: usize, attention, logits, measure_recall| {
        let tokens: Vec<u32> = (0..chunk as u32).collect();
        for table in tables.iter_mut() {
            cache.extend(model.backend(), table, chunk).unwrap();
        }
        let observe = Observe::default();
        let sequences = tables.iter();
        let sequences = sequences.map(|table| SequenceStep {
            tokens: &tokens,
            table,
            attention,
            logits,
            observe,
        });
        let sequences: Vec<_> = sequences.collect();
        let batch = Batch { sequences: &sequences, measure_recall, list_pages: false };
        model.forward(&mut activations, cache, &batch, &mut output).unwrap();
    };
    step(&mut tables, CHUNK, Attention::Dense, LogitRows::All, false);
    while tables[0].len() + CHUNK < CONTEXT {
        step(&mut tables, CHUNK, Attention::Dense, LogitRows::Last, false);
    }
    step(&mut tables, 1, Attention::Policy(policy), LogitRows::Top(128), true);
    while tables[0].len() < CONTEXT {
        step(&mut tables, 1, Attention::Policy(policy), LogitRows::Top(40), false);
    }
    tables.into_iter().for_each(|table| cache.release(table));
}

#[test]
fn what_is_allocated_was_planned() {
    let Some(ready) = ready() else { return };
    // Only the emulator counts.
    let Some(emulator) = ready.emulator else { return };
    // From here on, prompts are multiplied by it.
    install_cublas().unwrap();
    for (name, formats) in [("llama-gqa", 3), ("gpt2-tiny", 1), ("llama-sharded-f16", 1)] {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../golden").join(name);
        let checkpoint = Checkpoint::open(&folder).unwrap();
        let all = [
            (WeightFormat::Stored, KvFormat::F16),
            (WeightFormat::Stored, KvFormat::Int8),
            (WeightFormat::Int8, KvFormat::F32),
        ];
        for (weights, format) in all.into_iter().take(formats) {
            let case = format!("{name}, {weights:?}, {format}");
            let policy = SelectionPolicy {
                budget: Budget::Ratio(0.3),
                min_context: 0,
                dense_layers: 1,
                ..SelectionPolicy::default()
            };
            // What is in use: the most since the most so far was asked for.
            let [_, before] = [emulator.peak(), emulator.peak()];
            let cuda = Cuda::new(0).unwrap();
            let free = cuda.device().free as u64;
            let model = Model::load_as(cuda, &checkpoint, weights, |_, _| {}).unwrap();
            let layout = model.config().kv_layout(4, format).unwrap();
            let pages = SEQUENCES * layout.pages_for(CONTEXT);
            let gathers_keys = !Cuda::has_kernels(&policy);
            let limits = DeviceLimits { context: CONTEXT, free, gathers_keys };
            let plan = MemoryPlan::new(&checkpoint, weights, layout, STEP, pages).on_device(
                &checkpoint,
                weights,
                STEP,
                limits,
            );
            let mut cache = KvCache::new(model.backend(), layout, pages).unwrap();
            run(&model, &mut cache, &policy);
            let peak = emulator.peak() - before;
            let planned = plan.total_bytes();
            eprintln!("{case}: {peak} bytes of {planned} planned; scratch {}", plan.scratch_bytes);
            // What the library would take for itself is not allocated here.
            let library = if weights == WeightFormat::Stored { 32 << 20 } else { 0 };
            let planned = planned - library;
            assert!(peak <= planned, "{case}: {peak} bytes, {planned} planned");
            assert!(planned <= 2 * peak, "{case}: {peak} bytes, {planned} planned");
        }
    }
}
