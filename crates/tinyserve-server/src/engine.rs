//! The engine as the server sees it: submissions go in, events of choices come out.

use std::sync::Arc;
use std::task::{Context, Poll};

use tinyserve::model::SamplingParams;
use tinyserve::sched::{
    AdmissionError, AttentionChoice, Engine, EngineState, Event, EventStream, FailureKind, Request,
    Stats, StopReason as Stop, Summary,
};
use tinyserve::{AttentionMode, TinyServe, TinyServeConfig};

use crate::error::ApiError;
use crate::metrics::RequestMetrics;
use crate::output::{ChoiceEvent, Ending, ScoredToken, StopReason};
use crate::request::{Extension, Settings};

/// One choice to be generated.
#[derive(Debug, Clone)]
pub(crate) struct Submission {
    pub(crate) prompt: Vec<u32>,
    pub(crate) max_tokens: usize,
    /// How many alternatives are told with each token; `None` tells no probabilities.
    pub(crate) logprobs: Option<usize>,
    /// The same for the prompt's own tokens.
    pub(crate) prompt_logprobs: Option<usize>,
    pub(crate) seed: Option<u64>,
    pub(crate) session: Option<String>,
    pub(crate) settings: Arc<Settings>,
}

/// The request that the engine takes.
fn request(submission: Submission, config: &TinyServeConfig) -> Result<Request, ApiError> {
    let Submission { prompt, max_tokens, logprobs, prompt_logprobs, seed, session, settings } =
        submission;
    Ok(Request {
        max_tokens,
        min_tokens: settings.min_tokens,
        sampling: SamplingParams {
            temperature: settings.temperature,
            top_k: settings.top_k,
            top_p: settings.top_p,
            min_p: settings.min_p,
            repetition_penalty: settings.repetition_penalty,
            presence_penalty: settings.presence_penalty,
            frequency_penalty: settings.frequency_penalty,
            seed,
        },
        logit_bias: settings.logit_bias.clone(),
        stop: settings.stop.clone(),
        include_stop: settings.include_stop_str_in_output,
        skip_special_tokens: settings.skip_special_tokens,
        stop_tokens: settings.stop_token_ids.clone(),
        ignore_eos: settings.ignore_eos,
        top_logprobs: logprobs.unwrap_or(0),
        // Without a token to generate the prompt is read for its own sake.
        prompt_logprobs: prompt_logprobs.or((max_tokens == 0).then_some(0)),
        priority: settings.priority,
        session,
        attention: attention(&settings.extension, config)?,
        plugins: settings.extension.plugins.clone().into_iter().collect(),
        cache_salt: settings.cache_salt.clone().unwrap_or_default(),
        ..Request::new(prompt)
    })
}

/// The attention that a request asks for beside the server's settings; `None` when it asks for
/// nothing.
fn attention(
    asked: &Extension,
    config: &TinyServeConfig,
) -> Result<Option<AttentionChoice>, ApiError> {
    if !asked.selects() {
        return Ok(None);
    }
    let mut config = config.clone();
    config.attention = asked.attention.unwrap_or(config.attention);
    if let Some(ratio) = asked.selection_ratio {
        config.selection_ratio = ratio;
        (config.token_budget, config.top_p_pages) = (None, None);
    }
    if asked.token_budget.is_some() || asked.top_p_pages.is_some() {
        (config.token_budget, config.top_p_pages) = (asked.token_budget, asked.top_p_pages);
    }
    config.group_reduce = asked.group_reduce.unwrap_or(config.group_reduce);
    config.scorer = asked.scorer.unwrap_or(config.scorer);
    config.sink_pages = asked.sink_pages.unwrap_or(config.sink_pages);
    config.recent_pages = asked.recent_pages.unwrap_or(config.recent_pages);
    config.dense_layers = asked.dense_layers.unwrap_or(config.dense_layers);
    config.sparse_min_context = asked.sparse_min_context.or(config.sparse_min_context);
    if config.attention == AttentionMode::Dense {
        return Ok(Some(AttentionChoice::Dense));
    }
    let policy = config.selection_policy();
    policy.check().map_err(|error| ApiError::field("tinyserve", error.to_string()))?;
    Ok(Some(AttentionChoice::Policy(policy)))
}

/// The choices of one request while they are generated; dropping them ends them.
pub(crate) struct Choices {
    streams: Vec<Option<Choice>>,
    /// Where to look first, so that no choice waits for all before it.
    next: usize,
    metrics: Arc<RequestMetrics>,
}

struct Choice {
    events: EventStream,
    max_tokens: usize,
    /// Whether the answer tells what only this engine knows.
    tells_more: bool,
}

impl Choices {
    /// Submits every choice, or none.
    ///
    /// # Errors
    /// 429 when the queue is full, 503 when the engine takes nothing, 400 for what can never be
    /// answered.
    pub(crate) fn submit(
        engine: &TinyServe,
        submissions: Vec<Submission>,
        metrics: &Arc<RequestMetrics>,
    ) -> Result<Self, ApiError> {
        // What was submitted before one is refused ends when this is dropped.
        let mut choices = Self { streams: Vec::new(), next: 0, metrics: Arc::clone(metrics) };
        for submission in submissions {
            let (max_tokens, tells_more) =
                (submission.max_tokens, submission.settings.extension.is_given);
            let events = engine
                .engine()
                .submit(request(submission, engine.config())?)
                .map_err(|error| refused(&error))?;
            choices.streams.push(Some(Choice { events, max_tokens, tells_more }));
        }
        if let Some(Some(first)) = choices.streams.first() {
            metrics.submitted(first.events.replica(), choices.streams.len());
        }
        Ok(choices)
    }

    /// Lets whoever awaits events sleep until a choice is complete.
    pub(crate) fn wake_at_ends(&mut self) {
        self.streams.iter_mut().flatten().for_each(|choice| choice.events.wake_at_end());
    }

    /// Ends all choices.
    pub(crate) fn end(&mut self) {
        self.streams.clear();
    }

    /// The next event of any choice; `Ready(None)` when every choice has ended.
    pub(crate) fn poll_next(&mut self, cx: &mut Context<'_>) -> Poll<Option<(usize, ChoiceEvent)>> {
        let count = self.streams.len();
        let mut open = false;
        for offset in 0..count {
            let index = (self.next + offset) % count;
            while let Some(choice) = &mut self.streams[index] {
                open = true;
                let Poll::Ready(event) = choice.events.poll_next(cx) else { break };
                let Some(event) = event else {
                    self.streams[index] = None;
                    break;
                };
                let terminal = event.is_terminal();
                let event = self.told(index, event);
                if terminal {
                    self.streams[index] = None;
                }
                if let Some(event) = event {
                    self.next = index + 1;
                    return Poll::Ready(Some((index, event)));
                }
            }
        }
        match open && self.streams.iter().any(Option::is_some) {
            true => Poll::Pending,
            false => Poll::Ready(None),
        }
    }

    /// What clients hear of an event.
    fn told(&self, index: usize, event: Event) -> Option<ChoiceEvent> {
        let choice = self.streams[index].as_ref()?;
        Some(match event {
            Event::Started { .. } | Event::Prefill { .. } => return None,
            Event::Prompt(tokens) => ChoiceEvent::Prompt(
                tokens
                    .into_iter()
                    .map(|token| ScoredToken {
                        id: token.id,
                        logprob: token.logprob,
                        top: token.top_logprobs.iter().map(|top| (top.id, top.logprob)).collect(),
                    })
                    .collect(),
            ),
            Event::Token(token) => ChoiceEvent::Token {
                token: ScoredToken {
                    id: token.id,
                    logprob: Some(token.logprob),
                    top: token.top_logprobs.iter().map(|top| (top.id, top.logprob)).collect(),
                },
                text: token.text,
            },
            Event::Finished(finished) => {
                let engine = choice.events.replica();
                self.metrics.finished(engine, &finished.summary, choice.max_tokens);
                let detail = choice.tells_more.then(|| detail(&finished.summary));
                ChoiceEvent::End(Ending {
                    finish_reason: finished.reason.name(),
                    stop_reason: match finished.stop_reason {
                        // The ordinary end of a text is no news.
                        None | Some(Stop::EndOfSequence(_)) => None,
                        Some(Stop::Token(id)) => Some(StopReason::Token(id)),
                        Some(Stop::Text(text)) => Some(StopReason::Text(text)),
                        Some(Stop::Plugin { reason, .. }) => Some(StopReason::Text(reason)),
                    },
                    cached_tokens: finished.summary.usage.cached_tokens,
                    detail,
                    text: finished.summary.rest,
                })
            }
            Event::Aborted(_) => ChoiceEvent::Failed(ApiError::unavailable(
                "the server stops before the answer is complete",
            )),
            Event::Failed(failure) => ChoiceEvent::Failed(match failure.kind {
                FailureKind::EngineStopped => ApiError::unavailable(failure.sentence),
                _ => ApiError::internal(failure.sentence),
            }),
        })
    }
}

/// What only this engine knows of an answer.
fn detail(summary: &Summary) -> serde_json::Value {
    let ms = |duration: std::time::Duration| duration.as_secs_f64() * 1e3;
    let (timings, kv) = (&summary.timings, &summary.kv);
    serde_json::json!({
        "timings": {
            "queued_ms": ms(timings.queued),
            "prefill_ms": ms(timings.prefill),
            "ttft_ms": timings.ttft.map(ms),
            "decode_ms": ms(timings.decode),
            "preemptions": timings.preemptions,
        },
        "kv": {
            "pages": kv.pages,
            "bytes_read": kv.decode.bytes_read,
            "bytes_dense": kv.decode.bytes_dense,
            "bytes_read_ratio": kv.decode.bytes_ratio(),
            "recall": kv.decode.recall(),
            "reuse": kv.decode.reuse.share(),
            "pruned_tokens": kv.pruned_tokens,
            "pruned_bytes": kv.pruned_bytes,
        },
    })
}

/// Why the engine does not take a request, as clients hear it.
fn refused(error: &AdmissionError) -> ApiError {
    let sentence = error.to_string();
    match error {
        AdmissionError::QueueFull { .. } => ApiError::overloaded(format!("{sentence}: try again")),
        AdmissionError::ShuttingDown | AdmissionError::Stopped => ApiError::unavailable(sentence),
        AdmissionError::TooLong { .. } | AdmissionError::NeverFits { .. } => {
            ApiError::too_long("max_tokens", sentence)
        }
        AdmissionError::EmptyPrompt => ApiError::field("prompt", sentence),
        AdmissionError::Setting { name, .. } => ApiError::field(*name, sentence),
        _ => ApiError::invalid(sentence),
    }
}

/// What the page at `/` draws: totals since the start.
pub(crate) fn page_stats(engine: &Engine) -> serde_json::Value {
    let stats = engine.stats();
    let replicas = engine.replica_states().into_iter().zip(engine.replica_stats());
    serde_json::json!({
        "replicas": replicas.map(|(state, stats)| replica(state, &stats)).collect::<Vec<_>>(),
        "suggestions": stats.suggestions().iter().map(|advice| serde_json::json!({
            "fact": advice.fact,
            "knob": advice.knob,
            "change": advice.change,
            "effect": advice.effect,
        })).collect::<Vec<_>>(),
        "running": stats.running,
        "waiting": stats.waiting,
        "pages_used": stats.pages_used,
        "pages_total": stats.pages,
        "generated_tokens": stats.generation_tokens,
        "bytes_read": stats.bytes_read,
        "bytes_dense": stats.bytes_dense,
        "recall_sum": stats.recall.unwrap_or(0.0) * stats.recall_count as f64,
        "recall_count": stats.recall_count,
        "layers": stats.layers.iter().map(|layer| serde_json::json!({
            "pages_read": layer.read,
            "pages_total": layer.total,
        })).collect::<Vec<_>>(),
    })
}

/// What one of the engine's copies does and holds.
fn replica(state: EngineState, stats: &Stats) -> serde_json::Value {
    serde_json::json!({
        "state": match state {
            EngineState::Running => "running",
            EngineState::Draining => "draining",
            EngineState::Stopped => "stopped",
        },
        "requests": stats.requests,
        "failed": stats.failed,
        "running": stats.running,
        "waiting": stats.waiting,
        "sessions": stats.sessions,
        "pages_used": stats.pages_used,
        "pages_total": stats.pages,
        "generated_tokens": stats.generation_tokens,
    })
}
