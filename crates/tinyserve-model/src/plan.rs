//! How much memory a model and its cache take, known before anything is loaded.

use tinyserve_kernels::{CudaWorkload, DType, Heads, LinearSize, WeightFormat};
use tinyserve_kv::KvLayout;

use crate::load::matrix_format;
use crate::{Architecture, Checkpoint, ModelConfig, ModelError};

/// Attention's buffers of one thread: a tile's queries, scores and sums, at the largest heads.
const THREAD_BYTES: u64 = 1 << 20;
/// A quantised row's codes, scale and sums, for every 32 of its elements.
const ROW_GROUP_BYTES: u64 = 44;
const ROW_GROUP: u64 = 32;

/// The largest step that a plan has to have room for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LargestStep {
    /// Tokens that are computed in one step.
    pub tokens: usize,
    /// Sequences that begin a page and do not fill it.
    pub sequences: usize,
    /// Tokens of one step that yield logits.
    pub logits: usize,
    /// Threads that compute it.
    pub threads: usize,
}

/// What a device's buffers are planned for, beside the largest step.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DeviceLimits {
    /// Most tokens of a sequence.
    pub context: usize,
    /// Bytes of the device's memory that are free.
    pub free: u64,
    /// Whether selectors on the host see keys.
    pub gathers_keys: bool,
}

/// What a process takes to run a model: where its memory goes.
///
/// A plan says the most that is resident at any time. The pool's memory is reserved at once and
/// becomes resident as pages are written, so less is resident until every page was in use.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MemoryPlan {
    /// What the process holds beside the model, in bytes: its code, the tokenizer.
    pub process_bytes: u64,
    /// Weights, in the format that they are held in.
    pub weight_bytes: u64,
    /// What loading them takes beside the weights themselves; it is given back before pages fill.
    pub loading_bytes: u64,
    /// Activations of the largest step, and buffers of the threads.
    pub scratch_bytes: u64,
    /// Most pages of single layers that hold no codes yet, where the format has codes.
    pub open_pages: usize,
    /// Layout of the pages.
    pub layout: KvLayout,
    /// Boxes that the scorer keeps of a page beside that of its keys.
    pub kept_boxes: usize,
    /// Pages of the pool.
    pub pages: usize,
}

impl MemoryPlan {
    /// The plan of `pages` pages for the model of `checkpoint`, kept in `format`.
    #[must_use]
    pub fn new(
        checkpoint: &Checkpoint,
        format: WeightFormat,
        layout: KvLayout,
        largest: LargestStep,
        pages: usize,
    ) -> Self {
        let config = checkpoint.config();
        let weight_bytes = config.weight_bytes(checkpoint.dtype(), format);
        let copies = format != WeightFormat::Stored || config.architecture == Architecture::Gpt2;
        let loading_bytes =
            if copies { config.largest_matrix_bytes(checkpoint.dtype()) } else { 0 };
        // Each sequence's last page in every layer, and in one of them those that the step fills.
        let filled = layout.pages_for(largest.tokens).saturating_add(largest.sequences);
        let open_pages = largest.sequences.saturating_mul(config.layers).saturating_add(filled);
        Self {
            process_bytes: 0,
            weight_bytes,
            loading_bytes,
            scratch_bytes: config.scratch_bytes(format, largest),
            open_pages,
            layout,
            kept_boxes: 0,
            pages,
        }
    }

    /// The plan of the same pages on a device of its own, whose backend has buffers of its own.
    #[must_use]
    pub fn on_device(
        self,
        checkpoint: &Checkpoint,
        format: WeightFormat,
        largest: LargestStep,
        limits: DeviceLimits,
    ) -> Self {
        let config = checkpoint.config();
        let stored = checkpoint.dtype();
        let outputs = config.matrices().map(|(_, outputs)| outputs);
        let matrix = |(inputs, outputs): (usize, usize)| inputs.saturating_mul(outputs);
        let table = (config.hidden_size, config.vocab_size.max(config.max_positions));
        // A part of a matrix lies beside it until it is in its place.
        let largest_matrix = config.matrices().into_iter().chain([table]).map(matrix).max();
        let loading_bytes = match format {
            WeightFormat::Stored => largest_matrix.unwrap_or(0).saturating_mul(stored.size()),
            _ => 0,
        };
        // Matrices without a bias have one of zeros.
        let biases = outputs.iter().sum::<usize>() * config.layers
            + 2 * config.vocab_size
            + config.max_positions;
        let page = (self.layout.bytes_per_page() as u64).max(1);
        let workload = CudaWorkload {
            layout: self.layout,
            heads: Heads {
                q_heads: config.q_heads,
                kv_heads: config.kv_heads,
                head_dim: config.head_dim,
            },
            activations: &config.activations(largest),
            tokens: largest.tokens,
            sequences: largest.sequences,
            logits: (largest.logits, config.vocab_size),
            context: limits.context,
            pages: usize::try_from(limits.free / page).unwrap_or(usize::MAX).min(self.pages),
            widest: (
                config.matrices().map(|(inputs, _)| inputs).into_iter().max().unwrap_or(0),
                outputs.into_iter().max().unwrap_or(0),
            ),
            weights: (stored, format),
            gathers_keys: limits.gathers_keys,
        };
        Self {
            loading_bytes: loading_bytes as u64,
            scratch_bytes: workload.scratch_bytes().saturating_add(4 * biases as u64),
            open_pages: workload.open_pages(),
            ..self
        }
    }

    /// Counts boxes that the scorer keeps of each page beside that of its keys.
    #[must_use]
    pub fn kept_boxes(self, kept_boxes: usize) -> Self {
        Self { kept_boxes, ..self }
    }

    /// Counts what the process holds beside the model.
    #[must_use]
    pub fn process_bytes(self, process_bytes: u64) -> Self {
        Self { process_bytes, ..self }
    }

    /// The plan with as many pages as fit into `target` bytes, at most `most`.
    ///
    /// # Errors
    /// When not one page fits.
    pub fn fit(self, target: u64, most: usize) -> Result<Self, ModelError> {
        let fixed = self.process_bytes + self.weight_bytes + self.scratch_bytes;
        let room = target.saturating_sub(fixed + self.open_bytes());
        let page = self.kv_bytes_per_page() + self.box_bytes_per_page();
        let pages = (room / page).min(most as u64);
        let plan = Self { pages: pages as usize, ..self };
        if pages == 0 || plan.total_bytes() > target {
            let needed = Self { pages: 1, ..self }.total_bytes();
            return Err(ModelError::Setting {
                name: "target_memory_gb",
                found: gigabytes(target),
                expected: format!(
                    "at least {}: weights of {}, and one page",
                    gigabytes(needed),
                    gigabytes(self.weight_bytes),
                ),
            });
        }
        Ok(plan)
    }

    /// Bytes of keys and values in all pages.
    #[must_use]
    pub fn kv_bytes(&self) -> u64 {
        self.kv_bytes_per_page().saturating_mul(self.pages as u64)
    }

    fn kv_bytes_per_page(&self) -> u64 {
        (self.layout.bytes_per_page() - self.layout.box_bytes_per_page()) as u64
    }

    /// Bytes of boxes in all pages.
    #[must_use]
    pub fn box_bytes(&self) -> u64 {
        self.box_bytes_per_page().saturating_mul(self.pages as u64)
    }

    /// Bytes of the boxes of one page, those that the scorer keeps included.
    #[must_use]
    pub fn box_bytes_per_page(&self) -> u64 {
        (self.layout.box_bytes_per_page() as u64).saturating_mul(1 + self.kept_boxes as u64)
    }

    /// Bytes of the pages that hold no codes yet; none where pages never hold codes.
    #[must_use]
    pub fn open_bytes(&self) -> u64 {
        if !self.layout.shape().format.is_quantised() {
            return 0;
        }
        (self.layout.open_page_bytes() as u64).saturating_mul(self.open_pages as u64)
    }

    /// Tokens that the pages hold: the longest context, if one sequence has them all.
    #[must_use]
    pub fn tokens(&self) -> usize {
        self.pages.saturating_mul(self.layout.page_size())
    }

    /// The most bytes that are resident at any time.
    #[must_use]
    pub fn total_bytes(&self) -> u64 {
        let cache = self.kv_bytes().saturating_add(self.box_bytes());
        let working = self.scratch_bytes.saturating_add(self.open_bytes());
        let after_loading = cache.saturating_add(working);
        self.process_bytes
            .saturating_add(self.weight_bytes)
            .saturating_add(after_loading.max(self.loading_bytes))
    }
}

fn gigabytes(bytes: u64) -> String {
    format!("{:.3}", bytes as f64 / 1e9)
}

impl ModelConfig {
    /// Bytes of all weights that are stored as `stored` and kept in `format`, as the CPU keeps
    /// them: what [`crate::Model::weight_bytes`] says after loading.
    #[must_use]
    pub fn weight_bytes(&self, stored: DType, format: WeightFormat) -> u64 {
        let tables = self
            .tables(stored, format)
            .iter()
            .fold(0, |sum: u64, size| sum.saturating_add(size.bytes()));
        let blocks = self.block_bytes(stored, format).saturating_mul(self.layers as u64);
        tables.saturating_add(blocks).saturating_add(self.norm_bytes())
    }

    /// Bytes of one layer's weights.
    fn block_bytes(&self, stored: DType, format: WeightFormat) -> u64 {
        let gpt2 = self.architecture == Architecture::Gpt2;
        let (attention, mlp) = (gpt2 || self.attention_bias, gpt2 || self.mlp_bias);
        let biased = [attention, attention, mlp, mlp];
        let sizes = self.matrices().into_iter().zip(biased);
        sizes.fold(0, |sum: u64, ((inputs, outputs), biased)| {
            let format = matrix_format(format, inputs);
            sum.saturating_add(LinearSize { inputs, outputs, biased, stored, format }.bytes())
        })
    }

    /// Inputs and outputs of the matrices of a layer.
    fn matrices(&self) -> [(usize, usize); 4] {
        let (hidden, wide) = (self.hidden_size, self.intermediate_size);
        let q = self.q_heads * self.head_dim;
        let (in_width, mlp_in) = match self.architecture {
            Architecture::Gpt2 => (3 * hidden, wide),
            Architecture::Llama => (q + 2 * self.kv_heads * self.head_dim, 2 * wide),
        };
        [(hidden, in_width), (q, hidden), (hidden, mlp_in), (wide, hidden)]
    }

    /// Rows and columns of the activations that are alive together.
    fn activations(&self, largest: LargestStep) -> [(usize, usize); 10] {
        let q = self.q_heads * self.head_dim;
        let [(hidden, qkv), _, (_, mlp_in), (wide, _)] = self.matrices();
        let LargestStep { tokens, logits, .. } = largest;
        [
            (tokens, hidden),
            (tokens, hidden),
            (tokens, qkv),
            (tokens, self.head_dim),
            (tokens, q),
            (tokens, mlp_in),
            (tokens, wide),
            (logits, hidden),
            // Logits are computed in one place and told in another.
            (logits, self.vocab_size),
            (logits, self.vocab_size),
        ]
    }

    /// The embeddings and the output head.
    fn tables(&self, stored: DType, format: WeightFormat) -> Vec<LinearSize> {
        let outer = match format {
            WeightFormat::Int4 => WeightFormat::Int8,
            format => format,
        };
        let table = |outputs, format| LinearSize {
            inputs: self.hidden_size,
            outputs,
            biased: false,
            stored,
            format,
        };
        let mut tables = vec![table(self.vocab_size, outer)];
        if self.architecture == Architecture::Gpt2 {
            tables.push(table(self.max_positions, WeightFormat::Stored));
        }
        if !self.tie_word_embeddings {
            tables.push(table(self.vocab_size, outer));
        }
        tables
    }

    /// Bytes of the norms, in f32.
    fn norm_bytes(&self) -> u64 {
        let vectors = match self.architecture {
            Architecture::Gpt2 => 2,
            Architecture::Llama => 1,
        };
        4 * vectors * self.hidden_size as u64 * (2 * self.layers as u64 + 1)
    }

    /// Stored bytes of the largest matrix, or matrices that are read as one.
    fn largest_matrix_bytes(&self, stored: DType) -> u64 {
        let tables = self.tables(stored, WeightFormat::Stored);
        let tables = tables.into_iter().map(|LinearSize { inputs, outputs, .. }| (inputs, outputs));
        let elements =
            |(inputs, outputs): (usize, usize)| (inputs as u64).saturating_mul(outputs as u64);
        let largest = self.matrices().into_iter().chain(tables).map(elements).max();
        largest.unwrap_or(0).saturating_mul(stored.size() as u64)
    }

    /// Bytes of activations in `largest`, and of the buffers of its threads.
    fn scratch_bytes(&self, format: WeightFormat, largest: LargestStep) -> u64 {
        let q = self.q_heads * self.head_dim;
        let tokens = largest.tokens as u64;
        let activations = self.activations(largest).into_iter();
        let activations = activations.map(|(rows, columns)| rows as u64 * columns as u64);
        let quantised = match format {
            WeightFormat::Stored => 0,
            _ => {
                let widest = self.hidden_size.max(self.intermediate_size).max(q) as u64;
                widest.div_ceil(ROW_GROUP) * ROW_GROUP_BYTES * tokens
            }
        };
        4 * activations.sum::<u64>() + quantised + THREAD_BYTES * largest.threads as u64
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use tinyserve_kernels::Cpu;
    use tinyserve_kv::KvFormat;

    use super::*;
    use tinyserve_kernels::Attention;

    use crate::{
        Activations, Batch, KvCache, LogitRows, Model, Observe, SequenceStep, StepOutput,
        SyntheticModel, SyntheticShape,
    };

    const STEP: LargestStep = LargestStep { tokens: 256, sequences: 1, logits: 1, threads: 2 };

    fn checkpoints() -> Vec<Checkpoint> {
        let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden");
        let names = ["gpt2-tiny", "gpt2-hub-names", "llama-gqa", "llama-sharded-f16"];
        let stored = names.map(|name| Checkpoint::open(&golden.join(name)).unwrap());
        let shapes = [SyntheticShape::TinyGpt2, SyntheticShape::TinyLlama];
        let made = shapes.map(|shape| SyntheticModel::new(shape, DType::F16).checkpoint().unwrap());
        stored.into_iter().chain(made).chain([Checkpoint::builtin().unwrap()]).collect()
    }

    #[test]
    fn weights_are_planned_to_the_byte() {
        for checkpoint in checkpoints() {
            for format in [WeightFormat::Stored, WeightFormat::Int8, WeightFormat::Int4] {
                let model =
                    Model::load_as(Cpu::reference(), &checkpoint, format, |_, _| {}).unwrap();
                let planned = checkpoint.config().weight_bytes(checkpoint.dtype(), format);
                assert_eq!(planned, model.weight_bytes() as u64, "{:?}", checkpoint.config());
            }
        }
    }

    #[test]
    fn open_pages_of_all_sequences_are_planned() {
        let checkpoint =
            SyntheticModel::new(SyntheticShape::TinyLlama, DType::F16).checkpoint().unwrap();
        let layout = checkpoint.config().kv_layout(8, KvFormat::Int4).unwrap();
        let narrow = check_open_pages(&checkpoint, layout);
        let wide = check_open_pages(&checkpoint, layout.with_open_format(KvFormat::F32).unwrap());
        assert_eq!(wide, 2 * narrow);
    }

    /// Bytes that are planned for open pages, of which as many are held as are planned at most.
    fn check_open_pages(checkpoint: &Checkpoint, layout: KvLayout) -> u64 {
        let config = checkpoint.config();
        let largest = LargestStep { tokens: 60, sequences: 3, logits: 3, threads: 1 };
        let pages = 40;
        let plan = MemoryPlan::new(checkpoint, WeightFormat::Stored, layout, largest, pages);
        let model = Model::load(Cpu::reference(), checkpoint, |_, _| {}).unwrap();
        let mut cache = KvCache::new(model.backend(), layout, pages).unwrap();
        let (mut activations, mut output) = (Activations::new(&model), StepOutput::default());
        let mut tables = [(); 3].map(|()| cache.new_table());
        let mut most = 0;
        // Each begins pages and leaves them open, again and again.
        for lengths in [[5, 5, 5], [20, 20, 20], [1, 58, 1], [1, 1, 1], [6, 6, 6]] {
            let tokens = [7; 60];
            for (table, length) in tables.iter_mut().zip(lengths) {
                cache.extend(model.backend(), table, length).unwrap();
            }
            let step = |(table, length): (_, usize)| SequenceStep {
                tokens: &tokens[..length],
                table,
                attention: Attention::Dense,
                logits: LogitRows::Last,
                observe: Observe::NOTHING,
            };
            let steps: Vec<_> = tables.iter().zip(lengths).map(step).collect();
            let batch = Batch { sequences: &steps, measure_recall: false, list_pages: false };
            model.forward(&mut activations, &mut cache, &batch, &mut output).unwrap();
            most = most.max(cache.pages.open_bytes());
        }
        let index = config.layers * pages * size_of::<u32>();
        let (held, planned) = ((most - index) as u64, plan.open_bytes());
        assert!(held <= planned && 2 * held > planned, "{held} of {planned}");
        // Sequences that rest hold none: what they let go serves the next ones.
        tables.iter_mut().for_each(|table| cache.rest(table));
        assert!(tables.iter().all(|table| table.len() % 8 == 0));
        let mut next = cache.new_table();
        cache.extend(model.backend(), &mut next, 1).unwrap();
        assert_eq!(cache.pages.open_bytes(), most);
        planned
    }

    #[test]
    fn every_checkpoint_has_a_fingerprint_of_its_own() {
        let mut all: Vec<_> = checkpoints().iter().map(Checkpoint::fingerprint).collect();
        assert_eq!(all, checkpoints().iter().map(Checkpoint::fingerprint).collect::<Vec<_>>());
        let other = SyntheticModel::new(SyntheticShape::TinyGpt2, DType::F16).seed(1);
        all.push(other.checkpoint().unwrap().fingerprint());
        let count = all.len();
        all.sort_unstable();
        all.dedup();
        assert_eq!(all.len(), count);
    }

    #[test]
    fn as_many_pages_as_fit_and_no_more() {
        let checkpoint = Checkpoint::builtin().unwrap();
        let layout = checkpoint.config().kv_layout(16, KvFormat::F16).unwrap();
        let plan = MemoryPlan::new(&checkpoint, WeightFormat::Stored, layout, STEP, 1);
        let plan = plan.process_bytes(1_000_000);
        let target = 50_000_000;
        let fitted = plan.fit(target, usize::MAX).unwrap();
        let page = layout.bytes_per_page() as u64;
        assert!(fitted.total_bytes() <= target && fitted.total_bytes() + page > target);
        assert_eq!(fitted.kv_bytes() + fitted.box_bytes(), fitted.pages as u64 * page);
        assert_eq!(fitted.tokens(), 16 * fitted.pages);
        // A scorer that keeps two more boxes of each page leaves room for fewer pages.
        let keeping = plan.kept_boxes(2).fit(target, usize::MAX).unwrap();
        let page = page + 2 * layout.box_bytes_per_page() as u64;
        assert!(keeping.total_bytes() <= target && keeping.total_bytes() + page > target);
        assert_eq!(keeping.kv_bytes() + keeping.box_bytes(), keeping.pages as u64 * page);
        assert_eq!(plan.fit(target, 7).unwrap().pages, 7);
        let smallest = plan.total_bytes();
        assert_eq!(plan.fit(smallest, usize::MAX).unwrap().pages, 1);
        let refused = plan.fit(smallest - 1, usize::MAX).unwrap_err().to_string();
        assert!(refused.contains("target_memory_gb is 0.00"), "{refused}");
    }
}
