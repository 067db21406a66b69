//! Plugins on the embedded model: what they end, change and prune, and what they leave alone.

use tinyserve_kernels::{Cpu, CpuOptions};
use tinyserve_kv::KvFormat;
use tinyserve_model::{Checkpoint, KvCache, Model, SamplingParams};
use tinyserve_plugins::{
    Action, EntropyExit, EntropySignal, PluginError, PluginManager, PluginStats, TokenPruning,
};
use tinyserve_sched::{
    Engine, EngineConfig, Event, EventStream, Failure, FailureKind, FinishReason, Finished,
    ModelRunner, Request, StopReason,
};

fn engine(pages: usize, plugins: &PluginManager) -> Engine {
    let checkpoint = Checkpoint::builtin().unwrap();
    let cpu = Cpu::new(CpuOptions { threads: Some(2), path: None }).unwrap();
    let model = Model::load(cpu, &checkpoint, |_, _| {}).unwrap();
    let layout = model.config().kv_layout(16, KvFormat::F32).unwrap();
    let cache = KvCache::new(model.backend(), layout, pages).unwrap();
    let config = EngineConfig {
        tokenizer: Some(checkpoint.tokenizer().unwrap()),
        plugins: plugins.clone(),
        attention_chunk_size: 20,
        ..EngineConfig::default()
    };
    Engine::start("engine", ModelRunner::new(model, cache), config).unwrap()
}

fn prompt(text: &str) -> Vec<u32> {
    Checkpoint::builtin().unwrap().tokenizer().unwrap().encode(text, true).unwrap()
}

fn greedy(text: &str, max_tokens: usize) -> Request {
    Request::new(prompt(text)).max_tokens(max_tokens).sampling(SamplingParams::greedy())
}

fn end(stream: EventStream) -> (Vec<u32>, Result<Finished, Failure>) {
    let mut tokens = Vec::new();
    for event in stream {
        match event {
            Event::Token(token) => tokens.push(token.id),
            Event::Finished(finished) => return (tokens, Ok(finished)),
            Event::Failed(failure) => return (tokens, Err(failure)),
            Event::Aborted(_) => panic!("nobody aborts"),
            _ => {}
        }
    }
    panic!("no end");
}

fn answer(engine: &Engine, request: Request) -> (Vec<u32>, Finished) {
    let (tokens, finished) = end(engine.submit(request).unwrap());
    (tokens, finished.unwrap())
}

fn stats(manager: &PluginManager, name: &str) -> PluginStats {
    manager.stats().into_iter().find(|stats| stats.name == name).unwrap()
}

const STORY: &str = "Once upon a time there was a little girl who lived with her mother, and one \
    day she went to the park with her dog to play with the ball";

#[test]
fn certainty_ends_an_answer_early() {
    for signal in EntropySignal::ALL {
        let manager = PluginManager::new();
        let exit = EntropyExit { signal, threshold: 100.0, min_tokens: 7, patience: 2 };
        manager.register(EntropyExit::NAME, exit.check().unwrap()).unwrap();
        let engine = engine(64, &manager);
        let (tokens, finished) = answer(&engine, greedy("Once upon a time", 40));
        assert_eq!((tokens.len(), finished.reason), (7, FinishReason::Stop), "{signal}");
        let Some(StopReason::Plugin { plugin, reason }) = finished.stop_reason else {
            panic!("{:?}", finished.stop_reason)
        };
        assert_eq!((plugin.as_str(), reason.as_str()), ("entropy_early_exit", EntropyExit::REASON));
        assert_eq!(stats(&manager, EntropyExit::NAME).early_exit_count, 1);
        // A request may do without, and the engine may, too.
        let mut without = greedy("Once upon a time", 40);
        without.plugins = vec![(EntropyExit::NAME.to_owned(), false)];
        let (whole, finished) = answer(&engine, without);
        assert_eq!((whole.len(), finished.reason), (40, FinishReason::Length));
        assert_eq!(whole[..7], tokens, "what was drawn until then is the same");
        manager.disable(EntropyExit::NAME).unwrap();
        assert_eq!(answer(&engine, greedy("Once upon a time", 40)).0, whole);
    }
}

#[test]
fn the_entropy_that_decides_is_the_real_one() {
    // Log-probabilities of a greedy answer tell the most that its next token's entropy can be:
    // where the best token has nearly all, there is nearly none.
    let manager = PluginManager::new();
    let exit =
        EntropyExit { signal: EntropySignal::NextToken, threshold: 0.05, ..Default::default() };
    manager.register(EntropyExit::NAME, EntropyExit { min_tokens: 0, ..exit }).unwrap();
    let engine = engine(64, &manager);
    let request = |exits| {
        let mut request = greedy("Once upon a time", 60);
        request.top_logprobs = 1;
        request.plugins = vec![(EntropyExit::NAME.to_owned(), exits)];
        request
    };
    let stopped = answer(&engine, request(true)).0;
    let mut best = Vec::new();
    for event in engine.submit(request(false)).unwrap() {
        if let Event::Token(token) = event {
            best.push(token.top_logprobs[0].logprob.exp());
        }
    }
    assert!(!stopped.is_empty() && stopped.len() < 60, "{}", stopped.len());
    assert!(best[stopped.len()] > 0.95, "the token that was not drawn was certain: {best:?}");
    // Entropy is at least −ln of the best token's probability: those before could not stop it.
    assert!(best[..stopped.len()].iter().all(|p| *p < 0.9999), "{best:?}");
}

#[test]
fn closures_bias_and_stop() {
    let manager = PluginManager::new();
    let only = 300;
    manager.register_fn("only", move |_| Action::Bias(vec![(only, 1000.0)])).unwrap();
    manager
        .register_fn("custom_opt", |ctx| {
            if ctx.generated().len() < 5 {
                Action::Continue
            } else {
                Action::stop("five are enough")
            }
        })
        .unwrap();
    let engine = engine(64, &manager);
    let (tokens, finished) = answer(&engine, greedy("Once upon a time", 40));
    assert_eq!(tokens, [only; 5]);
    let (plugin, reason) = ("custom_opt".to_owned(), "five are enough".to_owned());
    assert_eq!(finished.stop_reason, Some(StopReason::Plugin { plugin, reason }));
}

#[test]
fn what_is_switched_on_in_a_step_waits_for_the_next() {
    let manager = PluginManager::new();
    let switch = manager.clone();
    manager
        .register_fn("switch", move |ctx| {
            for name in [EntropyExit::NAME, TokenPruning::NAME] {
                if ctx.generated().len() % 3 == 2 {
                    switch.enable(name)?;
                } else {
                    switch.disable(name)?;
                }
            }
            Ok::<_, PluginError>(())
        })
        .unwrap();
    let exit = EntropyExit { threshold: 1e-9, ..EntropyExit::default() };
    manager.register(EntropyExit::NAME, exit).unwrap();
    manager.register(TokenPruning::NAME, pruning(0.2)).unwrap();
    for name in [EntropyExit::NAME, TokenPruning::NAME] {
        manager.disable(name).unwrap();
    }
    // What they need is observed in the steps that they were planned for, and in no other.
    let (tokens, _) = answer(&engine(64, &manager), greedy("Once upon a time", 120));
    assert_eq!(tokens.len(), 120);
    for name in [EntropyExit::NAME, TokenPruning::NAME] {
        let stats = stats(&manager, name);
        assert_eq!((stats.calls, stats.errors), (39, 0), "{name}");
    }
}

#[test]
fn a_failing_plugin_fails_its_request_alone() {
    let manager = PluginManager::new();
    manager
        .register_fn("fragile", |ctx| {
            assert!(ctx.prompt().len() > 6 || ctx.generated().len() < 3, "the prompt is short");
        })
        .unwrap();
    let engine = engine(64, &manager);
    let long = engine.submit(greedy(STORY, 30)).unwrap();
    let (tokens, failed) = end(engine.submit(greedy("Once upon a time", 30)).unwrap());
    let failure = failed.unwrap_err();
    assert_eq!((tokens.len(), failure.kind), (3, FailureKind::Plugin));
    assert_eq!(
        failure.sentence,
        "plugin \"fragile\" failed in on_step: panicked: the prompt is short"
    );
    let (tokens, finished) = end(long);
    assert_eq!((tokens.len(), finished.unwrap().reason), (30, FinishReason::Length));
    assert_eq!(stats(&manager, "fragile").errors, 1);
    assert_eq!(engine.stats().pages_used, 0);
    // A plugin that nobody has is refused before anything is queued.
    let mut request = greedy("Once", 3);
    request.plugins = vec![("robust".to_owned(), true)];
    let refused = engine.submit(request).unwrap_err().to_string();
    assert_eq!(refused, "plugins is robust, expected fragile");
    assert_eq!(engine.stats().queued_requests, 0);
}

fn pruning(ratio: f64) -> TokenPruning {
    TokenPruning { ratio, min_tokens: 20, sink_tokens: 4, recent_tokens: 8 }
}

#[test]
fn pruning_keeps_the_cache_of_a_long_answer_small() {
    let manager = PluginManager::new();
    manager.register(TokenPruning::NAME, pruning(0.5)).unwrap();
    let engine = engine(64, &manager);
    let run = |plugin| {
        let mut request = greedy(STORY, 200);
        request.plugins = vec![(TokenPruning::NAME.to_owned(), plugin)];
        answer(&engine, request)
    };
    let (whole, plain) = run(false);
    let (pruned, small) = run(true);
    assert_eq!((whole.len(), pruned.len()), (200, 200));
    let tokens = prompt(STORY).len() + 199;
    assert_eq!(plain.summary.kv.pages, tokens.div_ceil(16));
    assert_eq!(plain.summary.kv.pruned_tokens, 0);
    let kv = small.summary.kv;
    assert!(kv.pages <= prompt(STORY).len().div_ceil(16) + 1, "{} pages", kv.pages);
    let left = tokens - kv.pruned_tokens as usize;
    assert_eq!(kv.pages, left.div_ceil(16), "{} tokens of {tokens} were pruned", kv.pruned_tokens);
    let stats = stats(&manager, TokenPruning::NAME);
    assert!(stats.pruning_count > 2 && stats.pruned_tokens == kv.pruned_tokens, "{stats:?}");
    let freed = stats.bytes_before_pruning - stats.bytes_after_pruning;
    assert_eq!(freed, kv.pruned_bytes);
    assert!(freed > 0 && freed.is_multiple_of(engine.limits().bytes_per_page as u64));
    assert_eq!(engine.stats().pages_used, 0);
    // The first token comes from the whole prompt; what is gone shows later, if at all.
    assert_eq!(pruned[0], whole[0]);
}

#[test]
fn a_ratio_of_nothing_changes_nothing() {
    let manager = PluginManager::new();
    manager.register(TokenPruning::NAME, pruning(0.0)).unwrap();
    let engine = engine(64, &manager);
    let mut request = greedy(STORY, 100);
    request.sampling = SamplingParams { seed: Some(3), ..SamplingParams::default() };
    let logprobs = |plugin| -> Vec<(u32, u32)> {
        let mut request = request.clone();
        request.plugins = vec![(TokenPruning::NAME.to_owned(), plugin)];
        let events = engine.submit(request).unwrap();
        let tokens = events.filter_map(|event| match event {
            Event::Token(token) => Some((token.id, token.logprob.to_bits())),
            _ => None,
        });
        tokens.collect()
    };
    assert_eq!(logprobs(true), logprobs(false));
    assert_eq!(stats(&manager, TokenPruning::NAME).pruned_tokens, 0);
}

#[test]
fn a_batch_prunes_each_sequence_as_it_would_alone() {
    let manager = PluginManager::new();
    manager.register(TokenPruning::NAME, pruning(0.4)).unwrap();
    let engine = engine(200, &manager);
    let texts = [STORY, "Lily and Tom went to the park", "One day a big red dog saw a cat"];
    let alone: Vec<_> = texts.iter().map(|text| answer(&engine, greedy(text, 90)).0).collect();
    let streams: Vec<_> =
        texts.iter().map(|text| engine.submit(greedy(text, 90)).unwrap()).collect();
    for (stream, alone) in streams.into_iter().zip(alone) {
        let (tokens, finished) = end(stream);
        assert_eq!(tokens, alone);
        assert!(finished.unwrap().summary.kv.pruned_tokens > 0);
    }
    assert_eq!(engine.stats().pages_used, 0);
}

#[test]
fn preempted_sequences_lose_the_same_tokens_again() {
    let manager = PluginManager::new();
    manager.register(TokenPruning::NAME, TokenPruning { min_tokens: 90, ..pruning(0.2) }).unwrap();
    let request = || greedy("Once upon a time", 150);
    let (alone, finished) = answer(&engine(64, &manager), request());
    let pruned = finished.summary.kv.pruned_tokens;
    assert!(pruned > 0);
    let engine = engine(16, &manager);
    let streams: Vec<_> = (0..4).map(|_| engine.submit(request()).unwrap()).collect();
    for stream in streams {
        let (tokens, finished) = end(stream);
        assert_eq!(tokens, alone);
        assert_eq!(finished.unwrap().summary.kv.pruned_tokens, pruned);
    }
    let stats = engine.stats();
    assert!(stats.preemptions > 0, "the cache was large enough for everybody");
    assert_eq!((stats.pages_used, stats.failed), (0, 0));
}

#[test]
fn a_session_goes_on_from_a_pruned_cache() {
    let manager = PluginManager::new();
    manager.register(TokenPruning::NAME, pruning(0.5)).unwrap();
    let engine = engine(64, &manager);
    let first = greedy(STORY, 80).session("a");
    let mut history = first.prompt.clone();
    let (tokens, _) = answer(&engine, first);
    history.extend(tokens);
    let info = engine.session_info("a").wait().unwrap().unwrap();
    assert!(info.cached_tokens < history.len() - 1, "{info:?}");
    history.extend(prompt("and then").into_iter().skip(1));
    let mut next = Request::new(&history[..]).max_tokens(10).sampling(SamplingParams::greedy());
    next.session = Some("a".to_owned());
    let (tokens, finished) = answer(&engine, next);
    assert_eq!(tokens.len(), 10);
    let usage = finished.summary.usage;
    assert!(usage.cached_tokens >= history.len() - 4, "only what is new is computed: {usage:?}");
    // Another continuation cannot use what lies behind the first pruned token.
    history.truncate(60);
    history.extend(prompt("Then the dog said").into_iter().skip(1));
    let mut other = Request::new(&history[..]).max_tokens(10).sampling(SamplingParams::greedy());
    other.session = Some("a".to_owned());
    let (_, finished) = answer(&engine, other);
    assert!(finished.summary.usage.cached_tokens <= 16, "{:?}", finished.summary.usage);
    assert!(engine.delete_session("a").wait().unwrap());
    assert_eq!(engine.stats().pages_used, 0);
}
