#![doc = include_str!("../README.md")]
#![deny(unsafe_code)]

mod batch;
mod builtin;
mod cache;
mod chat_template;
mod checkpoint;
mod config;
mod error;
mod files;
mod forward;
mod incremental;
mod json;
mod load;
#[allow(unsafe_code)]
mod mmap;
mod model;
mod observe;
mod perplexity;
mod plan;
mod rope;
mod sampler;
mod session;
mod stop;
mod synthetic;
mod tokenizer;
mod weights;
mod weights_cache;

pub use batch::{Batch, LogitRows, Observe, SequenceStep, StepOutput};
pub use builtin::BUILTIN_MODEL;
pub use cache::KvCache;
pub use chat_template::{
    ChatInput, ChatMessage, ChatTemplate, TemplateMap, TemplateValue, template_value,
};
pub use checkpoint::{Checkpoint, TensorInfo};
pub use config::{Architecture, ModelConfig};
pub use error::ModelError;
pub use forward::Activations;
pub use incremental::IncrementalDecoder;
pub use load::LoadOptions;
pub use model::Model;
pub use perplexity::{Perplexity, PerplexityWindow, perplexity_windows};
pub use plan::{DeviceLimits, LargestStep, MemoryPlan};
pub use rope::{RopeConfig, RopeScaling};
pub use sampler::{
    SampleContext, SampledToken, Sampler, SamplingParams, logprob, top_logprobs, top_logprobs_of,
};
pub use session::{RestoredSession, SelectedTokens, SessionToSave};
pub use stop::StopMatcher;
pub use synthetic::{
    InductionGeometry, InductionModel, LookupTokens, SyntheticModel, SyntheticNormal,
    SyntheticShape, SyntheticTensor,
};
pub use tokenizer::Tokenizer;
pub use weights_cache::CacheOutcome;
