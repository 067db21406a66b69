//! Text to token ids and back.

mod byte_level;
mod check;
mod spelling;

use std::collections::{HashMap, HashSet};
use std::fmt;
use std::sync::Arc;

use byte_level::Extras;
use spelling::Spelling;
use tokenizers::PaddingParams;

use crate::ModelError;
use crate::files::Files;
use crate::json::Fields;

/// A checkpoint's tokenizer. Cloning shares it.
#[derive(Clone)]
pub struct Tokenizer(Arc<Inner>);

struct Inner {
    tokenizer: tokenizers::Tokenizer,
    special: HashSet<u32>,
    added: HashMap<u32, String>,
    spelling: Spelling,
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
            (Some(vocab), Some(merges)) => {
                let (vocab_file, merges_file) =
                    (files.path("vocab.json"), files.path("merges.txt"));
                let (vocab, merges) = ((&*vocab_file, &*vocab), (&*merges_file, &*merges));
                let tokenizer = byte_level::build(vocab, merges, &Extras::read(files)?)?;
                Self::wrap(&merges_file, tokenizer)
            }
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
        check::check(json).map_err(|reason| unusable(file, &reason))?;
        let tokenizer = tokenizers::Tokenizer::from_bytes(json);
        Self::wrap(file, tokenizer.map_err(|error| unusable(file, &error))?)
    }

    /// GPT-2's tokenizer from `vocab.json` and `merges.txt`, each a name and its content.
    ///
    /// # Errors
    /// [`ModelError::NoTokenizer`] when one of them is broken or they do not fit each other.
    pub fn byte_level_bpe(vocab: (&str, &[u8]), merges: (&str, &[u8])) -> Result<Self, ModelError> {
        Self::wrap(merges.0, byte_level::build(vocab, merges, &Extras::default())?)
    }

    fn wrap(file: &str, mut tokenizer: tokenizers::Tokenizer) -> Result<Self, ModelError> {
        // Left over from training in many files; a prompt is never cut or filled up in silence.
        tokenizer.with_truncation(None).map_err(|error| unusable(file, &error))?;
        tokenizer.with_padding(None::<PaddingParams>);
        let special = tokenizer.get_added_tokens_decoder();
        let special = special.into_iter().filter(|(_, token)| token.special);
        let special = special.map(|(id, _)| id).collect();
        let (added, spelling) = (spelling::added(&tokenizer), Spelling::of(&tokenizer));
        Ok(Self(Arc::new(Inner { tokenizer, special, added, spelling })))
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

    /// The bytes that the token `id` stands for inside a text, its leading space included; part of
    /// a character is not UTF-8. An id without a token stands for nothing.
    #[must_use]
    pub fn token_bytes(&self, id: u32) -> Vec<u8> {
        match self.0.added.get(&id) {
            Some(text) => text.as_bytes().to_vec(),
            None => {
                self.id_to_token(id).map_or_else(Vec::new, |token| self.0.spelling.bytes(&token))
            }
        }
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

fn unusable(file: &str, reason: &impl fmt::Display) -> ModelError {
    let message = format!("{file} is no tokenizer that can be used: {reason}");
    ModelError::NoTokenizer { message }
}

/// The token that a field of `tokenizer_config.json` names: a text, or the `content` of an object.
pub(crate) fn token_text(fields: &Fields, name: &str) -> Result<Option<String>, ModelError> {
    match fields.get(name) {
        Some(value) if value.is_object() => {
            let token = fields.object(name)?;
            let text = token.as_ref().map(|token| token.text("content")).transpose()?;
            Ok(text.flatten().map(str::to_owned))
        }
        _ => Ok(fields.text(name)?.map(str::to_owned)),
    }
}
