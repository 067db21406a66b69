//! Sequences through a model, timed without tokenising and sampling.

use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::Result;
use tinyserve::TinyServeError;
use tinyserve::kernels::{AttendStats, Attention, Cpu, Profile, Profiled, SelectionTimes};
use tinyserve::kv::{PageTable, Prefix};
use tinyserve::model::{
    Activations, Batch, KvCache, LogitRows, Model, ModelError, Observe, SequenceStep,
    SessionToSave, StepOutput, SyntheticNormal,
};

use super::device::Measurable;

/// A model with a cache and made-up tokens; its operations are timed where a run asks for it.
pub(super) struct Runner<B: Measurable + Sync = Cpu> {
    model: Model<Profiled<B>>,
    cache: KvCache<Profiled<B>>,
    activations: Activations<Profiled<B>>,
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

/// What a session takes to compute, to save and to restore.
#[derive(Debug, Clone, Copy)]
pub(super) struct SessionTimes {
    pub(super) prefill: Duration,
    pub(super) save: Duration,
    pub(super) restore: Duration,
    /// Tokens that were restored.
    pub(super) tokens: usize,
}

/// How tokens come into the cache before a test.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum DepthFill {
    /// Random keys and values.
    Synthetic,
    /// The forward pass over random tokens.
    Prefill,
}

impl DepthFill {
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Synthetic => "synthetic",
            Self::Prefill => "prefill",
        }
    }
}

impl<B: Measurable + Sync> Runner<B> {
    pub(super) fn new(
        model: Model<Profiled<B>>,
        cache: KvCache<Profiled<B>>,
        chunk: usize,
    ) -> Self {
        let activations = Activations::new(&model);
        let tokens = RandomTokens::new(model.config().vocab_size);
        Self { model, cache, activations, output: StepOutput::default(), tokens, chunk }
    }

    /// `sequences` sequences of `depth` tokens, not timed; each has pages of its own.
    pub(super) fn fill(
        &mut self,
        sequences: usize,
        depth: usize,
        fill: DepthFill,
    ) -> Result<Vec<PageTable>> {
        let mut tables: Vec<_> = (0..sequences).map(|_| self.cache.new_table()).collect();
        match fill {
            DepthFill::Prefill => {
                self.prefill(&mut tables, depth, LogitRows::None)?;
            }
            DepthFill::Synthetic => {
                let mut random = SyntheticNormal::new(0, "keys and values");
                let mut fill = || -> Result<(), ModelError> {
                    let Some((first, others)) = tables.split_first_mut() else { return Ok(()) };
                    self.model.append_synthetic(&mut self.cache, first, depth, &mut random)?;
                    // The same bytes in other places take as long to read, and no time to make.
                    for table in others {
                        *table = self.cache.duplicate(self.model.backend(), first)?;
                    }
                    Ok(())
                };
                fill().map_err(TinyServeError::from)?;
            }
        }
        Ok(tables)
    }

    /// Times a prefill, saving what it computed to `file`, and restoring it from there.
    pub(super) fn session(&mut self, tokens: usize, file: &Path) -> Result<SessionTimes> {
        let mut tables = vec![self.cache.new_table()];
        let start = Instant::now();
        self.prefill(&mut tables, tokens, LogitRows::Last)?;
        let prefill = start.elapsed();
        let names: Vec<u32> = (0..tokens as u32).collect();
        let session = SessionToSave {
            identity: "bench",
            prefix: Prefix { salt: "", tokens: &names },
            selected: &[],
            table: &tables[0],
        };
        let backend = self.model.backend();
        let start = Instant::now();
        self.cache.save_session(backend, file, session).map_err(TinyServeError::from)?;
        let save = start.elapsed();
        self.release(tables);
        let backend = self.model.backend();
        let start = Instant::now();
        let restored =
            self.cache.restore_session(backend, file, "bench").map_err(TinyServeError::from)?;
        let restore = start.elapsed();
        let tokens = restored.table.len();
        self.release(vec![restored.table]);
        Ok(SessionTimes { prefill, save, restore, tokens })
    }

    /// What the model runs on.
    pub(super) fn backend(&self) -> &B {
        self.model.backend().inner()
    }

    /// Forgets sequences.
    pub(super) fn release(&mut self, tables: Vec<PageTable>) {
        for table in tables {
            self.cache.release(table);
        }
    }

    /// Appends a prompt of `tokens` tokens to a copy of each of `filled`, then `steps` tokens, one
    /// step each; tells what either took.
    pub(super) fn time(
        &mut self,
        filled: &[PageTable],
        (tokens, steps): (usize, usize),
        attention: Attention<'_>,
    ) -> Result<[Sample; 2]> {
        // The copies share their whole pages, so every run starts from the same depth.
        let mut tables: Vec<_> = filled.iter().map(|table| self.cache.fork(table)).collect();
        let run = |runner: &mut Self, tables: &mut [PageTable]| {
            let start = Instant::now();
            let stats = runner.prefill(tables, tokens, LogitRows::Last)?;
            let prefill = Sample { elapsed: start.elapsed(), stats };
            let start = Instant::now();
            let stats = runner.decode(tables, steps, attention)?;
            Ok([prefill, Sample { elapsed: start.elapsed(), stats }])
        };
        let samples = run(self, &mut tables);
        self.release(tables);
        samples
    }

    /// As the decode half of [`Self::time`], with what its operations took.
    pub(super) fn profile(
        &mut self,
        filled: &[PageTable],
        steps: usize,
        attention: Attention<'_>,
    ) -> Result<(Duration, Profile, SelectionTimes)> {
        let device = self.model.backend();
        // What came before is not asked for.
        let _ = (device.take(), device.inner().take_selection_times());
        device.switch(true);
        device.inner().time_selection(true);
        let samples = self.time(filled, (0, steps), attention);
        let device = self.model.backend();
        device.switch(false);
        device.inner().time_selection(false);
        Ok((
            samples?[1].elapsed,
            device.take(),
            device.inner().take_selection_times().unwrap_or_default(),
        ))
    }

    fn decode(
        &mut self,
        tables: &mut [PageTable],
        steps: usize,
        attention: Attention<'_>,
    ) -> Result<AttendStats> {
        let mut stats = AttendStats::default();
        for _ in 0..steps {
            let pieces: Vec<_> = (0..tables.len())
                .map(|sequence| Piece { sequence, tokens: 1, last: true })
                .collect();
            self.step(tables, &pieces, attention, LogitRows::Last)?;
            stats.add(self.output.stats());
        }
        Ok(stats)
    }

    /// Steps of up to `chunk` tokens, which short prompts share.
    fn prefill(
        &mut self,
        tables: &mut [PageTable],
        tokens: usize,
        last: LogitRows,
    ) -> Result<AttendStats> {
        let mut stats = AttendStats::default();
        let (mut sequence, mut done) = (0, 0);
        while tokens > 0 && sequence < tables.len() {
            let (mut pieces, mut room) = (Vec::new(), self.chunk);
            while room > 0 && sequence < tables.len() {
                let n = room.min(tokens - done);
                (room, done) = (room - n, done + n);
                pieces.push(Piece { sequence, tokens: n, last: done == tokens });
                if done == tokens {
                    (sequence, done) = (sequence + 1, 0);
                }
            }
            self.step(tables, &pieces, Attention::Dense, last)?;
            stats.add(self.output.stats());
        }
        Ok(stats)
    }

    fn step(
        &mut self,
        tables: &mut [PageTable],
        pieces: &[Piece],
        attention: Attention<'_>,
        last: LogitRows,
    ) -> Result<()> {
        let mut step = || -> Result<(), ModelError> {
            let mut tokens = Vec::new();
            for piece in pieces {
                let table = &mut tables[piece.sequence];
                self.cache.extend(self.model.backend(), table, piece.tokens)?;
                tokens.push((0..piece.tokens).map(|_| self.tokens.next()).collect::<Vec<_>>());
            }
            let sequences: Vec<_> = pieces
                .iter()
                .zip(&tokens)
                .map(|(piece, tokens)| SequenceStep {
                    tokens,
                    table: &tables[piece.sequence],
                    attention,
                    logits: if piece.last { last } else { LogitRows::None },
                    observe: Observe::NOTHING,
                })
                .collect();
            let batch = Batch { sequences: &sequences, measure_recall: false, list_pages: false };
            self.model.forward(&mut self.activations, &mut self.cache, &batch, &mut self.output)
        };
        Ok(step().map_err(TinyServeError::from)?)
    }
}

/// What one sequence does in a step.
struct Piece {
    sequence: usize,
    tokens: usize,
    /// Whether its prompt ends here.
    last: bool,
}

/// The same tokens in every run of the program (splitmix64).
pub(super) struct RandomTokens {
    state: u64,
    vocab: u64,
}

impl RandomTokens {
    pub(super) fn new(vocab: usize) -> Self {
        Self::seeded(0, vocab)
    }

    pub(super) fn seeded(state: u64, vocab: usize) -> Self {
        Self { state, vocab: vocab as u64 }
    }

    pub(super) fn next(&mut self) -> u32 {
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
