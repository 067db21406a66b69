//! Thousands of generated requests: never a 500, always JSON.

use proptest::collection::vec;
use proptest::prelude::*;
use proptest::test_runner::{Config, TestRunner};
use serde_json::{Map, Value, json};

use crate::server::{events, shared};

/// Any JSON at all.
fn anything() -> impl Strategy<Value = Value> {
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        any::<f64>().prop_map(Value::from),
        (-3i64..600).prop_map(Value::from),
        "\\PC{0,12}".prop_map(Value::from),
        Just(json!("")),
        Just(json!(1e308)),
        Just(json!(u64::MAX)),
    ];
    leaf.prop_recursive(3, 16, 4, |inner| {
        prop_oneof![
            vec(inner.clone(), 0..4).prop_map(Value::from),
            vec(("[a-z_]{1,8}", inner), 0..4)
                .prop_map(|pairs| Value::Object(pairs.into_iter().collect())),
        ]
    })
}

fn number(range: std::ops::Range<f64>) -> BoxedStrategy<Value> {
    range.prop_map(Value::from).boxed()
}

fn one_of(values: Vec<Value>) -> BoxedStrategy<Value> {
    proptest::sample::select(values).boxed()
}

/// A field with values that make sense, mostly.
fn field(name: &'static str) -> BoxedStrategy<(String, Value)> {
    let sensible: BoxedStrategy<Value> = match name {
        "temperature" => number(0.0..3.0),
        "top_p" | "min_p" => number(0.0..1.0),
        "presence_penalty" | "frequency_penalty" => number(-2.5..2.5),
        "repetition_penalty" => number(0.5..2.0),
        "n" | "best_of" => (1i64..4).prop_map(Value::from).boxed(),
        "top_k" => (-1i64..50).prop_map(Value::from).boxed(),
        "max_tokens" | "max_completion_tokens" | "min_tokens" => {
            (0i64..8).prop_map(Value::from).boxed()
        }
        "seed" | "priority" => any::<i32>().prop_map(Value::from).boxed(),
        "logprobs" => one_of(vec![json!(0), json!(1), json!(5), json!(true), json!(21)]),
        "top_logprobs" => one_of(vec![json!(0), json!(3)]),
        "stream"
        | "echo"
        | "ignore_eos"
        | "include_stop_str_in_output"
        | "skip_special_tokens"
        | "add_special_tokens"
        | "return_token_ids"
        | "add_generation_prompt"
        | "continue_final_message" => any::<bool>().prop_map(Value::from).boxed(),
        "stop" => prop_oneof![
            "[a-z ]{1,3}".prop_map(Value::from),
            vec("[a-z ]{0,3}", 0..6).prop_map(Value::from)
        ]
        .boxed(),
        "stop_token_ids" => vec(0u32..520, 0..4).prop_map(Value::from).boxed(),
        "logit_bias" => vec((0u32..520, -110i64..110), 0..4)
            .prop_map(|pairs| {
                Value::Object(pairs.into_iter().map(|(id, x)| (id.to_string(), x.into())).collect())
            })
            .boxed(),
        "stream_options" => one_of(vec![
            json!({"include_usage": true}),
            json!({"continuous_usage_stats": true}),
            json!({}),
        ]),
        "truncate_prompt_tokens" => (1i64..20).prop_map(Value::from).boxed(),
        "model" => one_of(vec![json!("stories260k"), json!("stories260k"), json!("other")]),
        "prompt" => prop_oneof![
            "\\PC{0,40}".prop_map(Value::from),
            vec("\\PC{0,10}", 0..3).prop_map(Value::from),
            vec(0u32..515, 0..20).prop_map(Value::from),
            vec(vec(0u32..512, 0..9), 0..3).prop_map(Value::from),
        ]
        .boxed(),
        "messages" => vec(message(), 0..4).prop_map(Value::from).boxed(),
        "tinyserve" => one_of(vec![
            json!({"attention": "dense"}),
            json!({"attention": "sparse", "selection_ratio": 0.3, "dense_layers": 0}),
            json!({"token_budget": 16, "sink_pages": 0}),
            json!({"session": "s"}),
            json!({"plugins": {}}),
        ]),
        _ => anything().boxed(),
    };
    prop_oneof![9 => sensible, 1 => anything()]
        .prop_map(move |value| (name.to_owned(), value))
        .boxed()
}

fn message() -> impl Strategy<Value = Value> {
    let role = proptest::sample::select(vec![
        "system",
        "user",
        "assistant",
        "tool",
        "developer",
        "critic",
    ]);
    let content = prop_oneof![
        "\\PC{0,20}".prop_map(Value::from),
        Just(json!([{"type": "text", "text": "Hi"}])),
        Just(json!([{"type": "image_url"}])),
        Just(Value::Null),
        anything(),
    ];
    (role, content).prop_map(|(role, content)| json!({"role": role, "content": content}))
}

fn body(names: &'static [&'static str]) -> impl Strategy<Value = Value> {
    let fields = proptest::sample::subsequence(names, 0..names.len().min(8))
        .prop_flat_map(|names| names.into_iter().map(field).collect::<Vec<_>>());
    let always = field(names[0]);
    (always, fields, prop_oneof![9 => Just(true), 1 => Just(false)]).prop_map(
        |(always, fields, keep)| {
            let mut object = Map::from_iter(fields);
            if keep {
                object.extend([always]);
            }
            // Short answers: thousands are asked for.
            object.entry("max_tokens").or_insert_with(|| 2.into());
            Value::Object(object)
        },
    )
}

const COMPLETION: &[&str] = &[
    "prompt",
    "model",
    "max_tokens",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "n",
    "best_of",
    "stream",
    "stream_options",
    "logprobs",
    "echo",
    "stop",
    "stop_token_ids",
    "seed",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "logit_bias",
    "ignore_eos",
    "min_tokens",
    "include_stop_str_in_output",
    "skip_special_tokens",
    "add_special_tokens",
    "truncate_prompt_tokens",
    "priority",
    "request_id",
    "cache_salt",
    "return_token_ids",
    "user",
    "suffix",
    "response_format",
    "tinyserve",
    "unknown",
];
const CHAT: &[&str] = &[
    "messages",
    "model",
    "max_tokens",
    "max_completion_tokens",
    "temperature",
    "top_p",
    "n",
    "stream",
    "stream_options",
    "logprobs",
    "top_logprobs",
    "stop",
    "seed",
    "logit_bias",
    "tools",
    "tool_choice",
    "add_generation_prompt",
    "continue_final_message",
    "chat_template_kwargs",
    "add_special_tokens",
    "response_format",
    "metadata",
    "tinyserve",
];
const TOKENIZE: &[&str] =
    &["prompt", "messages", "add_special_tokens", "return_token_strs", "model", "tools"];
const DETOKENIZE: &[&str] = &["tokens", "model"];

/// Asks, and checks what every answer must be.
fn check(path: &str, body: &[u8], answered: &mut usize) -> Result<(), TestCaseError> {
    let answer = shared().post_with(path, body, &[("content-type", "application/json")]);
    prop_assert!(
        answer.status < 500,
        "{} for {}: {:?}",
        answer.status,
        String::from_utf8_lossy(body),
        answer
    );
    *answered += usize::from(answer.status == 200);
    if answer.header("content-type") == Some("text/event-stream") {
        let mut events = events(&answer.text);
        prop_assert_eq!(events.pop(), Some("[DONE]".to_owned()));
        for event in events {
            let chunk: Value = serde_json::from_str(&event).expect("JSON in a stream");
            prop_assert!(
                chunk.get("error").is_none(),
                "{chunk} for {}",
                String::from_utf8_lossy(body)
            );
        }
        return Ok(());
    }
    prop_assert_eq!(answer.header("content-type"), Some("application/json"));
    let json: Result<Value, _> = serde_json::from_str(&answer.text);
    let json = json.map_err(|error| TestCaseError::fail(format!("{error}: {answer:?}")))?;
    prop_assert_eq!(answer.status != 200, json.get("error").is_some(), "{}", json);
    Ok(())
}

fn run(path: &str, names: &'static [&'static str], cases: u32) {
    let config = Config { cases, failure_persistence: None, ..Config::default() };
    TestRunner::new(config)
        .run(&body(names), |body| {
            let mut here = 0;
            let result = check(path, body.to_string().as_bytes(), &mut here);
            ANSWERED.fetch_add(here, std::sync::atomic::Ordering::Relaxed);
            result
        })
        .unwrap_or_else(|error| panic!("{error}"));
    let answered = ANSWERED.load(std::sync::atomic::Ordering::Relaxed);
    assert!(answered > 0, "not one request was answered");
}

static ANSWERED: std::sync::atomic::AtomicUsize = std::sync::atomic::AtomicUsize::new(0);

#[test]
fn completions_never_fail_by_themselves() {
    run("/v1/completions", COMPLETION, 2500);
}

#[test]
fn chats_never_fail_by_themselves() {
    run("/v1/chat/completions", CHAT, 1500);
}

#[test]
fn tokenizing_never_fails_by_itself() {
    run("/tokenize", TOKENIZE, 700);
    run("/detokenize", DETOKENIZE, 300);
}

#[test]
fn bytes_that_are_no_json_never_fail_by_themselves() {
    let config = Config { cases: 500, failure_persistence: None, ..Config::default() };
    let bytes = prop_oneof![
        vec(any::<u8>(), 0..200),
        "[{}\\[\\]\",:a-z0-9 \\\\]{0,60}".prop_map(String::into_bytes)
    ];
    TestRunner::new(config)
        .run(&bytes, |bytes| check("/v1/completions", &bytes, &mut 0))
        .unwrap_or_else(|error| panic!("{error}"));
}
