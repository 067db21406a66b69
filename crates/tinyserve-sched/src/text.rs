//! The text of a request while it grows.

use tinyserve_model::{IncrementalDecoder, ModelError, StopMatcher, Tokenizer};

use crate::Request;

/// Tokens in, text out; finds stop texts across token borders.
#[derive(Debug, Clone)]
pub(crate) struct TextStream {
    decoder: Option<IncrementalDecoder>,
    stops: StopMatcher,
}

impl TextStream {
    pub(crate) fn new(tokenizer: Option<&Tokenizer>, request: &Request) -> Self {
        let decoder = if request.skip_special_tokens {
            IncrementalDecoder::new
        } else {
            IncrementalDecoder::with_special
        };
        Self {
            decoder: tokenizer.map(|tokenizer| decoder(tokenizer, &request.prompt)),
            stops: StopMatcher::new(&request.stop).showing(request.include_stop),
        }
    }

    /// Takes a token; returns the text that is complete with it. `may_stop` is whether stop texts
    /// count already.
    pub(crate) fn push(&mut self, id: u32, may_stop: bool) -> Result<String, ModelError> {
        let Some(decoder) = &mut self.decoder else { return Ok(String::new()) };
        let text = decoder.push(id)?;
        Ok(if may_stop { self.stops.push(&text).0 } else { text })
    }

    /// The stop text that was found.
    pub(crate) fn stopped(&self) -> Option<&str> {
        self.stops.found()
    }

    /// What was held back.
    pub(crate) fn finish(&mut self) -> Result<String, ModelError> {
        let (None, Some(decoder)) = (self.stops.found(), &mut self.decoder) else {
            return Ok(String::new());
        };
        let (mut text, _) = self.stops.push(&decoder.finish()?);
        if self.stops.found().is_none() {
            text.push_str(&self.stops.finish());
        }
        Ok(text)
    }
}
