//! Sequences in pages, with garbage around them, and attention written down plainly.
#![allow(dead_code, reason = "each test binary uses its own part")]

use proptest::prelude::*;
use tinyserve_kernels::conformance::{CaseOutcome, Table};
use tinyserve_kernels::{
    AppendKvArgs, AttendArgs, AttendSequence, AttendStats, Attention, Backend, Cpu, CpuOptions,
    CpuPath, Heads, KernelError, PageLists,
};
use tinyserve_kv::{
    HostPages, KvElement, KvFormat, KvLayout, KvShape, PagePool, PageTable, Slot, with_elements,
};

/// The layer that is written and read, of two.
pub(crate) const LAYER: usize = 1;

/// A small deterministic source of numbers (SplitMix64).
pub(crate) struct Numbers(pub(crate) u64);

impl Numbers {
    pub(crate) fn bits(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let x = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        x ^ (x >> 31)
    }

    /// In [−1, 1).
    pub(crate) fn number(&mut self) -> f32 {
        (self.bits() >> 40) as f32 / (1u64 << 23) as f32 - 1.0
    }

    pub(crate) fn numbers(&mut self, n: usize) -> Vec<f32> {
        (0..n).map(|_| self.number()).collect()
    }
}

/// A backend per path that this processor has, on `threads` threads.
pub(crate) fn every_backend(threads: usize) -> Vec<Cpu> {
    CpuPath::available()
        .map(|path| Cpu::new(CpuOptions { threads: Some(threads), path: Some(path) }).unwrap())
        .collect()
}

/// As [`every_backend`], without those that differ from another in products with weights alone.
pub(crate) fn backends(threads: usize) -> Vec<Cpu> {
    every_backend(threads).into_iter().filter(|cpu| !cpu.path().rounds_inputs()).collect()
}

/// Shapes of a cache: grouped heads, odd head sizes, pages of one token and of more than there are.
pub(crate) fn shapes() -> impl Strategy<Value = (Heads, KvLayout)> {
    let heads = prop::sample::select(vec![(1, 1), (2, 1), (4, 2), (3, 3), (8, 2), (5, 1), (8, 1)]);
    // Odd ones, and for vectors of 8 and of 16: four at a time, then single ones, then a part.
    let wide = prop::sample::select(vec![33usize, 40, 48, 64, 70, 80, 128]);
    let head_dim = prop_oneof![1usize..=20, wide];
    let page_size = prop_oneof![Just(1usize), 2usize..=9, Just(16), Just(32), Just(40), Just(64)];
    // Open pages of codes are in f16, or in f32.
    let formats = (prop::sample::select(&KvFormat::ALL[..]), any::<bool>());
    (heads, head_dim, page_size, formats).prop_map(
        |((q_heads, kv_heads), head_dim, page_size, (format, wide))| {
            let shape = KvShape { layers: 2, kv_heads, head_dim, page_size, format };
            let mut layout = KvLayout::new(shape).unwrap();
            if wide && format.is_quantised() {
                layout = layout.with_open_format(KvFormat::F32).unwrap();
            }
            (Heads { q_heads, kv_heads, head_dim }, layout)
        },
    )
}

/// Sequences in pages; whatever no token has written is NaN.
pub(crate) struct Cache {
    pub(crate) heads: Heads,
    pub(crate) pages: HostPages,
    pub(crate) tables: Vec<PageTable>,
}

impl Cache {
    /// Room for sequences of `lengths` tokens, whose pages lie among each other.
    pub(crate) fn new(heads: Heads, layout: KvLayout, lengths: &[usize]) -> Self {
        let capacity: usize = lengths.iter().map(|&tokens| layout.pages_for(tokens)).sum();
        let mut pool = PagePool::new(capacity).unwrap();
        let mut pages = HostPages::new(layout, capacity).unwrap();
        let mut tables: Vec<PageTable> =
            lengths.iter().map(|_| PageTable::new(layout.page_size())).collect();
        for token in 0..lengths.iter().copied().max().unwrap_or(0) {
            for (table, _) in tables.iter_mut().zip(lengths).filter(|(_, length)| token < **length)
            {
                assert_eq!(table.extend(&mut pool, 1).unwrap(), None);
            }
        }
        let garbage = vec![f32::NAN; heads.kv_heads * heads.head_dim];
        for page in tables.iter().flat_map(PageTable::pages) {
            for offset in 0..layout.page_size() {
                for layer in 0..2 {
                    let slot = Slot { page: *page, offset };
                    pages.append(layer, slot, &garbage, &garbage);
                }
            }
        }
        Self { heads, pages, tables }
    }

    /// Appends the tokens of sequence `index` from `first` on; `qkv` is `[tokens, qkv_width]`.
    pub(crate) fn append(&mut self, cpu: &Cpu, index: usize, first: usize, qkv: &[f32]) {
        self.append_batch(cpu, &[(index, first)], &[qkv]);
    }

    /// Appends tokens of several sequences in one step, as [`Self::append`] does of one.
    pub(crate) fn append_batch(&mut self, cpu: &Cpu, places: &[(usize, usize)], qkv: &[&[f32]]) {
        let width = self.heads.qkv_width();
        let slots: Vec<Slot> = places
            .iter()
            .zip(qkv)
            .flat_map(|(&(index, first), qkv)| {
                let table = &self.tables[index];
                (first..first + qkv.len() / width).map(|token| table.slot(token))
            })
            .collect();
        let mut tensor = cpu.tensor(width);
        cpu.upload(&qkv.concat(), &mut tensor);
        cpu.append_kv(AppendKvArgs {
            layer: LAYER,
            heads: self.heads,
            qkv: &tensor,
            slots: &slots,
            pages: &mut self.pages,
        });
    }

    /// Attention of `rows`, `[rows, qkv_width]`: for each sequence its number, the position of its
    /// first row, its rows, and what it reads.
    pub(crate) fn attend(
        &self,
        cpu: &Cpu,
        qkv: &[f32],
        steps: &[(usize, usize, usize, Attention<'_>)],
        measure_recall: bool,
    ) -> Result<(Vec<f32>, AttendStats), KernelError> {
        self.attend_listing(cpu, qkv, steps, (measure_recall, None))
    }

    /// As [`Self::attend`], with the lists that selections chose.
    pub(crate) fn attend_listing(
        &self,
        cpu: &Cpu,
        qkv: &[f32],
        steps: &[(usize, usize, usize, Attention<'_>)],
        (measure_recall, page_lists): (bool, Option<&mut PageLists>),
    ) -> Result<(Vec<f32>, AttendStats), KernelError> {
        let mut tensor = cpu.tensor(self.heads.qkv_width());
        cpu.upload(qkv, &mut tensor);
        let mut start = 0;
        let sequences: Vec<AttendSequence<'_>> = steps
            .iter()
            .map(|&(index, first_position, rows, attention)| {
                let rows = start..start + rows;
                start = rows.end;
                let pages = self.tables[index].pages();
                AttendSequence { rows, first_position, pages, attention }
            })
            .collect();
        let mut out = cpu.tensor(self.heads.q_columns().len());
        let mut of_sequences = vec![AttendStats::default(); sequences.len()];
        let stats = cpu.attend(AttendArgs {
            layer: LAYER,
            heads: self.heads,
            qkv: &tensor,
            scale: self.scale(),
            sequences: &sequences,
            pages: &self.pages,
            measure_recall,
            page_lists,
            sequence_stats: Some(&mut of_sequences),
            observe: None,
            out: &mut out,
        })?;
        let mut sum = AttendStats::default();
        of_sequences.iter().for_each(|stats| sum.add(stats));
        // Recalls are added up in another order: they may differ in their last bits.
        assert!((sum.recall_sum - stats.recall_sum).abs() <= 1e-9 * (1.0 + stats.recall_sum));
        sum.recall_sum = stats.recall_sum;
        assert_eq!(sum, stats, "what sequences read, and what all read together");
        Ok((out.values().to_vec(), stats))
    }

    pub(crate) fn scale(&self) -> f32 {
        (self.heads.head_dim as f32).sqrt().recip()
    }

    /// Key and value of one token, widened, as a row sees it that sees `tokens` tokens: those of the
    /// row's own page as they were appended, others as codes where the format has them.
    fn token(
        &self,
        (index, tokens, kv_head): (usize, usize, usize),
        token: usize,
    ) -> (Vec<f64>, Vec<f64>) {
        let (dim, size) = (self.heads.head_dim, self.pages.layout().page_size());
        let Slot { page, offset } = self.tables[index].slot(token);
        let own = token / size == (tokens - 1) / size;
        with_elements!(self.pages.layout(), (E, O) => {
            let widen = |x: O| f64::from(KvElement::to_f32(x));
            if self.pages.layout().shape().format.is_quantised() && !own {
                let codes = self.pages.code_page(LAYER, page, kv_head);
                let corners = self.pages.page_box::<E>(LAYER, page, kv_head);
                let corners = corners.min().map(KvElement::to_f32)
                    .zip(corners.max().map(KvElement::to_f32));
                let key = corners.enumerate().map(|(c, corners)| codes.key(offset, c, corners));
                let value = (0..dim).map(|c| codes.value(offset, c));
                return (key.map(f64::from).collect(), value.map(f64::from).collect());
            }
            let head = self.pages.head::<O>(LAYER, page, kv_head);
            let value = &head.values[offset * dim..(offset + 1) * dim];
            (head.key(offset).map(widen).collect(), value.iter().map(|&x| widen(x)).collect())
        })
    }

    /// Scaled scores of one query and the first `tokens` tokens of sequence `index`, as stored.
    pub(crate) fn logits(&self, place: (usize, usize, usize), query: &[f32]) -> Vec<f32> {
        let score = |token: usize| {
            let (key, _) = self.token(place, token);
            let dot: f64 = query.iter().zip(key).map(|(&q, k)| f64::from(q) * k).sum();
            (dot * f64::from(self.scale())) as f32
        };
        (0..place.1).map(score).collect()
    }

    /// Dense attention of one query over the first `tokens` tokens of sequence `index`, masked to
    /// those that `reads` names.
    pub(crate) fn masked(
        &self,
        place: (usize, usize, usize),
        query: &[f32],
        reads: impl Fn(usize) -> bool,
    ) -> Vec<f64> {
        let read: Vec<(Vec<f64>, Vec<f64>)> = (0..place.1)
            .filter(|&token| reads(token))
            .map(|token| self.token(place, token))
            .collect();
        let scores: Vec<f64> = read
            .iter()
            .map(|(key, _)| {
                let dot: f64 = query.iter().zip(key).map(|(&q, k)| f64::from(q) * k).sum();
                dot * f64::from(self.scale())
            })
            .collect();
        let peak = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let weights: Vec<f64> = scores.iter().map(|score| (score - peak).exp()).collect();
        let total: f64 = weights.iter().sum();
        (0..self.heads.head_dim)
            .map(|d| weights.iter().zip(&read).map(|(w, (_, v))| w * v[d]).sum::<f64>() / total)
            .collect()
    }
}

/// The bits of numbers: equal only when nothing at all differs.
pub(crate) fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|x| x.to_bits()).collect()
}

/// The table of cases, in parts that run side by side: one for each core.
pub(crate) struct WholeTable(Vec<Table>);

impl WholeTable {
    pub(crate) fn new() -> Self {
        let parts = std::thread::available_parallelism().map_or(1, usize::from);
        Self((0..parts).map(|number| Table::part(number, parts)).collect())
    }

    /// What every case came to, each part on a backend of its own.
    pub(crate) fn run<B: Backend>(&mut self, backend: impl Fn() -> B + Sync) -> Vec<CaseOutcome> {
        let run = |table: &mut Table| {
            let outcomes = table.run(&backend()).unwrap();
            assert!(!outcomes.is_empty());
            outcomes
        };
        std::thread::scope(|scope| {
            let parts = self.0.iter_mut().map(|table| scope.spawn(move || run(table)));
            let parts: Vec<_> = parts.collect();
            parts.into_iter().flat_map(|part| part.join().unwrap()).collect()
        })
    }
}
