//! Pieces of a streaming text, put together, are the text of all tokens at once.

mod common;

use std::sync::LazyLock;

use common::{GOLDEN, golden, tokenizer};
use proptest::prelude::*;
use tinyserve_model::{Checkpoint, IncrementalDecoder, Tokenizer};

struct Named {
    name: &'static str,
    tokenizer: Tokenizer,
    /// Whether bytes are tokens of their own, written `<0xE2>`.
    byte_fallback: bool,
}

static TOKENIZERS: LazyLock<Vec<Named>> = LazyLock::new(|| {
    let mut tokenizers: Vec<_> = GOLDEN
        .iter()
        .map(|&name| (name, Checkpoint::open(&golden(name)).unwrap().tokenizer().unwrap()))
        .collect();
    tokenizers.push(("builtin", Checkpoint::builtin().unwrap().tokenizer().unwrap()));
    tokenizers.push(("gpt2", tokenizer("data/tokenizers/gpt2/tokenizer.json")));
    tokenizers.push(("mistral", tokenizer("data/tokenizers/mistral_v1/tokenizer.json")));
    let named = tokenizers.into_iter().map(|(name, tokenizer)| {
        let byte_fallback = tokenizer.token_to_id("<0xE2>").is_some();
        Named { name, tokenizer, byte_fallback }
    });
    named.collect()
});

fn stream(tokenizer: &Tokenizer, prompt: &[u32], tokens: &[u32]) -> String {
    let mut decoder = IncrementalDecoder::new(tokenizer, prompt);
    let mut text = String::new();
    for &id in tokens {
        text.push_str(&decoder.push(id).unwrap());
    }
    text + &decoder.finish().unwrap()
}

/// A text of words, spaces and characters of one to four bytes.
fn text() -> impl Strategy<Value = String> {
    let piece = prop_oneof![
        4 => "[a-zA-Z]{1,8}",
        3 => Just(" ".to_owned()),
        1 => "[ \n\t.,!?']{1,4}",
        1 => proptest::char::any().prop_map(String::from),
        1 => Just("naïve 東京 🚀👩‍🌾".to_owned()),
    ];
    prop::collection::vec(piece, 0..24).prop_map(|pieces| pieces.concat())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(256))]

    #[test]
    fn a_text_streams_whole(text in text(), cut in 0.0..1.0_f64) {
        for Named { name, tokenizer, .. } in TOKENIZERS.iter() {
            let ids = tokenizer.encode(&text, true).unwrap();
            // A prompt ends where a text does: at a character's end.
            let mut at = (ids.len() as f64 * cut) as usize;
            while tokenizer.decode(&ids[..at], true).unwrap().ends_with('\u{FFFD}') {
                at -= 1;
            }
            let whole = tokenizer.decode(&ids, true).unwrap();
            let prompt = tokenizer.decode(&ids[..at], true).unwrap();
            let streamed = stream(tokenizer, &ids[..at], &ids[at..]);
            prop_assert_eq!(prompt + &streamed, whole, "{} {:?} at {}", name, ids, at);
        }
    }

    #[test]
    fn random_tokens_stream_as_they_decode(
        seeds in prop::collection::vec(any::<u32>(), 0..48),
        small in any::<bool>(),
    ) {
        for Named { name, tokenizer, byte_fallback } in TOKENIZERS.iter() {
            // The first few hundred tokens are the bytes and the special tokens; one past the
            // end is no token at all.
            let vocab = tokenizer.vocab_size() as u32 + 1;
            let vocab = if small { vocab.min(300) } else { vocab };
            let ids: Vec<_> = seeds.iter().map(|seed| seed % vocab).collect();
            let whole = tokenizer.decode(&ids, true).unwrap();
            let streamed = stream(tokenizer, &[], &ids);
            // Where byte tokens are no UTF-8, decoding at once takes back complete characters.
            if !byte_fallback || !whole.contains('\u{FFFD}') {
                prop_assert_eq!(streamed, whole, "{} {:?}", name, ids);
            }
        }
    }

    #[test]
    fn any_prompt_may_come_before(
        prompt in prop::collection::vec(any::<u32>(), 0..24),
        text in text(),
    ) {
        for Named { name, tokenizer, .. } in TOKENIZERS.iter() {
            let vocab = tokenizer.vocab_size() as u32;
            let prompt: Vec<_> = prompt.iter().map(|id| id % vocab).collect();
            let before = tokenizer.decode(&prompt, true).unwrap();
            if before.contains('\u{FFFD}') {
                continue;
            }
            let ids = tokenizer.encode(&text, false).unwrap();
            let whole = tokenizer.decode(&[prompt.as_slice(), &ids].concat(), true).unwrap();
            let streamed = stream(tokenizer, &prompt, &ids);
            prop_assert_eq!(before + &streamed, whole, "{} {:?} {:?}", name, prompt, ids);
        }
    }
}

#[test]
fn the_first_word_has_no_space_after_bos_and_one_after_a_word() {
    let tokenizer = &TOKENIZERS.iter().find(|named| named.name == "builtin").unwrap().tokenizer;
    let once = tokenizer.token_to_id("▁Once").unwrap();
    let mut decoder = IncrementalDecoder::new(tokenizer, &[1]);
    assert_eq!(decoder.push(once).unwrap(), "Once");
    let mut decoder = IncrementalDecoder::new(tokenizer, &[1, once]);
    assert_eq!(decoder.push(once).unwrap(), " Once");
}

#[test]
fn a_character_appears_when_its_last_byte_does() {
    let tokenizer = &TOKENIZERS.iter().find(|named| named.name == "mistral").unwrap().tokenizer;
    let byte = |byte: &str| tokenizer.token_to_id(byte).unwrap();
    let llama = ["<0xF0>", "<0x9F>", "<0xA6>", "<0x99>"].map(byte);
    let mut decoder = IncrementalDecoder::new(tokenizer, &[1]);
    let pieces = llama.map(|id| decoder.push(id).unwrap());
    assert_eq!(pieces, ["", "", "", "🦙"]);
    assert_eq!(decoder.push(llama[0]).unwrap(), "");
    assert_eq!(decoder.finish().unwrap(), "\u{FFFD}", "what is broken is shown in the end");
    assert_eq!(decoder.finish().unwrap(), "", "once");
}

#[test]
fn special_tokens_show_nothing_and_change_nothing() {
    let tokenizer = &TOKENIZERS.iter().find(|named| named.name == "mistral").unwrap().tokenizer;
    let ids = tokenizer.encode("a word", false).unwrap();
    let mut decoder = IncrementalDecoder::new(tokenizer, &[1]);
    let mut text = String::new();
    for id in ids {
        text.push_str(&decoder.push(id).unwrap());
        assert_eq!(decoder.push(2).unwrap(), "");
    }
    assert_eq!(text, "a word");
}

#[test]
fn special_tokens_are_spelt_out_when_asked() {
    let tokenizer = &TOKENIZERS.iter().find(|named| named.name == "mistral").unwrap().tokenizer;
    let ids = tokenizer.encode("a word", false).unwrap();
    let mut decoder = IncrementalDecoder::with_special(tokenizer, &ids);
    assert_eq!(decoder.push(2).unwrap(), "</s>");
    assert_eq!(decoder.push(ids[0]).unwrap().trim_start(), "a");
}

#[test]
fn endless_broken_bytes_are_shown_and_do_not_pile_up() {
    let tokenizer = &TOKENIZERS.iter().find(|named| named.name == "mistral").unwrap().tokenizer;
    let byte = tokenizer.token_to_id("<0xFF>").unwrap();
    let mut decoder = IncrementalDecoder::new(tokenizer, &[1]);
    let shown: usize = (0..256).map(|_| decoder.push(byte).unwrap().chars().count()).sum();
    assert_eq!(shown, 256);
}
