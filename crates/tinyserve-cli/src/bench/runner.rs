//! One sequence through a model, timed without tokenising and sampling.

use std::time::{Duration, Instant};

use anyhow::Result;
use tinyserve::TinyServeError;
use tinyserve::kernels::{AttendStats, Attention, Cpu};
use tinyserve::kv::PageTable;
use tinyserve::model::{
    Activations, Batch, KvCache, LogitRows, Model, ModelError, SequenceStep, StepOutput,
};

/// A model with a cache and made-up tokens.
pub(super) struct Runner {
    model: Model<Cpu>,
    cache: KvCache<Cpu>,
    activations: Activations<Cpu>,
    output: StepOutput,
    tokens: RandomTokens,
    /// Most tokens of one prefill step.
    chunk: usize,
}

/// What one timed run took and read.
#[derive(Debug, Clone, Copy)]
pub(super) struct Sample {
    pub(super) elapsed: Duration,
    pub(super) stats: AttendStats,
}

impl Runner {
    pub(super) fn new(model: Model<Cpu>, cache: KvCache<Cpu>, chunk: usize) -> Self {
        let activations = Activations::new(&model);
        let tokens = RandomTokens::new(model.config().vocab_size);
        Self { model, cache, activations, output: StepOutput::default(), tokens, chunk }
    }

    /// A sequence of `depth` tokens, not timed.
    pub(super) fn fill(&mut self, depth: usize) -> Result<PageTable> {
        let mut table = self.cache.new_table();
        self.prefill(&mut table, depth, LogitRows::None)?;
        Ok(table)
    }

    /// Forgets a sequence.
    pub(super) fn release(&mut self, table: PageTable) {
        self.cache.release(table);
    }

    /// Appends a prompt of `tokens` tokens to a copy of `filled`.
    pub(super) fn time_prefill(&mut self, filled: &PageTable, tokens: usize) -> Result<Sample> {
        self.time(filled, |runner, table| runner.prefill(table, tokens, LogitRows::Last))
    }

    /// Appends `tokens` tokens, one step each, to a copy of `filled`.
    pub(super) fn time_decode(
        &mut self,
        filled: &PageTable,
        tokens: usize,
        attention: Attention<'_>,
    ) -> Result<Sample> {
        self.time(filled, |runner, table| {
            let mut stats = AttendStats::default();
            for _ in 0..tokens {
                let token = runner.tokens.next();
                runner.step(table, &[token], attention, LogitRows::Last)?;
                stats.add(runner.output.stats());
            }
            Ok(stats)
        })
    }

    fn time(
        &mut self,
        filled: &PageTable,
        work: impl FnOnce(&mut Self, &mut PageTable) -> Result<AttendStats>,
    ) -> Result<Sample> {
        // The copy shares its whole pages, so every run starts from the same depth.
        let mut table = self.cache.fork(filled);
        let start = Instant::now();
        let stats = work(self, &mut table);
        let elapsed = start.elapsed();
        self.cache.release(table);
        Ok(Sample { elapsed, stats: stats? })
    }

    fn prefill(
        &mut self,
        table: &mut PageTable,
        tokens: usize,
        last: LogitRows,
    ) -> Result<AttendStats> {
        let prompt: Vec<_> = (0..tokens).map(|_| self.tokens.next()).collect();
        let mut stats = AttendStats::default();
        let mut chunks = prompt.chunks(self.chunk).peekable();
        while let Some(chunk) = chunks.next() {
            let rows = if chunks.peek().is_none() { last } else { LogitRows::None };
            self.step(table, chunk, Attention::Dense, rows)?;
            stats.add(self.output.stats());
        }
        Ok(stats)
    }

    fn step(
        &mut self,
        table: &mut PageTable,
        tokens: &[u32],
        attention: Attention<'_>,
        logits: LogitRows,
    ) -> Result<()> {
        let mut step = || -> Result<(), ModelError> {
            self.cache.extend(self.model.backend(), table, tokens.len())?;
            let step = SequenceStep { tokens, table, attention, logits };
            let batch = Batch { sequences: &[step], measure_recall: false };
            self.model.forward(&mut self.activations, &mut self.cache, &batch, &mut self.output)
        };
        Ok(step().map_err(TinyServeError::from)?)
    }
}

/// The same tokens in every run of the program (splitmix64).
struct RandomTokens {
    state: u64,
    vocab: u64,
}

impl RandomTokens {
    fn new(vocab: usize) -> Self {
        Self { state: 0, vocab: vocab as u64 }
    }

    fn next(&mut self) -> u32 {
        self.state = self.state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.state;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((z ^ (z >> 31)) % self.vocab) as u32
    }
}

#[cfg(test)]
mod tests {
    use super::RandomTokens;

    #[test]
    fn tokens_are_spread_over_the_vocabulary() {
        let mut tokens = RandomTokens::new(100);
        let mut seen = [0; 100];
        for _ in 0..10_000 {
            seen[tokens.next() as usize] += 1;
        }
        assert!(seen.iter().all(|&n| n > 50 && n < 200), "{seen:?}");
    }
}
