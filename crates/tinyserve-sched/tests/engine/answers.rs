//! What a request is answered with.

use std::sync::Arc;
use std::task::{Context, Poll, Wake};

use tinyserve_kv::KvFormat;
use tinyserve_model::SamplingParams;
use tinyserve_sched::{EngineConfig, Event, FinishReason, Request, StopReason};

use crate::{answer, engine, greedy, replicas};

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
