//! What counting and observing cost beside a decode step of the embedded model.
//!
//! `cargo bench -p tinyserve-sched --bench metrics` prints it. Variants take turns, and medians of
//! their rounds are compared, so that what else the machine does hits all of them alike.
#![forbid(unsafe_code)]

use std::time::{Duration, Instant};

use tinyserve_kernels::{AttendStats, Cpu, CpuOptions};
use tinyserve_kv::{KvFormat, SelectionPolicy};
use tinyserve_model::{Checkpoint, KvCache, Model, SamplingParams};
use tinyserve_plugins::{
    Action, EntropyExit, HookResult, Needs, Plugin, PluginManager, StepContext,
};
use tinyserve_sched::{AttentionChoice, EngineConfig, Event, ModelRunner, Request, Scheduler};

/// The counters themselves, which only the engine's thread can write otherwise.
#[path = "../src/metrics.rs"]
#[allow(dead_code, unreachable_pub, unused_imports)]
mod metrics;

use metrics::{Metrics, count, gauge};

const PROMPT: u32 = 256;
const STEPS: usize = 200;
const ROUNDS: usize = 15;

fn main() {
    let mut dense = Variant::new(AttentionChoice::Dense, 0, PluginManager::new());
    let mut entropy = Variant::new(AttentionChoice::Dense, 0, {
        let plugins = PluginManager::new();
        // Nothing is below it: the entropy is computed and never stops anything.
        let exit = EntropyExit { threshold: f64::MIN_POSITIVE, ..EntropyExit::default() };
        plugins.register(EntropyExit::NAME, exit).unwrap();
        plugins
    });
    let mut mass = Variant::new(AttentionChoice::Dense, 0, {
        let plugins = PluginManager::new();
        plugins.register("watch", WatchMass).unwrap();
        plugins
    });
    let policy = SelectionPolicy { min_context: 0, ..SelectionPolicy::default() };
    let selecting = || AttentionChoice::Policy(policy);
    let mut unsampled = Variant::new(selecting(), 0, PluginManager::new());
    let mut sampled = Variant::new(selecting(), 16, PluginManager::new());
    for _ in 0..ROUNDS {
        for one in [&mut dense, &mut entropy, &mut mass, &mut unsampled, &mut sampled] {
            one.round();
        }
    }
    let step = dense.median();
    let counting = counting();
    let share = |part: f64, whole: f64| 100.0 * part / whole;
    let more = |one: &Variant, than: &Variant| share(one.median() - than.median(), than.median());
    println!("decode step of the embedded model, one thread     {:9.2} µs", 1e6 * step);
    println!(
        "what counting adds to it                          {:9.3} µs, {:.3} %",
        1e6 * counting,
        share(counting, step)
    );
    println!("observing the entropy of attention                {:+9.2} %", more(&entropy, &dense));
    println!("observing the mass of attention                   {:+9.2} %", more(&mass, &dense));
    println!(
        "recall and reuse of selection, one step in 16     {:+9.2} %",
        more(&sampled, &unsampled)
    );
}

/// A scheduler, and what its decode steps took in each round.
struct Variant {
    scheduler: Scheduler<ModelRunner<Cpu>>,
    /// Seconds of a step.
    rounds: Vec<f64>,
}

impl Variant {
    fn new(attention: AttentionChoice, recall_interval: usize, plugins: PluginManager) -> Self {
        let checkpoint = Checkpoint::builtin().unwrap();
        let cpu = Cpu::new(CpuOptions { threads: Some(1), path: None }).unwrap();
        let model = Model::load(cpu, &checkpoint, |_, _| {}).unwrap();
        let layout = model.config().kv_layout(16, KvFormat::F32).unwrap();
        let cache = KvCache::new(model.backend(), layout, 64).unwrap();
        let config =
            EngineConfig { attention, recall_interval, plugins, ..EngineConfig::default() };
        let scheduler = Scheduler::new(ModelRunner::new(model, cache), config).unwrap();
        Self { scheduler, rounds: Vec::new() }
    }

    /// Decodes a text of the same length as in every round.
    fn round(&mut self) {
        let prompt: Vec<u32> = (0..PROMPT).map(|i| 3 + i * 7 % 500).collect();
        let request = Request {
            ignore_eos: true,
            ..Request::new(prompt).max_tokens(STEPS + 1).sampling(SamplingParams::greedy())
        };
        let (submission, events) = self.scheduler.intake().take(request, |_| {}).unwrap();
        self.scheduler.add(submission);
        while self.scheduler.stats().generation_tokens.is_multiple_of(STEPS as u64 + 1) {
            self.scheduler.step();
        }
        let start = Instant::now();
        while !self.scheduler.is_idle() {
            self.scheduler.step();
        }
        self.rounds.push(start.elapsed().as_secs_f64() / STEPS as f64);
        let tokens = events.filter(|event| matches!(event, Event::Token(_))).count();
        assert_eq!(tokens, STEPS + 1);
    }

    fn median(&self) -> f64 {
        let mut sorted = self.rounds.clone();
        sorted.sort_by(f64::total_cmp);
        sorted[sorted.len() / 2]
    }
}

/// Asks for the attention mass of each token, and does nothing with it.
struct WatchMass;

impl Plugin for WatchMass {
    fn needs(&self) -> Needs {
        Needs { attention_mass: true, ..Needs::default() }
    }

    fn on_step(&self, context: &mut StepContext<'_>) -> HookResult {
        assert!(context.attention_mass().is_some());
        Ok(Action::Continue)
    }
}

/// Seconds that a decode step of one sequence takes to be counted: what the scheduler writes then.
fn counting() -> f64 {
    const TIMES: u32 = 1_000_000;
    let metrics = Metrics::default();
    let layer = AttendStats { pages_read: 32, pages_total: 32, ..AttendStats::default() };
    let layers = [layer; 5];
    let start = Instant::now();
    for i in 0..TIMES {
        let took = Duration::from_nanos(u64::from(200_000 + i % 1000));
        count(&metrics.steps, 1);
        metrics.step.record(took);
        // One step in thirteen looks at the clock before and after the attention of each layer.
        let attention = (i % 13 == 0).then(|| {
            layers.iter().map(|_| std::hint::black_box(Instant::now()).elapsed()).sum::<Duration>()
        });
        metrics.attended(std::hint::black_box(&layers), attention);
        metrics.read_in_layers(std::hint::black_box(&layers));
        metrics.read_by_decode(std::hint::black_box(&layer));
        count(&metrics.generation_tokens, 1);
        metrics.itl.record(took);
        for now in [&metrics.running, &metrics.waiting, &metrics.sessions] {
            gauge(now, std::hint::black_box(1));
        }
        for now in [&metrics.pages_used, &metrics.pages_idle, &metrics.prefix_hits] {
            gauge(now, std::hint::black_box(1));
        }
        for now in [
            &metrics.prefix_lookups,
            &metrics.prefix_hit_tokens,
            &metrics.prefix_evicted_for_room,
            &metrics.prefix_evicted_for_limit,
            &metrics.prefix_evicted_by_clear,
        ] {
            gauge(now, std::hint::black_box(1));
        }
    }
    let seconds = start.elapsed().as_secs_f64() / f64::from(TIMES);
    assert_eq!(metrics.read().step.count(), u64::from(TIMES));
    seconds
}
