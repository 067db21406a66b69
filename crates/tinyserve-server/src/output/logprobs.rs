//! Log-probabilities in the two forms that clients know.

use serde::Serialize;
use serde::ser::{SerializeMap, Serializer};
use tinyserve::model::Tokenizer;

use super::ScoredToken;

/// What is written for a probability of zero, as vLLM does: JSON has no infinity.
const LEAST: f32 = -9999.0;

/// How tokens are spelt in answers.
#[derive(Debug, Clone)]
pub(crate) struct TokenTexts(pub(crate) Option<Tokenizer>);

impl TokenTexts {
    fn bytes(&self, id: u32) -> Vec<u8> {
        match &self.0 {
            Some(tokenizer) => tokenizer.token_bytes(id),
            None => format!("token_id:{id}").into_bytes(),
        }
    }

    /// Characters that a token adds to a text; the `first` of a text may lose the space before it.
    fn width(&self, id: u32, bytes: &[u8], first: bool) -> usize {
        match &self.0 {
            Some(tokenizer) if tokenizer.is_special(id) => 0,
            Some(tokenizer) if first => {
                tokenizer.decode(&[id], true).map_or(characters(bytes), |text| text.chars().count())
            }
            _ => characters(bytes),
        }
    }

    /// Text, or `bytes:\x…` where a token is part of a character.
    pub(crate) fn text(&self, id: u32) -> String {
        text(self.bytes(id))
    }
}

fn text(bytes: Vec<u8>) -> String {
    String::from_utf8(bytes).unwrap_or_else(|error| {
        let hex = error.as_bytes().iter().map(|byte| format!("\\x{byte:02x}"));
        format!("bytes:{}", hex.collect::<String>())
    })
}

/// Characters that begin in `bytes`.
fn characters(bytes: &[u8]) -> usize {
    bytes.iter().filter(|byte| (*byte & 0xC0) != 0x80).count()
}

/// Completions: four lists side by side.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
pub(crate) struct CompletionLogprobs {
    text_offset: Vec<usize>,
    token_logprobs: Vec<Option<f32>>,
    tokens: Vec<String>,
    top_logprobs: Vec<Option<Alternatives>>,
    #[serde(skip)]
    offset: usize,
    /// Whether the next token is the first of a text.
    #[serde(skip)]
    first: bool,
}

impl CompletionLogprobs {
    /// An empty list that begins with a text.
    pub(crate) fn of_a_text() -> Self {
        Self { first: true, ..Self::default() }
    }

    /// An empty list whose first token begins where `other` ends.
    pub(crate) fn following(other: &Self) -> Self {
        Self { offset: other.offset, first: other.first, ..Self::default() }
    }

    pub(crate) fn push(&mut self, token: &ScoredToken, texts: &TokenTexts) {
        let bytes = texts.bytes(token.id);
        self.text_offset.push(self.offset);
        let width = texts.width(token.id, &bytes, self.first);
        self.offset += width;
        self.first &= width == 0;
        let text = text(bytes);
        let logprob = token.logprob.map(|logprob| logprob.max(LEAST));
        self.top_logprobs.push(logprob.map(|logprob| {
            let mut alternatives = Alternatives(Vec::with_capacity(token.top.len() + 1));
            for &(id, logprob) in &token.top {
                let text = if id == token.id { text.clone() } else { texts.text(id) };
                alternatives.insert(text, logprob.max(LEAST), false);
            }
            // The chosen token is always among them, with the very value that it is told with.
            alternatives.insert(text.clone(), logprob, true);
            alternatives
        }));
        self.token_logprobs.push(logprob);
        self.tokens.push(text);
    }
}

/// Tokens and their log-probabilities, best first: an object in JSON.
#[derive(Debug, Clone, PartialEq)]
struct Alternatives(Vec<(String, f32)>);

impl Alternatives {
    /// Two tokens that are spelt the same share a key: the likelier one keeps it, or the chosen.
    fn insert(&mut self, text: String, logprob: f32, chosen: bool) {
        match self.0.iter_mut().find(|(known, _)| *known == text) {
            Some((_, known)) if chosen => *known = logprob,
            Some(_) => {}
            None => self.0.push((text, logprob)),
        }
    }
}

impl Serialize for Alternatives {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut map = serializer.serialize_map(Some(self.0.len()))?;
        for (text, logprob) in &self.0 {
            map.serialize_entry(text, logprob)?;
        }
        map.end()
    }
}

/// Chat: one object for each token.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
pub(crate) struct ChatLogprobs {
    content: Vec<ChatToken>,
    refusal: (),
}

#[derive(Debug, Clone, PartialEq, Serialize)]
struct ChatToken {
    #[serde(flatten)]
    chosen: Alternative,
    top_logprobs: Vec<Alternative>,
}

#[derive(Debug, Clone, PartialEq, Serialize)]
struct Alternative {
    token: String,
    logprob: f32,
    bytes: Vec<u8>,
}

impl ChatLogprobs {
    /// Adds a token with `most` alternatives.
    pub(crate) fn push(&mut self, token: &ScoredToken, most: usize, texts: &TokenTexts) {
        let alternative = |id: u32, logprob: f32| {
            let bytes = texts.bytes(id);
            Alternative { token: text(bytes.clone()), logprob: logprob.max(LEAST), bytes }
        };
        let top = token.top.iter().take(most);
        self.content.push(ChatToken {
            chosen: alternative(token.id, token.logprob.unwrap_or(LEAST)),
            top_logprobs: top.map(|&(id, logprob)| alternative(id, logprob)).collect(),
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn scored(id: u32, logprob: Option<f32>, top: &[(u32, f32)]) -> ScoredToken {
        ScoredToken { id, logprob, top: top.to_vec() }
    }

    #[test]
    fn the_chosen_token_is_among_the_alternatives_with_its_own_value() {
        let texts = TokenTexts(None);
        let mut logprobs = CompletionLogprobs::default();
        logprobs.push(&scored(1, None, &[]), &texts);
        logprobs.push(&scored(2, Some(-0.1), &[(2, -0.1)]), &texts);
        logprobs.push(&scored(3, Some(-7.25), &[(2, -0.1)]), &texts);
        let json = serde_json::to_value(&logprobs).unwrap();
        assert_eq!(json["token_logprobs"][0], serde_json::Value::Null);
        assert_eq!(json["top_logprobs"][0], serde_json::Value::Null);
        assert_eq!(json["top_logprobs"][1]["token_id:2"], json["token_logprobs"][1]);
        assert_eq!(json["top_logprobs"][2]["token_id:3"], json["token_logprobs"][2]);
        assert_eq!(json["top_logprobs"][2].as_object().unwrap().len(), 2);
        assert_eq!(json["text_offset"], serde_json::json!([0, 10, 20]));
    }

    #[test]
    fn parts_of_characters_are_spelt_as_bytes() {
        assert_eq!(text(vec![0xE2, 0x98]), r"bytes:\xe2\x98");
        assert_eq!(text("é".into()), "é");
        assert_eq!(characters("aé日".as_bytes()), 3);
        assert_eq!(characters(&"日".as_bytes()[1..]), 0);
    }

    #[test]
    fn nothing_is_written_that_json_cannot_hold() {
        let mut chat = ChatLogprobs::default();
        chat.push(
            &scored(1, Some(f32::NEG_INFINITY), &[(1, f32::NEG_INFINITY)]),
            5,
            &TokenTexts(None),
        );
        let json = serde_json::to_value(&chat).unwrap();
        assert_eq!(json["content"][0]["logprob"], -9999.0);
        assert_eq!(json["content"][0]["top_logprobs"][0]["logprob"], -9999.0);
    }
}
