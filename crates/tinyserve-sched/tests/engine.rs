//! The engine on the embedded model, from its callers' side.

use std::path::Path;
use std::sync::Arc;
use std::task::{Context, Poll, Wake};
use std::time::Duration;

use tinyserve_kernels::{Cpu, CpuOptions};
use tinyserve_kv::{
    Budget, EvictionPolicy, GroupReduce, KvFormat, PageSelector, PrefixIndex, PrefixOptions,
    Scorer, SelectInput, SelectionPolicy,
};
use tinyserve_model::{Checkpoint, KvCache, Model, SamplingParams};
use tinyserve_sched::{
    AdmissionError, AttentionChoice, Engine, EngineConfig, EngineState, Event, FailureKind,
    FinishReason, Finished, ModelRunner, Request, StopReason, Token,
};

/// An engine with `pages` pages of 16 tokens.
fn engine(pages: usize, config: EngineConfig) -> Engine {
    replicas(1, (pages, KvFormat::F32), config)
}

/// As [`engine`], as several, whose pages are of a format.
fn replicas(count: usize, pages: (usize, KvFormat), config: EngineConfig) -> Engine {
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

fn prompt(text: &str) -> Vec<u32> {
    Checkpoint::builtin().unwrap().tokenizer().unwrap().encode(text, true).unwrap()
}

fn greedy(text: &str, max_tokens: usize) -> Request {
    Request::new(prompt(text)).max_tokens(max_tokens).sampling(SamplingParams::greedy())
}

/// The text and the end of a request.
fn answer(engine: &Engine, request: Request) -> (String, Vec<Token>, Finished) {
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

#[test]
fn requests_that_run_together_answer_as_they_do_alone() {
    let engine = engine(64, EngineConfig { max_num_batched_tokens: 16, ..Default::default() });
    let texts = ["Once upon a time", "The dog", "Lily and Tom went to the park", "One day"];
    let alone: Vec<_> = texts.iter().map(|text| answer(&engine, greedy(text, 60)).0).collect();
    let streams: Vec<_> =
        texts.iter().map(|text| engine.submit(greedy(text, 60)).unwrap()).collect();
    for (stream, alone) in streams.into_iter().zip(alone) {
        let mut text = String::new();
        let mut terminals = 0;
        for event in stream {
            terminals += usize::from(event.is_terminal());
            match event {
                Event::Token(token) => text += &token.text,
                Event::Finished(finished) => text += &finished.summary.rest,
                _ => {}
            }
        }
        assert_eq!((text, terminals), (alone, 1));
    }
    let stats = engine.stats();
    assert_eq!((stats.requests, stats.finished_length), (8, 8));
    assert_eq!((stats.pages_used, stats.running, stats.waiting), (0, 0, 0));
    assert_eq!(stats.ttft.count(), 8);
}

#[test]
fn stop_texts_tokens_and_lengths_say_what_they_were() {
    let engine = engine(64, EngineConfig::default());
    let whole = answer(&engine, greedy("Once upon a time", 40));
    assert_eq!(whole.2.reason, FinishReason::Length);
    let with = |change: fn(&mut Request)| {
        let mut request = greedy("Once upon a time", 40);
        change(&mut request);
        answer(&engine, request)
    };
    let (text, _, end) = with(|request| request.stop = vec!["little girl".to_owned()]);
    assert_eq!(text, ", there was a ");
    assert_eq!(end.stop_reason, Some(StopReason::Text("little girl".to_owned())));
    let (text, ..) = with(|request| {
        request.stop = vec!["little girl".to_owned()];
        request.include_stop = true;
    });
    assert_eq!(text, ", there was a little girl");
    let third = whole.1[2].id;
    let mut request = greedy("Once upon a time", 40);
    request.stop_tokens = vec![third];
    let (_, tokens, end) = answer(&engine, request.clone());
    assert_eq!((tokens.len(), end.reason), (3, FinishReason::Stop));
    assert_eq!(end.stop_reason, Some(StopReason::Token(third)));
    request.min_tokens = 10;
    let (_, tokens, _) = answer(&engine, request);
    assert!(tokens.len() > 9 && tokens[..9].iter().all(|token| token.id != third));
}

#[test]
fn log_probabilities_come_with_the_tokens_and_the_prompt() {
    let engine = engine(64, EngineConfig { attention_chunk_size: 3, ..Default::default() });
    let mut request = greedy("Once upon a time there was a dog", 4);
    (request.top_logprobs, request.prompt_logprobs) = (2, Some(1));
    let mut told = Vec::new();
    for event in engine.submit(request.clone()).unwrap() {
        match event {
            Event::Prompt(tokens) => told.extend(tokens),
            Event::Token(token) => {
                assert_eq!(token.top_logprobs.len(), 2);
                assert_eq!((token.id, token.logprob.to_bits()), {
                    let best = token.top_logprobs[0];
                    (best.id, best.logprob.to_bits())
                });
            }
            _ => {}
        }
    }
    let ids: Vec<_> = told.iter().map(|token| token.id).collect();
    assert_eq!(ids, request.prompt);
    assert!(told[0].logprob.is_none() && told[1..].iter().all(|token| token.logprob.is_some()));
    // Greedy continuation of a prefix: what is drawn is what the prompt was scored with.
    let all: Vec<_> = request.prompt.clone();
    let mut prefix = Request::new(&all[..5]).max_tokens(1).sampling(SamplingParams::greedy());
    prefix.top_logprobs = 1;
    let (_, tokens, _) = answer(&engine, prefix);
    assert_eq!(told[5].top_logprobs[0], tokens[0].top_logprobs[0]);
    // Nothing is generated when nothing is asked for.
    request.max_tokens = 0;
    let (_, tokens, end) = answer(&engine, request);
    assert!(tokens.is_empty() && end.reason == FinishReason::Length);
}

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

#[test]
fn a_timeout_beyond_all_times_never_comes() {
    let engine = engine(64, EngineConfig { session_timeout: Duration::MAX, ..Default::default() });
    answer(&engine, greedy("Once upon a time", 4).session("a"));
    assert_eq!(engine.list_sessions().wait().map(|sessions| sessions.len()), Some(1));
    let mut stream = engine.submit(greedy("Once upon a time", 4)).unwrap();
    assert!(stream.next_timeout(Duration::MAX).is_some());
    assert!(engine.list_sessions().wait_timeout(Duration::MAX).is_ok());
}

#[test]
fn what_can_never_be_answered_is_refused_with_numbers() {
    let engine = engine(8, EngineConfig::default());
    let refuse = |request: Request| engine.submit(request).unwrap_err();
    assert_eq!(refuse(Request::new([])), AdmissionError::EmptyPrompt);
    let long = refuse(Request::new(vec![5; 600]).max_tokens(2));
    assert_eq!(long, AdmissionError::TooLong { prompt: 600, max_tokens: 2, limit: 512 });
    assert!(long.to_string().contains("600") && long.to_string().contains("512"));
    let large = refuse(Request::new(vec![5; 100]).max_tokens(30));
    assert_eq!(large, AdmissionError::NeverFits { needed: 9, pages: 8, page_size: 16 });
    // Of 129 tokens the last one needs no place.
    drop(engine.submit(Request::new(vec![5; 100]).max_tokens(29)).unwrap());
    let names = [
        ("prompt", Request::new([512]).max_tokens(5)),
        ("max_tokens", Request::new([5]).max_tokens(0)),
        ("temperature", {
            let sampling = SamplingParams { temperature: -1.0, ..SamplingParams::default() };
            Request::new([5]).max_tokens(5).sampling(sampling)
        }),
        ("logit_bias", {
            let mut request = Request::new([5]).max_tokens(5);
            request.logit_bias = vec![(5, 200.0)];
            request
        }),
        ("session_id", Request::new([5]).max_tokens(5).session("")),
    ];
    for (name, request) in names {
        let error = refuse(request);
        assert!(error.to_string().starts_with(name), "{error}");
    }
}

#[test]
fn a_full_queue_says_so() {
    let config = EngineConfig {
        max_num_seqs: 1,
        max_num_batched_tokens: 8,
        max_num_queued_reqs: Some(2),
        ..EngineConfig::default()
    };
    let engine = engine(64, config);
    let long = || greedy("Once upon a time", 500);
    let mut first = engine.submit(long()).unwrap();
    assert!(matches!(first.next(), Some(Event::Started { .. })));
    let waiting = [engine.submit(long()).unwrap(), engine.submit(long()).unwrap()];
    let full = AdmissionError::QueueFull { what: "requests", queued: 2, limit: 2 };
    assert_eq!(engine.submit(long()).unwrap_err(), full);
    assert_eq!(engine.stats().rejected, 1);
    drop(waiting);
    // The places are free again as soon as the engine has heard of it.
    assert!(engine.list_sessions().wait().is_some());
    drop(engine.submit(long()).unwrap());
}

#[test]
fn dropping_or_aborting_ends_a_request_and_frees_its_pages() {
    let engine = engine(64, EngineConfig::default());
    let mut stream = engine.submit(greedy("Once upon a time", 400)).unwrap();
    assert!(stream.any(|event| matches!(event, Event::Token(_))));
    stream.abort();
    stream.abort();
    engine.abort(stream.id());
    let rest: Vec<_> = stream.collect();
    assert!(matches!(rest.last(), Some(Event::Aborted(_))));
    assert_eq!(rest.iter().filter(|event| event.is_terminal()).count(), 1);
    let mut stream = engine.submit(greedy("Once upon a time", 400)).unwrap();
    assert!(stream.any(|event| matches!(event, Event::Token(_))));
    drop(stream);
    assert!(engine.drain().wait().is_some());
    assert_eq!((engine.stats().aborted, engine.stats().pages_used), (2, 0));
}

#[test]
fn draining_answers_what_there_is_and_takes_no_more() {
    let engine = engine(64, EngineConfig::default());
    let stream = engine.submit(greedy("Once upon a time", 60)).unwrap();
    let drained = engine.drain();
    assert_eq!(engine.state(), EngineState::Draining);
    let refused = engine.submit(greedy("Once", 1)).unwrap_err();
    assert_eq!(refused, AdmissionError::ShuttingDown);
    assert!(drained.wait().is_some());
    assert!(matches!(stream.last(), Some(Event::Finished(_))));
    engine.shutdown();
    assert_eq!(engine.state(), EngineState::Stopped);
    assert_eq!(engine.submit(greedy("Once", 1)).unwrap_err(), AdmissionError::Stopped);
    assert_eq!(engine.list_sessions().wait(), None);
}

#[test]
fn shutting_down_tells_everybody() {
    let engine = engine(64, EngineConfig { max_num_seqs: 1, ..Default::default() });
    let streams: Vec<_> =
        (0..3).map(|_| engine.submit(greedy("Once upon a time", 400)).unwrap()).collect();
    engine.shutdown();
    for stream in streams {
        assert!(matches!(stream.last(), Some(Event::Aborted(_))));
    }
}

/// A selector of a user that fails in its own way.
struct Broken(fn(&mut Vec<u32>));

impl PageSelector for Broken {
    fn select(&self, _: &SelectInput<'_>, selected: &mut Vec<u32>) -> bool {
        (self.0)(selected);
        true
    }
}

#[test]
fn a_request_that_fails_or_panics_fails_alone() {
    let engine = engine(64, EngineConfig::default());
    let expected = answer(&engine, greedy("Once upon a time", 100)).0;
    let mut bystander = engine.submit(greedy("Once upon a time", 100)).unwrap();
    let ways = [
        (Broken(|selected| selected.push(9999)), FailureKind::Model),
        (Broken(|_| panic!("a user's mistake")), FailureKind::Panic),
    ];
    for (way, kind) in ways {
        let mut request = greedy("Once upon a time", 20);
        request.attention = Some(AttentionChoice::Custom(Arc::new(way)));
        match engine.submit(request).unwrap().last() {
            Some(Event::Failed(failure)) => assert_eq!(failure.kind, kind, "{failure}"),
            other => panic!("{other:?}"),
        }
    }
    let mut text = String::new();
    for event in &mut bystander {
        match event {
            Event::Token(token) => text += &token.text,
            Event::Finished(finished) => text += &finished.summary.rest,
            _ => {}
        }
    }
    assert_eq!(text, expected);
    assert_eq!((engine.stats().failed, engine.stats().pages_used), (2, 0));
}

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

/// Unparks the thread that polls: the smallest executor.
struct Unpark(std::thread::Thread);

impl Wake for Unpark {
    fn wake(self: Arc<Self>) {
        self.0.unpark();
    }
}

#[test]
fn events_and_replies_can_be_awaited() {
    let engine = engine(64, EngineConfig::default());
    let waker = Arc::new(Unpark(std::thread::current())).into();
    let mut context = Context::from_waker(&waker);
    let mut stream = engine.submit(greedy("Once upon a time", 12)).unwrap();
    let mut tokens = 0;
    loop {
        match stream.poll_next(&mut context) {
            Poll::Ready(Some(event)) => tokens += usize::from(matches!(event, Event::Token(_))),
            Poll::Ready(None) => break,
            Poll::Pending => std::thread::park(),
        }
    }
    assert_eq!(tokens, 12);
    let mut reply = std::pin::pin!(engine.list_sessions());
    let sessions = loop {
        match Future::poll(reply.as_mut(), &mut context) {
            Poll::Ready(sessions) => break sessions,
            Poll::Pending => std::thread::park(),
        }
    };
    assert_eq!(sessions, Some(Vec::new()));
}

#[test]
fn replicas_share_the_work_and_keep_what_they_know() {
    let engine = replicas(2, (64, KvFormat::F32), EngineConfig::default());
    let alone = answer(&engine, greedy("Once upon a time", 30)).0;
    let streams: Vec<_> =
        (0..8).map(|_| engine.submit(greedy("Once upon a time", 30)).unwrap()).collect();
    let ids: std::collections::HashSet<_> =
        streams.iter().map(tinyserve_sched::EventStream::id).collect();
    assert_eq!(ids.len(), 8, "numbers are told apart");
    for stream in streams {
        let mut text = String::new();
        for event in stream {
            match event {
                Event::Token(token) => text += &token.text,
                Event::Finished(finished) => text += &finished.summary.rest,
                _ => {}
            }
        }
        assert_eq!(text, alone);
    }
    let each = engine.replica_stats();
    assert!(each.iter().all(|stats| stats.requests > 0), "both had something to do");
    assert_eq!(engine.stats().requests, 9);
    let long =
        "Once upon a time there was a little girl named Lily who had a big red ball. ".repeat(6);
    // A session stays where its pages are, and a prompt goes where its beginning is.
    for name in ["a", "b", "c", "d"] {
        for turn in 0..3 {
            let mut request = greedy(&long, 20).session(name);
            // What others have is not for this session.
            request.cache_salt = name.to_owned();
            let cached = answer(&engine, request).2.summary.usage.cached_tokens;
            assert_eq!(cached > 0, turn > 0, "{name} {turn}");
        }
    }
    let names: Vec<_> =
        engine.list_sessions().wait().unwrap().into_iter().map(|info| info.id).collect();
    assert_eq!(names, ["a", "b", "c", "d"]);
    assert!(engine.session_info("c").wait().unwrap().is_some());
    answer(&engine, greedy(&long, 5));
    for _ in 0..4 {
        assert!(answer(&engine, greedy(&long, 5)).2.summary.usage.cached_tokens >= 64);
    }
    assert_eq!(engine.delete_session("c").wait(), Some(true));
    assert!(engine.drain().wait().is_some());
}
