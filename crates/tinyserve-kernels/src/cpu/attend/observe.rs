//! What attention tells about its weights: log-sum-exp, entropy, and the mass of each token.

use std::ops::Range;
use std::sync::PoisonError;

use tinyserve_kv::KvLayout;

use super::softmax::State;
use super::tile::chunk_pages;
use super::{Context, Plan, Unit};
use crate::cpu::CpuTensor;
use crate::cpu::columns::Columns;
use crate::{AttendSequence, Heads, ObserveArgs, Store};

/// Where a call leaves what it observes of each query, and which rows' mass is added up.
pub(super) struct Observed<'a> {
    /// `[rows, q_heads]`.
    lse: Columns<'a>,
    /// `[rows, q_heads]`.
    entropy: Columns<'a>,
    /// For each sequence, those of its rows whose mass is added up.
    mass_rows: Option<&'a [Range<usize>]>,
}

/// Where a call leaves the mass of each token.
pub(super) struct MassOut<'a> {
    rows: &'a [Range<usize>],
    out: &'a mut CpuTensor,
}

impl<'a> Observed<'a> {
    pub(super) fn new(
        args: Option<ObserveArgs<'a, CpuTensor>>,
        rows: usize,
        heads: Heads,
        sequences: &[AttendSequence<'_>],
        layout: &KvLayout,
    ) -> (Option<Self>, Option<MassOut<'a>>) {
        let Some(ObserveArgs { lse, entropy, mass }) = args else { return (None, None) };
        let [lse, entropy] = [lse, entropy].map(|tensor| {
            assert_eq!(tensor.columns(), heads.q_heads, "width of what is observed");
            tensor.resize(rows);
            Columns::new(tensor.values_mut(), heads.q_heads)
        });
        let mass = mass.map(|mass| {
            assert_eq!(mass.rows.len(), sequences.len(), "rows with mass for each sequence");
            assert_eq!(mass.out.columns(), layout.page_size(), "width of the mass");
            let counted = sequences.iter().zip(mass.rows).filter(|(_, rows)| !rows.is_empty());
            let pages: usize = counted.map(|(sequence, _)| sequence.pages.len()).sum();
            match mass.store {
                Store::Overwrite => {
                    mass.out.resize(pages * heads.kv_heads);
                    mass.out.values_mut().fill(0.0);
                }
                Store::Add => assert_eq!(mass.out.rows(), pages * heads.kv_heads, "pages of mass"),
            }
            MassOut { rows: mass.rows, out: mass.out }
        });
        let mass_rows = mass.as_ref().map(|mass| mass.rows);
        (Some(Self { lse, entropy, mass_rows }), mass)
    }

    /// Stores the log-sum-exp and the entropy of one query.
    pub(super) fn store(&self, row: usize, head: usize, (lse, entropy): (f32, f32)) {
        // SAFETY: each query is one unit's, and the slices end with their statements.
        unsafe { self.lse.slice(row, head..head + 1)[0] = lse };
        // SAFETY: as above.
        unsafe { self.entropy.slice(row, head..head + 1)[0] = entropy };
    }
}

impl Context<'_> {
    /// Those queries of a unit whose mass is added up.
    pub(super) fn mass_queries(&self, unit: &Unit) -> Range<usize> {
        let Some(rows) = self.observed.as_ref().and_then(|observed| observed.mass_rows) else {
            return 0..0;
        };
        let (counted, group) = (&rows[unit.sequence], self.heads.group());
        let start = counted.start.max(unit.rows.start);
        let end = counted.end.min(unit.rows.end).max(start);
        (start - unit.rows.start) * group..(end - unit.rows.start) * group
    }

    /// What is kept of tiles of `rows` rows: nothing, unless mass is asked for.
    pub(super) fn records(&self, rows: usize) -> Records {
        let size = self.pages.layout().page_size();
        Records {
            counted: self.observed.as_ref().is_some_and(|observed| observed.mass_rows.is_some()),
            queries: rows * self.heads.group(),
            chunk_pages: chunk_pages(size),
            page_size: size,
        }
    }

    /// Adds the mass of the units of `plan` to that of their sequences, in the order of the units.
    pub(super) fn add_mass(&self, plan: &Plan, mass: &mut MassOut<'_>) {
        let (heads, size) = (self.heads.kv_heads, self.pages.layout().page_size());
        for (unit, pages) in plan.units.iter().zip(&plan.pages) {
            if self.mass_queries(unit).is_empty() {
                continue;
            }
            let before = self.sequences[..unit.sequence].iter().zip(mass.rows);
            let counted = before.filter(|(_, rows)| !rows.is_empty());
            let first_row = heads * counted.map(|(it, _)| it.pages.len()).sum::<usize>();
            let first = first_row + unit.kv_head * unit.table(self).len();
            let pages = pages.read().unwrap_or_else(PoisonError::into_inner);
            let list = self.list(unit, &pages);
            let own = pages.mass.lock().unwrap_or_else(PoisonError::into_inner);
            for (i, own) in own.chunks_exact(size).enumerate() {
                let row = &mut mass.out.values_mut()[(first + list.get(i)) * size..][..size];
                for (sum, x) in row.iter_mut().zip(own) {
                    *sum += x;
                }
            }
        }
    }
}

/// How the weights of a list are kept until its softmax is known, chunk by chunk: for each query
/// the highest score that they are relative to, then its weights `[queries, chunk tokens]`.
#[derive(Debug, Clone, Copy)]
pub(super) struct Records {
    /// Whether anything is kept.
    pub(super) counted: bool,
    queries: usize,
    chunk_pages: usize,
    page_size: usize,
}

impl Records {
    /// Numbers that `pages` pages of a list take.
    pub(super) fn len(&self, pages: usize) -> usize {
        if self.counted { pages.div_ceil(self.chunk_pages) * self.chunk_len() } else { 0 }
    }

    fn chunk_tokens(&self) -> usize {
        self.chunk_pages * self.page_size
    }

    fn chunk_len(&self) -> usize {
        self.queries * (1 + self.chunk_tokens())
    }

    /// Keeps the weights of one query in a chunk; tokens beyond them weigh nothing.
    #[inline(always)]
    pub(super) fn keep(
        &self,
        records: &mut [f32],
        (chunk, query): (usize, usize),
        weights: &[f32],
        state: &State<'_>,
    ) {
        let record = &mut records[chunk * self.chunk_len()..][..self.chunk_len()];
        let (peaks, all) = record.split_at_mut(self.queries);
        peaks[query] = state.peak(query);
        let kept = &mut all[query * self.chunk_tokens()..][..self.chunk_tokens()];
        kept[..weights.len()].copy_from_slice(weights);
        kept[weights.len()..].fill(0.0);
    }

    /// Adds the shares of the softmax `state` that the kept weights of `queries` come to, to the
    /// mass of the list's tokens.
    #[inline(always)]
    pub(super) fn add_mass(
        &self,
        records: &[f32],
        state: &State<'_>,
        queries: Range<usize>,
        mass: &mut [f32],
    ) {
        let tokens = self.chunk_tokens();
        let chunks = records.chunks_exact(self.chunk_len()).zip(mass.chunks_mut(tokens));
        for (record, mass) in chunks {
            let (peaks, weights) = record.split_at(self.queries);
            for query in queries.clone() {
                if peaks[query] == f32::NEG_INFINITY {
                    // The row sees nothing of this chunk nor of those before it.
                    continue;
                }
                let share = (peaks[query] - state.lse(query)).exp();
                for (mass, weight) in mass.iter_mut().zip(&weights[query * tokens..]) {
                    *mass += weight * share;
                }
            }
        }
    }
}
