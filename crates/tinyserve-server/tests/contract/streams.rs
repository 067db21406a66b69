//! Answers in pieces: server-sent events as clients take them apart.

use serde_json::{Value, json};

use crate::server::{endless, one_at_a_time, quiet, read_until, shared, start};

fn texts(chunks: &[Value], index: usize) -> String {
    let choices = chunks.iter().flat_map(|chunk| chunk["choices"].as_array().unwrap());
    let mine = choices.filter(|choice| choice["index"] == index);
    mine.map(|choice| choice["text"].as_str().or(choice["delta"]["content"].as_str()).unwrap_or(""))
        .collect()
}

#[test]
fn pieces_of_a_completion_make_the_whole() {
    for more in [
        json!({}),
        json!({"echo": true}),
        json!({"stop": "girl"}),
        json!({"n": 2, "prompt": ["Once", "The"]}),
        json!({"logprobs": 2}),
    ] {
        let mut body = json!({"prompt": "Once upon a time", "temperature": 0, "max_tokens": 30});
        body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        let whole = shared().post("/v1/completions", &body).ok();
        body["stream"] = true.into();
        let chunks = shared().chunks("/v1/completions", &body);
        for (index, choice) in whole["choices"].as_array().unwrap().iter().enumerate() {
            assert_eq!(texts(&chunks, index), choice["text"].as_str().unwrap(), "{more}");
            let last = chunks.iter().rev().flat_map(|chunk| chunk["choices"].as_array().unwrap());
            let last = last.into_iter().find(|last| last["index"] == index).unwrap();
            assert_eq!(last["finish_reason"], choice["finish_reason"]);
            assert_eq!(last["stop_reason"], choice["stop_reason"]);
        }
        for chunk in &chunks {
            assert_eq!(chunk["object"], "text_completion");
            assert_eq!(chunk["id"], chunks[0]["id"]);
            // A chunk without choices is the mark of the usage, which nobody asked for.
            assert_eq!(chunk["choices"].as_array().unwrap().len(), 1);
            assert!(chunk.get("usage").is_none());
        }
    }
}

#[test]
fn a_chat_begins_with_a_role_and_ends_with_a_reason() {
    let mut body = json!({
        "messages": [{"role": "user", "content": [{"type": "text", "text": "Once upon a time"}]}],
        "temperature": 0, "max_completion_tokens": 10,
    });
    let whole = shared().post("/v1/chat/completions", &body).ok();
    body["stream"] = true.into();
    let chunks = shared().chunks("/v1/chat/completions", &body);
    assert_eq!(chunks[0]["choices"][0]["delta"], json!({"role": "assistant", "content": ""}));
    assert_eq!(chunks[0]["choices"][0]["finish_reason"], Value::Null);
    let last = &chunks.last().unwrap()["choices"][0];
    assert_eq!((&last["delta"], &last["finish_reason"]), (&json!({}), &json!("length")));
    assert!(chunks.iter().all(|chunk| chunk["object"] == "chat.completion.chunk"));
    assert_eq!(texts(&chunks, 0), whole["choices"][0]["message"]["content"].as_str().unwrap());
}

#[test]
fn usage_comes_in_a_chunk_of_its_own_and_only_if_asked_for() {
    for path in ["/v1/completions", "/v1/chat/completions"] {
        let mut body = json!({"max_tokens": 4, "stream": true, "stream_options": {"include_usage": true}, "ignore_eos": true});
        if path.contains("chat") {
            body["messages"] = json!([{"role": "user", "content": "Once"}]);
        } else {
            body["prompt"] = json!("Once");
        }
        let chunks = shared().chunks(path, &body);
        let (last, before) = chunks.split_last().unwrap();
        assert_eq!(last["choices"], json!([]));
        assert_eq!(last["usage"]["completion_tokens"], 4);
        assert!(before.iter().all(|chunk| chunk.get("usage").is_none()));

        body["stream_options"] = json!({"include_usage": true, "continuous_usage_stats": true});
        let chunks = shared().chunks(path, &body);
        assert!(chunks.iter().all(|chunk| chunk["usage"]["prompt_tokens"].is_u64()));
        let counts: Vec<_> = chunks
            .iter()
            .map(|chunk| chunk["usage"]["completion_tokens"].as_u64().unwrap())
            .collect();
        assert!(counts.is_sorted() && counts.last() == Some(&4), "{counts:?}");
    }
}

#[test]
fn characters_arrive_whole() {
    // Hot enough to draw byte tokens, which make up characters of several bytes, or none.
    for seed in 0..20 {
        let mut body = json!({"prompt": "Once", "temperature": 8, "max_tokens": 60, "seed": seed, "ignore_eos": true});
        let whole = shared().post("/v1/completions", &body).ok();
        body["stream"] = true.into();
        let chunks = shared().chunks("/v1/completions", &body);
        assert_eq!(texts(&chunks, 0), whole["choices"][0]["text"].as_str().unwrap(), "seed {seed}");
    }
}

#[test]
fn a_stream_that_waits_is_kept_alive_by_comments() {
    let mut config = quiet();
    config.keep_alive_interval = 0.02;
    let server = start(config, one_at_a_time());
    let mut first = server.open("/v1/completions", &endless(true));
    read_until(&mut first, "data: ");
    let mut second = server.open("/v1/completions", &endless(true));
    read_until(&mut second, ": ping");
}
