//! Answers of `/v1/completions`.

use std::borrow::Cow;

use serde::Serialize;

use super::logprobs::CompletionLogprobs;
use super::{
    ChoiceEvent, Ending, Form, Header, Object, Output, ScoredToken, StopReason, TokenTexts, Usage,
    write_event,
};

/// A growing answer.
#[derive(Debug)]
pub(crate) struct CompletionOutput {
    header: Header,
    texts: TokenTexts,
    form: Form,
    /// Whether probabilities are told.
    logprobs: bool,
    choices: Vec<Choice>,
    /// Tokens of each prompt; every one is answered by as many choices.
    prompts: Vec<usize>,
}

#[derive(Debug, Default)]
struct Choice {
    /// The prompt that is repeated in front of the text.
    echo: Option<String>,
    prompt: Vec<u32>,
    text: String,
    tokens: Vec<u32>,
    completion_tokens: usize,
    cached_tokens: usize,
    logprobs: CompletionLogprobs,
    ending: Option<Ending>,
    /// Whether its first chunk was written.
    begun: bool,
}

#[derive(Serialize)]
struct ChoiceObject<'a> {
    index: usize,
    text: &'a str,
    logprobs: Option<&'a CompletionLogprobs>,
    finish_reason: Option<&'static str>,
    stop_reason: Option<&'a StopReason>,
    #[serde(skip_serializing_if = "Option::is_none")]
    token_ids: Option<&'a [u32]>,
    #[serde(skip_serializing_if = "Option::is_none")]
    prompt_token_ids: Option<&'a [u32]>,
    #[serde(skip_serializing_if = "Option::is_none")]
    tinyserve: Option<&'a serde_json::Value>,
}

impl CompletionOutput {
    /// An answer without choices.
    pub(crate) fn new(header: Header, texts: TokenTexts, form: Form, logprobs: bool) -> Self {
        Self { header, texts, form, logprobs, choices: Vec::new(), prompts: Vec::new() }
    }

    /// Adds a choice that answers `prompt`, and repeats it if there is an `echo`.
    pub(crate) fn add_choice(&mut self, prompt: &[u32], echo: Option<String>) {
        let prompt = if self.form.return_token_ids { prompt.to_vec() } else { Vec::new() };
        let logprobs = match &echo {
            Some(_) => CompletionLogprobs::of_a_text(),
            None => CompletionLogprobs::default(),
        };
        self.choices.push(Choice { echo, prompt, logprobs, ..Choice::default() });
    }

    /// Counts the tokens of a prompt, once for all choices that answer it.
    pub(crate) fn count_prompt(&mut self, tokens: usize) {
        self.prompts.push(tokens);
    }

    fn object<Choices>(&self, choices: Choices, usage: Option<Usage>) -> Object<'_, Choices> {
        self.header.object("text_completion", choices, usage)
    }

    /// Writes a chunk of choice `index`: text, and the tokens that it came with.
    fn chunk(
        &mut self,
        index: usize,
        text: &str,
        tokens: &[ScoredToken],
        end: Option<&Ending>,
        out: &mut Vec<u8>,
    ) {
        let choice = &mut self.choices[index];
        let first = !std::mem::replace(&mut choice.begun, true);
        let echo = if first { choice.echo.take() } else { None };
        let text = echo.map_or(Cow::Borrowed(text), |echo| Cow::Owned(echo + text));
        let mut logprobs = CompletionLogprobs::following(&choice.logprobs);
        if self.logprobs {
            tokens.iter().for_each(|token| logprobs.push(token, &self.texts));
        }
        let ids: Vec<u32> = match self.form.return_token_ids {
            true => tokens.iter().map(|token| token.id).collect(),
            false => Vec::new(),
        };
        let choice = &self.choices[index];
        let object = ChoiceObject {
            index,
            text: &text,
            logprobs: self.logprobs.then_some(&logprobs),
            finish_reason: end.map(|end| end.finish_reason),
            stop_reason: end.and_then(|end| end.stop_reason.as_ref()),
            token_ids: self.form.return_token_ids.then_some(&ids),
            prompt_token_ids: (self.form.return_token_ids && first).then_some(&choice.prompt),
            tinyserve: end.and_then(|end| end.detail.as_ref()),
        };
        let usage = self.form.continuous_usage.then(|| self.usage());
        write_event(&self.object([object], usage), out);
        // Of what was sent, only where the next token begins is still of use.
        self.choices[index].logprobs = CompletionLogprobs::following(&logprobs);
    }
}

impl Output for CompletionOutput {
    fn begin(&mut self, _: &mut Vec<u8>) {}

    fn event(&mut self, index: usize, event: ChoiceEvent, out: &mut Vec<u8>) {
        let logprobs = self.logprobs;
        let choice = &mut self.choices[index];
        let (text, tokens, end) = match event {
            ChoiceEvent::Prompt(tokens) => (String::new(), tokens, None),
            ChoiceEvent::Token { token, text } => {
                choice.completion_tokens += 1;
                if self.form.return_token_ids {
                    choice.tokens.push(token.id);
                }
                (text, vec![token], None)
            }
            ChoiceEvent::End(mut ending) => {
                choice.cached_tokens = ending.cached_tokens;
                (std::mem::take(&mut ending.text), Vec::new(), Some(ending))
            }
            ChoiceEvent::Failed(_) => return,
        };
        if self.form.streamed {
            let silent = text.is_empty() && end.is_none();
            // What carries nothing that a client could see is no chunk.
            if silent && !logprobs && !self.form.return_token_ids && choice.echo.is_none() {
                return;
            }
            self.chunk(index, &text, &tokens, end.as_ref(), out);
            return;
        }
        if let Some(echo) = choice.echo.take() {
            choice.text.push_str(&echo);
        }
        choice.text.push_str(&text);
        if logprobs {
            tokens.iter().for_each(|token| choice.logprobs.push(token, &self.texts));
        }
        choice.ending = end.or(choice.ending.take());
    }

    fn whole(self) -> String {
        let choices = self.choices.iter().enumerate().map(|(index, choice)| ChoiceObject {
            index,
            text: &choice.text,
            logprobs: self.logprobs.then_some(&choice.logprobs),
            finish_reason: choice.ending.as_ref().map(|end| end.finish_reason),
            stop_reason: choice.ending.as_ref().and_then(|end| end.stop_reason.as_ref()),
            token_ids: self.form.return_token_ids.then_some(&choice.tokens),
            prompt_token_ids: self.form.return_token_ids.then_some(&choice.prompt),
            tinyserve: choice.ending.as_ref().and_then(|end| end.detail.as_ref()),
        });
        let object = self.object(choices.collect::<Vec<_>>(), Some(self.usage()));
        serde_json::to_string(&object).unwrap_or_default()
    }

    fn usage(&self) -> Usage {
        let completion = self.choices.iter().map(|choice| choice.completion_tokens).sum();
        let choices_each = self.choices.len() / self.prompts.len().max(1);
        let answered = self.choices.chunks(choices_each.max(1));
        let cached = answered.map(|all| all.iter().map(|choice| choice.cached_tokens).max());
        Usage::new(self.prompts.iter().sum(), completion, cached.flatten().sum())
    }

    fn usage_chunk(&self, out: &mut Vec<u8>) {
        write_event(&self.object([(); 0], Some(self.usage())), out);
    }
}
