//! Where requests are checked, on their callers' threads, before the engine sees them.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Instant;

use tinyserve_kv::PageTable;
use tinyserve_model::{ModelError, Sampler};
use tinyserve_plugins::{PluginError, RequestInfo};

use crate::channel::{EventStream, events};
use crate::config::setting;
use crate::history::History;
use crate::metrics::{Metrics, count};
use crate::sequence::{QueuePlace, Rank, Sequence, Times};
use crate::text::TextStream;
use crate::{
    AdmissionError, AttentionChoice, EngineConfig, KvUse, Request, RequestId, RunnerShape,
};

/// Longest name of a session, bytes.
const MAX_SESSION_NAME: usize = 256;

/// A request that was checked and waits to be handed to a [`crate::Scheduler`].
#[derive(Debug)]
pub struct Submission(pub(crate) Box<Sequence>);

/// Sizes that requests have to fit.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Most tokens of a sequence: the prompt and all generated tokens but the last, which is not
    /// fed back.
    pub max_sequence_length: usize,
    /// Tokens of the vocabulary.
    pub vocab: usize,
    /// Pages of the cache.
    pub pages: usize,
    /// Tokens of one page.
    pub page_size: usize,
    /// Bytes of one page, its boxes included.
    pub bytes_per_page: usize,
    /// Bytes of the weights.
    pub weight_bytes: usize,
}

impl Limits {
    /// Most tokens that can be generated after a prompt of `prompt` tokens.
    #[must_use]
    pub fn max_tokens(&self, prompt: usize) -> usize {
        let longest = self.max_sequence_length.min(self.pages * self.page_size);
        (longest + 1).saturating_sub(prompt)
    }
}

/// Checks requests and gives them their numbers.
#[derive(Debug)]
pub struct Intake {
    config: EngineConfig,
    limits: Limits,
    metrics: Arc<Metrics>,
    start: Instant,
}

impl Intake {
    pub(crate) fn new(
        config: EngineConfig,
        (shape, pages): (RunnerShape, usize),
        metrics: Arc<Metrics>,
    ) -> Self {
        let limits = Limits {
            max_sequence_length: config.max_sequence_length.min(shape.max_positions),
            vocab: shape.vocab,
            pages,
            page_size: shape.page_size,
            bytes_per_page: shape.bytes_per_page,
            weight_bytes: shape.weight_bytes,
        };
        Self { start: config.clock.now(), config, limits, metrics }
    }

    /// Sizes that requests have to fit.
    #[must_use]
    pub fn limits(&self) -> &Limits {
        &self.limits
    }

    /// Checks a request; `on_abort` is called when its caller loses interest in the events.
    ///
    /// # Errors
    /// When it can never be answered, or too many requests wait.
    pub fn take(
        &self,
        request: Request,
        on_abort: impl Fn(RequestId) + Send + Sync + 'static,
    ) -> Result<(Submission, EventStream), AdmissionError> {
        self.check(&request)?;
        let model = |error| match error {
            ModelError::Setting { name, found, expected } => {
                AdmissionError::Setting { name, found, expected }
            }
            error => setting("sampling", error, "settings that the sampler takes"),
        };
        let text = TextStream::new(self.config.tokenizer.as_ref(), &request);
        let sampler = Sampler::new(request.sampling).map_err(model)?;
        let sampler = sampler.with_bias(request.logit_bias).map_err(model)?;
        let choices = request.plugins.iter().map(|(name, enabled)| (name.as_str(), *enabled));
        let place = self.queue(request.prompt.len())?;
        let id = RequestId(self.config.next_id.fetch_add(1, Ordering::Relaxed));
        let info = RequestInfo {
            id: id.to_string(),
            prompt: request.prompt.clone(),
            max_tokens: request.max_tokens,
            page_size: self.limits.page_size,
        };
        let plugins = self.config.plugins.begin(info, choices).map_err(|error| match error {
            PluginError::Unknown { name, expected } => setting("plugins", name, &expected),
            error => setting("plugins", error, "names of plugins"),
        })?;
        let (events, stream) = events(id, move || on_abort(id));
        count(&self.metrics.requests, 1);
        let submitted = self.config.clock.now();
        let since_start = submitted.saturating_duration_since(self.start);
        let ageing = self.config.priority_ageing;
        let eos = if request.ignore_eos { Vec::new() } else { self.config.eos.clone() };
        let banned = [&eos[..], &request.stop_tokens].concat();
        let sequence = Sequence {
            id,
            rank: Rank::new(since_start, request.priority, ageing, id),
            events,
            adapts: request.attention.is_none(),
            attention: request.attention.unwrap_or_else(|| self.config.attention.clone()),
            max_tokens: request.max_tokens,
            min_tokens: request.min_tokens,
            eos,
            stop_tokens: request.stop_tokens,
            banned,
            top_logprobs: request.top_logprobs,
            prompt_logprobs: request.prompt_logprobs,
            prompt_told: 0,
            session: request.session,
            cache_salt: request.cache_salt,
            sampler,
            text,
            plugins,
            prompt_len: request.prompt.len(),
            tokens: request.prompt,
            table: PageTable::new(self.limits.page_size),
            planned: 0,
            fresh: true,
            history: History::default(),
            shares: true,
            remembered: false,
            seen: 0,
            place: Some(place),
            cached_tokens: 0,
            kv: KvUse::default(),
            times: Times::new(submitted),
            end: None,
        };
        Ok((Submission(Box::new(sequence)), stream))
    }

    fn check(&self, request: &Request) -> Result<(), AdmissionError> {
        let limits = &self.limits;
        let (prompt, max_tokens) = (request.prompt.len(), request.max_tokens);
        if prompt == 0 {
            return Err(AdmissionError::EmptyPrompt);
        }
        if max_tokens == 0 && request.prompt_logprobs.is_none() {
            let expected = "at least 1 (0 only with log-probabilities of the prompt)";
            return Err(setting("max_tokens", 0, expected));
        }
        // The last token is not fed back: it needs no place.
        let longest = prompt.saturating_add(max_tokens.max(1) - 1);
        if longest > limits.max_sequence_length {
            let limit = limits.max_sequence_length;
            return Err(AdmissionError::TooLong { prompt, max_tokens, limit });
        }
        let needed = longest.div_ceil(limits.page_size);
        if needed > limits.pages {
            let (pages, page_size) = (limits.pages, limits.page_size);
            return Err(AdmissionError::NeverFits { needed, pages, page_size });
        }
        if request.min_tokens > max_tokens {
            let expected = format!("at most {max_tokens}, the value of max_tokens");
            return Err(setting("min_tokens", request.min_tokens, &expected));
        }
        let biased = request.logit_bias.iter().map(|(token, _)| token);
        let all = [("prompt", &request.prompt), ("stop_token_ids", &request.stop_tokens)];
        let all =
            all.into_iter().flat_map(|(name, tokens)| tokens.iter().map(move |id| (name, id)));
        for (name, &token) in all.chain(biased.map(|token| ("logit_bias", token))) {
            if token as usize >= limits.vocab {
                let expected = format!("tokens 0 to {}, the vocabulary", limits.vocab - 1);
                return Err(setting(name, format!("token {token}"), &expected));
            }
        }
        if self.config.tokenizer.is_none() && !request.stop.is_empty() {
            let expected = "none: the model has no tokenizer to find texts with";
            return Err(setting("stop", format!("{:?}", request.stop), expected));
        }
        if let Some(AttentionChoice::Policy(policy)) = &request.attention {
            policy.check().map_err(|error| match error {
                tinyserve_kv::KvError::Invalid { what, found, expected } => {
                    AdmissionError::Setting { name: what, found, expected }
                }
                error => setting("attention", error, "a policy"),
            })?;
        }
        match &request.session {
            Some(name) if name.is_empty() || name.len() > MAX_SESSION_NAME => {
                let expected = format!("a name of 1 to {MAX_SESSION_NAME} bytes");
                Err(setting("session_id", format!("{} bytes long", name.len()), &expected))
            }
            _ => Ok(()),
        }
    }

    /// A place in the queue, counted while it is checked: no two callers get the last one.
    fn queue(&self, tokens: usize) -> Result<QueuePlace, AdmissionError> {
        let take = |counter: &AtomicUsize, n: usize, what, limit: Option<usize>| {
            let limit = limit.unwrap_or(usize::MAX);
            let taken = counter.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |queued| {
                // An empty queue takes one request of any size.
                queued.checked_add(n).filter(|&sum| sum <= limit || queued == 0)
            });
            taken.map(|_| ()).map_err(|queued| {
                count(&self.metrics.rejected, 1);
                AdmissionError::QueueFull { what, queued, limit }
            })
        };
        let metrics = &self.metrics;
        take(&metrics.queued_requests, 1, "requests", self.config.max_num_queued_reqs)?;
        let limit = self.config.max_num_queued_tokens;
        if let Err(error) = take(&metrics.queued_tokens, tokens, "prompt tokens", limit) {
            metrics.queued_requests.fetch_sub(1, Ordering::Relaxed);
            return Err(error);
        }
        Ok(QueuePlace { metrics: Arc::clone(metrics), tokens })
    }
}
