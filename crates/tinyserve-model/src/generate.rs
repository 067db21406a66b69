//! One request from its prompt to its last token.

use std::ops::ControlFlow;
use std::time::{Duration, Instant};

use tinyserve_kernels::{AttendStats, Attention, Backend};
use tinyserve_kv::PageTable;

use crate::{
    Activations, Batch, KvCache, LogitRows, Model, ModelError, Observe, SampledToken, Sampler,
    SamplingParams, SequenceStep, StepOutput,
};

/// What to generate.
#[derive(Debug, Clone, Copy)]
pub struct Generation<'a> {
    /// Token ids; at least one, at most the context.
    pub prompt: &'a [u32],
    /// Most tokens to generate, at least one; the context may end earlier.
    pub max_tokens: usize,
    /// How tokens are drawn.
    pub sampling: SamplingParams,
    /// Tokens that end the text, usually the model's end-of-sequence tokens.
    pub stop_tokens: &'a [u32],
    /// Which pages decode steps read. Prefill reads all.
    pub attention: Attention<'a>,
    /// Most prompt tokens of one prefill step.
    pub prefill_chunk: usize,
    /// Most tokens of the sequence, prompt included; the model's own limit also holds.
    pub max_sequence_length: usize,
    /// Measure recall at every so many decode steps, from the first on; 0 never does. A measured
    /// step reads all keys.
    pub recall_interval: usize,
}

/// What happens while a request runs.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum GenerationEvent {
    /// Part of the prompt is in the cache.
    Prefilled {
        /// Prompt tokens in the cache.
        done: usize,
        /// Prompt tokens.
        total: usize,
    },
    /// A token was drawn.
    Token {
        /// The token.
        token: SampledToken,
        /// Whether it is a stop token, which belongs to no text.
        ends: bool,
    },
}

/// Why a request ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum FinishReason {
    /// A stop token, or a stop string.
    Stop,
    /// The token limit or the context's end.
    Length,
    /// The caller ended it.
    Cancelled,
}

impl FinishReason {
    /// The name as JSON spells it.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Stop => "stop",
            Self::Length => "length",
            Self::Cancelled => "cancelled",
        }
    }
}

/// What a finished request was and cost.
#[derive(Debug, Clone)]
pub struct GenerationOutcome {
    /// Every token that was drawn, a stop token included.
    pub tokens: Vec<SampledToken>,
    /// Why it ended.
    pub finish_reason: FinishReason,
    /// Time to compute the prompt.
    pub prefill: Duration,
    /// Time to the first token.
    pub ttft: Duration,
    /// Time of the decode steps.
    pub decode: Duration,
    /// Decode steps: one fewer than the tokens, whose first comes from the prefill.
    pub decode_steps: usize,
    /// Pages that the sequence held at its end.
    pub pages: usize,
    /// What attention read in the decode steps.
    pub decode_stats: AttendStats,
}

/// Runs one request at a time over a model and a cache.
#[derive(Debug)]
pub struct Generator<B: Backend> {
    model: Model<B>,
    cache: KvCache<B>,
    activations: Activations<B>,
    output: StepOutput,
}

impl<B: Backend> Generator<B> {
    /// A generator with a cache of its own.
    #[must_use]
    pub fn new(model: Model<B>, cache: KvCache<B>) -> Self {
        let activations = Activations::new(&model);
        Self { model, cache, activations, output: StepOutput::default() }
    }

    /// The model.
    #[must_use]
    pub fn model(&self) -> &Model<B> {
        &self.model
    }

    /// The cache.
    #[must_use]
    pub fn cache(&self) -> &KvCache<B> {
        &self.cache
    }

    /// Runs a request; `on_event` may end it early with a reason.
    ///
    /// # Errors
    /// When the prompt is empty or longer than the context, a setting is out of its range, or the
    /// model fails. The cache is as it was before in every case.
    pub fn generate(
        &mut self,
        generation: &Generation<'_>,
        on_event: &mut dyn FnMut(GenerationEvent) -> Result<ControlFlow<FinishReason>, ModelError>,
    ) -> Result<GenerationOutcome, ModelError> {
        let limit = self.context_limit(generation);
        if generation.prompt.is_empty() {
            return Err(ModelError::EmptyPrompt);
        }
        if generation.prompt.len() > limit {
            return Err(ModelError::ContextOverflow { tokens: generation.prompt.len(), limit });
        }
        for (name, value) in
            [("max_tokens", generation.max_tokens), ("prefill chunk", generation.prefill_chunk)]
        {
            if value == 0 {
                return Err(ModelError::Setting {
                    name,
                    found: "0".to_owned(),
                    expected: "at least 1".to_owned(),
                });
            }
        }
        let sampler = Sampler::new(generation.sampling)?;
        let mut table = self.cache.new_table();
        let outcome = self.run(generation, limit, sampler, &mut table, on_event);
        self.cache.release(table);
        outcome
    }

    /// Logits `[tokens, vocab]` of a sequence of its own, in one dense prefill by chunks;
    /// `on_row` sees each position's logits in order.
    ///
    /// # Errors
    /// As [`Self::generate`].
    pub fn score(
        &mut self,
        tokens: &[u32],
        prefill_chunk: usize,
        mut on_row: impl FnMut(usize, &[f32]),
    ) -> Result<(), ModelError> {
        let mut table = self.cache.new_table();
        let mut row = 0;
        let mut result = Ok(());
        for chunk in tokens.chunks(prefill_chunk.max(1)) {
            result = self.step(&mut table, chunk, Attention::Dense, LogitRows::All, false);
            if result.is_err() {
                break;
            }
            for logits in self.output.logits(0) {
                on_row(row, logits);
                row += 1;
            }
        }
        self.cache.release(table);
        result
    }

    fn context_limit(&self, generation: &Generation<'_>) -> usize {
        let pool = self.cache.pool().capacity() * self.cache.layout().page_size();
        self.model.config().max_positions.min(generation.max_sequence_length).min(pool)
    }

    fn run(
        &mut self,
        generation: &Generation<'_>,
        limit: usize,
        mut sampler: Sampler,
        table: &mut PageTable,
        on_event: &mut dyn FnMut(GenerationEvent) -> Result<ControlFlow<FinishReason>, ModelError>,
    ) -> Result<GenerationOutcome, ModelError> {
        let start = Instant::now();
        let total = generation.prompt.len();
        let mut history = generation.prompt.to_vec();
        let mut outcome = GenerationOutcome {
            tokens: Vec::new(),
            finish_reason: FinishReason::Length,
            prefill: Duration::ZERO,
            ttft: Duration::ZERO,
            decode: Duration::ZERO,
            decode_steps: 0,
            pages: 0,
            decode_stats: AttendStats::default(),
        };
        let mut reason = None;
        for chunk in generation.prompt.chunks(generation.prefill_chunk) {
            let last = table.len() + chunk.len() == total;
            let rows = if last { LogitRows::Last } else { LogitRows::None };
            self.step(table, chunk, Attention::Dense, rows, false)?;
            let done = table.len();
            if let ControlFlow::Break(why) = on_event(GenerationEvent::Prefilled { done, total })? {
                reason = Some(why);
                break;
            }
        }
        outcome.prefill = start.elapsed();
        let decode_start = Instant::now();
        while reason.is_none() {
            let logits = self.output.logits(0).last();
            let logits = logits.ok_or(ModelError::EmptyPrompt)?;
            let token = sampler.sample(logits, &history)?;
            if outcome.tokens.is_empty() {
                outcome.ttft = start.elapsed();
            }
            history.push(token.id);
            outcome.tokens.push(token);
            let ends = generation.stop_tokens.contains(&token.id);
            let event = on_event(GenerationEvent::Token { token, ends })?;
            reason = match event {
                ControlFlow::Break(why) => Some(why),
                ControlFlow::Continue(()) if ends => Some(FinishReason::Stop),
                ControlFlow::Continue(())
                    if outcome.tokens.len() == generation.max_tokens || history.len() > limit =>
                {
                    Some(FinishReason::Length)
                }
                ControlFlow::Continue(()) => {
                    // Nothing but 0 is a multiple of 0, so the interval 0 needs its own test.
                    let interval = generation.recall_interval;
                    let measure = interval > 0 && outcome.decode_steps.is_multiple_of(interval);
                    let (attention, rows) = (generation.attention, LogitRows::Last);
                    self.step(table, &[token.id], attention, rows, measure)?;
                    outcome.decode_steps += 1;
                    outcome.decode_stats.add(self.output.stats());
                    None
                }
            };
        }
        outcome.decode = decode_start.elapsed();
        outcome.finish_reason = reason.unwrap_or(FinishReason::Length);
        outcome.pages = table.pages().len();
        Ok(outcome)
    }

    fn step(
        &mut self,
        table: &mut PageTable,
        tokens: &[u32],
        attention: Attention<'_>,
        logits: LogitRows,
        measure_recall: bool,
    ) -> Result<(), ModelError> {
        self.cache.extend(self.model.backend(), table, tokens.len())?;
        let observe = Observe::NOTHING;
        let step = SequenceStep { tokens, table, attention, logits, observe };
        let batch = Batch { sequences: &[step], measure_recall };
        self.model.forward(&mut self.activations, &mut self.cache, &batch, &mut self.output)
    }
}
