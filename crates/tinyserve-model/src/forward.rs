//! The forward pass, written once over the backend seam.

use std::time::{Duration, Instant};

use smallvec::SmallVec;
use tinyserve_kernels::{
    AppendKvArgs, AttendArgs, AttendSequence, AttendStats, Backend, EmbedArgs, LinearArgs,
    MOST_TOP_LOGITS, NormArgs, PageLists, ProjectActivation, ProjectArgs, RotaryAnglesArgs,
    RotateAndAppendArgs, Store, TopLogitsArgs,
};
use tinyserve_kv::Slot;

use crate::model::{Norm, Structure};
use crate::observe::Observation;
use crate::{Batch, KvCache, LogitRows, Model, ModelError, StepOutput};

/// Sequences whose descriptions lie on the stack: a larger batch costs one allocation per step,
/// which its weights' one pass hides.
const SEQUENCES_ON_STACK: usize = 16;

/// Every buffer of a step, allocated once and reused.
#[derive(Debug)]
pub struct Activations<B: Backend> {
    /// The residual stream `[rows, hidden]`.
    hidden: B::Tensor,
    /// A norm's output `[rows, hidden]`.
    normed: B::Tensor,
    /// Queries, keys and values `[rows, (q_heads + 2·kv_heads)·head_dim]`.
    qkv: B::Tensor,
    /// Cosines and sines of the step's positions `[rows, head_dim]`.
    angles: B::Tensor,
    /// Attention's output `[rows, q_heads·head_dim]`.
    attended: B::Tensor,
    /// First feed-forward projection `[rows, intermediate]`, twice as wide when gated.
    wide: B::Tensor,
    /// Activated `[rows, intermediate]`.
    activated: B::Tensor,
    /// Rows that yield logits `[logit rows, hidden]`.
    last: B::Tensor,
    /// `[logit rows, vocab]`.
    logits: B::Tensor,
    /// Those of them that are told, where others are not.
    told_logits: B::Tensor,
    ids: Vec<u32>,
    positions: Vec<u32>,
    slots: Vec<Slot>,
    logit_rows: Vec<u32>,
    /// Rows of `logits` that are told.
    told_rows: Vec<u32>,
    /// Rows of `logits` of which the likeliest tokens are told, and the most of them.
    top_rows: Vec<u32>,
    most_top: usize,
    /// What attention tells, when it is asked to.
    observation: Observation<B>,
}

impl<B: Backend> Activations<B> {
    /// Buffers for steps of `model`.
    #[must_use]
    pub fn new(model: &Model<B>) -> Self {
        let (backend, config, structure) = (&model.backend, &model.config, &model.structure);
        let wide = config.intermediate_size;
        Self {
            hidden: backend.tensor(config.hidden_size),
            normed: backend.tensor(config.hidden_size),
            qkv: backend.tensor(structure.heads.qkv_width()),
            angles: backend.tensor(config.head_dim),
            attended: backend.tensor(structure.heads.q_columns().len()),
            wide: backend.tensor(if structure.gated { 2 * wide } else { wide }),
            activated: backend.tensor(wide),
            last: backend.tensor(config.hidden_size),
            logits: backend.tensor(config.vocab_size),
            told_logits: backend.tensor(config.vocab_size),
            ids: Vec::new(),
            positions: Vec::new(),
            slots: Vec::new(),
            logit_rows: Vec::new(),
            told_rows: Vec::new(),
            top_rows: Vec::new(),
            most_top: 0,
            observation: Observation::default(),
        }
    }
}

/// What a layer's attention tells of what it read.
struct Told<'a> {
    measure_recall: bool,
    page_lists: Option<&'a mut PageLists>,
    sequence_stats: &'a mut [AttendStats],
    time: Option<&'a mut Duration>,
}

impl<B: Backend> Model<B> {
    /// Runs one step: appends the keys and values of every new token to `cache` and computes the
    /// logits that were asked for.
    ///
    /// # Errors
    /// When a token is outside the vocabulary, a position outside the context, a sequence has no
    /// new token, or a custom selector returns a list that attention cannot read.
    pub fn forward(
        &self,
        activations: &mut Activations<B>,
        cache: &mut KvCache<B>,
        batch: &Batch<'_>,
        output: &mut StepOutput,
    ) -> Result<(), ModelError> {
        self.plan(activations, batch, output)?;
        let backend = &self.backend;
        let a = activations;
        backend.embed(EmbedArgs {
            table: &self.token_embedding,
            ids: &a.ids,
            store: Store::Overwrite,
            out: &mut a.hidden,
        });
        if let Some(table) = &self.position_embedding {
            let (ids, out) = (&a.positions, &mut a.hidden);
            backend.embed(EmbedArgs { table, ids, store: Store::Add, out });
        }
        if !self.structure.inverse_frequencies.is_empty() {
            backend.rotary_angles(RotaryAnglesArgs {
                positions: &a.positions,
                inverse_frequencies: &self.structure.inverse_frequencies,
                out: &mut a.angles,
            });
        }
        output.stats = AttendStats::default();
        output.layer_stats.clear();
        output.sequence_stats.clear();
        output.sequence_stats.resize(batch.sequences.len(), AttendStats::default());
        let mut row = 0;
        let sequences: SmallVec<[_; SEQUENCES_ON_STACK]> = batch
            .sequences
            .iter()
            .map(|step| {
                let rows = row..row + step.tokens.len();
                row = rows.end;
                AttendSequence {
                    rows,
                    first_position: step.first_place(),
                    pages: step.table.pages(),
                    attention: step.attention,
                }
            })
            .collect();
        output.page_lists.clear();
        let timed = output.times_attention && backend.is_synchronous();
        output.attention_time = timed.then_some(Duration::ZERO);
        a.observation.begin(self, batch, &mut output.observed);
        for layer in 0..self.blocks.len() {
            let told = Told {
                measure_recall: batch.measure_recall,
                page_lists: batch.list_pages.then_some(&mut output.page_lists),
                sequence_stats: &mut output.sequence_stats,
                time: output.attention_time.as_mut(),
            };
            let stats = self.attention(a, cache, layer, &sequences, told)?;
            output.stats.add(&stats);
            output.layer_stats.push(stats);
            self.feed_forward(a, layer);
        }
        a.observation.end(self, batch, &mut output.observed);
        self.logits(a, output);
        // A device tells only now what went wrong on the way.
        Ok(self.backend.check()?)
    }

    /// Checks the batch and flattens it into rows.
    fn plan(
        &self,
        a: &mut Activations<B>,
        batch: &Batch<'_>,
        output: &mut StepOutput,
    ) -> Result<(), ModelError> {
        a.ids.clear();
        a.positions.clear();
        a.slots.clear();
        a.logit_rows.clear();
        a.told_rows.clear();
        a.top_rows.clear();
        a.most_top = 0;
        output.rows.clear();
        output.top_rows.clear();
        for step in batch.sequences {
            if step.tokens.is_empty() {
                return Err(ModelError::EmptyPrompt);
            }
            let (end, limit) = (step.table.next_position(), self.config.max_positions);
            if end > limit {
                return Err(ModelError::ContextOverflow { tokens: end, limit });
            }
            for (i, &token) in step.tokens.iter().enumerate() {
                if token as usize >= self.config.vocab_size {
                    return Err(ModelError::TokenOutOfRange {
                        token,
                        vocab: self.config.vocab_size,
                    });
                }
                a.ids.push(token);
                a.positions.push((step.first_position() + i) as u32);
                a.slots.push(step.table.slot(step.first_place() + i));
            }
            let (end, told) = (a.ids.len() as u32, a.told_rows.len());
            let first_logit = a.logit_rows.len() as u32;
            match step.logits {
                LogitRows::None => {}
                LogitRows::Last | LogitRows::Top(_) => a.logit_rows.push(end - 1),
                LogitRows::All => a.logit_rows.extend(end - step.tokens.len() as u32..end),
            }
            let mut top_row = None;
            if let LogitRows::Top(k) = step.logits {
                if !(1..=MOST_TOP_LOGITS).contains(&k) {
                    return Err(ModelError::Setting {
                        name: "likeliest tokens of a step",
                        found: k.to_string(),
                        expected: format!("1 to {MOST_TOP_LOGITS}"),
                    });
                }
                top_row = Some(a.top_rows.len());
                a.top_rows.push(first_logit);
                a.most_top = a.most_top.max(k);
            } else {
                a.told_rows.extend(first_logit..a.logit_rows.len() as u32);
            }
            output.rows.push(told..a.told_rows.len());
            output.top_rows.push(top_row);
        }
        if a.ids.is_empty() {
            return Err(ModelError::EmptyPrompt);
        }
        Ok(())
    }

    fn attention(
        &self,
        a: &mut Activations<B>,
        cache: &mut KvCache<B>,
        layer: usize,
        sequences: &[AttendSequence<'_>],
        Told { measure_recall, page_lists, sequence_stats, time }: Told<'_>,
    ) -> Result<AttendStats, ModelError> {
        let (backend, block, heads) = (&self.backend, &self.blocks[layer], self.structure.heads);
        backend.project(ProjectArgs {
            norm: self.norm(&block.attention_norm, &a.hidden, &mut a.normed),
            linear: &block.qkv,
            activate: None,
            out: &mut a.qkv,
        });
        let (slots, pages) = (&a.slots, &mut cache.pages);
        if self.structure.inverse_frequencies.is_empty() {
            backend.append_kv(AppendKvArgs { layer, heads, qkv: &a.qkv, slots, pages });
        } else {
            let (angles, qkv) = (&a.angles, &mut a.qkv);
            backend.rotate_and_append(RotateAndAppendArgs {
                angles,
                layer,
                heads,
                qkv,
                slots,
                pages,
            });
        }
        let start = time.is_some().then(Instant::now);
        let stats = backend.attend(AttendArgs {
            layer,
            heads,
            qkv: &a.qkv,
            scale: self.structure.attention_scale,
            sequences,
            pages: &cache.pages,
            measure_recall,
            page_lists,
            sequence_stats: Some(sequence_stats),
            observe: a.observation.args(layer),
            out: &mut a.attended,
        })?;
        if let (Some(time), Some(start)) = (time, start) {
            *time += start.elapsed();
        }
        backend.linear(LinearArgs {
            x: &a.attended,
            linear: &block.attention_out,
            store: Store::Add,
            out: &mut a.hidden,
        });
        Ok(stats)
    }

    fn feed_forward(&self, a: &mut Activations<B>, layer: usize) {
        let (backend, block) = (&self.backend, &self.blocks[layer]);
        let Structure { activation, gated, .. } = self.structure;
        backend.project(ProjectArgs {
            norm: self.norm(&block.mlp_norm, &a.hidden, &mut a.normed),
            linear: &block.mlp_in,
            activate: Some(ProjectActivation { activation, gated, product: &mut a.wide }),
            out: &mut a.activated,
        });
        backend.linear(LinearArgs {
            x: &a.activated,
            linear: &block.mlp_out,
            store: Store::Add,
            out: &mut a.hidden,
        });
    }

    fn logits(&self, a: &mut Activations<B>, output: &mut StepOutput) {
        output.vocab = self.config.vocab_size;
        output.logits.clear();
        if a.logit_rows.is_empty() {
            return;
        }
        self.backend.gather_rows(&a.hidden, &a.logit_rows, &mut a.last);
        self.backend.project(ProjectArgs {
            norm: self.norm(&self.final_norm, &a.last, &mut a.normed),
            linear: self.head.as_ref().unwrap_or(&self.token_embedding),
            activate: None,
            out: &mut a.logits,
        });
        if a.top_rows.is_empty() {
            return self.backend.download(&a.logits, &mut output.logits);
        }
        self.backend.top_logits(TopLogitsArgs {
            logits: &a.logits,
            rows: &a.top_rows,
            k: a.most_top,
            out: &mut output.top,
        });
        if !a.told_rows.is_empty() {
            self.backend.gather_rows(&a.logits, &a.told_rows, &mut a.told_logits);
            self.backend.download(&a.told_logits, &mut output.logits);
        }
    }

    fn norm<'a>(
        &self,
        norm: &'a Norm<B>,
        x: &'a B::Tensor,
        out: &'a mut B::Tensor,
    ) -> NormArgs<'a, B> {
        let Structure { norm: kind, norm_epsilon: epsilon, .. } = self.structure;
        let Norm { weight, bias } = norm;
        NormArgs { kind, x, weight, bias: bias.as_ref(), epsilon, out }
    }
}
