//! The engine on the embedded model, from its callers' side.

mod answers;
mod ends;
mod selection;
mod sessions;

use tinyserve_kernels::{Cpu, CpuOptions};
use tinyserve_kv::{EvictionPolicy, KvFormat, PrefixIndex, PrefixOptions};
use tinyserve_model::{Checkpoint, KvCache, Model, SamplingParams};
use tinyserve_sched::{Engine, EngineConfig, Event, Finished, ModelRunner, Request, Token};

/// An engine with `pages` pages of 16 tokens.
pub(crate) fn engine(pages: usize, config: EngineConfig) -> Engine {
    replicas(1, (pages, KvFormat::F32), config)
}

/// As [`engine`], as several, whose pages are of a format.
pub(crate) fn replicas(count: usize, pages: (usize, KvFormat), config: EngineConfig) -> Engine {
    let checkpoint = Checkpoint::builtin().unwrap();
    let eos = checkpoint.config().eos.clone();
    let tokenizer = Some(checkpoint.tokenizer().unwrap());
    let config = EngineConfig { tokenizer, eos, ..config };
    let runners = (0..count).map(|_| runner(&checkpoint, pages)).collect();
    Engine::start_replicas("engine", runners, &config).unwrap()
}

fn runner(checkpoint: &Checkpoint, (pages, format): (usize, KvFormat)) -> ModelRunner<Cpu> {
    let cpu = Cpu::new(CpuOptions { threads: Some(2), path: None }).unwrap();
    let model = Model::load(cpu, checkpoint, |_, _| {}).unwrap();
    let layout = model.config().kv_layout(16, format).unwrap();
    let options = PrefixOptions {
        identity: "stories",
        layout,
        policy: EvictionPolicy::Lru,
        max_pages: pages,
    };
    let cache = KvCache::new(model.backend(), layout, pages).unwrap();
    let cache = cache.with_prefix_index(PrefixIndex::new(options));
    ModelRunner::new(model, cache)
}

pub(crate) fn prompt(text: &str) -> Vec<u32> {
    Checkpoint::builtin().unwrap().tokenizer().unwrap().encode(text, true).unwrap()
}

pub(crate) fn greedy(text: &str, max_tokens: usize) -> Request {
    Request::new(prompt(text)).max_tokens(max_tokens).sampling(SamplingParams::greedy())
}

/// The text and the end of a request.
pub(crate) fn answer(engine: &Engine, request: Request) -> (String, Vec<Token>, Finished) {
    let (mut text, mut tokens) = (String::new(), Vec::new());
    for event in engine.submit(request).unwrap() {
        match event {
            Event::Token(token) => {
                text += &token.text;
                tokens.push(token);
            }
            Event::Finished(finished) => {
                text += &finished.summary.rest;
                return (text, tokens, finished);
            }
            Event::Aborted(_) | Event::Failed(_) => panic!("{event:?}"),
            _ => {}
        }
    }
    panic!("no end");
}
