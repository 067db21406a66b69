//! Models and the tokenizer.

use serde_json::{Value, json};

use crate::server::{one_thread, quiet, shared, start};

#[test]
fn models_are_listed_and_found() {
    let list = shared().get("/v1/models").ok();
    assert_eq!(list["object"], "list");
    let model = &list["data"][0];
    assert_eq!(model["id"], "stories260k");
    assert_eq!((&model["object"], &model["owned_by"]), (&json!("model"), &json!("tinyserve")));
    assert_eq!(model["max_model_len"], 512);
    assert!(model["created"].is_u64() && model["root"].is_string() && model["parent"].is_null());
    assert_eq!(&shared().get("/v1/models/stories260k").ok(), model);
}

#[test]
fn a_model_has_every_name_that_it_is_served_by() {
    let mut config = quiet();
    config.served_model_name = vec!["org/tiny".to_owned(), "other".to_owned()];
    let server = start(config, one_thread());
    assert_eq!(server.get("/v1/models").ok()["data"][1]["id"], "other");
    server.get("/v1/models/org/tiny").ok();
    let ask = |model: &str| {
        server.post("/v1/completions", &json!({"model": model, "prompt": "a", "max_tokens": 1}))
    };
    assert_eq!(ask("other").ok()["model"], "other");
    ask("stories260k").error(404);
}

#[test]
fn text_becomes_tokens_and_tokens_text() {
    let server = shared();
    for path in ["/tokenize", "/v1/tokenize"] {
        let body = json!({"prompt": "Once upon a time", "return_token_strs": true});
        let answer = server.post(path, &body).ok();
        assert_eq!(answer["tokens"], json!([1, 403, 407, 261, 378]));
        assert_eq!((&answer["count"], &answer["max_model_len"]), (&json!(5), &json!(512)));
        assert_eq!(answer["token_strs"].as_array().unwrap().len(), 5);
    }
    let body = json!({"prompt": "test", "add_special_tokens": false});
    let tokens = server.post("/tokenize", &body).ok()["tokens"].clone();
    assert_ne!(tokens[0], 1);
    for path in ["/detokenize", "/v1/detokenize"] {
        assert_eq!(server.post(path, &json!({"tokens": tokens})).ok()["prompt"], "test");
    }
    let chat = json!({"messages": [{"role": "user", "content": "Once upon a time"}]});
    assert_eq!(server.post("/tokenize", &chat).ok()["count"], 5);
    for (path, body, param) in [
        ("/tokenize", json!({}), "prompt"),
        ("/tokenize", json!({"prompt": "a", "messages": []}), "prompt"),
        ("/tokenize", json!({"prompt": [1]}), "prompt"),
        ("/detokenize", json!({"tokens": [9999]}), "tokens"),
        ("/detokenize", json!({"tokens": "a"}), "tokens"),
        ("/detokenize", json!({}), "tokens"),
    ] {
        assert_eq!(server.post(path, &body).error(400)["param"], param, "{body}");
    }
}

#[test]
fn the_tokenizer_says_what_harnesses_ask() {
    let info = shared().get("/tokenizer_info").ok();
    assert_eq!((&info["bos_token"], &info["eos_token"]), (&json!("<s>"), &json!("</s>")));
    assert!(info.get("pad_token").is_some());
    assert!(info["chat_template"].as_str().unwrap().contains("messages"));
}

#[test]
fn the_page_brings_everything_along() {
    let page = shared().get("/");
    assert_eq!(page.header("content-type"), Some("text/html; charset=utf-8"));
    let policy = page.header("content-security-policy").unwrap();
    assert!(policy.contains("default-src 'none'"), "{policy}");
    for outside in ["http://", "https://", "src=\"", "@import", "url("] {
        assert!(!page.text.contains(outside), "the page asks for {outside}");
    }
    let stats: Value = shared().stats();
    for name in [
        "state",
        "model",
        "running",
        "waiting",
        "pages_used",
        "pages_total",
        "uptime_seconds",
        "generated_tokens",
        "bytes_read",
        "bytes_dense",
        "recall_sum",
        "recall_count",
        "layers",
    ] {
        assert!(!stats[name].is_null() && page.text.contains(name), "{name}");
    }
}
