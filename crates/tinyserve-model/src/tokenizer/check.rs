//! What the `tokenizers` library answers with a panic and not with an error, found before it is
//! asked: files that were cut off or put together from two models do occur.

use std::fmt;

use serde::Deserialize;
use serde::de::{Deserializer, Error, IgnoredAny, MapAccess, SeqAccess, Visitor};
use serde_json::Value;

/// The parts of a `tokenizer.json` that need a look.
#[derive(Deserialize)]
struct Parts {
    /// Read whole: the library takes for granted that it is JSON.
    decoder: Option<Value>,
    post_processor: Option<Value>,
    model: Option<Model>,
}

#[derive(Deserialize)]
struct Model {
    vocab: Option<LongestToken>,
    merges: Option<LongestMerge>,
    continuing_subword_prefix: Option<String>,
}

/// Says what is wrong with the content of a `tokenizer.json`, if the library would not.
pub(super) fn check(json: &[u8]) -> Result<(), String> {
    let parts: Parts = serde_json::from_slice(json).map_err(|error| error.to_string())?;
    if let Some(decoder) = &parts.decoder {
        check_decoder(decoder)?;
    }
    if let Some(processor) = &parts.post_processor {
        check_template(processor)?;
    }
    match parts.model {
        Some(Model { vocab, merges: Some(LongestMerge(merge)), continuing_subword_prefix }) => {
            // The library cuts the prefix off whatever stands there.
            if let Some(prefix) = continuing_subword_prefix.filter(|prefix| !prefix.is_empty()) {
                return Err(format!(
                    "model.continuing_subword_prefix is {prefix:?}, expected none where there \
                     are merges"
                ));
            }
            // It joins each pair in a buffer that holds its longest token.
            let longest = vocab.map_or(0, |LongestToken(length)| length);
            if merge > longest {
                return Err(format!(
                    "model.merges makes a token of {merge} bytes, expected at most {longest}, \
                     the longest in model.vocab"
                ));
            }
            Ok(())
        }
        _ => Ok(()),
    }
}

/// Refuses to cut characters off the end of tokens: the library does not look whether they are
/// long enough.
fn check_decoder(decoder: &Value) -> Result<(), String> {
    if decoder["type"] == "Strip" && decoder["stop"].as_u64() != Some(0) {
        let found = &decoder["stop"];
        return Err(format!("decoder.stop of a Strip is {found}, expected 0"));
    }
    let inner = decoder["decoders"].as_array();
    inner.into_iter().flatten().try_for_each(check_decoder)
}

/// Refuses a template that names what is not there: the library looks when it builds one itself, and
/// not when it reads one.
fn check_template(processor: &Value) -> Result<(), String> {
    for piece in processor["single"].as_array().into_iter().flatten() {
        // A piece has one key; what is neither is the library's to refuse.
        if let Some(token) = piece.get("SpecialToken") {
            let id = token["id"].as_str();
            if id.is_none_or(|id| processor["special_tokens"].get(id).is_none()) {
                let found = &token["id"];
                return Err(format!(
                    "post_processor.single names the special token {found}, expected one of \
                     post_processor.special_tokens"
                ));
            }
        }
        if let Some(sequence) = piece.get("Sequence")
            && sequence["id"] != "A"
        {
            let found = &sequence["id"];
            return Err(format!("post_processor.single has the sequence {found}, expected \"A\""));
        }
    }
    let inner = processor["processors"].as_array();
    inner.into_iter().flatten().try_for_each(check_template)
}

/// Bytes of the longest token of a vocabulary; 0 where it is not an object of tokens.
struct LongestToken(usize);

impl<'de> Deserialize<'de> for LongestToken {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Tokens;
        impl<'de> Visitor<'de> for Tokens {
            type Value = LongestToken;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("tokens and their ids or scores")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<LongestToken, A::Error> {
                let mut longest = 0;
                while let Some((Length(length), IgnoredAny)) = map.next_entry()? {
                    longest = longest.max(length);
                }
                Ok(LongestToken(longest))
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<LongestToken, A::Error> {
                while seq.next_element::<IgnoredAny>()?.is_some() {}
                Ok(LongestToken(0))
            }
        }
        deserializer.deserialize_any(Tokens)
    }
}

/// Bytes of the longest token that a list of merges makes.
struct LongestMerge(usize);

impl<'de> Deserialize<'de> for LongestMerge {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let merges: Vec<Merge> = Vec::deserialize(deserializer)?;
        Ok(Self(merges.into_iter().map(|Merge(length)| length).max().unwrap_or(0)))
    }
}

/// Bytes of the token that one merge makes, in both spellings: `"a b"` and `["a", "b"]`.
struct Merge(usize);

impl<'de> Deserialize<'de> for Merge {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Pair;
        impl<'de> Visitor<'de> for Pair {
            type Value = Merge;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("two tokens")
            }

            fn visit_str<E: Error>(self, pair: &str) -> Result<Merge, E> {
                Ok(Merge(pair.len().saturating_sub(1)))
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Merge, A::Error> {
                let mut sum = 0;
                while let Some(Length(length)) = seq.next_element()? {
                    sum += length;
                }
                Ok(Merge(sum))
            }
        }
        deserializer.deserialize_any(Pair)
    }
}

/// Bytes of a text that nobody needs to keep.
struct Length(usize);

impl<'de> Deserialize<'de> for Length {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Text;
        impl Visitor<'_> for Text {
            type Value = Length;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a text")
            }

            fn visit_str<E: Error>(self, text: &str) -> Result<Length, E> {
                Ok(Length(text.len()))
            }
        }
        deserializer.deserialize_str(Text)
    }
}
