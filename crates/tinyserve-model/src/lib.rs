#![doc = include_str!("../README.md")]
#![deny(unsafe_code)]

mod batch;
mod builtin;
mod cache;
mod checkpoint;
mod config;
mod error;
mod files;
mod forward;
mod generate;
mod incremental;
mod json;
mod load;
#[allow(unsafe_code)]
mod mmap;
mod model;
mod perplexity;
mod rope;
mod sampler;
mod stop;
mod synthetic;
mod tokenizer;
mod weights;
mod weights_cache;

pub use batch::{Batch, LogitRows, SequenceStep, StepOutput};
pub use builtin::BUILTIN_MODEL;
pub use cache::KvCache;
pub use checkpoint::{Checkpoint, TensorInfo};
pub use config::{Architecture, ModelConfig};
pub use error::ModelError;
pub use forward::Activations;
pub use generate::{FinishReason, Generation, GenerationEvent, GenerationOutcome, Generator};
pub use incremental::IncrementalDecoder;
pub use load::LoadOptions;
pub use model::Model;
pub use perplexity::Perplexity;
pub use rope::{RopeConfig, RopeScaling};
pub use sampler::{SampledToken, Sampler, SamplingParams, logprob, top_logprobs};
pub use stop::StopMatcher;
pub use synthetic::{SyntheticModel, SyntheticNormal, SyntheticShape, SyntheticTensor};
pub use tokenizer::Tokenizer;
pub use weights_cache::CacheOutcome;
