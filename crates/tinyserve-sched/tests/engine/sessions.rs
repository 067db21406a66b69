//! Sessions and pages that requests share.

use std::time::Duration;

use tinyserve_kv::{Budget, SelectionPolicy};
use tinyserve_model::SamplingParams;
use tinyserve_sched::{AttentionChoice, EngineConfig, Event, Request};

use crate::{answer, engine, greedy, prompt};

#[test]
fn a_session_computes_only_what_is_new() {
    let engine = engine(64, EngineConfig::default());
    let first = greedy("Once upon a time", 20).session("a");
    let mut history = first.prompt.clone();
    let (_, tokens, end) = answer(&engine, first);
    assert_eq!(end.summary.usage.cached_tokens, 0);
    history.extend(tokens.iter().map(|token| token.id));
    let known = history.len() - 1;
    history.extend(prompt("Then")[1..].iter());
    let follow = Request::new(history).max_tokens(20).sampling(SamplingParams::greedy());
    let alone = answer(&engine, follow.clone()).0;
    let (text, _, end) = answer(&engine, follow.clone().session("a"));
    assert_eq!((text, end.summary.usage.cached_tokens), (alone, known));
    let info = engine.session_info("a").wait().unwrap().unwrap();
    assert_eq!((info.request_count, info.cached_pages > 0), (2, true));
    assert_eq!(engine.list_sessions().wait().unwrap(), [info]);
    // Another salt shares nothing.
    let mut salted = follow.session("a");
    salted.cache_salt = "other".to_owned();
    assert_eq!(answer(&engine, salted).2.summary.usage.cached_tokens, 0);
    assert_eq!(engine.delete_session("a").wait(), Some(true));
    assert_eq!(engine.delete_session("a").wait(), Some(false));
    assert_eq!(engine.stats().pages_used, 0);
}

#[test]
fn requests_that_begin_alike_share_pages() {
    let engine = engine(64, EngineConfig::default());
    let long =
        "Once upon a time there was a little girl named Lily who had a big red ball. ".repeat(2);
    let (first, _, end) = answer(&engine, greedy(&long, 20));
    assert_eq!(end.summary.usage.cached_tokens, 0);
    let prompt = end.summary.usage.prompt_tokens;
    let (again, _, end) = answer(&engine, greedy(&long, 20));
    // Whole pages, and not the last token.
    assert_eq!(end.summary.usage.cached_tokens, (prompt - 1) / 16 * 16);
    assert_eq!(again, first);
    // Pages that are kept are in nobody's use.
    let stats = engine.stats();
    assert_eq!((stats.pages_used, stats.prefix_hits), (0, 1));
    assert!(stats.pages_idle > 0);
    // What a selecting step has computed is not what another request would compute.
    let select = SelectionPolicy {
        budget: Budget::Tokens(16),
        dense_layers: 0,
        min_context: 0,
        ..SelectionPolicy::default()
    };
    let sparse = || {
        let mut request = greedy("The dog", 80);
        request.attention = Some(AttentionChoice::Policy(select));
        request
    };
    let (_, tokens, _) = answer(&engine, sparse());
    let mut continued = sparse();
    continued.prompt.extend(tokens.iter().map(|token| token.id));
    assert_eq!(answer(&engine, continued).2.summary.usage.cached_tokens, 0);
}

#[test]
fn two_requests_of_a_session_run_in_order() {
    let engine = engine(64, EngineConfig::default());
    let first = engine.submit(greedy("Once upon a time", 40).session("a")).unwrap();
    let mut second = engine.submit(greedy("Once upon a time", 40).session("a")).unwrap();
    drop(first);
    let mut cached = None;
    for event in &mut second {
        if let Event::Started { cached_tokens, .. } = event {
            cached = Some(cached_tokens);
        }
    }
    // Whatever the first left when it was dropped is used, down to a page's border.
    assert!(cached.is_some_and(|cached| cached <= 4));
}

#[test]
fn a_deleted_session_and_a_later_one_of_its_name_are_two() {
    let engine = engine(64, EngineConfig::default());
    let mut long = engine.submit(greedy("Once upon a time", 400).session("a")).unwrap();
    assert!(long.any(|event| matches!(event, Event::Token(_))));
    assert_eq!(engine.delete_session("a").wait(), Some(true));
    answer(&engine, greedy("The dog", 4).session("a"));
    let held = engine.session_info("a").wait().unwrap();
    assert!(matches!(long.last(), Some(Event::Finished(_))));
    assert_eq!(engine.session_info("a").wait().unwrap(), held);
    assert_eq!(held.map(|info| (info.request_count, info.cached_pages)), Some((1, 1)));
    // What the long one left is nobody's.
    assert_eq!(engine.stats().pages_used, 1);
}

#[test]
fn sessions_expire() {
    let timeout = Duration::from_millis(50);
    let engine = engine(64, EngineConfig { session_timeout: timeout, ..Default::default() });
    answer(&engine, greedy("Once upon a time", 4).session("a"));
    assert!(engine.stats().pages_used > 0);
    std::thread::sleep(Duration::from_millis(300));
    assert_eq!(engine.list_sessions().wait(), Some(Vec::new()));
    assert_eq!(engine.stats().pages_used, 0);
}
