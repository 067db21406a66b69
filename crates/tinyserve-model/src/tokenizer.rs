//! Text to token ids and back.

use std::collections::{HashMap, HashSet};
use std::fmt;
use std::sync::Arc;

use tokenizers::models::bpe::{BPE, Vocab};
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::{AddedToken, PaddingParams};

use crate::ModelError;
use crate::files::Files;

/// GPT-2's only special token, which `vocab.json` cannot mark as special.
const END_OF_TEXT: &str = "<|endoftext|>";

/// A checkpoint's tokenizer. Cloning shares it.
#[derive(Clone)]
pub struct Tokenizer(Arc<Inner>);

struct Inner {
    tokenizer: tokenizers::Tokenizer,
    special: HashSet<u32>,
}

impl Tokenizer {
    /// The tokenizer of `model`: a folder, whose other files are not looked at, or the name of a
    /// built-in model.
    ///
    /// # Errors
    /// When there is no such folder or built-in model, and [`ModelError::NoTokenizer`] when it has
    /// no tokenizer or one that cannot be used.
    pub fn load(model: &str) -> Result<Self, ModelError> {
        Self::from_files(&Files::locate(model)?)
    }

    /// Reads `tokenizer.json`, or else `vocab.json` and `merges.txt`.
    pub(crate) fn from_files(files: &Files) -> Result<Self, ModelError> {
        if let Some(json) = files.read("tokenizer.json")? {
            return Self::from_json(&files.path("tokenizer.json"), &json);
        }
        match (files.read("vocab.json")?, files.read("merges.txt")?) {
            (Some(vocab), Some(merges)) => Self::byte_level_bpe(
                (&files.path("vocab.json"), &vocab),
                (&files.path("merges.txt"), &merges),
            ),
            (vocab, _) => Err(ModelError::NoTokenizer {
                message: format!(
                    "{} has no tokenizer.json and no {}, expected tokenizer.json or vocab.json \
                     with merges.txt",
                    files.place(),
                    if vocab.is_some() { "merges.txt beside vocab.json" } else { "vocab.json" },
                ),
            }),
        }
    }

    /// Parses `json`, the content of `file`, in the format of the `tokenizers` library.
    ///
    /// # Errors
    /// [`ModelError::NoTokenizer`] when it is broken or uses what the library does not know.
    pub fn from_json(file: &str, json: &[u8]) -> Result<Self, ModelError> {
        let tokenizer = tokenizers::Tokenizer::from_bytes(json);
        Self::wrap(file, tokenizer)
    }

    /// GPT-2's tokenizer from `vocab.json` and `merges.txt`, each a name and its content.
    ///
    /// # Errors
    /// [`ModelError::NoTokenizer`] when one of them is broken or they do not fit each other.
    pub fn byte_level_bpe(
        (vocab_file, vocab): (&str, &[u8]),
        (merges_file, merges): (&str, &[u8]),
    ) -> Result<Self, ModelError> {
        let broken = |file: &str, found: String, expected: &str| ModelError::NoTokenizer {
            message: format!("{file}: found {found}, expected {expected}"),
        };
        let vocab: HashMap<String, u32> = serde_json::from_slice(vocab).map_err(|error| {
            broken(vocab_file, error.to_string(), "an object of tokens and their ids")
        })?;
        let text = std::str::from_utf8(merges)
            .map_err(|error| broken(merges_file, error.to_string(), "UTF-8 text"))?;
        let mut pairs = Vec::new();
        for (number, line) in text.lines().enumerate() {
            // The first line is a version; an empty one ends the file.
            if line.starts_with("#version") || line.is_empty() {
                continue;
            }
            let Some((left, right)) = line.split_once(' ').filter(|(_, r)| !r.contains(' ')) else {
                let found = format!("{line:?} in line {}", number + 1);
                return Err(broken(merges_file, found, "two tokens with a space between"));
            };
            pairs.push((left.to_owned(), right.to_owned()));
        }
        let has_end = vocab.contains_key(END_OF_TEXT);
        let vocab: Vocab = vocab.into_iter().collect();
        let bpe = BPE::builder().vocab_and_merges(vocab, pairs).build();
        let tokenizer = bpe.map(|bpe| {
            let mut tokenizer = tokenizers::Tokenizer::new(bpe);
            tokenizer.with_pre_tokenizer(Some(ByteLevel::new(false, true, true)));
            tokenizer.with_decoder(Some(ByteLevel::default()));
            tokenizer.with_post_processor(Some(ByteLevel::new(true, false, true)));
            tokenizer
        });
        let tokenizer = tokenizer.and_then(|mut tokenizer| {
            if has_end {
                tokenizer.add_special_tokens([AddedToken::from(END_OF_TEXT, true)])?;
            }
            Ok(tokenizer)
        });
        Self::wrap(merges_file, tokenizer)
    }

    fn wrap(
        file: &str,
        tokenizer: tokenizers::Result<tokenizers::Tokenizer>,
    ) -> Result<Self, ModelError> {
        let broken = |error: tokenizers::Error| ModelError::NoTokenizer {
            message: format!("{file} is no tokenizer that can be used: {error}"),
        };
        let mut tokenizer = tokenizer.map_err(broken)?;
        // Left over from training in many files; a prompt is never cut or filled up in silence.
        tokenizer.with_truncation(None).map_err(broken)?;
        tokenizer.with_padding(None::<PaddingParams>);
        let special = tokenizer.get_added_tokens_decoder();
        let special = special.into_iter().filter(|(_, token)| token.special);
        let special = special.map(|(id, _)| id).collect();
        Ok(Self(Arc::new(Inner { tokenizer, special })))
    }

    /// The ids of `text`; `add_special` puts the tokens around it that the model expects.
    ///
    /// # Errors
    /// When the text has a part that no token covers.
    pub fn encode(&self, text: &str, add_special: bool) -> Result<Vec<u32>, ModelError> {
        let encoding = self.0.tokenizer.encode_fast(text, add_special);
        let encoding = encoding.map_err(|error| failed("encode the text", &error))?;
        Ok(encoding.get_ids().to_vec())
    }

    /// The text of `ids`; `skip_special` leaves special tokens out.
    ///
    /// Bytes that are not UTF-8 become U+FFFD, and ids without a token become nothing.
    ///
    /// # Errors
    /// When the tokenizer's decoder fails.
    pub fn decode(&self, ids: &[u32], skip_special: bool) -> Result<String, ModelError> {
        let text = self.0.tokenizer.decode(ids, skip_special);
        text.map_err(|error| failed("decode the tokens", &error))
    }

    /// Number of tokens, special ones included.
    #[must_use]
    pub fn vocab_size(&self) -> usize {
        self.0.tokenizer.get_vocab_size(true)
    }

    /// The id of the token that is spelt `token`.
    #[must_use]
    pub fn token_to_id(&self, token: &str) -> Option<u32> {
        self.0.tokenizer.token_to_id(token)
    }

    /// How the token `id` is spelt.
    #[must_use]
    pub fn id_to_token(&self, id: u32) -> Option<String> {
        self.0.tokenizer.id_to_token(id)
    }

    /// Whether the token `id` steers the model and is no text.
    #[must_use]
    pub fn is_special(&self, id: u32) -> bool {
        self.0.special.contains(&id)
    }
}

impl fmt::Debug for Tokenizer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Tokenizer({} tokens)", self.vocab_size())
    }
}

fn failed(doing: &'static str, error: &tokenizers::Error) -> ModelError {
    ModelError::Tokenize { doing, reason: error.to_string() }
}
