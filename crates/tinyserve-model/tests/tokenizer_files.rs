//! Files of tokenizers: what stands beside the vocabulary, and files that are broken.

mod common;

use common::{Broken, assert_refused, golden};
use proptest::prelude::*;
use serde_json::{Value, json};
use tinyserve_model::{ModelError, Tokenizer};

fn bpe(vocab: &str, merges: &str) -> Result<Tokenizer, ModelError> {
    Tokenizer::byte_level_bpe(("vocab.json", vocab.as_bytes()), ("merges.txt", merges.as_bytes()))
}

#[test]
fn vocabulary_and_merges_belong_together() {
    let vocab = r#"{"a": 0, "b": 1, "ab": 2}"#;
    let tokenizer = bpe(vocab, "#version: 0.2\na b\n\n").unwrap();
    assert_eq!(tokenizer.encode("abba", true).unwrap(), [2, 1, 0]);
    assert_refused(bpe(vocab, "a b\nb a"), &["merges.txt", "\"b a\" in line 2", "vocab.json"]);
    assert_refused(bpe(vocab, "a b\nab ab"), &["merges.txt", "\"ab ab\"", "belong together"]);
    assert_refused(bpe(vocab, "a"), &["merges.txt", "\"a\" in line 1", "two tokens"]);
    assert_refused(bpe(vocab, "a b a"), &["merges.txt", "\"a b a\"", "two tokens"]);
    assert_refused(bpe("[]", "a b"), &["vocab.json", "tokens and their ids"]);
    assert_refused(bpe(r#"{"a": -1}"#, ""), &["vocab.json", "-1"]);
    let bytes = Tokenizer::byte_level_bpe(("vocab.json", b"{}"), ("merges.txt", b"\xff"));
    assert_refused(bytes, &["merges.txt", "UTF-8"]);
}

#[test]
fn tokens_beside_the_vocabulary_are_whole_and_may_be_special() {
    let broken = Broken::copy_of("gpt2-hub-names");
    let before = broken.open().unwrap().tokenizer().unwrap();
    let size = before.vocab_size() as u32;
    broken.create("added_tokens.json", &json!({"<turn>": size + 1, "<|pad|>": size}));
    broken.create(
        "tokenizer_config.json",
        &json!({"pad_token": {"content": "<|pad|>"}, "additional_special_tokens": ["<none>"]}),
    );
    let after = broken.open().unwrap().tokenizer().unwrap();
    assert_eq!(after.vocab_size() as u32, size + 2);
    let ids = after.encode("a<|pad|><turn>b", true).unwrap();
    let (a, b) = (before.encode("a", true).unwrap(), before.encode("b", true).unwrap());
    assert_eq!(ids, [&a[..], &[size, size + 1], &b].concat());
    assert_eq!((after.is_special(size), after.is_special(size + 1)), (true, false));
    assert_eq!(after.decode(&ids, true).unwrap(), "a<turn>b");
    // Without a row in the model, a name in a configuration is no token.
    assert_eq!(after.token_to_id("<none>"), None);

    broken.create("added_tokens.json", &json!({"<turn>": size + 7}));
    let gap = broken.open().unwrap().tokenizer();
    assert_refused(gap, &["added_tokens.json", "<turn>", &(size + 7).to_string(), "vocab.json"]);
    broken.create("added_tokens.json", &json!({"<turn>": "x"}));
    assert_refused(
        broken.open().unwrap().tokenizer(),
        &["added_tokens.json", "<turn>", "a token id"],
    );
}

#[test]
fn a_text_begins_with_a_space_where_the_configuration_says_so() {
    let broken = Broken::copy_of("gpt2-hub-names");
    let spaced = broken.open().unwrap().tokenizer().unwrap().encode(" the", true).unwrap();
    broken.create("tokenizer_config.json", &json!({"add_prefix_space": true}));
    let tokenizer = broken.open().unwrap().tokenizer().unwrap();
    assert_eq!(tokenizer.encode("the", true).unwrap(), spaced);
}

#[test]
fn what_the_library_does_not_look_at_is_refused() {
    let refuse = |change: &dyn Fn(&mut Value), words: &[&str]| {
        let mut json = golden_json("llama-gqa");
        change(&mut json);
        let read = Tokenizer::from_json("tokenizer.json", json.to_string().as_bytes());
        assert_refused(read, &[&["tokenizer.json"], words].concat());
    };
    let decoder = |stop: i32| json!({"type": "Strip", "content": " ", "start": 1, "stop": stop});
    refuse(&|json| json["decoder"] = decoder(1), &["decoder.stop", "1", "expected 0"]);
    let nested = json!({"type": "Sequence", "decoders": [{"type": "Fuse"}, decoder(2)]});
    refuse(&|json| json["decoder"] = nested.clone(), &["decoder.stop", "2", "expected 0"]);
    let template = |piece: Value| {
        let pair = json!([{"Sequence": {"id": "A", "type_id": 0}}]);
        json!({"type": "TemplateProcessing", "single": [piece], "pair": pair, "special_tokens": {}})
    };
    let token = template(json!({"SpecialToken": {"id": "<s>", "type_id": 0}}));
    refuse(&|json| json["post_processor"] = token.clone(), &["special_tokens", "<s>"]);
    let second = template(json!({"Sequence": {"id": "B", "type_id": 0}}));
    let nested = json!({"type": "Sequence", "processors": [second]});
    refuse(&|json| json["post_processor"] = nested.clone(), &["post_processor.single", "\"B\""]);
    let prefix = "continuing_subword_prefix";
    refuse(&|json| json["model"][prefix] = json!("##"), &[prefix, "##"]);
    for merges in [json!([["aaaa", "bbbb"]]), json!(["aaaa bbbb"])] {
        let model = json!({"type": "BPE", "vocab": {"aaaa": 0, "bbbb": 1}, "merges": merges});
        refuse(&|json| json["model"] = model.clone(), &["model.merges", "8 bytes", "at most 4"]);
    }
}

fn golden_json(name: &str) -> Value {
    serde_json::from_slice(&golden_bytes(name)).unwrap()
}

fn golden_bytes(name: &str) -> Vec<u8> {
    std::fs::read(golden(name).join("tokenizer.json")).unwrap()
}

/// Uses a tokenizer as a program would, if it can be read at all.
fn read_and_use(json: &[u8]) {
    let Ok(tokenizer) = Tokenizer::from_json("tokenizer.json", json) else { return };
    for text in ["", "Hello world <s> été 🦙", "<|endoftext|>a b", "\0\n\n  x"] {
        if let Ok(ids) = tokenizer.encode(text, true) {
            let _ = tokenizer.decode(&ids, true);
        }
    }
    let _ = tokenizer.decode(&[0, 1, 2, 3, 300, 600, u32::MAX], false);
}

/// Puts `new` in the place of value number `at`, counted from the outside in.
fn replace(value: &mut Value, at: &mut usize, new: &Value) -> bool {
    if *at == 0 {
        *value = new.clone();
        return true;
    }
    *at -= 1;
    // The first entries of a vocabulary stand for all.
    match value {
        Value::Array(items) => items.iter_mut().take(40).any(|item| replace(item, at, new)),
        Value::Object(map) => map.values_mut().take(40).any(|item| replace(item, at, new)),
        _ => false,
    }
}

fn hostile_value() -> impl Strategy<Value = Value> {
    prop_oneof![
        any::<i64>().prop_map(Value::from),
        (0..600_u64).prop_map(Value::from),
        Just(json!(u32::MAX)),
        "\\PC{0,6}".prop_map(Value::from),
        any::<bool>().prop_map(Value::from),
        Just(json!(null)),
        Just(json!([])),
        Just(json!({})),
        Just(json!("")),
        Just(json!("<unk>")),
    ]
}

const NAMES: [&str; 3] = ["gpt2-tiny", "llama-gqa", "llama-tied-rope-scaled-bf16"];

proptest! {
    #![proptest_config(ProptestConfig::with_cases(512))]

    #[test]
    fn changed_values(which in 0..NAMES.len(), at in 0..260_usize, new in hostile_value()) {
        let mut json = golden_json(NAMES[which]);
        replace(&mut json, &mut { at }, &new);
        read_and_use(json.to_string().as_bytes());
    }

    #[test]
    fn changed_bytes(
        which in 0..NAMES.len(),
        // Half of them before the vocabulary, where the short parts are.
        changes in prop::collection::vec((prop_oneof![0..2_000_usize, any::<usize>()], any::<u8>()), 1..4),
    ) {
        let mut json = golden_bytes(NAMES[which]);
        for (at, byte) in changes {
            let at = at % json.len();
            json[at] = byte;
        }
        read_and_use(&json);
    }
}

#[test]
fn a_file_that_was_cut_off_anywhere_is_refused() {
    let json = golden_bytes("llama-gqa");
    let end = json.iter().rposition(|&byte| byte == b'}').unwrap();
    for length in (0..2_000).chain((2_000..=end).step_by(37)) {
        let read = Tokenizer::from_json("tokenizer.json", &json[..length]);
        assert_refused(read, &["tokenizer.json"]);
    }
}
