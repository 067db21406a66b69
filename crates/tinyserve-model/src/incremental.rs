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
    /// Whether special tokens add nothing to the text.
    skip_special: bool,
    /// Tokens whose text is shown already.
    context: Vec<u32>,
    context_text: String,
    /// Tokens whose text is not shown yet.
    held: Vec<u32>,
}

impl IncrementalDecoder {
    /// A decoder for what follows `prompt`, in whose text special tokens are left out.
    #[must_use]
    pub fn new(tokenizer: &Tokenizer, prompt: &[u32]) -> Self {
        Self::after(tokenizer, prompt, true)
    }

    /// A decoder for what follows `prompt`, in whose text special tokens are spelt out.
    #[must_use]
    pub fn with_special(tokenizer: &Tokenizer, prompt: &[u32]) -> Self {
        Self::after(tokenizer, prompt, false)
    }

    fn after(tokenizer: &Tokenizer, prompt: &[u32], skip_special: bool) -> Self {
        let tokenizer = tokenizer.clone();
        let is_text = |&id: &u32| !(skip_special && tokenizer.is_special(id));
        let text: Vec<_> = prompt.iter().copied().filter(is_text).collect();
        let mut length = CONTEXT;
        loop {
            let context = &text[text.len().saturating_sub(length)..];
            // A decoder that fails here fails again, and is heard, at the first token.
            let context_text = tokenizer.decode(context, skip_special).unwrap_or_default();
            // A window that starts inside a character or decodes to nothing shows too little.
            let unclear = context_text.is_empty() || context_text.contains(REPLACEMENT);
            if context.len() == text.len() || !unclear {
                let context = context.to_vec();
                return Self { tokenizer, skip_special, context, context_text, held: Vec::new() };
            }
            length *= 2;
        }
    }

    /// Takes the next token; returns the text that is complete with it, often none.
    ///
    /// # Errors
    /// When the tokenizer's decoder fails.
    pub fn push(&mut self, id: u32) -> Result<String, ModelError> {
        if self.skip_special && self.tokenizer.is_special(id) {
            return Ok(String::new());
        }
        self.held.push(id);
        let text = self.held_text()?;
        let incomplete = text.is_empty() || text.ends_with(REPLACEMENT);
        if incomplete && self.held.len() < MOST_HELD {
            return Ok(String::new());
        }
        self.context = std::mem::take(&mut self.held);
        self.context_text = self.tokenizer.decode(&self.context, self.skip_special)?;
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
        self.context_text = self.tokenizer.decode(&self.context, self.skip_special)?;
        Ok(text)
    }

    /// What the held tokens add to the text of the context.
    fn held_text(&self) -> Result<String, ModelError> {
        let all = [self.context.as_slice(), &self.held].concat();
        let text = self.tokenizer.decode(&all, self.skip_special)?;
        // The held tokens may complete a character that the context ends with.
        let complete = self.context_text.trim_end_matches(REPLACEMENT);
        let added = text.strip_prefix(&self.context_text).or_else(|| text.strip_prefix(complete));
        match added {
            Some(added) => Ok(added.to_owned()),
            // They changed text that is shown already: they stand alone.
            None => self.tokenizer.decode(&self.held, self.skip_special),
        }
    }
}
