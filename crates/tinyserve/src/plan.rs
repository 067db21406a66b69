//! The memory of an engine, planned before its model is loaded.

use tinyserve_kernels::{Cpu, Cuda};
use tinyserve_kv::PageSummary;
use tinyserve_model::{Checkpoint, DeviceLimits, LargestStep, MemoryPlan};
use tinyserve_sched::MOST_SCORED_TOKENS;

use crate::{AttentionMode, TinyServeConfig, TinyServeError, memory};

/// Share of the available memory that an engine may take unless the settings say how much.
const SHARE_OF_AVAILABLE: f64 = 0.8;

/// Where the memory of an engine goes, and how much of it there is; with several replicas, of one
/// of them.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct PlannedMemory {
    /// Most bytes that the process may have resident: `target_memory_gb`, or what it has and
    /// `memory_utilization` of the memory that is available; `None` where the system does not say
    /// how much that is.
    pub target_bytes: Option<u64>,
    /// The plan with every page that fits into the target.
    pub largest: MemoryPlan,
    /// The plan with the pages that the engine has.
    pub plan: MemoryPlan,
    /// Most tokens of a sequence, prompt included.
    pub max_sequence_length: usize,
}

impl PlannedMemory {
    /// Plans an engine of `threads` threads for the model of `checkpoint`.
    ///
    /// # Errors
    /// When a setting does not fit the model, or the target holds no page, fewer pages than
    /// `kv_cache_memory_bytes` or fewer tokens than `max_sequence_length` ask for.
    pub fn new(
        config: &TinyServeConfig,
        checkpoint: &Checkpoint,
        threads: usize,
    ) -> Result<Self, TinyServeError> {
        let memory = (memory::process(), memory::available());
        Self::with(config, checkpoint, threads, memory, None)
    }

    /// Plans an engine whose weights and pages lie on a device of its own, with `free` bytes of
    /// memory.
    ///
    /// # Errors
    /// As [`Self::new`].
    pub fn on_device(
        config: &TinyServeConfig,
        checkpoint: &Checkpoint,
        free: u64,
    ) -> Result<Self, TinyServeError> {
        Self::with(config, checkpoint, 1, (0, Some(free)), Some(free))
    }

    fn with(
        config: &TinyServeConfig,
        checkpoint: &Checkpoint,
        threads: usize,
        (resident, available): (u64, Option<u64>),
        on_device: Option<u64>,
    ) -> Result<Self, TinyServeError> {
        let layout = config.kv_layout(checkpoint.config(), checkpoint.dtype())?;
        let weights = config.weights.resolve(checkpoint.dtype())?;
        let limit = config.sequence_limit(checkpoint.config().max_positions)?;
        let sequences = config.max_num_seqs;
        let chunks = config.attention_chunk_size.saturating_mul(sequences);
        let tokens = config.scheduling().max_num_batched_tokens.min(chunks);
        let logits = sequences.saturating_add(MOST_SCORED_TOKENS);
        let step = LargestStep { tokens, sequences, logits, threads };
        // Room for the longest sequence as often as sequences run together, or for what fits.
        let replicas = config.replicas.max(config.cuda_devices().len());
        let pages = match config.kv_cache_memory_bytes {
            Some(bytes) => bytes / replicas / layout.bytes_per_page(),
            None => layout.pages_for(limit).saturating_mul(sequences),
        };
        let pages = pages.min(u32::MAX as usize);
        let mut wanted = MemoryPlan::new(checkpoint, weights, layout, step, pages);
        let policy = config.selection_policy();
        if let Some(free) = on_device {
            let gathers_keys = !Cuda::has_kernels(&policy);
            let limits =
                DeviceLimits { context: limit, free: free / replicas as u64, gathers_keys };
            wanted = wanted.on_device(checkpoint, weights, step, limits);
        }
        let keeps = config.attention != AttentionMode::Dense
            && config.cuda_devices().is_empty()
            && Cpu::has_kernels(&policy);
        let kept = policy.scorer.summary().filter(|_| keeps).map_or(0, PageSummary::boxes);
        let wanted = wanted.process_bytes(resident).kept_boxes(kept);
        let target_bytes = match config.target_memory_gb {
            Some(gigabytes) => Some((gigabytes * 1e9) as u64),
            None => {
                let share = config.memory_utilization.unwrap_or(SHARE_OF_AVAILABLE);
                available.map(|available| resident + (available as f64 * share) as u64)
            }
        };
        let target_bytes = target_bytes.map(|all| all / replicas as u64);
        let largest = match target_bytes {
            Some(target) => wanted.fit(target, u32::MAX as usize)?,
            None => wanted,
        };
        let beside = format!(
            "which {:.3} GB hold beside the weights (see target_memory_gb)",
            target_bytes.unwrap_or(0) as f64 / 1e9
        );
        if let Some(bytes) = config.kv_cache_memory_bytes
            && !(1..=largest.pages).contains(&pages)
        {
            let page = layout.bytes_per_page() * replicas;
            return Err(TinyServeError::Setting {
                field: "kv_cache_memory_bytes",
                found: bytes.to_string(),
                expected: format!(
                    "{page}, a page, to {}, {beside}",
                    page.saturating_mul(largest.pages)
                ),
            });
        }
        let most = if config.kv_cache_memory_bytes.is_some() { wanted } else { largest };
        let asked = config.max_sequence_length.filter(|&tokens| tokens > most.tokens());
        if let Some(tokens) = asked {
            let of = match config.kv_cache_memory_bytes {
                Some(_) => "which kv_cache_memory_bytes hold",
                None => &beside,
            };
            return Err(TinyServeError::Setting {
                field: "max_sequence_length",
                found: tokens.to_string(),
                expected: format!("at most {}, {of}", most.tokens()),
            });
        }
        let plan = if wanted.pages <= largest.pages { wanted } else { largest };
        let max_sequence_length = limit.min(plan.tokens());
        Ok(Self { target_bytes, largest, plan, max_sequence_length })
    }
}
