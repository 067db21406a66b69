#![doc = include_str!("../README.md")]
#![forbid(unsafe_code)]

mod affinity;
mod choices;
mod config;
mod engine;
mod error;
mod fused_table;
pub mod memory;
mod optimize;
mod plan;
mod request;

pub use choices::{
    ApproximateAttention, AttentionMode, Device, EntropySignalName, EvictionName, GroupReduceName,
    KvCacheDtype, OpenPageDtype, RopeFrequencyDtype, ScorerName, Weights,
};
pub use config::TinyServeConfig;
pub use engine::{TinyServe, TinyServeBuilder};
pub use error::TinyServeError;
pub use fused_table::{FusedTableFile, FusedTableRow, FusedTime};
pub use optimize::{Measured, Optimized};
pub use plan::PlannedMemory;
pub use request::{
    AttentionStats, FinishReason, KvUsage, Prompt, Stats, StreamEvent, Timings, TinyServeRequest,
    TinyServeResponse,
};

/// Kernels: the backend seam and its CPU implementation.
pub use tinyserve_kernels as kernels;
/// The KV cache: pages, boxes, policies, the seam for custom selectors.
pub use tinyserve_kv as kv;
/// Checkpoints, tokenizers, the forward pass, sampling.
pub use tinyserve_model as model;
/// What can be hooked into the decoding of a request.
pub use tinyserve_plugins as plugins;
/// The scheduler: the engine that requests run on, its events, sessions and counters.
pub use tinyserve_sched as sched;
