//! A toy in a model's place: its pages hold the tokens themselves, and the next token is a hash of
//! all that it reads, so that a page in the wrong place or of somebody else changes the text.
//!
//! A token that was computed by reading less than all that comes before it, or something that was,
//! is not itself in its page: it is that and a hash of what it read.

use std::collections::HashMap;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::time::Duration;

use tinyserve_kernels::{AttendStats, Attention, TopLogits, TopRow};
use tinyserve_kv::{
    EvictionCause, EvictionPolicy, KvError, KvFormat, KvLayout, KvShape, PagePool, PageTable,
    Prefix, PrefixIndex, PrefixOptions, PrefixStats, TokenMove, select_pages,
};
use tinyserve_model::{
    Batch, LogitRows, ModelError, RestoredSession, SelectedTokens, SequenceStep, SessionToSave,
};
use tinyserve_sched::{Clock, Runner, RunnerShape};

pub(crate) const VOCAB: usize = 40;
/// A step with this token fails.
pub(crate) const FAILS: u32 = 38;
/// A step with this token panics, saying [`PANIC`].
pub(crate) const PANICS: u32 = 39;
/// What tests that expect it need not see.
pub(crate) const PANIC: &str = "the toy panics";
/// Tokens below this one are drawn.
pub(crate) const DRAWN: u32 = 37;

/// A session that was saved.
struct Saved {
    tokens: Vec<u32>,
    salt: String,
    selected: Vec<SelectedTokens>,
    pages: Vec<Vec<u32>>,
}

pub(crate) struct Toy {
    pool: PagePool,
    prefixes: PrefixIndex,
    page_size: usize,
    /// What each page holds; what was never written is no token.
    pages: Vec<Vec<u32>>,
    /// Rows of logits, sequence by sequence.
    logits: Vec<Vec<Vec<f32>>>,
    /// What the sequences that ask for no more are told instead.
    tops: Vec<Option<TopLogits>>,
    /// Extending dies, outside of what a step may, after so many times.
    pub(crate) dies_at: Option<usize>,
    /// What a step takes, and what it takes more for each page that it reads, on a clock.
    pub(crate) takes: Option<(Clock, Duration, Duration)>,
    /// Most tokens of a step so far.
    pub(crate) largest_step: usize,
    /// Most sequences of a step so far.
    pub(crate) widest_step: usize,
    /// In files' place.
    saved: Mutex<HashMap<PathBuf, Saved>>,
    /// What was computed for the last token of each text, where that is to be the same when it is
    /// computed again: no two requests have the same text then.
    pub(crate) once: Option<HashMap<Vec<u32>, u32>>,
    /// Tokens that were computed again, and read less than all, so far.
    pub(crate) selected_again: usize,
}

impl Toy {
    pub(crate) fn new(pages: usize, page_size: usize) -> Self {
        let (layers, kv_heads, head_dim, format) = (1, 1, 8, KvFormat::F16);
        let layout = KvLayout::new(KvShape { layers, kv_heads, head_dim, page_size, format });
        let options = PrefixOptions {
            identity: "toy",
            layout: layout.unwrap(),
            policy: EvictionPolicy::Lru,
            max_pages: pages,
        };
        Self {
            pool: PagePool::new(pages).unwrap(),
            prefixes: PrefixIndex::new(options),
            page_size,
            pages: vec![vec![u32::MAX; page_size]; pages],
            logits: Vec::new(),
            tops: Vec::new(),
            dies_at: None,
            takes: None,
            largest_step: 0,
            widest_step: 0,
            saved: Mutex::default(),
            once: None,
            selected_again: 0,
        }
    }
}

impl Toy {
    /// Pages that a step would read in a layer that selects.
    fn pages_read(&self, step: &SequenceStep<'_>) -> usize {
        let (tokens, all) = (step.table.len(), step.table.pages().len());
        match step.attention {
            Attention::Policy(policy) => {
                policy.page_budget(policy.dense_layers, tokens, self.page_size).unwrap_or(all)
            }
            _ => all,
        }
    }

    fn values(&self, table: &PageTable, places: Range<usize>) -> impl Iterator<Item = u32> {
        places.map(|place| {
            let slot = table.slot(place);
            self.pages[slot.page.index()][slot.offset]
        })
    }

    /// What the token at `place` reads of those before it.
    fn reads(&self, step: &SequenceStep<'_>, place: usize) -> Vec<u32> {
        let size = self.page_size;
        let budget = match step.attention {
            Attention::Policy(policy) => policy.page_budget(policy.dense_layers, place + 1, size),
            _ => None,
        };
        let (Some(budget), Attention::Policy(policy)) = (budget, step.attention) else {
            return self.values(step.table, 0..place).collect();
        };
        let page = |page: usize| page * size..((page + 1) * size).min(place);
        let scores: Vec<f32> = (0..=place / size)
            .map(|number| hash(self.values(step.table, page(number))) as u16 as f32)
            .collect();
        let mut selected = Vec::new();
        select_pages(&scores, budget, policy.sink_pages, policy.recent_pages, &mut selected);
        selected.iter().flat_map(|&number| self.values(step.table, page(number as usize))).collect()
    }

    /// Puts `token` into its page; returns all that it reads, itself included.
    fn compute(&mut self, step: &SequenceStep<'_>, place: usize, token: u32) -> Vec<u32> {
        let mut reads = self.reads(step, place);
        let whole = reads.len() == step.table.position(place);
        let plain = whole && reads.iter().all(|&value| value < VOCAB as u32);
        let value = if plain {
            token
        } else {
            token + VOCAB as u32 * (1 + hash(reads.iter().copied()) as u32 % 100_000)
        };
        if let Some(once) = &mut self.once {
            let before = (0..place).map(|place| {
                let slot = step.table.slot(place);
                self.pages[slot.page.index()][slot.offset] % VOCAB as u32
            });
            let text: Vec<u32> = before.chain([token]).collect();
            if let Some(before) = once.insert(text, value) {
                assert_eq!(value, before, "token {place} was computed again, otherwise");
                self.selected_again += usize::from(!whole);
            }
        }
        let slot = step.table.slot(place);
        self.pages[slot.page.index()][slot.offset] = value;
        reads.push(value);
        reads
    }
}

fn hash(tokens: impl IntoIterator<Item = u32>) -> u64 {
    let mut hash = 0xcbf2_9ce4_8422_2325_u64;
    for token in tokens {
        hash = (hash ^ u64::from(token)).wrapping_mul(0x100_0000_01b3);
    }
    hash ^ (hash >> 29)
}

/// The token that follows `tokens`.
pub(crate) fn next(tokens: &[u32]) -> u32 {
    (hash(tokens.iter().copied()) % u64::from(DRAWN)) as u32
}

impl Runner for Toy {
    fn shape(&self) -> RunnerShape {
        RunnerShape {
            vocab: VOCAB,
            max_positions: 1000,
            page_size: self.page_size,
            bytes_per_page: 64,
            weight_bytes: 0,
        }
    }

    fn pool(&self) -> &PagePool {
        &self.pool
    }

    fn available_pages(&self) -> usize {
        self.pool.free_pages() + self.pool.idle_pages()
    }

    fn known(&self, prompt: Prefix<'_>) -> usize {
        self.prefixes.peek(prompt)
    }

    fn start(&mut self, prompt: Prefix<'_>) -> PageTable {
        self.prefixes.lookup(&mut self.pool, prompt)
    }

    fn remember(&mut self, prefix: Prefix<'_>, table: &mut PageTable) {
        let whole = prefix.tokens.len().min(table.intact()) / self.page_size * self.page_size;
        let held: Vec<u32> = self.values(table, 0..whole).collect();
        assert_eq!(held, prefix.tokens[..whole], "what is shared is what anybody computes");
        self.prefixes.insert(&mut self.pool, prefix, table);
    }

    fn prefix_stats(&self) -> Option<PrefixStats> {
        assert!(self.prefixes.is_consistent(&self.pool));
        Some(self.prefixes.stats())
    }

    fn extend(&mut self, table: &mut PageTable, tokens: usize) -> Result<(), KvError> {
        if let Some(left) = &mut self.dies_at {
            *left = left.checked_sub(1).expect(PANIC);
        }
        let copy = match table.extend(&mut self.pool, tokens) {
            Err(KvError::OutOfPages { needed, free, .. })
                if needed <= free + self.pool.idle_pages() =>
            {
                self.prefixes.evict(&mut self.pool, needed - free, EvictionCause::Room);
                table.extend(&mut self.pool, tokens)?
            }
            result => result?,
        };
        if let Some(copy) = copy {
            self.pages[copy.to.index()] = self.pages[copy.from.index()].clone();
        }
        Ok(())
    }

    fn truncate(&mut self, table: &mut PageTable, tokens: usize) -> usize {
        table.truncate(&mut self.pool, tokens);
        table.len()
    }

    fn prune(&mut self, table: &mut PageTable, places: &[u32]) -> Result<(), ModelError> {
        let moves = match table.prune(&mut self.pool, places) {
            Err(KvError::OutOfPages { needed, free, .. })
                if needed <= free + self.pool.idle_pages() =>
            {
                self.prefixes.evict(&mut self.pool, needed - free, EvictionCause::Room);
                table.prune(&mut self.pool, places)?
            }
            result => result?,
        };
        for TokenMove { from, to, .. } in moves {
            let token = self.pages[from.page.index()][from.offset];
            self.pages[to.page.index()][to.offset] = token;
        }
        Ok(())
    }

    fn save_session(&self, path: &Path, session: SessionToSave<'_>) -> Result<usize, ModelError> {
        let SessionToSave { prefix, selected, table, .. } = session;
        assert_eq!(table.len(), table.next_position(), "pruned sessions are not saved");
        let pages = &table.pages()[..table.len() / self.page_size];
        let pages: Vec<_> = pages.iter().map(|page| self.pages[page.index()].clone()).collect();
        let tokens = pages.len() * self.page_size;
        let saved = Saved {
            tokens: prefix.tokens.to_vec(),
            salt: prefix.salt.to_owned(),
            selected: selected.to_vec(),
            pages,
        };
        self.saved.lock().unwrap().insert(path.to_owned(), saved);
        Ok(tokens)
    }

    fn restore_session(&mut self, path: &Path, _: &str) -> Result<RestoredSession, ModelError> {
        let saved = self.saved.lock().unwrap().remove(path).expect("it was saved");
        let mut table = PageTable::new(self.page_size);
        let Saved { tokens, salt, selected, pages } = saved;
        if let Err(error) = self.extend(&mut table, pages.len() * self.page_size) {
            let saved = Saved { tokens, salt, selected, pages };
            self.saved.lock().unwrap().insert(path.to_owned(), saved);
            return Err(error.into());
        }
        for (page, values) in table.pages().iter().zip(pages) {
            self.pages[page.index()] = values;
        }
        Ok(RestoredSession { table, tokens, salt, selected })
    }

    fn release(&mut self, table: PageTable) {
        table.release(&mut self.pool);
    }

    fn run(&mut self, batch: &Batch<'_>) -> Result<(), ModelError> {
        self.widest_step = self.widest_step.max(batch.sequences.len());
        let tokens = batch.sequences.iter().map(|step| step.tokens.len()).sum();
        self.largest_step = self.largest_step.max(tokens);
        if let Some((clock, fixed, page)) = &self.takes {
            let pages = batch.sequences.iter().map(|step| self.pages_read(step)).sum::<usize>();
            clock.advance(*fixed + *page * pages as u32);
        }
        self.logits.clear();
        self.tops.clear();
        for step in batch.sequences {
            assert!(!step.tokens.contains(&PANICS), "{PANIC}");
            if step.tokens.contains(&FAILS) {
                return Err(ModelError::NotFinite { what: "the toy" });
            }
            let first = step.first_place();
            let read: Vec<Vec<u32>> = (first..)
                .zip(step.tokens)
                .map(|(place, &token)| self.compute(step, place, token))
                .collect();
            let rows = match step.logits {
                LogitRows::None => &[],
                LogitRows::Last | LogitRows::Top(_) => &read[read.len() - 1..],
                LogitRows::All => &read[..],
            };
            let rows = rows.iter().map(|read| {
                let mut logits = vec![0.0; VOCAB];
                logits[PANICS as usize] = -100.0;
                logits[FAILS as usize] = -100.0;
                logits[next(read) as usize] = 3.0;
                logits
            });
            let mut rows: Vec<Vec<f32>> = rows.collect();
            self.tops.push(match step.logits {
                LogitRows::Top(k) => {
                    let mut top = TopLogits::default();
                    top.begin(k, VOCAB);
                    // Whoever asked for these has no logits.
                    rows.drain(..).for_each(|logits| top.push_row(&logits));
                    Some(top)
                }
                _ => None,
            });
            self.logits.push(rows);
        }
        Ok(())
    }

    fn logits(&self, sequence: usize, row: usize) -> &[f32] {
        &self.logits[sequence][row]
    }

    fn top(&self, sequence: usize) -> Option<TopRow<'_>> {
        self.tops[sequence].as_ref().map(|top| top.row(0))
    }

    fn read(&self, _: usize) -> AttendStats {
        AttendStats::default()
    }
}
