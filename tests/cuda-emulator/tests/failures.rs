//! A kernel that fails, or memory that is not there, fails one request and nothing else.

use std::path::Path;

use tinyserve_cuda_emulator::ready;
use tinyserve_kernels::{Attention, Backend, Cuda, CudaDevice, CudaError, KernelError};
use tinyserve_kv::KvFormat;
use tinyserve_model::{
    Activations, Batch, Checkpoint, KvCache, LogitRows, Model, ModelError, Observe, SequenceStep,
    StepOutput,
};

fn free() -> usize {
    CudaDevice::all().unwrap()[0].free
}

#[test]
fn a_failed_launch_leaves_the_engine_usable_and_memory_comes_back() {
    let Some(ready) = ready() else { return };
    // Only the emulator can be made to fail.
    let Some(emulator) = ready.emulator else { return };
    let before = free();
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../golden/llama-gqa");
    let checkpoint = Checkpoint::open(&folder).unwrap();
    // Launched one by one, a kernel that fails is named.
    let cuda = Cuda::new(0).unwrap().use_graphs(false);
    let model = Model::load(cuda, &checkpoint, |_, _| {}).unwrap();
    for format in [KvFormat::F16, KvFormat::Int8] {
        let layout = model.config().kv_layout(4, format).unwrap();
        let mut cache = KvCache::new(model.backend(), layout, 16).unwrap();
        let mut activations = Activations::new(&model);
        let mut step = |tokens: &[u32]| -> Result<Vec<f32>, ModelError> {
            let mut output = StepOutput::default();
            let mut table = cache.new_table();
            cache.extend(model.backend(), &mut table, tokens.len())?;
            let sequence = SequenceStep {
                tokens,
                table: &table,
                attention: Attention::Dense,
                logits: LogitRows::Last,
                observe: Observe::default(),
            };
            let batch = Batch { sequences: &[sequence], measure_recall: false, list_pages: false };
            let done = model.forward(&mut activations, &mut cache, &batch, &mut output);
            cache.release(table);
            done?;
            Ok(output.logits(0).next().unwrap().to_vec())
        };
        let tokens = [1, 5, 9, 2, 6];
        let expected = step(&tokens).unwrap();
        for kernel in [c"norm_rms", c"rotary", c"activate"] {
            emulator.fail(kernel);
            let error = step(&tokens).unwrap_err();
            emulator.fail(c"");
            let sentence = error.to_string();
            let name = kernel.to_str().unwrap();
            assert!(sentence.contains(&format!("kernel {name} failed")), "{sentence}");
            assert_eq!(step(&tokens).unwrap(), expected, "{name}");
        }
    }
    let layout = model.config().kv_layout(16, KvFormat::F16).unwrap();
    let many = free() / layout.bytes_per_page() + 64;
    match model.backend().allocate_pages(layout, many) {
        Err(KernelError::Cuda(CudaError::OutOfMemory { what, asked, free })) => {
            assert!(what.contains(&many.to_string()) && asked > free, "{what}: {asked}, {free}");
        }
        other => panic!("{other:?}, expected no memory"),
    }
    drop(model);
    assert_eq!(free(), before, "memory that was not given back");
}
