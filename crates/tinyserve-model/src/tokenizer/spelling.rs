//! How single tokens are spelt: the bytes that each one stands for.

use std::collections::HashMap;

/// How a vocabulary writes bytes that are no plain text.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Spelling {
    /// GPT-2's: every byte is a visible character.
    ByteLevel,
    /// SentencePiece's: `▁` is a space, `<0x0A>` a byte.
    SentencePiece,
    /// As it is.
    Plain,
}

impl Spelling {
    /// The spelling that `tokenizer`'s decoder undoes.
    pub(super) fn of(tokenizer: &tokenizers::Tokenizer) -> Self {
        let decoder = tokenizer.get_decoder().and_then(|d| serde_json::to_value(d).ok());
        match decoder.map(|decoder| decoder.to_string()) {
            Some(json) if json.contains("\"ByteLevel\"") => Self::ByteLevel,
            Some(json) if json.contains('▁') || json.contains("\"ByteFallback\"") => {
                Self::SentencePiece
            }
            _ => Self::Plain,
        }
    }

    /// The bytes of a token that is spelt `token`.
    pub(super) fn bytes(self, token: &str) -> Vec<u8> {
        match self {
            Self::Plain => token.as_bytes().to_vec(),
            Self::SentencePiece => match byte(token) {
                Some(byte) => vec![byte],
                None => token.replace('▁', " ").into_bytes(),
            },
            Self::ByteLevel => {
                let bytes: Option<Vec<u8>> = token.chars().map(byte_of_char).collect();
                bytes.unwrap_or_else(|| token.as_bytes().to_vec())
            }
        }
    }
}

/// The byte that `<0x0A>` stands for.
fn byte(token: &str) -> Option<u8> {
    let hex = token.strip_prefix("<0x")?.strip_suffix('>')?;
    (hex.len() == 2).then(|| u8::from_str_radix(hex, 16).ok()).flatten()
}

/// The byte that GPT-2 shows as `c`: visible Latin-1 characters stand for themselves, and the
/// others, in order, for the characters from U+0100 on.
fn byte_of_char(c: char) -> Option<u8> {
    let visible = |byte: u8| matches!(byte, 33..=126 | 161..=172 | 174..=255);
    match u32::from(c) {
        code @ 0..=255 => u8::try_from(code).ok().filter(|&byte| visible(byte)),
        code => (0..=255).filter(|&byte| !visible(byte)).nth(code as usize - 256),
    }
}

/// The texts of special tokens and of tokens that were added, which are spelt as they are.
pub(super) fn added(tokenizer: &tokenizers::Tokenizer) -> HashMap<u32, String> {
    let added = tokenizer.get_added_tokens_decoder();
    added.into_iter().map(|(id, token)| (id, token.content)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_come_back_from_both_spellings() {
        assert_eq!(Spelling::SentencePiece.bytes("▁the"), b" the");
        assert_eq!(Spelling::SentencePiece.bytes("<0x0A>"), b"\n");
        assert_eq!(Spelling::SentencePiece.bytes("<0xZZ>"), b"<0xZZ>");
        assert_eq!(Spelling::ByteLevel.bytes("Ġthe"), b" the");
        assert_eq!(Spelling::ByteLevel.bytes("Ċ"), b"\n");
        assert_eq!(Spelling::ByteLevel.bytes("Ã©"), "é".as_bytes());
        assert_eq!(Spelling::Plain.bytes("▁a"), "▁a".as_bytes());
    }

    #[test]
    fn every_byte_has_one_character() {
        let mut bytes: Vec<u8> =
            (0..0x200).filter_map(char::from_u32).filter_map(byte_of_char).collect();
        bytes.sort_unstable();
        assert_eq!(bytes, (0..=255).collect::<Vec<u8>>());
    }
}
