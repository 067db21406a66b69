//! What completions and chat have in common.

use std::collections::BTreeMap;

use serde::Deserialize;

use super::body::Body;
use super::{Extension, Limits};
use crate::error::ApiError;

/// Fields that both endpoints read.
pub(super) const FIELDS: &[&str] = &[
    "model",
    "max_tokens",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "n",
    "best_of",
    "use_beam_search",
    "stream",
    "stream_options",
    "stop",
    "stop_token_ids",
    "include_stop_str_in_output",
    "ignore_eos",
    "min_tokens",
    "seed",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "logit_bias",
    "skip_special_tokens",
    "truncate_prompt_tokens",
    "prompt_logprobs",
    "priority",
    "request_id",
    "cache_salt",
    "return_token_ids",
    "response_format",
    "guided_json",
    "guided_regex",
    "guided_choice",
    "guided_grammar",
    "structured_outputs",
    "tinyserve",
];

/// Longest name that a client may give to something.
const LONGEST_NAME: usize = 256;
/// Longest stop string, bytes.
const LONGEST_STOP: usize = 4096;
/// Most entries of `logit_bias` and `stop_token_ids`.
const MOST_TOKENS: usize = 1024;

/// How answers are streamed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct StreamSettings {
    /// Whether a last chunk tells the usage.
    pub(crate) include_usage: bool,
    /// Whether every chunk does.
    pub(crate) continuous_usage_stats: bool,
}

/// What completions and chat have in common.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Settings {
    pub(crate) model: Option<String>,
    pub(crate) max_tokens: Option<usize>,
    pub(crate) temperature: f32,
    pub(crate) top_p: f32,
    /// 0 keeps all.
    pub(crate) top_k: usize,
    pub(crate) min_p: f32,
    pub(crate) n: usize,
    pub(crate) stream: Option<StreamSettings>,
    pub(crate) stop: Vec<String>,
    pub(crate) stop_token_ids: Vec<u32>,
    pub(crate) include_stop_str_in_output: bool,
    pub(crate) ignore_eos: bool,
    pub(crate) min_tokens: usize,
    pub(crate) seed: Option<i64>,
    pub(crate) presence_penalty: f32,
    pub(crate) frequency_penalty: f32,
    pub(crate) repetition_penalty: f32,
    pub(crate) logit_bias: Vec<(u32, f32)>,
    pub(crate) skip_special_tokens: bool,
    pub(crate) truncate_prompt_tokens: Option<usize>,
    pub(crate) priority: i32,
    pub(crate) request_id: Option<String>,
    pub(crate) cache_salt: Option<String>,
    pub(crate) return_token_ids: bool,
    pub(crate) extension: Extension,
    /// Names of fields that nobody reads.
    pub(crate) unknown: Vec<String>,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum OneOrMany {
    One(String),
    Many(Vec<String>),
}

impl Settings {
    pub(super) fn read(body: &Body<'_>, limits: &Limits) -> Result<Self, ApiError> {
        refuse_what_is_missing(body)?;
        let n = body.size("n", 1, limits.choices)?.unwrap_or(1);
        if let Some(best_of) = body.size("best_of", 1, usize::MAX)?
            && best_of != n
        {
            return Err(body.error("best_of", "the same as n: more is not supported"));
        }
        Ok(Self {
            model: body.value("model", "a text")?,
            max_tokens: body.size("max_tokens", 0, usize::MAX)?,
            temperature: body.number("temperature", 0.0, f64::INFINITY)?.unwrap_or(1.0),
            top_p: body
                .checked("top_p", "a number above 0 and at most 1", |p: &f32| {
                    *p > 0.0 && *p <= 1.0
                })?
                .unwrap_or(1.0),
            top_k: top_k(body)?,
            min_p: body.number("min_p", 0.0, 1.0)?.unwrap_or(0.0),
            n,
            stream: stream(body)?,
            stop: stop(body, limits.stops)?,
            stop_token_ids: stop_token_ids(body, limits.vocab)?,
            include_stop_str_in_output: body.flag("include_stop_str_in_output", false)?,
            ignore_eos: body.flag("ignore_eos", false)?,
            min_tokens: body.size("min_tokens", 0, limits.context)?.unwrap_or(0),
            seed: body.value("seed", "a whole number of 64 bits")?,
            presence_penalty: body.number("presence_penalty", -2.0, 2.0)?.unwrap_or(0.0),
            frequency_penalty: body.number("frequency_penalty", -2.0, 2.0)?.unwrap_or(0.0),
            repetition_penalty: body
                .checked(
                    "repetition_penalty",
                    "a number above 0 (1 changes nothing)",
                    |p: &f32| *p > 0.0 && p.is_finite(),
                )?
                .unwrap_or(1.0),
            logit_bias: logit_bias(body, limits.vocab)?,
            skip_special_tokens: body.flag("skip_special_tokens", true)?,
            truncate_prompt_tokens: body.size("truncate_prompt_tokens", 1, limits.context)?,
            priority: priority(body, limits)?,
            request_id: name(body, "request_id")?,
            cache_salt: name(body, "cache_salt")?,
            return_token_ids: body.flag("return_token_ids", false)?,
            extension: Extension::read(body)?,
            unknown: body.unknown().to_vec(),
        })
    }
}

/// Refuses what would change the answer and is not implemented.
fn refuse_what_is_missing(body: &Body<'_>) -> Result<(), ApiError> {
    if body.flag("use_beam_search", false)? {
        return Err(body.unsupported("use_beam_search", ", expected false"));
    }
    if body.has("prompt_logprobs") {
        return Err(body.unsupported("prompt_logprobs", ": echo with logprobs tells the same"));
    }
    let constraints =
        ["guided_json", "guided_regex", "guided_choice", "guided_grammar", "structured_outputs"];
    for name in constraints {
        if body.has(name) {
            return Err(body.unsupported(name, ": answers are free text"));
        }
    }
    #[derive(Deserialize)]
    struct Format {
        #[serde(rename = "type")]
        kind: String,
    }
    body.checked(
        "response_format",
        "{\"type\": \"text\"}: answers are free text",
        |f: &Format| f.kind == "text",
    )?;
    Ok(())
}

/// Where requests run in the order that they come, a priority would be accepted and ignored.
fn priority(body: &Body<'_>, limits: &Limits) -> Result<i32, ApiError> {
    let priority = body.value("priority", "a whole number; lower runs earlier")?.unwrap_or(0);
    match priority {
        0 => Ok(0),
        _ if limits.priorities => Ok(priority),
        _ => Err(body.error("priority", "0 where the server's --scheduling-policy is fcfs")),
    }
}

/// -1 and 0 both keep all tokens: the one is vLLM's word, the other Hugging Face's.
fn top_k(body: &Body<'_>) -> Result<usize, ApiError> {
    let expected = "a whole number; 0 or -1 keeps all tokens";
    let k = body.checked("top_k", expected, |k: &i64| *k >= -1)?.unwrap_or(0);
    Ok(usize::try_from(k).unwrap_or(0))
}

fn stream(body: &Body<'_>) -> Result<Option<StreamSettings>, ApiError> {
    let stream = body.flag("stream", false)?;
    let known = ["include_usage", "continuous_usage_stats"];
    let options = body.object("stream_options", &known, "stream_options.")?;
    match (stream, options) {
        (false, Some(_)) => Err(body.error("stream_options", "it only where stream is true")),
        (false, None) => Ok(None),
        (true, None) => Ok(Some(StreamSettings::default())),
        (true, Some(options)) => Ok(Some(StreamSettings {
            include_usage: options.flag("include_usage", false)?,
            continuous_usage_stats: options.flag("continuous_usage_stats", false)?,
        })),
    }
}

fn stop(body: &Body<'_>, most: usize) -> Result<Vec<String>, ApiError> {
    let expected = format!(
        "a text or a list of at most {most} texts, none empty or longer than {LONGEST_STOP} bytes"
    );
    let stop = body.value::<OneOrMany>("stop", &expected)?;
    let stop = match stop {
        None => Vec::new(),
        Some(OneOrMany::One(text)) => vec![text],
        Some(OneOrMany::Many(texts)) => texts,
    };
    if stop.len() > most || stop.iter().any(|text| text.is_empty() || text.len() > LONGEST_STOP) {
        return Err(body.error("stop", &expected));
    }
    Ok(stop)
}

fn stop_token_ids(body: &Body<'_>, vocab: usize) -> Result<Vec<u32>, ApiError> {
    let expected = format!("a list of at most {MOST_TOKENS} token ids below {vocab}");
    let ids = body.checked("stop_token_ids", &expected, |ids: &Vec<u32>| {
        ids.len() <= MOST_TOKENS && ids.iter().all(|&id| (id as usize) < vocab)
    })?;
    Ok(ids.unwrap_or_default())
}

fn logit_bias(body: &Body<'_>, vocab: usize) -> Result<Vec<(u32, f32)>, ApiError> {
    let expected = format!(
        "an object of at most {MOST_TOKENS} token ids below {vocab} and numbers from -100 to 100"
    );
    let bias = body.checked("logit_bias", &expected, |bias: &BTreeMap<u32, f32>| {
        bias.len() <= MOST_TOKENS
            && bias.iter().all(|(&id, x)| (id as usize) < vocab && (-100.0..=100.0).contains(x))
    })?;
    Ok(bias.unwrap_or_default().into_iter().collect())
}

/// A name of the client's: visible characters, and not too many.
pub(super) fn name(body: &Body<'_>, field: &'static str) -> Result<Option<String>, ApiError> {
    let expected = format!("1 to {LONGEST_NAME} visible characters");
    body.checked(field, &expected, |name: &String| is_name(name))
}

/// Whether a client may call something `name`.
pub(crate) fn is_name(name: &str) -> bool {
    (1..=LONGEST_NAME).contains(&name.len()) && name.chars().all(|c| !c.is_control())
}
