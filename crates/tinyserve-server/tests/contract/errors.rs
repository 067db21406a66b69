//! What is refused: with which status, and in whose words.

use serde_json::{Value, json};

use crate::server::{one_thread, quiet, shared, start};

/// A completion with these fields besides a prompt.
fn completion(fields: &Value) -> Value {
    let mut body = json!({"prompt": "Once", "max_tokens": 1});
    body.as_object_mut().unwrap().extend(fields.as_object().unwrap().clone());
    body
}

#[test]
fn what_is_not_implemented_is_refused_with_its_field() {
    let server = shared();
    for (fields, param) in [
        (json!({"suffix": "the end"}), "suffix"),
        (json!({"use_beam_search": true}), "use_beam_search"),
        (json!({"best_of": 3}), "best_of"),
        (json!({"n": 2, "best_of": 3}), "best_of"),
        (json!({"response_format": {"type": "json_object"}}), "response_format"),
        (json!({"guided_json": {}}), "guided_json"),
        (json!({"prompt_logprobs": 1}), "prompt_logprobs"),
        (json!({"stream_options": {"include_usage": true}}), "stream_options"),
        (json!({"stream": false, "stream_options": {}}), "stream_options"),
        (json!({"n": 65}), "n"),
        (json!({"n": 0}), "n"),
        (json!({"logprobs": 21}), "logprobs"),
        (json!({"logprobs": true}), "logprobs"),
        (json!({"max_tokens": 0}), "max_tokens"),
        (json!({"max_tokens": -1}), "max_tokens"),
        (json!({"max_tokens": 1.5}), "max_tokens"),
        (json!({"temperature": -0.1}), "temperature"),
        (json!({"temperature": "hot"}), "temperature"),
        (json!({"top_p": 0}), "top_p"),
        (json!({"top_p": 1.01}), "top_p"),
        (json!({"top_k": -2}), "top_k"),
        (json!({"min_p": 2}), "min_p"),
        (json!({"presence_penalty": 2.1}), "presence_penalty"),
        (json!({"frequency_penalty": -3}), "frequency_penalty"),
        (json!({"repetition_penalty": 0}), "repetition_penalty"),
        (json!({"stop": ""}), "stop"),
        (json!({"stop": ["a", "b", "c", "d", "e"]}), "stop"),
        (json!({"stop": [1]}), "stop"),
        (json!({"stop_token_ids": [512]}), "stop_token_ids"),
        (json!({"logit_bias": {"512": 1}}), "logit_bias"),
        (json!({"logit_bias": {"1": 101}}), "logit_bias"),
        (json!({"logit_bias": [1]}), "logit_bias"),
        (json!({"seed": "x"}), "seed"),
        (json!({"stream": "yes"}), "stream"),
        (
            json!({"stream": true, "stream_options": {"include_usage": 1}}),
            "stream_options.include_usage",
        ),
        (json!({"min_tokens": 2}), "min_tokens"),
        (json!({"prompt": null}), "prompt"),
        (json!({"prompt": []}), "prompt"),
        (json!({"prompt": [[]]}), "prompt"),
        (json!({"prompt": [512]}), "prompt"),
        (json!({"prompt": {"a": 1}}), "prompt"),
        (json!({"truncate_prompt_tokens": 0}), "truncate_prompt_tokens"),
        (json!({"request_id": ""}), "request_id"),
        (json!({"tinyserve": 1}), "tinyserve"),
        (json!({"tinyserve": {"atention": "dense"}}), "tinyserve.atention"),
        (json!({"tinyserve": {"attention": "quest"}}), "tinyserve.attention"),
        (json!({"tinyserve": {"selection_ratio": 0}}), "tinyserve.selection_ratio"),
        (
            json!({"tinyserve": {"token_budget": 64, "selection_ratio": 0.5}}),
            "tinyserve.token_budget",
        ),
    ] {
        let error = server.post("/v1/completions", &completion(&fields)).error(400);
        assert_eq!(error["param"], param, "{fields} → {error}");
        assert_eq!(error["type"], "invalid_request_error");
        let message = error["message"].as_str().unwrap();
        assert!(message.contains(param.split('.').next_back().unwrap()), "{message}");
    }
}

#[test]
fn what_has_no_effect_is_ignored() {
    let server = shared();
    let plain = completion(&json!({"temperature": 0, "max_tokens": 4}));
    let expected = server.post("/v1/completions", &plain).ok()["choices"][0]["text"].clone();
    for fields in [
        json!({"user": "me", "metadata": {"a": [1]}, "store": true, "service_tier": "auto"}),
        json!({"unknown": {"deep": [[[{}]]]}, "best_of": 1, "suffix": null, "stop": null, "logprobs": null}),
        json!({"response_format": {"type": "text"}, "use_beam_search": false, "logit_bias": {}, "tinyserve": {}}),
    ] {
        let mut body = plain.clone();
        body.as_object_mut().unwrap().extend(fields.as_object().unwrap().clone());
        let answer = server.post("/v1/completions", &body).ok();
        assert_eq!(answer["choices"][0]["text"], expected, "{fields}");
    }
}

#[test]
fn bodies_that_are_no_json_object_are_told_so() {
    let server = shared();
    let post = |body: &[u8], kind: &str| {
        server.post_with("/v1/completions", body, &[("content-type", kind)])
    };
    for body in
        [&b"{"[..], b"", b"{\"prompt\": \"a\"} x", b"{\"prompt\": \xff\"}", b"{'prompt': 1}"]
    {
        assert_eq!(post(body, "application/json").error(400)["code"], "json_parse_error");
    }
    for body in [&b"[]"[..], b"3", b"null", b"\"a\""] {
        assert_eq!(post(body, "application/json").error(400)["code"], "invalid_request_error");
    }
    let deep = format!("{{\"prompt\": {}", "[".repeat(200_000));
    post(deep.as_bytes(), "application/json").error(400);
    let error = post(b"{}", "text/csv").error(415);
    assert_eq!(error["code"], "unsupported_media_type");
    post(br#"{"prompt": "a", "max_tokens": 1}"#, "application/json; charset=utf-8").ok();
}

#[test]
fn unknown_models_paths_and_methods_are_told_in_json() {
    let server = shared();
    let error = server.post("/v1/completions", &completion(&json!({"model": "gpt-4"}))).error(404);
    assert_eq!((&error["code"], &error["param"]), (&json!("model_not_found"), &json!("model")));
    server.get("/v1/models/gpt-4").error(404);
    server.get("/v1/nothing").error(404);
    server.get("/%ff%00").error(404);
    server.get("/v1/completions").error(405);
    server.delete("/health").error(405);
    server.post("/v1/models", &json!({})).error(405);
}

#[test]
fn prompts_that_never_fit_are_refused_with_the_numbers() {
    let server = shared();
    let long: Vec<u32> = vec![5; 600];
    for (path, body, param) in [
        ("/v1/completions", json!({"prompt": long, "max_tokens": 1}), "prompt"),
        ("/v1/completions", json!({"prompt": "Once", "max_tokens": 5000}), "max_tokens"),
        ("/v1/completions", json!({"prompt": ["Once", "a ".repeat(900)]}), "prompt"),
        (
            "/v1/chat/completions",
            json!({"messages": [{"role": "user", "content": "a ".repeat(900)}]}),
            "messages",
        ),
        ("/v1/completions", json!({"prompt": long, "stream": true}), "prompt"),
    ] {
        let error = server.post(path, &body).error(400);
        assert_eq!(error["code"], "context_length_exceeded", "{error}");
        assert_eq!(error["param"], param);
        assert!(error["message"].as_str().unwrap().contains("n_ctx 512"), "{error}");
    }
    let fits = json!({"prompt": vec![5; 600], "max_tokens": 4, "truncate_prompt_tokens": 100});
    assert_eq!(server.post("/v1/completions", &fits).ok()["usage"]["prompt_tokens"], 100);
}

#[test]
fn keys_are_asked_for_everywhere_but_where_monitors_look() {
    let mut config = quiet();
    config.api_key = vec!["first".to_owned(), "second".to_owned()];
    let server = start(config, one_thread());
    for path in
        ["/v1/models", "/tokenizer_info", "/v1/sessions", "/tinyserve/stats", "/load", "/nothing"]
    {
        let answer = server.get(path);
        assert_eq!(answer.error(401)["code"], "invalid_api_key", "{path}");
        assert_eq!(answer.header("www-authenticate"), Some("Bearer"));
        assert_ne!(
            server.get_with(path, &[("authorization", "Bearer second")]).status,
            401,
            "{path}"
        );
        server.get_with(path, &[("authorization", "Bearer secon")]).error(401);
    }
    server.get_with("/v1/models", &[("x-api-key", "first")]).ok();
    server.post("/v1/completions", &json!({"prompt": "a"})).error(401);
    for path in ["/", "/health", "/metrics", "/version"] {
        assert_eq!(server.get(path).status, 200, "{path}");
    }
}
