//! Answers of `/v1/chat/completions`.

use serde::Serialize;

use super::logprobs::ChatLogprobs;
use super::{
    ChoiceEvent, Ending, Form, Header, Object, Output, ScoredToken, StopReason, TokenTexts, Usage,
    write_event,
};

/// A growing answer.
#[derive(Debug)]
pub(crate) struct ChatOutput {
    header: Header,
    texts: TokenTexts,
    form: Form,
    /// How many alternatives are told with each token; `None` tells no probabilities.
    logprobs: Option<usize>,
    prompt: Vec<u32>,
    choices: Vec<Choice>,
}

#[derive(Debug, Default)]
struct Choice {
    text: String,
    tokens: Vec<u32>,
    completion_tokens: usize,
    cached_tokens: usize,
    logprobs: ChatLogprobs,
    ending: Option<Ending>,
}

#[derive(Serialize)]
struct ChoiceObject<'a> {
    index: usize,
    #[serde(skip_serializing_if = "Option::is_none")]
    message: Option<Message<'a>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    delta: Option<Delta<'a>>,
    logprobs: Option<&'a ChatLogprobs>,
    finish_reason: Option<&'static str>,
    stop_reason: Option<&'a StopReason>,
    #[serde(skip_serializing_if = "Option::is_none")]
    token_ids: Option<&'a [u32]>,
    #[serde(skip_serializing_if = "Option::is_none")]
    tinyserve: Option<&'a serde_json::Value>,
}

#[derive(Serialize)]
struct Message<'a> {
    role: &'static str,
    content: &'a str,
    refusal: (),
}

#[derive(Serialize, Default)]
struct Delta<'a> {
    #[serde(skip_serializing_if = "Option::is_none")]
    role: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    content: Option<&'a str>,
}

impl ChatOutput {
    /// An answer to a prompt with so many choices.
    pub(crate) fn new(
        header: Header,
        texts: TokenTexts,
        form: Form,
        logprobs: Option<usize>,
        (prompt, choices): (Vec<u32>, usize),
    ) -> Self {
        let choices = (0..choices).map(|_| Choice::default()).collect();
        Self { header, texts, form, logprobs, prompt, choices }
    }

    fn object<Choices>(&self, choices: Choices, usage: Option<Usage>) -> Object<'_, Choices> {
        let kind = if self.form.streamed { "chat.completion.chunk" } else { "chat.completion" };
        self.header.object(kind, choices, usage)
    }

    fn chunk(
        &self,
        index: usize,
        delta: Delta<'_>,
        tokens: &[ScoredToken],
        end: Option<&Ending>,
        out: &mut Vec<u8>,
    ) {
        let mut logprobs = ChatLogprobs::default();
        if let Some(most) = self.logprobs {
            tokens.iter().for_each(|token| logprobs.push(token, most, &self.texts));
        }
        let ids: Vec<u32> = match self.form.return_token_ids {
            true => tokens.iter().map(|token| token.id).collect(),
            false => Vec::new(),
        };
        let object = ChoiceObject {
            index,
            message: None,
            delta: Some(delta),
            logprobs: (self.logprobs.is_some() && !tokens.is_empty()).then_some(&logprobs),
            finish_reason: end.map(|end| end.finish_reason),
            stop_reason: end.and_then(|end| end.stop_reason.as_ref()),
            token_ids: (!ids.is_empty()).then_some(&ids),
            tinyserve: end.and_then(|end| end.detail.as_ref()),
        };
        let usage = self.form.continuous_usage.then(|| self.usage());
        write_event(&self.object([object], usage), out);
    }
}

impl Output for ChatOutput {
    fn begin(&mut self, out: &mut Vec<u8>) {
        for index in 0..self.choices.len() {
            let delta = Delta { role: Some("assistant"), content: Some("") };
            self.chunk(index, delta, &[], None, out);
        }
    }

    fn event(&mut self, index: usize, event: ChoiceEvent, out: &mut Vec<u8>) {
        let choice = &mut self.choices[index];
        match event {
            ChoiceEvent::Prompt(_) | ChoiceEvent::Failed(_) => {}
            ChoiceEvent::Token { token, text } => {
                choice.completion_tokens += 1;
                if self.form.streamed {
                    // What carries nothing that a client could see is no chunk.
                    if !text.is_empty() || self.logprobs.is_some() || self.form.return_token_ids {
                        let delta = Delta { content: Some(&text), ..Delta::default() };
                        self.chunk(index, delta, &[token], None, out);
                    }
                    return;
                }
                choice.text.push_str(&text);
                if let Some(most) = self.logprobs {
                    choice.logprobs.push(&token, most, &self.texts);
                }
                if self.form.return_token_ids {
                    choice.tokens.push(token.id);
                }
            }
            ChoiceEvent::End(ending) => {
                choice.cached_tokens = ending.cached_tokens;
                if self.form.streamed {
                    if !ending.text.is_empty() {
                        let delta = Delta { content: Some(&ending.text), ..Delta::default() };
                        self.chunk(index, delta, &[], None, out);
                    }
                    self.chunk(index, Delta::default(), &[], Some(&ending), out);
                    return;
                }
                choice.text.push_str(&ending.text);
                choice.ending = Some(ending);
            }
        }
    }

    fn whole(self) -> String {
        let choices = self.choices.iter().enumerate().map(|(index, choice)| ChoiceObject {
            index,
            message: Some(Message { role: "assistant", content: &choice.text, refusal: () }),
            delta: None,
            logprobs: self.logprobs.is_some().then_some(&choice.logprobs),
            finish_reason: choice.ending.as_ref().map(|end| end.finish_reason),
            stop_reason: choice.ending.as_ref().and_then(|end| end.stop_reason.as_ref()),
            token_ids: self.form.return_token_ids.then_some(&choice.tokens),
            tinyserve: choice.ending.as_ref().and_then(|end| end.detail.as_ref()),
        });
        let mut object = self.object(choices.collect::<Vec<_>>(), Some(self.usage()));
        object.prompt_token_ids = self.form.return_token_ids.then_some(&self.prompt);
        serde_json::to_string(&object).unwrap_or_default()
    }

    fn usage(&self) -> Usage {
        let completion = self.choices.iter().map(|choice| choice.completion_tokens).sum();
        let cached = self.choices.iter().map(|choice| choice.cached_tokens).max();
        Usage::new(self.prompt.len(), completion, cached.unwrap_or(0))
    }

    fn usage_chunk(&self, out: &mut Vec<u8>) {
        write_event(&self.object([(); 0], Some(self.usage())), out);
    }
}
