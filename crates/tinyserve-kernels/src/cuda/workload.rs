//! What the backend allocates beside weights and pages, known before anything is.
//!
//! Each line of the sum is a buffer of one of the files beside this one; a test compares it with what
//! is allocated.

use tinyserve_kv::{GROUP_PAGES, KvLayout};

use super::bucket::bucket;
use super::memory::room;
use super::{attend, copies, cublas, linear, top_logits};
use crate::{DType, Heads, WeightFormat};

/// The largest step that a device has to have room for.
#[derive(Debug, Clone)]
pub struct CudaWorkload<'a> {
    /// The pages.
    pub layout: KvLayout,
    /// Heads of the model.
    pub heads: Heads,
    /// Activations that are alive together, as rows and columns.
    pub activations: &'a [(usize, usize)],
    /// Tokens of a step.
    pub tokens: usize,
    /// Sequences that run together.
    pub sequences: usize,
    /// Tokens of a step that yield logits, and the vocabulary.
    pub logits: (usize, usize),
    /// Most tokens of a sequence.
    pub context: usize,
    /// Pages that there is memory for, at most.
    pub pages: usize,
    /// Most inputs and most outputs of a matrix, the head's left aside.
    pub widest: (usize, usize),
    /// How weights are stored, and kept.
    pub weights: (DType, WeightFormat),
    /// Whether selectors on the host see keys.
    pub gathers_keys: bool,
}

impl CudaWorkload<'_> {
    /// Most bytes of buffers: activations, what operations keep for themselves, and what pages take
    /// beyond their number.
    #[must_use]
    pub fn scratch_bytes(&self) -> u64 {
        let activations =
            self.activations.iter().map(|&(rows, columns)| f32s(&[bucket(rows), columns]));
        // Ids, positions, slots and moves of a step's tokens, and what each page's run is.
        let indices = f32s(&[self.tokens.max(self.sequences), 4]).saturating_mul(4);
        let pages = (GROUP_PAGES - 1 + copies::STAGES) * self.layout.bytes_per_page();
        let total = activations.fold(0u64, u64::saturating_add);
        total
            .saturating_add(indices)
            .saturating_add(pages as u64)
            .saturating_add(attend::most_bytes(self))
            .saturating_add(linear::most_bytes(self))
            .saturating_add(cublas::most_bytes(self))
            .saturating_add(top_logits::most_bytes(self.sequences, self.logits.1))
    }

    /// Most pages of single layers that hold no codes yet, as slots of all layers are made: twice
    /// as many when they run out, while the old ones are still there.
    #[must_use]
    pub fn open_pages(&self) -> usize {
        // Those that are open, and those that the last step filled.
        let slots = (2 * self.sequences).saturating_add(self.layout.pages_for(self.tokens));
        slots.max(4).saturating_mul(3 * self.layout.shape().layers)
    }
}

/// Bytes of a buffer of so many times so many numbers of four bytes.
pub(super) fn f32s(sizes: &[usize]) -> u64 {
    let bytes = sizes.iter().fold(4usize, |bytes, &n| bytes.saturating_mul(n));
    room(bytes.min(1 << 60)) as u64
}
