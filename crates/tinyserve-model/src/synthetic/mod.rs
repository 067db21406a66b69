//! Models of a real shape with random weights, and random keys and values: for measuring speed.
//!
//! What such a model writes means nothing, and its attention is nearly uniform.

mod induction;
mod shape;
mod values;

use std::sync::Arc;

use serde_json::Value;
use tinyserve_kernels::{AppendKvArgs, Backend, DType};
use tinyserve_kv::{PageTable, Slot};

pub use induction::{InductionGeometry, InductionModel, LookupTokens};
pub use shape::SyntheticShape;
pub use values::{SyntheticNormal, SyntheticTensor};

use crate::weights::Content;
use crate::{Checkpoint, KvCache, Model, ModelConfig, ModelError, mmap};
use shape::Shape;

/// Tokens whose keys and values are written at a time.
const FILL_TOKENS: usize = 256;

/// A model of some shape whose weights follow from a seed.
#[derive(Debug, Clone)]
pub struct SyntheticModel {
    shape: SyntheticShape,
    dimensions: Shape,
    dtype: DType,
    seed: u64,
}

impl SyntheticModel {
    /// A model of `shape` with weights of type `dtype`.
    #[must_use]
    pub fn new(shape: SyntheticShape, dtype: DType) -> Self {
        Self { shape, dimensions: shape.dimensions(None), dtype, seed: 0 }
    }

    /// Chooses other weights: the same seed, shape and type give the same bytes on every machine.
    #[must_use]
    pub fn seed(mut self, seed: u64) -> Self {
        self.seed = seed;
        self
    }

    /// Another context than the shape's own; in GPT-2 it is also the size of a table.
    #[must_use]
    pub fn max_positions(mut self, positions: usize) -> Self {
        self.dimensions = self.shape.dimensions(Some(positions));
        self
    }

    /// A context of `positions`, unless it is longer already.
    #[must_use]
    pub fn at_least_positions(self, positions: usize) -> Self {
        let positions = positions.max(self.dimensions.positions());
        self.max_positions(positions)
    }

    /// Element type of its weights.
    #[must_use]
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// Every tensor, with the hub's names and layouts.
    #[must_use]
    pub fn tensors(&self) -> Vec<SyntheticTensor> {
        self.dimensions.tensors()
    }

    /// Bytes of all tensors.
    #[must_use]
    pub fn weight_bytes(&self) -> usize {
        self.tensors().iter().map(|tensor| tensor.elements() * self.dtype.size()).sum()
    }

    /// What `config.json` says of it.
    #[must_use]
    pub fn config_json(&self) -> Value {
        self.dimensions.config(match self.dtype {
            DType::F32 => "float32",
            DType::F16 => "float16",
            DType::Bf16 => "bfloat16",
        })
    }

    /// Its shape, as a model that is loaded has it.
    ///
    /// # Errors
    /// When the context is longer than any model's may be.
    pub fn config(&self) -> Result<ModelConfig, ModelError> {
        ModelConfig::from_json(self.shape.name(), self.config_json().to_string().as_bytes())
    }

    /// Tokens that stand for no byte, with their ids.
    #[must_use]
    pub fn special_tokens(&self) -> &'static [(u32, &'static str)] {
        self.dimensions.special_tokens()
    }

    /// The id of byte 0; the other bytes follow.
    #[must_use]
    pub fn first_byte_token(&self) -> u32 {
        self.dimensions.first_byte_token()
    }

    /// The ids that begin and end a text.
    #[must_use]
    pub fn bos_and_eos(&self) -> (u32, u32) {
        self.dimensions.bos_and_eos()
    }

    /// What `tokenizer.json` says of the tokens that are put around a text.
    #[must_use]
    pub fn post_processor(&self) -> Option<Value> {
        self.dimensions.post_processor()
    }

    /// The model as a checkpoint without files and without a tokenizer.
    ///
    /// A tensor is made when it is read, so that one whose weights are quantised never lies in
    /// memory as a whole beside them.
    ///
    /// # Errors
    /// As [`Self::config`].
    pub fn checkpoint(&self) -> Result<Checkpoint, ModelError> {
        let (dtype, seed) = (self.dtype, self.seed);
        let tensors = self.tensors().into_iter().map(|tensor| {
            let (name, shape) = (tensor.name().to_owned(), tensor.shape().to_vec());
            let length = tensor.elements() * dtype.size();
            let make =
                Arc::new(move || mmap::filled(length, |bytes| tensor.write(dtype, seed, bytes)));
            (name, shape, Content::Made { length, make })
        });
        Ok(Checkpoint::in_memory(self.shape.name(), self.config()?, self.dtype, tensors))
    }
}

impl<B: Backend> Model<B> {
    /// Appends `tokens` tokens with random keys and values to a sequence, in place of a prefill.
    ///
    /// Keys and values are standard normal, different for each token and the same in every layer:
    /// attention takes as long as over real ones, and a long context is there in seconds.
    ///
    /// # Errors
    /// When too few pages are free.
    pub fn append_synthetic(
        &self,
        cache: &mut KvCache<B>,
        table: &mut PageTable,
        tokens: usize,
        random: &mut SyntheticNormal,
    ) -> Result<(), ModelError> {
        let (heads, layers) = (self.structure.heads, self.blocks.len());
        let mut qkv = self.backend.tensor(heads.qkv_width());
        let mut values = vec![0.0; heads.qkv_width() * FILL_TOKENS.min(tokens)];
        let end = table.len() + tokens;
        while table.len() < end {
            let first = table.len();
            let rows = FILL_TOKENS.min(end - first);
            cache.extend(&self.backend, table, rows)?;
            let slots: Vec<Slot> = (first..first + rows).map(|i| table.slot(i)).collect();
            let values = &mut values[..rows * heads.qkv_width()];
            for row in values.chunks_exact_mut(heads.qkv_width()) {
                // Nobody reads the queries.
                row[heads.k_columns().start..].fill_with(|| random.sample());
            }
            self.backend.upload(values, &mut qkv);
            for layer in 0..layers {
                let (qkv, slots, pages) = (&qkv, slots.as_slice(), &mut cache.pages);
                self.backend.append_kv(AppendKvArgs { layer, heads, qkv, slots, pages });
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use tinyserve_kernels::Cpu;
    use tinyserve_kv::KvFormat;

    use super::*;
    use crate::{Activations, Batch, LogitRows, SequenceStep, StepOutput};

    /// From a cache line on, no vector load crosses two.
    const LINE_BYTES: usize = 64;

    #[test]
    fn a_checkpoint_in_memory_holds_the_tensors_of_its_seed() {
        for shape in [SyntheticShape::TinyGpt2, SyntheticShape::TinyLlama] {
            let model = SyntheticModel::new(shape, DType::F16).seed(5);
            let checkpoint = model.checkpoint().unwrap();
            assert_eq!(checkpoint.weight_bytes(), model.weight_bytes());
            assert_eq!(checkpoint.dtype(), DType::F16);
            assert!(checkpoint.tokenizer().is_err());
            for tensor in model.tensors() {
                let stored = checkpoint.tensor(tensor.name(), tensor.shape()).unwrap();
                assert_eq!(stored.bytes(), tensor.bytes(DType::F16, 5), "{}", tensor.name());
                assert!(stored.bytes().as_ptr().addr().is_multiple_of(LINE_BYTES));
            }
        }
    }

    #[test]
    fn a_context_can_grow_and_an_absurd_one_is_refused() {
        let model = SyntheticModel::new(SyntheticShape::TinyGpt2, DType::F32);
        let positions = |model: SyntheticModel| model.config().unwrap().max_positions;
        assert_eq!(positions(model.clone().at_least_positions(100)), 256);
        assert_eq!(positions(model.clone().at_least_positions(1000)), 1000);
        assert!(model.at_least_positions(1 << 40).config().is_err());
    }

    #[test]
    fn synthetic_tokens_are_attended_to_like_others() {
        let checkpoint =
            SyntheticModel::new(SyntheticShape::TinyLlama, DType::F32).checkpoint().unwrap();
        let model = Model::load(Cpu::reference(), &checkpoint, |_, _| {}).unwrap();
        let layout = model.config().kv_layout(8, KvFormat::F32).unwrap();
        let mut cache = KvCache::new(model.backend(), layout, 2 * layout.pages_for(100)).unwrap();
        let mut step = |synthetic: usize| {
            let mut table = cache.new_table();
            let mut random = SyntheticNormal::new(0, "keys");
            model.append_synthetic(&mut cache, &mut table, synthetic, &mut random).unwrap();
            let copy = cache.duplicate(model.backend(), &table).unwrap();
            assert!(copy.pages().iter().all(|page| !table.pages().contains(page)));
            cache.release(std::mem::replace(&mut table, copy));
            cache.extend(model.backend(), &mut table, 1).unwrap();
            let (mut activations, mut output) = (Activations::new(&model), StepOutput::default());
            let sequence = SequenceStep {
                tokens: &[7],
                table: &table,
                attention: tinyserve_kernels::Attention::Dense,
                logits: LogitRows::Last,
                observe: crate::Observe::NOTHING,
            };
            let batch = Batch { sequences: &[sequence], measure_recall: false, list_pages: false };
            model.forward(&mut activations, &mut cache, &batch, &mut output).unwrap();
            cache.release(table);
            output.logits(0).next().unwrap().to_vec()
        };
        let (alone, after) = (step(0), step(90));
        assert!(after.iter().all(|logit| logit.is_finite()));
        assert_ne!(alone, after);
        assert_eq!(step(90), after);
    }
}
