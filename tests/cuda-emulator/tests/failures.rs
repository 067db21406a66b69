//! A kernel that fails, or memory that is not there, fails one request and nothing else.

mod common;

use std::sync::atomic::{AtomicBool, Ordering};

use tinyserve_cuda_emulator::ready;
use tinyserve_kernels::{
    Backend, Cuda, CudaDevice, CudaError, DType, HostTensor, KernelError, LinearPart, LinearSpec,
    MatrixLayout, WeightFormat,
};
use tinyserve_kv::KvFormat;
use tinyserve_model::ModelError;

use common::Engine;

fn free() -> usize {
    CudaDevice::all().unwrap()[0].free
}

/// Logits of a sequence of its own.
fn prompt(engine: &mut Engine, tokens: &[u32]) -> Result<Vec<f32>, ModelError> {
    let mut table = engine.cache.new_table();
    let logits = engine.step(&mut table, tokens);
    engine.cache.release(table);
    logits
}

/// One after the other: what one makes fail, or takes, is the whole process's.
#[test]
fn failures_leave_the_engine_usable_and_memory_comes_back() {
    let Some(ready) = ready() else { return };
    // Only the emulator can be made to fail.
    let Some(emulator) = ready.emulator else { return };
    let before = free();
    for format in [KvFormat::F16, KvFormat::Int8] {
        // Launched one by one, a kernel that fails is named.
        let mut engine = Engine::new(Cuda::new(0).unwrap().use_graphs(false), format);
        let tokens = [1, 5, 9, 2, 6];
        let expected = prompt(&mut engine, &tokens).unwrap();
        for kernel in [c"rotary_angles", c"project_f32_8", c"gemv_f32_8"] {
            emulator.fail(kernel);
            let error = prompt(&mut engine, &tokens).unwrap_err();
            emulator.fail(c"");
            let (sentence, name) = (error.to_string(), kernel.to_str().unwrap());
            assert!(sentence.contains(&format!("kernel {name} failed in a grid")), "{sentence}");
            assert!(sentence.contains("with sizes ["), "{sentence}");
            assert_eq!(prompt(&mut engine, &tokens).unwrap(), expected, "{name}");
        }
    }
    assert_eq!(free(), before, "memory that was not given back");
    a_step_that_is_replayed(emulator);
    a_capture_that_is_invalidated(emulator);
    devices_opened_beside_a_step(emulator);
    assert_eq!(free(), before, "memory that was not given back");
    no_memory_for_a_pool_or_a_step(emulator);
    assert_eq!(free(), before, "memory that was not given back");
}

fn a_step_that_is_replayed(emulator: &tinyserve_cuda_emulator::Emulator) {
    let mut engine = Engine::new(Cuda::new(0).unwrap(), KvFormat::F16);
    let mut table = engine.cache.new_table();
    engine.step(&mut table, &[1, 5, 9, 2, 6]).unwrap();
    let replays = |engine: &Engine| engine.model.backend().replayed_steps();
    while replays(&engine) < 2 {
        assert!(table.len() < 60, "no step came again");
        engine.step(&mut table, &[7]).unwrap();
    }
    let waits = emulator.waits();
    engine.step(&mut table, &[7]).unwrap();
    assert_eq!(emulator.waits() - waits, 1, "a step waits for its logits, and for nothing else");
    emulator.fail(c"rotary_angles");
    let sentence = engine.step(&mut table, &[7]).unwrap_err().to_string();
    emulator.fail(c"");
    assert!(sentence.contains("kernels, from embed_f32 to project_f32_"), "{sentence}");
    assert!(sentence.contains("OUT_OF_RESOURCES"), "{sentence}");
    engine.cache.release(table);
    let mut other = Engine::new(Cuda::new(0).unwrap(), KvFormat::F16);
    let tokens = [1, 5, 9, 2, 6];
    assert_eq!(prompt(&mut engine, &tokens).unwrap(), prompt(&mut other, &tokens).unwrap());
}

/// Steps of one token, until `replays` were replayed; the logits of each.
fn steps(engine: &mut Engine, replays: u64) -> Vec<Vec<f32>> {
    let mut table = engine.cache.new_table();
    let mut logits = vec![engine.step(&mut table, &[1, 5, 9, 2, 6]).unwrap()];
    while engine.model.backend().replayed_steps() < replays {
        assert!(table.len() < 60, "no step came again");
        logits.push(engine.step(&mut table, &[7]).unwrap());
    }
    engine.cache.release(table);
    logits
}

/// What another thread's call does to a capture.
fn a_capture_that_is_invalidated(emulator: &tinyserve_cuda_emulator::Emulator) {
    let mut engine = Engine::new(Cuda::new(0).unwrap(), KvFormat::F16);
    let before = emulator.invalidate(2);
    let found = steps(&mut engine, 2);
    assert_eq!(emulator.invalidate(0) - before, 2, "captures that were invalidated");
    let mut other = Engine::new(Cuda::new(0).unwrap().use_graphs(false), KvFormat::F16);
    let mut table = other.cache.new_table();
    let mut expected = vec![other.step(&mut table, &[1, 5, 9, 2, 6]).unwrap()];
    expected.extend(found[1..].iter().map(|_| other.step(&mut table, &[7]).unwrap()));
    assert_eq!(found, expected);
    // A kernel that fails during a capture is named.
    let mut engine = Engine::new(Cuda::new(0).unwrap(), KvFormat::F16);
    let mut table = engine.cache.new_table();
    let captures = |engine: &Engine| engine.model.backend().captured_steps();
    engine.step(&mut table, &[1, 5, 9, 2, 6]).unwrap();
    emulator.invalidate(1);
    let before = emulator.invalidate(1);
    while emulator.invalidate(1) == before {
        engine.step(&mut table, &[7]).unwrap();
    }
    emulator.invalidate(0);
    assert_eq!(captures(&engine), 0);
    emulator.fail(c"rotary_angles");
    let sentence = engine.step(&mut table, &[7]).unwrap_err().to_string();
    emulator.fail(c"");
    assert!(sentence.contains("kernel rotary_angles failed in a grid"), "{sentence}");
}

/// Another engine of the process comes and goes: it loads and unloads code.
fn devices_opened_beside_a_step(emulator: &tinyserve_cuda_emulator::Emulator) {
    let before = emulator.invalidate(0);
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let beside = scope.spawn(|| {
            let mut times = 0u32;
            while !done.load(Ordering::Relaxed) {
                let weight = HostTensor::new("a matrix", vec![0; 16].into(), DType::F32, &[2, 2]);
                let parts = vec![LinearPart { weight: weight.unwrap(), bias: None }];
                let (layout, format) = (MatrixLayout::InOut, WeightFormat::Stored);
                let cuda = Cuda::new(0).unwrap();
                cuda.load_linear(LinearSpec { parts, layout, format }).unwrap();
                times += 1;
            }
            times
        });
        for _ in 0..8 {
            let mut engine = Engine::new(Cuda::new(0).unwrap(), KvFormat::F16);
            steps(&mut engine, 1);
        }
        done.store(true, Ordering::Relaxed);
        assert!(beside.join().unwrap() > 8);
    });
    assert_eq!(emulator.invalidate(0), before, "captures that our own calls invalidated");
}

fn no_memory_for_a_pool_or_a_step(emulator: &tinyserve_cuda_emulator::Emulator) {
    let mut engine = Engine::new(Cuda::new(0).unwrap(), KvFormat::F16);
    let layout = engine.model.config().kv_layout(16, KvFormat::F16).unwrap();
    let many = free() / layout.bytes_per_page() + 64;
    match engine.model.backend().allocate_pages(layout, many) {
        Err(KernelError::Cuda(CudaError::OutOfMemory { what, asked, free })) => {
            assert!(what.contains(&many.to_string()) && asked > free, "{what}: {asked}, {free}");
        }
        other => panic!("{other:?}, expected no memory"),
    }
    // Nor are there kernels for open pages in f32.
    let codes = engine.model.config().kv_layout(16, KvFormat::Int8).unwrap();
    let wide = codes.with_open_format(KvFormat::F32).unwrap();
    let sentence = engine.model.backend().allocate_pages(wide, 1).unwrap_err().to_string();
    assert!(sentence.contains("open_page_dtype is f32, expected f16 on a CUDA"), "{sentence}");
    // Somebody else takes nearly all of it.
    emulator.leave_free(Some(16 << 10));
    let tokens: Vec<u32> = (0..100).collect();
    let sentence = prompt(&mut engine, &tokens).unwrap_err().to_string();
    let told = ["no memory for", "bytes asked for", "free; lower", "--kv-cache-dtype"];
    assert!(told.iter().all(|words| sentence.contains(words)), "{sentence}");
    emulator.leave_free(None);
    let logits = prompt(&mut engine, &tokens).unwrap();
    assert!(logits.iter().all(|x| x.is_finite()));
}
