//! What a step's attention tells, gathered over layers.

use std::ops::Range;

use tinyserve_kernels::{Backend, MassArgs, ObserveArgs, Store};

use crate::batch::Observed;
use crate::{Batch, Model};

/// Buffers of what is observed, made when it is first asked for.
#[derive(Debug)]
pub(crate) struct Observation<B: Backend> {
    tensors: Option<Tensors<B>>,
    asked: bool,
    /// For each sequence, rows of the step whose mass counts.
    mass_rows: Vec<Range<usize>>,
    host: Vec<f32>,
}

#[derive(Debug)]
struct Tensors<B: Backend> {
    /// `[rows, q_heads]`, of the last layer.
    lse: B::Tensor,
    /// `[rows, q_heads]` of each layer: they are downloaded when all layers are done, because a
    /// device is not waited for inside a step.
    entropies: Vec<B::Tensor>,
    /// `[rows of pages, page_size]`, added up over the layers.
    mass: B::Tensor,
}

impl<B: Backend> Default for Observation<B> {
    fn default() -> Self {
        Self { tensors: None, asked: false, mass_rows: Vec::new(), host: Vec::new() }
    }
}

impl<B: Backend> Observation<B> {
    /// Notes what the sequences of `batch` ask for.
    pub(crate) fn begin(&mut self, model: &Model<B>, batch: &Batch<'_>, out: &mut Observed) {
        out.entropies.clear();
        out.entropy_ranges.clear();
        out.mass.clear();
        out.mass_ranges.clear();
        self.mass_rows.clear();
        let mut row = 0;
        for step in batch.sequences {
            row += step.tokens.len();
            self.mass_rows.push(row - step.observe.mass_rows.min(step.tokens.len())..row);
        }
        let asks = |step: &crate::SequenceStep<'_>| step.observe != crate::Observe::NOTHING;
        self.asked = batch.sequences.iter().any(asks);
        if self.asked && self.tensors.is_none() {
            let heads = model.structure.heads.q_heads;
            let tensor = || model.backend.tensor(heads);
            self.tensors = Some(Tensors {
                lse: tensor(),
                entropies: model.blocks.iter().map(|_| tensor()).collect(),
                mass: model.backend.tensor(batch.sequences[0].table.page_size()),
            });
        }
    }

    /// What attention in `layer` is asked for.
    pub(crate) fn args(&mut self, layer: usize) -> Option<ObserveArgs<'_, B::Tensor>> {
        let tensors = self.tensors.as_mut().filter(|_| self.asked)?;
        let store = if layer == 0 { Store::Overwrite } else { Store::Add };
        let counts = self.mass_rows.iter().any(|rows| !rows.is_empty());
        let mass = MassArgs { rows: &self.mass_rows, store, out: &mut tensors.mass };
        Some(ObserveArgs {
            lse: &mut tensors.lse,
            entropy: &mut tensors.entropies[layer],
            mass: counts.then_some(mass),
        })
    }

    /// Gathers what the layers told, sequence by sequence.
    pub(crate) fn end(&mut self, model: &Model<B>, batch: &Batch<'_>, out: &mut Observed) {
        let steps = batch.sequences;
        let Some(tensors) = self.tensors.as_ref().filter(|_| self.asked) else {
            out.entropy_ranges.resize(steps.len(), 0..0);
            out.mass_ranges.resize(steps.len(), 0..0);
            return;
        };
        let (heads, layers) = (model.structure.heads, tensors.entropies.len());
        let mut length = 0;
        for step in steps {
            let own = if step.observe.entropy { layers * heads.q_heads } else { 0 };
            out.entropy_ranges.push(length..length + own);
            length += own;
        }
        out.entropies.resize(length, 0.0);
        if length > 0 {
            for (layer, entropies) in tensors.entropies.iter().enumerate() {
                model.backend.download(entropies, &mut self.host);
                let mut row = 0;
                for (step, range) in steps.iter().zip(&out.entropy_ranges) {
                    row += step.tokens.len();
                    if step.observe.entropy {
                        let last = &self.host[(row - 1) * heads.q_heads..][..heads.q_heads];
                        let at = range.start + layer * heads.q_heads;
                        out.entropies[at..at + heads.q_heads].copy_from_slice(last);
                    }
                }
            }
        }
        if self.mass_rows.iter().any(|rows| !rows.is_empty()) {
            model.backend.download(&tensors.mass, &mut self.host);
        }
        let mut mass = self.host.as_slice();
        for (step, rows) in steps.iter().zip(&self.mass_rows) {
            let (first, tokens) = (out.mass.len(), step.table.len());
            if !rows.is_empty() {
                let capacity = step.table.pages().len() * step.table.page_size();
                let (own, rest) = mass.split_at(heads.kv_heads * capacity);
                mass = rest;
                out.mass.extend_from_slice(&own[..tokens]);
                for head in own.chunks_exact(capacity).skip(1) {
                    for (sum, x) in out.mass[first..].iter_mut().zip(head) {
                        *sum += x;
                    }
                }
            }
            out.mass_ranges.push(first..out.mass.len());
        }
    }
}
