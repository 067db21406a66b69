//! Entropy exit and token pruning.

use proptest::prelude::*;
use tinyserve_plugins::{
    EntropyExit, EntropySignal, Needs, Plugin, PluginManager, Prefilled, Pruned, RequestInfo,
    RequestPlugins, Step, TokenPruning,
};

const PAGE_SIZE: usize = 4;

fn begin(name: &str, plugin: impl Plugin + 'static) -> (PluginManager, RequestPlugins) {
    let manager = PluginManager::new();
    manager.register(name, plugin).unwrap();
    let request = RequestInfo {
        id: "a".to_owned(),
        prompt: vec![1, 2, 3],
        max_tokens: 100,
        page_size: PAGE_SIZE,
    };
    let plugins = manager.begin(request, []).unwrap();
    (manager, plugins)
}

/// The number of tokens after which the exit stops, when steps have these entropies.
fn stops_after(exit: EntropyExit, entropies: &[f32]) -> Option<usize> {
    let (manager, mut plugins) = begin(EntropyExit::NAME, exit.check().unwrap());
    let tokens = vec![5; entropies.len()];
    for (generated, &entropy) in entropies.iter().enumerate() {
        // Two tokens of which one has the odds that give this entropy, or heads that differ.
        let odds = (0..10_000).map(|i| i as f32 / 500.0).min_by(|a, b| {
            let off = |odds: f32| (two_token_entropy(odds) - entropy).abs();
            off(*a).total_cmp(&off(*b))
        });
        let mut logits = [odds.unwrap(), 0.0];
        let heads = [1.5 * entropy, 0.5 * entropy];
        let step = Step {
            generated: &tokens[..generated],
            cached_tokens: 3 + generated,
            logits: &mut logits,
            attention_entropy: plugins.needs().attention_entropy.then_some(&heads),
            mass: None,
        };
        if let Some(stop) = plugins.on_step(step).unwrap().stop {
            assert_eq!(stop.plugin, "entropy_early_exit");
            assert_eq!(stop.reason, "entropy_early_exit");
            assert_eq!(manager.stats()[0].early_exit_count, 1);
            return Some(generated);
        }
    }
    assert_eq!(manager.stats()[0].early_exit_count, 0);
    None
}

fn two_token_entropy(odds: f32) -> f32 {
    let p = 1.0 / (1.0 + (-f64::from(odds)).exp());
    let term = |p: f64| if p > 0.0 { -p * p.ln() } else { 0.0 };
    (term(p) + term(1.0 - p)) as f32
}

#[test]
fn certainty_that_lasts_ends_a_request_after_its_least_tokens() {
    for signal in EntropySignal::ALL {
        let exit = EntropyExit { signal, threshold: 0.5, min_tokens: 3, patience: 1 };
        assert_eq!(stops_after(exit, &[0.6; 8]), None, "{signal}");
        assert_eq!(stops_after(exit, &[0.1; 8]), Some(3), "{signal}");
        assert_eq!(stops_after(exit, &[0.1, 0.1, 0.1, 0.6, 0.6, 0.4]), Some(5), "{signal}");
        let patient = EntropyExit { patience: 3, ..exit };
        assert_eq!(stops_after(patient, &[0.1; 8]), Some(3), "{signal}");
        let doubts = [0.1, 0.6, 0.1, 0.1, 0.6, 0.1, 0.1, 0.1];
        assert_eq!(stops_after(patient, &doubts), Some(7), "{signal}");
        assert_eq!(stops_after(EntropyExit { min_tokens: 0, ..exit }, &[0.1]), Some(0), "{signal}");
        assert_eq!(stops_after(EntropyExit { threshold: 1e-6, ..exit }, &[0.1; 8]), None);
    }
}

#[test]
fn only_attention_entropy_has_to_be_observed() {
    let needs = |signal| EntropyExit { signal, ..EntropyExit::default() }.needs();
    assert_eq!(needs(EntropySignal::NextToken), Needs::default());
    assert!(needs(EntropySignal::Attention).attention_entropy);
    let (_, mut plugins) = begin("exit", EntropyExit { min_tokens: 0, ..EntropyExit::default() });
    let (generated, logits) = (&[][..], &mut [0.0; 2][..]);
    let step = Step { generated, cached_tokens: 3, logits, attention_entropy: None, mass: None };
    assert!(plugins.on_step(step).unwrap_err().message.contains("entropy of its attention"));
}

#[test]
fn settings_out_of_range_are_named() {
    let exit = EntropyExit::default();
    for threshold in [0.0, -1.0, f64::NAN, f64::INFINITY] {
        let error = EntropyExit { threshold, ..exit }.check().unwrap_err().to_string();
        assert!(error.starts_with("entropy_threshold is"), "{error}");
    }
    let error = EntropyExit { patience: 0, ..exit }.check().unwrap_err().to_string();
    assert_eq!(error, "entropy_patience is 0, expected at least 1 step");
    for ratio in [-0.1, 1.1, f64::NAN] {
        let error = TokenPruning { ratio, ..TokenPruning::default() }.check().unwrap_err();
        assert!(error.to_string().starts_with("pruning_ratio is"), "{error}");
    }
    let error = "entropy".parse::<EntropySignal>().unwrap_err().to_string();
    assert_eq!(error, "entropy_signal is entropy, expected attention or next-token");
    for signal in EntropySignal::ALL {
        assert_eq!(signal.name().parse(), Ok(signal));
    }
}

proptest! {
    #[test]
    fn the_tokens_that_were_looked_at_least_go(
        mass in prop::collection::vec(0f32..10.0, 1..300),
        ratio in 0.0..=1.0,
        min_tokens in 0usize..200,
        sink_tokens in 0usize..20,
        recent_tokens in 0usize..40,
        page_size in 1usize..20,
    ) {
        let pruning = TokenPruning { ratio, min_tokens, sink_tokens, recent_tokens };
        let gone = pruning.choose(&mass, page_size);
        let cached = mass.len();
        prop_assert!(gone.is_sorted_by(|a, b| a < b));
        if gone.is_empty() {
            return Ok(());
        }
        prop_assert!(gone.len() as f64 <= ratio * cached as f64 + 1e-9);
        prop_assert!(cached - gone.len() >= min_tokens.max(1));
        let end = cached - recent_tokens.max(1);
        prop_assert!(gone.iter().all(|&place| (sink_tokens..end).contains(&(place as usize))));
        let most = gone.iter().map(|&place| mass[place as usize]).fold(0.0, f32::max);
        for (place, &mass) in mass.iter().enumerate().take(end).skip(sink_tokens) {
            prop_assert!(gone.contains(&(place as u32)) || mass >= most);
        }
        prop_assert!((cached - gone.len()).div_ceil(page_size) < cached.div_ceil(page_size));
    }
}

#[test]
fn pruning_waits_until_the_cache_has_grown_back() {
    let pruning = TokenPruning { ratio: 0.25, min_tokens: 20, sink_tokens: 2, recent_tokens: 4 };
    let (manager, mut plugins) = begin(TokenPruning::NAME, pruning.check().unwrap());
    let mut cached = 40;
    let mass: Vec<f32> = (0..cached).map(|i| (i * 7 % 40) as f32).collect();
    let (first, last) = (true, true);
    let mass = Some(mass.as_slice());
    let prefilled = Prefilled { computed: 0..40, first, last, cached_tokens: cached, mass };
    let verdict = plugins.on_prefill(&prefilled).unwrap();
    assert_eq!(verdict.prune.len(), 10);
    cached -= 10;
    plugins.pruned(&verdict, Pruned { bytes_before: 10, bytes_after: 8 });
    let mut sizes = Vec::new();
    for generated in 0..60usize {
        let (tokens, mut logits) = (vec![5; generated], [0.0; 2]);
        let mass = vec![0.1; cached];
        let verdict = plugins
            .on_step(Step {
                generated: &tokens,
                cached_tokens: cached,
                logits: &mut logits,
                attention_entropy: None,
                mass: (generated > 0).then_some(&mass),
            })
            .unwrap();
        if !verdict.prune.is_empty() {
            sizes.push(cached);
            cached -= verdict.prune.len();
            plugins.pruned(&verdict, Pruned { bytes_before: 10, bytes_after: 8 });
        }
        cached += 1;
    }
    assert_eq!(sizes, [40; 5], "each time when it is as large as it was");
    let stats = &manager.stats()[0];
    assert_eq!((stats.pruning_count, stats.pruned_tokens), (6, 60));
    assert_eq!((stats.bytes_before_pruning, stats.bytes_after_pruning), (60, 48));
}

#[test]
fn a_ratio_of_nothing_asks_for_nothing() {
    let pruning = TokenPruning { ratio: 0.0, min_tokens: 0, ..TokenPruning::default() };
    assert_eq!(pruning.needs(), Needs::default());
    assert!(pruning.choose(&[0.0; 500], 1).is_empty());
    let (_, mut plugins) = begin(TokenPruning::NAME, pruning);
    let (generated, logits) = (&[][..], &mut [0.0; 2][..]);
    let step = Step { generated, cached_tokens: 500, logits, attention_entropy: None, mass: None };
    assert!(plugins.on_step(step).unwrap().prune.is_empty());
}
