//! A model's weights on a backend.

use tinyserve_kernels::{Activation, Backend, Heads, NormKind};
use tinyserve_kv::{KvFormat, KvLayout, KvShape};

use crate::weights_cache::CacheOutcome;
use crate::{Architecture, ModelConfig, ModelError};

/// A norm's scale and shift.
#[derive(Debug)]
pub(crate) struct Norm<B: Backend> {
    pub(crate) weight: B::Vector,
    pub(crate) bias: Option<B::Vector>,
}

/// One transformer layer.
#[derive(Debug)]
pub(crate) struct Block<B: Backend> {
    pub(crate) attention_norm: Norm<B>,
    /// Query, key and value projections, side by side.
    pub(crate) qkv: B::Linear,
    pub(crate) attention_out: B::Linear,
    pub(crate) mlp_norm: Norm<B>,
    /// The first feed-forward projection; gate and up side by side when gated.
    pub(crate) mlp_in: B::Linear,
    pub(crate) mlp_out: B::Linear,
}

/// What differs between the architectures, as data that one forward pass reads.
#[derive(Debug, Clone)]
pub(crate) struct Structure {
    pub(crate) heads: Heads,
    pub(crate) norm: NormKind,
    pub(crate) norm_epsilon: f32,
    pub(crate) activation: Activation,
    pub(crate) gated: bool,
    pub(crate) attention_scale: f32,
    /// Empty when positions are learned.
    pub(crate) inverse_frequencies: Vec<f32>,
}

/// A loaded model: its weights, where its backend wants them.
#[derive(Debug)]
pub struct Model<B: Backend> {
    pub(crate) backend: B,
    pub(crate) config: ModelConfig,
    pub(crate) structure: Structure,
    pub(crate) token_embedding: B::Linear,
    pub(crate) position_embedding: Option<B::Linear>,
    pub(crate) blocks: Vec<Block<B>>,
    pub(crate) final_norm: Norm<B>,
    /// `None` when the token embedding serves as the output head.
    pub(crate) head: Option<B::Linear>,
    pub(crate) weight_bytes: usize,
    pub(crate) weights_cache: Option<CacheOutcome>,
}

impl<B: Backend> Model<B> {
    /// Bytes of the matrices and vectors as the backend keeps them.
    #[must_use]
    pub fn weight_bytes(&self) -> usize {
        self.weight_bytes
    }

    /// Bytes of weights that every step reads: all but the tables of which it looks up rows.
    #[must_use]
    pub fn streamed_bytes(&self) -> usize {
        let tokens = self.head.is_some().then_some(&self.token_embedding);
        let tables = tokens.into_iter().chain(&self.position_embedding);
        self.weight_bytes - tables.map(|table| self.backend.linear_bytes(table)).sum::<usize>()
    }

    /// What became of the cache of weights, where one was asked for.
    #[must_use]
    pub fn weights_cache(&self) -> Option<&CacheOutcome> {
        self.weights_cache.as_ref()
    }

    /// The device that the weights are on.
    #[must_use]
    pub fn backend(&self) -> &B {
        &self.backend
    }

    /// The model's shape.
    #[must_use]
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }
}

impl ModelConfig {
    /// The layout of this model's KV pages.
    ///
    /// # Errors
    /// When the page size is 0 or too large.
    pub fn kv_layout(&self, page_size: usize, format: KvFormat) -> Result<KvLayout, ModelError> {
        Ok(KvLayout::new(KvShape {
            layers: self.layers,
            kv_heads: self.kv_heads,
            head_dim: self.head_dim,
            page_size,
            format,
        })?)
    }
}

impl Structure {
    pub(crate) fn of(config: &ModelConfig) -> Self {
        let (norm, gated) = match config.architecture {
            Architecture::Gpt2 => (NormKind::Layer, false),
            Architecture::Llama => (NormKind::Rms, true),
        };
        Self {
            heads: Heads {
                q_heads: config.q_heads,
                kv_heads: config.kv_heads,
                head_dim: config.head_dim,
            },
            norm,
            norm_epsilon: config.norm_epsilon,
            activation: config.activation,
            gated,
            attention_scale: (config.head_dim as f32).sqrt().recip(),
            inverse_frequencies: config
                .rope
                .as_ref()
                .map(|rope| rope.inverse_frequencies(config.head_dim))
                .unwrap_or_default(),
        }
    }
}
