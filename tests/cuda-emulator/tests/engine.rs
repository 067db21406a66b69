//! A kernel that fails, or memory that is not there, fails the requests of a step; the engine answers
//! the next ones as if nothing had been.

use std::ffi::CStr;
use std::path::Path;

use tinyserve_cuda_emulator::{Emulator, ready};
use tinyserve_kernels::{Cuda, CudaDevice};
use tinyserve_kv::KvFormat;
use tinyserve_model::{Checkpoint, KvCache, Model, SamplingParams};
use tinyserve_sched::{Engine, EngineConfig, Event, EventStream, Failure, ModelRunner, Request};

const PAGES: usize = 64;
const PROMPT: [u32; 5] = [1, 5, 9, 2, 6];

fn free() -> usize {
    CudaDevice::all().unwrap()[0].free
}

fn checkpoint() -> Checkpoint {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../golden/llama-gqa");
    Checkpoint::open(&folder).unwrap()
}

fn engine(format: KvFormat) -> Engine {
    let model = Model::load(Cuda::new(0).unwrap(), &checkpoint(), |_, _| {}).unwrap();
    let layout = model.config().kv_layout(4, format).unwrap();
    let cache = KvCache::new(model.backend(), layout, PAGES).unwrap();
    let config = EngineConfig { max_sequence_length: 200, ..EngineConfig::default() };
    Engine::start("engine", ModelRunner::new(model, cache), config).unwrap()
}

fn submit(engine: &Engine, prompt: &[u32], max_tokens: usize) -> EventStream {
    let request = Request::new(prompt.to_vec());
    let request = request.max_tokens(max_tokens).sampling(SamplingParams::greedy());
    engine.submit(request).unwrap()
}

/// The tokens of an answer, or what it failed with.
fn answer(events: EventStream) -> Result<Vec<u32>, Failure> {
    let mut tokens = Vec::new();
    for event in events {
        match event {
            Event::Token(token) => tokens.push(token.id),
            Event::Failed(failure) => return Err(failure),
            Event::Aborted(_) => panic!("nobody ended it"),
            _ => {}
        }
    }
    Ok(tokens)
}

fn sentence(answer: Result<Vec<u32>, Failure>) -> String {
    answer.expect_err("a kernel has failed").sentence
}

/// While launches of `kernel` fail.
fn failing<T>(emulator: &Emulator, kernel: &CStr, run: impl FnOnce() -> T) -> T {
    emulator.fail(kernel);
    let result = run();
    emulator.fail(c"");
    result
}

/// One after the other: what one makes fail, or takes, is the whole process's.
#[test]
fn requests_that_fail_leave_the_engine_usable() {
    let Some(ready) = ready() else { return };
    // Only the emulator can be made to fail.
    let Some(emulator) = ready.emulator else { return };
    let before = free();
    for format in [KvFormat::F16, KvFormat::Int8] {
        let engine = engine(format);
        let expected = answer(submit(&engine, &PROMPT, 6)).unwrap();
        assert_eq!(expected.len(), 6);
        a_kernel_fails(emulator, &engine, &expected);
        a_kernel_fails_amid_an_answer(emulator, &engine, &expected);
        there_is_no_memory(emulator, &engine, &expected);
        engine.drain().wait().unwrap();
        let stats = engine.stats();
        assert_eq!((stats.running, stats.pages_used), (0, 0), "{format}: pages come back");
        assert_eq!(stats.pages, PAGES as u64);
        engine.shutdown();
        drop(engine);
        assert_eq!(free(), before, "{format}: memory that was not given back");
    }
}

/// Of a prompt, and of two that share a step.
fn a_kernel_fails(emulator: &Emulator, engine: &Engine, expected: &[u32]) {
    for kernel in [c"rotary_angles", c"project_f32_8"] {
        let name = kernel.to_str().unwrap();
        let told = failing(emulator, kernel, || sentence(answer(submit(engine, &PROMPT, 6))));
        assert!(told.contains(&format!("kernel {name} failed in a grid")), "{told}");
        assert!(told.contains("with sizes ["), "{told}");
        assert_eq!(answer(submit(engine, &PROMPT, 6)).unwrap(), expected, "{name}");
    }
    let told = failing(emulator, c"rotary_angles", || {
        let both = [submit(engine, &PROMPT, 6), submit(engine, &PROMPT[1..], 6)];
        both.map(|events| sentence(answer(events)))
    });
    assert!(told.iter().all(|told| told.contains("rotary_angles")), "{told:?}");
    assert_eq!(answer(submit(engine, &PROMPT, 6)).unwrap(), expected);
}

/// The one that is running fails when it has answered in part.
fn a_kernel_fails_amid_an_answer(emulator: &Emulator, engine: &Engine, expected: &[u32]) {
    let mut events = submit(engine, &PROMPT, 150);
    let first = events.by_ref().find(|event| matches!(event, Event::Token(_)));
    assert!(first.is_some(), "it has begun");
    let told = failing(emulator, c"rotary_angles", || sentence(answer(events)));
    assert!(told.contains("failed") && told.contains("OUT_OF_RESOURCES"), "{told}");
    assert_eq!(answer(submit(engine, &PROMPT, 6)).unwrap(), expected);
}

/// Somebody else takes nearly all of it, and gives it back.
fn there_is_no_memory(emulator: &Emulator, engine: &Engine, expected: &[u32]) {
    emulator.leave_free(Some(16 << 10));
    let long: Vec<u32> = (0..150).map(|i| i % 100).collect();
    let told = sentence(answer(submit(engine, &long, 2)));
    let words = ["no memory for", "bytes asked for", "free; lower", "--kv-cache-dtype"];
    assert!(words.iter().all(|words| told.contains(words)), "{told}");
    emulator.leave_free(None);
    assert_eq!(answer(submit(engine, &long, 2)).unwrap().len(), 2);
    assert_eq!(answer(submit(engine, &PROMPT, 6)).unwrap(), expected);
}
