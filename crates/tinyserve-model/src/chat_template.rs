//! Chat templates: messages become the prompt that a model was trained on.
//!
//! Templates are Jinja as Hugging Face transformers renders them (`apply_chat_template`): blocks
//! trimmed, loop controls, Python's string methods, `raise_exception`, `strftime_now` and a
//! `tojson` that escapes no HTML.

mod functions;

use std::fmt;

use minijinja::value::Serde;
use minijinja::{Environment, ErrorKind, Value, context};
use serde::{Deserialize, Serialize};
use serde_json::Value as Json;

use crate::files::Files;
use crate::json::Fields;
use crate::tokenizer::token_text;
use crate::{ModelError, Tokenizer};

/// A value of the template language; it keeps the order of an object's keys.
pub type TemplateValue = Value;

/// An object whose keys keep their order.
pub type TemplateMap = indexmap::IndexMap<String, TemplateValue>;

/// A value of the template language that holds what `value` writes of itself.
#[must_use]
pub fn template_value(value: &impl Serialize) -> TemplateValue {
    Value::from(Serde(value))
}

/// Instructions that one rendering may run: enough for thousands of long messages, and an end for
/// a template that would not end.
const FUEL: u64 = 20_000_000;
/// Stands behind the final message to find where it ends; as transformers does.
const MARK: &str = "CONTINUE_FINAL_MESSAGE_TAG ";
/// Fields of `tokenizer_config.json` that templates refer to by name.
const SPECIAL_TOKENS: [&str; 7] =
    ["bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token"];
const DEFAULT: &str = "default";
const TOOL_USE: &str = "tool_use";

/// One message of a conversation.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ChatMessage {
    /// Who speaks: `system`, `user`, `assistant`, `tool`.
    pub role: String,
    /// What is said.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub content: Option<String>,
    /// Everything else that a template may look at, such as `name` or `tool_calls`.
    #[serde(flatten)]
    pub more: TemplateMap,
}

impl ChatMessage {
    /// A message with nothing but a role and a content.
    #[must_use]
    pub fn new(role: impl Into<String>, content: impl Into<String>) -> Self {
        Self { role: role.into(), content: Some(content.into()), more: TemplateMap::new() }
    }
}

/// What a template is rendered with.
#[derive(Debug, Clone, Copy, Default)]
pub struct ChatInput<'a> {
    /// The conversation; at least one message.
    pub messages: &'a [ChatMessage],
    /// Descriptions of tools.
    pub tools: Option<&'a TemplateValue>,
    /// Whether the prompt ends with the beginning of the assistant's answer.
    pub add_generation_prompt: bool,
    /// Whether the prompt ends inside the last message, for the model to go on with it.
    pub continue_final_message: bool,
    /// More names that the template may use.
    pub arguments: Option<&'a TemplateMap>,
}

/// A checkpoint's chat template.
pub struct ChatTemplate {
    environment: Environment<'static>,
    place: String,
    source: String,
    special_tokens: Vec<(&'static str, String)>,
}

impl fmt::Debug for ChatTemplate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ChatTemplate").field("place", &self.place).finish_non_exhaustive()
    }
}

impl ChatTemplate {
    /// The template of `files`: `chat_template.jinja`, `chat_template.json`, or the field
    /// `chat_template` of `tokenizer_config.json`; `None` when there is none of them.
    pub(crate) fn from_files(
        files: &Files,
        (bos, eos): (Option<u32>, Option<u32>),
    ) -> Result<Option<Self>, ModelError> {
        let special = || special_tokens(files, bos, eos);
        let name = "chat_template.jinja";
        if let Some(source) = files.read(name)? {
            let place = files.path(name);
            let source = String::from_utf8(source.to_vec()).map_err(|error| {
                failed(&place, &format!("it is not UTF-8 ({})", error.utf8_error()))
            })?;
            return Self::build(place, source, None, special()?).map(Some);
        }
        for name in ["chat_template.json", "tokenizer_config.json"] {
            let Some(json) = files.read(name)? else { continue };
            let place = files.path(name);
            let fields = Fields::parse(&place, &json)?;
            let Some((source, tool_use)) = field(&fields)? else { continue };
            return Self::build(place, source, tool_use, special()?).map(Some);
        }
        Ok(None)
    }

    /// A template from its source; `place` is what errors call it.
    ///
    /// # Errors
    /// [`ModelError::ChatTemplate`] when `source` is not the template language.
    pub fn new(
        place: impl Into<String>,
        source: impl Into<String>,
        special_tokens: impl IntoIterator<Item = (&'static str, String)>,
    ) -> Result<Self, ModelError> {
        Self::build(place.into(), source.into(), None, special_tokens.into_iter().collect())
    }

    fn build(
        place: String,
        source: String,
        tool_use: Option<String>,
        special_tokens: Vec<(&'static str, String)>,
    ) -> Result<Self, ModelError> {
        let mut environment = functions::environment();
        environment.set_fuel(Some(FUEL));
        for (name, source) in [(DEFAULT, Some(source.clone())), (TOOL_USE, tool_use)] {
            let Some(source) = source else { continue };
            let source = functions::without_generation_marks(&source);
            let added = environment.add_template_owned(name, source);
            added.map_err(|error| failed(&place, &sentence(&error)))?;
        }
        Ok(Self { environment, place, source, special_tokens })
    }

    /// The template's source.
    #[must_use]
    pub fn source(&self) -> &str {
        &self.source
    }

    /// Where the template is from.
    #[must_use]
    pub fn place(&self) -> &str {
        &self.place
    }

    /// The prompt of a conversation. It holds the special tokens that the model expects, so it is
    /// tokenised without adding any.
    ///
    /// # Errors
    /// [`ModelError::ChatTemplate`] when the template refuses the conversation or cannot be
    /// rendered with it, and when a final message is to be continued that the prompt does not
    /// hold.
    pub fn render(&self, input: ChatInput<'_>) -> Result<String, ModelError> {
        let refused = |reason: &str| failed(&self.place, reason);
        let Some((last, before)) = input.messages.split_last() else {
            return Err(refused("there are no messages, expected at least one"));
        };
        if input.continue_final_message && input.add_generation_prompt {
            return Err(refused(
                "continue_final_message and add_generation_prompt are both true, expected one of \
                 them: the final message either ends or goes on",
            ));
        }
        let mut messages: Vec<Value> = before.iter().map(template_value).collect();
        let mut last = last.clone();
        if input.continue_final_message {
            let Some(content) = &mut last.content else {
                return Err(refused("the final message has no content to continue"));
            };
            content.push_str(MARK);
        }
        messages.push(template_value(&last));
        let name = match input.tools {
            Some(_) if self.environment.get_template(TOOL_USE).is_ok() => TOOL_USE,
            _ => DEFAULT,
        };
        let template = self.environment.get_template(name);
        let template = template.map_err(|error| refused(&sentence(&error)))?;
        let special = self.special_tokens.iter();
        let mut names: TemplateMap =
            special.map(|(name, text)| ((*name).to_owned(), text.into())).collect();
        names.extend(input.arguments.cloned().into_iter().flatten());
        let text = template.render(context! {
            messages => messages,
            tools => input.tools,
            documents => (),
            add_generation_prompt => input.add_generation_prompt,
            ..template_value(&names)
        });
        let text = text.map_err(|error| refused(&sentence(&error)))?;
        if !input.continue_final_message {
            return Ok(text);
        }
        match text.rfind(MARK.trim_end()) {
            // The template keeps the space behind a message, so it kept the message's own.
            Some(end) if text[end..].starts_with(MARK) => Ok(text[..end].to_owned()),
            Some(end) => Ok(text[..end].trim_end().to_owned()),
            None => Err(refused("the template leaves out the message that is to be continued")),
        }
    }
}

/// The field `chat_template`: one template, or a list of named ones.
fn field(fields: &Fields) -> Result<Option<(String, Option<String>)>, ModelError> {
    let name = "chat_template";
    let expected = "a text, or a list of objects with name and template, one of them \"default\"";
    let list = match fields.get(name) {
        None => return Ok(None),
        Some(Json::String(source)) => return Ok(Some((source.clone(), None))),
        Some(Json::Array(list)) => list,
        Some(_) => return Err(fields.error(name, expected)),
    };
    let named = |wanted: &str| {
        let found = list.iter().find(|entry| entry["name"] == wanted);
        found.and_then(|entry| entry["template"].as_str()).map(str::to_owned)
    };
    match named(DEFAULT) {
        Some(source) => Ok(Some((source, named(TOOL_USE)))),
        None => Err(fields.error(name, expected)),
    }
}

/// The texts of the special tokens that templates write.
pub(crate) fn special_tokens(
    files: &Files,
    bos: Option<u32>,
    eos: Option<u32>,
) -> Result<Vec<(&'static str, String)>, ModelError> {
    let mut tokens: Vec<(&'static str, String)> = Vec::new();
    for file in ["tokenizer_config.json", "special_tokens_map.json"] {
        let Some(json) = files.read(file)? else { continue };
        let fields = Fields::parse(&files.path(file), &json)?;
        for name in SPECIAL_TOKENS {
            if tokens.iter().all(|(known, _)| *known != name) {
                tokens.extend(token_text(&fields, name)?.map(|text| (name, text)));
            }
        }
    }
    let missing = |name: &str| tokens.iter().all(|(known, _)| *known != name);
    let by_id = [("bos_token", bos), ("eos_token", eos)];
    let by_id: Vec<_> =
        by_id.into_iter().filter(|(name, id)| missing(name) && id.is_some()).collect();
    if !by_id.is_empty()
        && let Ok(tokenizer) = Tokenizer::from_files(files)
    {
        let texts =
            by_id.into_iter().filter_map(|(name, id)| Some((name, tokenizer.id_to_token(id?)?)));
        tokens.extend(texts);
    }
    Ok(tokens)
}

fn failed(place: &str, reason: &str) -> ModelError {
    ModelError::ChatTemplate { place: place.to_owned(), reason: reason.to_owned() }
}

/// What went wrong, in words; a template's own `raise_exception` without ours around it.
fn sentence(error: &minijinja::Error) -> String {
    let line = error.line().map(|line| format!(" in line {line}")).unwrap_or_default();
    match (error.kind(), error.detail()) {
        (ErrorKind::InvalidOperation, Some(detail)) if functions::was_raised(error) => {
            detail.to_owned()
        }
        (ErrorKind::OutOfFuel, _) => "it runs too long".to_owned(),
        (kind, Some(detail)) => format!("{kind}{line}: {detail}"),
        (kind, None) => format!("{kind}{line}"),
    }
}
