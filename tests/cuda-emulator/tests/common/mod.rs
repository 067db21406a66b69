//! What several tests run.
#![allow(dead_code, reason = "each test binary uses its own part")]

pub(crate) mod sequence;

use std::path::Path;

use tinyserve_kernels::{Attention, Cuda};
use tinyserve_kv::{KvFormat, PageTable};
use tinyserve_model::{
    Activations, Batch, Checkpoint, KvCache, LogitRows, Model, ModelError, Observe, SequenceStep,
    StepOutput,
};

/// A small model and a cache on a device, which computes one sequence after the other.
pub(crate) struct Engine {
    pub(crate) model: Model<Cuda>,
    pub(crate) cache: KvCache<Cuda>,
    activations: Activations<Cuda>,
}

impl Engine {
    pub(crate) fn new(cuda: Cuda, format: KvFormat) -> Self {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../golden/llama-gqa");
        let checkpoint = Checkpoint::open(&folder).unwrap();
        let model = Model::load(cuda, &checkpoint, |_, _| {}).unwrap();
        let layout = model.config().kv_layout(4, format).unwrap();
        let cache = KvCache::new(model.backend(), layout, 64).unwrap();
        let activations = Activations::new(&model);
        Self { model, cache, activations }
    }

    /// Logits after `tokens`, which all read everything before them.
    pub(crate) fn step(
        &mut self,
        table: &mut PageTable,
        tokens: &[u32],
    ) -> Result<Vec<f32>, ModelError> {
        let mut output = StepOutput::default();
        self.cache.extend(self.model.backend(), table, tokens.len())?;
        let sequence = SequenceStep {
            tokens,
            table,
            attention: Attention::Dense,
            logits: LogitRows::Last,
            observe: Observe::default(),
        };
        let batch = Batch { sequences: &[sequence], measure_recall: false, list_pages: false };
        self.model.forward(&mut self.activations, &mut self.cache, &batch, &mut output)?;
        Ok(output.logits(0).next().unwrap().to_vec())
    }
}
