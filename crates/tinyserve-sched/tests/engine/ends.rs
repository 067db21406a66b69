//! Requests that are refused, that end early or that fail.

use std::sync::Arc;
use std::time::Duration;

use tinyserve_kv::{PageSelector, SelectInput};
use tinyserve_model::SamplingParams;
use tinyserve_sched::{
    AdmissionError, AttentionChoice, EngineConfig, EngineState, Event, FailureKind, Request,
};

use crate::{answer, engine, greedy};

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
