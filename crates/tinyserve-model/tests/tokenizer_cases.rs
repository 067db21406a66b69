//! Cases that other projects wrote for tokenizers of real models.

mod common;

use common::{ids, read, read_json, tokenizer};
use serde_json::Value;
use tinyserve_model::Tokenizer;

fn gpt2() -> [(&'static str, Tokenizer); 2] {
    let vocab = read("data/tokenizers/gpt2/vocab.json");
    let merges = read("data/tokenizers/gpt2/merges.txt");
    let bpe = Tokenizer::byte_level_bpe(("vocab.json", &vocab), ("merges.txt", &merges));
    [
        ("tokenizer.json", tokenizer("data/tokenizers/gpt2/tokenizer.json")),
        ("vocab.json and merges.txt", bpe.unwrap()),
    ]
}

fn mistral() -> Tokenizer {
    tokenizer("data/tokenizers/mistral_v1/tokenizer.json")
}

/// Cases of one of transformers.js's tokenizers.
fn cases(file: &str, name: &str) -> Vec<(String, Value)> {
    let cases = read_json(&format!("data/tokenizers/cases/{file}"))[name].clone();
    cases.as_object().unwrap().clone().into_iter().collect()
}

/// What decoding does in transformers.js unless it is told not to.
fn clean_up(text: &str) -> String {
    [" .", " ?", " !", " ,", " ' ", " n't", " 'm", " 's", " 've", " 're"]
        .iter()
        .fold(text.to_owned(), |text, from| text.replace(from, from.trim()))
}

#[test]
fn gpt2_agrees_with_llama_cpp() {
    let folder = "data/tokenizers/ggml_vocab";
    let input = String::from_utf8(read(&format!("{folder}/ggml-vocab-gpt-2.gguf.inp"))).unwrap();
    let output = String::from_utf8(read(&format!("{folder}/ggml-vocab-gpt-2.gguf.out"))).unwrap();
    let mut texts: Vec<_> = input.split("\n__ggml_vocab_test__\n").collect();
    let lines: Vec<_> = output.lines().collect();
    // The file ends with a separator.
    assert_eq!(texts.pop(), Some(""));
    assert_eq!(texts.len(), lines.len());
    for (source, tokenizer) in gpt2() {
        for (text, line) in texts.iter().zip(&lines) {
            let ids: Vec<u32> = line.split_whitespace().map(|id| id.parse().unwrap()).collect();
            assert_eq!(tokenizer.encode(text, true).unwrap(), ids, "{source}: {text:?}");
            assert_eq!(tokenizer.decode(&ids, false).unwrap(), *text, "{source}");
        }
    }
}

#[test]
fn gpt2_agrees_with_ggml() {
    let file = read("data/tokenizers/ggml_vocab/ggml-prompts-gpt-2.txt");
    for (source, tokenizer) in gpt2() {
        for line in std::str::from_utf8(&file).unwrap().lines() {
            let (text, ids) = line.rsplit_once(" => ").unwrap();
            let ids: Vec<u32> = ids.split(',').map(|id| id.trim().parse().unwrap()).collect();
            assert_eq!(tokenizer.encode(text, true).unwrap(), ids, "{source}: {text:?}");
        }
    }
}

#[test]
fn gpt2_agrees_with_transformers_js() {
    for (source, tokenizer) in gpt2() {
        let mut cleaned = 0;
        for name in ["Xenova/gpt2", "openai-community/gpt2"] {
            for (case, expected) in cases("transformersjs_gpt2.json", name) {
                let text = expected["text"].as_str().unwrap();
                let ids = ids(&expected["ids"]);
                assert_eq!(tokenizer.encode(text, true).unwrap(), ids, "{source}: {case}");
                let tokens: Vec<_> =
                    ids.iter().map(|&id| tokenizer.id_to_token(id).unwrap()).collect();
                assert_eq!(serde_json::json!(tokens), expected["tokens"], "{source}: {case}");
                // Here tokens decode to exactly their text; transformers.js tidies spaces.
                let decoded = tokenizer.decode(&ids, false).unwrap();
                assert_eq!(decoded, text, "{source}: {case}");
                let theirs = expected["decoded"].as_str().unwrap();
                assert_eq!(clean_up(&decoded), theirs, "{source}: {case}");
                cleaned += usize::from(theirs != text);
            }
        }
        assert_eq!(cleaned, 2, "PUNCTUATION, twice");
    }
}

#[test]
fn both_ways_to_read_gpt2_are_the_same_tokenizer() {
    let [(_, json), (_, bpe)] = gpt2();
    assert_eq!((json.vocab_size(), bpe.vocab_size()), (50257, 50257));
    for id in 0..50257 {
        assert_eq!(json.id_to_token(id), bpe.id_to_token(id));
        assert_eq!(json.is_special(id), bpe.is_special(id));
    }
    let text = "<|endoftext|> a<|endoftext|>";
    assert_eq!(json.encode(text, true).unwrap(), bpe.encode(text, true).unwrap());
    assert_eq!(bpe.encode(text, true).unwrap(), [50256, 257, 50256]);
    assert_eq!(bpe.decode(&[50256, 257, 50256], true).unwrap(), " a");
}

/// Cases whose words Llama-2's vocabulary, which they were written for, spells with other tokens
/// than Mistral's: `▁gra bb ed` for `▁grabbed`, bytes for an emoji that Mistral has a token for.
const SPELT_DIFFERENTLY: [&str; 11] = [
    "BASIC",
    "BPE_SCORES_PRIORITY_1",
    "BPE_SCORES_PRIORITY_2",
    "BPE_SCORES_PRIORITY_3",
    "CURRENCY",
    "HELLO_WORLD_LOWERCASE",
    "MULTIBYTE_EMOJIS",
    "PARAGRAPH",
    "POPULAR_EMOJIS",
    "TEXT_WITH_ESCAPE_CHARACTERS",
    "TEXT_WITH_ESCAPE_CHARACTERS_2",
];

#[test]
fn mistral_spells_texts_as_its_sibling_llama_2_does() {
    let tokenizer = mistral();
    assert_eq!(tokenizer.vocab_size(), 32_000);
    for (case, expected) in cases("transformersjs_llama.json", "Xenova/llama-tokenizer") {
        let text = expected["text"].as_str().unwrap();
        let ids = tokenizer.encode(text, true).unwrap();
        assert_eq!(ids[0], 1, "{case}: <s>");
        let tokens: Vec<_> =
            ids[1..].iter().map(|&id| tokenizer.id_to_token(id).unwrap()).collect();
        // Ids differ, because the two number their tokens differently.
        let same = serde_json::json!(tokens) == expected["tokens"];
        assert_eq!(same, !SPELT_DIFFERENTLY.contains(&case.as_str()), "{case}: {tokens:?}");
        // Theirs keeps the special token and the space that the tokenizer itself put in front.
        let decoded = tokenizer.decode(&ids, true).unwrap();
        assert_eq!(format!("<s> {decoded}"), expected["decoded"].as_str().unwrap(), "{case}");
    }
}

#[test]
fn mistral_falls_back_to_bytes() {
    let tokenizer = mistral();
    let spelt = |text: &str| {
        let ids = tokenizer.encode(text, false).unwrap();
        ids.into_iter().map(|id| tokenizer.id_to_token(id).unwrap()).collect::<Vec<_>>()
    };
    assert_eq!(spelt("🦙"), ["▁", "<0xF0>", "<0x9F>", "<0xA6>", "<0x99>"]);
    assert_eq!(spelt("hello"), ["▁hell", "o"], "known of this vocabulary");
}
