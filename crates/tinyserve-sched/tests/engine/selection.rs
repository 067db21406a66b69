//! Requests that select pages, when they lose them and get them again.

use std::path::Path;
use std::sync::Arc;

use tinyserve_kv::{
    Budget, GroupReduce, KvFormat, PageSelector, Scorer, SelectInput, SelectionPolicy,
};
use tinyserve_model::SamplingParams;
use tinyserve_sched::{AttentionChoice, Engine, EngineConfig, Event, Request};

use crate::{answer, engine, greedy, prompt, replicas};

/// Reads the newest page, and those that reach beyond it in the first channel.
struct BeyondNewest;

impl PageSelector for BeyondNewest {
    fn select(&self, input: &SelectInput<'_>, selected: &mut Vec<u32>) -> bool {
        let newest = input.page_count() - 1;
        let beyond = |&page: &usize| page == newest || input.max(page)[0] > input.max(newest)[0];
        selected.extend((0..=newest).filter(beyond).map(|page| page as u32));
        true
    }
}

#[test]
fn preempted_requests_that_select_go_on_as_they_would_alone() {
    let policy = |scorer, budget, group_reduce| {
        AttentionChoice::Policy(SelectionPolicy {
            scorer: Scorer::named(scorer).unwrap(),
            budget,
            group_reduce,
            dense_layers: 0,
            min_context: 60,
            ..SelectionPolicy::default()
        })
    };
    let (max, vote) = (GroupReduce::Max, GroupReduce::SoftmaxVote);
    let texts = ["Once upon a time", "The dog", "Lily and Tom went to the park", "One day"];
    for attention in [
        policy("box", Budget::Ratio(0.3), max),
        policy("box", Budget::TopP(0.6), max),
        policy("mean-std", Budget::Tokens(48), vote),
        policy("two-stage", Budget::Ratio(0.2), max),
        policy("oracle-mass", Budget::Tokens(48), max),
        AttentionChoice::Custom(Arc::new(BeyondNewest)),
    ] {
        let request = |text| Request { attention: Some(attention.clone()), ..greedy(text, 150) };
        let roomy = engine(64, EngineConfig::default());
        let tight = engine(24, EngineConfig::default());
        let streams: Vec<_> =
            texts.iter().map(|text| tight.submit(request(text)).unwrap()).collect();
        for (text, stream) in texts.into_iter().zip(streams) {
            let (_, alone, end) = answer(&roomy, request(text));
            let (mut tokens, mut steps) = (Vec::new(), 0);
            for event in stream {
                match event {
                    Event::Token(token) => tokens.push(token),
                    Event::Finished(finished) => steps = finished.summary.kv.decode_steps,
                    _ => {}
                }
            }
            assert_eq!(tokens, alone, "{attention:?}, {text}");
            assert_eq!(steps, end.summary.kv.decode_steps, "{attention:?}, {text}");
        }
        assert!(tight.stats().preemptions > 0, "there was room for everybody");
    }
}

/// What happens to a session before its last turn.
enum Fate<'a> {
    Nothing,
    /// Somebody else needs its pages.
    Evicted,
    /// It is saved to a file, deleted and restored.
    Saved(&'a Path),
}

#[test]
fn a_turn_of_a_session_that_loses_its_pages_keeps_what_earlier_turns_had_selected() {
    let config = |budget| {
        let policy = SelectionPolicy {
            budget,
            dense_layers: 0,
            min_context: 60,
            ..SelectionPolicy::default()
        };
        EngineConfig { attention: AttentionChoice::Policy(policy), ..EngineConfig::default() }
    };
    // Two turns, the third with somebody beside it who comes first.
    let talk = |engine: &Engine, fate: Fate<'_>, rival: Option<usize>| {
        let mut text = prompt("Once upon a time");
        for tokens in [120, 20] {
            let turn = Request::new(&*text).max_tokens(tokens).sampling(SamplingParams::greedy());
            text.extend(answer(engine, turn.session("a")).1.iter().map(|token| token.id));
            text.extend(&prompt("Then")[1..]);
        }
        match fate {
            Fate::Nothing => {}
            Fate::Evicted => {
                assert_eq!(answer(engine, greedy("The dog", 200)).1.len(), 200);
                let info = engine.session_info("a").wait().unwrap().unwrap();
                assert_eq!((info.cached_pages, engine.stats().sessions_evicted), (0, 1));
            }
            Fate::Saved(path) => {
                let saved = engine.save_session("a", path, "model").wait().unwrap().unwrap();
                assert!(engine.delete_session("a").wait().unwrap());
                let info = engine.restore_session("a", path, "model").wait().unwrap().unwrap();
                assert_eq!(info.cached_tokens, saved);
            }
        }
        let last = Request::new(&*text).max_tokens(60).sampling(SamplingParams::greedy());
        let mut stream = engine.submit(Request { priority: 5, ..last.session("a") }).unwrap();
        let mut tokens: Vec<_> = stream
            .by_ref()
            .find_map(|event| if let Event::Token(token) = event { Some(token) } else { None })
            .into_iter()
            .collect();
        let rival = rival.map(|tokens| engine.submit(greedy("The dog", tokens)).unwrap());
        let mut preemptions = 0;
        for event in stream {
            match event {
                Event::Token(token) => tokens.push(token),
                Event::Finished(finished) => preemptions = finished.summary.timings.preemptions,
                _ => {}
            }
        }
        assert!(rival.is_none_or(|rival| matches!(rival.last(), Some(Event::Finished(_)))));
        (tokens, preemptions)
    };
    let folder = tempfile::tempdir().unwrap();
    let path = &folder.path().join("session");
    for format in [KvFormat::F32, KvFormat::F16, KvFormat::Int8] {
        for budget in [Budget::TopP(0.5), Budget::Ratio(0.3)] {
            let engine = |pages| replicas(1, (pages, format), config(budget));
            let (alone, never) = talk(&engine(64), Fate::Nothing, None);
            assert_eq!((alone.len(), never), (60, 0));
            for fate in [Fate::Nothing, Fate::Evicted, Fate::Saved(path)] {
                let (tokens, preemptions) = talk(&engine(15), fate, Some(200));
                assert!(preemptions > 0, "there was room for both");
                assert_eq!(tokens, alone, "{format}, {budget:?}");
            }
        }
    }
}

#[test]
fn what_a_selector_of_the_caller_computed_is_restored_where_it_is() {
    let own = || AttentionChoice::Custom(Arc::new(BeyondNewest));
    let config = |attention| EngineConfig { attention, ..EngineConfig::default() };
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("session");
    let with_it = engine(64, config(own()));
    answer(&with_it, greedy("Once upon a time", 60).session("a"));
    let save = |engine: &Engine| engine.save_session("a", &path, "model").wait().unwrap();
    let restore = |engine: &Engine| engine.restore_session("a", &path, "model").wait().unwrap();
    save(&with_it).unwrap();
    restore(&with_it).unwrap();
    let without = engine(64, config(AttentionChoice::Dense));
    let refused = restore(&without).unwrap_err().to_string();
    assert!(refused.contains("an engine with that selector"), "{refused}");
    assert_eq!((without.stats().pages_used, without.stats().sessions), (0, 0));
    // Which selector a request brought, no file can tell.
    let request = greedy("Once upon a time", 60).session("a");
    answer(&without, Request { attention: Some(own()), ..request });
    let refused = save(&without).unwrap_err().to_string();
    assert!(refused.contains("no page selectors of their own"), "{refused}");
}
