//! GPT-2's tokenizer from the files that were there before `tokenizer.json`.

use std::collections::{BTreeMap, HashMap};

use serde_json::Value;
use tokenizers::models::bpe::{BPE, Vocab};
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::{AddedToken, Tokenizer};

use super::token_text;
use crate::ModelError;
use crate::files::Files;
use crate::json::Fields;

/// GPT-2's only special token, which `vocab.json` cannot mark as special.
const END_OF_TEXT: &str = "<|endoftext|>";
/// The fields of `tokenizer_config.json` that name a special token.
const SPECIAL: [&str; 4] = ["bos_token", "eos_token", "unk_token", "pad_token"];

/// What stands beside `vocab.json` and `merges.txt`.
#[derive(Debug)]
pub(super) struct Extras {
    /// Whether a text begins as if a space came before it.
    prefix_space: bool,
    /// Tokens that are no text, where the vocabulary has them.
    special: Vec<String>,
    /// Tokens that were added to the vocabulary, by id, and the file that says so.
    added: BTreeMap<u32, String>,
    added_file: String,
}

impl Default for Extras {
    fn default() -> Self {
        Self {
            prefix_space: false,
            special: vec![END_OF_TEXT.to_owned()],
            added: BTreeMap::new(),
            added_file: String::new(),
        }
    }
}

impl Extras {
    /// Reads `tokenizer_config.json` and `added_tokens.json`, which both may be missing.
    pub(super) fn read(files: &Files) -> Result<Self, ModelError> {
        let mut extras = Self::default();
        let name = "tokenizer_config.json";
        if let Some(json) = files.read(name)? {
            let fields = Fields::parse(&files.path(name), &json)?;
            extras.prefix_space = fields.flag("add_prefix_space", false)?;
            for field in SPECIAL {
                extras.special.extend(token_text(&fields, field)?);
            }
            let field = "additional_special_tokens";
            for token in fields.get(field).and_then(Value::as_array).into_iter().flatten() {
                let text = token.as_str().or_else(|| token["content"].as_str());
                let text = text.ok_or_else(|| fields.error(field, "a list of tokens"))?;
                extras.special.push(text.to_owned());
            }
        }
        let name = "added_tokens.json";
        if let Some(json) = files.read(name)? {
            extras.added_file = files.path(name);
            let fields = Fields::parse(&extras.added_file, &json)?;
            for (token, id) in fields.iter() {
                let id = id.as_u64().and_then(|id| u32::try_from(id).ok());
                let id = id.ok_or_else(|| fields.error(token, "a token id"))?;
                extras.added.insert(id, token.to_owned());
            }
        }
        Ok(extras)
    }
}

/// The tokenizer of a vocabulary and its merges, each a name and its content.
pub(super) fn build(
    (vocab_file, vocab): (&str, &[u8]),
    (merges_file, merges): (&str, &[u8]),
    extras: &Extras,
) -> Result<Tokenizer, ModelError> {
    let vocab: HashMap<String, u32> = serde_json::from_slice(vocab).map_err(|error| {
        broken(vocab_file, &error.to_string(), "an object of tokens and their ids")
    })?;
    let merges = parse_merges(merges_file, merges, &vocab)?;
    let has = |token: &String| vocab.contains_key(token);
    let special: Vec<_> = extras.special.iter().filter(|token| has(token)).cloned().collect();
    let vocab: Vocab = vocab.into_iter().collect();
    let unusable = |error: tokenizers::Error| super::unusable(merges_file, &error);
    let bpe = BPE::builder().vocab_and_merges(vocab, merges).build().map_err(unusable)?;
    let mut tokenizer = Tokenizer::new(bpe);
    tokenizer.with_pre_tokenizer(Some(ByteLevel::new(extras.prefix_space, true, true)));
    tokenizer.with_decoder(Some(ByteLevel::default()));
    tokenizer.with_post_processor(Some(ByteLevel::new(true, false, true)));
    let special = special.into_iter().map(|token| AddedToken::from(token, true));
    // In the order of their ids, because each gets the next one that is free.
    let added = extras.added.values();
    let added = added.map(|text| AddedToken::from(text.clone(), extras.special.contains(text)));
    tokenizer.add_tokens(special.chain(added)).map_err(unusable)?;
    for (&id, text) in &extras.added {
        if tokenizer.token_to_id(text) != Some(id) {
            let found = format!("{id} for {text:?}");
            let expected = format!("the ids that follow those of {vocab_file} without a gap");
            return Err(broken(&extras.added_file, &found, &expected));
        }
    }
    Ok(tokenizer)
}

fn parse_merges(
    file: &str,
    merges: &[u8],
    vocab: &HashMap<String, u32>,
) -> Result<Vec<(String, String)>, ModelError> {
    let text = std::str::from_utf8(merges)
        .map_err(|error| broken(file, &error.to_string(), "UTF-8 text"))?;
    let mut pairs = Vec::new();
    for (number, line) in text.lines().enumerate() {
        // The first line is a version; an empty one ends the file.
        if line.starts_with("#version") || line.is_empty() {
            continue;
        }
        let wrong = |expected| {
            let found = format!("{line:?} in line {}", number + 1);
            Err(broken(file, &found, expected))
        };
        let Some((left, right)) = line.split_once(' ').filter(|(_, r)| !r.contains(' ')) else {
            return wrong("two tokens with a space between");
        };
        // The library joins the two in a buffer as long as its longest token, and panics.
        if !vocab.contains_key(&[left, right].concat()) {
            return wrong("two tokens that make one of vocab.json: the files belong together");
        }
        pairs.push((left.to_owned(), right.to_owned()));
    }
    Ok(pairs)
}

fn broken(file: &str, found: &str, expected: &str) -> ModelError {
    ModelError::NoTokenizer { message: format!("{file}: found {found}, expected {expected}") }
}
