//! `POST /v1/completions`, answered as a whole.

use serde_json::{Value, json};

use tinyserve_server::{SchedulingPolicy, ServerConfig};

use crate::server::{one_thread, quiet, shared, start};

const STORY: &str = ", there was a little girl named Lily";

fn complete(body: &Value) -> Value {
    shared().post("/v1/completions", body).ok()
}

fn greedy(prompt: &Value, more: &Value) -> Value {
    let mut body = json!({"prompt": prompt, "temperature": 0, "max_tokens": 12});
    body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    complete(&body)
}

fn text(answer: &Value, index: usize) -> &str {
    answer["choices"][index]["text"].as_str().unwrap()
}

#[test]
fn an_answer_has_the_fields_of_openai() {
    let answer = greedy(&json!("Once upon a time"), &json!({}));
    assert!(answer["id"].as_str().unwrap().starts_with("cmpl-"));
    assert_eq!(answer["object"], "text_completion");
    assert!(answer["created"].as_u64().unwrap() > 1_700_000_000);
    assert_eq!(answer["model"], "stories260k");
    let choice = &answer["choices"][0];
    assert!(text(&answer, 0).starts_with(STORY), "{answer}");
    assert_eq!(choice["index"], 0);
    assert_eq!(choice["finish_reason"], "length");
    // What is not there is null, not missing.
    for name in ["logprobs", "stop_reason"] {
        assert_eq!(choice.get(name), Some(&Value::Null), "{name}");
    }
    let usage = &answer["usage"];
    assert_eq!((&usage["prompt_tokens"], &usage["completion_tokens"]), (&json!(5), &json!(12)));
    assert_eq!(usage["total_tokens"], 17);
    assert!(usage["prompt_tokens_details"]["cached_tokens"].is_u64());
}

#[test]
fn sixteen_tokens_are_the_default() {
    for body in [json!({"prompt": "Once"}), json!({"prompt": "Once", "max_tokens": null})] {
        let mut body = body;
        body["ignore_eos"] = true.into();
        assert_eq!(complete(&body)["usage"]["completion_tokens"], 16);
    }
}

#[test]
fn texts_and_token_ids_are_the_same_prompt() {
    let by_text = greedy(&json!("Once upon a time"), &json!({}));
    let by_ids = greedy(&json!([1, 403, 407, 261, 378]), &json!({}));
    assert_eq!(text(&by_text, 0), text(&by_ids, 0));
    let without_bos = greedy(&json!("Once upon a time"), &json!({"add_special_tokens": false}));
    assert_eq!(without_bos["usage"]["prompt_tokens"], 4);
}

#[test]
fn choices_are_prompts_times_n_in_order() {
    let prompts = json!(["Once upon a time", "The dog", "A cat"]);
    let together = greedy(&prompts, &json!({"n": 2, "max_tokens": 5}));
    let choices = together["choices"].as_array().unwrap();
    assert_eq!(choices.len(), 6);
    for (index, choice) in choices.iter().enumerate() {
        assert_eq!(choice["index"], index);
        let alone = greedy(&prompts[index / 2], &json!({"max_tokens": 5}));
        assert_eq!(choice["text"], alone["choices"][0]["text"], "choice {index}");
    }
    let alone =
        |i: usize| greedy(&prompts[i], &json!({}))["usage"]["prompt_tokens"].as_u64().unwrap();
    assert_eq!(together["usage"]["prompt_tokens"], alone(0) + alone(1) + alone(2));
    assert_eq!(together["usage"]["completion_tokens"], 30);

    let ids = greedy(&json!([[1, 403, 407, 261, 378], [1, 403]]), &json!({"max_tokens": 5}));
    assert_eq!(ids["choices"].as_array().unwrap().len(), 2);
    assert_eq!(text(&ids, 0), text(&together, 0));
}

#[test]
fn a_seed_repeats_and_choices_of_one_prompt_differ() {
    let draw = |seed: i64| {
        let body =
            json!({"prompt": "Once", "n": 2, "seed": seed, "temperature": 1.5, "max_tokens": 20});
        let answer = complete(&body);
        (text(&answer, 0).to_owned(), text(&answer, 1).to_owned())
    };
    let (one, other) = draw(7);
    assert_eq!(draw(7), (one.clone(), other.clone()));
    assert_ne!(one, other);
    assert_ne!(draw(-8).0, one);
}

#[test]
fn stop_strings_end_the_text_across_tokens_and_are_left_out() {
    let prompt = json!("Once upon a time");
    let stopped = greedy(&prompt, &json!({"stop": "girl", "max_tokens": 40}));
    assert_eq!(text(&stopped, 0), ", there was a little ");
    assert_eq!(stopped["choices"][0]["finish_reason"], "stop");
    assert_eq!(stopped["choices"][0]["stop_reason"], "girl");
    // Inside of a word and over the border between two.
    for (stop, expected) in
        [("ittl", ", there was a l"), ("e gir", ", there was a littl"), (", th", "")]
    {
        let stopped = greedy(&prompt, &json!({"stop": ["never", stop], "max_tokens": 40}));
        assert_eq!(text(&stopped, 0), expected, "{stop}");
    }
    let shown = json!({"stop": "girl", "max_tokens": 40, "include_stop_str_in_output": true});
    assert_eq!(text(&greedy(&prompt, &shown), 0), ", there was a little girl");
    let almost = greedy(&prompt, &json!({"stop": "girl named X", "max_tokens": 12}));
    assert_eq!(almost["choices"][0]["finish_reason"], "length");
}

#[test]
fn stop_tokens_end_the_text_and_are_told() {
    let full = greedy(&json!("Once upon a time"), &json!({"return_token_ids": true}));
    let ids = full["choices"][0]["token_ids"].as_array().unwrap();
    assert_eq!(ids.len(), 12);
    let stopped = greedy(
        &json!("Once upon a time"),
        &json!({"stop_token_ids": [ids[3]], "return_token_ids": true}),
    );
    assert_eq!(stopped["choices"][0]["finish_reason"], "stop");
    assert_eq!(stopped["choices"][0]["stop_reason"], ids[3]);
    let kept =
        greedy(&json!("Once upon a time"), &json!({"stop_token_ids": [ids[3]], "min_tokens": 8}));
    assert!(kept["usage"]["completion_tokens"].as_u64().unwrap() >= 8, "{kept}");
}

#[test]
fn echo_repeats_the_prompt() {
    let plain = greedy(&json!("Once upon a time"), &json!({}));
    let echoed = greedy(&json!("Once upon a time"), &json!({"echo": true}));
    assert_eq!(text(&echoed, 0), format!("Once upon a time{}", text(&plain, 0)));
    let by_ids = greedy(&json!([1, 403, 407, 261, 378]), &json!({"echo": true}));
    assert_eq!(text(&by_ids, 0), text(&echoed, 0));
    let nothing_more = greedy(&json!("Once upon a time"), &json!({"echo": true, "max_tokens": 0}));
    assert_eq!(text(&nothing_more, 0), "Once upon a time");
    assert_eq!(nothing_more["usage"]["completion_tokens"], 0);
}

#[test]
fn biases_and_penalties_change_what_is_drawn() {
    let plain = greedy(&json!("Once upon a time"), &json!({"return_token_ids": true}));
    let first = plain["choices"][0]["token_ids"][0].as_u64().unwrap();
    let banned = greedy(
        &json!("Once upon a time"),
        &json!({"logit_bias": {first.to_string(): -100}, "return_token_ids": true}),
    );
    assert_ne!(banned["choices"][0]["token_ids"][0], first);
    let forced = greedy(
        &json!("Once upon a time"),
        &json!({"logit_bias": {"100": 100}, "return_token_ids": true, "max_tokens": 3}),
    );
    assert_eq!(forced["choices"][0]["token_ids"], json!([100, 100, 100]));
    for penalty in ["presence_penalty", "frequency_penalty"] {
        let long = |value: f64| {
            text(&greedy(&json!("Once"), &json!({penalty: value, "max_tokens": 60})), 0).to_owned()
        };
        assert_ne!(long(0.0), long(2.0), "{penalty}");
    }
}

#[test]
fn names_of_requests_come_back() {
    let server = shared();
    let body = json!({"prompt": "a", "max_tokens": 1}).to_string();
    let headers = [("x-request-id", "mine-1"), ("content-type", "application/json")];
    let answer = server.post_with("/v1/completions", body.as_bytes(), &headers);
    assert_eq!(answer.header("x-request-id"), Some("mine-1"));
    assert_eq!(answer.ok()["id"], "cmpl-mine-1");
    let made_up = server.get("/health");
    assert_eq!(made_up.header("x-request-id").map(str::len), Some(32));
    let in_body = complete(&json!({"prompt": "a", "max_tokens": 1, "request_id": "r2"}));
    assert_eq!(in_body["id"], "cmpl-r2");
}

#[test]
fn special_tokens_are_part_of_the_text_where_that_is_asked_for() {
    // A bias that leaves nothing else: the end of the text, that does not end it.
    let body = |skip: Value| {
        json!({"prompt": "Once", "max_tokens": 3, "temperature": 0, "ignore_eos": true,
               "logit_bias": {"2": 100}, "skip_special_tokens": skip})
    };
    assert_eq!(text(&complete(&body(json!(false))), 0), "</s></s></s>");
    assert_eq!(text(&complete(&body(json!(true))), 0), "");
    assert_eq!(text(&complete(&body(Value::Null)), 0), "");
    let mut streamed = body(json!(false));
    streamed["stream"] = true.into();
    let chunks = shared().chunks("/v1/completions", &streamed);
    let told: String = chunks.iter().map(|chunk| text(chunk, 0)).collect();
    assert_eq!(told, "</s></s></s>");
    // An echo of tokens tells them, too.
    let mut echo = body(json!(false));
    (echo["prompt"], echo["echo"]) = (json!([1, 403]), true.into());
    assert!(text(&complete(&echo), 0).starts_with("<s>"), "{}", complete(&echo));
}

#[test]
fn a_server_with_a_seed_repeats_itself() {
    let answers = || {
        let config = ServerConfig { seed: Some(7), ..quiet() };
        let server = start(config, one_thread());
        let body = json!({"prompt": "Once", "max_tokens": 12, "temperature": 1.5, "n": 2});
        let ask = || server.post("/v1/completions", &body).ok()["choices"].clone();
        let both = [ask(), ask()];
        let texts = both.iter().flat_map(|choices| choices.as_array().unwrap());
        texts.map(|choice| choice["text"].as_str().unwrap().to_owned()).collect::<Vec<_>>()
    };
    let first = answers();
    assert_eq!(first, answers());
    // Requests and choices draw texts of their own.
    assert!((1..4).all(|i| !first[..i].contains(&first[i])), "{first:?}");
}

#[test]
fn a_server_without_priorities_refuses_them() {
    let config = ServerConfig { scheduling_policy: SchedulingPolicy::Fcfs, ..quiet() };
    let server = start(config, one_thread());
    let body = |priority: i32| json!({"prompt": "Once", "max_tokens": 1, "priority": priority});
    server.post("/v1/completions", &body(0)).ok();
    let error = server.post("/v1/completions", &body(-1)).error(400);
    assert_eq!(error["param"], "priority");
    shared().post("/v1/completions", &body(-1)).ok();
}
