//! Text that grows token by token.

use crate::{ModelError, Tokenizer};

/// Prompt tokens that are enough, nearly always, to know how the first new token is written.
const CONTEXT: usize = 6;
/// Tokens after which text that is still no UTF-8 is shown as it is: a character ends long before.
const MOST_HELD: usize = 64;
/// What decoders write for bytes that are not UTF-8, or not yet.
const REPLACEMENT: char = '\u{FFFD}';

/// Decodes a sequence token by token, each time in the light of the few tokens before.
///
/// A token's text depends on its neighbours: a first word loses its leading space, and a character
/// may lie in several tokens. What is no complete character yet is held back, so the pieces
/// together are the text that decoding all tokens at once gives. (One exception: where byte tokens
/// turn out to be no UTF-8, decoding at once takes back complete characters right before them;
/// text that was shown stays.)
#[derive(Debug, Clone)]
pub struct IncrementalDecoder {
    tokenizer: Tokenizer,
    /// Tokens whose text is shown already.
    context: Vec<u32>,
    context_text: String,
    /// Tokens whose text is not shown yet.
    held: Vec<u32>,
}

impl IncrementalDecoder {
    /// A decoder for what follows `prompt`.
    #[must_use]
    pub fn new(tokenizer: &Tokenizer, prompt: &[u32]) -> Self {
        let tokenizer = tokenizer.clone();
        let text: Vec<_> = prompt.iter().copied().filter(|&id| is_text(&tokenizer, id)).collect();
        let mut length = CONTEXT;
        loop {
            let context = &text[text.len().saturating_sub(length)..];
            // A decoder that fails here fails again, and is heard, at the first token.
            let context_text = tokenizer.decode(context, true).unwrap_or_default();
            // A window that starts inside a character or decodes to nothing shows too little.
            let unclear = context_text.is_empty() || context_text.contains(REPLACEMENT);
            if context.len() == text.len() || !unclear {
                let context = context.to_vec();
                return Self { tokenizer, context, context_text, held: Vec::new() };
            }
            length *= 2;
        }
    }

    /// Takes the next token; returns the text that is complete with it, often none.
    ///
    /// # Errors
    /// When the tokenizer's decoder fails.
    pub fn push(&mut self, id: u32) -> Result<String, ModelError> {
        if !is_text(&self.tokenizer, id) {
            return Ok(String::new());
        }
        self.held.push(id);
        let text = self.held_text()?;
        let incomplete = text.is_empty() || text.ends_with(REPLACEMENT);
        if incomplete && self.held.len() < MOST_HELD {
            return Ok(String::new());
        }
        self.context = std::mem::take(&mut self.held);
        self.context_text = self.tokenizer.decode(&self.context, true)?;
        Ok(text)
    }

    /// The text that was still held back: the sequence ends here.
    ///
    /// # Errors
    /// When the tokenizer's decoder fails.
    pub fn finish(&mut self) -> Result<String, ModelError> {
        if self.held.is_empty() {
            return Ok(String::new());
        }
        let text = self.held_text()?;
        self.context = std::mem::take(&mut self.held);
        self.context_text = self.tokenizer.decode(&self.context, true)?;
        Ok(text)
    }

    /// What the held tokens add to the text of the context.
    fn held_text(&self) -> Result<String, ModelError> {
        let all = [self.context.as_slice(), &self.held].concat();
        let text = self.tokenizer.decode(&all, true)?;
        // The held tokens may complete a character that the context ends with.
        let complete = self.context_text.trim_end_matches(REPLACEMENT);
        let added = text.strip_prefix(&self.context_text).or_else(|| text.strip_prefix(complete));
        match added {
            Some(added) => Ok(added.to_owned()),
            // They changed text that is shown already: they stand alone.
            None => self.tokenizer.decode(&self.held, true),
        }
    }
}

/// Whether a token adds to the text at all.
fn is_text(tokenizer: &Tokenizer, id: u32) -> bool {
    !tokenizer.is_special(id)
}
