//! Prompts that begin alike, from their callers' side: what was computed once is not again.

use tinyserve::{KvCacheDtype, Prompt, TinyServe, TinyServeConfig, TinyServeRequest};
use tinyserve_kernels::DType;
use tinyserve_model::{SyntheticModel, SyntheticShape};

const PREFIX: usize = 4000;
const TAIL: usize = 40;

fn engine(dtype: KvCacheDtype, enable_prefix_caching: bool, longest: usize) -> TinyServe {
    let model = SyntheticModel::new(SyntheticShape::TinyLlama, DType::F32);
    let model = model.at_least_positions(longest);
    let config = TinyServeConfig {
        max_sequence_length: Some(longest),
        kv_cache_dtype: dtype,
        enable_prefix_caching,
        max_num_seqs: 2,
        threads: Some(2),
        target_memory_gb: Some(4.0),
        ..TinyServeConfig::default()
    };
    TinyServe::builder().config(config).checkpoint(model.checkpoint().unwrap()).build().unwrap()
}

fn tokens(from: u32, length: usize) -> impl Iterator<Item = u32> {
    (0..length as u32).map(move |i| 3 + (from + i * (i % 7 + 1)) % 200)
}

#[test]
fn of_a_prompt_that_begins_like_another_only_the_tail_is_computed() {
    let of_tail = |tail: u32| {
        let prompt = tokens(1, PREFIX).chain(tokens(tail, TAIL)).collect();
        TinyServeRequest::new(Prompt::Tokens(prompt)).max_tokens(8).temperature(0.0)
    };
    for dtype in [KvCacheDtype::F16, KvCacheDtype::Int8, KvCacheDtype::Int4] {
        let engine_of = engine(dtype, true, 4096);
        let prefilled = || engine_of.engine().stats().prefill_tokens;
        let first = engine_of.serve(of_tail(50)).unwrap();
        assert_eq!((first.prompt_tokens, first.cached_tokens), (PREFIX + TAIL, 0));
        assert_eq!(prefilled(), (PREFIX + TAIL) as u64);
        let second = engine_of.serve(of_tail(90)).unwrap();
        assert_eq!((second.prompt_tokens, second.cached_tokens), (PREFIX + TAIL, PREFIX));
        assert_eq!(prefilled(), (PREFIX + 2 * TAIL) as u64, "only the tail");
        let stats = engine_of.engine().stats();
        let found = (stats.prefix_lookups, stats.prefix_hits, stats.prefix_hit_tokens);
        assert_eq!(found, (2, 1, PREFIX as u64));
        assert_eq!(stats.prefix_evicted_for_room + stats.prefix_evicted_for_limit, 0);
        drop(engine_of);
        let alone = engine(dtype, false, 4096).serve(of_tail(90)).unwrap();
        assert_eq!(alone.cached_tokens, 0);
        assert_eq!((alone.tokens, alone.logprobs), (second.tokens, second.logprobs), "{dtype:?}");
    }
}

#[test]
fn a_session_rests_on_full_pages_where_these_hold_codes() {
    let turn = |length: usize| {
        let prompt = Prompt::Tokens(tokens(5, length).collect());
        TinyServeRequest::new(prompt).max_tokens(1).temperature(0.0)
    };
    for (dtype, rests) in [(KvCacheDtype::F16, 90), (KvCacheDtype::Int8, 80)] {
        let engine = engine(dtype, false, 256);
        engine.serve(turn(90).session("talk")).unwrap();
        let session = engine.get_session_info("talk").unwrap().unwrap();
        assert_eq!(session.cached_tokens, rests, "{dtype:?}");
        let second = engine.serve(turn(130).session("talk")).unwrap();
        assert_eq!(second.cached_tokens, rests, "{dtype:?}");
        let alone = engine.serve(turn(130)).unwrap();
        assert_eq!((second.tokens, second.logprobs), (alone.tokens, alone.logprobs), "{dtype:?}");
        // Shorter than a page: there is nothing to keep.
        engine.serve(turn(10).session("short")).unwrap();
        let session = engine.get_session_info("short").unwrap().unwrap();
        assert_eq!(session.cached_tokens, if rests == 90 { 10 } else { 0 });
    }
}

#[test]
fn kept_pages_make_room_and_the_cause_is_counted() {
    let engine = engine(KvCacheDtype::Int8, true, 1600);
    let stats = || engine.engine().stats();
    // Each prompt fills nearly half of the pool; the third needs the first one's pages.
    for first in 0..3 {
        let prompt: Vec<_> = tokens(30 * first, 1500).collect();
        let request = TinyServeRequest::new(Prompt::Tokens(prompt)).max_tokens(1);
        assert_eq!(engine.serve(request).unwrap().cached_tokens, 0);
    }
    assert!(stats().pages < 3 * 1500 / 16, "{:?}", stats());
    let freed = stats().prefix_evicted_for_room;
    assert!(freed > 0 && stats().prefix_evicted_for_limit == 0, "{:?}", stats());
    assert_eq!((stats().prefix_lookups, stats().prefix_hits), (3, 0));
}
