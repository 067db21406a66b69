//! `POST /v1/chat/completions`.

use std::fmt::Write as _;

use serde::Deserialize;
use serde_json::value::RawValue;
use tinyserve::model::{ChatInput, ChatMessage, TemplateMap, TemplateValue, template_value};

use super::body::{Body, shown};
use super::{Limits, Settings, settings};
use crate::error::ApiError;

/// Fields that a template is rendered with.
pub(super) const TEMPLATE_FIELDS: &[&str] = &[
    "messages",
    "tools",
    "tool_choice",
    "add_generation_prompt",
    "continue_final_message",
    "chat_template_kwargs",
    "chat_template",
];
/// Fields that only chat has.
const FIELDS: &[&str] = &[
    "max_completion_tokens",
    "logprobs",
    "top_logprobs",
    "add_special_tokens",
    "echo",
    "functions",
    "function_call",
    "modalities",
    "audio",
];
/// Most messages of one conversation.
const MOST_MESSAGES: usize = 4096;
/// What is read of a message; the rest goes to the template only where templates look for it.
const MESSAGE_FIELDS: &[&str] =
    &["role", "content", "name", "tool_calls", "tool_call_id", "reasoning_content"];

/// What a chat template is rendered with.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Conversation {
    messages: Vec<ChatMessage>,
    tools: Option<TemplateValue>,
    add_generation_prompt: bool,
    continue_final_message: bool,
    arguments: Option<TemplateMap>,
}

/// A chat request that makes sense by itself.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct ChatRequest {
    pub(crate) conversation: Conversation,
    /// `None` generates up to the end of the context.
    pub(crate) max_tokens: Option<usize>,
    /// How many alternatives are told with each token; `None` tells no probabilities at all.
    pub(crate) logprobs: Option<usize>,
    pub(crate) add_special_tokens: bool,
    pub(crate) settings: Settings,
}

impl ChatRequest {
    /// Reads and checks a body.
    pub(crate) fn parse(json: &[u8], limits: &Limits) -> Result<Self, ApiError> {
        let body = Body::parse(json, &[settings::FIELDS, TEMPLATE_FIELDS, FIELDS].concat())?;
        for name in ["functions", "function_call", "audio"] {
            if body.has(name) {
                return Err(body.unsupported(name, ": answers are text"));
            }
        }
        body.checked("modalities", "[\"text\"]: answers are text", |kinds: &Vec<String>| {
            kinds.iter().all(|kind| kind == "text")
        })?;
        if body.flag("echo", false)? {
            return Err(body.unsupported("echo", " in chat, expected false"));
        }
        let settings = Settings::read(&body, limits)?;
        let max_completion_tokens = body.size("max_completion_tokens", 1, usize::MAX)?;
        let max_tokens = max_completion_tokens.or(settings.max_tokens);
        if max_tokens == Some(0) {
            return Err(body.error("max_tokens", "at least 1"));
        }
        if max_tokens.is_some_and(|most| settings.min_tokens > most) {
            return Err(body.error("min_tokens", "at most max_tokens"));
        }
        let logprobs = body.flag("logprobs", false)?;
        let top_logprobs = body.size("top_logprobs", 0, limits.logprobs)?;
        if !logprobs && top_logprobs.is_some_and(|n| n > 0) {
            return Err(body.error("top_logprobs", "it only where logprobs is true"));
        }
        Ok(Self {
            conversation: Conversation::read(&body)?,
            max_tokens,
            logprobs: logprobs.then(|| top_logprobs.unwrap_or(0)),
            add_special_tokens: body.flag("add_special_tokens", false)?,
            settings,
        })
    }
}

impl Conversation {
    pub(super) fn read(body: &Body<'_>) -> Result<Self, ApiError> {
        if body.has("chat_template") {
            let instead = " in a request: start the server with --chat-template";
            return Err(body.unsupported("chat_template", instead));
        }
        let choice = "\"none\" or \"auto\": a call of a tool cannot be forced";
        body.checked("tool_choice", choice, |choice: &String| {
            choice == "none" || choice == "auto"
        })?;
        let uses_tools = body.get("tool_choice").is_none_or(|choice| choice.get() != "\"none\"");
        let tools: Option<Vec<TemplateMap>> = body.value("tools", "a list of objects")?;
        let tools = tools.filter(|tools| uses_tools && !tools.is_empty());
        let continue_final_message = body.flag("continue_final_message", false)?;
        let add_generation_prompt = body.flag("add_generation_prompt", !continue_final_message)?;
        if continue_final_message && add_generation_prompt {
            return Err(
                body.error("continue_final_message", "false where add_generation_prompt is true")
            );
        }
        Ok(Self {
            messages: messages(body)?,
            tools: tools.as_ref().map(template_value),
            add_generation_prompt,
            continue_final_message,
            arguments: arguments(body)?,
        })
    }

    /// What a template takes.
    pub(crate) fn input(&self) -> ChatInput<'_> {
        ChatInput {
            messages: &self.messages,
            tools: self.tools.as_ref(),
            add_generation_prompt: self.add_generation_prompt,
            continue_final_message: self.continue_final_message,
            arguments: self.arguments.as_ref(),
        }
    }
}

/// Names of the template that a request must not replace.
fn arguments(body: &Body<'_>) -> Result<Option<TemplateMap>, ApiError> {
    let name = "chat_template_kwargs";
    let expected = "an object without messages, tools, chat_template and tokenize";
    body.checked(name, expected, |arguments: &TemplateMap| {
        let taken = ["messages", "tools", "chat_template", "tokenize"];
        taken.iter().all(|taken| !arguments.contains_key(*taken))
    })
}

fn messages(body: &Body<'_>) -> Result<Vec<ChatMessage>, ApiError> {
    let expected = format!("a list of 1 to {MOST_MESSAGES} messages");
    let raw: Option<Vec<Box<RawValue>>> = body.value("messages", &expected)?;
    let raw = raw.ok_or_else(|| body.error("messages", &expected))?;
    if raw.is_empty() || raw.len() > MOST_MESSAGES {
        return Err(body.error("messages", &expected));
    }
    raw.iter().enumerate().map(|(index, raw)| message(index, raw.get())).collect()
}

fn message(index: usize, json: &str) -> Result<ChatMessage, ApiError> {
    let wrong = |field: &str, found: &str, expected: &str| {
        let name = format!("messages[{index}]{field}");
        let message = format!("{name} is {}, expected {expected}", shown(found));
        ApiError::field(name, message)
    };
    let body = Body::parse(json.as_bytes(), MESSAGE_FIELDS)
        .map_err(|_| wrong("", json, "an object with role and content"))?;
    let raw = |name: &str| body.get(name).map_or("missing", RawValue::get);
    let roles = "\"system\", \"developer\", \"user\", \"assistant\" or \"tool\"";
    let role: Option<String> = body.value("role", roles).unwrap_or_default();
    let role = match role.as_deref() {
        // Templates know one word for the two.
        Some("developer" | "system") => "system",
        Some("user") => "user",
        Some("assistant") => "assistant",
        Some("tool") => "tool",
        _ => return Err(wrong(".role", raw("role"), roles)),
    };
    let content = match body.get("content").map(RawValue::get) {
        None if role == "assistant" => None,
        None => return Err(wrong(".content", "missing", "a text or a list of text parts")),
        Some(json) => Some(content(json).map_err(|(place, found, expected)| {
            wrong(&format!(".content{place}"), &found, expected)
        })?),
    };
    let mut more = TemplateMap::new();
    for name in ["name", "tool_call_id", "reasoning_content"] {
        if let Some(json) = body.get(name) {
            let text: String = serde_json::from_str(json.get())
                .map_err(|_| wrong(&format!(".{name}"), json.get(), "a text"))?;
            more.insert(name.to_owned(), text.into());
        }
    }
    if let Some(json) = body.get("tool_calls") {
        let calls = tool_calls(json.get());
        let calls = calls.ok_or_else(|| wrong(".tool_calls", json.get(), "a list of objects"))?;
        more.insert("tool_calls".to_owned(), calls);
    }
    Ok(ChatMessage { role: role.to_owned(), content, more })
}

/// A content: a text, or parts, each in a line of its own. An error is a place, what was found
/// there and what was expected.
fn content(json: &str) -> Result<String, (String, String, &'static str)> {
    #[derive(Deserialize)]
    struct Part {
        #[serde(rename = "type")]
        kind: String,
        text: Option<String>,
    }

    if let Ok(text) = serde_json::from_str(json) {
        return Ok(text);
    }
    let parts: Vec<Box<RawValue>> = serde_json::from_str(json)
        .map_err(|_| (String::new(), json.to_owned(), "a text or a list of text parts"))?;
    let mut all = String::new();
    for (index, raw) in parts.iter().enumerate() {
        match serde_json::from_str(raw.get()) {
            Ok(Part { kind, text: Some(text) }) if kind == "text" => {
                let line = if index == 0 { "" } else { "\n" };
                // Writing to a String cannot fail.
                let _ = write!(all, "{line}{text}");
            }
            _ => {
                let expected = "a part {\"type\": \"text\", \"text\": …}: models here read text";
                return Err((format!("[{index}]"), raw.get().to_owned(), expected));
            }
        }
    }
    Ok(all)
}

/// Calls of tools as templates expect them: clients send arguments as a text that holds JSON,
/// templates take the object.
fn tool_calls(json: &str) -> Option<TemplateValue> {
    let mut calls: Vec<TemplateMap> = serde_json::from_str(json).ok()?;
    for call in &mut calls {
        let function = call.get("function").map(|f| serde_json::to_string(f).unwrap_or_default());
        let Some(Ok(mut function)) = function.map(|f| serde_json::from_str::<TemplateMap>(&f))
        else {
            continue;
        };
        if let Some(arguments) = function.get("arguments").and_then(TemplateValue::as_str)
            && let Ok(object) = serde_json::from_str::<TemplateMap>(arguments)
        {
            function.insert("arguments".to_owned(), template_value(&object));
            call.insert("function".to_owned(), template_value(&function));
        }
    }
    Some(template_value(&calls))
}
