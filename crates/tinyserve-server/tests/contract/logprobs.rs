//! Log-probabilities, as evaluation harnesses read them.

use serde_json::{Value, json};

use crate::server::shared;

fn complete(body: &Value) -> Value {
    shared().post("/v1/completions", body).ok()
}

#[test]
fn a_harness_can_score_prompts() {
    // What lm-eval sends, and how it takes the answer apart.
    let prompts = [vec![1, 403, 407, 261, 378], vec![1, 403, 100, 200]];
    let answer = complete(&json!({
        "model": "stories260k", "prompt": prompts, "temperature": 0, "max_tokens": 1, "logprobs": 1,
        "seed": 1234, "echo": true,
    }));
    for (index, prompt) in prompts.iter().enumerate() {
        let logprobs = &answer["choices"][index]["logprobs"];
        let list = |name: &str| logprobs[name].as_array().unwrap().clone();
        for name in ["tokens", "token_logprobs", "top_logprobs", "text_offset"] {
            assert_eq!(list(name).len(), prompt.len() + 1, "{name}: {logprobs}");
        }
        assert!(list("token_logprobs")[0].is_null() && list("top_logprobs")[0].is_null());
        let mut greedy = 0;
        for i in 1..=prompt.len() {
            let (token, logprob) = (&list("tokens")[i], &list("token_logprobs")[i]);
            let top = list("top_logprobs")[i].clone();
            assert_eq!(&top[token.as_str().unwrap()], logprob, "{logprobs}");
            let best = top
                .as_object()
                .unwrap()
                .values()
                .map(|x| x.as_f64().unwrap())
                .fold(f64::MIN, f64::max);
            greedy += usize::from(logprob.as_f64() == Some(best));
            assert!(logprob.as_f64().unwrap() < 0.0);
        }
        // The generated token is the best one.
        assert!(greedy >= 1);
    }
    // "Once upon a time" is likely; the other is noise.
    let sum = |index: usize| {
        let values = answer["choices"][index]["logprobs"]["token_logprobs"].as_array().unwrap();
        values.iter().filter_map(Value::as_f64).sum::<f64>()
    };
    assert!(sum(0) > sum(1) + 5.0);
}

#[test]
fn probabilities_are_those_of_natural_logarithms() {
    let answer =
        complete(&json!({"prompt": "Once", "max_tokens": 3, "temperature": 0, "logprobs": 20}));
    for top in answer["choices"][0]["logprobs"]["top_logprobs"].as_array().unwrap() {
        let values: Vec<f64> =
            top.as_object().unwrap().values().map(|x| x.as_f64().unwrap()).collect();
        assert!((19..=20).contains(&values.len()), "{top}");
        let sum: f64 = values.iter().map(|x| x.exp()).sum();
        assert!((0.5..=1.000_01).contains(&sum), "{sum}");
    }
}

#[test]
fn scoring_alone_generates_nothing() {
    let answer = complete(
        &json!({"prompt": "Once upon a time", "max_tokens": 0, "logprobs": 2, "echo": true}),
    );
    assert_eq!(answer["choices"][0]["logprobs"]["tokens"].as_array().unwrap().len(), 5);
    assert_eq!(answer["usage"]["completion_tokens"], 0);
    assert_eq!(answer["choices"][0]["finish_reason"], "length");
}

#[test]
fn offsets_point_into_the_text() {
    let body = json!({"prompt": "Once upon a time", "max_tokens": 8, "temperature": 0, "logprobs": 0, "echo": true});
    let answer = complete(&body);
    let choice = &answer["choices"][0];
    let text: Vec<char> = choice["text"].as_str().unwrap().chars().collect();
    let tokens = choice["logprobs"]["tokens"].as_array().unwrap();
    let offsets = choice["logprobs"]["text_offset"].as_array().unwrap();
    for (token, offset) in tokens.iter().zip(offsets).skip(2) {
        let (token, offset) = (token.as_str().unwrap(), offset.as_u64().unwrap() as usize);
        let found: String = text[offset..].iter().take(token.chars().count()).collect();
        assert_eq!(found, token, "{choice}");
    }
}

#[test]
fn chat_tells_each_token_with_its_bytes() {
    let mut body = json!({
        "messages": [{"role": "user", "content": "Once upon a time"}], "temperature": 0, "max_tokens": 5,
        "logprobs": true, "top_logprobs": 3,
    });
    let check = |content: &Value| {
        let content = content.as_array().unwrap();
        for token in content {
            let text = token["token"].as_str().unwrap();
            assert_eq!(token["bytes"], json!(text.as_bytes()));
            assert_eq!(token["top_logprobs"].as_array().unwrap().len(), 3);
            assert_eq!(token["top_logprobs"][0]["logprob"], token["logprob"]);
        }
        content.iter().map(|token| token["token"].as_str().unwrap()).collect::<String>()
    };
    let whole = shared().post("/v1/chat/completions", &body).ok();
    let choice = &whole["choices"][0];
    assert_eq!(
        check(&choice["logprobs"]["content"]),
        choice["message"]["content"].as_str().unwrap()
    );
    body["stream"] = true.into();
    let chunks = shared().chunks("/v1/chat/completions", &body);
    let told: String = chunks
        .iter()
        .filter(|chunk| !chunk["choices"][0]["logprobs"].is_null())
        .map(|chunk| check(&chunk["choices"][0]["logprobs"]["content"]))
        .collect();
    assert_eq!(told, choice["message"]["content"].as_str().unwrap());
    body["top_logprobs"] = 0.into();
    body["stream"] = false.into();
    let alone = shared().post("/v1/chat/completions", &body).ok();
    assert_eq!(alone["choices"][0]["logprobs"]["content"][0]["top_logprobs"], json!([]));
}
