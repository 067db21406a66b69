//! `POST /v1/chat/completions`.

use serde_json::{Value, json};
use tinyserve::TinyServeConfig;

use crate::server::{one_thread, quiet, shared, start};

fn chat(body: &Value) -> Value {
    shared().post("/v1/chat/completions", body).ok()
}

#[test]
fn an_answer_has_the_fields_of_openai() {
    let answer = chat(&json!({
        "messages": [{"role": "user", "content": "Once upon a time"}], "temperature": 0, "max_tokens": 12,
    }));
    assert!(answer["id"].as_str().unwrap().starts_with("chatcmpl-"));
    assert_eq!(answer["object"], "chat.completion");
    let choice = &answer["choices"][0];
    assert_eq!(choice["message"]["role"], "assistant");
    let content = choice["message"]["content"].as_str().unwrap();
    assert!(content.starts_with(", there was a little girl"), "{content}");
    assert_eq!(choice["finish_reason"], "length");
    assert_eq!(choice.get("logprobs"), Some(&Value::Null));
    assert_eq!(answer["usage"]["total_tokens"], 17);
}

#[test]
fn contents_are_texts_or_lists_of_text_parts() {
    let ask = |content: Value| {
        let message = json!({"role": "user", "content": content, "name": null});
        chat(&json!({"messages": [message], "temperature": 0, "max_completion_tokens": 6}))
    };
    let plain = ask(json!("Once upon a time"));
    let parts = ask(json!([{"type": "text", "text": "Once upon a time"}]));
    assert_eq!(plain["choices"], parts["choices"]);
    assert_eq!(plain["usage"]["completion_tokens"], 6);
    let two = ask(json!([{"type": "text", "text": "Once"}, {"type": "text", "text": "upon"}]));
    assert_eq!(two["usage"], ask(json!("Once\nupon"))["usage"]);
}

#[test]
fn messages_that_make_no_sense_are_named() {
    let user = |content: Value| json!([{"role": "user", "content": content}]);
    for (messages, param) in [
        (json!(null), "messages"),
        (json!([]), "messages"),
        (json!("Hi"), "messages"),
        (json!(["Hi"]), "messages[0]"),
        (json!([{"content": "Hi"}]), "messages[0].role"),
        (json!([{"role": "wizard", "content": "Hi"}]), "messages[0].role"),
        (json!([{"role": "user", "content": "a"}, {"role": "user"}]), "messages[1].content"),
        (user(json!(3)), "messages[0].content"),
        (user(json!([{"type": "image_url", "image_url": {"url": "x"}}])), "messages[0].content[0]"),
        (
            user(json!([{"type": "text", "text": "a"}, {"type": "input_audio"}])),
            "messages[0].content[1]",
        ),
        (json!([{"role": "user", "content": "a", "name": 3}]), "messages[0].name"),
        (
            json!([{"role": "assistant", "content": null, "tool_calls": 3}]),
            "messages[0].tool_calls",
        ),
    ] {
        let body = json!({"messages": messages, "max_tokens": 1});
        let error = shared().post("/v1/chat/completions", &body).error(400);
        assert_eq!(error["param"], param, "{messages}");
    }
}

#[test]
fn what_chat_cannot_do_is_refused() {
    for (fields, param) in [
        (json!({"top_logprobs": 2}), "top_logprobs"),
        (json!({"logprobs": 2}), "logprobs"),
        (json!({"logprobs": true, "top_logprobs": 21}), "top_logprobs"),
        (json!({"tool_choice": "required", "tools": [{}]}), "tool_choice"),
        (json!({"tool_choice": {"type": "function", "function": {"name": "f"}}}), "tool_choice"),
        (json!({"functions": []}), "functions"),
        (json!({"modalities": ["audio"]}), "modalities"),
        (json!({"audio": {}}), "audio"),
        (json!({"chat_template": "{{ 1 }}"}), "chat_template"),
        (json!({"chat_template_kwargs": {"messages": []}}), "chat_template_kwargs"),
        (
            json!({"continue_final_message": true, "add_generation_prompt": true}),
            "continue_final_message",
        ),
        (json!({"response_format": {"type": "json_schema"}}), "response_format"),
        (json!({"max_completion_tokens": 0}), "max_completion_tokens"),
        (json!({"echo": true}), "echo"),
    ] {
        let mut body = json!({"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 1});
        body.as_object_mut().unwrap().extend(fields.as_object().unwrap().clone());
        let error = shared().post("/v1/chat/completions", &body).error(400);
        assert_eq!(error["param"], param, "{fields} → {error}");
    }
}

#[test]
fn templates_come_from_the_server_alone() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("t.jinja");
    let template = "{{ bos_token }}{% for m in messages %}[{{ m.role }}{% if m.name %}:{{ m.name }}{% endif %}]\
         {{ m.content or '' }}{% for c in m.tool_calls or [] %}{{ c.function.arguments.a }}{% endfor %}{% endfor %}\
         {{ extra | default('') }}{% if tools %}{{ tools | length }}{% endif %}\
         {% if add_generation_prompt %}[assistant]{% endif %}{% if messages | length > 4 %}{{ raise_exception('too many') }}{% endif %}";
    std::fs::write(&path, template).unwrap();
    let mut config = quiet();
    config.chat_template = Some(path);
    let server = start(config, one_thread());
    let render = |body: Value| {
        let tokens = server.post("/tokenize", &body).ok()["tokens"].clone();
        let text = server.post("/detokenize", &json!({"tokens": tokens})).ok();
        text["prompt"].as_str().unwrap().to_owned()
    };
    let body = json!({
        "messages": [
            {"role": "developer", "content": "Be kind"},
            {"role": "user", "content": "Hi", "name": "bob"},
            {"role": "assistant", "content": null, "tool_calls": [
                {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{\"a\": \"z\"}"}}]},
            {"role": "tool", "content": "ok", "tool_call_id": "1"},
        ],
        "chat_template_kwargs": {"extra": "!"},
        "tools": [{"type": "function", "function": {"name": "f"}}],
    });
    assert_eq!(
        render(body.clone()),
        "<s> [system]Be kind[user:bob]Hi[assistant]z[tool]ok!1[assistant]"
    );
    let mut without = body.clone();
    without["tool_choice"] = "none".into();
    without["add_generation_prompt"] = false.into();
    assert_eq!(render(without), "<s> [system]Be kind[user:bob]Hi[assistant]z[tool]ok!");
    let continued = json!({"messages": [{"role": "assistant", "content": "I am"}], "continue_final_message": true});
    assert_eq!(render(continued), "<s> [assistant]I am");

    let many = vec![json!({"role": "user", "content": "a"}); 5];
    let error = server.post("/v1/chat/completions", &json!({"messages": many})).error(400);
    assert_eq!(error["param"], "messages");
    assert!(error["message"].as_str().unwrap().ends_with(": too many"), "{error}");
}

#[test]
fn a_model_without_a_template_says_what_to_do() {
    let folder = tempfile::tempdir().unwrap();
    let from = concat!(env!("CARGO_MANIFEST_DIR"), "/../tinyserve-model/assets/stories260k");
    for name in ["config.json", "model.safetensors", "tokenizer.json"] {
        std::fs::copy(format!("{from}/{name}"), folder.path().join(name)).unwrap();
    }
    let model = folder.path().to_str().unwrap().to_owned();
    let server =
        start(quiet(), TinyServeConfig { model, threads: Some(1), ..TinyServeConfig::default() });
    let body = json!({"messages": [{"role": "user", "content": "Hi"}]});
    let error = server.post("/v1/chat/completions", &body).error(400);
    assert!(error["message"].as_str().unwrap().contains("--chat-template"), "{error}");
}
